//! Who has a proxy: namespaces without injection, pods without proxy, proxies that are old, pods that escape capture.

use std::collections::{BTreeMap, BTreeSet};

use mantlet_api::Values;
use serde_json::Value;

use super::input::{Input, Resource, Workload};
use super::{Report, table};
use crate::inject::{IGNORED_NAMESPACES, PROXY_CONTAINER};

/// User id of the proxy.
const PROXY_UID: u64 = 1337;

pub(super) fn run(input: &Input, out: &mut Report) {
    for namespace in input.of("", "Namespace") {
        of_namespace(input, namespace, out);
    }
    for workload in &input.workloads {
        of_workload(input, workload, out);
    }
    images(input, out);
    localhost(input, out);
}

fn of_namespace(input: &Input, namespace: &Resource, out: &mut Report) {
    if input.is_system(&namespace.name) || IGNORED_NAMESPACES.contains(&namespace.name.as_str()) {
        return;
    }
    let label = |key: &str| namespace.labels.get(key).map(String::as_str);
    let (injection, revision) = (label("istio-injection"), label("istio.io/rev"));
    let path = "metadata.labels";
    match (injection, revision) {
        (Some(_), Some(_)) => out.add(
            &table::MULTIPLE_INJECTION_LABELS,
            namespace,
            path,
            "The namespace has more than one type of injection labels [istio-injection istio.io/rev], which may lead to undefined \
             behavior. Make sure only one injection label exists.",
        ),
        (None, None) if label("istio.io/dataplane-mode").is_none_or(|mode| mode == "none") => {
            if input.injected(&namespace.name, &BTreeMap::new()) {
                out.add(
                    &table::NAMESPACE_INJECTED_BY_DEFAULT,
                    namespace,
                    path,
                    "is enabled for Istio injection, as Istio is installed with enableNamespacesByDefault as true.",
                );
            } else {
                let name = &namespace.name;
                out.add(
                    &table::NAMESPACE_NOT_INJECTED,
                    namespace,
                    path,
                    format!(
                        "The namespace is not enabled for Istio injection. Run 'kubectl label namespace {name} \
                         istio-injection=enabled' to enable it, or 'kubectl label namespace {name} istio-injection=disabled' to \
                         explicitly mark it as not needing injection."
                    ),
                );
            }
        }
        _ => {}
    }
}

fn of_workload(input: &Input, workload: &Workload, out: &mut Report) {
    let resource = input.resource_of(workload);
    if input.is_system(&workload.namespace) {
        return;
    }
    let image_auto = workload
        .containers()
        .any(|c| c.get("image").and_then(Value::as_str) == Some("auto"));
    let asked_for = input.injected(&workload.namespace, &workload.labels);
    if image_auto && !asked_for {
        let text = format!(
            "{} {} contains `image: auto` but does not match any Istio injection webhook selectors.",
            workload.kind, workload.name
        );
        let message = if workload.kind == "Pod" {
            &table::IMAGE_AUTO_ERROR
        } else {
            &table::IMAGE_AUTO_WARNING
        };
        out.add(message, resource, "spec", text);
    }
    let declined = workload
        .labels
        .get("sidecar.istio.io/inject")
        .or_else(|| workload.annotations.get("sidecar.istio.io/inject"))
        .is_some_and(|v| v == "false");
    let host_network = workload.spec.get("hostNetwork").and_then(Value::as_bool) == Some(true);
    let served = input.services_of(workload).next().is_some();
    if host_network && asked_for && served {
        out.add(
            &table::HOST_NETWORK,
            resource,
            "spec.hostNetwork",
            format!(
                "The pods of {} {} use the host's network and can have no proxy; policies do not protect them.",
                workload.kind, workload.name
            ),
        );
    }
    let bare = workload.kind == "Pod" && resource.value.get("status").is_some() && !workload.meshed;
    if bare && asked_for && !declined && !host_network {
        out.add(
            &table::POD_MISSING_PROXY,
            resource,
            "",
            format!(
                "The pod {} is missing the Istio proxy. This can often be resolved by restarting or redeploying the workload.",
                resource.full_name()
            ),
        );
    }
    if workload.meshed {
        uid(workload, resource, out);
        excluded_ports(input, workload, resource, out);
    }
}

fn uid(workload: &Workload, resource: &Resource, out: &mut Report) {
    let user = |of: &Value| of.pointer("/securityContext/runAsUser").and_then(Value::as_u64);
    let own_proxy = |c: &Value| {
        c.get("name").and_then(Value::as_str).is_some_and(|n| {
            n == PROXY_CONTAINER || n == "istio-init" || n == "istio-validation" || n == "enable-core-dump"
        })
    };
    let of_pod = user(&workload.spec);
    let taken = workload
        .containers()
        .filter(|c| !own_proxy(c))
        .any(|c| user(c).or(of_pod) == Some(PROXY_UID));
    if taken && !workload.gateway {
        out.add(
            &table::APPLICATION_UID,
            resource,
            "spec",
            "User ID (UID) 1337 is reserved for the sidecar proxy.",
        );
    }
}

fn excluded_ports(input: &Input, workload: &Workload, resource: &Resource, out: &mut Report) {
    const KEY: &str = "traffic.sidecar.istio.io/excludeInboundPorts";
    let Some(list) = workload.annotations.get(KEY) else {
        return;
    };
    let excluded: BTreeSet<u64> = list.split(',').filter_map(|p| p.trim().parse().ok()).collect();
    for service in input.services_of(workload) {
        for port in ports_of(service) {
            let target = port.get("targetPort").or_else(|| port.get("port"));
            if let Some(number) = target.and_then(|t| workload.port(t)).filter(|n| excluded.contains(n)) {
                out.add(
                    &table::EXCLUDED_PORT,
                    resource,
                    "metadata.annotations",
                    format!(
                        "Port {number} is exposed by Service {} but excluded from capture ({KEY}): connections to it bypass mutual \
                         TLS and every policy.",
                        service.name
                    ),
                );
            }
        }
    }
}

/// Ports of a Service.
pub(super) fn ports_of(service: &Resource) -> impl Iterator<Item = &Value> {
    service
        .value
        .pointer("/spec/ports")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

/// Proxies that are not of the image that the injector would use now.
fn images(input: &Input, out: &mut Report) {
    let Some(values) = input
        .get("", "ConfigMap", input.root(), "istio-sidecar-injector")
        .and_then(|m| serde_json::from_str::<Values>(m.text("/data/values")).ok())
    else {
        return;
    };
    let want = values.image(&values.global.proxy.image, "", "");
    let mut stale: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for workload in input
        .workloads
        .iter()
        .filter(|w| w.kind == "Pod" && w.meshed && !w.gateway)
    {
        let own = workload.annotations.contains_key("sidecar.istio.io/proxyImage");
        let current = workload
            .containers()
            .find(|c| c.get("name").and_then(Value::as_str) == Some(PROXY_CONTAINER))
            .and_then(|c| c.get("image")?.as_str());
        if !own && current.is_some_and(|image| !same(image, &want)) && !input.is_system(&workload.namespace) {
            stale.entry(&workload.namespace).or_default().push(&workload.name);
        }
    }
    for (namespace, mut pods) in stale {
        pods.sort_unstable();
        if let Some(resource) = input.of("", "Namespace").find(|n| n.name == namespace) {
            out.add(
                &table::PROXY_IMAGE_MISMATCH,
                resource,
                "",
                format!(
                    "The Istio proxy images of the pods running in the namespace do not match the image defined in the injection \
                     configuration (pod names: [{}]). This often happens after upgrading the Istio control-plane and can be fixed \
                     by redeploying the pods.",
                    pods.join(" ")
                ),
            );
        }
    }
}

/// Whether an image is the wanted one, in any of its variants.
fn same(image: &str, want: &str) -> bool {
    let variant = image
        .strip_prefix(want)
        .is_some_and(|rest| matches!(rest, "" | "-distroless" | "-debug"));
    variant || image == "auto"
}

/// Ports of Services that the application serves on localhost only.
fn localhost(input: &Input, out: &mut Report) {
    for workload in &input.workloads {
        let key = (workload.namespace.clone(), workload.name.clone());
        let Some(ports) = input.localhost_ports.get(&key) else {
            continue;
        };
        let mut exposed = BTreeSet::new();
        for service in input.services_of(workload) {
            for port in ports_of(service) {
                let target = port.get("targetPort").or_else(|| port.get("port"));
                exposed.extend(
                    target
                        .and_then(|t| workload.port(t))
                        .and_then(|n| u16::try_from(n).ok()),
                );
            }
        }
        for port in ports.intersection(&exposed) {
            out.add(
                &table::LOCALHOST_LISTENER,
                input.resource_of(workload),
                "",
                format!("Port {port} is exposed in a Service but listens on localhost. It will not be exposed to other pods."),
            );
        }
    }
}
