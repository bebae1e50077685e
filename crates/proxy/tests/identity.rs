//! Certificates that must not get in: without a SPIFFE URI, with two, expired, of another trust domain, none at all.

mod common;

use common::*;
use mantlet_identity::{ClientTlsOptions, ExpectedServer, TlsIdentity};
use mantlet_testkit::{EchoServer, TestCa};
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// A certificate of the mesh's authority with these names, made without the authority's rules.
fn certificate(ca: &TestCa, uris: &[&str], dns: &[&str], expired: bool) -> TlsIdentity {
    let ca_key = KeyPair::from_pem(&ca.material().key_pem()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&ca.root_pem(), ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    for uri in uris {
        params.subject_alt_names.push(SanType::URI((*uri).try_into().unwrap()));
    }
    for name in dns {
        params
            .subject_alt_names
            .push(SanType::DnsName((*name).try_into().unwrap()));
    }
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now - time::Duration::hours(2);
    params.not_after = if expired {
        now - time::Duration::hours(1)
    } else {
        now + time::Duration::hours(1)
    };
    params.extended_key_usages = vec![
        rcgen::ExtendedKeyUsagePurpose::ClientAuth,
        rcgen::ExtendedKeyUsagePurpose::ServerAuth,
    ];
    let leaf = params.signed_by(&key, &issuer).unwrap();
    TlsIdentity::from_pem(
        leaf.pem().as_bytes(),
        key.serialize_pem().as_bytes(),
        ca.bundle(),
        mantlet_identity::tls::mesh_provider(),
    )
    .unwrap()
}

/// Status of a GET over mTLS with this certificate; 0 when the connection is refused.
async fn call(mesh: &Mesh, identity: &TlsIdentity) -> u16 {
    let config = identity
        .client(&ClientTlsOptions {
            expected: ExpectedServer::ChainOnly,
            alpn: vec![b"istio-http/1.1".to_vec(), b"istio".to_vec(), b"http/1.1".to_vec()],
            present_certificate: true,
            min_tls13: false,
        })
        .unwrap();
    let tcp = TcpStream::connect(mesh.inbound.listen).await.unwrap();
    let name = ServerName::try_from("outbound_.80_._.web.default.svc.cluster.local").unwrap();
    let Ok(mut tls) = TlsConnector::from(config).connect(name, tcp).await else {
        return 0;
    };
    let request = b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
    if tls.write_all(request).await.is_err() {
        return 0;
    }
    let mut answer = Vec::new();
    // TLS 1.3: the refusal comes with the first read.
    let _ = tls.read_to_end(&mut answer).await;
    let text = String::from_utf8_lossy(&answer);
    text.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0)
}

#[tokio::test]
async fn only_one_name_of_this_mesh_gets_in() {
    let app = EchoServer::start().await;
    for (port, mode) in [
        (Port::Http, Mode::Strict),
        (Port::Http, Mode::Permissive),
        (Port::Tcp, Mode::Strict),
    ] {
        let mesh = Mesh::new(app.address(), port, mode).await;
        let ca = &mesh.ca;
        assert_eq!(
            call(&mesh, &certificate(ca, &[CLIENT_SA], &[], false)).await,
            200,
            "{port:?} {mode:?}"
        );
        for (why, identity) in [
            ("no name", certificate(ca, &[], &[], false)),
            ("only a DNS name", certificate(ca, &[], &["sleep.default.svc"], false)),
            ("two names", certificate(ca, &[CLIENT_SA, SERVER_SA], &[], false)),
            (
                "another trust domain",
                certificate(ca, &["spiffe://evil/ns/default/sa/sleep"], &[], false),
            ),
            (
                "a trust domain that begins alike",
                certificate(ca, &["spiffe://cluster.local.evil/ns/default/sa/sleep"], &[], false),
            ),
            (
                "no workload",
                certificate(ca, &["spiffe://cluster.local/ns/default"], &[], false),
            ),
            (
                "not a SPIFFE name",
                certificate(ca, &["https://cluster.local/ns/default/sa/sleep"], &[], false),
            ),
            ("expired", certificate(ca, &[CLIENT_SA], &[], true)),
            (
                "a foreign authority",
                certificate(&TestCa::new("cluster.local"), &[CLIENT_SA], &[], false).with_bundle(ca.bundle()),
            ),
        ] {
            assert_eq!(call(&mesh, &identity).await, 0, "{why} to {port:?} {mode:?}");
        }
        assert_eq!(app.take().len(), 1, "nothing else reached the application");
    }
}

#[tokio::test]
async fn a_server_certificate_with_two_names_is_refused_by_the_client() {
    let app = EchoServer::start().await;
    let mesh = Mesh::new(app.address(), Port::Http, Mode::Strict).await;
    let two = certificate(
        &mesh.ca,
        &[SERVER_SA, "spiffe://cluster.local/ns/default/sa/other"],
        &[],
        false,
    );
    mesh.server.shared.secrets.set_identity(two);
    let answer = curl(&["-H", "Host: web", &format!("http://{}/", mesh.entry())]).await;
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert!(app.take().is_empty());
}
