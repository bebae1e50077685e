//! Mesh identity as pure code: SPIFFE IDs, trust bundles, certificate requests, certificates, the checks on them, and
//! the rustls configurations that enforce them.
//!
//! Called by `control` (certificate authority), `proxy` (mTLS on both sides), `model` (names of peers) and `cli`
//! (inspection). This crate opens no socket, reads no clock and runs no async code: the time of day and serial numbers
//! are arguments. Private keys come from the operating system's random generator through aws-lc and never leave their
//! type except by an explicit export.
//!
//! Where to read: [`spiffe`] (names), [`key`] and [`csr`] (what a workload makes), [`authority`] (what signs it),
//! [`validate`] (the second opinion before a certificate leaves), [`bundle`] (whom to trust), [`peer`] (who is at the
//! other end), [`verifier`] and [`tls`] (the same rules inside a handshake), [`rotation`] (when to renew), [`jws`] (tokens of end users).

pub mod authority;
pub mod bundle;
pub mod csr;
pub mod error;
pub mod jws;
pub mod key;
pub mod peer;
pub mod pem;
mod proven;
pub mod rotation;
pub mod spiffe;
pub mod tls;
pub mod validate;
pub mod verifier;

pub use authority::{CaMaterial, CaPem, IssueRequest, IssuedCertificate, SelfSignedOptions, Serial, SubjectAltName};
pub use bundle::TrustBundle;
pub use csr::{Csr, build_csr};
pub use error::Error;
pub use key::{KeyAlgorithm, PrivateKey};
pub use peer::{PeerCertificate, PeerIdentityError, peer_spiffe_id};
pub use spiffe::{SpiffeId, SpiffeIdError, TrustDomain};
pub use tls::{ClientTlsOptions, ServerTls, ServerTlsOptions, TlsIdentity};
pub use verifier::{ClientAuth, ExpectedServer, SpiffeClientVerifier, SpiffeServerVerifier, TrustDomainRule};
