//! Signs the generator's tokens.

use std::collections::HashMap;
use std::sync::Mutex;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mantlet_differential::generate::KeySets;
use mantlet_differential::world::{Signature, Token};
use serde_json::json;

/// Keys of both issuers and of a stranger.
pub(crate) struct Mint {
    first: EcdsaKeyPair,
    first_ed: Ed25519KeyPair,
    second: EcdsaKeyPair,
    stranger: EcdsaKeyPair,
    minted: Mutex<HashMap<(Signature, String), String>>,
}

fn b64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn ecdsa() -> EcdsaKeyPair {
    EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap()
}

fn jwk(key: &EcdsaKeyPair, kid: &str) -> serde_json::Value {
    let point = key.public_key().as_ref();
    json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": kid, "x": b64(&point[1..33]), "y": b64(&point[33..])})
}

impl Mint {
    pub(crate) fn new() -> Mint {
        Mint {
            first: ecdsa(),
            first_ed: Ed25519KeyPair::generate().unwrap(),
            second: ecdsa(),
            stranger: ecdsa(),
            minted: Mutex::default(),
        }
    }

    pub(crate) fn key_sets(&self) -> KeySets {
        let x = b64(self.first_ed.public_key().as_ref());
        let ed = json!({"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "kid": "first-ed", "x": x});
        KeySets {
            first: json!({"keys": [jwk(&self.first, "first"), ed]}).to_string(),
            second: json!({"keys": [jwk(&self.second, "second")]}).to_string(),
        }
    }

    pub(crate) fn sign(&self, token: &Token) -> String {
        let key = (token.signature, token.claims.to_string());
        let mut minted = self.minted.lock().unwrap();
        minted
            .entry(key)
            .or_insert_with_key(|(signature, claims)| self.make(*signature, claims))
            .clone()
    }

    fn make(&self, signature: Signature, claims: &str) -> String {
        let (alg, kid) = match signature {
            Signature::First | Signature::Forged => ("ES256", "first"),
            Signature::FirstEd => ("EdDSA", "first-ed"),
            Signature::Second => ("ES256", "second"),
            Signature::Unknown => ("ES256", "nobody"),
            Signature::Absent | Signature::Malformed => ("none", "first"),
        };
        let header = json!({"alg": alg, "kid": kid, "typ": "JWT"}).to_string();
        let signed = format!("{}.{}", b64(header), b64(claims));
        let ec = |key: &EcdsaKeyPair| {
            let signature = key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
            format!("{signed}.{}", b64(signature))
        };
        match signature {
            Signature::First => ec(&self.first),
            Signature::FirstEd => format!("{signed}.{}", b64(self.first_ed.sign(signed.as_bytes()))),
            Signature::Second => ec(&self.second),
            Signature::Forged | Signature::Unknown => ec(&self.stranger),
            Signature::Absent => format!("{signed}."),
            Signature::Malformed => signed,
        }
    }
}
