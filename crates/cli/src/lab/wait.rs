//! Waits for observed states of the cluster, by watching; never by repeating a command.
//!
//! | line of a `wait` block | is over when |
//! |---|---|
//! | `rollout deployment/NAME [NAMESPACE]` | every replica is updated and available, and no pod of an older one is left |
//! | `settled SELECTOR [NAMESPACE]` | there are pods, all ready, none terminating |
//! | `enforced KIND/NAME [NAMESPACE]` | every proxy has confirmed the object's current version |
//! | `address service/NAME [NAMESPACE]` | its load balancer has an address |
//! | `gone KIND/NAME [NAMESPACE]` | it does not exist |

use std::future::Future;

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::DynamicObject;
use kube::core::GroupVersionKind;
use kube::discovery::{Discovery, Scope};
use kube::runtime::wait::await_condition;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};

/// Waits for one line.
///
/// # Errors
/// The line is not understood, or the API fails for good.
pub(super) async fn wait(client: &Client, line: &str) -> Result<()> {
    let mut words = line.split_whitespace();
    let (verb, subject) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let namespace = words.next().unwrap_or("default");
    if words.next().is_some() || subject.is_empty() {
        bail!("{line:?}: expected VERB SUBJECT [NAMESPACE]");
    }
    match (verb, subject.split_once('/')) {
        ("rollout", Some(("deployment", name))) => rollout(client, namespace, name).await,
        ("settled", _) => settled(client, namespace, subject).await,
        ("enforced", Some((kind, name))) => enforced(client, namespace, kind, name).await,
        ("address", Some(("service", name))) => address(client, namespace, name).await,
        ("gone", Some((kind, name))) => gone(client, namespace, kind, name).await,
        _ => bail!("{line:?}: expected rollout deployment/X, settled SELECTOR, enforced KIND/X, address service/X or gone KIND/X"),
    }
    .with_context(|| format!("waiting: {line}"))
}

async fn rollout(client: &Client, namespace: &str, name: &str) -> Result<()> {
    let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let done = |deployment: Option<&Deployment>| {
        let Some(deployment) = deployment else { return false };
        let status = deployment.status.clone().unwrap_or_default();
        let wanted = deployment.spec.replicas.unwrap_or(1);
        status.observed_generation >= deployment.metadata.generation
            && status.updated_replicas.unwrap_or(0) == wanted
            && status.available_replicas.unwrap_or(0) == wanted
            && status.replicas.unwrap_or(0) == wanted
    };
    let deployment = await_condition(api, name, done).await?.context("the deployment has vanished")?;
    let labels = deployment.spec.selector.match_labels.unwrap_or_default();
    let selector: Vec<_> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    settled(client, namespace, &selector.join(",")).await
}

async fn settled(client: &Client, namespace: &str, selector: &str) -> Result<()> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let ready = |pod: &Pod| {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        pod.metadata.deletion_timestamp.is_none()
            && conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    let mut pods = std::collections::HashMap::new();
    let mut complete = false;
    let mut events = watcher(api, watcher::Config::default().labels(selector)).default_backoff().boxed();
    while let Some(event) = events.try_next().await? {
        match event {
            watcher::Event::Init => {
                pods.clear();
                complete = false;
            }
            watcher::Event::InitApply(pod) | watcher::Event::Apply(pod) => {
                pods.insert(pod.name_any(), ready(&pod));
            }
            watcher::Event::InitDone => complete = true,
            watcher::Event::Delete(pod) => {
                pods.remove(&pod.name_any());
            }
        }
        if complete && !pods.is_empty() && pods.values().all(|ready| *ready) {
            return Ok(());
        }
    }
    bail!("the watch has ended")
}

async fn address(client: &Client, namespace: &str, name: &str) -> Result<()> {
    let api: Api<Service> = Api::namespaced(client.clone(), namespace);
    let has_address = |service: Option<&Service>| {
        let status = service.and_then(|service| service.status.as_ref()).and_then(|status| status.load_balancer.as_ref());
        let ingress = status.and_then(|status| status.ingress.as_ref());
        ingress.is_some_and(|ingress| ingress.iter().any(|one| one.ip.is_some() || one.hostname.is_some()))
    };
    await_condition(api, name, has_address).await?;
    Ok(())
}

/// `status.conditions` says `Reconciled`, for the current generation: what `istioctl x wait` looks at too.
fn is_enforced(object: Option<&DynamicObject>) -> bool {
    let Some(object) = object else { return false };
    let generation = object.metadata.generation.unwrap_or(0);
    let status = &object.data["status"];
    let reconciled = |condition: &serde_json::Value| {
        let seen = condition["observedGeneration"].as_i64().or(status["observedGeneration"].as_i64());
        let seen = seen.or_else(|| status["observedGeneration"].as_str().and_then(|text| text.parse().ok()));
        condition["type"] == "Reconciled" && condition["status"] == "True" && seen.is_none_or(|seen| seen >= generation)
    };
    status["conditions"].as_array().into_iter().flatten().any(reconciled)
}

async fn enforced(client: &Client, namespace: &str, kind: &str, name: &str) -> Result<()> {
    on_object(client, namespace, kind, |api| async move {
        await_condition(api, name, |object: Option<&DynamicObject>| is_enforced(object)).await?;
        Ok(())
    })
    .await
}

async fn gone(client: &Client, namespace: &str, kind: &str, name: &str) -> Result<()> {
    on_object(client, namespace, kind, |api| async move {
        await_condition(api, name, |object: Option<&DynamicObject>| object.is_none()).await?;
        Ok(())
    })
    .await
}

async fn on_object<F, Fut>(client: &Client, namespace: &str, kind: &str, act: F) -> Result<()>
where
    F: FnOnce(Api<DynamicObject>) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let discovery = Discovery::new(client.clone()).run().await?;
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let matches = resource.plural.eq_ignore_ascii_case(kind) || resource.kind.eq_ignore_ascii_case(kind);
            if !matches {
                continue;
            }
            let gvk = GroupVersionKind::gvk(&resource.group, &resource.version, &resource.kind);
            tracing::debug!(?gvk, "waiting on");
            let api = match capabilities.scope {
                Scope::Namespaced => Api::namespaced_with(client.clone(), namespace, &resource),
                Scope::Cluster => Api::all_with(client.clone(), &resource),
            };
            return act(api).await;
        }
    }
    bail!("the cluster has no kind {kind:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(generation: i64, status: serde_json::Value) -> DynamicObject {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "x", "generation": generation}, "status": status,
        }))
        .expect("an object")
    }

    #[test]
    fn only_the_current_version_counts_as_enforced() {
        let condition = |seen: i64, status: &str| {
            serde_json::json!({"observedGeneration": seen, "conditions": [{"type": "Reconciled", "status": status}]})
        };
        assert!(is_enforced(Some(&object(2, condition(2, "True")))));
        assert!(!is_enforced(Some(&object(2, condition(1, "True")))));
        assert!(!is_enforced(Some(&object(2, condition(2, "False")))));
        assert!(!is_enforced(Some(&object(2, serde_json::json!({})))));
        assert!(!is_enforced(None));
    }
}
