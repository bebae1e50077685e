//! The CA's settings: Istio's environment variables (S4.91), read once.

use std::path::PathBuf;

use mantlet_identity::authority::{DEFAULT_LEAF_TTL, DEFAULT_MAX_LEAF_TTL, DEFAULT_ROOT_TTL};
use mantlet_identity::{KeyAlgorithm, TrustDomain};
use time::Duration;

use super::duration;

/// A variable that cannot be understood. The CA does not start on guesses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("environment variable {name}={value:?}: {reason}")]
pub struct OptionError {
    /// The variable.
    pub name: String,
    /// Its value.
    pub value: String,
    /// What is expected.
    pub reason: String,
}

/// Settings of the authority.
#[derive(Debug, Clone)]
pub struct CaOptions {
    /// The mesh's trust domain: organisation of a self-signed root, domain of every identity.
    pub trust_domain: TrustDomain,
    /// The control plane's namespace (`POD_NAMESPACE`).
    pub namespace: String,
    /// The control plane's revision; `default` adds no further host name.
    pub revision: String,
    /// `DEFAULT_WORKLOAD_CERT_TTL`.
    pub default_ttl: Duration,
    /// `MAX_WORKLOAD_CERT_TTL`.
    pub max_ttl: Duration,
    /// `CITADEL_SELF_SIGNED_CA_CERT_TTL`.
    pub root_ttl: Duration,
    /// Kind of key of a self-signed root: RSA when `CITADEL_SELF_SIGNED_CA_RSA_KEY_SIZE` is set, else ECDSA P-256.
    pub root_key: KeyAlgorithm,
    /// `CITADEL_SELF_SIGNED_ROOT_CERT_CHECK_INTERVAL`.
    pub check_interval: Duration,
    /// `CITADEL_SELF_SIGNED_ROOT_CERT_GRACE_PERIOD_PERCENTILE`: a root is renewed when less of its life remains.
    pub grace_percent: u8,
    /// `CITADEL_ENABLE_JITTER_FOR_ROOT_CERT_ROTATOR`.
    pub rotator_jitter: bool,
    /// `ROOT_CA_DIR`: where `cacerts` is mounted.
    pub root_ca_dir: PathBuf,
    /// `USE_CACERTS_FOR_SELF_SIGNED_CA`: keep a self-signed root in `cacerts`.
    pub use_cacerts_secret: bool,
    /// `ISTIO_MULTIROOT_MESH`: allow a plugged-in root to change to a superset or subset.
    pub multi_root: bool,
    /// `ISTIOD_CUSTOM_HOST`: further names of the control plane's own certificate.
    pub custom_hosts: Vec<String>,
    /// `PILOT_CA_CERT_CONFIGMAP`: name of the root ConfigMap.
    pub root_configmap: String,
    /// `TOKEN_AUDIENCES`.
    pub token_audiences: Vec<String>,
}

impl CaOptions {
    /// Istio's defaults.
    pub fn new(trust_domain: TrustDomain, namespace: &str, revision: &str) -> Self {
        Self {
            trust_domain,
            namespace: namespace.to_owned(),
            revision: revision.to_owned(),
            default_ttl: DEFAULT_LEAF_TTL,
            max_ttl: DEFAULT_MAX_LEAF_TTL,
            root_ttl: DEFAULT_ROOT_TTL,
            root_key: KeyAlgorithm::default(),
            check_interval: Duration::hours(1),
            grace_percent: 20,
            rotator_jitter: true,
            root_ca_dir: PathBuf::from("/etc/cacerts"),
            use_cacerts_secret: false,
            multi_root: false,
            custom_hosts: Vec::new(),
            root_configmap: "istio-ca-root-cert".to_owned(),
            token_audiences: vec!["istio-ca".to_owned()],
        }
    }

    /// Defaults, changed by the process's environment.
    pub fn from_env(trust_domain: TrustDomain, namespace: &str, revision: &str) -> Result<Self, OptionError> {
        Self::new(trust_domain, namespace, revision).with_env(|name| std::env::var(name).ok())
    }

    /// Defaults, changed by the variables that `get` knows.
    pub fn with_env(mut self, get: impl Fn(&str) -> Option<String>) -> Result<Self, OptionError> {
        let read = Reader { get: &get };
        read.duration("DEFAULT_WORKLOAD_CERT_TTL", &mut self.default_ttl)?;
        read.duration("MAX_WORKLOAD_CERT_TTL", &mut self.max_ttl)?;
        read.duration("CITADEL_SELF_SIGNED_CA_CERT_TTL", &mut self.root_ttl)?;
        read.duration("CITADEL_SELF_SIGNED_ROOT_CERT_CHECK_INTERVAL", &mut self.check_interval)?;
        read.boolean("CITADEL_ENABLE_JITTER_FOR_ROOT_CERT_ROTATOR", &mut self.rotator_jitter)?;
        read.boolean("USE_CACERTS_FOR_SELF_SIGNED_CA", &mut self.use_cacerts_secret)?;
        read.boolean("ISTIO_MULTIROOT_MESH", &mut self.multi_root)?;
        if let Some(text) = read.text("CITADEL_SELF_SIGNED_ROOT_CERT_GRACE_PERIOD_PERCENTILE") {
            self.grace_percent = text.parse().ok().filter(|p| *p <= 99).ok_or_else(|| {
                error(
                    "CITADEL_SELF_SIGNED_ROOT_CERT_GRACE_PERIOD_PERCENTILE",
                    &text,
                    "a number from 0 to 99 is needed",
                )
            })?;
        }
        if let Some(text) = read.text("CITADEL_SELF_SIGNED_CA_RSA_KEY_SIZE") {
            let bits = text.parse().unwrap_or(0);
            self.root_key = KeyAlgorithm::rsa(bits)
                .map_err(|e| error("CITADEL_SELF_SIGNED_CA_RSA_KEY_SIZE", &text, &e.to_string()))?;
        }
        if let Some(text) = read.text("ROOT_CA_DIR") {
            self.root_ca_dir = PathBuf::from(text);
        }
        if let Some(text) = read.text("ISTIOD_CUSTOM_HOST") {
            self.custom_hosts = list(&text);
        }
        if let Some(text) = read.text("PILOT_CA_CERT_CONFIGMAP") {
            self.root_configmap = text;
        }
        if let Some(text) = read.text("TOKEN_AUDIENCES") {
            self.token_audiences = list(&text);
        }
        if self.default_ttl > self.max_ttl {
            let reason = format!(
                "is longer than MAX_WORKLOAD_CERT_TTL ({})",
                duration::format(self.max_ttl)
            );
            return Err(error(
                "DEFAULT_WORKLOAD_CERT_TTL",
                &duration::format(self.default_ttl),
                &reason,
            ));
        }
        Ok(self)
    }

    /// Host names of the control plane's own certificate (S4.48).
    pub fn server_names(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut services = vec![
            "istiod".to_owned(),
            "istiod-remote".to_owned(),
            "istio-pilot".to_owned(),
        ];
        if !self.revision.is_empty() && self.revision != "default" {
            services.push(format!("istiod-{}", self.revision));
        }
        for service in services {
            names.push(format!("{service}.{}.svc", self.namespace));
        }
        for host in &self.custom_hosts {
            if !names.contains(host) {
                names.push(host.clone());
            }
        }
        names
    }
}

fn list(text: &str) -> Vec<String> {
    text.split(',')
        .map(str::trim)
        .filter(|t| !t.is_empty())
        .map(str::to_owned)
        .collect()
}

fn error(name: &str, value: &str, reason: &str) -> OptionError {
    OptionError {
        name: name.to_owned(),
        value: value.to_owned(),
        reason: reason.to_owned(),
    }
}

struct Reader<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
}

impl Reader<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.get)(name).map(|t| t.trim().to_owned()).filter(|t| !t.is_empty())
    }

    fn duration(&self, name: &str, into: &mut Duration) -> Result<(), OptionError> {
        if let Some(text) = self.text(name) {
            *into = duration::parse(&text)
                .filter(|d| *d > Duration::ZERO)
                .ok_or_else(|| error(name, &text, "a positive duration such as 24h or 90m is needed"))?;
        }
        Ok(())
    }

    fn boolean(&self, name: &str, into: &mut bool) -> Result<(), OptionError> {
        if let Some(text) = self.text(name) {
            *into = match text.as_str() {
                "true" | "True" | "TRUE" | "1" | "t" | "T" => true,
                "false" | "False" | "FALSE" | "0" | "f" | "F" => false,
                _ => return Err(error(name, &text, "true or false is needed")),
            };
        }
        Ok(())
    }
}
