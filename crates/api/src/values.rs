//! The installation's values (`values.*` of an IstioOperator, Helm's values): what the injector and the installer read.
//!
//! The injector reads them as JSON from key `values` of ConfigMap `istio-sidecar-injector`; `cli install` merges profile, file and
//! `--set` into them and checks paths against [`schema`]. Parts of Istio's values that have no meaning here are accepted as opaque.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::crd;

/// All values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Values {
    /// Settings of the whole installation.
    pub global: Global,
    /// Settings of the control plane.
    pub pilot: Pilot,
    /// Gateways by component name (`istio-ingressgateway`, `istio-egressgateway`).
    pub gateways: BTreeMap<String, GatewayValues>,
    /// Settings of the injector.
    pub sidecar_injector_webhook: InjectorWebhook,
    /// Mesh configuration, over the profile's.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub mesh_config: Option<Value>,
    /// Network plugin; not used here.
    #[serde(rename = "istio_cni")]
    #[schemars(schema_with = "crate::crd::opaque")]
    pub istio_cni: Option<Value>,
    /// Network plugin; not used here.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub cni: Option<Value>,
    /// Telemetry defaults; not used here.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub telemetry: Option<Value>,
    /// Base chart; not used here.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub base: Option<Value>,
    /// Revision of this control plane.
    pub revision: String,
    /// Revision that serves objects and namespaces that name none.
    pub default_revision: String,
    /// Name of the profile.
    pub profile: String,
}

/// Settings of the whole installation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Global {
    /// Registry of images.
    pub hub: String,
    /// Tag of images.
    #[schemars(with = "String")]
    #[serde(deserialize_with = "tag")]
    pub tag: String,
    /// Suffix of tags.
    pub variant: String,
    /// Pull policy of all images.
    pub image_pull_policy: String,
    /// Pull secrets of all pods.
    pub image_pull_secrets: Vec<String>,
    /// Namespace of the control plane.
    pub istio_namespace: String,
    /// Log level of control plane and agents.
    pub logging: Logging,
    /// Log as JSON.
    pub log_as_json: bool,
    /// Identifies the mesh in telemetry.
    #[serde(rename = "meshID")]
    pub mesh_id: String,
    /// Names of this cluster.
    pub multi_cluster: MultiCluster,
    /// Name of this network.
    pub network: String,
    /// Who signs the control plane's certificate.
    pub pilot_cert_provider: String,
    /// Address of the certificate authority; empty is the control plane.
    pub ca_address: String,
    /// Address of a control plane elsewhere.
    pub remote_pilot_address: String,
    /// Tokens proxies authenticate with.
    pub sds: Sds,
    /// `third-party-jwt`, the only supported kind.
    pub jwt_policy: String,
    /// The sidecar.
    pub proxy: Proxy,
    /// The init container.
    #[serde(rename = "proxy_init")]
    pub proxy_init: ProxyInit,
    /// The control plane's analysis.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub istiod: Option<Value>,
    /// Default node selector.
    pub default_node_selector: BTreeMap<String, String>,
    /// Default resources.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub default_resources: Option<Value>,
    /// Default disruption budget.
    pub default_pod_disruption_budget: Enabled,
    /// Priority class of control plane pods.
    pub priority_class_name: String,
    /// Platform (openshift, gke, …).
    pub platform: String,
    /// Tracer settings; not used here.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub tracer: Option<Value>,
    /// Networks by name; not used here.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub mesh_networks: Option<Value>,
    /// Token exchange; not used here.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub sts: Option<Value>,
    /// Waypoint settings; not used here.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub waypoint: Option<Value>,
    /// Trust domain, if the mesh configuration has none.
    pub trust_domain: String,
    /// Whether the validation webhook is installed.
    pub config_validation: bool,
    /// Whether this is an external control plane.
    pub external_istiod: bool,
    /// Watch only one namespace.
    pub one_namespace: bool,
    /// Leave the injector's ConfigMap out.
    pub omit_sidecar_injector_config_map: bool,
}

impl Default for Global {
    fn default() -> Self {
        Self {
            hub: "mantlet".into(),
            tag: crate::VERSION.into(),
            variant: String::new(),
            image_pull_policy: String::new(),
            image_pull_secrets: Vec::new(),
            istio_namespace: "istio-system".into(),
            logging: Logging::default(),
            log_as_json: false,
            mesh_id: String::new(),
            multi_cluster: MultiCluster::default(),
            network: String::new(),
            pilot_cert_provider: "istiod".into(),
            ca_address: String::new(),
            remote_pilot_address: String::new(),
            sds: Sds::default(),
            jwt_policy: "third-party-jwt".into(),
            proxy: Proxy::default(),
            proxy_init: ProxyInit::default(),
            istiod: None,
            default_node_selector: BTreeMap::new(),
            default_resources: None,
            default_pod_disruption_budget: Enabled { enabled: true },
            priority_class_name: String::new(),
            platform: String::new(),
            tracer: None,
            mesh_networks: None,
            sts: None,
            waypoint: None,
            trust_domain: String::new(),
            config_validation: true,
            external_istiod: false,
            one_namespace: false,
            omit_sidecar_injector_config_map: false,
        }
    }
}

/// A tag may be written as a number (`1.2`), which YAML makes one.
fn tag<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok(text),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(serde::de::Error::custom(format!("tag must be a string, found {other}"))),
    }
}

/// A switch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Enabled {
    /// On.
    pub enabled: bool,
}

/// Log level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Logging {
    /// `scope:level,…`
    pub level: String,
}

impl Default for Logging {
    fn default() -> Self {
        Self {
            level: "default:info".into(),
        }
    }
}

/// Names of this cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MultiCluster {
    /// Its name.
    pub cluster_name: String,
    /// Whether multi-cluster is on.
    pub enabled: Option<bool>,
    /// Include the cluster's own host names.
    pub include_envoy_filter: Option<bool>,
}

impl Default for MultiCluster {
    fn default() -> Self {
        Self {
            cluster_name: "Kubernetes".into(),
            enabled: None,
            include_envoy_filter: None,
        }
    }
}

/// Tokens proxies authenticate with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Sds {
    /// The token.
    pub token: SdsToken,
}

/// The token proxies authenticate with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SdsToken {
    /// Its audience.
    pub aud: String,
}

impl Default for SdsToken {
    fn default() -> Self {
        Self { aud: "istio-ca".into() }
    }
}

/// The sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Proxy {
    /// Image name, or a whole reference.
    pub image: String,
    /// `enabled` or `disabled`: what happens to pods that do not say.
    pub auto_inject: String,
    /// DNS domain of the cluster.
    pub cluster_domain: String,
    /// Log level.
    pub log_level: String,
    /// Log level by component.
    pub component_log_level: String,
    /// Run privileged; needed to inspect traffic with tcpdump.
    pub privileged: bool,
    /// Start the app only when the proxy is ready.
    pub hold_application_until_proxy_starts: bool,
    /// Write core dumps.
    pub enable_core_dump: bool,
    /// Destinations captured.
    #[serde(rename = "includeIPRanges")]
    pub include_ip_ranges: String,
    /// Destinations not captured.
    #[serde(rename = "excludeIPRanges")]
    pub exclude_ip_ranges: String,
    /// Inbound ports captured.
    pub include_inbound_ports: String,
    /// Inbound ports not captured.
    pub exclude_inbound_ports: String,
    /// Outbound ports captured whatever their destination.
    pub include_outbound_ports: String,
    /// Outbound ports not captured.
    pub exclude_outbound_ports: String,
    /// Port of merged metrics and probes.
    pub status_port: u16,
    /// Wait before the first readiness probe, seconds.
    pub readiness_initial_delay_seconds: u32,
    /// Time between readiness probes, seconds.
    pub readiness_period_seconds: u32,
    /// Failures in a row that make it unready.
    pub readiness_failure_threshold: u32,
    /// The startup probe.
    pub startup_probe: StartupProbe,
    /// Requests and limits.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub resources: Value,
    /// Lifecycle hooks.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub lifecycle: Option<Value>,
    /// Tracer; not used here.
    pub tracer: String,
    /// File of the outlier log; not used here.
    pub outlier_log_path: String,
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            image: "proxyv2".into(),
            auto_inject: "enabled".into(),
            cluster_domain: "cluster.local".into(),
            log_level: "warning".into(),
            component_log_level: "misc:error".into(),
            privileged: false,
            hold_application_until_proxy_starts: false,
            enable_core_dump: false,
            include_ip_ranges: "*".into(),
            exclude_ip_ranges: String::new(),
            include_inbound_ports: "*".into(),
            exclude_inbound_ports: String::new(),
            include_outbound_ports: String::new(),
            exclude_outbound_ports: String::new(),
            status_port: 15020,
            readiness_initial_delay_seconds: 0,
            readiness_period_seconds: 15,
            readiness_failure_threshold: 4,
            startup_probe: StartupProbe::default(),
            resources: json!({
                "requests": { "cpu": "100m", "memory": "128Mi" },
                "limits": { "cpu": "2000m", "memory": "1024Mi" },
            }),
            lifecycle: None,
            tracer: "none".into(),
            outlier_log_path: String::new(),
        }
    }
}

/// The startup probe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StartupProbe {
    /// On.
    pub enabled: bool,
    /// Failures in a row that end the pod.
    pub failure_threshold: u32,
}

impl Default for StartupProbe {
    fn default() -> Self {
        Self {
            enabled: true,
            failure_threshold: 600,
        }
    }
}

/// The init container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyInit {
    /// Image name; empty is the proxy's.
    pub image: String,
    /// Requests and limits; not used, the init container has the proxy's.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub resources: Option<Value>,
}

/// Settings of the injector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct InjectorWebhook {
    /// Inject into namespaces without any label.
    pub enable_namespaces_by_default: bool,
    /// Rewrite probes of apps to go through the agent.
    #[serde(rename = "rewriteAppHTTPProbe")]
    pub rewrite_app_http_probe: bool,
    /// `Never` or `IfNeeded`.
    pub reinvocation_policy: String,
    /// Pods injected though their namespace does not say.
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub always_inject_selector: Vec<Value>,
    /// Pods not injected though their namespace says.
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub never_inject_selector: Vec<Value>,
    /// Annotations added to every injected pod.
    pub injected_annotations: BTreeMap<String, String>,
    /// Templates used where a pod names none.
    pub default_templates: Vec<String>,
    /// Templates of one's own; not supported.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub templates: Option<Value>,
    /// Old name of a webhook option.
    pub use_legacy_selectors: Option<bool>,
}

impl Default for InjectorWebhook {
    fn default() -> Self {
        Self {
            enable_namespaces_by_default: false,
            rewrite_app_http_probe: true,
            reinvocation_policy: "Never".into(),
            always_inject_selector: Vec::new(),
            never_inject_selector: Vec::new(),
            injected_annotations: BTreeMap::new(),
            default_templates: Vec::new(),
            templates: None,
            use_legacy_selectors: None,
        }
    }
}

/// Settings of the control plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Pilot {
    /// Whether it is installed.
    pub enabled: Option<bool>,
    /// Image name, or a whole reference.
    pub image: String,
    /// Registry, if not the global one.
    pub hub: String,
    /// Tag, if not the global one.
    #[schemars(with = "String")]
    #[serde(deserialize_with = "tag")]
    pub tag: String,
    /// Scale with load.
    pub autoscale_enabled: bool,
    /// Fewest replicas with scaling.
    pub autoscale_min: u32,
    /// Most replicas with scaling.
    pub autoscale_max: u32,
    /// Replicas without scaling.
    pub replica_count: Option<u32>,
    /// Load at which it scales.
    pub cpu: TargetCpu,
    /// Requests and limits.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub resources: Option<Value>,
    /// Further environment.
    #[schemars(with = "BTreeMap<String, Scalar>")]
    pub env: BTreeMap<String, Value>,
    /// Percent of requests that are traced.
    pub trace_sampling: f64,
    /// Further annotations of its pods.
    pub pod_annotations: BTreeMap<String, String>,
    /// Further labels of its pods.
    pub pod_labels: BTreeMap<String, String>,
    /// Node selector of its pods.
    pub node_selector: BTreeMap<String, String>,
    /// Longest life of proxies' streams.
    pub keepalive_max_server_connection_age: String,
    /// Network plugin.
    pub cni: CniValues,
    /// Rolling update.
    #[schemars(schema_with = "rolling")]
    pub rolling_max_surge: Value,
    /// Rolling update.
    #[schemars(schema_with = "rolling")]
    pub rolling_max_unavailable: Value,
}

/// A percentage or a number, as Kubernetes takes it.
fn rolling(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "x-kubernetes-int-or-string": true })
}

/// A text, number or boolean: environment values are written as any of them.
struct Scalar;

impl JsonSchema for Scalar {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Scalar".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "x-kubernetes-int-or-string": true })
    }
}

impl Default for Pilot {
    fn default() -> Self {
        Self {
            enabled: None,
            image: "pilot".into(),
            hub: String::new(),
            tag: String::new(),
            autoscale_enabled: true,
            autoscale_min: 1,
            autoscale_max: 5,
            replica_count: None,
            cpu: TargetCpu::default(),
            resources: None,
            env: BTreeMap::new(),
            trace_sampling: 1.0,
            pod_annotations: BTreeMap::new(),
            pod_labels: BTreeMap::new(),
            node_selector: BTreeMap::new(),
            keepalive_max_server_connection_age: "30m".into(),
            cni: CniValues::default(),
            rolling_max_surge: json!("100%"),
            rolling_max_unavailable: json!("25%"),
        }
    }
}

/// Load at which a component scales.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TargetCpu {
    /// Percent of the request.
    pub target_average_utilization: u32,
}

impl Default for TargetCpu {
    fn default() -> Self {
        Self {
            target_average_utilization: 80,
        }
    }
}

/// Network plugin: with it, pods get a check instead of an init container that sets up capture.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CniValues {
    /// On.
    pub enabled: bool,
    /// How it is chained.
    pub provider: String,
}

/// One gateway.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayValues {
    /// Scale with load.
    pub autoscale_enabled: Option<bool>,
    /// Fewest replicas with scaling.
    pub autoscale_min: Option<u32>,
    /// Most replicas with scaling.
    pub autoscale_max: Option<u32>,
    /// Name of Deployment and Service.
    pub name: String,
    /// Labels of its pods.
    pub labels: BTreeMap<String, String>,
    /// ClusterIP, NodePort or LoadBalancer.
    pub r#type: String,
    /// Ports of the Service.
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub ports: Vec<Value>,
    /// Requests and limits.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub resources: Option<Value>,
    /// Annotations of the Service.
    pub service_annotations: BTreeMap<String, String>,
    /// Further environment.
    #[schemars(with = "BTreeMap<String, Scalar>")]
    pub env: BTreeMap<String, Value>,
    /// Annotations of its pods.
    pub pod_annotations: BTreeMap<String, String>,
    /// `gateway` to leave the pod to the injector.
    pub injection_template: String,
    /// Node selector of its pods.
    pub node_selector: BTreeMap<String, String>,
    /// Address of the load balancer.
    #[serde(rename = "loadBalancerIP")]
    pub load_balancer_ip: String,
    /// Ranges that may connect.
    pub load_balancer_source_ranges: Vec<String>,
    /// `Local` keeps the client's address.
    pub external_traffic_policy: String,
}

/// The schema of [`Values`], for checks of paths.
pub fn schema() -> &'static Value {
    static SCHEMA: OnceLock<Value> = OnceLock::new();
    SCHEMA.get_or_init(crd::schema_of::<Values>)
}

impl Values {
    /// Reads values from JSON. Unknown fields are ignored; what does not decode is an error that names the field.
    pub fn from_value(value: &Value) -> Result<Self, String> {
        let mut value = value.clone();
        crate::object::drop_nulls(&mut value);
        if value.is_null() {
            return Ok(Self::default());
        }
        if let Some((path, message)) = crd::shape_error(&value, schema(), "") {
            return Err(format!("values.{path}: {message}"));
        }
        serde_path_to_error::deserialize(value).map_err(|e| format!("values.{}: {}", e.path(), e.inner()))
    }

    /// The image reference of a component: a whole reference stands as it is, a name gets hub and tag.
    pub fn image(&self, name: &str, hub: &str, tag: &str) -> String {
        if name.contains('/') {
            return name.to_string();
        }
        let hub = if hub.is_empty() { &self.global.hub } else { hub };
        let tag = if tag.is_empty() { &self.global.tag } else { tag };
        if self.global.variant.is_empty() {
            format!("{hub}/{name}:{tag}")
        } else {
            format!("{hub}/{name}:{tag}-{}", self.global.variant)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_overrides() {
        let values = Values::from_value(&json!({"global": {"tag": 1.5, "proxy": {"privileged": true}}})).unwrap();
        assert!(values.global.proxy.privileged);
        assert_eq!(values.global.proxy.status_port, 15020);
        assert_eq!(values.image("proxyv2", "", ""), "mantlet/proxyv2:1.5");
        assert_eq!(values.image("a/b:c", "", ""), "a/b:c");
        assert!(values.sidecar_injector_webhook.rewrite_app_http_probe);
    }

    #[test]
    fn bad_values_name_the_field() {
        for (value, part) in [
            (
                json!({"global": {"proxy": {"privileged": "yes"}}}),
                "values.global.proxy.privileged",
            ),
            (json!({"global": {"proxy": []}}), "values.global.proxy"),
            (
                json!({"global": {"proxy": {"statusPort": 99999}}}),
                "values.global.proxy.statusPort",
            ),
        ] {
            let error = Values::from_value(&value).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn unknown_paths_have_hints() {
        let found = crd::unknown_fields(&json!({"global": {"proxy": {"priviledged": true}}}), schema(), "values");
        assert_eq!(
            found[0].to_string(),
            "unknown field \"values.global.proxy.priviledged\" (did you mean \"privileged\"?)"
        );
    }
}
