//! The workload's certificate: key in memory, CSR to the authority, swap, renewal before half of its life is over.
//!
//! It never gives up and never exits: the certificate in force stays until it expires, and the next attempt comes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mantlet_identity::rotation::renewal_time;
use mantlet_identity::{PeerCertificate, PrivateKey, TlsIdentity, TrustBundle, build_csr};
use mantlet_runtime::{Backoff, ReadyTask};
use mantlet_xds::istio_ca::IstioCertificateRequest;
use mantlet_xds::istio_ca::istio_certificate_service_client::IstioCertificateServiceClient;
use time::OffsetDateTime;

use super::control_plane;
use crate::secrets::Secrets;
use crate::settings::Settings;
use crate::worker::Shared;

/// Longest wait for one answer of the authority.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the mounted root file is looked at.
const ROOT_POLL: Duration = Duration::from_secs(2);

/// Longest sleep before the clock is looked at again: it may be set, and it goes on while the machine sleeps, which timers
/// do not.
const CLOCK_POLL: Duration = Duration::from_secs(2);

/// Keeps the workload's certificate fresh for the life of the process; `ready` is done with the first one.
pub async fn keep_fresh(settings: Arc<Settings>, shared: Arc<Shared>, ready: ReadyTask) {
    let secrets = &shared.secrets;
    let mut ready = Some(ready);
    // S4.20: 100 ms, doubling, with jitter.
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        match fetch(&settings, secrets).await {
            Ok(identity) => {
                backoff.reset();
                let received = OffsetDateTime::now_utc();
                let leaf = identity.leaf().cloned();
                let not_after = leaf.as_ref().map_or(received, |leaf| leaf.not_after);
                let dice = rand::random_range(-1.0..=1.0);
                let renew = renewal_time(received, not_after, settings.grace.0, settings.grace.1, dice);
                tracing::info!(
                    target: "certs",
                    "certificate of {} is valid until {not_after}, renewal at {renew}", settings.identity
                );
                if let Some(directory) = &settings.output_certs
                    && let Err(error) = write_out(directory, &identity).await
                {
                    tracing::warn!(target: "certs", "cannot write to {}: {error}", directory.display());
                }
                secrets.set_identity(identity);
                if let Some(ready) = ready.take() {
                    ready.done();
                }
                // A certificate that is renewed at once, forever, would be a storm.
                tokio::time::sleep(Duration::from_millis(200)).await;
                tokio::select! {
                    () = due(leaf.as_ref(), renew) => {}
                    () = issuer_leaves(secrets) => {
                        tracing::info!(target: "certs", "the trust anchors have changed: renewing");
                    }
                }
            }
            Err(problem) => {
                let wait = backoff.next_wait();
                tracing::warn!(target: "certs", "no certificate: {problem}; next attempt in {wait:?}");
                tokio::time::sleep(wait).await;
            }
        }
    }
}

/// Returns when the certificate must be renewed by the clock as it is then: at `renew`, or when the clock has been set to a
/// time at which the certificate is not valid (RFC 5280 4.1.2.5).
async fn due(leaf: Option<&PeerCertificate>, renew: OffsetDateTime) {
    loop {
        let now = OffsetDateTime::now_utc();
        if now >= renew || leaf.is_none_or(|leaf| leaf.check_validity(now).is_err()) {
            return;
        }
        let wait = (renew - now).try_into().unwrap_or(Duration::ZERO);
        tokio::time::sleep(CLOCK_POLL.min(wait)).await;
    }
}

/// Returns when the mounted trust anchors change to ones without the issuer of the own certificate.
async fn issuer_leaves(secrets: &Secrets) {
    let mut changed = secrets.subscribe();
    // An authority that still issues under the former root is not asked again and again: only a change counts.
    let mut before = secrets.load().issuer_left();
    while changed.changed().await.is_ok() {
        let now = secrets.load().issuer_left();
        if now && !before {
            return;
        }
        before = now;
    }
    std::future::pending::<()>().await;
}

async fn fetch(settings: &Settings, secrets: &Secrets) -> Result<TlsIdentity, String> {
    let key = PrivateKey::generate(settings.key).map_err(|e| e.to_string())?;
    let csr = build_csr(&key, &settings.identity).map_err(|e| e.to_string())?;
    let call = async {
        let channel = control_plane::channel(settings, secrets, &settings.ca, &settings.ca_root).await?;
        let mut request = tonic::Request::new(IstioCertificateRequest {
            csr,
            validity_duration: settings.secret_ttl.as_secs() as i64,
            metadata: None,
        });
        *request.metadata_mut() = control_plane::metadata(settings).await?;
        IstioCertificateServiceClient::new(channel)
            .create_certificate(request)
            .await
            .map_err(|status| format!("{:?}: {}", status.code(), status.message()))
    };
    let response = tokio::time::timeout(CALL_TIMEOUT, call)
        .await
        .map_err(|_| format!("{} did not answer within {CALL_TIMEOUT:?}", settings.ca))??
        .into_inner();
    let identity = TlsIdentity::from_csr_response(&response.cert_chain, &key, secrets.provider.clone())
        .map_err(|e| format!("unusable answer of the authority: {e}"))?;
    let now = OffsetDateTime::now_utc();
    if let Some(leaf) = identity.leaf()
        && leaf.check_validity(now).is_err()
    {
        // The former one may be good for hours: peers would refuse this one at once.
        return Err(format!(
            "the authority's certificate is valid from {} to {}, but it is {now}: one of the two clocks is wrong",
            leaf.not_before, leaf.not_after
        ));
    }
    match identity.spiffe_id() {
        Some(id) if id == settings.identity => Ok(identity),
        Some(id) => Err(format!("the authority certified {id} instead of {}", settings.identity)),
        None => Err("the authority's certificate names no workload".to_string()),
    }
}

/// `OUTPUT_CERTS` (S4.99): certificate and roots; the key is not written, since it never leaves memory.
async fn write_out(directory: &Path, identity: &TlsIdentity) -> std::io::Result<()> {
    tokio::fs::create_dir_all(directory).await?;
    let chain = mantlet_identity::pem::encode_certificates(identity.chain());
    tokio::fs::write(directory.join("cert-chain.pem"), chain).await?;
    tokio::fs::write(directory.join("root-cert.pem"), identity.bundle().to_pem()).await
}

/// Follows the mounted trust anchors, whatever way the file is replaced.
pub async fn watch_roots(settings: Arc<Settings>, shared: Arc<Shared>) {
    let secrets = &shared.secrets;
    let path = &settings.mesh_root;
    let mut seen: Option<Vec<u8>> = None;
    let mut failed = false;
    loop {
        match tokio::fs::read(path).await {
            Ok(pem) if seen.as_ref() == Some(&pem) => {}
            Ok(pem) => match TrustBundle::from_pem(&path.display().to_string(), &pem) {
                Ok(bundle) => {
                    tracing::info!(target: "certs", "{} holds {} trust anchors", path.display(), bundle.certificates().len());
                    secrets.set_mounted_roots(bundle);
                    seen = Some(pem);
                    failed = false;
                }
                // A file that is being written; the former anchors stay.
                Err(error) if !std::mem::replace(&mut failed, true) => {
                    tracing::warn!(target: "certs", "{error}; the former trust anchors stay");
                }
                Err(_) => {}
            },
            Err(error) if !std::mem::replace(&mut failed, true) => {
                tracing::warn!(target: "certs", "cannot read {}: {error}", path.display());
            }
            Err(_) => {}
        }
        tokio::time::sleep(ROOT_POLL).await;
    }
}
