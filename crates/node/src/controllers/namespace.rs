//! Namespace lifecycle: a namespace that is being deleted is emptied, then released.

use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DeleteParams, DynamicObject, ListParams, PropagationPolicy};
use kube::discovery::{Scope, verbs};
use kube::{Api, ResourceExt};
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::{Context, Error, gc, not_found};

/// Pods in their grace period end with an event that brings the namespace back; this is for kinds that no cache holds.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let queue = Queue::new();
    context.informers.namespaces.subscribe(Box::new({
        let queue = queue.clone();
        move |_old, new| {
            if let Some(namespace) = new.filter(|namespace| namespace.metadata.deletion_timestamp.is_some()) {
                queue.add(namespace.name_any());
            }
        }
    }));
    context.informers.pods.subscribe(Box::new({
        let queue = queue.clone();
        let informers = std::sync::Arc::downgrade(&context.informers);
        move |old, new| {
            let (Some(pod), None, Some(informers)) = (old, new, informers.upgrade()) else {
                return;
            };
            let name = pod.namespace().unwrap_or_default();
            let namespace = informers.namespaces.get(&Key::new("", &name));
            if namespace.is_some_and(|namespace| namespace.metadata.deletion_timestamp.is_some()) {
                queue.add(name);
            }
        }
    }));
    queue::run("namespace", queue, 2, stop, move |name: String| {
        let context = context.clone();
        async move { reconcile(&context, &name).await }
    })
    .await;
}

async fn reconcile(context: &Context, name: &str) -> Result<Option<Duration>, Error> {
    let Some(namespace) = context.informers.namespaces.get(&Key::new("", name)) else {
        return Ok(None);
    };
    let finalizers = namespace
        .spec
        .as_ref()
        .and_then(|spec| spec.finalizers.clone())
        .unwrap_or_default();
    if namespace.metadata.deletion_timestamp.is_none() {
        return Ok(None);
    }
    let mut left = 0;
    for (resource, capabilities) in gc::deletable(&context.client).await? {
        if !matches!(capabilities.scope, Scope::Namespaced) {
            continue;
        }
        let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), name, &resource);
        let objects = match api.list_metadata(&ListParams::default()).await {
            Ok(objects) => objects,
            Err(error) if not_found(&error) => continue,
            Err(error) => return Err(error.into()),
        };
        left += objects.items.len();
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            ..DeleteParams::default()
        };
        let unmarked = objects
            .items
            .iter()
            .filter(|object| object.metadata.deletion_timestamp.is_none());
        if capabilities.supports_operation(verbs::DELETE_COLLECTION) && unmarked.clone().count() > 1 {
            api.delete_collection(&params, &ListParams::default()).await?;
            continue;
        }
        for object in unmarked {
            match api.delete(&object.name_any(), &params).await {
                Ok(_) => {}
                Err(error) if not_found(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    if left > 0 {
        // What has just been deleted may be gone by now.
        return Ok(Some(LOOK_AGAIN.min(Duration::from_millis(50 * left as u64))));
    }
    if finalizers.iter().any(|finalizer| finalizer == "kubernetes") {
        let mut released = namespace.as_ref().clone();
        if let Some(spec) = &mut released.spec {
            spec.finalizers = Some(
                finalizers
                    .into_iter()
                    .filter(|finalizer| finalizer != "kubernetes")
                    .collect(),
            );
        }
        let api: Api<Namespace> = Api::all(context.client.clone());
        let answer = api
            .replace_subresource("finalize", name, &Default::default(), &released)
            .await;
        match answer {
            Ok(_) => {}
            Err(error) if not_found(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}
