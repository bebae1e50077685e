//! The access log: Istio's default text format, written by one thread so that no worker waits for a disk or a pipe.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mantlet_runtime::{Work, Writer};

/// Batches that may wait for the writer; more are dropped and counted.
const QUEUE: usize = 64;
/// A worker hands its lines over at this size, or after [`DELAY`].
const BATCH: usize = 64 * 1024;
/// Room for the line that fills a batch.
const LINE: usize = 1024;
const DELAY: Duration = Duration::from_millis(50);

/// Lines for a file.
struct Batch {
    path: Arc<str>,
    bytes: Vec<u8>,
}

/// Waiting lines by path.
type Lines = Vec<(Arc<str>, Vec<u8>)>;

/// The writing thread's queue.
#[derive(Clone)]
pub struct LogWriter(Writer<Batch>);

impl LogWriter {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start() -> std::io::Result<Self> {
        let mut files = HashMap::new();
        let write = move |work: Work<Batch>| match work {
            Work::Item(batch) => {
                if let Err(error) = append(&mut files, &batch) {
                    tracing::warn!(target: "access_log", "{}: {error}", batch.path);
                }
            }
            Work::Lost(batches) => {
                tracing::warn!(
                    target: "access_log",
                    "{batches} batches of lines were dropped, since they could not be written as fast as they came"
                );
            }
        };
        Writer::start("access-log", QUEUE, write).map(LogWriter)
    }

    /// Batches that found the queue full.
    pub fn dropped(&self) -> u64 {
        self.0.dropped()
    }

    /// Waits until everything handed over so far is written, at most `limit`; for the end of the process.
    pub fn finish(&self, limit: Duration) {
        self.0.finish(limit);
    }

    fn send(&self, path: Arc<str>, bytes: Vec<u8>) {
        self.0.send(Batch { path, bytes });
    }
}

/// `files` are those that are open, by path.
fn append(files: &mut HashMap<Arc<str>, File>, batch: &Batch) -> std::io::Result<()> {
    let Batch { path, bytes } = batch;
    match &**path {
        "/dev/stdout" => {
            let mut out = std::io::stdout();
            out.write_all(bytes)?;
            out.flush()
        }
        "/dev/stderr" => std::io::stderr().write_all(bytes),
        other => match files.entry(path.clone()) {
            Entry::Occupied(mut file) => file.get_mut().write_all(bytes),
            Entry::Vacant(slot) => {
                let file = OpenOptions::new().create(true).append(true).open(other)?;
                slot.insert(file).write_all(bytes)
            }
        },
    }
}

/// One worker's lines.
pub struct LogBuffer(Rc<Buffer>);

struct Buffer {
    writer: LogWriter,
    lines: RefCell<Lines>,
    /// Whether a task is there that hands over what waits.
    due: Cell<bool>,
}

impl LogBuffer {
    /// Empty.
    pub fn new(writer: LogWriter) -> Self {
        LogBuffer(Rc::new(Buffer {
            writer,
            lines: RefCell::default(),
            due: Cell::new(false),
        }))
    }

    /// Adds the line that `write` appends to a file's.
    pub fn line(&self, path: &str, write: impl FnOnce(&mut Vec<u8>)) {
        let buffer = &self.0;
        let mut all = buffer.lines.borrow_mut();
        let at = match all.iter().position(|(p, _)| &**p == path) {
            Some(at) => at,
            None => {
                all.push((path.into(), Vec::new()));
                all.len() - 1
            }
        };
        let (path, bytes) = &mut all[at];
        if bytes.capacity() == 0 {
            bytes.reserve_exact(BATCH + LINE);
        }
        write(bytes);
        if bytes.len() >= BATCH {
            buffer.writer.send(path.clone(), std::mem::take(bytes));
        } else if !buffer.due.replace(true) {
            let buffer = buffer.clone();
            tokio::task::spawn_local(async move {
                tokio::time::sleep(DELAY).await;
                buffer.due.set(false);
                buffer.flush();
            });
        }
    }

    /// Hands everything over.
    pub fn flush(&self) {
        self.0.flush();
    }
}

impl Buffer {
    fn flush(&self) {
        for (path, bytes) in self.lines.borrow_mut().iter_mut() {
            if !bytes.is_empty() {
                self.writer.send(path.clone(), std::mem::take(bytes));
            }
        }
    }
}

/// What a line shows; absent values are `-`.
#[derive(Default)]
pub struct Line<'a> {
    /// Start of the request or connection.
    pub start: Option<SystemTime>,
    /// Method, empty for TCP.
    pub method: &'a str,
    /// Path with query, as received.
    pub path: &'a str,
    /// `HTTP/1.1`, `HTTP/2`.
    pub protocol: &'a str,
    /// Status, 0 for none.
    pub status: u16,
    /// Response flags.
    pub flags: u32,
    /// Response code details.
    pub details: &'a str,
    /// Connection termination details.
    pub termination: &'a str,
    /// Upstream transport failure reason.
    pub transport_failure: &'a str,
    /// Body bytes received.
    pub received: u64,
    /// Body bytes sent.
    pub sent: u64,
    /// Duration in milliseconds.
    pub duration: u64,
    /// `x-envoy-upstream-service-time`.
    pub service_time: Option<u64>,
    /// `x-forwarded-for`.
    pub xff: &'a str,
    /// `user-agent`.
    pub user_agent: &'a str,
    /// `x-request-id`.
    pub request_id: &'a str,
    /// `:authority`.
    pub authority: &'a str,
    /// Upstream address.
    pub upstream_host: Option<SocketAddr>,
    /// Cluster name.
    pub cluster: &'a str,
    /// Local address of the upstream connection.
    pub upstream_local: Option<SocketAddr>,
    /// Address that the downstream reached.
    pub downstream_local: Option<SocketAddr>,
    /// The downstream's address.
    pub downstream_remote: Option<SocketAddr>,
    /// SNI.
    pub sni: &'a str,
    /// Route name.
    pub route: &'a str,
}

impl Line<'_> {
    /// Appends the line in Istio's default format (S6.77).
    pub fn render(&self, out: &mut Vec<u8>) {
        out.push(b'[');
        if let Some(start) = self.start {
            push_time(out, start);
        }
        out.extend_from_slice(b"] \"");
        push(out, self.method);
        out.push(b' ');
        push(out, self.path);
        out.push(b' ');
        push(out, self.protocol);
        out.extend_from_slice(b"\" ");
        push_number(out, self.status.into());
        out.push(b' ');
        super::flags::push(out, self.flags);
        out.push(b' ');
        push(out, self.details);
        out.push(b' ');
        push(out, self.termination);
        out.extend_from_slice(b" \"");
        push(out, self.transport_failure);
        out.push(b'"');
        for number in [self.received, self.sent, self.duration] {
            out.push(b' ');
            push_number(out, number);
        }
        out.push(b' ');
        match self.service_time {
            Some(millis) => push_number(out, millis),
            None => out.push(b'-'),
        }
        for text in [self.xff, self.user_agent, self.request_id, self.authority] {
            out.extend_from_slice(b" \"");
            push(out, text);
            out.push(b'"');
        }
        out.extend_from_slice(b" \"");
        push_address(out, self.upstream_host);
        out.extend_from_slice(b"\" ");
        push(out, self.cluster);
        for address in [self.upstream_local, self.downstream_local, self.downstream_remote] {
            out.push(b' ');
            push_address(out, address);
        }
        for text in [self.sni, self.route] {
            out.push(b' ');
            push(out, text);
        }
        out.push(b'\n');
    }
}

/// A text, `-` if there is none.
fn push(out: &mut Vec<u8>, text: &str) {
    match text {
        "" => out.push(b'-'),
        text => out.extend_from_slice(clean(text).as_bytes()),
    }
}

fn push_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// An address as the standard library shows it, `-` if there is none. Four of them are in every line, so that those of IPv4 are
/// written digit by digit.
fn push_address(out: &mut Vec<u8>, address: Option<SocketAddr>) {
    let Some(address) = address else {
        out.push(b'-');
        return;
    };
    match address.ip() {
        IpAddr::V4(ip) => {
            for (at, octet) in ip.octets().into_iter().enumerate() {
                if at > 0 {
                    out.push(b'.');
                }
                push_number(out, octet.into());
            }
            out.push(b':');
            push_number(out, address.port().into());
        }
        IpAddr::V6(_) => out.extend_from_slice(address.to_string().as_bytes()),
    }
}

/// `2026-11-22T16:45:00.` of the second that a thread has written last.
const SECOND: usize = 20;

thread_local! {
    static LAST_SECOND: Cell<(u64, [u8; SECOND])> = const { Cell::new((u64::MAX, [0; SECOND])) };
}

/// What [`rfc3339_millis`] says, without taking the calendar apart for every line.
fn push_time(out: &mut Vec<u8>, at: SystemTime) {
    let Ok(since) = at.duration_since(SystemTime::UNIX_EPOCH) else {
        out.extend_from_slice(rfc3339_millis(at).as_bytes());
        return;
    };
    let (mut second, mut text) = LAST_SECOND.get();
    if second != since.as_secs() {
        let whole = rfc3339_millis(at);
        let Some(start) = whole.as_bytes().first_chunk() else {
            return;
        };
        (second, text) = (since.as_secs(), *start);
        LAST_SECOND.set((second, text));
    }
    out.extend_from_slice(&text);
    let millis = since.subsec_millis();
    for digit in [millis / 100, millis / 10 % 10, millis % 10] {
        out.push(b'0' + digit as u8);
    }
    out.push(b'Z');
}

/// Peers choose these texts; control characters would let them forge lines.
pub(super) fn clean(text: &str) -> std::borrow::Cow<'_, str> {
    // Nearly all texts are of such bytes, and bytes are compared many at a time.
    if text.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        return text.into();
    }
    if text.chars().any(char::is_control) {
        text.chars()
            .map(|c| if c.is_control() { '?' } else { c })
            .collect::<String>()
            .into()
    } else {
        text.into()
    }
}

/// `2026-11-22T16:45:00.123Z`.
pub fn rfc3339_millis(at: SystemTime) -> String {
    let format =
        time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    time::OffsetDateTime::from(at).format(format).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(line: &Line<'_>) -> String {
        let mut out = Vec::new();
        line.render(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_denied_request_has_istios_line() {
        let line = Line {
            start: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_600_000_000_123)),
            method: "GET",
            path: "/x",
            protocol: "HTTP/1.1",
            status: 403,
            details: "rbac_access_denied_matched_policy[none]",
            sent: 19,
            user_agent: "curl/8",
            request_id: "id",
            authority: "web",
            cluster: "inbound|8080||",
            downstream_local: "10.0.0.2:8080".parse().ok(),
            downstream_remote: "10.0.0.1:4000".parse().ok(),
            route: "default",
            ..Line::default()
        };
        assert_eq!(
            rendered(&line),
            "[2020-09-13T12:26:40.123Z] \"GET /x HTTP/1.1\" 403 - rbac_access_denied_matched_policy[none] - \"-\" 0 19 0 - \"-\" \"curl/8\" \"id\" \"web\" \"-\" inbound|8080|| - 10.0.0.2:8080 10.0.0.1:4000 - default\n"
        );
    }

    #[test]
    fn peers_can_not_forge_lines() {
        let line = Line {
            user_agent: "a\n[2020-] forged",
            ..Line::default()
        };
        assert_eq!(rendered(&line).matches('\n').count(), 1);
    }

    #[test]
    fn times_and_addresses_are_written_as_the_libraries_show_them() {
        let start = 1_709_164_798_990;
        for millis in (start..start + 4000).step_by(7).chain([0, 1, 999, 1000]) {
            let at = SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
            let mut out = Vec::new();
            push_time(&mut out, at);
            assert_eq!(String::from_utf8(out).unwrap(), rfc3339_millis(at));
        }
        for text in ["0.0.0.0:0", "255.10.9.100:65535", "[::1]:80", "[::ffff:10.0.0.1]:1"] {
            let address: SocketAddr = text.parse().unwrap();
            let mut out = Vec::new();
            push_address(&mut out, Some(address));
            assert_eq!(String::from_utf8(out).unwrap(), address.to_string());
        }
    }
}
