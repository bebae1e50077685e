//! Certificates, keys and trust bundles in force, and the rustls configurations made from them.
//!
//! `agent` writes (a new SVID, a changed root file, secrets over xDS), workers read. A swap raises the generation; live
//! connections keep the certificate they were made with. Key bytes stay inside `identity`'s types.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use mantlet_identity::{
    ClientAuth, ClientTlsOptions, ExpectedServer, ServerTls, ServerTlsOptions, TlsIdentity, TrustBundle, TrustDomain,
    TrustDomainRule,
};
use mantlet_model::names::{SECRET_DEFAULT, SECRET_ROOT};
use mantlet_model::secret::{Secret, SecretValue};
use mantlet_model::tls as model;
use rustls::ClientConfig;
use rustls::crypto::CryptoProvider;

/// Why no TLS configuration can be made now.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The secret has not arrived yet.
    #[error("secret {0:?} is not available yet")]
    Missing(String),
    /// The TLS context asks for something that is refused here.
    #[error("unsupported TLS context: {0}")]
    Unsupported(String),
    /// The secret cannot be used.
    #[error(transparent)]
    Identity(#[from] mantlet_identity::Error),
}

/// What is in force at one time.
#[derive(Clone, Default)]
pub struct SecretSet {
    /// Counts the swaps.
    pub generation: u64,
    /// The workload's SVID with the union of all mesh roots.
    pub identity: Option<TlsIdentity>,
    /// Roots that came with the SVID.
    issued_roots: Option<TrustBundle>,
    /// Roots of the mounted file.
    mounted_roots: Option<TrustBundle>,
    /// Key pairs and bundles delivered by name.
    pairs: HashMap<String, TlsIdentity>,
    bundles: HashMap<String, TrustBundle>,
}

impl SecretSet {
    /// The mesh's trust bundle: roots of the CSR response and of the mounted file (S4.115).
    pub fn mesh_roots(&self) -> Option<TrustBundle> {
        match (&self.issued_roots, &self.mounted_roots) {
            (Some(a), Some(b)) => a.union(b).ok(),
            (a, b) => a.clone().or_else(|| b.clone()),
        }
    }

    /// Whether the mounted roots have changed so that they no longer hold what the own certificate was issued under: peers
    /// that follow the file will refuse it.
    pub fn issuer_left(&self) -> bool {
        match (&self.issued_roots, &self.mounted_roots) {
            (Some(issued), Some(mounted)) => !issued.is_subset_of(mounted),
            _ => false,
        }
    }

    fn bundle(&self, name: &str) -> Result<TrustBundle, SecretError> {
        let found = if name == SECRET_ROOT {
            self.mesh_roots()
        } else {
            self.bundles.get(name).cloned()
        };
        found.ok_or_else(|| SecretError::Missing(name.to_string()))
    }

    fn pair(&self, name: &str) -> Result<&TlsIdentity, SecretError> {
        let found = if name == SECRET_DEFAULT {
            self.identity.as_ref()
        } else {
            self.pairs.get(name)
        };
        found.ok_or_else(|| SecretError::Missing(name.to_string()))
    }

    /// Names of what is held, with the identity, for `/certs` and `/config_dump`.
    pub fn entries(&self) -> Vec<(String, TlsIdentity)> {
        let own = self.identity.iter().map(|i| (SECRET_DEFAULT.to_string(), i.clone()));
        own.chain(self.pairs.iter().map(|(n, i)| (n.clone(), i.clone())))
            .collect()
    }

    /// The accepting side of a TLS context.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn server(&self, context: &model::ServerTls) -> Result<ServerTls, SecretError> {
        let mut identity = self.pair(&context.certificate)?.clone();
        if !context.ciphers.is_empty() {
            identity = identity.with_tls12_suites(&context.ciphers);
        }
        let client_auth = match &context.trust_bundle {
            None if context.require_client_certificate => {
                return Err(SecretError::Unsupported(
                    "client certificates are required, but no trust bundle is named".into(),
                ));
            }
            None => ClientAuth::None,
            Some(name) => {
                identity = identity.with_bundle(self.bundle(name)?);
                if name != SECRET_ROOT && context.require_client_certificate {
                    // An operator's clients need not be workloads; a list of names is checked after the handshake.
                    ClientAuth::RequiredAnyName
                } else if context.require_client_certificate {
                    ClientAuth::Required(trust_domains(&context.client_sans))
                } else {
                    ClientAuth::Optional(trust_domains(&context.client_sans))
                }
            }
        };
        // Agreeing on `istio-peer-exchange` promises a metadata exchange in the stream, which this proxy does not do; without
        // it peers go on as with any other server. Filter chains match what the client offers, not what is agreed.
        let alpn: Vec<String> = context
            .alpn
            .iter()
            .filter(|p| *p != "istio-peer-exchange")
            .cloned()
            .collect();
        Ok(identity.server(&ServerTlsOptions {
            client_auth,
            alpn: protocols(&alpn),
            min_tls13: context.min_version == model::TlsVersion::V1_3,
        })?)
    }

    /// The connecting side of a TLS context with these protocols.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn client(
        &self,
        context: &model::ClientTls,
        alpn: &[String],
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<ClientConfig>, SecretError> {
        let bundle = match &context.trust_bundle {
            Some(name) => self.bundle(name)?,
            None if context.server_sans.is_empty() => TrustBundle::none(),
            None => {
                return Err(SecretError::Unsupported(
                    "names of a server whose certificate is not verified".into(),
                ));
            }
        };
        let identity = match &context.certificate {
            Some(name) => self.pair(name)?.with_bundle(bundle),
            None => TlsIdentity::anonymous(bundle, provider.clone()),
        };
        let mut names = Vec::with_capacity(context.server_sans.len());
        for san in &context.server_sans {
            match san {
                model::SanMatch::Exact(name) => names.push(name.clone()),
                model::SanMatch::Prefix(prefix) => {
                    return Err(SecretError::Unsupported(format!("server names by prefix ({prefix})")));
                }
            }
        }
        let expected = match context.trust_bundle.as_deref() {
            // `insecureSkipVerify`, said by the user in so many words.
            None => ExpectedServer::Anyone,
            Some(SECRET_ROOT) => ExpectedServer::from_names(names),
            Some(_) if names.is_empty() => ExpectedServer::ServerName,
            Some(_) => ExpectedServer::from_names(names),
        };
        Ok(identity.client(&ClientTlsOptions {
            expected,
            alpn: protocols(alpn),
            present_certificate: context.certificate.is_some(),
            min_tls13: context.min_version == model::TlsVersion::V1_3,
        })?)
    }
}

fn protocols(alpn: &[String]) -> Vec<Vec<u8>> {
    alpn.iter().map(|p| p.as_bytes().to_vec()).collect()
}

/// The verifier's rule for a list of SANs: whole trust domains are checked in the handshake; a finer list is checked
/// against the certificate right after it (`connection`), so the handshake admits any SPIFFE identity.
fn trust_domains(sans: &[model::SanMatch]) -> TrustDomainRule {
    let domains: Option<Vec<TrustDomain>> = sans
        .iter()
        .map(|san| match san {
            model::SanMatch::Prefix(prefix) => prefix
                .strip_prefix("spiffe://")
                .and_then(|rest| rest.strip_suffix('/'))
                .and_then(|td| TrustDomain::parse(td).ok()),
            model::SanMatch::Exact(_) => None,
        })
        .collect();
    match domains {
        Some(domains) if !domains.is_empty() => TrustDomainRule::one_of(domains),
        _ => TrustDomainRule::AnySpiffe,
    }
}

/// The store.
pub struct Secrets {
    current: ArcSwap<SecretSet>,
    /// Serialises writers; readers never take it.
    writing: Mutex<()>,
    /// Woken by every swap.
    changed: tokio::sync::watch::Sender<u64>,
    /// The crypto provider of all TLS in the process.
    pub provider: Arc<CryptoProvider>,
}

impl Default for Secrets {
    fn default() -> Self {
        Secrets {
            current: ArcSwap::default(),
            writing: Mutex::new(()),
            changed: tokio::sync::watch::Sender::new(0),
            provider: mantlet_identity::tls::mesh_provider(),
        }
    }
}

impl Secrets {
    /// What is in force now.
    pub fn load(&self) -> arc_swap::Guard<Arc<SecretSet>> {
        self.current.load()
    }

    /// Announces swaps.
    pub fn subscribe(&self) -> tokio::sync::watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn update(&self, change: impl FnOnce(&mut SecretSet)) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = SecretSet::clone(&self.current.load());
        change(&mut next);
        if let (Some(identity), Some(roots)) = (&next.identity, next.mesh_roots()) {
            next.identity = Some(identity.with_bundle(roots));
        }
        next.generation += 1;
        let generation = next.generation;
        self.current.store(Arc::new(next));
        self.changed.send_replace(generation);
    }

    /// A new SVID with the roots that came with it.
    pub fn set_identity(&self, identity: TlsIdentity) {
        self.update(|set| {
            set.issued_roots = Some(identity.bundle().clone());
            set.identity = Some(identity);
        });
    }

    /// The mounted root file's content.
    pub fn set_mounted_roots(&self, roots: TrustBundle) {
        if self.load().mounted_roots.as_ref() != Some(&roots) {
            self.update(|set| set.mounted_roots = Some(roots));
        }
    }

    /// Roots of the operating system, under the name by which clusters refer to them.
    pub fn set_bundle(&self, name: &str, bundle: TrustBundle) {
        self.update(|set| {
            set.bundles.insert(name.to_string(), bundle);
        });
    }

    /// Secrets delivered by the control plane, or read from files. All or none are taken.
    ///
    /// # Errors
    /// The first secret that cannot be used.
    pub fn set_named(&self, secrets: &[Secret]) -> Result<(), SecretError> {
        let mut pairs = Vec::new();
        let mut bundles = Vec::new();
        for secret in secrets {
            match &secret.value {
                SecretValue::KeyPair { chain, key } => {
                    let roots = self
                        .load()
                        .mesh_roots()
                        .ok_or_else(|| SecretError::Missing(SECRET_ROOT.to_string()))?;
                    let pair = TlsIdentity::from_pem(chain, key.expose(), roots, self.provider.clone())?;
                    pairs.push((secret.name.clone(), pair));
                }
                SecretValue::TrustBundle(pem) => {
                    bundles.push((secret.name.clone(), TrustBundle::from_pem(&secret.name, pem)?));
                }
            }
        }
        self.update(|set| {
            set.pairs.extend(pairs);
            set.bundles.extend(bundles);
        });
        Ok(())
    }
}

/// One worker's TLS configurations, made on first use and thrown away when a secret changes.
#[derive(Default)]
pub struct TlsCache {
    generation: u64,
    servers: HashMap<model::ServerTls, ServerTls>,
    clients: HashMap<(model::ClientTls, Vec<String>), Arc<ClientConfig>>,
}

impl TlsCache {
    /// Drops what was made from secrets that are no longer in force.
    pub(crate) fn refresh(&mut self, set: &SecretSet) {
        if self.generation != set.generation {
            self.generation = set.generation;
            self.servers.clear();
            self.clients.clear();
        }
    }

    /// The accepting side of a context.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn server(&mut self, secrets: &Secrets, context: &model::ServerTls) -> Result<ServerTls, SecretError> {
        let set = secrets.load();
        self.refresh(&set);
        if let Some(found) = self.servers.get(context) {
            return Ok(found.clone());
        }
        let made = set.server(context)?;
        self.servers.insert(context.clone(), made.clone());
        Ok(made)
    }

    /// The connecting side of a context with these protocols.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn client(
        &mut self,
        secrets: &Secrets,
        context: &model::ClientTls,
        alpn: &[String],
    ) -> Result<Arc<ClientConfig>, SecretError> {
        let set = secrets.load();
        self.refresh(&set);
        let key = (context.clone(), alpn.to_vec());
        if let Some(found) = self.clients.get(&key) {
            return Ok(found.clone());
        }
        let made = set.client(context, alpn, &secrets.provider)?;
        self.clients.insert(key, made.clone());
        Ok(made)
    }
}
