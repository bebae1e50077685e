//! Compiles our few .proto files without protoc. Envoy's own messages come ready-made from `envoy-types`, whose
//! well-known types are shared so that one `Any` and one `Struct` go through the whole crate.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const FILES: [&str; 6] = [
        "istio_ca.proto",
        "mantlet/destinations.proto",
        "istio/alpn.proto",
        "istio/stats.proto",
        "istio/typed_struct.proto",
        "istio/xds_typed_struct.proto",
    ];
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, [PathBuf::from("proto")])?;
    let mut prost = tonic_prost_build::Config::new();
    prost.enable_type_names();
    prost.type_name_domain(["."], "type.googleapis.com");
    prost.compile_well_known_types();
    prost.extern_path(".google.protobuf", "::envoy_types::pb::google::protobuf");
    tonic_prost_build::configure().compile_fds_with_config(descriptors, prost)?;
    Ok(())
}
