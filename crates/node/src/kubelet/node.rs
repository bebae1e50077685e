//! The Node object: what this machine offers, and that it is ready.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;

use super::{NODE_ADDRESS, NODE_NAME, NodeError, Shared, events};

/// Kubernetes version that the node reports; that of the API server.
const KUBELET_VERSION: &str = "v1.32.0";
/// Pods at most.
const MAX_PODS: &str = "250";

/// Number of processors and bytes of memory.
pub(super) fn capacity() -> (u64, u64) {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let memory = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("MemTotal:"))?.to_owned();
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .map_or(1 << 30, |kib| kib * 1024);
    (cpus, memory)
}

fn status(shared: &Shared) -> serde_json::Value {
    let now = events::now();
    let amounts =
        json!({"cpu": shared.cpus.to_string(), "memory": format!("{}Ki", shared.memory / 1024), "pods": MAX_PODS});
    let kernel = nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        json!({"type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": now})
    };
    let version = env!("CARGO_PKG_VERSION");
    json!({
        "addresses": [{"type": "InternalIP", "address": NODE_ADDRESS.to_string()}, {"type": "Hostname", "address": NODE_NAME}],
        "capacity": amounts, "allocatable": amounts,
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        ],
        "nodeInfo": {
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "operatingSystem": "linux",
            "kubeletVersion": KUBELET_VERSION, "kubeProxyVersion": KUBELET_VERSION, "kernelVersion": kernel,
            "containerRuntimeVersion": format!("mantlet://{version}"), "osImage": "host", "machineID": NODE_NAME,
            "systemUUID": NODE_NAME, "bootID": NODE_NAME,
        },
    })
}

/// Creates the node (or takes over an earlier one) and says that it is ready.
pub(super) async fn register(shared: &Arc<Shared>) -> Result<(), NodeError> {
    let api: Api<Node> = Api::all(shared.config.client.clone());
    let failed = |step| {
        move |source| NodeError::Api {
            step,
            source: Box::new(source),
        }
    };
    let node: Node = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": NODE_NAME, "labels": {
            "kubernetes.io/hostname": NODE_NAME, "kubernetes.io/os": "linux",
            "kubernetes.io/arch": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "node-role.kubernetes.io/control-plane": "",
        }},
        "spec": {"podCIDR": "10.244.0.0/16", "podCIDRs": ["10.244.0.0/16"]},
    }))
    .map_err(|error| failed("describing the node")(kube::Error::SerdeError(error)))?;
    match api.create(&PostParams::default(), &node).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => return Err(failed("registering the node")(error)),
    }
    api.patch_status(
        NODE_NAME,
        &PatchParams::default(),
        &Patch::Merge(json!({"status": status(shared)})),
    )
    .await
    .map_err(failed("writing the node's status"))?;
    Ok(())
}

/// Renews the heartbeat.
pub(super) async fn heartbeat(shared: Arc<Shared>) {
    let api: Api<Node> = Api::all(shared.config.client.clone());
    loop {
        tokio::time::sleep(Duration::from_secs(60)).await;
        let patch = Patch::Merge(json!({"status": status(&shared)}));
        if let Err(error) = api.patch_status(NODE_NAME, &PatchParams::default(), &patch).await {
            tracing::warn!(%error, "the node's heartbeat could not be written");
        }
    }
}
