//! Workers: one thread, one runtime, own accept queues, connections and counters.
//!
//! `Shared` is what all threads read; it is written only when configuration, secrets or the process's phase change.
//! A `Worker` is everything that belongs to one thread; nothing in it is locked.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mantlet_net::sockopt::{ListenOptions, listen_tcp};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::watch;

use crate::config::Config;
use crate::connection;
use crate::on_demand::OnDemand;
use crate::secrets::{Secrets, TlsCache};
use crate::telemetry::{Telemetry, WorkerTelemetry};
use crate::unknown_keys::UnknownKeys;
use crate::upstream::Upstreams;

/// How often unused upstream connections are looked for, and at least how often slow downstream ones.
const REAP: Duration = Duration::from_secs(10);

/// Where a captured connection was going. The kernel's answer in production; a constructor argument, so that tests can
/// run without a network namespace.
pub type DestinationOf = Arc<dyn Fn(&TcpStream) -> io::Result<SocketAddr> + Send + Sync>;

/// Bounds and times of the data path.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Threads.
    pub workers: usize,
    /// Time for a TLS handshake.
    pub handshake_timeout: Duration,
    /// Time for the head of a request on a connection (slow header attack).
    pub header_timeout: Duration,
    /// Time in which more of a request's body must come while its answer is waited for; an hour for gRPC.
    pub body_timeout: Duration,
    /// How long an HTTP connection may do nothing (Envoy's hour).
    pub idle_timeout: Duration,
    /// Downstream connections per worker; more wait in the kernel until one ends.
    pub max_connections: usize,
    /// Streams at once on one HTTP/2 connection.
    pub max_streams: u32,
    /// Streams of one HTTP/2 connection that the client may reset before they are looked at.
    pub max_pending_resets: usize,
    /// Streams of one HTTP/2 connection that this end had to reset for the client's faults.
    pub max_provoked_resets: usize,
    /// Streams of one HTTP/2 connection after which it ends if the client gave up most within a second.
    pub max_given_up: u64,
    /// HTTP/2 frames without content by which a client may be ahead of its requests, their answers and the time.
    pub max_empty_frames: u64,
    /// How often HTTP/2 clients are asked whether they are still there.
    pub ping_interval: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            workers: std::thread::available_parallelism().map_or(1, |n| n.get()),
            handshake_timeout: Duration::from_secs(15),
            header_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(300),
            idle_timeout: Duration::from_secs(3600),
            max_connections: 8192,
            max_streams: 1024,
            max_pending_resets: 100,
            max_provoked_resets: 256,
            max_given_up: 500,
            max_empty_frames: 4096,
            ping_interval: Duration::from_secs(300),
        }
    }
}

/// Descriptors for everything but connections: sockets that listen, files, the control plane, the process's own servers.
const OTHER_DESCRIPTORS: u64 = 256;

impl Tuning {
    /// Bounds the connections of the workers so that `descriptors` suffice for each with one to its destination. Without
    /// that, peers who only open connections would take the descriptors that the requests of all others need.
    #[must_use]
    pub fn within_descriptors(mut self, descriptors: u64) -> Self {
        let each = descriptors.saturating_sub(OTHER_DESCRIPTORS) / (2 * self.workers.max(1) as u64);
        self.max_connections = self
            .max_connections
            .min(usize::try_from(each).unwrap_or(usize::MAX))
            .max(1);
        self
    }
}

/// How far the process is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Normal operation.
    Running,
    /// Finish what there is: answers carry `Connection: close`, HTTP/2 peers get GOAWAY.
    Draining,
    /// End.
    Stopping,
}

/// Read by all threads.
pub struct Shared {
    /// The configuration in force.
    pub config: ArcSwap<Config>,
    /// Woken with the version after each swap.
    config_version: watch::Sender<u64>,
    /// Version that each worker runs, and how many of its sockets could not be opened.
    applied: Mutex<HashMap<usize, (u64, usize)>>,
    /// Woken when a worker has taken a configuration over.
    applied_changed: watch::Sender<()>,
    /// Certificates and roots.
    pub secrets: Secrets,
    /// Tokens whose keys are not known.
    pub unknown_keys: UnknownKeys,
    /// Destinations whose configuration is not here.
    pub on_demand: OnDemand,
    /// Metrics, access log, denials.
    pub telemetry: Telemetry,
    /// Original destination.
    pub destination_of: DestinationOf,
    /// Bounds.
    pub tuning: Tuning,
    /// Way out.
    phase: watch::Sender<Phase>,
    quit: tokio::sync::Notify,
    /// Downstream connections open.
    connections: AtomicUsize,
    /// Requests and connections accepted since the start, for the admin pages.
    pub accepted: AtomicU64,
}

impl Shared {
    /// The state before the first configuration.
    pub fn new(tuning: Tuning, destination_of: DestinationOf, telemetry: Telemetry) -> Arc<Self> {
        Arc::new(Shared {
            config: ArcSwap::default(),
            config_version: watch::Sender::new(0),
            applied: Mutex::default(),
            applied_changed: watch::Sender::new(()),
            secrets: Secrets::default(),
            unknown_keys: UnknownKeys::default(),
            on_demand: OnDemand::default(),
            telemetry,
            destination_of,
            tuning,
            phase: watch::Sender::new(Phase::Running),
            quit: tokio::sync::Notify::new(),
            connections: AtomicUsize::new(0),
            accepted: AtomicU64::new(0),
        })
    }

    /// Puts a compiled configuration in force.
    pub fn apply(&self, config: Config) {
        let version = config.version;
        self.config.store(Arc::new(config));
        self.config_version.send_replace(version);
    }

    /// Returns once every worker runs at least this version. The result says how many sockets could not be opened.
    pub async fn applied(&self, version: u64) -> usize {
        let mut changed = self.applied_changed.subscribe();
        loop {
            {
                let applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
                if applied.len() == self.tuning.workers && applied.values().all(|(v, _)| *v >= version) {
                    return applied.values().map(|(_, failed)| *failed).sum();
                }
            }
            if changed.changed().await.is_err() {
                return 0;
            }
        }
    }

    /// Moves the process on.
    pub fn set_phase(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let forward = *now < phase;
            if forward {
                *now = phase;
            }
            forward
        });
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Downstream connections open now.
    pub fn active_connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Asks the process to end, as a signal would.
    pub fn request_quit(&self) {
        self.quit.notify_one();
    }

    /// Returns once somebody asked the process to end.
    pub async fn quit(&self) {
        self.quit.notified().await;
    }

    /// Starts the worker threads.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start(self: &Arc<Self>) -> io::Result<Vec<std::thread::JoinHandle<()>>> {
        (0..self.tuning.workers)
            .map(|id| {
                let shared = self.clone();
                std::thread::Builder::new().name(format!("worker-{id}")).spawn(move || {
                    match Builder::new_current_thread()
                        .enable_all()
                        .build_local(LocalOptions::default())
                    {
                        Ok(runtime) => runtime.block_on(Worker::run(shared, id)),
                        Err(error) => tracing::error!(target: "worker", "worker {id} cannot start: {error}"),
                    }
                })
            })
            .collect()
    }
}

/// Runs futures on the worker's own thread; hyper wants it for HTTP/2.
#[derive(Clone, Copy, Debug)]
pub struct LocalExec;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExec {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// Tells one connection to come to an end.
#[derive(Default)]
pub struct Control {
    close: Cell<bool>,
    abort: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Control {
    /// Asks the connection to finish what it does and to close.
    pub fn close(&self) {
        self.close.set(true);
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Asks the connection to end, whatever it does.
    pub fn abort(&self) {
        self.abort.set(true);
        self.close();
    }

    /// Whether it was asked to end at once.
    pub fn aborted(&self) -> bool {
        self.abort.get()
    }

    /// Whether it was asked to; registers the caller to be woken otherwise.
    pub fn poll(&self, cx: &Context<'_>) -> bool {
        if self.close.get() {
            return true;
        }
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        false
    }
}

/// What a worker can do to a live connection when the world changes.
pub trait Connection {
    /// Looks at the new configuration or phase.
    fn changed(&self, phase: Phase);

    /// Looks whether it is slow or idle for too long. `full` says that the worker has no room for another one.
    fn sweep(&self, now: Instant, full: bool);
}

/// One thread's state.
pub struct Worker {
    /// Number of the thread.
    pub id: usize,
    /// What all threads read.
    pub shared: Arc<Shared>,
    #[expect(
        clippy::redundant_allocation,
        reason = "cloning the Rc writes to this thread's memory only, cloning the Arc to everybody's"
    )]
    config: RefCell<Rc<Arc<Config>>>,
    /// Verified tokens.
    pub tokens: RefCell<crate::http::jwt::Cache>,
    /// TLS configurations.
    pub tls: RefCell<TlsCache>,
    /// Clusters.
    pub upstreams: Upstreams,
    /// Counters.
    pub telemetry: WorkerTelemetry,
    connections: RefCell<Vec<Weak<dyn Connection>>>,
    open: Cell<usize>,
    /// Woken when a full worker has room again.
    room: tokio::sync::Notify,
    /// Woken when a configuration has been taken over.
    pub taken_over: tokio::sync::Notify,
    phase: Cell<Phase>,
    listeners: RefCell<HashMap<SocketAddr, (String, tokio::task::AbortHandle)>>,
    failed: Cell<usize>,
}

/// Counts a downstream connection while it lives.
pub struct OpenGuard(Rc<Worker>);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        if self.0.is_full() {
            self.0.room.notify_waiters();
        }
        self.0.open.set(self.0.open.get() - 1);
        self.0.shared.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Worker {
    async fn run(shared: Arc<Shared>, id: usize) {
        let mut version = shared.config_version.subscribe();
        let mut phase = shared.phase.subscribe();
        let mut secrets = shared.secrets.subscribe();
        let worker = Rc::new(Worker {
            id,
            config: RefCell::new(Rc::new(shared.config.load_full())),
            tokens: RefCell::default(),
            tls: RefCell::default(),
            upstreams: Upstreams::default(),
            telemetry: WorkerTelemetry::new(&shared.telemetry),
            connections: RefCell::default(),
            open: Cell::new(0),
            room: tokio::sync::Notify::new(),
            taken_over: tokio::sync::Notify::new(),
            phase: Cell::new(Phase::Running),
            listeners: RefCell::default(),
            failed: Cell::new(0),
            shared,
        });
        version.mark_changed();
        let mut reap = tokio::time::interval(REAP);
        let mut sweep = tokio::time::interval(REAP.min(worker.shared.tuning.header_timeout / 4));
        loop {
            tokio::select! {
                changed = version.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    worker.take_over();
                }
                _ = phase.changed() => {
                    let now = *phase.borrow_and_update();
                    worker.phase.set(now);
                    if now == Phase::Stopping {
                        worker.telemetry.log.flush();
                        return;
                    }
                    worker.notify();
                }
                _ = secrets.changed() => {
                    secrets.mark_unchanged();
                    // Configurations hold keys; those of a key that was replaced do not wait for the next handshake.
                    worker.tls.borrow_mut().refresh(&worker.shared.secrets.load());
                    for (_, cluster) in worker.upstreams.all() {
                        for endpoint in cluster.endpoints() {
                            if endpoint.tls.is_some() {
                                endpoint.pool.renew();
                            }
                        }
                    }
                }
                _ = sweep.tick() => {
                    let (now, full) = (Instant::now(), worker.is_full());
                    // Copied first: a connection that ends may change the list.
                    let all: Vec<_> = worker.connections.borrow().iter().filter_map(Weak::upgrade).collect();
                    for connection in all {
                        connection.sweep(now, full);
                    }
                }
                _ = reap.tick() => {
                    for (_, cluster) in worker.upstreams.all() {
                        for endpoint in cluster.endpoints() {
                            endpoint.pool.reap();
                        }
                    }
                    worker.connections.borrow_mut().retain(|c| c.strong_count() > 0);
                    if worker.failed.get() > 0 {
                        // A port may have become free.
                        worker.sync_listeners();
                    }
                }
            }
        }
    }

    /// The configuration that this worker runs.
    pub fn config(&self) -> Rc<Arc<Config>> {
        self.config.borrow().clone()
    }

    fn is_full(&self) -> bool {
        self.open.get() >= self.shared.tuning.max_connections
    }

    /// The phase, without touching shared memory.
    pub fn phase(&self) -> Phase {
        self.phase.get()
    }

    /// Adds a connection to those that hear of changes.
    pub fn register(&self, connection: Weak<dyn Connection>) {
        let mut all = self.connections.borrow_mut();
        // Amortised: the list is swept whenever it has doubled.
        if all.len() >= 64 && all.len() >= 2 * self.open.get() {
            all.retain(|c| c.strong_count() > 0);
        }
        all.push(connection);
    }

    fn take_over(self: &Rc<Self>) {
        let config = self.shared.config.load_full();
        let version = config.version;
        self.upstreams.sync(&config);
        self.telemetry.series.borrow_mut().clear();
        self.config.replace(Rc::new(config));
        let failed = self.sync_listeners();
        self.notify();
        self.taken_over.notify_waiters();
        self.shared
            .applied
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(self.id, (version, failed));
        self.shared.applied_changed.send_replace(());
    }

    fn notify(&self) {
        // Copied first: a connection that ends may change the list.
        let all: Vec<_> = self.connections.borrow().iter().filter_map(Weak::upgrade).collect();
        for connection in all {
            connection.changed(self.phase.get());
        }
    }

    /// Opens and closes sockets as the configuration says; returns how many could not be opened.
    fn sync_listeners(self: &Rc<Self>) -> usize {
        let config = self.config();
        let wanted: HashMap<SocketAddr, &String> = config
            .listeners
            .iter()
            .filter(|(_, l)| l.model.bind_to_port)
            .map(|(name, l)| (l.model.address, name))
            .collect();
        let mut bound = self.listeners.borrow_mut();
        bound.retain(|address, (name, task)| {
            let keep = wanted.get(address) == Some(&&*name);
            if !keep {
                task.abort();
            }
            keep
        });
        let mut failed = 0;
        for (address, name) in wanted {
            if bound.contains_key(&address) {
                continue;
            }
            let options = ListenOptions {
                reuse_port: true,
                ..ListenOptions::default()
            };
            match listen_tcp(address, options).and_then(TcpListener::from_std) {
                Ok(listener) => {
                    let task = tokio::task::spawn_local(accept(self.clone(), listener, name.clone()));
                    bound.insert(address, (name.clone(), task.abort_handle()));
                }
                Err(error) => {
                    failed += 1;
                    tracing::error!(target: "worker", "listener {name} cannot listen on {address}: {error}");
                }
            }
        }
        self.failed.set(failed);
        failed
    }
}

/// Between two complaints of a listener that cannot accept.
const ACCEPT_COMPLAINT: Duration = Duration::from_secs(10);

async fn accept(worker: Rc<Worker>, listener: TcpListener, name: String) {
    let name: Rc<str> = name.into();
    let mut told: Option<Instant> = None;
    loop {
        if worker.is_full() {
            tracing::warn!(target: "worker", "listener {name} takes no connections: {} are open", worker.open.get());
            while worker.is_full() {
                worker.room.notified().await;
            }
        }
        match listener.accept().await {
            Ok((tcp, peer)) => {
                worker.open.set(worker.open.get() + 1);
                worker.shared.connections.fetch_add(1, Ordering::Relaxed);
                worker.shared.accepted.fetch_add(1, Ordering::Relaxed);
                let guard = OpenGuard(worker.clone());
                let (worker, name) = (worker.clone(), name.clone());
                tokio::task::spawn_local(async move {
                    let _guard = guard;
                    connection::handle(worker, &name, tcp, peer).await;
                });
            }
            Err(error) => {
                // Out of descriptors: wait until some connection ends instead of spinning, here and in the log.
                if told.is_none_or(|at| at.elapsed() > ACCEPT_COMPLAINT) {
                    told = Some(Instant::now());
                    tracing::warn!(target: "worker", "accept on listener {name} failed: {error}");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_those_to_their_destinations() {
        let tuning = |descriptors| {
            let tuning = Tuning {
                workers: 2,
                ..Tuning::default()
            };
            tuning.within_descriptors(descriptors).max_connections
        };
        assert_eq!(tuning(1024), 192);
        assert_eq!(tuning(20_000), 4936);
        assert_eq!(tuning(1 << 30), Tuning::default().max_connections);
        assert_eq!(tuning(10), 1);
    }
}
