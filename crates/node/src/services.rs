//! Service addresses: ClusterIPs and NodePorts as nft rules, LoadBalancers as listeners on the host.
//!
//! Called by the cluster process, inside the cluster's network namespace. [`plan`] turns Services and EndpointSlices into
//! rules (pure), [`run`] applies them whenever they change, as one transaction; connections that are established go on
//! to where they went (conntrack keeps their translation), which is what lets a rolling update lose no request.
//! [`loadbalancer`] accepts on descriptors that the broker has opened in the host's network namespace.

pub mod host_ports;
pub mod loadbalancer;
pub mod plan;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::controllers::Informers;

/// Why the rules could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `nft` is not there or cannot be started.
    #[error("cannot run nft: {0}; install the package nftables")]
    Spawn(std::io::Error),
    /// `nft` refused the rules; the former ones stay in force.
    #[error("nft refused the service rules: {0}")]
    Refused(String),
}

/// What is in force.
#[derive(Clone, Debug, Default)]
struct Applied {
    /// Addresses that new connections may be sent to.
    backends: BTreeSet<Ipv4Addr>,
}

/// Tells others what the rules in force do.
#[derive(Clone)]
pub struct Handle {
    applied: watch::Receiver<Arc<Applied>>,
}

impl Handle {
    /// Resolves once no Service sends new connections to `address`, or after `limit`; true in the first case. The node
    /// agent waits for it between a pod's deletion and the SIGTERM of its containers.
    pub async fn wait_until_unused(&self, address: Ipv4Addr, limit: Duration) -> bool {
        let mut applied = self.applied.clone();
        let unused = applied.wait_for(|applied| !applied.backends.contains(&address));
        matches!(tokio::time::timeout(limit, unused).await, Ok(Ok(_)))
    }
}

/// Starts to keep the rules equal to the API's state until `stop` is cancelled.
pub fn start(informers: Arc<Informers>, stop: CancellationToken) -> Handle {
    let (sender, applied) = watch::channel(Arc::new(Applied::default()));
    let changed = Arc::new(Notify::new());
    tokio::spawn(run(informers, changed, sender, stop));
    Handle { applied }
}

async fn run(
    informers: Arc<Informers>,
    changed: Arc<Notify>,
    sender: watch::Sender<Arc<Applied>>,
    stop: CancellationToken,
) {
    informers.services.subscribe(Box::new({
        let changed = changed.clone();
        move |_old, _new| changed.notify_one()
    }));
    informers.slices.subscribe(Box::new({
        let changed = changed.clone();
        move |_old, _new| changed.notify_one()
    }));
    tokio::select! {
        () = stop.cancelled() => return,
        () = async { tokio::join!(informers.services.synced(), informers.slices.synced()); } => {}
    }
    let mut before = String::new();
    let mut pause = Duration::from_millis(50);
    loop {
        let ports = plan::collect(&informers.services.list(), &informers.slices.list());
        let rules = plan::render(&ports);
        if rules != before {
            match apply(&rules).await {
                Ok(()) => {
                    let backends = ports.iter().flat_map(|port| port.backends.iter());
                    let backends = backends.map(|(address, _)| *address).collect();
                    sender.send_replace(Arc::new(Applied { backends }));
                    before = rules;
                    pause = Duration::from_millis(50);
                }
                Err(error) => {
                    tracing::error!(%error, "service rules not applied, retrying");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(10));
                    continue;
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = changed.notified() => {}
        }
    }
}

/// Hands a whole ruleset to `nft -f -`, which applies all of it or nothing.
async fn apply(rules: &str) -> Result<(), Error> {
    let mut child = tokio::process::Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(Error::Spawn)?;
    if let Some(mut stdin) = child.stdin.take() {
        // If nft ends early, its message says why.
        let _ = stdin.write_all(rules.as_bytes()).await;
    }
    let output = child.wait_with_output().await.map_err(Error::Spawn)?;
    if output.status.success() {
        Ok(())
    } else {
        let message = String::from_utf8_lossy(&output.stderr);
        Err(Error::Refused(message.lines().take(5).collect::<Vec<_>>().join(" | ")))
    }
}
