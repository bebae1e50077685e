//! `Gateway` (networking.istio.io): ports, hosts and TLS of a load balancer at the edge of the mesh.
//!
//! Rules of the kind: S8.53 and S8.54.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnostic::Diagnostic;
use crate::validate;

/// Specification of a Gateway.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Gateway {
    /// Listening ports.
    pub servers: Vec<Server>,
    /// Labels of the gateway pods that serve it, in any namespace.
    pub selector: BTreeMap<String, String>,
}

/// One port with its hosts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["port", "hosts"]))]
pub struct Server {
    /// The port.
    pub port: Option<ServerPort>,
    /// Address to bind instead of any.
    pub bind: String,
    /// Hosts served, `[namespace/]dns`; `*` allowed.
    pub hosts: Vec<String>,
    /// TLS of the port.
    pub tls: Option<ServerTlsSettings>,
    /// Unused by gateways.
    pub default_endpoint: String,
    /// Its name, for logs.
    pub name: String,
}

/// A port of a gateway or of a Sidecar's listener.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["number", "protocol", "name"]))]
pub struct ServerPort {
    /// Number as clients use it (the Service's).
    pub number: u32,
    /// HTTP, HTTPS, GRPC, GRPC-WEB, HTTP2, MONGO, REDIS, MYSQL, TCP or TLS.
    pub protocol: String,
    /// Its name.
    pub name: String,
    /// Deprecated, without effect.
    pub target_port: u32,
}

/// TLS of a server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ServerTlsSettings {
    /// Answer plaintext HTTP with 301 to HTTPS.
    pub https_redirect: bool,
    /// How TLS is handled.
    pub mode: ServerTlsMode,
    /// Certificate file.
    pub server_certificate: String,
    /// Key file.
    pub private_key: String,
    /// File with roots for client certificates.
    pub ca_certificates: String,
    /// File with a revocation list.
    pub ca_crl: String,
    /// Secret with certificate and key (and roots) in the gateway's namespace.
    pub credential_name: String,
    /// Several secrets, one per key type.
    pub credential_names: Vec<String>,
    /// Secret with the roots for client certificates only.
    pub ca_cert_credential_name: String,
    /// Several certificate files, one per key type.
    pub tls_certificates: Vec<TlsCertificate>,
    /// Accepted names of clients.
    pub subject_alt_names: Vec<String>,
    /// Accepted hashes of client keys.
    pub verify_certificate_spki: Vec<String>,
    /// Accepted hashes of client certificates.
    pub verify_certificate_hash: Vec<String>,
    /// Lowest TLS version.
    pub min_protocol_version: TlsProtocol,
    /// Highest TLS version.
    pub max_protocol_version: TlsProtocol,
    /// TLS 1.2 ciphers.
    pub cipher_suites: Vec<String>,
}

/// A certificate in files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TlsCertificate {
    /// Certificate file.
    pub server_certificate: String,
    /// Key file.
    pub private_key: String,
    /// File with roots for client certificates.
    pub ca_certificates: String,
}

/// How a server handles TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ServerTlsMode {
    /// Forward TLS by its server name.
    #[default]
    Passthrough,
    /// Terminate.
    Simple,
    /// Terminate and ask for a client certificate.
    Mutual,
    /// Forward by the mesh's own server names.
    AutoPassthrough,
    /// Terminate with the mesh's certificates.
    IstioMutual,
    /// Terminate; a client certificate is checked if sent.
    OptionalMutual,
}

/// TLS versions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TlsProtocol {
    /// The implementation's default.
    #[default]
    #[serde(rename = "TLS_AUTO")]
    Auto,
    /// 1.0
    #[serde(rename = "TLSV1_0")]
    V1_0,
    /// 1.1
    #[serde(rename = "TLSV1_1")]
    V1_1,
    /// 1.2
    #[serde(rename = "TLSV1_2")]
    V1_2,
    /// 1.3
    #[serde(rename = "TLSV1_3")]
    V1_3,
}

/// Protocols a gateway port may declare.
const PROTOCOLS: [&str; 10] = [
    "HTTP", "HTTPS", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "REDIS", "MYSQL", "TCP", "TLS",
];

impl ServerPort {
    /// True for protocols that are TLS on the wire.
    pub fn is_tls(&self) -> bool {
        matches!(self.protocol.to_ascii_uppercase().as_str(), "HTTPS" | "TLS")
    }
}

/// Istio's rules for the kind.
pub(crate) fn validate(spec: &Gateway, _namespace: &str, _raw: &Value) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    if spec.servers.is_empty() {
        findings.push(Diagnostic::error(
            "spec.servers",
            "gateway must have at least one server",
        ));
    }
    let mut names = BTreeSet::new();
    for (i, server) in spec.servers.iter().enumerate() {
        let path = format!("spec.servers[{i}]");
        if server.hosts.is_empty() {
            findings.push(Diagnostic::error(
                format!("{path}.hosts"),
                "server config must contain at least one host",
            ));
        }
        for (h, host) in server.hosts.iter().enumerate() {
            gateway_host(host, &format!("{path}.hosts[{h}]"), &mut findings);
        }
        if !server.default_endpoint.is_empty() {
            findings.push(Diagnostic::error(
                format!("{path}.defaultEndpoint"),
                "unexpected defaultEndpoint in gateway server",
            ));
        }
        let Some(port) = &server.port else {
            findings.push(Diagnostic::error(format!("{path}.port"), "port is required"));
            continue;
        };
        if !(1..=65535).contains(&port.number) {
            findings.push(Diagnostic::error(
                format!("{path}.port.number"),
                format!("port number {} must be in the range 1..65535", port.number),
            ));
        }
        if port.name.is_empty() {
            findings.push(Diagnostic::error(format!("{path}.port.name"), "port name must be set"));
        } else if !names.insert(&port.name) {
            findings.push(Diagnostic::error(
                format!("{path}.port.name"),
                format!("port names in servers must be unique: duplicate name {}", port.name),
            ));
        }
        let protocol = port.protocol.to_ascii_uppercase();
        if !PROTOCOLS.contains(&protocol.as_str()) {
            let hint = crate::diagnostic::did_you_mean(&port.protocol, PROTOCOLS);
            findings.push(
                Diagnostic::error(
                    format!("{path}.port.protocol"),
                    format!(
                        "invalid protocol {:?}, supported protocols are {}",
                        port.protocol,
                        PROTOCOLS.join(", ")
                    ),
                )
                .with_hint(hint),
            );
        }
        if port.target_port != 0 {
            findings.push(Diagnostic::warning(
                format!("{path}.port.targetPort"),
                "targetPort has no impact on Gateways",
            ));
        }
        match &server.tls {
            None if port.is_tls() => findings.push(Diagnostic::error(
                format!("{path}.tls"),
                "server must have TLS settings for HTTPS/TLS protocols",
            )),
            Some(tls) if !port.is_tls() => {
                let only_redirect = ServerTlsSettings {
                    https_redirect: tls.https_redirect,
                    ..Default::default()
                };
                let is_http = matches!(protocol.as_str(), "HTTP" | "HTTP2" | "GRPC" | "GRPC-WEB");
                if *tls != only_redirect || !is_http {
                    findings.push(Diagnostic::error(
                        format!("{path}.tls"),
                        "server cannot have TLS settings for non HTTPS/TLS protocols",
                    ));
                }
            }
            Some(tls) => server_tls(tls, &format!("{path}.tls"), &mut findings),
            None => {}
        }
    }
    findings
}

fn gateway_host(host: &str, path: &str, findings: &mut Vec<Diagnostic>) {
    let dns = match host.split_once('/') {
        Some((namespace, dns)) => {
            if namespace != "." && namespace != "*" && !crate::names::is_dns1123_label(namespace) {
                findings.push(Diagnostic::error(
                    path,
                    format!("invalid namespace {namespace:?} in host {host:?}"),
                ));
            }
            dns
        }
        None => host,
    };
    if dns == "*" {
        return;
    }
    if dns.parse::<std::net::IpAddr>().is_ok() {
        return;
    }
    validate::wildcard_host(dns, path, findings);
    if !dns.contains('.') && !dns.is_empty() {
        findings.push(Diagnostic::error(
            path,
            format!("short names (non FQDN) are not allowed: {dns:?}"),
        ));
    }
}

/// TLS 1.2 cipher suites by the names that Envoy gives them, and the group name it takes.
const CIPHERS: [&str; 18] = [
    "ALL",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-SHA",
    "ECDHE-RSA-AES128-SHA",
    "ECDHE-ECDSA-AES256-SHA",
    "ECDHE-RSA-AES256-SHA",
    "AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-SHA",
    "AES256-SHA",
    "DES-CBC3-SHA",
    "ECDHE-PSK-AES128-CBC-SHA",
    "ECDHE-PSK-AES256-CBC-SHA",
];

fn server_tls(tls: &ServerTlsSettings, path: &str, findings: &mut Vec<Diagnostic>) {
    use ServerTlsMode as Mode;
    let files = !tls.server_certificate.is_empty() || !tls.private_key.is_empty();
    let sources = [
        !tls.credential_name.is_empty(),
        !tls.credential_names.is_empty(),
        files,
        !tls.tls_certificates.is_empty(),
    ];
    let count = sources.iter().filter(|set| **set).count();
    let mut error = |message: String| findings.push(Diagnostic::error(path, message));
    if tls.mode == Mode::IstioMutual
        && (count > 0
            || !tls.ca_certificates.is_empty()
            || !tls.ca_crl.is_empty()
            || !tls.ca_cert_credential_name.is_empty())
    {
        error("ISTIO_MUTUAL TLS cannot have certificates or keys configured".into());
    }
    if count > 1 && tls.mode != Mode::IstioMutual {
        error("only one of credential_name, credential_names, server_certificate/private_key, tls_certificates should be specified".into());
    }
    let terminates = matches!(tls.mode, Mode::Simple | Mode::Mutual | Mode::OptionalMutual);
    let name = match tls.mode {
        Mode::Simple => "SIMPLE",
        Mode::Mutual => "MUTUAL",
        Mode::OptionalMutual => "OPTIONAL_MUTUAL",
        Mode::IstioMutual => "ISTIO_MUTUAL",
        Mode::Passthrough => "PASSTHROUGH",
        Mode::AutoPassthrough => "AUTO_PASSTHROUGH",
    };
    let by_secret = !tls.credential_name.is_empty() || !tls.credential_names.is_empty();
    if terminates && !by_secret {
        if tls.tls_certificates.is_empty() {
            if tls.server_certificate.is_empty() {
                error(format!("{name} TLS requires a server certificate"));
            }
            if tls.private_key.is_empty() {
                error(format!("{name} TLS requires a private key"));
            }
        }
        if tls.mode != Mode::Simple
            && tls.ca_certificates.is_empty()
            && tls.ca_cert_credential_name.is_empty()
            && tls.tls_certificates.iter().all(|c| c.ca_certificates.is_empty())
        {
            error(format!("{name} TLS requires a client CA bundle"));
        }
    }
    if !tls.ca_crl.is_empty() {
        if by_secret {
            error("CRL is not supported with credentialName. CRL has to be specified in the credential".into());
        } else if tls.mode == Mode::Simple {
            error("CRL is not supported with SIMPLE TLS".into());
        }
    }
    if tls.min_protocol_version != TlsProtocol::Auto
        && tls.max_protocol_version != TlsProtocol::Auto
        && tls.min_protocol_version > tls.max_protocol_version
    {
        error("minProtocolVersion must not be above maxProtocolVersion".into());
    }
    let mut warning = |message: String| findings.push(Diagnostic::warning(path, message));
    if !terminates && tls.mode != Mode::IstioMutual && count > 0 {
        warning(format!("{name} mode does not use certificates, they will be ignored"));
    }
    if tls.credential_names.len() > 2 || tls.tls_certificates.len() > 2 {
        warning("at most two certificates, one RSA and one ECDSA, are used; the rest will be ignored".into());
    }
    let mut seen = BTreeSet::new();
    for cipher in &tls.cipher_suites {
        if !CIPHERS.contains(&cipher.as_str()) {
            warning(format!("ignoring invalid cipher suite: {cipher}"));
        } else if !seen.insert(cipher) {
            warning(format!("ignoring duplicate cipher suite: {cipher}"));
        }
    }
    if matches!(tls.min_protocol_version, TlsProtocol::V1_0 | TlsProtocol::V1_1) {
        warning("TLS version below TLSV1_2 require setting compatible ciphers and is not recommended".into());
    }
}
