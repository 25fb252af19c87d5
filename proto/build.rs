//! Compiles `proto/tunefleet.proto` into gRPC clients and servers, without an installed `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/tunefleet.proto");
    let descriptors = protox::compile(["tunefleet.proto"], ["proto"])?;
    // What the coordinator keeps on disk as a part of its own records.
    let kept = "#[derive(serde::Serialize, serde::Deserialize)]";
    tonic_prost_build::configure()
        .type_attribute("tunefleet.v1.Failure", kept)
        .field_attribute("tunefleet.v1.Failure.kind", "#[serde(default)]")
        .type_attribute("tunefleet.v1.Stage", kept)
        .type_attribute("tunefleet.v1.Continuation", kept)
        .compile_fds(descriptors)?;
    Ok(())
}
