//! The objects users write: Istio's kinds, the mesh configuration, and what is needed of Kubernetes' own types.
//!
//! Pure: values in, values out, no clock, no socket, no async. `translate` reads these types to make the model, `control`
//! validates admissions with them, `apiserver` and `cli` take the CustomResourceDefinitions from [`crd`], and the CLI prints
//! the [`diagnostic`]s. It must not know how anything is watched, stored or sent.
//!
//! Reading has two strengths (see [`object`]): stored objects are read leniently (unknown fields are ignored, as the API
//! server would have pruned them), but content that does not decode is an error the caller has to fail closed on; files a
//! user hands over can be read strictly, so that a misspelt field is reported with the nearest known name.

pub mod authorization_policy;
pub mod crd;
pub mod destination_rule;
pub mod diagnostic;
pub mod duration;
pub mod envoy_filter;
pub mod gateway;
pub mod kind;
pub mod legacy;
pub mod mesh_config;
pub mod names;
pub mod object;
pub mod peer_authentication;
pub mod proxy_config;
pub mod repair;
pub mod request_authentication;
pub mod selector;
pub mod service_entry;
pub mod sidecar;
pub mod spans;
pub mod strict;
pub mod telemetry;
pub mod validate;
pub mod values;
pub mod virtual_service;
pub mod wasm_plugin;
pub mod workload_entry;
pub mod workload_group;
pub mod yaml;

pub use authorization_policy::AuthorizationPolicy;
pub use destination_rule::DestinationRule;
pub use duration::Duration;
pub use envoy_filter::EnvoyFilter;
pub use gateway::Gateway;
pub use mesh_config::MeshConfig;
pub use object::{Object, ReadError, Spec};
pub use peer_authentication::PeerAuthentication;
pub use proxy_config::ProxyConfigResource;
pub use request_authentication::RequestAuthentication;
pub use selector::{PolicyTargetReference, WorkloadSelector};
pub use service_entry::ServiceEntry;
pub use sidecar::Sidecar;
pub use telemetry::Telemetry;
pub use values::Values;
pub use virtual_service::VirtualService;
pub use wasm_plugin::WasmPlugin;
pub use workload_entry::WorkloadEntry;
pub use workload_group::WorkloadGroup;

/// The version of this build, used as image tag and in what the CLI prints.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The Istio release whose API and proxy contract this build speaks; goes into the `ISTIO_VERSION` of node metadata.
pub const ISTIO_VERSION: &str = "1.28.0";
