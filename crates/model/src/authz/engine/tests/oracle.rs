//! A second evaluator, written from SEMANTICS alone: no compilation, no index, identities by regular expression as
//! istiod writes them. It shares no code with the engine but the types.

use ipnet::IpNet;
use regex::Regex;
use serde_json::Value;

use super::super::super::{Action, Atom, Attribute, AuthzFilter, Expr, Matcher, Rule};
use super::super::{Decision, Shadow, Verdict};
use super::Request;

/// The decision over all filters.
pub(super) fn decide<'f>(filters: &'f [AuthzFilter], request: &Request) -> Decision<'f> {
    let mut out = Decision {
        verdict: Verdict::Allowed,
        rule: None,
        audited: false,
        shadow_deny: None,
        shadow_allow: None,
    };
    let of = |action| filters.iter().filter(move |f| f.action == action);
    for log in of(Action::Log) {
        out.audited |= first(&log.rules, Action::Log, request).is_some();
    }
    for deny in of(Action::Deny) {
        if !deny.shadow.is_empty() {
            let rule = first(&deny.shadow, Action::Deny, request);
            let verdict = if rule.is_some() {
                Verdict::Denied
            } else {
                Verdict::Allowed
            };
            out.shadow_deny = Some(Shadow { verdict, rule });
        }
        let hit = first(&deny.rules, Action::Deny, request);
        if deny.enforced && hit.is_some() {
            out.verdict = Verdict::Denied;
            out.rule = hit;
            return out;
        }
    }
    for allow in of(Action::Allow) {
        if !allow.shadow.is_empty() {
            let rule = first(&allow.shadow, Action::Allow, request);
            let verdict = if rule.is_some() {
                Verdict::Allowed
            } else {
                Verdict::Denied
            };
            out.shadow_allow = Some(Shadow { verdict, rule });
        }
        if allow.enforced {
            out.rule = first(&allow.rules, Action::Allow, request);
            if out.rule.is_none() {
                out.verdict = Verdict::Denied;
            }
        }
    }
    out
}

/// The smallest id that matches. A rule that cannot be evaluated denies.
fn first<'f>(rules: &'f [Rule], action: Action, request: &Request) -> Option<&'f str> {
    let matching = rules
        .iter()
        .filter(|r| expr(&r.expr, request).unwrap_or(action != Action::Allow));
    matching.map(|r| r.id.as_str()).min()
}

/// `None` if some part cannot be evaluated.
pub(super) fn expr(e: &Expr, request: &Request) -> Option<bool> {
    match e {
        Expr::And(list) if list.iter().any(is_never) => Some(false),
        Expr::Or(list) if list.iter().any(is_always) => Some(true),
        Expr::And(list) => {
            let results: Option<Vec<bool>> = list.iter().map(|e| expr(e, request)).collect();
            results.map(|r| r.into_iter().all(|b| b))
        }
        Expr::Or(list) => {
            let results: Option<Vec<bool>> = list.iter().map(|e| expr(e, request)).collect();
            results.map(|r| r.into_iter().any(|b| b))
        }
        Expr::Not(inner) => expr(inner, request).map(|b| !b),
        Expr::Atom(a) => atom(a, request),
    }
}

/// Constants make their surroundings constant, whatever else is in there.
fn is_always(e: &Expr) -> bool {
    match e {
        Expr::And(list) => list.iter().all(is_always),
        Expr::Or(list) => list.iter().any(is_always),
        Expr::Not(inner) => is_never(inner),
        Expr::Atom(_) => false,
    }
}

fn is_never(e: &Expr) -> bool {
    match e {
        Expr::And(list) => list.iter().any(is_never),
        Expr::Or(list) => list.iter().all(is_never),
        Expr::Not(inner) => is_always(inner),
        Expr::Atom(_) => false,
    }
}

fn full(pattern: &str) -> Option<Regex> {
    Regex::new(&format!("^(?:{pattern})$")).ok()
}

fn text(matcher: &Matcher, value: &str, presence_is_enough: bool) -> Option<bool> {
    Some(match matcher {
        Matcher::Exact(s) => value == s,
        Matcher::Prefix(s) => value.starts_with(s.as_str()),
        Matcher::Suffix(s) => value.ends_with(s.as_str()),
        Matcher::Present => presence_is_enough || !value.is_empty(),
        Matcher::Regex(r) => full(r)?.is_match(value),
        other => panic!("{other:?} on text"),
    })
}

/// `None` if the expression is broken.
pub(super) fn atom(a: &Atom, request: &Request) -> Option<bool> {
    let any = |pattern: String| Some(request.uris.iter().any(|u| full(&pattern).unwrap().is_match(u)));
    let quoted = |s: &str| regex::escape(s);
    let each = |m: &Matcher, values: Vec<String>, presence: bool| {
        text(m, "", false)?;
        Some(values.iter().any(|v| text(m, v, presence) == Some(true)))
    };
    let inside = |net: &IpNet, ip: std::net::IpAddr| {
        let ip = match ip {
            std::net::IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, Into::into),
            v4 => v4,
        };
        Some(net.network() <= ip && ip <= net.broadcast() && net.addr().is_ipv4() == ip.is_ipv4())
    };
    let http = |values: Vec<String>| if request.http { values } else { vec![] };
    match (&a.attribute, &a.matcher) {
        (Attribute::PeerUri, Matcher::Suffix(s)) => any(format!("spiffe://.*{}", quoted(s))),
        (Attribute::PeerUri, m) => each(m, request.uris.clone(), false),
        (Attribute::PeerNamespace, Matcher::Exact(v)) => any(format!(".*/ns/{}/.*", quoted(v))),
        (Attribute::PeerNamespace, Matcher::Glob(v)) => any(format!(".*/ns/{}/.*", v.replace('*', ".*"))),
        (Attribute::PeerServiceAccount, Matcher::Exact(v)) => {
            let (ns, sa) = v.split_once('/').unwrap();
            any(format!("spiffe://.+/ns/{ns}/(.+/|)sa/{sa}(/.+)?"))
        }
        (Attribute::PeerTrustDomain, Matcher::Exact(v)) => any(format!("spiffe://{v}/.*")),
        (Attribute::PeerTrustDomain, Matcher::Glob(v)) if v == "*" => any("spiffe://.*".into()),
        (Attribute::PeerTrustDomain, Matcher::Glob(v)) => any(format!("spiffe://{}/.*", v.replace('*', "[^/]*"))),
        (Attribute::SourceIp, Matcher::Cidr(net)) => inside(net, request.source),
        (Attribute::RemoteIp, Matcher::Cidr(net)) => Some(net.contains(&request.remote)),
        (Attribute::DestinationIp, Matcher::Cidr(net)) => inside(net, request.destination.ip()),
        (Attribute::DestinationPort, Matcher::Port(port)) => Some(request.destination.port() == *port),
        (Attribute::Sni, m) => each(m, request.sni.iter().cloned().collect(), false),
        (Attribute::Host, Matcher::Regex(_)) => each(&a.matcher, http(vec![request.authority.clone()]), true),
        (Attribute::Host, m) => {
            let lower = match m {
                Matcher::Exact(s) => Matcher::Exact(s.to_lowercase()),
                Matcher::Prefix(s) => Matcher::Prefix(s.to_lowercase()),
                Matcher::Suffix(s) => Matcher::Suffix(s.to_lowercase()),
                other => other.clone(),
            };
            each(&lower, http(vec![request.authority.to_lowercase()]), true)
        }
        (Attribute::Method, m) => each(m, http(vec![request.method.clone()]), true),
        (Attribute::Path, Matcher::Template(t)) => {
            let one = "[A-Za-z0-9._~%!$&'()+,;:@=-]";
            let pattern = quoted(t)
                .replace(r"\{\*\*\}", &format!("(?:{one}|/)*"))
                .replace(r"\{\*\}", &format!("{one}+"));
            Some(request.http && full(&pattern).unwrap().is_match(&request.path))
        }
        (Attribute::Path, m) => each(m, http(vec![request.path.clone()]), false),
        (Attribute::Header(name), m) if name == ":authority" => each(m, http(vec![request.authority.clone()]), true),
        (Attribute::Header(name), m) => {
            let of_name = request.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
            each(
                m,
                http(of_name.map(|(_, v)| String::from_utf8(v.clone()).unwrap()).collect()),
                true,
            )
        }
        (Attribute::Claim(path), m) => {
            let found = request
                .claims
                .as_ref()
                .and_then(|all| path.iter().try_fold(all, |v, key| v.get(key)));
            let values = match found {
                Some(Value::String(s)) if path == &["scope"] => s.split(' ').map(String::from).collect(),
                Some(Value::String(s)) => vec![s.clone()],
                Some(Value::Array(list)) => list.iter().filter_map(|v| v.as_str().map(String::from)).collect(),
                _ => vec![],
            };
            each(m, http(values), false)
        }
        (Attribute::Metadata(..), m) => each(m, vec![], false),
        (attribute, matcher) => panic!("{attribute:?} {matcher:?}"),
    }
}

pub(super) fn each_atom(e: &Expr, f: &mut dyn FnMut(&Atom)) {
    match e {
        Expr::And(list) | Expr::Or(list) => list.iter().for_each(|e| each_atom(e, f)),
        Expr::Not(inner) => each_atom(inner, f),
        Expr::Atom(a) => f(a),
    }
}

/// Attribute and matcher, for counting.
pub(super) fn kind(a: &Atom) -> String {
    let word = |s: String| s.split(['(', '"', ' ']).next().unwrap().to_string();
    format!(
        "{} {}",
        word(format!("{:?}", a.attribute)),
        word(format!("{:?}", a.matcher))
    )
}
