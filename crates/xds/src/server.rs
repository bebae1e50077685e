//! The server's side of one xDS stream as state machines: requests and resource sets in, responses and events out.
//!
//! [`DeltaServer`] speaks incremental xDS (Mantlet's proxy, istio-agent, newer Envoys), [`SotwServer`] the older
//! state-of-the-world variant (stock Envoy, gRPC). `ads` moves their messages over tonic; tests move them by hand.
//! Nothing here sleeps, spawns or knows who the peer is.
//!
//! Order of sending is make before break: clusters, endpoints, listeners, routes, secrets; clusters and endpoints that
//! are gone are withdrawn only when nothing that may still refer to them is under way. At most one response per type
//! waits for its answer, so a slow proxy is never buried under pushes: it gets the newest state when it answers.
//!
//! Looking for something to send takes as long as what has changed, not as long as what there is: each type remembers the
//! resources that it has looked at, and names that must be looked at again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::ControlPlane;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use mantlet_model::SharedMap;
use mantlet_model::route::VirtualHostName;

use crate::resources::{Encoded, ResourceSet, ResourceType};

/// Largest number of names that one stream may subscribe to per type; more is refused.
pub const MAX_SUBSCRIPTIONS: usize = 100_000;
/// Longest error text that is kept of a NACK, in bytes.
const MAX_NACK_TEXT: usize = 4096;

/// Number of names looked at from which it is worth finding out whether the peer holds everything there is.
const WHOLE_FROM: usize = 64;

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
    /// The stream looked at a set of resources of this revision: of these types nothing of it is left to send, and every answer is
    /// here.
    Looked {
        /// See [`ResourceSet::revision`].
        revision: u64,
        /// Types.
        idle: Vec<ResourceType>,
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
    names: BTreeSet<Arc<str>>,
    /// What the peer holds, as far as it was told.
    known: SharedMap<Encoded>,
    /// Names that were reported as missing, so that this is not repeated.
    reported_missing: BTreeSet<Arc<str>>,
    /// A subscription is answered even when nothing differs, so that the peer's initialisation goes on.
    must_answer: bool,
    in_flight: Option<InFlight>,
    /// Content that the peer refused: not sent again until it changes.
    refused: BTreeMap<Arc<str>, Arc<Encoded>>,
    /// The resources that were looked at last. A name whose resource is still the same one, and that is not in `stale`, needs
    /// nothing.
    seen: SharedMap<Encoded>,
    /// Names that must be looked at: what the peer wants or holds of them may have changed.
    stale: BTreeSet<Arc<str>>,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    /// Upserts and removals as they will be known after an ACK.
    changes: BTreeMap<Arc<str>, Option<Arc<Encoded>>>,
    /// All that the peer will hold after an ACK, when that is exactly a set: shared with all peers of which it is true.
    whole: Option<SharedMap<Encoded>>,
}

impl DeltaType {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    /// What was not looked at as it is: everything, after such a change.
    fn set_wildcard(&mut self, wildcard: bool) {
        self.wildcard = wildcard;
        self.seen = SharedMap::default();
        let held = self.known.keys().cloned();
        let under_way = self.in_flight.iter_mut().flat_map(|flight| {
            flight.whole = None;
            flight.changes.keys().cloned()
        });
        self.stale.extend(held.chain(under_way));
    }

    /// The peer no longer counts as a holder of the resource.
    fn forget(&mut self, name: &str) {
        self.known.remove(name);
        if let Some(flight) = &mut self.in_flight {
            flight.whole = None;
        }
    }

    /// Adds what has changed since the last look to the names to look at: of virtual hosts, those whose table has changed.
    fn look(&mut self, kind: ResourceType, map: &SharedMap<Encoded>) {
        if kind == ResourceType::VirtualHosts {
            for (table, _, _) in self.seen.diff(map) {
                let of_table =
                    |name: &Arc<str>| VirtualHostName::parse(name).is_some_and(|name| name.table == &**table);
                self.stale
                    .extend(self.names.iter().filter(|name| of_table(name)).cloned());
            }
            self.seen = map.clone();
            return;
        }
        for (name, _, _) in self.seen.diff(map) {
            if self.wildcard || self.names.contains(name) || self.known.contains_key(name) {
                self.stale.insert(name.clone());
            }
        }
        self.seen = map.clone();
    }

    /// The resource of a name that the peer wants, under the name that all share.
    fn find(&self, kind: ResourceType, set: &ResourceSet, name: &Arc<str>) -> Option<(Arc<str>, Arc<Encoded>)> {
        if !self.wants(name) {
            return None;
        }
        if kind == ResourceType::VirtualHosts {
            return Some((name.clone(), set.virtual_host(name)?));
        }
        set.map(kind)
            .entry(name)
            .map(|(name, found)| (name.clone(), found.clone()))
    }

    /// Whether the peer, once it has everything that it wants, holds all of `map`.
    fn wants_all(&self, map: &SharedMap<Encoded>) -> bool {
        self.wildcard || (map.len() <= self.names.len() && map.keys().all(|name| self.names.contains(name)))
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
            if request.initial_resource_versions.len() > MAX_SUBSCRIPTIONS {
                return Err(ProtocolError::TooManyNames { kind });
            }
            for (name, version) in request.initial_resource_versions {
                let name: Arc<str> = name.into();
                state.known.insert(name.clone(), Arc::new(Encoded::held(version)));
                state.stale.insert(name);
            }
            if kind.is_wildcard() && request.resource_names_subscribe.is_empty() {
                state.set_wildcard(true);
            }
        }

        if !request.response_nonce.is_empty() {
            match state.in_flight.take() {
                Some(flight) if flight.nonce == request.response_nonce => {
                    if let Some(detail) = request.error_detail {
                        // Remember what was refused, so that only new content is tried.
                        for (name, encoded) in flight.changes {
                            match encoded {
                                Some(encoded) => drop(state.refused.insert(name, encoded)),
                                None => drop(state.known.remove(&name)),
                            }
                        }
                        let mut message = detail.message;
                        truncate(&mut message, MAX_NACK_TEXT);
                        let nonce = request.response_nonce;
                        self.events.push(StreamEvent::Nacked { kind, nonce, message });
                    } else {
                        if let Some(whole) = flight.whole {
                            state.refused.clear();
                            state.known = whole;
                        } else {
                            for (name, encoded) in flight.changes {
                                state.refused.remove(&name);
                                match encoded {
                                    Some(encoded) => drop(state.known.insert(name, encoded)),
                                    None => drop(state.known.remove(&name)),
                                }
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
                // Of virtual hosts there is no list.
                if kind != ResourceType::VirtualHosts {
                    state.set_wildcard(true);
                }
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
            let name: Arc<str> = name.into();
            if !first {
                state.forget(&name);
                state.refused.remove(&name);
            }
            state.reported_missing.remove(&name);
            state.stale.insert(name.clone());
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
                state.set_wildcard(false);
                continue;
            }
            let name: Arc<str> = name.into();
            state.names.remove(&name);
            state.reported_missing.remove(&name);
            if !state.wildcard {
                state.forget(&name);
            }
            state.stale.insert(name);
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

    /// About how many resources [`Self::poll`] would send: an upper bound, found without encoding anything.
    pub fn weight(&self, set: &ResourceSet) -> usize {
        let idle = self.types.iter().filter(|(_, state)| state.in_flight.is_none());
        idle.map(|(kind, state)| {
            let changed = state.seen.diff(set.map(looked_at(*kind))).len();
            let changed = if state.wildcard {
                changed
            } else {
                changed.min(state.names.len())
            };
            state.stale.len().max(changed)
        })
        .sum()
    }

    /// Whether any response waits for its answer.
    pub fn is_waiting(&self) -> bool {
        self.types.values().any(|state| state.in_flight.is_some())
    }

    /// Types of which no response waits for its answer.
    pub fn idle(&self) -> Vec<ResourceType> {
        let idle = self.types.iter().filter(|(_, state)| state.in_flight.is_none());
        idle.map(|(kind, _)| *kind).collect()
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
        let map = set.map(looked_at(kind));
        state.look(kind, map);
        let mut changes: BTreeMap<Arc<str>, Option<Arc<Encoded>>> = BTreeMap::new();
        let mut resources = Vec::new();
        let mut removed = Vec::new();
        let mut rewarmed = Vec::new();
        let many = state.wildcard || state.stale.len() >= WHOLE_FROM;
        for name in std::mem::take(&mut state.stale) {
            if let Some((shared, encoded)) = state.find(kind, set, &name) {
                let known = state.known.get(&name);
                let updated = known.is_some();
                if known.is_some_and(|known| known.is_same(&encoded)) {
                    state.refused.remove(&name);
                    continue;
                }
                if let Some(refused) = state.refused.get(&name) {
                    if refused.is_same(&encoded) {
                        continue;
                    }
                    state.refused.remove(&name);
                }
                if updated {
                    rewarmed.extend(encoded.eds_service().map(str::to_string));
                }
                if state.names.contains(&name) {
                    // One text for all who subscribe to the name.
                    state.names.replace(shared.clone());
                }
                state.reported_missing.remove(&name);
                resources.push(Resource {
                    name: name.to_string(),
                    version: encoded.version().to_string(),
                    resource: Some(encoded.any(kind)),
                    ..Resource::default()
                });
                changes.insert(shared, Some(encoded));
                continue;
            }
            state.refused.remove(&name);
            // A name that does not exist is said to be missing once, so that the peer need not wait for it.
            let held = state.known.contains_key(&name);
            let missing = state.names.contains(&name) && !state.reported_missing.contains(&name);
            if !held && !missing {
                continue;
            }
            if keep_removed {
                state.stale.insert(name);
                continue;
            }
            removed.push(name.to_string());
            changes.insert(name.clone(), None);
            state.reported_missing.insert(name);
        }
        if changes.is_empty() && !state.must_answer {
            return None;
        }
        state.must_answer = false;
        self.next_nonce += 1;
        let nonce = self.next_nonce.to_string();
        let settled = state.stale.is_empty() && state.refused.is_empty();
        state.in_flight = Some(InFlight {
            nonce: nonce.clone(),
            whole: (settled && many && kind != ResourceType::VirtualHosts && state.wants_all(map)).then(|| map.clone()),
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
                let name: Arc<str> = name.into();
                endpoints.forget(&name);
                // What is under way was sent before the cluster: its ACK says nothing about the warming that follows.
                if let Some(flight) = &mut endpoints.in_flight {
                    flight.changes.remove(&name);
                }
                endpoints.stale.insert(name);
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
    names: BTreeSet<Arc<str>>,
    wildcard: bool,
    /// Whether `seen` holds all that the peer asks for, and nothing else.
    whole: bool,
    /// What the last response held.
    sent: Option<SharedMap<Encoded>>,
    /// The resources that were looked at last; the same ones need nothing.
    seen: Option<SharedMap<Encoded>>,
    nonce: String,
    waiting: bool,
    /// Whether the last answer was a refusal: nothing of that response counts as held.
    refused: bool,
    must_answer: bool,
}

impl SotwType {
    /// Takes note of the resources that there are now.
    fn look(&mut self, map: &SharedMap<Encoded>) {
        let former = self.seen.replace(map.clone());
        let same_names =
            former.is_some_and(|former| former.diff(map).iter().all(|(_, a, b)| a.is_some() && b.is_some()));
        if same_names {
            return;
        }
        let all = map.len() == self.names.len() && map.keys().zip(&self.names).all(|(a, b)| a == b);
        self.whole = self.wildcard || all;
        // One text for all who ask for the name.
        let shared = |name: &Arc<str>| map.entry(name).map_or(name, |(shared, _)| shared).clone();
        self.names = self.names.iter().map(shared).collect();
    }
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
            state.refused = request.error_detail.is_some();
            self.events.push(match request.error_detail {
                Some(detail) => {
                    let mut message = detail.message;
                    truncate(&mut message, MAX_NACK_TEXT);
                    StreamEvent::Nacked { kind, nonce, message }
                }
                None => StreamEvent::Acked { kind, nonce },
            });
        }
        // Every answer repeats all names, nearly always in the same order.
        let told = || request.resource_names.iter().map(String::as_str);
        if !first && told().eq(state.names.iter().map(|name| &**name)) {
            return Ok(());
        }
        let names: BTreeSet<Arc<str>> = request.resource_names.into_iter().map(Arc::from).collect();
        let wildcard = names.contains("*") || (kind.is_wildcard() && names.is_empty());
        if names != state.names || wildcard != state.wildcard {
            // A wider subscription is answered even when the new names do not exist; a narrower one is not.
            if names.iter().any(|n| !state.names.contains(n)) {
                state.must_answer = true;
            }
            state.names = names;
            state.wildcard = wildcard;
            state.seen = None;
        }
        Ok(())
    }

    /// About how many resources [`Self::poll`] would send: an upper bound, found without encoding anything.
    pub fn weight(&self, set: &ResourceSet) -> usize {
        let idle = self.types.iter().filter(|(kind, state)| {
            let known = state.seen.as_ref().is_some_and(|seen| seen.is_same(set.map(**kind)));
            !state.waiting && (state.must_answer || !known)
        });
        idle.map(|(kind, state)| {
            if state.wildcard {
                set.len(*kind)
            } else {
                state.names.len()
            }
        })
        .sum()
    }

    /// Whether any response waits for its answer.
    pub fn is_waiting(&self) -> bool {
        self.types.values().any(|state| state.waiting)
    }

    /// Types of which no response waits for its answer.
    pub fn idle(&self) -> Vec<ResourceType> {
        let idle = self.types.iter().filter(|(_, state)| !state.waiting);
        idle.map(|(kind, _)| *kind).collect()
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
            let map = set.map(kind);
            if !state.must_answer && state.seen.as_ref().is_some_and(|seen| seen.is_same(map)) {
                continue;
            }
            state.look(map);
            let chosen = if state.whole {
                map.clone()
            } else {
                let found = state.names.iter().filter_map(|name| map.entry(name));
                found.map(|(name, encoded)| (name.clone(), encoded.clone())).collect()
            };
            let mut changed = None;
            if let Some(sent) = &state.sent
                && !state.must_answer
            {
                let is_same = |a: Option<&Arc<Encoded>>, b: Option<&Arc<Encoded>>| match (a, b) {
                    (Some(a), Some(b)) => a.is_same(b),
                    _ => false,
                };
                // Types with explicit names have no removal in this protocol: an answer with fewer resources changes
                // nothing at the peer, so a pure loss needs no message.
                let silent = |a: Option<&Arc<Encoded>>, b: Option<&Arc<Encoded>>| {
                    is_same(a, b) || (b.is_none() && !kind.is_wildcard())
                };
                let mut differences = sent.diff(&chosen);
                differences.retain(|(_, a, b)| !silent(*a, *b));
                if differences.is_empty() {
                    state.sent = Some(chosen);
                    continue;
                }
                // What is not in the answer stays as it is at the peer, so that one service's endpoints do not cost all of them.
                if !kind.is_wildcard() && !state.refused {
                    changed = Some(differences.into_iter().filter_map(|(_, _, b)| b.cloned()).collect());
                }
            }
            state.must_answer = false;
            self.next_nonce += 1;
            state.nonce = self.next_nonce.to_string();
            state.waiting = true;
            let sending: Vec<Arc<Encoded>> = changed.unwrap_or_else(|| chosen.values().cloned().collect());
            let resources: Vec<_> = sending.iter().map(|e| e.any(kind)).collect();
            state.sent = Some(chosen);
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

/// The resources on which those of a type depend: virtual hosts are parts of tables.
fn looked_at(kind: ResourceType) -> ResourceType {
    match kind {
        ResourceType::VirtualHosts => ResourceType::Routes,
        other => other,
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
