//! RequestAuthentication → token providers of one workload (SEMANTICS 3a–3d).
//!
//! Called for inbound HTTP chains and gateways. Every doubt ends in refused tokens: keys that are not known or cannot be
//! used are replaced by a set that verifies nothing, and a policy that cannot be read refuses all tokens that no other
//! one accepts. Requests without a token pass, as they would.

use std::sync::Arc;

use mantlet_api::RequestAuthentication;
use mantlet_api::request_authentication::JwtRule;
use mantlet_identity::jws::{KeySet, NO_KEYS};
use mantlet_model::http::{JwtAuthn, JwtProvider};

use crate::authz::{Target, binds_by};
use crate::world::{Config, World};

/// Most claims that one rule may add to those that are split at spaces (S3.47).
const MAX_SPACE_DELIMITED: usize = 64;

/// Token authentication of a workload; `None` when no rule is bound.
pub fn authentication(world: &World, target: Target<'_>) -> Option<JwtAuthn> {
    let mut providers = Vec::new();
    for config in bound(world, target) {
        if config.broken.is_some() {
            // Whatever it would accept is not known: a provider of any issuer that accepts nothing.
            providers.push(provider(&JwtRule::default(), NO_KEYS.into(), target));
        }
        for rule in &config.spec.jwt_rules {
            if !findable(rule) {
                continue;
            }
            let keys = match keys(world, rule) {
                Ok(keys) => keys,
                Err(_) => NO_KEYS.into(),
            };
            providers.push(provider(rule, keys, target));
        }
    }
    // S3.2; a stable sort, so that equal issuers keep the order of their policies.
    providers.sort_by(|a, b| a.issuer.cmp(&b.issuer));
    for (index, provider) in providers.iter_mut().enumerate() {
        provider.name = format!("origins-{index}");
    }
    (!providers.is_empty()).then_some(JwtAuthn { providers })
}

/// Policies that bind a workload: of the root namespace first, then of its own, each oldest first (S3.1). Those that former kinds were
/// converted to count where none of today's does.
pub fn bound<'a>(world: &'a World, target: Target<'a>) -> impl Iterator<Item = &'a Config<RequestAuthentication>> {
    let root = world.mesh().root_namespace.as_str();
    let own = (target.namespace != root).then_some(target.namespace);
    let all = std::iter::once(root)
        .chain(own)
        .flat_map(|namespace| world.request_authentications(namespace))
        .map(|config| &**config)
        .filter(move |config| {
            binds_by(
                &config.meta.namespace,
                config.spec.selector.as_ref(),
                config.spec.target_ref.as_ref(),
                &config.spec.target_refs,
                target,
            )
        });
    crate::legacy::in_force(all.collect()).into_iter()
}

/// What of a policy is not in force as written, for its status. Keys that are still being fetched are not told here.
pub fn problems(world: &World, config: &Config<RequestAuthentication>) -> Vec<String> {
    let mut out: Vec<String> = config
        .broken
        .iter()
        .map(|error| format!("cannot be read ({error}); tokens are refused on what it selects"))
        .collect();
    for (index, rule) in config.spec.jwt_rules.iter().enumerate() {
        let at = format!("jwtRules[{index}]");
        if !findable(rule) {
            out.push(format!(
                "{at}: no request can carry a token where fromHeaders, fromParams and fromCookies look; the rule is ignored"
            ));
            continue;
        }
        if let Err(Unusable::Inline(reason)) = keys(world, rule) {
            out.push(format!(
                "{at}.jwks: {reason}; tokens of issuer {:?} are refused",
                rule.issuer
            ));
        }
        let location = rule.from_headers.iter().filter(|h| !header_is_good(&h.name, &h.prefix));
        for header in location {
            out.push(format!(
                "{at}.fromHeaders: {:?} with prefix {:?} can never be in a request and is ignored",
                header.name, header.prefix
            ));
        }
        let payload = Some(&rule.output_payload_to_header).filter(|h| !h.is_empty() && !name_is_good(h));
        for header in payload.into_iter().chain(
            rule.output_claim_to_headers
                .iter()
                .map(|o| &o.header)
                .filter(|h| !name_is_good(h)),
        ) {
            out.push(format!("{at}: {header:?} is no header name; the header is not set"));
        }
        if rule.space_delimited_claims.len() > MAX_SPACE_DELIMITED {
            out.push(format!(
                "{at}.spaceDelimitedClaims: only the first {MAX_SPACE_DELIMITED} are split"
            ));
        }
    }
    out
}

/// Why a rule has no keys.
enum Unusable {
    /// The inline set is bad.
    Inline(String),
    /// The set was not fetched, or what was fetched is bad.
    Fetched,
}

/// The key set of a rule; inline keys win (S3.42).
fn keys(world: &World, rule: &JwtRule) -> Result<Arc<str>, Unusable> {
    if rule.jwks.is_empty() {
        let fetched = world.key_set(&rule.issuer, &rule.jwks_uri).ok_or(Unusable::Fetched)?;
        return match KeySet::parse(fetched.as_bytes()) {
            Ok(_) => Ok(fetched.clone()),
            Err(_) => Err(Unusable::Fetched),
        };
    }
    match KeySet::parse(rule.jwks.as_bytes()) {
        Ok(_) => Ok(rule.jwks.as_str().into()),
        Err(error) => Err(Unusable::Inline(error.to_string())),
    }
}

/// Whether the rule has a place where a token can be; without any of its own it has the default ones (S3.10, S3.11).
fn findable(rule: &JwtRule) -> bool {
    let none = rule.from_headers.is_empty() && rule.from_params.is_empty() && rule.from_cookies.is_empty();
    none || rule.from_headers.iter().any(|h| header_is_good(&h.name, &h.prefix))
        || rule.from_params.iter().chain(&rule.from_cookies).any(|n| !n.is_empty())
}

fn provider(rule: &JwtRule, jwks: Arc<str>, target: Target<'_>) -> JwtProvider {
    let filled = |names: &[String]| names.iter().filter(|n| !n.is_empty()).cloned().collect();
    JwtProvider {
        name: String::new(),
        issuer: rule.issuer.clone(),
        // Not cleaned up: an empty list would accept any audience.
        audiences: rule.audiences.clone(),
        jwks,
        from_headers: rule
            .from_headers
            .iter()
            .filter(|h| header_is_good(&h.name, &h.prefix))
            .map(|h| (h.name.to_ascii_lowercase(), h.prefix.clone()))
            .collect(),
        from_params: filled(&rule.from_params),
        from_cookies: filled(&rule.from_cookies),
        forward: rule.forward_original_token,
        payload_header: Some(rule.output_payload_to_header.to_ascii_lowercase()).filter(|h| name_is_good(h)),
        claim_headers: rule
            .output_claim_to_headers
            .iter()
            .filter(|o| name_is_good(&o.header) && !o.claim.is_empty())
            .map(|o| (o.header.to_ascii_lowercase(), o.claim.clone()))
            .collect(),
        space_delimited: rule
            .space_delimited_claims
            .iter()
            .filter(|c| !c.is_empty() && *c != "scope" && *c != "permission")
            .take(MAX_SPACE_DELIMITED)
            .cloned()
            .collect(),
        clear_route_cache: target.gateway,
    }
}

/// A header name (RFC 9110 token).
fn name_is_good(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn header_is_good(name: &str, prefix: &str) -> bool {
    name_is_good(name) && !prefix.bytes().any(|b| b < 0x20 && b != b'\t' || b == 0x7f)
}

#[cfg(test)]
mod tests;
