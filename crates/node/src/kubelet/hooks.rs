//! Lifecycle hooks: what runs right after a container's start and right before its end.

use std::time::Duration;

use k8s_openapi::api::core::v1::LifecycleHandler;

use crate::probes::{self, Target};

/// Runs a hook to its end.
///
/// # Errors
/// What its event says.
pub(super) async fn run(target: &Target, hook: &LifecycleHandler) -> Result<(), String> {
    if let Some(action) = &hook.exec {
        probes::exec(&target.shim, &target.id, action.command.as_deref().unwrap_or_default()).await
    } else if let Some(action) = &hook.http_get {
        probes::http_get(target, action).await
    } else if let Some(action) = &hook.sleep {
        tokio::time::sleep(Duration::from_secs(action.seconds.max(0).unsigned_abs())).await;
        Ok(())
    } else {
        Err("the hook names no action that this node has (exec, httpGet, sleep)".into())
    }
}
