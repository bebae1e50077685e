//! Key sets: which keys are usable and for what.
//!
//! As in Envoy, keys that cannot be used are passed over and the rest counts; a set without any usable key is an error.

use aws_lc_rs::hmac;
use aws_lc_rs::signature::{self, ParsedPublicKey, VerificationAlgorithm};
use serde_json::{Map, Value};

use super::base64url::decode_strict;
use super::json::strict_json;
use super::{Algorithm, Failure};

/// Largest key set, in bytes.
pub const MAX_KEY_SET: usize = 1 << 20;
/// Most keys of a set.
pub const MAX_KEYS: usize = 256;
/// Largest RSA modulus, in bytes; what aws-lc verifies with.
const MAX_MODULUS: usize = 1024;

/// A key set that verifies nothing, for issuers whose keys are not known (S3.62). Its point was not made from a private
/// key: the coordinate is the first SHA-256 of "mantlet: nobody holds this key", followed by a counter, that lies on the
/// curve. So nobody knows, or ever knew, a private half. Tokens fail with [`Failure::Verification`].
pub const NO_KEYS: &str = r#"{"keys":[{"kty":"EC","crv":"P-256","x":"nack-kJuKuRPB4RTQhhmBBq6tZG3WFCoUAzQMoN5PZE","y":"ZhdY9bxRrXxTgpu43ow_coS9FZRSwKlMG-PMDSk9NcQ"}]}"#;

/// Why a key set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// Larger than [`MAX_KEY_SET`] or more keys than [`MAX_KEYS`].
    #[error("the key set is too large: at most {MAX_KEY_SET} bytes and {MAX_KEYS} keys are read")]
    TooLarge,
    /// No JSON document.
    #[error("the key set is no JSON: {0}")]
    Json(String),
    /// No `keys` list.
    #[error("the key set has no list \"keys\"")]
    NoList,
    /// Nothing in the list can be used.
    #[error("the key set has no usable key{}", .0.as_ref().map(|r| format!(" ({r})")).unwrap_or_default())]
    NoUsableKey(Option<String>),
}

/// The name by which a proxy tells the control plane which key set it holds: `jwks/` and the first half of its SHA-256.
pub fn key_set_name(json: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, json);
    let hex: String = digest.as_ref()[..16].iter().map(|b| format!("{b:02x}")).collect();
    format!("jwks/{hex}")
}

/// Parsed public keys of an issuer.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    kid: Option<Box<str>>,
    /// The key's own `alg`; EC keys without one have that of their curve only as material.
    alg: Option<Algorithm>,
    material: Material,
}

enum Material {
    /// One parsed key per algorithm that it may be used with.
    Public(Vec<(Algorithm, ParsedPublicKey)>),
    Ed25519(ParsedPublicKey),
    Secret(Vec<(Algorithm, hmac::Key)>),
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Material::Public(_) => "public key",
            Material::Ed25519(_) => "Ed25519 public key",
            Material::Secret(_) => "secret",
        })
    }
}

impl KeySet {
    /// Reads a JWK set.
    ///
    /// # Errors
    /// When the text is no key set, or holds no key that could verify anything.
    pub fn parse(json: &[u8]) -> Result<KeySet, KeySetError> {
        if json.len() > MAX_KEY_SET {
            return Err(KeySetError::TooLarge);
        }
        let set = strict_json(json).map_err(|e| KeySetError::Json(e.to_string()))?;
        let Some(list) = set.get("keys").and_then(Value::as_array) else {
            return Err(KeySetError::NoList);
        };
        if list.len() > MAX_KEYS {
            return Err(KeySetError::TooLarge);
        }
        let mut keys = Vec::with_capacity(list.len());
        let mut reason = None;
        for (index, key) in list.iter().enumerate() {
            match Key::parse(key) {
                Ok(key) => keys.push(key),
                Err(problem) => reason = reason.or(Some(format!("key {index}: {problem}"))),
            }
        }
        if keys.is_empty() {
            return Err(KeySetError::NoUsableKey(reason));
        }
        Ok(KeySet { keys })
    }

    /// Number of usable keys.
    #[allow(clippy::len_without_is_empty, reason = "a set without usable keys does not exist")]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// The `kid`s of its keys; keys without one are left out.
    pub fn key_ids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().filter_map(|k| k.kid.as_deref())
    }

    /// Verifies a signature; every key that fits `kid` and `alg` is tried, in order (S3.28).
    pub(super) fn verify(
        &self,
        kid: Option<&str>,
        alg: Algorithm,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), Failure> {
        let mut fits = false;
        for key in &self.keys {
            if let (Some(own), Some(asked)) = (key.kid.as_deref(), kid)
                && own != asked
            {
                continue;
            }
            if key.alg.is_some_and(|own| own != alg) {
                continue;
            }
            fits = true;
            match &key.material {
                // Envoy ends here, whatever keys follow.
                Material::Ed25519(_) if signature.len() != 64 => return Err(Failure::Ed25519Length),
                Material::Ed25519(key) => {
                    if alg == Algorithm::EdDsa && key.verify_sig(message, signature).is_ok() {
                        return Ok(());
                    }
                }
                Material::Public(keys) => {
                    let key = keys.iter().find(|(a, _)| *a == alg);
                    if key.is_some_and(|(_, k)| k.verify_sig(message, signature).is_ok()) {
                        return Ok(());
                    }
                }
                Material::Secret(keys) => {
                    let key = keys.iter().find(|(a, _)| *a == alg);
                    if key.is_some_and(|(_, k)| hmac::verify(k, message, signature).is_ok()) {
                        return Ok(());
                    }
                }
            }
        }
        Err(if fits {
            Failure::Verification
        } else {
            Failure::NoMatchingKey
        })
    }
}

/// RSA algorithms with their verifiers. Keys below 2048 bits are refused by all of them.
const RSA: [(Algorithm, &dyn VerificationAlgorithm); 6] = [
    (Algorithm::Rs256, &signature::RSA_PKCS1_2048_8192_SHA256),
    (Algorithm::Rs384, &signature::RSA_PKCS1_2048_8192_SHA384),
    (Algorithm::Rs512, &signature::RSA_PKCS1_2048_8192_SHA512),
    (Algorithm::Ps256, &signature::RSA_PSS_2048_8192_SHA256),
    (Algorithm::Ps384, &signature::RSA_PSS_2048_8192_SHA384),
    (Algorithm::Ps512, &signature::RSA_PSS_2048_8192_SHA512),
];

impl Key {
    fn parse(value: &Value) -> Result<Key, String> {
        let Some(fields) = value.as_object() else {
            return Err("is no object".into());
        };
        let kid = match fields.get("kid") {
            None => None,
            Some(Value::String(kid)) => Some(kid.as_str()).filter(|k| !k.is_empty()),
            Some(_) => return Err("kid is no string".into()),
        };
        let alg = match fields.get("alg") {
            None => None,
            Some(Value::String(alg)) if alg.is_empty() => None,
            Some(Value::String(alg)) => {
                Some(Algorithm::by_name(alg).ok_or_else(|| format!("alg {alg:?} is not supported"))?)
            }
            Some(_) => return Err("alg is no string".into()),
        };
        let material = match fields.get("kty").and_then(Value::as_str) {
            Some("RSA") => rsa(fields, alg)?,
            Some("EC") => elliptic(fields, alg)?,
            Some("OKP") => edwards(fields, alg)?,
            Some("oct") => secret(fields, alg)?,
            Some(other) => return Err(format!("kty {other:?} is not supported")),
            None => return Err("kty is missing".into()),
        };
        Ok(Key {
            kid: kid.map(Into::into),
            alg,
            material,
        })
    }
}

fn bytes(fields: &Map<String, Value>, name: &str) -> Result<Vec<u8>, String> {
    let text = fields
        .get(name)
        .and_then(Value::as_str)
        .ok_or_else(|| format!("{name} is missing"))?;
    match decode_strict(text) {
        Some(bytes) if !bytes.is_empty() => Ok(bytes),
        _ => Err(format!("{name} is not base64url")),
    }
}

fn rsa(fields: &Map<String, Value>, alg: Option<Algorithm>) -> Result<Material, String> {
    if alg.is_some_and(|a| !RSA.iter().any(|(b, _)| a == *b)) {
        return Err("alg does not fit kty RSA".into());
    }
    let (n, e) = (bytes(fields, "n")?, bytes(fields, "e")?);
    let (n, e) = (unsigned(&n), unsigned(&e));
    // A large exponent only costs time; nobody has one.
    if n.len() > MAX_MODULUS || e.len() > 4 {
        return Err("the RSA key is too large".into());
    }
    if e.is_empty() || e == [1] || e.last().is_some_and(|low| low & 1 == 0) {
        return Err("the RSA exponent is 0, 1 or even".into());
    }
    let mut body = der(2, n);
    body.extend(der(2, e));
    let public = der(0x30, &body);
    let wanted = RSA.iter().filter(|(a, _)| alg.is_none_or(|own| own == *a));
    let keys = wanted
        .map(|(a, verifier)| Some((*a, ParsedPublicKey::new(*verifier, &public).ok()?)))
        .collect::<Option<Vec<_>>>();
    // Parsing does not look at the size; verification does, so that it is said here.
    if n.len() < 256 {
        return Err("the RSA key has less than 2048 bits".into());
    }
    keys.map(Material::Public)
        .ok_or_else(|| "the RSA key is refused".into())
}

/// A big-endian number without leading zeros.
fn unsigned(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|b| **b == 0).count();
    &bytes[zeros..]
}

/// DER: an INTEGER that is not negative (tag 2), or a SEQUENCE.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let pad = tag == 2 && content.first().is_some_and(|b| *b >= 0x80);
    let length = content.len() + usize::from(pad);
    let mut out = vec![tag];
    match length {
        0..=0x7f => out.push(length as u8),
        0x80..=0xff => out.extend([0x81, length as u8]),
        _ => out.extend([0x82, (length >> 8) as u8, length as u8]),
    }
    if pad {
        out.push(0);
    }
    out.extend_from_slice(content);
    out
}

fn elliptic(fields: &Map<String, Value>, alg: Option<Algorithm>) -> Result<Material, String> {
    let of_curve = match fields.get("crv") {
        // Envoy takes the curve from the algorithm, and P-256 without one.
        None => alg.unwrap_or(Algorithm::Es256),
        Some(crv) => match crv.as_str() {
            Some("P-256") => Algorithm::Es256,
            Some("P-384") => Algorithm::Es384,
            Some("P-521") => Algorithm::Es512,
            _ => return Err("crv is not supported".into()),
        },
    };
    let (verifier, size): (&'static dyn VerificationAlgorithm, usize) = match of_curve {
        Algorithm::Es256 => (&signature::ECDSA_P256_SHA256_FIXED, 32),
        Algorithm::Es384 => (&signature::ECDSA_P384_SHA384_FIXED, 48),
        Algorithm::Es512 => (&signature::ECDSA_P521_SHA512_FIXED, 66),
        _ => return Err("alg does not fit kty EC".into()),
    };
    if alg.is_some_and(|own| own != of_curve) {
        return Err("alg does not fit crv".into());
    }
    let mut point = vec![4];
    for name in ["x", "y"] {
        let coordinate = bytes(fields, name)?;
        let coordinate = unsigned(&coordinate);
        let Some(pad) = size.checked_sub(coordinate.len()) else {
            return Err(format!("{name} is too long for its curve"));
        };
        point.extend(std::iter::repeat_n(0, pad));
        point.extend_from_slice(coordinate);
    }
    match ParsedPublicKey::new(verifier, &point) {
        Ok(key) => Ok(Material::Public(vec![(of_curve, key)])),
        Err(_) => Err("the point is not on its curve".into()),
    }
}

fn edwards(fields: &Map<String, Value>, alg: Option<Algorithm>) -> Result<Material, String> {
    if alg.is_some_and(|a| a != Algorithm::EdDsa) {
        return Err("alg does not fit kty OKP".into());
    }
    if fields.get("crv").and_then(Value::as_str) != Some("Ed25519") {
        return Err("crv is not supported".into());
    }
    let x = bytes(fields, "x")?;
    if x.len() != 32 {
        return Err("x is not 32 bytes long".into());
    }
    match ParsedPublicKey::new(&signature::ED25519, &x) {
        Ok(key) => Ok(Material::Ed25519(key)),
        Err(_) => Err("the point is refused".into()),
    }
}

fn secret(fields: &Map<String, Value>, alg: Option<Algorithm>) -> Result<Material, String> {
    let all = [
        (Algorithm::Hs256, hmac::HMAC_SHA256),
        (Algorithm::Hs384, hmac::HMAC_SHA384),
        (Algorithm::Hs512, hmac::HMAC_SHA512),
    ];
    if alg.is_some_and(|a| !all.iter().any(|(b, _)| a == *b)) {
        return Err("alg does not fit kty oct".into());
    }
    let k = zeroize::Zeroizing::new(bytes(fields, "k")?);
    // RFC 7518 section 3.2: at least as long as the hash.
    if k.len() < 32 {
        return Err("the secret has less than 256 bits".into());
    }
    let wanted = all.into_iter().filter(|(a, _)| alg.is_none_or(|own| own == *a));
    Ok(Material::Secret(
        wanted.map(|(a, hash)| (a, hmac::Key::new(hash, &k))).collect(),
    ))
}
