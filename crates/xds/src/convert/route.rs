//! Route tables.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{DataSource, HeaderValue, HeaderValueOption};
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::config::route::v3::query_parameter_matcher::QueryParameterMatchSpecifier;
use envoy_types::pb::envoy::config::route::v3::redirect_action::{
    PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier,
};
use envoy_types::pb::envoy::config::route::v3::route::Action;
use envoy_types::pb::envoy::config::route::v3::route_action::{ClusterSpecifier, HostRewriteSpecifier};
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::config::route::v3::weighted_cluster::ClusterWeight;
use envoy_types::pb::envoy::config::route::v3::{
    Decorator, DirectResponseAction, HeaderMatcher, QueryParameterMatcher, RedirectAction, RetryPolicy,
    Route as ProtoRoute, RouteAction as ProtoAction, RouteConfiguration, RouteMatch as ProtoMatch, Vhds,
    VirtualHost as ProtoHost, WeightedCluster,
};
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::path_segment;
use envoy_types::pb::envoy::r#type::matcher::v3::{MetadataMatcher, OrMatcher, ValueMatcher, value_matcher};
use mantlet_model::RouteTable;
use mantlet_model::route::{
    ClaimMatch, Forward, HeaderChange, HeaderMatch, PathMatch, Redirect, Retry, Route, RouteAction, RouteMatch,
    StringMatch, VirtualHost,
};

use super::authz::{JWT, PAYLOAD, list_value, segments, take_value, text_value};
use super::strings::{self, Pattern};
use crate::wire::{
    At, Result, ads, boolean, done, duration, expect, fault, port, require, take_ads, take_bool, take_ms, take_uint,
    uint,
};

/// The weight of the only cluster of a route.
const WHOLE: u32 = 100;

pub(crate) fn encode(table: &RouteTable) -> RouteConfiguration {
    RouteConfiguration {
        name: table.name.clone(),
        virtual_hosts: table.hosts.iter().map(|host| encode_host(host)).collect(),
        vhds: table.on_demand.then(|| Vhds { config_source: ads() }),
        ignore_port_in_host_matching: table.ignore_port_in_host,
        // Routes may arrive before the clusters that they name.
        validate_clusters: boolean(false),
        ..RouteConfiguration::default()
    }
}

pub(crate) fn decode(mut proto: RouteConfiguration) -> Result<RouteTable> {
    let mut table = RouteTable {
        name: std::mem::take(&mut proto.name),
        hosts: Vec::new(),
        ignore_port_in_host: std::mem::take(&mut proto.ignore_port_in_host_matching),
        on_demand: false,
    };
    if let Some(mut vhds) = proto.vhds.take() {
        take_ads(&mut vhds.config_source, "config_source").at("vhds")?;
        done(vhds).at("vhds")?;
        table.on_demand = true;
    }
    expect(
        !take_bool(&mut proto.validate_clusters, false),
        "validate_clusters",
        "only false is supported",
    )?;
    for host in std::mem::take(&mut proto.virtual_hosts) {
        let place = format!("virtual_hosts[{}]", host.name);
        table.hosts.push(Arc::new(decode_host(host).at(&place)?));
    }
    done(proto)?;
    Ok(table)
}

pub(crate) fn encode_host(model: &VirtualHost) -> ProtoHost {
    ProtoHost {
        name: model.name.clone(),
        domains: model.domains.clone(),
        routes: model.routes.iter().map(route).collect(),
        include_request_attempt_count: model.attempt_count,
        ..ProtoHost::default()
    }
}

pub(crate) fn decode_host(mut proto: ProtoHost) -> Result<VirtualHost> {
    let mut host = VirtualHost {
        name: std::mem::take(&mut proto.name),
        domains: std::mem::take(&mut proto.domains),
        routes: Vec::new(),
        attempt_count: std::mem::take(&mut proto.include_request_attempt_count),
    };
    for (index, route) in std::mem::take(&mut proto.routes).into_iter().enumerate() {
        let place = format!("routes[{index}]");
        host.routes.push(take_route(route).at(&place)?);
    }
    done(proto)?;
    Ok(host)
}

fn route(model: &Route) -> ProtoRoute {
    let (request_headers_to_add, request_headers_to_remove) = headers(&model.request_headers);
    let (response_headers_to_add, response_headers_to_remove) = headers(&model.response_headers);
    ProtoRoute {
        name: model.name.clone(),
        r#match: Some(matches(&model.matches)),
        decorator: (!model.decorator.is_empty()).then(|| Decorator {
            operation: model.decorator.clone(),
            propagate: None,
        }),
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        action: Some(match &model.action {
            RouteAction::Forward(model) => Action::Route(forward(model)),
            RouteAction::Respond { status, body } => Action::DirectResponse(DirectResponseAction {
                status: (*status).into(),
                body: (!body.is_empty()).then(|| DataSource {
                    specifier: Some(Specifier::InlineString(body.clone())),
                    ..DataSource::default()
                }),
                ..DirectResponseAction::default()
            }),
            RouteAction::Redirect(model) => Action::Redirect(redirect(model)),
        }),
        ..ProtoRoute::default()
    }
}

fn take_route(mut proto: ProtoRoute) -> Result<Route> {
    let mut decorator = String::new();
    if let Some(mut value) = proto.decorator.take() {
        decorator = std::mem::take(&mut value.operation);
        done(value).at("decorator")?;
    }
    let request_headers = take_headers(&mut proto.request_headers_to_add, &mut proto.request_headers_to_remove)
        .at("request_headers_to_add")?;
    let response_headers = take_headers(
        &mut proto.response_headers_to_add,
        &mut proto.response_headers_to_remove,
    )
    .at("response_headers_to_add")?;
    let route = Route {
        name: std::mem::take(&mut proto.name),
        matches: take_matches(require(&mut proto.r#match, "match")?).at("match")?,
        action: match proto.action.take() {
            Some(Action::Route(action)) => RouteAction::Forward(take_forward(action).at("route")?),
            Some(Action::Redirect(action)) => RouteAction::Redirect(take_redirect(action).at("redirect")?),
            Some(Action::DirectResponse(mut action)) => {
                let status = std::mem::take(&mut action.status);
                let status = port(status, "direct_response.status")?;
                let body = match action.body.take().map(|b| b.specifier) {
                    None => String::new(),
                    Some(Some(Specifier::InlineString(text))) => text,
                    Some(_) => return fault("direct_response.body", "only inline_string is supported"),
                };
                done(action).at("direct_response")?;
                RouteAction::Respond { status, body }
            }
            Some(Action::FilterAction(_)) => return fault("filter_action", "not supported"),
            Some(Action::NonForwardingAction(_)) => return fault("non_forwarding_action", "not supported"),
            None => return fault("action", "missing"),
        },
        decorator,
        request_headers,
        response_headers,
    };
    done(proto)?;
    Ok(route)
}

/// Envoy removes before it adds; so a removal that follows an addition of the same header takes that addition back.
fn headers(changes: &[HeaderChange]) -> (Vec<HeaderValueOption>, Vec<String>) {
    let mut add: Vec<HeaderValueOption> = Vec::new();
    let mut remove = Vec::new();
    for change in changes {
        let (name, value, action) = match change {
            HeaderChange::Set(name, value) => (name, value, HeaderAppendAction::OverwriteIfExistsOrAdd),
            HeaderChange::Add(name, value) => (name, value, HeaderAppendAction::AppendIfExistsOrAdd),
            HeaderChange::Remove(name) => {
                add.retain(|a| a.header.as_ref().is_none_or(|h| !h.key.eq_ignore_ascii_case(name)));
                remove.push(name.clone());
                continue;
            }
        };
        add.push(HeaderValueOption {
            header: Some(HeaderValue {
                key: name.clone(),
                value: value.clone(),
                ..HeaderValue::default()
            }),
            append_action: action.into(),
            ..HeaderValueOption::default()
        });
    }
    (add, remove)
}

fn take_headers(add: &mut Vec<HeaderValueOption>, remove: &mut Vec<String>) -> Result<Vec<HeaderChange>> {
    let mut out: Vec<_> = std::mem::take(remove).into_iter().map(HeaderChange::Remove).collect();
    for mut option in std::mem::take(add) {
        let mut header = require(&mut option.header, "header")?;
        let (name, value) = (std::mem::take(&mut header.key), std::mem::take(&mut header.value));
        done(header).at(&name)?;
        // The older spelling of the same choice.
        let older = option.append.take().map(|b| b.value);
        let action = HeaderAppendAction::try_from(std::mem::take(&mut option.append_action));
        out.push(match (action, older) {
            (Ok(HeaderAppendAction::AppendIfExistsOrAdd), Some(false))
            | (Ok(HeaderAppendAction::OverwriteIfExistsOrAdd), None) => HeaderChange::Set(name, value),
            (Ok(HeaderAppendAction::AppendIfExistsOrAdd), None | Some(true)) => HeaderChange::Add(name, value),
            _ => return fault(name, "append_action not supported"),
        });
        done(option)?;
    }
    Ok(out)
}

fn string(model: &StringMatch) -> Pattern {
    match model {
        StringMatch::Exact(s) => Pattern::Exact(s.clone()),
        StringMatch::Prefix(s) => Pattern::Prefix(s.clone()),
        StringMatch::Regex(s) => Pattern::Regex(s.clone()),
    }
}

fn take_string(pattern: Pattern) -> Result<StringMatch> {
    Ok(match pattern {
        Pattern::Exact(s) => StringMatch::Exact(s),
        Pattern::Prefix(s) => StringMatch::Prefix(s),
        Pattern::Regex(s) => StringMatch::Regex(s),
        Pattern::Suffix(_) => return fault("suffix", "not supported"),
    })
}

fn matches(model: &RouteMatch) -> ProtoMatch {
    ProtoMatch {
        path_specifier: Some(match &model.path {
            PathMatch::Prefix(s) => PathSpecifier::Prefix(s.clone()),
            PathMatch::SegmentPrefix(s) => PathSpecifier::PathSeparatedPrefix(s.clone()),
            PathMatch::Exact(s) => PathSpecifier::Path(s.clone()),
            PathMatch::Regex(s) => PathSpecifier::SafeRegex(strings::regex(s)),
        }),
        headers: model
            .headers
            .iter()
            .map(|header| HeaderMatcher {
                name: header.name.clone(),
                invert_match: header.invert,
                // Else Envoy lets an inverted condition on an absent header fail.
                treat_missing_header_as_empty: header.invert && header.value.is_some(),
                header_match_specifier: Some(match &header.value {
                    None => HeaderMatchSpecifier::PresentMatch(true),
                    Some(value) => HeaderMatchSpecifier::StringMatch(strings::encode(&string(value), false)),
                }),
            })
            .collect(),
        query_parameters: model
            .query
            .iter()
            .map(|(name, value)| QueryParameterMatcher {
                name: name.clone(),
                query_parameter_match_specifier: Some(QueryParameterMatchSpecifier::StringMatch(strings::encode(
                    &string(value),
                    false,
                ))),
            })
            .collect(),
        dynamic_metadata: model.claims.iter().map(claim).collect(),
        ..ProtoMatch::default()
    }
}

pub(crate) fn take_matches(mut proto: ProtoMatch) -> Result<RouteMatch> {
    expect(
        take_bool(&mut proto.case_sensitive, true),
        "case_sensitive",
        "only true is supported",
    )?;
    let path = match proto.path_specifier.take() {
        Some(PathSpecifier::Prefix(s)) => PathMatch::Prefix(s),
        Some(PathSpecifier::PathSeparatedPrefix(s)) => PathMatch::SegmentPrefix(s),
        Some(PathSpecifier::Path(s)) => PathMatch::Exact(s),
        Some(PathSpecifier::SafeRegex(r)) => PathMatch::Regex(strings::take_regex(r).at("safe_regex")?),
        Some(PathSpecifier::ConnectMatcher(_)) => return fault("connect_matcher", "not supported"),
        Some(PathSpecifier::PathMatchPolicy(p)) => {
            return fault("path_match_policy", format!("{} not supported", p.name));
        }
        None => return fault("path_specifier", "missing"),
    };
    let mut headers = Vec::new();
    for header in std::mem::take(&mut proto.headers) {
        let place = format!("headers[{}]", header.name);
        headers.push(take_header_match(header).at(&place)?);
    }
    let mut query = Vec::new();
    for parameter in std::mem::take(&mut proto.query_parameters) {
        let place = format!("query_parameters[{}]", parameter.name);
        match parameter.query_parameter_match_specifier {
            Some(QueryParameterMatchSpecifier::StringMatch(matcher)) => {
                let value = strings::decode_exact_case(matcher).and_then(take_string).at(&place)?;
                query.push((parameter.name, value));
            }
            _ => return fault(place, "only string_match is supported"),
        }
    }
    let mut claims = Vec::new();
    for (index, metadata) in std::mem::take(&mut proto.dynamic_metadata).into_iter().enumerate() {
        claims.push(take_claim(metadata).at(&format!("dynamic_metadata[{index}]"))?);
    }
    done(proto)?;
    Ok(RouteMatch {
        path,
        headers,
        query,
        claims,
    })
}

/// A condition on a claim reads the payload that jwt_authn stored (S3.81).
fn claim(model: &ClaimMatch) -> MetadataMatcher {
    let pattern = match &model.value {
        None => value_matcher::MatchPattern::PresentMatch(true),
        Some(value) => {
            let text = || strings::encode(&string(value), false);
            value_matcher::MatchPattern::OrMatch(OrMatcher {
                value_matchers: vec![text_value(text()), list_value(text())],
            })
        }
    };
    MetadataMatcher {
        filter: JWT.into(),
        path: segments(std::iter::once(PAYLOAD).chain(model.path.iter().map(String::as_str))),
        value: Some(ValueMatcher {
            match_pattern: Some(pattern),
        }),
        invert: model.invert,
    }
}

fn take_claim(mut proto: MetadataMatcher) -> Result<ClaimMatch> {
    let mut path = Vec::new();
    for segment in std::mem::take(&mut proto.path) {
        match segment.segment {
            Some(path_segment::Segment::Key(key)) => path.push(key),
            None => return fault("path", "empty segment"),
        }
    }
    expect(
        std::mem::take(&mut proto.filter) == JWT && path.len() > 1 && path[0] == PAYLOAD,
        "path",
        "only claims of the verified token are supported",
    )?;
    path.remove(0);
    let value = require(&mut proto.value, "value")?;
    let model = ClaimMatch {
        path,
        value: match value.match_pattern {
            Some(value_matcher::MatchPattern::PresentMatch(true)) => None,
            _ => Some(take_value(value, false).and_then(take_string).at("value")?),
        },
        invert: std::mem::take(&mut proto.invert),
    };
    done(proto)?;
    Ok(model)
}

fn take_header_match(mut proto: HeaderMatcher) -> Result<HeaderMatch> {
    let mut invert = std::mem::take(&mut proto.invert_match);
    let missing_is_empty = std::mem::take(&mut proto.treat_missing_header_as_empty);
    let value = match require(&mut proto.header_match_specifier, "header_match_specifier")? {
        HeaderMatchSpecifier::PresentMatch(present) => {
            invert ^= !present;
            None
        }
        HeaderMatchSpecifier::StringMatch(matcher) => Some(strings::decode_exact_case(matcher).and_then(take_string)?),
        HeaderMatchSpecifier::ExactMatch(s) => Some(StringMatch::Exact(s)),
        HeaderMatchSpecifier::PrefixMatch(s) => Some(StringMatch::Prefix(s)),
        HeaderMatchSpecifier::SafeRegexMatch(r) => Some(StringMatch::Regex(strings::take_regex(r)?)),
        _ => return fault("header_match_specifier", "not supported"),
    };
    expect(
        missing_is_empty == (invert && value.is_some()),
        "treat_missing_header_as_empty",
        "only supported together with invert_match, and required there",
    )?;
    let model = HeaderMatch {
        name: std::mem::take(&mut proto.name),
        value,
        invert,
    };
    done(proto)?;
    Ok(model)
}

fn forward(model: &Forward) -> ProtoAction {
    let cluster = match model.clusters.as_slice() {
        [(name, WHOLE)] => ClusterSpecifier::Cluster(name.clone()),
        list => ClusterSpecifier::WeightedClusters(WeightedCluster {
            clusters: list
                .iter()
                .map(|(name, weight)| ClusterWeight {
                    name: name.clone(),
                    weight: uint(*weight),
                    ..ClusterWeight::default()
                })
                .collect(),
            ..WeightedCluster::default()
        }),
    };
    ProtoAction {
        cluster_specifier: Some(cluster),
        prefix_rewrite: model.prefix_rewrite.clone().unwrap_or_default(),
        host_rewrite_specifier: model.host_rewrite.clone().map(HostRewriteSpecifier::HostRewriteLiteral),
        timeout: duration(model.timeout_ms),
        retry_policy: model.retry.as_ref().map(|retry| RetryPolicy {
            retry_on: retry.on.clone(),
            num_retries: uint(retry.attempts),
            per_try_timeout: if retry.per_try_timeout_ms > 0 {
                duration(retry.per_try_timeout_ms)
            } else {
                None
            },
            retriable_status_codes: retry.statuses.clone(),
            ..RetryPolicy::default()
        }),
        ..ProtoAction::default()
    }
}

fn take_forward(mut proto: ProtoAction) -> Result<Forward> {
    let clusters = match proto.cluster_specifier.take() {
        Some(ClusterSpecifier::Cluster(name)) => vec![(name, WHOLE)],
        Some(ClusterSpecifier::WeightedClusters(mut weighted)) => {
            let mut list = Vec::new();
            for mut cluster in std::mem::take(&mut weighted.clusters) {
                let name = std::mem::take(&mut cluster.name);
                let weight = take_uint(&mut cluster.weight).unwrap_or(0);
                done(cluster).at(&name)?;
                list.push((name, weight));
            }
            done(weighted).at("weighted_clusters")?;
            expect(!list.is_empty(), "weighted_clusters", "empty")?;
            list
        }
        Some(_) => return fault("cluster_specifier", "only cluster and weighted_clusters are supported"),
        None => return fault("cluster_specifier", "missing"),
    };
    let prefix = std::mem::take(&mut proto.prefix_rewrite);
    let mut retry = None;
    if let Some(mut policy) = proto.retry_policy.take() {
        retry = Some(Retry {
            on: std::mem::take(&mut policy.retry_on),
            attempts: take_uint(&mut policy.num_retries).unwrap_or(1),
            per_try_timeout_ms: take_ms(&mut policy.per_try_timeout, "per_try_timeout")?.unwrap_or(0),
            statuses: std::mem::take(&mut policy.retriable_status_codes),
        });
        done(policy).at("retry_policy")?;
    }
    let model = Forward {
        clusters,
        prefix_rewrite: (!prefix.is_empty()).then_some(prefix),
        host_rewrite: match proto.host_rewrite_specifier.take() {
            None => None,
            Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => Some(host),
            Some(_) => return fault("host_rewrite_specifier", "only host_rewrite_literal is supported"),
        },
        // Absent is Envoy's default of 15 seconds.
        timeout_ms: take_ms(&mut proto.timeout, "timeout")?.unwrap_or(15_000),
        retry,
    };
    done(proto)?;
    Ok(model)
}

const REDIRECTS: [(u16, RedirectResponseCode); 5] = [
    (301, RedirectResponseCode::MovedPermanently),
    (302, RedirectResponseCode::Found),
    (303, RedirectResponseCode::SeeOther),
    (307, RedirectResponseCode::TemporaryRedirect),
    (308, RedirectResponseCode::PermanentRedirect),
];

fn redirect(model: &Redirect) -> RedirectAction {
    let code = REDIRECTS.iter().find(|(status, _)| *status == model.status);
    RedirectAction {
        host_redirect: model.host.clone().unwrap_or_default(),
        port_redirect: model.port.unwrap_or(0).into(),
        path_rewrite_specifier: model.path.clone().map(PathRewriteSpecifier::PathRedirect),
        scheme_rewrite_specifier: model.https.then_some(SchemeRewriteSpecifier::HttpsRedirect(true)),
        response_code: code
            .map_or(RedirectResponseCode::MovedPermanently, |(_, code)| *code)
            .into(),
        ..RedirectAction::default()
    }
}

fn take_redirect(mut proto: RedirectAction) -> Result<Redirect> {
    let host = std::mem::take(&mut proto.host_redirect);
    let number = port(std::mem::take(&mut proto.port_redirect), "port_redirect")?;
    let code = std::mem::take(&mut proto.response_code);
    let Some((status, _)) = REDIRECTS.iter().find(|(_, c)| i32::from(*c) == code) else {
        return fault("response_code", format!("unknown value {code}"));
    };
    let model = Redirect {
        host: (!host.is_empty()).then_some(host),
        path: match proto.path_rewrite_specifier.take() {
            None => None,
            Some(PathRewriteSpecifier::PathRedirect(path)) => Some(path),
            Some(_) => return fault("path_rewrite_specifier", "only path_redirect is supported"),
        },
        port: (number != 0).then_some(number),
        https: match proto.scheme_rewrite_specifier.take() {
            None | Some(SchemeRewriteSpecifier::HttpsRedirect(false)) => false,
            Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => true,
            Some(SchemeRewriteSpecifier::SchemeRedirect(_)) => return fault("scheme_redirect", "not supported"),
        },
        status: *status,
    };
    done(proto)?;
    Ok(model)
}
