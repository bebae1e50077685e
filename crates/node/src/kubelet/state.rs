//! What the node knows about a pod's containers, and the pod status that follows from it. Pure.

use std::net::Ipv4Addr;

use k8s_openapi::api::core::v1::{Container, Pod};
use serde_json::{Value, json};

/// What a container is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Role {
    /// Runs to its end before the next.
    Init,
    /// An init container with `restartPolicy: Always`: stays beside the pod's containers.
    Sidecar,
    /// One of `spec.containers`.
    Main,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ended {
    pub(crate) id: String,
    pub(crate) exit_code: i32,
    pub(crate) signal: Option<i32>,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) started: String,
    pub(crate) finished: String,
}

/// Where a container is in its life.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Phase {
    Waiting { reason: String, message: String },
    Running { id: String, started: String },
    Terminated(Ended),
}

/// One container.
#[derive(Clone, Debug)]
pub(crate) struct ContainerState {
    pub(crate) spec: Container,
    pub(crate) role: Role,
    pub(crate) phase: Phase,
    pub(crate) last: Option<Ended>,
    pub(crate) restarts: i32,
    /// The startup probe (if any) has passed and the post-start hook is done.
    pub(crate) started: bool,
    pub(crate) ready: bool,
    /// The id of the latest instance.
    pub(crate) last_id: Option<String>,
}

impl ContainerState {
    pub(crate) fn running_id(&self) -> Option<&str> {
        match &self.phase {
            Phase::Running { id, .. } => Some(id),
            _ => None,
        }
    }

    pub(crate) fn succeeded(&self) -> bool {
        matches!(&self.phase, Phase::Terminated(ended) if ended.exit_code == 0)
    }

    fn status(&self) -> Value {
        let image = self.spec.image.clone().unwrap_or_default();
        let id = self.running_id().map(str::to_owned).or_else(|| self.last_id.clone());
        let state = match &self.phase {
            Phase::Waiting { reason, message } if message.is_empty() => json!({"waiting": {"reason": reason}}),
            Phase::Waiting { reason, message } => json!({"waiting": {"reason": reason, "message": message}}),
            Phase::Running { started, .. } => json!({"running": {"startedAt": started}}),
            Phase::Terminated(ended) => json!({"terminated": ended_json(ended)}),
        };
        let mut status = json!({
            "name": self.spec.name, "image": image, "imageID": format!("mantlet://{image}"),
            "ready": self.ready, "started": self.started, "restartCount": self.restarts, "state": state,
            "lastState": self.last.as_ref().map_or(json!({}), |ended| json!({"terminated": ended_json(ended)})),
        });
        if let Some(id) = id {
            status["containerID"] = json!(format!("mantlet://{id}"));
        }
        status
    }
}

fn ended_json(ended: &Ended) -> Value {
    let mut value = json!({
        "exitCode": ended.exit_code, "reason": ended.reason, "startedAt": ended.started, "finishedAt": ended.finished,
        "containerID": format!("mantlet://{}", ended.id),
    });
    if let Some(signal) = ended.signal {
        value["signal"] = json!(signal);
    }
    if !ended.message.is_empty() {
        value["message"] = json!(ended.message);
    }
    value
}

/// The pod as a whole.
#[derive(Clone, Debug)]
pub(crate) struct PodState {
    pub(crate) containers: Vec<ContainerState>,
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) start_time: String,
    /// Set once for a pod that will not run any more: reason and message.
    pub(crate) failed: Option<(String, String)>,
    pub(crate) terminating: bool,
}

impl PodState {
    pub(crate) fn new(pod: &Pod, now: &str) -> Self {
        let waiting = |reason: &str| Phase::Waiting {
            reason: reason.into(),
            message: String::new(),
        };
        let make = |spec: &Container, role, reason: &str| ContainerState {
            spec: spec.clone(),
            role,
            phase: waiting(reason),
            last: None,
            restarts: 0,
            started: false,
            ready: false,
            last_id: None,
        };
        let spec = pod.spec.clone().unwrap_or_default();
        let inits = spec.init_containers.unwrap_or_default();
        let main_reason = if inits.is_empty() {
            "ContainerCreating"
        } else {
            "PodInitializing"
        };
        let mut containers: Vec<_> = inits
            .iter()
            .map(|c| {
                let sidecar = c.restart_policy.as_deref() == Some("Always");
                make(c, if sidecar { Role::Sidecar } else { Role::Init }, "PodInitializing")
            })
            .collect();
        containers.extend(spec.containers.iter().map(|c| make(c, Role::Main, main_reason)));
        let start_time = pod
            .status
            .as_ref()
            .and_then(|s| s.start_time.as_ref())
            .and_then(|t| serde_json::to_value(t).ok())
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_else(|| now.to_owned());
        Self {
            containers,
            address: None,
            start_time,
            failed: None,
            terminating: false,
        }
    }

    pub(crate) fn main(&self) -> impl Iterator<Item = &ContainerState> {
        self.containers.iter().filter(|c| c.role == Role::Main)
    }

    /// Whether every init container has done its part. Once a container of the pod proper has begun, they have: a sidecar
    /// that ends later does not take that back.
    pub(crate) fn initialized(&self) -> bool {
        let begun = |c: &ContainerState| !matches!(c.phase, Phase::Waiting { .. }) || c.last.is_some();
        self.main().any(begun)
            || self.containers.iter().all(|c| match c.role {
                Role::Init => c.succeeded(),
                Role::Sidecar => c.started,
                Role::Main => true,
            })
    }

    /// All containers that count are ready.
    pub(crate) fn containers_ready(&self) -> bool {
        self.containers.iter().filter(|c| c.role != Role::Init).all(|c| c.ready)
    }

    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    pub(crate) fn phase(&self, policy: &str) -> &'static str {
        if self.failed.is_some() {
            return "Failed";
        }
        if policy == "Never"
            && self
                .containers
                .iter()
                .any(|c| c.role == Role::Init && matches!(&c.phase, Phase::Terminated(e) if e.exit_code != 0))
        {
            return "Failed";
        }
        if !self.initialized() {
            return "Pending";
        }
        let over = |c: &ContainerState| match &c.phase {
            Phase::Terminated(ended) => match policy {
                "Never" => true,
                "OnFailure" => ended.exit_code == 0,
                _ => false,
            },
            _ => false,
        };
        if self.main().all(over) {
            return if self.main().all(ContainerState::succeeded) {
                "Succeeded"
            } else {
                "Failed"
            };
        }
        let begun = |c: &ContainerState| !matches!(c.phase, Phase::Waiting { .. }) || c.last.is_some();
        if self.main().any(begun) { "Running" } else { "Pending" }
    }

    /// The object for `status`, keeping the transition times (and foreign conditions) of the old one.
    pub(crate) fn status(&self, pod: &Pod, policy: &str, host_ip: &str, now: &str) -> Value {
        let phase = self.phase(policy);
        let done = phase == "Succeeded";
        let ready = !done && !self.terminating && self.containers_ready() && phase == "Running";
        let gates = pod
            .spec
            .as_ref()
            .and_then(|s| s.readiness_gates.clone())
            .unwrap_or_default();
        let old = pod.status.clone().unwrap_or_default().conditions.unwrap_or_default();
        let gate_open = |kind: &str| old.iter().any(|c| c.type_ == kind && c.status == "True");
        let gates_open = gates.iter().all(|gate| gate_open(&gate.condition_type));
        let unready: Vec<_> = self
            .containers
            .iter()
            .filter(|c| c.role != Role::Init && !c.ready)
            .map(|c| c.spec.name.as_str())
            .collect();
        let (reason, message) = if done {
            ("PodCompleted", String::new())
        } else {
            (
                "ContainersNotReady",
                format!("containers with unready status: [{}]", unready.join(" ")),
            )
        };
        let incomplete: Vec<_> = self
            .containers
            .iter()
            .filter(|c| match c.role {
                Role::Init => !c.succeeded(),
                Role::Sidecar => !c.started,
                Role::Main => false,
            })
            .map(|c| c.spec.name.as_str())
            .collect();
        let mut wanted = [
            (
                "PodReadyToStartContainers",
                self.address.is_some() && !done,
                "",
                String::new(),
            ),
            (
                "Initialized",
                self.initialized(),
                if done {
                    "PodCompleted"
                } else {
                    "ContainersNotInitialized"
                },
                format!("containers with incomplete status: [{}]", incomplete.join(" ")),
            ),
            ("Ready", ready && gates_open, reason, message.clone()),
            ("ContainersReady", ready, reason, message),
            ("PodScheduled", true, "", String::new()),
        ];
        if ready && !gates_open {
            wanted[2].2 = "ReadinessGatesNotReady";
            wanted[2].3 = "corresponding condition of a pod readiness gate is not True".into();
        }
        let mut conditions: Vec<Value> = wanted
            .iter()
            .map(|(kind, on, reason, message)| {
                let status = if *on { "True" } else { "False" };
                let since = old
                    .iter()
                    .find(|c| c.type_ == *kind && c.status == status)
                    .and_then(|c| serde_json::to_value(&c.last_transition_time).ok())
                    .filter(|v| v.is_string())
                    .unwrap_or_else(|| json!(now));
                let mut condition =
                    json!({"type": kind, "status": status, "lastProbeTime": null, "lastTransitionTime": since});
                if !*on && !reason.is_empty() {
                    condition["reason"] = json!(reason);
                    condition["message"] = json!(message);
                }
                condition
            })
            .collect();
        conditions.extend(
            old.iter()
                .filter(|c| !wanted.iter().any(|(kind, ..)| c.type_ == *kind))
                .filter_map(|c| serde_json::to_value(c).ok()),
        );
        let of = |init: bool| -> Vec<Value> {
            self.containers
                .iter()
                .filter(|c| (c.role != Role::Main) == init)
                .map(ContainerState::status)
                .collect()
        };
        let mut status = json!({
            "phase": phase, "conditions": conditions, "hostIP": host_ip, "hostIPs": [{"ip": host_ip}],
            "startTime": self.start_time, "containerStatuses": of(false), "qosClass": qos_class(pod),
        });
        let inits = of(true);
        if !inits.is_empty() {
            status["initContainerStatuses"] = json!(inits);
        }
        if let Some(address) = self.address {
            status["podIP"] = json!(address.to_string());
            status["podIPs"] = json!([{"ip": address.to_string()}]);
        }
        if let Some((reason, message)) = &self.failed {
            status["reason"] = json!(reason);
            status["message"] = json!(message);
        }
        status
    }
}

/// Guaranteed when every container's limits equal its requests, best effort when there are none.
fn qos_class(pod: &Pod) -> &'static str {
    let spec = pod.spec.clone().unwrap_or_default();
    let all: Vec<_> = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .collect();
    let maps = |c: &Container| {
        let r = c.resources.clone().unwrap_or_default();
        let limits = r.limits.unwrap_or_default();
        let requests = r.requests.unwrap_or_else(|| limits.clone());
        (requests, limits)
    };
    if all.iter().all(|c| {
        let (requests, limits) = maps(c);
        requests.is_empty() && limits.is_empty()
    }) {
        return "BestEffort";
    }
    let guaranteed = all.iter().all(|c| {
        let (requests, limits) = maps(c);
        ["cpu", "memory"]
            .iter()
            .all(|name| limits.contains_key(*name) && limits.get(*name) == requests.get(*name))
    });
    if guaranteed { "Guaranteed" } else { "Burstable" }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
