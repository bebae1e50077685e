//! The ordered request function: what happens to every request, in the order that security rests on.
//!
//! normalise → request id → client certificate header → external authorizers → JWT → authorization → route → forward → account. Each step is
//! one line of [`steps`]; nothing may be moved without a reason written beside it.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;

use http::header::{self, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use mantlet_model::authz::{Connection as AuthzConnection, HttpView, Verdict};
use mantlet_model::http::HttpManager;
use mantlet_model::listener::ChainMatch;
use mantlet_model::route::{Redirect, Route, RouteAction, RouteRequest, VirtualHost};

use super::body::{Progress, RequestBody, ResponseBody};
use super::framing::{SharedFollower, follow};
use super::reply::{self, Reply};
use super::{custom, forward, headers, jwt, life};
use crate::connection::{Chosen, Downstream};
use crate::ext_authz::{self, Change};
use crate::telemetry::flags;
use crate::telemetry::record::Account;
use crate::worker::Phase;
use crate::{on_demand, path};

/// A request on its way through the steps.
pub struct Exchange {
    /// Its connection.
    pub downstream: Rc<Downstream>,
    /// The chain and the configuration it belongs to.
    pub chosen: Rc<Chosen>,
    /// The head; rewritten on the way.
    pub parts: Parts,
    /// `:authority`, as sent.
    pub authority: HeaderValue,
    /// The client's address by the forwarding headers.
    pub remote: IpAddr,
    /// Whether the client speaks gRPC.
    pub grpc: bool,
    /// The client's side of a protocol switch, if it asked for one.
    pub upgrade: Option<OnUpgrade>,
    /// The verified token whose claims count.
    pub token: Option<Rc<jwt::Verified>>,
    /// Changes that external authorizers want in the response, whoever makes it.
    pub to_client: Vec<Change>,
    /// Whether the connection cannot go on after the answer.
    pub close: bool,
}

impl Exchange {
    /// Whether the client asked for another protocol.
    pub fn switching(&self) -> bool {
        self.upgrade.is_some()
    }
}

/// Answers one request.
///
/// `follower` has seen the bytes of an HTTP/1.1 connection.
pub async fn handle(
    downstream: Rc<Downstream>,
    follower: Option<SharedFollower>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let (mut parts, body) = request.into_parts();
    let on_the_wire = parts.version;
    let ambiguous = follower.as_ref().is_some_and(|f| {
        let chunked = parts.headers.contains_key(header::TRANSFER_ENCODING);
        !follow(f).is_plain(chunked)
    });
    if on_the_wire == Version::HTTP_2 {
        headers::as_http1(&mut parts.headers);
    }
    restore_version(&downstream, &mut parts);
    let progress = Rc::new(Progress::default());
    let Some(chosen) = downstream.chosen() else {
        // The chain of this connection was removed; it is about to be closed, and its policy is unknown.
        let account = Account::begin(&downstream, None, &parts, progress);
        let reply = Reply::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "",
            "filter_chain_not_found",
            flags::NO_ROUTE,
        );
        return Ok(closing(reply::respond(reply, false, "", account)));
    };
    let account = Account::begin(&downstream, Some(&chosen), &parts, progress.clone());
    let grpc = headers::is_grpc(&parts.headers);
    let upgrade = match headers::upgrade(&parts) {
        Some(_) => parts.extensions.remove::<OnUpgrade>(),
        None => None,
    };
    let worker = downstream.worker.clone();
    let authority = headers::authority(&parts).unwrap_or(HeaderValue::from_static(""));
    let mut exchange = Exchange {
        downstream: downstream.clone(),
        chosen: chosen.clone(),
        parts,
        authority,
        remote: IpAddr::from([0, 0, 0, 0]),
        grpc,
        upgrade,
        token: None,
        to_client: Vec::new(),
        close: false,
    };
    let Some(manager) = chosen.chain.http() else {
        let reply = Reply::new(StatusCode::INTERNAL_SERVER_ERROR, "", "not_http", flags::NONE);
        return Ok(reply::respond(reply, grpc, "", account));
    };
    if ambiguous {
        let reply = bad_request("http1.content_length_and_chunked_not_allowed");
        return Ok(closing(reply::respond(reply, false, &manager.server_name, account)));
    }
    let body = RequestBody::new(body, on_the_wire == Version::HTTP_2, progress.clone());
    let answer = {
        // Pinned once: each place that a future of this size moves to is space in every request.
        let work = pin!(steps(&mut exchange, manager, body, account));
        if progress.request_done.get() {
            Some(work.await)
        } else {
            progress.patient.set(grpc);
            downstream.life.expect(&progress);
            life::unless_starved(&progress, work).await
        }
    };
    let Some(mut response) = answer else {
        // Its account was closed with the work.
        let mut response = Response::new(ResponseBody::switched());
        *response.status_mut() = StatusCode::REQUEST_TIMEOUT;
        return Ok(if on_the_wire < Version::HTTP_2 {
            closing(response)
        } else {
            response
        });
    };
    ext_authz::apply(response.headers_mut(), &exchange.to_client);
    if exchange.close && on_the_wire < Version::HTTP_2 {
        response = closing(response);
    }
    if exchange.switching() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        exchange.downstream.tunnel.borrow_mut().take();
    }
    if let (StatusCode::SWITCHING_PROTOCOLS, Some(follower)) = (response.status(), follower) {
        follow(&follower).stop();
    }
    if worker.phase() >= Phase::Draining && on_the_wire < Version::HTTP_2 {
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response)
}

/// Requests that a Mantlet client proxy put on a shared HTTP/2 connection are HTTP/1.1 to everything behind here. Only
/// the version changes, and every client may choose that, so the mark needs no trust.
fn restore_version(downstream: &Downstream, parts: &mut Parts) {
    let marked = parts.headers.remove(headers::ORIGINAL_VERSION).is_some();
    if marked && parts.version == Version::HTTP_2 && downstream.peer.is_some() {
        parts.version = Version::HTTP_11;
        downstream.shared_by.borrow_mut().get_or_insert_default();
    }
}

fn closing(mut response: Response<ResponseBody>) -> Response<ResponseBody> {
    response
        .headers_mut()
        .insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

async fn steps(
    exchange: &mut Exchange,
    manager: &HttpManager,
    mut body: RequestBody,
    mut account: Box<Account>,
) -> Response<ResponseBody> {
    // Bounds and strictness first: nothing below may see a request with two readings.
    if let Err(reply) = strict(exchange, manager) {
        return reply::respond(reply, exchange.grpc, &manager.server_name, account);
    }
    // The normal form of the path is what everything below sees, the upstream included (S2.113).
    if let Err(reply) = normalize(exchange, manager) {
        return reply::respond(reply, exchange.grpc, &manager.server_name, account);
    }
    request_id(exchange, manager);
    forwarding(exchange, manager);
    account.request_head(exchange);
    // External authorizers before tokens: what they add to the request is seen by everything below (S2.22).
    if !exchange.chosen.chain.custom.is_empty()
        && let Err(reply) = custom::authorize(exchange, &mut body, &mut account).await
    {
        return reply::respond(reply, exchange.grpc, &manager.server_name, account);
    }
    // JWT before authorization, since its claims are attributes there.
    if let Err(reply) = authenticate(exchange) {
        let remembered = &exchange.downstream.worker.shared.telemetry;
        remembered.denied_request(exchange, &reply.details);
        let challenge = challenge(exchange, &reply);
        let mut response = reply::respond(reply, exchange.grpc, &manager.server_name, account);
        if let Some(challenge) = challenge {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        return response;
    }
    if let Err(reply) = authorize(exchange, &mut account) {
        return reply::respond(reply, exchange.grpc, &manager.server_name, account);
    }
    // The one step that may wait for configuration: what comes before does not depend on the destination.
    let host = match on_demand::virtual_host(exchange).await {
        Ok(host) => host,
        Err(reply) => return reply::respond(reply, exchange.grpc, &manager.server_name, account),
    };
    let chosen = exchange.chosen.clone();
    let routes = chosen.config.routes_of(&chosen.chain);
    let selected = routes
        .zip(host)
        .and_then(|(r, host)| r.select_in(host, &View::of(exchange)));
    let Some((host, route)) = selected else {
        let reply = Reply::new(StatusCode::NOT_FOUND, "", "route_not_found", flags::NO_ROUTE);
        return reply::respond(reply, exchange.grpc, &manager.server_name, account);
    };
    account.route(host, route);
    act(exchange, manager, host, route, body, account).await
}

async fn act(
    exchange: &mut Exchange,
    manager: &HttpManager,
    host: &VirtualHost,
    route: &Route,
    body: RequestBody,
    account: Box<Account>,
) -> Response<ResponseBody> {
    match &route.action {
        RouteAction::Forward(to) => forward::forward(exchange, manager, host, route, to, body, account).await,
        RouteAction::Respond { status, body } => {
            let status = StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let reply = Reply::new(status, body.clone(), "direct_response", flags::NONE);
            reply::respond(reply, exchange.grpc, &manager.server_name, account)
        }
        RouteAction::Redirect(redirect) => {
            let location = location(exchange, redirect);
            let status = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::MOVED_PERMANENTLY);
            let reply = Reply::new(status, "", "direct_response", flags::NONE);
            let mut response = reply::respond(reply, exchange.grpc, &manager.server_name, account);
            if let Ok(location) = HeaderValue::from_str(&location) {
                response.headers_mut().insert(header::LOCATION, location);
            }
            response
        }
    }
}

fn location(exchange: &Exchange, redirect: &Redirect) -> String {
    let https = redirect.https || exchange.downstream.tls.is_some();
    let authority = exchange.authority.to_str().unwrap_or_default();
    let (name, port) = split_port(authority);
    let name = redirect.host.as_deref().unwrap_or(name);
    let port = match redirect.port {
        Some(443) if https => None,
        Some(80) if !https => None,
        Some(port) => Some(port),
        // Another scheme has another default port.
        None if redirect.https => None,
        None => port,
    };
    let path = match &redirect.path {
        Some(path) => path.as_str(),
        None => exchange.parts.uri.path_and_query().map_or("/", PathAndQuery::as_str),
    };
    let scheme = if https { "https" } else { "http" };
    match port {
        Some(port) => format!("{scheme}://{name}:{port}{path}"),
        None => format!("{scheme}://{name}{path}"),
    }
}

fn split_port(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((name, port)) if !name.ends_with(':') => match port.parse() {
            Ok(port) => (name, Some(port)),
            Err(_) => (authority, None),
        },
        _ => (authority, None),
    }
}

fn serves(names: &ChainMatch, authority: &HeaderValue) -> bool {
    let Ok(authority) = authority.to_str() else {
        return false;
    };
    let (host, _) = split_port(authority);
    names.serves(&host.trim_end_matches('.').to_ascii_lowercase())
}

fn bad_request(details: &'static str) -> Reply {
    Reply::new(
        StatusCode::BAD_REQUEST,
        "Bad Request",
        details,
        flags::DOWNSTREAM_PROTOCOL_ERROR,
    )
}

fn strict(exchange: &mut Exchange, _manager: &HttpManager) -> Result<(), Reply> {
    let parts = &exchange.parts;
    if parts.version < Version::HTTP_11 {
        // S6.75; Envoy's answer to HTTP/1.0.
        return Err(Reply::new(StatusCode::UPGRADE_REQUIRED, "", "low_version", flags::NONE));
    }
    if let Err(fault) = headers::check(parts) {
        // Where this request ends is a matter of opinion, so there is no next one.
        exchange.close = true;
        return Err(bad_request(fault));
    }
    if exchange.authority.is_empty() {
        return Err(bad_request("missing_host_header"));
    }
    if !headers::is_authority(exchange.authority.as_bytes()) {
        return Err(bad_request("http.invalid_authority"));
    }
    // A connection that was made for one host must not reach another's chain past that chain's certificate and client
    // checks (threat 17; RFC 9110 section 15.5.20).
    let names = &exchange.chosen.chain.model.matches;
    if parts.version == Version::HTTP_2 && !names.server_names.is_empty() && !serves(names, &exchange.authority) {
        return Err(Reply::new(
            StatusCode::MISDIRECTED_REQUEST,
            "",
            "misdirected_request",
            flags::NO_ROUTE,
        ));
    }
    if parts.method == Method::CONNECT {
        // Bytes that the client sent ahead are no request.
        exchange.close = true;
        return Err(Reply::new(
            StatusCode::NOT_FOUND,
            "",
            "route_not_found",
            flags::NO_ROUTE,
        ));
    }
    Ok(())
}

fn normalize(exchange: &mut Exchange, manager: &HttpManager) -> Result<(), Reply> {
    let uri = &exchange.parts.uri;
    let Some(target) = uri.path_and_query() else {
        return Err(bad_request("missing_path_rejected"));
    };
    // A target that is only a query would get its slash from the URI library, unseen.
    if !path::is_printable(target.as_str()) || target.as_str().starts_with('?') {
        return Err(bad_request("path_normalization_failed"));
    }
    let normal =
        path::normalize(target.path(), manager.normalization).map_err(|_| bad_request("path_normalization_failed"))?;
    let rewritten = match (&normal, target.query()) {
        (std::borrow::Cow::Borrowed(same), _) if *same == target.path() => target.clone(),
        (changed, Some(query)) => PathAndQuery::from_maybe_shared(format!("{changed}?{query}"))
            .map_err(|_| bad_request("path_normalization_failed"))?,
        (changed, None) => PathAndQuery::from_maybe_shared(changed.to_string())
            .map_err(|_| bad_request("path_normalization_failed"))?,
    };
    exchange.parts.uri = Uri::from(rewritten);
    Ok(())
}

fn request_id(exchange: &mut Exchange, manager: &HttpManager) {
    if manager.generate_request_id && !exchange.parts.headers.contains_key(headers::REQUEST_ID) {
        exchange
            .parts
            .headers
            .insert(headers::REQUEST_ID, headers::new_request_id());
    }
}

fn forwarding(exchange: &mut Exchange, manager: &HttpManager) {
    let source = exchange.downstream.facts.source.ip();
    let fields = &mut exchange.parts.headers;
    headers::forward_client_cert(fields, manager, &exchange.downstream);
    let listed: Vec<Option<IpAddr>> = fields
        .get_all(headers::XFF)
        .iter()
        .flat_map(|v| v.as_bytes().split(|b| *b == b','))
        .map(|v| std::str::from_utf8(v.trim_ascii()).ok()?.parse().ok())
        .collect();
    let hops = manager.trusted_hops as usize;
    // The address that the trusted hops vouch for, counted from the right (S6.72). Where nobody vouches for an address,
    // because the list is too short or the element is none, the client is the peer; never a neighbour in the list.
    let from_right = if manager.use_remote_address { hops } else { hops + 1 };
    let vouched = listed
        .len()
        .checked_sub(from_right)
        .and_then(|at| listed.get(at).copied());
    exchange.remote = vouched.flatten().unwrap_or(source);
    if manager.use_remote_address {
        let value = match fields.get(headers::XFF).and_then(|v| v.to_str().ok()) {
            Some(earlier) => format!("{earlier},{source}"),
            None => source.to_string(),
        };
        if let Ok(value) = HeaderValue::from_str(&value) {
            fields.insert(headers::XFF, value);
        }
        if hops == 0 {
            fields.remove(headers::XFP);
        }
        headers::strip_internal(fields);
    }
    if !fields.contains_key(headers::XFP) {
        let scheme = if exchange.downstream.tls.is_some() {
            "https"
        } else {
            "http"
        };
        fields.insert(headers::XFP, HeaderValue::from_static(scheme));
    }
}

/// Verifies the tokens of a request, if its chain knows any issuer (RequestAuthentication).
fn authenticate(exchange: &mut Exchange) -> Result<(), Reply> {
    let chosen = exchange.chosen.clone();
    let Some(plan) = &chosen.chain.jwt else {
        return Ok(());
    };
    plan.strip(&mut exchange.parts.headers);
    let worker = exchange.downstream.worker.clone();
    if jwt::is_preflight(&exchange.parts) {
        worker.telemetry.http_preflight();
        return Ok(());
    }
    // A clock before 1970 is no clock: then every token with a start is too early.
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let outcome = plan.evaluate(&exchange.parts, now, &mut worker.tokens.borrow_mut());
    worker.telemetry.http_authentication(outcome.is_ok());
    match outcome {
        Ok(None) => Ok(()),
        Ok(Some(accepted)) => {
            // Envoy's answer, from its HTTP/1.1 encoder.
            if let Some(name) = accepted.tokens.iter().find_map(|t| t.impossible.as_ref()) {
                let body = format!("invalid header value for: {name}");
                return Err(Reply::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    body,
                    "jwt_claim_header_invalid",
                    flags::NONE,
                ));
            }
            let parts = &mut exchange.parts;
            for name in &accepted.spent_headers {
                parts.headers.remove(name);
            }
            for name in &accepted.spent_parameters {
                jwt::remove_parameter(&mut parts.uri, name);
            }
            for (name, value) in accepted.tokens.iter().flat_map(|t| &t.headers) {
                parts.headers.append(name, value.clone());
            }
            // S3.49: the last one counts.
            exchange.token = accepted.tokens.last().cloned();
            Ok(())
        }
        Err(refused) => {
            if let Some(held) = &refused.unknown_key {
                worker.shared.unknown_keys.report(held);
            }
            let text = refused.failure.text();
            let details = format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"));
            let status = StatusCode::from_u16(refused.failure.status()).unwrap_or(StatusCode::UNAUTHORIZED);
            Err(Reply::new(status, text, details, flags::NONE))
        }
    }
}

/// `www-authenticate` of a refused token (S3.21).
fn challenge(exchange: &Exchange, reply: &Reply) -> Option<HeaderValue> {
    if reply.status == StatusCode::SERVICE_UNAVAILABLE {
        return None;
    }
    const MAX_PATH: usize = 256;
    let parts = &exchange.parts;
    let proto = parts.headers.get(headers::XFP).map(HeaderValue::as_bytes);
    let scheme = match proto {
        Some(proto) if proto.eq_ignore_ascii_case(b"https") => "https",
        Some(proto) if proto.eq_ignore_ascii_case(b"http") => "http",
        _ if exchange.downstream.tls.is_some() => "https",
        _ => "http",
    };
    let target = parts.uri.path_and_query().map_or("/", PathAndQuery::as_str).as_bytes();
    let target = parts
        .headers
        .get("x-envoy-original-path")
        .map_or(target, HeaderValue::as_bytes);
    let mut value = format!("Bearer realm=\"{scheme}://").into_bytes();
    value.extend_from_slice(exchange.authority.as_bytes());
    value.extend_from_slice(&target[..target.len().min(MAX_PATH)]);
    value.extend_from_slice(b"\", error=\"invalid_token\"");
    HeaderValue::from_bytes(&value).ok()
}

fn authorize(exchange: &Exchange, account: &mut Account) -> Result<(), Reply> {
    let chain = &exchange.chosen.chain;
    if !chain.has_authz {
        return Ok(());
    }
    let downstream = &exchange.downstream;
    let connection = AuthzConnection {
        peer_uris: downstream.peer.as_ref().map_or(&[], |p| &p.uris),
        source: downstream.facts.source.ip(),
        remote: exchange.remote,
        destination: downstream.facts.destination,
        sni: downstream.facts.sni.as_deref(),
    };
    let view = View::of(exchange);
    let decision = chain.engine.decide(&connection, Some(&view));
    let allowed = decision.verdict == Verdict::Allowed;
    downstream.worker.telemetry.http_decision(allowed);
    downstream.worker.telemetry.http_trial(&decision);
    account.decision(&decision, chain.audits);
    if allowed {
        return Ok(());
    }
    // Whitespace in an id becomes `_` (S2.92).
    let id: String = decision
        .rule
        .unwrap_or("none")
        .chars()
        .map(|c| if c.is_whitespace() { '_' } else { c })
        .collect();
    let details = format!("rbac_access_denied_matched_policy[{id}]");
    downstream.worker.shared.telemetry.denied_request(exchange, &details);
    account.denied = true;
    Err(Reply::new(
        StatusCode::FORBIDDEN,
        "RBAC: access denied",
        details,
        flags::NONE,
    ))
}

/// The request as policy and routes see it.
pub struct View<'a> {
    parts: &'a Parts,
    authority: &'a str,
    path: &'a str,
    claims: Option<&'a serde_json::Value>,
}

impl<'a> View<'a> {
    /// Of an exchange whose path is in normal form.
    pub fn of(exchange: &'a Exchange) -> Self {
        View::new(&exchange.parts, &exchange.authority, exchange.token.as_deref())
    }

    /// Of a head whose path is in normal form.
    pub fn new(parts: &'a Parts, authority: &'a HeaderValue, token: Option<&'a jwt::Verified>) -> Self {
        View {
            parts,
            authority: authority.to_str().unwrap_or_default(),
            path: parts.uri.path(),
            claims: token.map(|token| &token.claims),
        }
    }
}

impl HttpView for View<'_> {
    fn method(&self) -> &str {
        self.parts.method.as_str()
    }

    fn authority(&self) -> &str {
        self.authority
    }

    fn path(&self) -> &str {
        self.path
    }

    fn any_header(&self, name: &str, f: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        // HTTP/2 requests have their host in the pseudo header only.
        if name == "host" && !self.parts.headers.contains_key(header::HOST) {
            return f(self.authority.as_bytes());
        }
        self.parts.headers.get_all(name).iter().any(|v| f(v.as_bytes()))
    }

    fn claims(&self) -> Option<&serde_json::Value> {
        self.claims
    }
}

impl RouteRequest for View<'_> {
    fn authority(&self) -> &str {
        self.authority
    }

    fn path(&self) -> &str {
        self.path
    }

    fn query(&self) -> Option<&str> {
        self.parts.uri.query()
    }

    fn claims(&self) -> Option<&serde_json::Value> {
        self.claims
    }

    fn header(&self, name: &str) -> Vec<&str> {
        match name {
            ":method" => vec![self.parts.method.as_str()],
            ":authority" => vec![self.authority],
            ":path" => vec![self.path],
            ":scheme" => self
                .parts
                .headers
                .get(headers::XFP)
                .and_then(|v| v.to_str().ok())
                .into_iter()
                .collect(),
            name => self
                .parts
                .headers
                .get_all(name)
                .iter()
                .filter_map(|v| v.to_str().ok())
                .collect(),
        }
    }
}
