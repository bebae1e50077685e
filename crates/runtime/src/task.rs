//! Bounded tasks: a limit on how many run at once, and a way to notice that one which should run for ever has ended.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;

/// Admits at most a fixed number of concurrent tasks. Clones share the limit.
#[derive(Debug, Clone)]
pub struct Limit {
    semaphore: Arc<Semaphore>,
    max: usize,
}

impl Limit {
    /// At most `max` at once.
    pub fn new(max: usize) -> Self {
        Self {
            semaphore: Arc::new(Semaphore::new(max)),
            max,
        }
    }

    /// A place if one is free now. Load that cannot be taken is refused, not queued without bound.
    pub fn try_enter(&self) -> Option<OwnedSemaphorePermit> {
        self.semaphore.clone().try_acquire_owned().ok()
    }

    /// A place, waiting for one.
    pub async fn enter(&self) -> Option<OwnedSemaphorePermit> {
        self.semaphore.clone().acquire_owned().await.ok()
    }

    /// How many places are taken.
    pub fn in_use(&self) -> usize {
        self.max - self.semaphore.available_permits()
    }

    /// Runs `future` as a task if a place is free; gives the future back otherwise.
    pub fn try_spawn<F>(&self, future: F) -> Result<JoinHandle<F::Output>, F>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        match self.try_enter() {
            Some(permit) => Ok(tokio::spawn(async move {
                let output = future.await;
                drop(permit);
                output
            })),
            None => Err(future),
        }
    }
}

/// Spawns a task that should never end; its end or panic is logged as an error under the scope `runtime`.
pub fn spawn_forever<F>(name: &'static str, future: F) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        let inner = tokio::spawn(future);
        // Aborting the outer task must not leave the inner one behind.
        let guard = AbortOnDrop(inner.abort_handle());
        match inner.await {
            Ok(()) => tracing::error!(target: "runtime", "task {name} ended"),
            Err(error) if error.is_panic() => tracing::error!(target: "runtime", "task {name} panicked: {error}"),
            Err(_) => {}
        }
        drop(guard);
    })
}

/// Ends a task when dropped.
#[derive(Debug)]
pub struct AbortOnDrop(pub tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn refuses_beyond_the_limit_and_frees_places() {
        let limit = Limit::new(1);
        let (tx, rx) = tokio::sync::oneshot::channel::<()>();
        let first = limit
            .try_spawn(async move {
                let _ = rx.await;
            })
            .unwrap_or_else(|_| panic!("a place was free"));
        assert_eq!(limit.in_use(), 1);
        assert!(limit.try_spawn(async {}).is_err());
        tx.send(()).unwrap();
        first.await.unwrap();
        assert_eq!(limit.in_use(), 0);
    }

    #[tokio::test]
    async fn aborting_the_guardian_ends_the_task() {
        struct Tell(Option<tokio::sync::oneshot::Sender<()>>);
        impl Drop for Tell {
            fn drop(&mut self) {
                if let Some(tx) = self.0.take() {
                    let _ = tx.send(());
                }
            }
        }
        let (started, has_started) = tokio::sync::oneshot::channel();
        let (tx, rx) = tokio::sync::oneshot::channel();
        let handle = spawn_forever("test", async move {
            let _tell = Tell(Some(tx));
            let _ = started.send(());
            std::future::pending::<()>().await;
        });
        has_started.await.unwrap();
        handle.abort();
        rx.await.unwrap();
    }
}
