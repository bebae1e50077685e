//! Events about pods, as `kubectl describe` shows them.
//!
//! One task writes; the same event again raises its count. Losing an event is not an error of the pod.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::mpsc;

use super::NODE_NAME;

/// Distinct events remembered for counting.
const MAX_REMEMBERED: usize = 4096;
/// Events waiting to be written; more are dropped.
const QUEUE: usize = 1024;

#[derive(Debug)]
struct Note {
    namespace: String,
    name: String,
    uid: String,
    field: Option<String>,
    kind: &'static str,
    reason: &'static str,
    message: String,
}

/// Hands events to the writer.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<Note>,
}

impl Recorder {
    /// Starts the writer.
    pub(crate) fn start(client: kube::Client) -> Self {
        let (queue, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(write(client, receiver));
        Self { queue }
    }

    pub(crate) fn normal(&self, pod: &Pod, container: Option<&str>, reason: &'static str, message: impl Into<String>) {
        self.note(pod, container, "Normal", reason, message.into());
    }

    pub(crate) fn warning(&self, pod: &Pod, container: Option<&str>, reason: &'static str, message: impl Into<String>) {
        self.note(pod, container, "Warning", reason, message.into());
    }

    fn note(&self, pod: &Pod, container: Option<&str>, kind: &'static str, reason: &'static str, message: String) {
        let is_init = |name: &str| {
            pod.spec
                .as_ref()
                .and_then(|s| s.init_containers.as_ref())
                .is_some_and(|c| c.iter().any(|c| c.name == name))
        };
        let field = container.map(|name| {
            let list = if is_init(name) { "initContainers" } else { "containers" };
            format!("spec.{list}{{{name}}}")
        });
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let note = Note {
            namespace: text(&pod.metadata.namespace),
            name: text(&pod.metadata.name),
            uid: text(&pod.metadata.uid),
            field,
            kind,
            reason,
            message: message.chars().take(1024).collect(),
        };
        if self.queue.try_send(note).is_err() {
            tracing::warn!(reason, "an event was dropped: too many are waiting");
        }
    }
}

/// What makes two events the same: pod, field, reason, message.
type Key = (String, Option<String>, &'static str, String);

async fn write(client: kube::Client, mut queue: mpsc::Receiver<Note>) {
    let mut known: HashMap<Key, (String, u32)> = HashMap::new();
    while let Some(note) = queue.recv().await {
        let api: Api<Event> = Api::namespaced(client.clone(), &note.namespace);
        let now = now();
        let key = (note.uid.clone(), note.field.clone(), note.reason, note.message.clone());
        if let Some((name, count)) = known.get_mut(&key) {
            *count += 1;
            let patch = json!({"count": count, "lastTimestamp": now});
            if api
                .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
                .await
                .is_ok()
            {
                continue;
            }
        }
        if known.len() >= MAX_REMEMBERED {
            known.clear();
        }
        let name = format!("{}.{:016x}", note.name, rand::random::<u64>());
        let event: Result<Event, _> = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": name, "namespace": note.namespace},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", "namespace": note.namespace, "name": note.name,
                "uid": note.uid, "fieldPath": note.field},
            "reason": note.reason, "message": note.message, "type": note.kind, "count": 1,
            "firstTimestamp": now, "lastTimestamp": now,
            "source": {"component": "kubelet", "host": NODE_NAME},
            "reportingComponent": "kubelet", "reportingInstance": NODE_NAME,
        }));
        let result = match event {
            Ok(event) => api
                .create(&PostParams::default(), &event)
                .await
                .map(drop)
                .map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match result {
            Ok(()) => drop(known.insert(key, (name, 1))),
            // The namespace is going away, or the API server is.
            Err(error) => tracing::debug!(reason = note.reason, error, "an event could not be written"),
        }
    }
}

/// Now in the API's format, whole seconds.
pub(crate) fn now() -> String {
    format(time::OffsetDateTime::now_utc())
}

pub(crate) fn format(at: time::OffsetDateTime) -> String {
    let (h, m, s) = at.to_hms();
    format!(
        "{:04}-{:02}-{:02}T{h:02}:{m:02}:{s:02}Z",
        at.year(),
        u8::from(at.month()),
        at.day()
    )
}
