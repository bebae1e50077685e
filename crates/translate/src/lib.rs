//! From user objects to what one proxy must do.
//!
//! Pure functions: a [`world::World`] of objects and a [`node::ProxyNode`] in, a [`mantlet_model::ProxySnapshot`] out. `control`
//! calls it for every proxy that a change can affect; the command line calls it to explain. It knows Istio's and
//! Kubernetes' objects and the model, and neither sockets nor clocks nor Envoy's protobufs.
//!
//! Where to read: [`world`] (what is known), [`translator`] (one proxy's snapshot), [`sidecar`] and [`gateway`] (its parts),
//! [`peer_authentication`], [`request_authentication`] and [`authz`] (security), [`destination_rule`], [`virtual_service`], [`cluster`],
//! [`endpoint`], [`route`] (traffic), [`legacy`] (former kinds), [`inject`] (a pod's sidecar).

pub mod analyze;
pub mod authz;
pub mod cluster;
pub mod destination_rule;
pub mod endpoint;
pub mod gateway;
pub mod inject;
pub mod journey;
pub mod legacy;
pub mod mesh;
pub mod node;
pub mod peer_authentication;
pub mod protocol;
pub mod report;
pub mod request_authentication;
pub mod route;
pub mod sidecar;
pub mod tls;
pub mod translator;
pub mod virtual_service;
pub mod world;

pub use translator::{Translator, translate};
