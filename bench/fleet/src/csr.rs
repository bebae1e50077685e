//! Certificates: as many requests as the control plane signs, each authenticated by a pod's token.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mantlet_identity::tls::mesh_provider;
use mantlet_identity::{
    KeyAlgorithm, PrivateKey, SpiffeClientVerifier, SpiffeId, TlsIdentity, TrustDomain, TrustDomainRule, build_csr,
};
use mantlet_xds::istio_ca::IstioCertificateRequest;
use mantlet_xds::istio_ca::istio_certificate_service_client::IstioCertificateServiceClient;
use rustls_pki_types::UnixTime;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tonic::Request;

use crate::process;
use crate::sidecar::{Fleet, Identity};

/// Connections.
const CONNECTIONS: usize = 8;
/// Requests under way on each.
const PER_CONNECTION: usize = 8;

/// Certificates in a second, milliseconds of the control plane's processor time for each, and how many there were in all. The first and
/// the last one of every client are verified: chain, name and key.
pub(crate) async fn run(
    fleet: &Arc<Fleet>,
    identities: &[Identity],
    pid: u32,
    seconds: f64,
) -> Result<(f64, f64, u64)> {
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
            let id = SpiffeId::parse(&id)?;
            let csr = build_csr(&key, &id)?;
            let (stop, signed, channel, fleet) = (stop.clone(), signed.clone(), channel.clone(), fleet.clone());
            tasks.spawn(async move {
                let mut client = IstioCertificateServiceClient::new(channel);
                let mut last: Option<Vec<String>> = None;
                while !stop.load(Ordering::Relaxed) {
                    let mut request = Request::new(IstioCertificateRequest {
                        csr: csr.clone(),
                        validity_duration: 86_400,
                        metadata: None,
                    });
                    let bearer = format!("Bearer {}", identity.token).parse()?;
                    request.metadata_mut().insert("authorization", bearer);
                    let chain = client.create_certificate(request).await?.into_inner().cert_chain;
                    signed.fetch_add(1, Ordering::Relaxed);
                    match &last {
                        None => verify(&fleet, &chain, &key, &id)?,
                        Some(former) => anyhow::ensure!(*former != chain, "one certificate was given twice"),
                    }
                    last = Some(chain);
                }
                verify(&fleet, &last.context("no certificate")?, &key, &id)
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
    Ok((count / elapsed, cpu * 1e3 / count, signed.load(Ordering::Relaxed)))
}

/// Fails unless a chain ends at the mesh's root and is for this key and identity.
fn verify(fleet: &Fleet, chain: &[String], key: &PrivateKey, id: &SpiffeId) -> Result<()> {
    let identity = TlsIdentity::from_csr_response(chain, key, mesh_provider())?;
    anyhow::ensure!(
        identity.spiffe_id().as_ref() == Some(id),
        "a certificate for somebody else"
    );
    let rule = TrustDomainRule::one_of([TrustDomain::from_config("cluster.local")?]);
    let verifier = SpiffeClientVerifier::new(fleet.tls.bundle(), rule, false, &mesh_provider())?;
    let (leaf, intermediates) = identity.chain().split_first().context("an empty chain")?;
    verifier.verify_client_cert(leaf, intermediates, UnixTime::now())?;
    Ok(())
}
