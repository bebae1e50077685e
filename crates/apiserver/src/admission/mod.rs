//! Admission webhooks: which are asked, what they are sent, what their answers mean.
//!
//! Called by the write pipeline after defaults, before validation. Calls go through `call`, connections through `dial`. A webhook
//! that cannot be asked fails the request unless its policy says to ignore it.

mod call;
pub(crate) mod dial;

use std::sync::Arc;

use serde_json::{Value, json};

use crate::cache::Cached;
use crate::error::{ApiError, ApiResult};
use crate::meta;
use crate::resources::Resource;
use crate::rest::Cx;
use crate::selector::LabelSelector;
use crate::store::{Store, StoreError};

use dial::{Dial, DirectDialer};

const GROUP: &str = "admissionregistration.k8s.io";

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Create,
    Update,
    Delete,
}

impl Operation {
    fn text(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Delete => "DELETE",
        }
    }
}

/// The circumstances of a write.
pub(crate) struct Review<'a> {
    pub(crate) operation: Operation,
    pub(crate) subresource: &'a str,
    pub(crate) old: Option<&'a Value>,
    pub(crate) dry_run: bool,
    pub(crate) options: Value,
}

/// The webhooks of all configurations.
pub(crate) struct Webhooks {
    mutating: Cached<Vec<Value>>,
    validating: Cached<Vec<Value>>,
    pub(crate) dialer: Arc<dyn Dial>,
}

fn load(plural: &'static str) -> Cached<Vec<Value>> {
    let prefix = format!("/{GROUP}/{plural}/");
    Cached::new(
        vec![prefix.clone()],
        move |store: &dyn Store| -> Result<Vec<Value>, StoreError> {
            // Configurations in the order of their names (the store's order), webhooks in the order written.
            let snapshot = store.range(&prefix, None, 0)?;
            let mut out = Vec::new();
            for entry in &snapshot.entries {
                if let Ok(config) = serde_json::from_slice::<Value>(&entry.value) {
                    out.extend(config["webhooks"].as_array().cloned().unwrap_or_default());
                }
            }
            Ok(out)
        },
    )
}

impl Webhooks {
    pub(crate) fn new(dialer: Option<Arc<dyn Dial>>) -> Self {
        Self {
            mutating: load("mutatingwebhookconfigurations"),
            validating: load("validatingwebhookconfigurations"),
            dialer: dialer.unwrap_or_else(|| Arc::new(DirectDialer)),
        }
    }
}

fn texts(v: &Value) -> impl Iterator<Item = &str> {
    v.as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// The version under which a webhook wants to see the object; none if its rules do not match.
fn matching_version(cx: &Cx, hook: &Value, review: &Review<'_>) -> Option<String> {
    let r = &cx.resource;
    let equivalent = hook["matchPolicy"].as_str() != Some("Exact");
    let mut other = None;
    for rule in hook["rules"].as_array().into_iter().flatten() {
        let any = |list: &Value, wanted: &str| texts(list).any(|x| x == "*" || x == wanted);
        let scope = match rule["scope"].as_str() {
            Some("Namespaced") => r.namespaced,
            Some("Cluster") => !r.namespaced,
            _ => true,
        };
        let resource = texts(&rule["resources"]).any(|x| match x.split_once('/') {
            None => review.subresource.is_empty() && (x == "*" || x == r.plural),
            Some((res, sub)) => {
                (res == "*" || res == r.plural)
                    && (sub == review.subresource || (sub == "*" && (res == "*" || !review.subresource.is_empty())))
            }
        });
        if !scope
            || !resource
            || !any(&rule["operations"], review.operation.text())
            || !any(&rule["apiGroups"], &r.group)
        {
            continue;
        }
        if any(&rule["apiVersions"], &r.version) {
            return Some(r.version.clone());
        }
        if equivalent && other.is_none() {
            other = texts(&rule["apiVersions"]).next().map(str::to_owned);
        }
    }
    // Another version of the same resource, if it is served.
    let other = other?;
    cx.server
        .registry()
        .ok()?
        .get(&r.group, &other, &r.plural)
        .map(|_| other)
}

/// Whether the selectors of a webhook select the object.
fn selected(cx: &Cx, hook: &Value, object: Option<&Value>, old: Option<&Value>) -> ApiResult<bool> {
    if let Some(selector) = hook.get("objectSelector").filter(|s| s.is_object()) {
        let selector = LabelSelector::from_object(selector)?;
        let hit = |o: Option<&Value>| o.is_some_and(|o| selector.matches(o));
        if !selector.is_empty() && !hit(object) && !hit(old) {
            return Ok(false);
        }
    }
    let Some(selector) = hook.get("namespaceSelector").filter(|s| s.is_object()) else {
        return Ok(true);
    };
    let selector = LabelSelector::from_object(selector)?;
    if selector.is_empty() {
        return Ok(true);
    }
    let r = &cx.resource;
    if r.group.is_empty() && r.kind == "Namespace" {
        return Ok(object.or(old).is_some_and(|o| selector.matches(o)));
    }
    let Some(namespace) = cx.namespace() else {
        return Ok(true);
    };
    let (entry, _) = cx.server.store().get(&format!("/core/namespaces/{namespace}"))?;
    let labels = match entry {
        Some(e) => serde_json::from_slice::<Value>(&e.value).map_err(ApiError::internal)?["metadata"]["labels"].clone(),
        None => return Err(ApiError::no_namespace(namespace)),
    };
    Ok(selector.matches_labels(&labels))
}

/// Webhooks never see the objects that configure them, or a broken one could not be removed.
fn exempt(r: &Resource) -> bool {
    r.group == GROUP
}

struct Chosen<'a> {
    hook: &'a Value,
    version: String,
}

fn choose<'a>(
    cx: &Cx,
    hooks: &'a [Value],
    review: &Review<'_>,
    object: Option<&Value>,
) -> ApiResult<Vec<(usize, Chosen<'a>)>> {
    let mut out = Vec::new();
    for (i, hook) in hooks.iter().enumerate() {
        let Some(version) = matching_version(cx, hook, review) else {
            continue;
        };
        if selected(cx, hook, object, review.old)? {
            out.push((i, Chosen { hook, version }));
        }
    }
    Ok(out)
}

/// Runs the mutating webhooks; returns the object and whether it changed.
pub(crate) async fn mutate(cx: &mut Cx, review: &Review<'_>, mut object: Value) -> ApiResult<(Value, bool)> {
    if exempt(&cx.resource) {
        return Ok((object, false));
    }
    let hooks = cx.server.webhooks.mutating.get(cx.server.store())?;
    if hooks.is_empty() {
        return Ok((object, false));
    }
    let mut changed = false;
    // For each webhook asked: how many changes had been made when it answered.
    let mut seen: Vec<(usize, usize)> = Vec::new();
    let mut changes = 0;
    for round in 0..2 {
        for (i, hook) in hooks.iter().enumerate() {
            let before = seen.iter().find(|(j, _)| *j == i).map(|(_, c)| *c);
            let again = hook["reinvocationPolicy"].as_str() == Some("IfNeeded") && before.is_some_and(|c| c < changes);
            if round == 1 && !again {
                continue;
            }
            // Selection looks at the object as it is now: an earlier webhook may have labelled it.
            let chosen = choose(cx, std::slice::from_ref(hook), review, Some(&object))?;
            let Some((_, chosen)) = chosen.into_iter().next() else {
                continue;
            };
            let Some(answer) = ask(cx, &chosen, review, Some(&object)).await? else {
                continue;
            };
            if let Some(patch) = &answer.patch {
                let next = apply_patch(hook, patch, &object, &chosen.version, &cx.resource)?;
                if next != object {
                    object = next;
                    changed = true;
                    changes += 1;
                }
            }
            seen.retain(|(j, _)| *j != i);
            seen.push((i, changes));
        }
        if changes == 0 {
            break;
        }
    }
    Ok((object, changed))
}

fn apply_patch(hook: &Value, patch: &Value, object: &Value, version: &str, r: &Resource) -> ApiResult<Value> {
    let name = hook["name"].as_str().unwrap_or_default();
    let bad = |why: String| ApiError::internal(format!("failed calling webhook {name:?}: {why}"));
    let operations: json_patch::Patch =
        serde_json::from_value(patch.clone()).map_err(|e| bad(format!("patch is not a JSON patch: {e}")))?;
    if operations.0.len() > 10_000 {
        return Err(bad("patch has more than 10000 operations".into()));
    }
    let mut next = object.clone();
    if version != r.version {
        next["apiVersion"] = crate::resources::join_gv(&r.group, version).into();
    }
    json_patch::patch(&mut next, &operations).map_err(|e| bad(format!("patch does not apply: {e}")))?;
    if !next.is_object() {
        return Err(bad("the patched document is not an object".into()));
    }
    next["apiVersion"] = r.api_version().into();
    crate::http::check_depth(&next)?;
    for fixed in ["name", "namespace", "uid"] {
        if next["metadata"][fixed] != object["metadata"][fixed]
            && !(fixed == "name" && object["metadata"][fixed].is_null())
        {
            return Err(bad(format!("patch must not change metadata.{fixed}")));
        }
    }
    Ok(next)
}

/// Runs the validating webhooks, all at once.
pub(crate) async fn validate(cx: &mut Cx, review: &Review<'_>, object: Option<&Value>) -> ApiResult<()> {
    if exempt(&cx.resource) {
        return Ok(());
    }
    let hooks = cx.server.webhooks.validating.get(cx.server.store())?;
    if hooks.is_empty() {
        return Ok(());
    }
    let chosen = choose(cx, &hooks, review, object)?;
    let shared: &Cx = cx;
    let mut calls: Vec<futures::future::BoxFuture<'_, ApiResult<Option<Answer>>>> = Vec::new();
    for (_, c) in &chosen {
        calls.push(Box::pin(ask_quietly(shared, c, review, object)));
    }
    let answers = futures::future::join_all(calls).await;
    let mut warnings = Vec::new();
    let mut first = None;
    for answer in answers {
        match answer {
            Ok(Some(answer)) => warnings.extend(answer.warnings),
            Ok(None) => {}
            Err(e) => {
                first.get_or_insert(e);
            }
        }
    }
    cx.warnings.extend(warnings);
    first.map_or(Ok(()), Err)
}

/// A webhook's answer that allows.
struct Answer {
    patch: Option<Value>,
    warnings: Vec<String>,
}

async fn ask(
    cx: &mut Cx,
    chosen: &Chosen<'_>,
    review: &Review<'_>,
    object: Option<&Value>,
) -> ApiResult<Option<Answer>> {
    let answer = ask_quietly(cx, chosen, review, object).await?;
    if let Some(a) = &answer {
        cx.warnings.extend(a.warnings.iter().cloned());
    }
    Ok(answer)
}

/// Asks one webhook. `None`: it could not be asked and its policy says to ignore that.
async fn ask_quietly(
    cx: &Cx,
    chosen: &Chosen<'_>,
    review: &Review<'_>,
    object: Option<&Value>,
) -> ApiResult<Option<Answer>> {
    let hook = chosen.hook;
    let name = hook["name"].as_str().unwrap_or_default();
    if review.dry_run && !matches!(hook["sideEffects"].as_str(), Some("None" | "NoneOnDryRun")) {
        return Err(ApiError::bad_request(format!(
            "admission webhook {name:?} does not support dry run"
        )));
    }
    let uid = crate::names::new_uid();
    let body = request(cx, chosen, review, object, &uid);
    match call::post(cx, hook, &body)
        .await
        .and_then(|reply| check_reply(&reply, &uid))
    {
        Ok(response) => {
            if response["allowed"] != true {
                return Err(denied(name, &response["status"]));
            }
            let patch = match response["patch"].as_str() {
                None | Some("") => None,
                Some(text) => {
                    if response["patchType"].as_str() != Some("JSONPatch") {
                        let why = format!(
                            "failed calling webhook {name:?}: webhook returned response.patchType but it is not JSONPatch"
                        );
                        return Err(ApiError::internal(why));
                    }
                    let bytes =
                        base64::Engine::decode(&base64::engine::general_purpose::STANDARD, text).map_err(|e| {
                            ApiError::internal(format!("failed calling webhook {name:?}: patch is not base64: {e}"))
                        })?;
                    Some(serde_json::from_slice(&bytes).map_err(|e| {
                        ApiError::internal(format!("failed calling webhook {name:?}: patch is not JSON: {e}"))
                    })?)
                }
            };
            let warnings = texts(&response["warnings"]).map(str::to_owned).collect();
            Ok(Some(Answer { patch, warnings }))
        }
        Err(why) if hook["failurePolicy"].as_str() == Some("Ignore") => {
            tracing::warn!(webhook = name, error = %why, "webhook failed, going on as its failurePolicy says");
            Ok(None)
        }
        Err(why) => Err(ApiError::internal(format!(
            "failed calling webhook {name:?}: failed to call webhook: {why}"
        ))),
    }
}

fn request(cx: &Cx, chosen: &Chosen<'_>, review: &Review<'_>, object: Option<&Value>, uid: &str) -> Value {
    let r = &cx.resource;
    let api_version = crate::resources::join_gv(&r.group, &chosen.version);
    let shown = |o: Option<&Value>| match o {
        None => Value::Null,
        Some(o) => {
            let mut o = o.clone();
            o["apiVersion"] = api_version.clone().into();
            o["kind"] = r.kind.clone().into();
            o
        }
    };
    let target = object.or(review.old);
    let mut request = json!({
        "uid": uid,
        "kind": {"group": r.group, "version": chosen.version, "kind": r.kind},
        "resource": {"group": r.group, "version": chosen.version, "resource": r.plural},
        "requestKind": {"group": r.group, "version": r.version, "kind": r.kind},
        "requestResource": {"group": r.group, "version": r.version, "resource": r.plural},
        "name": target.map(meta::name).unwrap_or_default(),
        "operation": review.operation.text(),
        "userInfo": cx.user.user_info(),
        "object": shown(object),
        "oldObject": shown(review.old),
        "dryRun": review.dry_run,
        "options": review.options,
    });
    if let Some(ns) = cx.namespace() {
        request["namespace"] = ns.into();
    } else if r.group.is_empty() && r.kind == "Namespace" {
        request["namespace"] = request["name"].clone();
    }
    if !review.subresource.is_empty() {
        request["subResource"] = review.subresource.into();
        request["requestSubResource"] = review.subresource.into();
    }
    json!({"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": request})
}

fn check_reply(reply: &Value, uid: &str) -> Result<Value, String> {
    let (kind, version) = (
        reply["kind"].as_str().unwrap_or_default(),
        reply["apiVersion"].as_str().unwrap_or_default(),
    );
    if (kind, version) != ("AdmissionReview", "admission.k8s.io/v1") {
        return Err(format!(
            "expected webhook response of admission.k8s.io/v1, Kind=AdmissionReview, got {version}, Kind={kind}"
        ));
    }
    let response = &reply["response"];
    if !response.is_object() {
        return Err("webhook response was absent".into());
    }
    if response["uid"].as_str() != Some(uid) {
        return Err(format!(
            "expected response.uid={uid:?}, got {:?}",
            response["uid"].as_str().unwrap_or_default()
        ));
    }
    Ok(response.clone())
}

fn denied(name: &str, status: &Value) -> ApiError {
    let message = match (status["message"].as_str(), status["reason"].as_str()) {
        (Some(m), _) if !m.is_empty() => format!("admission webhook {name:?} denied the request: {m}"),
        (_, Some(r)) if !r.is_empty() => format!("admission webhook {name:?} denied the request: {r}"),
        _ => format!("admission webhook {name:?} denied the request without explanation"),
    };
    const REASONS: &[&str] = &[
        "BadRequest",
        "Forbidden",
        "Invalid",
        "Conflict",
        "NotFound",
        "AlreadyExists",
        "Unauthorized",
        "InternalError",
        "ServiceUnavailable",
        "TooManyRequests",
        "Timeout",
        "MethodNotAllowed",
        "NotAcceptable",
        "Gone",
        "Expired",
    ];
    let reason = status["reason"]
        .as_str()
        .and_then(|r| REASONS.iter().find(|known| **known == r))
        .copied()
        .unwrap_or("");
    let code = status["code"]
        .as_u64()
        .filter(|c| (400..600).contains(c))
        .unwrap_or(400) as u16;
    let mut e = ApiError::new(code, reason, message);
    if status["details"].is_object() {
        e.details = Some(Box::new(status["details"].clone()));
    }
    e
}

/// Checks a webhook configuration about to be stored.
pub(crate) fn validate_config(object: &Value, causes: &mut Vec<crate::error::Cause>) {
    use crate::error::Cause;
    let mut names = std::collections::HashSet::new();
    for (i, hook) in object["webhooks"].as_array().into_iter().flatten().enumerate() {
        let at = format!("webhooks[{i}]");
        let name = hook["name"].as_str().unwrap_or_default();
        if name.split('.').count() < 3 || !crate::names::is_dns1123_subdomain(name) {
            let why = "should be a domain with at least three segments separated by dots";
            causes.push(Cause::invalid(format!("{at}.name"), &hook["name"], why));
        }
        if !names.insert(name.to_owned()) {
            causes.push(Cause::duplicate(format!("{at}.name"), &hook["name"]));
        }
        if !texts(&hook["admissionReviewVersions"]).any(|v| v == "v1") {
            if texts(&hook["admissionReviewVersions"]).next().is_none() {
                causes.push(Cause::required(
                    format!("{at}.admissionReviewVersions"),
                    "must specify one of v1, v1beta1",
                ));
            } else {
                let why = "must include at least one of v1, v1beta1";
                causes.push(Cause::invalid(
                    format!("{at}.admissionReviewVersions"),
                    &hook["admissionReviewVersions"],
                    why,
                ));
            }
        }
        match hook["sideEffects"].as_str() {
            Some("None" | "NoneOnDryRun") => {}
            None => causes.push(Cause::required(
                format!("{at}.sideEffects"),
                "must specify one of None, NoneOnDryRun",
            )),
            Some(_) => causes.push(Cause::not_supported(
                format!("{at}.sideEffects"),
                &hook["sideEffects"],
                &["None", "NoneOnDryRun"],
            )),
        }
        if hook["failurePolicy"]
            .as_str()
            .is_some_and(|p| !matches!(p, "Fail" | "Ignore"))
        {
            causes.push(Cause::not_supported(
                format!("{at}.failurePolicy"),
                &hook["failurePolicy"],
                &["Fail", "Ignore"],
            ));
        }
        if hook["timeoutSeconds"].as_i64().is_some_and(|t| !(1..=30).contains(&t)) {
            let why = "the timeout value must be between 1 and 30 seconds";
            causes.push(Cause::invalid(
                format!("{at}.timeoutSeconds"),
                &hook["timeoutSeconds"],
                why,
            ));
        }
        if !hook["matchConditions"].as_array().is_none_or(Vec::is_empty) {
            // Silently ignoring a condition would call webhooks for what they must not see.
            causes.push(Cause::forbidden(
                format!("{at}.matchConditions"),
                "match conditions (CEL) are not supported by this server",
            ));
        }
        let client = &hook["clientConfig"];
        match (client["url"].as_str(), client["service"].is_object()) {
            (Some(url), false) => {
                if !url.starts_with("https://") {
                    causes.push(Cause::invalid(
                        format!("{at}.clientConfig.url"),
                        &client["url"],
                        "'https' is the only allowed URL scheme",
                    ));
                }
            }
            (None, true) => {
                for f in ["name", "namespace"] {
                    if client["service"][f].as_str().unwrap_or_default().is_empty() {
                        causes.push(Cause::required(
                            format!("{at}.clientConfig.service.{f}"),
                            &format!("service {f} is required"),
                        ));
                    }
                }
            }
            _ => causes.push(Cause::required(
                format!("{at}.clientConfig"),
                "exactly one of url or service is required",
            )),
        }
        if let Some(text) = client["caBundle"].as_str().filter(|t| !t.is_empty())
            && let Err(why) = call::trust_roots(text)
        {
            let why = format!("unable to load root certificates: {why}");
            causes.push(Cause {
                reason: "FieldValueInvalid",
                field: format!("{at}.clientConfig.caBundle"),
                message: format!("Invalid value: <bytes>: {why}"),
            });
        }
        for (field, value) in [
            ("namespaceSelector", &hook["namespaceSelector"]),
            ("objectSelector", &hook["objectSelector"]),
        ] {
            if value.is_object()
                && let Err(e) = LabelSelector::from_object(value)
            {
                causes.push(Cause::invalid(format!("{at}.{field}"), value, e.message));
            }
        }
    }
}
