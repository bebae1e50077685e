//! Bodies on their way: they count bytes, give connections back and close the account of a request.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::life::{Busy, Still};
use crate::telemetry::flags;
use crate::telemetry::record::Account;
use crate::upstream::http1::{self, Http1Error};
use crate::upstream::multiplex::Download;
use crate::upstream::pool::Lease;
use crate::upstream::{ActiveGuard, Endpoint};
use crate::worker::Tuning;

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// hyper's, of the client's connection.
    #[error("{0}")]
    Client(#[source] hyper::Error),
    /// An HTTP/1.1 connection to an upstream.
    #[error("{0}")]
    Http1(#[source] Http1Error),
    /// A stream of a shared connection. The source is h2's error, so that its code is passed on to the other side.
    #[error("{0}")]
    Http2(#[source] h2::Error),
    /// The client reset its stream; what came before is not the whole.
    #[error("the client reset its stream")]
    Cut,
    /// The answer took too long.
    #[error("timeout")]
    Timeout,
}

impl BodyError {
    /// The code with which the other side is told.
    pub fn reason(&self) -> h2::Reason {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if let Some(reason) = error.downcast_ref::<h2::Error>().and_then(h2::Error::reason) {
                return reason;
            }
            cause = error.source();
        }
        h2::Reason::CANCEL
    }
}

/// What the two directions of an exchange tell each other.
#[derive(Default)]
pub struct Progress {
    /// Bytes of the request's body so far.
    pub received: Cell<u64>,
    /// Whether the request's body has been read to its end.
    pub request_done: Cell<bool>,
    /// Whether a byte of the request's body has been read.
    pub body_started: Cell<bool>,
    /// Whether the request's HTTP/2 stream was reset: nobody waits for an answer any more.
    pub lost: Cell<bool>,
    /// Whether a client that is silent for long may still mean it (gRPC streams).
    pub patient: Cell<bool>,
    /// Whether more of the body was asked for and has not come.
    waiting: Cell<bool>,
    /// Bytes received, while there are no more.
    silent: Still,
    starved: Cell<bool>,
    waker: Cell<Option<Waker>>,
}

impl Progress {
    /// Looks at the body; whether it is worth another look. Called by the worker's sweep.
    pub fn sweep(&self, now: std::time::Instant, tuning: &Tuning) -> bool {
        if self.request_done.get() || self.starved.get() {
            return false;
        }
        if !self.waiting.get() {
            self.silent.ends();
            return true;
        }
        let limit = if self.patient.get() {
            tuning.idle_timeout
        } else {
            tuning.body_timeout
        };
        if self.silent.lasts(self.received.get(), now) >= limit {
            self.starved.set(true);
            if let Some(waker) = self.waker.take() {
                waker.wake();
            }
        }
        true
    }

    /// Whether the body stayed away for too long; registers the caller to be woken otherwise.
    pub fn starved(&self, cx: &Context<'_>) -> bool {
        if self.starved.get() {
            return true;
        }
        if !self.request_done.get() {
            self.waker.set(Some(cx.waker().clone()));
        }
        false
    }
}

/// A request's body on its way to the upstream: what has been read already, then the rest.
pub struct RequestBody {
    ahead: VecDeque<Frame<Bytes>>,
    inner: Option<Incoming>,
    /// Whether it is the body of an HTTP/2 stream.
    stream: bool,
    progress: Rc<Progress>,
}

/// How far a body was read ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadAhead {
    /// To its end.
    Whole(Bytes),
    /// More than asked for; these are the first bytes.
    Part(Bytes),
}

impl RequestBody {
    /// Wraps the downstream's body; `stream` says that it comes over HTTP/2.
    pub fn new(inner: Incoming, stream: bool, progress: Rc<Progress>) -> Self {
        if inner.is_end_stream() {
            progress.request_done.set(true);
            return RequestBody {
                ahead: VecDeque::new(),
                inner: None,
                stream,
                progress,
            };
        }
        RequestBody {
            ahead: VecDeque::new(),
            inner: Some(inner),
            stream,
            progress,
        }
    }

    /// A body of our own, for requests that this proxy makes itself.
    pub fn own(bytes: Bytes) -> Self {
        let mut body = RequestBody::empty(Rc::default());
        if !bytes.is_empty() {
            body.ahead.push_back(Frame::data(bytes));
        }
        body
    }

    /// Reads ahead until the end or until more than `limit` bytes are there; `patience` bounds the wait for each piece.
    /// Nothing is lost: what was read goes upstream first.
    ///
    /// # Errors
    /// `None` when the client is silent for too long, the error when the connection breaks.
    pub async fn read_ahead(&mut self, limit: usize, patience: Duration) -> Result<ReadAhead, Option<BodyError>> {
        let mut size = self.ahead.iter().filter_map(Frame::data_ref).map(Bytes::len).sum();
        while size <= limit {
            let next = poll_fn(|cx| self.poll_inner(cx));
            match tokio::time::timeout(patience, next).await {
                Err(_) => return Err(None),
                Ok(None) => return Ok(ReadAhead::Whole(self.front(usize::MAX, size))),
                Ok(Some(Err(error))) => return Err(Some(error)),
                Ok(Some(Ok(frame))) => {
                    size += frame.data_ref().map_or(0, Bytes::len);
                    self.ahead.push_back(frame);
                }
            }
        }
        Ok(ReadAhead::Part(self.front(limit, size)))
    }

    /// A copy of at most `limit` bytes of what was read ahead.
    fn front(&self, limit: usize, size: usize) -> Bytes {
        let mut pieces = self.ahead.iter().filter_map(Frame::data_ref);
        if let (Some(one), None) = (pieces.next(), pieces.next()) {
            return one.slice(..one.len().min(limit));
        }
        let mut out = BytesMut::with_capacity(size.min(limit));
        for piece in self.ahead.iter().filter_map(Frame::data_ref) {
            let room = limit - out.len();
            out.extend_from_slice(&piece[..piece.len().min(room)]);
        }
        out.freeze()
    }

    /// The next frame that has not been read yet.
    fn poll_inner(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(None);
        };
        self.progress.body_started.set(true);
        let polled = Pin::new(&mut *inner).poll_frame(cx);
        self.progress.waiting.set(polled.is_pending());
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.progress
                        .received
                        .set(self.progress.received.get() + data.len() as u64);
                }
                if inner.is_end_stream() {
                    self.progress.request_done.set(true);
                    self.inner = None;
                }
            }
            Poll::Ready(None) => {
                // hyper takes a stream that was reset with CANCEL for one that has ended.
                if self.stream && !inner.is_end_stream() {
                    self.progress.lost.set(true);
                    return Poll::Ready(Some(Err(BodyError::Cut)));
                }
                self.progress.request_done.set(true);
                self.inner = None;
            }
            Poll::Ready(Some(Err(_))) => self.progress.lost.set(self.stream),
            Poll::Pending => {}
        }
        polled.map_err(BodyError::Client)
    }

    /// No body; for repetitions of requests that had none.
    pub fn empty(progress: Rc<Progress>) -> Self {
        progress.request_done.set(true);
        RequestBody {
            ahead: VecDeque::new(),
            inner: None,
            stream: false,
            progress,
        }
    }

    /// Whether there is none, so that the request can be sent again.
    pub fn is_empty(&self) -> bool {
        self.inner.is_none() && self.ahead.is_empty()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(frame) = self.ahead.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        self.poll_inner(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.inner.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint);
        if self.ahead.is_empty() {
            return rest;
        }
        let ahead: u64 = self
            .ahead
            .iter()
            .filter_map(Frame::data_ref)
            .map(|d| d.len() as u64)
            .sum();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(ahead));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(ahead));
        }
        hint
    }
}

/// The connection that an answer is read from.
pub struct Source {
    /// The exchange is counted until here.
    pub active: ActiveGuard,
    /// The connection.
    pub lease: Lease,
    /// Where an HTTP/1.1 connection goes back to.
    pub endpoint: Rc<Endpoint>,
    /// How long it may take.
    pub limits: Option<Box<Limits>>,
}

/// How long an answer may take.
pub struct Limits {
    /// Until its end: the route's timeout is for the whole of it.
    pub end: Option<Pin<Box<Sleep>>>,
    /// Between two pieces.
    pub idle: Option<(Duration, Pin<Box<Sleep>>)>,
}

impl Limits {
    /// None, when there are none.
    pub fn new(end: Option<Instant>, idle_ms: u64) -> Option<Box<Limits>> {
        if end.is_none() && idle_ms == 0 {
            return None;
        }
        let idle = Duration::from_millis(idle_ms);
        Some(Box::new(Limits {
            end: end.map(|at| Box::pin(sleep_until(at))),
            idle: (idle_ms > 0).then(|| (idle, Box::pin(sleep_until(Instant::now() + idle)))),
        }))
    }

    /// The flag of the limit that is over, when nothing came.
    fn over(&mut self, cx: &mut Context<'_>) -> Option<u32> {
        if let Some(end) = &mut self.end
            && end.as_mut().poll(cx).is_ready()
        {
            return Some(flags::UPSTREAM_REQUEST_TIMEOUT);
        }
        let (_, idle) = self.idle.as_mut()?;
        idle.as_mut().poll(cx).is_ready().then_some(flags::STREAM_IDLE_TIMEOUT)
    }

    fn progress(&mut self) {
        if let Some((length, idle)) = &mut self.idle {
            idle.as_mut().reset(Instant::now() + *length);
        }
    }
}

/// A response's body as it comes from the upstream.
pub enum UpstreamBody {
    /// From a connection of its own.
    Http1(http1::Download),
    /// From a shared one.
    Http2(Download),
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            UpstreamBody::Http1(body) => Pin::new(body).poll_frame(cx),
            UpstreamBody::Http2(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            UpstreamBody::Http1(body) => body.is_end_stream(),
            UpstreamBody::Http2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            UpstreamBody::Http1(body) => body.size_hint(),
            UpstreamBody::Http2(body) => body.size_hint(),
        }
    }
}

/// A response's body on its way to the downstream.
pub struct ResponseBody {
    kind: Kind,
    source: Option<Box<Source>>,
    account: Option<Box<Account>>,
    busy: Option<Busy>,
    ended: bool,
    /// An error whose turn comes with the next look.
    failed: Option<BodyError>,
}

enum Kind {
    Empty,
    Full(Bytes),
    Upstream(UpstreamBody),
}

impl ResponseBody {
    /// An own text.
    pub fn full(text: Bytes, account: Box<Account>) -> Self {
        ResponseBody {
            kind: if text.is_empty() { Kind::Empty } else { Kind::Full(text) },
            source: None,
            account: Some(account),
            busy: None,
            ended: false,
            failed: None,
        }
    }

    /// The upstream's body.
    pub fn upstream(inner: UpstreamBody, source: Box<Source>, account: Box<Account>) -> Self {
        ResponseBody {
            kind: Kind::Upstream(inner),
            source: Some(source),
            account: Some(account),
            busy: None,
            ended: false,
            failed: None,
        }
    }

    /// Nothing, for a connection that switches protocols; the account goes with the tunnel.
    pub fn switched() -> Self {
        ResponseBody {
            kind: Kind::Empty,
            source: None,
            account: None,
            busy: None,
            ended: true,
            failed: None,
        }
    }

    /// Keeps the request open until the answer has been sent.
    pub fn hold(&mut self, busy: Busy) {
        self.busy = Some(busy);
    }

    fn finish(&mut self, complete: bool) {
        if let Some(source) = self.source.take() {
            let Source {
                lease,
                endpoint,
                active,
                limits: _,
            } = *source;
            let request_done = self.account.as_ref().is_some_and(|a| a.progress.request_done.get());
            if let Lease::Http1(lease) = lease
                && complete
                && request_done
            {
                endpoint.pool.give_back(lease);
            }
            drop(active);
        }
        if let Some(mut account) = self.account.take() {
            account.finish(complete);
        }
        if complete && let Some(busy) = self.busy.take() {
            busy.complete();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(error) = this.failed.take() {
            return Poll::Ready(Some(Err(error)));
        }
        match &mut this.kind {
            Kind::Empty => {
                this.ended = true;
                Poll::Ready(None)
            }
            Kind::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                if let Some(account) = &mut this.account {
                    account.sent += bytes.len() as u64;
                }
                this.kind = Kind::Empty;
                this.ended = true;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Kind::Upstream(inner) => {
                let polled = Pin::new(&mut *inner).poll_frame(cx);
                let limits = this.source.as_mut().and_then(|s| s.limits.as_mut());
                match &polled {
                    Poll::Ready(Some(Ok(frame))) => {
                        if let Some(limits) = limits {
                            limits.progress();
                        }
                        if let Some(account) = &mut this.account {
                            if let Some(data) = frame.data_ref() {
                                account.sent += data.len() as u64;
                            } else if let Some(trailers) = frame.trailers_ref() {
                                account.grpc_trailers(trailers);
                            }
                        }
                        if inner.is_end_stream() {
                            this.ended = true;
                        }
                    }
                    Poll::Ready(None) => this.ended = true,
                    Poll::Ready(Some(Err(_))) => {
                        if let Some(account) = &mut this.account {
                            account.upstream_reset();
                        }
                    }
                    Poll::Pending => {
                        if let Some(flag) = limits.and_then(|l| l.over(cx)) {
                            if let Some(account) = &mut this.account {
                                account.flags |= flag;
                            }
                            return Poll::Ready(Some(Err(BodyError::Timeout)));
                        }
                    }
                }
                let Poll::Ready(Some(Err(error))) = polled else {
                    return polled;
                };
                // What came before leaves first. The downstream's codec throws away what waits when it is told of an error, the head
                // too if it has only just got it.
                this.failed = Some(error);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Empty => true,
            Kind::Full(_) => false,
            Kind::Upstream(inner) => inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Upstream(inner) => inner.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // Bodies without content (HEAD, 204, 304) are never polled, whatever they hold.
        let complete = self.ended || self.is_end_stream() || matches!(self.kind, Kind::Full(_));
        self.finish(complete);
    }
}
