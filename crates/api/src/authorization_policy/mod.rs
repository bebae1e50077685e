//! `AuthorizationPolicy` (security.istio.io): who may do what to a workload.
//!
//! Types here, the kind's own rules in [`validate`]. How rules combine is `model::authz`'s business (SEMANTICS 2).

pub(crate) mod traps;
pub(crate) mod validate;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::selector::{PolicyTargetReference, WorkloadSelector};

/// Specification of an AuthorizationPolicy. Without rules it matches nothing, so an ALLOW policy `{}` denies everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) + (has(self.targetRefs) ? 1 : 0) <= 1",
    "message": "only one of targetRefs or selector can be set"
}]))]
pub struct AuthorizationPolicy {
    /// Workloads it applies to; absent or empty: the whole namespace, in the root namespace the whole mesh.
    pub selector: Option<WorkloadSelector>,
    /// The one object it is attached to (deprecated form of `targetRefs`).
    pub target_ref: Option<PolicyTargetReference>,
    /// The objects it is attached to.
    #[schemars(length(max = 16))]
    pub target_refs: Vec<PolicyTargetReference>,
    /// Requests it matches, any of them.
    #[schemars(length(max = 512))]
    pub rules: Vec<Rule>,
    /// What happens to a matching request; ALLOW when absent.
    pub action: Action,
    /// For CUSTOM: who decides.
    pub provider: Option<ExtensionProvider>,
}

/// What happens to a matching request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Action {
    /// Admit; a workload with any ALLOW policy refuses what none of them matches.
    #[default]
    Allow,
    /// Refuse, before ALLOW is looked at.
    Deny,
    /// Log only.
    Audit,
    /// Ask an external provider, before DENY and ALLOW.
    Custom,
}

/// The external decider of a CUSTOM policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionProvider {
    /// Its name in `meshConfig.extensionProviders`.
    pub name: String,
}

/// One rule: any source, any operation and all conditions must match. A missing part matches everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    /// Where requests come from, any of them.
    #[schemars(length(max = 512))]
    pub from: Vec<From>,
    /// What they do, any of them.
    pub to: Vec<To>,
    /// Further conditions, all of them.
    pub when: Vec<Condition>,
}

/// Wrapper around a source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct From {
    /// The source.
    pub source: Option<Source>,
}

/// Wrapper around an operation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct To {
    /// The operation.
    pub operation: Option<Operation>,
}

/// The origin of a request. Fields are ANDed, values of a field ORed; a `not…` field matches when none of its values does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "(has(self.serviceAccounts) || has(self.notServiceAccounts)) ? (!has(self.principals) && !has(self.notPrincipals) && !has(self.namespaces) && !has(self.notNamespaces)) : true",
    "message": "Cannot set serviceAccounts with namespaces or principals"
}]))]
pub struct Source {
    /// Peer identities without the `spiffe://` scheme, e.g. `cluster.local/ns/default/sa/web`. Needs mutual TLS.
    pub principals: Vec<String>,
    /// Peer identities that must not match.
    pub not_principals: Vec<String>,
    /// `issuer/subject` of the request's token. Needs a RequestAuthentication.
    pub request_principals: Vec<String>,
    /// Token principals that must not match.
    pub not_request_principals: Vec<String>,
    /// Namespaces of the peer's identity. Needs mutual TLS.
    pub namespaces: Vec<String>,
    /// Namespaces that must not match.
    pub not_namespaces: Vec<String>,
    /// Service accounts, `name` in the policy's namespace or `namespace/name`. Needs mutual TLS.
    #[schemars(length(max = 16), inner(length(max = 320)))]
    pub service_accounts: Vec<String>,
    /// Service accounts that must not match.
    #[schemars(length(max = 16), inner(length(max = 320)))]
    pub not_service_accounts: Vec<String>,
    /// Trust domains of the peer's identity. Needs mutual TLS.
    pub trust_domains: Vec<String>,
    /// Trust domains that must not match.
    pub not_trust_domains: Vec<String>,
    /// Addresses or CIDR ranges of the direct peer.
    pub ip_blocks: Vec<String>,
    /// Addresses or ranges the direct peer must not be in.
    pub not_ip_blocks: Vec<String>,
    /// Addresses or CIDR ranges of the original client (X-Forwarded-For or PROXY protocol).
    pub remote_ip_blocks: Vec<String>,
    /// Addresses or ranges the original client must not be in.
    pub not_remote_ip_blocks: Vec<String>,
}

impl Source {
    /// True when no field is set, which validation refuses and which matches anyone at run time (S2.35).
    pub fn is_empty(&self) -> bool {
        *self == Source::default()
    }
}

/// What a request does. Fields are ANDed, values of a field ORed. On TCP only ports have a meaning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Operation {
    /// Host or :authority values, port included as sent, case ignored.
    pub hosts: Vec<String>,
    /// Hosts that must not match.
    pub not_hosts: Vec<String>,
    /// Destination ports of the workload (of the gateway's pod on a gateway).
    pub ports: Vec<String>,
    /// Ports that must not match.
    pub not_ports: Vec<String>,
    /// HTTP methods; gRPC is always POST.
    pub methods: Vec<String>,
    /// Methods that must not match.
    pub not_methods: Vec<String>,
    /// Normalised paths without query; `{*}` is one segment, `{**}` any number.
    pub paths: Vec<String>,
    /// Paths that must not match.
    pub not_paths: Vec<String>,
}

impl Operation {
    /// True when no field is set.
    pub fn is_empty(&self) -> bool {
        *self == Operation::default()
    }
}

/// A condition on one attribute. `values` are ORed; `notValues` matches when none of them does; both must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["key"]))]
pub struct Condition {
    /// The attribute, e.g. `source.ip` or `request.headers[X-Token]`.
    pub key: String,
    /// Values of which one must match.
    pub values: Vec<String>,
    /// Values of which none may match.
    pub not_values: Vec<String>,
}
