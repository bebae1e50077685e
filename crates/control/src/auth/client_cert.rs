//! Callers with a mesh certificate (S4.31). The chain was verified in the handshake; the validity is looked at again here,
//! because connections outlive handshakes.

use std::sync::Arc;

use mantlet_identity::PeerCertificate;

use super::{AuthSource, Authenticator, CallContext, Caller, Clock};

/// Takes the SPIFFE ID of the peer's certificate.
pub struct ClientCertAuthenticator {
    clock: Arc<dyn Clock>,
}

impl ClientCertAuthenticator {
    /// With a clock for the validity.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock }
    }
}

#[tonic::async_trait]
impl Authenticator for ClientCertAuthenticator {
    fn name(&self) -> &'static str {
        "ClientCertAuthenticator"
    }

    async fn authenticate(&self, call: &CallContext<'_>) -> Result<Caller, String> {
        let leaf = call.peer_certificates.first().ok_or("no verified chain is found")?;
        let peer = PeerCertificate::parse(leaf).map_err(|e| e.to_string())?;
        peer.check_validity(self.clock.now()).map_err(|e| e.to_string())?;
        let id = peer.spiffe_id().map_err(|e| e.to_string())?;
        Ok(Caller {
            identities: vec![id],
            source: AuthSource::ClientCertificate,
            expires: Some(peer.not_after),
            pod: None,
        })
    }
}
