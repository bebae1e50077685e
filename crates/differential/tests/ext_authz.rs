//! CUSTOM authorization beside a real Envoy: the same encoded configuration, the same providers, the same requests; the
//! client, the application and the provider must see the same, and the access logs must read the same.
//!
//! What is not compared is said at [`NOT_COMPARED`] and [`only_status`].

#[path = "../../xds/tests/envoy/launch.rs"]
#[allow(dead_code, reason = "what the xDS tests need besides")]
mod launch;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue as Header, HeaderValueOption, QueryParameter};
use envoy_types::pb::envoy::service::auth::v3::authorization_server::{Authorization, AuthorizationServer};
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::protobuf::BoolValue;
use envoy_types::pb::google::rpc::Status as RpcStatus;
use http::{HeaderMap, Response};
use http_body_util::Full;
use mantlet_model::authz::{Action, Attribute, AuthzFilter, Expr, Matcher, Rule};
use mantlet_model::cluster::{Balancer, Cluster, ClusterTls, Discovery, Limits, UpstreamProtocol};
use mantlet_model::endpoint::{Endpoint, Health};
use mantlet_model::ext_authz::*;
use mantlet_model::http::{Codec, ForwardedClientCert, HttpManager, PathNormalization, RouteSource};
use mantlet_model::listener::{AccessLog, ChainMatch, FilterChain, Filters, Inspector, Listener, TcpManager};
use mantlet_model::names::Direction;
use mantlet_model::route::{Forward, Route, RouteAction, RouteMatch, RouteTable, VirtualHost};
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_proxy::config::Config;
use mantlet_proxy::telemetry::Telemetry;
use mantlet_proxy::telemetry::exchange::PeerLabels;
use mantlet_proxy::worker::{Phase, Shared, Tuning};
use mantlet_runtime::Registry;
use mantlet_testkit::{EchoServer, Recorded, TcpEcho, program};
use mantlet_xds::{Dialect, Options, ResourceSet, ResourceType, decode, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const LOG: &str = "%REQ(X-CASE)% %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS% \
    %DYNAMIC_METADATA(envoy.filters.http.rbac:istio_ext_authz_shadow_effective_policy_id)% \
    %DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_allow_shadow_engine_result)% \
    %DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_allow_shadow_effective_policy_id)% \
    %DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_deny_shadow_engine_result)% \
    %DYNAMIC_METADATA(envoy.filters.http.rbac:istio_dry_run_deny_shadow_effective_policy_id)% \
    %DYNAMIC_METADATA(envoy.common:access_log_hint)%\n";

/// One way to configure a provider.
struct Setup {
    name: &'static str,
    stages: Vec<CustomStage>,
    authz: Vec<AuthzFilter>,
}

fn atom(attribute: Attribute, matcher: Matcher) -> Expr {
    Expr::atom(attribute, matcher)
}

fn path(prefix: &str) -> Expr {
    atom(Attribute::Path, Matcher::Prefix(prefix.into()))
}

fn http_check(check: HttpCheck) -> ExtAuthz {
    ExtAuthz {
        provider: "ext".into(),
        cluster: "http-provider".into(),
        protocol: CheckProtocol::Http(HttpCheck {
            host: "provider".into(),
            request_headers: vec![HeaderPattern::parse("X-Case"), HeaderPattern::parse("x-shown-*")],
            ..check
        }),
        timeout_ms: 3_000,
        fail_open: false,
        status_on_error: None,
        body: None,
    }
}

fn grpc_check() -> ExtAuthz {
    ExtAuthz {
        cluster: "grpc-provider".into(),
        protocol: CheckProtocol::Grpc {
            authority: "outbound_.9000_._.provider".into(),
        },
        ..http_check(HttpCheck::default())
    }
}

fn body(max_bytes: u32, allow_partial: bool, as_bytes: bool) -> Option<BodyInCheck> {
    Some(BodyInCheck {
        max_bytes,
        allow_partial,
        as_bytes,
    })
}

fn stage(provider: ExtAuthz, expr: Expr) -> CustomStage {
    CustomStage {
        rules: vec![Rule {
            id: format!("istio-ext-authz-{}-ns[foo]-policy[p]-rule[0]", provider.provider),
            expr,
        }],
        then: Then::Ask(Box::new(provider)),
    }
}

fn filter(action: Action, rules: &[(&str, Expr)], shadow: &[(&str, Expr)]) -> AuthzFilter {
    let list = |rules: &[(&str, Expr)]| {
        rules
            .iter()
            .map(|(id, expr)| Rule {
                id: (*id).into(),
                expr: expr.clone(),
            })
            .collect()
    };
    AuthzFilter {
        action,
        enforced: !rules.is_empty(),
        rules: list(rules),
        shadow: list(shadow),
    }
}

fn setups() -> Vec<Setup> {
    let patterns = |list: &[&str]| list.iter().map(|p| HeaderPattern::parse(p)).collect::<Vec<_>>();
    let one = |name, provider: ExtAuthz| Setup {
        name,
        stages: vec![stage(provider, path("/"))],
        authz: vec![],
    };
    let plain = || http_check(HttpCheck::default());
    let named = |name: &str, provider: ExtAuthz| ExtAuthz {
        provider: name.into(),
        ..provider
    };
    let from = |value: &str| atom(Attribute::Header("x-up".into()), Matcher::Exact(value.into()));
    vec![
        one("http", plain()),
        one(
            "http with all lists",
            http_check(HttpCheck {
                path_prefix: "/check".into(),
                add_headers: vec![("x-shown-added".into(), "added".into()), ("x-new".into(), "n".into())],
                upstream_headers: patterns(&["X-Up", "x-u-*"]),
                deny_headers: patterns(&["x-down", "*-cookie"]),
                allow_headers: patterns(&["x-ok", "x-u-*"]),
                ..HttpCheck::default()
            }),
        ),
        one(
            "http with a body",
            ExtAuthz {
                body: body(10, false, false),
                ..plain()
            },
        ),
        one(
            "http with a part of the body",
            ExtAuthz {
                body: body(4, true, false),
                ..plain()
            },
        ),
        one(
            "http, open",
            ExtAuthz {
                fail_open: true,
                status_on_error: Some(503),
                body: body(10, false, false),
                ..plain()
            },
        ),
        one(
            "http, 503",
            ExtAuthz {
                status_on_error: Some(503),
                ..plain()
            },
        ),
        one("grpc", grpc_check()),
        one(
            "grpc with a body",
            ExtAuthz {
                body: body(10, false, false),
                ..grpc_check()
            },
        ),
        one(
            "grpc with bytes",
            ExtAuthz {
                body: body(4, true, true),
                ..grpc_check()
            },
        ),
        one(
            "grpc, open",
            ExtAuthz {
                fail_open: true,
                ..grpc_check()
            },
        ),
        one(
            "nobody there",
            ExtAuthz {
                cluster: "nobody".into(),
                ..plain()
            },
        ),
        one(
            "nobody there, open",
            ExtAuthz {
                cluster: "nobody".into(),
                fail_open: true,
                ..grpc_check()
            },
        ),
        Setup {
            name: "two providers, the second one for some",
            // Names of which one begins with the other (S2.141).
            stages: vec![
                stage(named("opa", plain()), path("/a")),
                stage(named("opa-2", grpc_check()), path("/a/b")),
            ],
            authz: vec![],
        },
        Setup {
            name: "bad provider",
            stages: vec![CustomStage {
                rules: vec![Rule {
                    id: format!("istio-ext-authz-x-ns[foo]-policy[p]-rule[0]{BAD_SUFFIX}"),
                    expr: path("/a/b"),
                }],
                then: Then::Deny,
            }],
            authz: vec![],
        },
        Setup {
            name: "before DENY, ALLOW, AUDIT and trial runs",
            stages: vec![stage(
                http_check(HttpCheck {
                    upstream_headers: patterns(&["x-up"]),
                    ..HttpCheck::default()
                }),
                path("/a"),
            )],
            authz: vec![
                filter(Action::Log, &[("ns[foo]-policy[audit]-rule[0]", path("/a/b"))], &[]),
                filter(
                    Action::Deny,
                    &[("ns[foo]-policy[deny]-rule[0]", path("/a/b/c"))],
                    &[("ns[foo]-policy[trial deny]-rule[0]", path("/a/b"))],
                ),
                filter(
                    Action::Allow,
                    &[("ns[foo]-policy[allow]-rule[0]", Expr::Or(vec![from("two"), path("/x")]))],
                    &[("ns[foo]-policy[trial]-rule[0]", path("/x"))],
                ),
            ],
        },
    ]
}

/// Requests: what curl is told besides the URL.
fn requests() -> Vec<(&'static str, &'static str, Vec<&'static str>)> {
    let mut out = vec![
        ("ok", "/a?x=1&y=2", vec![]),
        (
            "ok",
            "/a/b/c",
            vec![
                "-H",
                "x-up: forged",
                "-H",
                "x-shown-1: a",
                "-H",
                "x-shown-1: b",
                "-H",
                "x-shown-added: c",
            ],
        ),
        (
            "ok",
            "/x/../a//b",
            vec![
                "-H",
                "x-secret: s",
                "-H",
                "x-append: mine",
                "-H",
                "authorization: Basic x",
                "-H",
                "cookie: a=1",
            ],
        ),
        ("ok", "/%61", vec!["-X", "DELETE", "-H", "x-shown-u: ü"]),
        (
            "ok",
            "/a",
            vec!["-H", "x-envoy-auth-partial-body: maybe", "-d", "small"],
        ),
        ("ok", "/a", vec!["-d", "a longer body"]),
        (
            "ok",
            "/a",
            vec!["-d", "a longer body", "-H", "transfer-encoding: chunked"],
        ),
        ("ok", "/a", vec!["-d", "4444", "-H", "transfer-encoding: chunked"]),
        ("deny", "/a", vec!["-d", "a longer body"]),
        ("deny", "/a", vec!["-H", "content-type: application/grpc", "-X", "POST"]),
        (
            "failed",
            "/a",
            vec!["-H", "content-type: application/grpc", "-X", "POST"],
        ),
        ("deny", "/a", vec!["-I"]),
        ("none", "/other", vec![]),
    ];
    for case in [
        "deny",
        "401",
        "302",
        "204",
        "201",
        "100",
        "404",
        "413",
        "429",
        "500",
        "503",
        "failed",
        "plain",
        "append",
        "actions",
        "response-actions",
        "query",
        "deny-default",
        "deny-empty",
        "unauthenticated",
        "error-response",
        "bad-value",
        "bad-name",
        "twice",
    ] {
        out.push((case, "/a/b?q=1&r=2&q=3", vec!["-H", "x-append: mine"]));
    }
    out
}

fn response(status: u16, headers: &[(&str, &str)], body: &str) -> Response<Full<Bytes>> {
    let mut builder = Response::builder().status(status);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(Full::new(Bytes::from(body.to_string()))).unwrap()
}

fn http_answer(request: &Recorded) -> Response<Full<Bytes>> {
    let case = request
        .headers
        .get("x-case")
        .map(|v| v.to_str().unwrap())
        .unwrap_or("none");
    match case {
        "ok" | "twice" => response(
            200,
            &[
                ("x-up", "one"),
                ("x-up", "two"),
                ("x-u-1", "v"),
                ("x-down", "d"),
                ("x-ok", "1"),
                ("x-ok", "2"),
                ("set-cookie", "c=1"),
                ("x-envoy-auth-headers-to-remove", "x-secret, cookie"),
            ],
            "ignored",
        ),
        "deny" => response(
            403,
            &[
                ("x-down", "d"),
                ("x-other", "o"),
                ("www-authenticate", "Basic"),
                ("location", "/login"),
                ("set-cookie", "a=1"),
                ("set-cookie", "b=2"),
                ("content-type", "application/json"),
            ],
            "{\"no\": true}",
        ),
        "302" => response(302, &[("location", "https://login/")], ""),
        "404" => response(404, &[], ""),
        other => match other.parse::<u16>() {
            Ok(code @ 200..) => response(code, &[("x-code", other)], if code == 204 { "" } else { "text" }),
            _ => response(200, &[], ""),
        },
    }
}

fn option(key: &str, value: &str, append: Option<bool>, action: HeaderAppendAction) -> HeaderValueOption {
    #[expect(deprecated, reason = "providers still use it")]
    HeaderValueOption {
        header: Some(Header {
            key: key.into(),
            value: value.into(),
            ..Header::default()
        }),
        append: append.map(|value| BoolValue { value }),
        append_action: action.into(),
        ..HeaderValueOption::default()
    }
}

fn plain(key: &str, value: &str) -> HeaderValueOption {
    option(key, value, None, HeaderAppendAction::AppendIfExistsOrAdd)
}

fn actions() -> Vec<HeaderValueOption> {
    use HeaderAppendAction::*;
    vec![
        option("x-append", "1", None, AppendIfExistsOrAdd),
        option("x-new-1", "1", None, AppendIfExistsOrAdd),
        option("x-append-2", "2", None, AddIfAbsent),
        option("x-append", "changed", None, AddIfAbsent),
        option("x-new-3", "3", None, OverwriteIfExists),
        option("x-new-4", "4", None, OverwriteIfExistsOrAdd),
    ]
}

fn grpc_answer(request: &CheckRequest) -> Result<CheckResponse, tonic::Status> {
    use HeaderAppendAction::AppendIfExistsOrAdd as Default;
    let said = |code, http_response| {
        Ok(CheckResponse {
            status: Some(RpcStatus {
                code,
                ..RpcStatus::default()
            }),
            http_response,
            ..CheckResponse::default()
        })
    };
    let ok = |ok: OkHttpResponse| said(0, Some(HttpResponse::OkResponse(ok)));
    let denied = |code: i32, status: Option<i32>, headers, body: &str| {
        let response = DeniedHttpResponse {
            status: status.map(|code| HttpStatus { code }),
            headers,
            body: body.into(),
        };
        said(code, Some(HttpResponse::DeniedResponse(response)))
    };
    let http = request.attributes.clone().and_then(|a| a.request).and_then(|r| r.http);
    let Some(http) = http else { return said(7, None) };
    match http.headers.get("x-case").map(String::as_str).unwrap_or("none") {
        "ok" => ok(OkHttpResponse {
            headers: vec![plain("x-up", "grpc"), plain("x-append", "theirs")],
            headers_to_remove: vec!["x-secret".into(), "x-none".into()],
            response_headers_to_add: vec![plain("x-back", "b")],
            ..OkHttpResponse::default()
        }),
        "append" => ok(OkHttpResponse {
            headers: vec![
                option("x-append", "theirs", Some(true), Default),
                option("x-absent", "theirs", Some(true), Default),
                option("x-set", "theirs", Some(false), Default),
            ],
            response_headers_to_add: vec![
                option("x-back", "1", Some(true), Default),
                option("x-back", "2", Some(true), Default),
                option("x-once", "1", Some(false), Default),
                option("x-once", "2", Some(false), Default),
            ],
            ..OkHttpResponse::default()
        }),
        "twice" => ok(OkHttpResponse {
            headers: vec![plain("x-up", "one"), plain("x-up", "two")],
            response_headers_to_add: vec![plain("x-back", "one"), plain("x-back", "two")],
            ..OkHttpResponse::default()
        }),
        "actions" => ok(OkHttpResponse {
            headers: actions(),
            ..OkHttpResponse::default()
        }),
        "response-actions" => ok(OkHttpResponse {
            response_headers_to_add: actions(),
            ..OkHttpResponse::default()
        }),
        "query" => ok(OkHttpResponse {
            query_parameters_to_set: vec![QueryParameter {
                key: "q".into(),
                value: "new".into(),
            }],
            query_parameters_to_remove: vec!["r".into()],
            ..OkHttpResponse::default()
        }),
        "bad-value" => ok(OkHttpResponse {
            headers: vec![plain("x-up", "a\r\nx-admin: 1")],
            ..OkHttpResponse::default()
        }),
        "bad-name" => ok(OkHttpResponse {
            headers: vec![plain("x up", "a")],
            ..OkHttpResponse::default()
        }),
        "deny" => denied(
            7,
            Some(401),
            vec![
                plain("x-why", "w"),
                plain("content-type", "text/html"),
                plain("set-cookie", "a=1"),
                plain("set-cookie", "b=2"),
            ],
            "<p>no",
        ),
        "deny-default" => denied(7, None, vec![], "text"),
        "deny-empty" => denied(7, Some(0), vec![], ""),
        "429" => denied(8, Some(429), vec![], ""),
        "unauthenticated" => said(16, None),
        "error-response" => said(
            7,
            Some(HttpResponse::ErrorResponse(DeniedHttpResponse {
                status: Some(HttpStatus { code: 502 }),
                ..DeniedHttpResponse::default()
            })),
        ),
        "failed" => Err(tonic::Status::unavailable("no")),
        "500" => Err(tonic::Status::internal("no")),
        _ => said(0, None),
    }
}

struct Grpc {
    seen: Arc<Mutex<Vec<CheckRequest>>>,
    answer: fn(&CheckRequest) -> Result<CheckResponse, tonic::Status>,
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
    answer: fn(&CheckRequest) -> Result<CheckResponse, tonic::Status>,
) -> (SocketAddr, Arc<Mutex<Vec<CheckRequest>>>) {
    let seen: Arc<Mutex<Vec<CheckRequest>>> = Arc::default();
    let service = AuthorizationServer::new(Grpc {
        seen: seen.clone(),
        answer,
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(incoming);
    tokio::spawn(async move { drop(server.await) });
    (address, seen)
}

fn fixed_cluster(name: &str, address: SocketAddr, protocol: UpstreamProtocol) -> Cluster {
    Cluster {
        name: name.into(),
        discovery: Discovery::Static(vec![Endpoint {
            address: address.ip().to_string(),
            port: address.port(),
            weight: 1,
            health: Health::Healthy,
            mtls: false,
            mantlet: false,
            workload: None,
        }]),
        connect_timeout_ms: 2_000,
        balancer: Balancer::RoundRobin,
        tls: ClusterTls::Plain,
        protocol,
        bind_source: None,
        limits: Limits::default(),
        outlier: None,
        services: vec![],
        alpn_override: false,
    }
}

fn http_filters(setup: &Setup, log: &Path) -> Filters {
    let route = Route {
        name: "default".into(),
        matches: RouteMatch::default(),
        action: RouteAction::Forward(Forward {
            clusters: vec![("app".into(), 100)],
            prefix_rewrite: None,
            host_rewrite: None,
            timeout_ms: 0,
            retry: None,
        }),
        decorator: "test/*".into(),
        request_headers: vec![],
        response_headers: vec![],
    };
    Filters::Http(Box::new(HttpManager {
        stat_prefix: "test".into(),
        codec: Codec::Auto,
        routes: RouteSource::Inline(Box::new(RouteTable {
            name: "test".into(),
            hosts: vec![Arc::new(VirtualHost {
                name: "any".into(),
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
        custom: setup.stages.clone(),
        jwt: None,
        authz: setup.authz.clone(),
        istio_alpn: false,
        telemetry: None,
        access_log: Some(AccessLog {
            path: log.display().to_string(),
            format: LOG.into(),
            json: vec![],
        }),
    }))
}

fn listener(name: &str, port: u16, filters: Filters) -> Listener {
    Listener {
        name: name.into(),
        address: ([127, 0, 0, 1], port).into(),
        bind_to_port: true,
        use_original_dst: false,
        direction: Direction::Outbound,
        chains: vec![],
        default_chain: Some(FilterChain {
            name: "only".into(),
            matches: ChainMatch::default(),
            tls: None,
            filters,
        }),
        tls_inspector: Inspector::Off,
        http_inspector: Inspector::Off,
        detection_timeout_ms: 0,
        access_log: None,
    }
}

/// TCP chains: the provider's cluster, whether it may fail, and whether the bytes come through.
const TCP: [(&str, bool, bool); 4] = [
    ("grpc-provider", false, false),
    ("grpc-yes", false, true),
    ("nobody", false, false),
    ("nobody", true, true),
];

fn tcp_filters(cluster: &str, fail_open: bool) -> Filters {
    let provider = ExtAuthz {
        cluster: cluster.into(),
        fail_open,
        ..grpc_check()
    };
    Filters::Tcp(TcpManager {
        stat_prefix: "tcp".into(),
        custom: vec![stage(provider, Expr::always())],
        authz: vec![],
        cluster: "tcp-app".into(),
        idle_timeout_ms: None,
        telemetry: false,
    })
}

/// What everybody saw of one request.
#[derive(Debug, PartialEq)]
struct Seen {
    status: String,
    headers: BTreeMap<String, Vec<String>>,
    body: String,
    app: Vec<Asked>,
    providers: Vec<Asked>,
    grpc: Vec<(BTreeMap<String, String>, CheckRequest)>,
}

/// A request as a server saw it.
#[derive(Debug, PartialEq)]
struct Asked {
    line: String,
    headers: BTreeMap<String, Vec<String>>,
    body: Bytes,
}

/// Headers that are not compared: times and random numbers, and what Envoy's HTTP client adds for other Envoys (the timeout
/// it applies, that the request is internal), which no policy looks at.
const NOT_COMPARED: [&str; 6] = [
    "date",
    "x-request-id",
    "x-envoy-upstream-service-time",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-internal",
    "x-forwarded-for",
];

/// Headers about a message's body.
const OF_THE_BODY: [&str; 3] = ["content-length", "transfer-encoding", "content-type"];

fn headers(map: &HeaderMap, port: u16) -> BTreeMap<String, Vec<String>> {
    let mut out: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in map {
        if !NOT_COMPARED.contains(&name.as_str()) {
            let text = String::from_utf8_lossy(value.as_bytes()).replace(&format!(":{port}"), ":PORT");
            out.entry(name.to_string()).or_default().push(text);
        }
    }
    out
}

fn asked(request: Recorded, port: u16) -> Asked {
    Asked {
        line: format!("{} {}", request.method, request.path),
        headers: headers(&request.headers, port),
        body: request.body,
    }
}

/// Takes out of a check what differs by nature.
fn normal(mut check: CheckRequest, port: u16) -> (BTreeMap<String, String>, CheckRequest) {
    let mut shown = BTreeMap::new();
    let attributes = check.attributes.as_mut().unwrap();
    for peer in [&mut attributes.source, &mut attributes.destination] {
        peer.as_mut().unwrap().address = None;
    }
    if let Some(request) = &mut attributes.request {
        request.time = None;
        if let Some(http) = &mut request.http {
            http.id.clear();
            http.host = http.host.replace(&format!(":{port}"), ":PORT");
            for value in http.headers.values_mut() {
                *value = value.replace(&format!(":{port}"), ":PORT");
            }
            // What had been read of the body when the question was asked is a matter of timing.
            http.size = 0;
            shown.extend(std::mem::take(&mut http.headers));
            shown.retain(|name, _| !NOT_COMPARED.contains(&name.as_str()));
        }
    }
    (shown, check)
}

struct Bench {
    app: EchoServer,
    provider: EchoServer,
    grpc: Arc<Mutex<Vec<CheckRequest>>>,
}

impl Bench {
    async fn send(&self, port: u16, case: &str, target: &str, arguments: &[&str]) -> Seen {
        let out = tokio::process::Command::new(program("curl"))
            .args(["-sS", "-i", "--max-time", "20", "--path-as-is", "-H"])
            .arg(format!("x-case: {case}"))
            .args(arguments)
            .arg(format!("http://127.0.0.1:{port}{target}"))
            .output()
            .await
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let mut lines = head.lines();
        let status = lines.next().unwrap_or_default().to_string();
        let mut map = HeaderMap::new();
        for line in lines {
            if let Some((name, value)) = line.split_once(": ") {
                map.append(
                    name.parse::<http::HeaderName>().unwrap(),
                    http::HeaderValue::from_bytes(value.as_bytes()).unwrap(),
                );
            }
        }
        Seen {
            status: format!("{status} curl {:?}", out.status.code()),
            headers: {
                let mut headers = headers(&map, port);
                if arguments.contains(&"-I") {
                    // Answers to HEAD have no body, so nobody reads what they say about one.
                    headers.retain(|name, _| !OF_THE_BODY.contains(&name.as_str()));
                }
                headers
            },
            body: body.to_string(),
            app: self
                .app
                .take()
                .into_iter()
                .map(|r| {
                    let mut asked = asked(r, port);
                    // Compared as bytes.
                    asked.headers.retain(|name, _| !OF_THE_BODY.contains(&name.as_str()));
                    asked
                })
                .collect(),
            providers: self.provider.take().into_iter().map(|r| asked(r, port)).collect(),
            grpc: std::mem::take(&mut *self.grpc.lock().unwrap())
                .into_iter()
                .map(|c| normal(c, port))
                .collect(),
        }
    }
}

/// Whether the bytes of a connection come through.
async fn echoes(port: u16) -> bool {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    let mut back = [0u8; 4];
    let read = tokio::time::timeout(Duration::from_secs(30), stream.read_exact(&mut back));
    matches!(read.await.expect("an end or an echo"), Ok(4))
}

/// Header changes that cannot be made: Envoy finds out when it writes the request and answers 503 with a text about its
/// filters; Mantlet answers 503 at once. Nobody but the client sees a difference.
fn only_status(case: &str, seen: &mut Seen) {
    if case.starts_with("bad-") {
        seen.body.clear();
        seen.headers.clear();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_and_mantlet_do_the_same_with_external_authorizers() {
    let dir = tempfile::tempdir().unwrap();
    let (grpc_address, grpc_seen) = grpc(grpc_answer).await;
    let (yes_address, yes_seen) = grpc(|_| {
        Ok(CheckResponse {
            status: Some(RpcStatus::default()),
            ..CheckResponse::default()
        })
    })
    .await;
    let bench = Bench {
        app: EchoServer::start().await,
        provider: EchoServer::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), None, http_answer),
        grpc: grpc_seen,
    };
    let tcp_app = TcpEcho::start(b"").await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();

    let setups = setups();
    let count = setups.len() + TCP.len();
    let (theirs, ours) = (launch::ports(count), launch::ports(count));
    let snapshot = |ports: &[u16], log: &Path| {
        let mut out = ProxySnapshot::default();
        for (setup, port) in setups.iter().zip(ports) {
            let made = listener(setup.name, *port, http_filters(setup, log));
            out.listeners.insert(setup.name.into(), Arc::new(made));
        }
        for (index, (cluster, fail_open, _)) in TCP.iter().enumerate() {
            let name = format!("tcp-{index}");
            let made = listener(&name, ports[setups.len() + index], tcp_filters(cluster, *fail_open));
            out.listeners.insert(name, Arc::new(made));
        }
        for (name, address, protocol) in [
            ("app", bench.app.address(), UpstreamProtocol::Http1),
            ("tcp-app", tcp_app.address(), UpstreamProtocol::Http1),
            ("http-provider", bench.provider.address(), UpstreamProtocol::Http1),
            ("grpc-provider", grpc_address, UpstreamProtocol::Http2),
            ("grpc-yes", yes_address, UpstreamProtocol::Http2),
            ("nobody", nobody, UpstreamProtocol::Http2),
        ] {
            out.clusters
                .insert(name.into(), Arc::new(fixed_cluster(name, address, protocol)));
        }
        assert_eq!(out.dangling(), []);
        out
    };

    // Envoy.
    let their_log = dir.path().join("envoy-access.log");
    let options = Options::new(Dialect::PlainEnvoy);
    let set = ResourceSet::new(&snapshot(&theirs, &their_log), vec![], &options, None);
    let mut envoy = launch::Running::start(dir.path(), set, true).await;
    envoy
        .all_accepted(&[ResourceType::Listener, ResourceType::Cluster])
        .await;

    // Mantlet, through the same wire format.
    let our_log = dir.path().join("mantlet-access.log");
    let mut snapshot = snapshot(&ours, &our_log);
    for listener in snapshot.listeners.values_mut() {
        let back = decode::listener(&encode::listener(listener, &options)).unwrap();
        *listener = Arc::new(back);
    }
    let telemetry = Telemetry::new(Registry::new(), PeerLabels::unknown(), "test").expect("a thread");
    let tuning = Tuning {
        workers: 1,
        ..Tuning::default()
    };
    let shared = Shared::new(tuning, Arc::new(|tcp| tcp.local_addr()), telemetry);
    let threads = shared.start().unwrap();
    shared.apply(Config::compile(Arc::new(snapshot), 1, &Default::default()).unwrap());
    assert_eq!(shared.applied(1).await, 0);

    let mut compared = 0;
    let mut wrong = Vec::new();
    for (index, setup) in setups.iter().enumerate() {
        for (case, target, arguments) in requests() {
            let mut envoy = bench.send(theirs[index], case, target, &arguments).await;
            let mut mantlet = bench.send(ours[index], case, target, &arguments).await;
            compared += 1;
            only_status(case, &mut envoy);
            only_status(case, &mut mantlet);
            if envoy != mantlet {
                wrong.push(format!(
                    "{} / {case} {target} {arguments:?}\n  Envoy   {envoy:?}\n  Mantlet {mantlet:?}",
                    setup.name
                ));
            }
        }
    }
    for (index, (cluster, fail_open, want)) in TCP.iter().enumerate() {
        let at = setups.len() + index;
        let got = (echoes(theirs[at]).await, echoes(ours[at]).await);
        assert_eq!(got, (*want, *want), "TCP, {cluster}, open {fail_open}");
    }
    let said: Vec<CheckRequest> = std::mem::take(&mut *yes_seen.lock().unwrap());
    assert_eq!(said.len(), 2, "each asked once");
    let said: Vec<_> = said.into_iter().map(|c| normal(c, 0)).collect();
    if said[0] != said[1] {
        wrong.push(format!("TCP\n  Envoy   {:?}\n  Mantlet {:?}", said[0], said[1]));
    }

    envoy.stop();
    shared.set_phase(Phase::Stopping);
    tokio::task::spawn_blocking(|| threads.into_iter().for_each(|t| t.join().unwrap()))
        .await
        .unwrap();
    drop(shared);
    let read = |path: &Path| -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(str::to_string).collect()
    };
    let logs = mantlet_testkit::eventually("access logs are complete", Duration::from_secs(60), || async {
        let (theirs, ours) = (read(&their_log), read(&our_log));
        if theirs.len() >= compared && ours.len() >= compared {
            Ok((theirs, ours))
        } else {
            Err((theirs.len(), ours.len(), wrong.join("\n")))
        }
    })
    .await;
    assert_eq!(
        (logs.0.len(), logs.1.len()),
        (compared, compared),
        "one line per request"
    );
    for (envoy, mantlet) in logs.0.iter().zip(&logs.1) {
        if envoy != mantlet && !envoy.starts_with("bad-") {
            wrong.push(format!("log\n  Envoy   {envoy}\n  Mantlet {mantlet}"));
        }
    }
    println!(
        "{compared} requests and {} lines of the access log compared",
        logs.0.len()
    );
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared > 400, "{compared}");
}
