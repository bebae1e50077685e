//! MeshConfig: the mesh-wide settings in key `mesh` of ConfigMap `istio` (YAML).
//!
//! `translate` and `control` read it, `cli install` writes it. Unknown fields are ignored, as Istio does; [`MeshConfig::read`]
//! reports them as warnings. Rules: S8.57.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::destination_rule::{H2UpgradePolicy, LocalityLbSetting, TcpKeepalive};
use crate::diagnostic::{Code, Diagnostic, Severity};
use crate::duration::Duration;
use crate::gateway::TlsProtocol;
use crate::proxy_config::ProxyConfig;
use crate::sidecar::OutboundTrafficMode;
use crate::virtual_service::HttpRetry;
use crate::{crd, names, yaml};

/// Name of the ConfigMap that holds the mesh configuration.
pub const CONFIG_MAP: &str = "istio";
/// Key in that ConfigMap.
pub const CONFIG_KEY: &str = "mesh";

/// Mesh-wide settings. [`Default`] is what a mesh without any configuration does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshConfig {
    /// Namespace whose policies apply to the whole mesh.
    pub root_namespace: String,
    /// Trust domain of identities. `@` becomes `.` (S1.91), see [`MeshConfig::trust_domain`].
    pub trust_domain: String,
    /// Former names of the trust domain.
    pub trust_domain_aliases: Vec<String>,
    /// Mutual TLS between workloads that can, without being told.
    pub enable_auto_mtls: Option<bool>,
    /// File of the access log; empty is none, `/dev/stdout` is usual.
    pub access_log_file: String,
    /// Format of the access log; empty is the default one.
    pub access_log_format: String,
    /// TEXT or JSON.
    pub access_log_encoding: AccessLogEncoding,
    /// Access log to a gRPC service.
    pub enable_envoy_access_log_service: bool,
    /// No access log for listeners that are not for services.
    pub disable_envoy_listener_log: bool,
    /// What happens to traffic to unknown destinations.
    pub outbound_traffic_policy: MeshOutboundTrafficPolicy,
    /// How traffic reaches the app.
    pub inbound_traffic_policy: InboundTrafficPolicy,
    /// How request paths are normalised before policy sees them.
    pub path_normalization: PathNormalization,
    /// How long to wait for a connection's first bytes when its protocol is not declared; 0 has no end.
    pub protocol_detection_timeout: Option<Duration>,
    /// Defaults of every proxy.
    pub default_config: ProxyConfig,
    /// TLS between workloads.
    #[serde(rename = "meshMTLS")]
    pub mesh_mtls: Option<MeshTlsConfig>,
    /// TLS to others.
    pub tls_defaults: Option<MeshTlsConfig>,
    /// External deciders, tracers and loggers, by name.
    pub extension_providers: Vec<ExtensionProvider>,
    /// Providers used where a Telemetry names none.
    pub default_providers: Option<DefaultProviders>,
    /// Who sees a service that does not say.
    pub default_service_export_to: Vec<String>,
    /// Who sees a VirtualService that does not say.
    pub default_virtual_service_export_to: Vec<String>,
    /// Who sees a DestinationRule that does not say.
    pub default_destination_rule_export_to: Vec<String>,
    /// Roots and, with `trustDomains`, foreign trust domains.
    pub ca_certificates: Vec<CaCertificate>,
    /// Signers by certificate.
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub certificates: Vec<Value>,
    /// Further certificate authority.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub ca: Option<Value>,
    /// Namespaces the mesh looks at; empty is all.
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub discovery_selectors: Vec<Value>,
    /// Port of an outbound HTTP proxy listener.
    pub proxy_http_port: i32,
    /// Port of the outbound listener.
    pub proxy_listen_port: i32,
    /// Port of the inbound listener.
    pub proxy_inbound_listen_port: i32,
    /// Time to connect.
    pub connect_timeout: Duration,
    /// TCP keepalive to destinations.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Ingress class served.
    pub ingress_class: String,
    /// Gateway Service used for Ingress.
    pub ingress_service: String,
    /// Gateway selector used for Ingress.
    pub ingress_selector: String,
    /// Whether Ingress is served.
    pub ingress_controller_mode: String,
    /// Whether traces are on.
    pub enable_tracing: bool,
    /// Merge app metrics with the proxy's.
    pub enable_prometheus_merge: Option<bool>,
    /// Verify certificates at the client by default.
    pub verify_certificate_at_client: Option<bool>,
    /// HTTP/1.1 over HTTP/2 between proxies.
    pub h2_upgrade_policy: H2UpgradePolicy,
    /// Preference by locality.
    pub locality_lb_setting: Option<LocalityLbSetting>,
    /// Retries of HTTP routes that say nothing.
    pub default_http_retry_policy: Option<HttpRetry>,
    /// Retries of inbound routes.
    pub default_inbound_http_retry_policy: Option<HttpRetry>,
    /// How often DNS is asked.
    pub dns_refresh_rate: Option<Duration>,
    /// Name pattern of inbound statistics.
    pub inbound_cluster_stat_name: String,
    /// Name pattern of outbound statistics.
    pub outbound_cluster_stat_name: String,
    /// Sources of configuration other than the API server; not supported.
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub config_sources: Vec<Value>,
    /// Settings by service.
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub service_settings: Vec<Value>,
    /// Which Service scopes are global (multi-cluster).
    #[schemars(schema_with = "crate::crd::opaque_list")]
    pub service_scope_configs: Vec<Value>,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            root_namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            enable_auto_mtls: Some(true),
            access_log_file: String::new(),
            access_log_format: String::new(),
            access_log_encoding: AccessLogEncoding::default(),
            enable_envoy_access_log_service: false,
            disable_envoy_listener_log: false,
            outbound_traffic_policy: MeshOutboundTrafficPolicy::default(),
            inbound_traffic_policy: InboundTrafficPolicy::default(),
            path_normalization: PathNormalization::default(),
            protocol_detection_timeout: None,
            default_config: ProxyConfig::default(),
            mesh_mtls: None,
            tls_defaults: None,
            extension_providers: Vec::new(),
            default_providers: None,
            default_service_export_to: vec!["*".into()],
            default_virtual_service_export_to: vec!["*".into()],
            default_destination_rule_export_to: vec!["*".into()],
            ca_certificates: Vec::new(),
            certificates: Vec::new(),
            ca: None,
            discovery_selectors: Vec::new(),
            proxy_http_port: 0,
            proxy_listen_port: 15001,
            proxy_inbound_listen_port: 15006,
            connect_timeout: Duration::from_secs(10),
            tcp_keepalive: None,
            ingress_class: "istio".into(),
            ingress_service: "istio-ingressgateway".into(),
            ingress_selector: "ingressgateway".into(),
            ingress_controller_mode: "STRICT".into(),
            enable_tracing: true,
            enable_prometheus_merge: Some(true),
            verify_certificate_at_client: None,
            h2_upgrade_policy: H2UpgradePolicy::default(),
            locality_lb_setting: None,
            default_http_retry_policy: None,
            default_inbound_http_retry_policy: None,
            dns_refresh_rate: None,
            inbound_cluster_stat_name: String::new(),
            outbound_cluster_stat_name: String::new(),
            config_sources: Vec::new(),
            service_settings: Vec::new(),
            service_scope_configs: Vec::new(),
        }
    }
}

/// How the access log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum AccessLogEncoding {
    /// One line of text.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

/// What happens to traffic to unknown destinations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshOutboundTrafficPolicy {
    /// Which.
    pub mode: OutboundTrafficMode,
}

/// How traffic reaches the app.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct InboundTrafficPolicy {
    /// Which.
    pub mode: InboundTrafficMode,
}

/// How traffic reaches the app.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum InboundTrafficMode {
    /// On the address it was sent to.
    #[default]
    Passthrough,
    /// On 127.0.0.1.
    Localhost,
}

/// How request paths are normalised.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PathNormalization {
    /// Which.
    pub normalization: NormalizationType,
}

impl PathNormalization {
    /// The effective type: DEFAULT is BASE (S2.110).
    pub fn effective(&self) -> NormalizationType {
        match self.normalization {
            NormalizationType::Default => NormalizationType::Base,
            other => other,
        }
    }
}

/// How request paths are normalised (SEMANTICS 2h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum NormalizationType {
    /// BASE.
    #[default]
    Default,
    /// Not at all.
    None,
    /// RFC 3986, and backslashes become slashes.
    Base,
    /// Also merge slashes.
    MergeSlashes,
    /// Also decode escaped slashes first.
    DecodeAndMergeSlashes,
}

/// TLS settings of the mesh.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshTlsConfig {
    /// Lowest version.
    pub min_protocol_version: TlsProtocol,
    /// Curves; only for `tlsDefaults`.
    pub ecdh_curves: Vec<String>,
    /// TLS 1.2 ciphers.
    pub cipher_suites: Vec<String>,
}

/// Roots beyond the mesh's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CaCertificate {
    /// As PEM.
    pub pem: Option<String>,
    /// At a SPIFFE bundle endpoint.
    pub spiffe_bundle_url: Option<String>,
    /// Signers they are for.
    pub cert_signers: Vec<String>,
    /// Trust domains they are for.
    pub trust_domains: Vec<String>,
}

/// Providers used where a Telemetry names none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DefaultProviders {
    /// Traces.
    pub tracing: Vec<String>,
    /// Metrics.
    pub metrics: Vec<String>,
    /// Access logs.
    pub access_logging: Vec<String>,
}

/// An external decider, tracer or logger. One of the fields beside the name is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionProvider {
    /// Its name.
    pub name: String,
    /// Decider over HTTP.
    pub envoy_ext_authz_http: Option<ExtAuthzHttp>,
    /// Decider over gRPC.
    pub envoy_ext_authz_grpc: Option<ExtAuthzGrpc>,
    /// Log to a file.
    #[schemars(schema_with = "crate::crd::opaque")]
    pub envoy_file_access_log: Option<Value>,
    /// Any other kind, by its field name.
    #[serde(flatten)]
    #[schemars(skip)]
    pub other: BTreeMap<String, Value>,
}

/// A decider over HTTP (S2k).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtAuthzHttp {
    /// Its host, `[namespace/]host`.
    pub service: String,
    /// Its port.
    pub port: u32,
    /// Time for an answer.
    pub timeout: Option<Duration>,
    /// Prefix of the path it is asked with.
    pub path_prefix: String,
    /// Admit when it cannot be reached.
    pub fail_open: bool,
    /// Forget routes after it changed headers.
    pub clear_route_cache: bool,
    /// Status when it cannot be reached.
    pub status_on_error: String,
    /// Old name of `includeRequestHeadersInCheck`.
    pub include_headers_in_check: Vec<String>,
    /// Headers it is shown.
    pub include_request_headers_in_check: Vec<String>,
    /// Headers added for it.
    pub include_additional_headers_in_check: BTreeMap<String, String>,
    /// Body it is shown.
    pub include_request_body_in_check: Option<RequestBody>,
    /// Its headers that go to the app.
    pub headers_to_upstream_on_allow: Vec<String>,
    /// Its headers that go to the client on refusal.
    pub headers_to_downstream_on_deny: Vec<String>,
    /// Its headers that go to the client on admission.
    pub headers_to_downstream_on_allow: Vec<String>,
}

/// A decider over gRPC.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtAuthzGrpc {
    /// Its host, `[namespace/]host`.
    pub service: String,
    /// Its port.
    pub port: u32,
    /// Time for an answer.
    pub timeout: Option<Duration>,
    /// Admit when it cannot be reached.
    pub fail_open: bool,
    /// Forget routes after it changed headers.
    pub clear_route_cache: bool,
    /// Status when it cannot be reached.
    pub status_on_error: String,
    /// Body it is shown.
    pub include_request_body_in_check: Option<RequestBody>,
}

/// How much of a body a decider is shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RequestBody {
    /// Most bytes.
    pub max_request_bytes: u32,
    /// Show the first part of longer ones.
    pub allow_partial_message: bool,
    /// As bytes instead of text.
    pub pack_as_bytes: bool,
}

impl MeshConfig {
    /// Reads the YAML of key `mesh`. Fields that are set replace the default ones; objects are merged.
    ///
    /// Unknown fields come back as warnings. An error means that nothing may be taken from the text: the caller keeps the
    /// last good configuration.
    pub fn read(text: &str) -> Result<(Self, Vec<Diagnostic>), Diagnostic> {
        let value = yaml::read_one(text)
            .map_err(|e| Diagnostic::new(Code::DECODE, Severity::Error, "", format!("mesh config: {e}")))?;
        Self::from_value(value)
    }

    /// As [`MeshConfig::read`], from a parsed value.
    pub fn from_value(value: Value) -> Result<(Self, Vec<Diagnostic>), Diagnostic> {
        let mut value = match value {
            Value::Null => Value::Object(Default::default()),
            other => other,
        };
        crate::object::drop_nulls(&mut value);
        let unknown = crd::unknown_fields(&value, crd::mesh_config_schema(), "");
        if let Some((path, message)) = crd::shape_error(&value, crd::mesh_config_schema(), "") {
            return Err(Diagnostic::new(
                Code::DECODE,
                Severity::Error,
                path,
                format!("mesh config: {message}"),
            ));
        }
        let config: Self = serde_path_to_error::deserialize(value).map_err(|e| {
            Diagnostic::new(
                Code::DECODE,
                Severity::Error,
                e.path().to_string(),
                format!("mesh config: {}", e.inner()),
            )
        })?;
        let mut findings = config.validate();
        if let Some(at) = findings.iter().position(|f| f.severity == Severity::Error) {
            return Err(findings.swap_remove(at));
        }
        findings.extend(unknown.into_iter().map(|mut f| {
            f.severity = Severity::Warning;
            f
        }));
        Ok((config, findings))
    }

    /// The trust domain as it stands in identities (S1.91).
    pub fn trust_domain(&self) -> String {
        self.trust_domain.replace('@', ".")
    }

    /// Mutual TLS between workloads that can; on unless switched off.
    pub fn auto_mtls(&self) -> bool {
        self.enable_auto_mtls.unwrap_or(true)
    }

    /// Istio's rules. A bad extension provider is a warning: it fails closed where it is used.
    pub fn validate(&self) -> Vec<Diagnostic> {
        let mut findings = Vec::new();
        for (field, domain) in std::iter::once(("trustDomain", &self.trust_domain)).chain(
            self.trust_domain_aliases
                .iter()
                .map(|alias| ("trustDomainAliases", alias)),
        ) {
            let shown = domain.replace('@', ".");
            if shown.is_empty() {
                findings.push(Diagnostic::error(
                    field,
                    format!("{field}: empty domain name not allowed"),
                ));
            } else if shown
                .split('.')
                .any(|label| !names::is_dns1123_label(&label.to_ascii_lowercase()))
            {
                findings.push(Diagnostic::error(
                    field,
                    format!("{field}: {domain:?} is invalid, its labels must be DNS-1123 labels"),
                ));
            }
        }
        if !names::is_dns1123_label(&self.root_namespace) {
            findings.push(Diagnostic::error(
                "rootNamespace",
                format!("rootNamespace: {:?} is no namespace name", self.root_namespace),
            ));
        }
        if self.mesh_mtls.as_ref().is_some_and(|tls| !tls.ecdh_curves.is_empty()) {
            findings.push(Diagnostic::error(
                "meshMTLS.ecdhCurves",
                "mesh TLS does not support ECDH curves configuration",
            ));
        }
        let mut seen = BTreeSet::new();
        for (i, provider) in self.extension_providers.iter().enumerate() {
            let path = format!("extensionProviders[{i}]");
            if provider.name.is_empty() {
                findings.push(Diagnostic::warning(&path, "extension provider: empty name"));
            } else if !seen.insert(&provider.name) {
                findings.push(Diagnostic::warning(
                    &path,
                    format!("duplicate extension provider name {}", provider.name),
                ));
            }
            let target = match (&provider.envoy_ext_authz_http, &provider.envoy_ext_authz_grpc) {
                (Some(http), None) => Some((
                    &http.service,
                    http.port,
                    &http.status_on_error,
                    http.path_prefix.as_str(),
                )),
                (None, Some(grpc)) => Some((&grpc.service, grpc.port, &grpc.status_on_error, "")),
                (Some(_), Some(_)) => {
                    findings.push(Diagnostic::warning(
                        &path,
                        "extension provider: only one kind can be set",
                    ));
                    None
                }
                (None, None) => None,
            };
            let Some((service, port, status, prefix)) = target else {
                continue;
            };
            if service.is_empty() {
                findings.push(Diagnostic::warning(
                    format!("{path}.service"),
                    "service must not be empty",
                ));
            }
            if !(1..=65535).contains(&port) {
                findings.push(Diagnostic::warning(
                    format!("{path}.port"),
                    format!("invalid service port {port}"),
                ));
            }
            if !status.is_empty() && !status.parse::<u16>().is_ok_and(|code| (100..600).contains(&code)) {
                findings.push(Diagnostic::warning(
                    format!("{path}.statusOnError"),
                    format!("invalid statusOnError value {status}"),
                ));
            }
            if !prefix.is_empty() && !prefix.starts_with('/') {
                findings.push(Diagnostic::warning(
                    format!("{path}.pathPrefix"),
                    "pathPrefix must start with \"/\"",
                ));
            }
        }
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_is_default() {
        let (config, findings) = MeshConfig::read("").unwrap();
        assert_eq!(config, MeshConfig::default());
        assert!(findings.is_empty());
        assert!(config.auto_mtls());
        assert_eq!(config.path_normalization.effective(), NormalizationType::Base);
    }

    #[test]
    fn fields_merge_into_defaults() {
        let (config, findings) = MeshConfig::read(
            "accessLogFile: /dev/stdout\ntrustDomain: td@x.org\nmeshMTLS: {minProtocolVersion: TLSV1_3}\n\
             defaultConfig:\n  holdApplicationUntilProxyStarts: true\n  proxyMetadata: {A: b}\n\
             outboundTrafficPolicy: {mode: REGISTRY_ONLY}\nprotocolDetectionTimeout: 100ms\n",
        )
        .unwrap();
        assert!(findings.is_empty(), "{findings:?}");
        assert_eq!(config.trust_domain(), "td.x.org");
        assert_eq!(config.mesh_mtls.unwrap().min_protocol_version, TlsProtocol::V1_3);
        assert_eq!(config.default_config.status_port, 15020);
        assert_eq!(config.default_config.hold_application_until_proxy_starts, Some(true));
        assert_eq!(config.outbound_traffic_policy.mode, OutboundTrafficMode::RegistryOnly);
    }

    #[test]
    fn unknown_field_is_a_warning_with_hint() {
        let (_, findings) = MeshConfig::read("acessLogFile: x\n").unwrap();
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].severity, Severity::Warning);
        assert!(findings[0].to_string().contains("accessLogFile"), "{}", findings[0]);
    }

    #[test]
    fn refused() {
        for (text, part) in [
            ("trustDomain: 'a b'", "trustDomain"),
            ("meshMTLS: {ecdhCurves: [P-256]}", "ECDH"),
            ("outboundTrafficPolicy: {mode: SOMETIMES}", "SOMETIMES"),
            ("connectTimeout: 5", "connectTimeout"),
            ("- a", "mesh config"),
            ("a: [", "mesh config"),
        ] {
            let error = MeshConfig::read(text).unwrap_err();
            let shown = format!("{} {}", error.path, error.message);
            assert!(shown.contains(part), "{text}: {shown}");
        }
    }

    #[test]
    fn bad_provider_is_a_warning() {
        let (config, findings) = MeshConfig::read(
            "extensionProviders:\n- name: x\n  envoyExtAuthzHttp: {service: '', port: 70000, pathPrefix: a}\n- name: zip\n  zipkin: {service: z, port: 1}\n",
        )
        .unwrap();
        assert_eq!(findings.len(), 3, "{findings:?}");
        assert!(config.extension_providers[1].other.contains_key("zipkin"));
    }
}
