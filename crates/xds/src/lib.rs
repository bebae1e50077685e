//! The wire between the planes: Mantlet's model as Envoy protobufs over xDS v3, and Istio's CSR service.
//!
//! - [`encode`] and [`decode`] translate single resources; `decode(encode(m)) == m`, authorization up to
//!   `model::authz::canonical`. What decode does not understand is refused by name, never dropped.
//! - [`resources`] keeps encoded resources with stable versions.
//! - [`server`] and [`client`] are the protocol's state machines without sockets or clocks.
//! - [`ads`] holds the thin tonic ends that control plane and proxy use.
//!
//! Called by `control` (encode, serve) and `proxy` (subscribe, decode). It knows no Kubernetes object and decides
//! nothing about traffic.

pub mod ads;
pub mod client;
mod convert;
pub mod decode;
pub mod encode;
mod frames;
pub mod istio_ca;
pub mod istio_proto;
mod mantlet_proto;
pub mod resources;
pub mod server;
mod wire;

pub use decode::DecodeError;
pub use encode::{Dialect, Options};
pub use envoy_types::pb::envoy::config::core::v3::Node;
pub use envoy_types::pb::google::protobuf::Any;
pub use resources::{Encoder, ResourceSet, ResourceType};

#[cfg(test)]
mod tests;
