//! Route tables that are filled on demand: what of a table every client gets, and how one virtual host of it is found and named.
//!
//! The table of a port number holds a virtual host for each HTTP service of the mesh. A proxy that asks at first use
//! gets it [bare](RouteTable::bare), and each virtual host by [`VirtualHostName`]: the table and the authority that it
//! met. `xds` answers such names with [`HostIndex`].

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::compiled::without_port;
use super::{RouteTable, VirtualHost};

/// Longest authority that can be asked for, in bytes: a DNS name has at most 253. A longer one is no service's.
pub const MAX_AUTHORITY: usize = 255;

/// Name of a virtual host as a resource of its own: `<table>/<authority>`, Envoy's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VirtualHostName<'a> {
    /// Name of the table; it has no slash.
    pub table: &'a str,
    /// Authority in the form of [`RouteTable::authority`].
    pub authority: &'a str,
}

impl<'a> VirtualHostName<'a> {
    /// Reads a resource name; `None` if it is none.
    pub fn parse(name: &'a str) -> Option<Self> {
        let (table, authority) = name.split_once('/')?;
        (!table.is_empty() && !authority.is_empty() && authority.len() <= MAX_AUTHORITY)
            .then_some(VirtualHostName { table, authority })
    }
}

impl fmt::Display for VirtualHostName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.table, self.authority)
    }
}

impl RouteTable {
    /// Whether this is the table of all services of a port, which is as long as the mesh is large.
    pub fn is_of_port(&self) -> bool {
        self.name.parse::<u16>().is_ok()
    }

    /// The table without what is asked for by name: it says what happens to unknown hosts.
    #[must_use]
    pub fn bare(&self) -> RouteTable {
        let fallback = |host: &&Arc<VirtualHost>| host.domains.iter().any(|domain| domain == "*");
        RouteTable {
            name: self.name.clone(),
            hosts: self.hosts.iter().filter(fallback).cloned().collect(),
            ignore_port_in_host: self.ignore_port_in_host,
            on_demand: true,
        }
    }

    /// The part of an authority by which virtual hosts are told apart: lower case, without a port that is ignored.
    pub fn authority<'a>(&self, authority: &'a str) -> Cow<'a, str> {
        let name = if self.ignore_port_in_host {
            without_port(authority)
        } else {
            authority
        };
        if name.bytes().any(|b| b.is_ascii_uppercase()) {
            Cow::Owned(name.to_ascii_lowercase())
        } else {
            Cow::Borrowed(name)
        }
    }
}

/// Positions of a host in its table and of a domain in the host.
type Place = (u32, u32);

/// Finds virtual hosts in a long table. It holds positions only, eight bytes for each domain, since a control plane has one for each table
/// that somebody asks about. The choice is that of [`CompiledRoutes`](super::CompiledRoutes).
#[derive(Debug)]
pub struct HostIndex {
    /// Exact domains, sorted; of equal ones the first host's is first.
    exact: Box<[Place]>,
    /// Domains with `*`, in table order, without `*` itself.
    patterns: Box<[Place]>,
}

impl HostIndex {
    /// The index of a table. Ask it with the same table only.
    pub fn new(table: &RouteTable) -> HostIndex {
        let places = table.hosts.iter().zip(0u32..).flat_map(|(host, at)| {
            let domains = host.domains.iter().zip(0u32..);
            domains.map(move |(domain, n)| (domain.as_str(), (at, n)))
        });
        let is_pattern = |domain: &str| domain.starts_with('*') || domain.ends_with('*');
        let (patterns, mut exact): (Vec<_>, Vec<_>) = places.partition(|(domain, _)| is_pattern(domain));
        exact.sort();
        HostIndex {
            exact: exact.into_iter().map(|(_, place)| place).collect(),
            patterns: patterns
                .into_iter()
                .filter(|(domain, _)| *domain != "*")
                .map(|(_, place)| place)
                .collect(),
        }
    }

    /// The virtual host of an authority (in the form of [`RouteTable::authority`]): exact name, longest `*.suffix`, longest `prefix.*`. What only `*`
    /// covers is not found.
    pub fn find<'t>(&self, table: &'t RouteTable, authority: &str) -> Option<&'t VirtualHost> {
        let domain = |(host, n): Place| table.hosts[host as usize].domains[n as usize].as_str();
        let at = self.exact.partition_point(|place| domain(*place) < authority);
        let exact = self.exact.get(at).filter(|place| domain(**place) == authority);
        let found = exact.copied().or_else(|| {
            let suffix = |place: Place| Some(domain(place).strip_prefix('*')?).filter(|s| authority.ends_with(s));
            let prefix = |place: Place| {
                let prefix = domain(place).strip_suffix('*')?;
                (!domain(place).starts_with('*') && authority.starts_with(prefix)).then_some(prefix)
            };
            // A `*` stands for at least one character. The first of equally long ones wins, as in the table.
            let longest = |part: &dyn Fn(Place) -> Option<&'t str>| {
                let fitting = self.patterns.iter().rev().filter_map(|place| {
                    let length = part(*place)?.len();
                    (length < authority.len()).then_some((length, *place))
                });
                fitting.max_by_key(|(length, _)| *length).map(|(_, place)| place)
            };
            longest(&suffix).or_else(|| longest(&prefix))
        });
        found.map(|(host, _)| &*table.hosts[host as usize])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::route::CompiledRoutes;

    fn host(domains: Vec<String>) -> Arc<VirtualHost> {
        Arc::new(VirtualHost {
            name: domains.join(","),
            domains,
            routes: Vec::new(),
            attempt_count: false,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// The two ways to choose a virtual host agree, but for `*`.
        #[test]
        fn the_index_finds_what_the_compiled_table_finds(
            hosts in prop::collection::vec(prop::collection::vec("(\\*|\\*\\.|)[ab]{0,2}(\\.[ab]{1,2}){0,2}(|\\.\\*|\\*)", 1..4), 0..8),
            asked in prop::collection::vec("[abAB]{0,2}(\\.[ab]{1,2}){0,3}(:80)?", 1..20),
            ignore_port_in_host in any::<bool>(),
        ) {
            let table = Arc::new(RouteTable {
                name: "80".into(),
                hosts: hosts.into_iter().map(host).collect(),
                ignore_port_in_host,
                on_demand: false,
            });
            let compiled = CompiledRoutes::new(table.clone());
            let index = HostIndex::new(&table);
            for authority in asked {
                let wanted = compiled.host_index(&authority).filter(|found| Some(*found) != compiled.fallback());
                let found = index.find(&table, &table.authority(&authority));
                let found = found.map(|found| table.hosts.iter().position(|host| std::ptr::eq(&**host, found)).unwrap());
                // A host may be the fallback and have other domains, too.
                if found != compiled.fallback() {
                    prop_assert_eq!(found, wanted, "{}", authority);
                }
            }
        }
    }

    #[test]
    fn a_bare_table_keeps_what_it_says_of_unknown_hosts() {
        let table = RouteTable {
            name: "80".into(),
            hosts: vec![host(vec!["a".into(), "a.b".into()]), host(vec!["*".into()])],
            ignore_port_in_host: true,
            on_demand: false,
        };
        let bare = table.bare();
        assert!(bare.on_demand && bare.is_of_port());
        assert_eq!(bare.hosts, table.hosts[1..]);
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        let name = VirtualHostName {
            table: "9080",
            authority: "reviews.default/x",
        };
        assert_eq!(VirtualHostName::parse(&name.to_string()), Some(name));
        for bad in ["80", "/a", "80/", &format!("80/{}", "a".repeat(MAX_AUTHORITY + 1))] {
            assert_eq!(VirtualHostName::parse(bad), None, "{bad}");
        }
    }
}
