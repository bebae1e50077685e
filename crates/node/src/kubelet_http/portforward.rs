//! `port-forward`: connections to a pod's loopback address over a websocket.
//!
//! kube-rs opens one websocket with `?ports=N` and two channels per port (data and error), which is served here.

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
use crate::kubelet::Shared;
use crate::shim::client::Shim;

/// Ports in one request.
const MAX_PORTS: usize = 64;

/// `GET /portForward/…`.
pub(super) async fn forward(
    shared: State<Arc<Shared>>,
    Path((namespace, pod)): Path<(String, String)>,
    RawQuery(query): RawQuery,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Response {
    let handle = match find_pod(&shared, &namespace, &pod) {
        Ok(handle) => handle,
        Err(response) => return response,
    };
    let bad = |message: &str| (StatusCode::BAD_REQUEST, message.to_owned()).into_response();
    let Some(shim) = handle.shim.lock().unwrap_or_else(PoisonError::into_inner).clone() else {
        return bad("the pod is not running");
    };
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
    let Ok(upgrade) = upgrade else {
        return bad("this endpoint speaks websocket only");
    };
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
