//! Policy and MeshPolicy: the most specific one decides alone (S7.4), for each port of each service.
//!
//! `peers` become PeerAuthentications, which have the same order of precedence. `origins` become RequestAuthentications, and DENY
//! policies for requests without the token that the former kinds demanded (S7.13). Those add up instead of replacing each other, so
//! a namespace with exceptions is written service by service.

use std::collections::{BTreeMap, BTreeSet};

use mantlet_api::authorization_policy::{Action, From, Operation, Rule, Source, To};
use mantlet_api::legacy::DEFAULT;
use mantlet_api::legacy::authn::{Jwt, PeerMode, Policy, Port, PrincipalBinding, StringMatch, Target, TriggerRule};
use mantlet_api::peer_authentication::{MutualTls, MutualTlsMode};
use mantlet_api::request_authentication::{JwtHeader, JwtRule};
use mantlet_api::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication, WorkloadSelector};

use super::{Converted, Meta, Origin, overlap, selector_of};
use crate::protocol::Protocol;
use crate::world::service::{Service, ServicePort, TargetPort};
use crate::world::{Config, Kind, World};

/// A policy and what it is.
#[derive(Clone, Copy)]
struct Level<'a> {
    config: &'a Config<Policy>,
    kind: Kind,
}

impl Level<'_> {
    fn origin(&self) -> Origin {
        Origin::of(self.kind, &self.config.meta)
    }

    fn mode(&self) -> MutualTlsMode {
        // What cannot be read was written to protect something.
        if self.config.broken.is_some() {
            return MutualTlsMode::Strict;
        }
        match self.config.spec.peer_mode().0 {
            PeerMode::Disable => MutualTlsMode::Disable,
            PeerMode::Permissive => MutualTlsMode::Permissive,
            PeerMode::Strict => MutualTlsMode::Strict,
        }
    }

    fn has_origins(&self) -> bool {
        self.config.broken.is_some() || self.config.spec.jwts().next().is_some()
    }

    /// Whether two levels ask the same.
    fn same(&self, other: &Level<'_>) -> bool {
        std::ptr::eq(self.config, other.config)
    }
}

/// The policies that matter to a namespace.
struct Levels<'a> {
    mesh: Option<Level<'a>>,
    wide: Option<Level<'a>>,
    targeted: Vec<Level<'a>>,
}

/// What is asked of a service.
struct Wanted<'a> {
    /// On all ports but those of `ports`.
    base: Option<Level<'a>>,
    /// On these ports of the workload.
    ports: BTreeMap<u16, Level<'a>>,
}

fn levels<'a>(world: &'a World, namespace: &str) -> Levels<'a> {
    let former = world.former();
    let wide = |list: &'a [std::sync::Arc<Config<Policy>>], kind| {
        let untargeted = || {
            list.iter()
                .filter(|p| p.spec.targets.is_empty() || kind == Kind::MeshPolicy)
        };
        untargeted()
            .find(|p| p.meta.name == DEFAULT)
            .or_else(|| untargeted().next())
            .map(|config| Level { config, kind })
    };
    let own = former.policies.get(namespace).map_or(&[][..], Vec::as_slice);
    Levels {
        mesh: wide(&former.mesh_policies, Kind::MeshPolicy),
        wide: wide(own, Kind::Policy),
        targeted: own
            .iter()
            .filter(|p| !p.spec.targets.is_empty())
            .map(|config| Level {
                config,
                kind: Kind::Policy,
            })
            .collect(),
    }
}

/// Whether authorization sees the token's identity as the principal of requests to a service (S7.17).
pub(super) fn binds_origin(world: &World, service: &Service) -> bool {
    let levels = levels(world, &service.namespace);
    let own = levels.targeted.iter().find(|level| {
        let mut targets = level.config.spec.targets.iter();
        targets.any(|t| t.name == service.name && t.ports.is_empty())
    });
    own.or(levels.wide.as_ref())
        .or(levels.mesh.as_ref())
        .is_some_and(|level| level.config.spec.principal_binding == PrincipalBinding::UseOrigin)
}

/// Whether authorization sees the token's identity where no policy names a service.
pub(super) fn namespace_binds_origin(world: &World, namespace: &str) -> bool {
    let levels = levels(world, namespace);
    levels
        .wide
        .or(levels.mesh)
        .is_some_and(|level| level.config.spec.principal_binding == PrincipalBinding::UseOrigin)
}

/// Converts what is said about a namespace, and in the root namespace what is said about the mesh.
pub(super) fn convert(world: &World, namespace: &str, out: &mut Converted) {
    let levels = levels(world, namespace);
    let root = namespace == world.mesh().root_namespace;
    for level in levels
        .mesh
        .filter(|_| root)
        .iter()
        .chain(&levels.wide)
        .chain(&levels.targeted)
    {
        notes(level, out);
    }
    let unused = |list: &[std::sync::Arc<Config<Policy>>], kind: Kind, used: Option<Level<'_>>, out: &mut Converted| {
        for config in list {
            let same = used.is_some_and(|u| std::ptr::eq(u.config, &**config));
            if !same && (config.spec.targets.is_empty() || kind == Kind::MeshPolicy) {
                out.lost(
                    &Origin::of(kind, &config.meta),
                    "it is not in force: the one for the whole scope is named \"default\"",
                );
            }
        }
    };
    let former = world.former();
    if let Some(own) = former.policies.get(namespace) {
        unused(own, Kind::Policy, levels.wide, out);
    }
    if root {
        unused(&former.mesh_policies, Kind::MeshPolicy, levels.mesh, out);
    }

    let services: Vec<&Service> = world.kubernetes_services(namespace).collect();
    let mut wanted: Vec<(&Service, Wanted<'_>)> = Vec::new();
    for level in &levels.targeted {
        for target in &level.config.spec.targets {
            let Some(service) = services.iter().find(|s| s.name == target.name) else {
                out.lost(
                    &level.origin(),
                    format!(
                        "target {:?}: namespace {namespace} has no such Service, so nothing is selected",
                        target.name
                    ),
                );
                continue;
            };
            if service.selector.is_empty() {
                out.lost(
                    &level.origin(),
                    format!(
                        "target {:?}: the Service has no selector, so nothing is selected",
                        target.name
                    ),
                );
                continue;
            }
            let index = match wanted.iter().position(|(s, _)| s.name == service.name) {
                Some(index) => index,
                None => {
                    wanted.push((
                        service,
                        Wanted {
                            base: None,
                            ports: BTreeMap::new(),
                        },
                    ));
                    wanted.len() - 1
                }
            };
            add_target(world, service, *level, target, &mut wanted[index].1, out);
        }
    }
    conflicts(&wanted, out);
    peers(namespace, root, &levels, &wanted, out);
    origins(world, namespace, root, &levels, &services, &wanted, out);
}

/// One target of a policy; the oldest policy wins (S7.5).
fn add_target<'a>(
    world: &World,
    service: &Service,
    level: Level<'a>,
    target: &Target,
    wanted: &mut Wanted<'a>,
    out: &mut Converted,
) {
    if target.ports.is_empty() {
        wanted.base.get_or_insert(level);
        return;
    }
    for port in &target.ports {
        let found = service.ports.iter().find(|p| match port {
            Port { number: Some(n), .. } => u32::from(p.number) == *n,
            Port { number: None, name } => p.name == *name,
        });
        let numbers = found.map(|p| workload_ports(world, service, p)).unwrap_or_default();
        if numbers.is_empty() {
            let said = match port {
                Port { number: Some(n), .. } => n.to_string(),
                Port { number: None, name } => format!("{name:?}"),
            };
            let instead = if level.mode() == MutualTlsMode::Strict {
                // Better too strict than open.
                wanted.base.get_or_insert(level);
                "; it applies to all ports of the service"
            } else {
                "; the port keeps what is said of the service"
            };
            out.lost(
                &level.origin(),
                format!(
                    "target {:?}: port {said} leads to no known port of a workload{instead}",
                    target.name
                ),
            );
        }
        for number in numbers {
            wanted.ports.entry(number).or_insert(level);
        }
    }
}

/// Ports of the workloads behind a port of a service.
fn workload_ports(world: &World, service: &Service, port: &ServicePort) -> BTreeSet<u16> {
    match &port.target {
        TargetPort::Number(number) => BTreeSet::from([*number]),
        TargetPort::Name(name) => world
            .pods(&service.namespace)
            .filter(|pod| mantlet_api::selector::subset(&service.selector, &pod.labels))
            .filter_map(|pod| pod.named_ports.get(name).copied())
            .collect(),
    }
}

/// Services that may select the same pods, but of which different things are asked.
fn conflicts(wanted: &[(&Service, Wanted<'_>)], out: &mut Converted) {
    for (index, (a, wanted_a)) in wanted.iter().enumerate() {
        for (b, wanted_b) in &wanted[index + 1..] {
            let differ = match (&wanted_a.base, &wanted_b.base) {
                (Some(a), Some(b)) => !a.same(b),
                _ => false,
            };
            if differ && overlap(&a.selector, &b.selector) {
                for level in [&wanted_a.base, &wanted_b.base].into_iter().flatten() {
                    out.lost(
                        &level.origin(),
                        format!(
                            "services {} and {} may select the same pods: of their modes the older policy's applies, and the tokens \
                             of both are required",
                            a.name, b.name
                        ),
                    );
                }
            }
        }
    }
}

/// What of a policy itself is not kept.
fn notes(level: &Level<'_>, out: &mut Converted) {
    let origin = level.origin();
    if let Some(error) = &level.config.broken {
        out.lost(
            &origin,
            format!("cannot be read ({error}); STRICT applies, and all requests to what it selects are denied"),
        );
        return;
    }
    let policy = &level.config.spec;
    if let (_, Some(note)) = policy.peer_mode() {
        out.lost(&origin, note);
    }
    if policy.jwts().next().is_none() {
        return;
    }
    if policy.origin_is_optional {
        out.changed(
            &origin,
            "a request with an invalid token is refused with 401; it used to pass without identity",
        );
    } else {
        out.changed(
            &origin,
            "a request without a token is refused with 403; it used to be 401",
        );
    }
    let rules = || policy.jwts().flat_map(|jwt| &jwt.trigger_rules);
    if rules().next().is_some() && !policy.origin_is_optional {
        out.changed(
            &origin,
            "an invalid token is refused with 401 on paths without triggerRules too; it used to be ignored there",
        );
    }
    for path in rules().flat_map(|rule| rule.excluded_paths.iter().chain(&rule.included_paths)) {
        if pattern(path).is_none() {
            out.lost(
                &origin,
                format!(
                    "triggerRules: {} has no equivalent; the token is required whatever it says",
                    said(path)
                ),
            );
        }
    }
    if groups(policy).len() > 1 && !policy.origin_is_optional {
        out.lost(
            &origin,
            "origins have different triggerRules; on a path that several of them name a token of each is required",
        );
    }
}

fn said(path: &StringMatch) -> String {
    let fields = [
        ("exact", &path.exact),
        ("prefix", &path.prefix),
        ("suffix", &path.suffix),
        ("regex", &path.regex),
    ];
    match fields.iter().find_map(|(name, value)| Some((name, value.as_ref()?))) {
        Some((name, value)) => format!("{name} {value:?}"),
        None => "an empty match".into(),
    }
}

/// The PeerAuthentications of a namespace.
fn peers(namespace: &str, root: bool, levels: &Levels<'_>, wanted: &[(&Service, Wanted<'_>)], out: &mut Converted) {
    let spec = |mode, selector, ports: BTreeMap<u32, MutualTls>| PeerAuthentication {
        selector,
        mtls: mode,
        port_level_mtls: ports,
    };
    let mtls = |level: &Level<'_>| MutualTls { mode: level.mode() };
    let add = |level: &Level<'_>, name: &str, spec, out: &mut Converted| {
        let origin = level.origin();
        let meta = Meta {
            origin: &origin,
            created: level.config.meta.created,
            namespace,
        };
        out.add_peer(&meta, name, spec);
    };
    let wide = if root { &levels.mesh } else { &levels.wide };
    if let Some(level) = wide {
        add(level, DEFAULT, spec(Some(mtls(level)), None, BTreeMap::new()), out);
    }
    if root {
        // Without a selector it would be the mesh's, and with one it would be ignored (S1.10).
        let says = |level: &&Level<'_>| level.config.broken.is_some() || !level.config.spec.peers.is_empty();
        for level in levels.wide.iter().chain(&levels.targeted).filter(says) {
            out.lost(
                &level.origin(),
                "peers: a PeerAuthentication cannot be for the root namespace alone; the mesh's mode applies",
            );
        }
        return;
    }
    for (service, wanted) in wanted {
        let Some(first) = wanted.base.iter().chain(wanted.ports.values()).next() else {
            continue;
        };
        let ports = wanted
            .ports
            .iter()
            .map(|(port, level)| (u32::from(*port), mtls(level)))
            .collect();
        let spec = spec(wanted.base.as_ref().map(mtls), selector_of(service), ports);
        add(first, &format!("generated-service-{}", service.name), spec, out);
    }
}

/// Whether any service has a port on which there are no tokens.
fn any_opaque(world: &World) -> bool {
    let names: Vec<&str> = world.namespaces().collect();
    let mut services = names.iter().flat_map(|n| world.kubernetes_services(n));
    services.any(|s| s.ports.iter().any(|p| is_opaque(p.protocol)))
}

fn is_opaque(protocol: Protocol) -> bool {
    matches!(protocol, Protocol::Tcp | Protocol::Tls)
}

/// The RequestAuthentications of a namespace, and the policies that require their tokens.
fn origins(
    world: &World,
    namespace: &str,
    root: bool,
    levels: &Levels<'_>,
    services: &[&Service],
    wanted: &[(&Service, Wanted<'_>)],
    out: &mut Converted,
) {
    // Without any exception the mesh's policy can be written once.
    let mesh_is_alone = world.former().policies.is_empty() && !any_opaque(world);
    let mesh = levels.mesh.filter(|_| root || !mesh_is_alone);
    let rest = levels.wide.or(mesh).filter(Level::has_origins);
    let unit = |name: &str,
                selector: Option<WorkloadSelector>,
                wanted: &Wanted<'_>,
                opaque: &BTreeSet<u16>,
                out: &mut Converted| {
        demand(namespace, name, selector, wanted, opaque, out);
    };
    let opaque_ports = |service: &Service| -> BTreeSet<u16> {
        let opaque = service.ports.iter().filter(|p| is_opaque(p.protocol));
        opaque.flat_map(|p| workload_ports(world, service, p)).collect()
    };
    if let Some(level) = rest {
        let only = Wanted {
            base: Some(level),
            ports: BTreeMap::new(),
        };
        let for_mesh = root && level.kind == Kind::MeshPolicy && mesh_is_alone;
        let exceptions = !wanted.is_empty() || services.iter().any(|s| !opaque_ports(s).is_empty());
        if root && !for_mesh {
            // In the root namespace it would be the mesh's.
            out.lost(
                &level.origin(),
                "origins: policies of the root namespace are the mesh's; they are bound to its services by label",
            );
        }
        if for_mesh || !(exceptions || root) {
            unit(DEFAULT, None, &only, &BTreeSet::new(), out);
        } else {
            let mut done: Vec<&BTreeMap<String, String>> = Vec::new();
            for service in services {
                let named = wanted.iter().any(|(s, _)| s.name == service.name);
                let (false, Some(selector)) = (named || done.contains(&&service.selector), selector_of(service)) else {
                    continue;
                };
                done.push(&service.selector);
                let name = format!("generated-service-{}", service.name);
                let same = services.iter().filter(|s| s.selector == service.selector);
                let opaque = same.flat_map(|s| opaque_ports(s)).collect();
                unit(&name, Some(selector), &only, &opaque, out);
            }
            out.changed(
                &level.origin(),
                format!("origins of namespace {namespace} are written for each Service that there is now"),
            );
        }
    }
    for (service, wanted) in wanted {
        let merged = Wanted {
            base: wanted.base.or(rest),
            ports: wanted.ports.clone(),
        };
        let name = format!("generated-service-{}", service.name);
        unit(&name, selector_of(service), &merged, &opaque_ports(service), out);
    }
}

/// The tokens of one scope.
fn demand(
    namespace: &str,
    name: &str,
    selector: Option<WorkloadSelector>,
    wanted: &Wanted<'_>,
    opaque: &BTreeSet<u16>,
    out: &mut Converted,
) {
    let all: Vec<&Level<'_>> = wanted.base.iter().chain(wanted.ports.values()).collect();
    let Some(first) = all.iter().find(|l| l.has_origins()) else {
        return;
    };
    let origin = first.origin();
    let meta = Meta {
        origin: &origin,
        created: first.config.meta.created,
        namespace,
    };
    let mut jwts: Vec<&Jwt> = Vec::new();
    for jwt in all.iter().flat_map(|l| l.config.spec.jwts()) {
        let known = jwts.iter().find(|known| known.issuer == jwt.issuer);
        match known.map(|known| issuer_rule(known) == issuer_rule(jwt)) {
            Some(true) => {}
            Some(false) => {
                jwts.push(jwt);
                out.lost(
                    &origin,
                    format!(
                        "issuer {:?} is described differently for several ports; each description is taken",
                        jwt.issuer
                    ),
                );
            }
            None => jwts.push(jwt),
        }
    }
    if !wanted.ports.is_empty() && !jwts.is_empty() {
        out.changed(
            &origin,
            "tokens are checked on all ports of the service, and required on those that are named",
        );
    }
    if !jwts.is_empty() {
        out.add_request(
            &meta,
            name,
            RequestAuthentication {
                selector: selector.clone(),
                jwt_rules: jwts.iter().map(|jwt| issuer_rule(jwt)).collect(),
                ..RequestAuthentication::default()
            },
        );
    }
    let issuers: BTreeSet<&str> = jwts.iter().map(|j| j.issuer.as_str()).collect();
    let mut rules = Vec::new();
    let texts = |ports: &mut dyn Iterator<Item = u16>| ports.map(|p| p.to_string()).collect::<Vec<_>>();
    if let Some(base) = &wanted.base {
        let not_ports: BTreeSet<u16> = wanted.ports.keys().chain(opaque).copied().collect();
        let scope = Operation {
            not_ports: texts(&mut not_ports.into_iter()),
            ..Operation::default()
        };
        required(base, &issuers, &scope, &mut rules);
    }
    let mut by_policy: Vec<(&Level<'_>, Vec<u16>)> = Vec::new();
    for (port, level) in wanted.ports.iter().filter(|(port, _)| !opaque.contains(port)) {
        match by_policy.iter_mut().find(|(known, _)| known.same(level)) {
            Some((_, ports)) => ports.push(*port),
            None => by_policy.push((level, vec![*port])),
        }
    }
    for (level, ports) in by_policy {
        let scope = Operation {
            ports: texts(&mut ports.into_iter()),
            ..Operation::default()
        };
        required(level, &issuers, &scope, &mut rules);
    }
    if !rules.is_empty() {
        let spec = AuthorizationPolicy {
            selector,
            action: Action::Deny,
            rules,
            ..AuthorizationPolicy::default()
        };
        out.add_authz(&meta, &format!("{name}-require-token"), spec, false);
    }
}

/// Rules that deny what has not the token that a policy requires, in the scope of `ports`.
fn required(level: &Level<'_>, issuers: &BTreeSet<&str>, scope: &Operation, rules: &mut Vec<Rule>) {
    let to = |operation: Operation| {
        if operation.is_empty() {
            None
        } else {
            Some(To {
                operation: Some(operation),
            })
        }
    };
    if level.config.broken.is_some() {
        rules.push(Rule {
            to: to(scope.clone()).into_iter().collect(),
            ..Rule::default()
        });
        return;
    }
    let policy = &level.config.spec;
    if policy.origin_is_optional {
        return;
    }
    let groups = groups(policy);
    for (triggers, names) in &groups {
        let own: BTreeSet<&str> = names.iter().copied().collect();
        let principals = if own == *issuers {
            vec!["*".to_string()]
        } else {
            own.iter().map(|issuer| format!("{issuer}/*")).collect()
        };
        let mut operations: Vec<Option<To>> = Vec::new();
        if triggers.is_empty() {
            operations.push(to(scope.clone()));
        }
        for trigger in *triggers {
            operations.push(to(triggered(trigger, scope)));
        }
        rules.push(Rule {
            from: vec![From {
                source: Some(Source {
                    not_request_principals: principals,
                    ..Source::default()
                }),
            }],
            // One that is not limited stands for all.
            to: if operations.iter().any(Option::is_none) {
                Vec::new()
            } else {
                operations.into_iter().flatten().collect()
            },
            when: Vec::new(),
        });
    }
}

/// The issuers of a policy by their trigger rules.
fn groups(policy: &Policy) -> Vec<(&Vec<TriggerRule>, Vec<&str>)> {
    let mut out: Vec<(&Vec<TriggerRule>, Vec<&str>)> = Vec::new();
    for jwt in policy.jwts() {
        match out.iter_mut().find(|(rules, _)| **rules == jwt.trigger_rules) {
            Some((_, issuers)) => issuers.push(&jwt.issuer),
            None => out.push((&jwt.trigger_rules, vec![&jwt.issuer])),
        }
    }
    out
}

/// S7.15. What has no equivalent requires the token: an included path that cannot be told includes all, an excluded one none.
fn triggered(rule: &TriggerRule, scope: &Operation) -> Operation {
    let included: Vec<Option<String>> = rule.included_paths.iter().map(pattern).collect();
    let paths = if included.iter().any(Option::is_none) {
        Vec::new()
    } else {
        included.into_iter().flatten().collect()
    };
    Operation {
        paths,
        not_paths: rule.excluded_paths.iter().filter_map(pattern).collect(),
        ..scope.clone()
    }
}

/// The modern form of a path; `None` when there is none with the same meaning.
fn pattern(path: &StringMatch) -> Option<String> {
    let literal = |text: &String| !text.is_empty() && !text.contains('*') && !text.contains('{');
    match path {
        StringMatch {
            exact: Some(text),
            prefix: None,
            suffix: None,
            regex: None,
        } => literal(text).then(|| text.clone()),
        StringMatch {
            exact: None,
            prefix: Some(text),
            suffix: None,
            regex: None,
        } => literal(text).then(|| format!("{text}*")),
        StringMatch {
            exact: None,
            prefix: None,
            suffix: Some(text),
            regex: None,
        } => literal(text).then(|| format!("*{text}")),
        _ => None,
    }
}

fn issuer_rule(jwt: &Jwt) -> JwtRule {
    JwtRule {
        issuer: jwt.issuer.clone(),
        audiences: jwt.audiences.clone(),
        jwks_uri: jwt.jwks_uri.clone(),
        jwks: jwt.jwks.clone(),
        from_headers: jwt
            .jwt_headers
            .iter()
            .map(|name| JwtHeader {
                name: name.clone(),
                prefix: String::new(),
            })
            .collect(),
        from_params: jwt.jwt_params.clone(),
        // S7.14.
        forward_original_token: true,
        ..JwtRule::default()
    }
}
