//! CustomResourceDefinitions: checking them, their status, and the resources that they define.
//!
//! Pure. The registry turns stored definitions into [`Resource`]s with this; the write path runs custom objects through the
//! schema of their version.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::error::Cause;
use crate::names;
use crate::resources::Resource;
use crate::schema;

/// Resource name of definitions.
pub(crate) const PLURAL: &str = "customresourcedefinitions";
/// Group of definitions.
pub(crate) const GROUP: &str = "apiextensions.k8s.io";
/// Finalizer that keeps a definition until its objects are gone.
pub(crate) const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";

/// What a custom resource's version adds to the table entry.
#[derive(Debug)]
pub(crate) struct CustomVersion {
    /// Name of the definition (`plural.group`).
    pub(crate) crd_name: String,
    /// `openAPIV3Schema`.
    pub(crate) schema: Value,
    /// Old-style switch that keeps unknown fields.
    pub(crate) preserve_unknown: bool,
    /// Columns for tables.
    pub(crate) columns: Vec<Value>,
    /// Whether `/status` is apart.
    pub(crate) status: bool,
    /// `scale` subresource paths, if any.
    pub(crate) scale: Option<Value>,
    /// Version under which objects are stored.
    pub(crate) storage_version: String,
    /// Warning on use, if deprecated.
    pub(crate) deprecation: Option<String>,
}

fn strings(v: &Value) -> Vec<String> {
    v.as_array()
        .into_iter()
        .flatten()
        .filter_map(|s| s.as_str().map(str::to_owned))
        .collect()
}

/// The resources that a definition serves. Empty unless it is established.
pub(crate) fn resources(crd: &Value) -> Vec<Resource> {
    if !condition(crd, "Established") {
        return vec![];
    }
    let spec = &crd["spec"];
    let names = &crd["status"]["acceptedNames"];
    let group = spec["group"].as_str().unwrap_or_default();
    let versions = spec["versions"].as_array().cloned().unwrap_or_default();
    let storage = versions
        .iter()
        .find(|v| v["storage"].as_bool() == Some(true))
        .map(|v| v["name"].as_str().unwrap_or_default());
    let kind = names["kind"].as_str().unwrap_or_default();
    let mut out = Vec::new();
    for version in versions.iter().filter(|v| v["served"].as_bool() == Some(true)) {
        let name = version["name"].as_str().unwrap_or_default();
        let sub = &version["subresources"];
        let mut subresources = Vec::new();
        if !sub["scale"].is_null() {
            subresources.push("scale".to_owned());
        }
        if sub["status"].is_object() {
            subresources.push("status".to_owned());
        }
        let deprecation = (version["deprecated"].as_bool() == Some(true)).then(|| {
            version["deprecationWarning"]
                .as_str()
                .map_or_else(|| format!("{group}/{name} {kind} is deprecated"), str::to_owned)
        });
        let custom = CustomVersion {
            crd_name: crate::meta::name(crd).to_owned(),
            schema: version["schema"]["openAPIV3Schema"].clone(),
            preserve_unknown: spec["preserveUnknownFields"].as_bool() == Some(true),
            columns: version["additionalPrinterColumns"]
                .as_array()
                .cloned()
                .unwrap_or_default(),
            status: sub["status"].is_object(),
            scale: sub["scale"].is_object().then(|| sub["scale"].clone()),
            storage_version: storage.unwrap_or(name).to_owned(),
            deprecation,
        };
        out.push(Resource {
            group: group.to_owned(),
            version: name.to_owned(),
            plural: names["plural"].as_str().unwrap_or_default().to_owned(),
            singular: names["singular"].as_str().unwrap_or_default().to_owned(),
            kind: kind.to_owned(),
            list_kind: names["listKind"].as_str().unwrap_or_default().to_owned(),
            namespaced: spec["scope"].as_str() == Some("Namespaced"),
            short_names: strings(&names["shortNames"]),
            categories: strings(&names["categories"]),
            verbs: [
                "create",
                "delete",
                "deletecollection",
                "get",
                "list",
                "patch",
                "update",
                "watch",
            ]
            .map(str::to_owned)
            .to_vec(),
            subresources,
            custom: Some(Arc::new(custom)),
            storage_group: group.to_owned(),
        });
    }
    // Newest and most stable version first, as discovery prefers them.
    out.sort_by_key(|r| std::cmp::Reverse(version_order(&r.version)));
    out
}

/// Sort key of a version: GA over beta over alpha, then by number; other names last.
pub(crate) fn version_order(version: &str) -> (u8, u32, u32) {
    let Some(rest) = version.strip_prefix('v') else {
        return (0, 0, 0);
    };
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let Ok(major) = rest[..digits].parse() else {
        return (0, 0, 0);
    };
    match &rest[digits..] {
        "" => (3, major, 0),
        tail => {
            let (level, n) = match (tail.strip_prefix("beta"), tail.strip_prefix("alpha")) {
                (Some(n), _) => (2, n),
                (_, Some(n)) => (1, n),
                _ => return (0, 0, 0),
            };
            n.parse().map_or((0, 0, 0), |n| (level, major, n))
        }
    }
}

/// Whether a condition of a definition is true.
pub(crate) fn condition(crd: &Value, kind: &str) -> bool {
    crd["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|c| c["type"].as_str() == Some(kind) && c["status"].as_str() == Some("True"))
}

/// Fills in what a definition may leave out.
pub(crate) fn default(crd: &mut Value) {
    let spec = &mut crd["spec"];
    if !spec.is_object() {
        return;
    }
    let kind = spec["names"]["kind"].as_str().unwrap_or_default().to_owned();
    if let Some(names) = spec["names"].as_object_mut() {
        if names
            .get("singular")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .is_empty()
        {
            names.insert("singular".into(), kind.to_lowercase().into());
        }
        if names
            .get("listKind")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .is_empty()
        {
            names.insert("listKind".into(), format!("{kind}List").into());
        }
    }
    if spec["conversion"].is_null() {
        spec["conversion"] = json!({"strategy": "None"});
    }
}

/// Checks a definition.
pub(crate) fn validate(crd: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let spec = &crd["spec"];
    let names = &spec["names"];
    let group = spec["group"].as_str().unwrap_or_default();
    let plural = names["plural"].as_str().unwrap_or_default();
    if group.is_empty() {
        causes.push(Cause::required("spec.group", ""));
    } else if !names::is_dns1123_subdomain(group) {
        causes.push(Cause::invalid("spec.group", &spec["group"], names::SUBDOMAIN_MSG));
    } else if group.split('.').count() < 2 {
        causes.push(Cause::invalid(
            "spec.group",
            &spec["group"],
            "should be a domain with at least one dot",
        ));
    }
    let want = format!("{plural}.{group}");
    if crate::meta::name(crd) != want {
        let why = format!("must be spec.names.plural+\".\"+spec.group, {want:?}");
        causes.push(Cause::invalid(
            "metadata.name",
            &crd["metadata"]["name"],
            why.replace(&format!(", {want:?}"), ""),
        ));
    }
    for field in ["plural", "kind"] {
        let value = names[field].as_str().unwrap_or_default();
        if value.is_empty() {
            causes.push(Cause::required(format!("spec.names.{field}"), ""));
        } else if !names::is_dns1035_label(&value.to_lowercase()) {
            causes.push(Cause::invalid(
                format!("spec.names.{field}"),
                &names[field],
                names::LABEL_1035_MSG,
            ));
        }
    }
    match spec["scope"].as_str() {
        Some("Namespaced" | "Cluster") => {}
        None | Some("") => causes.push(Cause::required("spec.scope", "")),
        _ => causes.push(Cause::not_supported(
            "spec.scope",
            &spec["scope"],
            &["Cluster", "Namespaced"],
        )),
    }
    if spec["conversion"]["strategy"].as_str().is_some_and(|s| s != "None") {
        // Objects of several versions must differ in apiVersion only: conversion webhooks are not called here.
        causes.push(Cause::not_supported(
            "spec.conversion.strategy",
            &spec["conversion"]["strategy"],
            &["None"],
        ));
    }
    let versions = spec["versions"].as_array().cloned().unwrap_or_default();
    if versions.is_empty() {
        causes.push(Cause::required("spec.versions", "must have at least one version"));
    }
    let storage = versions.iter().filter(|v| v["storage"].as_bool() == Some(true)).count();
    if storage != 1 && !versions.is_empty() {
        causes.push(Cause::invalid(
            "spec.versions",
            &json!(versions.len()),
            "must have exactly one version marked as storage version",
        ));
    }
    let mut seen = std::collections::HashSet::new();
    for (i, version) in versions.iter().enumerate() {
        let at = format!("spec.versions[{i}]");
        let name = version["name"].as_str().unwrap_or_default();
        if !names::is_dns1035_label(name) {
            causes.push(Cause::invalid(
                format!("{at}.name"),
                &version["name"],
                names::LABEL_1035_MSG,
            ));
        }
        if !seen.insert(name.to_owned()) {
            causes.push(Cause::duplicate(format!("{at}.name"), &version["name"]));
        }
        for field in ["served", "storage"] {
            if !version[field].is_boolean() {
                causes.push(Cause::required(format!("{at}.{field}"), ""));
            }
        }
        let root = &version["schema"]["openAPIV3Schema"];
        if !root.is_object() {
            causes.push(Cause::required(
                format!("{at}.schema.openAPIV3Schema"),
                "schemas are required",
            ));
        } else {
            if root["type"].as_str() != Some("object") {
                causes.push(Cause::invalid(
                    format!("{at}.schema.openAPIV3Schema.type"),
                    &root["type"],
                    "must be object at the root",
                ));
            }
            validate_schema(root, &format!("{at}.schema.openAPIV3Schema"), true, causes);
        }
        for (j, column) in version["additionalPrinterColumns"]
            .as_array()
            .into_iter()
            .flatten()
            .enumerate()
        {
            let path = column["jsonPath"].as_str().unwrap_or_default();
            if let Err(why) = crate::jsonpath::Path::parse(path) {
                causes.push(Cause::invalid(
                    format!("{at}.additionalPrinterColumns[{j}].jsonPath"),
                    &column["jsonPath"],
                    why,
                ));
            }
            for field in ["name", "type"] {
                if column[field].as_str().unwrap_or_default().is_empty() {
                    causes.push(Cause::required(
                        format!("{at}.additionalPrinterColumns[{j}].{field}"),
                        "",
                    ));
                }
            }
        }
    }
    if let Some(old) = old {
        for (field, path) in [("group", "spec.group"), ("scope", "spec.scope")] {
            if spec[field] != old["spec"][field] {
                causes.push(Cause::invalid(path, &spec[field], "field is immutable"));
            }
        }
        for field in ["plural", "kind"] {
            if names[field] != old["spec"]["names"][field] && condition(old, "Established") {
                causes.push(Cause::invalid(
                    format!("spec.names.{field}"),
                    &names[field],
                    "field is immutable",
                ));
            }
        }
    }
}

/// A schema is structural: types are set, references are not used, patterns compile.
fn validate_schema(node: &Value, path: &str, structural: bool, causes: &mut Vec<Cause>) {
    if causes.len() > 20 {
        return;
    }
    let Some(map) = node.as_object() else {
        causes.push(Cause::invalid(path, node, "must be a schema object"));
        return;
    };
    if map.contains_key("$ref") {
        causes.push(Cause::forbidden(format!("{path}.$ref"), "$ref is not supported"));
    }
    let flag = |f: &str| node[f].as_bool() == Some(true);
    if structural
        && node["type"].as_str().unwrap_or_default().is_empty()
        && !flag("x-kubernetes-int-or-string")
        && !flag("x-kubernetes-preserve-unknown-fields")
    {
        causes.push(Cause::required(
            format!("{path}.type"),
            "must not be empty for specified object fields",
        ));
    }
    if let Some(t) = node["type"].as_str()
        && !matches!(t, "" | "object" | "array" | "string" | "integer" | "number" | "boolean")
    {
        let allowed = ["array", "boolean", "integer", "number", "object", "string"];
        causes.push(Cause::not_supported(format!("{path}.type"), &node["type"], &allowed));
    }
    if let Some(p) = node["pattern"].as_str()
        && !schema::pattern_ok(p)
    {
        causes.push(Cause::invalid(
            format!("{path}.pattern"),
            &node["pattern"],
            "must be a valid regular expression",
        ));
    }
    if structural && node["type"].as_str() == Some("array") && !node["items"].is_object() {
        causes.push(Cause::required(format!("{path}.items"), "must be specified"));
    }
    for (name, inner) in node["properties"].as_object().into_iter().flatten() {
        validate_schema(inner, &format!("{path}.properties[{name}]"), structural, causes);
    }
    if node["items"].is_object() {
        validate_schema(&node["items"], &format!("{path}.items"), structural, causes);
    }
    if node["additionalProperties"].is_object() {
        validate_schema(
            &node["additionalProperties"],
            &format!("{path}.additionalProperties"),
            structural,
            causes,
        );
    }
    for junctor in ["allOf", "anyOf", "oneOf"] {
        for (i, inner) in node[junctor].as_array().into_iter().flatten().enumerate() {
            validate_schema(inner, &format!("{path}.{junctor}[{i}]"), false, causes);
        }
    }
}

/// Writes the status that the naming and establishing controllers would write. `taken` says whether another definition or a
/// built-in resource of the group already has one of the names.
pub(crate) fn establish(crd: &mut Value, taken: Option<String>) {
    let now = crate::meta::now();
    let keep = |kind: &str, status: &str| -> String {
        crd["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|c| c["type"].as_str() == Some(kind) && c["status"].as_str() == Some(status))
            .and_then(|c| c["lastTransitionTime"].as_str())
            .map_or_else(|| now.clone(), str::to_owned)
    };
    let conditions = match &taken {
        None => json!([
            {"type": "NamesAccepted", "status": "True", "reason": "NoConflicts", "message": "no conflicts found",
             "lastTransitionTime": keep("NamesAccepted", "True")},
            {"type": "Established", "status": "True", "reason": "InitialNamesAccepted",
             "message": "the initial names have been accepted", "lastTransitionTime": keep("Established", "True")},
        ]),
        Some(why) => json!([
            {"type": "NamesAccepted", "status": "False", "reason": "KindConflict", "message": why,
             "lastTransitionTime": keep("NamesAccepted", "False")},
            {"type": "Established", "status": "False", "reason": "NotAccepted", "message": "not all names are accepted",
             "lastTransitionTime": keep("Established", "False")},
        ]),
    };
    let mut stored = strings(&crd["status"]["storedVersions"]);
    for version in crd["spec"]["versions"].as_array().into_iter().flatten() {
        let name = version["name"].as_str().unwrap_or_default();
        if version["storage"].as_bool() == Some(true) && !stored.iter().any(|s| s == name) {
            stored.push(name.to_owned());
        }
    }
    let accepted = if taken.is_none() {
        crd["spec"]["names"].clone()
    } else {
        json!({"plural": "", "kind": ""})
    };
    crd["status"] = json!({"conditions": conditions, "acceptedNames": accepted, "storedVersions": stored});
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_as_the_api_prefers_them() {
        let mut v = ["v1alpha3", "v1", "foo", "v1beta1", "v2", "v1beta2", "v11"].to_vec();
        v.sort_by_key(|v| std::cmp::Reverse(version_order(v)));
        assert_eq!(v, ["v11", "v2", "v1", "v1beta2", "v1beta1", "v1alpha3", "foo"]);
    }

    #[test]
    fn a_schema_must_be_structural() {
        let crd = json!({"metadata": {"name": "as.x.io"}, "spec": {"group": "x.io", "scope": "Namespaced",
            "names": {"plural": "as", "kind": "A"}, "versions": [{"name": "v1", "served": true, "storage": true,
            "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"properties": {}}, "l": {"type": "array"}}}}}]}});
        let mut causes = Vec::new();
        validate(&crd, None, &mut causes);
        let fields: Vec<&str> = causes.iter().map(|c| c.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "spec.versions[0].schema.openAPIV3Schema.properties[spec].type",
                "spec.versions[0].schema.openAPIV3Schema.properties[l].items",
            ]
        );
    }
}
