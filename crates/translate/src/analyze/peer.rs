//! PeerAuthentications that do not do what they seem to.

use mantlet_api::PeerAuthentication;

use super::authz::{only_service_port, selected};
use super::input::{Input, Resource, Workload};
use super::{Report, SECURITY, table};

pub(super) fn run(input: &Input, out: &mut Report) {
    let specs = input.typed::<PeerAuthentication>();
    for (resource, policy) in &specs {
        if policy.has_selector() && resource.namespace == input.root() {
            out.add(
                &table::ROOT_PEER_SELECTOR,
                resource,
                "spec.selector",
                format!(
                    "A PeerAuthentication with a selector in the root namespace {} selects nothing; put it into the namespace of the \
                     workload.",
                    input.root()
                ),
            );
            continue;
        }
        let workloads: Vec<&Workload> = selected(input, &resource.namespace, policy.selector.as_ref()).collect();
        for port in policy.port_level_mtls.keys() {
            if let Some((workload, service, real)) = only_service_port(input, &workloads, u64::from(*port)) {
                out.add(
                    &table::UNKNOWN_PORT_LEVEL,
                    resource,
                    format!("spec.portLevelMtls[{port}]"),
                    format!(
                        "Port {port} is a port of Service {}, but portLevelMtls counts the workload's ports: {}/{} listens on {real}.",
                        service.name, workload.namespace, workload.name
                    ),
                );
            }
        }
    }
    // The world keeps policies oldest first, which is the order that decides.
    let namespaces: Vec<&str> = input.world.namespaces().collect();
    for namespace in namespaces {
        let all = input.world.peer_authentications(namespace);
        let open: Vec<&str> = all
            .iter()
            .filter(|p| !p.spec.has_selector())
            .map(|p| p.meta.name.as_str())
            .collect();
        if let [first, others @ ..] = open.as_slice() {
            for name in others {
                ignored(input, namespace, name, first, "the whole namespace", out);
            }
        }
        if namespace == input.root() {
            continue;
        }
        let mut told: Vec<(&str, &str)> = Vec::new();
        for workload in input.workloads_in(namespace).filter(|w| w.meshed) {
            let matching: Vec<&str> = all
                .iter()
                .filter(|p| {
                    p.spec.has_selector() && p.spec.selector.as_ref().is_some_and(|s| s.matches(&workload.labels))
                })
                .map(|p| p.meta.name.as_str())
                .collect();
            if let [first, others @ ..] = matching.as_slice() {
                for name in others {
                    if !told.contains(&(name, first)) {
                        told.push((name, first));
                        ignored(
                            input,
                            namespace,
                            name,
                            first,
                            &format!("workload {}", workload.name),
                            out,
                        );
                    }
                }
            }
        }
    }
}

fn ignored(input: &Input, namespace: &str, name: &str, first: &str, what: &str, out: &mut Report) {
    let resource: Option<&Resource> = input.get(SECURITY, "PeerAuthentication", namespace, name);
    if let Some(resource) = resource {
        out.add(
            &table::DUPLICATE_PEER_AUTHENTICATION,
            resource,
            "spec",
            format!("PeerAuthentication {first} is older and counts for {what}; this one is ignored there."),
        );
    }
}
