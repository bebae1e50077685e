//! Field ownership and conflicts of server-side apply.

use serde_json::json;

use super::*;

fn deployment() -> Resource {
    crate::resources::builtin()
        .into_iter()
        .find(|r| r.kind == "Deployment")
        .unwrap()
}

fn intent(replicas: Option<i64>, image: &str) -> Value {
    let mut v = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x", "labels": {"app": "x"}},
        "spec": {"template": {"spec": {"containers": [{"name": "c", "image": image, "ports": [{"containerPort": 80}]}]}}}});
    if let Some(n) = replicas {
        v["spec"]["replicas"] = n.into();
    }
    v
}

#[test]
fn conflicts_name_field_and_owner() {
    let r = deployment();
    let live = apply(&r, None, &intent(Some(1), "a:1"), "alice", false, "").unwrap();
    let err = apply(&r, Some(&live), &intent(Some(2), "a:1"), "bob", false, "").unwrap_err();
    assert_eq!(
        err.message,
        "Apply failed with 1 conflict: conflict with \"alice\": .spec.replicas"
    );
    assert_eq!(err.code, 409);
    let err = apply(&r, Some(&live), &intent(None, "a:2"), "bob", false, "").unwrap_err();
    assert_eq!(
        err.message,
        "Apply failed with 1 conflict: conflict with \"alice\": .spec.template.spec.containers[name=\"c\"].image"
    );
    // The same value is shared, not fought over.
    let shared = apply(&r, Some(&live), &intent(Some(1), "a:1"), "bob", false, "").unwrap();
    assert_eq!(read(&shared).len(), 2);
    // Force takes the field away from its owner.
    let forced = apply(&r, Some(&live), &intent(Some(2), "a:1"), "bob", true, "").unwrap();
    assert_eq!(forced["spec"]["replicas"], 2);
    assert!(apply(&r, Some(&forced), &intent(Some(1), "a:1"), "alice", false, "").is_err());
}

#[test]
fn dropped_fields_go_unless_someone_else_owns_them() {
    let r = deployment();
    let live = apply(&r, None, &intent(Some(1), "a:1"), "alice", false, "").unwrap();
    let gone = apply(&r, Some(&live), &intent(None, "a:1"), "alice", false, "").unwrap();
    assert!(gone["spec"].get("replicas").is_none());
    let mut scaled = live.clone();
    scaled["spec"]["replicas"] = 5.into();
    track_update(&r, Some(&live), &mut scaled, "hpa", "");
    let kept = apply(&r, Some(&scaled), &intent(None, "a:1"), "alice", false, "").unwrap();
    assert_eq!(kept["spec"]["replicas"], 5);
    // A sidecar that a webhook added stays.
    let mut injected = live.clone();
    injected["spec"]["template"]["spec"]["containers"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "proxy"}));
    track_update(&r, Some(&live), &mut injected, "injector", "");
    let next = apply(&r, Some(&injected), &intent(Some(1), "a:2"), "alice", false, "").unwrap();
    assert_eq!(
        next["spec"]["template"]["spec"]["containers"].as_array().unwrap().len(),
        2
    );
}

#[test]
fn sets_survive_their_wire_form() {
    let r = deployment();
    let live = apply(&r, None, &intent(Some(1), "a:1"), "alice", false, "").unwrap();
    let v1 = &live["metadata"]["managedFields"][0]["fieldsV1"];
    assert_eq!(Set::from_v1(v1).to_v1(), *v1);
    assert!(v1["f:spec"]["f:template"]["f:spec"]["f:containers"]["k:{\"name\":\"c\"}"]["f:ports"]["k:{\"containerPort\":80,\"protocol\":\"TCP\"}"].is_object());
    let again = apply(&r, Some(&live), &intent(Some(1), "a:1"), "alice", false, "").unwrap();
    assert!(same(&again, &live));
}
