//! Forwarding: cluster, endpoint, connection, exchange; retries and timeouts around them.
//!
//! A request is sent a second time only when that cannot do harm: its bytes provably never left, the peer refused the
//! stream, or it is idempotent, has no body, and the route allows the retry.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{Authority, Scheme};
use http::{Request, Response, StatusCode, Uri, Version};
use mantlet_model::cluster::UpstreamProtocol;
use mantlet_model::http::HttpManager;
use mantlet_model::names::Direction;
use mantlet_model::route::{Forward, HeaderChange, Retry, Route, VirtualHost};
use tokio::time::{Instant, timeout_at};

use super::body::{Limits, RequestBody, ResponseBody, Source, UpstreamBody};
use super::reply::{self, Reply};
use super::request::Exchange;
use super::{headers, upgrade};
use crate::telemetry::flags;
use crate::telemetry::record::Account;
use crate::upstream::connect::{self, ConnectError};
use crate::upstream::http1::Http1Lease;
use crate::upstream::multiplex;
use crate::upstream::pool::{Lease, Wanted};
use crate::upstream::{ActiveGuard, ClusterState, Endpoint};
use crate::worker::Worker;

/// Why an attempt gave no response.
enum Failure {
    /// No connection; nothing was sent.
    Connect(ConnectError),
    /// The connection ended before the response; `unsent` says that no byte of the request had left.
    Reset { unsent: bool, refused: bool },
    /// The upstream broke the protocol.
    Protocol,
}

/// Forwards a request along a route.
pub async fn forward(
    exchange: &mut Exchange,
    manager: &HttpManager,
    host: &VirtualHost,
    route: &Route,
    to: &Forward,
    body: RequestBody,
    mut account: Box<Account>,
) -> Response<ResponseBody> {
    let worker = exchange.downstream.worker.clone();
    let name = pick(&to.clusters);
    account.cluster_name(name);
    let Some(mut cluster) = worker.upstreams.cluster(name) else {
        let reply = Reply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "",
            "cluster_not_found",
            flags::NO_CLUSTER,
        );
        return reply::respond(reply, exchange.grpc, &manager.server_name, account);
    };
    let limits = cluster.model.limits;
    if cluster.active.get() >= limits.requests {
        let reply = Reply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "upstream connect error or disconnect/reset before headers. reset reason: overflow",
            "upstream_reset_before_response_started{overflow}",
            flags::UPSTREAM_OVERFLOW,
        );
        return reply::respond(reply, exchange.grpc, &manager.server_name, account);
    }
    let switch = manager.websocket && headers::upgrade(&exchange.parts).is_some_and(is_websocket);
    if !switch {
        exchange.upgrade = None;
    }
    if switch {
        upgrade::remember(exchange);
    }
    prepare(exchange, host, route, to, switch);
    let grpc = exchange.grpc;
    let server = manager.server_name.clone();

    let retry = to.retry.as_ref();
    let deadline = (to.timeout_ms > 0).then(|| Instant::now() + Duration::from_millis(to.timeout_ms));
    let progress = account.progress.clone();
    // A copy of the head is kept only while it may be needed again.
    let mut attempts_left = retry.map_or(0, |r| r.attempts);
    let replayable = body.is_empty() && headers::is_idempotent(&exchange.parts.method);
    let mut parts = Some(std::mem::replace(&mut exchange.parts, Request::new(()).into_parts().0));
    let mut body = Some(body);
    let mut failed_on: Option<Rc<Endpoint>> = None;
    let mut attempt = 1u32;
    let mut stale_left = 3u32;
    let mut once_more = false;
    loop {
        // The attempt that failed took time, in which a new configuration may have taken the endpoints over.
        if std::mem::replace(&mut once_more, true)
            && let Some(now) = worker.upstreams.cluster(name)
        {
            cluster = now;
        }
        let Some(endpoint) = cluster.choose(exchange.downstream.facts.destination, failed_on.as_ref()) else {
            let reply = Reply::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "no healthy upstream",
                "no_healthy_upstream",
                flags::NO_HEALTHY_UPSTREAM,
            );
            return reply::respond(reply, grpc, &server, account);
        };
        account.endpoint(&cluster, &endpoint);
        if attempt > 1
            && host.attempt_count
            && let Some(head) = &mut parts
        {
            head.headers.insert(headers::ATTEMPT_COUNT, HeaderValue::from(attempt));
        }
        let Some(head) = parts.take() else {
            let reply = Reply::new(StatusCode::INTERNAL_SERVER_ERROR, "", "internal", flags::NONE);
            return reply::respond(reply, grpc, &server, account);
        };
        let copy = (replayable && !switch && (attempts_left > 0 || stale_left > 0) && retry.is_some())
            .then(|| clone_head(&head));
        let request = Request::from_parts(
            head,
            body.take().unwrap_or_else(|| RequestBody::empty(progress.clone())),
        );
        let try_deadline = match retry.map_or(0, |r| r.per_try_timeout_ms) {
            0 => deadline,
            ms => {
                let one = Instant::now() + Duration::from_millis(ms);
                Some(deadline.map_or(one, |all| all.min(one)))
            }
        };
        let sending = send(exchange, &cluster, &endpoint, manager, request, switch);
        let sent = match try_deadline {
            None => sending.await,
            Some(at) => match timeout_at(at, sending).await {
                Ok(sent) => sent,
                Err(_) => {
                    note(&cluster, &endpoint, 504);
                    let whole = deadline.is_some_and(|all| Instant::now() >= all);
                    if !whole && let (Some(again), true) = (copy, attempts_left > 0) {
                        attempts_left -= 1;
                        attempt += 1;
                        failed_on = Some(endpoint);
                        parts = Some(again);
                        account.attempts = attempt;
                        continue;
                    }
                    let reply = Reply::new(
                        StatusCode::GATEWAY_TIMEOUT,
                        "upstream request timeout",
                        "response_timeout",
                        flags::UPSTREAM_REQUEST_TIMEOUT,
                    );
                    return reply::respond(reply, grpc, &server, account);
                }
            },
        };
        let (failure, back) = match sent {
            Ok((response, lease, active)) => {
                let status = response.status();
                note(&cluster, &endpoint, status.as_u16());
                if attempts_left > 0
                    && let Some(again) = copy
                    && retry.is_some_and(|r| retries_status(r, status.as_u16()))
                {
                    attempts_left -= 1;
                    attempt += 1;
                    failed_on = Some(endpoint);
                    parts = Some(again);
                    account.attempts = attempt;
                    continue;
                }
                if attempts_left == 0 && attempt > 1 && retry.is_some_and(|r| retries_status(r, status.as_u16())) {
                    account.flags |= flags::RETRY_LIMIT_EXCEEDED;
                }
                let limits = Limits::new(deadline, manager.stream_idle_timeout_ms);
                return respond(
                    exchange,
                    manager,
                    route,
                    response,
                    (lease, limits),
                    active,
                    endpoint,
                    account,
                );
            }
            Err(failed) => failed,
        };
        if progress.lost.get() {
            // The client's doing, not the endpoint's. The codec ends this future when it looks at the stream; an answer would make a
            // stream that was given up look served (threat 56).
            std::future::pending::<()>().await;
        }
        note(&cluster, &endpoint, 503);
        // The request came back untouched: it can go anywhere, whatever it is.
        let (unsent, stale) = match &failure {
            Failure::Connect(_) => (true, false),
            Failure::Reset { unsent, refused } => (*unsent || *refused, *unsent),
            Failure::Protocol => (false, false),
        };
        let again = back.or_else(|| copy.map(|head| (head, None)));
        let allowed = match &failure {
            _ if stale && stale_left > 0 => {
                stale_left -= 1;
                true
            }
            Failure::Connect(_) if attempts_left > 0 => retry.is_some_and(|r| r.on.contains("connect-failure")),
            Failure::Reset { refused: true, .. } if attempts_left > 0 => {
                retry.is_some_and(|r| r.on.contains("refused-stream"))
            }
            Failure::Reset { .. } if attempts_left > 0 => {
                replayable && retry.is_some_and(|r| r.on.contains("reset") || r.on.contains("connect-failure"))
            }
            _ => false,
        };
        if allowed
            && let Some((head, rest)) = again
            && (unsent || replayable)
        {
            if !stale {
                attempts_left -= 1;
                attempt += 1;
                account.attempts = attempt;
                failed_on = Some(endpoint);
                pause(attempt).await;
            }
            parts = Some(head);
            body = rest;
            continue;
        }
        if attempt > 1 && attempts_left == 0 {
            account.flags |= flags::RETRY_LIMIT_EXCEEDED;
        }
        return reply::respond(failure_reply(&failure, &mut account), grpc, &server, account);
    }
}

/// Envoy's back-off between retries: 25 ms base with full jitter.
async fn pause(attempt: u32) {
    let cap = 25u64.saturating_mul((1u64 << attempt.min(6)) - 1).min(250);
    let wait = rand::Rng::random_range(&mut rand::rng(), 0..=cap);
    tokio::time::sleep(Duration::from_millis(wait)).await;
}

fn is_websocket(value: &HeaderValue) -> bool {
    value.as_bytes().eq_ignore_ascii_case(b"websocket")
}

fn note(cluster: &ClusterState, endpoint: &Endpoint, status: u16) {
    if let Some(settings) = &cluster.model.outlier {
        endpoint.outlier.note(settings, status, &cluster.endpoints());
    }
}

pub(super) fn clone_head(head: &Parts) -> Parts {
    let mut copy = Request::new(()).into_parts().0;
    copy.method = head.method.clone();
    copy.uri = head.uri.clone();
    copy.version = head.version;
    copy.headers = head.headers.clone();
    copy
}

/// A cluster by weight.
fn pick(clusters: &[(String, u32)]) -> &str {
    if let [(only, _)] = clusters {
        return only;
    }
    let total: u64 = clusters.iter().map(|(_, w)| u64::from(*w)).sum();
    let mut dice = rand::Rng::random_range(&mut rand::rng(), 0..total.max(1));
    for (name, weight) in clusters {
        match dice.checked_sub(u64::from(*weight)) {
            Some(rest) => dice = rest,
            None => return name,
        }
    }
    clusters.last().map_or("", |(name, _)| name)
}

/// Rewrites the head for the upstream.
fn prepare(exchange: &mut Exchange, host: &VirtualHost, route: &Route, to: &Forward, switch: bool) {
    let parts = &mut exchange.parts;
    if headers::has_passing(&parts.headers) {
        headers::strip_hop_by_hop(&mut parts.headers, switch);
        // The codec has told the client to go on by itself.
        parts.headers.remove(header::EXPECT);
        parts.headers.remove(headers::DECORATOR);
        parts.headers.remove(headers::PEER_METADATA);
        parts.headers.remove(headers::PEER_METADATA_ID);
    }
    if host.attempt_count {
        parts
            .headers
            .insert(headers::ATTEMPT_COUNT, HeaderValue::from_static("1"));
    }
    change(&mut parts.headers, &route.request_headers);
    if let Some(replacement) = &to.host_rewrite
        && let Ok(value) = HeaderValue::from_str(replacement)
    {
        exchange.authority = value;
    }
    if let Some(replacement) = &to.prefix_rewrite {
        rewrite_path(parts, &route.matches.path, replacement);
    }
}

fn rewrite_path(parts: &mut Parts, matched: &mantlet_model::route::PathMatch, replacement: &str) {
    use mantlet_model::route::PathMatch;
    let path = parts.uri.path();
    let rest = match matched {
        PathMatch::Prefix(prefix) | PathMatch::SegmentPrefix(prefix) => path.strip_prefix(prefix.as_str()),
        PathMatch::Exact(_) | PathMatch::Regex(_) => Some(""),
    };
    let Some(rest) = rest else { return };
    let mut target = format!("{replacement}{rest}");
    if !target.starts_with('/') {
        target.insert(0, '/');
    }
    if let Some(query) = parts.uri.query() {
        target.push('?');
        target.push_str(query);
    }
    if let Ok(uri) = target.parse() {
        parts.uri = uri;
    }
}

/// Applies header changes of a route.
pub fn change(fields: &mut http::HeaderMap, changes: &[HeaderChange]) {
    for change in changes {
        match change {
            HeaderChange::Set(name, value) => {
                if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
                    fields.insert(name, value);
                }
            }
            HeaderChange::Add(name, value) => {
                if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
                    fields.append(name, value);
                }
            }
            HeaderChange::Remove(name) => {
                fields.remove(name.as_str());
            }
        }
    }
}

type Sent = (Response<UpstreamBody>, Lease, ActiveGuard);
type Back = Option<(Parts, Option<RequestBody>)>;

/// One attempt.
async fn send(
    exchange: &Exchange,
    cluster: &Rc<ClusterState>,
    endpoint: &Rc<Endpoint>,
    manager: &HttpManager,
    mut request: Request<RequestBody>,
    switch: bool,
) -> Result<Sent, (Failure, Back)> {
    let active = ActiveGuard::new(cluster.clone(), endpoint.clone());
    let native = match cluster.model.protocol {
        UpstreamProtocol::Http1 => false,
        UpstreamProtocol::Http2 => true,
        UpstreamProtocol::Downstream => request.version() == Version::HTTP_2,
    };
    // Many HTTP/1.1 requests on few connections cost both proxies less than one connection each.
    let shared = !native && manager.istio_alpn && endpoint.tls.is_some() && endpoint.mantlet.get();
    let h2 = !switch && (native || shared);
    let worker = &exchange.downstream.worker;
    let lease = match acquire(worker, cluster, endpoint, manager.istio_alpn, h2, switch).await {
        Ok(lease) => lease,
        Err(error) => {
            let (head, body) = request.into_parts();
            return Err((Failure::Connect(error), Some((head, Some(body)))));
        }
    };
    if h2 && shared {
        request
            .headers_mut()
            .insert(headers::ORIGINAL_VERSION, HeaderValue::from_static("1.1"));
    }
    // Of a shared connection the first request says who we are, for all.
    if !(shared && matches!(&lease, Lease::Http2(lease) if lease.introduced())) {
        let direction = exchange.chosen.listener.model.direction;
        crate::telemetry::exchange::outgoing(worker, manager, direction, request.headers_mut());
    }
    target(&mut request, &exchange.authority, h2, endpoint.tls.is_some());
    match lease.send(request).await {
        Ok(response) => Ok((response, lease, active)),
        Err(unanswered) => {
            let failure = if unanswered.is_garbled() {
                Failure::Protocol
            } else {
                Failure::Reset {
                    unsent: unanswered.back.is_some(),
                    refused: unanswered.refused(),
                }
            };
            Err((failure, unanswered.back.map(give_back)))
        }
    }
}

fn give_back(request: Request<RequestBody>) -> (Parts, Option<RequestBody>) {
    let (head, body) = request.into_parts();
    (head, Some(body))
}

/// A connection to an endpoint, idle or new.
pub(crate) async fn acquire(
    worker: &Rc<Worker>,
    cluster: &Rc<ClusterState>,
    endpoint: &Rc<Endpoint>,
    istio_alpn: bool,
    h2: bool,
    switch: bool,
) -> Result<Lease, ConnectError> {
    let mut opener = None;
    if h2 {
        opener = loop {
            match endpoint.pool.want_http2() {
                Wanted::Lease(lease) => return Ok(Lease::Http2(lease)),
                Wanted::Wait(opening) => opening.wait().await?,
                Wanted::Open(opener) => break Some(opener),
            }
        };
    } else if !switch && let Some(lease) = endpoint.pool.take_http1() {
        return Ok(Lease::Http1(lease));
    }
    // Boxed, since it is large and rare: every request's future would have to have room for a handshake.
    let made = Box::pin(open(worker, cluster, endpoint, istio_alpn, h2)).await;
    if let Some(opener) = opener {
        opener.0.finish(made.as_ref().err().cloned());
    }
    made
}

async fn open(
    worker: &Rc<Worker>,
    cluster: &Rc<ClusterState>,
    endpoint: &Rc<Endpoint>,
    istio_alpn: bool,
    h2: bool,
) -> Result<Lease, ConnectError> {
    let tls = endpoint.tls.as_deref();
    let alpn = alpn(istio_alpn, cluster, tls.map_or(&[][..], |t| &t.alpn[..]), h2);
    let stream = connect::open(worker, &cluster.model, endpoint.address, tls, &alpn).await?;
    endpoint.note_principal(&stream);
    if h2 {
        let lease = endpoint.pool.start_http2(stream).await;
        let failed = |e| ConnectError::Tcp(format!("delayed connect error: {e}"));
        Ok(Lease::Http2(lease.map_err(failed)?))
    } else {
        Ok(Lease::Http1(Http1Lease::new(stream)))
    }
}

/// Protocols to offer: the cluster's, or Istio's for the HTTP version (S1.82, S1.83).
fn alpn(istio_alpn: bool, cluster: &ClusterState, configured: &[String], h2: bool) -> Vec<String> {
    let list: &[&str] = match (istio_alpn && cluster.model.alpn_override, h2) {
        (false, _) => return configured.to_vec(),
        (true, false) => &["istio-http/1.1", "istio", "http/1.1"],
        (true, true) => &["istio-h2", "istio", "h2"],
    };
    list.iter().map(|p| p.to_string()).collect()
}

/// Puts the authority where the upstream's HTTP version wants it.
pub(crate) fn target(request: &mut Request<RequestBody>, authority: &HeaderValue, h2: bool, tls: bool) {
    if h2 {
        let mut uri = std::mem::take(request.uri_mut()).into_parts();
        uri.scheme = Some(if tls { Scheme::HTTPS } else { Scheme::HTTP });
        uri.authority = Authority::from_maybe_shared(Bytes::copy_from_slice(authority.as_bytes())).ok();
        *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
        *request.version_mut() = Version::HTTP_2;
        request.headers_mut().remove(header::HOST);
        request.headers_mut().remove(header::CONNECTION);
    } else {
        let uri = request.uri();
        if uri.authority().is_some() {
            let path = uri.path_and_query().cloned();
            *request.uri_mut() = path.map_or_else(Uri::default, Uri::from);
        }
        *request.version_mut() = Version::HTTP_11;
        request.headers_mut().insert(header::HOST, authority.clone());
    }
}

fn retries_status(retry: &Retry, status: u16) -> bool {
    let listed = retry.statuses.contains(&u32::from(status));
    retry.on.split(',').map(str::trim).any(|on| match on {
        "5xx" => status >= 500,
        "gateway-error" => matches!(status, 502..=504),
        "retriable-status-codes" => listed,
        // Istio writes bare codes too.
        code => code.parse() == Ok(status),
    })
}

#[expect(clippy::too_many_arguments, reason = "the parts of one exchange, used once")]
fn respond(
    exchange: &mut Exchange,
    manager: &HttpManager,
    route: &Route,
    response: Response<UpstreamBody>,
    (lease, limits): (Lease, Option<Box<Limits>>),
    active: ActiveGuard,
    endpoint: Rc<Endpoint>,
    mut account: Box<Account>,
) -> Response<ResponseBody> {
    account.upstream_local(lease.local());
    let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let (mut head, body) = response.into_parts();
    head.version = Version::HTTP_11;
    let direction = account.direction();
    if headers::has_passing(&head.headers) {
        crate::telemetry::exchange::incoming_response(
            &exchange.downstream.worker,
            direction,
            &mut head.headers,
            &mut account,
        );
        headers::strip_hop_by_hop(&mut head.headers, switched);
    }
    if let Lease::Http2(lease) = &lease
        && direction == Direction::Outbound
    {
        account.upstream_peer = lease.peer(account.upstream_peer.take());
    }
    crate::telemetry::exchange::outgoing_response(&exchange.downstream, direction, &mut head.headers, &account);
    let fields = &mut head.headers;
    let millis = account.upstream_millis();
    if exchange.downstream.shared_by.borrow().is_none() {
        // The other proxy of a shared connection writes its own, over this one.
        fields.insert(headers::SERVICE_TIME, HeaderValue::from(millis));
    }
    if !manager.server_name.is_empty()
        && let Ok(server) = HeaderValue::from_str(&manager.server_name)
    {
        fields.insert(header::SERVER, server);
    }
    if exchange.downstream.tls.is_some_and(|t| t.h2 == Some(true)) {
        multiplex::mark_changing(fields);
    }
    change(fields, &route.response_headers);
    account.response_head(&head);
    if switched {
        if !exchange.switching() {
            // Nobody asked for another protocol: bytes behind this head would be read as something else (threat 42).
            let reply = Reply::new(
                StatusCode::BAD_GATEWAY,
                "",
                "upstream_reset_before_response_started{protocol_error}",
                flags::UPSTREAM_PROTOCOL_ERROR,
            );
            return reply::respond(reply, exchange.grpc, &manager.server_name, account);
        }
        return upgrade::tunnel(exchange, head, body, active, lease, account);
    }
    let source = Box::new(Source {
        active,
        lease,
        endpoint,
        limits,
    });
    Response::from_parts(head, ResponseBody::upstream(body, source, account))
}

/// Envoy's text for a failed attempt.
fn failure_reply(failure: &Failure, account: &mut Account) -> Reply {
    const TEXT: &str = "upstream connect error or disconnect/reset before headers. reset reason: ";
    let (reason, flag) = match failure {
        Failure::Connect(ConnectError::Timeout) => {
            ("connection timeout".to_string(), flags::UPSTREAM_CONNECTION_FAILURE)
        }
        Failure::Connect(error) => {
            account.transport_failure = Some(error.to_string().into());
            (
                format!("remote connection failure, transport failure reason: {error}"),
                flags::UPSTREAM_CONNECTION_FAILURE,
            )
        }
        Failure::Reset { refused: true, .. } => ("remote refused stream reset".to_string(), flags::UPSTREAM_RESET),
        Failure::Reset { .. } => (
            "connection termination".to_string(),
            flags::UPSTREAM_CONNECTION_TERMINATION,
        ),
        Failure::Protocol => ("protocol error".to_string(), flags::UPSTREAM_PROTOCOL_ERROR),
    };
    let status = match failure {
        Failure::Protocol => StatusCode::BAD_GATEWAY,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let details = format!(
        "upstream_reset_before_response_started{{{}}}",
        reason
            .replace([' ', '\t'], "_")
            .replace(",_transport_failure_reason:_", "|")
    );
    Reply::new(status, format!("{TEXT}{reason}"), details, flag)
}
