//! Reads what is analysed: all objects of a cluster that analyzers look at, and on which ports applications listen.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, ResourceExt};
use mantlet_api::kind;
use mantlet_translate::analyze::{Finding, Input, Resource, table};

use crate::inspect::target;

/// Objects asked for at a time.
const PAGE: u32 = 500;
/// Pods asked at a time.
const PARALLEL: usize = 8;
/// Largest list of sockets taken from a pod.
const MAX_SOCKETS: usize = 4 << 20;

/// Kubernetes' own kinds that are looked at: group, version, plural, kind.
const KUBERNETES: [(&str, &str, &str, &str); 13] = [
    ("", "v1", "namespaces", "Namespace"),
    ("", "v1", "pods", "Pod"),
    ("", "v1", "services", "Service"),
    ("", "v1", "configmaps", "ConfigMap"),
    ("", "v1", "secrets", "Secret"),
    ("apps", "v1", "deployments", "Deployment"),
    ("apps", "v1", "statefulsets", "StatefulSet"),
    ("apps", "v1", "daemonsets", "DaemonSet"),
    ("batch", "v1", "jobs", "Job"),
    ("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    ("networking.k8s.io", "v1", "ingresses", "Ingress"),
    (
        "admissionregistration.k8s.io",
        "v1",
        "mutatingwebhookconfigurations",
        "MutatingWebhookConfiguration",
    ),
    (
        "admissionregistration.k8s.io",
        "v1",
        "validatingwebhookconfigurations",
        "ValidatingWebhookConfiguration",
    ),
];

/// Istio's former kinds.
const LEGACY: [(&str, &str, &str, &str); 6] = [
    ("authentication.istio.io", "v1alpha1", "meshpolicies", "MeshPolicy"),
    ("authentication.istio.io", "v1alpha1", "policies", "Policy"),
    ("rbac.istio.io", "v1alpha1", "serviceroles", "ServiceRole"),
    ("rbac.istio.io", "v1alpha1", "servicerolebindings", "ServiceRoleBinding"),
    ("rbac.istio.io", "v1alpha1", "clusterrbacconfigs", "ClusterRbacConfig"),
    ("rbac.istio.io", "v1alpha1", "rbacconfigs", "RbacConfig"),
];

/// What was read of a cluster.
pub struct Collected {
    /// All objects that analyzers look at.
    pub resources: Vec<Resource>,
    /// Lists that were refused, as findings: then the answer is incomplete.
    pub trouble: Vec<Finding>,
    /// Whether Secrets could be read. Users often may not, and little depends on them.
    pub secrets: bool,
}

/// All objects that analyzers look at.
pub async fn cluster(client: &Client, istio_namespace: &str) -> Collected {
    let istio = kind::KINDS.iter().map(|k| (k.group, k.versions[0], k.plural, k.kind));
    let mut resources = Vec::new();
    let mut trouble = Vec::new();
    let mut secrets = true;
    let mut seen = BTreeSet::new();
    for (group, version, plural, kind) in KUBERNETES.into_iter().chain(istio).chain(LEGACY) {
        if !seen.insert((group, plural)) {
            continue;
        }
        let what = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        // Only the control plane's own settings are needed of all ConfigMaps.
        let api: Api<DynamicObject> = if kind == "ConfigMap" {
            Api::namespaced_with(client.clone(), istio_namespace, &what)
        } else {
            Api::all_with(client.clone(), &what)
        };
        match list(&api).await {
            Ok(objects) => {
                for object in objects {
                    if let Some(resource) = read(&object, group, version, kind) {
                        resources.push(resource);
                    }
                }
            }
            // Not installed.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(kube::Error::Api(status)) if status.code == 403 && kind == "Secret" => secrets = false,
            Err(error) => trouble.push(Finding {
                message: &table::INTERNAL_ERROR,
                kind: kind.to_string(),
                namespace: String::new(),
                name: "*".into(),
                origin: None,
                path: String::new(),
                text: format!("Internal error: {plural} could not be listed, so the analysis is incomplete: {error}"),
            }),
        }
    }
    Collected {
        resources,
        trouble,
        secrets,
    }
}

async fn list(api: &Api<DynamicObject>) -> Result<Vec<DynamicObject>, kube::Error> {
    let mut params = ListParams::default().limit(PAGE);
    let mut out = Vec::new();
    loop {
        let page = api.list(&params).await?;
        let more = page.metadata.continue_.clone().filter(|token| !token.is_empty());
        out.extend(page.items);
        match more {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(out),
        }
    }
}

fn read(object: &DynamicObject, group: &str, version: &str, kind: &str) -> Option<Resource> {
    let mut value = serde_json::to_value(object).ok()?;
    // Items of lists have neither.
    let api_version = if group.is_empty() {
        version.to_string()
    } else {
        format!("{group}/{version}")
    };
    value["apiVersion"] = api_version.into();
    value["kind"] = kind.into();
    if let Some(metadata) = value["metadata"].as_object_mut() {
        metadata.remove("managedFields");
    }
    Resource::read(value, "", None)
}

/// The files directly in directories, and the other paths as they are.
pub fn direct(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for path in paths {
        if !path.is_dir() {
            out.push(path.clone());
            continue;
        }
        let mut files = Vec::new();
        for entry in std::fs::read_dir(path).with_context(|| format!("reading directory {}", path.display()))? {
            let file = entry?.path();
            let known = file
                .extension()
                .is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
            if known && file.is_file() {
                files.push(file);
            }
        }
        files.sort();
        out.extend(files);
    }
    Ok(out)
}

/// Ports on which pods with a proxy and a Service listen for localhost only. Pods that cannot be asked are left out: then nothing is
/// said about them.
pub async fn localhost_ports(
    client: &Client,
    input: &Input,
    only: Option<&str>,
) -> BTreeMap<(String, String), BTreeSet<u16>> {
    let pods: Vec<(String, String)> = input
        .workloads
        .iter()
        .filter(|w| w.kind == "Pod" && w.meshed && !w.gateway)
        .filter(|w| only.is_none_or(|namespace| w.namespace == namespace) && !input.is_system(&w.namespace))
        .filter(|w| input.resource_of(w).text("/status/phase") == "Running" && input.services_of(w).next().is_some())
        .map(|w| (w.namespace.clone(), w.name.clone()))
        .collect();
    futures::stream::iter(pods)
        .map(|(namespace, name)| async move {
            let ports = sockets(client, &namespace, &name).await.ok()?;
            Some(((namespace, name), ports))
        })
        .buffer_unordered(PARALLEL)
        .filter_map(std::future::ready)
        .collect()
        .await
}

async fn sockets(client: &Client, namespace: &str, name: &str) -> Result<BTreeSet<u16>> {
    let pod: Pod = Api::namespaced(client.clone(), namespace).get(name).await?;
    // All containers of a pod share its network; the proxy's has a shell in no case, the application's mostly has `cat`.
    let containers: Vec<String> = pod
        .spec
        .iter()
        .flat_map(|s| &s.containers)
        .map(|c| c.name.clone())
        .collect();
    let mut last = anyhow::anyhow!("pod {} has no container", pod.name_any());
    for container in containers {
        match target::ask(client, &pod, &container, &["cat", "/proc/net/tcp", "/proc/net/tcp6"]).await {
            Ok(text) if text.len() <= MAX_SOCKETS && !text.is_empty() => {
                return Ok(only_localhost(&String::from_utf8_lossy(&text)));
            }
            Ok(_) => last = anyhow::anyhow!("no list of sockets"),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Ports that are listened on by loopback addresses and by no other, from the text of `/proc/net/tcp` and `tcp6`.
pub(super) fn only_localhost(text: &str) -> BTreeSet<u16> {
    /// State of listening sockets.
    const LISTEN: &str = "0A";
    let mut local = BTreeSet::new();
    let mut open = BTreeSet::new();
    for line in text.lines() {
        let mut fields = line.split_whitespace().skip(1);
        let (Some(address), Some(_), Some(state)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let Some((host, port)) = address.split_once(':') else {
            continue;
        };
        let Ok(port) = u16::from_str_radix(port, 16) else {
            continue;
        };
        if state != LISTEN {
            continue;
        }
        // Words in the byte order of the machine: 127.0.0.1 is 0100007F, ::1 ends in 01000000.
        let loopback = (host.len() == 8 && host.ends_with("7F"))
            || host == "00000000000000000000000001000000"
            || (host.starts_with("0000000000000000FFFF0000") && host.ends_with("7F"));
        if loopback {
            local.insert(port);
        } else {
            open.insert(port);
        }
    }
    local.difference(&open).copied().collect()
}
