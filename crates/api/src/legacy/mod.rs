//! Istio's former security kinds: `authentication.istio.io/v1alpha1` and `rbac.istio.io/v1alpha1` (SEMANTICS 7a, 7b).
//!
//! Types here, [`mod@validate`] for their rules and for the warning that names the modern equivalent. Admission and the CLI call it;
//! `translate::legacy` gives the kinds their effect by converting them. It must not know Services or other objects.
//!
//! The kinds stem from a time without schemas. So field names are taken in both spellings that protobuf's JSON knew
//! (`triggerRules`, `trigger_rules`), `mtls:` without a value means `mtls: {}`, and nothing is pruned before [`mod@validate`] has seen it.

pub mod authn;
pub mod rbac;
pub(crate) mod schema;
mod validate;

use serde::de::DeserializeOwned;
use serde_json::Value;

pub use validate::{equivalent, validate};

use crate::kind::Kind;

/// Group of MeshPolicy and Policy.
pub const AUTHENTICATION: &str = "authentication.istio.io";
/// Group of the RBAC kinds.
pub const RBAC: &str = "rbac.istio.io";
/// Name that configuration for a whole scope must have.
pub const DEFAULT: &str = "default";

/// Whether a kind is one of the former ones.
pub fn is_legacy(kind: &Kind) -> bool {
    kind.group == AUTHENTICATION || kind.group == RBAC
}

/// Deepest nesting that is looked at; what is deeper is no object of these kinds.
const MAX_DEPTH: usize = 32;

/// Brings a spec as it was written into the form that the types read: one spelling of names, no null for an empty object.
/// The keys of `properties` are the user's own and stay.
pub fn normalize(spec: &Value) -> Value {
    fn walk(value: &Value, depth: usize) -> Value {
        if depth > MAX_DEPTH {
            return Value::Null;
        }
        match value {
            Value::Object(map) => Value::Object(
                map.iter()
                    .filter_map(|(key, inner)| {
                        if key == "mtls" && inner.is_null() {
                            return Some((key.clone(), Value::Object(serde_json::Map::new())));
                        }
                        if inner.is_null() {
                            return None;
                        }
                        let inner = if key == "properties" {
                            inner.clone()
                        } else {
                            walk(inner, depth + 1)
                        };
                        Some((camel(key), inner))
                    })
                    .collect(),
            ),
            Value::Array(items) => Value::Array(items.iter().map(|item| walk(item, depth + 1)).collect()),
            other => other.clone(),
        }
    }
    walk(spec, 0)
}

fn camel(key: &str) -> String {
    if !key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
        return key.to_string();
    }
    let mut out = String::with_capacity(key.len());
    let mut upper = false;
    for c in key.chars() {
        if c == '_' && !out.is_empty() {
            upper = true;
        } else if std::mem::take(&mut upper) {
            out.push(c.to_ascii_uppercase());
        } else {
            out.push(c);
        }
    }
    out
}

/// Reads the spec of an object of one of these kinds; an absent one is the default.
///
/// # Errors
/// Field path and reason of what does not decode. The caller fails closed on it.
pub fn read<T: DeserializeOwned + Default>(kind: &Kind, object: &Value) -> Result<T, (String, String)> {
    let Some(spec) = object.get("spec").filter(|s| !s.is_null()) else {
        return Ok(T::default());
    };
    let spec = normalize(spec);
    if let Some((path, message)) = crate::crd::shape_error_of(kind, &spec) {
        return Err((path, message));
    }
    serde_path_to_error::deserialize(spec).map_err(|e| (format!("spec.{}", e.path()), e.inner().to_string()))
}

#[cfg(test)]
mod tests;
