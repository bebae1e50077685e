//! Who and what a user means: `ns/sa`, `10.0.0.1`, `plaintext`; `ns/svc:port`, `svc.ns:port`, `deploy/x:port`.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use mantlet_translate::journey::{self, Caller};
use mantlet_translate::protocol::Protocol;
use mantlet_translate::world::World;
use mantlet_translate::world::service::ExportTo;
use mantlet_translate::world::service::{Resolution, Service, ServicePort, TargetPort};
use mantlet_translate::world::workload::Workload;

/// The caller that a text names: `ns/sa`, `sa`, a SPIFFE id, an address, or `plaintext` for somebody outside of the mesh.
pub fn caller<'w>(world: &'w World, text: &str, namespace: &str) -> Result<Caller<'w>> {
    if matches!(text, "plaintext" | "outside") {
        return Ok(Caller::outside());
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Caller::address(world, address));
    }
    if let Some(id) = text.strip_prefix("spiffe://").or(text.contains("/ns/").then_some(text)) {
        let parts: Vec<&str> = id.split('/').collect();
        let [domain, "ns", ns, "sa", sa] = parts.as_slice() else {
            bail!("{text:?} is no identity of the form TRUSTDOMAIN/ns/NAMESPACE/sa/ACCOUNT");
        };
        if !world.mesh().accepted_trust_domains().contains(domain) {
            bail!(
                "trust domain {domain:?} is not accepted by this mesh; it accepts {}",
                world.mesh().accepted_trust_domains().join(", ")
            );
        }
        return Ok(Caller::account(world, ns, sa));
    }
    let (ns, account) = text.split_once('/').unwrap_or((namespace, text));
    if !is_name(ns) || !is_name(account) {
        bail!("--from {text:?}: expected NAMESPACE/SERVICEACCOUNT, an IP address, or `plaintext`");
    }
    Ok(Caller::account(world, ns, account))
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
}

/// What is called: a service with the ports that are meant, and its pods.
#[derive(Clone, Debug)]
pub struct Destination<'w> {
    /// The service; made up for a workload that is named directly.
    pub service: Service,
    /// The ports that are meant.
    pub ports: Vec<ServicePort>,
    /// The pods behind it.
    pub pods: Vec<&'w Workload>,
    /// As printed: `ns/svc`.
    pub name: String,
}

/// The destination that a text names. Without a port, all of the service's are meant.
pub fn destination<'w>(world: &'w World, text: &str, namespace: &str) -> Result<Destination<'w>> {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    let (ns, name) = split(world, name, namespace);
    if let Some((kind, workload)) = name.split_once('/') {
        return of_workload(world, ns, kind, workload, port, text);
    }
    let host = format!("{name}.{ns}.svc.{}", world.mesh().domain);
    let found = world.service(&host, ns).or_else(|| world.service(name, ns)).cloned();
    let Some(service) = found else {
        if world.pods(ns).any(|p| p.name == name || p.telemetry.name == name) {
            return of_workload(world, ns, "workload", name, port, text);
        }
        let known: Vec<String> = world
            .visible_services(ns)
            .filter(|s| s.kubernetes)
            .map(|s| format!("{}/{}", s.namespace, s.name))
            .collect();
        let hint = mantlet_api::diagnostic::did_you_mean(&format!("{ns}/{name}"), known.iter().map(String::as_str))
            .map(|hint| match hint {
                mantlet_api::diagnostic::Hint::DidYouMean(name) => format!("; did you mean {name}?"),
                mantlet_api::diagnostic::Hint::Advice(text) => format!("; {text}"),
            })
            .unwrap_or_default();
        bail!("--to {text}: there is no service {name} in namespace {ns}{hint}");
    };
    let service = (*service).clone();
    let ports = match port {
        None => service.ports.clone(),
        Some(wanted) => {
            let found = service
                .ports
                .iter()
                .find(|p| wanted == p.name || wanted.parse() == Ok(p.number));
            let have = || {
                let list: Vec<String> = service.ports.iter().map(|p| p.number.to_string()).collect();
                list.join(", ")
            };
            vec![found.cloned().with_context(|| {
                format!(
                    "--to {text}: service {ns}/{name} has no port {wanted}; it has {}",
                    have()
                )
            })?]
        }
    };
    if ports.is_empty() {
        bail!("--to {text}: service {ns}/{name} has no port that the mesh carries");
    }
    Ok(Destination {
        pods: journey::servers(world, &service),
        name: format!("{}/{}", service.namespace, service.name),
        service,
        ports,
    })
}

/// `ns/name`, `ns/kind/name`, `kind/name`, `name.ns`, `name.ns.svc.domain`, `name`.
fn split<'a>(world: &World, text: &'a str, namespace: &'a str) -> (&'a str, &'a str) {
    const KINDS: [&str; 6] = ["deploy", "deployment", "sts", "statefulset", "pod", "workload"];
    if let Some((first, rest)) = text.split_once('/') {
        return match KINDS.contains(&first) {
            true => (namespace, text),
            false => (first, rest),
        };
    }
    if world.service(text, namespace).is_some() {
        return (namespace, text);
    }
    match text.split_once('.') {
        Some((name, rest)) => (rest.split('.').next().unwrap_or(rest), name),
        None => (namespace, text),
    }
}

/// A workload without a service, or one that is meant directly: a port of it is called as it is.
fn of_workload<'w>(
    world: &'w World,
    namespace: &str,
    kind: &str,
    name: &str,
    port: Option<&str>,
    text: &str,
) -> Result<Destination<'w>> {
    let pods: Vec<&Workload> = world
        .pods(namespace)
        .map(|p| &**p)
        .filter(|p| p.name == name || (kind != "pod" && p.telemetry.name == name))
        .collect();
    let first = pods
        .first()
        .with_context(|| format!("--to {text}: there is no {kind} {name} in namespace {namespace}"))?;
    let services = world.services_of_workload(namespace, &first.labels);
    let of_services = || {
        services.iter().flat_map(|s| {
            s.ports
                .iter()
                .filter_map(|p| Some((mantlet_translate::endpoint::target_port(&p.target, first)?, p.protocol)))
        })
    };
    let numbers: Vec<(u16, Protocol)> = match port {
        Some(port) => {
            let number: u16 = match first.named_ports.get(port) {
                Some(number) => *number,
                None => port
                    .parse()
                    .with_context(|| format!("--to {text}: {port:?} is no port"))?,
            };
            let protocol = of_services().find(|(n, _)| *n == number).map(|(_, p)| p);
            vec![(number, protocol.unwrap_or(Protocol::Auto))]
        }
        None => {
            let mut all: Vec<(u16, Protocol)> = of_services().collect();
            all.extend(first.named_ports.values().map(|n| (*n, Protocol::Auto)));
            all.sort_by_key(|(n, _)| *n);
            all.dedup_by_key(|(n, _)| *n);
            all
        }
    };
    if numbers.is_empty() {
        bail!("--to {text}: name a port, as in {text}:8080");
    }
    let ports: Vec<ServicePort> = numbers
        .into_iter()
        .map(|(number, protocol)| ServicePort {
            number,
            name: String::new(),
            protocol,
            target: TargetPort::Number(number),
        })
        .collect();
    let host = services
        .first()
        .map(|s| s.host.clone())
        .unwrap_or_else(|| name.to_string());
    Ok(Destination {
        service: Service {
            host,
            name: name.to_string(),
            namespace: namespace.to_string(),
            created: 0,
            vips: Vec::new(),
            ports: ports.clone(),
            selector: (*first.labels).clone(),
            resolution: Resolution::Endpoints,
            external: false,
            kubernetes: true,
            extra_sans: Vec::new(),
            extra_accounts: Vec::new(),
            export_to: ExportTo::All,
            endpoints: Vec::new(),
        },
        ports,
        pods,
        name: format!("{namespace}/{name}"),
    })
}
