//! Who is calling the control plane: authenticators tried in order until one succeeds (S4.30).
//!
//! Used by the certificate service and by the xDS server on port 15012. An authenticator says which workload identities
//! a caller has proved and until when; what the caller may do with them is decided by the services. This module must
//! not know certificates' signing, xDS or configuration.

mod client_cert;
mod kube_token;
mod listener;

pub use client_cert::ClientCertAuthenticator;
pub use kube_token::{KubeTokenAuthenticator, KubeTokenReviewer, ReviewError, ReviewedToken, TokenReviewer};
pub use listener::{ConfigSource, ConnInfo, PlainIncoming, PlainIo, TlsIncoming, TlsIo};

use std::net::SocketAddr;
use std::sync::Arc;

use mantlet_identity::SpiffeId;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

/// The time of day, so that tests can hold it still.
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> OffsetDateTime;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> OffsetDateTime {
        OffsetDateTime::now_utc()
    }
}

/// How a caller proved itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthSource {
    /// A certificate of the mesh, checked in the TLS handshake.
    ClientCertificate,
    /// A Kubernetes service account token, checked by TokenReview.
    KubernetesToken,
}

/// The pod that a bound token belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRef {
    /// Name of the pod.
    pub name: String,
    /// UID of the pod.
    pub uid: String,
}

/// An authenticated caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Proven identities; one today, the type allows Istio's several (S4.38). Never empty.
    pub identities: Vec<SpiffeId>,
    /// How they were proved.
    pub source: AuthSource,
    /// When the proof ends. Streams must be closed by then.
    pub expires: Option<OffsetDateTime>,
    /// The pod behind a bound token.
    pub pod: Option<PodRef>,
}

/// What is known about a call before authentication.
#[derive(Debug, Clone, Copy, Default)]
pub struct CallContext<'a> {
    /// The peer's certificates, already verified by the handshake; empty without one.
    pub peer_certificates: &'a [CertificateDer<'static>],
    /// The `authorization` metadata, as sent.
    pub authorization: Option<&'a str>,
    /// The `clusterid` metadata; empty means this cluster.
    pub cluster_id: &'a str,
    /// Where the call comes from, for the log.
    pub peer: Option<SocketAddr>,
}

impl<'a> CallContext<'a> {
    /// From a tonic request served through [`TlsIncoming`] or [`PlainIncoming`].
    pub fn from_request<T>(request: &'a tonic::Request<T>) -> Self {
        Self::from_parts(request.metadata(), request.extensions())
    }

    /// As [`CallContext::from_request`], for streaming calls that hold on to the parts.
    pub fn from_parts(metadata: &'a tonic::metadata::MetadataMap, extensions: &'a tonic::Extensions) -> Self {
        let text = |name: &str| metadata.get(name).and_then(|value| value.to_str().ok());
        let connection = extensions.get::<ConnInfo>();
        Self {
            peer_certificates: connection.map_or(&[], |info| info.peer_certificates.as_slice()),
            authorization: text("authorization"),
            cluster_id: text("clusterid").unwrap_or_default(),
            peer: connection.map(|info| info.remote),
        }
    }
}

/// One way to prove an identity.
#[tonic::async_trait]
pub trait Authenticator: Send + Sync {
    /// Name for the log.
    fn name(&self) -> &'static str;
    /// The caller, or why not. Reasons go to the log only.
    async fn authenticate(&self, call: &CallContext<'_>) -> Result<Caller, String>;
}

/// No authenticator accepted the call; each says why.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no authenticator accepts the caller: {}", .0.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join("; "))]
pub struct AuthFailure(pub Vec<(&'static str, String)>);

/// The authenticators of a server, in order.
#[derive(Clone)]
pub struct Authenticators(Arc<[Arc<dyn Authenticator>]>);

impl Authenticators {
    /// In this order.
    pub fn new(list: Vec<Arc<dyn Authenticator>>) -> Self {
        Self(list.into())
    }

    /// The first caller that an authenticator vouches for.
    pub async fn authenticate(&self, call: &CallContext<'_>) -> Result<Caller, AuthFailure> {
        let mut reasons = Vec::new();
        for authenticator in self.0.iter() {
            match authenticator.authenticate(call).await {
                Ok(caller) if !caller.identities.is_empty() => return Ok(caller),
                Ok(_) => reasons.push((authenticator.name(), "no identity".to_owned())),
                Err(reason) => reasons.push((authenticator.name(), reason)),
            }
        }
        Err(AuthFailure(reasons))
    }
}

impl std::fmt::Debug for Authenticators {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|a| a.name())).finish()
    }
}
