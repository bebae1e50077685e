//! The route decision over a compiled table.

use mantlet_model::route::{HeaderMatch, PathMatch, Route, RouteMatch, RouteRequest, StringMatch, VirtualHost};

use crate::config::Routes;

impl Routes {
    /// The virtual host and route for a request; `None` is 404.
    pub fn select(&self, request: &dyn RouteRequest) -> Option<(&VirtualHost, &Route)> {
        let table = &self.model;
        let authority = request.authority().to_ascii_lowercase();
        let name = match authority.rsplit_once(':') {
            Some((name, port)) if table.ignore_port_in_host && port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => authority.as_str(),
        };
        let host = table
            .hosts
            .iter()
            .filter_map(|h| h.domains.iter().filter_map(|d| score(d, name)).max().map(|s| (s, h)))
            .max_by_key(|(s, _)| *s)
            .map(|(_, h)| h)?;
        let route = host.routes.iter().find(|r| matches(&r.matches, request))?;
        Some((host, route))
    }
}

/// Exact beats suffix beats prefix beats `*`; longer beats shorter.
fn score(domain: &str, name: &str) -> Option<(u8, usize)> {
    if domain == name {
        return Some((3, domain.len()));
    }
    if domain == "*" {
        return Some((0, 0));
    }
    if let Some(suffix) = domain.strip_prefix('*') {
        return (name.len() > suffix.len() && name.ends_with(suffix)).then_some((2, suffix.len()));
    }
    if let Some(prefix) = domain.strip_suffix('*') {
        return (name.len() > prefix.len() && name.starts_with(prefix)).then_some((1, prefix.len()));
    }
    None
}

fn matches(wanted: &RouteMatch, request: &dyn RouteRequest) -> bool {
    let path = request.path();
    let path_ok = match &wanted.path {
        PathMatch::Prefix(p) => path.starts_with(p.as_str()),
        PathMatch::SegmentPrefix(p) => path
            .strip_prefix(p.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || p.ends_with('/')),
        PathMatch::Exact(p) => path == p,
        PathMatch::Regex(_) => false,
    };
    path_ok && wanted.headers.iter().all(|h| header(h, request)) && wanted.query.is_empty()
}

fn header(wanted: &HeaderMatch, request: &dyn RouteRequest) -> bool {
    let values = request.header(&wanted.name);
    let found = match &wanted.value {
        None => !values.is_empty(),
        Some(StringMatch::Exact(v)) => values.iter().any(|x| x == v),
        Some(StringMatch::Prefix(v)) => values.iter().any(|x| x.starts_with(v.as_str())),
        Some(StringMatch::Regex(_)) => false,
    };
    found != wanted.invert
}
