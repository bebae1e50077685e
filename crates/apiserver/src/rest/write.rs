//! create, update and patch: one pipeline.
//!
//! document → shape (kind, fields, defaults) → metadata → built-in admission → mutating webhooks → validation → validating
//! webhooks → allocation → compare-and-swap. Patches run it again when somebody else wrote in between; a plain update with a
//! resource version fails with a conflict instead.

use http::Response;
use serde_json::{Value, json};

use super::{Cx, check_kind, convert, object_response, prune_and_default, read_document};
use crate::admission::{self, Operation, Review};
use crate::builtin::{self, alloc};
use crate::crd;
use crate::error::{ApiError, ApiResult, Cause};
use crate::http::{Body, Form, content_type, json_response, read_body};
use crate::meta;
use crate::patch::{self, managed};
use crate::schema;
use crate::store::{Entry, StoreError, Txn};

const PATCH_ATTEMPTS: usize = 20;
const GENERATE_ATTEMPTS: usize = 8;

/// POST on a collection.
pub(super) async fn create(cx: &mut Cx, body: Body, form: Form) -> ApiResult<Response<Body>> {
    let mut object = read_document(cx, body)
        .await?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    let r = cx.resource.clone();
    check_kind(&mut object, &r.group, &r.version, &r.kind)?;
    cx.normalize(&mut object)?;
    let object = create_object(cx, object, "Update").await?;
    Ok(object_response(cx, 201, &object, form))
}

/// Creates a shaped object.
pub(super) async fn create_object(cx: &mut Cx, mut object: Value, operation: &str) -> ApiResult<Value> {
    let r = cx.resource.clone();
    let dry_run = cx.dry_run()?;
    let namespace = cx.namespace().map(str::to_owned);
    if r.namespaced {
        let given = meta::namespace(&object).to_owned();
        match &namespace {
            None => {
                return Err(ApiError::bad_request(
                    "an empty namespace may not be set during creation",
                ));
            }
            Some(ns) if !given.is_empty() && given != *ns => {
                return Err(ApiError::bad_request(format!(
                    "the namespace of the provided object does not match the namespace sent on the request ({given} != {ns})"
                )));
            }
            _ => {}
        }
    }
    if !meta::text(&object, "resourceVersion").is_empty() {
        return Err(ApiError::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    meta::prepare_create(&r, &mut object, namespace.as_deref())?;
    let generated = meta::generate_name(&mut object)?;
    if let Some(ns) = &namespace {
        check_namespace(cx, ns, meta::name(&object))?;
    }
    if r.custom.is_some() || builtin::has_status(&r) {
        builtin::reset_status(&r, &mut object);
    }
    builtin::prepare_create(&cx.server, &cx.user, &r, &mut object)?;
    if r.group == crd::GROUP && r.plural == crd::PLURAL {
        crd::default(&mut object);
        let taken = cx.server.registry()?.name_taken(&object);
        crd::establish(&mut object, taken);
    }

    let review = Review {
        operation: Operation::Create,
        subresource: "",
        old: None,
        dry_run,
        options: options(cx, "CreateOptions"),
    };
    let changed = admission::mutate(cx, &review, object).await?;
    object = changed.0;
    if changed.1 {
        prune_and_default(&r, &mut object)?;
        // Built-in admission runs once more for what webhooks added: injected containers get the token mount too.
        builtin::readmit(&cx.server, &r, &mut object)?;
    }
    let name = meta::name(&object).to_owned();
    validate(cx, &object, None)?;
    admission::validate(cx, &review, Some(&object)).await?;

    if operation == "Update" {
        managed::track_update(&r, None, &mut object, &cx.manager(), "");
    }
    let mut attempt = 0;
    loop {
        attempt += 1;
        let name = if attempt == 1 {
            name.clone()
        } else {
            meta::name(&object).to_owned()
        };
        let key = cx.key(&name);
        let mut txn = Txn::default();
        // Allocation works on a copy, so that another attempt picks afresh.
        let mut written = object.clone();
        alloc::allocate(&cx.server, &r, &mut written, None, &mut txn)?;
        let bytes = convert::encode(&r, &written)?;
        if dry_run {
            if cx.server.store().get(&key)?.0.is_some() {
                return Err(ApiError::already_exists(&r.group, &r.plural, &name));
            }
            return Ok(written);
        }
        let create = Txn::create(key.clone(), bytes);
        txn.expect.splice(0..0, create.expect);
        if let Some(ns) = &namespace {
            // The namespace must still be there when the object is written, or its content would outlive it.
            txn.expect
                .push((format!("/core/namespaces/{ns}"), crate::store::Expect::Present));
        }
        txn.ops.splice(0..0, create.ops);
        match cx.server.store().commit(txn).await {
            Ok(revisions) => {
                let revision = revisions.first().copied().unwrap_or_default();
                meta::set_revision(&mut written, revision);
                return Ok(written);
            }
            Err(StoreError::Conflict { key: at, .. }) if at == key => {
                if generated && attempt < GENERATE_ATTEMPTS {
                    let m = meta::metadata(&mut object)?;
                    m.remove("name");
                    meta::generate_name(&mut object)?;
                    continue;
                }
                return Err(ApiError::already_exists(&r.group, &r.plural, &name));
            }
            Err(StoreError::Conflict { key: at, .. }) if at.starts_with("/core/namespaces/") => {
                return Err(ApiError::no_namespace(namespace.as_deref().unwrap_or_default()));
            }
            // Someone else took the address or port that was picked.
            Err(StoreError::Conflict { .. }) if attempt < 64 => continue,
            Err(e) => return Err(e.into()),
        }
    }
}

/// The namespace exists and is not on its way out.
fn check_namespace(cx: &Cx, namespace: &str, name: &str) -> ApiResult<()> {
    let (entry, _) = cx.server.store().get(&format!("/core/namespaces/{namespace}"))?;
    let entry = entry.ok_or_else(|| ApiError::no_namespace(namespace))?;
    let ns: Value = serde_json::from_slice(&entry.value).map_err(ApiError::internal)?;
    if ns["status"]["phase"].as_str() == Some("Terminating") {
        let mut e = cx.forbidden(
            name,
            &format!("unable to create new content in namespace {namespace} because it is being terminated"),
        );
        if let Some(d) = &mut e.details {
            d["causes"] = json!([{"reason": "NamespaceTerminating",
                "message": format!("namespace {namespace} is being terminated"), "field": "metadata.namespace"}]);
        }
        return Err(e);
    }
    Ok(())
}

fn options(cx: &Cx, kind: &str) -> Value {
    let mut v = json!({"kind": kind, "apiVersion": "meta.k8s.io/v1"});
    for field in ["fieldManager", "fieldValidation"] {
        if let Some(text) = cx.query.get(field) {
            v[field] = text.into();
        }
    }
    if cx.query.get("dryRun").is_some() {
        v["dryRun"] = json!(["All"]);
    }
    v
}

/// Everything that must hold of an object about to be written.
fn validate(cx: &Cx, object: &Value, old: Option<&Value>) -> ApiResult<()> {
    let r = &cx.resource;
    let mut causes = Vec::new();
    meta::validate(r, object, old, &mut causes);
    if let Some(custom) = &r.custom {
        let mut document = object.clone();
        if let Some(map) = document.as_object_mut() {
            for f in ["apiVersion", "kind", "metadata"] {
                map.shift_remove(f);
            }
        }
        // The schema may list these as required; they are always there.
        let mut found = Vec::new();
        schema::validate(&document, schema::Schema::new(&custom.schema), "", &mut found);
        found.retain(|c| {
            !(c.reason == "FieldValueRequired" && matches!(c.field.as_str(), "apiVersion" | "kind" | "metadata"))
        });
        causes.append(&mut found);
    } else if r.group == crd::GROUP && r.plural == crd::PLURAL {
        crd::validate(object, old, &mut causes);
    } else {
        builtin::validate(r, object, old, &mut causes);
    }
    if causes.is_empty() {
        Ok(())
    } else {
        Err(cx.invalid(meta::name(object), &causes))
    }
}

/// PUT.
pub(super) async fn update(cx: &mut Cx, body: Body, form: Form) -> ApiResult<Response<Body>> {
    let mut object = read_document(cx, body)
        .await?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    let r = cx.resource.clone();
    check_kind(&mut object, &r.group, &r.version, &r.kind)?;
    cx.normalize(&mut object)?;
    let name = cx.info.name.clone();
    let given = meta::name(&object).to_owned();
    if given.is_empty() {
        meta::metadata(&mut object)?.insert("name".into(), name.clone().into());
    } else if given != name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({name})"
        )));
    }
    let ns = meta::namespace(&object).to_owned();
    if r.namespaced && !ns.is_empty() && cx.namespace() != Some(ns.as_str()) {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let wanted = match meta::text(&object, "resourceVersion") {
        "" | "0" => None,
        v => Some(v.parse::<u64>().map_err(|_| {
            cx.invalid(
                &name,
                &[Cause::invalid(
                    "metadata.resourceVersion",
                    &json!(v),
                    "must be a number",
                )],
            )
        })?),
    };
    let uid = meta::text(&object, "uid").to_owned();
    for _ in 0..PATCH_ATTEMPTS {
        let entry = current(cx, &name)?;
        let old = convert::decode(&r, &entry)?;
        if wanted.is_some_and(|w| w != entry.mod_rev) {
            return Err(ApiError::stale(&r.group, &r.plural, &name));
        }
        check_uid(cx, &uid, &old)?;
        match finish(cx, &entry, old, object.clone(), "Update", None).await? {
            Some(updated) => return Ok(object_response(cx, 200, &updated, form)),
            None if wanted.is_some() => return Err(ApiError::stale(&r.group, &r.plural, &name)),
            None => {}
        }
    }
    Err(ApiError::stale(&r.group, &r.plural, &name))
}

pub(super) fn check_uid(cx: &Cx, uid: &str, old: &Value) -> ApiResult<()> {
    let have = meta::text(old, "uid");
    if !uid.is_empty() && uid != have {
        let why = format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {have}");
        return Err(ApiError::conflict(
            &cx.resource.group,
            &cx.resource.plural,
            meta::name(old),
            &why,
        ));
    }
    Ok(())
}

pub(super) fn current(cx: &Cx, name: &str) -> ApiResult<Entry> {
    cx.server
        .store()
        .get(&cx.key(name))?
        .0
        .ok_or_else(|| cx.not_found(name))
}

/// Carries a replacement of `old` through the pipeline. `None`: somebody else wrote meanwhile. `applied` is the field manager of
/// a server-side apply, whose managed fields are already in the object.
pub(super) async fn finish(
    cx: &mut Cx,
    entry: &Entry,
    old: Value,
    mut object: Value,
    operation: &str,
    applied: Option<&str>,
) -> ApiResult<Option<Value>> {
    let r = cx.resource.clone();
    let dry_run = cx.dry_run()?;
    let sub = cx.info.subresource.clone();
    let name = meta::name(&old).to_owned();
    restrict(cx, &sub, &mut object, &old)?;
    meta::prepare_update(&r, &mut object, &old)?;
    meta::set_revision(&mut object, entry.mod_rev);
    builtin::prepare_update(&cx.server, &cx.user, &r, &sub, &mut object, &old)?;
    if r.group == crd::GROUP && r.plural == crd::PLURAL && sub.is_empty() {
        crd::default(&mut object);
        let taken = cx.server.registry()?.name_taken(&object);
        object["status"] = old["status"].clone();
        crd::establish(&mut object, taken);
    }

    let review = Review {
        operation: Operation::Update,
        subresource: &sub,
        old: Some(&old),
        dry_run,
        options: options(
            cx,
            if operation == "Update" {
                "UpdateOptions"
            } else {
                "PatchOptions"
            },
        ),
    };
    let (mut object, changed) = admission::mutate(cx, &review, object).await?;
    if changed {
        prune_and_default(&r, &mut object)?;
        restrict(cx, &sub, &mut object, &old)?;
        meta::prepare_update(&r, &mut object, &old)?;
    }
    validate(cx, &object, Some(&old))?;
    admission::validate(cx, &review, Some(&object)).await?;

    if meta::has_generation(&r) && sub != "status" && meta::spec_changed(&object, &old) {
        let generation = old["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        object["metadata"]["generation"] = generation.into();
    }
    if applied.is_none() {
        managed::track_update(&r, Some(&old), &mut object, &cx.manager(), &sub);
    }
    meta::set_revision(&mut object, entry.mod_rev);
    if managed::same(&object, &old) {
        return Ok(Some(old));
    }
    let mut txn = Txn::default();
    alloc::allocate(&cx.server, &r, &mut object, Some(&old), &mut txn)?;
    let bytes = convert::encode(&r, &object)?;
    if dry_run {
        return Ok(Some(object));
    }
    let gone = complete(&object);
    let main = if gone {
        alloc::release(&r, &old, &mut txn);
        Txn::delete(entry.key.clone(), entry.mod_rev)
    } else {
        Txn::replace(entry.key.clone(), entry.mod_rev, bytes)
    };
    txn.expect.splice(0..0, main.expect);
    txn.ops.splice(0..0, main.ops);
    match cx.server.store().commit(txn).await {
        Ok(revisions) => {
            meta::set_revision(&mut object, revisions.first().copied().unwrap_or_default());
            Ok(Some(object))
        }
        Err(StoreError::Conflict { key, current: None }) if key == entry.key => Err(cx.not_found(&name)),
        Err(StoreError::Conflict { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Whether nothing holds a deleted object any more.
pub(super) fn complete(object: &Value) -> bool {
    meta::is_deleting(object)
        && meta::finalizers(object).is_empty()
        && object["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
        && (object["kind"].as_str() != Some("Namespace")
            || object["apiVersion"].as_str() != Some("v1")
            || object["spec"]["finalizers"].as_array().is_none_or(Vec::is_empty))
}

/// Each subresource writes its own part, the main resource the rest.
fn restrict(cx: &Cx, sub: &str, object: &mut Value, old: &Value) -> ApiResult<()> {
    let r = &cx.resource;
    let keep_status = |object: &mut Value| match old.get("status") {
        Some(s) => object["status"] = s.clone(),
        None => {
            if let Some(map) = object.as_object_mut() {
                map.shift_remove("status");
            }
        }
    };
    match sub {
        "" => {
            if r.has_subresource("status") || r.kind == "Namespace" {
                keep_status(object);
            }
            if r.kind == "Namespace" && r.group.is_empty() {
                object["spec"]["finalizers"] = old["spec"]["finalizers"].clone();
            }
        }
        "status" | "approval" => {
            let mut next = old.clone();
            match object.get("status") {
                Some(s) => next["status"] = s.clone(),
                None => {
                    if let Some(map) = next.as_object_mut() {
                        map.shift_remove("status");
                    }
                }
            }
            if let Some(managed) = object["metadata"].get("managedFields").cloned() {
                next["metadata"]["managedFields"] = managed;
            }
            // Node agents report through node status also what they know of themselves.
            if r.kind == "Node" && r.group.is_empty() {
                for f in ["labels", "annotations"] {
                    if let Some(v) = object["metadata"].get(f).cloned() {
                        next["metadata"][f] = v;
                    }
                }
            }
            *object = next;
        }
        "finalize" => {
            let mut next = old.clone();
            next["spec"]["finalizers"] = object["spec"]["finalizers"].clone();
            *object = next;
        }
        "ephemeralcontainers" => {
            let mut next = old.clone();
            next["spec"]["ephemeralContainers"] = object["spec"]["ephemeralContainers"].clone();
            *object = next;
        }
        "resize" => {
            let mut next = old.clone();
            for (i, c) in object["spec"]["containers"]
                .as_array()
                .into_iter()
                .flatten()
                .enumerate()
            {
                if !next["spec"]["containers"][i].is_null() {
                    next["spec"]["containers"][i]["resources"] = c["resources"].clone();
                }
            }
            *object = next;
        }
        _ => {}
    }
    Ok(())
}

/// PATCH in all its forms.
pub(super) async fn patch(cx: &mut Cx, body: Body, form: Form) -> ApiResult<Response<Body>> {
    let kind = content_type(&cx.headers);
    let bytes = read_body(body).await?;
    let r = cx.resource.clone();
    let name = cx.info.name.clone();
    let parsed = patch::Patch::parse(&kind, &bytes, r.custom.is_some())?;
    if let patch::Patch::Apply(_) = parsed {
        return apply(cx, parsed, form).await;
    }
    for _ in 0..PATCH_ATTEMPTS {
        let entry = current(cx, &name)?;
        let old = convert::decode(&r, &entry)?;
        let mut object = parsed.apply(&r, &old)?;
        check_kind(&mut object, &r.group, &r.version, &r.kind)?;
        if meta::name(&object) != name {
            return Err(ApiError::bad_request(
                "the name of the object may not be changed by a patch",
            ));
        }
        // A patch that names a version or uid means it.
        let wanted = meta::text(&object, "resourceVersion").to_owned();
        if !wanted.is_empty() && wanted != entry.mod_rev.to_string() {
            return Err(ApiError::stale(&r.group, &r.plural, &name));
        }
        check_uid(cx, meta::text(&object, "uid"), &old)?;
        let warned = cx.warnings.len();
        cx.normalize(&mut object)?;
        if let Some(updated) = finish(cx, &entry, old, object, "Patch", None).await? {
            return Ok(object_response(cx, 200, &updated, form));
        }
        cx.warnings.truncate(warned);
    }
    Err(ApiError::stale(&r.group, &r.plural, &name))
}

/// Server-side apply: creates or updates.
async fn apply(cx: &mut Cx, parsed: patch::Patch, form: Form) -> ApiResult<Response<Body>> {
    let r = cx.resource.clone();
    let name = cx.info.name.clone();
    let patch::Patch::Apply(mut intent) = parsed else {
        return Err(ApiError::internal("not an apply patch"));
    };
    let manager = cx.query.get("fieldManager").map(str::to_owned).ok_or_else(|| {
        let cause = Cause::required("fieldManager", "is required for apply patch");
        ApiError::invalid("meta.k8s.io", "PatchOptions", "", &[cause])
    })?;
    let force = cx.query.flag("force");
    check_kind(&mut intent, &r.group, &r.version, &r.kind)?;
    if !intent["metadata"]["managedFields"].as_array().is_none_or(Vec::is_empty) {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let given = meta::name(&intent).to_owned();
    if given.is_empty() {
        meta::metadata(&mut intent)?.insert("name".into(), name.clone().into());
    } else if given != name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({name})"
        )));
    }
    // Unknown fields are judged in what the user sent, without defaults that would then be owned.
    let mut checked = intent.clone();
    cx.normalize(&mut checked)?;
    managed::drop_unknown(&mut intent, &checked);
    for _ in 0..PATCH_ATTEMPTS {
        let found = cx.server.store().get(&cx.key(&name))?.0;
        match found {
            None => {
                if !cx.info.subresource.is_empty() {
                    return Err(cx.not_found(&name));
                }
                let mut object = managed::apply(&r, None, &intent, &manager, force, "")?;
                prune_and_default(&r, &mut object)?;
                match create_object(cx, object, "Apply").await {
                    Ok(created) => return Ok(object_response(cx, 201, &created, form)),
                    Err(e) if e.reason == "AlreadyExists" => {}
                    Err(e) => return Err(e),
                }
            }
            Some(entry) => {
                let old = convert::decode(&r, &entry)?;
                let wanted = meta::text(&intent, "resourceVersion");
                if !wanted.is_empty() && wanted != entry.mod_rev.to_string() {
                    return Err(ApiError::stale(&r.group, &r.plural, &name));
                }
                check_uid(cx, meta::text(&intent, "uid"), &old)?;
                let sub = cx.info.subresource.clone();
                let mut object = managed::apply(&r, Some(&old), &intent, &manager, force, &sub)?;
                prune_and_default(&r, &mut object)?;
                if let Some(updated) = finish(cx, &entry, old, object, "Apply", Some(&manager)).await? {
                    return Ok(object_response(cx, 200, &updated, form));
                }
            }
        }
    }
    Err(ApiError::stale(&r.group, &r.plural, &name))
}

/// POST of a Binding: gives a pod its node.
pub(super) async fn bind(cx: &mut Cx, body: Body) -> ApiResult<Response<Body>> {
    let binding = read_document(cx, body)
        .await?
        .ok_or_else(|| ApiError::bad_request("the request has no body"))?;
    let node = binding["target"]["name"].as_str().unwrap_or_default().to_owned();
    if node.is_empty() {
        let cause = Cause::required("target.name", "");
        return Err(ApiError::invalid("", "Binding", &cx.info.name, &[cause]));
    }
    let name = if cx.info.name.is_empty() {
        meta::name(&binding).to_owned()
    } else {
        cx.info.name.clone()
    };
    let pods = cx
        .server
        .registry()?
        .get("", "v1", "pods")
        .cloned()
        .ok_or_else(ApiError::no_such_path)?;
    let key = pods.key(cx.info.namespace.as_deref(), &name);
    let dry_run = cx.dry_run()?;
    for _ in 0..PATCH_ATTEMPTS {
        let entry = cx
            .server
            .store()
            .get(&key)?
            .0
            .ok_or_else(|| ApiError::not_found("", "pods", &name))?;
        let mut pod = convert::decode(&pods, &entry)?;
        if pod["spec"]["nodeName"].as_str().is_some_and(|n| !n.is_empty()) {
            let why = format!(
                "pod {name} is already assigned to node {:?}",
                pod["spec"]["nodeName"].as_str().unwrap_or_default()
            );
            return Err(ApiError::conflict("", "pods/binding", &name, &why));
        }
        if meta::is_deleting(&pod) {
            return Err(ApiError::conflict(
                "",
                "pods/binding",
                &name,
                &format!("pod {name} is being deleted, cannot be assigned to a host"),
            ));
        }
        pod["spec"]["nodeName"] = node.clone().into();
        builtin::set_condition(&mut pod, "PodScheduled", "True", None);
        if dry_run {
            break;
        }
        let bytes = convert::encode(&pods, &pod)?;
        match cx
            .server
            .store()
            .commit(Txn::replace(key.clone(), entry.mod_rev, bytes))
            .await
        {
            Ok(_) => break,
            Err(StoreError::Conflict { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(json_response(
        201,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    ))
}
