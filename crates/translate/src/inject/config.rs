//! The injector's configuration: ConfigMap `istio-sidecar-injector` (keys `config`, `values`) and the mesh configuration.

use mantlet_api::diagnostic::Diagnostic;
use mantlet_api::mesh_config::MeshConfig;
use mantlet_api::proxy_config::ProxyConfig;
use mantlet_api::{Values, crd, yaml};
use serde_json::{Value, json};

use super::InjectError;

/// Everything that decides what is injected, apart from the pod.
#[derive(Debug, Clone)]
pub struct InjectConfig {
    /// Mesh configuration.
    pub mesh: MeshConfig,
    /// `defaultConfig` of the mesh configuration as written, which goes into `PROXY_CONFIG`.
    pub proxy_defaults: Value,
    /// Installation values.
    pub values: Values,
    /// Revision of the control plane; empty is `default`.
    pub revision: String,
    /// What happens to pods that do not say: `enabled`, `disabled`; anything else injects nothing at all (S5.12).
    pub policy: String,
    /// Label selectors of pods that are never injected.
    pub never_inject: Vec<Value>,
    /// Label selectors of pods that are always injected.
    pub always_inject: Vec<Value>,
    /// Make the proxy an init container with `restartPolicy: Always` (needs kubelets of 1.33 or later; the caller knows).
    pub native_sidecars: bool,
}

impl Default for InjectConfig {
    fn default() -> Self {
        Self {
            mesh: MeshConfig::default(),
            proxy_defaults: json!({}),
            values: Values::default(),
            revision: String::new(),
            policy: "enabled".into(),
            never_inject: Vec::new(),
            always_inject: Vec::new(),
            native_sidecars: false,
        }
    }
}

impl InjectConfig {
    /// Reads the two keys of `istio-sidecar-injector` and key `mesh` of `istio`.
    ///
    /// An error means that the caller keeps the last good configuration, or refuses pods if it has none.
    pub fn read(config: &str, values: &str, mesh: &str, revision: &str) -> Result<Self, InjectError> {
        let bad = |what: &str, e: String| InjectError::Config(format!("{what}: {e}"));
        let config = yaml::read_one(config).map_err(|e| bad("key config", e.to_string()))?;
        let values = yaml::read_one(values).map_err(|e| bad("key values", e.to_string()))?;
        let mesh = yaml::read_one(mesh).map_err(|e| bad("mesh", e.to_string()))?;
        Self::from_values(&config, &values, mesh, revision)
    }

    /// As [`InjectConfig::read`], from parsed values.
    pub fn from_values(config: &Value, values: &Value, mesh: Value, revision: &str) -> Result<Self, InjectError> {
        let values = Values::from_value(values).map_err(InjectError::Config)?;
        let proxy_defaults = mesh
            .get("defaultConfig")
            .filter(|v| v.is_object())
            .cloned()
            .unwrap_or(json!({}));
        let (mesh, _) = MeshConfig::from_value(mesh).map_err(|e| InjectError::Config(format!("mesh: {e}")))?;
        let list = |key: &str, fallback: &[Value]| -> Result<Vec<Value>, InjectError> {
            match config.get(key) {
                None | Some(Value::Null) => Ok(fallback.to_vec()),
                Some(Value::Array(items)) => Ok(items.clone()),
                Some(_) => Err(InjectError::Config(format!(
                    "key config: {key} must be a list of label selectors"
                ))),
            }
        };
        let webhook = &values.sidecar_injector_webhook;
        let never_inject = list("neverInjectSelector", &webhook.never_inject_selector)?;
        let always_inject = list("alwaysInjectSelector", &webhook.always_inject_selector)?;
        let policy = config
            .get("policy")
            .and_then(Value::as_str)
            .unwrap_or(&values.global.proxy.auto_inject)
            .to_string();
        Ok(Self {
            mesh,
            proxy_defaults,
            revision: revision.to_string(),
            policy,
            never_inject,
            always_inject,
            native_sidecars: false,
            values,
        })
    }

    /// The revision as it is written into annotations and labels.
    pub fn revision_name(&self) -> &str {
        if self.revision.is_empty() {
            "default"
        } else {
            &self.revision
        }
    }
}

/// Decodes ProxyConfig fields over the built-in defaults.
pub(super) fn read_proxy_config(raw: &Value) -> Result<ProxyConfig, String> {
    let wrapped = json!({ "defaultConfig": raw });
    MeshConfig::from_value(wrapped)
        .map(|(mesh, _)| mesh.default_config)
        .map_err(|e| format!("{}: {}", e.path, e.message))
}

/// Fields that ProxyConfig does not have.
pub(super) fn unknown_proxy_config_fields(value: &Value) -> Vec<Diagnostic> {
    match crd::mesh_config_schema().pointer("/properties/defaultConfig") {
        Some(schema) if value.is_object() => crd::unknown_fields(value, schema, ""),
        _ => Vec::new(),
    }
}
