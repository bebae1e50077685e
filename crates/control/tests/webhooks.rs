//! Webhooks as the API server calls them: verified by the CA bundle that the control plane writes, failing closed without it.

mod support;

use base64::Engine;
use mantlet_identity::{CaMaterial, SelfSignedOptions};
use mantlet_testkit::eventually;
use serde_json::{Value, json};
use support::{Cluster, PATIENCE};

fn configurations() -> [Value; 2] {
    let client =
        |path: &str| json!({"service": {"name": "istiod", "namespace": "istio-system", "path": path, "port": 443}});
    [
        json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": "istio-sidecar-injector"},
            "webhooks": [{"name": "namespace.sidecar-injector.istio.io", "clientConfig": client("/inject"),
                "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}],
                "namespaceSelector": {"matchLabels": {"istio-injection": "enabled"}},
                "failurePolicy": "Fail", "sideEffects": "None", "admissionReviewVersions": ["v1"]}]}),
        json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": "istio-validator-istio-system"},
            "webhooks": [{"name": "validation.istio.io", "clientConfig": client("/validate"),
                "rules": [{"operations": ["CREATE", "UPDATE"], "apiGroups": ["security.istio.io", "networking.istio.io"],
                    "apiVersions": ["*"], "resources": ["*"]}],
                "failurePolicy": "Ignore", "sideEffects": "None", "admissionReviewVersions": ["v1"]}]}),
    ]
}

async fn prepared() -> Cluster {
    let cluster = Cluster::new().await;
    for object in [
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "istiod", "namespace": "istio-system"},
            "spec": {"ports": [{"name": "https-webhook", "port": 443, "targetPort": 15017}], "selector": {"app": "istiod"}}}),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "istiod-x", "namespace": "istio-system", "labels": {"kubernetes.io/service-name": "istiod"}},
            "ports": [{"name": "https-webhook", "port": 15017, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.0.0.2"], "conditions": {"ready": true}}]}),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio-sidecar-injector", "namespace": "istio-system"},
            "data": {"config": "policy: enabled\n", "values": "{}"}}),
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mesh", "labels": {"istio-injection": "enabled"}}}),
    ] {
        cluster.apply(&object).await;
    }
    cluster.token("mesh", "default").await;
    for object in configurations() {
        cluster.apply(&object).await;
    }
    cluster
}

fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "mesh"},
        "spec": {"containers": [{"name": "app", "image": "app"}]}})
}

async fn bundle(cluster: &Cluster, object: &Value) -> Option<String> {
    let current = cluster.get(object).await?;
    current
        .pointer("/webhooks/0/clientConfig/caBundle")?
        .as_str()
        .map(str::to_string)
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_injected_through_the_api_server_and_refused_without_the_control_plane() {
    let cluster = prepared().await;
    let [mutating, _] = configurations();
    let refused = cluster.try_apply(&pod("early")).await.unwrap_err().to_string();
    assert!(refused.contains("namespace.sidecar-injector.istio.io"), "{refused}");

    let control = cluster.start().await;
    eventually("the CA bundle", PATIENCE, || bundle(&cluster, &mutating)).await;
    let created = eventually("injection", PATIENCE, || async {
        cluster.try_apply(&pod("web")).await.ok()
    })
    .await;
    let created = serde_json::to_value(created).unwrap();
    let containers = created.pointer("/spec/containers").unwrap().as_array().unwrap();
    let names: Vec<&str> = containers.iter().filter_map(|c| c["name"].as_str()).collect();
    assert_eq!(names, ["app", "istio-proxy"]);

    control.stop().await;
    let refused = cluster.try_apply(&pod("late")).await.unwrap_err().to_string();
    assert!(refused.contains("namespace.sidecar-injector.istio.io"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ca_bundle_is_healed_and_validation_fails_closed() {
    let cluster = prepared().await;
    let control = cluster.start().await;
    let [mutating, validating] = configurations();
    let written = eventually("the CA bundle", PATIENCE, || bundle(&cluster, &mutating)).await;
    let mut damaged = mutating.clone();
    let foreign = CaMaterial::self_signed(
        &SelfSignedOptions::new("somebody else"),
        time::OffsetDateTime::now_utc(),
        mantlet_identity::Serial::from_random([9; 16]),
    )
    .unwrap();
    let foreign = base64::engine::general_purpose::STANDARD.encode(foreign.certificate_pem());
    assert_ne!(foreign, written);
    damaged["webhooks"][0]["clientConfig"]["caBundle"] = json!(foreign);
    cluster.apply(&damaged).await;
    eventually("healing", PATIENCE, || async {
        (bundle(&cluster, &mutating).await? == written).then_some(())
    })
    .await;
    eventually("failurePolicy Fail", PATIENCE, || async {
        let current = cluster.get(&validating).await?;
        (current.pointer("/webhooks/0/failurePolicy")? == "Fail").then_some(())
    })
    .await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_policies_are_refused_with_istios_text() {
    let cluster = prepared().await;
    let control = cluster.start().await;
    let [_, validating] = configurations();
    eventually("the CA bundle", PATIENCE, || bundle(&cluster, &validating)).await;
    let bad = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "bad", "namespace": "foo"}, "spec": {"action": "DENY"}});
    let refused = cluster.try_apply(&bad).await.unwrap_err().to_string();
    assert!(
        refused.contains("admission webhook \"validation.istio.io\" denied the request: configuration is invalid: "),
        "{refused}"
    );
    let good = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "good", "namespace": "foo"}, "spec": {}});
    cluster.apply(&good).await;
    control.stop().await;
}
