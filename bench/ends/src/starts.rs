//! `bench-ends start`: how long a program takes from its start until it says that it is ready.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Time between two looks; it bounds what the figure is exact to.
const LOOK: Duration = Duration::from_millis(1);
/// Longest wait.
const LIMIT: Duration = Duration::from_secs(60);

/// How a program says that it is ready.
pub(crate) struct Ready {
    address: SocketAddr,
    /// A path that answers 200; without one, accepting a connection is enough.
    path: Option<String>,
}

impl FromStr for Ready {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(address) = text.strip_prefix("tcp://") {
            return Ok(Ready {
                address: address.parse()?,
                path: None,
            });
        }
        let rest = text.strip_prefix("http://").context("READY is no http:// or tcp://")?;
        let (address, path) = rest.split_once('/').unwrap_or((rest, ""));
        Ok(Ready {
            address: address.parse()?,
            path: Some(format!("/{path}")),
        })
    }
}

impl Ready {
    fn now(&self) -> bool {
        let Ok(mut tcp) = TcpStream::connect(self.address) else {
            return false;
        };
        let Some(path) = &self.path else { return true };
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            self.address
        );
        let mut answer = Vec::new();
        let asked = tcp
            .set_read_timeout(Some(LIMIT))
            .and_then(|()| tcp.write_all(request.as_bytes()))
            .and_then(|()| tcp.read_to_end(&mut answer));
        asked.is_ok() && answer.starts_with(b"HTTP/1.1 200")
    }
}

/// Starts the program once, waits until it is ready, ends it.
pub(crate) fn run(ready: &Ready, log: Option<&Path>, program: &[String]) -> Result<Value> {
    let (name, arguments) = program.split_first().context("no program after --")?;
    let mut command = Command::new(name);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some(log) = log {
        let file = std::fs::File::create(log).with_context(|| format!("writing {}", log.display()))?;
        command.stdout(file.try_clone()?).stderr(file);
    }
    if ready.now() {
        bail!("{} is taken by another program", ready.address);
    }
    let begin = Instant::now();
    let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
    let outcome = loop {
        if ready.now() {
            break Ok(begin.elapsed());
        }
        if let Some(status) = child.try_wait()? {
            bail!("{name} ended before it was ready: {status}");
        }
        if begin.elapsed() > LIMIT {
            break Err(anyhow::anyhow!("{name} is not ready after {LIMIT:?}"));
        }
        std::thread::sleep(LOOK);
    };
    child.kill()?;
    child.wait()?;
    Ok(json!({ "ready_ms": outcome?.as_secs_f64() * 1e3 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_ends_is_not_waited_for() {
        let free = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let ready: Ready = format!("tcp://{free}").parse().unwrap();
        let error = run(&ready, None, &["true".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("ended before"), "{error}");
    }

    #[test]
    fn readiness_is_an_answer_or_a_connection() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(format!("tcp://{address}").parse::<Ready>().unwrap().now());
        let server = std::thread::spawn(move || {
            for answer in ["503 Service Unavailable", "200 OK"] {
                let (mut tcp, _) = listener.accept().unwrap();
                let _ = tcp.read(&mut [0; 1024]).unwrap();
                tcp.write_all(format!("HTTP/1.1 {answer}\r\n\r\n").as_bytes()).unwrap();
            }
        });
        // The connection of the first line is the first in the queue.
        let ready: Ready = format!("http://{address}/ready").parse().unwrap();
        let answers = [ready.now(), ready.now()];
        server.join().unwrap();
        assert_eq!(answers.iter().filter(|ready| **ready).count(), 1);
    }
}
