//! One watched, cached view of a resource kind, shared by every controller, the DNS server and the
//! service proxy.
//!
//! An [`Informer`] lists and watches through `kube::runtime::watcher`, keeps the objects in memory
//! and tells its subscribers the old and the new version of what changed. Objects that a
//! controller has just written are put into the cache with [`Informer::observe`], so that a second
//! reconcile does not act on the state before the first one's write (upstream solves the same
//! problem with expectations). It must not know what its subscribers do.

use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, RwLock};

use futures::StreamExt;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Namespace (empty for cluster-scoped objects) and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Namespace, or the empty string.
    pub namespace: String,
    /// Object name.
    pub name: String,
}

impl Key {
    /// A key from its parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The key of an object.
    pub fn of<K: Resource>(object: &K) -> Self {
        Self::new(object.namespace().unwrap_or_default(), object.name_any())
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Called with the cached version before and after a change; `None` stands for absent.
pub type Handler<K> = Box<dyn Fn(Option<&Arc<K>>, Option<&Arc<K>>) + Send + Sync>;

/// How many deleted UIDs are remembered, so that a late [`Informer::observe`] does not resurrect them.
const TOMBSTONES: usize = 4096;

struct State<K> {
    objects: HashMap<Key, Arc<K>>,
    tombstones: VecDeque<String>,
    relisted: Option<HashMap<Key, Arc<K>>>,
}

/// See the module's documentation.
pub struct Informer<K: Resource> {
    state: RwLock<State<K>>,
    handlers: Mutex<Vec<Handler<K>>>,
    synced: watch::Sender<bool>,
}

impl<K> Informer<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    K::DynamicType: Send + Sync,
{
    /// An empty informer; nothing is watched before [`Informer::run`].
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: RwLock::new(State {
                objects: HashMap::new(),
                tombstones: VecDeque::new(),
                relisted: None,
            }),
            handlers: Mutex::new(Vec::new()),
            synced: watch::Sender::new(false),
        })
    }

    /// Adds a subscriber. Objects that are already cached are announced to it at once.
    pub fn subscribe(&self, handler: Handler<K>) {
        let known = self.list();
        for object in &known {
            handler(None, Some(object));
        }
        lock(&self.handlers).push(handler);
    }

    /// Watches until `stop` is cancelled; errors are logged and retried with backoff.
    pub async fn run(self: Arc<Self>, api: Api<K>, config: watcher::Config, stop: CancellationToken) {
        let mut events = Box::pin(watcher(api, config).default_backoff());
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                Some(Ok(event)) => self.apply(event),
                Some(Err(error)) => {
                    tracing::warn!(kind = std::any::type_name::<K>(), %error, "watch failed, retrying");
                }
                None => return,
            }
        }
    }

    /// Resolves once the first full list is cached.
    pub async fn synced(&self) {
        let mut seen = self.synced.subscribe();
        // The sender lives in self, so the wait cannot fail while self is borrowed.
        let _ = seen.wait_for(|synced| *synced).await;
    }

    /// The cached object.
    pub fn get(&self, key: &Key) -> Option<Arc<K>> {
        read(&self.state).objects.get(key).cloned()
    }

    /// Every cached object, in no order.
    pub fn list(&self) -> Vec<Arc<K>> {
        read(&self.state).objects.values().cloned().collect()
    }

    /// The cached objects of one namespace that satisfy `keep`.
    pub fn select(&self, namespace: &str, keep: impl Fn(&K) -> bool) -> Vec<Arc<K>> {
        let state = read(&self.state);
        state
            .objects
            .iter()
            .filter(|(key, object)| key.namespace == namespace && keep(object))
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// Puts the answer to a write into the cache, unless the cache already knows something newer.
    pub fn observe(&self, object: &K) {
        let key = Key::of(object);
        let new = Arc::new(object.clone());
        let old = {
            let mut state = write(&self.state);
            let uid = object.uid().unwrap_or_default();
            if state.tombstones.contains(&uid) {
                return;
            }
            let old = state.objects.get(&key).cloned();
            if let Some(old) = &old
                && revision(old.as_ref()) >= revision(object)
            {
                return;
            }
            state.objects.insert(key, new.clone());
            old
        };
        self.announce(old.as_ref(), Some(&new));
    }

    fn apply(&self, event: watcher::Event<K>) {
        match event {
            watcher::Event::Init => write(&self.state).relisted = Some(HashMap::new()),
            watcher::Event::InitApply(object) => {
                let mut state = write(&self.state);
                let key = Key::of(&object);
                if let Some(relisted) = &mut state.relisted {
                    relisted.insert(key, Arc::new(object));
                }
            }
            watcher::Event::InitDone => self.finish_relist(),
            watcher::Event::Apply(object) => {
                let new = Arc::new(object);
                let old = {
                    let mut state = write(&self.state);
                    let key = Key::of(new.as_ref());
                    let old = state.objects.get(&key).cloned();
                    let stale = old
                        .as_ref()
                        .is_some_and(|old| old.uid() == new.uid() && revision(old.as_ref()) > revision(new.as_ref()));
                    if stale {
                        return;
                    }
                    state.objects.insert(key, new.clone());
                    old
                };
                self.announce(old.as_ref(), Some(&new));
            }
            watcher::Event::Delete(object) => {
                let old = {
                    let mut state = write(&self.state);
                    bury(&mut state.tombstones, object.uid());
                    let key = Key::of(&object);
                    // A successor of the same name may have been observed already.
                    if state.objects.get(&key).is_some_and(|known| known.uid() != object.uid()) {
                        None
                    } else {
                        state.objects.remove(&key);
                        Some(Arc::new(object))
                    }
                };
                if let Some(old) = old {
                    self.announce(Some(&old), None);
                }
            }
        }
    }

    fn finish_relist(&self) {
        let (before, after) = {
            let mut state = write(&self.state);
            let Some(relisted) = state.relisted.take() else {
                return;
            };
            let before = std::mem::replace(&mut state.objects, relisted);
            for (key, old) in &before {
                if state.objects.get(key).is_none_or(|new| new.uid() != old.uid()) {
                    bury(&mut state.tombstones, old.uid());
                }
            }
            (before, state.objects.clone())
        };
        for (key, new) in &after {
            let old = before.get(key);
            if old.is_none_or(|old| old.resource_version() != new.resource_version()) {
                self.announce(old, Some(new));
            }
        }
        for (key, old) in &before {
            if !after.contains_key(key) {
                self.announce(Some(old), None);
            }
        }
        self.synced.send_replace(true);
    }

    fn announce(&self, old: Option<&Arc<K>>, new: Option<&Arc<K>>) {
        for handler in lock(&self.handlers).iter() {
            handler(old, new);
        }
    }
}

fn bury(tombstones: &mut VecDeque<String>, uid: Option<String>) {
    if let Some(uid) = uid {
        if tombstones.len() == TOMBSTONES {
            tombstones.pop_front();
        }
        tombstones.push_back(uid);
    }
}

/// Resource versions are store revisions (and since Kubernetes 1.35 comparable by contract).
fn revision<K: Resource>(object: &K) -> u64 {
    object
        .meta()
        .resource_version
        .as_deref()
        .and_then(|version| version.parse().ok())
        .unwrap_or(0)
}

// A panic while a cache lock is held is a bug of ours; the cache itself stays consistent, because
// every write is a single map operation.
fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn lock<T>(lock: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
