//! Group B: host, authority, server name, and configuration that the proxy is too old for.

use std::net::SocketAddr;
use std::sync::Arc;

use envoy_types::pb::envoy::config::listener::v3::Listener as ProtoListener;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, http_filter,
};
use mantlet_model::authz::{Action, Attribute, Expr, Matcher};
use mantlet_model::http::RouteSource;
use mantlet_model::listener::*;
use mantlet_model::names::{Direction, VIRTUAL_INBOUND};
use mantlet_model::snapshot::ProxySnapshot;
use mantlet_testkit::{EchoServer, TestCa};
use mantlet_xds::{Dialect, Options, decode, encode};
use prost::Message;
use rustls_pki_types::ServerName;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::common::{Proxy, edge, forward_to, free_address, http_manager, table};
use super::slow::client_hello;
use super::wire::*;

fn host(matcher: Matcher) -> Expr {
    Expr::atom(Attribute::Host, matcher)
}

async fn with_host(site: &Site, name: &str) -> u16 {
    let request = format!("GET /h HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n");
    statuses(&once(site.address(), request.as_bytes()).await)
        .first()
        .copied()
        .unwrap_or(0)
}

async fn with_authority(site: &Site, name: &str) -> Outcome {
    let mut h2 = H2::connect(site.address()).await;
    let fields: [(&[u8], &[u8]); 4] = [
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":authority", name.as_bytes()),
        (b":path", b"/h"),
    ];
    h2.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&fields)))
        .await;
    h2.outcome(1).await
}

/// CVE-2021-39155: hosts are compared without case, for every kind of match and on both versions.
#[tokio::test]
async fn reg_14_case_of_hosts() {
    let mut site = Site::new().await;
    for matcher in [
        Matcher::Exact("evil.com".into()),
        Matcher::Prefix("evil.".into()),
        Matcher::Suffix(".com".into()),
    ] {
        site.rule(Action::Deny, host(matcher.clone())).await;
        for name in ["evil.com", "EVIL.com", "eViL.CoM", "evil.COM"] {
            assert_eq!(with_host(&site, name).await, 403, "{matcher:?} {name}");
            assert_eq!(
                with_authority(&site, name).await,
                Outcome::Status(403),
                "{matcher:?} {name}"
            );
            // An absolute target counts more than Host (RFC 9112 section 3.2.2).
            let absolute = format!("GET http://{name}/h HTTP/1.1\r\nHost: good.org\r\nConnection: close\r\n\r\n");
            assert_eq!(
                statuses(&once(site.address(), absolute.as_bytes()).await),
                [403],
                "{name}"
            );
        }
        assert!(site.app.take().is_empty());
        assert_eq!(with_host(&site, "good.org").await, 200);
        site.app.take();
    }
}

/// ISTIO-SECURITY-2021-008: the port is part of what rules see, as documented: `host` and `host:*` together cover both, and
/// neither a default port nor an odd one slips through the two.
#[tokio::test]
async fn reg_15_ports_in_hosts() {
    let mut site = Site::new().await;
    let both = Expr::Or(vec![
        host(Matcher::Exact("evil.com".into())),
        host(Matcher::Prefix("evil.com:".into())),
    ]);
    site.rule(Action::Deny, both).await;
    for name in [
        "evil.com",
        "evil.com:80",
        "evil.com:443",
        "evil.com:8080",
        "EVIL.com:0",
        "evil.com:",
    ] {
        assert!(matches!(with_host(&site, name).await, 403 | 400), "{name}");
        assert!(with_authority(&site, name).await.is_refusal(), "{name}");
    }
    assert!(site.app.take().is_empty());
    // One host named in two places, differently: refused before any rule.
    let mut h2 = H2::connect(site.address()).await;
    let two = request("GET", "/h", &[(b"host", b"evil.com")]);
    h2.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &two)).await;
    assert_eq!(h2.outcome(1).await, Outcome::Status(400));
    for name in ["", "a b", "a@evil.com", "a,evil.com"] {
        with_host(&site, name).await;
    }
    assert!(
        site.app.take().iter().all(|r| !r.host.contains("evil")),
        "userinfo does not hide a host"
    );
}

/// CVE-2022-21679: a policy of a newer control plane has a field that this proxy does not know. It would mean something
/// else without it, so the configuration is refused, wherever in it the field stands.
#[tokio::test]
async fn reg_16_policies_of_a_newer_control_plane() {
    let site = Site::new().await;
    let mut inbound = site.inbound.snapshot();
    let listener = Arc::make_mut(inbound.listeners.get_mut(VIRTUAL_INBOUND).unwrap());
    for chain in &mut listener.chains {
        if let Filters::Http(http) = &mut chain.filters {
            http.authz = rule(Action::Deny, host(Matcher::Exact("evil.com".into())));
        }
    }
    let any = encode::listener(&inbound.listeners[VIRTUAL_INBOUND], &Options::new(Dialect::Istio));
    decode::listener(&any).expect("as it is, it is understood");
    // Field 1999, a number.
    let mut unknown = Vec::new();
    prost::encoding::encode_key(1999, prost::encoding::WireType::Varint, &mut unknown);
    unknown.push(1);

    let mut whole = any.clone();
    whole.value.extend(&unknown);
    assert!(decode::listener(&whole).is_err(), "in the listener");
    // Inside the manager, and inside its RBAC filter.
    for inside in [false, true] {
        let mut proto = ProtoListener::decode(any.value.as_slice()).unwrap();
        let mut changed = 0;
        for filter in proto.filter_chains.iter_mut().flat_map(|c| &mut c.filters) {
            let Some(ConfigType::TypedConfig(config)) = &mut filter.config_type else {
                continue;
            };
            if !config.type_url.ends_with("HttpConnectionManager") {
                continue;
            }
            changed += 1;
            if !inside {
                config.value.extend(&unknown);
                continue;
            }
            let mut manager = HttpConnectionManager::decode(config.value.as_slice()).unwrap();
            for filter in manager.http_filters.iter_mut().filter(|f| f.name.contains("rbac")) {
                if let Some(http_filter::ConfigType::TypedConfig(rbac)) = &mut filter.config_type {
                    rbac.value.extend(&unknown);
                    changed += 10;
                }
            }
            config.value = manager.encode_to_vec();
        }
        assert!(changed >= if inside { 11 } else { 1 }, "nothing was changed");
        let mut newer = any.clone();
        newer.value = proto.encode_to_vec();
        let error = decode::listener(&newer).expect_err("understood without the field");
        assert!(error.to_string().contains("not understood"), "{error}");
    }
}

fn gateway_listener(address: SocketAddr, chains: Vec<FilterChain>) -> Listener {
    edge::listener("0.0.0.0_8443", address, Direction::Outbound, true, chains)
}

/// A gateway with a chain per host, each with its own certificate, and one route table that knows both hosts: the worst case.
pub(crate) struct Gateway {
    pub app: EchoServer,
    pub address: SocketAddr,
    pub ca: TestCa,
    _proxy: Proxy,
}

impl Gateway {
    pub(crate) async fn start(hosts: &[&str]) -> Gateway {
        let app = EchoServer::start().await;
        // Where `localhost` is.
        let address = SocketAddr::from(([127, 0, 0, 1], mantlet_testkit::free_port()));
        let ca = TestCa::new("public");
        let proxy = Proxy::tuned("gateway", tuning());
        proxy.identity(&TestCa::new("cluster.local"), "gateway");
        let mut secrets = Vec::new();
        let mut chains = Vec::new();
        for name in hosts {
            secrets.push(edge::host_secret(&ca, name));
            let routes = RouteSource::Inline(Box::new(table("all", &["*"], forward_to("app", None))));
            let mut manager = http_manager(routes, false, vec![]);
            manager.use_remote_address = true;
            chains.push(FilterChain {
                name: name.to_string(),
                matches: ChainMatch {
                    server_names: vec![name.to_string()],
                    ..ChainMatch::default()
                },
                tls: Some(edge::host_tls(name)),
                filters: Filters::Http(Box::new(manager)),
            });
        }
        proxy.shared.secrets.set_named(&secrets).unwrap();
        let mut snapshot = ProxySnapshot::default();
        let listener = gateway_listener(address, chains);
        snapshot.listeners.insert(listener.name.clone(), Arc::new(listener));
        snapshot
            .clusters
            .insert("app".into(), Arc::new(edge::app_cluster("app", app.address())));
        proxy.apply(snapshot).await;
        Gateway {
            app,
            address,
            ca,
            _proxy: proxy,
        }
    }

    pub(crate) async fn connect(&self, name: &str, alpn: &str) -> TlsStream<TcpStream> {
        let config = edge::browser(&self.ca, alpn);
        let tcp = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from(name.to_string()).unwrap();
        TlsConnector::from(config).connect(name, tcp).await.unwrap()
    }
}

/// CVE-2020-11767: a request for one host on a connection that was made for another, whose chain may ask for other client
/// certificates and have other rules: 421, and the client makes a connection of its own.
#[tokio::test]
async fn reg_17_connections_are_not_reused_across_hosts() {
    let gateway = Gateway::start(&["a.example.com", "b.example.com"]).await;
    let mut h2 = H2::over(gateway.connect("a.example.com", "h2").await);
    h2.begin().await;
    let mut id = 1;
    for (authority, want) in [
        ("a.example.com", 200),
        ("A.Example.com:443", 200),
        ("b.example.com", 421),
        ("b.example.com:443", 421),
        ("a.example.com.evil.org", 421),
        ("a.example.com", 200),
    ] {
        let fields: [(&[u8], &[u8]); 4] = [
            (b":method", b"GET"),
            (b":scheme", b"https"),
            (b":authority", authority.as_bytes()),
            (b":path", b"/x"),
        ];
        h2.send(&frame(HEADERS, END_HEADERS | END_STREAM, id, &block(&fields)))
            .await;
        assert_eq!(h2.outcome(id).await, Outcome::Status(want), "{authority}");
        id += 2;
    }
    let hosts: Vec<String> = gateway
        .app
        .take()
        .into_iter()
        .map(|r| r.host.to_ascii_lowercase())
        .collect();
    assert!(
        hosts.len() == 3 && hosts.iter().all(|h| h.starts_with("a.example.com")),
        "{hosts:?}"
    );
}

/// CVE-2021-31921: a gateway that passes TLS through does so for the names it exports and for no others: not for names of
/// the mesh's own clusters, not without a name, not without TLS.
#[tokio::test]
async fn reg_18_passthrough_only_to_exported_hosts() {
    let app = mantlet_testkit::TcpEcho::start(b"").await;
    let address = free_address();
    let proxy = Proxy::tuned("gateway", tuning());
    let chain = FilterChain {
        name: "8443-public.example.com".into(),
        matches: ChainMatch {
            server_names: vec!["public.example.com".into()],
            transport: Some(Transport::Tls),
            ..ChainMatch::default()
        },
        tls: None,
        filters: Filters::Tcp(TcpManager {
            stat_prefix: "app".into(),
            custom: vec![],
            authz: vec![],
            cluster: "app".into(),
            idle_timeout_ms: None,
            telemetry: false,
        }),
    };
    let mut snapshot = ProxySnapshot::default();
    let listener = gateway_listener(address, vec![chain]);
    snapshot.listeners.insert(listener.name.clone(), Arc::new(listener));
    snapshot
        .clusters
        .insert("app".into(), Arc::new(edge::app_cluster("app", app.address())));
    proxy.apply(snapshot).await;
    let hello = |name: &'static str| {
        let mut config = rustls::ClientConfig::builder_with_provider(mantlet_identity::tls::mesh_provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        config.enable_sni = !name.is_empty();
        let name = if name.is_empty() { "none.example" } else { name };
        let mut client = rustls::ClientConnection::new(Arc::new(config), name.try_into().unwrap()).unwrap();
        let mut out = Vec::new();
        client.write_tls(&mut out).unwrap();
        out
    };
    for name in [
        "outbound_.80_._.web.default.svc.cluster.local",
        "web.default.svc.cluster.local",
        "sub.public.example.com",
        "example.com",
        "",
    ] {
        assert_eq!(once(address, &hello(name)).await, "", "{name:?}");
    }
    assert_eq!(
        once(address, b"GET / HTTP/1.1\r\nHost: public.example.com\r\n\r\n").await,
        ""
    );
    assert_eq!(app.received().len(), 0, "nothing was connected");
    // The one that is exported comes back from the echo as it was sent.
    let sent = hello("public.example.com");
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(&sent).await.unwrap();
    let mut back = vec![0; sent.len()];
    soon("the echo", tokio::io::AsyncReadExt::read_exact(&mut tcp, &mut back))
        .await
        .unwrap();
    assert_eq!(back, sent);
}

/// CVE-2020-8660: a ClientHello of TLS 1.3 only, in any number of segments and of TLS records, is seen as TLS: with STRICT
/// rules it never ends as plaintext, and its names choose the chain.
#[tokio::test]
async fn reg_20_client_hellos_however_they_come() {
    let mut site = Site::new().await;
    site.inbound.mode = super::common::Mode::Strict;
    site.proxy.apply(site.inbound.snapshot()).await;
    let hello = client_hello();
    let body = &hello[5..];
    // The same handshake message over many records (RFC 8446 section 5.1).
    let records = |size: usize| -> Vec<u8> {
        body.chunks(size)
            .flat_map(|piece| [&[22, 3, 1][..], &(piece.len() as u16).to_be_bytes(), piece].concat())
            .collect()
    };
    let whole: Vec<Vec<u8>> = vec![hello.clone(), records(body.len() / 2 + 1), records(500), records(40)];
    for bytes in &whole {
        assert!(
            is_server_hello(&site, &[bytes]).await,
            "{} bytes in one piece",
            bytes.len()
        );
    }
    // Cut once, at every place of the beginning and at some later ones.
    for cut in (1..60).chain((60..hello.len()).step_by(97)) {
        assert!(
            is_server_hello(&site, &[&hello[..cut], &hello[cut..]]).await,
            "cut at {cut}"
        );
    }
    // GREASE (RFC 8701): unknown versions, groups and extensions change nothing. The list of versions is in the hello once.
    let versions = hello
        .windows(4)
        .position(|w| w == [0, 43, 0, 5] || w == [0, 43, 0, 3])
        .expect("supported_versions");
    let mut grease = hello.clone();
    // The name of the extension's first version is made one that nobody knows; TLS 1.3 or 1.2 is left as the other.
    if grease[versions + 3] == 5 {
        let at = (0..2)
            .map(|n| versions + 5 + 2 * n)
            .find(|at| grease[*at..*at + 2] == [3, 3]);
        if let Some(at) = at {
            grease[at..at + 2].copy_from_slice(&[0x7a, 0x7a]);
        }
    }
    assert!(is_server_hello(&site, &[&grease]).await, "GREASE, and TLS 1.3 only");
    // Plaintext does not pass, whatever it looks like at first.
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
        &[22, 3, 1, 0, 5, 2, 0, 0, 1, 0],
        &[22],
    ] {
        let mut tcp = TcpStream::connect(site.address()).await.unwrap();
        let _ = tcp.write_all(bytes).await;
        let _ = tcp.shutdown().await;
        let answer = on(&mut tcp, b"").await;
        assert!(!answer.contains("HTTP/1.1 200"), "{answer}");
    }
    assert!(site.app.take().is_empty());
}

/// Whether the proxy answers these pieces, sent one by one, with a handshake record.
async fn is_server_hello(site: &Site, pieces: &[&[u8]]) -> bool {
    let mut tcp = TcpStream::connect(site.address()).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    for piece in pieces {
        tcp.write_all(piece).await.unwrap();
        // Segments of their own: the kernel has taken the first when it says so.
        tokio::task::yield_now().await;
    }
    let mut head = [0u8; 6];
    match soon(
        "an answer to a hello",
        tokio::io::AsyncReadExt::read_exact(&mut tcp, &mut head),
    )
    .await
    {
        Ok(_) => head[0] == 22 && head[5] == 2,
        Err(_) => false,
    }
}
