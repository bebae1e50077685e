//! Reviews (who am I, may I, is this token good) and token requests: answers that are not stored.

use http::Response;
use serde_json::{Value, json};

use super::{Cx, check_kind, convert, read_document};
use crate::auth::rbac::{Attributes, denial};
use crate::auth::{Identity, token};
use crate::error::{ApiError, ApiResult, Cause};
use crate::http::{Body, json_response};
use crate::meta;

fn strings(v: &Value) -> Vec<String> {
    v.as_array()
        .into_iter()
        .flatten()
        .filter_map(|s| s.as_str().map(str::to_owned))
        .collect()
}

/// POST of a review.
pub(super) async fn review(cx: &mut Cx, body: Body) -> ApiResult<Response<Body>> {
    let mut object = read_document(cx, body).await?.unwrap_or_else(|| json!({}));
    let r = cx.resource.clone();
    check_kind(&mut object, &r.group, &r.version, &r.kind)?;
    cx.normalize(&mut object)?;
    match r.kind.as_str() {
        "SelfSubjectReview" => object["status"] = json!({"userInfo": cx.user.user_info()}),
        "TokenReview" => token_review(cx, &mut object),
        "SelfSubjectAccessReview" => {
            let user = (*cx.user).clone();
            access_review(cx, &mut object, &user)?;
        }
        "SubjectAccessReview" | "LocalSubjectAccessReview" => {
            let spec = &object["spec"];
            let user = Identity {
                username: spec["user"].as_str().unwrap_or_default().to_owned(),
                uid: spec["uid"].as_str().unwrap_or_default().to_owned(),
                groups: strings(&spec["groups"]),
                ..Identity::default()
            };
            if user.username.is_empty() && user.groups.is_empty() {
                let cause = Cause::invalid(
                    "spec.user",
                    &json!(""),
                    "at least one of user or group must be specified",
                );
                return Err(cx.invalid("", &[cause]));
            }
            if r.kind == "LocalSubjectAccessReview"
                && spec["resourceAttributes"]["namespace"].as_str() != cx.info.namespace.as_deref()
            {
                let cause = Cause::invalid(
                    "spec.resourceAttributes.namespace",
                    &spec["resourceAttributes"]["namespace"],
                    "must match metadata.namespace",
                );
                return Err(cx.invalid("", &[cause]));
            }
            access_review(cx, &mut object, &user)?;
        }
        "SelfSubjectRulesReview" => {
            let namespace = object["spec"]["namespace"].as_str().unwrap_or_default().to_owned();
            if namespace.is_empty() {
                return Err(ApiError::bad_request("no namespace on request"));
            }
            let rules = cx.server.rbac()?.rules_for(&cx.user, &namespace);
            let (mut resource, mut other) = (vec![], vec![]);
            for rule in rules {
                if rule.urls.is_empty() {
                    let mut v = json!({"verbs": rule.verbs, "apiGroups": rule.groups, "resources": rule.resources});
                    if !rule.names.is_empty() {
                        v["resourceNames"] = json!(rule.names);
                    }
                    resource.push(v);
                } else {
                    other.push(json!({"verbs": rule.verbs, "nonResourceURLs": rule.urls}));
                }
            }
            object["status"] = json!({"resourceRules": resource, "nonResourceRules": other, "incomplete": false});
        }
        _ => return Err(ApiError::method_not_allowed()),
    }
    Ok(json_response(201, &object))
}

fn token_review(cx: &Cx, object: &mut Value) {
    let spec = &object["spec"];
    let text = spec["token"].as_str().unwrap_or_default();
    let asked = strings(&spec["audiences"]);
    let audiences = if asked.is_empty() {
        cx.server.config().api_audiences.clone()
    } else {
        asked
    };
    object["status"] = match token::authenticate(&cx.server, text, &audiences) {
        Ok((identity, matching)) => json!({"authenticated": true, "user": identity.user_info(), "audiences": matching}),
        // The reviewer learns why; the token's bearer does not.
        Err(why) => json!({"user": {}, "error": format!("[invalid bearer token, {why}]")}),
    };
}

fn access_review(cx: &Cx, object: &mut Value, user: &Identity) -> ApiResult<()> {
    let spec = &object["spec"];
    let (resource, other) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let attributes = match (resource.is_object(), other.is_object()) {
        (true, false) => Attributes {
            verb: text(&resource["verb"]),
            group: text(&resource["group"]),
            resource: text(&resource["resource"]),
            subresource: text(&resource["subresource"]),
            namespace: text(&resource["namespace"]),
            name: text(&resource["name"]),
            path: None,
        },
        (false, true) => Attributes {
            verb: text(&other["verb"]),
            path: Some(text(&other["path"])),
            ..Attributes::default()
        },
        _ => {
            let cause = Cause::invalid(
                "spec.resourceAttributes",
                &Value::Null,
                "exactly one of nonResourceAttributes or resourceAttributes must be specified",
            );
            return Err(cx.invalid("", &[cause]));
        }
    };
    object["status"] = match cx.server.rbac()?.authorize(user, &attributes) {
        Some(reason) if reason.is_empty() => json!({"allowed": true}),
        Some(reason) => json!({"allowed": true, "reason": reason}),
        None => json!({"allowed": false, "reason": denial(user, &attributes)}),
    };
    if object["status"]["allowed"] == false {
        object["status"].as_object_mut().map(|s| s.shift_remove("reason"));
    }
    Ok(())
}

const DEFAULT_SECONDS: i64 = 3600;
const MIN_SECONDS: i64 = 600;
const MAX_SECONDS: i64 = 1 << 32;

/// POST of a TokenRequest for a service account.
pub(super) async fn token_request(cx: &mut Cx, body: Body) -> ApiResult<Response<Body>> {
    let mut object = read_document(cx, body).await?.unwrap_or_else(|| json!({}));
    check_kind(&mut object, "authentication.k8s.io", "v1", "TokenRequest")?;
    let schema = crate::kinds::schema("authentication.k8s.io", "v1", "TokenRequest");
    if let Some((found, path, want)) = schema.and_then(|s| crate::schema::decode_error(&object, s, "")) {
        return Err(ApiError::bad_request(format!(
            "TokenRequest in version \"v1\" cannot be handled as a TokenRequest: json: cannot unmarshal {found} into Go struct field TokenRequest.{path} of type {want}"
        )));
    }
    let name = cx.info.name.clone();
    let namespace = cx.info.namespace.clone().unwrap_or_default();
    let account = convert::decode(&cx.resource, &super::write::current(cx, &name)?)?;
    let invalid = |cause: Cause| ApiError::invalid("authentication.k8s.io", "TokenRequest", &name, &[cause]);
    let mut audiences = strings(&object["spec"]["audiences"]);
    if audiences.is_empty() {
        audiences = cx.server.config().api_audiences.clone();
    }
    if audiences.len() > 32 || audiences.iter().any(|a| a.is_empty() || a.len() > 1024) {
        return Err(invalid(Cause::invalid(
            "spec.audiences",
            &json!(audiences),
            "want at most 32 audiences of 1 to 1024 bytes",
        )));
    }
    let seconds = match &object["spec"]["expirationSeconds"] {
        Value::Null => DEFAULT_SECONDS,
        v => v
            .as_i64()
            .ok_or_else(|| invalid(Cause::invalid("spec.expirationSeconds", v, "must be a number")))?,
    };
    if seconds < MIN_SECONDS {
        let why = "may not specify a duration less than 10 minutes";
        return Err(invalid(Cause::invalid("spec.expirationSeconds", &json!(seconds), why)));
    }
    if seconds > MAX_SECONDS {
        let why = "may not specify a duration larger than 2^32 seconds";
        return Err(invalid(Cause::invalid("spec.expirationSeconds", &json!(seconds), why)));
    }
    let reference = object["spec"]["boundObjectRef"].clone();
    let bound = if reference.is_object() {
        Some(bound_object(cx, &reference, &namespace, &name)?)
    } else {
        None
    };
    let (text, expires) = token::issue(
        &cx.server,
        &namespace,
        &name,
        meta::text(&account, "uid"),
        &audiences,
        seconds,
        bound.as_ref(),
    )
    .map_err(ApiError::internal)?;
    object["metadata"] = json!({"name": name, "namespace": namespace, "creationTimestamp": meta::now()});
    object["spec"]["audiences"] = json!(audiences);
    object["spec"]["expirationSeconds"] = seconds.into();
    object["status"] = json!({"token": text, "expirationTimestamp": meta::format_time(expires)});
    Ok(json_response(201, &object))
}

fn bound_object(cx: &Cx, reference: &Value, namespace: &str, account: &str) -> ApiResult<token::Bound> {
    let text = |f: &str| reference[f].as_str().unwrap_or_default().to_owned();
    let (kind, name, uid) = (text("kind"), text("name"), text("uid"));
    let plural = match (kind.as_str(), text("apiVersion").as_str()) {
        ("Pod", "v1") => "pods",
        ("Secret", "v1") => "secrets",
        _ => {
            return Err(ApiError::bad_request(format!(
                "cannot bind token for serviceaccount {account:?} to object of kind {kind:?}: only Pod and Secret are supported"
            )));
        }
    };
    let (entry, _) = cx.server.store().get(&format!("/core/{plural}/{namespace}/{name}"))?;
    let entry = entry.ok_or_else(|| ApiError::not_found("", plural, &name))?;
    let object: Value = serde_json::from_slice(&entry.value).map_err(ApiError::internal)?;
    let have = meta::text(&object, "uid").to_owned();
    if !uid.is_empty() && uid != have {
        let why = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(ApiError::conflict("", plural, &name, &why));
    }
    if plural == "pods" {
        let own = object["spec"]["serviceAccountName"].as_str().unwrap_or("default");
        if own != account {
            return Err(ApiError::bad_request(format!(
                "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
            )));
        }
    }
    let node = match object["spec"]["nodeName"]
        .as_str()
        .filter(|n| plural == "pods" && !n.is_empty())
    {
        Some(node) => {
            let uid = cx
                .server
                .store()
                .get(&format!("/core/nodes/{node}"))?
                .0
                .and_then(|e| serde_json::from_slice::<Value>(&e.value).ok());
            Some((
                node.to_owned(),
                uid.map(|n| meta::text(&n, "uid").to_owned()).unwrap_or_default(),
            ))
        }
        None => None,
    };
    Ok(token::Bound {
        kind,
        name,
        uid: have,
        node,
    })
}
