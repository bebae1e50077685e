//! HTTP forms: bodies in and out, what the client accepts, JSON and error responses.
//!
//! Used by every handler. Knows media types, not resources.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use serde_json::Value;

use crate::error::{ApiError, ApiResult};

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// Response body.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;

/// Largest request body, bytes (kube-apiserver's limit).
pub(crate) const MAX_BODY: usize = 3 << 20;
/// Largest stored object, bytes (etcd's default request limit).
pub(crate) const MAX_OBJECT: usize = 1536 << 10;
/// Deepest nesting of a document.
pub(crate) const MAX_DEPTH: usize = 100;
/// How long a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A body from bytes.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// Any body as ours.
pub(crate) fn erase<B>(body: B) -> Body
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    body.map_err(Into::into).boxed_unsync()
}

/// A JSON response.
pub(crate) fn json_response(code: u16, value: &Value) -> Response<Body> {
    let mut bytes = serde_json::to_vec(value).unwrap_or_default();
    bytes.push(b'\n');
    respond(code, "application/json", bytes)
}

/// A response of any type.
pub(crate) fn respond(code: u16, content_type: &str, bytes: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(bytes));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if let Ok(value) = content_type.parse() {
        response.headers_mut().insert(header::CONTENT_TYPE, value);
    }
    response.headers_mut().insert(
        header::CACHE_CONTROL,
        header::HeaderValue::from_static("no-cache, private"),
    );
    response
}

/// An error response.
pub(crate) fn error_response(e: &ApiError) -> Response<Body> {
    let mut response = json_response(e.code, &e.status());
    if matches!(e.code, 429 | 504 | 503) {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    response
}

/// Adds `Warning: 299 - "text"` headers.
pub(crate) fn add_warnings(response: &mut Response<Body>, warnings: &[String]) {
    for w in warnings.iter().take(32) {
        let clean: String = w.chars().filter(|c| !c.is_control()).take(4096).collect();
        let quoted = clean.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = header::HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            response.headers_mut().append(header::WARNING, value);
        } else if let Ok(value) = header::HeaderValue::from_bytes(format!("299 - \"{quoted}\"").as_bytes()) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
}

/// The form in which the client wants objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The object itself.
    Object,
    /// `meta.k8s.io/v1` (or v1beta1) Table.
    Table {
        /// Whether v1beta1 was asked for.
        beta: bool,
    },
    /// `PartialObjectMetadata` or its list.
    Metadata {
        /// Whether v1beta1 was asked for.
        beta: bool,
    },
}

/// Chooses the form by the `Accept` header.
pub(crate) fn negotiate(headers: &HeaderMap) -> ApiResult<Form> {
    let mut any = false;
    for value in headers.get_all(header::ACCEPT) {
        let Ok(text) = value.to_str() else { continue };
        for clause in text.split(',').map(str::trim).filter(|c| !c.is_empty()) {
            any = true;
            let mut parts = clause.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            if !matches!(media, "application/json" | "*/*" | "application/*") {
                continue;
            }
            let (mut form, mut version, mut group) = ("", "", "");
            for p in parts {
                match p.split_once('=') {
                    Some(("as", v)) => form = v,
                    Some(("v", v)) => version = v,
                    Some(("g", v)) => group = v,
                    _ => {}
                }
            }
            let beta = version == "v1beta1";
            match form {
                "" => return Ok(Form::Object),
                _ if group != "meta.k8s.io" || !matches!(version, "v1" | "v1beta1") => {}
                "Table" => return Ok(Form::Table { beta }),
                "PartialObjectMetadata" | "PartialObjectMetadataList" => return Ok(Form::Metadata { beta }),
                _ => {}
            }
        }
    }
    if any {
        Err(ApiError::not_acceptable("application/json"))
    } else {
        Ok(Form::Object)
    }
}

/// Whether the client accepts a discovery form; returns `v2` or `v2beta1`, whichever it names first.
pub(crate) fn accepts_aggregated(headers: &HeaderMap) -> Option<&'static str> {
    for value in headers.get_all(header::ACCEPT) {
        for clause in value.to_str().unwrap_or_default().split(',') {
            if clause.contains("as=APIGroupDiscoveryList") && clause.contains("g=apidiscovery.k8s.io") {
                if clause.contains("v=v2beta1") {
                    return Some("v2beta1");
                } else if clause.contains("v=v2") {
                    return Some("v2");
                }
            } else if clause.trim() == "application/json" {
                return None;
            }
        }
    }
    None
}

/// Reads a whole body within the limits of size and time.
pub(crate) async fn read_body(mut body: Body) -> ApiResult<Bytes> {
    let deadline = tokio::time::Instant::now() + BODY_TIMEOUT;
    let mut out = bytes::BytesMut::new();
    loop {
        let frame = tokio::time::timeout_at(deadline, body.frame())
            .await
            .map_err(|_| ApiError::new(408, "Timeout", "the request body did not arrive in time"))?;
        match frame {
            None => return Ok(out.freeze()),
            Some(Err(e)) => return Err(ApiError::bad_request(format!("cannot read the request body: {e}"))),
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                if out.len() + data.len() > MAX_BODY {
                    return Err(ApiError::too_large(MAX_BODY));
                }
                out.extend_from_slice(&data);
            }
        }
    }
}

/// The media type of the body, without parameters, lower case.
pub(crate) fn content_type(headers: &HeaderMap) -> String {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.split(';').next())
        .map(|v| v.trim().to_ascii_lowercase())
        .unwrap_or_default()
}

/// Refuses documents nested deeper than [`MAX_DEPTH`].
pub(crate) fn check_depth(value: &Value) -> ApiResult<()> {
    fn depth(value: &Value, left: usize) -> bool {
        match value {
            _ if left == 0 => false,
            Value::Array(a) => a.iter().all(|v| depth(v, left - 1)),
            Value::Object(o) => o.values().all(|v| depth(v, left - 1)),
            _ => true,
        }
    }
    if depth(value, MAX_DEPTH) {
        Ok(())
    } else {
        Err(ApiError::bad_request(format!(
            "the document is nested deeper than {MAX_DEPTH} levels"
        )))
    }
}

/// Parses a JSON or YAML document.
pub(crate) fn parse_document(bytes: &[u8], content_type: &str) -> ApiResult<Value> {
    let value: Value = if content_type.ends_with("yaml") {
        // JSON is YAML, and most clients send JSON under this name.
        match serde_json::from_slice(bytes) {
            Ok(v) => v,
            Err(_) => {
                let text = std::str::from_utf8(bytes)
                    .map_err(|e| ApiError::bad_request(format!("error decoding YAML: {e}")))?;
                serde_saphyr::from_str(text).map_err(|e| ApiError::bad_request(format!("error decoding YAML: {e}")))?
            }
        }
    } else {
        serde_json::from_slice(bytes)
            .map_err(|e| ApiError::bad_request(format!("couldn't get version/kind; json parse error: {e}")))?
    };
    check_depth(&value)?;
    Ok(value)
}
