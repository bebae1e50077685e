//! Deployment: a replica set per template, rolled from the old to the new one.
//!
//! Works with `kubectl rollout status|restart|undo|pause|resume|history`: revisions are counted in the annotation
//! `deployment.kubernetes.io/revision`, templates are told apart by the label `pod-template-hash`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentSpec, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::rollout::{self, Limits, Set};
use super::{Context, Error, already_exists, ignore_not_found, namespace_terminating, pods};

const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let queue = Queue::new();
    context.informers.deployments.subscribe(Box::new({
        let queue = queue.clone();
        move |_old, new| {
            if let Some(deployment) = new {
                queue.add(Key::of(deployment.as_ref()));
            }
        }
    }));
    context.informers.replica_sets.subscribe(Box::new({
        let queue = queue.clone();
        move |old, new| {
            for set in [old, new].into_iter().flatten() {
                if let Some(owner) = pods::controller_of(&set.metadata).filter(|owner| owner.kind == "Deployment") {
                    queue.add(Key::new(set.namespace().unwrap_or_default(), &owner.name));
                }
            }
        }
    }));
    context.informers.pods.subscribe(Box::new({
        // Strategy Recreate waits for the last old pod to be gone.
        let queue = queue.clone();
        let informers = Arc::downgrade(&context.informers);
        move |old, new| {
            let (Some(pod), None) = (old, new) else { return };
            let namespace = pod.namespace().unwrap_or_default();
            let (Some(informers), Some(owner)) = (informers.upgrade(), pods::controller_of(&pod.metadata)) else {
                return;
            };
            let set = informers.replica_sets.get(&Key::new(&namespace, &owner.name));
            if let Some(owner) = set.as_ref().and_then(|set| pods::controller_of(&set.metadata)) {
                queue.add(Key::new(namespace, &owner.name));
            }
        }
    }));
    queue::run("deployment", queue, 4, stop, move |key| {
        let context = context.clone();
        async move { reconcile(&context, &key).await }
    })
    .await;
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, Error> {
    let Some(deployment) = context.informers.deployments.get(key) else {
        return Ok(None);
    };
    let spec = &deployment.spec;
    if deployment.metadata.deletion_timestamp.is_some() {
        let sets = owned_sets(context, key, &deployment);
        return write_status(context, &deployment, spec, None, &sets).await;
    }
    adopt(context, key, &deployment, spec).await?;
    let sets = owned_sets(context, key, &deployment);
    let new = find_new(&sets, spec);
    if spec.paused == Some(true) {
        if let (Some(new), 1) = (&new, sets.iter().filter(|set| wanted(set) > 0).count()) {
            scale(context, &deployment, new, spec.replicas.unwrap_or(1)).await?;
        }
        return write_status(context, &deployment, spec, new.as_ref(), &sets).await;
    }
    let recreate = spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate");
    let new = match new {
        Some(new) => Some(refresh(context, &deployment, spec, &new, &sets).await?),
        None if recreate && !empty_old_sets(context, &deployment, &sets).await? => None,
        None => create_new(context, &deployment, spec, &sets).await?,
    };
    if let Some(new) = &new {
        set_revision(context, &deployment, new).await?;
        let old: Vec<_> = sets.iter().filter(|set| set.uid() != new.uid()).cloned().collect();
        if recreate {
            if empty_old_sets(context, &deployment, &old).await? {
                scale(context, &deployment, new, spec.replicas.unwrap_or(1)).await?;
            }
        } else {
            roll(context, &deployment, spec, new, &old).await?;
        }
    }
    let sets = owned_sets(context, key, &deployment);
    let new = find_new(&sets, spec);
    clean_up(context, &deployment, spec, new.as_ref(), &sets).await?;
    write_status(context, &deployment, spec, new.as_ref(), &sets).await
}

fn wanted(set: &ReplicaSet) -> i32 {
    set.spec.replicas.unwrap_or(0)
}

fn available(set: &ReplicaSet) -> i32 {
    set.status
        .as_ref()
        .and_then(|status| status.available_replicas)
        .unwrap_or(0)
}

fn revision_of(meta: &ObjectMeta) -> i64 {
    meta.annotations
        .as_ref()
        .and_then(|annotations| annotations.get(REVISION))
        .and_then(|revision| revision.parse().ok())
        .unwrap_or(0)
}

/// The deployment's replica sets, oldest first.
fn owned_sets(context: &Context, key: &Key, deployment: &Deployment) -> Vec<Arc<ReplicaSet>> {
    let mut sets = context.informers.replica_sets.select(&key.namespace, |set| {
        pods::is_controlled_by(&set.metadata, &deployment.metadata)
    });
    sets.sort_by_key(|set| {
        let created = set.metadata.creation_timestamp.as_ref().map(|time| time.0);
        (created, revision_of(&set.metadata), set.name_any())
    });
    sets
}

fn find_new(sets: &[Arc<ReplicaSet>], spec: &DeploymentSpec) -> Option<Arc<ReplicaSet>> {
    let template = pods::without_hash(&spec.template);
    sets.iter()
        .find(|set| {
            let theirs = set.spec.template.as_ref();
            theirs.is_some_and(|theirs| pods::without_hash(theirs) == template)
        })
        .cloned()
}

async fn adopt(context: &Context, key: &Key, deployment: &Deployment, spec: &DeploymentSpec) -> Result<(), Error> {
    let selector = pods::selector(&spec.selector)?;
    let orphans = context.informers.replica_sets.select(&key.namespace, |set| {
        pods::controller_of(&set.metadata).is_none()
            && set.metadata.deletion_timestamp.is_none()
            && pods::selects(&selector, &set.metadata)
    });
    for orphan in orphans {
        let mut owners = orphan.metadata.owner_references.clone().unwrap_or_default();
        owners.push(pods::owner_reference(deployment));
        let patch = json!({"metadata": {"uid": orphan.uid(), "ownerReferences": owners}});
        patch_set(context, &orphan, &patch).await?;
    }
    Ok(())
}

async fn patch_set(
    context: &Context,
    set: &ReplicaSet,
    patch: &serde_json::Value,
) -> Result<Option<ReplicaSet>, Error> {
    let api: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &set.namespace().unwrap_or_default());
    let patched = api
        .patch(&set.name_any(), &PatchParams::default(), &Patch::Merge(patch))
        .await;
    let patched = ignore_not_found(patched)?;
    if let Some(set) = &patched {
        context.informers.replica_sets.observe(set);
    }
    Ok(patched)
}

/// `maxSurge` and `maxUnavailable` as numbers, with the API's defaults and its rule that not both may be zero.
fn limits(spec: &DeploymentSpec) -> Result<Limits, Error> {
    let replicas = spec.replicas.unwrap_or(1);
    let rolling = spec
        .strategy
        .as_ref()
        .and_then(|strategy| strategy.rolling_update.as_ref());
    let quarter = IntOrString::String("25%".to_owned());
    let surge = rolling
        .and_then(|rolling| rolling.max_surge.as_ref())
        .unwrap_or(&quarter);
    let unavailable = rolling
        .and_then(|rolling| rolling.max_unavailable.as_ref())
        .unwrap_or(&quarter);
    let max_surge = pods::scaled(surge, replicas, true)?;
    let mut max_unavailable = pods::scaled(unavailable, replicas, false)?.min(replicas);
    if max_surge == 0 && max_unavailable == 0 {
        max_unavailable = 1;
    }
    Ok(Limits {
        replicas,
        max_surge,
        max_unavailable,
    })
}

fn set_annotations(
    deployment: &Deployment,
    spec: &DeploymentSpec,
    revision: i64,
) -> Result<BTreeMap<String, String>, Error> {
    let limits = limits(spec)?;
    let mut annotations = deployment.metadata.annotations.clone().unwrap_or_default();
    for own in [
        LAST_APPLIED,
        REVISION,
        REVISION_HISTORY,
        "deprecated.deployment.rollback.to",
    ] {
        annotations.remove(own);
    }
    annotations.insert(REVISION.to_owned(), revision.to_string());
    annotations.insert(DESIRED.to_owned(), limits.replicas.to_string());
    annotations.insert(MAXIMUM.to_owned(), (limits.replicas + limits.max_surge).to_string());
    Ok(annotations)
}

async fn create_new(
    context: &Context,
    deployment: &Deployment,
    spec: &DeploymentSpec,
    sets: &[Arc<ReplicaSet>],
) -> Result<Option<Arc<ReplicaSet>>, Error> {
    let collisions = deployment
        .status
        .as_ref()
        .and_then(|status| status.collision_count)
        .unwrap_or(0);
    let hash = pods::template_hash(&spec.template, collisions)?;
    let namespace = deployment.namespace().unwrap_or_default();
    let name = format!("{}-{hash}", deployment.name_any());
    let revision = sets.iter().map(|set| revision_of(&set.metadata)).max().unwrap_or(0) + 1;
    let mut template = spec.template.clone();
    template
        .metadata
        .get_or_insert_default()
        .labels
        .get_or_insert_default()
        .insert(pods::TEMPLATE_HASH.to_owned(), hash.clone());
    let mut selector = spec.selector.clone();
    selector
        .match_labels
        .get_or_insert_default()
        .insert(pods::TEMPLATE_HASH.to_owned(), hash);
    let old: Vec<_> = sets.iter().map(|set| counts(set)).collect();
    let start = rollout::scale_new(
        Set {
            wanted: 0,
            available: 0,
        },
        &old,
        limits(spec)?,
    );
    let set = ReplicaSet {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(namespace.clone()),
            labels: template.metadata.as_ref().and_then(|meta| meta.labels.clone()),
            annotations: Some(set_annotations(deployment, spec, revision)?),
            owner_references: Some(vec![pods::owner_reference(deployment)]),
            ..ObjectMeta::default()
        },
        spec: ReplicaSetSpec {
            replicas: Some(start),
            min_ready_seconds: spec.min_ready_seconds,
            selector,
            template: Some(template),
        },
        status: None,
    };
    let api: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &namespace);
    match api.create(&PostParams::default(), &set).await {
        Ok(created) => {
            context.informers.replica_sets.observe(&created);
            let message = format!("Scaled up replica set {name} from 0 to {start}");
            context.events.normal(deployment, "ScalingReplicaSet", &message);
            Ok(Some(Arc::new(created)))
        }
        Err(error) if namespace_terminating(&error) => Ok(None),
        Err(error) if already_exists(&error) => {
            // Ours from before a lost answer, or another template with the same hash.
            let existing = api.get(&name).await?;
            let same = find_new(&[Arc::new(existing.clone())], spec).is_some();
            if same && pods::is_controlled_by(&existing.metadata, &deployment.metadata) {
                context.informers.replica_sets.observe(&existing);
                return Ok(Some(Arc::new(existing)));
            }
            let patch = json!({"status": {"collisionCount": collisions + 1}});
            patch_status(context, deployment, &patch).await?;
            Ok(None)
        }
        Err(error) => {
            context
                .events
                .warning(deployment, "ReplicaSetCreateError", &error.to_string());
            Err(error.into())
        }
    }
}

/// Brings the annotations of the current replica set up to date; a set that was current before (`rollout undo`) gets a
/// new revision.
async fn refresh(
    context: &Context,
    deployment: &Deployment,
    spec: &DeploymentSpec,
    new: &Arc<ReplicaSet>,
    sets: &[Arc<ReplicaSet>],
) -> Result<Arc<ReplicaSet>, Error> {
    let others = sets.iter().filter(|set| set.uid() != new.uid());
    let highest = others.map(|set| revision_of(&set.metadata)).max().unwrap_or(0);
    let own = revision_of(&new.metadata);
    let revision = own.max(highest + 1);
    let mut annotations = set_annotations(deployment, spec, revision)?;
    if revision != own && own > 0 {
        let history = new.annotations().get(REVISION_HISTORY);
        let history = history.map_or(own.to_string(), |known| format!("{known},{own}"));
        annotations.insert(REVISION_HISTORY.to_owned(), history);
    }
    let stale = annotations
        .iter()
        .any(|(name, value)| new.annotations().get(name) != Some(value));
    let min_ready = new.spec.min_ready_seconds.unwrap_or(0);
    if !stale && min_ready == spec.min_ready_seconds.unwrap_or(0) {
        return Ok(new.clone());
    }
    let patch = json!({
        "metadata": {"annotations": annotations},
        "spec": {"minReadySeconds": spec.min_ready_seconds.unwrap_or(0)},
    });
    Ok(patch_set(context, new, &patch)
        .await?
        .map_or_else(|| new.clone(), Arc::new))
}

async fn set_revision(context: &Context, deployment: &Deployment, new: &ReplicaSet) -> Result<(), Error> {
    let revision = revision_of(&new.metadata);
    if revision_of(&deployment.metadata) == revision {
        return Ok(());
    }
    let api: Api<Deployment> = Api::namespaced(context.client.clone(), &deployment.namespace().unwrap_or_default());
    let patch = json!({"metadata": {"annotations": {REVISION: revision.to_string()}}});
    let patched = api
        .patch(&deployment.name_any(), &PatchParams::default(), &Patch::Merge(&patch))
        .await;
    if let Some(deployment) = ignore_not_found(patched)? {
        context.informers.deployments.observe(&deployment);
    }
    Ok(())
}

fn counts(set: &ReplicaSet) -> Set {
    Set {
        wanted: wanted(set),
        available: available(set),
    }
}

async fn roll(
    context: &Context,
    deployment: &Deployment,
    spec: &DeploymentSpec,
    new: &ReplicaSet,
    old: &[Arc<ReplicaSet>],
) -> Result<(), Error> {
    let limits = limits(spec)?;
    let old_counts: Vec<_> = old.iter().map(|set| counts(set)).collect();
    let mut new_counts = counts(new);
    let target = rollout::scale_new(new_counts, &old_counts, limits);
    if target != new_counts.wanted {
        scale(context, deployment, new, target).await?;
        new_counts.wanted = target;
    }
    // A status that does not belong to the current spec would count pods that are about to go.
    let settled = |set: &ReplicaSet| {
        let seen = set.status.as_ref().and_then(|status| status.observed_generation);
        seen >= set.metadata.generation
    };
    if !old.iter().all(|set| wanted(set) == 0 || settled(set)) {
        return Ok(());
    }
    for (set, target) in old.iter().zip(rollout::scale_old(new_counts, &old_counts, limits)) {
        if target != wanted(set) {
            scale(context, deployment, set, target).await?;
        }
    }
    Ok(())
}

async fn scale(context: &Context, deployment: &Deployment, set: &ReplicaSet, target: i32) -> Result<(), Error> {
    let from = wanted(set);
    if from == target {
        return Ok(());
    }
    patch_set(context, set, &json!({"spec": {"replicas": target}})).await?;
    let direction = if target > from { "up" } else { "down" };
    let message = format!(
        "Scaled {direction} replica set {} from {from} to {target}",
        set.name_any()
    );
    context.events.normal(deployment, "ScalingReplicaSet", &message);
    Ok(())
}

/// Scales all old sets to zero; true once their last pod is gone.
async fn empty_old_sets(context: &Context, deployment: &Deployment, old: &[Arc<ReplicaSet>]) -> Result<bool, Error> {
    for set in old {
        scale(context, deployment, set, 0).await?;
    }
    let namespace = deployment.namespace().unwrap_or_default();
    let left = context.informers.pods.select(&namespace, |pod| {
        !pods::is_finished(pod)
            && old
                .iter()
                .any(|set| pods::is_controlled_by(&pod.metadata, &set.metadata))
    });
    Ok(left.is_empty())
}

async fn clean_up(
    context: &Context,
    deployment: &Deployment,
    spec: &DeploymentSpec,
    new: Option<&Arc<ReplicaSet>>,
    sets: &[Arc<ReplicaSet>],
) -> Result<(), Error> {
    let keep = usize::try_from(spec.revision_history_limit.unwrap_or(10)).unwrap_or(0);
    let mut old: Vec<_> = sets
        .iter()
        .filter(|set| new.is_none_or(|new| new.uid() != set.uid()))
        .filter(|set| wanted(set) == 0 && set.status.as_ref().is_none_or(|status| status.replicas == 0))
        .filter(|set| set.metadata.deletion_timestamp.is_none())
        .collect();
    if old.len() <= keep {
        return Ok(());
    }
    old.sort_by_key(|set| revision_of(&set.metadata));
    let api: Api<ReplicaSet> = Api::namespaced(context.client.clone(), &deployment.namespace().unwrap_or_default());
    for set in old.iter().take(old.len() - keep) {
        ignore_not_found(api.delete(&set.name_any(), &DeleteParams::background()).await)?;
    }
    Ok(())
}

async fn patch_status(context: &Context, deployment: &Deployment, patch: &serde_json::Value) -> Result<(), Error> {
    let api: Api<Deployment> = Api::namespaced(context.client.clone(), &deployment.namespace().unwrap_or_default());
    let written = api
        .patch_status(&deployment.name_any(), &PatchParams::default(), &Patch::Merge(patch))
        .await;
    if let Some(deployment) = ignore_not_found(written)? {
        context.informers.deployments.observe(&deployment);
    }
    Ok(())
}

/// What the replica sets add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    replicas: i32,
    updated: i32,
    ready: i32,
    available: i32,
}

async fn write_status(
    context: &Context,
    deployment: &Deployment,
    spec: &DeploymentSpec,
    new: Option<&Arc<ReplicaSet>>,
    sets: &[Arc<ReplicaSet>],
) -> Result<Option<Duration>, Error> {
    let mut totals = Totals::default();
    for status in sets.iter().filter_map(|set| set.status.as_ref()) {
        totals.replicas += status.replicas;
        totals.ready += status.ready_replicas.unwrap_or(0);
        totals.available += status.available_replicas.unwrap_or(0);
    }
    totals.updated = new
        .and_then(|new| new.status.as_ref())
        .map_or(0, |status| status.replicas);
    let limits = limits(spec)?;
    let unavailable = (sets.iter().map(|set| wanted(set)).sum::<i32>() - totals.available).max(0);
    let before = deployment.status.clone().unwrap_or_default();
    let known = before.conditions.clone().unwrap_or_default();
    let (conditions, again) = conditions(deployment, spec, new, sets, totals, limits, &known);
    let same = before.replicas.unwrap_or(0) == totals.replicas
        && before.updated_replicas.unwrap_or(0) == totals.updated
        && before.ready_replicas.unwrap_or(0) == totals.ready
        && before.available_replicas.unwrap_or(0) == totals.available
        && before.unavailable_replicas.unwrap_or(0) == unavailable
        && before.observed_generation == deployment.metadata.generation
        && known == conditions;
    if !same {
        let patch = json!({"status": {
            "observedGeneration": deployment.metadata.generation,
            "replicas": totals.replicas,
            "updatedReplicas": totals.updated,
            "readyReplicas": totals.ready,
            "availableReplicas": totals.available,
            "unavailableReplicas": unavailable,
            "conditions": conditions,
        }});
        patch_status(context, deployment, &patch).await?;
    }
    Ok(again)
}

fn conditions(
    deployment: &Deployment,
    spec: &DeploymentSpec,
    new: Option<&Arc<ReplicaSet>>,
    sets: &[Arc<ReplicaSet>],
    totals: Totals,
    limits: Limits,
    known: &[DeploymentCondition],
) -> (Vec<DeploymentCondition>, Option<Duration>) {
    let mut conditions = Vec::new();
    let enough = totals.available >= limits.replicas - limits.max_unavailable;
    conditions.push(if enough {
        condition(
            "Available",
            true,
            "MinimumReplicasAvailable",
            "Deployment has minimum availability.",
        )
    } else {
        let message = "Deployment does not have minimum availability.";
        condition("Available", false, "MinimumReplicasUnavailable", message)
    });
    let mut again = None;
    let name = new.map_or_else(|| deployment.name_any(), |new| new.name_any());
    let subject = if new.is_some() { "ReplicaSet" } else { "Deployment" };
    let before = deployment.status.clone().unwrap_or_default();
    let progressing = known
        .iter()
        .find(|condition| condition.type_.as_deref() == Some("Progressing"));
    let complete = totals.updated == limits.replicas
        && totals.replicas == limits.replicas
        && totals.available == limits.replicas
        && new.is_some();
    // A finished rollout stays finished for this generation, whatever happens to its pods later.
    let finished = progressing.is_some_and(|condition| condition.reason.as_deref() == Some("NewReplicaSetAvailable"))
        && before.observed_generation == deployment.metadata.generation;
    if spec.paused == Some(true) {
        conditions.push(condition(
            "Progressing",
            true,
            "DeploymentPaused",
            "Deployment is paused",
        ));
    } else if complete || finished {
        let message = format!("{subject} {name:?} has successfully progressed.");
        conditions.push(condition("Progressing", true, "NewReplicaSetAvailable", &message));
    } else {
        let moved = before.updated_replicas.unwrap_or(0) != totals.updated
            || before.replicas.unwrap_or(0) != totals.replicas
            || before.ready_replicas.unwrap_or(0) < totals.ready
            || before.available_replicas.unwrap_or(0) < totals.available
            || before.observed_generation != deployment.metadata.generation;
        let deadline = i64::from(spec.progress_deadline_seconds.unwrap_or(600));
        let since = progressing
            .and_then(|condition| condition.last_update_time.as_ref())
            .map_or_else(Timestamp::now, |time| time.0);
        let left = since.as_second() + deadline - Timestamp::now().as_second();
        if !moved && left <= 0 {
            let message = format!("{subject} {name:?} has timed out progressing.");
            conditions.push(condition("Progressing", false, "ProgressDeadlineExceeded", &message));
        } else {
            let message = format!("{subject} {name:?} is progressing.");
            let mut progress = condition("Progressing", true, "ReplicaSetUpdated", &message);
            if !moved {
                progress.last_update_time = progressing.and_then(|known| known.last_update_time.clone());
            }
            if progress.last_update_time.is_none() {
                progress.last_update_time = Some(pods::now());
            }
            conditions.push(progress);
            again = Some(Duration::from_secs(left.max(1).unsigned_abs()));
        }
    }
    let failure = new
        .into_iter()
        .chain(sets)
        .filter_map(|set| set.status.as_ref())
        .flat_map(|status| status.conditions.iter().flatten())
        .find(|condition| {
            condition.type_.as_deref() == Some("ReplicaFailure") && condition.status.as_deref() == Some("True")
        });
    if let Some(failure) = failure {
        let reason = failure.reason.as_deref().unwrap_or("FailedCreate");
        let message = failure.message.as_deref().unwrap_or_default();
        conditions.push(condition("ReplicaFailure", true, reason, message));
    }
    for condition in &mut conditions {
        keep_times(condition, known);
    }
    (conditions, again)
}

fn condition(kind: &str, status: bool, reason: &str, message: &str) -> DeploymentCondition {
    DeploymentCondition {
        type_: Some(kind.to_owned()),
        status: Some(if status { "True" } else { "False" }.to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_transition_time: None,
        last_update_time: None,
    }
}

/// A condition that has not changed keeps its times; one that has changed gets the present.
fn keep_times(condition: &mut DeploymentCondition, known: &[DeploymentCondition]) {
    let before = known.iter().find(|before| before.type_ == condition.type_);
    let unchanged = before.is_some_and(|before| {
        before.status == condition.status && before.reason == condition.reason && before.message == condition.message
    });
    if condition.last_update_time.is_none() {
        condition.last_update_time = match before {
            Some(before) if unchanged => before.last_update_time.clone(),
            _ => Some(pods::now()),
        };
    }
    condition.last_transition_time = match before {
        Some(before) if before.status == condition.status => before.last_transition_time.clone(),
        _ => Some(pods::now()),
    };
}
