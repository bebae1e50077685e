//! Families, series, shards and the handles that callers keep.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Kind;

type LabelValues = Box<[Box<str>]>;

/// Shards of a series that are not worth looking through.
const FEW_SHARDS: usize = 8;

/// One family; the typed wrappers below share it.
pub(crate) struct FamilyInner {
    pub(crate) name: String,
    pub(crate) help: String,
    pub(crate) labels: Box<[Box<str>]>,
    pub(crate) kind: Kind,
    pub(crate) bounds: Box<[f64]>,
    max_series: usize,
    series: Mutex<BTreeMap<LabelValues, Arc<Series>>>,
    /// Handles that found the family full; their values are not exposed, only that there were some.
    pub(crate) refused: AtomicU64,
}

/// One set of label values.
pub(crate) struct Series {
    /// Sums of shards whose handles are gone.
    folded: Mutex<Folded>,
}

#[derive(Default)]
struct Folded {
    totals: Totals,
    shards: Vec<Arc<Shard>>,
    /// Shards that were in use when they were last looked through.
    in_use: usize,
}

impl Folded {
    /// Takes a new shard in. The list is looked through whenever it has doubled, so that handles which come and go leave
    /// nothing behind even where nobody ever scrapes.
    fn push(&mut self, shard: Arc<Shard>) {
        if self.shards.len() >= FEW_SHARDS && self.shards.len() >= 2 * self.in_use {
            self.fold();
        }
        self.shards.push(shard);
    }

    /// Folds shards whose handle is gone into the base. Here and not in the handle's `Drop`, so that a scrape, which holds
    /// the same lock, never sees a counter go backwards.
    fn fold(&mut self) {
        let totals = &mut self.totals;
        self.shards.retain_mut(|shard| match Arc::get_mut(shard) {
            // Nobody else has it; its last writer's additions are seen, since `get_mut` synchronises with that drop.
            Some(shard) => {
                shard.add_to(totals);
                false
            }
            None => true,
        });
        self.in_use = self.shards.len();
    }
}

/// The numbers of a series at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Totals {
    /// Counter value, or number of observations.
    pub(crate) count: u64,
    /// Gauge value, or sum of observations.
    pub(crate) sum: f64,
    /// Observations per bound (not cumulative), with one more for +Inf.
    pub(crate) buckets: Vec<u64>,
}

/// One writer's part of a series, alone on its cache lines (128 bytes: neighbouring lines are fetched in pairs).
#[repr(align(128))]
struct Shard {
    count: AtomicU64,
    /// Bits of an f64.
    sum: AtomicU64,
    buckets: Box<[AtomicU64]>,
}

impl Shard {
    fn new(buckets: usize) -> Self {
        Self {
            count: AtomicU64::new(0),
            sum: AtomicU64::new(0f64.to_bits()),
            buckets: (0..buckets).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn add_sum(&self, value: f64) {
        // The writer is nearly always alone, so this loop runs once.
        let mut old = self.sum.load(Relaxed);
        while let Err(current) =
            self.sum
                .compare_exchange_weak(old, (f64::from_bits(old) + value).to_bits(), Relaxed, Relaxed)
        {
            old = current;
        }
    }

    fn add_to(&self, totals: &mut Totals) {
        totals.count += self.count.load(Relaxed);
        totals.sum += f64::from_bits(self.sum.load(Relaxed));
        if totals.buckets.len() < self.buckets.len() {
            totals.buckets.resize(self.buckets.len(), 0);
        }
        for (total, bucket) in totals.buckets.iter_mut().zip(&self.buckets) {
            *total += bucket.load(Relaxed);
        }
    }
}

impl Series {
    fn lock(&self) -> MutexGuard<'_, Folded> {
        self.folded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds all shards up.
    pub(crate) fn totals(&self) -> Totals {
        let mut folded = self.lock();
        folded.fold();
        let mut out = folded.totals.clone();
        for shard in &folded.shards {
            shard.add_to(&mut out);
        }
        out
    }
}

impl FamilyInner {
    pub(crate) fn new(name: &str, help: &str, labels: &[&str], kind: Kind, bounds: &[f64], max_series: usize) -> Self {
        Self {
            name: name.to_owned(),
            help: help.to_owned(),
            labels: labels.iter().map(|l| Box::from(*l)).collect(),
            kind,
            bounds: bounds.into(),
            max_series,
            series: Mutex::default(),
            refused: AtomicU64::new(0),
        }
    }

    pub(crate) fn has_shape(&self, kind: Kind, labels: &[&str], bounds: &[f64]) -> bool {
        self.kind == kind && *self.bounds == *bounds && self.labels.iter().map(|l| &**l).eq(labels.iter().copied())
    }

    fn series_map(&self) -> MutexGuard<'_, BTreeMap<LabelValues, Arc<Series>>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All series at this moment.
    pub(crate) fn snapshot(&self) -> Vec<(LabelValues, Totals)> {
        let series: Vec<_> = self.series_map().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        series
            .into_iter()
            .map(|(labels, series)| (labels, series.totals()))
            .collect()
    }

    fn key(&self, values: &[&str]) -> LabelValues {
        // One value per label name, whatever the caller passes: a short list is filled with empty values.
        (0..self.labels.len())
            .map(|i| Box::from(values.get(i).copied().unwrap_or_default()))
            .collect()
    }

    /// A series, or none when the family is full.
    fn series(&self, values: &[&str]) -> Option<Arc<Series>> {
        let key = self.key(values);
        let mut map = self.series_map();
        if let Some(series) = map.get(&key) {
            return Some(series.clone());
        }
        if map.len() >= self.max_series {
            self.refused.fetch_add(1, Relaxed);
            return None;
        }
        let series = Arc::new(Series {
            folded: Mutex::default(),
        });
        map.insert(key, series.clone());
        Some(series)
    }

    /// A fresh shard of a series (of nothing, when the family is full).
    fn shard(&self, values: &[&str]) -> Arc<Shard> {
        let buckets = if self.kind == Kind::Histogram {
            self.bounds.len() + 1
        } else {
            0
        };
        let shard = Arc::new(Shard::new(buckets));
        if let Some(series) = self.series(values) {
            series.lock().push(shard.clone());
        }
        shard
    }

    /// Shards of a series that are kept, whether or not their handles still exist.
    #[cfg(test)]
    pub(crate) fn shards(&self, values: &[&str]) -> usize {
        self.series(values).map_or(0, |series| series.lock().shards.len())
    }

    /// The one shard that all handles of a gauge share: a gauge is set, so its shards cannot be added up.
    fn shared_shard(&self, values: &[&str]) -> Arc<Shard> {
        let Some(series) = self.series(values) else {
            return Arc::new(Shard::new(0));
        };
        let mut folded = series.lock();
        if let Some(shard) = folded.shards.first() {
            return shard.clone();
        }
        // Starts from what earlier handles left behind.
        let shard = Arc::new(Shard::new(0));
        shard
            .sum
            .store(std::mem::take(&mut folded.totals).sum.to_bits(), Relaxed);
        folded.shards.push(shard.clone());
        shard
    }

    fn totals(&self, values: &[&str]) -> Totals {
        let series = self.series_map().get(&self.key(values)).cloned();
        series.map(|s| s.totals()).unwrap_or_default()
    }

    fn remove(&self, values: &[&str]) -> bool {
        self.series_map().remove(&self.key(values)).is_some()
    }
}

/// A family of counters.
#[derive(Clone)]
pub struct CounterFamily(pub(crate) Arc<FamilyInner>);

/// A handle on one counter. Take one per worker at configuration time and keep it: [`CounterFamily::with`] locks.
#[derive(Clone)]
pub struct Counter(Arc<Shard>);

impl CounterFamily {
    /// A fresh handle for these label values, in the order of the label names.
    pub fn with(&self, values: &[&str]) -> Counter {
        Counter(self.0.shard(values))
    }

    /// The sum over all handles of a series.
    pub fn total(&self, values: &[&str]) -> u64 {
        self.0.totals(values).count
    }

    /// Forgets a series. Handles that still exist write into the void from now on.
    pub fn remove(&self, values: &[&str]) -> bool {
        self.0.remove(values)
    }
}

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.count.fetch_add(n, Relaxed);
    }
}

/// A family of gauges.
#[derive(Clone)]
pub struct GaugeFamily(pub(crate) Arc<FamilyInner>);

/// A handle on one gauge; all handles of a series act on the same value.
#[derive(Clone)]
pub struct Gauge(Arc<Shard>);

impl GaugeFamily {
    /// A handle for these label values.
    pub fn with(&self, values: &[&str]) -> Gauge {
        Gauge(self.0.shared_shard(values))
    }

    /// The value of a series.
    pub fn value(&self, values: &[&str]) -> f64 {
        self.0.totals(values).sum
    }

    /// Forgets a series.
    pub fn remove(&self, values: &[&str]) -> bool {
        self.0.remove(values)
    }
}

impl Gauge {
    /// Sets the value.
    pub fn set(&self, value: f64) {
        self.0.sum.store(value.to_bits(), Relaxed);
    }

    /// Adds to the value; negative numbers take away.
    pub fn add(&self, value: f64) {
        self.0.add_sum(value);
    }

    /// Adds one until the guard is dropped.
    pub fn hold(&self) -> GaugeGuard {
        self.add(1.0);
        GaugeGuard(self.clone())
    }

    /// The value.
    pub fn get(&self) -> f64 {
        f64::from_bits(self.0.sum.load(Relaxed))
    }
}

/// Takes one away from a gauge when dropped.
pub struct GaugeGuard(Gauge);

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.add(-1.0);
    }
}

/// A family of histograms.
#[derive(Clone)]
pub struct HistogramFamily(pub(crate) Arc<FamilyInner>);

/// A handle on one histogram. As with counters: one per worker.
#[derive(Clone)]
pub struct Histogram {
    shard: Arc<Shard>,
    family: Arc<FamilyInner>,
}

impl HistogramFamily {
    /// A fresh handle for these label values.
    pub fn with(&self, values: &[&str]) -> Histogram {
        Histogram {
            shard: self.0.shard(values),
            family: self.0.clone(),
        }
    }

    /// Number and sum of the observations of a series.
    pub fn total(&self, values: &[&str]) -> (u64, f64) {
        let totals = self.0.totals(values);
        (totals.count, totals.sum)
    }
}

impl Histogram {
    /// Counts one observation.
    pub fn observe(&self, value: f64) {
        let at = self.family.bounds.partition_point(|bound| *bound < value);
        if let Some(bucket) = self.shard.buckets.get(at) {
            bucket.fetch_add(1, Relaxed);
        }
        self.shard.count.fetch_add(1, Relaxed);
        self.shard.add_sum(value);
    }
}

macro_rules! opaque_debug {
    ($($name:ident),*) => {
        $(impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(stringify!($name))
            }
        })*
    };
}
opaque_debug!(
    CounterFamily,
    Counter,
    GaugeFamily,
    Gauge,
    GaugeGuard,
    HistogramFamily,
    Histogram
);
