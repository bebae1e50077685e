//! The inbound side of a sidecar: `virtualInbound` with all its chains, and the inbound clusters (SEMANTICS 1c, 6b).
//!
//! Chains per workload port come from the table of 1c; the catch-all set covers ports that no Service declares. Every
//! chain carries the authorization filters in the form that fits it (S2.12, S2.83).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use mantlet_model::ProxySnapshot;
use mantlet_model::authz::AuthzFilter;
use mantlet_model::cluster::{Balancer, Cluster, Discovery, UpstreamProtocol};
use mantlet_model::endpoint::{Endpoint, Health};
use mantlet_model::ext_authz::CustomStage;
use mantlet_model::http::{Codec, ForwardedClientCert, HttpManager, JwtAuthn, Reporter, RouteSource};
use mantlet_model::listener::{ChainMatch, FilterChain, Filters, Inspector, Listener, TcpManager, Transport};
use mantlet_model::names::{
    self, ALPN_ISTIO_HTTP, ALPN_ISTIO_TCP, ALPN_PLAIN_HTTP, ClusterName, Direction, INBOUND_PORT,
};
use mantlet_model::tls::ServerTls;

use crate::authz::{self, Form, Target};
use crate::cluster::{self, INBOUND_SOURCE};
use crate::endpoint::target_port;
use crate::mesh::Mesh;
use crate::peer_authentication::{self, Effective, Mode};
use crate::protocol::Protocol;
use crate::world::World;
use crate::world::service::{Service, TargetPort};
use crate::world::workload::Workload;
use crate::{request_authentication, route, tls};

/// A workload port behind one or more services.
#[derive(Clone, Debug)]
struct Port {
    number: u16,
    protocol: Protocol,
    /// Services on it, oldest first, with their service ports.
    services: Vec<(Arc<Service>, u16)>,
}

/// Adds the inbound side of a workload to its snapshot.
pub fn build(
    world: &World,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    workload: Option<&Workload>,
    out: &mut ProxySnapshot,
) {
    let mesh = world.mesh();
    let target = Target {
        namespace,
        labels,
        gateway: false,
    };
    let builder = Builder {
        mesh,
        modes: peer_authentication::effective(world, namespace, labels),
        http_custom: authz::custom(world, target, Form::Http),
        tcp_custom: authz::custom(world, target, Form::Tcp),
        jwt: request_authentication::authentication(world, target),
        http_authz: authz::filters(world, target, Form::Http),
        tcp_authz: authz::filters(world, target, Form::Tcp),
    };
    let ports = workload_ports(world, namespace, labels, workload);

    let mut insert = |cluster: Cluster| {
        out.clusters.insert(cluster.name.clone(), Arc::new(cluster));
    };
    for port in &ports {
        insert(builder.port_cluster(port));
    }
    insert(cluster::original_destination(
        names::INBOUND_PASSTHROUGH.into(),
        mesh,
        UpstreamProtocol::Downstream,
        Some(INBOUND_SOURCE),
    ));
    insert(cluster::black_hole(mesh));
    out.listeners
        .insert(names::VIRTUAL_INBOUND.into(), Arc::new(builder.listener(&ports)));
}

/// Ports of the workload that services declare; the oldest service decides about the protocol (S1.51).
fn workload_ports(
    world: &World,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    workload: Option<&Workload>,
) -> Vec<Port> {
    let mut ports: BTreeMap<u16, Port> = BTreeMap::new();
    for service in world.services_of_workload(namespace, labels) {
        for port in &service.ports {
            let number = match (&port.target, workload) {
                (TargetPort::Number(number), _) => Some(*number),
                (named, Some(workload)) => target_port(named, workload),
                (_, None) => None,
            };
            let Some(number) = number else { continue };
            ports
                .entry(number)
                .or_insert_with(|| Port {
                    number,
                    protocol: port.protocol,
                    services: Vec::new(),
                })
                .services
                .push((service.clone(), port.number));
        }
    }
    ports.into_values().collect()
}

struct Builder<'a> {
    mesh: &'a Mesh,
    modes: Effective,
    http_custom: Vec<CustomStage>,
    tcp_custom: Vec<CustomStage>,
    jwt: Option<JwtAuthn>,
    http_authz: Vec<AuthzFilter>,
    tcp_authz: Vec<AuthzFilter>,
}

/// One row of the table in 1c.
struct Row {
    suffix: &'static str,
    transport: Transport,
    alpn: Vec<String>,
    mtls: bool,
    http: bool,
}

impl Builder<'_> {
    fn listener(&self, ports: &[Port]) -> Listener {
        let mut chains = Vec::new();
        let mut no_tls_inspection = Vec::new();
        let mut no_http_inspection = Vec::new();
        let mut any_tls = false;
        let mut any_http = false;
        let mut add = |match_port: Option<u16>, mode: Mode, protocol: Protocol, chains_of: Vec<FilterChain>| {
            let (tls, http) = inspection(mode, protocol);
            any_tls |= tls;
            any_http |= http;
            if let Some(port) = match_port {
                if !tls {
                    no_tls_inspection.push(port);
                }
                if !http {
                    no_http_inspection.push(port);
                }
            }
            chains.extend(chains_of);
        };
        for port in ports {
            let mode = self.modes.port(port.number);
            add(Some(port.number), mode, port.protocol, self.port_chains(port, mode));
        }
        // Ports with a mode of their own that no service declares (S1.12, S1.48).
        for (number, mode) in &self.modes.ports {
            if ports.iter().all(|p| p.number != *number) {
                let chains = self.passthrough_chains(Some(*number), *mode);
                add(Some(*number), *mode, Protocol::Auto, chains);
            }
        }
        add(
            None,
            self.modes.workload,
            Protocol::Auto,
            self.passthrough_chains(None, self.modes.workload),
        );

        // The capture port itself: a connection addressed to it would come back for ever.
        no_tls_inspection.push(INBOUND_PORT);
        no_http_inspection.push(INBOUND_PORT);
        chains.push(FilterChain {
            name: "virtualInbound-blackhole".into(),
            matches: ChainMatch {
                destination_port: Some(INBOUND_PORT),
                ..ChainMatch::default()
            },
            tls: None,
            filters: Filters::Tcp(TcpManager {
                stat_prefix: names::BLACK_HOLE.into(),
                custom: Vec::new(),
                authz: Vec::new(),
                cluster: names::BLACK_HOLE.into(),
                idle_timeout_ms: None,
                telemetry: false,
            }),
        });

        let inspector = |wanted: bool, mut except: Vec<u16>| {
            except.sort_unstable();
            except.dedup();
            if wanted {
                Inspector::Except(except)
            } else {
                Inspector::Off
            }
        };
        Listener {
            name: names::VIRTUAL_INBOUND.into(),
            address: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), INBOUND_PORT),
            bind_to_port: true,
            use_original_dst: false,
            direction: Direction::Inbound,
            chains,
            default_chain: None,
            tls_inspector: inspector(any_tls, no_tls_inspection),
            http_inspector: inspector(any_http, no_http_inspection),
            detection_timeout_ms: self.mesh.detection_timeout_ms,
            access_log: self.mesh.access_log.clone(),
        }
    }

    fn port_chains(&self, port: &Port, mode: Mode) -> Vec<FilterChain> {
        let cluster = ClusterName::inbound(port.number).to_string();
        let (service_host, service_port) = match port.services.first() {
            Some((service, number)) => (service.host.as_str(), *number),
            None => ("", port.number),
        };
        let decorator = format!("{service_host}:{service_port}/*");
        let stat_prefix = format!("inbound_0.0.0.0_{};", port.number);
        self.chains(
            Some(port.number),
            rows(port.protocol, mode),
            &|suffix| format!("0.0.0.0_{}{suffix}", port.number),
            &|| {
                route::inbound_table(
                    cluster.clone(),
                    service_port,
                    cluster.clone(),
                    decorator.clone(),
                    port.protocol != Protocol::Grpc,
                )
            },
            &stat_prefix,
            &cluster,
        )
    }

    fn passthrough_chains(&self, port: Option<u16>, mode: Mode) -> Vec<FilterChain> {
        let cluster = names::INBOUND_PASSTHROUGH.to_string();
        let mut rows = rows(Protocol::Auto, mode);
        if port.is_none() && mode == Mode::Disable {
            // The TLS inspector may run here because another port needs it; a DISABLE port passes TLS on untouched (S1.43).
            rows.push(Row {
                suffix: "-tls",
                transport: Transport::Tls,
                alpn: Vec::new(),
                mtls: false,
                http: false,
            });
        }
        let name = |suffix: &str| match (port, suffix.strip_prefix("-http")) {
            (Some(port), _) => format!("0.0.0.0_{port}{suffix}"),
            (None, Some(rest)) => format!("virtualInbound-catchall-http{rest}"),
            (None, None) => format!("virtualInbound{suffix}"),
        };
        self.chains(
            port,
            rows,
            &name,
            &|| route::inbound_table(cluster.clone(), port.unwrap_or(0), cluster.clone(), ":0/*".into(), true),
            &cluster,
            &cluster,
        )
    }

    fn chains(
        &self,
        port: Option<u16>,
        rows: Vec<Row>,
        name: &dyn Fn(&str) -> String,
        table: &dyn Fn() -> mantlet_model::RouteTable,
        stat_prefix: &str,
        cluster: &str,
    ) -> Vec<FilterChain> {
        rows.into_iter()
            .map(|row| FilterChain {
                name: name(row.suffix),
                matches: ChainMatch {
                    destination_port: port,
                    transport: Some(row.transport),
                    application_protocols: row.alpn,
                    ..ChainMatch::default()
                },
                tls: row.mtls.then(|| self.server_tls(row.http)),
                filters: if row.http {
                    Filters::Http(Box::new(self.http(stat_prefix, table())))
                } else {
                    Filters::Tcp(TcpManager {
                        stat_prefix: stat_prefix.to_string(),
                        custom: self.tcp_custom.clone(),
                        authz: self.tcp_authz.clone(),
                        cluster: cluster.to_string(),
                        idle_timeout_ms: None,
                        telemetry: true,
                    })
                },
            })
            .collect()
    }

    fn server_tls(&self, http: bool) -> ServerTls {
        tls::mesh_server(self.mesh, http)
    }

    fn http(&self, stat_prefix: &str, table: mantlet_model::RouteTable) -> HttpManager {
        HttpManager {
            stat_prefix: stat_prefix.to_string(),
            codec: Codec::Auto,
            routes: RouteSource::Inline(Box::new(table)),
            normalization: self.mesh.normalization,
            forwarded_client_cert: ForwardedClientCert::AppendForward,
            use_remote_address: false,
            trusted_hops: 0,
            server_name: "istio-envoy".into(),
            generate_request_id: true,
            websocket: true,
            stream_idle_timeout_ms: 0,
            jwt: self.jwt.clone(),
            custom: self.http_custom.clone(),
            authz: self.http_authz.clone(),
            istio_alpn: false,
            telemetry: Some(Reporter::Destination),
            access_log: self.mesh.access_log.clone(),
        }
    }

    fn port_cluster(&self, port: &Port) -> Cluster {
        let protocol = match port.protocol {
            p if p.is_http2() => UpstreamProtocol::Http2,
            Protocol::Auto => UpstreamProtocol::Downstream,
            _ => UpstreamProtocol::Http1,
        };
        let name = ClusterName::inbound(port.number).to_string();
        let mut cluster = cluster::original_destination(name, self.mesh, protocol, Some(INBOUND_SOURCE));
        cluster.services = port.services.iter().map(|(s, _)| cluster::service_ref(s)).collect();
        if !self.mesh.inbound_passthrough {
            cluster.bind_source = None;
            cluster.balancer = Balancer::LeastRequest;
            cluster.discovery = Discovery::Static(vec![Endpoint {
                address: Ipv4Addr::LOCALHOST.to_string(),
                port: port.number,
                weight: 1,
                health: Health::Healthy,
                mtls: false,
                mantlet: false,
                workload: None,
            }]);
        }
        cluster
    }
}

/// The chains of a port (table in 1c).
fn rows(protocol: Protocol, mode: Mode) -> Vec<Row> {
    let list = |parts: &[&[&str]]| -> Vec<String> { parts.concat().iter().map(|s| s.to_string()).collect() };
    let any = Vec::new;
    let istio = || list(&[&ALPN_ISTIO_HTTP, &ALPN_ISTIO_TCP]);
    let mtls_http = || list(&[&ALPN_ISTIO_HTTP]);
    let mtls_tcp = || list(&[&ALPN_ISTIO_TCP]);
    let plain_http = || list(&[&ALPN_PLAIN_HTTP]);
    let row = |suffix, transport, alpn, mtls, http| Row {
        suffix,
        transport,
        alpn,
        mtls,
        http,
    };
    use Transport::{Raw, Tls};
    match (protocol, mode) {
        (p, Mode::Disable) if p.is_http() => vec![row("-http", Raw, any(), false, true)],
        (p, Mode::Permissive) if p.is_http() => vec![
            row("-http-mtls", Tls, istio(), true, true),
            row("-http", Raw, any(), false, true),
        ],
        (p, Mode::Strict) if p.is_http() => vec![row("-http-mtls", Tls, any(), true, true)],
        (Protocol::Auto, Mode::Disable) => vec![
            row("-http", Raw, plain_http(), false, true),
            row("", Raw, any(), false, false),
        ],
        (Protocol::Auto, Mode::Permissive) => vec![
            row("-http-mtls", Tls, mtls_http(), true, true),
            row("-http", Raw, plain_http(), false, true),
            row("-mtls", Tls, mtls_tcp(), true, false),
            row("", Raw, any(), false, false),
            row("-tls", Tls, any(), false, false),
        ],
        (Protocol::Auto, Mode::Strict) => vec![
            row("-http-mtls", Tls, mtls_http(), true, true),
            row("-mtls", Tls, any(), true, false),
        ],
        (_, Mode::Disable) => vec![row("", Raw, any(), false, false)],
        (_, Mode::Permissive) => vec![
            row("-mtls", Tls, istio(), true, false),
            row("-tls", Tls, any(), false, false),
            row("", Raw, any(), false, false),
        ],
        (_, Mode::Strict) => vec![row("-mtls", Tls, any(), true, false)],
    }
}

/// Which inspectors the chains of a port need: TLS, HTTP (S1.44).
fn inspection(mode: Mode, protocol: Protocol) -> (bool, bool) {
    (
        mode != Mode::Disable,
        protocol == Protocol::Auto && mode != Mode::Strict,
    )
}
