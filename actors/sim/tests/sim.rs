//! The first seeds of `./x sim`.

fn main() -> std::process::ExitCode {
    patchbay_sim::run(2_000)
}
