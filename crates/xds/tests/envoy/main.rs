//! A real Envoy, fed by our ADS server: it must accept what `encode` writes, and decide and route as our model does.

mod launch;
mod routes;

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use mantlet_model::authz::{
    Action, Atom, Attribute, AuthzFilter, Connection, Engine, Expr, HttpView, Matcher, Rule, Verdict,
};
use mantlet_model::cluster::{Balancer, Cluster, ClusterTls, Discovery, Limits, Outlier, ServiceRef, UpstreamProtocol};
use mantlet_model::endpoint::{Endpoint, Endpoints, Health, WorkloadRef};
use mantlet_model::http::{
    Codec, ForwardedClientCert, HttpManager, JwtAuthn, JwtProvider, PathNormalization, Reporter, RouteSource,
};
use mantlet_model::listener::{AccessLog, ChainMatch, FilterChain, Filters, Inspector, TcpManager, Transport};
use mantlet_model::names::Direction;
use mantlet_model::route::{Forward, PathMatch, Retry, Route, RouteAction, RouteMatch, RouteTable, VirtualHost};
use mantlet_model::secret::{KeyBytes, Secret, SecretValue};
use mantlet_model::tls::{ClientTls, SanMatch, ServerTls, TlsVersion};
use mantlet_model::{Listener, ProxySnapshot};
use mantlet_testkit::ca::TestCa;
use mantlet_testkit::programs::program;
use mantlet_xds::server::StreamEvent;
use mantlet_xds::{Dialect, Options, ResourceSet, ResourceType};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use tokio::time::timeout;

use launch::{Running, ports};

/// HS256 over `{"iss":"issuer","sub":"user","aud":["a","b"],"scope":"read write","nested":{"role":["admin",2]},"n":7}`.
const TOKEN: &str = "eyJhbGciOiJIUzI1NiIsImtpZCI6ImsiLCJ0eXAiOiJKV1QifQ.eyJpc3MiOiJpc3N1ZXIiLCJzdWIiOiJ1c2VyIiwiYXVkIjpbImEiLCJiIl0sInNjb3BlIjoicmVhZCB3cml0ZSIsIm5lc3RlZCI6eyJyb2xlIjpbImFkbWluIiwyXX0sIm4iOjd9.DdzgVG94AvKDwmfMn8xiE5gP77UNzQozOcDWSiHwiwE";
const JWKS: &str =
    r#"{"keys":[{"kty":"oct","alg":"HS256","kid":"k","k":"bWFudGxldC10ZXN0LWtleS1tYW50bGV0LXRlc3Qta2V5"}]}"#;

/// One request, as sent by curl and as the engine sees it.
#[derive(Clone, Debug)]
struct Request {
    /// Namespace and service account of the client's certificate; plaintext without.
    peer: Option<(&'static str, &'static str)>,
    source: &'static str,
    method: &'static str,
    authority: &'static str,
    path: &'static str,
    query: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    token: bool,
    claims: serde_json::Value,
}

impl HttpView for Request {
    fn method(&self) -> &str {
        self.method
    }
    fn authority(&self) -> &str {
        self.authority
    }
    fn path(&self) -> &str {
        self.path
    }
    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.headers.iter().any(|(n, v)| *n == name && f(v.as_bytes()))
    }
    fn claims(&self) -> Option<&serde_json::Value> {
        self.token.then_some(&self.claims)
    }
}

const PEERS: [(&str, &str); 3] = [("a", "x"), ("a", "y"), ("ab", "x")];
/// What Envoy subscribes to.
const ENVOYS_TYPES: [ResourceType; 5] = [
    ResourceType::Cluster,
    ResourceType::Endpoints,
    ResourceType::Listener,
    ResourceType::Routes,
    ResourceType::Secret,
];
const SNI: &str = "web.example.com";

fn request() -> impl Strategy<Value = Request> {
    let select = |values: &'static [&'static str]| prop::sample::select(values);
    let headers = prop::sample::select(vec![
        vec![],
        vec![("x-role", "admin")],
        vec![("x-role", "user"), ("x-role", "admin")],
        vec![("x-role", "user,admin")],
        vec![("x-role", "")],
    ]);
    (
        prop::option::weighted(0.7, prop::sample::select(&PEERS[..])),
        select(&["127.0.0.1", "127.0.1.2", "127.0.2.3"]),
        select(&["GET", "POST", "PUT"]),
        select(&["web", "WEB", "web:80", "api.example.com"]),
        select(&["/", "/a", "/a/b", "/a/b/c", "/a//b", "/admin", "/Admin", "/api/v1/x.png", "/a/*", "/a/b;c=d", "/a/%2a", "/a/b%22c", "/a/b%7Cc/d"]),
        select(&["", "", "?x=1", "?/a"]),
        headers,
        any::<bool>(),
    )
        .prop_map(|(peer, source, method, authority, path, query, headers, token)| Request {
            peer,
            source,
            method,
            authority,
            path,
            query,
            headers,
            token,
            claims: serde_json::json!({
                "iss": "issuer", "sub": "user", "aud": ["a", "b"], "scope": "read write", "nested": {"role": ["admin", 2]}, "n": 7
            }),
        })
}

/// Atoms of every kind in the world of [`request`].
fn atoms(port: u16) -> Vec<Atom> {
    let exact = |s: &str| Matcher::Exact(s.into());
    let prefix = |s: &str| Matcher::Prefix(s.into());
    let suffix = |s: &str| Matcher::Suffix(s.into());
    let glob = |s: &str| Matcher::Glob(s.into());
    let regex = |s: &str| Matcher::Regex(s.into());
    let template = |s: &str| Matcher::Template(s.into());
    let cidr = |s: &str| Matcher::Cidr(s.parse().unwrap());
    let claim = |path: &[&str]| Attribute::Claim(path.iter().map(|s| s.to_string()).collect());
    let role = || Attribute::Header("x-role".into());
    [
        (Attribute::PeerUri, exact("spiffe://cluster.local/ns/a/sa/x")),
        (Attribute::PeerUri, prefix("spiffe://cluster.local/ns/a/")),
        (Attribute::PeerUri, suffix("/sa/x")),
        (Attribute::PeerUri, Matcher::Present),
        (Attribute::PeerUri, regex("spiffe://.*/ns/(a|c)/sa/.*")),
        (Attribute::PeerNamespace, exact("a")),
        (Attribute::PeerNamespace, glob("a*")),
        (Attribute::PeerNamespace, glob("*b")),
        (Attribute::PeerNamespace, glob("*")),
        (Attribute::PeerServiceAccount, exact("a/y")),
        (Attribute::PeerTrustDomain, exact("cluster.local")),
        (Attribute::PeerTrustDomain, glob("*.local")),
        (Attribute::PeerTrustDomain, glob("x*")),
        (Attribute::PeerTrustDomain, glob("*")),
        (Attribute::SourceIp, cidr("127.0.0.0/24")),
        (Attribute::SourceIp, cidr("127.0.1.2/32")),
        (Attribute::RemoteIp, cidr("127.0.0.0/23")),
        (Attribute::DestinationIp, cidr("127.0.0.0/8")),
        (Attribute::DestinationIp, cidr("10.0.0.0/8")),
        (Attribute::DestinationPort, Matcher::Port(port)),
        (Attribute::DestinationPort, Matcher::Port(1)),
        (Attribute::Sni, exact(SNI)),
        (Attribute::Sni, suffix(".org")),
        (Attribute::Sni, Matcher::Present),
        (Attribute::Host, exact("web")),
        (Attribute::Host, prefix("we")),
        (Attribute::Host, suffix(".COM")),
        (Attribute::Host, Matcher::Present),
        (Attribute::Host, regex("w.*")),
        (Attribute::Method, exact("GET")),
        (Attribute::Method, prefix("P")),
        (Attribute::Method, Matcher::Present),
        (Attribute::Path, exact("/a/b")),
        (Attribute::Path, prefix("/a")),
        (Attribute::Path, suffix(".png")),
        (Attribute::Path, Matcher::Present),
        (Attribute::Path, regex("/[aA].*")),
        (Attribute::Path, template("/a/{*}")),
        (Attribute::Path, template("/a/{**}")),
        (Attribute::Path, template("/{*}/b")),
        (Attribute::Path, template("/api/{*}/{**}.png")),
        (role(), exact("admin")),
        (role(), prefix("us")),
        (role(), suffix("admin")),
        (role(), Matcher::Present),
        (role(), exact("")),
        (role(), regex("a.*")),
        (Attribute::Header(":authority".into()), exact("WEB")),
        (claim(&["iss"]), exact("issuer")),
        (claim(&["sub"]), Matcher::Present),
        (claim(&["aud"]), exact("b")),
        (claim(&["aud"]), suffix("z")),
        (claim(&["scope"]), exact("write")),
        (claim(&["nested", "role"]), prefix("adm")),
        (claim(&["n"]), exact("7")),
        (claim(&["missing"]), Matcher::Present),
        (
            Attribute::Metadata("envoy.filters.x".into(), "k".into()),
            Matcher::Present,
        ),
    ]
    .map(|(attribute, matcher)| Atom { attribute, matcher })
    .into()
}

fn expr(port: u16) -> impl Strategy<Value = Expr> {
    let atom = prop::sample::select(atoms(port)).prop_map(Expr::Atom);
    let field = (prop::collection::vec(atom, 1..3), prop::bool::weighted(0.25))
        .prop_map(|(values, not)| if not { Expr::Or(values).not() } else { Expr::Or(values) });
    let branch = prop::collection::vec(field, 1..3).prop_map(Expr::And);
    prop::collection::vec(prop::collection::vec(branch, 1..3).prop_map(Expr::Or), 1..3).prop_map(Expr::And)
}

/// One filter set per listener: first every atom alone, then mixtures.
fn filter_sets(ports: &[u16]) -> Vec<Vec<AuthzFilter>> {
    let mut runner = TestRunner::deterministic();
    let filter = |action, exprs: Vec<Expr>| AuthzFilter {
        action,
        enforced: true,
        rules: exprs
            .into_iter()
            .enumerate()
            .map(|(n, expr)| Rule {
                id: format!("ns[foo]-policy[{action:?} p]-rule[{n}]"),
                expr,
            })
            .collect(),
        shadow: vec![],
    };
    let mut out = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let atoms = atoms(*port);
        if let Some(atom) = atoms.get(index) {
            out.push(vec![filter(Action::Allow, vec![Expr::Atom(atom.clone())])]);
            continue;
        }
        let mut some = |max| {
            prop::collection::vec(expr(*port), 0..max)
                .new_tree(&mut runner)
                .unwrap()
                .current()
        };
        let (log, deny, allow) = (some(2), some(2), some(5));
        let mut shadowed = filter(Action::Allow, allow);
        shadowed.shadow = filter(Action::Allow, some(2)).rules;
        out.push(vec![filter(Action::Log, log), filter(Action::Deny, deny), shadowed]);
    }
    out
}

fn http(authz: Vec<AuthzFilter>, log: &Path) -> HttpManager {
    let route = Route {
        name: "ok".into(),
        matches: RouteMatch::default(),
        action: RouteAction::Respond {
            status: 200,
            body: "ok".into(),
        },
        decorator: "test/*".into(),
        request_headers: vec![],
        response_headers: vec![],
    };
    HttpManager {
        stat_prefix: "inbound_0.0.0.0_80".into(),
        codec: Codec::Auto,
        routes: RouteSource::Inline(Box::new(RouteTable {
            name: "inbound|80||".into(),
            hosts: vec![Arc::new(VirtualHost {
                name: "inbound|http|80".into(),
                domains: vec!["*".into()],
                routes: vec![route],
                attempt_count: false,
            })],
            ignore_port_in_host: false,
            on_demand: false,
        })),
        normalization: PathNormalization::Base,
        forwarded_client_cert: ForwardedClientCert::AppendForward,
        use_remote_address: false,
        trusted_hops: 0,
        server_name: "istio-envoy".into(),
        generate_request_id: true,
        websocket: true,
        stream_idle_timeout_ms: 0,
        jwt: Some(JwtAuthn {
            providers: vec![JwtProvider {
                name: "origins-0".into(),
                issuer: "issuer".into(),
                audiences: vec![],
                jwks: JWKS.into(),
                from_headers: vec![("authorization".into(), "Bearer ".into())],
                from_params: vec![],
                from_cookies: vec![],
                forward: false,
                payload_header: None,
                claim_headers: vec![],
                space_delimited: vec![],
                clear_route_cache: false,
            }],
        }),
        custom: Vec::new(),
        authz,
        istio_alpn: true,
        telemetry: Some(Reporter::Destination),
        access_log: Some(AccessLog {
            path: log.display().to_string(),
            format: "%RESPONSE_CODE% %RESPONSE_CODE_DETAILS%\n".into(),
            json: vec![],
        }),
    }
}

fn listener(name: String, port: u16, authz: Vec<AuthzFilter>, log: &Path) -> Listener {
    let mtls = ServerTls {
        certificate: "default".into(),
        trust_bundle: Some("ROOTCA".into()),
        client_sans: vec![SanMatch::Prefix("spiffe://cluster.local/".into())],
        require_client_certificate: true,
        alpn: vec!["h2".into(), "http/1.1".into()],
        min_version: TlsVersion::V1_2,
        ciphers: vec![],
    };
    let chain = |name: &str, transport, tls| FilterChain {
        name: name.into(),
        matches: ChainMatch {
            transport: Some(transport),
            ..ChainMatch::default()
        },
        tls,
        filters: Filters::Http(Box::new(http(authz.clone(), log))),
    };
    Listener {
        name,
        address: ([127, 0, 0, 1], port).into(),
        bind_to_port: true,
        use_original_dst: false,
        direction: Direction::Inbound,
        chains: vec![
            chain("mtls", Transport::Tls, Some(mtls)),
            chain("plain", Transport::Raw, None),
        ],
        default_chain: None,
        tls_inspector: Inspector::Except(vec![9, 11]),
        http_inspector: Inspector::Except(vec![]),
        detection_timeout_ms: 0,
        access_log: None,
    }
}

/// What a sidecar would hold besides: outbound listeners by RDS, auto mTLS clusters by EDS, TCP chains.
fn outbound(snapshot: &mut ProxySnapshot, port: u16) {
    let host = "web.default.svc.cluster.local";
    let cluster_name = format!("outbound|80||{host}");
    let tls = ClientTls {
        certificate: Some("default".into()),
        trust_bundle: Some("ROOTCA".into()),
        server_sans: vec![SanMatch::Exact("spiffe://cluster.local/ns/default/sa/web".into())],
        sni: format!("outbound_.80_._.{host}"),
        alpn: vec!["istio-peer-exchange".into(), "istio".into()],
        min_version: TlsVersion::V1_2,
    };
    let cluster = |name: &str, discovery, balancer, tls| Cluster {
        name: name.into(),
        discovery,
        connect_timeout_ms: 10_000,
        balancer,
        tls,
        protocol: UpstreamProtocol::Downstream,
        bind_source: None,
        limits: Limits::default(),
        outlier: Some(Outlier {
            consecutive_5xx: 5,
            consecutive_gateway_errors: 0,
            interval_ms: 10_000,
            base_ejection_ms: 30_000,
            max_ejection_percent: 10,
        }),
        services: vec![ServiceRef {
            host: host.into(),
            name: "web".into(),
            namespace: "default".into(),
        }],
        alpn_override: false,
    };
    let eds = Discovery::Eds {
        service: cluster_name.clone(),
    };
    let mesh = cluster(
        &cluster_name,
        eds,
        Balancer::LeastRequest,
        ClusterTls::Auto(Box::new(tls.clone())),
    );
    let mut inbound = cluster(
        "inbound|80||",
        Discovery::OriginalDestination { port: None },
        Balancer::Provided,
        ClusterTls::Plain,
    );
    inbound.bind_source = Some([127, 0, 0, 6].into());
    inbound.protocol = UpstreamProtocol::Http1;
    let endpoint = Endpoint {
        address: "10.244.0.9".into(),
        port: 8080,
        weight: 3,
        health: Health::Healthy,
        mtls: true,
        mantlet: true,
        workload: Some(Arc::new(WorkloadRef {
            name: "web-v1".into(),
            namespace: "default".into(),
            canonical_name: "web".into(),
            canonical_revision: "v1".into(),
            cluster: "Kubernetes".into(),
        })),
    };
    let fixed = cluster(
        "fixed",
        Discovery::Static(vec![endpoint.clone()]),
        Balancer::RoundRobin,
        ClusterTls::Always(Box::new(tls)),
    );
    let mut dns_endpoint = endpoint.clone();
    dns_endpoint.address = "localhost".into();
    let mut dns = cluster(
        "dns",
        Discovery::Dns(vec![dns_endpoint]),
        Balancer::Random,
        ClusterTls::Plain,
    );
    dns.protocol = UpstreamProtocol::Http2;
    for cluster in [mesh, inbound, fixed, dns] {
        snapshot.clusters.insert(cluster.name.clone(), Arc::new(cluster));
    }
    let endpoints = Endpoints {
        cluster: cluster_name.clone(),
        endpoints: vec![endpoint],
    };
    snapshot.endpoints.insert(cluster_name.clone(), Arc::new(endpoints));

    let forward = |clusters| {
        RouteAction::Forward(Forward {
            clusters,
            prefix_rewrite: Some("/".into()),
            host_rewrite: Some("other".into()),
            timeout_ms: 0,
            retry: Some(Retry {
                on: "connect-failure,refused-stream,retriable-status-codes".into(),
                attempts: 2,
                per_try_timeout_ms: 1000,
                statuses: vec![503],
            }),
        })
    };
    let route = |path, action| Route {
        name: "default".into(),
        matches: RouteMatch {
            path,
            ..RouteMatch::default()
        },
        action,
        decorator: format!("{host}:80/*"),
        request_headers: vec![],
        response_headers: vec![],
    };
    let table = RouteTable {
        name: "80".into(),
        hosts: vec![Arc::new(VirtualHost {
            name: format!("{host}:80"),
            domains: vec![host.into(), "web".into(), "*.web".into()],
            routes: vec![
                route(
                    PathMatch::SegmentPrefix("/v2".into()),
                    forward(vec![(cluster_name.clone(), 100)]),
                ),
                route(
                    PathMatch::Regex("/[a-z]+".into()),
                    forward(vec![(cluster_name.clone(), 20), ("dns".into(), 80)]),
                ),
            ],
            attempt_count: true,
        })],
        ignore_port_in_host: true,
        on_demand: false,
    };
    snapshot.routes.insert(table.name.clone(), Arc::new(table));

    let mut rds = http(vec![], Path::new("/dev/null"));
    rds.routes = RouteSource::Named("80".into());
    rds.jwt = None;
    let chain = |name: &str, alpn: &[&str], filters| FilterChain {
        name: name.into(),
        matches: ChainMatch {
            application_protocols: alpn.iter().map(|s| s.to_string()).collect(),
            ..ChainMatch::default()
        },
        tls: None,
        filters,
    };
    let tcp = TcpManager {
        stat_prefix: "tcp".into(),
        custom: Vec::new(),
        authz: vec![AuthzFilter {
            action: Action::Deny,
            enforced: true,
            rules: vec![Rule {
                id: "r".into(),
                expr: Expr::atom(Attribute::SourceIp, Matcher::Cidr("10.0.0.0/8".parse().unwrap())),
            }],
            shadow: vec![],
        }],
        cluster: "inbound|80||".into(),
        idle_timeout_ms: Some(1000),
        telemetry: true,
    };
    let outbound = Listener {
        name: "0.0.0.0_80".into(),
        address: ([127, 0, 0, 1], port).into(),
        bind_to_port: false,
        use_original_dst: false,
        direction: Direction::Outbound,
        chains: vec![chain("http", &["http/1.1", "h2c"], Filters::Http(Box::new(rds)))],
        default_chain: Some(chain("tcp", &[], Filters::Tcp(tcp))),
        tls_inspector: Inspector::Off,
        http_inspector: Inspector::Except(vec![443]),
        detection_timeout_ms: 100,
        access_log: Some(AccessLog {
            path: "/dev/null".into(),
            format: String::new(),
            json: vec![("flags".into(), "%RESPONSE_FLAGS%".into())],
        }),
    };
    snapshot.listeners.insert(outbound.name.clone(), Arc::new(outbound));
}

/// Status code of a request; `Err` is curl's exit status.
fn send(request: &Request, port: u16, certificates: &Path) -> Result<u16, i32> {
    let mut curl = Command::new(program("curl"));
    curl.args([
        "-s",
        "-o",
        "/dev/null",
        "-w",
        "%{http_code}",
        "--max-time",
        "10",
        "--path-as-is",
        "--http1.1",
    ]);
    curl.args(["--interface", request.source, "-X", request.method]);
    curl.arg("-H").arg(format!("host: {}", request.authority));
    for (name, value) in &request.headers {
        // Curl sends an empty value only when written with a semicolon.
        let header = if value.is_empty() {
            format!("{name};")
        } else {
            format!("{name}: {value}")
        };
        curl.arg("-H").arg(header);
    }
    if request.token {
        curl.arg("-H").arg(format!("authorization: Bearer {TOKEN}"));
    }
    let url = |scheme: &str, host: &str| format!("{scheme}://{host}:{port}{}{}", request.path, request.query);
    match request.peer {
        None => curl.args(["-g", &url("http", "127.0.0.1")]),
        Some((ns, sa)) => {
            let dir = certificates.join(format!("{ns}-{sa}"));
            curl.args(["-k", "--resolve", &format!("{SNI}:{port}:127.0.0.1")]);
            curl.arg("--cert")
                .arg(dir.join("cert-chain.pem"))
                .arg("--key")
                .arg(dir.join("key.pem"));
            curl.args(["-g", &url("https", SNI)])
        }
    };
    let out = curl.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    match out.status.code() {
        Some(0) => Ok(text.trim().parse().unwrap()),
        code => Err(code.unwrap_or(-1)),
    }
}

async fn run(delta: bool, listeners: usize, requests: usize) {
    let dir = tempfile::tempdir().unwrap();
    let ca = TestCa::new("cluster.local");
    for (ns, sa) in PEERS {
        let peer = dir.path().join(format!("{ns}-{sa}"));
        fs::create_dir(&peer).unwrap();
        ca.workload(ns, sa).write_to(&peer);
    }
    let own = ca.workload("foo", "server");
    let secrets = [
        Secret {
            name: "default".into(),
            value: SecretValue::KeyPair {
                chain: own.response[..own.response.len() - 1].concat().into_bytes(),
                key: KeyBytes::new(own.key.to_pem().as_bytes().to_vec()),
            },
        },
        Secret {
            name: "ROOTCA".into(),
            value: SecretValue::TrustBundle(ca.root_pem().into_bytes()),
        },
    ];

    let ports = ports(listeners + 1);
    let sets = filter_sets(&ports[..listeners]);
    let log = |index: usize| dir.path().join(format!("access-{index}.log"));
    let mut snapshot = ProxySnapshot::default();
    for (index, (authz, port)) in sets.iter().zip(&ports).enumerate() {
        let listener = listener(format!("l{index}"), *port, authz.clone(), &log(index));
        snapshot.listeners.insert(listener.name.clone(), Arc::new(listener));
    }
    outbound(&mut snapshot, ports[listeners]);
    assert_eq!(snapshot.dangling(), vec![]);
    let options = Options::new(Dialect::PlainEnvoy);
    let secrets: Vec<_> = secrets.into_iter().map(Arc::new).collect();
    let set = ResourceSet::new(&snapshot, secrets.clone(), &options, None);

    let mut running = Running::start(dir.path(), set, delta).await;
    running.all_accepted(&ENVOYS_TYPES).await;

    let mut runner = TestRunner::deterministic();
    let mut count = [0, 0];
    let mut details: Vec<Vec<String>> = Vec::new();
    for (authz, port) in sets.iter().zip(&ports) {
        let engine = Engine::new(authz);
        let mut expected_details = Vec::new();
        // A listener answers over mTLS once its secrets are there. The first request is thrown away.
        let mut first = request().new_tree(&mut runner).unwrap().current();
        first.peer = Some(PEERS[0]);
        let up = || async { send(&first, *port, dir.path()) };
        mantlet_testkit::wait::eventually("listener", Duration::from_secs(20), up).await;
        for _ in 0..requests {
            let request = request().new_tree(&mut runner).unwrap().current();
            let uris: Vec<String> = request
                .peer
                .iter()
                .map(|(ns, sa)| format!("spiffe://cluster.local/ns/{ns}/sa/{sa}"))
                .collect();
            let source: IpAddr = request.source.parse().unwrap();
            let connection = Connection {
                peer_uris: &uris,
                source,
                remote: source,
                destination: ([127, 0, 0, 1], *port).into(),
                sni: request.peer.map(|_| SNI),
            };
            let decision = engine.decide(&connection, Some(&request));
            let allowed = decision.verdict == Verdict::Allowed;
            let expected = if allowed { 200 } else { 403 };
            let got = send(&request, *port, dir.path());
            assert_eq!(got, Ok(expected), "{authz:#?}\n{request:#?}\n{decision:?}");
            expected_details.push(decision.details().unwrap_or_else(|| "direct_response".into()));
            count[usize::from(allowed)] += 1;
        }
        details.push(expected_details);
    }
    println!("delta {delta}: {} denied, {} allowed", count[0], count[1]);
    assert!(
        count.iter().all(|n| n * 10 > requests * listeners),
        "{count:?}: too one-sided to tell"
    );

    // One listener goes, one changes: only that is sent, and accepted.
    snapshot.listeners.remove("l0");
    let changed = listener("l1".into(), ports[1], vec![], &log(1));
    snapshot.listeners.insert("l1".into(), Arc::new(changed));
    let next = ResourceSet::new(&snapshot, secrets, &options, None);
    running.resources.send(Arc::new(next)).unwrap();
    loop {
        match timeout(Duration::from_secs(20), running.events.recv())
            .await
            .unwrap()
            .unwrap()
        {
            StreamEvent::Acked {
                kind: ResourceType::Listener,
                ..
            } => break,
            StreamEvent::Sent {
                kind: ResourceType::Listener,
                resources,
                ..
            } => {
                assert_eq!(resources, if delta { 1 } else { snapshot.listeners.len() });
            }
            StreamEvent::Nacked { kind, message, .. } => panic!("Envoy refused {kind}: {message}"),
            _ => {}
        }
    }
    let request = request().new_tree(&mut runner).unwrap().current();
    mantlet_testkit::wait::eventually("policies are gone", Duration::from_secs(10), || async {
        match send(&request, ports[1], dir.path()) {
            Ok(200) => Ok(()),
            other => Err(other),
        }
    })
    .await;

    // Envoy writes its logs out when it ends.
    running.stop();
    for (index, expected) in details.iter().enumerate().skip(2) {
        let written = fs::read_to_string(log(index)).unwrap();
        // A rule that mixes both sides is several policies for Envoy: `id#1` is the second one of `id`.
        let without_part = |id: &str| match id.split_once('#') {
            Some((id, _)) => format!("{id}]"),
            None => id.to_string(),
        };
        let written: Vec<String> = written
            .lines()
            .map(|l| without_part(l.split_once(' ').unwrap().1))
            .collect();
        assert_eq!(written[1..], expected[..], "{:#?}", sets[index]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_decides_as_the_engine_does() {
    run(false, 72, 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_accepts_incremental_updates() {
    run(true, 3, 10).await;
}
