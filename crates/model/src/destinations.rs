//! What is served in the mesh, without how: the names of outbound listeners and the addresses of HTTP services.
//!
//! A proxy that asks for configuration at first use ([ADR 6](../../../docs/adr/0006-configuration-on-demand.md)) has to know
//! whether a destination is the mesh's before it lets bytes pass: what is not listed here goes out as it came, what is listed waits for
//! its configuration, or fails. `translate` makes the lists with the listeners, `xds` carries them, the proxy asks them per
//! connection that meets no listener. They are cut into shards, so that a new service sends one small message to each proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::listener::Listener;
use crate::names::Direction;
use crate::route::RouteTable;

/// Number of shards by address. 2,000 services make shards of 250 bytes.
const SHARDS: usize = 32;
/// Name of the list that holds what has no address.
pub const NAMES: &str = "names";

/// A part of what is served. All lists are sorted and without repetition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destinations {
    /// Resource name: the number of a shard, or [`NAMES`].
    pub name: String,
    /// Addresses with a listener of their own (`<ip>_<port>`).
    pub listeners: Vec<SocketAddr>,
    /// Addresses of services with HTTP ports.
    pub addresses: Vec<IpAddr>,
    /// Ports with a listener for every address (`0.0.0.0_<port>`).
    pub ports: Vec<u16>,
    /// Hosts of HTTP services that have no address, and so are known by the request's host alone; `*.suffix` among them.
    pub hosts: Vec<String>,
}

impl Destinations {
    fn is_empty(&self) -> bool {
        self.listeners.is_empty() && self.addresses.is_empty() && self.ports.is_empty() && self.hosts.is_empty()
    }
}

/// The lists, by name, of these outbound listeners, of HTTP services at these addresses, and of those at none.
pub fn destinations<'a>(
    listeners: impl IntoIterator<Item = &'a Listener>,
    addresses: impl IntoIterator<Item = IpAddr>,
    hosts: impl IntoIterator<Item = String>,
) -> BTreeMap<String, Destinations> {
    let mut shards: Vec<Destinations> = (0..SHARDS)
        .map(|number| Destinations {
            name: format!("{number:02}"),
            ..Destinations::default()
        })
        .collect();
    let mut names = Destinations {
        name: NAMES.to_string(),
        ..Destinations::default()
    };
    for listener in listeners {
        if listener.bind_to_port || listener.direction != Direction::Outbound {
            continue;
        }
        if listener.address.ip().is_unspecified() {
            names.ports.push(listener.address.port());
        } else {
            shards[shard(listener.address.ip())].listeners.push(listener.address);
        }
    }
    for address in addresses {
        shards[shard(address)].addresses.push(address);
    }
    let hosts: BTreeSet<String> = hosts.into_iter().collect();
    names.hosts = hosts.into_iter().collect();
    shards.push(names);
    for shard in &mut shards {
        shard.listeners.sort_unstable();
        shard.listeners.dedup();
        shard.addresses.sort_unstable();
        shard.addresses.dedup();
        shard.ports.sort_unstable();
        shard.ports.dedup();
    }
    // There is always one: who gets none has a control plane that does not know what this is.
    let given = shards
        .into_iter()
        .filter(|shard| shard.name == NAMES || !shard.is_empty());
    given.map(|shard| (shard.name.clone(), shard)).collect()
}

/// The lists of a finished configuration: addresses and hosts are those in the domains of its route tables.
pub fn of_snapshot<'a>(
    listeners: impl IntoIterator<Item = &'a Listener>,
    routes: impl IntoIterator<Item = &'a RouteTable>,
) -> BTreeMap<String, Destinations> {
    let mut addresses = Vec::new();
    let mut hosts = Vec::new();
    for host in routes.into_iter().flat_map(|table| &table.hosts) {
        let before = addresses.len();
        let literal = |domain: &String| domain.trim_matches(['[', ']']).parse::<IpAddr>().ok();
        addresses.extend(host.domains.iter().filter_map(literal));
        if addresses.len() == before {
            hosts.extend(host.domains.iter().filter(|domain| *domain != "*").cloned());
        }
    }
    destinations(listeners, addresses, hosts)
}

/// Where an address is listed. Only its author has to know: a reader asks all shards.
fn shard(ip: IpAddr) -> usize {
    let mix = |hash: usize, byte: u8| (hash ^ usize::from(byte)).wrapping_mul(0x0100_0193);
    let hash = match ip {
        IpAddr::V4(ip) => ip.octets().into_iter().fold(0x811c_9dc5, mix),
        IpAddr::V6(ip) => ip.octets().into_iter().fold(0x811c_9dc5, mix),
    };
    (hash ^ (hash >> 16)) % SHARDS
}

/// The lists that a proxy holds, as questions.
#[derive(Clone, Debug, Default)]
pub struct Served<'a> {
    lists: &'a [std::sync::Arc<Destinations>],
}

impl<'a> Served<'a> {
    /// Over these lists.
    pub fn new(lists: &'a [std::sync::Arc<Destinations>]) -> Self {
        Served { lists }
    }

    /// Whether the address has a listener of its own.
    pub fn has_listener(&self, address: SocketAddr) -> bool {
        self.lists.iter().any(|l| l.listeners.binary_search(&address).is_ok())
    }

    /// Whether the port has a listener for every address.
    pub fn has_port(&self, port: u16) -> bool {
        self.lists.iter().any(|l| l.ports.binary_search(&port).is_ok())
    }

    /// Whether a service is at this address.
    pub fn has_address(&self, ip: IpAddr) -> bool {
        self.lists.iter().any(|list| {
            let at = list.listeners.partition_point(|listener| listener.ip() < ip);
            list.addresses.binary_search(&ip).is_ok() || list.listeners.get(at).is_some_and(|found| found.ip() == ip)
        })
    }

    /// Whether a service without an address has this host (lower case, without port).
    pub fn has_host(&self, host: &str) -> bool {
        let covers = |pattern: &String| match pattern.strip_prefix('*') {
            Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
            None => pattern == host,
        };
        self.lists.iter().any(|list| list.hosts.iter().any(covers))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::listener::Inspector;

    fn listener(address: SocketAddr) -> Listener {
        Listener {
            name: format!("{}_{}", address.ip(), address.port()),
            address,
            bind_to_port: false,
            use_original_dst: false,
            direction: Direction::Outbound,
            chains: Vec::new(),
            default_chain: None,
            tls_inspector: Inspector::Off,
            http_inspector: Inspector::Off,
            detection_timeout_ms: 0,
            access_log: None,
        }
    }

    proptest! {
        #[test]
        fn exactly_what_was_listed_is_served(
            listed in prop::collection::vec((any::<u16>(), 1u16..4), 0..200),
            addresses in prop::collection::vec(any::<u16>(), 0..200),
            asked in prop::collection::vec((any::<u16>(), 1u16..4), 0..200),
        ) {
            let ip = |n: u16| IpAddr::from([10, 96, (n >> 8) as u8, n as u8]);
            let listeners: Vec<Listener> = listed.iter().map(|(n, p)| listener(SocketAddr::new(ip(*n), *p))).collect();
            let lists: Vec<Arc<Destinations>> = destinations(&listeners, addresses.iter().map(|n| ip(*n)), [])
                .into_values()
                .map(Arc::new)
                .collect();
            let served = Served::new(&lists);
            for (n, port) in asked.iter().chain(&listed) {
                let address = SocketAddr::new(ip(*n), *port);
                prop_assert_eq!(served.has_listener(address), listed.contains(&(*n, *port)));
                let known = addresses.contains(n) || listed.iter().any(|(l, _)| l == n);
                prop_assert_eq!(served.has_address(ip(*n)), known);
            }
        }
    }

    #[test]
    fn a_new_service_changes_one_shard() {
        let ip = |n: u32| IpAddr::from((0x0a60_0000 + n).to_be_bytes());
        let before = destinations([], (0..2000).map(ip), []);
        let after = destinations([], (0..2001).map(ip), []);
        let changed = after.iter().filter(|(name, list)| before.get(*name) != Some(list));
        assert_eq!(changed.count(), 1);
        let largest = before.values().map(|list| list.addresses.len()).max().unwrap();
        assert!(
            largest < 2 * 2000 / SHARDS,
            "{largest} addresses in one of {SHARDS} shards"
        );
    }

    #[test]
    fn ports_and_hosts_without_addresses_have_a_list_of_their_own() {
        let wildcard = listener(SocketAddr::from(([0, 0, 0, 0], 80)));
        let lists: Vec<Arc<Destinations>> = destinations([&wildcard], [], ["*.example.com".into(), "api.test".into()])
            .into_values()
            .map(Arc::new)
            .collect();
        assert_eq!(lists.len(), 1);
        assert_eq!(destinations([], [], []).len(), 1);
        let served = Served::new(&lists);
        assert!(served.has_port(80) && !served.has_port(81));
        assert!(served.has_host("a.example.com") && served.has_host("api.test"));
        assert!(!served.has_host("example.com") && !served.has_host(".example.com"));
    }
}
