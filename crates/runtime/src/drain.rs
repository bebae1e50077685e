//! Orderly shutdown: one owner announces it, everyone else watches, and whoever still works holds a guard.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// How far the shutdown has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Normal operation.
    Running,
    /// Finish what has begun, take nothing new.
    Draining,
    /// Time is up: end now.
    Stopping,
}

/// The announcing end. Dropping it means [`Phase::Stopping`] for all watchers.
#[derive(Debug)]
pub struct Drain {
    phase: watch::Sender<Phase>,
    working: mpsc::Receiver<()>,
}

/// The listening end, to be cloned into every task.
#[derive(Debug, Clone)]
pub struct DrainWatch {
    phase: watch::Receiver<Phase>,
    guard: mpsc::Sender<()>,
}

/// Held while work is under way that a shutdown should wait for.
#[derive(Debug)]
pub struct DrainGuard(#[expect(dead_code, reason = "its life is its meaning")] mpsc::Sender<()>);

impl Drain {
    /// A pair of ends.
    pub fn new() -> (Self, DrainWatch) {
        let (phase_tx, phase_rx) = watch::channel(Phase::Running);
        let (guard, working) = mpsc::channel(1);
        (
            Self {
                phase: phase_tx,
                working,
            },
            DrainWatch { phase: phase_rx, guard },
        )
    }

    /// Announces the drain without waiting.
    pub fn announce(&self) {
        self.phase.send_if_modified(|phase| {
            let forward = *phase < Phase::Draining;
            if forward {
                *phase = Phase::Draining;
            }
            forward
        });
    }

    /// Announces the drain and waits until every watcher and guard is gone, at most `limit`; then announces the stop.
    /// Returns whether all work ended in time.
    pub async fn drain(mut self, limit: Duration) -> bool {
        self.announce();
        let ended = tokio::time::timeout(limit, self.working.recv()).await.is_ok();
        self.phase.send_replace(Phase::Stopping);
        ended
    }
}

impl DrainWatch {
    /// Returns once the drain (or the stop) has been announced.
    pub async fn draining(&mut self) {
        self.reached(Phase::Draining).await;
    }

    /// Returns once the stop has been announced.
    pub async fn stopping(&mut self) {
        self.reached(Phase::Stopping).await;
    }

    /// Whether a drain has been announced.
    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining || self.phase.has_changed().is_err()
    }

    /// Keeps the shutdown waiting until dropped. (So does the watch itself: let it go when its task ends.)
    pub fn guard(&self) -> DrainGuard {
        DrainGuard(self.guard.clone())
    }

    async fn reached(&mut self, wanted: Phase) {
        // A dropped announcer ends the wait as a stop does.
        let _ = self.phase.wait_for(|phase| *phase >= wanted).await;
    }
}

/// Returns the name of the first termination signal: SIGTERM (the kubelet's) or SIGINT (a terminal's).
///
/// # Errors
/// When a handler cannot be installed.
pub async fn shutdown_signal() -> std::io::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn waits_for_guards_and_tells_watchers() {
        let (drain, watch) = Drain::new();
        assert!(!watch.is_draining());
        let guard = watch.guard();
        let mut seen = watch.clone();
        drop(watch);
        let worker = tokio::spawn(async move {
            seen.draining().await;
            assert!(seen.is_draining());
            drop(seen);
            drop(guard);
        });
        assert!(drain.drain(Duration::from_secs(10)).await);
        worker.await.unwrap();
    }

    #[tokio::test]
    async fn gives_up_after_the_limit_and_stops() {
        let (drain, mut watch) = Drain::new();
        let _guard = watch.guard();
        assert!(!drain.drain(Duration::from_millis(20)).await);
        watch.stopping().await;
    }

    #[tokio::test]
    async fn a_vanished_owner_counts_as_a_stop() {
        let (drain, mut watch) = Drain::new();
        drop(drain);
        watch.stopping().await;
        assert!(watch.is_draining());
    }
}
