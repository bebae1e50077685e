//! Endpoints and what is known about each.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The endpoints of one cluster (`ClusterLoadAssignment`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Endpoints {
    /// Cluster (EDS service) name.
    pub cluster: String,
    /// Endpoints, sorted by address for a stable encoding.
    pub endpoints: Vec<Endpoint>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    /// IP address, or host name in DNS clusters.
    pub address: String,
    /// Port.
    pub port: u16,
    /// Weight for balancing, at least 1.
    pub weight: u32,
    /// Whether it may get new requests.
    pub health: Health,
    /// Whether it terminates mesh mTLS (`tlsMode: istio`, S1.63).
    pub mtls: bool,
    /// Whether its proxy is Mantlet's own and understands multiplexing.
    pub mantlet: bool,
    /// The workload behind it, for telemetry; shared by endpoints of one workload.
    pub workload: Option<Arc<WorkloadRef>>,
}

/// Health of an endpoint, as the registry sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Health {
    /// May be chosen.
    #[default]
    Healthy,
    /// Not chosen.
    Unhealthy,
    /// Finishes its requests, gets no new ones.
    Draining,
}

/// A workload as endpoint metadata: `istio.workload` = `name;namespace;canonical;revision;cluster`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WorkloadRef {
    /// Workload (Deployment) name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Canonical service name.
    pub canonical_name: String,
    /// Canonical revision.
    pub canonical_revision: String,
    /// Cluster id.
    pub cluster: String,
}

impl WorkloadRef {
    /// Istio's one-line form.
    pub fn to_metadata(&self) -> String {
        [
            &self.name,
            &self.namespace,
            &self.canonical_name,
            &self.canonical_revision,
            &self.cluster,
        ]
        .map(String::as_str)
        .join(";")
    }

    /// Reads Istio's one-line form; `None` unless it has five parts.
    pub fn from_metadata(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split(';').collect();
        let [name, namespace, canonical_name, canonical_revision, cluster] = parts.as_slice() else {
            return None;
        };
        Some(WorkloadRef {
            name: name.to_string(),
            namespace: namespace.to_string(),
            canonical_name: canonical_name.to_string(),
            canonical_revision: canonical_revision.to_string(),
            cluster: cluster.to_string(),
        })
    }
}
