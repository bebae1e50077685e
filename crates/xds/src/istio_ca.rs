//! Istio's certificate signing service (SEMANTICS 4b): client for the proxy, server for the control plane.

#![allow(missing_docs, unreachable_pub, clippy::all)]

tonic::include_proto!("istio.v1.auth");
