//! Where tokens are in a request: headers, query parameters, cookies (S3.10–S3.18). Order and reading are Envoy's.

use std::borrow::Cow;

use http::header::{self, HeaderName};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, Uri};
use mantlet_model::http::JwtProvider;

/// A place that a provider looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A header, and the text before the token.
    Header {
        /// Name.
        name: HeaderName,
        /// Text before the token; empty: every value of the header is a token.
        prefix: String,
    },
    /// A query parameter.
    Parameter(String),
    /// A cookie.
    Cookie(String),
}

impl Place {
    /// Whether taking this place's tokens away takes that one's away as well.
    pub(super) fn carries(&self, other: &Place) -> bool {
        match (self, other) {
            (Place::Header { name, .. }, Place::Header { name: other, .. }) => name == other,
            (Place::Parameter(name), Place::Parameter(other)) => name == other,
            _ => false,
        }
    }
}

/// A token in a request.
#[derive(Debug)]
pub(super) struct Found<'a> {
    /// Its place.
    pub(super) place: &'a Place,
    /// Its text.
    pub(super) text: Cow<'a, str>,
}

/// The places of a provider in the order of verification: cookies, parameters, headers, each from the last name to the
/// first. So the token of the first header is verified last, and its payload is the one that counts (S3.49).
pub(super) fn places(provider: &JwtProvider) -> Vec<Place> {
    let header = |name: &str, prefix: &str| {
        let name = name.parse::<HeaderName>().ok()?;
        Some(Place::Header {
            name,
            prefix: prefix.to_string(),
        })
    };
    let none = provider.from_headers.is_empty() && provider.from_params.is_empty() && provider.from_cookies.is_empty();
    let mut headers: Vec<Place>;
    let mut parameters = provider.from_params.clone();
    if none {
        headers = header("authorization", "Bearer ").into_iter().collect();
        parameters.push("access_token".into());
    } else {
        headers = provider.from_headers.iter().filter_map(|(n, p)| header(n, p)).collect();
    }
    let mut cookies = provider.from_cookies.clone();
    let key = |place: &Place| match place {
        Place::Header { name, prefix } => format!("{name}{prefix}"),
        Place::Parameter(name) | Place::Cookie(name) => name.clone(),
    };
    headers.sort_by_key(key);
    headers.dedup_by_key(|place| key(place));
    parameters.sort();
    parameters.dedup();
    cookies.sort();
    cookies.dedup();
    let mut all = headers;
    all.extend(parameters.into_iter().map(Place::Parameter));
    all.extend(cookies.into_iter().map(Place::Cookie));
    all.reverse();
    all
}

/// The tokens in these places.
pub(super) fn find<'a>(places: &'a [Place], parts: &'a Parts) -> Vec<Found<'a>> {
    let mut out = Vec::new();
    for place in places {
        match place {
            Place::Header { name, prefix } if prefix.is_empty() => {
                let values = parts.headers.get_all(name).iter().collect::<Vec<_>>();
                out.extend(values.into_iter().rev().map(|value| Found {
                    place,
                    text: String::from_utf8_lossy(value.as_bytes()),
                }));
            }
            Place::Header { name, prefix } => {
                let text = joined(&parts.headers, name).and_then(|value| after_prefix(value, prefix));
                out.extend(text.map(|text| Found { place, text }));
            }
            Place::Parameter(name) => {
                let text = parts.uri.query().and_then(|query| parameter(query, name));
                out.extend(text.map(|text| Found { place, text }));
            }
            Place::Cookie(name) => out.extend(cookie(&parts.headers, name).map(|text| Found { place, text })),
        }
    }
    out
}

/// All values of a header, joined by commas (S3.18).
fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter();
    let first = String::from_utf8_lossy(values.next()?.as_bytes());
    let mut all: Option<String> = None;
    for value in values {
        let all = all.get_or_insert_with(|| first.to_string());
        all.push(',');
        all.push_str(&String::from_utf8_lossy(value.as_bytes()));
    }
    Some(all.map_or(first, Cow::Owned))
}

/// What follows the first occurrence of the prefix, from the first character on that can be in a token (S3.13).
fn after_prefix<'a>(value: Cow<'a, str>, prefix: &str) -> Option<Cow<'a, str>> {
    let after = value.find(prefix)? + prefix.len();
    let token = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    // Without any such character the whole value counts as a token, and fails.
    let start = value[after..].find(token).map_or(0, |at| after + at);
    Some(match value {
        Cow::Borrowed(text) => Cow::Borrowed(&text[start..]),
        Cow::Owned(text) => Cow::Owned(text[start..].to_string()),
    })
}

/// The first value of a query parameter, percent-decoded.
fn parameter<'a>(query: &'a str, name: &str) -> Option<Cow<'a, str>> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key) == name).then(|| decoded(value))
    })
}

/// Percent-decodes; what is no escape stays as it is.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let hex = |offset: usize| char::from(*bytes.get(at + offset)?).to_digit(16);
        match (byte, hex(1), hex(2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

/// The first value of a cookie.
fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<Cow<'a, str>> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|v| std::str::from_utf8(v.as_bytes()).ok())
        .flat_map(|v| v.split(';'))
        .find_map(|pair| {
            let (key, value) = pair.trim_start_matches(' ').split_once('=')?;
            let bare = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
            (key == name).then(|| Cow::Borrowed(bare.unwrap_or(value)))
        })
}

/// The query without a parameter, everything else as it was; `None` when nothing is left.
pub fn without_parameter(query: &str, name: &str) -> Option<String> {
    let left: Vec<&str> = query
        .split('&')
        .filter(|pair| decoded(pair.split_once('=').map_or(*pair, |(key, _)| key)) != name)
        .collect();
    (!left.is_empty()).then(|| left.join("&"))
}

/// Takes a parameter out of a request target.
pub fn remove_parameter(uri: &mut Uri, name: &str) {
    let Some(query) = uri.query() else { return };
    let target = match without_parameter(query, name) {
        Some(query) => format!("{}?{query}", uri.path()),
        None => uri.path().to_string(),
    };
    // A part of a valid target is one.
    if let Ok(target) = PathAndQuery::from_maybe_shared(target) {
        *uri = Uri::from(target);
    }
}
