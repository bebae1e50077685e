//! One stream type for every connection: plain TCP or TLS of either side, with bytes that were read ahead in front.
//!
//! One enum instead of a type parameter keeps a single copy of the HTTP machinery in the binary.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A connection.
pub struct Stream {
    /// Read ahead during inspection, to be read first.
    prefix: Bytes,
    inner: Inner,
}

enum Inner {
    Tcp(TcpStream),
    Server(Box<tokio_rustls::server::TlsStream<TcpStream>>),
    Client(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Stream {
    /// A plain connection with bytes read ahead.
    pub fn plain(tcp: TcpStream, prefix: Bytes) -> Self {
        Stream {
            prefix,
            inner: Inner::Tcp(tcp),
        }
    }

    /// The accepting end of a TLS connection.
    pub fn server(tls: tokio_rustls::server::TlsStream<TcpStream>) -> Self {
        Stream {
            prefix: Bytes::new(),
            inner: Inner::Server(Box::new(tls)),
        }
    }

    /// The connecting end of a TLS connection.
    pub fn client(tls: tokio_rustls::client::TlsStream<TcpStream>) -> Self {
        Stream {
            prefix: Bytes::new(),
            inner: Inner::Client(Box::new(tls)),
        }
    }

    /// Puts bytes in front that were read from this stream.
    pub fn unread(&mut self, bytes: Bytes) {
        if self.prefix.is_empty() {
            self.prefix = bytes;
        } else {
            let mut all = bytes::BytesMut::from(&bytes[..]);
            all.extend_from_slice(&self.prefix);
            self.prefix = all.freeze();
        }
    }

    /// The first URI name of the server's certificate, on the connecting side of TLS.
    pub fn server_uri(&self) -> Option<String> {
        let Inner::Client(tls) = &self.inner else { return None };
        let leaf = tls.get_ref().1.peer_certificates()?.first()?;
        mantlet_identity::PeerCertificate::parse(leaf)
            .ok()?
            .uris
            .into_iter()
            .next()
    }

    /// The TCP socket underneath.
    pub fn tcp(&self) -> &TcpStream {
        match &self.inner {
            Inner::Tcp(tcp) => tcp,
            Inner::Server(tls) => tls.get_ref().0,
            Inner::Client(tls) => tls.get_ref().0,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.prefix.is_empty() {
            let n = this.prefix.len().min(buf.remaining());
            buf.put_slice(&this.prefix[..n]);
            this.prefix.advance(n);
            return Poll::Ready(Ok(()));
        }
        match &mut this.inner {
            Inner::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Inner::Server(s) => Pin::new(s).poll_read(cx, buf),
            Inner::Client(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.inner {
            Inner::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Inner::Server(s) => Pin::new(s).poll_write(cx, buf),
            Inner::Client(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.inner {
            Inner::Tcp(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Inner::Server(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Inner::Client(s) => Pin::new(s).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.inner {
            Inner::Tcp(s) => s.is_write_vectored(),
            Inner::Server(s) => s.is_write_vectored(),
            Inner::Client(s) => s.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.inner {
            Inner::Tcp(s) => Pin::new(s).poll_flush(cx),
            Inner::Server(s) => Pin::new(s).poll_flush(cx),
            Inner::Client(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.inner {
            Inner::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Inner::Server(s) => Pin::new(s).poll_shutdown(cx),
            Inner::Client(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
