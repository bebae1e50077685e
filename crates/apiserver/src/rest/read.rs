//! get and list.

use http::Response;
use serde_json::{Value, json};

use super::{Cx, convert, object_response};
use crate::error::ApiResult;
use crate::http::{Body, Form, json_response};
use crate::meta;
use crate::selector::{FieldSelector, LabelSelector};
use crate::table::{self, Include};

/// One object.
pub(super) fn get(cx: &Cx, form: Form) -> ApiResult<Response<Body>> {
    let name = &cx.info.name;
    let (entry, _) = cx.server.store().get(&cx.key(name))?;
    let entry = entry.ok_or_else(|| cx.not_found(name))?;
    let object = convert::decode(&cx.resource, &entry)?;
    Ok(object_response(cx, 200, &object, form))
}

/// What a collection request selects.
pub(super) struct Selection {
    pub(super) labels: LabelSelector,
    pub(super) fields: FieldSelector,
}

impl Selection {
    pub(super) fn of(cx: &Cx) -> ApiResult<Self> {
        let labels = LabelSelector::parse(cx.query.get("labelSelector").unwrap_or_default())?;
        let custom = cx.resource.custom.is_some();
        let text = cx.query.get("fieldSelector").unwrap_or_default();
        let mut fields = FieldSelector::parse(text, &cx.resource.kind, custom)?;
        if !cx.info.name.is_empty() {
            // A watch on one object.
            fields = FieldSelector::parse(&format!("metadata.name={}", cx.info.name), &cx.resource.kind, custom)?;
        }
        Ok(Self { labels, fields })
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        self.labels.matches(object) && self.fields.matches(object)
    }
}

/// All selected objects and the revision at which they were read.
pub(super) fn select(cx: &Cx, selection: &Selection) -> ApiResult<(Vec<Value>, u64)> {
    let store = cx.server.store();
    let (entries, revision) = match (selection.fields.exact_name(), cx.namespace(), cx.resource.namespaced) {
        // One name in one place is one lookup: what kubectl wait and informers on a single object ask for all the time.
        (Some(name), Some(_), true) | (Some(name), None, false) => {
            let (entry, revision) = store.get(&cx.key(name))?;
            (entry.into_iter().collect::<Vec<_>>(), revision)
        }
        _ => {
            let snapshot = store.range(&cx.resource.namespace_prefix(cx.namespace()), None, 0)?;
            (snapshot.entries, snapshot.revision)
        }
    };
    let mut objects = Vec::with_capacity(entries.len());
    for entry in &entries {
        let object = convert::decode(&cx.resource, entry)?;
        if selection.matches(&object) {
            objects.push(object);
        }
    }
    Ok((objects, revision))
}

/// A collection.
pub(super) fn list(cx: &Cx, form: Form) -> ApiResult<Response<Body>> {
    if cx.resource.kind == "ComponentStatus" {
        let body = json!({"kind": "ComponentStatusList", "apiVersion": "v1", "metadata": {}, "items": []});
        return Ok(json_response(200, &body));
    }
    if cx.query.get("continue").is_some() {
        // Lists are never cut, so no token of ours exists.
        return Err(crate::error::ApiError::expired(
            "The provided continue parameter is too old to display a consistent list result. You must start a new list without the continue parameter.",
        ));
    }
    let selection = Selection::of(cx)?;
    let (mut objects, revision) = select(cx, &selection)?;
    let list_meta = json!({"resourceVersion": revision.to_string()});
    let body = match form {
        Form::Object => {
            // Items of a list carry no type of their own, except custom ones.
            if cx.resource.custom.is_none() {
                for o in &mut objects {
                    if let Some(map) = o.as_object_mut() {
                        map.shift_remove("apiVersion");
                        map.shift_remove("kind");
                    }
                }
            }
            json!({"kind": cx.resource.list_kind, "apiVersion": cx.resource.api_version(), "metadata": list_meta, "items": objects})
        }
        Form::Metadata { beta } => {
            let version = if beta { "meta.k8s.io/v1beta1" } else { "meta.k8s.io/v1" };
            let items: Vec<Value> = objects.iter().map(|o| table::partial(o, beta)).collect();
            json!({"kind": "PartialObjectMetadataList", "apiVersion": version, "metadata": list_meta, "items": items})
        }
        Form::Table { beta } => {
            objects.sort_by(|a, b| (meta::namespace(a), meta::name(a)).cmp(&(meta::namespace(b), meta::name(b))));
            let include = Include::parse(cx.query.get("includeObject"));
            table::table(&cx.resource, &objects, list_meta, include, beta, true)
        }
    };
    Ok(json_response(200, &body))
}
