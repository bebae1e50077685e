//! CustomResourceDefinitions of all kinds, built from the Rust types, and field-name checks against the same schemas.
//!
//! `cli install` applies [`all`]; the checked-in copy `deploy/crds/all.yaml` is compared with it by a test
//! (`UPDATE_GOLDEN=1` rewrites it). The schemas are structural, as Kubernetes wants them: no references, no `nullable`, types
//! everywhere. Field descriptions are the doc comments of the types.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

use crate::diagnostic::{Code, Diagnostic, Severity, did_you_mean};
use crate::kind::{KINDS, Kind};

/// Schema of a field whose content is kept as written.
pub(crate) fn opaque(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}

/// Schema of a list whose items are kept as written.
pub(crate) fn opaque_list(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": "object", "x-kubernetes-preserve-unknown-fields": true }
    })
}

/// The structural schema of a type.
pub(crate) fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::openapi3().for_deserialize().with(|s| {
        s.inline_subschemas = true;
        s.meta_schema = None;
    });
    let mut value = settings.into_generator().into_root_schema_for::<T>().to_value();
    if let Some(map) = value.as_object_mut() {
        for key in ["$schema", "title", "components", "definitions", "$defs"] {
            map.remove(key);
        }
    }
    structural(&mut value);
    value
}

/// Turns what schemars writes into what Kubernetes takes.
fn structural(value: &mut Value) {
    let Some(map) = value.as_object_mut() else { return };
    // Option<T> of an inlined T: anyOf [T, {nullable}]; enums with documented variants: oneOf of one-value enums.
    for key in ["anyOf", "oneOf", "allOf"] {
        let Some(Value::Array(branches)) = map.remove(key) else {
            continue;
        };
        let mut names = Vec::new();
        let mut objects = Vec::new();
        for branch in branches {
            let Value::Object(branch) = branch else { continue };
            match (branch.get("enum"), branch.get("const")) {
                (Some(Value::Array(values)), _) => names.extend(values.iter().filter(|v| !v.is_null()).cloned()),
                (_, Some(value)) if !value.is_null() => names.push(value.clone()),
                (Some(_), _) | (_, Some(_)) => {}
                _ if branch
                    .keys()
                    .all(|k| k == "nullable" || k == "type" && branch["type"] == "null") => {}
                _ => objects.push(branch),
            }
        }
        if !names.is_empty() {
            map.insert("type".into(), json!("string"));
            map.insert("enum".into(), Value::Array(names));
        }
        // Several object branches would be a real union, which no kind has; only a lone one is merged up.
        for object in objects {
            for (k, v) in object {
                map.entry(k).or_insert(v);
            }
        }
    }
    for key in [
        "nullable",
        "default",
        "const",
        "additionalItems",
        "uniqueItems",
        "$comment",
    ] {
        map.remove(key);
    }
    if map.get("additionalProperties") == Some(&Value::Bool(false)) {
        map.remove("additionalProperties");
    }
    if let Some(Value::Array(values)) = map.get_mut("enum") {
        values.retain(|v| !v.is_null());
    }
    integers(map);
    // schemars writes bounds of maps as array bounds when asked through `length`.
    if map.get("type") == Some(&json!("object")) {
        for (from, to) in [
            ("maxItems", "maxProperties"),
            ("maxLength", "maxProperties"),
            ("minItems", "minProperties"),
        ] {
            if let Some(bound) = map.remove(from) {
                map.insert(to.into(), bound);
            }
        }
    }
    if let Some(Value::String(text)) = map.get_mut("description") {
        *text = text.replace('\n', " ");
    }
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        properties.values_mut().for_each(structural);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(key) {
            structural(inner);
        }
    }
}

/// Kubernetes knows `int32`, `int64`, `float`, `double`; unsigned ones become ranges.
fn integers(map: &mut Map<String, Value>) {
    let Some(format) = map.get("format").and_then(Value::as_str).map(str::to_string) else {
        return;
    };
    let max = match format.as_str() {
        "uint16" => u64::from(u16::MAX),
        "uint32" => u64::from(u32::MAX),
        "uint64" | "uint" => i64::MAX.unsigned_abs(),
        "int32" | "int64" | "double" | "float" => return,
        _ => {
            map.remove("format");
            return;
        }
    };
    map.remove("format");
    map.insert("minimum".into(), json!(0));
    map.insert("maximum".into(), json!(max));
}

/// Spec schemas by kind.
fn schemas() -> &'static BTreeMap<&'static str, Value> {
    static SCHEMAS: OnceLock<BTreeMap<&'static str, Value>> = OnceLock::new();
    SCHEMAS.get_or_init(|| {
        BTreeMap::from([
            ("AuthorizationPolicy", schema_of::<crate::AuthorizationPolicy>()),
            ("DestinationRule", schema_of::<crate::DestinationRule>()),
            ("EnvoyFilter", schema_of::<crate::EnvoyFilter>()),
            ("Gateway", schema_of::<crate::Gateway>()),
            ("PeerAuthentication", schema_of::<crate::PeerAuthentication>()),
            ("ProxyConfig", schema_of::<crate::ProxyConfigResource>()),
            ("RequestAuthentication", schema_of::<crate::RequestAuthentication>()),
            ("ServiceEntry", schema_of::<crate::ServiceEntry>()),
            ("Sidecar", schema_of::<crate::Sidecar>()),
            ("Telemetry", schema_of::<crate::Telemetry>()),
            ("VirtualService", schema_of::<crate::VirtualService>()),
            ("WasmPlugin", schema_of::<crate::WasmPlugin>()),
            ("WorkloadEntry", schema_of::<crate::WorkloadEntry>()),
            ("WorkloadGroup", schema_of::<crate::WorkloadGroup>()),
            ("MeshPolicy", schema_of::<crate::legacy::authn::MeshPolicy>()),
            ("Policy", schema_of::<crate::legacy::authn::Policy>()),
            ("ServiceRole", schema_of::<crate::legacy::rbac::ServiceRole>()),
            (
                "ServiceRoleBinding",
                schema_of::<crate::legacy::rbac::ServiceRoleBinding>(),
            ),
            (
                "ClusterRbacConfig",
                schema_of::<crate::legacy::rbac::ClusterRbacConfig>(),
            ),
            ("RbacConfig", schema_of::<crate::legacy::rbac::RbacConfig>()),
        ])
    })
}

/// The schema of MeshConfig, for checks of field names.
pub fn mesh_config_schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let mut schema = schema_of::<crate::MeshConfig>();
        // A provider's kind is one of many fields, of which only the ones we run are typed.
        if let Some(provider) = schema.pointer_mut("/properties/extensionProviders/items") {
            provider["x-kubernetes-preserve-unknown-fields"] = json!(true);
        }
        schema
    })
}

/// The CustomResourceDefinition of a kind.
pub fn of(kind: &Kind) -> Value {
    let mut spec_schema = schemas()
        .get(kind.kind)
        .cloned()
        .unwrap_or_else(|| json!({ "type": "object" }));
    if crate::legacy::is_legacy(kind) {
        crate::legacy::schema::loosen(&mut spec_schema);
    }
    let needs_spec = spec_schema.get("required").is_some();
    let mut schema = json!({
        "type": "object",
        "properties": {
            "spec": spec_schema,
            "status": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
        },
    });
    if needs_spec {
        schema["required"] = json!(["spec"]);
    }
    let columns: Vec<Value> = kind
        .columns
        .iter()
        .map(|c| json!({ "name": c.name, "type": c.kind, "jsonPath": c.json_path, "description": c.description }))
        .collect();
    let versions: Vec<Value> = kind
        .versions
        .iter()
        .enumerate()
        .map(|(i, version)| {
            let mut v = json!({ "name": version, "served": true, "storage": i == 0 });
            if !columns.is_empty() {
                v["additionalPrinterColumns"] = Value::Array(columns.clone());
            }
            v["schema"] = json!({ "openAPIV3Schema": schema });
            v["subresources"] = json!({ "status": {} });
            v
        })
        .collect();
    let mut names = json!({
        "categories": ["istio-io", kind.group.replace('.', "-")],
        "kind": kind.kind,
        "listKind": format!("{}List", kind.kind),
        "plural": kind.plural,
        "singular": kind.singular,
    });
    if !kind.short_names.is_empty() {
        names["shortNames"] = json!(kind.short_names);
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": kind.crd_name(),
            "annotations": { "helm.sh/resource-policy": "keep" },
            "labels": { "app": "istio-pilot", "chart": "istio", "heritage": "Tiller", "release": "istio" },
        },
        "spec": {
            "group": kind.group,
            "names": names,
            "scope": if kind.cluster_scoped() { "Cluster" } else { "Namespaced" },
            "versions": versions,
        },
    })
}

/// All CustomResourceDefinitions, in table order.
pub fn all() -> Vec<Value> {
    KINDS.iter().map(of).collect()
}

/// Fields of an object's spec that its kind does not have.
pub fn unknown_fields_of(kind: &Kind, object: &Value) -> Vec<Diagnostic> {
    match (schemas().get(kind.kind), object.get("spec")) {
        (Some(schema), Some(spec)) => unknown_fields(spec, schema, "spec"),
        _ => Vec::new(),
    }
}

/// The schema of a kind's spec.
pub(crate) fn spec_schema(kind: &Kind) -> Option<&'static Value> {
    schemas().get(kind.kind)
}

/// As [`shape_error`], for a spec of a kind.
pub(crate) fn shape_error_of(kind: &Kind, spec: &Value) -> Option<(String, String)> {
    schemas()
        .get(kind.kind)
        .and_then(|schema| shape_error(spec, schema, "spec"))
}

/// The first place where a list stands for an object or the other way round. serde takes `[]` for any object whose fields are all
/// optional, so without this check a rule written as `[]` would be the empty rule, which matches everything.
pub(crate) fn shape_error(value: &Value, schema: &Value, path: &str) -> Option<(String, String)> {
    let wanted = schema.get("type").and_then(Value::as_str);
    match (wanted, value) {
        (Some("object"), Value::Object(map)) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            let additional = schema.get("additionalProperties");
            map.iter().find_map(|(key, inner)| {
                let at = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                let inner_schema = properties.and_then(|p| p.get(key)).or(additional)?;
                shape_error(inner, inner_schema, &at)
            })
        }
        (Some("array"), Value::Array(items)) => {
            let inner_schema = schema.get("items")?;
            items
                .iter()
                .enumerate()
                .find_map(|(i, item)| shape_error(item, inner_schema, &format!("{path}[{i}]")))
        }
        (Some(wanted @ ("object" | "array")), other) => {
            let found = match other {
                Value::Null => "null",
                Value::Bool(_) => "a boolean",
                Value::Number(_) => "a number",
                Value::String(_) => "a string",
                Value::Array(_) => "a list",
                Value::Object(_) => "an object",
            };
            Some((path.to_string(), format!("must be of type {wanted}, found {found}")))
        }
        _ => None,
    }
}

/// Fields of `value` that `schema` does not have, each as an error with the nearest known name.
pub fn unknown_fields(value: &Value, schema: &Value, path: &str) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    walk(value, schema, path, &mut findings);
    findings
}

fn walk(value: &Value, schema: &Value, path: &str, findings: &mut Vec<Diagnostic>) {
    match value {
        Value::Object(map) => {
            let keep = schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
            let properties = schema.get("properties").and_then(Value::as_object);
            let additional = schema.get("additionalProperties").filter(|a| a.is_object());
            for (key, inner) in map {
                let at = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                if let Some(inner_schema) = properties.and_then(|p| p.get(key)) {
                    walk(inner, inner_schema, &at, findings);
                } else if let Some(inner_schema) = additional {
                    walk(inner, inner_schema, &at, findings);
                } else if !keep && (properties.is_some() || schema.get("type") == Some(&json!("object"))) {
                    let known = properties.into_iter().flat_map(|p| p.keys().map(String::as_str));
                    findings.push(
                        Diagnostic::new(
                            Code::UNKNOWN_FIELD,
                            Severity::Error,
                            at.clone(),
                            format!("unknown field {at:?}"),
                        )
                        .with_hint(did_you_mean(key, known)),
                    );
                }
            }
        }
        Value::Array(items) => {
            if let Some(inner_schema) = schema.get("items") {
                for (i, item) in items.iter().enumerate() {
                    walk(item, inner_schema, &format!("{path}[{i}]"), findings);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
