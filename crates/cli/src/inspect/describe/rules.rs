//! DestinationRules for a service: which subsets a pod is in, what clients do, and whether that fits what the pod accepts.

use mantlet_api::DestinationRule;
use mantlet_api::destination_rule::{ClientTlsMode, TrafficPolicy};
use mantlet_translate::destination_rule::{self, expand_host, specificity};
use mantlet_translate::peer_authentication::{self, Mode};
use mantlet_translate::world::service::{ExportTo, Service};
use mantlet_translate::world::workload::Workload;
use mantlet_translate::world::{Config, World};

use super::{line, short, target_number};

/// The rules that clients of the pod's own namespace apply to a service.
pub(super) struct Rules<'a> {
    world: &'a World,
    service: &'a Service,
    pod: Option<&'a Workload>,
    /// Oldest first; several of the same host are joined.
    found: Vec<&'a Config<DestinationRule>>,
}

impl<'a> Rules<'a> {
    /// Looks in the service's namespace, then in the root namespace; the most specific host wins (S1.101–S1.103).
    pub fn of(world: &'a World, service: &'a Service, pod: Option<&'a Workload>) -> Rules<'a> {
        let root = world.mesh().root_namespace.as_str();
        let mut found = Vec::new();
        for namespace in [service.namespace.as_str(), root] {
            let candidates = || {
                world
                    .destination_rules(namespace)
                    .iter()
                    .map(|r| &**r)
                    .filter(|r| r.broken.is_none() && r.spec.workload_selector.is_none())
                    .filter(|r| {
                        ExportTo::parse(r.spec.export_to.iter().map(String::as_str), namespace)
                            .visible_to(&service.namespace)
                            || namespace == service.namespace
                    })
                    .filter_map(|r| {
                        let host = expand_host(&r.spec.host, namespace, &world.mesh().domain);
                        Some((specificity(&host, &service.host)?, r))
                    })
            };
            if let Some(best) = candidates().map(|(score, _)| score).max() {
                found = candidates()
                    .filter(|(score, _)| *score == best)
                    .map(|(_, r)| r)
                    .collect();
                break;
            }
        }
        Rules {
            world,
            service,
            pod,
            found,
        }
    }

    /// Name of the rule that messages send the reader to.
    pub fn name(&self) -> Option<String> {
        self.found
            .first()
            .map(|r| short(&r.meta.name, &r.meta.namespace, &self.service.namespace))
    }

    /// Whether a subset is defined, and whether the pod is in it.
    pub fn subset(&self, name: &str) -> Option<bool> {
        let subset = self
            .found
            .iter()
            .flat_map(|r| &r.spec.subsets)
            .find(|s| s.name == name)?;
        Some(
            self.pod
                .is_some_and(|pod| mantlet_api::selector::subset(&subset.labels, &pod.labels)),
        )
    }

    /// Prints the rules.
    pub fn describe(&self, out: &mut String) {
        for rule in &self.found {
            line(
                out,
                format_args!(
                    "DestinationRule: {} for \"{}\"",
                    short(&rule.meta.name, &rule.meta.namespace, &self.service.namespace),
                    rule.spec.host
                ),
            );
            self.subsets(rule, out);
            match &rule.spec.traffic_policy {
                None => line(out, format_args!("   No Traffic Policy")),
                Some(policy) => traffic_policy(policy, out),
            }
        }
    }

    fn subsets(&self, rule: &Config<DestinationRule>, out: &mut String) {
        if rule.spec.subsets.is_empty() {
            return;
        }
        let Some(pod) = self.pod else {
            let all: Vec<&str> = rule.spec.subsets.iter().map(|s| s.name.as_str()).collect();
            line(out, format_args!("   Subsets: {}", all.join(",")));
            return;
        };
        let names = |matching: bool| {
            rule.spec
                .subsets
                .iter()
                .filter(|s| mantlet_api::selector::subset(&s.labels, &pod.labels) == matching)
                .map(|s| s.name.as_str())
                .collect::<Vec<_>>()
                .join(",")
        };
        let (matching, others) = (names(true), names(false));
        if matching.is_empty() {
            line(
                out,
                format_args!("   WARNING POD DOES NOT MATCH ANY SUBSETS.  (Non matching subsets {others})"),
            );
        }
        line(
            out,
            format_args!("{}", format!("   Matching subsets: {matching}").trim_end()),
        );
        if !others.is_empty() {
            line(out, format_args!("      (Non-matching subsets {others})"));
        }
    }

    /// The modes that clients use for a service port, with the pod's subset if it is in one that has a mode of its own.
    fn client_mode(&self, port: u16) -> Option<ClientTlsMode> {
        let no_labels = std::collections::BTreeMap::new();
        let client = destination_rule::Client {
            namespace: &self.service.namespace,
            labels: &no_labels,
        };
        let applied = destination_rule::applied(self.world, client, self.service)?;
        let subset = applied.subsets.iter().find(|s| {
            s.traffic_policy.is_some()
                && self
                    .pod
                    .is_some_and(|pod| mantlet_api::selector::subset(&s.labels, &pod.labels))
        });
        applied
            .settings(port, subset.map(|s| s.name.as_str()))
            .tls
            .map(|tls| tls.mode)
    }

    /// Prints what the pod accepts beside what its clients do.
    pub fn modes(&self, out: &mut String) {
        let Some(pod) = self.pod else { return };
        let effective = peer_authentication::effective(self.world, &pod.namespace, &pod.labels);
        let mut texts: Vec<(u16, String, bool)> = Vec::new();
        for port in &self.service.ports {
            let Some(target) = target_number(port, Some(pod)) else {
                continue;
            };
            let mode = effective.port(target);
            let client = self.client_mode(port.number);
            let text = match client {
                Some(client) => format!("is {} and clients are {}", mode_text(mode), tls_text(client)),
                None => format!("is {}, clients configured automatically", mode_text(mode)),
            };
            texts.push((target, text, client.is_some_and(|client| !fits(mode, client))));
        }
        let same = texts
            .iter()
            .all(|(_, text, _)| Some(text) == texts.first().map(|(_, t, _)| t));
        for (index, (port, text, broken)) in texts.iter().enumerate() {
            if same && index > 0 {
                break;
            }
            if same {
                line(out, format_args!("Pod {text}"));
            } else {
                line(out, format_args!("Pod port {port} {text}"));
            }
            if *broken {
                line(
                    out,
                    format_args!("   WARNING: these do not fit, connections of such clients fail"),
                );
            }
        }
    }
}

/// Whether connections of such clients are accepted.
fn fits(mode: Mode, client: ClientTlsMode) -> bool {
    match mode {
        Mode::Permissive => true,
        Mode::Strict => client == ClientTlsMode::IstioMutual,
        Mode::Disable => client != ClientTlsMode::IstioMutual,
    }
}

pub(super) fn mode_text(mode: Mode) -> &'static str {
    match mode {
        Mode::Disable => "DISABLE",
        Mode::Permissive => "PERMISSIVE",
        Mode::Strict => "STRICT",
    }
}

fn tls_text(mode: ClientTlsMode) -> &'static str {
    match mode {
        ClientTlsMode::Disable => "DISABLE",
        ClientTlsMode::Simple => "SIMPLE",
        ClientTlsMode::Mutual => "MUTUAL",
        ClientTlsMode::IstioMutual => "ISTIO_MUTUAL",
    }
}

fn traffic_policy(policy: &TrafficPolicy, out: &mut String) {
    if let Some(tls) = &policy.tls {
        line(out, format_args!("   Traffic Policy TLS Mode: {}", tls_text(tls.mode)));
    }
    let parts: Vec<&str> = [
        ("load balancer", policy.load_balancer.is_some()),
        ("connection pool", policy.connection_pool.is_some()),
        ("outlier detection", policy.outlier_detection.is_some()),
    ]
    .into_iter()
    .filter_map(|(name, is)| is.then_some(name))
    .collect();
    if !parts.is_empty() {
        line(out, format_args!("   Policies: {}", parts.join("/")));
    }
    if !policy.port_level_settings.is_empty() {
        line(out, format_args!("   Port Level Settings:"));
        for entry in &policy.port_level_settings {
            let port = entry.port.as_ref().map(|p| p.number).unwrap_or_default();
            let mode = entry.tls.as_ref().map_or("automatic", |tls| tls_text(tls.mode));
            line(out, format_args!("      {port}: TLS Mode: {mode}"));
        }
    }
    let silent = policy.tls.is_none() && parts.is_empty() && policy.port_level_settings.is_empty();
    if silent {
        line(out, format_args!("   No Traffic Policy"));
    }
}
