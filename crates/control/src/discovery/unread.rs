//! Says on objects of kinds that translation does not read that they have no effect.
//!
//! The same condition that [`super::status`] writes on the others: `Reconciled` is `False`, with the reason. Nothing else depends on these
//! objects, so they are watched here alone and readiness does not wait for them.

use futures::StreamExt;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use mantlet_translate::report::{UNREAD, unread};
use serde_json::Value;

use super::status::{Current, condition};

/// Watches all such kinds; does not end.
pub async fn run(client: Client) {
    futures::future::join_all(UNREAD.map(|(group, version, plural, kind)| {
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        follow(client.clone(), resource)
    }))
    .await;
}

async fn follow(client: Client, resource: ApiResource) {
    let all: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let mut events = watcher(all, watcher::Config::default()).default_backoff().boxed();
    while let Some(event) = events.next().await {
        let object = match event {
            Ok(Event::InitApply(object) | Event::Apply(object)) => object,
            // A kind whose CRD is not installed is asked for again, as after any other failure.
            Ok(Event::Init | Event::InitDone | Event::Delete(_)) | Err(_) => continue,
        };
        let Some(message) = needed(&resource.kind, &object) else {
            continue;
        };
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        tracing::warn!(target: "config", "{} {namespace}/{name}: {message}", resource.kind);
        let patch = condition(object.metadata.generation.unwrap_or_default(), "False", &message);
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &namespace, &resource);
        let written = api
            .patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        if let Err(error) = written {
            tracing::warn!(target: "status", "{} {namespace}/{name}: {error}", resource.kind);
        }
    }
}

/// The message to write, unless it stands there already.
fn needed(kind: &str, object: &DynamicObject) -> Option<String> {
    let problems = unread(kind, &Value::Null);
    if problems.is_empty() {
        return None;
    }
    let message = problems.join("; ");
    let generation = object.metadata.generation.unwrap_or_default().to_string();
    let stands =
        Current::of(object).is_some_and(|c| c.status == "False" && c.message == message && c.generation == generation);
    (!stands).then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(generation: i64, status: Value) -> DynamicObject {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "networking.istio.io/v1alpha3",
            "kind": "EnvoyFilter",
            "metadata": {"name": "x", "namespace": "a", "generation": generation},
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn written_once_per_version() {
        let fresh = object(1, Value::Null);
        let message = needed("EnvoyFilter", &fresh).unwrap();
        assert!(message.contains("ignore"), "{message}");
        let told = condition(1, "False", &message)["status"].clone();
        assert_eq!(needed("EnvoyFilter", &object(1, told.clone())), None);
        assert_eq!(needed("EnvoyFilter", &object(2, told)), Some(message));
        assert_eq!(needed("PeerAuthentication", &fresh), None);
    }
}
