//! Key sets of token issuers: found, fetched, checked, kept fresh, and handed to translation (SEMANTICS 3d, 3e).
//!
//! [`Resolver`] is one task. It is told which `(issuer, jwksUri)` pairs RequestAuthentications name (the hub's list) and which of
//! them a proxy met an unknown key of ([`Resolver::unknown_key`]), and gives every new key set to the hub. When what is
//! due is decided by [`schedule`], a value without clock or I/O; [`fetch`] is the only part that touches the network, and it
//! dials nothing that [`guard`] refuses. Nothing here runs inside a push: a slow or hostile issuer costs its own fetches,
//! each bounded in time and size, and nobody else's configuration.
//!
//! This module does not know how a key set reaches a proxy, nor what a token is.

pub mod fetch;
pub mod guard;
pub mod key_set;
pub mod options;
pub mod resolver;
pub mod schedule;

pub use resolver::Resolver;

use std::time::Duration;

/// Where the keys of an issuer come from. An empty `jwks_uri` means OpenID discovery at the issuer (S3.43).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    /// The `iss` of tokens.
    pub issuer: String,
    /// Where the key set is; empty to ask the issuer.
    pub jwks_uri: String,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.jwks_uri.is_empty() {
            write!(f, "issuer {:?} (by discovery)", self.issuer)
        } else {
            write!(f, "issuer {:?} at {}", self.issuer, self.jwks_uri)
        }
    }
}

/// Longest time of one attempt that a rule can ask for: whoever writes rules must not hold sockets of the control plane for hours.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(60);
