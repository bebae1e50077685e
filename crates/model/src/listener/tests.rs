//! The truth tables of SEMANTICS 1c, read through [`Listener::choose`].

use super::*;

fn chain(name: &str, port: Option<u16>, transport: Option<Transport>, alpn: &[&str]) -> FilterChain {
    FilterChain {
        name: name.into(),
        matches: ChainMatch {
            destination_port: port,
            transport,
            application_protocols: alpn.iter().map(|s| s.to_string()).collect(),
            ..ChainMatch::default()
        },
        tls: None,
        filters: Filters::Tcp(TcpManager {
            stat_prefix: name.into(),
            custom: Vec::new(),
            authz: vec![],
            cluster: "c".into(),
            idle_timeout_ms: None,
            telemetry: false,
        }),
    }
}

fn listener(chains: Vec<FilterChain>) -> Listener {
    Listener {
        name: "virtualInbound".into(),
        address: "0.0.0.0:15006".parse().unwrap(),
        bind_to_port: true,
        use_original_dst: false,
        direction: Direction::Inbound,
        chains,
        default_chain: None,
        tls_inspector: Inspector::Except(vec![]),
        http_inspector: Inspector::Except(vec![]),
        detection_timeout_ms: 0,
        access_log: None,
    }
}

fn pick(l: &Listener, port: u16, transport: Transport, alpn: &[&str]) -> Option<String> {
    let alpn: Vec<String> = alpn.iter().map(|s| s.to_string()).collect();
    let facts = ConnectionFacts {
        destination: SocketAddr::new([10, 0, 0, 1].into(), port),
        transport,
        server_name: None,
        application_protocols: &alpn,
    };
    l.choose(&facts).map(|c| c.name.clone())
}

#[test]
fn strict_http_port_refuses_plaintext() {
    let l = listener(vec![
        chain("mtls", Some(3000), Some(Transport::Tls), &[]),
        chain("all", None, Some(Transport::Raw), &[]),
    ]);
    assert_eq!(
        pick(&l, 3000, Transport::Tls, &["istio-http/1.1"]).as_deref(),
        Some("mtls")
    );
    // The port has a chain of its own, so the catch-all chain is never reached.
    assert_eq!(pick(&l, 3000, Transport::Raw, &["http/1.1"]), None);
    assert_eq!(pick(&l, 3001, Transport::Raw, &[]).as_deref(), Some("all"));
}

#[test]
fn permissive_decides_by_istio_alpn() {
    let istio = [
        "istio-http/1.0",
        "istio-http/1.1",
        "istio-h2",
        "istio-peer-exchange",
        "istio",
    ];
    let l = listener(vec![
        chain("mtls", Some(3000), Some(Transport::Tls), &istio),
        chain("tls", Some(3000), Some(Transport::Tls), &[]),
        chain("raw", Some(3000), Some(Transport::Raw), &[]),
    ]);
    assert_eq!(pick(&l, 3000, Transport::Tls, &["istio", "x"]).as_deref(), Some("mtls"));
    assert_eq!(pick(&l, 3000, Transport::Tls, &["h2"]).as_deref(), Some("tls"));
    assert_eq!(pick(&l, 3000, Transport::Tls, &[]).as_deref(), Some("tls"));
    assert_eq!(pick(&l, 3000, Transport::Raw, &[]).as_deref(), Some("raw"));
}

#[test]
fn server_names_prefer_the_longest() {
    let mut exact = chain("exact", None, None, &[]);
    exact.matches.server_names = vec!["a.example.com".into()];
    let mut wild = chain("wild", None, None, &[]);
    wild.matches.server_names = vec!["*.example.com".into()];
    let l = listener(vec![wild, exact, chain("any", None, None, &[])]);
    let choose = |name: Option<&str>| {
        let facts = ConnectionFacts {
            destination: "10.0.0.1:443".parse().unwrap(),
            transport: Transport::Tls,
            server_name: name,
            application_protocols: &[],
        };
        l.choose(&facts).unwrap().name.clone()
    };
    assert_eq!(choose(Some("a.example.com")), "exact");
    assert_eq!(choose(Some("b.example.com")), "wild");
    assert_eq!(choose(Some(".example.com")), "any");
    assert_eq!(choose(None), "any");
}
