//! The mesh's trust domain changes while the control plane runs: new certificates are of the new one, those of the former one are
//! accepted as long as it is an alias (S1.25, S4.14).

mod support;

use mantlet_identity::TlsIdentity;
use mantlet_testkit::eventually;
use serde_json::json;
use support::{Cluster, Control, Dialer, PATIENCE, Proxy, Step, node};

async fn identity(control: &Control, token: &str) -> TlsIdentity {
    let (response, key) = control.sign(token).await.unwrap();
    TlsIdentity::from_csr_response(&response.cert_chain, &key, control.running.authority.provider()).unwrap()
}

async fn set(cluster: &Cluster, mesh: &str) {
    cluster
        .apply(&json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh}}))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn new_certificates_follow_the_mesh_configuration() {
    let cluster = Cluster::new().await;
    let token = cluster.token("default", "web").await;
    let control = cluster.start().await;
    let old = identity(&control, &token).await;
    assert_eq!(
        old.spiffe_id().unwrap().as_str(),
        "spiffe://cluster.local/ns/default/sa/web"
    );

    set(
        &cluster,
        "trustDomain: new.example\ntrustDomainAliases: [cluster.local]\n",
    )
    .await;
    eventually("a certificate of the new trust domain", PATIENCE, || async {
        let now = identity(&control, &token).await.spiffe_id().unwrap();
        (now.as_str() == "spiffe://new.example/ns/default/sa/web").then_some(())
    })
    .await;
    // The former certificate still opens streams.
    let stream = |identity: TlsIdentity| {
        let dialer = Dialer {
            address: control.running.secure_grpc.into(),
            identity: Some(identity),
            token: None,
        };
        Proxy::start(node("sidecar", "web-1", "default", "web", &[("app", "web")]), dialer)
    };
    let mut proxy = stream(old.clone());
    assert_eq!(proxy.step().await, Step::Connected);
    drop(proxy);

    // Without the alias it does not. What was set is seen when nothing of the former domain is let in any more.
    set(&cluster, "trustDomain: new.example\n").await;
    eventually("the former trust domain is refused", PATIENCE, || {
        let mut proxy = stream(old.clone());
        async move { matches!(proxy.step().await, Step::Disconnected(_)).then_some(()) }
    })
    .await;

    // What is no trust domain changes nothing.
    set(&cluster, "trustDomain: 'not a domain/'\n").await;
    set(&cluster, "trustDomain: new.example\n").await;
    let now = identity(&control, &token).await.spiffe_id().unwrap();
    assert_eq!(now.trust_domain(), "new.example");
    control.stop().await;
}
