//! `PeerAuthentication` (security.istio.io): which connections a workload accepts, mutual TLS or plaintext.
//!
//! Precedence between policies is `translate`'s business (SEMANTICS 1a); here are the fields and their own rules (S8.46).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnostic::Diagnostic;
use crate::selector::WorkloadSelector;
use crate::validate;

/// Specification of a PeerAuthentication.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "(has(self.selector) && has(self.selector.matchLabels) && self.selector.matchLabels.size() > 0) || !has(self.portLevelMtls)",
    "message": "portLevelMtls requires selector"
}]))]
pub struct PeerAuthentication {
    /// Workloads it applies to; absent or empty: the whole namespace, in the root namespace the whole mesh.
    pub selector: Option<WorkloadSelector>,
    /// Mode for all ports; absent or UNSET inherits from the next wider policy.
    pub mtls: Option<MutualTls>,
    /// Mode by the workload's own port (the container's, not the Service's). Needs a selector.
    #[schemars(with = "BTreeMap<String, MutualTls>", extend("minProperties" = 1, "x-kubernetes-validations" = [
        {"rule": "self.all(key, 0 < int(key) && int(key) <= 65535)", "message": "port must be between 1-65535"}
    ]))]
    pub port_level_mtls: BTreeMap<u32, MutualTls>,
}

impl PeerAuthentication {
    /// True when it selects workloads by label (S1.2).
    pub fn has_selector(&self) -> bool {
        self.selector.as_ref().is_some_and(|selector| !selector.is_empty())
    }

    /// The mode for all ports, UNSET when absent (S1.5).
    pub fn mode(&self) -> MutualTlsMode {
        self.mtls.as_ref().map(|mtls| mtls.mode).unwrap_or_default()
    }
}

/// Mutual TLS settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MutualTls {
    /// What the port accepts.
    pub mode: MutualTlsMode,
}

/// What a port accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MutualTlsMode {
    /// Inherit; PERMISSIVE if nothing is said anywhere.
    #[default]
    Unset,
    /// Plaintext only.
    Disable,
    /// Plaintext and mutual TLS.
    Permissive,
    /// Mutual TLS with a client certificate only.
    Strict,
}

/// Istio's rules for the kind.
pub(crate) fn validate(spec: &PeerAuthentication, raw: &Value) -> Vec<Diagnostic> {
    let mut findings = validate::selector(spec.selector.as_ref(), "spec.selector");
    let ports_given = raw.pointer("/spec/portLevelMtls").is_some_and(|v| !v.is_null());
    if ports_given && !spec.has_selector() {
        findings.push(Diagnostic::error(
            "spec.portLevelMtls",
            "mesh/namespace peer authentication cannot have port level mTLS",
        ));
    }
    if ports_given && spec.port_level_mtls.is_empty() {
        findings.push(Diagnostic::error(
            "spec.portLevelMtls",
            "port level mTLS, if defined, must have at least one element",
        ));
    }
    for port in spec.port_level_mtls.keys() {
        if *port == 0 || *port > 65535 {
            findings.push(Diagnostic::error(
                format!("spec.portLevelMtls[{port}]"),
                format!("port number {port} must be in the range 1..65535"),
            ));
        }
    }
    findings
}
