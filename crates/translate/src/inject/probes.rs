//! Probes of the app go through the agent (S5.43), since the kubelet cannot speak mutual TLS; metrics are merged there as well (S5.31).

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::PROXY_CONTAINER;

const PROBES: [(&str, &str); 3] = [
    ("livenessProbe", "livez"),
    ("readinessProbe", "readyz"),
    ("startupProbe", "startupz"),
];
const HOOKS: [(&str, &str); 2] = [("preStop", "prestopz"), ("postStart", "poststartz")];

/// Rewrites probes and lifecycle hooks of all app containers to HTTP on the agent's port; returns the originals by path, as
/// `ISTIO_KUBE_APP_PROBERS` has them.
pub(super) fn rewrite(pod: &mut Value, status_port: u16) -> Map<String, Value> {
    let mut originals = Map::new();
    for list in ["containers", "initContainers"] {
        let containers = pod.pointer_mut(&format!("/spec/{list}")).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            // Init containers have probes only where they are sidecars.
            if list == "initContainers" && container.get("restartPolicy").and_then(Value::as_str) != Some("Always") {
                continue;
            }
            let Some(name) = container.get("name").and_then(Value::as_str).map(str::to_string) else {
                continue;
            };
            if name == PROXY_CONTAINER {
                continue;
            }
            let ports = container.get("ports").cloned().unwrap_or_default();
            for (field, path) in PROBES {
                let Some(probe) = container.get_mut(field) else {
                    continue;
                };
                let timeout = probe.get("timeoutSeconds").cloned();
                if let Some(mut original) = handler(probe, &ports, &format!("/app-health/{name}/{path}"), status_port) {
                    if let Some(timeout) = timeout {
                        original.insert("timeoutSeconds".into(), timeout);
                    }
                    originals.insert(format!("/app-health/{name}/{path}"), Value::Object(original));
                }
            }
            for (field, path) in HOOKS {
                let Some(hook) = container.pointer_mut(&format!("/lifecycle/{field}")) else {
                    continue;
                };
                let to = format!("/app-lifecycle/{name}/{path}");
                if let Some(original) = handler(hook, &ports, &to, status_port) {
                    originals.insert(to, Value::Object(original));
                }
            }
        }
    }
    originals
}

/// Rewrites one handler; `None` if it is none that needs it (exec, already rewritten, or a port name that does not exist).
fn handler(probe: &mut Value, ports: &Value, path: &str, status_port: u16) -> Option<Map<String, Value>> {
    let map = probe.as_object_mut()?;
    let kind = ["httpGet", "tcpSocket", "grpc"]
        .into_iter()
        .find(|kind| map.get(*kind).is_some_and(Value::is_object))?;
    let mut original = map.get(kind)?.clone();
    let port = original.get("port")?;
    let number = port_number(port, ports)?;
    let rewritten = original
        .get("path")
        .and_then(Value::as_str)
        .is_some_and(|p| p.starts_with("/app-health/") || p.starts_with("/app-lifecycle/"));
    if number == u64::from(status_port) && rewritten {
        return None;
    }
    original["port"] = json!(number);
    map.shift_remove(kind);
    map.insert("httpGet".into(), json!({ "path": path, "port": status_port }));
    Some(Map::from_iter([(kind.to_string(), original)]))
}

fn port_number(port: &Value, ports: &Value) -> Option<u64> {
    if let Some(number) = port.as_u64() {
        return Some(number);
    }
    let name = port.as_str()?;
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    ports
        .as_array()?
        .iter()
        .find(|p| p.get("name").and_then(Value::as_str) == Some(name))
        .and_then(|p| p.get("containerPort"))
        .and_then(Value::as_u64)
}

/// Puts the original handlers back.
pub(super) fn restore(pod: &mut Value, originals: &Map<String, Value>) {
    for list in ["containers", "initContainers"] {
        let containers = pod.pointer_mut(&format!("/spec/{list}")).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            let Some(name) = container.get("name").and_then(Value::as_str).map(str::to_string) else {
                continue;
            };
            let places = PROBES
                .iter()
                .map(|(field, path)| (format!("/{field}"), format!("/app-health/{name}/{path}")))
                .chain(
                    HOOKS
                        .iter()
                        .map(|(field, path)| (format!("/lifecycle/{field}"), format!("/app-lifecycle/{name}/{path}"))),
                );
            for (pointer, key) in places {
                let (Some(original), Some(Value::Object(now))) = (originals.get(&key), container.pointer_mut(&pointer))
                else {
                    continue;
                };
                now.shift_remove("httpGet");
                for kind in ["httpGet", "tcpSocket", "grpc"] {
                    if let Some(handler) = original.get(kind) {
                        now.insert(kind.into(), handler.clone());
                    }
                }
            }
        }
    }
}

/// The pod's own scrape settings, as `ISTIO_PROMETHEUS_ANNOTATIONS` has them; `None` if it has none.
pub(super) fn prometheus(annotations: &BTreeMap<String, String>, status_port: u16) -> Option<String> {
    let get = |key: &str| {
        annotations
            .get(&format!("prometheus.io/{key}"))
            .cloned()
            .unwrap_or_default()
    };
    let (scrape, path, port) = (get("scrape"), get("path"), get("port"));
    if (scrape.is_empty() && path.is_empty() && port.is_empty()) || port == status_port.to_string() {
        return None;
    }
    Some(json!({ "scrape": scrape, "path": path, "port": port }).to_string())
}
