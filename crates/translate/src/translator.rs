//! One proxy's configuration, and the cache that shares what proxies have in common.
//!
//! `control` owns one [`Translator`] and asks for a snapshot per proxy and change. Outbound configuration is
//! built once per namespace (and labels, where rules look at them) and world revision. Values that did not change keep
//! their `Arc` from one revision to the next, so that equality is a pointer comparison for whoever diffs snapshots.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mantlet_model::ProxySnapshot;

use crate::destination_rule::Client;
use crate::gateway;
use crate::node::{NodeKind, ProxyNode};
use crate::sidecar::outbound::Common;
use crate::sidecar::{inbound, outbound};
use crate::world::World;
use crate::world::workload::Workload;

/// Everything the proxy has to know, without any sharing. Pure; the same world and node give the same result.
pub fn translate(world: &World, node: &ProxyNode) -> ProxySnapshot {
    Translator::default().snapshot(world, node)
}

/// Views of clients that are kept before stale ones are dropped.
const MAX_SHARED: usize = 1024;

/// Namespace and, where needed, labels of clients that see the same.
type ClientKey = (String, BTreeMap<String, String>);

/// Translates for many proxies.
#[derive(Debug, Default)]
pub struct Translator {
    outbound: HashMap<ClientKey, Shared>,
    /// What clients of ordinary namespaces share, and the revision that it is of.
    common: Option<(u64, Common)>,
    proxies: HashMap<String, ProxySnapshot>,
}

#[derive(Debug)]
struct Shared {
    revision: u64,
    snapshot: ProxySnapshot,
}

impl Translator {
    /// The snapshot of one proxy.
    pub fn snapshot(&mut self, world: &World, node: &ProxyNode) -> ProxySnapshot {
        let workload = workload(world, node);
        let labels = workload.map_or(&node.labels, |w| &w.labels);
        let mut snapshot = match node.kind {
            NodeKind::Sidecar => {
                let mut snapshot = self.outbound(world, &node.namespace, labels).clone();
                outbound::without_own_address(&mut snapshot, node.ip);
                inbound::build(world, &node.namespace, labels, workload.map(|w| &**w), &mut snapshot);
                snapshot
            }
            NodeKind::Router => gateway::build(world, &node.namespace, labels, workload.map(|w| &**w)),
        };
        if let Some(former) = self.proxies.get(&node.id) {
            keep_equal(&mut snapshot, former);
        }
        self.proxies.insert(node.id.clone(), snapshot.clone());
        snapshot
    }

    /// Forgets a proxy that is gone.
    pub fn forget(&mut self, node_id: &str) {
        self.proxies.remove(node_id);
        if self.proxies.is_empty() {
            self.outbound.clear();
            self.common = None;
        }
    }

    fn outbound(&mut self, world: &World, namespace: &str, labels: &BTreeMap<String, String>) -> &ProxySnapshot {
        let relevant = if labels_matter(world, namespace) {
            labels.clone()
        } else {
            BTreeMap::new()
        };
        let revision = world.outbound_revision();
        if self.outbound.len() >= MAX_SHARED {
            // Views of clients that are gone; those in use are of this revision or built anew.
            self.outbound.retain(|_, shared| shared.revision == revision);
        }
        let shared = self
            .outbound
            .entry((namespace.to_string(), relevant))
            .or_insert_with(|| Shared {
                // Never a revision of a world.
                revision: u64::MAX,
                snapshot: ProxySnapshot::default(),
            });
        if shared.revision != revision {
            let client = Client { namespace, labels };
            let mut fresh = if outbound::is_common(world, namespace) {
                outbound::with_routes(world, client, common(&mut self.common, world))
            } else {
                outbound::build(world, client)
            };
            keep_equal(&mut fresh, &shared.snapshot);
            shared.snapshot = fresh;
            shared.revision = revision;
        }
        &shared.snapshot
    }
}

/// What clients of ordinary namespaces share, of the world's revision.
fn common<'a>(kept: &'a mut Option<(u64, Common)>, world: &World) -> &'a Common {
    let revision = world.outbound_revision();
    let former = kept.take();
    let common = match former {
        Some((of, common)) if of == revision => common,
        former => {
            // A namespace that no object has: it owns no rules.
            let nobody = Client {
                namespace: "",
                labels: &BTreeMap::new(),
            };
            let mut fresh = outbound::common(world, nobody);
            if let Some((_, former)) = &former {
                keep_equal(&mut fresh.snapshot, &former.snapshot);
            }
            fresh
        }
    };
    &kept.insert((revision, common)).1
}

/// The registry's view of the pod behind a node.
fn workload<'a>(world: &'a World, node: &ProxyNode) -> Option<&'a Arc<Workload>> {
    world.pod(&node.namespace, &node.name)
}

/// Whether any rule that clients in a namespace see looks at their labels.
fn labels_matter(world: &World, namespace: &str) -> bool {
    world
        .destination_rules(namespace)
        .iter()
        .any(|r| r.spec.workload_selector.is_some())
        || world.virtual_services().iter().any(|v| {
            v.spec
                .http
                .iter()
                .flat_map(|h| &h.r#match)
                .any(|m| !m.source_labels.is_empty())
        })
}

/// Takes the former `Arc` of every value that is equal.
fn keep_equal(fresh: &mut ProxySnapshot, former: &ProxySnapshot) {
    fn keep<T: PartialEq>(fresh: &mut BTreeMap<String, Arc<T>>, former: &BTreeMap<String, Arc<T>>) {
        for (name, value) in fresh.iter_mut() {
            if let Some(old) = former.get(name)
                && !Arc::ptr_eq(old, value)
                && **old == **value
            {
                *value = old.clone();
            }
        }
    }
    keep(&mut fresh.listeners, &former.listeners);
    keep(&mut fresh.routes, &former.routes);
    keep(&mut fresh.clusters, &former.clusters);
    keep(&mut fresh.endpoints, &former.endpoints);
}
