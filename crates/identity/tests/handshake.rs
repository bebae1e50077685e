//! Whole TLS handshakes in memory: who gets in, who is refused, and that nothing is resumed.

mod support;

use std::sync::Arc;

use mantlet_identity::verifier::identity_error;
use mantlet_identity::{
    ClientAuth, ClientTlsOptions, ExpectedServer, PeerIdentityError, PrivateKey, ServerTlsOptions, SpiffeId,
    SubjectAltName, TlsIdentity, TrustDomainRule, peer_spiffe_id,
};
use rcgen::{ExtendedKeyUsagePurpose, IsCa, SanType};
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, HandshakeKind, NamedGroup, ProtocolVersion, ServerConnection,
};
use rustls_pki_types::ServerName;
use support::*;
use time::Duration;

const SERVER_NAME: &str = "outbound_.80_._.customers.default.svc.cluster.local";

fn rule() -> TrustDomainRule {
    TrustDomainRule::one_of(["cluster.local".parse().unwrap(), "old.local".parse().unwrap()])
}

fn server_options() -> ServerTlsOptions {
    ServerTlsOptions {
        client_auth: ClientAuth::Required(rule()),
        alpn: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
        min_tls13: false,
    }
}

fn client_options(expected: &[&str]) -> ClientTlsOptions {
    ClientTlsOptions {
        expected: ExpectedServer::from_names(expected.iter().map(|s| (*s).to_owned()).collect()),
        alpn: vec![b"istio".to_vec(), b"h2".to_vec()],
        present_certificate: true,
        min_tls13: false,
    }
}

struct Done {
    client: ClientConnection,
    server: ServerConnection,
    client_peer: Option<SpiffeId>,
    server_peer: Option<SpiffeId>,
}

/// Shuttles bytes until both sides are content or one fails; the error says who failed.
fn handshake(
    server: &TlsIdentity,
    options: &ServerTlsOptions,
    client: Arc<ClientConfig>,
) -> Result<Done, (&'static str, rustls::Error)> {
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    let mut client = ClientConnection::new(client, name).unwrap();
    let mut acceptor = rustls::server::Acceptor::default();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    acceptor.read_tls(&mut hello.as_slice()).unwrap();
    let accepted = acceptor.accept().unwrap().unwrap();
    let config = server
        .server(options)
        .unwrap()
        .for_client(accepted.client_hello().alpn());
    let mut server = accepted.into_connection(config).map_err(|(e, _)| ("server", e))?;
    for _ in 0..10 {
        let mut to_client = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut to_client).unwrap();
        }
        let mut input = to_client.as_slice();
        while !input.is_empty() {
            client.read_tls(&mut input).unwrap();
            client.process_new_packets().map_err(|e| ("client", e))?;
        }
        let mut to_server = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut to_server).unwrap();
        }
        if to_client.is_empty() && to_server.is_empty() {
            break;
        }
        let mut input = to_server.as_slice();
        while !input.is_empty() {
            server.read_tls(&mut input).unwrap();
            server.process_new_packets().map_err(|e| ("server", e))?;
        }
    }
    assert!(
        !client.is_handshaking() && !server.is_handshaking(),
        "neither side failed nor finished"
    );
    let peer = |certs: Option<&[rustls_pki_types::CertificateDer<'_>]>| certs.and_then(|c| peer_spiffe_id(c).ok());
    Ok(Done {
        client_peer: peer(client.peer_certificates()),
        server_peer: peer(server.peer_certificates()),
        client,
        server,
    })
}

fn meet(server: &TlsIdentity, client: &TlsIdentity, expected: &[&str]) -> Result<Done, (&'static str, rustls::Error)> {
    handshake(
        server,
        &server_options(),
        client.client(&client_options(expected)).unwrap(),
    )
}

#[test]
fn two_workloads_meet_with_post_quantum_tls13_and_know_each_other() {
    let ca = root();
    let (server, client) = (workload(&ca, "customers"), workload(&ca, "sleep"));
    let done = meet(&server, &client, &[id("customers").as_str()]).unwrap();
    assert_eq!(done.client_peer, Some(id("customers")));
    assert_eq!(done.server_peer, Some(id("sleep")));
    assert_eq!(done.client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(
        done.client.negotiated_key_exchange_group().unwrap().name(),
        NamedGroup::X25519MLKEM768
    );
    assert_eq!(
        done.client.negotiated_cipher_suite().unwrap().suite(),
        CipherSuite::TLS13_AES_128_GCM_SHA256
    );
    assert_eq!(done.client.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(server.spiffe_id(), Some(id("customers")));
}

#[test]
fn alpn_without_a_match_goes_on_without() {
    let ca = root();
    let (server, client) = (workload(&ca, "customers"), workload(&ca, "sleep"));
    let options = ClientTlsOptions {
        alpn: vec![b"istio".to_vec()],
        ..client_options(&[])
    };
    let done = handshake(&server, &server_options(), client.client(&options).unwrap()).unwrap();
    assert_eq!(done.server.alpn_protocol(), None);
    let none = ClientTlsOptions {
        alpn: Vec::new(),
        ..client_options(&[])
    };
    handshake(&server, &server_options(), client.client(&none).unwrap()).unwrap();
}

#[test]
fn nothing_is_resumed() {
    let ca = root();
    let (server, client) = (workload(&ca, "customers"), workload(&ca, "sleep"));
    for min_tls13 in [true, false] {
        let config = client.client(&client_options(&[])).unwrap();
        let options = ServerTlsOptions {
            min_tls13,
            ..server_options()
        };
        for _ in 0..3 {
            let done = handshake(&server, &options, config.clone()).unwrap();
            assert_eq!(done.client.handshake_kind(), Some(HandshakeKind::Full));
            assert_eq!(done.server.handshake_kind(), Some(HandshakeKind::Full));
        }
    }
}

#[test]
fn a_chain_that_was_good_is_refused_when_its_time_is_over_or_has_not_begun() {
    use rustls::client::danger::ServerCertVerifier;
    use rustls::server::danger::ClientCertVerifier;
    use rustls_pki_types::{ServerName, UnixTime};

    let ca = root();
    let web = workload(&ca, "customers");
    let leaf = &web.chain()[0];
    let rest = &web.chain()[1..];
    let servers = mantlet_identity::SpiffeServerVerifier::new(web.bundle(), ExpectedServer::ChainOnly, &provider());
    let rule = TrustDomainRule::AnySpiffe;
    let clients = mantlet_identity::SpiffeClientVerifier::new(web.bundle(), rule, false, &provider()).unwrap();
    let name = ServerName::try_from("web").unwrap();
    let now = UnixTime::now();
    let at = |seconds: i64| {
        let then = now.as_secs().checked_add_signed(seconds).unwrap();
        UnixTime::since_unix_epoch(std::time::Duration::from_secs(then))
    };
    const YEARS: i64 = 40 * 365 * 24 * 3600;
    for (then, good) in [
        (0, true),
        (0, true),
        (YEARS, false),
        (0, true),
        (-YEARS, false),
        (0, true),
    ] {
        let server = servers.verify_server_cert(leaf, rest, &name, &[], at(then));
        let client = clients.verify_client_cert(leaf, rest, at(then));
        assert_eq!((server.is_ok(), client.is_ok()), (good, good), "{then}");
    }
    // Other roots have proven nothing, whatever these have.
    let other = workload(&root(), "customers");
    let strangers = mantlet_identity::SpiffeServerVerifier::new(other.bundle(), ExpectedServer::ChainOnly, &provider());
    assert!(strangers.verify_server_cert(leaf, rest, &name, &[], now).is_err());
}

#[test]
fn older_peers_are_served_with_the_four_ecdhe_suites_unless_forbidden() {
    let ca = root();
    let (server, client) = (workload(&ca, "customers"), workload(&ca, "sleep"));
    let mut old = (*client.client(&client_options(&[])).unwrap()).clone();
    let only_12 = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(mantlet_identity::SpiffeServerVerifier::new(
            client.bundle(),
            ExpectedServer::ChainOnly,
            &provider(),
        )))
        .with_client_cert_resolver(old.client_auth_cert_resolver.clone());
    old = only_12;
    let old = Arc::new(old);
    let done = handshake(&server, &server_options(), old.clone()).unwrap();
    assert_eq!(done.client.protocol_version(), Some(ProtocolVersion::TLSv1_2));
    assert_eq!(done.server_peer, Some(id("sleep")));
    let suites: Vec<_> = provider()
        .cipher_suites
        .iter()
        .filter(|s| s.tls13().is_none())
        .map(|s| s.suite())
        .collect();
    assert_eq!(suites.len(), 4);
    let strict = ServerTlsOptions {
        min_tls13: true,
        ..server_options()
    };
    assert_eq!(handshake(&server, &strict, old).map(|_| ()).unwrap_err().0, "server");
}

fn refused_client(client: &TlsIdentity, ca: &Careless) -> rustls::Error {
    let server = ca.leaf(&[id("customers").as_str()], |_| {});
    match handshake(&server, &server_options(), client.client(&client_options(&[])).unwrap()) {
        Ok(_) => panic!("the client was let in"),
        Err(("server", error)) => error,
        Err((side, error)) => panic!("the {side} failed instead: {error}"),
    }
}

fn refused_server(server: &TlsIdentity, ca: &Careless, expected: &[&str]) -> rustls::Error {
    let client = ca.leaf(&[id("sleep").as_str()], |_| {});
    let options = ServerTlsOptions {
        client_auth: ClientAuth::None,
        ..server_options()
    };
    match handshake(server, &options, client.client(&client_options(expected)).unwrap()) {
        Ok(_) => panic!("the server was accepted"),
        Err(("client", error)) => error,
        Err((side, error)) => panic!("the {side} failed instead: {error}"),
    }
}

#[test]
fn clients_that_are_not_of_the_mesh_are_refused() {
    let ca = Careless::new("root");
    let good = id("sleep");
    let good = good.as_str();
    // The control: the same certificate without a fault gets in.
    let server = ca.leaf(&[id("customers").as_str()], |_| {});
    let client = ca.leaf(&[good], |_| {});
    meet(&server, &client, &[]).unwrap();

    let foreign = Careless::new("root").leaf(&[good], |_| {}).with_bundle(ca.bundle());
    let expired = ca.leaf(&[good], |p| p.not_after = now() - Duration::seconds(5));
    let early = ca.leaf(&[good], |p| p.not_before = now() + Duration::hours(1));
    let as_ca = ca.leaf(&[good], |p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    let only_server = ca.leaf(&[good], |p| {
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]
    });
    for (what, client) in [
        ("foreign", foreign),
        ("expired", expired),
        ("early", early),
        ("CA", as_ca),
        ("EKU", only_server),
    ] {
        let error = refused_client(&client, &ca);
        assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{what}: {error}");
        assert!(
            identity_error(&error).is_none(),
            "{what} must fail in the chain, not only by name: {error}"
        );
    }

    let reason = |client: &TlsIdentity| identity_error(&refused_client(client, &ca)).cloned().expect("a reason");
    let foreign_domain = ca.leaf(&["spiffe://evil.example/ns/default/sa/sleep"], |_| {});
    assert!(matches!(
        reason(&foreign_domain),
        PeerIdentityError::ForeignTrustDomain { .. }
    ));
    let prefix_trick = ca.leaf(&["spiffe://cluster.local.evil/ns/default/sa/sleep"], |_| {});
    assert!(matches!(
        reason(&prefix_trick),
        PeerIdentityError::ForeignTrustDomain { .. }
    ));
    let two = ca.leaf(&[good, id("admin").as_str()], |_| {});
    assert_eq!(reason(&two), PeerIdentityError::SeveralUris(2));
    let same_twice = ca.leaf(&[good, good], |_| {});
    assert_eq!(reason(&same_twice), PeerIdentityError::SeveralUris(2));
    let none = ca.leaf(&[], |_| {});
    assert_eq!(reason(&none), PeerIdentityError::NoSpiffeId);
    let web = ca.leaf(&["https://cluster.local/ns/default/sa/sleep"], |_| {});
    assert_eq!(reason(&web), PeerIdentityError::NoSpiffeId);
    let as_dns = ca.leaf(&[], |p| {
        p.subject_alt_names = vec![SanType::DnsName(good.try_into().unwrap())]
    });
    assert!(matches!(reason(&as_dns), PeerIdentityError::NoSpiffeId));
    let odd = ca.leaf(&["spiffe://cluster.local/ns/default/sa/sleep/more"], |_| {});
    assert!(matches!(reason(&odd), PeerIdentityError::BadSpiffeId(_)));
}

#[test]
fn a_name_with_nul_makes_the_whole_certificate_unusable() {
    let ca = Careless::new("root");
    let key = PrivateKey::generate(Default::default()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(&ca.certificate, ca.key.clone()).unwrap();
    let mut params = leaf_params(&[id("sleep").as_str()]);
    params
        .subject_alt_names
        .push(SanType::DnsName("a\0.evil".try_into().unwrap()));
    let leaf = params.signed_by(&key, &issuer).unwrap();
    assert!(matches!(
        mantlet_identity::PeerCertificate::parse(leaf.der()),
        Err(PeerIdentityError::Malformed(_))
    ));
}

#[test]
fn a_client_without_certificate_gets_in_only_where_it_is_optional() {
    let ca = root();
    let server = workload(&ca, "customers");
    let nobody = TlsIdentity::anonymous(ca.bundle().clone(), provider());
    let options = ClientTlsOptions {
        present_certificate: false,
        ..client_options(&[])
    };
    let config = nobody.client(&options).unwrap();
    let (side, _) = handshake(&server, &server_options(), config.clone())
        .map(|_| ())
        .unwrap_err();
    assert_eq!(side, "server");
    let optional = ServerTlsOptions {
        client_auth: ClientAuth::Optional(rule()),
        ..server_options()
    };
    let done = handshake(&server, &optional, config).unwrap();
    assert_eq!(done.server_peer, None);
    assert!(
        nobody.client(&client_options(&[])).is_err(),
        "mutual TLS without a certificate is a configuration error"
    );
    assert!(nobody.server(&server_options()).is_err());

    // Optional is not lenient: a bad certificate is worse than none.
    let stranger = workload(&root(), "sleep").with_bundle(ca.bundle().clone());
    let config = stranger.client(&client_options(&[])).unwrap();
    assert_eq!(
        handshake(&server, &optional, config).map(|_| ()).unwrap_err().0,
        "server"
    );
}

#[test]
fn the_trust_domain_check_can_be_switched_off_but_not_the_rest() {
    let ca = Careless::new("root");
    let server = ca.leaf(&[id("customers").as_str()], |_| {});
    let options = ServerTlsOptions {
        client_auth: ClientAuth::Required(TrustDomainRule::AnySpiffe),
        ..server_options()
    };
    let other = ca.leaf(&["spiffe://partner.example/ns/a/sa/b"], |_| {});
    handshake(&server, &options, other.client(&client_options(&[])).unwrap()).unwrap();
    let nobody = ca.leaf(&[], |_| {});
    assert!(handshake(&server, &options, nobody.client(&client_options(&[])).unwrap()).is_err());
    // A gateway that terminates mutual TLS for clients outside the mesh looks at the chain alone.
    let gateway = ServerTlsOptions {
        client_auth: ClientAuth::RequiredAnyName,
        ..server_options()
    };
    handshake(&server, &gateway, nobody.client(&client_options(&[])).unwrap()).unwrap();
}

#[test]
fn servers_that_are_not_the_expected_one_are_refused() {
    let ca = Careless::new("root");
    let (want, other) = (id("customers"), id("billing"));
    let reason = |server: &TlsIdentity, expected: &[&str]| {
        identity_error(&refused_server(server, &ca, expected))
            .cloned()
            .expect("a reason")
    };
    let server = ca.leaf(&[other.as_str()], |_| {});
    assert!(matches!(
        reason(&server, &[want.as_str()]),
        PeerIdentityError::UnexpectedServer { .. }
    ));
    let two = ca.leaf(&[want.as_str(), other.as_str()], |_| {});
    assert_eq!(reason(&two, &[want.as_str()]), PeerIdentityError::SeveralUris(2));
    assert_eq!(
        reason(&two, &[]),
        PeerIdentityError::SeveralUris(2),
        "with an empty list, too"
    );
    let as_dns = ca.leaf(&[], |p| {
        p.subject_alt_names = vec![SanType::DnsName(want.as_str().try_into().unwrap())]
    });
    assert!(matches!(
        reason(&as_dns, &[want.as_str()]),
        PeerIdentityError::UnexpectedServer { .. }
    ));
    let longer = ca.leaf(&["spiffe://cluster.local/ns/default/sa/customers2"], |_| {});
    assert!(matches!(
        reason(&longer, &[want.as_str()]),
        PeerIdentityError::UnexpectedServer { .. }
    ));

    let only_client = ca.leaf(&[want.as_str()], |p| {
        p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]
    });
    let expired = ca.leaf(&[want.as_str()], |p| p.not_after = now() - Duration::seconds(5));
    let foreign = Careless::new("root").leaf(&[want.as_str()], |_| {});
    for server in [only_client, expired, foreign] {
        let error = refused_server(&server, &ca, &[want.as_str()]);
        assert!(identity_error(&error).is_none(), "{error}");
    }
}

#[test]
fn server_names_of_other_kinds() {
    let ca = Careless::new("root");
    let client = ca.leaf(&[id("sleep").as_str()], |_| {});
    let server = ca.leaf(&[], |p| {
        p.subject_alt_names = vec![
            SanType::DnsName("API.example.com".try_into().unwrap()),
            SanType::IpAddress("10.0.0.7".parse().unwrap()),
        ];
    });
    let options = ServerTlsOptions {
        client_auth: ClientAuth::None,
        ..server_options()
    };
    let ask = |names: &[&str]| handshake(&server, &options, client.client(&client_options(names)).unwrap()).is_ok();
    assert!(ask(&["api.example.com"]));
    assert!(ask(&["x", "10.0.0.7"]));
    assert!(ask(&[]));
    assert!(!ask(&["10.0.0.8"]));
    assert!(!ask(&["example.com"]));
    let by_name = |p: &str| {
        let server = ca.leaf(&[], |params| {
            params.subject_alt_names = vec![SanType::DnsName(p.try_into().unwrap())]
        });
        let options_c = ClientTlsOptions {
            expected: ExpectedServer::ServerName,
            ..client_options(&[])
        };
        handshake(&server, &options, client.client(&options_c).unwrap()).is_ok()
    };
    assert!(by_name(SERVER_NAME));
    assert!(!by_name("other.example"));
}

#[test]
fn a_removed_root_counts_at_the_next_handshake() {
    let (old, new) = (root(), root());
    let server_before = workload(&old, "customers").with_bundle(old.bundle().union(new.bundle()).unwrap());
    let client = workload(&old, "sleep");
    meet(&server_before, &client, &[]).unwrap();
    let server_after = server_before.with_bundle(new.bundle().clone());
    assert_eq!(meet(&server_after, &client, &[]).map(|_| ()).unwrap_err().0, "server");
    // And during the change both generations understand each other.
    let both = old.bundle().union(new.bundle()).unwrap();
    let fresh = workload(&new, "sleep").with_bundle(both);
    meet(&server_before, &fresh, &[id("customers").as_str()]).unwrap();
}

#[test]
fn a_chain_with_intermediates_and_the_root_in_it_verifies() {
    let top = Careless::new("corp root");
    let mid = top.intermediate(|_| {});
    let key = PrivateKey::generate(Default::default()).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_der(&mid.certificate, mid.key.clone()).unwrap();
    let leaf = leaf_params(&[id("customers").as_str()])
        .signed_by(&key, &issuer)
        .unwrap();
    // Istio's agent presents the whole CSR response, root included (S4.117).
    let chain = vec![leaf.der().clone(), mid.certificate.clone(), top.certificate.clone()];
    let server = TlsIdentity::new(chain, &key, top.bundle(), provider()).unwrap();
    let client = top.leaf(&[id("sleep").as_str()], |_| {});
    meet(&server, &client, &[id("customers").as_str()]).unwrap();
    let bare = TlsIdentity::new(vec![leaf.der().clone()], &key, top.bundle(), provider()).unwrap();
    assert!(meet(&bare, &client, &[]).is_err(), "the intermediate is needed");
}

#[test]
fn material_that_does_not_fit_together_is_refused() {
    let ca = root();
    let key = PrivateKey::generate(Default::default()).unwrap();
    let issued = issue(&ca, &key, &[SubjectAltName::Spiffe(id("a"))], Duration::hours(1));
    let other = PrivateKey::generate(Default::default()).unwrap();
    let response = issued.to_response();
    assert!(TlsIdentity::from_csr_response(&response, &other, provider()).is_err());
    assert!(
        TlsIdentity::from_csr_response(&response[..1], &key, provider()).is_err(),
        "S4.13"
    );
    assert!(TlsIdentity::from_csr_response(&[], &key, provider()).is_err());
    assert!(TlsIdentity::from_csr_response(&["x".into(), "y".into()], &key, provider()).is_err());
}

/// A client that would resume gets nothing to resume with; once the root is gone, the former session opens nothing.
#[test]
fn reg_98_no_session_outlives_its_root() {
    let (old, new) = (root(), root());
    let both = old.bundle().union(new.bundle()).unwrap();
    let client = workload(&old, "sleep").with_bundle(both.clone());
    let before = workload(&old, "customers").with_bundle(both);
    let after = before.with_bundle(new.bundle().clone());
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let usual = client.client(&client_options(&[])).unwrap();
        let verifier =
            mantlet_identity::SpiffeServerVerifier::new(client.bundle(), ExpectedServer::ChainOnly, &provider());
        let mut eager = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[version])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(usual.client_auth_cert_resolver.clone());
        eager.resumption = rustls::client::Resumption::in_memory_sessions(8);
        let eager = Arc::new(eager);
        for _ in 0..2 {
            let done = handshake(&before, &server_options(), eager.clone()).unwrap();
            assert_eq!(done.server.handshake_kind(), Some(HandshakeKind::Full));
        }
        let (side, error) = handshake(&after, &server_options(), eager).map(|_| ()).unwrap_err();
        assert_eq!(side, "server");
        assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{error}");
    }
}

#[test]
fn reg_99_a_spiffe_text_in_another_kind_of_name_is_no_identity() {
    let ca = Careless::new("root");
    let name = id("sleep");
    let name = name.as_str();
    for other in [
        SanType::DnsName(name.try_into().unwrap()),
        SanType::Rfc822Name(name.try_into().unwrap()),
    ] {
        let certificate = ca.leaf(&[], |p| p.subject_alt_names = vec![other]);
        let error = refused_client(&certificate, &ca);
        assert!(
            matches!(identity_error(&error), Some(PeerIdentityError::NoSpiffeId)),
            "{error}"
        );
        let error = refused_server(&certificate, &ca, &[name]);
        let unexpected = matches!(identity_error(&error), Some(PeerIdentityError::UnexpectedServer { .. }));
        assert!(unexpected, "{error}");
    }
}

/// Keys are certified for a purpose, on both sides.
#[test]
fn reg_100_certificates_are_used_for_what_they_are_issued_for() {
    let ca = Careless::new("root");
    let want = id("sleep");
    let with = |usages: Vec<ExtendedKeyUsagePurpose>| ca.leaf(&[want.as_str()], |p| p.extended_key_usages = usages);
    let (client, server) = (ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth);
    for usages in [vec![server.clone()], vec![ExtendedKeyUsagePurpose::CodeSigning]] {
        let error = refused_client(&with(usages), &ca);
        assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{error}");
    }
    for usages in [vec![client.clone()], vec![ExtendedKeyUsagePurpose::OcspSigning]] {
        let error = refused_server(&with(usages), &ca, &[want.as_str()]);
        assert!(matches!(error, rustls::Error::InvalidCertificate(_)), "{error}");
    }
    meet(&with(vec![server]), &with(vec![client]), &[want.as_str()]).unwrap();
}

/// What one reader ends at a NUL, another reads on: such a certificate is nobody's.
#[test]
fn reg_101_names_with_control_characters_make_a_certificate_unusable() {
    let ca = Careless::new("root");
    let good = id("sleep");
    let odd = [
        format!("{}\0.evil", good.as_str()),
        format!("{}\n", good.as_str()),
        format!("{}\x7f", good.as_str()),
    ];
    let issuer = rcgen::Issuer::from_ca_cert_der(&ca.certificate, ca.key.clone()).unwrap();
    let key = PrivateKey::generate(Default::default()).unwrap();
    let sign = |names: Vec<SanType>| {
        let mut params = leaf_params(&[]);
        params.subject_alt_names = names;
        params.signed_by(&key, &issuer).unwrap()
    };
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    for text in &odd {
        for names in [
            vec![uri(text)],
            vec![SanType::DnsName(text.as_str().try_into().unwrap()), uri(good.as_str())],
        ] {
            let leaf = sign(names);
            let read = mantlet_identity::PeerCertificate::parse(leaf.der()).map(|c| c.spiffe_id());
            assert!(!matches!(read, Ok(Ok(_))), "{text:?}: {read:?}");
        }
    }
    assert!(mantlet_identity::PeerCertificate::parse(sign(vec![uri(good.as_str())]).der()).is_ok());
}

#[test]
fn reg_102_wildcards_cover_one_label_of_a_host_and_no_identity() {
    let ca = Careless::new("root");
    let client = ca.leaf(&[id("sleep").as_str()], |_| {});
    let options = ServerTlsOptions {
        client_auth: ClientAuth::None,
        ..server_options()
    };
    let accepted = |presented: SanType, expected: &str| {
        let server = ca.leaf(&[], |p| p.subject_alt_names = vec![presented]);
        handshake(&server, &options, client.client(&client_options(&[expected])).unwrap()).is_ok()
    };
    let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
    assert!(accepted(dns("*.example.com"), "a.example.com"));
    for expected in ["a.b.example.com", "example.com", ".example.com", "a.example.org"] {
        assert!(!accepted(dns("*.example.com"), expected), "{expected}");
    }
    assert!(!accepted(dns("*.com"), "example.com"));
    let name = id("sleep");
    for presented in [
        "spiffe://cluster.local/ns/default/sa/*",
        "spiffe://cluster.local/*",
        "spiffe://*/ns/default/sa/sleep",
    ] {
        assert!(
            !accepted(SanType::URI(presented.try_into().unwrap()), name.as_str()),
            "{presented}"
        );
        // Nor does it get a client in.
        assert!(
            identity_error(&refused_client(&ca.leaf(&[presented], |_| {}), &ca)).is_some(),
            "{presented}"
        );
    }
}

#[test]
fn reg_103_two_names_are_no_name() {
    let ca = Careless::new("root");
    let (one, other) = (id("sleep"), id("admin"));
    for uris in [
        [one.as_str(), other.as_str()],
        [other.as_str(), one.as_str()],
        [one.as_str(), one.as_str()],
    ] {
        let certificate = ca.leaf(&uris, |_| {});
        let expected = Some(&PeerIdentityError::SeveralUris(2));
        assert_eq!(identity_error(&refused_client(&certificate, &ca)), expected);
        for wanted in [&[one.as_str()][..], &[]] {
            assert_eq!(identity_error(&refused_server(&certificate, &ca, wanted)), expected);
        }
    }
}

/// 100 intermediates of one name and one key, each signed by all others' key: a builder of paths must give up early.
#[test]
fn reg_108_a_maze_of_intermediates_costs_little() {
    let ca = Careless::new("root");
    let good = ca.leaf(&[id("customers").as_str()], |_| {});
    let key = PrivateKey::generate(Default::default()).unwrap();
    let stranger = Careless::new("root");
    let maze: Vec<_> = (0..100)
        .map(|_| stranger.intermediate(|p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained)))
        .collect();
    let last = rcgen::Issuer::from_ca_cert_der(&maze[0].certificate, maze[0].key.clone()).unwrap();
    let leaf = leaf_params(&[id("sleep").as_str()]).signed_by(&key, &last).unwrap();
    let mut chain = vec![leaf.der().clone()];
    chain.extend(maze.iter().map(|m| m.certificate.clone()));
    let client = TlsIdentity::new(chain, &key, ca.bundle(), provider()).unwrap();
    match handshake(&good, &server_options(), client.client(&client_options(&[])).unwrap()) {
        Ok(_) => panic!("a stranger was let in"),
        Err((side, _)) => assert_eq!(side, "server"),
    }
}

#[test]
fn reg_116_identities_have_one_spelling() {
    assert!(SpiffeId::parse("spiffe://cluster.local/ns/default/sa/sleep").is_ok());
    for text in [
        "SPIFFE://cluster.local/ns/default/sa/sleep",
        "spiffe://Cluster.local/ns/default/sa/sleep",
        "spiffe://cluster.local/ns/default/sa/../sa/sleep",
        "spiffe://cluster.local/ns/default/./sa/sleep",
        "spiffe://cluster.local//ns/default/sa/sleep",
        "spiffe://cluster.local/ns//sa/sleep",
        "spiffe://cluster.local/ns/default/sa/sleep/",
        "spiffe://cluster.local/ns/default/sa/sl%65ep",
        "spiffe://cluster.local/ns/default/sa/sleep?x",
        "spiffe://cluster.local/ns/default/sa/sleep#x",
        "spiffe://cluster.local:443/ns/default/sa/sleep",
        "spiffe://user@cluster.local/ns/default/sa/sleep",
        "spiffe:///ns/default/sa/sleep",
        "spiffe://cluster.local",
        "",
    ] {
        assert!(SpiffeId::parse(text).is_err(), "{text:?}");
    }
    let long = format!("spiffe://cluster.local/ns/default/sa/{}", "a".repeat(2048));
    assert!(SpiffeId::parse(&long).is_err());
}

/// Whoever signs for us does not speak for others, and what others sign is not ours, whatever its name says.
#[test]
fn reg_117_trust_domains_are_not_mixed_up() {
    let (own, partner) = (Careless::new("own"), Careless::new("partner"));
    for name in [
        "spiffe://partner.example/ns/a/sa/b",
        "spiffe://old.local.evil/ns/a/sa/b",
        "spiffe://local/ns/a/sa/b",
    ] {
        let error = refused_client(&own.leaf(&[name], |_| {}), &own);
        let foreign = matches!(
            identity_error(&error),
            Some(PeerIdentityError::ForeignTrustDomain { .. })
        );
        assert!(foreign, "{name}: {error}");
    }
    let posing = partner.leaf(&[id("sleep").as_str()], |_| {}).with_bundle(own.bundle());
    let error = refused_client(&posing, &own);
    assert!(identity_error(&error).is_none(), "it must fail in the chain: {error}");
}
