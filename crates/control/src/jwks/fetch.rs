//! One fetch of a key set: OpenID discovery where needed, HTTP or HTTPS, a few redirects, every dialled address checked.
//!
//! Bounded in everything: time (the caller's), addresses per name, redirects, header and body size. No credentials are ever
//! sent, no connection is kept, and HTTPS never leads to plain HTTP through a redirect (S3.46, S3.67, S3.68).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONNECTION, HOST, LOCATION, USER_AGENT};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use mantlet_identity::{ExpectedServer, SpiffeServerVerifier, TrustBundle};
use mantlet_runtime::task::AbortOnDrop;
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::Source;
use super::guard::Guard;
use super::key_set::{self, KeySet, MAX_BODY};
use super::options::JwksOptions;

/// Most redirects that are followed.
const MAX_REDIRECTS: usize = 5;
/// Most addresses of a name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Longest URI.
const MAX_URI: usize = 4096;
/// Most bytes of a response's head.
const MAX_HEAD: usize = 64 * 1024;
/// How long one of several addresses may take to answer before the next is tried.
const PER_ADDRESS: Duration = Duration::from_secs(2);

/// Why there is no key set.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The rule's URI, the discovered one or a redirect's cannot be used.
    #[error("{uri:?} cannot be used: {reason}")]
    Uri {
        /// The URI.
        uri: String,
        /// Why.
        reason: String,
    },
    /// The name has no address, or only refused ones.
    #[error("{host}: {reason}")]
    Address {
        /// Host of the URI.
        host: String,
        /// Why.
        reason: String,
    },
    /// No connection, or one that broke.
    #[error("{host}: {reason}")]
    Connection {
        /// Host of the URI.
        host: String,
        /// Why.
        reason: String,
    },
    /// An answer that is no success.
    #[error("{uri} answered {status}")]
    Status {
        /// The URI.
        uri: String,
        /// Its status.
        status: StatusCode,
    },
    /// More than [`MAX_REDIRECTS`].
    #[error("more than {MAX_REDIRECTS} redirects")]
    Redirects,
    /// More than [`MAX_BODY`].
    #[error("{uri} answered more than {MAX_BODY} bytes")]
    TooLarge {
        /// The URI.
        uri: String,
    },
    /// The answer is no discovery document or no key set.
    #[error("{uri}: {reason}")]
    Content {
        /// The URI.
        uri: String,
        /// Why.
        reason: String,
    },
    /// The time was over.
    #[error("no complete answer within {0:?}")]
    Timeout(Duration),
}

/// Fetches key sets.
#[derive(Clone)]
pub struct Fetcher {
    guard: Guard,
    tls: TlsConnector,
    /// Whether any server certificate can be verified at all.
    trusts_any: bool,
}

impl Fetcher {
    /// A fetcher that trusts the system's roots and the extra ones. Roots that cannot be read are left out and logged.
    ///
    /// # Errors
    /// When no TLS configuration can be made.
    pub fn new(options: &JwksOptions) -> Result<Fetcher, rustls::Error> {
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::warn!(target: "jwks", "system trust anchors: {error}");
        }
        let mut certificates = system.certs;
        match std::fs::read(&options.extra_roots) {
            Ok(pem) => {
                for certificate in CertificateDer::pem_slice_iter(&pem) {
                    match certificate {
                        Ok(certificate) => certificates.push(certificate),
                        Err(error) => {
                            tracing::warn!(target: "jwks", "{}: {error}", options.extra_roots.display());
                        }
                    }
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(target: "jwks", "{}: {error}", options.extra_roots.display()),
        }
        Fetcher::with_roots(options, certificates)
    }

    /// A fetcher that trusts these roots.
    ///
    /// # Errors
    /// When no TLS configuration can be made.
    pub fn with_roots(
        options: &JwksOptions,
        certificates: Vec<CertificateDer<'static>>,
    ) -> Result<Fetcher, rustls::Error> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        let (taken, _) = roots.add_parsable_certificates(certificates);
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?;
        let config = if options.skip_verify {
            tracing::warn!(
                target: "jwks",
                "JWKS_RESOLVER_INSECURE_SKIP_VERIFY is set: whoever is on the way to an issuer can replace its keys"
            );
            // Signatures of the handshake are checked all the same; only the certificate is not.
            let anyone = SpiffeServerVerifier::new(&TrustBundle::none(), ExpectedServer::Anyone, &provider);
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(anyone))
                .with_no_client_auth()
        } else {
            builder.with_root_certificates(roots).with_no_client_auth()
        };
        Ok(Fetcher {
            guard: options.guard.clone(),
            tls: TlsConnector::from(Arc::new(config)),
            trusts_any: options.skip_verify || taken > 0,
        })
    }

    /// Fetches the key set of a source.
    ///
    /// # Errors
    /// See [`FetchError`].
    pub async fn key_set(&self, source: &Source, timeout: Duration) -> Result<KeySet, FetchError> {
        match tokio::time::timeout(timeout, self.untimed(source)).await {
            Ok(result) => result,
            Err(_) => Err(FetchError::Timeout(timeout)),
        }
    }

    async fn untimed(&self, source: &Source) -> Result<KeySet, FetchError> {
        let uri = if source.jwks_uri.is_empty() {
            let issuer = source.issuer.strip_suffix('/').unwrap_or(&source.issuer);
            let document = format!("{issuer}/.well-known/openid-configuration");
            let body = self.get(&document).await?;
            key_set::discovered(&body).map_err(|reason| FetchError::Content { uri: document, reason })?
        } else {
            source.jwks_uri.clone()
        };
        let body = self.get(&uri).await?;
        key_set::parse(&body).map_err(|error| FetchError::Content {
            uri,
            reason: error.to_string(),
        })
    }

    /// GET with redirects; the body of a 2xx answer.
    async fn get(&self, uri: &str) -> Result<Bytes, FetchError> {
        let mut target = Target::parse(uri)?;
        for _ in 0..=MAX_REDIRECTS {
            match self.request(&target).await? {
                Answer::Body(body) => return Ok(body),
                Answer::Redirect(location) => {
                    let next = target.redirect(&location)?;
                    if target.tls && !next.tls {
                        return Err(FetchError::Uri {
                            uri: next.text(),
                            reason: "a redirect from https to http".into(),
                        });
                    }
                    target = next;
                }
            }
        }
        Err(FetchError::Redirects)
    }

    async fn request(&self, target: &Target) -> Result<Answer, FetchError> {
        let broken = |reason: String| FetchError::Connection {
            host: target.host.clone(),
            reason,
        };
        let tcp = self.dial(target).await?;
        if !target.tls {
            return exchange(tcp, target).await;
        }
        if !self.trusts_any {
            return Err(broken("there are no trust anchors to verify its certificate".into()));
        }
        let name = ServerName::try_from(target.host.trim_end_matches('.').to_string())
            .map_err(|_| broken("the host is no name that a certificate can have".into()))?;
        let stream = self.tls.connect(name, tcp).await.map_err(|e| broken(e.to_string()))?;
        exchange(stream, target).await
    }

    /// Connects to the first address of the host that the guard admits and that answers.
    async fn dial(&self, target: &Target) -> Result<TcpStream, FetchError> {
        let refused = |reason: String| FetchError::Address {
            host: target.host.clone(),
            reason,
        };
        let found = tokio::net::lookup_host((target.host.as_str(), target.port))
            .await
            .map_err(|error| refused(format!("no address: {error}")))?;
        let mut reasons = Vec::new();
        let mut admitted: Vec<SocketAddr> = Vec::new();
        for address in found.take(MAX_ADDRESSES) {
            match self.guard.check(address.ip()) {
                Ok(()) if admitted.contains(&address) => {}
                Ok(()) => admitted.push(address),
                Err(reason) => reasons.push(reason),
            }
        }
        if admitted.is_empty() {
            if reasons.is_empty() {
                reasons.push("no address".into());
            }
            return Err(refused(format!("not dialled: {}", reasons.join(", "))));
        }
        let last = admitted.len() - 1;
        let mut failures = Vec::new();
        for (index, address) in admitted.into_iter().enumerate() {
            let connect = TcpStream::connect(address);
            let result = if index == last {
                connect.await
            } else {
                tokio::time::timeout(PER_ADDRESS, connect)
                    .await
                    .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            };
            match result {
                Ok(stream) => return Ok(stream),
                Err(error) => failures.push(format!("{address}: {error}")),
            }
        }
        Err(FetchError::Connection {
            host: target.host.clone(),
            reason: failures.join(", "),
        })
    }
}

enum Answer {
    Body(Bytes),
    Redirect(String),
}

/// One request on a fresh connection.
async fn exchange<S>(stream: S, target: &Target) -> Result<Answer, FetchError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broken = |reason: String| FetchError::Connection {
        host: target.host.clone(),
        reason,
    };
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| broken(e.to_string()))?;
    let task = tokio::spawn(connection);
    // The connection ends with this exchange, however it ends.
    let _connection = AbortOnDrop(task.abort_handle());
    let request = Request::get(target.path.as_str())
        .header(HOST, target.authority())
        .header(ACCEPT, "application/json")
        .header(USER_AGENT, "mantletd")
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|e| broken(e.to_string()))?;
    let response = sender.send_request(request).await.map_err(|e| broken(e.to_string()))?;
    let status = response.status();
    if status.is_redirection() {
        let location = response.headers().get(LOCATION).and_then(|v| v.to_str().ok());
        return match location {
            Some(location) => Ok(Answer::Redirect(location.to_string())),
            None => Err(FetchError::Status {
                uri: target.text(),
                status,
            }),
        };
    }
    if !status.is_success() {
        return Err(FetchError::Status {
            uri: target.text(),
            status,
        });
    }
    match Limited::new(response.into_body(), MAX_BODY).collect().await {
        Ok(body) => Ok(Answer::Body(body.to_bytes())),
        Err(error) if error.is::<LengthLimitError>() => Err(FetchError::TooLarge { uri: target.text() }),
        Err(error) => Err(broken(error.to_string())),
    }
}

/// A URI taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    tls: bool,
    /// Without brackets.
    host: String,
    port: u16,
    /// Path and query.
    path: String,
}

impl Target {
    fn parse(text: &str) -> Result<Target, FetchError> {
        let bad = |reason: &str| FetchError::Uri {
            uri: text.chars().take(256).collect(),
            reason: reason.into(),
        };
        if text.len() > MAX_URI {
            return Err(bad("it is too long"));
        }
        let uri: Uri = text.parse().map_err(|_| bad("it is no URI"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(bad("the scheme must be http or https")),
        };
        let authority = uri.authority().ok_or_else(|| bad("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it has a user name or password"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(bad("it has no host"));
        }
        // A port that is no number is absent for the parser.
        let with_port = authority.as_str().len() > authority.host().len();
        let port = match (with_port, authority.port_u16()) {
            (true, Some(0) | None) => return Err(bad("the port must be between 1 and 65535")),
            (_, Some(port)) => port,
            (false, None) if tls => 443,
            (false, None) => 80,
        };
        let path = uri.path_and_query().map_or("/", |p| p.as_str());
        Ok(Target {
            tls,
            host: host.to_string(),
            port,
            path: if path.is_empty() { "/".into() } else { path.to_string() },
        })
    }

    /// What a `location` means here (RFC 3986, 5.2, without dot segments: the server gets what was written).
    fn redirect(&self, location: &str) -> Result<Target, FetchError> {
        let scheme = if self.tls { "https" } else { "http" };
        if location.contains("://") {
            Target::parse(location)
        } else if location.starts_with("//") {
            Target::parse(&format!("{scheme}:{location}"))
        } else if location.starts_with('/') {
            Target::parse(&format!("{scheme}://{}{location}", self.authority()))
        } else {
            let path = self.path.split('?').next().unwrap_or("/");
            let base = path.rfind('/').map_or("/", |at| &path[..=at]);
            Target::parse(&format!("{scheme}://{}{base}{location}", self.authority()))
        }
    }

    fn authority(&self) -> String {
        let host = match self.host.parse::<IpAddr>() {
            Ok(IpAddr::V6(v6)) => format!("[{v6}]"),
            _ => self.host.clone(),
        };
        match (self.tls, self.port) {
            (true, 443) | (false, 80) => host,
            (_, port) => format!("{host}:{port}"),
        }
    }

    fn text(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}{}", self.authority(), self.path)
    }
}

#[cfg(test)]
mod tests;
