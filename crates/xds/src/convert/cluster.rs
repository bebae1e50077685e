//! Clusters (SEMANTICS 1d, 6b, 6c).

use std::collections::HashMap;

use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbConfig, LbPolicy, OriginalDstLbConfig,
    TransportSocketMatch,
};
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster as Proto, OutlierDetection};
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    BindConfig, Http1ProtocolOptions, Http2ProtocolOptions, Metadata, SocketAddress,
};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::{
    ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use mantlet_model::Cluster;
use mantlet_model::cluster::{Balancer, ClusterTls, Discovery, Limits, Outlier, ServiceRef, UpstreamProtocol};
use mantlet_model::endpoint::Endpoint;

use super::endpoint::{self, ISTIO};
use super::tls;
use crate::Any;
use crate::encode::Dialect;
use crate::wire::{
    At, Result, ads, done, duration, expect, fault, ip, pack, plain_address, port, require, structure, take_ads,
    take_ms, take_text, take_uint, text, uint, unpack,
};

/// Key of the HTTP options of a cluster.
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

pub(crate) fn encode(model: &Cluster, dialect: Dialect) -> Proto {
    let mut proto = Proto {
        name: model.name.clone(),
        connect_timeout: duration(model.connect_timeout_ms),
        lb_policy: match model.balancer {
            Balancer::LeastRequest => LbPolicy::LeastRequest,
            Balancer::RoundRobin => LbPolicy::RoundRobin,
            Balancer::Random => LbPolicy::Random,
            Balancer::Provided => LbPolicy::ClusterProvided,
        }
        .into(),
        circuit_breakers: Some(CircuitBreakers {
            thresholds: vec![Thresholds {
                max_connections: uint(model.limits.connections),
                max_pending_requests: uint(model.limits.pending),
                max_requests: uint(model.limits.requests),
                max_retries: uint(model.limits.retries),
                track_remaining: true,
                ..Thresholds::default()
            }],
            ..CircuitBreakers::default()
        }),
        outlier_detection: model.outlier.as_ref().map(outlier),
        upstream_bind_config: model.bind_source.map(|source| BindConfig {
            source_address: Some(SocketAddress {
                address: source.to_string(),
                port_specifier: Some(PortSpecifier::PortValue(0)),
                ..SocketAddress::default()
            }),
            ..BindConfig::default()
        }),
        typed_extension_protocol_options: protocol(model.protocol),
        metadata: metadata(model),
        ..Proto::default()
    };
    let kind = match &model.discovery {
        Discovery::Eds { service } => {
            proto.eds_cluster_config = Some(EdsClusterConfig {
                eds_config: ads(),
                service_name: service.clone(),
            });
            DiscoveryType::Eds
        }
        Discovery::Static(list) => {
            proto.load_assignment = Some(endpoint::encode_list(&model.name, list));
            DiscoveryType::Static
        }
        Discovery::Dns(list) => {
            proto.load_assignment = Some(endpoint::encode_list(&model.name, list));
            DiscoveryType::StrictDns
        }
        Discovery::OriginalDestination { port } => {
            proto.lb_config = port.map(|port| {
                LbConfig::OriginalDstLbConfig(OriginalDstLbConfig {
                    upstream_port_override: uint(port.into()),
                    ..OriginalDstLbConfig::default()
                })
            });
            DiscoveryType::OriginalDst
        }
    };
    proto.cluster_discovery_type = Some(ClusterDiscoveryType::Type(kind.into()));
    match &model.tls {
        ClusterTls::Plain => {}
        ClusterTls::Always(context) => proto.transport_socket = Some(tls::encode_client(context, dialect)),
        ClusterTls::Auto(context) => {
            proto.transport_socket_matches = vec![
                TransportSocketMatch {
                    name: "tlsMode-istio".into(),
                    r#match: Some(structure([("tlsMode", text("istio"))])),
                    transport_socket: Some(tls::encode_client(context, dialect)),
                },
                TransportSocketMatch {
                    name: "tlsMode-disabled".into(),
                    r#match: Some(Struct::default()),
                    transport_socket: Some(tls::raw_socket()),
                },
            ];
        }
    }
    proto
}

fn outlier(model: &Outlier) -> OutlierDetection {
    let on = |n: u32| uint(if n > 0 { 100 } else { 0 });
    OutlierDetection {
        consecutive_5xx: uint(model.consecutive_5xx),
        enforcing_consecutive_5xx: on(model.consecutive_5xx),
        consecutive_gateway_failure: uint(model.consecutive_gateway_errors),
        enforcing_consecutive_gateway_failure: on(model.consecutive_gateway_errors),
        enforcing_success_rate: uint(0),
        interval: duration(model.interval_ms),
        base_ejection_time: duration(model.base_ejection_ms),
        max_ejection_percent: uint(model.max_ejection_percent),
        ..OutlierDetection::default()
    }
}

fn take_outlier(mut proto: OutlierDetection) -> Result<Outlier> {
    // An absent value is Envoy's default; "enforcing" below 100 percent has no place in the model.
    let count = |count: &mut Option<_>, enforcing: &mut Option<_>, default: (u32, u32)| {
        let n = take_uint(count).unwrap_or(default.0);
        match take_uint(enforcing).unwrap_or(default.1) {
            0 => Ok(0),
            100 => Ok(n),
            _ => fault("enforcing", "only 0 and 100 are supported"),
        }
    };
    let consecutive_5xx = count(
        &mut proto.consecutive_5xx,
        &mut proto.enforcing_consecutive_5xx,
        (5, 100),
    )?;
    let consecutive_gateway_errors = count(
        &mut proto.consecutive_gateway_failure,
        &mut proto.enforcing_consecutive_gateway_failure,
        (5, 0),
    )?;
    let rate = take_uint(&mut proto.enforcing_success_rate);
    expect(rate == Some(0), "enforcing_success_rate", "only 0 is supported")?;
    let out = Outlier {
        consecutive_5xx,
        consecutive_gateway_errors,
        interval_ms: take_ms(&mut proto.interval, "interval")?.unwrap_or(10_000),
        base_ejection_ms: take_ms(&mut proto.base_ejection_time, "base_ejection_time")?.unwrap_or(30_000),
        max_ejection_percent: take_uint(&mut proto.max_ejection_percent).unwrap_or(10),
    };
    done(proto)?;
    Ok(out)
}

fn protocol(protocol: UpstreamProtocol) -> HashMap<String, Any> {
    let options = match protocol {
        UpstreamProtocol::Http1 => return HashMap::new(),
        UpstreamProtocol::Http2 => UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default())),
        }),
        UpstreamProtocol::Downstream => UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
            http_protocol_options: Some(Http1ProtocolOptions::default()),
            http2_protocol_options: Some(Http2ProtocolOptions::default()),
            ..UseDownstreamHttpConfig::default()
        }),
    };
    let options = HttpProtocolOptions {
        upstream_protocol_options: Some(options),
        ..HttpProtocolOptions::default()
    };
    HashMap::from([(HTTP_OPTIONS.into(), pack(&options))])
}

fn take_protocol(options: &mut HashMap<String, Any>) -> Result<UpstreamProtocol> {
    let Some(any) = options.remove(HTTP_OPTIONS) else {
        return Ok(UpstreamProtocol::Http1);
    };
    let mut options: HttpProtocolOptions = unpack(&any)?;
    let protocol = match options.upstream_protocol_options.take() {
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(config)) => match config.protocol_config {
            Some(ProtocolConfig::HttpProtocolOptions(h1)) => {
                done(h1).at("http_protocol_options")?;
                UpstreamProtocol::Http1
            }
            Some(ProtocolConfig::Http2ProtocolOptions(h2)) => {
                done(h2).at("http2_protocol_options")?;
                UpstreamProtocol::Http2
            }
            Some(ProtocolConfig::Http3ProtocolOptions(_)) => return fault("http3_protocol_options", "not supported"),
            None => return fault("explicit_http_config", "empty"),
        },
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(mut config)) => {
            done(config.http_protocol_options.take().unwrap_or_default()).at("http_protocol_options")?;
            done(config.http2_protocol_options.take().unwrap_or_default()).at("http2_protocol_options")?;
            done(config).at("use_downstream_protocol_config")?;
            UpstreamProtocol::Downstream
        }
        Some(UpstreamProtocolOptions::AutoConfig(_)) => return fault("auto_config", "not supported"),
        None => return fault("upstream_protocol_options", "missing"),
    };
    done(options)?;
    Ok(protocol)
}

fn metadata(model: &Cluster) -> Option<Metadata> {
    let mut fields = HashMap::new();
    if !model.services.is_empty() {
        let services = model.services.iter().map(|service| Value {
            kind: Some(Kind::StructValue(structure([
                ("host", text(service.host.clone())),
                ("name", text(service.name.clone())),
                ("namespace", text(service.namespace.clone())),
            ]))),
        });
        let list = ListValue {
            values: services.collect(),
        };
        let list = Value {
            kind: Some(Kind::ListValue(list)),
        };
        fields.insert("services".to_string(), list);
    }
    if !model.alpn_override {
        fields.insert("alpn_override".into(), text("false"));
    }
    (!fields.is_empty()).then(|| Metadata {
        filter_metadata: HashMap::from([(ISTIO.into(), Struct { fields })]),
        ..Metadata::default()
    })
}

/// Services, and whether the ALPN may be overridden. Other metadata is open by design and carries no behaviour.
fn take_metadata(field: &mut Option<Metadata>) -> Result<(Vec<ServiceRef>, bool)> {
    let mut services = Vec::new();
    let mut alpn_override = true;
    if let Some(mut metadata) = field.take() {
        if let Some(mut istio) = std::mem::take(&mut metadata.filter_metadata).remove(ISTIO) {
            alpn_override = take_text(&mut istio.fields, "alpn_override")?.as_deref() != Some("false");
            if let Some(Value {
                kind: Some(Kind::ListValue(list)),
            }) = istio.fields.remove("services")
            {
                for value in list.values {
                    let Some(Kind::StructValue(mut service)) = value.kind else {
                        return fault("services", "not a list of objects");
                    };
                    let mut part = |key| take_text(&mut service.fields, key).map(Option::unwrap_or_default);
                    services.push(ServiceRef {
                        host: part("host")?,
                        name: part("name")?,
                        namespace: part("namespace")?,
                    });
                }
            }
        }
        done(metadata)?;
    }
    Ok((services, alpn_override))
}

fn take_endpoints(proto: &mut Proto) -> Result<Vec<Endpoint>> {
    let assignment: ClusterLoadAssignment = require(&mut proto.load_assignment, "load_assignment")?;
    Ok(endpoint::decode(assignment).at("load_assignment")?.endpoints)
}

fn take_discovery(proto: &mut Proto) -> Result<Discovery> {
    let kind = match proto.cluster_discovery_type.take() {
        Some(ClusterDiscoveryType::Type(kind)) => kind,
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            return fault("cluster_type", format!("{} not supported", custom.name));
        }
        None => DiscoveryType::Static.into(),
    };
    Ok(match DiscoveryType::try_from(kind) {
        Ok(DiscoveryType::Eds) => {
            let mut config = require(&mut proto.eds_cluster_config, "eds_cluster_config")?;
            take_ads(&mut config.eds_config, "eds_config").at("eds_cluster_config")?;
            let service = std::mem::take(&mut config.service_name);
            done(config).at("eds_cluster_config")?;
            Discovery::Eds {
                service: if service.is_empty() {
                    proto.name.clone()
                } else {
                    service
                },
            }
        }
        Ok(DiscoveryType::Static) => Discovery::Static(take_endpoints(proto)?),
        Ok(DiscoveryType::StrictDns) => Discovery::Dns(take_endpoints(proto)?),
        Ok(DiscoveryType::OriginalDst) => {
            let mut chosen = None;
            if let Some(LbConfig::OriginalDstLbConfig(mut config)) = proto.lb_config.take() {
                let number = take_uint(&mut config.upstream_port_override);
                chosen = number.map(|n| port(n, "upstream_port_override")).transpose()?;
                done(config).at("original_dst_lb_config")?;
            }
            Discovery::OriginalDestination { port: chosen }
        }
        Ok(DiscoveryType::LogicalDns) => return fault("type", "LOGICAL_DNS not supported"),
        Err(_) => return fault("type", format!("unknown value {kind}")),
    })
}

fn take_limits(field: &mut Option<CircuitBreakers>) -> Result<Limits> {
    let Some(mut breakers) = field.take() else {
        return Ok(Limits::default());
    };
    let mut thresholds = std::mem::take(&mut breakers.thresholds);
    done(breakers)?;
    expect(thresholds.len() == 1, "thresholds", "exactly one is supported")?;
    let mut proto = thresholds.remove(0);
    proto.track_remaining = false;
    // Absent values are Envoy's defaults.
    let limits = Limits {
        connections: take_uint(&mut proto.max_connections).unwrap_or(1024),
        pending: take_uint(&mut proto.max_pending_requests).unwrap_or(1024),
        requests: take_uint(&mut proto.max_requests).unwrap_or(1024),
        retries: take_uint(&mut proto.max_retries).unwrap_or(3),
    };
    done(proto).at("thresholds")?;
    Ok(limits)
}

fn take_tls(proto: &mut Proto) -> Result<ClusterTls> {
    let matches = std::mem::take(&mut proto.transport_socket_matches);
    if matches.is_empty() {
        return match proto.transport_socket.take() {
            None => Ok(ClusterTls::Plain),
            Some(socket) => Ok(ClusterTls::Always(Box::new(tls::decode_client(socket)?))),
        };
    }
    let Ok([mtls, plain]) = <[TransportSocketMatch; 2]>::try_from(matches) else {
        return fault(
            "transport_socket_matches",
            "only tlsMode istio and plaintext are supported",
        );
    };
    let istio = mtls.r#match == Some(structure([("tlsMode", text("istio"))]));
    let rest = plain.r#match.unwrap_or_default() == Struct::default();
    let shape = "only {tlsMode: istio} and then {} are supported";
    expect(istio && rest, "transport_socket_matches", shape)?;
    let (Some(mtls), Some(plain)) = (mtls.transport_socket, plain.transport_socket) else {
        return fault("transport_socket_matches", "without transport_socket");
    };
    tls::decode_raw(plain).at("transport_socket_matches")?;
    Ok(ClusterTls::Auto(Box::new(
        tls::decode_client(mtls).at("transport_socket_matches")?,
    )))
}

pub(crate) fn decode(mut proto: Proto) -> Result<Cluster> {
    let discovery = take_discovery(&mut proto)?;
    let name = std::mem::take(&mut proto.name);
    let balancer = match LbPolicy::try_from(std::mem::take(&mut proto.lb_policy)) {
        Ok(LbPolicy::LeastRequest) => Balancer::LeastRequest,
        Ok(LbPolicy::RoundRobin) => Balancer::RoundRobin,
        Ok(LbPolicy::Random) => Balancer::Random,
        Ok(LbPolicy::ClusterProvided) => Balancer::Provided,
        Ok(other) => return fault("lb_policy", format!("{} not supported", other.as_str_name())),
        Err(_) => return fault("lb_policy", "unknown value"),
    };
    let mut bind_source = None;
    if let Some(mut bind) = proto.upstream_bind_config.take() {
        let source = require(&mut bind.source_address, "source_address").at("upstream_bind_config")?;
        let (host, port) = plain_address(source).at("upstream_bind_config")?;
        expect(port == 0, "upstream_bind_config.port_value", "only 0 is supported")?;
        bind_source = Some(ip(&host, "upstream_bind_config.address")?);
        done(bind).at("upstream_bind_config")?;
    }
    let (services, alpn_override) = take_metadata(&mut proto.metadata).at("metadata")?;
    let model = Cluster {
        name,
        discovery,
        connect_timeout_ms: take_ms(&mut proto.connect_timeout, "connect_timeout")?.unwrap_or(5_000),
        balancer,
        tls: take_tls(&mut proto)?,
        protocol: take_protocol(&mut proto.typed_extension_protocol_options).at("typed_extension_protocol_options")?,
        bind_source,
        limits: take_limits(&mut proto.circuit_breakers).at("circuit_breakers")?,
        outlier: proto
            .outlier_detection
            .take()
            .map(take_outlier)
            .transpose()
            .at("outlier_detection")?,
        services,
        alpn_override,
    };
    done(proto)?;
    Ok(model)
}
