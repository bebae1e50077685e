//! The control plane's own certificate for 15012 and 15017: signed by its CA, renewed at half of its life and whenever the
//! roots change (S4.48, S4.49), used by the next handshake.

use std::sync::Arc;
use std::time::Duration as StdDuration;

use arc_swap::ArcSwap;
use mantlet_identity::rotation::{DEFAULT_GRACE_JITTER, DEFAULT_GRACE_RATIO, renewal_time};
use mantlet_identity::{ClientAuth, Error, ServerTlsOptions, TlsIdentity, TrustDomainRule};
use rustls::ServerConfig;

use super::authority::Authority;

/// Longest sleep before the clock is looked at again: it may be set, and it goes on while the machine sleeps, which timers do
/// not. Until the renewal no proxy can connect.
const LONGEST_SLEEP: StdDuration = StdDuration::from_secs(2);

/// The certificate in use, and the two configurations made from it.
pub struct ServerCert {
    authority: Arc<Authority>,
    names: Vec<String>,
    trust_domains: ArcSwap<TrustDomainRule>,
    current: ArcSwap<Current>,
}

struct Current {
    identity: TlsIdentity,
    /// Client certificates optional (S4.31), ALPN h2: for 15012.
    grpc: Arc<ServerConfig>,
    /// No client certificates, ALPN h2 and http/1.1: for 15017.
    webhook: Arc<ServerConfig>,
    renew_at: time::OffsetDateTime,
}

impl Current {
    /// Whether it is time to renew, or the clock has been set back to before the certificate's life.
    fn due(&self, now: time::OffsetDateTime) -> bool {
        now >= self.renew_at || self.identity.leaf().is_some_and(|leaf| now < leaf.not_before)
    }
}

impl ServerCert {
    /// Issues the first certificate and keeps it fresh from then on. `trust_domains` are those of acceptable clients.
    pub fn start(authority: Arc<Authority>, trust_domains: TrustDomainRule) -> Result<Arc<Self>, Error> {
        let this = Self::new(authority, trust_domains)?;
        let weak = Arc::downgrade(&this);
        let mut bundle = this.authority.bundle_watch();
        tokio::spawn(async move {
            loop {
                let Some(cert) = weak.upgrade() else { return };
                let until = cert.current.load().renew_at - cert.authority.clock().now();
                drop(cert);
                let sleep = until.try_into().unwrap_or(StdDuration::ZERO).min(LONGEST_SLEEP);
                let changed = tokio::select! {
                    () = tokio::time::sleep(sleep) => false,
                    changed = bundle.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        true
                    }
                };
                let Some(cert) = weak.upgrade() else { return };
                if changed || cert.current.load().due(cert.authority.clock().now()) {
                    if let Err(error) = cert.renew() {
                        tracing::error!(target: "ca", "the control plane's own certificate cannot be renewed: {error}");
                        tokio::time::sleep(StdDuration::from_secs(5)).await;
                    } else {
                        tracing::info!(target: "ca", "the control plane's own certificate is renewed");
                    }
                }
            }
        });
        Ok(this)
    }

    /// Issues the first certificate only.
    pub fn new(authority: Arc<Authority>, trust_domains: TrustDomainRule) -> Result<Arc<Self>, Error> {
        let names = authority.options().server_names();
        let current = issue(&authority, &names, &trust_domains)?;
        Ok(Arc::new(Self {
            authority,
            names,
            trust_domains: ArcSwap::from_pointee(trust_domains),
            current: ArcSwap::from_pointee(current),
        }))
    }

    /// Replaces the certificate now.
    pub fn renew(&self) -> Result<(), Error> {
        let rule = self.trust_domains.load();
        self.current
            .store(Arc::new(issue(&self.authority, &self.names, &rule)?));
        Ok(())
    }

    /// Clients are accepted by this rule from the next handshake on.
    ///
    /// # Errors
    /// When no certificate can be issued; then the former rule goes on until the next renewal.
    pub fn set_trust_domains(&self, rule: TrustDomainRule) -> Result<(), Error> {
        self.trust_domains.store(Arc::new(rule));
        self.renew()
    }

    /// The certificate and its key.
    pub fn identity(&self) -> TlsIdentity {
        self.current.load().identity.clone()
    }

    /// For the gRPC port 15012, to be asked per connection.
    pub fn grpc_config(&self) -> Arc<ServerConfig> {
        self.current.load().grpc.clone()
    }

    /// For the webhook port 15017, to be asked per connection.
    pub fn webhook_config(&self) -> Arc<ServerConfig> {
        self.current.load().webhook.clone()
    }
}

fn issue(authority: &Authority, names: &[String], rule: &TrustDomainRule) -> Result<Current, Error> {
    let identity = authority.server_identity(names)?;
    let grpc = identity.server(&ServerTlsOptions {
        client_auth: ClientAuth::Optional(rule.clone()),
        alpn: vec![b"h2".to_vec()],
        min_tls13: false,
    })?;
    let webhook = identity.server(&ServerTlsOptions {
        client_auth: ClientAuth::None,
        alpn: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
        min_tls13: false,
    })?;
    let now = authority.clock().now();
    let end = identity.not_after().unwrap_or(now);
    let renew_at = renewal_time(
        now,
        end,
        DEFAULT_GRACE_RATIO,
        DEFAULT_GRACE_JITTER,
        rand::random::<f64>() * 2.0 - 1.0,
    );
    Ok(Current {
        identity,
        grpc: grpc.strict(),
        webhook: webhook.strict(),
        renew_at,
    })
}
