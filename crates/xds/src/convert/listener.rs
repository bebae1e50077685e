//! Listeners, filter chains and TCP chains.

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::listener::v3::listener_filter_chain_match_predicate::{MatchSet, Rule};
use envoy_types::pb::envoy::config::listener::v3::{
    Filter, FilterChain as ProtoChain, FilterChainMatch, Listener as Proto, ListenerFilter,
    ListenerFilterChainMatchPredicate as Predicate, filter, listener_filter,
};
use envoy_types::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use envoy_types::pb::envoy::r#type::v3::Int32Range;
use mantlet_model::Listener;
use mantlet_model::listener::{ChainMatch, FilterChain, Filters, Inspector, TcpManager, Transport};
use mantlet_model::names::Direction;

use super::{access_log, authz, ext_authz, http, tls};
use crate::Any;
use crate::encode::{Dialect, Options};
use crate::istio_proto::stats;
use crate::wire::{
    At, Result, boolean, cidr, done, duration, expect, fault, ip, pack, port, require, socket_address, take_bool,
    take_cidr, take_ms, take_socket_address, take_uint, uint, unpack,
};

const ORIGINAL_DST: &str = "envoy.filters.listener.original_dst";
const TLS_INSPECTOR: &str = "envoy.filters.listener.tls_inspector";
const HTTP_INSPECTOR: &str = "envoy.filters.listener.http_inspector";
const HTTP: &str = "envoy.filters.network.http_connection_manager";
const RBAC: &str = "envoy.filters.network.rbac";
const TCP: &str = "envoy.filters.network.tcp_proxy";

pub(crate) fn encode(model: &Listener, options: &Options) -> Proto {
    let direction = match model.direction {
        Direction::Inbound => TrafficDirection::Inbound,
        Direction::Outbound => TrafficDirection::Outbound,
    };
    let mut listener_filters = Vec::new();
    if restores_destination(model.direction, model.bind_to_port, model.use_original_dst) {
        listener_filters.push(listener_filter(ORIGINAL_DST, pack(&OriginalDst::default()), None));
    }
    if let Inspector::Except(ports) = &model.tls_inspector {
        listener_filters.push(listener_filter(
            TLS_INSPECTOR,
            pack(&TlsInspector::default()),
            except(ports),
        ));
    }
    if let Inspector::Except(ports) = &model.http_inspector {
        listener_filters.push(listener_filter(
            HTTP_INSPECTOR,
            pack(&HttpInspector::default()),
            except(ports),
        ));
    }
    Proto {
        name: model.name.clone(),
        address: Some(socket_address(model.address.ip().to_string(), model.address.port())),
        bind_to_port: boolean(model.bind_to_port),
        use_original_dst: boolean(model.use_original_dst),
        traffic_direction: direction.into(),
        filter_chains: model
            .chains
            .iter()
            .map(|c| chain(c, model.direction, options))
            .collect(),
        default_filter_chain: model.default_chain.as_ref().map(|c| chain(c, model.direction, options)),
        listener_filters,
        listener_filters_timeout: duration(model.detection_timeout_ms),
        continue_on_listener_filters_timeout: true,
        access_log: model.access_log.iter().map(access_log::encode).collect(),
        ..Proto::default()
    }
}

/// `virtualInbound` finds the original destination itself; a listener with `use_original_dst` does so by that flag.
fn restores_destination(direction: Direction, bound: bool, use_original_dst: bool) -> bool {
    direction == Direction::Inbound && bound && !use_original_dst
}

fn listener_filter(name: &str, config: Any, filter_disabled: Option<Predicate>) -> ListenerFilter {
    ListenerFilter {
        name: name.into(),
        filter_disabled,
        config_type: Some(listener_filter::ConfigType::TypedConfig(config)),
    }
}

/// "Disabled on these destination ports." Neighbouring ports stay apart: one range per port, as Istio writes them.
fn except(ports: &[u16]) -> Option<Predicate> {
    let range = |port: &u16| Predicate {
        rule: Some(Rule::DestinationPortRange(Int32Range {
            start: (*port).into(),
            end: i32::from(*port) + 1,
        })),
    };
    match ports {
        [] => None,
        [one] => Some(range(one)),
        many => Some(Predicate {
            rule: Some(Rule::OrMatch(MatchSet {
                rules: many.iter().map(range).collect(),
            })),
        }),
    }
}

fn take_except(predicate: Option<Predicate>) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    match predicate.map(|p| p.rule) {
        None => {}
        Some(Some(Rule::OrMatch(set))) => {
            for rule in set.rules {
                let Some(Rule::DestinationPortRange(range)) = rule.rule else {
                    return fault("filter_disabled", "only destination_port_range is supported");
                };
                take_range(range, &mut ports)?;
            }
        }
        Some(Some(Rule::DestinationPortRange(range))) => take_range(range, &mut ports)?,
        Some(_) => return fault("filter_disabled", "only destination_port_range is supported"),
    }
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

fn take_range(range: Int32Range, ports: &mut Vec<u16>) -> Result<()> {
    for value in range.start..range.end {
        match u16::try_from(value) {
            Ok(port) => ports.push(port),
            Err(_) => return fault("filter_disabled.destination_port_range", format!("{value} is no port")),
        }
    }
    Ok(())
}

fn chain(model: &FilterChain, direction: Direction, options: &Options) -> ProtoChain {
    let filters = match &model.filters {
        Filters::Http(manager) => vec![network_filter(HTTP, pack(&http::encode(manager, direction, options)))],
        Filters::Tcp(tcp) => tcp_filters(tcp, options.dialect),
    };
    let matches = &model.matches;
    ProtoChain {
        name: model.name.clone(),
        filter_chain_match: (*matches != ChainMatch::default()).then(|| FilterChainMatch {
            destination_port: matches.destination_port.and_then(|p| uint(p.into())),
            prefix_ranges: matches.destination_ranges.iter().map(|n| cidr(*n)).collect(),
            server_names: matches.server_names.clone(),
            transport_protocol: match matches.transport {
                None => String::new(),
                Some(Transport::Raw) => "raw_buffer".into(),
                Some(Transport::Tls) => "tls".into(),
            },
            application_protocols: matches.application_protocols.clone(),
            ..FilterChainMatch::default()
        }),
        transport_socket: model.tls.as_ref().map(|t| tls::encode_server(t, options.dialect)),
        filters,
        ..ProtoChain::default()
    }
}

fn network_filter(name: &str, config: Any) -> Filter {
    Filter {
        name: name.into(),
        config_type: Some(filter::ConfigType::TypedConfig(config)),
    }
}

fn tcp_filters(model: &TcpManager, dialect: Dialect) -> Vec<Filter> {
    let custom = model.custom.iter().flat_map(ext_authz::encode_network);
    let mut out: Vec<_> = custom.map(|(name, any)| network_filter(name, any)).collect();
    let filters = model.authz.iter().map(authz::encode_network);
    out.extend(filters.map(|a| network_filter(RBAC, pack(&a))));
    if model.telemetry && dialect == Dialect::Istio {
        out.push(network_filter(http::STATS, pack(&stats::PluginConfig::default())));
    }
    let proxy = TcpProxy {
        stat_prefix: model.stat_prefix.clone(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(model.cluster.clone())),
        idle_timeout: model.idle_timeout_ms.and_then(duration),
        ..TcpProxy::default()
    };
    out.push(network_filter(TCP, pack(&proxy)));
    out
}

pub(crate) fn decode(mut proto: Proto) -> Result<Listener> {
    let (host, number) = take_socket_address(&mut proto.address, "address")?;
    let address = (ip(&host, "address")?, number).into();
    let direction = match TrafficDirection::try_from(std::mem::take(&mut proto.traffic_direction)) {
        Ok(TrafficDirection::Inbound) => Direction::Inbound,
        Ok(TrafficDirection::Outbound) => Direction::Outbound,
        _ => return fault("traffic_direction", "must be INBOUND or OUTBOUND"),
    };
    let bind_to_port = take_bool(&mut proto.bind_to_port, true);
    let use_original_dst = take_bool(&mut proto.use_original_dst, false);

    let (mut tls_inspector, mut http_inspector) = (Inspector::Off, Inspector::Off);
    for mut filter in std::mem::take(&mut proto.listener_filters) {
        let name = std::mem::take(&mut filter.name);
        let disabled = filter.filter_disabled.take();
        let any = match filter.config_type.take() {
            Some(listener_filter::ConfigType::TypedConfig(any)) => any,
            _ => return fault(name, "without configuration"),
        };
        if any.type_url.ends_with(".original_dst.v3.OriginalDst") {
            done(unpack::<OriginalDst>(&any).at(&name)?).at(&name)?;
            let fits = restores_destination(direction, bind_to_port, use_original_dst) && disabled.is_none();
            expect(
                fits || use_original_dst,
                &name,
                "only supported on bound inbound listeners",
            )?;
        } else if any.type_url.ends_with(".tls_inspector.v3.TlsInspector") {
            done(unpack::<TlsInspector>(&any).at(&name)?).at(&name)?;
            tls_inspector = Inspector::Except(take_except(disabled).at(&name)?);
        } else if any.type_url.ends_with(".http_inspector.v3.HttpInspector") {
            done(unpack::<HttpInspector>(&any).at(&name)?).at(&name)?;
            http_inspector = Inspector::Except(take_except(disabled).at(&name)?);
        } else {
            return fault(name, format!("listener filter of type {} not supported", any.type_url));
        }
        done(filter)?;
    }
    let detects = tls_inspector != Inspector::Off || http_inspector != Inspector::Off;
    let goes_on = std::mem::take(&mut proto.continue_on_listener_filters_timeout);
    expect(
        goes_on || !detects,
        "continue_on_listener_filters_timeout",
        "only true is supported",
    )?;

    let mut chains = Vec::new();
    for chain in std::mem::take(&mut proto.filter_chains) {
        let place = format!("filter_chains[{}]", chain.name);
        chains.push(take_chain(chain, direction).at(&place)?);
    }
    let default_chain = match proto.default_filter_chain.take() {
        None => None,
        Some(chain) => Some(take_chain(chain, direction).at("default_filter_chain")?),
    };
    let model = Listener {
        name: std::mem::take(&mut proto.name),
        address,
        bind_to_port,
        use_original_dst,
        direction,
        chains,
        default_chain,
        tls_inspector,
        http_inspector,
        // Absent is Envoy's default of 15 seconds.
        detection_timeout_ms: take_ms(&mut proto.listener_filters_timeout, "listener_filters_timeout")?
            .unwrap_or(15_000),
        access_log: access_log::decode(std::mem::take(&mut proto.access_log))?,
    };
    done(proto)?;
    Ok(model)
}

fn take_chain(mut proto: ProtoChain, direction: Direction) -> Result<FilterChain> {
    let name = std::mem::take(&mut proto.name);
    let mut matches = ChainMatch::default();
    if let Some(mut found) = proto.filter_chain_match.take() {
        let number = take_uint(&mut found.destination_port);
        matches = ChainMatch {
            destination_port: number
                .map(|n| port(n, "filter_chain_match.destination_port"))
                .transpose()?,
            destination_ranges: std::mem::take(&mut found.prefix_ranges)
                .into_iter()
                .map(take_cidr)
                .collect::<Result<_>>()
                .at("filter_chain_match.prefix_ranges")?,
            server_names: std::mem::take(&mut found.server_names),
            transport: match std::mem::take(&mut found.transport_protocol).as_str() {
                "" => None,
                "raw_buffer" => Some(Transport::Raw),
                "tls" => Some(Transport::Tls),
                other => {
                    return fault(
                        "filter_chain_match.transport_protocol",
                        format!("{other:?} not supported"),
                    );
                }
            },
            application_protocols: std::mem::take(&mut found.application_protocols),
        };
        done(found).at("filter_chain_match")?;
    }
    let tls = match proto.transport_socket.take() {
        None => None,
        Some(socket) => Some(tls::decode_server(socket).at("transport_socket")?),
    };
    let filters = take_network_filters(std::mem::take(&mut proto.filters), direction).at("filters")?;
    done(proto)?;
    Ok(FilterChain {
        name,
        matches,
        tls,
        filters,
    })
}

fn take_network_filters(filters: Vec<Filter>, direction: Direction) -> Result<Filters> {
    let mut custom = ext_authz::Stages::default();
    let mut authz = Vec::new();
    let mut telemetry = false;
    let mut out = None;
    for proto in filters {
        let name = proto.name;
        let any = match proto.config_type {
            Some(filter::ConfigType::TypedConfig(any)) => any,
            Some(filter::ConfigType::ConfigDiscovery(_)) => {
                return fault(name, "extension configuration by discovery is not supported");
            }
            None => return fault(name, "without configuration"),
        };
        expect(out.is_none(), &name, "filter after the terminal one")?;
        if any.type_url.ends_with("envoy.extensions.filters.network.rbac.v3.RBAC") {
            expect(!telemetry, &name, "out of order: rbac, istio.stats, tcp_proxy")?;
            let rbac = unpack(&any).at(&name)?;
            if let Some(rbac) = custom.take_network_rules(rbac, authz.is_empty()).at(&name)? {
                authz.push(authz::decode_network(rbac).at(&name)?);
            }
        } else if any.type_url.ends_with(".filters.network.ext_authz.v3.ExtAuthz") {
            expect(
                !telemetry && authz.is_empty(),
                &name,
                "out of order: ext_authz, rbac, istio.stats, tcp_proxy",
            )?;
            unpack(&any).and_then(|p| custom.take_network(p)).at(&name)?;
        } else if any.type_url.ends_with("/stats.PluginConfig") {
            done(unpack::<stats::PluginConfig>(&any).at(&name)?).at(&name)?;
            telemetry = true;
        } else if any
            .type_url
            .ends_with(".http_connection_manager.v3.HttpConnectionManager")
        {
            expect(
                authz.is_empty() && !telemetry && custom.is_empty(),
                &name,
                "network filters before HTTP are not supported",
            )?;
            let manager = unpack(&any).and_then(|p| http::decode(p, direction)).at(&name)?;
            out = Some(Filters::Http(Box::new(manager)));
        } else if any.type_url.ends_with(".tcp_proxy.v3.TcpProxy") {
            let mut tcp: TcpProxy = unpack(&any).at(&name)?;
            let cluster = match tcp.cluster_specifier.take() {
                Some(ClusterSpecifier::Cluster(cluster)) => cluster,
                _ => return fault(name, "only cluster is supported"),
            };
            expect(
                custom.complete(),
                &name,
                "shadow rules of ext_authz without an ext_authz filter behind them",
            )?;
            out = Some(Filters::Tcp(TcpManager {
                stat_prefix: std::mem::take(&mut tcp.stat_prefix),
                custom: std::mem::take(&mut custom).finish(),
                authz: std::mem::take(&mut authz),
                cluster,
                idle_timeout_ms: take_ms(&mut tcp.idle_timeout, "idle_timeout").at(&name)?,
                telemetry,
            }));
            done(tcp).at(&name)?;
        } else {
            return fault(name, format!("network filter of type {} not supported", any.type_url));
        }
    }
    require(&mut out, "terminal filter")
}
