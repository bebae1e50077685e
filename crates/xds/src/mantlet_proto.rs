//! Generated messages of Mantlet's own resource types.

#![allow(missing_docs, unreachable_pub, clippy::all)]

tonic::include_proto!("mantlet.v1");
