//! Checks over gRPC: `envoy.service.auth.v3.Authorization/Check` (S2.157).
//!
//! One unary call on the worker's own HTTP/2 connections; a handful of bytes of framing, so no gRPC library between.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::SystemTime;

use bytes::{BufMut, Bytes, BytesMut};
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, HeaderValueOption, Metadata, SocketAddress, address};
use envoy_types::pb::envoy::service::auth::v3::attribute_context::{HttpRequest, Peer, Request as CheckedRequest};
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse};
use envoy_types::pb::google::protobuf::Timestamp;
use http::header::{self, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Request, StatusCode, Uri, Version};
use mantlet_model::ext_authz::ExtAuthz;
use prost::Message;

use super::call::{self, Answer};
use super::{Change, Changes, Denial, Failed, MAX_ANSWER, MAX_CHANGES, Outcome, ShownBody, limit, replacing};
use crate::connection::Downstream;
use crate::http::headers;
use crate::http::request::Exchange;

const PATH: &str = "/envoy.service.auth.v3.Authorization/Check";

/// The question about a request.
pub(super) fn of_request(exchange: &Exchange, provider: &ExtAuthz, body: Option<ShownBody>) -> CheckRequest {
    let parts = &exchange.parts;
    let text = |value: &HeaderValue| lossy(value.as_bytes());
    let authority = text(&exchange.authority);
    let scheme = parts.headers.get(headers::XFP).map(text).unwrap_or_default();
    let path = parts.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let mut map: HashMap<String, String> = HashMap::new();
    let mut put = |name: &str, value: String| {
        // All values, in their order: a provider that sees only one decides about another request (threat 26).
        match map.get_mut(name) {
            Some(earlier) => {
                earlier.push(',');
                earlier.push_str(&value);
            }
            None => {
                map.insert(name.to_string(), value);
            }
        }
    };
    put(":authority", authority.clone());
    put(":method", parts.method.to_string());
    put(":path", path.to_string());
    put(":scheme", scheme.clone());
    let shown =
        |name: &HeaderName| *name != header::HOST && *name != header::TRANSFER_ENCODING && *name != super::PARTIAL_BODY;
    for (name, value) in parts.headers.iter().filter(|(n, _)| shown(n)) {
        put(name.as_str(), text(value));
    }
    let mut request = HttpRequest {
        id: format!("{:016x}", rand::random::<u64>()),
        method: parts.method.to_string(),
        path: path.to_string(),
        host: authority,
        scheme,
        // What has been read of the body.
        size: body
            .as_ref()
            .map_or(0, |b| i64::try_from(b.bytes.len()).unwrap_or(i64::MAX)),
        protocol: match parts.version {
            Version::HTTP_2 => "HTTP/2",
            _ => "HTTP/1.1",
        }
        .into(),
        ..HttpRequest::default()
    };
    if let Some(shown) = body {
        put(super::PARTIAL_BODY.as_str(), shown.partial.to_string());
        if provider.body.is_some_and(|b| b.as_bytes) {
            request.raw_body = shown.bytes.to_vec();
        } else {
            request.body = lossy(&shown.bytes);
        }
    }
    request.headers = map;
    let mut attributes = peers(&exchange.downstream, Some(exchange.remote));
    attributes.route_metadata_context = Some(Metadata::default());
    attributes.request = Some(CheckedRequest {
        time: Some(now()),
        http: Some(request),
    });
    CheckRequest {
        attributes: Some(attributes),
    }
}

/// The question about a connection.
pub(super) fn of_connection(downstream: &Downstream) -> CheckRequest {
    CheckRequest {
        attributes: Some(peers(downstream, None)),
    }
}

fn peers(downstream: &Downstream, remote: Option<IpAddr>) -> AttributeContext {
    let facts = &downstream.facts;
    // A client behind trusted hops has no port that would be known.
    let source = match remote {
        Some(ip) if ip != facts.source.ip() => SocketAddr::new(ip, 0),
        _ => facts.source,
    };
    let uri = downstream.peer.as_ref().and_then(|p| p.uris.first()).cloned();
    let peer = |address: SocketAddr, principal: Option<String>| Peer {
        address: Some(Address {
            address: Some(address::Address::SocketAddress(SocketAddress {
                address: address.ip().to_string(),
                port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
                ..SocketAddress::default()
            })),
        }),
        principal: principal.unwrap_or_default(),
        ..Peer::default()
    };
    AttributeContext {
        source: Some(peer(source, uri)),
        destination: Some(peer(facts.destination, downstream.own_uri.clone())),
        metadata_context: Some(Metadata::default()),
        ..AttributeContext::default()
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
    }
}

/// Protobuf texts are UTF-8; bytes that are none become `!`, so that the question can be asked at all (threat 32).
fn lossy(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        out.extend(chunk.invalid().iter().map(|_| '!'));
    }
    out
}

/// Asks a provider.
pub(super) async fn check(
    downstream: &Rc<Downstream>,
    provider: &ExtAuthz,
    authority: &str,
    question: CheckRequest,
) -> Outcome {
    let mut framed = BytesMut::with_capacity(question.encoded_len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(question.encoded_len()).unwrap_or(u32::MAX));
    if question.encode(&mut framed).is_err() {
        return Outcome::Failed(Failed::new("the question cannot be encoded"));
    }
    let mut request = Request::new(framed.freeze());
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(PATH);
    let fields = request.headers_mut();
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    fields.insert(header::TE, HeaderValue::from_static("trailers"));
    let timeout = limit(provider).as_millis().min(99_999_999);
    if let Ok(value) = HeaderValue::from_str(&format!("{timeout}m")) {
        fields.insert("grpc-timeout", value);
    }
    let name = match authority {
        "" => provider.cluster.replace('|', "_."),
        name => name.to_string(),
    };
    let Ok(authority) = HeaderValue::from_str(&name) else {
        return Outcome::Failed(Failed::new(format!("{name:?} is no authority")));
    };
    match call::call(downstream, &provider.cluster, &authority, true, request).await {
        Ok(answer) => verdict(answer).await,
        Err(error) => Outcome::Failed(Failed::new(error.to_string())),
    }
}

async fn verdict(answer: Answer) -> Outcome {
    let failed = |reason: &str| Outcome::Failed(Failed::new(reason));
    if answer.head.status != StatusCode::OK {
        return failed("the provider does not speak gRPC");
    }
    let head = answer.head.headers.clone();
    let read = answer.read(MAX_ANSWER).await;
    if !read.complete {
        return failed("the provider's answer is too large or broken");
    }
    let status = |map: &HeaderMap| map.get("grpc-status").map(|v| v.as_bytes() == b"0");
    // Trailers decide; without them there must be a trailers-only head, which has no message.
    match read.trailers.as_ref().and_then(status).or_else(|| status(&head)) {
        Some(true) => {}
        _ => return failed("the call failed"),
    }
    match message(read.bytes) {
        Some(response) => meaning(response),
        None => failed("the provider's answer is no CheckResponse"),
    }
}

/// The one message of a unary answer.
fn message(bytes: Bytes) -> Option<CheckResponse> {
    let (prefix, rest) = bytes.split_at_checked(5)?;
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    // Compression was not offered, and one message is all that may come.
    if prefix[0] != 0 || usize::try_from(length).ok()? != rest.len() {
        return None;
    }
    CheckResponse::decode(rest).ok()
}

fn meaning(response: CheckResponse) -> Outcome {
    let ok = response.status.as_ref().is_none_or(|s| s.code == 0);
    match (ok, response.http_response) {
        (_, Some(HttpResponse::ErrorResponse(error))) => Outcome::Failed(Failed {
            answer: Some(denial(error)),
            ..Failed::new("the provider answered with an error")
        }),
        (true, Some(HttpResponse::OkResponse(ok))) => {
            let mut out = Changes::default();
            for name in ok.headers_to_remove.iter().take(MAX_CHANGES) {
                match name.parse::<HeaderName>() {
                    Ok(name) => out.request.push(Change::Remove(name)),
                    // Pseudo headers stay.
                    Err(_) => continue,
                }
            }
            match (changes(ok.headers, true), changes(ok.response_headers_to_add, false)) {
                (Ok(request), Ok(response)) => {
                    out.request.extend(request);
                    out.response = response;
                }
                (Err(reason), _) | (_, Err(reason)) => {
                    // Not even with failOpen: the upstream may rely on what was to be said.
                    tracing::debug!(target: "ext_authz", "{reason}");
                    return Outcome::Denied(Denial {
                        status: StatusCode::SERVICE_UNAVAILABLE,
                        headers: Vec::new(),
                        body: Bytes::new(),
                    });
                }
            }
            out.query_set = ok
                .query_parameters_to_set
                .into_iter()
                .take(MAX_CHANGES)
                .map(|p| (p.key, p.value))
                .collect();
            out.query_remove = ok.query_parameters_to_remove.into_iter().take(MAX_CHANGES).collect();
            Outcome::Allowed(out)
        }
        (true, _) => Outcome::Allowed(Changes::default()),
        (false, Some(HttpResponse::DeniedResponse(denied))) => Outcome::Denied(denial(denied)),
        (false, _) => Outcome::Denied(denial(DeniedHttpResponse::default())),
    }
}

fn denial(denied: DeniedHttpResponse) -> Denial {
    let status = denied
        .status
        .and_then(|s| u16::try_from(s.code).ok())
        .filter(|code| (200..600).contains(code))
        .and_then(|code| StatusCode::from_u16(code).ok())
        .unwrap_or(StatusCode::FORBIDDEN);
    // A no with headers that cannot be said is still a no.
    let headers = changes(denied.headers, false).unwrap_or_default();
    let pairs = headers.into_iter().filter_map(|change| match change {
        Change::Set(name, value) | Change::Add(name, value) => Some((name, value)),
        _ => None,
    });
    Denial {
        status,
        headers: replacing(pairs),
        body: Bytes::from(denied.body),
    }
}

/// Header changes; one that cannot be made spoils the answer, since the upstream might rely on it.
fn changes(options: Vec<HeaderValueOption>, request: bool) -> Result<Vec<Change>, String> {
    if options.len() > MAX_CHANGES {
        return Err("too many header changes".into());
    }
    let mut out = Vec::with_capacity(options.len());
    for mut option in options {
        let Some(header) = option.header.take() else { continue };
        let name: HeaderName = header
            .key
            .parse()
            .map_err(|_| format!("header name {:?} cannot be set", header.key))?;
        let bytes = if header.raw_value.is_empty() {
            header.value.into_bytes()
        } else {
            header.raw_value
        };
        let value = HeaderValue::from_bytes(&bytes).map_err(|_| format!("value of header {name} cannot be set"))?;
        // The deprecated field prevails where it is set.
        #[expect(deprecated, reason = "providers still use it")]
        let append = option.append.take().map(|b| b.value);
        let action = HeaderAppendAction::try_from(option.append_action).unwrap_or_default();
        out.push(match (append, action) {
            (Some(true), _) if request => Change::AppendIfPresent(name, value),
            (Some(true), _) => Change::Add(name, value),
            (Some(false), _) => Change::Set(name, value),
            // Envoy looks at the action in responses only.
            (None, _) if request => Change::Set(name, value),
            (None, HeaderAppendAction::AddIfAbsent) => Change::AddIfAbsent(name, value),
            (None, HeaderAppendAction::OverwriteIfExists) => Change::SetIfPresent(name, value),
            (None, HeaderAppendAction::OverwriteIfExistsOrAdd) => Change::Set(name, value),
            (None, HeaderAppendAction::AppendIfExistsOrAdd) => Change::Add(name, value),
        });
    }
    Ok(out)
}
