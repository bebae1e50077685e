//! `WorkloadEntry` (networking.istio.io): one workload outside Kubernetes, and the endpoint form inside a ServiceEntry.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Specification of a WorkloadEntry.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadEntry {
    /// IP address, DNS name, or `unix:///path`. Empty only where the network says how to reach it.
    pub address: String,
    /// Port by name.
    pub ports: BTreeMap<String, u32>,
    /// Labels of the workload.
    pub labels: BTreeMap<String, String>,
    /// Network it lives in.
    pub network: String,
    /// `region/zone/subzone`.
    pub locality: String,
    /// Share of traffic.
    pub weight: u32,
    /// Service account of its identity, in the entry's namespace.
    pub service_account: String,
}
