//! Injection into manifests (`istioctl kube-inject`): finds the pod template of each workload kind.

use serde_json::Value;

use super::{Decision, InjectConfig, InjectError, Owner, PodRequest, inject};

/// Injects into all documents; what holds no pod passes unchanged. Returns the documents and the warnings.
pub fn kube_inject(
    documents: Vec<Value>,
    namespace: &str,
    config: &InjectConfig,
) -> Result<(Vec<Value>, Vec<String>), InjectError> {
    let mut warnings = Vec::new();
    let mut out = Vec::new();
    for document in documents {
        if document.get("kind").and_then(Value::as_str) == Some("List") {
            let mut list = document;
            if let Some(items) = list.get_mut("items").and_then(Value::as_array_mut) {
                for item in items {
                    let (injected, more) = kube_inject_one(item.take(), namespace, config)?;
                    *item = injected;
                    warnings.extend(more);
                }
            }
            out.push(list);
        } else {
            let (injected, more) = kube_inject_one(document, namespace, config)?;
            out.push(injected);
            warnings.extend(more);
        }
    }
    Ok((out, warnings))
}

/// Injects into one object.
pub fn kube_inject_one(
    mut object: Value,
    namespace: &str,
    config: &InjectConfig,
) -> Result<(Value, Vec<String>), InjectError> {
    let kind = object
        .get("kind")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_string();
    let template = match kind.as_str() {
        "Pod" => "",
        "Deployment" | "DaemonSet" | "StatefulSet" | "ReplicaSet" | "Job" | "ReplicationController" => "/spec/template",
        "CronJob" => "/spec/jobTemplate/spec/template",
        _ => return Ok((object, Vec::new())),
    };
    let text = |pointer: &str| {
        object
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_string()
    };
    let own_namespace = text("/metadata/namespace");
    let namespace = if own_namespace.is_empty() {
        namespace.to_string()
    } else {
        own_namespace
    };
    let name = text("/metadata/name");
    let who = format!("{kind} {namespace}/{name}");
    let owner = (kind != "Pod").then(|| Owner {
        name: name.clone(),
        namespace: namespace.clone(),
        kind: kind.clone(),
        api_version: text("/apiVersion"),
    });
    let Some(pod) = object.pointer(template) else {
        return Err(InjectError::NotAPod(format!("{who} has no pod template")));
    };
    let request = PodRequest {
        pod: Some(pod),
        namespace: &namespace,
        owner,
        ..Default::default()
    };
    match inject(&request, config)? {
        Decision::Skip { reason, mut warnings } => {
            if reason.starts_with("pod uses the host's network") {
                warnings.push(format!("Skipping injection because {who} has host networking enabled"));
            }
            Ok((object, warnings))
        }
        Decision::Inject(injected) => {
            if template.is_empty() {
                return Ok((injected.pod, injected.warnings));
            }
            if let Some(place) = object.pointer_mut(template) {
                *place = injected.pod;
                let metadata = place.get_mut("metadata").and_then(Value::as_object_mut);
                if let Some(metadata) = metadata.filter(|m| m.get("creationTimestamp") == Some(&Value::Null)) {
                    metadata.shift_remove("creationTimestamp");
                }
            }
            Ok((object, injected.warnings))
        }
    }
}
