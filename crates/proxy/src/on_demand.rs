//! Configuration at first use: what the data path does when it meets a destination of which it knows no more than that it is served.
//!
//! A captured connection asks for its listener here, a request for the virtual host of its authority; both wait until the worker runs
//! a configuration that answers, or fail. `agent` gets the names, subscribes, and gives them up again when nobody has used
//! them for a while. The order of safety is that of [ADR 6](../../../docs/adr/0006-configuration-on-demand.md): bytes pass by untouched only where
//! nothing is served, or after the control plane has said that there is nothing. This module knows no xDS stream.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;
use mantlet_model::Destinations;
use mantlet_model::destinations::Served;
use mantlet_model::route::{MAX_AUTHORITY, RouteTable, VirtualHostName};
use mantlet_xds::ResourceType;
use tokio::sync::mpsc;
use tokio::time::timeout_at;

use crate::config::Config;
use crate::http::reply::Reply;
use crate::http::request::Exchange;
use crate::telemetry::flags;
use crate::worker::Worker;

/// Most resources that are asked for by name at once; beyond it those that nobody has used for the longest time go.
pub const MAX_WANTED: usize = 4096;
/// Names that may wait for the subscription.
const QUEUE: usize = 1024;
/// How long a connection or request waits for its configuration: a restart of the control plane takes less.
const PATIENCE: Duration = Duration::from_secs(5);

/// A resource by type and name.
pub type Key = (ResourceType, String);

/// When something was used last, and by whom it is held. It outlives configurations.
#[derive(Debug, Default)]
pub struct Usage {
    /// Seconds since the process looked at its clock first.
    last: AtomicU64,
    holders: AtomicUsize,
}

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

impl Usage {
    /// A new one, used now.
    pub fn new() -> Arc<Usage> {
        let usage = Usage::default();
        usage.touch();
        Arc::new(usage)
    }

    /// Says that it is used now. All workers call this, so it writes only once a second.
    pub fn touch(&self) {
        let now = START.elapsed().as_secs();
        if self.last.load(Ordering::Relaxed) != now {
            self.last.store(now, Ordering::Relaxed);
        }
    }

    /// Keeps it in use.
    pub fn hold(self: &Arc<Self>) -> Held {
        self.touch();
        self.holders.fetch_add(1, Ordering::Relaxed);
        Held(self.clone())
    }

    /// For how long nobody has used it; `None` while somebody holds it.
    pub fn idle(&self) -> Option<Duration> {
        let last = Duration::from_secs(self.last.load(Ordering::Relaxed));
        let free = self.holders.load(Ordering::Relaxed) == 0;
        free.then(|| START.elapsed().saturating_sub(last))
    }
}

/// Keeps something in use while it lives: a connection its listener.
#[derive(Debug)]
pub struct Held(Arc<Usage>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.touch();
        self.0.holders.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a configuration knows of destinations that it does not hold.
#[derive(Debug, Default)]
pub struct Demand {
    /// What is served in the mesh.
    pub lists: Vec<Arc<Destinations>>,
    /// Names that the control plane has said do not exist.
    pub missing: HashMap<String, Arc<Usage>>,
}

impl Demand {
    fn served(&self) -> Served<'_> {
        Served::new(&self.lists)
    }

    /// Whether the control plane has said that there is no such resource.
    fn is_missing(&self, name: &str) -> bool {
        self.missing.get(name).inspect(|usage| usage.touch()).is_some()
    }
}

/// The way from the workers to the subscription.
pub struct OnDemand {
    names: mpsc::Sender<Key>,
    receiver: Mutex<Option<mpsc::Receiver<Key>>>,
    connected: AtomicBool,
}

impl Default for OnDemand {
    fn default() -> Self {
        let (names, receiver) = mpsc::channel(QUEUE);
        OnDemand {
            names,
            receiver: Mutex::new(Some(receiver)),
            connected: AtomicBool::new(false),
        }
    }
}

impl OnDemand {
    /// The names, for the one subscription; `None` the second time.
    pub fn take(&self) -> Option<mpsc::Receiver<Key>> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Tells whether a stream to the control plane is open.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    /// Whether a stream to the control plane is open.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }
}

/// What is asked for by name: kept by the subscription, read by [`Config::compile_for`].
#[derive(Debug, Default)]
pub struct Wanted {
    entries: BTreeMap<Key, Entry>,
}

#[derive(Debug)]
struct Entry {
    usage: Arc<Usage>,
    missing: bool,
}

impl Wanted {
    /// Adds a name. `Some`: it is new; the keys inside were given up for it.
    pub fn add(&mut self, key: Key) -> Option<Vec<Key>> {
        if let Some(entry) = self.entries.get(&key) {
            entry.usage.touch();
            return None;
        }
        let mut gone = Vec::new();
        if self.entries.len() >= MAX_WANTED {
            let mut idle: Vec<(Duration, Key)> = self
                .entries
                .iter()
                .filter_map(|(key, entry)| Some((entry.usage.idle()?, key.clone())))
                .collect();
            idle.sort_unstable_by(|a, b| b.cmp(a));
            // Many at once, so that a flood of names does not sort the list for each.
            gone.extend(idle.into_iter().take(MAX_WANTED / 8).map(|(_, key)| key));
            if gone.is_empty() {
                return None;
            }
            for key in &gone {
                self.entries.remove(key);
            }
        }
        let entry = Entry {
            usage: Usage::new(),
            missing: false,
        };
        self.entries.insert(key, entry);
        Some(gone)
    }

    /// Takes a name out that could not be asked for.
    pub fn remove(&mut self, key: &Key) {
        self.entries.remove(key);
    }

    /// Takes out what nobody has used for so long.
    pub fn expire(&mut self, after: Duration) -> Vec<Key> {
        let idle = |entry: &Entry| entry.usage.idle().is_some_and(|idle| idle >= after);
        let gone: Vec<Key> = self
            .entries
            .iter()
            .filter(|(_, entry)| idle(entry))
            .map(|(key, _)| key.clone())
            .collect();
        for key in &gone {
            self.entries.remove(key);
        }
        gone
    }

    /// Remembers whether a wanted resource exists.
    pub fn answered(&mut self, kind: ResourceType, name: &str, missing: bool) {
        if let Some(entry) = self.entries.get_mut(&(kind, name.to_string())) {
            entry.missing = missing;
        }
    }

    /// Usage of a resource that is asked for by name.
    pub fn usage(&self, kind: ResourceType, name: &str) -> Option<Arc<Usage>> {
        let entry = self.entries.get(&(kind, name.to_string()));
        entry.map(|entry| entry.usage.clone())
    }

    /// What the data path has to know of it.
    pub fn demand<'a>(&self, lists: impl Iterator<Item = &'a Arc<Destinations>>) -> Demand {
        let missing = self.entries.iter().filter(|(_, entry)| entry.missing);
        Demand {
            lists: lists.cloned().collect(),
            missing: missing
                .map(|((_, name), entry)| (name.clone(), entry.usage.clone()))
                .collect(),
        }
    }
}

/// The configuration did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unresolved;

/// Waits until the worker's configuration says where a captured connection goes.
///
/// # Errors
/// Something is served there, and the control plane has not said how.
pub async fn listener(worker: &Rc<Worker>, destination: SocketAddr) -> Result<(), Unresolved> {
    // A service's own listener may be gone while that of its port is not.
    while let Some(name) = missing_listener(&worker.config(), destination) {
        let still = |config: &Config| missing_listener(config, destination).as_deref() == Some(&*name);
        until(worker, (ResourceType::Listener, name.clone()), still).await?;
    }
    Ok(())
}

/// Name of the listener that the configuration does not hold, although a connection to this address would be its.
fn missing_listener(config: &Config, destination: SocketAddr) -> Option<String> {
    let demand = config.demand.as_ref()?;
    let served = demand.served();
    if config.has_listener(destination) {
        return None;
    }
    if served.has_listener(destination) {
        let name = format!("{}_{}", destination.ip(), destination.port());
        if !demand.is_missing(&name) {
            return Some(name);
        }
    }
    if config.listener_for(destination).is_some() || !served.has_port(destination.port()) {
        return None;
    }
    let name = format!("0.0.0.0_{}", destination.port());
    (!demand.is_missing(&name)).then_some(name)
}

/// Position of the virtual host of a request in its route table, which may have to be asked for; `None` if there is no host for it at
/// all. The exchange goes on with the configuration that has it.
///
/// # Errors
/// The answer, when the host is served and the control plane has not said how.
pub async fn virtual_host(exchange: &mut Exchange) -> Result<Option<usize>, Reply> {
    match place(exchange) {
        Place::At(index) => Ok(index),
        // Apart, so that requests to known hosts carry nothing of it.
        Place::Unknown(name) => Box::pin(wait_for_host(exchange, name)).await,
    }
}

enum Place {
    At(Option<usize>),
    Unknown(String),
}

fn place(exchange: &Exchange) -> Place {
    let chosen = &exchange.chosen;
    let Some(routes) = chosen.config.routes_of(&chosen.chain) else {
        return Place::At(None);
    };
    let authority = exchange.authority.to_str().unwrap_or_default();
    let index = routes.host_index(authority);
    if !routes.table().on_demand {
        return Place::At(index);
    }
    if let Some(usage) = index.and_then(|index| routes.usage(index)) {
        usage.touch();
        return Place::At(index);
    }
    match unknown_host(&chosen.config, routes.table(), authority) {
        Some(name) => Place::Unknown(name),
        None => Place::At(index),
    }
}

/// Resource name of the virtual host of an authority, unless the control plane has said that there is none.
fn unknown_host(config: &Config, table: &RouteTable, authority: &str) -> Option<String> {
    let demand = config.demand.as_ref()?;
    let authority = table.authority(authority);
    if authority.is_empty() || authority.len() > MAX_AUTHORITY {
        return None;
    }
    let name = VirtualHostName {
        table: &table.name,
        authority: &authority,
    }
    .to_string();
    (!demand.is_missing(&name)).then_some(name)
}

async fn wait_for_host(exchange: &mut Exchange, name: String) -> Result<Option<usize>, Reply> {
    let worker = exchange.downstream.worker.clone();
    let passing = is_outside(exchange);
    // Nobody is there to ask, and nothing of the mesh is there to reach.
    if worker.shared.on_demand.is_connected() || !passing {
        let asked = name.clone();
        let still = move |config: &Config| {
            let held = |table: &str| config.snapshot.routes.contains_key(table);
            let known = config.snapshot.virtual_hosts.contains_key(&asked);
            let missing = config.demand.as_ref().is_none_or(|demand| demand.is_missing(&asked));
            !known && !missing && VirtualHostName::parse(&asked).is_some_and(|name| held(name.table))
        };
        let found = until(&worker, (ResourceType::VirtualHosts, name), still).await;
        if found.is_err() && !passing {
            return Err(unresolved());
        }
    }
    let Some(newest) = exchange.downstream.chosen() else {
        return Err(unresolved());
    };
    exchange.chosen = newest;
    match place(exchange) {
        Place::At(index) => Ok(index),
        // The fallback of the table.
        Place::Unknown(_) if passing => {
            let chosen = &exchange.chosen;
            let routes = chosen.config.routes_of(&chosen.chain);
            Ok(routes.and_then(|routes| routes.fallback()))
        }
        Place::Unknown(_) => Err(unresolved()),
    }
}

/// Whether neither the address nor the host of a request is the mesh's, so that it may pass without an answer of the control plane.
fn is_outside(exchange: &Exchange) -> bool {
    let Some(demand) = &exchange.chosen.config.demand else {
        return false;
    };
    let chosen = &exchange.chosen;
    let Some(routes) = chosen.config.routes_of(&chosen.chain) else {
        return false;
    };
    let authority = exchange.authority.to_str().unwrap_or_default();
    let served = demand.served();
    !served.has_address(exchange.downstream.facts.destination.ip())
        && !served.has_host(&routes.table().authority(authority))
}

fn unresolved() -> Reply {
    Reply::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "no configuration for this destination: the control plane did not answer",
        "on_demand_timeout",
        flags::NO_ROUTE,
    )
}

/// Asks for a resource and waits while the worker's configuration is without an answer.
async fn until(worker: &Rc<Worker>, key: Key, without: impl Fn(&Config) -> bool) -> Result<(), Unresolved> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    // A full queue means that the control plane is away: nobody waits for long then.
    worker.shared.on_demand.names.try_send(key).map_err(|_| Unresolved)?;
    loop {
        let mut taken = std::pin::pin!(worker.taken_over.notified());
        taken.as_mut().enable();
        if !without(&worker.config()) {
            return Ok(());
        }
        timeout_at(deadline, taken).await.map_err(|_| Unresolved)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> Key {
        (ResourceType::VirtualHosts, format!("80/host-{n}"))
    }

    #[test]
    fn names_are_asked_for_once_and_are_bounded() {
        let mut wanted = Wanted::default();
        assert_eq!(wanted.add(key(0)), Some(Vec::new()));
        assert_eq!(wanted.add(key(0)), None);
        let held: Vec<Held> = (0..MAX_WANTED / 2)
            .map(|n| {
                wanted.add(key(n));
                wanted.usage(ResourceType::VirtualHosts, &key(n).1).unwrap().hold()
            })
            .collect();
        for n in 0..10 * MAX_WANTED {
            wanted.add(key(n));
            assert!(wanted.entries.len() <= MAX_WANTED);
        }
        assert!(
            (0..held.len()).all(|n| wanted.entries.contains_key(&key(n))),
            "what is in use stays"
        );
        let idle = wanted.entries.len() - held.len();
        assert_eq!(wanted.expire(Duration::ZERO).len(), idle);
        drop(held);
        assert_eq!(wanted.expire(Duration::ZERO).len(), MAX_WANTED / 2);
        assert!(wanted.entries.is_empty());
    }
}
