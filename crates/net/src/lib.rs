//! Linux plumbing: traffic capture, original destinations, socket options, namespaces, capabilities, seccomp, Landlock.
//!
//! Called by the proxy (capture, sockets), by every server of this project at its start (sandbox) and by the node's sandbox and shim (processes, namespaces). It knows nothing of
//! Kubernetes, Istio policy or TLS. It is **the only crate that may contain `unsafe`**: what the safe wrappers of rustix
//! and nix offer is used from there, and what they lack is wrapped here in functions that cannot be misused.

pub mod caps;
pub mod capture;
pub mod fdpass;
pub mod memory;
pub mod mount;
pub mod process;
pub mod sandbox;
pub mod seccomp;
pub mod sockopt;
pub mod userns;
