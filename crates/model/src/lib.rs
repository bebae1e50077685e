//! The middle of Mantlet: what one proxy must do, as plain values in mesh terms.
//!
//! `translate` makes these values from user objects, `xds` writes and reads them as Envoy protobufs, `proxy` compiles
//! and runs them, and the command line explains them. The round trip `decode(encode(m)) == m` is a property test in
//! `xds`, so every field here has exactly one meaning on the wire.
//!
//! This crate knows neither Kubernetes objects nor protobufs, opens no socket, reads no clock and starts no task.

pub mod authz;
pub mod cluster;
pub mod destinations;
pub mod endpoint;
pub mod ext_authz;
pub mod http;
pub mod listener;
pub mod names;
pub mod query;
pub mod route;
pub mod secret;
pub mod shared;
pub mod snapshot;
pub mod tls;

pub use cluster::Cluster;
pub use destinations::Destinations;
pub use endpoint::Endpoints;
pub use listener::Listener;
pub use route::RouteTable;
pub use secret::Secret;
pub use shared::{Derived, SharedMap, SharedSnapshot};
pub use snapshot::ProxySnapshot;
