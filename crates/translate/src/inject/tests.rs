//! Golden pods (`goldens/<case>.in.yaml` → `<case>.out.yaml`), the decision table, patches and repeated injection.
//!
//! A case's first document may be `{config, values, mesh, revision, namespace, native}`; `UPDATE_GOLDEN=1` rewrites the outputs.

use std::path::{Path, PathBuf};

use mantlet_api::yaml;
use serde_json::{Value, json};

use super::*;

mod selectors;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/inject/goldens")
}

struct Case {
    pod: Value,
    config: InjectConfig,
    namespace: String,
}

fn load(path: &Path) -> Case {
    let mut documents = yaml::read_all(&std::fs::read_to_string(path).unwrap()).unwrap();
    let pod = documents.pop().expect("a pod");
    let head = documents.pop().unwrap_or_else(|| json!({}));
    let empty = json!({});
    let part = |key: &str| head.get(key).unwrap_or(&empty);
    let revision = head.get("revision").and_then(Value::as_str).unwrap_or_default();
    let mut config = InjectConfig::from_values(part("config"), part("values"), part("mesh").clone(), revision).unwrap();
    config.native_sidecars = head.get("native") == Some(&json!(true));
    config.values.global.tag = "test".into();
    let namespace = head
        .get("namespace")
        .and_then(Value::as_str)
        .unwrap_or("default")
        .to_string();
    Case { pod, config, namespace }
}

fn run(case: &Case) -> Result<Decision, InjectError> {
    let request = PodRequest {
        pod: Some(&case.pod),
        namespace: &case.namespace,
        ..Default::default()
    };
    inject(&request, &case.config)
}

#[test]
fn golden_cases() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut seen = 0;
    let mut paths: Vec<PathBuf> = std::fs::read_dir(goldens())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some(name) = name.strip_suffix(".in.yaml") else {
            continue;
        };
        seen += 1;
        let case = load(&path);
        let out = match run(&case) {
            Ok(Decision::Inject(injected)) => {
                let mut patched = case.pod.clone();
                let patch: json_patch::Patch = serde_json::from_value(injected.patch.clone()).unwrap();
                json_patch::patch(&mut patched, &patch).unwrap();
                assert_eq!(patched, injected.pod, "{name}: the patch makes another pod");
                repeated(name, &case, &injected.pod);
                let warnings: Vec<String> = injected.warnings.iter().map(|w| format!("# warning: {w}\n")).collect();
                format!("{}{}", warnings.concat(), yaml::write(&injected.pod))
            }
            Ok(Decision::Skip { reason, .. }) => format!("# skipped: {reason}\n"),
            Err(error) => format!("# refused: {error}\n"),
        };
        let golden = goldens().join(format!("{name}.out.yaml"));
        if update {
            std::fs::write(&golden, &out).unwrap();
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        assert!(out == expected, "{name}: differs from {}:\n{out}", golden.display());
    }
    assert!(seen >= 12, "only {seen} cases found");
}

/// A second injection gives the same pod (S5.14).
fn repeated(name: &str, case: &Case, pod: &Value) {
    let request = PodRequest {
        pod: Some(pod),
        namespace: &case.namespace,
        ..Default::default()
    };
    match inject(&request, &case.config).unwrap() {
        Decision::Inject(again) => {
            assert_eq!(&again.pod, pod, "{name}: a second injection changes the pod");
        }
        Decision::Skip { reason, .. } => panic!("{name}: a second injection is skipped: {reason}"),
    }
}

fn pod(labels: Value, annotations: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "labels": labels, "annotations": annotations},
        "spec": {"containers": [{"name": "app", "image": "a"}]},
    })
}

#[test]
fn decisions() {
    let config = |text: &str| InjectConfig::read(text, "", "", "").unwrap();
    let choose = |labels: Value, annotations: Value, config: &InjectConfig| {
        decide(&pod(labels, annotations), "default", config).inject
    };
    const KEY: &str = "sidecar.istio.io/inject";
    let enabled = config("policy: enabled");
    let disabled = config("policy: disabled");
    assert!(choose(json!({}), json!({}), &enabled));
    assert!(!choose(json!({}), json!({}), &disabled));
    assert!(!choose(json!({KEY: "false"}), json!({}), &enabled));
    assert!(choose(json!({KEY: "true"}), json!({}), &disabled));
    assert!(choose(json!({}), json!({KEY: "true"}), &disabled));
    assert!(!choose(json!({}), json!({KEY: "false"}), &enabled));
    // The label wins over the annotation, also when it says nothing sensible.
    assert!(!choose(json!({KEY: "false"}), json!({KEY: "true"}), &enabled));
    assert!(!choose(json!({KEY: "junk"}), json!({KEY: "true"}), &disabled));
    assert!(choose(json!({KEY: "True"}), json!({}), &enabled));
    assert!(!choose(json!({KEY: "True"}), json!({}), &disabled));
    let junk = decide(&pod(json!({KEY: "yes"}), json!({})), "default", &enabled);
    assert!(
        junk.inject && junk.warnings[0].contains("neither true nor false"),
        "{junk:?}"
    );
    let never = config("policy: enabled\nneverInjectSelector: [{matchLabels: {a: b}}, {}]");
    assert!(!choose(json!({"a": "b"}), json!({}), &never));
    assert!(choose(json!({"a": "c"}), json!({}), &never));
    assert!(
        choose(json!({"a": "b", KEY: "true"}), json!({}), &never),
        "a decided label is not overridden"
    );
    let always = config(
        "policy: disabled\nalwaysInjectSelector: [{matchExpressions: [{key: a, operator: Exists}]}]\nneverInjectSelector: [{matchLabels: {a: nope}}]",
    );
    assert!(choose(json!({"a": "x"}), json!({}), &always));
    assert!(!choose(json!({"b": "x"}), json!({}), &always));
    assert!(!choose(json!({"a": "nope"}), json!({}), &always), "never comes first");
    let broken = config("policy: sometimes");
    assert!(!choose(json!({KEY: "true"}), json!({}), &broken));
    for namespace in IGNORED_NAMESPACES {
        assert!(!decide(&pod(json!({KEY: "true"}), json!({})), namespace, &enabled).inject);
    }
    let mut host = pod(json!({KEY: "true"}), json!({}));
    host["spec"]["hostNetwork"] = json!(true);
    assert!(!decide(&host, "default", &enabled).inject);
}

#[test]
fn bad_annotations_are_refused() {
    for (name, value) in [
        ("sidecar.istio.io/interceptionMode", "MAYBE"),
        ("traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0.0/33"),
        ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "*"),
        ("traffic.sidecar.istio.io/includeInboundPorts", "80,http"),
        ("traffic.sidecar.istio.io/excludeInboundPorts", "*"),
        ("traffic.sidecar.istio.io/excludeOutboundPorts", "65536"),
        ("traffic.sidecar.istio.io/excludeInterfaces", "eth0;reboot"),
        ("status.sidecar.istio.io/port", "-1"),
        ("readiness.status.sidecar.istio.io/periodSeconds", "2s"),
        ("sidecar.istio.io/rewriteAppHTTPProbers", "sure"),
        ("sidecar.istio.io/proxyCPU", "a lot"),
        ("sidecar.istio.io/userVolume", "[]"),
        ("sidecar.istio.io/userVolumeMount", "{"),
        ("prometheus.istio.io/merge-metrics", "no way"),
        ("proxy.istio.io/config", "concurrency: many"),
        ("proxy.istio.io/config", "- a"),
        ("proxy.istio.io/config", "a: ["),
    ] {
        let pod = pod(json!({}), json!({name: value}));
        let request = PodRequest {
            pod: Some(&pod),
            namespace: "default",
            ..Default::default()
        };
        let error = inject(&request, &InjectConfig::default()).expect_err(value);
        assert!(
            matches!(&error, InjectError::Annotation { name: n, .. } if n == name),
            "{name}={value}: {error}"
        );
    }
    let unknown = pod(json!({}), json!({"inject.istio.io/templates": "sidecar,mine"}));
    let request = PodRequest {
        pod: Some(&unknown),
        namespace: "default",
        ..Default::default()
    };
    let error = inject(&request, &InjectConfig::default()).unwrap_err();
    assert_eq!(error, InjectError::Template { name: "mine".into() });
}

#[test]
fn not_a_pod() {
    for value in [
        json!(null),
        json!([]),
        json!({}),
        json!({"spec": {}}),
        json!({"spec": {"containers": []}}),
        json!({"spec": {"containers": [1]}}),
    ] {
        let request = PodRequest {
            pod: Some(&value),
            namespace: "default",
            ..Default::default()
        };
        assert!(
            matches!(inject(&request, &InjectConfig::default()), Err(InjectError::NotAPod(_))),
            "{value}"
        );
    }
}

#[test]
fn bad_configuration() {
    for (config, values, mesh) in [
        ("policy: [", "", ""),
        ("neverInjectSelector: x", "", ""),
        ("", "global: {proxy: {privileged: 3}}", ""),
        ("", "", "trustDomain: 'no good'"),
    ] {
        let result = InjectConfig::read(config, values, mesh, "");
        assert!(
            matches!(result, Err(InjectError::Config(_))),
            "{config} {values} {mesh}: {result:?}"
        );
    }
}

#[test]
fn webhook_path() {
    let env = path_env("/inject/cluster/c--slash--1/net/n1/FOO/bar/odd");
    assert_eq!(
        env.into_iter().collect::<Vec<_>>(),
        [
            ("FOO".to_string(), "bar".to_string()),
            ("ISTIO_META_CLUSTER_ID".into(), "c/1".into()),
            ("ISTIO_META_NETWORK".into(), "n1".into())
        ]
    );
    assert!(path_env("/inject").is_empty() && path_env("/inject/").is_empty());
    let pod = pod(json!({}), json!({}));
    let env = path_env("/inject/cluster/c1");
    let request = PodRequest {
        pod: Some(&pod),
        namespace: "default",
        env,
        ..Default::default()
    };
    let Decision::Inject(injected) = inject(&request, &InjectConfig::default()).unwrap() else {
        panic!("skipped")
    };
    let env = injected.pod["spec"]["containers"][1]["env"].as_array().unwrap();
    let set: Vec<_> = env.iter().filter(|e| e["name"] == "ISTIO_META_CLUSTER_ID").collect();
    assert_eq!(set, [&json!({"name": "ISTIO_META_CLUSTER_ID", "value": "c1"})]);
}

#[test]
fn owners() {
    let owned = |kind: &str, name: &str, labels: Value| {
        Owner::of_pod(
            &json!({"metadata": {"name": "p", "labels": labels, "ownerReferences": [
                {"kind": "Node", "name": "n", "apiVersion": "v1"},
                {"kind": kind, "name": name, "apiVersion": "x/v1", "controller": true},
            ]}}),
            "ns",
        )
    };
    let deployment = owned("ReplicaSet", "web-v1-5f7d", json!({"pod-template-hash": "5f7d"}));
    assert_eq!(
        deployment.uri(),
        "kubernetes://apis/apps/v1/namespaces/ns/deployments/web-v1"
    );
    assert_eq!(owned("ReplicaSet", "web-5f7d", json!({})).kind, "ReplicaSet");
    assert_eq!(owned("Job", "backup-28471234", json!({})).name, "backup");
    assert_eq!(owned("Job", "backup-x", json!({})).kind, "Job");
    assert_eq!(
        owned("StatefulSet", "db", json!({})).uri(),
        "kubernetes://apis/x/v1/namespaces/ns/statefulsets/db"
    );
    let bare = Owner::of_pod(&json!({"metadata": {"name": "p"}}), "ns");
    assert_eq!((bare.name.as_str(), bare.kind.as_str()), ("p", "Pod"));
}

#[test]
fn manifests() {
    let documents = yaml::read_all(
        "apiVersion: v1\nkind: Service\nmetadata: {name: s}\n---\n\
         apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: shop}\nspec:\n  template:\n    metadata: {labels: {app: web}}\n    spec: {containers: [{name: c, image: i}]}\n---\n\
         apiVersion: batch/v1\nkind: CronJob\nmetadata: {name: cron}\nspec: {jobTemplate: {spec: {template: {spec: {hostNetwork: true, containers: [{name: c}]}}}}}\n---\n\
         apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: p}\n  spec: {containers: [{name: c}]}\n",
    )
    .unwrap();
    let (out, warnings) = kube_inject(documents.clone(), "default", &InjectConfig::default()).unwrap();
    assert_eq!(out[0], documents[0]);
    let names = |pod: &Value| -> Vec<String> {
        pod["spec"]["containers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["name"].as_str().unwrap().into())
            .collect()
    };
    assert_eq!(names(&out[1]["spec"]["template"]), ["c", "istio-proxy"]);
    let env = out[1]["spec"]["template"]["spec"]["containers"][1]["env"]
        .as_array()
        .unwrap();
    assert!(
        env.iter()
            .any(|e| e["value"] == "kubernetes://apis/apps/v1/namespaces/shop/deployments/web")
    );
    assert_eq!(out[2], documents[2]);
    assert!(
        warnings[0].contains("CronJob default/cron has host networking enabled"),
        "{warnings:?}"
    );
    assert_eq!(names(&out[3]["items"][0]), ["c", "istio-proxy"]);
    let broken = vec![json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": {}})];
    assert!(kube_inject(broken, "default", &InjectConfig::default()).is_err());
}
