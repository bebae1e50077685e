//! A client proxy and a server proxy with real sockets and real mTLS before a real application.

mod common;

use common::*;
use mantlet_model::authz::{Attribute, Expr, Matcher};
use mantlet_testkit::{EchoServer, TcpEcho, TestCa};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn a_request_crosses_the_mesh_with_mtls_and_identity() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let url = format!("http://{}/a/../hello?x=1", mesh.entry());
    let answer = curl(&[
        "--path-as-is",
        "-H",
        "Host: web",
        "-H",
        "x-forwarded-client-cert: URI=forged",
        &url,
    ])
    .await;
    assert_eq!(
        (answer.code, answer.status),
        (0, 200),
        "{} {}",
        answer.error,
        answer.headers
    );
    assert_eq!(answer.body, "/hello?x=1");
    assert!(answer.headers.contains("server: envoy"), "{}", answer.headers);
    assert!(answer.headers.contains("x-envoy-upstream-service-time:"));
    assert!(!answer.headers.contains("x-envoy-peer-metadata"));

    let seen = app.take();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].host, "web");
    assert_eq!(seen[0].peer.ip().to_string(), "127.0.0.6");
    let xfcc = seen[0].headers["x-forwarded-client-cert"].to_str().unwrap();
    let want = format!("By={SERVER_SA};Hash=");
    assert!(xfcc.starts_with(&want), "{xfcc}");
    assert!(xfcc.ends_with(&format!(";Subject=\"\";URI={CLIENT_SA}")), "{xfcc}");
    assert!(!seen[0].headers.contains_key("x-envoy-peer-metadata"));
    assert_eq!(seen[0].headers["x-request-id"].len(), 36);

    let server = mesh.server.metrics();
    let line = server
        .lines()
        .find(|l| l.starts_with("istio_requests_total"))
        .unwrap_or_else(|| panic!("no istio_requests_total in\n{server}"));
    for part in [
        "reporter=\"destination\"",
        "source_workload=\"sleep\"",
        &format!("source_principal=\"{CLIENT_SA}\""),
        &format!("destination_principal=\"{SERVER_SA}\""),
        "connection_security_policy=\"mutual_tls\"",
        "response_code=\"200\"",
        "destination_service=\"web.default.svc.cluster.local\"",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    assert!(line.ends_with(" 1"), "{line}");
    let client = mesh.client.metrics();
    let line = client.lines().find(|l| l.starts_with("istio_requests_total")).unwrap();
    for part in [
        "reporter=\"source\"",
        "destination_workload=\"web\"",
        "connection_security_policy=\"unknown\"",
        &format!("destination_principal=\"{SERVER_SA}\""),
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

/// What a caller sees, by the table of SEMANTICS 1c.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Served,
    Reset,
    HandshakeFailed,
    BadRequest,
}

async fn plain_http(mesh: &Mesh) -> Seen {
    let answer = curl(&[&format!("http://{}/", mesh.inbound.listen)]).await;
    match (answer.code, answer.status) {
        (0, 200) => Seen::Served,
        (0, 400) => Seen::BadRequest,
        (56, _) => Seen::Reset,
        other => panic!("{other:?}: {}", answer.error),
    }
}

/// HTTPS without a client certificate.
async fn plain_tls(mesh: &Mesh) -> Seen {
    let answer = curl(&["-k", &format!("https://{}/", mesh.inbound.listen)]).await;
    match (answer.code, answer.status) {
        (0, 200) => Seen::Served,
        // 35: TLS error; 56: TLS 1.3 clients may learn of the missing certificate on their first read.
        (35, _) if answer.error.contains("reset") || answer.error.contains("SYSCALL") => Seen::Reset,
        (35 | 56, _) => Seen::HandshakeFailed,
        other => panic!("{other:?}: {}", answer.error),
    }
}

async fn mesh_call(mesh: &Mesh) -> u16 {
    curl(&["-H", "Host: web", &format!("http://{}/", mesh.entry())])
        .await
        .status
}

#[tokio::test]
async fn peer_authentication_modes_follow_the_table() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    for (port, mode, plain, tls) in [
        (Port::Http, Mode::Disable, Seen::Served, None),
        (Port::Http, Mode::Permissive, Seen::Served, Some(Seen::Reset)),
        (Port::Http, Mode::Strict, Seen::Reset, Some(Seen::HandshakeFailed)),
        (Port::Auto, Mode::Disable, Seen::Served, None),
        (Port::Auto, Mode::Permissive, Seen::Served, None),
        (Port::Auto, Mode::Strict, Seen::Reset, Some(Seen::HandshakeFailed)),
        (Port::Tcp, Mode::Disable, Seen::Served, None),
        (Port::Tcp, Mode::Permissive, Seen::Served, None),
        (Port::Tcp, Mode::Strict, Seen::Reset, Some(Seen::HandshakeFailed)),
    ] {
        mesh.inbound.port = port;
        mesh.inbound.mode = mode;
        mesh.outbound.mtls = mode != Mode::Disable;
        mesh.apply().await;
        assert_eq!(plain_http(&mesh).await, plain, "plaintext to {port:?} {mode:?}");
        if let Some(want) = tls {
            assert_eq!(plain_tls(&mesh).await, want, "TLS to {port:?} {mode:?}");
        }
        assert_eq!(mesh_call(&mesh).await, 200, "mesh call to {port:?} {mode:?}");
    }
}

#[tokio::test]
async fn tls_of_the_application_passes_a_permissive_tcp_port_untouched() {
    let ca = TestCa::new("example.org");
    let cert = ca.host(&["app.example.org"]);
    let tls = cert
        .identity
        .server(&mantlet_identity::ServerTlsOptions {
            client_auth: mantlet_identity::ClientAuth::None,
            alpn: vec![],
            min_tls13: false,
        })
        .unwrap();
    let app = EchoServer::start_tls(tls).await;
    for port in [Port::Tcp, Port::Auto] {
        for mode in [Mode::Permissive, Mode::Disable] {
            let mesh = Mesh::new(app.address(), port, mode).await;
            assert_eq!(plain_tls(&mesh).await, Seen::Served, "{port:?} {mode:?}");
        }
    }
}

#[tokio::test]
async fn authorization_denies_with_istios_answers() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    let peer = |uri: &str| Expr::atom(Attribute::PeerUri, Matcher::Exact(uri.into()));
    mesh.inbound.authz = allow(Expr::And(vec![
        peer(CLIENT_SA),
        Expr::atom(Attribute::Path, Matcher::Prefix("/open".into())),
    ]));
    mesh.apply().await;
    let entry = mesh.entry();
    let open = curl(&["-H", "Host: web", &format!("http://{entry}/open")]).await;
    assert_eq!(open.status, 200, "{}", open.headers);
    let closed = curl(&[
        "-H",
        "Host: web",
        "--path-as-is",
        &format!("http://{entry}/open/../closed"),
    ])
    .await;
    assert_eq!((closed.status, closed.body.as_str()), (403, "RBAC: access denied"));
    assert!(closed.headers.contains("content-length: 19"));
    assert!(closed.headers.contains("content-type: text/plain"));
    // The server's answer, seen directly: plaintext has no identity.
    let plain = curl(&[&format!("http://{}/open", mesh.inbound.listen)]).await;
    assert_eq!((plain.status, plain.body.as_str()), (403, "RBAC: access denied"));
    assert!(plain.headers.contains("server: istio-envoy"), "{}", plain.headers);
    let grpc = curl(&[
        "-H",
        "content-type: application/grpc",
        "-X",
        "POST",
        &format!("http://{}/open", mesh.inbound.listen),
    ])
    .await;
    assert_eq!(grpc.status, 200);
    assert!(grpc.headers.contains("grpc-status: 7"), "{}", grpc.headers);
    assert!(grpc.headers.contains("grpc-message: rbac: access denied"));
    assert_eq!(app.take().len(), 1, "only the allowed request reached the application");
    let denials = mesh.server.shared.telemetry.denials();
    assert_eq!(denials.len(), 3);
    assert_eq!(denials[0].source_principal.as_deref(), Some(CLIENT_SA));
    assert_eq!(denials[0].path, "/closed");
    assert_eq!(denials[0].details, "rbac_access_denied_matched_policy[none]");
    assert!(mesh.server.metrics().contains("envoy_http_rbac_denied 3"));
    // What the nearest rule missed by is for operators only.
    let near = |index: usize| denials[index].nearest.as_ref().expect("a near miss");
    assert_eq!(near(0).failed, ["the path is \"/closed\"; paths wants \"/open*\""]);
    assert!(
        near(1).failed[0].starts_with("the client has no identity (plaintext); principals wants"),
        "{:?}",
        near(1).failed
    );
    let rule = near(0).rule.as_str();
    for answer in [&closed, &plain, &grpc] {
        for secret in [rule, "nearest", "policy[", "wants", "x-mantlet"] {
            assert!(
                !answer.headers.contains(secret) && !answer.body.contains(secret),
                "{secret} in {}{}",
                answer.headers,
                answer.body
            );
        }
    }
    assert!(
        mesh.server
            .metrics()
            .contains(r#"mantlet_authz_decisions_total{action="ALLOW",policy="none",rule="none",outcome="denied"} 3"#),
        "{}",
        mesh.server.metrics()
    );
}

#[tokio::test]
async fn a_denied_tcp_connection_is_closed_not_reset() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Tcp, Mode::Permissive).await;
    mesh.inbound.authz = allow(Expr::atom(Attribute::PeerUri, Matcher::Exact(CLIENT_SA.into())));
    mesh.apply().await;
    let denied = curl(&[&format!("http://{}/", mesh.inbound.listen)]).await;
    assert_eq!(denied.code, 52, "{}", denied.error);
    assert_eq!(mesh_call(&mesh).await, 200);
    assert_eq!(app.take().len(), 1);
}

#[tokio::test]
async fn the_client_refuses_a_server_with_another_name() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    mesh.outbound.sans = vec!["spiffe://cluster.local/ns/default/sa/other".into()];
    mesh.apply().await;
    let answer = curl(&["-H", "Host: web", &format!("http://{}/", mesh.entry())]).await;
    assert_eq!(answer.status, 503);
    assert!(
        answer.body.starts_with(
            "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure, transport failure reason: TLS_error:|CERTIFICATE_VERIFY_FAILED"
        ),
        "{}",
        answer.body
    );
    assert!(app.take().is_empty());
}

#[tokio::test]
async fn a_foreign_authority_is_refused_on_both_sides() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let foreign = TestCa::new("cluster.local");
    mesh.client.identity(&foreign, "sleep");
    assert_eq!(mesh_call(&mesh).await, 503);
    mesh.client.identity(&mesh.ca, "sleep");
    assert_eq!(mesh_call(&mesh).await, 200);
    mesh.server.identity(&foreign, "web");
    // The pooled connection was made before; the swap renews it.
    let answer = curl(&["-H", "Host: web", &format!("http://{}/", mesh.entry())]).await;
    assert!(matches!(answer.status, 200 | 503));
    mesh.client.identity(&mesh.ca, "sleep");
    mantlet_testkit::eventually(
        "the foreign server is refused",
        std::time::Duration::from_secs(5),
        || async {
            match mesh_call(&mesh).await {
                503 => Ok(()),
                other => Err(other),
            }
        },
    )
    .await;
}

#[tokio::test]
async fn tcp_bytes_flow_both_ways_and_half_closed_connections_stay_open() {
    let app = TcpEcho::start(b"hello\n").await;
    let mesh = Mesh::new(app.address(), Port::Tcp, Mode::Strict).await;
    let mut client = TcpStream::connect(mesh.entry()).await.unwrap();
    let mut greeting = [0u8; 6];
    client.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"hello\n");
    let data = vec![7u8; 3 << 20];
    let (mut read, mut write) = client.split();
    let (sent, received) = tokio::join!(
        async {
            write.write_all(&data).await.unwrap();
            write.shutdown().await.unwrap();
            data.len()
        },
        async {
            let mut all = Vec::new();
            read.read_to_end(&mut all).await.unwrap();
            all
        }
    );
    assert_eq!(sent, received.len());
    assert_eq!(received, data);
    let metrics = mesh.server.metrics();
    for name in [
        "istio_tcp_connections_opened_total",
        "istio_tcp_connections_closed_total",
        "istio_tcp_sent_bytes_total",
        "istio_tcp_received_bytes_total",
    ] {
        assert!(metrics.contains(name), "{name}");
    }
}

#[tokio::test]
async fn unknown_hosts_and_ports_pass_through_to_their_original_destination() {
    let app = EchoServer::start().await;
    let outside = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    // A port that no listener stands for: raw bytes to the original destination.
    *mesh.client.destination.lock().unwrap() = outside.address();
    let answer = curl(&["-H", "Host: nowhere.example", &format!("http://{}/raw", mesh.entry())]).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "/raw"));
    assert_eq!(outside.take().len(), 1);
    assert!(app.take().is_empty());
}

#[tokio::test]
async fn faults_have_envoys_texts() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    mesh.outbound.endpoints = vec![];
    mesh.apply().await;
    let url = format!("http://{}/", mesh.entry());
    let none = curl(&["-H", "Host: web", &url]).await;
    assert_eq!((none.status, none.body.as_str()), (503, "no healthy upstream"));
    mesh.outbound.endpoints = vec![free_address()];
    mesh.apply().await;
    let refused = curl(&["-H", "Host: web", &url]).await;
    assert_eq!(refused.status, 503);
    assert_eq!(
        refused.body,
        "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure, transport failure reason: delayed connect error: Connection refused"
    );
    let old = curl(&["--http1.0", "-H", "Host: web", &url]).await;
    assert_eq!(old.status, 426);
    let nul = curl(&["-H", "Host: web", &format!("{url}a%00b")]).await;
    assert_eq!(nul.status, 400);
}

#[tokio::test]
async fn the_access_log_follows_the_mesh_configuration() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("access.log");
    let mut snapshot = mesh.inbound.snapshot();
    let fields = [
        ("code", "%RESPONSE_CODE%"),
        ("who", "%DOWNSTREAM_PEER_URI_SAN%"),
        ("what", "%REQ(:METHOD)% %REQ(:PATH)% %REQ(X-COLOUR)%"),
        ("sni", "%REQUESTED_SERVER_NAME%"),
        ("failure", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ];
    let log = mantlet_model::listener::AccessLog {
        path: file.display().to_string(),
        format: String::new(),
        json: fields.map(|(a, b)| (a.to_string(), b.to_string())).into(),
    };
    for listener in snapshot.listeners.values_mut() {
        for chain in &mut std::sync::Arc::make_mut(listener).chains {
            if let mantlet_model::listener::Filters::Http(http) = &mut chain.filters {
                http.access_log = Some(log.clone());
            }
        }
    }
    mesh.server.apply(snapshot).await;
    let url = format!("http://{}/path?q", mesh.entry());
    assert_eq!(
        curl(&["-H", "Host: web", "-H", "x-colour: red", &url]).await.status,
        200
    );
    let line = mantlet_testkit::eventually("the line is written", std::time::Duration::from_secs(5), || async {
        std::fs::read_to_string(&file)
            .map_err(|e| e.to_string())
            .and_then(|t| if t.is_empty() { Err(t) } else { Ok(t) })
    })
    .await;
    assert_eq!(
        line,
        format!(
            "{{\"code\":200,\"who\":\"{CLIENT_SA}\",\"what\":\"GET /path?q red\",\"sni\":\"outbound_.80_._.web.default.svc.cluster.local\",\"failure\":null}}\n"
        )
    );
}

#[tokio::test]
async fn a_tcp_connection_does_not_outlive_its_permission() {
    let app = TcpEcho::start(b"").await;
    let mut mesh = Mesh::new(app.address(), Port::Tcp, Mode::Strict).await;
    let only = |uri: &str| allow(Expr::atom(Attribute::PeerUri, Matcher::Exact(uri.into())));
    mesh.inbound.authz = only(CLIENT_SA);
    mesh.apply().await;
    let mut client = TcpStream::connect(mesh.entry()).await.unwrap();
    let mut byte = [0u8; 1];
    client.write_all(b"a").await.unwrap();
    client.read_exact(&mut byte).await.unwrap();
    // A push that still allows it leaves it alone.
    mesh.inbound.authz = allow(Expr::always());
    mesh.server.apply(mesh.inbound.snapshot()).await;
    client.write_all(b"b").await.unwrap();
    client.read_exact(&mut byte).await.unwrap();
    mesh.inbound.authz = only("spiffe://cluster.local/ns/default/sa/other");
    mesh.server.apply(mesh.inbound.snapshot()).await;
    let limit = std::time::Duration::from_secs(5);
    let end = tokio::time::timeout(limit, client.read(&mut byte))
        .await
        .expect("the connection ends");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn plaintext_connections_end_when_strict_comes() {
    let app = EchoServer::start().await;
    let mut mesh = Mesh::new(app.address(), Port::Http, Mode::Permissive).await;
    let mut client = TcpStream::connect(mesh.inbound.listen).await.unwrap();
    let request = b"GET /kept HTTP/1.1\r\nHost: a\r\n\r\n";
    client.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"/kept") {
        assert!(client.read_buf(&mut answer).await.unwrap() > 0);
    }
    mesh.inbound.mode = Mode::Strict;
    mesh.server.apply(mesh.inbound.snapshot()).await;
    // Whether or not the end has been seen: no further request of this connection reaches the application.
    let _ = client.write_all(request).await;
    let limit = std::time::Duration::from_secs(5);
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(limit, client.read_to_end(&mut rest))
        .await
        .expect("the connection ends");
    assert!(!String::from_utf8_lossy(&rest).contains("200 OK"));
    assert_eq!(app.take().len(), 1);
}
