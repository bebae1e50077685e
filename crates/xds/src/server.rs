//! The server's side of one xDS stream as state machines: requests and resource sets in, responses and events out.
//!
//! [`DeltaServer`] speaks incremental xDS (Mantlet's proxy, istio-agent, newer Envoys), [`SotwServer`] the older
//! state-of-the-world variant (stock Envoy, gRPC). `ads` moves their messages over tonic; tests move them by hand.
//! Nothing here sleeps, spawns or knows who the peer is.
//!
//! Order of sending is make before break: clusters, endpoints, listeners, routes, secrets; clusters and endpoints that
//! are gone are withdrawn only when nothing that may still refer to them is under way. At most one response per type
//! waits for its answer, so a slow proxy is never buried under pushes: it gets the newest state when it answers.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::envoy::config::core::v3::ControlPlane;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};

use crate::resources::{ResourceSet, ResourceType};

/// Largest number of names that one stream may subscribe to per type; more is refused.
pub const MAX_SUBSCRIPTIONS: usize = 100_000;
/// Longest error text that is kept of a NACK, in bytes.
const MAX_NACK_TEXT: usize = 4096;

/// How names of key sets begin.
pub const KEY_SET_PREFIX: &str = "jwks/";
/// Most key sets that one request can report.
const MAX_REPORTS: usize = 16;

/// What happened on a stream, for status pages and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// The peer subscribed to a type for the first time.
    Subscribed {
        /// Type.
        kind: ResourceType,
    },
    /// The peer holds key sets (by [`KEY_SET_PREFIX`] and hash) that lack the key of a token that it met.
    UnknownKeys {
        /// Names of the key sets.
        held: Vec<String>,
    },
    /// A response was handed to the transport.
    Sent {
        /// Type.
        kind: ResourceType,
        /// Nonce.
        nonce: String,
        /// Number of resources in it.
        resources: usize,
        /// Bytes of these resources.
        bytes: usize,
    },
    /// The peer accepted a response.
    Acked {
        /// Type.
        kind: ResourceType,
        /// Nonce.
        nonce: String,
    },
    /// The peer refused a response.
    Nacked {
        /// Type.
        kind: ResourceType,
        /// Nonce.
        nonce: String,
        /// The peer's reason, cut to a few kilobytes.
        message: String,
    },
    /// The peer asked for a type that Mantlet does not serve; it is answered with silence, as Istio does.
    UnknownType {
        /// Type URL.
        url: String,
    },
    /// The stream ended.
    Closed,
}

/// A request that breaks the protocol; the stream must end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Too many names.
    #[error("{kind}: more than {MAX_SUBSCRIPTIONS} resource names subscribed")]
    TooManyNames {
        /// Type.
        kind: ResourceType,
    },
}

#[derive(Debug, Default)]
struct DeltaType {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Versions that the peer holds, as far as it was told.
    known: BTreeMap<String, String>,
    /// Names that were reported as missing, so that this is not repeated.
    reported_missing: BTreeSet<String>,
    /// A subscription is answered even when nothing differs, so that the peer's initialisation goes on.
    must_answer: bool,
    in_flight: Option<InFlight>,
    /// Content that the peer refused: not sent again until it changes.
    refused: BTreeMap<String, String>,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    /// Upserts and removals as they will be known after an ACK.
    changes: BTreeMap<String, Option<String>>,
}

impl DeltaType {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }
}

/// Incremental xDS, server's side.
#[derive(Debug, Default)]
pub struct DeltaServer {
    types: BTreeMap<ResourceType, DeltaType>,
    next_nonce: u64,
    events: Vec<StreamEvent>,
    identifier: String,
}

impl DeltaServer {
    /// A new stream; `identifier` names this control plane in responses.
    pub fn new(identifier: impl Into<String>) -> Self {
        DeltaServer {
            identifier: identifier.into(),
            ..DeltaServer::default()
        }
    }

    /// Events since the last call.
    pub fn take_events(&mut self) -> Vec<StreamEvent> {
        std::mem::take(&mut self.events)
    }

    /// Takes a request in. Call [`Self::poll`] afterwards.
    pub fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), ProtocolError> {
        let Some(kind) = ResourceType::from_url(&request.type_url) else {
            self.events.push(StreamEvent::UnknownType { url: request.type_url });
            return Ok(());
        };
        let first = !self.types.contains_key(&kind);
        let state = self.types.entry(kind).or_default();
        if first {
            self.events.push(StreamEvent::Subscribed { kind });
            state.must_answer = true;
            // Only the first request of a type may carry what the peer kept from an earlier stream.
            state.known = request.initial_resource_versions.into_iter().collect();
            if state.known.len() > MAX_SUBSCRIPTIONS {
                return Err(ProtocolError::TooManyNames { kind });
            }
            if kind.is_wildcard() && request.resource_names_subscribe.is_empty() {
                state.wildcard = true;
            }
        }

        if !request.response_nonce.is_empty() {
            match state.in_flight.take() {
                Some(flight) if flight.nonce == request.response_nonce => {
                    if let Some(detail) = request.error_detail {
                        // Remember what was refused, so that only new content is tried.
                        for (name, version) in flight.changes {
                            match version {
                                Some(version) => drop(state.refused.insert(name, version)),
                                None => drop(state.known.remove(&name)),
                            }
                        }
                        let mut message = detail.message;
                        truncate(&mut message, MAX_NACK_TEXT);
                        let nonce = request.response_nonce;
                        self.events.push(StreamEvent::Nacked { kind, nonce, message });
                    } else {
                        for (name, version) in flight.changes {
                            state.refused.remove(&name);
                            match version {
                                Some(version) => drop(state.known.insert(name, version)),
                                None => drop(state.known.remove(&name)),
                            }
                        }
                        let nonce = request.response_nonce;
                        self.events.push(StreamEvent::Acked { kind, nonce });
                    }
                }
                // An answer to something older: the newest response is still on its way.
                other => state.in_flight = other,
            }
        }

        let mut held = Vec::new();
        for name in request.resource_names_subscribe {
            if name == "*" {
                state.wildcard = true;
                continue;
            }
            // No resource has such a name: key sets travel inside listeners. Asking for one says that it is out of date.
            if kind == ResourceType::Secret && name.starts_with(KEY_SET_PREFIX) {
                if held.len() < MAX_REPORTS {
                    held.push(name);
                }
                continue;
            }
            // A repeated subscription asks for the resource again, as after an unsubscribe on the way.
            // On a fresh stream the names are those that the peer kept, with the versions it told.
            if !first {
                state.known.remove(&name);
                state.refused.remove(&name);
            }
            state.reported_missing.remove(&name);
            state.names.insert(name);
        }
        if !held.is_empty() {
            self.events.push(StreamEvent::UnknownKeys { held });
        }
        if state.names.len() > MAX_SUBSCRIPTIONS {
            return Err(ProtocolError::TooManyNames { kind });
        }
        for name in request.resource_names_unsubscribe {
            if name == "*" {
                state.wildcard = false;
                continue;
            }
            state.names.remove(&name);
            state.reported_missing.remove(&name);
            if !state.wildcard {
                state.known.remove(&name);
            }
        }
        Ok(())
    }

    /// The responses that bring the peer to `set`, in sending order; empty when it is up to date or must answer first.
    pub fn poll(&mut self, set: &ResourceSet) -> Vec<DeltaDiscoveryResponse> {
        let mut out = Vec::new();
        for kind in ResourceType::ALL {
            // What other resources refer to is taken away last, and never while their update is unanswered.
            let keep = matches!(kind, ResourceType::Cluster | ResourceType::Endpoints);
            if let Some(response) = self.respond(kind, set, keep) {
                out.push(response);
            }
        }
        let referrers = [ResourceType::Listener, ResourceType::Routes];
        // A peer that refused a listener or route table still runs its old one, which needs the old clusters.
        let busy = |kind| {
            self.types
                .get(kind)
                .is_some_and(|t| t.in_flight.is_some() || !t.refused.is_empty())
        };
        if !referrers.iter().any(busy) {
            for kind in [ResourceType::Endpoints, ResourceType::Cluster] {
                if let Some(response) = self.respond(kind, set, false) {
                    out.push(response);
                }
            }
        }
        out
    }

    /// Whether a response of this type waits for its answer.
    pub fn in_flight(&self, kind: ResourceType) -> bool {
        self.types.get(&kind).is_some_and(|t| t.in_flight.is_some())
    }

    /// Whether the peer subscribed to this type.
    pub fn is_subscribed(&self, kind: ResourceType) -> bool {
        self.types.contains_key(&kind)
    }

    fn respond(&mut self, kind: ResourceType, set: &ResourceSet, keep_removed: bool) -> Option<DeltaDiscoveryResponse> {
        let state = self.types.get_mut(&kind)?;
        if state.in_flight.is_some() {
            return None;
        }
        state
            .refused
            .retain(|name, version| set.get(kind, name).is_some_and(|e| e.version == *version));
        let mut changes = BTreeMap::new();
        let mut resources = Vec::new();
        let mut rewarmed = Vec::new();
        let mut add = |name: &str, encoded: &crate::resources::Encoded, state: &DeltaType| {
            if state.known.get(name) == Some(&encoded.version) || state.refused.get(name) == Some(&encoded.version) {
                return;
            }
            if state.known.contains_key(name) {
                rewarmed.extend(encoded.eds_service().map(str::to_string));
            }
            changes.insert(name.to_string(), Some(encoded.version.clone()));
            resources.push(Resource {
                name: name.to_string(),
                version: encoded.version.clone(),
                resource: Some(encoded.any.clone()),
                ..Resource::default()
            });
        };
        if state.wildcard {
            for (name, encoded) in set.all(kind) {
                add(name, encoded, state);
            }
        } else {
            for name in &state.names {
                if let Some(encoded) = set.get(kind, name) {
                    add(name, encoded, state);
                }
            }
        }
        let mut removed = Vec::new();
        if !keep_removed {
            let gone: Vec<String> = state
                .known
                .keys()
                .filter(|name| !state.wants(name) || set.get(kind, name).is_none())
                .cloned()
                .collect();
            // A name that does not exist is said to be missing once, so that the peer need not wait for it.
            let missing = state.names.iter().filter(|n| set.get(kind, n).is_none());
            let missing: Vec<String> = missing
                .filter(|n| !state.reported_missing.contains(*n))
                .cloned()
                .collect();
            for name in gone.into_iter().chain(missing) {
                if changes.insert(name.clone(), None).is_none() {
                    state.reported_missing.insert(name.clone());
                    removed.push(name);
                }
            }
        }
        for name in changes.iter().filter(|(_, v)| v.is_some()).map(|(n, _)| n) {
            state.reported_missing.remove(name);
        }
        if changes.is_empty() && !state.must_answer {
            return None;
        }
        state.must_answer = false;
        self.next_nonce += 1;
        let nonce = self.next_nonce.to_string();
        state.in_flight = Some(InFlight {
            nonce: nonce.clone(),
            changes,
        });
        self.events.push(StreamEvent::Sent {
            kind,
            nonce: nonce.clone(),
            resources: resources.len(),
            bytes: resources
                .iter()
                .filter_map(|r| r.resource.as_ref())
                .map(|a| a.value.len())
                .sum(),
        });
        // Envoy warms a changed cluster and waits for its endpoints, even if they are the same.
        if let Some(endpoints) = self.types.get_mut(&ResourceType::Endpoints) {
            for name in rewarmed {
                endpoints.known.remove(&name);
                // What is under way was sent before the cluster: its ACK says nothing about the warming that follows.
                if let Some(flight) = &mut endpoints.in_flight {
                    flight.changes.remove(&name);
                }
            }
        }
        Some(DeltaDiscoveryResponse {
            system_version_info: nonce.clone(),
            resources,
            type_url: kind.url().into(),
            removed_resources: removed,
            nonce,
            control_plane: Some(ControlPlane {
                identifier: self.identifier.clone(),
            }),
            ..DeltaDiscoveryResponse::default()
        })
    }
}

#[derive(Debug, Default)]
struct SotwType {
    names: BTreeSet<String>,
    wildcard: bool,
    /// Fingerprint of the last response: names and versions.
    sent: Option<Vec<(String, String)>>,
    nonce: String,
    waiting: bool,
    must_answer: bool,
}

/// State-of-the-world xDS, server's side.
#[derive(Debug, Default)]
pub struct SotwServer {
    types: BTreeMap<ResourceType, SotwType>,
    next_nonce: u64,
    events: Vec<StreamEvent>,
    identifier: String,
}

impl SotwServer {
    /// A new stream; `identifier` names this control plane in responses.
    pub fn new(identifier: impl Into<String>) -> Self {
        SotwServer {
            identifier: identifier.into(),
            ..SotwServer::default()
        }
    }

    /// Events since the last call.
    pub fn take_events(&mut self) -> Vec<StreamEvent> {
        std::mem::take(&mut self.events)
    }

    /// Takes a request in. Call [`Self::poll`] afterwards.
    pub fn on_request(&mut self, request: DiscoveryRequest) -> Result<(), ProtocolError> {
        let Some(kind) = ResourceType::from_url(&request.type_url) else {
            self.events.push(StreamEvent::UnknownType { url: request.type_url });
            return Ok(());
        };
        let first = !self.types.contains_key(&kind);
        let state = self.types.entry(kind).or_default();
        if first {
            state.must_answer = true;
            self.events.push(StreamEvent::Subscribed { kind });
        } else if !request.response_nonce.is_empty() && request.response_nonce != state.nonce {
            // An answer to something older: a newer response is under way, whose answer will carry the names.
            return Ok(());
        }
        if request.resource_names.len() > MAX_SUBSCRIPTIONS {
            return Err(ProtocolError::TooManyNames { kind });
        }
        if !first && !request.response_nonce.is_empty() && state.waiting {
            state.waiting = false;
            let nonce = request.response_nonce.clone();
            self.events.push(match request.error_detail {
                Some(detail) => {
                    let mut message = detail.message;
                    truncate(&mut message, MAX_NACK_TEXT);
                    StreamEvent::Nacked { kind, nonce, message }
                }
                None => StreamEvent::Acked { kind, nonce },
            });
        }
        let names: BTreeSet<String> = request.resource_names.into_iter().collect();
        let wildcard = names.contains("*") || (kind.is_wildcard() && names.is_empty());
        if names != state.names || wildcard != state.wildcard {
            // A wider subscription is answered even when the new names do not exist; a narrower one is not.
            if names.iter().any(|n| !state.names.contains(n)) {
                state.must_answer = true;
            }
            state.names = names;
            state.wildcard = wildcard;
        }
        Ok(())
    }

    /// The responses that bring the peer to `set`, in sending order.
    pub fn poll(&mut self, set: &ResourceSet) -> Vec<DiscoveryResponse> {
        let mut out = Vec::new();
        for kind in ResourceType::ALL {
            let Some(state) = self.types.get_mut(&kind) else {
                continue;
            };
            if state.waiting {
                continue;
            }
            let chosen: Vec<_> = set
                .all(kind)
                .filter(|(name, _)| state.wildcard || state.names.contains(*name))
                .collect();
            let print: Vec<(String, String)> = chosen.iter().map(|(n, e)| (n.to_string(), e.version.clone())).collect();
            if state.sent.as_ref() == Some(&print) && !state.must_answer {
                continue;
            }
            // Types with explicit names have no removal in this protocol: an answer with fewer resources changes
            // nothing at the peer, so a pure loss needs no message.
            let lost_only = !kind.is_wildcard()
                && !state.must_answer
                && state
                    .sent
                    .as_ref()
                    .is_some_and(|old| print.iter().all(|p| old.contains(p)));
            if lost_only {
                state.sent = Some(print);
                continue;
            }
            state.must_answer = false;
            self.next_nonce += 1;
            state.nonce = self.next_nonce.to_string();
            state.waiting = true;
            state.sent = Some(print);
            let resources: Vec<_> = chosen.iter().map(|(_, e)| e.any.clone()).collect();
            // Envoy warms changed clusters and waits for their endpoints, even if those are the same.
            if kind == ResourceType::Cluster
                && let Some(endpoints) = self.types.get_mut(&ResourceType::Endpoints)
            {
                endpoints.must_answer = true;
            }
            let state = self.types.entry(kind).or_default();
            self.events.push(StreamEvent::Sent {
                kind,
                nonce: state.nonce.clone(),
                resources: resources.len(),
                bytes: resources.iter().map(|a| a.value.len()).sum(),
            });
            out.push(DiscoveryResponse {
                version_info: state.nonce.clone(),
                resources,
                type_url: kind.url().into(),
                nonce: state.nonce.clone(),
                control_plane: Some(ControlPlane {
                    identifier: self.identifier.clone(),
                }),
                ..DiscoveryResponse::default()
            });
        }
        out
    }
}

/// Cuts at a character boundary.
fn truncate(text: &mut String, limit: usize) {
    if text.len() > limit {
        let mut end = limit;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
}

#[cfg(test)]
mod tests;
