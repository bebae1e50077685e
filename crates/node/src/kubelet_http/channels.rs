//! Kubernetes' channels over a websocket: `v5.channel.k8s.io` and `v4.channel.k8s.io`.
//!
//! The first byte of each binary message is the channel. Version 5 adds the closing of one channel (255, channel).

use axum::extract::ws::{CloseFrame, Message, WebSocketUpgrade, close_code};
use bytes::Bytes;
use serde_json::{Value, json};

/// Newest first: the first that the client offers too is taken.
pub(super) const PROTOCOLS: [&str; 2] = ["v5.channel.k8s.io", "v4.channel.k8s.io"];

pub(super) const STDIN: u8 = 0;
pub(super) const STDOUT: u8 = 1;
pub(super) const STDERR: u8 = 2;
pub(super) const STATUS: u8 = 3;
pub(super) const RESIZE: u8 = 4;
pub(super) const CLOSE: u8 = 255;

/// Messages of clients may have this many bytes.
pub(super) const MAX_MESSAGE: usize = 4 << 20;

/// Prepares an upgrade; `None` when the client speaks none of the protocols.
pub(super) fn negotiate(upgrade: WebSocketUpgrade) -> Option<WebSocketUpgrade> {
    let upgrade = upgrade
        .protocols(PROTOCOLS)
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE);
    upgrade.selected_protocol().is_some().then_some(upgrade)
}

/// A message on a channel.
pub(super) fn frame(channel: u8, data: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(data.len() + 1);
    out.push(channel);
    out.extend_from_slice(data);
    out.into()
}

/// The normal end. kubectl takes a close without a code (1005) for an error.
pub(super) fn close() -> Message {
    Message::Close(Some(CloseFrame {
        code: close_code::NORMAL,
        reason: "".into(),
    }))
}

/// How a command ended, as `kubectl exec` wants to hear it.
pub(super) fn exit_status(code: i32) -> Value {
    if code == 0 {
        return json!({"metadata": {}, "status": "Success"});
    }
    json!({
        "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
        "message": format!("command terminated with non-zero exit code: exit status {code}"),
        "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
    })
}

/// Something went wrong before or instead of the command.
pub(super) fn failure(message: &str) -> Value {
    json!({"metadata": {}, "status": "Failure", "reason": "InternalError", "message": message, "code": 500,
        "details": {"causes": [{"message": message}]}})
}
