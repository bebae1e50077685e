//! What the control plane may do, and what it hands to whom: its own RBAC rights, credentials that end, secrets of gateways.

mod support;

use mantlet_model::secret::SecretValue;
use mantlet_testkit::eventually;
use mantlet_xds::ResourceType;
use mantlet_xds::client::Decoded;
use serde_json::{Value, json};
use support::{Cluster, Control, Dialer, PATIENCE, Proxy, Step, node};

/// The verbs that the installer grants; its golden file is the one list of them.
const GRANTED: &str = include_str!("../../cli/src/install/goldens/rbac.yaml");

async fn grant_installed_rights(cluster: &Cluster) {
    let roles = mantlet_api::yaml::read_one(GRANTED).unwrap();
    let subject = json!([{"kind": "ServiceAccount", "name": "istiod", "namespace": "istio-system"}]);
    let mut granted = 0;
    for role in roles.as_array().unwrap() {
        let name = role["role"].as_str().unwrap();
        let (kind, namespace) = match name {
            "istiod-clusterrole-istio-system" => ("ClusterRole", Value::Null),
            "istiod" => ("Role", json!("istio-system")),
            _ => continue,
        };
        granted += 1;
        let mut object = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
            "metadata": {"name": name}, "rules": role["rules"]});
        let mut binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": format!("{kind}Binding"),
            "metadata": {"name": name}, "subjects": subject,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}});
        if !namespace.is_null() {
            object["metadata"]["namespace"] = namespace.clone();
            binding["metadata"]["namespace"] = namespace;
        }
        cluster.apply(&object).await;
        cluster.apply(&binding).await;
    }
    assert_eq!(granted, 2);
}

fn gateway_objects() -> Vec<Value> {
    vec![
        json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway",
            "metadata": {"name": "front", "namespace": "istio-system"},
            "spec": {"selector": {"istio": "ingressgateway"}, "servers": [{
                "port": {"number": 443, "name": "https", "protocol": "HTTPS"}, "hosts": ["*"],
                "tls": {"mode": "SIMPLE", "credentialName": "shop"}}]}}),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "shop", "namespace": "istio-system"},
            "type": "kubernetes.io/tls",
            "stringData": {"tls.crt": "certificate of the shop", "tls.key": "key of the shop"}}),
    ]
}

async fn may_list_secrets(cluster: &Cluster, namespace: &str, account: &str) {
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
        "metadata": {"name": "gw-sds", "namespace": namespace},
        "rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "watch", "list"]}]});
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "gw-sds", "namespace": namespace},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "gw-sds"}});
    cluster.apply(&role).await;
    cluster.apply(&binding).await;
}

async fn gateway(cluster: &Cluster, control: &Control, account: &str) -> Proxy {
    gateway_of(cluster, control, "istio-system", account).await
}

async fn gateway_of(cluster: &Cluster, control: &Control, namespace: &str, account: &str) -> Proxy {
    let token = cluster.token(namespace, account).await;
    let dialer = Dialer {
        address: control.running.secure_grpc.into(),
        identity: Some(control.anonymous()),
        token: Some(token),
    };
    Proxy::start(
        node("router", "gw-1", namespace, account, &[("istio", "ingressgateway")]),
        dialer,
    )
}

fn shop_key(proxy: &Proxy) -> Option<Vec<u8>> {
    key_of(proxy, "kubernetes://shop")
}

fn key_of(proxy: &Proxy, resource: &str) -> Option<Vec<u8>> {
    match proxy.held.get(&ResourceType::Secret)?.get(resource)? {
        Decoded::Secret(secret) => match &secret.value {
            SecretValue::KeyPair { key, .. } => Some(key.expose().to_vec()),
            _ => None,
        },
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_installed_rights_are_enough_for_everything() {
    let cluster = Cluster::new().await;
    grant_installed_rights(&cluster).await;
    for object in gateway_objects() {
        cluster.apply(&object).await;
    }
    may_list_secrets(&cluster, "istio-system", "gw").await;
    let webhook = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": "istio-sidecar-injector"},
        "webhooks": [{"name": "x.istio.io", "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "objectSelector": {"matchLabels": {"never": "matches"}},
            "clientConfig": {"service": {"name": "istiod", "namespace": "istio-system", "path": "/inject"}}}]});
    cluster.apply(&webhook).await;

    let control = cluster.start_as(cluster.control_client()).await;
    // Tokens are reviewed, certificates signed, the root is made known, webhooks are patched.
    control.sign(&cluster.token("default", "web").await).await.unwrap();
    eventually("root ConfigMap", PATIENCE, || async {
        let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio-ca-root-cert", "namespace": "foo"}});
        cluster.get(&map).await
    })
    .await;
    eventually("CA bundle", PATIENCE, || async {
        let current = cluster.get(&webhook).await?;
        current.pointer("/webhooks/0/clientConfig/caBundle").cloned()
    })
    .await;
    // A gateway gets its secret, and its new content; statuses are written.
    let mut proxy = gateway(&cluster, &control, "gw").await;
    proxy
        .until("the secret", |p| shop_key(p).as_deref() == Some(b"key of the shop"))
        .await;
    let mut changed = gateway_objects().remove(1);
    changed["stringData"]["tls.key"] = json!("another key");
    cluster.apply(&changed).await;
    proxy
        .until("the new key", |p| shop_key(p).as_deref() == Some(b"another key"))
        .await;
    let custom = json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "custom", "namespace": "foo"},
        "spec": {"action": "CUSTOM", "provider": {"name": "p"}, "rules": [{}]}});
    cluster.apply(&custom).await;
    eventually("status", PATIENCE, || async {
        let current = cluster.get(&custom).await?;
        current.pointer("/status/conditions/0").cloned()
    })
    .await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_may_not_list_secrets_gets_none() {
    let cluster = Cluster::new().await;
    for object in gateway_objects() {
        cluster.apply(&object).await;
    }
    let control = cluster.start().await;
    let mut proxy = gateway(&cluster, &control, "thief").await;
    proxy
        .until("its listener", |p| p.listener("0.0.0.0_443").is_some())
        .await;
    // A later push proves that the refusal is not just slow.
    let second = json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway",
        "metadata": {"name": "plain", "namespace": "istio-system"},
        "spec": {"selector": {"istio": "ingressgateway"}, "servers": [{
            "port": {"number": 8080, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]}});
    cluster.apply(&second).await;
    proxy
        .until("the second listener", |p| p.listener("0.0.0.0_8080").is_some())
        .await;
    assert_eq!(shop_key(&proxy), None);
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_the_credential_of_its_peer() {
    let cluster = Cluster::new().await;
    let control = cluster.start().await;
    let token = cluster.token("default", "web").await;
    let dialer = Dialer {
        address: control.running.secure_grpc.into(),
        identity: Some(control.identity(&token, 3).await),
        token: None,
    };
    let mut proxy = Proxy::start(node("sidecar", "web-1", "default", "web", &[]), dialer);
    proxy
        .until("configuration", |p| p.held.contains_key(&ResourceType::Listener))
        .await;
    let ended = loop {
        if let Step::Disconnected(reason) = proxy.step().await {
            break reason;
        }
    };
    // With an expired certificate there is no way back in.
    let again = loop {
        match proxy.step().await {
            Step::Disconnected(reason) => break reason,
            Step::Connected => {}
            other => panic!("served after its credential had ended ({ended}): {other:?}"),
        }
    };
    assert!(!again.is_empty());
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_another_pod_opens_no_stream() {
    let cluster = Cluster::new().await;
    cluster.token("default", "web").await;
    for name in ["web-1", "web-2"] {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
            "spec": {"serviceAccountName": "web", "containers": [{"name": "app", "image": "app"}]}});
        cluster.apply(&pod).await;
    }
    let control = cluster.start().await;
    let dialer = |token: String| Dialer {
        address: control.running.secure_grpc.into(),
        identity: Some(control.anonymous()),
        token: Some(token),
    };
    let token = cluster.token_bound_to("default", "web", Some("web-2")).await;
    let mut foreign = Proxy::start(node("sidecar", "web-1", "default", "web", &[]), dialer(token.clone()));
    let reason = loop {
        match foreign.step().await {
            Step::Connected => {}
            Step::Disconnected(reason) => break reason,
            other => panic!("served: {other:?}"),
        }
    };
    assert!(reason.contains("the token belongs to pod web-2"), "{reason}");
    let mut own = Proxy::start(node("sidecar", "web-2", "default", "web", &[]), dialer(token));
    own.until("configuration", |p| p.held.contains_key(&ResourceType::Listener))
        .await;
    control.stop().await;
}

/// CVE-2021-34824: what was fetched for one gateway was served to another that named it, whatever the other may read. A second
/// namespace and a second account name the secret that the control plane holds already; each gets what is its own, or nothing.
#[tokio::test(flavor = "multi_thread")]
async fn reg_105_secrets_of_others_do_not_come_from_a_cache() {
    let cluster = Cluster::new().await;
    for object in gateway_objects() {
        cluster.apply(&object).await;
    }
    may_list_secrets(&cluster, "istio-system", "gw").await;
    may_list_secrets(&cluster, "foo", "gw").await;
    // Two servers of a gateway elsewhere: the same short name, and the other namespace's secret in so many words.
    let servers = [("shop", 443), ("istio-system/shop", 8443)].map(|(secret, port)| {
        json!({"port": {"number": port, "name": format!("https-{port}"), "protocol": "HTTPS"}, "hosts": [format!("{port}.example.com")],
            "tls": {"mode": "SIMPLE", "credentialName": secret}})
    });
    let foreign = json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway",
        "metadata": {"name": "front", "namespace": "foo"},
        "spec": {"selector": {"istio": "ingressgateway"}, "servers": servers}});
    cluster.apply(&foreign).await;
    let control = cluster.start().await;

    let mut owner = gateway_of(&cluster, &control, "istio-system", "gw").await;
    owner
        .until("its secret", |p| shop_key(p).as_deref() == Some(b"key of the shop"))
        .await;
    let mut stranger = gateway_of(&cluster, &control, "foo", "gw").await;
    let mut thief = gateway_of(&cluster, &control, "istio-system", "thief").await;
    let own = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "shop", "namespace": "foo"},
        "type": "kubernetes.io/tls", "stringData": {"tls.crt": "certificate", "tls.key": "key of foo"}});
    for proxy in [&mut stranger, &mut thief] {
        proxy
            .until("its listener", |p| p.listener("0.0.0.0_443").is_some())
            .await;
        assert_eq!(shop_key(proxy), None);
    }
    // Its own secret of that name is the first that the stranger ever gets: nothing came before it.
    cluster.apply(&own).await;
    stranger.until("a secret", |p| shop_key(p).is_some()).await;
    assert_eq!(shop_key(&stranger).as_deref(), Some(b"key of foo".as_slice()));
    assert_eq!(key_of(&stranger, "kubernetes://istio-system/shop"), None);
    // A push after all that shows that the refusal to the thief is not just slow.
    let plain = json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway",
        "metadata": {"name": "plain", "namespace": "istio-system"},
        "spec": {"selector": {"istio": "ingressgateway"}, "servers": [{
            "port": {"number": 8080, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}]}});
    cluster.apply(&plain).await;
    for proxy in [&mut owner, &mut thief] {
        proxy
            .until("the plain listener", |p| p.listener("0.0.0.0_8080").is_some())
            .await;
    }
    assert_eq!(shop_key(&thief), None);
    assert_eq!(shop_key(&owner).as_deref(), Some(b"key of the shop".as_slice()));
    control.stop().await;
}
