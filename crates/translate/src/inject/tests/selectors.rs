//! The result table of SEMANTICS 5a against the very selectors that the installer writes into the webhook.

use serde_json::{Value, json};

use crate::inject::webhook::{self, WebhookOptions};

fn matches(selector: &Value, labels: &Value) -> bool {
    let has = |key: &str| labels.get(key).and_then(Value::as_str);
    let pairs = selector.get("matchLabels").and_then(Value::as_object);
    let expressions = selector.get("matchExpressions").and_then(Value::as_array);
    pairs.into_iter().flatten().all(|(k, v)| has(k) == v.as_str())
        && expressions.into_iter().flatten().all(|e| {
            let found = has(e["key"].as_str().unwrap());
            let within = || e["values"].as_array().unwrap().iter().any(|v| v.as_str() == found);
            match e["operator"].as_str().unwrap() {
                "In" => found.is_some() && within(),
                "NotIn" => found.is_none() || !within(),
                "Exists" => found.is_some(),
                "DoesNotExist" => found.is_none(),
                other => panic!("operator {other}"),
            }
        })
}

/// Revisions whose webhook is called, in alphabetical order.
fn called(namespace: &Value, pod: &Value, by_default: bool) -> Vec<String> {
    let mut namespace = namespace.clone();
    if namespace.get("kubernetes.io/metadata.name").is_none() {
        namespace["kubernetes.io/metadata.name"] = json!("some");
    }
    ["canary", "default"]
        .iter()
        .filter(|revision| {
            let options = WebhookOptions {
                revision: if **revision == "default" { "" } else { revision },
                namespace: "istio-system",
                is_default: **revision == "default",
                enable_namespaces_by_default: by_default,
                reinvocation_policy: "Never",
            };
            let object = webhook::mutating(&options);
            let count = object["webhooks"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|w| matches(&w["namespaceSelector"], &namespace) && matches(&w["objectSelector"], pod))
                .count();
            assert!(
                count <= 1,
                "{revision}: {count} entries match {namespace} {pod}, the pod would be injected twice"
            );
            count == 1
        })
        .map(|revision| (*revision).to_string())
        .collect()
}

#[test]
fn table() {
    const INJECTION: &str = "istio-injection";
    const REV: &str = "istio.io/rev";
    const INJECT: &str = "sidecar.istio.io/inject";
    let none = json!({});
    let rows: Vec<(Value, Value, &str)> = vec![
        (none.clone(), none.clone(), ""),
        (none.clone(), json!({INJECT: "true"}), "default"),
        (none.clone(), json!({REV: "canary"}), "canary"),
        (none.clone(), json!({INJECT: "true", REV: "canary"}), "canary"),
        (none.clone(), json!({INJECT: "false", REV: "canary"}), ""),
        (json!({INJECTION: "enabled"}), none.clone(), "default"),
        (json!({INJECTION: "enabled"}), json!({INJECT: "true"}), "default"),
        (json!({INJECTION: "enabled"}), json!({REV: "canary"}), "default"),
        (json!({INJECTION: "enabled"}), json!({INJECT: "false"}), ""),
        (
            json!({INJECTION: "enabled"}),
            json!({INJECT: "false", REV: "canary"}),
            "",
        ),
        (json!({INJECTION: "disabled"}), none.clone(), ""),
        (json!({INJECTION: "disabled"}), json!({INJECT: "true"}), ""),
        (json!({INJECTION: "disabled"}), json!({REV: "canary"}), ""),
        (json!({REV: "canary"}), none.clone(), "canary"),
        (json!({REV: "canary"}), json!({INJECT: "true"}), "canary"),
        (json!({REV: "canary"}), json!({INJECT: "false"}), ""),
        (json!({REV: "canary"}), json!({REV: "other"}), "canary"),
        (json!({REV: "canary", INJECTION: "enabled"}), none.clone(), "default"),
        (
            json!({REV: "canary", INJECTION: "enabled"}),
            json!({INJECT: "false"}),
            "",
        ),
        (
            json!({REV: "canary", INJECTION: "disabled"}),
            json!({INJECT: "true"}),
            "",
        ),
        (json!({REV: "default"}), none.clone(), "default"),
        (json!({REV: "default"}), json!({INJECT: "false"}), ""),
        (none.clone(), json!({REV: "default"}), "default"),
    ];
    for (namespace, pod, by) in rows {
        let expected: Vec<&str> = if by.is_empty() { vec![] } else { vec![by] };
        assert_eq!(
            called(&namespace, &pod, false),
            expected,
            "namespace {namespace}, pod {pod}"
        );
    }
}

#[test]
fn namespaces_by_default() {
    let none = json!({});
    assert_eq!(called(&none, &none, true), ["default"]);
    assert_eq!(
        called(&none, &json!({"sidecar.istio.io/inject": "true"}), true),
        ["default"]
    );
    assert!(called(&none, &json!({"sidecar.istio.io/inject": "false"}), true).is_empty());
    assert_eq!(called(&none, &json!({"istio.io/rev": "canary"}), true), ["canary"]);
    assert!(called(&json!({"istio-injection": "disabled"}), &none, true).is_empty());
    assert!(called(&json!({"kubernetes.io/metadata.name": "kube-system"}), &none, true).is_empty());
}
