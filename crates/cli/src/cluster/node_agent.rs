//! Starts the node agent inside the cluster process. Called by `process` only.

use anyhow::{Context, Result};
use kube::Client;
use mantlet_node::kubelet::{self, NodeConfig};
use mantlet_node::services::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::paths::Paths;

/// The running agent.
pub(super) struct Agent {
    task: JoinHandle<()>,
}

impl Agent {
    /// Resolves once the agent has ended.
    pub(super) async fn stopped(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the node agent ended");
        }
    }
}

/// Starts it; when it cannot go on, the cluster process ends.
pub(super) fn start(paths: &Paths, client: Client, services: Handle, stop: CancellationToken) -> Result<Agent> {
    let program = std::env::current_exe().context("the running program")?;
    let mut config = NodeConfig::new(client, paths.dir.clone(), program);
    config.services = Some(services);
    let task = tokio::spawn(async move {
        if let Err(error) = kubelet::run(config, stop.clone()).await {
            tracing::error!(%error, "the node agent ended");
            stop.cancel();
        }
    });
    Ok(Agent { task })
}
