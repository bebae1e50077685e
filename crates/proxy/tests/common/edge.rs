//! Listeners that clients reach directly, without capture: what gateways, and tests of one proxy alone, are made of.

use std::net::SocketAddr;
use std::sync::Arc;

use mantlet_identity::{ClientTlsOptions, ExpectedServer, TlsIdentity};
use mantlet_model::cluster::{Cluster, Discovery};
use mantlet_model::endpoint::{Endpoint, Health};
use mantlet_model::listener::{FilterChain, Inspector, Listener};
use mantlet_model::names::Direction;
use mantlet_model::secret::{KeyBytes, Secret, SecretValue};
use mantlet_model::tls::{ServerTls, TlsVersion};
use mantlet_testkit::TestCa;

/// A cluster of one application that speaks plaintext.
pub fn app_cluster(name: &str, app: SocketAddr) -> Cluster {
    let endpoint = Endpoint {
        address: app.ip().to_string(),
        port: app.port(),
        weight: 1,
        health: Health::Healthy,
        mtls: false,
        mantlet: false,
        workload: None,
    };
    super::cluster(name, Discovery::Static(vec![endpoint]))
}

/// A socket of its own; `inspect` says whether chains are chosen by what a ClientHello says.
pub fn listener(
    name: &str,
    address: SocketAddr,
    direction: Direction,
    inspect: bool,
    chains: Vec<FilterChain>,
) -> Listener {
    Listener {
        name: name.into(),
        address,
        bind_to_port: true,
        use_original_dst: false,
        direction,
        chains,
        default_chain: None,
        tls_inspector: if inspect {
            Inspector::Except(vec![])
        } else {
            Inspector::Off
        },
        http_inspector: Inspector::Off,
        detection_timeout_ms: 0,
        access_log: None,
    }
}

/// Name of the secret with a host's certificate.
fn secret_name(host: &str) -> String {
    format!("kubernetes://{host}")
}

/// An operator's certificate for a host.
pub fn host_secret(ca: &TestCa, host: &str) -> Secret {
    let certificate = ca.host(&[host]);
    let (_, chain) = certificate.response.split_last().expect("a chain");
    Secret {
        name: secret_name(host),
        value: SecretValue::KeyPair {
            chain: chain.concat().into_bytes(),
            key: KeyBytes::new(certificate.key.to_pem().as_bytes().to_vec()),
        },
    }
}

/// TLS with the certificate of [`host_secret`], as a Gateway's `SIMPLE` has it.
pub fn host_tls(host: &str) -> ServerTls {
    ServerTls {
        certificate: secret_name(host),
        trust_bundle: None,
        client_sans: vec![],
        require_client_certificate: false,
        alpn: vec!["h2".into(), "http/1.1".into()],
        min_version: TlsVersion::V1_2,
        ciphers: vec![],
    }
}

/// A client outside the mesh that verifies the server's name, as a browser does.
pub fn browser(ca: &TestCa, alpn: &str) -> Arc<rustls::ClientConfig> {
    TlsIdentity::anonymous(ca.bundle(), mantlet_identity::tls::mesh_provider())
        .client(&ClientTlsOptions {
            expected: ExpectedServer::ServerName,
            alpn: vec![alpn.as_bytes().to_vec()],
            present_certificate: false,
            min_tls13: false,
        })
        .expect("a client")
}
