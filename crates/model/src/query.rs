//! The answers that the command line and the console share, as plain values.
//!
//! The proxy and the control plane serve them as JSON; who asks only prints them.

use serde::{Deserialize, Serialize};

use crate::snapshot::ProxySnapshot;

/// State of one xDS type on one stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SyncState {
    /// Never subscribed.
    #[default]
    #[serde(rename = "NOT SENT")]
    NotSent,
    /// The last push was acknowledged.
    #[serde(rename = "SYNCED")]
    Synced,
    /// A push waits for its acknowledgement.
    #[serde(rename = "STALE")]
    Stale,
    /// The last push was refused.
    #[serde(rename = "ERROR")]
    Error,
}

/// One row of `istioctl proxy-status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyStatus {
    /// `<pod>.<namespace>`.
    pub proxy: String,
    /// Cluster id.
    pub cluster: String,
    /// Clusters.
    pub cds: SyncState,
    /// Listeners.
    pub lds: SyncState,
    /// Endpoints.
    pub eds: SyncState,
    /// Routes.
    pub rds: SyncState,
    /// Extension configurations.
    pub ecds: SyncState,
    /// The control plane instance that serves it.
    pub istiod: String,
    /// Version that the proxy reported.
    pub version: String,
    /// Messages of refused pushes, newest last.
    pub errors: Vec<String>,
}

/// One certificate or trust bundle of a proxy (`istioctl proxy-config secret`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretStatus {
    /// Resource name.
    pub name: String,
    /// `Cert Chain` or `CA`.
    pub kind: String,
    /// `ACTIVE` or `WARMING`.
    pub state: String,
    /// Whether it is valid now.
    pub valid: bool,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// RFC 3339.
    pub not_after: String,
    /// RFC 3339.
    pub not_before: String,
    /// Trust domain or SPIFFE URI.
    pub subject_alt_names: Vec<String>,
}

/// A denied request or connection, as the proxy remembers it for `mantlet authz why`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// RFC 3339.
    pub time: String,
    /// Peer's SPIFFE URI, if any.
    pub source_principal: Option<String>,
    /// Peer's address.
    pub source: String,
    /// Workload port.
    pub port: u16,
    /// Method, empty for TCP.
    pub method: String,
    /// Normalised path, empty for TCP.
    pub path: String,
    /// `:authority`.
    pub host: String,
    /// Response code details (`rbac_access_denied_matched_policy[…]`).
    pub details: String,
    /// For a denial without a matching rule: the ALLOW rule that came closest. Absent where there was no time to look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest: Option<NearestRule>,
}

/// The rule that came closest to allowing what was denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NearestRule {
    /// Its id.
    pub rule: String,
    /// What kept it from matching, in words.
    pub failed: Vec<String>,
}

/// What a proxy holds, as its admin port answers on `/config_dump` (`istioctl proxy-config`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ConfigDump {
    /// Proxy version.
    pub version: String,
    /// Node id of its xDS streams.
    pub node: String,
    /// Node metadata of its xDS streams.
    pub metadata: serde_json::Value,
    /// The configuration in force.
    pub snapshot: ProxySnapshot,
    /// Certificates and trust bundles, without keys.
    pub secrets: Vec<SecretStatus>,
}
