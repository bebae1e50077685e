//! Merging: user overrides of injected containers (S5.19) and plain JSON trees.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{INIT_CONTAINER, PROXY_CONTAINER};

/// Containers of the pod that bear the name of an injected one: they are overrides of it.
#[derive(Debug, Default)]
pub(super) struct Overrides {
    containers: Vec<Value>,
    init_containers: Vec<Value>,
}

impl Overrides {
    pub(super) fn is_empty(&self) -> bool {
        self.containers.is_empty() && self.init_containers.is_empty()
    }

    /// What goes into the annotation, so that a second injection finds the overrides again.
    pub(super) fn to_annotation(&self) -> Map<String, Value> {
        let mut map = Map::new();
        if !self.containers.is_empty() {
            map.insert("containers".into(), json!(self.containers));
        }
        if !self.init_containers.is_empty() {
            map.insert("initContainers".into(), json!(self.init_containers));
        }
        map
    }

    /// An injected container with the override of its name on top. An override may stand among either list (a native sidecar's stands
    /// among the init containers).
    pub(super) fn over(&self, added: &Value, init_first: bool) -> Value {
        let name = added.get("name");
        let (first, second) = if init_first {
            (&self.init_containers, &self.containers)
        } else {
            (&self.containers, &self.init_containers)
        };
        let Some(own) = first.iter().chain(second).find(|c| c.get("name") == name) else {
            return added.clone();
        };
        let mut merged = added.clone();
        container(&mut merged, own);
        merged
    }
}

/// Takes overrides out of the pod's lists.
pub(super) fn take_overrides(pod: &mut Value) -> Overrides {
    let mut overrides = Overrides::default();
    let mut take = |key: &str, into: &mut Vec<Value>| {
        if let Some(list) = pod.pointer_mut(&format!("/spec/{key}")).and_then(Value::as_array_mut) {
            list.retain(|c| {
                let ours = matches!(
                    c.get("name").and_then(Value::as_str),
                    Some(PROXY_CONTAINER | INIT_CONTAINER)
                );
                if ours {
                    into.push(c.clone());
                }
                !ours
            });
        }
    };
    take("containers", &mut overrides.containers);
    take("initContainers", &mut overrides.init_containers);
    overrides
}

/// Puts a user's container over an injected one as a strategic merge does: lists with a merge key by that key, other lists and values
/// replaced, objects merged. Image `auto` and an absent image keep the injected one.
fn container(base: &mut Value, own: &Value) {
    let (Some(base), Some(own)) = (base.as_object_mut(), own.as_object()) else {
        return;
    };
    for (key, value) in own {
        match key.as_str() {
            "image" if matches!(value.as_str(), Some("auto" | "")) => {}
            "env" => by_key(base, key, value, "name"),
            "volumeMounts" => by_key(base, key, value, "mountPath"),
            "ports" => by_key(base, key, value, "containerPort"),
            "securityContext" => match base.get_mut(key) {
                // Capabilities are replaced as a whole: adding to a list that drops ALL must be visible in one place.
                Some(context) => {
                    for (inner, value) in value.as_object().into_iter().flatten() {
                        context[inner.as_str()] = value.clone();
                    }
                }
                None => {
                    base.insert(key.clone(), value.clone());
                }
            },
            _ => match base.get_mut(key) {
                Some(existing) if existing.is_object() && value.is_object() => deep(existing, value),
                _ => {
                    base.insert(key.clone(), value.clone());
                }
            },
        }
    }
}

fn by_key(base: &mut Map<String, Value>, list: &str, own: &Value, key: &str) {
    let Some(own) = own.as_array() else { return };
    let entry = base.entry(list.to_string()).or_insert_with(|| json!([]));
    let Some(items) = entry.as_array_mut() else { return };
    for item in own {
        match items
            .iter_mut()
            .find(|i| i.get(key).is_some() && i.get(key) == item.get(key))
        {
            Some(existing) => *existing = item.clone(),
            None => items.push(item.clone()),
        }
    }
}

/// Merges objects recursively; everything else is replaced, `null` removes.
pub(super) fn deep(base: &mut Value, over: &Value) {
    let (Some(map), Some(over)) = (base.as_object_mut(), over.as_object()) else {
        *base = over.clone();
        return;
    };
    for (key, value) in over {
        if value.is_null() {
            map.shift_remove(key);
        } else {
            match map.get_mut(key) {
                Some(existing) if existing.is_object() && value.is_object() => deep(existing, value),
                _ => {
                    map.insert(key.clone(), value.clone());
                }
            }
        }
    }
}

/// Sets environment of the proxy's container, replacing what is there.
pub(super) fn set_env(pod: &mut Value, env: &BTreeMap<String, String>) {
    for list in ["containers", "initContainers"] {
        let containers = pod.pointer_mut(&format!("/spec/{list}")).and_then(Value::as_array_mut);
        for container in containers
            .into_iter()
            .flatten()
            .filter(|c| c["name"] == PROXY_CONTAINER)
        {
            let Some(map) = container.as_object_mut() else { continue };
            let entries: Vec<Value> = env.iter().map(|(k, v)| json!({ "name": k, "value": v })).collect();
            by_key(map, "env", &Value::Array(entries), "name");
        }
    }
}
