//! JWT authentication (SEMANTICS 3).
//!
//! Mantlet keeps key sets as secrets of their own, so that a key rotation touches no listener. On the wire a provider
//! names such a secret as the file name of its local key set; for peers that cannot resolve that, the keys are inlined,
//! and inlined keys (istiod's, for instance) are read back as secrets named by their hash.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::config::route::v3::RouteMatch as ProtoMatch;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::jwt_provider::{
    JwksSourceSpecifier, NormalizePayload,
};
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::jwt_requirement::RequiresType;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::requirement_rule::RequirementType;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::{
    JwtAuthentication, JwtClaimToHeader, JwtHeader, JwtProvider as Proto, JwtRequirement, JwtRequirementAndList,
    JwtRequirementOrList, RequirementRule,
};
use envoy_types::pb::google::protobuf::Empty;
use mantlet_model::Secret;
use mantlet_model::http::{JwtAuthn, JwtProvider};
use mantlet_model::secret::SecretValue;
use sha2::{Digest, Sha256};

use crate::encode::Options;
use crate::wire::{At, Result, done, expect, fault, require};

/// Metadata key of the payload (S3.49).
const PAYLOAD: &str = "payload";
/// Claims that are always split at spaces (S2.73).
const SPACE_DELIMITED: [&str; 2] = ["permission", "scope"];

pub(crate) fn encode(model: &JwtAuthn, options: &Options<'_>) -> JwtAuthentication {
    let providers: HashMap<_, _> = model
        .providers
        .iter()
        .map(|p| (p.name.clone(), provider(p, options)))
        .collect();
    let rules = requirement(&model.providers).map(|requires| RequirementRule {
        r#match: Some(ProtoMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".into())),
            ..ProtoMatch::default()
        }),
        requirement_type: Some(RequirementType::Requires(requires)),
    });
    JwtAuthentication {
        providers,
        rules: rules.into_iter().collect(),
        bypass_cors_preflight: true,
        ..JwtAuthentication::default()
    }
}

fn named(name: &str) -> JwtRequirement {
    JwtRequirement {
        requires_type: Some(RequiresType::ProviderName(name.into())),
    }
}

fn any(requirements: Vec<JwtRequirement>) -> JwtRequirement {
    JwtRequirement {
        requires_type: Some(RequiresType::RequiresAny(JwtRequirementOrList { requirements })),
    }
}

fn or_missing(name: &str) -> JwtRequirement {
    any(vec![
        named(name),
        JwtRequirement {
            requires_type: Some(RequiresType::AllowMissing(Empty {})),
        },
    ])
}

/// The requirement tree of S3.7; it follows from the list of providers alone.
fn requirement(providers: &[JwtProvider]) -> Option<JwtRequirement> {
    match providers {
        [] => None,
        [one] => Some(or_missing(&one.name)),
        many => {
            let mut list: Vec<_> = many.iter().map(|p| named(&p.name)).collect();
            list.push(JwtRequirement {
                requires_type: Some(RequiresType::RequiresAll(JwtRequirementAndList {
                    requirements: many.iter().map(|p| or_missing(&p.name)).collect(),
                })),
            });
            Some(any(list))
        }
    }
}

fn provider(model: &JwtProvider, options: &Options<'_>) -> Proto {
    let keys = options.jwks.and_then(|all| all.get(&model.jwks));
    let source = match keys {
        Some(json) => Specifier::InlineString(String::from_utf8_lossy(json).into_owned()),
        None => Specifier::Filename(model.jwks.clone()),
    };
    Proto {
        issuer: model.issuer.clone(),
        audiences: model.audiences.clone(),
        forward: model.forward,
        from_headers: model
            .from_headers
            .iter()
            .map(|(name, prefix)| JwtHeader {
                name: name.clone(),
                value_prefix: prefix.clone(),
            })
            .collect(),
        from_params: model.from_params.clone(),
        from_cookies: model.from_cookies.clone(),
        forward_payload_header: model.payload_header.clone().unwrap_or_default(),
        payload_in_metadata: PAYLOAD.into(),
        normalize_payload_in_metadata: Some(NormalizePayload {
            space_delimited_claims: SPACE_DELIMITED.map(String::from).into(),
        }),
        claim_to_headers: model
            .claim_headers
            .iter()
            .map(|(header, claim)| JwtClaimToHeader {
                header_name: header.clone(),
                claim_name: claim.clone(),
                ..JwtClaimToHeader::default()
            })
            .collect(),
        jwks_source_specifier: Some(JwksSourceSpecifier::LocalJwks(DataSource {
            specifier: Some(source),
            ..DataSource::default()
        })),
        ..Proto::default()
    }
}

/// Reads the filter; inlined key sets are added to `keys`.
pub(crate) fn decode(mut proto: JwtAuthentication, keys: &mut Vec<Secret>) -> Result<JwtAuthn> {
    expect(
        std::mem::take(&mut proto.bypass_cors_preflight),
        "bypass_cors_preflight",
        "only true is supported",
    )?;
    let mut rules = std::mem::take(&mut proto.rules);
    expect(rules.len() <= 1, "rules", "more than one rule is not supported")?;
    let mut protos = std::mem::take(&mut proto.providers);
    done(proto)?;

    let mut providers = Vec::new();
    if let Some(mut rule) = rules.pop() {
        let mut matches = require(&mut rule.r#match, "match").at("rules")?;
        let all = matches!(matches.path_specifier.take(), Some(PathSpecifier::Prefix(p)) if p == "/");
        expect(all, "rules.match", "only prefix / is supported")?;
        done(matches).at("rules.match")?;
        let Some(RequirementType::Requires(requires)) = rule.requirement_type.take() else {
            return fault("rules.requires", "missing");
        };
        // The first names of the tree give the order; the whole tree must be the one that follows from them.
        let mut names = Vec::new();
        if let Some(RequiresType::RequiresAny(list)) = &requires.requires_type {
            for requirement in &list.requirements {
                if let Some(RequiresType::ProviderName(name)) = &requirement.requires_type {
                    names.push(name.clone());
                }
            }
        }
        for name in names {
            let Some(proto) = protos.remove(&name) else {
                return fault("rules.requires", format!("provider {name} is not defined"));
            };
            providers.push(take_provider(name.clone(), proto, keys).at(&format!("providers[{name}]"))?);
        }
        let same = requirement(&providers).as_ref() == Some(&requires);
        expect(same, "rules.requires", "only \"any valid token, or none\" is supported")?;
    }
    if let Some(name) = protos.keys().next() {
        return fault(format!("providers[{name}]"), "not used by the rule");
    }
    Ok(JwtAuthn { providers })
}

fn take_provider(name: String, mut proto: Proto, keys: &mut Vec<Secret>) -> Result<JwtProvider> {
    let payload = std::mem::take(&mut proto.payload_in_metadata);
    expect(
        payload == PAYLOAD,
        "payload_in_metadata",
        "only \"payload\" is supported",
    )?;
    let mut split = proto
        .normalize_payload_in_metadata
        .take()
        .unwrap_or_default()
        .space_delimited_claims;
    split.sort();
    expect(
        split == SPACE_DELIMITED,
        "normalize_payload_in_metadata",
        "only scope and permission are supported",
    )?;
    let jwks = match proto.jwks_source_specifier.take() {
        Some(JwksSourceSpecifier::LocalJwks(mut source)) => {
            let content = match source.specifier.take() {
                Some(Specifier::Filename(name)) => Err(name),
                Some(Specifier::InlineString(text)) => Ok(text.into_bytes()),
                Some(Specifier::InlineBytes(bytes)) => Ok(bytes),
                _ => return fault("local_jwks", "not supported"),
            };
            done(source).at("local_jwks")?;
            match content {
                Err(name) => name,
                Ok(json) => {
                    let hash: String = Sha256::digest(&json)[..16].iter().map(|b| format!("{b:02x}")).collect();
                    let name = format!("jwks/inline-{hash}");
                    keys.push(Secret {
                        name: name.clone(),
                        value: SecretValue::Jwks(json),
                    });
                    name
                }
            }
        }
        Some(JwksSourceSpecifier::RemoteJwks(_)) => return fault("remote_jwks", "not supported"),
        None => return fault("local_jwks", "missing"),
    };
    let mut from_headers = Vec::new();
    for mut header in std::mem::take(&mut proto.from_headers) {
        from_headers.push((
            std::mem::take(&mut header.name),
            std::mem::take(&mut header.value_prefix),
        ));
        done(header).at("from_headers")?;
    }
    let mut claim_headers = Vec::new();
    for mut claim in std::mem::take(&mut proto.claim_to_headers) {
        claim_headers.push((
            std::mem::take(&mut claim.header_name),
            std::mem::take(&mut claim.claim_name),
        ));
        done(claim).at("claim_to_headers")?;
    }
    let payload_header = std::mem::take(&mut proto.forward_payload_header);
    let model = JwtProvider {
        name,
        issuer: std::mem::take(&mut proto.issuer),
        audiences: std::mem::take(&mut proto.audiences),
        jwks,
        from_headers,
        from_params: std::mem::take(&mut proto.from_params),
        from_cookies: std::mem::take(&mut proto.from_cookies),
        forward: std::mem::take(&mut proto.forward),
        payload_header: (!payload_header.is_empty()).then_some(payload_header),
        claim_headers,
    };
    done(proto)?;
    Ok(model)
}
