//! Token authentication as RequestAuthentication has it (SEMANTICS section 3), for the tokens that the generator writes.

use serde_json::Value;

use crate::naive::{bound, list, text};
use crate::world::{FIRST_ISSUER, Place, Request, SECOND_ISSUER, Signature, Token, World};

/// What verification leaves behind.
#[derive(Clone, Debug, Default)]
pub struct Verified {
    /// Payload of the token that counts.
    pub claims: Option<Value>,
    /// Places whose token was taken out of the request.
    pub spent: Vec<Place>,
    /// Headers that no longer hold what the client sent.
    pub stripped: Vec<String>,
    /// Headers made of claims.
    pub added: Vec<(String, String)>,
}

enum Fault {
    Missing,
    UnknownIssuer,
    Other(u16),
}

/// Verifies the tokens of a request; the error is the status of the answer.
///
/// # Errors
/// 401, or 403 for a wrong audience (S3.23).
pub fn verify(world: &World, request: &Request) -> Result<Verified, u16> {
    let mut rules: Vec<&Value> = bound(world, "RequestAuthentication")
        .into_iter()
        .flat_map(|policy| list(&policy["spec"]["jwtRules"]))
        .collect();
    rules.sort_by_key(|rule| text(&rule["issuer"]));
    let mut out = Verified::default();
    if rules.is_empty() {
        return Ok(out);
    }
    for rule in &rules {
        let outputs = list(&rule["outputClaimToHeaders"]).iter().map(|o| text(&o["header"]));
        out.stripped.extend(outputs.map(str::to_ascii_lowercase));
    }
    // S3.6
    let has = |name: &str| {
        request
            .headers
            .iter()
            .any(|(n, v)| n.eq_ignore_ascii_case(name) && !v.is_empty())
    };
    if request.method == "OPTIONS" && has("origin") && has("access-control-request-method") {
        return Ok(out);
    }
    let mut worst: Option<Fault> = None;
    for rule in &rules {
        match one(rule, request) {
            Ok((claims, places)) => {
                if rule["forwardOriginalToken"] != true {
                    // S3.19: cookies stay.
                    out.spent = places.into_iter().filter(|p| *p != Place::Cookie).collect();
                }
                for output in list(&rule["outputClaimToHeaders"]) {
                    if let Some(value) = claims[text(&output["claim"])].as_str().filter(|v| !v.is_empty()) {
                        out.added
                            .push((text(&output["header"]).to_ascii_lowercase(), value.to_string()));
                    }
                }
                out.claims = Some(claims);
                return Ok(out);
            }
            // S3.24
            Err(fault) => {
                worst = Some(match (worst, fault) {
                    (Some(Fault::Other(a)), Fault::Missing | Fault::UnknownIssuer) => Fault::Other(a),
                    (Some(Fault::UnknownIssuer), Fault::Missing) => Fault::UnknownIssuer,
                    (_, fault) => fault,
                });
            }
        }
    }
    match worst {
        None | Some(Fault::Missing) => Ok(out),
        Some(Fault::UnknownIssuer) => Err(401),
        Some(Fault::Other(status)) => Err(status),
    }
}

/// Whether a token is refused by every rule that looks where it is: Mantlet then refuses the request, even if another
/// place holds a good one.
pub fn bad_beside_good(world: &World, request: &Request) -> bool {
    let rules: Vec<&Value> = bound(world, "RequestAuthentication")
        .into_iter()
        .flat_map(|policy| list(&policy["spec"]["jwtRules"]))
        .collect();
    verify(world, request).is_ok_and(|v| v.claims.is_some())
        && request.tokens.iter().any(|(place, token)| {
            let mut looking = rules.iter().filter(|rule| places(rule).contains(place)).peekable();
            looking.peek().is_some() && !looking.any(|rule| check(rule, token).is_ok())
        })
}

/// The places where a rule looks, in the order in which they are read.
fn places(rule: &Value) -> Vec<Place> {
    let given = ["fromHeaders", "fromParams", "fromCookies"].map(|key| list(&rule[key]));
    if given.iter().all(|l| l.is_empty()) {
        return vec![Place::Bearer, Place::AccessToken];
    }
    let mut out = Vec::new();
    for header in given[0] {
        out.push(if text(&header["name"]).eq_ignore_ascii_case("x-token") {
            Place::Header
        } else {
            Place::Bearer
        });
    }
    // Envoy keeps headers by name, whatever their order in the policy.
    out.sort();
    out.extend(given[1].iter().map(|_| Place::Parameter));
    out.extend(given[2].iter().map(|_| Place::Cookie));
    out
}

/// All tokens where one rule looks must be right (S3.17).
fn one(rule: &Value, request: &Request) -> Result<(Value, Vec<Place>), Fault> {
    let mut found = Vec::new();
    for place in places(rule) {
        found.extend(request.tokens.iter().filter(|(p, _)| *p == place));
    }
    // Envoy takes them from the end, so that the first one is verified last and counts (S3.49).
    let mut last = Err(Fault::Missing);
    for (_, token) in found.iter().rev() {
        check(rule, token)?;
        last = Ok((token.claims.clone(), found.iter().map(|(p, _)| *p).collect()));
    }
    last
}

/// S3.25, in its order.
fn check(rule: &Value, token: &Token) -> Result<(), Fault> {
    if matches!(token.signature, Signature::Malformed | Signature::Absent) {
        return Err(Fault::Other(401));
    }
    let claims = &token.claims;
    if claims["iss"].as_str() != rule["issuer"].as_str() {
        return Err(Fault::UnknownIssuer);
    }
    // Times are in the far past or the far future here.
    let now = 1_800_000_000;
    if claims["exp"].as_u64().is_some_and(|t| t < now) || claims["nbf"].as_u64().is_some_and(|t| t > now) {
        return Err(Fault::Other(401));
    }
    let wanted = list(&rule["audiences"]);
    let given: Vec<&Value> = match &claims["aud"] {
        Value::Array(all) => all.iter().collect(),
        Value::Null => Vec::new(),
        one => vec![one],
    };
    if !wanted.is_empty() && !given.iter().any(|aud| wanted.contains(aud)) {
        return Err(Fault::Other(403));
    }
    let right = match text(&rule["issuer"]) {
        FIRST_ISSUER => matches!(token.signature, Signature::First | Signature::FirstEd),
        SECOND_ISSUER => token.signature == Signature::Second,
        _ => false,
    };
    if right { Ok(()) } else { Err(Fault::Other(401)) }
}
