//! Whole runs of `migrate` and `x authz convert` on files, without a cluster.

use std::fs;

use super::*;

const SERVICES: &str = "apiVersion: v1
kind: Service
metadata: {name: productpage, namespace: default}
spec: {selector: {app: productpage}, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: details, namespace: default}
spec: {selector: {app: details}, ports: [{name: http, port: 9080}]}
";

/// Seed 003's mesh-wide policy and its two rules for clients.
const MESH_POLICY: &str = "apiVersion: \"authentication.istio.io/v1alpha1\"
kind: \"MeshPolicy\"
metadata:
  name: \"default\"
spec:
  peers:
  - mtls: {}
---
apiVersion: \"networking.istio.io/v1alpha3\"
kind: \"DestinationRule\"
metadata:
  name: \"destination\"
spec:
  host: \"*.local\"
  trafficPolicy:
    tls:
      mode: ISTIO_MUTUAL
";

/// Seed 004's role with its lines straightened, and what it needs to be in force.
const ROLE: &str = "apiVersion: \"rbac.istio.io/v1alpha1\"
kind: ServiceRole
metadata:
  name: service-viewer
  namespace: default
spec:
  rules:
  - services: [\"*\"]
    methods: [\"GET\"]
    constraints:
    - key: \"destination.labels[app]\"
      values: [\"productpage\", \"details\", \"reviews\", \"ratings\"]
---
apiVersion: rbac.istio.io/v1alpha1
kind: ServiceRoleBinding
metadata: {name: viewers, namespace: default}
spec:
  subjects: [{user: \"*\"}]
  roleRef: {kind: ServiceRole, name: service-viewer}
";

const CONFIG: &str = "---
apiVersion: rbac.istio.io/v1alpha1
kind: ClusterRbacConfig
metadata: {name: default}
spec: {mode: ON_WITH_INCLUSION, inclusion: {namespaces: [default]}}
";

fn go(texts: &[&str], output: bool) -> (Outcome, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let files = texts
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let path = dir.path().join(format!("old{i}.yaml"));
            fs::write(&path, text).expect("a file");
            path
        })
        .collect();
    let new = dir.path().join("new.yaml");
    let args = Args {
        files,
        output: output.then(|| new.clone()),
        namespace: "default".into(),
        offline: true,
        ..Args::default()
    };
    let outcome = crate::install::block_on(run(&args)).expect("readable input");
    let written = fs::read_to_string(new).unwrap_or_default();
    let hide = dir.path().display().to_string();
    (
        Outcome {
            text: outcome.text.replace(&hide, "DIR"),
            code: outcome.code,
        },
        written,
    )
}

#[test]
fn the_mesh_policy_of_seed_003() {
    let (outcome, written) = go(&[MESH_POLICY], true);
    assert_eq!(
        outcome.text,
        "MeshPolicy default\n  -> PeerAuthentication istio-system/default\n1 other object(s) stay as they are.\n\
         DestinationRule destination: mutual TLS between workloads is automatic now; its tls settings may go.\n\
         1 former object(s), 1 modern one(s). Everything is kept.\n"
    );
    assert_eq!(outcome.code, 0);
    let objects = yaml::read_all(&written).expect("YAML");
    assert_eq!(
        objects[0],
        json!({"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": "istio-system"}, "spec": {"mtls": {"mode": "STRICT"}}})
    );
    assert_eq!(objects[1]["kind"], "DestinationRule");
    assert_eq!(objects.len(), 2);
}

#[test]
fn the_role_of_seed_004() {
    let role = format!("{ROLE}{CONFIG}");
    let (outcome, written) = go(&[&role, SERVICES], true);
    assert_eq!(outcome.code, 0, "{}", outcome.text);
    let objects = yaml::read_all(&written).expect("YAML");
    let policies: Vec<&Value> = objects.iter().filter(|o| o["kind"] == "AuthorizationPolicy").collect();
    let selected: Vec<&str> = policies
        .iter()
        .filter_map(|p| p.pointer("/spec/selector/matchLabels/app").and_then(Value::as_str))
        .collect();
    assert_eq!(selected, ["productpage", "details", "reviews", "ratings"]);
    assert!(
        policies
            .iter()
            .any(|p| p["metadata"]["name"] == "generated-namespace-deny-all" && p["spec"].get("rules").is_none())
    );
    let to = &policies.last().expect("some")["spec"]["rules"];
    assert!(
        policies
            .iter()
            .any(|p| p["spec"]["rules"] == json!([{"to": [{"operation": {"methods": ["GET"]}}]}])),
        "{to}"
    );
    // What is written is itself valid.
    for object in policies {
        let findings = mantlet_api::validate::object(object);
        assert!(findings.iter().all(|f| f.severity != Severity::Error), "{findings:?}");
    }
}

#[test]
fn without_a_configuration_the_report_says_what_was_assumed() {
    let (outcome, _) = go(&[ROLE, SERVICES], true);
    assert_eq!(outcome.code, 1);
    assert!(
        outcome.text.contains("there is no ClusterRbacConfig"),
        "{}",
        outcome.text
    );
    let (outcome, _) = go(&[ROLE, SERVICES], false);
    assert!(
        outcome.text.starts_with("# ServiceRole default/service-viewer\n")
            && !outcome.text.contains("global-deny-all")
            && outcome.text.contains("kind: AuthorizationPolicy"),
        "{}",
        outcome.text
    );
}

#[test]
fn wrong_input_is_named_by_place_and_nothing_is_written() {
    let (outcome, written) = go(&[&MESH_POLICY.replace("mtls", "mtsl")], true);
    assert_eq!((outcome.code, written.as_str()), (2, ""));
    assert!(
        outcome.text.contains("DIR/old0.yaml:7:") && outcome.text.contains("did you mean \"mtls\""),
        "{}",
        outcome.text
    );
}

#[test]
fn an_input_is_never_overwritten() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("old.yaml");
    fs::write(&path, MESH_POLICY).expect("a file");
    let args = Args {
        files: vec![path.clone()],
        output: Some(path.clone()),
        offline: true,
        ..Args::default()
    };
    assert!(crate::install::block_on(run(&args)).is_err());
    assert_eq!(fs::read_to_string(path).expect("still there"), MESH_POLICY);
}

#[test]
fn convert_wants_a_configuration() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("old.yaml");
    fs::write(&path, format!("{ROLE}---\n{SERVICES}")).expect("a file");
    let mut args = ConvertArgs {
        files: vec![path.clone()],
        services: vec![],
        root_namespace: None,
        allow_no_config: false,
    };
    let error = crate::install::block_on(convert(&args)).expect_err("refused");
    assert!(error.to_string().starts_with("no ClusterRbacConfig"), "{error}");
    args.allow_no_config = true;
    let outcome = crate::install::block_on(convert(&args)).expect("converted");
    assert!(
        outcome.text.contains("generated-service-viewer-rule0-svc0-target0"),
        "{}",
        outcome.text
    );
    fs::write(&path, format!("{ROLE}{CONFIG}---\n{SERVICES}")).expect("a file");
    args.allow_no_config = false;
    let outcome = crate::install::block_on(convert(&args)).expect("converted");
    assert!(
        outcome.text.contains("generated-namespace-deny-all"),
        "{}",
        outcome.text
    );
}
