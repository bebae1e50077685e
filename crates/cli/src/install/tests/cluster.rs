//! Installing into a real API server (in process, without nodes, so nothing is waited for): twice, changed, removed.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Client;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use mantlet_apiserver::{ApiServer, Config};
use serde_json::json;

use super::*;

struct Cluster {
    server: Arc<ApiServer>,
    client: Client,
    _dir: tempfile::TempDir,
}

async fn cluster() -> Cluster {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let config = Config::new(dir.path().join("store.redb"), "", key.serialize_pem());
    let server = ApiServer::open(config).await.unwrap();
    let client = Client::new(server.service_as_admin(), "default");
    Cluster {
        server,
        client,
        _dir: dir,
    }
}

impl Cluster {
    async fn install(&self, set: &[&str]) -> String {
        let spec = Spec::resolve(&source(set)).unwrap();
        let groups = objects::all(&spec).unwrap();
        let applier = apply::Applier::new(self.client.clone(), Duration::from_secs(30), false);
        let mut out = Vec::new();
        for group in &groups {
            applier.install(&spec, group, &mut out).await.unwrap();
        }
        applier.prune(&spec, &groups, &mut out).await.unwrap();
        String::from_utf8(out).unwrap()
    }

    /// Every object of the installer's, as `Kind namespace/name`.
    async fn installed(&self) -> Vec<String> {
        let found = apply::find(&self.client, "operator.istio.io/managed=Reconcile")
            .await
            .unwrap();
        found
            .iter()
            .map(|f| {
                format!(
                    "{} {}/{}",
                    f.kind,
                    f.namespace(),
                    kube::ResourceExt::name_any(&f.object)
                )
            })
            .collect()
    }

    async fn uninstall(&self, purge: bool, revision: Option<&str>, answer: &str) -> Outcome {
        let args = UninstallArgs {
            source: Source {
                revision: revision.map(str::to_string),
                ..Source::default()
            },
            purge,
            skip_confirmation: false,
            dry_run: false,
            kubeconfig: None,
            context: None,
        };
        uninstall::run_on(&self.client, &args, &mut answer.as_bytes(), &mut std::io::sink())
            .await
            .unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_object_is_accepted_and_a_second_run_changes_nothing() {
    let cluster = cluster().await;
    cluster
        .install(&["profile=demo", "values.pilot.autoscaleEnabled=true"])
        .await;
    let installed = cluster.installed().await;
    for wanted in [
        "Deployment istio-system/istiod",
        "Deployment istio-system/istio-ingressgateway",
        "Deployment istio-system/istio-egressgateway",
        "HorizontalPodAutoscaler istio-system/istiod",
        "PodDisruptionBudget istio-system/istiod",
        "MutatingWebhookConfiguration /istio-sidecar-injector",
        "ValidatingWebhookConfiguration /istio-validator-istio-system",
    ] {
        assert!(
            installed.iter().any(|i| i == wanted),
            "{wanted} is missing from {installed:?}"
        );
    }
    let crds: Api<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition> =
        Api::all(cluster.client.clone());
    assert_eq!(crds.list(&ListParams::default()).await.unwrap().items.len(), 20);

    let deployments: Api<k8s_openapi::api::apps::v1::Deployment> =
        Api::namespaced(cluster.client.clone(), "istio-system");
    let before: Vec<_> = deployments.list(&ListParams::default()).await.unwrap().items;
    cluster
        .install(&["profile=demo", "values.pilot.autoscaleEnabled=true"])
        .await;
    let after: Vec<_> = deployments.list(&ListParams::default()).await.unwrap().items;
    let generations = |list: &[k8s_openapi::api::apps::v1::Deployment]| -> Vec<_> {
        list.iter()
            .map(|d| (d.metadata.name.clone(), d.metadata.generation))
            .collect()
    };
    assert_eq!(
        generations(&before),
        generations(&after),
        "a second run rolls pods out again"
    );
    assert_eq!(installed, cluster.installed().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_profile_removes_gateways_and_keeps_what_is_not_the_installers() {
    let cluster = cluster().await;
    cluster.install(&["profile=demo"]).await;
    let secrets: Api<Secret> = Api::namespaced(cluster.client.clone(), "istio-system");
    let ca: Secret = serde_json::from_value(json!({
        "metadata": {"name": "istio-ca-secret"}, "data": {"ca-key.pem": "QUJD"},
    }))
    .unwrap();
    secrets.create(&PostParams::default(), &ca).await.unwrap();
    let webhooks: Api<k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration> =
        Api::all(cluster.client.clone());
    let key = rcgen::KeyPair::generate().unwrap();
    let root = rcgen::CertificateParams::new(Vec::new())
        .unwrap()
        .self_signed(&key)
        .unwrap()
        .pem();
    let encoded = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &root);
    let bundle = json!([{ "op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": encoded }]);
    let patch: Patch<()> = Patch::Json(serde_json::from_value(bundle).unwrap());
    webhooks
        .patch("istio-sidecar-injector", &PatchParams::default(), &patch)
        .await
        .unwrap();

    let out = cluster.install(&["values.global.proxy.privileged=true"]).await;
    assert!(
        out.contains("Removed Deployment:istio-system:istio-egressgateway."),
        "{out}"
    );
    let installed = cluster.installed().await;
    assert!(!installed.iter().any(|i| i.contains("egressgateway")), "{installed:?}");
    assert!(
        installed
            .iter()
            .any(|i| i == "Deployment istio-system/istio-ingressgateway")
    );
    assert!(secrets.get_opt("istio-ca-secret").await.unwrap().is_some());
    let webhook = webhooks.get("istio-sidecar-injector").await.unwrap();
    let kept = webhook.webhooks.unwrap()[0]
        .client_config
        .ca_bundle
        .clone()
        .expect("the caBundle is gone");
    assert_eq!(kept.0, root.as_bytes());
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "istio-system");
    let injector = maps.get("istio-sidecar-injector").await.unwrap();
    assert!(injector.data.unwrap()["values"].contains("\"privileged\": true"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revisions_live_side_by_side_and_go_one_by_one() {
    let cluster = cluster().await;
    cluster.install(&["profile=minimal"]).await;
    cluster.install(&["profile=minimal", "revision=canary"]).await;
    let both = cluster.installed().await;
    assert!(both.contains(&"Deployment istio-system/istiod".into()));
    assert!(both.contains(&"Deployment istio-system/istiod-canary".into()));
    assert_eq!(cluster.uninstall(false, Some("canary"), "n\n").await.code, 1);
    assert_eq!(cluster.installed().await, both, "a refused question changed something");
    assert_eq!(cluster.uninstall(false, Some("canary"), "y\n").await.code, 0);
    let left = cluster.installed().await;
    assert!(left.contains(&"Deployment istio-system/istiod".into()));
    assert!(!left.iter().any(|i| i.contains("canary")), "{left:?}");
    let nothing = cluster.uninstall(false, Some("nosuch"), "y\n").await;
    assert!(
        nothing.code == 1 && nothing.text.contains("Nothing to uninstall"),
        "{nothing:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn purge_leaves_nothing() {
    let cluster = cluster().await;
    cluster.install(&["profile=demo"]).await;
    let policies = kube::discovery::ApiResource::from_gvk_with_plural(
        &kube::core::GroupVersionKind::gvk("security.istio.io", "v1", "PeerAuthentication"),
        "peerauthentications",
    );
    let api: Api<kube::api::DynamicObject> = Api::namespaced_with(cluster.client.clone(), "default", &policies);
    let policy = serde_json::from_value(json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "x"}, "spec": {"mtls": {"mode": "STRICT"}},
    }))
    .unwrap();
    // The webhook cannot be reached here; it starts with failurePolicy Ignore, so the object is taken.
    api.create(&PostParams::default(), &policy).await.unwrap();
    let outcome = cluster.uninstall(true, None, "y\n").await;
    assert_eq!(outcome.code, 0);
    assert!(cluster.installed().await.is_empty());
    let crds: Api<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition> =
        Api::all(cluster.client.clone());
    assert!(crds.list(&ListParams::default()).await.unwrap().items.is_empty());
    drop(cluster.server);
}
