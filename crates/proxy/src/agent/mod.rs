//! The agent inside the proxy: fetches the workload's certificate, subscribes to configuration, and puts both in force.
//!
//! Called by `main`. It runs on its own thread's runtime, never on a worker's.

pub mod certs;
pub mod control_plane;
pub mod dns;
pub mod files;
pub mod xds;
