//! Errors as the Kubernetes API tells them: a `Status` object with reason, code, details and causes.
//!
//! Made everywhere in this crate, written to the wire by `crate::http`. Texts are those of the Kubernetes API, because users
//! and programs match on them.

use serde_json::{Value, json};

use crate::store::StoreError;

/// One reason why an object is invalid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cause {
    /// `FieldValueInvalid`, `FieldValueRequired`, ...
    pub(crate) reason: &'static str,
    /// Path of the field.
    pub(crate) field: String,
    /// The text without the path.
    pub(crate) message: String,
}

impl Cause {
    /// `path: Invalid value: "v": why`
    pub(crate) fn invalid(field: impl Into<String>, value: &Value, why: impl std::fmt::Display) -> Self {
        let shown = match value {
            Value::Object(_) | Value::Array(_) => value.to_string(),
            Value::String(s) => format!("{s:?}"),
            other => other.to_string(),
        };
        Self {
            reason: "FieldValueInvalid",
            field: field.into(),
            message: format!("Invalid value: {shown}: {why}"),
        }
    }

    /// `path: Required value: why`
    pub(crate) fn required(field: impl Into<String>, why: &str) -> Self {
        let message = if why.is_empty() {
            "Required value".to_owned()
        } else {
            format!("Required value: {why}")
        };
        Self {
            reason: "FieldValueRequired",
            field: field.into(),
            message,
        }
    }

    /// `path: Unsupported value: "v": supported values: "a", "b"`
    pub(crate) fn not_supported(field: impl Into<String>, value: &Value, allowed: &[&str]) -> Self {
        let mut allowed: Vec<String> = allowed.iter().map(|a| format!("{a:?}")).collect();
        allowed.sort();
        let message = format!("Unsupported value: {value}: supported values: {}", allowed.join(", "));
        Self {
            reason: "FieldValueNotSupported",
            field: field.into(),
            message,
        }
    }

    /// `path: Duplicate value: "v"`
    pub(crate) fn duplicate(field: impl Into<String>, value: &Value) -> Self {
        Self {
            reason: "FieldValueDuplicate",
            field: field.into(),
            message: format!("Duplicate value: {value}"),
        }
    }

    /// `path: Forbidden: why`
    pub(crate) fn forbidden(field: impl Into<String>, why: &str) -> Self {
        Self {
            reason: "FieldValueForbidden",
            field: field.into(),
            message: format!("Forbidden: {why}"),
        }
    }

    /// `path: Too long: may not be more than n bytes`
    pub(crate) fn too_long(field: impl Into<String>, max: usize) -> Self {
        let message = format!("Too long: may not be more than {max} bytes");
        Self {
            reason: "FieldValueTooLong",
            field: field.into(),
            message,
        }
    }

    /// `path: Too many: n: must have at most m items`
    pub(crate) fn too_many(field: impl Into<String>, actual: usize, max: usize) -> Self {
        let message = format!("Too many: {actual}: must have at most {max} items");
        Self {
            reason: "FieldValueTooMany",
            field: field.into(),
            message,
        }
    }

    /// `path: Not found: "v"`
    pub(crate) fn not_found(field: impl Into<String>, value: &Value) -> Self {
        Self {
            reason: "FieldValueNotFound",
            field: field.into(),
            message: format!("Not found: {value}"),
        }
    }

    /// `path: Invalid value: "string": why`, as a schema's type error reads.
    pub(crate) fn type_invalid(field: impl Into<String>, shown: &str, why: impl std::fmt::Display) -> Self {
        Self {
            reason: "FieldValueTypeInvalid",
            field: field.into(),
            message: format!("Invalid value: {shown:?}: {why}"),
        }
    }
}

/// A failed request.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason; empty if there is none.
    pub reason: &'static str,
    /// Human-readable text.
    pub message: String,
    /// `Status.details`.
    pub details: Option<Box<Value>>,
}

/// The result of request handling.
pub(crate) type ApiResult<T> = Result<T, ApiError>;

fn details(group: &str, kind: &str, name: &str) -> Option<Box<Value>> {
    let mut d = serde_json::Map::new();
    for (key, value) in [("name", name), ("group", group), ("kind", kind)] {
        if !value.is_empty() {
            d.insert(key.into(), value.into());
        }
    }
    Some(Box::new(Value::Object(d)))
}

fn qualified(group: &str, resource: &str) -> String {
    if group.is_empty() {
        resource.to_owned()
    } else {
        format!("{resource}.{group}")
    }
}

impl ApiError {
    /// An error without details.
    pub(crate) fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: None,
        }
    }

    /// 400.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401.
    pub(crate) fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403 with a text of its own.
    pub(crate) fn forbidden(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let what = if name.is_empty() && resource.is_empty() {
            format!("forbidden: {why}")
        } else if name.is_empty() {
            format!("{} is forbidden: {why}", qualified(group, resource))
        } else {
            format!("{} {name:?} is forbidden: {why}", qualified(group, resource))
        };
        Self {
            code: 403,
            reason: "Forbidden",
            message: what,
            details: details(group, resource, name),
        }
    }

    /// 404 for one object.
    pub(crate) fn not_found(group: &str, resource: &str, name: &str) -> Self {
        let message = format!("{} {name:?} not found", qualified(group, resource));
        Self {
            code: 404,
            reason: "NotFound",
            message,
            details: details(group, resource, name),
        }
    }

    /// 404 for an object whose namespace does not exist; says so if it cannot exist.
    pub(crate) fn no_namespace(namespace: &str) -> Self {
        let mut error = Self::not_found("", "namespaces", namespace);
        let rule = crate::names::NameRule::Label;
        if !crate::names::name_errors(rule, namespace).is_empty() {
            error.message.push_str(" (no namespace can have this name");
            if let Some(near) = crate::names::near_name(rule, namespace) {
                error.message.push_str(&format!("; did you mean {near:?}?"));
            }
            error.message.push(')');
        }
        error
    }

    /// 404 for a path that nothing is served at.
    pub(crate) fn no_such_path() -> Self {
        Self {
            code: 404,
            reason: "NotFound",
            message: "the server could not find the requested resource".into(),
            details: Some(Box::new(json!({}))),
        }
    }

    /// 405.
    pub(crate) fn method_not_allowed() -> Self {
        Self::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )
    }

    /// 409 on create.
    pub(crate) fn already_exists(group: &str, resource: &str, name: &str) -> Self {
        let message = format!("{} {name:?} already exists", qualified(group, resource));
        Self {
            code: 409,
            reason: "AlreadyExists",
            message,
            details: details(group, resource, name),
        }
    }

    /// 409 on update.
    pub(crate) fn conflict(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let message = format!(
            "Operation cannot be fulfilled on {} {name:?}: {why}",
            qualified(group, resource)
        );
        Self {
            code: 409,
            reason: "Conflict",
            message,
            details: details(group, resource, name),
        }
    }

    /// 409 because the object moved on since the client read it.
    pub(crate) fn stale(group: &str, resource: &str, name: &str) -> Self {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(group, resource, name, why)
    }

    /// 422 with causes.
    pub(crate) fn invalid(group: &str, kind: &str, name: &str, causes: &[Cause]) -> Self {
        let lines: Vec<String> = causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        let text = match lines.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let kind_group = qualified(group, kind);
        let mut d = details(group, kind, name);
        if let Some(Value::Object(map)) = d.as_deref_mut() {
            let causes = causes
                .iter()
                .map(|c| json!({"reason": c.reason, "message": c.message, "field": c.field}))
                .collect::<Vec<_>>();
            map.insert("causes".into(), causes.into());
        }
        Self {
            code: 422,
            reason: "Invalid",
            message: format!("{kind_group} {name:?} is invalid: {text}"),
            details: d,
        }
    }

    /// 410: the client must list again.
    pub(crate) fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 413.
    pub(crate) fn too_large(limit: usize) -> Self {
        Self::new(
            413,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit}"),
        )
    }

    /// 415.
    pub(crate) fn unsupported_media_type(accepted: &[&str]) -> Self {
        let text = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Self::new(415, "UnsupportedMediaType", text)
    }

    /// 406.
    pub(crate) fn not_acceptable(accepted: &str) -> Self {
        Self::new(
            406,
            "NotAcceptable",
            format!("only the following media types are accepted: {accepted}"),
        )
    }

    /// 429.
    pub(crate) fn too_many_requests(message: &str) -> Self {
        let mut e = Self::new(429, "TooManyRequests", message);
        e.details = Some(Box::new(json!({"retryAfterSeconds": 1})));
        e
    }

    /// 500.
    pub(crate) fn internal(message: impl std::fmt::Display) -> Self {
        let text = message.to_string();
        let mut e = Self::new(500, "InternalError", format!("Internal error occurred: {text}"));
        e.details = Some(Box::new(json!({"causes": [{"message": text}]})));
        e
    }

    /// 504.
    pub(crate) fn timeout(message: impl Into<String>) -> Self {
        Self::new(504, "Timeout", message)
    }

    /// The `Status` object.
    pub(crate) fn status(&self) -> Value {
        let mut s = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message,
        });
        if !self.reason.is_empty() {
            s["reason"] = self.reason.into();
        }
        if let Some(d) = &self.details {
            s["details"] = (**d).clone();
        }
        s["code"] = self.code.into();
        s
    }
}

impl From<StoreError> for ApiError {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::Compacted { requested, oldest } => {
                Self::expired(format!("too old resource version: {requested} ({oldest})"))
            }
            StoreError::Future { requested, current } => {
                let mut e = Self::timeout(format!("Too large resource version: {requested}, current: {current}"));
                e.details = Some(Box::new(json!({
                    "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
                    "retryAfterSeconds": 1,
                })));
                e
            }
            StoreError::TooManyWatchers => Self::too_many_requests("too many watchers, please try again later"),
            StoreError::Conflict { key, .. } => Self::new(409, "Conflict", format!("concurrent change of {key}")),
            other => Self::internal(other),
        }
    }
}

/// A `Status` that reports success.
pub(crate) fn success_status(group: &str, resource: &str, name: &str, uid: &str) -> Value {
    let mut d = serde_json::Map::new();
    for (k, v) in [("name", name), ("group", group), ("kind", resource), ("uid", uid)] {
        if !v.is_empty() {
            d.insert(k.into(), v.into());
        }
    }
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": d})
}
