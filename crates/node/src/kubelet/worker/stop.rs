//! The way down: endpoints leave first, then the application is asked to end, the proxy last.

use std::sync::PoisonError;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DeleteParams, ListParams, Preconditions};
use tokio::time::Instant;

use super::super::hooks;
use super::super::state::Role;
use super::{FIRST_RETRY, MAX_RETRY, Worker};

/// How long the endpoints may take to leave.
const ENDPOINTS_LIMIT: Duration = Duration::from_secs(3);
/// After they have left: for clients and proxies to hear of it, which nobody can observe from here.
const ENDPOINTS_SETTLE: Duration = Duration::from_millis(500);
/// What the proxy has at least, when the application used up the grace period.
const PROXY_GRACE: Duration = Duration::from_secs(2);
/// After SIGKILL; a process in the kernel may take a moment.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// The container that ends last.
const PROXY: &str = "istio-proxy";

impl Worker {
    /// Ends the pod and deletes its object.
    pub(super) async fn terminate(&mut self) {
        let gone = self.input.borrow().gone;
        let meta = &self.pod.metadata;
        let spec_grace = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
        let seconds = meta
            .deletion_grace_period_seconds
            .or(spec_grace)
            .unwrap_or(30)
            .max(0)
            .unsigned_abs();
        let grace = if gone {
            Duration::ZERO
        } else {
            Duration::from_secs(seconds)
        };
        self.state.terminating = true;
        for container in &mut self.state.containers {
            container.ready &= container.role == Role::Init;
        }
        for runtime in &mut self.run {
            runtime.stop_watching();
        }
        if self.shim.is_some() {
            if !gone {
                self.write_status().await;
                self.wait_for_endpoints(grace.min(ENDPOINTS_LIMIT)).await;
            }
            self.stop_everything(grace, true).await;
        }
        self.release_sandbox();
        if !self.input.borrow().gone {
            self.write_status().await;
        }
        self.volumes.tear_down();
        if let Err(error) = std::fs::remove_dir_all(&self.dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(uid = self.uid, %error, "a pod's directory could not be removed");
        }
        self.shared
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .release(&self.uid);
        self.delete_object().await;
    }

    async fn delete_object(&mut self) {
        let namespace = self.pod.metadata.namespace.as_deref().unwrap_or("default");
        let name = self.pod.metadata.name.clone().unwrap_or_default();
        let api: Api<Pod> = Api::namespaced(self.shared.config.client.clone(), namespace);
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: Some(self.uid.clone()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let mut pause = FIRST_RETRY;
        while !self.input.borrow().gone {
            match api.delete(&name, &params).await {
                Ok(_) => return,
                // Deleted, or another pod has the name.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => return,
                Err(error) => tracing::warn!(name, %error, "a pod that has ended could not be deleted; trying again"),
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = self.input.changed() => {}
            }
            pause = (pause * 2).min(MAX_RETRY);
        }
    }

    /// Until no endpoint slice offers this pod any more, so that new connections go elsewhere before it stops listening.
    async fn wait_for_endpoints(&mut self, limit: Duration) {
        let namespace = self.pod.metadata.namespace.as_deref().unwrap_or("default");
        let api: Api<EndpointSlice> = Api::namespaced(self.shared.config.client.clone(), namespace);
        let until = Instant::now() + limit;
        let mut was_there = false;
        loop {
            let offered = match api.list(&ListParams::default()).await {
                Ok(slices) => slices.items.iter().any(|slice| offers(slice, &self.uid)),
                Err(error) => {
                    tracing::debug!(%error, "endpoints could not be read");
                    false
                }
            };
            was_there |= offered;
            if !offered || Instant::now() >= until {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if let (Some(services), Some(address)) = (&self.shared.config.services, self.state.address) {
            let left = until.saturating_duration_since(Instant::now());
            if !services.wait_until_unused(address, left).await {
                tracing::warn!(uid = self.uid, "service rules still lead to a pod that ends");
            }
        }
        // The controller may have been faster than the first look: then nothing shows that the pod was offered.
        let served = self.conditions.iter().any(|c| c.type_ == "Ready") && self.listens();
        if was_there || served {
            tokio::time::sleep(ENDPOINTS_SETTLE.min(limit)).await;
        }
    }

    /// Whether any container says that it has ports.
    fn listens(&self) -> bool {
        self.state
            .containers
            .iter()
            .any(|c| c.role == Role::Main && c.spec.name != PROXY && c.spec.ports.is_some())
    }

    /// Ends all containers: those of the application first, then proxy and sidecars in reverse order. With `announce`
    /// each gets its event.
    pub(super) async fn stop_everything(&mut self, grace: Duration, announce: bool) {
        let deadline = Instant::now() + grace;
        let indices: Vec<usize> = (0..self.state.containers.len()).collect();
        let last = |worker: &Self, index: usize| {
            let container = &worker.state.containers[index];
            container.role == Role::Sidecar || container.spec.name == PROXY
        };
        let (late, early): (Vec<usize>, Vec<usize>) = indices.into_iter().partition(|index| last(self, *index));
        if announce {
            for index in early.iter().chain(&late) {
                let container = &self.state.containers[*index];
                if container.running_id().is_some() {
                    let name = &container.spec.name;
                    self.shared
                        .recorder
                        .normal(&self.pod, Some(name), "Killing", format!("Stopping container {name}"));
                }
            }
        }
        self.stop_group(&early, deadline).await;
        let least = Instant::now() + PROXY_GRACE.min(grace);
        for index in late.into_iter().rev() {
            self.stop_group(&[index], deadline.max(least)).await;
        }
    }

    async fn stop_group(&mut self, group: &[usize], deadline: Instant) {
        let mut hooks = tokio::task::JoinSet::new();
        for index in group {
            let Some(target) = self.target(*index) else { continue };
            let container = &self.state.containers[*index];
            let hook = container.spec.lifecycle.as_ref().and_then(|l| l.pre_stop.clone());
            let (recorder, pod, name) = (
                self.shared.recorder.clone(),
                self.pod.clone(),
                container.spec.name.clone(),
            );
            hooks.spawn(async move {
                if let Some(hook) = hook
                    && deadline > Instant::now()
                {
                    match tokio::time::timeout_at(deadline, hooks::run(&target, &hook)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(message)) => recorder.warning(
                            &pod,
                            Some(&name),
                            "FailedPreStopHook",
                            format!("PreStopHook failed: {message}"),
                        ),
                        Err(_) => recorder.warning(
                            &pod,
                            Some(&name),
                            "FailedPreStopHook",
                            "PreStopHook did not end within the grace period",
                        ),
                    }
                }
                // Refused when it has ended meanwhile.
                let _ = target.shim.signal(&target.id, 15, false).await;
            });
        }
        if !self.wait_for_exits(group, deadline).await
            && let Some(shim) = self.shim.clone()
        {
            for index in group {
                if let Some(id) = self.state.containers[*index].running_id() {
                    let _ = shim.signal(id, 9, true).await;
                }
            }
            self.wait_for_exits(group, Instant::now() + KILL_LIMIT).await;
        }
    }

    /// True when all have ended in time. A forced deletion ends the wait.
    async fn wait_for_exits(&mut self, group: &[usize], deadline: Instant) -> bool {
        let forced = self.input.borrow().gone;
        loop {
            if group
                .iter()
                .all(|index| self.state.containers[*index].running_id().is_none())
            {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            tokio::select! {
                Some(event) = super::next(&mut self.shim_events) => self.on_shim_event(event),
                changed = self.input.changed(), if !forced => {
                    if changed.is_err() || self.input.borrow_and_update().gone {
                        return false;
                    }
                }
                () = tokio::time::sleep_until(deadline) => return false,
            }
        }
    }
}

/// Whether a slice still offers the pod as ready.
fn offers(slice: &EndpointSlice, uid: &str) -> bool {
    slice.endpoints.iter().flatten().any(|endpoint| {
        let ours = endpoint.target_ref.as_ref().and_then(|t| t.uid.as_deref()) == Some(uid);
        let ready = endpoint.conditions.as_ref().and_then(|c| c.ready) != Some(false);
        ours && ready
    })
}
