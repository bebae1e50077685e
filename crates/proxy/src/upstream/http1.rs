//! Exchanges on HTTP/1.1 connections, each lent to one request at a time.
//!
//! `pool` keeps the connections; `http::forward` and `ext_authz` send requests on them. The request's own task writes and
//! reads, so that nothing has to be woken between a request and the wire; only a body that is not there yet gets a task. It
//! knows nothing of routes, retries or policies, and nobody looks at an idle connection until it is wanted again.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{self, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Request, Response};
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::answer::{Found, Garbled, Reader, digits};
use super::multiplex::Cancel;
use super::pool::Unanswered;
use crate::http::body::{BodyError, RequestBody};
use crate::stream::{ReadSize, Stream, make_room};

/// Up to here a piece of a body is copied behind what stands before it.
const SMALL_PIECE: usize = 1024;

/// Why an exchange ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum Http1Error {
    /// The socket, or TLS.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The peer ended the connection within a response, or before it.
    #[error("the connection ended before the response did")]
    Ended,
    /// The peer's answer is no HTTP.
    #[error(transparent)]
    Garbled(#[from] Garbled),
    /// The request's body broke off, or is not as long as its head says. What the peer got is not the whole.
    #[error("the request's body is not what its head says")]
    Body,
}

/// How a request's body is delimited, and what of it is still to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sending {
    Length(u64),
    Chunked,
}

/// A connection.
struct Connection {
    stream: Stream,
    reader: Reader,
    size: ReadSize,
    /// To be written: a head or a chunk's size, a piece of a body, what follows it.
    output: BytesMut,
    piece: Bytes,
    tail: &'static [u8],
    /// Whether a byte of the request has left.
    begun: bool,
    /// Whether not all of the request has left.
    sending: bool,
    /// Whether the request cannot be finished, so that there is no point in waiting for its answer.
    broken: bool,
    /// Waits for the answer while the request is sent by another task.
    waiting: Option<Waker>,
}

impl Connection {
    /// Writes what there is.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.has_output() {
            let stream = Pin::new(&mut self.stream);
            let written = if self.piece.is_empty() && self.tail.is_empty() {
                ready!(stream.poll_write(cx, &self.output))?
            } else {
                let parts = [&self.output[..], &self.piece[..], self.tail].map(IoSlice::new);
                ready!(stream.poll_write_vectored(cx, &parts))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.begun = true;
            let mut left = written;
            for part in [&mut self.output as &mut dyn Buf, &mut self.piece, &mut self.tail] {
                let here = left.min(part.remaining());
                part.advance(here);
                left -= here;
            }
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Whether a piece of a body has to wait. The first leaves with the head.
    fn is_full(&self) -> bool {
        self.has_output() && (self.begun || !self.piece.is_empty())
    }

    fn has_output(&self) -> bool {
        !(self.output.is_empty() && self.piece.is_empty() && self.tail.is_empty())
    }

    /// Reads more; whether there was any.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Http1Error>> {
        if self.broken {
            return Poll::Ready(Err(Http1Error::Body));
        }
        make_room(&mut self.reader.input, self.size.next());
        let mut space = (&mut self.reader.input).limit(self.size.next());
        match poll_read_buf(Pin::new(&mut self.stream), cx, &mut space) {
            Poll::Ready(read) => {
                let read = read?;
                self.size.adapt(read);
                Poll::Ready(Ok(read > 0))
            }
            Poll::Pending => {
                if self.sending {
                    self.waiting = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<()>, Http1Error>> {
        loop {
            if let Some(head) = self.reader.head()? {
                return Poll::Ready(Ok(head));
            }
            if !ready!(self.poll_more(cx))? {
                return Poll::Ready(Err(Http1Error::Ended));
            }
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Http1Error>>> {
        loop {
            match self.reader.part()? {
                Found::Frame(frame) => return Poll::Ready(Some(Ok(frame))),
                Found::End => return Poll::Ready(None),
                Found::More => {}
            }
            if !ready!(self.poll_more(cx))? && !self.reader.end() {
                return Poll::Ready(Some(Err(Http1Error::Ended)));
            }
        }
    }

    fn is_reusable(&self) -> bool {
        !self.sending && !self.broken && self.reader.is_reusable()
    }
}

type Shared = Rc<RefCell<Connection>>;

/// A connection on loan, or idle.
pub struct Http1Lease {
    connection: Shared,
    /// Whether it has carried a request before: its death may only mean that the peer got tired of it.
    pub reused: bool,
    /// This end's address.
    pub local: Option<SocketAddr>,
}

impl Http1Lease {
    /// Over a new connection.
    pub fn new(stream: Stream) -> Self {
        let local = stream.local_address();
        Http1Lease {
            connection: Rc::new(RefCell::new(Connection {
                stream,
                reader: Reader::default(),
                size: ReadSize::default(),
                output: BytesMut::new(),
                piece: Bytes::new(),
                tail: b"",
                begun: false,
                sending: false,
                broken: false,
                waiting: None,
            })),
            reused: false,
            local,
        }
    }

    /// Whether it can carry another request, once its exchange has ended. Memory that only an exchange needs is given up.
    pub fn rest(&self) -> bool {
        let mut connection = self.connection.borrow_mut();
        let reusable = connection.is_reusable();
        connection.reader.input = BytesMut::new();
        connection.output = BytesMut::new();
        reusable
    }

    /// Whether an idle connection is still one: the peer has not ended it, and has said nothing that nobody asked for.
    pub fn is_alive(&self) -> bool {
        let mut connection = self.connection.borrow_mut();
        let mut byte = [0];
        let mut space = ReadBuf::new(&mut byte);
        let mut cx = Context::from_waker(Waker::noop());
        Pin::new(&mut connection.stream)
            .poll_read(&mut cx, &mut space)
            .is_pending()
    }

    /// The connection after it has become another protocol's; `None` while the exchange goes on.
    pub fn into_stream(self) -> Option<Stream> {
        let Connection { mut stream, reader, .. } = Rc::try_unwrap(self.connection).ok()?.into_inner();
        stream.unread(reader.input.freeze());
        Some(stream)
    }
}

/// Sends a request, whose target and fields are HTTP/1.1's, and waits for the head of the response.
///
/// # Errors
/// See [`Unanswered`].
pub async fn exchange(
    lease: &Http1Lease,
    request: Request<RequestBody>,
) -> Result<Response<Download>, Box<Unanswered>> {
    let failed = |error, back| {
        Box::new(Unanswered {
            error: BodyError::Http1(error),
            back,
        })
    };
    let (head, body) = request.into_parts();
    let Some(sending) = framing(&head, &body) else {
        return Err(failed(Http1Error::Body, None));
    };
    {
        let mut connection = lease.connection.borrow_mut();
        connection.reader.expect(head.method == Method::HEAD);
        (connection.begun, connection.sending) = (false, true);
        write_head(&mut connection.output, &head, sending);
    }
    let mut upload = Upload {
        connection: lease.connection.clone(),
        body,
        sending,
        touched: false,
        whole: false,
    };
    let mut task = Cancel::default();
    // Most bodies are there already. One that is not must not wait for the response to be read: a client may well send
    // everything before it reads anything.
    let sent = poll_fn(|cx| Poll::Ready(upload.poll_all(cx))).await;
    match sent {
        Poll::Ready(Ok(())) => {}
        Poll::Ready(Err(error)) => {
            let connection = lease.connection.borrow();
            if !connection.begun {
                drop(connection);
                let back = (!upload.touched).then(|| Request::from_parts(head, upload.body));
                return Err(failed(error, back));
            }
            if connection.broken {
                return Err(failed(error, None));
            }
            // The peer reads no more; it may have said why.
        }
        Poll::Pending => task = Cancel::of(tokio::task::spawn_local(upload)),
    }
    let answer = poll_fn(|cx| lease.connection.borrow_mut().poll_head(cx)).await;
    let answer = answer.map_err(|error| failed(error, None))?;
    Ok(answer.map(|()| Download {
        connection: lease.connection.clone(),
        upload: task,
    }))
}

/// How the body of a request is delimited; `None` if its head says what it is not.
fn framing(head: &Parts, body: &RequestBody) -> Option<Sending> {
    let declared = match head.headers.get(header::CONTENT_LENGTH) {
        None => None,
        Some(value) => Some(digits(value.as_bytes())?),
    };
    if body.is_end_stream() {
        return (declared.unwrap_or(0) == 0).then_some(Sending::Length(0));
    }
    Some(match declared.or(body.size_hint().exact()) {
        Some(length) => Sending::Length(length),
        None => Sending::Chunked,
    })
}

fn write_head(out: &mut BytesMut, head: &Parts, sending: Sending) {
    let target = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    out.reserve(target.len() + 64 + head.headers.len() * 48);
    for part in [head.method.as_str(), " ", target, " HTTP/1.1\r\n"] {
        out.put_slice(part.as_bytes());
    }
    let mut field = |name: &[u8], value: &HeaderValue| {
        for part in [name, b": ", value.as_bytes(), b"\r\n"] {
            out.put_slice(part);
        }
    };
    for (name, value) in &head.headers {
        if name != header::TRANSFER_ENCODING {
            field(name.as_str().as_bytes(), value);
        }
    }
    match sending {
        Sending::Length(length) => {
            if length > 0 && !head.headers.contains_key(header::CONTENT_LENGTH) {
                field(b"content-length", &HeaderValue::from(length));
            }
        }
        Sending::Chunked => field(b"transfer-encoding", &HeaderValue::from_static("chunked")),
    }
    out.put_slice(b"\r\n");
}

/// A request on its way out.
struct Upload {
    connection: Shared,
    body: RequestBody,
    sending: Sending,
    /// Whether something was taken from the body.
    touched: bool,
    /// Whether the end of the body has been handed to the connection.
    whole: bool,
}

impl Upload {
    fn poll_all(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Http1Error>> {
        loop {
            let full = self.connection.borrow().is_full();
            if !self.whole && !full && self.poll_piece(cx)?.is_pending() {
                ready!(self.connection.borrow_mut().poll_write(cx))?;
                return Poll::Pending;
            }
            let mut connection = self.connection.borrow_mut();
            ready!(connection.poll_write(cx))?;
            if self.whole {
                connection.sending = false;
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Moves a piece of the body to the connection, which has room for it.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Http1Error>> {
        if self.sending == Sending::Length(0) && self.body.is_end_stream() {
            self.whole = true;
            return Poll::Ready(Ok(()));
        }
        let next = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.touched = true;
        let mut connection = self.connection.borrow_mut();
        let connection = &mut *connection;
        let fits = match next {
            None => {
                self.whole = true;
                match self.sending {
                    Sending::Length(left) => left == 0,
                    Sending::Chunked => {
                        connection.output.put_slice(b"0\r\n\r\n");
                        true
                    }
                }
            }
            Some(Err(_)) => false,
            Some(Ok(frame)) => match frame.into_data() {
                // Trailers end here, as in Envoy.
                Err(_) => true,
                Ok(piece) => match &mut self.sending {
                    Sending::Length(left) => match left.checked_sub(piece.len() as u64) {
                        None => false,
                        Some(rest) => {
                            *left = rest;
                            connection.put(piece, b"");
                            true
                        }
                    },
                    Sending::Chunked => {
                        // An empty chunk would be the end.
                        if !piece.is_empty() {
                            connection.output.put_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                            connection.put(piece, b"\r\n");
                        }
                        true
                    }
                },
            },
        };
        if fits {
            return Poll::Ready(Ok(()));
        }
        // The peer must not take what came for the whole, and whoever waits for its answer must not wait on.
        connection.broken = true;
        if let Some(waiting) = connection.waiting.take() {
            waiting.wake();
        }
        Poll::Ready(Err(Http1Error::Body))
    }
}

impl Connection {
    fn put(&mut self, piece: Bytes, tail: &'static [u8]) {
        if piece.len() <= SMALL_PIECE {
            self.output.put_slice(&piece);
            self.output.put_slice(tail);
        } else {
            self.piece = piece;
            self.tail = tail;
        }
    }
}

impl Future for Upload {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Err(error) = ready!(self.poll_all(cx)) {
            tracing::debug!(target: "upstream", "upload ended: {error}");
        }
        Poll::Ready(())
    }
}

/// A response's body. Whatever ends it but its own end is an error: a part must never be taken for the whole.
pub struct Download {
    connection: Shared,
    /// Ends with a body that was given up; after the whole answer the request may still be sent to its end.
    upload: Cancel,
}

impl Body for Download {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = self.connection.borrow_mut().poll_frame(cx);
        polled.map_err(BodyError::Http1)
    }

    fn is_end_stream(&self) -> bool {
        self.connection.borrow().reader.is_done()
    }

    fn size_hint(&self) -> SizeHint {
        match self.connection.borrow().reader.left() {
            Some(left) => SizeHint::with_exact(left),
            None => SizeHint::default(),
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if self.is_end_stream() {
            self.upload.forget();
        }
    }
}

#[cfg(test)]
mod tests;
