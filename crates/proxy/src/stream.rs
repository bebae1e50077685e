//! One stream type for every connection: plain TCP or TLS of either side, with bytes that were read ahead in front.
//!
//! One enum instead of a type parameter keeps a single copy of the HTTP machinery in the binary.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes, BytesMut};
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
    Server(Box<tokio_rustls::server::TlsStream<ReadAhead>>),
    Client(Box<tokio_rustls::client::TlsStream<ReadAhead>>),
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
    pub fn server(tls: tokio_rustls::server::TlsStream<ReadAhead>) -> Self {
        Stream {
            prefix: Bytes::new(),
            inner: Inner::Server(Box::new(tls)),
        }
    }

    /// The connecting end of a TLS connection.
    pub fn client(tls: tokio_rustls::client::TlsStream<ReadAhead>) -> Self {
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
            let mut all = BytesMut::from(&bytes[..]);
            all.extend_from_slice(&self.prefix);
            self.prefix = all.freeze();
        }
    }

    /// This end's address.
    pub fn local_address(&self) -> Option<SocketAddr> {
        let tcp = match &self.inner {
            Inner::Tcp(tcp) => tcp,
            Inner::Server(tls) => &tls.get_ref().0.inner,
            Inner::Client(tls) => &tls.get_ref().0.inner,
        };
        tcp.local_addr().ok()
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

/// Up to here several pieces are copied into one: cheaper than what the kernel does for a list of pieces.
const SMALL_WRITE: usize = 1024;

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
            Inner::Tcp(s) if bufs.iter().map(|b| b.len()).sum::<usize>() <= SMALL_WRITE => {
                let mut small = [0u8; SMALL_WRITE];
                let mut length = 0;
                for piece in bufs {
                    small[length..length + piece.len()].copy_from_slice(piece);
                    length += piece.len();
                }
                Pin::new(s).poll_write(cx, &small[..length])
            }
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

/// Smallest read.
const MIN_READ: usize = 4 * 1024;
/// Largest read, and largest piece of a body: with the nine bytes before it in an HTTP/2 frame it fills four TLS records,
/// which is also what the TLS library takes at once. One byte more would be a record and a write of its own.
pub const MAX_READ: usize = 64 * 1024 - 9;

/// How much to read at a time: as much as traffic suggests, little again when it calms down.
pub struct ReadSize(usize);

impl Default for ReadSize {
    fn default() -> Self {
        ReadSize(MIN_READ)
    }
}

impl ReadSize {
    /// Bytes of the next read.
    pub fn next(&self) -> usize {
        self.0
    }

    /// So many bytes came.
    pub fn adapt(&mut self, read: usize) {
        if read >= self.0 {
            self.0 = (self.0 * 2).min(MAX_READ);
        } else if read < self.0 / 4 {
            self.0 = (self.0 / 2).max(MIN_READ);
        }
    }
}

/// See [`skew`].
const SKEW: usize = 64;

/// How many bytes to leave out at the beginning of memory from which TLS records will be made.
///
/// The TLS library copies a record's content behind its head of five bytes, in memory of the record's own, which begins a page
/// or a quarter of one if it is large. AMD's processors copy sixteen times as slowly (`rep movsb`: 3 GB/s, not 50) when the
/// target lies up to 15 bytes behind the source modulo the page; what begins a page itself would always be copied that way.
pub fn skew(memory: *const u8) -> usize {
    SKEW.saturating_sub(memory.addr() % 1024)
}

/// Makes room for a read of `size` bytes.
pub fn make_room(buffer: &mut BytesMut, size: usize) {
    if size < MIN_READ * 4 || !buffer.is_empty() {
        buffer.reserve(size);
        return;
    }
    buffer.reserve(size + SKEW);
    let skew = skew(buffer.as_ptr());
    buffer.put_bytes(0, skew);
    buffer.advance(skew);
}

/// A socket under TLS. The TLS library reads 4 KiB at a time, a quarter of a record; this reads as much as traffic
/// suggests and gives the memory back when it calms down.
pub struct ReadAhead {
    inner: TcpStream,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    size: ReadSize,
}

impl ReadAhead {
    /// Over a socket of which nothing has been read ahead.
    pub fn new(inner: TcpStream) -> Self {
        ReadAhead {
            inner,
            buffer: Vec::new(),
            start: 0,
            end: 0,
            size: ReadSize::default(),
        }
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.start == this.end {
            let size = this.size.next();
            if out.remaining() >= size {
                return Pin::new(&mut this.inner).poll_read(cx, out);
            }
            if this.buffer.len() != size {
                this.buffer = vec![0; size];
            }
            let mut space = ReadBuf::new(&mut this.buffer);
            match Pin::new(&mut this.inner).poll_read(cx, &mut space) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
            (this.start, this.end) = (0, space.filled().len());
            this.size.adapt(this.end);
        }
        let n = (this.end - this.start).min(out.remaining());
        out.put_slice(&this.buffer[this.start..this.start + n]);
        this.start += n;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn reading_ahead_loses_nothing_and_grows_and_shrinks() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut writer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (reader, _) = listener.accept().await.unwrap();
        let data: Vec<u8> = (0..600_000u32).map(|n| (n % 253) as u8).collect();
        let sent = data.clone();
        let sending = tokio::spawn(async move {
            writer.write_all(&sent).await.unwrap();
            writer
        });
        let mut reader = ReadAhead::new(reader);
        let mut seen = Vec::new();
        let mut piece = [0u8; 1000];
        let mut largest = 0;
        while seen.len() < data.len() {
            let n = reader.read(&mut piece).await.unwrap();
            assert!(n > 0);
            seen.extend_from_slice(&piece[..n]);
            largest = largest.max(reader.buffer.len());
        }
        assert_eq!(seen, data);
        assert!(largest > MIN_READ, "{largest}");
        let mut writer = sending.await.unwrap();
        for _ in 0..10 {
            writer.write_all(b"x").await.unwrap();
            reader.read_exact(&mut piece[..1]).await.unwrap();
        }
        assert_eq!(reader.buffer.len(), MIN_READ);
    }
}
