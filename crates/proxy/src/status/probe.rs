//! Kubelet probes on behalf of the application (S5.43, S5.44): the application's own ports may demand mTLS.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::{StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use mantlet_model::names::INBOUND_SOURCE;
use mantlet_runtime::AdminResponse;
use mantlet_runtime::admin::text;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::settings::Settings;
use crate::upstream::connect;

const MAX_BODY: usize = 64 * 1024;

/// The probers of `ISTIO_KUBE_APP_PROBERS`.
#[derive(Clone)]
pub(super) struct Probers {
    address: IpAddr,
    all: Arc<BTreeMap<String, Value>>,
}

impl Probers {
    pub(super) fn new(settings: &Settings) -> Self {
        Probers {
            address: settings.address,
            all: Arc::new(settings.probers.clone()),
        }
    }

    pub(super) async fn answer(&self, path: &str) -> AdminResponse {
        let Some(prober) = self.all.get(path) else {
            return text(StatusCode::NOT_FOUND, format!("{path} is not among the probers\n"));
        };
        let seconds = prober.get("timeoutSeconds").and_then(Value::as_u64).unwrap_or(1).max(1);
        let probe = async {
            if let Some(http) = prober.get("httpGet") {
                self.http(http).await
            } else if let Some(tcp) = prober.get("tcpSocket") {
                self.tcp(tcp).await.map(|()| StatusCode::OK)
            } else {
                Err("this kind of probe is not supported".to_string())
            }
        };
        match tokio::time::timeout(Duration::from_secs(seconds), probe).await {
            Ok(Ok(status)) => text(status, ""),
            Ok(Err(problem)) => {
                tracing::info!(target: "probe", "{path}: {problem}");
                text(StatusCode::INTERNAL_SERVER_ERROR, format!("{problem}\n"))
            }
            Err(_) => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("no answer within {seconds} s\n"),
            ),
        }
    }

    fn target(&self, spec: &Value) -> Result<SocketAddr, String> {
        let port = spec
            .get("port")
            .and_then(|p| p.as_u64().or_else(|| p.as_str()?.parse().ok()));
        match port.and_then(|p| u16::try_from(p).ok()) {
            Some(port) => Ok(SocketAddr::new(self.address, port)),
            None => Err("the probe's port is no number".to_string()),
        }
    }

    async fn tcp(&self, spec: &Value) -> Result<(), String> {
        let target = self.target(spec)?;
        dial(target).await.map(drop).map_err(|e| format!("{target}: {e}"))
    }

    async fn http(&self, spec: &Value) -> Result<StatusCode, String> {
        if spec
            .get("scheme")
            .and_then(Value::as_str)
            .is_some_and(|s| s.eq_ignore_ascii_case("https"))
        {
            return Err("probes over HTTPS are not supported".to_string());
        }
        let target = self.target(spec)?;
        let mut path = spec.get("path").and_then(Value::as_str).unwrap_or("/").to_string();
        if !path.starts_with('/') {
            path.insert(0, '/');
        }
        let mut host = target.to_string();
        let mut headers = Vec::new();
        for header in spec.get("httpHeaders").and_then(Value::as_array).into_iter().flatten() {
            let field = |name: &str| header.get(name).and_then(Value::as_str).unwrap_or_default().to_string();
            if field("name").eq_ignore_ascii_case("host") {
                host = field("value");
            } else {
                headers.push((field("name"), field("value")));
            }
        }
        // Redirects are followed to the same host only; another one is the result itself (S5.44).
        for _ in 0..=10 {
            let (status, location) = get(target, &path, &host, &headers).await?;
            let Some(next) = location
                .filter(|_| status.is_redirection())
                .and_then(|l| l.parse::<Uri>().ok())
            else {
                return Ok(status);
            };
            let same = next
                .authority()
                .is_none_or(|a| a.host() == host.split(':').next().unwrap_or_default());
            match next.path_and_query() {
                Some(there) if same => path = there.to_string(),
                _ => return Ok(status),
            }
        }
        Err("more than 10 redirects".to_string())
    }
}

/// As the proxy's own traffic to the application: from another source it would be captured, and meet the policies that
/// the prober is there to spare the kubelet.
async fn dial(target: SocketAddr) -> std::io::Result<TcpStream> {
    connect::dial(Some(INBOUND_SOURCE), target).await
}

async fn get(
    target: SocketAddr,
    path: &str,
    host: &str,
    headers: &[(String, String)],
) -> Result<(StatusCode, Option<String>), String> {
    let tcp = dial(target).await.map_err(|e| format!("{target}: {e}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tcp))
        .await
        .map_err(|e| e.to_string())?;
    let driver = tokio::spawn(connection);
    let mut request = http::Request::builder()
        .uri(path)
        .header("host", host)
        .header("connection", "close");
    if !headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("user-agent")) {
        request = request.header("user-agent", "istio-probe/1.0");
    }
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let request = request.body(Empty::<bytes::Bytes>::new()).map_err(|e| e.to_string())?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|e| format!("{target}: {e}"))?;
    let status = response.status();
    let location = response
        .headers()
        .get(http::header::LOCATION)
        .and_then(|v| v.to_str().ok())
        .map(str::to_string);
    // Read so that the application does not see its answer cut off; too large a body is not the probe's business.
    let _ = Limited::new(response.into_body(), MAX_BODY).collect().await;
    driver.abort();
    Ok((status, location))
}
