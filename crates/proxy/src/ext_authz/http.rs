//! Checks over HTTP (`envoyExtAuthzHttp`): the request's head is shown, the status of the answer decides (S2.152–S2.156).

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Request, StatusCode, Uri};
use mantlet_model::ext_authz::{ExtAuthz, HeaderPattern, HttpCheck};

use super::call::{self, Answer};
use super::{Change, Changes, Denial, Failed, MAX_ANSWER, MAX_CHANGES, Outcome, PARTIAL_BODY, ShownBody, replacing};
use crate::http::headers::strip_hop_by_hop;
use crate::http::request::Exchange;

/// Header of an answer that lists request headers to remove.
const TO_REMOVE: HeaderName = HeaderName::from_static("x-envoy-auth-headers-to-remove");

fn fits(patterns: &[HeaderPattern], name: &HeaderName) -> bool {
    patterns.iter().any(|p| p.matches(name.as_str()))
}

/// Asks a provider.
pub(super) async fn check(
    exchange: &Exchange,
    provider: &ExtAuthz,
    check: &HttpCheck,
    body: Option<ShownBody>,
) -> Outcome {
    let request = match question(exchange, check, body) {
        Ok(request) => request,
        Err(reason) => return Outcome::Failed(Failed::new(reason)),
    };
    match call::call(
        &exchange.downstream,
        &provider.cluster,
        &exchange.authority,
        false,
        request,
    )
    .await
    {
        Ok(answer) => verdict(check, answer).await,
        Err(error) => Outcome::Failed(Failed::new(error.to_string())),
    }
}

/// The request that the provider sees.
fn question(exchange: &Exchange, check: &HttpCheck, body: Option<ShownBody>) -> Result<Request<Bytes>, String> {
    let parts = &exchange.parts;
    let path = parts.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let target = PathAndQuery::from_maybe_shared(format!("{}{path}", check.path_prefix))
        .map_err(|e| format!("path of the check: {e}"))?;
    let mut headers = HeaderMap::new();
    for (name, value) in &parts.headers {
        if *name == header::AUTHORIZATION || fits(&check.request_headers, name) {
            // One field with commas: provider and policy see all values, in one place (threat 26).
            let joined = headers
                .get(name)
                .map(|first: &HeaderValue| [first.as_bytes(), b",", value.as_bytes()].concat());
            let value = joined
                .and_then(|bytes| HeaderValue::from_bytes(&bytes).ok())
                .unwrap_or_else(|| value.clone());
            headers.insert(name, value);
        }
    }
    strip_hop_by_hop(&mut headers, false);
    headers.remove(header::HOST);
    headers.remove(header::EXPECT);
    for (name, value) in &check.add_headers {
        // Replaces what the client says under this name.
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
            headers.insert(name, value);
        }
    }
    let bytes = match body {
        None => Bytes::new(),
        Some(shown) => {
            let partial = if shown.partial { "true" } else { "false" };
            headers.insert(PARTIAL_BODY, HeaderValue::from_static(partial));
            shown.bytes
        }
    };
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    let mut request = Request::new(bytes);
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = Uri::from(target);
    *request.headers_mut() = headers;
    Ok(request)
}

async fn verdict(check: &HttpCheck, answer: Answer) -> Outcome {
    let status = answer.head.status;
    if status.is_server_error() {
        return Outcome::Failed(Failed::new(format!("the provider answered {}", status.as_u16())));
    }
    let headers = answer.head.headers.clone();
    if status == StatusCode::OK {
        // An answer that never ends is none.
        if !answer.read(MAX_ANSWER).await.complete {
            return Outcome::Failed(Failed::new("the provider's answer is too large or broken"));
        }
        return Outcome::Allowed(allowed(check, &headers));
    }
    // The status has been said: whatever becomes of the body, this is a no.
    let read = answer.read(MAX_ANSWER).await;
    Outcome::Denied(Denial {
        status,
        headers: replacing(
            headers
                .iter()
                .filter(|(name, _)| to_client(check, name))
                .map(|(name, value)| (name.clone(), value.clone())),
        ),
        body: if read.complete { read.bytes } else { Bytes::new() },
    })
}

fn to_client(check: &HttpCheck, name: &HeaderName) -> bool {
    if check.deny_headers.is_empty() {
        return *name != header::HOST;
    }
    *name == header::WWW_AUTHENTICATE || *name == header::LOCATION || fits(&check.deny_headers, name)
}

fn allowed(check: &HttpCheck, headers: &HeaderMap) -> Changes {
    let mut out = Changes::default();
    for value in headers.get_all(TO_REMOVE) {
        let names = value.to_str().unwrap_or_default().split(',');
        for name in names.filter_map(|n| n.trim().parse::<HeaderName>().ok()) {
            out.request.push(Change::Remove(name));
        }
    }
    for (name, value) in headers {
        if fits(&check.upstream_headers, name) {
            out.request.push(Change::Set(name.clone(), value.clone()));
        }
        if fits(&check.allow_headers, name) {
            out.response.push(Change::Add(name.clone(), value.clone()));
        }
    }
    out.request.truncate(MAX_CHANGES);
    out.response.truncate(MAX_CHANGES);
    out
}
