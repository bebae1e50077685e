//! The webhook objects: which pods the API server sends to the injector, and which objects to validation (SEMANTICS 5a, 8a).
//!
//! Here and not with the installer, because the selectors are half of the injection decision and are tested with it; the caBundle is
//! left empty, `mantletd` patches it in at run time.

use serde_json::{Value, json};

use super::IGNORED_NAMESPACES;
use mantlet_api::names::with_revision;

/// What the mutating webhook depends on.
#[derive(Debug, Clone, Copy)]
pub struct WebhookOptions<'a> {
    /// Revision; empty is `default`.
    pub revision: &'a str,
    /// Namespace of the control plane.
    pub namespace: &'a str,
    /// Whether this revision serves namespaces and pods that name none.
    pub is_default: bool,
    /// Whether namespaces without any label are injected.
    pub enable_namespaces_by_default: bool,
    /// `Never` or `IfNeeded`.
    pub reinvocation_policy: &'a str,
}

/// MutatingWebhookConfiguration `istio-sidecar-injector[-<revision>]`.
pub fn mutating(options: &WebhookOptions<'_>) -> Value {
    let revision = if options.revision.is_empty() {
        "default"
    } else {
        options.revision
    };
    let expression = |key: &str, operator: &str, values: &[&str]| {
        let mut e = json!({ "key": key, "operator": operator });
        if !values.is_empty() {
            e["values"] = json!(values);
        }
        e
    };
    let rev_is = || expression("istio.io/rev", "In", &[revision]);
    let no_rev = || expression("istio.io/rev", "DoesNotExist", &[]);
    let no_label = || expression("istio-injection", "DoesNotExist", &[]);
    let not_false = || expression("sidecar.istio.io/inject", "NotIn", &["false"]);
    let mut entries = vec![
        ("rev.namespace", vec![rev_is(), no_label()], vec![not_false()]),
        ("rev.object", vec![no_rev(), no_label()], vec![not_false(), rev_is()]),
    ];
    if options.is_default {
        entries.push((
            "namespace",
            vec![expression("istio-injection", "In", &["enabled"])],
            vec![not_false()],
        ));
        entries.push((
            "object",
            vec![no_label(), no_rev()],
            vec![expression("sidecar.istio.io/inject", "In", &["true"]), no_rev()],
        ));
        if options.enable_namespaces_by_default {
            entries.push((
                "auto",
                vec![
                    no_label(),
                    no_rev(),
                    expression("kubernetes.io/metadata.name", "NotIn", &IGNORED_NAMESPACES),
                ],
                vec![expression("sidecar.istio.io/inject", "DoesNotExist", &[]), no_rev()],
            ));
        }
    }
    let webhooks: Vec<Value> = entries
        .into_iter()
        .map(|(name, namespace, object)| {
            json!({
                "name": format!("{name}.sidecar-injector.istio.io"),
                "clientConfig": { "service": {
                    "name": with_revision("istiod", options.revision),
                    "namespace": options.namespace,
                    "path": "/inject",
                    "port": 443,
                } },
                "sideEffects": "None",
                "rules": [{
                    "operations": ["CREATE"],
                    "apiGroups": [""],
                    "apiVersions": ["v1"],
                    "resources": ["pods"],
                }],
                "failurePolicy": "Fail",
                "reinvocationPolicy": options.reinvocation_policy,
                "admissionReviewVersions": ["v1"],
                "namespaceSelector": { "matchExpressions": namespace },
                "objectSelector": { "matchExpressions": object },
            })
        })
        .collect();
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {
            "name": super::decide::webhook_name(options.revision),
            "labels": {
                "app": "sidecar-injector",
                "istio.io/rev": revision,
                "install.operator.istio.io/owning-resource": "unknown",
                "operator.istio.io/component": "Pilot",
                "release": "istio",
            },
        },
        "webhooks": webhooks,
    })
}

/// ValidatingWebhookConfiguration `istio-validator[-<revision>]-<namespace>`. Starts with failurePolicy Ignore; `mantletd` switches it to
/// Fail once it has seen the webhook work (S8.2).
pub fn validating(revision: &str, namespace: &str) -> Value {
    let name = if revision.is_empty() || revision == "default" {
        format!("istio-validator-{namespace}")
    } else {
        format!("istio-validator-{revision}-{namespace}")
    };
    let rev = if revision.is_empty() { "default" } else { revision };
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {
            "name": name,
            "labels": { "app": "istiod", "release": "istio", "istio": "istiod", "istio.io/rev": rev },
        },
        "webhooks": [{
            "name": "rev.validation.istio.io",
            "clientConfig": { "service": {
                "name": with_revision("istiod", revision),
                "namespace": namespace,
                "path": "/validate",
                "port": 443,
            } },
            "rules": [{
                "operations": ["CREATE", "UPDATE"],
                "apiGroups": [
                    "security.istio.io", "networking.istio.io", "telemetry.istio.io", "extensions.istio.io",
                    "authentication.istio.io", "rbac.istio.io"
                ],
                "apiVersions": ["*"],
                "resources": ["*"],
            }],
            "failurePolicy": "Ignore",
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
            "objectSelector": { "matchExpressions": [{ "key": "istio.io/rev", "operator": "In", "values": [rev] }] },
        }],
    })
}

/// ValidatingWebhookConfiguration `istiod-default-validator`: objects that name no revision.
pub fn validating_default(revision: &str, namespace: &str) -> Value {
    let mut object = validating(revision, namespace);
    let rev = if revision.is_empty() { "default" } else { revision };
    object["metadata"]["name"] = json!("istiod-default-validator");
    object["metadata"]["labels"] = json!({ "app": "istiod", "release": "istio", "istio": "istiod", "istio.io/rev": rev, "istio.io/tag": "default" });
    object["webhooks"][0]["name"] = json!("validation.istio.io");
    object["webhooks"][0]["objectSelector"] =
        json!({ "matchExpressions": [{ "key": "istio.io/rev", "operator": "DoesNotExist" }] });
    object
}
