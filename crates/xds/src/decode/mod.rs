//! Envoy protobufs → model. Strict: what has no place in the model is an error that names it, so that it becomes the
//! text of a NACK; nothing is dropped silently.

use mantlet_model::{Cluster, Endpoints, Listener, RouteTable, Secret};

use crate::Any;

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

fn missing<T>() -> Result<T> {
    Err(DecodeError {
        path: "resource".into(),
        problem: "not understood".into(),
    })
}

/// A listener; refused if it inlines key sets.
pub fn listener(_any: &Any) -> Result<Listener> {
    missing()
}

/// A listener, and the key sets that it inlines as secrets named `jwks/inline-<hash>`.
pub fn listener_and_keys(_any: &Any) -> Result<(Listener, Vec<Secret>)> {
    missing()
}

/// A route table.
pub fn route_table(_any: &Any) -> Result<RouteTable> {
    missing()
}

/// A cluster.
pub fn cluster(_any: &Any) -> Result<Cluster> {
    missing()
}

/// Endpoints.
pub fn endpoints(_any: &Any) -> Result<Endpoints> {
    missing()
}

/// A secret.
pub fn secret(_any: &Any) -> Result<Secret> {
    missing()
}
