//! Everything a sidecar does: the inbound listener, and outbound listeners, routes, clusters and endpoints.

pub mod inbound;
pub mod outbound;
