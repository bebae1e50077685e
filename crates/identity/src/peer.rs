//! Who is at the other end: the facts about a peer's certificate that policy, headers and logs need.
//!
//! An identity is taken only from a URI name. Exactly one SPIFFE URI is allowed; with none or two the certificate names
//! nobody (Envoy would take the first; the difference is a listed deviation towards denial).

use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::spiffe::{SpiffeId, SpiffeIdError};

/// Why a certificate does not name a workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerIdentityError {
    /// The peer presented no certificate.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// The bytes are not a certificate.
    #[error("the peer's certificate cannot be parsed: {0}")]
    Malformed(String),
    /// No URI name of the SPIFFE scheme.
    #[error("the peer's certificate has no SPIFFE URI")]
    NoSpiffeId,
    /// More than one URI name.
    #[error("the peer's certificate has {0} URI names, exactly one is allowed")]
    SeveralUris(usize),
    /// A SPIFFE URI that is not of this mesh's form.
    #[error(transparent)]
    BadSpiffeId(#[from] SpiffeIdError),
    /// The name is well formed, but of a trust domain that is not accepted here.
    #[error("the peer {peer} is not of an accepted trust domain ({accepted})")]
    ForeignTrustDomain {
        /// The peer's identity.
        peer: SpiffeId,
        /// The accepted trust domains, for the operator.
        accepted: String,
    },
    /// The server is not one of those the client was told to expect.
    #[error("the server presents {presented}, expected one of {expected}")]
    UnexpectedServer {
        /// Names in the certificate.
        presented: String,
        /// Names the client accepts.
        expected: String,
    },
    /// The certificate's validity is over or has not begun.
    #[error("the peer's certificate is not valid at this time (valid {not_before} to {not_after})")]
    OutOfValidity {
        /// Start of validity.
        not_before: OffsetDateTime,
        /// End of validity.
        not_after: OffsetDateTime,
    },
}

/// A peer's certificate, taken apart. Says nothing about trust: the handshake's verifier has decided that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// URI names, as written.
    pub uris: Vec<String>,
    /// DNS names, as written.
    pub dns_names: Vec<String>,
    /// IP names, in network order (4 or 16 bytes).
    pub ip_addresses: Vec<Vec<u8>>,
    /// The subject in RFC 2253 style, empty when there is none (`Subject=` of XFCC).
    pub subject: String,
    /// Serial number, lower-case hex.
    pub serial: String,
    /// Start of validity.
    pub not_before: OffsetDateTime,
    /// End of validity: a stream that authenticated with this certificate must end by then.
    pub not_after: OffsetDateTime,
    /// SHA-256 of the DER, lower-case hex (`Hash=` of XFCC).
    pub sha256: String,
}

impl PeerCertificate {
    /// Takes a certificate apart. Names with NUL or other control characters make the whole certificate unusable, since
    /// other programs cut such names short.
    pub fn parse(der: &[u8]) -> Result<Self, PeerIdentityError> {
        let malformed = |what: String| PeerIdentityError::Malformed(what);
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|e| malformed(e.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes follow the certificate".to_owned()));
        }
        let mut out = Self {
            uris: Vec::new(),
            dns_names: Vec::new(),
            ip_addresses: Vec::new(),
            subject: certificate.subject().to_string(),
            serial: certificate.raw_serial().iter().map(|b| format!("{b:02x}")).collect(),
            not_before: certificate.validity().not_before.to_datetime(),
            not_after: certificate.validity().not_after.to_datetime(),
            sha256: hex(digest::digest(&digest::SHA256, der).as_ref()),
        };
        let Some(san) = certificate
            .subject_alternative_name()
            .map_err(|e| malformed(e.to_string()))?
        else {
            return Ok(out);
        };
        let text = |name: &str| {
            if name.bytes().all(|b| (0x20..0x7f).contains(&b)) {
                Ok(name.to_owned())
            } else {
                Err(PeerIdentityError::Malformed(
                    "a name has control or non-ASCII characters".to_owned(),
                ))
            }
        };
        for name in &san.value.general_names {
            match name {
                GeneralName::URI(uri) => out.uris.push(text(uri)?),
                GeneralName::DNSName(dns) => out.dns_names.push(text(dns)?),
                GeneralName::IPAddress(bytes) => out.ip_addresses.push(bytes.to_vec()),
                GeneralName::Invalid(..) => return Err(malformed("a name is malformed".to_owned())),
                _ => {}
            }
        }
        Ok(out)
    }

    /// The one identity this certificate names.
    pub fn spiffe_id(&self) -> Result<SpiffeId, PeerIdentityError> {
        match self.uris.as_slice() {
            [uri] if uri.len() >= 9 && uri[..9].eq_ignore_ascii_case("spiffe://") => Ok(SpiffeId::parse(uri)?),
            [] | [_] => Err(PeerIdentityError::NoSpiffeId),
            several => Err(PeerIdentityError::SeveralUris(several.len())),
        }
    }

    /// Whether the certificate is valid at `now`; asked again at accept, because a connection can outlive a check.
    pub fn check_validity(&self, now: OffsetDateTime) -> Result<(), PeerIdentityError> {
        if now < self.not_before || now >= self.not_after {
            return Err(PeerIdentityError::OutOfValidity {
                not_before: self.not_before,
                not_after: self.not_after,
            });
        }
        Ok(())
    }
}

/// The identity in the leaf of a chain as rustls hands it out (`peer_certificates()`).
pub fn peer_spiffe_id(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerIdentityError> {
    let leaf = chain.first().ok_or(PeerIdentityError::NoCertificate)?;
    PeerCertificate::parse(leaf)?.spiffe_id()
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]])
        .map(char::from)
        .collect()
}
