//! Authorization: rules as boolean expressions over a closed set of attributes and matchers.
//!
//! Neither Istio's from / to / when nor Envoy's permission and principal trees: `translate` writes these rules,
//! `xds` carries them, [`Engine::decide`] evaluates them and [`explain()`] tells why. Both the proxy and the command line
//! call the same tests, so what is explained is what is enforced.

pub mod analyse;
mod canonical;
mod engine;
mod explain;
mod index;
mod matcher;
pub mod regexes;
mod sample;
mod template;
pub mod words;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use canonical::{canonical, canonical_atom, canonical_filter};
pub use engine::{Decision, Engine, Shadow, Verdict};
pub use explain::{Explanation, FailedTest, FilterExplanation, NearMiss, explain, miss};
pub(crate) use matcher::any_claim;
pub use matcher::{check, compile_regex};
pub use sample::{HttpSample, Sample};

/// All policies of one action on one chain (one RBAC filter, S2.25).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AuthzFilter {
    /// What a match means.
    pub action: Action,
    /// Whether an enforced policy of this action is bound. False when all of them are dry-run policies: then `rules` is
    /// empty and nothing is decided here, whereas an enforced ALLOW filter without rules denies everything (S2.80,
    /// S2.132).
    pub enforced: bool,
    /// Enforced rules; ids are unique in a filter. An enforced ALLOW filter without rules denies everything (S2b table).
    pub rules: Vec<Rule>,
    /// Rules of dry-run policies: counted, never enforced (S2.130).
    pub shadow: Vec<Rule>,
}

/// Action of a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Action {
    /// A match marks the request for the access log; never decides (AUDIT).
    Log,
    /// A match denies.
    Deny,
    /// No match denies.
    Allow,
}

/// One rule of a policy, with the id that logs show.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rule {
    /// `ns[<namespace>]-policy[<name>]-rule[<index>]` (S2.93).
    pub id: String,
    /// When it matches.
    pub expr: Expr,
}

/// A boolean expression. `And([])` is always true, `Or([])` never.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Expr {
    /// All hold.
    And(Vec<Expr>),
    /// At least one holds.
    Or(Vec<Expr>),
    /// Does not hold.
    Not(Box<Expr>),
    /// A test of one attribute.
    Atom(Atom),
}

/// A test of one attribute. A test of an absent attribute is false, so its negation is true (S2.60).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Atom {
    /// What is looked at.
    pub attribute: Attribute,
    /// What it must be.
    pub matcher: Matcher,
}

/// Attributes of a connection or request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Attribute {
    /// The peer's identity, as the URI in its certificate (`spiffe://…`).
    PeerUri,
    /// The namespace in the peer's identity; [`Matcher::Glob`] or [`Matcher::Exact`] (S2.48).
    PeerNamespace,
    /// The service account in the peer's identity, any trust domain; [`Matcher::Exact`] of `ns/sa` (S2.49).
    PeerServiceAccount,
    /// The trust domain in the peer's identity; [`Matcher::Glob`] or [`Matcher::Exact`] (S2.50).
    PeerTrustDomain,
    /// Address of the TCP peer (`source.ip`, S2.51).
    SourceIp,
    /// Address of the client, by forwarding headers or PROXY protocol (`remote.ip`, S2.52).
    RemoteIp,
    /// Original destination address.
    DestinationIp,
    /// Original destination port: the workload's port (S2.59).
    DestinationPort,
    /// Server name of the ClientHello.
    Sni,
    /// `:authority` with its port, compared without case (S2.54).
    Host,
    /// HTTP method.
    Method,
    /// Normalised path without query (S2.56).
    Path,
    /// A request header by lower-case name; each value is tested alone.
    Header(String),
    /// A claim of the verified token by path; lists are tested element by element (S2.71, S2.75).
    Claim(Vec<String>),
    /// Dynamic metadata of a filter: filter name, key (`experimental.envoy.filters.…`).
    Metadata(String, String),
}

impl Attribute {
    /// Whether the attribute exists only in HTTP (S2f).
    pub fn is_http(&self) -> bool {
        matches!(
            self,
            Attribute::Host | Attribute::Method | Attribute::Path | Attribute::Header(_) | Attribute::Claim(_)
        )
    }
}

/// Tests of a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Matcher {
    /// Equal.
    Exact(String),
    /// Starts so.
    Prefix(String),
    /// Ends so.
    Suffix(String),
    /// Present: not empty for strings, existing for headers (S2.42).
    Present,
    /// `*` stands for any text, everywhere in the pattern (namespaces, trust domains).
    Glob(String),
    /// Inside an address range.
    Cidr(IpNet),
    /// This port.
    Port(u16),
    /// A URI template with `{*}` and `{**}` (S2.57).
    Template(String),
    /// Full match of an RE2 expression; only from control planes other than Mantlet's.
    Regex(String),
}

/// What is known of a connection when a decision is asked for.
#[derive(Clone, Debug)]
pub struct Connection<'a> {
    /// URI SANs of the peer's verified certificate; empty for plaintext.
    pub peer_uris: &'a [String],
    /// Address of the TCP peer.
    pub source: IpAddr,
    /// Address of the client ([`Attribute::RemoteIp`]).
    pub remote: IpAddr,
    /// Original destination.
    pub destination: SocketAddr,
    /// Server name of the ClientHello.
    pub sni: Option<&'a str>,
}

/// What is known of an HTTP request. The proxy implements it over its request head without copying.
pub trait HttpView {
    /// Method as sent.
    fn method(&self) -> &str;
    /// `:authority` or `Host` as sent.
    fn authority(&self) -> &str;
    /// Normalised path without query and fragment.
    fn path(&self) -> &str;
    /// Calls `f` with each value of the header until `f` returns true; returns whether it did. Name in lower case.
    /// Values that are no text are passed as bytes.
    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool;
    /// Payload of the verified token.
    fn claims(&self) -> Option<&serde_json::Value>;
}

impl Expr {
    /// Always true.
    pub fn always() -> Expr {
        Expr::And(Vec::new())
    }

    /// Never true.
    pub fn never() -> Expr {
        Expr::Or(Vec::new())
    }

    /// A test of one attribute.
    pub fn atom(attribute: Attribute, matcher: Matcher) -> Expr {
        Expr::Atom(Atom { attribute, matcher })
    }

    /// Negation.
    #[expect(clippy::should_implement_trait, reason = "reads as a constructor beside `atom`")]
    pub fn not(self) -> Expr {
        Expr::Not(Box::new(self))
    }
}
