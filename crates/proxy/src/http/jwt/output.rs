//! What the application learns from a token: the payload, single claims, and the claims that policies look at.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use http::HeaderMap;
use http::header::{self, HeaderName, HeaderValue};
use mantlet_identity::jws::Token;
use serde_json::{Map, Value};

/// Claims that are lists separated by spaces, always (S2.73).
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];

/// The headers that a verified token adds, and the first one whose claim cannot be a header value.
pub(super) fn headers(
    payload: Option<&HeaderName>,
    claims: &[(HeaderName, Vec<String>)],
    token: &Token<'_>,
) -> (Vec<(HeaderName, HeaderValue)>, Option<HeaderName>) {
    let mut out = Vec::new();
    let mut impossible = None;
    if let Some(name) = payload
        && let Ok(value) = HeaderValue::try_from(URL_SAFE_NO_PAD.encode(token.payload()))
    {
        out.push((name.clone(), value));
    }
    for (name, path) in claims {
        let mut names = path.iter();
        let first = names.next().and_then(|name| token.claims().get(name));
        let claim = names.try_fold(first, |value, name| value.map(|v| v.get(name)));
        let Some(text) = claim.flatten().and_then(text) else {
            continue;
        };
        match HeaderValue::try_from(text) {
            Ok(value) => out.push((name.clone(), value)),
            // It would end the header early in the next program, and begin another.
            Err(_) => impossible = impossible.or(Some(name.clone())),
        }
    }
    (out, impossible)
}

/// A claim as text: numbers as in C++'s `to_string`, lists and objects as base64 of their JSON (S3.45).
fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::Bool(value) => Some(value.to_string()),
        Value::String(text) => Some(text.clone()).filter(|t| !t.is_empty()),
        Value::Number(number) => number.as_f64().map(|number| {
            const LIMIT: f64 = 18_446_744_073_709_551_616.0;
            if (0.0..LIMIT).contains(&number) && number.fract() == 0.0 {
                format!("{}", number as u64)
            } else {
                format!("{number:.6}")
            }
        }),
        Value::Array(_) | Value::Object(_) => serde_json::to_string(value).ok().map(|json| STANDARD.encode(json)),
    }
}

/// The claims as policies see them: lists that were written with spaces are lists (S2.73, S3.47).
pub(super) fn normalize(mut claims: Map<String, Value>, more: &[String]) -> Value {
    for name in SPACE_DELIMITED.into_iter().chain(more.iter().map(String::as_str)) {
        if let Some(claim) = claims.get_mut(name)
            && let Value::String(text) = claim
            && !text.is_empty()
        {
            let parts = text.split(' ').filter(|p| !p.is_empty());
            *claim = Value::Array(parts.map(Value::from).collect());
        }
    }
    Value::Object(claims)
}

/// Takes these headers out of `Connection`: a client must not be able to have them removed on the next hop.
pub(super) fn protect(headers: &mut HeaderMap, names: &[HeaderName]) {
    let ours = |token: &str| names.iter().any(|n| token.trim().eq_ignore_ascii_case(n.as_str()));
    let values: Vec<HeaderValue> = headers.get_all(header::CONNECTION).iter().cloned().collect();
    let named = |v: &HeaderValue| v.to_str().is_ok_and(|v| v.split(',').any(ours));
    if !values.iter().any(named) {
        return;
    }
    headers.remove(header::CONNECTION);
    for value in values {
        let Ok(text) = value.to_str() else { continue };
        let left: Vec<&str> = text.split(',').filter(|t| !ours(t)).collect();
        if let Ok(value) = HeaderValue::try_from(left.join(","))
            && !value.is_empty()
        {
            headers.append(header::CONNECTION, value);
        }
    }
}
