//! Annotations that steer injection: which values they may have (S5.15). A bad one refuses the pod, so that a typing error in, say,
//! an exclusion never silently changes what is captured.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mantlet_api::validate::parse_bool;

use super::InjectError;

type Check = fn(&str) -> Result<(), String>;

const CHECKED: &[(&str, Check)] = &[
    ("sidecar.istio.io/interceptionMode", interception_mode),
    ("sidecar.istio.io/enableCoreDump", boolean),
    ("sidecar.istio.io/rewriteAppHTTPProbers", boolean),
    ("sidecar.istio.io/nativeSidecar", boolean),
    ("prometheus.istio.io/merge-metrics", boolean),
    ("status.sidecar.istio.io/port", status_port),
    ("readiness.status.sidecar.istio.io/initialDelaySeconds", seconds),
    ("readiness.status.sidecar.istio.io/periodSeconds", seconds),
    ("readiness.status.sidecar.istio.io/failureThreshold", seconds),
    ("traffic.sidecar.istio.io/includeOutboundIPRanges", include_ip_ranges),
    ("traffic.sidecar.istio.io/excludeOutboundIPRanges", exclude_ip_ranges),
    ("traffic.sidecar.istio.io/includeInboundPorts", include_ports),
    ("traffic.sidecar.istio.io/excludeInboundPorts", ports),
    ("traffic.sidecar.istio.io/includeOutboundPorts", include_ports),
    ("traffic.sidecar.istio.io/excludeOutboundPorts", ports),
    ("traffic.sidecar.istio.io/excludeInterfaces", interfaces),
    ("traffic.sidecar.istio.io/kubevirtInterfaces", interfaces),
    ("istio.io/reroute-virtual-interfaces", interfaces),
    ("sidecar.istio.io/proxyCPU", quantity),
    ("sidecar.istio.io/proxyCPULimit", quantity),
    ("sidecar.istio.io/proxyMemory", quantity),
    ("sidecar.istio.io/proxyMemoryLimit", quantity),
    ("sidecar.istio.io/userVolume", json_map),
    ("sidecar.istio.io/userVolumeMount", json_map),
];

/// Checks all annotations of a pod.
pub(super) fn validate(annotations: &BTreeMap<String, String>) -> Result<(), InjectError> {
    for (name, check) in CHECKED {
        if let Some(value) = annotations.get(*name) {
            check(value).map_err(|reason| InjectError::Annotation {
                name: (*name).to_string(),
                value: value.clone(),
                reason,
            })?;
        }
    }
    Ok(())
}

/// What is wrong with the value of one annotation, for analysis.
pub fn problem(name: &str, value: &str) -> Option<String> {
    let (_, check) = CHECKED.iter().find(|(known, _)| *known == name)?;
    check(value).err()
}

/// The value of a boolean annotation; absent or unreadable (already refused) is `None`.
pub(super) fn bool_of(annotations: &BTreeMap<String, String>, name: &str) -> Option<bool> {
    annotations.get(name).and_then(|text| parse_bool(text))
}

fn boolean(value: &str) -> Result<(), String> {
    parse_bool(value)
        .map(|_| ())
        .ok_or_else(|| "must be true or false".into())
}

fn interception_mode(value: &str) -> Result<(), String> {
    match value {
        "REDIRECT" | "TPROXY" | "NONE" => Ok(()),
        _ => Err("interceptionMode invalid, use REDIRECT,TPROXY,NONE".into()),
    }
}

fn status_port(value: &str) -> Result<(), String> {
    value
        .parse::<u16>()
        .map(|_| ())
        .map_err(|_| "must be a port number, or 0 to turn the status port off".into())
}

fn seconds(value: &str) -> Result<(), String> {
    value
        .parse::<u32>()
        .map(|_| ())
        .map_err(|_| "must be a number without sign".into())
}

fn ports(value: &str) -> Result<(), String> {
    for port in value.split(',').map(str::trim).filter(|port| !port.is_empty()) {
        if !port.parse::<u16>().is_ok_and(|n| n > 0) {
            return Err(format!("{port:?} is no port number"));
        }
    }
    Ok(())
}

fn include_ports(value: &str) -> Result<(), String> {
    if value.trim() == "*" { Ok(()) } else { ports(value) }
}

fn include_ip_ranges(value: &str) -> Result<(), String> {
    if value.trim() == "*" {
        Ok(())
    } else {
        exclude_ip_ranges(value)
    }
}

fn exclude_ip_ranges(value: &str) -> Result<(), String> {
    for range in value.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let good = range.parse::<ipnet::IpNet>().is_ok() || range.parse::<IpAddr>().is_ok();
        if !good {
            return Err(format!("{range:?} is no CIDR range"));
        }
    }
    Ok(())
}

/// Interface names end up in rules: only what Linux allows, and nothing a shell or nft could read otherwise.
fn interfaces(value: &str) -> Result<(), String> {
    for name in value.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let good = name.len() <= 15
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.@+*".contains(&b));
        if !good {
            return Err(format!("{name:?} is no interface name"));
        }
    }
    Ok(())
}

fn quantity(value: &str) -> Result<(), String> {
    let digits = value
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(value.len());
    let (number, suffix) = value.split_at(digits);
    let known = ["", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"];
    if number.parse::<f64>().is_ok() && known.contains(&suffix) {
        Ok(())
    } else {
        Err("must be a quantity such as 100m or 128Mi".into())
    }
}

fn json_map(value: &str) -> Result<(), String> {
    match serde_json::from_str::<serde_json::Value>(value) {
        Ok(serde_json::Value::Object(_)) => Ok(()),
        Ok(_) => Err("must be a JSON object by name".into()),
        Err(e) => Err(format!("is not JSON: {e}")),
    }
}
