//! Envoy protobufs → model. Strict: what has no place in the model is an error that names it, so that it becomes the
//! text of a NACK; nothing is dropped silently.

use mantlet_model::{Cluster, Endpoints, Listener, RouteTable, Secret};

use crate::wire::{fault, unpack};
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

/// A listener; refused if it inlines key sets.
pub fn listener(any: &Any) -> Result<Listener> {
    match listener_and_keys(any)? {
        (listener, keys) if keys.is_empty() => Ok(listener),
        _ => fault("local_jwks", "inlined key sets are not expected here"),
    }
}

/// A listener, and the key sets that it inlines as secrets named `jwks/inline-<hash>`.
pub fn listener_and_keys(any: &Any) -> Result<(Listener, Vec<Secret>)> {
    let mut keys = Vec::new();
    let listener = convert::listener::decode(unpack(any)?, &mut keys)?;
    Ok((listener, keys))
}

/// A route table.
pub fn route_table(any: &Any) -> Result<RouteTable> {
    convert::route::decode(unpack(any)?)
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
