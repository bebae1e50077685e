//! The signing half of the certificate authority: its material (made here, or brought by the operator) and the
//! certificates it issues. Pure: the caller brings the time and the serial number; who may ask is decided elsewhere
//! (`control::ca`).

use std::net::IpAddr;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::bundle::TrustBundle;
use crate::csr::Csr;
use crate::error::Error;
use crate::key::{KeyAlgorithm, PrivateKey};
use crate::pem;
use crate::spiffe::SpiffeId;
use crate::validate;

/// How far NotBefore of a leaf lies before its issuance, for clocks that are behind (S4.40).
pub const CLOCK_SKEW: Duration = Duration::minutes(2);
/// Lifetime of a self-signed root (S4.44).
pub const DEFAULT_ROOT_TTL: Duration = Duration::days(3650);
/// Lifetime of a leaf when the caller names none (S4.45).
pub const DEFAULT_LEAF_TTL: Duration = Duration::hours(24);
/// Longest lifetime granted by default (S4.45).
pub const DEFAULT_MAX_LEAF_TTL: Duration = Duration::hours(2160);

/// A 128-bit certificate serial number. The caller draws it at random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serial([u8; 16]);

impl Serial {
    /// Wraps 16 random bytes; all zeros (which RFC 5280 forbids) becomes one.
    pub fn from_random(mut bytes: [u8; 16]) -> Self {
        if bytes == [0; 16] {
            bytes[15] = 1;
        }
        Self(bytes)
    }

    /// The number without leading zero bytes, big-endian.
    pub(crate) fn significant(&self) -> &[u8] {
        let start = self.0.iter().position(|b| *b != 0).unwrap_or(15);
        &self.0[start..]
    }
}

/// A subject alternative name, typed so that a DNS name can never pass for an identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SubjectAltName {
    /// A workload's identity, written as a URI.
    Spiffe(SpiffeId),
    /// A host name (the control plane's own certificate).
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

impl SubjectAltName {
    /// Istio's reading of a plain text name (S4.43): `spiffe://…` is a URI, an IP literal an IP, all else DNS.
    pub fn from_text(text: &str) -> Result<Self, Error> {
        if text.starts_with("spiffe://") {
            return Ok(Self::Spiffe(SpiffeId::parse(text)?));
        }
        if let Ok(ip) = text.parse() {
            return Ok(Self::Ip(ip));
        }
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'*');
        if text.is_empty() || text.len() > 253 || !text.bytes().all(allowed) {
            return Err(Error::BadRequest(format!("{text:?} is not a DNS name")));
        }
        Ok(Self::Dns(text.to_owned()))
    }

    fn to_rcgen(&self) -> Result<SanType, Error> {
        Ok(match self {
            Self::Spiffe(id) => SanType::URI(id.as_str().try_into()?),
            Self::Dns(name) => SanType::DnsName(name.as_str().try_into()?),
            Self::Ip(ip) => SanType::IpAddress(*ip),
        })
    }

    /// The DER of this name inside GeneralNames: context tag, length, bytes.
    fn general_name(&self) -> Vec<u8> {
        let (tag, bytes) = match self {
            Self::Spiffe(id) => (0x86, id.as_str().as_bytes().to_vec()),
            Self::Dns(name) => (0x82, name.as_bytes().to_vec()),
            Self::Ip(IpAddr::V4(ip)) => (0x87, ip.octets().to_vec()),
            Self::Ip(IpAddr::V6(ip)) => (0x87, ip.octets().to_vec()),
        };
        tlv(tag, &bytes)
    }
}

/// One DER element.
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let len = content.len();
    if len < 0x80 {
        out.push(len as u8);
    } else {
        let bytes = len.to_be_bytes();
        let start = bytes.iter().position(|b| *b != 0).unwrap_or(bytes.len() - 1);
        out.push(0x80 | (bytes.len() - start) as u8);
        out.extend_from_slice(&bytes[start..]);
    }
    out.extend_from_slice(content);
    out
}

/// What a self-signed root looks like.
#[derive(Debug, Clone)]
pub struct SelfSignedOptions {
    /// The organisation in the subject: the trust domain (S4.44).
    pub organization: String,
    /// Kind of key; Istio makes RSA 2048, Mantlet ECDSA P-256 unless told otherwise.
    pub key: KeyAlgorithm,
    /// Lifetime.
    pub ttl: Duration,
}

impl SelfSignedOptions {
    /// Defaults for a trust domain.
    pub fn new(organization: impl Into<String>) -> Self {
        Self {
            organization: organization.into(),
            key: KeyAlgorithm::default(),
            ttl: DEFAULT_ROOT_TTL,
        }
    }
}

/// The four texts an operator brings, or a Secret holds (S4.61, S4.65).
#[derive(Debug, Clone, Copy)]
pub struct CaPem<'a> {
    /// `ca-cert.pem`: the signing certificate.
    pub ca_cert: &'a [u8],
    /// `ca-key.pem`: its key.
    pub ca_key: &'a [u8],
    /// `cert-chain.pem`: signing certificate and intermediates up to the root; empty for a self-signed root.
    pub cert_chain: &'a [u8],
    /// `root-cert.pem`: the root or roots; empty means the signing certificate is the root.
    pub root_cert: &'a [u8],
}

/// A complete authority: signing certificate, key, chain to the root, trust bundle. Checked on construction; cheap to
/// keep in an `Arc`.
pub struct CaMaterial {
    certificate: CertificateDer<'static>,
    key: PrivateKey,
    issuer: Issuer<'static, PrivateKey>,
    /// Presented after the leaf: the signing certificate (unless it is a root) and further intermediates.
    intermediates: Vec<CertificateDer<'static>>,
    bundle: TrustBundle,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    /// The earliest end of the signing certificate and the intermediates.
    chain_not_after: OffsetDateTime,
    self_signed: bool,
}

impl CaMaterial {
    /// Makes a new self-signed root (S4.44).
    pub fn self_signed(options: &SelfSignedOptions, now: OffsetDateTime, serial: Serial) -> Result<Self, Error> {
        let key = PrivateKey::generate(options.key)?;
        Self::self_signed_with(key, &options.organization, options.ttl, now, serial)
    }

    /// A new root certificate with the same key and subject as this one, so that leaves signed before stay valid
    /// (S4.75).
    pub fn renew_self_signed(&self, ttl: Duration, now: OffsetDateTime, serial: Serial) -> Result<Self, Error> {
        if !self.self_signed {
            return Err(Error::BadCa("only a self-signed root can be renewed here".to_owned()));
        }
        let certificate = parse_ca("signing certificate", &self.certificate)?;
        let organization = certificate
            .subject()
            .iter_organization()
            .next()
            .and_then(|o| o.as_str().ok())
            .unwrap_or_default()
            .to_owned();
        Self::self_signed_with(self.key.clone(), &organization, ttl, now, serial)
    }

    fn self_signed_with(
        key: PrivateKey,
        organization: &str,
        ttl: Duration,
        now: OffsetDateTime,
        serial: Serial,
    ) -> Result<Self, Error> {
        let now = whole_seconds(now);
        let mut params = CertificateParams::default();
        params.not_before = now;
        params.not_after = now + ttl;
        params.serial_number = Some(SerialNumber::from_slice(serial.significant()));
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, organization);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = CertificateDer::from(params.self_signed(&key)?);
        Self::assemble(certificate.clone(), key, Vec::new(), vec![certificate], now)
    }

    /// Loads and checks material from PEM (S4.60–S4.63): everything parses, the key fits the certificate, the chain
    /// verifies to a root, nothing has expired.
    pub fn from_pem(parts: CaPem<'_>, now: OffsetDateTime) -> Result<Self, Error> {
        let blank = |bytes: &[u8]| bytes.iter().all(u8::is_ascii_whitespace);
        if blank(parts.ca_key) || blank(parts.ca_cert) {
            return Err(Error::BadCa(
                "incomplete signing CA bundle detected: ca-cert.pem and ca-key.pem are both needed".to_owned(),
            ));
        }
        let certificate = pem::read_certificates("ca-cert.pem", parts.ca_cert)?.swap_remove(0);
        let key = PrivateKey::from_pem("ca-key.pem", parts.ca_key)?;
        let chain = if blank(parts.cert_chain) {
            Vec::new()
        } else {
            pem::read_certificates("cert-chain.pem", parts.cert_chain)?
        };
        let roots = if blank(parts.root_cert) {
            vec![certificate.clone()]
        } else {
            pem::read_certificates("root-cert.pem", parts.root_cert)?
        };
        Self::assemble(certificate, key, chain, roots, now)
    }

    fn assemble(
        certificate: CertificateDer<'static>,
        key: PrivateKey,
        chain: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
        now: OffsetDateTime,
    ) -> Result<Self, Error> {
        let bundle = TrustBundle::from_certificates("root-cert.pem", roots)?;
        // The chain file repeats the signing certificate and often the root; peers need neither twice.
        let mut intermediates: Vec<CertificateDer<'static>> = Vec::new();
        if !bundle.contains(&certificate) {
            intermediates.push(certificate.clone());
        }
        for link in chain {
            if !bundle.contains(&link) && !intermediates.contains(&link) && link != certificate {
                intermediates.push(link);
            }
        }
        let (not_before, not_after, self_signed, chain_not_after) = {
            let parsed = parse_ca("ca-cert.pem", &certificate)?;
            if parsed.public_key().raw != key.public_key_info() {
                return Err(Error::BadCa("ca-key.pem does not belong to ca-cert.pem".to_owned()));
            }
            let chain_not_after = validate::check_ca_chain(&certificate, &intermediates, &bundle, now)?;
            let validity = parsed.validity();
            (
                validity.not_before.to_datetime(),
                validity.not_after.to_datetime(),
                bundle.contains(&certificate),
                chain_not_after,
            )
        };
        let issuer = Issuer::from_ca_cert_der(&certificate, key.clone())
            .map_err(|e| Error::BadCa(format!("ca-cert.pem cannot be used as an issuer: {e}")))?;
        Ok(Self {
            certificate,
            key,
            issuer,
            intermediates,
            bundle,
            not_before,
            not_after,
            chain_not_after,
            self_signed,
        })
    }

    /// The same authority with further roots in its trust bundle (S4.66).
    pub fn with_extra_roots(mut self, extra: &TrustBundle) -> Result<Self, Error> {
        self.bundle = self.bundle.union(extra)?;
        Ok(self)
    }

    /// Issues a certificate (S4.40–S4.43) and has it checked by [`validate::check_leaf`] before returning it.
    ///
    /// # Errors
    /// [`Error::BadCa`] when the signing certificate has expired; [`Error::BadRequest`] for a lifetime that is not
    /// positive or no names; [`Error::FailedSelfCheck`] when the second opinion differs.
    pub fn issue(&self, request: &IssueRequest<'_>) -> Result<IssuedCertificate, Error> {
        let now = whole_seconds(request.now);
        if now >= self.not_after {
            return Err(Error::BadCa(format!(
                "the signing certificate expired at {}",
                self.not_after
            )));
        }
        if request.ttl <= Duration::ZERO || request.names.is_empty() {
            return Err(Error::BadRequest(
                "a certificate needs a positive lifetime and a name".to_owned(),
            ));
        }
        let not_before = now - CLOCK_SKEW;
        let not_after = (now + Duration::seconds(request.ttl.whole_seconds().max(1))).min(self.not_after);

        let mut params = CertificateParams::default();
        params.not_before = not_before;
        params.not_after = not_after;
        params.serial_number = Some(SerialNumber::from_slice(request.serial.significant()));
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        if let Some(name) = request.csr.common_name() {
            params.distinguished_name.push(DnType::CommonName, name);
            // The library marks the SAN critical only under an empty subject; Istio always does (S4.42).
            let names: Vec<u8> = request.names.iter().flat_map(SubjectAltName::general_name).collect();
            let mut extension = CustomExtension::from_oid_content(&[2, 5, 29, 17], tlv(0x30, &names));
            extension.set_criticality(true);
            params.custom_extensions.push(extension);
        } else {
            params.subject_alt_names = request
                .names
                .iter()
                .map(SubjectAltName::to_rcgen)
                .collect::<Result<_, _>>()?;
        }
        let certificate = CertificateDer::from(params.signed_by(&request.csr.public_key, &self.issuer)?);

        validate::check_leaf(
            &certificate,
            &validate::LeafExpectation {
                issuer: &self.certificate,
                public_key_info: &request.csr.public_key_der,
                names: request.names,
                common_name: request.csr.common_name(),
                not_before,
                not_after,
                serial: request.serial.significant(),
            },
        )
        .map_err(Error::FailedSelfCheck)?;
        Ok(IssuedCertificate {
            certificate,
            intermediates: self.intermediates.clone(),
            roots_pem: self.bundle.to_pem(),
            not_before,
            not_after,
        })
    }

    /// The signing certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The trust bundle that goes with every issued certificate.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// What is presented after a leaf.
    pub fn intermediates(&self) -> &[CertificateDer<'static>] {
        &self.intermediates
    }

    /// Start of the signing certificate's life.
    pub fn not_before(&self) -> OffsetDateTime {
        self.not_before
    }

    /// End of the signing certificate's life.
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// The earliest end within the signing chain; the default leaf lifetime is cut to it at start-up (S4.16).
    pub fn chain_not_after(&self) -> OffsetDateTime {
        self.chain_not_after
    }

    /// Whether the signing certificate is itself one of the roots.
    pub fn is_self_signed(&self) -> bool {
        self.self_signed
    }

    /// `ca-cert.pem`.
    pub fn certificate_pem(&self) -> String {
        pem::encode("CERTIFICATE", &self.certificate)
    }

    /// `ca-key.pem`, wiped when dropped.
    pub fn key_pem(&self) -> Zeroizing<String> {
        self.key.to_pem()
    }
}

impl std::fmt::Debug for CaMaterial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "CaMaterial(until {}, {} intermediates, {:?})",
            self.not_after,
            self.intermediates.len(),
            self.bundle
        )
    }
}

/// One certificate to issue.
#[derive(Debug)]
pub struct IssueRequest<'a> {
    /// The verified request; only its key and common name count.
    pub csr: &'a Csr,
    /// The names to certify, from the caller's authenticated identity.
    pub names: &'a [SubjectAltName],
    /// Lifetime from `now`; cut to the signing certificate's end (S4.17).
    pub ttl: Duration,
    /// The time of day.
    pub now: OffsetDateTime,
    /// A fresh random serial number.
    pub serial: Serial,
}

/// A released certificate with what its owner needs to present it.
#[derive(Debug, Clone)]
pub struct IssuedCertificate {
    /// The leaf.
    pub certificate: CertificateDer<'static>,
    /// Intermediates, nearest first.
    pub intermediates: Vec<CertificateDer<'static>>,
    /// The whole trust bundle as one PEM text.
    pub roots_pem: String,
    /// Start of validity.
    pub not_before: OffsetDateTime,
    /// End of validity.
    pub not_after: OffsetDateTime,
}

impl IssuedCertificate {
    /// `cert_chain` of Istio's CSR response: leaf, intermediates one by one, then the whole root bundle as the last
    /// string (S4.13).
    pub fn to_response(&self) -> Vec<String> {
        std::iter::once(&self.certificate)
            .chain(&self.intermediates)
            .map(|der| pem::encode("CERTIFICATE", der))
            .chain(std::iter::once(self.roots_pem.clone()))
            .collect()
    }
}

fn parse_ca<'a>(what: &str, der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Error> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(Error::BadCa(format!("{what} is followed by other bytes"))),
        Err(e) => Err(Error::BadCa(format!("{what} cannot be parsed: {e}"))),
    }
}

/// X.509 times have no fractions.
fn whole_seconds(time: OffsetDateTime) -> OffsetDateTime {
    time.replace_nanosecond(0).unwrap_or(time)
}
