//! What is analysed: whole objects, an index over them, and the world that translation makes of them.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use mantlet_api::MeshConfig;
use mantlet_api::mesh_config::{CONFIG_KEY, CONFIG_MAP};
use mantlet_api::object::{Object, Spec};
use serde_json::{Value, json};

use crate::inject::webhook::{self, WebhookOptions};
use crate::inject::{IGNORED_NAMESPACES, PROXY_CONTAINER};
use crate::mesh::Mesh;
use crate::world::workload::TLS_MODE_LABEL;
use crate::world::{Kind, World};

/// Group of Istio's networking kinds.
pub const NETWORKING: &str = "networking.istio.io";
/// Group of Istio's security kinds.
pub const SECURITY: &str = "security.istio.io";
/// Kinds that own pods made from a template.
const CONTROLLERS: [&str; 5] = ["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"];

/// Where an object was read from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// File, as the user named it.
    pub file: String,
    /// Index of the document in the caller's list, for finding lines of fields.
    pub document: usize,
    /// First line of the document, from 1.
    pub line: usize,
}

/// An object as written.
#[derive(Clone, Debug, PartialEq)]
pub struct Resource {
    /// API group, empty for the core group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Namespace, empty for cluster-wide kinds.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// The whole object.
    pub value: Value,
    /// The file it is from; none for objects of a cluster.
    pub origin: Option<Origin>,
}

impl Resource {
    /// Reads an object; `None` when it has no kind or no name. Objects of namespaced kinds without a namespace get `namespace`.
    pub fn read(mut value: Value, namespace: &str, origin: Option<Origin>) -> Option<Resource> {
        let kind = value.get("kind")?.as_str()?.to_string();
        let api_version = value.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
        let group = api_version.split_once('/').map_or("", |(group, _)| group).to_string();
        let name = value.pointer("/metadata/name")?.as_str()?.to_string();
        let own = value
            .pointer("/metadata/namespace")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let namespace = match own {
            "" if is_cluster_wide(&kind) => String::new(),
            "" => {
                value["metadata"]["namespace"] = json!(namespace);
                namespace.to_string()
            }
            own => own.to_string(),
        };
        Some(Resource {
            labels: strings(&value, "/metadata/labels"),
            annotations: strings(&value, "/metadata/annotations"),
            group,
            kind,
            namespace,
            name,
            value,
            origin,
        })
    }

    /// Its typed spec; `None` when it does not decode (which schema validation reports).
    pub fn spec<S: Spec>(&self) -> Option<S> {
        Object::<S>::from_value(&self.value).ok().map(|object| object.spec)
    }

    /// `namespace/name`, or the name alone.
    pub fn full_name(&self) -> String {
        if self.namespace.is_empty() {
            self.name.clone()
        } else {
            format!("{}/{}", self.namespace, self.name)
        }
    }

    /// A text at a JSON pointer, empty for none.
    pub fn text(&self, pointer: &str) -> &str {
        self.value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }
}

fn is_cluster_wide(kind: &str) -> bool {
    matches!(
        kind,
        "Namespace"
            | "Node"
            | "ClusterRole"
            | "ClusterRoleBinding"
            | "CustomResourceDefinition"
            | "MutatingWebhookConfiguration"
            | "ValidatingWebhookConfiguration"
            | "PersistentVolume"
            | "StorageClass"
            | "PriorityClass"
            | "IngressClass"
            | "GatewayClass"
            | "MeshPolicy"
            | "ClusterRbacConfig"
    )
}

/// A map of texts at a JSON pointer; other values are left out.
pub(super) fn strings(value: &Value, pointer: &str) -> BTreeMap<String, String> {
    value
        .pointer(pointer)
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_string())))
        .collect()
}

/// A pod, or the template of a controller whose pods are not known.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Index of its resource.
    pub resource: usize,
    /// Kind of the resource.
    pub kind: String,
    /// Namespace.
    pub namespace: String,
    /// Name of the resource.
    pub name: String,
    /// Labels of its pods.
    pub labels: BTreeMap<String, String>,
    /// Annotations of its pods.
    pub annotations: BTreeMap<String, String>,
    /// Pod spec.
    pub spec: Value,
    /// Whether it has a proxy (a template: will have one).
    pub meshed: bool,
    /// Whether its proxy is a gateway.
    pub gateway: bool,
}

impl Workload {
    /// Its containers, init containers included.
    pub fn containers(&self) -> impl Iterator<Item = &Value> {
        ["containers", "initContainers"]
            .into_iter()
            .filter_map(|list| self.spec.get(list)?.as_array())
            .flatten()
    }

    /// Service account of its pods.
    pub fn account(&self) -> &str {
        match self.spec.get("serviceAccountName").and_then(Value::as_str) {
            Some(name) if !name.is_empty() => name,
            _ => "default",
        }
    }

    /// Number of a target port of a Service, by number or by name of a container port.
    pub fn port(&self, target: &Value) -> Option<u64> {
        match target {
            Value::Number(number) => number.as_u64(),
            Value::String(name) => name.parse().ok().or_else(|| {
                self.containers()
                    .filter_map(|c| c.get("ports")?.as_array())
                    .flatten()
                    .find(|p| p.get("name").and_then(Value::as_str) == Some(name))
                    .and_then(|p| p.get("containerPort")?.as_u64())
            }),
            _ => None,
        }
    }
}

/// Everything that analysis looks at.
#[derive(Clone, Debug)]
pub struct Input {
    /// The objects.
    pub resources: Vec<Resource>,
    /// What translation makes of them.
    pub world: World,
    /// Mesh configuration.
    pub mesh: MeshConfig,
    /// Pods, and templates of controllers without pods.
    pub workloads: Vec<Workload>,
    /// Ports on which only localhost is served, by namespace and pod, where that could be read.
    pub localhost_ports: BTreeMap<(String, String), BTreeSet<u16>>,
    /// Whether the objects are all there are (a cluster), so that what is missing is really missing.
    pub complete: bool,
    /// Whether Secrets could be read; without them nothing is said about credentials.
    pub secrets: bool,
    by_kind: BTreeMap<String, Vec<usize>>,
    places: BTreeMap<Key, usize>,
    /// Services with a selector, and the selector, by namespace.
    selecting: BTreeMap<String, Vec<Selecting>>,
    /// Workloads by namespace.
    by_namespace: BTreeMap<String, Vec<usize>>,
    injectors: Vec<(Value, Value)>,
}

/// Index of a Service and its selector.
type Selecting = (usize, BTreeMap<String, String>);

/// Group, kind, namespace, name.
type Key = (String, String, String, String);

impl Input {
    /// Indexes objects. Later ones replace earlier ones of the same kind, namespace and name, so that files given with a
    /// cluster stand for what it would be after applying them. `root` is the control plane's namespace.
    pub fn new(all: impl IntoIterator<Item = Resource>, root: &str, complete: bool) -> Input {
        let mut places: BTreeMap<Key, usize> = BTreeMap::new();
        let mut resources: Vec<Resource> = Vec::new();
        for resource in all {
            let key = (
                resource.group.clone(),
                resource.kind.clone(),
                resource.namespace.clone(),
                resource.name.clone(),
            );
            match places.get(&key) {
                Some(index) => resources[*index] = resource,
                None => {
                    places.insert(key, resources.len());
                    resources.push(resource);
                }
            }
        }
        let mut by_kind: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, resource) in resources.iter().enumerate() {
            by_kind.entry(resource.kind.clone()).or_default().push(index);
        }
        let mesh = mesh_config(&resources, root);
        let mut settings = Mesh::from_config(&mesh);
        if mesh.root_namespace.is_empty() {
            settings.root_namespace = root.to_string();
        }
        let mut input = Input {
            world: World::new(settings),
            injectors: injectors(&resources),
            resources,
            mesh,
            workloads: Vec::new(),
            localhost_ports: BTreeMap::new(),
            complete,
            secrets: true,
            by_kind,
            places,
            selecting: BTreeMap::new(),
            by_namespace: BTreeMap::new(),
        };
        for index in input.by_kind.get("Service").into_iter().flatten() {
            let service = &input.resources[*index];
            let selector = strings(&service.value, "/spec/selector");
            if service.group.is_empty() && !selector.is_empty() {
                let list = input.selecting.entry(service.namespace.clone()).or_default();
                list.push((*index, selector));
            }
        }
        input.workloads = input.find_workloads();
        for (index, workload) in input.workloads.iter().enumerate() {
            let list = input.by_namespace.entry(workload.namespace.clone()).or_default();
            list.push(index);
        }
        input.fill_world();
        input
    }

    /// Objects of a kind, in the order given.
    pub fn of<'a>(&'a self, group: &'a str, kind: &str) -> impl Iterator<Item = &'a Resource> {
        self.by_kind
            .get(kind)
            .into_iter()
            .flatten()
            .map(|index| &self.resources[*index])
            .filter(move |r| r.group == group)
    }

    /// Objects of one of Istio's kinds with their specs, those left out that do not decode.
    pub fn typed<S: Spec>(&self) -> Vec<(&Resource, S)> {
        self.of(S::KIND.group, S::KIND.kind)
            .filter_map(|r| Some((r, r.spec::<S>()?)))
            .collect()
    }

    /// One object.
    pub fn get(&self, group: &str, kind: &str, namespace: &str, name: &str) -> Option<&Resource> {
        let key = (
            group.to_string(),
            kind.to_string(),
            namespace.to_string(),
            name.to_string(),
        );
        self.places.get(&key).map(|index| &self.resources[*index])
    }

    /// Workloads of a namespace.
    pub fn workloads_in(&self, namespace: &str) -> impl Iterator<Item = &Workload> {
        self.by_namespace
            .get(namespace)
            .into_iter()
            .flatten()
            .map(|index| &self.workloads[*index])
    }

    /// The object of a workload.
    pub fn resource_of(&self, workload: &Workload) -> &Resource {
        &self.resources[workload.resource]
    }

    /// Namespace of mesh-wide policies.
    pub fn root(&self) -> &str {
        &self.world.mesh().root_namespace
    }

    /// Labels of a namespace; those that every namespace has are added.
    pub fn namespace_labels(&self, name: &str) -> BTreeMap<String, String> {
        let mut labels = self
            .get("", "Namespace", "", name)
            .map(|n| n.labels.clone())
            .unwrap_or_default();
        labels.insert("kubernetes.io/metadata.name".into(), name.to_string());
        labels
    }

    /// Whether the injector's webhooks ask for a pod with these labels in this namespace.
    pub fn injected(&self, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        let of_namespace = self.namespace_labels(namespace);
        !IGNORED_NAMESPACES.contains(&namespace)
            && self.injectors.iter().any(|(for_namespace, for_object)| {
                selector_matches(for_namespace, &of_namespace) && selector_matches(for_object, labels)
            })
    }

    /// Whether the namespace holds system pods or the control plane, which are not part of the mesh.
    pub fn is_system(&self, namespace: &str) -> bool {
        IGNORED_NAMESPACES.contains(&namespace) || namespace == self.root()
    }

    /// Services (Kubernetes) whose selector matches a workload.
    pub fn services_of<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = &'a Resource> {
        self.selecting
            .get(&workload.namespace)
            .into_iter()
            .flatten()
            .filter(|(_, selector)| mantlet_api::selector::subset(selector, &workload.labels))
            .map(|(index, _)| &self.resources[*index])
    }

    fn find_workloads(&self) -> Vec<Workload> {
        let mut out = Vec::new();
        for (index, resource) in self.resources.iter().enumerate() {
            if resource.kind != "Pod" || !resource.group.is_empty() {
                continue;
            }
            let phase = resource.text("/status/phase");
            if matches!(phase, "Succeeded" | "Failed") {
                continue;
            }
            out.push(self.workload(index, &resource.value));
        }
        for kind in CONTROLLERS {
            let group = if kind == "Job" { "batch" } else { "apps" };
            for index in self.by_kind.get(kind).into_iter().flatten() {
                let resource = &self.resources[*index];
                let labels = strings(&resource.value, "/spec/template/metadata/labels");
                let has_pods = out
                    .iter()
                    .any(|w| w.namespace == resource.namespace && mantlet_api::selector::subset(&labels, &w.labels));
                let unused = resource.value.pointer("/spec/replicas").and_then(Value::as_u64) == Some(0);
                if resource.group == group
                    && !has_pods
                    && !unused
                    && !labels.is_empty()
                    && let Some(template) = resource.value.pointer("/spec/template")
                {
                    out.push(self.workload(*index, template));
                }
            }
        }
        out
    }

    fn workload(&self, index: usize, pod: &Value) -> Workload {
        let resource = &self.resources[index];
        let labels = strings(pod, "/metadata/labels");
        let annotations = strings(pod, "/metadata/annotations");
        let spec = pod.get("spec").cloned().unwrap_or(Value::Null);
        let mut workload = Workload {
            resource: index,
            kind: resource.kind.clone(),
            namespace: resource.namespace.clone(),
            name: resource.name.clone(),
            labels,
            annotations,
            spec,
            meshed: false,
            gateway: false,
        };
        let proxy = workload
            .containers()
            .find(|c| c.get("name").and_then(Value::as_str) == Some(PROXY_CONTAINER))
            .cloned();
        let host_network = workload.spec.get("hostNetwork").and_then(Value::as_bool) == Some(true);
        let declined = workload
            .labels
            .get("sidecar.istio.io/inject")
            .or_else(|| workload.annotations.get("sidecar.istio.io/inject"))
            .is_some_and(|v| v == "false");
        let template = resource.kind != "Pod" || resource.value.get("status").is_none();
        workload.meshed = proxy.is_some()
            || (template && !host_network && !declined && self.injected(&workload.namespace, &workload.labels));
        let router = |c: &Value| {
            c.get("args")
                .and_then(Value::as_array)
                .is_some_and(|args| args.iter().any(|a| a == "router"))
        };
        workload.gateway = proxy.as_ref().is_some_and(router)
            || workload
                .annotations
                .get("inject.istio.io/templates")
                .is_some_and(|t| t == "gateway")
            || workload.labels.contains_key("gateway.networking.k8s.io/gateway-name");
        workload
    }

    fn fill_world(&mut self) {
        for resource in &self.resources {
            if resource.group.is_empty() && resource.kind == "Service" {
                if let Ok(service) = serde_json::from_value::<core::Service>(resource.value.clone()) {
                    self.world.set_service(&service);
                }
            } else if resource.group == "discovery.k8s.io" && resource.kind == "EndpointSlice" {
                if let Ok(slice) = serde_json::from_value::<EndpointSlice>(resource.value.clone()) {
                    self.world.set_slice(&slice);
                }
            } else if let Some(kind) = Kind::by_name(&resource.kind)
                && kind.resource().0 == resource.group
            {
                self.world.set_config(kind, &resource.value);
            }
        }
        for workload in &self.workloads {
            let mut labels = workload.labels.clone();
            if workload.meshed {
                labels.entry(TLS_MODE_LABEL.into()).or_insert_with(|| "istio".into());
            }
            let status = self.resources[workload.resource]
                .value
                .get("status")
                .filter(|_| workload.kind == "Pod");
            let pod = json!({
                "metadata": {
                    "name": workload.name,
                    "namespace": workload.namespace,
                    "labels": labels,
                    "annotations": workload.annotations,
                },
                "spec": workload.spec,
                "status": status,
            });
            if let Ok(pod) = serde_json::from_value::<core::Pod>(pod) {
                self.world.set_pod(&pod);
            }
        }
    }
}

fn mesh_config(resources: &[Resource], root: &str) -> MeshConfig {
    let map = resources
        .iter()
        .find(|r| r.kind == "ConfigMap" && r.namespace == root && r.name == CONFIG_MAP);
    if let Some(text) = map.and_then(|r| r.value.pointer(&format!("/data/{CONFIG_KEY}"))?.as_str()) {
        return MeshConfig::read(text).map(|(config, _)| config).unwrap_or_default();
    }
    let operator = resources.iter().find(|r| r.kind == "IstioOperator");
    operator
        .and_then(|r| r.value.pointer("/spec/meshConfig"))
        .and_then(|v| MeshConfig::from_value(v.clone()).ok())
        .map(|(config, _)| config)
        .unwrap_or_default()
}

/// Namespace and object selectors of the injector's webhooks; those of a default installation when there are none.
fn injectors(resources: &[Resource]) -> Vec<(Value, Value)> {
    let installed: Vec<&Value> = resources
        .iter()
        .filter(|r| r.kind == "MutatingWebhookConfiguration" && is_injector(r))
        .map(|r| &r.value)
        .collect();
    let default = webhook::mutating(&WebhookOptions {
        revision: "",
        namespace: "istio-system",
        is_default: true,
        enable_namespaces_by_default: false,
        reinvocation_policy: "Never",
    });
    let objects = if installed.is_empty() {
        vec![&default]
    } else {
        installed
    };
    objects
        .into_iter()
        .filter_map(|object| object.get("webhooks")?.as_array())
        .flatten()
        .map(|webhook| {
            let selector = |key: &str| webhook.get(key).cloned().unwrap_or(Value::Null);
            (selector("namespaceSelector"), selector("objectSelector"))
        })
        .collect()
}

/// Whether a webhook object is an Istio injector's.
pub(super) fn is_injector(resource: &Resource) -> bool {
    resource.name.contains("istio-sidecar-injector")
        || resource.name.contains("istio-revision-tag")
        || resource.labels.get("app").is_some_and(|app| app == "sidecar-injector")
}

/// A Kubernetes label selector; an empty one matches everything.
pub(super) fn selector_matches(selector: &Value, labels: &BTreeMap<String, String>) -> bool {
    let pairs = strings(selector, "/matchLabels");
    let expressions = selector.get("matchExpressions").and_then(Value::as_array);
    mantlet_api::selector::subset(&pairs, labels)
        && expressions.into_iter().flatten().all(|expression| {
            let key = expression.get("key").and_then(Value::as_str).unwrap_or_default();
            let found = labels.get(key);
            let values = expression.get("values").and_then(Value::as_array);
            let is_in = found.is_some_and(|f| values.into_iter().flatten().any(|v| v.as_str() == Some(f)));
            match expression.get("operator").and_then(Value::as_str) {
                Some("In") => is_in,
                Some("NotIn") => !is_in,
                Some("Exists") => found.is_some(),
                Some("DoesNotExist") => found.is_none(),
                _ => false,
            }
        })
}
