//! watch: a stream of changes as JSON lines.
//!
//! Starts with synthetic additions when no resource version is given (or with `sendInitialEvents`), goes on from the log, turns
//! changes into what the selector sees, sends bookmarks, and ends with 410 when the client was too slow or too old.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use serde_json::{Value, json};

use super::read::{Selection, select};
use super::{Cx, convert};
use crate::error::{ApiError, ApiResult, Cause};
use crate::http::{Body, Form};
use crate::store::{Event, Watcher};
use crate::table::{self, Include};

struct Stream {
    cx: Cx,
    form: Form,
    selection: Selection,
    watcher: Watcher,
    /// Lines to send before anything else.
    queue: std::collections::VecDeque<Bytes>,
    bookmarks: Option<tokio::time::Interval>,
    deadline: tokio::time::Instant,
    columns_sent: bool,
    finished: bool,
    last: u64,
}

/// Answers a watch request.
pub(super) fn watch(cx: Cx, form: Form) -> ApiResult<Response<Body>> {
    let bad =
        |field: &str, text: &str| ApiError::invalid("meta.k8s.io", "ListOptions", "", &[Cause::forbidden(field, text)]);
    let selection = Selection::of(&cx)?;
    let version = match cx.query.get("resourceVersion") {
        None | Some("0") => None,
        Some(v) => {
            let why = || ApiError::bad_request(format!("invalid resource version {v:?}: must be a number"));
            Some(v.parse::<u64>().map_err(|_| why())?)
        }
    };
    let allow_bookmarks = cx.query.flag("allowWatchBookmarks");
    let send_initial = match cx.query.get("sendInitialEvents") {
        None => None,
        Some(_) => Some(cx.query.flag("sendInitialEvents")),
    };
    if send_initial.is_some() && cx.query.get("resourceVersionMatch") != Some("NotOlderThan") {
        return Err(bad(
            "resourceVersionMatch",
            "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        ));
    }
    let mut queue = std::collections::VecDeque::new();
    let mut columns_sent = false;
    let initial = send_initial == Some(true) || (send_initial.is_none() && version.is_none());
    let from = if initial {
        let (objects, revision) = select(&cx, &selection)?;
        if version.is_some_and(|v| v > revision) {
            return Err(crate::store::StoreError::Future {
                requested: version.unwrap_or(0),
                current: revision,
            }
            .into());
        }
        for object in &objects {
            queue.push_back(line("ADDED", &shaped(&cx, form, object, !columns_sent)));
            columns_sent = true;
        }
        if send_initial == Some(true) && allow_bookmarks {
            queue.push_back(line("BOOKMARK", &bookmark(&cx, form, revision, true, !columns_sent)));
        }
        revision
    } else {
        version.unwrap_or_else(|| cx.server.store().revision())
    };
    let watcher = cx
        .server
        .store()
        .watch(&cx.resource.namespace_prefix(cx.namespace()), from)?;
    let seconds = match cx.query.get("timeoutSeconds") {
        Some(s) => s
            .parse::<u64>()
            .map_err(|_| ApiError::bad_request("timeoutSeconds must be a number"))?
            .clamp(1, 86_400),
        None => rand::random_range(1800..3600),
    };
    let period = Duration::from_secs(cx.server.config().bookmark_seconds.max(1));
    let bookmarks = allow_bookmarks.then(|| {
        let mut i = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
        i.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        i
    });
    let content_type = match form {
        Form::Object => "application/json".to_owned(),
        Form::Table { beta } => format!(
            "application/json;as=Table;v={};g=meta.k8s.io",
            if beta { "v1beta1" } else { "v1" }
        ),
        Form::Metadata { beta } => {
            format!(
                "application/json;as=PartialObjectMetadata;v={};g=meta.k8s.io",
                if beta { "v1beta1" } else { "v1" }
            )
        }
    };
    let warnings = cx.warnings.clone();
    let stream = Stream {
        deadline: tokio::time::Instant::now() + Duration::from_secs(seconds),
        cx,
        form,
        selection,
        watcher,
        queue,
        bookmarks,
        columns_sent,
        finished: false,
        last: from,
    };
    let frames = futures::stream::unfold(stream, |mut s| async move {
        let bytes = s.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(bytes)), s))
    });
    let body = StreamBody::new(frames).map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    if let Ok(v) = content_type.parse() {
        response.headers_mut().insert(header::CONTENT_TYPE, v);
    }
    response.headers_mut().insert(
        header::CACHE_CONTROL,
        header::HeaderValue::from_static("no-cache, private"),
    );
    crate::http::add_warnings(&mut response, &warnings);
    Ok(response)
}

impl Stream {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(line) = self.queue.pop_front() {
                return Some(line);
            }
            if self.finished {
                return None;
            }
            let tick = async {
                match &mut self.bookmarks {
                    Some(interval) => {
                        interval.tick().await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(self.deadline) => return None,
                event = self.watcher.next() => match event {
                    Some(event) => {
                        self.last = event.revision;
                        if let Some(line) = self.translate(&event) {
                            return Some(line);
                        }
                    }
                    None => {
                        self.finished = true;
                        let e = ApiError::expired(format!("too old resource version: {} (the watch was too slow)", self.last));
                        return Some(line("ERROR", &e.status()));
                    }
                },
                () = tick => {
                    if let Some(revision) = self.watcher.idle_at() {
                        let first = !self.columns_sent;
                        return Some(line("BOOKMARK", &bookmark(&self.cx, self.form, revision, false, first)));
                    }
                }
            }
        }
    }

    /// What a change means to someone who sees only the selected objects.
    fn translate(&mut self, event: &Arc<Event>) -> Option<Bytes> {
        let (new, old) = event.documents();
        let resource = &self.cx.resource;
        let serve = |v: &Arc<Value>| convert::serve(resource, (**v).clone(), event.revision);
        let matches = |v: &Option<Arc<Value>>| {
            v.as_ref().is_some_and(|v| {
                if resource.group == "events.k8s.io" {
                    self.selection.matches(&serve(v))
                } else {
                    self.selection.matches(v)
                }
            })
        };
        let (kind, object) = match (matches(new), matches(old)) {
            (true, false) => ("ADDED", serve(new.as_ref()?)),
            (true, true) => ("MODIFIED", serve(new.as_ref()?)),
            // The last state that was visible, with the revision of the change that ended it.
            (false, true) => ("DELETED", serve(old.as_ref()?)),
            (false, false) => return None,
        };
        let first = !self.columns_sent;
        self.columns_sent = true;
        Some(line(kind, &shaped(&self.cx, self.form, &object, first)))
    }
}

fn line(kind: &str, object: &Value) -> Bytes {
    let mut out = Vec::with_capacity(256);
    out.extend_from_slice(b"{\"type\":\"");
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(b"\",\"object\":");
    // Writing a JSON value to memory cannot fail.
    let _ = serde_json::to_writer(&mut out, object);
    out.extend_from_slice(b"}\n");
    out.into()
}

fn shaped(cx: &Cx, form: Form, object: &Value, first: bool) -> Value {
    match form {
        Form::Object => object.clone(),
        Form::Metadata { beta } => table::partial(object, beta),
        Form::Table { beta } => {
            let include = Include::parse(cx.query.get("includeObject"));
            let list_meta = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
            table::table(
                &cx.resource,
                std::slice::from_ref(object),
                list_meta,
                include,
                beta,
                first,
            )
        }
    }
}

fn bookmark(cx: &Cx, form: Form, revision: u64, initial_end: bool, first: bool) -> Value {
    let mut metadata = json!({"resourceVersion": revision.to_string(), "creationTimestamp": null});
    if initial_end {
        metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
    }
    let object = json!({"kind": cx.resource.kind, "apiVersion": cx.resource.api_version(), "metadata": metadata});
    match form {
        Form::Object => object,
        Form::Metadata { beta } => table::partial(&object, beta),
        Form::Table { beta } => {
            let list_meta = json!({"resourceVersion": revision.to_string()});
            table::table(&cx.resource, &[object], list_meta, Include::Metadata, beta, first)
        }
    }
}
