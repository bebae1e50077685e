//! `Policy` and `MeshPolicy` (authentication.istio.io/v1alpha1): who a caller must prove to be, by certificate and by token.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Specification of a MeshPolicy: a [`Policy`] without targets, for the whole mesh. Cluster-scoped; the only name is `default` (S7.1).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct MeshPolicy(pub Policy);

/// Specification of a Policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Policy {
    /// Services it is for; none: the whole namespace, and the name must be `default` (S7.2).
    #[schemars(length(max = 512))]
    pub targets: Vec<Target>,
    /// How the calling workload proves its identity. Empty: not at all, plaintext is what the port speaks (S7.9).
    #[schemars(length(max = 16))]
    pub peers: Vec<Peer>,
    /// A request passes also when the peer has no identity.
    pub peer_is_optional: bool,
    /// Tokens of end users that are understood; one of them is required unless `originIsOptional` (S7.13).
    #[schemars(length(max = 64))]
    pub origins: Vec<Origin>,
    /// A request passes also without a valid token.
    pub origin_is_optional: bool,
    /// Whose identity authorization sees as the principal (S7.17).
    pub principal_binding: PrincipalBinding,
}

/// A service, or some of its ports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct Target {
    /// Short name of a Service in the policy's namespace.
    pub name: String,
    /// Ports of the Service; none: all.
    #[schemars(length(max = 64))]
    pub ports: Vec<Port>,
}

/// A port of a Service, by number or by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Port {
    /// Number.
    pub number: Option<u32>,
    /// Name.
    pub name: String,
}

/// A way to prove a workload's identity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Peer {
    /// Mutual TLS.
    pub mtls: Option<MutualTls>,
    /// A token; Istio never supported it for peers (S7.7).
    pub jwt: Option<Jwt>,
}

/// Mutual TLS.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MutualTls {
    /// TLS without a client certificate is accepted too (deprecated, S7.8).
    pub allow_tls: bool,
    /// What the port accepts.
    pub mode: MutualTlsMode,
}

/// What a port accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MutualTlsMode {
    /// Mutual TLS only; what an empty `mtls` means.
    #[default]
    Strict,
    /// Plaintext too.
    Permissive,
}

/// A way to prove an end user's identity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Origin {
    /// A token.
    pub jwt: Option<Jwt>,
}

/// An issuer of tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["issuer"]))]
pub struct Jwt {
    /// The `iss` claim.
    pub issuer: String,
    /// Accepted `aud` claims; empty accepts any.
    pub audiences: Vec<String>,
    /// Where the issuer's keys are.
    pub jwks_uri: String,
    /// The issuer's keys, inline.
    pub jwks: String,
    /// Headers that carry the token.
    pub jwt_headers: Vec<String>,
    /// Query parameters that carry the token.
    pub jwt_params: Vec<String>,
    /// Paths on which a token is required; none: all (S7.15).
    #[schemars(length(max = 64))]
    pub trigger_rules: Vec<TriggerRule>,
}

/// Paths that require a token: none of the excluded ones, and one of the included ones if there are any.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TriggerRule {
    /// Paths without a token.
    #[schemars(length(max = 256))]
    pub excluded_paths: Vec<StringMatch>,
    /// Paths with a token.
    #[schemars(length(max = 256))]
    pub included_paths: Vec<StringMatch>,
}

/// A test of a path; exactly one field is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StringMatch {
    /// Equal.
    pub exact: Option<String>,
    /// Starts so.
    pub prefix: Option<String>,
    /// Ends so.
    pub suffix: Option<String>,
    /// Full match of a regular expression.
    pub regex: Option<String>,
}

/// Whose identity is the principal of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PrincipalBinding {
    /// The calling workload's.
    #[default]
    UsePeer,
    /// The token's, `issuer/subject`.
    UseOrigin,
}

/// What a Policy's `peers` ask of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerMode {
    /// Plaintext (S7.9).
    Disable,
    /// Both.
    Permissive,
    /// Mutual TLS only.
    Strict,
}

impl Policy {
    /// What `peers` ask for, and what of it cannot be kept.
    pub fn peer_mode(&self) -> (PeerMode, Option<&'static str>) {
        if self.peers.is_empty() {
            return (PeerMode::Disable, None);
        }
        match self.peers.iter().find_map(|p| p.mtls.as_ref()) {
            Some(mtls) if mtls.mode == MutualTlsMode::Permissive => (PeerMode::Permissive, None),
            // S7.10.
            Some(_) if self.peer_is_optional => (
                PeerMode::Permissive,
                Some("peerIsOptional becomes PERMISSIVE: plaintext is accepted too"),
            ),
            Some(mtls) if mtls.allow_tls => (
                PeerMode::Strict,
                Some("peers.mtls.allowTls (TLS without a client certificate) has no equivalent; STRICT applies"),
            ),
            Some(_) => (PeerMode::Strict, None),
            None => (
                PeerMode::Strict,
                Some("peers names no mtls, and peers.jwt was never supported; STRICT applies"),
            ),
        }
    }

    /// The issuers of `origins`.
    pub fn jwts(&self) -> impl Iterator<Item = &Jwt> {
        self.origins.iter().filter_map(|o| o.jwt.as_ref())
    }
}
