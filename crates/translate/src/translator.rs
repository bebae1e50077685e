//! One proxy's configuration, and the cache that shares what proxies have in common.
//!
//! `control` owns one [`Translator`] and asks for a snapshot per proxy and change. Outbound configuration is
//! kept once per namespace (and labels, where rules look at them) and brought up to date by what the world says has changed; the inbound side is kept
//! per proxy until something that it depends on changes. Values that did not change keep their `Arc`, and maps that did not change
//! stay one map, so that whoever compares snapshots looks at differences alone.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mantlet_model::{ProxySnapshot, SharedMap, SharedSnapshot};

use crate::destination_rule::Client;
use crate::gateway;
use crate::node::{NodeKind, ProxyNode};
use crate::route::SharedHosts;
use crate::sidecar::inbound;
use crate::sidecar::outbound::{self, Common, settle};
use crate::world::World;
use crate::world::workload::Workload;

/// Everything the proxy has to know, without any sharing. Pure; the same world and node give the same result.
pub fn translate(world: &World, node: &ProxyNode) -> ProxySnapshot {
    Translator::default().snapshot(world, node).to_snapshot()
}

/// Views of clients that are kept before stale ones are dropped.
const MAX_SHARED: usize = 1024;

/// Namespace and, where needed, labels of clients that see the same.
type ClientKey = (String, BTreeMap<String, String>);

/// Translates for many proxies.
#[derive(Debug, Default)]
pub struct Translator {
    views: HashMap<ClientKey, View>,
    /// What clients of ordinary namespaces share.
    common: Common,
    /// What the route tables of the views share.
    hosts: SharedHosts,
    /// What follows from services, rules and settings alone.
    facts: Facts,
    proxies: HashMap<String, Kept>,
}

/// What a kind of clients sees.
#[derive(Debug, Default)]
struct View {
    revision: Option<u64>,
    /// Its own, where it cannot use the shared one.
    own: Option<Common>,
    /// [`Common::listing`] of what the routes were made of, and whether that was its own.
    listing: Option<(bool, u64)>,
    snapshot: SharedSnapshot,
}

/// Answers that hold as long as the listing revision.
#[derive(Debug, Default)]
struct Facts {
    revision: Option<u64>,
    all_exported: bool,
    /// Whether rules look at the labels of clients, by namespace.
    labels_matter: HashMap<String, bool>,
}

/// What a proxy was given last.
#[derive(Debug, Default)]
struct Kept {
    /// What its own part was made of.
    made_of: Option<MadeOf>,
    /// Its own part: the inbound side.
    own: SharedSnapshot,
    /// The view and the own part that `snapshot` is composed of.
    parts: (SharedSnapshot, SharedSnapshot),
    snapshot: SharedSnapshot,
}

/// Everything that an inbound side depends on.
#[derive(Debug, PartialEq)]
struct MadeOf {
    inbound: u64,
    listing: u64,
    node: ProxyNode,
    workload: Option<Arc<Workload>>,
}

impl Translator {
    /// The snapshot of one proxy.
    pub fn snapshot(&mut self, world: &World, node: &ProxyNode) -> SharedSnapshot {
        let workload = workload(world, node);
        let labels = workload.map_or(&node.labels, |w| &*w.labels);
        let mut kept = self.proxies.remove(&node.id).unwrap_or_default();
        match node.kind {
            NodeKind::Sidecar => {
                let view = self.view(world, &node.namespace, labels);
                let made_of = MadeOf {
                    inbound: world.inbound_revision(&node.namespace),
                    listing: world.listing_revision(),
                    node: node.clone(),
                    workload: workload.cloned(),
                };
                if kept.made_of.as_ref() != Some(&made_of) {
                    let mut own = ProxySnapshot::default();
                    inbound::build(world, &node.namespace, labels, workload.map(|w| &**w), &mut own);
                    replace(&mut kept.own, own);
                    if kept.made_of.as_ref().is_some_and(|former| former.node != *node) {
                        // What is taken away from the view may differ.
                        kept.parts = Default::default();
                        kept.snapshot = SharedSnapshot::default();
                    }
                    kept.made_of = Some(made_of);
                }
                kept.compose(view, node);
            }
            NodeKind::Router => {
                kept.made_of = None;
                kept.parts = Default::default();
                let fresh = gateway::build(world, &node.namespace, labels, workload.map(|w| &**w));
                replace(&mut kept.snapshot, fresh);
            }
        }
        let snapshot = kept.snapshot.clone();
        self.proxies.insert(node.id.clone(), kept);
        snapshot
    }

    /// Forgets a proxy that is gone.
    pub fn forget(&mut self, node_id: &str) {
        self.proxies.remove(node_id);
        if self.proxies.is_empty() {
            self.views.clear();
            self.common = Common::default();
        }
    }

    /// The outbound side of clients in a namespace with these labels.
    fn view(&mut self, world: &World, namespace: &str, labels: &BTreeMap<String, String>) -> SharedSnapshot {
        let relevant = if self.facts.labels_matter(world, namespace) {
            labels.clone()
        } else {
            BTreeMap::new()
        };
        let revision = Some(world.outbound_revision());
        if self.views.len() >= MAX_SHARED {
            // Views of clients that are gone; those in use are of this revision or built anew.
            self.views.retain(|_, view| view.revision == revision);
        }
        let view = self.views.entry((namespace.to_string(), relevant)).or_default();
        if view.revision == revision {
            return view.snapshot.clone();
        }
        let client = Client { namespace, labels };
        let shared = outbound::is_common(world, namespace, self.facts.all_exported);
        let common = if shared {
            view.own = None;
            // A namespace that no object has: it owns no rules.
            let nobody = Client {
                namespace: "",
                labels: &BTreeMap::new(),
            };
            self.common.update(world, nobody);
            &self.common
        } else {
            let own = view.own.get_or_insert_default();
            own.update(world, client);
            own
        };
        let mut snapshot = common.snapshot.clone();
        snapshot.routes = std::mem::take(&mut view.snapshot.routes);
        let listing = Some((shared, common.listing));
        if view.listing != listing {
            let routes = outbound::routes(world, client, common, &mut self.hosts);
            settle(&mut snapshot.routes, routes);
            view.listing = listing;
        }
        view.revision = revision;
        view.snapshot = snapshot.clone();
        snapshot
    }
}

impl Facts {
    fn refresh(&mut self, world: &World) {
        let revision = Some(world.listing_revision());
        if self.revision != revision {
            self.revision = revision;
            self.all_exported = world.all_exported();
            self.labels_matter.clear();
        }
    }

    /// Whether any rule that clients in a namespace see looks at their labels.
    fn labels_matter(&mut self, world: &World, namespace: &str) -> bool {
        self.refresh(world);
        if let Some(known) = self.labels_matter.get(namespace) {
            return *known;
        }
        let matter = world
            .destination_rules(namespace)
            .iter()
            .any(|r| r.spec.workload_selector.is_some())
            || world.virtual_services().iter().any(|v| {
                v.spec
                    .http
                    .iter()
                    .flat_map(|h| &h.r#match)
                    .any(|m| !m.source_labels.is_empty())
            });
        self.labels_matter.insert(namespace.to_string(), matter);
        matter
    }
}

impl Kept {
    /// Puts the view and the own part together, where one of them has changed.
    fn compose(&mut self, view: SharedSnapshot, node: &ProxyNode) {
        let (former, own) = (&self.parts, &self.own);
        let out = &mut self.snapshot;
        over(
            &mut out.routes,
            (&former.0.routes, &view.routes),
            (&former.1.routes, &own.routes),
            |_| {},
        );
        over(
            &mut out.clusters,
            (&former.0.clusters, &view.clusters),
            (&former.1.clusters, &own.clusters),
            |_| {},
        );
        over(
            &mut out.endpoints,
            (&former.0.endpoints, &view.endpoints),
            (&former.1.endpoints, &own.endpoints),
            |_| {},
        );
        over(
            &mut out.destinations,
            (&former.0.destinations, &view.destinations),
            (&former.1.destinations, &own.destinations),
            |_| {},
        );
        over(
            &mut out.listeners,
            (&former.0.listeners, &view.listeners),
            (&former.1.listeners, &own.listeners),
            |listeners| outbound::without_own_address(listeners, node.ip),
        );
        self.parts = (view, self.own.clone());
    }
}

/// `out` becomes the view's map, less what `take_away` removes, with the own values over it; it stays as it is when neither differs from
/// before.
fn over<T: PartialEq>(
    out: &mut SharedMap<T>,
    view: (&SharedMap<T>, &SharedMap<T>),
    own: (&SharedMap<T>, &SharedMap<T>),
    take_away: impl FnOnce(&mut SharedMap<T>),
) {
    if view.0.is_same(view.1) && own.0.is_same(own.1) {
        return;
    }
    *out = view.1.clone();
    take_away(out);
    for (name, value) in own.1.iter() {
        if out.get(name).is_none_or(|shared| shared != value) {
            out.insert(name.clone(), value.clone());
        }
    }
}

/// Takes the values of a snapshot over; equal ones stay as they are.
fn replace(kept: &mut SharedSnapshot, fresh: ProxySnapshot) {
    settle(&mut kept.listeners, fresh.listeners);
    settle(&mut kept.routes, fresh.routes);
    settle(&mut kept.clusters, fresh.clusters);
    settle(&mut kept.endpoints, fresh.endpoints);
    settle(&mut kept.destinations, fresh.destinations);
}

/// The registry's view of the pod behind a node.
fn workload<'a>(world: &'a World, node: &ProxyNode) -> Option<&'a Arc<Workload>> {
    world.pod(&node.namespace, &node.name)
}
