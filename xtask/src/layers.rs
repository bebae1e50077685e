//! Compares the crates' real dependencies with the table in `layers.toml`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    crates: BTreeMap<String, BTreeSet<String>>,
    banned: BTreeMap<String, BTreeSet<String>>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<NodeDep>,
}

#[derive(Deserialize)]
struct NodeDep {
    pkg: String,
    dep_kinds: Vec<DepKind>,
}

#[derive(Deserialize)]
struct DepKind {
    kind: Option<String>,
}

const PREFIX: &str = "mantlet-";

/// All differences between the table and the workspace, one line each.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(root.join("xtask/layers.toml")).context("reading xtask/layers.toml")?;
    let table: Table = toml::from_str(&text).context("parsing xtask/layers.toml")?;
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(root)
        .output()
        .context("running cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("parsing cargo metadata")?;
    let mut problems = Vec::new();
    arrows(&table, &metadata, &mut problems);
    bans(&table, &metadata, &mut problems);
    Ok(problems)
}

fn arrows(table: &Table, metadata: &Metadata, problems: &mut Vec<String>) {
    let members: BTreeSet<&str> = metadata.workspace_members.iter().map(String::as_str).collect();
    let mut seen = BTreeSet::new();
    for package in metadata.packages.iter().filter(|p| members.contains(p.id.as_str())) {
        let Some(name) = package.name.strip_prefix(PREFIX) else {
            continue;
        };
        seen.insert(name.to_string());
        let Some(allowed) = table.crates.get(name) else {
            problems.push(format!("xtask/layers.toml: crate `{name}` is missing from [crates]"));
            continue;
        };
        let used: BTreeSet<String> = package
            .dependencies
            .iter()
            .filter(|d| d.kind.as_deref() != Some("dev"))
            .filter_map(|d| d.name.strip_prefix(PREFIX))
            .map(String::from)
            .collect();
        for extra in used.difference(allowed) {
            problems.push(format!(
                "crates/{name}/Cargo.toml: the arrow {name} -> {extra} is not in xtask/layers.toml"
            ));
        }
        for unused in allowed.difference(&used) {
            problems.push(format!(
                "xtask/layers.toml: the arrow {name} -> {unused} is not used; remove it"
            ));
        }
    }
    for missing in table.crates.keys().filter(|name| !seen.contains(*name)) {
        problems.push(format!("xtask/layers.toml: there is no crate `{missing}`"));
    }
}

fn bans(table: &Table, metadata: &Metadata, problems: &mut Vec<String>) {
    let names: BTreeMap<&str, &str> = metadata
        .packages
        .iter()
        .map(|p| (p.id.as_str(), p.name.as_str()))
        .collect();
    let nodes: BTreeMap<&str, &Node> = metadata.resolve.nodes.iter().map(|n| (n.id.as_str(), n)).collect();
    for (name, banned) in &table.banned {
        let wanted = format!("{PREFIX}{name}");
        let Some(start) = metadata.packages.iter().find(|p| p.name == wanted) else {
            continue;
        };
        let mut reached = BTreeSet::new();
        let mut stack = vec![start.id.as_str()];
        while let Some(id) = stack.pop() {
            if !reached.insert(id) {
                continue;
            }
            if let Some(node) = nodes.get(id) {
                let normal = node
                    .deps
                    .iter()
                    .filter(|d| d.dep_kinds.iter().any(|k| k.kind.is_none()));
                stack.extend(normal.map(|d| d.pkg.as_str()));
            }
        }
        for id in reached {
            if let Some(package) = names.get(id).filter(|n| banned.contains(**n)) {
                problems.push(format!(
                    "crates/{name}: `{package}` is below it, which [banned] forbids"
                ));
            }
        }
    }
}
