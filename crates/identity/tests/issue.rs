//! Requests, issued certificates and authority material, checked with the crate, with its second validator and with the
//! real `openssl`.

mod support;

use std::io::Write as _;
use std::process::{Command, Stdio};

use mantlet_identity::validate::{LeafExpectation, check_leaf};
use mantlet_identity::{
    CaMaterial, CaPem, Csr, Error, IssueRequest, KeyAlgorithm, PrivateKey, SelfSignedOptions, Serial, SubjectAltName,
    TrustBundle, build_csr,
};
use proptest::prelude::*;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
use rustls_pki_types::CertificateDer;
use support::*;
use time::{Duration, OffsetDateTime};

fn openssl(args: &[&str], input: &str) -> (bool, String) {
    let mut child = Command::new("openssl")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl is needed: apt-get install openssl");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    (
        out.status.success(),
        String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned(),
    )
}

#[test]
fn a_leaf_is_what_istio_issues_and_openssl_agrees() {
    let ca = root();
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let issued = issue(
        &ca,
        &key,
        &[SubjectAltName::Spiffe(id("customers"))],
        Duration::hours(24),
    );
    let response = issued.to_response();
    assert_eq!(response.len(), 2, "leaf and root bundle");
    assert_eq!(
        issued.not_after - issued.not_before,
        Duration::hours(24) + Duration::minutes(2)
    );

    let (ok, text) = openssl(&["x509", "-noout", "-text"], &response[0]);
    assert!(ok, "{text}");
    for expected in [
        "Version: 3 (0x2)",
        "Issuer: O = cluster.local",
        "Subject: \n",
        "X509v3 Subject Alternative Name: critical\n                URI:spiffe://cluster.local/ns/default/sa/customers\n",
        "X509v3 Key Usage: critical\n                Digital Signature, Key Encipherment\n",
        "TLS Web Server Authentication, TLS Web Client Authentication\n",
        "X509v3 Basic Constraints: critical\n                CA:FALSE\n",
        "X509v3 Authority Key Identifier",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
    let (ok, text) = openssl(&["x509", "-noout", "-text"], &response[1]);
    assert!(ok);
    for expected in [
        "Subject: O = cluster.local",
        "CA:TRUE",
        "X509v3 Key Usage: critical\n                Certificate Sign\n",
    ] {
        assert!(text.contains(expected), "{expected:?} is missing in\n{text}");
    }
    let dir = tempfile::tempdir().unwrap();
    let (leaf, roots) = (dir.path().join("leaf.pem"), dir.path().join("root.pem"));
    std::fs::write(&leaf, &response[0]).unwrap();
    std::fs::write(&roots, &response[1]).unwrap();
    for purpose in ["sslserver", "sslclient"] {
        let args = [
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            roots.to_str().unwrap(),
            leaf.to_str().unwrap(),
        ];
        let (ok, text) = openssl(&args, "");
        // The strict mode wants a key identifier in a self-signed root, which is optional there; all else must hold.
        assert!(ok || text.contains("Missing Subject Key Identifier"), "{text}");
    }
}

#[test]
fn requests_of_openssl_with_every_supported_key_are_signed_and_verify() {
    let ca = root();
    for args in [
        &["-newkey", "rsa:2048"][..],
        &["-newkey", "rsa:4096", "-sha512"],
        &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
        &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-sha384"],
        &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-sha256"],
        &["-newkey", "ed25519"],
    ] {
        let mut full = vec![
            "req",
            "-new",
            "-nodes",
            "-keyout",
            "/dev/null",
            "-subj",
            "/CN=front/O=ignored",
        ];
        full.extend_from_slice(args);
        let (ok, pem) = openssl(&full, "");
        assert!(ok, "{pem}");
        let start = pem.find("-----BEGIN CERTIFICATE REQUEST").unwrap();
        let csr = Csr::from_pem(&pem[start..]).unwrap_or_else(|e| panic!("{args:?}: {e}"));
        assert_eq!(csr.common_name(), Some("front"));
        let issued = ca
            .issue(&IssueRequest {
                csr: &csr,
                names: &[SubjectAltName::Spiffe(id("front"))],
                ttl: Duration::hours(1),
                now: now(),
                serial: serial(3),
            })
            .unwrap_or_else(|e| panic!("{args:?}: {e}"));
        let (_, text) = openssl(&["x509", "-noout", "-text"], &issued.to_response()[0]);
        assert!(text.contains("Subject: CN = front\n"), "{text}");
        assert!(
            text.contains("X509v3 Subject Alternative Name: critical"),
            "S4.42 holds with a subject too\n{text}"
        );
    }
}

#[test]
fn names_in_the_request_are_ignored() {
    let ca = root();
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![
        SanType::URI("spiffe://cluster.local/ns/istio-system/sa/istiod".try_into().unwrap()),
        SanType::DnsName("istiod.istio-system.svc".try_into().unwrap()),
    ];
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name = rcgen::DistinguishedName::new();
    let csr = Csr::from_der(params.serialize_request(&key).unwrap().der()).unwrap();
    let names = [SubjectAltName::Spiffe(id("sleep"))];
    let issued = ca
        .issue(&IssueRequest {
            csr: &csr,
            names: &names,
            ttl: Duration::hours(1),
            now: now(),
            serial: serial(3),
        })
        .unwrap();
    let peer = mantlet_identity::PeerCertificate::parse(&issued.certificate).unwrap();
    assert_eq!(peer.uris, [id("sleep").as_str()]);
    assert!(peer.dns_names.is_empty());
}

#[test]
fn bad_requests_are_refused_with_a_reason() {
    let refused = |pem: &str, why: &str| match Csr::from_pem(pem) {
        Err(Error::BadRequest(text)) => assert!(text.contains(why), "{text:?} does not say {why:?}"),
        other => panic!("{why}: {other:?}"),
    };
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let good = build_csr(&key, &id("a")).unwrap();
    refused("", "not properly encoded");
    refused("hello", "not properly encoded");
    refused(&good.repeat(2), "more than one");
    refused(&"x".repeat(40_000), "more than the");
    refused(&good.replace("CERTIFICATE REQUEST", "CERTIFICATE"), "something other");
    refused(
        &mantlet_identity::pem::encode("CERTIFICATE REQUEST", b"\x30\x03\x02\x01\x00"),
        "cannot be parsed",
    );

    // One flipped bit in the signed part.
    let der = Csr::from_pem(&good).map(|_| decode(&good)).unwrap();
    let uri = der.windows(9).position(|w| w == b"spiffe://").unwrap();
    let mut bent = der.clone();
    bent[uri + 12] ^= 1;
    refused(
        &mantlet_identity::pem::encode("CERTIFICATE REQUEST", &bent),
        "does not verify",
    );
    let mut longer = der;
    longer.push(0);
    refused(&mantlet_identity::pem::encode("CERTIFICATE REQUEST", &longer), "");

    let weak = |args: &[&str]| {
        let mut full = vec!["req", "-new", "-nodes", "-keyout", "/dev/null", "-subj", "/"];
        full.extend_from_slice(args);
        let (ok, pem) = openssl(&full, "");
        assert!(ok, "{pem}");
        pem[pem.find("-----BEGIN CERTIFICATE REQUEST").unwrap()..].to_owned()
    };
    refused(&weak(&["-newkey", "rsa:1024"]), "RSA key of 1024 bits, at least 2048");
    refused(&weak(&["-newkey", "rsa:2048", "-sha1"]), "SHA-1");
    refused(
        &weak(&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"]),
        "does not verify",
    );
}

fn decode(pem: &str) -> Vec<u8> {
    use base64::Engine;
    let body: String = pem.lines().filter(|l| !l.starts_with("-----")).collect();
    base64::engine::general_purpose::STANDARD.decode(body).unwrap()
}

#[test]
fn lifetimes_are_cut_to_the_signer_and_an_expired_signer_signs_nothing() {
    let options = SelfSignedOptions {
        ttl: Duration::hours(1),
        ..SelfSignedOptions::new("cluster.local")
    };
    let start = now();
    let ca = CaMaterial::self_signed(&options, start, serial(1)).unwrap();
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let csr = Csr::from_pem(&build_csr(&key, &id("a")).unwrap()).unwrap();
    let names = [SubjectAltName::Spiffe(id("a"))];
    let at = |now: OffsetDateTime, ttl: Duration| {
        ca.issue(&IssueRequest {
            csr: &csr,
            names: &names,
            ttl,
            now,
            serial: serial(2),
        })
    };
    assert_eq!(
        at(start, Duration::hours(24)).unwrap().not_after,
        start + Duration::hours(1)
    );
    assert_eq!(
        at(start, Duration::minutes(10)).unwrap().not_after,
        start + Duration::minutes(10)
    );
    assert!(matches!(
        at(start + Duration::hours(1), Duration::hours(1)),
        Err(Error::BadCa(_))
    ));
    assert!(matches!(at(start, Duration::ZERO), Err(Error::BadRequest(_))));
    let nobody = ca.issue(&IssueRequest {
        csr: &csr,
        names: &[],
        ttl: Duration::hours(1),
        now: start,
        serial: serial(2),
    });
    assert!(matches!(nobody, Err(Error::BadRequest(_))));
}

#[test]
fn a_renewed_root_has_the_same_key_so_old_leaves_stay_valid() {
    let ca = root();
    let renewed = ca
        .renew_self_signed(Duration::days(3650), now() + Duration::days(3000), serial(7))
        .unwrap();
    assert_ne!(ca.certificate(), renewed.certificate());
    assert_eq!(*ca.key_pem(), *renewed.key_pem());
    let old_leaf = workload(&ca, "old");
    let new_leaf = workload(&renewed, "new");
    // Both verify under a bundle that holds only the other root, since name and key are the same.
    let dir = tempfile::tempdir().unwrap();
    for (leaf, roots) in [(&old_leaf, ca.bundle()), (&new_leaf, ca.bundle())] {
        let (l, r) = (dir.path().join("l"), dir.path().join("r"));
        std::fs::write(&l, cert_pem(&leaf.chain()[0])).unwrap();
        std::fs::write(&r, roots.to_pem()).unwrap();
        let (ok, text) = openssl(&["verify", "-CAfile", r.to_str().unwrap(), l.to_str().unwrap()], "");
        assert!(ok, "{text}");
    }
}

#[test]
fn the_second_opinion_catches_every_deviation() {
    let ca = Careless::new("root");
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let names = [SubjectAltName::Spiffe(id("a"))];
    let public = key.public_key_info();
    let sign = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = leaf_params(&[id("a").as_str()]);
        params.serial_number = Some(5u64.into());
        change(&mut params);
        let issuer = rcgen::Issuer::from_ca_cert_der(&ca.certificate, ca.key.clone()).unwrap();
        CertificateDer::from(params.signed_by(&key, &issuer).unwrap())
    };
    let reference = leaf_params(&[]);
    let check = |der: &CertificateDer<'_>| {
        check_leaf(
            der,
            &LeafExpectation {
                issuer: &ca.certificate,
                public_key_info: &public,
                names: &names,
                common_name: None,
                not_before: reference.not_before,
                not_after: reference.not_after,
                serial: &[5],
            },
        )
    };
    let times = |p: &mut CertificateParams| {
        p.not_before = reference.not_before;
        p.not_after = reference.not_after;
    };
    check(&sign(&times)).unwrap();
    type Change = fn(&mut CertificateParams);
    let changes: &[(&str, Change)] = &[
        ("serial", |p| p.serial_number = Some(6u64.into())),
        ("start of validity", |p| p.not_before += Duration::seconds(1)),
        ("end of validity", |p| p.not_after += Duration::seconds(1)),
        ("subject", |p| p.distinguished_name.push(DnType::CommonName, "x")),
        ("basic constraints", |p| {
            p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained)
        }),
        ("basic constraints", |p| p.is_ca = IsCa::NoCa),
        ("key usage", |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)),
        ("key usage", |p| p.key_usages.clear()),
        ("extended key usage", |p| {
            p.extended_key_usages.push(ExtendedKeyUsagePurpose::CodeSigning)
        }),
        ("extended key usage", |p| p.extended_key_usages.truncate(1)),
        ("names", |p| p.subject_alt_names.clear()),
        ("names differ", |p| {
            p.subject_alt_names = vec![SanType::URI(id("b").as_str().try_into().unwrap())]
        }),
        ("names differ", |p| {
            p.subject_alt_names = vec![SanType::DnsName(id("a").as_str().try_into().unwrap())]
        }),
        ("names differ", |p| {
            p.subject_alt_names
                .push(SanType::URI(id("b").as_str().try_into().unwrap()));
        }),
        ("extension nobody asked for", |p| {
            p.custom_extensions
                .push(rcgen::CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]));
        }),
    ];
    for (why, change) in changes {
        let der = sign(&|p| {
            times(p);
            change(p);
        });
        let error = check(&der).expect_err(why);
        assert!(
            error.contains(why) || error.contains("subject alternative name is missing"),
            "{error:?} for {why:?}"
        );
    }
    // Another key, another issuer.
    let other = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let mut params = leaf_params(&[id("a").as_str()]);
    times(&mut params);
    params.serial_number = Some(5u64.into());
    let issuer = rcgen::Issuer::from_ca_cert_der(&ca.certificate, ca.key.clone()).unwrap();
    assert!(
        check(&CertificateDer::from(params.signed_by(&other, &issuer).unwrap()))
            .unwrap_err()
            .contains("another key")
    );
    let foreign = rcgen::Issuer::from_ca_cert_der(&ca.certificate, other).unwrap();
    let error = check(&CertificateDer::from(params.signed_by(&key, &foreign).unwrap())).unwrap_err();
    assert!(error.contains("signature does not verify"), "{error}");
}

fn parts(ca: &Careless, chain: &[&CertificateDer<'static>], roots: &[&CertificateDer<'static>]) -> [String; 4] {
    let all = |c: &[&CertificateDer<'static>]| c.iter().map(|c| cert_pem(c)).collect::<String>();
    [
        cert_pem(&ca.certificate),
        ca.key.to_pem().to_string(),
        all(chain),
        all(roots),
    ]
}

fn load(p: &[String; 4]) -> Result<CaMaterial, Error> {
    let parts = CaPem {
        ca_cert: p[0].as_bytes(),
        ca_key: p[1].as_bytes(),
        cert_chain: p[2].as_bytes(),
        root_cert: p[3].as_bytes(),
    };
    CaMaterial::from_pem(parts, now())
}

#[test]
fn plugged_in_material_is_checked_and_its_chain_is_presented() {
    let top = Careless::new("corp root");
    let mid = top.intermediate(|p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(1)));
    let ca = mid.intermediate(|p| {
        p.distinguished_name.push(DnType::OrganizationName, "Istio");
    });
    // As the usual scripts write it: the chain file repeats the signing certificate and the root.
    let good = parts(
        &ca,
        &[&ca.certificate, &mid.certificate, &top.certificate],
        &[&top.certificate],
    );
    let material = load(&good).unwrap();
    assert!(!material.is_self_signed());
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    let issued = issue(&material, &key, &[SubjectAltName::Spiffe(id("a"))], Duration::hours(24));
    assert_eq!(issued.not_after, material.not_after(), "S4.17");
    let response = issued.to_response();
    assert_eq!(response.len(), 4, "leaf, signer, intermediate, roots");
    assert_eq!(response[3], cert_pem(&top.certificate));
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (leaf, inter, roots) = (
        path("l", &response[0]),
        path("i", &(response[1].clone() + &response[2])),
        path("r", &response[3]),
    );
    let (ok, text) = openssl(&["verify", "-CAfile", &roots, "-untrusted", &inter, &leaf], "");
    assert!(ok, "{text}");

    let fails = |p: [String; 4], why: &str| {
        let error = load(&p).expect_err(why).to_string();
        assert!(error.contains(why), "{error:?} does not say {why:?}");
    };
    let stranger = Careless::new("stranger");
    let with = |at: usize, text: String| {
        let mut p = good.clone();
        p[at] = text;
        p
    };
    fails(
        with(1, stranger.key.to_pem().to_string()),
        "ca-key.pem does not belong to ca-cert.pem",
    );
    fails(with(1, String::new()), "incomplete signing CA bundle detected");
    fails(with(0, "\n".into()), "incomplete signing CA bundle detected");
    fails(with(2, cert_pem(&ca.certificate)), "does not verify to root-cert.pem");
    fails(
        with(3, cert_pem(&stranger.certificate)),
        "does not verify to root-cert.pem",
    );
    fails(with(3, "garbage".into()), "root-cert.pem");
    fails(with(1, "garbage".into()), "ca-key.pem");
    let leaf = top.leaf(&[id("x").as_str()], |_| {});
    fails(with(3, cert_pem(&leaf.chain()[0])), "is not a CA certificate");

    let bad_ca = |change: fn(&mut CertificateParams), why: &str| {
        let ca = top.intermediate(change);
        fails(parts(&ca, &[&ca.certificate], &[&top.certificate]), why);
    };
    bad_ca(|p| p.is_ca = IsCa::ExplicitNoCa, "not a CA certificate");
    bad_ca(|p| p.key_usages = vec![KeyUsagePurpose::CrlSign], "certificate signing");
    bad_ca(|p| p.not_after = now() - Duration::minutes(1), "expired");
    bad_ca(|p| p.not_before = now() + Duration::minutes(30), "not valid before");
    // An intermediate that may have none below it.
    let narrow = top.intermediate(|_| {});
    let below = narrow.intermediate(|p| p.distinguished_name.push(DnType::OrganizationName, "deep"));
    fails(
        parts(&below, &[&narrow.certificate], &[&top.certificate]),
        "path length",
    );
}

#[test]
fn keys_round_trip_and_weak_ones_are_refused() {
    for algorithm in [
        KeyAlgorithm::EcdsaP256,
        KeyAlgorithm::EcdsaP384,
        KeyAlgorithm::Rsa2048,
        KeyAlgorithm::Rsa3072,
    ] {
        let key = PrivateKey::generate(algorithm).unwrap();
        let again = PrivateKey::from_pem("key", key.to_pem().as_bytes()).unwrap();
        assert_eq!(key.public_key_info(), again.public_key_info());
        assert!(!format!("{key:?}").contains("BEGIN"));
        let (ok, text) = openssl(&["pkey", "-noout", "-check"], &key.to_pem());
        assert!(ok, "{algorithm:?}: {text}");
    }
    let made = |args: &[&str]| {
        let (ok, pem) = openssl(args, "");
        assert!(ok, "{pem}");
        pem[pem.find("-----BEGIN").unwrap()..].to_owned()
    };
    // The older encodings, as Istio writes them.
    for args in [
        &["genrsa", "-traditional", "2048"][..],
        &["ecparam", "-genkey", "-noout", "-name", "prime256v1"],
    ] {
        PrivateKey::from_pem("key", made(args).as_bytes()).unwrap_or_else(|e| panic!("{args:?}: {e}"));
    }
    assert!(PrivateKey::from_pem("key", made(&["genrsa", "1024"]).as_bytes()).is_err());
    assert!(KeyAlgorithm::rsa(1024).is_err());
}

#[test]
fn bundles_compare_as_sets_and_refuse_what_is_no_ca() {
    let (a, b) = (Careless::new("a"), Careless::new("b"));
    let one = TrustBundle::from_pem("x", (cert_pem(&a.certificate) + &cert_pem(&b.certificate)).as_bytes()).unwrap();
    let other = b.bundle().union(&a.bundle()).unwrap().union(&b.bundle()).unwrap();
    assert_eq!(one, other);
    assert_eq!(other.certificates().len(), 2);
    assert!(a.bundle().is_subset_of(&one) && !one.is_subset_of(&a.bundle()));
    let leaf = a.leaf(&[id("x").as_str()], |_| {});
    let mixed = cert_pem(&a.certificate) + &cert_pem(&leaf.chain()[0]);
    assert!(
        TrustBundle::from_pem("x", mixed.as_bytes())
            .unwrap_err()
            .to_string()
            .contains("certificate 2")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_is_asked_the_leaf_names_exactly_the_caller(
        sa in "[a-z0-9]{1,20}", ns in "[a-z0-9]{1,20}", ttl in 1i64..10_000_000, random in any::<[u8; 16]>(),
        cn in proptest::option::of("[a-zA-Z0-9 .-]{1,64}"),
    ) {
        let ca = root();
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(cn) = &cn {
            params.distinguished_name.push(DnType::CommonName, cn.as_str());
        }
        let csr = Csr::from_der(params.serialize_request(&key).unwrap().der()).unwrap();
        let who = mantlet_identity::SpiffeId::new(&"cluster.local".parse().unwrap(), &ns, &sa).unwrap();
        let issued = ca.issue(&IssueRequest {
            csr: &csr, names: &[SubjectAltName::Spiffe(who.clone())], ttl: Duration::seconds(ttl), now: now(),
            serial: Serial::from_random(random),
        }).unwrap();
        let peer = mantlet_identity::PeerCertificate::parse(&issued.certificate).unwrap();
        prop_assert_eq!(peer.spiffe_id().unwrap(), who);
        prop_assert!(issued.not_after <= ca.not_after());
    }

    #[test]
    fn hostile_requests_never_panic(mut at in proptest::collection::vec(any::<(u16, u8)>(), 1..8), cut in any::<u16>()) {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let mut der = decode(&build_csr(&key, &id("a")).unwrap());
        let original = der.clone();
        for (position, value) in at.drain(..) {
            let len = der.len();
            der[usize::from(position) % len] = value;
        }
        der.truncate(der.len() - usize::from(cut) % 4);
        if der != original {
            // A changed request may only pass if the change is outside what is signed; there is no such byte.
            prop_assert!(Csr::from_der(&der).is_err());
        }
    }

    #[test]
    fn foreign_bytes_are_no_peer(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(mantlet_identity::PeerCertificate::parse(&bytes).is_err());
    }
}
