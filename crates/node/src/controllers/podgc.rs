//! Removes pods whose node does not exist any more: nobody would ever confirm their end.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::DeleteParams;
use kube::{Api, ResourceExt};
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::{Context, Error, ignore_not_found, not_found};

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let queue = Queue::new();
    context.informers.pods.subscribe(Box::new({
        let queue = queue.clone();
        move |_old, new| {
            if let Some(pod) = new.filter(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())) {
                queue.add(Key::of(pod.as_ref()));
            }
        }
    }));
    context.informers.nodes.subscribe(Box::new({
        let queue = queue.clone();
        let informers = std::sync::Arc::downgrade(&context.informers);
        move |old, new| {
            let (Some(_), None, Some(informers)) = (old, new, informers.upgrade()) else {
                return;
            };
            for pod in informers.pods.list() {
                queue.add(Key::of(pod.as_ref()));
            }
        }
    }));
    queue::run("podgc", queue, 1, stop, move |key| {
        let context = context.clone();
        async move { reconcile(&context, &key).await }
    })
    .await;
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, Error> {
    let Some(pod) = context.informers.pods.get(key) else {
        return Ok(None);
    };
    let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) else {
        return Ok(None);
    };
    if context.informers.nodes.get(&Key::new("", &node)).is_some() {
        return Ok(None);
    }
    // The cache may be behind: ask before deleting for good.
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(context.client.clone());
    match nodes.get(&node).await {
        Ok(_) => return Ok(None),
        Err(error) if not_found(&error) => {}
        Err(error) => return Err(error.into()),
    }
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    let params = DeleteParams::default().grace_period(0);
    ignore_not_found(api.delete(&pod.name_any(), &params).await)?;
    Ok(None)
}
