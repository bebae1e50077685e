//! Certificates for the tests: good ones through the crate itself, bad ones by hand with rcgen.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;

use mantlet_identity::tls::mesh_provider;
use mantlet_identity::{
    CaMaterial, Csr, IssueRequest, IssuedCertificate, PrivateKey, SelfSignedOptions, Serial, SpiffeId, SubjectAltName,
    TlsIdentity, TrustBundle, TrustDomain, build_csr,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, SanType,
};
use rustls::crypto::CryptoProvider;
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};

pub(crate) fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc().replace_nanosecond(0).unwrap()
}

pub(crate) fn serial(n: u8) -> Serial {
    Serial::from_random([n; 16])
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    mesh_provider()
}

pub(crate) fn root() -> CaMaterial {
    CaMaterial::self_signed(&SelfSignedOptions::new("cluster.local"), now(), serial(1)).unwrap()
}

pub(crate) fn id(name: &str) -> SpiffeId {
    SpiffeId::new(&TrustDomain::parse("cluster.local").unwrap(), "default", name).unwrap()
}

pub(crate) fn issue(ca: &CaMaterial, key: &PrivateKey, names: &[SubjectAltName], ttl: Duration) -> IssuedCertificate {
    let csr = Csr::from_pem(&build_csr(key, &id("whatever-the-request-says")).unwrap()).unwrap();
    ca.issue(&IssueRequest {
        csr: &csr,
        names,
        ttl,
        now: now(),
        serial: serial(9),
    })
    .unwrap()
}

pub(crate) fn workload(ca: &CaMaterial, name: &str) -> TlsIdentity {
    let key = PrivateKey::generate(Default::default()).unwrap();
    let issued = issue(ca, &key, &[SubjectAltName::Spiffe(id(name))], Duration::hours(24));
    TlsIdentity::from_csr_response(&issued.to_response(), &key, provider()).unwrap()
}

/// A hand-made authority that signs anything, to make certificates ours never would.
pub(crate) struct Careless {
    pub key: PrivateKey,
    pub certificate: CertificateDer<'static>,
    issuer: Issuer<'static, PrivateKey>,
}

impl Careless {
    pub(crate) fn new(name: &str) -> Self {
        let key = PrivateKey::generate(Default::default()).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = now() - Duration::hours(48);
        params.not_after = now() + Duration::hours(48);
        let certificate = CertificateDer::from(params.self_signed(&key).unwrap());
        let issuer = Issuer::from_ca_cert_der(&certificate, key.clone()).unwrap();
        Self {
            key,
            certificate,
            issuer,
        }
    }

    pub(crate) fn bundle(&self) -> TrustBundle {
        TrustBundle::from_certificates("test root", [self.certificate.clone()]).unwrap()
    }

    /// A good leaf, changed by `change` before signing.
    pub(crate) fn leaf(&self, uris: &[&str], change: impl FnOnce(&mut CertificateParams)) -> TlsIdentity {
        let key = PrivateKey::generate(Default::default()).unwrap();
        let mut params = leaf_params(uris);
        change(&mut params);
        let certificate = CertificateDer::from(params.signed_by(&key, &self.issuer).unwrap());
        TlsIdentity::new(vec![certificate], &key, self.bundle(), provider()).unwrap()
    }

    /// An intermediate authority below this one.
    pub(crate) fn intermediate(&self, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = PrivateKey::generate(Default::default()).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "intermediate");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = now() - Duration::hours(1);
        params.not_after = now() + Duration::hours(1);
        change(&mut params);
        let certificate = CertificateDer::from(params.signed_by(&key, &self.issuer).unwrap());
        let issuer = Issuer::from_ca_cert_der(&certificate, key.clone()).unwrap();
        Self {
            key,
            certificate,
            issuer,
        }
    }
}

pub(crate) fn leaf_params(uris: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = uris.iter().map(|u| SanType::URI((*u).try_into().unwrap())).collect();
    params.not_before = now() - Duration::minutes(2);
    params.not_after = now() + Duration::hours(24);
    params
}

pub(crate) fn cert_pem(der: &CertificateDer<'_>) -> String {
    mantlet_identity::pem::encode("CERTIFICATE", der)
}
