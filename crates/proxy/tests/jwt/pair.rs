//! One Envoy and one proxy with the same listeners, and requests as bytes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::service::discovery::v3::DiscoveryResponse;
use http::Response;
use http_body_util::Full;
use mantlet_model::authz::AuthzFilter;
use mantlet_model::http::{JwtAuthn, RouteSource};
use mantlet_model::listener::{ChainMatch, FilterChain, Filters};
use mantlet_model::names::Direction;
use mantlet_model::route::RouteTable;
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_testkit::{ChildGuard, EchoServer, Recorded};
use mantlet_xds::encode::{self, Dialect, Options};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::common::{Proxy, edge, forward_to, http_manager, table};

/// A request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub method: &'static str,
    pub target: String,
    pub headers: Vec<(String, String)>,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub status: u16,
    /// Of answers that are not the application's.
    pub body: String,
    pub challenge: Option<String>,
    /// What the application saw: target, and the headers that matter here.
    pub upstream: Option<(String, Vec<(String, String)>)>,
}

/// Both programs.
pub(crate) struct Pair {
    envoy: Vec<SocketAddr>,
    ours: Vec<SocketAddr>,
    child: ChildGuard,
    _proxy: Proxy,
    _app: EchoServer,
    _dir: tempfile::TempDir,
}

/// Tells what it was asked, as JSON.
fn tell(request: &Recorded) -> Response<Full<Bytes>> {
    let seen = |name: &str| {
        name.starts_with("x-o-")
            || matches!(
                name,
                "authorization" | "cookie" | "x-jwt" | "x-a" | "x-b" | "x-one" | "x-two"
            )
    };
    // Names in one order; values of a name as they came.
    let mut headers: Vec<(String, String)> = request
        .headers
        .iter()
        .filter(|(name, _)| seen(name.as_str()))
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    headers.sort_by(|a, b| a.0.cmp(&b.0));
    let body = serde_json::json!([request.path, headers]).to_string();
    Response::new(Full::new(Bytes::from(body)))
}

pub(crate) fn snapshot(
    addresses: &[SocketAddr],
    plans: &[Option<JwtAuthn>],
    app: SocketAddr,
    authz: Vec<AuthzFilter>,
    routes: Option<&RouteTable>,
) -> ProxySnapshot {
    let mut out = ProxySnapshot::default();
    let upstream = edge::app_cluster("app", app);
    out.clusters.insert("app".into(), Arc::new(upstream));
    for (index, (address, plan)) in addresses.iter().zip(plans).enumerate() {
        let plain = || table("inbound", &["*"], forward_to("app", None));
        let routes = RouteSource::Inline(Box::new(routes.cloned().unwrap_or_else(plain)));
        let mut manager = http_manager(routes, true, authz.clone());
        manager.jwt = plan.clone();
        let chain = FilterChain {
            name: "http".into(),
            matches: ChainMatch::default(),
            tls: None,
            filters: Filters::Http(Box::new(manager)),
        };
        let listener = edge::listener(&format!("l{index}"), *address, Direction::Inbound, false, vec![chain]);
        out.listeners.insert(listener.name.clone(), Arc::new(listener));
    }
    out
}

fn write_response(dir: &Path, name: &str, resources: Vec<mantlet_xds::Any>) {
    let type_url = resources.first().map(|any| any.type_url.clone()).unwrap_or_default();
    let response = DiscoveryResponse {
        version_info: "1".into(),
        resources,
        type_url,
        ..DiscoveryResponse::default()
    };
    std::fs::write(dir.join(name), response.encode_to_vec()).unwrap();
}

impl Pair {
    /// One listener per plan, in both programs.
    pub(crate) async fn start(plans: Vec<JwtAuthn>) -> Pair {
        Self::with_routes(plans, None).await
    }

    /// The same, with other routes than one to the application.
    pub(crate) async fn with_routes(plans: Vec<JwtAuthn>, routes: Option<&RouteTable>) -> Pair {
        let plans: Vec<_> = plans.into_iter().map(Some).collect();
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = EchoServer::on(socket, None, tell);
        let [envoy, ours] = [addresses(plans.len()), addresses(plans.len())];

        let proxy = Proxy::start("web", 1);
        proxy
            .apply(snapshot(&ours, &plans, app.address(), vec![], routes))
            .await;

        let dir = tempfile::tempdir().unwrap();
        let options = Options::new(Dialect::PlainEnvoy);
        let theirs = snapshot(&envoy, &plans, app.address(), vec![], routes);
        let listeners = theirs.listeners.values().map(|l| encode::listener(l, &options));
        write_response(dir.path(), "lds.pb", listeners.collect());
        let clusters = theirs.clusters.values().map(|c| encode::cluster(c, &options));
        write_response(dir.path(), "cds.pb", clusters.collect());
        let source = |name: &str| {
            serde_json::json!({
                "path_config_source": {"path": dir.path().join(name)}, "resource_api_version": "V3"
            })
        };
        let bootstrap = serde_json::json!({
            "node": {"id": "test", "cluster": "test"},
            "dynamic_resources": {"lds_config": source("lds.pb"), "cds_config": source("cds.pb")},
        });
        let config = dir.path().join("envoy.json");
        std::fs::write(&config, bootstrap.to_string()).unwrap();
        let log = dir.path().join("envoy.log");
        let child = Command::new(mantlet_testkit::envoy())
            .arg("-c")
            .arg(&config)
            .args(["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"])
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut child = ChildGuard::new(child);
        let ready = async {
            for address in &envoy {
                while TcpStream::connect(address).await.is_err() {
                    if let Some(status) = child.exited() {
                        panic!("Envoy ended with {status}: {}", std::fs::read_to_string(&log).unwrap());
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        };
        if tokio::time::timeout(Duration::from_secs(90), ready).await.is_err() {
            panic!(
                "Envoy does not listen; it says: {}",
                std::fs::read_to_string(&log).unwrap()
            );
        }
        Pair {
            envoy,
            ours,
            child,
            _proxy: proxy,
            _app: app,
            _dir: dir,
        }
    }

    pub(crate) async fn envoy(&self, index: usize, request: &Request) -> Outcome {
        exchange(self.envoy[index], request).await
    }

    pub(crate) async fn ours(&self, index: usize, request: &Request) -> Outcome {
        exchange(self.ours[index], request).await
    }

    pub(crate) fn stop(self) {
        self.child.signal(nix::sys::signal::Signal::SIGTERM);
    }
}

/// Addresses of their own, on which no client's port can be.
fn addresses(count: usize) -> Vec<SocketAddr> {
    let held: Vec<std::net::TcpListener> = (0..count)
        .map(|_| {
            let host = [
                127,
                64 + rand::random::<u8>() % 64,
                rand::random(),
                1 + rand::random::<u8>() % 250,
            ];
            std::net::TcpListener::bind(SocketAddr::from((host, 0))).unwrap()
        })
        .collect();
    held.iter().map(|l| l.local_addr().unwrap()).collect()
}

/// Only this proxy.
pub(crate) async fn alone(plan: Option<JwtAuthn>) -> (Proxy, EchoServer, SocketAddr) {
    alone_with(plan, vec![]).await
}

/// Only this proxy, with authorization.
pub(crate) async fn alone_with(plan: Option<JwtAuthn>, authz: Vec<AuthzFilter>) -> (Proxy, EchoServer, SocketAddr) {
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = EchoServer::on(socket, None, tell);
    let address = addresses(1)[0];
    let proxy = Proxy::start("web", 1);
    proxy
        .apply(snapshot(&[address], &[plan], app.address(), authz, None))
        .await;
    (proxy, app, address)
}

/// Sends a request as it is written and reads the answer.
pub(crate) async fn exchange(address: SocketAddr, request: &Request) -> Outcome {
    let mut text = format!(
        "{} {} HTTP/1.1\r\nhost: web.example\r\n",
        request.method, request.target
    );
    for (name, value) in &request.headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if !request
        .headers
        .iter()
        .any(|(n, _)| n.eq_ignore_ascii_case("connection"))
    {
        text.push_str("connection: close\r\n");
    }
    text.push_str("\r\n");
    let answer = tokio::time::timeout(Duration::from_secs(60), async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        // Until the answer is whole: Envoy keeps the connection open for another second.
        let mut bytes = Vec::new();
        while !is_whole(&bytes) && stream.read_buf(&mut bytes).await.unwrap_or(0) > 0 {}
        bytes
    })
    .await
    .expect("an answer in time");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let mut lines = head.lines();
    let status = lines
        .next()
        .and_then(|l| l.split(' ').nth(1))
        .and_then(|s| s.parse().ok())
        .unwrap_or(0);
    let headers: BTreeMap<String, String> = lines
        .filter_map(|l| l.split_once(':'))
        .map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_string()))
        .collect();
    // Chunks of the application's answers are put together.
    let body = match headers.get("transfer-encoding") {
        Some(_) => dechunk(body),
        None => body.to_string(),
    };
    let upstream = serde_json::from_str(&body).ok().filter(|_| status == 200);
    Outcome {
        status,
        body: if upstream.is_some() { String::new() } else { body },
        challenge: headers.get("www-authenticate").cloned(),
        upstream,
    }
}

fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|l| l.strip_prefix("content-length:"));
    match length.and_then(|l| l.trim().parse::<usize>().ok()) {
        Some(length) => body.len() >= length,
        None => body.ends_with("0\r\n\r\n"),
    }
}

fn dechunk(mut text: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = text.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if size == 0 || rest.len() < size {
            break;
        }
        out.push_str(&rest[..size]);
        text = rest[size..].trim_start_matches("\r\n");
    }
    out
}
