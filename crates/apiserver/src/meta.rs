//! Object metadata: what the server sets, keeps and checks on every object, whatever its kind.
//!
//! Pure functions on JSON documents; time and randomness come from the helpers at the end.

use serde_json::{Map, Value, json};

use crate::error::{ApiError, ApiResult, Cause};
use crate::names;
use crate::resources::Resource;

/// Metadata fields that exist; others are dropped (custom resources) or reported (strict validation).
pub(crate) const FIELDS: &[&str] = &[
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

/// `metadata` of an object, created if missing or null.
pub(crate) fn metadata(object: &mut Value) -> ApiResult<&mut Map<String, Value>> {
    let object = object
        .as_object_mut()
        .ok_or_else(|| ApiError::bad_request("the object is not a JSON object"))?;
    let slot = object.entry("metadata").or_insert_with(|| json!({}));
    if slot.is_null() {
        *slot = json!({});
    }
    slot.as_object_mut()
        .ok_or_else(|| ApiError::bad_request("metadata is not an object"))
}

/// A string of the metadata; empty if absent.
pub(crate) fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

/// Name of the object.
pub(crate) fn name(object: &Value) -> &str {
    text(object, "name")
}

/// Namespace of the object, empty if none.
pub(crate) fn namespace(object: &Value) -> &str {
    text(object, "namespace")
}

/// Whether deletion has begun.
pub(crate) fn is_deleting(object: &Value) -> bool {
    !text(object, "deletionTimestamp").is_empty()
}

/// Finalizers of the object.
pub(crate) fn finalizers(object: &Value) -> Vec<&str> {
    object["metadata"]["finalizers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

/// Sets the resource version.
pub(crate) fn set_revision(object: &mut Value, revision: u64) {
    if let Ok(m) = metadata(object) {
        m.insert("resourceVersion".into(), revision.to_string().into());
    }
}

/// Whether a kind counts `metadata.generation`.
pub(crate) fn has_generation(resource: &Resource) -> bool {
    resource.custom.is_some()
        || matches!(
            resource.kind.as_str(),
            "Deployment"
                | "ReplicaSet"
                | "StatefulSet"
                | "DaemonSet"
                | "Job"
                | "CronJob"
                | "ReplicationController"
                | "PodDisruptionBudget"
                | "Ingress"
                | "IngressClass"
                | "NetworkPolicy"
                | "EndpointSlice"
                | "MutatingWebhookConfiguration"
                | "ValidatingWebhookConfiguration"
                | "ValidatingAdmissionPolicy"
                | "ValidatingAdmissionPolicyBinding"
                | "CustomResourceDefinition"
                | "FlowSchema"
                | "PriorityLevelConfiguration"
                | "PriorityClass"
        )
}

/// Fills the metadata of an object about to be created.
pub(crate) fn prepare_create(resource: &Resource, object: &mut Value, namespace: Option<&str>) -> ApiResult<()> {
    let meta = metadata(object)?;
    for gone in [
        "selfLink",
        "resourceVersion",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
    ] {
        meta.remove(gone);
    }
    meta.retain(|_, v| !v.is_null());
    if resource.namespaced {
        if let Some(ns) = namespace {
            meta.insert("namespace".into(), ns.into());
        }
    } else {
        meta.remove("namespace");
    }
    meta.insert("uid".into(), names::new_uid().into());
    meta.insert("creationTimestamp".into(), now().into());
    if has_generation(resource) {
        meta.insert("generation".into(), 1.into());
    }
    Ok(())
}

/// Chooses a name from `generateName` if there is none.
pub(crate) fn generate_name(object: &mut Value) -> ApiResult<bool> {
    let meta = metadata(object)?;
    if meta.get("name").and_then(Value::as_str).is_some_and(|n| !n.is_empty()) {
        return Ok(false);
    }
    let Some(base) = meta
        .get("generateName")
        .and_then(Value::as_str)
        .filter(|b| !b.is_empty())
    else {
        return Ok(false);
    };
    let base: String = base.chars().take(58).collect();
    let name = format!("{base}{}", names::random_suffix(5));
    meta.insert("name".into(), name.into());
    Ok(true)
}

/// Carries server-owned metadata from the stored object into its replacement.
pub(crate) fn prepare_update(resource: &Resource, object: &mut Value, old: &Value) -> ApiResult<()> {
    let old_meta = old["metadata"].as_object().cloned().unwrap_or_default();
    let meta = metadata(object)?;
    meta.retain(|_, v| !v.is_null());
    for kept in [
        "uid",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generateName",
        "name",
    ] {
        match old_meta.get(kept) {
            Some(v) => meta.insert(kept.into(), v.clone()),
            None => meta.remove(kept),
        };
    }
    meta.remove("selfLink");
    if resource.namespaced {
        if let Some(ns) = old_meta.get("namespace") {
            meta.insert("namespace".into(), ns.clone());
        }
    } else {
        meta.remove("namespace");
    }
    Ok(())
}

/// Whether two versions differ outside metadata and status.
pub(crate) fn spec_changed(new: &Value, old: &Value) -> bool {
    let (Some(new), Some(old)) = (new.as_object(), old.as_object()) else {
        return new != old;
    };
    let outside = |k: &str| !matches!(k, "metadata" | "status" | "apiVersion" | "kind");
    new.iter().any(|(k, v)| outside(k) && old.get(k) != Some(v))
        || old.keys().any(|k| outside(k) && !new.contains_key(k))
}

/// Checks the metadata of an object about to be written.
pub(crate) fn validate(resource: &Resource, object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let meta = &object["metadata"];
    let rule = names::rule_for(&resource.group, &resource.kind);
    let name = name(object);
    if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
    } else if old.is_none() {
        if let Some(generate) = meta["generateName"]
            .as_str()
            .filter(|g| name.starts_with(g) && name.len() == g.len() + 5)
        {
            // A bad prefix is reported where the user wrote it.
            let trial = format!("{generate}x");
            for why in names::name_errors(rule, &trial) {
                causes.push(Cause::invalid("metadata.generateName", &json!(generate), why));
            }
        }
        for why in names::name_errors(rule, name) {
            let why = match names::near_name(rule, name) {
                Some(near) => format!("{why} (did you mean {near:?}?)"),
                None => why,
            };
            causes.push(Cause::invalid("metadata.name", &json!(name), why));
        }
    }
    string_map(meta, "labels", causes, |key, value, causes| {
        for why in names::qualified_name_errors(key) {
            causes.push(Cause::invalid("metadata.labels", &json!(key), why));
        }
        if value.len() > 63 {
            causes.push(Cause::invalid(
                "metadata.labels",
                &json!(value),
                "must be no more than 63 bytes",
            ));
        } else if !names::is_label_value(value) {
            causes.push(Cause::invalid("metadata.labels", &json!(value), names::LABEL_VALUE_MSG));
        }
    });
    let mut total = 0;
    string_map(meta, "annotations", causes, |key, value, causes| {
        total += key.len() + value.len();
        for why in names::qualified_name_errors(&key.to_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", &json!(key), why));
        }
    });
    if total > 256 << 10 {
        causes.push(Cause::too_long("metadata.annotations", 256 << 10));
    }
    for finalizer in finalizers(object) {
        for why in names::qualified_name_errors(finalizer) {
            causes.push(Cause::invalid("metadata.finalizers", &json!(finalizer), why));
        }
        if !finalizer.contains('/')
            && !matches!(finalizer, "orphan" | "foregroundDeletion" | "kubernetes")
            && resource.custom.is_none()
        {
            causes.push(Cause::invalid(
                "metadata.finalizers",
                &json!(finalizer),
                "name is neither a standard finalizer name nor is it fully qualified",
            ));
        }
    }
    if let Some(old) = old
        && is_deleting(old)
    {
        let before = finalizers(old);
        let added: Vec<&str> = finalizers(object).into_iter().filter(|f| !before.contains(f)).collect();
        if !added.is_empty() {
            let why = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
            );
            causes.push(Cause::forbidden("metadata.finalizers", &why));
        }
    }
    let mut controllers = 0;
    for (i, owner) in meta["ownerReferences"].as_array().into_iter().flatten().enumerate() {
        let at = format!("metadata.ownerReferences[{i}]");
        for (field, why) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            if owner[field].as_str().unwrap_or_default().is_empty() {
                causes.push(Cause::invalid(format!("{at}.{field}"), &json!(""), why));
            }
        }
        if owner["controller"].as_bool() == Some(true) {
            controllers += 1;
            if controllers == 2 {
                let why = "Only one reference can have Controller set to true";
                causes.push(Cause::invalid(
                    "metadata.ownerReferences",
                    &meta["ownerReferences"],
                    why,
                ));
            }
        }
    }
}

fn string_map(meta: &Value, field: &str, causes: &mut Vec<Cause>, mut check: impl FnMut(&str, &str, &mut Vec<Cause>)) {
    match &meta[field] {
        Value::Null => {}
        Value::Object(map) => {
            for (key, value) in map {
                match value.as_str() {
                    Some(text) => check(key, text, causes),
                    None => causes.push(Cause::invalid(format!("metadata.{field}"), value, "must be a string")),
                }
            }
        }
        other => causes.push(Cause::invalid(format!("metadata.{field}"), other, "must be an object")),
    }
}

/// Metadata types that cannot be decoded are a bad request, before any rule about their content.
pub(crate) fn check_shape(object: &Value, kind: &str, api_version: &str) -> ApiResult<()> {
    let fail = |what: &str, field: &str, want: &str| {
        Err(ApiError::bad_request(format!(
            "{kind} in version {api_version:?} cannot be handled as a {kind}: json: cannot unmarshal {what} into Go struct field ObjectMeta.metadata.{field} of type {want}"
        )))
    };
    let kind_of = |v: &Value| match v {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let meta = match &object["metadata"] {
        Value::Null => return Ok(()),
        Value::Object(m) => m,
        other => {
            return Err(ApiError::bad_request(format!(
                "{kind} in version {api_version:?} cannot be handled as a {kind}: json: cannot unmarshal {} into Go struct field {kind}.metadata of type v1.ObjectMeta",
                kind_of(other)
            )));
        }
    };
    for (field, value) in meta {
        match (field.as_str(), value) {
            (_, Value::Null) => {}
            ("labels" | "annotations", Value::Object(map)) => {
                if let Some(bad) = map.values().find(|v| !v.is_string() && !v.is_null()) {
                    return fail(kind_of(bad), field, "string");
                }
            }
            ("labels" | "annotations", other) => return fail(kind_of(other), field, "map[string]string"),
            ("finalizers", Value::Array(list)) => {
                if let Some(bad) = list.iter().find(|v| !v.is_string()) {
                    return fail(kind_of(bad), field, "string");
                }
            }
            ("ownerReferences" | "managedFields", Value::Array(list)) => {
                if let Some(bad) = list.iter().find(|v| !v.is_object()) {
                    return fail(kind_of(bad), field, "object");
                }
            }
            ("finalizers" | "ownerReferences" | "managedFields", other) => {
                return fail(kind_of(other), field, "[]string");
            }
            ("generation" | "deletionGracePeriodSeconds", v) if !v.is_i64() && !v.is_u64() => {
                return fail(kind_of(v), field, "int64");
            }
            (
                "name" | "namespace" | "generateName" | "uid" | "resourceVersion" | "creationTimestamp"
                | "deletionTimestamp",
                v,
            ) if !v.is_string() => {
                return fail(kind_of(v), field, "string");
            }
            _ => {}
        }
    }
    Ok(())
}

/// Now, as the API writes times (RFC 3339, seconds, UTC).
pub(crate) fn now() -> String {
    format_time(time::OffsetDateTime::now_utc())
}

/// A time as the API writes it.
pub(crate) fn format_time(t: time::OffsetDateTime) -> String {
    let t = t.replace_nanosecond(0).unwrap_or(t);
    t.format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default()
}

/// Reads a time of the API.
pub(crate) fn parse_time(text: &str) -> Option<time::OffsetDateTime> {
    time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()
}
