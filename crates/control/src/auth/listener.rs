//! Accepting connections for tonic: handshakes run beside the accept loop, are bounded in time and number, and leave the
//! peer's certificates where [`super::CallContext`] finds them.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use rustls::ServerConfig;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use mantlet_runtime::task::{AbortOnDrop, Limit};

/// Time for a whole handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes under way at once; further connections wait in the kernel's queue, none of them longer than these take.
const MAX_HANDSHAKES: usize = 512;

/// What is known about a connection; an extension of every request on it.
#[derive(Debug, Clone)]
pub struct ConnInfo {
    /// The peer's address.
    pub remote: SocketAddr,
    /// The verified certificates of the peer, leaf first; empty without a client certificate.
    pub peer_certificates: Arc<Vec<CertificateDer<'static>>>,
    /// Whether the connection is encrypted.
    pub tls: bool,
}

/// Gives the TLS configuration for the next handshake; called once per connection, so that a renewed certificate is used
/// without restarting the listener.
pub type ConfigSource = Arc<dyn Fn() -> Arc<ServerConfig> + Send + Sync>;

/// TLS connections of one listener, as tonic's `serve_with_incoming` wants them. Dropping it ends the accept loop.
pub struct TlsIncoming {
    connections: mpsc::Receiver<TlsIo>,
    _accepting: AbortOnDrop,
}

impl TlsIncoming {
    /// Starts to accept.
    pub fn new(listener: TcpListener, config: ConfigSource) -> Self {
        let (tx, connections) = mpsc::channel(64);
        let task = tokio::spawn(accept_loop(listener, config, tx));
        Self {
            connections,
            _accepting: AbortOnDrop(task.abort_handle()),
        }
    }
}

impl Stream for TlsIncoming {
    type Item = io::Result<TlsIo>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.connections.poll_recv(cx).map(|connection| connection.map(Ok))
    }
}

async fn accept_loop(listener: TcpListener, config: ConfigSource, tx: mpsc::Sender<TlsIo>) {
    let limit = Limit::new(MAX_HANDSHAKES);
    // When all proxies of a mesh come back together, turning them away would only make them come back once more.
    while let Some(place) = limit.enter().await {
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(target: "tls", "cannot accept: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let acceptor = TlsAcceptor::from(config());
        let finished = tx.clone();
        tokio::spawn(async move {
            let _place = place;
            // Small frames of an interactive protocol.
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
                    let info = ConnInfo {
                        remote,
                        peer_certificates: Arc::new(certificates.iter().map(|c| c.clone().into_owned()).collect()),
                        tls: true,
                    };
                    let _ = finished.send(TlsIo { stream, info }).await;
                }
                Ok(Err(error)) => tracing::debug!(target: "tls", "handshake with {remote} failed: {error}"),
                Err(_) => tracing::debug!(target: "tls", "handshake with {remote} took too long"),
            }
        });
        if tx.is_closed() {
            return;
        }
    }
}

/// One TLS connection.
#[derive(Debug)]
pub struct TlsIo {
    stream: TlsStream<TcpStream>,
    info: ConnInfo,
}

impl Connected for TlsIo {
    type ConnectInfo = ConnInfo;

    fn connect_info(&self) -> ConnInfo {
        self.info.clone()
    }
}

/// Plaintext connections of one listener (port 15010).
#[derive(Debug)]
pub struct PlainIncoming(pub TcpListener);

impl Stream for PlainIncoming {
    type Item = io::Result<PlainIo>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.0.poll_accept(cx) {
            Poll::Ready(Ok((stream, remote))) => {
                let _ = stream.set_nodelay(true);
                let info = ConnInfo {
                    remote,
                    peer_certificates: Arc::default(),
                    tls: false,
                };
                Poll::Ready(Some(Ok(PlainIo { stream, info })))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Some(Err(error))),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// One plaintext connection.
#[derive(Debug)]
pub struct PlainIo {
    stream: TcpStream,
    info: ConnInfo,
}

impl Connected for PlainIo {
    type ConnectInfo = ConnInfo;

    fn connect_info(&self) -> ConnInfo {
        self.info.clone()
    }
}

macro_rules! forward_io {
    ($name:ident) => {
        impl AsyncRead for $name {
            fn poll_read(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_read(cx, buf)
            }
        }

        impl AsyncWrite for $name {
            fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.stream).poll_write(cx, buf)
            }
            fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_flush(cx)
            }
            fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_shutdown(cx)
            }
            fn poll_write_vectored(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bufs: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
            }
            fn is_write_vectored(&self) -> bool {
                self.stream.is_write_vectored()
            }
        }
    };
}
forward_io!(TlsIo);
forward_io!(PlainIo);
