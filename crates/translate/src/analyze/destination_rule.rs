//! DestinationRules: hosts and subsets that do not exist, TLS that checks nobody, TLS that contradicts the servers.

use std::collections::BTreeMap;

use mantlet_api::DestinationRule;
use mantlet_api::destination_rule::{ClientTlsMode, ClientTlsSettings, TrafficPolicy};

use super::injection::ports_of;
use super::input::{Input, Resource, Workload};
use super::{Report, table};
use crate::destination_rule::{expand_host, specificity};
use crate::peer_authentication::{self, Mode};
use crate::world::service::{ExportTo, Service};

/// Labels that nodes have and pods do not; subsets by them select by place.
const TOPOLOGY: [&str; 4] = [
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
    "topology.istio.io/subzone",
    "topology.istio.io/network",
];

pub(super) fn run(input: &Input, out: &mut Report) {
    for (resource, rule) in &input.typed::<DestinationRule>() {
        verification(resource, rule, out);
        let host = expand_host(&rule.host, &resource.namespace, &input.world.mesh().domain);
        let services = matching(input, &resource.namespace, &host);
        unknown_host(input, resource, &host, &services, out);
        subsets(input, resource, rule, &services, out);
        strict(input, resource, rule, &services, out);
        cancels(input, resource, rule, &host, &services, out);
    }
}

fn matching<'a>(input: &'a Input, namespace: &'a str, host: &str) -> Vec<&'a Service> {
    if !host.starts_with('*') {
        if let Some(service) = input.world.service(host, namespace) {
            return vec![service];
        }
        return Vec::new();
    }
    input
        .world
        .visible_services(namespace)
        .map(|s| &**s)
        .filter(|s| specificity(host, &s.host).is_some())
        .collect()
}

fn mode_text(mode: ClientTlsMode) -> String {
    serde_json::to_value(mode)
        .ok()
        .and_then(|v| v.as_str().map(str::to_string))
        .unwrap_or_default()
}

fn unverified(tls: &ClientTlsSettings) -> bool {
    matches!(tls.mode, ClientTlsMode::Simple | ClientTlsMode::Mutual)
        && tls.ca_certificates.is_empty()
        && tls.credential_name.is_empty()
}

fn verification(resource: &Resource, rule: &DestinationRule, out: &mut Report) {
    let Some(policy) = &rule.traffic_policy else { return };
    if let Some(tls) = policy.tls.as_ref().filter(|tls| unverified(tls)) {
        out.add(
            &table::NO_SERVER_VERIFICATION,
            resource,
            "spec.trafficPolicy.tls",
            format!(
                "DestinationRule {} in namespace {} has TLS mode set to {} but no caCertificates are set to validate server identity \
                 for host: {}",
                resource.name,
                resource.namespace,
                mode_text(tls.mode),
                rule.host
            ),
        );
    }
    for (index, entry) in policy.port_level_settings.iter().enumerate() {
        if let Some(tls) = entry.tls.as_ref().filter(|tls| unverified(tls)) {
            let port = entry.port.as_ref().map(|p| p.number).unwrap_or_default();
            out.add(
                &table::NO_SERVER_VERIFICATION_PORT,
                resource,
                format!("spec.trafficPolicy.portLevelSettings[{index}].tls"),
                format!(
                    "DestinationRule {} in namespace {} has TLS mode set to {} but no caCertificates are set to validate server \
                     identity for host: {} at port number:{port}",
                    resource.name,
                    resource.namespace,
                    mode_text(tls.mode),
                    rule.host
                ),
            );
        }
    }
}

fn unknown_host(input: &Input, resource: &Resource, host: &str, services: &[&Service], out: &mut Report) {
    let any_service = input.world.visible_services(&resource.namespace).next().is_some();
    if host.starts_with('*') || !services.is_empty() || !(input.complete || any_service) {
        return;
    }
    out.add(
        &table::UNKNOWN_DESTINATION_RULE_HOST,
        resource,
        "spec.host",
        format!("The host {host} defined in the DestinationRule does not match any services in the mesh."),
    );
}

/// Workloads behind a service.
fn behind<'a>(input: &'a Input, service: &'a Service) -> impl Iterator<Item = &'a Workload> {
    input
        .workloads_in(&service.namespace)
        .filter(move |w| !service.selector.is_empty() && mantlet_api::selector::subset(&service.selector, &w.labels))
}

fn subsets(input: &Input, resource: &Resource, rule: &DestinationRule, services: &[&Service], out: &mut Report) {
    let [service] = services else { return };
    let place = |labels: &BTreeMap<String, String>| labels.keys().any(|k| TOPOLOGY.contains(&k.as_str()));
    // Files without workloads say nothing about what a subset selects.
    if !input.complete && behind(input, service).next().is_none() && service.endpoints.is_empty() {
        return;
    }
    for (index, subset) in rule.subsets.iter().enumerate() {
        if subset.labels.is_empty() || place(&subset.labels) {
            continue;
        }
        let pods = behind(input, service).any(|w| mantlet_api::selector::subset(&subset.labels, &w.labels));
        let endpoints = service
            .endpoints
            .iter()
            .any(|e| mantlet_api::selector::subset(&subset.labels, &e.labels));
        if !pods && !endpoints {
            out.add(
                &table::SUBSET_SELECTS_NO_PODS,
                resource,
                format!("spec.subsets[{index}]"),
                format!(
                    "The Subset {} defined in the DestinationRule does not select any pods. Which may lead to 503 UH \
                     (NoHealthyUpstream).",
                    subset.name
                ),
            );
        }
    }
}

/// TLS modes of a rule with the service port and subset that they are for.
fn modes(rule: &DestinationRule) -> Vec<(ClientTlsMode, Option<u32>, Option<usize>, String)> {
    let mut out = Vec::new();
    let mut look = |policy: &TrafficPolicy, subset: Option<usize>, path: String| {
        if let Some(tls) = &policy.tls {
            out.push((tls.mode, None, subset, format!("{path}.tls")));
        }
        for (index, entry) in policy.port_level_settings.iter().enumerate() {
            if let (Some(tls), Some(port)) = (&entry.tls, &entry.port) {
                out.push((
                    tls.mode,
                    Some(port.number),
                    subset,
                    format!("{path}.portLevelSettings[{index}].tls"),
                ));
            }
        }
    };
    if let Some(policy) = &rule.traffic_policy {
        look(policy, None, "spec.trafficPolicy".into());
    }
    for (index, subset) in rule.subsets.iter().enumerate() {
        if let Some(policy) = &subset.traffic_policy {
            look(policy, Some(index), format!("spec.subsets[{index}].trafficPolicy"));
        }
    }
    out
}

/// A client's rule beats the server's mode: without mesh mTLS a STRICT port refuses (S1.69).
fn strict(input: &Input, resource: &Resource, rule: &DestinationRule, services: &[&Service], out: &mut Report) {
    for (mode, only_port, subset, path) in modes(rule) {
        if mode == ClientTlsMode::IstioMutual {
            continue;
        }
        let broken = services.iter().find_map(|service| {
            let object = input.get("", "Service", &service.namespace, &service.name)?;
            behind(input, service)
                .filter(|w| w.meshed)
                .filter(|w| subset.is_none_or(|s| mantlet_api::selector::subset(&rule.subsets[s].labels, &w.labels)))
                .find_map(|workload| {
                    let effective = peer_authentication::effective(&input.world, &workload.namespace, &workload.labels);
                    ports_of(object).find_map(|port| {
                        let number = port.get("port")?.as_u64()?;
                        let settled = rule
                            .traffic_policy
                            .iter()
                            .flat_map(|p| &p.port_level_settings)
                            .any(|e| e.port.as_ref().is_some_and(|p| u64::from(p.number) == number));
                        // A port with settings of its own does not take the block above.
                        let meant = match only_port {
                            Some(only) => u64::from(only) == number,
                            None => !settled,
                        };
                        let target = port.get("targetPort").map_or(Some(number), |t| workload.port(t))?;
                        let port_mode = effective.port(u16::try_from(target).ok()?);
                        (meant && port_mode == Mode::Strict).then(|| (service.host.clone(), number, workload))
                    })
                })
        });
        if let Some((host, number, workload)) = broken {
            out.add(
                &table::RULE_BREAKS_STRICT,
                resource,
                path,
                format!(
                    "TLS mode {} to {host}:{number} fails: {}/{} accepts mutual TLS of the mesh only (STRICT).",
                    mode_text(mode),
                    workload.namespace,
                    workload.name
                ),
            );
        }
    }
}

/// Without automatic mTLS, a more specific rule without `tls` cancels a wider one that asks for it (S1.104).
fn cancels(
    input: &Input,
    resource: &Resource,
    rule: &DestinationRule,
    host: &str,
    services: &[&Service],
    out: &mut Report,
) {
    if input.world.mesh().auto_mtls || !modes(rule).is_empty() || services.is_empty() {
        return;
    }
    let own = specificity(host, &services[0].host).unwrap_or_default();
    let wider = input.world.destination_rules(&resource.namespace).iter().find(|other| {
        let pattern = expand_host(&other.spec.host, &other.meta.namespace, &input.world.mesh().domain);
        let mutual = other
            .spec
            .traffic_policy
            .as_ref()
            .and_then(|p| p.tls.as_ref())
            .is_some_and(|t| t.mode == ClientTlsMode::IstioMutual);
        mutual
            && specificity(&pattern, &services[0].host).is_some_and(|score| score < own)
            && ExportTo::parse(other.spec.export_to.iter().map(String::as_str), &other.meta.namespace)
                .visible_to(&resource.namespace)
    });
    if let Some(wider) = wider {
        out.add(
            &table::RULE_CANCELS_MUTUAL_TLS,
            resource,
            "spec.trafficPolicy",
            format!(
                "This rule replaces {} (\"{}\", ISTIO_MUTUAL) for {host} and sets no tls: clients send plaintext.",
                wider.meta.name, wider.spec.host
            ),
        );
    }
}
