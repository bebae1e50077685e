//! Where the signing key comes from, in Istio's order (S4.64): plugged-in files, then the Secret, then a new self-signed
//! root written to the Secret. Includes the later changes: renewal of a self-signed root (S4.75, S4.76) and new plugged-in
//! files (S4.77).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration as StdDuration;

use mantlet_identity::{CaMaterial, CaPem, Error, SelfSignedOptions, Serial, TrustBundle};
use mantlet_runtime::Backoff;
use zeroize::Zeroizing;

use super::options::CaOptions;
use super::secrets::{CaSecret, SecretError, SecretStore};
use crate::auth::Clock;

/// The Secret of a self-signed CA.
const SELF_SIGNED_SECRET: &str = "istio-ca-secret";
/// The Secret of a plugged-in CA, and of a self-signed one with `USE_CACERTS_FOR_SELF_SIGNED_CA`.
const CACERTS_SECRET: &str = "cacerts";
const SECRET_TYPE: &str = "istio.io/ca-root";
/// Marks `cacerts` as written by the control plane itself.
const GENERATED_MARK: &str = "istio-generated";
/// Largest file read from the mount.
const MAX_FILE: u64 = 1 << 20;

/// Why there is no CA. All of these are the operator's to mend; the process must not go on without.
#[derive(Debug, thiserror::Error)]
pub enum CaLoadError {
    /// Files are there, but unusable or incomplete (S4.62).
    #[error("plugged-in CA in {dir}: {reason}")]
    PlugIn {
        /// The directory.
        dir: String,
        /// What is wrong.
        reason: String,
    },
    /// The Secret is there, but unusable. It is never overwritten.
    #[error("secret {name}: {reason}")]
    Secret {
        /// The Secret.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A new root could not be made.
    #[error(transparent)]
    Create(#[from] Error),
}

/// Where the material in use came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    PlugIn,
    Secret(&'static str),
}

pub(crate) struct Loaded {
    pub(crate) material: CaMaterial,
    pub(crate) source: Source,
}

/// A fresh random serial number.
pub(crate) fn random_serial() -> Serial {
    Serial::from_random(rand::random())
}

/// Finds or makes the CA. Retries for as long as the API server cannot be asked.
pub(crate) async fn load_or_create(
    options: &CaOptions,
    secrets: &Arc<dyn SecretStore>,
    clock: &dyn Clock,
) -> Result<Loaded, CaLoadError> {
    if let Some(material) = load_plug_in(options, clock)? {
        tracing::info!(target: "pkica", "use plugged-in cert at {}", options.root_ca_dir.display());
        return Ok(Loaded {
            material,
            source: Source::PlugIn,
        });
    }
    let mut backoff = Backoff::new(StdDuration::from_millis(100), StdDuration::from_secs(5));
    loop {
        match try_secret(options, secrets, clock).await {
            Ok(loaded) => return Ok(loaded),
            Err(Attempt::Fatal(error)) => return Err(error),
            Err(Attempt::Again(reason)) => {
                tracing::warn!(target: "pkica", "the CA secret cannot be read or written, trying again: {reason}");
                backoff.sleep().await;
            }
        }
    }
}

enum Attempt {
    Again(SecretError),
    Fatal(CaLoadError),
}

impl From<CaLoadError> for Attempt {
    fn from(error: CaLoadError) -> Self {
        Self::Fatal(error)
    }
}

async fn try_secret(options: &CaOptions, secrets: &Arc<dyn SecretStore>, clock: &dyn Clock) -> Result<Loaded, Attempt> {
    if let Some(secret) = secrets.get(SELF_SIGNED_SECRET).await.map_err(Attempt::Again)? {
        tracing::info!(target: "pkica", "Load signing key and cert from existing secret {SELF_SIGNED_SECRET}");
        let material = from_secret(SELF_SIGNED_SECRET, &secret, options, clock)?;
        return Ok(Loaded {
            material,
            source: Source::Secret(SELF_SIGNED_SECRET),
        });
    }
    let name = if options.use_cacerts_secret {
        CACERTS_SECRET
    } else {
        SELF_SIGNED_SECRET
    };
    if options.use_cacerts_secret
        && let Some(secret) = secrets.get(CACERTS_SECRET).await.map_err(Attempt::Again)?
    {
        let material = from_secret(CACERTS_SECRET, &secret, options, clock)?;
        return Ok(Loaded {
            material,
            source: Source::Secret(CACERTS_SECRET),
        });
    }
    let wanted = SelfSignedOptions {
        organization: options.trust_domain.as_str().to_owned(),
        key: options.root_key,
        ttl: options.root_ttl,
    };
    let material = CaMaterial::self_signed(&wanted, clock.now(), random_serial()).map_err(CaLoadError::Create)?;
    match secrets.create(name, SECRET_TYPE, &to_secret(name, &material, "")).await {
        Ok(()) => {
            tracing::info!(target: "pkica", "Using self-generated public key: {}", material.certificate_pem());
            let material = add_extra_roots(material, options)?;
            Ok(Loaded {
                material,
                source: Source::Secret(name),
            })
        }
        // Another replica was faster; the next round loads its root.
        Err(error) => Err(Attempt::Again(error)),
    }
}

fn from_secret(
    name: &'static str,
    secret: &CaSecret,
    options: &CaOptions,
    clock: &dyn Clock,
) -> Result<CaMaterial, CaLoadError> {
    let parts = CaPem {
        ca_cert: secret.get("ca-cert.pem"),
        ca_key: secret.get("ca-key.pem"),
        cert_chain: secret.get("cert-chain.pem"),
        root_cert: secret.get("root-cert.pem"),
    };
    let material = CaMaterial::from_pem(parts, clock.now()).map_err(|e| CaLoadError::Secret {
        name,
        reason: e.to_string(),
    })?;
    add_extra_roots(material, options)
}

fn to_secret(name: &str, material: &CaMaterial, resource_version: &str) -> CaSecret {
    let certificate = material.certificate_pem().into_bytes();
    let key: Zeroizing<String> = material.key_pem();
    let mut data = BTreeMap::from([
        ("ca-cert.pem".to_owned(), certificate.clone()),
        ("ca-key.pem".to_owned(), key.as_bytes().to_vec()),
        ("cert-chain.pem".to_owned(), Vec::new()),
        ("root-cert.pem".to_owned(), certificate),
    ]);
    if name == CACERTS_SECRET {
        data.insert(GENERATED_MARK.to_owned(), Vec::new());
    }
    CaSecret {
        data,
        resource_version: resource_version.to_owned(),
    }
}

/// `root-cert.pem` of the mount joins a self-signed bundle (S4.66).
fn add_extra_roots(material: CaMaterial, options: &CaOptions) -> Result<CaMaterial, CaLoadError> {
    let dir = &options.root_ca_dir;
    let plug_in = |reason: String| CaLoadError::PlugIn {
        dir: dir.display().to_string(),
        reason,
    };
    let Some(bytes) = read(dir, "root-cert.pem").map_err(plug_in)? else {
        return Ok(material);
    };
    let extra = TrustBundle::from_pem("root-cert.pem", &bytes).map_err(|e| plug_in(e.to_string()))?;
    material.with_extra_roots(&extra).map_err(|e| plug_in(e.to_string()))
}

/// A file of the mount; none when it does not exist.
fn read(dir: &Path, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, String> {
    let path = dir.join(name);
    match std::fs::metadata(&path) {
        Ok(meta) if meta.len() > MAX_FILE => return Err(format!("{name} has more than {MAX_FILE} bytes")),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{name}: {error}")),
    }
    std::fs::read(&path)
        .map(|bytes| Some(Zeroizing::new(bytes)))
        .map_err(|e| format!("{name}: {e}"))
}

/// The plugged-in CA, if its key is there (S4.61–S4.63).
pub(crate) fn load_plug_in(options: &CaOptions, clock: &dyn Clock) -> Result<Option<CaMaterial>, CaLoadError> {
    let dir = &options.root_ca_dir;
    let plug_in = |reason: String| CaLoadError::PlugIn {
        dir: dir.display().to_string(),
        reason,
    };
    // Written by ourselves for another replica: not plugged in by the operator.
    if dir.join(GENERATED_MARK).exists() {
        return Ok(None);
    }
    let layouts = [
        ["ca-key.pem", "ca-cert.pem", "cert-chain.pem", "root-cert.pem"],
        // kubernetes.io/tls: the chain is in tls.crt itself.
        ["tls.key", "tls.crt", "tls.crt", "ca.crt"],
    ];
    for [key_name, cert_name, chain_name, root_name] in layouts {
        let Some(key) = read(dir, key_name).map_err(plug_in)? else {
            continue;
        };
        let need = |name: &str| {
            read(dir, name).map_err(plug_in)?.ok_or_else(|| {
                plug_in(format!(
                    "incomplete signing CA bundle detected: {name} is missing beside {key_name}"
                ))
            })
        };
        let (cert, chain, root) = (need(cert_name)?, need(chain_name)?, need(root_name)?);
        let parts = CaPem {
            ca_cert: &cert,
            ca_key: &key,
            cert_chain: &chain,
            root_cert: &root,
        };
        return CaMaterial::from_pem(parts, clock.now())
            .map(Some)
            .map_err(|e| plug_in(e.to_string()));
    }
    Ok(None)
}

/// What a periodic look at the source found.
pub(crate) enum Change {
    None,
    Use(Box<CaMaterial>),
}

/// Looks whether other material should be used from now on.
pub(crate) async fn check(
    current: &CaMaterial,
    source: Source,
    options: &CaOptions,
    secrets: &Arc<dyn SecretStore>,
    clock: &dyn Clock,
) -> Result<Change, String> {
    match source {
        Source::PlugIn => check_plug_in(current, options, clock),
        Source::Secret(name) => check_secret(current, name, options, secrets, clock).await,
    }
}

fn check_plug_in(current: &CaMaterial, options: &CaOptions, clock: &dyn Clock) -> Result<Change, String> {
    let Some(new) = load_plug_in(options, clock).map_err(|e| e.to_string())? else {
        return Err(format!(
            "the files in {} are gone; the CA in memory stays in use",
            options.root_ca_dir.display()
        ));
    };
    if new.certificate() == current.certificate() && new.bundle() == current.bundle() {
        return Ok(Change::None);
    }
    if new.bundle() != current.bundle() {
        let related = current.bundle().is_subset_of(new.bundle()) || new.bundle().is_subset_of(current.bundle());
        if !options.multi_root || !related {
            return Err(
                "the root certificate changed, which needs ISTIO_MULTIROOT_MESH=true and an old set of roots \
                        that is a subset or a superset of the new one; the CA in memory stays in use"
                    .to_owned(),
            );
        }
    }
    Ok(Change::Use(Box::new(new)))
}

async fn check_secret(
    current: &CaMaterial,
    name: &'static str,
    options: &CaOptions,
    secrets: &Arc<dyn SecretStore>,
    clock: &dyn Clock,
) -> Result<Change, String> {
    let secret = match secrets.get(name).await.map_err(|e| e.to_string())? {
        Some(secret) => secret,
        None => {
            // Deleted under us: put the material in use back, so that a restart does not make another root.
            secrets
                .create(name, SECRET_TYPE, &to_secret(name, current, ""))
                .await
                .map_err(|e| e.to_string())?;
            tracing::warn!(target: "rootcertrotator", "secret {name} was deleted; it has been written again");
            return Ok(Change::None);
        }
    };
    let stored = from_secret(name, &secret, options, clock).map_err(|e| e.to_string())?;
    if stored.certificate() != current.certificate() || stored.bundle() != current.bundle() {
        // Another replica rotated (S4.76).
        return Ok(Change::Use(Box::new(stored)));
    }
    let now = clock.now();
    let life = stored.not_after() - stored.not_before();
    if stored.not_after() - now >= life * f64::from(options.grace_percent) / 100.0 {
        return Ok(Change::None);
    }
    let renewed = stored
        .renew_self_signed(options.root_ttl, now, random_serial())
        .map_err(|e| format!("the root cannot be renewed: {e}"))?;
    match secrets
        .update(name, &to_secret(name, &renewed, &secret.resource_version))
        .await
    {
        Ok(()) => {
            tracing::info!(target: "rootcertrotator", "root certificate is rotated successfully, new one ends {}", renewed.not_after());
            let renewed = add_extra_roots(renewed, options).map_err(|e| e.to_string())?;
            Ok(Change::Use(Box::new(renewed)))
        }
        // Someone else was faster; the next look loads theirs.
        Err(error) => Err(error.to_string()),
    }
}
