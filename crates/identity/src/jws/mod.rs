//! Signed tokens of end users (JWS compact form, RFC 7515/7519) and the key sets that they are checked with (RFC 7517).
//!
//! Called by `proxy` (the authentication step), `translate` (which key sets are usable), `control` (what a fetch brought)
//! and `cli` (claims of a token in questions). Pure: no clock, no socket; key sets are parsed once when configuration
//! arrives. Texts, their order and the reading of odd tokens are those of Envoy's jwt_authn (S3.24–S3.29); where this
//! reading is stricter, `docs/deviations.toml` lists it.
//!
//! Where to read: [`Token::parse`] (what a token must look like), [`KeySet::parse`] (which keys are usable),
//! [`Token::verify`] (key choice and signature), [`Failure`] (the texts).

mod base64url;
mod json;
mod keys;
mod token;

pub use json::strict_json;
pub use keys::{KeySet, KeySetError, MAX_KEY_SET, MAX_KEYS, NO_KEYS, key_set_name};
pub use token::{MAX_TOKEN, Token, check_time};

/// Difference of clocks that is forgiven, in seconds (S3.26).
pub const CLOCK_SKEW: u64 = 60;

/// Signature algorithms (RFC 7518 section 3.1, RFC 8037).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the standard's")]
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    Hs256,
    Hs384,
    Hs512,
    EdDsa,
}

impl Algorithm {
    /// All that are supported (S3.27).
    pub const ALL: [Algorithm; 13] = [
        Algorithm::Rs256,
        Algorithm::Rs384,
        Algorithm::Rs512,
        Algorithm::Ps256,
        Algorithm::Ps384,
        Algorithm::Ps512,
        Algorithm::Es256,
        Algorithm::Es384,
        Algorithm::Es512,
        Algorithm::Hs256,
        Algorithm::Hs384,
        Algorithm::Hs512,
        Algorithm::EdDsa,
    ];

    /// The `alg` value.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::Rs256 => "RS256",
            Algorithm::Rs384 => "RS384",
            Algorithm::Rs512 => "RS512",
            Algorithm::Ps256 => "PS256",
            Algorithm::Ps384 => "PS384",
            Algorithm::Ps512 => "PS512",
            Algorithm::Es256 => "ES256",
            Algorithm::Es384 => "ES384",
            Algorithm::Es512 => "ES512",
            Algorithm::Hs256 => "HS256",
            Algorithm::Hs384 => "HS384",
            Algorithm::Hs512 => "HS512",
            Algorithm::EdDsa => "EdDSA",
        }
    }

    /// The algorithm of an `alg` value; `none` and everything unknown is `None`.
    pub fn by_name(name: &str) -> Option<Algorithm> {
        Algorithm::ALL.into_iter().find(|a| a.name() == name)
    }
}

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// `nbf` lies in the future.
    NotYetValid,
    /// `exp` has passed.
    Expired,
    /// Not three sections.
    Form,
    /// The header is no base64url.
    HeaderBase64,
    /// The header is no JSON object.
    HeaderJson,
    /// `alg` is absent or no string.
    HeaderAlg,
    /// `alg` is not supported, `none` included.
    AlgorithmUnsupported,
    /// `kid` is no string.
    HeaderKid,
    /// The payload is no base64url.
    PayloadBase64,
    /// The payload is no JSON object.
    PayloadJson,
    /// `iss` is no string.
    IssNotString,
    /// `sub` is no string.
    SubNotString,
    /// `jti` is no string.
    JtiNotString,
    /// `iat` is no number.
    IatNotInteger,
    /// `iat` is negative or too large.
    IatRange,
    /// `nbf` is no number.
    NbfNotInteger,
    /// `nbf` is negative or too large.
    NbfRange,
    /// `exp` is no number.
    ExpNotInteger,
    /// `exp` is negative or too large.
    ExpRange,
    /// `aud` is neither a string nor a list of strings.
    Audience,
    /// The signature is no base64url.
    SignatureBase64,
    /// No rule of the token's location names its issuer.
    UnknownIssuer,
    /// None of the token's audiences is accepted.
    AudienceNotAllowed,
    /// No key verifies the signature.
    Verification,
    /// An Ed25519 key is asked about a signature that is not 64 bytes long.
    Ed25519Length,
    /// The key set has no usable key.
    NoValidKeys,
    /// No key fits the token's `kid` and `alg`.
    NoMatchingKey,
}

impl Failure {
    /// The text that the client gets (exactly Envoy's).
    pub fn text(self) -> &'static str {
        match self {
            Failure::NotYetValid => "Jwt not yet valid",
            Failure::Expired => "Jwt is expired",
            Failure::Form => "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            Failure::HeaderBase64 => "Jwt header is an invalid Base64url encoded",
            Failure::HeaderJson => "Jwt header is an invalid JSON",
            Failure::HeaderAlg => "Jwt header [alg] field is required and must be a string",
            Failure::AlgorithmUnsupported => "Jwt header [alg] is not supported",
            Failure::HeaderKid => "Jwt header [kid] field is not a string",
            Failure::PayloadBase64 => "Jwt payload is an invalid Base64url encoded",
            Failure::PayloadJson => "Jwt payload is an invalid JSON",
            Failure::IssNotString => "Jwt payload [iss] field is not a string",
            Failure::SubNotString => "Jwt payload [sub] field is not a string",
            Failure::JtiNotString => "Jwt payload [jti] field is not a string",
            Failure::IatNotInteger => "Jwt payload [iat] field is not an integer",
            Failure::IatRange => "Jwt payload [iat] field is not a positive 64 bit integer",
            Failure::NbfNotInteger => "Jwt payload [nbf] field is not an integer",
            Failure::NbfRange => "Jwt payload [nbf] field is not a positive 64 bit integer",
            Failure::ExpNotInteger => "Jwt payload [exp] field is not an integer",
            Failure::ExpRange => "Jwt payload [exp] field is not a positive 64 bit integer",
            Failure::Audience => "Jwt payload [aud] field is not a string or string list",
            Failure::SignatureBase64 => "Jwt signature is an invalid Base64url encoded",
            Failure::UnknownIssuer => "Jwt issuer is not configured",
            Failure::AudienceNotAllowed => "Audiences in Jwt are not allowed",
            Failure::Verification => "Jwt verification fails",
            Failure::Ed25519Length => "Jwt ED25519 signature is wrong length",
            Failure::NoValidKeys => "Jwks doesn't have any valid public key",
            Failure::NoMatchingKey => "Jwks doesn't have key to match kid or alg from Jwt",
        }
    }

    /// The HTTP status: 403 for audiences, 401 for everything else (S3.23).
    pub fn status(self) -> u16 {
        match self {
            Failure::AudienceNotAllowed => 403,
            _ => 401,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for Failure {}

/// An audience without scheme and trailing slash; both sides are compared so (S3.41).
pub fn sanitize_audience(audience: &str) -> &str {
    let bare = audience
        .strip_prefix("https://")
        .or_else(|| audience.strip_prefix("http://"))
        .unwrap_or(audience);
    bare.strip_suffix('/').unwrap_or(bare)
}

#[cfg(test)]
mod tests;
