//! Secrets as the proxy receives them (SDS). Key bytes are wiped when dropped and never printed or serialised.

use std::fmt;

/// A secret with its resource name.
#[derive(Clone, PartialEq)]
pub struct Secret {
    /// Resource name (`default`, `ROOTCA`, `kubernetes://name`).
    pub name: String,
    /// Content.
    pub value: SecretValue,
}

/// Content of a secret.
#[derive(Clone, PartialEq)]
pub enum SecretValue {
    /// Certificate chain and private key, PEM.
    KeyPair {
        /// Leaf first.
        chain: Vec<u8>,
        /// PKCS#8, SEC1 or PKCS#1.
        key: KeyBytes,
    },
    /// Trust anchors, PEM.
    TrustBundle(Vec<u8>),
}

/// Bytes of a private key.
#[derive(Clone, PartialEq)]
pub struct KeyBytes(Vec<u8>);

impl KeyBytes {
    /// Takes the bytes over.
    pub fn new(bytes: Vec<u8>) -> Self {
        KeyBytes(bytes)
    }

    /// The bytes, for a TLS library.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for KeyBytes {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.value {
            SecretValue::KeyPair { .. } => "key pair",
            SecretValue::TrustBundle(_) => "trust bundle",
        };
        write!(f, "Secret({}, {kind})", self.name)
    }
}
