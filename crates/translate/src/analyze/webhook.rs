//! Istio's own webhooks: they must point to a service that exists and must not overlap.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::input::{Input, Resource, is_injector, selector_matches};
use super::{Report, table};

pub(super) fn run(input: &Input, out: &mut Report) {
    if !input.complete && input.of("", "Service").next().is_none() {
        // Files without any Service say nothing about what is in the cluster.
        return;
    }
    const GROUP: &str = "admissionregistration.k8s.io";
    let injectors: Vec<&Resource> = input
        .of(GROUP, "MutatingWebhookConfiguration")
        .filter(|r| is_injector(r))
        .collect();
    let validators = input
        .of(GROUP, "ValidatingWebhookConfiguration")
        .filter(|r| r.name.starts_with("istio") || r.labels.get("app").is_some_and(|app| app == "istiod"));
    for resource in injectors.iter().copied().chain(validators) {
        target(input, resource, out);
    }
    overlap(&injectors, out);
}

fn webhooks(resource: &Resource) -> impl Iterator<Item = &Value> {
    resource
        .value
        .get("webhooks")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn target(input: &Input, resource: &Resource, out: &mut Report) {
    let mut seen = BTreeSet::new();
    for webhook in webhooks(resource) {
        let Some(service) = webhook.pointer("/clientConfig/service") else {
            continue;
        };
        let text = |key: &str| service.get(key).and_then(Value::as_str).unwrap_or_default();
        let (namespace, name) = (text("namespace"), text("name"));
        if input.get("", "Service", namespace, name).is_none() && seen.insert((namespace, name)) {
            out.add(
                &table::INVALID_WEBHOOK,
                resource,
                "webhooks",
                format!("Injector refers to a control plane service that does not exist: {name}.{namespace}."),
            );
        }
    }
}

/// Whether two injectors ask for the same pod: tried on all labels that injection knows.
fn overlap(injectors: &[&Resource], out: &mut Report) {
    let revisions: BTreeSet<String> = injectors
        .iter()
        .flat_map(|r| webhooks(r))
        .flat_map(|w| [&w["namespaceSelector"], &w["objectSelector"]])
        .filter_map(|s| s.get("matchExpressions")?.as_array())
        .flatten()
        .filter(|e| e["key"] == "istio.io/rev")
        .filter_map(|e| e.get("values")?.as_array())
        .flatten()
        .filter_map(|v| v.as_str().map(str::to_string))
        .collect();
    let mut of_revision: Vec<Option<String>> = vec![None];
    of_revision.extend(revisions.into_iter().map(Some));
    let labels = |injection: Option<&str>, key: &str, revision: &Option<String>| {
        let mut map = BTreeMap::new();
        if let Some(value) = injection {
            map.insert(key.to_string(), value.to_string());
        }
        if let Some(revision) = revision {
            map.insert("istio.io/rev".to_string(), revision.clone());
        }
        map
    };
    let mut reported = BTreeSet::new();
    for injection in [None, Some("enabled")] {
        for of_namespace in &of_revision {
            for inject in [None, Some("true")] {
                for of_pod in &of_revision {
                    let namespace = labels(injection, "istio-injection", of_namespace);
                    let pod = labels(inject, "sidecar.istio.io/inject", of_pod);
                    let asking: Vec<&Resource> = injectors
                        .iter()
                        .copied()
                        .filter(|r| {
                            webhooks(r).any(|w| {
                                selector_matches(&w["namespaceSelector"], &namespace)
                                    && selector_matches(&w["objectSelector"], &pod)
                            })
                        })
                        .collect();
                    if let [first, others @ ..] = asking.as_slice()
                        && !others.is_empty()
                        && reported.insert(first.name.clone())
                    {
                        let names: Vec<&str> = others.iter().map(|r| r.name.as_str()).collect();
                        out.add(
                            &table::INVALID_WEBHOOK,
                            first,
                            "webhooks",
                            format!(
                                "Webhook overlaps with others: {names:?}. This may cause injection to occur twice."
                            ),
                        );
                    }
                }
            }
        }
    }
}
