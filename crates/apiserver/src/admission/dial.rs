//! The seam through which connections to webhooks are opened.

use std::future::Future;
use std::io;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// A byte stream in both directions.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A boxed stream.
pub type BoxIo = Box<dyn Io>;

/// Where to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DialTarget {
    /// IP address of an endpoint, or the host of a URL.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// Opens connections to webhooks. The embedded cluster dials pod addresses directly; tests bring their own.
pub trait Dial: Send + Sync {
    /// Connects.
    fn dial(&self, target: DialTarget) -> Pin<Box<dyn Future<Output = io::Result<BoxIo>> + Send>>;
}

/// Plain TCP.
pub struct DirectDialer;

impl Dial for DirectDialer {
    fn dial(&self, target: DialTarget) -> Pin<Box<dyn Future<Output = io::Result<BoxIo>> + Send>> {
        Box::pin(async move {
            let stream = TcpStream::connect((target.host.as_str(), target.port)).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as BoxIo)
        })
    }
}
