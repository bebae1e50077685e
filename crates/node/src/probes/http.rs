//! The HTTP and gRPC clients of probes. Certificates are not verified, as a kubelet does not.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Answers are read up to this many bytes.
const MAX_BODY: usize = 10 << 10;
/// Redirects followed within the same address.
const MAX_REDIRECTS: usize = 10;

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// The status code of a GET request; redirects within the same address are followed.
pub(super) async fn get(
    address: SocketAddr,
    secure: bool,
    path: &str,
    headers: &[(String, String)],
) -> Result<u16, String> {
    let mut path = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    };
    for _ in 0..=MAX_REDIRECTS {
        let (status, location) = get_once(address, secure, &path, headers).await?;
        match location {
            Some(next) if (300..400).contains(&status) && next.starts_with('/') && !next.starts_with("//") => {
                path = next
            }
            // To another host: a kubelet takes that for success.
            _ => return Ok(status),
        }
    }
    Err(format!("stopped after {MAX_REDIRECTS} redirects"))
}

async fn get_once(
    address: SocketAddr,
    secure: bool,
    path: &str,
    headers: &[(String, String)],
) -> Result<(u16, Option<String>), String> {
    let tcp = TcpStream::connect(address)
        .await
        .map_err(|e| format!("dial tcp {address}: {e}"))?;
    let stream: Box<dyn Stream> = if secure {
        let connector = tokio_rustls::TlsConnector::from(tls_config()?);
        let name = ServerName::IpAddress(address.ip().into());
        Box::new(
            connector
                .connect(name, tcp)
                .await
                .map_err(|e| format!("TLS handshake with {address}: {e}"))?,
        )
    } else {
        Box::new(tcp)
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| e.to_string())?;
    let driver = AbortOnDrop(tokio::spawn(async move {
        // Its error is seen by the request.
        let _ = connection.await;
    }));
    let mut request = http::Request::get(path)
        .header("user-agent", "kube-probe/1.32")
        .header("accept", "*/*");
    let mut host = address.to_string();
    for (name, value) in headers {
        if name.eq_ignore_ascii_case("host") {
            host.clone_from(value);
        } else {
            request = request.header(name, value);
        }
    }
    let request = request
        .header("host", host)
        .header("connection", "close")
        .body(Full::<Bytes>::default())
        .map_err(|e| format!("the probe's path or headers are invalid: {e}"))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|e| format!("Get {address}{path}: {e}"))?;
    let status = response.status().as_u16();
    let location = response
        .headers()
        .get("location")
        .and_then(|v| v.to_str().ok())
        .map(str::to_owned);
    let mut body = response.into_body();
    let mut size = 0;
    while let Some(Ok(frame)) = body.frame().await {
        size += frame.data_ref().map_or(0, Bytes::len);
        if size > MAX_BODY {
            break;
        }
    }
    drop(driver);
    Ok((status, location))
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// `grpc.health.v1.Health/Check`: success is SERVING.
pub(super) async fn grpc_health(address: SocketAddr, service: &str) -> Result<(), String> {
    let tcp = TcpStream::connect(address)
        .await
        .map_err(|e| format!("dial tcp {address}: {e}"))?;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tcp))
        .await
        .map_err(|e| e.to_string())?;
    let driver = AbortOnDrop(tokio::spawn(async move {
        let _ = connection.await;
    }));
    // HealthCheckRequest { string service = 1 }, behind a gRPC frame's head.
    let mut message = Vec::new();
    if !service.is_empty() {
        let length = u8::try_from(service.len())
            .ok()
            .filter(|l| *l < 128)
            .ok_or("the service name is too long")?;
        message.extend([0x0A, length]);
        message.extend(service.as_bytes());
    }
    let mut frame = vec![0u8];
    frame.extend(u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
    frame.extend(message);
    let request = http::Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "kube-probe/1.32")
        .body(Full::new(Bytes::from(frame)))
        .map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
    let head_status = response
        .headers()
        .get("grpc-status")
        .and_then(|v| v.to_str().ok())
        .map(str::to_owned);
    let body = http_body_util::Limited::new(response.into_body(), MAX_BODY)
        .collect()
        .await
        .map_err(|e| e.to_string())?;
    let trailer_status = body
        .trailers()
        .and_then(|t| t.get("grpc-status"))
        .and_then(|v| v.to_str().ok())
        .map(str::to_owned);
    drop(driver);
    match head_status.or(trailer_status).as_deref() {
        Some("0") => {}
        other => {
            return Err(format!(
                "gRPC health check failed with status {}",
                other.unwrap_or("missing")
            ));
        }
    }
    // HealthCheckResponse { ServingStatus status = 1 }; SERVING is 1.
    match body.to_bytes().get(5..) {
        Some([0x08, 0x01, ..]) => Ok(()),
        _ => Err("service unhealthy (responded with something other than \"SERVING\")".into()),
    }
}

fn tls_config() -> Result<Arc<rustls::ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// A probe asks whether a server works, not who it is.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Request, Response};
    use http_body_util::StreamBody;
    use hyper::body::{Frame, Incoming};
    use hyper::service::service_fn;
    use hyper_util::server::conn::auto;
    use std::convert::Infallible;

    type Body = StreamBody<futures::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

    fn body(frames: Vec<Frame<Bytes>>) -> Body {
        StreamBody::new(futures::stream::iter(frames.into_iter().map(Ok).collect::<Vec<_>>()))
    }

    /// HTTP/1.1 and HTTP/2 on one port.
    async fn serve(answer: fn(&Request<Incoming>) -> Response<Body>) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = service_fn(move |request| async move { Ok::<_, Infallible>(answer(&request)) });
                tokio::spawn(async move {
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        address
    }

    #[tokio::test]
    async fn redirects_within_the_host_are_followed_and_headers_are_sent() {
        let address = serve(|request| {
            let response = Response::builder();
            let response = match request.uri().path() {
                "/start" => response.status(302).header("location", "/end"),
                "/away" => response.status(302).header("location", "http://example.com/"),
                "/loop" => response.status(302).header("location", "/loop"),
                "/end" if request.headers()["host"] == "app.example" => response.status(204),
                _ => response.status(500),
            };
            response.body(body(Vec::new())).expect("response")
        })
        .await;
        let headers = [("Host".to_owned(), "app.example".to_owned())];
        assert_eq!(get(address, false, "/start", &headers).await, Ok(204));
        assert_eq!(get(address, false, "end", &headers).await, Ok(204));
        assert_eq!(get(address, false, "/away", &[]).await, Ok(302));
        assert_eq!(get(address, false, "/end", &[]).await, Ok(500));
        assert!(
            get(address, false, "/loop", &[])
                .await
                .expect_err("endless")
                .contains("redirects")
        );
    }

    #[tokio::test]
    async fn grpc_health_is_serving_or_an_error() {
        let address = serve(|request| {
            assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().expect("value"));
            let status = if request.headers()["te"] == "trailers" { 1 } else { 2 };
            let message = Bytes::from(vec![0, 0, 0, 0, 2, 8, status]);
            Response::builder()
                .header("content-type", "application/grpc")
                .body(body(vec![Frame::data(message), Frame::trailers(trailers)]))
                .expect("response")
        })
        .await;
        assert_eq!(grpc_health(address, "orders").await, Ok(()));
        let address = serve(|_| {
            let body = body(Vec::new());
            Response::builder()
                .header("grpc-status", "12")
                .body(body)
                .expect("response")
        })
        .await;
        let error = grpc_health(address, "").await.expect_err("unimplemented");
        assert_eq!(error, "gRPC health check failed with status 12");
    }
}
