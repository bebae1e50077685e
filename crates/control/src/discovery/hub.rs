//! The single owner of the world: takes changes, decides who is affected, translates, hands resources to the streams.
//!
//! One thread, one queue of commands. Whatever has queued up while a push was running is applied together before the
//! next one: there is no waiting for more, and no push per event under load.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use mantlet_model::{Secret, SharedSnapshot};
use mantlet_translate::node::ProxyNode;
use mantlet_translate::world::keys::KeySetNeed;
use mantlet_translate::world::{Effect, World};
use mantlet_translate::{Translator, mesh::Mesh};
use mantlet_xds::encode::Options;
use mantlet_xds::{Dialect, Encoder, ResourceSet, ResourceType};
use tokio::sync::{mpsc, oneshot, watch};

use super::board::{Board, StreamId};
use super::metrics::PilotMetrics;
use super::secrets::{SecretKey, SecretNames, SecretWants};

/// A change of the world.
pub type Change = Box<dyn FnOnce(&mut World) -> Effect + Send>;
/// A question to the hub.
pub type Question = Box<dyn FnOnce(&View<'_>) + Send>;

/// What a stream brings.
pub struct Subscriber {
    /// The proxy.
    pub node: Arc<ProxyNode>,
    /// Vocabulary that it understands.
    pub dialect: Dialect,
    /// Whether its identity was verified; without one there are no secrets (S4.122).
    pub identity: Option<mantlet_identity::SpiffeId>,
}

/// What a stream gets.
pub struct Admitted {
    /// Its number.
    pub id: StreamId,
    /// Its resources.
    pub resources: watch::Receiver<Arc<ResourceSet>>,
}

enum Command {
    Change {
        change: Change,
        at: Instant,
    },
    Connect {
        subscriber: Subscriber,
        reply: oneshot::Sender<Admitted>,
    },
    Disconnect(StreamId),
    Secret {
        key: SecretKey,
        secrets: Vec<Arc<Secret>>,
    },
    Ask(Question),
    Close,
}

/// The state that questions see.
pub struct View<'a> {
    /// The world.
    pub world: &'a World,
    /// Revision of the world.
    pub revision: u64,
    /// Snapshots of connected proxies.
    pub proxies: Vec<(&'a ProxyNode, &'a SharedSnapshot)>,
}

/// A handle to the hub; clones share it.
#[derive(Clone)]
pub struct Hub {
    commands: mpsc::UnboundedSender<Command>,
    key_needs: watch::Receiver<Vec<KeySetNeed>>,
    trust_domains: watch::Receiver<Vec<String>>,
}

impl Hub {
    /// Starts the hub's thread. It ends when all handles are gone.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(mesh: Mesh, metrics: PilotMetrics, board: Board, wants: SecretWants) -> std::io::Result<Hub> {
        let (commands, queue) = mpsc::unbounded_channel();
        let (needs, key_needs) = watch::channel(Vec::new());
        let (accepted, trust_domains) = watch::channel(accepted_trust_domains(&mesh));
        let state = State {
            world: World::new(mesh),
            revision: 1,
            translator: Translator::default(),
            encoder: Encoder::default(),
            proxies: BTreeMap::new(),
            secrets: HashMap::new(),
            next_id: 1,
            metrics,
            board,
            wants,
            needs,
            accepted,
            closed: false,
        };
        std::thread::Builder::new()
            .name("hub".into())
            .spawn(move || state.run(queue))?;
        Ok(Hub {
            commands,
            key_needs,
            trust_domains,
        })
    }

    /// Applies a change of the world.
    pub fn change(&self, change: impl FnOnce(&mut World) -> Effect + Send + 'static) {
        self.send(Command::Change {
            change: Box::new(change),
            at: Instant::now(),
        });
    }

    /// The key sets that RequestAuthentications name, whenever they change.
    pub fn key_needs(&self) -> watch::Receiver<Vec<KeySetNeed>> {
        self.key_needs.clone()
    }

    /// The trust domains of the mesh configuration, whenever they change: its own, then all others whose identities are accepted.
    pub fn trust_domains(&self) -> watch::Receiver<Vec<String>> {
        self.trust_domains.clone()
    }

    /// Admits a stream; `None` when the hub is shutting down.
    pub async fn connect(&self, subscriber: Subscriber) -> Option<Admitted> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Connect { subscriber, reply });
        answer.await.ok()
    }

    /// Returns when the hub's thread has ended, which means that it failed: without it nothing is pushed any more.
    pub async fn ended(&self) {
        self.commands.closed().await;
    }

    /// Ends all streams and admits none any more: their proxies go to another instance, or come back later.
    pub fn close(&self) {
        self.send(Command::Close);
    }

    /// Ends a stream.
    pub fn disconnect(&self, id: StreamId) {
        self.send(Command::Disconnect(id));
    }

    /// Gives the content of a secret; empty when it is gone or not allowed.
    pub fn secret(&self, key: SecretKey, secrets: Vec<Arc<Secret>>) {
        self.send(Command::Secret { key, secrets });
    }

    /// Asks for something of the current state.
    pub async fn ask<T: Send + 'static>(&self, question: impl FnOnce(&View<'_>) -> T + Send + 'static) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Ask(Box::new(move |view| {
            // Nobody waits any more: nothing to tell.
            let _ = reply.send(question(view));
        })));
        answer.await.ok()
    }

    fn send(&self, command: Command) {
        // Fails only after the thread ended, that is at exit.
        let _ = self.commands.send(command);
    }
}

struct Proxy {
    node: Arc<ProxyNode>,
    dialect: Dialect,
    identity: Option<mantlet_identity::SpiffeId>,
    snapshot: SharedSnapshot,
    sender: watch::Sender<Arc<ResourceSet>>,
    /// Names of secrets in its snapshot.
    named: SecretNames,
    /// Secrets that its snapshot refers to.
    secrets: BTreeSet<SecretKey>,
}

struct State {
    world: World,
    revision: u64,
    translator: Translator,
    encoder: Encoder,
    proxies: BTreeMap<StreamId, Proxy>,
    secrets: HashMap<SecretKey, Vec<Arc<Secret>>>,
    next_id: StreamId,
    metrics: PilotMetrics,
    board: Board,
    wants: SecretWants,
    /// Told which key sets are needed.
    needs: watch::Sender<Vec<KeySetNeed>>,
    /// Told which trust domains are accepted.
    accepted: watch::Sender<Vec<String>>,
    closed: bool,
}

impl State {
    fn run(mut self, mut queue: mpsc::UnboundedReceiver<Command>) {
        while let Some(first) = queue.blocking_recv() {
            let mut round = Round::default();
            self.apply(first, &mut round);
            while let Ok(next) = queue.try_recv() {
                self.apply(next, &mut round);
            }
            self.push(round);
        }
    }

    fn apply(&mut self, command: Command, round: &mut Round) {
        match command {
            Command::Change { change, at } => {
                let effect = change(&mut self.world);
                if !effect.is_none() {
                    self.revision += 1;
                    round.since = Some(round.since.map_or(at, |t| t.min(at)));
                    round.effect.merge(effect);
                }
            }
            // Dropping the reply tells the stream.
            Command::Connect { .. } if self.closed => {}
            Command::Close => {
                self.closed = true;
                for id in self.proxies.keys().copied().collect::<Vec<_>>() {
                    self.disconnect(id);
                }
            }
            Command::Connect { subscriber, reply } => {
                let id = self.next_id;
                self.next_id += 1;
                let (sender, resources) = watch::channel(Arc::new(ResourceSet::default()));
                self.board.opened(id, subscriber.node.clone());
                self.proxies.insert(
                    id,
                    Proxy {
                        node: subscriber.node,
                        dialect: subscriber.dialect,
                        identity: subscriber.identity,
                        snapshot: SharedSnapshot::default(),
                        sender,
                        named: SecretNames::default(),
                        secrets: BTreeSet::new(),
                    },
                );
                // The stream starts with its whole configuration, not with an empty one.
                self.push_one(id);
                if reply.send(Admitted { id, resources }).is_err() {
                    self.disconnect(id);
                }
            }
            Command::Disconnect(id) => self.disconnect(id),
            Command::Secret { key, secrets } => {
                if secrets.is_empty() {
                    self.secrets.remove(&key);
                } else {
                    self.secrets.insert(key.clone(), secrets);
                }
                let users = self.proxies.iter().filter(|(_, p)| p.secrets.contains(&key));
                round.proxies.extend(users.map(|(id, _)| *id));
            }
            Command::Ask(question) => {
                // The state that questions see is settled: what came before them is applied and pushed first.
                self.push(std::mem::take(round));
                question(&View {
                    world: &self.world,
                    revision: self.revision,
                    proxies: self.proxies.values().map(|p| (&*p.node, &p.snapshot)).collect(),
                });
            }
        }
    }

    fn disconnect(&mut self, id: StreamId) {
        let Some(gone) = self.proxies.remove(&id) else { return };
        self.board.closed(id);
        if self.proxies.values().all(|p| p.node.id != gone.node.id) {
            self.translator.forget(&gone.node.id);
        }
        self.drop_unused(gone.secrets);
    }

    fn push(&mut self, round: Round) {
        // A stream that was given up while it was being admitted never tells that it is closed.
        let abandoned: Vec<StreamId> = self
            .proxies
            .iter()
            .filter(|(_, p)| p.sender.is_closed())
            .map(|(id, _)| *id)
            .collect();
        for id in abandoned {
            self.disconnect(id);
        }
        let affected: Vec<StreamId> = self
            .proxies
            .iter()
            .filter(|(id, p)| round.proxies.contains(id) || round.effect.touches_pod(&p.node.namespace, &p.node.name))
            .map(|(id, _)| *id)
            .collect();
        let started = Instant::now();
        if !round.effect.is_none() {
            self.metrics.triggers.inc();
            self.board.moved();
            tell(&self.needs, self.world.needed_key_sets());
            tell(&self.accepted, accepted_trust_domains(self.world.mesh()));
            if round.effect.outbound {
                self.metrics
                    .services
                    .set(self.world.visible_services("").count() as f64);
            }
            // Proxies that are not affected run this revision already.
            let others: Vec<StreamId> = {
                let affected: BTreeSet<&StreamId> = affected.iter().collect();
                let all = self.proxies.keys().filter(|id| !affected.contains(id));
                all.copied().collect()
            };
            self.board.unaffected(&others, self.revision);
        }
        for id in &affected {
            self.push_one(*id);
        }
        if let Some(since) = round.since
            && !affected.is_empty()
        {
            self.metrics.push_time.observe(started.elapsed().as_secs_f64());
            self.metrics.convergence.observe(since.elapsed().as_secs_f64());
        }
    }

    /// Brings one stream to the current revision.
    fn push_one(&mut self, id: StreamId) {
        let Some(proxy) = self.proxies.get_mut(&id) else { return };
        let snapshot = self.translator.snapshot(&self.world, &proxy.node);
        // Looking at everything is for whoever looks for a fault.
        let dangling = if tracing::enabled!(target: "ads", tracing::Level::DEBUG) {
            snapshot.to_snapshot().dangling()
        } else {
            Vec::new()
        };
        for (from, missing) in dangling {
            tracing::debug!(target: "ads", "{}: {from} refers to {missing}, which does not exist", proxy.node.display_name());
        }
        let mut secrets: Vec<Arc<Secret>> = Vec::new();
        proxy.named.follow(&proxy.snapshot, &snapshot);
        let wanted = match &proxy.identity {
            Some(identity) => proxy.named.wanted(identity),
            None => BTreeSet::new(),
        };
        for key in &wanted {
            match self.secrets.get(key) {
                Some(found) => secrets.extend(found.iter().cloned()),
                None if !proxy.secrets.contains(key) => self.wants.want(key.clone()),
                None => {}
            }
        }
        let former = std::mem::replace(&mut proxy.secrets, wanted);
        let previous = proxy.sender.borrow().clone();
        let options = Options {
            dialect: proxy.dialect,
            on_demand: proxy.node.on_demand,
        };
        let fresh = previous.next(&snapshot, secrets, &options, &mut self.encoder);
        let changed = changed_types(&previous, &fresh);
        proxy.snapshot = snapshot;
        self.board.computed(id, self.revision, &changed);
        if !changed.is_empty() {
            proxy.sender.send_replace(Arc::new(fresh.of_revision(self.revision)));
        }
        self.drop_unused(former);
    }

    /// Stops to follow secrets that no proxy refers to any more.
    fn drop_unused(&mut self, keys: BTreeSet<SecretKey>) {
        for key in keys {
            if self.proxies.values().all(|p| !p.secrets.contains(&key)) {
                self.secrets.remove(&key);
                self.wants.drop_secret(key);
            }
        }
    }
}

/// Sends a value that differs from the last one.
fn tell<T: PartialEq>(sender: &watch::Sender<T>, value: T) {
    sender.send_if_modified(|former| {
        let changed = *former != value;
        *former = value;
        changed
    });
}

fn accepted_trust_domains(mesh: &Mesh) -> Vec<String> {
    mesh.accepted_trust_domains().into_iter().map(String::from).collect()
}

/// What a round of pushes has to do.
#[derive(Default)]
struct Round {
    effect: Effect,
    /// Streams that must be looked at in any case.
    proxies: BTreeSet<StreamId>,
    /// When the oldest change of the round arrived.
    since: Option<Instant>,
}

/// Types whose resources differ, by name and version.
fn changed_types(old: &ResourceSet, new: &ResourceSet) -> BTreeSet<ResourceType> {
    ResourceType::ALL
        .into_iter()
        .filter(|kind| {
            let mut changes = old.map(*kind).diff(new.map(*kind)).into_iter();
            changes.any(|(_, before, after)| match (before, after) {
                (Some(before), Some(after)) => !before.is_same(after),
                _ => true,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests;
