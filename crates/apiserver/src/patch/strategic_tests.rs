//! Strategic merge patches: lists by key, directives, order.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn patched(current: Value, patch: Value) -> Value {
    apply("Deployment", &current, &patch).unwrap()
}

fn pod(containers: Value) -> Value {
    json!({"spec": {"template": {"spec": {"containers": containers}}}})
}

#[test]
fn containers_merge_by_name() {
    let current =
        pod(json!([{"name": "a", "image": "x:1", "env": [{"name": "K", "value": "1"}]}, {"name": "b", "image": "y"}]));
    let out = patched(
        current,
        pod(json!([{"name": "a", "image": "x:2", "env": [{"name": "L", "value": "2"}]}])),
    );
    assert_eq!(
        out,
        pod(
            json!([{"name": "a", "image": "x:2", "env": [{"name": "K", "value": "1"}, {"name": "L", "value": "2"}]}, {"name": "b", "image": "y"}])
        )
    );
}

#[test]
fn directives() {
    let current = pod(json!([{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]));
    let deleted = patched(current.clone(), pod(json!([{"name": "a", "$patch": "delete"}])));
    assert_eq!(deleted, pod(json!([{"name": "b", "image": "y"}])));
    let replaced = patched(
        current.clone(),
        pod(json!([{"name": "c", "image": "z"}, {"$patch": "replace"}])),
    );
    assert_eq!(replaced, pod(json!([{"name": "c", "image": "z"}])));
    let map = patched(
        json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
        json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
    );
    assert_eq!(map, json!({"spec": {"strategy": {"type": "Recreate"}}}));
    let gone = patched(
        json!({"metadata": {"labels": {"a": "1", "b": "2"}, "finalizers": ["x/a", "x/b"]}}),
        json!({"metadata": {"labels": {"a": null}, "$deleteFromPrimitiveList/finalizers": ["x/a"], "finalizers": ["x/c"]}}),
    );
    assert_eq!(gone["metadata"]["labels"], json!({"b": "2"}));
    assert_eq!(gone["metadata"]["finalizers"], json!(["x/b", "x/c"]));
    assert!(apply("Deployment", &current, &pod(json!([{"image": "no key"}]))).is_err());
    assert!(apply("Deployment", &current, &json!({"spec": {"$patch": "bogus"}})).is_err());
}

#[test]
fn element_order() {
    let current = pod(json!([{"name": "a"}, {"name": "server"}, {"name": "b"}]));
    let patch = json!({"spec": {"template": {"spec": {
        "$setElementOrder/containers": [{"name": "new"}, {"name": "b"}, {"name": "a"}],
        "containers": [{"name": "new", "image": "n"}]}}}});
    let out = patched(current.clone(), patch);
    let names: Vec<&str> = out["spec"]["template"]["spec"]["containers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["new", "server", "b", "a"]);
    let only_order =
        json!({"spec": {"template": {"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}}}});
    let out = patched(current, only_order);
    assert_eq!(
        out["spec"]["template"]["spec"]["containers"].as_array().unwrap().len(),
        3
    );
}

#[test]
fn service_ports_merge_by_port() {
    let current = json!({"spec": {"ports": [{"port": 80, "targetPort": 3000, "nodePort": 30001}]}});
    let out = apply(
        "Service",
        &current,
        &json!({"spec": {"ports": [{"port": 80, "targetPort": 3001}, {"port": 443}]}}),
    )
    .unwrap();
    assert_eq!(
        out,
        json!({"spec": {"ports": [{"port": 80, "targetPort": 3001, "nodePort": 30001}, {"port": 443}]}})
    );
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-z]{0,4}".prop_map(Value::from)
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop::collection::btree_map("[a-d]{1,2}", inner, 0..4).prop_map(|m| Value::Object(m.into_iter().collect()))
    })
}

fn containers() -> impl Strategy<Value = Vec<Value>> {
    prop::collection::btree_map("[a-f]", "[x-z]{1,2}", 0..5)
        .prop_map(|m| {
            m.into_iter()
                .map(|(n, i)| json!({"name": n, "image": i}))
                .collect::<Vec<_>>()
        })
        .prop_shuffle()
}

proptest! {
    #[test]
    fn without_lists_it_is_a_merge_patch(current in json_value(), patch in json_value()) {
        let wrap = |v: &Value| json!({"spec": v});
        let mut want = wrap(&current);
        json_patch::merge(&mut want, &wrap(&patch));
        prop_assert_eq!(patched(wrap(&current), wrap(&patch)), want);
    }

    #[test]
    fn applying_twice_changes_nothing(current in containers(), patch in containers()) {
        let once = patched(pod(json!(current)), pod(json!(patch)));
        prop_assert_eq!(patched(once.clone(), pod(json!(patch))), once);
    }

    #[test]
    fn the_order_is_obeyed_and_nothing_is_lost(current in containers(), order in containers()) {
        let names: Vec<Value> = order.iter().map(|c| json!({"name": c["name"]})).collect();
        let patch = json!({"spec": {"template": {"spec": {"$setElementOrder/containers": names, "containers": order}}}});
        let out = patched(pod(json!(current)), patch);
        let out: Vec<String> = out["spec"]["template"]["spec"]["containers"].as_array().unwrap().iter().map(|c| c["name"].to_string()).collect();
        let wanted: Vec<String> = order.iter().map(|c| c["name"].to_string()).collect();
        let seen: Vec<String> = out.iter().filter(|n| wanted.contains(n)).cloned().collect();
        prop_assert_eq!(seen, wanted.clone());
        for c in &current {
            prop_assert!(out.contains(&c["name"].to_string()));
        }
        prop_assert_eq!(out.len(), current.iter().map(|c| c["name"].to_string()).chain(wanted).collect::<std::collections::HashSet<_>>().len());
    }
}
