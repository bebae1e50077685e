//! Rules of the former kinds (S7.1, S7.2, S7.16, S7.49) and the warning with their modern equivalent.

use std::collections::BTreeSet;

use serde_json::Value;

use super::authn::{Jwt, MutualTlsMode, PeerMode, Policy, Port, StringMatch};
use super::rbac::{AccessRule, EnforcementMode, RbacConfig, RbacMode, ServiceRole, ServiceRoleBinding, Subject};
use super::{DEFAULT, normalize, read};
use crate::diagnostic::{Code, Diagnostic, Hint, Severity};
use crate::kind::Kind;
use crate::names::is_dns1123_label;

/// All findings about an object of a former kind: broken rules, fields it does not have (refused, as nothing prunes them), and a
/// warning that says what to write today.
pub fn validate(kind: &'static Kind, object: &Value) -> Vec<Diagnostic> {
    let mut findings = vec![deprecation(kind, object)];
    let normal = serde_json::json!({ "spec": normalize(object.get("spec").unwrap_or(&Value::Null)) });
    findings.extend(crate::crd::unknown_fields_of(kind, &normal));
    let name = object
        .pointer("/metadata/name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let mut checks = Checks { findings };
    match kind.kind {
        "MeshPolicy" => checks.read::<Policy>(kind, object, |c, spec| c.policy(spec, name, true)),
        "Policy" => checks.read::<Policy>(kind, object, |c, spec| c.policy(spec, name, false)),
        "ServiceRole" => checks.read::<ServiceRole>(kind, object, |c, spec| c.role(spec)),
        "ServiceRoleBinding" => checks.read::<ServiceRoleBinding>(kind, object, |c, spec| c.binding(spec)),
        _ => checks.read::<RbacConfig>(kind, object, |c, spec| c.config(spec, kind.kind, name)),
    }
    checks.findings
}

fn deprecation(kind: &'static Kind, object: &Value) -> Diagnostic {
    let message = format!(
        "{} {} is a former kind that Istio has removed; write {} instead (`mantlet migrate -f FILE` does)",
        kind.api_version(),
        kind.kind,
        equivalent(kind, object)
    );
    Diagnostic::new(Code::SCHEMA_WARNING, Severity::Warning, "kind", message)
}

/// What to write today in place of an object, in a few words.
pub fn equivalent(kind: &'static Kind, object: &Value) -> String {
    let mode = |policy: &Policy| match policy.peer_mode().0 {
        PeerMode::Strict => "STRICT",
        PeerMode::Permissive => "PERMISSIVE",
        PeerMode::Disable => "DISABLE",
    };
    let tokens = |policy: &Policy| {
        if policy.origins.is_empty() {
            ""
        } else if policy.origin_is_optional {
            ", and a RequestAuthentication for its origins"
        } else {
            ", and for its origins a RequestAuthentication with an AuthorizationPolicy that denies requests without a token"
        }
    };
    match kind.kind {
        "MeshPolicy" => {
            let policy: Policy = read(kind, object).unwrap_or_default();
            format!(
                "PeerAuthentication \"default\" in the root namespace (istio-system) with spec.mtls.mode {}{}",
                mode(&policy),
                tokens(&policy)
            )
        }
        "Policy" => {
            let policy: Policy = read(kind, object).unwrap_or_default();
            let what = match policy.targets.as_slice() {
                [] => "PeerAuthentication \"default\" of the namespace".to_string(),
                targets if targets.iter().any(|t| !t.ports.is_empty()) => {
                    "PeerAuthentication with a selector for each service and portLevelMtls by the workload's port"
                        .into()
                }
                _ => "PeerAuthentication with a selector for each service".into(),
            };
            format!("{what} with mode {}{}", mode(&policy), tokens(&policy))
        }
        "ServiceRole" => "the `to` and `when` of an AuthorizationPolicy with a selector for each service".into(),
        "ServiceRoleBinding" => {
            let binding: ServiceRoleBinding = read(kind, object).unwrap_or_default();
            let trial = if binding.mode == EnforcementMode::Permissive {
                ", annotated istio.io/dry-run: \"true\""
            } else {
                ""
            };
            format!("the `from` of the AuthorizationPolicy that its role becomes{trial}")
        }
        _ => {
            let config: RbacConfig = read(kind, object).unwrap_or_default();
            match config.mode {
                RbacMode::Off => "nothing: without AuthorizationPolicies nothing is denied".into(),
                RbacMode::On => {
                    "an AuthorizationPolicy with `spec: {}` in the root namespace (istio-system), which denies by default".into()
                }
                RbacMode::OnWithInclusion => {
                    "an AuthorizationPolicy with empty rules for each namespace and service of the inclusion".into()
                }
                RbacMode::OnWithExclusion => {
                    "an AuthorizationPolicy with `spec: {}` in the root namespace, and one with `rules: [{}]` for each exclusion".into()
                }
            }
        }
    }
}

struct Checks {
    findings: Vec<Diagnostic>,
}

impl Checks {
    fn error(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.findings.push(Diagnostic::error(path, message));
    }

    fn read<T: serde::de::DeserializeOwned + Default>(
        &mut self,
        kind: &'static Kind,
        object: &Value,
        check: impl FnOnce(&mut Checks, &T),
    ) {
        match read::<T>(kind, object) {
            Ok(spec) => check(self, &spec),
            Err((path, message)) => {
                let hint = (path == "spec.mode" && object.pointer("/spec/mode").is_some_and(Value::is_boolean))
                    .then(|| Hint::Advice("YAML reads ON and OFF as booleans; put the word into quotes".into()));
                self.findings.push(
                    Diagnostic::new(
                        Code::DECODE,
                        Severity::Error,
                        path.clone(),
                        format!("error decoding configuration: {path}: {message}"),
                    )
                    .with_hint(hint),
                );
            }
        }
    }

    fn policy(&mut self, policy: &Policy, name: &str, mesh: bool) {
        if mesh && name != DEFAULT {
            self.error(
                "metadata.name",
                format!("MeshPolicy must be named \"default\", found {name:?}"),
            );
        }
        if mesh && !policy.targets.is_empty() {
            self.error("spec.targets", "MeshPolicy has no targets: it is for the whole mesh");
        }
        if !mesh && policy.targets.is_empty() && name != DEFAULT {
            self.error(
                "metadata.name",
                format!("a Policy without targets is for its namespace and must be named \"default\", found {name:?}"),
            );
        }
        if !mesh && !policy.targets.is_empty() && name == DEFAULT {
            self.error(
                "metadata.name",
                "a Policy with targets must not be named \"default\", which is the namespace's",
            );
        }
        for (i, target) in policy.targets.iter().enumerate() {
            if !is_dns1123_label(&target.name) {
                self.error(
                    format!("spec.targets[{i}].name"),
                    format!("{:?} is not the short name of a service (a DNS label)", target.name),
                );
            }
            for (j, port) in target.ports.iter().enumerate() {
                let fine = match port {
                    Port { number: Some(n), name } => name.is_empty() && (1..=65535).contains(n),
                    Port { number: None, name } => is_dns1123_label(name),
                };
                if !fine {
                    self.error(
                        format!("spec.targets[{i}].ports[{j}]"),
                        "a port is either `number` (1..65535) or `name` of a service port",
                    );
                }
            }
        }
        for (i, peer) in policy.peers.iter().enumerate() {
            let at = format!("spec.peers[{i}]");
            if peer.jwt.is_some() {
                self.error(&at, "jwt is not supported for peers; tokens belong into origins");
            } else if peer.mtls.is_none() {
                self.error(&at, "a peer authentication method is missing: mtls");
            }
            if let Some(mtls) = &peer.mtls
                && mtls.allow_tls
                && mtls.mode == MutualTlsMode::Strict
            {
                self.findings.push(Diagnostic::warning(
                    format!("{at}.mtls.allowTls"),
                    "TLS without a client certificate has no equivalent; STRICT applies",
                ));
            }
        }
        let mut issuers = BTreeSet::new();
        for (i, origin) in policy.origins.iter().enumerate() {
            let at = format!("spec.origins[{i}].jwt");
            let Some(jwt) = &origin.jwt else {
                self.error(&at, "an origin authentication method is missing: jwt");
                continue;
            };
            if !issuers.insert(jwt.issuer.as_str()) {
                self.error(
                    format!("{at}.issuer"),
                    format!("jwt with issuer {:?} already defined", jwt.issuer),
                );
            }
            self.jwt(jwt, &at);
        }
    }

    fn jwt(&mut self, jwt: &Jwt, at: &str) {
        if jwt.issuer.is_empty() {
            self.error(format!("{at}.issuer"), "issuer must be set");
        }
        if !jwt.jwks_uri.is_empty() && !jwt.jwks.is_empty() {
            self.error(at, "only one of jwks or jwksUri can be set");
        }
        let uri = jwt.jwks_uri.as_str();
        if !uri.is_empty() && !uri.starts_with("http://") && !uri.starts_with("https://") {
            self.error(
                format!("{at}.jwksUri"),
                format!("{uri:?} must have scheme http:// or https://"),
            );
        }
        for (field, values) in [
            ("audiences", &jwt.audiences),
            ("jwtHeaders", &jwt.jwt_headers),
            ("jwtParams", &jwt.jwt_params),
        ] {
            for (i, value) in values.iter().enumerate() {
                if value.is_empty() {
                    self.error(format!("{at}.{field}[{i}]"), "must not be empty");
                }
            }
        }
        for (i, rule) in jwt.trigger_rules.iter().enumerate() {
            for (field, paths) in [
                ("excludedPaths", &rule.excluded_paths),
                ("includedPaths", &rule.included_paths),
            ] {
                for (j, path) in paths.iter().enumerate() {
                    self.string_match(path, &format!("{at}.triggerRules[{i}].{field}[{j}]"));
                }
            }
        }
    }

    fn string_match(&mut self, path: &StringMatch, at: &str) {
        let set = [&path.exact, &path.prefix, &path.suffix, &path.regex];
        match set.iter().filter(|v| v.is_some()).count() {
            1 => {}
            n => self.error(
                at,
                format!("exactly one of exact, prefix, suffix and regex must be set, found {n}"),
            ),
        }
        if set.iter().any(|v| v.as_deref() == Some("")) {
            self.error(at, "must not be empty");
        }
        if path.regex.is_some() {
            self.findings.push(Diagnostic::warning(
                at,
                "a regular expression has no equivalent; the token is required whatever it says",
            ));
        }
    }

    fn role(&mut self, role: &ServiceRole) {
        if role.rules.is_empty() {
            self.error("spec.rules", "at least 1 rule must be specified");
        }
        for (i, rule) in role.rules.iter().enumerate() {
            self.rule(rule, &format!("spec.rules[{i}]"));
        }
    }

    fn rule(&mut self, rule: &AccessRule, at: &str) {
        for (name, both) in [
            ("hosts", !rule.hosts.is_empty() && !rule.not_hosts.is_empty()),
            ("paths", !rule.paths.is_empty() && !rule.not_paths.is_empty()),
            ("methods", !rule.methods.is_empty() && !rule.not_methods.is_empty()),
            ("ports", !rule.ports.is_empty() && !rule.not_ports.is_empty()),
        ] {
            if both {
                self.error(at, format!("{name} and its negation cannot be set both"));
            }
        }
        for port in rule.ports.iter().chain(&rule.not_ports) {
            if *port > 65535 {
                self.error(at, format!("port {port} must be in the range 0..65535"));
            }
        }
        let mut keys = BTreeSet::new();
        for (i, constraint) in rule.constraints.iter().enumerate() {
            let at = format!("{at}.constraints[{i}]");
            if !is_constraint_key(&constraint.key) {
                self.error(
                    format!("{at}.key"),
                    format!(
                        "unknown constraint {:?}; there are destination.ip, destination.port, destination.labels[NAME], \
                         destination.name, destination.namespace, destination.user, request.headers[NAME], connection.sni and \
                         experimental.envoy.filters.NAME",
                        constraint.key
                    ),
                );
            }
            if !keys.insert(constraint.key.as_str()) {
                self.error(
                    format!("{at}.key"),
                    format!("constraint {:?} stands twice", constraint.key),
                );
            }
            if constraint.key == "destination.port" && !(rule.ports.is_empty() && rule.not_ports.is_empty()) {
                self.error(&at, "destination.port and ports cannot be set both");
            }
            if constraint.values.is_empty() {
                self.error(format!("{at}.values"), "at least 1 value must be specified");
            }
        }
    }

    fn binding(&mut self, binding: &ServiceRoleBinding) {
        if binding.subjects.is_empty() {
            self.error("spec.subjects", "at least 1 subject must be specified");
        }
        for (i, subject) in binding.subjects.iter().enumerate() {
            self.subject(subject, &format!("spec.subjects[{i}]"));
        }
        let forms = [
            binding.role_ref.is_some(),
            !binding.role.is_empty(),
            !binding.actions.is_empty(),
        ];
        if forms.iter().filter(|f| **f).count() != 1 {
            self.error("spec", "exactly one of roleRef, role and actions must be specified");
        }
        if let Some(reference) = &binding.role_ref {
            if !matches!(reference.kind.as_str(), "" | "ServiceRole") {
                self.error(
                    "spec.roleRef.kind",
                    format!(
                        "kind set to {:?}, currently the only supported value is \"ServiceRole\"",
                        reference.kind
                    ),
                );
            }
            if reference.name.is_empty() {
                self.error("spec.roleRef.name", "the name of the ServiceRole must be set");
            }
        }
        for (i, rule) in binding.actions.iter().enumerate() {
            self.rule(rule, &format!("spec.actions[{i}]"));
        }
    }

    fn subject(&mut self, subject: &Subject, at: &str) {
        if subject.is_empty() {
            self.error(at, "an empty subject is nobody; for everybody write user: \"*\"");
        }
        for (name, both) in [
            ("names", !subject.names.is_empty() && !subject.not_names.is_empty()),
            ("groups", !subject.groups.is_empty() && !subject.not_groups.is_empty()),
            (
                "namespaces",
                !subject.namespaces.is_empty() && !subject.not_namespaces.is_empty(),
            ),
            ("ips", !subject.ips.is_empty() && !subject.not_ips.is_empty()),
        ] {
            if both {
                self.error(at, format!("{name} and its negation cannot be set both"));
            }
        }
        if subject.names.iter().chain(&subject.not_names).any(|n| n == "*") {
            self.error(
                at,
                "do not use * in names; for everybody use \"allUsers\", for every identity \"allAuthenticatedUsers\"",
            );
        }
        for (field, values) in [("ips", &subject.ips), ("notIps", &subject.not_ips)] {
            for (i, value) in values.iter().enumerate() {
                if value.parse::<std::net::IpAddr>().is_err() && value.parse::<ipnet::IpNet>().is_err() {
                    self.error(
                        format!("{at}.{field}[{i}]"),
                        format!("{value:?} is neither an IP address nor a CIDR range"),
                    );
                }
            }
        }
        for key in subject.properties.keys() {
            if !is_property_key(key) {
                self.findings.push(Diagnostic::warning(
                    format!("{at}.properties[{key}]"),
                    format!("{key:?} was matched against metadata of filters, for which there is no equivalent; the subject matches nobody"),
                ));
            }
        }
    }

    fn config(&mut self, config: &RbacConfig, kind: &str, name: &str) {
        if name != DEFAULT {
            self.error(
                "metadata.name",
                format!("{kind} has invalid name({name}), name must be \"default\""),
            );
        }
        for (mode, target, field) in [
            (RbacMode::OnWithInclusion, &config.inclusion, "inclusion"),
            (RbacMode::OnWithExclusion, &config.exclusion, "exclusion"),
        ] {
            if config.mode == mode && target.is_none() {
                self.error(format!("spec.{field}"), format!("mode needs {field}"));
            }
            for (i, service) in target.iter().flat_map(|t| &t.services).enumerate() {
                // Istio's converter had no wildcards here (S7.65).
                if service.contains('*') {
                    self.error(
                        format!("spec.{field}.services[{i}]"),
                        format!("{service:?}: wildcards are not supported here; list the namespace"),
                    );
                }
            }
        }
    }
}

/// S7.40.
fn is_constraint_key(key: &str) -> bool {
    matches!(
        key,
        "destination.ip"
            | "destination.port"
            | "destination.name"
            | "destination.namespace"
            | "destination.user"
            | "connection.sni"
    ) || bracketed(key, "destination.labels")
        || bracketed(key, "request.headers")
        || key.starts_with("experimental.envoy.filters.")
}

/// S7.42.
fn is_property_key(key: &str) -> bool {
    matches!(
        key,
        "source.ip"
            | "source.namespace"
            | "source.user"
            | "source.principal"
            | "request.auth.principal"
            | "request.auth.audiences"
            | "request.auth.presenter"
    ) || bracketed(key, "request.headers")
        || bracketed(key, "request.auth.claims")
}

/// Whether `key` is `prefix[NAME]`.
fn bracketed(key: &str, prefix: &str) -> bool {
    key.strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix('['))
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|name| !name.is_empty())
}
