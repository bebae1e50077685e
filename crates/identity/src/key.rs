//! Private keys of workloads and authorities. A key is made here, stays in aws-lc's memory (wiped when freed) and in one
//! zeroised DER copy for rustls and for the CA's own secret; nothing prints it.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256,
    RsaKeyPair,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::{Zeroize, Zeroizing};

use crate::error::Error;
use crate::pem;

/// Smallest RSA modulus that is accepted anywhere, in bits (S4.15).
pub const MIN_RSA_BITS: usize = 2048;

/// Which kind of key to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyAlgorithm {
    /// ECDSA over P-256, the default.
    #[default]
    EcdsaP256,
    /// ECDSA over P-384 (`ECC_CURVE=P384`).
    EcdsaP384,
    /// RSA with a modulus of 2048 bits.
    Rsa2048,
    /// RSA with a modulus of 3072 bits.
    Rsa3072,
    /// RSA with a modulus of 4096 bits.
    Rsa4096,
}

impl KeyAlgorithm {
    /// The RSA kind for Istio's variables `WORKLOAD_RSA_KEY_SIZE` and `CITADEL_SELF_SIGNED_CA_RSA_KEY_SIZE`.
    pub fn rsa(bits: usize) -> Result<Self, Error> {
        match bits {
            2048 => Ok(Self::Rsa2048),
            3072 => Ok(Self::Rsa3072),
            4096 => Ok(Self::Rsa4096),
            _ => Err(Error::Crypto(format!(
                "RSA key size {bits} is not supported: use 2048, 3072 or 4096"
            ))),
        }
    }
}

enum Pair {
    P256(EcdsaKeyPair),
    P384(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

struct Inner {
    pair: Pair,
    der: PrivateKeyDer<'static>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.der.zeroize();
    }
}

/// A private key. Clones share one copy in memory.
#[derive(Clone)]
pub struct PrivateKey(Arc<Inner>);

impl PrivateKey {
    /// Makes a new key from the operating system's random generator.
    pub fn generate(algorithm: KeyAlgorithm) -> Result<Self, Error> {
        let rng = SystemRandom::new();
        let failed = |_| Error::Crypto("key generation failed".to_owned());
        let pkcs8 = match algorithm {
            KeyAlgorithm::EcdsaP256 => {
                let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &rng).map_err(failed)?;
                Zeroizing::new(document.as_ref().to_vec())
            }
            KeyAlgorithm::EcdsaP384 => {
                let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, &rng).map_err(failed)?;
                Zeroizing::new(document.as_ref().to_vec())
            }
            KeyAlgorithm::Rsa2048 | KeyAlgorithm::Rsa3072 | KeyAlgorithm::Rsa4096 => {
                let size = match algorithm {
                    KeyAlgorithm::Rsa3072 => KeySize::Rsa3072,
                    KeyAlgorithm::Rsa4096 => KeySize::Rsa4096,
                    _ => KeySize::Rsa2048,
                };
                let pair = RsaKeyPair::generate(size).map_err(failed)?;
                let document = pair.as_der().map_err(failed)?;
                Zeroizing::new(document.as_ref().to_vec())
            }
        };
        Self::from_der(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8.to_vec())))
    }

    /// Reads the one key of a PEM text (PKCS#8, PKCS#1 or SEC1; RSA of at least 2048 bits, P-256 or P-384). `what`
    /// names the input in errors.
    pub fn from_pem(what: &str, text: &[u8]) -> Result<Self, Error> {
        let der = pem::read_private_key(what, text)?;
        Self::from_der(der).map_err(|e| Error::BadPem {
            what: what.to_owned(),
            reason: e.to_string(),
        })
    }

    fn from_der(der: PrivateKeyDer<'static>) -> Result<Self, Error> {
        let pair = match parse_pair(&der) {
            Ok(pair) => pair,
            Err(error) => {
                let mut der = der;
                der.zeroize();
                return Err(error);
            }
        };
        Ok(Self(Arc::new(Inner { pair, der })))
    }

    /// The key as PEM, for the CA's own Secret or an operator's output directory; wiped when dropped.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let label = match &self.0.der {
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            _ => "PRIVATE KEY",
        };
        pem::encode_secret(label, self.0.der.secret_der())
    }

    /// The DER for rustls. The caller hands it straight on; rustls keeps its own parsed form.
    pub(crate) fn der(&self) -> &PrivateKeyDer<'static> {
        &self.0.der
    }

    /// The subjectPublicKeyInfo in DER, to compare with a certificate's.
    pub fn public_key_info(&self) -> Vec<u8> {
        rcgen::PublicKeyData::subject_public_key_info(self)
    }
}

fn parse_pair(der: &PrivateKeyDer<'static>) -> Result<Pair, Error> {
    let secret = der.secret_der();
    let rsa = match der {
        PrivateKeyDer::Pkcs1(_) => RsaKeyPair::from_der(secret),
        _ => RsaKeyPair::from_pkcs8(secret),
    };
    if let Ok(pair) = rsa {
        let bits = pair.public_modulus_len() * 8;
        if bits < MIN_RSA_BITS {
            return Err(Error::Crypto(format!(
                "RSA key of {bits} bits, at least {MIN_RSA_BITS} are needed"
            )));
        }
        return Ok(Pair::Rsa(pair));
    }
    if let Ok(pair) = EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, secret) {
        return Ok(Pair::P256(pair));
    }
    if let Ok(pair) = EcdsaKeyPair::from_private_key_der(&ECDSA_P384_SHA384_ASN1_SIGNING, secret) {
        return Ok(Pair::P384(pair));
    }
    Err(Error::Crypto(
        "private key is none of RSA (2048 bits or more), ECDSA P-256, ECDSA P-384".to_owned(),
    ))
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0.pair {
            Pair::P256(_) => "PrivateKey(ECDSA P-256)",
            Pair::P384(_) => "PrivateKey(ECDSA P-384)",
            Pair::Rsa(_) => "PrivateKey(RSA)",
        })
    }
}

impl rcgen::PublicKeyData for PrivateKey {
    fn der_bytes(&self) -> &[u8] {
        match &self.0.pair {
            Pair::P256(pair) | Pair::P384(pair) => pair.public_key().as_ref(),
            Pair::Rsa(pair) => pair.public_key().as_ref(),
        }
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        match &self.0.pair {
            Pair::P256(_) => &rcgen::PKCS_ECDSA_P256_SHA256,
            Pair::P384(_) => &rcgen::PKCS_ECDSA_P384_SHA384,
            Pair::Rsa(_) => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

impl rcgen::SigningKey for PrivateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let rng = SystemRandom::new();
        match &self.0.pair {
            Pair::P256(pair) | Pair::P384(pair) => pair
                .sign(&rng, message)
                .map(|signature| signature.as_ref().to_vec())
                .map_err(|_| rcgen::Error::RemoteKeyError),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &rng, message, &mut signature)
                    .map_err(|_| rcgen::Error::RemoteKeyError)?;
                Ok(signature)
            }
        }
    }
}
