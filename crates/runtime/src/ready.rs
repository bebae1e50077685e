//! Readiness as a list of named conditions: ready when none is pending. The names answer "why not yet?".

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// The registry of conditions. Clones share it.
#[derive(Debug, Clone)]
pub struct Readiness {
    pending: Arc<Mutex<BTreeMap<String, usize>>>,
    ready: Arc<watch::Sender<bool>>,
}

/// One pending condition. Dropping it without [`ReadyTask::done`] leaves the process unready: a task that died has not
/// fulfilled its condition.
#[derive(Debug)]
#[must_use = "a condition is pending until done() is called"]
pub struct ReadyTask {
    name: String,
    owner: Readiness,
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    /// An empty registry, which is ready.
    pub fn new() -> Self {
        Self {
            pending: Arc::default(),
            ready: Arc::new(watch::Sender::new(true)),
        }
    }

    /// Adds a condition; the process is not ready until it is done.
    pub fn register(&self, name: impl Into<String>) -> ReadyTask {
        let name = name.into();
        let mut pending = self.lock();
        *pending.entry(name.clone()).or_insert(0) += 1;
        self.ready.send_replace(false);
        drop(pending);
        ReadyTask {
            name,
            owner: self.clone(),
        }
    }

    /// Whether nothing is pending.
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// What is pending, sorted by name.
    pub fn pending(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// Returns once nothing is pending.
    pub async fn ready(&self) {
        let mut receiver = self.ready.subscribe();
        // The sender lives in self, so this cannot fail.
        let _ = receiver.wait_for(|ready| *ready).await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadyTask {
    /// The condition is fulfilled.
    pub fn done(self) {
        let mut pending = self.owner.lock();
        if let Some(count) = pending.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                pending.remove(&self.name);
            }
        }
        let ready = pending.is_empty();
        self.owner.ready.send_replace(ready);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_only_when_all_conditions_are_done() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let xds = readiness.register("xds");
        let first = readiness.register("listener");
        let second = readiness.register("listener");
        assert_eq!(readiness.pending(), ["listener", "xds"]);
        first.done();
        xds.done();
        assert_eq!(readiness.pending(), ["listener"]);
        assert!(!readiness.is_ready());
        let waiter = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        second.done();
        waiter.await.unwrap();
        assert!(readiness.is_ready());
    }

    #[test]
    fn a_task_that_died_keeps_the_process_unready() {
        let readiness = Readiness::new();
        drop(readiness.register("certificate"));
        assert!(!readiness.is_ready());
    }
}
