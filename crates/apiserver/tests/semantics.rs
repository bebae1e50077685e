//! Objects, watches, admission and streams, through kube clients in this process and raw requests.

mod common;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use common::{Ca, Cluster, config};
use futures::{StreamExt, TryStreamExt};
use http::{Method, Request};
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::runtime::watcher;
use mantlet_apiserver::{ApiServer, Body, Identity};
use serde_json::{Value, json};
use tower::ServiceExt;

struct Local {
    server: Arc<ApiServer>,
    _dir: tempfile::TempDir,
}

impl Local {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = ApiServer::open(config(dir.path(), &Ca::new("ca"))).await.unwrap();
        let local = Self { server, _dir: dir };
        local
            .post(
                "/api/v1/namespaces/default/serviceaccounts",
                json!({"metadata": {"name": "default"}}),
            )
            .await;
        local
    }

    fn client(&self) -> kube::Client {
        kube::Client::new(self.server.service_as_admin(), "default")
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::default_namespaced(self.client())
    }

    async fn send(&self, method: Method, path: &str, kind: &str, body: Vec<u8>) -> (u16, Value) {
        let (code, bytes) = self.raw(Identity::admin("test"), method, path, kind, body).await;
        (code, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    async fn raw(&self, user: Identity, method: Method, path: &str, kind: &str, body: Vec<u8>) -> (u16, bytes::Bytes) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", kind)
            .body(http_body_util::Full::new(bytes::Bytes::from(body)))
            .unwrap();
        let response: http::Response<Body> = self.server.service(user).oneshot(request).await.unwrap();
        (
            response.status().as_u16(),
            response.into_body().collect().await.unwrap().to_bytes(),
        )
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.send(Method::POST, path, "application/json", body.to_string().into())
            .await
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.send(Method::GET, path, "application/json", vec![]).await
    }

    async fn created(&self, path: &str, body: Value) -> Value {
        let (code, v) = self.post(path, body).await;
        assert_eq!(code, 201, "{v}");
        v
    }
}

fn cm(name: &str, value: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name, "labels": {"v": value}}, "data": {"k": value}})).unwrap()
}

fn pod(name: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "i"}]}})
}

const PODS: &str = "/api/v1/namespaces/default/pods";

#[tokio::test]
async fn optimistic_concurrency() {
    let s = Local::new().await;
    let api: Api<ConfigMap> = s.api();
    let first = api.create(&PostParams::default(), &cm("x", "1")).await.unwrap();
    let mut newer = first.clone();
    newer.data = Some([("k".to_owned(), "2".to_owned())].into());
    let second = api.replace("x", &PostParams::default(), &newer).await.unwrap();
    assert_ne!(first.metadata.resource_version, second.metadata.resource_version);
    assert_eq!(first.metadata.uid, second.metadata.uid);
    let err = api.replace("x", &PostParams::default(), &newer).await.unwrap_err();
    let kube::Error::Api(status) = err else { panic!("{err}") };
    assert_eq!((status.code, status.reason.as_str()), (409, "Conflict"));
    assert_eq!(
        status.message,
        "Operation cannot be fulfilled on configmaps \"x\": the object has been modified; please apply your changes to the latest version and try again"
    );
    // Writing the same again is no change.
    let same = api.replace("x", &PostParams::default(), &second).await.unwrap();
    assert_eq!(same.metadata.resource_version, second.metadata.resource_version);
    // Concurrent patches all arrive.
    let patches = (0..20).map(|i| {
        let api = api.clone();
        async move {
            api.patch(
                "x",
                &PatchParams::default(),
                &Patch::Merge(json!({"data": {format!("k{i}"): "v"}})),
            )
            .await
        }
    });
    futures::future::try_join_all(patches).await.unwrap();
    assert_eq!(api.get("x").await.unwrap().data.unwrap().len(), 21);
}

#[tokio::test]
async fn watch_sees_what_the_selector_sees() {
    let s = Local::new().await;
    let api: Api<ConfigMap> = s.api();
    api.create(&PostParams::default(), &cm("a", "1")).await.unwrap();
    let list = api.list(&ListParams::default().labels("v=1")).await.unwrap();
    let from = list.metadata.resource_version.clone().unwrap();
    let stream = api
        .watch(&WatchParams::default().labels("v=1").timeout(20), &from)
        .await
        .unwrap();
    let mut stream = pin!(stream);
    let relabel = |v: &str| Patch::Merge(json!({"metadata": {"labels": {"v": v}}}));
    api.patch("a", &PatchParams::default(), &relabel("2")).await.unwrap();
    api.patch("a", &PatchParams::default(), &relabel("3")).await.unwrap();
    api.patch("a", &PatchParams::default(), &relabel("1")).await.unwrap();
    api.patch("a", &PatchParams::default(), &Patch::Merge(json!({"data": {"k": "9"}})))
        .await
        .unwrap();
    api.delete("a", &DeleteParams::default()).await.unwrap();
    let mut seen = Vec::new();
    let mut last = 0;
    while seen.len() < 4 {
        let (kind, object) = match stream.try_next().await.unwrap().unwrap() {
            WatchEvent::Added(o) => ("ADDED", o),
            WatchEvent::Modified(o) => ("MODIFIED", o),
            WatchEvent::Deleted(o) => ("DELETED", o),
            WatchEvent::Bookmark(b) => {
                assert!(b.metadata.resource_version.parse::<u64>().unwrap() >= last);
                continue;
            }
            WatchEvent::Error(e) => panic!("{e:?}"),
        };
        let revision: u64 = object.metadata.resource_version.unwrap().parse().unwrap();
        assert!(revision > last, "revisions rise, deletions included");
        last = revision;
        seen.push(kind);
    }
    assert_eq!(seen, ["DELETED", "ADDED", "MODIFIED", "DELETED"]);
}

#[tokio::test]
async fn bookmarks_initial_events_and_expiry() {
    let s = Local::new().await;
    let api: Api<ConfigMap> = s.api();
    api.create(&PostParams::default(), &cm("a", "1")).await.unwrap();
    // Informers of both kinds come up and follow.
    for streaming in [false, true] {
        let mut config = watcher::Config::default();
        if streaming {
            config = config.streaming_lists();
        }
        let mut stream = pin!(watcher(api.clone(), config));
        let mut names = Vec::new();
        loop {
            match stream.try_next().await.unwrap().unwrap() {
                watcher::Event::InitApply(o) => names.push(o.metadata.name.unwrap()),
                watcher::Event::InitDone => break,
                _ => {}
            }
        }
        assert!(names.contains(&"a".to_owned()), "{names:?}");
        let added = format!("later-{streaming}");
        api.create(&PostParams::default(), &cm(&added, "1")).await.unwrap();
        loop {
            if let watcher::Event::Apply(o) = stream.try_next().await.unwrap().unwrap() {
                assert_eq!(o.metadata.name.unwrap(), added);
                break;
            }
        }
    }
    let path = "/api/v1/namespaces/default/configmaps?watch=1&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&timeoutSeconds=3";
    let (_, bytes) = s.raw(Identity::admin("x"), Method::GET, path, "", vec![]).await;
    let events: Vec<Value> = bytes
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    let end = events
        .iter()
        .position(|e| e["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"] == "true")
        .unwrap();
    assert!(
        events[..end].iter().all(|e| e["type"] == "ADDED") && end == 3,
        "{events:?}"
    );
    assert!(
        events[end + 1..].iter().any(|e| e["type"] == "BOOKMARK"),
        "a bookmark comes each second here: {events:?}"
    );
    let (code, status) = s.get("/api/v1/configmaps?watch=1&sendInitialEvents=true").await;
    assert_eq!((code, status["reason"].as_str()), (422, Some("Invalid")));
    let (code, _) = s.get("/api/v1/configmaps?watch=1&resourceVersion=abc").await;
    assert_eq!(code, 400);
    let (code, status) = s.get("/api/v1/configmaps?watch=1&resourceVersion=99999999").await;
    assert_eq!((code, status["reason"].as_str()), (504, Some("Timeout")));
}

#[tokio::test]
async fn compacted_revisions_answer_410() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), &Ca::new("ca"));
    config.store.log_entries = 50;
    let server = ApiServer::open(config).await.unwrap();
    let s = Local { server, _dir: dir };
    let api: Api<ConfigMap> = s.api();
    api.create(&PostParams::default(), &cm("a", "1")).await.unwrap();
    for i in 0..120 {
        api.patch(
            "a",
            &PatchParams::default(),
            &Patch::Merge(json!({"data": {"k": i.to_string()}})),
        )
        .await
        .unwrap();
    }
    let (code, status) = s.get("/api/v1/configmaps?watch=1&resourceVersion=5").await;
    assert_eq!(
        (code, status["reason"].as_str(), status["code"].as_u64()),
        (410, Some("Expired"), Some(410))
    );
}

#[tokio::test]
async fn pods_get_defaults_token_and_graceful_end() {
    let s = Local::new().await;
    let made = s.created(PODS, pod("p")).await;
    let spec = &made["spec"];
    for (field, want) in [
        ("restartPolicy", json!("Always")),
        ("dnsPolicy", json!("ClusterFirst")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("serviceAccountName", json!("default")),
        ("schedulerName", json!("default-scheduler")),
        ("enableServiceLinks", json!(true)),
    ] {
        assert_eq!(spec[field], want, "{field}");
    }
    assert_eq!(made["status"], json!({"phase": "Pending", "qosClass": "BestEffort"}));
    assert_eq!(spec["containers"][0]["imagePullPolicy"], "Always");
    let volume = spec["volumes"][0]["name"].as_str().unwrap();
    assert!(volume.starts_with("kube-api-access-"));
    assert_eq!(
        spec["containers"][0]["volumeMounts"][0]["mountPath"],
        "/var/run/secrets/kubernetes.io/serviceaccount"
    );
    assert_eq!(
        spec["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"]["expirationSeconds"],
        3607
    );

    // Not bound yet: gone at once. Bound: marked, and gone when the node agent says so.
    let (code, _) = s.send(Method::DELETE, &format!("{PODS}/p"), "", vec![]).await;
    assert_eq!((code, s.get(&format!("{PODS}/p")).await.0), (200, 404));
    s.created(PODS, pod("q")).await;
    let (code, _) = s.post(&format!("{PODS}/q/binding"), json!({"kind": "Binding", "apiVersion": "v1", "metadata": {"name": "q"}, "target": {"kind": "Node", "name": "n1"}})).await;
    assert_eq!(code, 201);
    assert_eq!(s.get(&format!("{PODS}/q")).await.1["spec"]["nodeName"], "n1");
    let api: Api<Pod> = s.api();
    api.delete("q", &DeleteParams::default()).await.unwrap();
    let marked = api.get("q").await.unwrap();
    assert!(marked.metadata.deletion_timestamp.is_some());
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(30));
    api.delete("q", &DeleteParams::default().grace_period(0)).await.unwrap();
    assert!(api.get_opt("q").await.unwrap().is_none());

    let (code, status) = s.post(PODS, json!({"metadata": {"name": "r"}, "spec": {"serviceAccountName": "nobody", "containers": [{"name": "c", "image": "i"}]}})).await;
    assert_eq!(code, 403);
    assert_eq!(
        status["message"],
        "pods \"r\" is forbidden: error looking up service account default/nobody: serviceaccount \"nobody\" not found"
    );
    let (code, status) = s
        .post(PODS, json!({"metadata": {"name": "r"}, "spec": {"containers": []}}))
        .await;
    assert_eq!(code, 422);
    assert_eq!(
        status["message"],
        "Pod \"r\" is invalid: spec.containers: Required value"
    );
    assert_eq!(
        status["details"]["causes"][0],
        json!({"reason": "FieldValueRequired", "message": "Required value", "field": "spec.containers"})
    );
}

#[tokio::test]
async fn finalizers_hold_objects() {
    let s = Local::new().await;
    let api: Api<ConfigMap> = s.api();
    let mut held = cm("held", "1");
    held.metadata.finalizers = Some(vec!["example.com/hold".into()]);
    api.create(&PostParams::default(), &held).await.unwrap();
    api.delete("held", &DeleteParams::foreground()).await.unwrap();
    let marked = api.get("held").await.unwrap();
    assert_eq!(
        marked.metadata.finalizers.as_deref().unwrap(),
        ["example.com/hold", "foregroundDeletion"]
    );
    let more = json!({"metadata": {"finalizers": ["example.com/hold", "foregroundDeletion", "example.com/more"]}});
    let err = api
        .patch("held", &PatchParams::default(), &Patch::Merge(more))
        .await
        .unwrap_err();
    assert!(
        err.to_string()
            .contains("no new finalizers can be added if the object is being deleted"),
        "{err}"
    );
    api.patch(
        "held",
        &PatchParams::default(),
        &Patch::Merge(json!({"metadata": {"finalizers": null}})),
    )
    .await
    .unwrap();
    assert!(api.get_opt("held").await.unwrap().is_none());
}

#[tokio::test]
async fn namespaces_end_through_finalize() {
    let s = Local::new().await;
    let api: Api<Namespace> = Api::all(s.client());
    s.created("/api/v1/namespaces", json!({"metadata": {"name": "n"}}))
        .await;
    let ns = api.get("n").await.unwrap();
    assert_eq!(ns.metadata.labels.unwrap()["kubernetes.io/metadata.name"], "n");
    api.delete("n", &DeleteParams::default()).await.unwrap();
    let ending = s.get("/api/v1/namespaces/n").await.1;
    assert_eq!(ending["status"]["phase"], "Terminating");
    let (code, status) = s
        .post("/api/v1/namespaces/n/configmaps", json!({"metadata": {"name": "x"}}))
        .await;
    assert_eq!(code, 403);
    assert_eq!(
        status["message"],
        "configmaps \"x\" is forbidden: unable to create new content in namespace n because it is being terminated"
    );
    let mut done = ending.clone();
    done["spec"]["finalizers"] = json!([]);
    let (code, _) = s
        .send(
            Method::PUT,
            "/api/v1/namespaces/n/finalize",
            "application/json",
            done.to_string().into(),
        )
        .await;
    assert_eq!((code, s.get("/api/v1/namespaces/n").await.0), (200, 404));
    let (code, status) = s
        .send(Method::DELETE, "/api/v1/namespaces/kube-system", "", vec![])
        .await;
    assert_eq!((code, status["reason"].as_str()), (403, Some("Forbidden")));
}

#[tokio::test]
async fn services_get_addresses_of_their_own() {
    let s = Local::new().await;
    let path = "/api/v1/namespaces/default/services";
    let body = |name: &str, spec: Value| json!({"metadata": {"name": name}, "spec": spec});
    let mut seen = std::collections::HashSet::new();
    let calls = (0..30).map(|i| {
        s.created(
            path,
            body(&format!("s{i}"), json!({"type": "NodePort", "ports": [{"port": 80}]})),
        )
    });
    for made in futures::future::join_all(calls).await {
        let port = &made["spec"]["ports"][0];
        assert_eq!(
            (port["protocol"].as_str(), port["targetPort"].as_u64()),
            (Some("TCP"), Some(80))
        );
        assert!((30000..=32767).contains(&port["nodePort"].as_u64().unwrap()));
        assert!(seen.insert(port["nodePort"].to_string()) && seen.insert(made["spec"]["clusterIP"].to_string()));
        assert!(made["spec"]["clusterIP"].as_str().unwrap().starts_with("10.96."));
    }
    let fixed = s
        .created(
            path,
            body(
                "dns",
                json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53, "protocol": "UDP"}]}),
            ),
        )
        .await;
    assert_eq!(fixed["spec"]["clusterIPs"], json!(["10.96.0.10"]));
    let (code, status) = s
        .post(
            path,
            body("dns2", json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53}]})),
        )
        .await;
    assert_eq!(code, 422);
    assert!(
        status["message"]
            .as_str()
            .unwrap()
            .contains("provided IP is already allocated"),
        "{status}"
    );
    let (code, status) = s
        .post(
            path,
            body("far", json!({"clusterIP": "10.1.0.10", "ports": [{"port": 53}]})),
        )
        .await;
    assert!(
        code == 422
            && status["message"]
                .as_str()
                .unwrap()
                .contains("The range of valid IPs is 10.96.0.0/16"),
        "{status}"
    );
    // Freed on deletion, kept on update.
    s.send(Method::DELETE, &format!("{path}/dns"), "", vec![]).await;
    s.created(
        path,
        body("dns2", json!({"clusterIP": "10.96.0.10", "ports": [{"port": 53}]})),
    )
    .await;
    let api: Api<Service> = s.api();
    let before = api.get("s1").await.unwrap().spec.unwrap();
    let (code, _) = s.send(Method::PUT, &format!("{path}/s1"), "application/json",
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s1"}, "spec": {"type": "NodePort", "ports": [{"port": 80, "targetPort": 8080}]}}).to_string().into()).await;
    let after = api.get("s1").await.unwrap().spec.unwrap();
    assert_eq!(code, 200);
    assert_eq!(
        (before.cluster_ip, before.ports.unwrap()[0].node_port),
        (after.cluster_ip, after.ports.unwrap()[0].node_port)
    );
    let headless = s
        .created(path, body("h", json!({"clusterIP": "None", "selector": {"a": "b"}})))
        .await;
    assert_eq!(headless["spec"]["clusterIP"], "None");
    for (spec, want) in [
        (json!({"ports": []}), "spec.ports: Required value"),
        (
            json!({"ports": [{"port": 0}]}),
            "must be between 1 and 65535, inclusive",
        ),
        (
            json!({"ports": [{"port": 1}, {"port": 2}]}),
            "spec.ports[0].name: Required value",
        ),
        (
            json!({"type": "Odd", "ports": [{"port": 1}]}),
            "spec.type: Unsupported value: \"Odd\"",
        ),
    ] {
        let (code, status) = s.post(path, body("bad", spec)).await;
        assert!(
            code == 422 && status["message"].as_str().unwrap().contains(want),
            "{status}"
        );
    }
}

#[tokio::test]
async fn generation_status_and_dry_run() {
    let s = Local::new().await;
    let path = "/apis/apps/v1/namespaces/default/deployments";
    let body = json!({"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {
        "metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}, "status": {"replicas": 9}});
    let made = s.created(path, body.clone()).await;
    assert_eq!(
        (made["metadata"]["generation"].as_i64(), &made["status"]),
        (Some(1), &json!({}))
    );
    assert_eq!(
        made["spec"]["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}})
    );
    let patch = |p: Value, sub: &'static str| {
        let s = &s;
        async move {
            s.send(
                Method::PATCH,
                &format!("{path}/d{sub}"),
                "application/merge-patch+json",
                p.to_string().into(),
            )
            .await
        }
    };
    let (_, v) = patch(json!({"metadata": {"labels": {"x": "y"}}}), "").await;
    assert_eq!(v["metadata"]["generation"], 1);
    let (_, v) = patch(json!({"spec": {"replicas": 3}, "status": {"replicas": 4}}), "").await;
    assert_eq!(
        (v["metadata"]["generation"].as_i64(), &v["status"]),
        (Some(2), &json!({}))
    );
    let (_, v) = patch(
        json!({"status": {"observedGeneration": 2}, "spec": {"replicas": 8}}),
        "/status",
    )
    .await;
    assert_eq!(
        (
            v["status"]["observedGeneration"].as_i64(),
            v["spec"]["replicas"].as_i64(),
            v["metadata"]["generation"].as_i64()
        ),
        (Some(2), Some(3), Some(2))
    );
    let (code, v) = patch(json!({"spec": {"selector": {"matchLabels": {"a": "c"}}}}), "").await;
    assert!(
        code == 422 && v["message"].as_str().unwrap().contains("field is immutable"),
        "{v}"
    );
    let (code, v) = s
        .send(
            Method::PATCH,
            &format!("{path}/d?dryRun=All"),
            "application/merge-patch+json",
            json!({"spec": {"replicas": 7}}).to_string().into(),
        )
        .await;
    assert_eq!((code, v["spec"]["replicas"].as_i64()), (200, Some(7)));
    assert_eq!(s.get(&format!("{path}/d")).await.1["spec"]["replicas"], 3);
    let mut other = body;
    other["metadata"]["name"] = "e".into();
    assert_eq!(s.post(&format!("{path}?dryRun=All"), other).await.0, 201);
    assert_eq!(s.get(&format!("{path}/e")).await.0, 404);
    let (code, v) = s.get(&format!("{path}/d/scale")).await;
    assert_eq!(
        (
            code,
            v["kind"].as_str(),
            v["spec"]["replicas"].as_i64(),
            v["status"]["selector"].as_str()
        ),
        (200, Some("Scale"), Some(3), Some("a=b"))
    );
}

/// Method, path, content type, body; then the code and reason of the answer.
type BadCase = (Method, String, &'static str, Vec<u8>, u16, &'static str);

#[tokio::test]
async fn bad_requests_are_answered_in_kind() {
    let s = Local::new().await;
    let cms = "/api/v1/namespaces/default/configmaps";
    let deep = format!("{{\"data\":{}1{}}}", "{\"a\":".repeat(200), "}".repeat(200));
    let cases: Vec<BadCase> = vec![
        (
            Method::POST,
            cms.into(),
            "application/json",
            b"{".to_vec(),
            400,
            "BadRequest",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            b"[]".to_vec(),
            400,
            "BadRequest",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            deep.into(),
            400,
            "BadRequest",
        ),
        (
            Method::POST,
            cms.into(),
            "text/csv",
            b"a,b".to_vec(),
            415,
            "UnsupportedMediaType",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            vec![b' '; (3 << 20) + 1],
            413,
            "RequestEntityTooLarge",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            json!({"metadata": {"name": "x"}, "data": {"a": "x".repeat(2 << 20)}})
                .to_string()
                .into(),
            422,
            "Invalid",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            json!({"metadata": {"name": "../x"}}).to_string().into(),
            422,
            "Invalid",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            json!({"metadata": {}}).to_string().into(),
            422,
            "Invalid",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            json!({"metadata": {"name": "x", "labels": {"a": 1}}})
                .to_string()
                .into(),
            400,
            "BadRequest",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            json!({"kind": "Secret", "metadata": {"name": "x"}}).to_string().into(),
            400,
            "BadRequest",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            json!({"apiVersion": "v2", "metadata": {"name": "x"}})
                .to_string()
                .into(),
            400,
            "BadRequest",
        ),
        (
            Method::POST,
            cms.into(),
            "application/json",
            json!({"metadata": {"name": "x", "namespace": "other"}})
                .to_string()
                .into(),
            400,
            "BadRequest",
        ),
        (
            Method::POST,
            format!("{cms}?fieldValidation=Strict"),
            "application/json",
            json!({"metadata": {"name": "x"}, "dta": {}}).to_string().into(),
            400,
            "BadRequest",
        ),
        (
            Method::POST,
            format!("{cms}?dryRun=Some"),
            "application/json",
            json!({"metadata": {"name": "x"}}).to_string().into(),
            400,
            "BadRequest",
        ),
        (
            Method::PATCH,
            format!("{cms}/x"),
            "application/json",
            b"{}".to_vec(),
            415,
            "UnsupportedMediaType",
        ),
        (
            Method::PATCH,
            format!("{cms}/none"),
            "application/merge-patch+json",
            b"{}".to_vec(),
            404,
            "NotFound",
        ),
        (
            Method::PATCH,
            format!("{cms}/none"),
            "application/json-patch+json",
            b"{\"op\":1}".to_vec(),
            400,
            "BadRequest",
        ),
        (
            Method::PATCH,
            format!("{cms}/x"),
            "application/apply-patch+yaml",
            b"kind: [".to_vec(),
            400,
            "BadRequest",
        ),
        (
            Method::GET,
            format!("{cms}?labelSelector=a%20b"),
            "",
            vec![],
            400,
            "BadRequest",
        ),
        (
            Method::GET,
            format!("{cms}?fieldSelector=data.a%3Db"),
            "",
            vec![],
            400,
            "BadRequest",
        ),
        (Method::GET, "/api/v1/unicorns".into(), "", vec![], 404, "NotFound"),
        (
            Method::GET,
            "/apis/none.io/v1/things".into(),
            "",
            vec![],
            404,
            "NotFound",
        ),
        (Method::GET, "/nothing".into(), "", vec![], 404, "NotFound"),
        (
            Method::PUT,
            "/api/v1/configmaps".into(),
            "application/json",
            b"{}".to_vec(),
            405,
            "MethodNotAllowed",
        ),
        (
            Method::OPTIONS,
            "/api/v1/pods".into(),
            "",
            vec![],
            405,
            "MethodNotAllowed",
        ),
        (
            Method::DELETE,
            "/api/v1/namespaces".into(),
            "",
            vec![],
            405,
            "MethodNotAllowed",
        ),
    ];
    for (method, path, kind, body, code, reason) in cases {
        let (got, status) = s.send(method.clone(), &path, kind, body).await;
        assert_eq!(
            (got, status["reason"].as_str()),
            (code, Some(reason)),
            "{method} {path}: {status}"
        );
        assert_eq!(
            (status["kind"].as_str(), status["code"].as_u64()),
            (Some("Status"), Some(u64::from(code))),
            "{method} {path}"
        );
    }
    let request = Request::builder()
        .uri("/api/v1/pods")
        .header("accept", "text/html")
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .unwrap();
    assert_eq!(
        s.server.service_as_admin().oneshot(request).await.unwrap().status(),
        406
    );
}

#[tokio::test]
async fn who_may_what() {
    let s = Local::new().await;
    let get = |user: Identity, path: &'static str| {
        let s = &s;
        async move { s.raw(user, Method::GET, path, "", vec![]).await.0 }
    };
    for path in ["/version", "/healthz", "/livez", "/readyz"] {
        assert_eq!(get(Identity::anonymous(), path).await, 200, "{path}");
    }
    for path in ["/api", "/apis", "/openapi/v3", "/api/v1/pods", "/nothing"] {
        assert_eq!(get(Identity::anonymous(), path).await, 401, "{path}");
    }
    let bob = || Identity::user("bob", &[]);
    assert_eq!(get(bob(), "/apis").await, 200);
    assert_eq!(get(bob(), "/api/v1/pods").await, 403);
    // Without identity or token in the request itself nobody is anybody.
    let request = Request::builder()
        .uri("/api/v1/pods")
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .unwrap();
    assert_eq!(s.server.handle(request).await.status(), 401);
    let request = Request::builder()
        .uri("/version")
        .header("authorization", "Bearer a.b.c")
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .unwrap();
    assert_eq!(
        s.server.handle(request).await.status(),
        401,
        "a wrong token is refused even where none is needed"
    );
    s.created("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", json!({"metadata": {"name": "bob"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"}, "subjects": [{"kind": "User", "name": "bob", "apiGroup": "rbac.authorization.k8s.io"}]})).await;
    assert_eq!(get(bob(), "/api/v1/pods").await, 200, "aggregated roles count");
    assert_eq!(get(bob(), "/api/v1/namespaces/default/secrets").await, 403);
    let ask = json!({"spec": {"user": "bob", "resourceAttributes": {"verb": "list", "resource": "pods", "namespace": "default"}}});
    let review = s
        .created("/apis/authorization.k8s.io/v1/subjectaccessreviews", ask)
        .await;
    assert_eq!(review["status"]["allowed"], true);
    let impersonate = |user: Identity| {
        let request = Request::builder()
            .uri("/api/v1/pods")
            .header("impersonate-user", "bob")
            .body(http_body_util::Empty::<bytes::Bytes>::new())
            .unwrap();
        s.server.service(user).oneshot(request)
    };
    assert_eq!(impersonate(Identity::admin("a")).await.unwrap().status(), 200);
    assert_eq!(impersonate(Identity::user("eve", &[])).await.unwrap().status(), 403);
}

#[tokio::test]
async fn tokens_are_bound() {
    let s = Local::new().await;
    s.created(PODS, pod("p")).await;
    let uid = s.get(&format!("{PODS}/p")).await.1["metadata"]["uid"].clone();
    let request = |spec: Value| json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec});
    let path = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let bound = json!({"audiences": ["istio-ca"], "expirationSeconds": 3600, "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "p", "uid": uid}});
    let token = s.created(path, request(bound)).await["status"]["token"]
        .as_str()
        .unwrap()
        .to_owned();
    let review = |audiences: Value| {
        let (s, token) = (&s, token.clone());
        async move {
            s.created(
                "/apis/authentication.k8s.io/v1/tokenreviews",
                json!({"spec": {"token": token, "audiences": audiences}}),
            )
            .await["status"]
                .clone()
        }
    };
    let good = review(json!(["istio-ca", "other"])).await;
    assert_eq!(
        (good["authenticated"].as_bool(), &good["audiences"]),
        (Some(true), &json!(["istio-ca"]))
    );
    assert_eq!(good["user"]["username"], "system:serviceaccount:default:default");
    assert_eq!(
        good["user"]["extra"]["authentication.kubernetes.io/pod-name"],
        json!(["p"])
    );
    assert_eq!(
        review(json!([])).await["authenticated"],
        Value::Null,
        "not an API audience"
    );
    let parts: Vec<&str> = token.split('.').collect();
    let none = format!("{}.{}.", "eyJhbGciOiJub25lIn0", parts[1]);
    for bad in [
        none,
        format!("{}.{}.{}", parts[0], parts[1], "AAAA"),
        "x".into(),
        String::new(),
    ] {
        let status = s
            .created(
                "/apis/authentication.k8s.io/v1/tokenreviews",
                json!({"spec": {"token": bad, "audiences": ["istio-ca"]}}),
            )
            .await["status"]
            .clone();
        assert_ne!(status["authenticated"], true, "{bad}");
    }
    s.send(Method::DELETE, &format!("{PODS}/p"), "", vec![]).await;
    let gone = review(json!(["istio-ca"])).await;
    assert!(
        gone["authenticated"] != true && gone["error"].as_str().unwrap().contains("does not exist any more"),
        "{gone}"
    );
    assert_eq!(s.post(path, request(json!({"expirationSeconds": 10}))).await.0, 422);
    let foreign = json!({"boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "missing"}});
    assert_eq!(s.post(path, request(foreign)).await.0, 404);
}

#[tokio::test]
async fn lists_follow_many_writers() {
    let s = Local::new().await;
    let api: Api<ConfigMap> = s.api();
    let stream = api.watch(&WatchParams::default().timeout(30), "0").await.unwrap();
    let writers = (0..8).map(|w| {
        let api = api.clone();
        async move {
            for i in 0..25 {
                api.create(&PostParams::default(), &cm(&format!("c-{w}-{i}"), "1"))
                    .await
                    .unwrap();
            }
        }
    });
    let (_, names) = tokio::join!(futures::future::join_all(writers), async {
        let mut names = std::collections::HashSet::new();
        let mut stream = pin!(stream);
        while names.len() < 200 {
            if let WatchEvent::Added(o) = tokio::time::timeout(Duration::from_secs(20), stream.next())
                .await
                .unwrap()
                .unwrap()
                .unwrap()
            {
                assert!(names.insert(o.metadata.name.unwrap()));
            }
        }
        names
    });
    assert_eq!(names.len(), 200);
    let list = api.list(&ListParams::default()).await.unwrap();
    assert_eq!(list.items.len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_certificates_are_refused() {
    let c = Cluster::start().await;
    let (cert, key) = Ca::new("somebody else").client("admin", &["system:masters"]);
    std::fs::write(c.dir.path().join("f.crt"), cert).unwrap();
    std::fs::write(c.dir.path().join("f.key"), key).unwrap();
    std::fs::write(c.dir.path().join("ca.crt"), &c.ca.pem).unwrap();
    let curl = |args: &[&str]| {
        let mut command = tokio::process::Command::new("curl");
        command
            .args([
                "-s",
                "-m",
                "10",
                "--cacert",
                "ca.crt",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
            ])
            .args(args);
        command
            .arg(format!("https://127.0.0.1:{}/api/v1/pods", c.address.port()))
            .current_dir(c.dir.path());
        command
    };
    let out = curl(&["--cert", "f.crt", "--key", "f.key"])
        .output()
        .await
        .expect("curl is not installed; install the package curl");
    assert!(!out.status.success(), "the handshake must fail");
    let out = curl(&[]).output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "401");
    std::fs::write(c.dir.path().join("long"), format!("X-Long: {}\n", "x".repeat(200_000))).unwrap();
    for version in ["--http1.1", "--http2"] {
        let out = curl(&[version, "-H", "@long"]).output().await.unwrap();
        let code = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(matches!(code.as_str(), "431" | "000"), "{version}: {code}");
    }
    let out = curl(&["--http1.1", "-H", "Authorization: Basic YTpi"])
        .output()
        .await
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout), "401");
}

/// All places of a document, as pointers.
fn places(value: &Value, at: String, out: &mut Vec<String>) {
    match value {
        Value::Object(m) => m
            .iter()
            .for_each(|(k, v)| places(v, format!("{at}/{}", k.replace('~', "~0").replace('/', "~1")), out)),
        Value::Array(l) => l
            .iter()
            .enumerate()
            .for_each(|(i, v)| places(v, format!("{at}/{i}"), out)),
        _ => {}
    }
    out.push(at);
}

/// Whatever stands where in a document, the answer is never "the server failed". The seed is fixed, so a failure repeats.
#[tokio::test]
async fn mangled_documents_never_break_the_server() {
    use rand::{Rng, SeedableRng, seq::IndexedRandom};
    let s = Local::new().await;
    s.created(PODS, pod("held")).await;
    let template = json!({"metadata": {"labels": {"a": "b"}, "annotations": {"x": "y"}}, "spec": {"serviceAccountName": "default",
        "containers": [{"name": "c", "image": "i:1", "command": ["x"], "ports": [{"containerPort": 80, "name": "http"}],
            "env": [{"name": "A", "value": "b"}, {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            "resources": {"limits": {"cpu": "1"}}, "readinessProbe": {"httpGet": {"path": "/", "port": 80}}, "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
        "volumes": [{"name": "v", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}, {"configMap": {"name": "x", "items": [{"key": "a", "path": "b"}]}}]}}],
        "tolerations": [{"key": "a"}]}});
    let crd = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "things.x.io"}, "spec": {"group": "x.io",
        "scope": "Namespaced", "names": {"kind": "Thing", "plural": "things"}, "versions": [{"name": "v1", "served": true, "storage": true,
        "subresources": {"status": {}, "scale": {"specReplicasPath": ".spec.n", "statusReplicasPath": ".status.n"}},
        "additionalPrinterColumns": [{"name": "N", "type": "integer", "jsonPath": ".spec.n"}],
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object", "properties": {"n": {"type": "integer", "default": 1},
            "l": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"}}}, "status": {"type": "object", "properties": {"n": {"type": "integer"}}}}}}}]}});
    let (code, v) = s
        .post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd.clone())
        .await;
    assert_eq!(code, 201, "{v}");
    let seeds: Vec<(&str, Value)> = vec![
        (PODS, {
            let mut p = template.clone();
            p["metadata"]["name"] = "x".into();
            p
        }),
        (
            "/apis/apps/v1/namespaces/default/deployments",
            json!({"metadata": {"name": "x", "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "n", "uid": "u"}]},
            "spec": {"replicas": 1, "selector": {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "a", "operator": "Exists"}]}, "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}, "template": template.clone()}}),
        ),
        (
            "/apis/batch/v1/namespaces/default/jobs",
            json!({"metadata": {"name": "x"}, "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}}),
        ),
        (
            "/apis/batch/v1/namespaces/default/cronjobs",
            json!({"metadata": {"name": "x"}, "spec": {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}}}}),
        ),
        (
            "/api/v1/namespaces/default/services",
            json!({"metadata": {"name": "x"}, "spec": {"type": "NodePort", "selector": {"a": "b"}, "ports": [{"name": "p", "port": 80, "targetPort": "http"}], "clusterIPs": []}}),
        ),
        (
            "/api/v1/namespaces/default/secrets",
            json!({"metadata": {"name": "x"}, "stringData": {"a": "b"}, "data": {"c": "ZA=="}}),
        ),
        (
            "/api/v1/namespaces",
            json!({"metadata": {"name": "x"}, "spec": {"finalizers": ["kubernetes"]}}),
        ),
        (
            "/api/v1/namespaces/default/endpoints",
            json!({"metadata": {"name": "x"}, "subsets": [{"addresses": [{"ip": "1.2.3.4"}], "ports": [{"port": 1}]}]}),
        ),
        (
            "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
            json!({"metadata": {"name": "x"}, "addressType": "IPv4", "endpoints": [{"addresses": ["1.2.3.4"]}], "ports": [{"port": 1}]}),
        ),
        (
            "/apis/rbac.authorization.k8s.io/v1/clusterroles",
            json!({"metadata": {"name": "x"}, "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}], "aggregationRule": {"clusterRoleSelectors": [{"matchLabels": {"a": "b"}}]}}),
        ),
        (
            "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings",
            json!({"metadata": {"name": "x"}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"}, "subjects": [{"kind": "User", "name": "u"}]}),
        ),
        (
            "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
            json!({"metadata": {"name": "x"}, "webhooks": [{"name": "a.b.c", "failurePolicy": "Ignore", "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "clientConfig": {"service": {"name": "s", "namespace": "n"}}, "rules": [{"apiGroups": ["none"], "apiVersions": ["*"], "resources": ["none"], "operations": ["CREATE"]}], "namespaceSelector": {"matchLabels": {"a": "b"}}}]}),
        ),
        ("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", {
            let mut c = crd;
            c["metadata"]["name"] = "others.x.io".into();
            c["spec"]["names"] = json!({"kind": "Other", "plural": "others"});
            c
        }),
        (
            "/apis/x.io/v1/namespaces/default/things",
            json!({"metadata": {"name": "x"}, "spec": {"n": 3, "l": ["a", "b"]}, "status": {"n": 1}}),
        ),
        (
            "/apis/autoscaling/v1/namespaces/default/horizontalpodautoscalers",
            json!({"metadata": {"name": "x"}, "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "x"}, "maxReplicas": 3, "targetCPUUtilizationPercentage": 50}}),
        ),
        (
            "/apis/events.k8s.io/v1/namespaces/default/events",
            json!({"metadata": {"name": "x"}, "regarding": {"namespace": "default", "kind": "Pod", "name": "x"}, "note": "n", "reason": "r", "type": "Normal"}),
        ),
        (
            "/apis/policy/v1/namespaces/default/poddisruptionbudgets",
            json!({"metadata": {"name": "x"}, "spec": {"minAvailable": 1, "selector": {"matchLabels": {"a": "b"}}}}),
        ),
        (
            "/apis/authorization.k8s.io/v1/subjectaccessreviews",
            json!({"spec": {"user": "u", "groups": ["g"], "resourceAttributes": {"verb": "get", "resource": "pods"}}}),
        ),
        (
            "/apis/authentication.k8s.io/v1/tokenreviews",
            json!({"spec": {"token": "t", "audiences": ["a"]}}),
        ),
        (
            "/api/v1/namespaces/default/serviceaccounts/default/token",
            json!({"spec": {"audiences": ["a"], "expirationSeconds": 600, "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": "held"}}}),
        ),
    ];
    let junk = [
        json!(null),
        json!(true),
        json!(-1),
        json!(1.5),
        json!(u64::MAX),
        json!(""),
        json!("x y/z"),
        json!([]),
        json!([[]]),
        json!([null]),
        json!({}),
        json!({"": null}),
        json!({"a": {"b": []}}),
    ];
    let mut rng = rand::rngs::StdRng::seed_from_u64(7);
    let mut outcomes = std::collections::BTreeMap::<u16, usize>::new();
    for round in 0..60 {
        for (path, seed) in &seeds {
            let mut document = seed.clone();
            if round > 0 {
                for _ in 0..rng.random_range(1..4) {
                    let mut all = Vec::new();
                    places(&document, String::new(), &mut all);
                    let place = all.choose(&mut rng).unwrap().clone();
                    *document.pointer_mut(&place).unwrap() = junk.choose(&mut rng).unwrap().clone();
                }
            }
            let mut typed = document.clone();
            if let Some(m) = typed.as_object_mut() {
                let (group, kind) = match path.split('/').collect::<Vec<_>>()[1] {
                    "api" => ("v1".to_owned(), *path.split('/').collect::<Vec<_>>().last().unwrap()),
                    _ => {
                        let p: Vec<&str> = path.split('/').collect();
                        (format!("{}/{}", p[2], p[3]), *p.last().unwrap())
                    }
                };
                let kinds = [
                    ("pods", "Pod"),
                    ("deployments", "Deployment"),
                    ("jobs", "Job"),
                    ("cronjobs", "CronJob"),
                    ("services", "Service"),
                    ("secrets", "Secret"),
                    ("namespaces", "Namespace"),
                    ("endpoints", "Endpoints"),
                    ("endpointslices", "EndpointSlice"),
                    ("clusterroles", "ClusterRole"),
                    ("rolebindings", "RoleBinding"),
                    ("validatingwebhookconfigurations", "ValidatingWebhookConfiguration"),
                    ("customresourcedefinitions", "CustomResourceDefinition"),
                    ("things", "Thing"),
                    ("horizontalpodautoscalers", "HorizontalPodAutoscaler"),
                    ("events", "Event"),
                    ("poddisruptionbudgets", "PodDisruptionBudget"),
                ];
                if let Some((_, kind)) = kinds.iter().find(|(p, _)| *p == kind) {
                    m.insert("apiVersion".into(), group.into());
                    m.insert("kind".into(), (*kind).into());
                }
            }
            let name = seed["metadata"]["name"].as_str().unwrap_or("x");
            let one = format!("{path}/{name}");
            let body = document.to_string().into_bytes();
            let calls = [
                (Method::POST, (*path).to_owned(), "application/json", body.clone()),
                (
                    Method::PUT,
                    one.clone(),
                    "application/json",
                    typed.to_string().into_bytes(),
                ),
                (
                    Method::PUT,
                    format!("{one}/status"),
                    "application/json",
                    typed.to_string().into_bytes(),
                ),
                (Method::PATCH, one.clone(), "application/merge-patch+json", body.clone()),
                (
                    Method::PATCH,
                    one.clone(),
                    "application/strategic-merge-patch+json",
                    body,
                ),
                (
                    Method::PATCH,
                    format!("{one}?fieldManager=f&force=true"),
                    "application/apply-patch+yaml",
                    typed.to_string().into_bytes(),
                ),
                (Method::GET, format!("{path}?labelSelector=a"), "", vec![]),
                (Method::DELETE, one, "", vec![]),
            ];
            for (method, at, kind, body) in calls {
                let shown = String::from_utf8_lossy(&body).into_owned();
                let (code, status) = s.send(method.clone(), &at, kind, body).await;
                assert!(code < 500, "round {round}: {method} {at} {kind}: {status}\n{shown}");
                if round == 0 && method == Method::POST {
                    assert_eq!(code, 201, "the unmangled document is good: {at}: {status}");
                }
                *outcomes.entry(code).or_default() += 1;
            }
        }
    }
    assert!(
        outcomes[&201] > 100 && outcomes[&422] > 100 && outcomes[&400] > 100,
        "{outcomes:?}"
    );
}
