//! A connection's stream with somebody who looks at the bytes as they pass, and may end it.
//!
//! `serve` puts it between the connection and hyper's codec, with the follower of HTTP/1.1 (`framing`) or the meter of HTTP/2
//! (`meter`). It changes no byte and knows nothing of what they mean.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::stream::Stream;

/// Looks at the bytes of a connection.
pub trait Watch {
    /// Bytes that were read, in order.
    ///
    /// # Errors
    /// Why the connection ends; nothing is read from it any more.
    fn read(&self, bytes: &[u8]) -> io::Result<()>;

    /// So many bytes were written.
    fn wrote(&self, _count: usize) {}
}

/// A stream that is watched.
pub struct Watched<W> {
    stream: Stream,
    watch: W,
    ended: Option<io::ErrorKind>,
}

impl<W: Watch> Watched<W> {
    /// Watches a stream.
    pub fn new(stream: Stream, watch: W) -> Self {
        Watched {
            stream,
            watch,
            ended: None,
        }
    }

    fn wrote(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = &polled {
            self.watch.wrote(*count);
        }
        polled
    }
}

impl<W: Watch + Unpin> AsyncRead for Watched<W> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(kind) = self.ended {
            return Poll::Ready(Err(kind.into()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if matches!(polled, Poll::Ready(Ok(())))
            && let Err(error) = self.watch.read(&buf.filled()[before..])
        {
            self.ended = Some(error.kind());
            return Poll::Ready(Err(error));
        }
        polled
    }
}

impl<W: Watch + Unpin> AsyncWrite for Watched<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
