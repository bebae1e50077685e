//! Workload selectors and policy target references, as shared by the policy kinds (SEMANTICS G2, S2.1–S2.9).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Labels a workload must carry. An empty map selects every workload in scope.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadSelector {
    /// Every pair must be present on the workload; there are no expressions and no wildcards.
    #[schemars(extend("maxProperties" = 4096, "additionalProperties" = {"type": "string", "maxLength": 63}, "x-kubernetes-validations" = [
        {"rule": "self.all(key, !key.contains('*'))", "message": "wildcard not allowed in label key match"},
        {"rule": "self.all(key, !self[key].contains('*'))", "message": "wildcard not allowed in label value match"},
        {"rule": "self.all(key, key.size() != 0)", "message": "key must not be empty"}
    ]))]
    pub match_labels: BTreeMap<String, String>,
}

impl WorkloadSelector {
    /// True when the workload's labels hold every pair of the selector (so always for an empty one).
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        subset(&self.match_labels, labels)
    }

    /// True when nothing is asked for, which policies treat as "no selector".
    pub fn is_empty(&self) -> bool {
        self.match_labels.is_empty()
    }
}

/// The networking kinds' selector: the same meaning under another field name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Every pair must be present on the workload.
    pub labels: BTreeMap<String, String>,
}

impl LabelSelector {
    /// True when the workload's labels hold every pair of the selector.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        subset(&self.labels, labels)
    }
}

/// True when every pair of `wanted` is in `labels`.
pub fn subset(wanted: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// True when an optional selector matches: none and an empty one match everything.
pub fn selects(selector: Option<&WorkloadSelector>, labels: &BTreeMap<String, String>) -> bool {
    selector.is_none_or(|selector| selector.matches(labels))
}

/// The object a policy is attached to instead of selecting workloads by label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["kind", "name"]))]
pub struct PolicyTargetReference {
    /// API group of the target; empty and `core` mean the core group.
    #[schemars(length(max = 253))]
    pub group: String,
    /// Kind of the target.
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,
    /// Name of the target.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Namespace of the target; only the policy's own namespace is supported.
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "self.size() == 0", "message": "cross namespace referencing is not currently supported"}
    ]))]
    pub namespace: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn subset_match() {
        let selector = WorkloadSelector {
            match_labels: labels(&[("app", "a"), ("v", "1")]),
        };
        assert!(selector.matches(&labels(&[("app", "a"), ("v", "1"), ("x", "y")])));
        assert!(!selector.matches(&labels(&[("app", "a")])));
        assert!(!selector.matches(&labels(&[("app", "a"), ("v", "2")])));
        assert!(WorkloadSelector::default().matches(&labels(&[])));
        assert!(selects(None, &labels(&[("app", "b")])));
    }
}
