//! Metrics with handles made in advance: the hot path adds to its own cache line, without locks, allocation or hashing.
//!
//! A *family* has a name and label names; a *series* is one set of label values. Each call of [`CounterFamily::with`]
//! gives a fresh shard of that series, so that every worker thread that asks for its own handle also writes to its own
//! cache line; a scrape adds the shards up. The number of series is bounded per family, because labels can come from
//! peers.

mod family;
mod process;
mod render;

pub use family::{Counter, CounterFamily, Gauge, GaugeFamily, Histogram, HistogramFamily};
pub use process::register_process_metrics;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use family::FamilyInner;

/// Content type of [`Registry::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Most series in one family unless set otherwise.
pub const DEFAULT_MAX_SERIES: usize = 20_000;
/// Envoy's default bounds for `*_milliseconds` and `*_bytes` histograms, which Istio's metrics use.
pub const ISTIO_BUCKETS: &[f64] = &[
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

type Collector = Box<dyn Fn() + Send + Sync>;

/// All families of a process. Clones share them.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    families: Mutex<BTreeMap<String, Arc<FamilyInner>>>,
    collectors: Mutex<Vec<Collector>>,
    max_series: usize,
}

/// What a family counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::with_max_series(DEFAULT_MAX_SERIES)
    }

    /// An empty registry whose families hold at most `max_series` series each.
    pub fn with_max_series(max_series: usize) -> Self {
        Self {
            inner: Arc::new(Inner {
                families: Mutex::default(),
                collectors: Mutex::default(),
                max_series,
            }),
        }
    }

    /// A counter family, made on first use. Asking again with the same shape gives the same family.
    pub fn counter(&self, name: &str, help: &str, labels: &[&str]) -> CounterFamily {
        CounterFamily(self.family(name, help, labels, Kind::Counter, &[]))
    }

    /// A gauge family.
    pub fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> GaugeFamily {
        GaugeFamily(self.family(name, help, labels, Kind::Gauge, &[]))
    }

    /// A histogram family with these upper bounds (ascending, without +Inf).
    pub fn histogram(&self, name: &str, help: &str, labels: &[&str], bounds: &[f64]) -> HistogramFamily {
        HistogramFamily(self.family(name, help, labels, Kind::Histogram, bounds))
    }

    /// Calls `collect` before each rendering, to set gauges that are read rather than kept.
    pub fn on_collect(&self, collect: impl Fn() + Send + Sync + 'static) {
        self.inner
            .collectors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Box::new(collect));
    }

    /// All families in Prometheus' text format ([`CONTENT_TYPE`]), sorted by name and label values.
    pub fn render(&self) -> String {
        for collect in self
            .inner
            .collectors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            collect();
        }
        let families: Vec<_> = self.families().values().cloned().collect();
        let mut out = String::with_capacity(16 * 1024);
        for family in families {
            render::family(&mut out, &family);
        }
        out
    }

    fn families(&self) -> MutexGuard<'_, BTreeMap<String, Arc<FamilyInner>>> {
        self.inner.families.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn family(&self, name: &str, help: &str, labels: &[&str], kind: Kind, bounds: &[f64]) -> Arc<FamilyInner> {
        let mut families = self.families();
        if let Some(family) = families.get(name) {
            if family.has_shape(kind, labels, bounds) {
                return family.clone();
            }
            // A programming error. It must not take the process down; the second family is simply not exposed.
            tracing::error!(target: "runtime", "metric {name} is registered twice with different shapes");
            return Arc::new(FamilyInner::new(
                name,
                help,
                labels,
                kind,
                bounds,
                self.inner.max_series,
            ));
        }
        let family = Arc::new(FamilyInner::new(
            name,
            help,
            labels,
            kind,
            bounds,
            self.inner.max_series,
        ));
        families.insert(name.to_owned(), family.clone());
        family
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({} families)", self.families().len())
    }
}

#[cfg(test)]
mod tests;
