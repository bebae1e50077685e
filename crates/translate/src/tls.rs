//! TLS contexts of the mesh: what servers demand and what clients present (SEMANTICS 1b, 1e).

use mantlet_model::names::{ALPN_ISTIO_TCP, SECRET_DEFAULT, SECRET_ROOT};
use mantlet_model::tls::{ClientTls, SanMatch, ServerTls};

use crate::mesh::Mesh;

/// TLS 1.2 suites that a mesh server accepts (S1.22).
const SERVER_CIPHERS: [&str; 6] = [
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-GCM-SHA256",
];

/// The server side of mesh mTLS; a client certificate of an accepted trust domain is required (S1.20–S1.25).
pub fn mesh_server(mesh: &Mesh, http: bool) -> ServerTls {
    let mut alpn: Vec<String> = vec!["h2".into(), "http/1.1".into()];
    if !http {
        alpn.insert(0, ALPN_ISTIO_TCP[0].into());
    }
    ServerTls {
        certificate: SECRET_DEFAULT.into(),
        trust_bundle: Some(SECRET_ROOT.into()),
        client_sans: mesh
            .accepted_trust_domains()
            .iter()
            .map(|d| SanMatch::Prefix(format!("spiffe://{d}/")))
            .collect(),
        require_client_certificate: true,
        alpn,
        min_version: mesh.min_tls,
        ciphers: if mesh.ciphers.is_empty() {
            SERVER_CIPHERS.map(String::from).to_vec()
        } else {
            mesh.ciphers.clone()
        },
    }
}

/// The client side of mesh mTLS (S1.80, S1.82, S1.86).
pub fn mesh_client(mesh: &Mesh, sni: String, server_names: Vec<String>, http2: bool) -> ClientTls {
    let mut alpn: Vec<String> = ALPN_ISTIO_TCP.map(String::from).to_vec();
    if http2 {
        alpn.push("h2".into());
    }
    ClientTls {
        certificate: Some(SECRET_DEFAULT.into()),
        trust_bundle: Some(SECRET_ROOT.into()),
        server_sans: server_names.into_iter().map(SanMatch::Exact).collect(),
        sni,
        alpn,
        min_version: mesh.min_tls,
    }
}
