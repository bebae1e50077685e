//! The certificate authority against the real API server: its Secret, token reviews, root ConfigMaps.

mod support;

use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use mantlet_apiserver::Identity;
use mantlet_control::auth::{KubeTokenReviewer, ReviewError, SystemClock, TokenReviewer};
use mantlet_control::ca::{Authority, CaOptions, KubeSecrets, SecretError, SecretStore};
use mantlet_runtime::Registry;
use mantlet_testkit::eventually;
use serde_json::json;
use support::{Cluster, PATIENCE};

const ROOT: &str = "istio-ca-root-cert";

fn options() -> CaOptions {
    CaOptions {
        root_ca_dir: "/nonexistent".into(),
        ..CaOptions::new("cluster.local".parse().unwrap(), "istio-system", "default")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_together_agree_on_one_root() {
    let cluster = Cluster::new().await;
    let store = || Arc::new(KubeSecrets::new(cluster.client(), "istio-system"));
    let mut starts = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let store = store();
        starts.spawn(async move {
            let ca = Authority::load(options(), store, Arc::new(SystemClock), &Registry::new())
                .await
                .unwrap();
            ca.ca_bundle_pem()
        });
    }
    let roots = starts.join_all().await;
    assert!(
        roots.iter().all(|root| *root == roots[0]),
        "more than one root was made"
    );

    let secrets: Api<Secret> = Api::namespaced(cluster.client(), "istio-system");
    let secret = secrets.get("istio-ca-secret").await.unwrap();
    assert_eq!(secret.type_.as_deref(), Some("istio.io/ca-root"));
    assert_eq!(secret.data.unwrap()["root-cert.pem"].0, roots[0].as_bytes());

    // A stale version is a conflict, a second creation is refused: nobody's root is overwritten.
    let store = store();
    let mut known = store.get("istio-ca-secret").await.unwrap().unwrap();
    store.update("istio-ca-secret", &known).await.unwrap();
    known.data.insert("key.pem".to_owned(), b"x".to_vec());
    let newer = store.get("istio-ca-secret").await.unwrap().unwrap();
    store
        .update("istio-ca-secret", &{
            let mut n = newer.clone();
            n.data.insert("a".into(), b"b".to_vec());
            n
        })
        .await
        .unwrap();
    assert_eq!(
        store.update("istio-ca-secret", &newer).await,
        Err(SecretError::Conflict)
    );
    assert_eq!(
        store.create("istio-ca-secret", "istio.io/ca-root", &known).await,
        Err(SecretError::AlreadyExists)
    );
    assert!(store.get("absent").await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_read_is_an_error_and_not_an_absent_secret() {
    let cluster = Cluster::new().await;
    let nobody = cluster
        .server
        .service(Identity::user("mallory", &["system:authenticated"]));
    let store = KubeSecrets::new(kube::Client::new(nobody, "default"), "istio-system");
    let error = store.get("istio-ca-secret").await.unwrap_err();
    assert!(
        matches!(&error, SecretError::Api(text) if text.contains("forbidden")),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn token_reviews_say_who_and_for_whom() {
    let cluster = Cluster::new().await;
    let reviewer = KubeTokenReviewer::new(cluster.client());
    let audience = ["istio-ca".to_owned()];
    let token = cluster.token("foo", "sleep").await;
    let reviewed = reviewer.review(&token, &audience).await.unwrap();
    assert_eq!(reviewed.username, "system:serviceaccount:foo:sleep");
    assert!(reviewed.groups.iter().any(|g| g == "system:serviceaccounts"));
    assert_eq!(reviewed.audiences, audience);

    let other = reviewer.review(&token, &["somebody-else".to_owned()]).await;
    assert!(matches!(other, Err(ReviewError::Refused(_))), "{other:?}");
    let (head, signature) = token.rsplit_once('.').unwrap();
    let forged = format!("{head}.{}", signature.chars().rev().collect::<String>());
    for bad in [forged.as_str(), "garbage", ""] {
        let answer = reviewer.review(bad, &audience).await;
        assert!(answer.is_err(), "{bad:?}: {answer:?}");
    }
    // A deleted account's token is worth nothing, whatever its signature says.
    cluster
        .delete(
            &json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "sleep", "namespace": "foo"}}),
        )
        .await;
    assert!(reviewer.review(&token, &audience).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_namespace_gets_the_root_and_keeps_it() {
    let cluster = Cluster::new().await;
    let namespaces: Api<Namespace> = Api::all(cluster.client());
    for name in ["kube-node-lease", "local-path-storage"] {
        if namespaces.get_opt(name).await.unwrap().is_none() {
            let namespace: Namespace = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
            namespaces.create(&PostParams::default(), &namespace).await.unwrap();
        }
    }
    let control = cluster.start().await;
    let pem = control.running.authority.ca_bundle_pem();
    let maps = |namespace: &str| Api::<ConfigMap>::namespaced(cluster.client(), namespace);
    let right = async |namespace: &str| {
        let map = maps(namespace).get_opt(ROOT).await.unwrap()?;
        let labelled = map.metadata.labels.as_ref()?.get("istio.io/config")? == "true";
        (labelled && map.data.as_ref()?.get("root-cert.pem")? == &pem).then_some(map)
    };
    for namespace in ["default", "istio-system", "foo", "kube-system"] {
        eventually(&format!("root in {namespace}"), PATIENCE, || right(namespace)).await;
    }

    // Edited, stripped of its label, deleted: it comes back, and what others added to it stays.
    let edit = |patch| async move {
        maps("foo")
            .patch(ROOT, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .unwrap();
    };
    edit(json!({"data": {"root-cert.pem": "evil", "mine": "1"}})).await;
    let healed = eventually("edit healed", PATIENCE, || right("foo")).await;
    assert_eq!(healed.data.unwrap()["mine"], "1");
    edit(json!({"metadata": {"labels": {"istio.io/config": null}}})).await;
    eventually("label healed", PATIENCE, || right("foo")).await;
    let old = maps("foo").get(ROOT).await.unwrap().metadata.uid;
    maps("foo").delete(ROOT, &DeleteParams::default()).await.unwrap();
    let new = eventually("deletion healed", PATIENCE, || right("foo")).await;
    assert_ne!(new.metadata.uid, old);

    let late: Namespace = serde_json::from_value(json!({"metadata": {"name": "late"}})).unwrap();
    namespaces.create(&PostParams::default(), &late).await.unwrap();
    eventually("root in a new namespace", PATIENCE, || right("late")).await;
    for excluded in ["kube-public", "kube-node-lease", "local-path-storage"] {
        assert!(maps(excluded).get_opt(ROOT).await.unwrap().is_none(), "{excluded}");
    }
    control.stop().await;
}
