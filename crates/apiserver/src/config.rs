//! What the server is told at start.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use crate::admission::dial::Dial;
use crate::store::RedbOptions;

/// An IPv4 range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    base: u32,
    prefix: u8,
}

impl Cidr {
    /// Number of addresses.
    pub fn size(&self) -> u64 {
        1 << (32 - u32::from(self.prefix))
    }

    /// The address at an offset, if inside.
    pub fn nth(&self, n: u64) -> Option<Ipv4Addr> {
        (n < self.size()).then(|| Ipv4Addr::from(self.base + n as u32))
    }

    /// The first usable address (`10.96.0.1`).
    pub fn first_host(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 1)
    }

    /// Whether an address is inside and is neither the network nor the broadcast address.
    pub fn contains_host(&self, ip: Ipv4Addr) -> bool {
        let offset = u64::from(u32::from(ip)).wrapping_sub(u64::from(self.base));
        offset > 0 && offset < self.size() - 1
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("{s:?} is no IPv4 range such as 10.96.0.0/16");
        let (ip, prefix) = s.split_once('/').ok_or_else(bad)?;
        let ip: Ipv4Addr = ip.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if !(8..=30).contains(&prefix) {
            return Err(format!("{s:?}: the prefix must be between 8 and 30"));
        }
        Ok(Self {
            base: u32::from(ip) & (u32::MAX << (32 - prefix)),
            prefix,
        })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

/// Configuration of the server.
#[derive(Clone)]
pub struct Config {
    /// The store's file.
    pub store_path: PathBuf,
    /// Sizes of the store.
    pub store: RedbOptions,
    /// Range of cluster IPs.
    pub service_cidr: Cidr,
    /// Range of node ports, inclusive.
    pub node_ports: (u16, u16),
    /// PEM certificates that client certificates must chain to.
    pub client_ca_pem: String,
    /// PEM key (ECDSA P-256 or RSA) that signs service account tokens.
    pub sa_key_pem: String,
    /// Issuer of service account tokens.
    pub issuer: String,
    /// Audiences that the API accepts; the first is the default of TokenRequest.
    pub api_audiences: Vec<String>,
    /// The address under which pods reach this server; endpoint of the `kubernetes` Service.
    pub advertise: SocketAddr,
    /// Unix socket of the node agent (exec, attach, log, portforward).
    pub kubelet_socket: PathBuf,
    /// Opens connections to webhooks; none: directly to pod addresses.
    pub dialer: Option<Arc<dyn Dial>>,
    /// Most requests in work at a time, watches and streams not counted.
    pub max_in_flight: usize,
    /// Seconds between bookmarks of a watch.
    pub bookmark_seconds: u64,
}

impl Config {
    /// A configuration with the usual ranges and limits.
    pub fn new(
        store_path: impl Into<PathBuf>,
        client_ca_pem: impl Into<String>,
        sa_key_pem: impl Into<String>,
    ) -> Self {
        let issuer = "https://kubernetes.default.svc.cluster.local".to_owned();
        let store_path = store_path.into();
        Self {
            kubelet_socket: store_path.with_file_name("kubelet.sock"),
            store_path,
            store: RedbOptions::default(),
            service_cidr: Cidr {
                base: u32::from(Ipv4Addr::new(10, 96, 0, 0)),
                prefix: 16,
            },
            node_ports: (30000, 32767),
            client_ca_pem: client_ca_pem.into(),
            sa_key_pem: sa_key_pem.into(),
            api_audiences: vec![issuer.clone()],
            issuer,
            advertise: SocketAddr::from(([10, 244, 0, 1], 6443)),
            dialer: None,
            max_in_flight: 400,
            bookmark_seconds: 50,
        }
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not derived: the signing key must not reach a log.
        f.debug_struct("Config")
            .field("store_path", &self.store_path)
            .field("service_cidr", &self.service_cidr.to_string())
            .field("advertise", &self.advertise)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let c: Cidr = "10.96.0.0/16".parse().unwrap();
        assert_eq!(c.first_host(), Ipv4Addr::new(10, 96, 0, 1));
        assert!(c.contains_host(Ipv4Addr::new(10, 96, 255, 254)));
        assert!(!c.contains_host(Ipv4Addr::new(10, 96, 0, 0)) && !c.contains_host(Ipv4Addr::new(10, 97, 0, 1)));
        assert!(!c.contains_host(Ipv4Addr::new(10, 95, 0, 1)));
        assert_eq!(c.nth(10), Some(Ipv4Addr::new(10, 96, 0, 10)));
        assert!(
            "10.96.0.0".parse::<Cidr>().is_err()
                && "x/16".parse::<Cidr>().is_err()
                && "10.0.0.0/31".parse::<Cidr>().is_err()
        );
    }
}
