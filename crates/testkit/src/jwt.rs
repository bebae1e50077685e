//! Tokens of end users: an issuer with keys of every kind, and tokens as good or as bad as a test wants them.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair};
use aws_lc_rs::{hmac, signature::RsaEncoding};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

/// Keys of a token issuer.
pub struct Issuer {
    rsa: RsaKeyPair,
    p256: EcdsaKeyPair,
    p384: EcdsaKeyPair,
    p521: EcdsaKeyPair,
    ed: Ed25519KeyPair,
    secret: [u8; 64],
}

fn must<T, E: std::fmt::Debug>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|e| panic!("key: {e:?}"))
}

/// Base64url without padding.
pub fn base64url(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

impl Default for Issuer {
    fn default() -> Self {
        Self::new()
    }
}

impl Issuer {
    /// Fresh keys; the RSA key has 2048 bits.
    pub fn new() -> Self {
        let mut secret = [0; 64];
        must(aws_lc_rs::rand::fill(&mut secret));
        Issuer {
            rsa: must(RsaKeyPair::generate(KeySize::Rsa2048)),
            p256: must(EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING)),
            p384: must(EcdsaKeyPair::generate(&signature::ECDSA_P384_SHA384_FIXED_SIGNING)),
            p521: must(EcdsaKeyPair::generate(&signature::ECDSA_P521_SHA512_FIXED_SIGNING)),
            ed: must(Ed25519KeyPair::generate()),
            secret,
        }
    }

    /// A key as JWK: `RSA`, `P-256`, `P-384`, `P-521`, `Ed25519` or `oct`; fields of `more` are added or replace others.
    pub fn jwk(&self, kind: &str, more: Value) -> Value {
        let point = |curve: &str, key: &EcdsaKeyPair| {
            let point = key.public_key().as_ref();
            let (x, y) = point[1..].split_at((point.len() - 1) / 2);
            json!({"kty": "EC", "crv": curve, "x": base64url(x), "y": base64url(y)})
        };
        let mut key = match kind {
            "RSA" => {
                let (n, e) = rsa_components(self.rsa.public_key().as_ref());
                json!({"kty": "RSA", "n": base64url(n), "e": base64url(e)})
            }
            "P-256" => point(kind, &self.p256),
            "P-384" => point(kind, &self.p384),
            "P-521" => point(kind, &self.p521),
            "Ed25519" => json!({"kty": "OKP", "crv": kind, "x": base64url(self.ed.public_key())}),
            "oct" => json!({"kty": "oct", "k": base64url(self.secret)}),
            other => panic!("no key of kind {other}"),
        };
        for (name, value) in more.as_object().into_iter().flatten() {
            key[name] = value.clone();
        }
        key
    }

    /// A key set of these keys.
    pub fn jwks(keys: &[Value]) -> String {
        json!({ "keys": keys }).to_string()
    }

    /// Signs with the key that fits the algorithm; unknown algorithms give 64 bytes that are no signature.
    pub fn sign(&self, alg: &str, message: &[u8]) -> Vec<u8> {
        let rsa = |encoding: &'static dyn RsaEncoding| {
            let mut out = vec![0; self.rsa.public_modulus_len()];
            must(self.rsa.sign(encoding, &SystemRandom::new(), message, &mut out));
            out
        };
        let ecdsa = |key: &EcdsaKeyPair| must(key.sign(&SystemRandom::new(), message)).as_ref().to_vec();
        let mac = |hash| {
            hmac::sign(&hmac::Key::new(hash, &self.secret), message)
                .as_ref()
                .to_vec()
        };
        match alg {
            "RS256" => rsa(&signature::RSA_PKCS1_SHA256),
            "RS384" => rsa(&signature::RSA_PKCS1_SHA384),
            "RS512" => rsa(&signature::RSA_PKCS1_SHA512),
            "PS256" => rsa(&signature::RSA_PSS_SHA256),
            "PS384" => rsa(&signature::RSA_PSS_SHA384),
            "PS512" => rsa(&signature::RSA_PSS_SHA512),
            "ES256" => ecdsa(&self.p256),
            "ES384" => ecdsa(&self.p384),
            "ES512" => ecdsa(&self.p521),
            "HS256" => mac(hmac::HMAC_SHA256),
            "HS384" => mac(hmac::HMAC_SHA384),
            "HS512" => mac(hmac::HMAC_SHA512),
            "EdDSA" => self.ed.sign(message).as_ref().to_vec(),
            _ => vec![1; 64],
        }
    }

    /// A token with this algorithm and these claims.
    pub fn token(&self, alg: &str, claims: &Value) -> String {
        self.token_with(json!({"alg": alg}), claims)
    }

    /// A token with this header, signed by its `alg`.
    pub fn token_with(&self, header: Value, claims: &Value) -> String {
        let alg = header["alg"].as_str().unwrap_or_default().to_string();
        self.raw(&alg, header.to_string(), claims.to_string())
    }

    /// A token with any bytes as header and payload.
    pub fn raw(&self, alg: &str, header: impl AsRef<[u8]>, payload: impl AsRef<[u8]>) -> String {
        let signed = format!("{}.{}", base64url(header), base64url(payload));
        let signature = self.sign(alg, signed.as_bytes());
        format!("{signed}.{}", base64url(signature))
    }
}

/// Modulus and exponent of a PKCS#1 public key.
fn rsa_components(der: &[u8]) -> (Vec<u8>, Vec<u8>) {
    // SEQUENCE { INTEGER, INTEGER }, lengths in the long or short form.
    fn take(bytes: &[u8]) -> (&[u8], &[u8]) {
        let (length, skip) = match bytes[1] {
            0x81 => (usize::from(bytes[2]), 3),
            0x82 => (usize::from(bytes[2]) << 8 | usize::from(bytes[3]), 4),
            short => (usize::from(short), 2),
        };
        bytes[skip..].split_at(length)
    }
    let (sequence, _) = take(der);
    let (n, rest) = take(sequence);
    let (e, _) = take(rest);
    let positive = |number: &[u8]| number[number.iter().take_while(|b| **b == 0).count()..].to_vec();
    (positive(n), positive(e))
}
