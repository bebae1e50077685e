//! Whether a pod is injected (SEMANTICS 5b). Called first of all by [`super::inject`].

use mantlet_api::names;
use serde_json::Value;

use super::{InjectConfig, string_map};

/// Namespaces whose pods are never injected.
pub const IGNORED_NAMESPACES: [&str; 4] = ["kube-system", "kube-public", "kube-node-lease", "local-path-storage"];

const INJECT: &str = "sidecar.istio.io/inject";

/// The decision about one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Whether it is injected.
    pub inject: bool,
    /// Which rule said so.
    pub reason: String,
    /// For the user.
    pub warnings: Vec<String>,
}

/// Decides about a pod in a namespace (S5.10–S5.13).
pub fn decide(pod: &Value, namespace: &str, config: &InjectConfig) -> Choice {
    let mut warnings = Vec::new();
    let (inject, reason) = rule(pod, namespace, config, &mut warnings);
    Choice {
        inject,
        reason,
        warnings,
    }
}

fn rule(pod: &Value, namespace: &str, config: &InjectConfig, warnings: &mut Vec<String>) -> (bool, String) {
    if pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) == Some(true) {
        return (false, "pod uses the host's network".into());
    }
    if IGNORED_NAMESPACES.contains(&namespace) {
        return (false, format!("namespace {namespace} is never injected"));
    }
    // A policy that is neither word switches injection off, also for pods that ask for it (S5.12).
    if !matches!(config.policy.as_str(), "enabled" | "disabled") {
        return (
            false,
            format!(
                "injection policy {:?} is invalid, must be enabled or disabled",
                config.policy
            ),
        );
    }
    let labels = string_map(pod, "/metadata/labels");
    let annotations = string_map(pod, "/metadata/annotations");
    let (own, place) = match labels.get(INJECT) {
        Some(value) => (Some(value.as_str()), "label"),
        None => (annotations.get(INJECT).map(String::as_str), "annotation"),
    };
    match own {
        Some("true") => return (true, format!("{place} {INJECT} is true")),
        Some("false") => return (false, format!("{place} {INJECT} is false")),
        Some("") | None => {}
        Some(other) => warnings.push(format!(
            "{place} {INJECT} has value {other:?}, neither true nor false; ignored"
        )),
    }
    if config
        .never_inject
        .iter()
        .any(|selector| selector_matches(selector, &labels))
    {
        return (false, "pod matches neverInjectSelector".into());
    }
    if config
        .always_inject
        .iter()
        .any(|selector| selector_matches(selector, &labels))
    {
        return (true, "pod matches alwaysInjectSelector".into());
    }
    if config.policy == "enabled" {
        (true, "injection policy is enabled".into())
    } else {
        (false, "injection policy is disabled".into())
    }
}

/// A Kubernetes label selector against labels. An empty or malformed one matches nothing (S5.11).
fn selector_matches(selector: &Value, labels: &std::collections::BTreeMap<String, String>) -> bool {
    let match_labels = selector.get("matchLabels").and_then(Value::as_object);
    let expressions = selector.get("matchExpressions").and_then(Value::as_array);
    if match_labels.is_none_or(|m| m.is_empty()) && expressions.is_none_or(|e| e.is_empty()) {
        return false;
    }
    let pairs = match_labels
        .into_iter()
        .flatten()
        .all(|(key, value)| labels.get(key).map(String::as_str) == value.as_str());
    pairs
        && expressions.into_iter().flatten().all(|expression| {
            let key = expression.get("key").and_then(Value::as_str).unwrap_or_default();
            let found = labels.get(key);
            let values = expression.get("values").and_then(Value::as_array);
            let is_in = found.is_some_and(|f| values.into_iter().flatten().any(|v| v.as_str() == Some(f)));
            match expression.get("operator").and_then(Value::as_str) {
                Some("In") => is_in,
                Some("NotIn") => !is_in,
                Some("Exists") => found.is_some(),
                Some("DoesNotExist") => found.is_none(),
                _ => false,
            }
        })
}

/// The name of the webhook's object for a revision.
pub(super) fn webhook_name(revision: &str) -> String {
    names::with_revision("istio-sidecar-injector", revision)
}
