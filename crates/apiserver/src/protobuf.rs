//! Protobuf request bodies (`application/vnd.kubernetes.protobuf`) as JSON documents.
//!
//! kubectl sends what it creates itself (`kubectl create ns`, reviews, tokens) in this form; answers are always JSON. The envelope
//! is four magic bytes and an `Unknown` message. Go writes every non-pointer field, zero or not, so zeros are dropped unless the
//! field is a pointer there, where zero was meant.

use std::sync::OnceLock;

use base64::Engine;
use prost_reflect::{DescriptorPool, DynamicMessage, MapKey, ReflectMessage, Value as Reflected};
use serde_json::{Map, Value, json};

use crate::error::{ApiError, ApiResult};

const MAGIC: &[u8] = b"k8s\0";
const PACKAGE: &str = "mantlet.kubernetes";

/// Fields where zero, false or empty was said on purpose.
const KEEP: &[&str] = &[
    "replicas",
    "parallelism",
    "completions",
    "backoffLimit",
    "ttlSecondsAfterFinished",
    "terminationGracePeriodSeconds",
    "activeDeadlineSeconds",
    "revisionHistoryLimit",
    "progressDeadlineSeconds",
    "gracePeriodSeconds",
    "expirationSeconds",
    "automountServiceAccountToken",
    "immutable",
    "suspend",
    "controller",
    "blockOwnerDeletion",
    "runAsUser",
    "runAsGroup",
    "fsGroup",
    "runAsNonRoot",
    "value",
    "successfulJobsHistoryLimit",
    "failedJobsHistoryLimit",
    "allocateLoadBalancerNodePorts",
    "startingDeadlineSeconds",
];

fn pool() -> Result<&'static DescriptorPool, ApiError> {
    static POOL: OnceLock<Result<DescriptorPool, String>> = OnceLock::new();
    POOL.get_or_init(|| {
        let bytes: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kubernetes.bin"));
        DescriptorPool::decode(bytes).map_err(|e| e.to_string())
    })
    .as_ref()
    .map_err(ApiError::internal)
}

/// Decodes an envelope.
///
/// # Errors
/// 400 for bytes that are no envelope or no such message, 415 for a kind that is only served as JSON.
pub(crate) fn decode(bytes: &[u8]) -> ApiResult<Value> {
    let bad = |why: String| ApiError::bad_request(format!("error decoding protobuf: {why}"));
    let body = bytes.strip_prefix(MAGIC).ok_or_else(|| {
        bad("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]".into())
    })?;
    let pool = pool()?;
    let message = |name: &str| pool.get_message_by_name(&format!("{PACKAGE}.{name}"));
    let unknown = message("Unknown").ok_or_else(|| ApiError::internal("the descriptor set has no envelope"))?;
    let envelope = DynamicMessage::decode(unknown, body).map_err(|e| bad(e.to_string()))?;
    let envelope = to_json(&envelope);
    let (api_version, kind) = (&envelope["typeMeta"]["apiVersion"], &envelope["typeMeta"]["kind"]);
    let name = kind
        .as_str()
        .filter(|k| !k.is_empty() && *k != "Unknown")
        .ok_or_else(|| bad("the envelope names no kind".into()))?;
    let other_version = name == "HorizontalPodAutoscaler" && api_version.as_str() != Some("autoscaling/v1");
    let Some(descriptor) = message(name).filter(|_| !other_version) else {
        return Err(ApiError::unsupported_media_type(&[
            "application/json",
            "application/yaml",
        ]));
    };
    let raw = envelope["raw"].as_str().unwrap_or_default();
    let raw = base64::engine::general_purpose::STANDARD
        .decode(raw)
        .map_err(|e| bad(e.to_string()))?;
    let decoded = DynamicMessage::decode(descriptor, raw.as_slice()).map_err(|e| bad(e.to_string()))?;
    // Fields that this table does not know would be lost silently: better to ask for JSON than to store half an object.
    if let Some(path) = unknown_field(&decoded, "") {
        tracing::warn!(kind = name, field = %path, "protobuf body has a field that is only supported in JSON");
        return Err(ApiError::unsupported_media_type(&[
            "application/json",
            "application/yaml",
        ]));
    }
    let mut object = to_json(&decoded);
    if name == "Ingress" {
        for rule in object["spec"]["rules"].as_array_mut().into_iter().flatten() {
            if let Some(map) = rule.as_object_mut()
                && let Some(Value::Object(inner)) = map.shift_remove("ingressRuleValue")
            {
                map.extend(inner);
            }
        }
        if let Some(spec) = object["spec"].as_object_mut() {
            spec.retain(|_, v| !v.is_null());
        }
    }
    let mut out = json!({"apiVersion": api_version, "kind": kind});
    if let (Some(out), Value::Object(fields)) = (out.as_object_mut(), object) {
        out.extend(fields);
    }
    Ok(out)
}

/// The first non-empty field that the table does not know, except status and server-owned metadata.
fn unknown_field(message: &DynamicMessage, path: &str) -> Option<String> {
    let ignored = |number: u32| match message.descriptor().name() {
        "ObjectMeta" => matches!(number, 4 | 17),
        "SelfSubjectReview" => number == 2,
        name => {
            number == 3
                && !matches!(name, "Secret" | "ConfigMap")
                && message.descriptor().get_field(3).is_none()
                && path.is_empty()
        }
    };
    for field in message.unknown_fields() {
        // Tag, then a zero number or an empty message: what Go writes for a field that was not set.
        let mut bytes = Vec::new();
        field.encode(&mut bytes);
        let empty = bytes.last() == Some(&0) && bytes.len() <= 3;
        if !empty && !ignored(field.number()) {
            return Some(format!("{path}.{}", field.number()));
        }
    }
    for (descriptor, value) in message.fields() {
        let at = format!("{path}.{}", descriptor.name());
        let inner: Vec<&DynamicMessage> = match value {
            Reflected::Message(m) => vec![m],
            Reflected::List(l) => l.iter().filter_map(Reflected::as_message).collect(),
            _ => vec![],
        };
        if let Some(found) = inner.into_iter().find_map(|m| unknown_field(m, &at)) {
            return Some(found);
        }
    }
    None
}

fn to_json(message: &DynamicMessage) -> Value {
    let get = |name: &str| message.get_field_by_name(name).map(|v| v.into_owned());
    match message.descriptor().name() {
        "Time" => {
            let seconds = get("seconds").and_then(|v| v.as_i64()).unwrap_or(0);
            return match time::OffsetDateTime::from_unix_timestamp(seconds) {
                Ok(t) if seconds != 0 => crate::meta::format_time(t).into(),
                _ => Value::Null,
            };
        }
        "IntOrString" => {
            return match get("type").and_then(|v| v.as_i64()) {
                Some(1) => get("strVal")
                    .and_then(|v| v.as_str().map(str::to_owned))
                    .unwrap_or_default()
                    .into(),
                _ => get("intVal").and_then(|v| v.as_i32()).unwrap_or(0).into(),
            };
        }
        "Quantity" => {
            return get("string")
                .and_then(|v| v.as_str().map(str::to_owned))
                .unwrap_or_default()
                .into();
        }
        _ => {}
    }
    let mut out = Map::new();
    for (descriptor, value) in message.fields() {
        let name = descriptor.name();
        let json = value_json(value);
        let zero = match &json {
            Value::Null => true,
            Value::Bool(b) => !b,
            Value::Number(n) => n.as_i64() == Some(0),
            Value::String(s) => s.is_empty(),
            Value::Array(a) => a.is_empty(),
            // Empty messages are Go's zero structs; an empty selector says "all".
            Value::Object(o) => o.is_empty() && !matches!(name, "selector"),
        };
        if !zero || (KEEP.contains(&name) && !json.is_null()) {
            out.insert(name.to_owned(), json);
        }
    }
    Value::Object(out)
}

fn value_json(value: &Reflected) -> Value {
    match value {
        Reflected::Bool(b) => (*b).into(),
        Reflected::I32(n) => (*n).into(),
        Reflected::I64(n) => (*n).into(),
        Reflected::U32(n) => (*n).into(),
        Reflected::U64(n) => (*n).into(),
        Reflected::F32(n) => (*n).into(),
        Reflected::F64(n) => (*n).into(),
        Reflected::String(s) => s.clone().into(),
        Reflected::Bytes(b) => base64::engine::general_purpose::STANDARD.encode(b).into(),
        Reflected::EnumNumber(n) => (*n).into(),
        Reflected::Message(m) => to_json(m),
        Reflected::List(l) => l.iter().map(value_json).collect(),
        Reflected::Map(m) => {
            let mut entries: Vec<(String, Value)> = m
                .iter()
                .filter_map(|(k, v)| match k {
                    MapKey::String(k) => Some((k.clone(), value_json(v))),
                    _ => None,
                })
                .collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_a_bad_request() {
        for bytes in [&b""[..], b"k8s", b"k8s\0\xff\xff", b"{}", b"k8s\0"] {
            assert_eq!(decode(bytes).unwrap_err().code, 400, "{bytes:?}");
        }
    }
}
