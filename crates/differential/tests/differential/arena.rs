//! A network namespace with a real Envoy and a Mantlet proxy that run the same worlds, and the answers of both.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mantlet_differential::generate::{HTTP_PORTS, Plan, SOURCES_V6, TCP_PORTS};
use mantlet_differential::world::World as Settings;
use mantlet_model::authz::AuthzFilter;
use mantlet_model::cluster::{Balancer, Cluster, ClusterTls, Discovery, Limits, UpstreamProtocol};
use mantlet_model::endpoint::{Endpoint, Health};
use mantlet_model::http::{Codec, ForwardedClientCert, HttpManager, JwtAuthn, Reporter, RouteSource};
use mantlet_model::listener::{AccessLog, ChainMatch, FilterChain, Filters, Inspector, TcpManager, Transport};
use mantlet_model::names::{Direction, SECRET_DEFAULT, SECRET_ROOT};
use mantlet_model::route::{Route, RouteAction, RouteMatch, RouteTable, VirtualHost};
use mantlet_model::secret::{KeyBytes, Secret, SecretValue};
use mantlet_model::tls::{SanMatch, ServerTls, TlsVersion};
use mantlet_model::{Listener, ProxySnapshot};
use mantlet_proxy::config::Config;
use mantlet_proxy::telemetry::Telemetry;
use mantlet_proxy::telemetry::exchange::PeerLabels;
use mantlet_proxy::worker::{Phase, Shared, Tuning};
use mantlet_runtime::Registry;
use mantlet_testkit::{NetNs, programs};
use mantlet_translate::authz::{Form, Target, filters};
use mantlet_translate::mesh::Mesh;
use mantlet_translate::request_authentication::authentication;
use mantlet_translate::world::{Kind, World};
use mantlet_xds::{Dialect, Options, ResourceSet, ResourceType, decode, encode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::client::{Dialer, HttpClient, Reply, tcp};
use super::launch::Running;
use super::pki::Pki;
use super::tokens::Mint;

/// Where bytes of TCP chains end up.
const ECHO: (IpAddr, u16) = (IpAddr::V4(Ipv4Addr::new(10, 7, 0, 1)), 7);
/// Listeners per Envoy; more worlds run in several rounds.
pub(crate) const ROUND: usize = 400;

/// Addresses of a world's workload: HTTP port, TCP port. Every fifth is IPv6.
pub(crate) fn addresses(index: usize) -> (SocketAddr, SocketAddr) {
    let n = (index % ROUND) as u16;
    let ip: IpAddr = if index % 5 == 4 {
        Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, n + 1).into()
    } else {
        Ipv4Addr::new(10, 9, (n % 2 * 128 + n / 200) as u8, (n % 200) as u8 + 1).into()
    };
    (
        SocketAddr::new(ip, HTTP_PORTS[index % HTTP_PORTS.len()]),
        SocketAddr::new(ip, TCP_PORTS[index % TCP_PORTS.len()]),
    )
}

/// The address at which Mantlet's proxy serves what Envoy serves at `address`.
fn twin(address: SocketAddr, second: u8) -> SocketAddr {
    let ip: IpAddr = match address.ip() {
        IpAddr::V4(ip) => {
            let [a, _, c, d] = ip.octets();
            Ipv4Addr::new(a, second, c, d).into()
        }
        IpAddr::V6(ip) => {
            let mut parts = ip.segments();
            parts[1] = second.into();
            Ipv6Addr::from(parts).into()
        }
    };
    SocketAddr::new(ip, address.port())
}

/// What the product makes of a world's policies.
#[derive(Clone, Debug)]
pub(crate) struct Translated {
    pub(crate) http: Vec<AuthzFilter>,
    pub(crate) tcp: Vec<AuthzFilter>,
    /// The same after a trip over the wire.
    pub(crate) http_decoded: Vec<AuthzFilter>,
    pub(crate) tcp_decoded: Vec<AuthzFilter>,
    jwt: Option<JwtAuthn>,
    mesh: Mesh,
}

/// Objects → filters, by the way that a user's YAML takes.
pub(crate) fn translate(settings: &Settings) -> Translated {
    let config = json!({
        "trustDomain": settings.trust_domain,
        "trustDomainAliases": settings.aliases,
        "rootNamespace": settings.root_namespace,
        "pathNormalization": {"normalization": settings.normalization.name()},
    });
    let (config, _) = mantlet_api::MeshConfig::from_value(config).unwrap();
    let mesh = Mesh::from_config(&config);
    let mut world = World::new(mesh.clone());
    for object in &settings.objects {
        let text = mantlet_api::yaml::write(object);
        for object in mantlet_api::yaml::read_all(&text).unwrap() {
            let kind = Kind::by_name(object["kind"].as_str().unwrap()).unwrap();
            world.set_config(kind, &object);
        }
    }
    let target = Target {
        namespace: &settings.namespace,
        labels: &settings.labels,
        gateway: false,
    };
    let http = filters(&world, target, Form::Http);
    let tcp = filters(&world, target, Form::Tcp);
    let mut translated = Translated {
        http_decoded: vec![],
        tcp_decoded: vec![],
        http,
        tcp,
        jwt: authentication(&world, target),
        mesh,
    };
    let anywhere = addresses(0);
    let [http, tcp] = listeners("x", &translated, anywhere, Path::new("/dev/null"), 9).map(|listener| {
        let wire = encode::listener(&listener, &Options::new(Dialect::Istio));
        let mut decoded = decode::listener(&wire).unwrap_or_else(|e| panic!("{e}\n{settings:#?}"));
        match decoded.chains.remove(0).filters {
            Filters::Http(manager) => manager.authz,
            Filters::Tcp(manager) => manager.authz,
        }
    });
    translated.http_decoded = http;
    translated.tcp_decoded = tcp;
    translated
}

/// The listeners of a world: HTTP and TCP, both with and without mTLS.
fn listeners(
    name: &str,
    translated: &Translated,
    (http, tcp): (SocketAddr, SocketAddr),
    log: &Path,
    second: u8,
) -> [Listener; 2] {
    let access_log = |format: &str| {
        Some(AccessLog {
            path: log.display().to_string(),
            format: format.into(),
            json: vec![],
        })
    };
    let domains = ["cluster.local", "td2.example", "old.td2.example"];
    let mtls = ServerTls {
        certificate: SECRET_DEFAULT.into(),
        trust_bundle: Some(SECRET_ROOT.into()),
        client_sans: domains.map(|d| SanMatch::Prefix(format!("spiffe://{d}/"))).into(),
        require_client_certificate: true,
        alpn: vec!["h2".into(), "http/1.1".into()],
        min_version: TlsVersion::V1_2,
        ciphers: vec![],
    };
    let route = Route {
        name: "ok".into(),
        matches: RouteMatch::default(),
        action: RouteAction::Respond {
            status: 200,
            body: "ok".into(),
        },
        decorator: String::new(),
        request_headers: vec![],
        response_headers: vec![],
    };
    let manager = HttpManager {
        stat_prefix: "inbound".into(),
        codec: Codec::Auto,
        routes: RouteSource::Inline(Box::new(RouteTable {
            name: "inbound".into(),
            hosts: vec![Arc::new(VirtualHost {
                name: "inbound".into(),
                domains: vec!["*".into()],
                routes: vec![route],
                attempt_count: false,
            })],
            ignore_port_in_host: false,
            on_demand: false,
        })),
        normalization: translated.mesh.normalization,
        forwarded_client_cert: ForwardedClientCert::AppendForward,
        use_remote_address: false,
        trusted_hops: 0,
        server_name: "istio-envoy".into(),
        generate_request_id: true,
        websocket: true,
        stream_idle_timeout_ms: 0,
        custom: vec![],
        jwt: translated.jwt.clone(),
        authz: translated.http.clone(),
        istio_alpn: false,
        telemetry: Some(Reporter::Destination),
        access_log: access_log(HTTP_LOG),
    };
    let through = TcpManager {
        stat_prefix: "tcp".into(),
        custom: vec![],
        authz: translated.tcp.clone(),
        cluster: "echo".into(),
        idle_timeout_ms: None,
        telemetry: true,
    };
    let listener = |kind: &str, address: SocketAddr, filters: Filters| {
        let chain = |name: &str, transport, tls| FilterChain {
            name: name.into(),
            matches: ChainMatch {
                transport: Some(transport),
                ..ChainMatch::default()
            },
            tls,
            filters: filters.clone(),
        };
        Listener {
            name: format!("{name}-{kind}"),
            address: twin(address, second),
            bind_to_port: true,
            use_original_dst: false,
            direction: Direction::Inbound,
            chains: vec![
                chain("mtls", Transport::Tls, Some(mtls.clone())),
                chain("plain", Transport::Raw, None),
            ],
            default_chain: None,
            tls_inspector: Inspector::Except(vec![]),
            http_inspector: Inspector::Off,
            detection_timeout_ms: 0,
            access_log: access_log(TCP_LOG),
        }
    };
    [
        listener("http", http, Filters::Http(Box::new(manager))),
        listener("tcp", tcp, Filters::Tcp(through)),
    ]
}

/// Fields are separated by a character that no policy id and no header here holds.
const HTTP_LOG: &str = "%REQ(X-CASE)%|%RESPONSE_CODE_DETAILS%|%DYNAMIC_METADATA(envoy.common:access_log_hint)%|\
%DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_deny_shadow_engine_result)%|\
%DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_deny_shadow_effective_policy_id)%|\
%DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_allow_shadow_engine_result)%|\
%DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_allow_shadow_effective_policy_id)%\n";
const TCP_LOG: &str = "tcp %DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS%|%CONNECTION_TERMINATION_DETAILS%\n";

fn snapshot(worlds: &[Translated], first: usize, log: &Path, second: u8) -> ProxySnapshot {
    let mut out = ProxySnapshot::default();
    for (index, translated) in worlds.iter().enumerate() {
        for listener in listeners(&format!("w{index}"), translated, addresses(first + index), log, second) {
            out.listeners.insert(listener.name.clone(), Arc::new(listener));
        }
    }
    let echo = Cluster {
        name: "echo".into(),
        discovery: Discovery::Static(vec![Endpoint {
            address: ECHO.0.to_string(),
            port: ECHO.1,
            weight: 1,
            health: Health::Healthy,
            mtls: false,
            mantlet: false,
            workload: None,
        }]),
        connect_timeout_ms: 60_000,
        balancer: Balancer::RoundRobin,
        tls: ClusterTls::Plain,
        protocol: UpstreamProtocol::Http1,
        bind_source: None,
        limits: Limits::default(),
        outlier: None,
        services: vec![],
        alpn_override: false,
    };
    out.clusters.insert(echo.name.clone(), Arc::new(echo));
    assert_eq!(out.dangling(), vec![]);
    out
}

/// The snapshot as the proxy's agent would have read it from the wire.
fn over_the_wire(snapshot: &ProxySnapshot) -> ProxySnapshot {
    let options = Options::new(Dialect::Istio);
    let listener = |l: &Arc<Listener>| Arc::new(decode::listener(&encode::listener(l, &options)).unwrap());
    let cluster = |c: &Arc<Cluster>| Arc::new(decode::cluster(&encode::cluster(c, &options)).unwrap());
    ProxySnapshot {
        listeners: snapshot
            .listeners
            .iter()
            .map(|(n, l)| (n.clone(), listener(l)))
            .collect(),
        clusters: snapshot.clusters.iter().map(|(n, c)| (n.clone(), cluster(c))).collect(),
        ..ProxySnapshot::default()
    }
}

/// What one side said to a request.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub(crate) reply: Reply,
    /// The line of the access log, without the case's number.
    pub(crate) log: Vec<String>,
}

/// What one side did to a TCP connection.
#[derive(Clone, Debug)]
pub(crate) struct Did {
    pub(crate) passed: bool,
    /// Termination details in the access log.
    pub(crate) details: String,
}

/// The answers of Envoy and of the proxy to all questions of a world.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answers {
    /// By connection and request.
    pub(crate) http: Vec<Vec<[Said; 2]>>,
    /// By connection.
    pub(crate) tcp: Vec<[Did; 2]>,
}

/// Asks both. `first` is the index of the first plan.
pub(crate) fn run(plans: &[Plan], worlds: &[Translated], first: usize, mint: &Arc<Mint>) -> Vec<Answers> {
    assert!(plans.len() <= ROUND && plans.len() == worlds.len());
    // Here, because the namespace has no way to the outside.
    programs::envoy();
    let ns = NetNs::new("diff");
    ns.exec(&["ip", "route", "add", "local", "10.0.0.0/8", "dev", "lo"]);
    ns.exec(&["ip", "route", "add", "local", "192.168.0.0/16", "dev", "lo"]);
    let dir = tempfile::tempdir().unwrap();
    let mut batch = String::new();
    let served = (first..first + plans.len()).map(addresses).filter(|a| a.0.is_ipv6());
    let served = served.flat_map(|a| [twin(a.0, 9).ip(), twin(a.0, 8).ip()]);
    for ip in SOURCES_V6.iter().map(|s| s.parse().unwrap()).chain(served) {
        batch.push_str(&format!("address add {ip}/128 dev lo nodad\n"));
    }
    let file = dir.path().join("addresses");
    std::fs::write(&file, batch).unwrap();
    ns.exec(&["ip", "-batch", &file.display().to_string()]);
    ns.run(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let out = runtime.block_on(inside(plans, worlds, first, mint, dir.path()));
        runtime.shutdown_background();
        out
    })
}

async fn inside(plans: &[Plan], worlds: &[Translated], first: usize, mint: &Arc<Mint>, dir: &Path) -> Vec<Answers> {
    let echo = TcpListener::bind(ECHO).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = echo.accept().await {
            tokio::spawn(async move {
                let mut bytes = [0; 64];
                while let Ok(n @ 1..) = stream.read(&mut bytes).await {
                    if stream.write_all(&bytes[..n]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    let pki = Arc::new(Pki::new());
    let server = pki.leaf(&["spiffe://cluster.local/ns/shop/sa/web"]);
    let secrets = [
        Secret {
            name: SECRET_DEFAULT.into(),
            value: SecretValue::KeyPair {
                chain: server.chain_pem.clone().into_bytes(),
                key: KeyBytes::new(server.key_pem.clone().into_bytes()),
            },
        },
        Secret {
            name: SECRET_ROOT.into(),
            value: SecretValue::TrustBundle(pki.root_pem.clone().into_bytes()),
        },
    ];
    let logs = [dir.join("envoy-access.log"), dir.join("proxy-access.log")];
    let set = ResourceSet::new(
        &snapshot(worlds, first, &logs[0], 9),
        secrets.into_iter().map(Arc::new),
        &Options::new(Dialect::PlainEnvoy),
        None,
    );
    let mut envoy = Running::start(dir, set, true).await;

    let local = PeerLabels {
        workload: "web".into(),
        namespace: "shop".into(),
        ..PeerLabels::unknown()
    };
    let telemetry = Telemetry::new(
        Registry::new(),
        local,
        "sidecar~10.9.0.1~web.shop~shop.svc.cluster.local",
    )
    .expect("a thread");
    let tuning = Tuning {
        workers: 1,
        ..Tuning::default()
    };
    // The proxy believes itself to be where Envoy is, so that destinations are equal.
    let shared = Shared::new(tuning, Arc::new(|tcp| Ok(twin(tcp.local_addr()?, 9))), telemetry);
    let workers = shared.start().unwrap();
    shared.secrets.set_identity(pki.identity(&server));
    let for_proxy = over_the_wire(&snapshot(worlds, first, &logs[1], 8));
    shared.apply(Config::compile(Arc::new(for_proxy), 1, &Default::default()).unwrap());
    let failed = tokio::time::timeout(Duration::from_secs(60), shared.applied(1))
        .await
        .unwrap();
    assert_eq!(failed, 0, "all sockets of the proxy are open");

    envoy
        .all_accepted(&[ResourceType::Cluster, ResourceType::Listener, ResourceType::Secret])
        .await;
    let dialer = Arc::new(Dialer::new(pki));
    let mut tasks = JoinSet::new();
    let slots = Arc::new(tokio::sync::Semaphore::new(6));
    let mut case = 0;
    for (index, plan) in plans.iter().enumerate() {
        let (plan, dialer, slots, mint, from) = (plan.clone(), dialer.clone(), slots.clone(), mint.clone(), case);
        case += plan.http.iter().map(|(_, requests)| requests.len()).sum::<usize>();
        let address = addresses(first + index);
        tasks.spawn(async move {
            let _slot = slots.acquire_owned().await.unwrap();
            (index, from, ask(&plan, &dialer, &mint, address, from).await)
        });
    }
    let mut asked: Vec<Option<(usize, Raw)>> = plans.iter().map(|_| None).collect();
    while let Some(done) = tasks.join_next().await {
        let (index, from, raw) = done.unwrap();
        asked[index] = Some((from, raw));
    }

    // Both write their logs out when they end.
    envoy.stop();
    shared.set_phase(Phase::Stopping);
    tokio::task::spawn_blocking(move || workers.into_iter().for_each(|w| w.join().unwrap()))
        .await
        .unwrap();
    shared.telemetry.log.finish(Duration::from_secs(60));
    assert_eq!(shared.telemetry.log.dropped(), 0, "the access log is complete");
    let lines = logs.map(|log| {
        let text = String::from_utf8_lossy(&std::fs::read(log).unwrap()).into_owned();
        let split = |line: &str| {
            let (key, rest) = line.split_once('|')?;
            let fields = rest.split('|').map(|f| f.trim_matches('"').to_string()).collect();
            Some((key.to_string(), fields))
        };
        text.lines().filter_map(split).collect::<HashMap<String, Vec<String>>>()
    });
    let asked = asked.into_iter().flatten();
    asked.map(|(from, raw)| raw.with_logs(from, &lines)).collect()
}

/// Answers before the logs are read.
struct Raw {
    http: Vec<Vec<[Reply; 2]>>,
    tcp: Vec<[(bool, Option<SocketAddr>, SocketAddr); 2]>,
}

async fn ask(plan: &Plan, dialer: &Dialer, mint: &Mint, address: (SocketAddr, SocketAddr), first_case: usize) -> Raw {
    // A listener opens its socket when it is warm; the acknowledgement comes before that.
    for address in [address.0, address.1] {
        let up = || tokio::net::TcpStream::connect(address);
        mantlet_testkit::wait::eventually("Envoy listens", Duration::from_secs(120), up).await;
    }
    let mut case = first_case;
    let mut http = Vec::new();
    for (facts, requests) in &plan.http {
        let mut sides = [9, 8].map(|second| HttpClient::new(dialer, mint, facts, twin(address.0, second)));
        let mut replies = Vec::new();
        for request in requests {
            let [envoy, proxy] = &mut sides;
            let (a, b) = tokio::join!(envoy.send(request, case), proxy.send(request, case));
            replies.push([a, b]);
            case += 1;
        }
        http.push(replies);
    }
    let mut connections = Vec::new();
    for facts in &plan.tcp {
        let to = [9, 8].map(|second| twin(address.1, second));
        let (a, b) = tokio::join!(tcp(dialer, facts, to[0]), tcp(dialer, facts, to[1]));
        // Both write the address that clients meant.
        connections.push([(a.0, a.1, address.1), (b.0, b.1, address.1)]);
    }
    Raw { http, tcp: connections }
}

impl Raw {
    fn with_logs(self, first_case: usize, lines: &[HashMap<String, Vec<String>>; 2]) -> Answers {
        let mut case = first_case;
        let mut out = Answers::default();
        for replies in self.http {
            let mut said = Vec::new();
            for [a, b] in replies {
                let of = |side: usize, reply| Said {
                    reply,
                    log: lines[side].get(&case.to_string()).cloned().unwrap_or_default(),
                };
                said.push([of(0, a), of(1, b)]);
                case += 1;
            }
            out.http.push(said);
        }
        for [a, b] in self.tcp {
            let of = |side: usize, (passed, from, to): (bool, Option<SocketAddr>, SocketAddr)| {
                let key = from.map(|from| format!("tcp {from} {to}")).unwrap_or_default();
                Did {
                    passed,
                    details: lines[side].get(&key).map(|f| f.concat()).unwrap_or_default(),
                }
            };
            out.tcp.push([of(0, a), of(1, b)]);
        }
        out
    }
}

/// How often each thing happened.
pub(crate) type Counts = BTreeMap<String, [usize; 2]>;
