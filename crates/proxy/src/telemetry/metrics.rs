//! Istio's metric families, and the table by which a worker finds the handles of a series without building labels.

use std::rc::Rc;

use foldhash::HashMap;
use mantlet_runtime::metrics::ISTIO_BUCKETS;
use mantlet_runtime::{Counter, CounterFamily, Histogram, HistogramFamily, Registry};

/// Most series that a worker keeps handles for; peers choose some of the labels.
const MAX_SERIES: usize = 8192;

const COMMON: [&str; 22] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_service_name",
    "destination_service_namespace",
    "destination_cluster",
    "request_protocol",
    "response_flags",
];

/// The families.
pub struct Families {
    requests: CounterFamily,
    duration: HistogramFamily,
    request_bytes: HistogramFamily,
    response_bytes: HistogramFamily,
    tcp_opened: CounterFamily,
    tcp_closed: CounterFamily,
    tcp_sent: CounterFamily,
    tcp_received: CounterFamily,
    /// Decisions about requests: allowed, denied.
    pub http_rbac: (CounterFamily, CounterFamily),
    /// Decisions about connections: allowed, denied.
    pub tcp_rbac: (CounterFamily, CounterFamily),
    /// Token authentication of requests: allowed, denied, CORS preflights that it let pass.
    pub http_jwt: [CounterFamily; 3],
    /// What dry-run policies would have decided about requests (S2.133): allow, deny; each allowed, denied.
    pub http_trial: [CounterFamily; 4],
    /// The same for connections.
    pub tcp_trial: [CounterFamily; 4],
    /// Answers of external authorizers about requests: ok, denied, error, timeout, failure_mode_allowed.
    pub http_ext_authz: [CounterFamily; 5],
    /// The same about connections.
    pub tcp_ext_authz: [CounterFamily; 5],
}

impl Families {
    /// Registers them.
    pub fn new(registry: &Registry) -> Self {
        let http = http_labels();
        let mut tcp: Vec<&str> = COMMON.to_vec();
        tcp.push("connection_security_policy");
        let counter = |name: &str, help: &str, labels: &[&str]| registry.counter(name, help, labels);
        let histogram = |name: &str, help: &str| registry.histogram(name, help, &http, ISTIO_BUCKETS);
        Families {
            requests: counter("istio_requests_total", "Requests.", &http),
            duration: histogram("istio_request_duration_milliseconds", "Duration of requests."),
            request_bytes: histogram("istio_request_bytes", "Size of request bodies."),
            response_bytes: histogram("istio_response_bytes", "Size of response bodies."),
            tcp_opened: counter("istio_tcp_connections_opened_total", "TCP connections opened.", &tcp),
            tcp_closed: counter("istio_tcp_connections_closed_total", "TCP connections closed.", &tcp),
            tcp_sent: counter("istio_tcp_sent_bytes_total", "Bytes sent to the client.", &tcp),
            tcp_received: counter(
                "istio_tcp_received_bytes_total",
                "Bytes received from the client.",
                &tcp,
            ),
            http_rbac: (
                counter("envoy_http_rbac_allowed", "Requests that authorization allowed.", &[]),
                counter("envoy_http_rbac_denied", "Requests that authorization denied.", &[]),
            ),
            tcp_rbac: (
                counter("envoy_tcp_rbac_allowed", "Connections that authorization allowed.", &[]),
                counter("envoy_tcp_rbac_denied", "Connections that authorization denied.", &[]),
            ),
            http_jwt: [
                counter(
                    "envoy_http_jwt_authn_allowed",
                    "Requests whose tokens, if any, are good.",
                    &[],
                ),
                counter(
                    "envoy_http_jwt_authn_denied",
                    "Requests with a token that is refused.",
                    &[],
                ),
                counter(
                    "envoy_http_jwt_authn_cors_preflight_bypassed",
                    "CORS preflights, whose tokens are not looked at.",
                    &[],
                ),
            ],
            http_trial: trial(registry, "http"),
            tcp_trial: trial(registry, "tcp"),
            http_ext_authz: ext_authz(registry, "http"),
            tcp_ext_authz: ext_authz(registry, "tcp"),
        }
    }

    /// Fresh handles of an HTTP series; `labels` in the families' order.
    pub fn http(&self, labels: &[&str]) -> Rc<HttpSeries> {
        Rc::new(HttpSeries {
            requests: self.requests.with(labels),
            duration: self.duration.with(labels),
            request_bytes: self.request_bytes.with(labels),
            response_bytes: self.response_bytes.with(labels),
        })
    }

    /// Fresh handles of a TCP series.
    pub fn tcp(&self, labels: &[&str]) -> Rc<TcpSeries> {
        Rc::new(TcpSeries {
            opened: self.tcp_opened.with(labels),
            closed: self.tcp_closed.with(labels),
            sent: self.tcp_sent.with(labels),
            received: self.tcp_received.with(labels),
        })
    }
}

/// Labels of the families about requests, in their order.
fn http_labels() -> Vec<&'static str> {
    let mut labels = COMMON.to_vec();
    labels.extend(["response_code", "grpc_response_status", "connection_security_policy"]);
    labels
}

fn trial(registry: &Registry, kind: &str) -> [CounterFamily; 4] {
    [
        ("allow", "allowed"),
        ("allow", "denied"),
        ("deny", "allowed"),
        ("deny", "denied"),
    ]
    .map(|(action, result)| {
        let name = format!("envoy_{kind}_rbac_istio_dry_run_{action}_shadow_{result}");
        let help = format!("Decisions that dry-run policies with action {action} would have made: {result}.");
        registry.counter(&name, &help, &[])
    })
}

fn ext_authz(registry: &Registry, kind: &str) -> [CounterFamily; 5] {
    ["ok", "denied", "error", "timeout", "failure_mode_allowed"].map(|result| {
        let name = format!("envoy_{kind}_ext_authz_{result}");
        registry.counter(&name, &format!("Questions to external authorizers: {result}."), &[])
    })
}

/// Handles of one HTTP series.
pub struct HttpSeries {
    /// `istio_requests_total`.
    pub requests: Counter,
    /// `istio_request_duration_milliseconds`.
    pub duration: Histogram,
    /// `istio_request_bytes`.
    pub request_bytes: Histogram,
    /// `istio_response_bytes`.
    pub response_bytes: Histogram,
}

/// Handles of one TCP series.
pub struct TcpSeries {
    /// `istio_tcp_connections_opened_total`.
    pub opened: Counter,
    /// `istio_tcp_connections_closed_total`.
    pub closed: Counter,
    /// `istio_tcp_sent_bytes_total`.
    pub sent: Counter,
    /// `istio_tcp_received_bytes_total`.
    pub received: Counter,
}

/// What tells series apart, as numbers. Connections have no status and no gRPC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SeriesKey {
    /// Reported by the source.
    pub source_side: bool,
    /// Peer by its metadata (downstream's for destinations, upstream's for sources).
    pub peer: u32,
    /// Peer by its certificate, interned.
    pub principal: u32,
    /// Cluster (0 for none).
    pub cluster: u64,
    /// Endpoint (0 for none).
    pub endpoint: u64,
    /// Status.
    pub status: u16,
    /// gRPC status + 1, 0 for none.
    pub grpc: u32,
    /// Response flags.
    pub flags: u32,
    /// Whether the protocol is gRPC.
    pub is_grpc: bool,
    /// Whether mTLS was terminated.
    pub mtls: bool,
}

/// Handles by key.
pub struct Handles<S> {
    known: HashMap<SeriesKey, Rc<S>>,
    /// The last one that was asked for.
    last: Option<(SeriesKey, Rc<S>)>,
}

impl<S> Default for Handles<S> {
    fn default() -> Self {
        Handles {
            known: HashMap::default(),
            last: None,
        }
    }
}

impl<S> Handles<S> {
    /// The handles of a series, made on first use.
    pub fn get(&mut self, key: SeriesKey, make: impl FnOnce() -> Rc<S>) -> Rc<S> {
        if let Some((last, found)) = &self.last
            && *last == key
        {
            return found.clone();
        }
        if let Some(found) = self.known.get(&key) {
            self.last = Some((key, found.clone()));
            return found.clone();
        }
        // Endpoints and peers come and go; starting over is simple and the counts stay in the registry.
        if self.known.len() >= MAX_SERIES {
            self.known.clear();
        }
        let made = make();
        self.known.insert(key, made.clone());
        made
    }
}

/// A worker's handles.
#[derive(Default)]
pub struct SeriesTable {
    /// Of requests.
    pub http: Handles<HttpSeries>,
    /// Of TCP connections.
    pub tcp: Handles<TcpSeries>,
}

impl SeriesTable {
    /// Starts over. Called at each new configuration: numbers of clusters and endpoints that it has replaced never come
    /// again, and their handles would stay until the table is full.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Numbers for texts. A number is never given to another text, so a table that is started over stays right.
#[derive(Default)]
pub struct Interner {
    known: HashMap<Box<str>, u32>,
    last: u32,
}

impl Interner {
    /// The number of a text; 0 is the empty one.
    pub fn id(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        if let Some(found) = self.known.get(text) {
            return *found;
        }
        if self.known.len() >= MAX_SERIES {
            self.known.clear();
        }
        self.last += 1;
        self.known.insert(text.into(), self.last);
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each configuration numbers its clusters anew; what was counted under the old numbers stays, its handles do not.
    #[test]
    fn a_new_configuration_lets_go_of_the_handles_of_the_old_one() {
        let registry = Registry::new();
        let families = Families::new(&registry);
        let labels = ["x"; 25];
        let mut table = SeriesTable::default();
        let mut former = std::rc::Weak::new();
        for cluster in 1..=100 {
            table.clear();
            assert!(former.upgrade().is_none(), "handles of configuration {}", cluster - 1);
            let key = SeriesKey {
                source_side: true,
                cluster,
                endpoint: cluster,
                status: 200,
                mtls: true,
                ..SeriesKey::default()
            };
            for _ in 0..2 {
                let series = table.http.get(key, || families.http(&labels));
                series.requests.inc();
                former = Rc::downgrade(&series);
            }
        }
        let family = registry.counter("istio_requests_total", "", &http_labels());
        assert_eq!(family.total(&labels), 200);
    }
}
