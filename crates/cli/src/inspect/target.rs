//! Finding a pod by what a user typed, and asking a program in its containers.

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{AttachParams, ListParams};
use kube::{Api, Client, ResourceExt};
use tokio::io::AsyncReadExt;

/// Largest answer taken from a program in a pod.
const MAX_ANSWER: u64 = 256 << 20;

/// The pod that `name` means in `namespace`: `pod`, `pod.namespace`, `deploy/x`, `sts/x`, `svc/x`.
pub(crate) async fn pod(client: &Client, namespace: &str, name: &str) -> Result<Pod> {
    if let Some((kind, name)) = name.split_once('/') {
        return pod_of(client, namespace, kind, name).await;
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    if let Some(pod) = pods.get_opt(name).await? {
        return Ok(pod);
    }
    // `pod.namespace`, the form in which proxy-status prints proxies.
    if let Some((pod, namespace)) = name.rsplit_once('.') {
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        return pods
            .get(pod)
            .await
            .with_context(|| format!("finding pod {pod} in namespace {namespace}"));
    }
    bail!("pods \"{name}\" not found in namespace {namespace}; name a pod, pod.namespace, or deploy/<name>")
}

/// All running pods that `name` means: those of a workload or service, or the one pod.
pub(crate) async fn pods(client: &Client, namespace: &str, name: &str) -> Result<Vec<Pod>> {
    match name.split_once('/') {
        Some((kind, name)) if !matches!(kind, "po" | "pod" | "pods") => pods_of(client, namespace, kind, name).await,
        _ => Ok(vec![pod(client, namespace, name).await?]),
    }
}

async fn pod_of(client: &Client, namespace: &str, kind: &str, name: &str) -> Result<Pod> {
    if matches!(kind, "po" | "pod" | "pods") {
        return Api::namespaced(client.clone(), namespace)
            .get(name)
            .await
            .map_err(Into::into);
    }
    pods_of(client, namespace, kind, name)
        .await?
        .into_iter()
        .next()
        .with_context(|| format!("{kind}/{name} has no running pod in namespace {namespace}"))
}

/// The running pods of a workload or service, by name; at least one.
async fn pods_of(client: &Client, namespace: &str, kind: &str, name: &str) -> Result<Vec<Pod>> {
    let selector = match kind {
        "deploy" | "deployment" | "deployments" => {
            let object: Deployment = Api::namespaced(client.clone(), namespace).get(name).await?;
            object.spec.selector.match_labels
        }
        "sts" | "statefulset" | "statefulsets" => {
            let object: StatefulSet = Api::namespaced(client.clone(), namespace).get(name).await?;
            object.spec.selector.match_labels
        }
        "svc" | "service" | "services" => {
            let object: Service = Api::namespaced(client.clone(), namespace).get(name).await?;
            object.spec.and_then(|s| s.selector)
        }
        other => bail!("`{other}` is not a kind that has pods; use deploy, sts, svc or pod"),
    };
    let labels = selector
        .unwrap_or_default()
        .into_iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect::<Vec<_>>()
        .join(",");
    if labels.is_empty() {
        bail!("{kind}/{name} selects no pods");
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let list = pods.list(&ListParams::default().labels(&labels)).await?;
    let running = |pod: &Pod| pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running");
    let mut found: Vec<Pod> = list
        .items
        .into_iter()
        .filter(|pod| running(pod) && pod.metadata.deletion_timestamp.is_none())
        .collect();
    if found.is_empty() {
        bail!("{kind}/{name} has no running pod in namespace {namespace}");
    }
    found.sort_by_key(|pod| pod.name_any());
    Ok(found)
}

/// The running pods of the control plane.
pub(crate) async fn control_planes(client: &Client, namespace: &str) -> Result<Vec<Pod>> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let list = pods.list(&ListParams::default().labels("app=istiod")).await?;
    let running: Vec<Pod> = list
        .items
        .into_iter()
        .filter(|pod| pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running"))
        .collect();
    if running.is_empty() {
        bail!("no running Istio pods in namespace \"{namespace}\"; install with `istioctl install`");
    }
    Ok(running)
}

/// Runs a command in a container and returns what it printed.
pub(crate) async fn ask(client: &Client, pod: &Pod, container: &str, command: &[&str]) -> Result<Vec<u8>> {
    let name = pod.name_any();
    let namespace = pod.namespace().unwrap_or_default();
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let params = AttachParams::default().container(container).stdout(true).stderr(true);
    let mut process = pods
        .exec(&name, command.iter().copied(), &params)
        .await
        .with_context(|| format!("executing {command:?} in {name}.{namespace}, container {container}"))?;
    let mut stdout = process
        .stdout()
        .context("the API server opened no stdout")?
        .take(MAX_ANSWER);
    let mut stderr = process
        .stderr()
        .context("the API server opened no stderr")?
        .take(64 << 10);
    let status = process.take_status();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    tokio::try_join!(stdout.read_to_end(&mut out), stderr.read_to_end(&mut err))?;
    let status = match status {
        Some(status) => status.await,
        None => None,
    };
    if let Some(status) = status.filter(|s| s.status.as_deref() == Some("Failure")) {
        bail!(
            "{command:?} in {name}.{namespace} failed: {} {}",
            status.message.unwrap_or_default(),
            String::from_utf8_lossy(&err).trim()
        );
    }
    Ok(out)
}

/// `GET path` on a proxy's admin port.
pub(crate) async fn ask_proxy(client: &Client, pod: &Pod, path: &str) -> Result<Vec<u8>> {
    let spec = pod.spec.as_ref().context("the pod has no spec")?;
    if !spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .any(|c| c.name == "istio-proxy")
    {
        bail!(
            "pod {}.{} has no istio-proxy container; label its namespace istio-injection=enabled and restart it",
            pod.name_any(),
            pod.namespace().unwrap_or_default()
        );
    }
    ask(client, pod, "istio-proxy", &["pilot-agent", "request", "GET", path]).await
}
