//! Mesh-wide settings, reduced to what translation reads.
//!
//! Made once from the mesh configuration; every field has Istio's default, so that a missing ConfigMap gives a working mesh.

use mantlet_api::MeshConfig;
use mantlet_api::gateway::TlsProtocol;
use mantlet_api::mesh_config::{AccessLogEncoding, ExtensionProvider, InboundTrafficMode, NormalizationType};
use mantlet_api::sidecar::OutboundTrafficMode;
use mantlet_model::http::PathNormalization;
use mantlet_model::listener::AccessLog;
use mantlet_model::tls::TlsVersion;

/// Settings of the mesh.
#[derive(Clone, Debug, PartialEq)]
pub struct Mesh {
    /// Namespace whose policies are mesh-wide.
    pub root_namespace: String,
    /// Trust domain of identities.
    pub trust_domain: String,
    /// Other names of the same trust domain.
    pub trust_domain_aliases: Vec<String>,
    /// Trust domains of additional trust anchors (`caCertificates[].trustDomains`).
    pub foreign_trust_domains: Vec<String>,
    /// Cluster domain.
    pub domain: String,
    /// Cluster id.
    pub cluster: String,
    /// Whether clients choose mTLS by themselves (`enableAutoMtls`).
    pub auto_mtls: bool,
    /// Whether unknown destinations are reachable (`outboundTrafficPolicy` ALLOW_ANY).
    pub allow_any: bool,
    /// Connect timeout of clusters, milliseconds.
    pub connect_timeout_ms: u64,
    /// How long detection waits, milliseconds; 0 is without limit (S1.46).
    pub detection_timeout_ms: u64,
    /// Access log of all proxies.
    pub access_log: Option<AccessLog>,
    /// Lowest TLS version of the mesh.
    pub min_tls: TlsVersion,
    /// Who sees a DestinationRule without `exportTo` (`defaultDestinationRuleExportTo`).
    pub default_rule_export: Vec<String>,
    /// TLS 1.2 ciphers of servers; empty is Istio's list (S1.22).
    pub ciphers: Vec<String>,
    /// Path normalisation.
    pub normalization: PathNormalization,
    /// Whether applications are reached at their pod address (`inboundTrafficPolicy` PASSTHROUGH) or at 127.0.0.1.
    pub inbound_passthrough: bool,
    /// Trusted proxies in front of gateways.
    pub gateway_trusted_hops: u32,
    /// External authorizers and others, by name; the first use of a name that occurs twice is no better than the second.
    pub providers: Vec<ExtensionProvider>,
    /// Whether policies may name several external authorizers for one workload (istiod's
    /// `PILOT_ENABLE_MULTIPLE_CUSTOM_AUTHZ_PROVIDERS`, S2.143).
    pub multiple_custom_providers: bool,
}

impl Default for Mesh {
    fn default() -> Self {
        Mesh {
            root_namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            foreign_trust_domains: Vec::new(),
            domain: "cluster.local".into(),
            cluster: "Kubernetes".into(),
            auto_mtls: true,
            allow_any: true,
            connect_timeout_ms: 10_000,
            detection_timeout_ms: 0,
            access_log: None,
            min_tls: TlsVersion::V1_2,
            default_rule_export: vec!["*".into()],
            ciphers: Vec::new(),
            normalization: PathNormalization::Base,
            inbound_passthrough: true,
            gateway_trusted_hops: 0,
            providers: Vec::new(),
            multiple_custom_providers: false,
        }
    }
}

impl Mesh {
    /// Reads the mesh configuration.
    pub fn from_config(config: &MeshConfig) -> Mesh {
        let defaults = Mesh::default();
        let millis = |d: mantlet_api::Duration| u64::try_from(d.0.as_millis()).unwrap_or(u64::MAX);
        let clean = |domain: &String| domain.replace('@', ".");
        let mesh_tls = config.mesh_mtls.as_ref();
        Mesh {
            root_namespace: config.root_namespace.clone(),
            trust_domain: config.trust_domain(),
            trust_domain_aliases: config.trust_domain_aliases.iter().map(clean).collect(),
            foreign_trust_domains: config
                .ca_certificates
                .iter()
                .flat_map(|c| &c.trust_domains)
                .map(clean)
                .collect(),
            auto_mtls: config.auto_mtls(),
            allow_any: config.outbound_traffic_policy.mode != OutboundTrafficMode::RegistryOnly,
            connect_timeout_ms: millis(config.connect_timeout),
            detection_timeout_ms: config.protocol_detection_timeout.map_or(0, millis),
            access_log: access_log(config),
            min_tls: match mesh_tls.map(|t| t.min_protocol_version) {
                Some(TlsProtocol::V1_3) => TlsVersion::V1_3,
                _ => TlsVersion::V1_2,
            },
            default_rule_export: config.default_destination_rule_export_to.clone(),
            ciphers: mesh_tls.map(|t| t.cipher_suites.clone()).unwrap_or_default(),
            normalization: match config.path_normalization.effective() {
                NormalizationType::None => PathNormalization::None,
                NormalizationType::Default | NormalizationType::Base => PathNormalization::Base,
                NormalizationType::MergeSlashes => PathNormalization::MergeSlashes,
                NormalizationType::DecodeAndMergeSlashes => PathNormalization::DecodeAndMergeSlashes,
            },
            inbound_passthrough: config.inbound_traffic_policy.mode == InboundTrafficMode::Passthrough,
            gateway_trusted_hops: config
                .default_config
                .gateway_topology
                .as_ref()
                .map(|t| t.num_trusted_proxies)
                .unwrap_or_default(),
            providers: config.extension_providers.clone(),
            ..defaults
        }
    }

    /// The trust domain and its aliases, the trust domain first.
    pub fn trust_domains(&self) -> Vec<&str> {
        let mut out = vec![self.trust_domain.as_str()];
        for alias in &self.trust_domain_aliases {
            if !out.contains(&alias.as_str()) {
                out.push(alias);
            }
        }
        out
    }

    /// Trust domains whose identities servers accept (S1.25).
    pub fn accepted_trust_domains(&self) -> Vec<&str> {
        let mut out = self.trust_domains();
        for foreign in &self.foreign_trust_domains {
            if !out.contains(&foreign.as_str()) {
                out.push(foreign);
            }
        }
        out
    }
}

fn access_log(config: &MeshConfig) -> Option<AccessLog> {
    if config.access_log_file.is_empty() {
        return None;
    }
    let mut format = config.access_log_format.clone();
    let mut json = Vec::new();
    if config.access_log_encoding == AccessLogEncoding::Json {
        json = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&format)
            .map(|fields| {
                fields
                    .into_iter()
                    .filter_map(|(name, value)| Some((name, value.as_str()?.to_string())))
                    .collect()
            })
            .unwrap_or_default();
        format.clear();
        if json.is_empty() {
            json = DEFAULT_JSON
                .iter()
                .map(|(n, v)| (n.to_string(), v.to_string()))
                .collect();
        }
    } else if !format.is_empty() && !format.ends_with('\n') {
        format.push('\n');
    }
    Some(AccessLog {
        path: config.access_log_file.clone(),
        format,
        json,
    })
}

/// Fields of Istio's default JSON access log.
const DEFAULT_JSON: [(&str, &str); 24] = [
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    (
        "upstream_transport_failure_reason",
        "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    ),
];
