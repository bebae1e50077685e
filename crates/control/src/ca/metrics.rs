//! The CA's metrics, by Istio's names.

use mantlet_identity::CaMaterial;
use mantlet_runtime::{Counter, CounterFamily, Gauge, Registry};
use time::OffsetDateTime;

pub(crate) struct CaMetrics {
    pub(crate) requests: Counter,
    pub(crate) auth_failures: Counter,
    pub(crate) parse_errors: Counter,
    pub(crate) sign_errors: CounterFamily,
    pub(crate) issued: Counter,
    root_expiry: Gauge,
    root_remaining: Gauge,
    chain_expiry: Gauge,
    chain_remaining: Gauge,
}

impl CaMetrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let counter = |name: &str, help: &str| registry.counter(name, help, &[]).with(&[]);
        let gauge = |name: &str, help: &str| registry.gauge(name, help, &[]).with(&[]);
        Self {
            requests: counter(
                "citadel_server_csr_count",
                "The number of CSRs received by Citadel server.",
            ),
            auth_failures: counter(
                "citadel_server_authentication_failure_count",
                "The number of authentication failures.",
            ),
            parse_errors: counter(
                "citadel_server_csr_parsing_err_count",
                "The number of errors occurred when parsing the CSR.",
            ),
            sign_errors: registry.counter(
                "citadel_server_csr_sign_err_count",
                "The number of errors occurred when signing the CSR.",
                &["error"],
            ),
            issued: counter(
                "citadel_server_success_cert_issuance_count",
                "The number of certificates issuances that have succeeded.",
            ),
            root_expiry: gauge(
                "citadel_server_root_cert_expiry_timestamp",
                "The unix timestamp, in seconds, when Citadel root cert will expire.",
            ),
            root_remaining: gauge(
                "citadel_server_root_cert_expiry_seconds",
                "The time remaining, in seconds, before the root cert will expire.",
            ),
            chain_expiry: gauge(
                "citadel_server_cert_chain_expiry_timestamp",
                "The unix timestamp, in seconds, when Citadel cert chain will expire.",
            ),
            chain_remaining: gauge(
                "citadel_server_cert_chain_expiry_seconds",
                "The time remaining, in seconds, before the cert chain will expire.",
            ),
        }
    }

    /// Sets the expiry gauges.
    pub(crate) fn show(&self, material: &CaMaterial, now: OffsetDateTime) {
        let root = material.bundle().earliest_expiry();
        let chain = material.chain_not_after();
        self.root_expiry.set(root.unix_timestamp() as f64);
        self.root_remaining.set((root - now).as_seconds_f64());
        self.chain_expiry.set(chain.unix_timestamp() as f64);
        self.chain_remaining.set((chain - now).as_seconds_f64());
    }
}
