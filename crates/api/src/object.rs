//! Objects of Istio's kinds as read from JSON: metadata the mesh needs, and the typed spec.
//!
//! [`Object::from_value`] reads leniently, as is right for what the API server has stored: unknown fields are ignored, `null` is
//! absent (as protobuf's JSON has it). What does not decode is a [`ReadError`] that names object and field, and the caller has to
//! fail closed: a policy that is not understood denies on its target. [`Object::from_value_strict`] also refuses unknown fields.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::crd;
use crate::diagnostic::{Code, Diagnostic, Severity};
use crate::kind::{self, Kind};
use crate::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, Gateway, PeerAuthentication, ProxyConfigResource,
    RequestAuthentication, ServiceEntry, Sidecar, Telemetry, VirtualService, WasmPlugin, WorkloadEntry, WorkloadGroup,
};

/// A spec of one of Istio's kinds.
pub trait Spec: DeserializeOwned + Default + Clone + PartialEq + std::fmt::Debug {
    /// Its row in the table.
    const KIND: &'static Kind;

    /// Istio's rules for it. `raw` is the whole object as written, for rules that look at what decoding forgets.
    fn validate(&self, name: &str, namespace: &str, raw: &Value) -> Vec<Diagnostic>;
}

macro_rules! specs {
    ($($spec:ty => $row:ident, |$s:ident, $name:ident, $namespace:ident, $raw:ident| $validate:expr;)*) => {$(
        impl Spec for $spec {
            const KIND: &'static Kind = &kind::$row;
            fn validate(&self, $name: &str, $namespace: &str, $raw: &Value) -> Vec<Diagnostic> {
                let $s = self;
                $validate
            }
        }
    )*};
}

specs! {
    AuthorizationPolicy => AUTHORIZATION_POLICY, |s, name, ns, raw| crate::authorization_policy::validate::validate(s, name, ns, raw);
    PeerAuthentication => PEER_AUTHENTICATION, |s, _name, _ns, raw| crate::peer_authentication::validate(s, raw);
    RequestAuthentication => REQUEST_AUTHENTICATION, |s, _name, _ns, raw| crate::request_authentication::validate(s, raw);
    DestinationRule => DESTINATION_RULE, |s, _name, ns, raw| crate::destination_rule::validate(s, ns, raw);
    VirtualService => VIRTUAL_SERVICE, |s, _name, ns, raw| crate::virtual_service::validate(s, ns, raw);
    Gateway => GATEWAY, |s, _name, ns, raw| crate::gateway::validate(s, ns, raw);
    ServiceEntry => SERVICE_ENTRY, |s, _name, ns, raw| crate::service_entry::validate(s, ns, raw);
    Sidecar => SIDECAR, |s, _name, ns, raw| crate::sidecar::validate(s, ns, raw);
    WorkloadEntry => WORKLOAD_ENTRY, |_s, _name, _ns, _raw| Vec::new();
    WorkloadGroup => WORKLOAD_GROUP, |_s, _name, _ns, _raw| Vec::new();
    EnvoyFilter => ENVOY_FILTER, |_s, _name, _ns, _raw| Vec::new();
    ProxyConfigResource => PROXY_CONFIG, |s, _name, _ns, _raw| crate::validate::selector(s.selector.as_ref(), "spec.selector");
    Telemetry => TELEMETRY, |s, _name, _ns, _raw| crate::validate::selector(s.selector.as_ref(), "spec.selector");
    WasmPlugin => WASM_PLUGIN, |s, _name, _ns, _raw| crate::validate::selector(s.selector.as_ref(), "spec.selector");
}

/// Metadata the mesh reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Unique id.
    pub uid: String,
    /// Store revision of this version of the object.
    pub resource_version: String,
    /// Moves with each change of the spec.
    pub generation: i64,
    /// Seconds since the epoch; objects without one count as oldest.
    pub creation_seconds: i64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

impl Metadata {
    /// Reads the `metadata` of any object. Labels or annotations that are no texts are errors.
    pub fn from_value(object: &Value) -> Result<Self, String> {
        let Some(metadata) = object.get("metadata") else {
            return Ok(Self::default());
        };
        let text = |key: &str| {
            metadata
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_string()
        };
        let map = |key: &str| -> Result<BTreeMap<String, String>, String> {
            let Some(value) = metadata.get(key).filter(|v| !v.is_null()) else {
                return Ok(BTreeMap::new());
            };
            let entries = value
                .as_object()
                .ok_or_else(|| format!("metadata.{key} must be a map"))?;
            entries
                .iter()
                .map(|(k, v)| match v.as_str() {
                    Some(v) => Ok((k.clone(), v.to_string())),
                    None => Err(format!("metadata.{key}[{k}] must be a string")),
                })
                .collect()
        };
        let created = metadata.get("creationTimestamp").and_then(Value::as_str);
        let creation_seconds = match created {
            Some(t) => OffsetDateTime::parse(t, &Rfc3339)
                .map_err(|e| format!("metadata.creationTimestamp: {e}"))?
                .unix_timestamp(),
            None => 0,
        };
        Ok(Self {
            name: text("name"),
            namespace: text("namespace"),
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            generation: metadata.get("generation").and_then(Value::as_i64).unwrap_or_default(),
            creation_seconds,
            labels: map("labels")?,
            annotations: map("annotations")?,
        })
    }

    /// Key of "oldest first" (G1): age, then name, then namespace.
    pub fn age_key(&self) -> (i64, &str, &str) {
        (self.creation_seconds, &self.name, &self.namespace)
    }
}

/// An object of one kind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Object<S> {
    /// Who and when.
    pub metadata: Metadata,
    /// What.
    pub spec: S,
}

/// Why an object cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Not an object of the expected kind.
    #[error("unrecognized type {api_version}, Kind={kind}")]
    Kind {
        /// apiVersion found.
        api_version: String,
        /// kind found.
        kind: String,
    },
    /// Content of the right kind that does not decode.
    #[error("error decoding configuration: {kind} {namespace}/{name}: {path}: {message}")]
    Decode {
        /// Kind.
        kind: &'static str,
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
        /// Field.
        path: String,
        /// Reason.
        message: String,
    },
    /// Fields the kind does not have (strict reading only).
    #[error("{kind} {namespace}/{name}: {}", findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Unknown {
        /// Kind.
        kind: &'static str,
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
        /// One finding per field.
        findings: Vec<Diagnostic>,
    },
}

impl ReadError {
    /// The error as findings.
    pub fn diagnostics(&self) -> Vec<Diagnostic> {
        match self {
            ReadError::Kind { .. } => {
                vec![Diagnostic::new(
                    Code::UNKNOWN_KIND,
                    Severity::Error,
                    "kind",
                    self.to_string(),
                )]
            }
            ReadError::Decode { path, message, .. } => vec![Diagnostic::new(
                Code::DECODE,
                Severity::Error,
                path.clone(),
                format!("error decoding configuration: {path}: {message}"),
            )],
            ReadError::Unknown { findings, .. } => findings.clone(),
        }
    }
}

impl<S: Spec> Object<S> {
    /// Reads leniently. `apiVersion` and `kind` may be missing (items of a list have none).
    pub fn from_value(value: &Value) -> Result<Self, ReadError> {
        let api_version = value.get("apiVersion").and_then(Value::as_str);
        let kind = value.get("kind").and_then(Value::as_str);
        if kind.is_some_and(|k| k != S::KIND.kind) || api_version.is_some_and(|v| !S::KIND.serves(v)) {
            return Err(ReadError::Kind {
                api_version: api_version.unwrap_or_default().to_string(),
                kind: kind.unwrap_or_default().to_string(),
            });
        }
        let name_of = |key| {
            value
                .pointer(&format!("/metadata/{key}"))
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_string()
        };
        let decode = |path: String, message: String| ReadError::Decode {
            kind: S::KIND.kind,
            namespace: name_of("namespace"),
            name: name_of("name"),
            path,
            message,
        };
        let metadata = Metadata::from_value(value).map_err(|message| decode("metadata".into(), message))?;
        let spec = match value.get("spec") {
            None | Some(Value::Null) => S::default(),
            Some(spec) => {
                let mut spec = spec.clone();
                drop_nulls(&mut spec);
                if let Some((path, message)) = crd::shape_error_of(S::KIND, &spec) {
                    return Err(decode(path, message));
                }
                serde_path_to_error::deserialize(spec)
                    .map_err(|e| decode(format!("spec.{}", e.path()), e.inner().to_string()))?
            }
        };
        Ok(Self { metadata, spec })
    }

    /// Reads and refuses fields the kind does not have, naming the nearest known one.
    pub fn from_value_strict(value: &Value) -> Result<Self, ReadError> {
        let object = Self::from_value(value)?;
        let findings = crd::unknown_fields_of(S::KIND, value);
        if findings.is_empty() {
            return Ok(object);
        }
        Err(ReadError::Unknown {
            kind: S::KIND.kind,
            namespace: object.metadata.namespace,
            name: object.metadata.name,
            findings,
        })
    }
}

/// Removes map entries that are `null`, which protobuf's JSON treats as absent. Nulls inside lists stay (and do not decode).
pub fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lenient_and_strict() {
        let value = json!({
            "apiVersion": "security.istio.io/v1beta1", "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": "a", "creationTimestamp": "2026-01-02T03:04:05Z"},
            "spec": {"mtls": {"mode": "STRICT", "mod": 1}, "selector": null},
        });
        let object = Object::<PeerAuthentication>::from_value(&value).unwrap();
        assert_eq!(object.spec.mode(), crate::peer_authentication::MutualTlsMode::Strict);
        assert_eq!(object.metadata.creation_seconds, 1_767_323_045);
        let error = Object::<PeerAuthentication>::from_value_strict(&value).unwrap_err();
        assert!(error.to_string().contains("spec.mtls.mod"), "{error}");
        assert!(error.to_string().contains("\"mode\""), "{error}");
    }

    #[test]
    fn undecodable_names_object_and_field() {
        let value = json!({"metadata": {"name": "x", "namespace": "n"}, "spec": {"rules": [{"from": [{"source": {"principals": "a"}}]}]}});
        let error = Object::<AuthorizationPolicy>::from_value(&value)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("AuthorizationPolicy n/x") && error.contains("spec.rules[0].from[0].source.principals"),
            "{error}"
        );
        for spec in [
            json!({"action": "ALOW"}),
            json!({"rules": [null]}),
            json!({"rules": {}}),
            json!([]),
        ] {
            assert!(
                Object::<AuthorizationPolicy>::from_value(&json!({"spec": spec})).is_err(),
                "{spec}"
            );
        }
    }

    #[test]
    fn wrong_kind() {
        let value = json!({"apiVersion": "v1", "kind": "Pod"});
        assert!(matches!(
            Object::<Gateway>::from_value(&value),
            Err(ReadError::Kind { .. })
        ));
        let value = json!({"apiVersion": "security.istio.io/v9", "kind": "PeerAuthentication"});
        assert!(Object::<PeerAuthentication>::from_value(&value).is_err());
    }
}
