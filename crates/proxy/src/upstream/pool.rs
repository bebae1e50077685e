//! HTTP connections of one worker to one endpoint.
//!
//! HTTP/1.1 connections are lent to one request at a time and come back when its response has been read; HTTP/2
//! connections are shared, and each is driven by a task of this worker.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use h2::Reason;
use http::{Request, Response};

use super::http1::{self, Http1Error, Http1Lease};
pub use super::multiplex::Http2Lease;
use super::multiplex::{self, Opener, Opening, Shared};
use crate::http::body::{BodyError, RequestBody, UpstreamBody};
use crate::stream::Stream;

/// Most idle HTTP/1.1 connections kept per endpoint and worker.
const MAX_IDLE: usize = 512;
/// How long an unused connection is kept.
const IDLE_TIME: Duration = Duration::from_secs(300);

/// A connection lent to one request.
pub enum Lease {
    /// HTTP/1.1.
    Http1(Http1Lease),
    /// HTTP/2.
    Http2(Http2Lease),
}

/// Why a request got no response.
pub struct Unanswered {
    /// What the connection's codec says.
    pub error: BodyError,
    /// The request, if no byte of it has left.
    pub back: Option<Request<RequestBody>>,
}

impl Unanswered {
    /// Whether the peer said that it has not looked at the request: it may be sent again (RFC 9113 section 8.7).
    pub fn refused(&self) -> bool {
        match &self.error {
            BodyError::Http2(error) => {
                error.reason() == Some(Reason::REFUSED_STREAM) || (error.is_go_away() && error.is_remote())
            }
            _ => false,
        }
    }

    /// Whether the peer's answer is no HTTP.
    pub fn is_garbled(&self) -> bool {
        matches!(&self.error, BodyError::Http1(Http1Error::Garbled(_)))
    }
}

impl Lease {
    /// Sends a request, which speaks the connection's version, and waits for the head of the response. The lease has to be kept
    /// until the body has been read.
    ///
    /// # Errors
    /// See [`Unanswered`].
    pub async fn send(&self, request: Request<RequestBody>) -> Result<Response<UpstreamBody>, Box<Unanswered>> {
        match self {
            Lease::Http1(lease) => {
                let response = http1::exchange(lease, request).await?;
                Ok(response.map(UpstreamBody::Http1))
            }
            Lease::Http2(lease) => {
                let response = multiplex::exchange(lease, request).await?;
                Ok(response.map(UpstreamBody::Http2))
            }
        }
    }

    /// Whether the connection has carried requests before.
    pub fn reused(&self) -> bool {
        match self {
            Lease::Http1(lease) => lease.reused,
            Lease::Http2(lease) => lease.reused,
        }
    }

    /// This end's address.
    pub fn local(&self) -> Option<SocketAddr> {
        match self {
            Lease::Http1(lease) => lease.local,
            Lease::Http2(lease) => lease.local(),
        }
    }
}

struct Idle {
    lease: Http1Lease,
    since: Instant,
}

/// The connections.
#[derive(Default)]
pub struct Pool {
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Rc<Shared>>>,
    opening: RefCell<Option<Rc<Opening>>>,
    closed: Cell<bool>,
}

/// What a request for an HTTP/2 connection has to do.
pub enum Wanted {
    /// Nothing: here it is.
    Lease(Http2Lease),
    /// Wait for another request that opens one.
    Wait(Rc<Opening>),
    /// Open one; others wait.
    Open(Opener),
}

impl Pool {
    /// An idle HTTP/1.1 connection that the peer has not closed. The newest first, so that the rest can age out.
    pub fn take_http1(&self) -> Option<Http1Lease> {
        loop {
            let idle = self.idle.borrow_mut().pop()?;
            if idle.lease.is_alive() {
                return Some(idle.lease);
            }
        }
    }

    /// A shared HTTP/2 connection with room, or what to do to get one. Requests that come while one is being opened wait for
    /// it, instead of opening one each.
    pub fn want_http2(&self) -> Wanted {
        let mut shared = self.shared.borrow_mut();
        if let Some(found) = shared.iter().find(|s| s.has_room()) {
            return Wanted::Lease(found.lease());
        }
        shared.retain(|s| !s.is_closed());
        let mut opening = self.opening.borrow_mut();
        if let Some(other) = opening.as_ref().filter(|o| !o.is_done()) {
            return Wanted::Wait(other.clone());
        }
        let mine = Rc::new(Opening::default());
        *opening = Some(mine.clone());
        Wanted::Open(Opener(mine))
    }

    /// Takes an HTTP/1.1 connection back after a complete exchange.
    pub fn give_back(&self, mut lease: Http1Lease) {
        let mut idle = self.idle.borrow_mut();
        if lease.rest() && !self.closed.get() && idle.len() < MAX_IDLE {
            lease.reused = true;
            idle.push(Idle {
                lease,
                since: Instant::now(),
            });
        }
    }

    /// Speaks HTTP/2 on a new connection, which others may share from now on.
    ///
    /// # Errors
    /// h2's.
    pub async fn start_http2(&self, stream: Stream) -> Result<Http2Lease, h2::Error> {
        let shared = Shared::start(stream).await?;
        let lease = shared.lease();
        if !self.closed.get() {
            self.shared.borrow_mut().push(shared);
        }
        Ok(lease)
    }

    /// Lets go of every unused connection and keeps none from now on.
    pub fn close(&self) {
        self.closed.set(true);
        self.idle.borrow_mut().clear();
        self.shared.borrow_mut().clear();
    }

    /// Lets go of connections that nobody has used for long, or that are dead.
    pub fn reap(&self) {
        let now = Instant::now();
        self.idle
            .borrow_mut()
            .retain(|i| now.duration_since(i.since) < IDLE_TIME && i.lease.is_alive());
        self.shared.borrow_mut().retain(|s| {
            let (streams, since) = s.usage();
            !s.is_closed() && (streams > 0 || now.duration_since(since) < IDLE_TIME)
        });
    }

    /// Lets go of all idle connections, so that new ones are made with the current certificate; those in use finish.
    pub fn renew(&self) {
        self.idle.borrow_mut().clear();
        self.shared.borrow_mut().clear();
    }
}
