//! Undoing an earlier injection (S5.14), so that a second one (reinvocation, an already injected manifest) starts from the user's pod.

use serde_json::{Value, json};

use super::{OVERRIDES_ANNOTATION, PROXY_CONTAINER, STATUS_ANNOTATION, string_map};

/// Takes out what the status annotation lists, restores overrides, probes and scrape annotations.
pub(super) fn strip(pod: &mut Value) {
    let annotations = string_map(pod, "/metadata/annotations");
    let Some(status) = annotations.get(STATUS_ANNOTATION) else {
        return;
    };
    let status: Value = serde_json::from_str(status).unwrap_or_default();
    let proxy_env = proxy_env(pod);
    for list in ["initContainers", "containers", "volumes", "imagePullSecrets"] {
        let names: Vec<&str> = status
            .get(list)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        if let Some(items) = pod.pointer_mut(&format!("/spec/{list}")).and_then(Value::as_array_mut) {
            items.retain(|item| {
                !item
                    .get("name")
                    .and_then(Value::as_str)
                    .is_some_and(|name| names.contains(&name))
            });
        }
    }
    if let Some(Ok(overrides)) = annotations
        .get(OVERRIDES_ANNOTATION)
        .map(|text| serde_json::from_str::<Value>(text))
    {
        for list in ["containers", "initContainers"] {
            for container in overrides.get(list).and_then(Value::as_array).into_iter().flatten() {
                if !pod["spec"][list].is_array() {
                    pod["spec"][list] = json!([]);
                }
                if let Some(items) = pod["spec"][list].as_array_mut() {
                    items.push(container.clone());
                }
            }
        }
    }
    let probers = proxy_env.iter().find(|(name, _)| name == "ISTIO_KUBE_APP_PROBERS");
    if let Some(Ok(Value::Object(probers))) = probers.map(|(_, text)| serde_json::from_str(text)) {
        super::probes::restore(pod, &probers);
    }
    let scrape: Option<Value> = proxy_env
        .iter()
        .find(|(name, _)| name == "ISTIO_PROMETHEUS_ANNOTATIONS")
        .and_then(|(_, text)| serde_json::from_str(text).ok());
    if let Some(map) = pod.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        map.shift_remove(STATUS_ANNOTATION);
        map.shift_remove(OVERRIDES_ANNOTATION);
        if annotations.get("prometheus.io/path").map(String::as_str) == Some("/stats/prometheus") {
            for key in ["scrape", "port", "path"] {
                map.shift_remove(&format!("prometheus.io/{key}"));
                let own = scrape
                    .as_ref()
                    .and_then(|s| s.get(key))
                    .and_then(Value::as_str)
                    .filter(|v| !v.is_empty());
                if let Some(own) = own {
                    map.insert(format!("prometheus.io/{key}"), json!(own));
                }
            }
        }
    }
}

/// Literal environment of the injected proxy.
fn proxy_env(pod: &Value) -> Vec<(String, String)> {
    ["containers", "initContainers"]
        .iter()
        .filter_map(|list| pod.pointer(&format!("/spec/{list}")).and_then(Value::as_array))
        .flatten()
        .filter(|c| c["name"] == PROXY_CONTAINER)
        .filter_map(|c| c.get("env").and_then(Value::as_array))
        .flatten()
        .filter_map(|e| {
            Some((
                e.get("name")?.as_str()?.to_string(),
                e.get("value")?.as_str()?.to_string(),
            ))
        })
        .collect()
}
