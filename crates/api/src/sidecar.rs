//! `Sidecar` (networking.istio.io): what one workload's proxy listens to and knows of the mesh (SEMANTICS 6e).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::destination_rule::ConnectionPoolSettings;
use crate::diagnostic::Diagnostic;
use crate::gateway::{ServerPort, ServerTlsSettings};
use crate::selector::LabelSelector;
use crate::virtual_service::Destination;

/// Specification of a Sidecar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Sidecar {
    /// Workloads it applies to, in its namespace.
    pub workload_selector: Option<LabelSelector>,
    /// Inbound listeners; replaces what Services imply.
    pub ingress: Vec<IngressListener>,
    /// Outbound listeners and the hosts known there.
    pub egress: Vec<EgressListener>,
    /// Limits for inbound connections.
    pub inbound_connection_pool: Option<ConnectionPoolSettings>,
    /// What happens to traffic to unknown destinations.
    pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
}

/// An inbound listener.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["port"]))]
pub struct IngressListener {
    /// The port.
    pub port: Option<SidecarPort>,
    /// Address to bind.
    pub bind: String,
    /// How traffic reaches it.
    pub capture_mode: CaptureMode,
    /// Where the app listens.
    pub default_endpoint: String,
    /// TLS that replaces mutual TLS of the mesh.
    pub tls: Option<ServerTlsSettings>,
    /// Limits.
    pub connection_pool: Option<ConnectionPoolSettings>,
}

/// An outbound listener.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["hosts"]))]
pub struct EgressListener {
    /// The port; absent: all.
    pub port: Option<SidecarPort>,
    /// Address to bind.
    pub bind: String,
    /// How traffic reaches it.
    pub capture_mode: CaptureMode,
    /// `namespace/dns` of the services known.
    pub hosts: Vec<String>,
}

/// A port of a listener. Unlike a gateway's, only the number is needed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SidecarPort {
    /// Number.
    pub number: u32,
    /// Protocol.
    pub protocol: String,
    /// Name.
    pub name: String,
    /// Without effect.
    pub target_port: u32,
}

impl From<SidecarPort> for ServerPort {
    fn from(port: SidecarPort) -> Self {
        Self {
            number: port.number,
            protocol: port.protocol,
            name: port.name,
            target_port: port.target_port,
        }
    }
}

/// How traffic reaches a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum CaptureMode {
    /// As the proxy is set up.
    #[default]
    Default,
    /// By redirection.
    Iptables,
    /// The app addresses it.
    None,
}

/// What happens to traffic to unknown destinations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct OutboundTrafficPolicy {
    /// Which.
    pub mode: OutboundTrafficMode,
    /// Where unknown traffic is sent instead.
    pub egress_proxy: Option<Destination>,
}

/// What happens to traffic to unknown destinations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundTrafficMode {
    /// Refuse.
    RegistryOnly,
    /// Let it go where it was going.
    #[default]
    AllowAny,
    /// Resolve unknown HTTP hosts at request time (mesh-wide setting only).
    AllowAnyDynamicDns,
}

/// Istio's rules for the kind that concern safety (S8.55).
pub(crate) fn validate(spec: &Sidecar, namespace: &str, _raw: &serde_json::Value) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    if *spec == Sidecar::default() {
        findings.push(Diagnostic::error("spec", "sidecar: empty configuration provided"));
    }
    // The root namespace is a setting of the mesh; this is its value everywhere it was not changed.
    if namespace == "istio-system" && spec.workload_selector.is_some() {
        findings.push(Diagnostic::warning(
            "spec.workloadSelector",
            "sidecar: a Sidecar in the root namespace is the default of the mesh, its workloadSelector selects only workloads of this namespace",
        ));
    }
    let mut ports = std::collections::BTreeSet::new();
    for (i, listener) in spec.ingress.iter().enumerate() {
        let path = format!("spec.ingress[{i}]");
        match &listener.port {
            None => findings.push(Diagnostic::error(
                &path,
                "sidecar: port is required for ingress listeners",
            )),
            Some(port) => {
                if !(1..=65535).contains(&port.number) {
                    findings.push(Diagnostic::error(
                        format!("{path}.port.number"),
                        format!("port number {} must be in the range 1..65535", port.number),
                    ));
                }
                if !ports.insert(port.number) {
                    findings.push(Diagnostic::error(
                        format!("{path}.port.number"),
                        format!(
                            "sidecar: ports on IP bound listeners must be unique: port {} is duplicated",
                            port.number
                        ),
                    ));
                }
            }
        }
        if let Some(tls) = &listener.tls {
            let is_tls = listener
                .port
                .as_ref()
                .is_some_and(|port| matches!(port.protocol.to_ascii_uppercase().as_str(), "HTTPS" | "TLS"));
            ingress_tls(tls, is_tls, &format!("{path}.tls"), &mut findings);
        }
        let endpoint = listener.default_endpoint.as_str();
        if !endpoint.is_empty() && !endpoint.starts_with("unix://") {
            let host = endpoint.rsplit_once(':').map_or(endpoint, |(host, _)| host);
            if !matches!(host, "127.0.0.1" | "0.0.0.0" | "[::1]" | "[::]") {
                findings.push(Diagnostic::error(
                    format!("{path}.defaultEndpoint"),
                    "sidecar: defaultEndpoint must be of form 127.0.0.1:<port>, 0.0.0.0:<port>, [::1]:port, [::]:port, or unix://filepath",
                ));
            }
        }
    }
    for (i, listener) in spec.egress.iter().enumerate() {
        let path = format!("spec.egress[{i}].hosts");
        if listener.port.is_none() && i + 1 < spec.egress.len() {
            findings.push(Diagnostic::error(
                format!("spec.egress[{i}]"),
                "sidecar: the egress listener with empty port should be the last listener in the list",
            ));
        }
        if listener.hosts.len() > 1 && listener.hosts.iter().any(|host| host == "*/*") {
            findings.push(Diagnostic::warning(
                &path,
                "`*/*` host select all resources, no other hosts can be added",
            ));
        }
        if listener.hosts.is_empty() {
            findings.push(Diagnostic::error(
                &path,
                "sidecar: egress listener must contain at least one host",
            ));
        }
        for host in &listener.hosts {
            let plain = host
                .strip_prefix('~')
                .filter(|rest| !rest.is_empty() && *rest != "/*")
                .unwrap_or(host);
            if !plain.contains('/') {
                findings.push(Diagnostic::error(
                    &path,
                    format!("sidecar: host must be of form namespace/dnsName: {host:?}"),
                ));
            }
        }
    }
    if spec
        .outbound_traffic_policy
        .as_ref()
        .is_some_and(|p| p.mode == OutboundTrafficMode::AllowAnyDynamicDns)
    {
        findings.push(Diagnostic::error(
            "spec.outboundTrafficPolicy.mode",
            "sidecar: ALLOW_ANY_DYNAMIC_DNS is only supported mesh-wide",
        ));
    }
    findings
}

/// TLS of an inbound listener (S8.55): the sidecar has files only, and mutual TLS of the mesh is not a setting here.
fn ingress_tls(tls: &ServerTlsSettings, is_tls: bool, path: &str, findings: &mut Vec<Diagnostic>) {
    use crate::gateway::ServerTlsMode as Mode;
    let mut error = |message: &str| findings.push(Diagnostic::error(path, format!("sidecar: {message}")));
    if !is_tls {
        error("server cannot have TLS settings for non HTTPS/TLS ports");
    }
    if matches!(tls.mode, Mode::IstioMutual | Mode::AutoPassthrough) {
        error("tls mode ISTIO_MUTUAL or AUTO_PASSTHROUGH is not supported for ingress listeners");
    }
    if tls.https_redirect {
        error("httpsRedirect is not supported");
    }
    if !tls.credential_name.is_empty() || !tls.credential_names.is_empty() {
        error("credentialName is not currently supported");
    }
    if !tls.tls_certificates.is_empty() {
        error("tlsCertificates is not supported");
    }
    if !tls.subject_alt_names.is_empty() {
        error("subjectAltNames is not supported");
    }
}
