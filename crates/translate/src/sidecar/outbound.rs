//! The outbound side of sidecars: listeners, route tables, clusters and endpoints (SEMANTICS 6c).
//!
//! It depends on the client's namespace and labels only, so `Translator` builds it once for all proxies that share
//! them; what is one proxy's own (its address among a headless service's pods) is taken away afterwards. Clusters and endpoints are kept
//! per host, and made anew for the hosts alone that a change can influence ([`World::touched_since`]).

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use mantlet_model::cluster::UpstreamProtocol;
use mantlet_model::destinations::destinations;
use mantlet_model::listener::{ChainMatch, FilterChain, Filters, Inspector, Listener, TcpManager, Transport};
use mantlet_model::names::{self, ALPN_PLAIN_HTTP, ClusterName, Direction, OUTBOUND_PORT};
use mantlet_model::route::{RouteTable, VirtualHost};
use mantlet_model::{SharedMap, SharedSnapshot};

use crate::cluster::{self, Side};
use crate::destination_rule::{Client, applied, specificity};
use crate::endpoint;
use crate::mesh::Mesh;
use crate::protocol::Protocol;
use crate::route::{self, SharedHosts};
use crate::virtual_service::{self, MESH_GATEWAY, Place};
use crate::world::World;
use crate::world::journal::{Hosts, Touched};
use crate::world::service::{Resolution, Service, ServicePort};

/// Ports of the proxy itself, where no wildcard listener may sit.
const RESERVED: [u16; 9] = [15000, 15001, 15004, 15006, 15008, 15020, 15021, 15053, 15090];

/// Everything but the route tables, which know clients by namespace (short host names). It is brought up to date by what has
/// changed since, and what did not change keeps its `Arc`.
#[derive(Clone, Debug, Default)]
pub struct Common {
    /// Listeners, clusters and endpoints; no routes.
    pub snapshot: SharedSnapshot,
    /// Grows when route tables have to be made anew.
    pub listing: u64,
    /// Outbound revision of the world; `None` before the first.
    revision: Option<u64>,
    /// Names of the clusters of each host.
    owned: HashMap<String, Vec<Arc<str>>>,
    /// Ports with a table of all their services.
    http: BTreeSet<u16>,
    /// Inspected ports with a table of their own.
    sniffed: Vec<(Arc<Service>, u16)>,
}

/// Whether clients of a namespace see the same listeners, clusters and endpoints as clients of any other: it has no
/// rules of its own, and nothing in the world is exported to some namespaces only (`all_exported`).
pub fn is_common(world: &World, namespace: &str, all_exported: bool) -> bool {
    namespace != world.mesh().root_namespace && world.destination_rules(namespace).is_empty() && all_exported
}

impl Common {
    /// Brings it to the world as it is, for a client that sees nothing but what is common, or for one kind of clients.
    pub fn update(&mut self, world: &World, client: Client<'_>) {
        if self.revision == Some(world.outbound_revision()) {
            return;
        }
        let touched = match self.revision {
            Some(revision) => world.touched_since(revision),
            None => Touched {
                hosts: Hosts::All,
                listing: true,
            },
        };
        self.revision = Some(world.outbound_revision());
        let mut relist = touched.listing;
        match touched.hosts {
            Hosts::These(hosts) => {
                for host in hosts {
                    relist |= self.host(world, client, &host);
                }
            }
            Hosts::All => {
                relist = true;
                let gone: Vec<String> = self.owned.keys().cloned().collect();
                for host in gone
                    .iter()
                    .filter(|host| world.service(host, client.namespace).is_none())
                {
                    self.host(world, client, host);
                }
                for service in world.visible_services(client.namespace) {
                    self.host(world, client, &service.host);
                }
                let mesh = world.mesh();
                for cluster in [
                    cluster::original_destination(names::PASSTHROUGH.into(), mesh, UpstreamProtocol::Downstream, None),
                    cluster::black_hole(mesh),
                ] {
                    let name = cluster.name.clone();
                    put(&mut self.snapshot.clusters, &name, cluster);
                }
            }
        }
        if relist {
            self.relist(world, client, touched.listing);
        }
    }

    /// Clusters and endpoints of one host; whether listeners may depend on its endpoints.
    fn host(&mut self, world: &World, client: Client<'_>, host: &str) -> bool {
        let former = self.owned.remove(host).unwrap_or_default();
        let (clusters, endpoints) = (&mut self.snapshot.clusters, &mut self.snapshot.endpoints);
        let mut owned: Vec<Arc<str>> = Vec::new();
        let mut with_endpoints: BTreeSet<String> = BTreeSet::new();
        let service = world.service(host, client.namespace);
        if let Some(service) = service {
            let rules = applied(world, client, service);
            for port in &service.ports {
                for (cluster, members) in cluster::outbound(world, Side::Sidecar, service, port, rules.as_ref()) {
                    let name = cluster.name.clone();
                    if let Some(members) = members {
                        with_endpoints.insert(name.clone());
                        put(endpoints, &name, members);
                    }
                    put(clusters, &name, cluster);
                    owned.extend(clusters.entry(&name).map(|(name, _)| name.clone()));
                }
            }
        }
        for name in former.iter().chain(&owned) {
            if !with_endpoints.contains(&**name) {
                endpoints.remove(name);
            }
            if !owned.contains(name) {
                clusters.remove(name);
            }
        }
        if !owned.is_empty() {
            self.owned.insert(host.to_string(), owned);
        }
        service.is_some_and(|s| s.kubernetes && s.resolution == Resolution::OriginalDestination)
    }

    /// Listeners, and what route tables are made for. `changed`: the tables themselves are out of date.
    fn relist(&mut self, world: &World, client: Client<'_>, changed: bool) {
        let mesh = world.mesh();
        let mut out = BTreeMap::new();
        let mut wildcard = Wildcards::default();
        for service in world.visible_services(client.namespace) {
            for port in &service.ports {
                add_listeners(world, service, port, &mut wildcard, &mut out);
            }
        }
        for port in &wildcard.http {
            let listener = wildcard_http(mesh, *port);
            out.insert(listener.name.clone(), listener);
        }
        for (port, chains) in wildcard.other {
            // HTTP on the same wildcard port wins (S6.21); its fall-through still lets the bytes pass.
            if !wildcard.http.contains(&port) {
                let listener = wildcard_other(mesh, port, chains);
                out.insert(listener.name.clone(), listener);
            }
        }
        let capture = virtual_outbound(mesh);
        out.insert(capture.name.clone(), capture);
        let http: Vec<&Arc<Service>> = world
            .visible_services(client.namespace)
            .filter(|service| service.ports.iter().any(|port| port.protocol.may_be_http()))
            .collect();
        let served = destinations(
            out.values(),
            http.iter().flat_map(|service| service.vips.iter().copied()),
            http.iter()
                .filter(|service| service.vips.is_empty() && !service.kubernetes)
                .map(|service| service.host.clone()),
        );
        settle(&mut self.snapshot.destinations, served);
        settle(&mut self.snapshot.listeners, out);
        if changed || self.http != wildcard.http || self.sniffed != wildcard.sniffed {
            self.listing += 1;
            self.http = wildcard.http;
            self.sniffed = wildcard.sniffed;
        }
    }
}

/// Sets a value, shared already or not, unless an equal one is there.
fn put<T: PartialEq, V: Borrow<T> + Into<Arc<T>>>(map: &mut SharedMap<T>, name: &str, value: V) {
    if map.get(name).is_none_or(|former| **former != *value.borrow()) {
        map.insert(name, value.into());
    }
}

/// Makes a map hold these values; equal ones stay as they are.
pub(crate) fn settle<T: PartialEq, V: Borrow<T> + Into<Arc<T>>>(map: &mut SharedMap<T>, values: BTreeMap<String, V>) {
    let gone: Vec<Arc<str>> = map
        .keys()
        .filter(|name| !values.contains_key(&***name))
        .cloned()
        .collect();
    for name in gone {
        map.remove(&name);
    }
    for (name, value) in values {
        put(map, &name, value);
    }
}

/// The route tables of clients in a namespace; what they have in common with those of others is `shared`.
pub fn routes(
    world: &World,
    client: Client<'_>,
    common: &Common,
    shared: &mut SharedHosts,
) -> BTreeMap<String, RouteTable> {
    let services: Vec<&Arc<Service>> = world.visible_services(client.namespace).collect();
    let tables = Tables::new(world, client, &services);
    let mut out = BTreeMap::new();
    let mut put = |table: RouteTable| out.insert(table.name.clone(), table);
    for port in &common.http {
        put(tables.port_table(*port, shared));
    }
    for (service, port) in &common.sniffed {
        put(tables.single_table(service, *port, shared));
    }
    out
}

/// Takes away what a proxy must not have: listeners on its own address (S6.22), which their names begin with.
pub fn without_own_address(listeners: &mut SharedMap<Listener>, own: IpAddr) {
    let names: Vec<Arc<str>> = listeners
        .with_prefix(&format!("{own}_"))
        .map(|(name, _)| name.clone())
        .collect();
    for name in names {
        listeners.remove(&name);
    }
}

/// Listeners and tables that several services share.
#[derive(Default)]
struct Wildcards {
    /// Ports with HTTP services.
    http: BTreeSet<u16>,
    /// Ports of services without an address: chains by name.
    other: BTreeMap<u16, Vec<FilterChain>>,
    /// Inspected ports with a table of their own.
    sniffed: Vec<(Arc<Service>, u16)>,
}

fn add_listeners(
    world: &World,
    service: &Arc<Service>,
    port: &ServicePort,
    wildcard: &mut Wildcards,
    out: &mut BTreeMap<String, Listener>,
) {
    let mesh = world.mesh();
    if port.protocol.is_http() {
        if !RESERVED.contains(&port.number) {
            wildcard.http.insert(port.number);
        }
        return;
    }
    let cluster = ClusterName::outbound(port.number, "", &service.host).to_string();
    let sniffed = port.protocol == Protocol::Auto;
    let mut addresses: Vec<IpAddr> = service.vips.clone();
    if service.kubernetes && service.resolution == Resolution::OriginalDestination {
        // Clients of a headless service dial the pods themselves.
        addresses = endpoint::resolve(world, service, port)
            .iter()
            .filter_map(|r| r.endpoint.address.parse().ok())
            .collect();
        if addresses.is_empty() {
            return;
        }
    }
    if addresses.is_empty() {
        if sniffed {
            wildcard.http.insert(port.number);
            return;
        }
        if RESERVED.contains(&port.number) {
            return;
        }
        let server_names = if port.protocol == Protocol::Tls {
            vec![service.host.clone()]
        } else {
            Vec::new()
        };
        let chains = wildcard.other.entry(port.number).or_default();
        let taken = chains.iter().any(|c| c.matches.server_names == server_names);
        if !taken {
            chains.push(FilterChain {
                name: cluster.clone(),
                matches: ChainMatch {
                    transport: (!server_names.is_empty()).then_some(Transport::Tls),
                    server_names,
                    ..ChainMatch::default()
                },
                tls: None,
                filters: tcp(cluster),
            });
        }
        return;
    }
    for ip in addresses {
        let name = format!("{ip}_{}", port.number);
        let listener = if sniffed {
            inspected(
                mesh,
                name,
                SocketAddr::new(ip, port.number),
                single_table_name(service, port.number),
                cluster.clone(),
            )
        } else {
            plain(mesh, name, SocketAddr::new(ip, port.number), cluster.clone())
        };
        out.insert(listener.name.clone(), listener);
    }
    if sniffed {
        wildcard.sniffed.push((service.clone(), port.number));
    }
}

fn single_table_name(service: &Service, port: u16) -> String {
    format!("{}:{port}", service.host)
}

fn tcp(cluster: String) -> Filters {
    Filters::Tcp(TcpManager {
        stat_prefix: cluster.clone(),
        custom: Vec::new(),
        authz: Vec::new(),
        telemetry: true,
        cluster,
        idle_timeout_ms: None,
    })
}

fn passthrough(mesh: &Mesh) -> Filters {
    tcp(if mesh.allow_any {
        names::PASSTHROUGH
    } else {
        names::BLACK_HOLE
    }
    .to_string())
}

fn listener(mesh: &Mesh, name: String, address: SocketAddr, chains: Vec<FilterChain>) -> Listener {
    Listener {
        name,
        address,
        bind_to_port: false,
        use_original_dst: false,
        direction: Direction::Outbound,
        chains,
        default_chain: None,
        tls_inspector: Inspector::Off,
        http_inspector: Inspector::Off,
        detection_timeout_ms: mesh.detection_timeout_ms,
        access_log: mesh.access_log.clone(),
    }
}

/// Opaque bytes to one cluster.
fn plain(mesh: &Mesh, name: String, address: SocketAddr, cluster: String) -> Listener {
    let chain = FilterChain {
        name: cluster.clone(),
        matches: ChainMatch::default(),
        tls: None,
        filters: tcp(cluster),
    };
    listener(mesh, name, address, vec![chain])
}

/// HTTP if the first bytes say so, else `otherwise`.
fn inspecting(mesh: &Mesh, name: String, address: SocketAddr, table: String, otherwise: FilterChain) -> Listener {
    let stat_prefix = format!("outbound_{name};");
    let http = FilterChain {
        name: format!("{name}-http"),
        matches: ChainMatch {
            transport: Some(Transport::Raw),
            application_protocols: ALPN_PLAIN_HTTP.map(String::from).to_vec(),
            ..ChainMatch::default()
        },
        tls: None,
        filters: Filters::Http(Box::new(route::outbound_manager(mesh, stat_prefix, table))),
    };
    Listener {
        default_chain: Some(otherwise),
        tls_inspector: Inspector::Except(Vec::new()),
        http_inspector: Inspector::Except(Vec::new()),
        ..listener(mesh, name, address, vec![http])
    }
}

/// A port that declares no protocol.
fn inspected(mesh: &Mesh, name: String, address: SocketAddr, table: String, cluster: String) -> Listener {
    let otherwise = FilterChain {
        name: cluster.clone(),
        matches: ChainMatch::default(),
        tls: None,
        filters: tcp(cluster),
    };
    inspecting(mesh, name, address, table, otherwise)
}

/// All HTTP services of a port number (S6.20), with a way out for other bytes (S6.21).
fn wildcard_http(mesh: &Mesh, port: u16) -> Listener {
    let otherwise = FilterChain {
        name: "PassthroughFilterChain".into(),
        matches: ChainMatch::default(),
        tls: None,
        filters: passthrough(mesh),
    };
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    inspecting(mesh, format!("0.0.0.0_{port}"), address, port.to_string(), otherwise)
}

/// Services without an address on one port number: by server name, or all of it.
fn wildcard_other(mesh: &Mesh, port: u16, chains: Vec<FilterChain>) -> Listener {
    let by_name = chains.iter().any(|c| !c.matches.server_names.is_empty());
    let all = chains.iter().any(|c| c.matches == ChainMatch::default());
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    Listener {
        default_chain: (!all).then(|| FilterChain {
            name: "PassthroughFilterChain".into(),
            matches: ChainMatch::default(),
            tls: None,
            filters: passthrough(mesh),
        }),
        tls_inspector: if by_name {
            Inspector::Except(Vec::new())
        } else {
            Inspector::Off
        },
        ..listener(mesh, format!("0.0.0.0_{port}"), address, chains)
    }
}

/// The capture listener and what matches no other (S6.23).
fn virtual_outbound(mesh: &Mesh) -> Listener {
    let chain = |name: &str, port: Option<u16>, filters: Filters| FilterChain {
        name: name.into(),
        matches: ChainMatch {
            destination_port: port,
            ..ChainMatch::default()
        },
        tls: None,
        filters,
    };
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), OUTBOUND_PORT);
    Listener {
        bind_to_port: true,
        use_original_dst: true,
        ..listener(
            mesh,
            names::VIRTUAL_OUTBOUND.into(),
            address,
            vec![
                // A connection addressed to the capture port itself would come back for ever.
                chain(
                    "virtualOutbound-blackhole",
                    Some(OUTBOUND_PORT),
                    tcp(names::BLACK_HOLE.into()),
                ),
                chain("virtualOutbound-catchall-tcp", None, passthrough(mesh)),
            ],
        )
    }
}

/// Makes route tables; VirtualServices are looked up once.
struct Tables<'a> {
    world: &'a World,
    client: Client<'a>,
    services: &'a [&'a Arc<Service>],
    /// Expanded host, VirtualService; oldest first.
    rules: Vec<(String, &'a crate::world::Config<mantlet_api::VirtualService>)>,
}

impl<'a> Tables<'a> {
    fn new(world: &'a World, client: Client<'a>, services: &'a [&'a Arc<Service>]) -> Self {
        let rules = virtual_service::visible(world, client.namespace, MESH_GATEWAY)
            .into_iter()
            .flat_map(|config| {
                virtual_service::hosts(world, config)
                    .into_iter()
                    .map(move |host| (host, config))
            })
            .collect();
        Tables {
            world,
            client,
            services,
            rules,
        }
    }

    fn place(&self, port: u16) -> Place<'a> {
        Place {
            client: self.client,
            gateway: MESH_GATEWAY,
            port,
        }
    }

    /// The virtual host of a service: its VirtualService's routes if one is meant, else the plain one.
    fn host(&self, service: &Service, port: u16, domains: Vec<String>) -> VirtualHost {
        let mut host = route::service_host(service, port, domains);
        // The most exact pattern wins, then the oldest; `max_by_key` keeps the last of equals, hence the reversal.
        let rule = self
            .rules
            .iter()
            .rev()
            .filter_map(|(pattern, config)| Some((specificity(pattern, &service.host)?, *config)))
            .max_by_key(|(score, _)| *score);
        if let Some((_, config)) = rule {
            let routes = virtual_service::routes(self.world, config, self.place(port));
            if !routes.is_empty() {
                host.routes = routes;
            }
        }
        host
    }

    /// The table of a wildcard port (S6.3).
    fn port_table(&self, port: u16, shared: &mut SharedHosts) -> RouteTable {
        let domain = self.world.mesh().domain.as_str();
        let mut taken = BTreeSet::from(["*".to_string()]);
        let mut hosts = Vec::new();
        for service in self.services {
            let Some(found) = service.port(port) else { continue };
            if !found.protocol.may_be_http() {
                continue;
            }
            let domains = route::unique(route::domains(service, self.client.namespace, domain), &mut taken);
            if !domains.is_empty() {
                hosts.push(shared.share(self.host(service, port, domains)));
            }
        }
        // Hosts that only VirtualServices know are served on the HTTP port.
        if port == 80 {
            for (pattern, config) in &self.rules {
                if self.world.service(pattern, self.client.namespace).is_some() {
                    continue;
                }
                let routes = virtual_service::routes(self.world, config, self.place(port));
                let domains = route::unique(vec![pattern.clone()], &mut taken);
                if !routes.is_empty() && !domains.is_empty() {
                    hosts.push(shared.share(VirtualHost {
                        name: format!("{pattern}:{port}"),
                        domains,
                        routes,
                        attempt_count: true,
                    }));
                }
            }
        }
        hosts.push(shared.share(route::fallback_host(self.world.mesh())));
        RouteTable {
            name: port.to_string(),
            hosts,
            ignore_port_in_host: true,
            on_demand: false,
        }
    }

    /// The table of one inspected service port: whatever the Host header says, the address has chosen the service.
    fn single_table(&self, service: &Service, port: u16, shared: &mut SharedHosts) -> RouteTable {
        RouteTable {
            name: single_table_name(service, port),
            hosts: vec![shared.share(self.host(service, port, vec!["*".into()]))],
            ignore_port_in_host: true,
            on_demand: false,
        }
    }
}
