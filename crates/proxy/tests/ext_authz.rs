//! CUSTOM authorization over the wire: real providers over HTTP and gRPC, with and without mTLS, good, slow and hostile.

mod common;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::*;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue as Header, HeaderValueOption};
use envoy_types::pb::envoy::service::auth::v3::authorization_server::{Authorization, AuthorizationServer};
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::rpc::Status as RpcStatus;
use http::Response;
use http_body_util::Full;
use mantlet_model::authz::{Attribute, Expr, Matcher, Rule};
use mantlet_model::cluster::{ClusterTls, Discovery, UpstreamProtocol};
use mantlet_model::endpoint::{Endpoint, Health};
use mantlet_model::ext_authz::*;
use mantlet_model::listener::Filters;
use mantlet_model::names::{SECRET_DEFAULT, SECRET_ROOT, VIRTUAL_INBOUND};
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_model::tls::{ClientTls, SanMatch, TlsVersion};
use mantlet_testkit::{EchoServer, Recorded, TcpEcho};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const PROVIDER: &str = "outbound|8000||ext-authz.foo.svc.cluster.local";
const ID: &str = "istio-ext-authz-ext-authz-ns[default]-policy[ask]-rule[0]";

fn rule(expr: Expr) -> Vec<Rule> {
    vec![Rule { id: ID.into(), expr }]
}

fn path(prefix: &str) -> Expr {
    Expr::atom(Attribute::Path, Matcher::Prefix(prefix.into()))
}

fn http_provider() -> ExtAuthz {
    ExtAuthz {
        provider: "ext-authz".into(),
        cluster: PROVIDER.into(),
        protocol: CheckProtocol::Http(HttpCheck {
            host: "ext-authz.foo.svc.cluster.local".into(),
            path_prefix: String::new(),
            request_headers: vec![HeaderPattern::parse("x-ext-authz"), HeaderPattern::parse("x-pre-*")],
            ..HttpCheck::default()
        }),
        timeout_ms: 20_000,
        fail_open: false,
        status_on_error: None,
        body: None,
    }
}

fn grpc_provider() -> ExtAuthz {
    ExtAuthz {
        protocol: CheckProtocol::Grpc {
            authority: "outbound_.9000_._.ext-authz".into(),
        },
        ..http_provider()
    }
}

fn ask(expr: Expr, provider: ExtAuthz) -> CustomStage {
    CustomStage {
        rules: rule(expr),
        then: Then::Ask(Box::new(provider)),
    }
}

/// Puts stages into all chains, and the provider's cluster beside them.
fn with(mut snapshot: ProxySnapshot, stages: &[CustomStage], address: SocketAddr, tls: ClusterTls) -> ProxySnapshot {
    let mut provider = cluster(
        PROVIDER,
        Discovery::Static(vec![Endpoint {
            address: address.ip().to_string(),
            port: address.port(),
            weight: 1,
            health: Health::Healthy,
            mtls: true,
            mantlet: false,
            workload: None,
        }]),
    );
    provider.tls = tls;
    let grpc = |s: &CustomStage| matches!(&s.then, Then::Ask(p) if matches!(p.protocol, CheckProtocol::Grpc { .. }));
    if stages.iter().any(grpc) {
        provider.protocol = UpstreamProtocol::Http2;
    }
    snapshot.clusters.insert(PROVIDER.into(), Arc::new(provider));
    let listener = Arc::make_mut(snapshot.listeners.get_mut(VIRTUAL_INBOUND).unwrap());
    for chain in &mut listener.chains {
        match &mut chain.filters {
            Filters::Http(http) => http.custom = stages.to_vec(),
            Filters::Tcp(tcp) => tcp.custom = stages.to_vec(),
        }
    }
    snapshot
}

/// An HTTP provider; `answer` decides by what it sees.
async fn provider(answer: impl Fn(&Recorded) -> Response<Full<Bytes>> + Send + Sync + 'static) -> EchoServer {
    EchoServer::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), None, answer)
}

fn response(status: u16, headers: &[(&str, &str)], body: &str) -> Response<Full<Bytes>> {
    let mut builder = Response::builder().status(status);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(Full::new(Bytes::from(body.to_string()))).unwrap()
}

async fn web() -> (EchoServer, Mesh) {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    (app, mesh)
}

async fn get(mesh: &Mesh, target: &str, headers: &[&str]) -> CurlOutput {
    let url = format!("http://{}{target}", mesh.inbound.listen);
    let mut arguments = vec!["--path-as-is"];
    for header in headers {
        arguments.extend(["-H", *header]);
    }
    arguments.push(&url);
    curl(&arguments).await
}

#[tokio::test]
async fn only_matching_requests_are_asked_about_and_the_status_decides() {
    let (app, mut mesh) = web().await;
    let provider = provider(|r| match r.headers.get("x-ext-authz").map(|v| v.as_bytes()) {
        Some(b"allow") => response(200, &[("x-from", "provider"), ("x-other", "no")], "ignored"),
        Some(b"broken") => response(503, &[], "down"),
        Some(b"empty") => response(204, &[], ""),
        _ => response(
            401,
            &[("x-why", "because"), ("www-authenticate", "Basic")],
            "who are you",
        ),
    })
    .await;
    let mut settings = http_provider();
    if let CheckProtocol::Http(check) = &mut settings.protocol {
        check.path_prefix = "/check".into();
        check.add_headers = vec![("x-pre-fixed".into(), "fixed".into())];
        check.upstream_headers = vec![HeaderPattern::parse("x-fr*")];
        check.allow_headers = vec![HeaderPattern::parse("x-from")];
    }
    // DENY and ALLOW are still in force behind (S2.27).
    mesh.inbound.authz = allow(Expr::Or(vec![
        path("/open"),
        Expr::And(vec![
            path("/asked"),
            Expr::atom(Attribute::Header("x-from".into()), Matcher::Exact("provider".into())),
        ]),
    ]));
    let stage = ask(path("/asked").clone(), settings);
    let stages = vec![CustomStage {
        rules: rule(Expr::Or(vec![path("/asked"), path("/closed")])),
        ..stage
    }];
    mesh.server
        .apply(with(
            mesh.inbound.snapshot(),
            &stages,
            provider.address(),
            ClusterTls::Plain,
        ))
        .await;

    let open = get(&mesh, "/open", &[]).await;
    assert_eq!(open.status, 200);
    assert!(provider.requests().is_empty(), "no rule matched, so nobody is asked");

    let yes = get(
        &mesh,
        "/x/../asked//y?a=1&b",
        &[
            "x-ext-authz: allow",
            "x-pre-fixed: forged",
            "x-pre-b: 1",
            "x-pre-b: 2",
            "x-from: forged",
            "x-secret: s",
        ],
    )
    .await;
    assert_eq!(yes.status, 200, "{}", yes.headers);
    assert!(yes.headers.contains("x-from: provider"), "S2.156: {}", yes.headers);
    assert!(!yes.headers.contains("x-other"), "{}", yes.headers);
    let seen = provider.take();
    assert_eq!(seen.len(), 1);
    assert_eq!(
        seen[0].path, "/check/asked//y?a=1&b",
        "the normal form is what is judged"
    );
    assert_eq!(seen[0].host, mesh.inbound.listen.to_string());
    assert_eq!(seen[0].headers["content-length"], "0");
    assert_eq!(seen[0].headers["x-pre-fixed"], "fixed", "S2.154");
    assert_eq!(seen[0].headers["x-pre-b"], "1,2", "all values (threat 26)");
    assert!(!seen[0].headers.contains_key("x-secret"));
    let upstream = app.take();
    assert_eq!(upstream.len(), 2);
    let values: Vec<_> = upstream[1].headers.get_all("x-from").iter().collect();
    assert_eq!(values, ["provider"], "S2.155: overwritten");

    let no = get(&mesh, "/asked", &["x-from: provider"]).await;
    assert_eq!((no.status, no.body.as_str()), (401, "who are you"));
    assert!(no.headers.contains("x-why: because"), "{}", no.headers);
    assert!(no.headers.contains("www-authenticate: basic"), "{}", no.headers);
    assert!(no.headers.contains("content-length: 11"), "{}", no.headers);
    let strange = get(&mesh, "/asked", &["x-ext-authz: empty"]).await;
    assert_eq!(strange.status, 204, "S2.152: exactly 200 admits");
    let broken = get(&mesh, "/asked", &["x-ext-authz: broken"]).await;
    assert_eq!((broken.status, broken.body.as_str()), (403, ""), "S2.150");
    let later = get(&mesh, "/closed", &["x-ext-authz: allow"]).await;
    assert_eq!(
        (later.status, later.body.as_str()),
        (403, "RBAC: access denied"),
        "S2.27"
    );
    assert!(later.headers.contains("x-from: provider"), "also on answers of our own");
    assert!(app.take().is_empty());

    let metrics = mesh.server.metrics();
    for line in [
        "envoy_http_ext_authz_ok 2",
        "envoy_http_ext_authz_denied 2",
        "envoy_http_ext_authz_error 1",
        "envoy_http_ext_authz_failure_mode_allowed 0",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line} is not in\n{metrics}");
    }
    let denials = mesh.server.shared.telemetry.denials();
    let details: Vec<&str> = denials.iter().map(|d| d.details.as_str()).collect();
    assert_eq!(
        details,
        [
            "ext_authz_denied",
            "ext_authz_denied",
            "ext_authz_error",
            "rbac_access_denied_matched_policy[none]"
        ]
    );
    assert!(
        metrics
            .lines()
            .any(|l| l.starts_with("istio_requests_total") && l.contains("response_flags=\"UAEX\"")),
        "S2.160"
    );
}

#[tokio::test]
async fn stages_without_a_provider_deny_what_they_match() {
    let (app, mesh) = web().await;
    let stages = [CustomStage {
        rules: vec![Rule {
            id: format!("{ID}{BAD_SUFFIX}"),
            expr: path("/admin"),
        }],
        then: Then::Deny,
    }];
    mesh.server
        .apply(with(
            mesh.inbound.snapshot(),
            &stages,
            free_address(),
            ClusterTls::Plain,
        ))
        .await;
    let denied = get(&mesh, "/admin", &[]).await;
    assert_eq!((denied.status, denied.body.as_str()), (403, "RBAC: access denied"));
    assert_eq!(get(&mesh, "/other", &[]).await.status, 200, "S2.142: others pass");
    assert_eq!(
        mesh.server.shared.telemetry.denials()[0].details,
        format!("rbac_access_denied_matched_policy[{ID}{BAD_SUFFIX}]")
    );
    assert_eq!(app.take().len(), 1);
}

#[tokio::test]
async fn providers_that_fail_deny_or_admit_as_told() {
    let (_app, mesh) = web().await;
    let nobody = free_address();
    for (fail_open, status, want) in [(false, None, 403), (false, Some(503), 503), (true, Some(503), 200)] {
        let settings = ExtAuthz {
            fail_open,
            status_on_error: status,
            ..http_provider()
        };
        mesh.server
            .apply(with(
                mesh.inbound.snapshot(),
                &[ask(Expr::always(), settings)],
                nobody,
                ClusterTls::Plain,
            ))
            .await;
        let got = get(&mesh, "/", &[]).await;
        assert_eq!(got.status, want, "failOpen {fail_open}, statusOnError {status:?}");
        if want != 200 {
            assert_eq!(got.body, "");
        }
    }
    // What the provider said counts even with failOpen.
    let no = provider(|_| response(403, &[], "no")).await;
    let settings = ExtAuthz {
        fail_open: true,
        ..http_provider()
    };
    mesh.server
        .apply(with(
            mesh.inbound.snapshot(),
            &[ask(Expr::always(), settings)],
            no.address(),
            ClusterTls::Plain,
        ))
        .await;
    assert_eq!(get(&mesh, "/", &[]).await.status, 403);
}

/// A provider that reads questions and writes what it is given, then holds the connection.
async fn raw(answer: &'static [u8], endless: Option<&'static [u8]>) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let mut all = tokio::task::JoinSet::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            all.spawn(async move {
                let mut buffer = [0u8; 4096];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(answer).await;
                while let Some(piece) = endless {
                    if stream.write_all(piece).await.is_err() {
                        return;
                    }
                }
                let _ = stream.read(&mut buffer).await;
            });
        }
    });
    (address, task)
}

#[tokio::test]
async fn slow_and_hostile_providers_are_bounded_and_isolated() {
    let (_app, mesh) = web().await;
    const PIECE: &[u8] = &[b'x'; 16 * 1024];
    for (name, answer, endless, fail_open, want) in [
        ("silent", &b""[..], None, false, 403),
        ("silent, open", b"", None, true, 200),
        ("no HTTP", b"SSH-2.0-OpenSSH\r\n\r\n", None, false, 403),
        ("head without end", b"HTTP/1.1 200 OK\r\nx: ", Some(PIECE), false, 403),
        ("yes without end", b"HTTP/1.1 200 OK\r\n\r\n", Some(PIECE), false, 403),
        ("no without end", b"HTTP/1.1 401 No\r\n\r\n", Some(PIECE), false, 401),
        // Said no, and then nothing more: still a no.
        (
            "no without end, open",
            b"HTTP/1.1 401 No\r\n\r\n",
            Some(PIECE),
            true,
            401,
        ),
        (
            "half a yes",
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
            None,
            false,
            403,
        ),
    ] {
        let (address, task) = raw(answer, endless).await;
        let settings = ExtAuthz {
            timeout_ms: 700,
            fail_open,
            ..http_provider()
        };
        mesh.server
            .apply(with(
                mesh.inbound.snapshot(),
                &[ask(path("/slow"), settings)],
                address,
                ClusterTls::Plain,
            ))
            .await;
        let begun = Instant::now();
        let mut waiting = Vec::new();
        for _ in 0..8 {
            let url = format!("http://{}/slow", mesh.inbound.listen);
            waiting.push(tokio::spawn(async move { curl(&[&url]).await.status }));
        }
        // Requests that nobody is asked about do not wait for those that are.
        assert_eq!(get(&mesh, "/fast", &[]).await.status, 200, "{name}");
        for task in waiting {
            assert_eq!(task.await.unwrap(), want, "{name}");
        }
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "{name}: {:?}",
            begun.elapsed()
        );
        task.abort();
    }
    let metrics = mesh.server.metrics();
    let timeouts = metrics.lines().find(|l| l.starts_with("envoy_http_ext_authz_timeout"));
    let count: u32 = timeouts.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(count >= 24, "{timeouts:?}");
}

#[tokio::test]
async fn bodies_are_shown_up_to_the_limit_and_reach_the_application_whole() {
    let (app, mesh) = web().await;
    let yes = provider(|_| response(200, &[], "")).await;
    let body: String = (0..2000).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &body).unwrap();
    let data = format!("@{}", file.path().display());
    let url = format!("http://{}/up", mesh.inbound.listen);
    for (max_bytes, allow_partial, shown, partial) in [
        (4096, false, 2000, "false"),
        (2000, false, 2000, "false"),
        (1999, true, 1999, "true"),
        (10, true, 10, "true"),
    ] {
        for extra in [&["-H", "x-extra: 1"][..], &["-H", "transfer-encoding: chunked"]] {
            let settings = ExtAuthz {
                body: Some(BodyInCheck {
                    max_bytes,
                    allow_partial,
                    as_bytes: false,
                }),
                ..http_provider()
            };
            mesh.server
                .apply(with(
                    mesh.inbound.snapshot(),
                    &[ask(Expr::always(), settings)],
                    yes.address(),
                    ClusterTls::Plain,
                ))
                .await;
            let mut arguments = vec!["--data-binary", data.as_str(), "-H", "x-envoy-auth-partial-body: maybe"];
            arguments.extend(extra);
            arguments.push(&url);
            let got = curl(&arguments).await;
            assert_eq!(
                (got.status, got.body == body),
                (200, true),
                "{max_bytes}: {}",
                got.headers
            );
            let asked = yes.take().remove(0);
            assert_eq!(asked.body, &body.as_bytes()[..shown], "{max_bytes}");
            assert_eq!(asked.headers["x-envoy-auth-partial-body"], partial);
            assert_eq!(asked.headers["content-length"], shown.to_string().as_str());
            assert_eq!(app.take().remove(0).body, body.as_bytes());
        }
    }
    // S2.158: 413, also with failOpen, however the length is told.
    let settings = ExtAuthz {
        fail_open: true,
        body: Some(BodyInCheck {
            max_bytes: 1999,
            allow_partial: false,
            as_bytes: false,
        }),
        ..http_provider()
    };
    mesh.server
        .apply(with(
            mesh.inbound.snapshot(),
            &[ask(Expr::always(), settings)],
            yes.address(),
            ClusterTls::Plain,
        ))
        .await;
    for extra in [&["-H", "x-extra: 1"][..], &["-H", "transfer-encoding: chunked"]] {
        let mut arguments = vec!["--data-binary", data.as_str()];
        arguments.extend(extra);
        arguments.push(&url);
        let got = curl(&arguments).await;
        assert_eq!((got.status, got.body.as_str()), (413, "Payload Too Large"));
    }
    assert!(yes.take().is_empty() && app.take().is_empty());
}

type Answer = dyn Fn(&CheckRequest) -> Result<CheckResponse, tonic::Status> + Send + Sync;

/// A gRPC provider that remembers and answers by a function.
struct Grpc {
    seen: Arc<Mutex<Vec<CheckRequest>>>,
    answer: Arc<Answer>,
}

#[tonic::async_trait]
impl Authorization for Grpc {
    async fn check(
        &self,
        request: tonic::Request<CheckRequest>,
    ) -> Result<tonic::Response<CheckResponse>, tonic::Status> {
        let request = request.into_inner();
        let answer = (self.answer)(&request);
        self.seen.lock().unwrap().push(request);
        answer.map(tonic::Response::new)
    }
}

async fn grpc(
    answer: impl Fn(&CheckRequest) -> Result<CheckResponse, tonic::Status> + Send + Sync + 'static,
) -> (SocketAddr, Arc<Mutex<Vec<CheckRequest>>>, tokio::task::JoinHandle<()>) {
    let seen = Arc::default();
    let service = AuthorizationServer::new(Grpc {
        seen: Arc::clone(&seen),
        answer: Arc::new(answer),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    });
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(incoming);
    let task = tokio::spawn(async move { drop(server.await) });
    (address, seen, task)
}

fn option(key: &str, value: &str) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(Header {
            key: key.into(),
            value: value.into(),
            ..Header::default()
        }),
        ..HeaderValueOption::default()
    }
}

fn said(code: i32, response: Option<HttpResponse>) -> CheckResponse {
    CheckResponse {
        status: Some(RpcStatus {
            code,
            ..RpcStatus::default()
        }),
        http_response: response,
        ..CheckResponse::default()
    }
}

#[tokio::test]
async fn grpc_providers_see_the_whole_head_and_answer_for_it() {
    let (app, mesh) = web().await;
    let (address, seen, task) = grpc(|request| {
        let http = request.attributes.clone().unwrap().request.unwrap().http.unwrap();
        match http.headers.get("x-want").map(String::as_str) {
            Some("allow") => Ok(said(
                0,
                Some(HttpResponse::OkResponse(OkHttpResponse {
                    headers: vec![option("x-user", "alice"), option("content-length", "999")],
                    headers_to_remove: vec!["x-secret".into(), ":path".into(), "host".into()],
                    response_headers_to_add: vec![option("x-back", "yes")],
                    ..OkHttpResponse::default()
                })),
            )),
            Some("error") => Err(tonic::Status::internal("oops")),
            Some("bare") => Ok(said(16, None)),
            Some("bad-header") => Ok(said(
                0,
                Some(HttpResponse::OkResponse(OkHttpResponse {
                    headers: vec![option("x-user", "a\r\nx-admin: 1")],
                    ..OkHttpResponse::default()
                })),
            )),
            _ => Ok(said(
                7,
                Some(HttpResponse::DeniedResponse(DeniedHttpResponse {
                    status: Some(HttpStatus { code: 429 }),
                    headers: vec![option("x-why", "too often"), option("content-type", "text/html")],
                    body: "<p>no".into(),
                })),
            )),
        }
    })
    .await;
    mesh.server
        .apply(with(
            mesh.inbound.snapshot(),
            &[ask(Expr::always(), grpc_provider())],
            address,
            ClusterTls::Plain,
        ))
        .await;
    // Through the client's proxy, so with an identity.
    let entry = format!("http://{}/a?b=c", mesh.entry());
    let yes = curl(&[
        "-H",
        "Host: web",
        "-H",
        "x-want: allow",
        "-H",
        "x-secret: s",
        "-H",
        "x-many: 1",
        "-H",
        "x-many: 2",
        "-H",
        "x-bytes: \u{fc}",
        &entry,
    ])
    .await;
    assert_eq!((yes.status, yes.body.as_str()), (200, "/a?b=c"), "{}", yes.headers);
    assert!(yes.headers.contains("x-back: yes"), "{}", yes.headers);
    let upstream = app.take().remove(0);
    assert_eq!(upstream.headers["x-user"], "alice");
    assert!(!upstream.headers.contains_key("x-secret"));
    assert_eq!(
        (upstream.host.as_str(), upstream.body.len()),
        ("web", 0),
        "framing stays as it is"
    );
    let asked = seen.lock().unwrap().remove(0).attributes.unwrap();
    assert_eq!(asked.source.as_ref().unwrap().principal, CLIENT_SA);
    assert_eq!(asked.destination.as_ref().unwrap().principal, SERVER_SA);
    let http = asked.request.unwrap().http.unwrap();
    assert_eq!(
        (http.method.as_str(), http.path.as_str(), http.host.as_str()),
        ("GET", "/a?b=c", "web")
    );
    assert_eq!(http.headers["x-many"], "1,2", "threat 26");
    assert_eq!(http.headers[":path"], "/a?b=c");

    let plain = |want: &'static str| {
        let url = format!("http://{}/", mesh.inbound.listen);
        async move { curl(&["-H", &format!("x-want: {want}"), &url]).await }
    };
    let no = plain("no").await;
    assert_eq!((no.status, no.body.as_str()), (429, "<p>no"));
    assert!(
        no.headers.contains("x-why: too often") && no.headers.contains("content-type: text/html"),
        "{}",
        no.headers
    );
    assert_eq!(plain("bare").await.status, 403, "S2.157: 403 unless told otherwise");
    assert_eq!(plain("error").await.status, 403, "S2.157: a failed call is an error");
    assert_eq!(plain("bad-header").await.status, 503, "header injection");
    // Bytes that are no UTF-8: asked all the same (threat 32).
    let mut stream = TcpStream::connect(mesh.inbound.listen).await.unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\nx-want: \xff\xfeallow\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut text = Vec::new();
    stream.read_to_end(&mut text).await.unwrap();
    assert!(text.starts_with(b"HTTP/1.1 429"), "{}", String::from_utf8_lossy(&text));
    let last = seen.lock().unwrap().last().unwrap().attributes.clone().unwrap();
    assert_eq!(last.request.unwrap().http.unwrap().headers["x-want"], "!!allow");
    // A client that speaks gRPC gets a refusal in its language.
    let url = format!("http://{}/pkg.Service/Method", mesh.inbound.listen);
    let grpc = curl(&["-X", "POST", "-H", "content-type: application/grpc", &url]).await;
    assert_eq!(grpc.status, 200);
    assert!(
        grpc.headers.contains("grpc-status: 14"),
        "429 is UNAVAILABLE: {}",
        grpc.headers
    );
    assert!(app.take().is_empty());
    task.abort();
}

#[tokio::test]
async fn the_provider_is_reached_with_mtls_and_must_be_the_right_one() {
    let (_app, mesh) = web().await;
    let account = mesh.ca.workload("foo", "ext-authz");
    let tls = account
        .identity
        .server(&mantlet_identity::ServerTlsOptions {
            client_auth: mantlet_identity::ClientAuth::Required(mantlet_identity::TrustDomainRule::AnySpiffe),
            alpn: vec![],
            min_tls13: false,
        })
        .unwrap();
    let provider = EchoServer::start_tls(tls).await;
    let client = |account: &str| {
        ClusterTls::Auto(Box::new(ClientTls {
            certificate: Some(SECRET_DEFAULT.into()),
            trust_bundle: Some(SECRET_ROOT.into()),
            server_sans: vec![SanMatch::Exact(format!("spiffe://cluster.local/ns/foo/sa/{account}"))],
            sni: "outbound_.8000_._.ext-authz.foo.svc.cluster.local".into(),
            alpn: vec!["istio-peer-exchange".into(), "istio".into()],
            min_version: TlsVersion::V1_2,
        }))
    };
    for (expected, want) in [("ext-authz", 200), ("somebody-else", 403)] {
        mesh.server
            .apply(with(
                mesh.inbound.snapshot(),
                &[ask(Expr::always(), http_provider())],
                provider.address(),
                client(expected),
            ))
            .await;
        assert_eq!(get(&mesh, "/", &[]).await.status, want, "{expected}");
    }
    let seen = provider.take();
    assert_eq!(seen.len(), 1);
    assert_eq!(
        seen[0].peer_id.as_ref().unwrap().as_str(),
        SERVER_SA,
        "the mesh's identity"
    );
}

#[tokio::test]
async fn connections_are_asked_about_on_their_first_byte_and_again_when_the_policy_changes() {
    let app = TcpEcho::start(b"").await;
    let mesh = Mesh::new(app.address(), Port::Tcp, Mode::Permissive).await;
    let (address, seen, task) = grpc(|request| {
        let attributes = request.attributes.clone().unwrap();
        assert!(attributes.request.is_none(), "bytes have no head");
        let known = attributes.source.unwrap().principal == CLIENT_SA;
        Ok(said(if known { 0 } else { 7 }, None))
    })
    .await;
    let stages = [ask(Expr::always(), grpc_provider())];
    let snapshot = with(mesh.inbound.snapshot(), &stages, address, ClusterTls::Plain);
    mesh.server.apply(snapshot.clone()).await;

    let mut known = TcpStream::connect(mesh.entry()).await.unwrap();
    known.write_all(b"ping").await.unwrap();
    let mut back = [0u8; 4];
    known.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"ping");
    let mut unknown = TcpStream::connect(mesh.inbound.listen).await.unwrap();
    unknown.write_all(b"ping").await.unwrap();
    let end = tokio::time::timeout(Duration::from_secs(60), unknown.read(&mut back))
        .await
        .unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    assert_eq!(seen.lock().unwrap().len(), 2);
    assert_eq!(mesh.server.shared.telemetry.denials()[0].details, "ext_authz_denied");
    let metrics = mesh.server.metrics();
    for line in ["envoy_tcp_ext_authz_ok 1", "envoy_tcp_ext_authz_denied 1"] {
        assert!(metrics.lines().any(|l| l == line), "{line}");
    }

    // The same question, asked already: the connection stays.
    mesh.server.apply(snapshot).await;
    known.write_all(b"pong").await.unwrap();
    known.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"pong");
    // Another provider has not let it in.
    let other = ExtAuthz {
        timeout_ms: 5,
        ..grpc_provider()
    };
    mesh.server
        .apply(with(
            mesh.inbound.snapshot(),
            &[ask(Expr::always(), other)],
            address,
            ClusterTls::Plain,
        ))
        .await;
    let end = tokio::time::timeout(Duration::from_secs(60), known.read(&mut back))
        .await
        .unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    task.abort();
}

#[tokio::test]
async fn a_policy_that_comes_later_ends_a_connection_that_nobody_had_looked_at() {
    let app = TcpEcho::start(b"").await;
    let mut mesh = Mesh::new(app.address(), Port::Tcp, Mode::Permissive).await;
    let mut stream = TcpStream::connect(mesh.inbound.listen).await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    let mut back = [0u8; 4];
    stream.read_exact(&mut back).await.unwrap();
    mesh.inbound.authz = allow(Expr::atom(Attribute::PeerUri, Matcher::Present));
    mesh.apply().await;
    let end = tokio::time::timeout(Duration::from_secs(60), stream.read(&mut back))
        .await
        .unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn switches_of_protocol_are_asked_about_without_their_bytes() {
    let (_app, mesh) = web().await;
    let yes = provider(|_| response(200, &[], "")).await;
    let settings = ExtAuthz {
        body: Some(BodyInCheck {
            max_bytes: 100,
            allow_partial: false,
            as_bytes: false,
        }),
        ..http_provider()
    };
    mesh.server
        .apply(with(
            mesh.inbound.snapshot(),
            &[ask(Expr::always(), settings)],
            yes.address(),
            ClusterTls::Plain,
        ))
        .await;
    let got = get(&mesh, "/ws", &["Connection: Upgrade", "Upgrade: websocket"]).await;
    assert_eq!(got.status, 200, "the application does not switch");
    let asked = yes.take().remove(0);
    assert!(!asked.headers.contains_key("x-envoy-auth-partial-body"), "S2.159");
}

#[tokio::test]
async fn two_lengths_in_one_head_are_refused() {
    let (app, mesh) = web().await;
    for head in [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(mesh.inbound.listen).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut text = Vec::new();
        // The connection ends: what follows has no clear begin.
        let read = stream.read_to_end(&mut text);
        tokio::time::timeout(Duration::from_secs(60), read)
            .await
            .unwrap()
            .unwrap();
        assert!(text.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&text));
    }
    assert!(app.take().is_empty());
    // Each alone is fine, again and again on one connection, in pieces as small as they come.
    let mut stream = TcpStream::connect(mesh.inbound.listen).await.unwrap();
    for round in 0..3 {
        for request in [
            "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            "POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        ] {
            for byte in request.as_bytes().chunks(if round == 2 { 1 } else { 1000 }) {
                stream.write_all(byte).await.unwrap();
            }
            let mut text = Vec::new();
            while !text.ends_with(b"hello") {
                let mut buffer = [0u8; 1024];
                let read = tokio::time::timeout(Duration::from_secs(60), stream.read(&mut buffer));
                let n = read.await.unwrap().unwrap();
                assert!(n > 0, "{}", String::from_utf8_lossy(&text));
                text.extend_from_slice(&buffer[..n]);
            }
            assert!(text.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&text));
        }
    }
}

/// CVE-2021-32777: a provider that says no to a value sees it wherever it stands among others.
#[tokio::test]
async fn reg_26_providers_see_every_value() {
    let (app, mesh) = web().await;
    let provider = provider(|request| {
        let all: Vec<&[u8]> = request
            .headers
            .get_all("x-ext-authz")
            .iter()
            .map(|v| v.as_bytes())
            .collect();
        let bad = all.concat().windows(5).any(|w| w == b"admin");
        response(if bad { 403 } else { 200 }, &[], "")
    })
    .await;
    let stages = [ask(Expr::always(), http_provider())];
    let snapshot = with(mesh.inbound.snapshot(), &stages, provider.address(), ClusterTls::Plain);
    mesh.server.apply(snapshot).await;
    for position in 0..4 {
        let lines: Vec<String> = (0..4)
            .map(|n| format!("x-ext-authz: {}", if n == position { "admin" } else { "user" }))
            .collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        assert_eq!(get(&mesh, "/", &lines).await.status, 403, "position {position}");
    }
    assert!(app.take().is_empty());
    assert_eq!(
        get(&mesh, "/", &["x-ext-authz: user", "x-ext-authz: user"])
            .await
            .status,
        200
    );
}

/// CVE-2023-27488: bytes that are no UTF-8 do not make the question fail, so a provider that may fail open is still asked.
#[tokio::test]
async fn reg_32_bytes_that_are_no_text_are_asked_about() {
    let (app, mesh) = web().await;
    let (address, seen, task) = grpc(|_| Ok(said(7, None))).await;
    let settings = ExtAuthz {
        fail_open: true,
        ..grpc_provider()
    };
    let stages = [ask(Expr::always(), settings)];
    let snapshot = with(mesh.inbound.snapshot(), &stages, address, ClusterTls::Plain);
    mesh.server.apply(snapshot).await;
    for bytes in [&b"\xff\xfe"[..], b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"a\xf8b"] {
        let mut head = b"GET / HTTP/1.1\r\nHost: a\r\nx-bytes: ".to_vec();
        head.extend(bytes);
        head.extend(b"\r\nConnection: close\r\n\r\n");
        let mut stream = TcpStream::connect(mesh.inbound.listen).await.unwrap();
        stream.write_all(&head).await.unwrap();
        let mut text = Vec::new();
        stream.read_to_end(&mut text).await.unwrap();
        assert!(
            text.starts_with(b"HTTP/1.1 403"),
            "{bytes:?}: {}",
            String::from_utf8_lossy(&text)
        );
    }
    assert_eq!(seen.lock().unwrap().len(), 5, "asked each time");
    assert!(app.take().is_empty());
    task.abort();
}

/// CVE-2026-2836: an answer for one host, path or client is not used for another: each request is a question of its own.
#[tokio::test]
async fn reg_47_nothing_is_remembered_across_hosts() {
    let (app, mesh) = web().await;
    let provider =
        provider(|request| response(if request.host.starts_with("good") { 200 } else { 403 }, &[], "")).await;
    let stages = [ask(Expr::always(), http_provider())];
    let snapshot = with(mesh.inbound.snapshot(), &stages, provider.address(), ClusterTls::Plain);
    mesh.server.apply(snapshot).await;
    let url = format!("http://{}/same", mesh.inbound.listen);
    for (host, want) in [
        ("good", 200),
        ("evil", 403),
        ("good", 200),
        ("good", 200),
        ("evil", 403),
    ] {
        assert_eq!(
            curl(&["-H", &format!("Host: {host}"), &url]).await.status,
            want,
            "{host}"
        );
    }
    assert_eq!(provider.take().len(), 5);
    assert!(app.take().iter().all(|r| r.host == "good"));
}
