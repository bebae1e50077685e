//! The two templates, `sidecar` and `gateway`: everything that is added to a pod, before merging.
//!
//! Container contents are in [`super::proxy`]; here are the choice of parts, labels, annotations and volumes.

use std::collections::BTreeMap;

use mantlet_api::proxy_config::{InterceptionMode, ProxyConfig};
use serde_json::{Value, json};

use super::{InjectConfig, Owner, annotations, proxy};

/// What the templates see.
pub(super) struct Context<'a> {
    pub(super) config: &'a InjectConfig,
    pub(super) pod: &'a Value,
    pub(super) annotations: &'a BTreeMap<String, String>,
    pub(super) labels: &'a BTreeMap<String, String>,
    pub(super) owner: &'a Owner,
    pub(super) proxy_config: &'a ProxyConfig,
    pub(super) proxy_config_raw: &'a Value,
    pub(super) env: &'a BTreeMap<String, String>,
}

impl<'a> Context<'a> {
    /// An annotation of the pod.
    pub(super) fn annotation(&self, name: &str) -> Option<&'a str> {
        self.annotations.get(name).map(String::as_str)
    }

    /// An annotation of the pod, or a default.
    pub(super) fn annotation_or(&self, name: &str, default: &str) -> String {
        self.annotation(name).unwrap_or(default).to_string()
    }

    /// Port of merged metrics and probes; 0 is off.
    pub(super) fn status_port(&self) -> u16 {
        self.annotation("status.sidecar.istio.io/port")
            .and_then(|text| text.parse().ok())
            .unwrap_or(self.config.values.global.proxy.status_port)
    }

    /// How traffic is captured.
    pub(super) fn interception_mode(&self) -> &'static str {
        let mode = self.annotation("sidecar.istio.io/interceptionMode");
        match (mode, self.proxy_config.interception_mode) {
            (Some("TPROXY"), _) | (None, InterceptionMode::Tproxy) => "TPROXY",
            (Some("NONE"), _) | (None, InterceptionMode::None) => "NONE",
            _ => "REDIRECT",
        }
    }

    /// Whether the app waits for the proxy (S5.40).
    pub(super) fn hold_application(&self) -> bool {
        self.proxy_config
            .hold_application_until_proxy_starts
            .unwrap_or(self.config.values.global.proxy.hold_application_until_proxy_starts)
    }

    /// Whether the proxy is an init container that stays (S5.41).
    pub(super) fn native_sidecar(&self) -> bool {
        annotations::bool_of(self.annotations, "sidecar.istio.io/nativeSidecar").unwrap_or(self.config.native_sidecars)
            && !self.is_gateway()
    }

    fn is_gateway(&self) -> bool {
        self.annotation("inject.istio.io/templates")
            .is_some_and(|list| list.split(',').any(|t| t.trim() == "gateway"))
    }

    /// The app's containers.
    pub(super) fn app_containers(&self) -> impl Iterator<Item = &'a Value> {
        self.pod
            .pointer("/spec/containers")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter(|c| c["name"] != super::PROXY_CONTAINER)
    }

    fn label_or_else(&self, names: &[&str], default: &str) -> String {
        names
            .iter()
            .find_map(|name| self.labels.get(*name).filter(|v| !v.is_empty()))
            .cloned()
            .unwrap_or_else(|| default.to_string())
    }
}

/// Everything that is added.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) init_containers: Vec<Value>,
    pub(super) proxy: Option<Value>,
    pub(super) volumes: Vec<Value>,
    pub(super) pod_security_context: Option<Value>,
    pub(super) image_pull_secrets: Vec<String>,
    pub(super) rewrite_probes: bool,
}

impl Parts {
    /// Adds an environment variable to the proxy.
    pub(super) fn proxy_env(&mut self, name: &str, value: &str) {
        if let Some(env) = self
            .proxy
            .as_mut()
            .and_then(|p| p.get_mut("env"))
            .and_then(Value::as_array_mut)
        {
            env.push(json!({ "name": name, "value": value }));
        }
    }

    /// What the status annotation says: enough to undo the injection.
    pub(super) fn status(&self, config: &InjectConfig, native: bool) -> Value {
        fn names(items: &[Value]) -> Vec<Value> {
            items.iter().map(|c| c["name"].clone()).collect()
        }
        let mut init = names(&self.init_containers);
        let mut containers: Vec<Value> = self.proxy.iter().map(|c| c["name"].clone()).collect();
        if native {
            init.append(&mut containers);
        }
        json!({
            "initContainers": if init.is_empty() { Value::Null } else { json!(init) },
            "containers": if containers.is_empty() { Value::Null } else { json!(containers) },
            "volumes": names(&self.volumes),
            "imagePullSecrets":
                if self.image_pull_secrets.is_empty() { Value::Null } else { json!(self.image_pull_secrets) },
            "revision": config.revision_name(),
        })
    }
}

/// Template `sidecar`.
pub(super) fn sidecar(context: &Context<'_>, parts: &mut Parts) {
    common(context, parts);
    parts.labels.insert("security.istio.io/tlsMode".into(), "istio".into());
    parts.rewrite_probes = true;
    let cni = context.config.values.pilot.cni.enabled;
    if context.interception_mode() != "NONE" {
        parts.init_containers.push(if cni {
            proxy::validation(context)
        } else {
            proxy::init(context)
        });
    }
    if cni {
        parts.annotations.extend(proxy::cni_annotations(context));
    }
    parts.proxy = Some(proxy::container(context, proxy::Role::Sidecar));
    user_volumes(context, parts);
}

/// Template `gateway`: a proxy that is the app, so there is nothing to capture and no probe to rewrite.
pub(super) fn gateway(context: &Context<'_>, parts: &mut Parts) {
    common(context, parts);
    parts.proxy = Some(proxy::container(context, proxy::Role::Gateway));
    // Lets an unprivileged gateway listen on 80 and 443 where a Service maps to them.
    parts.pod_security_context =
        Some(json!({ "sysctls": [{ "name": "net.ipv4.ip_unprivileged_port_start", "value": "0" }] }));
    user_volumes(context, parts);
}

fn common(context: &Context<'_>, parts: &mut Parts) {
    let name = context.label_or_else(
        &["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"],
        &context.owner.name,
    );
    let revision = context.label_or_else(
        &[
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ],
        "latest",
    );
    parts
        .labels
        .insert("service.istio.io/canonical-name".into(), truncate_label(&name));
    parts
        .labels
        .insert("service.istio.io/canonical-revision".into(), truncate_label(&revision));
    parts
        .annotations
        .insert("istio.io/rev".into(), context.config.revision_name().into());
    if let Some(first) = context.app_containers().next().and_then(|c| c["name"].as_str()) {
        for key in [
            "kubectl.kubernetes.io/default-logs-container",
            "kubectl.kubernetes.io/default-container",
        ] {
            if context.annotation(key).is_none() {
                parts.annotations.insert(key.into(), first.into());
            }
        }
    }
    parts.volumes.extend(volumes(context));
    parts.image_pull_secrets = context.config.values.global.image_pull_secrets.clone();
}

/// A label's value has at most 63 characters and ends in a letter or digit; workload names may be longer.
fn truncate_label(value: &str) -> String {
    let cut: String = value.chars().take(63).collect();
    cut.trim_end_matches(|c: char| !c.is_ascii_alphanumeric()).to_string()
}

/// Volumes of every proxy (S5.38).
fn volumes(context: &Context<'_>) -> Vec<Value> {
    let audience = &context.config.values.global.sds.token.aud;
    vec![
        json!({ "name": "workload-socket", "emptyDir": {} }),
        json!({ "name": "credential-socket", "emptyDir": {} }),
        json!({ "name": "workload-certs", "emptyDir": {} }),
        json!({ "name": "istio-envoy", "emptyDir": { "medium": "Memory" } }),
        json!({ "name": "istio-data", "emptyDir": {} }),
        json!({ "name": "istio-podinfo", "downwardAPI": { "items": [
            { "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } },
            { "path": "annotations", "fieldRef": { "fieldPath": "metadata.annotations" } },
        ] } }),
        json!({ "name": "istio-token", "projected": { "sources": [
            { "serviceAccountToken": { "path": "istio-token", "expirationSeconds": 43200, "audience": audience } },
        ] } }),
        json!({ "name": "istiod-ca-cert", "configMap": { "name": "istio-ca-root-cert" } }),
        json!({ "name": "istio-ca-crl", "configMap": { "name": "istio-ca-crl", "optional": true } }),
    ]
}

/// Volumes a user asks for by annotation (S5.20). The annotations have been checked.
fn user_volumes(context: &Context<'_>, parts: &mut Parts) {
    let entries = |name: &str| -> Vec<(String, Value)> {
        context
            .annotation(name)
            .and_then(|text| serde_json::from_str::<serde_json::Map<String, Value>>(text).ok())
            .into_iter()
            .flatten()
            .collect()
    };
    for (name, mut volume) in entries("sidecar.istio.io/userVolume") {
        if volume.is_object() {
            volume["name"] = json!(name);
            parts.volumes.push(volume);
        }
    }
    let mut mounts: Vec<Value> = Vec::new();
    for (name, mut mount) in entries("sidecar.istio.io/userVolumeMount") {
        if mount.is_object() {
            mount["name"] = json!(name);
            mounts.push(mount);
        }
    }
    if mounts.is_empty() {
        return;
    }
    // The proxy closes all files that it is not told of; these are the user's certificates for it.
    let paths: Vec<&str> = mounts.iter().filter_map(|m| m["mountPath"].as_str()).collect();
    parts.proxy_env("MANTLET_SANDBOX_READ", &paths.join(":"));
    let list = parts
        .proxy
        .as_mut()
        .and_then(|p| p.get_mut("volumeMounts"))
        .and_then(Value::as_array_mut);
    if let Some(list) = list {
        list.extend(mounts);
    }
}
