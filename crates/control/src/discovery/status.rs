//! Tells users on the object itself what could not be translated as written.
//!
//! Condition `Reconciled` (Istio's name) in `status.conditions`: absent while all is well and nothing was ever reported; `False`
//! with the reasons; back to `True` when they are gone. Written by merge patch on the status subresource.

use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::{Client, ResourceExt};
use mantlet_translate::world::Kind;
use mantlet_translate::{authz, virtual_service};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::hub::Hub;

/// The condition's type.
const CONDITION: &str = "Reconciled";

/// A policy to look at.
pub struct StatusJob {
    kind: Kind,
    namespace: String,
    name: String,
    generation: i64,
    /// The condition as it stands: status and message.
    current: Option<(String, String)>,
}

impl StatusJob {
    /// For an object as it was seen.
    pub fn look(kind: Kind, object: &DynamicObject) -> StatusJob {
        let conditions = object.data.pointer("/status/conditions").and_then(Value::as_array);
        let current = conditions
            .into_iter()
            .flatten()
            .find(|c| c["type"] == CONDITION)
            .map(|c| {
                let text = |key: &str| c[key].as_str().unwrap_or_default().to_string();
                (text("status"), text("message"))
            });
        StatusJob {
            kind,
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            generation: object.metadata.generation.unwrap_or_default(),
            current,
        }
    }
}

/// Writes statuses until the sender is gone.
pub async fn run(client: Client, hub: Hub, mut jobs: mpsc::UnboundedReceiver<StatusJob>) {
    while let Some(job) = jobs.recv().await {
        let (kind, namespace, name) = (job.kind, job.namespace.clone(), job.name.clone());
        // The change was queued before this job, and questions are answered after it.
        let problems = hub.ask(move |view| problems(view.world, kind, &namespace, &name)).await;
        let Some(Some(problems)) = problems else { continue };
        for problem in &problems {
            tracing::warn!(target: "config", "{} {}/{}: {problem}", kind.name(), job.namespace, job.name);
        }
        let message = problems.join("; ");
        let status = if problems.is_empty() { "True" } else { "False" };
        let needed = match &job.current {
            None => !problems.is_empty(),
            Some((old_status, old_message)) => old_status != status || *old_message != message,
        };
        if needed && let Err(error) = write(&client, &job, status, &message).await {
            tracing::warn!(target: "status", "{} {}/{}: {error}", kind.name(), job.namespace, job.name);
        }
    }
}

fn problems(world: &mantlet_translate::world::World, kind: Kind, namespace: &str, name: &str) -> Option<Vec<String>> {
    match kind {
        Kind::AuthorizationPolicy => {
            let policy = world
                .authorization_policies(namespace)
                .iter()
                .find(|p| p.meta.name == name)?;
            Some(authz::problems(world, policy).into_iter().map(|p| p.message).collect())
        }
        Kind::VirtualService => {
            let all = world.virtual_services();
            let config = all
                .iter()
                .find(|c| c.meta.namespace == namespace && c.meta.name == name)?;
            Some(virtual_service::problems(config))
        }
        _ => None,
    }
}

async fn write(client: &Client, job: &StatusJob, status: &str, message: &str) -> Result<(), kube::Error> {
    let (group, version, plural) = job.kind.resource();
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, job.kind.name()), plural);
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &job.namespace, &resource);
    let now = time::OffsetDateTime::now_utc()
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default();
    let patch = json!({"status": {
        "observedGeneration": job.generation.to_string(),
        "conditions": [{
            "type": CONDITION,
            "status": status,
            "reason": if status == "True" { "Accepted" } else { "NotFullySupported" },
            "message": message,
            "lastTransitionTime": now,
        }],
    }});
    api.patch_status(&job.name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .map(|_| ())
}
