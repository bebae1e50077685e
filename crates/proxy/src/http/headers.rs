//! Headers: strictness on the way in, hop-by-hop fields, forwarding headers, request ids.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Version};
use mantlet_model::http::{ForwardedClientCert, HttpManager};
use rand::Rng;

use crate::connection::Downstream;

/// `x-forwarded-client-cert`.
pub const XFCC: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// `x-request-id`.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// `x-forwarded-for`.
pub const XFF: HeaderName = HeaderName::from_static("x-forwarded-for");
/// `x-forwarded-proto`.
pub const XFP: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// `x-envoy-upstream-service-time`.
pub const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
/// `x-envoy-attempt-count`.
pub const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");
/// `x-envoy-decorator-operation`.
pub const DECORATOR: HeaderName = HeaderName::from_static("x-envoy-decorator-operation");
/// `x-envoy-peer-metadata`.
pub const PEER_METADATA: HeaderName = HeaderName::from_static("x-envoy-peer-metadata");
/// `x-envoy-peer-metadata-id`.
pub const PEER_METADATA_ID: HeaderName = HeaderName::from_static("x-envoy-peer-metadata-id");

/// Says that an HTTP/2 request between two Mantlet proxies was HTTP/1.1 at its client.
pub const ORIGINAL_VERSION: HeaderName = HeaderName::from_static("x-mantlet-http-version");

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Headers that `Connection` can not remove: security decisions rest on them (threat 41).
const PROTECTED: [&str; 8] = [
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-request-id",
    "authorization",
    "host",
    "content-length",
    "transfer-encoding",
];

/// Refuses requests that two parsers may read differently. The text is the response code detail.
///
/// # Errors
/// Envoy's details of the first fault found; the answer is 400.
pub fn check(parts: &Parts) -> Result<(), &'static str> {
    let headers = &parts.headers;
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    if let Some(first) = lengths.next() {
        if lengths.next().is_some() || !first.as_bytes().iter().all(u8::is_ascii_digit) || first.is_empty() {
            return Err("http1.unexpected_content_length");
        }
        if headers.contains_key(header::TRANSFER_ENCODING) {
            return Err("http1.content_length_and_chunked_not_allowed");
        }
    }
    if let Some(encoding) = headers.get(header::TRANSFER_ENCODING) {
        let several = headers.get_all(header::TRANSFER_ENCODING).iter().nth(1).is_some();
        if several || !encoding.as_bytes().eq_ignore_ascii_case(b"chunked") || parts.version < Version::HTTP_11 {
            return Err("http1.invalid_transfer_encoding");
        }
    }
    if headers.get_all(header::HOST).iter().nth(1).is_some() {
        return Err("http1.multiple_host_headers");
    }
    if let (Some(authority), Some(host)) = (parts.uri.authority(), headers.get(header::HOST))
        && parts.version == Version::HTTP_2
        && !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes())
    {
        return Err("http2.authority_host_mismatch");
    }
    Ok(())
}

/// Whether an authority is made of what hosts and ports are made of. `@` would hide a host behind a user's name and `,`
/// behind another host (threat 15); Envoy lets both pass.
pub fn is_authority(authority: &[u8]) -> bool {
    authority
        .iter()
        .all(|b| b.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=:[]".contains(b))
}

/// Removes what only proxies of the mesh may say to each other (S6.73); for requests from outside.
pub fn strip_internal(headers: &mut HeaderMap) {
    let own = |name: &HeaderName| name.as_str().starts_with("x-envoy-");
    if headers.keys().any(own) {
        let named: Vec<HeaderName> = headers.keys().filter(|n| own(n)).cloned().collect();
        for name in named {
            headers.remove(name);
        }
    }
}

/// Gives the fields of an HTTP/2 request the one reading that they would have in HTTP/1.1: no whitespace around values
/// (RFC 9113 section 8.2.1), and one `Cookie` however many crumbs there are (section 8.2.3).
pub fn as_http1(headers: &mut HeaderMap) {
    for value in headers.values_mut() {
        let bytes = value.as_bytes();
        let blank = |b: Option<&u8>| matches!(b, Some(b' ' | b'\t'));
        if (blank(bytes.first()) || blank(bytes.last()))
            && let Ok(trimmed) = HeaderValue::from_bytes(bytes.trim_ascii())
        {
            *value = trimmed;
        }
    }
    if headers.get_all(header::COOKIE).iter().nth(1).is_some() {
        let crumbs: Vec<&[u8]> = headers
            .get_all(header::COOKIE)
            .iter()
            .map(HeaderValue::as_bytes)
            .collect();
        if let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
            headers.insert(header::COOKIE, whole);
        }
    }
}

/// The authority of a request: its URI's if absolute, else its `Host`.
pub fn authority(parts: &Parts) -> Option<HeaderValue> {
    if let Some(authority) = parts.uri.authority() {
        return HeaderValue::from_str(authority.as_str()).ok();
    }
    parts.headers.get(header::HOST).cloned()
}

/// Whether this is an HTTP/1.1 upgrade, and to what.
pub fn upgrade(parts: &Parts) -> Option<&HeaderValue> {
    if parts.version != Version::HTTP_11 {
        return None;
    }
    let asked = tokens(&parts.headers, &header::CONNECTION).any(|t| t.eq_ignore_ascii_case("upgrade"));
    if asked {
        parts.headers.get(header::UPGRADE)
    } else {
        None
    }
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
        .filter(|t| !t.is_empty())
}

/// Fields that belong to one hop or to the proxies. Most messages have none of them, and a search by name costs a hash of the
/// name, so one pass over the message's own few names finds out what there is to remove.
fn is_passing(name: &HeaderName) -> bool {
    match name.as_str().as_bytes() {
        name @ [b't', _] => name == b"te",
        name @ [b'e', _, _, _, _, _] => name == b"expect",
        name @ [b'u', _, _, _, _, _, _] => name == b"upgrade",
        name @ [b'c' | b'k', _, _, _, _, _, _, _, _, _] => name == b"connection" || name == b"keep-alive",
        name @ [b'p', b'r', b'o', b'x', b'y', ..] => name == b"proxy-connection",
        name @ [b't', b'r', b'a', b'n', ..] => name == b"transfer-encoding",
        name @ [b'x', b'-', b'e', b'n', b'v', b'o', b'y', b'-', b'd' | b'p', ..] => {
            name == DECORATOR.as_str().as_bytes()
                || name == PEER_METADATA.as_str().as_bytes()
                || name == PEER_METADATA_ID.as_str().as_bytes()
        }
        _ => false,
    }
}

/// Whether [`strip_hop_by_hop`] and the like would find anything.
pub fn has_passing(headers: &HeaderMap) -> bool {
    headers.keys().any(is_passing)
}

/// Removes what belongs to one hop (RFC 9110 section 7.6.1). With `upgrade` the two fields of the handshake stay.
pub fn strip_hop_by_hop(headers: &mut HeaderMap, upgrade: bool) {
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = tokens(headers, &header::CONNECTION)
            .filter(|t| !PROTECTED.iter().any(|p| p.eq_ignore_ascii_case(t)))
            .filter(|t| !t.eq_ignore_ascii_case("upgrade") && !t.eq_ignore_ascii_case("te"))
            .filter_map(|t| HeaderName::from_bytes(t.as_bytes()).ok())
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
        if upgrade {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        }
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(header::TRANSFER_ENCODING);
    if !upgrade {
        headers.remove(header::UPGRADE);
    }
    if let Some(te) = headers.get(header::TE)
        && !te.as_bytes().eq_ignore_ascii_case(b"trailers")
    {
        headers.remove(header::TE);
    }
}

/// `x-forwarded-client-cert` by the chain's mode (S6.60 to S6.64).
pub fn forward_client_cert(headers: &mut HeaderMap, manager: &HttpManager, downstream: &Downstream) {
    let mode = manager.forwarded_client_cert;
    if mode == ForwardedClientCert::AlwaysForwardOnly {
        return;
    }
    let Some(peer) = &downstream.peer else {
        // Without mTLS nobody vouches for the header (S6.61).
        headers.remove(XFCC);
        return;
    };
    match mode {
        ForwardedClientCert::Sanitize => {
            headers.remove(XFCC);
        }
        ForwardedClientCert::ForwardOnly | ForwardedClientCert::AlwaysForwardOnly => {}
        ForwardedClientCert::AppendForward | ForwardedClientCert::SanitizeSet => {
            let mut value: Vec<u8> = Vec::with_capacity(256);
            if mode == ForwardedClientCert::AppendForward {
                for earlier in headers.get_all(XFCC) {
                    value.extend_from_slice(earlier.as_bytes());
                    value.push(b',');
                }
            }
            element(&mut value, downstream, peer);
            match HeaderValue::from_bytes(&value) {
                Ok(value) => {
                    headers.insert(XFCC, value);
                }
                Err(_) => {
                    headers.remove(XFCC);
                }
            }
        }
    }
}

/// `By=…;Hash=…;Subject="…";URI=…`, DNS names after it.
fn element(out: &mut Vec<u8>, downstream: &Downstream, peer: &crate::connection::Peer) {
    if let Some(own) = &downstream.own_uri {
        out.extend_from_slice(b"By=");
        out.extend_from_slice(own.as_bytes());
        out.push(b';');
    }
    out.extend_from_slice(b"Hash=");
    out.extend_from_slice(peer.certificate.sha256.as_bytes());
    out.extend_from_slice(b";Subject=\"");
    for byte in peer.certificate.subject.bytes() {
        if matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(byte);
    }
    out.extend_from_slice(b"\";URI=");
    // A comma or semicolon in a URI would read as the next element.
    let first = peer.uris.first().map_or("", String::as_str);
    let quoted = first.contains([',', ';', '=', '"']);
    if quoted {
        out.push(b'"');
    }
    for byte in first.bytes() {
        if quoted && matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(byte);
    }
    if quoted {
        out.push(b'"');
    }
    for name in &peer.certificate.dns_names {
        out.extend_from_slice(b";DNS=");
        out.extend_from_slice(name.as_bytes());
    }
}

/// A version 4 UUID.
pub fn new_request_id() -> HeaderValue {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut random = [0u8; 16];
    rand::rng().fill(&mut random);
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    let mut text = [b'-'; 36];
    let mut at = 0;
    for (i, byte) in random.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            at += 1;
        }
        text[at] = DIGITS[usize::from(byte >> 4)];
        text[at + 1] = DIGITS[usize::from(byte & 15)];
        at += 2;
    }
    HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("-"))
}

/// Whether sending the request twice does no harm (RFC 9110 section 9.2.2).
pub fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    )
}

/// Whether a request is gRPC, by its content type.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|v| {
        let v = v.as_bytes();
        v == b"application/grpc" || v.starts_with(b"application/grpc+") || v.starts_with(b"application/grpc;")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(build: impl FnOnce(http::request::Builder) -> http::request::Builder) -> Parts {
        build(http::Request::builder()).body(()).unwrap().into_parts().0
    }

    #[test]
    fn ambiguous_lengths_are_refused() {
        let two = parts(|b| b.header("content-length", "3").header("content-length", "4"));
        assert!(check(&two).is_err());
        let plus = parts(|b| b.header("content-length", "+3"));
        assert!(check(&plus).is_err());
        let both = parts(|b| b.header("content-length", "3").header("transfer-encoding", "chunked"));
        assert!(check(&both).is_err());
        let old = parts(|b| b.version(Version::HTTP_10).header("transfer-encoding", "chunked"));
        assert!(check(&old).is_err());
        let odd = parts(|b| b.header("transfer-encoding", "gzip, chunked"));
        assert!(check(&odd).is_err());
        let hosts = parts(|b| b.header("host", "a").header("host", "b"));
        assert!(check(&hosts).is_err());
        assert!(check(&parts(|b| b.header("content-length", "3").header("host", "a"))).is_ok());
    }

    #[test]
    fn connection_can_not_name_security_headers() {
        let mut headers = HeaderMap::new();
        headers.insert(
            "connection",
            "close, x-hop, X-Forwarded-Client-Cert, authorization".parse().unwrap(),
        );
        headers.insert("x-hop", "1".parse().unwrap());
        headers.insert("x-forwarded-client-cert", "URI=a".parse().unwrap());
        headers.insert("authorization", "Bearer x".parse().unwrap());
        headers.insert("keep-alive", "5".parse().unwrap());
        headers.insert("te", "gzip".parse().unwrap());
        strip_hop_by_hop(&mut headers, false);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "x-forwarded-client-cert"]);
    }

    #[test]
    fn one_pass_finds_whatever_would_be_removed() {
        let names = [
            "connection",
            "keep-alive",
            "proxy-connection",
            "transfer-encoding",
            "upgrade",
            "te",
            "expect",
            "x-envoy-decorator-operation",
            "x-envoy-peer-metadata",
            "x-envoy-peer-metadata-id",
        ];
        for name in names {
            let mut headers = HeaderMap::new();
            headers.insert("accept", "*/*".parse().unwrap());
            headers.insert(HeaderName::from_static(name), "x".parse().unwrap());
            assert!(has_passing(&headers), "{name}");
        }
        let mut headers = HeaderMap::new();
        for name in [
            "tx",
            "x-envoy-upstream-service-time",
            "user-agent",
            "trailer",
            "cookie-jars",
            "host",
            "proxy-authenticate",
        ] {
            headers.insert(HeaderName::from_static(name), "x".parse().unwrap());
        }
        assert!(!has_passing(&headers));
    }

    #[test]
    fn request_ids_are_version_4_uuids() {
        let id = new_request_id();
        let id = id.to_str().unwrap();
        let groups: Vec<usize> = id.split('-').map(str::len).collect();
        assert_eq!(groups, [8, 4, 4, 4, 12]);
        assert_eq!(&id[14..15], "4");
        assert_ne!(new_request_id().to_str().unwrap(), id);
    }
}
