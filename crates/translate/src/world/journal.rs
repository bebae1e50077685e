//! What has changed since when, so that whoever keeps results of translation repeats no more than a change can influence.
//!
//! The world writes it, [`crate::Translator`] reads it. Whatever is not known to be narrow counts as a change of everything: a
//! missing entry would leave proxies with configuration that no longer holds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Effect, Scope, World};

/// Most narrow changes that are remembered; more count as a change of everything.
const MAX_NARROW: usize = 4096;

/// A change of which only some services' clusters and endpoints depend.
#[derive(Clone, Debug)]
pub(super) enum Touch {
    /// The service of this host.
    Host(String),
    /// Slices of a Kubernetes Service: namespace and name.
    Slices(String, String),
    /// A pod: namespace and name.
    Pod(String, String),
    /// All services of a namespace.
    Namespace(String),
}

/// Revisions of changes.
#[derive(Clone, Debug, Default)]
pub(super) struct Journal {
    /// Outbound revision of the last change that any cluster may depend on.
    clusters: u64,
    /// Outbound revision of the last change of which services, rules and settings there are.
    listing: u64,
    /// Later changes that some clusters depend on.
    narrow: VecDeque<(u64, Touch)>,
    /// Grows with every change of an inbound side.
    inbound: u64,
    /// Its value at the last change of all inbound sides.
    inbound_all: u64,
    /// Its value at the last change of a namespace's.
    inbound_of: BTreeMap<String, u64>,
}

/// Services whose clusters and endpoints may have changed, by host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hosts {
    /// All of them.
    All,
    /// These, and no other.
    These(BTreeSet<String>),
}

/// What outbound configuration may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Clusters and endpoints.
    pub hosts: Hosts,
    /// Listeners and route tables, and which services there are.
    pub listing: bool,
}

impl World {
    /// Grows with every change that can influence outbound configuration.
    pub fn outbound_revision(&self) -> u64 {
        self.outbound_revision
    }

    /// The outbound revision of the last change of which services, rules and settings there are. Pods and slices are none of it.
    pub fn listing_revision(&self) -> u64 {
        self.journal.listing
    }

    /// Grows with every change that can influence the inbound side of a namespace's workloads, but for their own pods.
    pub fn inbound_revision(&self, namespace: &str) -> u64 {
        let own = self.journal.inbound_of.get(namespace).copied().unwrap_or_default();
        own.max(self.journal.inbound_all)
    }

    /// What may have changed since the outbound revision was `revision`.
    pub fn touched_since(&self, revision: u64) -> Touched {
        let journal = &self.journal;
        let listing = revision < journal.listing;
        if revision < journal.clusters {
            return Touched {
                hosts: Hosts::All,
                listing,
            };
        }
        let mut hosts = BTreeSet::new();
        let mut pods: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (_, touch) in journal.narrow.iter().filter(|(at, _)| *at > revision) {
            match touch {
                Touch::Host(host) => drop(hosts.insert(host.clone())),
                Touch::Slices(namespace, service) => hosts.extend(self.host_of(namespace, service)),
                Touch::Pod(namespace, pod) => drop(pods.entry(namespace).or_default().insert(pod)),
                Touch::Namespace(namespace) => {
                    let space = self.namespaces.get(namespace).into_iter();
                    let services = space.flat_map(|n| n.services.values().chain(n.entries.values().flatten()));
                    hosts.extend(services.map(|s| s.host.clone()));
                }
            }
        }
        for (namespace, pods) in pods {
            hosts.extend(self.hosts_of_pods(namespace, &pods));
        }
        Touched {
            hosts: Hosts::These(hosts),
            listing,
        }
    }

    fn host_of(&self, namespace: &str, service: &str) -> Option<String> {
        Some(self.namespaces.get(namespace)?.services.get(service)?.host.clone())
    }

    /// Services that some of these pods may be behind, or may have been.
    fn hosts_of_pods(&self, namespace: &str, pods: &BTreeSet<&str>) -> Vec<String> {
        let Some(space) = self.namespaces.get(namespace) else {
            return Vec::new();
        };
        let named = space.slices.iter().filter(|(_, slices)| {
            let mut endpoints = slices.values().flat_map(|slice| &slice.endpoints);
            endpoints.any(|e| e.pod.as_deref().is_some_and(|pod| pods.contains(pod)))
        });
        let mut out: Vec<String> = named
            .filter_map(|(service, _)| Some(space.services.get(service)?.host.clone()))
            .collect();
        // Which pods a selector had chosen is not remembered.
        let selecting = space.entries.values().flatten().filter(|s| !s.selector.is_empty());
        out.extend(selecting.map(|s| s.host.clone()));
        out
    }

    /// Everything outbound has changed.
    pub(super) fn changed_outbound(&mut self, effect: Effect) -> Effect {
        self.outbound_revision += 1;
        self.journal.clusters = self.outbound_revision;
        self.journal.listing = self.outbound_revision;
        self.journal.narrow.clear();
        self.stamped(effect)
    }

    /// Listeners and routes have changed, and the clusters of these hosts.
    pub(super) fn changed_listing(&mut self, effect: Effect, hosts: impl IntoIterator<Item = String>) -> Effect {
        self.outbound_revision += 1;
        self.journal.listing = self.outbound_revision;
        hosts.into_iter().for_each(|host| self.narrow(Touch::Host(host)));
        self.stamped(effect)
    }

    /// Clusters and endpoints of some services have changed.
    pub(super) fn changed_clusters(&mut self, effect: Effect, touches: impl IntoIterator<Item = Touch>) -> Effect {
        self.outbound_revision += 1;
        touches.into_iter().for_each(|touch| self.narrow(touch));
        self.stamped(effect)
    }

    /// Clusters and endpoints of all services have changed.
    pub(super) fn changed_all_clusters(&mut self, effect: Effect) -> Effect {
        self.outbound_revision += 1;
        self.journal.clusters = self.outbound_revision;
        self.journal.narrow.clear();
        self.stamped(effect)
    }

    fn narrow(&mut self, touch: Touch) {
        let journal = &mut self.journal;
        if journal.narrow.len() >= MAX_NARROW {
            journal.clusters = self.outbound_revision;
            journal.narrow.clear();
        } else {
            journal.narrow.push_back((self.outbound_revision, touch));
        }
    }

    /// Notes whose inbound sides an effect is on.
    pub(super) fn stamped(&mut self, effect: Effect) -> Effect {
        let journal = &mut self.journal;
        match &effect.inbound {
            Scope::None => {}
            Scope::Namespaces(names) => {
                journal.inbound += 1;
                for name in names {
                    journal.inbound_of.insert(name.clone(), journal.inbound);
                }
            }
            Scope::All => {
                journal.inbound += 1;
                journal.inbound_all = journal.inbound;
                journal.inbound_of.clear();
            }
        }
        effect
    }
}
