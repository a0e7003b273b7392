//! Generates code from the `.proto` files, with a compiler that is a library: no `protoc` needed.

use std::error::Error;
use std::path::Path;
use std::path::PathBuf;

use prost::Message;

const FILES: [&str; 6] =
    ["workload.proto", "authorization.proto", "citadel.proto", "xds.proto", "zds.proto", "profile.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    let folder = Path::new("protos");
    println!("cargo::rerun-if-changed=protos");
    let descriptors = protox::compile(FILES, [folder])?;
    let set = PathBuf::from(std::env::var("OUT_DIR")?).join("protos.bin");
    std::fs::write(&set, descriptors.encode_to_vec())?;
    let paths = FILES.map(|file| folder.join(file));
    tonic_prost_build::configure()
        .file_descriptor_set_path(&set)
        .skip_protoc_run()
        .build_client(true)
        .build_server(std::env::var_os("CARGO_FEATURE_SERVER").is_some())
        // Bytes are shared with the buffer they were received in, also those of resources.
        .bytes(".")
        .extern_path(".google.protobuf.Any", "crate::Any")
        .compile_protos(&paths, &[folder.to_owned()])?;
    Ok(())
}
