//! DaemonSet: one pod on every ready node that fits, replaced one by one when the template changes.

use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::{Context, Error, ignore_not_found, pods};

/// The label that tells the templates of one DaemonSet or StatefulSet apart.
const REVISION_HASH: &str = "controller-revision-hash";

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let queue = Queue::new();
    context.informers.daemon_sets.subscribe(Box::new({
        let queue = queue.clone();
        move |_old, new| {
            if let Some(set) = new {
                queue.add(Key::of(set.as_ref()));
            }
        }
    }));
    context.informers.pods.subscribe(Box::new({
        let queue = queue.clone();
        move |old, new| {
            for pod in [old, new].into_iter().flatten() {
                if let Some(owner) = pods::controller_of(&pod.metadata).filter(|owner| owner.kind == "DaemonSet") {
                    queue.add(Key::new(pod.namespace().unwrap_or_default(), &owner.name));
                }
            }
        }
    }));
    context.informers.nodes.subscribe(Box::new({
        let queue = queue.clone();
        let informers = std::sync::Arc::downgrade(&context.informers);
        move |_old, _new| {
            let Some(informers) = informers.upgrade() else { return };
            for set in informers.daemon_sets.list() {
                queue.add(Key::of(set.as_ref()));
            }
        }
    }));
    queue::run("daemonset", queue, 2, stop, move |key| {
        let context = context.clone();
        async move { reconcile(&context, &key).await }
    })
    .await;
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, Error> {
    let Some(set) = context.informers.daemon_sets.get(key) else {
        return Ok(None);
    };
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let spec = &set.spec;
    let hash = pods::template_hash(&spec.template, 0)?;
    let selector = spec.template.spec.as_ref().and_then(|spec| spec.node_selector.clone());
    let mut nodes = context.informers.nodes.list();
    nodes.retain(|node| {
        let labels = node.labels();
        selector
            .iter()
            .flatten()
            .all(|(name, value)| labels.get(name) == Some(value))
    });
    let owned = context.informers.pods.select(&key.namespace, |pod| {
        pods::is_controlled_by(&pod.metadata, &set.metadata)
    });
    let on = |node: &str| {
        let owned = owned.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
        owned
            .filter(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node))
            .cloned()
            .collect::<Vec<_>>()
    };
    let on_delete = spec
        .update_strategy
        .as_ref()
        .and_then(|strategy| strategy.type_.as_deref())
        == Some("OnDelete");
    let (mut scheduled, mut updated, mut ready, mut available) = (0, 0, 0, 0);
    let mut again = None;
    let now = k8s_openapi::jiff::Timestamp::now();
    let mut replacing = owned.iter().any(|pod| pod.metadata.deletion_timestamp.is_some());
    for node in &nodes {
        let here = on(&node.name_any());
        if here.is_empty() && !owned.iter().any(|pod| pod.metadata.deletion_timestamp.is_some()) {
            let mut template = spec.template.clone();
            template
                .metadata
                .get_or_insert_default()
                .labels
                .get_or_insert_default()
                .insert(REVISION_HASH.to_owned(), hash.clone());
            let prefix = format!("{}-", key.name);
            let mut pod = pods::from_template(&template, &key.namespace, &prefix, pods::owner_reference(set.as_ref()));
            if let Some(spec) = &mut pod.spec {
                spec.node_name = Some(node.name_any());
            }
            pods::create(context, set.as_ref(), &pod).await?;
        }
        for pod in &here {
            scheduled += 1;
            let current = pod.labels().get(REVISION_HASH) == Some(&hash);
            updated += i32::from(current);
            ready += i32::from(pods::is_ready(pod));
            match pods::availability(pod, spec.min_ready_seconds.unwrap_or(0), now) {
                Ok(()) => available += 1,
                Err(wait) => again = again.or(wait),
            }
            if pods::is_finished(pod) || (!current && !on_delete && !replacing) {
                replacing = true;
                pods::delete(context, set.as_ref(), pod).await?;
            }
        }
    }
    let desired = i32::try_from(nodes.len()).unwrap_or(i32::MAX);
    let before = set.status.clone().unwrap_or_default();
    let same = before.current_number_scheduled == scheduled
        && before.desired_number_scheduled == desired
        && before.number_ready == ready
        && before.number_available.unwrap_or(0) == available
        && before.updated_number_scheduled.unwrap_or(0) == updated
        && before.observed_generation == set.metadata.generation;
    if !same {
        let patch = json!({"status": {
            "currentNumberScheduled": scheduled,
            "desiredNumberScheduled": desired,
            "numberReady": ready,
            "numberAvailable": available,
            "numberUnavailable": (desired - available).max(0),
            "numberMisscheduled": 0,
            "updatedNumberScheduled": updated,
            "observedGeneration": set.metadata.generation,
        }});
        let api: Api<DaemonSet> = Api::namespaced(context.client.clone(), &key.namespace);
        let written = api
            .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        if let Some(set) = ignore_not_found(written)? {
            context.informers.daemon_sets.observe(&set);
        }
    }
    Ok(again)
}
