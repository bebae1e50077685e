//! StatefulSet: numbered pods with stable names, started in order and replaced from the last to the first.
//!
//! Volume claims are not supported (the node has no persistent volumes); a set that asks for them gets a warning event.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::{Context, Error, ignore_not_found, pods};

const REVISION_HASH: &str = "controller-revision-hash";
const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let queue = Queue::new();
    context.informers.stateful_sets.subscribe(Box::new({
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
                if let Some(owner) = pods::controller_of(&pod.metadata).filter(|owner| owner.kind == "StatefulSet") {
                    queue.add(Key::new(pod.namespace().unwrap_or_default(), &owner.name));
                }
            }
        }
    }));
    queue::run("statefulset", queue, 2, stop, move |key| {
        let context = context.clone();
        async move { reconcile(&context, &key).await }
    })
    .await;
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, Error> {
    let Some(set) = context.informers.stateful_sets.get(key) else {
        return Ok(None);
    };
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let spec = &set.spec;
    if spec
        .volume_claim_templates
        .as_ref()
        .is_some_and(|claims| !claims.is_empty())
    {
        let message = "volumeClaimTemplates are not supported: this cluster has no persistent volumes";
        context.events.warning(set.as_ref(), "FailedCreate", message);
        return Err(Error::Invalid(message.to_owned()));
    }
    let hash = pods::template_hash(&spec.template, 0)?;
    let wanted = spec.replicas.unwrap_or(1).max(0);
    let parallel = spec.pod_management_policy.as_deref() == Some("Parallel");
    let on_delete = spec
        .update_strategy
        .as_ref()
        .and_then(|strategy| strategy.type_.as_deref())
        == Some("OnDelete");
    let owned: BTreeMap<i32, _> = context
        .informers
        .pods
        .select(&key.namespace, |pod| {
            pods::is_controlled_by(&pod.metadata, &set.metadata)
        })
        .into_iter()
        .filter_map(|pod| {
            let name = pod.name_any();
            let index = name.strip_prefix(&key.name)?.strip_prefix('-')?.parse().ok()?;
            Some((index, pod))
        })
        .collect();
    let mut waiting = false;
    for index in 0..wanted {
        match owned.get(&index) {
            None => {
                let mut template = spec.template.clone();
                let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
                let name = format!("{}-{index}", key.name);
                labels.insert(REVISION_HASH.to_owned(), hash.clone());
                labels.insert(POD_NAME.to_owned(), name.clone());
                labels.insert(POD_INDEX.to_owned(), index.to_string());
                let mut pod = pods::from_template(&template, &key.namespace, "", pods::owner_reference(set.as_ref()));
                pod.metadata.generate_name = None;
                pod.metadata.name = Some(name.clone());
                if let Some(pod_spec) = &mut pod.spec {
                    pod_spec.hostname = Some(name);
                    pod_spec.subdomain = spec.service_name.clone();
                }
                pods::create(context, set.as_ref(), &pod).await?;
                waiting = true;
            }
            Some(pod) if pods::is_finished(pod) && pod.metadata.deletion_timestamp.is_none() => {
                pods::delete(context, set.as_ref(), pod).await?;
                waiting = true;
            }
            Some(pod) if !pods::is_ready(pod) || pod.metadata.deletion_timestamp.is_some() => waiting = true,
            Some(_) => {}
        }
        if waiting && !parallel {
            break;
        }
    }
    // Surplus pods go from the last, then outdated ones, one at a time.
    let surplus = owned.iter().rev().find(|(index, _)| **index >= wanted);
    let outdated = owned
        .iter()
        .rev()
        .find(|(_, pod)| pod.labels().get(REVISION_HASH) != Some(&hash))
        .filter(|_| !waiting && !on_delete);
    if let Some((_, pod)) = surplus.or(outdated)
        && pod.metadata.deletion_timestamp.is_none()
    {
        pods::delete(context, set.as_ref(), pod).await?;
    }
    write_status(context, key, &set, &hash).await
}

async fn write_status(context: &Context, key: &Key, set: &StatefulSet, hash: &str) -> Result<Option<Duration>, Error> {
    let owned = context.informers.pods.select(&key.namespace, |pod| {
        pods::is_controlled_by(&pod.metadata, &set.metadata) && pod.metadata.deletion_timestamp.is_none()
    });
    let now = k8s_openapi::jiff::Timestamp::now();
    let min_ready = set.spec.min_ready_seconds.unwrap_or(0);
    let replicas = i32::try_from(owned.len()).unwrap_or(i32::MAX);
    let (mut ready, mut available, mut updated) = (0, 0, 0);
    let mut again = None;
    for pod in &owned {
        ready += i32::from(pods::is_ready(pod));
        updated += i32::from(pod.labels().get(REVISION_HASH).map(String::as_str) == Some(hash));
        match pods::availability(pod, min_ready, now) {
            Ok(()) => available += 1,
            Err(wait) => again = again.or(wait),
        }
    }
    let revision = format!("{}-{hash}", key.name);
    let before = set.status.clone().unwrap_or_default();
    // The old revision stays "current" until every pod has the new one, which is how `rollout status` sees progress.
    let current = match &before.current_revision {
        Some(known) if updated < replicas => known.clone(),
        _ => revision.clone(),
    };
    let same = before.replicas == replicas
        && before.ready_replicas.unwrap_or(0) == ready
        && before.available_replicas.unwrap_or(0) == available
        && before.updated_replicas.unwrap_or(0) == updated
        && before.current_revision.as_deref() == Some(&current)
        && before.update_revision.as_deref() == Some(&revision)
        && before.observed_generation == set.metadata.generation;
    if !same {
        let patch = json!({"status": {
            "replicas": replicas,
            "readyReplicas": ready,
            "availableReplicas": available,
            "updatedReplicas": updated,
            "currentReplicas": if current == revision { updated } else { replicas - updated },
            "currentRevision": current,
            "updateRevision": revision,
            "observedGeneration": set.metadata.generation,
        }});
        let api: Api<StatefulSet> = Api::namespaced(context.client.clone(), &key.namespace);
        let written = api
            .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        if let Some(set) = ignore_not_found(written)? {
            context.informers.stateful_sets.observe(&set);
        }
    }
    Ok(again)
}
