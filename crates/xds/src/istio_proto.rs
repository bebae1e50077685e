//! Generated messages of Istio's own filters, which `envoy-types` lacks. Full names and field numbers are Istio's.

#![allow(missing_docs, unreachable_pub, clippy::all)]

/// `istio.alpn`.
pub mod alpn {
    tonic::include_proto!("istio.envoy.config.filter.http.alpn.v2alpha1");
}
/// `istio.stats`.
pub mod stats {
    tonic::include_proto!("stats");
}
/// `udpa.type.v1.TypedStruct`.
pub mod udpa {
    tonic::include_proto!("udpa.r#type.v1");
}
/// `xds.type.v3.TypedStruct`.
pub mod xds {
    tonic::include_proto!("xds.r#type.v3");
}
