//! Binds pods without a node to one that is ready and fits their `nodeSelector`.
//!
//! A single-machine cluster has nothing to weigh: the first fitting node takes the pod. Pods that name another scheduler
//! are left to it.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Binding, Node, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::{Context, Error, ignore_not_found, not_found, pods};

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let queue = Queue::new();
    context.informers.pods.subscribe(Box::new({
        let queue = queue.clone();
        move |_old, new| {
            if let Some(pod) = new.filter(|pod| waits(pod)) {
                queue.add(Key::of(pod.as_ref()));
            }
        }
    }));
    context.informers.nodes.subscribe(Box::new({
        let queue = queue.clone();
        let informers = Arc::downgrade(&context.informers);
        move |_old, _new| {
            let Some(informers) = informers.upgrade() else { return };
            for pod in informers.pods.list().iter().filter(|pod| waits(pod)) {
                queue.add(Key::of(pod.as_ref()));
            }
        }
    }));
    queue::run("scheduler", queue, 4, stop, move |key| {
        let context = context.clone();
        async move { reconcile(&context, &key).await }
    })
    .await;
}

fn waits(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    spec.node_name.as_deref().unwrap_or_default().is_empty()
        && matches!(spec.scheduler_name.as_deref(), None | Some("" | "default-scheduler"))
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
        && pods::is_active(pod)
}

fn fits(pod: &Pod, node: &Node) -> Result<(), &'static str> {
    let ready = node
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    if !ready {
        return Err("node(s) had untolerated taint {node.kubernetes.io/not-ready: }");
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        return Err("node(s) were unschedulable");
    }
    let selector = pod.spec.as_ref().and_then(|spec| spec.node_selector.as_ref());
    let matches = selector
        .into_iter()
        .flatten()
        .all(|(name, value)| node.labels().get(name) == Some(value));
    if matches {
        Ok(())
    } else {
        Err("node(s) didn't match Pod's node affinity/selector")
    }
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, Error> {
    let Some(pod) = context.informers.pods.get(key).filter(|pod| waits(pod)) else {
        return Ok(None);
    };
    let nodes = context.informers.nodes.list();
    let mut reasons = Vec::new();
    let mut chosen = None;
    for node in &nodes {
        match fits(&pod, node) {
            Ok(()) => chosen = Some(node.name_any()),
            Err(reason) => reasons.push(format!("1 {reason}")),
        }
    }
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &key.namespace);
    let Some(node) = chosen else {
        let message = if nodes.is_empty() {
            "no nodes available to schedule pods".to_owned()
        } else {
            format!("0/{} nodes are available: {}.", nodes.len(), reasons.join(", "))
        };
        let known = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        if !known
            .into_iter()
            .any(|c| c.type_ == "PodScheduled" && c.message.as_deref() == Some(&message))
        {
            context.events.warning(pod.as_ref(), "FailedScheduling", &message);
            let patch = json!({"status": {"conditions": [{
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                "message": message, "lastTransitionTime": pods::now()}]}});
            ignore_not_found(
                api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(&patch))
                    .await,
            )?;
        }
        // A change of the nodes brings the pod back.
        return Ok(None);
    };
    let binding = Binding {
        metadata: ObjectMeta {
            name: Some(key.name.clone()),
            namespace: Some(key.namespace.clone()),
            uid: pod.uid(),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.clone()),
            ..ObjectReference::default()
        },
    };
    let bound: Result<serde_json::Value, _> = api
        .create_subresource("binding", &key.name, &PostParams::default(), &binding)
        .await;
    match bound {
        Ok(_) => {
            let message = format!("Successfully assigned {key} to {node}");
            context.events.normal(pod.as_ref(), "Scheduled", &message);
            Ok(None)
        }
        Err(error) if not_found(&error) => Ok(None),
        // Bound by somebody else meanwhile: the watch will tell.
        Err(error) => Err(error.into()),
    }
}
