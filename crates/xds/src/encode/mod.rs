//! Model → Envoy protobufs. Infallible: every value of the model has a form on the wire.

use std::collections::BTreeMap;

use mantlet_model::{Cluster, Endpoints, Listener, RouteTable, Secret};

use crate::Any;

/// Whose vocabulary is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// Istio's proxies and Mantlet's: filters `istio.alpn`, `istio.stats`, metadata of Istio.
    #[default]
    Istio,
    /// An Envoy without Istio's extensions: their filters are left out (no telemetry, no ALPN override), own
    /// certificates come by ADS as well, key sets must be inlined. Not made for reading back.
    PlainEnvoy,
}

/// How resources are written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Vocabulary.
    pub dialect: Dialect,
    /// Contents of key sets by secret name, inlined into listeners for peers other than Mantlet. Without them (or for
    /// absent names) a listener refers to the secret by name.
    pub jwks: Option<&'a BTreeMap<String, Vec<u8>>>,
}

impl Options<'_> {
    /// Options of a dialect, nothing inlined.
    pub fn new(dialect: Dialect) -> Self {
        Options { dialect, jwks: None }
    }
}

/// A listener.
pub fn listener(_listener: &Listener, _options: &Options<'_>) -> Any {
    Any::default()
}

/// A route table.
pub fn route_table(_table: &RouteTable, _options: &Options<'_>) -> Any {
    Any::default()
}

/// A cluster.
pub fn cluster(_cluster: &Cluster, _options: &Options<'_>) -> Any {
    Any::default()
}

/// Endpoints.
pub fn endpoints(_endpoints: &Endpoints, _options: &Options<'_>) -> Any {
    Any::default()
}

/// A secret.
pub fn secret(_secret: &Secret) -> Any {
    Any::default()
}
