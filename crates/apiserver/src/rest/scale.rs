//! The scale subresource: replicas of anything that has them.

use http::Response;
use serde_json::{Value, json};

use super::write::{current, finish};
use super::{Cx, convert, read_document};
use crate::error::{ApiError, ApiResult, Cause};
use crate::http::{Body, content_type, json_response, read_body};
use crate::jsonpath::Path;
use crate::meta;
use crate::patch::Patch;

fn paths(cx: &Cx) -> (String, String, String) {
    let scale = cx.resource.custom.as_ref().and_then(|c| c.scale.clone()).unwrap_or_else(|| {
        json!({"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas", "labelSelectorPath": ".spec.selector"})
    });
    let text = |f: &str| scale[f].as_str().unwrap_or_default().to_owned();
    (
        text("specReplicasPath"),
        text("statusReplicasPath"),
        text("labelSelectorPath"),
    )
}

fn number(object: &Value, path: &str) -> i64 {
    Path::parse(path)
        .ok()
        .and_then(|p| p.find(object).first().and_then(|v| v.as_i64()))
        .unwrap_or(0)
}

fn selector_text(object: &Value, path: &str) -> String {
    let found = Path::parse(path)
        .ok()
        .and_then(|p| p.find(object).first().map(|v| (*v).clone()))
        .unwrap_or(Value::Null);
    match &found {
        Value::String(s) => s.clone(),
        Value::Object(_) => {
            let labels = if found["matchLabels"].is_object() {
                &found["matchLabels"]
            } else {
                &found
            };
            let mut parts: Vec<String> = labels
                .as_object()
                .into_iter()
                .flatten()
                .filter_map(|(k, v)| v.as_str().map(|v| format!("{k}={v}")))
                .collect();
            parts.sort();
            parts.join(",")
        }
        _ => String::new(),
    }
}

fn scale_of(cx: &Cx, object: &Value) -> Value {
    let (spec, status, selector) = paths(cx);
    let m = &object["metadata"];
    let mut status = json!({"replicas": number(object, &status)});
    let text = selector_text(object, &selector);
    if !text.is_empty() {
        status["selector"] = text.into();
    }
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {"name": m["name"], "namespace": m["namespace"], "uid": m["uid"], "resourceVersion": m["resourceVersion"],
            "creationTimestamp": m["creationTimestamp"]},
        "spec": {"replicas": number(object, &spec)}, "status": status,
    })
}

pub(super) fn get(cx: &Cx) -> ApiResult<Response<Body>> {
    let entry = current(cx, &cx.info.name)?;
    let object = convert::decode(&cx.resource, &entry)?;
    Ok(json_response(200, &scale_of(cx, &object)))
}

/// Writes the replicas that `change` wants into the object.
async fn write(cx: &mut Cx, change: impl Fn(&Value) -> ApiResult<Value>) -> ApiResult<Response<Body>> {
    let name = cx.info.name.clone();
    let (spec, _, _) = paths(cx);
    let path = Path::parse(&spec).map_err(ApiError::internal)?;
    for _ in 0..20 {
        let entry = current(cx, &name)?;
        let old = convert::decode(&cx.resource, &entry)?;
        let wanted = change(&scale_of(cx, &old))?;
        let version = meta::text(&wanted, "resourceVersion");
        if !version.is_empty() && version != entry.mod_rev.to_string() {
            return Err(ApiError::stale(&cx.resource.group, &cx.resource.plural, &name));
        }
        let replicas = match &wanted["spec"]["replicas"] {
            Value::Null => 0,
            v => v
                .as_i64()
                .filter(|n| i32::try_from(*n).is_ok())
                .ok_or_else(|| ApiError::bad_request("spec.replicas must be an integer"))?,
        };
        if replicas < 0 {
            let cause = Cause::invalid("spec.replicas", &json!(replicas), "must be greater than or equal to 0");
            return Err(ApiError::invalid("autoscaling", "Scale", &name, &[cause]));
        }
        let mut object = old.clone();
        path.set(&mut object, replicas.into());
        // The write is one to the main resource, under the scale permission that was already checked.
        let sub = std::mem::take(&mut cx.info.subresource);
        let done = finish(cx, &entry, old, object, "Update", None).await;
        cx.info.subresource = sub;
        if let Some(updated) = done? {
            return Ok(json_response(200, &scale_of(cx, &updated)));
        }
    }
    Err(ApiError::stale(&cx.resource.group, &cx.resource.plural, &name))
}

pub(super) async fn update(cx: &mut Cx, body: Body) -> ApiResult<Response<Body>> {
    let wanted = read_document(cx, body)
        .await?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    if wanted["kind"].as_str().is_some_and(|k| k != "Scale") {
        return Err(ApiError::bad_request("the body must be a Scale"));
    }
    write(cx, |_| Ok(wanted.clone())).await
}

pub(super) async fn patch(cx: &mut Cx, body: Body) -> ApiResult<Response<Body>> {
    let kind = content_type(&cx.headers);
    let bytes = read_body(body).await?;
    let parsed = Patch::parse(&kind, &bytes, false)?;
    let resource = cx.resource.clone();
    write(cx, |scale| match &parsed {
        Patch::Apply(intent) => {
            let mut next = scale.clone();
            next["spec"]["replicas"] = intent["spec"]["replicas"].clone();
            Ok(next)
        }
        p => p.apply(&resource, scale),
    })
    .await
}
