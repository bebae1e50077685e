//! Authorization: rule expressions as RBAC policies, and back.
//!
//! An RBAC policy holds when one of its permissions and one of its principals hold. Some attributes exist only on one
//! side: identities and peer addresses are principals, destination, SNI and path templates are permissions; method,
//! host, path, headers, claims and metadata exist on both. So an expression is cut at its conjuncts:
//!
//! - a conjunct that tests no destination goes to the principals if it tests the peer, headers or claims only, and to
//!   the permissions if it tests method, host or path;
//! - a conjunct that tests destination but no peer goes to the permissions.
//!
//! Rules made from Istio's API always fit so: one policy per rule, under the rule's id. A conjunct that mixes both
//! (`peer is a OR port is 80`) is spread out into several policies, `id`, `id#1`, `id#2`, …, which mean "any of them" and
//! which decode joins again. The joined expression is equivalent, though not always spelled the same; the property tests
//! check both laws. If an expression cannot be carried (too many policies, or an atom without meaning), the rule fails
//! closed: it denies everything as DENY and admits nothing as ALLOW.

use std::collections::{BTreeMap, HashMap};

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::rbac::v3::permission::{self, Rule as PermissionRule};
use envoy_types::pb::envoy::config::rbac::v3::principal::{self, Authenticated, Identifier};
use envoy_types::pb::envoy::config::rbac::v3::{Permission, Policy, Principal, Rbac, SourcedMetadata, rbac};
use envoy_types::pb::envoy::config::route::v3::HeaderMatcher;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::{PathSegment, path_segment};
use envoy_types::pb::envoy::r#type::matcher::v3::{
    ListMatcher, MetadataMatcher, OrMatcher, PathMatcher, StringMatcher, ValueMatcher, list_matcher, path_matcher,
    value_matcher,
};
use mantlet_model::authz::{
    Action, Atom, Attribute, AuthzFilter, Expr, Matcher, Rule, canonical, canonical_atom, check, regexes,
};
use tracing::error;

use super::strings::{self, Pattern};
use crate::wire::{At, Result, cidr, done, expect, fault, pack, port, require, take_cidr, unpack};

/// Filter whose metadata holds the verified token.
pub(super) const JWT: &str = "envoy.filters.http.jwt_authn";
/// Key of the token's payload in that metadata.
pub(super) const PAYLOAD: &str = "payload";
/// Statistics prefix of network filters (S2.96).
const TCP_STATS: &str = "tcp.";
/// Most policies that one rule may be spread out into.
const MAX_POLICIES: usize = 256;
/// Separates a rule's id from the number of a further policy of it. Rule ids do not contain it.
const PART: char = '#';
/// Deepest nesting of permissions and principals that is read.
const MAX_DEPTH: usize = 64;

pub(crate) fn encode_http(filter: &AuthzFilter) -> HttpRbac {
    let (rules, shadow_rules, shadow_rules_stat_prefix) = encode_parts(filter);
    HttpRbac {
        rules,
        shadow_rules,
        shadow_rules_stat_prefix,
        ..HttpRbac::default()
    }
}

pub(crate) fn encode_network(filter: &AuthzFilter) -> NetworkRbac {
    let (rules, shadow_rules, shadow_rules_stat_prefix) = encode_parts(filter);
    NetworkRbac {
        rules,
        shadow_rules,
        shadow_rules_stat_prefix,
        stat_prefix: TCP_STATS.into(),
        ..NetworkRbac::default()
    }
}

pub(crate) fn decode_http(mut proto: HttpRbac) -> Result<AuthzFilter> {
    let prefix = std::mem::take(&mut proto.shadow_rules_stat_prefix);
    let filter = decode_parts(proto.rules.take(), proto.shadow_rules.take(), &prefix)?;
    done(proto)?;
    Ok(filter)
}

pub(crate) fn decode_network(mut proto: NetworkRbac) -> Result<AuthzFilter> {
    let prefix = std::mem::take(&mut proto.shadow_rules_stat_prefix);
    let filter = decode_parts(proto.rules.take(), proto.shadow_rules.take(), &prefix)?;
    proto.stat_prefix.clear();
    done(proto)?;
    Ok(filter)
}

/// Prefix of the dry-run results in the filter's metadata (S2.133).
fn shadow_prefix(action: Action) -> &'static str {
    match action {
        Action::Allow => "istio_dry_run_allow_",
        Action::Deny => "istio_dry_run_deny_",
        Action::Log => "istio_dry_run_audit_",
    }
}

fn encode_parts(filter: &AuthzFilter) -> (Option<Rbac>, Option<Rbac>, String) {
    // A filter that enforces nothing still has to say which action it is of.
    let has_shadow = !filter.shadow.is_empty() || !filter.enforced;
    (
        filter.enforced.then(|| encode_rules(filter.action, &filter.rules)),
        has_shadow.then(|| encode_rules(filter.action, &filter.shadow)),
        if has_shadow {
            shadow_prefix(filter.action).into()
        } else {
            String::new()
        },
    )
}

fn decode_parts(rules: Option<Rbac>, shadow: Option<Rbac>, prefix: &str) -> Result<AuthzFilter> {
    let enforced = rules.is_some();
    let rules = rules.map(decode_rules).transpose().at("rules")?;
    let shadow = shadow.map(decode_rules).transpose().at("shadow_rules")?;
    let (action, rules, shadow) = match (rules, shadow) {
        (Some((a, _)), Some((b, _))) if a != b => return fault("shadow_rules.action", "differs from that of rules"),
        (Some((action, rules)), shadow) => (action, rules, shadow.map(|s| s.1)),
        (None, Some((action, shadow))) => (action, Vec::new(), Some(shadow)),
        (None, None) => return fault("rules", "missing"),
    };
    if shadow.is_some() {
        let same = prefix == shadow_prefix(action);
        expect(
            same,
            "shadow_rules_stat_prefix",
            "shadow rules are only supported as Istio's dry run",
        )?;
    }
    Ok(AuthzFilter {
        action,
        enforced,
        rules,
        shadow: shadow.unwrap_or_default(),
    })
}

pub(crate) fn encode_rules(action: Action, rules: &[Rule]) -> Rbac {
    let mut policies = HashMap::new();
    for rule in rules {
        let expr = canonical(&rule.expr);
        let parts = if all_atoms(&expr, &|atom| check(atom).is_ok()) {
            split(&expr)
        } else {
            None
        };
        let parts = parts.unwrap_or_else(|| {
            error!(rule = %rule.id, "rule cannot be carried to the proxy; it fails closed");
            let expr = if action == Action::Allow {
                Expr::never()
            } else {
                Expr::always()
            };
            vec![Sides {
                permissions: vec![expr],
                principals: Vec::new(),
            }]
        });
        for (index, sides) in parts.into_iter().enumerate() {
            let id = match index {
                0 => rule.id.clone(),
                n => format!("{}{PART}{n}", rule.id),
            };
            policies.insert(id, policy(sides));
        }
    }
    Rbac {
        action: match action {
            Action::Allow => rbac::Action::Allow,
            Action::Deny => rbac::Action::Deny,
            Action::Log => rbac::Action::Log,
        }
        .into(),
        policies,
        ..Rbac::default()
    }
}

pub(crate) fn decode_rules(mut proto: Rbac) -> Result<(Action, Vec<Rule>)> {
    let action = match rbac::Action::try_from(std::mem::take(&mut proto.action)) {
        Ok(rbac::Action::Allow) => Action::Allow,
        Ok(rbac::Action::Deny) => Action::Deny,
        Ok(rbac::Action::Log) => Action::Log,
        Err(_) => return fault("action", "unknown value"),
    };
    let mut rules: BTreeMap<String, Vec<Expr>> = BTreeMap::new();
    for (id, policy) in std::mem::take(&mut proto.policies) {
        let expr = decode_policy(policy).at(&format!("policies[{id}]"))?;
        let base = match id.split_once(PART) {
            Some((base, number)) if number.parse::<usize>().is_ok() => base.to_string(),
            _ => id,
        };
        rules.entry(base).or_default().push(expr);
    }
    done(proto)?;
    let rules = rules.into_iter().map(|(id, any)| Rule {
        id,
        expr: canonical(&Expr::Or(any)),
    });
    Ok((action, rules.collect()))
}

/// Where an expression can be carried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Permission,
    Principal,
    Mixed,
}

fn side(expr: &Expr) -> Side {
    let has = |f: &dyn Fn(&Atom) -> bool| !all_atoms(expr, &|atom| !f(atom));
    let peer = has(&|atom| {
        matches!(
            atom.attribute,
            Attribute::PeerUri
                | Attribute::PeerNamespace
                | Attribute::PeerServiceAccount
                | Attribute::PeerTrustDomain
                | Attribute::SourceIp
                | Attribute::RemoteIp
        )
    });
    let destination = has(&|atom| {
        matches!(
            atom.attribute,
            Attribute::DestinationIp | Attribute::DestinationPort | Attribute::Sni
        ) || matches!(atom.matcher, Matcher::Template(_))
    });
    let operation = has(&|atom| matches!(atom.attribute, Attribute::Host | Attribute::Method | Attribute::Path));
    match (peer, destination) {
        (true, true) => Side::Mixed,
        (true, false) => Side::Principal,
        (false, true) => Side::Permission,
        (false, false) if operation => Side::Permission,
        (false, false) => Side::Principal,
    }
}

fn all_atoms(expr: &Expr, f: &dyn Fn(&Atom) -> bool) -> bool {
    match expr {
        Expr::And(children) | Expr::Or(children) => children.iter().all(|c| all_atoms(c, f)),
        Expr::Not(inner) => all_atoms(inner, f),
        Expr::Atom(atom) => f(atom),
    }
}

/// Conjunctions of both sides.
#[derive(Clone, Default)]
struct Sides {
    permissions: Vec<Expr>,
    principals: Vec<Expr>,
}

/// The expression as a disjunction of [`Sides`]; `None` if it needs too many.
fn split(expr: &Expr) -> Option<Vec<Sides>> {
    let one = |expr: &Expr, side| {
        let mut sides = Sides::default();
        match side {
            Side::Permission => sides.permissions.push(expr.clone()),
            _ => sides.principals.push(expr.clone()),
        }
        vec![sides]
    };
    match expr {
        Expr::And(children) => {
            let mut product = vec![Sides::default()];
            for child in children {
                let parts = match side(child) {
                    Side::Mixed => split(child)?,
                    pure => one(child, pure),
                };
                if product.len() * parts.len() > MAX_POLICIES {
                    return None;
                }
                product = product
                    .iter()
                    .flat_map(|left| {
                        parts.iter().map(|right| {
                            let mut sides = left.clone();
                            sides.permissions.extend(right.permissions.iter().cloned());
                            sides.principals.extend(right.principals.iter().cloned());
                            sides
                        })
                    })
                    .collect();
            }
            Some(product)
        }
        _ if side(expr) != Side::Mixed => Some(one(expr, side(expr))),
        Expr::Or(children) => {
            let mut sum = Vec::new();
            for child in children {
                sum.extend(split(child)?);
                if sum.len() > MAX_POLICIES {
                    return None;
                }
            }
            Some(sum)
        }
        Expr::Not(inner) => {
            let negate = |children: &[Expr]| children.iter().map(|c| canonical(&c.clone().not())).collect();
            match inner.as_ref() {
                Expr::And(children) => split(&Expr::Or(negate(children))),
                Expr::Or(children) => split(&Expr::And(negate(children))),
                // Canonical expressions negate no negation, and a single atom is never mixed.
                Expr::Not(_) | Expr::Atom(_) => None,
            }
        }
        Expr::Atom(_) => None,
    }
}

fn policy(sides: Sides) -> Policy {
    Policy {
        permissions: alternatives(sides.permissions).iter().map(permission).collect(),
        principals: alternatives(sides.principals).iter().map(principal).collect(),
        ..Policy::default()
    }
}

/// A conjunction as a list of alternatives, which is not empty.
fn alternatives(all: Vec<Expr>) -> Vec<Expr> {
    match canonical(&Expr::And(all)) {
        Expr::Or(any) if !any.is_empty() => any,
        one => vec![one],
    }
}

fn decode_policy(mut proto: Policy) -> Result<Expr> {
    let mut permissions = Vec::new();
    for permission in std::mem::take(&mut proto.permissions) {
        permissions.push(take_permission(permission, 0).at("permissions")?);
    }
    let mut principals = Vec::new();
    for principal in std::mem::take(&mut proto.principals) {
        principals.push(take_principal(principal, 0).at("principals")?);
    }
    done(proto)?;
    let expr = Expr::And(vec![Expr::Or(permissions), Expr::Or(principals)]);
    Ok(canonical(&expr))
}

fn permission(expr: &Expr) -> Permission {
    let rule = match expr {
        Expr::And(all) if all.is_empty() => PermissionRule::Any(true),
        Expr::Or(any) if any.is_empty() => PermissionRule::NotRule(Box::new(permission(&Expr::always()))),
        Expr::And(all) => PermissionRule::AndRules(permission::Set {
            rules: all.iter().map(permission).collect(),
        }),
        Expr::Or(any) => PermissionRule::OrRules(permission::Set {
            rules: any.iter().map(permission).collect(),
        }),
        Expr::Not(inner) => PermissionRule::NotRule(Box::new(permission(inner))),
        Expr::Atom(atom) => permission_atom(atom),
    };
    Permission { rule: Some(rule) }
}

fn permission_atom(atom: &Atom) -> PermissionRule {
    match (&atom.attribute, &atom.matcher) {
        (Attribute::DestinationIp, Matcher::Cidr(net)) => PermissionRule::DestinationIp(cidr(*net)),
        (Attribute::DestinationPort, Matcher::Port(port)) => PermissionRule::DestinationPort((*port).into()),
        (Attribute::Sni, matcher) => PermissionRule::RequestedServerName(string(matcher)),
        (Attribute::Path, Matcher::Template(template)) => PermissionRule::UriTemplate(TypedExtensionConfig {
            name: "uri-template".into(),
            typed_config: Some(pack(&UriTemplateMatchConfig {
                path_template: regexes::bare(template),
            })),
        }),
        (Attribute::Path, matcher) => PermissionRule::UrlPath(path(matcher)),
        (Attribute::Claim(claim), matcher) => PermissionRule::SourcedMetadata(claim_metadata(claim, matcher)),
        (Attribute::Metadata(filter, key), matcher) => {
            PermissionRule::SourcedMetadata(other_metadata(filter, key, matcher))
        }
        (Attribute::Host | Attribute::Method | Attribute::Header(_), _) => PermissionRule::Header(header(atom)),
        // `side` sends these to the principals.
        _ => PermissionRule::NotRule(Box::new(permission(&Expr::always()))),
    }
}

fn principal(expr: &Expr) -> Principal {
    let identifier = match expr {
        Expr::And(all) if all.is_empty() => Identifier::Any(true),
        Expr::Or(any) if any.is_empty() => Identifier::NotId(Box::new(principal(&Expr::always()))),
        Expr::And(all) => Identifier::AndIds(principal::Set {
            ids: all.iter().map(principal).collect(),
        }),
        Expr::Or(any) => Identifier::OrIds(principal::Set {
            ids: any.iter().map(principal).collect(),
        }),
        Expr::Not(inner) => Identifier::NotId(Box::new(principal(inner))),
        Expr::Atom(atom) => principal_atom(atom),
    };
    Principal {
        identifier: Some(identifier),
    }
}

fn principal_atom(atom: &Atom) -> Identifier {
    if let Some(matcher) = regexes::identity_matcher(atom) {
        return Identifier::Authenticated(Authenticated {
            principal_name: Some(string(&matcher)),
        });
    }
    match (&atom.attribute, &atom.matcher) {
        (Attribute::SourceIp, Matcher::Cidr(net)) => Identifier::DirectRemoteIp(cidr(*net)),
        (Attribute::RemoteIp, Matcher::Cidr(net)) => Identifier::RemoteIp(cidr(*net)),
        (Attribute::Path, matcher) => Identifier::UrlPath(path(matcher)),
        (Attribute::Claim(claim), matcher) => Identifier::SourcedMetadata(claim_metadata(claim, matcher)),
        (Attribute::Metadata(filter, key), matcher) => {
            Identifier::SourcedMetadata(other_metadata(filter, key, matcher))
        }
        (Attribute::Host | Attribute::Method | Attribute::Header(_), _) => Identifier::Header(header(atom)),
        // `side` sends these to the permissions.
        _ => Identifier::NotId(Box::new(principal(&Expr::always()))),
    }
}

fn take_permission(proto: Permission, depth: usize) -> Result<Expr> {
    expect(depth < MAX_DEPTH, "rule", "nested too deeply")?;
    let list = |set: permission::Set| -> Result<Vec<Expr>> {
        set.rules.into_iter().map(|p| take_permission(p, depth + 1)).collect()
    };
    match require(&mut { proto.rule }, "rule")? {
        PermissionRule::AndRules(set) => Ok(Expr::And(list(set).at("and_rules")?)),
        PermissionRule::OrRules(set) => Ok(Expr::Or(list(set).at("or_rules")?)),
        PermissionRule::NotRule(inner) => Ok(take_permission(*inner, depth + 1).at("not_rule")?.not()),
        PermissionRule::Any(true) => Ok(Expr::always()),
        PermissionRule::Any(false) => fault("any", "must be true"),
        PermissionRule::Header(proto) => take_header(proto).at("header"),
        PermissionRule::UrlPath(proto) => take_path(proto).at("url_path"),
        PermissionRule::DestinationIp(range) => atom(
            Attribute::DestinationIp,
            Matcher::Cidr(take_cidr(range).at("destination_ip")?),
        ),
        PermissionRule::DestinationPort(number) => atom(
            Attribute::DestinationPort,
            Matcher::Port(port(number, "destination_port")?),
        ),
        PermissionRule::RequestedServerName(proto) => take_string(Attribute::Sni, proto).at("requested_server_name"),
        PermissionRule::UriTemplate(mut proto) => {
            let any = require(&mut proto.typed_config, "typed_config").at("uri_template")?;
            let config: UriTemplateMatchConfig = unpack(&any).at("uri_template")?;
            let template = regexes::braced(&config.path_template);
            atom(Attribute::Path, Matcher::Template(template)).at("uri_template")
        }
        PermissionRule::Metadata(proto) => take_metadata(proto).at("metadata"),
        PermissionRule::SourcedMetadata(proto) => take_sourced(proto).at("sourced_metadata"),
        PermissionRule::DestinationPortRange(_) => fault("destination_port_range", "not supported"),
        PermissionRule::Matcher(proto) => fault("matcher", format!("{} not supported", proto.name)),
    }
}

fn take_principal(proto: Principal, depth: usize) -> Result<Expr> {
    expect(depth < MAX_DEPTH, "identifier", "nested too deeply")?;
    let list = |set: principal::Set| -> Result<Vec<Expr>> {
        set.ids.into_iter().map(|p| take_principal(p, depth + 1)).collect()
    };
    match require(&mut { proto.identifier }, "identifier")? {
        Identifier::AndIds(set) => Ok(Expr::And(list(set).at("and_ids")?)),
        Identifier::OrIds(set) => Ok(Expr::Or(list(set).at("or_ids")?)),
        Identifier::NotId(inner) => Ok(take_principal(*inner, depth + 1).at("not_id")?.not()),
        Identifier::Any(true) => Ok(Expr::always()),
        Identifier::Any(false) => fault("any", "must be true"),
        Identifier::Authenticated(mut proto) => {
            let name = require(&mut proto.principal_name, "principal_name").at("authenticated")?;
            take_string(Attribute::PeerUri, name).at("authenticated")
        }
        Identifier::DirectRemoteIp(range) => atom(
            Attribute::SourceIp,
            Matcher::Cidr(take_cidr(range).at("direct_remote_ip")?),
        ),
        Identifier::RemoteIp(range) => atom(Attribute::RemoteIp, Matcher::Cidr(take_cidr(range).at("remote_ip")?)),
        Identifier::Header(proto) => take_header(proto).at("header"),
        Identifier::UrlPath(proto) => take_path(proto).at("url_path"),
        Identifier::Metadata(proto) => take_metadata(proto).at("metadata"),
        Identifier::SourcedMetadata(proto) => take_sourced(proto).at("sourced_metadata"),
        Identifier::SourceIp(_) => fault("source_ip", "deprecated and not supported"),
        Identifier::FilterState(proto) => fault("filter_state", format!("{} not supported", proto.key)),
        Identifier::Custom(proto) => fault("custom", format!("{} not supported", proto.name)),
    }
}

/// An atom in its simplest spelling; one that means nothing is refused.
fn atom(attribute: Attribute, matcher: Matcher) -> Result<Expr> {
    let atom = canonical_atom(&Atom { attribute, matcher });
    match check(&atom) {
        Ok(()) => Ok(Expr::Atom(atom)),
        Err(problem) => fault("", problem),
    }
}

/// A matcher of text. Matchers of other kinds do not reach this; they would match nothing.
fn string(matcher: &Matcher) -> StringMatcher {
    let pattern = match matcher {
        Matcher::Exact(s) => Pattern::Exact(s.clone()),
        Matcher::Prefix(s) => Pattern::Prefix(s.clone()),
        Matcher::Suffix(s) => Pattern::Suffix(s.clone()),
        Matcher::Regex(s) => Pattern::Regex(s.clone()),
        Matcher::Present => Pattern::Regex(regexes::presence()),
        Matcher::Glob(_) | Matcher::Cidr(_) | Matcher::Port(_) | Matcher::Template(_) => {
            Pattern::Regex(r"[^\x00-\x{10FFFF}]".into())
        }
    };
    strings::encode(&pattern, false)
}

fn take_string(attribute: Attribute, proto: StringMatcher) -> Result<Expr> {
    let pattern = strings::decode_exact_case(proto)?;
    atom(attribute, matcher(pattern))
}

fn matcher(pattern: Pattern) -> Matcher {
    match pattern {
        Pattern::Exact(s) => Matcher::Exact(s),
        Pattern::Prefix(s) => Matcher::Prefix(s),
        Pattern::Suffix(s) => Matcher::Suffix(s),
        Pattern::Regex(s) => Matcher::Regex(s),
    }
}

fn path(matcher: &Matcher) -> PathMatcher {
    PathMatcher {
        rule: Some(path_matcher::Rule::Path(string(matcher))),
    }
}

fn take_path(proto: PathMatcher) -> Result<Expr> {
    let path_matcher::Rule::Path(matcher) = require(&mut { proto.rule }, "path")?;
    take_string(Attribute::Path, matcher)
}

fn header(atom: &Atom) -> HeaderMatcher {
    let (name, ignore_case) = match &atom.attribute {
        Attribute::Host => (":authority", true),
        Attribute::Method => (":method", false),
        Attribute::Header(name) => (name.as_str(), false),
        _ => ("", false),
    };
    HeaderMatcher {
        name: name.into(),
        header_match_specifier: Some(match &atom.matcher {
            Matcher::Present => HeaderMatchSpecifier::PresentMatch(true),
            matcher => {
                let mut proto = string(matcher);
                proto.ignore_case = ignore_case;
                HeaderMatchSpecifier::StringMatch(proto)
            }
        }),
        ..HeaderMatcher::default()
    }
}

fn take_header(mut proto: HeaderMatcher) -> Result<Expr> {
    let name = std::mem::take(&mut proto.name).to_ascii_lowercase();
    let mut ignores_case = false;
    let found = match require(&mut proto.header_match_specifier, "header_match_specifier")? {
        HeaderMatchSpecifier::PresentMatch(true) => Matcher::Present,
        HeaderMatchSpecifier::PresentMatch(false) => return fault("present_match", "must be true"),
        HeaderMatchSpecifier::StringMatch(proto) => {
            let (pattern, ignore_case) = strings::decode(proto)?;
            ignores_case = ignore_case;
            matcher(pattern)
        }
        HeaderMatchSpecifier::ExactMatch(s) => Matcher::Exact(s),
        HeaderMatchSpecifier::PrefixMatch(s) => Matcher::Prefix(s),
        HeaderMatchSpecifier::SuffixMatch(s) => Matcher::Suffix(s),
        HeaderMatchSpecifier::SafeRegexMatch(r) => Matcher::Regex(strings::take_regex(r)?),
        _ => return fault("header_match_specifier", "not supported"),
    };
    done(proto)?;
    let attribute = match (name.as_str(), ignores_case) {
        (":authority", true) => Attribute::Host,
        (_, true) => return fault("ignore_case", format!("not supported for {name}")),
        (_, false) => Attribute::Header(name),
    };
    atom(attribute, found)
}

pub(super) fn segments<'a>(keys: impl Iterator<Item = &'a str>) -> Vec<PathSegment> {
    keys.map(|key| PathSegment {
        segment: Some(path_segment::Segment::Key(key.into())),
    })
    .collect()
}

pub(super) fn text_value(matcher: StringMatcher) -> ValueMatcher {
    ValueMatcher {
        match_pattern: Some(value_matcher::MatchPattern::StringMatch(matcher)),
    }
}

pub(super) fn list_value(matcher: StringMatcher) -> ValueMatcher {
    let list = ListMatcher {
        match_pattern: Some(list_matcher::MatchPattern::OneOf(Box::new(text_value(matcher)))),
    };
    ValueMatcher {
        match_pattern: Some(value_matcher::MatchPattern::ListMatch(Box::new(list))),
    }
}

fn sourced(filter: &str, path: Vec<PathSegment>, value: ValueMatcher) -> SourcedMetadata {
    SourcedMetadata {
        metadata_matcher: Some(MetadataMatcher {
            filter: filter.into(),
            path,
            value: Some(value),
            invert: false,
        }),
        metadata_source: 0,
    }
}

/// A claim: a string, or an element of a list (S2.71).
fn claim_metadata(claim: &[String], matcher: &Matcher) -> SourcedMetadata {
    let either = OrMatcher {
        value_matchers: vec![text_value(string(matcher)), list_value(string(matcher))],
    };
    let value = ValueMatcher {
        match_pattern: Some(value_matcher::MatchPattern::OrMatch(either)),
    };
    let keys = std::iter::once(PAYLOAD).chain(claim.iter().map(String::as_str));
    sourced(JWT, segments(keys), value)
}

/// Metadata of another filter; `[value]` asks for a list that contains the value.
fn other_metadata(filter: &str, key: &str, matcher: &Matcher) -> SourcedMetadata {
    let listed = match matcher {
        Matcher::Exact(text) => text.strip_prefix('[').and_then(|t| t.strip_suffix(']')),
        _ => None,
    };
    let value = match listed {
        Some(inner) => list_value(string(&Matcher::Exact(inner.into()))),
        None => text_value(string(matcher)),
    };
    sourced(filter, segments(std::iter::once(key)), value)
}

fn take_sourced(mut proto: SourcedMetadata) -> Result<Expr> {
    let inner = require(&mut proto.metadata_matcher, "metadata_matcher")?;
    done(proto)?;
    take_metadata(inner)
}

fn take_metadata(mut proto: MetadataMatcher) -> Result<Expr> {
    let filter = std::mem::take(&mut proto.filter);
    let mut keys = Vec::new();
    for segment in std::mem::take(&mut proto.path) {
        match segment.segment {
            Some(path_segment::Segment::Key(key)) => keys.push(key),
            None => return fault("path", "empty segment"),
        }
    }
    let value = require(&mut proto.value, "value")?;
    let invert = std::mem::take(&mut proto.invert);
    done(proto)?;
    expect(!invert, "invert", "not supported")?;

    if filter == JWT && keys.len() > 1 && keys[0] == PAYLOAD {
        let claim = keys.split_off(1);
        // Verified tokens hold `iss` and `sub` as strings only, so there a plain string test means the same.
        let always_text = claim == ["iss"] || claim == ["sub"];
        let pattern = take_value(value, always_text).at("value")?;
        return atom(Attribute::Claim(claim), matcher(pattern));
    }
    let [key] = keys.as_slice() else {
        return fault("path", format!("only one key is supported for {filter}"));
    };
    let attribute = Attribute::Metadata(filter, key.clone());
    match value.match_pattern {
        Some(value_matcher::MatchPattern::StringMatch(proto)) => take_string(attribute, proto),
        Some(value_matcher::MatchPattern::ListMatch(list)) => match take_list(*list)? {
            Pattern::Exact(text) => atom(attribute, Matcher::Exact(format!("[{text}]"))),
            _ => fault("list_match", "only exact values are supported"),
        },
        _ => fault("value", "only string_match and list_match are supported"),
    }
}

fn take_list(list: ListMatcher) -> Result<Pattern> {
    let list_matcher::MatchPattern::OneOf(inner) = require(&mut { list.match_pattern }, "list_match")?;
    match inner.match_pattern {
        Some(value_matcher::MatchPattern::StringMatch(proto)) => strings::decode_exact_case(proto),
        _ => fault("list_match", "only string_match is supported"),
    }
}

/// "A string, or an element of a list", as two alternatives with the same pattern.
pub(super) fn take_value(value: ValueMatcher, text_is_enough: bool) -> Result<Pattern> {
    let either = match value.match_pattern {
        Some(value_matcher::MatchPattern::OrMatch(either)) => either.value_matchers,
        Some(value_matcher::MatchPattern::StringMatch(proto)) if text_is_enough => {
            return strings::decode_exact_case(proto);
        }
        _ => return fault("", "only or_match of string_match and list_match is supported"),
    };
    let (mut text, mut list) = (None, None);
    for value in either {
        match value.match_pattern {
            Some(value_matcher::MatchPattern::StringMatch(proto)) => text = Some(strings::decode_exact_case(proto)?),
            Some(value_matcher::MatchPattern::ListMatch(proto)) => list = Some(take_list(*proto)?),
            _ => return fault("or_match", "only string_match and list_match are supported"),
        }
    }
    match (text, list) {
        (Some(text), Some(list)) if text == list => Ok(text),
        _ => fault(
            "or_match",
            "only string_match and list_match of the same pattern are supported",
        ),
    }
}
