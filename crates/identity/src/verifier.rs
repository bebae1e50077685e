//! The two questions of a mesh handshake, as rustls verifiers: "is this client one of ours?" on the server and "is this
//! the server I meant?" on the client. Both check the chain with webpki against the trust bundle first and the names
//! after; both refuse a certificate with more than one URI name.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::bundle::TrustBundle;
use crate::error::Error;
use crate::peer::{PeerCertificate, PeerIdentityError};
use crate::proven::Proven;
use crate::spiffe::TrustDomain;

/// Which trust domains a server accepts clients from (S1.25).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrustDomainRule {
    /// The peer's identity must be of one of these (mesh trust domain, aliases, federated ones).
    OneOf(BTreeSet<TrustDomain>),
    /// Any identity whose chain verifies (`PILOT_SKIP_VALIDATE_TRUST_DOMAIN=true`).
    AnySpiffe,
}

impl TrustDomainRule {
    /// A rule for a list of trust domains.
    pub fn one_of(domains: impl IntoIterator<Item = TrustDomain>) -> Self {
        Self::OneOf(domains.into_iter().collect())
    }

    /// Whether a peer passes.
    pub fn check(&self, peer: &PeerCertificate) -> Result<(), PeerIdentityError> {
        let id = peer.spiffe_id()?;
        match self {
            Self::AnySpiffe => Ok(()),
            Self::OneOf(domains) if domains.iter().any(|d| d.as_str() == id.trust_domain()) => Ok(()),
            Self::OneOf(domains) => {
                let accepted = domains.iter().map(TrustDomain::as_str).collect::<Vec<_>>().join(", ");
                Err(PeerIdentityError::ForeignTrustDomain { peer: id, accepted })
            }
        }
    }
}

/// What a server asks of its clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientAuth {
    /// No certificate is asked for (a gateway with TLS mode SIMPLE).
    None,
    /// A mesh certificate is required (S1.20).
    Required(TrustDomainRule),
    /// A mesh certificate is checked when one is presented (istiod's own port, S4.31).
    Optional(TrustDomainRule),
    /// A certificate that chains to the bundle is required, whatever its names (a gateway with TLS mode MUTUAL).
    RequiredAnyName,
}

/// What a client asks of a server, beyond a chain to the trust bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpectedServer {
    /// Nothing at all, not even a chain: `insecureSkipVerify` (S1.114). Only the signature of the handshake is checked.
    Anyone,
    /// Nothing more. Istio's meaning of an empty SAN list (S1.89).
    ChainOnly,
    /// The certificate must carry at least one of these names, exactly (S1.86). `spiffe://…` is compared with URI names
    /// only, an IP literal with IP names only, all else with DNS names, ignoring case and with wildcards of one label.
    Names(Vec<String>),
    /// The certificate must be valid for the server name of the connection, as in the public web (istiod, external
    /// services).
    ServerName,
}

impl ExpectedServer {
    /// From a SAN list of configuration: empty means [`ExpectedServer::ChainOnly`].
    pub fn from_names(names: Vec<String>) -> Self {
        if names.is_empty() {
            Self::ChainOnly
        } else {
            Self::Names(names)
        }
    }
}

fn refuse(error: PeerIdentityError) -> rustls::Error {
    let kind = match error {
        PeerIdentityError::Malformed(_) => CertificateError::BadEncoding,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    rustls::Error::InvalidCertificate(kind)
}

/// The reason behind a handshake error that one of these verifiers caused, for the operator's log.
pub fn identity_error(error: &rustls::Error) -> Option<&PeerIdentityError> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => inner.downcast_ref(),
        _ => None,
    }
}

/// Server side: verifies clients.
#[derive(Debug)]
pub struct SpiffeClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    rule: TrustDomainRule,
    proven: Proven,
}

impl SpiffeClientVerifier {
    /// A verifier that requires (or, with `optional`, only checks) a mesh certificate.
    pub fn new(
        bundle: &TrustBundle,
        rule: TrustDomainRule,
        optional: bool,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, Error> {
        Ok(Self {
            chain: chain_verifier(bundle, optional, provider)?,
            rule,
            proven: Proven::default(),
        })
    }
}

/// A verifier of client chains that does not look at names.
pub(crate) fn chain_verifier(
    bundle: &TrustBundle,
    optional: bool,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    // No hint of accepted issuers: mesh clients have one certificate, and the list would grow every handshake.
    let builder =
        WebPkiClientVerifier::builder_with_provider(bundle.root_store(), provider.clone()).clear_root_hint_subjects();
    let builder = if optional {
        builder.allow_unauthenticated()
    } else {
        builder
    };
    builder.build().map_err(|e| Error::Tls(e.to_string()))
}

impl ClientCertVerifier for SpiffeClientVerifier {
    fn offer_client_auth(&self) -> bool {
        self.chain.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.proven.or_check(end_entity, intermediates, now, || {
            let checked = self.chain.verify_client_cert(end_entity, intermediates, now);
            checked.map(|_| ())
        })?;
        let peer = PeerCertificate::parse(end_entity).map_err(refuse)?;
        self.rule.check(&peer).map_err(refuse)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Whether a DNS name of a certificate is this host, or a wildcard for it (RFC 6125, 6.4.3: the whole left-most label).
fn dns_name_covers(presented: &str, host: &str) -> bool {
    match presented.strip_prefix("*.") {
        None => presented.eq_ignore_ascii_case(host),
        Some(parent) => host.split_once('.').is_some_and(|(label, rest)| {
            !label.is_empty() && parent.contains('.') && rest.eq_ignore_ascii_case(parent)
        }),
    }
}

/// Client side: verifies servers.
#[derive(Debug)]
pub struct SpiffeServerVerifier {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    expected: ExpectedServer,
    proven: Proven,
}

impl SpiffeServerVerifier {
    /// A verifier for servers that chain to `bundle` and carry an expected name.
    pub fn new(bundle: &TrustBundle, expected: ExpectedServer, provider: &CryptoProvider) -> Self {
        Self {
            roots: bundle.root_store(),
            algorithms: provider.signature_verification_algorithms,
            expected,
            proven: Proven::default(),
        }
    }

    fn check_names(&self, names: &[String], peer: &PeerCertificate) -> Result<(), PeerIdentityError> {
        let presented = |expected: &String| {
            if expected.starts_with("spiffe://") {
                peer.uris.iter().any(|uri| uri == expected)
            } else if let Ok(ip) = expected.parse::<std::net::IpAddr>() {
                peer.ip_addresses.iter().any(|bytes| match ip {
                    std::net::IpAddr::V4(v4) => bytes.as_slice() == v4.octets(),
                    std::net::IpAddr::V6(v6) => bytes.as_slice() == v6.octets(),
                })
            } else {
                peer.dns_names.iter().any(|dns| dns_name_covers(dns, expected))
            }
        };
        if names.iter().any(presented) {
            return Ok(());
        }
        let list = |names: &[String]| {
            const SHOWN: usize = 8;
            let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
            if names.len() > SHOWN {
                text.push_str(", …");
            }
            text
        };
        let all: Vec<String> = peer.uris.iter().chain(&peer.dns_names).cloned().collect();
        Err(PeerIdentityError::UnexpectedServer {
            presented: list(&all),
            expected: list(names),
        })
    }
}

impl ServerCertVerifier for SpiffeServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.expected == ExpectedServer::Anyone {
            return Ok(ServerCertVerified::assertion());
        }
        let parsed = ParsedCertificate::try_from(end_entity)?;
        self.proven.or_check(end_entity, intermediates, now, || {
            verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, self.algorithms.all)
        })?;
        let peer = PeerCertificate::parse(end_entity).map_err(refuse)?;
        if peer.uris.len() > 1 {
            return Err(refuse(PeerIdentityError::SeveralUris(peer.uris.len())));
        }
        match &self.expected {
            ExpectedServer::Anyone | ExpectedServer::ChainOnly => {}
            ExpectedServer::Names(names) => self.check_names(names, &peer).map_err(refuse)?,
            ExpectedServer::ServerName => verify_server_name(&parsed, server_name)?,
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::dns_name_covers;

    #[test]
    fn wildcards_stand_for_one_label() {
        for (presented, host) in [
            ("a.example.com", "A.example.com"),
            ("*.example.com", "a.example.com"),
            ("*.Example.com", "b.example.COM"),
        ] {
            assert!(dns_name_covers(presented, host), "{presented} {host}");
        }
        for (presented, host) in [
            ("*.example.com", "example.com"),
            ("*.example.com", "a.b.example.com"),
            ("*.example.com", ".example.com"),
            ("*.com", "example.com"),
            ("*", "example.com"),
            ("a*.example.com", "ab.example.com"),
            ("example.com", "a.example.com"),
        ] {
            assert!(!dns_name_covers(presented, host), "{presented} {host}");
        }
    }
}
