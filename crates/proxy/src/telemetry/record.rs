//! The account of one request or connection: filled on the way, closed once, into metrics and access log.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Version};
use mantlet_model::authz::{Decision, Verdict};
use mantlet_model::http::Reporter;
use mantlet_model::listener::AccessLog;
use mantlet_model::names::Direction;
use mantlet_model::route::{Route, VirtualHost};

use super::access_log::Line;
use super::exchange::{self, PeerLabels};
use super::metrics::{SeriesKey, TcpSeries};
use super::{flags, format};
use crate::config::{Chain, CompiledListener};
use crate::connection::{Chosen, Downstream, Facts};
use crate::http::body::Progress;
use crate::http::headers;
use crate::http::request::Exchange;
use crate::upstream::{ClusterState, Endpoint};
use crate::worker::Worker;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Account of one request.
pub struct Account {
    downstream: Rc<Downstream>,
    chosen: Option<Rc<Chosen>>,
    started: Instant,
    /// Shared with the request's body.
    pub progress: Rc<Progress>,
    /// Bytes of the response's body so far.
    pub sent: u64,
    /// Response flags.
    pub flags: u32,
    /// Status of the response; 0 until there is one.
    pub status: u16,
    /// Response code details.
    pub details: Cow<'static, str>,
    /// gRPC status of the response.
    pub grpc_status: Option<Box<str>>,
    /// Attempts made.
    pub attempts: u32,
    /// Whether authorization refused it.
    pub denied: bool,
    /// Why there was no connection.
    pub transport_failure: Option<Box<str>>,
    /// The downstream's metadata.
    pub downstream_peer: Option<Rc<PeerLabels>>,
    /// The upstream's metadata.
    pub upstream_peer: Option<Rc<PeerLabels>>,
    grpc: bool,
    first_attempt: Option<Instant>,
    service_time: Option<u64>,
    cluster: Option<Rc<ClusterState>>,
    endpoint: Option<Rc<Endpoint>>,
    log: Option<Box<LogFields>>,
    closed: bool,
}

/// One value of dynamic metadata: filter, key, value.
pub type Metadata = (&'static str, String, String);

/// Filter whose metadata has the results of authorization on HTTP.
const HTTP_RBAC: &str = "envoy.filters.http.rbac";
/// The same for TCP.
const NETWORK_RBAC: &str = "envoy.filters.network.rbac";

/// What a decision writes into dynamic metadata (S2.133, S2.135).
fn metadata_of(filter: &'static str, decision: &Decision<'_>, audits: bool, out: &mut Vec<Metadata>) {
    if audits {
        out.push(("envoy.common", "access_log_hint".into(), decision.audited.to_string()));
    }
    for (shadow, prefix) in [
        (decision.shadow_deny, "istio_dry_run_deny_"),
        (decision.shadow_allow, "istio_dry_run_allow_"),
    ] {
        let Some(shadow) = shadow else { continue };
        if let Some(rule) = shadow.rule {
            out.push((filter, format!("{prefix}shadow_effective_policy_id"), rule.to_string()));
        }
        let result = match shadow.verdict {
            Verdict::Allowed => "allowed",
            Verdict::Denied => "denied",
        };
        out.push((filter, format!("{prefix}shadow_engine_result"), result.to_string()));
    }
}

/// What only the access log needs.
#[derive(Default)]
struct LogFields {
    wall: Option<SystemTime>,
    method: http::Method,
    path: Option<PathAndQuery>,
    protocol: &'static str,
    xff: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
    request_id: Option<HeaderValue>,
    authority: Option<HeaderValue>,
    route: String,
    cluster: String,
    request: Option<HeaderMap>,
    response: Option<HeaderMap>,
    metadata: Vec<Metadata>,
    upstream_local: Option<SocketAddr>,
}

/// Whether a log is written in Istio's default format.
fn is_default(file: &AccessLog) -> bool {
    file.format.is_empty() && file.json.is_empty()
}

/// Adds one line in the log's format.
fn write(worker: &Worker, file: &AccessLog, subject: &format::Subject<'_>) {
    worker.telemetry.log.line(&file.path, |out| {
        if !file.json.is_empty() {
            out.extend_from_slice(format::json(&file.json, subject).as_bytes());
        } else if !file.format.is_empty() {
            out.extend_from_slice(format::text(&file.format, subject).as_bytes());
        } else {
            subject.line.render(out);
        }
    });
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_09 => "HTTP/0.9",
        _ => "HTTP/1.1",
    }
}

fn text(value: &Option<HeaderValue>) -> &str {
    value.as_ref().and_then(|v| v.to_str().ok()).unwrap_or_default()
}

impl Account {
    /// Opens the account when the head has been read.
    pub fn begin(
        downstream: &Rc<Downstream>,
        chosen: Option<&Rc<Chosen>>,
        parts: &Parts,
        progress: Rc<Progress>,
    ) -> Box<Account> {
        let log = chosen.and_then(|c| c.chain.http()).and_then(|h| h.access_log.as_ref());
        let log = log.map(|file| {
            Box::new(LogFields {
                wall: Some(SystemTime::now()),
                method: parts.method.clone(),
                path: parts.uri.path_and_query().cloned(),
                protocol: protocol(parts.version),
                xff: parts.headers.get(headers::XFF).cloned(),
                user_agent: parts.headers.get(http::header::USER_AGENT).cloned(),
                request_id: parts.headers.get(headers::REQUEST_ID).cloned(),
                authority: headers::authority(parts),
                // Other formats may ask for any header.
                request: (!is_default(file)).then(|| parts.headers.clone()),
                ..LogFields::default()
            })
        });
        Box::new(Account {
            downstream: downstream.clone(),
            chosen: chosen.cloned(),
            started: Instant::now(),
            progress,
            sent: 0,
            flags: flags::NONE,
            status: 0,
            details: Cow::Borrowed("via_upstream"),
            grpc_status: None,
            attempts: 1,
            denied: false,
            transport_failure: None,
            downstream_peer: None,
            upstream_peer: None,
            grpc: headers::is_grpc(&parts.headers),
            first_attempt: None,
            service_time: None,
            cluster: None,
            endpoint: None,
            log,
            closed: false,
        })
    }

    /// The direction of the listener.
    pub fn direction(&self) -> Direction {
        self.chosen
            .as_ref()
            .map_or(Direction::Inbound, |c| c.listener.model.direction)
    }

    /// Takes over what the first steps have set, and the peer's metadata, which nobody behind sees.
    pub fn request_head(&mut self, exchange: &mut Exchange) {
        if let Some(log) = &mut self.log {
            log.request_id = exchange.parts.headers.get(headers::REQUEST_ID).cloned();
        }
        let chosen = exchange.chosen.clone();
        if let Some(manager) = chosen.chain.http() {
            self.downstream_peer =
                exchange::incoming_request(&exchange.downstream, manager, &mut exchange.parts.headers);
        }
    }

    /// What authorization decided, for formats that show dynamic metadata.
    pub fn decision(&mut self, decision: &Decision<'_>, audits: bool) {
        if let Some(log) = &mut self.log
            && log.request.is_some()
        {
            metadata_of(HTTP_RBAC, decision, audits, &mut log.metadata);
        }
    }

    /// The CUSTOM rule for which a provider is asked.
    pub fn note_custom(&mut self, rule: &str) {
        if let Some(log) = &mut self.log
            && log.request.is_some()
        {
            let key = |name: &str| format!("istio_ext_authz_{name}");
            log.metadata
                .push((HTTP_RBAC, key("shadow_effective_policy_id"), rule.to_string()));
            log.metadata
                .push((HTTP_RBAC, key("shadow_engine_result"), "denied".into()));
        }
    }

    /// The route taken.
    pub fn route(&mut self, _host: &VirtualHost, route: &Route) {
        if let Some(log) = &mut self.log {
            log.route.clone_from(&route.name);
        }
    }

    /// The cluster chosen.
    pub fn cluster_name(&mut self, name: &str) {
        if let Some(log) = &mut self.log {
            log.cluster = name.to_string();
        }
    }

    /// The endpoint of an attempt.
    pub fn endpoint(&mut self, cluster: &Rc<ClusterState>, endpoint: &Rc<Endpoint>) {
        self.first_attempt.get_or_insert_with(Instant::now);
        self.cluster = Some(cluster.clone());
        self.endpoint = Some(endpoint.clone());
    }

    /// This proxy's address towards the upstream.
    pub fn upstream_local(&mut self, local: Option<SocketAddr>) {
        if let Some(log) = &mut self.log {
            log.upstream_local = local;
        }
    }

    /// Milliseconds since the first attempt began.
    pub fn upstream_millis(&mut self) -> u64 {
        let since = self.first_attempt.unwrap_or(self.started);
        let millis = since.elapsed().as_millis() as u64;
        self.service_time = Some(millis);
        millis
    }

    /// The upstream's head.
    pub fn response_head(&mut self, head: &http::response::Parts) {
        self.status = head.status.as_u16();
        if let Some(log) = &mut self.log
            && log.request.is_some()
        {
            log.response = Some(head.headers.clone());
        }
        self.grpc_trailers(&head.headers);
    }

    /// `grpc-status` of trailers (or of a trailers-only head).
    pub fn grpc_trailers(&mut self, trailers: &HeaderMap) {
        if let Some(status) = trailers.get(&GRPC_STATUS).and_then(|v| v.to_str().ok()) {
            // Bounded: the value becomes a label.
            self.grpc_status = status.parse::<u8>().ok().map(|n| n.to_string().into());
        }
    }

    /// The upstream ended in the middle of its body.
    pub fn upstream_reset(&mut self) {
        self.flags |= flags::UPSTREAM_CONNECTION_TERMINATION;
    }

    /// Closes the account.
    pub fn finish(&mut self, complete: bool) {
        self.close(complete);
    }

    fn close(&mut self, complete: bool) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        const OWN: u32 =
            flags::UPSTREAM_CONNECTION_TERMINATION | flags::UPSTREAM_REQUEST_TIMEOUT | flags::STREAM_IDLE_TIMEOUT;
        if !complete && self.flags & OWN == 0 {
            self.flags |= flags::DOWNSTREAM_CONNECTION_TERMINATION;
            if self.status == 0 {
                self.details = Cow::Borrowed("downstream_remote_disconnect");
            }
        }
        self.count();
        self.write_log();
    }

    fn count(&self) {
        let Some(chosen) = &self.chosen else { return };
        let Some(reporter) = chosen.chain.http().and_then(|h| h.telemetry) else {
            return;
        };
        let worker = &self.downstream.worker;
        let source_side = reporter == Reporter::Source;
        let seen;
        let principal: &str = if source_side {
            seen = self.endpoint.as_ref().and_then(|e| e.principal.borrow().clone());
            seen.as_deref().unwrap_or_default()
        } else {
            first_uri(&self.downstream)
        };
        let peer = if source_side {
            &self.upstream_peer
        } else {
            &self.downstream_peer
        };
        let key = SeriesKey {
            source_side,
            peer: peer.as_ref().map_or(0, |p| p.id),
            principal: worker.telemetry.interner.borrow_mut().id(principal),
            cluster: self.cluster.as_ref().map_or(0, |c| c.id),
            endpoint: self.endpoint.as_ref().map_or(0, |e| e.id),
            status: self.status,
            grpc: self
                .grpc_status
                .as_ref()
                .and_then(|s| s.parse::<u32>().ok())
                .map_or(0, |n| n.saturating_add(1)),
            flags: self.flags,
            is_grpc: self.grpc,
            mtls: self.downstream.peer.is_some(),
        };
        let series = worker.telemetry.series.borrow_mut().http.get(key, || {
            let labels = self.labels(source_side, principal, peer.as_deref());
            let refs: Vec<&str> = labels.iter().map(|l| &**l).collect();
            worker.shared.telemetry.families.http(&refs)
        });
        series.requests.inc();
        series.duration.observe(self.started.elapsed().as_secs_f64() * 1000.0);
        series.request_bytes.observe(self.progress.received.get() as f64);
        series.response_bytes.observe(self.sent as f64);
    }

    fn labels(&self, source_side: bool, principal: &str, peer: Option<&PeerLabels>) -> Vec<Cow<'_, str>> {
        let protocol = if self.grpc { "grpc" } else { "http" };
        let mut labels = common(
            &self.downstream,
            source_side,
            principal,
            peer,
            self.cluster.as_deref(),
            self.endpoint.as_deref(),
            protocol,
            self.flags,
        );
        labels.push(self.status.to_string().into());
        let grpc = if self.grpc {
            self.grpc_status.as_deref().unwrap_or_default()
        } else {
            ""
        };
        labels.push(grpc.to_string().into());
        labels.push(security(source_side, self.downstream.peer.is_some()).into());
        labels
    }

    fn write_log(&self) {
        let (Some(log), Some(chosen)) = (&self.log, &self.chosen) else {
            return;
        };
        let Some(file) = chosen.chain.http().and_then(|h| h.access_log.as_ref()) else {
            return;
        };
        let line = Line {
            start: log.wall,
            method: log.method.as_str(),
            path: log.path.as_ref().map_or("", PathAndQuery::as_str),
            protocol: log.protocol,
            status: self.status,
            flags: self.flags,
            details: &self.details,
            transport_failure: self.transport_failure.as_deref().unwrap_or_default(),
            received: self.progress.received.get(),
            sent: self.sent,
            duration: self.started.elapsed().as_millis() as u64,
            service_time: self.service_time,
            xff: text(&log.xff),
            user_agent: text(&log.user_agent),
            request_id: text(&log.request_id),
            authority: text(&log.authority),
            upstream_host: self.endpoint.as_ref().map(|e| e.address),
            cluster: &log.cluster,
            upstream_local: log.upstream_local,
            downstream_local: Some(self.downstream.facts.destination),
            downstream_remote: Some(self.downstream.facts.source),
            sni: self.downstream.facts.sni.as_deref().unwrap_or_default(),
            route: &log.route,
            ..Line::default()
        };
        let subject = format::Subject {
            line: &line,
            request: log.request.as_ref(),
            response: log.response.as_ref(),
            metadata: &log.metadata,
            peer_uri: first_uri(&self.downstream),
            own_uri: self.downstream.own_uri.as_deref().unwrap_or_default(),
        };
        write(&self.downstream.worker, file, &subject);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        // The request was abandoned while it was worked on: its connection is gone.
        self.close(false);
    }
}

fn first_uri(downstream: &Downstream) -> &str {
    downstream
        .peer
        .as_ref()
        .and_then(|p| p.uris.first())
        .map_or("", String::as_str)
}

/// `connection_security_policy` (S6.80).
fn security(source_side: bool, mtls: bool) -> &'static str {
    match (source_side, mtls) {
        (true, _) => "unknown",
        (false, true) => "mutual_tls",
        (false, false) => "none",
    }
}

/// The labels that HTTP and TCP series share, in their order.
#[expect(clippy::too_many_arguments, reason = "the attributes of one series, used twice")]
fn common<'a>(
    downstream: &'a Downstream,
    source_side: bool,
    principal: &str,
    peer: Option<&PeerLabels>,
    cluster: Option<&ClusterState>,
    endpoint: Option<&Endpoint>,
    protocol: &'static str,
    flags: u32,
) -> Vec<Cow<'a, str>> {
    let local = &downstream.worker.shared.telemetry.local;
    let unknown = PeerLabels::unknown();
    let from_endpoint = endpoint.and_then(|e| e.workload.as_ref()).map(|w| PeerLabels {
        workload: w.name.clone(),
        namespace: w.namespace.clone(),
        canonical_name: w.canonical_name.clone(),
        canonical_revision: w.canonical_revision.clone(),
        cluster: w.cluster.clone(),
        ..PeerLabels::unknown()
    });
    let other = peer
        .or(from_endpoint.as_ref().filter(|_| source_side))
        .unwrap_or(&unknown);
    let (source, destination) = if source_side { (local, other) } else { (other, local) };
    let own = downstream
        .worker
        .shared
        .secrets
        .load()
        .identity
        .as_ref()
        .and_then(|i| i.spiffe_id())
        .map(|id| id.as_str().to_string());
    // Both principals are known or none: without mTLS neither side has shown one (S6.81).
    let known = !principal.is_empty();
    let own = own.filter(|_| known).unwrap_or_else(|| "unknown".to_string());
    let other_principal = if known {
        principal.to_string()
    } else {
        "unknown".to_string()
    };
    let (source_principal, destination_principal) = if source_side {
        (own, other_principal)
    } else {
        (other_principal, own)
    };
    let service = cluster.and_then(|c| c.model.services.first());
    let unnamed = || "unknown".to_string();
    let name = cluster.map(|c| c.model.name.clone());
    let service_host = service
        .map(|s| s.host.clone())
        .or_else(|| name.clone())
        .unwrap_or_else(unnamed);
    let service_name = service.map(|s| s.name.clone()).or(name).unwrap_or_else(unnamed);
    let service_namespace = service.map_or_else(|| destination.namespace.clone(), |s| s.namespace.clone());
    let reporter = if source_side { "source" } else { "destination" };
    vec![
        reporter.into(),
        source.workload.clone().into(),
        source.canonical_name.clone().into(),
        source.canonical_revision.clone().into(),
        source.namespace.clone().into(),
        source_principal.into(),
        source.app.clone().into(),
        source.version.clone().into(),
        source.cluster.clone().into(),
        destination.workload.clone().into(),
        destination.namespace.clone().into(),
        destination_principal.into(),
        destination.app.clone().into(),
        destination.version.clone().into(),
        service_host.into(),
        destination.canonical_name.clone().into(),
        destination.canonical_revision.clone().into(),
        service_name.into(),
        service_namespace.into(),
        destination.cluster.clone().into(),
        protocol.into(),
        flags::text(flags).into(),
    ]
}

/// Account of one TCP connection.
pub struct ConnectionRecord {
    downstream: Rc<Downstream>,
    chosen: Rc<Chosen>,
    wall: SystemTime,
    received: Cell<u64>,
    sent: Cell<u64>,
    upstream: RefCell<Option<(Rc<ClusterState>, Rc<Endpoint>)>>,
    transport_failure: RefCell<String>,
    series: RefCell<Option<Rc<TcpSeries>>>,
    metadata: RefCell<Vec<Metadata>>,
    closed: Cell<bool>,
}

impl ConnectionRecord {
    /// Opens the account.
    pub fn begin(downstream: &Rc<Downstream>, chosen: &Rc<Chosen>) -> Self {
        ConnectionRecord {
            downstream: downstream.clone(),
            chosen: chosen.clone(),
            wall: SystemTime::now(),
            received: Cell::new(0),
            sent: Cell::new(0),
            upstream: RefCell::new(None),
            transport_failure: RefCell::default(),
            series: RefCell::new(None),
            metadata: RefCell::default(),
            closed: Cell::new(false),
        }
    }

    /// Where the bytes go.
    pub fn upstream(&self, cluster: &Rc<ClusterState>, endpoint: &Rc<Endpoint>) {
        *self.upstream.borrow_mut() = Some((cluster.clone(), endpoint.clone()));
        if self.chosen.chain.tcp().is_some_and(|t| t.telemetry) {
            let source_side = self.chosen.listener.model.direction == Direction::Outbound;
            let seen;
            let principal: &str = if source_side {
                seen = endpoint.principal.borrow().clone();
                seen.as_deref().unwrap_or_default()
            } else {
                first_uri(&self.downstream)
            };
            let worker = &self.downstream.worker;
            let mtls = self.downstream.peer.is_some();
            let key = SeriesKey {
                source_side,
                principal: worker.telemetry.interner.borrow_mut().id(principal),
                cluster: cluster.id,
                endpoint: endpoint.id,
                mtls,
                ..SeriesKey::default()
            };
            let series = worker.telemetry.series.borrow_mut().tcp.get(key, || {
                let mut labels = common(
                    &self.downstream,
                    source_side,
                    principal,
                    None,
                    Some(cluster),
                    Some(endpoint),
                    "tcp",
                    flags::NONE,
                );
                labels.push(security(source_side, mtls).into());
                let refs: Vec<&str> = labels.iter().map(|l| &**l).collect();
                worker.shared.telemetry.families.tcp(&refs)
            });
            series.opened.inc();
            *self.series.borrow_mut() = Some(series);
        }
    }

    /// What authorization decided, for formats that show dynamic metadata.
    pub fn decision(&self, decision: &Decision<'_>, audits: bool) {
        metadata_of(NETWORK_RBAC, decision, audits, &mut self.metadata.borrow_mut());
    }

    /// Bytes from the client.
    pub fn received(&self, n: u64) {
        self.received.set(self.received.get() + n);
        if let Some(series) = &*self.series.borrow() {
            series.received.add(n);
        }
    }

    /// Bytes to the client.
    pub fn sent(&self, n: u64) {
        self.sent.set(self.sent.get() + n);
        if let Some(series) = &*self.series.borrow() {
            series.sent.add(n);
        }
    }

    /// Why there is no upstream connection.
    pub fn transport_failure(&self, reason: &str) {
        *self.transport_failure.borrow_mut() = reason.to_string();
    }

    /// Closes the account. `details` is `-` or the termination details.
    pub fn finish(&self, flags: u32, details: &str) {
        if self.closed.replace(true) {
            return;
        }
        if let Some(series) = &*self.series.borrow() {
            series.closed.inc();
        }
        let Some(file) = &self.chosen.listener.model.access_log else {
            return;
        };
        let upstream = self.upstream.borrow();
        let transport_failure = self.transport_failure.borrow();
        let denied = details.starts_with("rbac_");
        let line = Line {
            cluster: upstream.as_ref().map_or("", |(c, _)| c.model.name.as_str()),
            upstream_host: upstream.as_ref().map(|(_, e)| e.address),
            transport_failure: &transport_failure,
            termination: if denied { details } else { "" },
            details: if denied { "" } else { details },
            received: self.received.get(),
            sent: self.sent.get(),
            start: Some(self.wall),
            ..Line::default()
        };
        write_connection(
            &self.downstream.worker,
            file,
            &self.downstream.facts,
            self.downstream.started,
            line,
            flags,
            &self.metadata.borrow(),
        );
    }

    /// A connection without a filter chain, or whose listener did not come.
    pub fn refused(
        worker: &Worker,
        listener: &CompiledListener,
        facts: &Facts,
        started: Instant,
        details: &'static str,
    ) {
        if let Some(file) = &listener.model.access_log {
            let line = Line {
                details,
                ..Line::default()
            };
            write_connection(worker, file, facts, started, line, flags::NO_ROUTE, &[]);
        }
    }

    /// A connection whose TLS handshake failed.
    pub fn handshake_failed(
        worker: &Worker,
        listener: &Arc<CompiledListener>,
        _chain: &Chain,
        facts: &Facts,
        started: Instant,
        reason: &str,
    ) {
        tracing::info!(
            target: "tls",
            "handshake with {} at {} failed: {reason}",
            facts.source, facts.destination
        );
        if let Some(file) = &listener.model.access_log {
            let reason = format!("TLS_error:|{}:TLS_error_end", reason.replace(' ', "_"));
            let line = Line {
                details: "-",
                termination: &reason,
                ..Line::default()
            };
            write_connection(worker, file, facts, started, line, flags::NONE, &[]);
        }
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        self.finish(flags::NONE, "-");
    }
}

fn write_connection(
    worker: &Worker,
    file: &AccessLog,
    facts: &Facts,
    started: Instant,
    line: Line<'_>,
    flags: u32,
    metadata: &[Metadata],
) {
    let line = Line {
        start: line.start.or_else(|| Some(SystemTime::now() - started.elapsed())),
        duration: started.elapsed().as_millis() as u64,
        downstream_local: Some(facts.destination),
        downstream_remote: Some(facts.source),
        sni: facts.sni.as_deref().unwrap_or_default(),
        flags,
        ..line
    };
    let subject = format::Subject {
        line: &line,
        request: None,
        response: None,
        metadata,
        peer_uri: "",
        own_uri: "",
    };
    write(worker, file, &subject);
}
