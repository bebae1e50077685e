//! Trust bundles: the roots a mesh accepts, possibly several during a root change (S4.70, S4.78).

use std::sync::Arc;

use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::error::Error;
use crate::pem;

/// One or more root certificates, without duplicates, in the order given.
#[derive(Clone)]
pub struct TrustBundle {
    roots: Vec<CertificateDer<'static>>,
    store: Arc<RootCertStore>,
    earliest_expiry: OffsetDateTime,
}

impl TrustBundle {
    /// Reads a bundle from PEM. Every certificate must parse and be a CA (S4.132); one bad entry rejects the whole, so
    /// that a damaged file never shrinks the set of trusted roots silently. `what` names the input in errors.
    pub fn from_pem(what: &str, text: &[u8]) -> Result<Self, Error> {
        Self::from_certificates(what, pem::read_certificates(what, text)?)
    }

    /// As [`TrustBundle::from_pem`], from DER.
    pub fn from_certificates(
        what: &str,
        certificates: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Result<Self, Error> {
        let bad = |reason: String| Error::BadPem {
            what: what.to_owned(),
            reason,
        };
        let mut roots: Vec<CertificateDer<'static>> = Vec::new();
        let mut store = RootCertStore::empty();
        let mut earliest: Option<OffsetDateTime> = None;
        for (index, der) in certificates.into_iter().enumerate() {
            let number = index + 1;
            if roots.contains(&der) {
                continue;
            }
            let (rest, certificate) = X509Certificate::from_der(&der)
                .map_err(|e| bad(format!("certificate {number} cannot be parsed: {e}")))?;
            if !rest.is_empty() {
                return Err(bad(format!("certificate {number} is followed by other bytes")));
            }
            if !certificate.is_ca() {
                return Err(bad(format!(
                    "certificate {number} ({}) is not a CA certificate",
                    certificate.subject()
                )));
            }
            let not_after = certificate.validity().not_after.to_datetime();
            earliest = Some(earliest.map_or(not_after, |e| e.min(not_after)));
            store
                .add(der.clone())
                .map_err(|e| bad(format!("certificate {number} cannot be a trust anchor: {e}")))?;
            roots.push(der);
        }
        let earliest_expiry = earliest.ok_or_else(|| bad("holds no certificate".to_owned()))?;
        Ok(Self {
            roots,
            store: Arc::new(store),
            earliest_expiry,
        })
    }

    /// The usable ones of an operating system's certificates: such a store is not ours, and one entry that is no CA must not
    /// close all others out. `None` when none is usable.
    pub fn from_system(certificates: impl IntoIterator<Item = CertificateDer<'static>>) -> Option<Self> {
        let usable = certificates
            .into_iter()
            .filter(|der| Self::from_certificates("system", [der.clone()]).is_ok());
        Self::from_certificates("system", usable).ok()
    }

    /// Trusts nobody.
    pub fn none() -> Self {
        Self {
            roots: Vec::new(),
            store: Arc::new(RootCertStore::empty()),
            earliest_expiry: time::PrimitiveDateTime::MAX.assume_utc(),
        }
    }

    /// This bundle and the roots of another (S4.66, S4.115).
    pub fn union(&self, other: &Self) -> Result<Self, Error> {
        Self::from_certificates("trust bundle", self.roots.iter().chain(&other.roots).cloned())
    }

    /// The roots in DER.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Whether exactly this certificate is one of the roots.
    pub fn contains(&self, certificate: &CertificateDer<'_>) -> bool {
        self.roots.iter().any(|root| root.as_ref() == certificate.as_ref())
    }

    /// Whether every root of this bundle is also in `other`.
    pub fn is_subset_of(&self, other: &Self) -> bool {
        self.roots.iter().all(|root| other.contains(root))
    }

    /// The roots as one PEM text, as `istio-ca-root-cert` and the last element of a CSR response hold it.
    pub fn to_pem(&self) -> String {
        pem::encode_certificates(&self.roots)
    }

    /// The roots as rustls trust anchors, shared.
    pub fn root_store(&self) -> Arc<RootCertStore> {
        self.store.clone()
    }

    /// When the first of the roots expires (metric `citadel_server_root_cert_expiry_timestamp`).
    pub fn earliest_expiry(&self) -> OffsetDateTime {
        self.earliest_expiry
    }
}

impl PartialEq for TrustBundle {
    /// Equal when they hold the same roots, in whatever order.
    fn eq(&self, other: &Self) -> bool {
        self.roots.len() == other.roots.len() && self.is_subset_of(other)
    }
}
impl Eq for TrustBundle {}

impl std::fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "TrustBundle({} roots, first expires {})",
            self.roots.len(),
            self.earliest_expiry
        )
    }
}
