//! The proxy's side of an incremental xDS stream as a state machine: responses in, requests and typed changes out.
//!
//! Each response is taken whole or not at all: [`DeltaClient::on_response`] decodes all of its resources first, the
//! proxy applies them, and only then [`DeltaClient::accept`] acknowledges; a resource that cannot be decoded or applied
//! refuses the whole response with a text that names it, and the former configuration stays.
//!
//! The client follows references by itself: clusters name endpoints, listeners name route tables and secrets. What it
//! holds survives a broken stream; the next one starts with the versions at hand.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use envoy_types::pb::google::rpc::Status;
use mantlet_model::cluster::{ClusterTls, Discovery};
use mantlet_model::http::RouteSource;
use mantlet_model::listener::Filters;
use mantlet_model::{Cluster, Endpoints, Listener, RouteTable, Secret};

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
    /// A secret.
    Secret(Secret),
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
    first: bool,
}

impl DeltaClient {
    /// A client for this node.
    pub fn new(node: Node) -> Self {
        DeltaClient {
            node,
            types: ResourceType::ALL
                .into_iter()
                .map(|t| (t, TypeState::default()))
                .collect(),
            inlined: BTreeMap::new(),
            first: true,
        }
    }

    /// The requests that open a stream: wildcard listeners and clusters, and all names that are known from before.
    pub fn start(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.first = true;
        for state in self.types.values_mut() {
            state.subscribed = false;
        }
        let mut out = Vec::new();
        for kind in ResourceType::ALL {
            let state = &self.types[&kind];
            if kind.is_wildcard() || !state.names.is_empty() {
                let names = state.names.iter().cloned().collect();
                out.push(self.request(kind, names, Vec::new()));
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
            let Some(any) = &resource.resource else {
                errors.push(format!("{}: resource without content", resource.name));
                continue;
            };
            let mut references = References::new();
            match decode_one(kind, any, &mut references) {
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
            // Missing names that were never held are no change.
            if self.types[&kind].versions.contains_key(&name) {
                pending.changes.push(Change::Remove(kind, name.clone()));
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
        let wanted: BTreeSet<(ResourceType, String)> = self
            .types
            .values()
            .flat_map(|t| t.references.values().flatten())
            .cloned()
            .collect();
        for kind in [ResourceType::Endpoints, ResourceType::Routes, ResourceType::Secret] {
            let names: BTreeSet<String> = wanted
                .iter()
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
            if !add.is_empty() || !drop.is_empty() {
                out.push(self.request(kind, add, drop));
            }
        }
        Accepted {
            requests: out,
            forgotten,
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
            (table.name.clone(), vec![Change::Upsert(Decoded::Routes(table))])
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
        if let Filters::Http(http) = &chain.filters
            && let RouteSource::Named(name) = &http.routes
        {
            out.insert((ResourceType::Routes, name.clone()));
        }
    }
}

#[cfg(test)]
mod tests;
