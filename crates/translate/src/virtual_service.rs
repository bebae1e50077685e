//! VirtualService HTTP routes → model routes, for sidecars (gateway `mesh`) and gateways.
//!
//! Destinations that name no known service or subset go to the black hole: the request fails with 503 as it would with
//! a missing cluster, and the configuration stays closed.

use std::collections::BTreeMap;

use mantlet_api::VirtualService;
use mantlet_api::virtual_service::{
    Destination, HeaderOperations, HttpMatchRequest, HttpRoute, HttpRouteDestination, StringMatch as ApiMatch,
};
use mantlet_model::names::{self, ClusterName};
use mantlet_model::route::{
    ClaimMatch, Forward, HeaderChange, HeaderMatch, PathMatch, Redirect, Retry, Route, RouteAction, RouteMatch,
    StringMatch,
};

use crate::destination_rule::{Client, applied, expand_host};
use crate::route;
use crate::world::service::ExportTo;
use crate::world::{Config, World};

/// The name that stands for all sidecars in `gateways`.
pub const MESH_GATEWAY: &str = "mesh";

/// Where routes are for.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The proxy.
    pub client: Client<'a>,
    /// `mesh`, or `namespace/name` of a Gateway.
    pub gateway: &'a str,
    /// Port that requests come to (service port, or the server's port).
    pub port: u16,
}

/// Whether a VirtualService is bound to a gateway (`mesh` by default). Names without namespace are of its own.
pub fn bound_to(config: &Config<VirtualService>, gateway: &str) -> bool {
    if config.spec.gateways.is_empty() {
        return gateway == MESH_GATEWAY;
    }
    config
        .spec
        .gateways
        .iter()
        .any(|name| gateway_name(name, &config.meta.namespace) == gateway)
}

fn gateway_name(name: &str, namespace: &str) -> String {
    if name == MESH_GATEWAY || name.contains('/') {
        match name.strip_prefix("./") {
            Some(own) => format!("{namespace}/{own}"),
            None => name.to_string(),
        }
    } else {
        format!("{namespace}/{name}")
    }
}

/// VirtualServices that a client in `namespace` sees and that are bound to `gateway`, oldest first.
pub fn visible<'a>(world: &'a World, namespace: &str, gateway: &str) -> Vec<&'a Config<VirtualService>> {
    world
        .virtual_services()
        .into_iter()
        .map(|c| &**c)
        .filter(|c| c.broken.is_none())
        .filter(|c| bound_to(c, gateway))
        .filter(|c| {
            ExportTo::parse(c.spec.export_to.iter().map(String::as_str), &c.meta.namespace).visible_to(namespace)
        })
        .collect()
}

/// Hosts of a VirtualService, short names expanded.
pub fn hosts(world: &World, config: &Config<VirtualService>) -> Vec<String> {
    config
        .spec
        .hosts
        .iter()
        .map(|h| expand_host(h, &config.meta.namespace, &world.mesh().domain))
        .collect()
}

/// The routes of a VirtualService at a place, in order. An empty result means that no route is meant for it.
pub fn routes(world: &World, config: &Config<VirtualService>, place: Place<'_>) -> Vec<Route> {
    let mut out = Vec::new();
    for http in &config.spec.http {
        if http.r#match.is_empty() {
            out.push(route_of(world, config, http, None, place));
            continue;
        }
        for condition in &http.r#match {
            if at_place(condition, config, place) {
                out.push(route_of(world, config, http, Some(condition), place));
            }
        }
    }
    out
}

fn at_place(condition: &HttpMatchRequest, config: &Config<VirtualService>, place: Place<'_>) -> bool {
    let port = condition.port == 0 || condition.port == u32::from(place.port);
    let labels = mantlet_api::selector::subset(&condition.source_labels, place.client.labels);
    let namespace = condition.source_namespace.is_empty() || condition.source_namespace == place.client.namespace;
    let gateway = condition.gateways.is_empty()
        || condition
            .gateways
            .iter()
            .any(|g| gateway_name(g, &config.meta.namespace) == place.gateway);
    port && labels && namespace && gateway
}

fn route_of(
    world: &World,
    config: &Config<VirtualService>,
    http: &HttpRoute,
    condition: Option<&HttpMatchRequest>,
    place: Place<'_>,
) -> Route {
    let mut name = if http.name.is_empty() {
        "default".to_string()
    } else {
        http.name.clone()
    };
    if let Some(condition) = condition
        && !condition.name.is_empty()
    {
        name = format!("{name}.{}", condition.name);
    }
    let mut request_headers = Vec::new();
    let mut response_headers = Vec::new();
    let mut host_header = None;
    let mut take = |headers: Option<&mantlet_api::virtual_service::Headers>| {
        let Some(headers) = headers else { return };
        if let Some(request) = &headers.request {
            if let Some((_, value)) = request.set.iter().find(|(k, _)| is_host(k)) {
                host_header = Some(value.clone());
            }
            changes(request, &mut request_headers);
        }
        if let Some(response) = &headers.response {
            changes(response, &mut response_headers);
        }
    };
    take(http.headers.as_ref());
    if let [single] = http.route.as_slice() {
        take(single.headers.as_ref());
    }

    let mut decorator = format!("{}:{}/*", config.spec.hosts.first().map_or("", |h| h), place.port);
    let action = if let Some(redirect) = &http.redirect {
        RouteAction::Redirect(Redirect {
            host: some(&redirect.authority),
            path: some(&redirect.uri),
            port: redirect.port.and_then(|p| u16::try_from(p).ok()),
            https: redirect.scheme.eq_ignore_ascii_case("https"),
            status: u16::try_from(redirect.redirect_code)
                .ok()
                .filter(|c| *c != 0)
                .unwrap_or(301),
        })
    } else if let Some(direct) = &http.direct_response {
        RouteAction::Respond {
            status: u16::try_from(direct.status).unwrap_or(500),
            body: direct.body.as_ref().and_then(|b| b.string.clone()).unwrap_or_default(),
        }
    } else {
        let clusters = clusters(world, config, &http.route, place);
        if let Some(name) = clusters.first().and_then(|(c, _)| ClusterName::parse(c)) {
            decorator = format!("{}:{}/*", name.host, name.port);
        }
        let (prefix_rewrite, mut host_rewrite) = match &http.rewrite {
            Some(rewrite) => (some(&rewrite.uri), some(&rewrite.authority)),
            None => (None, None),
        };
        if host_rewrite.is_none() {
            host_rewrite = host_header;
        }
        RouteAction::Forward(Forward {
            clusters,
            prefix_rewrite,
            host_rewrite,
            timeout_ms: http.timeout.map_or(0, millis),
            retry: retry(http),
        })
    };
    Route {
        name,
        matches: condition.map(matches).unwrap_or_default(),
        action,
        decorator,
        request_headers,
        response_headers,
    }
}

/// What a VirtualService asks for and routing does not do yet, for its status.
pub fn problems(config: &Config<VirtualService>) -> Vec<String> {
    let mut out: Vec<String> = config
        .broken
        .iter()
        .map(|e| format!("cannot be read: {e}; it is ignored"))
        .collect();
    for (index, http) in config.spec.http.iter().enumerate() {
        for (present, what) in [
            (http.fault.is_some(), "fault"),
            (http.mirror.is_some() || !http.mirrors.is_empty(), "mirror"),
            (http.cors_policy.is_some(), "corsPolicy"),
            (http.delegate.is_some(), "delegate"),
            (
                http.rewrite.as_ref().is_some_and(|r| r.uri_regex_rewrite.is_some()),
                "rewrite.uriRegexRewrite",
            ),
        ] {
            if present {
                out.push(format!("http[{index}].{what} is not supported yet and is ignored"));
            }
        }
    }
    if !config.spec.tcp.is_empty() {
        out.push("tcp routes are not supported yet and are ignored".into());
    }
    out
}

fn clusters(
    world: &World,
    config: &Config<VirtualService>,
    route: &[HttpRouteDestination],
    place: Place<'_>,
) -> Vec<(String, u32)> {
    let cluster = |d: &HttpRouteDestination| {
        d.destination
            .as_ref()
            .and_then(|d| destination(world, &config.meta.namespace, d, place))
            .unwrap_or_else(|| names::BLACK_HOLE.to_string())
    };
    match route {
        [] => vec![(names::BLACK_HOLE.to_string(), 100)],
        [single] => vec![(cluster(single), 100)],
        many => {
            let weighted: Vec<(String, u32)> = many
                .iter()
                .filter_map(|d| {
                    let weight = u32::try_from(d.weight).ok().filter(|w| *w > 0)?;
                    Some((cluster(d), weight))
                })
                .collect();
            if weighted.is_empty() {
                vec![(names::BLACK_HOLE.to_string(), 100)]
            } else {
                weighted
            }
        }
    }
}

/// The cluster of a destination; `None` when the service, port or subset is unknown to the client.
pub fn destination(world: &World, namespace: &str, destination: &Destination, place: Place<'_>) -> Option<String> {
    let host = expand_host(&destination.host, namespace, &world.mesh().domain);
    let service = world.service(&host, place.client.namespace)?;
    let port = match &destination.port {
        Some(port) => u16::try_from(port.number).ok()?,
        None => match service.ports.as_slice() {
            [single] => single.number,
            _ => place.port,
        },
    };
    service.port(port)?;
    if !destination.subset.is_empty() {
        let rules = applied(world, place.client, service)?;
        rules.subsets.iter().find(|s| s.name == destination.subset)?;
    }
    Some(ClusterName::outbound(port, &destination.subset, &service.host).to_string())
}

fn retry(http: &HttpRoute) -> Option<Retry> {
    let Some(given) = &http.retries else {
        return Some(route::default_retry());
    };
    let attempts = u32::try_from(given.attempts).ok().filter(|a| *a > 0)?;
    let mut on = Vec::new();
    let mut statuses = Vec::new();
    for part in given.retry_on.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        match part.parse::<u32>() {
            Ok(status) => statuses.push(status),
            Err(_) => on.push(part.to_string()),
        }
    }
    if !statuses.is_empty() && !on.iter().any(|o| o == "retriable-status-codes") {
        on.push("retriable-status-codes".into());
    }
    Some(Retry {
        on: if on.is_empty() {
            route::default_retry().on
        } else {
            on.join(",")
        },
        attempts,
        per_try_timeout_ms: given.per_try_timeout.map_or(0, millis),
        statuses,
    })
}

fn matches(condition: &HttpMatchRequest) -> RouteMatch {
    let mut headers = Vec::new();
    for (name, value) in [
        (":method", &condition.method),
        (":scheme", &condition.scheme),
        (":authority", &condition.authority),
    ] {
        if let Some(value) = value {
            headers.push(HeaderMatch {
                name: name.into(),
                value: string_match(value),
                invert: false,
            });
        }
    }
    let claims_of = |map: &BTreeMap<String, ApiMatch>, invert: bool| -> Vec<ClaimMatch> {
        map.iter()
            .filter_map(|(name, value)| {
                Some(ClaimMatch {
                    path: claim_path(name)?,
                    value: string_match(value),
                    invert,
                })
            })
            .collect()
    };
    let mut claims = claims_of(&condition.headers, false);
    claims.extend(claims_of(&condition.without_headers, true));
    let named = |map: &BTreeMap<String, ApiMatch>, invert: bool| -> Vec<HeaderMatch> {
        map.iter()
            .filter(|(name, _)| claim_path(name).is_none())
            .map(|(name, value)| HeaderMatch {
                name: name.to_ascii_lowercase(),
                value: string_match(value),
                invert,
            })
            .collect()
    };
    headers.extend(named(&condition.headers, false));
    headers.extend(named(&condition.without_headers, true));
    RouteMatch {
        path: condition
            .uri
            .as_ref()
            .map(|uri| path_match(uri, condition.ignore_uri_case))
            .unwrap_or_default(),
        headers,
        query: condition
            .query_params
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), string_match(value)?)))
            .collect(),
        claims,
    }
}

/// The path of `@request.auth.claims.a.b` or `@request.auth.claims[a][b]` (S3.80); `None` for names of headers.
fn claim_path(name: &str) -> Option<Vec<String>> {
    const PREFIX: &str = "@request.auth.claims";
    let rest = name
        .get(..PREFIX.len())
        .filter(|start| start.eq_ignore_ascii_case(PREFIX))
        .map(|_| &name[PREFIX.len()..])?;
    let path: Vec<String> = match rest.strip_prefix('.') {
        Some(dotted) => dotted.split('.').map(String::from).collect(),
        None => rest
            .strip_prefix('[')?
            .strip_suffix(']')?
            .split("][")
            .map(String::from)
            .collect(),
    };
    let good = |part: &String| !part.is_empty() && !part.contains(['[', ']']);
    path.iter().all(good).then_some(path)
}

fn path_match(uri: &ApiMatch, ignore_case: bool) -> PathMatch {
    let fold = |text: &str, rest: &str| PathMatch::Regex(format!("(?i){}{rest}", escape(text)));
    match (&uri.exact, &uri.prefix, &uri.regex) {
        (Some(exact), _, _) if ignore_case => fold(exact, ""),
        (Some(exact), _, _) => PathMatch::Exact(exact.clone()),
        (_, Some(prefix), _) if ignore_case => fold(prefix, ".*"),
        (_, Some(prefix), _) => PathMatch::Prefix(prefix.clone()),
        (_, _, Some(regex)) => PathMatch::Regex(regex.clone()),
        _ => PathMatch::default(),
    }
}

/// Escapes the characters that mean something in RE2.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A condition on a value; `None` means presence.
fn string_match(value: &ApiMatch) -> Option<StringMatch> {
    match (&value.exact, &value.prefix, &value.regex) {
        (Some(exact), _, _) => Some(StringMatch::Exact(exact.clone())),
        (_, Some(prefix), _) => Some(StringMatch::Prefix(prefix.clone())),
        (_, _, Some(regex)) if regex != "*" => Some(StringMatch::Regex(regex.clone())),
        _ => None,
    }
}

fn changes(operations: &HeaderOperations, out: &mut Vec<HeaderChange>) {
    for (name, value) in operations.set.iter().filter(|(k, _)| !is_host(k)) {
        out.push(HeaderChange::Set(name.to_ascii_lowercase(), value.clone()));
    }
    for (name, value) in operations.add.iter().filter(|(k, _)| !is_host(k)) {
        out.push(HeaderChange::Add(name.to_ascii_lowercase(), value.clone()));
    }
    for name in operations.remove.iter().filter(|k| !is_host(k)) {
        out.push(HeaderChange::Remove(name.to_ascii_lowercase()));
    }
}

fn is_host(name: &str) -> bool {
    name.eq_ignore_ascii_case("host") || name.eq_ignore_ascii_case(":authority")
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_string())
}

fn millis(duration: mantlet_api::Duration) -> u64 {
    u64::try_from(duration.0.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_named_in_two_ways() {
        let path = |name: &str| claim_path(name).map(|p| p.join("|"));
        assert_eq!(path("@request.auth.claims.a").as_deref(), Some("a"));
        assert_eq!(path("@request.auth.claims.a.b").as_deref(), Some("a|b"));
        assert_eq!(
            path("@REQUEST.auth.Claims.A").as_deref(),
            Some("A"),
            "S3.80: names keep their case"
        );
        assert_eq!(path("@request.auth.claims[a.b][c]").as_deref(), Some("a.b|c"));
        for header in [
            "x-user",
            "request.auth.claims.a",
            "@request.auth.claims",
            "@request.auth.claims.",
            "@request.auth.claims.a..b",
            "@request.auth.claims.a[b]",
            "@request.auth.claims[a].b",
            "@request.auth.claims[]",
            "@request.auth.claims[a",
            "@request.auth.claimsa",
        ] {
            assert_eq!(path(header), None, "{header}");
        }
    }

    #[test]
    fn conditions_on_claims_are_no_conditions_on_headers() {
        let condition: HttpMatchRequest = serde_json::from_value(serde_json::json!({
            "headers": {"@request.auth.claims.groups": {"exact": "admin"}, "X-V": {"prefix": "1"}},
            "withoutHeaders": {"@request.auth.claims[sub]": {}},
        }))
        .unwrap();
        let found = matches(&condition);
        assert_eq!(found.headers.len(), 1);
        let claim = |path: &str, value, invert| ClaimMatch {
            path: vec![path.into()],
            value,
            invert,
        };
        let expected = [
            claim("groups", Some(StringMatch::Exact("admin".into())), false),
            claim("sub", None, true),
        ];
        assert_eq!(found.claims, expected, "S3.81, S3.82");
    }
}
