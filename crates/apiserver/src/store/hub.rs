//! Fan-out of committed changes to watchers in memory.
//!
//! The writer thread publishes here after a commit; `RedbStore::watch` registers here and replays the log up to the point of
//! registration. A watcher that does not keep up is cut off, never waited for: its client gets 410 and lists again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::mpsc;

use super::{Event, StoreError, first_level};

struct Registered {
    prefix: String,
    tx: mpsc::Sender<Arc<Event>>,
}

#[derive(Default)]
struct State {
    watchers: HashMap<u64, Registered>,
    next_id: u64,
    published: u64,
    levels: HashMap<String, u64>,
}

/// The set of live watchers.
pub(super) struct Hub {
    state: Mutex<State>,
    buffer: usize,
    max_watchers: usize,
}

impl Hub {
    pub(super) fn new(published: u64, buffer: usize, max_watchers: usize) -> Arc<Self> {
        let state = State {
            published,
            ..State::default()
        };
        Arc::new(Self {
            state: Mutex::new(state),
            buffer,
            max_watchers,
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a batch to everyone concerned. Called before the writer acknowledges, so that whoever reads its own write
    /// finds every cache already invalidated.
    pub(super) fn publish(&self, events: &[Arc<Event>]) {
        let mut state = self.lock();
        let state = &mut *state;
        for event in events {
            state.published = event.revision;
            let level = first_level(&event.key);
            match state.levels.get_mut(level) {
                Some(rev) => *rev = event.revision,
                None => {
                    state.levels.insert(level.to_owned(), event.revision);
                }
            }
            // A full buffer drops the sender; the receiver then sees the end of the channel after what it has buffered.
            state
                .watchers
                .retain(|_, w| !event.key.starts_with(&w.prefix) || w.tx.try_send(event.clone()).is_ok());
        }
    }

    pub(super) fn published(&self) -> u64 {
        self.lock().published
    }

    pub(super) fn level(&self, prefix: &str) -> u64 {
        self.lock().levels.get(prefix).copied().unwrap_or(0)
    }

    /// Ends every watch (shutdown).
    pub(super) fn close(&self) {
        self.lock().watchers.clear();
    }

    /// Registers a watcher; changes after the returned revision arrive through it.
    pub(super) fn register(self: &Arc<Self>, prefix: &str) -> Result<(Watcher, u64), StoreError> {
        let mut state = self.lock();
        if state.watchers.len() >= self.max_watchers {
            return Err(StoreError::TooManyWatchers);
        }
        let (tx, rx) = mpsc::channel(self.buffer);
        let id = state.next_id;
        state.next_id += 1;
        state.watchers.insert(
            id,
            Registered {
                prefix: prefix.to_owned(),
                tx,
            },
        );
        let from = state.published;
        Ok((
            Watcher {
                id,
                hub: Arc::downgrade(self),
                rx,
                replay: VecDeque::new(),
                after: from,
            },
            from,
        ))
    }
}

/// A running watch: replayed changes first, live ones after.
pub struct Watcher {
    id: u64,
    hub: Weak<Hub>,
    rx: mpsc::Receiver<Arc<Event>>,
    pub(super) replay: VecDeque<Arc<Event>>,
    /// The revision that the client knows already: it may have read it before it was published.
    pub(super) after: u64,
}

impl Watcher {
    /// The next change; `None` when this watcher was cut off because it was too slow, or the store was closed.
    pub async fn next(&mut self) -> Option<Arc<Event>> {
        if let Some(event) = self.replay.pop_front() {
            return Some(event);
        }
        loop {
            let event = self.rx.recv().await?;
            if event.revision > self.after {
                return Some(event);
            }
        }
    }

    /// The revision up to which nothing is left to deliver, if nothing is pending now: what a bookmark may carry.
    pub fn idle_at(&self) -> Option<u64> {
        let hub = self.hub.upgrade()?;
        let state = hub.lock();
        (self.replay.is_empty() && self.rx.is_empty()).then_some(state.published.max(self.after))
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Some(hub) = self.hub.upgrade() {
            hub.lock().watchers.remove(&self.id);
        }
    }
}
