//! A request as a value: what is asked about when nobody sends it.
//!
//! Explanations, table tests and analyses build one; the proxy has its own view over what it received.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Attribute, Connection, HttpView};

/// A connection, and a request on it if `http` is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The peer's identity; `None` for plaintext.
    pub peer: Vec<String>,
    /// Address of the TCP peer.
    pub source: IpAddr,
    /// Address of the client by forwarding headers.
    pub remote: IpAddr,
    /// Original destination: the workload's port.
    pub destination: SocketAddr,
    /// Server name of the ClientHello.
    pub sni: Option<String>,
    /// The request; `None` for bytes.
    pub http: Option<HttpSample>,
}

/// The HTTP part of a [`Sample`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HttpSample {
    /// Method.
    pub method: String,
    /// `:authority`.
    pub host: String,
    /// Path, in normal form and without query.
    pub path: String,
    /// Headers: lower-case name, value.
    pub headers: Vec<(String, String)>,
    /// Payload of a verified token.
    pub claims: Option<Value>,
}

impl Default for HttpSample {
    fn default() -> Self {
        HttpSample {
            method: "GET".into(),
            host: String::new(),
            path: "/".into(),
            headers: Vec::new(),
            claims: None,
        }
    }
}

impl Default for Sample {
    fn default() -> Self {
        let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Sample {
            peer: Vec::new(),
            source: nowhere,
            remote: nowhere,
            destination: SocketAddr::new(nowhere, 0),
            sni: None,
            http: None,
        }
    }
}

impl Sample {
    /// The connection, as the engine takes it.
    pub fn connection(&self) -> Connection<'_> {
        Connection {
            peer_uris: &self.peer,
            source: self.source,
            remote: self.remote,
            destination: self.destination,
            sni: self.sni.as_deref(),
        }
    }

    /// The request, as the engine takes it.
    pub fn view(&self) -> Option<&dyn HttpView> {
        self.http.as_ref().map(|h| h as &dyn HttpView)
    }

    /// What an attribute is here, for people: several values are separated by commas, `None` is absent.
    pub fn shown(&self, attribute: &Attribute) -> Option<String> {
        let http = self.http.as_ref();
        let some = |s: &str| Some(s.to_string());
        match attribute {
            Attribute::PeerUri
            | Attribute::PeerNamespace
            | Attribute::PeerServiceAccount
            | Attribute::PeerTrustDomain => {
                let uri = self.peer.first()?;
                let plain = uri.strip_prefix("spiffe://").unwrap_or(uri);
                let parts: Vec<&str> = plain.split('/').collect();
                match (attribute, parts.as_slice()) {
                    (Attribute::PeerNamespace, [_, "ns", ns, ..]) => some(ns),
                    (Attribute::PeerServiceAccount, [_, "ns", ns, "sa", sa]) => Some(format!("{ns}/{sa}")),
                    (Attribute::PeerTrustDomain, [td, ..]) => some(td),
                    _ => some(plain),
                }
            }
            Attribute::SourceIp => Some(self.source.to_canonical().to_string()),
            Attribute::RemoteIp => Some(self.remote.to_canonical().to_string()),
            Attribute::DestinationIp => Some(self.destination.ip().to_canonical().to_string()),
            Attribute::DestinationPort => Some(self.destination.port().to_string()),
            Attribute::Sni => self.sni.clone(),
            Attribute::Host => some(&http?.host),
            Attribute::Method => some(&http?.method),
            Attribute::Path => some(&http?.path),
            Attribute::Header(name) => {
                let mut values = Vec::new();
                http?.any_header(&name.to_ascii_lowercase(), &mut |v| {
                    values.push(String::from_utf8_lossy(v).into_owned());
                    false
                });
                (!values.is_empty()).then(|| values.join(", "))
            }
            Attribute::Claim(path) => {
                let found = path.iter().try_fold(http?.claims.as_ref()?, |v, key| v.get(key))?;
                Some(match found {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                })
            }
            Attribute::Metadata(..) => None,
        }
    }
}

impl HttpView for HttpSample {
    fn method(&self) -> &str {
        &self.method
    }
    fn authority(&self) -> &str {
        &self.host
    }
    fn path(&self) -> &str {
        &self.path
    }
    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        match name {
            ":authority" | "host" => f(self.host.as_bytes()),
            ":method" => f(self.method.as_bytes()),
            _ => self
                .headers
                .iter()
                .filter(|(n, _)| n.eq_ignore_ascii_case(name))
                .any(|(_, v)| f(v.as_bytes())),
        }
    }
    fn claims(&self) -> Option<&Value> {
        self.claims.as_ref()
    }
}
