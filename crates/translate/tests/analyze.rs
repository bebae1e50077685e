//! Every message of analysis on a configuration that has the fault and on one that has not; and that none lacks its explanation.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use mantlet_api::diagnostic::Severity;
use mantlet_translate::analyze::{self, Finding, Input, Origin, Resource, table};
use serde_json::{Map, Value, json};

/// Messages that cases of this form cannot provoke, with the test that does.
const ELSEWHERE: [(&str, &str); 5] = [
    (
        "IST0001",
        "a list that the API server refuses: cli/src/analyze/collect.rs reports it",
    ),
    ("IST0143", "localhost_listener below"),
    ("MNT0003", "unknown_kind below"),
    (
        "MNT0005",
        "cli/src/analyze/tests.rs: texts_that_are_no_yaml_are_findings",
    ),
    (
        "MNT0007",
        "cli/src/analyze/tests.rs: texts_without_indentation_are_findings",
    ),
];

fn api_version(kind: &str) -> &'static str {
    match kind {
        "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication" => "security.istio.io/v1",
        "VirtualService" | "DestinationRule" | "Gateway" | "ServiceEntry" | "Sidecar" | "WorkloadEntry" => {
            "networking.istio.io/v1"
        }
        "EnvoyFilter" => "networking.istio.io/v1alpha3",
        "ProxyConfig" => "networking.istio.io/v1beta1",
        "Telemetry" => "telemetry.istio.io/v1",
        "MeshPolicy" | "Policy" => "authentication.istio.io/v1alpha1",
        "Deployment" | "StatefulSet" | "DaemonSet" => "apps/v1",
        "MutatingWebhookConfiguration" => "admissionregistration.k8s.io/v1",
        _ => "v1",
    }
}

/// `Kind namespace/name: value` in full. The flag says whether the key was marked.
fn object(key: &str, value: &Value) -> (Value, bool) {
    let marked = key.ends_with('!');
    let (kind, name) = key.trim_end_matches('!').split_once(' ').expect("Kind name");
    let mut metadata = Map::new();
    match name.split_once('/') {
        Some((namespace, name)) => {
            metadata.insert("namespace".into(), namespace.into());
            metadata.insert("name".into(), name.into());
        }
        None => {
            metadata.insert("name".into(), name.into());
        }
    }
    let mut rest = value.as_object().cloned().unwrap_or_default();
    for key in ["labels", "annotations"] {
        if let Some(map) = rest.remove(key) {
            metadata.insert(key.into(), map);
        }
    }
    let mut object = json!({"apiVersion": api_version(kind), "kind": kind, "metadata": metadata});
    if api_version(kind).contains(".istio.io") {
        object["spec"] = Value::Object(rest);
    } else {
        for (key, value) in rest {
            object[key] = value;
        }
    }
    (object, marked)
}

fn find(objects: &Map<String, Value>) -> (Vec<Finding>, Vec<String>) {
    let mut marked = Vec::new();
    let mut resources = Vec::new();
    for (key, value) in objects {
        let (value, is_marked) = object(key, value);
        let origin = Origin {
            file: "cases.yaml".into(),
            document: 0,
            line: 1,
        };
        let resource = Resource::read(value, "default", Some(origin)).expect("kind and name");
        if is_marked {
            let finding_name = if resource.namespace.is_empty() {
                format!("{} {}", resource.kind, resource.name)
            } else {
                format!("{} {}/{}", resource.kind, resource.namespace, resource.name)
            };
            marked.push(finding_name);
        }
        resources.push(resource);
    }
    (analyze::analyze(&Input::new(resources, "istio-system", false)), marked)
}

fn texts(findings: &[Finding]) -> String {
    findings
        .iter()
        .map(|f| format!("  [{}] ({}) {}: {}\n", f.message.code, f.object(), f.path, f.text))
        .collect()
}

#[test]
fn every_message_is_found_and_not_found() {
    let cases = mantlet_api::yaml::read_one(include_str!("analyze/cases.yaml")).unwrap();
    let mut faults = String::new();
    let mut bad: BTreeMap<&str, usize> = BTreeMap::new();
    let mut good: BTreeMap<&str, usize> = BTreeMap::new();
    for case in cases.as_array().unwrap() {
        let code = case["code"].as_str().unwrap();
        assert!(table::find(code).is_some(), "{code} is not in the table");
        for (name, objects) in case.as_object().unwrap() {
            let Some(objects) = objects.as_object() else { continue };
            let (findings, marked) = find(objects);
            let on: Vec<String> = findings
                .iter()
                .filter(|f| f.message.code == code)
                .map(Finding::object)
                .collect();
            if name.starts_with("bad") {
                *bad.entry(code).or_default() += 1;
                assert!(!marked.is_empty(), "{code} {name}: no object is marked");
                if !marked.iter().all(|m| on.contains(m)) {
                    faults.push_str(&format!(
                        "{code} {name}: not found on {marked:?}; found:\n{}",
                        texts(&findings)
                    ));
                }
            } else {
                *good.entry(code).or_default() += 1;
                if !on.is_empty() {
                    faults.push_str(&format!("{code} {name}: found on {on:?}:\n{}", texts(&findings)));
                }
            }
        }
    }
    for message in table::ALL {
        let elsewhere = ELSEWHERE.iter().any(|(code, _)| *code == message.code);
        let both = bad.contains_key(message.code) && good.contains_key(message.code);
        if !elsewhere && !both {
            faults.push_str(&format!("{} has no bad or no good case\n", message.code));
        }
    }
    assert!(faults.is_empty(), "{faults}");
}

#[test]
fn localhost_listener() {
    let objects = |port: u16| -> Vec<Finding> {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "a", "labels": {"app": "x"}},
            "spec": {"containers": [{"name": "istio-proxy"}]}, "status": {"phase": "Running"},
        });
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": "a"},
            "spec": {"selector": {"app": "x"}, "ports": [{"port": 80, "targetPort": 8080, "name": "http"}]},
        });
        let resources = [pod, service].map(|v| Resource::read(v, "a", None).unwrap());
        let mut input = Input::new(resources, "istio-system", true);
        input
            .localhost_ports
            .insert(("a".into(), "p".into()), BTreeSet::from([port]));
        analyze::analyze(&input)
    };
    let found = objects(8080);
    let finding = found.iter().find(|f| f.message.code == "IST0143").unwrap();
    assert_eq!(
        finding.text,
        "Port 8080 is exposed in a Service but listens on localhost. It will not be exposed to other pods."
    );
    assert!(!objects(9090).iter().any(|f| f.message.code == "IST0143"));
}

#[test]
fn unknown_kind() {
    let of = |version: &str| {
        let value = json!({
            "apiVersion": format!("security.istio.io/{version}"), "kind": "PeerAuthentication",
            "metadata": {"name": "p", "namespace": "a"}, "spec": {},
        });
        analyze::analyze(&Input::new(Resource::read(value, "a", None), "istio-system", false))
    };
    assert!(of("v7").iter().any(|f| f.message.code == "MNT0003"));
    assert!(of("v1").is_empty());
}

#[test]
fn findings_come_worst_first_and_once() {
    let objects = json!({
        "Namespace a": {},
        "AuthorizationPolicy a/p": {"rules": [
            {"from": [{"source": {"principals": ["spiffe://x", "spiffe://x"], "notNamespaces": ["gone"]}}]},
        ]},
    });
    let (findings, _) = find(objects.as_object().unwrap());
    let levels: Vec<Severity> = findings.iter().map(|f| f.message.level).collect();
    let mut sorted = levels.clone();
    sorted.sort_by(|a, b| b.cmp(a));
    assert_eq!(levels, sorted);
    let first = &findings[0];
    assert_eq!(
        (first.message.code, first.path.as_str()),
        ("IST0101", "spec.rules[0].from[0].source.namespaces")
    );
}

#[test]
fn numbers_are_unique_and_explained() {
    let mut seen = BTreeSet::new();
    for message in table::ALL {
        assert!(seen.insert(message.code), "{} twice", message.code);
        assert!(
            message.advice.len() > 15 && message.meaning.ends_with('.'),
            "{} says too little",
            message.code
        );
    }
    assert!(seen.len() >= 80, "{}", seen.len());
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// `docs/messages.md` is made from the table: with `MANTLET_WRITE_DOCS=1` this test writes it.
#[test]
fn the_page_is_the_table() {
    let path = root().join("docs/messages.md");
    if std::env::var_os("MANTLET_WRITE_DOCS").is_some() {
        std::fs::write(&path, table::markdown()).unwrap();
    }
    let page = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        page == table::markdown(),
        "docs/messages.md is not the table; run MANTLET_WRITE_DOCS=1 cargo test -p mantlet-translate --test analyze"
    );
}

/// No number appears in the sources that the table (and so the page) does not explain.
#[test]
fn no_number_lacks_its_explanation() {
    fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap().filter_map(Result::ok) {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() {
                if name != "tests" && name != "target" {
                    sources(&path, out);
                }
            } else if path.extension().is_some_and(|e| e == "rs") && name != "tests.rs" {
                out.push(path);
            }
        }
    }
    let mut files = Vec::new();
    sources(&root().join("crates"), &mut files);
    assert!(files.len() > 100, "only {} sources", files.len());
    let mut unknown = BTreeSet::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else {
            continue;
        };
        for prefix in ["\"MNT", "\"IST"] {
            for (at, _) in text.match_indices(prefix) {
                let code = text.get(at + 1..at + 8).unwrap_or_default();
                let numbered = code.len() == 7 && code[3..].bytes().all(|b| b.is_ascii_digit());
                if numbered && text[at + 8..].starts_with('"') && table::find(code).is_none() {
                    unknown.insert(format!("{code} in {}", file.display()));
                }
            }
        }
    }
    assert!(unknown.is_empty(), "not in the table of messages: {unknown:?}");
}

#[test]
fn ten_thousand_objects_are_analysed_in_time() {
    let mut resources = Vec::new();
    for index in 0..2500 {
        let namespace = format!("ns-{}", index % 50);
        let app = format!("app-{index}");
        for value in [
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": app, "namespace": namespace, "labels": {"app": app}},
                "spec": {"containers": [{"name": "istio-proxy"}]}, "status": {"phase": "Running"}}),
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": app, "namespace": namespace},
                "spec": {"selector": {"app": app}, "ports": [{"port": 80, "name": "http"}]}}),
            json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": app, "namespace": namespace}, "spec": {"selector": {"matchLabels": {"app": app}},
                "rules": [{"from": [{"source": {"principals": [format!("cluster.local/ns/{namespace}/sa/x")]}}]}]}}),
            json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
                "metadata": {"name": app, "namespace": namespace}, "spec": {"host": app,
                "subsets": [{"name": "v1", "labels": {"app": app}}]}}),
        ] {
            resources.extend(Resource::read(value, "default", None));
        }
    }
    let started = std::time::Instant::now();
    let findings = analyze::analyze(&Input::new(resources, "istio-system", true));
    assert!(findings.is_empty(), "{}", texts(&findings[..findings.len().min(5)]));
    // Unoptimised and on a loaded machine; what this catches is work that grows with the square of the objects.
    let took = started.elapsed();
    assert!(took.as_secs() < 20, "{took:?}");
}
