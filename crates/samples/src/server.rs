//! An HTTP server that loses no request when it is told to end.
//!
//! After SIGTERM it goes on accepting (somebody may still have the old address), closes each connection with the next
//! answer (`Connection: close`), and ends when no connection is left, or when those that are left have been idle for a while.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, Version, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Connections at the same time.
const MAX_CONNECTIONS: usize = 4096;
/// After SIGTERM: how long new connections may still come in.
const LINGER: Duration = Duration::from_millis(500);
/// After SIGTERM: when idle connections are closed from this side.
const IDLE: Duration = Duration::from_secs(3);
/// After SIGTERM: when the process ends whatever is open. Below Kubernetes' default grace period of 30 s.
const LAST: Duration = Duration::from_secs(20);

struct Shared {
    draining: AtomicBool,
    open: watch::Sender<usize>,
    served: AtomicUsize,
}

/// Serves until SIGTERM or SIGINT and the end of the drain.
pub(crate) async fn run<F, Fut>(address: SocketAddr, answer: F) -> Result<()>
where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}"))?;
    eprintln!("listening on {address}");
    let shared = Arc::new(Shared {
        draining: AtomicBool::new(false),
        open: watch::Sender::new(0),
        served: AtomicUsize::new(0),
    });
    let (close, closing) = watch::channel(false);
    let accepting = accept(listener, shared.clone(), closing, answer);
    tokio::pin!(accepting);
    tokio::select! {
        () = &mut accepting => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    shared.draining.store(true, Ordering::SeqCst);
    let mut open = shared.open.subscribe();
    let drained = async {
        tokio::time::sleep(LINGER).await;
        let empty = tokio::time::timeout(IDLE, open.wait_for(|open| *open == 0))
            .await
            .is_ok();
        if !empty {
            close.send_replace(true);
            let _ = open.wait_for(|open| *open == 0).await;
        }
    };
    tokio::select! {
        () = &mut accepting => {}
        () = drained => {}
        () = tokio::time::sleep(LAST) => {}
    }
    eprintln!("ending after {} requests", shared.served.load(Ordering::SeqCst));
    Ok(())
}

async fn accept<F, Fut>(listener: TcpListener, shared: Arc<Shared>, closing: watch::Receiver<bool>, answer: F)
where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    loop {
        let mut open = shared.open.subscribe();
        // The rest waits in the kernel's queue.
        if open.wait_for(|open| *open < MAX_CONNECTIONS).await.is_err() {
            return;
        }
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("accept: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        shared.open.send_modify(|open| *open += 1);
        tokio::spawn(connection(stream, shared.clone(), closing.clone(), answer.clone()));
    }
}

async fn connection<F, Fut>(
    stream: tokio::net::TcpStream,
    shared: Arc<Shared>,
    mut closing: watch::Receiver<bool>,
    answer: F,
) where
    F: Fn(Request<Incoming>) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let service = service_fn(|request: Request<Incoming>| {
        let (shared, answer) = (shared.clone(), answer.clone());
        async move {
            let version = request.version();
            let mut response = answer(request).await;
            shared.served.fetch_add(1, Ordering::SeqCst);
            if shared.draining.load(Ordering::SeqCst) && version < Version::HTTP_2 {
                response
                    .headers_mut()
                    .insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    {
        let serving = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(serving);
        tokio::select! {
            _ = serving.as_mut() => {}
            () = async { let _ = closing.wait_for(|closing| *closing).await; } => {
                serving.as_mut().graceful_shutdown();
                let _ = serving.await;
            }
        }
    }
    shared.open.send_modify(|open| *open -= 1);
}
