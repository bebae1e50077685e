//! What the two proxies of the benchmark are told: four services, mutual TLS, an ALLOW policy of [`RULES`] rules, telemetry,
//! and for the second pair an access log.
//!
//! Ports, from a base: +80 HTTP/1.1, +82 HTTP/2, +84 gRPC, +90 TCP for the client's side; the server's side adds 6000. The
//! pair with a log has a base that is 1000 higher.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use mantlet_model::authz::{Action, Attribute, AuthzFilter, Expr, Matcher, Rule};
use mantlet_model::cluster::{Balancer, Cluster, ClusterTls, Discovery, Limits, ServiceRef, UpstreamProtocol};
use mantlet_model::endpoint::{Endpoint, Health, WorkloadRef};
use mantlet_model::http::{Codec, ForwardedClientCert, HttpManager, PathNormalization, Reporter, RouteSource};
use mantlet_model::listener::{
    AccessLog, ChainMatch, FilterChain, Filters, Inspector, Listener, TcpManager, Transport,
};
use mantlet_model::names::{ClusterName, Direction, SECRET_DEFAULT, SECRET_ROOT};
use mantlet_model::route::{Forward, Route, RouteAction, RouteMatch, RouteTable, VirtualHost};
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_model::tls::{ClientTls, SanMatch, ServerTls, TlsVersion};

const HOST: &str = "app.bench.svc.cluster.local";
/// Rules of every inbound filter; the one in the middle admits the client.
const RULES: usize = 100;
/// Between the ports of the pair without a log and of the one with it.
const LOGGED: u16 = 1000;

/// An end of the pair, or a proxy with many rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Client(Log),
    Server(Log),
    Rules(Proxy),
}

/// Whether a proxy writes an access log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Log {
    Off,
    On,
}

/// A proxy with many rules ([`crate::rules`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proxy {
    Mantlet,
    Envoy,
}

impl Proxy {
    pub(crate) fn pod(self) -> &'static str {
        match self {
            Proxy::Mantlet => "mantlet",
            Proxy::Envoy => "envoy",
        }
    }
}

impl Role {
    /// By the name of a pod, which is also its token.
    pub(crate) fn named(pod: &str) -> Option<Role> {
        let pairs = [Log::Off, Log::On].map(|log| [Role::Client(log), Role::Server(log)]);
        let rules = [Proxy::Mantlet, Proxy::Envoy].map(Role::Rules);
        pairs.into_iter().flatten().chain(rules).find(|role| role.pod() == pod)
    }

    /// The name of its pod.
    pub(crate) fn pod(self) -> &'static str {
        match self {
            Role::Client(Log::Off) => "client",
            Role::Client(Log::On) => "client-log",
            Role::Server(Log::Off) => "server",
            Role::Server(Log::On) => "server-log",
            Role::Rules(proxy) => proxy.pod(),
        }
    }
}

/// Addresses.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Address of the server's side.
    pub(crate) server: IpAddr,
    /// First port.
    pub(crate) port_base: u16,
    /// Whether the server's endpoints are marked as Mantlet's own.
    pub(crate) mantlet_endpoints: bool,
    /// Directory of the access logs.
    pub(crate) logs: PathBuf,
}

impl Plan {
    /// The plan of the pair with or without a log.
    fn with(&self, log: Log) -> Plan {
        let port_base = match log {
            Log::Off => self.port_base,
            Log::On => self.port_base + LOGGED,
        };
        Plan {
            port_base,
            ..self.clone()
        }
    }

    /// First port of a proxy with many rules.
    pub(crate) fn rules_port(&self, proxy: Proxy) -> u16 {
        self.port_base
            + match proxy {
                Proxy::Mantlet => 7000,
                Proxy::Envoy => 7500,
            }
    }
}

/// The kinds of service.
#[derive(Clone, Copy)]
enum Kind {
    Http1,
    Http2,
    Tcp,
}

const KINDS: [(Kind, &str, u16, u16); 4] = [
    (Kind::Http1, "h1", 80, 8080),
    (Kind::Http2, "h2", 82, 8082),
    (Kind::Http2, "grpc", 84, 8084),
    (Kind::Tcp, "tcp", 90, 8080),
];

/// The SPIFFE ID of an end.
pub(crate) fn identity(role: Role) -> String {
    match role {
        Role::Client(_) => "spiffe://cluster.local/ns/bench/sa/client".to_owned(),
        Role::Server(_) => "spiffe://cluster.local/ns/bench/sa/server".to_owned(),
        Role::Rules(proxy) => format!("spiffe://cluster.local/ns/bench/sa/{}", proxy.pod()),
    }
}

/// All resources of an end.
pub(crate) fn snapshot(role: Role, plan: &Plan) -> ProxySnapshot {
    let mut out = ProxySnapshot::default();
    for (kind, name, offset, app) in KINDS {
        let (mut listener, cluster) = match role {
            Role::Client(log) => client(kind, name, offset, &plan.with(log)),
            Role::Server(log) => server(kind, name, offset, app, &plan.with(log)),
            Role::Rules(proxy) => return crate::rules::snapshot(plan.server, plan.rules_port(proxy)),
        };
        if let Role::Client(Log::On) | Role::Server(Log::On) = role {
            log(&mut listener, plan.logs.join(format!("access-{}.log", role.pod())));
        }
        out.listeners.insert(listener.name.clone(), Arc::new(listener));
        out.clusters.insert(cluster.name.clone(), Arc::new(cluster));
    }
    out
}

/// Istio's default format into a file.
fn log(listener: &mut Listener, path: PathBuf) {
    let access_log = AccessLog {
        path: path.display().to_string(),
        format: String::new(),
        json: Vec::new(),
    };
    for chain in &mut listener.chains {
        match &mut chain.filters {
            Filters::Http(manager) => manager.access_log = Some(access_log.clone()),
            Filters::Tcp(_) => listener.access_log = Some(access_log.clone()),
        }
    }
}

fn client(kind: Kind, name: &str, offset: u16, plan: &Plan) -> (Listener, Cluster) {
    let cluster_name = ClusterName::outbound(offset, "", HOST);
    let tls = ClientTls {
        certificate: Some(SECRET_DEFAULT.to_owned()),
        trust_bundle: Some(SECRET_ROOT.to_owned()),
        server_sans: vec![SanMatch::Exact(identity(Role::Server(Log::Off)))],
        sni: cluster_name.sni(),
        alpn: match kind {
            Kind::Http2 => strings(&["istio-peer-exchange", "istio", "h2"]),
            _ => strings(&["istio-peer-exchange", "istio"]),
        },
        min_version: TlsVersion::V1_2,
    };
    let endpoint = Endpoint {
        address: plan.server.to_string(),
        port: plan.port_base + 6000 + offset,
        weight: 1,
        health: Health::Healthy,
        mtls: true,
        mantlet: plan.mantlet_endpoints,
        workload: Some(Arc::new(WorkloadRef {
            name: "server".to_owned(),
            namespace: "bench".to_owned(),
            canonical_name: "app".to_owned(),
            canonical_revision: "v1".to_owned(),
            cluster: "Kubernetes".to_owned(),
        })),
    };
    let cluster = Cluster {
        tls: ClusterTls::Auto(Box::new(tls)),
        ..cluster(cluster_name.to_string(), kind, endpoint)
    };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, plan.port_base + offset));
    let filters = filters(kind, name, &cluster.name, Vec::new(), Side::Outbound);
    (
        listener(format!("{name}_out"), address, Direction::Outbound, None, filters),
        cluster,
    )
}

/// Every rule names a caller; those of HTTP also what it may ask for.
fn allow(kind: Kind) -> AuthzFilter {
    let method = |name: &str| Expr::atom(Attribute::Method, Matcher::Exact(name.to_owned()));
    let rule = |number: usize| {
        let (caller, asks) = if number == RULES / 2 {
            let asks = Expr::Or(vec![method("GET"), method("POST")]);
            (identity(Role::Client(Log::Off)), asks)
        } else {
            let path = Matcher::Prefix(format!("/team-{number}/"));
            let asks = Expr::And(vec![method("GET"), Expr::atom(Attribute::Path, path)]);
            (format!("spiffe://cluster.local/ns/team-{number}/sa/app"), asks)
        };
        let from = Expr::atom(Attribute::PeerUri, Matcher::Exact(caller));
        Rule {
            id: format!("ns[bench]-policy[allow]-rule[{number:03}]"),
            expr: match kind {
                Kind::Tcp => from,
                _ => Expr::And(vec![from, asks]),
            },
        }
    };
    AuthzFilter {
        action: Action::Allow,
        enforced: true,
        rules: (0..RULES).map(rule).collect(),
        shadow: Vec::new(),
    }
}

fn server(kind: Kind, name: &str, offset: u16, app: u16, plan: &Plan) -> (Listener, Cluster) {
    let allow = allow(kind);
    let tls = ServerTls {
        certificate: SECRET_DEFAULT.to_owned(),
        trust_bundle: Some(SECRET_ROOT.to_owned()),
        client_sans: vec![SanMatch::Prefix("spiffe://cluster.local/".to_owned())],
        require_client_certificate: true,
        alpn: match kind {
            Kind::Tcp => strings(&["istio-peer-exchange", "h2", "http/1.1"]),
            _ => strings(&["h2", "http/1.1"]),
        },
        min_version: TlsVersion::V1_2,
        ciphers: Vec::new(),
    };
    let endpoint = Endpoint {
        address: Ipv4Addr::LOCALHOST.to_string(),
        port: app,
        weight: 1,
        health: Health::Healthy,
        mtls: false,
        mantlet: false,
        workload: None,
    };
    // The TCP service has the same application port as the HTTP/1.1 one, but needs a cluster of its own.
    let cluster = cluster(
        ClusterName::inbound(plan.port_base + offset).to_string(),
        kind,
        endpoint,
    );
    let address = SocketAddr::new(plan.server, plan.port_base + 6000 + offset);
    let filters = filters(kind, name, &cluster.name, vec![allow], Side::Inbound);
    (
        listener(format!("{name}_in"), address, Direction::Inbound, Some(tls), filters),
        cluster,
    )
}

fn cluster(name: String, kind: Kind, endpoint: Endpoint) -> Cluster {
    Cluster {
        name,
        discovery: Discovery::Static(vec![endpoint]),
        connect_timeout_ms: 10_000,
        balancer: Balancer::LeastRequest,
        tls: ClusterTls::Plain,
        protocol: match kind {
            Kind::Http2 => UpstreamProtocol::Http2,
            _ => UpstreamProtocol::Http1,
        },
        bind_source: None,
        limits: Limits::default(),
        outlier: None,
        services: vec![ServiceRef {
            host: HOST.to_owned(),
            name: "app".to_owned(),
            namespace: "bench".to_owned(),
        }],
        alpn_override: true,
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Outbound,
    Inbound,
}

fn filters(kind: Kind, name: &str, cluster: &str, authz: Vec<AuthzFilter>, side: Side) -> Filters {
    let inbound = side == Side::Inbound;
    let stat_prefix = format!("{}_{name}", if inbound { "inbound" } else { "outbound" });
    if matches!(kind, Kind::Tcp) {
        return Filters::Tcp(TcpManager {
            stat_prefix,
            custom: Vec::new(),
            authz,
            cluster: cluster.to_owned(),
            idle_timeout_ms: None,
            telemetry: true,
        });
    }
    let route = Route {
        name: "default".to_owned(),
        matches: RouteMatch::default(),
        action: RouteAction::Forward(Forward {
            clusters: vec![(cluster.to_owned(), 100)],
            prefix_rewrite: None,
            host_rewrite: None,
            timeout_ms: 0,
            retry: None,
        }),
        decorator: format!("{HOST}/*"),
        request_headers: Vec::new(),
        response_headers: Vec::new(),
    };
    let table = RouteTable {
        name: cluster.to_owned(),
        hosts: vec![Arc::new(VirtualHost {
            name: "any".to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            attempt_count: !inbound,
        })],
        ignore_port_in_host: false,
        on_demand: false,
    };
    Filters::Http(Box::new(HttpManager {
        stat_prefix,
        codec: Codec::Auto,
        routes: RouteSource::Inline(Box::new(table)),
        normalization: PathNormalization::Base,
        forwarded_client_cert: if inbound {
            ForwardedClientCert::AppendForward
        } else {
            ForwardedClientCert::Sanitize
        },
        use_remote_address: false,
        trusted_hops: 0,
        server_name: if inbound {
            "istio-envoy".to_owned()
        } else {
            "envoy".to_owned()
        },
        generate_request_id: true,
        websocket: true,
        stream_idle_timeout_ms: 0,
        jwt: None,
        custom: Vec::new(),
        authz,
        istio_alpn: !inbound,
        telemetry: Some(if inbound {
            Reporter::Destination
        } else {
            Reporter::Source
        }),
        access_log: None,
    }))
}

pub(crate) fn listener(
    name: String,
    address: SocketAddr,
    direction: Direction,
    tls: Option<ServerTls>,
    filters: Filters,
) -> Listener {
    let inbound = tls.is_some();
    Listener {
        address,
        bind_to_port: true,
        use_original_dst: false,
        direction,
        chains: vec![FilterChain {
            name: name.clone(),
            matches: ChainMatch {
                transport: inbound.then_some(Transport::Tls),
                ..ChainMatch::default()
            },
            tls,
            filters,
        }],
        default_chain: None,
        tls_inspector: if inbound {
            Inspector::Except(Vec::new())
        } else {
            Inspector::Off
        },
        http_inspector: Inspector::Off,
        detection_timeout_ms: 0,
        access_log: None,
        name,
    }
}

fn strings(all: &[&str]) -> Vec<String> {
    all.iter().map(|s| (*s).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mantlet_xds::{Options, ResourceSet};

    #[test]
    fn what_is_sent_is_complete_and_reads_back() {
        let plan = Plan {
            server: "10.99.0.2".parse().unwrap(),
            port_base: 40_000,
            mantlet_endpoints: true,
            logs: "/logs".into(),
        };
        for role in ["client", "server", "client-log", "server-log"].map(|pod| Role::named(pod).unwrap()) {
            let snapshot = snapshot(role, &plan);
            assert!(snapshot.dangling().is_empty());
            assert_eq!(snapshot.listeners.len(), KINDS.len());
            assert_eq!(snapshot.clusters.len(), KINDS.len());
            let logs = serde_json::to_string(&snapshot)
                .unwrap()
                .matches("/logs/access-")
                .count();
            assert_eq!(logs, if role.pod().ends_with("-log") { KINDS.len() } else { 0 });
            assert!(!ResourceSet::new(&snapshot, Vec::new(), &Options::default(), None).is_empty());
        }
    }
}
