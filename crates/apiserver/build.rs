//! Compiles the protobuf form of request bodies into a descriptor set that is read at run time.

use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/kubernetes.proto");
    let set = protox::compile(["kubernetes.proto"], ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("kubernetes.bin");
    std::fs::write(out, set.encode_to_vec())?;
    Ok(())
}
