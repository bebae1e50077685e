//! Route tables made ready: domains in hash maps, expressions compiled.

use std::collections::HashMap;
use std::sync::Arc;

use regex::bytes::Regex;

use super::{ClaimMatch, HeaderMatch, PathMatch, Route, RouteRequest, RouteTable, StringMatch, VirtualHost};
use crate::authz::{any_claim, compile_regex};

/// A route table with its lookup structures.
#[derive(Debug)]
pub struct CompiledRoutes {
    table: Arc<RouteTable>,
    /// Exact domains.
    exact: HashMap<Box<str>, usize>,
    /// What follows the `*`, by length, the longest first.
    suffixes: Vec<(usize, HashMap<Box<str>, usize>)>,
    /// What precedes the `*`, by length, the longest first.
    prefixes: Vec<(usize, HashMap<Box<str>, usize>)>,
    any: Option<usize>,
    /// Expressions by place of use, `None` for those that cannot be compiled and so match nothing.
    hosts: Vec<Vec<Ready>>,
}

/// Expressions of one route.
#[derive(Debug, Default)]
struct Ready {
    path: Option<Regex>,
    headers: Vec<Option<Regex>>,
    query: Vec<Option<Regex>>,
    claims: Vec<Option<Regex>>,
    /// A condition that cannot be understood: the route is never taken.
    broken: bool,
}

impl CompiledRoutes {
    /// Compiles a table. Of domains that occur twice the first host keeps them; routes with expressions that cannot be
    /// compiled are never taken (`xds` refuses such tables).
    pub fn new(table: Arc<RouteTable>) -> CompiledRoutes {
        let mut exact = HashMap::new();
        let mut suffixes: HashMap<usize, HashMap<Box<str>, usize>> = HashMap::new();
        let mut prefixes: HashMap<usize, HashMap<Box<str>, usize>> = HashMap::new();
        let mut any = None;
        for (index, host) in table.hosts.iter().enumerate() {
            for domain in &host.domains {
                let domain = domain.to_ascii_lowercase();
                if domain == "*" {
                    any = any.or(Some(index));
                } else if let Some(suffix) = domain.strip_prefix('*') {
                    suffixes
                        .entry(suffix.len())
                        .or_default()
                        .entry(suffix.into())
                        .or_insert(index);
                } else if let Some(prefix) = domain.strip_suffix('*') {
                    prefixes
                        .entry(prefix.len())
                        .or_default()
                        .entry(prefix.into())
                        .or_insert(index);
                } else {
                    exact.entry(domain.into_boxed_str()).or_insert(index);
                }
            }
        }
        let sorted = |map: HashMap<usize, HashMap<Box<str>, usize>>| {
            let mut list: Vec<_> = map.into_iter().collect();
            list.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
            list
        };
        let hosts = table
            .hosts
            .iter()
            .map(|h| h.routes.iter().map(Ready::new).collect())
            .collect();
        CompiledRoutes {
            exact,
            suffixes: sorted(suffixes),
            prefixes: sorted(prefixes),
            any,
            hosts,
            table,
        }
    }

    /// The table.
    pub fn table(&self) -> &Arc<RouteTable> {
        &self.table
    }

    /// The virtual host of an authority: exact name, longest `*.suffix`, longest `prefix.*`, `*`.
    pub fn host(&self, authority: &str) -> Option<&VirtualHost> {
        self.host_index(authority).map(|index| &*self.table.hosts[index])
    }

    /// The virtual host and its first route that matches; `None` is answered with 404.
    pub fn select(&self, request: &dyn RouteRequest) -> Option<(&VirtualHost, &Route)> {
        self.select_in(self.host_index(request.authority())?, request)
    }

    /// The first route of the virtual host at this position that matches.
    ///
    /// # Panics
    /// There is no such position.
    pub fn select_in(&self, index: usize, request: &dyn RouteRequest) -> Option<(&VirtualHost, &Route)> {
        let host: &VirtualHost = &self.table.hosts[index];
        let found = host
            .routes
            .iter()
            .zip(&self.hosts[index])
            .find(|(route, ready)| ready.matches(route, request));
        found.map(|(route, _)| (host, route))
    }

    /// Position of the host that is taken when no other is (domain `*`).
    pub fn fallback(&self) -> Option<usize> {
        self.any
    }

    /// Position of the virtual host of an authority among the table's.
    pub fn host_index(&self, authority: &str) -> Option<usize> {
        let authority = if self.table.ignore_port_in_host {
            without_port(authority)
        } else {
            authority
        };
        // Names are lower case in practice; only others are copied.
        let lower;
        let name = if authority.bytes().any(|b| b.is_ascii_uppercase()) {
            lower = authority.to_ascii_lowercase();
            lower.as_str()
        } else {
            authority
        };
        if let Some(index) = self.exact.get(name) {
            return Some(*index);
        }
        // A `*` stands for at least one character.
        let shorter = |length: &usize| *length < name.len();
        for (length, map) in self.suffixes.iter().filter(|(length, _)| shorter(length)) {
            if let Some(index) = name.get(name.len() - length..).and_then(|tail| map.get(tail)) {
                return Some(*index);
            }
        }
        for (length, map) in self.prefixes.iter().filter(|(length, _)| shorter(length)) {
            if let Some(index) = name.get(..*length).and_then(|head| map.get(head)) {
                return Some(*index);
            }
        }
        self.any
    }
}

impl RouteTable {
    /// As [`CompiledRoutes::select`], for single questions.
    pub fn select(&self, request: &dyn RouteRequest) -> Option<(&VirtualHost, &Route)> {
        let compiled = CompiledRoutes::new(Arc::new(self.clone()));
        let index = compiled.host_index(request.authority())?;
        let host: &VirtualHost = &self.hosts[index];
        let found = host
            .routes
            .iter()
            .zip(&compiled.hosts[index])
            .find(|(route, ready)| ready.matches(route, request));
        found.map(|(route, _)| (host, route))
    }
}

/// `host` of `host:port`; brackets of IPv6 addresses stay.
pub(super) fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        // Without brackets a second colon belongs to an address, not to a port.
        Some((host, port))
            if !port.is_empty()
                && port.bytes().all(|b| b.is_ascii_digit())
                && (!host.contains(':') || host.ends_with(']')) =>
        {
            host
        }
        _ => authority,
    }
}

impl Ready {
    fn new(route: &Route) -> Ready {
        let mut ready = Ready::default();
        let mut compile = |text: &str| match compile_regex(text) {
            Ok(regex) => Some(regex),
            Err(_) => {
                ready.broken = true;
                None
            }
        };
        let mut of = |value: Option<&StringMatch>| match value {
            Some(StringMatch::Regex(text)) => compile(text),
            _ => None,
        };
        let headers = route.matches.headers.iter().map(|h| of(h.value.as_ref())).collect();
        let query = route.matches.query.iter().map(|(_, value)| of(Some(value))).collect();
        let claims = route.matches.claims.iter().map(|c| of(c.value.as_ref())).collect();
        let path = match &route.matches.path {
            PathMatch::Regex(text) => compile(text),
            _ => None,
        };
        Ready {
            path,
            headers,
            query,
            claims,
            ..ready
        }
    }

    fn matches(&self, route: &Route, request: &dyn RouteRequest) -> bool {
        if self.broken {
            return false;
        }
        let matches = &route.matches;
        let path = request.path();
        let path_holds = match &matches.path {
            PathMatch::Prefix(prefix) => path.starts_with(prefix.as_str()),
            PathMatch::SegmentPrefix(prefix) => path
                .strip_prefix(prefix.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
            PathMatch::Exact(exact) => path == exact,
            PathMatch::Regex(_) => self.path.as_ref().is_some_and(|regex| regex.is_match(path.as_bytes())),
        };
        path_holds
            && matches
                .headers
                .iter()
                .zip(&self.headers)
                .all(|(h, regex)| header_holds(h, regex.as_ref(), request))
            && matches.query.iter().zip(&self.query).all(|((name, value), regex)| {
                let found = parameter(request.query().unwrap_or_default(), name);
                found.is_some_and(|text| holds(value, regex.as_ref(), text))
            })
            && matches
                .claims
                .iter()
                .zip(&self.claims)
                .all(|(c, regex)| claim_holds(c, regex.as_ref(), request))
    }
}

fn header_holds(matches: &HeaderMatch, regex: Option<&Regex>, request: &dyn RouteRequest) -> bool {
    let values = request.header(&matches.name);
    let found = match &matches.value {
        None => !values.is_empty(),
        // Each of several values is tested alone, as in authorization (seen on Envoy 1.40).
        Some(value) => values.iter().any(|text| holds(value, regex, text)),
    };
    found != matches.invert
}

fn claim_holds(matches: &ClaimMatch, regex: Option<&Regex>, request: &dyn RouteRequest) -> bool {
    let found = request.claims().is_some_and(|claims| match &matches.value {
        None => matches
            .path
            .iter()
            .try_fold(claims, |value, name| value.get(name))
            .is_some(),
        Some(value) => any_claim(claims, &matches.path, &mut |text| holds(value, regex, text)),
    });
    found != matches.invert
}

fn holds(matches: &StringMatch, regex: Option<&Regex>, text: &str) -> bool {
    match matches {
        StringMatch::Exact(exact) => text == exact,
        StringMatch::Prefix(prefix) => text.starts_with(prefix.as_str()),
        StringMatch::Regex(_) => regex.is_some_and(|regex| regex.is_match(text.as_bytes())),
    }
}

/// The first value of a query parameter, as sent.
fn parameter<'q>(query: &'q str, name: &str) -> Option<&'q str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

#[cfg(test)]
mod tests;
