//! Gateways: Deployment with the proxy as its only container, Service, account, the right to read credentials.
//!
//! The pod is rendered here, by the injector's own `gateway` template, so that a gateway starts whether or not the webhook can be
//! reached. With `injectionTemplate: gateway` in its values the pod is left to the webhook instead.

use anyhow::{Context, Result};
use mantlet_translate::inject::{self, InjectConfig, Owner, PodRequest};
use serde_json::{Map, Value, json};

use super::super::spec::{Gateway, Spec};
use super::{istiod, rbac};

/// All objects of a gateway, in order.
pub(super) fn objects(spec: &Spec, gateway: &Gateway) -> Result<Vec<Value>> {
    let defaults = mantlet_api::values::GatewayValues::default();
    let key = if gateway.ingress {
        "istio-ingressgateway"
    } else {
        "istio-egressgateway"
    };
    // A further gateway takes the values of the built-in one of its direction where it has none of its own.
    let values = spec
        .values
        .gateways
        .get(&gateway.name)
        .or_else(|| spec.values.gateways.get(key))
        .unwrap_or(&defaults);
    let mut labels: Map<String, Value> = values.labels.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    if gateway.name != key {
        labels.insert("app".into(), json!(gateway.name));
        labels.insert("istio".into(), json!(gateway.name));
    }
    labels.extend(gateway.labels.clone());
    let account = format!("{}-service-account", gateway.name);
    let role = format!("{}-sds", gateway.name);
    let (name, namespace) = (&gateway.name, &gateway.namespace);
    let mut objects = Vec::new();
    if namespace != &spec.namespace {
        objects.push(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } }));
    }
    objects.push(json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": { "name": account, "namespace": namespace, "labels": labels },
    }));
    objects.push(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": { "name": role, "namespace": namespace },
        "rules": [rbac::rule("", &["secrets"], &["get", "watch", "list"])],
    }));
    objects.push(rbac::binding(
        "RoleBinding",
        "Role",
        &role,
        &role,
        Some(namespace),
        namespace,
        &account,
    ));
    objects.push(deployment(spec, gateway, values, &labels, &account)?);
    objects.push(service(gateway, values, &labels));
    if spec.values.global.default_pod_disruption_budget.enabled {
        objects.push(istiod::disruption_budget(
            name,
            namespace,
            &Value::Object(labels.clone()),
        ));
    }
    if values.autoscale_enabled.unwrap_or(true) {
        let (min, max) = (values.autoscale_min.unwrap_or(1), values.autoscale_max.unwrap_or(5));
        objects.push(istiod::autoscaler(name, namespace, min, max, 80));
    }
    Ok(objects)
}

fn service(gateway: &Gateway, values: &mantlet_api::values::GatewayValues, labels: &Map<String, Value>) -> Value {
    let mut object = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": gateway.name, "namespace": gateway.namespace, "labels": labels },
        "spec": {
            "type": if values.r#type.is_empty() { "ClusterIP" } else { &values.r#type },
            "selector": labels,
            "ports": values.ports,
        },
    });
    if !values.service_annotations.is_empty() {
        object["metadata"]["annotations"] = json!(values.service_annotations);
    }
    if !values.load_balancer_ip.is_empty() {
        object["spec"]["loadBalancerIP"] = json!(values.load_balancer_ip);
    }
    if !values.load_balancer_source_ranges.is_empty() {
        object["spec"]["loadBalancerSourceRanges"] = json!(values.load_balancer_source_ranges);
    }
    if !values.external_traffic_policy.is_empty() {
        object["spec"]["externalTrafficPolicy"] = json!(values.external_traffic_policy);
    }
    object
}

fn deployment(
    spec: &Spec,
    gateway: &Gateway,
    values: &mantlet_api::values::GatewayValues,
    labels: &Map<String, Value>,
    account: &str,
) -> Result<Value> {
    let left_to_webhook = values.injection_template == "gateway";
    let mut pod_labels = labels.clone();
    for (key, value) in [
        ("service.istio.io/canonical-name", gateway.name.as_str()),
        ("service.istio.io/canonical-revision", "latest"),
        ("istio.io/rev", spec.revision_label()),
        ("istio.io/dataplane-mode", "none"),
        (
            "sidecar.istio.io/inject",
            if left_to_webhook { "true" } else { "false" },
        ),
    ] {
        pod_labels.insert(key.into(), json!(value));
    }
    let mut annotations = json!({});
    for (key, value) in &values.pod_annotations {
        annotations[key.as_str()] = json!(value);
    }
    annotations["inject.istio.io/templates"] = json!("gateway");
    let ports: Vec<Value> = values
        .ports
        .iter()
        .map(|port| {
            let number = port.get("targetPort").filter(|t| t.is_u64()).or_else(|| port.get("port")).cloned().unwrap_or_default();
            json!({ "containerPort": number, "protocol": port.get("protocol").cloned().unwrap_or_else(|| json!("TCP")) })
        })
        .collect();
    let env: Vec<Value> = std::iter::once(("ISTIO_META_UNPRIVILEGED_POD".to_string(), "true".to_string()))
        .chain(
            values
                .env
                .iter()
                .map(|(name, value)| (name.clone(), istiod::scalar(value))),
        )
        .map(|(name, value)| json!({ "name": name, "value": value }))
        .collect();
    let mut container = json!({ "name": "istio-proxy", "image": "auto", "ports": ports, "env": env });
    if let Some(resources) = &values.resources {
        container["resources"] = resources.clone();
    }
    let mut pod = json!({
        "metadata": { "labels": pod_labels, "annotations": annotations },
        "spec": { "serviceAccountName": account, "containers": [container] },
    });
    if !left_to_webhook {
        pod = render(spec, gateway, pod)?;
    }
    istiod::pod_settings(spec, &values.node_selector, &mut pod["spec"]);
    let mut object = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": gateway.name, "namespace": gateway.namespace, "labels": labels },
        "spec": {
            "strategy": { "rollingUpdate": { "maxSurge": "100%", "maxUnavailable": "25%" } },
            "selector": { "matchLabels": labels },
            "template": pod,
        },
    });
    if !values.autoscale_enabled.unwrap_or(true) {
        object["spec"]["replicas"] = json!(1);
    }
    Ok(object)
}

/// Fills the pod in as the webhook would, then takes off what only the webhook needs.
fn render(spec: &Spec, gateway: &Gateway, pod: Value) -> Result<Value> {
    let config = InjectConfig {
        proxy_defaults: spec.mesh.get("defaultConfig").cloned().unwrap_or_else(|| json!({})),
        mesh: spec.mesh_config.clone(),
        values: spec.values.clone(),
        revision: spec.revision.clone(),
        ..InjectConfig::default()
    };
    let request = PodRequest {
        namespace: &gateway.namespace,
        owner: Some(Owner {
            name: gateway.name.clone(),
            namespace: gateway.namespace.clone(),
            kind: "Deployment".into(),
            api_version: "apps/v1".into(),
        }),
        ..PodRequest::default()
    };
    let (mut pod, _) =
        inject::apply(pod, &request, &config).with_context(|| format!("rendering the pod of {}", gateway.name))?;
    if let Some(annotations) = pod.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        for key in [
            inject::STATUS_ANNOTATION,
            inject::OVERRIDES_ANNOTATION,
            "inject.istio.io/templates",
        ] {
            annotations.shift_remove(key);
        }
    }
    Ok(pod)
}
