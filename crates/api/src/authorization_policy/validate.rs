//! Istio's rules for AuthorizationPolicy (SEMANTICS 8c). Called through [`crate::validate::object`].
//!
//! All errors carry the prefix `invalid policy <name>.<namespace>:`, as users know it.

use serde_json::Value;

use super::{Action, AuthorizationPolicy, Condition, Operation, Rule, Source};
use crate::diagnostic::{Diagnostic, Severity, did_you_mean};
use crate::validate;

/// Findings for a decoded policy.
pub(crate) fn validate(spec: &AuthorizationPolicy, name: &str, namespace: &str, _raw: &Value) -> Vec<Diagnostic> {
    let mut findings = validate::selector(spec.selector.as_ref(), "spec.selector");
    validate::one_target(
        spec.selector.is_some(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
        &mut findings,
    );
    match spec.action {
        Action::Custom => custom(spec, &mut findings),
        action => {
            if spec.provider.is_some() {
                findings.push(Diagnostic::error(
                    "spec.provider",
                    format!("`provider` must not be with non CUSTOM action, found {}", action.name()),
                ));
            }
            if action == Action::Deny && spec.rules.is_empty() {
                findings.push(Diagnostic::error(
                    "spec.rules",
                    "DENY action without `rules` is meaningless as it will never be triggered, add an empty rule `{}` if you want it be triggered for every request",
                ));
            }
        }
    }
    for (i, rule) in spec.rules.iter().enumerate() {
        check_rule(rule, i, &mut findings);
    }
    if spec.action == Action::Deny && spec.rules.iter().any(denies_all_tcp) {
        findings.push(Diagnostic::warning(
            "spec.rules",
            "configured AuthorizationPolicy will deny all traffic to TCP ports under its scope due to the use of only HTTP attributes in a DENY rule; it is recommended to explicitly specify the port",
        ));
    }
    for finding in findings.iter_mut().filter(|f| f.severity == Severity::Error) {
        finding.message = format!("invalid policy {name}.{namespace}: {}", finding.message);
    }
    findings
}

impl Action {
    /// Its name in YAML.
    pub fn name(self) -> &'static str {
        match self {
            Action::Allow => "ALLOW",
            Action::Deny => "DENY",
            Action::Audit => "AUDIT",
            Action::Custom => "CUSTOM",
        }
    }
}

/// Nulls in lists, missing wrappers and empty lists, which have to be looked for before decoding (S8.24, S8.25).
pub(crate) fn nulls(raw: &Value) -> Vec<Diagnostic> {
    let (mut findings, mut empty) = (Vec::new(), Vec::new());
    let name = raw
        .pointer("/metadata/name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let namespace = raw
        .pointer("/metadata/namespace")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let mut nil = |path: String, what: &str, rule: usize| {
        let message = format!("invalid policy {name}.{namespace}: `{what}` must not be nil, found at rule {rule}");
        findings.push(Diagnostic::error(path, message));
    };
    let rules = raw
        .pointer("/spec/rules")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    for (i, rule) in rules.iter().enumerate() {
        if rule.is_null() {
            nil(format!("spec.rules[{i}]"), "rule", i);
            continue;
        }
        for (list, wrapper, inner) in [("from", "from", "source"), ("to", "to", "operation")] {
            let entries = rule
                .get(list)
                .and_then(Value::as_array)
                .map(Vec::as_slice)
                .unwrap_or_default();
            if entries.is_empty() && rule.get(list).is_some_and(Value::is_array) {
                let message =
                    format!("invalid policy {name}.{namespace}: `{list}` must not be empty, found at rule {i}");
                empty.push(Diagnostic::error(format!("spec.rules[{i}].{list}"), message));
            }
            for (j, entry) in entries.iter().enumerate() {
                let path = format!("spec.rules[{i}].{list}[{j}]");
                if entry.is_null() {
                    nil(path, wrapper, i);
                } else if entry.is_object() && entry.get(inner).is_none_or(Value::is_null) {
                    nil(path, &format!("{list}.{inner}"), i);
                }
            }
        }
    }
    findings.append(&mut empty);
    findings
}

fn custom(spec: &AuthorizationPolicy, findings: &mut Vec<Diagnostic>) {
    if spec.rules.is_empty() {
        findings.push(Diagnostic::error(
            "spec.rules",
            "CUSTOM action without `rules` is meaningless as it will never be triggered, add an empty rule `{}` if you want it be triggered for every request",
        ));
    } else if spec.provider.as_ref().is_none_or(|provider| provider.name.is_empty()) {
        findings.push(Diagnostic::error("spec.provider", "`provider.name` must not be empty"));
    }
    for (i, rule) in spec.rules.iter().enumerate() {
        for source in rule.from.iter().filter_map(|from| from.source.as_ref()) {
            for (name, list) in [
                ("From.Namespaces", &source.namespaces),
                ("From.NotNamespaces", &source.not_namespaces),
                ("From.ServiceAccounts", &source.service_accounts),
                ("From.NotServiceAccounts", &source.not_service_accounts),
                ("From.TrustDomains", &source.trust_domains),
                ("From.NotTrustDomains", &source.not_trust_domains),
                ("From.Principals", &source.principals),
                ("From.NotPrincipals", &source.not_principals),
                ("From.RequestPrincipals", &source.request_principals),
                ("From.NotRequestPrincipals", &source.not_request_principals),
            ] {
                if !list.is_empty() {
                    findings.push(Diagnostic::error(
                        format!("spec.rules[{i}].from"),
                        format!("{name} is currently not supported with CUSTOM action"),
                    ));
                }
            }
        }
        for condition in &rule.when {
            let key = condition.key.as_str();
            if matches!(
                key,
                "source.namespace" | "source.serviceAccount" | "source.trustDomain" | "source.principal"
            ) || key.starts_with("request.auth.")
            {
                findings.push(Diagnostic::error(
                    format!("spec.rules[{i}].when"),
                    format!("{key} is currently not supported with CUSTOM action"),
                ));
            }
        }
    }
}

fn check_rule(rule: &Rule, i: usize, findings: &mut Vec<Diagnostic>) {
    for (j, from) in rule.from.iter().enumerate() {
        let path = format!("spec.rules[{i}].from[{j}].source");
        match &from.source {
            Some(s) if !s.is_empty() => source(s, &path, i, findings),
            _ => findings.push(Diagnostic::error(
                path,
                format!("`from.source` must not be empty, found at rule {i}"),
            )),
        }
    }
    for (j, to) in rule.to.iter().enumerate() {
        let path = format!("spec.rules[{i}].to[{j}].operation");
        match &to.operation {
            Some(o) if !o.is_empty() => operation(o, &path, findings),
            _ => findings.push(Diagnostic::error(
                path,
                format!("`to.operation` must not be empty, found at rule {i}"),
            )),
        }
    }
    for (j, when) in rule.when.iter().enumerate() {
        condition(when, &format!("spec.rules[{i}].when[{j}]"), findings);
    }
}

fn source(source: &Source, path: &str, rule: usize, findings: &mut Vec<Diagnostic>) {
    let accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
    let identities = [
        &source.principals,
        &source.not_principals,
        &source.namespaces,
        &source.not_namespaces,
    ];
    if accounts && identities.iter().any(|list| !list.is_empty()) {
        findings.push(Diagnostic::error(
            path,
            format!("cannot set serviceAccounts with namespaces or principals, found at rule {rule}"),
        ));
    }
    for (field, list) in [
        ("Principals", &source.principals),
        ("NotPrincipals", &source.not_principals),
        ("RequestPrincipals", &source.request_principals),
        ("NotRequestPrincipals", &source.not_request_principals),
        ("Namespaces", &source.namespaces),
        ("NotNamespaces", &source.not_namespaces),
        ("ServiceAccounts", &source.service_accounts),
        ("NotServiceAccounts", &source.not_service_accounts),
        ("TrustDomains", &source.trust_domains),
        ("NotTrustDomains", &source.not_trust_domains),
        ("IpBlocks", &source.ip_blocks),
        ("NotIpBlocks", &source.not_ip_blocks),
        ("RemoteIpBlocks", &source.remote_ip_blocks),
        ("NotRemoteIpBlocks", &source.not_remote_ip_blocks),
    ] {
        let path = &format!("{path}.{}", yaml_name(field));
        let field = format!("From.{field}");
        no_empty(list, &field, path, findings);
        let check: fn(&str) -> Result<(), String> = match field.as_str() {
            "From.ServiceAccounts" | "From.NotServiceAccounts" => {
                if list.len() > 16 {
                    findings.push(Diagnostic::error(
                        path,
                        format!("{field} may not have more than 16 values"),
                    ));
                }
                service_account
            }
            "From.TrustDomains" | "From.NotTrustDomains" => trust_domain,
            f if f.ends_with("IpBlocks") => ip_block,
            _ => continue,
        };
        each(list, check, path, findings);
    }
}

fn operation(operation: &Operation, path: &str, findings: &mut Vec<Diagnostic>) {
    for (field, list) in [
        ("To.Hosts", &operation.hosts),
        ("To.NotHosts", &operation.not_hosts),
        ("To.Ports", &operation.ports),
        ("To.NotPorts", &operation.not_ports),
        ("To.Methods", &operation.methods),
        ("To.NotMethods", &operation.not_methods),
        ("To.Paths", &operation.paths),
        ("To.NotPaths", &operation.not_paths),
    ] {
        let path = &format!("{path}.{}", yaml_name(field.trim_start_matches("To.")));
        no_empty(list, field, path, findings);
    }
    for (name, list) in [("ports", &operation.ports), ("notPorts", &operation.not_ports)] {
        each(list, port, &format!("{path}.{name}"), findings);
    }
    for (name, list) in [("paths", &operation.paths), ("notPaths", &operation.not_paths)] {
        each(list, path_template, &format!("{path}.{name}"), findings);
    }
}

fn each(list: &[String], check: fn(&str) -> Result<(), String>, path: &str, findings: &mut Vec<Diagnostic>) {
    for (i, value) in list.iter().enumerate().filter(|(_, value)| !value.is_empty()) {
        if let Err(message) = check(value) {
            findings.push(Diagnostic::error(format!("{path}[{i}]"), message));
        }
    }
}

fn no_empty(list: &[String], field: &str, path: &str, findings: &mut Vec<Diagnostic>) {
    if let Some(i) = list.iter().position(String::is_empty) {
        findings.push(Diagnostic::error(
            format!("{path}[{i}]"),
            format!("empty value not allowed, found in {field}"),
        ));
    }
}

/// `NotIpBlocks` → `notIpBlocks`: the field in YAML of Istio's name for it in messages.
fn yaml_name(field: &str) -> String {
    let mut chars = field.chars();
    chars
        .next()
        .map(|first| first.to_ascii_lowercase().to_string() + chars.as_str())
        .unwrap_or_default()
}

/// A condition's key and values (S8.33, S8.34).
fn condition(condition: &Condition, path: &str, findings: &mut Vec<Diagnostic>) {
    let key = condition.key.as_str();
    if key.is_empty() {
        findings.push(Diagnostic::error(format!("{path}.key"), "`key` must not be empty").with_allowed(KEYS));
        return;
    }
    if condition.values.is_empty() && condition.not_values.is_empty() {
        findings.push(Diagnostic::error(
            path,
            format!("at least one of `values` or `notValues` must be set for key {key}"),
        ));
        return;
    }
    let lists = [("values", &condition.values), ("notValues", &condition.not_values)];
    no_empty(&condition.values, "Values", &format!("{path}.values"), findings);
    no_empty(
        &condition.not_values,
        "NotValues",
        &format!("{path}.notValues"),
        findings,
    );
    match condition_check(key) {
        Err(message) => {
            let unknown = message.starts_with("unknown attribute");
            let finding = Diagnostic::error(
                format!("{path}.key"),
                format!("invalid `value` for `key` {key}: {message}"),
            );
            findings.push(if unknown {
                finding.with_hint(did_you_mean(key, KEYS)).with_allowed(KEYS)
            } else {
                finding
            });
        }
        Ok(check) => {
            for (name, list) in lists {
                for (i, value) in list.iter().enumerate().filter(|(_, value)| !value.is_empty()) {
                    if let Err(message) = check(value) {
                        findings.push(Diagnostic::error(
                            format!("{path}.{name}[{i}]"),
                            format!("invalid `value` for `key` {key}: {message}"),
                        ));
                    }
                }
            }
        }
    }
}

/// The attributes that a condition may ask for (S8.34); those with brackets stand for a family.
const KEYS: [&str; 15] = [
    "request.headers[NAME]",
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "source.trustDomain",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[NAME]",
    "destination.ip",
    "destination.port",
    "connection.sni",
    "experimental.envoy.filters.FILTER[KEY]",
];

type Check = fn(&str) -> Result<(), String>;

/// What the values of an attribute have to look like, or why the attribute is refused.
fn condition_check(key: &str) -> Result<Check, String> {
    let any: Check = |_| Ok(());
    match key {
        "source.ip" | "remote.ip" | "destination.ip" => return Ok(ip_block),
        "destination.port" => return Ok(port),
        "source.namespace"
        | "source.principal"
        | "request.auth.principal"
        | "request.auth.audiences"
        | "request.auth.presenter"
        | "connection.sni" => return Ok(any),
        "source.serviceAccount" => return Ok(service_account),
        "source.trustDomain" => return Ok(trust_domain_wildcard),
        "destination.namespace" => return Err(format!("attribute {key} is replaced by the metadata.namespace")),
        "destination.name" | "destination.user" => return Err(format!("deprecated attribute {key}")),
        _ => {}
    }
    if key.starts_with("destination.labels") {
        return Err(format!("attribute {key} is replaced by the workload selector"));
    }
    for prefix in ["request.headers", "request.auth.claims", "experimental.envoy.filters."] {
        let Some(rest) = key.strip_prefix(prefix) else { continue };
        let bracket = rest.find('[');
        let good = match bracket {
            Some(at) => (prefix.ends_with('.') == (at > 0)) && rest.ends_with(']') && rest.len() > at + 2,
            None => false,
        };
        return if good {
            Ok(any)
        } else {
            Err(format!("bad key ({key}): should have format a[b]"))
        };
    }
    Err(format!("unknown attribute: {key}"))
}

fn ip_block(value: &str) -> Result<(), String> {
    if value.contains('/') {
        value
            .parse::<ipnet::IpNet>()
            .map(|_| ())
            .map_err(|e| format!("bad CIDR range ({value}): {e}"))
    } else {
        value
            .parse::<std::net::IpAddr>()
            .map(|_| ())
            .map_err(|_| format!("bad IP address ({value})"))
    }
}

fn port(value: &str) -> Result<(), String> {
    let digits = !value.is_empty() && value.len() <= 5 && value.bytes().all(|b| b.is_ascii_digit());
    match value.parse::<u32>() {
        Ok(number) if digits && number <= 65535 => Ok(()),
        _ => Err(format!("bad port ({value}): must be a decimal number from 0 to 65535")),
    }
}

fn service_account(value: &str) -> Result<(), String> {
    if value.contains('*') {
        return Err(format!("wildcard not allowed in service account {value:?}"));
    }
    if value.len() > 320 {
        return Err("service account must not be longer than 320 characters".into());
    }
    let parts: Vec<&str> = value.split('/').collect();
    if parts.len() > 2 {
        return Err(format!("service account {value:?} must have at most one '/'"));
    }
    if parts.iter().any(|part| part.is_empty()) {
        return Err(format!(
            "namespace and name of service account {value:?} must not be empty"
        ));
    }
    Ok(())
}

fn trust_domain(value: &str) -> Result<(), String> {
    if value.contains('/') {
        return Err(format!("trust domain must not contain '/': {value:?}"));
    }
    trust_domain_wildcard(value)
}

fn trust_domain_wildcard(value: &str) -> Result<(), String> {
    let inner = value
        .strip_prefix('*')
        .or_else(|| value.strip_suffix('*'))
        .unwrap_or(value);
    if inner.contains('*') {
        return Err(format!(
            "trust domain may have one wildcard, at its start or end: {value:?}"
        ));
    }
    Ok(())
}

/// A path, possibly with `{*}` and `{**}` segments (S8.32).
fn path_template(value: &str) -> Result<(), String> {
    if !value.contains('{') && !value.contains('}') {
        return Ok(());
    }
    let bad_brace = || format!("invalid path {value}. Contains '{{' or '}}' beyond a supported path template");
    let mut after_double = false;
    let segments = value.split('/').skip(usize::from(value.starts_with('/')));
    let count = value.split('/').count() - usize::from(value.starts_with('/'));
    for (i, segment) in segments.enumerate() {
        match segment {
            "{*}" | "{**}" => {
                if after_double {
                    return Err(format!("invalid path {value}. {{**}} is not the last operator"));
                }
                after_double = segment == "{**}";
            }
            // A trailing slash is fine, an inner empty segment is not.
            "" if i + 1 == count => {}
            literal if literal.contains(['{', '}']) => return Err(bad_brace()),
            literal => {
                let good = !literal.is_empty()
                    && literal
                        .bytes()
                        .all(|b| b.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&b));
                if !good {
                    return Err(format!(
                        "invalid path {value}. invalid string literal in segment {literal:?}"
                    ));
                }
            }
        }
    }
    Ok(())
}

/// True when a DENY rule shrinks to "any" on TCP ports (S8.35).
fn denies_all_tcp(rule: &Rule) -> bool {
    if !rule.to.is_empty() {
        let mut operations = rule.to.iter().filter_map(|to| to.operation.as_ref());
        return operations.all(|operation| operation.ports.is_empty() && operation.not_ports.is_empty());
    }
    if rule.from.is_empty() {
        return false;
    }
    rule.from.iter().filter_map(|from| from.source.as_ref()).all(|source| {
        let l4 = [
            &source.principals,
            &source.not_principals,
            &source.namespaces,
            &source.not_namespaces,
            &source.service_accounts,
            &source.not_service_accounts,
            &source.ip_blocks,
            &source.not_ip_blocks,
            &source.remote_ip_blocks,
            &source.not_remote_ip_blocks,
        ];
        l4.iter().all(|list| list.is_empty())
    })
}

#[cfg(test)]
mod tests;
