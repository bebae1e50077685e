//! HTTP connections of one worker to one endpoint.
//!
//! HTTP/1.1 connections are lent to one request at a time and come back when its response has been read; HTTP/2
//! connections are shared. Each connection is driven by a task of this worker.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};

use crate::http::body::RequestBody;
use crate::stream::Stream;
use crate::worker::LocalExec;

/// Most idle HTTP/1.1 connections kept per endpoint and worker.
const MAX_IDLE: usize = 512;
/// How long an unused connection is kept.
const IDLE_TIME: Duration = Duration::from_secs(300);
/// Requests at once on one HTTP/2 connection before another is opened.
const MAX_STREAMS: u32 = 90;
/// Largest HTTP/2 frame that is accepted: four TLS records instead of one, for bulk data.
const MAX_FRAME: u32 = 64 * 1024;
/// Largest head of a response.
const MAX_HEAD: usize = 64 * 1024;

/// A connection lent to one request.
pub enum Lease {
    /// HTTP/1.1.
    Http1(Http1Lease),
    /// HTTP/2.
    Http2(Http2Lease),
}

/// An HTTP/1.1 connection on loan.
pub struct Http1Lease {
    /// The sending half.
    pub sender: http1::SendRequest<RequestBody>,
    /// Whether it has carried a request before: its death may only mean that the peer got tired of it.
    pub reused: bool,
}

/// One stream of an HTTP/2 connection.
pub struct Http2Lease {
    /// The sending half.
    pub sender: http2::SendRequest<RequestBody>,
    /// Whether the connection existed before.
    pub reused: bool,
    streams: Rc<Cell<u32>>,
}

impl Drop for Http2Lease {
    fn drop(&mut self) {
        self.streams.set(self.streams.get().saturating_sub(1));
    }
}

struct Idle {
    sender: http1::SendRequest<RequestBody>,
    since: Instant,
}

struct Shared {
    sender: http2::SendRequest<RequestBody>,
    streams: Rc<Cell<u32>>,
    since: Cell<Instant>,
}

/// The connections.
#[derive(Default)]
pub struct Pool {
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Shared>>,
    closed: Cell<bool>,
}

impl Pool {
    /// An idle HTTP/1.1 connection that the peer has not closed. The newest first, so that the rest can age out.
    pub fn take_http1(&self) -> Option<Http1Lease> {
        loop {
            let idle = self.idle.borrow_mut().pop()?;
            if !idle.sender.is_closed() {
                return Some(Http1Lease {
                    sender: idle.sender,
                    reused: true,
                });
            }
        }
    }

    /// A shared HTTP/2 connection with room.
    pub fn take_http2(&self) -> Option<Http2Lease> {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|s| !s.sender.is_closed());
        let found = shared.iter().find(|s| s.streams.get() < MAX_STREAMS)?;
        found.streams.set(found.streams.get() + 1);
        found.since.set(Instant::now());
        Some(Http2Lease {
            sender: found.sender.clone(),
            reused: true,
            streams: found.streams.clone(),
        })
    }

    /// Takes an HTTP/1.1 connection back after a complete exchange.
    pub fn give_back(&self, lease: Http1Lease) {
        let mut idle = self.idle.borrow_mut();
        if !self.closed.get() && !lease.sender.is_closed() && idle.len() < MAX_IDLE {
            idle.push(Idle {
                sender: lease.sender,
                since: Instant::now(),
            });
        }
    }

    /// Speaks HTTP/1.1 on a new connection.
    ///
    /// # Errors
    /// hyper's.
    pub async fn start_http1(stream: Stream) -> hyper::Result<Http1Lease> {
        let (sender, connection) = http1::Builder::new()
            .max_headers(100)
            .max_buf_size(MAX_HEAD)
            .writev(true)
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::task::spawn_local(async move {
            // Whoever waits for the response gets the error too.
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(target: "upstream", "HTTP/1.1 connection ended: {error}");
            }
        });
        Ok(Http1Lease { sender, reused: false })
    }

    /// Speaks HTTP/2 on a new connection, which others may share from now on.
    ///
    /// # Errors
    /// hyper's.
    pub async fn start_http2(&self, stream: Stream) -> hyper::Result<Http2Lease> {
        let (sender, connection) = http2::Builder::new(LocalExec)
            .timer(TokioTimer::new())
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .max_frame_size(MAX_FRAME)
            .max_send_buf_size(1 << 20)
            .max_header_list_size(MAX_HEAD as u32)
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                tracing::debug!(target: "upstream", "HTTP/2 connection ended: {error}");
            }
        });
        let streams = Rc::new(Cell::new(1));
        if !self.closed.get() {
            self.shared.borrow_mut().push(Shared {
                sender: sender.clone(),
                streams: streams.clone(),
                since: Cell::new(Instant::now()),
            });
        }
        Ok(Http2Lease {
            sender,
            reused: false,
            streams,
        })
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
            .retain(|i| !i.sender.is_closed() && now.duration_since(i.since) < IDLE_TIME);
        self.shared.borrow_mut().retain(|s| {
            !s.sender.is_closed() && (s.streams.get() > 0 || now.duration_since(s.since.get()) < IDLE_TIME)
        });
    }

    /// Lets go of all idle connections, so that new ones are made with the current certificate; those in use finish.
    pub fn renew(&self) {
        self.idle.borrow_mut().clear();
        self.shared.borrow_mut().clear();
    }
}
