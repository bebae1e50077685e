//! rustls configurations of the mesh: post-quantum key exchange first, TLS 1.3 and the four ECDHE suites of TLS 1.2, no
//! resumption of any kind.
//!
//! A [`TlsIdentity`] is immutable. When a certificate is renewed or the trust bundle changes, the owner builds a new one
//! and new configurations from it; connections that exist keep theirs, new handshakes use the new ones. Resumption is
//! off because a resumed handshake calls no verifier and would outlive a removed root.

use std::sync::Arc;

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use crate::bundle::TrustBundle;
use crate::error::Error;
use crate::key::PrivateKey;
use crate::peer::PeerCertificate;
use crate::pem;
use crate::spiffe::SpiffeId;
use crate::verifier::{ClientAuth, ExpectedServer, SpiffeClientVerifier, SpiffeServerVerifier, chain_verifier};

/// Key exchange groups, preferred first: hybrid post-quantum, then what older peers speak.
static KX_GROUPS: &[&dyn rustls::crypto::SupportedKxGroup] = &[
    kx_group::X25519MLKEM768,
    kx_group::X25519,
    kx_group::SECP256R1,
    kx_group::SECP384R1,
];

/// Cipher suites, preferred first. AES-128 leads: with hardware AES it is the cheapest per byte, and Envoy's order is the
/// same. The TLS 1.2 suites are those of S1.22 with forward secrecy.
static CIPHER_SUITES: &[SupportedCipherSuite] = &[
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
];

/// The crypto provider of the mesh. Build it once and share it.
pub fn mesh_provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: CIPHER_SUITES.to_vec(),
        kx_groups: KX_GROUPS.to_vec(),
        ..aws_lc_rs::default_provider()
    })
}

/// OpenSSL's names of the TLS 1.2 suites that there are here.
const TLS12_NAMES: [(&str, SupportedCipherSuite); 6] = [
    (
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "ECDHE-RSA-AES256-GCM-SHA384",
        cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "ECDHE-RSA-AES128-GCM-SHA256",
        cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "ECDHE-RSA-CHACHA20-POLY1305",
        cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
];

fn versions(min_tls13: bool) -> &'static [&'static SupportedProtocolVersion] {
    static ONLY_13: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
    static BOTH: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];
    if min_tls13 { ONLY_13 } else { BOTH }
}

/// A certificate with its key and the roots that came with it: what one end of a connection needs.
#[derive(Clone)]
pub struct TlsIdentity {
    certified: Option<Arc<CertifiedKey>>,
    leaf: Option<PeerCertificate>,
    bundle: TrustBundle,
    provider: Arc<CryptoProvider>,
}

impl TlsIdentity {
    /// From a leaf, its intermediates and its key. Fails when the key does not belong to the leaf.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKey,
        bundle: TrustBundle,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, Error> {
        let first = chain
            .first()
            .ok_or_else(|| Error::Tls("the certificate chain is empty".to_owned()))?;
        let leaf = PeerCertificate::parse(first).map_err(|e| Error::Tls(e.to_string()))?;
        // By reference: the by-value loader would leave an unwiped copy of the key behind.
        let signing = aws_lc_rs::sign::any_supported_type(key.der())?;
        let certified = CertifiedKey::new(chain, signing);
        certified.keys_match()?;
        Ok(Self {
            certified: Some(Arc::new(certified)),
            leaf: Some(leaf),
            bundle,
            provider,
        })
    }

    /// From `cert_chain` of a CSR response: leaf, intermediates, and as last element the root bundle (S4.13). The roots
    /// are trusted, not presented: a peer has them.
    pub fn from_csr_response(
        response: &[String],
        key: &PrivateKey,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, Error> {
        let Some((roots, chain)) = response.split_last() else {
            return Err(Error::Tls("the CSR response is empty".to_owned()));
        };
        if chain.is_empty() {
            return Err(Error::Tls("the CSR response has fewer than two elements".to_owned()));
        }
        let bundle = TrustBundle::from_pem("root certificate of the CSR response", roots.as_bytes())?;
        let mut certificates = Vec::new();
        for element in chain {
            certificates.extend(pem::read_certificates(
                "certificate chain of the CSR response",
                element.as_bytes(),
            )?);
        }
        Self::new(certificates, key, bundle, provider)
    }

    /// From PEM texts, for operators' certificates (gateways, file-mounted certificates).
    pub fn from_pem(
        chain: &[u8],
        key: &[u8],
        bundle: TrustBundle,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, Error> {
        let key = PrivateKey::from_pem("private key", key)?;
        Self::new(
            pem::read_certificates("certificate chain", chain)?,
            &key,
            bundle,
            provider,
        )
    }

    /// No certificate of our own, only roots: for the first call to the control plane, and for TLS mode SIMPLE.
    pub fn anonymous(bundle: TrustBundle, provider: Arc<CryptoProvider>) -> Self {
        Self {
            certified: None,
            leaf: None,
            bundle,
            provider,
        }
    }

    /// The same certificate with another trust bundle.
    pub fn with_bundle(&self, bundle: TrustBundle) -> Self {
        Self { bundle, ..self.clone() }
    }

    /// The same identity, speaking only these suites in TLS 1.2 (OpenSSL's names, preferred first). Unknown names and suites without
    /// forward secrecy are left out; with none left, TLS 1.2 is refused. TLS 1.3 has suites of its own.
    pub fn with_tls12_suites(&self, names: &[String]) -> Self {
        let modern = self.provider.cipher_suites.iter().filter(|s| s.tls13().is_some());
        let named = names.iter().filter_map(|name| {
            let found = TLS12_NAMES.iter().find(|(known, _)| known == name);
            found.map(|(_, suite)| suite)
        });
        let provider = CryptoProvider {
            cipher_suites: modern.chain(named).copied().collect(),
            ..(*self.provider).clone()
        };
        Self {
            provider: Arc::new(provider),
            ..self.clone()
        }
    }

    /// The own identity, when the certificate carries one.
    pub fn spiffe_id(&self) -> Option<SpiffeId> {
        self.leaf.as_ref().and_then(|leaf| leaf.spiffe_id().ok())
    }

    /// The own leaf, taken apart.
    pub fn leaf(&self) -> Option<&PeerCertificate> {
        self.leaf.as_ref()
    }

    /// The own chain as presented to peers, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        self.certified
            .as_ref()
            .map_or(&[], |certified| certified.cert.as_slice())
    }

    /// End of the own certificate's life.
    pub fn not_after(&self) -> Option<OffsetDateTime> {
        self.leaf.as_ref().map(|leaf| leaf.not_after)
    }

    /// The trusted roots.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// Configurations for accepting connections.
    pub fn server(&self, options: &ServerTlsOptions) -> Result<ServerTls, Error> {
        let certified = self
            .certified
            .clone()
            .ok_or_else(|| Error::Tls("a server needs a certificate of its own".to_owned()))?;
        let builder = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(versions(options.min_tls13))?;
        let builder = match &options.client_auth {
            ClientAuth::None => builder.with_no_client_auth(),
            ClientAuth::RequiredAnyName => {
                builder.with_client_cert_verifier(chain_verifier(&self.bundle, false, &self.provider)?)
            }
            ClientAuth::Required(rule) => builder.with_client_cert_verifier(Arc::new(SpiffeClientVerifier::new(
                &self.bundle,
                rule.clone(),
                false,
                &self.provider,
            )?)),
            ClientAuth::Optional(rule) => builder.with_client_cert_verifier(Arc::new(SpiffeClientVerifier::new(
                &self.bundle,
                rule.clone(),
                true,
                &self.provider,
            )?)),
        };
        let resolver: Arc<dyn ResolvesServerCert> = Arc::new(SingleCertAndKey::from(certified));
        let mut config = builder.with_cert_resolver(resolver);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(ServerTls::new(config, options.alpn.clone()))
    }

    /// A configuration for making connections. Cheap enough to build per destination and certificate: the certificate,
    /// its parsed key and the trust anchors are shared.
    pub fn client(&self, options: &ClientTlsOptions) -> Result<Arc<ClientConfig>, Error> {
        let verifier = SpiffeServerVerifier::new(&self.bundle, options.expected.clone(), &self.provider);
        let builder = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(versions(options.min_tls13))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match (&self.certified, options.present_certificate) {
            (Some(certified), true) => {
                let resolver: Arc<dyn ResolvesClientCert> = Arc::new(SingleCertAndKey::from(certified.clone()));
                builder.with_client_cert_resolver(resolver)
            }
            (None, true) => return Err(Error::Tls("mutual TLS needs a certificate of its own".to_owned())),
            (_, false) => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.alpn_protocols.clone_from(&options.alpn);
        Ok(Arc::new(config))
    }
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsIdentity")
            .field("id", &self.spiffe_id())
            .field("not_after", &self.not_after())
            .field("bundle", &self.bundle)
            .finish_non_exhaustive()
    }
}

/// What a listener's TLS context says.
#[derive(Debug, Clone)]
pub struct ServerTlsOptions {
    /// What is asked of clients.
    pub client_auth: ClientAuth,
    /// Protocols offered, preferred first (S1.23).
    pub alpn: Vec<Vec<u8>>,
    /// Refuse TLS 1.2 (`meshMTLS.minProtocolVersion: TLSV1_3`).
    pub min_tls13: bool,
}

/// What a cluster's TLS context says.
#[derive(Debug, Clone)]
pub struct ClientTlsOptions {
    /// What is asked of the server.
    pub expected: ExpectedServer,
    /// Protocols offered, preferred first (S1.82).
    pub alpn: Vec<Vec<u8>>,
    /// Present the own certificate (mutual TLS), or none (SIMPLE).
    pub present_certificate: bool,
    /// Refuse TLS 1.2.
    pub min_tls13: bool,
}

/// A listener's TLS, to be chosen from once the ClientHello is known.
///
/// rustls ends the handshake with `no_application_protocol` when both sides offer protocols and none is common; Envoy
/// goes on without one. So there are two configurations: use `tokio_rustls::LazyConfigAcceptor`, then
/// [`ServerTls::for_client`] with the ClientHello's ALPN.
#[derive(Debug, Clone)]
pub struct ServerTls {
    alpn: Vec<Vec<u8>>,
    with_alpn: Arc<ServerConfig>,
    without_alpn: Arc<ServerConfig>,
}

impl ServerTls {
    fn new(mut config: ServerConfig, alpn: Vec<Vec<u8>>) -> Self {
        config.alpn_protocols.clear();
        let without_alpn = Arc::new(config.clone());
        config.alpn_protocols.clone_from(&alpn);
        Self {
            alpn,
            with_alpn: Arc::new(config),
            without_alpn,
        }
    }

    /// The configuration for a client that offers these protocols (`client_hello.alpn()`).
    pub fn for_client<'a>(&self, offered: Option<impl Iterator<Item = &'a [u8]>>) -> Arc<ServerConfig> {
        let Some(mut offered) = offered else {
            return self.with_alpn.clone();
        };
        if offered.any(|protocol| self.alpn.iter().any(|own| own.as_slice() == protocol)) {
            self.with_alpn.clone()
        } else {
            self.without_alpn.clone()
        }
    }

    /// The strict configuration, for listeners whose clients are all ours (the control plane's own port).
    pub fn strict(&self) -> Arc<ServerConfig> {
        self.with_alpn.clone()
    }
}
