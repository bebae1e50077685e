//! Questions to a running broker, over the socket in the state directory.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};

use super::paths::Paths;
use super::protocol::{Request, Status};

const LIMIT: Duration = Duration::from_secs(5);
/// How long a cluster may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// The running broker's status, `None` when the cluster does not run.
///
/// # Errors
/// A broker is there but does not answer.
pub fn status(paths: &Paths) -> Result<Option<Status>> {
    let Some(stream) = connect(paths)? else { return Ok(None) };
    stream.set_read_timeout(Some(LIMIT))?;
    send(&stream, &Request::Status)?;
    let mut line = String::new();
    BufReader::new(stream.take(1 << 16))
        .read_line(&mut line)
        .context("the broker does not answer")?;
    if line.is_empty() {
        // It was just ending.
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line).context("the broker's answer")?))
}

/// Ends the cluster and waits for its end; false when it did not run.
///
/// # Errors
/// It does not end in time.
pub fn stop(paths: &Paths) -> Result<bool> {
    let Some(stream) = connect(paths)? else {
        return Ok(false);
    };
    stream.set_read_timeout(Some(STOP_LIMIT))?;
    send(&stream, &Request::Stop)?;
    // Nothing comes but the end of the connection, when the broker ends.
    let mut rest = Vec::new();
    match (&stream).take(1 << 16).read_to_end(&mut rest) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(true),
        Err(error) => Err(error).context("the cluster does not end; see `mantlet cluster logs`"),
    }
}

fn send(mut stream: &UnixStream, request: &Request) -> Result<()> {
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).context("asking the broker")
}

fn connect(paths: &Paths) -> Result<Option<UnixStream>> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    match UnixStream::connect(paths.broker_socket()) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("connecting to {}", paths.broker_socket().display())),
    }
}
