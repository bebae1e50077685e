//! `EnvoyFilter` (networking.istio.io): patches of Envoy configuration. Kept as opaque values here.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::selector::{LabelSelector, PolicyTargetReference};

/// Specification of an EnvoyFilter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvoyFilter {
    /// Workloads it applies to.
    pub workload_selector: Option<LabelSelector>,
    /// Objects it is attached to.
    #[schemars(length(max = 16))]
    pub target_refs: Vec<PolicyTargetReference>,
    /// The patches, as written.
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub config_patches: Vec<Value>,
    /// Order among filters; lower first.
    pub priority: i32,
}
