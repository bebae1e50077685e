//! Decisions over all authorization filters of a chain.

use super::{AuthzFilter, Connection, HttpView};

/// Compiled authorization of one chain.
#[derive(Debug)]
pub struct Engine {
    filters: Vec<AuthzFilter>,
}

/// Result of a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision<'e> {
    /// Allowed or denied.
    pub verdict: Verdict,
    /// The rule that decided; `None` for an ALLOW filter without a match and for "no policy".
    pub rule: Option<&'e str>,
    /// Whether an AUDIT rule matched.
    pub audited: bool,
}

/// Outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on.
    Allowed,
    /// Ends with 403 or a closed connection.
    Denied,
}

impl Engine {
    /// Compiles the filters of a chain.
    pub fn new(filters: &[AuthzFilter]) -> Engine {
        Engine {
            filters: filters.to_vec(),
        }
    }

    /// Decides about a request (`http` given) or a connection.
    pub fn decide(&self, _connection: &Connection<'_>, _http: Option<&dyn HttpView>) -> Decision<'_> {
        let verdict = if self.filters.is_empty() {
            Verdict::Allowed
        } else {
            Verdict::Denied
        };
        Decision {
            verdict,
            rule: None,
            audited: false,
        }
    }
}
