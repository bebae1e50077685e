//! `port-forward`: connections to a pod's loopback address over a websocket.
//!
//! Two protocols: kubectl carries SPDY/3.1 inside the websocket, one pair of streams (error, data) per connection; kube-rs
//! asks with `?ports=N` for two channels per port (data and error).

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::channels::{self, frame};
use super::exec::url_pairs;
use super::find_pod;
use super::spdy::{self, Spdy};
use crate::kubelet::Shared;
use crate::shim::client::Shim;

/// Ports in one request.
const MAX_PORTS: usize = 64;
/// Connections open at a time in one kubectl session.
const MAX_CONNECTIONS: usize = 256;
/// kubectl's websocket subprotocol.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// `GET /portForward/…`.
pub(super) async fn forward(
    shared: State<Arc<Shared>>,
    Path((namespace, pod)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Response {
    let handle = match find_pod(&shared, &namespace, &pod) {
        Ok(handle) => handle,
        Err(refusal) => return refusal.into_response(),
    };
    let bad = |message: &str| (StatusCode::BAD_REQUEST, message.to_owned()).into_response();
    let Some(shim) = handle.shim.lock().unwrap_or_else(PoisonError::into_inner).clone() else {
        return bad("the pod is not running");
    };
    let upgrade = match upgrade {
        Ok(upgrade) => upgrade.protocols([TUNNEL]).max_message_size(channels::MAX_MESSAGE),
        Err(_) => return bad("this endpoint speaks websocket only; use kubectl 1.30 or newer"),
    };
    if upgrade.selected_protocol().is_some() {
        return upgrade.on_upgrade(move |socket| tunnel(socket, shim));
    }
    let mut ports = Vec::new();
    for (name, value) in url_pairs(&query.unwrap_or_default()) {
        if matches!(name.as_str(), "ports" | "port") {
            for part in value.split(',') {
                match part.parse::<u16>() {
                    Ok(port) if port > 0 => ports.push(port),
                    _ => return bad(&format!("{part:?} is no port number")),
                }
            }
        }
    }
    if ports.is_empty() || ports.len() > MAX_PORTS {
        return bad("port-forward needs 1 to 64 ports in `ports`");
    }
    match channels::negotiate(upgrade) {
        Some(upgrade) => upgrade.on_upgrade(move |socket| run(socket, shim, ports)),
        None => bad("unsupported websocket subprotocol for port-forward; this endpoint speaks v4.channel.k8s.io"),
    }
}

async fn run(socket: WebSocket, shim: Shim, ports: Vec<u16>) {
    let (mut sink, mut source) = socket.split();
    let (sender, mut frames) = mpsc::channel::<Message>(64);
    let mut inputs: BTreeMap<u8, mpsc::Sender<bytes::Bytes>> = BTreeMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    for (index, port) in ports.into_iter().enumerate() {
        let Ok(data) = u8::try_from(index * 2) else { continue };
        // Each channel begins with its port, so that the client can match them.
        for channel in [data, data + 1] {
            let _ = sender.send(Message::Binary(frame(channel, &port.to_le_bytes()))).await;
        }
        let (input, receiver) = mpsc::channel(64);
        inputs.insert(data, input);
        tasks.spawn(connection(shim.clone(), port, data, receiver, sender.clone()));
    }
    drop(sender);
    loop {
        tokio::select! {
            message = frames.recv() => match message {
                Some(message) => if sink.send(message).await.is_err() { break },
                None => {
                    let _ = sink.send(channels::close()).await;
                    break;
                }
            },
            message = source.next() => match message {
                Some(Ok(Message::Binary(data))) => {
                    if let Some((channel, _)) = data.split_first()
                        && let Some(input) = inputs.get(channel)
                        && input.send(data.slice(1..)).await.is_err()
                    {
                        inputs.remove(channel);
                    }
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => break,
                Some(Ok(_)) => {}
            },
        }
    }
}

async fn connection(
    shim: Shim,
    port: u16,
    channel: u8,
    mut input: mpsc::Receiver<bytes::Bytes>,
    out: mpsc::Sender<Message>,
) {
    let stream = match connect(&shim, port).await {
        Ok(stream) => stream,
        Err(message) => {
            let text = format!("error forwarding port {port} to pod: {message}");
            let _ = out.send(Message::Binary(frame(channel + 1, text.as_bytes()))).await;
            return;
        }
    };
    let (mut read, mut write) = stream.into_split();
    let up = async {
        while let Some(data) = input.recv().await {
            if write.write_all(&data).await.is_err() {
                break;
            }
        }
    };
    let down = async {
        let mut buffer = vec![0u8; 32 << 10];
        while let Ok(count) = read.read(&mut buffer).await {
            if count == 0
                || out
                    .send(Message::Binary(frame(channel, &buffer[..count])))
                    .await
                    .is_err()
            {
                break;
            }
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

/// A connection to the pod's own loopback address, made by its shim inside its network namespace.
pub(super) async fn connect(shim: &Shim, port: u16) -> Result<TcpStream, String> {
    let fd = shim.connect(port).await.map_err(|e| e.to_string())?;
    let stream = std::net::TcpStream::from(fd);
    stream
        .set_nonblocking(true)
        .and_then(|()| TcpStream::from_std(stream))
        .map_err(|e| e.to_string())
}

/// What the tasks of a tunnel hand to its writer.
enum Out {
    /// Frame bytes.
    Bytes(Vec<u8>),
    /// The connection with this data stream is over.
    Done(u32),
}

/// The port, and the error stream, of a connection whose data stream has not come yet.
type Waiting = BTreeMap<String, u32>;

async fn tunnel(socket: WebSocket, shim: Shim) {
    let (mut sink, mut source) = socket.split();
    let (sender, mut out) = mpsc::channel::<Out>(64);
    let mut spdy = Spdy::new();
    let mut waiting = Waiting::new();
    let mut inputs: BTreeMap<u32, mpsc::Sender<Option<Vec<u8>>>> = BTreeMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let message = tokio::select! {
            part = out.recv() => {
                match part {
                    Some(Out::Bytes(bytes)) => if sink.send(Message::Binary(bytes.into())).await.is_err() { return },
                    Some(Out::Done(stream)) => drop(inputs.remove(&stream)),
                    None => return,
                }
                continue;
            }
            message = source.next() => message,
        };
        let bytes = match message {
            Some(Ok(Message::Binary(bytes))) => bytes,
            Some(Ok(Message::Close(_)) | Err(_)) | None => return,
            Some(Ok(_)) => continue,
        };
        let events = match spdy.receive(&bytes) {
            Ok(events) => events,
            Err(error) => {
                tracing::warn!(error, "a port-forward client sends no valid SPDY");
                return;
            }
        };
        for event in events {
            let answer = match event {
                spdy::Event::Open { stream, headers, .. } => {
                    let get = |name: &str| headers.get(name).map_or("", String::as_str);
                    let request = get("requestid").to_owned();
                    let port = get("port").parse::<u16>().ok().filter(|port| *port > 0);
                    match (get("streamtype"), port) {
                        ("error", Some(_)) if waiting.len() < MAX_CONNECTIONS => {
                            waiting.insert(request, stream);
                            spdy.reply(stream)
                        }
                        ("data", Some(port)) if inputs.len() < MAX_CONNECTIONS => match waiting.remove(&request) {
                            Some(errors) => {
                                let (input, receiver) = mpsc::channel(64);
                                inputs.insert(stream, input);
                                tasks.spawn(tunnelled(shim.clone(), port, stream, errors, receiver, sender.clone()));
                                spdy.reply(stream)
                            }
                            None => spdy::reset_frame(stream, spdy::REFUSED_STREAM),
                        },
                        _ => spdy::reset_frame(stream, spdy::REFUSED_STREAM),
                    }
                }
                spdy::Event::Data { stream, data, fin } => {
                    if let Some(input) = inputs.get(&stream) {
                        // A connection that is not read any more holds up its own session only.
                        let sent = data.is_empty() || input.send(Some(data)).await.is_ok();
                        if fin && sent {
                            let _ = input.send(None).await;
                        }
                    }
                    continue;
                }
                spdy::Event::Reset { stream } => {
                    inputs.remove(&stream);
                    continue;
                }
                spdy::Event::Ping { answer } => answer,
                spdy::Event::GoAway => continue,
            };
            if sink.send(Message::Binary(answer.into())).await.is_err() {
                return;
            }
        }
        while tasks.try_join_next().is_some() {}
    }
}

/// One connection of a tunnel: `None` on the input is the client's end of stream.
async fn tunnelled(
    shim: Shim,
    port: u16,
    stream: u32,
    errors: u32,
    mut input: mpsc::Receiver<Option<Vec<u8>>>,
    out: mpsc::Sender<Out>,
) {
    let send = async |bytes: Vec<u8>| out.send(Out::Bytes(bytes)).await.is_ok();
    match connect(&shim, port).await {
        Err(message) => {
            let text = format!("failed to connect to localhost:{port} inside the pod: {message}");
            send(spdy::data_frame(errors, text.as_bytes(), true)).await;
        }
        Ok(connection) => {
            let (mut read, mut write) = connection.into_split();
            let up = async {
                while let Some(Some(data)) = input.recv().await {
                    if write.write_all(&data).await.is_err() {
                        return;
                    }
                }
                let _ = write.shutdown().await;
                // The pod may still have something to say.
                std::future::pending::<()>().await;
            };
            let down = async {
                let mut buffer = vec![0u8; 32 << 10];
                while let Ok(count) = read.read(&mut buffer).await {
                    if count == 0 || !send(spdy::data_frame(stream, &buffer[..count], false)).await {
                        break;
                    }
                }
            };
            tokio::select! {
                () = up => {}
                () = down => {}
            }
            send(spdy::data_frame(errors, &[], true)).await;
        }
    }
    send(spdy::data_frame(stream, &[], true)).await;
    let _ = out.send(Out::Done(stream)).await;
}
