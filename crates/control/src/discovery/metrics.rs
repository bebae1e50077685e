//! Istio's names for what the control plane counts.

use mantlet_runtime::{Counter, CounterFamily, Gauge, GaugeFamily, Histogram, Registry};
use mantlet_xds::ResourceType;

/// Bounds of latency histograms, seconds.
const SECONDS: &[f64] = &[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0];

/// Metrics of pushes and streams.
#[derive(Clone)]
pub struct PilotMetrics {
    pushes: CounterFamily,
    rejects: CounterFamily,
    reject_now: GaugeFamily,
    total_rejects: CounterFamily,
    streams: GaugeFamily,
    /// From a change to the last affected proxy's queue, seconds.
    pub convergence: Histogram,
    /// Time for one push round, seconds.
    pub push_time: Histogram,
    /// Changes received, by what changed.
    pub inbound_updates: CounterFamily,
    /// Services known.
    pub services: Gauge,
    /// Streams refused, by reason.
    pub refused: CounterFamily,
    /// Push rounds that were triggered.
    pub triggers: Counter,
}

impl PilotMetrics {
    /// Registers them.
    pub fn new(registry: &Registry) -> PilotMetrics {
        registry
            .gauge("pilot_info", "Pilot version and build information.", &["version"])
            .with(&[mantlet_api::VERSION])
            .set(1.0);
        PilotMetrics {
            pushes: registry.counter(
                "pilot_xds_pushes",
                "Pilot build and send errors for lds, rds, cds and eds.",
                &["type"],
            ),
            rejects: registry.counter(
                "pilot_xds_rejects",
                "Configurations rejected by proxies, by type.",
                &["type"],
            ),
            reject_now: registry.gauge(
                "pilot_xds_reject_active",
                "Proxies whose last response of a type was rejected.",
                &["type"],
            ),
            total_rejects: registry.counter(
                "pilot_total_xds_rejects",
                "Total number of XDS responses from pilot rejected by proxy.",
                &["type"],
            ),
            streams: registry.gauge(
                "pilot_xds",
                "Number of endpoints connected to this pilot using XDS.",
                &["version"],
            ),
            convergence: registry
                .histogram(
                    "pilot_proxy_convergence_time",
                    "Delay in seconds between config change and a proxy receiving all required configuration.",
                    &[],
                    SECONDS,
                )
                .with(&[]),
            push_time: registry
                .histogram(
                    "pilot_xds_push_time",
                    "Total time in seconds Pilot takes to push.",
                    &[],
                    SECONDS,
                )
                .with(&[]),
            inbound_updates: registry.counter(
                "pilot_inbound_updates",
                "Total number of updates received by pilot.",
                &["type"],
            ),
            services: registry
                .gauge("pilot_services", "Total services known to pilot.", &[])
                .with(&[]),
            refused: registry.counter(
                "pilot_xds_streams_refused",
                "xDS streams refused before the first response, by reason.",
                &["reason"],
            ),
            triggers: registry
                .counter(
                    "pilot_push_triggers",
                    "Total number of times a push was triggered.",
                    &[],
                )
                .with(&[]),
        }
    }

    /// A response was sent.
    pub fn pushed(&self, kind: ResourceType) {
        self.pushes.with(&[&kind.short().to_lowercase()]).inc();
    }

    /// A response was refused.
    pub fn rejected(&self, kind: ResourceType) {
        let label = kind.short().to_lowercase();
        self.rejects.with(&[&label]).inc();
        self.total_rejects.with(&[kind.short()]).inc();
    }

    /// How many proxies refuse a type at the moment.
    pub fn refusing(&self, kind: ResourceType, proxies: usize) {
        self.reject_now
            .with(&[&kind.short().to_lowercase()])
            .set(proxies as f64);
    }

    /// A stream of a proxy of this version; the gauge counts while the guard lives.
    pub fn stream(&self, version: &str) -> StreamGuard {
        let gauge = self.streams.with(&[version]);
        gauge.add(1.0);
        StreamGuard(gauge)
    }
}

/// Counts one open stream while it lives.
pub struct StreamGuard(Gauge);

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.add(-1.0);
    }
}
