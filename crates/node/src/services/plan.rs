//! From Services and EndpointSlices to one nft ruleset. Pure.
//!
//! ```text
//! prerouting, output ─► services: (address, protocol, port) ─► chain of the service port ─► dnat to one backend, at random
//! forward, output    ─► what is still addressed to the service range has no backend: refused at once
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;

use crate::controllers::endpoints::SERVICE_NAME;

/// The nft table.
pub const TABLE: &str = "mantlet_services";

/// Transport protocol of a service port that nft can translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("" | "TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some(_) => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// One port of one Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServicePort {
    /// Namespace and name of the Service.
    pub service: (String, String),
    /// Name of the port, empty when it has none.
    pub name: String,
    /// Protocol.
    pub protocol: Protocol,
    /// The Service's addresses inside the cluster.
    pub addresses: Vec<Ipv4Addr>,
    /// The port.
    pub port: u16,
    /// The port on the node, if any.
    pub node_port: Option<u16>,
    /// Where new connections go.
    pub backends: BTreeSet<(Ipv4Addr, u16)>,
    /// `sessionAffinity: ClientIP`: a client keeps its backend as long as the backends stay the same.
    pub sticky: bool,
}

/// Ready endpoints of a service port; if there is none, those that are terminating but still serve.
pub fn backends(slices: &[&Arc<EndpointSlice>], name: &str, protocol: Protocol) -> BTreeSet<(Ipv4Addr, u16)> {
    let mut ready = BTreeSet::new();
    let mut leaving = BTreeSet::new();
    for slice in slices {
        let port = slice.ports.iter().flatten().find(|port| {
            port.name.as_deref().unwrap_or_default() == name
                && Protocol::parse(port.protocol.as_deref()) == Some(protocol)
        });
        let Some(port) = port.and_then(|port| u16::try_from(port.port?).ok()) else {
            continue;
        };
        for endpoint in slice.endpoints.iter().flatten() {
            let Some(address) = endpoint.addresses.first().and_then(|address| address.parse().ok()) else {
                continue;
            };
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            if conditions.ready.unwrap_or(true) {
                ready.insert((address, port));
            } else if conditions.serving == Some(true) && conditions.terminating == Some(true) {
                leaving.insert((address, port));
            }
        }
    }
    if ready.is_empty() { leaving } else { ready }
}

/// The service ports that have a cluster address, in a fixed order.
pub fn collect(services: &[Arc<Service>], slices: &[Arc<EndpointSlice>]) -> Vec<ServicePort> {
    let mut by_service: BTreeMap<(String, String), Vec<&Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in slices {
        if let Some(service) = slice.labels().get(SERVICE_NAME) {
            let key = (slice.namespace().unwrap_or_default(), service.clone());
            by_service.entry(key).or_default().push(slice);
        }
    }
    let mut ports = Vec::new();
    for service in services {
        let Some(spec) = &service.spec else { continue };
        if spec.type_.as_deref() == Some("ExternalName") {
            continue;
        }
        let listed = spec.cluster_ips.iter().flatten().chain(spec.cluster_ip.iter());
        let addresses: BTreeSet<Ipv4Addr> = listed
            .chain(spec.external_ips.iter().flatten())
            .filter_map(|address| address.parse().ok())
            .collect();
        if addresses.is_empty() {
            continue;
        }
        let key = (service.namespace().unwrap_or_default(), service.name_any());
        let slices = by_service.get(&key).map(Vec::as_slice).unwrap_or_default();
        for port in spec.ports.iter().flatten() {
            let (Some(protocol), Ok(number)) = (Protocol::parse(port.protocol.as_deref()), u16::try_from(port.port))
            else {
                continue;
            };
            let name = port.name.clone().unwrap_or_default();
            ports.push(ServicePort {
                backends: backends(slices, &name, protocol),
                service: key.clone(),
                name,
                protocol,
                addresses: addresses.iter().copied().collect(),
                port: number,
                node_port: port
                    .node_port
                    .and_then(|port| u16::try_from(port).ok())
                    .filter(|port| *port > 0),
                sticky: spec.session_affinity.as_deref() == Some("ClientIP"),
            });
        }
    }
    ports.sort();
    ports
}

/// The ruleset, which replaces the former one when it is applied.
pub fn render(ports: &[ServicePort]) -> String {
    let mut chains = String::new();
    let mut addresses = BTreeMap::new();
    let mut node_ports = BTreeMap::new();
    for (index, port) in ports.iter().enumerate() {
        if port.backends.is_empty() {
            continue;
        }
        let protocol = port.protocol.name();
        for address in &port.addresses {
            // The first service that claims an external address keeps it.
            addresses.entry((*address, protocol, port.port)).or_insert(index);
        }
        if let Some(node_port) = port.node_port {
            node_ports.entry((protocol, node_port)).or_insert(index);
        }
        let (namespace, name) = &port.service;
        // Names are DNS labels by the API's rules; nothing else may reach the ruleset.
        let comment: String = format!("{namespace}/{name}:{}", port.name)
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || "-./:".contains(*c))
            .take(120)
            .collect();
        let _ = writeln!(chains, "  chain port_{index} {{");
        let _ = write!(chains, "    meta l4proto {protocol} ");
        let backends: Vec<_> = port.backends.iter().collect();
        if let [(address, target)] = backends[..] {
            let _ = write!(chains, "dnat ip to {address}:{target}");
        } else {
            let choice = if port.sticky { "jhash ip saddr" } else { "numgen random" };
            let _ = write!(chains, "dnat ip to {choice} mod {} map {{ ", backends.len());
            for (number, (address, target)) in backends.iter().enumerate() {
                let comma = if number == 0 { "" } else { ", " };
                let _ = write!(chains, "{comma}{number} : {address} . {target}");
            }
            chains.push_str(" }");
        }
        let _ = writeln!(chains, " comment \"{comment}\"\n  }}");
    }
    let address_elements: Vec<_> = addresses
        .iter()
        .map(|((address, protocol, port), index)| format!("{address} . {protocol} . {port} : goto port_{index}"))
        .collect();
    let node_port_elements: Vec<_> = node_ports
        .iter()
        .map(|((protocol, port), index)| format!("{protocol} . {port} : goto port_{index}"))
        .collect();
    format!(
        "table inet {TABLE}\n\
         delete table inet {TABLE}\n\
         table inet {TABLE} {{\n\
         {chains}\
         \x20 map addresses {{\n    type ipv4_addr . inet_proto . inet_service : verdict\n{}  }}\n\
         \x20 map node_ports {{\n    type inet_proto . inet_service : verdict\n{}  }}\n\
         \x20 chain services {{\n\
         \x20   ip daddr . meta l4proto . th dport vmap @addresses\n\
         \x20   meta nfproto ipv4 ip daddr != 127.0.0.0/8 fib daddr type local meta l4proto . th dport vmap @node_ports\n\
         \x20 }}\n\
         \x20 chain prerouting {{\n    type nat hook prerouting priority -100\n    jump services\n  }}\n\
         \x20 chain output {{\n    type nat hook output priority -100\n    jump services\n  }}\n\
         \x20 chain unserved {{\n    meta l4proto tcp reject with tcp reset\n    reject with icmp port-unreachable\n  }}\n\
         \x20 chain forward {{\n    type filter hook forward priority 0\n    ip daddr {range} jump unserved\n  }}\n\
         \x20 chain filter_output {{\n    type filter hook output priority 0\n    ip daddr {range} jump unserved\n  }}\n\
         }}\n",
        elements(&address_elements),
        elements(&node_port_elements),
        range = crate::sandbox::SERVICE_RANGE,
    )
}

fn elements(list: &[String]) -> String {
    if list.is_empty() {
        String::new()
    } else {
        format!("    elements = {{\n      {}\n    }}\n", list.join(",\n      "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::Write as _;

    fn service(name: &str, spec: serde_json::Value) -> Arc<Service> {
        let object = json!({"metadata": {"name": name, "namespace": "default"}, "spec": spec});
        Arc::new(serde_json::from_value(object).expect("a service"))
    }

    fn slice(service: &str, port: u16, endpoints: &[(&str, bool, bool, bool)]) -> Arc<EndpointSlice> {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|(address, ready, serving, terminating)| {
                json!({"addresses": [address],
                       "conditions": {"ready": ready, "serving": serving, "terminating": terminating}})
            })
            .collect();
        let object = json!({
            "metadata": {"name": format!("{service}-1"), "namespace": "default", "labels": {SERVICE_NAME: service}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "", "port": port, "protocol": "TCP"}],
        });
        Arc::new(serde_json::from_value(object).expect("a slice"))
    }

    fn example() -> String {
        let services = [
            service(
                "web",
                json!({"clusterIP": "10.96.0.5", "ports": [{"port": 80, "nodePort": 30080}]}),
            ),
            service("one", json!({"clusterIP": "10.96.0.6", "ports": [{"port": 81}]})),
            service("none", json!({"clusterIP": "10.96.0.7", "ports": [{"port": 82}]})),
            service("headless", json!({"clusterIP": "None", "ports": [{"port": 83}]})),
            service(
                "sticky",
                json!({"clusterIP": "10.96.0.8", "sessionAffinity": "ClientIP", "ports": [{"port": 84}]}),
            ),
        ];
        let slices = [
            slice(
                "web",
                8080,
                &[
                    ("10.244.0.2", true, true, false),
                    ("10.244.0.3", true, true, false),
                    ("10.244.0.4", false, true, true),
                ],
            ),
            slice(
                "one",
                8081,
                &[("10.244.0.5", false, true, true), ("10.244.0.6", false, false, false)],
            ),
            slice(
                "sticky",
                8084,
                &[("10.244.0.7", true, true, false), ("10.244.0.8", true, true, false)],
            ),
        ];
        render(&collect(&services, &slices))
    }

    #[test]
    fn golden() {
        insta::assert_snapshot!(example());
    }

    /// The kernel must accept the rules, twice over (the second time they replace themselves).
    #[test]
    fn nft_accepts_the_rules() {
        for rules in [render(&[]), example()] {
            let mut child = std::process::Command::new("unshare")
                .args(["--user", "--map-root-user", "--net", "nft", "-f", "-"])
                .stdin(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
                .expect("unshare (package util-linux) and nft (package nftables) are needed");
            let twice = format!("{rules}{rules}");
            child
                .stdin
                .take()
                .expect("piped")
                .write_all(twice.as_bytes())
                .expect("nft reads");
            let output = child.wait_with_output().expect("nft ends");
            assert!(
                output.status.success(),
                "{}\n{rules}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}
