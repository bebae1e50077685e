//! Exchanges on HTTP/2 connections that many requests share.
//!
//! `http::forward` and `ext_authz` call it. It speaks to h2 directly: the request's own task opens its stream and waits for the
//! response, so that nothing but the connection's task stands between a request and the wire, and what all requests of one
//! turn of the event loop have to say leaves in one write. It knows nothing of routes, retries or policies.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use h2::{RecvStream, SendStream, client};
use http::header::{self, HeaderValue};
use http::{HeaderName, Method, Request, Response};
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::connect::ConnectError;
use super::pool::Unanswered;
use crate::http::body::{BodyError, RequestBody};
use crate::http::headers;
use crate::stream::{MAX_READ, Stream};
use crate::telemetry::exchange::PeerLabels;

/// Requests at once on one connection before another is opened.
const MAX_STREAMS: usize = 90;
/// Largest frame that is accepted, for bulk data: as much as is read at once.
pub const MAX_FRAME: u32 = MAX_READ as u32;
/// What a peer may send on one stream before we have read it.
pub const STREAM_WINDOW: u32 = 256 << 10;
/// What a peer may send on all streams of a connection: all of them may stall, and the next still has room.
pub const CONNECTION_WINDOW: u32 = STREAM_WINDOW * (MAX_STREAMS as u32 + 1);
/// What is buffered of one stream's request before its sender has to wait.
const SEND_BUFFER: usize = 1 << 20;
/// Largest head of a response.
const MAX_HEAD: u32 = 64 * 1024;
/// Streams that were reset by us and may still get frames.
const MAX_RESET: usize = 1024;

/// Fields whose value is another one in every message. Indexed, they would push everything else out of HPACK's table, and
/// looking one up walks over all the earlier ones.
const EVER_CHANGING: [HeaderName; 6] = [
    headers::REQUEST_ID,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("x-b3-traceid"),
    HeaderName::from_static("x-b3-spanid"),
    HeaderName::from_static("x-b3-parentspanid"),
    header::DATE,
];

/// Keeps ever-changing values out of HPACK's table; the name stays in it if an earlier message has brought it there.
pub fn mark_changing(fields: &mut http::HeaderMap) {
    for name in &EVER_CHANGING {
        if let Some(value) = fields.get_mut(name) {
            value.set_sensitive(true);
        }
    }
}

/// One connection.
pub struct Shared {
    sender: client::SendRequest<Bytes>,
    streams: Cell<usize>,
    /// Whether it takes no new request: the peer said so, or it has ended.
    closed: Cell<bool>,
    /// Whether it has carried a request.
    used: Cell<bool>,
    /// Whether a request that was HTTP/1.1 has told the peer who this workload is.
    introduced: Cell<bool>,
    /// Last use.
    since: Cell<Instant>,
    /// This end's address.
    local: Option<SocketAddr>,
    /// The workload at the other end, from the first answer that said so.
    peer: RefCell<Option<Rc<PeerLabels>>>,
}

impl Shared {
    /// Speaks HTTP/2 on a new connection.
    ///
    /// # Errors
    /// h2's.
    pub async fn start(stream: Stream) -> Result<Rc<Self>, h2::Error> {
        let local = stream.local_address();
        let (sender, connection) = client::Builder::new()
            .enable_push(false)
            .initial_max_send_streams(MAX_STREAMS)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_send_buffer_size(SEND_BUFFER)
            .max_header_list_size(MAX_HEAD)
            .max_local_error_reset_streams(Some(MAX_RESET))
            .handshake::<_, Bytes>(stream)
            .await?;
        let shared = Rc::new(Shared {
            sender,
            streams: Cell::new(0),
            closed: Cell::new(false),
            used: Cell::new(false),
            introduced: Cell::new(false),
            since: Cell::new(Instant::now()),
            local,
            peer: RefCell::default(),
        });
        // The task must not keep the connection alive: it ends when nobody can use it any more.
        let seen = Rc::downgrade(&shared);
        tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                tracing::debug!(target: "upstream", "HTTP/2 connection ended: {error}");
            }
            if let Some(shared) = seen.upgrade() {
                shared.closed.set(true);
            }
        });
        Ok(shared)
    }

    /// Whether it takes no new request.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Whether another request fits.
    pub fn has_room(&self) -> bool {
        !self.closed.get() && self.streams.get() < self.sender.current_max_send_streams().min(MAX_STREAMS)
    }

    /// Requests under way, and when the last one began.
    pub fn usage(&self) -> (usize, Instant) {
        (self.streams.get(), self.since.get())
    }

    /// A place for one request.
    pub fn lease(self: &Rc<Self>) -> Http2Lease {
        let reused = self.used.replace(true);
        self.since.set(Instant::now());
        self.streams.set(self.streams.get() + 1);
        Http2Lease {
            shared: self.clone(),
            reused,
        }
    }
}

/// One request's place on a connection.
pub struct Http2Lease {
    shared: Rc<Shared>,
    /// Whether the connection has carried requests before.
    pub reused: bool,
}

impl Http2Lease {
    /// Whether the peer has been told who this workload is; it counts as told from now on.
    pub fn introduced(&self) -> bool {
        self.shared.introduced.replace(true)
    }

    /// The workload at the other end: what this answer says, or an earlier one on the connection has said.
    pub fn peer(&self, said: Option<Rc<PeerLabels>>) -> Option<Rc<PeerLabels>> {
        let mut peer = self.shared.peer.borrow_mut();
        if said.is_some() {
            *peer = said;
        }
        peer.clone()
    }

    /// This end's address.
    pub fn local(&self) -> Option<SocketAddr> {
        self.shared.local
    }
}

impl Drop for Http2Lease {
    fn drop(&mut self) {
        self.shared.streams.set(self.shared.streams.get().saturating_sub(1));
    }
}

/// Ends a request's upload when the request is given up.
#[derive(Default)]
pub(super) struct Cancel(Option<AbortHandle>);

impl Cancel {
    /// Of a task.
    pub(super) fn of(task: tokio::task::JoinHandle<()>) -> Self {
        Cancel(Some(task.abort_handle()))
    }

    /// Lets the upload live as long as its own ends do.
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        if let Some(upload) = self.0.take() {
            upload.abort();
        }
    }
}

/// Sends a request, whose target and fields are HTTP/2's, and waits for the head of the response.
///
/// # Errors
/// See [`Unanswered`].
pub async fn exchange(
    lease: &Http2Lease,
    request: Request<RequestBody>,
) -> Result<Response<Download>, Box<Unanswered>> {
    let mut sender = lease.shared.sender.clone();
    if let Err(error) = poll_fn(|cx| sender.poll_ready(cx)).await {
        // Nothing has been sent, and nothing can be: the peer is closing, or gone.
        lease.shared.closed.set(true);
        return Err(Box::new(Unanswered {
            error: BodyError::Http2(error),
            back: Some(request),
        }));
    }
    let (mut head, body) = request.into_parts();
    let end = body.is_end_stream();
    if let Some(length) = body.size_hint().exact()
        && (length > 0 || matches!(head.method, Method::POST | Method::PUT | Method::PATCH))
        && !head.headers.contains_key(header::CONTENT_LENGTH)
    {
        head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    if lease.reused {
        mark_changing(&mut head.headers);
    }
    let sent = sender.send_request(Request::from_parts(head, ()), end);
    let failed = |error| {
        Box::new(Unanswered {
            error: BodyError::Http2(error),
            back: None,
        })
    };
    let (response, stream) = sent.map_err(failed)?;
    drop(sender);
    let mut upload = Cancel::default();
    if !end {
        let mut pipe = Upload {
            stream,
            body,
            held: None,
        };
        // Most bodies are there already and need no task of their own. One that is not must not wait for the response to be
        // read: a client may well send everything before it reads anything.
        let done = poll_fn(|cx| Poll::Ready(Pin::new(&mut pipe).poll(cx).is_ready())).await;
        if !done {
            upload = Cancel::of(tokio::task::spawn_local(pipe));
        }
    }
    let response = response.await.map_err(failed)?;
    upload.forget();
    let length = response.headers().get(header::CONTENT_LENGTH);
    let left = length.and_then(|v| v.to_str().ok()?.parse().ok());
    Ok(response.map(|stream| Download {
        stream,
        left,
        data_done: false,
    }))
}

/// A request's body on its way into its stream.
struct Upload {
    stream: SendStream<Bytes>,
    body: RequestBody,
    /// Read from the body, waiting for room on the stream; whether it is the last piece.
    held: Option<(Bytes, bool)>,
}

impl Upload {
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, h2::Error>> {
        if let Poll::Ready(reason) = self.stream.poll_reset(cx)? {
            return Poll::Ready(Err(reason.into()));
        }
        if let Some((piece, last)) = self.held.take() {
            while self.stream.capacity() == 0 {
                match self.stream.poll_capacity(cx) {
                    Poll::Ready(Some(room)) => {
                        room?;
                    }
                    Poll::Ready(None) => return Poll::Ready(Ok(true)),
                    Poll::Pending => {
                        self.held = Some((piece, last));
                        return Poll::Pending;
                    }
                }
            }
            self.stream.send_data(piece, last)?;
            return Poll::Ready(Ok(last));
        }
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            None => {
                self.stream.send_data(Bytes::new(), true)?;
                Poll::Ready(Ok(true))
            }
            Some(Err(error)) => {
                // The client gave up, or its bytes are no body: the upstream must not take what came for the whole.
                self.stream.send_reset(error.reason());
                Poll::Ready(Ok(true))
            }
            Some(Ok(frame)) => match frame.into_data() {
                Ok(piece) => {
                    let last = self.body.is_end_stream();
                    if piece.is_empty() {
                        self.stream.send_data(piece, last)?;
                        return Poll::Ready(Ok(last));
                    }
                    // The least claim on the connection's window; h2 raises it when the piece is handed over.
                    self.stream.reserve_capacity(1);
                    self.held = Some((piece, last));
                    Poll::Ready(Ok(false))
                }
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => {
                        self.stream.reserve_capacity(0);
                        self.stream.send_trailers(trailers)?;
                        Poll::Ready(Ok(true))
                    }
                    Err(_) => Poll::Ready(Ok(false)),
                },
            },
        }
    }
}

impl Future for Upload {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match ready!(self.poll_piece(cx)) {
                Ok(false) => {}
                Ok(true) => return Poll::Ready(()),
                Err(error) => {
                    tracing::debug!(target: "upstream", "upload ended: {error}");
                    return Poll::Ready(());
                }
            }
        }
    }
}

/// A response's body. Whatever ends it but the end of its stream is an error: a part must never be taken for the whole.
pub struct Download {
    stream: RecvStream,
    /// What is still to come, if the head said how long the body is.
    left: Option<u64>,
    data_done: bool,
}

impl Body for Download {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if !this.data_done {
            match ready!(this.stream.poll_data(cx)) {
                Some(Ok(piece)) => {
                    // Who reads faster than the client takes is held back by the client's side.
                    let _ = this.stream.flow_control().release_capacity(piece.len());
                    if let Some(left) = &mut this.left {
                        *left = left.saturating_sub(piece.len() as u64);
                    }
                    return Poll::Ready(Some(Ok(Frame::data(piece))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(BodyError::Http2(error)))),
                None => this.data_done = true,
            }
        }
        Poll::Ready(match ready!(this.stream.poll_trailers(cx)) {
            Ok(trailers) => trailers.map(|t| Ok(Frame::trailers(t))),
            Err(error) => Some(Err(BodyError::Http2(error))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.left {
            Some(left) => SizeHint::with_exact(left),
            None if self.stream.is_end_stream() => SizeHint::with_exact(0),
            None => SizeHint::default(),
        }
    }
}

/// A connection that is being opened, for the requests that wait for it.
#[derive(Default)]
pub struct Opening {
    failed: RefCell<Option<ConnectError>>,
    done: Cell<bool>,
    changed: Notify,
}

impl Opening {
    /// Ends the wait; everybody learns why there is no connection, if there is none.
    pub fn finish(&self, failed: Option<ConnectError>) {
        if !self.done.replace(true) {
            *self.failed.borrow_mut() = failed;
            self.changed.notify_waiters();
        }
    }

    /// Whether nobody is at it any more.
    pub fn is_done(&self) -> bool {
        self.done.get()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why there is no connection. None without a connection means that the opener was given up.
    pub async fn wait(&self) -> Result<(), ConnectError> {
        if !self.done.get() {
            self.changed.notified().await;
        }
        match &*self.failed.borrow() {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }
}

/// Ends an [`Opening`] when its opener is given up.
pub struct Opener(pub Rc<Opening>);

impl Drop for Opener {
    fn drop(&mut self) {
        self.0.finish(None);
    }
}
