//! Gateways: pods that serve them, credentials, certificates used twice, conflicts, ports that nobody can reach.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use mantlet_api::Gateway;
use mantlet_api::gateway::{Server, ServerTlsMode};
use mantlet_api::names::host_matches;
use serde_json::Value;

use super::authz::labels_text;
use super::injection::ports_of;
use super::input::{Input, Resource, Workload, strings};
use super::{Report, table};

pub(super) fn run(input: &Input, out: &mut Report) {
    let all = input.typed::<Gateway>();
    for (resource, gateway) in &all {
        let pods = pods(input, gateway);
        if pods.is_empty() {
            let any_gateway = input.workloads.iter().any(|w| w.gateway);
            if !gateway.selector.is_empty() && (input.complete || any_gateway) {
                out.add(
                    &table::REFERENCED_RESOURCE_NOT_FOUND,
                    resource,
                    "spec.selector",
                    format!("Referenced selector not found: \"{}\"", labels_text(&gateway.selector)),
                );
            }
            continue;
        }
        for (index, server) in gateway.servers.iter().enumerate() {
            credentials(input, resource, server, index, &pods, out);
            port(input, resource, gateway, server, index, &pods, out);
        }
    }
    same_certificate(&all, out);
    conflicts(&all, out);
}

/// Pods that serve a gateway.
fn pods<'a>(input: &'a Input, gateway: &Gateway) -> Vec<&'a Workload> {
    input
        .workloads
        .iter()
        .filter(|w| !gateway.selector.is_empty() && mantlet_api::selector::subset(&gateway.selector, &w.labels))
        .collect()
}

fn names_of(server: &Server) -> Vec<&str> {
    let Some(tls) = &server.tls else { return Vec::new() };
    std::iter::once(&tls.credential_name)
        .chain(&tls.credential_names)
        .map(|name| name.strip_prefix("kubernetes://").unwrap_or(name))
        .filter(|name| !name.is_empty() && !name.contains("://"))
        .collect()
}

fn credentials(
    input: &Input,
    resource: &Resource,
    server: &Server,
    index: usize,
    pods: &[&Workload],
    out: &mut Report,
) {
    let namespaces: BTreeSet<&str> = pods.iter().map(|w| w.namespace.as_str()).collect();
    if !input.secrets {
        return;
    }
    for name in names_of(server) {
        let path = format!("spec.servers[{index}].tls.credentialName");
        let secrets: Vec<&Resource> = namespaces
            .iter()
            .filter_map(|namespace| input.get("", "Secret", namespace, name))
            .collect();
        if secrets.is_empty() {
            out.add(
                &table::REFERENCED_RESOURCE_NOT_FOUND,
                resource,
                path,
                format!("Referenced credentialName not found: \"{name}\""),
            );
            continue;
        }
        let mutual = server
            .tls
            .as_ref()
            .is_some_and(|t| matches!(t.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual));
        if !secrets.iter().all(|secret| usable(input, secret, mutual)) {
            out.add(
                &table::INVALID_GATEWAY_CREDENTIAL,
                resource,
                path,
                format!(
                    "The credential referenced by the Gateway {} in namespace {} is invalid, which can cause the traffic not to work \
                     as expected.",
                    resource.name, resource.namespace
                ),
            );
        }
    }
}

/// Whether a secret holds a certificate and a key (and, for mutual TLS, roots), in one of Istio's two layouts.
fn usable(input: &Input, secret: &Resource, mutual: bool) -> bool {
    let pem = |secret: &Resource, key: &str, what: &str| -> bool {
        let plain = secret
            .value
            .pointer(&format!("/stringData/{key}"))
            .and_then(Value::as_str);
        let text = match plain {
            Some(text) => text.as_bytes().to_vec(),
            None => match base64::engine::general_purpose::STANDARD.decode(secret.text(&format!("/data/{key}"))) {
                Ok(bytes) => bytes,
                Err(_) => return false,
            },
        };
        is_pem(&String::from_utf8_lossy(&text), what)
    };
    let pair = (pem(secret, "tls.crt", "CERTIFICATE") && pem(secret, "tls.key", "PRIVATE KEY"))
        || (pem(secret, "cert", "CERTIFICATE") && pem(secret, "key", "PRIVATE KEY"));
    let roots = || {
        pem(secret, "ca.crt", "CERTIFICATE")
            || pem(secret, "cacert", "CERTIFICATE")
            || input
                .get("", "Secret", &secret.namespace, &format!("{}-cacert", secret.name))
                .is_some_and(|other| pem(other, "ca.crt", "CERTIFICATE") || pem(other, "cacert", "CERTIFICATE"))
    };
    pair && (!mutual || roots())
}

/// Whether a text has a PEM block of this kind that holds DER.
fn is_pem(text: &str, what: &str) -> bool {
    text.split("-----BEGIN ").skip(1).any(|block| {
        let Some((label, rest)) = block.split_once("-----") else {
            return false;
        };
        let Some((body, _)) = rest.split_once("-----END ") else {
            return false;
        };
        let body: String = body.chars().filter(|c| !c.is_whitespace()).collect();
        label.ends_with(what)
            && base64::engine::general_purpose::STANDARD
                .decode(body)
                .is_ok_and(|der| der.first() == Some(&0x30))
    })
}

fn port(
    input: &Input,
    resource: &Resource,
    gateway: &Gateway,
    server: &Server,
    index: usize,
    pods: &[&Workload],
    out: &mut Report,
) {
    let Some(port) = &server.port else { return };
    let services: Vec<&Resource> = pods.iter().flat_map(|w| input.services_of(w)).collect();
    let defined = services.iter().flat_map(|s| ports_of(s)).any(|p| {
        let number = |key: &str| p.get(key).and_then(Value::as_u64);
        number("port") == Some(u64::from(port.number)) || number("targetPort") == Some(u64::from(port.number))
    });
    if !services.is_empty() && !defined {
        out.add(
            &table::GATEWAY_PORT_NOT_ON_SERVICE,
            resource,
            format!("spec.servers[{index}].port.number"),
            format!(
                "The gateway is listening on a target port (port {}) that is not defined in the Service associated with its workload \
                 instances (Pod selector {}). If you need to access the gateway port through the gateway Service, it will not be \
                 available.",
                port.number,
                labels_text(&gateway.selector)
            ),
        );
    }
}

/// The same certificate on several Gateways of the same pods.
fn same_certificate(all: &[(&Resource, Gateway)], out: &mut Report) {
    let mut users: BTreeMap<(String, &str), Vec<&Resource>> = BTreeMap::new();
    for (resource, gateway) in all {
        let selector = labels_text(&gateway.selector);
        let names: BTreeSet<&str> = gateway.servers.iter().flat_map(names_of).collect();
        for name in names {
            users.entry((selector.clone(), name)).or_default().push(resource);
        }
    }
    for resources in users.values().filter(|r| r.len() > 1) {
        let names: Vec<String> = resources.iter().map(|r| r.full_name()).collect();
        for resource in resources {
            out.add(
                &table::DUPLICATE_CERTIFICATE,
                resource,
                "spec.servers",
                format!(
                    "Duplicate certificate in multiple gateways [{}] may cause 404s if clients re-use HTTP2 connections.",
                    names.join(" ")
                ),
            );
        }
    }
}

/// Host of a server without its namespace part.
fn bare(host: &str) -> &str {
    host.split_once('/').map_or(host, |(_, host)| host)
}

fn conflicts(all: &[(&Resource, Gateway)], out: &mut Report) {
    for (index, (resource, gateway)) in all.iter().enumerate() {
        for server in &gateway.servers {
            let Some(port) = &server.port else { continue };
            let mut others: Vec<String> = Vec::new();
            for (other_index, (other, rival)) in all.iter().enumerate() {
                if other_index == index || rival.selector != gateway.selector {
                    continue;
                }
                let overlaps = rival.servers.iter().any(|s| {
                    s.port.as_ref().is_some_and(|p| p.number == port.number)
                        && s.bind == server.bind
                        && s.hosts.iter().any(|a| {
                            server
                                .hosts
                                .iter()
                                .any(|b| bare(a).eq_ignore_ascii_case(bare(b)) || (bare(a) == "*" && bare(b) == "*"))
                        })
                });
                if overlaps {
                    others.push(other.full_name());
                }
            }
            if !others.is_empty() {
                out.add(
                    &table::CONFLICTING_GATEWAYS,
                    resource,
                    "spec.servers",
                    format!(
                        "Conflict with gateways {} (workload selector {}, port {}, hosts {}).",
                        others.join(","),
                        labels_text(&gateway.selector),
                        port.number,
                        server.hosts.join(",")
                    ),
                );
            }
        }
    }
}

/// Whether a server serves a host.
pub(super) fn serves(server: &Server, host: &str) -> bool {
    server
        .hosts
        .iter()
        .map(|h| bare(h))
        .any(|pattern| host_matches(pattern, host) || host_matches(host, pattern))
}

/// Labels of the pods of a Gateway.
pub(super) fn selector(resource: &Resource) -> BTreeMap<String, String> {
    strings(&resource.value, "/spec/selector")
}
