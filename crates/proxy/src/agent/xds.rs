//! Configuration: what the control plane sends is collected, compiled, acknowledged, and put in force as a whole.
//!
//! A response that does not compile is refused and changes nothing. A snapshot with references to resources that are
//! still on their way waits for them, so that no request meets a listener without its routes.
//!
//! What a sidecar asks for at first use (`on_demand`) is subscribed to here, and given up when nobody has used it for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use mantlet_model::cluster::{ClusterTls, Discovery};
use mantlet_model::names::{VIRTUAL_INBOUND, VIRTUAL_OUTBOUND};
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_runtime::ReadyTask;
use mantlet_xds::ads::{Ask, Asks, Backoff, ClientEvent, Connector, run_client_asking};
use mantlet_xds::client::{Change, Decoded, DeltaClient, Scope};
use mantlet_xds::{Node, ResourceType};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;

use super::{control_plane, dns, files};
use crate::config::{Config, Resolved};
use crate::on_demand::{Key, Wanted};
use crate::settings::{ISTIO_VERSION, Role, Settings};
use crate::worker::Shared;

/// How long a snapshot waits for resources that it refers to before it is put in force without them.
const SETTLE: Duration = Duration::from_secs(3);
/// Subscriptions that may wait for a stream.
const ASKS: usize = 1024;

/// The node that this proxy says it is.
pub fn node(settings: &Settings) -> Node {
    let metadata = serde_json::Value::Object(settings.metadata.clone());
    Node {
        id: settings.node_id.clone(),
        cluster: format!("{}.{}", settings.local.canonical_name, settings.namespace),
        metadata: match to_proto(&metadata).kind {
            Some(Kind::StructValue(s)) => Some(s),
            _ => None,
        },
        user_agent_name: "mantlet".to_string(),
        user_agent_version_type: Some(
            envoy_types::pb::envoy::config::core::v3::node::UserAgentVersionType::UserAgentVersion(
                ISTIO_VERSION.to_string(),
            ),
        ),
        ..Node::default()
    }
}

fn to_proto(value: &serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(b) => Kind::BoolValue(*b),
        serde_json::Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        serde_json::Value::String(s) => Kind::StringValue(s.clone()),
        serde_json::Value::Array(all) => Kind::ListValue(ListValue {
            values: all.iter().map(to_proto).collect(),
        }),
        serde_json::Value::Object(all) => Kind::StructValue(Struct {
            fields: all.iter().map(|(k, v)| (k.clone(), to_proto(v))).collect(),
        }),
    };
    Value { kind: Some(kind) }
}

struct Dial {
    settings: Arc<Settings>,
    shared: Arc<Shared>,
}

#[tonic::async_trait]
impl Connector for Dial {
    async fn connect(&self) -> Result<(Channel, MetadataMap), String> {
        let settings = &self.settings;
        let channel =
            control_plane::channel(settings, &self.shared.secrets, &settings.discovery, &settings.xds_root).await?;
        Ok((channel, control_plane::metadata(settings).await?))
    }
}

/// Subscribes for the life of the process. `ready` is done when the first full configuration runs on every worker.
pub async fn subscribe(settings: Arc<Settings>, shared: Arc<Shared>, ready: ReadyTask) {
    let (events, mut received) = mpsc::channel(16);
    let connector = Arc::new(Dial {
        settings: settings.clone(),
        shared: shared.clone(),
    });
    let backoff = Backoff {
        first: Duration::from_millis(200),
        max: Duration::from_secs(5),
    };
    let scope = match (settings.eager, settings.role) {
        (true, _) => Scope::All,
        (false, Role::Router) => Scope::Listeners,
        (false, Role::Sidecar) => Scope::OnDemand([VIRTUAL_INBOUND, VIRTUAL_OUTBOUND].map(String::from).into()),
    };
    let mut staged = Staged::new(shared.clone(), Some(ready), settings.role == Role::Sidecar, &scope);
    let (asks, to_client) = mpsc::channel(ASKS);
    let client = tokio::spawn(run_client_asking(
        DeltaClient::scoped(node(&settings), scope),
        connector,
        backoff,
        events,
        Asks {
            asks: to_client,
            unknown_keys: shared.unknown_keys.take().unwrap_or_else(|| mpsc::channel(1).1),
        },
        CancellationToken::new(),
    ));
    let mut unknown = shared.on_demand.take().unwrap_or_else(|| mpsc::channel(1).1);
    let mut expire = tokio::time::interval((settings.on_demand_idle / 4).max(Duration::from_millis(100)));
    // When the control plane has answered, but not what it would have answered if it gave by name.
    let mut fallback: Option<Instant> = None;
    let shared_files = shared.clone();
    let (names, mut resolved) = dns::start();
    let in_files = files::start(shared_files);
    loop {
        in_files.send_if_modified(|now| {
            let wanted = staged.files();
            let changed = *now != wanted;
            *now = wanted;
            changed
        });
        names.send_if_modified(|now| {
            let wanted = staged.names();
            let changed = *now != wanted;
            *now = wanted;
            changed
        });
        let far = Instant::now() + Duration::from_secs(3600);
        let event = tokio::select! {
            event = received.recv() => event,
            Some(key) = unknown.recv() => {
                staged.want(key, &asks);
                continue;
            }
            _ = expire.tick() => {
                staged.expire(settings.on_demand_idle, &asks);
                continue;
            }
            () = tokio::time::sleep_until(fallback.unwrap_or(far)), if fallback.is_some() => {
                fallback = None;
                tracing::warn!(target: "xds", "{} does not give configuration by name: asking for everything", settings.discovery);
                staged.want_everything(&asks);
                continue;
            }
            () = tokio::time::sleep_until(staged.deadline.unwrap_or(far)) => {
                staged.commit(true).await;
                continue;
            }
            Ok(()) = resolved.changed() => {
                staged.resolved(resolved.borrow_and_update().clone());
                staged.commit(false).await;
                continue;
            }
        };
        match event {
            None => break,
            Some(ClientEvent::Connected) => {
                shared.on_demand.set_connected(true);
                tracing::info!(target: "xds", "connected to {}", settings.discovery);
            }
            Some(ClientEvent::Refused { message }) => tracing::warn!(target: "xds", "configuration refused: {message}"),
            Some(ClientEvent::Disconnected { reason }) => {
                shared.on_demand.set_connected(false);
                tracing::warn!(target: "xds", "connection to {} ended: {reason}", settings.discovery);
            }
            Some(ClientEvent::Update(update)) => {
                let (kind, changes, answer) = update.into_parts();
                let result = staged.take(kind, changes);
                if let Err(problem) = &result {
                    tracing::warn!(target: "xds", "refusing {}: {problem}", kind.short());
                }
                if result.is_ok() {
                    // In force before it is acknowledged: who waits for the acknowledgement may rely on it.
                    staged.commit(false).await;
                }
                fallback = match staged.lacks_lists() {
                    true => fallback.or_else(|| Some(Instant::now() + SETTLE)),
                    false => None,
                };
                answer.send(result);
            }
        }
    }
    client.abort();
}

/// Ends subscriptions. What does not fit waits for nobody: the stream of then tells of resources that nobody asked for, and they are ignored.
fn give_up(keys: Vec<Key>, asks: &mpsc::Sender<Ask>) {
    let mut by_kind: BTreeMap<ResourceType, Vec<String>> = BTreeMap::new();
    for (kind, name) in keys {
        by_kind.entry(kind).or_default().push(name);
    }
    for (kind, names) in by_kind {
        if let Err(error) = asks.try_send(Ask::GiveUp(kind, names)) {
            tracing::warn!(target: "xds", "configuration that is not used stays: {error}");
        }
    }
}

/// The configuration as it is being received.
pub struct Staged {
    shared: Arc<Shared>,
    snapshot: ProxySnapshot,
    version: u64,
    /// Types without which the configuration has not begun.
    unseen: BTreeSet<ResourceType>,
    /// What is asked for at first use; `None` where everything is asked for at once.
    wanted: Option<Wanted>,
    /// Names that something refers to and that did not come: nothing waits for them again.
    absent: BTreeSet<String>,
    dirty: bool,
    deadline: Option<Instant>,
    ready: Option<ReadyTask>,
    resolved: Resolved,
    /// Whether readiness wants every socket open.
    all_sockets: bool,
}

impl Staged {
    /// Nothing received yet.
    pub fn new(shared: Arc<Shared>, ready: Option<ReadyTask>, all_sockets: bool, scope: &Scope) -> Self {
        let begin: &[ResourceType] = match scope {
            Scope::All => &[ResourceType::Listener, ResourceType::Cluster],
            Scope::Listeners => &[ResourceType::Listener],
            Scope::OnDemand(_) => &[ResourceType::Listener, ResourceType::Destinations],
        };
        Staged {
            shared,
            snapshot: ProxySnapshot::default(),
            version: 0,
            unseen: begin.iter().copied().collect(),
            wanted: matches!(scope, Scope::OnDemand(_)).then(Wanted::default),
            absent: BTreeSet::new(),
            dirty: false,
            deadline: None,
            ready,
            resolved: Resolved::default(),
            all_sockets,
        }
    }

    /// Subscribes to what the data path has met.
    fn want(&mut self, key: Key, asks: &mpsc::Sender<Ask>) {
        let Some(wanted) = &mut self.wanted else { return };
        let Some(gone) = wanted.add(key.clone()) else { return };
        give_up(gone, asks);
        let (kind, name) = key.clone();
        // Full: the control plane is away for long, and the next connection asks again.
        if asks.try_send(Ask::Want(kind, name)).is_err() {
            wanted.remove(&key);
        }
    }

    /// Gives up what nobody has used for so long.
    fn expire(&mut self, after: Duration, asks: &mpsc::Sender<Ask>) {
        if let Some(wanted) = &mut self.wanted
            && asks.capacity() > ASKS / 2
        {
            give_up(wanted.expire(after), asks);
        }
    }

    /// Whether there are listeners, and nothing that says what else is served.
    fn lacks_lists(&self) -> bool {
        self.unseen.contains(&ResourceType::Destinations) && !self.unseen.contains(&ResourceType::Listener)
    }

    /// Asks for everything from now on.
    fn want_everything(&mut self, asks: &mpsc::Sender<Ask>) {
        if asks.try_send(Ask::Everything).is_ok() {
            self.wanted = None;
            self.unseen = BTreeSet::from([ResourceType::Cluster]);
        }
    }

    /// Host names that clusters want resolved.
    fn names(&self) -> BTreeSet<String> {
        let dns = self.snapshot.clusters.values().filter_map(|c| match &c.discovery {
            Discovery::Dns(endpoints) => Some(endpoints),
            _ => None,
        });
        dns.flatten()
            .filter(|e| e.address.parse::<IpAddr>().is_err())
            .map(|e| e.address.clone())
            .collect()
    }

    /// Secrets that the configuration says are in files.
    fn files(&self) -> BTreeSet<String> {
        let servers = self.snapshot.listeners.values().flat_map(|l| l.all_chains());
        let servers = servers.filter_map(|chain| chain.tls.as_ref());
        let servers = servers.flat_map(|tls| [Some(&tls.certificate), tls.trust_bundle.as_ref()]);
        let clients = self
            .snapshot
            .clusters
            .values()
            .filter_map(|cluster| match &cluster.tls {
                ClusterTls::Always(tls) | ClusterTls::Auto(tls) => Some(tls),
                ClusterTls::Plain => None,
            });
        let clients = clients.flat_map(|tls| [tls.certificate.as_ref(), tls.trust_bundle.as_ref()]);
        let names = servers.chain(clients).flatten();
        names.filter(|name| files::is_file(name)).cloned().collect()
    }

    /// New addresses of those names.
    fn resolved(&mut self, resolved: Resolved) {
        self.dirty |= self.resolved != resolved;
        self.resolved = resolved;
    }

    /// Takes the changes of one response, all or none.
    ///
    /// # Errors
    /// Why the configuration with these changes cannot run; the former one stays.
    pub fn take(&mut self, kind: ResourceType, changes: Vec<Change>) -> Result<(), String> {
        let mut next = self.snapshot.clone();
        let mut secrets = Vec::new();
        let mut answered = Vec::new();
        let mut absent = Vec::new();
        for change in &changes {
            match change {
                Change::Upsert(Decoded::Listener(l)) => answered.push((ResourceType::Listener, l.name.clone(), false)),
                Change::Upsert(Decoded::VirtualHost(name, _)) => {
                    answered.push((ResourceType::VirtualHosts, name.clone(), false));
                }
                Change::Remove(kind, name) => answered.push((*kind, name.clone(), true)),
                Change::Missing(kind, name) => {
                    answered.push((*kind, name.clone(), true));
                    absent.push(name.clone());
                }
                Change::Upsert(_) => {}
            }
        }
        for change in changes {
            match change {
                Change::Upsert(Decoded::Cluster(c)) => {
                    next.clusters.insert(c.name.clone(), Arc::new(c));
                }
                Change::Upsert(Decoded::Endpoints(e)) => {
                    next.endpoints.insert(e.cluster.clone(), Arc::new(e));
                }
                Change::Upsert(Decoded::Listener(l)) => {
                    next.listeners.insert(l.name.clone(), Arc::new(l));
                }
                Change::Upsert(Decoded::Routes(r)) => {
                    next.routes.insert(r.name.clone(), Arc::new(r));
                }
                Change::Upsert(Decoded::VirtualHost(name, host)) => {
                    next.virtual_hosts.insert(name, Arc::new(host));
                }
                Change::Upsert(Decoded::Secret(s)) => secrets.push(s),
                Change::Upsert(Decoded::Destinations(list)) => {
                    next.destinations.insert(list.name.clone(), Arc::new(list));
                }
                Change::Remove(ResourceType::Cluster, name) => {
                    next.clusters.remove(&name);
                }
                Change::Remove(ResourceType::Endpoints, name) => {
                    next.endpoints.remove(&name);
                }
                Change::Remove(ResourceType::Listener, name) => {
                    next.listeners.remove(&name);
                }
                Change::Remove(ResourceType::Routes, name) => {
                    next.routes.remove(&name);
                }
                Change::Remove(ResourceType::VirtualHosts, name) => {
                    next.virtual_hosts.remove(&name);
                }
                Change::Remove(ResourceType::Destinations, name) => {
                    next.destinations.remove(&name);
                }
                Change::Remove(ResourceType::Secret, _) | Change::Missing(..) => {}
            }
        }
        let next = Arc::new(next);
        Config::compile_for(next.clone(), self.version + 1, &self.resolved, self.wanted.as_ref())
            .map_err(|e| e.to_string())?;
        if !secrets.is_empty() {
            self.shared.secrets.set_named(&secrets).map_err(|e| e.to_string())?;
        }
        if let Some(wanted) = &mut self.wanted {
            for (kind, name, missing) in answered {
                wanted.answered(kind, &name, missing);
            }
        }
        // No list is no answer to what is served: with it, everything would pass as if it were not the mesh's.
        if kind != ResourceType::Destinations || !next.destinations.is_empty() {
            self.unseen.remove(&kind);
        }
        self.absent.extend(absent);
        self.snapshot = Arc::unwrap_or_clone(next);
        self.dirty = true;
        Ok(())
    }

    /// Puts the snapshot in force if it is complete, or if it has waited long enough (`late`).
    pub async fn commit(&mut self, late: bool) {
        if !self.dirty || !self.unseen.is_empty() {
            self.deadline = None;
            return;
        }
        let mut dangling = self.snapshot.dangling();
        self.absent
            .retain(|name| dangling.iter().any(|(_, missing)| missing == name));
        dangling.retain(|(_, missing)| !self.absent.contains(missing));
        if !dangling.is_empty() && !late {
            self.deadline.get_or_insert_with(|| Instant::now() + SETTLE);
            return;
        }
        for (from, missing) in dangling.iter().take(10) {
            tracing::warn!(target: "xds", "{from} refers to {missing}, which has not arrived");
        }
        self.absent.extend(dangling.into_iter().map(|(_, missing)| missing));
        self.deadline = None;
        self.dirty = false;
        self.version += 1;
        let snapshot = Arc::new(self.snapshot.clone());
        match Config::compile_for(snapshot, self.version, &self.resolved, self.wanted.as_ref()) {
            Ok(config) => self.shared.apply(config),
            Err(error) => {
                tracing::error!(target: "xds", "configuration {} does not compile: {error}", self.version);
                return;
            }
        }
        let failed = self.shared.applied(self.version).await;
        tracing::debug!(target: "xds", "configuration {} is in force", self.version);
        if failed > 0 {
            tracing::error!(target: "xds", "{failed} sockets could not be opened");
        }
        // A sidecar without its two sockets is none; a gateway still serves on those that it has.
        let usable = failed == 0 || !self.all_sockets;
        if usable && let Some(ready) = self.ready.take() {
            ready.done();
        }
    }
}
