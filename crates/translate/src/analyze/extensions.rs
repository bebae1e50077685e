//! Sidecar and Telemetry selectors, EnvoyFilter operations, MeshNetworks.

use std::collections::BTreeMap;

use mantlet_api::{EnvoyFilter, Sidecar, Telemetry};
use serde_json::Value;

use super::input::{Input, Resource};
use super::{Message, Report, table};

/// What is said when several objects of one kind select the same pod, or several select none in particular.
struct Words {
    plural: &'static str,
    conflict: &'static Message,
    several: &'static Message,
}

pub(super) fn selectors(input: &Input, out: &mut Report) {
    let sidecars: Vec<(&Resource, Option<BTreeMap<String, String>>)> = input
        .typed::<Sidecar>()
        .into_iter()
        .map(|(r, s)| (r, s.workload_selector.map(|l| l.labels).filter(|l| !l.is_empty())))
        .collect();
    exclusive(
        input,
        &sidecars,
        &Words {
            plural: "Sidecars",
            conflict: &table::CONFLICTING_SIDECAR_SELECTORS,
            several: &table::MULTIPLE_SIDECARS_WITHOUT_SELECTOR,
        },
        out,
    );
    for (resource, _) in &sidecars {
        let ambient = input
            .namespace_labels(&resource.namespace)
            .get("istio.io/dataplane-mode")
            .is_some_and(|mode| mode == "ambient");
        if ambient {
            out.add(
                &table::INEFFECTIVE_POLICY,
                resource,
                "spec",
                "The policy has no impact: Sidecar is for sidecar proxies, and this namespace is in ambient mode.",
            );
        }
    }
    let mut telemetries = Vec::new();
    for (resource, spec) in input.typed::<Telemetry>() {
        let empty = spec
            .tracing
            .iter()
            .any(|t| t.providers.is_empty() && !t.disable_span_reporting.unwrap_or(false))
            || spec
                .access_logging
                .iter()
                .any(|l| l.providers.is_empty() && !l.disabled.unwrap_or(false))
            || spec
                .metrics
                .iter()
                .any(|m| m.providers.is_empty() && m.overrides.is_empty());
        let defaults = input.mesh.default_providers.as_ref();
        let has_defaults =
            defaults.is_some_and(|d| !d.metrics.is_empty() || !d.tracing.is_empty() || !d.access_logging.is_empty());
        if empty && !has_defaults {
            out.add(
                &table::TELEMETRY_PROVIDER,
                resource,
                "spec",
                format!(
                    "The Telemetry {} in namespace \"{}\" with empty providers will be ignored.",
                    resource.name, resource.namespace
                ),
            );
        }
        if spec.target_ref.is_none() && spec.target_refs.is_empty() {
            telemetries.push((
                resource,
                spec.selector.map(|s| s.match_labels).filter(|l| !l.is_empty()),
            ));
        }
    }
    exclusive(
        input,
        &telemetries,
        &Words {
            plural: "Telemetries",
            conflict: &table::CONFLICTING_TELEMETRY_SELECTORS,
            several: &table::MULTIPLE_TELEMETRIES_WITHOUT_SELECTOR,
        },
        out,
    );
    networks(input, out);
}

/// An object and the labels that it selects.
type Selecting<'a> = (&'a Resource, Option<&'a BTreeMap<String, String>>);

fn exclusive(input: &Input, all: &[(&Resource, Option<BTreeMap<String, String>>)], words: &Words, out: &mut Report) {
    let mut by_namespace: BTreeMap<&str, Vec<Selecting<'_>>> = BTreeMap::new();
    for (resource, selector) in all {
        by_namespace
            .entry(&resource.namespace)
            .or_default()
            .push((resource, selector.as_ref()));
    }
    let names = |list: &[&Resource]| list.iter().map(|r| r.name.as_str()).collect::<Vec<_>>().join(" ");
    for (namespace, list) in by_namespace {
        let open: Vec<&Resource> = list.iter().filter(|(_, s)| s.is_none()).map(|(r, _)| *r).collect();
        if open.len() > 1 {
            for resource in &open {
                out.add(
                    words.several,
                    resource,
                    "spec",
                    format!(
                        "The {} [{}] in namespace \"{namespace}\" have no workload selector, which can lead to undefined behavior.",
                        words.plural,
                        names(&open)
                    ),
                );
            }
        }
        for workload in input.workloads_in(namespace) {
            let selecting: Vec<&Resource> = list
                .iter()
                .filter(|(_, s)| s.is_some_and(|s| mantlet_api::selector::subset(s, &workload.labels)))
                .map(|(r, _)| *r)
                .collect();
            if selecting.len() > 1 {
                for resource in &selecting {
                    out.add(
                        words.conflict,
                        resource,
                        "spec",
                        format!(
                            "The {} [{}] in namespace \"{namespace}\" select the same workload pod \"{}/{}\", which can lead to \
                             undefined behavior.",
                            words.plural,
                            names(&selecting),
                            workload.namespace,
                            workload.name
                        ),
                    );
                }
            }
        }
    }
}

pub(super) fn envoy_filters(input: &Input, out: &mut Report) {
    for (resource, spec) in input.typed::<EnvoyFilter>() {
        for (index, patch) in spec.config_patches.iter().enumerate() {
            let text = |pointer: &str| patch.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
            let (apply_to, operation) = (text("/applyTo"), text("/patch/operation"));
            let path = format!("spec.configPatches[{index}]");
            let mut add = |message: &'static Message, text: &str| out.add(message, resource, path.clone(), text);
            let ignored = matches!(apply_to, "ROUTE_CONFIGURATION" | "HTTP_ROUTE");
            match operation {
                "ADD" if ignored => add(
                    &table::FILTER_ADD,
                    "The ADD operation will be ignored when applyTo is set to ROUTE_CONFIGURATION, or HTTP_ROUTE.",
                ),
                "REMOVE" if ignored => add(
                    &table::FILTER_REMOVE,
                    "The REMOVE operation will be ignored when applyTo is set to ROUTE_CONFIGURATION, or HTTP_ROUTE.",
                ),
                "REPLACE" if !matches!(apply_to, "HTTP_FILTER" | "NETWORK_FILTER") => add(
                    &table::FILTER_REPLACE,
                    "The REPLACE operation is only valid for HTTP_FILTER and NETWORK_FILTER.",
                ),
                _ => {}
            }
            let relative = matches!(
                operation,
                "INSERT_BEFORE" | "INSERT_AFTER" | "REPLACE" | "MERGE" | "REMOVE"
            );
            if relative && spec.priority == 0 {
                let versioned = !text("/match/proxy/proxyVersion").is_empty();
                if versioned {
                    add(
                        &table::FILTER_RELATIVE_VERSION,
                        "This EnvoyFilter does not have a priority and has a relative patch operation (NSTERT_BEFORE/AFTER, REPLACE, \
                         MERGE, DELETE) and proxyVersion set which can cause the EnvoyFilter not to be applied during an upgrade. \
                         Using the INSERT_FIRST or ADD option or setting the priority may help in ensuring the EnvoyFilter is \
                         applied correctly.",
                    );
                } else if matches!(operation, "INSERT_BEFORE" | "INSERT_AFTER") {
                    add(
                        &table::FILTER_RELATIVE,
                        "This EnvoyFilter does not have a priority and has a relative patch operation set which can cause the \
                         EnvoyFilter not to be applied. Using the INSERT_FIRST of ADD option or setting the priority may help in \
                         ensuring the EnvoyFilter is applied correctly.",
                    );
                }
            }
        }
    }
}

/// Registries that MeshNetworks names.
fn networks(input: &Input, out: &mut Report) {
    let Some(map) = input.get("", "ConfigMap", input.root(), mantlet_api::mesh_config::CONFIG_MAP) else {
        return;
    };
    let Ok(networks) = mantlet_api::yaml::read_one(map.text("/data/meshNetworks")) else {
        return;
    };
    for (name, network) in networks
        .get("networks")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        for endpoint in network.get("endpoints").and_then(Value::as_array).into_iter().flatten() {
            let registry = endpoint
                .get("fromRegistry")
                .and_then(Value::as_str)
                .unwrap_or("Kubernetes");
            if registry != "Kubernetes" && registry != input.world.mesh().cluster {
                out.add(
                    &table::UNKNOWN_MESH_NETWORKS_REGISTRY,
                    map,
                    "data.meshNetworks",
                    format!("Unknown service registry {registry} in network {name}"),
                );
            }
        }
    }
}
