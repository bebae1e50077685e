//! The edge: TCP, TLS and HTTP connections.
//!
//! `ApiServer::serve` accepts from a listener that somebody else opened (the embedded cluster's broker passes descriptors in).
//! Client certificates are asked for and verified against the cluster's CA; without one the request must bring a token. Upgraded
//! connections (exec and friends) are joined here with the node agent's side. Handshakes, headers and idle connections are bounded.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::auth::{Identity, authn};
use crate::http::{Body, full};
use crate::server::ApiServer;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Also how long a kept-alive HTTP/1.1 connection may idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_CONNECTIONS: usize = 8192;
const MAX_STREAMS: u32 = 250;
const MAX_HEADER_BYTES: u32 = 64 << 10;

/// Why a listener cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Certificates or keys cannot be used.
    #[error("TLS configuration: {0}")]
    Tls(String),
    /// The listener failed for good.
    #[error("accepting connections: {0}")]
    Accept(#[from] std::io::Error),
}

impl ApiServer {
    /// A TLS configuration for [`ApiServer::serve`]: the server's certificate chain and key in PEM, client certificates
    /// verified against the configured CA.
    ///
    /// # Errors
    /// [`ServeError::Tls`] when a PEM text cannot be used.
    pub fn tls_config(&self, cert_chain_pem: &str, key_pem: &str) -> Result<Arc<rustls::ServerConfig>, ServeError> {
        let tls = |e: &dyn std::fmt::Display| ServeError::Tls(e.to_string());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        for cert in CertificateDer::pem_slice_iter(self.config().client_ca_pem.as_bytes()) {
            roots.add(cert.map_err(|e| tls(&e))?).map_err(|e| tls(&e))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .allow_unauthenticated()
            .build()
            .map_err(|e| tls(&e))?;
        let chain = CertificateDer::pem_slice_iter(cert_chain_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| tls(&e))?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|e| tls(&e))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| tls(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| tls(&e))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // A resumed session would skip the verifier, so every connection does a full handshake.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// Serves connections until the listener fails or the future is dropped; open connections are then cut.
    ///
    /// # Errors
    /// [`ServeError::Accept`] when the listener is broken; a shortage of descriptors is waited out.
    pub async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        tls: Arc<rustls::ServerConfig>,
    ) -> Result<(), ServeError> {
        let acceptor = TlsAcceptor::from(tls);
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let permit = match slots.clone().acquire_owned().await {
                Ok(p) => p,
                Err(_) => return Ok(()),
            };
            let accepted = listener.accept().await;
            while connections.try_join_next().is_some() {}
            let (stream, peer) = match accepted {
                Ok(pair) => pair,
                Err(e) if matches!(e.raw_os_error(), Some(23 | 24 | 103 | 104)) => {
                    // Out of descriptors, or the peer left first: both pass.
                    tracing::warn!(error = %e, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            let server = self.clone();
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                let _permit = permit;
                let _ = stream.set_nodelay(true);
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => server.connection(stream).await,
                    Ok(Err(e)) => tracing::debug!(%peer, error = %e, "TLS handshake failed"),
                    Err(_) => tracing::debug!(%peer, "TLS handshake timed out"),
                }
            });
        }
    }

    async fn connection(self: Arc<Self>, stream: tokio_rustls::server::TlsStream<tokio::net::TcpStream>) {
        let certificate = stream.get_ref().1.peer_certificates().and_then(|c| c.first()).cloned();
        let identity = match certificate.map(|c| authn::from_certificate(&c)).transpose() {
            Ok(identity) => identity.map(Arc::new),
            Err(why) => {
                tracing::debug!(reason = %why, "client certificate refused");
                return;
            }
        };
        let service = service_fn(move |request: Request<Incoming>| {
            let server = self.clone();
            let identity = identity.clone();
            async move { Ok::<_, std::convert::Infallible>(server.answer(request, identity).await) }
        });
        // The version was agreed on in the handshake; waiting to see which one it is would have no time limit.
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let builder = auto::Builder::new(TokioExecutor::new());
        let mut builder = if http2 {
            builder.http2_only()
        } else {
            builder.http1_only()
        };
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(128 << 10)
            .half_close(false);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADER_BYTES)
            .keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(20));
        if let Err(e) = builder
            .serve_connection_with_upgrades(TokioIo::new(stream), service)
            .await
        {
            tracing::debug!(error = %e, "connection ended with an error");
        }
    }

    async fn answer(
        self: Arc<Self>,
        mut request: Request<Incoming>,
        identity: Option<Arc<Identity>>,
    ) -> Response<Body> {
        // Nobody outside may bring an identity along as an extension; this is the only place that sets one for connections.
        request.extensions_mut().remove::<Arc<Identity>>();
        // A certificate wins over a token, as in kube-apiserver.
        if let Some(identity) = identity {
            request.extensions_mut().insert(identity);
        }
        let upgrade = request
            .headers()
            .contains_key(header::UPGRADE)
            .then(|| hyper::upgrade::on(&mut request));
        let mut response = self.handle(request).await;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let (Some(client), upstream) = (upgrade, hyper::upgrade::on(&mut response)) else {
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                return response;
            };
            tokio::spawn(async move {
                let (client, upstream) = match tokio::join!(client, upstream) {
                    (Ok(c), Ok(u)) => (c, u),
                    (Err(e), _) | (_, Err(e)) => {
                        tracing::debug!(error = %e, "upgrade did not complete");
                        return;
                    }
                };
                let (mut client, mut upstream) = (TokioIo::new(client), TokioIo::new(upstream));
                let _ = tokio::io::copy_bidirectional(&mut client, &mut upstream).await;
            });
            *response.body_mut() = full(bytes::Bytes::new());
        }
        response
    }
}
