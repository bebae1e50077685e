//! Mantlet's data plane: sidecar and gateway proxy, and the agent that feeds it, in one process.
//!
//! The way of a request: [`worker`] accepts → [`connection`] (original destination, [`sniff`], filter chain, TLS) →
//! [`http`] (the ordered request function) or [`tcp`] → [`upstream`] → [`telemetry`]. What they obey is a compiled
//! [`config`], swapped in whole by `agent`, which also keeps [`secrets`] fresh.
//!
//! It knows mesh terms (`model`) only; Kubernetes objects never come here.

pub mod agent;
pub mod cli;
pub mod config;
pub mod connection;
pub mod ext_authz;
pub mod http;
pub mod on_demand;
pub mod path;
pub mod process;
pub mod sandbox;
pub mod secrets;
pub mod settings;
pub mod sniff;
pub mod status;
pub mod stream;
pub mod tcp;
pub mod telemetry;
pub mod unknown_keys;
pub mod upstream;
pub mod worker;
