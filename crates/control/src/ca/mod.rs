//! The certificate authority as a service: its material, who may ask, what is signed, and how the roots are made known.
//!
//! Called by `main` (start-up, listeners), the webhook part (own server certificate, CA bundle) and the xDS server (same
//! listener, same authenticators). Signing itself is pure and lives in `mantlet-identity`; this module brings clock,
//! randomness, Kubernetes and gRPC to it, and must not know configuration or xDS.
//!
//! Start-up in short:
//! ```text
//! let options = CaOptions::from_env(trust_domain, namespace, revision)?;
//! let secrets = Arc::new(KubeSecrets::new(client.clone(), &options.namespace));
//! let ca = Authority::start(options, secrets, Arc::new(SystemClock), &registry).await?; // loads or creates, then rotates
//! let serving = ServerCert::start(ca.clone(), clock)?;                                   // istiod's own certificate
//! let service = CaService::new(ca.clone(), authenticators, &registry).into_server();     // for 15012
//! tokio::spawn(root_configmap::run(client, ca.bundle_watch(), options));                 // istio-ca-root-cert
//! ```

mod authority;
pub(crate) mod duration;
mod material;
mod metrics;
mod options;
pub mod root_configmap;
mod secrets;
mod server_cert;
mod service;

pub use authority::{Authority, SignError};
pub use material::CaLoadError;
pub use options::{CaOptions, OptionError};
pub use secrets::{CaSecret, KubeSecrets, SecretError, SecretStore};
pub use server_cert::ServerCert;
pub use service::CaService;

#[cfg(test)]
mod tests;
