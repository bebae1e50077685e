//! The proxy's side of an incremental xDS stream as a state machine: responses in, requests and typed changes out.
//!
//! Each response is taken whole or not at all: [`DeltaClient::on_response`] decodes all of its resources first, the
//! proxy applies them, and only then [`DeltaClient::accept`] acknowledges; a resource that cannot be decoded or applied
//! refuses the whole response with a text that names it, and the former configuration stays.
//!
//! The client follows references by itself: clusters name endpoints, listeners name route tables and secrets. How much it asks for
//! beyond that is its [`Scope`]: everything, or what the proxy [wants](DeltaClient::want) and what that refers to. What it holds
//! survives a broken stream; the next one starts with the versions at hand.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use envoy_types::pb::google::rpc::Status;
use mantlet_model::cluster::{ClusterTls, Discovery};
use mantlet_model::ext_authz::CustomStage;
use mantlet_model::http::RouteSource;
use mantlet_model::listener::Filters;
use mantlet_model::route::{Route, RouteAction, VirtualHost};
use mantlet_model::{Cluster, Destinations, Endpoints, Listener, RouteTable, Secret};

use crate::convert::tls::is_local;
use crate::decode::{self, DecodeError};
use crate::resources::ResourceType;
use crate::{Any, Node};

/// A decoded resource.
#[derive(Clone, Debug, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "values are moved once each, on their way into the proxy's maps"
)]
pub enum Decoded {
    /// A cluster.
    Cluster(Cluster),
    /// Endpoints of a cluster.
    Endpoints(Endpoints),
    /// A listener.
    Listener(Listener),
    /// A route table.
    Routes(RouteTable),
    /// A virtual host, with its resource name.
    VirtualHost(String, VirtualHost),
    /// A secret.
    Secret(Secret),
    /// A list of what is served.
    Destinations(Destinations),
}

/// One change of the proxy's configuration.
#[derive(Clone, Debug, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "values are moved once each, on their way into the proxy's maps"
)]
pub enum Change {
    /// A resource is new or different.
    Upsert(Decoded),
    /// A resource is gone.
    Remove(ResourceType, String),
    /// A resource that the proxy wants does not exist, and it held none.
    Missing(ResourceType, String),
}

/// What a client asks for by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// All listeners and clusters (Envoy's way).
    #[default]
    All,
    /// All listeners, and clusters that something refers to: gateways, whose listeners are all their own.
    Listeners,
    /// These listeners, the lists of what is served, and what these and wanted resources refer to.
    OnDemand(BTreeSet<String>),
}

/// The changes of one response. Give it back to [`DeltaClient::accept`] or [`DeltaClient::reject`].
#[derive(Debug)]
#[must_use = "a response must be answered"]
pub struct Pending {
    kind: ResourceType,
    nonce: String,
    versions: BTreeMap<String, Option<String>>,
    references: BTreeMap<String, References>,
    inlined: BTreeMap<String, BTreeSet<String>>,
    /// What changes, in the order of the response.
    pub changes: Vec<Change>,
}

impl Pending {
    /// Type of the response.
    pub fn kind(&self) -> ResourceType {
        self.kind
    }
}

/// What follows from an accepted response.
#[derive(Debug)]
#[must_use = "the requests must be sent and the resources forgotten"]
pub struct Accepted {
    /// The acknowledgement and new subscriptions, to be sent.
    pub requests: Vec<DeltaDiscoveryRequest>,
    /// Removals of resources that nothing refers to any more. The server no longer speaks of them.
    pub forgotten: Vec<Change>,
}

/// Names that one resource refers to.
type References = BTreeSet<(ResourceType, String)>;

#[derive(Debug, Default)]
struct TypeState {
    /// Versions of what the proxy holds.
    versions: BTreeMap<String, String>,
    /// Explicit subscriptions.
    names: BTreeSet<String>,
    /// References of each held resource.
    references: BTreeMap<String, References>,
    /// Whether the stream knows of this type.
    subscribed: bool,
}

/// Incremental xDS, client's side.
#[derive(Debug)]
pub struct DeltaClient {
    node: Node,
    types: BTreeMap<ResourceType, TypeState>,
    /// Key sets that listeners carry in themselves, by listener.
    inlined: BTreeMap<String, BTreeSet<String>>,
    scope: Scope,
    /// Whether a stream is open.
    open: bool,
    first: bool,
}

impl DeltaClient {
    /// A client for this node, of everything.
    pub fn new(node: Node) -> Self {
        DeltaClient::scoped(node, Scope::All)
    }

    /// A client for this node.
    pub fn scoped(node: Node, scope: Scope) -> Self {
        let mut client = DeltaClient {
            node,
            types: ResourceType::ALL
                .into_iter()
                .map(|t| (t, TypeState::default()))
                .collect(),
            inlined: BTreeMap::new(),
            scope,
            open: false,
            first: true,
        };
        if let Scope::OnDemand(listeners) = &client.scope {
            let names = listeners.clone();
            client.types.entry(ResourceType::Listener).or_default().names = names;
        }
        client
    }

    /// Whether all resources of a type are asked for.
    fn is_whole(&self, kind: ResourceType) -> bool {
        match kind {
            ResourceType::Cluster => self.scope == Scope::All,
            ResourceType::Listener => matches!(self.scope, Scope::All | Scope::Listeners),
            ResourceType::Destinations => matches!(self.scope, Scope::OnDemand(_)),
            _ => false,
        }
    }

    /// The requests that open a stream: what is asked for as a whole, and all names that are known from before.
    pub fn start(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.first = true;
        self.open = true;
        for state in self.types.values_mut() {
            state.subscribed = false;
        }
        let mut out = Vec::new();
        for kind in ResourceType::ALL {
            let whole = self.is_whole(kind);
            let state = &self.types[&kind];
            if whole || !state.names.is_empty() {
                // No names ask for all of such a type.
                let names = state.names.iter().filter(|_| !whole).cloned().collect();
                out.push(self.request(kind, names, Vec::new()));
            }
        }
        out
    }

    /// The stream is gone.
    pub fn closed(&mut self) {
        self.open = false;
    }

    /// Asks for a resource by name, from now on. `None`: it is asked for already, or will be with the next stream.
    pub fn want(&mut self, kind: ResourceType, name: &str) -> Option<DeltaDiscoveryRequest> {
        let fresh = self.types.entry(kind).or_default().names.insert(name.to_string());
        (fresh && self.open).then(|| self.request(kind, vec![name.to_string()], Vec::new()))
    }

    /// Gives up resources that were wanted, and all that only they refer to.
    pub fn give_up(&mut self, kind: ResourceType, names: Vec<String>) -> Accepted {
        let mut forgotten = Vec::new();
        let state = self.types.entry(kind).or_default();
        let mut dropped = Vec::new();
        for name in names {
            if state.names.remove(&name) {
                state.references.remove(&name);
                if state.versions.remove(&name).is_some() {
                    forgotten.push(Change::Remove(kind, name.clone()));
                }
                dropped.push(name);
            }
        }
        let mut requests = Vec::new();
        if self.open && !dropped.is_empty() {
            requests.push(self.request(kind, Vec::new(), dropped));
        }
        self.follow(&mut requests, &mut forgotten);
        Accepted { requests, forgotten }
    }

    /// Asks for everything from now on.
    pub fn want_all(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.scope = Scope::All;
        let mut out = Vec::new();
        for kind in [ResourceType::Cluster, ResourceType::Listener] {
            self.types.entry(kind).or_default().names.clear();
            if self.open {
                out.push(self.request(kind, vec!["*".to_string()], Vec::new()));
            }
        }
        out
    }

    /// Decodes a response. `Err` is the refusal to send back.
    pub fn on_response(&self, response: DeltaDiscoveryResponse) -> Result<Pending, Refusal> {
        let DeltaDiscoveryResponse {
            resources,
            type_url,
            removed_resources,
            nonce,
            ..
        } = response;
        let refuse = |message: String| Refusal {
            request: Box::new(nack(type_url.clone(), nonce.clone(), message.clone())),
            message,
        };
        let Some(kind) = ResourceType::from_url(&type_url) else {
            return Err(refuse(format!("resource type {type_url} was not subscribed")));
        };
        let mut pending = Pending {
            kind,
            nonce: nonce.clone(),
            versions: BTreeMap::new(),
            references: BTreeMap::new(),
            inlined: BTreeMap::new(),
            changes: Vec::new(),
        };
        let mut errors = Vec::new();
        for resource in resources {
            // Given up while it was under way: nobody waits for it.
            if !self.is_whole(kind) && !self.types[&kind].names.contains(&resource.name) {
                continue;
            }
            let Some(any) = &resource.resource else {
                errors.push(format!("{}: resource without content", resource.name));
                continue;
            };
            let mut references = References::new();
            match decode_one(kind, &resource.name, any, &mut references) {
                Ok((name, changes)) if name == resource.name => {
                    let keys = changes.iter().filter_map(|change| match change {
                        Change::Upsert(Decoded::Secret(secret)) if kind == ResourceType::Listener => {
                            Some(secret.name.clone())
                        }
                        _ => None,
                    });
                    pending.inlined.insert(name.clone(), keys.collect());
                    pending.changes.extend(changes);
                    pending.versions.insert(name.clone(), Some(resource.version));
                    pending.references.insert(name, references);
                }
                Ok((name, _)) => errors.push(format!("{}: content is named {name}", resource.name)),
                Err(error) => errors.push(format!("{}: {error}", resource.name)),
            }
        }
        if !errors.is_empty() {
            return Err(refuse(errors.join("; ")));
        }
        for name in removed_resources {
            let state = &self.types[&kind];
            if state.versions.contains_key(&name) {
                pending.changes.push(Change::Remove(kind, name.clone()));
            } else if kind != ResourceType::Secret && state.names.contains(&name) {
                pending.changes.push(Change::Missing(kind, name.clone()));
            }
            pending.versions.insert(name, None);
        }
        Ok(pending)
    }

    /// The proxy runs the changes: the acknowledgement, subscriptions that follow from them, and what nothing refers to
    /// any more.
    pub fn accept(&mut self, pending: Pending) -> Accepted {
        let Pending {
            kind,
            nonce,
            versions,
            references,
            inlined,
            changes: _,
        } = pending;
        let mut forgotten = Vec::new();
        if kind == ResourceType::Listener {
            let before: BTreeSet<String> = self.inlined.values().flatten().cloned().collect();
            for name in versions.keys() {
                self.inlined.remove(name);
            }
            self.inlined.extend(inlined);
            let after: BTreeSet<&String> = self.inlined.values().flatten().collect();
            let gone = before.iter().filter(|name| !after.contains(name));
            forgotten.extend(gone.map(|name| Change::Remove(ResourceType::Secret, name.clone())));
        }
        let state = self.types.entry(kind).or_default();
        for (name, version) in versions {
            match version {
                Some(version) => {
                    state.versions.insert(name, version);
                }
                None => {
                    state.versions.remove(&name);
                    state.references.remove(&name);
                }
            }
        }
        state.references.extend(references);

        let mut out = vec![DeltaDiscoveryRequest {
            type_url: kind.url().into(),
            response_nonce: nonce,
            ..DeltaDiscoveryRequest::default()
        }];
        self.follow(&mut out, &mut forgotten);
        Accepted {
            requests: out,
            forgotten,
        }
    }

    /// Asks for what held resources refer to, and for nothing else. Who refers comes before what is referred to.
    fn follow(&mut self, out: &mut Vec<DeltaDiscoveryRequest>, forgotten: &mut Vec<Change>) {
        for kind in [
            ResourceType::Routes,
            ResourceType::Cluster,
            ResourceType::Endpoints,
            ResourceType::Secret,
        ] {
            if self.is_whole(kind) {
                continue;
            }
            let names: BTreeSet<String> = self
                .types
                .values()
                .flat_map(|t| t.references.values().flatten())
                .filter(|(k, n)| *k == kind && !(kind == ResourceType::Secret && is_local(n)))
                .map(|(_, n)| n.clone())
                .collect();
            let state = self.types.entry(kind).or_default();
            let add: Vec<String> = names.difference(&state.names).cloned().collect();
            let drop: Vec<String> = state.names.difference(&names).cloned().collect();
            for name in &drop {
                state.references.remove(name);
                if state.versions.remove(name).is_some() {
                    forgotten.push(Change::Remove(kind, name.clone()));
                }
            }
            state.names = names;
            if self.open && (!add.is_empty() || !drop.is_empty()) {
                out.push(self.request(kind, add, drop));
            }
        }
    }

    /// The proxy cannot run the changes: the refusal. What it held before stays.
    pub fn reject(&self, pending: Pending, reason: &str) -> DeltaDiscoveryRequest {
        nack(pending.kind.url().into(), pending.nonce, reason.to_string())
    }

    /// Tells the control plane that a held key set lacks the key of a token: its name is asked for as if it were a secret. It is
    /// none, so nothing is answered but, where the control plane finds new keys, the listener that holds them.
    pub fn unknown_key(&mut self, held: &str) -> DeltaDiscoveryRequest {
        self.request(ResourceType::Secret, vec![held.to_string()], Vec::new())
    }

    fn request(&mut self, kind: ResourceType, add: Vec<String>, drop: Vec<String>) -> DeltaDiscoveryRequest {
        let node = std::mem::take(&mut self.first).then(|| self.node.clone());
        let state = self.types.entry(kind).or_default();
        let fresh = !std::mem::replace(&mut state.subscribed, true);
        DeltaDiscoveryRequest {
            node,
            type_url: kind.url().into(),
            resource_names_subscribe: add,
            resource_names_unsubscribe: drop,
            initial_resource_versions: if fresh {
                state.versions.clone().into_iter().collect()
            } else {
                Default::default()
            },
            ..DeltaDiscoveryRequest::default()
        }
    }
}

/// A response that was refused because it could not be decoded.
#[derive(Debug)]
pub struct Refusal {
    /// What is sent back.
    pub request: Box<DeltaDiscoveryRequest>,
    /// Why, with the names of the resources at fault.
    pub message: String,
}

fn nack(type_url: String, nonce: String, message: String) -> DeltaDiscoveryRequest {
    /// `google.rpc.Code.INVALID_ARGUMENT`.
    const INVALID_ARGUMENT: i32 = 3;
    DeltaDiscoveryRequest {
        type_url,
        response_nonce: nonce,
        error_detail: Some(Status {
            code: INVALID_ARGUMENT,
            message,
            details: Vec::new(),
        }),
        ..DeltaDiscoveryRequest::default()
    }
}

/// Decodes one resource to its name and changes; inlined key sets become secrets of their own.
fn decode_one(
    kind: ResourceType,
    resource: &str,
    any: &Any,
    references: &mut References,
) -> Result<(String, Vec<Change>), DecodeError> {
    Ok(match kind {
        ResourceType::Cluster => {
            let cluster = decode::cluster(any)?;
            cluster_references(&cluster, references);
            (cluster.name.clone(), vec![Change::Upsert(Decoded::Cluster(cluster))])
        }
        ResourceType::Endpoints => {
            let endpoints = decode::endpoints(any)?;
            (
                endpoints.cluster.clone(),
                vec![Change::Upsert(Decoded::Endpoints(endpoints))],
            )
        }
        ResourceType::Listener => {
            let listener = decode::listener(any)?;
            listener_references(&listener, references);
            (listener.name.clone(), vec![Change::Upsert(Decoded::Listener(listener))])
        }
        ResourceType::Routes => {
            let table = decode::route_table(any)?;
            for host in &table.hosts {
                route_references(&host.routes, references);
            }
            (table.name.clone(), vec![Change::Upsert(Decoded::Routes(table))])
        }
        ResourceType::VirtualHosts => {
            let host = decode::virtual_host(any)?;
            route_references(&host.routes, references);
            // Its own name is not the resource's, which says where it belongs.
            let name = resource.to_string();
            (name.clone(), vec![Change::Upsert(Decoded::VirtualHost(name, host))])
        }
        ResourceType::Destinations => {
            let list = decode::destinations(any)?;
            (list.name.clone(), vec![Change::Upsert(Decoded::Destinations(list))])
        }
        ResourceType::Secret => {
            let secret = decode::secret(any)?;
            (secret.name.clone(), vec![Change::Upsert(Decoded::Secret(secret))])
        }
    })
}

fn cluster_references(cluster: &Cluster, out: &mut References) {
    if let Discovery::Eds { service } = &cluster.discovery {
        out.insert((ResourceType::Endpoints, service.clone()));
    }
    if let ClusterTls::Always(tls) | ClusterTls::Auto(tls) = &cluster.tls {
        for name in [&tls.certificate, &tls.trust_bundle].into_iter().flatten() {
            out.insert((ResourceType::Secret, name.clone()));
        }
    }
}

fn listener_references(listener: &Listener, out: &mut References) {
    for chain in listener.all_chains() {
        if let Some(tls) = &chain.tls {
            out.insert((ResourceType::Secret, tls.certificate.clone()));
            out.extend(tls.trust_bundle.clone().map(|n| (ResourceType::Secret, n)));
        }
        let (custom, cluster) = match &chain.filters {
            Filters::Http(http) => {
                match &http.routes {
                    RouteSource::Named(name) => drop(out.insert((ResourceType::Routes, name.clone()))),
                    RouteSource::Inline(table) => {
                        for host in &table.hosts {
                            route_references(&host.routes, out);
                        }
                    }
                }
                (&http.custom, None)
            }
            Filters::Tcp(tcp) => (&tcp.custom, Some(tcp.cluster.as_str())),
        };
        let clusters = custom.iter().filter_map(CustomStage::cluster).chain(cluster);
        out.extend(clusters.map(|name| (ResourceType::Cluster, name.to_string())));
    }
}

fn route_references(routes: &[Route], out: &mut References) {
    for route in routes {
        if let RouteAction::Forward(forward) = &route.action {
            let clusters = forward.clusters.iter();
            out.extend(clusters.map(|(name, _)| (ResourceType::Cluster, name.clone())));
        }
    }
}

#[cfg(test)]
mod tests;
