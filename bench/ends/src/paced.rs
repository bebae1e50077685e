//! `bench-ends paced`: HTTP/1.1 requests at a fixed rate, sent on schedule whatever the answers do.
//!
//! Request k is due at k × interval. Connections take turns; each has a thread of its own that sleeps until its next
//! request is due, and sends at once what is overdue because the answer before it came late. Latency counts from the time
//! at which a request was due, so a stall is seen by every request that it delayed (no coordinated omission).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest head of an answer.
const MAX_HEAD: usize = 16 * 1024;

/// What to send.
pub(crate) struct Plan {
    pub(crate) address: SocketAddr,
    pub(crate) path: String,
    /// Time between two requests of the whole load.
    pub(crate) interval: Duration,
    pub(crate) length: Duration,
    pub(crate) connections: u32,
}

/// Runs the load; any answer but 200 and any broken connection is an error.
pub(crate) fn run(plan: &Plan) -> Result<Value> {
    let together = Barrier::new(plan.connections as usize);
    let begin = std::sync::OnceLock::new();
    let mut latencies = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..plan.connections)
            .map(|turn| {
                let (together, begin) = (&together, &begin);
                scope.spawn(move || {
                    let connection = Connection::open(plan);
                    together.wait();
                    let begin = *begin.get_or_init(|| Instant::now() + Duration::from_millis(5));
                    connection?.keep_to_schedule(plan, begin, turn)
                })
            })
            .collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().map_err(|_| anyhow!("a connection's thread ended"))??);
        }
        Ok::<_, anyhow::Error>(all)
    })?;
    ensure!(!latencies.is_empty(), "the load is too short for one request");
    latencies.sort();
    let milliseconds = |at: f64| {
        let at = ((latencies.len() as f64 * at) as usize).min(latencies.len() - 1);
        latencies[at].as_secs_f64() * 1e3
    };
    Ok(json!({
        "sent": latencies.len(), "rate": latencies.len() as f64 / plan.length.as_secs_f64(),
        "p50_ms": milliseconds(0.50), "p90_ms": milliseconds(0.90), "p99_ms": milliseconds(0.99),
        "p999_ms": milliseconds(0.999), "max_ms": milliseconds(1.0),
    }))
}

struct Connection {
    tcp: TcpStream,
    request: Vec<u8>,
    buffer: Vec<u8>,
}

impl Connection {
    fn open(plan: &Plan) -> Result<Self> {
        // Timers of a thread are late by up to 50 µs unless it asks for better.
        nix::sys::prctl::set_timerslack(1)?;
        let tcp = TcpStream::connect(plan.address).with_context(|| format!("connecting to {}", plan.address))?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(TIMEOUT))?;
        let request = format!("GET {} HTTP/1.1\r\nHost: {}\r\n\r\n", plan.path, plan.address).into_bytes();
        Ok(Connection {
            tcp,
            request,
            buffer: Vec::with_capacity(MAX_HEAD),
        })
    }

    fn keep_to_schedule(mut self, plan: &Plan, begin: Instant, turn: u32) -> Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        for round in 0.. {
            let after = plan.interval * (round * plan.connections + turn);
            if after >= plan.length {
                break;
            }
            let due = begin + after;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            self.exchange()?;
            latencies.push(due.elapsed());
        }
        Ok(latencies)
    }

    fn exchange(&mut self) -> Result<()> {
        self.tcp.write_all(&self.request)?;
        self.buffer.clear();
        loop {
            let mut chunk = [0; 4096];
            let count = self.tcp.read(&mut chunk)?;
            ensure!(count > 0, "the connection was closed before the answer was whole");
            self.buffer.extend_from_slice(&chunk[..count]);
            if let Some(end) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                let head = std::str::from_utf8(&self.buffer[..end])?;
                let body = length(head)?;
                if self.buffer.len() >= end + 4 + body {
                    return Ok(());
                }
            }
            ensure!(self.buffer.len() < MAX_HEAD, "the answer is too long");
        }
    }
}

/// The length of the body of a good answer.
fn length(head: &str) -> Result<usize> {
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    ensure!(status.starts_with("HTTP/1.1 200"), "the answer is {status:?}");
    let value = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .context("an answer without content-length")?;
    Ok(value.1.trim().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// A server that answers the first request late: the others wait behind it, and their wait is counted.
    #[test]
    fn a_stall_is_counted_by_every_request_that_it_delays() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stall = Duration::from_millis(300);
        let server = std::thread::spawn(move || {
            let (mut tcp, _) = listener.accept().unwrap();
            let mut chunk = [0; 4096];
            let mut first = true;
            while tcp.read(&mut chunk).unwrap() > 0 {
                if std::mem::take(&mut first) {
                    std::thread::sleep(stall);
                }
                tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                    .unwrap();
            }
        });
        let plan = Plan {
            address,
            path: "/".to_owned(),
            interval: Duration::from_millis(10),
            length: Duration::from_millis(200),
            connections: 1,
        };
        let result = run(&plan).unwrap();
        server.join().unwrap();
        assert_eq!(result["sent"], 20);
        // The tenth was due 90 ms after the first and could not be sent before the stall was over.
        assert!(result["p50_ms"].as_f64().unwrap() >= 200.0, "{result}");
    }

    #[test]
    fn answers_other_than_200_are_errors() {
        assert_eq!(length("HTTP/1.1 200 OK\r\nContent-Length: 12").unwrap(), 12);
        assert!(length("HTTP/1.1 403 Forbidden\r\nContent-Length: 0").is_err());
        assert!(length("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked").is_err());
    }
}
