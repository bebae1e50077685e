//! JWT authentication (SEMANTICS 3).
//!
//! Key sets are inlined, as istiod does it: whoever fetches them is the control plane, and a proxy never sees a listener
//! without the keys that belong to it. What asks the proxy to fetch is refused.

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
use mantlet_model::http::{JwtAuthn, JwtProvider};

use crate::wire::{At, Result, done, expect, fault, require};

/// Metadata key of the payload (S3.49).
const PAYLOAD: &str = "payload";
/// Claims that are always split at spaces (S2.73).
const SPACE_DELIMITED: [&str; 2] = ["permission", "scope"];

pub(crate) fn encode(model: &JwtAuthn) -> JwtAuthentication {
    let providers: HashMap<_, _> = model.providers.iter().map(|p| (p.name.clone(), provider(p))).collect();
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

fn provider(model: &JwtProvider) -> Proto {
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
        clear_route_cache: model.clear_route_cache,
        payload_in_metadata: PAYLOAD.into(),
        normalize_payload_in_metadata: Some(NormalizePayload {
            space_delimited_claims: SPACE_DELIMITED
                .into_iter()
                .chain(model.space_delimited.iter().map(String::as_str))
                .map(String::from)
                .collect(),
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
            specifier: Some(Specifier::InlineString(model.jwks.to_string())),
            ..DataSource::default()
        })),
        ..Proto::default()
    }
}

/// Reads the filter.
pub(crate) fn decode(mut proto: JwtAuthentication) -> Result<JwtAuthn> {
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
            providers.push(take_provider(name.clone(), proto).at(&format!("providers[{name}]"))?);
        }
        let same = requirement(&providers).as_ref() == Some(&requires);
        expect(same, "rules.requires", "only \"any valid token, or none\" is supported")?;
    }
    if let Some(name) = protos.keys().next() {
        return fault(format!("providers[{name}]"), "not used by the rule");
    }
    Ok(JwtAuthn { providers })
}

fn take_provider(name: String, mut proto: Proto) -> Result<JwtProvider> {
    let payload = std::mem::take(&mut proto.payload_in_metadata);
    expect(
        payload == PAYLOAD,
        "payload_in_metadata",
        "only \"payload\" is supported",
    )?;
    let mut space_delimited = proto
        .normalize_payload_in_metadata
        .take()
        .unwrap_or_default()
        .space_delimited_claims;
    // Splitting them is what the model means without saying so.
    for always in SPACE_DELIMITED {
        let Some(at) = space_delimited.iter().position(|c| c == always) else {
            return fault(
                "normalize_payload_in_metadata",
                format!("{always} must be among the claims"),
            );
        };
        space_delimited.remove(at);
    }
    let jwks = match proto.jwks_source_specifier.take() {
        Some(JwksSourceSpecifier::LocalJwks(mut source)) => {
            let json = match source.specifier.take() {
                Some(Specifier::InlineString(text)) => text,
                Some(Specifier::InlineBytes(bytes)) => match String::from_utf8(bytes) {
                    Ok(text) => text,
                    Err(_) => return fault("local_jwks.inline_bytes", "not UTF-8"),
                },
                _ => return fault("local_jwks", "only inline key sets are supported"),
            };
            done(source).at("local_jwks")?;
            json
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
        jwks: jwks.into(),
        from_headers,
        from_params: std::mem::take(&mut proto.from_params),
        from_cookies: std::mem::take(&mut proto.from_cookies),
        forward: std::mem::take(&mut proto.forward),
        payload_header: (!payload_header.is_empty()).then_some(payload_header),
        claim_headers,
        space_delimited,
        clear_route_cache: std::mem::take(&mut proto.clear_route_cache),
    };
    done(proto)?;
    Ok(model)
}
