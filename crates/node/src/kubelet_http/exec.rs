//! `exec` and `attach`: a command's streams, or a container's own, over a websocket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::channels::{self, CLOSE, RESIZE, STATUS, STDERR, STDIN, STDOUT, frame};
use super::{Refusal, find_pod, logs};
use crate::kubelet::{Live, PodHandle, Shared};
use crate::shim::client::Shim;
use crate::shim::proto::ExecSpec;

/// How long the first output is held back. kubectl 1.30 to 1.32 reads the connection before it has made its streams, and throws away
/// what comes for streams that it does not have yet: output and exit code of a quick command would be lost.
const CLIENT_STREAMS: Duration = Duration::from_millis(20);
/// Arguments of one command.
const MAX_ARGS: usize = 1024;

type Address = Path<(String, String, String)>;

/// Query of `exec` and `attach`.
#[derive(Debug, Default, PartialEq)]
struct Options {
    command: Vec<String>,
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Options {
    fn parse(query: &str) -> Self {
        let mut options = Self::default();
        for (name, value) in url_pairs(query) {
            let on = matches!(value.as_str(), "1" | "true");
            match name.as_str() {
                "command" => options.command.push(value),
                // The kubelet's names and the API's.
                "input" | "stdin" => options.stdin = on,
                "output" | "stdout" => options.stdout = on,
                "error" | "stderr" => options.stderr = on,
                "tty" => options.tty = on,
                _ => {}
            }
        }
        options
    }
}

/// Decoded `name=value` pairs of a query.
pub(super) fn url_pairs(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            (decode(name), decode(value))
        })
        .collect()
}

fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let hex = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let rest = bytes.clone();
                match (hex(bytes.next()), hex(bytes.next())) {
                    (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
                    _ => {
                        out.push(b'%');
                        bytes = rest;
                    }
                }
            }
            other => out.push(other),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The running instance of a container and the pod's shim.
fn find_live(pod: &PodHandle, container: &str) -> Result<(Shim, Live), Refusal> {
    let shim = pod.shim.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let live = pod
        .containers
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get(container)
        .cloned();
    match (shim, live) {
        (Some(shim), Some(live)) if live.running => Ok((shim, live)),
        _ => Err(Refusal(
            StatusCode::NOT_FOUND,
            format!("container not found (\"{container}\")"),
        )),
    }
}

static SESSION: AtomicU64 = AtomicU64::new(1);

/// Runs a command in a container.
pub(super) async fn exec(
    shared: State<Arc<Shared>>,
    Path((namespace, pod, container)): Address,
    RawQuery(query): RawQuery,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Response {
    let options = Options::parse(&query.unwrap_or_default());
    let found = find_pod(&shared, &namespace, &pod).and_then(|pod| find_live(&pod, &container));
    let (shim, live) = match found {
        Ok(found) => found,
        Err(refusal) => return refusal.into_response(),
    };
    if options.command.is_empty() || options.command.len() > MAX_ARGS {
        return (
            StatusCode::BAD_REQUEST,
            format!("exec needs a command of 1 to {MAX_ARGS} words"),
        )
            .into_response();
    }
    let upgrade = match websocket(upgrade) {
        Ok(upgrade) => upgrade,
        Err(refusal) => return refusal.into_response(),
    };
    upgrade.on_upgrade(move |socket| async move {
        let id = format!("exec-{}", SESSION.fetch_add(1, Ordering::Relaxed));
        run_exec(socket, shim, live.id, id, options).await;
    })
}

fn websocket(
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<WebSocketUpgrade, Refusal> {
    let upgrade = upgrade.map_err(|_| {
        let message = "this endpoint speaks websocket only (v5.channel.k8s.io); use kubectl 1.30 or newer";
        Refusal(StatusCode::BAD_REQUEST, message.into())
    })?;
    channels::negotiate(upgrade).ok_or_else(|| {
        let protocols = channels::PROTOCOLS.join(", ");
        let message = format!("unsupported websocket subprotocol; this endpoint speaks {protocols}");
        Refusal(StatusCode::BAD_REQUEST, message)
    })
}

/// Where a session's bytes go.
struct Streams {
    input: Option<pipe::Sender>,
    outputs: Vec<(u8, pipe::Receiver)>,
    terminal: Option<Arc<OwnedFd>>,
}

async fn run_exec(mut socket: WebSocket, shim: Shim, container: String, id: String, options: Options) {
    let spec = ExecSpec {
        id: id.clone(),
        container,
        argv: options.command.clone(),
        tty: options.tty,
    };
    let started = if options.tty {
        start_tty(&shim, spec).await
    } else {
        start_pipes(&shim, spec, &options).await
    };
    let (streams, exit) = match started {
        Ok(started) => started,
        Err(message) => {
            let status = channels::failure(&message);
            let _ = socket
                .send(Message::Binary(frame(STATUS, status.to_string().as_bytes())))
                .await;
            let _ = socket.send(channels::close()).await;
            return;
        }
    };
    tokio::time::sleep(CLIENT_STREAMS).await;
    let code = async move { exit.await.ok().map(|exit| exit.code) };
    let finished = pump(socket, streams, code).await;
    if !finished {
        // The client is gone. A terminal has hung up by now; a command without one is told so, too.
        let _ = shim.signal(&id, 1, false).await;
    }
}

type Started = (Streams, tokio::sync::oneshot::Receiver<mantlet_net::process::Exit>);

async fn start_tty(shim: &Shim, spec: ExecSpec) -> Result<Started, String> {
    let session = shim.exec(spec, None).await.map_err(|e| e.to_string())?;
    let master = session.terminal.ok_or("the shim sent no terminal")?;
    rustix::io::ioctl_fionbio(&master, true).map_err(|e| e.to_string())?;
    let copy = || master.try_clone().map_err(|e| e.to_string());
    // A terminal can be polled like a pipe; only the check for a pipe has to be left out.
    let input = pipe::Sender::from_owned_fd_unchecked(copy()?).map_err(|e| e.to_string())?;
    let output = pipe::Receiver::from_owned_fd_unchecked(copy()?).map_err(|e| e.to_string())?;
    let streams = Streams {
        input: Some(input),
        outputs: vec![(STDOUT, output)],
        terminal: Some(Arc::new(master)),
    };
    Ok((streams, session.exit))
}

async fn start_pipes(shim: &Shim, spec: ExecSpec, options: &Options) -> Result<Started, String> {
    let make = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| e.to_string());
    let null = || {
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map(OwnedFd::from)
            .map_err(|e| e.to_string())
    };
    let mut outputs = Vec::new();
    let mut output = |wanted: bool, channel: u8| -> Result<OwnedFd, String> {
        if !wanted {
            return null();
        }
        let (read, write) = make()?;
        outputs.push((channel, pipe::Receiver::from_owned_fd(read).map_err(|e| e.to_string())?));
        Ok(write)
    };
    let stdout = output(options.stdout, STDOUT)?;
    let stderr = output(options.stderr, STDERR)?;
    let (stdin, input) = if options.stdin {
        let (read, write) = make()?;
        (
            read,
            Some(pipe::Sender::from_owned_fd(write).map_err(|e| e.to_string())?),
        )
    } else {
        (null()?, None)
    };
    let session = shim
        .exec(spec, Some([stdin, stdout, stderr]))
        .await
        .map_err(|e| e.to_string())?;
    Ok((
        Streams {
            input,
            outputs,
            terminal: None,
        },
        session.exit,
    ))
}

/// Copies both ways until the command has ended and its output is sent. False when the client left before.
async fn pump(socket: WebSocket, streams: Streams, code: impl Future<Output = Option<i32>>) -> bool {
    let (mut sink, source) = socket.split();
    let (sender, mut frames) = mpsc::channel::<Message>(16);
    let readers: Vec<_> = streams
        .outputs
        .into_iter()
        .map(|(channel, output)| tokio::spawn(read_output(channel, output, sender.clone())))
        .collect();
    drop(sender);
    let mut client = std::pin::pin!(read_client(source, streams.input, streams.terminal, || {}));
    let mut client_open = true;
    let mut code = std::pin::pin!(code);
    let mut ended: Option<Option<i32>> = None;
    // After the end of the command, background processes may keep an output open: they are not waited for.
    let mut drained = false;
    while ended.is_none() || !drained {
        tokio::select! {
            message = frames.recv(), if !drained => match message {
                Some(message) => if sink.send(message).await.is_err() { return false },
                None => drained = true,
            },
            result = &mut code, if ended.is_none() => ended = Some(result),
            gone = &mut client, if client_open => {
                client_open = false;
                if gone && ended.is_none() {
                    readers.iter().for_each(tokio::task::JoinHandle::abort);
                    return false;
                }
            }
            () = tokio::time::sleep(Duration::from_millis(300)), if ended.is_some() && !drained => drained = true,
        }
    }
    readers.iter().for_each(tokio::task::JoinHandle::abort);
    let status: Value = match ended.flatten() {
        Some(code) => channels::exit_status(code),
        None => channels::failure("the container has ended"),
    };
    let _ = sink
        .send(Message::Binary(frame(STATUS, status.to_string().as_bytes())))
        .await;
    let _ = sink.send(channels::close()).await;
    // The client closes in turn; leaving at once could cut off what is still on its way.
    let _ = tokio::time::timeout(Duration::from_secs(2), async {
        if client_open {
            client.await;
        }
    })
    .await;
    true
}

async fn read_output(channel: u8, mut output: pipe::Receiver, frames: mpsc::Sender<Message>) {
    let mut buffer = vec![0u8; 32 << 10];
    loop {
        match output.read(&mut buffer).await {
            // EIO is a terminal whose other side is closed.
            Ok(0) | Err(_) => return,
            Ok(count) => {
                if frames
                    .send(Message::Binary(frame(channel, &buffer[..count])))
                    .await
                    .is_err()
                {
                    return;
                }
            }
        }
    }
}

/// Takes in what the client sends; true when it has left. `end` is called once there is no more input.
async fn read_client(
    mut source: futures::stream::SplitStream<WebSocket>,
    mut input: Option<pipe::Sender>,
    terminal: Option<Arc<OwnedFd>>,
    end: impl FnOnce(),
) -> bool {
    let mut end = Some(end);
    let mut finish = || end.take().into_iter().for_each(|end| end());
    while let Some(Ok(message)) = source.next().await {
        let data = match message {
            Message::Binary(data) => data,
            Message::Close(_) => break,
            _ => continue,
        };
        match data.split_first() {
            Some((&STDIN, rest)) => {
                if let Some(sink) = &mut input
                    && !rest.is_empty()
                    && sink.write_all(rest).await.is_err()
                {
                    // The command reads no more; the rest is thrown away as a shell would.
                    input = None;
                }
            }
            Some((&RESIZE, rest)) => {
                if let Some(terminal) = &terminal {
                    resize(terminal, rest);
                }
            }
            Some((&CLOSE, [STDIN])) => {
                // A terminal has no half-close: end of input is its own character.
                match (&terminal, &mut input) {
                    (Some(_), Some(sink)) => drop(sink.write_all(b"\x04").await),
                    _ => input = None,
                }
                finish();
            }
            _ => {}
        }
    }
    drop(input);
    finish();
    true
}

fn resize(terminal: &OwnedFd, data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(data) else {
        return;
    };
    let size = |name: &str| value[name].as_u64().and_then(|v| u16::try_from(v).ok());
    if let (Some(columns), Some(rows)) = (size("Width"), size("Height")) {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // Fails only when the terminal is closed, which its reader sees.
        let _ = rustix::termios::tcsetwinsize(terminal.as_fd(), size);
    }
}

/// Joins a container's own streams: its output from now on, its input if it has one.
pub(super) async fn attach(
    shared: State<Arc<Shared>>,
    Path((namespace, pod, container)): Address,
    RawQuery(query): RawQuery,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Response {
    let options = Options::parse(&query.unwrap_or_default());
    let handle = match find_pod(&shared, &namespace, &pod) {
        Ok(handle) => handle,
        Err(refusal) => return refusal.into_response(),
    };
    let live = match find_live(&handle, &container) {
        Ok((_, live)) => live,
        Err(refusal) => return refusal.into_response(),
    };
    let upgrade = match websocket(upgrade) {
        Ok(upgrade) => upgrade,
        Err(refusal) => return refusal.into_response(),
    };
    upgrade.on_upgrade(move |socket| run_attach(socket, handle, container, live, options))
}

async fn run_attach(socket: WebSocket, pod: Arc<PodHandle>, container: String, mut live: Live, options: Options) {
    let (mut sink, source) = socket.split();
    let input = live.input.take().filter(|_| options.stdin);
    let attached = input.is_some();
    let sender = input.as_ref().and_then(|fd| {
        rustix::io::ioctl_fionbio(fd.as_fd(), true).ok()?;
        pipe::Sender::from_owned_fd_unchecked(fd.try_clone().ok()?).ok()
    });
    // A pipe is at its end only when nobody holds it any more.
    let terminal = input.filter(|_| live.tty);
    let (lines, mut output) = mpsc::channel::<(u8, Vec<u8>)>(64);
    let follow = tokio::spawn(logs::follow_raw(
        live.log.clone(),
        Arc::clone(&pod),
        container.clone(),
        live.id.clone(),
        lines,
    ));
    let mut client = std::pin::pin!(read_client(source, sender, terminal, || {
        if attached && live.stdin_once {
            close_input(&pod, &container, &live.id);
        }
    }));
    loop {
        tokio::select! {
            _ = &mut client => break,
            part = output.recv() => match part {
                Some((channel, data)) => {
                    let wanted = if channel == STDERR { options.stderr } else { options.stdout };
                    if wanted && sink.send(Message::Binary(frame(channel, &data))).await.is_err() {
                        break;
                    }
                }
                None => {
                    let status = channels::exit_status(0);
                    let _ = sink.send(Message::Binary(frame(STATUS, status.to_string().as_bytes()))).await;
                    let _ = sink.send(Message::Close(None)).await;
                    // Until the client closes in turn, so that nothing on its way is cut off.
                    let _ = tokio::time::timeout(Duration::from_secs(2), client).await;
                    break;
                }
            },
        }
    }
    follow.abort();
}

/// Lets go of our end of a container's standard input.
fn close_input(pod: &PodHandle, container: &str, id: &str) {
    let mut containers = pod.containers.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(live) = containers.get_mut(container).filter(|live| live.id == id && !live.tty) {
        live.input = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let options =
            Options::parse("command=sh&command=-c&command=echo%20%22a%2Bb%22+%25&input=1&output=1&error=true&tty=0");
        assert_eq!(options.command, ["sh", "-c", "echo \"a+b\" %"]);
        assert!(options.stdin && options.stdout && options.stderr && !options.tty);
        assert_eq!(decode("100%"), "100%");
        assert_eq!(decode("%zz"), "%zz");
    }
}
