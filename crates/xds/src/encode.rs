//! Model → Envoy protobufs. Infallible: every value of the model has a form on the wire.

use mantlet_model::route::VirtualHost;
use mantlet_model::{Cluster, Destinations, Endpoints, Listener, RouteTable, Secret};

use crate::wire::pack;
use crate::{Any, convert};

/// Whose vocabulary is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// Istio's proxies and Mantlet's: filters `istio.alpn`, `istio.stats`, metadata of Istio.
    #[default]
    Istio,
    /// An Envoy without Istio's extensions: their filters are left out (no telemetry, no ALPN override), own
    /// certificates come by ADS as well. Not made for reading back.
    PlainEnvoy,
}

/// How resources are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Options {
    /// Vocabulary.
    pub dialect: Dialect,
    /// Whether the peer asks for virtual hosts by name: tables of ports are written without them.
    pub on_demand: bool,
}

impl Options {
    /// Options of a dialect.
    pub fn new(dialect: Dialect) -> Self {
        Options {
            dialect,
            on_demand: false,
        }
    }
}

/// A listener.
pub fn listener(model: &Listener, options: &Options) -> Any {
    pack(&convert::listener::encode(model, options))
}

/// A route table.
pub fn route_table(model: &RouteTable, _options: &Options) -> Any {
    pack(&convert::route::encode(model))
}

/// A virtual host as a resource of its own.
pub fn virtual_host(model: &VirtualHost) -> Any {
    pack(&convert::route::encode_host(model))
}

/// A list of what is served.
pub fn destinations(model: &Destinations) -> Any {
    pack(&convert::destinations::encode(model))
}

/// A cluster.
pub fn cluster(model: &Cluster, options: &Options) -> Any {
    pack(&convert::cluster::encode(model, options.dialect))
}

/// Endpoints.
pub fn endpoints(model: &Endpoints, _options: &Options) -> Any {
    pack(&convert::endpoint::encode(model))
}

/// A secret.
pub fn secret(model: &Secret) -> Any {
    pack(&convert::secret::encode(model))
}
