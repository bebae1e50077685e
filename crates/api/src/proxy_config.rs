//! ProxyConfig in both its forms: the message inside MeshConfig and the `proxy.istio.io/config` annotation
//! ([`ProxyConfig`]), and the small custom resource of the same name ([`ProxyConfigResource`]).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::duration::Duration;
use crate::selector::WorkloadSelector;

/// Specification of the ProxyConfig resource (networking.istio.io/v1beta1).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyConfigResource {
    /// Workloads it applies to.
    pub selector: Option<WorkloadSelector>,
    /// Worker threads; 0 is one per core.
    pub concurrency: Option<i32>,
    /// Environment of the proxy.
    pub environment_variables: BTreeMap<String, String>,
    /// Image of the proxy.
    pub image: Option<ProxyImage>,
}

/// The image of a proxy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyImage {
    /// `default`, `debug` or `distroless`.
    pub image_type: String,
}

/// Settings of one proxy, from the mesh's defaults, the resource and the pod's annotation, in rising precedence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyConfig {
    /// Directory of generated configuration.
    pub config_path: String,
    /// Path of the proxy's program.
    pub binary_path: String,
    /// Name of the proxy's service cluster.
    pub service_cluster: String,
    /// Time old connections are given when listeners go away.
    pub drain_duration: Duration,
    /// Address of the control plane, `host:port`.
    pub discovery_address: String,
    /// Port of merged metrics and health; 0 turns it off.
    pub status_port: i32,
    /// Port of the admin interface, on loopback.
    pub proxy_admin_port: i32,
    /// How the proxy talks to the control plane.
    pub control_plane_auth_policy: String,
    /// Worker threads; 0 is one per core, absent follows the CPU limit.
    pub concurrency: Option<i32>,
    /// Template of the bootstrap.
    pub proxy_bootstrap_template_path: String,
    /// How traffic is captured.
    pub interception_mode: InterceptionMode,
    /// Trace settings.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub tracing: Option<Value>,
    /// Environment of the proxy; `ISTIO_META_…` names become node metadata.
    pub proxy_metadata: BTreeMap<String, String>,
    /// Envoy runtime settings.
    pub runtime_values: BTreeMap<String, String>,
    /// Longest name of a statistic.
    pub stat_name_length: i32,
    /// Further labels of metrics.
    pub extra_stat_tags: Vec<String>,
    /// How far the gateway is from clients.
    pub gateway_topology: Option<Topology>,
    /// Time between SIGTERM and exit.
    pub termination_drain_duration: Duration,
    /// Identifies the mesh in telemetry.
    pub mesh_id: String,
    /// How an unmanaged workload's readiness is checked.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub readiness_probe: Option<Value>,
    /// Which statistics are kept.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub proxy_stats_matcher: Option<Value>,
    /// Start the app only when the proxy is ready.
    pub hold_application_until_proxy_starts: Option<bool>,
    /// Further roots.
    pub ca_certificates_pem: Vec<String>,
    /// Image of the proxy.
    pub image: Option<ProxyImage>,
    /// Where private keys are kept.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub private_key_provider: Option<Value>,
    /// Headers the proxy adds.
    pub proxy_headers: Option<ProxyHeaders>,
    /// Time between writes of log files.
    pub file_flush_interval: Option<Duration>,
    /// Bytes of log kept before a write.
    pub file_flush_min_size_kb: Option<u32>,
}

impl Default for ProxyConfig {
    /// Istio's mesh-wide defaults.
    fn default() -> Self {
        Self {
            config_path: "./etc/istio/proxy".into(),
            binary_path: "/usr/local/bin/envoy".into(),
            service_cluster: "istio-proxy".into(),
            drain_duration: Duration::from_secs(45),
            discovery_address: "istiod.istio-system.svc:15012".into(),
            status_port: 15020,
            proxy_admin_port: 15000,
            control_plane_auth_policy: "MUTUAL_TLS".into(),
            concurrency: None,
            proxy_bootstrap_template_path: String::new(),
            interception_mode: InterceptionMode::default(),
            tracing: None,
            proxy_metadata: BTreeMap::new(),
            runtime_values: BTreeMap::new(),
            stat_name_length: 189,
            extra_stat_tags: Vec::new(),
            gateway_topology: None,
            termination_drain_duration: Duration::from_secs(5),
            mesh_id: String::new(),
            readiness_probe: None,
            proxy_stats_matcher: None,
            hold_application_until_proxy_starts: None,
            ca_certificates_pem: Vec::new(),
            image: None,
            private_key_provider: None,
            proxy_headers: None,
            file_flush_interval: None,
            file_flush_min_size_kb: None,
        }
    }
}

/// How traffic is captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum InterceptionMode {
    /// Redirection, the client's address is lost to the app.
    #[default]
    Redirect,
    /// Transparent proxying, the client's address is kept.
    Tproxy,
    /// Not at all.
    None,
}

/// How far a gateway is from clients.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Topology {
    /// Trusted proxies in front of the gateway.
    pub num_trusted_proxies: u32,
    /// What happens to X-Forwarded-Client-Cert.
    pub forward_client_cert_details: ForwardClientCertDetails,
    /// Accept PROXY protocol.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub proxy_protocol: Option<Value>,
}

/// What happens to X-Forwarded-Client-Cert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ForwardClientCertDetails {
    /// The place's default.
    #[default]
    Undefined,
    /// Remove.
    Sanitize,
    /// Forward with mutual TLS.
    ForwardOnly,
    /// Append with mutual TLS.
    AppendForward,
    /// Replace with mutual TLS.
    SanitizeSet,
    /// Always forward.
    AlwaysForwardOnly,
}

/// Headers the proxy adds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyHeaders {
    /// X-Forwarded-Client-Cert.
    pub forwarded_client_cert: ForwardClientCertDetails,
    /// X-Request-Id.
    pub request_id: Option<HeaderSwitch>,
    /// Server.
    pub server: Option<ServerHeader>,
    /// X-Envoy-Attempt-Count.
    pub attempt_count: Option<HeaderSwitch>,
    /// X-Envoy-… debug headers.
    pub envoy_debug_headers: Option<HeaderSwitch>,
    /// Peer metadata headers.
    pub metadata_exchange_headers: Option<MetadataExchangeHeaders>,
    /// Keep the case of HTTP/1 headers.
    pub preserve_http1_header_case: Option<bool>,
    /// Host of X-Forwarded-Host.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub set_current_client_cert_details: Option<Value>,
}

/// Turns a header off.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HeaderSwitch {
    /// Do not send it.
    pub disabled: Option<bool>,
}

/// The Server header.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ServerHeader {
    /// Keep the app's.
    pub disabled: Option<bool>,
    /// Its value.
    pub value: String,
}

/// Peer metadata headers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MetadataExchangeHeaders {
    /// UNDEFINED, or IN_MESH for peers in the mesh only.
    pub mode: String,
}
