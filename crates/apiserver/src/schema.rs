//! Schemas over JSON documents: the structural schemas of custom resources, and the generated schemas of built-in kinds.
//!
//! Four walks: prune unknown fields (and name them), fill in defaults, decode-time type errors of built-in kinds, and value
//! validation of custom resources with the texts of the Kubernetes API. Pure; `$ref`s are resolved against one root document.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use regex::Regex;
use serde_json::{Map, Value, json};

use crate::error::Cause;

/// A schema and the document that its references point into.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Schema<'a> {
    root: &'a Value,
    node: &'a Value,
}

static NOTHING: Value = Value::Null;

impl<'a> Schema<'a> {
    /// A schema whose references are resolved in itself.
    pub(crate) fn new(root: &'a Value) -> Self {
        Self { root, node: root }
    }

    /// A node in a document of definitions.
    pub(crate) fn at(root: &'a Value, node: &'a Value) -> Self {
        Self { root, node }.resolved()
    }

    fn resolved(self) -> Self {
        let mut node = self.node;
        // Generated schemas nest a reference in allOf to add a description; a chain is never long.
        for _ in 0..8 {
            let reference = node["$ref"].as_str().or_else(|| match node["allOf"].as_array() {
                Some(all) if all.len() == 1 => all[0]["$ref"].as_str(),
                _ => None,
            });
            let Some(target) = reference
                .and_then(|r| r.strip_prefix('#'))
                .and_then(|r| self.root.pointer(r))
            else {
                break;
            };
            node = target;
        }
        Self { root: self.root, node }
    }

    /// The schema of a property; none if the schema does not know it.
    pub(crate) fn property(&self, name: &str) -> Option<Self> {
        self.node["properties"].get(name).map(|n| {
            Self {
                root: self.root,
                node: n,
            }
            .resolved()
        })
    }

    fn additional(&self) -> Option<Self> {
        match &self.node["additionalProperties"] {
            Value::Null | Value::Bool(false) => None,
            Value::Bool(true) => Some(Self {
                root: self.root,
                node: &NOTHING,
            }),
            node => Some(Self { root: self.root, node }.resolved()),
        }
    }

    fn items(&self) -> Option<Self> {
        match &self.node["items"] {
            Value::Null => None,
            node => Some(Self { root: self.root, node }.resolved()),
        }
    }

    fn flag(&self, name: &str) -> bool {
        self.node[name].as_bool() == Some(true)
    }

    fn kind(&self) -> &'a str {
        match &self.node["type"] {
            Value::String(s) => s,
            Value::Array(a) => a.iter().filter_map(Value::as_str).find(|s| *s != "null").unwrap_or(""),
            _ => "",
        }
    }

    fn int_or_string(&self) -> bool {
        self.flag("x-kubernetes-int-or-string") || self.node["format"].as_str() == Some("int-or-string")
    }

    /// A resource quantity, which the generated schemas describe like any integer or string.
    fn is_quantity(&self) -> bool {
        self.int_or_string()
            && self.node["description"]
                .as_str()
                .is_some_and(|d| d.starts_with("Quantity is"))
    }

    /// Anything goes below this node.
    fn open(&self) -> bool {
        self.flag("x-kubernetes-preserve-unknown-fields")
            || (self.node.get("properties").is_none()
                && self.node.get("additionalProperties").is_none()
                && matches!(self.kind(), "object" | ""))
    }
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() {
        field.to_owned()
    } else {
        format!("{path}.{field}")
    }
}

/// Removes fields that the schema does not know and returns their paths.
pub(crate) fn prune(value: &mut Value, schema: Schema<'_>, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            if schema.flag("x-kubernetes-embedded-resource") {
                // apiVersion, kind and metadata of an embedded object are implied.
                for (field, inner) in map.iter_mut() {
                    if let Some(p) = schema.property(field) {
                        prune(inner, p, &join(path, field), unknown);
                    }
                }
                return;
            }
            let additional = schema.additional();
            let open = schema.open();
            let mut gone = Vec::new();
            for (field, inner) in map.iter_mut() {
                if let Some(p) = schema.property(field).or(additional) {
                    prune(inner, p, &join(path, field), unknown);
                } else if !open {
                    gone.push(field.clone());
                }
            }
            for field in gone {
                unknown.push(join(path, &field));
                map.shift_remove(&field);
            }
        }
        Value::Array(list) => {
            if let Some(items) = schema.items() {
                for (i, inner) in list.iter_mut().enumerate() {
                    prune(inner, items, &format!("{path}[{i}]"), unknown);
                }
            }
        }
        _ => {}
    }
}

/// Fills in defaults; nulls of fields that are not nullable and have a default are replaced.
pub(crate) fn apply_defaults(value: &mut Value, schema: Schema<'_>) {
    match value {
        Value::Object(map) => {
            if let Some(properties) = schema.node["properties"].as_object() {
                for (field, node) in properties {
                    let p = Schema {
                        root: schema.root,
                        node,
                    }
                    .resolved();
                    let missing = match map.get(field) {
                        None => true,
                        Some(Value::Null) => !p.flag("nullable"),
                        Some(_) => false,
                    };
                    if missing && let Some(default) = p.node.get("default").or_else(|| node.get("default")) {
                        map.insert(field.clone(), default.clone());
                    }
                    if let Some(inner) = map.get_mut(field) {
                        apply_defaults(inner, p);
                    }
                }
            }
            if let Some(additional) = schema.additional() {
                let known = &schema.node["properties"];
                for (field, inner) in map.iter_mut() {
                    if known.get(field).is_none() {
                        apply_defaults(inner, additional);
                    }
                }
            }
        }
        Value::Array(list) => {
            if let Some(items) = schema.items() {
                for inner in list {
                    apply_defaults(inner, items);
                }
            }
        }
        _ => {}
    }
}

/// Whether a text is a quantity: a decimal number with a binary, decimal or exponent suffix.
fn is_quantity(text: &str) -> bool {
    let digits = text.trim_start_matches(['+', '-']);
    let end = digits
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(digits.len());
    let (number, suffix) = digits.split_at(end);
    let exponent = |s: &str| s.strip_prefix(['e', 'E']).is_some_and(|e| e.parse::<i32>().is_ok());
    text.len() - digits.len() <= 1
        && number.bytes().any(|b| b.is_ascii_digit())
        && number.bytes().filter(|b| *b == b'.').count() <= 1
        && (matches!(
            suffix,
            "" | "n" | "u" | "m" | "k" | "M" | "G" | "T" | "P" | "E" | "Ki" | "Mi" | "Gi" | "Ti" | "Pi" | "Ei"
        ) || exponent(suffix))
}

/// Removes nulls, which mean "absent" in built-in kinds, except where anything goes; quantities become texts.
pub(crate) fn strip_nulls(value: &mut Value, schema: Schema<'_>) {
    match value {
        Value::Number(n) if schema.is_quantity() => *value = Value::String(n.to_string()),
        Value::Object(map) => {
            let open = schema.open() && schema.node.get("properties").is_none();
            if !open {
                map.retain(|_, v| !v.is_null());
            }
            let additional = schema.additional();
            for (field, inner) in map.iter_mut() {
                if let Some(p) = schema.property(field).or(additional) {
                    strip_nulls(inner, p);
                }
            }
        }
        Value::Array(list) => {
            if let Some(items) = schema.items() {
                for inner in list {
                    strip_nulls(inner, items);
                }
            }
        }
        _ => {}
    }
}

fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The first type error of a built-in object: what was found, the field's path and the type wanted.
pub(crate) fn decode_error(value: &Value, schema: Schema<'_>, path: &str) -> Option<(String, String, String)> {
    if value.is_null() || schema.node.is_null() {
        return None;
    }
    let wrong = |want: &str| Some((json_kind(value).to_owned(), path.to_owned(), want.to_owned()));
    if schema.is_quantity() {
        let good = match value {
            Value::String(text) => is_quantity(text),
            other => other.is_number(),
        };
        return if good { None } else { wrong("resource.Quantity") };
    }
    if schema.int_or_string() {
        return (!value.is_string() && !value.is_i64()).then(|| {
            (
                json_kind(value).to_owned(),
                path.to_owned(),
                "intstr.IntOrString".to_owned(),
            )
        });
    }
    match (schema.kind(), value) {
        ("object", Value::Object(map)) => {
            let additional = schema.additional();
            map.iter().find_map(|(field, inner)| {
                let p = schema.property(field).or(additional)?;
                decode_error(inner, p, &join(path, field))
            })
        }
        ("object", _) => wrong(if schema.additional().is_some() { "map" } else { "object" }),
        ("array", Value::Array(list)) => {
            let items = schema.items()?;
            list.iter().find_map(|inner| decode_error(inner, items, path))
        }
        ("array", _) => wrong("[]"),
        ("string", Value::String(_)) => None,
        ("string", _) => wrong("string"),
        ("boolean", Value::Bool(_)) => None,
        ("boolean", _) => wrong("bool"),
        ("integer", Value::Number(n)) => {
            let int32 = schema.node["format"].as_str() == Some("int32");
            let fits = match n.as_i64() {
                Some(i) => !int32 || i32::try_from(i).is_ok(),
                None => n.as_f64().is_some_and(|f| f.fract() == 0.0 && f.abs() < 9e15),
            };
            if fits {
                None
            } else {
                Some((
                    format!("number {n}"),
                    path.to_owned(),
                    if int32 { "int32" } else { "int64" }.to_owned(),
                ))
            }
        }
        ("integer", _) => wrong(if schema.node["format"].as_str() == Some("int32") {
            "int32"
        } else {
            "int64"
        }),
        ("number", Value::Number(_)) => None,
        ("number", _) => wrong("float64"),
        _ => None,
    }
}

fn pattern(text: &str) -> Option<Arc<Regex>> {
    type Cache = Mutex<HashMap<String, Option<Arc<Regex>>>>;
    static CACHE: OnceLock<Cache> = OnceLock::new();
    let mut cache = CACHE
        .get_or_init(Cache::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if cache.len() > 4096 {
        cache.clear();
    }
    cache
        .entry(text.to_owned())
        .or_insert_with(|| Regex::new(text).ok().map(Arc::new))
        .clone()
}

/// Whether a pattern of a schema can be compiled.
pub(crate) fn pattern_ok(text: &str) -> bool {
    pattern(text).is_some()
}

fn shown_kind(value: &Value) -> &'static str {
    match value {
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        other => json_kind(other),
    }
}

/// Validates a custom resource's value and appends what is wrong.
pub(crate) fn validate(value: &Value, schema: Schema<'_>, path: &str, causes: &mut Vec<Cause>) {
    if causes.len() > 100 || schema.node.is_null() {
        return;
    }
    let here = || {
        if path.is_empty() {
            "<nil>".to_owned()
        } else {
            path.to_owned()
        }
    };
    if value.is_null() {
        if !schema.flag("nullable") && !schema.kind().is_empty() {
            let why = format!("{path} in body must be of type {}: \"null\"", schema.kind());
            causes.push(Cause::type_invalid(here(), "null", why));
        }
        return;
    }
    if schema.int_or_string() {
        if !value.is_string() && !value.is_i64() && !value.is_u64() {
            let why = format!("{path} in body must be of type integer,string: {:?}", shown_kind(value));
            causes.push(Cause::type_invalid(here(), shown_kind(value), why));
            return;
        }
    } else {
        let fits = match schema.kind() {
            "" => true,
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0),
            "number" => value.is_number(),
            _ => true,
        };
        if !fits {
            let why = format!(
                "{path} in body must be of type {}: {:?}",
                schema.kind(),
                shown_kind(value)
            );
            causes.push(Cause::type_invalid(here(), shown_kind(value), why));
            return;
        }
    }
    if let Some(allowed) = schema.node["enum"].as_array()
        && !allowed.contains(value)
    {
        let texts: Vec<String> = allowed
            .iter()
            .map(|a| a.as_str().map_or_else(|| a.to_string(), str::to_owned))
            .collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        causes.push(Cause::not_supported(here(), value, &texts));
    }
    match value {
        Value::String(s) => validate_string(s, value, schema, path, causes),
        Value::Number(_) => validate_number(value, schema, path, causes),
        Value::Array(list) => {
            if let Some(max) = schema.node["maxItems"].as_u64()
                && list.len() as u64 > max
            {
                causes.push(Cause::too_many(here(), list.len(), max as usize));
            }
            if let Some(min) = schema.node["minItems"].as_u64()
                && (list.len() as u64) < min
            {
                causes.push(Cause::invalid(
                    here(),
                    &json!(list.len()),
                    format!("{path} in body should have at least {min} items"),
                ));
            }
            validate_list_type(list, schema, path, causes);
            if let Some(items) = schema.items() {
                for (i, inner) in list.iter().enumerate() {
                    validate(inner, items, &format!("{path}[{i}]"), causes);
                }
            }
        }
        Value::Object(map) => validate_object(map, schema, path, causes),
        _ => {}
    }
    validate_junctors(value, schema, path, causes);
}

fn validate_object(map: &Map<String, Value>, schema: Schema<'_>, path: &str, causes: &mut Vec<Cause>) {
    let count = map.len() as u64;
    if let Some(max) = schema.node["maxProperties"].as_u64()
        && count > max
    {
        causes.push(Cause::too_many(path, map.len(), max as usize));
    }
    if let Some(min) = schema.node["minProperties"].as_u64()
        && count < min
    {
        causes.push(Cause::invalid(
            path,
            &json!(count),
            format!("{path} in body should have at least {min} properties"),
        ));
    }
    for required in schema.node["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        if !map.contains_key(required) {
            causes.push(Cause::required(join(path, required), ""));
        }
    }
    let additional = schema.additional();
    for (field, inner) in map {
        if let Some(p) = schema.property(field).or(additional) {
            validate(inner, p, &join(path, field), causes);
        }
    }
}

fn validate_string(s: &str, value: &Value, schema: Schema<'_>, path: &str, causes: &mut Vec<Cause>) {
    let chars = s.chars().count() as u64;
    if let Some(max) = schema.node["maxLength"].as_u64()
        && chars > max
    {
        causes.push(Cause::too_long(path, max as usize));
    }
    if let Some(min) = schema.node["minLength"].as_u64()
        && chars < min
    {
        causes.push(Cause::invalid(
            path,
            value,
            format!("{path} in body should be at least {min} chars long"),
        ));
    }
    if let Some(text) = schema.node["pattern"].as_str() {
        // A pattern that does not compile matches nothing: fail closed.
        if !pattern(text).is_some_and(|re| re.is_match(s)) {
            causes.push(Cause::invalid(
                path,
                value,
                format!("{path} in body should match '{text}'"),
            ));
        }
    }
    let format = schema.node["format"].as_str().unwrap_or_default();
    let good = match format {
        "date-time" => crate::meta::parse_time(s).is_some(),
        "ipv4" => s.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => s.parse::<std::net::Ipv6Addr>().is_ok(),
        "byte" => base64::Engine::decode(&base64::engine::general_purpose::STANDARD, s).is_ok(),
        _ => true,
    };
    if !good {
        causes.push(Cause::invalid(
            path,
            value,
            format!("{path} in body must be of type {format}: {s:?}"),
        ));
    }
}

fn validate_number(value: &Value, schema: Schema<'_>, path: &str, causes: &mut Vec<Cause>) {
    let Some(n) = value.as_f64() else { return };
    if let Some(max) = schema.node["maximum"].as_f64() {
        let exclusive = schema.flag("exclusiveMaximum");
        if n > max || (exclusive && n == max) {
            let or_equal = if exclusive { "" } else { " or equal to" };
            let why = format!(
                "{path} in body should be less than{or_equal} {}",
                schema.node["maximum"]
            );
            causes.push(Cause::invalid(path, value, why));
        }
    }
    if let Some(min) = schema.node["minimum"].as_f64() {
        let exclusive = schema.flag("exclusiveMinimum");
        if n < min || (exclusive && n == min) {
            let or_equal = if exclusive { "" } else { " or equal to" };
            let why = format!(
                "{path} in body should be greater than{or_equal} {}",
                schema.node["minimum"]
            );
            causes.push(Cause::invalid(path, value, why));
        }
    }
    if let Some(step) = schema.node["multipleOf"].as_f64()
        && step > 0.0
        && (n / step).fract() != 0.0
    {
        causes.push(Cause::invalid(
            path,
            value,
            format!("{path} in body should be a multiple of {}", schema.node["multipleOf"]),
        ));
    }
    if schema.node["format"].as_str() == Some("int32") && value.as_i64().is_some_and(|i| i32::try_from(i).is_err()) {
        causes.push(Cause::invalid(
            path,
            value,
            format!("{path} in body must be of type int32: {value}"),
        ));
    }
}

fn validate_list_type(list: &[Value], schema: Schema<'_>, path: &str, causes: &mut Vec<Cause>) {
    let mut seen = std::collections::HashSet::new();
    match schema.node["x-kubernetes-list-type"].as_str() {
        Some("set") => {
            for (i, item) in list.iter().enumerate() {
                if !seen.insert(item.to_string()) {
                    causes.push(Cause::duplicate(format!("{path}[{i}]"), item));
                }
            }
        }
        Some("map") => {
            let keys: Vec<&str> = schema.node["x-kubernetes-list-map-keys"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .collect();
            for (i, item) in list.iter().enumerate() {
                let key: Map<String, Value> = keys
                    .iter()
                    .filter_map(|k| item.get(k).map(|v| ((*k).to_owned(), v.clone())))
                    .collect();
                let key = Value::Object(key);
                if !seen.insert(key.to_string()) {
                    causes.push(Cause::duplicate(format!("{path}[{i}]"), &key));
                }
            }
        }
        _ => {
            if schema.flag("uniqueItems") {
                for (i, item) in list.iter().enumerate() {
                    if !seen.insert(item.to_string()) {
                        causes.push(Cause::duplicate(format!("{path}[{i}]"), item));
                    }
                }
            }
        }
    }
}

fn validate_junctors(value: &Value, schema: Schema<'_>, path: &str, causes: &mut Vec<Cause>) {
    let holds = |node: &Value| {
        let mut inner = Vec::new();
        validate(
            value,
            Schema {
                root: schema.root,
                node,
            }
            .resolved(),
            path,
            &mut inner,
        );
        inner.is_empty()
    };
    let mut fail = |why: String| {
        causes.push(Cause {
            reason: "FieldValueInvalid",
            field: "<nil>".into(),
            message: format!("Invalid value: \"\": {why}"),
        })
    };
    if let Some(all) = schema.node["anyOf"].as_array()
        && !all.is_empty()
        && !all.iter().any(holds)
    {
        fail(format!("\"{path}\" must validate at least one schema (anyOf)"));
    }
    if let Some(all) = schema.node["oneOf"].as_array()
        && !all.is_empty()
    {
        match all.iter().filter(|n| holds(n)).count() {
            1 => {}
            0 => fail(format!(
                "\"{path}\" must validate one and only one schema (oneOf). Found none valid"
            )),
            n => fail(format!(
                "\"{path}\" must validate one and only one schema (oneOf). Found {n} valid alternatives"
            )),
        }
    }
    if let Some(node) = schema.node.get("not")
        && holds(node)
    {
        fail(format!("\"{path}\" must not validate the schema (not)"));
    }
    if let Some(all) = schema.node["allOf"].as_array() {
        for node in all {
            validate(
                value,
                Schema {
                    root: schema.root,
                    node,
                }
                .resolved(),
                path,
                causes,
            );
        }
    }
}

/// Names of the fields at a path like `spec.template.spec`, for did-you-mean.
pub(crate) fn siblings(schema: Schema<'_>, path: &str) -> Vec<String> {
    let mut at = schema;
    let parts: Vec<&str> = path.split('.').collect();
    for part in &parts[..parts.len().saturating_sub(1)] {
        let field = part.split('[').next().unwrap_or_default();
        let Some(mut next) = at.property(field).or_else(|| at.additional()) else {
            return vec![];
        };
        if part.contains('[') {
            let Some(items) = next.items() else { return vec![] };
            next = items;
        }
        at = next;
    }
    at.node["properties"]
        .as_object()
        .map(|m| m.keys().cloned().collect())
        .unwrap_or_default()
}

/// The field name closest to a misspelt one, if one is close enough.
pub(crate) fn did_you_mean(wrong: &str, known: &[String]) -> Option<String> {
    let lower = wrong.to_lowercase();
    known
        .iter()
        .map(|k| (distance(&lower, &k.to_lowercase()), k))
        .filter(|(d, k)| *d <= 1 + k.len().min(wrong.len()) / 4)
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k.clone())
}

/// Edit distance with transpositions counted as two steps.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(128).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(128).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let cost = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
