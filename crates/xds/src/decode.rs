//! Envoy protobufs → model. Strict: what has no place in the model is an error that names it, so that it becomes the
//! text of a NACK; nothing is dropped silently.

use mantlet_model::route::VirtualHost;
use mantlet_model::{Cluster, Destinations, Endpoints, Listener, RouteTable, Secret};

use crate::wire::unpack;
use crate::{Any, convert};

/// Why a resource was refused. The text names the place and what was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct DecodeError {
    /// Where: message and field names from the resource inwards.
    pub path: String,
    /// What is wrong.
    pub problem: String,
}

type Result<T> = std::result::Result<T, DecodeError>;

/// A listener.
pub fn listener(any: &Any) -> Result<Listener> {
    convert::listener::decode(unpack(any)?)
}

/// A route table.
pub fn route_table(any: &Any) -> Result<RouteTable> {
    convert::route::decode(unpack(any)?)
}

/// A virtual host as a resource of its own.
pub fn virtual_host(any: &Any) -> Result<VirtualHost> {
    convert::route::decode_host(unpack(any)?)
}

/// A list of what is served.
pub fn destinations(any: &Any) -> Result<Destinations> {
    convert::destinations::decode(unpack(any)?)
}

/// A cluster.
pub fn cluster(any: &Any) -> Result<Cluster> {
    convert::cluster::decode(unpack(any)?)
}

/// Endpoints.
pub fn endpoints(any: &Any) -> Result<Endpoints> {
    convert::endpoint::decode(unpack(any)?)
}

/// A secret.
pub fn secret(any: &Any) -> Result<Secret> {
    convert::secret::decode(unpack(any)?)
}
