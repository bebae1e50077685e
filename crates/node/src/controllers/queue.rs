//! A work queue for reconcilers: each key is queued at most once and never worked on twice at the
//! same time; failures are retried with exponential backoff.
//!
//! Informer handlers add keys, [`run`] takes them. The queue does not know what a key stands for.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

const FIRST_RETRY: Duration = Duration::from_millis(5);
const LAST_RETRY: Duration = Duration::from_secs(30);

struct State<K> {
    ready: VecDeque<K>,
    /// In `ready`, or to be queued again when the running worker is done.
    pending: HashSet<K>,
    running: HashSet<K>,
    failures: HashMap<K, u32>,
}

/// See the module's documentation.
pub struct Queue<K> {
    state: Mutex<State<K>>,
    wake: Notify,
}

impl<K: Clone + Eq + Hash + Send + std::fmt::Display + 'static> Queue<K> {
    /// An empty queue.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                ready: VecDeque::new(),
                pending: HashSet::new(),
                running: HashSet::new(),
                failures: HashMap::new(),
            }),
            wake: Notify::new(),
        })
    }

    /// Queues a key unless it is waiting already.
    pub fn add(&self, key: K) {
        let mut state = self.lock();
        if !state.pending.insert(key.clone()) {
            return;
        }
        if !state.running.contains(&key) {
            state.ready.push_back(key);
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Queues a key after a delay.
    pub fn add_after(self: &Arc<Self>, key: K, delay: Duration) {
        let queue = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            queue.add(key);
        });
    }

    async fn take(&self) -> K {
        loop {
            let woken = self.wake.notified();
            {
                let mut state = self.lock();
                if let Some(key) = state.ready.pop_front() {
                    state.pending.remove(&key);
                    state.running.insert(key.clone());
                    if !state.ready.is_empty() {
                        self.wake.notify_one();
                    }
                    return key;
                }
            }
            woken.await;
        }
    }

    fn done(&self, key: &K) {
        let mut state = self.lock();
        state.running.remove(key);
        if state.pending.contains(key) {
            state.ready.push_back(key.clone());
            drop(state);
            self.wake.notify_one();
        }
    }

    fn failed(self: &Arc<Self>, key: K) -> Duration {
        let count = {
            let mut state = self.lock();
            let count = state.failures.entry(key.clone()).or_insert(0);
            *count = count.saturating_add(1);
            *count
        };
        let delay = FIRST_RETRY
            .saturating_mul(1_u32.checked_shl(count.min(16)).unwrap_or(u32::MAX))
            .min(LAST_RETRY);
        self.add_after(key, delay);
        delay
    }

    fn succeeded(&self, key: &K) {
        self.lock().failures.remove(key);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Works the queue with `workers` concurrent reconciles until `stop` is cancelled. `reconcile`
/// may ask for another look after a delay.
pub async fn run<K, F, Fut>(
    name: &'static str,
    queue: Arc<Queue<K>>,
    workers: usize,
    stop: CancellationToken,
    reconcile: F,
) where
    K: Clone + Eq + Hash + Send + Sync + std::fmt::Display + 'static,
    F: Fn(K) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Option<Duration>, super::Error>> + Send,
{
    let reconcile = &reconcile;
    let worker = || {
        let queue = queue.clone();
        async move {
            loop {
                let key = queue.take().await;
                match reconcile(key.clone()).await {
                    Ok(again) => {
                        queue.succeeded(&key);
                        queue.done(&key);
                        if let Some(delay) = again {
                            queue.add_after(key, delay);
                        }
                    }
                    Err(error) => {
                        queue.done(&key);
                        let delay = queue.failed(key.clone());
                        if error.is_conflict() {
                            tracing::debug!(controller = name, %key, %error, ?delay, "will retry");
                        } else {
                            tracing::warn!(controller = name, %key, %error, ?delay, "reconcile failed, will retry");
                        }
                    }
                }
            }
        }
    };
    let workers = futures::future::join_all((0..workers).map(|_| worker()));
    tokio::select! {
        () = stop.cancelled() => {}
        _ = workers => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn a_key_added_while_running_runs_again_but_never_twice_at_once() {
        let queue = Queue::new();
        let stop = CancellationToken::new();
        let runs = Arc::new(AtomicUsize::new(0));
        let active = Arc::new(AtomicUsize::new(0));
        let worker = tokio::spawn(run("test", queue.clone(), 4, stop.clone(), {
            let (runs, active) = (runs.clone(), active.clone());
            move |_key: String| {
                let (runs, active) = (runs.clone(), active.clone());
                async move {
                    assert_eq!(active.fetch_add(1, Ordering::SeqCst), 0);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    active.fetch_sub(1, Ordering::SeqCst);
                    runs.fetch_add(1, Ordering::SeqCst);
                    Ok(None)
                }
            }
        }));
        for _ in 0..5 {
            queue.add("a".to_owned());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        for _ in 0..5 {
            queue.add("a".to_owned());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(runs.load(Ordering::SeqCst), 2);
        stop.cancel();
        worker.await.expect("the worker ends");
    }

    #[tokio::test]
    async fn failures_are_retried_with_growing_delays() {
        let queue = Queue::new();
        let stop = CancellationToken::new();
        let times = Arc::new(Mutex::new(Vec::new()));
        let begin = tokio::time::Instant::now();
        let worker = tokio::spawn(run("test", queue.clone(), 1, stop.clone(), {
            let times = times.clone();
            move |_key: String| {
                let times = times.clone();
                async move {
                    let mut times = times.lock().expect("no panic holds it");
                    times.push(begin.elapsed());
                    if times.len() < 4 {
                        Err(super::super::Error::Invalid("not yet".to_owned()))
                    } else {
                        Ok(None)
                    }
                }
            }
        }));
        queue.add("a".to_owned());
        while times.lock().expect("no panic holds it").len() < 4 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stop.cancel();
        worker.await.expect("the worker ends");
        let times = times.lock().expect("no panic holds it").clone();
        assert_eq!(times.len(), 4);
        let gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps[0] < gaps[1] && gaps[1] < gaps[2], "{gaps:?}");
    }
}
