//! One call of a webhook: from its client configuration to the answer's JSON.
//!
//! A service is resolved as kube-proxy would: Service → its EndpointSlices → address and target port of a ready endpoint. TLS is
//! verified against the configuration's `caBundle`, with `<service>.<namespace>.svc` as the name.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::Value;
use tokio_rustls::TlsConnector;

use super::dial::DialTarget;
use crate::rest::Cx;

const MAX_REPLY: usize = 8 << 20;

struct Endpoint {
    url: String,
    authority: String,
    server_name: String,
    targets: Vec<DialTarget>,
    path: String,
}

/// Sends a review and returns the reply's JSON. Errors are texts in the words of Go's HTTP client, which users know.
pub(super) async fn post(cx: &Cx, hook: &Value, body: &Value) -> Result<Value, String> {
    let seconds = hook["timeoutSeconds"].as_u64().unwrap_or(10).clamp(1, 30);
    let client = &hook["clientConfig"];
    let endpoint = resolve(cx, client, seconds)?;
    let shown = |why: String| format!("Post {:?}: {why}", endpoint.url);
    let roots = trust_roots(client["caBundle"].as_str().unwrap_or_default()).map_err(&shown)?;
    if endpoint.targets.is_empty() {
        let service = client["service"]["name"].as_str().unwrap_or_default();
        return Err(shown(format!("no endpoints available for service {service:?}")));
    }
    let bytes = Bytes::from(serde_json::to_vec(body).map_err(|e| e.to_string())?);
    match tokio::time::timeout(Duration::from_secs(seconds), exchange(cx, &endpoint, roots, bytes)).await {
        Ok(done) => done.map_err(shown),
        Err(_) => Err(shown("context deadline exceeded".into())),
    }
}

/// Trust anchors of a base64 `caBundle`.
pub(super) fn trust_roots(bundle: &str) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let pem = base64::engine::general_purpose::STANDARD
        .decode(bundle.trim())
        .map_err(|e| format!("caBundle is not base64: {e}"))?;
    for cert in CertificateDer::pem_slice_iter(&pem) {
        roots.add(cert.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
    }
    if !pem.is_empty() && roots.is_empty() {
        return Err("caBundle holds no certificate".into());
    }
    Ok(roots)
}

fn resolve(cx: &Cx, client: &Value, seconds: u64) -> Result<Endpoint, String> {
    if let Some(url) = client["url"].as_str() {
        let uri: http::Uri = url.parse().map_err(|e| format!("{url:?}: {e}"))?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(443);
        let path = uri.path().to_owned();
        let authority = uri.authority().map(ToString::to_string).unwrap_or_default();
        return Ok(Endpoint {
            url: format!("{url}?timeout={seconds}s"),
            authority,
            server_name: host.clone(),
            targets: vec![DialTarget { host, port }],
            path: format!("{path}?timeout={seconds}s"),
        });
    }
    let service = &client["service"];
    let (name, namespace) = (
        service["name"].as_str().unwrap_or_default(),
        service["namespace"].as_str().unwrap_or_default(),
    );
    let port = service["port"].as_u64().unwrap_or(443);
    let path = service["path"].as_str().unwrap_or("/");
    let path = format!("/{}?timeout={seconds}s", path.trim_start_matches('/'));
    let server_name = format!("{name}.{namespace}.svc");
    let authority = format!("{server_name}:{port}");
    let url = format!("https://{authority}{path}");
    let targets = endpoints(cx, namespace, name, port).map_err(|why| format!("Post {url:?}: {why}"))?;
    Ok(Endpoint {
        url,
        authority,
        server_name,
        targets,
        path,
    })
}

fn endpoints(cx: &Cx, namespace: &str, name: &str, port: u64) -> Result<Vec<DialTarget>, String> {
    let store = cx.server.store();
    let (entry, _) = store
        .get(&format!("/core/services/{namespace}/{name}"))
        .map_err(|e| e.to_string())?;
    let entry = entry.ok_or_else(|| format!("service {name:?} not found"))?;
    let service: Value = serde_json::from_slice(&entry.value).map_err(|e| e.to_string())?;
    let ports = service["spec"]["ports"].as_array().cloned().unwrap_or_default();
    let service_port = ports
        .iter()
        .find(|p| p["port"].as_u64() == Some(port))
        .ok_or_else(|| format!("no service port {port} found for service {name:?}"))?;
    let port_name = service_port["name"].as_str().unwrap_or_default();
    let slices = store
        .range(&format!("/discovery.k8s.io/endpointslices/{namespace}/"), None, 0)
        .map_err(|e| e.to_string())?;
    let mut targets = Vec::new();
    for entry in &slices.entries {
        let slice: Value = serde_json::from_slice(&entry.value).map_err(|e| e.to_string())?;
        if slice["metadata"]["labels"]["kubernetes.io/service-name"].as_str() != Some(name) {
            continue;
        }
        let target = slice["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|p| p["name"].as_str().unwrap_or_default() == port_name)
            .and_then(|p| p["port"].as_u64())
            .and_then(|p| u16::try_from(p).ok());
        let Some(target) = target else { continue };
        for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
            if endpoint["conditions"]["ready"] == false {
                continue;
            }
            for address in endpoint["addresses"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
            {
                targets.push(DialTarget {
                    host: address.to_owned(),
                    port: target,
                });
            }
        }
    }
    // Spread calls over the endpoints; the others are tried when one does not answer.
    if targets.len() > 1 {
        let at = rand::random_range(0..targets.len());
        targets.rotate_left(at);
        targets.truncate(3);
    }
    Ok(targets)
}

async fn exchange(cx: &Cx, endpoint: &Endpoint, roots: RootCertStore, body: Bytes) -> Result<Value, String> {
    let mut stream = None;
    let mut failure = String::new();
    for target in &endpoint.targets {
        match cx.server.webhooks.dialer.dial(target.clone()).await {
            Ok(s) => {
                stream = Some(s);
                break;
            }
            Err(e) => failure = format!("dial tcp {}:{}: {}", target.host, target.port, dial_text(&e)),
        }
    }
    let stream = stream.ok_or(failure)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from(endpoint.server_name.clone()).map_err(|e| e.to_string())?;
    let tls = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .map_err(|e| tls_text(&e))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls))
        .await
        .map_err(|e| e.to_string())?;
    let driver = tokio::spawn(async move {
        if let Err(e) = connection.await {
            tracing::debug!(error = %e, "webhook connection ended");
        }
    });
    let request = Request::post(&endpoint.path)
        .header(header::HOST, &endpoint.authority)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json")
        .header(header::USER_AGENT, "kube-apiserver-admission")
        .body(Full::new(body))
        .map_err(|e| e.to_string())?;
    let answered = async {
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), MAX_REPLY)
            .collect()
            .await
            .map_err(|e| e.to_string())?
            .to_bytes();
        if !status.is_success() {
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(512)])
                .trim()
                .to_owned();
            return Err(if text.is_empty() {
                format!(
                    "an error on the server ({:?}) has prevented the request from succeeding",
                    status.as_str()
                )
            } else {
                format!("an error on the server ({text:?}) has prevented the request from succeeding")
            });
        }
        serde_json::from_slice(&bytes).map_err(|e| format!("reply is not JSON: {e}"))
    }
    .await;
    driver.abort();
    answered
}

fn dial_text(e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::ConnectionRefused => "connect: connection refused".into(),
        std::io::ErrorKind::HostUnreachable => "connect: no route to host".into(),
        std::io::ErrorKind::NetworkUnreachable => "connect: network is unreachable".into(),
        std::io::ErrorKind::TimedOut => "i/o timeout".into(),
        _ => e.to_string(),
    }
}

fn tls_text(e: &std::io::Error) -> String {
    let inner = e.get_ref().and_then(|i| i.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidCertificate(
            rustls::CertificateError::UnknownIssuer | rustls::CertificateError::BadSignature,
        )) => "tls: failed to verify certificate: x509: certificate signed by unknown authority".into(),
        Some(rustls::Error::InvalidCertificate(
            rustls::CertificateError::Expired | rustls::CertificateError::ExpiredContext { .. },
        )) => "tls: failed to verify certificate: x509: certificate has expired or is not yet valid".into(),
        Some(rustls::Error::InvalidCertificate(other)) => format!("tls: failed to verify certificate: x509: {other}"),
        _ => e.to_string(),
    }
}
