//! Listeners and the choice of a filter chain.
//!
//! The truth tables of SEMANTICS 1c are expressed by [`ChainMatch`] alone: a chain names the destination port, the
//! transport and the application protocols that it wants, and [`Listener::choose`] picks the most specific one, in
//! Envoy's order of criteria. The proxy calls `choose` for every connection; tests and `explain` call the same function.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::authz::AuthzFilter;
use crate::ext_authz::CustomStage;
use crate::http::HttpManager;
use crate::names::Direction;
use crate::tls::ServerTls;

/// One listener (`envoy.config.listener.v3.Listener`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listener {
    /// Resource name.
    pub name: String,
    /// Address; only bound when `bind_to_port`, else connections are handed over by the capture listener.
    pub address: SocketAddr,
    /// Whether a socket is opened.
    pub bind_to_port: bool,
    /// Whether connections are handed to the listener of their original destination (`virtualOutbound`).
    pub use_original_dst: bool,
    /// Which way its traffic flows.
    pub direction: Direction,
    /// Filter chains; the order carries no meaning, names are unique.
    pub chains: Vec<FilterChain>,
    /// Chain for connections that match no other.
    pub default_chain: Option<FilterChain>,
    /// Destination ports on which the first bytes are not inspected for TLS.
    pub tls_inspector: Inspector,
    /// Destination ports on which plaintext bytes are not inspected for HTTP.
    pub http_inspector: Inspector,
    /// How long detection waits for bytes, in milliseconds; 0 waits without limit (S1.46).
    pub detection_timeout_ms: u64,
    /// Where finished connections and requests are logged.
    pub access_log: Option<AccessLog>,
}

/// Whether a protocol inspector runs on a listener, and where it is switched off (S1.43, S1.44).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Inspector {
    /// Never runs.
    #[default]
    Off,
    /// Runs on every destination port except these (sorted, unique).
    Except(Vec<u16>),
}

impl Inspector {
    /// Whether the inspector looks at connections to this destination port.
    pub fn covers(&self, port: u16) -> bool {
        match self {
            Inspector::Off => false,
            Inspector::Except(ports) => ports.binary_search(&port).is_err(),
        }
    }
}

/// Transport found by the TLS inspector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Transport {
    /// No TLS ClientHello (`raw_buffer`), or the inspector did not run.
    Raw,
    /// A TLS ClientHello (`tls`).
    Tls,
}

/// What a filter chain wants; an absent criterion accepts everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainMatch {
    /// Original destination port.
    pub destination_port: Option<u16>,
    /// Original destination address ranges; empty accepts all.
    pub destination_ranges: Vec<IpNet>,
    /// Server names of the ClientHello: exact, or `*.suffix`; empty accepts all.
    pub server_names: Vec<String>,
    /// Transport protocol.
    pub transport: Option<Transport>,
    /// Application protocols: ALPN of the ClientHello, or `http/1.1` / `h2c` from the HTTP inspector; empty accepts all.
    pub application_protocols: Vec<String>,
}

/// What inspection learned about a new connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionFacts<'a> {
    /// Original destination.
    pub destination: SocketAddr,
    /// Transport protocol.
    pub transport: Transport,
    /// Server name of the ClientHello, lower case.
    pub server_name: Option<&'a str>,
    /// Application protocols found.
    pub application_protocols: &'a [String],
}

/// A filter chain: match, transport, filters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FilterChain {
    /// Name, unique in its listener.
    pub name: String,
    /// When it is chosen.
    pub matches: ChainMatch,
    /// TLS termination; `None` takes the bytes as they are.
    pub tls: Option<ServerTls>,
    /// What happens to the bytes.
    pub filters: Filters,
}

/// The work of a chain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Filters {
    /// HTTP connection manager.
    Http(Box<HttpManager>),
    /// TCP proxy.
    Tcp(TcpManager),
}

/// TCP chains: network authorization, then bytes to one cluster (S2.24).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TcpManager {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// CUSTOM authorization, in order, on the first byte; gRPC providers only (S2.146).
    pub custom: Vec<CustomStage>,
    /// Authorization filters in order; each acts on the first byte (S2.97).
    pub authz: Vec<AuthzFilter>,
    /// Cluster that receives the bytes.
    pub cluster: String,
    /// Idle timeout in milliseconds; `None` is the default of one hour, 0 disables it.
    pub idle_timeout_ms: Option<u64>,
    /// Whether Istio's TCP metrics are reported.
    pub telemetry: bool,
}

/// Access log to a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AccessLog {
    /// Path; `/dev/stdout` is the container's log.
    pub path: String,
    /// Text with `%COMMAND%` operators, ends with a newline; empty is Istio's default format.
    pub format: String,
    /// JSON fields instead of text, sorted by name (the wire has no other order); empty uses `format`.
    pub json: Vec<(String, String)>,
}

impl Listener {
    /// The chain for a connection, by Envoy's order of criteria: destination port, destination address (longest
    /// prefix), server name (longest), transport, application protocol. At each step the more specific group of chains
    /// hides the less specific one, without backtracking: a port that has chains of its own never falls back to
    /// the catch-all chains. `None` means that the connection is refused (reset, S1.42), unless a default chain exists.
    pub fn choose(&self, facts: &ConnectionFacts<'_>) -> Option<&FilterChain> {
        let mut candidates: Vec<&FilterChain> = self.chains.iter().collect();

        let port = facts.destination.port();
        narrow(&mut candidates, |c| match c.matches.destination_port {
            Some(p) if p == port => Some(1),
            Some(_) => None,
            None => Some(0),
        });
        let ip = facts.destination.ip();
        narrow(&mut candidates, |c| prefix_score(&c.matches.destination_ranges, ip));
        narrow(&mut candidates, |c| {
            server_name_score(&c.matches.server_names, facts.server_name)
        });
        narrow(&mut candidates, |c| match c.matches.transport {
            Some(t) if t == facts.transport => Some(1),
            Some(_) => None,
            None => Some(0),
        });
        narrow(&mut candidates, |c| {
            let wanted = &c.matches.application_protocols;
            if wanted.is_empty() {
                Some(0)
            } else if wanted.iter().any(|w| facts.application_protocols.contains(w)) {
                Some(1)
            } else {
                None
            }
        });
        candidates.first().copied().or(self.default_chain.as_ref())
    }

    /// All chains, the default one last.
    pub fn all_chains(&self) -> impl Iterator<Item = &FilterChain> {
        self.chains.iter().chain(self.default_chain.as_ref())
    }
}

impl ChainMatch {
    /// Whether the chain is for this server name (lower case); one without names is for all.
    pub fn serves(&self, name: &str) -> bool {
        server_name_score(&self.server_names, Some(name)).is_some()
    }
}

/// Keeps the candidates with the best score; drops those without one.
fn narrow<'a>(candidates: &mut Vec<&'a FilterChain>, score: impl Fn(&'a FilterChain) -> Option<usize>) {
    let best = candidates.iter().filter_map(|c| score(c)).max();
    candidates.retain(|c| best.is_some() && score(c) == best);
}

fn prefix_score(ranges: &[IpNet], ip: IpAddr) -> Option<usize> {
    if ranges.is_empty() {
        return Some(0);
    }
    ranges
        .iter()
        .filter(|r| r.contains(&ip))
        .map(|r| usize::from(r.prefix_len()) + 1)
        .max()
}

fn server_name_score(wanted: &[String], name: Option<&str>) -> Option<usize> {
    if wanted.is_empty() {
        return Some(0);
    }
    let name = name?;
    wanted
        .iter()
        .filter_map(|w| match w.strip_prefix('*') {
            None if w == name => Some(usize::MAX),
            // `*.example.com` wants at least one character before the dot.
            Some(suffix) if name.len() > suffix.len() && name.ends_with(suffix) => Some(suffix.len() + 1),
            _ => None,
        })
        .max()
}

#[cfg(test)]
mod tests;
