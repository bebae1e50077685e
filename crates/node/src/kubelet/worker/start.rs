//! The way up: sandbox, init containers in order, containers, their hooks and probes.

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::super::state::{Ended, Phase, Role};
use super::super::{Live, events, hooks, spec};
use super::{FIRST_RETRY, MAX_RETRY, REFRESH, Worker, waiting};
use crate::podnet;
use crate::probes::{self, ProbeKind};
use crate::shim::client::{Shim, ShimError};

impl Worker {
    /// Does what can be done now; returns when to look again.
    pub(super) async fn step(&mut self) -> Instant {
        let far = Instant::now() + Duration::from_secs(3600);
        if self.pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true)) {
            let message = "this node runs no pods in its own network namespace (hostNetwork)".to_owned();
            self.shared
                .recorder
                .warning(&self.pod, None, "FailedCreatePodSandBox", message.clone());
            self.state.failed = Some(("HostNetworkUnsupported".into(), message));
            return Instant::now();
        }
        if self.deadline.is_some_and(|at| at <= Instant::now()) {
            let message = "Pod was active on the node longer than the specified deadline".to_owned();
            self.shared
                .recorder
                .normal(&self.pod, None, "DeadlineExceeded", message.clone());
            self.state.failed = Some(("DeadlineExceeded".into(), message));
            return Instant::now();
        }
        let mut wake = self.deadline.unwrap_or(far);
        if self.shim.is_none() {
            if let Some(at) = self.sandbox_retry.0.filter(|at| *at > Instant::now()) {
                return wake.min(at);
            }
            if let Err((reason, message)) = self.set_up_sandbox().await {
                self.shared.recorder.warning(&self.pod, None, reason, message);
                self.release_sandbox();
                let pause = self.sandbox_retry.1;
                let at = Instant::now() + pause;
                self.sandbox_retry = (Some(at), (pause * 2).min(MAX_RETRY));
                return wake.min(at);
            }
            self.sandbox_retry = (None, FIRST_RETRY);
        }
        wake = wake.min(self.refresh_volumes().await);
        wake = wake.min(self.kill_overdue().await);
        for index in 0..self.state.containers.len() {
            if matches!(self.state.containers[index].phase, Phase::Waiting { .. }) {
                let due = self.run[index].start_at.unwrap_or_else(Instant::now);
                if due <= Instant::now() {
                    self.start_container(index).await;
                } else {
                    wake = wake.min(due);
                }
                if let Some(at) = self.run[index].start_at.filter(|at| *at > Instant::now()) {
                    wake = wake.min(at);
                }
            }
            let container = &self.state.containers[index];
            let blocks = match container.role {
                Role::Init => !container.succeeded(),
                Role::Sidecar => !container.started,
                // Only a post-start hook holds the next containers back.
                Role::Main => self.run[index].hook.is_some(),
            };
            if blocks {
                break;
            }
        }
        wake
    }

    async fn refresh_volumes(&mut self) -> Instant {
        if self.refresh_at <= Instant::now() {
            let facts = self.facts();
            let pod = Arc::clone(&self.pod);
            if let Err(error) = self.volumes.refresh(&self.shared.config.client, &pod, &facts).await {
                self.shared
                    .recorder
                    .warning(&self.pod, None, "FailedMount", error.to_string());
            }
            self.refresh_at = Instant::now() + REFRESH;
        }
        self.refresh_at
    }

    async fn kill_overdue(&mut self) -> Instant {
        let mut wake = Instant::now() + Duration::from_secs(3600);
        for index in 0..self.run.len() {
            let Some(at) = self.run[index].kill_at else { continue };
            if at > Instant::now() {
                wake = wake.min(at);
                continue;
            }
            self.run[index].kill_at = None;
            if let (Some(shim), Some(id)) = (&self.shim, self.state.containers[index].running_id()) {
                let _ = shim.signal(id, 9, true).await;
            }
        }
        wake
    }

    /// Address, volumes, shim, network.
    async fn set_up_sandbox(&mut self) -> Result<(), (&'static str, String)> {
        let sandbox = |error: String| {
            (
                "FailedCreatePodSandBox",
                format!("Failed to create pod sandbox: {error}"),
            )
        };
        std::fs::create_dir_all(&self.dir).map_err(|e| sandbox(format!("{}: {e}", self.dir.display())))?;
        let address = {
            let mut pool = self.shared.addresses.lock().unwrap_or_else(PoisonError::into_inner);
            pool.assign(&self.uid, &self.dir).map_err(|e| sandbox(e.to_string()))?
        };
        self.state.address = Some(address);
        let facts = self.facts();
        let pod = Arc::clone(&self.pod);
        self.volumes
            .set_up(&self.shared.config.client, &pod, &facts)
            .await
            .map_err(|error| ("FailedMount", error.to_string()))?;
        self.refresh_at = Instant::now() + REFRESH;
        let spec = self.pod.spec.clone().unwrap_or_default();
        let hostname = spec::hostname(&self.pod, &spec);
        let program = &self.shared.config.shim_program;
        let (shim, events) = Shim::start(program, &hostname, &self.dir.join("shim.log"))
            .await
            .map_err(|e| sandbox(e.to_string()))?;
        let pid = shim.pid();
        tokio::task::spawn_blocking(move || podnet::attach(address, pid))
            .await
            .map_err(|e| sandbox(e.to_string()))?
            .map_err(|e| sandbox(e.to_string()))?;
        shim.network(address).await.map_err(|e| sandbox(e.to_string()))?;
        *self.handle.shim.lock().unwrap_or_else(PoisonError::into_inner) = Some(shim.clone());
        self.shim = Some(shim);
        self.shim_events = Some(events);
        Ok(())
    }

    /// Tries again later, with the reason shown.
    fn hold(&mut self, index: usize, reason: &str, message: &str) {
        let runtime = &mut self.run[index];
        let pause = runtime.retry.unwrap_or(FIRST_RETRY);
        runtime.retry = Some((pause * 2).min(MAX_RETRY));
        runtime.start_at = Some(Instant::now() + pause);
        self.state.containers[index].phase = waiting(reason, message);
    }

    async fn start_container(&mut self, index: usize) {
        let Some(shim) = self.shim.clone() else { return };
        let container = self.state.containers[index].spec.clone();
        let name = container.name.as_str();
        let id = format!("{:032x}{:032x}", rand::random::<u128>(), rand::random::<u128>());
        let restarts = self.state.containers[index].restarts + i32::from(self.run[index].restarting);
        let log = self.log_path(name, restarts);
        let previous = Some(self.log_path(name, restarts - 1)).filter(|path| path.exists());
        // Two generations are kept, as a kubelet does.
        for suffix in ["log", "log.1"] {
            let _ = std::fs::remove_file(self.log_path(name, restarts - 2).with_extension(suffix));
        }
        let facts = self.facts();
        let request = spec::Request {
            pod: &self.pod,
            container: &container,
            facts: &facts,
            cluster: &self.shared.cluster,
            images: &self.shared.images,
            volumes: &self.volumes,
            pod_dir: &self.dir,
            id: &id,
            log: log.clone(),
        };
        let image_name = container.image.clone().unwrap_or_default();
        let (container_spec, image) = match spec::build(&self.shared.config.client, &request).await {
            Ok(built) => built,
            Err(spec::SpecError::Image(error)) => {
                let reason = if self.run[index].retry.is_none() {
                    "ErrImagePull"
                } else {
                    "ImagePullBackOff"
                };
                let text = format!("Failed to pull image {image_name:?}: {error}");
                self.shared.recorder.warning(&self.pod, Some(name), "Failed", text);
                self.hold(index, reason, &error.to_string());
                return;
            }
            Err(spec::SpecError::Config(message)) => {
                self.shared
                    .recorder
                    .warning(&self.pod, Some(name), "Failed", format!("Error: {message}"));
                self.hold(index, "CreateContainerConfigError", &message);
                return;
            }
        };
        let pulled = format!(
            "Container image {image_name:?} already present on machine: {}",
            image.described
        );
        self.shared.recorder.normal(&self.pod, Some(name), "Pulled", pulled);
        self.shared
            .recorder
            .normal(&self.pod, Some(name), "Created", format!("Created container: {name}"));
        let (stdin, mut input) = match stdin_pipe(&container) {
            Ok(pair) => pair,
            Err(error) => {
                self.hold(index, "CreateContainerError", &format!("making a pipe: {error}"));
                return;
            }
        };
        self.run[index].retry = None;
        self.run[index].start_at = None;
        let result = shim.start_container(container_spec, stdin).await;
        self.state.containers[index].restarts = restarts;
        self.run[index].restarting = false;
        self.run[index].started_at = Some(Instant::now());
        self.state.containers[index].last_id = Some(id.clone());
        match result {
            Ok(terminal) => {
                input = terminal.or(input);
                let live = Live {
                    id: id.clone(),
                    running: true,
                    log,
                    previous,
                    input: input.map(Arc::new),
                    tty: container.tty == Some(true),
                    stdin_once: container.stdin_once == Some(true),
                };
                self.handle
                    .containers
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(name.to_owned(), live);
                self.handle.changed.notify_waiters();
                self.shared
                    .recorder
                    .normal(&self.pod, Some(name), "Started", format!("Started container {name}"));
                self.state.containers[index].phase = Phase::Running {
                    id,
                    started: events::now(),
                };
                self.begin_hook(index);
            }
            Err(ShimError::Refused(error)) => {
                self.shared.recorder.warning(
                    &self.pod,
                    Some(name),
                    "Failed",
                    format!("Error: failed to start container {name:?}: {error}"),
                );
                let ended = Ended {
                    id,
                    exit_code: 128,
                    signal: None,
                    reason: "StartError".into(),
                    message: format!("failed to start container: {error}"),
                    started: events::now(),
                    finished: events::now(),
                };
                let role = self.state.containers[index].role;
                if self.policy == "Never" && role != Role::Sidecar {
                    self.state.containers[index].phase = Phase::Terminated(ended);
                } else {
                    self.schedule_restart(index, ended);
                }
            }
            // The shim's end is reported on its own; the container waits for the next sandbox.
            Err(error) => self.hold(index, "CreateContainerError", &error.to_string()),
        }
    }

    fn begin_hook(&mut self, index: usize) {
        let hook = self.state.containers[index]
            .spec
            .lifecycle
            .as_ref()
            .and_then(|l| l.post_start.clone());
        match (hook, self.target(index)) {
            (Some(hook), Some(target)) => {
                let sender = self.hooks.0.clone();
                let task = tokio::spawn(async move {
                    let result = hooks::run(&target, &hook).await;
                    let _ = sender.send((target.id.clone(), result));
                });
                self.run[index].hook = Some(task.abort_handle());
            }
            _ => self.begin_probes(index),
        }
    }

    /// The startup probe alone, or where there is none the others.
    pub(super) fn begin_probes(&mut self, index: usize) {
        match self.state.containers[index].spec.startup_probe.clone() {
            Some(probe) => self.spawn_probe(index, ProbeKind::Startup, probe),
            None => self.set_started(index),
        }
    }

    pub(super) fn set_started(&mut self, index: usize) {
        let container = &mut self.state.containers[index];
        container.started = true;
        container.ready = container.role != Role::Init && container.spec.readiness_probe.is_none();
        let (readiness, liveness) = (
            container.spec.readiness_probe.clone(),
            container.spec.liveness_probe.clone(),
        );
        if let Some(probe) = readiness {
            self.spawn_probe(index, ProbeKind::Readiness, probe);
        }
        if let Some(probe) = liveness {
            self.spawn_probe(index, ProbeKind::Liveness, probe);
        }
    }

    fn spawn_probe(&mut self, index: usize, kind: ProbeKind, probe: k8s_openapi::api::core::v1::Probe) {
        if let Some(target) = self.target(index) {
            let task = tokio::spawn(probes::run(target, kind, probe, self.reports.0.clone()));
            self.run[index].probes.push(task.abort_handle());
        }
    }
}

/// Both ends of the standard input of a container that wants one; a terminal brings its own.
fn stdin_pipe(
    container: &k8s_openapi::api::core::v1::Container,
) -> Result<(Option<OwnedFd>, Option<OwnedFd>), rustix::io::Errno> {
    if container.stdin != Some(true) || container.tty == Some(true) {
        return Ok((None, None));
    }
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((Some(read), Some(write)))
}
