//! The binary `patchbay`.

use std::process::ExitCode;

fn main() -> ExitCode {
    patchbay_gateway::cli::main()
}
