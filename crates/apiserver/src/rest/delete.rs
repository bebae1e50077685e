//! delete, deletecollection, eviction, and the clean-up after a definition is deleted.

use std::sync::Arc;

use http::Response;
use serde_json::{Value, json};

use super::read::{Selection, select};
use super::{Cx, convert, object_response, read_document};
use crate::admission::{self, Operation, Review};
use crate::auth::Identity;
use crate::builtin::alloc;
use crate::crd;
use crate::error::{ApiError, ApiResult, Cause, success_status};
use crate::http::{Body, Form, json_response};
use crate::meta;
use crate::request::{Query, RequestInfo};
use crate::server::ApiServer;
use crate::store::{StoreError, Txn};

const ATTEMPTS: usize = 20;

/// `DeleteOptions`, from the body and the query.
#[derive(Debug, Clone, Default)]
struct Options {
    grace: Option<i64>,
    propagation: Option<String>,
    uid: Option<String>,
    revision: Option<String>,
    dry_run: bool,
}

impl Options {
    fn read(cx: &Cx, body: Option<&Value>) -> ApiResult<Self> {
        let empty = Value::Null;
        let body = body.unwrap_or(&empty);
        let kind = body["kind"].as_str().unwrap_or("DeleteOptions");
        if kind != "DeleteOptions" && kind != "Eviction" && kind != "Status" {
            return Err(ApiError::bad_request(format!(
                "the body of a deletion must be DeleteOptions, not {kind}"
            )));
        }
        let invalid = |cause: Cause| ApiError::invalid("meta.k8s.io", "DeleteOptions", "", &[cause]);
        let grace = match cx.query.get("gracePeriodSeconds") {
            Some(s) => Some(
                s.parse()
                    .map_err(|_| ApiError::bad_request("gracePeriodSeconds must be a number"))?,
            ),
            None => body["gracePeriodSeconds"].as_i64(),
        };
        if grace.is_some_and(|g| g < 0) {
            return Err(invalid(Cause::invalid(
                "gracePeriodSeconds",
                &json!(grace),
                "must be greater than or equal to 0",
            )));
        }
        let propagation = cx
            .query
            .get("propagationPolicy")
            .map(str::to_owned)
            .or_else(|| body["propagationPolicy"].as_str().map(str::to_owned));
        if let Some(p) = &propagation
            && !matches!(p.as_str(), "Orphan" | "Background" | "Foreground")
        {
            let cause = Cause::not_supported("propagationPolicy", &json!(p), &["Foreground", "Background", "Orphan"]);
            return Err(invalid(cause));
        }
        let in_body = match &body["dryRun"] {
            Value::Array(list) if list.iter().any(|v| v.as_str() != Some("All")) => {
                return Err(invalid(Cause::not_supported("dryRun", &body["dryRun"], &["All"])));
            }
            Value::Array(list) => !list.is_empty(),
            _ => false,
        };
        let text = |v: &Value| v.as_str().filter(|s| !s.is_empty()).map(str::to_owned);
        Ok(Self {
            grace,
            propagation,
            uid: text(&body["preconditions"]["uid"]),
            revision: text(&body["preconditions"]["resourceVersion"]),
            dry_run: cx.dry_run()? || in_body,
        })
    }
}

/// DELETE on an object.
pub(super) async fn delete(cx: &mut Cx, body: Body, form: Form) -> ApiResult<Response<Body>> {
    let document = read_document(cx, body).await?;
    let options = Options::read(cx, document.as_ref())?;
    let name = cx.info.name.clone();
    let (object, gone) = delete_one(cx, &name, &options).await?;
    let r = &cx.resource;
    if gone
        && r.custom.is_none()
        && !(r.group.is_empty()
            && matches!(
                r.kind.as_str(),
                "Pod" | "Service" | "ServiceAccount" | "PersistentVolumeClaim"
            ))
    {
        return Ok(json_response(
            200,
            &success_status(&r.group, &r.plural, &name, meta::text(&object, "uid")),
        ));
    }
    if gone && r.custom.is_some() {
        return Ok(json_response(
            200,
            &success_status(&r.group, &r.plural, &name, meta::text(&object, "uid")),
        ));
    }
    Ok(object_response(cx, 200, &object, form))
}

/// Deletes one object, or marks it; returns its last state and whether it is gone.
async fn delete_one(cx: &mut Cx, name: &str, options: &Options) -> ApiResult<(Value, bool)> {
    let r = cx.resource.clone();
    for _ in 0..ATTEMPTS {
        let entry = super::write::current(cx, name)?;
        let mut object = convert::decode(&r, &entry)?;
        if let Some(uid) = &options.uid {
            super::write::check_uid(cx, uid, &object)?;
        }
        if let Some(revision) = &options.revision
            && *revision != entry.mod_rev.to_string()
        {
            let why = format!(
                "Precondition failed: ResourceVersion in precondition: {revision}, ResourceVersion in object meta: {}",
                entry.mod_rev
            );
            return Err(ApiError::conflict(&r.group, &r.plural, name, &why));
        }
        if r.group.is_empty() && r.kind == "Namespace" && matches!(name, "default" | "kube-system" | "kube-public") {
            return Err(cx.forbidden(name, "this namespace may not be deleted"));
        }
        let review = Review {
            operation: Operation::Delete,
            subresource: "",
            old: Some(&object),
            dry_run: options.dry_run,
            options: json!({"kind": "DeleteOptions", "apiVersion": "meta.k8s.io/v1"}),
        };
        admission::validate(cx, &review, None).await?;

        let before = object.clone();
        mark(&r, &mut object, options)?;
        let gone = super::write::complete(&object);
        if options.dry_run {
            return Ok((object, gone));
        }
        if !gone && object == before {
            return Ok((object, false));
        }
        let mut txn = if gone {
            Txn::delete(entry.key.clone(), entry.mod_rev)
        } else {
            if meta::has_generation(&r) && !meta::is_deleting(&before) {
                let generation = before["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
                object["metadata"]["generation"] = generation.into();
            }
            Txn::replace(entry.key.clone(), entry.mod_rev, convert::encode(&r, &object)?)
        };
        if gone {
            alloc::release(&r, &before, &mut txn);
        }
        match cx.server.store().commit(txn).await {
            Ok(revisions) => {
                if let Some(rev) = revisions.first().filter(|_| !gone) {
                    meta::set_revision(&mut object, *rev);
                }
                if r.group == crd::GROUP && r.plural == crd::PLURAL && !gone {
                    spawn_clean_up(cx.server.clone(), object.clone());
                }
                return Ok((if gone { before } else { object }, gone));
            }
            Err(StoreError::Conflict { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(ApiError::stale(&r.group, &r.plural, name))
}

/// Writes into an object what its deletion means.
fn mark(r: &crate::resources::Resource, object: &mut Value, options: &Options) -> ApiResult<()> {
    let is_pod = r.group.is_empty() && r.kind == "Pod";
    let first = !meta::is_deleting(object);
    let grace = if is_pod {
        let unbound = object["spec"]["nodeName"].as_str().unwrap_or_default().is_empty();
        let over = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
        let default = object["spec"]["terminationGracePeriodSeconds"].as_i64().unwrap_or(30);
        if unbound || over {
            0
        } else {
            options.grace.unwrap_or(default)
        }
    } else {
        0
    };
    let mut finalizers: Vec<String> = meta::finalizers(object).into_iter().map(str::to_owned).collect();
    if first {
        if r.group == crd::GROUP && r.plural == crd::PLURAL && !finalizers.iter().any(|f| f == crd::CLEANUP) {
            finalizers.push(crd::CLEANUP.into());
        }
        match options.propagation.as_deref() {
            Some("Orphan") => {
                finalizers.retain(|f| f != "foregroundDeletion");
                if !finalizers.iter().any(|f| f == "orphan") {
                    finalizers.push("orphan".into());
                }
            }
            Some("Foreground") => {
                finalizers.retain(|f| f != "orphan");
                if !finalizers.iter().any(|f| f == "foregroundDeletion") {
                    finalizers.push("foregroundDeletion".into());
                }
            }
            Some(_) => finalizers.retain(|f| f != "orphan" && f != "foregroundDeletion"),
            None => {}
        }
    }
    let now = time::OffsetDateTime::now_utc();
    let m = meta::metadata(object)?;
    if finalizers.is_empty() {
        m.shift_remove("finalizers");
    } else {
        m.insert("finalizers".into(), json!(finalizers));
    }
    if first {
        m.insert(
            "deletionTimestamp".into(),
            meta::format_time(now + time::Duration::seconds(grace)).into(),
        );
        m.insert("deletionGracePeriodSeconds".into(), grace.into());
    } else {
        // A grace period may only become shorter.
        let have = m.get("deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
        let wanted = if is_pod {
            if options.grace.is_some() || grace == 0 {
                grace
            } else {
                have
            }
        } else {
            have
        };
        if wanted < have {
            m.insert(
                "deletionTimestamp".into(),
                meta::format_time(now + time::Duration::seconds(wanted)).into(),
            );
            m.insert("deletionGracePeriodSeconds".into(), wanted.into());
        }
    }
    if r.group.is_empty() && r.kind == "Namespace" && first {
        object["status"]["phase"] = "Terminating".into();
    }
    Ok(())
}

/// DELETE on a collection.
pub(super) async fn collection(cx: &mut Cx, body: Body) -> ApiResult<Response<Body>> {
    let document = read_document(cx, body).await?;
    let options = Options::read(cx, document.as_ref())?;
    let selection = Selection::of(cx)?;
    let (objects, _) = select(cx, &selection)?;
    let mut items = Vec::new();
    let all_namespaces = cx.resource.namespaced && cx.info.namespace.is_none();
    for object in objects {
        if all_namespaces {
            cx.info.namespace = Some(meta::namespace(&object).to_owned());
        }
        match delete_one(cx, meta::name(&object), &options).await {
            Ok((object, _)) => items.push(object),
            Err(e) if e.code == 404 => {}
            Err(e) => return Err(e),
        }
    }
    if all_namespaces {
        cx.info.namespace = None;
    }
    let (revision, r) = (cx.server.store().revision(), &cx.resource);
    let body = json!({
        "kind": r.list_kind, "apiVersion": r.api_version(), "metadata": {"resourceVersion": revision.to_string()}, "items": items,
    });
    Ok(json_response(200, &body))
}

/// POST of an Eviction: a deletion that honours disruption budgets.
pub(super) async fn evict(cx: &mut Cx, body: Body) -> ApiResult<Response<Body>> {
    let document = read_document(cx, body).await?;
    let empty = json!({});
    let inner = document.as_ref().map_or(&empty, |d| &d["deleteOptions"]);
    let options = Options::read(cx, Some(inner))?;
    let name = cx.info.name.clone();
    let entry = super::write::current(cx, &name)?;
    let pod = convert::decode(&cx.resource, &entry)?;
    let namespace = cx.info.namespace.clone().unwrap_or_default();
    let budgets = cx
        .server
        .store()
        .range(&format!("/policy/poddisruptionbudgets/{namespace}/"), None, 0)?;
    for entry in &budgets.entries {
        let budget: Value = serde_json::from_slice(&entry.value).map_err(ApiError::internal)?;
        let selects = budget["spec"]["selector"].is_object()
            && crate::selector::LabelSelector::from_object(&budget["spec"]["selector"])?.matches(&pod);
        if selects && budget["status"]["disruptionsAllowed"].as_i64().unwrap_or(0) <= 0 {
            let mut e =
                ApiError::too_many_requests("Cannot evict pod as it would violate the pod's disruption budget.");
            let text = format!(
                "The disruption budget {} needs {} healthy pods and has {} currently",
                meta::name(&budget),
                budget["status"]["desiredHealthy"].as_i64().unwrap_or(0),
                budget["status"]["currentHealthy"].as_i64().unwrap_or(0)
            );
            e.details = Some(Box::new(
                json!({"causes": [{"reason": "DisruptionBudget", "message": text}]}),
            ));
            return Err(e);
        }
    }
    delete_one(cx, &name, &options).await?;
    Ok(json_response(
        201,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    ))
}

/// Starts the clean-up of a deleted definition.
fn spawn_clean_up(server: Arc<ApiServer>, definition: Value) {
    tokio::spawn(clean_up(server, definition));
}

/// Removes the objects of a deleted definition, then the definition's own finalizer.
async fn clean_up(server: Arc<ApiServer>, definition: Value) {
    if let Err(e) = try_clean_up(&server, &definition).await {
        tracing::warn!(definition = meta::name(&definition), error = %e, "cleaning up after a definition failed; it goes on at the next start");
    }
}

async fn try_clean_up(server: &Arc<ApiServer>, definition: &Value) -> ApiResult<()> {
    let mut delay = std::time::Duration::from_millis(50);
    let name = meta::name(definition);
    let resources = crd::resources(definition);
    loop {
        let mut left = 0;
        if let Some(r) = resources.first() {
            let snapshot = server.store().range(&r.prefix(), None, 0)?;
            left = snapshot.entries.len();
            for entry in &snapshot.entries {
                let object = convert::decode(r, entry)?;
                let mut cx = internal(server, r, meta::namespace(&object));
                match delete_one(&mut cx, meta::name(&object), &Options::default()).await {
                    Ok((_, true)) => left -= 1,
                    Ok(_) => {}
                    Err(e) if e.code == 404 => left -= 1,
                    Err(e) => return Err(e),
                }
            }
        }
        if left == 0 {
            break;
        }
        // Objects with finalizers wait for whoever put them there; look again when something changes, or after a while.
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(std::time::Duration::from_secs(5));
    }
    let key = format!("/{}/{}/{name}", crd::GROUP, crd::PLURAL);
    for _ in 0..ATTEMPTS {
        let Some(entry) = server.store().get(&key)?.0 else {
            return Ok(());
        };
        let mut object: Value = serde_json::from_slice(&entry.value).map_err(ApiError::internal)?;
        let left: Vec<String> = meta::finalizers(&object)
            .into_iter()
            .filter(|f| *f != crd::CLEANUP)
            .map(str::to_owned)
            .collect();
        let txn = if left.is_empty() {
            Txn::delete(key.clone(), entry.mod_rev)
        } else {
            object["metadata"]["finalizers"] = json!(left);
            Txn::replace(
                key.clone(),
                entry.mod_rev,
                serde_json::to_vec(&object).map_err(ApiError::internal)?.into(),
            )
        };
        match server.store().commit(txn).await {
            Ok(_) => return Ok(()),
            Err(StoreError::Conflict { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// A context for the server's own deletions.
fn internal(server: &Arc<ApiServer>, r: &crate::resources::Resource, namespace: &str) -> Cx {
    Cx {
        server: server.clone(),
        user: Arc::new(Identity::admin("system:apiserver")),
        info: RequestInfo {
            namespace: r.namespaced.then(|| namespace.to_owned()),
            ..RequestInfo::default()
        },
        query: Query::default(),
        resource: Arc::new(r.clone()),
        headers: http::HeaderMap::new(),
        warnings: vec![],
    }
}

/// How long events are kept, as in kube-apiserver.
const EVENT_TTL: time::Duration = time::Duration::hours(1);

/// Removes events that are older than their time, until the server is gone.
pub(crate) fn expire_events(server: &Arc<ApiServer>) {
    let server = Arc::downgrade(server);
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(std::time::Duration::from_secs(300));
        loop {
            tick.tick().await;
            let Some(server) = server.upgrade() else { return };
            if let Err(e) = remove_events_before(&server, time::OffsetDateTime::now_utc() - EVENT_TTL).await {
                tracing::warn!(error = %e, "expiring events failed");
            }
        }
    });
}

async fn remove_events_before(server: &ApiServer, limit: time::OffsetDateTime) -> ApiResult<()> {
    for entry in server.store().range("/core/events/", None, 0)?.entries {
        let Ok(event) = serde_json::from_slice::<Value>(&entry.value) else {
            continue;
        };
        let times = [
            &event["series"]["lastObservedTime"],
            &event["lastTimestamp"],
            &event["eventTime"],
            &event["metadata"]["creationTimestamp"],
        ];
        let newest = times.iter().filter_map(|t| meta::parse_time(t.as_str()?)).max();
        if newest.is_some_and(|t| t < limit) {
            match server.store().commit(Txn::delete(entry.key, entry.mod_rev)).await {
                Ok(_) | Err(StoreError::Conflict { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// Goes on with clean-ups that a former process left unfinished.
pub(crate) fn resume_cleanups(server: &Arc<ApiServer>) {
    let Ok(snapshot) = server
        .store()
        .range(&format!("/{}/{}/", crd::GROUP, crd::PLURAL), None, 0)
    else {
        return;
    };
    for entry in &snapshot.entries {
        if let Ok(definition) = serde_json::from_slice::<Value>(&entry.value)
            && meta::is_deleting(&definition)
        {
            spawn_clean_up(server.clone(), definition);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn old_events_go() {
        let dir = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let config = crate::Config::new(dir.path().join("store.redb"), "", key.serialize_pem());
        let server = ApiServer::open(config).await.unwrap();
        // Far ahead, because an opened server also removes what is old by its own clock.
        let put = |name: &str, at: &str| {
            let event =
                json!({"metadata": {"name": name, "creationTimestamp": "2020-01-01T00:00:00Z"}, "lastTimestamp": at});
            Txn::create(format!("/core/events/default/{name}"), event.to_string().into())
        };
        server.store().commit(put("old", "2999-01-01T00:00:00Z")).await.unwrap();
        server.store().commit(put("new", "2999-01-01T02:00:00Z")).await.unwrap();
        remove_events_before(&server, meta::parse_time("2999-01-01T01:00:00Z").unwrap())
            .await
            .unwrap();
        let left = server.store().range("/core/events/", None, 0).unwrap().entries;
        assert_eq!(
            left.iter().map(|e| e.key.as_str()).collect::<Vec<_>>(),
            ["/core/events/default/new"]
        );
    }
}
