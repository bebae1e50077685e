//! What every Mantlet process needs besides its job: logging, metrics, an admin HTTP server, readiness, orderly shutdown,
//! backoff and bounded tasks.
//!
//! Called by `proxy`, `control`, `node`, `apiserver` and `console`. It must not know a mesh: no type of policy,
//! identity or configuration appears here.

pub mod admin;
pub mod backoff;
pub mod drain;
pub mod log;
pub mod metrics;
pub mod ready;
pub mod task;
pub mod writer;

pub use admin::{Admin, AdminRequest, AdminResponse};
pub use backoff::Backoff;
pub use drain::{Drain, DrainWatch, shutdown_signal};
pub use log::{LogHandle, LogOptions};
pub use metrics::{Counter, CounterFamily, Gauge, GaugeFamily, Histogram, HistogramFamily, Registry};
pub use ready::{Readiness, ReadyTask};
pub use writer::{Work, Writer};
