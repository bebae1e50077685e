//! One pod's life on the node: sandbox, init containers, containers, restarts, probes, status, end.
//!
//! One task per pod owns all of its state; shim events, probe reports, hook results and changes of the object arrive as
//! messages. Nothing else writes the pod's status.

mod resume;
mod start;
mod stop;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::api::{Api, Patch, PatchParams};
use mantlet_net::process::Exit;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::fields::PodFacts;
use super::state::{Ended, Phase, PodState, Role};
use super::{Input, PodHandle, Shared, events};
use crate::probes::{ProbeKind, Report, Target};
use crate::sandbox::NODE_ADDRESS;
use crate::shim::client::{Event, Shim};
use crate::volumes::Volumes;
use resume::{last_words, take_over};

/// First pause before a container that failed twice is started again; doubles up to the maximum.
const FIRST_BACKOFF: Duration = Duration::from_secs(10);
const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// A container that ran this long is forgiven its earlier failures.
const BACKOFF_RESET: Duration = Duration::from_secs(600);
/// Pause before another try at volumes, configuration or the sandbox; doubles up to the maximum.
const FIRST_RETRY: Duration = Duration::from_millis(250);
const MAX_RETRY: Duration = Duration::from_secs(5);
/// How often volumes are compared with the API.
const REFRESH: Duration = Duration::from_secs(10);

/// The running side of one container.
#[derive(Debug, Default)]
struct Runtime {
    /// Probe loops of the running instance.
    probes: Vec<AbortHandle>,
    /// The post-start hook is running; later containers wait for it.
    hook: Option<AbortHandle>,
    /// Not before.
    start_at: Option<Instant>,
    /// Length of the next pause after a failure; `None` for no pause yet.
    backoff: Option<Duration>,
    /// Pause of the next try after an error before the start.
    retry: Option<Duration>,
    started_at: Option<Instant>,
    /// SIGKILL then, after a failed probe.
    kill_at: Option<Instant>,
    /// The next start counts as a restart.
    restarting: bool,
}

impl Runtime {
    fn stop_watching(&mut self) {
        for task in self.probes.drain(..).chain(self.hook.take()) {
            task.abort();
        }
    }
}

/// With the worker its probes end, for they hold the pod's shim.
impl Drop for Runtime {
    fn drop(&mut self) {
        self.stop_watching();
    }
}

/// Result of a post-start hook: container id.
type HookResult = (String, Result<(), String>);

struct Worker {
    shared: Arc<Shared>,
    uid: String,
    pod: Arc<Pod>,
    input: watch::Receiver<Input>,
    dir: PathBuf,
    policy: String,
    state: PodState,
    run: Vec<Runtime>,
    handle: Arc<PodHandle>,
    volumes: Volumes,
    shim: Option<Shim>,
    shim_events: Option<mpsc::UnboundedReceiver<Event>>,
    reports: (mpsc::UnboundedSender<Report>, mpsc::UnboundedReceiver<Report>),
    hooks: (mpsc::UnboundedSender<HookResult>, mpsc::UnboundedReceiver<HookResult>),
    written: Option<Value>,
    conditions: Vec<PodCondition>,
    sandbox_retry: (Option<Instant>, Duration),
    refresh_at: Instant,
    write_again: Option<Instant>,
    /// `activeDeadlineSeconds`.
    deadline: Option<Instant>,
    /// A container has ended, and the status does not say so yet.
    ended: bool,
}

/// Runs one pod until its object is deleted.
pub(super) async fn run(shared: Arc<Shared>, uid: String, input: watch::Receiver<Input>) {
    let pod = Arc::clone(&input.borrow().pod);
    let mut worker = Worker::new(shared, uid, pod, input);
    worker.life().await;
    worker.forget();
}

/// Removes the directories of pods that do not exist any more.
pub(super) fn remove_leftovers(shared: &Shared, existing: &HashSet<String>) {
    for entry in std::fs::read_dir(shared.pods_dir()).into_iter().flatten().flatten() {
        let Ok(uid) = entry.file_name().into_string() else {
            continue;
        };
        if !existing.contains(&uid) {
            if let Err(error) = std::fs::remove_dir_all(entry.path()) {
                tracing::warn!(uid, %error, "the directory of a deleted pod could not be removed");
            }
            shared
                .addresses
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .release(&uid);
        }
    }
}

impl Worker {
    fn new(shared: Arc<Shared>, uid: String, pod: Arc<Pod>, input: watch::Receiver<Input>) -> Self {
        let spec = pod.spec.clone().unwrap_or_default();
        let policy = spec.restart_policy.clone().unwrap_or_else(|| "Always".into());
        let mut state = PodState::new(&pod, &events::now());
        let names = state.containers.iter().map(|c| c.spec.name.clone()).collect();
        let handle = Arc::new(PodHandle {
            uid: uid.clone(),
            names,
            ..PodHandle::default()
        });
        let key = (
            pod.metadata.namespace.clone().unwrap_or_default(),
            pod.metadata.name.clone().unwrap_or_default(),
        );
        shared
            .pods
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, Arc::clone(&handle));
        let dir = shared.pods_dir().join(&uid);
        let mut run: Vec<_> = state.containers.iter().map(|_| Runtime::default()).collect();
        take_over(&pod, &policy, &mut state, &mut run);
        let deadline = spec
            .active_deadline_seconds
            .map(|seconds| Instant::now() + Duration::from_secs(seconds.max(0).unsigned_abs()));
        let conditions = pod
            .status
            .as_ref()
            .and_then(|s| s.conditions.clone())
            .unwrap_or_default();
        let worker = Self {
            volumes: Volumes::new(&dir, &pod),
            uid,
            input,
            dir,
            policy,
            state,
            run,
            handle,
            shim: None,
            shim_events: None,
            reports: mpsc::unbounded_channel(),
            hooks: mpsc::unbounded_channel(),
            written: None,
            conditions,
            sandbox_retry: (None, FIRST_RETRY),
            refresh_at: Instant::now() + REFRESH,
            write_again: None,
            deadline,
            ended: false,
            pod,
            shared,
        };
        worker.publish_old_logs();
        worker
    }

    fn facts(&self) -> PodFacts {
        PodFacts {
            pod_ip: self.state.address.map(|a| a.to_string()).unwrap_or_default(),
            host_ip: NODE_ADDRESS.to_string(),
            cpus: self.shared.cpus,
            memory: self.shared.memory,
        }
    }

    fn log_path(&self, container: &str, restarts: i32) -> PathBuf {
        self.dir.join("logs").join(container).join(format!("{restarts}.log"))
    }

    /// Logs of an earlier run of the cluster stay readable.
    fn publish_old_logs(&self) {
        let mut containers = self.handle.containers.lock().unwrap_or_else(PoisonError::into_inner);
        for container in &self.state.containers {
            let name = &container.spec.name;
            let last = container.restarts;
            let (log, previous) = (self.log_path(name, last), self.log_path(name, last - 1));
            if log.exists() {
                let live = super::Live {
                    id: String::new(),
                    running: false,
                    log,
                    previous: previous.exists().then_some(previous),
                    input: None,
                    tty: container.spec.tty == Some(true),
                    stdin_once: false,
                };
                containers.insert(name.clone(), live);
            }
        }
    }

    fn over(&self) -> bool {
        matches!(self.state.phase(&self.policy), "Succeeded" | "Failed")
    }

    async fn life(&mut self) {
        loop {
            let deleted = self.pod.metadata.deletion_timestamp.is_some();
            if deleted || self.input.borrow().gone {
                self.terminate().await;
                return;
            }
            let mut wake = Instant::now() + Duration::from_secs(3600);
            if self.over() {
                if self.shim.is_some() {
                    self.write_status().await;
                    self.stop_everything(Duration::from_secs(30), false).await;
                    self.release_sandbox();
                }
            } else {
                wake = wake.min(self.step().await);
            }
            self.write_status().await;
            wake = self.write_again.map_or(wake, |at| wake.min(at));
            self.wait(wake).await;
            if std::mem::take(&mut self.ended) {
                // Services must lose the container before time goes into starting it again.
                self.write_status().await;
            }
        }
    }

    /// Waits for the next message or the time, and takes it in.
    async fn wait(&mut self, wake: Instant) {
        tokio::select! {
            changed = self.input.changed() => {
                if changed.is_err() {
                    // The agent itself is ending; the pods end with the process.
                    std::future::pending::<()>().await;
                }
                let input = self.input.borrow_and_update().clone();
                self.pod = input.pod;
            }
            Some(event) = next(&mut self.shim_events) => self.on_shim_event(event),
            Some(report) = self.reports.1.recv() => self.on_report(report).await,
            Some((id, result)) = self.hooks.1.recv() => self.on_hook(&id, result).await,
            () = tokio::time::sleep_until(wake) => {}
        }
    }

    fn index_of(&self, id: &str) -> Option<usize> {
        self.state.containers.iter().position(|c| c.running_id() == Some(id))
    }

    fn on_shim_event(&mut self, event: Event) {
        match event {
            Event::Exited { id, exit } => {
                if let Some(index) = self.index_of(&id) {
                    self.on_exit(index, exit);
                }
            }
            Event::Gone => {
                if !self.state.terminating {
                    let message = "Pod sandbox changed, it will be killed and re-created.";
                    self.shared.recorder.normal(&self.pod, None, "SandboxChanged", message);
                }
                self.release_sandbox();
                for index in 0..self.state.containers.len() {
                    if self.state.containers[index].running_id().is_some() {
                        self.on_exit(
                            index,
                            Exit {
                                code: 137,
                                signal: Some(9),
                            },
                        );
                    }
                }
                // Init containers have prepared the sandbox that is gone: they run again.
                if !self.over() && !self.state.terminating {
                    for container in self
                        .state
                        .containers
                        .iter_mut()
                        .filter(|c| c.role == Role::Init && c.succeeded())
                    {
                        container.phase = waiting("PodInitializing", "");
                    }
                }
            }
        }
    }

    fn on_exit(&mut self, index: usize, exit: Exit) {
        let restart_all = self.policy == "Always";
        let on_failure = self.policy != "Never";
        let ending = self.state.terminating || self.over();
        let runtime = &mut self.run[index];
        runtime.stop_watching();
        runtime.kill_at = None;
        let container = &mut self.state.containers[index];
        let Phase::Running { id, started } = container.phase.clone() else {
            return;
        };
        let message = last_words(&self.dir, &id, container, exit.code, &self.handle);
        // The mount point; what was mounted there is gone with the container.
        let _ = std::fs::remove_dir(self.dir.join("roots").join(&id));
        let ended = Ended {
            id,
            exit_code: exit.code,
            signal: exit.signal,
            reason: if exit.code == 0 { "Completed" } else { "Error" }.into(),
            message,
            started,
            finished: events::now(),
        };
        self.ended |= container.ready;
        container.ready = container.role == Role::Init && exit.code == 0;
        container.started = false;
        if let Some(live) = self
            .handle
            .containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_mut(&container.spec.name)
        {
            live.running = false;
            live.input = None;
        }
        self.handle.changed.notify_waiters();
        let again = !ending
            && match container.role {
                Role::Sidecar => true,
                Role::Init => exit.code != 0 && on_failure,
                Role::Main => restart_all || (on_failure && exit.code != 0),
            };
        if again {
            self.schedule_restart(index, ended);
        } else {
            self.state.containers[index].phase = Phase::Terminated(ended);
        }
    }

    /// Puts a container that has ended into its pause: none at first, then 10 s, doubling.
    fn schedule_restart(&mut self, index: usize, ended: Ended) {
        let runtime = &mut self.run[index];
        let container = &mut self.state.containers[index];
        let now = Instant::now();
        if runtime.started_at.is_some_and(|at| now - at > BACKOFF_RESET) {
            runtime.backoff = None;
        }
        runtime.restarting = true;
        let pause = runtime.backoff.unwrap_or_default();
        runtime.start_at = Some(now + pause);
        runtime.backoff = Some(if pause.is_zero() {
            FIRST_BACKOFF
        } else {
            (pause * 2).min(MAX_BACKOFF)
        });
        container.last = Some(ended.clone());
        if pause.is_zero() {
            // Shown only if the next start fails or takes long.
            container.phase = waiting("ContainerCreating", "");
            return;
        }
        let name = &container.spec.name;
        let pod = format!(
            "{}_{}({})",
            self.pod.metadata.name.as_deref().unwrap_or_default(),
            self.pod.metadata.namespace.as_deref().unwrap_or_default(),
            self.uid
        );
        let message = format!("back-off {} restarting failed container={name} pod={pod}", human(pause));
        container.phase = waiting("CrashLoopBackOff", &message);
        let text = format!("Back-off restarting failed container {name} in pod {pod}");
        self.shared.recorder.warning(&self.pod, Some(name), "BackOff", text);
    }

    async fn on_report(&mut self, report: Report) {
        match report {
            Report::Failed { id, kind, message } => {
                if let Some(index) = self.index_of(&id) {
                    let name = &self.state.containers[index].spec.name;
                    let text = format!("{} probe failed: {message}", kind.name());
                    self.shared.recorder.warning(&self.pod, Some(name), "Unhealthy", text);
                }
            }
            Report::Changed { id, kind, healthy } => {
                let Some(index) = self.index_of(&id) else { return };
                match (kind, healthy) {
                    (ProbeKind::Readiness, _) => self.state.containers[index].ready = healthy,
                    (ProbeKind::Startup, true) => self.set_started(index),
                    (ProbeKind::Liveness, true) => {}
                    (ProbeKind::Liveness | ProbeKind::Startup, false) => self.kill_unhealthy(index, kind).await,
                }
            }
        }
    }

    async fn kill_unhealthy(&mut self, index: usize, kind: ProbeKind) {
        let container = &self.state.containers[index];
        let name = container.spec.name.clone();
        let probe = match kind {
            ProbeKind::Startup => container.spec.startup_probe.as_ref(),
            _ => container.spec.liveness_probe.as_ref(),
        };
        let own = probe.and_then(|p| p.termination_grace_period_seconds);
        let grace = own
            .or(self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds))
            .unwrap_or(30);
        let text = format!(
            "Container {name} failed {} probe, will be restarted",
            kind.name().to_lowercase()
        );
        self.shared.recorder.normal(&self.pod, Some(&name), "Killing", text);
        self.run[index].stop_watching();
        self.run[index].kill_at = Some(Instant::now() + Duration::from_secs(grace.max(0).unsigned_abs()));
        self.state.containers[index].ready = false;
        if let (Some(shim), Some(id)) = (&self.shim, self.state.containers[index].running_id()) {
            // Refused when it has ended meanwhile, which is reported.
            let _ = shim.signal(id, 15, false).await;
        }
    }

    async fn on_hook(&mut self, id: &str, result: Result<(), String>) {
        let Some(index) = self.index_of(id) else { return };
        self.run[index].hook = None;
        match result {
            Ok(()) => self.begin_probes(index),
            Err(message) => {
                let name = self.state.containers[index].spec.name.clone();
                let text = format!("PostStartHook failed: {message}");
                self.shared
                    .recorder
                    .warning(&self.pod, Some(&name), "FailedPostStartHook", text);
                if let Some(shim) = &self.shim {
                    let _ = shim.signal(id, 9, true).await;
                }
            }
        }
    }

    /// Writes the status when it has changed.
    async fn write_status(&mut self) {
        let mut base = (*self.pod).clone();
        let foreign = base.status.take().and_then(|s| s.conditions).unwrap_or_default();
        let mut conditions = self.conditions.clone();
        conditions.retain(|own| OWN_CONDITIONS.contains(&own.type_.as_str()));
        conditions.extend(
            foreign
                .into_iter()
                .filter(|c| !OWN_CONDITIONS.contains(&c.type_.as_str())),
        );
        base.status.get_or_insert_default().conditions = Some(conditions);
        let status = self
            .state
            .status(&base, &self.policy, &NODE_ADDRESS.to_string(), &events::now());
        if self.written.as_ref() == Some(&status) {
            self.write_again = None;
            return;
        }
        let namespace = self.pod.metadata.namespace.as_deref().unwrap_or("default");
        let name = self.pod.metadata.name.as_deref().unwrap_or_default();
        let api: Api<Pod> = Api::namespaced(self.shared.config.client.clone(), namespace);
        let patch = json!({"metadata": {"uid": self.uid}, "status": status});
        match api
            .patch_status(name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
        {
            Ok(_) => {
                self.conditions = serde_json::from_value(status["conditions"].clone()).unwrap_or_default();
                self.written = Some(status);
                self.write_again = None;
            }
            Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409 | 422) => {
                // The pod is gone or another one has its name; the watch will say so.
                tracing::debug!(name, message = answer.message, "a pod's status was refused");
                self.write_again = Some(Instant::now() + MAX_RETRY);
            }
            Err(error) => {
                tracing::warn!(name, %error, "a pod's status could not be written; trying again");
                self.write_again = Some(Instant::now() + FIRST_RETRY);
            }
        }
    }

    /// Ends every process of the pod.
    fn release_sandbox(&mut self) {
        self.shim = None;
        self.shim_events = None;
        *self.handle.shim.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.handle.changed.notify_waiters();
    }

    /// Takes the pod out of the node's tables.
    fn forget(&mut self) {
        let key = (
            self.pod.metadata.namespace.clone().unwrap_or_default(),
            self.pod.metadata.name.clone().unwrap_or_default(),
        );
        let mut pods = self.shared.pods.write().unwrap_or_else(PoisonError::into_inner);
        if pods.get(&key).is_some_and(|handle| handle.uid == self.uid) {
            pods.remove(&key);
        }
    }

    fn target(&self, index: usize) -> Option<Target> {
        let container = &self.state.containers[index];
        Some(Target {
            id: container.running_id()?.to_owned(),
            container: container.spec.clone(),
            address: self.state.address?,
            shim: self.shim.clone()?,
        })
    }
}

const OWN_CONDITIONS: [&str; 5] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
];

async fn next(events: &mut Option<mpsc::UnboundedReceiver<Event>>) -> Option<Event> {
    match events {
        Some(events) => Some(events.recv().await.unwrap_or(Event::Gone)),
        None => std::future::pending().await,
    }
}

fn waiting(reason: &str, message: &str) -> Phase {
    Phase::Waiting {
        reason: reason.into(),
        message: message.into(),
    }
}

/// As Go writes durations: `10s`, `2m40s`.
fn human(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 {
        format!("{seconds}s")
    } else {
        format!("{}m{}s", seconds / 60, seconds % 60)
    }
}
