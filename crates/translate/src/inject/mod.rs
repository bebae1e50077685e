//! Sidecar injection: from a Pod to the same Pod with a proxy in it (SEMANTICS 5a–5c).
//!
//! Pure. The admission webhook in `control`, `istioctl kube-inject` and the installer's gateways call it; it must not know how a pod
//! came here or where it goes. The steps, in order: [`mod@decide`] whether at all, check the annotations ([`annotations`]), undo an earlier
//! injection ([`strip`]), build what is added ([`template`], [`proxy`]), rewrite probes ([`probes`]), merge user overrides ([`merge`]), place and
//! label everything here.

mod annotations;
mod config;
mod decide;
mod merge;
mod owner;
mod probes;
mod proxy;
mod resource;
mod strip;
mod template;
pub mod webhook;

use std::collections::BTreeMap;

use mantlet_api::proxy_config::{ProxyConfig, ProxyConfigResource};
use serde_json::{Map, Value, json};

pub use annotations::problem as annotation_problem;
pub use config::InjectConfig;
pub use decide::{Choice, IGNORED_NAMESPACES, decide};
pub use owner::Owner;
pub use resource::{kube_inject, kube_inject_one};

/// Name of the proxy's container.
pub const PROXY_CONTAINER: &str = "istio-proxy";
/// Name of the init container that sets capture up.
pub const INIT_CONTAINER: &str = "istio-init";
/// Name of the init container that checks capture where a network plugin sets it up.
pub const VALIDATION_CONTAINER: &str = "istio-validation";
/// Annotation that holds what an injection added.
pub const STATUS_ANNOTATION: &str = "sidecar.istio.io/status";
/// Annotation that holds what a user had overridden, for a second injection.
pub const OVERRIDES_ANNOTATION: &str = "proxy.istio.io/overrides";

/// Why a pod cannot be injected. The webhook refuses the pod with this text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InjectError {
    /// The object is not a pod.
    #[error("not a pod: {0}")]
    NotAPod(String),
    /// An annotation of the pod has a bad value.
    #[error("invalid value of annotation {name}: {value:?}: {reason}")]
    Annotation {
        /// Annotation.
        name: String,
        /// Its value.
        value: String,
        /// What is wrong.
        reason: String,
    },
    /// A template that does not exist.
    #[error("requested template {name:?} not found; have sidecar, gateway")]
    Template {
        /// The name asked for.
        name: String,
    },
    /// The injector's own configuration is bad; nothing is injected until it is repaired.
    #[error("injector configuration: {0}")]
    Config(String),
}

/// What is known of a pod beside itself.
#[derive(Debug, Clone, Default)]
pub struct PodRequest<'a> {
    /// The pod as sent.
    pub pod: Option<&'a Value>,
    /// Namespace of the request; the pod's own `metadata.namespace` is often empty at admission.
    pub namespace: &'a str,
    /// Name and kind of the workload, if the caller knows better than the pod's owner references.
    pub owner: Option<Owner>,
    /// ProxyConfig resources that select the pod, weakest first (root namespace, namespace, workload).
    pub proxy_configs: &'a [ProxyConfigResource],
    /// Environment from the webhook's path, see [`path_env`].
    pub env: BTreeMap<String, String>,
}

/// What becomes of a pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// It stays as it is.
    Skip {
        /// Why, for logs.
        reason: String,
        /// For the user.
        warnings: Vec<String>,
    },
    /// It gets a proxy.
    Inject(Box<Injected>),
}

/// A pod with a proxy.
#[derive(Debug, Clone, PartialEq)]
pub struct Injected {
    /// The whole pod.
    pub pod: Value,
    /// JSON patch (RFC 6902) from the pod as sent to [`Injected::pod`].
    pub patch: Value,
    /// For the user.
    pub warnings: Vec<String>,
}

/// Decides and injects.
pub fn inject(request: &PodRequest<'_>, config: &InjectConfig) -> Result<Decision, InjectError> {
    let original = request.pod.ok_or_else(|| InjectError::NotAPod("no object".into()))?;
    if !original.is_object() || !original.get("spec").is_some_and(Value::is_object) {
        return Err(InjectError::NotAPod("it has no spec".into()));
    }
    let containers = original.pointer("/spec/containers").and_then(Value::as_array);
    if containers.is_none_or(|list| list.is_empty() || list.iter().any(|c| !c.is_object())) {
        return Err(InjectError::NotAPod("it has no containers".into()));
    }
    let choice = decide(original, request.namespace, config);
    if !choice.inject {
        return Ok(Decision::Skip {
            reason: choice.reason,
            warnings: choice.warnings,
        });
    }
    let (pod, warnings) = apply(original.clone(), request, config)?;
    let mut all = choice.warnings;
    all.extend(warnings);
    let patch = json_patch::diff(original, &pod);
    let patch = serde_json::to_value(patch).map_err(|e| InjectError::Config(format!("cannot write the patch: {e}")))?;
    Ok(Decision::Inject(Box::new(Injected {
        pod,
        patch,
        warnings: all,
    })))
}

/// Injects without asking whether: used where the decision has been made (installer's gateways).
pub fn apply(
    mut pod: Value,
    request: &PodRequest<'_>,
    config: &InjectConfig,
) -> Result<(Value, Vec<String>), InjectError> {
    let pod_annotations = string_map(&pod, "/metadata/annotations");
    annotations::validate(&pod_annotations)?;
    strip::strip(&mut pod);

    let pod_annotations = string_map(&pod, "/metadata/annotations");
    let labels = string_map(&pod, "/metadata/labels");
    let owner = request
        .owner
        .clone()
        .unwrap_or_else(|| Owner::of_pod(&pod, request.namespace));
    let (effective, raw, warnings) = proxy_config(&pod_annotations, request.proxy_configs, config)?;
    let context = template::Context {
        config,
        pod: &pod,
        annotations: &pod_annotations,
        labels: &labels,
        owner: &owner,
        proxy_config: &effective,
        proxy_config_raw: &raw,
        env: &request.env,
    };
    let mut parts = template::Parts::default();
    for name in template_names(&pod_annotations, config) {
        match name.as_str() {
            "sidecar" => template::sidecar(&context, &mut parts),
            "gateway" => template::gateway(&context, &mut parts),
            _ => return Err(InjectError::Template { name }),
        }
    }
    // A user's volume of the same name stays: it is how one replaces, say, the source of the token.
    let own_volumes: Vec<Value> = pod
        .pointer("/spec/volumes")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|v| v["name"].clone())
        .collect();
    parts.volumes.retain(|volume| !own_volumes.contains(&volume["name"]));

    let prometheus_merge = config.mesh.enable_prometheus_merge.unwrap_or(true)
        && annotations::bool_of(&pod_annotations, "prometheus.istio.io/merge-metrics").unwrap_or(true);
    let rewrite = annotations::bool_of(&pod_annotations, "sidecar.istio.io/rewriteAppHTTPProbers")
        .unwrap_or(config.values.sidecar_injector_webhook.rewrite_app_http_probe);
    let status_port = context.status_port();
    let hold = context.hold_application();
    let native = context.native_sidecar();

    let overrides = merge::take_overrides(&mut pod);
    let probers = if rewrite && status_port != 0 && parts.rewrite_probes {
        probes::rewrite(&mut pod, status_port)
    } else {
        Map::new()
    };
    if !probers.is_empty() {
        parts.proxy_env("ISTIO_KUBE_APP_PROBERS", &Value::Object(probers).to_string());
    }
    let mut set = parts.annotations.clone();
    if prometheus_merge && status_port != 0 {
        if let Some(scrape) = probes::prometheus(&pod_annotations, status_port) {
            parts.proxy_env("ISTIO_PROMETHEUS_ANNOTATIONS", &scrape);
        }
        set.insert("prometheus.io/scrape".into(), "true".into());
        set.insert("prometheus.io/port".into(), status_port.to_string());
        set.insert("prometheus.io/path".into(), "/stats/prometheus".into());
    }
    set.extend(config.values.sidecar_injector_webhook.injected_annotations.clone());
    if !overrides.is_empty() {
        set.insert(
            OVERRIDES_ANNOTATION.into(),
            Value::Object(overrides.to_annotation()).to_string(),
        );
    }
    set.insert(STATUS_ANNOTATION.into(), parts.status(config, native).to_string());

    place(&mut pod, &parts, &overrides, hold, native);
    put_map(&mut pod, "annotations", &set, true);
    put_map(&mut pod, "labels", &parts.labels, false);
    if !request.env.is_empty() {
        merge::set_env(&mut pod, &request.env);
    }
    Ok((pod, warnings))
}

/// Environment settings in the webhook's path (S5.17): `/inject/cluster/c1/net/n1`. An odd rest is ignored.
pub fn path_env(path: &str) -> BTreeMap<String, String> {
    let rest = path.strip_prefix("/inject").unwrap_or(path).trim_matches('/');
    let parts: Vec<&str> = if rest.is_empty() {
        Vec::new()
    } else {
        rest.split('/').collect()
    };
    parts
        .chunks_exact(2)
        .map(|pair| {
            let key = match pair[0] {
                "cluster" => "ISTIO_META_CLUSTER_ID",
                "net" => "ISTIO_META_NETWORK",
                other => other,
            };
            (key.to_string(), pair[1].replace("--slash--", "/"))
        })
        .collect()
}

/// Mesh defaults, resources and annotation merged (S5.45): the typed settings, and the fields as written for `PROXY_CONFIG`.
fn proxy_config(
    pod_annotations: &BTreeMap<String, String>,
    resources: &[ProxyConfigResource],
    config: &InjectConfig,
) -> Result<(ProxyConfig, Value, Vec<String>), InjectError> {
    let mut raw = config.proxy_defaults.clone();
    for resource in resources {
        if let Some(concurrency) = resource.concurrency {
            raw["concurrency"] = json!(concurrency);
        }
        if let Some(image) = &resource.image {
            raw["image"] = json!({ "imageType": image.image_type });
        }
        for (key, value) in &resource.environment_variables {
            merge::deep(&mut raw, &json!({ "proxyMetadata": { key: value } }));
        }
    }
    let mut warnings = Vec::new();
    const NAME: &str = "proxy.istio.io/config";
    if let Some(text) = pod_annotations.get(NAME) {
        let bad = |reason: String| InjectError::Annotation {
            name: NAME.into(),
            value: text.clone(),
            reason,
        };
        let value = mantlet_api::yaml::read_one(text).map_err(|e| bad(e.to_string()))?;
        if !(value.is_object() || value.is_null()) {
            return Err(bad("must be a map of ProxyConfig fields".into()));
        }
        if value.is_object() {
            merge::deep(&mut raw, &value);
        }
        for finding in config::unknown_proxy_config_fields(&value) {
            warnings.push(format!("annotation {NAME}: {finding}"));
        }
        let typed = config::read_proxy_config(&raw).map_err(bad)?;
        return Ok((typed, raw, warnings));
    }
    let typed = config::read_proxy_config(&raw).map_err(InjectError::Config)?;
    Ok((typed, raw, warnings))
}

fn template_names(pod_annotations: &BTreeMap<String, String>, config: &InjectConfig) -> Vec<String> {
    if let Some(list) = pod_annotations.get("inject.istio.io/templates") {
        let names: Vec<String> = list
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map(str::to_string)
            .collect();
        if !names.is_empty() {
            return names;
        }
    }
    match config.values.sidecar_injector_webhook.default_templates.as_slice() {
        [] => vec!["sidecar".into()],
        names => names.to_vec(),
    }
}

/// Puts the parts into the pod: order as of S5.39, user overrides on top of what is added.
fn place(pod: &mut Value, parts: &template::Parts, overrides: &merge::Overrides, hold: bool, native: bool) {
    let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) else {
        return;
    };
    let mut init = take_list(spec, "initContainers");
    let mut containers = take_list(spec, "containers");
    for added in &parts.init_containers {
        let added = overrides.over(added, true);
        if native {
            init.insert(0, added)
        } else {
            init.push(added)
        }
    }
    if let Some(added) = &parts.proxy {
        let added = overrides.over(added, false);
        if native {
            // After the capture container, before everything of the user's.
            init.insert(parts.init_containers.len().min(init.len()), added);
        } else if hold {
            containers.insert(0, added);
        } else {
            containers.push(added);
        }
    }
    if !init.is_empty() {
        spec.insert("initContainers".into(), Value::Array(init));
    }
    spec.insert("containers".into(), Value::Array(containers));
    let mut volumes = take_list(spec, "volumes");
    volumes.extend(parts.volumes.iter().cloned());
    if !volumes.is_empty() {
        spec.insert("volumes".into(), Value::Array(volumes));
    }
    if let Some(context) = &parts.pod_security_context {
        let mut merged = context.clone();
        if let Some(own) = spec.get("securityContext") {
            merge::deep(&mut merged, own);
        }
        spec.insert("securityContext".into(), merged);
    }
    let mut secrets = take_list(spec, "imagePullSecrets");
    if !secrets.is_empty() || !parts.image_pull_secrets.is_empty() {
        for name in &parts.image_pull_secrets {
            let secret = json!({ "name": name });
            if !secrets.contains(&secret) {
                secrets.push(secret);
            }
        }
        spec.insert("imagePullSecrets".into(), Value::Array(secrets));
    }
    clean(spec);
}

/// Takes a list out, leaving null in its place so that the fields keep their order; [`clean`] removes what stays null.
fn take_list(spec: &mut Map<String, Value>, key: &str) -> Vec<Value> {
    match spec.get_mut(key).map(Value::take) {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    }
}

fn clean(spec: &mut Map<String, Value>) {
    for key in ["initContainers", "volumes", "imagePullSecrets"] {
        if spec.get(key).is_some_and(Value::is_null) {
            spec.shift_remove(key);
        }
    }
}

fn put_map(pod: &mut Value, key: &str, entries: &BTreeMap<String, String>, overwrite: bool) {
    if entries.is_empty() {
        return;
    }
    if !pod["metadata"].is_object() {
        pod["metadata"] = json!({});
    }
    if !pod["metadata"][key].is_object() {
        pod["metadata"][key] = json!({});
    }
    if let Some(map) = pod["metadata"][key].as_object_mut() {
        for (name, value) in entries {
            if overwrite || !map.contains_key(name) {
                map.insert(name.clone(), json!(value));
            }
        }
    }
}

/// A map of texts at a JSON pointer; entries that are no texts are left out (the API server refuses them).
fn string_map(value: &Value, pointer: &str) -> BTreeMap<String, String> {
    value
        .pointer(pointer)
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| v.as_str().map(|v| (k.clone(), v.to_string())))
        .collect()
}

#[cfg(test)]
mod tests;
