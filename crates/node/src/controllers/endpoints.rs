//! EndpointSlices and Endpoints: which pods stand behind a Service, and whether they take new connections.
//!
//! [`plan`] is pure; `reconcile` makes the API agree with it. A pod that is being deleted stops being ready in the same
//! reconcile that sees its deletion timestamp, before its processes hear of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort as LegacyPort, EndpointSubset, Endpoints, ObjectReference, Pod, Service, ServicePort,
};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt};
use tokio_util::sync::CancellationToken;

use super::informer::Key;
use super::queue::{self, Queue};
use super::{Context, Error, already_exists, ignore_not_found, namespace_terminating, not_found, pods};

/// Which Service a slice belongs to.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Endpoints per slice, as upstream's default.
const SLICE_SIZE: usize = 100;

pub(crate) async fn run(context: Context, stop: CancellationToken) {
    let queue = Queue::new();
    context.informers.services.subscribe(Box::new({
        let queue = queue.clone();
        move |old, new| {
            if let Some(service) = new.or(old) {
                queue.add(Key::of(service.as_ref()));
            }
        }
    }));
    context.informers.pods.subscribe(Box::new({
        let queue = queue.clone();
        let informers = Arc::downgrade(&context.informers);
        move |old, new| {
            let Some(informers) = informers.upgrade() else { return };
            if let (Some(old), Some(new)) = (old, new)
                && facts(old) == facts(new)
            {
                return;
            }
            for pod in [old, new].into_iter().flatten() {
                let namespace = pod.namespace().unwrap_or_default();
                for service in informers.services.select(&namespace, |service| selects(service, pod)) {
                    queue.add(Key::of(service.as_ref()));
                }
            }
        }
    }));
    context.informers.slices.subscribe(Box::new({
        let queue = queue.clone();
        move |old, new| {
            for slice in [old, new].into_iter().flatten() {
                if slice.labels().get(MANAGED_BY).map(String::as_str) == Some(MANAGER)
                    && let Some(service) = slice.labels().get(SERVICE_NAME)
                {
                    queue.add(Key::new(slice.namespace().unwrap_or_default(), service));
                }
            }
        }
    }));
    queue::run("endpoints", queue, 4, stop, move |key| {
        let context = context.clone();
        async move { reconcile(&context, &key).await }
    })
    .await;
}

/// What of a pod shows in a slice, so that the many other pod changes cost nothing.
#[derive(PartialEq)]
struct Facts<'a> {
    labels: Option<&'a BTreeMap<String, String>>,
    address: Option<&'a str>,
    node: Option<&'a str>,
    ready: bool,
    deleting: bool,
    finished: bool,
}

fn facts(pod: &Pod) -> Facts<'_> {
    Facts {
        labels: pod.metadata.labels.as_ref(),
        address: pod.status.as_ref().and_then(|status| status.pod_ip.as_deref()),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()),
        ready: pods::is_ready(pod),
        deleting: pod.metadata.deletion_timestamp.is_some(),
        finished: pods::is_finished(pod),
    }
}

fn selects(service: &Service, pod: &Pod) -> bool {
    let Some(selector) = service.spec.as_ref().and_then(|spec| spec.selector.as_ref()) else {
        return false;
    };
    !selector.is_empty()
        && selector
            .iter()
            .all(|(name, value)| pod.labels().get(name) == Some(value))
}

/// The port of a pod that a service port leads to; a name that the pod does not have leads nowhere.
fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let spec = pod.spec.as_ref()?;
            let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
            containers
                .flat_map(|container| container.ports.iter().flatten())
                .find(|candidate| {
                    candidate.name.as_deref() == Some(name)
                        && candidate.protocol.as_deref().unwrap_or("TCP") == protocol
                })
                .map(|candidate| candidate.container_port)
        }
    }
}

/// Pods that answer on the same ports.
#[derive(Debug, PartialEq)]
pub struct Group {
    /// The ports, as an EndpointSlice lists them.
    pub ports: Vec<EndpointPort>,
    /// The pods.
    pub endpoints: Vec<Endpoint>,
}

/// The endpoints of a Service, grouped by the ports that its target ports resolve to.
pub fn plan(service: &Service, members: &[Arc<Pod>]) -> Vec<Group> {
    let Some(spec) = &service.spec else {
        return Vec::new();
    };
    let publish_all = spec.publish_not_ready_addresses == Some(true);
    let mut groups: Vec<Group> = Vec::new();
    let mut members: Vec<_> = members.iter().filter(|pod| !pods::is_finished(pod)).collect();
    members.sort_by_key(|pod| pod.name_any());
    for pod in members {
        let Some(address) = pod.status.as_ref().and_then(|status| status.pod_ip.clone()) else {
            continue;
        };
        let ports: Vec<_> = spec
            .ports
            .iter()
            .flatten()
            .filter_map(|port| {
                Some(EndpointPort {
                    name: Some(port.name.clone().unwrap_or_default()),
                    port: Some(target_port(port, pod)?),
                    protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
                    app_protocol: port.app_protocol.clone(),
                })
            })
            .collect();
        if ports.is_empty() && spec.ports.as_ref().is_some_and(|ports| !ports.is_empty()) {
            continue;
        }
        let ready = pods::is_ready(pod);
        let terminating = pod.metadata.deletion_timestamp.is_some();
        let pod_spec = pod.spec.as_ref();
        let same_domain = pod_spec.and_then(|spec| spec.subdomain.as_deref()) == Some(&service.name_any());
        let endpoint = Endpoint {
            addresses: vec![address],
            conditions: Some(EndpointConditions {
                ready: Some((ready && !terminating) || publish_all),
                serving: Some(ready || publish_all),
                terminating: Some(terminating),
            }),
            hostname: pod_spec
                .filter(|_| same_domain)
                .and_then(|spec| spec.hostname.clone())
                .filter(|name| !name.is_empty()),
            node_name: pod_spec.and_then(|spec| spec.node_name.clone()),
            target_ref: Some(ObjectReference {
                kind: Some("Pod".to_owned()),
                name: Some(pod.name_any()),
                namespace: pod.namespace(),
                uid: pod.uid(),
                ..ObjectReference::default()
            }),
            ..Endpoint::default()
        };
        match groups.iter_mut().find(|group| group.ports == ports) {
            Some(group) => group.endpoints.push(endpoint),
            None => groups.push(Group {
                ports,
                endpoints: vec![endpoint],
            }),
        }
    }
    groups
}

async fn reconcile(context: &Context, key: &Key) -> Result<Option<Duration>, Error> {
    let service = context.informers.services.get(key);
    let service = service.filter(|service| service.metadata.deletion_timestamp.is_none());
    let spec = service.as_ref().and_then(|service| service.spec.as_ref());
    let managed = spec.is_some_and(|spec| {
        spec.selector.as_ref().is_some_and(|selector| !selector.is_empty())
            && spec.type_.as_deref() != Some("ExternalName")
    });
    let (wanted, legacy) = match &service {
        Some(service) if managed => {
            let members = context
                .informers
                .pods
                .select(&key.namespace, |pod| selects(service, pod));
            let groups = plan(service, &members);
            (slices(service, &groups), Some(legacy(service, &groups)))
        }
        _ => (Vec::new(), None),
    };
    let existing = context.informers.slices.select(&key.namespace, |slice| {
        slice.labels().get(SERVICE_NAME) == Some(&key.name)
            && slice.labels().get(MANAGED_BY).map(String::as_str) == Some(MANAGER)
            && slice.metadata.deletion_timestamp.is_none()
    });
    let api: Api<EndpointSlice> = Api::namespaced(context.client.clone(), &key.namespace);
    for slice in &wanted {
        let known = existing.iter().find(|known| known.name_any() == slice.name_any());
        let written = match known {
            Some(known) if same_slice(known, slice) => continue,
            Some(known) => {
                let mut slice = slice.clone();
                slice.metadata.resource_version = known.resource_version();
                api.replace(&slice.name_any(), &PostParams::default(), &slice).await
            }
            None => api.create(&PostParams::default(), slice).await,
        };
        match written {
            Ok(slice) => context.informers.slices.observe(&slice),
            Err(error) if namespace_terminating(&error) => return Ok(None),
            // Deleted meanwhile, by the namespace's end perhaps; the watch will tell.
            Err(error) if not_found(&error) => return Ok(Some(Duration::from_millis(50))),
            Err(error) if already_exists(&error) => {
                // A leftover of a service that was deleted and made anew: take it over with the next look.
                let leftover = api.get(&slice.name_any()).await?;
                context.informers.slices.observe(&leftover);
                return Ok(Some(Duration::from_millis(50)));
            }
            Err(error) => return Err(error.into()),
        }
    }
    for slice in existing {
        if !wanted.iter().any(|wanted| wanted.name_any() == slice.name_any()) {
            ignore_not_found(api.delete(&slice.name_any(), &DeleteParams::default()).await)?;
        }
    }
    if let (Some(service), Some(legacy)) = (&service, legacy) {
        write_legacy(context, key, service, legacy).await?;
    } else if service.is_none() && context.informers.endpoints.get(key).is_some() {
        let api: Api<Endpoints> = Api::namespaced(context.client.clone(), &key.namespace);
        ignore_not_found(api.delete(&key.name, &DeleteParams::default()).await)?;
    }
    Ok(None)
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.labels().clone();
    labels.remove(HEADLESS);
    if service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()) == Some("None") {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    labels
}

fn slices(service: &Service, groups: &[Group]) -> Vec<EndpointSlice> {
    let mut labels = labels(service);
    labels.insert(SERVICE_NAME.to_owned(), service.name_any());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    let empty = [Group {
        ports: Vec::new(),
        endpoints: Vec::new(),
    }];
    // A service without pods still has one, empty slice: clients tell "none" from "not known yet" by it.
    let groups = if groups.is_empty() { &empty[..] } else { groups };
    let mut slices = Vec::new();
    for group in groups {
        let mut chunks: Vec<_> = group.endpoints.chunks(SLICE_SIZE).collect();
        if chunks.is_empty() {
            chunks.push(&[]);
        }
        for (index, endpoints) in chunks.into_iter().enumerate() {
            // The name follows from the ports, so that a reconcile that runs twice writes the same slices.
            let facts: Vec<_> = group
                .ports
                .iter()
                .map(|port| (&port.name, &port.port, &port.protocol))
                .collect();
            let hash = pods::fnv1a(format!("{facts:?}/{index}").as_bytes());
            slices.push(EndpointSlice {
                address_type: "IPv4".to_owned(),
                endpoints: Some(endpoints.to_vec()),
                metadata: ObjectMeta {
                    name: Some(format!("{}-{}", service.name_any(), &pods::safe_name(hash)[..5])),
                    namespace: service.namespace(),
                    labels: Some(labels.clone()),
                    owner_references: Some(vec![OwnerReference {
                        ..pods::owner_reference(service)
                    }]),
                    ..ObjectMeta::default()
                },
                ports: Some(group.ports.clone()),
            });
        }
    }
    slices
}

fn same_slice(known: &EndpointSlice, wanted: &EndpointSlice) -> bool {
    known.endpoints.clone().unwrap_or_default() == wanted.endpoints.clone().unwrap_or_default()
        && known.ports.clone().unwrap_or_default() == wanted.ports.clone().unwrap_or_default()
        && known.metadata.labels == wanted.metadata.labels
}

fn legacy(service: &Service, groups: &[Group]) -> Endpoints {
    let address = |endpoint: &Endpoint| EndpointAddress {
        ip: endpoint.addresses.first().cloned().unwrap_or_default(),
        hostname: endpoint.hostname.clone(),
        node_name: endpoint.node_name.clone(),
        target_ref: endpoint.target_ref.clone(),
    };
    let ready = |endpoint: &&Endpoint| endpoint.conditions.as_ref().and_then(|known| known.ready) == Some(true);
    let some = |list: Vec<EndpointAddress>| Some(list).filter(|list| !list.is_empty());
    let subsets: Vec<_> = groups
        .iter()
        .map(|group| EndpointSubset {
            addresses: some(group.endpoints.iter().filter(ready).map(address).collect()),
            not_ready_addresses: some(group.endpoints.iter().filter(|e| !ready(e)).map(address).collect()),
            ports: Some(
                group
                    .ports
                    .iter()
                    .map(|port| LegacyPort {
                        name: port.name.clone().filter(|name| !name.is_empty()),
                        port: port.port.unwrap_or(0),
                        protocol: port.protocol.clone(),
                        app_protocol: port.app_protocol.clone(),
                    })
                    .collect::<Vec<_>>(),
            )
            .filter(|ports| !ports.is_empty()),
        })
        .collect();
    Endpoints {
        metadata: ObjectMeta {
            name: Some(service.name_any()),
            namespace: service.namespace(),
            labels: Some(labels(service)).filter(|labels| !labels.is_empty()),
            ..ObjectMeta::default()
        },
        subsets: Some(subsets).filter(|subsets| !subsets.is_empty()),
    }
}

async fn write_legacy(context: &Context, key: &Key, service: &Service, mut wanted: Endpoints) -> Result<(), Error> {
    let api: Api<Endpoints> = Api::namespaced(context.client.clone(), &key.namespace);
    let known = context.informers.endpoints.get(key);
    let written = match known {
        Some(known) if known.subsets == wanted.subsets && known.metadata.labels == wanted.metadata.labels => {
            return Ok(());
        }
        Some(known) => {
            wanted.metadata.resource_version = known.resource_version();
            api.replace(&key.name, &PostParams::default(), &wanted).await
        }
        None => api.create(&PostParams::default(), &wanted).await,
    };
    match written {
        Ok(endpoints) => {
            context.informers.endpoints.observe(&endpoints);
            Ok(())
        }
        Err(error) if namespace_terminating(&error) => Ok(()),
        Err(error) if already_exists(&error) => {
            let known = api.get(&service.name_any()).await?;
            context.informers.endpoints.observe(&known);
            Err(error.into())
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(spec: serde_json::Value) -> Service {
        serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "default"}, "spec": spec}))
            .expect("a service")
    }

    fn pod(name: &str, ip: &str, ready: bool, deleted: bool) -> Arc<Pod> {
        let mut pod = json!({
            "metadata": {"name": name, "namespace": "default", "labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIP": ip,
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
        });
        if deleted {
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        Arc::new(serde_json::from_value(pod).expect("a pod"))
    }

    fn conditions(group: &Group) -> Vec<(bool, bool, bool)> {
        group
            .endpoints
            .iter()
            .filter_map(|endpoint| endpoint.conditions.as_ref())
            .map(|known| {
                (
                    known.ready == Some(true),
                    known.serving == Some(true),
                    known.terminating == Some(true),
                )
            })
            .collect()
    }

    #[test]
    fn a_terminating_pod_serves_but_is_not_ready() {
        let service = service(json!({"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]}));
        let members = [
            pod("a", "10.244.0.2", true, false),
            pod("b", "10.244.0.3", true, true),
            pod("c", "10.244.0.4", false, false),
        ];
        let groups = plan(&service, &members);
        assert_eq!(groups.len(), 1);
        assert_eq!(groups[0].ports[0].port, Some(8080));
        assert_eq!(
            conditions(&groups[0]),
            [(true, true, false), (false, true, true), (false, false, false)]
        );
    }

    #[test]
    fn publish_not_ready_addresses_counts_everything_as_ready() {
        let service =
            service(json!({"selector": {"app": "web"}, "ports": [{"port": 80}], "publishNotReadyAddresses": true}));
        let groups = plan(&service, &[pod("c", "10.244.0.4", false, false)]);
        assert_eq!(conditions(&groups[0]), [(true, true, false)]);
    }

    #[test]
    fn a_port_name_that_the_pod_lacks_leads_nowhere() {
        let service = service(json!({"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "grpc"}]}));
        assert!(plan(&service, &[pod("a", "10.244.0.2", true, false)]).is_empty());
    }

    #[test]
    fn an_empty_service_has_one_empty_slice() {
        let service = service(json!({"selector": {"app": "web"}, "ports": [{"port": 80}]}));
        let slices = slices(&service, &plan(&service, &[]));
        assert_eq!(slices.len(), 1);
        assert_eq!(slices[0].endpoints.as_deref(), Some(&[][..]));
    }
}
