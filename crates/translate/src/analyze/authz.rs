//! AuthorizationPolicies: what they name, and values and conditions that do not mean what they seem to.
//!
//! Whether rules cover each other is [`super::logic`]'s business.

use std::collections::BTreeSet;

use mantlet_api::authorization_policy::{Action, Operation, Rule, Source};
use mantlet_api::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication, WorkloadSelector, names};

use super::injection::ports_of;
use super::input::{Input, Resource, Workload};
use super::{Report, table};
use crate::authz::{self, Target};
use crate::peer_authentication::{self, Mode};
use crate::protocol::Protocol;

const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// Workloads of the mesh that a policy in `namespace` with this selector acts on.
pub(super) fn selected<'a>(
    input: &'a Input,
    namespace: &'a str,
    selector: Option<&'a WorkloadSelector>,
) -> impl Iterator<Item = &'a Workload> {
    let everywhere = namespace == input.root();
    let all = input.workloads.iter().filter(move |_| everywhere);
    let own = input.workloads_in(namespace).filter(move |_| !everywhere);
    all.chain(own)
        .filter(|w| w.meshed)
        .filter(move |w| mantlet_api::selector::selects(selector, &w.labels))
}

/// Labels as messages print them: `app=x,version=v1`.
pub(super) fn labels_text<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> String {
    labels
        .into_iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect::<Vec<_>>()
        .join(",")
}

/// What policies refer to: namespaces, providers, workloads.
pub(super) fn references(input: &Input, out: &mut Report) {
    let namespaces: BTreeSet<&str> = input.of("", "Namespace").map(|n| n.name.as_str()).collect();
    for (resource, policy) in input.typed::<AuthorizationPolicy>() {
        let attached = policy.target_ref.is_some() || !policy.target_refs.is_empty();
        if attached {
            attachment(resource, &policy, out);
        } else {
            matching(input, resource, policy.selector.as_ref(), out);
        }
        for (index, rule) in policy.rules.iter().enumerate() {
            for (f, source) in rule
                .from
                .iter()
                .enumerate()
                .filter_map(|(f, from)| Some((f, from.source.as_ref()?)))
            {
                for value in source.namespaces.iter().chain(&source.not_namespaces) {
                    let known = value.contains('*') || namespaces.contains(value.as_str());
                    if !known && !namespaces.is_empty() {
                        out.add(
                            &table::REFERENCED_RESOURCE_NOT_FOUND,
                            resource,
                            format!("spec.rules[{index}].from[{f}].source.namespaces"),
                            format!("Referenced namespace not found: \"{value}\""),
                        );
                    }
                }
            }
        }
        if policy.action == Action::Custom
            && let Some(provider) = &policy.provider
            && !provider.name.is_empty()
            && !input.mesh.extension_providers.iter().any(|p| p.name == provider.name)
        {
            out.add(
                &table::REFERENCED_RESOURCE_NOT_FOUND,
                resource,
                "spec.provider.name",
                format!("Referenced extension provider not found: \"{}\"", provider.name),
            );
        }
    }
    for (resource, policy) in input.typed::<PeerAuthentication>() {
        if policy.has_selector() && resource.namespace != input.root() {
            matching(input, resource, policy.selector.as_ref(), out);
        }
        wrong_root(input, resource, policy.has_selector(), out);
    }
    for (resource, policy) in input.typed::<RequestAuthentication>() {
        let attached = policy.target_ref.is_some() || !policy.target_refs.is_empty();
        if !attached && policy.selector.as_ref().is_some_and(|s| !s.is_empty()) {
            matching(input, resource, policy.selector.as_ref(), out);
        }
        wrong_root(input, resource, attached || policy.selector.is_some(), out);
    }
    for (resource, policy) in input.typed::<AuthorizationPolicy>() {
        let limited = policy.selector.is_some() || policy.target_ref.is_some() || !policy.target_refs.is_empty();
        wrong_root(input, resource, limited, out);
    }
    providers(input, out);
}

/// A policy without workloads (S8.72), or with a selector that Kubernetes Gateways ignore.
fn matching(input: &Input, resource: &Resource, selector: Option<&WorkloadSelector>, out: &mut Report) {
    let selector = selector.filter(|s| !s.is_empty());
    if selector.is_none() && resource.namespace == input.root() {
        return;
    }
    if !input.complete && input.workloads.is_empty() {
        // A file of policies alone says nothing about workloads.
        return;
    }
    let mut all = selected(input, &resource.namespace, selector).peekable();
    if all.peek().is_none() {
        let labels = selector.map(|s| labels_text(&s.match_labels)).unwrap_or_default();
        out.add(
            &table::NO_MATCHING_WORKLOADS,
            resource,
            "spec.selector",
            format!("No matching workloads for this resource with the following labels: {labels}"),
        );
        return;
    }
    if selector.is_none() {
        return;
    }
    let gateways: BTreeSet<&String> = all.filter_map(|w| w.labels.get(GATEWAY_NAME)).collect();
    for gateway in gateways {
        out.add(
            &table::INEFFECTIVE_SELECTOR,
            resource,
            "spec.selector",
            format!("Ineffective selector on Kubernetes Gateway {gateway}. Use the TargetRef field instead."),
        );
    }
}

fn attachment(resource: &Resource, policy: &AuthorizationPolicy, out: &mut Report) {
    for target in policy.target_refs.iter().chain(&policy.target_ref) {
        if target.kind != "Gateway" {
            out.add(
                &table::TARGET_ON_SIDECAR,
                resource,
                "spec.targetRefs",
                format!(
                    "The policy is attached to {} {}, which only a waypoint proxy serves; sidecars ignore it.",
                    target.kind, target.name
                ),
            );
        }
    }
}

fn wrong_root(input: &Input, resource: &Resource, limited: bool, out: &mut Report) {
    let namespace = resource.namespace.as_str();
    let looks_central = matches!(namespace, "istio-system" | "istio-config" | "istio-root" | "istio");
    if limited || namespace == input.root() || !looks_central {
        return;
    }
    if !input
        .workloads
        .iter()
        .any(|w| w.meshed && !w.gateway && w.namespace == namespace)
    {
        out.add(
            &table::WRONG_ROOT_NAMESPACE,
            resource,
            "metadata.namespace",
            format!(
                "The policy acts in namespace {namespace} only; the root namespace of this mesh is {}.",
                input.root()
            ),
        );
    }
}

/// Several CUSTOM providers on one workload (S2.142).
fn providers(input: &Input, out: &mut Report) {
    let mut reported = BTreeSet::new();
    for workload in input.workloads.iter().filter(|w| w.meshed) {
        let bound: Vec<_> = authz::bound(&input.world, target(workload))
            .filter(|p| p.spec.action == Action::Custom && p.broken.is_none())
            .filter_map(|p| Some((p, p.spec.provider.as_ref()?.name.as_str())))
            .collect();
        let Some((_, first)) = bound.first() else { continue };
        for (policy, provider) in &bound {
            if provider == first || !reported.insert((policy.meta.namespace.clone(), policy.meta.name.clone())) {
                continue;
            }
            if let Some(resource) = input.get(
                super::SECURITY,
                "AuthorizationPolicy",
                &policy.meta.namespace,
                &policy.meta.name,
            ) {
                out.add(
                    &table::SEVERAL_PROVIDERS,
                    resource,
                    "spec.provider",
                    format!(
                        "Workload {}/{} already has provider {first:?}; requests that match rules of provider {provider:?} too are \
                         denied.",
                        workload.namespace, workload.name
                    ),
                );
            }
        }
    }
}

/// The workload as authorization sees it.
pub(super) fn target(workload: &Workload) -> Target<'_> {
    Target {
        namespace: &workload.namespace,
        labels: &workload.labels,
        gateway: workload.gateway,
    }
}

/// One policy with what it acts on.
struct Case<'a> {
    input: &'a Input,
    resource: &'a Resource,
    policy: &'a AuthorizationPolicy,
    workloads: Vec<&'a Workload>,
}

/// Values and conditions that do not mean what they seem to.
pub(super) fn traps(input: &Input, out: &mut Report) {
    for (resource, policy) in &input.typed::<AuthorizationPolicy>() {
        let attached = policy.target_ref.is_some() || !policy.target_refs.is_empty();
        let workloads = if attached {
            Vec::new()
        } else {
            selected(input, &resource.namespace, policy.selector.as_ref()).collect()
        };
        let case = Case {
            input,
            resource,
            policy,
            workloads,
        };
        for (index, rule) in policy.rules.iter().enumerate() {
            let path = format!("spec.rules[{index}]");
            values(&case, rule, &path, out);
            identity(&case, rule, &path, out);
            http_on_tcp(&case, rule, &path, out);
            service_ports(&case, rule, &path, out);
        }
        deny_variants(&case, out);
        on_client(&case, out);
    }
}

/// Which form the values of a field have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Principal,
    Namespace,
    Account,
    Path,
    Method,
    Text,
}

fn fields(rule: &Rule) -> Vec<(String, Form, &String)> {
    let mut out = Vec::new();
    for (f, from) in rule.from.iter().enumerate() {
        let Some(s) = &from.source else { continue };
        for (name, form, values) in [
            ("principals", Form::Principal, &s.principals),
            ("notPrincipals", Form::Principal, &s.not_principals),
            ("requestPrincipals", Form::Text, &s.request_principals),
            ("notRequestPrincipals", Form::Text, &s.not_request_principals),
            ("namespaces", Form::Namespace, &s.namespaces),
            ("notNamespaces", Form::Namespace, &s.not_namespaces),
            ("serviceAccounts", Form::Account, &s.service_accounts),
            ("notServiceAccounts", Form::Account, &s.not_service_accounts),
        ] {
            indexed(&format!("from[{f}].source.{name}"), form, values, &mut out);
        }
    }
    for (t, to) in rule.to.iter().enumerate() {
        let Some(o) = &to.operation else { continue };
        for (name, form, values) in [
            ("hosts", Form::Text, &o.hosts),
            ("notHosts", Form::Text, &o.not_hosts),
            ("paths", Form::Path, &o.paths),
            ("notPaths", Form::Path, &o.not_paths),
            ("methods", Form::Method, &o.methods),
            ("notMethods", Form::Method, &o.not_methods),
        ] {
            indexed(&format!("to[{t}].operation.{name}"), form, values, &mut out);
        }
    }
    for (w, when) in rule.when.iter().enumerate() {
        let form = match when.key.as_str() {
            "source.principal" => Form::Principal,
            "source.namespace" => Form::Namespace,
            "source.serviceAccount" => Form::Account,
            key if key.starts_with("request.headers[") || key.starts_with("request.auth.") => Form::Text,
            _ => continue,
        };
        indexed(&format!("when[{w}].values"), form, &when.values, &mut out);
        indexed(&format!("when[{w}].notValues"), form, &when.not_values, &mut out);
    }
    out
}

fn indexed<'a>(path: &str, form: Form, values: &'a [String], out: &mut Vec<(String, Form, &'a String)>) {
    out.extend(
        values
            .iter()
            .enumerate()
            .map(|(i, v)| (format!("{path}[{i}]"), form, v)),
    );
}

fn values(case: &Case<'_>, rule: &Rule, path: &str, out: &mut Report) {
    let mut add = |message, at: &str, text: String| out.add(message, case.resource, format!("{path}.{at}"), text);
    for (at, form, value) in fields(rule) {
        if form == Form::Principal && value.starts_with("spiffe://") {
            let bare = value.trim_start_matches("spiffe://");
            add(
                &table::PRINCIPAL_WITH_SCHEME,
                &at,
                format!("Principal \"{value}\" never matches: principals are written without scheme, \"{bare}\"."),
            );
            continue;
        }
        let wildcards = !matches!(form, Form::Namespace | Form::Account);
        if wildcards && literal_wildcard(value) && !(form == Form::Path && value.contains('{')) {
            let instead = if form == Form::Path {
                " No single value means \"contains\"; use a prefix (\"/x*\"), a suffix (\"*/x\") or templates (\"/{*}/x/{**}\")."
            } else {
                " Only one \"*\" at the beginning or at the end is a wildcard."
            };
            add(
                &table::LITERAL_WILDCARD,
                &at,
                format!("Value \"{value}\" compares a \"*\" literally and practically never matches.{instead}"),
            );
            continue;
        }
        match form {
            Form::Principal | Form::Namespace | Form::Account => {
                if let Some(problem) = malformed(form, value) {
                    add(
                        &table::MALFORMED_IDENTITY,
                        &at,
                        format!("Value \"{value}\" never matches: {problem}."),
                    );
                }
            }
            Form::Path => {
                if let Some(problem) = unnormalised(value) {
                    add(
                        &table::UNNORMALISED_PATH,
                        &at,
                        format!("Path \"{value}\" never matches: {problem}."),
                    );
                }
            }
            Form::Method => {
                let upper = value.to_ascii_uppercase();
                if *value != upper {
                    add(
                        &table::METHOD_CASE,
                        &at,
                        format!("Method \"{value}\" is compared exactly; clients send \"{upper}\"."),
                    );
                }
            }
            Form::Text => {}
        }
    }
}

/// A `*` that is not the whole value, not its only first and not its only last character.
fn literal_wildcard(value: &str) -> bool {
    let count = value.matches('*').count();
    let at_an_end = value.starts_with('*') || value.ends_with('*');
    count > 1 || (count == 1 && !at_an_end)
}

fn malformed(form: Form, value: &str) -> Option<&'static str> {
    const REGEX: &[char] = &['^', '$', '(', ')', '[', ']', '|', '+', '\\', '?'];
    if value.contains(REGEX) {
        return Some("regular expressions are not supported");
    }
    match form {
        Form::Principal if !value.contains('*') => {
            let parts: Vec<&str> = value.split('/').collect();
            let good = matches!(parts.as_slice(), [domain, "ns", namespace, "sa", account]
                if !domain.is_empty() && names::is_dns1123_label(namespace) && names::is_dns1123_subdomain(account));
            (!good).then_some("a principal is TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT")
        }
        Form::Namespace if !value.contains('*') => {
            (!names::is_dns1123_label(value)).then_some("that is no namespace name")
        }
        Form::Account => {
            let account = value.split_once('/').map_or(value, |(_, account)| account);
            (!names::is_dns1123_subdomain(account)).then_some("that is no service account name")
        }
        _ => None,
    }
}

/// Why no normalised path without query is equal to this value.
fn unnormalised(value: &str) -> Option<String> {
    let text = value.strip_suffix('*').unwrap_or(value);
    let text = text.strip_prefix('*').unwrap_or(text);
    if !value.starts_with(['/', '*']) {
        return Some("request paths begin with \"/\"".into());
    }
    for (bad, why) in [
        ("?", "the query is not part of the compared path"),
        ("#", "the fragment is not part of the compared path"),
        ("/./", "\".\" segments are removed before"),
        ("/../", "\"..\" segments are resolved before"),
        ("\\", "backslashes become slashes before"),
    ] {
        if text.contains(bad) {
            return Some(why.to_string());
        }
    }
    let exact = !value.contains('*') && !value.contains('{');
    if exact && (text.ends_with("/.") || text.ends_with("/..")) {
        return Some("\".\" and \"..\" segments are resolved before".into());
    }
    // %41 and the like are decoded by normalisation; %2F and %5C are not, but then differ by mode.
    for (at, _) in text.match_indices('%') {
        if let Some(hex) = text.get(at + 1..at + 3)
            && let Ok(byte) = u8::from_str_radix(hex, 16)
            && (byte.is_ascii_alphanumeric() || b"-._~".contains(&byte))
        {
            return Some(format!("\"%{hex}\" is decoded to \"{}\" before", char::from(byte)));
        }
    }
    None
}

fn positive_peer(source: &Source) -> bool {
    !source.principals.is_empty()
        || !source.namespaces.is_empty()
        || !source.service_accounts.is_empty()
        || !source.trust_domains.is_empty()
}

fn negative_peer(source: &Source) -> bool {
    !source.not_principals.is_empty()
        || !source.not_namespaces.is_empty()
        || !source.not_service_accounts.is_empty()
        || !source.not_trust_domains.is_empty()
}

fn is_peer_key(key: &str) -> bool {
    matches!(
        key,
        "source.principal" | "source.namespace" | "source.serviceAccount" | "source.trustDomain"
    )
}

fn identity(case: &Case<'_>, rule: &Rule, path: &str, out: &mut Report) {
    let mode = |w: &&Workload| peer_authentication::effective(&case.input.world, &w.namespace, &w.labels);
    let asks = rule.from.iter().filter_map(|f| f.source.as_ref()).any(positive_peer)
        || rule.when.iter().any(|c| is_peer_key(&c.key) && !c.values.is_empty());
    if asks {
        for workload in &case.workloads {
            let effective = mode(workload);
            let disabled = effective.workload == Mode::Disable && effective.ports.values().all(|m| *m == Mode::Disable);
            if disabled && !workload.gateway {
                out.add(
                    &table::IDENTITY_WITHOUT_STRICT,
                    case.resource,
                    path,
                    format!(
                        "The rule asks for the caller's identity, but {}/{} accepts plaintext only (mTLS mode DISABLE), so it never \
                         matches there.",
                        workload.namespace, workload.name
                    ),
                );
                break;
            }
        }
    }
    if case.policy.action != Action::Allow {
        return;
    }
    let when_positive = rule
        .when
        .iter()
        .any(|c| (is_peer_key(&c.key) || c.key.starts_with("request.auth.")) && !c.values.is_empty());
    let plaintext_possible = if case.workloads.is_empty() {
        peer_authentication::namespace_mode(&case.input.world, &case.resource.namespace) != Some(Mode::Strict)
    } else {
        case.workloads.iter().any(|w| {
            let effective = mode(w);
            effective.workload != Mode::Strict || effective.ports.values().any(|m| *m != Mode::Strict)
        })
    };
    for (index, source) in rule
        .from
        .iter()
        .enumerate()
        .filter_map(|(i, f)| Some((i, f.source.as_ref()?)))
    {
        let positive = positive_peer(source)
            || !source.request_principals.is_empty()
            || !source.ip_blocks.is_empty()
            || !source.remote_ip_blocks.is_empty()
            || when_positive;
        let tokens = !source.not_request_principals.is_empty();
        if !positive && ((negative_peer(source) && plaintext_possible) || (tokens && !negative_peer(source))) {
            let who = if tokens && !negative_peer(source) {
                "requests without any token"
            } else {
                "plaintext callers, which have no identity"
            };
            out.add(
                &table::NEGATIVE_IDENTITY,
                case.resource,
                format!("{path}.from[{index}].source"),
                format!("This source only says who may not call: it also admits {who}."),
            );
        }
    }
}

fn has_http(operation: &Operation) -> bool {
    !(operation.hosts.is_empty()
        && operation.not_hosts.is_empty()
        && operation.methods.is_empty()
        && operation.not_methods.is_empty()
        && operation.paths.is_empty()
        && operation.not_paths.is_empty())
}

fn http_on_tcp(case: &Case<'_>, rule: &Rule, path: &str, out: &mut Report) {
    let tokens = |s: &Source| !s.request_principals.is_empty() || !s.not_request_principals.is_empty();
    let general = rule.from.iter().filter_map(|f| f.source.as_ref()).any(tokens)
        || rule.when.iter().any(|c| c.key.starts_with("request."));
    let operations: Vec<&Operation> = rule.to.iter().filter_map(|t| t.operation.as_ref()).collect();
    if !general && !operations.iter().any(|o| has_http(o)) {
        return;
    }
    if matches!(case.policy.action, Action::Audit) {
        return;
    }
    let meant = |port: u64| {
        let text = port.to_string();
        operations.is_empty()
            || operations.iter().any(|o| {
                (general || has_http(o))
                    && (o.ports.is_empty() || o.ports.contains(&text))
                    && !o.not_ports.contains(&text)
            })
    };
    for workload in case.workloads.iter().filter(|w| !w.gateway) {
        for service in case.input.services_of(workload) {
            for port in ports_of(service) {
                let text = |key: &str| port.get(key).and_then(serde_json::Value::as_str);
                let number = port.get("port").and_then(serde_json::Value::as_u64).unwrap_or_default();
                let protocol = Protocol::of_service_port(
                    text("protocol"),
                    text("appProtocol"),
                    text("name"),
                    u16::try_from(number).unwrap_or_default(),
                );
                let target = port.get("targetPort").and_then(|t| workload.port(t)).unwrap_or(number);
                if !matches!(protocol, Protocol::Tcp | Protocol::Tls) || !meant(target) {
                    continue;
                }
                let effect = match case.policy.action {
                    Action::Allow => "the rule never matches there, so it admits nobody",
                    _ => "there the rule matches every connection that its other fields match",
                };
                out.add(
                    &table::HTTP_FIELDS_ON_TCP,
                    case.resource,
                    path,
                    format!(
                        "The rule has HTTP fields but applies to port {target} of {}/{}, which Service {} declares as {}: {effect}.",
                        workload.namespace,
                        workload.name,
                        service.name,
                        if protocol == Protocol::Tls { "TLS" } else { "TCP" }
                    ),
                );
                return;
            }
        }
    }
}

fn service_ports(case: &Case<'_>, rule: &Rule, path: &str, out: &mut Report) {
    let mut named: Vec<(String, &String)> = Vec::new();
    for (t, to) in rule.to.iter().enumerate() {
        for port in to.operation.iter().flat_map(|o| o.ports.iter().chain(&o.not_ports)) {
            named.push((format!("{path}.to[{t}].operation.ports"), port));
        }
    }
    for (w, when) in rule
        .when
        .iter()
        .enumerate()
        .filter(|(_, c)| c.key == "destination.port")
    {
        for port in when.values.iter().chain(&when.not_values) {
            named.push((format!("{path}.when[{w}]"), port));
        }
    }
    for (at, text) in named {
        let Ok(number) = text.parse::<u64>() else { continue };
        if let Some((workload, service, target)) = only_service_port(case.input, &case.workloads, number) {
            out.add(
                &table::SERVICE_PORT_IN_RULE,
                case.resource,
                at,
                format!(
                    "Port {number} is a port of Service {}, but rules see the workload's port: {}/{} listens on {target}.",
                    service.name, workload.namespace, workload.name
                ),
            );
        }
    }
}

/// When a number is a Service's port but none of the workloads' own ports: a workload, the Service and the real port.
pub(super) fn only_service_port<'a>(
    input: &'a Input,
    workloads: &[&'a Workload],
    number: u64,
) -> Option<(&'a Workload, &'a Resource, u64)> {
    let mut found = None;
    for workload in workloads {
        let declared = workload
            .containers()
            .filter_map(|c| c.get("ports")?.as_array())
            .flatten()
            .any(|p| p.get("containerPort").and_then(serde_json::Value::as_u64) == Some(number));
        if declared {
            return None;
        }
        for service in input.services_of(workload) {
            for port in ports_of(service) {
                let own = port.get("port").and_then(serde_json::Value::as_u64);
                let target = match port.get("targetPort") {
                    Some(target) => workload.port(target),
                    None => own,
                };
                if target == Some(number) {
                    return None;
                }
                if own == Some(number)
                    && let Some(target) = target
                {
                    found = Some((*workload, service, target));
                }
            }
        }
    }
    found
}

/// DENY rules that miss a variant which servers take for the same.
fn deny_variants(case: &Case<'_>, out: &mut Report) {
    if case.policy.action != Action::Deny {
        return;
    }
    let operations = || {
        case.policy
            .rules
            .iter()
            .flat_map(|r| &r.to)
            .filter_map(|t| t.operation.as_ref())
    };
    let covers = |value: &str, other: &str| match (value.strip_suffix('*'), value.strip_prefix('*')) {
        _ if value == "*" || value == other => true,
        (Some(prefix), None) => other.starts_with(prefix),
        (None, Some(suffix)) => other.ends_with(suffix),
        _ => false,
    };
    for (index, rule) in case.policy.rules.iter().enumerate() {
        for (t, operation) in rule
            .to
            .iter()
            .enumerate()
            .filter_map(|(t, to)| Some((t, to.operation.as_ref()?)))
        {
            let path = format!("spec.rules[{index}].to[{t}].operation");
            for value in &operation.paths {
                let exact = !value.contains(['*', '{']) && value.len() > 1 && !value.ends_with('/');
                let last = value.rsplit('/').next().unwrap_or_default();
                // A file name is not served with a slash, nor is a method of gRPC (`/package.Service/Method`).
                let grpc = value.split('/').nth(1).is_some_and(|service| service.contains('.'));
                if !exact || last.contains('.') || grpc {
                    continue;
                }
                let slashed = format!("{value}/");
                if !operations().flat_map(|o| &o.paths).any(|other| covers(other, &slashed)) {
                    out.add(
                        &table::TRAILING_SLASH,
                        case.resource,
                        format!("{path}.paths"),
                        format!("The rule denies \"{value}\" but not \"{slashed}\", which most servers treat alike."),
                    );
                }
            }
            for value in &operation.hosts {
                if value.contains(['*', ':']) {
                    continue;
                }
                let with_port = format!("{value}:80").to_ascii_lowercase();
                let any = operations()
                    .flat_map(|o| &o.hosts)
                    .any(|other| covers(&other.to_ascii_lowercase(), &with_port));
                if !any {
                    out.add(
                        &table::HOST_WITHOUT_PORT,
                        case.resource,
                        format!("{path}.hosts"),
                        format!("The rule denies host \"{value}\" but not \"{value}:80\"; add \"{value}:*\"."),
                    );
                }
            }
        }
    }
}

/// A selector that names the callers.
fn on_client(case: &Case<'_>, out: &mut Report) {
    let has_selector = case.policy.selector.as_ref().is_some_and(|s| !s.is_empty());
    if !has_selector || case.workloads.is_empty() || case.policy.action != Action::Allow {
        return;
    }
    let mut callers: Vec<&String> = Vec::new();
    for source in case.policy.rules.iter().flat_map(|r| &r.from) {
        match &source.source {
            Some(s) if !s.principals.is_empty() => callers.extend(&s.principals),
            _ => return,
        }
    }
    let is_caller = |w: &&Workload| {
        let own = format!("/ns/{}/sa/{}", w.namespace, w.account());
        w.account() != "default" && callers.iter().all(|c| c.ends_with(&own))
    };
    if !callers.is_empty() && case.workloads.iter().all(is_caller) {
        out.add(
            &table::SELECTOR_ON_CLIENT,
            case.resource,
            "spec.selector",
            format!(
                "The policy selects {}/{}, which is the very caller that it allows; select the workload that is called.",
                case.workloads[0].namespace, case.workloads[0].name
            ),
        );
    }
}
