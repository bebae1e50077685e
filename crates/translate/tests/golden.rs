//! Objects in, configuration out: one file per case in `tests/golden`. The first document names the proxy and what is
//! shown of its snapshot; the rest is the world. The `.snap` beside it is what a reviewer reads.

mod support;

use std::path::Path;

use mantlet_model::ProxySnapshot;
use mantlet_translate::authz::{self, Form, Target};
use mantlet_translate::node::{NodeKind, ProxyNode};
use mantlet_translate::world::World;
use serde_json::{Map, Value, json};

#[test]
fn goldens() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    assert!(files.len() >= 12, "cases are missing");
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap().to_string();
        let text = std::fs::read_to_string(&file).unwrap();
        let shown = run(&text);
        insta::with_settings!({
            snapshot_path => folder.clone(),
            prepend_module_to_snapshot => false,
            omit_expression => true,
        }, {
            insta::assert_snapshot!(name, mantlet_api::yaml::write(&shown));
        });
    }
}

fn run(text: &str) -> Value {
    let documents = support::documents(text);
    let world = support::world(text);
    let proxy = &documents[0];
    assert_eq!(proxy["kind"], "Proxy", "the first document names the proxy");
    let text = |key: &str, default: &str| proxy[key].as_str().unwrap_or(default).to_string();
    let namespace = text("namespace", "default");
    let id = format!(
        "{}~{}~{}.{namespace}~{namespace}.svc.cluster.local",
        text("type", "sidecar"),
        text("ip", "10.0.0.1"),
        text("name", "web-1")
    );
    let node = ProxyNode::parse(&id, &json!({"LABELS": proxy["labels"], "NAMESPACE": namespace})).unwrap();
    let snapshot = mantlet_translate::translate(&world, &node);
    assert_eq!(snapshot.dangling(), vec![], "every reference has its resource");
    // The same input gives the same output.
    assert!(snapshot == mantlet_translate::translate(&world, &node));

    let mut out = Map::new();
    for wanted in proxy["show"].as_array().unwrap() {
        show(&world, &node, &snapshot, wanted.as_str().unwrap(), &mut out);
    }
    Value::Object(out)
}

fn show(world: &World, node: &ProxyNode, snapshot: &ProxySnapshot, wanted: &str, out: &mut Map<String, Value>) {
    let (section, pattern) = wanted.split_once('/').unwrap();
    if section == "authz" || section == "custom" {
        let form = if pattern == "tcp" { Form::Tcp } else { Form::Http };
        let target = Target {
            namespace: &node.namespace,
            labels: &node.labels,
            gateway: node.kind == NodeKind::Router,
        };
        let shown = if section == "authz" {
            serde_json::to_value(authz::filters(world, target, form))
        } else {
            serde_json::to_value(authz::custom(world, target, form))
        };
        out.insert(wanted.to_string(), shown.unwrap());
        return;
    }
    let all = serde_json::to_value(snapshot).unwrap();
    let names = all[section].as_object().unwrap();
    if pattern == "names" {
        out.insert(wanted.to_string(), json!(names.keys().collect::<Vec<_>>()));
        return;
    }
    let matching: Vec<_> = names
        .iter()
        .filter(|(name, _)| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => *name == pattern,
        })
        .collect();
    assert!(
        !matching.is_empty(),
        "{wanted}: have {:?}",
        names.keys().collect::<Vec<_>>()
    );
    for (name, value) in matching {
        out.insert(format!("{section}/{name}"), value.clone());
    }
}
