//! Compiles `proto/tunefleet.proto` into gRPC clients and servers, without an installed `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/tunefleet.proto");
    let descriptors = protox::compile(["tunefleet.proto"], ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
