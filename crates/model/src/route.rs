//! Route tables: virtual hosts, matches and actions.
//!
//! [`CompiledRoutes::select`] is the one route decision: the proxy compiles each table once and asks per request, with
//! the normalised path; `explain` and tests ask [`RouteTable::select`], which compiles on the way.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use compiled::CompiledRoutes;
pub use on_demand::{HostIndex, MAX_AUTHORITY, VirtualHostName};

mod compiled;
mod on_demand;

/// A route table (`RouteConfiguration`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouteTable {
    /// Resource name: `80`, `<fqdn>:<port>`, `http.8080`, `inbound|3000||` (S6.3).
    pub name: String,
    /// Virtual hosts; domains are unique over the table. Shared: the tables of all namespaces have most of them in common.
    pub hosts: Vec<Arc<VirtualHost>>,
    /// Whether a port in `Host` is ignored when a virtual host is looked up (S6.28).
    pub ignore_port_in_host: bool,
    /// Whether further virtual hosts are asked for by name (Envoy's `vhds`): a host that is not here is unknown, not absent.
    #[serde(default)]
    pub on_demand: bool,
}

/// A virtual host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VirtualHost {
    /// `<fqdn>:<port>`, `allow_any`, `block_all`, `inbound|http|<port>` (S6.4).
    pub name: String,
    /// Exact names, `*.suffix`, `prefix.*` or `*`; lower case.
    pub domains: Vec<String>,
    /// Routes; the first that matches is taken.
    pub routes: Vec<Route>,
    /// Whether `x-envoy-attempt-count` is added to requests (S6.68).
    pub attempt_count: bool,
}

/// One route.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Route {
    /// Name in access logs (`default`, or the VirtualService route's).
    pub name: String,
    /// When it is taken.
    pub matches: RouteMatch,
    /// What is done.
    pub action: RouteAction,
    /// Operation name of traces (`host:port/*`).
    pub decorator: String,
    /// Headers set on the request: name, value, whether it is appended to an existing value.
    pub request_headers: Vec<HeaderChange>,
    /// Headers changed on the response.
    pub response_headers: Vec<HeaderChange>,
}

/// A change of one header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HeaderChange {
    /// Replaces all values.
    Set(String, String),
    /// Adds a value.
    Add(String, String),
    /// Removes all values.
    Remove(String),
}

/// Conditions on a request; all must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouteMatch {
    /// Condition on the path without query.
    pub path: PathMatch,
    /// Conditions on headers.
    pub headers: Vec<HeaderMatch>,
    /// Conditions on query parameters.
    pub query: Vec<(String, StringMatch)>,
    /// Conditions on claims of the verified token (S3.80–S3.84).
    pub claims: Vec<ClaimMatch>,
}

/// Condition on a claim. A request without a verified token has no claims.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimMatch {
    /// Names from the outside inwards; not empty.
    pub path: Vec<String>,
    /// Condition on the string, or on any string of a list; `None` is presence of whatever value.
    pub value: Option<StringMatch>,
    /// Whether the condition must not hold.
    pub invert: bool,
}

/// Condition on the path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PathMatch {
    /// Starts so.
    Prefix(String),
    /// Starts so at a segment boundary (`/a` matches `/a` and `/a/b`, not `/ab`).
    SegmentPrefix(String),
    /// Equal.
    Exact(String),
    /// Full match of an RE2 expression.
    Regex(String),
}

impl Default for PathMatch {
    fn default() -> Self {
        PathMatch::Prefix("/".into())
    }
}

/// Condition on a header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderMatch {
    /// Name, lower case; `:method`, `:authority`, `:scheme` are pseudo headers.
    pub name: String,
    /// Condition on the value; `None` is presence.
    pub value: Option<StringMatch>,
    /// Whether the condition must not hold.
    pub invert: bool,
}

/// Condition on a string.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// Starts so.
    Prefix(String),
    /// Full match of an RE2 expression.
    Regex(String),
}

/// What a route does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RouteAction {
    /// Forwards to one of the clusters, by weight.
    Forward(Forward),
    /// Answers at once.
    Respond {
        /// Status code.
        status: u16,
        /// Body.
        body: String,
    },
    /// Redirects.
    Redirect(Redirect),
}

/// Forwarding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forward {
    /// Clusters with their weights; one entry has weight 100 by convention. Not empty.
    pub clusters: Vec<(String, u32)>,
    /// Replaces the matched prefix of the path.
    pub prefix_rewrite: Option<String>,
    /// Replaces the host.
    pub host_rewrite: Option<String>,
    /// Whole-request timeout in milliseconds; 0 disables it.
    pub timeout_ms: u64,
    /// Retries.
    pub retry: Option<Retry>,
}

/// Retry policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// Conditions, Envoy's names (`connect-failure`, `refused-stream`, `unavailable`, `cancelled`, `503`, …), comma separated.
    pub on: String,
    /// Number of retries after the first attempt.
    pub attempts: u32,
    /// Timeout of one attempt in milliseconds; 0 is the request's.
    pub per_try_timeout_ms: u64,
    /// Status codes of `retriable-status-codes`.
    pub statuses: Vec<u32>,
}

/// Redirect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirect {
    /// New host, if changed.
    pub host: Option<String>,
    /// New path, if changed.
    pub path: Option<String>,
    /// New port, if changed.
    pub port: Option<u16>,
    /// Whether the scheme becomes https.
    pub https: bool,
    /// Status code (301 by default).
    pub status: u16,
}

/// The parts of a request that routes look at.
pub trait RouteRequest {
    /// `:authority`, as sent.
    fn authority(&self) -> &str;
    /// Path without query, normalised.
    fn path(&self) -> &str;
    /// Query string without `?`.
    fn query(&self) -> Option<&str>;
    /// Values of a header (lower-case name; pseudo headers included).
    fn header(&self, name: &str) -> Vec<&str>;
    /// Claims of the verified token, if there is one.
    fn claims(&self) -> Option<&serde_json::Value> {
        None
    }
}
