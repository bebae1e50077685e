//! Evaluation of single atoms.
//!
//! A [`Test`] is an atom made ready: expressions compiled, templates parsed, networks masked. Atoms that cannot be
//! understood never become tests; [`check`] says why, and the engine fails closed on their rules.

use std::net::IpAddr;

use ipnet::IpNet;
use regex::bytes::{Regex, RegexBuilder};
use serde_json::Value;

use super::regexes::SPIFFE;
use super::template::Template;
use super::{Atom, Attribute, Connection, HttpView, Matcher};

/// Largest compiled size of one expression, in bytes.
const MAX_REGEX: usize = 1 << 20;
/// Claims whose text is a list separated by spaces (S2.73).
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];

/// Compiles an RE2 expression for full matches. Only linear-time features exist, so it cannot blow up on input.
pub fn compile_regex(text: &str) -> Result<Regex, String> {
    let build = |text: &str| {
        RegexBuilder::new(text)
            .size_limit(MAX_REGEX)
            .build()
            .map_err(|e| e.to_string())
    };
    // Alone first: `a)|(b` would otherwise escape from the anchors.
    build(text)?;
    build(&format!(r"\A(?:{text})\z"))
}

/// Checks that an atom means something: the matcher applies to the attribute, patterns are not empty, expressions and
/// templates can be read.
pub fn check(atom: &Atom) -> Result<(), String> {
    Test::new(atom).map(drop)
}

/// A test of text.
#[derive(Clone, Debug)]
pub(super) enum Text {
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    Suffix(Box<[u8]>),
    Regex(Box<Regex>),
    /// At least one character, no line break (S2.42).
    NotEmpty,
    /// Exists, even if empty.
    Exists,
}

impl Text {
    fn new(matcher: &Matcher) -> Result<Text, String> {
        let pattern = |s: &str| match s {
            "" => Err("an empty prefix or suffix matches everything".to_string()),
            s => Ok(Box::from(s.as_bytes())),
        };
        Ok(match matcher {
            Matcher::Exact(s) => Text::Exact(s.as_bytes().into()),
            Matcher::Prefix(s) => Text::Prefix(pattern(s)?),
            Matcher::Suffix(s) => Text::Suffix(pattern(s)?),
            Matcher::Present => Text::NotEmpty,
            Matcher::Regex(s) => Text::Regex(Box::new(compile_regex(s)?)),
            Matcher::Glob(_) | Matcher::Cidr(_) | Matcher::Port(_) | Matcher::Template(_) => {
                return Err("this matcher does not apply to this attribute".into());
            }
        })
    }

    fn existence(self) -> Text {
        match self {
            Text::NotEmpty => Text::Exists,
            other => other,
        }
    }

    pub(super) fn holds(&self, value: &[u8]) -> bool {
        match self {
            Text::Exact(s) => value == s.as_ref(),
            Text::Prefix(s) => value.starts_with(s),
            Text::Suffix(s) => value.ends_with(s),
            Text::Regex(regex) => regex.is_match(value),
            Text::NotEmpty => !value.is_empty() && !value.contains(&b'\n'),
            Text::Exists => true,
        }
    }

    /// As `holds`, without regard to ASCII case. Expressions regard it, as in Envoy.
    fn holds_ignoring_case(&self, value: &[u8]) -> bool {
        match self {
            Text::Exact(s) => value.eq_ignore_ascii_case(s),
            Text::Prefix(s) => value.get(..s.len()).is_some_and(|head| head.eq_ignore_ascii_case(s)),
            Text::Suffix(s) => {
                let start = value.len().checked_sub(s.len());
                start.is_some_and(|start| value[start..].eq_ignore_ascii_case(s))
            }
            other => other.holds(value),
        }
    }
}

/// Which address is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Address {
    Source,
    Remote,
    Destination,
}

/// An atom made ready.
#[derive(Clone, Debug)]
pub(super) enum Test {
    /// The whole identity URI.
    Uri(Text),
    /// `spiffe://`, anything, this.
    UriSuffix(Box<str>),
    /// `/ns/<parts with anything between>/` somewhere in the URI.
    Namespace(Box<[Box<str>]>),
    ServiceAccount(Box<str>, Box<str>),
    /// Text before and after the `*`; `None` for an exact trust domain.
    TrustDomain(Box<str>, Option<Box<str>>),
    /// Any `spiffe://` identity.
    AnyTrustDomain,
    Cidr(Address, IpNet),
    Port(u16),
    Sni(Text),
    Host(Text),
    Method(Text),
    Path(Text),
    Template(Template),
    Header(Box<str>, Text),
    Claim(Box<[Box<str>]>, Text),
    /// Dynamic metadata of other filters: the proxy has none, so it is always absent.
    Absent,
}

impl Test {
    pub(super) fn new(atom: &Atom) -> Result<Test, String> {
        let wrong = || Err("this matcher does not apply to this attribute".to_string());
        Ok(match (&atom.attribute, &atom.matcher) {
            (Attribute::PeerUri, Matcher::Suffix(s)) if !s.is_empty() => Test::UriSuffix(s.as_str().into()),
            (Attribute::PeerUri, m) => Test::Uri(Text::new(m)?),
            (Attribute::PeerNamespace, Matcher::Exact(ns)) if !ns.is_empty() => {
                Test::Namespace([Box::from(ns.as_str())].into())
            }
            (Attribute::PeerNamespace, Matcher::Glob(glob)) if !glob.is_empty() => {
                Test::Namespace(glob.split('*').map(Box::from).collect())
            }
            (Attribute::PeerServiceAccount, Matcher::Exact(name)) => match name.split_once('/') {
                Some((ns, sa)) if !ns.is_empty() && !sa.is_empty() && !sa.contains('/') => {
                    Test::ServiceAccount(ns.into(), sa.into())
                }
                _ => return Err("must be namespace/name".into()),
            },
            (Attribute::PeerTrustDomain, Matcher::Exact(td) | Matcher::Glob(td))
                if td.is_empty() || td.contains('/') =>
            {
                return Err("no trust domain".into());
            }
            (Attribute::PeerTrustDomain, Matcher::Exact(td)) => Test::TrustDomain(td.as_str().into(), None),
            (Attribute::PeerTrustDomain, Matcher::Glob(glob)) if glob == "*" => Test::AnyTrustDomain,
            (Attribute::PeerTrustDomain, Matcher::Glob(glob)) => match glob.split_once('*') {
                None => Test::TrustDomain(glob.as_str().into(), None),
                Some((_, after)) if after.contains('*') => return Err("only one * is allowed".into()),
                Some((before, after)) => Test::TrustDomain(before.into(), Some(after.into())),
            },
            (Attribute::SourceIp, Matcher::Cidr(net)) => Test::Cidr(Address::Source, net.trunc()),
            (Attribute::RemoteIp, Matcher::Cidr(net)) => Test::Cidr(Address::Remote, net.trunc()),
            (Attribute::DestinationIp, Matcher::Cidr(net)) => Test::Cidr(Address::Destination, net.trunc()),
            (Attribute::DestinationPort, Matcher::Port(port)) => Test::Port(*port),
            (Attribute::Sni, m) => Test::Sni(Text::new(m)?),
            (Attribute::Host, m) => Test::Host(Text::new(m)?.existence()),
            (Attribute::Method, m) => Test::Method(Text::new(m)?.existence()),
            (Attribute::Path, Matcher::Template(text)) => Test::Template(Template::parse(text)?),
            (Attribute::Path, m) => Test::Path(Text::new(m)?),
            (Attribute::Header(name), _) if name.is_empty() || name == ":path" => {
                return Err(format!("no header name: {name:?}"));
            }
            (Attribute::Header(name), m) => Test::Header(name.to_ascii_lowercase().into(), Text::new(m)?.existence()),
            (Attribute::Claim(path), _) if path.is_empty() => return Err("empty claim path".into()),
            (Attribute::Claim(path), m) => {
                let path = path.iter().map(|p| Box::from(p.as_str())).collect();
                Test::Claim(path, Text::new(m)?)
            }
            (Attribute::Metadata(..), m) => {
                Text::new(m)?;
                Test::Absent
            }
            _ => return wrong(),
        })
    }

    /// Whether the test holds. Tests of requests are false on plain connections.
    pub(super) fn holds(&self, connection: &Connection<'_>, http: Option<&dyn HttpView>) -> bool {
        let identity = |f: &dyn Fn(&str) -> bool| connection.peer_uris.iter().any(|uri| f(uri));
        match self {
            Test::Uri(text) => identity(&|uri| text.holds(uri.as_bytes())),
            Test::UriSuffix(suffix) => {
                identity(&|uri| uri.strip_prefix(SPIFFE).is_some_and(|rest| rest.ends_with(&**suffix)))
            }
            Test::Namespace(parts) => identity(&|uri| has_namespace(uri, parts)),
            Test::ServiceAccount(ns, sa) => identity(&|uri| has_service_account(uri, ns, sa)),
            Test::TrustDomain(before, after) => identity(&|uri| match trust_domain(uri) {
                None => false,
                Some(td) => match after {
                    None => td == &**before,
                    Some(after) => td.strip_prefix(&**before).is_some_and(|rest| rest.ends_with(&**after)),
                },
            }),
            Test::AnyTrustDomain => identity(&|uri| uri.starts_with(SPIFFE)),
            Test::Cidr(which, net) => net.contains(&address(*which, connection)),
            Test::Port(port) => connection.destination.port() == *port,
            Test::Sni(text) => connection.sni.is_some_and(|sni| text.holds(sni.as_bytes())),
            Test::Absent => false,
            Test::Host(_)
            | Test::Method(_)
            | Test::Path(_)
            | Test::Template(_)
            | Test::Header(..)
            | Test::Claim(..) => http.is_some_and(|http| self.holds_http(http)),
        }
    }

    fn holds_http(&self, http: &dyn HttpView) -> bool {
        match self {
            Test::Host(text) => text.holds_ignoring_case(http.authority().as_bytes()),
            Test::Method(text) => text.holds(http.method().as_bytes()),
            Test::Path(text) => text.holds(http.path().as_bytes()),
            Test::Template(template) => template.matches(http.path()),
            Test::Header(name, text) => match &**name {
                ":authority" => text.holds(http.authority().as_bytes()),
                ":method" => text.holds(http.method().as_bytes()),
                name => http.any_header(name, &mut |value| text.holds(value)),
            },
            Test::Claim(path, text) => http
                .claims()
                .is_some_and(|claims| any_claim(claims, path, &mut |value| text.holds(value.as_bytes()))),
            _ => false,
        }
    }
}

pub(super) fn address(which: Address, connection: &Connection<'_>) -> IpAddr {
    // A dual-stack socket shows IPv4 peers as mapped addresses; policies name the IPv4 one. An address out of a header is
    // taken as written, as Envoy does: `::ffff:10.0.0.1` is in no IPv4 range.
    match which {
        Address::Source => connection.source.to_canonical(),
        Address::Remote => connection.remote,
        Address::Destination => connection.destination.ip().to_canonical(),
    }
}

/// The trust domain of an identity: what is between the scheme and the first slash.
pub(super) fn trust_domain(uri: &str) -> Option<&str> {
    uri.strip_prefix(SPIFFE)?.split_once('/').map(|(td, _)| td)
}

/// `.*/ns/<part>.*<part>/.*` as a full match: the parts in order, the last one before a slash (S2.48).
fn has_namespace(uri: &str, parts: &[Box<str>]) -> bool {
    const NS: &str = "/ns/";
    let mut rest = uri;
    // Each place where the namespace may start; a well-formed identity has one.
    while let Some(at) = rest.find(NS) {
        rest = &rest[at + NS.len()..];
        if glob_before_slash(rest, parts) {
            return true;
        }
        // `/ns/` may start again at its own last slash.
        rest = &uri[uri.len() - rest.len() - 1..];
    }
    false
}

fn glob_before_slash(text: &str, parts: &[Box<str>]) -> bool {
    let Some((first, others)) = parts.split_first() else {
        return false;
    };
    let Some(mut rest) = text.strip_prefix(&**first) else {
        return false;
    };
    let Some((last, middle)) = others.split_last() else {
        return rest.starts_with('/');
    };
    for part in middle {
        match rest.find(&**part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    // The last part with its slash, at any place in what is left.
    let mut from = rest;
    loop {
        match from.find(&**last) {
            None => return false,
            Some(at) if from[at + last.len()..].starts_with('/') => return true,
            Some(at) => {
                let next = from[at..].chars().next().map_or(1, char::len_utf8);
                if at + next > from.len() {
                    return false;
                }
                from = &from[at + next..];
            }
        }
    }
}

/// `spiffe://.+/ns/NS/(.+/|)sa/SA(/.+)?` as a full match (S2.49).
fn has_service_account(uri: &str, ns: &str, sa: &str) -> bool {
    let Some(rest) = uri.strip_prefix(SPIFFE) else {
        return false;
    };
    let mut from = 1;
    while let Some(at) = rest.get(from..).and_then(|r| r.find("/ns/")) {
        let start = from + at;
        from = start + 1;
        let after = rest[start + 4..].strip_prefix(ns).and_then(|a| a.strip_prefix('/'));
        let Some(after) = after else {
            continue;
        };
        if ends_with_account(after, sa) {
            return true;
        }
        // `(.+/|)`: the account may follow later segments.
        let mut tail = after;
        let mut skipped = 0;
        while let Some(slash) = tail.find('/') {
            skipped += slash;
            tail = &tail[slash + 1..];
            if skipped > 0 && ends_with_account(tail, sa) {
                return true;
            }
            skipped += 1;
        }
    }
    false
}

fn ends_with_account(text: &str, sa: &str) -> bool {
    match text.strip_prefix("sa/").and_then(|t| t.strip_prefix(sa)) {
        Some("") => true,
        Some(more) => more.len() > 1 && more.starts_with('/'),
        None => false,
    }
}

/// Calls `f` with the strings at a claim path until it returns true: the string, or the strings of a list (S2.71–S2.75).
pub(crate) fn any_claim<N: AsRef<str>>(claims: &Value, path: &[N], f: &mut dyn FnMut(&str) -> bool) -> bool {
    let mut value = claims;
    for name in path {
        match value.get(name.as_ref()) {
            Some(inner) => value = inner,
            None => return false,
        }
    }
    let split = path.len() == 1 && SPACE_DELIMITED.contains(&path[0].as_ref());
    match value {
        Value::String(text) if split => text.split(' ').any(f),
        Value::String(text) => f(text),
        Value::Array(list) => list.iter().filter_map(Value::as_str).any(f),
        _ => false,
    }
}
