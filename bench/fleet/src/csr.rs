//! Certificates: as many requests as the control plane signs, each authenticated by a pod's token.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use mantlet_identity::{KeyAlgorithm, PrivateKey, SpiffeId, build_csr};
use mantlet_xds::istio_ca::IstioCertificateRequest;
use mantlet_xds::istio_ca::istio_certificate_service_client::IstioCertificateServiceClient;
use tonic::Request;

use crate::process;
use crate::sidecar::{Fleet, Identity};

/// Connections.
const CONNECTIONS: usize = 8;
/// Requests under way on each.
const PER_CONNECTION: usize = 8;

/// Certificates in a second, and milliseconds of the control plane's processor time for each.
pub(crate) async fn run(fleet: &Arc<Fleet>, identities: &[Identity], pid: u32, seconds: f64) -> Result<(f64, f64)> {
    let stop = Arc::new(AtomicBool::new(false));
    let signed = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for connection in 0..CONNECTIONS {
        let channel = fleet.channel().await?;
        for _ in 0..PER_CONNECTION {
            let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256)?;
            let identity = identities[connection % identities.len()].clone();
            let id = format!(
                "spiffe://cluster.local/ns/{}/sa/{}",
                identity.namespace,
                super::objects::ACCOUNT
            );
            let csr = build_csr(&key, &SpiffeId::parse(&id)?)?;
            let (stop, signed, channel) = (stop.clone(), signed.clone(), channel.clone());
            tasks.spawn(async move {
                let mut client = IstioCertificateServiceClient::new(channel);
                while !stop.load(Ordering::Relaxed) {
                    let mut request = Request::new(IstioCertificateRequest {
                        csr: csr.clone(),
                        validity_duration: 86_400,
                        metadata: None,
                    });
                    let bearer = format!("Bearer {}", identity.token).parse()?;
                    request.metadata_mut().insert("authorization", bearer);
                    let chain = client.create_certificate(request).await?.into_inner().cert_chain;
                    anyhow::ensure!(chain.len() >= 2, "a certificate without a root");
                    signed.fetch_add(1, Ordering::Relaxed);
                }
                anyhow::Ok(())
            });
        }
    }
    // The first ones review tokens.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (count, cpu, began) = (
        signed.load(Ordering::Relaxed),
        process::cpu_seconds(pid)?,
        Instant::now(),
    );
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    let count = (signed.load(Ordering::Relaxed) - count) as f64;
    let (cpu, elapsed) = (process::cpu_seconds(pid)? - cpu, began.elapsed().as_secs_f64());
    stop.store(true, Ordering::Relaxed);
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    anyhow::ensure!(count > 0.0, "no certificate was signed");
    Ok((count / elapsed, cpu * 1e3 / count))
}
