//! Proxies in this process with hand-made configuration: what `mesh.rs` and its neighbours share.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test program uses its part")]

pub mod agent;
pub mod control;
pub mod edge;
pub mod program;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mantlet_model::authz::{Action, AuthzFilter};
use mantlet_model::cluster::*;
use mantlet_model::endpoint::{Endpoint, Endpoints, Health};
use mantlet_model::http::*;
use mantlet_model::listener::*;
use mantlet_model::names::*;
use mantlet_model::route::*;
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_model::tls::{ClientTls, SanMatch, ServerTls, TlsVersion};
use mantlet_proxy::config::Config;
use mantlet_proxy::telemetry::Telemetry;
use mantlet_proxy::telemetry::exchange::PeerLabels;
use mantlet_proxy::worker::{Phase, Shared, Tuning};
use mantlet_runtime::Registry;
use mantlet_testkit::TestCa;
pub use mantlet_testkit::free_address;

pub const HOST: &str = "web.default.svc.cluster.local";
pub const SERVER_SA: &str = "spiffe://cluster.local/ns/default/sa/web";
pub const CLIENT_SA: &str = "spiffe://cluster.local/ns/default/sa/sleep";

/// A proxy in this process.
pub struct Proxy {
    pub shared: Arc<Shared>,
    /// What captured connections were going to.
    pub destination: Arc<Mutex<SocketAddr>>,
    version: std::sync::atomic::AtomicU64,
}

impl Proxy {
    pub fn start(workload: &str, workers: usize) -> Proxy {
        let tuning = Tuning {
            workers,
            handshake_timeout: Duration::from_secs(5),
            ..Tuning::default()
        };
        Proxy::tuned(workload, tuning)
    }

    /// With other bounds.
    pub fn tuned(workload: &str, tuning: Tuning) -> Proxy {
        let destination = Arc::new(Mutex::new(SocketAddr::from(([127, 0, 0, 1], 9))));
        let hook = destination.clone();
        let local = PeerLabels {
            workload: workload.to_string(),
            namespace: "default".into(),
            canonical_name: workload.to_string(),
            app: workload.to_string(),
            ..PeerLabels::unknown()
        };
        let node = format!("sidecar~127.0.0.1~{workload}.default~default.svc.cluster.local");
        let telemetry = Telemetry::new(Registry::new(), local, &node).expect("a thread");
        let shared = Shared::new(tuning, Arc::new(move |_| Ok(*hook.lock().unwrap())), telemetry);
        shared.start().unwrap();
        Proxy {
            shared,
            destination,
            version: 1.into(),
        }
    }

    pub fn identity(&self, ca: &TestCa, account: &str) {
        self.shared
            .secrets
            .set_identity(ca.workload("default", account).identity);
    }

    pub async fn apply(&self, snapshot: ProxySnapshot) {
        assert_eq!(snapshot.dangling(), [], "the test's snapshot is closed");
        let version = self.version.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        self.shared
            .apply(Config::compile(Arc::new(snapshot), version, &Default::default()).unwrap());
        let failed = tokio::time::timeout(Duration::from_secs(10), self.shared.applied(version))
            .await
            .expect("workers take the configuration over");
        assert_eq!(failed, 0, "all sockets are open");
    }

    pub fn metrics(&self) -> String {
        self.shared.telemetry.registry.render()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.set_phase(Phase::Stopping);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Disable,
    Permissive,
    Strict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Http,
    Tcp,
    Auto,
}

pub fn server_tls(http: bool) -> ServerTls {
    let alpn: &[&str] = if http {
        &["h2", "http/1.1"]
    } else {
        &["istio-peer-exchange", "h2", "http/1.1"]
    };
    ServerTls {
        certificate: SECRET_DEFAULT.into(),
        trust_bundle: Some(SECRET_ROOT.into()),
        client_sans: vec![SanMatch::Prefix("spiffe://cluster.local/".into())],
        require_client_certificate: true,
        alpn: alpn.iter().map(|s| s.to_string()).collect(),
        min_version: TlsVersion::V1_2,
        ciphers: Vec::new(),
    }
}

pub fn http_manager(routes: RouteSource, inbound: bool, authz: Vec<AuthzFilter>) -> HttpManager {
    HttpManager {
        stat_prefix: "test".into(),
        codec: Codec::Auto,
        routes,
        normalization: PathNormalization::Base,
        forwarded_client_cert: if inbound {
            ForwardedClientCert::AppendForward
        } else {
            ForwardedClientCert::Sanitize
        },
        use_remote_address: false,
        trusted_hops: 0,
        server_name: if inbound { "istio-envoy" } else { "envoy" }.into(),
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
    }
}

pub fn forward_to(cluster: &str, retry: Option<Retry>) -> RouteAction {
    RouteAction::Forward(Forward {
        clusters: vec![(cluster.to_string(), 100)],
        prefix_rewrite: None,
        host_rewrite: None,
        timeout_ms: 0,
        retry,
    })
}

pub fn table(name: &str, domains: &[&str], action: RouteAction) -> RouteTable {
    RouteTable {
        name: name.into(),
        hosts: vec![Arc::new(VirtualHost {
            name: name.into(),
            domains: domains.iter().map(|s| s.to_string()).collect(),
            routes: vec![Route {
                name: "default".into(),
                matches: RouteMatch::default(),
                action,
                decorator: String::new(),
                request_headers: Vec::new(),
                response_headers: Vec::new(),
            }],
            attempt_count: false,
        })],
        ignore_port_in_host: true,
        on_demand: false,
    }
}

pub fn cluster(name: &str, discovery: Discovery) -> Cluster {
    Cluster {
        name: name.into(),
        discovery,
        connect_timeout_ms: 2_000,
        balancer: Balancer::LeastRequest,
        tls: ClusterTls::Plain,
        protocol: UpstreamProtocol::Http1,
        bind_source: None,
        limits: Limits::default(),
        outlier: None,
        services: vec![ServiceRef {
            host: HOST.into(),
            name: "web".into(),
            namespace: "default".into(),
        }],
        alpn_override: true,
    }
}

/// The inbound side of a workload with one declared port (S1c).
#[derive(Clone)]
pub struct Inbound {
    pub listen: SocketAddr,
    pub app: SocketAddr,
    pub port: Port,
    pub mode: Mode,
    pub authz: Vec<AuthzFilter>,
    pub protocol: UpstreamProtocol,
}

impl Inbound {
    pub fn snapshot(&self) -> ProxySnapshot {
        let app_port = self.app.port();
        let cluster_name = ClusterName::inbound(app_port).to_string();
        let routes = || RouteSource::Inline(Box::new(table(&cluster_name, &["*"], forward_to(&cluster_name, None))));
        let http = || Filters::Http(Box::new(http_manager(routes(), true, self.authz.clone())));
        let tcp = || {
            Filters::Tcp(TcpManager {
                stat_prefix: cluster_name.clone(),
                custom: Vec::new(),
                authz: self.authz.clone(),
                cluster: cluster_name.clone(),
                idle_timeout_ms: None,
                telemetry: true,
            })
        };
        // Plain TLS on a PERMISSIVE port goes to the application untouched, without authorization by identity.
        let untouched = tcp;
        let strings = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let all_istio: Vec<String> = strings(&ALPN_ISTIO_HTTP)
            .into_iter()
            .chain(strings(&ALPN_ISTIO_TCP))
            .collect();
        let mut chains = Vec::new();
        let mut add = |transport: Option<Transport>, alpn: Vec<String>, tls: Option<ServerTls>, filters: Filters| {
            chains.push(FilterChain {
                name: format!("{app_port}-{}", chains.len()),
                matches: ChainMatch {
                    destination_port: Some(app_port),
                    transport,
                    application_protocols: alpn,
                    ..ChainMatch::default()
                },
                tls,
                filters,
            });
        };
        let (raw, tls) = (Some(Transport::Raw), Some(Transport::Tls));
        match (self.port, self.mode) {
            (Port::Http, Mode::Disable) => add(raw, vec![], None, http()),
            (Port::Http, Mode::Permissive) => {
                add(tls, all_istio.clone(), Some(server_tls(true)), http());
                add(raw, vec![], None, http());
            }
            (Port::Http, Mode::Strict) => add(tls, vec![], Some(server_tls(true)), http()),
            (Port::Tcp, Mode::Disable) => add(raw, vec![], None, tcp()),
            (Port::Tcp, Mode::Permissive) => {
                add(tls, all_istio.clone(), Some(server_tls(false)), tcp());
                add(tls, vec![], None, untouched());
                add(raw, vec![], None, tcp());
            }
            (Port::Tcp, Mode::Strict) => add(tls, vec![], Some(server_tls(false)), tcp()),
            (Port::Auto, Mode::Disable) => {
                add(raw, strings(&ALPN_PLAIN_HTTP), None, http());
                add(raw, vec![], None, tcp());
            }
            (Port::Auto, Mode::Permissive) => {
                add(tls, strings(&ALPN_ISTIO_HTTP), Some(server_tls(true)), http());
                add(raw, strings(&ALPN_PLAIN_HTTP), None, http());
                add(tls, strings(&ALPN_ISTIO_TCP), Some(server_tls(false)), tcp());
                add(raw, vec![], None, tcp());
                add(tls, vec![], None, untouched());
            }
            (Port::Auto, Mode::Strict) => {
                add(tls, strings(&ALPN_ISTIO_HTTP), Some(server_tls(true)), http());
                add(tls, vec![], Some(server_tls(false)), tcp());
            }
        }
        let listener = Listener {
            name: VIRTUAL_INBOUND.into(),
            address: self.listen,
            bind_to_port: true,
            use_original_dst: false,
            direction: Direction::Inbound,
            chains,
            default_chain: None,
            tls_inspector: if self.mode == Mode::Disable {
                Inspector::Off
            } else {
                Inspector::Except(vec![])
            },
            http_inspector: if self.port == Port::Auto {
                Inspector::Except(vec![])
            } else {
                Inspector::Off
            },
            detection_timeout_ms: 0,
            access_log: None,
        };
        let mut app = cluster(&cluster_name, Discovery::OriginalDestination { port: None });
        app.bind_source = Some(IpAddr::from([127, 0, 0, 6]));
        app.protocol = self.protocol;
        let mut out = ProxySnapshot::default();
        out.listeners.insert(listener.name.clone(), Arc::new(listener));
        out.clusters.insert(cluster_name, Arc::new(app));
        out
    }
}

/// The outbound side of a client of one service.
pub struct Outbound {
    pub listen: SocketAddr,
    /// Service port.
    pub port: u16,
    pub endpoints: Vec<SocketAddr>,
    pub mtls: bool,
    pub sans: Vec<String>,
    pub protocol: UpstreamProtocol,
    pub retry: Option<Retry>,
    pub tcp: bool,
}

pub fn default_retry() -> Retry {
    Retry {
        on: "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes".into(),
        attempts: 2,
        per_try_timeout_ms: 0,
        statuses: vec![503],
    }
}

impl Outbound {
    pub fn cluster_name(&self) -> String {
        ClusterName::outbound(self.port, "", HOST).to_string()
    }

    pub fn snapshot(&self) -> ProxySnapshot {
        let name = self.cluster_name();
        let tcp_chain = |cluster: &str| FilterChain {
            name: format!("tcp-{cluster}"),
            matches: ChainMatch::default(),
            tls: None,
            filters: Filters::Tcp(TcpManager {
                stat_prefix: cluster.into(),
                custom: Vec::new(),
                authz: vec![],
                cluster: cluster.into(),
                idle_timeout_ms: None,
                telemetry: true,
            }),
        };
        let listener = |name: &str, address: SocketAddr, bind: bool, chain: FilterChain| Listener {
            name: name.into(),
            address,
            bind_to_port: bind,
            use_original_dst: bind,
            direction: Direction::Outbound,
            chains: vec![],
            default_chain: Some(chain),
            tls_inspector: Inspector::Off,
            http_inspector: Inspector::Off,
            detection_timeout_ms: 0,
            access_log: None,
        };
        let service = if self.tcp {
            tcp_chain(&name)
        } else {
            FilterChain {
                name: "http".into(),
                matches: ChainMatch::default(),
                tls: None,
                filters: Filters::Http(Box::new(http_manager(
                    RouteSource::Named(self.port.to_string()),
                    false,
                    vec![],
                ))),
            }
        };
        let wildcard = SocketAddr::from(([0, 0, 0, 0], self.port));
        let mut routes = table(
            &self.port.to_string(),
            &[HOST, "web"],
            forward_to(&name, self.retry.clone()),
        );
        routes
            .hosts
            .extend(table("allow_any", &["*"], forward_to(PASSTHROUGH, None)).hosts);
        let mut service_cluster = cluster(&name, Discovery::Eds { service: name.clone() });
        service_cluster.protocol = self.protocol;
        let mut alpn = ALPN_ISTIO_TCP.map(String::from).to_vec();
        if self.protocol == UpstreamProtocol::Http2 {
            alpn.push("h2".into());
        }
        service_cluster.tls = ClusterTls::Auto(Box::new(ClientTls {
            certificate: Some(SECRET_DEFAULT.into()),
            trust_bundle: Some(SECRET_ROOT.into()),
            server_sans: self.sans.iter().cloned().map(SanMatch::Exact).collect(),
            sni: ClusterName::outbound(self.port, "", HOST).sni(),
            alpn,
            min_version: TlsVersion::V1_2,
        }));
        let endpoints = Endpoints {
            cluster: name.clone(),
            endpoints: self
                .endpoints
                .iter()
                .map(|a| Endpoint {
                    address: a.ip().to_string(),
                    port: a.port(),
                    weight: 1,
                    health: Health::Healthy,
                    mtls: self.mtls,
                    mantlet: true,
                    workload: None,
                })
                .collect(),
        };
        let listeners = [
            listener(VIRTUAL_OUTBOUND, self.listen, true, tcp_chain(PASSTHROUGH)),
            listener(&format!("0.0.0.0_{}", self.port), wildcard, false, service),
        ];
        let mut passthrough = cluster(PASSTHROUGH, Discovery::OriginalDestination { port: None });
        passthrough.services.clear();
        ProxySnapshot {
            listeners: listeners.into_iter().map(|l| (l.name.clone(), Arc::new(l))).collect(),
            routes: BTreeMap::from([(routes.name.clone(), Arc::new(routes))]),
            clusters: [service_cluster, passthrough]
                .into_iter()
                .map(|c| (c.name.clone(), Arc::new(c)))
                .collect(),
            endpoints: BTreeMap::from([(name, Arc::new(endpoints))]),
            ..ProxySnapshot::default()
        }
    }
}

/// A client proxy and a server proxy before an application.
pub struct Mesh {
    pub ca: TestCa,
    pub client: Proxy,
    pub server: Proxy,
    pub inbound: Inbound,
    pub outbound: Outbound,
}

impl Mesh {
    pub async fn new(app: SocketAddr, port: Port, mode: Mode) -> Mesh {
        Mesh::with_workers(app, port, mode, 2).await
    }

    /// With so many workers in each proxy.
    pub async fn with_workers(app: SocketAddr, port: Port, mode: Mode, workers: usize) -> Mesh {
        let (client, server) = (Proxy::start("sleep", workers), Proxy::start("web", workers));
        Mesh::between(app, port, mode, client, server).await
    }

    /// Between these proxies.
    pub async fn between(app: SocketAddr, port: Port, mode: Mode, client: Proxy, server: Proxy) -> Mesh {
        let ca = TestCa::new("cluster.local");
        client.identity(&ca, "sleep");
        server.identity(&ca, "web");
        let inbound = Inbound {
            listen: free_address(),
            app,
            port,
            mode,
            authz: vec![],
            protocol: UpstreamProtocol::Http1,
        };
        let outbound = Outbound {
            listen: free_address(),
            port: 80,
            endpoints: vec![inbound.listen],
            mtls: true,
            sans: vec![SERVER_SA.into()],
            protocol: UpstreamProtocol::Http1,
            retry: Some(default_retry()),
            tcp: port == Port::Tcp,
        };
        *server.destination.lock().unwrap() = app;
        *client.destination.lock().unwrap() = SocketAddr::from(([10, 96, 0, 20], 80));
        let mesh = Mesh {
            ca,
            client,
            server,
            inbound,
            outbound,
        };
        mesh.apply().await;
        mesh
    }

    pub async fn apply(&self) {
        self.server.apply(self.inbound.snapshot()).await;
        self.client.apply(self.outbound.snapshot()).await;
    }

    /// Where the client's application connects to.
    pub fn entry(&self) -> SocketAddr {
        self.outbound.listen
    }
}

/// ALLOW rules with one expression.
pub fn allow(expr: mantlet_model::authz::Expr) -> Vec<AuthzFilter> {
    vec![AuthzFilter {
        action: Action::Allow,
        enforced: true,
        rules: vec![mantlet_model::authz::Rule {
            id: "ns[default]-policy[allow]-rule[0]".into(),
            expr,
        }],
        shadow: vec![],
    }]
}

pub struct CurlOutput {
    pub code: i32,
    pub status: u16,
    pub body: String,
    pub headers: String,
    pub error: String,
}

/// Runs the real curl.
pub async fn curl(arguments: &[&str]) -> CurlOutput {
    let program = mantlet_testkit::program("curl");
    let output = tokio::process::Command::new(program)
        .args(["-sS", "-i", "--max-time", "10"])
        .args(arguments)
        .output()
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (headers, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    CurlOutput {
        code: output.status.code().unwrap_or(-1),
        status: headers
            .split_whitespace()
            .nth(1)
            .and_then(|s| s.parse().ok())
            .unwrap_or(0),
        body: body.to_string(),
        headers: headers.to_ascii_lowercase(),
        error: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
