//! Tells users on the object itself whether it is in force.
//!
//! Condition `Reconciled` (Istio's name) in `status.conditions`: `False` with the reasons as soon as something cannot be translated
//! as written; `True` once every connected proxy has confirmed the configuration that the object led to. Until then
//! the former condition stands, and its `observedGeneration` says of which version it speaks. `mantlet lab` and
//! `istioctl x wait` look at it. Written by merge patch on the status subresource.

use std::collections::BTreeMap;

use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::{Client, ResourceExt};
use mantlet_translate::legacy::{self, Origin};
use mantlet_translate::report::problems;
use mantlet_translate::world::Kind;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::board::Board;
use super::hub::Hub;

/// The condition's type.
const CONDITION: &str = "Reconciled";

/// A policy to look at.
#[derive(Clone)]
pub struct StatusJob {
    kind: Kind,
    namespace: String,
    name: String,
    generation: i64,
    /// Whether it names an external authorizer, so that what becomes of it depends on Services and mesh settings.
    asks: bool,
    /// The condition as it stands.
    current: Option<Current>,
}

/// A condition that was written earlier.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Current {
    pub(super) status: String,
    pub(super) message: String,
    pub(super) generation: String,
}

impl Current {
    /// The condition of an object as it was seen.
    pub(super) fn of(object: &DynamicObject) -> Option<Current> {
        let conditions = object.data.pointer("/status/conditions").and_then(Value::as_array);
        conditions
            .into_iter()
            .flatten()
            .find(|c| c["type"] == CONDITION)
            .map(|c| {
                let text = |value: &Value| value.as_str().map(String::from);
                let generation = object.data.pointer("/status/observedGeneration").and_then(text);
                Current {
                    status: text(&c["status"]).unwrap_or_default(),
                    message: text(&c["message"]).unwrap_or_default(),
                    generation: generation.unwrap_or_default(),
                }
            })
    }
}

/// Objects whose condition waits for proxies, by kind, namespace and name: the job and the revision they must confirm.
type Pending = BTreeMap<(Kind, String, String), (StatusJob, u64)>;

impl StatusJob {
    /// For an object as it was seen.
    pub fn look(kind: Kind, object: &DynamicObject) -> StatusJob {
        StatusJob {
            kind,
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            generation: object.metadata.generation.unwrap_or_default(),
            asks: object.data.pointer("/spec/action").is_some_and(|a| a == "CUSTOM"),
            current: Current::of(object),
        }
    }
}

/// Writes statuses until the sender of jobs is gone.
pub async fn run(client: Client, hub: Hub, board: Board, mut jobs: mpsc::UnboundedReceiver<StatusJob>) {
    let mut progress = board.progress();
    let mut pending = Pending::new();
    let mut former = FormerJobs::default();
    let mut asking = AskingJobs::default();
    loop {
        tokio::select! {
            job = jobs.recv() => match job {
                Some(job) => {
                    let of_former_kind = former.remember(&job);
                    asking.remember(&job);
                    examine(&client, &hub, &mut pending, job).await;
                    // One can change what others of its kinds mean; after a burst of them once.
                    if of_former_kind && jobs.is_empty() {
                        former.look_again(&client, &hub, &mut pending).await;
                    }
                }
                None => return,
            },
            _ = progress.changed() => {
                former.look_again(&client, &hub, &mut pending).await;
                asking.look_again(&client, &hub, &mut pending).await;
            }
        }
        let ready: Vec<_> = pending
            .iter()
            .filter(|(_, (_, revision))| {
                let (confirmed, all) = board.confirmed(*revision);
                confirmed == all
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in ready {
            if let Some((job, revision)) = pending.remove(&key) {
                let (confirmed, all) = board.confirmed(revision);
                settle(&client, &job, "True", &format!("{confirmed}/{all} proxies up to date.")).await;
            }
        }
    }
}

/// Objects of former kinds. What they become depends on Services, pods and each other, so they are looked at whenever the world
/// has changed.
#[derive(Default)]
struct FormerJobs {
    jobs: BTreeMap<Origin, StatusJob>,
    /// Revision that was looked at.
    seen: Option<u64>,
}

impl FormerJobs {
    /// Takes note of a job; whether it is one of a former kind.
    fn remember(&mut self, job: &StatusJob) -> bool {
        if job.kind.is_former() {
            self.seen = None;
            let origin = Origin {
                kind: job.kind,
                namespace: job.namespace.clone(),
                name: job.name.clone(),
            };
            self.jobs.insert(origin, job.clone());
        }
        job.kind.is_former()
    }

    async fn look_again(&mut self, client: &Client, hub: &Hub, pending: &mut Pending) {
        if self.jobs.is_empty() {
            return;
        }
        let seen = self.seen;
        let found = hub
            .ask(move |view| {
                let fresh = seen != Some(view.revision);
                (fresh.then(|| legacy::problems(view.world)), view.revision)
            })
            .await;
        let Some((Some(problems), revision)) = found else {
            return;
        };
        self.seen = Some(revision);
        self.jobs.retain(|origin, _| problems.contains_key(origin));
        for (origin, job) in &mut self.jobs {
            let key = (job.kind, job.namespace.clone(), job.name.clone());
            match problems.get(origin).map(Vec::as_slice) {
                Some([]) if job.current.as_ref().is_none_or(|current| current.status != "True") => {
                    pending.entry(key).or_insert_with(|| (job.clone(), revision));
                }
                Some([]) | None => {}
                Some(problems) => {
                    pending.remove(&key);
                    let message = problems.join("; ");
                    settle(client, job, "False", &message).await;
                    // What the watch will tell; until then it is not written again.
                    job.current = Some(Current {
                        status: "False".into(),
                        message,
                        generation: job.generation.to_string(),
                    });
                }
            }
        }
    }
}

/// CUSTOM policies. Whether their provider can be asked depends on the mesh settings, on Services and on each other, so they
/// are looked at whenever the world has changed.
#[derive(Default)]
struct AskingJobs {
    jobs: BTreeMap<(String, String), StatusJob>,
    /// Revision that was looked at.
    seen: Option<u64>,
}

impl AskingJobs {
    fn remember(&mut self, job: &StatusJob) {
        if job.kind != Kind::AuthorizationPolicy {
            return;
        }
        let key = (job.namespace.clone(), job.name.clone());
        if job.asks {
            self.jobs.insert(key, job.clone());
        } else {
            self.jobs.remove(&key);
        }
    }

    async fn look_again(&mut self, client: &Client, hub: &Hub, pending: &mut Pending) {
        if self.jobs.is_empty() {
            return;
        }
        let seen = self.seen;
        let keys: Vec<_> = self.jobs.keys().cloned().collect();
        let found = hub
            .ask(move |view| {
                let fresh = seen != Some(view.revision);
                let look = |(namespace, name): &(String, String)| {
                    problems(view.world, Kind::AuthorizationPolicy, namespace, name)
                };
                (fresh.then(|| keys.iter().map(look).collect::<Vec<_>>()), view.revision)
            })
            .await;
        let Some((Some(all), revision)) = found else { return };
        self.seen = Some(revision);
        let mut gone = Vec::new();
        for ((key, job), problems) in self.jobs.iter().zip(all) {
            let waiting = (job.kind, job.namespace.clone(), job.name.clone());
            match problems.as_deref() {
                None => gone.push(key.clone()),
                Some([]) => {
                    if job.current.as_ref().is_none_or(|current| current.status != "True") {
                        pending.entry(waiting).or_insert_with(|| (job.clone(), revision));
                    }
                }
                Some(problems) => {
                    pending.remove(&waiting);
                    settle(client, job, "False", &problems.join("; ")).await;
                }
            }
        }
        self.jobs.retain(|key, _| !gone.contains(key));
    }
}

/// Looks at an object: a problem is written at once, anything else waits for the proxies.
async fn examine(client: &Client, hub: &Hub, pending: &mut Pending, job: StatusJob) {
    let (kind, namespace, name) = (job.kind, job.namespace.clone(), job.name.clone());
    // The change was queued before this job, and questions are answered after it, with the revision it led to.
    let found = hub
        .ask(move |view| (problems(view.world, kind, &namespace, &name), view.revision))
        .await;
    let key = (job.kind, job.namespace.clone(), job.name.clone());
    let Some((Some(problems), revision)) = found else {
        pending.remove(&key);
        return;
    };
    for problem in &problems {
        tracing::warn!(target: "config", "{} {}/{}: {problem}", job.kind.name(), job.namespace, job.name);
    }
    if problems.is_empty() {
        pending.insert(key, (job, revision));
    } else {
        pending.remove(&key);
        settle(client, &job, "False", &problems.join("; ")).await;
    }
}

/// Writes a condition unless it stands there already. How many proxies there were when an object was confirmed is
/// not written again for each proxy that comes later.
async fn settle(client: &Client, job: &StatusJob, status: &str, message: &str) {
    let stands = job.current.as_ref().is_some_and(|current| {
        current.status == status
            && current.generation == job.generation.to_string()
            && (status == "True" || current.message == message)
    });
    if !stands && let Err(error) = write(client, job, status, message).await {
        tracing::warn!(target: "status", "{} {}/{}: {error}", job.kind.name(), job.namespace, job.name);
    }
}

async fn write(client: &Client, job: &StatusJob, status: &str, message: &str) -> Result<(), kube::Error> {
    let (group, version, plural) = job.kind.resource();
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, job.kind.name()), plural);
    let api: Api<DynamicObject> = if job.kind.cluster_scoped() {
        Api::all_with(client.clone(), &resource)
    } else {
        Api::namespaced_with(client.clone(), &job.namespace, &resource)
    };
    let patch = condition(job.generation, status, message);
    api.patch_status(&job.name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .map(|_| ())
}

/// The merge patch that sets the condition for a version of an object.
pub(super) fn condition(generation: i64, status: &str, message: &str) -> Value {
    let now = time::OffsetDateTime::now_utc()
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default();
    json!({"status": {
        "observedGeneration": generation.to_string(),
        "conditions": [{
            "type": CONDITION,
            "status": status,
            "reason": if status == "True" { "Accepted" } else { "NotFullySupported" },
            "message": message,
            "lastTransitionTime": now,
        }],
    }})
}
