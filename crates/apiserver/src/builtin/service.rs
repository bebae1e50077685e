//! Services: defaults, what an update keeps, validation.

use serde_json::{Value, json};

use super::{ensure, items_mut, set_default};
use crate::error::Cause;
use crate::names;

pub(super) fn default(object: &mut Value) {
    ensure(object, "spec");
    let spec = &mut object["spec"];
    set_default(spec, "type", "ClusterIP");
    set_default(spec, "sessionAffinity", "None");
    let kind = spec["type"].as_str().unwrap_or_default().to_owned();
    if spec["sessionAffinity"] == "ClientIP" {
        set_default(
            spec,
            "sessionAffinityConfig",
            json!({"clientIP": {"timeoutSeconds": 10800}}),
        );
    }
    for port in items_mut(spec, "ports") {
        set_default(port, "protocol", "TCP");
        let own = port["port"].clone();
        if port["targetPort"].is_null() || port["targetPort"] == 0 || port["targetPort"] == "" {
            port["targetPort"] = own;
        }
    }
    if kind != "ExternalName" {
        set_default(spec, "internalTrafficPolicy", "Cluster");
        set_default(spec, "ipFamilies", json!(["IPv4"]));
        set_default(spec, "ipFamilyPolicy", "SingleStack");
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        set_default(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        set_default(spec, "allocateLoadBalancerNodePorts", true);
    }
    if spec["clusterIP"].as_str().unwrap_or_default().is_empty()
        && let Some(ip) = spec["clusterIPs"][0]
            .as_str()
            .filter(|i| !i.is_empty())
            .map(str::to_owned)
    {
        spec["clusterIP"] = ip.into();
    }
}

/// A replacement that leaves out allocated values keeps them.
pub(super) fn carry_over(object: &mut Value, old: &Value) {
    let kind = object["spec"]["type"].as_str().unwrap_or_default().to_owned();
    if kind == "ExternalName" {
        if let Some(spec) = object["spec"].as_object_mut() {
            spec.shift_remove("clusterIP");
            spec.shift_remove("clusterIPs");
        }
        return;
    }
    if object["spec"]["clusterIP"].as_str().unwrap_or_default().is_empty() && old["spec"]["clusterIP"].is_string() {
        object["spec"]["clusterIP"] = old["spec"]["clusterIP"].clone();
        object["spec"]["clusterIPs"] = old["spec"]["clusterIPs"].clone();
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        let before = old["spec"]["ports"].as_array().cloned().unwrap_or_default();
        for port in items_mut(&mut object["spec"], "ports") {
            if port["nodePort"].as_u64().unwrap_or(0) > 0 {
                continue;
            }
            let same = before
                .iter()
                .find(|b| b["port"] == port["port"] && b["protocol"] == port["protocol"]);
            if let Some(number) = same.and_then(|b| b["nodePort"].as_u64()).filter(|n| *n > 0) {
                port["nodePort"] = number.into();
            }
        }
    } else {
        for port in items_mut(&mut object["spec"], "ports") {
            if let Some(p) = port.as_object_mut() {
                p.shift_remove("nodePort");
            }
        }
    }
}

pub(super) fn validate(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let spec = &object["spec"];
    let kinds = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    let kind = spec["type"].as_str().unwrap_or_default();
    if !kinds.contains(&kind) {
        causes.push(Cause::not_supported("spec.type", &spec["type"], &kinds));
    }
    let ports = spec["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
    let headless = spec["clusterIP"] == "None";
    if ports.is_empty() && kind != "ExternalName" && !headless {
        causes.push(Cause::required("spec.ports", ""));
    }
    if headless && matches!(kind, "NodePort" | "LoadBalancer") {
        let why = format!("may not be set to 'None' for {kind} services");
        causes.push(Cause::invalid("spec.clusterIPs[0]", &spec["clusterIP"], why));
    }
    if kind == "ExternalName"
        && !names::is_dns1123_subdomain(spec["externalName"].as_str().unwrap_or_default().trim_end_matches('.'))
    {
        causes.push(Cause::invalid(
            "spec.externalName",
            &spec["externalName"],
            names::SUBDOMAIN_MSG,
        ));
    }
    let mut seen_names = std::collections::HashSet::new();
    let mut seen_ports = std::collections::HashSet::new();
    for (i, port) in ports.iter().enumerate() {
        let at = format!("spec.ports[{i}]");
        let name = port["name"].as_str().unwrap_or_default();
        if name.is_empty() {
            if ports.len() > 1 {
                causes.push(Cause::required(format!("{at}.name"), ""));
            }
        } else if !names::is_dns1123_label(name) {
            causes.push(Cause::invalid(format!("{at}.name"), &port["name"], names::LABEL_MSG));
        } else if !seen_names.insert(name.to_owned()) {
            causes.push(Cause::duplicate(format!("{at}.name"), &port["name"]));
        }
        if !port["port"].as_i64().is_some_and(|p| (1..=65535).contains(&p)) {
            let value = if port["port"].is_null() {
                json!(0)
            } else {
                port["port"].clone()
            };
            causes.push(Cause::invalid(
                format!("{at}.port"),
                &value,
                "must be between 1 and 65535, inclusive",
            ));
        }
        let protocols = ["SCTP", "TCP", "UDP"];
        if !port["protocol"].as_str().is_some_and(|p| protocols.contains(&p)) {
            causes.push(Cause::not_supported(
                format!("{at}.protocol"),
                &port["protocol"],
                &protocols,
            ));
        }
        match &port["targetPort"] {
            Value::Number(n) if !n.as_i64().is_some_and(|p| (1..=65535).contains(&p)) => {
                causes.push(Cause::invalid(
                    format!("{at}.targetPort"),
                    &port["targetPort"],
                    "must be between 1 and 65535, inclusive",
                ));
            }
            Value::String(s) if !port_name(s) => {
                let why = "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-), at least one letter, at most 15 characters";
                causes.push(Cause::invalid(format!("{at}.targetPort"), &port["targetPort"], why));
            }
            _ => {}
        }
        if !seen_ports.insert((port["protocol"].to_string(), port["port"].to_string())) {
            causes.push(Cause::duplicate(
                at.clone(),
                &json!({"port": port["port"], "protocol": port["protocol"]}),
            ));
        }
        if port["nodePort"].as_u64().unwrap_or(0) > 0 && kind == "ClusterIP" {
            causes.push(Cause::forbidden(
                format!("{at}.nodePort"),
                "may not be used when `type` is 'ClusterIP'",
            ));
        }
    }
    if !matches!(spec["sessionAffinity"].as_str(), Some("None" | "ClientIP")) {
        causes.push(Cause::not_supported(
            "spec.sessionAffinity",
            &spec["sessionAffinity"],
            &["ClientIP", "None"],
        ));
    }
    for (k, v) in spec["selector"].as_object().into_iter().flatten() {
        for why in names::qualified_name_errors(k) {
            causes.push(Cause::invalid("spec.selector", &json!(k), why));
        }
        if !names::is_label_value(v.as_str().unwrap_or_default()) {
            causes.push(Cause::invalid("spec.selector", v, names::LABEL_VALUE_MSG));
        }
    }
    if let Some(old) = old {
        let (before, now) = (&old["spec"]["clusterIP"], &spec["clusterIP"]);
        if kind != "ExternalName" && old["spec"]["type"] != "ExternalName" && before.is_string() && before != now {
            causes.push(Cause::invalid(
                "spec.clusterIPs[0]",
                &json!([now]),
                "may not change once set",
            ));
        }
    }
}

/// Whether a text can name a port.
pub(super) fn port_name(s: &str) -> bool {
    (1..=15).contains(&s.len())
        && s.bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && s.bytes().any(|b| b.is_ascii_lowercase())
        && !s.starts_with('-')
        && !s.ends_with('-')
        && !s.contains("--")
}
