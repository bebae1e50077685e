//! Opens connections: source address, timeout, TLS, and what to say when it fails.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use mantlet_identity::verifier::identity_error;
use mantlet_model::cluster::Cluster;
use mantlet_model::tls::ClientTls;
use rustls_pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;

use crate::stream::{ReadAhead, Stream};
use crate::worker::Worker;

/// Timeout when a cluster names none (Istio's default).
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no connection. The text is Envoy's transport failure reason.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// No answer in time.
    #[error("connection timeout")]
    Timeout,
    /// Refused, unreachable, no local port.
    #[error("{0}")]
    Tcp(String),
    /// The handshake failed: the peer is not who it should be, or does not speak TLS.
    #[error("TLS_error:|{0}:TLS_error_end")]
    Tls(String),
    /// There is no certificate or no usable TLS context of our own.
    #[error("TLS_error:|{0}:TLS_error_end")]
    NoSecret(String),
}

/// Connects to an address for a cluster, with TLS if `tls` is given, offering `alpn`.
///
/// # Errors
/// See [`ConnectError`].
pub async fn open(
    worker: &Rc<Worker>,
    cluster: &Cluster,
    address: SocketAddr,
    tls: Option<&ClientTls>,
    alpn: &[String],
) -> Result<Stream, ConnectError> {
    let limit = match cluster.connect_timeout_ms {
        0 => DEFAULT_TIMEOUT,
        ms => Duration::from_millis(ms),
    };
    match tokio::time::timeout(limit, open_untimed(worker, cluster, address, tls, alpn)).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::Timeout),
    }
}

async fn open_untimed(
    worker: &Rc<Worker>,
    cluster: &Cluster,
    address: SocketAddr,
    tls: Option<&ClientTls>,
    alpn: &[String],
) -> Result<Stream, ConnectError> {
    let config = match tls {
        None => None,
        Some(context) => Some(
            worker
                .tls
                .borrow_mut()
                .client(&worker.shared.secrets, context, alpn)
                .map_err(|e| ConnectError::NoSecret(e.to_string()))?,
        ),
    };
    let tcp = dial(cluster.bind_source, address)
        .await
        .map_err(|e| ConnectError::Tcp(format!("delayed connect error: {}", errno_text(&e))))?;
    let _ = tcp.set_nodelay(true);
    let Some((config, context)) = config.zip(tls) else {
        return Ok(Stream::plain(tcp, bytes::Bytes::new()));
    };
    let name = if context.sni.is_empty() {
        ServerName::IpAddress(address.ip().into())
    } else {
        ServerName::try_from(context.sni.clone())
            .map_err(|_| ConnectError::Tls(format!("{:?} is no server name", context.sni)))?
    };
    match TlsConnector::from(config).connect(name, ReadAhead::new(tcp)).await {
        Ok(stream) => Ok(Stream::client(stream)),
        Err(error) => Err(ConnectError::Tls(tls_reason(&error))),
    }
}

/// Connects, from `source` if it is of the same family.
pub async fn dial(source: Option<IpAddr>, address: SocketAddr) -> std::io::Result<TcpStream> {
    match source {
        // 127.0.0.6 is what exempts the connection from capture; ::6 is its IPv6 twin.
        Some(source) if source.is_ipv4() == address.is_ipv4() => {
            let socket = mantlet_net::sockopt::bound_tcp(source, false)?;
            TcpSocket::from_std_stream(std::net::TcpStream::from(socket))
                .connect(address)
                .await
        }
        _ => TcpStream::connect(address).await,
    }
}

/// The system's words without Rust's `(os error N)`.
fn errno_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_string(),
        None => text,
    }
}

/// Why a handshake failed, in words that name the peer's identity where that was the reason.
pub fn tls_reason(error: &std::io::Error) -> String {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match inner.map(|e| (e, identity_error(e))) {
        Some((_, Some(identity))) => format!("CERTIFICATE_VERIFY_FAILED: {identity}"),
        Some((rustls::Error::InvalidCertificate(reason), None)) => format!("CERTIFICATE_VERIFY_FAILED: {reason:?}"),
        Some((other, None)) => other.to_string(),
        None => errno_text(error),
    }
}
