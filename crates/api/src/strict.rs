//! Everything that can be said about an object as a user wrote it: what `validate` shows before a file is applied.
//!
//! [`crate::validate::object`] says what the webhook says; an API server has looked at the object before it: at its frame, its name, its
//! field names and the types of its values. Here all of that is said at once, every finding with what is allowed and, where only one
//! thing can have been meant, with a [`Fix`]. It must not know files or positions.

use serde_json::Value;

use crate::crd;
use crate::diagnostic::{Code, Diagnostic, Fix, Hint, Severity, nearest};
use crate::kind::{self, KINDS, Kind};
use crate::names;
use crate::validate;

/// Fields of any object.
pub(crate) const TOP: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];

/// Fields of `metadata`.
pub(crate) const METADATA: [&str; 15] = [
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

/// Most findings about one object.
const MAX_FINDINGS: usize = 200;

/// All findings about an object. Objects of kinds that are not Istio's are checked in their frame and name only.
pub fn document(value: &Value) -> Vec<Diagnostic> {
    let mut findings = frame(value);
    let Some(row) = row_of(value) else { return findings };
    findings.extend(unknown_top(value, row));
    if let (Some(schema), Some(spec)) = (crd::spec_schema(row), value.get("spec")) {
        walk(spec, schema, "spec", &mut findings);
        deny_rules(spec, row, &mut findings);
    }
    // Decoding stops at the first thing that the walk has told already.
    let undecodable = findings
        .iter()
        .any(|f| f.code == Code::DECODE && (f.path.starts_with("spec") || f.path.contains("metadata.")));
    let unknown: Vec<String> = findings
        .iter()
        .filter(|f| f.code == Code::UNKNOWN_FIELD)
        .map(|f| f.path.clone())
        .collect();
    // What the kind's rules say of an object is a consequence where a field of it is misspelt, and wrong where a value does not decode.
    let own: Vec<Diagnostic> = validate::object(value)
        .into_iter()
        .take(10 * MAX_FINDINGS)
        .filter(|f| f.code != Code::UNKNOWN_FIELD)
        .filter(|f| f.code != Code::DECODE || !undecodable)
        .filter(|f| !unknown.iter().any(|path| inside(path, &f.path)) && !covered(&findings, &f.path))
        .collect();
    findings.extend(own);
    if !findings
        .iter()
        .any(|f| f.severity == Severity::Error && f.path.starts_with("spec"))
    {
        findings.extend(validate::traps(value));
    }
    findings.truncate(MAX_FINDINGS);
    findings
}

/// `rules: {}` in a DENY policy: without rules it is refused, so only the rule that matches everything can be meant.
fn deny_rules(spec: &Value, row: &Kind, findings: &mut [Diagnostic]) {
    if row.kind != "AuthorizationPolicy" || spec.get("action").and_then(Value::as_str) != Some("DENY") {
        return;
    }
    let empty = spec
        .get("rules")
        .and_then(Value::as_object)
        .is_some_and(serde_json::Map::is_empty);
    if let Some(finding) = findings
        .iter_mut()
        .find(|f| empty && f.path == "spec.rules" && f.code == Code::DECODE)
    {
        finding.hint = Some(Hint::Advice(
            "an empty map is no list: write \"rules:\" with one item \"- {}\" below it to deny everything; a DENY policy without rules is refused".into(),
        ));
        finding.fix = Some(Fix::Wrap);
    }
}

/// True when an error about exactly this place has been said.
fn covered(findings: &[Diagnostic], path: &str) -> bool {
    path.starts_with("spec.") && findings.iter().any(|f| f.severity == Severity::Error && f.path == path)
}

/// True when `path` is a part of the object at `outer`.
fn inside(path: &str, outer: &str) -> bool {
    outer.starts_with("spec.")
        && path
            .strip_prefix(outer)
            .is_some_and(|rest| rest.starts_with(['.', '[']))
}

/// The row of an object that is one of Istio's kinds in a version that is served.
pub(crate) fn row_of(value: &Value) -> Option<&'static Kind> {
    let text = |key| value.get(key).and_then(Value::as_str);
    kind::find(text("kind")?, text("apiVersion")?)
}

/// apiVersion, kind and metadata.
fn frame(value: &Value) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    if !value.is_object() {
        findings.push(
            Diagnostic::new(Code::DECODE, Severity::Error, "", "not a Kubernetes object").with_hint(Some(
                Hint::Advice("an object is a map with apiVersion, kind, metadata and spec".into()),
            )),
        );
        return findings;
    }
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind_name) = (text("apiVersion"), text("kind"));
    for key in ["apiVersion", "kind"] {
        if text(key).is_empty() {
            let near = value.as_object().and_then(|map| {
                map.keys()
                    .filter(|k| !TOP.contains(&k.as_str()))
                    .find(|k| nearest(k, [key]).is_some())
            });
            // A misspelt key is told as that.
            if near.is_none() {
                findings.push(Diagnostic::new(
                    Code::UNKNOWN_KIND,
                    Severity::Error,
                    key,
                    format!("{key} is required"),
                ));
            }
        }
    }
    if !api_version.is_empty() && !kind_name.is_empty() && kind::find(kind_name, api_version).is_none() {
        findings.extend(unknown_kind(kind_name, api_version));
    }
    findings.extend(metadata(value, kind_name));
    findings
}

/// Why Istio's table has no such kind; nothing if the object is of somebody else's API.
fn unknown_kind(kind_name: &str, api_version: &str) -> Option<Diagnostic> {
    let finding = |path: &str, message: String| Diagnostic::new(Code::UNKNOWN_KIND, Severity::Error, path, message);
    let (group, _) = api_version.split_once('/').unwrap_or(("", api_version));
    let mut groups: Vec<&str> = KINDS.iter().map(|row| row.group).collect();
    groups.dedup();
    let message = format!("unrecognized type {api_version}, Kind={kind_name}");
    if groups.contains(&group) {
        let rows: Vec<&Kind> = KINDS.iter().filter(|row| row.group == group).collect();
        if let Some(row) = rows.iter().find(|row| row.kind == kind_name) {
            let versions: Vec<String> = row.versions.iter().map(|v| format!("{group}/{v}")).collect();
            return Some(
                finding(
                    "apiVersion",
                    format!("{kind_name} is not served in version {api_version:?}"),
                )
                .with_hint(Some(Hint::DidYouMean(versions[0].clone())))
                .with_allowed(versions)
                .with_fix(None),
            );
        }
        // Another group's kind, or a misspelt one.
        if let Some(row) = KINDS.iter().find(|row| row.kind == kind_name) {
            return Some(
                finding("apiVersion", message)
                    .with_hint(Some(Hint::DidYouMean(row.api_version())))
                    .with_fix(Some(Fix::Text)),
            );
        }
        let near = nearest(kind_name, rows.iter().map(|row| row.kind));
        return Some(
            finding("kind", message)
                .with_hint(near.map(|(name, _)| Hint::DidYouMean(name.into())))
                .with_fix(near.filter(|(_, only)| *only).map(|_| Fix::Text))
                .with_allowed(rows.iter().map(|row| row.kind)),
        );
    }
    // Kubernetes has a Gateway of its own and others may have any name; only what is near to Istio's group, or has no group, is told.
    let near_group = nearest(group, groups.iter().copied()).map(|(name, _)| name);
    let row = KINDS
        .iter()
        .find(|row| row.kind == kind_name && (group.is_empty() || near_group == Some(row.group)));
    match (row, near_group) {
        (Some(row), _) => Some(
            finding("apiVersion", message)
                .with_hint(Some(Hint::DidYouMean(row.api_version())))
                .with_fix(Some(Fix::Text)),
        ),
        (None, Some(near)) if group.ends_with("istio.io") || near.contains("istio") => Some(
            finding("apiVersion", message)
                .with_allowed(groups)
                .with_hint(Some(Hint::DidYouMean(near.into()))),
        ),
        _ => None,
    }
}

/// Name, namespace, labels, annotations.
fn metadata(value: &Value, kind_name: &str) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    let decode = |path: &str, message: String| Diagnostic::new(Code::DECODE, Severity::Error, path, message);
    let metadata = match value.get("metadata") {
        Some(Value::Object(map)) => map,
        None | Some(Value::Null) => {
            findings.push(
                decode("metadata", "metadata is empty, so the object has no name".into()).with_hint(Some(
                    Hint::Advice("name and namespace belong below metadata:, indented by two spaces".into()),
                )),
            );
            return findings;
        }
        Some(other) => {
            findings.push(decode("metadata", format!("must be a map, found {}", found(other))));
            return findings;
        }
    };
    for (key, inner) in metadata {
        if METADATA.contains(&key.as_str()) {
            continue;
        }
        if findings.len() >= MAX_FINDINGS {
            return findings;
        }
        let near = nearest(key, METADATA);
        let free = near.filter(|(name, only)| *only && !metadata.contains_key(*name));
        let mut finding = Diagnostic::new(
            Code::UNKNOWN_FIELD,
            Severity::Error,
            format!("metadata.{key}"),
            format!("unknown field {key:?}"),
        )
        .with_hint(near.map(|(name, _)| Hint::DidYouMean(name.into())))
        .with_fix(free.map(|_| Fix::RenameKey));
        if finding.hint.is_none() && inner.is_string() {
            finding.hint = Some(Hint::Advice(
                "if it is a label or an annotation, it belongs below labels: or annotations:".into(),
            ));
        }
        findings.push(finding);
    }
    let generated = metadata
        .get("generateName")
        .and_then(Value::as_str)
        .is_some_and(|n| !n.is_empty());
    for key in ["name", "namespace"] {
        match metadata.get(key) {
            None | Some(Value::Null) => {
                if key == "name"
                    && !generated
                    && !metadata
                        .keys()
                        .any(|k| nearest(k, ["name"]).is_some() && k != "namespace")
                {
                    findings.push(decode("metadata", "metadata.name is required".into()));
                }
            }
            Some(Value::String(text)) => {
                let label = key == "namespace" || kind_name == "Namespace";
                findings.extend(name_finding(&format!("metadata.{key}"), text, label, kind_name));
            }
            Some(other) => findings.push(
                decode(
                    &format!("metadata.{key}"),
                    format!("must be a text, found {}", found(other)),
                )
                .with_fix(scalar(other).then_some(Fix::Quote)),
            ),
        }
    }
    for key in ["labels", "annotations"] {
        match metadata.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::Object(map)) => {
                for (name, inner) in map.iter().filter(|(_, inner)| !inner.is_string()).take(MAX_FINDINGS) {
                    findings.push(
                        decode(
                            &format!("metadata.{key}[{name}]"),
                            format!("must be a text, found {}", found(inner)),
                        )
                        .with_hint(scalar(inner).then(|| Hint::Advice("put it in quotes".into())))
                        .with_fix(scalar(inner).then_some(Fix::Quote)),
                    );
                }
            }
            Some(other) => findings.push(decode(
                &format!("metadata.{key}"),
                format!("must be a map, found {}", found(other)),
            )),
        }
    }
    findings
}

/// A name that RFC 1123 does not allow, with the nearest one that it does.
fn name_finding(path: &str, text: &str, label: bool, kind_name: &str) -> Option<Diagnostic> {
    // Roles and the like are named freely.
    let free = kind_name.ends_with("Role") || kind_name.ends_with("RoleBinding");
    let good = if label {
        names::is_dns1123_label(text)
    } else {
        names::is_dns1123_subdomain(text) || free
    };
    if good {
        return None;
    }
    let near = near_name(text, label);
    let rule = if label {
        "lower case letters, digits and '-', beginning and ending with a letter or digit, at most 63 characters"
    } else {
        "lower case letters, digits, '-' and '.', beginning and ending with a letter or digit, at most 253 characters"
    };
    Some(
        Diagnostic::new(
            Code::NAME,
            Severity::Error,
            path,
            format!("{text:?} is no name that Kubernetes takes (RFC 1123)"),
        )
        .with_allowed([rule])
        .with_hint(near.clone().map(Hint::DidYouMean))
        .with_fix(near.map(|_| Fix::Text)),
    )
}

/// The name with each character that is not allowed replaced: upper case by lower case, blanks and `_` by `-`. None if that is no name
/// either.
pub fn near_name(text: &str, label: bool) -> Option<String> {
    let near: String = text
        .chars()
        .map(|c| match c {
            '_' | ' ' => '-',
            '.' if label => '-',
            c => c.to_ascii_lowercase(),
        })
        .collect();
    let near = near.trim_matches('-').to_string();
    let good = if label {
        names::is_dns1123_label(&near)
    } else {
        names::is_dns1123_subdomain(&near)
    };
    (good && near != text).then_some(near)
}

/// Keys beside apiVersion, kind, metadata and spec. One that belongs into metadata or spec has probably lost its indentation.
fn unknown_top(value: &Value, row: &Kind) -> Vec<Diagnostic> {
    let Some(map) = value.as_object() else {
        return Vec::new();
    };
    let spec_fields: Vec<&str> = crd::spec_schema(row)
        .and_then(|schema| schema.get("properties"))
        .and_then(Value::as_object)
        .map(|fields| fields.keys().map(String::as_str).collect())
        .unwrap_or_default();
    let mut findings = Vec::new();
    for key in map.keys().filter(|key| !TOP.contains(&key.as_str())).take(MAX_FINDINGS) {
        let finding = Diagnostic::new(
            Code::UNKNOWN_FIELD,
            Severity::Error,
            key.clone(),
            format!("unknown field {key:?}"),
        );
        let below = |parent: &str| {
            Some(Hint::Advice(format!(
                "it belongs below {parent}:, indented by two spaces more"
            )))
        };
        let near_top = nearest(key, TOP).filter(|(name, _)| !map.contains_key(*name));
        let finding = if spec_fields.contains(&key.as_str()) {
            finding.with_hint(below("spec"))
        } else if METADATA.contains(&key.as_str()) {
            finding.with_hint(below("metadata"))
        } else if let Some(parent) = lost_parent(map, key, row) {
            finding.with_hint(Some(Hint::Advice(format!("it belongs below {parent}:, indented"))))
        } else if let Some((name, only)) = near_top {
            finding
                .with_hint(Some(Hint::DidYouMean(name.into())))
                .with_fix(only.then_some(Fix::RenameKey))
        } else if let Some((name, _)) = nearest(key, spec_fields.iter().copied()) {
            finding.with_hint(Some(Hint::Advice(format!(
                "did you mean {name:?}? It belongs below spec:, indented by two spaces more"
            ))))
        } else {
            finding.with_allowed(TOP)
        };
        findings.push(finding);
    }
    findings
}

/// Where in the spec a key at the top belongs, if another key at the top is the one around it.
fn lost_parent(map: &serde_json::Map<String, Value>, key: &str, row: &Kind) -> Option<String> {
    let fields = crd::spec_schema(row)?.get("properties")?.as_object()?;
    fields
        .iter()
        .filter(|(name, _)| map.contains_key(*name))
        .find(|(_, schema)| schema.get("properties").is_some_and(|p| p.get(key).is_some()))
        .map(|(name, _)| format!("spec.{name}"))
}

/// Field names, types, enumerations and bounds of a value against its schema.
fn walk(value: &Value, schema: &Value, path: &str, findings: &mut Vec<Diagnostic>) {
    if findings.len() >= MAX_FINDINGS || value.is_null() {
        return;
    }
    let wanted = schema.get("type").and_then(Value::as_str).unwrap_or_default();
    let flag = |key: &str| schema.get(key) == Some(&Value::Bool(true));
    if flag("x-kubernetes-int-or-string") {
        return;
    }
    let decode = |message: String| Diagnostic::new(Code::DECODE, Severity::Error, path, message);
    match (wanted, value) {
        ("object", Value::Object(map)) => object(map, schema, path, findings),
        ("array", Value::Array(items)) => {
            bound(schema, "maxItems", items.len(), "items", path, findings);
            if let Some(inner) = schema.get("items") {
                for (i, item) in items.iter().enumerate() {
                    walk(item, inner, &format!("{path}[{i}]"), findings);
                }
            }
        }
        ("array", other) => {
            let item = schema
                .get("items")
                .and_then(|s| s.get("type"))
                .and_then(Value::as_str)
                .unwrap_or("object");
            let empty = other.as_object().is_some_and(serde_json::Map::is_empty);
            let fits = match item {
                "object" => other.is_object(),
                "string" => scalar(other),
                _ => false,
            };
            let mut finding = decode(format!("must be a list, found {}", found(other)));
            let key = path.rsplit('.').next().unwrap_or(path);
            finding.hint = Some(Hint::Advice(if empty {
                format!(
                    "an empty map is no list: write \"{key}:\" with one item \"- {{}}\" below it to match everything, or leave it out to match nothing"
                )
            } else {
                format!("write it as an item: \"- \" in front of it, below \"{key}:\"")
            }));
            findings.push(finding.with_fix((fits && !empty).then_some(Fix::Wrap)));
        }
        ("object", other) => findings.push(
            decode(format!("must be a map, found {}", found(other))).with_allowed(
                schema
                    .get("properties")
                    .and_then(Value::as_object)
                    .into_iter()
                    .flat_map(|fields| fields.keys().cloned()),
            ),
        ),
        ("string", Value::String(text)) => string(text, schema, path, findings),
        ("string", other) => findings.push(
            decode(format!("must be a text, found {}", found(other)))
                .with_hint(scalar(other).then(|| Hint::Advice("put it in quotes".into())))
                .with_fix(scalar(other).then_some(Fix::Quote)),
        ),
        ("integer", Value::Number(n)) => {
            let limit = |key: &str| schema.get(key).and_then(Value::as_f64);
            let n = n.as_f64().unwrap_or_default();
            let (low, high) = (
                limit("minimum").unwrap_or(f64::MIN),
                limit("maximum").unwrap_or(f64::MAX),
            );
            if n.fract() != 0.0 || n < low || n > high {
                findings.push(decode(format!(
                    "must be a whole number from {low} to {high}, found {n}"
                )));
            }
        }
        ("boolean", Value::Bool(_)) | ("number", Value::Number(_)) | ("", _) => {}
        ("boolean", other) => {
            findings
                .push(decode(format!("must be true or false, found {}", found(other))).with_allowed(["true", "false"]));
        }
        ("integer" | "number", other) => findings.push(decode(format!("must be a number, found {}", found(other)))),
        _ => {}
    }
}

fn object(map: &serde_json::Map<String, Value>, schema: &Value, path: &str, findings: &mut Vec<Diagnostic>) {
    let keep = schema.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
    let properties = schema.get("properties").and_then(Value::as_object);
    let additional = schema.get("additionalProperties").filter(|a| a.is_object());
    bound(schema, "maxProperties", map.len(), "entries", path, findings);
    for required in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
        let Some(key) = required.as_str() else { continue };
        // A misspelt key is told as that.
        let misspelt = || {
            map.keys()
                .any(|k| nearest(k, [key]).is_some() && properties.is_none_or(|p| !p.contains_key(k)))
        };
        if map.get(key).is_none_or(Value::is_null) && !misspelt() {
            findings.push(Diagnostic::new(
                Code::DECODE,
                Severity::Error,
                format!("{path}.{key}"),
                format!("{key} is required"),
            ));
        }
    }
    if let Some(min) = schema.get("minProperties").and_then(Value::as_u64)
        && (map.len() as u64) < min
    {
        findings.push(Diagnostic::new(
            Code::DECODE,
            Severity::Error,
            path,
            format!("must have at least {min} entries"),
        ));
    }
    for (key, inner) in map {
        if findings.len() >= MAX_FINDINGS {
            return;
        }
        if let Some(inner_schema) = properties.and_then(|p| p.get(key)) {
            walk(inner, inner_schema, &format!("{path}.{key}"), findings);
        } else if let Some(inner_schema) = additional {
            walk(inner, inner_schema, &format!("{path}[{key}]"), findings);
        } else if !keep && properties.is_some() {
            let known: Vec<&str> = properties
                .into_iter()
                .flat_map(|p| p.keys().map(String::as_str))
                .collect();
            let near = nearest(key, known.iter().copied());
            let free = near.filter(|(name, only)| *only && !map.contains_key(*name));
            findings.push(
                Diagnostic::new(
                    Code::UNKNOWN_FIELD,
                    Severity::Error,
                    format!("{path}.{key}"),
                    format!("unknown field {key:?}"),
                )
                .with_hint(near.map(|(name, _)| Hint::DidYouMean(name.into())))
                .with_allowed(known)
                .with_fix(free.map(|_| Fix::RenameKey)),
            );
            // What is in it can be told already.
            if let Some(inner_schema) = free.and_then(|(name, _)| properties?.get(name)) {
                walk(inner, inner_schema, &format!("{path}.{key}"), findings);
            }
        }
    }
}

fn string(text: &str, schema: &Value, path: &str, findings: &mut Vec<Diagnostic>) {
    if let Some(finding) = typographic_quotes(text, path) {
        findings.push(finding);
        return;
    }
    if let Some(names) = schema.get("enum").and_then(Value::as_array) {
        let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
        if !names.contains(&text) {
            let near = nearest(text, names.iter().copied());
            findings.push(
                Diagnostic::new(Code::DECODE, Severity::Error, path, format!("unknown value {text:?}"))
                    .with_hint(near.map(|(name, _)| Hint::DidYouMean(name.into())))
                    .with_fix(near.filter(|(_, only)| *only).map(|_| Fix::Text))
                    .with_allowed(names),
            );
        }
        return;
    }
    bound(schema, "maxLength", text.chars().count(), "characters", path, findings);
    if schema
        .get("minLength")
        .and_then(Value::as_u64)
        .is_some_and(|min| (text.chars().count() as u64) < min)
    {
        findings.push(Diagnostic::new(
            Code::DECODE,
            Severity::Error,
            path,
            "must not be empty",
        ));
    }
}

/// A text between typographic quotes, as word processors and web pages make them.
pub(crate) fn typographic_quotes(text: &str, path: &str) -> Option<Diagnostic> {
    let inner = crate::repair::edit::unquoted(text)?;
    Some(
        Diagnostic::new(
            Code::TYPOGRAPHIC_QUOTES,
            Severity::Error,
            path,
            format!("the typographic quotes are part of the value {text:?}"),
        )
        .with_hint(Some(Hint::DidYouMean(inner.into())))
        .with_fix(Some(Fix::Text)),
    )
}

/// `max…` of a schema, in the API server's words.
fn bound(schema: &Value, key: &str, count: usize, what: &str, path: &str, findings: &mut Vec<Diagnostic>) {
    let Some(max) = schema.get(key).and_then(Value::as_u64) else {
        return;
    };
    if count as u64 > max {
        findings.push(Diagnostic::new(
            Code::DECODE,
            Severity::Error,
            path,
            format!("too many: {count}: must have at most {max} {what}"),
        ));
    }
}

fn scalar(value: &Value) -> bool {
    matches!(value, Value::String(_) | Value::Number(_) | Value::Bool(_))
}

/// What a value is, for messages.
fn found(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(b) => format!("the boolean {b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(text) if text.chars().count() <= 40 => format!("the text {text:?}"),
        Value::String(_) => "a text".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a map".into(),
    }
}

#[cfg(test)]
mod tests;
