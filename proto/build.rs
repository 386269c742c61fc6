//! Compiles the .proto files with protox, so that no protoc is needed on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    use prost::Message as _;

    let files = protox::compile(["openlora/v1/openlora.proto", "openlora/v1/settlement.proto"], ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("openlora_descriptor.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(files)?;
    println!("cargo:rerun-if-changed=openlora");
    Ok(())
}
