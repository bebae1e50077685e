//! AdmissionReview requests → answers, without I/O.

use base64::Engine;
use mantlet_api::diagnostic::Severity;
use mantlet_translate::inject::{self, Decision, InjectConfig, PodRequest};
use serde_json::{Value, json};

/// What becomes of a request.
#[derive(Debug)]
pub(super) struct Answer {
    allowed: bool,
    /// JSON patch.
    patch: Option<Value>,
    warnings: Vec<String>,
    /// HTTP code and message of a refusal.
    refusal: Option<(u16, String)>,
}

/// Outcome of an injection request.
#[derive(Debug)]
pub(super) enum Injection {
    /// The pod gets a proxy.
    Patched(Answer),
    /// It stays as it is.
    Skipped(Answer),
}

impl Answer {
    fn allow() -> Answer {
        Answer {
            allowed: true,
            patch: None,
            warnings: Vec::new(),
            refusal: None,
        }
    }

    pub(super) fn deny(code: u16, message: String) -> Answer {
        Answer {
            allowed: false,
            refusal: Some((code, message)),
            ..Answer::allow()
        }
    }

    pub(super) fn allowed(&self) -> bool {
        self.allowed
    }

    /// The whole AdmissionReview.
    pub(super) fn into_review(self, version: &str, uid: &str) -> Value {
        let mut response = json!({"uid": uid, "allowed": self.allowed});
        if let Some(patch) = self.patch {
            response["patchType"] = json!("JSONPatch");
            response["patch"] = json!(base64::engine::general_purpose::STANDARD.encode(patch.to_string()));
        }
        if !self.warnings.is_empty() {
            response["warnings"] = json!(self.warnings);
        }
        if let Some((code, message)) = self.refusal {
            response["status"] = json!({"message": message, "code": code});
        }
        json!({"apiVersion": version, "kind": "AdmissionReview", "response": response})
    }
}

/// `namespace/name` of the object of a request, for logs.
pub(super) fn subject(request: &Value) -> String {
    let meta = &request["object"]["metadata"];
    let name = meta["name"]
        .as_str()
        .or_else(|| meta["generateName"].as_str())
        .unwrap_or("?");
    format!("{}/{name}", request["namespace"].as_str().unwrap_or_default())
}

/// Injects a pod; the error refuses it.
pub(super) fn inject(request: &Value, path: &str, config: &InjectConfig) -> Result<Injection, String> {
    let pod = PodRequest {
        pod: request.get("object"),
        namespace: request["namespace"].as_str().unwrap_or_default(),
        owner: None,
        proxy_configs: &[],
        env: inject::path_env(path),
    };
    match inject::inject(&pod, config).map_err(|e| e.to_string())? {
        Decision::Skip { reason, warnings } => {
            tracing::debug!(target: "webhook", "{} is not injected: {reason}", subject(request));
            Ok(Injection::Skipped(Answer {
                warnings,
                ..Answer::allow()
            }))
        }
        Decision::Inject(injected) => Ok(Injection::Patched(Answer {
            patch: Some(injected.patch),
            warnings: injected.warnings,
            ..Answer::allow()
        })),
    }
}

/// Validates an object of one of Istio's kinds.
pub(super) fn validate(request: &Value) -> Answer {
    let operation = request["operation"].as_str().unwrap_or_default();
    if !matches!(operation, "CREATE" | "UPDATE") {
        return Answer::allow();
    }
    let object = &request["object"];
    if !object.is_object() {
        return Answer::deny(400, "error decoding configuration: no object in the request".into());
    }
    let mut findings = mantlet_api::validate::object(object);
    findings.extend(mantlet_api::validate::traps(object));
    let warnings = findings
        .iter()
        .filter(|f| f.severity != Severity::Error)
        .map(mantlet_api::diagnostic::Diagnostic::located)
        .collect();
    match mantlet_api::diagnostic::join_errors(&findings) {
        None => Answer {
            warnings,
            ..Answer::allow()
        },
        // Decoding has a prefix of its own (S8.4).
        Some(errors)
            if errors.starts_with("error decoding configuration") || errors.starts_with("unrecognized type") =>
        {
            Answer::deny(400, errors)
        }
        Some(errors) => Answer::deny(400, format!("configuration is invalid: {errors}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(spec: Value) -> Value {
        json!({"operation": "CREATE", "namespace": "a", "object": {
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "p", "namespace": "a"}, "spec": spec,
        }})
    }

    #[test]
    fn bad_objects_are_refused_with_istios_prefix() {
        let answer = validate(&policy(json!({"rules": [{"from": [{"source": {}}]}]})));
        assert!(!answer.allowed());
        let review = answer.into_review("admission.k8s.io/v1", "u1");
        assert_eq!(review["response"]["uid"], "u1");
        let message = review["response"]["status"]["message"].as_str().unwrap();
        assert!(message.starts_with("configuration is invalid: "), "{message}");
        assert!(message.ends_with("(at spec.rules[0].from[0].source)"), "{message}");
        let wrong = validate(&policy(
            json!({"rules": [{"to": [{"operation": {"ports": ["80", "http"]}}]}]}),
        ));
        let message = wrong.into_review("admission.k8s.io/v1", "u")["response"]["status"]["message"].to_string();
        assert!(
            message.contains("bad port (http)") && message.contains("(at spec.rules[0].to[0].operation.ports[1])"),
            "{message}"
        );
    }

    #[test]
    fn values_that_cannot_match_are_warned_of() {
        let answer = validate(&policy(
            json!({"rules": [{"to": [{"operation": {"paths": ["*/a*"]}}]}]}),
        ));
        assert!(answer.allowed());
        let review = answer.into_review("admission.k8s.io/v1", "u");
        let warning = review["response"]["warnings"][0].as_str().unwrap();
        assert!(warning.starts_with("\"*/a*\" matches only what ends with"), "{warning}");
        assert!(
            warning.ends_with("(at spec.rules[0].to[0].operation.paths[0])"),
            "{warning}"
        );
    }

    #[test]
    fn good_objects_and_deletions_pass() {
        assert!(validate(&policy(json!({"rules": [{}]}))).allowed());
        assert!(validate(&json!({"operation": "DELETE", "oldObject": {}})).allowed());
        assert!(!validate(&json!({"operation": "CREATE"})).allowed());
    }

    #[test]
    fn a_pod_is_patched_and_a_broken_one_refused() {
        let config = InjectConfig::default();
        let request = json!({"namespace": "default", "object": {
            "metadata": {"generateName": "x-", "labels": {"sidecar.istio.io/inject": "true"}},
            "spec": {"containers": [{"name": "app", "image": "app"}]},
        }});
        let Ok(Injection::Patched(answer)) = inject(&request, "/inject", &config) else {
            panic!("not patched");
        };
        let review = answer.into_review("admission.k8s.io/v1", "u");
        assert_eq!(review["response"]["patchType"], "JSONPatch");
        let patch = base64::engine::general_purpose::STANDARD
            .decode(review["response"]["patch"].as_str().unwrap())
            .unwrap();
        let patch: Value = serde_json::from_slice(&patch).unwrap();
        assert!(patch.as_array().is_some_and(|p| !p.is_empty()));
        assert!(inject(&json!({"namespace": "default", "object": {}}), "/inject", &config).is_err());
    }
}
