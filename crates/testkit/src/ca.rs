//! A certificate authority for tests, made of the same parts as the real one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mantlet_identity::tls::mesh_provider;
use mantlet_identity::{
    CaMaterial, Csr, IssueRequest, PrivateKey, SelfSignedOptions, Serial, SpiffeId, SubjectAltName, TlsIdentity,
    TrustBundle, TrustDomain,
};
use rustls::crypto::CryptoProvider;
use time::{Duration, OffsetDateTime};

/// An authority of one trust domain.
#[derive(Debug)]
pub struct TestCa {
    material: CaMaterial,
    trust_domain: TrustDomain,
    provider: Arc<CryptoProvider>,
}

/// A certificate with its key, as texts and as a TLS identity.
#[derive(Debug)]
pub struct TestCert {
    /// `cert_chain` as the certificate service would answer: leaf, roots.
    pub response: Vec<String>,
    /// The private key.
    pub key: PrivateKey,
    /// Ready for TLS.
    pub identity: TlsIdentity,
}

/// Paths of a certificate on disk.
#[derive(Debug, Clone)]
pub struct CertFiles {
    /// Leaf and intermediates.
    pub chain: PathBuf,
    /// Private key, PKCS#8.
    pub key: PathBuf,
    /// Trusted roots.
    pub roots: PathBuf,
}

impl TestCa {
    /// A new self-signed root.
    pub fn new(trust_domain: &str) -> Self {
        let provider = mesh_provider();
        let options = SelfSignedOptions::new(trust_domain);
        let material = CaMaterial::self_signed(&options, OffsetDateTime::now_utc(), random_serial())
            .unwrap_or_else(|e| panic!("test root: {e}"));
        let trust_domain = TrustDomain::parse(trust_domain).unwrap_or_else(|e| panic!("{e}"));
        Self {
            material,
            trust_domain,
            provider,
        }
    }

    /// The signing material itself.
    pub fn material(&self) -> &CaMaterial {
        &self.material
    }

    /// The root.
    pub fn bundle(&self) -> TrustBundle {
        self.material.bundle().clone()
    }

    /// The root as PEM.
    pub fn root_pem(&self) -> String {
        self.material.bundle().to_pem()
    }

    /// The identity of a service account in this trust domain.
    pub fn id(&self, namespace: &str, service_account: &str) -> SpiffeId {
        SpiffeId::new(&self.trust_domain, namespace, service_account).unwrap_or_else(|e| panic!("{e}"))
    }

    /// A certificate for a workload, valid for a day.
    pub fn workload(&self, namespace: &str, service_account: &str) -> TestCert {
        self.workload_for(namespace, service_account, Duration::hours(24))
    }

    /// A certificate for a workload, valid for `ttl`.
    pub fn workload_for(&self, namespace: &str, service_account: &str, ttl: Duration) -> TestCert {
        self.issue(&[SubjectAltName::Spiffe(self.id(namespace, service_account))], ttl)
    }

    /// A certificate for host names or addresses.
    pub fn host(&self, names: &[&str]) -> TestCert {
        let names: Vec<_> = names
            .iter()
            .map(|name| SubjectAltName::from_text(name).unwrap_or_else(|e| panic!("{e}")))
            .collect();
        self.issue(&names, Duration::hours(24))
    }

    /// Roots only: a peer without a certificate of its own.
    pub fn anonymous(&self) -> TlsIdentity {
        TlsIdentity::anonymous(self.bundle(), self.provider.clone())
    }

    fn issue(&self, names: &[SubjectAltName], ttl: Duration) -> TestCert {
        let key = PrivateKey::generate(Default::default()).unwrap_or_else(|e| panic!("{e}"));
        let csr = Csr::for_key(&key).unwrap_or_else(|e| panic!("{e}"));
        let request = IssueRequest {
            csr: &csr,
            names,
            ttl,
            now: OffsetDateTime::now_utc(),
            serial: random_serial(),
        };
        let issued = self.material.issue(&request).unwrap_or_else(|e| panic!("{e}"));
        let response = issued.to_response();
        let identity =
            TlsIdentity::from_csr_response(&response, &key, self.provider.clone()).unwrap_or_else(|e| panic!("{e}"));
        TestCert {
            response,
            key,
            identity,
        }
    }
}

impl TestCert {
    /// Writes chain, key and roots into a directory, for programs that read files.
    pub fn write_to(&self, dir: &Path) -> CertFiles {
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            std::fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            path
        };
        let (roots, chain) = self.response.split_last().expect("a certificate has a root");
        CertFiles {
            chain: write("cert-chain.pem", &chain.concat()),
            key: write("key.pem", &self.key.to_pem()),
            roots: write("root-cert.pem", roots),
        }
    }
}

fn random_serial() -> Serial {
    // Distinct within a test run is all that is needed here.
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&n.to_be_bytes());
    bytes[8..12].copy_from_slice(&std::process::id().to_be_bytes());
    Serial::from_random(bytes)
}
