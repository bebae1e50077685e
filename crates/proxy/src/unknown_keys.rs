//! Tells the control plane that a token of an unknown key was met: it fetches the issuer's key set anew, and a rotation is
//! noticed by its first token instead of at the next regular fetch.
//!
//! The request function calls [`UnknownKeys::report`] with the name of the key set that it holds (`mantlet_identity::jws::key_set_name`); the
//! xDS subscription passes the names on. Tokens come from strangers, so a name is passed on at most once per [`PAUSE`], the
//! number of names and the queue are bounded, and nobody waits.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

/// Least time between two reports of one key set. The control plane has a limit of its own for all proxies together.
pub const PAUSE: Duration = Duration::from_secs(5);
/// Most key sets that are remembered.
const MAX_NAMES: usize = 1024;
/// Reports that may wait for the stream.
const QUEUE: usize = 64;

/// Reports of unknown keys.
pub struct UnknownKeys {
    last: Mutex<HashMap<String, Instant>>,
    sender: mpsc::Sender<String>,
    receiver: Mutex<Option<mpsc::Receiver<String>>>,
}

impl Default for UnknownKeys {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        UnknownKeys {
            last: Mutex::default(),
            sender,
            receiver: Mutex::new(Some(receiver)),
        }
    }
}

impl UnknownKeys {
    /// A token is of a key that is not in the held key set of this name (`jwks/…`).
    pub fn report(&self, held: &str) {
        self.report_at(held, Instant::now());
    }

    fn report_at(&self, held: &str, now: Instant) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.get(held).is_some_and(|at| now < *at + PAUSE) {
            return;
        }
        if last.len() >= MAX_NAMES {
            last.retain(|_, at| now < *at + PAUSE);
            if last.len() >= MAX_NAMES {
                return;
            }
        }
        // A full queue means that there is no stream, or a slow one: then this report is lost, and a later one counts.
        if self.sender.try_send(held.to_string()).is_ok() {
            last.insert(held.to_string(), now);
        }
    }

    /// The names, for the one subscription; `None` the second time.
    pub fn take(&self) -> Option<mpsc::Receiver<String>> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_report_per_pause_and_key_set() {
        let reports = UnknownKeys::default();
        let mut names = reports.take().unwrap();
        assert!(reports.take().is_none());
        let start = Instant::now();
        for _ in 0..10_000 {
            reports.report_at("jwks/a", start);
            reports.report_at("jwks/b", start);
        }
        assert_eq!(names.try_recv().unwrap(), "jwks/a");
        assert_eq!(names.try_recv().unwrap(), "jwks/b");
        assert!(names.try_recv().is_err());
        reports.report_at("jwks/a", start + PAUSE);
        assert_eq!(names.try_recv().unwrap(), "jwks/a");
    }

    #[test]
    fn names_and_queue_are_bounded() {
        let reports = UnknownKeys::default();
        let mut names = reports.take().unwrap();
        let start = Instant::now();
        for n in 0..10_000 {
            reports.report_at(&format!("jwks/{n}"), start);
        }
        let mut count = 0;
        while names.try_recv().is_ok() {
            count += 1;
        }
        assert_eq!(count, QUEUE);
        // What did not fit is not forgotten for a pause: it may come again at once.
        reports.report_at("jwks/9999", start);
        assert_eq!(names.try_recv().unwrap(), "jwks/9999");
    }
}
