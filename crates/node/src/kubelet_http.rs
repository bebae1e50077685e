//! The kubelet's HTTP endpoint on a Unix socket: exec, attach, logs, port-forward.
//!
//! The API server authorises these requests and copies bytes both ways; the socket's file permissions keep everybody else
//! out. Paths are those of a real kubelet.

mod channels;
mod exec;
pub(crate) mod logs;
mod portforward;
mod spdy;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use crate::kubelet::{PodHandle, Shared};

/// Binds the socket and serves until `stop` is cancelled.
pub(crate) fn serve(shared: Arc<Shared>, stop: CancellationToken) -> std::io::Result<tokio::task::AbortHandle> {
    use std::os::unix::fs::PermissionsExt;
    let path = shared.config.socket.clone();
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    let app = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/exec/{namespace}/{pod}/{container}", get(exec::exec).post(exec::exec))
        .route(
            "/attach/{namespace}/{pod}/{container}",
            get(exec::attach).post(exec::attach),
        )
        .route("/containerLogs/{namespace}/{pod}/{container}", get(logs::logs))
        .route(
            "/portForward/{namespace}/{pod}",
            get(portforward::forward).post(portforward::forward),
        )
        .with_state(shared);
    let task = tokio::spawn(async move {
        let served = axum::serve(listener, app)
            .with_graceful_shutdown(async move { stop.cancelled().await })
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "the kubelet's endpoint has ended");
        }
    });
    Ok(task.abort_handle())
}

/// A request that is not served, and why.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

/// The pod, or the kubelet's answer for an unknown one.
fn find_pod(shared: &State<Arc<Shared>>, namespace: &str, name: &str) -> Result<Arc<PodHandle>, Refusal> {
    shared.pod(namespace, name).ok_or_else(|| {
        Refusal(
            StatusCode::NOT_FOUND,
            format!("pod \"{name}_{namespace}\" does not exist"),
        )
    })
}
