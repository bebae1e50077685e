//! Each object by itself: the rules of its kind, what translation cannot take as written, and kinds of the past.

use mantlet_api::diagnostic::{Code, Severity};
use mantlet_api::{kind, strict, validate};

use super::input::Input;
use super::{Message, Report, table};
use crate::world::Kind;
use crate::{authz, report};

/// Groups of kinds that exist no more, with what replaced them.
const LEGACY: [(&str, &str, &str); 7] = [
    (
        "authentication.istio.io",
        "MeshPolicy",
        "PeerAuthentication in the root namespace",
    ),
    (
        "authentication.istio.io",
        "Policy",
        "PeerAuthentication and RequestAuthentication",
    ),
    ("rbac.istio.io", "ServiceRole", "AuthorizationPolicy"),
    ("rbac.istio.io", "ServiceRoleBinding", "AuthorizationPolicy"),
    ("rbac.istio.io", "ClusterRbacConfig", "AuthorizationPolicy"),
    ("rbac.istio.io", "RbacConfig", "AuthorizationPolicy"),
    (
        "rbac.istio.io",
        "AuthorizationPolicy",
        "AuthorizationPolicy of security.istio.io",
    ),
];

pub(super) fn run(input: &Input, out: &mut Report) {
    for resource in &input.resources {
        let known = kind::KINDS.iter().any(|row| row.group == resource.group);
        let is_legacy = LEGACY.iter().any(|(group, _, _)| *group == resource.group);
        if resource.group.is_empty() && resource.kind == "Service" {
            translation(input, resource, out);
        }
        if !known || is_legacy {
            continue;
        }
        // A file is looked at as a user wrote it; what a cluster holds has been through the API server already.
        let mut findings = match &resource.origin {
            Some(_) => strict::document(&resource.value),
            None => validate::object(&resource.value),
        };
        // Traps have analyzers of their own, which know the workloads.
        findings.retain(|f| !f.code.0.starts_with("MNT01"));
        let refused = findings.iter().any(|f| f.severity == Severity::Error);
        for finding in findings {
            let (message, prefix): (&'static Message, &str) = match (finding.code, finding.severity) {
                (Code::SCHEMA_WARNING, _) => (&table::SCHEMA_WARNING, "Schema validation warning: "),
                (Code::SCHEMA_VALIDATION, _) => (&table::SCHEMA_VALIDATION_ERROR, "Schema validation error: "),
                (code, severity) => match (table::find(code.0), severity) {
                    (Some(message), _) => (message, ""),
                    (None, Severity::Error) => (&table::SCHEMA_VALIDATION_ERROR, "Schema validation error: "),
                    (None, _) => (&table::SCHEMA_WARNING, "Schema validation warning: "),
                },
            };
            let text = format!("{prefix}{finding}");
            out.add(message, resource, finding.path, text);
        }
        if refused {
            // The API server would not take it, so what translation makes of it is beside the point.
            continue;
        }
        translation(input, resource, out);
    }
}

/// What of the object is not in force as written.
fn translation(input: &Input, resource: &super::Resource, out: &mut Report) {
    let problems: Vec<(String, String)> = match (Kind::by_name(&resource.kind), resource.kind.as_str()) {
        (Some(Kind::AuthorizationPolicy), _) => input
            .world
            .authorization_policies(&resource.namespace)
            .iter()
            .find(|p| p.meta.name == resource.name)
            .map(|policy| authz::problems(&input.world, policy))
            .unwrap_or_default()
            .into_iter()
            .map(|p| {
                (
                    p.rule.map(|i| format!("spec.rules[{i}]")).unwrap_or_default(),
                    p.message,
                )
            })
            .collect(),
        (Some(kind), _) => report::problems(&input.world, kind, &resource.namespace, &resource.name)
            .unwrap_or_default()
            .into_iter()
            .map(|text| (String::new(), text))
            .collect(),
        (None, name) => report::unread(name, &resource.value)
            .into_iter()
            .map(|text| (String::new(), text))
            .collect(),
    };
    for (path, text) in problems {
        out.add(&table::NOT_IN_FORCE, resource, path, text);
    }
}

pub(super) fn deprecated(input: &Input, out: &mut Report) {
    for resource in &input.resources {
        if let Some((_, kind, instead)) = LEGACY
            .iter()
            .find(|(group, kind, _)| *group == resource.group && *kind == resource.kind)
        {
            out.add(
                &table::DEPRECATED,
                resource,
                "kind",
                format!(
                    "Deprecated: {kind} of {} is replaced by {instead}; run `mantlet migrate`",
                    resource.group
                ),
            );
        }
        if matches!(
            resource.kind.as_str(),
            "AuthorizationPolicy" | "RequestAuthentication" | "Telemetry" | "WasmPlugin"
        ) && resource.value.pointer("/spec/targetRef").is_some()
        {
            out.add(
                &table::DEPRECATED,
                resource,
                "spec.targetRef",
                "Deprecated: targetRef is replaced by targetRefs",
            );
        }
        if resource.kind == "VirtualService" {
            for (index, route) in resource
                .value
                .pointer("/spec/http")
                .and_then(serde_json::Value::as_array)
                .into_iter()
                .flatten()
                .enumerate()
            {
                for (field, pointer, instead) in [
                    ("mirrorPercent", "/mirrorPercent", "mirrorPercentage"),
                    (
                        "corsPolicy.allowOrigin",
                        "/corsPolicy/allowOrigin",
                        "corsPolicy.allowOrigins",
                    ),
                    ("fault.delay.percent", "/fault/delay/percent", "fault.delay.percentage"),
                ] {
                    if route.pointer(pointer).is_some() {
                        out.add(
                            &table::DEPRECATED,
                            resource,
                            format!("spec.http[{index}].{field}"),
                            format!("Deprecated: {field} is replaced by {instead}"),
                        );
                    }
                }
            }
        }
    }
}
