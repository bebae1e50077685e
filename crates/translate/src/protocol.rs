//! Which protocol a port speaks, by its declaration (SEMANTICS 6d).
//!
//! Called by `world` for every port it reads. It knows names only; bytes are inspected by the proxy.

use serde::{Deserialize, Serialize};

/// Protocol of a port, as far as the mesh treats ports differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// HTTP/1.1 (`http`, `grpc-web`, `kubernetes.io/ws`).
    Http,
    /// HTTP/2 with prior knowledge (`http2`, `kubernetes.io/h2c`).
    Http2,
    /// gRPC; HTTP/2 with its own defaults.
    Grpc,
    /// Opaque bytes (`tcp`, `mongo`, `mysql`, `redis`).
    Tcp,
    /// TLS that the mesh does not terminate (`https`, `tls`, `kubernetes.io/wss`).
    Tls,
    /// Not declared: the proxy inspects the first bytes.
    Auto,
    /// Never captured.
    Udp,
}

impl Protocol {
    /// Protocol of a Kubernetes Service port (S6.40–S6.43).
    pub fn of_service_port(transport: Option<&str>, app_protocol: Option<&str>, name: Option<&str>, port: u16) -> Self {
        if matches!(transport, Some("UDP" | "SCTP")) {
            return Protocol::Udp;
        }
        if let Some(app) = app_protocol.filter(|a| !a.is_empty()) {
            // An unknown appProtocol is inspected, even where the name says otherwise (S6.42).
            return match app.to_ascii_lowercase().as_str() {
                "kubernetes.io/h2c" => Protocol::Http2,
                "kubernetes.io/ws" => Protocol::Http,
                "kubernetes.io/wss" => Protocol::Tls,
                known => Self::by_name(known).unwrap_or(Protocol::Auto),
            };
        }
        let name = name.unwrap_or_default().to_ascii_lowercase();
        if let Some(found) = Self::by_prefix(&name) {
            return found;
        }
        match port {
            25 | 53 | 3306 | 27017 => Protocol::Tcp,
            _ => Protocol::Auto,
        }
    }

    /// Protocol field of a ServiceEntry or Gateway port; unknown values are inspected.
    pub fn of_declared(protocol: &str, name: &str) -> Self {
        if protocol.is_empty() {
            return Self::by_prefix(&name.to_ascii_lowercase()).unwrap_or(Protocol::Auto);
        }
        Self::by_name(&protocol.to_ascii_lowercase()).unwrap_or(Protocol::Auto)
    }

    fn by_prefix(name: &str) -> Option<Self> {
        if name == "grpc-web" || name.starts_with("grpc-web-") {
            return Some(Protocol::Http);
        }
        Self::by_name(name.split('-').next().unwrap_or_default())
    }

    fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "http" | "grpc-web" => Protocol::Http,
            "http2" => Protocol::Http2,
            "grpc" => Protocol::Grpc,
            "https" | "tls" => Protocol::Tls,
            "tcp" | "mongo" | "mysql" | "redis" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return None,
        })
    }

    /// HTTP by declaration.
    pub fn is_http(self) -> bool {
        matches!(self, Protocol::Http | Protocol::Http2 | Protocol::Grpc)
    }

    /// HTTP by declaration, or possibly after inspection.
    pub fn may_be_http(self) -> bool {
        self.is_http() || self == Protocol::Auto
    }

    /// Whether requests go upstream as HTTP/2.
    pub fn is_http2(self) -> bool {
        matches!(self, Protocol::Http2 | Protocol::Grpc)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declared_names_and_app_protocols() {
        let by_name = |name, port| Protocol::of_service_port(Some("TCP"), None, Some(name), port);
        for (name, port, want) in [
            ("http", 80, Protocol::Http),
            ("HTTP-web", 80, Protocol::Http),
            ("http-foo", 80, Protocol::Http),
            ("httpfoo", 80, Protocol::Auto),
            ("http2-x", 80, Protocol::Http2),
            ("grpc", 80, Protocol::Grpc),
            ("grpc-web-x", 80, Protocol::Http),
            ("https", 443, Protocol::Tls),
            ("tls-x", 443, Protocol::Tls),
            ("tcp-x", 9000, Protocol::Tcp),
            ("mysql", 1, Protocol::Tcp),
            ("web", 80, Protocol::Auto),
            ("", 3306, Protocol::Tcp),
            ("dns-tcp", 53, Protocol::Tcp),
            ("http-db", 3306, Protocol::Http),
        ] {
            assert_eq!(by_name(name, port), want, "{name}:{port}");
        }
        let by_app = |app, name| Protocol::of_service_port(Some("TCP"), Some(app), Some(name), 80);
        assert_eq!(by_app("kubernetes.io/h2c", "tcp"), Protocol::Http2);
        assert_eq!(by_app("kubernetes.io/wss", "http"), Protocol::Tls);
        assert_eq!(
            by_app("my.org/proto", "http"),
            Protocol::Auto,
            "unknown appProtocol beats the name"
        );
        assert_eq!(
            Protocol::of_service_port(Some("UDP"), Some("http"), None, 80),
            Protocol::Udp
        );
    }
}
