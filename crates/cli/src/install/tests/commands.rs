//! `kube-inject` from files and what `version` counts.

use super::super::{kube_inject, version};
use super::*;

#[tokio::test]
async fn kube_inject_needs_no_cluster_when_all_files_are_given() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| -> String {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_string_lossy().into_owned()
    };
    let mut args = KubeInjectArgs {
        filename: file(
            "pod.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, image: i}]}\n",
        ),
        output: None,
        mesh_config_file: Some(file("mesh", "trustDomain: td.example\n")),
        inject_config_file: Some(file("config", "policy: enabled\n")),
        values_file: Some(file("values", "{\"global\": {\"tag\": \"t\"}}")),
        revision: String::new(),
        namespace: Some("shop".into()),
        istio_namespace: "istio-system".into(),
        kubeconfig: Some("/nonexistent".into()),
        context: None,
    };
    let out = kube_inject::run(&args).await.unwrap().text;
    let pod = yaml::read_one(&out).unwrap();
    let proxy = &pod["spec"]["containers"][1];
    assert_eq!(
        (&proxy["name"], &proxy["image"]),
        (&json!("istio-proxy"), &json!("mantlet/proxyv2:t"))
    );
    assert!(
        proxy["env"]
            .as_array()
            .unwrap()
            .contains(&json!({"name": "TRUST_DOMAIN", "value": "td.example"}))
    );

    // What comes out can go in again, and is the same.
    args.filename = file("again.yaml", &out);
    assert_eq!(
        yaml::read_one(&kube_inject::run(&args).await.unwrap().text).unwrap(),
        pod
    );

    args.filename = file("bad.yaml", "a: [");
    assert!(format!("{:#}", kube_inject::run(&args).await.unwrap_err()).contains("bad.yaml"));
    args.filename = dir.path().join("missing").to_string_lossy().into_owned();
    assert!(format!("{:#}", kube_inject::run(&args).await.unwrap_err()).contains("missing"));
    args.filename = file("pod2.yaml", "kind: Deployment\nmetadata: {name: d}\nspec: {}\n");
    assert!(
        format!("{:#}", kube_inject::run(&args).await.unwrap_err()).contains("Deployment shop/d has no pod template")
    );
    args.mesh_config_file = None;
    assert!(format!("{:#}", kube_inject::run(&args).await.unwrap_err()).contains("/nonexistent"));
}

#[test]
fn versions_are_those_of_running_containers() {
    let pod = |phase: &str, container: &str, image: &str| -> k8s_openapi::api::core::v1::Pod {
        serde_json::from_value(json!({
            "spec": {"containers": [{"name": "app", "image": "x:1"}, {"name": container, "image": image}]},
            "status": {"phase": phase},
        }))
        .unwrap()
    };
    let pods = [
        pod("Running", "istio-proxy", "r:5000/mantlet/proxyv2:0.1.0"),
        pod("Running", "istio-proxy", "mantlet/proxyv2:0.1.0"),
        pod("Running", "istio-proxy", "r:5000/mantlet/proxyv2"),
        pod("Pending", "istio-proxy", "mantlet/proxyv2:0.2.0"),
        pod("Running", "other", "mantlet/proxyv2:0.3.0"),
    ];
    let found: Vec<_> = version::count(&pods, "istio-proxy").into_iter().collect();
    assert_eq!(found, [("0.1.0".to_string(), 2), ("unknown".into(), 1)]);
}
