//! Telemetry: Istio's metrics, the access log, remembered denials and plaintext callers.
//!
//! Workers count through handles of their own ([`WorkerTelemetry`]); what they share ([`Telemetry`]) is written only when
//! a series is new, a request was denied, or a batch of log lines is handed over.

pub mod access_log;
pub mod denials;
pub mod exchange;
pub mod flags;
pub mod format;
pub mod metrics;
pub mod plaintext;
pub mod record;

use std::cell::RefCell;

use mantlet_model::authz::{Decision, Verdict};
use mantlet_model::query::Denial;
use mantlet_runtime::{Counter, CounterFamily, Registry};

use crate::connection::Downstream;
use crate::http::request::{Exchange, View};
use crate::tcp;
use access_log::{LogBuffer, LogWriter};
use denials::Denials;
use exchange::PeerLabels;
use metrics::{Families, Interner, SeriesTable};

/// Shared telemetry.
pub struct Telemetry {
    /// All metrics of the process.
    pub registry: Registry,
    /// Istio's families.
    pub families: Families,
    /// This workload, as peers and metrics see it.
    pub local: PeerLabels,
    /// Its metadata header value, precomputed.
    pub local_metadata: Option<(http::HeaderValue, http::HeaderValue)>,
    /// Writer of access logs.
    pub log: LogWriter,
    /// Callers without mutual TLS.
    pub plaintext: plaintext::Plaintext,
    denials: Denials,
}

impl Telemetry {
    /// Telemetry of this workload; `node_id` is the xDS node id.
    ///
    /// # Errors
    /// When there is no thread for the access log.
    pub fn new(registry: Registry, local: PeerLabels, node_id: &str) -> std::io::Result<Self> {
        Ok(Telemetry {
            families: Families::new(&registry),
            denials: Denials::new(&registry),
            plaintext: plaintext::Plaintext::default(),
            local_metadata: exchange::encode(&local, node_id),
            local,
            registry,
            log: LogWriter::start()?,
        })
    }

    /// Denials, newest last.
    pub fn denials(&self) -> Vec<Denial> {
        self.denials.all()
    }

    /// Remembers a denied request.
    pub fn denied_request(&self, exchange: &Exchange, details: &str) {
        let downstream = &exchange.downstream;
        let nearest = missed(details)
            .then(|| {
                let chain = &exchange.chosen.chain;
                let mut connection = tcp::authz_view(downstream);
                connection.remote = exchange.remote;
                let filters = chain.http().map_or(&[][..], |http| &http.authz);
                let view = View::of(exchange);
                self.denials.nearest(&chain.engine, filters, &connection, Some(&view))
            })
            .flatten();
        self.denials.remember(Denial {
            time: now(),
            source_principal: principal(downstream),
            source: downstream.facts.source.ip().to_string(),
            port: downstream.facts.destination.port(),
            method: exchange.parts.method.to_string(),
            path: bounded(exchange.parts.uri.path()),
            host: bounded(exchange.authority.to_str().unwrap_or_default()),
            details: details.to_string(),
            nearest,
        });
    }

    /// Remembers a denied connection.
    pub fn denied_connection(&self, downstream: &Downstream, details: &str) {
        let nearest = missed(details)
            .then(|| {
                let chosen = downstream.chosen()?;
                let filters = chosen.chain.tcp().map_or(&[][..], |tcp| &tcp.authz);
                let connection = tcp::authz_view(downstream);
                self.denials.nearest(&chosen.chain.engine, filters, &connection, None)
            })
            .flatten();
        self.denials.remember(Denial {
            time: now(),
            source_principal: principal(downstream),
            source: downstream.facts.source.ip().to_string(),
            port: downstream.facts.destination.port(),
            method: String::new(),
            path: String::new(),
            host: String::new(),
            details: details.to_string(),
            nearest,
        });
    }
}

/// Whether no rule decided: then one came closest.
fn missed(details: &str) -> bool {
    details == "rbac_access_denied_matched_policy[none]"
}

fn principal(downstream: &Downstream) -> Option<String> {
    downstream.peer.as_ref().and_then(|p| p.uris.first().cloned())
}

fn now() -> String {
    access_log::rfc3339_millis(std::time::SystemTime::now())
}

/// Peers choose these texts; what is remembered stays small.
fn bounded(text: &str) -> String {
    text.chars().take(512).collect()
}

/// Telemetry of one worker.
pub struct WorkerTelemetry {
    /// Interned label values.
    pub interner: RefCell<Interner>,
    /// Series in use.
    pub series: RefCell<SeriesTable>,
    /// Peers' metadata by header value.
    pub peers: RefCell<exchange::PeerCache>,
    /// Log lines not handed over yet.
    pub log: LogBuffer,
    http_allowed: Counter,
    http_denied: Counter,
    tcp_allowed: Counter,
    tcp_denied: Counter,
    http_jwt: [Counter; 3],
    http_trial: [Counter; 4],
    tcp_trial: [Counter; 4],
    /// Answers of external authorizers about requests.
    pub ext_authz: ExtAuthzCounters,
    /// Answers of external authorizers about connections.
    pub tcp_ext_authz: ExtAuthzCounters,
}

/// Counters of external authorization.
pub struct ExtAuthzCounters {
    /// Said yes.
    pub ok: Counter,
    /// Said no.
    pub denied: Counter,
    /// Gave no answer.
    pub error: Counter,
    /// Gave none in time.
    pub timeout: Counter,
    /// Gave none, and the request went on.
    pub failure_mode_allowed: Counter,
}

impl ExtAuthzCounters {
    fn new(families: &[CounterFamily; 5]) -> Self {
        let [ok, denied, error, timeout, failure_mode_allowed] = families.each_ref().map(|f| f.with(&[]));
        ExtAuthzCounters {
            ok,
            denied,
            error,
            timeout,
            failure_mode_allowed,
        }
    }
}

impl WorkerTelemetry {
    /// Handles for one worker.
    pub fn new(shared: &Telemetry) -> Self {
        let http = &shared.families.http_rbac;
        let tcp = &shared.families.tcp_rbac;
        WorkerTelemetry {
            interner: RefCell::default(),
            series: RefCell::default(),
            peers: RefCell::default(),
            log: LogBuffer::new(shared.log.clone()),
            http_allowed: http.0.with(&[]),
            http_denied: http.1.with(&[]),
            tcp_allowed: tcp.0.with(&[]),
            tcp_denied: tcp.1.with(&[]),
            http_jwt: shared.families.http_jwt.each_ref().map(|f| f.with(&[])),
            http_trial: shared.families.http_trial.each_ref().map(|f| f.with(&[])),
            tcp_trial: shared.families.tcp_trial.each_ref().map(|f| f.with(&[])),
            ext_authz: ExtAuthzCounters::new(&shared.families.http_ext_authz),
            tcp_ext_authz: ExtAuthzCounters::new(&shared.families.tcp_ext_authz),
        }
    }

    /// Counts an authorization decision about a request.
    pub fn http_decision(&self, allowed: bool) {
        if allowed { &self.http_allowed } else { &self.http_denied }.inc();
    }

    /// Counts a decision about the tokens of a request.
    pub fn http_authentication(&self, allowed: bool) {
        self.http_jwt[usize::from(!allowed)].inc();
    }

    /// Counts a CORS preflight, whose tokens are not looked at.
    pub fn http_preflight(&self) {
        self.http_jwt[2].inc();
    }

    /// Counts what dry-run policies would have decided about a request (S2.134).
    pub fn http_trial(&self, decision: &Decision<'_>) {
        count_trial(&self.http_trial, decision);
    }

    /// Counts what dry-run policies would have decided about a connection.
    pub fn tcp_trial(&self, decision: &Decision<'_>) {
        count_trial(&self.tcp_trial, decision);
    }

    /// Counts an authorization decision about a connection.
    pub fn tcp_decision(&self, allowed: bool) {
        if allowed { &self.tcp_allowed } else { &self.tcp_denied }.inc();
    }
}

fn count_trial(counters: &[Counter; 4], decision: &Decision<'_>) {
    for (shadow, first) in [(decision.shadow_allow, 0), (decision.shadow_deny, 2)] {
        if let Some(shadow) = shadow {
            let denied = usize::from(shadow.verdict == Verdict::Denied);
            counters[first + denied].inc();
        }
    }
}
