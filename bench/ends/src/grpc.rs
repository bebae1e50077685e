//! `bench-ends grpc`: unary calls of `/bench.Echo/Say` (a `google.protobuf.StringValue` each way) over HTTP/2 without TLS.
//! `GET /calls` tells how many calls were answered with `grpc-status: 0`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tonic::body::Body;
use tonic::server::{Grpc, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

/// Streams at once on a connection: no bound that a load would meet.
const MAX_STREAMS: u32 = 10_000;

struct Say(Arc<AtomicU64>);

impl UnaryService<String> for Say {
    type Response = String;
    type Future = std::future::Ready<Result<Response<String>, Status>>;

    fn call(&mut self, request: Request<String>) -> Self::Future {
        self.0.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok(Response::new(request.into_inner())))
    }
}

async fn answer(request: http::Request<Incoming>, calls: Arc<AtomicU64>) -> http::Response<Body> {
    match request.uri().path() {
        "/bench.Echo/Say" => {
            let mut server = Grpc::new(ProstCodec::<String, String>::default());
            server.unary(Say(calls), request).await
        }
        "/calls" => http::Response::new(Body::new(calls.load(Ordering::Relaxed).to_string())),
        _ => {
            let mut response = http::Response::new(Body::empty());
            *response.status_mut() = http::StatusCode::NOT_FOUND;
            response
        }
    }
}

/// Serves until it is ended.
pub(crate) fn serve(address: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("binding {address}"))?;
        let calls = Arc::new(AtomicU64::new(0));
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let calls = calls.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let calls = calls.clone();
                    async move { Ok::<_, std::convert::Infallible>(answer(request, calls).await) }
                });
                // A connection that breaks is seen at the other end.
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .max_concurrent_streams(MAX_STREAMS)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    })
}
