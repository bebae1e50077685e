//! A Kubernetes API server over an embedded store, as a library.
//!
//! The embedded cluster (`mantlet cluster`) serves it over TLS; tests and in-process clients use it as a tower service:
//!
//! ```no_run
//! # async fn f(config: mantlet_apiserver::Config) -> Result<(), Box<dyn std::error::Error>> {
//! let server = mantlet_apiserver::ApiServer::open(config).await?;
//! let service = server.service(mantlet_apiserver::Identity::admin("controller")); // for kube::Client::new(service, "default")
//! # Ok(()) }
//! ```
//!
//! The way of a request: `serve` (TLS, client certificate) → `server` (authenticate, authorize, route) → `rest` (decode, default,
//! admit, validate, commit, print) → `store` (one revision for everything, durable before acknowledged). Objects are JSON documents
//! throughout; types are used only where logic needs them. Which kinds exist is data (`resources`, `crd`), not code.
//!
//! It knows nothing of Istio, of pods as processes, or of the network; webhooks are dialled through a trait, pod streams are
//! forwarded to the node agent's socket.

mod admission;
mod auth;
mod builtin;
mod cache;
mod config;
mod crd;
mod discovery;
mod error;
mod http;
mod jsonpath;
mod kinds;
mod kubelet;
mod meta;
mod names;
mod openapi;
mod patch;
mod protobuf;
mod registry;
mod request;
mod resources;
mod rest;
mod schema;
mod selector;
mod serve;
mod server;
pub mod store;
mod table;

pub use crate::admission::dial::{BoxIo, Dial, DialTarget, DirectDialer, Io};
pub use crate::auth::Identity;
pub use crate::config::{Cidr, Config};
pub use crate::error::ApiError;
pub use crate::http::{Body, BoxError};
pub use crate::serve::ServeError;
pub use crate::server::{Answer, ApiServer, InProcess, OpenError};

/// Version of the Kubernetes API that is reported. 1.32: from 1.33 on Istio's injector turns to native sidecars.
pub const GIT_VERSION: &str = "v1.32.0+mantlet";
