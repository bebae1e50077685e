//! The truth tables of SEMANTICS 1c, by simulation: what a call reaches in the translated listener.

mod support;

use std::net::SocketAddr;

use mantlet_model::listener::{ConnectionFacts, Filters, Listener, Transport};
use mantlet_model::names;
use support::{add, pod, service, sidecar, world};

/// What happens to a connection.
#[derive(Debug, PartialEq, Clone)]
enum Outcome {
    /// No chain.
    Closed,
    /// Plaintext HTTP, or any bytes in front of an HTTP codec.
    Http(String),
    /// TLS ended here, then HTTP.
    MtlsHttp(String),
    /// Bytes as they are.
    Tcp(String),
    /// TLS ended here, then bytes.
    MtlsTcp(String),
}

/// How a client calls.
#[derive(Clone, Copy, Debug)]
enum Call {
    PlainHttp,
    PlainTcp,
    /// TLS without client certificate, ALPN of a browser.
    ForeignTls,
    /// Mesh mTLS that carries HTTP.
    IstioHttp,
    /// Mesh mTLS that carries TCP.
    IstioTcp,
}

fn call(listener: &Listener, port: u16, call: Call) -> Outcome {
    let tls = listener.tls_inspector.covers(port);
    let http = listener.http_inspector.covers(port);
    // What the inspectors see; without one, bytes are just bytes (S1.43).
    let (transport, protocols): (Transport, Vec<String>) = match call {
        Call::PlainHttp if http => (Transport::Raw, vec!["http/1.1".into()]),
        Call::PlainHttp | Call::PlainTcp => (Transport::Raw, vec![]),
        _ if !tls => (Transport::Raw, vec![]),
        Call::ForeignTls => (Transport::Tls, vec!["h2".into(), "http/1.1".into()]),
        Call::IstioHttp => (
            Transport::Tls,
            vec!["istio-http/1.1".into(), "istio".into(), "http/1.1".into()],
        ),
        Call::IstioTcp => (Transport::Tls, vec!["istio-peer-exchange".into(), "istio".into()]),
    };
    let destination: SocketAddr = format!("10.0.0.1:{port}").parse().unwrap();
    let chosen = listener.choose(&ConnectionFacts {
        destination,
        transport,
        server_name: None,
        application_protocols: &protocols,
    });
    let Some(chain) = chosen else { return Outcome::Closed };
    let cluster = match &chain.filters {
        Filters::Tcp(tcp) => tcp.cluster.clone(),
        Filters::Http(http) => match &http.routes {
            mantlet_model::http::RouteSource::Inline(table) => table.name.clone(),
            mantlet_model::http::RouteSource::Named(name) => name.clone(),
        },
    };
    match (&chain.filters, chain.tls.is_some()) {
        (Filters::Http(_), true) => Outcome::MtlsHttp(cluster),
        (Filters::Http(_), false) => Outcome::Http(cluster),
        (Filters::Tcp(_), true) => Outcome::MtlsTcp(cluster),
        (Filters::Tcp(_), false) => Outcome::Tcp(cluster),
    }
}

/// The inbound listener of a workload with one port 8080 of the given name under a mode, and extra policy fields.
fn listener(port_name: &str, mode: &str, extra: &str) -> Listener {
    let mut world = world(&format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: w}}\nspec:\n  selector: {{matchLabels: {{app: web}}}}\n  mtls: {{mode: {mode}}}\n{extra}"
    ));
    add(&mut world, &pod("web", "default", "10.0.0.1", true));
    for object in service("web", "default", "10.96.0.10", (port_name, 80, 8080), "10.0.0.1") {
        add(&mut world, &object);
    }
    let node = sidecar("web-1", "default", "10.0.0.1", &[]);
    let snapshot = mantlet_translate::translate(&world, &node);
    assert_eq!(snapshot.dangling(), vec![]);
    (*snapshot.listeners[names::VIRTUAL_INBOUND]).clone()
}

fn row(port_name: &str, port: u16, what: Call) -> [Outcome; 3] {
    ["DISABLE", "PERMISSIVE", "STRICT"].map(|mode| call(&listener(port_name, mode, ""), port, what))
}

use Call::{ForeignTls, IstioHttp, IstioTcp, PlainHttp, PlainTcp};
use Outcome::Closed;

const PORT: &str = "inbound|8080||";

fn http() -> Outcome {
    Outcome::Http(PORT.into())
}
fn mtls_http() -> Outcome {
    Outcome::MtlsHttp(PORT.into())
}
fn tcp() -> Outcome {
    Outcome::Tcp(PORT.into())
}
fn mtls_tcp() -> Outcome {
    Outcome::MtlsTcp(PORT.into())
}

#[test]
fn tcp_port() {
    assert_eq!(row("tcp", 8080, PlainTcp), [tcp(), tcp(), Closed]);
    assert_eq!(row("tcp", 8080, PlainHttp), [tcp(), tcp(), Closed]);
    // STRICT terminates, and the handshake fails for want of a client certificate.
    assert_eq!(row("tcp", 8080, ForeignTls), [tcp(), tcp(), mtls_tcp()]);
    assert_eq!(row("tcp", 8080, IstioTcp), [tcp(), mtls_tcp(), mtls_tcp()]);
}

#[test]
fn http_port() {
    assert_eq!(row("http", 8080, PlainHttp), [http(), http(), Closed]);
    assert_eq!(
        row("http", 8080, PlainTcp),
        [http(), http(), Closed],
        "a codec error, or closed"
    );
    assert_eq!(row("http", 8080, ForeignTls), [http(), Closed, mtls_http()]);
    assert_eq!(row("http", 8080, IstioHttp), [http(), mtls_http(), mtls_http()]);
    assert_eq!(row("http", 8080, IstioTcp), [http(), mtls_http(), mtls_http()]);
}

#[test]
fn auto_port() {
    assert_eq!(row("web", 8080, PlainHttp), [http(), http(), Closed]);
    assert_eq!(row("web", 8080, PlainTcp), [tcp(), tcp(), Closed]);
    assert_eq!(row("web", 8080, ForeignTls), [tcp(), tcp(), mtls_tcp()]);
    assert_eq!(row("web", 8080, IstioHttp), [tcp(), mtls_http(), mtls_http()]);
    assert_eq!(row("web", 8080, IstioTcp), [tcp(), mtls_tcp(), mtls_tcp()]);
}

#[test]
fn port_in_no_service() {
    let passthrough = || names::INBOUND_PASSTHROUGH.to_string();
    for name in ["http", "tcp", "web"] {
        assert_eq!(
            row(name, 7000, PlainTcp),
            [Outcome::Tcp(passthrough()), Outcome::Tcp(passthrough()), Closed],
            "{name}"
        );
        assert_eq!(
            row(name, 7000, IstioHttp),
            [
                Outcome::Tcp(passthrough()),
                Outcome::MtlsHttp(passthrough()),
                Outcome::MtlsHttp(passthrough())
            ]
        );
        assert_eq!(
            row(name, 7000, IstioTcp),
            [
                Outcome::Tcp(passthrough()),
                Outcome::MtlsTcp(passthrough()),
                Outcome::MtlsTcp(passthrough())
            ]
        );
        assert_eq!(row(name, 7000, PlainHttp)[2], Closed);
    }
}

#[test]
fn the_capture_port_itself_is_a_black_hole() {
    for mode in ["DISABLE", "PERMISSIVE", "STRICT"] {
        for what in [PlainTcp, ForeignTls, IstioHttp] {
            assert_eq!(
                call(&listener("http", mode, ""), 15006, what),
                Outcome::Tcp(names::BLACK_HOLE.into())
            );
        }
    }
}

#[test]
fn port_level_modes() {
    // S1.49, without a Sidecar: a declared port and one that no service declares.
    let listener = listener(
        "http",
        "STRICT",
        "  portLevelMtls: {8080: {mode: DISABLE}, 9090: {mode: DISABLE}}\n",
    );
    assert_eq!(call(&listener, 8080, PlainHttp), http());
    assert_eq!(call(&listener, 8080, IstioHttp), http(), "undecrypted, a codec error");
    let passthrough = Outcome::Tcp(names::INBOUND_PASSTHROUGH.into());
    assert_eq!(call(&listener, 9090, PlainTcp), passthrough);
    assert_eq!(call(&listener, 9090, ForeignTls), passthrough);
    assert_eq!(call(&listener, 7000, PlainTcp), Closed);
}

#[test]
fn a_strict_port_under_a_disabled_workload() {
    let listener = listener("tcp", "DISABLE", "  portLevelMtls: {8080: {mode: STRICT}}\n");
    assert_eq!(call(&listener, 8080, PlainTcp), Closed);
    assert_eq!(call(&listener, 8080, IstioTcp), mtls_tcp());
    let passthrough = Outcome::Tcp(names::INBOUND_PASSTHROUGH.into());
    assert_eq!(
        call(&listener, 7000, ForeignTls),
        passthrough,
        "TLS of others passes untouched"
    );
    assert_eq!(call(&listener, 7000, PlainTcp), passthrough);
}

#[test]
fn mtls_chains_demand_client_certificates_of_the_mesh() {
    for mode in ["PERMISSIVE", "STRICT"] {
        for name in ["http", "tcp", "web"] {
            let listener = listener(name, mode, "");
            let mut seen = 0;
            for tls in listener.all_chains().filter_map(|c| c.tls.as_ref()) {
                seen += 1;
                assert!(tls.require_client_certificate, "S1.20");
                assert_eq!(tls.trust_bundle.as_deref(), Some("ROOTCA"));
                let sans: Vec<_> = tls.client_sans.iter().collect();
                assert_eq!(sans.len(), 1);
                assert!(sans[0].matches("spiffe://cluster.local/ns/a/sa/b"));
                assert!(!sans[0].matches("spiffe://cluster.local.evil/ns/a/sa/b"), "S1.25");
            }
            assert!(seen >= 2, "{name} {mode}");
        }
    }
}
