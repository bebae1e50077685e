//! The evaluator: Istio's objects, one request, the answer. SEMANTICS section 2, sentence by sentence.

use std::net::IpAddr;

use regex::bytes::Regex;
use serde_json::Value;

use crate::normalize;
use crate::tokens::{self, Verified};
use crate::world::{Connection, Place, Request, World};

/// Whose reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Istio's, to the letter.
    Istio,
    /// With the deviations that Mantlet lists; they may only deny more.
    Mantlet,
}

/// What comes of a request or connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the client gets.
    pub outcome: Outcome,
    /// Id of the rule that denied; `None` for a missing ALLOW.
    pub denied_by: Option<String>,
    /// Whether an AUDIT rule matched; `None` without AUDIT rules, or if the answer was given before.
    pub audited: Option<bool>,
    /// What dry-run DENY rules would have done: denied or not, and by which rule.
    pub shadow_deny: Option<(bool, Option<String>)>,
    /// The same of dry-run ALLOW rules.
    pub shadow_allow: Option<(bool, Option<String>)>,
}

/// Kinds of answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// 200, or bytes flow.
    Allowed,
    /// 403, or the connection ends.
    Denied,
    /// 400 before any policy.
    BadRequest,
    /// A token was refused with this status.
    Refused(u16),
}

/// Told of every single value that was tested: its kind and whether it hit.
pub type Observer<'a> = &'a mut dyn FnMut(&str, bool);

/// Asks the naive reading. `request` is absent on TCP chains. `flip` names one kind of value whose test is inverted: the
/// seeded bug of the mutation runs.
pub fn ask(
    world: &World,
    connection: &Connection,
    request: Option<&Request>,
    reading: Reading,
    flip: Option<&str>,
    observer: Observer<'_>,
) -> Answer {
    let mut answer = Answer {
        outcome: Outcome::Allowed,
        denied_by: None,
        audited: None,
        shadow_deny: None,
        shadow_allow: None,
    };
    let path = match request {
        None => Vec::new(),
        Some(request) => match normalize::target(&request.target, world.normalization) {
            None => {
                answer.outcome = Outcome::BadRequest;
                return answer;
            }
            Some((path, _)) => path,
        },
    };
    let verified = match request.map_or(Ok(Verified::default()), |r| tokens::verify(world, r)) {
        Ok(verified) => verified,
        Err(status) => {
            answer.outcome = Outcome::Refused(status);
            return answer;
        }
    };
    let mut eval = Eval {
        verified,
        world,
        connection,
        request,
        path,
        remote: remote(connection, request),
        reading,
        flip,
        observer,
        policy_namespace: "",
        allow: false,
    };

    let mut allow_bound = false;
    let mut shadow_allow_bound = false;
    // (action, dry run, id, matched)
    let mut seen: Vec<(&str, bool, String, bool)> = Vec::new();
    for policy in bound(world, "AuthorizationPolicy") {
        let metadata = &policy["metadata"];
        let (namespace, name) = (text(&metadata["namespace"]), text(&metadata["name"]));
        let action = match text(&policy["spec"]["action"]) {
            "" => "ALLOW",
            other => other,
        };
        let dry_run = matches!(
            text(&metadata["annotations"]["istio.io/dry-run"]),
            "1" | "t" | "T" | "true" | "TRUE" | "True"
        ) && matches!(action, "ALLOW" | "DENY");
        allow_bound |= action == "ALLOW" && !dry_run;
        // A policy without rules matches nothing; one whose rules are all dropped leaves no trace in a trial.
        shadow_allow_bound |= action == "ALLOW" && dry_run && list(&policy["spec"]["rules"]).is_empty();
        eval.policy_namespace = namespace;
        eval.allow = action == "ALLOW";
        for (index, rule) in list(&policy["spec"]["rules"]).iter().enumerate() {
            if let Some(matched) = eval.rule(rule) {
                seen.push((
                    action,
                    dry_run,
                    format!("ns[{namespace}]-policy[{name}]-rule[{index}]"),
                    matched,
                ));
            }
        }
    }
    let of = |action: &'static str, dry_run: bool| seen.iter().filter(move |s| s.0 == action && s.1 == dry_run);
    let first = |action: &'static str, dry_run: bool| of(action, dry_run).filter(|s| s.3).map(|s| s.2.clone()).min();

    if of("AUDIT", false).next().is_some() {
        answer.audited = Some(first("AUDIT", false).is_some());
    }
    if of("DENY", true).next().is_some() {
        let rule = first("DENY", true);
        answer.shadow_deny = Some((rule.is_some(), rule));
    }
    if let Some(rule) = first("DENY", false) {
        answer.outcome = Outcome::Denied;
        answer.denied_by = Some(rule);
        return answer;
    }
    if shadow_allow_bound || of("ALLOW", true).next().is_some() {
        let rule = first("ALLOW", true);
        answer.shadow_allow = Some((rule.is_none(), rule));
    }
    if allow_bound && first("ALLOW", false).is_none() {
        answer.outcome = Outcome::Denied;
    }
    answer
}

/// Policies of a kind that bind the workload (S2.1–S2.4, S3.1).
pub(crate) fn bound<'a>(world: &'a World, kind: &str) -> Vec<&'a Value> {
    let mut namespaces = vec![&world.root_namespace];
    if world.namespace != world.root_namespace {
        namespaces.push(&world.namespace);
    }
    let mut all: Vec<&Value> = Vec::new();
    for namespace in namespaces {
        let inside = |o: &&Value| o["kind"] == *kind && o["metadata"]["namespace"] == **namespace;
        all.extend(world.objects.iter().filter(inside));
    }
    all.retain(|policy| {
        let spec = &policy["spec"];
        let targeted = !spec["targetRef"].is_null() || !list(&spec["targetRefs"]).is_empty();
        let labels = spec["selector"]["matchLabels"].as_object();
        !targeted
            && labels
                .into_iter()
                .flatten()
                .all(|(key, value)| world.labels.get(key).map(String::as_str) == value.as_str())
    });
    all
}

/// The client's address: the right-most element of `x-forwarded-for`, else the peer (S2.52).
pub fn remote(connection: &Connection, request: Option<&Request>) -> IpAddr {
    let values: Vec<&[u8]> = request
        .into_iter()
        .flat_map(|r| &r.headers)
        .filter(|(name, _)| name.eq_ignore_ascii_case("x-forwarded-for"))
        .map(|(_, value)| value.as_slice())
        .collect();
    let joined = String::from_utf8_lossy(&values.join(&b',')).into_owned();
    let last = joined.rsplit(',').next().unwrap_or("").trim();
    last.parse().unwrap_or(connection.source)
}

pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A value that means nothing (S2.82), or an unknown key.
struct Bad;

/// What a value does to its rule.
enum Part {
    /// It holds or not.
    Holds(bool),
    /// It is left out (everything but ALLOW).
    Ignored,
}

/// The rule is gone.
struct Gone;

struct Eval<'a, 'o> {
    verified: Verified,
    world: &'a World,
    connection: &'a Connection,
    request: Option<&'a Request>,
    path: Vec<u8>,
    remote: IpAddr,
    reading: Reading,
    flip: Option<&'a str>,
    observer: Observer<'o>,
    policy_namespace: &'a str,
    allow: bool,
}

impl Eval<'_, '_> {
    /// Whether a rule matches; `None` when it is dropped.
    fn rule(&mut self, rule: &Value) -> Option<bool> {
        self.sections(rule).ok()
    }

    fn sections(&mut self, rule: &Value) -> Result<bool, Gone> {
        // Nothing is cut short, so that every value of the rule is counted.
        let mut holds = true;
        for (section, inner, fields) in [("from", "source", &SOURCE[..]), ("to", "operation", &OPERATION[..])] {
            let entries = list(&rule[section]);
            if entries.is_empty() {
                continue;
            }
            let mut any = false;
            for entry in entries {
                let mut all = true;
                for field in fields {
                    let not = format!("not{}{}", field[..1].to_uppercase(), &field[1..]);
                    let kind = format!("{section}.{field}");
                    all &= self.field(&kind, &entry[inner][*field], false)?;
                    let kind = format!("{section}.{not}");
                    all &= self.field(&kind, &entry[inner][not.as_str()], true)?;
                }
                any |= all;
            }
            holds &= any;
        }
        for condition in list(&rule["when"]) {
            let key = text(&condition["key"]);
            if !known_key(key) {
                if self.allow || self.reading == Reading::Istio {
                    return Err(Gone);
                }
                continue;
            }
            holds &= self.field(&format!("when.{key}"), &condition["values"], false)?;
            holds &= self.field(&format!("when.not.{key}"), &condition["notValues"], true)?;
        }
        Ok(holds)
    }

    /// One field: any of the values, or none of them.
    fn field(&mut self, kind: &str, values: &Value, negated: bool) -> Result<bool, Gone> {
        let (mut any, mut usable) = (false, false);
        for value in list(values) {
            match self.part(kind, text(value))? {
                Part::Holds(holds) => {
                    usable = true;
                    any |= holds;
                }
                Part::Ignored => {}
            }
        }
        Ok(!usable || any != negated)
    }

    fn part(&mut self, kind: &str, value: &str) -> Result<Part, Gone> {
        let tested = if self.request.is_none() && http_only(kind) {
            Err(Bad)
        } else {
            self.test(kind, value)
        };
        match tested {
            Err(Bad) if self.allow => Err(Gone),
            Err(Bad) => Ok(Part::Ignored),
            Ok((form, holds)) => {
                let label = format!("{} {form}", label(kind));
                (self.observer)(&label, holds);
                Ok(Part::Holds(holds != (self.flip == Some(label.as_str()))))
            }
        }
    }

    /// Tests one value; also says which form it has.
    fn test(&self, kind: &str, value: &str) -> Result<(&'static str, bool), Bad> {
        let (section, field) = kind.split_once('.').ok_or(Bad)?;
        let field = field.strip_prefix("not.").unwrap_or(field);
        let positive = match field.strip_prefix("not") {
            Some(rest) if section != "when" => format!("{}{}", rest[..1].to_lowercase(), &rest[1..]),
            _ => field.to_string(),
        };
        match positive.as_str() {
            "principals" | "source.principal" => Ok(self.principal(value)),
            "requestPrincipals" | "request.auth.principal" => Ok(self.request_principal(value)),
            "namespaces" | "source.namespace" => {
                let pattern: Vec<String> = value.split('*').map(regex::escape).collect();
                let form = if value == "*" { "present" } else { glob_form(value) };
                Ok((form, self.identity(&format!(".*/ns/{}/.*", pattern.join(".*")))))
            }
            "serviceAccounts" | "source.serviceAccount" => {
                let parts: Vec<&str> = value.split('/').collect();
                let (form, ns, sa) = match parts.as_slice() {
                    [sa] => ("name", self.policy_namespace, *sa),
                    [ns, sa] => ("namespace/name", *ns, *sa),
                    _ => return Err(Bad),
                };
                if ns.is_empty() || sa.is_empty() || value.contains('*') {
                    return Err(Bad);
                }
                let (ns, sa) = (regex::escape(ns), regex::escape(sa));
                Ok((form, self.identity(&format!("spiffe://.+/ns/{ns}/(.+/|)sa/{sa}(/.+)?"))))
            }
            "trustDomains" | "source.trustDomain" => self.trust_domain(value),
            "ipBlocks" | "source.ip" => block(value, self.connection.source),
            "remoteIpBlocks" | "remote.ip" => block(value, self.remote),
            "destination.ip" => block(value, self.connection.destination.ip()),
            "ports" | "destination.port" => {
                let port: u16 = value.parse().map_err(|_| Bad)?;
                Ok(("port", port == self.connection.destination.port()))
            }
            "connection.sni" => {
                let sni = self.connection.sni.as_deref().unwrap_or("").to_ascii_lowercase();
                Ok((form(value), string(value, sni.as_bytes())))
            }
            "hosts" => {
                let host = self.http()?.host.to_ascii_lowercase();
                let holds = value == "*" || string(&value.to_ascii_lowercase(), host.as_bytes());
                Ok((form(value), holds))
            }
            "methods" => {
                let method = self.http()?.method.as_bytes();
                Ok((form(value), string(value, method)))
            }
            "paths" => self.path(value),
            "request.auth.audiences" => Ok((form(value), self.claim(&["aud"], value))),
            "request.auth.presenter" => Ok((form(value), self.claim(&["azp"], value))),
            key => {
                if let Some(name) = bracket(key, "request.headers") {
                    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_:".contains(&b)) {
                        return Err(Bad);
                    }
                    let headers = headers(self.http()?, &self.verified);
                    let named = headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
                    let holds = named.into_iter().any(|(_, v)| value == "*" || string(value, v));
                    return Ok((form(value), holds));
                }
                if let Some(path) = bracket(key, "request.auth.claims") {
                    let names: Vec<&str> = path.split("][").collect();
                    return Ok((form(value), self.claim(&names, value)));
                }
                if key.starts_with("experimental.envoy.filters.") {
                    // Nobody writes such metadata.
                    return Ok((form(value), false));
                }
                Err(Bad)
            }
        }
    }

    fn http(&self) -> Result<&Request, Bad> {
        self.request.ok_or(Bad)
    }

    /// Whether a name of the peer's certificate matches an expression in full (S2.46).
    fn identity(&self, pattern: &str) -> bool {
        let Ok(regex) = Regex::new(&format!("^(?:{pattern})$")) else {
            return false;
        };
        let names = self.connection.peer.iter().flatten();
        names.into_iter().any(|uri| regex.is_match(uri.as_bytes()))
    }

    /// S2.44, S2.45, S2.120–S2.124.
    fn principal(&self, value: &str) -> (&'static str, bool) {
        let mut own = vec![self.world.trust_domain.clone()];
        own.extend(self.world.aliases.iter().cloned());
        let parts: Vec<&str> = value.split('/').collect();
        let mut values = vec![value.to_string()];
        if parts.len() == 5 && parts[0] != "*" {
            let rest = parts[1..].join("/");
            if let Some(suffix) = parts[0].strip_prefix('*') {
                if own.iter().any(|td| td.ends_with(suffix)) {
                    for td in own.iter().filter(|td| !td.ends_with(suffix)) {
                        values.push(format!("{td}/{rest}"));
                    }
                }
            } else if parts[0] == "cluster.local" || own.iter().any(|td| td == parts[0]) {
                values = own.iter().map(|td| format!("{td}/{rest}")).collect();
            }
        }
        let one = |value: &str| {
            let pattern = if value == "*" {
                ".+".to_string()
            } else if let Some(suffix) = value.strip_prefix('*') {
                format!("spiffe://.*{}", regex::escape(suffix))
            } else if let Some(prefix) = value.strip_suffix('*') {
                format!("(?s:spiffe://{}.*)", regex::escape(prefix))
            } else {
                regex::escape(&format!("spiffe://{value}"))
            };
            self.identity(&pattern)
        };
        (form(value), values.iter().any(|v| one(v)))
    }

    /// S2.50, S2.120.
    fn trust_domain(&self, value: &str) -> Result<(&'static str, bool), Bad> {
        if value == "*" {
            return Ok(("present", self.identity("spiffe://.*")));
        }
        let mut names = vec![value.to_string()];
        let mut own = vec![self.world.trust_domain.clone()];
        own.extend(self.world.aliases.iter().cloned());
        if own.iter().any(|td| td == value) {
            names = own;
        }
        let parts: Vec<&str> = value.split('*').collect();
        let holds = match parts.as_slice() {
            [_] => names
                .iter()
                .any(|td| self.identity(&format!("spiffe://{}/.*", regex::escape(td)))),
            [before, after] if before.is_empty() || after.is_empty() => {
                let (before, after) = (regex::escape(before), regex::escape(after));
                self.identity(&format!("spiffe://{before}[^/]*{after}/.*"))
            }
            _ => return Err(Bad),
        };
        Ok((form(value), holds))
    }

    /// The table in 2d.
    fn request_principal(&self, value: &str) -> (&'static str, bool) {
        let claims = self.verified.claims.as_ref();
        let claim = |name: &str| claims.and_then(|c| c[name].as_str()).map(str::as_bytes);
        let (Some(issuer), Some(subject)) = (claim("iss"), claim("sub")) else {
            return (principal_form(value), false);
        };
        let some = |text: &[u8]| !text.is_empty();
        let holds = match (value, value.rfind('/')) {
            ("*", _) => some(issuer) && some(subject),
            (_, Some(at)) if value.starts_with('*') => {
                string(&value[..at], issuer) && subject == &value.as_bytes()[at + 1..]
            }
            (_, Some(at)) => issuer == &value.as_bytes()[..at] && string(&value[at + 1..], subject),
            (_, None) if value.starts_with('*') => some(issuer) && subject.ends_with(&value.as_bytes()[1..]),
            (_, None) => match value.strip_suffix('*') {
                Some(prefix) => issuer.starts_with(prefix.as_bytes()) && some(subject),
                None => issuer == value.as_bytes() && subject.is_empty(),
            },
        };
        (principal_form(value), holds)
    }

    /// S2.56–S2.58.
    fn path(&self, value: &str) -> Result<(&'static str, bool), Bad> {
        if !value.contains("{*}") && !value.contains("{**}") {
            return Ok((form(value), string(value, &self.path)));
        }
        let mut pattern = String::new();
        let mut rest = value;
        while let Some(at) = rest.find('{') {
            pattern.push_str(&regex::escape(&rest[..at]));
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("{**}") {
                pattern.push_str(&format!("[{SEGMENT}/]*"));
                rest = after;
            } else if let Some(after) = rest.strip_prefix("{*}") {
                pattern.push_str(&format!("[{SEGMENT}]+"));
                rest = after;
            } else {
                return Err(Bad);
            }
        }
        pattern.push_str(&regex::escape(rest));
        let regex = Regex::new(&format!("^(?:{pattern})$")).map_err(|_| Bad)?;
        Ok(("template", regex.is_match(&self.path)))
    }

    /// S2.71–S2.75.
    fn claim(&self, names: &[&str], value: &str) -> bool {
        let Some(mut found) = self.verified.claims.as_ref() else {
            return false;
        };
        for name in names {
            found = &found[*name];
        }
        let split = matches!(names, ["scope" | "permission"]);
        match found {
            Value::String(text) if split => text.split(' ').any(|t| string(value, t.as_bytes())),
            Value::String(text) => string(value, text.as_bytes()),
            Value::Array(list) => list
                .iter()
                .filter_map(Value::as_str)
                .any(|t| string(value, t.as_bytes())),
            _ => false,
        }
    }
}

/// Characters that `{*}` and `{**}` stand for (Envoy 1.40, seen).
const SEGMENT: &str = r"a-zA-Z0-9\-._~%!$&'()*+,;:@=";

/// Fields of a source.
pub const SOURCE: [&str; 7] = [
    "principals",
    "requestPrincipals",
    "namespaces",
    "serviceAccounts",
    "trustDomains",
    "ipBlocks",
    "remoteIpBlocks",
];
/// Fields of an operation.
pub const OPERATION: [&str; 4] = ["hosts", "methods", "paths", "ports"];

/// The headers that policies see: without spent tokens, with headers made of claims. Of a token's header only the
/// presence is told.
pub fn headers(request: &Request, verified: &Verified) -> Vec<(String, Vec<u8>)> {
    let mut out: Vec<(String, Vec<u8>)> = request.headers.clone();
    out.retain(|(name, _)| !verified.stripped.iter().any(|s| name.eq_ignore_ascii_case(s)));
    for (place, _) in request.tokens.iter().filter(|(p, _)| !verified.spent.contains(p)) {
        match place {
            Place::Bearer => out.push(("authorization".into(), b"Bearer".to_vec())),
            Place::Header => out.push(("x-token".into(), b"Token".to_vec())),
            _ => {}
        }
    }
    out.extend(verified.added.iter().map(|(n, v)| (n.clone(), v.clone().into_bytes())));
    out
}

fn known_key(key: &str) -> bool {
    matches!(
        key,
        "source.ip"
            | "remote.ip"
            | "source.namespace"
            | "source.principal"
            | "source.serviceAccount"
            | "source.trustDomain"
            | "request.auth.principal"
            | "request.auth.audiences"
            | "request.auth.presenter"
            | "destination.ip"
            | "destination.port"
            | "connection.sni"
    ) || [
        "request.headers[",
        "request.auth.claims[",
        "experimental.envoy.filters.",
    ]
    .iter()
    .any(|prefix| key.starts_with(prefix))
}

fn http_only(kind: &str) -> bool {
    let kind = kind.to_ascii_lowercase();
    [
        "host",
        "method",
        "path",
        "requestprincipal",
        "request.headers",
        "request.auth",
    ]
    .iter()
    .any(|part| kind.contains(part))
}

/// What counts as one kind: header and claim names are not told apart, nesting of claims is.
fn label(kind: &str) -> String {
    for prefix in ["request.headers[", "experimental."] {
        if let Some(at) = kind.find(prefix) {
            return format!("{}{}", &kind[..at], prefix.trim_end_matches(['[', '.']));
        }
    }
    match kind.find("request.auth.claims[") {
        Some(at) if kind.contains("][") => format!("{}request.auth.claims[][]", &kind[..at]),
        Some(at) => format!("{}request.auth.claims[]", &kind[..at]),
        None => kind.to_string(),
    }
}

fn bracket<'a>(key: &'a str, prefix: &str) -> Option<&'a str> {
    key.strip_prefix(prefix)?.strip_prefix('[')?.strip_suffix(']')
}

/// S2.40: `*`, then a leading `*`, then a trailing one.
fn form(value: &str) -> &'static str {
    if value == "*" {
        "present"
    } else if value.starts_with('*') {
        "suffix"
    } else if value.ends_with('*') {
        "prefix"
    } else {
        "exact"
    }
}

fn glob_form(value: &str) -> &'static str {
    let inner = value.trim_matches('*');
    if inner.contains('*') || (value.starts_with('*') && value.ends_with('*')) {
        "inner"
    } else {
        form(value)
    }
}

fn principal_form(value: &str) -> &'static str {
    match (value, value.contains('/')) {
        ("*", _) => "present",
        (v, true) if v.starts_with("*/") => "*/sub",
        (v, true) if v.starts_with('*') => "*suf/sub",
        (v, true) if v.ends_with("/*") => "iss/*",
        (v, true) if v.ends_with('*') => "iss/pre*",
        (_, true) => "iss/sub",
        (v, false) if v.starts_with('*') => "*suf",
        (v, false) if v.ends_with('*') => "pre*",
        _ => "plain",
    }
}

fn string(value: &str, subject: &[u8]) -> bool {
    if value == "*" {
        !subject.is_empty()
    } else if let Some(suffix) = value.strip_prefix('*') {
        subject.ends_with(suffix.as_bytes())
    } else if let Some(prefix) = value.strip_suffix('*') {
        subject.starts_with(prefix.as_bytes())
    } else {
        subject == value.as_bytes()
    }
}

/// An address, or a range whose host bits do not count (S2.51).
fn block(value: &str, address: IpAddr) -> Result<(&'static str, bool), Bad> {
    let (form, network, length) = match value.split_once('/') {
        None => ("address", value, None),
        Some((network, length)) => ("range", network, Some(length.parse::<u32>().map_err(|_| Bad)?)),
    };
    let network: IpAddr = network.parse().map_err(|_| Bad)?;
    let bits = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => (32, u128::from(u32::from(ip)) << 96),
        IpAddr::V6(ip) => (128, u128::from(ip)),
    };
    let ((width, network), (own_width, own)) = (bits(network), bits(address));
    let length = length.unwrap_or(width);
    if length > width {
        return Err(Bad);
    }
    let mask = if length == 0 { 0 } else { u128::MAX << (128 - length) };
    Ok((form, width == own_width && network & mask == own & mask))
}
