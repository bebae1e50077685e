//! Waits for observed states of the cluster, by watching; never by repeating a command.
//!
//! | line of a `wait` block | is over when |
//! |---|---|
//! | `rollout deployment/NAME [NAMESPACE]` | every replica is updated and available, and no pod of an older one is left |
//! | `settled SELECTOR [NAMESPACE]` | there are pods, all ready, none terminating |
//! | `enforced KIND/NAME [NAMESPACE]` | every proxy has confirmed the object's current version |
//! | `address service/NAME [NAMESPACE]` | its load balancer has an address |
//! | `gone KIND/NAME [NAMESPACE]` | it does not exist |

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{DynamicObject, ListParams};
use kube::discovery::{Discovery, Scope};
use kube::runtime::wait::await_condition;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use serde::Deserialize;

use crate::inspect::target;

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
    let deployment = await_condition(api, name, done)
        .await?
        .context("the deployment has vanished")?;
    let labels = deployment.spec.selector.match_labels.unwrap_or_default();
    let selector: Vec<_> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    settled(client, namespace, &selector.join(",")).await
}

async fn settled(client: &Client, namespace: &str, selector: &str) -> Result<()> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let ready = |pod: &Pod| {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        pod.metadata.deletion_timestamp.is_none()
            && conditions
                .into_iter()
                .flatten()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    let mut pods = std::collections::HashMap::new();
    let mut complete = false;
    let mut events = watcher(api, watcher::Config::default().labels(selector))
        .default_backoff()
        .boxed();
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
        let status = service
            .and_then(|service| service.status.as_ref())
            .and_then(|status| status.load_balancer.as_ref());
        let ingress = status.and_then(|status| status.ingress.as_ref());
        ingress.is_some_and(|ingress| ingress.iter().any(|one| one.ip.is_some() || one.hostname.is_some()))
    };
    await_condition(api, name, has_address).await?;
    Ok(())
}

/// How long to wait before the control plane is asked again.
const PAUSE: Duration = Duration::from_millis(30);

/// Where a control plane and its proxies stand (`/debug/distribution`).
#[derive(Debug, Deserialize)]
struct Distribution {
    /// Counts changes of the world.
    revision: u64,
    /// Kind → highest resource version that is part of the world.
    seen: BTreeMap<String, u64>,
    proxies: Vec<Proxy>,
}

#[derive(Debug, Deserialize)]
struct Proxy {
    /// `pod.namespace`.
    proxy: String,
    /// Revision that it runs.
    acked: u64,
}

/// Whether every control plane knows the object's version, and every proxy of `wanted` runs what follows from it.
fn is_enforced(planes: &[Distribution], plural: &str, version: u64, wanted: &BTreeSet<String>) -> bool {
    let current = |plane: &&Distribution| plane.seen.get(plural).is_some_and(|seen| *seen >= version);
    let running = |proxy: &String| {
        planes.iter().any(|plane| {
            plane
                .proxies
                .iter()
                .any(|one| one.proxy == *proxy && one.acked >= plane.revision)
        })
    };
    !planes.is_empty() && planes.iter().all(|plane| current(&plane)) && wanted.iter().all(running)
}

async fn enforced(client: &Client, namespace: &str, kind: &str, name: &str) -> Result<()> {
    on_object(client, namespace, kind, |api, plural| async move {
        let object = api.get_metadata(name).await?;
        let version = object
            .resource_version()
            .and_then(|version| version.parse().ok())
            .context("a numeric resource version")?;
        loop {
            let wanted = injected_pods(client).await?;
            let mut planes = Vec::new();
            for pod in target::control_planes(client, "istio-system").await? {
                let command = ["pilot-discovery", "request", "GET", "/debug/distribution"];
                let answer = target::ask(client, &pod, "discovery", &command).await?;
                planes.push(serde_json::from_slice(&answer).context("the control plane's answer")?);
            }
            if is_enforced(&planes, &plural, version, &wanted) {
                return Ok(());
            }
            tokio::time::sleep(PAUSE).await;
        }
    })
    .await
}

/// Running pods with a proxy, as the control plane names them.
async fn injected_pods(client: &Client) -> Result<BTreeSet<String>> {
    let pods: Api<Pod> = Api::all(client.clone());
    let list = pods.list(&ListParams::default()).await?;
    let has_proxy = |pod: &&Pod| {
        let running = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running");
        let containers = pod.spec.iter().flat_map(|spec| spec.containers.iter());
        running
            && pod.metadata.deletion_timestamp.is_none()
            && containers.into_iter().any(|one| one.name == "istio-proxy")
    };
    let name = |pod: &Pod| format!("{}.{}", pod.name_any(), pod.namespace().unwrap_or_default());
    Ok(list.items.iter().filter(has_proxy).map(name).collect())
}

async fn gone(client: &Client, namespace: &str, kind: &str, name: &str) -> Result<()> {
    on_object(client, namespace, kind, |api, _plural| async move {
        await_condition(api, name, |object: Option<&DynamicObject>| object.is_none()).await?;
        Ok(())
    })
    .await
}

async fn on_object<F, Fut>(client: &Client, namespace: &str, kind: &str, act: F) -> Result<()>
where
    F: FnOnce(Api<DynamicObject>, String) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let discovery = Discovery::new(client.clone()).run().await?;
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let matches = resource.plural.eq_ignore_ascii_case(kind) || resource.kind.eq_ignore_ascii_case(kind);
            if !matches {
                continue;
            }
            let api = match capabilities.scope {
                Scope::Namespaced => Api::namespaced_with(client.clone(), namespace, &resource),
                Scope::Cluster => Api::all_with(client.clone(), &resource),
            };
            return act(api, resource.plural).await;
        }
    }
    bail!("the cluster has no kind {kind:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_in_force_when_every_proxy_runs_it() {
        let plane = |seen: u64, acked: u64| Distribution {
            revision: 7,
            seen: BTreeMap::from([("peerauthentications".to_owned(), seen)]),
            proxies: vec![
                Proxy {
                    proxy: "a.default".to_owned(),
                    acked: 7,
                },
                Proxy {
                    proxy: "b.default".to_owned(),
                    acked,
                },
            ],
        };
        let wanted = |names: &[&str]| names.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        let both = wanted(&["a.default", "b.default"]);
        let check = |plane, wanted: &BTreeSet<String>| is_enforced(&[plane], "peerauthentications", 40, wanted);
        assert!(check(plane(40, 7), &both));
        assert!(!check(plane(39, 7), &both), "the control plane has not seen it");
        assert!(!check(plane(40, 6), &both), "a proxy has not confirmed it");
        assert!(
            !check(plane(40, 7), &wanted(&["c.default"])),
            "a proxy is not connected"
        );
        assert!(!is_enforced(&[], "peerauthentications", 40, &both));
    }
}
