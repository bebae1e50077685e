//! Ports of Services and ServiceEntries: protocols that are declared, contradict each other, or cannot work.

use std::collections::{BTreeMap, BTreeSet};

use mantlet_api::ServiceEntry;
use mantlet_api::service_entry::{Location, Resolution};
use serde_json::Value;

use super::injection::ports_of;
use super::input::{Input, Resource};
use super::{Report, table};
use crate::protocol::Protocol;

pub(super) fn run(input: &Input, out: &mut Report) {
    for service in input.of("", "Service") {
        if !input.is_system(&service.namespace) {
            names(service, out);
        }
    }
    deployments(input, out);
    entries(input, out);
}

fn number(port: &Value, key: &str) -> u64 {
    port.get(key).and_then(Value::as_u64).unwrap_or_default()
}

/// A target port as messages print it.
fn target_text(port: &Value) -> String {
    match port.get("targetPort") {
        Some(Value::String(name)) => name.clone(),
        Some(Value::Number(n)) => n.to_string(),
        _ => number(port, "port").to_string(),
    }
}

fn protocol(port: &Value) -> Protocol {
    let text = |key: &str| port.get(key).and_then(Value::as_str);
    let number = u16::try_from(number(port, "port")).unwrap_or_default();
    Protocol::of_service_port(text("protocol"), text("appProtocol"), text("name"), number)
}

fn names(service: &Resource, out: &mut Report) {
    let external = service.text("/spec/type") == "ExternalName";
    for (index, port) in ports_of(service).enumerate() {
        let name = port.get("name").and_then(Value::as_str).unwrap_or_default();
        let path = format!("spec.ports[{index}]");
        let declared = protocol(port);
        if external {
            if matches!(declared, Protocol::Auto | Protocol::Tcp) {
                out.add(
                    &table::EXTERNAL_NAME_PORT,
                    service,
                    path,
                    "Port name for ExternalName service is invalid. Proxy may prevent tcp named ports and unmatched traffic for ports \
                     serving TCP protocol from being forwarded correctly",
                );
            }
        } else if declared == Protocol::Auto {
            out.add(
                &table::PORT_NAME_CONVENTION,
                service,
                path,
                format!(
                    "Port name {name} (port: {}, targetPort: {}) doesn't follow the naming convention of Istio port.",
                    number(port, "port"),
                    target_text(port)
                ),
            );
        }
    }
}

/// One port of a workload, as a Service sees it.
struct Seen<'a> {
    service: &'a Resource,
    port: u64,
    target: u64,
    target_text: String,
    protocol: Protocol,
}

/// Services that treat the same port of a workload differently.
fn deployments(input: &Input, out: &mut Report) {
    let mut reported: BTreeSet<(String, u64, bool)> = BTreeSet::new();
    for workload in input.workloads.iter().filter(|w| w.meshed) {
        let name = controller(workload);
        let resource = input
            .get("apps", "Deployment", &workload.namespace, &name)
            .unwrap_or_else(|| input.resource_of(workload));
        let full = format!("{}/{name}", workload.namespace);
        let mut by_port: BTreeMap<u64, Vec<Seen<'_>>> = BTreeMap::new();
        for service in input.services_of(workload) {
            for port in ports_of(service) {
                let own = number(port, "port");
                let Some(target) = port.get("targetPort").map_or(Some(own), |t| workload.port(t)) else {
                    continue;
                };
                by_port.entry(target).or_default().push(Seen {
                    service,
                    port: own,
                    target,
                    target_text: target_text(port),
                    protocol: protocol(port),
                });
            }
        }
        for (target, seen) in by_port {
            let protocols: BTreeSet<String> = seen.iter().map(|s| format!("{:?}", s.protocol)).collect();
            let udp = seen.iter().any(|s| s.protocol == Protocol::Udp);
            let services: BTreeSet<String> = seen.iter().map(|s| s.service.full_name()).collect();
            let list = services.iter().cloned().collect::<Vec<_>>().join(" ");
            if protocols.len() > 1 && services.len() > 1 && !udp && reported.insert((full.clone(), target, true)) {
                out.add(
                    &table::DEPLOYMENT_PROTOCOLS,
                    resource,
                    "",
                    format!(
                        "This deployment {full} is associated with multiple services using port {} but different protocols: [{list}]",
                        seen[0].target
                    ),
                );
            }
            let ports: BTreeSet<u64> = seen.iter().map(|s| s.port).collect();
            if ports.len() > 1 && services.len() > 1 && reported.insert((full.clone(), target, false)) {
                let ports = ports.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
                out.add(
                    &table::DEPLOYMENT_CONFLICTING_PORTS,
                    resource,
                    "",
                    format!(
                        "This deployment {full} is associated with multiple services [{list}] using targetPort \"{}\" but different \
                         ports: [{ports}].",
                        seen[0].target_text
                    ),
                );
            }
        }
    }
}

/// Name of the Deployment behind a workload, by Kubernetes' naming of its pods.
fn controller(workload: &super::Workload) -> String {
    let hash = workload.labels.get("pod-template-hash");
    match hash.and_then(|hash| workload.name.split_once(&format!("-{hash}"))) {
        Some((name, _)) => name.to_string(),
        None => workload.name.clone(),
    }
}

/// A ServiceEntry with what it declares for one port.
type Declared<'a> = (&'a Resource, Protocol, String);

fn entries(input: &Input, out: &mut Report) {
    let all = input.typed::<ServiceEntry>();
    let mut declared: BTreeMap<(String, u32), Vec<Declared<'_>>> = BTreeMap::new();
    for (resource, entry) in &all {
        for (index, port) in entry.ports.iter().enumerate() {
            let protocol = Protocol::of_declared(&port.protocol, &port.name);
            let plain = matches!(protocol, Protocol::Tcp) || port.protocol.is_empty();
            let by_dns = entry.resolution != Resolution::None || entry.location == Location::MeshExternal;
            if plain && entry.addresses.is_empty() && by_dns {
                out.add(
                    &table::SERVICE_ENTRY_ADDRESSES,
                    resource,
                    format!("spec.ports[{index}]"),
                    "ServiceEntry addresses are required for this protocol.",
                );
            }
            for host in &entry.hosts {
                declared
                    .entry((host.to_ascii_lowercase(), port.number))
                    .or_default()
                    .push((resource, protocol, port.protocol.clone()));
            }
        }
    }
    for ((host, port), list) in declared {
        let first = list[0].1;
        if list.iter().all(|(_, protocol, _)| *protocol == first) {
            continue;
        }
        for (resource, _, text) in &list {
            let others: BTreeSet<String> = list
                .iter()
                .filter(|(r, _, _)| r.full_name() != resource.full_name())
                .map(|(r, _, other)| format!("{} ({other})", r.full_name()))
                .collect();
            let others = others.into_iter().collect::<Vec<_>>().join(", ");
            if !others.is_empty() {
                out.add(
                    &table::CONFLICTING_ENTRY_PROTOCOL,
                    resource,
                    "spec.ports",
                    format!("Port {port} of host {host} is declared as {text} here but differently in {others}."),
                );
            }
        }
    }
}
