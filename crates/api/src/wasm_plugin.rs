//! `WasmPlugin` (extensions.istio.io). Mantlet hosts no WebAssembly; the kind exists so that objects can be stored and
//! reported on. The fields are Istio's.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::selector::{PolicyTargetReference, WorkloadSelector};

/// Specification of a WasmPlugin.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["url"]))]
pub struct WasmPlugin {
    /// Workloads it applies to.
    pub selector: Option<WorkloadSelector>,
    /// The one object it is attached to (deprecated form of `targetRefs`).
    pub target_ref: Option<PolicyTargetReference>,
    /// Objects it is attached to.
    #[schemars(length(max = 16))]
    pub target_refs: Vec<PolicyTargetReference>,
    /// Where the module is.
    #[schemars(length(min = 1))]
    pub url: String,
    /// Its checksum.
    pub sha256: String,
    /// When it is pulled.
    pub image_pull_policy: String,
    /// Secret for pulling.
    pub image_pull_secret: String,
    /// Key that signed it.
    pub verification_key: String,
    /// Its configuration.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub plugin_config: Value,
    /// Its name inside the module.
    pub plugin_name: String,
    /// Where in the chain: AUTHN, AUTHZ, STATS or unspecified.
    pub phase: String,
    /// Order within the phase.
    pub priority: Option<i32>,
    /// What happens when it cannot be loaded.
    pub fail_strategy: String,
    /// Environment of the module.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub vm_config: Value,
    /// Traffic it applies to.
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub r#match: Vec<Value>,
    /// HTTP or NETWORK.
    pub r#type: String,
}
