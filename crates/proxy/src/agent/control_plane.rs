//! Connections to the control plane: TLS with the right roots, the workload's token read anew for each.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use mantlet_identity::{ClientTlsOptions, ExpectedServer, TlsIdentity, TrustBundle};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::secrets::Secrets;
use crate::settings::Settings;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest token that is read.
const MAX_TOKEN: usize = 64 * 1024;

/// Opens a channel to `address` (`host:port`), verified against the roots in `root`. The own certificate is presented when
/// there is one that is still valid.
///
/// # Errors
/// What is missing or failed, in words for the log.
pub async fn channel(settings: &Settings, secrets: &Secrets, address: &str, root: &Path) -> Result<Channel, String> {
    let pem = tokio::fs::read(root).await.map_err(|e| {
        format!(
            "cannot read the trust anchors of the control plane ({}): {e}",
            root.display()
        )
    })?;
    let bundle = TrustBundle::from_pem(&root.display().to_string(), &pem).map_err(|e| e.to_string())?;
    let own = secrets
        .load()
        .identity
        .clone()
        .filter(|i| i.not_after().is_some_and(|end| end > time::OffsetDateTime::now_utc()));
    let present_certificate = own.is_some();
    let identity = match own {
        Some(own) => own.with_bundle(bundle),
        None => TlsIdentity::anonymous(bundle, secrets.provider.clone()),
    };
    let config = identity
        .client(&ClientTlsOptions {
            expected: ExpectedServer::ServerName,
            alpn: vec![b"h2".to_vec()],
            present_certificate,
            min_tls13: false,
        })
        .map_err(|e| e.to_string())?;
    let (host, _) = address
        .rsplit_once(':')
        .ok_or_else(|| format!("{address:?} is no host:port"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = settings.control_san.as_deref().unwrap_or(host);
    let name = ServerName::try_from(name.to_string()).map_err(|_| format!("{name:?} is no server name"))?;
    let target: Arc<str> = address.into();
    let connector = tower::service_fn(move |_: Uri| {
        let (target, name, config) = (target.clone(), name.clone(), config.clone());
        async move {
            let tcp = TcpStream::connect(&*target).await?;
            tcp.set_nodelay(true)?;
            let tls = TlsConnector::from(config).connect(name, tcp).await?;
            Ok::<_, std::io::Error>(TokioIo::new(tls))
        }
    });
    Endpoint::from_shared(format!("http://{address}"))
        .map_err(|e| format!("{address:?}: {e}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|e| format!("cannot connect to {address}: {}", chain(&e)))
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        out.push_str(": ");
        out.push_str(&cause.to_string());
        source = cause.source();
    }
    out
}

/// gRPC metadata that authenticates: the token as it is now, and the cluster id.
///
/// # Errors
/// When the token cannot be read.
pub async fn metadata(settings: &Settings) -> Result<MetadataMap, String> {
    let mut out = MetadataMap::new();
    let token = tokio::fs::read_to_string(&settings.token)
        .await
        .map_err(|e| format!("cannot read the token {}: {e}", settings.token.display()))?;
    let token = token.trim();
    if token.is_empty() || token.len() > MAX_TOKEN {
        return Err(format!("the token {} is empty or too long", settings.token.display()));
    }
    let mut value =
        MetadataValue::try_from(format!("Bearer {token}")).map_err(|_| "the token is no text".to_string())?;
    value.set_sensitive(true);
    out.insert("authorization", value);
    if let Ok(cluster) = MetadataValue::try_from(settings.local.cluster.as_str()) {
        out.insert("clusterid", cluster);
    }
    Ok(out)
}
