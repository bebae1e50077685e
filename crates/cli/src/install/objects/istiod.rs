//! The control plane: configuration, Service, Deployment, webhooks.

use anyhow::Result;
use mantlet_api::yaml;
use mantlet_translate::inject::webhook::{self, WebhookOptions};
use serde_json::{Map, Value, json};

use super::super::spec::Spec;
use super::rbac;

/// All objects of the component, in order.
pub(super) fn objects(spec: &Spec) -> Result<Vec<Value>> {
    let mut objects = rbac::istiod(spec);
    objects.push(mesh_config_map(spec));
    objects.push(injector_config_map(spec));
    objects.push(service(spec));
    objects.push(deployment(spec));
    if spec.values.global.default_pod_disruption_budget.enabled {
        objects.push(disruption_budget(
            &spec.name("istiod"),
            &spec.namespace,
            &pod_selector(spec),
        ));
    }
    if spec.values.pilot.autoscale_enabled {
        let pilot = &spec.values.pilot;
        objects.push(autoscaler(
            &spec.name("istiod"),
            &spec.namespace,
            pilot.autoscale_min,
            pilot.autoscale_max,
            pilot.cpu.target_average_utilization,
        ));
    }
    let webhook = &spec.values.sidecar_injector_webhook;
    objects.push(webhook::mutating(&WebhookOptions {
        revision: &spec.revision,
        namespace: &spec.namespace,
        is_default: spec.is_default,
        enable_namespaces_by_default: webhook.enable_namespaces_by_default,
        reinvocation_policy: &webhook.reinvocation_policy,
    }));
    if spec.values.global.config_validation {
        objects.push(webhook::validating(&spec.revision, &spec.namespace));
        if spec.is_default {
            objects.push(webhook::validating_default(&spec.revision, &spec.namespace));
        }
    }
    Ok(objects)
}

fn pod_selector(spec: &Spec) -> Value {
    let mut labels = json!({ "app": "istiod", "istio": "pilot" });
    if !spec.revision.is_empty() {
        labels["istio.io/rev"] = json!(spec.revision);
    }
    labels
}

fn mesh_config_map(spec: &Spec) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": spec.name("istio"), "namespace": spec.namespace },
        "data": { "mesh": yaml::write(&spec.mesh), "meshNetworks": "networks: {}\n" },
    })
}

fn injector_config_map(spec: &Spec) -> Value {
    let webhook = &spec.values.sidecar_injector_webhook;
    let config = json!({
        "policy": spec.values.global.proxy.auto_inject,
        "alwaysInjectSelector": webhook.always_inject_selector,
        "neverInjectSelector": webhook.never_inject_selector,
        "injectedAnnotations": webhook.injected_annotations,
        "defaultTemplates": if webhook.default_templates.is_empty() { json!(["sidecar"]) } else { json!(webhook.default_templates) },
    });
    let mut values = spec.raw_values.clone();
    // The image that is injected follows what was installed, also when neither hub nor tag was said.
    values["global"]["hub"] = json!(spec.values.global.hub);
    values["global"]["tag"] = json!(spec.values.global.tag);
    values["revision"] = json!(spec.revision);
    let text = serde_json::to_string_pretty(&values).unwrap_or_default();
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": spec.name("istio-sidecar-injector"), "namespace": spec.namespace },
        "data": { "config": yaml::write(&config), "values": text },
    })
}

fn service(spec: &Spec) -> Value {
    let port = |name: &str, port: u16, target: Option<u16>| {
        let mut p = json!({ "name": name, "port": port, "protocol": "TCP" });
        if let Some(target) = target {
            p["targetPort"] = json!(target);
        }
        p
    };
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": spec.name("istiod"), "namespace": spec.namespace,
            "labels": { "app": "istiod", "istio": "pilot" },
        },
        "spec": {
            "ports": [
                port("grpc-xds", 15010, None),
                port("https-dns", 15012, None),
                port("https-webhook", 443, Some(15017)),
                port("http-monitoring", 15014, None),
            ],
            "selector": pod_selector(spec),
        },
    })
}

fn deployment(spec: &Spec) -> Value {
    let values = &spec.values;
    let pilot = &values.pilot;
    let mut labels = json!({
        "app": "istiod", "istio": "pilot", "istio.io/rev": spec.revision_label(),
        "istio.io/dataplane-mode": "none", "operator.istio.io/component": "Pilot",
        "sidecar.istio.io/inject": "false",
    });
    for (key, value) in &pilot.pod_labels {
        labels[key.as_str()] = json!(value);
    }
    let mut annotations = json!({
        "prometheus.io/port": "15014", "prometheus.io/scrape": "true", "sidecar.istio.io/inject": "false",
    });
    for (key, value) in &pilot.pod_annotations {
        annotations[key.as_str()] = json!(value);
    }
    let mut args = vec![
        json!("discovery"),
        json!("--monitoringAddr=0.0.0.0:15014"),
        json!(format!("--log_output_level={}", values.global.logging.level)),
        json!("--domain"),
        json!(values.global.proxy.cluster_domain),
        json!("--keepaliveMaxServerConnectionAge"),
        json!(pilot.keepalive_max_server_connection_age),
    ];
    if values.global.log_as_json {
        args.push(json!("--log_as_json"));
    }
    let mut container = json!({
        "name": "discovery",
        "image": values.image(&pilot.image, &pilot.hub, &pilot.tag),
        "args": args,
        "ports": [
            { "containerPort": 8080, "protocol": "TCP", "name": "http-debug" },
            { "containerPort": 15010, "protocol": "TCP", "name": "grpc-xds" },
            { "containerPort": 15012, "protocol": "TCP", "name": "tls-xds" },
            { "containerPort": 15017, "protocol": "TCP", "name": "https-webhooks" },
            { "containerPort": 15014, "protocol": "TCP", "name": "http-monitoring" },
        ],
        "readinessProbe": {
            "httpGet": { "path": "/ready", "port": 8080 },
            "initialDelaySeconds": 1, "periodSeconds": 3, "timeoutSeconds": 5,
        },
        "env": env(spec),
        "resources": pilot.resources.clone().unwrap_or_else(|| json!({})),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsGroup": 1337, "runAsNonRoot": true, "runAsUser": 1337,
        },
        "volumeMounts": [
            { "name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": true },
            { "name": "local-certs", "mountPath": "/var/run/secrets/istio-dns" },
            { "name": "cacerts", "mountPath": "/etc/cacerts", "readOnly": true },
        ],
    });
    if !values.global.image_pull_policy.is_empty() {
        container["imagePullPolicy"] = json!(values.global.image_pull_policy);
    }
    let mut pod = json!({
        "serviceAccountName": spec.name("istiod"),
        // Lets the process of uid 1337 read the projected token.
        "securityContext": { "fsGroup": 1337 },
        "containers": [container],
        "volumes": [
            { "name": "local-certs", "emptyDir": { "medium": "Memory" } },
            { "name": "istio-token", "projected": { "sources": [
                { "serviceAccountToken": { "audience": values.global.sds.token.aud, "expirationSeconds": 43200, "path": "istio-token" } },
            ] } },
            { "name": "cacerts", "secret": { "secretName": "cacerts", "optional": true } },
        ],
    });
    pod_settings(spec, &pilot.node_selector, &mut pod);
    let mut deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {
            "name": spec.name("istiod"), "namespace": spec.namespace,
            "labels": { "app": "istiod", "istio": "pilot" },
        },
        "spec": {
            "strategy": { "rollingUpdate": {
                "maxSurge": pilot.rolling_max_surge, "maxUnavailable": pilot.rolling_max_unavailable,
            } },
            "selector": { "matchLabels": pod_selector(spec) },
            "template": { "metadata": { "labels": labels, "annotations": annotations }, "spec": pod },
        },
    });
    // With an autoscaler the number of replicas is its own.
    if !pilot.autoscale_enabled {
        deployment["spec"]["replicas"] = json!(pilot.replica_count.unwrap_or(1));
    }
    deployment
}

/// Settings all our pods share.
pub(super) fn pod_settings(spec: &Spec, node_selector: &std::collections::BTreeMap<String, String>, pod: &mut Value) {
    let global = &spec.values.global;
    if !global.image_pull_secrets.is_empty() {
        pod["imagePullSecrets"] = global
            .image_pull_secrets
            .iter()
            .map(|name| json!({ "name": name }))
            .collect();
    }
    if !global.priority_class_name.is_empty() {
        pod["priorityClassName"] = json!(global.priority_class_name);
    }
    let selector = if node_selector.is_empty() {
        &global.default_node_selector
    } else {
        node_selector
    };
    if !selector.is_empty() {
        pod["nodeSelector"] = json!(selector);
    }
}

fn env(spec: &Spec) -> Value {
    let values = &spec.values;
    let literal = |name: &str, value: &str| json!({ "name": name, "value": value });
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": path } } });
    let mut env = vec![
        literal("REVISION", spec.revision_label()),
        literal("PILOT_CERT_PROVIDER", &values.global.pilot_cert_provider),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        literal("PILOT_TRACE_SAMPLING", &values.pilot.trace_sampling.to_string()),
        literal("CLUSTER_ID", &values.global.multi_cluster.cluster_name),
        literal("PLATFORM", &values.global.platform),
    ];
    for (name, value) in &values.pilot.env {
        let text = scalar(value);
        match env.iter_mut().find(|e| e["name"] == name.as_str()) {
            Some(existing) => *existing = literal(name, &text),
            None => env.push(literal(name, &text)),
        }
    }
    Value::Array(env)
}

/// Environment values are texts, however they were written.
pub(super) fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// PodDisruptionBudget that keeps one pod.
pub(super) fn disruption_budget(name: &str, namespace: &str, selector: &Value) -> Value {
    json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": { "name": name, "namespace": namespace, "labels": labels_of(selector) },
        "spec": { "minAvailable": 1, "selector": { "matchLabels": selector } },
    })
}

/// HorizontalPodAutoscaler by CPU.
pub(super) fn autoscaler(name: &str, namespace: &str, min: u32, max: u32, utilization: u32) -> Value {
    json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": { "name": name, "namespace": namespace, "labels": { "app": name } },
        "spec": {
            "maxReplicas": max, "minReplicas": min,
            "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": name },
            "metrics": [{ "type": "Resource", "resource": {
                "name": "cpu", "target": { "type": "Utilization", "averageUtilization": utilization },
            } }],
        },
    })
}

fn labels_of(selector: &Value) -> Map<String, Value> {
    selector.as_object().cloned().unwrap_or_default()
}
