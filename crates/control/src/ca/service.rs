//! `istio.v1.auth.IstioCertificateService`: authenticate the caller, sign its own identity and nothing else (S4.10–S4.18).

use std::sync::Arc;

use mantlet_xds::istio_ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use mantlet_xds::istio_ca::{IstioCertificateRequest, IstioCertificateResponse};
use tonic::{Request, Response, Status};

use super::authority::{Authority, SignError};
use crate::auth::{Authenticators, CallContext};

/// Largest request message: a CSR of 32 kB and some metadata.
const MAX_MESSAGE: usize = 64 * 1024;

/// The gRPC service.
#[derive(Clone)]
pub struct CaService {
    authority: Arc<Authority>,
    authenticators: Authenticators,
}

impl CaService {
    /// With the authority that signs and the authenticators that decide who asks.
    pub fn new(authority: Arc<Authority>, authenticators: Authenticators) -> Self {
        Self {
            authority,
            authenticators,
        }
    }

    /// Ready to be added to a tonic server.
    pub fn into_server(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self).max_decoding_message_size(MAX_MESSAGE)
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CaService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let metrics = &self.authority.metrics;
        metrics.requests.inc();
        let call = CallContext::from_request(&request);
        let caller = match self.authenticators.authenticate(&call).await {
            Ok(caller) => caller,
            Err(failure) => {
                metrics.auth_failures.inc();
                let peer = call.peer.map_or_else(|| "unknown".to_owned(), |p| p.to_string());
                tracing::warn!(target: "serverca", "Failed to authenticate client from {peer}: {failure}");
                return Err(Status::unauthenticated("request authenticate failure"));
            }
        };
        let message = request.get_ref();
        if let Some(asked) = impersonated(message) {
            // Signing for another workload needs proof that it runs on the caller's node (S4.19). Nobody is trusted with
            // that yet, so nobody gets it.
            metrics.auth_failures.inc();
            tracing::warn!(
                target: "serverca",
                "Refused {} to impersonate {asked:?}: CA_TRUSTED_NODE_ACCOUNTS is empty",
                caller.identities[0]
            );
            return Err(Status::unauthenticated("request impersonation authentication failure"));
        }
        match self
            .authority
            .sign(&message.csr, &caller.identities, message.validity_duration)
        {
            Ok(issued) => {
                metrics.issued.inc();
                tracing::debug!(
                    target: "serverca",
                    "CSR successfully signed for {}, valid until {}", caller.identities[0], issued.not_after
                );
                Ok(Response::new(IstioCertificateResponse {
                    cert_chain: issued.to_response(),
                }))
            }
            Err(error) => {
                metrics.sign_errors.with(&[error.metric_label()]).inc();
                tracing::error!(target: "serverca", "CSR signing error for {}: {error}", caller.identities[0]);
                let text = format!("CSR signing error ({error})");
                Err(match error {
                    SignError::Request(_) => Status::invalid_argument(text),
                    SignError::Internal(_) => Status::internal(text),
                })
            }
        }
    }
}

/// The `ImpersonatedIdentity` of a request, if it names one.
fn impersonated(message: &IstioCertificateRequest) -> Option<String> {
    use envoy_types::pb::google::protobuf::value::Kind;
    let value = message.metadata.as_ref()?.fields.get("ImpersonatedIdentity")?;
    match &value.kind {
        Some(Kind::StringValue(text)) if text.is_empty() => None,
        None | Some(Kind::NullValue(_)) => None,
        Some(Kind::StringValue(text)) => Some(text.clone()),
        Some(_) => Some(String::new()),
    }
}
