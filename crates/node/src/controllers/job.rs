//! Job: runs pods until enough of them have succeeded, or too many have failed.

use std::time::Duration;

use k8s_openapi::api::batch::v1::{Job, JobCondition};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::{Context, Error, ignore_not_found, pods};

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let queue = Queue::new();
    context.informers.jobs.subscribe(Box::new({
        let queue = queue.clone();
        move |_old, new| {
            if let Some(job) = new {
                queue.add(Key::of(job.as_ref()));
            }
        }
    }));
    context.informers.pods.subscribe(Box::new({
        let queue = queue.clone();
        move |old, new| {
            for pod in [old, new].into_iter().flatten() {
                if let Some(owner) = pods::controller_of(&pod.metadata).filter(|owner| owner.kind == "Job") {
                    queue.add(Key::new(pod.namespace().unwrap_or_default(), &owner.name));
                }
            }
        }
    }));
    queue::run("job", queue, 2, stop, move |key| {
        let context = context.clone();
        async move { reconcile(&context, &key).await }
    })
    .await;
}

/// `Complete` or `Failed`, once it holds.
fn outcome(job: &Job) -> Option<&JobCondition> {
    job.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .find(|condition| matches!(condition.type_.as_str(), "Complete" | "Failed") && condition.status == "True")
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, Error> {
    let Some(job) = context.informers.jobs.get(key) else {
        return Ok(None);
    };
    let Some(spec) = job.spec.as_ref().filter(|_| job.metadata.deletion_timestamp.is_none()) else {
        return Ok(None);
    };
    let api: Api<Job> = Api::namespaced(context.client.clone(), &key.namespace);
    if outcome(&job).is_some() {
        let Some(ttl) = spec.ttl_seconds_after_finished else {
            return Ok(None);
        };
        let status = job.status.clone().unwrap_or_default();
        let end = status
            .completion_time
            .or_else(|| outcome(&job).and_then(|end| end.last_transition_time.clone()));
        let left = end.map_or(0, |end| {
            end.0.as_second() + i64::from(ttl) - Timestamp::now().as_second()
        });
        if left > 0 {
            return Ok(Some(Duration::from_secs(left.unsigned_abs())));
        }
        ignore_not_found(api.delete(&key.name, &DeleteParams::background()).await)?;
        return Ok(None);
    }
    let owned = context.informers.pods.select(&key.namespace, |pod| {
        pods::is_controlled_by(&pod.metadata, &job.metadata)
    });
    let count = |wanted: &str| owned.iter().filter(|pod| pods::phase(pod) == wanted).count();
    let (succeeded, failed) = (count("Succeeded"), count("Failed"));
    let active: Vec<_> = owned.iter().filter(|pod| pods::is_active(pod)).collect();
    let parallelism = usize::try_from(spec.parallelism.unwrap_or(1)).unwrap_or(0);
    // Without completions any success is enough (a work queue); the running pods finish by themselves.
    let needed = spec.completions.map(|number| usize::try_from(number).unwrap_or(0));
    let limit = usize::try_from(spec.backoff_limit.unwrap_or(6)).unwrap_or(0);
    let restarts: i32 = active
        .iter()
        .filter_map(|pod| pod.status.as_ref())
        .flat_map(|status| status.container_statuses.iter().flatten())
        .map(|container| container.restart_count)
        .sum();
    let started = job
        .status
        .as_ref()
        .and_then(|status| status.start_time.clone())
        .unwrap_or_else(pods::now);
    let deadline = spec
        .active_deadline_seconds
        .map(|limit| started.0.as_second() + limit - Timestamp::now().as_second());
    let end = if failed > limit || usize::try_from(restarts).unwrap_or(0) > limit {
        Some((
            "Failed",
            "BackoffLimitExceeded",
            "Job has reached the specified backoff limit",
        ))
    } else if deadline.is_some_and(|left| left <= 0) {
        Some((
            "Failed",
            "DeadlineExceeded",
            "Job was active longer than specified deadline",
        ))
    } else if needed.map_or(succeeded > 0 && active.is_empty(), |needed| succeeded >= needed) {
        Some((
            "Complete",
            "CompletionsReached",
            "Reached expected number of succeeded pods",
        ))
    } else {
        None
    };
    let mut running = active.len();
    if end.is_some_and(|(kind, ..)| kind == "Failed") {
        for pod in &active {
            pods::delete(context, job.as_ref(), pod).await?;
        }
        running = 0;
    } else if end.is_none() && spec.suspend != Some(true) {
        let missing = match needed {
            Some(needed) => parallelism.min(needed.saturating_sub(succeeded)),
            None if succeeded > 0 => running,
            None => parallelism,
        };
        // A failed pod is replaced after a growing pause, as the job's back-off says.
        let pause = backoff(&owned, failed);
        if missing > running
            && let Some(pause) = pause
        {
            write_status(context, key, &job, running, succeeded, failed, &started, None).await?;
            return Ok(Some(pause));
        }
        for _ in 0..missing.saturating_sub(running) {
            let mut template = spec.template.clone();
            let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
            for prefix in ["", "batch.kubernetes.io/"] {
                labels.insert(format!("{prefix}job-name"), key.name.clone());
                labels.insert(format!("{prefix}controller-uid"), job.uid().unwrap_or_default());
            }
            let owner = pods::owner_reference(job.as_ref());
            let pod = pods::from_template(&template, &key.namespace, &format!("{}-", key.name), owner);
            if pods::create(context, job.as_ref(), &pod).await?.is_some() {
                running += 1;
            }
        }
    }
    write_status(context, key, &job, running, succeeded, failed, &started, end).await?;
    Ok(deadline
        .filter(|left| *left > 0 && end.is_none())
        .map(|left| Duration::from_secs(left.unsigned_abs())))
}

/// How long to wait before the next try: 10 s, 20 s, 40 s … after the last failure, at most 6 minutes.
fn backoff(owned: &[std::sync::Arc<k8s_openapi::api::core::v1::Pod>], failed: usize) -> Option<Duration> {
    let last = owned
        .iter()
        .filter(|pod| pods::phase(pod) == "Failed")
        .flat_map(|pod| {
            pod.status
                .iter()
                .flat_map(|status| status.container_statuses.iter().flatten())
        })
        .filter_map(|container| container.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref())
        .map(|time| time.0.as_second())
        .max()?;
    let exponent = u32::try_from(failed.saturating_sub(1).min(6)).unwrap_or(6);
    let pause = (10_i64 << exponent).min(360);
    let left = last + pause - Timestamp::now().as_second();
    (left > 0).then(|| Duration::from_secs(left.unsigned_abs()))
}

#[expect(clippy::too_many_arguments, reason = "the numbers of one status, used once")]
async fn write_status(
    context: &Context,
    key: &Key,
    job: &Job,
    active: usize,
    succeeded: usize,
    failed: usize,
    started: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Time,
    end: Option<(&str, &str, &str)>,
) -> Result<(), Error> {
    let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    let before = job.status.clone().unwrap_or_default();
    let same = before.active.unwrap_or(0) == number(active)
        && before.succeeded.unwrap_or(0) == number(succeeded)
        && before.failed.unwrap_or(0) == number(failed)
        && before.start_time.is_some()
        && end.is_none();
    if same {
        return Ok(());
    }
    let mut status = json!({
        "active": active, "succeeded": succeeded, "failed": failed, "ready": 0, "startTime": started,
    });
    if let Some((kind, reason, message)) = end {
        let now = pods::now();
        status["conditions"] = json!([{
            "type": kind, "status": "True", "reason": reason, "message": message,
            "lastProbeTime": now, "lastTransitionTime": now,
        }]);
        if kind == "Complete" {
            status["completionTime"] = json!(now);
            context.events.normal(job, "Completed", "Job completed");
        } else {
            context.events.warning(job, reason, message);
        }
    }
    let api: Api<Job> = Api::namespaced(context.client.clone(), &key.namespace);
    let patch = json!({"status": status});
    let written = api
        .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(&patch))
        .await;
    if let Some(job) = ignore_not_found(written)? {
        context.informers.jobs.observe(&job);
    }
    Ok(())
}
