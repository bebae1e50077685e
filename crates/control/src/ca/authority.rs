//! The running authority: the material in use, what it signs, and the news when its roots change.

use std::sync::Arc;
use std::time::Duration as StdDuration;

use arc_swap::ArcSwap;
use mantlet_identity::{
    CaMaterial, Csr, Error, IssueRequest, IssuedCertificate, SpiffeId, SubjectAltName, TlsIdentity, TrustBundle,
};
use mantlet_runtime::Registry;
use rustls::crypto::CryptoProvider;
use time::Duration;
use tokio::sync::watch;

use super::duration;
use super::material::{self, CaLoadError, Change, Source, random_serial};
use super::metrics::CaMetrics;
use super::options::CaOptions;
use super::secrets::SecretStore;
use crate::auth::Clock;

/// How often mounted CA files are compared with those in use.
const PLUG_IN_CHECK: StdDuration = StdDuration::from_secs(5);

/// Why a request was not signed; the certificate service maps it to a gRPC code (S4.18).
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request itself is at fault: CSR or lifetime.
    #[error("{0}")]
    Request(Error),
    /// The authority is at fault.
    #[error("{0}")]
    Internal(Error),
}

impl SignError {
    /// Istio's value of the `error` label of `citadel_server_csr_sign_err_count`.
    pub fn metric_label(&self) -> &'static str {
        match self {
            Self::Request(Error::TtlTooLong { .. }) => "TTL_ERROR",
            Self::Request(_) => "CSR_ERROR",
            Self::Internal(Error::BadCa(_)) => "CA_NOT_READY",
            Self::Internal(_) => "CERT_GEN_ERROR",
        }
    }
}

/// The certificate authority of a control plane. Share it in an `Arc`.
pub struct Authority {
    options: CaOptions,
    material: ArcSwap<CaMaterial>,
    source: Source,
    bundle: watch::Sender<Arc<TrustBundle>>,
    secrets: Arc<dyn SecretStore>,
    clock: Arc<dyn Clock>,
    provider: Arc<CryptoProvider>,
    pub(crate) metrics: CaMetrics,
}

impl Authority {
    /// Loads or creates the CA and looks after it from then on. Waits while the API server cannot be asked.
    pub async fn start(
        options: CaOptions,
        secrets: Arc<dyn SecretStore>,
        clock: Arc<dyn Clock>,
        registry: &Registry,
    ) -> Result<Arc<Self>, CaLoadError> {
        let this = Self::load(options, secrets, clock, registry).await?;
        let weak = Arc::downgrade(&this);
        tokio::spawn(async move {
            let Some(mut pause) = weak.upgrade().map(|ca| ca.first_check()) else {
                return;
            };
            loop {
                tokio::time::sleep(pause).await;
                let Some(ca) = weak.upgrade() else { return };
                ca.check_once().await;
                pause = ca.check_interval();
            }
        });
        let weak = Arc::downgrade(&this);
        registry.on_collect(move || {
            if let Some(ca) = weak.upgrade() {
                ca.metrics.show(&ca.material.load(), ca.clock.now());
            }
        });
        Ok(this)
    }

    /// As [`Authority::start`], without the periodic checks.
    pub async fn load(
        options: CaOptions,
        secrets: Arc<dyn SecretStore>,
        clock: Arc<dyn Clock>,
        registry: &Registry,
    ) -> Result<Arc<Self>, CaLoadError> {
        let loaded = material::load_or_create(&options, &secrets, clock.as_ref()).await?;
        let metrics = CaMetrics::new(registry);
        metrics.show(&loaded.material, clock.now());
        let (bundle, _) = watch::channel(Arc::new(loaded.material.bundle().clone()));
        Ok(Arc::new(Self {
            options,
            material: ArcSwap::from_pointee(loaded.material),
            source: loaded.source,
            bundle,
            secrets,
            clock,
            provider: mantlet_identity::tls::mesh_provider(),
            metrics,
        }))
    }

    /// Compares the material in use with its source once, renewing a self-signed root when due. Failures are logged and
    /// leave everything as it is.
    pub async fn check_once(&self) {
        let current = self.material.load_full();
        match material::check(&current, self.source, &self.options, &self.secrets, self.clock.as_ref()).await {
            Ok(Change::None) => {}
            Ok(Change::Use(new)) => {
                tracing::info!(target: "rootcertrotator", "signing certificate changed, new one ends {}", new.not_after());
                self.metrics.show(&new, self.clock.now());
                let bundle = new.bundle().clone();
                self.material.store(Arc::new(*new));
                self.bundle.send_if_modified(|known| {
                    let changed = **known != bundle;
                    if changed {
                        *known = Arc::new(bundle);
                    }
                    changed
                });
            }
            Err(error) => tracing::error!(target: "rootcertrotator", "{error}"),
        }
    }

    fn check_interval(&self) -> StdDuration {
        match self.source {
            Source::PlugIn => PLUG_IN_CHECK,
            Source::Secret(_) => self.options.check_interval.unsigned_abs(),
        }
    }

    /// Replicas started together should not rotate together (S4.75).
    fn first_check(&self) -> StdDuration {
        let interval = self.check_interval();
        if self.options.rotator_jitter {
            interval.mul_f64(rand::random::<f64>())
        } else {
            interval
        }
    }

    /// The settings.
    pub fn options(&self) -> &CaOptions {
        &self.options
    }

    /// The material in use.
    pub fn material(&self) -> Arc<CaMaterial> {
        self.material.load_full()
    }

    /// The trust bundle and its changes: for the root ConfigMaps, webhook caBundles and the server certificate.
    pub fn bundle_watch(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    /// The trust bundle as PEM, as `caBundle` of a webhook wants it.
    pub fn ca_bundle_pem(&self) -> String {
        self.bundle.borrow().to_pem()
    }

    /// Signs a workload's request for identities that the caller has proved. `validity_seconds` of zero or less asks for
    /// the default; more than the maximum is an error, not cut (S4.16).
    pub fn sign(
        &self,
        csr_pem: &str,
        identities: &[SpiffeId],
        validity_seconds: i64,
    ) -> Result<IssuedCertificate, SignError> {
        let material = self.material.load();
        let ttl = self
            .granted_ttl(&material, validity_seconds)
            .map_err(SignError::Request)?;
        let csr = Csr::from_pem(csr_pem).map_err(|error| {
            self.metrics.parse_errors.inc();
            SignError::Request(error)
        })?;
        let names: Vec<_> = identities.iter().cloned().map(SubjectAltName::Spiffe).collect();
        let request = IssueRequest {
            csr: &csr,
            names: &names,
            ttl,
            now: self.clock.now(),
            serial: random_serial(),
        };
        material.issue(&request).map_err(|error| match error {
            Error::BadRequest(_) => SignError::Request(error),
            _ => SignError::Internal(error),
        })
    }

    fn granted_ttl(&self, material: &CaMaterial, validity_seconds: i64) -> Result<Duration, Error> {
        if validity_seconds <= 0 {
            // The default is cut to the signing chain's remaining life.
            let remaining = material.chain_not_after() - self.clock.now();
            return Ok(self.options.default_ttl.min(remaining.max(Duration::seconds(1))));
        }
        let asked = Duration::seconds(validity_seconds);
        if asked > self.options.max_ttl {
            return Err(Error::TtlTooLong {
                requested: duration::format(asked),
                max: duration::format(self.options.max_ttl),
            });
        }
        Ok(asked)
    }

    /// A certificate for the control plane itself, for host names, with the lifetime of the root (S4.48).
    pub fn server_identity(&self, names: &[String]) -> Result<TlsIdentity, Error> {
        let material = self.material.load();
        let key = mantlet_identity::PrivateKey::generate(mantlet_identity::KeyAlgorithm::default())?;
        let names = names
            .iter()
            .map(|name| SubjectAltName::from_text(name))
            .collect::<Result<Vec<_>, _>>()?;
        let csr = Csr::for_key(&key)?;
        let request = IssueRequest {
            csr: &csr,
            names: &names,
            ttl: self.options.root_ttl,
            now: self.clock.now(),
            serial: random_serial(),
        };
        let issued = material.issue(&request)?;
        TlsIdentity::from_csr_response(&issued.to_response(), &key, self.provider.clone())
    }

    /// The crypto provider that all configurations share.
    pub fn provider(&self) -> Arc<CryptoProvider> {
        self.provider.clone()
    }

    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({:?}, {:?})", self.source, self.material.load())
    }
}
