//! See the library.

fn main() -> std::process::ExitCode {
    patchbay_sim::run(2_000)
}
