//! The binary `patchbay`.

use std::process::ExitCode;

/// A node makes and drops small things on every core.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    patchbay_gateway::cli::main()
}
