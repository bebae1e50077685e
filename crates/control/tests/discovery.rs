//! The control plane against a real API server over loopback: certificates, streams, policies, refusals, restarts.

mod support;

use mantlet_identity::TlsIdentity;
use mantlet_model::authz::Action;
use mantlet_model::listener::{Filters, Listener};
use mantlet_model::names::VIRTUAL_INBOUND;
use mantlet_testkit::eventually;
use mantlet_xds::ResourceType;
use serde_json::{Value, json};
use support::{Cluster, Control, Dialer, PATIENCE, Proxy, Step, node};
use tonic::Code;

fn workload(name: &str, namespace: &str, ip: &str, port: u16) -> Vec<Value> {
    vec![
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("{name}-1"), "namespace": namespace,
            "labels": {"app": name, "security.istio.io/tlsMode": "istio"}},
            "spec": {"serviceAccountName": name, "containers": [{"name": "app", "image": "app"}]}}),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": port}]}}),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-x"), "namespace": namespace, "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
            "endpoints": [{"addresses": [ip], "conditions": {"ready": true},
                "targetRef": {"kind": "Pod", "name": format!("{name}-1"), "namespace": namespace}}]}),
    ]
}

fn policy(name: &str, namespace: &str, spec: Value) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec})
}

async fn cluster_with_web() -> Cluster {
    let cluster = Cluster::new().await;
    cluster.token("default", "web").await;
    for object in workload("web", "default", "10.0.0.9", 8080) {
        cluster.apply(&object).await;
    }
    cluster
}

/// A sidecar of `web` that authenticates with its token.
async fn web_sidecar(cluster: &Cluster, control: &Control) -> Proxy {
    let dialer = Dialer {
        address: control.running.secure_grpc.into(),
        identity: Some(control.anonymous()),
        token: Some(cluster.token("default", "web").await),
    };
    Proxy::start(node("sidecar", "web-1", "default", "web", &[("app", "web")]), dialer)
}

/// ALLOW, DENY … of the HTTP chain of port 8080.
fn actions(listener: &Listener) -> Vec<Action> {
    let http = listener
        .all_chains()
        .find_map(|c| match (&c.filters, c.matches.destination_port) {
            (Filters::Http(http), Some(8080)) => Some(http),
            _ => None,
        });
    http.map(|h| h.authz.iter().map(|f| f.action).collect())
        .unwrap_or_default()
}

fn complete(proxy: &Proxy) -> bool {
    proxy.listener(VIRTUAL_INBOUND).is_some() && proxy.listener("0.0.0.0_80").is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_gives_the_callers_own_identity_and_a_stream_with_its_listeners() {
    let cluster = cluster_with_web().await;
    let control = cluster.start().await;

    let token = cluster.token("default", "web").await;
    let (response, key) = control.sign(&token).await.unwrap();
    let identity =
        TlsIdentity::from_csr_response(&response.cert_chain, &key, control.running.authority.provider()).unwrap();
    // The request named kube-system/admin; only what was proved is signed.
    assert_eq!(
        identity.spiffe_id().unwrap().as_str(),
        "spiffe://cluster.local/ns/default/sa/web"
    );

    // With the certificate, no token is needed.
    let dialer = Dialer {
        address: control.running.secure_grpc.into(),
        identity: Some(identity),
        token: None,
    };
    let mut proxy = Proxy::start(node("sidecar", "web-1", "default", "web", &[("app", "web")]), dialer);
    proxy.until("listeners", complete).await;
    let inbound = proxy.listener(VIRTUAL_INBOUND).unwrap();
    assert!(inbound.all_chains().any(|c| c.matches.destination_port == Some(8080)));
    let cluster_name = "outbound|80||web.default.svc.cluster.local";
    let held = proxy.cluster(cluster_name).expect("cluster of the service");
    match &held.tls {
        mantlet_model::cluster::ClusterTls::Auto(tls) => {
            assert_eq!(tls.sni, "outbound_.80_._.web.default.svc.cluster.local");
            assert_eq!(tls.server_sans.len(), 1);
            assert!(tls.server_sans[0].matches("spiffe://cluster.local/ns/default/sa/web"));
        }
        other => panic!("no automatic mTLS: {other:?}"),
    }
    proxy
        .until("endpoints", |p| {
            p.held
                .get(&ResourceType::Endpoints)
                .is_some_and(|e| e.contains_key(cluster_name))
        })
        .await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_tokens_get_nothing() {
    let cluster = cluster_with_web().await;
    let control = cluster.start().await;
    let status = control.sign("not-a-token").await.unwrap_err();
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unauthenticated, "request authenticate failure")
    );

    let dialer = Dialer {
        address: control.running.secure_grpc.into(),
        identity: Some(control.anonymous()),
        token: None,
    };
    let mut proxy = Proxy::start(node("sidecar", "web-1", "default", "web", &[]), dialer);
    let Step::Disconnected(reason) = first_end(&mut proxy).await else {
        unreachable!()
    };
    assert!(reason.contains("authentication failure"), "{reason}");
    assert!(proxy.held.is_empty());
    control.stop().await;
}

/// The first refusal or end of a stream.
async fn first_end(proxy: &mut Proxy) -> Step {
    loop {
        match proxy.step().await {
            Step::Connected => {}
            end @ Step::Disconnected(_) => return end,
            other => panic!("got configuration: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_cannot_ask_for_anothers_configuration() {
    let cluster = cluster_with_web().await;
    let control = cluster.start().await;
    for (pod, namespace, account) in [
        ("web-1", "foo", "web"),
        ("web-1", "default", "other"),
        ("istiod-1", "istio-system", "istiod"),
    ] {
        let dialer = Dialer {
            address: control.running.secure_grpc.into(),
            identity: Some(control.anonymous()),
            token: Some(cluster.token("default", "web").await),
        };
        let mut proxy = Proxy::start(node("sidecar", pod, namespace, account, &[]), dialer);
        let Step::Disconnected(reason) = first_end(&mut proxy).await else {
            unreachable!()
        };
        assert!(reason.contains("matched"), "{namespace}/{account}: {reason}");
        assert!(proxy.held.is_empty());
    }
    assert_eq!(control.syncz().await, Vec::<Value>::new());
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_changes_exactly_the_inbound_listener() {
    let cluster = cluster_with_web().await;
    let control = cluster.start().await;
    let mut proxy = web_sidecar(&cluster, &control).await;
    proxy.until("listeners", complete).await;
    settle(&control, &mut proxy).await;
    assert_eq!(actions(proxy.listener(VIRTUAL_INBOUND).unwrap()), []);

    cluster.apply(&policy("deny", "default", json!({}))).await;
    let steps = proxy
        .until("the policy", |p| {
            actions(p.listener(VIRTUAL_INBOUND).unwrap()) == [Action::Allow]
        })
        .await;
    let only = Step::Update(ResourceType::Listener, vec![VIRTUAL_INBOUND.into()], vec![]);
    assert_eq!(steps, [only], "a delta with the changed listener, nothing else");

    // Another namespace's policy, and one that selects others: nothing is sent. The next change is the next step.
    cluster.apply(&policy("deny", "foo", json!({}))).await;
    let selects_others = json!({"selector": {"matchLabels": {"app": "other"}}, "action": "DENY", "rules": [{}]});
    cluster.apply(&policy("others", "default", selects_others)).await;
    cluster.delete(&policy("deny", "default", json!({}))).await;
    let steps = proxy
        .until("the policy's end", |p| {
            actions(p.listener(VIRTUAL_INBOUND).unwrap()).is_empty()
        })
        .await;
    assert_eq!(steps.len(), 1, "{steps:?}");
    control.stop().await;
}

/// Takes everything until the control plane calls the proxy synced.
async fn settle(control: &Control, proxy: &mut Proxy) {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        let rows = control.syncz().await;
        if rows.len() == 1 && ["cds", "lds", "eds", "rds"].iter().all(|t| rows[0][t] == "SYNCED") {
            return;
        }
        assert!(tokio::time::Instant::now() < end, "not synced: {rows:?}");
        // The client answers only when it is stepped.
        let _ = tokio::time::timeout(std::time::Duration::from_millis(50), proxy.step()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_shows_in_syncz_and_ends_with_the_next_good_push() {
    let cluster = cluster_with_web().await;
    let control = cluster.start().await;
    let mut proxy = web_sidecar(&cluster, &control).await;
    proxy.until("listeners", complete).await;
    settle(&control, &mut proxy).await;

    proxy.refuse = Some((ResourceType::Listener, "no such filter".into()));
    cluster.apply(&policy("deny", "default", json!({}))).await;
    assert_eq!(proxy.step().await, Step::Refused("no such filter".into()));
    let row = eventually("ERROR in syncz", PATIENCE, || async {
        let rows = control.syncz().await;
        (rows[0]["lds"] == "ERROR").then(|| rows[0].clone())
    })
    .await;
    assert_eq!(row["proxy"], "web-1.default");
    assert_eq!(row["errors"], json!(["LDS: no such filter"]));
    let metrics = control.registry.render();
    assert!(metrics.contains("pilot_total_xds_rejects"), "{metrics}");

    cluster
        .apply(&policy("deny", "default", json!({"action": "DENY", "rules": [{}]})))
        .await;
    proxy
        .until("a good push", |p| {
            actions(p.listener(VIRTUAL_INBOUND).unwrap()) == [Action::Deny]
        })
        .await;
    settle(&control, &mut proxy).await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_control_plane_serves_the_same_identity_and_configuration() {
    let cluster = cluster_with_web().await;
    let control = cluster.start().await;
    let roots = control.running.authority.material().bundle().to_pem();
    let mut proxy = web_sidecar(&cluster, &control).await;
    proxy.until("listeners", complete).await;
    settle(&control, &mut proxy).await;
    let before = proxy.held.clone();
    control.stop().await;

    cluster.apply(&policy("deny", "default", json!({}))).await;
    let control = cluster.start().await;
    assert_eq!(control.running.authority.material().bundle().to_pem(), roots);
    *proxy.dialer.address.lock().unwrap() = control.running.secure_grpc;
    // What was changed meanwhile arrives; what was not is not sent again.
    let steps = proxy
        .until("the policy of the downtime", |p| {
            actions(p.listener(VIRTUAL_INBOUND).unwrap()) == [Action::Allow]
        })
        .await;
    for step in steps {
        if let Step::Update(kind, names, _) = step {
            assert!(
                kind != ResourceType::Listener || names == [VIRTUAL_INBOUND],
                "{kind}: {names:?}"
            );
        }
    }
    assert_eq!(
        before.get(&ResourceType::Cluster),
        proxy.held.get(&ResourceType::Cluster)
    );
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plaintext_port_serves_configuration_without_identity() {
    let cluster = cluster_with_web().await;
    let control = cluster.start().await;
    let dialer = Dialer {
        address: control.running.grpc.into(),
        identity: None,
        token: None,
    };
    let mut proxy = Proxy::start(node("sidecar", "web-1", "default", "web", &[("app", "web")]), dialer);
    proxy.until("listeners", complete).await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_not_supported_says_so_in_its_status() {
    let cluster = cluster_with_web().await;
    let control = cluster.start().await;
    let custom = policy(
        "custom",
        "default",
        json!({"action": "CUSTOM", "provider": {"name": "opa"}, "rules": [{"to": [{"operation": {"paths": ["/x"]}}]}]}),
    );
    cluster.apply(&custom).await;
    let message = eventually("a condition", PATIENCE, || async {
        let object = cluster.get(&custom).await?;
        let condition = object.pointer("/status/conditions/0")?;
        assert_eq!(
            (&condition["type"], &condition["status"]),
            (&json!("Reconciled"), &json!("False"))
        );
        condition["message"].as_str().map(str::to_string)
    })
    .await;
    assert!(
        message.contains("\"opa\" is not in meshConfig.extensionProviders"),
        "{message}"
    );
    // The mesh learns of the provider, then its Service comes: the policy needs no change for its status to follow.
    let mesh = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
        "data": {"mesh": "extensionProviders:\n- name: opa\n  envoyExtAuthzGrpc: {service: opa.default.svc.cluster.local, port: 9191}\n"}});
    cluster.apply(&mesh).await;
    let status = |want: &'static str, part: &'static str| {
        let (cluster, custom) = (&cluster, &custom);
        eventually(part, PATIENCE, move || async move {
            let object = cluster.get(custom).await?;
            let condition = object.pointer("/status/conditions/0")?;
            let fits = condition["status"] == want && condition["message"].as_str()?.contains(part);
            fits.then_some(())
        })
    };
    status("False", "could not find service opa.default.svc.cluster.local").await;
    cluster
        .apply(
            &json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "opa", "namespace": "default"},
            "spec": {"ports": [{"name": "grpc", "port": 9191}]}}),
        )
        .await;
    status("True", "proxies up to date").await;
    let sidecar = json!({"apiVersion": "networking.istio.io/v1", "kind": "Sidecar",
        "metadata": {"name": "default", "namespace": "default"}, "spec": {"egress": [{"hosts": ["./*"]}]}});
    cluster.apply(&sidecar).await;
    eventually("a condition on the Sidecar", PATIENCE, || async {
        let object = cluster.get(&sidecar).await?;
        (object.pointer("/status/conditions/0/status")? == "False").then_some(())
    })
    .await;
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn debug_pages() {
    let cluster = cluster_with_web().await;
    let control = cluster.start().await;
    let mut proxy = web_sidecar(&cluster, &control).await;
    proxy.until("listeners", complete).await;
    assert_eq!(control.get("/ready").await, (200, String::new()));
    let (status, dump) = control.get("/debug/config_dump?proxyID=web-1.default").await;
    assert_eq!(status, 200);
    let dump: Value = serde_json::from_str(&dump).unwrap();
    assert!(dump["listeners"][VIRTUAL_INBOUND].is_object());
    assert_eq!(control.get("/debug/config_dump?proxyID=nobody.default").await.0, 404);
    assert_eq!(control.get("/debug/config_dump").await.0, 400);
    let (_, endpoints) = control.get("/debug/endpointz").await;
    assert!(endpoints.contains("10.0.0.9"), "{endpoints}");
    settle(&control, &mut proxy).await;
    let distribution: Value = serde_json::from_str(&control.get("/debug/distribution").await.1).unwrap();
    assert_eq!(distribution["revision"], distribution["proxies"][0]["acked"]);
    control.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bare_envoy_is_served_state_of_the_world_in_its_own_vocabulary() {
    use envoy_types::pb::envoy::service::discovery::v3::DiscoveryRequest;
    use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;

    let cluster = cluster_with_web().await;
    let control = cluster.start().await;
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", control.running.grpc))
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let mut node = node("sidecar", "web-1", "default", "web", &[("app", "web")]);
    if let Some(metadata) = &mut node.metadata {
        metadata.fields.remove("MANTLET");
        metadata.fields.remove("ISTIO_VERSION");
    }
    let (tx, rx) = tokio::sync::mpsc::channel(4);
    let kind = ResourceType::Listener.url().to_string();
    let first = DiscoveryRequest {
        node: Some(node),
        type_url: kind.clone(),
        ..DiscoveryRequest::default()
    };
    tx.send(first).await.unwrap();
    let requests = tokio_stream::wrappers::ReceiverStream::new(rx);
    let mut responses = client.stream_aggregated_resources(requests).await.unwrap().into_inner();
    let response = tokio::time::timeout(PATIENCE, responses.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(response.type_url, kind);
    let bytes: Vec<u8> = response.resources.iter().flat_map(|r| r.value.clone()).collect();
    let text = String::from_utf8_lossy(&bytes);
    assert!(text.contains("virtualInbound"));
    assert!(
        !text.contains("istio.alpn") && !text.contains("istio.stats"),
        "filters that it does not know"
    );

    // A change comes as the whole state of the type, under a new version.
    tx.send(DiscoveryRequest {
        type_url: kind,
        version_info: response.version_info.clone(),
        response_nonce: response.nonce.clone(),
        ..DiscoveryRequest::default()
    })
    .await
    .unwrap();
    cluster.apply(&policy("deny", "default", json!({}))).await;
    let next = tokio::time::timeout(PATIENCE, responses.message())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_ne!(next.version_info, response.version_info);
    assert_eq!(next.resources.len(), response.resources.len());
    control.stop().await;
}
