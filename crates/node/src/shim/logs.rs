//! Container logs: lines in the CRI's format, in a file of bounded size with one older generation.
//!
//! Written by the shim only; the node agent reads the files (`kubelet_http`).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Size at which the file is renamed to `<name>.1` and begun anew.
const MAX_SIZE: u64 = 10 << 20;
/// Longer lines are split; all parts but the last are marked `P`.
const MAX_LINE: usize = 16 << 10;

/// Which output a line came from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// The log file of one container.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
}

impl LogFile {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Self::with_limit(path, MAX_SIZE)
    }

    fn with_limit(path: &Path, limit: u64) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            size,
            limit,
        })
    }

    fn write(&mut self, stream: Stream, full: bool, text: &[u8]) -> io::Result<()> {
        let mut line = Vec::with_capacity(text.len() + 48);
        write!(
            line,
            "{} {} {} ",
            timestamp(),
            stream.name(),
            if full { 'F' } else { 'P' }
        )?;
        line.extend_from_slice(text);
        line.push(b'\n');
        if self.size + line.len() as u64 > self.limit && self.size > 0 {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            std::fs::rename(&self.path, older)?;
            self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
            self.size = 0;
        }
        self.file.write_all(&line)?;
        self.size += line.len() as u64;
        Ok(())
    }
}

/// RFC 3339 with nanoseconds, UTC.
fn timestamp() -> String {
    let now = time::OffsetDateTime::now_utc();
    let (h, m, s, nano) = now.to_hms_nano();
    format!(
        "{:04}-{:02}-{:02}T{h:02}:{m:02}:{s:02}.{nano:09}Z",
        now.year(),
        u8::from(now.month()),
        now.day()
    )
}

/// Cuts one output into lines.
#[derive(Debug)]
pub(super) struct LineWriter {
    stream: Stream,
    rest: Vec<u8>,
}

impl LineWriter {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            stream,
            rest: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, log: &mut LogFile, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let room = MAX_LINE - self.rest.len();
            let window = &data[..data.len().min(room)];
            match window.iter().position(|byte| *byte == b'\n') {
                Some(end) => {
                    self.rest.extend_from_slice(&window[..end]);
                    log.write(self.stream, true, &self.rest)?;
                    self.rest.clear();
                    data = &data[end + 1..];
                }
                None => {
                    self.rest.extend_from_slice(window);
                    data = &data[window.len()..];
                    if self.rest.len() == MAX_LINE {
                        log.write(self.stream, false, &self.rest)?;
                        self.rest.clear();
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes what came without a newline at the end.
    pub(super) fn finish(&mut self, log: &mut LogFile) -> io::Result<()> {
        if !self.rest.is_empty() {
            log.write(self.stream, false, &self.rest)?;
            self.rest.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(path: &Path) -> Vec<(String, String)> {
        std::fs::read_to_string(path)
            .expect("log")
            .lines()
            .map(|line| {
                let mut parts = line.splitn(4, ' ');
                assert!(
                    parts.next().is_some_and(|t| t.ends_with('Z') && t.len() == 30),
                    "{line}"
                );
                assert_eq!(parts.next(), Some("stdout"));
                (
                    parts.next().expect("tag").to_owned(),
                    parts.next().expect("text").to_owned(),
                )
            })
            .collect()
    }

    #[test]
    fn lines_are_cut_at_newlines_and_long_ones_are_marked_partial() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("c/0.log");
        let mut log = LogFile::open(&path).expect("open");
        let mut lines = LineWriter::new(Stream::Stdout);
        lines.push(&mut log, b"one\ntw").expect("push");
        lines.push(&mut log, b"o\n\n").expect("push");
        lines.push(&mut log, &vec![b'x'; MAX_LINE + 5]).expect("push");
        lines.finish(&mut log).expect("finish");
        let got = texts(&path);
        assert_eq!(
            got[..3],
            [("F", "one"), ("F", "two"), ("F", "")].map(|(a, b)| (a.to_owned(), b.to_owned()))
        );
        assert_eq!((got[3].0.as_str(), got[3].1.len()), ("P", MAX_LINE));
        assert_eq!((got[4].0.as_str(), got[4].1.as_str()), ("P", "xxxxx"));
    }

    #[test]
    fn the_file_is_rotated_before_it_grows_past_its_limit() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("0.log");
        let mut log = LogFile::with_limit(&path, 200).expect("open");
        let mut lines = LineWriter::new(Stream::Stdout);
        for number in 0..20 {
            lines
                .push(&mut log, format!("line {number}\n").as_bytes())
                .expect("push");
        }
        assert!(std::fs::metadata(&path).expect("log").len() <= 200);
        let older = texts(&dir.path().join("0.log.1"));
        let newest = texts(&path);
        assert_eq!(newest.last().expect("line").1, "line 19");
        assert!(!older.is_empty());
    }
}
