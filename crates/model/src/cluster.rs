//! Clusters: named groups of endpoints and how to connect to them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
use crate::tls::ClientTls;

/// A cluster (`envoy.config.cluster.v3.Cluster`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Resource name ([`crate::names::ClusterName`], or one of the fixed names).
    pub name: String,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// Connect timeout in milliseconds.
    pub connect_timeout_ms: u64,
    /// Choice of an endpoint.
    pub balancer: Balancer,
    /// TLS towards its endpoints.
    pub tls: ClusterTls,
    /// HTTP version towards its endpoints.
    pub protocol: UpstreamProtocol,
    /// Local address of connections (`127.0.0.6` for inbound clusters, S6.11).
    pub bind_source: Option<IpAddr>,
    /// Bounds.
    pub limits: Limits,
    /// Ejection of failing endpoints.
    pub outlier: Option<Outlier>,
    /// The mesh services behind it, for telemetry (`istio.services` metadata).
    pub services: Vec<ServiceRef>,
    /// Whether the ALPN of mTLS connections may be replaced per request (S1.83: false for SIMPLE and MUTUAL).
    pub alpn_override: bool,
}

/// A service, as metadata of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServiceRef {
    /// Fully qualified host.
    pub host: String,
    /// Short name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
}

/// Endpoint discovery.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Discovery {
    /// Endpoints of this service name are delivered apart (EDS).
    Eds {
        /// Name of the endpoints resource.
        service: String,
    },
    /// Fixed endpoints.
    Static(Vec<Endpoint>),
    /// Host names, resolved at run time.
    Dns(Vec<Endpoint>),
    /// The connection's original destination, with this port instead of its own if given.
    OriginalDestination {
        /// Port override.
        port: Option<u16>,
    },
}

/// Load balancing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Balancer {
    /// Fewest outstanding requests of two random choices (Istio's default).
    #[default]
    LeastRequest,
    /// In turn.
    RoundRobin,
    /// At random.
    Random,
    /// The endpoint that the caller names (original destination).
    Provided,
}

/// TLS of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum ClusterTls {
    /// Plaintext.
    #[default]
    Plain,
    /// TLS to every endpoint.
    Always(Box<ClientTls>),
    /// mTLS to endpoints marked `tlsMode: istio`, plaintext to the rest (auto mTLS, S1.62).
    Auto(Box<ClientTls>),
}

/// HTTP version towards endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum UpstreamProtocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// As the downstream request (`use_downstream_protocol_config`).
    Downstream,
}

/// Bounds of a cluster; `u32::MAX` is "no bound" (Istio's default for all).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Limits {
    /// Connections.
    pub connections: u32,
    /// Requests waiting for a connection.
    pub pending: u32,
    /// Requests under way.
    pub requests: u32,
    /// Retries under way.
    pub retries: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: u32::MAX,
            pending: u32::MAX,
            requests: u32::MAX,
            retries: u32::MAX,
        }
    }
}

/// Outlier detection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Outlier {
    /// Consecutive 5xx that eject; 0 is off.
    pub consecutive_5xx: u32,
    /// Consecutive gateway errors (502, 503, 504) that eject; 0 is off.
    pub consecutive_gateway_errors: u32,
    /// Analysis interval in milliseconds.
    pub interval_ms: u64,
    /// First ejection time in milliseconds.
    pub base_ejection_ms: u64,
    /// Largest share of ejected endpoints, percent.
    pub max_ejection_percent: u32,
}
