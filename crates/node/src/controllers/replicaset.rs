//! ReplicaSet: as many pods of one template as asked for.
//!
//! Adopts orphans that match its selector, counts only active pods, and deletes the least useful ones first.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::Selector;
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::{Context, Error, ignore_not_found, pods};

/// At most this many pods are created or deleted in one reconcile; the rest follows in the next.
const BURST: usize = 100;

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let queue = Queue::new();
    let informers = context.informers.clone();
    informers.replica_sets.subscribe(Box::new({
        let queue = queue.clone();
        move |_old, new| {
            if let Some(set) = new {
                queue.add(Key::of(set.as_ref()));
            }
        }
    }));
    informers.pods.subscribe(Box::new({
        let queue = queue.clone();
        let informers = Arc::downgrade(&informers);
        move |old, new| {
            for pod in [old, new].into_iter().flatten() {
                let namespace = pod.namespace().unwrap_or_default();
                match pods::controller_of(&pod.metadata) {
                    Some(owner) if owner.kind == "ReplicaSet" => queue.add(Key::new(namespace, &owner.name)),
                    Some(_) => {}
                    // An orphan: whoever selects it may adopt it.
                    None => {
                        let Some(informers) = informers.upgrade() else { return };
                        for set in informers.replica_sets.select(&namespace, |set| {
                            selector(set).is_ok_and(|s| pods::selects(&s, &pod.metadata))
                        }) {
                            queue.add(Key::of(set.as_ref()));
                        }
                    }
                }
            }
        }
    }));
    queue::run("replicaset", queue, 4, stop, move |key| {
        let context = context.clone();
        async move { reconcile(&context, &key).await }
    })
    .await;
}

fn selector(set: &ReplicaSet) -> Result<Selector, Error> {
    pods::selector(&set.spec.selector)
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, Error> {
    let Some(set) = context.informers.replica_sets.get(key) else {
        return Ok(None);
    };
    let spec = &set.spec;
    let selector = selector(&set)?;
    if set.metadata.deletion_timestamp.is_none() {
        adopt(context, &set, &selector).await?;
    }
    let mut owned = context.informers.pods.select(&key.namespace, |pod| {
        pods::is_controlled_by(&pod.metadata, &set.metadata) && pods::is_active(pod)
    });
    let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    let mut failure = None;
    if set.metadata.deletion_timestamp.is_none() {
        match scale(context, &set, &mut owned, wanted).await {
            Ok(()) => {}
            Err(error) => failure = Some(error),
        }
        owned = context.informers.pods.select(&key.namespace, |pod| {
            pods::is_controlled_by(&pod.metadata, &set.metadata) && pods::is_active(pod)
        });
    }
    let again = write_status(context, &set, &owned, failure.as_ref()).await?;
    match failure {
        Some(error) => Err(error),
        None => Ok(again),
    }
}

async fn adopt(context: &Context, set: &ReplicaSet, selector: &Selector) -> Result<(), Error> {
    let namespace = set.namespace().unwrap_or_default();
    let orphans = context.informers.pods.select(&namespace, |pod| {
        pods::controller_of(&pod.metadata).is_none() && pods::is_active(pod) && pods::selects(selector, &pod.metadata)
    });
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    for orphan in orphans {
        let mut owners = orphan.metadata.owner_references.clone().unwrap_or_default();
        owners.push(pods::owner_reference(set));
        let patch = json!({"metadata": {"uid": orphan.uid(), "ownerReferences": owners}});
        let patched = api
            .patch(&orphan.name_any(), &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        if let Some(pod) = ignore_not_found(patched)? {
            context.informers.pods.observe(&pod);
        }
    }
    Ok(())
}

async fn scale(context: &Context, set: &ReplicaSet, owned: &mut [Arc<Pod>], wanted: usize) -> Result<(), Error> {
    if owned.len() < wanted {
        let Some(template) = set.spec.template.as_ref() else {
            return Err(Error::Invalid("spec.template is missing".to_owned()));
        };
        let namespace = set.namespace().unwrap_or_default();
        let prefix = format!("{}-", set.name_any());
        let pod = pods::from_template(template, &namespace, &prefix, pods::owner_reference(set));
        let missing = (wanted - owned.len()).min(BURST);
        // Slow start: when the API server refuses the pod, it refuses all of them for the same reason.
        let mut batch = 1;
        let mut done = 0;
        while done < missing {
            let size = batch.min(missing - done);
            let created = (0..size).map(|_| pods::create(context, set, &pod));
            for result in futures::future::join_all(created).await {
                result?;
            }
            done += size;
            batch *= 2;
        }
    } else if owned.len() > wanted {
        pods::sort_for_deletion(owned);
        let surplus = (owned.len() - wanted).min(BURST);
        let deleted = owned.iter().take(surplus).map(|pod| pods::delete(context, set, pod));
        for result in futures::future::join_all(deleted).await {
            result?;
        }
    }
    Ok(())
}

async fn write_status(
    context: &Context,
    set: &ReplicaSet,
    owned: &[Arc<Pod>],
    failure: Option<&Error>,
) -> Result<Option<Duration>, Error> {
    let spec = &set.spec;
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let template_labels = spec
        .template
        .as_ref()
        .and_then(|template| template.metadata.as_ref())
        .and_then(|meta| meta.labels.clone())
        .unwrap_or_default();
    let now = Timestamp::now();
    let (mut ready, mut available, mut labelled) = (0, 0, 0);
    let mut again: Option<Duration> = None;
    for pod in owned {
        let labels = pod.labels();
        if template_labels
            .iter()
            .all(|(name, value)| labels.get(name) == Some(value))
        {
            labelled += 1;
        }
        if pods::is_ready(pod) {
            ready += 1;
        }
        match pods::availability(pod, min_ready, now) {
            Ok(()) => available += 1,
            Err(Some(wait)) => again = Some(again.map_or(wait, |known| known.min(wait))),
            Err(None) => {}
        }
    }
    let before = set.status.clone().unwrap_or_default();
    let status = ReplicaSetStatus {
        replicas: i32::try_from(owned.len()).unwrap_or(i32::MAX),
        fully_labeled_replicas: Some(labelled),
        ready_replicas: Some(ready),
        available_replicas: Some(available),
        observed_generation: set.metadata.generation,
        conditions: conditions(&before, failure),
        terminating_replicas: None,
    };
    // Absent and zero mean the same: a server that drops zeros must not make us write for ever.
    let same = before.replicas == status.replicas
        && before.fully_labeled_replicas.unwrap_or(0) == labelled
        && before.ready_replicas.unwrap_or(0) == ready
        && before.available_replicas.unwrap_or(0) == available
        && before.observed_generation == status.observed_generation
        && before.conditions.clone().unwrap_or_default() == status.conditions.clone().unwrap_or_default();
    if !same {
        let api: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &set.namespace().unwrap_or_default());
        // null removes the conditions that no longer hold.
        let patch = json!({"status": {
            "replicas": status.replicas,
            "fullyLabeledReplicas": labelled,
            "readyReplicas": ready,
            "availableReplicas": available,
            "observedGeneration": status.observed_generation,
            "conditions": status.conditions,
        }});
        let written = api
            .patch_status(&set.name_any(), &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        if let Some(set) = ignore_not_found(written)? {
            context.informers.replica_sets.observe(&set);
        }
    }
    Ok(again)
}

fn conditions(before: &ReplicaSetStatus, failure: Option<&Error>) -> Option<Vec<ReplicaSetCondition>> {
    let error = failure?;
    let message = match error {
        Error::Api(kube::Error::Api(status)) => status.message.clone(),
        other => other.to_string(),
    };
    let known = before
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_.as_deref() == Some("ReplicaFailure"));
    Some(vec![ReplicaSetCondition {
        type_: Some("ReplicaFailure".to_owned()),
        status: Some("True".to_owned()),
        reason: Some("FailedCreate".to_owned()),
        message: Some(message),
        last_transition_time: known
            .and_then(|condition| condition.last_transition_time.clone())
            .or_else(|| Some(pods::now())),
    }])
}
