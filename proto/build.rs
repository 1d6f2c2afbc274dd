//! Generates the kvtier.v1 code without `protoc`, and the descriptor set that gRPC reflection serves.

use std::path::PathBuf;

use prost::Message;

const FILES: [&str; 6] = [
    "kvtier/v1/types.proto",
    "kvtier/v1/engine.proto",
    "kvtier/v1/kvcache.proto",
    "kvtier/v1/programs.proto",
    "kvtier/v1/admin.proto",
    "kvtier/v1/peer.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=kvtier");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("kvtier.fds.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".kvtier.v1").generate_default_stubs(true).compile_fds(descriptors)?;
    Ok(())
}
