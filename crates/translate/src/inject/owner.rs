//! Which workload a pod belongs to (S5.18), from its owner references.

use serde_json::Value;

use super::string_map;

/// A workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Kind, e.g. `Deployment`.
    pub kind: String,
    /// Group and version, e.g. `apps/v1`.
    pub api_version: String,
}

impl Owner {
    /// The workload of a pod. A ReplicaSet stands for its Deployment, a Job named by a schedule for its CronJob; a pod without owner
    /// is its own workload.
    pub fn of_pod(pod: &Value, namespace: &str) -> Self {
        let metadata = pod.get("metadata");
        let text = |value: Option<&Value>, key: &str| {
            value
                .and_then(|v| v.get(key))
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_string()
        };
        let own_namespace = text(metadata, "namespace");
        let namespace = if own_namespace.is_empty() {
            namespace.to_string()
        } else {
            own_namespace
        };
        let references = metadata
            .and_then(|m| m.get("ownerReferences"))
            .and_then(Value::as_array);
        let controller = references
            .into_iter()
            .flatten()
            .find(|r| r.get("controller") == Some(&Value::Bool(true)));
        let Some(controller) = controller else {
            return Self {
                name: text(metadata, "name"),
                namespace,
                kind: "Pod".into(),
                api_version: "v1".into(),
            };
        };
        let name = text(Some(controller), "name");
        let kind = text(Some(controller), "kind");
        let api_version = text(Some(controller), "apiVersion");
        let labels = string_map(pod, "/metadata/labels");
        if kind == "ReplicaSet" {
            let hash = labels.get("pod-template-hash").map(|hash| format!("-{hash}"));
            if let Some(deployment) = hash.and_then(|suffix| name.strip_suffix(&suffix)) {
                return Self {
                    name: deployment.to_string(),
                    namespace,
                    kind: "Deployment".into(),
                    api_version: "apps/v1".into(),
                };
            }
        }
        if kind == "Job" {
            let scheduled = name.rsplit_once('-').filter(|(base, time)| {
                !base.is_empty() && (8..=10).contains(&time.len()) && time.bytes().all(|b| b.is_ascii_digit())
            });
            if let Some((base, _)) = scheduled {
                return Self {
                    name: base.to_string(),
                    namespace,
                    kind: "CronJob".into(),
                    api_version,
                };
            }
        }
        Self {
            name,
            namespace,
            kind,
            api_version,
        }
    }

    /// The form of `ISTIO_META_OWNER`.
    pub fn uri(&self) -> String {
        let namespace = if self.namespace.is_empty() {
            "default"
        } else {
            &self.namespace
        };
        format!(
            "kubernetes://apis/{}/namespaces/{namespace}/{}s/{}",
            self.api_version,
            self.kind.to_lowercase(),
            self.name
        )
    }
}
