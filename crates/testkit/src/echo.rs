//! Servers that answer and remember: HTTP/1.1 and HTTP/2 on one port (with or without TLS), and plain TCP.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mantlet_identity::{ServerTls, SpiffeId, peer_spiffe_id};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::LazyConfigAcceptor;

/// One request as it arrived.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Method.
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// `:authority`, or the Host header.
    pub host: String,
    /// HTTP version.
    pub version: Version,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
    /// The client's address.
    pub peer: SocketAddr,
    /// The client's identity, with TLS.
    pub peer_id: Option<SpiffeId>,
    /// What the handshake agreed on.
    pub alpn: Option<Vec<u8>>,
}

type Log = Arc<Mutex<Vec<Recorded>>>;
/// One entry per TCP connection.
type ByteLog = Arc<Mutex<Vec<(SocketAddr, Vec<u8>)>>>;
type Answer = Arc<dyn Fn(&Recorded) -> Response<Full<Bytes>> + Send + Sync>;

/// An HTTP server that records requests. It stops when dropped.
pub struct EchoServer {
    address: SocketAddr,
    log: Log,
    task: JoinHandle<()>,
}

impl EchoServer {
    /// On an ephemeral port of 127.0.0.1; answers 200 with the request's body, or its path when there is none.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap_or_else(|e| panic!("bind: {e}"));
        Self::on(listener, None, echo_answer)
    }

    /// As [`EchoServer::start`], with TLS.
    pub async fn start_tls(tls: ServerTls) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap_or_else(|e| panic!("bind: {e}"));
        Self::on(listener, Some(tls), echo_answer)
    }

    /// On a given listener, with given answers.
    pub fn on(
        listener: TcpListener,
        tls: Option<ServerTls>,
        answer: impl Fn(&Recorded) -> Response<Full<Bytes>> + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap_or_else(|e| panic!("local address: {e}"));
        let log = Log::default();
        let task = tokio::spawn(accept(listener, tls, log.clone(), Arc::new(answer)));
        Self { address, log, task }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// All requests so far, in order of completion of their bodies.
    pub fn requests(&self) -> Vec<Recorded> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets the requests so far and returns them.
    pub fn take(&self) -> Vec<Recorded> {
        std::mem::take(&mut *self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn echo_answer(request: &Recorded) -> Response<Full<Bytes>> {
    let body = if request.body.is_empty() {
        Bytes::from(request.path.clone())
    } else {
        request.body.clone()
    };
    Response::new(Full::new(body))
}

async fn accept(listener: TcpListener, tls: Option<ServerTls>, log: Log, answer: Answer) {
    // Connections end with the server: the set aborts its tasks when this future is dropped.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            return;
        };
        let (tls, log, answer) = (tls.clone(), log.clone(), answer.clone());
        connections.spawn(async move {
            let _ = stream.set_nodelay(true);
            let Some(tls) = tls else {
                return serve(stream, peer, None, None, log, answer).await;
            };
            let Ok(start) = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await else {
                return;
            };
            let config = tls.for_client(start.client_hello().alpn());
            let Ok(stream) = start.into_stream(config).await else {
                return;
            };
            let session = stream.get_ref().1;
            let id = session.peer_certificates().and_then(|chain| peer_spiffe_id(chain).ok());
            let alpn = session.alpn_protocol().map(<[u8]>::to_vec);
            serve(stream, peer, id, alpn, log, answer).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve<S>(stream: S, peer: SocketAddr, id: Option<SpiffeId>, alpn: Option<Vec<u8>>, log: Log, answer: Answer)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let (id, alpn, log, answer) = (id.clone(), alpn.clone(), log.clone(), answer.clone());
        async move {
            let (parts, body) = request.into_parts();
            let Ok(body) = body.collect().await else {
                let mut response = Response::new(Full::default());
                *response.status_mut() = StatusCode::BAD_REQUEST;
                return Ok::<_, Infallible>(response);
            };
            let host = parts
                .uri
                .authority()
                .map(ToString::to_string)
                .or_else(|| parts.headers.get(http::header::HOST)?.to_str().ok().map(str::to_owned))
                .unwrap_or_default();
            let recorded = Recorded {
                method: parts.method,
                path: parts
                    .uri
                    .path_and_query()
                    .map_or_else(|| "/".to_owned(), ToString::to_string),
                host,
                version: parts.version,
                headers: parts.headers,
                body: body.to_bytes(),
                peer,
                peer_id: id,
                alpn,
            };
            let response = answer(&recorded);
            log.lock().unwrap_or_else(PoisonError::into_inner).push(recorded);
            Ok(response)
        }
    });
    // The client decides when a connection ends; how is of no interest here.
    let _ = auto::Builder::new(TokioExecutor::new())
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .await;
}

/// A TCP server that sends back what it gets and remembers it. It stops when dropped.
pub struct TcpEcho {
    address: SocketAddr,
    received: ByteLog,
    task: JoinHandle<()>,
}

impl TcpEcho {
    /// On an ephemeral port of 127.0.0.1. `banner` is sent first, as server-first protocols do.
    pub async fn start(banner: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap_or_else(|e| panic!("bind: {e}"));
        let address = listener.local_addr().unwrap_or_else(|e| panic!("local address: {e}"));
        let received: ByteLog = Arc::default();
        let log = received.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((mut stream, peer)) = listener.accept().await {
                let log = log.clone();
                connections.spawn(async move {
                    if stream.write_all(banner).await.is_err() {
                        return;
                    }
                    let at = {
                        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                        log.push((peer, Vec::new()));
                        log.len() - 1
                    };
                    let mut buffer = vec![0; 64 * 1024];
                    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                        log.lock().unwrap_or_else(PoisonError::into_inner)[at]
                            .1
                            .extend_from_slice(&buffer[..n]);
                        if stream.write_all(&buffer[..n]).await.is_err() {
                            return;
                        }
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Self {
            address,
            received,
            task,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// One entry per connection: who, and what it has sent so far.
    pub fn received(&self) -> Vec<(SocketAddr, Vec<u8>)> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for TcpEcho {
    fn drop(&mut self) {
        self.task.abort();
    }
}
