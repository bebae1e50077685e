//! The pod shim: pid 1 of each pod.
//!
//! The node agent starts one per pod through [`client`]; it is this binary re-executed (`mantlet shim …`), a single thread
//! without a runtime, so that it may fork and change namespaces. It makes the pod's network, IPC, UTS, PID and mount
//! namespaces, starts containers and commands in them on request, reaps, keeps logs and reports ends. When its socket
//! closes (the agent is gone), it exits, and the kernel ends the pod with its pid 1.
//!
//! ```text
//! agent ── socket pair (frames of JSON, descriptors by SCM_RIGHTS) ──► shim (pid 1) ─► containers, exec sessions
//! ```

pub mod client;
mod container;
mod logs;
pub mod proto;
mod server;

pub use server::shim_main;

/// The word after the program name that leads to [`shim_main`].
pub const SUBCOMMAND: &str = "shim";
