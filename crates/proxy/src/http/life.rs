//! The life of a downstream HTTP connection: what it has begun and not finished, when it was last of use, and how many of
//! its streams the client gave up. The worker's sweep asks now and then, so that no request pays for a timer.
//!
//! It bounds slow clients (threat 73) and rapid resets (threats 56, 57); it knows nothing of what is in a request.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::body::Progress;
use super::framing::{SharedFollower, follow};
use super::meter::Meter;
use crate::connection::Downstream;
use crate::worker::Tuning;

/// A stream that its client gives up sooner than this was never meant (Envoy's bound too).
const PREMATURE: Duration = Duration::from_secs(1);

/// Follows the bytes of a connection.
enum Reader {
    None,
    Http1(SharedFollower),
    Http2(Rc<RefCell<Meter>>),
}

/// Since when something has not changed, as far as sweeps have seen.
#[derive(Default)]
pub(super) struct Still(Cell<Option<(u64, Instant)>>);

impl Still {
    /// For how long `value` has been what it is now.
    pub(super) fn lasts(&self, value: u64, now: Instant) -> Duration {
        let since = match self.0.get() {
            Some((same, since)) if same == value => since,
            _ => now,
        };
        self.0.set(Some((value, since)));
        now.duration_since(since)
    }

    /// Begins anew.
    pub(super) fn ends(&self) {
        self.0.set(None);
    }
}

/// What is known of a connection's life.
pub struct Life {
    reader: RefCell<Reader>,
    /// Requests that are not answered to their end.
    busy: Cell<u32>,
    /// Requests so far, and how many of them the client gave up at once.
    streams: Cell<u64>,
    given_up: Cell<u64>,
    /// What is begun and not finished.
    begun: Still,
    idle: Still,
    bodies: RefCell<Vec<Weak<Progress>>>,
}

impl Default for Life {
    fn default() -> Self {
        Life {
            reader: RefCell::new(Reader::None),
            busy: Cell::new(0),
            streams: Cell::new(0),
            given_up: Cell::new(0),
            begun: Still::default(),
            idle: Still::default(),
            bodies: RefCell::default(),
        }
    }
}

/// What a sweep wants of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// To go on.
    Stay,
    /// To finish what it does.
    Finish,
    /// To end.
    End,
}

impl Life {
    /// From now on the connection speaks HTTP/1.1.
    pub fn http1(&self, follower: SharedFollower) {
        *self.reader.borrow_mut() = Reader::Http1(follower);
    }

    /// From now on the connection speaks HTTP/2.
    pub fn http2(&self, meter: Rc<RefCell<Meter>>) {
        *self.reader.borrow_mut() = Reader::Http2(meter);
    }

    /// Remembers a request whose body is still to come.
    pub fn expect(&self, body: &Rc<Progress>) {
        let mut bodies = self.bodies.borrow_mut();
        // Amortised: the list is swept whenever it has doubled.
        if bodies.len() >= 16 && bodies.len() >= 2 * self.busy.get() as usize {
            bodies.retain(|b| b.strong_count() > 0);
        }
        bodies.push(Rc::downgrade(body));
    }

    fn unfinished(&self) -> Option<u64> {
        match &*self.reader.borrow() {
            Reader::None => None,
            Reader::Http1(follower) => follow(follower).unfinished(),
            Reader::Http2(meter) => meter.borrow().unfinished(),
        }
    }

    /// Looks at the connection. `full` says that the worker has no room for another one.
    pub fn sweep(&self, now: Instant, tuning: &Tuning, full: bool) -> Fate {
        if matches!(*self.reader.borrow(), Reader::None) {
            return Fate::Stay;
        }
        self.bodies.borrow_mut().retain(|body| match body.upgrade() {
            None => false,
            Some(body) => body.sweep(now, tuning),
        });
        let busy = self.busy.get() > 0;
        match self.unfinished() {
            // Requests that come while others are answered may have to wait for them.
            Some(number) if !busy || self.speaks_http2() => {
                self.idle.ends();
                if self.begun.lasts(number, now) >= tuning.header_timeout {
                    return Fate::End;
                }
                return Fate::Stay;
            }
            _ => self.begun.ends(),
        }
        if busy {
            self.idle.ends();
            return Fate::Stay;
        }
        let limit = if full {
            tuning.header_timeout
        } else {
            tuning.idle_timeout
        };
        if self.idle.lasts(0, now) >= limit {
            return Fate::Finish;
        }
        Fate::Stay
    }

    fn speaks_http2(&self) -> bool {
        matches!(*self.reader.borrow(), Reader::Http2(_))
    }
}

/// Held while a request is answered.
pub struct Busy {
    downstream: Rc<Downstream>,
    started: Option<Instant>,
}

impl Busy {
    /// Begins a request.
    pub fn begin(downstream: &Rc<Downstream>) -> Self {
        let life = &downstream.life;
        life.busy.set(life.busy.get() + 1);
        life.streams.set(life.streams.get() + 1);
        Busy {
            downstream: downstream.clone(),
            started: life.speaks_http2().then(Instant::now),
        }
    }

    /// The answer was sent to its end.
    pub fn complete(mut self) {
        self.started = None;
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let life = &self.downstream.life;
        life.busy.set(life.busy.get().saturating_sub(1));
        if self.started.is_none_or(|started| started.elapsed() >= PREMATURE) {
            return;
        }
        // As Envoy's overload.premature_reset: beyond so many streams, most must have been meant.
        let given_up = life.given_up.get() + 1;
        life.given_up.set(given_up);
        let limit = self.downstream.worker.shared.tuning.max_given_up;
        if life.streams.get() >= limit && 2 * given_up > life.streams.get() {
            self.downstream.control.abort();
        }
    }
}

/// The outcome of `work`, or nothing when the request's body stays away for too long.
pub async fn unless_starved<T>(progress: &Progress, work: impl Future<Output = T>) -> Option<T> {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|cx: &mut Context<'_>| match work.as_mut().poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending if progress.starved(cx) => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    })
    .await
}
