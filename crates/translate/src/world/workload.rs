//! Pods reduced to what the mesh needs: labels, identity, ports, telemetry names.
//!
//! Pods of one Deployment differ in name and address only; what they have in common they share ([`Workload::share`]), since pods are
//! what a large mesh has most of.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use mantlet_model::endpoint::WorkloadRef;

/// Pod label that says whether the pod terminates mesh mTLS (S1.64).
pub const TLS_MODE_LABEL: &str = "security.istio.io/tlsMode";
/// Annotation by which the injector marks pods that run Mantlet's proxy.
pub const MANTLET_PROXY_ANNOTATION: &str = "mantlet.io/proxy";

/// A workload instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Pod name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Pod address, once known.
    pub ip: Option<IpAddr>,
    /// Pod labels.
    pub labels: Arc<BTreeMap<String, String>>,
    /// Service account (`default` if the pod names none).
    pub service_account: String,
    /// Named container ports.
    pub named_ports: Arc<BTreeMap<String, u16>>,
    /// Whether the pod terminates mesh mTLS.
    pub mtls: bool,
    /// Whether its proxy is Mantlet's own.
    pub mantlet: bool,
    /// Names for telemetry.
    pub telemetry: Arc<WorkloadRef>,
}

impl Workload {
    /// Reads a pod; `None` for pods that take no part (finished, host network keeps no identity of its own address).
    pub fn from_pod(pod: &Pod, cluster: &str) -> Option<Workload> {
        let name = pod.metadata.name.clone()?;
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let spec = pod.spec.as_ref()?;
        let status = pod.status.as_ref();
        if matches!(status.and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed")) {
            return None;
        }
        let labels = pod.metadata.labels.clone().unwrap_or_default();
        let annotations = pod.metadata.annotations.clone().unwrap_or_default();
        let named_ports = spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
            .flat_map(|c| c.ports.iter().flatten())
            .filter_map(|p| Some((p.name.clone()?, u16::try_from(p.container_port).ok()?)))
            .collect();
        let workload_name = workload_name(pod, &name, &labels);
        let telemetry = WorkloadRef {
            canonical_name: first_label(
                &labels,
                &["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"],
            )
            .unwrap_or(&workload_name)
            .to_string(),
            canonical_revision: first_label(
                &labels,
                &[
                    "service.istio.io/canonical-revision",
                    "app.kubernetes.io/version",
                    "version",
                ],
            )
            .unwrap_or("latest")
            .to_string(),
            name: workload_name,
            namespace: namespace.clone(),
            cluster: cluster.to_string(),
        };
        let has_mantlet_image = spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().flatten())
            .any(|c| c.name == "istio-proxy" && c.image.as_deref().is_some_and(is_mantlet_image));
        Some(Workload {
            ip: status.and_then(|s| s.pod_ip.as_deref()).and_then(|ip| ip.parse().ok()),
            service_account: spec
                .service_account_name
                .clone()
                .filter(|s| !s.is_empty())
                .unwrap_or_else(|| "default".into()),
            named_ports: Arc::new(named_ports),
            mtls: labels.get(TLS_MODE_LABEL).is_some_and(|v| v == "istio"),
            mantlet: has_mantlet_image || annotations.get(MANTLET_PROXY_ANNOTATION).is_some_and(|v| v == "true"),
            telemetry: Arc::new(telemetry),
            name,
            namespace,
            labels: Arc::new(labels),
        })
    }

    /// Takes over what is equal in `other`, so that the two hold it once.
    pub(super) fn share(&mut self, other: &Workload) {
        fn take<T: PartialEq>(own: &mut Arc<T>, other: &Arc<T>) {
            if own == other {
                own.clone_from(other);
            }
        }
        take(&mut self.labels, &other.labels);
        take(&mut self.named_ports, &other.named_ports);
        take(&mut self.telemetry, &other.telemetry);
    }
}

fn is_mantlet_image(image: &str) -> bool {
    image
        .split('/')
        .rev()
        .nth(1)
        .is_some_and(|repository| repository == "mantlet")
}

fn first_label<'a>(labels: &'a BTreeMap<String, String>, keys: &[&str]) -> Option<&'a str> {
    keys.iter()
        .find_map(|k| labels.get(*k))
        .map(String::as_str)
        .filter(|v| !v.is_empty())
}

/// The Deployment (or other owner) behind a pod.
fn workload_name(pod: &Pod, pod_name: &str, labels: &BTreeMap<String, String>) -> String {
    let owner = pod
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true))
        .or_else(|| pod.metadata.owner_references.iter().flatten().next());
    match owner {
        Some(owner) if owner.kind == "ReplicaSet" => {
            let hash = labels.get("pod-template-hash").map(String::as_str).unwrap_or_default();
            match owner.name.strip_suffix(hash).and_then(|n| n.strip_suffix('-')) {
                Some(deployment) if !hash.is_empty() => deployment.to_string(),
                _ => owner.name.clone(),
            }
        }
        Some(owner) => owner.name.clone(),
        None => pod_name.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::world::World;

    #[test]
    fn pods_of_one_deployment_hold_what_they_have_in_common_once() {
        let mut world = World::default();
        for (name, version) in [("web-c", "v1"), ("web-a", "v1"), ("web-b", "v2")] {
            let pod = json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": "shop", "labels": {"app": "web", "version": version},
                    "ownerReferences": [{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web", "uid": "u", "controller": true}]},
                "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]}});
            world.set_pod(&serde_json::from_value(pod).unwrap());
        }
        let [a, b, c] = ["web-a", "web-b", "web-c"].map(|name| world.pod("shop", name).unwrap());
        assert!(Arc::ptr_eq(&a.labels, &c.labels) && Arc::ptr_eq(&a.telemetry, &c.telemetry));
        assert!(Arc::ptr_eq(&a.named_ports, &c.named_ports) && Arc::ptr_eq(&a.named_ports, &b.named_ports));
        assert_eq!(
            (b.labels["version"].as_str(), a.labels["version"].as_str()),
            ("v2", "v1")
        );
    }
}
