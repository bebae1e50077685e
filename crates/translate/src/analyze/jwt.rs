//! Tokens: keys from risky places, tokens that nothing requires, claims that nothing verifies.

use std::collections::BTreeSet;
use std::net::IpAddr;

use mantlet_api::authorization_policy::{Action, Rule};
use mantlet_api::{AuthorizationPolicy, RequestAuthentication};
use serde_json::Value;

use super::authz::selected;
use super::input::{Input, Resource, Workload};
use super::{Report, table};

pub(super) fn run(input: &Input, out: &mut Report) {
    let verifying = input.typed::<RequestAuthentication>();
    let policies = input.typed::<AuthorizationPolicy>();
    for (resource, spec) in &verifying {
        for (index, rule) in spec.jwt_rules.iter().enumerate() {
            key_set(
                resource,
                &rule.jwks_uri,
                &format!("spec.jwtRules[{index}].jwksUri"),
                out,
            );
        }
        not_required(input, resource, spec, &policies, out);
    }
    for (resource, policy) in &policies {
        claims(input, resource, policy, &verifying, out);
    }
    unrestricted(input, &verifying, out);
}

/// The host of an address with scheme.
fn host_of(uri: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = uri.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host_port = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let host = match host_port.strip_prefix('[') {
        Some(v6) => v6.split(']').next()?,
        None => host_port.rsplit_once(':').map_or(host_port, |(host, _)| host),
    };
    Some((scheme, host))
}

fn key_set(resource: &Resource, uri: &str, path: &str, out: &mut Report) {
    let Some((scheme, host)) = host_of(uri) else { return };
    let internal = match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => ip.is_private() || ip.is_loopback() || ip.is_link_local() || ip.is_unspecified(),
        Ok(IpAddr::V6(ip)) => {
            ip.is_loopback()
                || ip.is_unspecified()
                || (ip.segments()[0] & 0xfe00) == 0xfc00
                || (ip.segments()[0] & 0xffc0) == 0xfe80
        }
        Err(_) => host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost"),
    };
    if internal {
        out.add(
            &table::JWKS_INTERNAL,
            resource,
            path,
            format!("The key set at {uri} is fetched from an internal address ({host})."),
        );
        return;
    }
    let host = host.to_ascii_lowercase();
    let in_cluster =
        !host.contains('.') || host.contains(".svc") || host.split('.').count() == 2 && !is_public_suffix(&host);
    if scheme == "http" && !in_cluster {
        out.add(
            &table::JWKS_PLAINTEXT,
            resource,
            path,
            format!("The key set at {uri} is fetched without TLS from outside of the cluster."),
        );
    }
}

/// Whether a name of two labels looks like a public domain and not like `service.namespace`.
fn is_public_suffix(host: &str) -> bool {
    let last = host.rsplit('.').next().unwrap_or_default();
    matches!(
        last,
        "com" | "org" | "net" | "io" | "dev" | "app" | "edu" | "gov" | "example" | "test"
    ) || last.len() == 2
}

fn mentions_token(rule: &Rule) -> bool {
    rule.from
        .iter()
        .filter_map(|f| f.source.as_ref())
        .any(|s| !s.request_principals.is_empty() || !s.not_request_principals.is_empty())
        || rule.when.iter().any(|c| c.key.starts_with("request.auth."))
}

/// Whether a policy with `targetRefs` or a selector acts on a workload.
fn acts_on(input: &Input, namespace: &str, spec: &AuthorizationPolicy, workload: &Workload) -> bool {
    let attached = spec.target_ref.is_some() || !spec.target_refs.is_empty();
    if attached {
        return workload.labels.contains_key("gateway.networking.k8s.io/gateway-name")
            && namespace == workload.namespace;
    }
    (namespace == input.root() || namespace == workload.namespace)
        && mantlet_api::selector::selects(spec.selector.as_ref(), &workload.labels)
}

fn verifies(input: &Input, namespace: &str, spec: &RequestAuthentication, workload: &Workload) -> bool {
    let attached = spec.target_ref.is_some() || !spec.target_refs.is_empty();
    if attached {
        return workload.labels.contains_key("gateway.networking.k8s.io/gateway-name")
            && namespace == workload.namespace;
    }
    (namespace == input.root() || namespace == workload.namespace)
        && mantlet_api::selector::selects(spec.selector.as_ref(), &workload.labels)
}

fn not_required(
    input: &Input,
    resource: &Resource,
    spec: &RequestAuthentication,
    policies: &[(&Resource, AuthorizationPolicy)],
    out: &mut Report,
) {
    if spec.jwt_rules.is_empty() {
        return;
    }
    let requiring = |acts: &dyn Fn(&Resource, &AuthorizationPolicy) -> bool| {
        policies.iter().any(|(r, p)| {
            matches!(p.action, Action::Allow | Action::Deny)
                && r.annotations.get("istio.io/dry-run").is_none_or(|v| v != "true")
                && p.rules.iter().any(mentions_token)
                && acts(r, p)
        })
    };
    let workloads: Vec<&Workload> = input
        .workloads
        .iter()
        .filter(|w| w.meshed && verifies(input, &resource.namespace, spec, w))
        .collect();
    let open: Option<String> = if workloads.is_empty() {
        // Without workloads: a policy of the same namespace (or mesh-wide) has to require tokens.
        let required = requiring(&|r, p| {
            (r.namespace == resource.namespace || r.namespace == input.root())
                && (p.selector.is_none() || p.selector.as_ref() == spec.selector.as_ref())
        });
        (!required).then(|| "what it selects".to_string())
    } else {
        workloads
            .iter()
            .find(|w| !requiring(&|r, p| acts_on(input, &r.namespace, p, w)))
            .map(|w| format!("{}/{}", w.namespace, w.name))
    };
    if let Some(open) = open {
        out.add(
            &table::TOKEN_NOT_REQUIRED,
            resource,
            "spec.jwtRules",
            format!("Requests without any token pass to {open}: no AuthorizationPolicy there requires one."),
        );
    }
}

fn claims(
    input: &Input,
    resource: &Resource,
    policy: &AuthorizationPolicy,
    verifying: &[(&Resource, RequestAuthentication)],
    out: &mut Report,
) {
    if !policy.rules.iter().any(mentions_token) {
        return;
    }
    let attached = policy.target_ref.is_some() || !policy.target_refs.is_empty();
    let workloads: Vec<&Workload> = if attached {
        Vec::new()
    } else {
        selected(input, &resource.namespace, policy.selector.as_ref()).collect()
    };
    let of = |workload: Option<&Workload>| -> Vec<&RequestAuthentication> {
        verifying
            .iter()
            .filter(|(r, spec)| match workload {
                Some(workload) => verifies(input, &r.namespace, spec, workload),
                None => r.namespace == resource.namespace || r.namespace == input.root(),
            })
            .map(|(_, spec)| spec)
            .collect()
    };
    let places: Vec<Option<&Workload>> = if workloads.is_empty() {
        vec![None]
    } else {
        workloads.iter().map(|w| Some(*w)).collect()
    };
    for place in places {
        let specs = of(place);
        let issuers: BTreeSet<&str> = specs
            .iter()
            .flat_map(|s| &s.jwt_rules)
            .map(|r| r.issuer.as_str())
            .collect();
        let index = policy.rules.iter().position(mentions_token).unwrap_or_default();
        let whom = place.map_or_else(
            || format!("namespace {}", resource.namespace),
            |w| format!("{}/{}", w.namespace, w.name),
        );
        if issuers.is_empty() {
            out.add(
                &table::TOKEN_NOT_VERIFIED,
                resource,
                format!("spec.rules[{index}]"),
                format!("The rule asks for claims of a token, but no RequestAuthentication verifies tokens at {whom}."),
            );
            return;
        }
        let any = policy.rules.iter().position(|rule| {
            policy.action == Action::Allow
                && rule
                    .from
                    .iter()
                    .filter_map(|f| f.source.as_ref())
                    .any(|s| s.request_principals.iter().any(|p| p == "*"))
                && !rule.when.iter().any(|c| c.key.starts_with("request.auth."))
        });
        if let Some(index) = any.filter(|_| issuers.len() > 1) {
            out.add(
                &table::ANY_ISSUER,
                resource,
                format!("spec.rules[{index}]"),
                format!(
                    "requestPrincipals [\"*\"] accepts a token of any of {} issuers: {}.",
                    issuers.len(),
                    issuers.into_iter().collect::<Vec<_>>().join(", ")
                ),
            );
            return;
        }
    }
}

/// Key sets may be fetched from anywhere (S: IST0175).
fn unrestricted(input: &Input, verifying: &[(&Resource, RequestAuthentication)], out: &mut Report) {
    if verifying.is_empty() {
        return;
    }
    for deployment in input.of("apps", "Deployment") {
        if deployment.labels.get("app").is_none_or(|app| app != "istiod") {
            continue;
        }
        let set = deployment
            .value
            .pointer("/spec/template/spec/containers")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|c| c.get("env")?.as_array())
            .flatten()
            .any(|e| {
                e.get("name").and_then(Value::as_str) == Some("BLOCKED_CIDRS_IN_JWKS_URIS")
                    && e.get("value").and_then(Value::as_str).is_some_and(|v| !v.is_empty())
            });
        if !set {
            const SHOWN: usize = 5;
            let mut names: Vec<String> = verifying.iter().take(SHOWN).map(|(r, _)| r.full_name()).collect();
            if verifying.len() > SHOWN {
                names.push(format!("and {} more", verifying.len() - SHOWN));
            }
            out.add(
                &table::JWKS_FETCH_UNRESTRICTED,
                deployment,
                "spec.template.spec.containers",
                format!(
                    "BLOCKED_CIDRS_IN_JWKS_URIS is not configured on istiod, but {} RequestAuthentication resource(s) exist ({}); \
                     key sets may be fetched from internal addresses.",
                    verifying.len(),
                    names.join(", ")
                ),
            );
        }
    }
}
