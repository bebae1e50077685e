//! The HTTP connection manager and its filters, in the fixed order of S2.21.

use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    CodecType, ForwardClientCertDetails, PathWithEscapedSlashesAction, RouteSpecifier, ServerHeaderTransformation,
    SetCurrentClientCertDetails, UpgradeConfig,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, Rds, http_filter,
};
use mantlet_model::http::{Codec, ForwardedClientCert, HttpManager, PathNormalization, Reporter, RouteSource};
use mantlet_model::names::Direction;

use super::{access_log, authz, ext_authz, jwt, route};
use crate::Any;
use crate::encode::{Dialect, Options};
use crate::istio_proto::{alpn, stats};
use crate::wire::{
    At, Result, ads, boolean, done, duration, expect, fault, pack, require, take_ads, take_bool, take_ms, unpack,
};

const JWT: &str = "envoy.filters.http.jwt_authn";
const RBAC: &str = "envoy.filters.http.rbac";
const ALPN: &str = "istio.alpn";
pub(crate) const STATS: &str = "istio.stats";
const ROUTER: &str = "envoy.filters.http.router";
const WEBSOCKET: &str = "websocket";

fn filter(name: &str, config: Any) -> HttpFilter {
    HttpFilter {
        name: name.into(),
        config_type: Some(http_filter::ConfigType::TypedConfig(config)),
        ..HttpFilter::default()
    }
}

/// ALPN values by upstream protocol (S1.82).
fn alpn_overrides() -> alpn::FilterConfig {
    use alpn::filter_config::{AlpnOverride, Protocol};
    let entry = |protocol: Protocol, values: [&str; 3]| AlpnOverride {
        upstream_protocol: protocol.into(),
        alpn_override: values.map(String::from).into(),
    };
    alpn::FilterConfig {
        alpn_override: vec![
            entry(Protocol::Http10, ["istio-http/1.0", "istio", "http/1.0"]),
            entry(Protocol::Http11, ["istio-http/1.1", "istio", "http/1.1"]),
            entry(Protocol::Http2, ["istio-h2", "istio", "h2"]),
        ],
    }
}

/// The side that `istio.stats` reports for by itself.
fn natural(direction: Direction) -> Reporter {
    match direction {
        Direction::Inbound => Reporter::Destination,
        Direction::Outbound => Reporter::Source,
    }
}

fn stats_config(reporter: Reporter, direction: Direction) -> stats::PluginConfig {
    let value = match reporter {
        reporter if reporter == natural(direction) => stats::Reporter::Unspecified,
        Reporter::Destination => stats::Reporter::ServerGateway,
        Reporter::Source => stats::Reporter::ClientGateway,
    };
    stats::PluginConfig {
        reporter: value.into(),
        ..stats::PluginConfig::default()
    }
}

fn take_reporter(any: &Any, direction: Direction) -> Result<Reporter> {
    let mut config: stats::PluginConfig = unpack(any)?;
    let reporter = match stats::Reporter::try_from(std::mem::take(&mut config.reporter)) {
        Ok(stats::Reporter::Unspecified) => natural(direction),
        Ok(stats::Reporter::ServerGateway) => Reporter::Destination,
        Ok(stats::Reporter::ClientGateway) => Reporter::Source,
        Err(_) => return fault("reporter", "unknown value"),
    };
    done(config)?;
    Ok(reporter)
}

/// Fields of the peer's certificate that go into `x-forwarded-client-cert` (S6.60, S6.63).
fn client_cert(mode: ForwardedClientCert) -> (ForwardClientCertDetails, Option<SetCurrentClientCertDetails>) {
    let details = |cert| {
        Some(SetCurrentClientCertDetails {
            subject: boolean(true),
            cert,
            dns: true,
            uri: true,
            ..SetCurrentClientCertDetails::default()
        })
    };
    match mode {
        ForwardedClientCert::Sanitize => (ForwardClientCertDetails::Sanitize, None),
        ForwardedClientCert::AppendForward => (ForwardClientCertDetails::AppendForward, details(false)),
        ForwardedClientCert::SanitizeSet => (ForwardClientCertDetails::SanitizeSet, details(true)),
        ForwardedClientCert::ForwardOnly => (ForwardClientCertDetails::ForwardOnly, None),
        ForwardedClientCert::AlwaysForwardOnly => (ForwardClientCertDetails::AlwaysForwardOnly, None),
    }
}

const CERT_MODES: [ForwardedClientCert; 5] = [
    ForwardedClientCert::Sanitize,
    ForwardedClientCert::AppendForward,
    ForwardedClientCert::SanitizeSet,
    ForwardedClientCert::ForwardOnly,
    ForwardedClientCert::AlwaysForwardOnly,
];

/// `normalize_path`, `merge_slashes`, escaped slashes (S2.111, S2.115).
fn normalization(mode: PathNormalization) -> (bool, bool, PathWithEscapedSlashesAction) {
    match mode {
        PathNormalization::None => (false, false, PathWithEscapedSlashesAction::KeepUnchanged),
        PathNormalization::Base => (true, false, PathWithEscapedSlashesAction::KeepUnchanged),
        PathNormalization::MergeSlashes => (true, true, PathWithEscapedSlashesAction::KeepUnchanged),
        PathNormalization::DecodeAndMergeSlashes => (true, true, PathWithEscapedSlashesAction::UnescapeAndForward),
    }
}

const NORMALIZATIONS: [PathNormalization; 4] = [
    PathNormalization::None,
    PathNormalization::Base,
    PathNormalization::MergeSlashes,
    PathNormalization::DecodeAndMergeSlashes,
];

pub(crate) fn encode(model: &HttpManager, direction: Direction, options: &Options) -> HttpConnectionManager {
    let istio = options.dialect == Dialect::Istio;
    let mut filters = Vec::new();
    for stage in &model.custom {
        filters.extend(ext_authz::encode_http(stage).into_iter().map(|(n, any)| filter(n, any)));
    }
    if let Some(jwt) = &model.jwt {
        filters.push(filter(JWT, pack(&jwt::encode(jwt))));
    }
    for authz in &model.authz {
        filters.push(filter(RBAC, pack(&authz::encode_http(authz))));
    }
    if model.istio_alpn && istio {
        filters.push(filter(ALPN, pack(&alpn_overrides())));
    }
    if let Some(reporter) = model.telemetry
        && istio
    {
        filters.push(filter(STATS, pack(&stats_config(reporter, direction))));
    }
    filters.push(filter(ROUTER, pack(&Router::default())));

    let (normalize, merge, slashes) = normalization(model.normalization);
    let (forward, details) = client_cert(model.forwarded_client_cert);
    HttpConnectionManager {
        codec_type: match model.codec {
            Codec::Auto => CodecType::Auto,
            Codec::Http1 => CodecType::Http1,
            Codec::Http2 => CodecType::Http2,
        }
        .into(),
        stat_prefix: model.stat_prefix.clone(),
        http_filters: filters,
        route_specifier: Some(match &model.routes {
            RouteSource::Named(name) => RouteSpecifier::Rds(Rds {
                config_source: ads(),
                route_config_name: name.clone(),
            }),
            RouteSource::Inline(table) => RouteSpecifier::RouteConfig(route::encode(table)),
        }),
        normalize_path: boolean(normalize),
        merge_slashes: merge,
        path_with_escaped_slashes_action: slashes.into(),
        forward_client_cert_details: forward.into(),
        set_current_client_cert_details: details,
        use_remote_address: boolean(model.use_remote_address),
        xff_num_trusted_hops: model.trusted_hops,
        server_name: model.server_name.clone(),
        server_header_transformation: if model.server_name.is_empty() {
            ServerHeaderTransformation::PassThrough
        } else {
            ServerHeaderTransformation::Overwrite
        }
        .into(),
        generate_request_id: boolean(model.generate_request_id),
        upgrade_configs: if model.websocket {
            vec![UpgradeConfig {
                upgrade_type: WEBSOCKET.into(),
                ..UpgradeConfig::default()
            }]
        } else {
            Vec::new()
        },
        stream_idle_timeout: duration(model.stream_idle_timeout_ms),
        access_log: model.access_log.iter().map(access_log::encode).collect(),
        ..HttpConnectionManager::default()
    }
}

/// Filters found, each at most once and in the fixed order.
#[derive(Default)]
struct Found {
    custom: ext_authz::Stages,
    jwt: Option<mantlet_model::http::JwtAuthn>,
    authz: Vec<mantlet_model::authz::AuthzFilter>,
    alpn: bool,
    telemetry: Option<Reporter>,
    router: bool,
}

fn take_filters(filters: Vec<HttpFilter>, direction: Direction) -> Result<Found> {
    let mut found = Found::default();
    let mut last = 0;
    for mut proto in filters {
        let name = std::mem::take(&mut proto.name);
        let any = match proto.config_type.take() {
            Some(http_filter::ConfigType::TypedConfig(any)) => any,
            Some(http_filter::ConfigType::ConfigDiscovery(_)) => {
                return fault(name, "extension configuration by discovery is not supported");
            }
            None => return fault(name, "without configuration"),
        };
        done(proto).at(&name)?;
        // The type decides, not the name, which is free text in Envoy.
        let rank = if any.type_url.ends_with(".jwt_authn.v3.JwtAuthentication") {
            expect(found.jwt.is_none(), &name, "more than one")?;
            found.jwt = Some(unpack(&any).and_then(jwt::decode).at(&name)?);
            1
        } else if any.type_url.ends_with("envoy.extensions.filters.http.rbac.v3.RBAC") {
            let rbac = unpack(&any).at(&name)?;
            match found.custom.take_http_rules(rbac, last == 0).at(&name)? {
                None => 0,
                Some(rbac) => {
                    found.authz.push(authz::decode_http(rbac).at(&name)?);
                    2
                }
            }
        } else if any.type_url.ends_with(".filters.http.ext_authz.v3.ExtAuthz") {
            unpack(&any).and_then(|p| found.custom.take_http(p)).at(&name)?;
            0
        } else if any.type_url.ends_with(".alpn.v2alpha1.FilterConfig") {
            let config: alpn::FilterConfig = unpack(&any).at(&name)?;
            expect(
                config == alpn_overrides(),
                &name,
                "only Istio's default values are supported",
            )?;
            found.alpn = true;
            3
        } else if any.type_url.ends_with("/stats.PluginConfig") {
            expect(found.telemetry.is_none(), &name, "more than one")?;
            found.telemetry = Some(take_reporter(&any, direction).at(&name)?);
            4
        } else if any.type_url.ends_with(".router.v3.Router") {
            done(unpack::<Router>(&any).at(&name)?).at(&name)?;
            found.router = true;
            5
        } else {
            return fault(name, format!("filter of type {} not supported", any.type_url));
        };
        // Between the ALPN override and the metrics there is no order to keep.
        let in_order = rank >= last || (rank, last) == (3, 4);
        expect(
            in_order,
            &name,
            "out of order: ext_authz, jwt_authn, rbac, istio.alpn, istio.stats, router",
        )?;
        expect(
            rank == 0 || found.custom.complete(),
            &name,
            "shadow rules of ext_authz without an ext_authz filter behind them",
        )?;
        last = last.max(rank);
    }
    expect(found.router, "http_filters", "no router")?;
    Ok(found)
}

pub(crate) fn decode(mut proto: HttpConnectionManager, direction: Direction) -> Result<HttpManager> {
    let found = take_filters(std::mem::take(&mut proto.http_filters), direction).at("http_filters")?;
    let codec = match CodecType::try_from(std::mem::take(&mut proto.codec_type)) {
        Ok(CodecType::Auto) => Codec::Auto,
        Ok(CodecType::Http1) => Codec::Http1,
        Ok(CodecType::Http2) => Codec::Http2,
        _ => return fault("codec_type", "not supported"),
    };
    let routes = match require(&mut proto.route_specifier, "route_specifier")? {
        RouteSpecifier::Rds(mut rds) => {
            take_ads(&mut rds.config_source, "config_source").at("rds")?;
            let name = std::mem::take(&mut rds.route_config_name);
            done(rds).at("rds")?;
            RouteSource::Named(name)
        }
        RouteSpecifier::RouteConfig(config) => RouteSource::Inline(Box::new(route::decode(config).at("route_config")?)),
        RouteSpecifier::ScopedRoutes(_) => return fault("scoped_routes", "not supported"),
    };

    let normalize = take_bool(&mut proto.normalize_path, false);
    let merge = std::mem::take(&mut proto.merge_slashes);
    let slashes =
        match PathWithEscapedSlashesAction::try_from(std::mem::take(&mut proto.path_with_escaped_slashes_action)) {
            Ok(PathWithEscapedSlashesAction::ImplementationSpecificDefault) => {
                PathWithEscapedSlashesAction::KeepUnchanged
            }
            Ok(other) => other,
            Err(_) => return fault("path_with_escaped_slashes_action", "unknown value"),
        };
    let mode = NORMALIZATIONS
        .into_iter()
        .find(|m| normalization(*m) == (normalize, merge, slashes));
    let Some(normalization) = mode else {
        return fault(
            "normalize_path",
            "combination of path normalisation options not supported",
        );
    };

    let forward = std::mem::take(&mut proto.forward_client_cert_details);
    let details = proto.set_current_client_cert_details.take();
    let mode = CERT_MODES.into_iter().find(|m| {
        let (expected, fields) = client_cert(*m);
        i32::from(expected) == forward && (fields.is_none() || fields == details)
    });
    let Some(forwarded_client_cert) = mode else {
        return fault(
            "set_current_client_cert_details",
            "combination of certificate fields not supported",
        );
    };

    let server_name = std::mem::take(&mut proto.server_name);
    let server_name =
        match ServerHeaderTransformation::try_from(std::mem::take(&mut proto.server_header_transformation)) {
            Ok(ServerHeaderTransformation::Overwrite) if server_name.is_empty() => "envoy".into(),
            Ok(ServerHeaderTransformation::Overwrite) => server_name,
            Ok(ServerHeaderTransformation::PassThrough) => String::new(),
            _ => return fault("server_header_transformation", "not supported"),
        };

    let mut websocket = false;
    for mut upgrade in std::mem::take(&mut proto.upgrade_configs) {
        let kind = std::mem::take(&mut upgrade.upgrade_type);
        expect(
            kind.eq_ignore_ascii_case(WEBSOCKET),
            "upgrade_configs",
            "only websocket is supported",
        )?;
        websocket = take_bool(&mut upgrade.enabled, true);
        done(upgrade).at("upgrade_configs")?;
    }

    let model = HttpManager {
        stat_prefix: std::mem::take(&mut proto.stat_prefix),
        codec,
        routes,
        normalization,
        forwarded_client_cert,
        use_remote_address: take_bool(&mut proto.use_remote_address, false),
        trusted_hops: std::mem::take(&mut proto.xff_num_trusted_hops),
        server_name,
        generate_request_id: take_bool(&mut proto.generate_request_id, true),
        websocket,
        // Absent is Envoy's default of five minutes.
        stream_idle_timeout_ms: take_ms(&mut proto.stream_idle_timeout, "stream_idle_timeout")?.unwrap_or(300_000),
        custom: found.custom.finish(),
        jwt: found.jwt,
        authz: found.authz,
        istio_alpn: found.alpn,
        telemetry: found.telemetry,
        access_log: access_log::decode(std::mem::take(&mut proto.access_log))?,
    };
    done(proto)?;
    Ok(model)
}
