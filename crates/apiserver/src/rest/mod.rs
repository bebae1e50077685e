//! Handlers for API resources: decode, default, admit, validate, commit, print.
//!
//! `read` gets and lists, `watch` streams, `write` creates and updates (all kinds of patches end there), `delete` deletes,
//! `review` answers the review kinds and token requests, `scale` the scale subresource, `convert` is the form in the store.

mod convert;
mod delete;
mod read;
mod review;
mod scale;
mod watch;
mod write;

use std::future::ready;
use std::sync::Arc;

use futures::future::BoxFuture;
use http::Response;
use serde_json::Value;

use crate::auth::Identity;
use crate::builtin;
use crate::error::{ApiError, ApiResult, Cause};
use crate::http::{self as web, Body, Form, add_warnings, content_type, json_response, negotiate, read_body};
use crate::protobuf;
use crate::request::{Query, RequestInfo};
use crate::resources::{Resource, split_gv};
use crate::schema;
use crate::server::ApiServer;
use crate::{kinds, meta};

pub(crate) use delete::{expire_events, resume_cleanups};

/// Everything a handler needs to know about its request.
pub(crate) struct Cx {
    pub(crate) server: Arc<ApiServer>,
    pub(crate) user: Arc<Identity>,
    pub(crate) info: RequestInfo,
    pub(crate) query: Query,
    pub(crate) resource: Arc<Resource>,
    pub(crate) headers: http::HeaderMap,
    pub(crate) warnings: Vec<String>,
}

/// How unknown fields are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FieldValidation {
    Ignore,
    Warn,
    Strict,
}

impl Cx {
    pub(crate) fn new(
        server: Arc<ApiServer>,
        user: Arc<Identity>,
        info: RequestInfo,
        query: Query,
        resource: Arc<Resource>,
        parts: http::request::Parts,
    ) -> Self {
        Self {
            server,
            user,
            info,
            query,
            resource,
            headers: parts.headers,
            warnings: Vec::new(),
        }
    }

    pub(crate) fn namespace(&self) -> Option<&str> {
        if self.resource.namespaced {
            self.info.namespace.as_deref()
        } else {
            None
        }
    }

    pub(crate) fn key(&self, name: &str) -> String {
        self.resource.key(self.namespace(), name)
    }

    pub(crate) fn dry_run(&self) -> ApiResult<bool> {
        match self.query.get("dryRun") {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => Err(ApiError::bad_request(format!(
                "dryRun: Unsupported value: {other:?}: supported values: \"All\""
            ))),
        }
    }

    pub(crate) fn manager(&self) -> String {
        let from_agent = || {
            let agent = self
                .headers
                .get(http::header::USER_AGENT)
                .and_then(|v| v.to_str().ok())
                .unwrap_or("unknown");
            agent.split('/').next().unwrap_or("unknown").chars().take(128).collect()
        };
        self.query.get("fieldManager").map_or_else(from_agent, str::to_owned)
    }

    fn field_validation(&self) -> ApiResult<FieldValidation> {
        match self.query.get("fieldValidation") {
            None | Some("Warn") => Ok(FieldValidation::Warn),
            Some("Strict") => Ok(FieldValidation::Strict),
            Some("Ignore") => Ok(FieldValidation::Ignore),
            Some(other) => Err(ApiError::bad_request(format!(
                "fieldValidation: Unsupported value: {other:?}: supported values: \"Ignore\", \"Strict\", \"Warn\""
            ))),
        }
    }

    pub(crate) fn not_found(&self, name: &str) -> ApiError {
        ApiError::not_found(&self.resource.group, &self.resource.plural, name)
    }

    pub(crate) fn invalid(&self, name: &str, causes: &[Cause]) -> ApiError {
        ApiError::invalid(&self.resource.group, &self.resource.kind, name, causes)
    }

    pub(crate) fn forbidden(&self, name: &str, why: &str) -> ApiError {
        ApiError::forbidden(&self.resource.group, &self.resource.plural, name, why)
    }

    /// Brings a decoded document into shape: kind and version match, unknown fields are reported and dropped, defaults filled in.
    pub(crate) fn normalize(&mut self, object: &mut Value) -> ApiResult<()> {
        let validation = self.field_validation()?;
        let resource = self.resource.clone();
        let mut unknown = prune_and_default(&resource, object)?;
        if validation != FieldValidation::Ignore && !unknown.is_empty() {
            unknown.sort();
            let shown: Vec<String> = unknown.iter().map(|path| self.unknown_text(path)).collect();
            if validation == FieldValidation::Strict {
                return Err(ApiError::bad_request(format!(
                    "{} in version {:?} cannot be handled as a {}: strict decoding error: {}",
                    resource.kind,
                    resource.version,
                    resource.kind,
                    shown.join(", ")
                )));
            }
            self.warnings.extend(shown);
        }
        Ok(())
    }

    fn unknown_text(&self, path: &str) -> String {
        let schema = match &self.resource.custom {
            Some(c) => Some(schema::Schema::new(&c.schema)),
            None => kinds::schema(&self.resource.group, &self.resource.version, &self.resource.kind),
        };
        let last = path.rsplit('.').next().unwrap_or(path);
        let (schema, rest) = match path.strip_prefix("metadata.") {
            Some(rest) => (Some(kinds::object_meta()), rest),
            None => (schema, path),
        };
        let hint = schema.and_then(|s| schema::did_you_mean(last, &schema::siblings(s, rest)));
        match hint {
            Some(h) => format!("unknown field {path:?} (did you mean {h:?}?)"),
            None => match self.belongs(path) {
                Some(parent) => format!("unknown field {path:?} (it belongs below {parent:?}, indented)"),
                None => format!("unknown field {path:?}"),
            },
        }
    }

    /// Where a field at the top belongs that only `metadata` or `spec` has: the usual end of lost indentation.
    fn belongs(&self, path: &str) -> Option<&'static str> {
        let custom = self.resource.custom.as_ref().map(|c| schema::Schema::new(&c.schema));
        let schema =
            custom.or_else(|| kinds::schema(&self.resource.group, &self.resource.version, &self.resource.kind));
        let spec = schema.and_then(|s| s.property("spec"));
        if path.contains('.') {
            None
        } else if spec.is_some_and(|spec| spec.property(path).is_some()) {
            Some("spec")
        } else {
            meta::FIELDS.contains(&path).then_some("metadata")
        }
    }
}

/// Drops what the schema does not know (returned as paths), checks types, fills in defaults.
pub(crate) fn prune_and_default(resource: &Resource, object: &mut Value) -> ApiResult<Vec<String>> {
    let mut unknown = Vec::new();
    if !object.is_object() {
        return Err(ApiError::bad_request("the object is not a JSON object"));
    }
    meta::check_shape(object, &resource.kind, &resource.version)?;
    if let Some(m) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        let known = |f: &str| meta::FIELDS.contains(&f);
        unknown.extend(m.keys().filter(|k| !known(k)).map(|k| format!("metadata.{k}")));
        m.retain(|k, _| known(k));
    }
    if let Some(custom) = &resource.custom {
        let api = (
            object["apiVersion"].take(),
            object["kind"].take(),
            object["metadata"].take(),
        );
        if let Some(map) = object.as_object_mut() {
            for f in ["apiVersion", "kind", "metadata"] {
                map.shift_remove(f);
            }
        }
        let s = schema::Schema::new(&custom.schema);
        if !custom.preserve_unknown {
            schema::prune(object, s, "", &mut unknown);
        }
        schema::apply_defaults(object, s);
        let rest = std::mem::take(object);
        let mut map = serde_json::Map::new();
        map.insert("apiVersion".into(), api.0);
        map.insert("kind".into(), api.1);
        map.insert("metadata".into(), api.2);
        if let Value::Object(rest) = rest {
            map.extend(rest);
        }
        *object = Value::Object(map);
    } else {
        if let Some(s) = kinds::schema(&resource.group, &resource.version, &resource.kind) {
            if let Some((found, path, want)) = schema::decode_error(object, s, "") {
                let kind = &resource.kind;
                return Err(ApiError::bad_request(format!(
                    "{kind} in version {:?} cannot be handled as a {kind}: json: cannot unmarshal {found} into Go struct field {kind}.{path} of type {want}",
                    resource.version
                )));
            }
            schema::strip_nulls(object, s);
            schema::prune(object, s, "", &mut unknown);
        }
        builtin::default(resource, object);
    }
    Ok(unknown)
}

/// Reads the body as a document: JSON, YAML or a protobuf envelope.
pub(crate) async fn read_document(cx: &Cx, body: Body) -> ApiResult<Option<Value>> {
    let kind = content_type(&cx.headers);
    let bytes = read_body(body).await?;
    decode_document(&kind, &bytes)
}

fn decode_document(kind: &str, bytes: &[u8]) -> ApiResult<Option<Value>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    match kind {
        "application/vnd.kubernetes.protobuf" => protobuf::decode(bytes).map(Some),
        "" | "application/json" | "application/yaml" | "application/x-www-form-urlencoded" => {
            web::parse_document(bytes, kind).map(Some)
        }
        _ => Err(ApiError::unsupported_media_type(&[
            "application/json",
            "application/yaml",
            "application/vnd.kubernetes.protobuf",
        ])),
    }
}

/// Checks that a document is of the kind that the path says, filling in what is missing.
pub(crate) fn check_kind(object: &mut Value, group: &str, version: &str, kind: &str) -> ApiResult<()> {
    let map = object
        .as_object_mut()
        .ok_or_else(|| ApiError::bad_request("the body is not a JSON object"))?;
    let want = crate::resources::join_gv(group, version);
    let text = |map: &serde_json::Map<String, Value>, f: &str| {
        map.get(f).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let (got, got_kind) = (text(map, "apiVersion"), text(map, "kind"));
    if got_kind.is_empty() && map.get("kind").is_none_or(|k| k.is_null() || k.as_str() == Some("")) {
        map.insert("kind".into(), kind.into());
    } else if got_kind != kind {
        return Err(ApiError::bad_request(format!(
            "{} in version {:?} cannot be handled as a {kind}: no kind {got_kind:?} is registered here",
            got_kind,
            split_gv(&got).1
        )));
    }
    if got.is_empty() {
        map.insert("apiVersion".into(), want.into());
    } else if got != want {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({got}) does not match the expected API version ({want})"
        )));
    }
    Ok(())
}

/// Routes a request that was authenticated and authorized.
pub(crate) async fn dispatch(mut cx: Cx, body: Body) -> ApiResult<Response<Body>> {
    let form = negotiate(&cx.headers)?;
    if let Some(custom) = &cx.resource.custom
        && let Some(text) = &custom.deprecation
    {
        cx.warnings.push(text.clone());
    }
    let verb = cx.info.verb.clone();
    let served = match verb.as_str() {
        _ if !cx.info.subresource.is_empty() => true,
        verb => cx.resource.has_verb(verb),
    };
    let on_object = !cx.info.name.is_empty();
    let placed = match verb.as_str() {
        "update" | "patch" | "delete" | "get" => on_object && cx.resource.namespaced == cx.namespace().is_some(),
        "create" if cx.info.subresource.is_empty() => !on_object,
        _ => true,
    };
    if !served || !placed {
        return Err(ApiError::method_not_allowed());
    }
    let sub = cx.info.subresource.clone();
    let handled: BoxFuture<'_, ApiResult<Response<Body>>> = match (verb.as_str(), sub.as_str()) {
        ("create", _) if is_review(&cx.resource.kind) => Box::pin(review::review(&mut cx, body)),
        ("create", "token") => Box::pin(review::token_request(&mut cx, body)),
        ("create", "eviction") => Box::pin(delete::evict(&mut cx, body)),
        ("create", "binding") => Box::pin(write::bind(&mut cx, body)),
        ("create", "") if cx.resource.kind == "Binding" => Box::pin(write::bind(&mut cx, body)),
        ("get", "") => Box::pin(ready(read::get(&cx, form))),
        ("list", "") => Box::pin(ready(read::list(&cx, form))),
        ("watch", "") => return watch::watch(cx, form),
        ("get", "status") => Box::pin(ready(read::get(&cx, form))),
        ("get", "ephemeralcontainers" | "resize" | "approval") => Box::pin(ready(read::get(&cx, form))),
        ("get", "scale") => Box::pin(ready(scale::get(&cx))),
        ("update", "scale") => Box::pin(scale::update(&mut cx, body)),
        ("patch", "scale") => Box::pin(scale::patch(&mut cx, body)),
        ("create", "") => Box::pin(write::create(&mut cx, body, form)),
        ("update", "" | "status" | "finalize" | "ephemeralcontainers" | "resize" | "approval") => {
            Box::pin(write::update(&mut cx, body, form))
        }
        ("patch", "" | "status" | "ephemeralcontainers" | "resize" | "approval") => {
            Box::pin(write::patch(&mut cx, body, form))
        }
        ("delete", "") => Box::pin(delete::delete(&mut cx, body, form)),
        ("deletecollection", "") => Box::pin(delete::collection(&mut cx, body)),
        _ => return Err(ApiError::method_not_allowed()),
    };
    let mut response = handled.await?;
    add_warnings(&mut response, &cx.warnings);
    Ok(response)
}

fn is_review(kind: &str) -> bool {
    kind.ends_with("Review")
}

/// One object in the form that the client asked for.
pub(crate) fn object_response(cx: &Cx, code: u16, object: &Value, form: Form) -> Response<Body> {
    match form {
        Form::Object => json_response(code, object),
        Form::Metadata { beta } => json_response(code, &crate::table::partial(object, beta)),
        Form::Table { beta } => {
            let include = crate::table::Include::parse(cx.query.get("includeObject"));
            let list_meta = serde_json::json!({"resourceVersion": meta::text(object, "resourceVersion")});
            let table = crate::table::table(
                &cx.resource,
                std::slice::from_ref(object),
                list_meta,
                include,
                beta,
                true,
            );
            json_response(code, &table)
        }
    }
}
