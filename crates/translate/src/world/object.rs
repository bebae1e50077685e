//! Any object of a cluster or of a file, put into the world by its `apiVersion` and `kind`.
//!
//! Called by the command line for `-f FILE` and for what it lists itself; `control` knows the kinds of its watches and
//! calls the typed methods. What has pods but is no pod (a Deployment in a file) yields the pod that it would make.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use mantlet_api::MeshConfig;
use mantlet_api::mesh_config::{CONFIG_KEY, CONFIG_MAP};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::workload::TLS_MODE_LABEL;
use super::{Kind, World};
use crate::mesh::Mesh;

/// What an object was to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is part of the world now.
    Yes,
    /// Its kind says nothing to the mesh.
    No,
}

/// Why an object could not be taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{kind} {name}: {reason}")]
pub struct Unreadable {
    /// Its kind.
    pub kind: String,
    /// Its name, with the namespace if it has one.
    pub name: String,
    /// What is wrong.
    pub reason: String,
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn unreadable(object: &Value, reason: impl ToString) -> Unreadable {
    let (name, namespace) = (text(object, "/metadata/name"), text(object, "/metadata/namespace"));
    Unreadable {
        kind: text(object, "/kind").to_string(),
        name: match namespace {
            "" => name.to_string(),
            namespace => format!("{namespace}/{name}"),
        },
        reason: reason.to_string(),
    }
}

fn typed<T: DeserializeOwned>(object: &Value) -> Result<T, Unreadable> {
    serde_json::from_value(object.clone()).map_err(|e| unreadable(object, e))
}

/// The mesh settings that an object holds: ConfigMap `istio` (or `istio-REVISION`), an IstioOperator, or a bare mesh
/// configuration. `None` for everything else.
///
/// # Errors
/// The configuration cannot be read.
pub fn mesh_of(object: &Value) -> Option<Result<Mesh, Unreadable>> {
    let read = |config: Result<(MeshConfig, _), mantlet_api::diagnostic::Diagnostic>| match config {
        Ok((config, _findings)) => Ok(Mesh::from_config(&config)),
        Err(problem) => Err(unreadable(object, problem)),
    };
    let name = text(object, "/metadata/name");
    match text(object, "/kind") {
        "ConfigMap" if name == CONFIG_MAP || name.strip_prefix("istio-").is_some() => {
            let config = object.pointer("/data")?.get(CONFIG_KEY)?.as_str()?;
            Some(read(MeshConfig::read(config)))
        }
        "IstioOperator" => {
            let root = match text(object, "/spec/values/global/istioNamespace") {
                "" => match text(object, "/spec/namespace") {
                    "" => "istio-system",
                    namespace => namespace,
                },
                namespace => namespace,
            };
            let mut config = json!({ "rootNamespace": root });
            if let Some(domain) = object.pointer("/spec/values/global/trustDomain") {
                config["trustDomain"] = domain.clone();
            }
            for part in ["/spec/meshConfig", "/spec/values/meshConfig"] {
                for (key, value) in object.pointer(part).and_then(Value::as_object).into_iter().flatten() {
                    config[key] = value.clone();
                }
            }
            Some(read(MeshConfig::from_value(config)))
        }
        _ => None,
    }
}

/// The labels by which workloads of a kind find their pods, and the template of these.
fn template(object: &Value) -> Option<&Value> {
    let pointer = match text(object, "/kind") {
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "ReplicationController" | "Job" => "/spec/template",
        "CronJob" => "/spec/jobTemplate/spec/template",
        _ => return None,
    };
    object.pointer(pointer)
}

/// The pod that a Deployment, StatefulSet, DaemonSet, ReplicaSet, Job or CronJob would make, named as its maker; `None`
/// for other kinds and without a template.
pub fn pod_of(object: &Value) -> Option<Value> {
    let template = template(object)?;
    let mut pod = template.clone();
    pod["apiVersion"] = json!("v1");
    pod["kind"] = json!("Pod");
    let (name, namespace) = (text(object, "/metadata/name"), text(object, "/metadata/namespace"));
    if !pod["metadata"].is_object() {
        pod["metadata"] = json!({});
    }
    pod["metadata"]["name"] = json!(name);
    pod["metadata"]["namespace"] = json!(namespace);
    Some(pod)
}

/// Whether a pod of a file will have a sidecar, by its own label or annotation and its namespace's labels. Files of a
/// mesh often leave the Namespace out; then the pod is taken for part of the mesh.
fn will_be_injected(pod: &Value, namespace: Option<&Value>) -> bool {
    let own = |key: &str| {
        let labels = pod.pointer("/metadata/labels").and_then(|l| l.get(key));
        labels
            .or_else(|| pod.pointer("/metadata/annotations").and_then(|a| a.get(key)))
            .and_then(Value::as_str)
    };
    match own("sidecar.istio.io/inject") {
        Some("true") => return true,
        Some("false") => return false,
        _ => {}
    }
    if pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)) {
        return false;
    }
    let Some(namespace) = namespace else { return true };
    let label = |key: &str| {
        namespace
            .pointer("/metadata/labels")
            .and_then(|l| l.get(key))
            .and_then(Value::as_str)
    };
    label("istio-injection") == Some("enabled")
        || (label("istio-injection").is_none() && label("istio.io/rev").is_some())
}

impl World {
    /// A world of these objects; those without a namespace belong to `default_namespace`. Pods that no injector has
    /// seen count as part of the mesh if they will be. Problems are returned beside the world: an object that cannot be
    /// read is left out, but a policy never is (it denies).
    pub fn of_objects<'a>(
        objects: impl IntoIterator<Item = &'a Value>,
        default_namespace: &str,
    ) -> (World, Vec<Unreadable>) {
        let mut problems = Vec::new();
        let objects: Vec<Value> = objects
            .into_iter()
            .map(|object| {
                let mut object = object.clone();
                let cluster_wide = matches!(text(&object, "/kind"), "Namespace" | "IstioOperator");
                if !cluster_wide && text(&object, "/metadata/namespace").is_empty() && object["metadata"].is_object() {
                    object["metadata"]["namespace"] = json!(default_namespace);
                }
                object
            })
            .collect();
        let mut mesh = Mesh::default();
        for found in objects.iter().filter_map(mesh_of) {
            match found {
                Ok(found) => mesh = found,
                Err(problem) => problems.push(problem),
            }
        }
        let mut world = World::new(mesh);
        let namespaces: BTreeMap<&str, &Value> = objects
            .iter()
            .filter(|o| text(o, "/kind") == "Namespace")
            .map(|o| (text(o, "/metadata/name"), o))
            .collect();
        for object in &objects {
            let taken = if text(object, "/kind") == "Pod" {
                world.set_uninjected(object.clone(), &namespaces)
            } else {
                world.set_object(object)
            };
            problems.extend(taken.err());
        }
        // After the real ones: a Deployment whose pods are given needs none of ours.
        for object in &objects {
            let Some(pod) = pod_of(object) else { continue };
            let namespace = text(&pod, "/metadata/namespace").to_string();
            let selector: BTreeMap<String, String> = object
                .pointer("/spec/selector/matchLabels")
                .and_then(|s| serde_json::from_value(s.clone()).ok())
                .unwrap_or_default();
            let given = !selector.is_empty()
                && world
                    .pods(&namespace)
                    .any(|p| mantlet_api::selector::subset(&selector, &p.labels));
            if !given {
                problems.extend(world.set_uninjected(pod, &namespaces).err());
            }
        }
        (world, problems)
    }

    /// Adds or replaces any object. ConfigMaps and IstioOperators change the mesh settings.
    ///
    /// # Errors
    /// The object is of a kind that matters and cannot be read. Policies that cannot be read are taken, and deny.
    pub fn set_object(&mut self, object: &Value) -> Result<Taken, Unreadable> {
        let api_version = text(object, "/apiVersion");
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        match (group, text(object, "/kind")) {
            ("", "Service") => {
                self.set_service(&typed::<core::Service>(object)?);
            }
            ("", "Pod") => {
                self.set_pod(&typed::<core::Pod>(object)?);
            }
            ("discovery.k8s.io", "EndpointSlice") => {
                self.set_slice(&typed::<EndpointSlice>(object)?);
            }
            (group, kind) => {
                if let Some(kind) = Kind::by_name(kind).filter(|k| k.resource().0 == group) {
                    self.set_config(kind, object);
                    return Ok(Taken::Yes);
                }
                return match mesh_of(object) {
                    Some(mesh) => {
                        let mesh = mesh?;
                        self.set_mesh(mesh);
                        Ok(Taken::Yes)
                    }
                    None => Ok(Taken::No),
                };
            }
        }
        Ok(Taken::Yes)
    }

    fn set_uninjected(&mut self, mut pod: Value, namespaces: &BTreeMap<&str, &Value>) -> Result<Taken, Unreadable> {
        let namespace = text(&pod, "/metadata/namespace").to_string();
        let labelled = pod
            .pointer("/metadata/labels")
            .is_some_and(|l| l.get(TLS_MODE_LABEL).is_some());
        if !labelled && will_be_injected(&pod, namespaces.get(namespace.as_str()).copied()) {
            if !pod["metadata"]["labels"].is_object() {
                pod["metadata"]["labels"] = json!({});
            }
            pod["metadata"]["labels"][TLS_MODE_LABEL] = json!("istio");
        }
        self.set_object(&pod)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(name: &str) -> Value {
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
            "spec": {
                "selector": {"matchLabels": {"app": name}},
                "template": {
                    "metadata": {"labels": {"app": name}},
                    "spec": {"serviceAccountName": name, "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
                },
            },
        })
    }

    #[test]
    fn a_deployment_stands_for_its_pod_unless_the_pod_is_there() {
        let (world, problems) = World::of_objects(&[deployment("web")], "shop");
        assert_eq!(problems, []);
        let pod = world.pod("shop", "web").expect("made from the template");
        assert_eq!((pod.service_account.as_str(), pod.mtls), ("web", true));
        assert_eq!(pod.named_ports.get("http"), Some(&8080));

        let pod = json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "web-1", "namespace": "shop", "labels": {"app": "web"}}, "spec": {"containers": []}});
        let (world, _) = World::of_objects(&[deployment("web"), pod], "shop");
        assert!(world.pod("shop", "web").is_none());
        assert!(world.pod("shop", "web-1").is_some());
    }

    #[test]
    fn sidecars_come_where_the_namespace_or_the_pod_asks_for_them() {
        let namespace = |labels: Value| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": labels}});
        let mesh = |labels: Value, pod: Value| {
            let mut object = deployment("web");
            if !pod.is_null() {
                object["spec"]["template"]["metadata"]["labels"]["sidecar.istio.io/inject"] = pod;
            }
            let (world, _) = World::of_objects(&[namespace(labels), object], "shop");
            world.pod("shop", "web").map(|p| p.mtls)
        };
        assert_eq!(mesh(json!({}), Value::Null), Some(false));
        assert_eq!(mesh(json!({"istio-injection": "enabled"}), Value::Null), Some(true));
        assert_eq!(mesh(json!({"istio.io/rev": "x"}), Value::Null), Some(true));
        assert_eq!(mesh(json!({"istio-injection": "enabled"}), json!("false")), Some(false));
        assert_eq!(mesh(json!({}), json!("true")), Some(true));
    }

    #[test]
    fn mesh_settings_come_from_the_config_map_or_the_operator() {
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
            "data": {"mesh": "trustDomain: example.org\nrootNamespace: root\n"}});
        let (world, problems) = World::of_objects(&[map], "default");
        assert_eq!(problems, []);
        assert_eq!(
            (world.mesh().trust_domain.as_str(), world.mesh().root_namespace.as_str()),
            ("example.org", "root")
        );

        let operator = json!({"apiVersion": "install.istio.io/v1alpha1", "kind": "IstioOperator", "metadata": {"name": "x"},
            "spec": {"meshConfig": {"trustDomain": "a.b"}, "values": {"global": {"istioNamespace": "sys"}}}});
        let (world, _) = World::of_objects(&[operator], "default");
        assert_eq!(
            (world.mesh().trust_domain.as_str(), world.mesh().root_namespace.as_str()),
            ("a.b", "sys")
        );
    }

    #[test]
    fn what_cannot_be_read_is_told_and_a_policy_still_denies() {
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": 3}});
        let policy = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p"}, "spec": {"rules": 7}});
        let other = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}});
        let (world, problems) = World::of_objects(&[service, policy, other.clone()], "shop");
        assert_eq!(problems.len(), 1);
        assert!(
            problems[0].to_string().starts_with("Service shop/s: "),
            "{}",
            problems[0]
        );
        assert!(world.authorization_policies("shop")[0].broken.is_some());
        assert_eq!(World::default().set_object(&other), Ok(Taken::No));
    }
}
