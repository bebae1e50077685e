//! ServiceRole, ServiceRoleBinding and where they are in force, as AuthorizationPolicies named as Istio's converter named them (S7.62–S7.68).
//!
//! Deny by default is a policy without rules for each scope that the configuration turns on; each rule of a role becomes an ALLOW
//! policy for each set of labels that it selects, with one rule for each subject of its bindings.

use std::collections::{BTreeMap, BTreeSet};

use mantlet_api::authorization_policy::Rule;
use mantlet_api::legacy::rbac::{AccessRule, EnforcementMode, RbacConfig, RbacMode, RbacTarget, Subject};
use mantlet_api::{AuthorizationPolicy, WorkloadSelector};

use super::subject::{self, matches};
use super::{Converted, Meta, Origin, authn, overlap, selector_of};
use crate::world::service::Service;
use crate::world::{Config, Kind, World};

/// The configuration in force.
struct Enforcement<'a> {
    origin: Origin,
    created: i64,
    mode: RbacMode,
    target: Option<&'a RbacTarget>,
    dry_run: bool,
}

/// Where in a namespace access is denied by default.
enum Enabled<'a> {
    Nowhere,
    Everywhere,
    /// For services with these hosts.
    Only(Vec<&'a str>),
    /// For all but services with these hosts.
    AllBut(Vec<&'a str>),
}

impl Enabled<'_> {
    fn service(&self, service: &Service) -> bool {
        match self {
            Enabled::Nowhere => false,
            Enabled::Everywhere => true,
            Enabled::Only(hosts) => hosts.contains(&service.host.as_str()),
            Enabled::AllBut(hosts) => !hosts.contains(&service.host.as_str()),
        }
    }
}

/// What a binding grants to whom.
struct Grant<'a> {
    /// Kept for names: the role's, or the binding's for inline actions.
    name: String,
    origin: Origin,
    created: i64,
    rules: &'a [AccessRule],
    dry_run: bool,
    /// With the binding that names it.
    subjects: Vec<(Origin, &'a Subject)>,
}

/// The configuration that counts: ClusterRbacConfig before RbacConfig (S7.30).
fn enforcement<'a>(world: &'a World) -> Option<Enforcement<'a>> {
    let former = world.former();
    let pick = |list: &'a [std::sync::Arc<Config<RbacConfig>>]| {
        let named = list.iter().find(|c| c.meta.name == mantlet_api::legacy::DEFAULT);
        named.or_else(|| list.first())
    };
    let (kind, config) = match pick(&former.cluster_configs) {
        Some(config) => (Kind::ClusterRbacConfig, config),
        None => (Kind::RbacConfig, pick(&former.configs)?),
    };
    // What cannot be read was written to deny.
    let mode = if config.broken.is_some() {
        RbacMode::On
    } else {
        config.spec.mode
    };
    Some(Enforcement {
        origin: Origin::of(kind, &config.meta),
        created: config.meta.created,
        mode,
        target: match mode {
            RbacMode::OnWithInclusion => config.spec.inclusion.as_ref(),
            RbacMode::OnWithExclusion => config.spec.exclusion.as_ref(),
            RbacMode::On | RbacMode::Off => None,
        },
        dry_run: config.broken.is_none() && config.spec.enforcement_mode == EnforcementMode::Permissive,
    })
}

fn enabled<'a>(world: &'a World, enforcement: &Enforcement<'a>, namespace: &str) -> Enabled<'a> {
    let suffix = format!(".{namespace}.svc.{}", world.mesh().domain);
    let listed = || {
        enforcement
            .target
            .is_some_and(|t| t.namespaces.iter().any(|n| n == namespace))
    };
    let hosts = || -> Vec<&str> {
        let all = enforcement.target.iter().flat_map(|t| &t.services);
        all.map(String::as_str).filter(|h| h.ends_with(&suffix)).collect()
    };
    match enforcement.mode {
        RbacMode::Off => Enabled::Nowhere,
        RbacMode::On => Enabled::Everywhere,
        RbacMode::OnWithInclusion if listed() => Enabled::Everywhere,
        RbacMode::OnWithInclusion => match hosts() {
            hosts if hosts.is_empty() => Enabled::Nowhere,
            hosts => Enabled::Only(hosts),
        },
        RbacMode::OnWithExclusion if listed() => Enabled::Nowhere,
        RbacMode::OnWithExclusion => match hosts() {
            hosts if hosts.is_empty() => Enabled::Everywhere,
            hosts => Enabled::AllBut(hosts),
        },
    }
}

/// Converts what is said about a namespace, and in the root namespace what is said about the mesh.
pub(super) fn convert(world: &World, namespace: &str, out: &mut Converted) {
    let former = world.former();
    let Some(enforcement) = enforcement(world) else {
        for (list, kind) in [
            (
                former
                    .roles
                    .get(namespace)
                    .map(|l| l.iter().map(|c| &c.meta).collect::<Vec<_>>()),
                Kind::ServiceRole,
            ),
            (
                former
                    .bindings
                    .get(namespace)
                    .map(|l| l.iter().map(|c| &c.meta).collect()),
                Kind::ServiceRoleBinding,
            ),
        ] {
            for meta in list.into_iter().flatten() {
                out.lost(
                    &Origin::of(kind, meta),
                    "it is not in force: there is no ClusterRbacConfig, which says where access is denied by default",
                );
            }
        }
        return;
    };
    let root = namespace == world.mesh().root_namespace;
    if root {
        config_notes(world, &enforcement, out);
    }
    defaults(world, &enforcement, namespace, out);
    let enabled = enabled(world, &enforcement, namespace);
    if matches!(enabled, Enabled::Nowhere) {
        return;
    }
    if root {
        // Policies of the root namespace are the mesh's: allowing there would allow elsewhere.
        for role in former.roles.get(namespace).into_iter().flatten() {
            let bound = former.bindings.get(namespace).into_iter().flatten();
            if bound
                .into_iter()
                .any(|b| role_of(&b.spec) == Some((&role.meta.name, false)))
            {
                out.lost(
                    &Origin::of(Kind::ServiceRole, &role.meta),
                    "roles of the root namespace would be the mesh's; nothing is allowed by it",
                );
            }
        }
        return;
    }
    for grant in grants(world, &enforcement, namespace, out) {
        for (index, rule) in grant.rules.iter().enumerate() {
            one_rule(world, namespace, &enabled, &grant, index, rule, out);
        }
    }
}

/// What of the configuration itself is not kept.
fn config_notes(world: &World, enforcement: &Enforcement<'_>, out: &mut Converted) {
    let former = world.former();
    for (list, kind) in [
        (&former.cluster_configs, Kind::ClusterRbacConfig),
        (&former.configs, Kind::RbacConfig),
    ] {
        for config in list {
            let origin = Origin::of(kind, &config.meta);
            if origin != enforcement.origin {
                out.lost(&origin, format!("it is not in force: {} is", enforcement.origin));
            } else if let Some(error) = &config.broken {
                out.lost(
                    &origin,
                    format!("cannot be read ({error}); access is denied by default in the whole mesh"),
                );
            }
        }
    }
    let target = enforcement.target;
    for host in target.iter().flat_map(|t| &t.services) {
        let service = world.services_of_host(host).first();
        match service.map(|s| selector_of(s)) {
            Some(Some(_)) => {}
            Some(None) => out.lost(
                &enforcement.origin,
                format!("service {host:?} has no selector, so nothing is selected"),
            ),
            None => out.lost(
                &enforcement.origin,
                format!("there is no service {host:?}, so nothing is selected"),
            ),
        }
    }
    let root = world.mesh().root_namespace.as_str();
    let lists_root = target.is_some_and(|t| t.namespaces.iter().any(|n| n == root));
    if enforcement.mode == RbacMode::OnWithExclusion && lists_root {
        out.changed(
            &enforcement.origin,
            format!("{root} is excluded, so access is denied by default in each namespace that there is now, not in the mesh"),
        );
    }
    if lists_root && enforcement.mode == RbacMode::OnWithInclusion {
        out.changed(
            &enforcement.origin,
            format!("{root} is the root namespace: its services are selected by their labels, in all namespaces"),
        );
    }
    if enforcement.mode == RbacMode::On {
        out.changed(&enforcement.origin, "gateways deny by default too");
    }
}

/// Deny by default (S7.62–S7.64).
fn defaults(world: &World, enforcement: &Enforcement<'_>, namespace: &str, out: &mut Converted) {
    let root = world.mesh().root_namespace.as_str();
    let meta = Meta {
        origin: &enforcement.origin,
        created: enforcement.created,
        namespace,
    };
    let deny = |selector: Option<WorkloadSelector>| AuthorizationPolicy {
        selector,
        ..AuthorizationPolicy::default()
    };
    let allow = |selector: Option<WorkloadSelector>| AuthorizationPolicy {
        selector,
        rules: vec![Rule::default()],
        ..AuthorizationPolicy::default()
    };
    let listed = |name: &str| {
        enforcement
            .target
            .is_some_and(|t| t.namespaces.iter().any(|n| n == name))
    };
    let services = |hosts: &[&str]| -> Vec<&Service> {
        let all = world.kubernetes_services(namespace);
        all.filter(|s| hosts.contains(&s.host.as_str())).collect()
    };
    let dry = enforcement.dry_run;
    let is_root = namespace == root;
    match (enforcement.mode, enabled(world, enforcement, namespace)) {
        (RbacMode::On, _) if is_root => {
            out.add_authz(&meta, "generated-global-deny-all", deny(None), dry);
        }
        (RbacMode::OnWithExclusion, enabled) => {
            if is_root && !listed(root) {
                out.add_authz(&meta, "generated-global-deny-all", deny(None), dry);
            }
            match enabled {
                // Nothing denies it where the mesh as a whole is not denied.
                Enabled::Nowhere if !is_root && !listed(root) => {
                    out.add_authz(&meta, "generated-namespace-allow-all", allow(None), dry);
                }
                Enabled::Nowhere => {}
                enabled => {
                    if !is_root && listed(root) {
                        out.add_authz(&meta, "generated-namespace-deny-all", deny(None), dry);
                    }
                    if let Enabled::AllBut(hosts) = enabled {
                        for service in services(&hosts) {
                            let Some(selector) = selector_of(service) else { continue };
                            if is_root {
                                out.lost(
                                    &enforcement.origin,
                                    format!(
                                        "service {:?} of the root namespace cannot be excluded alone; it is denied",
                                        service.host
                                    ),
                                );
                                continue;
                            }
                            let name = format!("generated-service-{}-allow-all", service.name);
                            out.add_authz(&meta, &name, allow(Some(selector)), dry);
                        }
                    }
                }
            }
        }
        (RbacMode::OnWithInclusion, Enabled::Everywhere) if !is_root => {
            out.add_authz(&meta, "generated-namespace-deny-all", deny(None), dry);
        }
        (RbacMode::OnWithInclusion, enabled @ (Enabled::Everywhere | Enabled::Only(_))) => {
            for service in world.kubernetes_services(namespace).filter(|s| enabled.service(s)) {
                if let Some(selector) = selector_of(service) {
                    let name = format!("generated-service-{}-deny-all", service.name);
                    out.add_authz(&meta, &name, deny(Some(selector)), dry);
                }
            }
        }
        _ => {}
    }
}

/// The role that a binding names, and whether it is one of the root namespace.
fn role_of(binding: &mantlet_api::legacy::rbac::ServiceRoleBinding) -> Option<(&str, bool)> {
    if let Some(reference) = &binding.role_ref {
        return matches!(reference.kind.as_str(), "" | "ServiceRole").then_some((reference.name.as_str(), false));
    }
    match binding.role.strip_prefix('/') {
        Some(name) => Some((name, true)),
        None if binding.role.is_empty() => None,
        None => Some((binding.role.as_str(), false)),
    }
}

/// The bindings of a namespace by role, oldest first; trial runs apart.
fn grants<'a>(world: &'a World, enforcement: &Enforcement<'_>, namespace: &str, out: &mut Converted) -> Vec<Grant<'a>> {
    let former = world.former();
    let root = world.mesh().root_namespace.as_str();
    let mut grants: Vec<Grant<'a>> = Vec::new();
    for binding in former.bindings.get(namespace).into_iter().flatten() {
        let own = Origin::of(Kind::ServiceRoleBinding, &binding.meta);
        if let Some(error) = &binding.broken {
            out.lost(&own, format!("cannot be read ({error}); nothing is allowed by it"));
            continue;
        }
        let spec = &binding.spec;
        let forms = [spec.role_ref.is_some(), !spec.role.is_empty(), !spec.actions.is_empty()];
        if forms.iter().filter(|f| **f).count() != 1 {
            out.lost(
                &own,
                "exactly one of roleRef, role and actions must be there; nothing is allowed by it",
            );
            continue;
        }
        let dry_run = enforcement.dry_run || spec.mode == EnforcementMode::Permissive;
        let (name, origin, created, rules): (String, Origin, i64, &'a [AccessRule]) = match role_of(spec) {
            None if spec.actions.is_empty() => {
                out.lost(&own, "roleRef.kind must be ServiceRole; nothing is allowed by it");
                continue;
            }
            None => (
                binding.meta.name.clone(),
                own.clone(),
                binding.meta.created,
                &spec.actions,
            ),
            Some((name, of_root)) => {
                let place = if of_root { root } else { namespace };
                let roles = former.roles.get(place).map_or(&[][..], Vec::as_slice);
                let Some(role) = roles.iter().find(|r| r.meta.name == name) else {
                    out.lost(
                        &own,
                        format!("there is no ServiceRole {place}/{name}; nothing is allowed by it"),
                    );
                    continue;
                };
                let origin = Origin::of(Kind::ServiceRole, &role.meta);
                if let Some(error) = &role.broken {
                    out.lost(&origin, format!("cannot be read ({error}); nothing is allowed by it"));
                    continue;
                }
                let name = if of_root {
                    format!("root-{name}")
                } else {
                    name.to_string()
                };
                (name, origin, role.meta.created, &role.spec.rules)
            }
        };
        let subjects = spec.subjects.iter().map(|s| (own.clone(), s));
        match grants
            .iter_mut()
            .find(|g| g.origin == origin && g.name == name && g.dry_run == dry_run)
        {
            Some(grant) => grant.subjects.extend(subjects),
            None => grants.push(Grant {
                name,
                origin,
                created,
                rules,
                dry_run,
                subjects: subjects.collect(),
            }),
        }
    }
    grants
}

/// Workloads that a rule is for, and whether their principals are those of tokens.
struct Selected {
    /// Index in `services`, for the name; `None` without a list.
    service: Option<usize>,
    selector: Option<WorkloadSelector>,
    use_origin: bool,
}

fn one_rule(
    world: &World,
    namespace: &str,
    enabled: &Enabled<'_>,
    grant: &Grant<'_>,
    index: usize,
    rule: &AccessRule,
    out: &mut Converted,
) {
    let operation = match subject::to(rule, namespace) {
        Ok(Some(operation)) => operation,
        Ok(None) => return,
        Err(reason) => {
            out.lost(&grant.origin, format!("rules[{index}]: {reason}"));
            return;
        }
    };
    if rule.paths.iter().any(|p| p != "*" && !p.ends_with('*')) {
        out.changed(
            &grant.origin,
            format!("rules[{index}]: paths are compared without the query now"),
        );
    }
    let mut targets: BTreeMap<usize, usize> = BTreeMap::new();
    for selected in select(world, namespace, enabled, grant, index, rule, out) {
        let mut rules = Vec::new();
        for (binding, subject) in &grant.subjects {
            match subject::from(subject, selected.use_origin) {
                Ok(Some(from)) => rules.push(subject::rule(from, operation.clone())),
                Ok(None) => {}
                Err(reason) => out.lost(binding, reason),
            }
        }
        if rules.is_empty() {
            continue;
        }
        let mut name = format!("generated-{}-rule{index}", grant.name);
        if let Some(service) = selected.service {
            let target = targets.entry(service).or_default();
            name = format!("{name}-svc{service}-target{target}");
            *target += 1;
        }
        if grant.dry_run {
            name.push_str("-permissive");
        }
        let meta = Meta {
            origin: &grant.origin,
            created: grant.created,
            namespace,
        };
        // A policy holds a limited number of rules; of ALLOW policies several say the same as one.
        for rules in rules.chunks(MAX_RULES) {
            let spec = AuthorizationPolicy {
                selector: selected.selector.clone(),
                rules: rules.to_vec(),
                ..AuthorizationPolicy::default()
            };
            out.add_authz(&meta, &name, spec, grant.dry_run);
        }
    }
}

/// The workloads of a rule (S7.67).
fn select(
    world: &World,
    namespace: &str,
    enabled: &Enabled<'_>,
    grant: &Grant<'_>,
    index: usize,
    rule: &AccessRule,
    out: &mut Converted,
) -> Vec<Selected> {
    let labels = match labels(rule) {
        Ok(labels) => labels,
        Err(reason) => {
            out.lost(&grant.origin, format!("rules[{index}]: {reason}"));
            return Vec::new();
        }
    };
    let names = rule.constraints.iter().filter(|c| c.key == "destination.name");
    let names: Vec<&Vec<String>> = names.map(|c| &c.values).collect();
    let services: Vec<&Service> = world.kubernetes_services(namespace).collect();
    let wide_origin = authn::namespace_binds_origin(world, namespace);
    let uniform = services.iter().all(|s| authn::binds_origin(world, s) == wide_origin);
    let any = ["*".to_string()];
    let (patterns, listed): (&[String], bool) = match rule.services.as_slice() {
        [] => (&any, false),
        patterns => (patterns, true),
    };
    let mut out_selected = Vec::new();
    for (position, pattern) in patterns.iter().enumerate() {
        let service = listed.then_some(position);
        if pattern == "*" && uniform && names.is_empty() && matches!(enabled, Enabled::Everywhere) {
            out_selected.extend(labels.iter().map(|wanted| Selected {
                service,
                selector: (!wanted.is_empty()).then(|| WorkloadSelector {
                    match_labels: wanted.clone(),
                }),
                use_origin: wide_origin,
            }));
            continue;
        }
        let fits = |s: &&&Service| {
            matches(pattern, &s.host) && names.iter().all(|values| values.iter().any(|v| matches(v, &s.name)))
        };
        let found: Vec<&Service> = services.iter().filter(fits).copied().collect();
        if found.is_empty() {
            let advice = if pattern.contains(['.', '*']) {
                String::new()
            } else {
                format!("; services are named {pattern}.{namespace}.svc.{}", world.mesh().domain)
            };
            out.lost(
                &grant.origin,
                format!("rules[{index}]: namespace {namespace} has no service {pattern:?}, so nothing is allowed by it{advice}"),
            );
        }
        let mut done: BTreeSet<(BTreeMap<String, String>, bool)> = BTreeSet::new();
        for one in found.into_iter().filter(|s| enabled.service(s)) {
            let Some(selector) = selector_of(one) else {
                out.lost(
                    &grant.origin,
                    format!(
                        "rules[{index}]: service {} has no selector, so nothing is allowed by it",
                        one.host
                    ),
                );
                continue;
            };
            shared(&services, one, &grant.origin, out);
            let use_origin = authn::binds_origin(world, one);
            for wanted in &labels {
                // A pod cannot have two values of one label: nothing is selected.
                if !overlap(&selector.match_labels, wanted) {
                    continue;
                }
                let mut both = selector.match_labels.clone();
                both.extend(wanted.clone());
                if done.insert((both.clone(), use_origin)) {
                    out_selected.push(Selected {
                        service,
                        selector: Some(WorkloadSelector { match_labels: both }),
                        use_origin,
                    });
                }
            }
        }
    }
    out_selected
}

/// What is allowed through one service is allowed to its pods, which another service may select too.
fn shared(services: &[&Service], one: &Service, origin: &Origin, out: &mut Converted) {
    let other = services
        .iter()
        .find(|s| s.name != one.name && !s.selector.is_empty() && overlap(&s.selector, &one.selector));
    if let Some(other) = other {
        out.changed(
            origin,
            format!(
                "service {} may select the same pods as {}: what is allowed holds for both",
                other.name, one.name
            ),
        );
    }
}

/// Most rules of one AuthorizationPolicy.
const MAX_RULES: usize = 512;
/// Most combinations of label values of one rule.
const MAX_LABELS: usize = 1024;

/// The label sets of a rule's `destination.labels` constraints: every combination of their values.
fn labels(rule: &AccessRule) -> Result<Vec<BTreeMap<String, String>>, String> {
    let mut sets = vec![BTreeMap::new()];
    for constraint in &rule.constraints {
        let Some(rest) = constraint.key.strip_prefix("destination.labels") else {
            continue;
        };
        let Some(label) = rest
            .strip_prefix('[')
            .and_then(|r| r.strip_suffix(']'))
            .filter(|l| !l.is_empty())
        else {
            return Err(format!(
                "constraint {:?} names no label; the rule is left out",
                constraint.key
            ));
        };
        if let Some(value) = constraint.values.iter().find(|v| v.contains('*')) {
            return Err(format!(
                "constraint {}: {value:?} has a wildcard, which selectors do not know; the rule is left out",
                constraint.key
            ));
        }
        let mut next = Vec::new();
        for set in &sets {
            for value in &constraint.values {
                let mut set: BTreeMap<String, String> = set.clone();
                // Twice the same key: both must hold.
                if set.get(label).is_none_or(|v| v == value) {
                    set.insert(label.to_string(), value.clone());
                    next.push(set);
                }
            }
        }
        if next.len() > MAX_LABELS {
            return Err(format!(
                "its labels have more than {MAX_LABELS} combinations; the rule is left out"
            ));
        }
        sets = next;
    }
    Ok(sets)
}
