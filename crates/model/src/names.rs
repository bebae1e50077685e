//! Istio's resource names, built and parsed in one place (SEMANTICS 6a, S1.80).
//!
//! Every crate that needs a cluster name, an SNI or a virtual-host name calls this module; nobody formats them by hand.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

/// Cluster for captured inbound traffic of ports that no Service declares.
pub const INBOUND_PASSTHROUGH: &str = "InboundPassthroughCluster";
/// Cluster for outbound traffic to destinations outside the mesh (`ALLOW_ANY`).
pub const PASSTHROUGH: &str = "PassthroughCluster";
/// Cluster that refuses everything.
pub const BLACK_HOLE: &str = "BlackHoleCluster";
/// Listener that all captured inbound connections reach.
pub const VIRTUAL_INBOUND: &str = "virtualInbound";
/// Listener that all captured outbound connections reach.
pub const VIRTUAL_OUTBOUND: &str = "virtualOutbound";
/// SDS name of the workload's own certificate and key.
pub const SECRET_DEFAULT: &str = "default";
/// SDS name of the mesh trust bundle.
pub const SECRET_ROOT: &str = "ROOTCA";

/// Source address of the proxy's connections to its own application; capture exempts it (S6.11).
pub const INBOUND_SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));

/// Port of the inbound capture listener.
pub const INBOUND_PORT: u16 = 15006;
/// Port of the outbound capture listener.
pub const OUTBOUND_PORT: u16 = 15001;

/// ALPN values by which a Mantlet or Istio client says that it speaks HTTP over mesh mTLS.
pub const ALPN_ISTIO_HTTP: [&str; 3] = ["istio-http/1.0", "istio-http/1.1", "istio-h2"];
/// ALPN values by which a client says that it carries TCP over mesh mTLS.
pub const ALPN_ISTIO_TCP: [&str; 2] = ["istio-peer-exchange", "istio"];
/// Application protocols that the HTTP inspector finds in plaintext.
pub const ALPN_PLAIN_HTTP: [&str; 2] = ["http/1.1", "h2c"];

/// Direction of a cluster, from the point of view of the proxy that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Direction {
    /// Traffic that enters the workload.
    Inbound,
    /// Traffic that leaves the workload.
    Outbound,
}

/// A cluster name in its parts: `outbound|PORT|SUBSET|HOST` or `inbound|PORT||`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClusterName<'a> {
    /// Which way traffic flows.
    pub direction: Direction,
    /// Service port (outbound) or workload port (inbound).
    pub port: u16,
    /// Subset of a DestinationRule, empty for none.
    pub subset: &'a str,
    /// Fully qualified host, empty for inbound clusters.
    pub host: &'a str,
}

impl<'a> ClusterName<'a> {
    /// An outbound cluster of `host:port`, subset `subset` (empty for none).
    pub fn outbound(port: u16, subset: &'a str, host: &'a str) -> Self {
        ClusterName {
            direction: Direction::Outbound,
            port,
            subset,
            host,
        }
    }

    /// The inbound cluster of a workload port.
    pub fn inbound(port: u16) -> ClusterName<'static> {
        ClusterName {
            direction: Direction::Inbound,
            port,
            subset: "",
            host: "",
        }
    }

    /// Parses a cluster name; `None` for names of another form (`PassthroughCluster`, …).
    pub fn parse(name: &'a str) -> Option<Self> {
        let mut parts = name.split('|');
        let direction = match parts.next()? {
            "inbound" => Direction::Inbound,
            "outbound" => Direction::Outbound,
            _ => return None,
        };
        let port = parts.next()?.parse().ok()?;
        let subset = parts.next()?;
        let host = parts.next()?;
        if parts.next().is_some() {
            return None;
        }
        Some(ClusterName {
            direction,
            port,
            subset,
            host,
        })
    }

    /// The SNI that a mesh client sends for this cluster: `outbound_.PORT_.SUBSET_.HOST` (S1.80).
    pub fn sni(&self) -> String {
        format!("outbound_.{}_.{}_.{}", self.port, self.subset, self.host)
    }
}

impl fmt::Display for ClusterName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        };
        write!(f, "{direction}|{}|{}|{}", self.port, self.subset, self.host)
    }
}

/// The SPIFFE URI of a service account: `spiffe://TD/ns/NS/sa/SA` (S4.1).
pub fn spiffe(trust_domain: &str, namespace: &str, service_account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_round_trip() {
        for name in [
            "outbound|80||web.default.svc.cluster.local",
            "outbound|80|v1|web.a.svc.cluster.local",
            "inbound|8080||",
        ] {
            assert_eq!(ClusterName::parse(name).unwrap().to_string(), name);
        }
        for name in [
            "PassthroughCluster",
            "outbound|x||h",
            "outbound|80|h",
            "outbound|80||h|",
            "sideways|80||h",
        ] {
            assert_eq!(ClusterName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn sni_has_istios_form() {
        let name = ClusterName::outbound(8000, "", "httpbin.foo.svc.cluster.local");
        assert_eq!(name.sni(), "outbound_.8000_._.httpbin.foo.svc.cluster.local");
    }
}
