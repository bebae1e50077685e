//! What is to be installed: profile, files (`IstioOperator`), `--set` and flags merged, checked and typed.

use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use mantlet_api::diagnostic::did_you_mean;
use mantlet_api::mesh_config::MeshConfig;
use mantlet_api::{Values, crd, values, yaml};
use serde_json::{Map, Value, json};

use super::{Source, profiles, set};

/// A resolved installation.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    /// Name of the profile.
    pub(super) profile: String,
    /// Revision; empty is `default`.
    pub(super) revision: String,
    /// Namespace of the control plane.
    pub(super) namespace: String,
    /// Values, typed.
    pub(super) values: Values,
    /// Values as written, which the injector's ConfigMap gets.
    pub(super) raw_values: Value,
    /// Mesh configuration as written into ConfigMap `istio`.
    pub(super) mesh: Value,
    /// The same, typed.
    pub(super) mesh_config: MeshConfig,
    /// Whether CRDs and cluster-wide parts are installed.
    pub(super) base: bool,
    /// Whether the control plane is installed.
    pub(super) pilot: bool,
    /// Gateways to install.
    pub(super) gateways: Vec<Gateway>,
    /// Whether this revision serves what names none.
    pub(super) is_default: bool,
    /// For the user.
    pub(super) warnings: Vec<String>,
}

/// A gateway to install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Gateway {
    /// Name of its Deployment and Service.
    pub(super) name: String,
    /// Namespace, the control plane's unless said otherwise.
    pub(super) namespace: String,
    /// Into the mesh, or out of it.
    pub(super) ingress: bool,
    /// Labels beyond the values'.
    pub(super) labels: Map<String, Value>,
}

/// Merges objects recursively, replaces everything else.
pub(super) fn overlay(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                match base.get_mut(key) {
                    Some(existing) if existing.is_object() && value.is_object() => overlay(existing, value),
                    // Lists of named things (gateways) merge by name.
                    Some(existing) if named_list(existing) && named_list(value) => merge_named(existing, value),
                    _ => {
                        base.insert(key.clone(), value.clone());
                    }
                }
            }
        }
        (base, over) => *base = over.clone(),
    }
}

fn named_list(value: &Value) -> bool {
    value
        .as_array()
        .is_some_and(|list| !list.is_empty() && list.iter().all(|i| i.get("name").is_some_and(Value::is_string)))
        && value
            .as_array()
            .is_some_and(|list| list.iter().all(|i| i.get("port").is_none()))
}

fn merge_named(base: &mut Value, over: &Value) {
    let (Some(base), Some(over)) = (base.as_array_mut(), over.as_array()) else {
        return;
    };
    for item in over {
        match base.iter_mut().find(|b| b["name"] == item["name"]) {
            Some(existing) => overlay(existing, item),
            None => base.push(item.clone()),
        }
    }
}

/// The schema of an IstioOperator's `spec`.
pub(super) fn schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let text = json!({ "type": "string" });
        let opaque = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
        let component = json!({ "type": "object", "properties": {
            "enabled": { "type": "boolean" }, "namespace": text, "hub": text, "tag": text, "k8s": opaque,
        } });
        let gateways = json!({ "type": "array", "items": { "type": "object", "properties": {
            "enabled": { "type": "boolean" }, "name": text, "namespace": text, "hub": text, "tag": text,
            "label": { "type": "object", "additionalProperties": text }, "k8s": opaque,
        } } });
        json!({ "type": "object", "properties": {
            "profile": text, "hub": text, "tag": text, "revision": text, "namespace": text,
            "compatibilityVersion": text, "installPackagePath": text,
            "meshConfig": crd::mesh_config_schema(),
            "values": values::schema(),
            "unvalidatedValues": opaque,
            "components": { "type": "object", "properties": {
                "base": component, "pilot": component, "cni": component, "ztunnel": component, "istiodRemote": component,
                "ingressGateways": gateways, "egressGateways": gateways,
            } },
        } })
    })
}

impl Spec {
    /// Merges everything a user said over the profile and checks it.
    pub(super) fn resolve(source: &Source) -> Result<Self> {
        let mut over = json!({});
        for path in &source.filename {
            overlay(&mut over, &read_file(path)?);
        }
        // `--set` is kept apart so that it wins over files, and is applied to the merged tree so that list positions are the profile's.
        let mut profile = over
            .get("profile")
            .and_then(Value::as_str)
            .unwrap_or("default")
            .to_string();
        for assignment in &source.set {
            if let Some(name) = assignment.strip_prefix("profile=") {
                profile = name.to_string();
            }
        }
        let Some(mut tree) = profiles::get(&profile) else {
            let hint = did_you_mean(&profile, profiles::NAMES)
                .map(|hint| match hint {
                    mantlet_api::diagnostic::Hint::DidYouMean(name) => format!("; did you mean {name:?}?"),
                    mantlet_api::diagnostic::Hint::Advice(text) => format!("; {text}"),
                })
                .unwrap_or_default();
            bail!("unknown profile {profile:?}; have {}{hint}", profiles::NAMES.join(", "));
        };
        overlay(&mut tree, &over);
        for assignment in &source.set {
            set::apply(&mut tree, assignment, schema())?;
        }
        if let Some(revision) = &source.revision {
            tree["revision"] = json!(revision);
        }
        Self::from_tree(tree, profile, source.force)
    }

    fn from_tree(tree: Value, profile: String, force: bool) -> Result<Self> {
        let mut warnings = Vec::new();
        for finding in crd::unknown_fields(&tree, schema(), "") {
            let text = finding.to_string();
            if !force {
                bail!("{text}; use --force to go on all the same");
            }
            warnings.push(text);
        }
        let text = |key: &str| {
            tree.get(key)
                .and_then(Value::as_str)
                .filter(|t| !t.is_empty())
                .map(str::to_string)
        };
        let mut raw_values = tree.get("values").cloned().unwrap_or_else(|| json!({}));
        if let Some(more) = tree.get("unvalidatedValues") {
            overlay(&mut raw_values, more);
        }
        // Top-level hub and tag are the global ones; values win.
        for key in ["hub", "tag"] {
            if let Some(value) = text(key)
                && raw_values.pointer(&format!("/global/{key}")).is_none()
            {
                raw_values["global"][key] = json!(value);
            }
        }
        let revision =
            text("revision").or_else(|| raw_values.get("revision").and_then(Value::as_str).map(str::to_string));
        let revision = revision.filter(|r| r != "default").unwrap_or_default();
        if !revision.is_empty() && !mantlet_api::names::is_dns1123_label(&revision) {
            bail!("revision {revision:?} is invalid: it must be a DNS-1123 label (a-z, 0-9 and -)");
        }
        let namespace = text("namespace")
            .or_else(|| {
                raw_values
                    .pointer("/global/istioNamespace")
                    .and_then(Value::as_str)
                    .map(str::to_string)
            })
            .unwrap_or_else(|| "istio-system".into());
        if !mantlet_api::names::is_dns1123_label(&namespace) {
            bail!("namespace {namespace:?} is invalid: it must be a DNS-1123 label (a-z, 0-9 and -)");
        }
        raw_values["global"]["istioNamespace"] = json!(namespace);
        raw_values["profile"] = json!(profile);
        let mut values = Values::from_value(&raw_values).map_err(|e| anyhow::anyhow!(e))?;
        values.revision = revision.clone();

        let mut mesh = json!({
            "rootNamespace": namespace,
            "trustDomain": if values.global.trust_domain.is_empty() { "cluster.local" } else { &values.global.trust_domain },
            "defaultConfig": {
                "discoveryAddress":
                    format!("{}.{namespace}.svc:15012", mantlet_api::names::with_revision("istiod", &revision)),
            },
        });
        for part in [tree.get("meshConfig"), raw_values.get("meshConfig")]
            .into_iter()
            .flatten()
        {
            overlay(&mut mesh, part);
        }
        prune_empty(&mut mesh);
        let (mesh_config, findings) = MeshConfig::from_value(mesh.clone()).map_err(|e| anyhow::anyhow!("{e}"))?;
        warnings.extend(findings.iter().map(ToString::to_string));

        let enabled = |name: &str| tree.pointer(&format!("/components/{name}/enabled")) == Some(&Value::Bool(true));
        for name in ["cni", "ztunnel", "istiodRemote"] {
            if enabled(name) {
                bail!("component {name} is not available in this build; remove components.{name}.enabled");
            }
        }
        let mut gateways = Vec::new();
        for (list, ingress) in [("ingressGateways", true), ("egressGateways", false)] {
            let items = tree.pointer(&format!("/components/{list}")).and_then(Value::as_array);
            for (i, item) in items.into_iter().flatten().enumerate() {
                if item.get("enabled") != Some(&Value::Bool(true)) {
                    continue;
                }
                let name = item.get("name").and_then(Value::as_str).unwrap_or_default();
                if !mantlet_api::names::is_dns1123_label(name) {
                    bail!("components.{list}[{i}].name {name:?} is invalid: it must be a DNS-1123 label");
                }
                let place = item
                    .get("namespace")
                    .and_then(Value::as_str)
                    .filter(|n| !n.is_empty())
                    .unwrap_or(&namespace);
                let labels = item
                    .get("label")
                    .and_then(Value::as_object)
                    .cloned()
                    .unwrap_or_default();
                if let Some((key, _)) = labels.iter().find(|(_, value)| !value.is_string()) {
                    bail!("components.{list}[{i}].label.{key} must be a string; put it in quotes");
                }
                gateways.push(Gateway {
                    name: name.to_string(),
                    namespace: place.to_string(),
                    ingress,
                    labels: item
                        .get("label")
                        .and_then(Value::as_object)
                        .cloned()
                        .unwrap_or_default(),
                });
                if item.get("k8s").is_some() {
                    warnings.push(format!(
                        "components.{list}[{i}].k8s is ignored; use values.gateways.{name}"
                    ));
                }
            }
        }
        if tree.pointer("/components/pilot/k8s").is_some() {
            warnings.push("components.pilot.k8s is ignored; use values.pilot".into());
        }
        let is_default = revision.is_empty() || values.default_revision == revision;
        Ok(Self {
            profile,
            base: enabled("base"),
            pilot: enabled("pilot"),
            gateways,
            is_default,
            revision,
            namespace,
            raw_values,
            values,
            mesh,
            mesh_config,
            warnings,
        })
    }

    /// The version that is installed: the tag of the images.
    pub(super) fn version(&self) -> &str {
        &self.values.global.tag
    }

    /// The revision as it stands in labels.
    pub(super) fn revision_label(&self) -> &str {
        if self.revision.is_empty() {
            "default"
        } else {
            &self.revision
        }
    }

    /// A name of the control plane's with the revision's suffix.
    pub(super) fn name(&self, base: &str) -> String {
        mantlet_api::names::with_revision(base, &self.revision)
    }
}

/// Removes empty objects, which profiles use as place holders.
fn prune_empty(value: &mut Value) {
    if let Some(map) = value.as_object_mut() {
        map.values_mut().for_each(prune_empty);
        map.retain(|_, v| !v.as_object().is_some_and(Map::is_empty));
    }
}

/// Reads an IstioOperator; `-` is stdin.
fn read_file(path: &str) -> Result<Value> {
    let text = if path == "-" {
        std::io::read_to_string(std::io::stdin()).context("reading the IstioOperator from stdin")?
    } else {
        std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?
    };
    let document = yaml::read_one(&text).with_context(|| path.to_string())?;
    let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default();
    let version = document.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
    if kind != "IstioOperator" || version != "install.istio.io/v1alpha1" {
        bail!("{path}: expected kind IstioOperator of install.istio.io/v1alpha1, found {kind:?} of {version:?}");
    }
    let mut spec = document.get("spec").cloned().unwrap_or_else(|| json!({}));
    if !spec.is_object() {
        bail!("{path}: spec must be an object");
    }
    if spec.get("revision").is_none()
        && let Some(revision) = document.pointer("/metadata/labels/istio.io~1rev")
    {
        spec["revision"] = revision.clone();
    }
    Ok(spec)
}
