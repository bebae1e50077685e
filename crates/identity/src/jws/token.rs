//! Tokens: form, typed claims, time, audiences and signature, in the order in which Envoy looks at them (S3.25).

use serde_json::{Map, Value};

use super::base64url::decode;
use super::json::strict_json;
use super::{Algorithm, CLOCK_SKEW, Failure, KeySet, sanitize_audience};

/// Largest token that is looked at, in bytes; more than fits into a request's head.
pub const MAX_TOKEN: usize = 64 << 10;

/// A token whose form is right. Nothing is verified by parsing: claims count only after [`Token::verify`].
#[derive(Debug)]
pub struct Token<'t> {
    /// Header and payload as sent: what is signed.
    signed: &'t str,
    algorithm: Algorithm,
    kid: Option<String>,
    /// The header asks for an extension that is not understood (RFC 7515 section 4.1.11, RFC 7797).
    extended: bool,
    payload: Vec<u8>,
    claims: Map<String, Value>,
    expires: Option<u64>,
    not_before: u64,
    signature: Vec<u8>,
}

impl<'t> Token<'t> {
    /// Reads a token in compact form.
    ///
    /// # Errors
    /// The first fault, in the order: form, header, payload, typed claims, signature.
    pub fn parse(text: &'t str) -> Result<Token<'t>, Failure> {
        if text.len() > MAX_TOKEN {
            return Err(Failure::Form);
        }
        let mut sections = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (sections.next(), sections.next(), sections.next(), sections.next())
        else {
            return Err(Failure::Form);
        };
        if header.is_empty() || payload.is_empty() || signature.is_empty() {
            return Err(Failure::Form);
        }
        let signed = &text[..header.len() + 1 + payload.len()];

        let header = decode(header).ok_or(Failure::HeaderBase64)?;
        let Ok(Value::Object(header)) = strict_json(&header) else {
            return Err(Failure::HeaderJson);
        };
        let Some(Value::String(alg)) = header.get("alg") else {
            return Err(Failure::HeaderAlg);
        };
        let algorithm = Algorithm::by_name(alg).ok_or(Failure::AlgorithmUnsupported)?;
        let extended = header.contains_key("crit") || header.get("b64").is_some_and(|b| *b != Value::Bool(true));
        let kid = match header.get("kid") {
            None => None,
            Some(Value::String(kid)) => Some(kid.clone()).filter(|k| !k.is_empty()),
            Some(_) => return Err(Failure::HeaderKid),
        };

        let payload = decode(payload).ok_or(Failure::PayloadBase64)?;
        let Ok(Value::Object(claims)) = strict_json(&payload) else {
            return Err(Failure::PayloadJson);
        };
        let string = |name: &str, failure: Failure| match claims.get(name) {
            None | Some(Value::String(_)) => Ok(()),
            Some(_) => Err(failure),
        };
        string("iss", Failure::IssNotString)?;
        string("sub", Failure::SubNotString)?;
        seconds(&claims, "iat", Failure::IatNotInteger, Failure::IatRange)?;
        let not_before = seconds(&claims, "nbf", Failure::NbfNotInteger, Failure::NbfRange)?.unwrap_or(0);
        let expires = seconds(&claims, "exp", Failure::ExpNotInteger, Failure::ExpRange)?;
        string("jti", Failure::JtiNotString)?;
        match claims.get("aud") {
            None | Some(Value::String(_)) => {}
            Some(Value::Array(list)) if list.iter().all(Value::is_string) => {}
            Some(_) => return Err(Failure::Audience),
        }
        let signature = decode(signature).ok_or(Failure::SignatureBase64)?;
        Ok(Token {
            signed,
            algorithm,
            kid,
            extended,
            payload,
            claims,
            expires,
            not_before,
            signature,
        })
    }

    /// The `iss` claim; empty when absent.
    pub fn issuer(&self) -> &str {
        self.claims.get("iss").and_then(Value::as_str).unwrap_or_default()
    }

    /// The `kid` of the header.
    pub fn key_id(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// The `alg` of the header.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Unix seconds of `exp`.
    pub fn expires(&self) -> Option<u64> {
        self.expires
    }

    /// Unix seconds of `nbf`; 0 without one.
    pub fn not_before(&self) -> u64 {
        self.not_before
    }

    /// The payload as received: bytes of a JSON object.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The claims. They count only after [`Token::verify`].
    pub fn claims(&self) -> &Map<String, Value> {
        &self.claims
    }

    /// Takes the claims out.
    pub fn into_claims(self) -> Map<String, Value> {
        self.claims
    }

    /// `nbf` and `exp`, with [`CLOCK_SKEW`]; `now` in Unix seconds (S3.26).
    ///
    /// # Errors
    /// Too early or too late.
    pub fn check_time(&self, now: u64) -> Result<(), Failure> {
        check_time(self.not_before, self.expires, now)
    }

    /// Whether any of the token's audiences is among these; an empty list accepts any (S3.41).
    ///
    /// # Errors
    /// [`Failure::AudienceNotAllowed`].
    pub fn check_audience(&self, accepted: &[String]) -> Result<(), Failure> {
        let accepts = |audience: &str| {
            let audience = sanitize_audience(audience);
            accepted.iter().any(|a| sanitize_audience(a) == audience)
        };
        let allowed = accepted.is_empty()
            || match self.claims.get("aud") {
                Some(Value::String(one)) => accepts(one),
                Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(accepts),
                _ => false,
            };
        if allowed {
            Ok(())
        } else {
            Err(Failure::AudienceNotAllowed)
        }
    }

    /// The signature, by any key that fits the header.
    ///
    /// # Errors
    /// Which step found no key.
    pub fn verify(&self, keys: &KeySet) -> Result<(), Failure> {
        keys.verify(
            self.kid.as_deref(),
            self.algorithm,
            self.signed.as_bytes(),
            &self.signature,
        )?;
        // Signed, but under rules that are not understood here.
        if self.extended {
            return Err(Failure::Verification);
        }
        Ok(())
    }
}

/// `nbf` and `exp` against the clock (all in Unix seconds), with [`CLOCK_SKEW`]; for tokens that were verified before.
///
/// # Errors
/// Too early or too late.
pub fn check_time(not_before: u64, expires: Option<u64>, now: u64) -> Result<(), Failure> {
    if now.saturating_add(CLOCK_SKEW) < not_before {
        return Err(Failure::NotYetValid);
    }
    match expires {
        Some(expires) if now > expires.saturating_add(CLOCK_SKEW) => Err(Failure::Expired),
        _ => Ok(()),
    }
}

/// A time claim: any number that is not negative and fits 64 bits; fractions are cut off.
fn seconds(
    claims: &Map<String, Value>,
    name: &str,
    not_integer: Failure,
    out_of_range: Failure,
) -> Result<Option<u64>, Failure> {
    const LIMIT: f64 = 18_446_744_073_709_551_616.0;
    let Some(value) = claims.get(name) else {
        return Ok(None);
    };
    let number = value.as_f64().ok_or(not_integer)?;
    if !(0.0..LIMIT).contains(&number) {
        return Err(out_of_range);
    }
    // Exact where the claim is an integer; casting cuts off fractions.
    Ok(Some(value.as_u64().unwrap_or(number as u64)))
}
