//! The control plane: Kubernetes objects in, xDS, certificates and admission answers out.
//!
//! `mantletd` runs [`server::start`]; tests run it in process. The ways: [`discovery`] (watch → translate → push), [`ca`] and
//! [`auth`] (who is who), [`webhook`] (admission), [`jwks`] (keys of
//! token issuers), [`debug`] (what is going on). It keeps no state but the objects.

pub mod auth;
pub mod ca;
pub mod debug;
pub mod discovery;
pub mod jwks;
pub mod options;
pub mod server;
pub mod webhook;
