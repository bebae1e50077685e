//! What a new cluster holds: namespaces, default roles and bindings, the `kubernetes` Service and its endpoints.
//!
//! Run at every start; creates what is missing and brings the default roles up to date, touches nothing else.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::meta;
use crate::names::new_uid;
use crate::server::{ApiServer, OpenError};
use crate::store::{Store, StoreError, Txn};

const READ: &[&str] = &["get", "list", "watch"];
const WRITE: &[&str] = &["create", "delete", "deletecollection", "patch", "update"];

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": groups, "resources": resources, "verbs": verbs})
}

fn urls(paths: &[&str]) -> Value {
    json!({"nonResourceURLs": paths, "verbs": ["get"]})
}

const CORE_VIEW: &[&str] = &[
    "bindings",
    "configmaps",
    "endpoints",
    "events",
    "limitranges",
    "namespaces",
    "namespaces/status",
    "persistentvolumeclaims",
    "persistentvolumeclaims/status",
    "pods",
    "pods/log",
    "pods/status",
    "replicationcontrollers",
    "replicationcontrollers/scale",
    "replicationcontrollers/status",
    "resourcequotas",
    "resourcequotas/status",
    "serviceaccounts",
    "services",
    "services/status",
];
const CORE_EDIT: &[&str] = &[
    "configmaps",
    "events",
    "persistentvolumeclaims",
    "pods",
    "pods/attach",
    "pods/exec",
    "pods/portforward",
    "pods/proxy",
    "replicationcontrollers",
    "replicationcontrollers/scale",
    "secrets",
    "serviceaccounts",
    "services",
    "services/proxy",
];
const APPS: &[&str] = &[
    "controllerrevisions",
    "daemonsets",
    "deployments",
    "deployments/rollback",
    "deployments/scale",
    "replicasets",
    "replicasets/scale",
    "statefulsets",
    "statefulsets/scale",
];

/// Default cluster roles: name, labels, rules or aggregation.
fn cluster_roles() -> Vec<(&'static str, Value, Value)> {
    let aggregate = |label: &str| json!({"clusterRoleSelectors": [{"matchLabels": {label: "true"}}]});
    let to = |role: &str| format!("rbac.authorization.k8s.io/aggregate-to-{role}");
    let both = |a: &[&str], b: &[&str]| a.iter().chain(b).map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let read_write = both(READ, WRITE);
    let rw: Vec<&str> = read_write.iter().map(String::as_str).collect();
    vec![
        (
            "cluster-admin",
            json!({}),
            json!({"rules": [rule(&["*"], &["*"], &["*"]), {"nonResourceURLs": ["*"], "verbs": ["*"]}]}),
        ),
        ("admin", json!({}), json!({"aggregationRule": aggregate(&to("admin"))})),
        (
            "edit",
            json!({to("admin"): "true"}),
            json!({"aggregationRule": aggregate(&to("edit"))}),
        ),
        (
            "view",
            json!({to("edit"): "true"}),
            json!({"aggregationRule": aggregate(&to("view"))}),
        ),
        (
            "system:aggregate-to-admin",
            json!({to("admin"): "true"}),
            json!({"rules": [
                rule(&["authorization.k8s.io"], &["localsubjectaccessreviews"], &["create"]),
                rule(&["rbac.authorization.k8s.io"], &["rolebindings", "roles"], &rw),
            ]}),
        ),
        (
            "system:aggregate-to-edit",
            json!({to("edit"): "true"}),
            json!({"rules": [
                rule(&[""], &["pods/attach", "pods/exec", "pods/portforward", "pods/proxy", "secrets", "services/proxy"], READ),
                rule(&[""], &["serviceaccounts"], &["impersonate"]),
                rule(&[""], CORE_EDIT, WRITE),
                rule(&[""], &["pods/eviction", "serviceaccounts/token"], &["create"]),
                rule(&["apps"], APPS, WRITE),
                rule(&["autoscaling"], &["horizontalpodautoscalers"], WRITE),
                rule(&["batch"], &["cronjobs", "jobs"], WRITE),
                rule(&["networking.k8s.io"], &["ingresses", "networkpolicies"], WRITE),
                rule(&["policy"], &["poddisruptionbudgets"], WRITE),
                rule(&["coordination.k8s.io"], &["leases"], &rw),
            ]}),
        ),
        (
            "system:aggregate-to-view",
            json!({to("view"): "true"}),
            json!({"rules": [
                rule(&[""], CORE_VIEW, READ),
                rule(&["discovery.k8s.io"], &["endpointslices"], READ),
                rule(&["apps"], APPS, READ),
                rule(&["apps"], &["daemonsets/status", "deployments/status", "replicasets/status", "statefulsets/status"], READ),
                rule(&["autoscaling"], &["horizontalpodautoscalers", "horizontalpodautoscalers/status"], READ),
                rule(&["batch"], &["cronjobs", "cronjobs/status", "jobs", "jobs/status"], READ),
                rule(&["networking.k8s.io"], &["ingresses", "ingresses/status", "networkpolicies"], READ),
                rule(&["policy"], &["poddisruptionbudgets", "poddisruptionbudgets/status"], READ),
            ]}),
        ),
        (
            "system:basic-user",
            json!({}),
            json!({"rules": [
                rule(&["authorization.k8s.io"], &["selfsubjectaccessreviews", "selfsubjectrulesreviews"], &["create"]),
                rule(&["authentication.k8s.io"], &["selfsubjectreviews"], &["create"]),
            ]}),
        ),
        (
            "system:discovery",
            json!({}),
            json!({"rules": [
                urls(&["/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi", "/openapi/*", "/readyz", "/version", "/version/"]),
            ]}),
        ),
        (
            "system:public-info-viewer",
            json!({}),
            json!({"rules": [urls(&["/healthz", "/livez", "/readyz", "/version", "/version/"])]}),
        ),
        (
            "system:service-account-issuer-discovery",
            json!({}),
            json!({"rules": [
                urls(&["/.well-known/openid-configuration", "/.well-known/openid-configuration/", "/openid/v1/jwks", "/openid/v1/jwks/"]),
            ]}),
        ),
        (
            "system:auth-delegator",
            json!({}),
            json!({"rules": [
                rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
                rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
            ]}),
        ),
        (
            "system:node",
            json!({}),
            json!({"rules": [
                rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
                rule(&["authorization.k8s.io"], &["localsubjectaccessreviews", "subjectaccessreviews"], &["create"]),
                rule(&[""], &["services"], READ),
                rule(&[""], &["nodes"], &["create", "get", "list", "watch", "patch", "update"]),
                rule(&[""], &["nodes/status", "pods/status"], &["patch", "update"]),
                rule(&[""], &["events"], &["create", "patch", "update"]),
                rule(&[""], &["pods"], &["create", "delete", "get", "list", "watch"]),
                rule(&[""], &["pods/eviction", "serviceaccounts/token"], &["create"]),
                rule(&[""], &["configmaps", "secrets", "serviceaccounts"], READ),
                rule(&["coordination.k8s.io"], &["leases"], &["create", "delete", "get", "patch", "update"]),
            ]}),
        ),
        (
            "system:kube-dns",
            json!({}),
            json!({"rules": [
                rule(&[""], &["endpoints", "services"], &["list", "watch"]),
                rule(&["discovery.k8s.io"], &["endpointslices"], &["list", "watch"]),
            ]}),
        ),
    ]
}

fn bindings() -> Vec<(&'static str, &'static str, &'static [&'static str])> {
    vec![
        ("cluster-admin", "cluster-admin", &["system:masters"]),
        ("system:basic-user", "system:basic-user", &["system:authenticated"]),
        ("system:discovery", "system:discovery", &["system:authenticated"]),
        (
            "system:public-info-viewer",
            "system:public-info-viewer",
            &["system:authenticated", "system:unauthenticated"],
        ),
        (
            "system:service-account-issuer-discovery",
            "system:service-account-issuer-discovery",
            &["system:serviceaccounts"],
        ),
    ]
}

const RBAC: &str = "rbac.authorization.k8s.io";

/// Creates what is missing.
pub(crate) async fn run(server: &ApiServer) -> Result<(), OpenError> {
    let store = server.store();
    for ns in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        let object = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": ns, "labels": {"kubernetes.io/metadata.name": ns}},
            "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"},
        });
        create(store, format!("/core/namespaces/{ns}"), object).await?;
    }
    let labels = json!({"kubernetes.io/bootstrapping": "rbac-defaults"});
    for (name, extra, content) in cluster_roles() {
        let mut own = labels.clone();
        for (k, v) in extra.as_object().into_iter().flatten() {
            own[k] = v.clone();
        }
        let mut object = json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRole",
            "metadata": {"name": name, "labels": own, "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"}},
        });
        for (k, v) in content.as_object().into_iter().flatten() {
            object[k] = v.clone();
        }
        refresh(store, format!("/{RBAC}/clusterroles/{name}"), object).await?;
    }
    for (name, role, groups) in bindings() {
        let subjects: Vec<Value> = groups
            .iter()
            .map(|g| json!({"apiGroup": RBAC, "kind": "Group", "name": g}))
            .collect();
        let object = json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRoleBinding",
            "metadata": {"name": name, "labels": labels, "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"}},
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": role}, "subjects": subjects,
        });
        create(store, format!("/{RBAC}/clusterrolebindings/{name}"), object).await?;
    }
    for (name, value, text) in [
        (
            "system-cluster-critical",
            2_000_000_000,
            "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
        ),
        (
            "system-node-critical",
            2_000_001_000,
            "Used for system critical pods that must not be moved from their current node.",
        ),
    ] {
        let object = json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name, "generation": 1},
            "value": value, "description": text, "preemptionPolicy": "PreemptLowerPriority",
        });
        create(store, format!("/scheduling.k8s.io/priorityclasses/{name}"), object).await?;
    }
    kubernetes_service(server).await
}

/// The Service through which pods reach this server.
async fn kubernetes_service(server: &ApiServer) -> Result<(), OpenError> {
    let store = server.store();
    let config = server.config();
    let ip = config.service_cidr.first_host().to_string();
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": labels},
        "spec": {
            "clusterIP": ip, "clusterIPs": [ip], "internalTrafficPolicy": "Cluster", "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None", "type": "ClusterIP",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": config.advertise.port()}],
        },
        "status": {"loadBalancer": {}},
    });
    create(
        store,
        format!("/ranges/clusterip/{ip}"),
        json!({"service": "default/kubernetes"}),
    )
    .await?;
    refresh(store, "/core/services/default/kubernetes".into(), service).await?;
    let address = config.advertise.ip().to_string();
    let port = config.advertise.port();
    let endpoints = json!({
        "apiVersion": "v1", "kind": "Endpoints",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{"addresses": [{"ip": address}], "ports": [{"name": "https", "port": port, "protocol": "TCP"}]}],
    });
    refresh(store, "/core/endpoints/default/kubernetes".into(), endpoints).await?;
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "kubernetes", "namespace": "default", "generation": 1, "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
    });
    refresh(
        store,
        "/discovery.k8s.io/endpointslices/default/kubernetes".into(),
        slice,
    )
    .await
}

fn stamp(object: &mut Value) {
    object["metadata"]["uid"] = new_uid().into();
    object["metadata"]["creationTimestamp"] = meta::now().into();
}

fn bytes(object: &Value) -> Bytes {
    serde_json::to_vec(object).unwrap_or_default().into()
}

async fn create(store: &dyn Store, key: String, mut object: Value) -> Result<(), OpenError> {
    if store.get(&key)?.0.is_some() {
        return Ok(());
    }
    stamp(&mut object);
    match store.commit(Txn::create(key, bytes(&object))).await {
        Ok(_) | Err(StoreError::Conflict { .. }) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Creates an object or brings everything but its identity up to date.
async fn refresh(store: &dyn Store, key: String, mut object: Value) -> Result<(), OpenError> {
    let (Some(entry), _) = store.get(&key)? else {
        return create(store, key, object).await;
    };
    let old: Value = serde_json::from_slice(&entry.value).map_err(|e| {
        OpenError::Store(StoreError::Corrupt {
            path: key.clone(),
            detail: format!("not JSON: {e}"),
        })
    })?;
    for field in ["uid", "creationTimestamp"] {
        object["metadata"][field] = old["metadata"][field].clone();
    }
    for field in ["labels", "annotations"] {
        // Labels that a user added to a default object stay.
        let mut merged = old["metadata"][field].as_object().cloned().unwrap_or_default();
        merged.extend(object["metadata"][field].as_object().cloned().unwrap_or_default());
        if !merged.is_empty() {
            object["metadata"][field] = Value::Object(merged);
        }
    }
    if object == old {
        return Ok(());
    }
    match store.commit(Txn::replace(key, entry.mod_rev, bytes(&object))).await {
        Ok(_) | Err(StoreError::Conflict { .. }) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
