//! `DestinationRule` (networking.istio.io): how clients talk to a host: TLS, load balancing, limits, subsets.
//!
//! Lookup and merge are `translate`'s business (SEMANTICS 1f). Rules of the kind: S8.50–S8.52.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnostic::Diagnostic;
use crate::duration::Duration;
use crate::selector::WorkloadSelector;
use crate::validate;

/// Specification of a DestinationRule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["host"]))]
pub struct DestinationRule {
    /// Host it applies to; short names are expanded with the rule's own namespace.
    pub host: String,
    /// Settings for all ports and subsets.
    pub traffic_policy: Option<TrafficPolicy>,
    /// Named groups of the host's endpoints.
    pub subsets: Vec<Subset>,
    /// Namespaces that see the rule; `.` own, `*` all.
    pub export_to: Vec<String>,
    /// Client workloads it is limited to, in its own namespace.
    pub workload_selector: Option<WorkloadSelector>,
}

/// A named group of endpoints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct Subset {
    /// Its name.
    pub name: String,
    /// Labels of its endpoints.
    pub labels: BTreeMap<String, String>,
    /// Settings that override the rule's own, field by field.
    pub traffic_policy: Option<TrafficPolicy>,
}

/// Settings for traffic to a host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TrafficPolicy {
    /// How an endpoint is picked.
    pub load_balancer: Option<LoadBalancerSettings>,
    /// Connection limits.
    pub connection_pool: Option<ConnectionPoolSettings>,
    /// When an endpoint is taken out.
    pub outlier_detection: Option<OutlierDetection>,
    /// TLS to the endpoints.
    pub tls: Option<ClientTlsSettings>,
    /// Settings by Service port; an entry replaces the block above for its port.
    #[schemars(length(max = 4096))]
    pub port_level_settings: Vec<PortTrafficPolicy>,
    /// Tunnel through an HTTP proxy.
    pub tunnel: Option<TunnelSettings>,
    /// PROXY protocol to the endpoints.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Budget for retries.
    pub retry_budget: Option<RetryBudget>,
}

/// Settings for one Service port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PortTrafficPolicy {
    /// The port.
    pub port: Option<PortSelector>,
    /// How an endpoint is picked.
    pub load_balancer: Option<LoadBalancerSettings>,
    /// Connection limits.
    pub connection_pool: Option<ConnectionPoolSettings>,
    /// When an endpoint is taken out.
    pub outlier_detection: Option<OutlierDetection>,
    /// TLS to the endpoints.
    pub tls: Option<ClientTlsSettings>,
}

/// A port by number.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PortSelector {
    /// The number.
    pub number: u32,
}

/// How an endpoint is picked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancerSettings {
    /// A plain algorithm.
    pub simple: Option<SimpleLb>,
    /// Stickiness by a property of the request.
    pub consistent_hash: Option<ConsistentHashLb>,
    /// Preference by locality.
    pub locality_lb_setting: Option<LocalityLbSetting>,
    /// Ramp-up time of new endpoints (deprecated form of `warmup`).
    pub warmup_duration_secs: Option<Duration>,
    /// Ramp-up of new endpoints.
    pub warmup: Option<WarmupConfiguration>,
}

/// Plain load-balancing algorithms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum SimpleLb {
    /// Let the implementation choose.
    #[default]
    Unspecified,
    /// Old name of LEAST_REQUEST.
    LeastConn,
    /// At random.
    Random,
    /// To the original destination.
    Passthrough,
    /// In turn.
    RoundRobin,
    /// The less busy of two random ones.
    LeastRequest,
}

/// Stickiness by a property of the request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConsistentHashLb {
    /// Hash this header.
    pub http_header_name: Option<String>,
    /// Hash this cookie.
    pub http_cookie: Option<HttpCookie>,
    /// Hash the client's address.
    pub use_source_ip: Option<bool>,
    /// Hash this query parameter.
    pub http_query_parameter_name: Option<String>,
    /// Use a ring.
    pub ring_hash: Option<RingHash>,
    /// Use Maglev.
    pub maglev: Option<MagLev>,
    /// Ring size (deprecated, see `ringHash`).
    pub minimum_ring_size: Option<u64>,
}

/// A cookie for stickiness.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct HttpCookie {
    /// Its name.
    pub name: String,
    /// Its path.
    pub path: String,
    /// Its life; without one the cookie is never made.
    pub ttl: Option<Duration>,
    /// Further attributes of a cookie that is made.
    pub attributes: Vec<CookieAttribute>,
}

/// An attribute of a generated cookie.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CookieAttribute {
    /// Attribute name.
    pub name: String,
    /// Attribute value.
    pub value: String,
}

/// Ring hash parameters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RingHash {
    /// Least number of entries.
    pub minimum_ring_size: Option<u64>,
}

/// Maglev parameters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MagLev {
    /// Table size, a prime.
    pub table_size: Option<u64>,
}

/// Preference by locality.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalityLbSetting {
    /// Shares by client locality.
    pub distribute: Vec<LocalityDistribute>,
    /// Where traffic goes when a region fails.
    pub failover: Vec<LocalityFailover>,
    /// Labels compared in order.
    pub failover_priority: Vec<String>,
    /// On or off, overriding the mesh's setting.
    pub enabled: Option<bool>,
}

/// Shares for clients of one locality.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalityDistribute {
    /// Client locality `region/zone/subzone`.
    pub from: String,
    /// Percent by destination locality.
    pub to: BTreeMap<String, u32>,
}

/// Failover between regions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalityFailover {
    /// Failing region.
    pub from: String,
    /// Region that takes over.
    pub to: String,
}

/// Ramp-up of new endpoints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["duration"]))]
pub struct WarmupConfiguration {
    /// How long.
    pub duration: Option<Duration>,
    /// Starting share in percent.
    pub minimum_percent: Option<f64>,
    /// Shape of the ramp.
    pub aggression: Option<f64>,
}

/// Connection limits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ConnectionPoolSettings {
    /// For TCP and below HTTP.
    pub tcp: Option<TcpSettings>,
    /// For HTTP.
    pub http: Option<HttpSettings>,
}

/// TCP limits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpSettings {
    /// Most connections.
    pub max_connections: i32,
    /// Time to connect.
    pub connect_timeout: Option<Duration>,
    /// Keepalive probes.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Longest life of a connection.
    pub max_connection_duration: Option<Duration>,
    /// Longest silence on a connection.
    pub idle_timeout: Option<Duration>,
}

/// TCP keepalive.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpKeepalive {
    /// Unanswered probes before the connection is dead.
    pub probes: u32,
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
}

/// HTTP limits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpSettings {
    /// Requests waiting for a connection.
    pub http1_max_pending_requests: i32,
    /// Requests in flight.
    pub http2_max_requests: i32,
    /// Requests on one connection; 1 turns keep-alive off.
    pub max_requests_per_connection: i32,
    /// Retries in flight.
    pub max_retries: i32,
    /// Longest silence on an upstream connection.
    pub idle_timeout: Option<Duration>,
    /// Whether HTTP/1.1 is carried over HTTP/2.
    pub h2_upgrade_policy: H2UpgradePolicy,
    /// Keep the client's HTTP version.
    pub use_client_protocol: bool,
    /// Streams on one HTTP/2 connection.
    pub max_concurrent_streams: i32,
}

/// Whether HTTP/1.1 is carried over HTTP/2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum H2UpgradePolicy {
    /// As the mesh says.
    #[default]
    Default,
    /// No.
    DoNotUpgrade,
    /// Yes.
    Upgrade,
}

/// When an endpoint is taken out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct OutlierDetection {
    /// Deprecated counter.
    pub consecutive_errors: Option<i32>,
    /// Tell local failures from upstream ones.
    pub split_external_local_origin_errors: bool,
    /// Local failures in a row.
    pub consecutive_local_origin_failures: Option<u32>,
    /// 502, 503, 504 in a row.
    pub consecutive_gateway_errors: Option<u32>,
    /// Any 5xx in a row.
    #[serde(rename = "consecutive5xxErrors")]
    pub consecutive_5xx_errors: Option<u32>,
    /// Time between sweeps.
    pub interval: Option<Duration>,
    /// First time out.
    pub base_ejection_time: Option<Duration>,
    /// Most endpoints out at once, percent.
    pub max_ejection_percent: i32,
    /// Below this share of healthy endpoints detection is off.
    pub min_health_percent: i32,
}

/// TLS that clients use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientTlsSettings {
    /// Which.
    pub mode: ClientTlsMode,
    /// Own certificate file (MUTUAL).
    pub client_certificate: String,
    /// Own key file (MUTUAL).
    pub private_key: String,
    /// File with trusted roots.
    pub ca_certificates: String,
    /// Secret with the certificates instead of files.
    pub credential_name: String,
    /// Accepted names of the server; replaces the generated list.
    pub subject_alt_names: Vec<String>,
    /// Server name to send.
    pub sni: String,
    /// Do not check the server at all.
    pub insecure_skip_verify: Option<bool>,
    /// File with a revocation list.
    pub ca_crl: String,
}

/// TLS modes of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ClientTlsMode {
    /// None.
    #[default]
    Disable,
    /// Server authenticated only.
    Simple,
    /// Own certificate from files or a secret.
    Mutual,
    /// The mesh's certificates.
    IstioMutual,
}

/// A tunnel through an HTTP proxy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["targetHost", "targetPort"]))]
pub struct TunnelSettings {
    /// CONNECT or POST.
    pub protocol: String,
    /// Final host.
    pub target_host: String,
    /// Final port.
    pub target_port: u32,
}

/// PROXY protocol to the endpoints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyProtocol {
    /// Its version.
    pub version: ProxyProtocolVersion,
}

/// PROXY protocol versions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ProxyProtocolVersion {
    /// Text form.
    #[default]
    V1,
    /// Binary form.
    V2,
}

/// Budget for retries.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryBudget {
    /// Percent of active requests.
    pub percent: Option<f64>,
    /// Floor.
    pub min_retry_concurrency: u32,
}

/// Istio's rules for the kind.
pub(crate) fn validate(spec: &DestinationRule, namespace: &str, _raw: &Value) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    validate::wildcard_host(&spec.host, "spec.host", &mut findings);
    if let Some(policy) = &spec.traffic_policy {
        traffic_policy(policy, "spec.trafficPolicy", namespace, &mut findings);
    }
    let mut names = BTreeSet::new();
    for (i, subset) in spec.subsets.iter().enumerate() {
        let path = format!("spec.subsets[{i}]");
        if !crate::names::is_dns1123_label(&subset.name) {
            findings.push(Diagnostic::error(
                format!("{path}.name"),
                format!("subset name is invalid: {:?}", subset.name),
            ));
        }
        if !names.insert(&subset.name) {
            findings.push(Diagnostic::error(
                format!("{path}.name"),
                format!("duplicate subset names: {}", subset.name),
            ));
        }
        if let Some(policy) = &subset.traffic_policy {
            traffic_policy(policy, &format!("{path}.trafficPolicy"), namespace, &mut findings);
        }
    }
    findings.extend(validate::selector(
        spec.workload_selector.as_ref(),
        "spec.workloadSelector",
    ));
    validate::export_to(&spec.export_to, namespace, false, &mut findings);
    if spec.workload_selector.is_some() && spec.export_to.iter().any(|to| to != "." && to != namespace) {
        findings.push(Diagnostic::error(
            "spec.exportTo",
            "destination rule with workload selector cannot have exportTo beyond current namespace",
        ));
    }
    findings
}

fn traffic_policy(policy: &TrafficPolicy, path: &str, namespace: &str, findings: &mut Vec<Diagnostic>) {
    if *policy == TrafficPolicy::default() {
        findings.push(Diagnostic::error(path, "traffic policy must have at least one field"));
    }
    if let Some(tls) = &policy.tls {
        client_tls(tls, &format!("{path}.tls"), namespace, findings);
    }
    for (i, port) in policy.port_level_settings.iter().enumerate() {
        let path = format!("{path}.portLevelSettings[{i}]");
        if !port.port.as_ref().is_some_and(|p| (1..=65535).contains(&p.number)) {
            findings.push(Diagnostic::error(
                format!("{path}.port"),
                "portTrafficPolicy must have valid port",
            ));
        }
        if (PortTrafficPolicy {
            port: None,
            ..port.clone()
        }) == PortTrafficPolicy::default()
        {
            findings.push(Diagnostic::error(
                &path,
                "port traffic policy must have at least one field",
            ));
        }
        if let Some(tls) = &port.tls {
            client_tls(tls, &format!("{path}.tls"), namespace, findings);
        }
    }
}

fn client_tls(tls: &ClientTlsSettings, path: &str, namespace: &str, findings: &mut Vec<Diagnostic>) {
    let mut error = |message: &str| findings.push(Diagnostic::error(path, message));
    if tls.insecure_skip_verify == Some(true) {
        if tls.mode == ClientTlsMode::Simple {
            if !tls.ca_certificates.is_empty() || !tls.credential_name.is_empty() || !tls.subject_alt_names.is_empty() {
                error(
                    "cannot specify CA certificates, credential name or subject alternate names if InsecureSkipVerify is set",
                );
            }
        } else if tls.mode == ClientTlsMode::Mutual
            && (!tls.ca_certificates.is_empty() || !tls.subject_alt_names.is_empty())
        {
            error("cannot specify CA certificates or subject alternate names if InsecureSkipVerify is set");
        }
    }
    if let Some(rest) = tls.credential_name.strip_prefix("configmap://") {
        let config_map_namespace = rest.split_once('/').map_or(namespace, |(ns, _)| ns);
        if config_map_namespace != namespace {
            error("configmap:// credentialName must be in the namespace of the rule");
        }
    }
    let files = !tls.client_certificate.is_empty()
        || !tls.private_key.is_empty()
        || !tls.ca_certificates.is_empty()
        || !tls.ca_crl.is_empty();
    if matches!(tls.mode, ClientTlsMode::Simple | ClientTlsMode::Mutual) && !tls.credential_name.is_empty() && files {
        error("cannot specify client certificates or CA certificate or CA CRL If credentialName is set");
    }
    if tls.mode == ClientTlsMode::Mutual && tls.credential_name.is_empty() {
        if tls.client_certificate.is_empty() {
            error("client certificate required for mutual tls");
        }
        if tls.private_key.is_empty() {
            error("private key required for mutual tls");
        }
    }
}
