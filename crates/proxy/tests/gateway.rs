//! Gateway mode: own sockets, TLS with an operator's certificate, routes by host, and mTLS into the mesh.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;

use common::*;
use mantlet_model::http::{ForwardedClientCert, RouteSource};
use mantlet_model::listener::*;
use mantlet_model::names::Direction;
use mantlet_model::route::*;
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_model::tls::ServerTls;
use mantlet_testkit::{EchoServer, TestCa};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

struct Gateway {
    http: SocketAddr,
    https: SocketAddr,
}

impl Gateway {
    fn snapshot(&self, mesh: &Mesh) -> ProxySnapshot {
        let cluster = mesh.outbound.cluster_name();
        let mut out = mesh.outbound.snapshot();
        out.listeners.clear();
        let mut table = table(
            "http.8080",
            &["shop.example.com"],
            forward_to(&cluster, Some(default_retry())),
        );
        Arc::make_mut(&mut table.hosts[0]).routes.insert(
            0,
            Route {
                name: "old".into(),
                matches: RouteMatch {
                    path: PathMatch::SegmentPrefix("/old".into()),
                    ..RouteMatch::default()
                },
                action: RouteAction::Redirect(Redirect {
                    https: true,
                    status: 301,
                    path: Some("/new".into()),
                    ..Redirect::default()
                }),
                decorator: String::new(),
                request_headers: vec![],
                response_headers: vec![],
            },
        );
        Arc::make_mut(&mut table.hosts[0]).routes.insert(
            0,
            Route {
                name: "api".into(),
                matches: RouteMatch {
                    path: PathMatch::Prefix("/api/".into()),
                    ..RouteMatch::default()
                },
                action: RouteAction::Forward(Forward {
                    clusters: vec![(cluster.clone(), 100)],
                    prefix_rewrite: Some("/".into()),
                    host_rewrite: Some("web".into()),
                    timeout_ms: 5_000,
                    retry: None,
                }),
                decorator: String::new(),
                request_headers: vec![HeaderChange::Set("x-from".into(), "gateway".into())],
                response_headers: vec![HeaderChange::Remove("date".into())],
            },
        );
        out.routes.insert(table.name.clone(), Arc::new(table));
        let chain = |tls: Option<ServerTls>| {
            let mut manager = http_manager(RouteSource::Named("http.8080".into()), false, vec![]);
            manager.server_name = "istio-envoy".into();
            manager.use_remote_address = true;
            manager.forwarded_client_cert = ForwardedClientCert::SanitizeSet;
            FilterChain {
                name: "main".into(),
                matches: ChainMatch {
                    server_names: tls.iter().map(|_| "shop.example.com".to_string()).collect(),
                    ..ChainMatch::default()
                },
                tls,
                filters: Filters::Http(Box::new(manager)),
            }
        };
        for (name, address, tls) in [
            ("0.0.0.0_8080", self.http, None),
            ("0.0.0.0_8443", self.https, Some(edge::host_tls("shop.example.com"))),
        ] {
            let inspect = tls.is_some();
            let listener = edge::listener(name, address, Direction::Outbound, inspect, vec![chain(tls)]);
            out.listeners.insert(name.into(), Arc::new(listener));
        }
        out
    }
}

#[tokio::test]
async fn a_gateway_routes_by_host_and_brings_its_own_identity() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let gateway = Gateway {
        http: free_address(),
        https: free_address(),
    };
    let proxy = Proxy::start("istio-ingressgateway", 2);
    proxy.identity(&mesh.ca, "istio-ingressgateway-service-account");
    let public = TestCa::new("public");
    let secret = edge::host_secret(&public, "shop.example.com");
    proxy.shared.secrets.set_named(&[secret]).unwrap();
    proxy.apply(gateway.snapshot(&mesh)).await;

    let answer = curl(&[
        "-H",
        "Host: shop.example.com",
        "-H",
        "x-forwarded-client-cert: URI=forged",
        &format!("http://{}/api/items?q=1", gateway.http),
    ])
    .await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, "/items?q=1"),
        "{}",
        answer.headers
    );
    assert!(answer.headers.contains("server: istio-envoy"));
    let seen = app.take().remove(0);
    assert_eq!(seen.host, "web");
    assert_eq!(seen.headers["x-from"], "gateway");
    assert_eq!(seen.headers["x-forwarded-for"], "127.0.0.1");
    assert_eq!(seen.headers["x-forwarded-proto"], "http");
    let xfcc = seen.headers["x-forwarded-client-cert"].to_str().unwrap();
    assert!(xfcc.ends_with("URI=spiffe://cluster.local/ns/default/sa/istio-ingressgateway-service-account"));
    assert!(!xfcc.contains("forged"));

    let unknown = curl(&["-H", "Host: other.example.com", &format!("http://{}/", gateway.http)]).await;
    assert_eq!((unknown.status, unknown.body.as_str()), (404, ""));
    let old = curl(&[
        "-H",
        "Host: shop.example.com",
        &format!("http://{}/old/x", gateway.http),
    ])
    .await;
    assert_eq!(old.status, 301);
    assert!(
        old.headers.contains("location: https://shop.example.com/new"),
        "{}",
        old.headers
    );

    // HTTPS with the operator's certificate, verified as in a browser.
    let config = edge::browser(&public, "http/1.1");
    for (name, want) in [("shop.example.com", true), ("other.example.com", false)] {
        let tcp = TcpStream::connect(gateway.https).await.unwrap();
        let name = ServerName::try_from(name).unwrap();
        let connected = TlsConnector::from(config.clone()).connect(name, tcp).await;
        assert_eq!(connected.is_ok(), want);
        if let Ok(mut tls) = connected {
            let request = b"GET /tls HTTP/1.1\r\nHost: shop.example.com\r\nConnection: close\r\n\r\n";
            tls.write_all(request).await.unwrap();
            let mut answer = String::new();
            tls.read_to_string(&mut answer).await.unwrap();
            assert!(
                answer.starts_with("HTTP/1.1 200") && answer.ends_with("/tls"),
                "{answer}"
            );
            assert_eq!(app.take().remove(0).headers["x-forwarded-proto"], "https");
        }
    }
}
