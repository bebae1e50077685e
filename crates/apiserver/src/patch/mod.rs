//! Patches: parsing by content type, applying to a document.
//!
//! JSON patch (RFC 6902) and merge patch (RFC 7386) come from a library; strategic merge (`strategic`) and server-side apply
//! (`managed`) are here. Pure.

pub(crate) mod keys;
pub(crate) mod managed;
mod strategic;

use serde_json::Value;

use crate::error::{ApiError, ApiResult};
use crate::http::{check_depth, parse_document};
use crate::resources::Resource;

/// A parsed patch.
#[derive(Debug, Clone)]
pub(crate) enum Patch {
    Json(json_patch::Patch),
    Merge(Value),
    Strategic(Value),
    /// The applied configuration.
    Apply(Value),
}

const TYPES: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/apply-patch+yaml",
];
const TYPES_BUILTIN: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];
/// Most operations of one JSON patch, as in kube-apiserver.
const MAX_OPERATIONS: usize = 10_000;

impl Patch {
    /// Parses a body by its content type. Custom resources have no strategic merge.
    pub(crate) fn parse(content_type: &str, body: &[u8], custom: bool) -> ApiResult<Self> {
        let unsupported = || ApiError::unsupported_media_type(if custom { TYPES } else { TYPES_BUILTIN });
        match content_type {
            "application/json-patch+json" => {
                let value = parse_document(body, "application/json")?;
                let patch: json_patch::Patch = serde_json::from_value(value)
                    .map_err(|e| ApiError::bad_request(format!("error decoding patch: {e}")))?;
                if patch.0.len() > MAX_OPERATIONS {
                    return Err(ApiError::new(
                        413,
                        "RequestEntityTooLarge",
                        format!(
                            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
                            patch.0.len()
                        ),
                    ));
                }
                Ok(Self::Json(patch))
            }
            "application/merge-patch+json" => Ok(Self::Merge(object(parse_document(body, "application/json")?)?)),
            "application/strategic-merge-patch+json" if custom => Err(unsupported()),
            "application/strategic-merge-patch+json" => {
                Ok(Self::Strategic(object(parse_document(body, "application/json")?)?))
            }
            "application/apply-patch+yaml" | "application/apply-patch+json" => {
                Ok(Self::Apply(object(parse_document(body, "application/yaml")?)?))
            }
            _ => Err(unsupported()),
        }
    }

    /// Applies to a document. Server-side apply does not come here.
    pub(crate) fn apply(&self, resource: &Resource, current: &Value) -> ApiResult<Value> {
        let mut next = current.clone();
        match self {
            Self::Json(patch) => {
                json_patch::patch(&mut next, patch).map_err(|e| {
                    ApiError::new(
                        422,
                        "Invalid",
                        format!("the server rejected our request due to an error in our request: {e}"),
                    )
                })?;
            }
            Self::Merge(patch) => json_patch::merge(&mut next, patch),
            Self::Strategic(patch) => next = strategic::apply(&resource.kind, current, patch)?,
            Self::Apply(_) => return Err(ApiError::internal("apply patches are merged elsewhere")),
        }
        check_depth(&next)?;
        if !next.is_object() {
            return Err(ApiError::bad_request("the patched document is not an object"));
        }
        Ok(next)
    }
}

fn object(value: Value) -> ApiResult<Value> {
    if value.is_object() {
        Ok(value)
    } else {
        Err(ApiError::bad_request("the patch must be an object"))
    }
}
