//! Validation of whole objects: what the admission webhook, `validate` and `analyze` call, and rules several kinds share.
//!
//! Messages are Istio's where Istio has them (SEMANTICS 8). The kinds' own rules stand with the kinds.

use serde_json::Value;

use crate::diagnostic::{Code, Diagnostic, Severity, did_you_mean};
use crate::kind::{self, KINDS};
use crate::names;
use crate::object::{Metadata, Object, Spec};
use crate::selector::{PolicyTargetReference, WorkloadSelector};
use crate::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, Gateway, PeerAuthentication, ProxyConfigResource,
    RequestAuthentication, ServiceEntry, Sidecar, Telemetry, VirtualService, WasmPlugin, WorkloadEntry, WorkloadGroup,
};

/// Annotation with which the webhook is tried out: an object that carries it is always refused (S8.2).
pub const ALWAYS_REJECT: &str = "internal.istio.io/webhook-always-reject";
const DRY_RUN: &str = "istio.io/dry-run";

/// All findings about an object of one of Istio's kinds. Unknown fields inside `spec` are warnings (the API server prunes them).
pub fn object(value: &Value) -> Vec<Diagnostic> {
    let api_version = value.get("apiVersion").and_then(Value::as_str).unwrap_or_default();
    let kind_name = value.get("kind").and_then(Value::as_str).unwrap_or_default();
    let Some(row) = kind::find(kind_name, api_version) else {
        let hint = did_you_mean(kind_name, KINDS.iter().map(|k| k.kind))
            .filter(|_| !KINDS.iter().any(|k| k.kind == kind_name));
        let message = format!("unrecognized type {api_version}, Kind={kind_name}");
        return vec![Diagnostic::new(Code::UNKNOWN_KIND, Severity::Error, "kind", message).with_hint(hint)];
    };
    let mut findings = top_level(value, row.kind);
    if crate::legacy::is_legacy(row) {
        findings.extend(crate::legacy::validate(row, value));
        return findings;
    }
    findings.extend(match row.kind {
        "AuthorizationPolicy" => typed::<AuthorizationPolicy>(value),
        "DestinationRule" => typed::<DestinationRule>(value),
        "EnvoyFilter" => typed::<EnvoyFilter>(value),
        "Gateway" => typed::<Gateway>(value),
        "PeerAuthentication" => typed::<PeerAuthentication>(value),
        "ProxyConfig" => typed::<ProxyConfigResource>(value),
        "RequestAuthentication" => typed::<RequestAuthentication>(value),
        "ServiceEntry" => typed::<ServiceEntry>(value),
        "Sidecar" => typed::<Sidecar>(value),
        "Telemetry" => typed::<Telemetry>(value),
        "VirtualService" => typed::<VirtualService>(value),
        "WasmPlugin" => typed::<WasmPlugin>(value),
        "WorkloadEntry" => typed::<WorkloadEntry>(value),
        "WorkloadGroup" => typed::<WorkloadGroup>(value),
        other => vec![Diagnostic::new(
            Code::UNKNOWN_KIND,
            Severity::Error,
            "kind",
            format!("unrecognized type {other}"),
        )],
    });
    findings
}

fn typed<S: Spec>(value: &Value) -> Vec<Diagnostic> {
    // Nulls in lists have messages of their own, which decoding would hide.
    if S::KIND.kind == AuthorizationPolicy::KIND.kind {
        let nulls = crate::authorization_policy::validate::nulls(value);
        if !nulls.is_empty() {
            return nulls;
        }
    } else if S::KIND.kind == RequestAuthentication::KIND.kind {
        let nulls = crate::request_authentication::nulls(value);
        if !nulls.is_empty() {
            return nulls;
        }
    }
    let object = match Object::<S>::from_value(value) {
        Ok(object) => object,
        Err(error) => return error.diagnostics(),
    };
    let mut findings = annotations::<S>(&object.metadata, value);
    findings.extend(
        object
            .spec
            .validate(&object.metadata.name, &object.metadata.namespace, value),
    );
    findings.extend(
        crate::crd::unknown_fields_of(S::KIND, value)
            .into_iter()
            .map(|mut finding| {
                finding.severity = Severity::Warning;
                finding
            }),
    );
    findings
}

/// What is accepted as Istio accepts it, but cannot mean what it seems to mean: warnings beside those of [`object`].
pub fn traps(value: &Value) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    if let Some(spec) = value.get("spec") {
        quotes(spec, "spec", &mut found);
    }
    if value.get("kind").is_some()
        && let Ok(policy) = Object::<AuthorizationPolicy>::from_value(value)
    {
        found.extend(crate::authorization_policy::traps::traps(&policy.spec));
    }
    found
}

/// Texts between typographic quotes, anywhere in a value.
fn quotes(value: &Value, path: &str, found: &mut Vec<Diagnostic>) {
    match value {
        _ if found.len() > 20 => {}
        Value::String(text) => found.extend(crate::strict::typographic_quotes(text, path).map(|mut finding| {
            finding.severity = Severity::Warning;
            finding
        })),
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                quotes(item, &format!("{path}[{i}]"), found);
            }
        }
        Value::Object(map) => {
            for (key, inner) in map {
                quotes(inner, &format!("{path}.{key}"), found);
            }
        }
        _ => {}
    }
}

fn top_level(value: &Value, kind: &str) -> Vec<Diagnostic> {
    const KNOWN: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
    let Some(map) = value.as_object() else {
        return Vec::new();
    };
    let metadata = Metadata::from_value(value).unwrap_or_default();
    map.keys()
        .filter(|key| !KNOWN.contains(&key.as_str()))
        .map(|key| {
            let message = format!(
                "unknown field {key:?} on {kind} resource {}/{}",
                metadata.namespace, metadata.name
            );
            Diagnostic::new(Code::UNKNOWN_FIELD, Severity::Error, key.clone(), message)
                .with_hint(did_you_mean(key, KNOWN))
        })
        .collect()
}

fn annotations<S: Spec>(metadata: &Metadata, raw: &Value) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    let mut error = |key: &str, message: String| {
        findings.push(Diagnostic::error(format!("metadata.annotations[{key}]"), message));
    };
    let who = format!("{}/{}", metadata.namespace, metadata.name);
    if metadata.annotations.contains_key(ALWAYS_REJECT) {
        error(ALWAYS_REJECT, format!("{ALWAYS_REJECT:?} annotation found, rejecting"));
    }
    for key in ["internal.istio.io/parents", "internal.istio.io/parent-namespace"] {
        if metadata.annotations.contains_key(key) {
            error(key, format!("{key:?} annotation found, this may not be set by users"));
        }
    }
    if let Some(text) = metadata.annotations.get(DRY_RUN) {
        if S::KIND.kind != "AuthorizationPolicy" {
            error(
                DRY_RUN,
                format!("{who} has unsupported annotation {DRY_RUN}, please remove the annotation"),
            );
        } else if parse_bool(text).is_none() {
            error(
                DRY_RUN,
                format!("{who} has annotation {DRY_RUN} with invalid value ({text}): not a boolean"),
            );
        } else {
            let action = raw.pointer("/spec/action").and_then(Value::as_str).unwrap_or("ALLOW");
            if parse_bool(text) == Some(true) && !matches!(action, "ALLOW" | "DENY") {
                error(
                    DRY_RUN,
                    format!(
                        "the annotation {DRY_RUN} currently only supports action ALLOW/DENY, found action {action} in {who}"
                    ),
                );
            }
        }
    }
    findings
}

/// A boolean as Go's `strconv.ParseBool` reads it, which is what Istio does with annotations.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Rules of a workload selector (S8.11).
pub(crate) fn selector(selector: Option<&WorkloadSelector>, path: &str) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    let Some(selector) = selector else { return findings };
    for (key, value) in &selector.match_labels {
        if key.is_empty() {
            findings.push(Diagnostic::error(
                path,
                format!("empty key is not supported in selector: \"{key}={value}\""),
            ));
        }
        // The schema's bound (S8.61), which an API server without it would let pass.
        if value.len() > 63 {
            findings.push(Diagnostic::error(
                path,
                format!("value of label {key:?} is longer than 63 characters"),
            ));
        }
        if key.contains('*') || value.contains('*') {
            findings.push(Diagnostic::error(
                path,
                format!("wildcard is not supported in selector: \"{key}={value}\""),
            ));
        }
    }
    if selector.match_labels.is_empty() {
        findings.push(Diagnostic::warning(path, "workload selector specified without labels"));
    }
    findings
}

/// Rules of selector and target references together (S8.10, S8.12).
pub(crate) fn one_target(
    has_selector: bool,
    target_ref: Option<&PolicyTargetReference>,
    target_refs: &[PolicyTargetReference],
    findings: &mut Vec<Diagnostic>,
) {
    let set = usize::from(has_selector) + usize::from(target_ref.is_some()) + usize::from(!target_refs.is_empty());
    if set > 1 {
        findings.push(Diagnostic::error(
            "spec",
            "only one of targetRefs or workloadSelector can be set",
        ));
    }
    let all = target_ref
        .map(|target| ("spec.targetRef".to_string(), target))
        .into_iter()
        .chain(
            target_refs
                .iter()
                .enumerate()
                .map(|(i, target)| (format!("spec.targetRefs[{i}]"), target)),
        );
    for (path, target) in all {
        if target.name.is_empty() {
            findings.push(Diagnostic::error(&path, "targetRef name must be set"));
        }
        if !target.namespace.is_empty() {
            findings.push(Diagnostic::error(
                &path,
                "targetRef namespace must not be set; cross namespace referencing is not supported",
            ));
        }
        let group = if target.group == "core" {
            ""
        } else {
            target.group.as_str()
        };
        let known = [
            ("", "Service"),
            ("networking.istio.io", "ServiceEntry"),
            ("gateway.networking.k8s.io", "Gateway"),
            ("gateway.networking.k8s.io", "GatewayClass"),
        ];
        if !known.contains(&(group, target.kind.as_str())) {
            let list: Vec<String> = known.iter().map(|(group, kind)| format!("{group}/{kind}")).collect();
            findings.push(Diagnostic::error(
                &path,
                format!(
                    "targetRef must be to one of [{}] but was {}/{}",
                    list.join(" "),
                    target.group,
                    target.kind
                ),
            ));
        }
    }
}

/// A host that may begin with `*.` (S8.50).
pub(crate) fn wildcard_host(host: &str, path: &str, findings: &mut Vec<Diagnostic>) {
    if host.is_empty() {
        findings.push(Diagnostic::error(
            path,
            "domain name \"\" invalid (empty domain name not allowed)",
        ));
    } else if !names::is_wildcard_host(host) {
        findings.push(Diagnostic::error(
            path,
            format!("domain name {host:?} invalid, use a DNS name, optionally with a leading \"*.\""),
        ));
    }
}

/// Rules of `exportTo` (S8.52).
pub(crate) fn export_to(list: &[String], namespace: &str, none_allowed: bool, findings: &mut Vec<Diagnostic>) {
    let mut seen = std::collections::BTreeSet::new();
    for to in list {
        let resolved = if to == "." { namespace } else { to.as_str() };
        if !seen.insert(resolved.to_string()) {
            findings.push(Diagnostic::error(
                "spec.exportTo",
                format!("duplicate entries in exportTo: {to}"),
            ));
        }
        match to.as_str() {
            "." | "*" => {}
            "~" if none_allowed => {}
            "~" => findings.push(Diagnostic::error(
                "spec.exportTo",
                "exportTo: ~ is not allowed for this kind",
            )),
            other if names::is_dns1123_label(other) => {}
            other => findings.push(Diagnostic::error(
                "spec.exportTo",
                format!("exportTo: {other:?} is no namespace name"),
            )),
        }
    }
    if list.len() > 1 && list.iter().any(|to| to == "*" || to == "~") {
        findings.push(Diagnostic::error(
            "spec.exportTo",
            "cannot have both public (*) or none (~) and other values in exportTo",
        ));
    }
}

#[cfg(test)]
mod tests;
