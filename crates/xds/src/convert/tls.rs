//! TLS contexts (SEMANTICS 1b, 1d, 1e).

use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::grpc_service::{EnvoyGrpc, TargetSpecifier};
use envoy_types::pb::envoy::config::core::v3::{
    ApiConfigSource, ApiVersion, ConfigSource, GrpcService, TransportSocket, api_config_source, transport_socket,
};
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::{
    CombinedCertificateValidationContext, ValidationContextType,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, SubjectAltNameMatcher,
    TlsParameters, UpstreamTlsContext,
};
use mantlet_model::names::{SECRET_DEFAULT, SECRET_ROOT};
use mantlet_model::tls::{ClientTls, SanMatch, ServerTls, TlsVersion};

use super::strings::{self, Pattern};
use crate::Any;
use crate::encode::Dialect;
use crate::wire::{At, Result, ads, boolean, done, expect, fault, pack, require, take_ads, take_bool, unpack};

/// Name of the TLS transport socket.
const TLS: &str = "envoy.transport_sockets.tls";
/// Name of the plaintext transport socket.
const RAW: &str = "envoy.transport_sockets.raw_buffer";
/// Cluster by which Istio's agent serves the workload's own secrets (S4.110).
const SDS_CLUSTER: &str = "sds-grpc";

fn socket(name: &str, config: Any) -> TransportSocket {
    TransportSocket {
        name: name.into(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(config)),
    }
}

pub(crate) fn raw_socket() -> TransportSocket {
    socket(RAW, pack(&RawBuffer {}))
}

fn take_config(mut proto: TransportSocket) -> Result<Any> {
    proto.name.clear();
    match proto.config_type.take() {
        Some(transport_socket::ConfigType::TypedConfig(any)) => Ok(any),
        None => fault("transport_socket", "without configuration"),
    }
}

/// Accepts plaintext.
pub(crate) fn decode_raw(proto: TransportSocket) -> Result<()> {
    let raw: RawBuffer = unpack(&take_config(proto)?).at("transport_socket")?;
    done(raw)
}

/// The workload's own secrets come from the local agent, all others by the aggregated stream; so the name alone
/// decides the source, and the model needs no field for it.
pub(crate) fn is_local(name: &str) -> bool {
    name == SECRET_DEFAULT || name == SECRET_ROOT || name.starts_with("file-cert:") || name.starts_with("file-root:")
}

fn secret(name: &str, dialect: Dialect) -> SdsSecretConfig {
    let source = if is_local(name) && dialect == Dialect::Istio {
        Some(ConfigSource {
            resource_api_version: ApiVersion::V3.into(),
            config_source_specifier: Some(ConfigSourceSpecifier::ApiConfigSource(ApiConfigSource {
                api_type: api_config_source::ApiType::Grpc.into(),
                transport_api_version: ApiVersion::V3.into(),
                set_node_on_first_message_only: true,
                grpc_services: vec![GrpcService {
                    target_specifier: Some(TargetSpecifier::EnvoyGrpc(EnvoyGrpc {
                        cluster_name: SDS_CLUSTER.into(),
                        ..EnvoyGrpc::default()
                    })),
                    ..GrpcService::default()
                }],
                ..ApiConfigSource::default()
            })),
            ..ConfigSource::default()
        })
    } else {
        ads()
    };
    SdsSecretConfig {
        name: name.into(),
        sds_config: source,
    }
}

fn take_secret(mut proto: SdsSecretConfig) -> Result<String> {
    let name = std::mem::take(&mut proto.name);
    let from_agent = match &proto.sds_config {
        Some(source) => match &source.config_source_specifier {
            Some(ConfigSourceSpecifier::ApiConfigSource(api)) => api.grpc_services.iter().all(
                |s| matches!(&s.target_specifier, Some(TargetSpecifier::EnvoyGrpc(g)) if g.cluster_name == SDS_CLUSTER),
            ),
            _ => false,
        },
        None => false,
    };
    if from_agent && is_local(&name) {
        proto.sds_config = None;
    } else {
        take_ads(&mut proto.sds_config, "sds_config").at(&name)?;
    }
    done(proto).at(&name)?;
    Ok(name)
}

fn params(min: TlsVersion, ciphers: &[String]) -> TlsParameters {
    TlsParameters {
        tls_minimum_protocol_version: match min {
            TlsVersion::V1_2 => TlsProtocol::TlSv12,
            TlsVersion::V1_3 => TlsProtocol::TlSv13,
        }
        .into(),
        tls_maximum_protocol_version: TlsProtocol::TlSv13.into(),
        cipher_suites: ciphers.to_vec(),
        ..TlsParameters::default()
    }
}

fn take_params(field: &mut Option<TlsParameters>) -> Result<(TlsVersion, Vec<String>)> {
    let Some(mut params) = field.take() else {
        return Ok((TlsVersion::V1_2, Vec::new()));
    };
    let min = match TlsProtocol::try_from(std::mem::take(&mut params.tls_minimum_protocol_version)) {
        Ok(TlsProtocol::TlsAuto | TlsProtocol::TlSv12) => TlsVersion::V1_2,
        Ok(TlsProtocol::TlSv13) => TlsVersion::V1_3,
        _ => return fault("tls_params.tls_minimum_protocol_version", "older than TLS 1.2"),
    };
    let max = TlsProtocol::try_from(std::mem::take(&mut params.tls_maximum_protocol_version));
    let newest = matches!(max, Ok(TlsProtocol::TlsAuto | TlsProtocol::TlSv13));
    expect(
        newest,
        "tls_params.tls_maximum_protocol_version",
        "only TLSv1_3 is supported",
    )?;
    let ciphers = std::mem::take(&mut params.cipher_suites);
    done(params).at("tls_params")?;
    Ok((min, ciphers))
}

/// SANs are URIs in a mesh; DestinationRules may name DNS hosts.
fn san(matcher: &SanMatch) -> SubjectAltNameMatcher {
    let (text, pattern) = match matcher {
        SanMatch::Exact(s) => (s, Pattern::Exact(s.clone())),
        SanMatch::Prefix(s) => (s, Pattern::Prefix(s.clone())),
    };
    let kind = if text.contains("://") {
        SanType::Uri
    } else {
        SanType::Dns
    };
    SubjectAltNameMatcher {
        san_type: kind.into(),
        matcher: Some(strings::encode(&pattern, false)),
        ..SubjectAltNameMatcher::default()
    }
}

fn take_san(mut proto: SubjectAltNameMatcher) -> Result<SanMatch> {
    let kind = SanType::try_from(std::mem::take(&mut proto.san_type));
    expect(
        matches!(kind, Ok(SanType::Uri | SanType::Dns)),
        "san_type",
        "only URI and DNS are supported",
    )?;
    let pattern = strings::decode_exact_case(require(&mut proto.matcher, "matcher")?)?;
    done(proto)?;
    san_pattern(pattern)
}

fn san_pattern(pattern: Pattern) -> Result<SanMatch> {
    match pattern {
        Pattern::Exact(s) => Ok(SanMatch::Exact(s)),
        Pattern::Prefix(s) => Ok(SanMatch::Prefix(s)),
        Pattern::Suffix(_) | Pattern::Regex(_) => fault("matcher", "only exact and prefix are supported"),
    }
}

fn validation(bundle: Option<&String>, sans: &[SanMatch], dialect: Dialect) -> Option<ValidationContextType> {
    let context = CertificateValidationContext {
        match_typed_subject_alt_names: sans.iter().map(san).collect(),
        ..CertificateValidationContext::default()
    };
    match (bundle, sans.is_empty()) {
        (None, true) => None,
        (None, false) => Some(ValidationContextType::ValidationContext(context)),
        (Some(name), true) => Some(ValidationContextType::ValidationContextSdsSecretConfig(secret(
            name, dialect,
        ))),
        (Some(name), false) => Some(ValidationContextType::CombinedValidationContext(
            CombinedCertificateValidationContext {
                default_validation_context: Some(context),
                validation_context_sds_secret_config: Some(secret(name, dialect)),
                ..CombinedCertificateValidationContext::default()
            },
        )),
    }
}

fn take_sans(mut context: CertificateValidationContext) -> Result<Vec<SanMatch>> {
    let mut sans = Vec::new();
    for proto in std::mem::take(&mut context.match_typed_subject_alt_names) {
        sans.push(take_san(proto).at("match_typed_subject_alt_names")?);
    }
    // The older, untyped list, which Istio still uses for clusters.
    for proto in std::mem::take(&mut context.match_subject_alt_names) {
        let pattern = strings::decode_exact_case(proto).at("match_subject_alt_names")?;
        sans.push(san_pattern(pattern).at("match_subject_alt_names")?);
    }
    done(context).at("validation_context")?;
    Ok(sans)
}

fn take_validation(field: &mut Option<ValidationContextType>) -> Result<(Option<String>, Vec<SanMatch>)> {
    match field.take() {
        None => Ok((None, Vec::new())),
        Some(ValidationContextType::ValidationContext(context)) => Ok((None, take_sans(context)?)),
        Some(ValidationContextType::ValidationContextSdsSecretConfig(config)) => {
            Ok((Some(take_secret(config)?), Vec::new()))
        }
        Some(ValidationContextType::CombinedValidationContext(mut combined)) => {
            let bundle = combined
                .validation_context_sds_secret_config
                .take()
                .map(take_secret)
                .transpose()?;
            let sans = combined.default_validation_context.take().map(take_sans).transpose()?;
            done(combined).at("combined_validation_context")?;
            Ok((bundle, sans.unwrap_or_default()))
        }
        Some(_) => fault("validation_context_type", "certificate providers are not supported"),
    }
}

/// What both kinds of contexts share, read.
struct Common {
    certificate: Option<String>,
    trust_bundle: Option<String>,
    sans: Vec<SanMatch>,
    alpn: Vec<String>,
    min_version: TlsVersion,
    ciphers: Vec<String>,
}

fn take_common(field: &mut Option<CommonTlsContext>) -> Result<Common> {
    let mut common = require(field, "common_tls_context")?;
    let mut names = Vec::new();
    for config in std::mem::take(&mut common.tls_certificate_sds_secret_configs) {
        names.push(take_secret(config)?);
    }
    expect(
        names.len() <= 1,
        "tls_certificate_sds_secret_configs",
        "more than one is not supported",
    )?;
    let (trust_bundle, sans) = take_validation(&mut common.validation_context_type)?;
    let (min_version, ciphers) = take_params(&mut common.tls_params)?;
    let alpn = std::mem::take(&mut common.alpn_protocols);
    done(common).at("common_tls_context")?;
    Ok(Common {
        certificate: names.pop(),
        trust_bundle,
        sans,
        alpn,
        min_version,
        ciphers,
    })
}

pub(crate) fn encode_server(tls: &ServerTls, dialect: Dialect) -> TransportSocket {
    let context = DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            tls_params: Some(params(tls.min_version, &tls.ciphers)),
            tls_certificate_sds_secret_configs: vec![secret(&tls.certificate, dialect)],
            validation_context_type: validation(tls.trust_bundle.as_ref(), &tls.client_sans, dialect),
            alpn_protocols: tls.alpn.clone(),
            ..CommonTlsContext::default()
        }),
        require_client_certificate: boolean(tls.require_client_certificate),
        ..DownstreamTlsContext::default()
    };
    socket(TLS, pack(&context))
}

pub(crate) fn decode_server(proto: TransportSocket) -> Result<ServerTls> {
    let mut context: DownstreamTlsContext = unpack(&take_config(proto)?).at("transport_socket")?;
    let common = take_common(&mut context.common_tls_context)?;
    let require_client_certificate = take_bool(&mut context.require_client_certificate, false);
    done(context).at("transport_socket")?;
    let Some(certificate) = common.certificate else {
        return fault("tls_certificate_sds_secret_configs", "missing");
    };
    Ok(ServerTls {
        certificate,
        trust_bundle: common.trust_bundle,
        client_sans: common.sans,
        require_client_certificate,
        alpn: common.alpn,
        min_version: common.min_version,
        ciphers: common.ciphers,
    })
}

pub(crate) fn encode_client(tls: &ClientTls, dialect: Dialect) -> TransportSocket {
    let context = UpstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            tls_params: Some(params(tls.min_version, &[])),
            tls_certificate_sds_secret_configs: tls.certificate.iter().map(|n| secret(n, dialect)).collect(),
            validation_context_type: validation(tls.trust_bundle.as_ref(), &tls.server_sans, dialect),
            alpn_protocols: tls.alpn.clone(),
            ..CommonTlsContext::default()
        }),
        sni: tls.sni.clone(),
        ..UpstreamTlsContext::default()
    };
    socket(TLS, pack(&context))
}

pub(crate) fn decode_client(proto: TransportSocket) -> Result<ClientTls> {
    let mut context: UpstreamTlsContext = unpack(&take_config(proto)?).at("transport_socket")?;
    let common = take_common(&mut context.common_tls_context)?;
    expect(
        common.ciphers.is_empty(),
        "tls_params.cipher_suites",
        "not supported towards upstreams",
    )?;
    let sni = std::mem::take(&mut context.sni);
    done(context).at("transport_socket")?;
    Ok(ClientTls {
        certificate: common.certificate,
        trust_bundle: common.trust_bundle,
        server_sans: common.sans,
        sni,
        alpn: common.alpn,
        min_version: common.min_version,
    })
}
