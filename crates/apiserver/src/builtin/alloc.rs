//! Cluster IPs and node ports: picked here, reserved by keys of their own in the same transaction as the Service.
//!
//! The store's precondition "absent" makes every reservation unique, whatever happens between picking and committing, and a
//! crash cannot leave an address taken without its Service.

use std::net::Ipv4Addr;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::error::{ApiError, ApiResult, Cause};
use crate::meta;
use crate::resources::Resource;
use crate::server::ApiServer;
use crate::store::{Expect, Op, Txn};

fn is_service(r: &Resource) -> bool {
    r.group.is_empty() && r.kind == "Service"
}

fn ip_key(ip: &str) -> String {
    format!("/ranges/clusterip/{ip}")
}

fn port_key(port: u64) -> String {
    format!("/ranges/nodeport/{port}")
}

fn ips(service: &Value) -> Vec<String> {
    match service["spec"]["clusterIP"].as_str() {
        Some(ip) if !ip.is_empty() && ip != "None" => vec![ip.to_owned()],
        _ => vec![],
    }
}

fn node_ports(service: &Value) -> Vec<u64> {
    let mut all: Vec<u64> = service["spec"]["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|p| p["nodePort"].as_u64())
        .filter(|p| *p > 0)
        .collect();
    all.extend(service["spec"]["healthCheckNodePort"].as_u64().filter(|p| *p > 0));
    all.sort_unstable();
    all.dedup();
    all
}

/// Picks what a Service lacks and adds its reservations to the transaction.
pub(crate) fn allocate(
    server: &ApiServer,
    r: &Resource,
    object: &mut Value,
    old: Option<&Value>,
    txn: &mut Txn,
) -> ApiResult<()> {
    if !is_service(r) {
        return Ok(());
    }
    let name = meta::name(object).to_owned();
    let invalid = |cause: Cause| ApiError::invalid("", "Service", &name, &[cause]);
    let owner: Bytes = json!({"service": format!("{}/{name}", meta::namespace(object))})
        .to_string()
        .into();
    let before_ips = old.map(ips).unwrap_or_default();
    let before_ports = old.map(node_ports).unwrap_or_default();
    let kind = object["spec"]["type"].as_str().unwrap_or("ClusterIP").to_owned();
    let store = server.store();
    let cidr = server.config().service_cidr;
    let free = |key: &str| -> ApiResult<bool> { Ok(store.get(key)?.0.is_none()) };

    if kind != "ExternalName" {
        let automatic = object["spec"]["clusterIP"].as_str().unwrap_or_default().is_empty();
        if automatic {
            // Dynamic addresses come from the upper part of the range; the lower is for addresses that people choose.
            let low = (cidr.size() / 16).clamp(16, 256);
            let mut picked = None;
            for i in 0..cidr.size() {
                let n = if i < 64 {
                    rand::random_range(low..cidr.size() - 1)
                } else {
                    1 + (i - 64) % (cidr.size() - 2)
                };
                let Some(ip) = cidr.nth(n) else { continue };
                if free(&ip_key(&ip.to_string()))? {
                    picked = Some(ip);
                    break;
                }
            }
            let ip = picked.ok_or_else(|| ApiError::internal("failed to allocate a serviceIP: range is full"))?;
            object["spec"]["clusterIP"] = ip.to_string().into();
        }
        let ip = object["spec"]["clusterIP"].as_str().unwrap_or_default().to_owned();
        if ip != "None" && !before_ips.contains(&ip) {
            let parsed: Option<Ipv4Addr> = ip.parse().ok();
            let shown = json!([ip]);
            if !parsed.is_some_and(|p| cidr.contains_host(p)) {
                let why = format!(
                    "failed to allocate IP {ip}: the provided IP ({ip}) is not in the valid range. The range of valid IPs is {cidr}"
                );
                return Err(invalid(Cause::invalid("spec.clusterIPs", &shown, why)));
            }
            if !automatic && !free(&ip_key(&ip))? {
                let why = format!("failed to allocate IP {ip}: provided IP is already allocated");
                return Err(invalid(Cause::invalid("spec.clusterIPs", &shown, why)));
            }
            txn.expect.push((ip_key(&ip), Expect::Absent));
            txn.ops.push(Op::Put(ip_key(&ip), owner.clone()));
        }
        object["spec"]["clusterIPs"] = json!([ip]);
    }

    let (low, high) = server.config().node_ports;
    let wants =
        kind == "NodePort" || (kind == "LoadBalancer" && object["spec"]["allocateLoadBalancerNodePorts"] != false);
    let mut taken = node_ports(object);
    if wants {
        let count = object["spec"]["ports"].as_array().map_or(0, Vec::len);
        for i in 0..count {
            if object["spec"]["ports"][i]["nodePort"].as_u64().unwrap_or(0) > 0 {
                continue;
            }
            let span = u64::from(high - low) + 1;
            let start = rand::random_range(0..span);
            let mut picked = None;
            for step in 0..span {
                let port = u64::from(low) + (start + step) % span;
                if !taken.contains(&port) && free(&port_key(port))? {
                    picked = Some(port);
                    break;
                }
            }
            let port = picked.ok_or_else(|| ApiError::internal("failed to allocate a nodePort: range is full"))?;
            taken.push(port);
            object["spec"]["ports"][i]["nodePort"] = port.into();
        }
    }
    for port in node_ports(object) {
        if before_ports.contains(&port) {
            continue;
        }
        if !(u64::from(low)..=u64::from(high)).contains(&port) {
            let why = format!("provided port is not in the valid range. The range of valid ports is {low}-{high}");
            return Err(invalid(Cause::invalid("spec.ports[0].nodePort", &json!(port), why)));
        }
        if !free(&port_key(port))? {
            return Err(invalid(Cause::invalid(
                "spec.ports[0].nodePort",
                &json!(port),
                "provided port is already allocated",
            )));
        }
        txn.expect.push((port_key(port), Expect::Absent));
        txn.ops.push(Op::Put(port_key(port), owner.clone()));
    }

    // What the former version had and the new one has not is free again.
    let (now_ips, now_ports) = (ips(object), node_ports(object));
    for ip in before_ips.iter().filter(|ip| !now_ips.contains(ip)) {
        txn.ops.push(Op::Delete(ip_key(ip)));
    }
    for port in before_ports.iter().filter(|p| !now_ports.contains(p)) {
        txn.ops.push(Op::Delete(port_key(*port)));
    }
    Ok(())
}

/// Adds to a deleting transaction the release of what the object held.
pub(crate) fn release(r: &Resource, object: &Value, txn: &mut Txn) {
    if !is_service(r) {
        return;
    }
    txn.ops.extend(ips(object).iter().map(|ip| Op::Delete(ip_key(ip))));
    txn.ops
        .extend(node_ports(object).into_iter().map(|p| Op::Delete(port_key(p))));
}
