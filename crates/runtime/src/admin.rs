//! A small HTTP/1.1 server for health, metrics and debugging endpoints. Routes are boxed handlers; bodies, connections
//! and times are bounded. It does not authenticate: bind it to loopback, or route nothing on it that needs protection.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use crate::drain::DrainWatch;
use crate::log::LogHandle;
use crate::metrics::{self, Registry};
use crate::task::Limit;

/// Largest request body.
const MAX_BODY: usize = 1 << 20;
/// Most connections at once.
const MAX_CONNECTIONS: usize = 256;
/// Time for a client to send its request head, and for a handler to answer.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// What a handler gives back.
pub type AdminResponse = http::Response<Full<Bytes>>;
type Answer = Pin<Box<dyn Future<Output = AdminResponse> + Send>>;
type Handler = Arc<dyn Fn(AdminRequest) -> Answer + Send + Sync>;

/// What a handler is given.
#[derive(Debug, Clone)]
pub struct AdminRequest {
    /// GET, POST, …
    pub method: Method,
    /// The path, as sent.
    pub path: String,
    /// The query without `?`, as sent.
    pub query: String,
    /// Headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
    /// Who asks.
    pub peer: SocketAddr,
}

impl AdminRequest {
    /// The first value of a query parameter. Percent signs are decoded, `+` is a space.
    pub fn param(&self, name: &str) -> Option<String> {
        self.query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(key) == name).then(|| decode(value))
        })
    }
}

fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let pair = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match (byte, pair.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(value)) => {
                out.push(value);
                at += 3;
            }
            (b'+', _) => {
                out.push(b' ');
                at += 1;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// An answer with a text body.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> AdminResponse {
    respond(status, "text/plain; charset=utf-8", body)
}

/// An answer with any body.
pub fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> AdminResponse {
    let mut response = http::Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    // Debug pages must not be guessed into something a browser runs.
    response
        .headers_mut()
        .insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

/// An answer with a value as pretty JSON.
pub fn json(value: &impl serde::Serialize) -> AdminResponse {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => respond(StatusCode::OK, "application/json", body),
        Err(error) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("cannot be written as JSON: {error}\n"),
        ),
    }
}

/// The routes of one server. Build it, then [`Admin::serve`] it.
#[derive(Clone, Default)]
pub struct Admin {
    exact: BTreeMap<String, Handler>,
    prefixes: BTreeMap<String, Handler>,
}

impl Admin {
    /// No routes.
    pub fn new() -> Self {
        Self::default()
    }

    /// A handler for one path.
    #[must_use]
    pub fn route<F, Fut>(mut self, path: &str, handler: F) -> Self
    where
        F: Fn(AdminRequest) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = AdminResponse> + Send + 'static,
    {
        self.exact
            .insert(path.to_owned(), Arc::new(move |request| Box::pin(handler(request))));
        self
    }

    /// A handler for a path and everything below it; the longest prefix wins, after exact routes.
    #[must_use]
    pub fn prefix<F, Fut>(mut self, prefix: &str, handler: F) -> Self
    where
        F: Fn(AdminRequest) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = AdminResponse> + Send + 'static,
    {
        self.prefixes
            .insert(prefix.to_owned(), Arc::new(move |request| Box::pin(handler(request))));
        self
    }

    /// `GET path` answers the metrics of a registry.
    #[must_use]
    pub fn metrics(self, path: &str, registry: Registry) -> Self {
        self.route(path, move |_| {
            let body = registry.render();
            async move { respond(StatusCode::OK, metrics::CONTENT_TYPE, body) }
        })
    }

    /// `GET path` shows the log levels; `POST path?level=default:debug,…` changes them.
    #[must_use]
    pub fn log_levels(self, path: &str, log: LogHandle) -> Self {
        self.route(path, move |request| {
            let log = log.clone();
            async move {
                if request.method != Method::POST {
                    return text(StatusCode::OK, format!("{}\n", log.levels()));
                }
                match request.param("level").map(|level| log.set_levels(&level)) {
                    Some(Ok(())) => text(StatusCode::OK, format!("{}\n", log.levels())),
                    Some(Err(error)) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
                    None => text(
                        StatusCode::BAD_REQUEST,
                        "name the levels: ?level=default:info,ads:debug\n",
                    ),
                }
            }
        })
    }

    /// Answers one request; also the entry for tests.
    pub async fn answer(&self, request: AdminRequest) -> AdminResponse {
        let handler = self.exact.get(&request.path).or_else(|| {
            self.prefixes
                .iter()
                .rev()
                .find(|(prefix, _)| request.path.starts_with(prefix.as_str()))
                .map(|(_, h)| h)
        });
        match handler {
            Some(handler) => handler(request).await,
            None => text(StatusCode::NOT_FOUND, "404 page not found\n"),
        }
    }

    /// Serves until the drain is announced and the connections under way have ended.
    pub async fn serve(self, listener: TcpListener, mut drain: DrainWatch) {
        let limit = Limit::new(MAX_CONNECTIONS);
        let this = Arc::new(self);
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = drain.draining() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly: give others the time to close some.
                    tracing::warn!(target: "runtime", "admin server cannot accept: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (this, mut drain) = (this.clone(), drain.clone());
            let spawned = limit.try_spawn(async move {
                let service = service_fn(move |request| {
                    let this = this.clone();
                    async move { Ok::<_, Infallible>(this.dispatch(request, peer).await) }
                });
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service);
                tokio::pin!(connection);
                // Errors here are the peer's: a closed or malformed connection.
                tokio::select! {
                    _ = connection.as_mut() => return,
                    () = drain.draining() => connection.as_mut().graceful_shutdown(),
                }
                let _ = connection.await;
            });
            if spawned.is_err() {
                tracing::warn!(target: "runtime", "admin server refuses {peer}: {MAX_CONNECTIONS} connections are open");
            }
        }
    }

    async fn dispatch(&self, request: http::Request<Incoming>, peer: SocketAddr) -> AdminResponse {
        let (parts, body) = request.into_parts();
        if body.size_hint().lower() > MAX_BODY as u64 {
            return text(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body is above {MAX_BODY} bytes\n"),
            );
        }
        let body = match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => {
                return text(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("the body is incomplete or above {MAX_BODY} bytes\n"),
                );
            }
            Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time\n"),
        };
        self.answer(AdminRequest {
            method: parts.method,
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().unwrap_or_default().to_owned(),
            headers: parts.headers,
            body,
            peer,
        })
        .await
    }
}

impl std::fmt::Debug for Admin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set()
            .entries(self.exact.keys())
            .entries(self.prefixes.keys())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drain::Drain;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut out = String::new();
        stream.read_to_string(&mut out).await.unwrap();
        out
    }

    async fn start(admin: Admin) -> (SocketAddr, Drain, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (drain, watch) = Drain::new();
        (address, drain, tokio::spawn(admin.serve(listener, watch)))
    }

    #[tokio::test]
    async fn routes_metrics_and_limits() {
        let registry = Registry::new();
        registry.counter("c", "", &[]).with(&[]).add(7);
        let admin = Admin::new()
            .metrics("/metrics", registry)
            .route("/echo", |request| async move {
                text(
                    StatusCode::OK,
                    request.param("q").unwrap_or_default() + &String::from_utf8_lossy(&request.body),
                )
            })
            .prefix("/debug/", |request| async move { text(StatusCode::OK, request.path) })
            .prefix("/debug/deep/", |_| async move { text(StatusCode::OK, "deeper") });
        let (address, drain, task) = start(admin).await;
        let end = "Host: x\r\nConnection: close\r\n";
        assert!(
            ask(address, &format!("GET /metrics HTTP/1.1\r\n{end}\r\n"))
                .await
                .ends_with("c 7\n")
        );
        let echoed = ask(
            address,
            &format!("POST /echo?q=a%20b%2 HTTP/1.1\r\n{end}Content-Length: 2\r\n\r\nxy"),
        )
        .await;
        assert!(echoed.ends_with("a b%2xy"), "{echoed}");
        assert!(
            ask(address, &format!("GET /debug/x HTTP/1.1\r\n{end}\r\n"))
                .await
                .ends_with("/debug/x")
        );
        assert!(
            ask(address, &format!("GET /debug/deep/x HTTP/1.1\r\n{end}\r\n"))
                .await
                .ends_with("deeper")
        );
        assert!(
            ask(address, &format!("GET /nothing HTTP/1.1\r\n{end}\r\n"))
                .await
                .starts_with("HTTP/1.1 404")
        );
        let large = ask(
            address,
            &format!("POST /echo HTTP/1.1\r\n{end}Content-Length: 1048577\r\n\r\n"),
        )
        .await;
        assert!(large.starts_with("HTTP/1.1 413"), "{large}");
        assert!(drain.drain(Duration::from_secs(10)).await);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn an_idle_connection_does_not_hold_up_the_drain() {
        let (address, drain, task) = start(Admin::new()).await;
        let _idle = TcpStream::connect(address).await.unwrap();
        let answer = ask(address, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert!(answer.contains("404"));
        assert!(drain.drain(Duration::from_secs(10)).await);
        task.await.unwrap();
    }
}
