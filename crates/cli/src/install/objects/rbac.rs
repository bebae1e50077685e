//! What the control plane may do. Kept to what it does: every rule says for what; a test holds the list (`goldens/rbac.yaml`).

use serde_json::{Value, json};

use super::super::spec::Spec;

/// Cluster-wide parts that all revisions share: the account and role for reading clusters from outside.
pub(super) fn base(spec: &Spec) -> Vec<Value> {
    let name = format!("istio-reader-clusterrole-{}", spec.namespace);
    vec![
        json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "name": "istio-reader-service-account", "namespace": spec.namespace, "labels": { "app": "istio-reader" } },
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": { "name": name, "labels": { "app": "istio-reader" } },
            "rules": [
                rule("", &["pods", "services", "namespaces", "nodes", "endpoints", "configmaps"], &["get", "list", "watch"]),
                rule("discovery.k8s.io", &["endpointslices"], &["get", "list", "watch"]),
                rule("networking.istio.io", &["workloadentries"], &["get", "list", "watch"]),
                rule("authentication.k8s.io", &["tokenreviews"], &["create"]),
                rule("authorization.k8s.io", &["subjectaccessreviews"], &["create"]),
            ],
        }),
        binding(
            "ClusterRoleBinding",
            "ClusterRole",
            &name,
            &name,
            None,
            &spec.namespace,
            "istio-reader-service-account",
        ),
    ]
}

/// The control plane's own.
pub(super) fn istiod(spec: &Spec) -> Vec<Value> {
    let namespace = &spec.namespace;
    let account = spec.name("istiod");
    let cluster_role = format!("{}-{namespace}", spec.name("istiod-clusterrole"));
    let groups = [
        "networking.istio.io",
        "security.istio.io",
        "telemetry.istio.io",
        "extensions.istio.io",
        "authentication.istio.io",
        "rbac.istio.io",
    ];
    vec![
        json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "name": account, "namespace": namespace, "labels": { "app": "istiod" } },
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": { "name": cluster_role, "labels": { "app": "istiod" } },
            "rules": [
                // The world that configuration is made of.
                rule("", &["pods", "services", "namespaces"], &["get", "list", "watch"]),
                rule("discovery.k8s.io", &["endpointslices"], &["get", "list", "watch"]),
                rules(&groups, &["*"], &["get", "list", "watch"]),
                // Conditions on the user's objects.
                rules(&groups, &["*/status"], &["patch"]),
                // The caBundle of its own webhooks.
                rule(
                    "admissionregistration.k8s.io",
                    &["mutatingwebhookconfigurations", "validatingwebhookconfigurations"],
                    &["get", "list", "watch", "patch"],
                ),
                // Who a caller is, and whether a gateway's account may read the credentials it asks for.
                rule("authentication.k8s.io", &["tokenreviews"], &["create"]),
                rule("authorization.k8s.io", &["subjectaccessreviews"], &["create"]),
                // The roots in every namespace.
                rule("", &["configmaps"], &["get", "list", "watch", "create", "update"]),
                // Credentials of gateways, which live in any namespace; handed out only after the access review.
                rule("", &["secrets"], &["list", "watch"]),
            ],
        }),
        binding(
            "ClusterRoleBinding",
            "ClusterRole",
            &cluster_role,
            &cluster_role,
            None,
            namespace,
            &account,
        ),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
            "metadata": { "name": account, "namespace": namespace, "labels": { "app": "istiod" } },
            "rules": [
                // The certificate authority's material.
                rule("", &["secrets"], &["get", "create", "update"]),
                // Mesh and injector configuration.
                rule("", &["configmaps"], &["get", "list", "watch"]),
            ],
        }),
        binding(
            "RoleBinding",
            "Role",
            &account,
            &account,
            Some(namespace),
            namespace,
            &account,
        ),
    ]
}

/// One rule.
pub(super) fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    rules(&[group], resources, verbs)
}

fn rules(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({ "apiGroups": groups, "resources": resources, "verbs": verbs })
}

/// A binding of a role to one service account.
pub(super) fn binding(
    kind: &str,
    role_kind: &str,
    name: &str,
    role: &str,
    namespace: Option<&str>,
    account_namespace: &str,
    account: &str,
) -> Value {
    let mut object = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": kind,
        "metadata": { "name": name },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": role_kind, "name": role },
        "subjects": [{ "kind": "ServiceAccount", "name": account, "namespace": account_namespace }],
    });
    if let Some(namespace) = namespace {
        object["metadata"]["namespace"] = json!(namespace);
    }
    object
}
