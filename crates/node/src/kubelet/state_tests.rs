//! Restart policies, conditions and phases.

use super::*;

const NOW: &str = "2026-01-01T00:00:00Z";

fn pod(value: Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"}, "spec": value})).expect("pod")
}

fn ended(code: i32) -> Phase {
    Phase::Terminated(Ended {
        id: "x".into(),
        exit_code: code,
        signal: None,
        reason: if code == 0 { "Completed" } else { "Error" }.into(),
        message: String::new(),
        started: NOW.into(),
        finished: NOW.into(),
    })
}

fn running() -> Phase {
    Phase::Running {
        id: "y".into(),
        started: NOW.into(),
    }
}

fn condition(status: &Value, kind: &str) -> Value {
    status["conditions"]
        .as_array()
        .expect("conditions")
        .iter()
        .find(|c| c["type"] == kind)
        .expect("condition")
        .clone()
}

#[test]
fn a_pod_is_pending_until_its_init_containers_are_done_and_ready_when_all_containers_are() {
    let pod = pod(json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"}, {"name": "b"}]}));
    let mut state = PodState::new(&pod, NOW);
    let status = state.status(&pod, "Always", "10.244.0.1", NOW);
    assert_eq!(status["phase"], "Pending");
    assert_eq!(
        status["containerStatuses"][0]["state"]["waiting"]["reason"],
        "PodInitializing"
    );
    assert_eq!(
        condition(&status, "Initialized")["message"],
        "containers with incomplete status: [i]"
    );
    state.containers[0].phase = ended(0);
    state.containers[1].phase = running();
    state.containers[1].ready = true;
    state.containers[2].phase = running();
    let status = state.status(&pod, "Always", "10.244.0.1", NOW);
    assert_eq!(status["phase"], "Running");
    assert_eq!(
        condition(&status, "Ready")["message"],
        "containers with unready status: [b]"
    );
    state.containers[2].ready = true;
    assert_eq!(
        condition(&state.status(&pod, "Always", "h", NOW), "Ready")["status"],
        "True"
    );
    state.terminating = true;
    assert_eq!(
        condition(&state.status(&pod, "Always", "h", NOW), "Ready")["status"],
        "False"
    );
}

#[test]
fn the_restart_policy_decides_when_a_pod_is_over() {
    let pod = pod(json!({"containers": [{"name": "a"}, {"name": "b"}]}));
    let mut state = PodState::new(&pod, NOW);
    state.containers[0].phase = ended(0);
    state.containers[1].phase = ended(3);
    assert_eq!(state.phase("Never"), "Failed");
    assert_eq!(state.phase("OnFailure"), "Running");
    assert_eq!(state.phase("Always"), "Running");
    state.containers[1].phase = ended(0);
    assert_eq!(state.phase("Never"), "Succeeded");
    assert_eq!(state.phase("OnFailure"), "Succeeded");
    assert_eq!(state.phase("Always"), "Running");
}

#[test]
fn a_failed_init_container_fails_the_pod_only_under_never() {
    let pod = pod(json!({"initContainers": [{"name": "i"}], "containers": [{"name": "a"}]}));
    let mut state = PodState::new(&pod, NOW);
    state.containers[0].phase = ended(1);
    assert_eq!(state.phase("Never"), "Failed");
    assert_eq!(state.phase("Always"), "Pending");
}

#[test]
fn transition_times_stay_while_a_condition_stays_and_foreign_conditions_are_kept() {
    let mut object = pod(json!({"containers": [{"name": "a"}], "readinessGates": [{"conditionType": "x.io/gate"}]}));
    let mut state = PodState::new(&object, NOW);
    state.containers[0].phase = running();
    state.containers[0].ready = true;
    let mut first = state.status(&object, "Always", "h", NOW);
    assert_eq!(condition(&first, "Ready")["reason"], "ReadinessGatesNotReady");
    first["conditions"]
        .as_array_mut()
        .expect("list")
        .push(json!({"type": "x.io/gate", "status": "True"}));
    object.status = serde_json::from_value(first).expect("status");
    let second = state.status(&object, "Always", "h", "2026-02-02T00:00:00Z");
    assert_eq!(condition(&second, "ContainersReady")["lastTransitionTime"], NOW);
    assert_eq!(
        condition(&second, "Ready")["lastTransitionTime"],
        "2026-02-02T00:00:00Z"
    );
    assert_eq!(condition(&second, "x.io/gate")["status"], "True");
}

#[test]
fn a_sidecar_that_ends_after_the_containers_does_not_take_the_result_back() {
    let pod = pod(json!({"initContainers": [{"name": "s", "restartPolicy": "Always"}], "containers": [{"name": "a"}]}));
    let mut state = PodState::new(&pod, NOW);
    assert_eq!(state.phase("Never"), "Pending");
    state.containers[0].phase = running();
    state.containers[0].started = true;
    state.containers[1].phase = ended(0);
    assert_eq!(state.phase("Never"), "Succeeded");
    state.containers[0].phase = ended(143);
    state.containers[0].started = false;
    assert_eq!(state.phase("Never"), "Succeeded");
    assert_eq!(
        condition(&state.status(&pod, "Never", "h", NOW), "Initialized")["status"],
        "True"
    );
}
