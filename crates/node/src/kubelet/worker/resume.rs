//! What is left of a container that has ended: its last words, and the status that an earlier run of the cluster wrote.

use std::sync::PoisonError;

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use serde_json::Value;

use super::super::state::{ContainerState, Ended, Phase, PodState, Role};
use super::super::{PodHandle, events, spec};
use super::Runtime;

/// Bytes of a container's last words.
const MAX_MESSAGE: usize = 4096;

/// What the container left in its termination message file; with `FallbackToLogsOnError`, the end of its log.
pub(super) fn last_words(
    dir: &std::path::Path,
    id: &str,
    container: &ContainerState,
    code: i32,
    handle: &PodHandle,
) -> String {
    let file = spec::termination_file(dir, id);
    let mut text = std::fs::read(&file).unwrap_or_default();
    let _ = std::fs::remove_file(&file);
    let fall_back = container.spec.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    if text.is_empty() && code != 0 && fall_back {
        let containers = handle.containers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(live) = containers.get(&container.spec.name) {
            text = crate::kubelet_http::logs::tail_text(&live.log, 80).into_bytes();
        }
    }
    let start = text.len().saturating_sub(MAX_MESSAGE);
    String::from_utf8_lossy(&text[start..]).into_owned()
}

/// Continues from the status that an earlier run of the cluster has left.
pub(super) fn take_over(pod: &Pod, policy: &str, state: &mut PodState, run: &mut [Runtime]) {
    let Some(status) = &pod.status else { return };
    let old = |name: &str| -> Option<&ContainerStatus> {
        let lists = [&status.container_statuses, &status.init_container_statuses];
        lists.into_iter().flatten().flatten().find(|c| c.name == name)
    };
    let main_begun = state.main().any(|c| {
        old(&c.spec.name)
            .and_then(|s| s.state.as_ref())
            .is_some_and(|s| s.running.is_some() || s.terminated.is_some())
    });
    let keep_all = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) || (policy == "Never" && main_begun);
    if status.phase.as_deref() == Some("Failed")
        && let Some(reason) = &status.reason
    {
        state.failed = Some((reason.clone(), status.message.clone().unwrap_or_default()));
    }
    for (container, runtime) in state.containers.iter_mut().zip(run) {
        let Some(before) = old(&container.spec.name) else {
            continue;
        };
        container.restarts = before.restart_count;
        let Some(id) = before
            .container_id
            .as_deref()
            .and_then(|id| id.strip_prefix("mantlet://"))
        else {
            continue;
        };
        container.last_id = Some(id.to_owned());
        let time = |value: Option<Value>| {
            value
                .and_then(|v| v.as_str().map(str::to_owned))
                .unwrap_or_else(events::now)
        };
        let terminated = before.state.as_ref().and_then(|s| s.terminated.as_ref());
        let ended = match terminated {
            Some(t) => Ended {
                id: id.to_owned(),
                exit_code: t.exit_code,
                signal: t.signal,
                reason: t.reason.clone().unwrap_or_default(),
                message: t.message.clone().unwrap_or_default(),
                started: time(serde_json::to_value(&t.started_at).ok()),
                finished: time(serde_json::to_value(&t.finished_at).ok()),
            },
            None => Ended {
                id: id.to_owned(),
                exit_code: if keep_all { 137 } else { 255 },
                signal: None,
                reason: if keep_all { "ContainerStatusUnknown" } else { "Unknown" }.into(),
                message: "The container could not be located when the pod was terminated".into(),
                started: events::now(),
                finished: events::now(),
            },
        };
        let done =
            terminated.is_some() && container.role == Role::Main && policy == "OnFailure" && ended.exit_code == 0;
        if keep_all || done {
            container.ready = container.role == Role::Init && ended.exit_code == 0;
            container.phase = Phase::Terminated(ended);
        } else {
            container.last = Some(ended);
            runtime.restarting = true;
        }
    }
}
