//! CUSTOM authorization: which requests an external provider is asked about, and how (SEMANTICS 2k).
//!
//! `translate` writes these stages, `xds` carries each as an RBAC filter with shadow rules followed by `ext_authz`, the
//! proxy runs them in order before it looks at tokens. Knows nothing of sockets and of the check protocol's messages.

use serde::{Deserialize, Serialize};

use crate::authz::{Action, AuthzFilter, Rule};

/// Begin of the ids of all CUSTOM rules (S2.93).
pub const ID_PREFIX: &str = "istio-ext-authz";
/// End of the ids of CUSTOM rules whose provider cannot be asked (S2.142).
pub const BAD_SUFFIX: &str = "-deny-due-to-bad-CUSTOM-action";

/// One step before authentication: what happens to requests that match the rules of CUSTOM policies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CustomStage {
    /// Rules; ids are unique in a stage and begin with [`ID_PREFIX`].
    pub rules: Vec<Rule>,
    /// What happens to requests that match one of them.
    pub then: Then,
}

/// What happens to requests that match a CUSTOM rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Then {
    /// 403: there is no provider that could be asked (S2.144).
    Deny,
    /// The provider is asked; the request goes on when it says so.
    Ask(Box<ExtAuthz>),
}

impl CustomStage {
    /// The rules as a filter that denies what matches, for [`crate::authz::Engine`]: "denied" reads "the stage applies".
    pub fn selector(&self) -> AuthzFilter {
        AuthzFilter {
            action: Action::Deny,
            enforced: true,
            rules: self.rules.clone(),
            shadow: Vec::new(),
        }
    }

    /// The cluster that is called.
    pub fn cluster(&self) -> Option<&str> {
        match &self.then {
            Then::Deny => None,
            Then::Ask(provider) => Some(&provider.cluster),
        }
    }
}

/// How a provider is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtAuthz {
    /// Name in the mesh configuration.
    pub provider: String,
    /// Cluster that leads to it (`outbound|8000||ext-authz.foo.svc.cluster.local`).
    pub cluster: String,
    /// Protocol of the check.
    pub protocol: CheckProtocol,
    /// Time for an answer, milliseconds (S2.149: 600 s by default).
    pub timeout_ms: u64,
    /// Whether requests proceed when no answer can be had (S2.150).
    pub fail_open: bool,
    /// Status when no answer can be had; `None` is 403 (S2.151).
    pub status_on_error: Option<u16>,
    /// How much of the body the provider sees; `None` is nothing.
    pub body: Option<BodyInCheck>,
}

/// Protocol of the check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckProtocol {
    /// An HTTP request whose status answers (`envoyExtAuthzHttp`).
    Http(HttpCheck),
    /// `envoy.service.auth.v3.Authorization/Check` (`envoyExtAuthzGrpc`).
    Grpc {
        /// `:authority` of the call.
        authority: String,
    },
}

/// Options of HTTP checks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpCheck {
    /// Host of the provider; only a name for logs, the call goes to the cluster with the original authority.
    pub host: String,
    /// Put before the request's path.
    pub path_prefix: String,
    /// Request headers that the provider sees besides method, path, host and authorization.
    pub request_headers: Vec<HeaderPattern>,
    /// Headers added for the provider; they replace those of the client (S2.154).
    pub add_headers: Vec<(String, String)>,
    /// Headers of the provider's 200 that go upstream (S2.155).
    pub upstream_headers: Vec<HeaderPattern>,
    /// Headers of a denial that go to the client; empty is all but `Host` (S2.156).
    pub deny_headers: Vec<HeaderPattern>,
    /// Headers of the provider's 200 that go to the client.
    pub allow_headers: Vec<HeaderPattern>,
}

/// Body shown to a provider (S2.158).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BodyInCheck {
    /// Most bytes.
    pub max_bytes: u32,
    /// Longer bodies are cut (true) or refused with 413 (false).
    pub allow_partial: bool,
    /// gRPC: as bytes instead of text.
    pub as_bytes: bool,
}

/// A header name or a family of names, compared without case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HeaderPattern {
    /// Equal.
    Exact(String),
    /// Starts so.
    Prefix(String),
    /// Ends so.
    Suffix(String),
}

impl HeaderPattern {
    /// Reads `name`, `prefix*` or `*suffix` (S2.153).
    pub fn parse(text: &str) -> HeaderPattern {
        if let Some(suffix) = text.strip_prefix('*') {
            HeaderPattern::Suffix(suffix.to_string())
        } else if let Some(prefix) = text.strip_suffix('*') {
            HeaderPattern::Prefix(prefix.to_string())
        } else {
            HeaderPattern::Exact(text.to_string())
        }
    }

    /// Whether a header name fits.
    pub fn matches(&self, name: &str) -> bool {
        let name = name.as_bytes();
        match self {
            HeaderPattern::Exact(want) => name.eq_ignore_ascii_case(want.as_bytes()),
            HeaderPattern::Prefix(want) => name
                .get(..want.len())
                .is_some_and(|n| n.eq_ignore_ascii_case(want.as_bytes())),
            HeaderPattern::Suffix(want) => name
                .len()
                .checked_sub(want.len())
                .is_some_and(|at| name[at..].eq_ignore_ascii_case(want.as_bytes())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_patterns_ignore_case() {
        for (pattern, name, fits) in [
            ("x-a", "X-A", true),
            ("x-a", "x-ab", false),
            ("x-*", "X-anything", true),
            ("x-*", "y-x-", false),
            ("x-*", "x", false),
            ("*-id", "x-request-ID", true),
            ("*-id", "id", false),
            // A leading star wins; the other one is literal.
            ("*a*", "xa*", true),
            ("*a*", "xab", false),
        ] {
            assert_eq!(HeaderPattern::parse(pattern).matches(name), fits, "{pattern} {name}");
        }
    }
}
