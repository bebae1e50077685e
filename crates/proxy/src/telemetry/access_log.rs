//! The access log: Istio's default text format, written by one thread so that no worker waits for a disk or a pipe.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mantlet_runtime::{Work, Writer};

/// Batches that may wait for the writer; more are dropped and counted.
const QUEUE: usize = 256;
/// A worker hands its lines over at this size, or after [`DELAY`].
const BATCH: usize = 16 * 1024;
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
pub struct LogBuffer {
    writer: LogWriter,
    lines: Rc<RefCell<Lines>>,
}

impl LogBuffer {
    /// Empty.
    pub fn new(writer: LogWriter) -> Self {
        LogBuffer {
            writer,
            lines: Rc::default(),
        }
    }

    /// Adds a line for a file.
    pub fn line(&self, path: &str, text: &str) {
        let mut all = self.lines.borrow_mut();
        let was_empty = all.iter().all(|(_, bytes)| bytes.is_empty());
        let at = match all.iter().position(|(p, _)| &**p == path) {
            Some(at) => at,
            None => {
                all.push((path.into(), Vec::new()));
                all.len() - 1
            }
        };
        let (path, bytes) = &mut all[at];
        bytes.extend_from_slice(text.as_bytes());
        if bytes.len() >= BATCH {
            self.writer.send(path.clone(), std::mem::take(bytes));
        } else if was_empty {
            let (lines, writer) = (self.lines.clone(), self.writer.clone());
            tokio::task::spawn_local(async move {
                tokio::time::sleep(DELAY).await;
                flush(&lines, &writer);
            });
        }
    }

    /// Hands everything over.
    pub fn flush(&self) {
        flush(&self.lines, &self.writer);
    }
}

fn flush(lines: &RefCell<Lines>, writer: &LogWriter) {
    for (path, bytes) in lines.borrow_mut().iter_mut() {
        if !bytes.is_empty() {
            writer.send(path.clone(), std::mem::take(bytes));
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
    pub duration: u128,
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
    pub upstream_host: &'a str,
    /// Cluster name.
    pub cluster: &'a str,
    /// Local address of the upstream connection.
    pub upstream_local: &'a str,
    /// Address that the downstream reached.
    pub downstream_local: &'a str,
    /// The downstream's address.
    pub downstream_remote: &'a str,
    /// SNI.
    pub sni: &'a str,
    /// Route name.
    pub route: &'a str,
}

impl Line<'_> {
    /// Istio's default format (S6.77).
    pub fn render(&self) -> String {
        let mut out = String::with_capacity(400);
        let start = self.start.map(rfc3339_millis).unwrap_or_default();
        let service_time = self.service_time.map_or("-".to_string(), |ms| ms.to_string());
        let _ = writeln!(
            out,
            "[{start}] \"{} {} {}\" {} {} {} {} \"{}\" {} {} {} {service_time} \"{}\" \"{}\" \"{}\" \"{}\" \"{}\" {} {} {} {} {} {}",
            dash(self.method),
            dash(self.path),
            dash(self.protocol),
            self.status,
            super::flags::text(self.flags),
            dash(self.details),
            dash(self.termination),
            dash(self.transport_failure),
            self.received,
            self.sent,
            self.duration,
            dash(self.xff),
            dash(self.user_agent),
            dash(self.request_id),
            dash(self.authority),
            dash(self.upstream_host),
            dash(self.cluster),
            dash(self.upstream_local),
            dash(self.downstream_local),
            dash(self.downstream_remote),
            dash(self.sni),
            dash(self.route),
        );
        out
    }
}

fn dash(text: &str) -> std::borrow::Cow<'_, str> {
    clean(if text.is_empty() { "-" } else { text })
}

/// Peers choose these texts; control characters would let them forge lines.
pub(super) fn clean(text: &str) -> std::borrow::Cow<'_, str> {
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
            downstream_local: "10.0.0.2:8080",
            downstream_remote: "10.0.0.1:4000",
            route: "default",
            ..Line::default()
        };
        assert_eq!(
            line.render(),
            "[2020-09-13T12:26:40.123Z] \"GET /x HTTP/1.1\" 403 - rbac_access_denied_matched_policy[none] - \"-\" 0 19 0 - \"-\" \"curl/8\" \"id\" \"web\" \"-\" inbound|8080|| - 10.0.0.2:8080 10.0.0.1:4000 - default\n"
        );
    }

    #[test]
    fn peers_can_not_forge_lines() {
        let line = Line {
            user_agent: "a\n[2020-] forged",
            ..Line::default()
        };
        assert_eq!(line.render().matches('\n').count(), 1);
    }
}
