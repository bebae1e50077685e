//! Reading and writing PEM with bounds: the only place that turns foreign text into DER.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::pem::{PemObject, SectionKind};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use crate::error::Error;

/// Largest PEM input accepted. A bundle of some hundred roots stays far below; anything larger is a mistake or an
/// attack on our memory.
pub const MAX_PEM_BYTES: usize = 1 << 20;
/// Most certificates accepted in one input.
pub const MAX_CERTIFICATES: usize = 256;

/// All certificates of a PEM text, in order. `what` names the input in errors. Fails when there is none.
pub fn read_certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Error> {
    let bad = |reason: String| Error::BadPem {
        what: what.to_owned(),
        reason,
    };
    if pem.len() > MAX_PEM_BYTES {
        return Err(bad(format!(
            "{} bytes, more than the {MAX_PEM_BYTES} allowed",
            pem.len()
        )));
    }
    let mut out = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        out.push(certificate.map_err(|e| bad(format!("not PEM: {e:?}")))?);
        if out.len() > MAX_CERTIFICATES {
            return Err(bad(format!("more than {MAX_CERTIFICATES} certificates")));
        }
    }
    if out.is_empty() {
        return Err(bad("holds no BEGIN CERTIFICATE block".to_owned()));
    }
    Ok(out)
}

/// The one private key of a PEM text (PKCS#8, PKCS#1 or SEC1).
pub(crate) fn read_private_key(what: &str, pem: &[u8]) -> Result<PrivateKeyDer<'static>, Error> {
    let bad = |reason: String| Error::BadPem {
        what: what.to_owned(),
        reason,
    };
    if pem.len() > MAX_PEM_BYTES {
        return Err(bad(format!(
            "{} bytes, more than the {MAX_PEM_BYTES} allowed",
            pem.len()
        )));
    }
    PrivateKeyDer::from_pem_slice(pem).map_err(|e| bad(format!("no usable private key: {e:?}")))
}

/// The DER of the one certificate request in a PEM text.
pub(crate) fn read_csr(pem: &str) -> Result<Vec<u8>, Error> {
    let mut found = None;
    for section in <(SectionKind, Vec<u8>) as PemObject>::pem_slice_iter(pem.as_bytes()) {
        let (kind, der) = section.map_err(|e| Error::BadRequest(format!("failed to decode PEM: {e:?}")))?;
        if !matches!(kind, SectionKind::Csr) {
            return Err(Error::BadRequest(
                "PEM holds something other than a CERTIFICATE REQUEST".to_owned(),
            ));
        }
        if found.replace(der).is_some() {
            return Err(Error::BadRequest(
                "PEM holds more than one CERTIFICATE REQUEST".to_owned(),
            ));
        }
    }
    found.ok_or_else(|| Error::BadRequest("certificate signing request is not properly encoded".to_owned()))
}

/// One PEM block with 64-column lines and a final newline.
pub fn encode(label: &str, der: &[u8]) -> String {
    let mut out = String::with_capacity(der.len() * 3 / 2 + 64);
    encode_into(&mut out, label, der);
    out
}

/// Several certificates as one PEM text.
pub fn encode_certificates<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'a>>) -> String {
    let mut out = String::new();
    for certificate in certificates {
        encode_into(&mut out, "CERTIFICATE", certificate);
    }
    out
}

/// As [`encode`], for secrets: every intermediate buffer is wiped.
pub(crate) fn encode_secret(label: &str, der: &[u8]) -> Zeroizing<String> {
    // Reserved in full, so that no growth leaves a copy behind.
    let mut out = Zeroizing::new(String::with_capacity(der.len() * 3 / 2 + 256));
    encode_into(&mut out, label, der);
    out
}

fn encode_into(out: &mut String, label: &str, der: &[u8]) {
    out.push_str("-----BEGIN ");
    out.push_str(label);
    out.push_str("-----\n");
    // 48 bytes make one line of 64 characters.
    let mut line = Zeroizing::new([0u8; 64]);
    for chunk in der.chunks(48) {
        if let Ok(n) = STANDARD.encode_slice(chunk, line.as_mut_slice()) {
            out.extend(line[..n].iter().map(|b| char::from(*b)));
            out.push('\n');
        }
    }
    out.push_str("-----END ");
    out.push_str(label);
    out.push_str("-----\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let der: Vec<u8> = (0..=255).collect();
        for len in [1, 47, 48, 49, 96, 256] {
            let text = encode("CERTIFICATE", &der[..len]);
            assert_eq!(
                read_certificates("t", text.as_bytes()).unwrap()[0].as_ref(),
                &der[..len]
            );
            assert!(text.lines().all(|l| l.len() <= 64));
        }
    }

    #[test]
    fn bounds_and_empty_inputs_are_errors_that_name_the_input() {
        let error = read_certificates("root-cert.pem", b"").unwrap_err().to_string();
        assert!(error.contains("root-cert.pem"), "{error}");
        assert!(read_certificates("x", &vec![b'a'; MAX_PEM_BYTES + 1]).is_err());
        let many = encode("CERTIFICATE", b"x").repeat(MAX_CERTIFICATES + 1);
        assert!(read_certificates("x", many.as_bytes()).is_err());
        assert!(
            read_private_key(
                "ca-key.pem",
                b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"
            )
            .is_err()
        );
    }
}
