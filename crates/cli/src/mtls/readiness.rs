//! What telemetry and configuration say about STRICT. Pure: facts in, conclusions out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use mantlet_api::destination_rule::ClientTlsMode;
use mantlet_translate::destination_rule::{Client, applied, expand_host, specificity};
use mantlet_translate::endpoint::target_port;
use mantlet_translate::peer_authentication::{self, Mode};
use mantlet_translate::world::World;
use mantlet_translate::world::workload::Workload;
use serde::Serialize;

/// What is known.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Objects.
    pub world: World,
    /// Pods beyond what the world keeps, by namespace and name.
    pub pods: BTreeMap<(String, String), PodFacts>,
    /// Traffic that proxies counted on the receiving side.
    pub flows: Vec<Flow>,
    /// Proxies that did not answer.
    pub silent: Vec<String>,
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Whether it has a proxy.
    pub meshed: bool,
    /// Address.
    pub ip: String,
    /// Ports that its containers declare, the proxy's left out.
    pub ports: BTreeSet<u16>,
    /// Ports on which the kubelet probes the application directly by HTTP or gRPC.
    pub probes: BTreeSet<u16>,
    /// Whether it belongs to the system or to the control plane.
    pub system: bool,
}

/// Traffic from one source to one workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// `namespace/workload`, `pod namespace/name` or an address; `unknown` when nothing tells.
    pub source: String,
    /// `namespace/workload`.
    pub destination: String,
    /// Host that was addressed; empty when unknown.
    pub service: String,
    /// Port of the workload, where it is known.
    pub port: Option<u16>,
    /// Requests or connections in plaintext.
    pub plaintext: u64,
    /// Requests or connections in mutual TLS.
    pub mutual: u64,
    /// What is counted: `requests` or `connections`.
    pub unit: &'static str,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.source, self.destination)?;
        if let Some(port) = self.port {
            write!(f, ":{port}")?;
        }
        if !self.service.is_empty() {
            write!(f, " ({})", self.service)?;
        }
        write!(f, ": {} {}", self.plaintext, self.unit)
    }
}

/// A port of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// `namespace/workload`.
    pub workload: String,
    /// Number.
    pub port: u16,
    /// `service:port` in front of it.
    pub service: Option<String>,
    /// Effective mode.
    pub mode: &'static str,
    /// Plaintext requests and connections through the service (or to the workload, where no service is known).
    pub plaintext: u64,
    /// The same in mutual TLS.
    pub mutual: u64,
    /// Why STRICT would break something.
    pub reasons: Vec<String>,
}

/// A DestinationRule by which clients do not use the mesh's mutual TLS.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleRow {
    /// `namespace/name`.
    pub rule: String,
    /// Host of the service.
    pub host: String,
    /// Port of the service.
    pub port: u16,
    /// The clients' mode.
    pub mode: &'static str,
    /// Namespaces of the clients.
    pub clients: Vec<String>,
}

impl fmt::Display for RuleRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "DestinationRule {}: TLS mode {} to {}:{} (clients in {})",
            self.rule,
            self.mode,
            self.host,
            self.port,
            self.clients.join(", ")
        )
    }
}

/// A probe that goes to the application directly.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// `namespace/pod`.
    pub pod: String,
    /// Port.
    pub port: u16,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} port {}: the kubelet sends plaintext; remove the annotation sidecar.istio.io/rewriteAppHTTPProbers: \"false\"",
            self.pod, self.port
        )
    }
}

/// The conclusions about the mesh as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Every port of every workload of the mesh.
    pub ports: Vec<Port>,
    /// Who sends plaintext to whom.
    pub plaintext: Vec<Flow>,
    /// Rules that would break.
    pub rules: Vec<RuleRow>,
    /// Probes that would break.
    pub probes: Vec<Probe>,
    /// Pods without sidecar.
    pub outside: Vec<String>,
}

/// A port whose mode changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortChange {
    /// `namespace/workload`.
    pub workload: String,
    /// Number.
    pub port: u16,
    /// Mode now.
    pub before: &'static str,
    /// Mode afterwards.
    pub after: &'static str,
}

/// The conclusions about a change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Changes {
    /// Ports whose mode changes.
    pub ports: Vec<PortChange>,
    /// What breaks: seen in traffic, or certain by configuration.
    pub breaks: Vec<String>,
    /// What may break, but was not seen.
    pub risks: Vec<String>,
}

fn mode_text(mode: Mode) -> &'static str {
    match mode {
        Mode::Disable => "DISABLE",
        Mode::Permissive => "PERMISSIVE",
        Mode::Strict => "STRICT",
    }
}

fn client_text(mode: ClientTlsMode) -> &'static str {
    match mode {
        ClientTlsMode::Disable => "DISABLE",
        ClientTlsMode::Simple => "SIMPLE",
        ClientTlsMode::Mutual => "MUTUAL",
        ClientTlsMode::IstioMutual => "ISTIO_MUTUAL",
    }
}

/// `namespace/workload` of a pod.
fn workload_name(pod: &Workload) -> String {
    format!("{}/{}", pod.namespace, pod.telemetry.name)
}

/// Pods of the mesh that receive traffic, gateways and the control plane left out; one per workload.
fn workloads<'a>(facts: &'a Facts, only: Option<&str>) -> BTreeMap<String, &'a Workload> {
    let mut out = BTreeMap::new();
    let namespaces: Vec<&str> = facts.world.namespaces().collect();
    for namespace in namespaces {
        if only.is_some_and(|only| only != namespace) {
            continue;
        }
        for pod in facts.world.pods(namespace) {
            let known = facts.pods.get(&(pod.namespace.clone(), pod.name.clone()));
            if known.is_some_and(|p| p.meshed && !p.system) {
                out.entry(workload_name(pod)).or_insert(&**pod);
            }
        }
    }
    out
}

/// Ports of a workload, with the service port in front of each where there is one: host, name and number of the service.
fn ports_of(facts: &Facts, pod: &Workload) -> BTreeMap<u16, Option<(String, String, u16)>> {
    let mut out = BTreeMap::new();
    if let Some(known) = facts.pods.get(&(pod.namespace.clone(), pod.name.clone())) {
        out.extend(known.ports.iter().map(|port| (*port, None)));
    }
    for service in facts.world.services_of_workload(&pod.namespace, &pod.labels) {
        for port in &service.ports {
            if let Some(target) = target_port(&port.target, pod) {
                out.insert(target, Some((service.host.clone(), service.name.clone(), port.number)));
            }
        }
    }
    out
}

/// The mesh as it is.
pub fn report(facts: &Facts, only: Option<&str>) -> Report {
    let rules = rules(&facts.world);
    let all = workloads(facts, only);
    let mut out = Report {
        plaintext: facts
            .flows
            .iter()
            .filter(|f| f.plaintext > 0 && all.contains_key(&f.destination))
            .cloned()
            .collect(),
        ..Report::default()
    };
    out.plaintext.sort();
    let mut hosts = BTreeSet::new();
    for (name, pod) in &all {
        let effective = peer_authentication::effective(&facts.world, &pod.namespace, &pod.labels);
        for (port, service) in ports_of(facts, pod) {
            let meant = |f: &&Flow| {
                f.destination == *name
                    && match (&service, f.port) {
                        (_, Some(of)) => of == port,
                        (Some((host, _, _)), None) => f.service == *host || f.service.is_empty(),
                        (None, None) => f.service.is_empty(),
                    }
            };
            // The same traffic is counted by metrics, and named by address in logs; logs carry no count of their own.
            let counted = || facts.flows.iter().filter(meant);
            let plaintext: u64 = counted().map(|f| f.plaintext).sum();
            let mutual: u64 = counted().map(|f| f.mutual).sum();
            let mut reasons = Vec::new();
            if plaintext > 0 {
                reasons.push(format!("plaintext: {plaintext}"));
            }
            if let Some((host, _, number)) = &service {
                hosts.insert(host.clone());
                for rule in rules.iter().filter(|r| r.host == *host && r.port == *number) {
                    reasons.push(rule.to_string());
                }
            }
            for probe in probes(facts, name).into_iter().filter(|p| p.port == port) {
                reasons.push(probe.to_string());
            }
            out.ports.push(Port {
                workload: name.clone(),
                port,
                service: service.map(|(_, name, number)| format!("{name}:{number}")),
                mode: mode_text(effective.port(port)),
                plaintext,
                mutual,
                reasons,
            });
        }
        out.probes.extend(probes(facts, name));
    }
    out.rules = rules.into_iter().filter(|r| hosts.contains(&r.host)).collect();
    out.outside = outside(facts);
    out
}

/// Probes of a workload's pods that go to the application directly.
fn probes(facts: &Facts, workload: &str) -> Vec<Probe> {
    let mut out = Vec::new();
    for ((namespace, name), known) in &facts.pods {
        let Some(pod) = facts.world.pod(namespace, name) else {
            continue;
        };
        if known.meshed && workload_name(pod) == workload {
            out.extend(known.probes.iter().map(|port| Probe {
                pod: format!("{namespace}/{name}"),
                port: *port,
            }));
        }
    }
    out
}

/// Pods without proxy that could be clients.
fn outside(facts: &Facts) -> Vec<String> {
    facts
        .pods
        .iter()
        .filter(|(_, p)| !p.meshed && !p.system)
        .map(|((namespace, name), _)| format!("{namespace}/{name}"))
        .collect()
}

/// Rules by which clients reach services of the mesh without its mutual TLS.
fn rules(world: &World) -> Vec<RuleRow> {
    let mut out: BTreeMap<(String, String, u16, &'static str), BTreeSet<String>> = BTreeMap::new();
    let namespaces: Vec<&str> = world.namespaces().collect();
    let no_labels = BTreeMap::new();
    for owner in &namespaces {
        for rule in world.destination_rules(owner).iter().filter(|r| r.broken.is_none()) {
            let pattern = expand_host(&rule.spec.host, owner, &world.mesh().domain);
            let mut subsets: Vec<Option<&str>> = vec![None];
            subsets.extend(
                rule.spec
                    .subsets
                    .iter()
                    .filter(|s| s.traffic_policy.is_some())
                    .map(|s| Some(s.name.as_str())),
            );
            let labels = rule
                .spec
                .workload_selector
                .as_ref()
                .map_or(&no_labels, |s| &s.match_labels);
            for namespace in &namespaces {
                let client = Client { namespace, labels };
                for service in world.visible_services(namespace).filter(|s| !s.external) {
                    if specificity(&pattern, &service.host).is_none() {
                        continue;
                    }
                    let Some(found) = applied(world, client, service) else {
                        continue;
                    };
                    for port in &service.ports {
                        for subset in &subsets {
                            let Some(tls) = found.settings(port.number, *subset).tls else {
                                continue;
                            };
                            if tls.mode != ClientTlsMode::IstioMutual && says(&rule.spec, tls) {
                                out.entry((
                                    format!("{owner}/{}", rule.meta.name),
                                    service.host.clone(),
                                    port.number,
                                    client_text(tls.mode),
                                ))
                                .or_default()
                                .insert((*namespace).to_string());
                            }
                        }
                    }
                }
            }
        }
    }
    out.into_iter()
        .map(|((rule, host, port, mode), clients)| RuleRow {
            rule,
            host,
            port,
            mode,
            clients: clients.into_iter().collect(),
        })
        .collect()
}

/// Whether settings come from this rule: they are a part of it.
fn says(rule: &mantlet_api::DestinationRule, tls: &mantlet_api::destination_rule::ClientTlsSettings) -> bool {
    rule.traffic_policy
        .iter()
        .chain(rule.subsets.iter().filter_map(|s| s.traffic_policy.as_ref()))
        .flat_map(|p| {
            p.tls
                .iter()
                .chain(p.port_level_settings.iter().filter_map(|e| e.tls.as_ref()))
        })
        .any(|own| std::ptr::eq(own, tls))
}

/// What a change would do: `before` is the world now, `facts.world` the one with the change.
pub fn changes(before: &World, facts: &Facts, only: Option<&str>) -> Changes {
    let mut out = Changes::default();
    let rules = rules(&facts.world);
    let mut breaks = BTreeSet::new();
    let mut stricter: BTreeSet<String> = BTreeSet::new();
    for (name, pod) in workloads(facts, only) {
        let now = peer_authentication::effective(before, &pod.namespace, &pod.labels);
        let then = peer_authentication::effective(&facts.world, &pod.namespace, &pod.labels);
        for (port, service) in ports_of(facts, pod) {
            let (a, b) = (now.port(port), then.port(port));
            if a != b {
                out.ports.push(PortChange {
                    workload: name.clone(),
                    port,
                    before: mode_text(a),
                    after: mode_text(b),
                });
            }
            let of_service = |r: &&RuleRow| {
                service
                    .as_ref()
                    .is_some_and(|(host, _, number)| r.host == *host && r.port == *number)
            };
            if b == Mode::Strict {
                // Also where the mode stays: a rule may be what changes.
                for rule in rules.iter().filter(of_service) {
                    breaks.insert(format!("{rule}: {name}:{port} would be STRICT"));
                }
            }
            if b != Mode::Strict || a == Mode::Strict {
                continue;
            }
            stricter.insert(name.clone());
            for flow in facts.flows.iter().filter(|f| f.destination == name && f.plaintext > 0) {
                let meant = match (flow.port, &service) {
                    (Some(of), _) => of == port,
                    (None, Some((host, _, _))) => flow.service == *host || flow.service.is_empty(),
                    (None, None) => flow.service.is_empty(),
                };
                if meant {
                    breaks.insert(format!("plaintext now: {flow}"));
                }
            }
            for probe in probes(facts, &name).into_iter().filter(|p| p.port == port) {
                breaks.insert(format!("probe of {probe}"));
            }
        }
    }
    out.breaks = breaks.into_iter().collect();
    if !stricter.is_empty() {
        let servers = stricter.into_iter().collect::<Vec<_>>().join(", ");
        out.risks = outside(facts)
            .into_iter()
            .map(|pod| format!("{pod} has no sidecar; its calls to {servers} would be refused"))
            .collect();
    }
    out
}

#[cfg(test)]
mod tests;
