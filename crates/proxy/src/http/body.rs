//! Bodies on their way: they count bytes, give connections back and close the account of a request.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, Incoming, SizeHint};

use crate::telemetry::record::Account;
use crate::upstream::pool::{Http1Lease, Http2Lease};
use crate::upstream::{ActiveGuard, Endpoint};

/// What the two directions of an exchange tell each other.
#[derive(Default)]
pub struct Progress {
    /// Bytes of the request's body so far.
    pub received: Cell<u64>,
    /// Whether the request's body has been read to its end.
    pub request_done: Cell<bool>,
    /// Whether a byte of the request's body has been read.
    pub body_started: Cell<bool>,
}

/// A request's body on its way to the upstream: what has been read already, then the rest.
pub struct RequestBody {
    ahead: VecDeque<Frame<Bytes>>,
    inner: Option<Incoming>,
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
    /// Wraps the downstream's body.
    pub fn new(inner: Incoming, progress: Rc<Progress>) -> Self {
        if inner.is_end_stream() {
            progress.request_done.set(true);
            return RequestBody {
                ahead: VecDeque::new(),
                inner: None,
                progress,
            };
        }
        RequestBody {
            ahead: VecDeque::new(),
            inner: Some(inner),
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
    /// `None` when the client is silent for too long, hyper's error when the connection breaks.
    pub async fn read_ahead(&mut self, limit: usize, patience: Duration) -> Result<ReadAhead, Option<hyper::Error>> {
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
    fn poll_inner(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(inner) = &mut self.inner else {
            return Poll::Ready(None);
        };
        self.progress.body_started.set(true);
        let polled = Pin::new(&mut *inner).poll_frame(cx);
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
                self.progress.request_done.set(true);
                self.inner = None;
            }
            _ => {}
        }
        polled
    }

    /// No body; for repetitions of requests that had none.
    pub fn empty(progress: Rc<Progress>) -> Self {
        progress.request_done.set(true);
        RequestBody {
            ahead: VecDeque::new(),
            inner: None,
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
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
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
    pub lease: SourceLease,
    /// Where an HTTP/1.1 connection goes back to.
    pub endpoint: Rc<Endpoint>,
}

/// A lease, as far as it matters while the answer is read.
pub enum SourceLease {
    /// To be given back.
    Http1(Http1Lease),
    /// Ends by itself.
    Http2(Http2Lease),
}

/// A response's body on its way to the downstream.
pub struct ResponseBody {
    kind: Kind,
    source: Option<Box<Source>>,
    account: Option<Box<Account>>,
    ended: bool,
}

enum Kind {
    Empty,
    Full(Bytes),
    Upstream(Incoming),
}

impl ResponseBody {
    /// An own text.
    pub fn full(text: Bytes, account: Box<Account>) -> Self {
        ResponseBody {
            kind: if text.is_empty() { Kind::Empty } else { Kind::Full(text) },
            source: None,
            account: Some(account),
            ended: false,
        }
    }

    /// The upstream's body.
    pub fn upstream(inner: Incoming, source: Box<Source>, account: Box<Account>) -> Self {
        ResponseBody {
            kind: Kind::Upstream(inner),
            source: Some(source),
            account: Some(account),
            ended: false,
        }
    }

    /// Nothing, for a connection that switches protocols; the account goes with the tunnel.
    pub fn switched() -> Self {
        ResponseBody {
            kind: Kind::Empty,
            source: None,
            account: None,
            ended: true,
        }
    }

    fn finish(&mut self, complete: bool) {
        if let Some(source) = self.source.take() {
            let Source {
                lease,
                endpoint,
                active,
            } = *source;
            let request_done = self.account.as_ref().is_some_and(|a| a.progress.request_done.get());
            if let SourceLease::Http1(lease) = lease
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
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
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
                match &polled {
                    Poll::Ready(Some(Ok(frame))) => {
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
                    Poll::Pending => {}
                }
                polled
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
