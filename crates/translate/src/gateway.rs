//! Gateways: listeners from `Gateway` servers, routes from bound VirtualServices, mesh mTLS to the backends.
//!
//! A server's port is a port of the gateway's Service; the listener sits on the pod's port behind it, and that is what policies
//! call the port (S2.59). Only clusters that routes name are sent: a gateway pays for what it exposes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use mantlet_api::gateway::{Server, ServerTlsMode, ServerTlsSettings, TlsProtocol};
use mantlet_model::ProxySnapshot;
use mantlet_model::authz::AuthzFilter;
use mantlet_model::ext_authz::CustomStage;
use mantlet_model::http::{ForwardedClientCert, HttpManager, JwtAuthn};
use mantlet_model::listener::{ChainMatch, FilterChain, Filters, Inspector, Listener, TcpManager, Transport};
use mantlet_model::names::{self, ClusterName, Direction};
use mantlet_model::route::{Redirect, Route, RouteAction, RouteMatch, RouteTable, VirtualHost};
use mantlet_model::tls::{ServerTls, TlsVersion};

use crate::authz::{self, Form, Target};
use crate::cluster::{self, Side};
use crate::destination_rule::{Client, applied, specificity};
use crate::endpoint::target_port;
use crate::protocol::Protocol;
use crate::virtual_service::{self, Place};
use crate::world::service::TargetPort;
use crate::world::workload::Workload;
use crate::world::{Config, World};
use crate::{request_authentication, route, tls};

/// Builds a gateway's snapshot.
pub fn build(
    world: &World,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    workload: Option<&Workload>,
) -> ProxySnapshot {
    let target = Target {
        namespace,
        labels,
        gateway: true,
    };
    let mut builder = Builder {
        world,
        client: Client { namespace, labels },
        workload,
        http_custom: authz::custom(world, target, Form::Http),
        tcp_custom: authz::custom(world, target, Form::Tcp),
        jwt: request_authentication::authentication(world, target),
        http_authz: authz::filters(world, target, Form::Http),
        tcp_authz: authz::filters(world, target, Form::Tcp),
        listeners: BTreeMap::new(),
        tables: BTreeMap::new(),
    };
    for gateway in world.gateways() {
        if gateway.broken.is_none() && mantlet_api::selector::subset(&gateway.spec.selector, labels) {
            for server in &gateway.spec.servers {
                builder.server(gateway, server);
            }
        }
    }
    builder.finish()
}

struct Builder<'a> {
    world: &'a World,
    client: Client<'a>,
    workload: Option<&'a Workload>,
    http_custom: Vec<CustomStage>,
    tcp_custom: Vec<CustomStage>,
    jwt: Option<JwtAuthn>,
    http_authz: Vec<AuthzFilter>,
    tcp_authz: Vec<AuthzFilter>,
    /// Chains by listening port.
    listeners: BTreeMap<u16, Vec<FilterChain>>,
    tables: BTreeMap<String, Table>,
}

/// A route table in the making.
#[derive(Default)]
struct Table {
    /// Server port, for names of virtual hosts.
    port: u16,
    /// Domain → routes, in the order of VirtualServices.
    hosts: BTreeMap<String, Vec<Route>>,
    /// Domains that are redirected to HTTPS.
    redirected: BTreeSet<String>,
}

impl Builder<'_> {
    fn server(&mut self, gateway: &Config<mantlet_api::Gateway>, server: &Server) {
        let Some(port) = &server.port else { return };
        let Some(number) = u16::try_from(port.number).ok().filter(|n| *n != 0) else {
            return;
        };
        let listen = self.listening_port(number);
        let protocol = Protocol::of_declared(&port.protocol, &port.name);
        let gateway_name = format!("{}/{}", gateway.meta.namespace, gateway.meta.name);
        let hosts: Vec<(Option<&str>, String)> = server
            .hosts
            .iter()
            .map(|h| server_host(h, &gateway.meta.namespace))
            .collect();
        let mode = server.tls.as_ref().map(|t| t.mode);
        let terminates = matches!(
            (protocol, mode),
            (
                _,
                Some(
                    ServerTlsMode::Simple
                        | ServerTlsMode::Mutual
                        | ServerTlsMode::IstioMutual
                        | ServerTlsMode::OptionalMutual
                )
            )
        );
        let https = port.protocol.eq_ignore_ascii_case("https");
        if protocol.is_http() || (https && terminates) {
            let name = if terminates {
                format!(
                    "https.{number}.{}.{}.{}",
                    port.name, gateway.meta.name, gateway.meta.namespace
                )
            } else {
                format!("http.{listen}")
            };
            let redirect = !terminates && server.tls.as_ref().is_some_and(|t| t.https_redirect);
            self.fill_table(&name, number, &gateway_name, &hosts, redirect);
            let tls = server.tls.as_ref().filter(|_| terminates);
            self.http_chain(listen, number, &name, tls, &hosts);
        } else if protocol == Protocol::Tls && !terminates {
            self.passthrough_chains(listen, number, &gateway_name, &hosts);
        }
    }

    /// The pod's port behind a port of the gateway's Service.
    fn listening_port(&self, number: u16) -> u16 {
        let services = self
            .world
            .services_of_workload(self.client.namespace, self.client.labels);
        services
            .iter()
            .find_map(|s| {
                let port = s.port(number)?;
                match (&port.target, self.workload) {
                    (TargetPort::Number(target), _) => Some(*target),
                    (named, Some(workload)) => target_port(named, workload),
                    _ => None,
                }
            })
            .unwrap_or(number)
    }

    /// Adds the virtual hosts of all VirtualServices that are bound to this server.
    fn fill_table(&mut self, name: &str, port: u16, gateway: &str, hosts: &[(Option<&str>, String)], redirect: bool) {
        let table = self.tables.entry(name.to_string()).or_default();
        table.port = port;
        if redirect {
            table.redirected.extend(hosts.iter().map(|(_, h)| h.clone()));
        }
        let place = Place {
            client: self.client,
            gateway,
            port,
        };
        for config in virtual_service::visible(self.world, self.client.namespace, gateway) {
            for host in virtual_service::hosts(self.world, config) {
                let served = hosts.iter().find_map(|(namespace, pattern)| {
                    if namespace.is_some_and(|ns| ns != config.meta.namespace) {
                        return None;
                    }
                    intersect(pattern, &host)
                });
                let Some(domain) = served else { continue };
                let routes = virtual_service::routes(self.world, config, place);
                if !routes.is_empty() {
                    table.hosts.entry(domain).or_default().extend(routes);
                }
            }
        }
    }

    fn http_chain(
        &mut self,
        listen: u16,
        number: u16,
        table: &str,
        settings: Option<&ServerTlsSettings>,
        hosts: &[(Option<&str>, String)],
    ) {
        let mesh = self.world.mesh();
        let name = match settings {
            None => format!("0.0.0.0_{listen}"),
            Some(_) => table.to_string(),
        };
        let matches = match settings {
            None => ChainMatch::default(),
            Some(_) => ChainMatch {
                server_names: server_names(hosts),
                ..ChainMatch::default()
            },
        };
        let tls = match settings {
            None => None,
            Some(settings) => match self.server_tls(settings) {
                Some(tls) => Some(tls),
                // Without a certificate nothing can be served; a chain without TLS would serve plaintext.
                None => return,
            },
        };
        let chains = self.listeners.entry(listen).or_default();
        if chains.iter().any(|c| c.name == name || c.matches == matches) {
            return;
        }
        let manager = HttpManager {
            use_remote_address: true,
            trusted_hops: mesh.gateway_trusted_hops,
            forwarded_client_cert: ForwardedClientCert::SanitizeSet,
            server_name: "istio-envoy".into(),
            custom: self.http_custom.clone(),
            jwt: self.jwt.clone(),
            authz: self.http_authz.clone(),
            ..route::outbound_manager(mesh, format!("outbound_0.0.0.0_{number};"), table.to_string())
        };
        chains.push(FilterChain {
            name,
            matches,
            tls,
            filters: Filters::Http(Box::new(manager)),
        });
    }

    /// TLS that the gateway does not open: one chain per server name of bound VirtualServices.
    fn passthrough_chains(&mut self, listen: u16, port: u16, gateway: &str, hosts: &[(Option<&str>, String)]) {
        let place = Place {
            client: self.client,
            gateway,
            port,
        };
        for config in virtual_service::visible(self.world, self.client.namespace, gateway) {
            for tls_route in &config.spec.tls {
                let destination = tls_route
                    .route
                    .iter()
                    .max_by_key(|r| r.weight)
                    .and_then(|r| r.destination.as_ref());
                let cluster = destination
                    .and_then(|d| virtual_service::destination(self.world, &config.meta.namespace, d, place))
                    .unwrap_or_else(|| names::BLACK_HOLE.to_string());
                for sni in tls_route
                    .r#match
                    .iter()
                    .filter(|m| m.port == 0 || m.port == u32::from(port))
                    .flat_map(|m| &m.sni_hosts)
                {
                    let sni = sni.to_ascii_lowercase();
                    if !hosts.iter().any(|(_, pattern)| intersect(pattern, &sni).is_some()) {
                        continue;
                    }
                    let chains = self.listeners.entry(listen).or_default();
                    let name = format!("{listen}-{sni}");
                    if chains.iter().any(|c| c.name == name) {
                        continue;
                    }
                    chains.push(FilterChain {
                        name,
                        matches: ChainMatch {
                            server_names: vec![sni],
                            transport: Some(Transport::Tls),
                            ..ChainMatch::default()
                        },
                        tls: None,
                        filters: Filters::Tcp(TcpManager {
                            stat_prefix: cluster.clone(),
                            custom: self.tcp_custom.clone(),
                            authz: self.tcp_authz.clone(),
                            cluster: cluster.clone(),
                            idle_timeout_ms: None,
                            telemetry: true,
                        }),
                    });
                }
            }
        }
    }

    /// TLS of a server; `None` when it names no certificate.
    fn server_tls(&self, settings: &ServerTlsSettings) -> Option<ServerTls> {
        let mesh = self.world.mesh();
        if settings.mode == ServerTlsMode::IstioMutual {
            return Some(tls::mesh_server(mesh, true));
        }
        let credential = settings
            .credential_names
            .first()
            .map(String::as_str)
            .or(Some(settings.credential_name.as_str()))
            .filter(|c| !c.is_empty());
        let certificate = match credential {
            Some(name) => format!("kubernetes://{name}"),
            None if !settings.server_certificate.is_empty() && !settings.private_key.is_empty() => {
                format!("file-cert:{}~{}", settings.server_certificate, settings.private_key)
            }
            None => return None,
        };
        let wants_client = matches!(settings.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual);
        let trust_bundle = wants_client.then(|| {
            if !settings.ca_cert_credential_name.is_empty() {
                format!("kubernetes://{}", settings.ca_cert_credential_name)
            } else if let Some(name) = credential {
                format!("kubernetes://{name}-cacert")
            } else {
                format!("file-root:{}", settings.ca_certificates)
            }
        });
        Some(ServerTls {
            certificate,
            trust_bundle,
            client_sans: settings
                .subject_alt_names
                .iter()
                .map(|s| mantlet_model::tls::SanMatch::Exact(s.clone()))
                .collect(),
            require_client_certificate: settings.mode == ServerTlsMode::Mutual,
            alpn: vec!["h2".into(), "http/1.1".into()],
            min_version: match settings.min_protocol_version {
                TlsProtocol::V1_3 => TlsVersion::V1_3,
                _ => TlsVersion::V1_2,
            },
            ciphers: settings.cipher_suites.clone(),
        })
    }

    fn finish(self) -> ProxySnapshot {
        let mut out = ProxySnapshot::default();
        let mesh = self.world.mesh();
        let mut wanted: BTreeSet<String> = BTreeSet::new();
        let custom = self.http_custom.iter().chain(&self.tcp_custom);
        wanted.extend(custom.filter_map(CustomStage::cluster).map(str::to_string));
        for (port, chains) in self.listeners {
            let inspects = chains
                .iter()
                .any(|c| !c.matches.server_names.is_empty() || c.matches.transport.is_some());
            for chain in &chains {
                if let Filters::Tcp(tcp) = &chain.filters {
                    wanted.insert(tcp.cluster.clone());
                }
            }
            let name = format!("0.0.0.0_{port}");
            let listener = Listener {
                name: name.clone(),
                address: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port),
                bind_to_port: true,
                use_original_dst: false,
                direction: Direction::Outbound,
                chains,
                default_chain: None,
                tls_inspector: if inspects {
                    Inspector::Except(Vec::new())
                } else {
                    Inspector::Off
                },
                http_inspector: Inspector::Off,
                detection_timeout_ms: mesh.detection_timeout_ms,
                access_log: mesh.access_log.clone(),
            };
            out.listeners.insert(name, Arc::new(listener));
        }
        for (name, table) in self.tables {
            let table = table.finish(name.clone());
            for route in table.hosts.iter().flat_map(|h| &h.routes) {
                if let RouteAction::Forward(forward) = &route.action {
                    wanted.extend(forward.clusters.iter().map(|(c, _)| c.clone()));
                }
            }
            out.routes.insert(name, Arc::new(table));
        }
        let mut hosts: BTreeSet<(String, u16)> = BTreeSet::new();
        for name in &wanted {
            if let Some(parsed) = ClusterName::parse(name) {
                hosts.insert((parsed.host.to_string(), parsed.port));
            }
        }
        for (host, port) in hosts {
            let Some(service) = self.world.service(&host, self.client.namespace) else {
                continue;
            };
            let Some(port) = service.port(port) else { continue };
            let rules = applied(self.world, self.client, service);
            for (cluster, endpoints) in cluster::outbound(self.world, Side::Gateway, service, port, rules.as_ref()) {
                if !wanted.contains(&cluster.name) {
                    continue;
                }
                if let Some(endpoints) = endpoints {
                    out.endpoints.insert(cluster.name.clone(), Arc::new(endpoints));
                }
                out.clusters.insert(cluster.name.clone(), Arc::new(cluster));
            }
        }
        let black_hole = cluster::black_hole(mesh);
        out.clusters.insert(black_hole.name.clone(), Arc::new(black_hole));
        out
    }
}

impl Table {
    fn finish(mut self, name: String) -> RouteTable {
        let port = self.port;
        for domain in &self.redirected {
            // Every request of the domain goes to HTTPS, whatever routes say.
            self.hosts.insert(
                domain.clone(),
                vec![Route {
                    name: "https-redirect".into(),
                    matches: RouteMatch::default(),
                    action: RouteAction::Redirect(Redirect {
                        https: true,
                        status: 301,
                        ..Redirect::default()
                    }),
                    decorator: String::new(),
                    request_headers: Vec::new(),
                    response_headers: Vec::new(),
                }],
            );
        }
        if self.hosts.is_empty() {
            // A server without routes answers 404 (S6.74).
            self.hosts.insert("*".into(), Vec::new());
            return RouteTable {
                name,
                hosts: vec![Arc::new(VirtualHost {
                    name: format!("blackhole:{port}"),
                    domains: vec!["*".into()],
                    routes: Vec::new(),
                    attempt_count: false,
                })],
                ignore_port_in_host: true,
                on_demand: false,
            };
        }
        RouteTable {
            name,
            hosts: self
                .hosts
                .into_iter()
                .map(|(domain, routes)| {
                    Arc::new(VirtualHost {
                        name: format!("{domain}:{port}"),
                        domains: vec![domain],
                        routes,
                        attempt_count: true,
                    })
                })
                .collect(),
            ignore_port_in_host: true,
            on_demand: false,
        }
    }
}

/// `[namespace/]host` of a server: the namespace whose VirtualServices may serve it, and the host.
fn server_host<'a>(text: &'a str, own: &'a str) -> (Option<&'a str>, String) {
    match text.split_once('/') {
        Some(("*", host)) => (None, host.to_ascii_lowercase()),
        Some((".", host)) => (Some(own), host.to_ascii_lowercase()),
        Some((namespace, host)) => (Some(namespace), host.to_ascii_lowercase()),
        None => (None, text.to_ascii_lowercase()),
    }
}

/// Names that a chain matches; a host of `*` matches all.
fn server_names(hosts: &[(Option<&str>, String)]) -> Vec<String> {
    if hosts.iter().any(|(_, h)| h == "*") {
        return Vec::new();
    }
    let mut out: Vec<String> = hosts.iter().map(|(_, h)| h.clone()).collect();
    out.sort();
    out.dedup();
    out
}

/// The more exact of two host patterns that overlap.
fn intersect(a: &str, b: &str) -> Option<String> {
    if a == b || specificity(a, b).is_some() {
        Some(b.to_string())
    } else if specificity(b, a).is_some() {
        Some(a.to_string())
    } else {
        None
    }
}
