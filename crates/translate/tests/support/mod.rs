//! Worlds from YAML, for the tests of this crate.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::collections::BTreeMap;

use mantlet_translate::mesh::Mesh;
use mantlet_translate::node::ProxyNode;
use mantlet_translate::world::{Kind, World};
use serde_json::{Value, json};

/// Reads objects into a world. A document `kind: MeshConfig` sets the mesh; `kind: Proxy` is left to the caller.
pub fn world(yaml: &str) -> World {
    let mut world = World::new(Mesh::default());
    for object in documents(yaml) {
        add(&mut world, &object);
    }
    world
}

/// The documents of a YAML text.
pub fn documents(yaml: &str) -> Vec<Value> {
    mantlet_api::yaml::read_all(yaml)
        .unwrap()
        .into_iter()
        .filter(|v| !v.is_null())
        .collect()
}

/// Adds one object.
pub fn add(world: &mut World, object: &Value) {
    let typed = || object.clone();
    let mut object = object.clone();
    if object["metadata"]["namespace"].is_null() && object["kind"] != "Namespace" {
        object["metadata"]["namespace"] = json!("default");
    }
    match object["kind"].as_str().unwrap() {
        "Service" => {
            world.set_service(&serde_json::from_value(object).unwrap());
        }
        "Pod" => {
            world.set_pod(&serde_json::from_value(object).unwrap());
        }
        "EndpointSlice" => {
            world.set_slice(&serde_json::from_value(object).unwrap());
        }
        "MeshConfig" => {
            let (config, _) = mantlet_api::MeshConfig::from_value(typed()["spec"].clone()).unwrap();
            world.set_mesh(Mesh::from_config(&config));
        }
        "Proxy" => {}
        kind => {
            let kind = Kind::by_name(kind).unwrap_or_else(|| panic!("kind {kind} is not known here"));
            world.set_config(kind, &object);
        }
    }
}

/// A sidecar of a pod.
pub fn sidecar(name: &str, namespace: &str, ip: &str, labels: &[(&str, &str)]) -> ProxyNode {
    node("sidecar", name, namespace, ip, labels)
}

/// A gateway.
pub fn router(name: &str, namespace: &str, ip: &str, labels: &[(&str, &str)]) -> ProxyNode {
    node("router", name, namespace, ip, labels)
}

fn node(kind: &str, name: &str, namespace: &str, ip: &str, labels: &[(&str, &str)]) -> ProxyNode {
    let labels: BTreeMap<&str, &str> = labels.iter().copied().collect();
    let id = format!("{kind}~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local");
    ProxyNode::parse(
        &id,
        &json!({"NAMESPACE": namespace, "LABELS": labels, "MANTLET": "true"}),
    )
    .unwrap()
}

/// A pod with a sidecar, its labels `app: NAME`, one container port per entry.
pub fn pod(name: &str, namespace: &str, ip: &str, tls: bool) -> Value {
    let mut labels = json!({"app": name});
    if tls {
        labels["security.istio.io/tlsMode"] = json!("istio");
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("{name}-1"), "namespace": namespace, "labels": labels},
        "spec": {"serviceAccountName": name, "containers": [{"name": "app", "image": "app"}]},
        "status": {"phase": "Running", "podIP": ip},
    })
}

/// A service of one port that selects `app: NAME`, with one ready endpoint.
pub fn service(name: &str, namespace: &str, vip: &str, port: (&str, u16, u16), ip: &str) -> [Value; 2] {
    let (port_name, number, target) = port;
    [
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"clusterIP": vip, "selector": {"app": name},
                     "ports": [{"name": port_name, "port": number, "targetPort": target}]},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-x"), "namespace": namespace,
                         "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": port_name, "port": target, "protocol": "TCP"}],
            "endpoints": [{"addresses": [ip], "conditions": {"ready": true},
                           "targetRef": {"kind": "Pod", "name": format!("{name}-1"), "namespace": namespace}}],
        }),
    ]
}
