//! Answers of our own: denials, faults, direct responses. Texts and headers are Envoy's.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Response, StatusCode};

use crate::ext_authz::Change;
use crate::http::body::ResponseBody;
use crate::telemetry::record::Account;

/// An answer to make.
pub struct Reply {
    /// Status.
    pub status: StatusCode,
    /// Text of the body.
    pub body: Bytes,
    /// Response code details for the access log.
    pub details: std::borrow::Cow<'static, str>,
    /// Response flags.
    pub flags: u32,
    /// Changes of the answer's headers, made last.
    pub headers: Vec<Change>,
}

impl Reply {
    /// An answer with a text.
    pub fn new(
        status: StatusCode,
        body: impl Into<Bytes>,
        details: impl Into<std::borrow::Cow<'static, str>>,
        flags: u32,
    ) -> Self {
        Reply {
            status,
            body: body.into(),
            details: details.into(),
            flags,
            headers: Vec::new(),
        }
    }
}

/// gRPC status of an HTTP status (Envoy's table).
fn grpc_status(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "13",
        401 => "16",
        403 => "7",
        404 => "12",
        429 | 502 | 503 | 504 => "14",
        _ => "2",
    }
}

/// Makes the response; gRPC clients get a trailers-only answer (S2.91).
pub fn respond(reply: Reply, grpc: bool, server: &str, mut account: Box<Account>) -> Response<ResponseBody> {
    account.flags |= reply.flags;
    account.details = reply.details;
    let mut headers = HeaderMap::with_capacity(6);
    let body = if grpc {
        let status = grpc_status(reply.status);
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert("grpc-status", HeaderValue::from_static(status));
        if !reply.body.is_empty() {
            headers.insert("grpc-message", grpc_message(&reply.body));
        }
        account.grpc_status = Some(status.into());
        Bytes::new()
    } else {
        if !reply.body.is_empty() {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        reply.body
    };
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    headers.insert(header::DATE, httpdate_now());
    if let Ok(server) = HeaderValue::from_str(if server.is_empty() { "envoy" } else { server }) {
        headers.insert(header::SERVER, server);
    }
    crate::ext_authz::apply(&mut headers, &reply.headers);
    if grpc && !reply.headers.is_empty() {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    }
    let status = if grpc { StatusCode::OK } else { reply.status };
    account.status = status.as_u16();
    let mut response = Response::new(ResponseBody::full(body, account));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// `grpc-message` percent-encodes what is not printable ASCII (gRPC over HTTP/2).
fn grpc_message(text: &[u8]) -> HeaderValue {
    let mut out = Vec::with_capacity(text.len());
    for byte in text {
        if (0x20..0x7f).contains(byte) && *byte != b'%' {
            out.push(*byte);
        } else {
            out.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    HeaderValue::from_bytes(&out).unwrap_or(HeaderValue::from_static(""))
}

/// IMF-fixdate of now (RFC 9110 section 5.6.7).
fn httpdate_now() -> HeaderValue {
    let format = time::macros::format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    time::OffsetDateTime::now_utc()
        .format(format)
        .ok()
        .and_then(|text| HeaderValue::from_str(&text).ok())
        .unwrap_or(HeaderValue::from_static("Thu, 01 Jan 1970 00:00:00 GMT"))
}
