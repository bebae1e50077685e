//! The resolver's task: takes the schedule's fetches to the network and its updates to the world.
//!
//! Told by the hub which sources rules name, by the watch of RequestAuthentications which are about to be named, and by xDS
//! streams which a proxy has met an unknown key of.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mantlet_runtime::{Counter, Registry};
use mantlet_translate::world::keys::KeySetNeed;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::fetch::{FetchError, Fetcher};
use super::key_set::KeySet;
use super::options::JwksOptions;
use super::schedule::{Row, Schedule, Update, source_of};
use super::{MAX_TIMEOUT, Source};

/// Receives key sets: the hub, or a test.
pub type Sink = Box<dyn Fn(Update) + Send + Sync>;

enum Command {
    Announce {
        needs: Vec<KeySetNeed>,
        settled: oneshot::Sender<()>,
    },
    UnknownKey(String),
    Rows(oneshot::Sender<Vec<Row>>),
}

/// A handle to the resolver; clones share it.
#[derive(Clone)]
pub struct Resolver {
    commands: mpsc::UnboundedSender<Command>,
}

/// The resolver before it runs.
pub struct Task {
    commands: mpsc::UnboundedReceiver<Command>,
    needs: watch::Receiver<Vec<KeySetNeed>>,
    fetcher: Arc<Fetcher>,
    schedule: Schedule,
    sink: Sink,
    success: Counter,
    failure: Counter,
}

impl Resolver {
    /// A resolver of the sources in `needs`, which gives what it finds to `sink`. Run the task.
    pub fn new(
        options: &JwksOptions,
        fetcher: Fetcher,
        needs: watch::Receiver<Vec<KeySetNeed>>,
        registry: &Registry,
        sink: Sink,
    ) -> (Resolver, Task) {
        let (sender, commands) = mpsc::unbounded_channel();
        let counter = |name: &str, help: &str| registry.counter(name, help, &[]).with(&[]);
        let task = Task {
            commands,
            needs,
            fetcher: Arc::new(fetcher),
            schedule: Schedule::new(options.refresh),
            sink,
            success: counter(
                "pilot_jwks_resolver_network_fetch_success_total",
                "Total number of successfully network fetch by pilot jwks resolver",
            ),
            failure: counter(
                "pilot_jwks_resolver_network_fetch_fail_total",
                "Total number of failed network fetch by pilot jwks resolver",
            ),
        };
        (Resolver { commands: sender }, task)
    }

    /// Sources that a rule is about to name. Returns when the first try of each is over, at the latest after the longest of
    /// their timeouts: whoever waits delays only itself.
    pub async fn announce(&self, needs: Vec<KeySetNeed>) {
        let longest = needs.iter().map(|n| n.timeout.min(MAX_TIMEOUT)).max();
        let Some(longest) = longest else { return };
        let (settled, wait) = oneshot::channel();
        if self.commands.send(Command::Announce { needs, settled }).is_ok() {
            // Over in any case: by an answer, by the end of the task, or by time.
            let _ = tokio::time::timeout(longest, wait).await;
        }
    }

    /// A proxy that holds the key set of this name (`jwks/…`) met a token whose key is not in it.
    pub fn unknown_key(&self, held: &str) {
        let _ = self.commands.send(Command::UnknownKey(held.to_string()));
    }

    /// All sources, for the status page.
    pub async fn rows(&self) -> Vec<Row> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Rows(reply));
        answer.await.unwrap_or_default()
    }
}

/// Somebody who waits for first tries.
struct Waiter {
    sources: Vec<Source>,
    settled: oneshot::Sender<()>,
}

impl Task {
    /// Runs until the hub and all handles are gone.
    pub async fn run(mut self) {
        let mut fetches: JoinSet<Result<KeySet, FetchError>> = JoinSet::new();
        let mut running: HashMap<tokio::task::Id, Source> = HashMap::new();
        let mut waiters: Vec<Waiter> = Vec::new();
        let needs = self.needs.borrow_and_update().clone();
        self.schedule.need(&needs, Instant::now());
        loop {
            let now = Instant::now();
            for update in self.schedule.sweep(now) {
                tracing::warn!(target: "jwks", "{}: the keys are dropped, they could not be fetched for too long", update.source);
                (self.sink)(update);
            }
            for job in self.schedule.start(now) {
                let fetcher = self.fetcher.clone();
                let source = job.source.clone();
                let task = fetches.spawn(async move { fetcher.key_set(&job.source, job.timeout).await });
                running.insert(task.id(), source);
            }
            waiters.retain_mut(|waiter| {
                waiter.sources.retain(|source| !self.schedule.settled(source));
                !waiter.settled.is_closed() && !waiter.sources.is_empty()
            });
            let wake = self.schedule.next(now).unwrap_or(now + Duration::from_secs(3600));
            tokio::select! {
                command = self.commands.recv() => match command {
                    None => return,
                    Some(command) => self.command(command, &mut waiters),
                },
                changed = self.needs.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let needs = self.needs.borrow_and_update().clone();
                    self.schedule.need(&needs, Instant::now());
                }
                Some(done) = fetches.join_next_with_id() => {
                    let (id, result) = match done {
                        Ok((id, result)) => (id, result.map_err(|e| e.to_string())),
                        // A fetch is never cancelled; a panic in one must not take the others down.
                        Err(error) => (error.id(), Err(error.to_string())),
                    };
                    if let Some(source) = running.remove(&id) {
                        self.finished(&source, result);
                    }
                }
                () = tokio::time::sleep_until(wake.into()) => {}
            }
        }
    }

    fn command(&mut self, command: Command, waiters: &mut Vec<Waiter>) {
        let now = Instant::now();
        match command {
            Command::Announce { needs, settled } => {
                for need in &needs {
                    self.schedule.announce(need, now);
                }
                waiters.push(Waiter {
                    sources: needs.iter().map(source_of).collect(),
                    settled,
                });
            }
            Command::UnknownKey(held) => self.schedule.unknown_key(&held, now),
            Command::Rows(reply) => {
                let _ = reply.send(self.schedule.rows(now));
            }
        }
    }

    fn finished(&mut self, source: &Source, result: Result<KeySet, String>) {
        let result = match result {
            Ok(keys) => {
                self.success.inc();
                Ok(keys)
            }
            Err(error) => {
                self.failure.inc();
                tracing::warn!(target: "jwks", "{source}: {error}");
                Err(error)
            }
        };
        if let Some(update) = self.schedule.finished(source, result, Instant::now()) {
            tracing::info!(target: "jwks", "{source}: new keys");
            (self.sink)(update);
        }
    }
}

#[cfg(test)]
mod tests;
