//! TLS contexts as data. The proxy turns them into rustls configurations; this module holds no key material.

use serde::{Deserialize, Serialize};

/// Lowest TLS version that a context accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TlsVersion {
    /// TLS 1.2 and newer (Istio's default, S1.21).
    #[default]
    V1_2,
    /// TLS 1.3 only.
    V1_3,
}

/// How one subject alternative name of a peer is compared.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SanMatch {
    /// The URI is exactly this (a client's list of expected servers, S1.86).
    Exact(String),
    /// The URI starts so (a server's trust domains, S1.25).
    Prefix(String),
}

impl SanMatch {
    /// Whether a URI SAN satisfies this matcher.
    pub fn matches(&self, uri: &str) -> bool {
        match self {
            SanMatch::Exact(want) => uri == want,
            SanMatch::Prefix(want) => uri.starts_with(want.as_str()),
        }
    }
}

/// What a terminating filter chain presents and demands (`DownstreamTlsContext`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServerTls {
    /// SDS name of the certificate and key (`default` for the workload's SVID).
    pub certificate: String,
    /// SDS name of the trust bundle for client certificates; `None` asks for none.
    pub trust_bundle: Option<String>,
    /// Accepted client SANs; any match is enough, empty accepts every verified chain.
    pub client_sans: Vec<SanMatch>,
    /// Whether a handshake without a client certificate fails (S1.20).
    pub require_client_certificate: bool,
    /// ALPN values offered, by preference.
    pub alpn: Vec<String>,
    /// Lowest accepted version.
    pub min_version: TlsVersion,
    /// TLS 1.2 cipher suites by OpenSSL name; empty means the library's default list (S1.22).
    pub ciphers: Vec<String>,
}

/// What an upstream connection presents and demands (`UpstreamTlsContext`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClientTls {
    /// SDS name of the client certificate; `None` for one-way TLS.
    pub certificate: Option<String>,
    /// SDS name of the trust bundle for server certificates; `None` verifies nothing (`insecureSkipVerify`).
    pub trust_bundle: Option<String>,
    /// Accepted server SANs; empty checks the chain only (S1.89).
    pub server_sans: Vec<SanMatch>,
    /// SNI to send.
    pub sni: String,
    /// ALPN values offered, by preference.
    pub alpn: Vec<String>,
    /// Lowest accepted version.
    pub min_version: TlsVersion,
}
