//! CUSTOM stages: an RBAC filter whose rules are shadow rules only, and an `ext_authz` filter that is enabled by what the
//! former wrote into its metadata (S2.140). Stages that deny are an RBAC filter with enforced DENY rules.
//!
//! On the way back a pair becomes one stage again; shadow rules without their `ext_authz`, or the other way round, are
//! refused, since a request that should be asked about must not pass unasked.

use envoy_types::pb::envoy::config::core::v3::grpc_service::{EnvoyGrpc, TargetSpecifier};
use envoy_types::pb::envoy::config::core::v3::http_uri::HttpUpstreamType;
use envoy_types::pb::envoy::config::core::v3::{ApiVersion, GrpcService, HeaderValue, HttpUri};
use envoy_types::pb::envoy::config::rbac::v3::{Rbac, rbac};
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::ext_authz::Services;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::{
    AuthorizationRequest, AuthorizationResponse, BufferSettings, ExtAuthz as HttpProto, HttpService,
};
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use envoy_types::pb::envoy::extensions::filters::network::ext_authz::v3::ExtAuthz as NetworkProto;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::{PathSegment, path_segment};
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{
    ListStringMatcher, MetadataMatcher, StringMatcher, ValueMatcher, value_matcher,
};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use mantlet_model::authz::{Action, Rule};
use mantlet_model::ext_authz::{
    BodyInCheck, CheckProtocol, CustomStage, ExtAuthz, HeaderPattern, HttpCheck, ID_PREFIX, Then,
};

use super::authz;
use super::strings::{self, Pattern};
use crate::Any;
use crate::wire::{At, Result, done, duration, expect, fault, pack, require, take_ms};

const HTTP_RBAC: &str = "envoy.filters.http.rbac";
const NETWORK_RBAC: &str = "envoy.filters.network.rbac";
const HTTP_EXT_AUTHZ: &str = "envoy.filters.http.ext_authz";
const NETWORK_EXT_AUTHZ: &str = "envoy.filters.network.ext_authz";
/// Prefix of what the shadow rules write into the RBAC filter's metadata.
const SHADOW_PREFIX: &str = "istio_ext_authz_";
/// The key that `ext_authz` looks at.
const ENABLED_KEY: &str = "istio_ext_authz_shadow_effective_policy_id";
/// Statistics prefix of network filters.
const TCP_STATS: &str = "tcp.";

/// The filters of a stage on an HTTP chain, by name.
pub(crate) fn encode_http(stage: &CustomStage) -> Vec<(&'static str, Any)> {
    match &stage.then {
        Then::Deny => vec![(HTTP_RBAC, pack(&authz::encode_http(&stage.selector())))],
        Then::Ask(provider) => {
            let rbac = HttpRbac {
                shadow_rules: Some(authz::encode_rules(Action::Deny, &stage.rules)),
                shadow_rules_stat_prefix: SHADOW_PREFIX.into(),
                ..HttpRbac::default()
            };
            vec![(HTTP_RBAC, pack(&rbac)), (HTTP_EXT_AUTHZ, pack(&http_filter(provider)))]
        }
    }
}

/// The filters of a stage on a TCP chain, by name.
pub(crate) fn encode_network(stage: &CustomStage) -> Vec<(&'static str, Any)> {
    match &stage.then {
        Then::Deny => vec![(NETWORK_RBAC, pack(&authz::encode_network(&stage.selector())))],
        Then::Ask(provider) => {
            let rbac = NetworkRbac {
                shadow_rules: Some(authz::encode_rules(Action::Deny, &stage.rules)),
                shadow_rules_stat_prefix: SHADOW_PREFIX.into(),
                stat_prefix: TCP_STATS.into(),
                ..NetworkRbac::default()
            };
            let filter = NetworkProto {
                stat_prefix: TCP_STATS.into(),
                grpc_service: Some(grpc_service(provider)),
                failure_mode_allow: provider.fail_open,
                transport_api_version: ApiVersion::V3.into(),
                filter_enabled_metadata: Some(enabled(NETWORK_RBAC, &provider.provider)),
                ..NetworkProto::default()
            };
            vec![(NETWORK_RBAC, pack(&rbac)), (NETWORK_EXT_AUTHZ, pack(&filter))]
        }
    }
}

fn id_prefix(provider: &str) -> String {
    match provider {
        "" => ID_PREFIX.to_string(),
        provider => format!("{ID_PREFIX}-{provider}"),
    }
}

/// "The shadow rules of this provider matched."
fn enabled(filter: &str, provider: &str) -> MetadataMatcher {
    MetadataMatcher {
        filter: filter.into(),
        path: vec![PathSegment {
            segment: Some(path_segment::Segment::Key(ENABLED_KEY.into())),
        }],
        value: Some(ValueMatcher {
            match_pattern: Some(value_matcher::MatchPattern::StringMatch(StringMatcher {
                match_pattern: Some(MatchPattern::Prefix(id_prefix(provider))),
                ignore_case: false,
            })),
        }),
        ..MetadataMatcher::default()
    }
}

/// The provider that a filter is enabled for.
fn take_enabled(field: &mut Option<MetadataMatcher>, filter: &str) -> Result<String> {
    const PLACE: &str = "filter_enabled_metadata";
    let Some(found) = field.take() else {
        return fault(
            PLACE,
            "missing: only ext_authz that is enabled by shadow rules is supported",
        );
    };
    let prefix = match found.value.as_ref().and_then(|v| v.match_pattern.as_ref()) {
        Some(value_matcher::MatchPattern::StringMatch(StringMatcher {
            match_pattern: Some(MatchPattern::Prefix(prefix)),
            ..
        })) => prefix.clone(),
        _ => return fault(PLACE, "only a prefix of the policy id is supported"),
    };
    let provider = match prefix.strip_prefix(ID_PREFIX) {
        Some("") => String::new(),
        Some(rest) if rest.len() > 1 && rest.starts_with('-') => rest[1..].to_string(),
        _ => return fault(PLACE, format!("{prefix:?} is no prefix of CUSTOM policies")),
    };
    expect(
        found == enabled(filter, &provider),
        PLACE,
        "not the one that Istio writes",
    )?;
    Ok(provider)
}

fn status(code: u16) -> HttpStatus {
    HttpStatus { code: code.into() }
}

fn take_status(field: &mut Option<HttpStatus>) -> Result<Option<u16>> {
    match field.take() {
        None => Ok(None),
        Some(status) => match u16::try_from(status.code) {
            Ok(code @ 100..=599) => Ok(Some(code)),
            _ => fault("status_on_error", format!("{} is no HTTP status", status.code)),
        },
    }
}

fn grpc_service(provider: &ExtAuthz) -> GrpcService {
    let authority = match &provider.protocol {
        CheckProtocol::Grpc { authority } => authority.clone(),
        CheckProtocol::Http(_) => String::new(),
    };
    GrpcService {
        timeout: duration(provider.timeout_ms),
        target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
            cluster_name: provider.cluster.clone(),
            authority,
            ..EnvoyGrpc::default()
        })),
        ..GrpcService::default()
    }
}

/// Cluster, authority, timeout. Absent timeouts are Envoy's 200 ms.
fn take_grpc(mut service: GrpcService) -> Result<(String, String, u64)> {
    let timeout = take_ms(&mut service.timeout, "timeout")?.unwrap_or(200);
    let mut target = match service.target_specifier.take() {
        Some(TargetSpecifier::EnvoyGrpc(target)) => target,
        _ => return fault("target_specifier", "only envoy_grpc is supported"),
    };
    done(service)?;
    let cluster = std::mem::take(&mut target.cluster_name);
    let authority = std::mem::take(&mut target.authority);
    done(target).at("envoy_grpc")?;
    Ok((cluster, authority, timeout))
}

fn http_filter(provider: &ExtAuthz) -> HttpProto {
    let services = match &provider.protocol {
        CheckProtocol::Grpc { .. } => Services::GrpcService(grpc_service(provider)),
        CheckProtocol::Http(check) => Services::HttpService(http_service(provider, check)),
    };
    HttpProto {
        transport_api_version: ApiVersion::V3.into(),
        failure_mode_allow: provider.fail_open,
        with_request_body: provider.body.map(|body| BufferSettings {
            max_request_bytes: body.max_bytes,
            allow_partial_message: body.allow_partial,
            pack_as_bytes: body.as_bytes,
        }),
        status_on_error: provider.status_on_error.map(status),
        filter_enabled_metadata: Some(enabled(HTTP_RBAC, &provider.provider)),
        services: Some(services),
        ..HttpProto::default()
    }
}

fn http_service(provider: &ExtAuthz, check: &HttpCheck) -> HttpService {
    let add: Vec<HeaderValue> = check
        .add_headers
        .iter()
        .map(|(key, value)| HeaderValue {
            key: key.clone(),
            value: value.clone(),
            ..HeaderValue::default()
        })
        .collect();
    let request = AuthorizationRequest {
        allowed_headers: patterns(&check.request_headers),
        headers_to_add: add,
    };
    let response = AuthorizationResponse {
        allowed_upstream_headers: patterns(&check.upstream_headers),
        allowed_client_headers: patterns(&check.deny_headers),
        allowed_client_headers_on_success: patterns(&check.allow_headers),
        ..AuthorizationResponse::default()
    };
    HttpService {
        server_uri: Some(HttpUri {
            uri: format!("http://{}", check.host),
            timeout: duration(provider.timeout_ms),
            http_upstream_type: Some(HttpUpstreamType::Cluster(provider.cluster.clone())),
        }),
        path_prefix: check.path_prefix.clone(),
        authorization_request: (request != AuthorizationRequest::default()).then_some(request),
        authorization_response: (response != AuthorizationResponse::default()).then_some(response),
        ..HttpService::default()
    }
}

fn patterns(list: &[HeaderPattern]) -> Option<ListStringMatcher> {
    (!list.is_empty()).then(|| ListStringMatcher {
        patterns: list
            .iter()
            .map(|p| {
                let pattern = match p {
                    HeaderPattern::Exact(s) => Pattern::Exact(s.clone()),
                    HeaderPattern::Prefix(s) => Pattern::Prefix(s.clone()),
                    HeaderPattern::Suffix(s) => Pattern::Suffix(s.clone()),
                };
                strings::encode(&pattern, true)
            })
            .collect(),
    })
}

fn take_patterns(list: Option<ListStringMatcher>, name: &str) -> Result<Vec<HeaderPattern>> {
    let Some(list) = list else { return Ok(Vec::new()) };
    // An empty list would be spelled like an absent one, and they differ in Envoy only by accident.
    expect(!list.patterns.is_empty(), name, "empty list")?;
    let mut out = Vec::new();
    for matcher in list.patterns {
        let (pattern, ignore_case) = strings::decode(matcher).at(name)?;
        let header = match pattern {
            Pattern::Exact(s) => HeaderPattern::Exact(s),
            Pattern::Prefix(s) => HeaderPattern::Prefix(s),
            Pattern::Suffix(s) => HeaderPattern::Suffix(s),
            Pattern::Regex(_) => return fault(name, "regular expressions are not supported"),
        };
        // Header names are lower case when they are compared.
        let folded = match &header {
            HeaderPattern::Exact(s) | HeaderPattern::Prefix(s) | HeaderPattern::Suffix(s) => {
                s.bytes().all(|b| !b.is_ascii_uppercase())
            }
        };
        expect(ignore_case || folded, name, "only ignore_case is supported")?;
        out.push(header);
    }
    Ok(out)
}

/// Stages while the filters of a chain are read, in order.
#[derive(Default)]
pub(crate) struct Stages {
    done: Vec<CustomStage>,
    /// Shadow rules that wait for their `ext_authz`.
    waiting: Option<Vec<Rule>>,
}

impl Stages {
    /// Whether no shadow rules wait for their `ext_authz`.
    pub(crate) fn complete(&self) -> bool {
        self.waiting.is_none()
    }

    /// Whether there was nothing of CUSTOM policies.
    pub(crate) fn is_empty(&self) -> bool {
        self.done.is_empty() && self.waiting.is_none()
    }

    /// The stages.
    pub(crate) fn finish(self) -> Vec<CustomStage> {
        self.done
    }

    /// Looks at an RBAC filter; gives it back when it is none of CUSTOM policies. `first` says that only filters of
    /// CUSTOM policies came before.
    pub(crate) fn take_http_rules(&mut self, mut proto: HttpRbac, first: bool) -> Result<Option<HttpRbac>> {
        if proto.shadow_rules_stat_prefix == SHADOW_PREFIX {
            let shadow = require(&mut proto.shadow_rules, "shadow_rules")?;
            proto.shadow_rules_stat_prefix.clear();
            let enforced = proto.rules.take();
            done(proto)?;
            self.shadow(shadow, enforced, first)?;
            return Ok(None);
        }
        if first && proto.shadow_rules.is_none() && proto.rules.as_ref().is_some_and(denies_custom) {
            let filter = authz::decode_http(proto)?;
            self.deny(filter.rules)?;
            return Ok(None);
        }
        Ok(Some(proto))
    }

    /// As [`Stages::take_http_rules`], for TCP.
    pub(crate) fn take_network_rules(&mut self, mut proto: NetworkRbac, first: bool) -> Result<Option<NetworkRbac>> {
        if proto.shadow_rules_stat_prefix == SHADOW_PREFIX {
            let shadow = require(&mut proto.shadow_rules, "shadow_rules")?;
            proto.shadow_rules_stat_prefix.clear();
            proto.stat_prefix.clear();
            let enforced = proto.rules.take();
            done(proto)?;
            self.shadow(shadow, enforced, first)?;
            return Ok(None);
        }
        if first && proto.shadow_rules.is_none() && proto.rules.as_ref().is_some_and(denies_custom) {
            let filter = authz::decode_network(proto)?;
            self.deny(filter.rules)?;
            return Ok(None);
        }
        Ok(Some(proto))
    }

    fn shadow(&mut self, shadow: Rbac, enforced: Option<Rbac>, first: bool) -> Result<()> {
        expect(first, "shadow_rules", "out of order: CUSTOM rules come first")?;
        // Trial runs of CUSTOM policies stand here; their matches are denied (S2.136).
        if let Some(enforced) = enforced {
            let (action, rules) = authz::decode_rules(enforced).at("rules")?;
            expect(action == Action::Deny, "rules.action", "must be DENY")?;
            if !rules.is_empty() {
                self.deny(rules)?;
            }
        }
        let (action, rules) = authz::decode_rules(shadow).at("shadow_rules")?;
        expect(action == Action::Deny, "shadow_rules.action", "must be DENY")?;
        expect(
            self.waiting.replace(rules).is_none(),
            "shadow_rules",
            "without an ext_authz filter behind them",
        )
    }

    fn deny(&mut self, rules: Vec<Rule>) -> Result<()> {
        expect(
            self.complete(),
            "rules",
            "between shadow rules and their ext_authz filter",
        )?;
        self.done.push(CustomStage {
            rules,
            then: Then::Deny,
        });
        Ok(())
    }

    fn ask(&mut self, provider: ExtAuthz) -> Result<()> {
        let Some(rules) = self.waiting.take() else {
            return fault("filter_enabled_metadata", "no shadow rules before it");
        };
        let prefix = id_prefix(&provider.provider);
        for rule in &rules {
            expect(
                rule.id.starts_with(&prefix),
                "filter_enabled_metadata",
                "does not cover all shadow rules before it",
            )?;
        }
        self.done.push(CustomStage {
            rules,
            then: Then::Ask(Box::new(provider)),
        });
        Ok(())
    }

    /// Reads the `ext_authz` filter of an HTTP chain.
    pub(crate) fn take_http(&mut self, mut proto: HttpProto) -> Result<()> {
        let provider = take_enabled(&mut proto.filter_enabled_metadata, HTTP_RBAC)?;
        take_version(&mut proto.transport_api_version)?;
        let fail_open = std::mem::take(&mut proto.failure_mode_allow);
        let status_on_error = take_status(&mut proto.status_on_error)?;
        let body = match proto.with_request_body.take() {
            None => None,
            Some(body) => {
                expect(
                    body.max_request_bytes > 0,
                    "with_request_body.max_request_bytes",
                    "missing",
                )?;
                Some(BodyInCheck {
                    max_bytes: body.max_request_bytes,
                    allow_partial: body.allow_partial_message,
                    as_bytes: body.pack_as_bytes,
                })
            }
        };
        let (cluster, protocol, timeout_ms) = match require(&mut proto.services, "services")? {
            Services::GrpcService(service) => {
                let (cluster, authority, timeout) = take_grpc(service).at("grpc_service")?;
                (cluster, CheckProtocol::Grpc { authority }, timeout)
            }
            Services::HttpService(service) => take_http_service(service).at("http_service")?,
        };
        done(proto)?;
        self.ask(ExtAuthz {
            provider,
            cluster,
            protocol,
            timeout_ms,
            fail_open,
            status_on_error,
            body,
        })
    }

    /// Reads the `ext_authz` filter of a TCP chain.
    pub(crate) fn take_network(&mut self, mut proto: NetworkProto) -> Result<()> {
        let provider = take_enabled(&mut proto.filter_enabled_metadata, NETWORK_RBAC)?;
        take_version(&mut proto.transport_api_version)?;
        proto.stat_prefix.clear();
        let service = require(&mut proto.grpc_service, "grpc_service")?;
        let (cluster, authority, timeout_ms) = take_grpc(service).at("grpc_service")?;
        let fail_open = std::mem::take(&mut proto.failure_mode_allow);
        done(proto)?;
        self.ask(ExtAuthz {
            provider,
            cluster,
            protocol: CheckProtocol::Grpc { authority },
            timeout_ms,
            fail_open,
            status_on_error: None,
            body: None,
        })
    }
}

fn take_version(field: &mut i32) -> Result<()> {
    let version = std::mem::take(field);
    expect(
        version == i32::from(ApiVersion::V3) || version == i32::from(ApiVersion::Auto),
        "transport_api_version",
        "only V3 is supported",
    )
}

fn take_http_service(mut service: HttpService) -> Result<(String, CheckProtocol, u64)> {
    let mut uri = require(&mut service.server_uri, "server_uri")?;
    let timeout = take_ms(&mut uri.timeout, "server_uri.timeout")?.unwrap_or(200);
    let cluster = match uri.http_upstream_type.take() {
        Some(HttpUpstreamType::Cluster(cluster)) => cluster,
        None => return fault("server_uri.cluster", "missing"),
    };
    let text = std::mem::take(&mut uri.uri);
    let host = text.strip_prefix("http://").unwrap_or(&text).to_string();
    done(uri).at("server_uri")?;
    let mut check = HttpCheck {
        host,
        path_prefix: std::mem::take(&mut service.path_prefix),
        ..HttpCheck::default()
    };
    if let Some(mut request) = service.authorization_request.take() {
        check.request_headers = take_patterns(request.allowed_headers.take(), "allowed_headers")?;
        for mut header in std::mem::take(&mut request.headers_to_add) {
            let pair = (std::mem::take(&mut header.key), std::mem::take(&mut header.value));
            done(header).at("headers_to_add")?;
            check.add_headers.push(pair);
        }
        done(request).at("authorization_request")?;
    }
    if let Some(mut response) = service.authorization_response.take() {
        check.upstream_headers = take_patterns(response.allowed_upstream_headers.take(), "allowed_upstream_headers")?;
        check.deny_headers = take_patterns(response.allowed_client_headers.take(), "allowed_client_headers")?;
        check.allow_headers = take_patterns(
            response.allowed_client_headers_on_success.take(),
            "allowed_client_headers_on_success",
        )?;
        done(response).at("authorization_response")?;
    }
    done(service)?;
    Ok((cluster, CheckProtocol::Http(check), timeout))
}

/// Whether these are the enforced rules of CUSTOM policies whose provider cannot be asked, or of their trial runs.
fn denies_custom(rbac: &Rbac) -> bool {
    rbac.action == i32::from(rbac::Action::Deny)
        && !rbac.policies.is_empty()
        && rbac.policies.keys().all(|id| id.starts_with(ID_PREFIX))
}
