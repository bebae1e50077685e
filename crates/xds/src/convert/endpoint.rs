//! Endpoints and their metadata (S1.62, S1.63).

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::{HealthStatus, Metadata};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint as ProtoEndpoint, LbEndpoint, LocalityLbEndpoints,
};
use envoy_types::pb::google::protobuf::Struct;
use mantlet_model::Endpoints;
use mantlet_model::endpoint::{Endpoint, Health, WorkloadRef};

use crate::wire::{
    At, Result, done, fault, require, socket_address, structure, take_socket_address, take_text, take_uint, text, uint,
};

/// Metadata that chooses the transport socket.
const TRANSPORT: &str = "envoy.transport_socket_match";
/// Istio's metadata of endpoints and clusters.
pub(crate) const ISTIO: &str = "istio";
/// Mantlet's mark for its own proxies.
const MANTLET: &str = "mantlet";

pub(crate) fn encode(model: &Endpoints) -> ClusterLoadAssignment {
    encode_list(&model.cluster, &model.endpoints)
}

pub(crate) fn encode_list(cluster: &str, endpoints: &[Endpoint]) -> ClusterLoadAssignment {
    let mut assignment = ClusterLoadAssignment {
        cluster_name: cluster.into(),
        ..ClusterLoadAssignment::default()
    };
    if !endpoints.is_empty() {
        assignment.endpoints.push(LocalityLbEndpoints {
            lb_endpoints: endpoints.iter().map(encode_one).collect(),
            ..LocalityLbEndpoints::default()
        });
    }
    assignment
}

fn encode_one(model: &Endpoint) -> LbEndpoint {
    let mut metadata: HashMap<String, Struct> = HashMap::new();
    if model.mtls {
        metadata.insert(TRANSPORT.into(), structure([("tlsMode", text("istio"))]));
    }
    if model.mantlet {
        metadata.insert(MANTLET.into(), structure([("peer", text("true"))]));
    }
    if let Some(workload) = &model.workload {
        metadata.insert(ISTIO.into(), structure([("workload", text(workload.to_metadata()))]));
    }
    let health = match model.health {
        Health::Healthy => HealthStatus::Healthy,
        Health::Unhealthy => HealthStatus::Unhealthy,
        Health::Draining => HealthStatus::Draining,
    };
    LbEndpoint {
        health_status: health.into(),
        metadata: (!metadata.is_empty()).then(|| Metadata {
            filter_metadata: metadata,
            ..Metadata::default()
        }),
        load_balancing_weight: uint(model.weight.max(1)),
        host_identifier: Some(HostIdentifier::Endpoint(ProtoEndpoint {
            address: Some(socket_address(model.address.clone(), model.port)),
            ..ProtoEndpoint::default()
        })),
    }
}

pub(crate) fn decode(mut proto: ClusterLoadAssignment) -> Result<Endpoints> {
    let mut out = Endpoints {
        cluster: std::mem::take(&mut proto.cluster_name),
        endpoints: Vec::new(),
    };
    // Localities only order endpoints by closeness; the model has one group.
    for mut group in std::mem::take(&mut proto.endpoints) {
        group.locality = None;
        group.load_balancing_weight = None;
        for endpoint in std::mem::take(&mut group.lb_endpoints) {
            out.endpoints.push(decode_one(endpoint).at("lb_endpoints")?);
        }
        done(group).at("endpoints")?;
    }
    done(proto)?;
    Ok(out)
}

fn decode_one(mut proto: LbEndpoint) -> Result<Endpoint> {
    let health = match HealthStatus::try_from(std::mem::take(&mut proto.health_status)) {
        Ok(HealthStatus::Unknown | HealthStatus::Healthy | HealthStatus::Degraded) => Health::Healthy,
        Ok(HealthStatus::Unhealthy | HealthStatus::Timeout) => Health::Unhealthy,
        Ok(HealthStatus::Draining) => Health::Draining,
        Err(_) => return fault("health_status", "unknown value"),
    };
    let weight = take_uint(&mut proto.load_balancing_weight).unwrap_or(1);
    let mut endpoint = match require(&mut proto.host_identifier, "endpoint")? {
        HostIdentifier::Endpoint(endpoint) => endpoint,
        HostIdentifier::EndpointName(_) => return fault("endpoint_name", "not supported"),
    };
    let (address, port) = take_socket_address(&mut endpoint.address, "endpoint.address")?;
    endpoint.hostname.clear();
    done(endpoint).at("endpoint")?;

    let (mut mtls, mut mantlet, mut workload) = (false, false, None);
    if let Some(mut metadata) = proto.metadata.take() {
        // Metadata is open by design: keys that Mantlet does not use carry nothing that it could violate.
        let mut filters = std::mem::take(&mut metadata.filter_metadata);
        if let Some(mut fields) = filters.remove(TRANSPORT) {
            mtls = take_text(&mut fields.fields, "tlsMode").at(TRANSPORT)?.as_deref() == Some("istio");
        }
        if let Some(mut fields) = filters.remove(MANTLET) {
            mantlet = take_text(&mut fields.fields, "peer").at(MANTLET)?.as_deref() == Some("true");
        }
        if let Some(mut fields) = filters.remove(ISTIO) {
            workload = take_text(&mut fields.fields, "workload")
                .at(ISTIO)?
                .and_then(|w| WorkloadRef::from_metadata(&w))
                .map(Arc::new);
        }
        done(metadata).at("metadata")?;
    }
    done(proto)?;
    Ok(Endpoint {
        address,
        port,
        weight,
        health,
        mtls,
        mantlet,
        workload,
    })
}
