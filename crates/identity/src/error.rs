//! The one error type of this crate, sorted by whose fault it is, so that the certificate service can turn a variant
//! into a gRPC code without looking at text.

use crate::spiffe::SpiffeIdError;

/// What went wrong, by fault.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name given is not a SPIFFE ID this mesh can use.
    #[error(transparent)]
    SpiffeId(#[from] SpiffeIdError),
    /// The requester's fault: the certificate request cannot be parsed, is not signed by its own key, or its key is
    /// too weak.
    #[error("certificate signing request: {0}")]
    BadRequest(String),
    /// The requester's fault: the lifetime asked for is longer than the authority grants (Istio's wording).
    #[error("requested TTL {requested} is greater than the max allowed TTL {max}")]
    TtlTooLong {
        /// What was asked for, in Go's duration notation.
        requested: String,
        /// What is allowed at most, in Go's duration notation.
        max: String,
    },
    /// The operator's fault: the CA's own material is incomplete, does not fit together or has expired.
    #[error("signing CA: {0}")]
    BadCa(String),
    /// The operator's fault: a file that should hold PEM does not, or is larger than any sane one.
    #[error("{what}: {reason}")]
    BadPem {
        /// Which input (for example `root-cert.pem`).
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Our own fault: a certificate we built failed the independent check and was not released.
    #[error("refusing to release the certificate: {0}")]
    FailedSelfCheck(String),
    /// Our own fault, or the crypto library's: a key or a certificate could not be made.
    #[error("cryptographic operation failed: {0}")]
    Crypto(String),
    /// A rustls configuration could not be built from the given material.
    #[error("TLS configuration: {0}")]
    Tls(String),
}

impl From<rcgen::Error> for Error {
    fn from(error: rcgen::Error) -> Self {
        Self::Crypto(error.to_string())
    }
}

impl From<rustls::Error> for Error {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error.to_string())
    }
}
