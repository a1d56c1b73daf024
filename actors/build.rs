//! Compiles what nodes say to each other, with no compiler of the system's.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (root, file) = ("../protocol/proto", "mesh.proto");
    println!("cargo::rerun-if-changed={root}/{file}");
    let definitions = protox::compile([file], [root])?;
    tonic_prost_build::configure().bytes(".").compile_fds(definitions)?;
    Ok(())
}
