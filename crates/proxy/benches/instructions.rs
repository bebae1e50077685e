//! Fixed work for `bench/instructions`, which counts the instructions that it takes: `instructions WORKLOAD TIMES`, or no
//! arguments for the names of the workloads. Each makes what it needs, does its work so many times, and checks what came out.

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use common::*;
use mantlet_identity::jws::{KeySet, Token};
use mantlet_identity::{ClientAuth, ClientTlsOptions, ExpectedServer, ServerTlsOptions, TlsIdentity, TrustDomainRule};
use mantlet_model::authz::{Action, Attribute, AuthzFilter, Engine, Expr, HttpSample, Matcher, Rule, Sample, Verdict};
use mantlet_model::cluster::UpstreamProtocol;
use mantlet_model::http::PathNormalization;
use mantlet_model::route::{CompiledRoutes, RouteRequest, RouteTable};
use mantlet_proxy::config::Config;
use mantlet_proxy::http::headers;
use mantlet_proxy::path;
use mantlet_proxy::worker::Tuning;
use mantlet_testkit::TestCa;
use mantlet_testkit::jwt::{Issuer, base64url};
use mantlet_xds::encode::{Dialect, Options};
use mantlet_xds::{decode, encode};
use rustls_pki_types::ServerName;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The program's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Work = fn(u32);

const WORKLOADS: [(&str, Work); 10] = [
    ("path", normalize_paths),
    ("framing", check_framing),
    ("route", route),
    ("authorize", authorize),
    ("token", verify_token),
    ("xds", decode_listener),
    ("config", compile_configuration),
    ("handshake", handshake),
    ("request", request),
    ("bulk", bulk),
];

/// Rules of the filters.
const RULES: usize = 100;
/// Bytes of an answer of [`bulk`].
const BULK: usize = 256 << 10;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match arguments.as_slice() {
        [] => WORKLOADS.iter().for_each(|(name, _)| println!("{name}")),
        [name, times] => {
            let (_, work) = WORKLOADS.iter().find(|(n, _)| n == name).expect("a workload's name");
            work(times.parse().expect("a number"));
        }
        _ => panic!("usage: instructions [WORKLOAD TIMES]"),
    }
}

fn normalize_paths(times: u32) {
    let cases = [
        ("/api/v1/customers/4711", "/api/v1/customers/4711"),
        ("/a/./b/../c", "/a/c"),
        ("//a//b%2Fc", "/a/b/c"),
        ("/caf%c3%a9/%41", "/caf%C3%A9/A"),
    ];
    for _ in 0..times {
        for (path, want) in cases {
            let got = path::normalize(black_box(path), PathNormalization::DecodeAndMergeSlashes).expect("a good path");
            assert!(got.eq_ignore_ascii_case(want), "{path}: {got}");
        }
    }
}

fn parts() -> http::request::Parts {
    let request = http::Request::builder()
        .method("POST")
        .uri("/api/v1/customers?limit=10")
        .header("host", HOST)
        .header("user-agent", "curl/8")
        .header("accept", "*/*")
        .header("content-length", "12")
        .header("connection", "keep-alive, x-hop")
        .header("x-hop", "1")
        .header("x-request-id", "0a1b2c3d-0000-4000-8000-000000000000");
    request.body(()).expect("a good request").into_parts().0
}

fn check_framing(times: u32) {
    let good = parts();
    let mut bad = parts();
    bad.headers
        .insert("transfer-encoding", http::HeaderValue::from_static("chunked"));
    for _ in 0..times {
        assert!(headers::check(black_box(&good)).is_ok());
        assert!(headers::check(black_box(&bad)).is_err());
        let mut forwarded = good.headers.clone();
        headers::strip_hop_by_hop(&mut forwarded, false);
        assert!(!forwarded.contains_key("x-hop"));
        assert!(headers::authority(&good).is_some() && headers::upgrade(&good).is_none());
    }
}

struct Asked {
    authority: String,
}

impl RouteRequest for Asked {
    fn authority(&self) -> &str {
        &self.authority
    }
    fn path(&self) -> &str {
        "/api/v1"
    }
    fn query(&self) -> Option<&str> {
        None
    }
    fn header(&self, _: &str) -> Vec<&str> {
        Vec::new()
    }
}

fn host(number: usize) -> String {
    format!("service-{number}.default.svc.cluster.local")
}

fn route(times: u32) {
    let mut whole: Option<RouteTable> = None;
    for number in 0..RULES {
        let one = table(
            "80",
            &[&host(number), &format!("{}:80", host(number))],
            forward_to("outbound|80||web", None),
        );
        match &mut whole {
            Some(whole) => whole.hosts.extend(one.hosts),
            None => whole = Some(one),
        }
    }
    let routes = CompiledRoutes::new(Arc::new(whole.expect("a table")));
    let hit = Asked { authority: host(50) };
    let miss = Asked {
        authority: "elsewhere.example.com".into(),
    };
    for _ in 0..times {
        assert!(routes.select(black_box(&hit)).is_some());
        assert!(routes.select(black_box(&miss)).is_none());
    }
}

/// The one in the middle admits the tests' client.
fn rules() -> Vec<AuthzFilter> {
    let rule = |number: usize| {
        let team = format!("spiffe://cluster.local/ns/team-{number}/sa/app");
        let (caller, path) = match number == RULES / 2 {
            true => (CLIENT_SA.to_owned(), "/".to_owned()),
            false => (team, format!("/team-{number}/")),
        };
        Rule {
            id: format!("ns[default]-policy[allow]-rule[{number}]"),
            expr: Expr::And(vec![
                Expr::atom(Attribute::PeerUri, Matcher::Exact(caller)),
                Expr::atom(Attribute::Path, Matcher::Prefix(path)),
            ]),
        }
    };
    vec![AuthzFilter {
        action: Action::Allow,
        enforced: true,
        rules: (0..RULES).map(rule).collect(),
        shadow: Vec::new(),
    }]
}

fn authorize(times: u32) {
    let engine = Engine::new(&rules());
    let from = |peer: &str| Sample {
        peer: vec![peer.to_owned()],
        http: Some(HttpSample {
            host: HOST.to_owned(),
            path: "/api/v1".to_owned(),
            ..HttpSample::default()
        }),
        ..Sample::default()
    };
    let cases = [
        (from(CLIENT_SA), Verdict::Allowed),
        (from("spiffe://cluster.local/ns/team-7/sa/app"), Verdict::Denied),
    ];
    for _ in 0..times {
        for (sample, verdict) in &cases {
            let (connection, view) = (sample.connection(), sample.view());
            assert_eq!(engine.decide(black_box(&connection), black_box(view)).verdict, *verdict);
        }
    }
}

fn verify_token(times: u32) {
    let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key");
    let (x, y) = key.public_key().as_ref()[1..].split_at(32);
    let jwk = json!({"kty": "EC", "crv": "P-256", "x": base64url(x), "y": base64url(y)});
    let keys = KeySet::parse(Issuer::jwks(&[jwk]).as_bytes()).expect("keys");
    let claims = json!({"iss": "issuer", "sub": "me", "aud": ["a"], "exp": 4_000_000_000_u64});
    let signed = format!("{}.{}", base64url(r#"{"alg":"ES256"}"#), base64url(claims.to_string()));
    let signature = key.sign(&SystemRandom::new(), signed.as_bytes()).expect("a signature");
    let text = format!("{signed}.{}", base64url(signature));
    for _ in 0..times {
        let token = Token::parse(black_box(&text)).expect("a token");
        token.verify(&keys).expect("a good signature");
        token.check_time(1_900_000_000).expect("in time");
    }
}

fn inbound() -> Inbound {
    Inbound {
        listen: SocketAddr::from(([127, 0, 0, 1], 15006)),
        app: SocketAddr::from(([127, 0, 0, 1], 8080)),
        port: Port::Http,
        mode: Mode::Strict,
        authz: rules(),
        protocol: UpstreamProtocol::Http1,
    }
}

fn decode_listener(times: u32) {
    let snapshot = inbound().snapshot();
    let listener = snapshot.listeners.values().next().expect("a listener");
    let any = encode::listener(listener, &Options::new(Dialect::Istio));
    for _ in 0..times {
        let back = decode::listener(black_box(&any)).expect("a listener");
        assert_eq!(back.chains.len(), listener.chains.len());
    }
}

fn compile_configuration(times: u32) {
    let snapshot = Arc::new(inbound().snapshot());
    for _ in 0..times {
        let config = Config::compile(black_box(snapshot.clone()), 1, &Default::default()).expect("a configuration");
        assert_eq!(config.listeners.len(), 1);
    }
}

/// A mutual handshake in memory, both ends.
fn handshake(times: u32) {
    let ca = TestCa::new("cluster.local");
    let identity = |account| -> TlsIdentity { ca.workload("default", account).identity };
    let client = identity("sleep")
        .client(&ClientTlsOptions {
            expected: ExpectedServer::from_names(vec![SERVER_SA.to_owned()]),
            alpn: vec![b"h2".to_vec()],
            present_certificate: true,
            min_tls13: false,
        })
        .expect("a client");
    let server = identity("web")
        .server(&ServerTlsOptions {
            client_auth: ClientAuth::Required(TrustDomainRule::one_of(["cluster.local".parse().expect("a domain")])),
            alpn: vec![b"h2".to_vec()],
            min_tls13: false,
        })
        .expect("a server")
        .strict();
    for _ in 0..times {
        let name = ServerName::try_from(HOST).expect("a name");
        let mut client = rustls::ClientConnection::new(client.clone(), name).expect("a client");
        let mut server = rustls::ServerConnection::new(server.clone()).expect("a server");
        while client.is_handshaking() || server.is_handshaking() {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).expect("in memory");
            }
            let mut left = bytes.as_slice();
            while !left.is_empty() {
                server.read_tls(&mut left).expect("in memory");
                server.process_new_packets().expect("the client is admitted");
            }
            let mut bytes = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut bytes).expect("in memory");
            }
            let mut left = bytes.as_slice();
            while !left.is_empty() {
                client.read_tls(&mut left).expect("in memory");
                client.process_new_packets().expect("the server is admitted");
            }
        }
    }
}

/// Proxies with one worker each before an application in this thread, which answers every read with `answer`.
fn through_proxies<F: Future<Output = ()>>(answer: Vec<u8>, load: impl FnOnce(SocketAddr) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let app = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = app.local_addr().expect("an address");
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = app.accept().await {
                let answer = answer.clone();
                tokio::spawn(async move {
                    let mut request = [0; 16 * 1024];
                    while tcp.read(&mut request).await.is_ok_and(|n| n > 0) {
                        if tcp.write_all(&answer).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        // Under valgrind on a busy machine a handshake takes seconds.
        let tuning = Tuning {
            workers: 1,
            handshake_timeout: Duration::from_secs(600),
            ..Tuning::default()
        };
        let client = Proxy::tuned("sleep", tuning.clone());
        let server = Proxy::tuned("web", tuning);
        let mesh = Mesh::between(address, Port::Http, Mode::Strict, client, server).await;
        let inbound = Inbound {
            authz: rules(),
            ..mesh.inbound.clone()
        };
        mesh.server.apply(inbound.snapshot()).await;
        load(mesh.entry()).await;
    });
}

const REQUEST: &[u8] =
    b"GET /api/v1/customers HTTP/1.1\r\nhost: web.default.svc.cluster.local\r\nuser-agent: curl/8\r\n\
    accept: */*\r\n\r\n";

/// Sends one request and reads the answer, whose body has this length.
async fn exchange(tcp: &mut TcpStream, length: usize) {
    tcp.write_all(REQUEST).await.expect("the proxy reads");
    let mut answer = Vec::new();
    let mut chunk = vec![0; 64 << 10];
    loop {
        let count = tcp.read(&mut chunk).await.expect("the proxy answers");
        assert!(count > 0, "the proxy closed the connection");
        answer.extend_from_slice(&chunk[..count]);
        if let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") {
            assert!(
                answer.starts_with(b"HTTP/1.1 200"),
                "{}",
                String::from_utf8_lossy(&answer[..end])
            );
            if answer.len() >= end + 4 + length {
                return;
            }
        }
    }
}

fn answer(length: usize) -> Vec<u8> {
    let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").into_bytes();
    answer.resize(answer.len() + length, b'x');
    answer
}

/// A request over a kept connection through both proxies: everything on but the access log.
fn request(times: u32) {
    through_proxies(answer(128), |entry| async move {
        let mut tcp = TcpStream::connect(entry).await.expect("the proxy listens");
        for _ in 0..times {
            exchange(&mut tcp, 128).await;
        }
    });
}

/// A large answer over a kept connection.
fn bulk(times: u32) {
    through_proxies(answer(BULK), |entry| async move {
        let mut tcp = TcpStream::connect(entry).await.expect("the proxy listens");
        for _ in 0..times {
            exchange(&mut tcp, BULK).await;
        }
    });
}
