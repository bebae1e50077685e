//! The HTTP connection manager of a chain: what happens to a request, in order.
//!
//! The order is fixed by the product, not by configuration (S2.21): normalise → request id → JWT → authorization →
//! route → forward → account. So the filters are fields with one place each, not a list that could be reordered.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::authz::AuthzFilter;
use crate::ext_authz::CustomStage;
use crate::listener::AccessLog;
use crate::route::RouteTable;

/// HTTP connection manager (`envoy.extensions.filters.network.http_connection_manager.v3`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HttpManager {
    /// Prefix of statistics.
    pub stat_prefix: String,
    /// HTTP versions accepted.
    pub codec: Codec,
    /// Where the routes come from.
    pub routes: RouteSource,
    /// Path normalisation before policy, routing and forwarding (S2.110).
    pub normalization: PathNormalization,
    /// What happens to `x-forwarded-client-cert` (S6.60–S6.64).
    pub forwarded_client_cert: ForwardedClientCert,
    /// Whether the direct peer's address is the client's (gateways) or taken from `x-forwarded-for` (sidecars, S6.72).
    pub use_remote_address: bool,
    /// Trusted proxies in front (`numTrustedProxies`).
    pub trusted_hops: u32,
    /// Value of the `server` response header; empty passes the upstream's through (S6.66).
    pub server_name: String,
    /// Whether an absent `x-request-id` is generated (S6.67).
    pub generate_request_id: bool,
    /// Whether HTTP/1.1 upgrades to WebSocket are allowed (S6.75).
    pub websocket: bool,
    /// Idle timeout of a stream in milliseconds; 0 disables it.
    pub stream_idle_timeout_ms: u64,
    /// CUSTOM authorization, in order, before everything that looks at tokens (S2.22).
    pub custom: Vec<CustomStage>,
    /// JWT authentication.
    pub jwt: Option<JwtAuthn>,
    /// Authorization filters in order: AUDIT, DENY, ALLOW.
    pub authz: Vec<AuthzFilter>,
    /// Whether the ALPN of upstream mTLS connections follows the request's HTTP version (S1.82; outbound and gateways).
    pub istio_alpn: bool,
    /// Whether Istio's request metrics are reported, and by which side.
    pub telemetry: Option<Reporter>,
    /// Access log of requests.
    pub access_log: Option<AccessLog>,
}

/// HTTP versions that a connection manager accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Codec {
    /// HTTP/1.1 or HTTP/2, by ALPN or preface.
    Auto,
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
}

/// Source of a route table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RouteSource {
    /// A route table of this name, delivered apart (RDS).
    Named(String),
    /// Part of the listener.
    Inline(Box<RouteTable>),
}

/// Path normalisation modes of the mesh configuration (S2.111).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PathNormalization {
    /// Paths stay as sent.
    None,
    /// Dot segments removed, `\` becomes `/`, unreserved characters decoded.
    #[default]
    Base,
    /// As `Base`, and `//` becomes `/`.
    MergeSlashes,
    /// As `MergeSlashes`, with `%2f` and `%5c` decoded first.
    DecodeAndMergeSlashes,
}

/// Treatment of `x-forwarded-client-cert`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ForwardedClientCert {
    /// Removed (outbound sidecars).
    #[default]
    Sanitize,
    /// The peer's element is appended on mTLS; removed otherwise (inbound sidecars).
    AppendForward,
    /// Replaced by the peer's element (gateways).
    SanitizeSet,
    /// Kept as sent on mTLS, removed otherwise.
    ForwardOnly,
    /// Kept as sent, always.
    AlwaysForwardOnly,
}

/// Side that reports a request (`reporter` label).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Reporter {
    /// The client's proxy.
    Source,
    /// The server's proxy, gateways included.
    Destination,
}

/// JWT authentication of one chain (`jwt_authn`), filled from RequestAuthentication. The requirement follows from the
/// providers (S3.7): a request passes with tokens that some provider accepts, or without any.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JwtAuthn {
    /// Providers, in the order in which they are asked.
    pub providers: Vec<JwtProvider>,
}

/// One token issuer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JwtProvider {
    /// Unique name (`origins-0`, …).
    pub name: String,
    /// Expected `iss`; empty accepts any.
    pub issuer: String,
    /// Accepted audiences; empty accepts any.
    pub audiences: Vec<String>,
    /// The key set, JSON, as `local_jwks` inline. Shared between chains.
    pub jwks: Arc<str>,
    /// Headers that carry the token: name and value prefix. With no header, parameter or cookie: `Authorization: Bearer`
    /// and the parameter `access_token` (S3.10).
    pub from_headers: Vec<(String, String)>,
    /// Query parameters that carry the token.
    pub from_params: Vec<String>,
    /// Cookies that carry the token.
    pub from_cookies: Vec<String>,
    /// Whether the token goes on to the application.
    pub forward: bool,
    /// Header that receives the payload, base64url.
    pub payload_header: Option<String>,
    /// Headers that receive claims: header, claim path with dots.
    pub claim_headers: Vec<(String, String)>,
    /// Claims split at spaces, besides `scope` and `permission` (S3.47).
    pub space_delimited: Vec<String>,
    /// Whether routes are chosen anew after verification (gateways, S3.50).
    pub clear_route_cache: bool,
}
