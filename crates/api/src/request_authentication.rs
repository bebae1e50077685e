//! `RequestAuthentication` (security.istio.io): which end-user tokens (JWT) a workload understands.
//!
//! A request without a token passes; one with a bad token is refused (SEMANTICS 3). Rules of the kind: S8.40–S8.45.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnostic::Diagnostic;
use crate::duration::Duration;
use crate::selector::{PolicyTargetReference, WorkloadSelector};
use crate::validate;

/// Specification of a RequestAuthentication.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "(has(self.selector) ? 1 : 0) + (has(self.targetRef) ? 1 : 0) + (has(self.targetRefs) ? 1 : 0) <= 1",
    "message": "only one of targetRefs or selector can be set"
}]))]
pub struct RequestAuthentication {
    /// Workloads it applies to; absent or empty: the whole namespace, in the root namespace the whole mesh.
    pub selector: Option<WorkloadSelector>,
    /// The one object it is attached to (deprecated form of `targetRefs`).
    pub target_ref: Option<PolicyTargetReference>,
    /// The objects it is attached to.
    #[schemars(length(max = 16))]
    pub target_refs: Vec<PolicyTargetReference>,
    /// Issuers whose tokens are understood.
    #[schemars(length(max = 4096))]
    pub jwt_rules: Vec<JwtRule>,
}

/// One issuer and how its tokens are found and checked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["issuer"], "x-kubernetes-validations" = [{
    "rule": "(has(self.jwksUri) ? 1 : 0) + (has(self.jwks) ? 1 : 0) <= 1",
    "message": "only one of jwks or jwksUri can be set"
}]))]
pub struct JwtRule {
    /// The `iss` claim.
    #[schemars(length(min = 1))]
    pub issuer: String,
    /// Accepted `aud` claims; empty accepts any.
    #[schemars(inner(length(min = 1)))]
    pub audiences: Vec<String>,
    /// Where the issuer's keys are fetched; by default found through OpenID discovery at the issuer.
    #[serde(alias = "jwks_uri")]
    #[schemars(length(min = 1, max = 2048), extend("x-kubernetes-validations" = [
        {"rule": "url(self).getScheme() in ['http', 'https']", "message": "url must have scheme http:// or https://"}
    ]))]
    pub jwks_uri: String,
    /// The issuer's keys, inline.
    pub jwks: String,
    /// Headers that carry the token.
    pub from_headers: Vec<JwtHeader>,
    /// Query parameters that carry the token.
    #[schemars(inner(length(min = 1)))]
    pub from_params: Vec<String>,
    /// Cookies that carry the token.
    #[schemars(inner(length(min = 1)))]
    pub from_cookies: Vec<String>,
    /// Header that receives the verified payload, base64url-encoded.
    pub output_payload_to_header: String,
    /// Keep the token in the request that goes to the app.
    pub forward_original_token: bool,
    /// Claims copied into headers.
    pub output_claim_to_headers: Vec<ClaimToHeader>,
    /// How long a key fetch may take.
    #[schemars(extend("x-kubernetes-validations" = [
        {"rule": "duration(self) >= duration('1ms')", "message": "must be a valid duration greater than 1ms"}
    ]))]
    pub timeout: Option<Duration>,
    /// Further claims that hold a space-delimited list, besides `scope` and `permission`.
    #[schemars(length(max = 64), inner(length(min = 1)))]
    pub space_delimited_claims: Vec<String>,
}

/// A header that carries a token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["name"]))]
pub struct JwtHeader {
    /// Header name.
    #[schemars(length(min = 1))]
    pub name: String,
    /// Text before the token, e.g. `Bearer `.
    pub prefix: String,
}

/// A claim copied into a header.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("required" = ["header", "claim"]))]
pub struct ClaimToHeader {
    /// Header to set.
    #[schemars(length(min = 1), regex(pattern = "^[-_A-Za-z0-9]+$"))]
    pub header: String,
    /// Claim to copy; nested claims with dots.
    #[schemars(length(min = 1))]
    pub claim: String,
}

/// Nulls in lists, which have to be looked for before decoding (S8.41, S8.42).
pub(crate) fn nulls(raw: &Value) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    let rules = raw.pointer("/spec/jwtRules").and_then(Value::as_array);
    for (i, rule) in rules.into_iter().flatten().enumerate() {
        for (field, message) in [
            ("fromHeaders", "location header name must be non-null"),
            ("outputClaimToHeaders", "outputClaimToHeaders must not be null"),
        ] {
            let items = rule.get(field).and_then(Value::as_array);
            for (j, _) in items
                .into_iter()
                .flatten()
                .enumerate()
                .filter(|(_, item)| item.is_null())
            {
                findings.push(Diagnostic::error(format!("spec.jwtRules[{i}].{field}[{j}]"), message));
            }
        }
    }
    findings
}

/// Istio's rules for the kind.
pub(crate) fn validate(spec: &RequestAuthentication, _raw: &Value) -> Vec<Diagnostic> {
    let mut findings = validate::selector(spec.selector.as_ref(), "spec.selector");
    validate::one_target(
        spec.selector.is_some(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
        &mut findings,
    );
    for (i, rule) in spec.jwt_rules.iter().enumerate() {
        let path = format!("spec.jwtRules[{i}]");
        let mut error = |field: &str, message: String| {
            findings.push(Diagnostic::error(format!("{path}.{field}"), message));
        };
        if rule.issuer.is_empty() && rule.jwks_uri.is_empty() {
            error("issuer", "issuer or jwksUri must be non-empty string".into());
        }
        if !rule.jwks_uri.is_empty() && !rule.jwks.is_empty() {
            error("jwks", "only one of jwks or jwksUri can be set".into());
        }
        if rule.audiences.iter().any(String::is_empty) {
            error("audiences", "audience must be non-empty string".into());
        }
        if !rule.jwks_uri.is_empty()
            && let Err(message) = jwks_uri(&rule.jwks_uri)
        {
            error("jwksUri", message);
        }
        if !rule.jwks.is_empty() {
            match jwks_keys(&rule.jwks) {
                Err(message) => error("jwks", format!("jwks parse error: {message}")),
                Ok(private) => {
                    for index in private {
                        findings.push(Diagnostic::warning(
                            format!("{path}.jwks"),
                            format!(
                                "jwks key at index {index} contains private key material; only public keys are used for verification"
                            ),
                        ));
                    }
                }
            }
        }
        let mut error = |field: &str, message: &str| {
            findings.push(Diagnostic::error(format!("{path}.{field}"), message));
        };
        if rule.from_headers.iter().any(|header| header.name.is_empty()) {
            error("fromHeaders", "location header name must be non-empty string");
        }
        if rule.from_params.iter().any(String::is_empty) {
            error("fromParams", "location query must be non-empty string");
        }
        if rule.from_cookies.iter().any(String::is_empty) {
            error("fromCookies", "cookie name must be non-empty string");
        }
        for output in &rule.output_claim_to_headers {
            if output.header.is_empty() || output.claim.is_empty() {
                error(
                    "outputClaimToHeaders",
                    "outputClaimToHeaders header and claim value must be non-empty string",
                );
            } else if !output
                .header
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            {
                error(
                    "outputClaimToHeaders",
                    &format!("header name {} is not a valid header name", output.header),
                );
            }
        }
        if let Some(timeout) = rule.timeout {
            if timeout < Duration::from_millis(1) {
                error("timeout", "duration must be greater than 1ms");
            } else if timeout.0.subsec_nanos() % 1_000_000 != 0 {
                error("timeout", "only durations to ms precision are supported");
            }
        }
    }
    findings
}

/// Checks scheme, host and port of a key set address.
fn jwks_uri(uri: &str) -> Result<(), String> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err("URI scheme \"\" is not supported".into());
    };
    if scheme != "http" && scheme != "https" {
        return Err(format!("URI scheme {scheme:?} is not supported"));
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host_port = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let after_v6 = host_port.rsplit_once(']').map_or(host_port, |(_, tail)| tail);
    if let Some((_, port)) = after_v6.rsplit_once(':')
        && port.parse::<u16>().is_err()
    {
        return Err(format!("port number in {uri:?} must be numeric and at most 65535"));
    }
    if host_port.is_empty() {
        return Err(format!("URI {uri:?} has no host"));
    }
    Ok(())
}

/// Parses a key set far enough to tell that it is one; returns the indices of keys with private or symmetric material.
fn jwks_keys(text: &str) -> Result<Vec<usize>, String> {
    let set: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let keys = set.get("keys").and_then(Value::as_array).ok_or("no \"keys\" array")?;
    let mut private = Vec::new();
    for (index, key) in keys.iter().enumerate() {
        let kty = key
            .get("kty")
            .and_then(Value::as_str)
            .ok_or_else(|| format!("key at index {index} has no \"kty\""))?;
        if kty == "oct" || key.get("d").is_some() {
            private.push(index);
        }
    }
    Ok(private)
}
