//! The built-in profiles: what is installed and with which values where the user says nothing. The shape is an IstioOperator's `spec`.

use serde_json::{Value, json};

/// Names of all profiles.
pub(super) const NAMES: [&str; 4] = ["default", "demo", "minimal", "empty"];

/// The spec of a profile.
pub(super) fn get(name: &str) -> Option<Value> {
    let mut spec = base();
    let over = match name {
        "default" => {
            json!({ "components": { "ingressGateways": [gateway("ingress", true)], "egressGateways": [gateway("egress", false)] } })
        }
        "demo" => json!({
            "components": { "ingressGateways": [gateway("ingress", true)], "egressGateways": [gateway("egress", true)] },
            "meshConfig": { "accessLogFile": "/dev/stdout" },
            "values": {
                "profile": "demo",
                "global": { "proxy": { "resources": { "requests": { "cpu": "10m", "memory": "40Mi" } } } },
                "pilot": {
                    "autoscaleEnabled": false,
                    "traceSampling": 100,
                    "resources": { "requests": { "cpu": "10m", "memory": "100Mi" } },
                },
                "gateways": {
                    "istio-ingressgateway": {
                        "autoscaleEnabled": false,
                        "resources": { "requests": { "cpu": "10m", "memory": "40Mi" } },
                        "ports": [
                            { "name": "status-port", "port": 15021, "targetPort": 15021, "protocol": "TCP" },
                            { "name": "http2", "port": 80, "targetPort": 8080, "protocol": "TCP" },
                            { "name": "https", "port": 443, "targetPort": 8443, "protocol": "TCP" },
                            { "name": "tcp", "port": 31400, "targetPort": 31400, "protocol": "TCP" },
                            { "name": "tls", "port": 15443, "targetPort": 15443, "protocol": "TCP" },
                        ],
                    },
                    "istio-egressgateway": {
                        "autoscaleEnabled": false,
                        "resources": { "requests": { "cpu": "10m", "memory": "40Mi" } },
                    },
                },
            },
        }),
        "minimal" => {
            json!({ "components": { "ingressGateways": [gateway("ingress", false)], "egressGateways": [gateway("egress", false)] } })
        }
        "empty" => json!({
            "components": {
                "base": { "enabled": false }, "pilot": { "enabled": false },
                "ingressGateways": [gateway("ingress", false)], "egressGateways": [gateway("egress", false)],
            },
        }),
        _ => return None,
    };
    super::spec::overlay(&mut spec, &over);
    spec["profile"] = json!(name);
    Some(spec)
}

fn gateway(direction: &str, enabled: bool) -> Value {
    json!({ "name": format!("istio-{direction}gateway"), "enabled": enabled })
}

/// What all profiles share.
fn base() -> Value {
    json!({
        "components": { "base": { "enabled": true }, "pilot": { "enabled": true } },
        "meshConfig": {
            "defaultConfig": { "proxyMetadata": {} },
            "defaultProviders": { "metrics": ["prometheus"] },
            "enablePrometheusMerge": true,
        },
        "values": {
            "global": {
                "proxy": {
                    "resources": {
                        "requests": { "cpu": "100m", "memory": "128Mi" },
                        "limits": { "cpu": "2000m", "memory": "1024Mi" },
                    },
                },
            },
            "pilot": { "resources": { "requests": { "cpu": "500m", "memory": "256Mi" } } },
            "gateways": {
                "istio-ingressgateway": {
                    "name": "istio-ingressgateway",
                    "labels": { "app": "istio-ingressgateway", "istio": "ingressgateway" },
                    "type": "LoadBalancer",
                    "autoscaleEnabled": true,
                    "autoscaleMin": 1,
                    "autoscaleMax": 5,
                    "ports": [
                        { "name": "status-port", "port": 15021, "targetPort": 15021, "protocol": "TCP" },
                        { "name": "http2", "port": 80, "targetPort": 8080, "protocol": "TCP" },
                        { "name": "https", "port": 443, "targetPort": 8443, "protocol": "TCP" },
                    ],
                    "resources": {
                        "requests": { "cpu": "100m", "memory": "128Mi" },
                        "limits": { "cpu": "2000m", "memory": "1024Mi" },
                    },
                },
                "istio-egressgateway": {
                    "name": "istio-egressgateway",
                    "labels": { "app": "istio-egressgateway", "istio": "egressgateway" },
                    "type": "ClusterIP",
                    "autoscaleEnabled": true,
                    "autoscaleMin": 1,
                    "autoscaleMax": 5,
                    "ports": [
                        { "name": "http2", "port": 80, "targetPort": 8080, "protocol": "TCP" },
                        { "name": "https", "port": 443, "targetPort": 8443, "protocol": "TCP" },
                    ],
                    "resources": {
                        "requests": { "cpu": "100m", "memory": "128Mi" },
                        "limits": { "cpu": "2000m", "memory": "1024Mi" },
                    },
                },
            },
        },
    })
}
