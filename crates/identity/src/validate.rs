//! The second opinion: checks on certificates, written from RFC 5280 and Istio's rules and on another parser than the one
//! that builds them. Nothing leaves the authority without passing [`check_leaf`]; no authority is used without passing
//! [`check_ca_chain`]. Shares no code with `authority` but the value types.

use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{
    OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA, OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_BASIC_CONSTRAINTS,
    OID_X509_EXT_EXTENDED_KEY_USAGE, OID_X509_EXT_KEY_USAGE, OID_X509_EXT_SUBJECT_ALT_NAME,
    OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
};
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};

use crate::authority::SubjectAltName;
use crate::bundle::TrustBundle;
use crate::error::Error;

/// A chain longer than this is a configuration error, or a loop.
const MAX_CHAIN: usize = 10;

/// What a leaf must say, to the byte.
#[derive(Debug)]
pub struct LeafExpectation<'a> {
    /// The signing certificate.
    pub issuer: &'a CertificateDer<'a>,
    /// The requester's subjectPublicKeyInfo in DER.
    pub public_key_info: &'a [u8],
    /// The names, all of them and no others.
    pub names: &'a [SubjectAltName],
    /// The only thing the subject may hold.
    pub common_name: Option<&'a str>,
    /// Exact start of validity.
    pub not_before: OffsetDateTime,
    /// Exact end of validity.
    pub not_after: OffsetDateTime,
    /// The serial number, big-endian without leading zeros.
    pub serial: &'a [u8],
}

/// Checks a freshly signed leaf against what was meant. The error says which property differs.
pub fn check_leaf(der: &CertificateDer<'_>, expected: &LeafExpectation<'_>) -> Result<(), String> {
    let (rest, leaf) = X509Certificate::from_der(der).map_err(|e| format!("it cannot be parsed: {e}"))?;
    let (_, issuer) =
        X509Certificate::from_der(expected.issuer).map_err(|e| format!("the issuer cannot be parsed: {e}"))?;
    let ensure = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };

    ensure(rest.is_empty(), "bytes follow the certificate")?;
    ensure(leaf.version() == X509Version::V3, "it is not X.509 v3")?;
    let serial: Vec<u8> = leaf.raw_serial().iter().copied().skip_while(|b| *b == 0).collect();
    ensure(
        serial == expected.serial && !serial.is_empty() && serial.len() <= 20,
        "the serial number differs",
    )?;
    ensure(
        leaf.issuer().as_raw() == issuer.subject().as_raw(),
        "its issuer name differs from the signing certificate's subject",
    )?;
    ensure(
        leaf.public_key().raw == expected.public_key_info,
        "it certifies another key",
    )?;
    check_signature_algorithm(&leaf)?;
    leaf.verify_signature(Some(issuer.public_key()))
        .map_err(|e| format!("its signature does not verify: {e}"))?;

    let validity = leaf.validity();
    ensure(
        validity.not_before.to_datetime() == expected.not_before,
        "its start of validity differs",
    )?;
    ensure(
        validity.not_after.to_datetime() == expected.not_after,
        "its end of validity differs",
    )?;
    ensure(validity.not_after > validity.not_before, "it is never valid")?;
    ensure(
        validity.not_after.timestamp() <= issuer.validity().not_after.timestamp(),
        "it outlives the signing certificate",
    )?;
    check_subject(&leaf, expected.common_name)?;

    for extension in leaf.extensions() {
        let known = [
            OID_X509_EXT_SUBJECT_ALT_NAME,
            OID_X509_EXT_KEY_USAGE,
            OID_X509_EXT_EXTENDED_KEY_USAGE,
            OID_X509_EXT_BASIC_CONSTRAINTS,
            OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER,
            OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
        ];
        ensure(known.contains(&extension.oid), "it has an extension nobody asked for")?;
        let failed = matches!(
            extension.parsed_extension(),
            ParsedExtension::ParseError { .. } | ParsedExtension::UnsupportedExtension { .. }
        );
        ensure(!failed, "an extension is malformed")?;
    }
    let basic = leaf
        .basic_constraints()
        .map_err(|e| e.to_string())?
        .ok_or("basic constraints are missing")?;
    ensure(
        basic.critical && !basic.value.ca,
        "basic constraints are not critical CA:FALSE",
    )?;
    let usage = leaf
        .key_usage()
        .map_err(|e| e.to_string())?
        .ok_or("key usage is missing")?;
    // Bit 0 is digitalSignature, bit 2 keyEncipherment.
    ensure(
        usage.critical && usage.value.flags == 0b101,
        "key usage is not critical digitalSignature, keyEncipherment",
    )?;
    let extended = leaf
        .extended_key_usage()
        .map_err(|e| e.to_string())?
        .ok_or("extended key usage is missing")?
        .value;
    let others = extended.any
        || extended.code_signing
        || extended.email_protection
        || extended.time_stamping
        || extended.ocsp_signing
        || !extended.other.is_empty();
    ensure(
        extended.server_auth && extended.client_auth && !others,
        "extended key usage is not serverAuth, clientAuth",
    )?;
    check_names(&leaf, expected.names)
}

fn check_subject(leaf: &X509Certificate<'_>, common_name: Option<&str>) -> Result<(), String> {
    let attributes: Vec<_> = leaf.subject().iter_attributes().collect();
    let fits = match (common_name, attributes.as_slice()) {
        (None, []) => true,
        (Some(expected), [_]) => {
            let mut names = leaf.subject().iter_common_name();
            names.next().and_then(|n| n.as_str().ok()) == Some(expected)
        }
        _ => false,
    };
    if fits {
        Ok(())
    } else {
        Err("its subject differs from what was asked".to_owned())
    }
}

fn check_names(leaf: &X509Certificate<'_>, expected: &[SubjectAltName]) -> Result<(), String> {
    let san = leaf
        .subject_alternative_name()
        .map_err(|e| e.to_string())?
        .ok_or("subject alternative name is missing")?;
    if !san.critical {
        return Err("subject alternative name is not critical".to_owned());
    }
    let names = &san.value.general_names;
    let same = names.len() == expected.len()
        && names
            .iter()
            .zip(expected)
            .all(|(name, expected)| match (name, expected) {
                (GeneralName::URI(uri), SubjectAltName::Spiffe(id)) => *uri == id.as_str(),
                (GeneralName::DNSName(dns), SubjectAltName::Dns(name)) => dns == name,
                (GeneralName::IPAddress(bytes), SubjectAltName::Ip(std::net::IpAddr::V4(ip))) => *bytes == ip.octets(),
                (GeneralName::IPAddress(bytes), SubjectAltName::Ip(std::net::IpAddr::V6(ip))) => *bytes == ip.octets(),
                _ => false,
            });
    if same {
        Ok(())
    } else {
        Err("subject alternative names differ from the caller's identity".to_owned())
    }
}

fn check_signature_algorithm(certificate: &X509Certificate<'_>) -> Result<(), String> {
    let algorithm = &certificate.signature_algorithm.algorithm;
    if *algorithm == OID_PKCS1_SHA1WITHRSA || *algorithm == OID_SHA1_WITH_RSA {
        return Err("it is signed with SHA-1".to_owned());
    }
    Ok(())
}

/// Checks a signing certificate and its intermediates up to one of the roots (S4.63): each is a CA certificate that may
/// sign certificates, is valid at `now`, and carries its issuer's signature; path lengths suffice. Returns the
/// earliest NotAfter on the way, root included.
pub fn check_ca_chain(
    signing: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &TrustBundle,
    now: OffsetDateTime,
) -> Result<OffsetDateTime, Error> {
    let bad = |text: String| Error::BadCa(text);
    let mut current = signing.clone();
    let mut earliest: Option<OffsetDateTime> = None;
    // Number of CA certificates below the current one; compared with its path length (RFC 5280 4.2.1.9).
    for depth in 0..MAX_CHAIN {
        let next = {
            let (_, certificate) =
                X509Certificate::from_der(&current).map_err(|e| bad(format!("a certificate cannot be parsed: {e}")))?;
            let name = certificate.subject().to_string();
            check_ca_certificate(&certificate, depth, now)
                .map_err(|why| bad(format!("certificate {name:?}: {why}")))?;
            let not_after = certificate.validity().not_after.to_datetime();
            earliest = Some(earliest.map_or(not_after, |e| e.min(not_after)));
            if roots.contains(&current) {
                return Ok(earliest.unwrap_or(not_after));
            }
            check_signature_algorithm(&certificate).map_err(|why| bad(format!("certificate {name:?}: {why}")))?;
            let issued_by = |candidate: &&CertificateDer<'_>| {
                // A self-signed certificate that is not trusted leads nowhere.
                candidate.as_ref() != current.as_ref()
                    && X509Certificate::from_der(candidate).is_ok_and(|(_, issuer)| {
                        issuer.subject().as_raw() == certificate.issuer().as_raw()
                            && certificate.verify_signature(Some(issuer.public_key())).is_ok()
                    })
            };
            roots
                .certificates()
                .iter()
                .find(issued_by)
                .map(|c| c.as_ref().to_vec())
                .or_else(|| intermediates.iter().find(issued_by).map(|c| c.as_ref().to_vec()))
                .ok_or_else(|| {
                    bad(format!(
                        "certificate {name:?} does not verify to root-cert.pem: no certificate for its issuer {:?}",
                        certificate.issuer().to_string()
                    ))
                })?
        };
        current = CertificateDer::from(next);
    }
    Err(bad(format!(
        "the chain to the root is longer than {MAX_CHAIN} certificates"
    )))
}

fn check_ca_certificate(certificate: &X509Certificate<'_>, depth: usize, now: OffsetDateTime) -> Result<(), String> {
    let basic = certificate
        .basic_constraints()
        .map_err(|e| e.to_string())?
        .ok_or("it is not a CA certificate")?;
    if !basic.value.ca {
        return Err("it is not a CA certificate".to_owned());
    }
    if let Some(limit) = basic.value.path_len_constraint {
        // The signing certificate itself has depth 0; it may sign leaves whatever its path length says.
        if (depth as u64) > u64::from(limit) {
            return Err(format!("its path length {limit} forbids the certificates below it"));
        }
    }
    if let Some(usage) = certificate.key_usage().map_err(|e| e.to_string())?
        && !usage.value.key_cert_sign()
    {
        return Err("its key usage does not include certificate signing".to_owned());
    }
    let validity = certificate.validity();
    if now >= validity.not_after.to_datetime() {
        return Err(format!("it expired at {}", validity.not_after));
    }
    if now < validity.not_before.to_datetime() {
        return Err(format!("it is not valid before {}", validity.not_before));
    }
    Ok(())
}
