//! Certificate signing requests: made by workloads, read (and distrusted) by the authority.
//!
//! The authority takes only the public key and the common name from a request; the names in it are ignored, because the
//! caller's authenticated identity decides them (S4.14).

use rcgen::{CertificateParams, DistinguishedName, SanType, SubjectPublicKeyInfo};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

use crate::error::Error;
use crate::key::{MIN_RSA_BITS, PrivateKey};
use crate::pem;
use crate::spiffe::SpiffeId;

/// Largest certificate request accepted, in bytes of PEM. An RSA-8192 request has about 5 kB.
pub const MAX_CSR_BYTES: usize = 32 * 1024;
/// Largest RSA modulus accepted: larger ones cost the verifier more than they protect, and rustls refuses them.
const MAX_RSA_BITS: usize = 8192;
/// RFC 5280 upper bound `ub-common-name`.
const MAX_COMMON_NAME: usize = 64;

/// Makes a PEM request for `id`, signed with `key`: SAN = the identity, empty subject (S4.94).
pub fn build_csr(key: &PrivateKey, id: &SpiffeId) -> Result<String, Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    let request = params.serialize_request(key)?;
    Ok(pem::encode("CERTIFICATE REQUEST", request.der()))
}

/// A parsed request whose signature by its own key has been verified and whose key is strong enough.
#[derive(Debug, Clone)]
pub struct Csr {
    pub(crate) public_key: SubjectPublicKeyInfo,
    pub(crate) public_key_der: Vec<u8>,
    pub(crate) common_name: Option<String>,
}

impl Csr {
    /// Stands in for a request by the holder of `key` itself: the authority's own server certificate needs no proof of
    /// possession.
    pub fn for_key(key: &PrivateKey) -> Result<Self, Error> {
        let public_key_der = key.public_key_info();
        let public_key = SubjectPublicKeyInfo::from_der(&public_key_der)?;
        Ok(Self {
            public_key,
            public_key_der,
            common_name: None,
        })
    }

    /// Parses and verifies a PEM request.
    ///
    /// # Errors
    /// [`Error::BadRequest`] when it is too large, not exactly one request, not signed by its own key, or when the key
    /// is neither RSA of 2048–8192 bits, ECDSA P-256 or P-384, nor Ed25519.
    pub fn from_pem(text: &str) -> Result<Self, Error> {
        if text.len() > MAX_CSR_BYTES {
            return Err(Error::BadRequest(format!(
                "{} bytes, more than the {MAX_CSR_BYTES} allowed",
                text.len()
            )));
        }
        Self::from_der(&pem::read_csr(text)?)
    }

    /// As [`Csr::from_pem`], from DER.
    pub fn from_der(der: &[u8]) -> Result<Self, Error> {
        let (rest, request) = X509CertificationRequest::from_der(der)
            .map_err(|e| Error::BadRequest(format!("certificate signing request cannot be parsed: {e}")))?;
        if !rest.is_empty() {
            return Err(Error::BadRequest(
                "bytes follow the certificate signing request".to_owned(),
            ));
        }
        let info = &request.certification_request_info;
        check_key(&info.subject_pki)?;
        // The parser would verify SHA-1 for old certificates; a request made today has no excuse.
        let algorithm = &request.signature_algorithm.algorithm;
        if *algorithm == OID_PKCS1_SHA1WITHRSA || *algorithm == OID_SHA1_WITH_RSA {
            return Err(Error::BadRequest("signed with SHA-1".to_owned()));
        }
        request
            .verify_signature()
            .map_err(|e| Error::BadRequest(format!("signature does not verify with the request's own key: {e}")))?;
        let public_key_der = info.subject_pki.raw.to_vec();
        let public_key = SubjectPublicKeyInfo::from_der(&public_key_der)
            .map_err(|e| Error::BadRequest(format!("public key is not supported: {e}")))?;
        // What is written into the certificate must be what was signed here, to the byte.
        if rcgen::PublicKeyData::subject_public_key_info(&public_key) != public_key_der {
            return Err(Error::BadRequest(
                "public key is not in its canonical encoding".to_owned(),
            ));
        }
        Ok(Self {
            public_key,
            public_key_der,
            common_name: common_name(&request)?,
        })
    }

    /// The common name of the request's subject, if it has one.
    pub fn common_name(&self) -> Option<&str> {
        self.common_name.as_deref()
    }
}

fn check_key(info: &x509_parser::x509::SubjectPublicKeyInfo<'_>) -> Result<(), Error> {
    match info
        .parsed()
        .map_err(|e| Error::BadRequest(format!("public key cannot be parsed: {e}")))?
    {
        PublicKey::RSA(rsa) => {
            let bits = rsa_bits(rsa.modulus);
            if bits < MIN_RSA_BITS {
                return Err(Error::BadRequest(format!(
                    "RSA key of {bits} bits, at least {MIN_RSA_BITS} are required"
                )));
            }
            if bits > MAX_RSA_BITS {
                return Err(Error::BadRequest(format!(
                    "RSA key of {bits} bits, at most {MAX_RSA_BITS} are accepted"
                )));
            }
            match rsa.try_exponent() {
                Ok(exponent) if exponent >= 3 && exponent % 2 == 1 => Ok(()),
                _ => Err(Error::BadRequest("RSA public exponent is not acceptable".to_owned())),
            }
        }
        // The curve itself is checked by the signature verification, which knows P-256 and P-384 only.
        PublicKey::EC(_) => Ok(()),
        PublicKey::Unknown(_) => Ok(()),
        _ => Err(Error::BadRequest(
            "public key is neither RSA, ECDSA nor Ed25519".to_owned(),
        )),
    }
}

/// The length of a big-endian modulus in bits, leading zeros not counted.
fn rsa_bits(modulus: &[u8]) -> usize {
    let significant = modulus
        .iter()
        .position(|b| *b != 0)
        .map_or(&[][..], |at| &modulus[at..]);
    significant
        .first()
        .map_or(0, |first| significant.len() * 8 - first.leading_zeros() as usize)
}

fn common_name(request: &X509CertificationRequest<'_>) -> Result<Option<String>, Error> {
    let mut names = request.certification_request_info.subject.iter_common_name();
    let Some(first) = names.next() else { return Ok(None) };
    if names.next().is_some() {
        return Err(Error::BadRequest("subject has more than one common name".to_owned()));
    }
    let text = first
        .as_str()
        .map_err(|_| Error::BadRequest("common name is not text".to_owned()))?;
    if text.is_empty() {
        return Ok(None);
    }
    if text.chars().count() > MAX_COMMON_NAME || text.chars().any(char::is_control) {
        return Err(Error::BadRequest(format!(
            "common name is longer than {MAX_COMMON_NAME} characters or holds control characters"
        )));
    }
    Ok(Some(text.to_owned()))
}
