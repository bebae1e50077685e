//! `ServiceRole`, `ServiceRoleBinding`, `ClusterRbacConfig`, `RbacConfig` (rbac.istio.io/v1alpha1): who may do what, by service.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Specification of a ServiceRole: what may be done, any of the rules.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["rules"]))]
pub struct ServiceRole {
    /// Rules.
    #[schemars(length(max = 512))]
    pub rules: Vec<AccessRule>,
}

/// One permission. Fields are ANDed, values of a field ORed; texts are exact, `abc*`, `*abc` or `*` (S7.37).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AccessRule {
    /// Services of the role's namespace, by fully qualified host; none or `*`: all of them.
    #[schemars(length(max = 512))]
    pub services: Vec<String>,
    /// Hosts.
    pub hosts: Vec<String>,
    /// Hosts that must not match.
    pub not_hosts: Vec<String>,
    /// Paths.
    pub paths: Vec<String>,
    /// Paths that must not match.
    pub not_paths: Vec<String>,
    /// HTTP methods.
    pub methods: Vec<String>,
    /// Methods that must not match.
    pub not_methods: Vec<String>,
    /// Ports of the workload.
    pub ports: Vec<u32>,
    /// Ports that must not match.
    pub not_ports: Vec<u32>,
    /// Further conditions on the request and the called workload, all of them.
    #[schemars(length(max = 64))]
    pub constraints: Vec<Constraint>,
}

/// A condition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["key", "values"]))]
pub struct Constraint {
    /// The attribute, e.g. `destination.labels[app]` or `request.headers[x-token]` (S7.40).
    pub key: String,
    /// Values of which one must match.
    #[schemars(length(max = 512))]
    pub values: Vec<String>,
}

/// Specification of a ServiceRoleBinding: who gets a role.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["subjects"]))]
pub struct ServiceRoleBinding {
    /// Who, any of them.
    #[schemars(length(max = 512))]
    pub subjects: Vec<Subject>,
    /// The role; or `role`, or `actions`.
    pub role_ref: Option<RoleRef>,
    /// The role by name; `/name` is a role of the root namespace.
    pub role: String,
    /// The permissions themselves.
    #[schemars(length(max = 512))]
    pub actions: Vec<AccessRule>,
    /// `PERMISSIVE` is a trial run.
    pub mode: EnforcementMode,
}

/// A reference to a role.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RoleRef {
    /// `ServiceRole`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// A caller. Fields are ANDed, values of a field ORed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Subject {
    /// Identity without the `spiffe://` scheme; `*` is anyone, authenticated or not (S7.43).
    pub user: String,
    /// Identities; `allUsers` and `allAuthenticatedUsers` are words of their own.
    pub names: Vec<String>,
    /// Identities that must not match.
    pub not_names: Vec<String>,
    /// A value of the token's claim `groups`.
    pub group: String,
    /// Values of the token's claim `groups`.
    pub groups: Vec<String>,
    /// Values that must not be in it.
    pub not_groups: Vec<String>,
    /// Namespaces of the caller.
    pub namespaces: Vec<String>,
    /// Namespaces that must not match.
    pub not_namespaces: Vec<String>,
    /// Addresses or CIDR ranges of the caller.
    pub ips: Vec<String>,
    /// Addresses that must not match.
    pub not_ips: Vec<String>,
    /// Further attributes, e.g. `source.namespace` or `request.auth.claims[group]` (S7.42).
    pub properties: BTreeMap<String, String>,
}

impl Subject {
    /// True when no field is set: nobody (S7.44).
    pub fn is_empty(&self) -> bool {
        *self == Subject::default()
    }
}

/// Whether something is enforced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum EnforcementMode {
    /// Enforced.
    #[default]
    Enforced,
    /// Counted only.
    Permissive,
}

/// Specification of a ClusterRbacConfig (cluster-scoped) or RbacConfig (deprecated, namespaced, of the same meaning). The name is
/// `default` (S7.30).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RbacConfig {
    /// Where access is denied by default.
    pub mode: RbacMode,
    /// For ON_WITH_INCLUSION.
    pub inclusion: Option<RbacTarget>,
    /// For ON_WITH_EXCLUSION.
    pub exclusion: Option<RbacTarget>,
    /// `PERMISSIVE` makes everything a trial run.
    pub enforcement_mode: EnforcementMode,
}

/// Specification of a ClusterRbacConfig.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct ClusterRbacConfig(pub RbacConfig);

/// Where access is denied by default (S7.31).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum RbacMode {
    /// Nowhere.
    #[default]
    Off,
    /// Everywhere.
    On,
    /// In what `inclusion` lists.
    OnWithInclusion,
    /// Everywhere but in what `exclusion` lists.
    OnWithExclusion,
}

/// Services and namespaces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RbacTarget {
    /// Fully qualified hosts.
    #[schemars(length(max = 4096))]
    pub services: Vec<String>,
    /// Namespaces.
    #[schemars(length(max = 4096))]
    pub namespaces: Vec<String>,
}
