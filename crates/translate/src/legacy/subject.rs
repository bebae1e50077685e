//! One subject of a binding with one rule of a role: one rule of an AuthorizationPolicy, or none.
//!
//! Roles only ever allow. So a value without an equivalent is left out, and a field that loses its last value, or a condition that
//! cannot be told, takes the whole rule with it: an empty field would mean "any" (S7.72).

use mantlet_api::authorization_policy::{Condition, From, Operation, Rule, Source, To};
use mantlet_api::legacy::rbac::{AccessRule, Subject};

/// Name that stands for everybody (S7.43).
const ALL_USERS: &str = "allUsers";
/// Name that stands for every identity.
const ALL_AUTHENTICATED: &str = "allAuthenticatedUsers";
/// Claim of group membership (S7.45).
const GROUPS: &str = "request.auth.claims[groups]";

/// A part of a modern rule, or why there is none.
pub(super) type Part<T> = Result<T, String>;

/// Who: the `from` and the conditions on it. `None` is nobody (S7.44).
pub(super) fn from(subject: &Subject, use_origin: bool) -> Part<Option<(Option<From>, Vec<Condition>)>> {
    if subject.is_empty() {
        return Ok(None);
    }
    let mut source = Source::default();
    let mut when: Vec<Condition> = Vec::new();
    // Alternatives of identities, all of which must hold.
    let mut identities: Vec<Vec<String>> = Vec::new();
    if !subject.user.is_empty() && subject.user != "*" {
        identities.push(vec![identity(&subject.user)]);
    }
    if !subject.names.is_empty() && !subject.names.iter().any(|n| n == ALL_USERS) {
        identities.push(subject.names.iter().map(|n| identity(n)).collect());
    }
    if subject.not_names.iter().any(|n| n == ALL_USERS) {
        return Ok(None);
    }
    let not: Vec<String> = subject.not_names.iter().map(|n| identity(n)).collect();

    source.namespaces.clone_from(&subject.namespaces);
    source.not_namespaces.clone_from(&subject.not_namespaces);
    source.ip_blocks.clone_from(&subject.ips);
    source.not_ip_blocks.clone_from(&subject.not_ips);
    if !subject.group.is_empty() {
        when.push(condition(GROUPS, vec![subject.group.clone()]));
    }
    if !subject.groups.is_empty() {
        when.push(condition(GROUPS, subject.groups.clone()));
    }
    if !subject.not_groups.is_empty() {
        when.push(Condition {
            key: GROUPS.into(),
            values: Vec::new(),
            not_values: subject.not_groups.clone(),
        });
    }
    let mut request: Vec<Vec<String>> = Vec::new();
    for (key, value) in &subject.properties {
        let values = || vec![value.clone()];
        match key.as_str() {
            "source.principal" | "source.user" => {
                if value != "*" {
                    identities.push(vec![identity(value)]);
                }
            }
            "source.namespace" if source.namespaces.is_empty() => source.namespaces = values(),
            "source.ip" if source.ip_blocks.is_empty() => source.ip_blocks = values(),
            "source.namespace" | "source.ip" => when.push(condition(key, values())),
            "request.auth.principal" => request.push(values()),
            "request.auth.audiences" | "request.auth.presenter" => when.push(condition(key, values())),
            key if named(key, "request.headers[") || named(key, "request.auth.claims[") => {
                when.push(condition(key, values()));
            }
            other => {
                return Err(format!(
                    "property {other:?} was matched against metadata of filters, which has no equivalent; the subject is left out"
                ));
            }
        }
    }
    // S7.74: under USE_ORIGIN the principal is the token's.
    if use_origin {
        request.append(&mut identities);
        source.not_request_principals = not;
    } else {
        source.not_principals = not;
    }
    let mut identities = identities.into_iter();
    source.principals = identities.next().unwrap_or_default();
    when.extend(identities.map(|values| condition("source.principal", values)));
    let mut request = request.into_iter();
    source.request_principals = request.next().unwrap_or_default();
    when.extend(request.map(|values| condition("request.auth.principal", values)));

    let from = (!source.is_empty()).then_some(From { source: Some(source) });
    Ok(Some((from, when)))
}

/// What: the `to` and the conditions on it, without services and labels, which select workloads. `None` matches nothing.
pub(super) fn to(rule: &AccessRule, namespace: &str) -> Part<Option<(Option<To>, Vec<Condition>)>> {
    let mut operation = Operation {
        hosts: rule.hosts.clone(),
        not_hosts: rule.not_hosts.clone(),
        methods: rule.methods.clone(),
        not_methods: rule.not_methods.clone(),
        paths: paths(&rule.paths)?,
        not_paths: paths(&rule.not_paths)?,
        ports: rule.ports.iter().map(u32::to_string).collect(),
        not_ports: rule.not_ports.iter().map(u32::to_string).collect(),
    };
    let mut when = Vec::new();
    for constraint in &rule.constraints {
        let (key, values) = (constraint.key.as_str(), &constraint.values);
        match key {
            "destination.labels" | "destination.name" => {}
            key if named(key, "destination.labels[") => {}
            "destination.namespace" => {
                if !values.iter().any(|v| matches(v, namespace)) {
                    return Ok(None);
                }
            }
            "destination.port" if operation.ports.is_empty() => operation.ports.clone_from(values),
            "destination.port" | "destination.ip" | "connection.sni" => when.push(condition(key, values.clone())),
            key if named(key, "request.headers[") || key.starts_with("experimental.envoy.filters.") => {
                when.push(condition(key, values.clone()));
            }
            "destination.user" => {
                return Err("constraint destination.user has no equivalent; the rule is left out".into());
            }
            other => return Err(format!("constraint {other:?} is not known; the rule is left out")),
        }
        if values.is_empty() {
            return Err(format!("constraint {key:?} has no values; the rule is left out"));
        }
    }
    let to = (!operation.is_empty()).then_some(To {
        operation: Some(operation),
    });
    Ok(Some((to, when)))
}

/// The rule of both halves.
pub(super) fn rule(from: (Option<From>, Vec<Condition>), to: (Option<To>, Vec<Condition>)) -> Rule {
    let mut when = from.1;
    when.extend(to.1);
    when.sort_by(|a, b| a.key.cmp(&b.key));
    Rule {
        from: from.0.into_iter().collect(),
        to: to.0.into_iter().collect(),
        when,
    }
}

/// `*`, `abc*`, `*abc` or exact (S7.37).
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(suffix), _) => text.ends_with(suffix),
        (_, Some(prefix)) => text.starts_with(prefix),
        _ => pattern == text,
    }
}

/// A brace makes a path of today a template, so such a path has no equivalent.
fn paths(values: &[String]) -> Part<Vec<String>> {
    match values.iter().find(|v| v.contains("{*}") || v.contains("{**}")) {
        Some(path) => Err(format!("path {path:?} would be a template today; the rule is left out")),
        None => Ok(values.to_vec()),
    }
}

fn identity(name: &str) -> String {
    match name {
        ALL_AUTHENTICATED => "*".to_string(),
        name => name.strip_prefix("spiffe://").unwrap_or(name).to_string(),
    }
}

fn condition(key: &str, values: Vec<String>) -> Condition {
    Condition {
        key: key.to_string(),
        values,
        not_values: Vec::new(),
    }
}

/// Whether `key` is `prefix` followed by a name and `]`.
fn named(key: &str, prefix: &str) -> bool {
    key.strip_prefix(prefix)
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|name| !name.is_empty())
}
