//! Objects and fields that translation does not read at all: said so, never ignored silently.
//!
//! `control` writes it into the status of objects of the kinds in [`UNREAD`], analysis reports it.

use mantlet_api::service_entry::Resolution;
use mantlet_api::virtual_service::HttpRoute;
use mantlet_api::{ServiceEntry, VirtualService};
use serde_json::Value;

/// Istio's kinds that translation does not read: group, version, plural, kind.
pub const UNREAD: [(&str, &str, &str, &str); 6] = [
    ("networking.istio.io", "v1alpha3", "envoyfilters", "EnvoyFilter"),
    ("networking.istio.io", "v1beta1", "proxyconfigs", "ProxyConfig"),
    ("networking.istio.io", "v1", "workloadentries", "WorkloadEntry"),
    ("networking.istio.io", "v1", "workloadgroups", "WorkloadGroup"),
    ("telemetry.istio.io", "v1", "telemetries", "Telemetry"),
    ("extensions.istio.io", "v1alpha1", "wasmplugins", "WasmPlugin"),
];

/// What is not in force of an object of a kind that translation does not read; empty for kinds that it reads.
pub fn unread(kind: &str, object: &Value) -> Vec<String> {
    let text = match kind {
        "EnvoyFilter" => "EnvoyFilter patches Envoy's configuration; Mantlet's proxies ignore it",
        "ProxyConfig" => {
            "ProxyConfig is not read; set meshConfig.defaultConfig, or the annotation proxy.istio.io/config on pods"
        }
        "WorkloadEntry" => {
            "WorkloadEntry is not read and adds no endpoint; list addresses in the ServiceEntry's endpoints instead"
        }
        "WorkloadGroup" => "WorkloadGroup is not read; workloads outside of the cluster cannot register",
        "Telemetry" => "Telemetry is not read; logs and metrics are as the mesh configuration says",
        "WasmPlugin" => "WasmPlugin is not supported: no module is loaded, and requests are not passed through it",
        "Service" => return service(object),
        _ => return Vec::new(),
    };
    vec![text.to_string()]
}

/// A Service of type ExternalName is no service of the mesh.
fn service(object: &Value) -> Vec<String> {
    if object.pointer("/spec/type").and_then(Value::as_str) != Some("ExternalName") {
        return Vec::new();
    }
    let name = object
        .pointer("/spec/externalName")
        .and_then(Value::as_str)
        .unwrap_or_default();
    vec![format!(
        "ExternalName services are not read: routes and rules for this name have no effect, and connections to {name} are those of any \
         unknown host; write a ServiceEntry for it"
    )]
}

/// What of a ServiceEntry is not in force.
pub fn service_entry(entry: &ServiceEntry) -> Vec<String> {
    let mut out = Vec::new();
    if entry.addresses.iter().any(|a| a.contains('/')) {
        out.push("addresses: ranges are not supported, only single addresses; connections to the range are those of any unknown host".into());
    }
    if entry.workload_selector.is_some() {
        out.push("workloadSelector selects pods only; WorkloadEntries are not read".into());
    }
    if entry.resolution == Resolution::DynamicDns {
        out.push("resolution DYNAMIC_DNS is resolved like DNS".into());
    }
    if entry.export_to.iter().any(|to| to == "~") {
        out.push("exportTo ~: the entry is visible to no namespace".into());
    }
    for (index, port) in entry.ports.iter().enumerate() {
        if port.protocol.eq_ignore_ascii_case("udp") {
            out.push(format!(
                "ports[{index}]: UDP is not carried by the mesh, the port is ignored"
            ));
        }
    }
    for (index, endpoint) in entry.endpoints.iter().enumerate() {
        if endpoint.address.starts_with("unix://") {
            out.push(format!(
                "endpoints[{index}]: unix sockets are not supported, the endpoint is ignored"
            ));
        }
    }
    out
}

/// Fields of a VirtualService that routing does not read, beside those that `virtual_service::problems` names.
pub(super) fn virtual_service(spec: &VirtualService) -> Vec<String> {
    let mut out = Vec::new();
    let for_mesh = spec.gateways.is_empty() || spec.gateways.iter().any(|g| g == "mesh");
    if for_mesh && !spec.tls.is_empty() {
        out.push("tls routes are supported on gateways only; sidecars ignore them".into());
    }
    for (index, http) in spec.http.iter().enumerate() {
        for (present, what) in fields(http) {
            if present {
                out.push(format!("http[{index}].{what}"));
            }
        }
    }
    out
}

fn fields(http: &HttpRoute) -> Vec<(bool, &'static str)> {
    let matches =
        |test: &dyn Fn(&mantlet_api::virtual_service::HttpMatchRequest) -> bool| http.r#match.iter().any(test);
    let retries = http.retries.as_ref();
    let weighted = http.route.len() > 1;
    vec![
        (
            matches(&|m| !m.stat_prefix.is_empty()),
            "match.statPrefix is not supported and is ignored",
        ),
        (
            weighted && http.route.iter().any(|r| r.headers.is_some()),
            "route.headers of weighted destinations is not supported and is ignored",
        ),
        (
            http.redirect.as_ref().is_some_and(|r| r.derive_port.is_some()),
            "redirect.derivePort is not supported and is ignored",
        ),
        (
            http.direct_response
                .as_ref()
                .and_then(|d| d.body.as_ref())
                .is_some_and(|b| b.bytes.is_some()),
            "directResponse.body.bytes is not supported: the body is empty",
        ),
        (
            retries.is_some_and(|r| r.backoff.is_some()),
            "retries.backoff is not supported and is ignored",
        ),
        (
            retries.is_some_and(|r| r.retry_remote_localities.is_some()),
            "retries.retryRemoteLocalities is not supported and is ignored",
        ),
        (
            retries.is_some_and(|r| r.retry_ignore_previous_hosts.is_some()),
            "retries.retryIgnorePreviousHosts is not supported and is ignored",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_unread_kind_says_so() {
        for (_, _, _, kind) in UNREAD {
            assert_eq!(unread(kind, &json!({})).len(), 1, "{kind}");
        }
        assert!(unread("PeerAuthentication", &json!({})).is_empty());
        assert!(unread("Service", &json!({"spec": {"type": "ClusterIP"}})).is_empty());
        let external = json!({"spec": {"type": "ExternalName", "externalName": "api.example.com"}});
        assert!(unread("Service", &external)[0].contains("api.example.com"));
    }

    #[test]
    fn fields_without_effect_are_named() {
        let entry: ServiceEntry = serde_json::from_value(json!({
            "hosts": ["a"], "addresses": ["10.0.0.0/8"], "resolution": "DYNAMIC_DNS", "exportTo": ["~"],
            "ports": [{"number": 53, "name": "dns", "protocol": "UDP"}],
            "endpoints": [{"address": "unix:///x"}],
        }))
        .unwrap();
        assert_eq!(service_entry(&entry).len(), 5);
        let plain: ServiceEntry = serde_json::from_value(json!({
            "hosts": ["a"], "addresses": ["10.0.0.1"], "resolution": "STATIC",
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "endpoints": [{"address": "10.0.0.2"}],
        }))
        .unwrap();
        assert!(service_entry(&plain).is_empty());

        let routes: VirtualService = serde_json::from_value(json!({
            "hosts": ["a"], "tls": [{"match": [{"sniHosts": ["a"]}]}],
            "http": [{
                "match": [{"statPrefix": "p"}],
                "redirect": {"derivePort": "FROM_REQUEST_PORT"},
                "directResponse": {"status": 200, "body": {"bytes": "AA=="}},
                "retries": {"attempts": 1, "backoff": "1s", "retryRemoteLocalities": true, "retryIgnorePreviousHosts": true},
                "route": [{"destination": {"host": "b"}, "headers": {"request": {"remove": ["x"]}}}, {"destination": {"host": "c"}}],
            }],
        }))
        .unwrap();
        assert_eq!(virtual_service(&routes).len(), 8);
        let plain: VirtualService = serde_json::from_value(json!({
            "hosts": ["a"], "gateways": ["g"], "tls": [{"match": [{"sniHosts": ["a"]}]}],
            "http": [{"match": [{"uri": {"prefix": "/"}}], "route": [{"destination": {"host": "b"}}], "retries": {"attempts": 1}}],
        }))
        .unwrap();
        assert!(virtual_service(&plain).is_empty());
    }
}
