//! Container logs: the CRI lines that shims write, cut and decorated as `kubectl logs` asks.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::channels::{STDERR, STDOUT};
use super::exec::url_pairs;
use super::find_pod;
use crate::kubelet::{PodHandle, Shared};

/// How often a followed file is looked at.
const POLL: Duration = Duration::from_millis(50);
/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// What `kubectl logs` asks for.
#[derive(Clone, Debug, Default, PartialEq)]
struct Options {
    follow: bool,
    previous: bool,
    timestamps: bool,
    tail: Option<usize>,
    /// Lines before this moment (RFC 3339, UTC) are left out.
    since: Option<String>,
    limit: Option<usize>,
}

impl Options {
    fn parse(query: &str, now: time::OffsetDateTime) -> Result<Self, String> {
        let mut options = Self::default();
        for (name, value) in url_pairs(query) {
            let on = matches!(value.as_str(), "1" | "true");
            let number = || {
                value
                    .parse::<u32>()
                    .map_err(|_| format!("{name}: {value:?} is no number of 0 or more"))
            };
            match name.as_str() {
                "follow" => options.follow = on,
                "previous" => options.previous = on,
                "timestamps" => options.timestamps = on,
                "tailLines" => options.tail = Some(number()? as usize),
                "limitBytes" => options.limit = Some(number()? as usize),
                "sinceSeconds" => {
                    let at = now - Duration::from_secs(number()?.into());
                    options.since = Some(crate::kubelet::events::format(at));
                }
                "sinceTime" => {
                    let at = time::OffsetDateTime::parse(&value, &time::format_description::well_known::Rfc3339)
                        .map_err(|_| format!("sinceTime: {value:?} is no RFC 3339 time"))?;
                    options.since = Some(crate::kubelet::events::format(at.to_offset(time::UtcOffset::UTC)));
                }
                _ => {}
            }
        }
        Ok(options)
    }
}

/// One stored line.
#[derive(Debug, PartialEq)]
struct Line<'a> {
    time: &'a str,
    stderr: bool,
    full: bool,
    text: &'a [u8],
}

fn parse_line(line: &[u8]) -> Option<Line<'_>> {
    let mut parts = line.splitn(4, |b| *b == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let stream = parts.next()?;
    let full = parts.next()? == b"F";
    Some(Line {
        time,
        stderr: stream == b"stderr",
        full,
        text: parts.next()?,
    })
}

/// Turns stored lines into output.
struct Renderer {
    timestamps: bool,
    since: Option<String>,
    /// The next piece continues a line.
    within: bool,
    left: usize,
}

impl Renderer {
    fn render(&mut self, line: &[u8], out: &mut Vec<u8>) {
        let Some(line) = parse_line(line) else { return };
        // Same format up to the second, so the texts compare as the times do; a line of the same second stays.
        if self
            .since
            .as_deref()
            .is_some_and(|since| line.time.get(..19) < since.get(..19))
        {
            return;
        }
        let start = out.len();
        if self.timestamps && !self.within {
            out.extend_from_slice(line.time.as_bytes());
            out.push(b' ');
        }
        out.extend_from_slice(line.text);
        if line.full {
            out.push(b'\n');
        }
        self.within = !line.full;
        let allowed = (out.len() - start).min(self.left);
        out.truncate(start + allowed);
        self.left -= allowed;
    }
}

/// A log file that is read on while it grows and is rotated.
struct Tailer {
    path: PathBuf,
    file: Option<(std::fs::File, u64)>,
    rest: Vec<u8>,
}

impl Tailer {
    fn new(path: &FsPath) -> Self {
        Self {
            path: path.to_owned(),
            file: None,
            rest: Vec::new(),
        }
    }

    /// Goes to the end of what is there.
    fn skip(&mut self) {
        if let Ok(mut file) = std::fs::File::open(&self.path) {
            let inode = file.metadata().map_or(0, |m| m.ino());
            let _ = file.seek(SeekFrom::End(0));
            self.file = Some((file, inode));
        }
    }

    /// Whole lines that have come since; empty when there are none.
    fn read(&mut self) -> std::io::Result<Vec<Vec<u8>>> {
        if self.file.is_none() {
            match std::fs::File::open(&self.path) {
                Ok(file) => {
                    let inode = file.metadata()?.ino();
                    self.file = Some((file, inode));
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(error) => return Err(error),
            }
        }
        let Some((file, inode)) = &mut self.file else {
            return Ok(Vec::new());
        };
        let mut chunk = vec![0u8; CHUNK];
        let count = file.read(&mut chunk)?;
        if count == 0 {
            // Rotated: this one is read to its end, the next has the name now.
            if std::fs::metadata(&self.path).is_ok_and(|m| m.ino() != *inode) {
                self.file = None;
            }
            return Ok(Vec::new());
        }
        self.rest.extend_from_slice(&chunk[..count]);
        let mut lines: Vec<Vec<u8>> = self.rest.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
        self.rest = lines.pop().unwrap_or_default();
        Ok(lines)
    }
}

/// All stored lines, the older generation first.
fn all_lines(path: &FsPath) -> Vec<Vec<u8>> {
    let mut older = path.to_owned().into_os_string();
    older.push(".1");
    [PathBuf::from(older), path.to_owned()]
        .iter()
        .filter_map(|path| std::fs::read(path).ok())
        .flat_map(|text| {
            text.split(|b| *b == b'\n')
                .filter(|l| !l.is_empty())
                .map(<[u8]>::to_vec)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Index of the first of the last `count` lines, where pieces of one line count as one.
fn tail_start(lines: &[Vec<u8>], count: usize) -> usize {
    let mut seen = 0;
    for (index, line) in lines.iter().enumerate().rev() {
        let ends = parse_line(line).is_none_or(|l| l.full) || index + 1 == lines.len();
        if ends {
            if seen == count {
                return index + 1;
            }
            seen += 1;
        }
    }
    0
}

/// The last lines as text, for termination messages.
pub(crate) fn tail_text(path: &FsPath, count: usize) -> String {
    let lines = all_lines(path);
    let mut out = Vec::new();
    let mut renderer = Renderer {
        timestamps: false,
        since: None,
        within: false,
        left: usize::MAX,
    };
    for line in &lines[tail_start(&lines, count)..] {
        renderer.render(line, &mut out);
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// `GET /containerLogs/…`.
pub(super) async fn logs(
    shared: State<Arc<Shared>>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    RawQuery(query): RawQuery,
) -> Response {
    let options = match Options::parse(&query.unwrap_or_default(), time::OffsetDateTime::now_utc()) {
        Ok(options) => options,
        Err(message) => return (StatusCode::BAD_REQUEST, message).into_response(),
    };
    let handle = match find_pod(&shared, &namespace, &pod) {
        Ok(handle) => handle,
        Err(refusal) => return refusal.into_response(),
    };
    let bad = |message: String| (StatusCode::BAD_REQUEST, message).into_response();
    if !handle.names.contains(&container) {
        return bad(format!("container {container} is not valid for pod {pod}"));
    }
    let live = handle
        .containers
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get(&container)
        .cloned();
    let Some(live) = live else {
        return bad(format!(
            "container \"{container}\" in pod \"{pod}\" is waiting to start: ContainerCreating"
        ));
    };
    let path = if options.previous {
        match &live.previous {
            Some(path) => path.clone(),
            None => {
                return bad(format!(
                    "previous terminated container \"{container}\" in pod \"{pod}\" not found"
                ));
            }
        }
    } else {
        live.log.clone()
    };
    let follow = options.follow && !options.previous && live.running;
    let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(16);
    tokio::spawn(stream(
        path,
        options,
        follow.then_some((handle, container, live.id)),
        sender,
    ));
    let body = Body::from_stream(ReceiverStream::new(receiver));
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response()
}

type Followed = Option<(Arc<PodHandle>, String, String)>;

async fn stream(path: PathBuf, options: Options, follow: Followed, out: mpsc::Sender<Result<Bytes, std::io::Error>>) {
    let mut renderer = Renderer {
        timestamps: options.timestamps,
        since: options.since.clone(),
        within: false,
        left: options.limit.unwrap_or(usize::MAX),
    };
    let mut tailer = Tailer::new(&path);
    // Read to the end of the present file through the follower, so that no line is lost or doubled in between.
    let read = tokio::task::spawn_blocking({
        let path = path.clone();
        move || {
            let mut older = path.into_os_string();
            older.push(".1");
            let mut lines: Vec<Vec<u8>> = std::fs::read(PathBuf::from(older))
                .map(|text| {
                    text.split(|b| *b == b'\n')
                        .filter(|l| !l.is_empty())
                        .map(<[u8]>::to_vec)
                        .collect()
                })
                .unwrap_or_default();
            while let Ok(more) = tailer.read() {
                if more.is_empty() {
                    break;
                }
                lines.extend(more);
            }
            (tailer, lines)
        }
    });
    let Ok((mut tailer, lines)) = read.await else { return };
    let start = options.tail.map_or(0, |count| tail_start(&lines, count));
    for chunk in lines[start..].chunks(256) {
        let mut text = Vec::new();
        for line in chunk {
            renderer.render(line, &mut text);
        }
        if !text.is_empty() && out.send(Ok(text.into())).await.is_err() {
            return;
        }
        if renderer.left == 0 {
            return;
        }
    }
    let Some((pod, container, id)) = follow else { return };
    loop {
        let running = is_running(&pod, &container, &id);
        let mut text = Vec::new();
        match tailer.read() {
            Ok(lines) => lines.iter().for_each(|line| renderer.render(line, &mut text)),
            Err(error) => {
                let _ = out.send(Err(error)).await;
                return;
            }
        }
        if !text.is_empty() {
            if out.send(Ok(text.into())).await.is_err() || renderer.left == 0 {
                return;
            }
        } else if !running {
            // Looked at once more after the end was known, so nothing is missing.
            return;
        } else {
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = out.closed() => return,
            }
        }
    }
}

fn is_running(pod: &PodHandle, container: &str, id: &str) -> bool {
    let containers = pod.containers.lock().unwrap_or_else(PoisonError::into_inner);
    containers
        .get(container)
        .is_some_and(|live| live.running && live.id == id)
}

/// A container's output from now on, as it was written, with the channel it came from; ends with the container.
pub(super) async fn follow_raw(
    path: PathBuf,
    pod: Arc<PodHandle>,
    container: String,
    id: String,
    out: mpsc::Sender<(u8, Vec<u8>)>,
) {
    let mut tailer = Tailer::new(&path);
    tailer.skip();
    loop {
        let running = is_running(&pod, &container, &id);
        let Ok(lines) = tailer.read() else { return };
        if lines.is_empty() {
            if !running {
                return;
            }
            tokio::time::sleep(POLL).await;
        }
        for line in lines.iter().filter_map(|line| parse_line(line)) {
            let mut text = line.text.to_vec();
            if line.full {
                text.push(b'\n');
            }
            if out
                .send((if line.stderr { STDERR } else { STDOUT }, text))
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(texts: &[&str]) -> Vec<Vec<u8>> {
        texts.iter().map(|t| t.as_bytes().to_vec()).collect()
    }

    #[test]
    fn tail_counts_whole_lines() {
        let all = lines(&["T stdout F a", "T stdout P b", "T stdout F c", "T stdout F d"]);
        assert_eq!(tail_start(&all, 0), 4);
        assert_eq!(tail_start(&all, 1), 3);
        assert_eq!(tail_start(&all, 2), 1, "b and c are one line");
        assert_eq!(tail_start(&all, 9), 0);
    }

    #[test]
    fn since_timestamps_and_limits_are_applied() {
        let mut out = Vec::new();
        let mut renderer = Renderer {
            timestamps: true,
            since: Some("2026-01-02T00:00:00Z".into()),
            within: false,
            left: 200,
        };
        renderer.render(b"2026-01-01T23:59:59.999999999Z stdout F old", &mut out);
        renderer.render(b"2026-01-02T00:00:00.5Z stdout P ab", &mut out);
        renderer.render(b"2026-01-02T00:00:01.5Z stdout F cd", &mut out);
        assert_eq!(String::from_utf8(out).expect("text"), "2026-01-02T00:00:00.5Z abcd\n");
        let mut out = Vec::new();
        let mut renderer = Renderer {
            timestamps: false,
            since: None,
            within: false,
            left: 3,
        };
        renderer.render(b"t stdout F abcdef", &mut out);
        assert_eq!(out, b"abc");
        assert_eq!(renderer.left, 0);
    }

    #[test]
    fn a_tailer_follows_a_rotation() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("0.log");
        std::fs::write(&path, "one\ntw").expect("write");
        let mut tailer = Tailer::new(&path);
        assert_eq!(tailer.read().expect("read"), lines(&["one"]));
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut f| std::io::Write::write_all(&mut f, b"o\n"))
            .expect("append");
        std::fs::rename(&path, dir.path().join("0.log.1")).expect("rename");
        std::fs::write(&path, "three\n").expect("write");
        assert_eq!(tailer.read().expect("read"), lines(&["two"]));
        assert!(tailer.read().expect("read").is_empty());
        assert_eq!(tailer.read().expect("read"), lines(&["three"]));
    }

    #[test]
    fn bad_options_are_named() {
        let now = time::OffsetDateTime::UNIX_EPOCH + Duration::from_secs(100);
        assert_eq!(
            Options::parse("tailLines=-1", now).expect_err("bad"),
            "tailLines: \"-1\" is no number of 0 or more"
        );
        let options = Options::parse("sinceSeconds=40&follow=true", now).expect("ok");
        assert_eq!(options.since.as_deref(), Some("1970-01-01T00:01:00Z"));
        assert!(options.follow);
    }
}
