//! The objects of the mesh: namespaces with services of ten pods each, written through the API by many clients at once.

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

/// Requests under way at once.
const CONCURRENT: usize = 32;
/// Service account of all pods of a namespace.
pub(crate) const ACCOUNT: &str = "app";

/// How large the mesh is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Namespaces with services.
    pub(crate) namespaces: usize,
    /// Services, spread evenly.
    pub(crate) services: usize,
    /// Pods of a service.
    pub(crate) endpoints: usize,
}

impl Plan {
    /// Namespace of a service.
    pub(crate) fn namespace(&self, service: usize) -> String {
        format!("team-{:02}", service % self.namespaces)
    }

    /// Name of a pod.
    pub(crate) fn pod(&self, service: usize, pod: usize) -> String {
        format!("svc-{service:04}-7d4b9c6f5-{pod:05}")
    }

    /// Address of a pod.
    pub(crate) fn address(&self, service: usize, pod: usize) -> String {
        let n = service * self.endpoints + pod;
        format!("10.{}.{}.{}", 1 + n / 62500, n / 250 % 250, 1 + n % 250)
    }

    /// All objects, in an order in which they can be made.
    fn stages(&self) -> Vec<Vec<(&'static str, Value)>> {
        let spaces: Vec<String> = (0..self.namespaces).map(|n| self.namespace(n)).collect();
        let namespaces = spaces.iter().map(|ns| {
            let labels = json!({"istio-injection": "enabled"});
            (
                "namespaces",
                json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ns, "labels": labels}}),
            )
        });
        let accounts = spaces.iter().map(|ns| {
            (
                "serviceaccounts",
                json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": ns}}),
            )
        });
        let mut objects = Vec::new();
        for service in 0..self.services {
            let (name, ns) = (format!("svc-{service:04}"), self.namespace(service));
            objects.push((
                "services",
                json!({"apiVersion": "v1", "kind": "Service",
                "metadata": {"name": name, "namespace": ns, "labels": {"app": name}},
                "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}}),
            ));
            objects.extend((0..self.endpoints).map(|pod| ("pods", self.pod_object(service, pod))));
            objects.push(("endpointslices", self.slice(service, None)));
        }
        vec![namespaces.collect(), accounts.collect(), objects]
    }

    fn pod_object(&self, service: usize, pod: usize) -> Value {
        let (name, ns) = (format!("svc-{service:04}"), self.namespace(service));
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": self.pod(service, pod), "namespace": ns,
                "labels": {"app": name, "version": "v1", "pod-template-hash": "7d4b9c6f5", "security.istio.io/tlsMode": "istio",
                    "service.istio.io/canonical-name": name, "service.istio.io/canonical-revision": "v1"},
                "annotations": {"kubectl.kubernetes.io/default-container": "app", "sidecar.istio.io/status": "{}"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{name}-7d4b9c6f5"),
                    "uid": "00000000-0000-4000-8000-000000000000", "controller": true}]},
            "spec": {"serviceAccountName": ACCOUNT, "nodeName": format!("node-{}", pod % 10),
                "containers": [
                    {"name": "app", "image": "registry.example/app:1.0", "ports": [{"name": "http", "containerPort": 8080}]},
                    {"name": "istio-proxy", "image": "registry.example/mantlet/proxy:1.0"}]}})
    }

    /// The EndpointSlice of a service; `first` replaces the address of its first pod.
    pub(crate) fn slice(&self, service: usize, first: Option<&str>) -> Value {
        let (name, ns) = (format!("svc-{service:04}"), self.namespace(service));
        let endpoints: Vec<Value> = (0..self.endpoints)
            .map(|pod| {
                let own = self.address(service, pod);
                let address = first.filter(|_| pod == 0).unwrap_or(&own);
                json!({"addresses": [address], "conditions": {"ready": true, "serving": true, "terminating": false},
                    "nodeName": format!("node-{}", pod % 10),
                    "targetRef": {"kind": "Pod", "name": self.pod(service, pod), "namespace": ns}})
            })
            .collect();
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": format!("{name}-x7k2p"), "namespace": ns, "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints})
    }
}

/// The API of an object's kind.
fn api_of(client: &Client, plural: &str, object: &Value) -> Result<Api<DynamicObject>> {
    let version = object["apiVersion"].as_str().context("no apiVersion")?;
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let kind = object["kind"].as_str().context("no kind")?;
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
    Ok(match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    })
}

/// Creates an object.
pub(crate) async fn create(client: &Client, plural: &str, object: &Value) -> Result<()> {
    let api = api_of(client, plural, object)?;
    let object: DynamicObject = serde_json::from_value(object.clone())?;
    let name = object.metadata.name.clone().unwrap_or_default();
    api.create(&PostParams::default(), &object)
        .await
        .with_context(|| format!("creating {plural}/{name}"))?;
    Ok(())
}

/// Creates an object, or changes the one that an earlier round has left.
pub(crate) async fn create_or_apply(client: &Client, plural: &str, object: &Value) -> Result<()> {
    let name = object["metadata"]["name"].as_str().context("no name")?;
    match api_of(client, plural, object)?.get_opt(name).await? {
        Some(_) => apply(client, plural, object).await,
        None => create(client, plural, object).await,
    }
}

/// Makes the object that is there like this one.
pub(crate) async fn apply(client: &Client, plural: &str, object: &Value) -> Result<()> {
    let api = api_of(client, plural, object)?;
    let name = object["metadata"]["name"].as_str().context("no name")?;
    api.patch(name, &PatchParams::default(), &Patch::Merge(object))
        .await
        .with_context(|| format!("changing {plural}/{name}"))?;
    Ok(())
}

/// Makes everything: Istio's kinds, then the mesh.
pub(crate) async fn populate(client: &Client, plan: &Plan) -> Result<()> {
    let crds = mantlet_api::crd::all().into_iter();
    let crds = crds.map(|crd| ("customresourcedefinitions", crd)).collect();
    let own = ["istio-system"].map(|name| {
        (
            "namespaces",
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}),
        )
    });
    let mut stages: Vec<Vec<(&str, Value)>> = vec![crds, own.into()];
    stages.extend(plan.stages());
    for stage in stages {
        let work = stage.iter().map(|(plural, object)| create(client, plural, object));
        let mut work = futures::stream::iter(work).buffer_unordered(CONCURRENT);
        while let Some(done) = work.next().await {
            done?;
        }
    }
    Ok(())
}

/// A token of a pod for the mesh, as the kubelet asks for it.
pub(crate) async fn token(client: &Client, namespace: &str, pod: &str) -> Result<String> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let request: TokenRequest = serde_json::from_value(json!({"metadata": {}, "spec": {
        "audiences": ["istio-ca"], "expirationSeconds": 3600,
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": pod}}}))?;
    let answer = accounts
        .create_token_request(ACCOUNT, &PostParams::default(), &request)
        .await?;
    answer.status.and_then(|s| s.token).context("no token in the answer")
}

/// How paths begin that the policies of [`policy`] name.
const TURN: &[u8] = b"/turn-";

/// An AuthorizationPolicy whose content is another one for every `turn`.
pub(crate) fn policy(namespace: &str, turn: usize) -> Value {
    json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "fleet", "namespace": namespace},
        "spec": {"action": "DENY", "rules": [{"to": [{"operation": {"paths": [format!("/turn-{turn}")]}}]}]}})
}

/// The newest turn of the policies in an encoded listener; 0 for none.
pub(crate) fn turn_in(listener: &[u8]) -> usize {
    let places = listener.windows(TURN.len()).enumerate().filter(|(_, w)| *w == TURN);
    let turns = places.map(|(at, _)| {
        let digits = listener[at + TURN.len()..].iter().take_while(|b| b.is_ascii_digit());
        digits.fold(0, |turn, digit| turn * 10 + usize::from(digit - b'0'))
    });
    turns.max().unwrap_or_default()
}
