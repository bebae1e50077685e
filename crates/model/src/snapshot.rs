//! Everything one proxy has to know, keyed by resource name.
//!
//! `translate` returns a snapshot, `control` turns two of them into a delta, the proxy collects one from the wire.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;
use crate::destinations::Destinations;
use crate::endpoint::Endpoints;
use crate::listener::Listener;
use crate::route::{Route, RouteTable, VirtualHost};

/// Resources of one proxy. Values are shared between proxies that see the same thing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProxySnapshot {
    /// Listeners by name.
    pub listeners: BTreeMap<String, Arc<Listener>>,
    /// Route tables by name.
    pub routes: BTreeMap<String, Arc<RouteTable>>,
    /// Clusters by name.
    pub clusters: BTreeMap<String, Arc<Cluster>>,
    /// Endpoints by cluster name.
    pub endpoints: BTreeMap<String, Arc<Endpoints>>,
    /// Virtual hosts of tables that are filled on demand, by [`VirtualHostName`](crate::route::VirtualHostName).
    #[serde(default)]
    pub virtual_hosts: BTreeMap<String, Arc<VirtualHost>>,
    /// What is served in the mesh, by name of the list.
    #[serde(default)]
    pub destinations: BTreeMap<String, Arc<Destinations>>,
}

impl ProxySnapshot {
    /// A route table with the virtual hosts of it that are here, those first.
    pub fn filled(&self, table: &Arc<RouteTable>) -> Arc<RouteTable> {
        if !table.on_demand {
            return table.clone();
        }
        let own = self.hosts_of(&table.name).map(|(_, host)| host.clone());
        Arc::new(RouteTable {
            hosts: own.chain(table.hosts.iter().cloned()).collect(),
            ..(**table).clone()
        })
    }

    /// The virtual hosts of a table that are held by name, with their resource names.
    pub fn hosts_of(&self, table: &str) -> impl Iterator<Item = (&String, &Arc<VirtualHost>)> {
        let prefix = format!("{table}/");
        let hosts = self.virtual_hosts.range(prefix.clone()..);
        hosts.take_while(move |(name, _)| name.starts_with(&prefix))
    }

    /// Names that are referred to but absent: `(referrer, missing)`. An empty result means that the snapshot is closed.
    pub fn dangling(&self) -> Vec<(String, String)> {
        use crate::cluster::Discovery;
        use crate::http::RouteSource;
        use crate::listener::Filters;
        use crate::route::RouteAction;

        let mut out = Vec::new();
        let check_routes = |from: &str, routes: &[Route], out: &mut Vec<(String, String)>| {
            for route in routes {
                if let RouteAction::Forward(forward) = &route.action {
                    for (cluster, _) in &forward.clusters {
                        if !self.clusters.contains_key(cluster) {
                            out.push((from.to_string(), cluster.clone()));
                        }
                    }
                }
            }
        };
        let check_table = |from: &str, table: &RouteTable, out: &mut Vec<(String, String)>| {
            for host in &table.hosts {
                check_routes(from, &host.routes, out);
            }
        };
        for (name, listener) in &self.listeners {
            for chain in listener.all_chains() {
                let custom = match &chain.filters {
                    Filters::Tcp(tcp) => &tcp.custom,
                    Filters::Http(http) => &http.custom,
                };
                for cluster in custom.iter().filter_map(crate::ext_authz::CustomStage::cluster) {
                    if !self.clusters.contains_key(cluster) {
                        out.push((name.clone(), cluster.to_string()));
                    }
                }
                match &chain.filters {
                    Filters::Tcp(tcp) if !self.clusters.contains_key(&tcp.cluster) => {
                        out.push((name.clone(), tcp.cluster.clone()));
                    }
                    Filters::Tcp(_) => {}
                    Filters::Http(http) => match &http.routes {
                        RouteSource::Named(table) if !self.routes.contains_key(table) => {
                            out.push((name.clone(), table.clone()));
                        }
                        RouteSource::Named(_) => {}
                        RouteSource::Inline(table) => check_table(name, table, &mut out),
                    },
                }
            }
        }
        for (name, table) in &self.routes {
            check_table(name, table, &mut out);
        }
        for (name, host) in &self.virtual_hosts {
            check_routes(name, &host.routes, &mut out);
        }
        for (name, cluster) in &self.clusters {
            if let Discovery::Eds { service } = &cluster.discovery
                && !self.endpoints.contains_key(service)
            {
                out.push((name.clone(), service.clone()));
            }
        }
        out
    }
}
