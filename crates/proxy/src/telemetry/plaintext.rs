//! Who connects to this workload without mutual TLS: addresses and ports, for the report on readiness for STRICT.
//!
//! Metrics cannot tell: a caller without sidecar has no name there. One entry per address and port, bounded; touched once per
//! plaintext connection, never for requests. Operators read it through the admin port.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

/// Most callers that are told apart.
const MAX_CALLERS: usize = 1024;

/// Plaintext callers since the start of the proxy.
#[derive(Debug, Default)]
pub struct Plaintext {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    connections: HashMap<(IpAddr, u16), u64>,
    /// Connections of callers that there was no room for.
    others: u64,
}

impl Plaintext {
    /// A connection from `source` to a port of the workload.
    pub fn remember(&self, source: SocketAddr, port: u16) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (source.ip(), port);
        if let Some(count) = state.connections.get_mut(&key) {
            *count += 1;
        } else if state.connections.len() < MAX_CALLERS {
            state.connections.insert(key, 1);
        } else {
            state.others += 1;
        }
    }

    /// All callers, by address and port.
    pub fn all(&self) -> Value {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut callers: Vec<_> = state.connections.iter().collect();
        callers.sort();
        let callers: Vec<Value> = callers
            .into_iter()
            .map(|((ip, port), connections)| json!({"ip": ip, "port": port, "connections": connections}))
            .collect();
        json!({"callers": callers, "others": state.others})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_and_counted() {
        let seen = Plaintext::default();
        let from = |n: u32| SocketAddr::new(IpAddr::from(n.to_be_bytes()), 40000);
        for n in 0..2000 {
            seen.remember(from(n), 80);
        }
        seen.remember(from(1), 80);
        let all = seen.all();
        assert_eq!(all["callers"].as_array().map(Vec::len), Some(MAX_CALLERS));
        assert_eq!(
            all["callers"][1],
            json!({"ip": "0.0.0.1", "port": 80, "connections": 2})
        );
        assert_eq!(all["others"], 2000 - MAX_CALLERS);
    }
}
