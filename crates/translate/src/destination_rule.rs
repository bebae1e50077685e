//! Which DestinationRule a client applies to a service, and the settings of one port and subset (SEMANTICS 1f).
//!
//! Called by `cluster` for every outbound cluster. Reads the world only.

use std::collections::BTreeMap;

use mantlet_api::DestinationRule;
use mantlet_api::destination_rule::{
    ClientTlsSettings, ConnectionPoolSettings, LoadBalancerSettings, OutlierDetection, TrafficPolicy,
};

use crate::world::service::{ExportTo, Service};
use crate::world::{Config, World};

/// The client that asks.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its labels.
    pub labels: &'a BTreeMap<String, String>,
}

/// The rules that apply to a service, merged.
#[derive(Clone, Debug, Default)]
pub struct Applied<'a> {
    /// First top-level policy.
    policy: Option<&'a TrafficPolicy>,
    /// Subsets; the first of a name.
    pub subsets: Vec<&'a mantlet_api::destination_rule::Subset>,
    /// Whether the rule selects client workloads, as `credentialName` on sidecars needs (S1.116).
    pub selects_clients: bool,
}

/// Settings of one cluster.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings<'a> {
    /// Load balancing.
    pub load_balancer: Option<&'a LoadBalancerSettings>,
    /// Bounds.
    pub connection_pool: Option<&'a ConnectionPoolSettings>,
    /// Ejection.
    pub outlier: Option<&'a OutlierDetection>,
    /// TLS; `None` leaves the choice to auto mTLS.
    pub tls: Option<&'a ClientTlsSettings>,
}

/// The rules for `service` as seen by `client`: the client's namespace, the service's, then the root namespace; the
/// first one with a rule for the host wins whole (S1.101, S1.102), even if that rule is for other clients only.
pub fn applied<'a>(world: &'a World, client: Client<'_>, service: &Service) -> Option<Applied<'a>> {
    let root = world.mesh().root_namespace.as_str();
    let own = |rule: &Rule<'_>| client.namespace != root || rule.export == ExportTo::Namespaces(vec![root.into()]);
    let exported =
        |rule: &Rule<'_>| rule.config.spec.workload_selector.is_none() && rule.export.visible_to(client.namespace);
    in_namespace(world, client.namespace, client, service, own)
        .or_else(|| in_namespace(world, &service.namespace, client, service, exported))
        .or_else(|| in_namespace(world, root, client, service, exported))
        .flatten()
}

/// A rule that names the service.
struct Rule<'a> {
    config: &'a Config<DestinationRule>,
    export: ExportTo,
    /// How exactly it does.
    score: usize,
}

/// The namespaces that see a rule: its own list, or the mesh's default (S1.108). One with `workloadSelector` is private (S1.107).
pub fn export(world: &World, rule: &Config<DestinationRule>) -> ExportTo {
    let own = rule.meta.namespace.as_str();
    if rule.spec.workload_selector.is_some() {
        return ExportTo::Namespaces(vec![own.to_string()]);
    }
    let list = if rule.spec.export_to.is_empty() {
        &world.mesh().default_rule_export
    } else {
        &rule.spec.export_to
    };
    ExportTo::parse(list.iter().map(String::as_str), own)
}

/// What a namespace's rules say about the service; `Some(None)` when it has a rule, but none for this client.
fn in_namespace<'a>(
    world: &'a World,
    namespace: &str,
    client: Client<'_>,
    service: &Service,
    counts: impl Fn(&Rule<'a>) -> bool,
) -> Option<Option<Applied<'a>>> {
    let domain = world.mesh().domain.as_str();
    let mut rules: Vec<Rule<'a>> = world
        .destination_rules(namespace)
        .iter()
        .map(|r| &**r)
        .filter(|r| r.broken.is_none())
        .filter_map(|config| {
            let host = expand_host(&config.spec.host, namespace, domain);
            Some(Rule {
                config,
                export: export(world, config),
                score: specificity(&host, &service.host)?,
            })
        })
        .filter(counts)
        .collect();
    // The most exact host alone counts (S1.103); its rules are sorted oldest first.
    let best = rules.iter().map(|r| r.score).max()?;
    rules.retain(|r| r.score == best);
    // A rule with workloadSelector beats those without and takes nothing over from them (S1.107).
    let selecting = rules.iter().find(|r| {
        let selector = r.config.spec.workload_selector.as_ref();
        selector.is_some_and(|s| s.matches(client.labels))
    });
    if let Some(first) = selecting {
        let selector = &first.config.spec.workload_selector;
        let same = rules.iter().filter(|r| r.config.spec.workload_selector == *selector);
        return Some(Some(merge(same, true)));
    }
    let mut general = rules
        .iter()
        .filter(|r| r.config.spec.workload_selector.is_none())
        .peekable();
    let Some(first) = general.peek() else {
        return Some(None);
    };
    // Rules that other namespaces see in another way are not merged; the first one counts (S1.106).
    let export = first.export.clone();
    Some(Some(merge(general.filter(|r| r.export == export), false)))
}

/// Rules of the same host: subsets are joined, the first top-level policy counts (S1.105). Oldest first.
fn merge<'r, 'a: 'r>(rules: impl Iterator<Item = &'r Rule<'a>>, selects_clients: bool) -> Applied<'a> {
    let mut out = Applied {
        selects_clients,
        ..Applied::default()
    };
    for rule in rules {
        let spec = &rule.config.spec;
        if out.policy.is_none() {
            out.policy = spec.traffic_policy.as_ref();
        }
        for subset in &spec.subsets {
            if !out.subsets.iter().any(|s| s.name == subset.name) {
                out.subsets.push(subset);
            }
        }
    }
    out
}

impl<'a> Applied<'a> {
    /// Settings of a service port, and of a subset of it (S1.110, S1.111).
    pub fn settings(&self, port: u16, subset: Option<&'a str>) -> Settings<'a> {
        let mut settings = Settings::default();
        settings.overlay(self.policy);
        settings.replace_port(self.policy, port);
        if let Some(name) = subset {
            let policy = self
                .subsets
                .iter()
                .find(|s| s.name == name)
                .and_then(|s| s.traffic_policy.as_ref());
            settings.overlay(policy);
            settings.replace_port(policy, port);
        }
        settings
    }
}

impl<'a> Settings<'a> {
    /// Fields that the policy sets.
    fn overlay(&mut self, policy: Option<&'a TrafficPolicy>) {
        let Some(policy) = policy else { return };
        self.load_balancer = policy.load_balancer.as_ref().or(self.load_balancer);
        self.connection_pool = policy.connection_pool.as_ref().or(self.connection_pool);
        self.outlier = policy.outlier_detection.as_ref().or(self.outlier);
        self.tls = policy.tls.as_ref().or(self.tls);
    }

    /// A port entry replaces the block: what it leaves out is unset, not inherited.
    fn replace_port(&mut self, policy: Option<&'a TrafficPolicy>, port: u16) {
        let entry = policy.and_then(|p| {
            p.port_level_settings
                .iter()
                .find(|e| e.port.as_ref().is_some_and(|n| n.number == u32::from(port)))
        });
        if let Some(entry) = entry {
            *self = Settings {
                load_balancer: entry.load_balancer.as_ref(),
                connection_pool: entry.connection_pool.as_ref(),
                outlier: entry.outlier_detection.as_ref(),
                tls: entry.tls.as_ref(),
            };
        }
    }
}

/// A short name stands for a service of the object's own namespace (S1.100).
pub fn expand_host(host: &str, namespace: &str, domain: &str) -> String {
    if host.contains('.') || host.starts_with('*') || host.is_empty() {
        host.to_ascii_lowercase()
    } else {
        format!("{}.{namespace}.svc.{domain}", host.to_ascii_lowercase())
    }
}

/// How exactly a pattern names a host: exact beats wildcards, longer wildcards beat shorter ones (S1.103).
pub fn specificity(pattern: &str, host: &str) -> Option<usize> {
    match pattern.strip_prefix('*') {
        None => (pattern == host).then_some(usize::MAX),
        Some("") => Some(0),
        Some(suffix) => (host.len() > suffix.len() && host.ends_with(suffix)).then_some(suffix.len()),
    }
}
