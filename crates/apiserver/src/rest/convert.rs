//! Between the form that is served and the form that is stored.
//!
//! The store's revision is the resource version, so it is not in the stored bytes; custom resources are stored under their
//! storage version; both event APIs share one form.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::error::{ApiError, ApiResult};
use crate::http::MAX_OBJECT;
use crate::meta;
use crate::resources::{Resource, join_gv};
use crate::store::Entry;

/// A stored document as `resource` serves it.
pub(crate) fn serve(resource: &Resource, mut object: Value, revision: u64) -> Value {
    if resource.group == "events.k8s.io" {
        object = event_to_new(object);
    } else if is_hpa_v1(resource) {
        hpa_to_v1(&mut object);
    }
    if let Some(map) = object.as_object_mut() {
        if map.get("apiVersion").and_then(Value::as_str) != Some(&resource.api_version()) {
            map.insert("apiVersion".into(), resource.api_version().into());
        }
        if map.get("kind").is_none() {
            map.insert("kind".into(), resource.kind.clone().into());
        }
    }
    meta::set_revision(&mut object, revision);
    object
}

/// A stored entry as `resource` serves it.
pub(crate) fn decode(resource: &Resource, entry: &Entry) -> ApiResult<Value> {
    let object: Value = serde_json::from_slice(&entry.value)
        .map_err(|e| ApiError::internal(format!("stored object {} is not readable: {e}", entry.key)))?;
    Ok(serve(resource, object, entry.mod_rev))
}

/// The bytes to store.
pub(crate) fn encode(resource: &Resource, object: &Value) -> ApiResult<Bytes> {
    let mut object = object.clone();
    if resource.group == "events.k8s.io" {
        object = event_to_core(object);
    } else if is_hpa_v1(resource) {
        hpa_to_v2(&mut object);
    }
    if let Some(m) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        m.shift_remove("resourceVersion");
    }
    if let Some(custom) = &resource.custom {
        object["apiVersion"] = join_gv(&resource.group, &custom.storage_version).into();
    }
    let bytes = serde_json::to_vec(&object).map_err(ApiError::internal)?;
    if bytes.len() > MAX_OBJECT {
        return Err(ApiError::too_large(MAX_OBJECT));
    }
    Ok(bytes.into())
}

/// `autoscaling/v1`, which `kubectl autoscale` still writes; v2 is stored.
fn is_hpa_v1(resource: &Resource) -> bool {
    resource.group == "autoscaling" && resource.version == "v1"
}

fn is_cpu(metric: &Value) -> bool {
    metric["type"] == "Resource"
        && metric["resource"]["name"] == "cpu"
        && metric["resource"]["target"]["type"] == "Utilization"
}

/// The CPU target has a field of its own in v1; what v1 cannot say stays in v2 only.
fn hpa_to_v1(object: &mut Value) {
    let target = object["spec"]["metrics"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|m| is_cpu(m));
    let target = target.map(|m| m["resource"]["target"]["averageUtilization"].clone());
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        spec.shift_remove("metrics");
        spec.shift_remove("behavior");
        if let Some(t) = target {
            spec.insert("targetCPUUtilizationPercentage".into(), t);
        }
    }
    if let Some(status) = object.get_mut("status").and_then(Value::as_object_mut) {
        status.shift_remove("currentMetrics");
        status.shift_remove("conditions");
    }
}

fn hpa_to_v2(object: &mut Value) {
    object["apiVersion"] = json!("autoscaling/v2");
    let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) else {
        return;
    };
    if let Some(target) = spec.shift_remove("targetCPUUtilizationPercentage") {
        let metric = json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": target}}});
        spec.insert("metrics".into(), json!([metric]));
    }
}

/// Field names of events: core, then events.k8s.io.
const EVENT_FIELDS: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

fn rename(object: Value, pairs: impl Fn(&str) -> Option<&'static str>) -> Value {
    match object {
        Value::Object(map) => {
            let renamed: Map<String, Value> = map
                .into_iter()
                .map(|(k, v)| (pairs(&k).map_or(k, str::to_owned), v))
                .collect();
            Value::Object(renamed)
        }
        other => other,
    }
}

fn event_to_new(object: Value) -> Value {
    rename(object, |k| {
        EVENT_FIELDS.iter().find(|(core, _)| *core == k).map(|(_, new)| *new)
    })
}

fn event_to_core(object: Value) -> Value {
    let mut v = rename(object, |k| {
        EVENT_FIELDS.iter().find(|(_, new)| *new == k).map(|(core, _)| *core)
    });
    v["apiVersion"] = json!("v1");
    v
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_two_faces() {
        let core =
            json!({"apiVersion": "v1", "kind": "Event", "involvedObject": {"name": "x"}, "message": "m", "count": 2});
        let new = event_to_new(core.clone());
        assert_eq!(new["regarding"]["name"], "x");
        assert_eq!(new["note"], "m");
        assert_eq!(event_to_core(new), core);
    }
}
