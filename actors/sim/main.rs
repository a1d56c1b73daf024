//! The deterministic simulation: whole clusters in one thread and virtual time, over a store and clocks that misbehave.
//! Every choice comes from one seed, which stands in every failure.
//!
//! `cargo test -p patchbay-actors --test sim` runs [`SEEDS`] seeds, `… --test sim -- SEED` one of them with its story,
//! `… --test sim -- --hours N` as many as that takes.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod membership;
mod random;

use membership::Bug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Seeds in which every deliberate fault has to be found.
const BUG_SEEDS: u64 = 300;
/// Seeds of an ordinary run.
const SEEDS: u64 = 100;

fn run(seed: u64, tells: bool, bug: Option<Bug>) -> Result<membership::Report, String> {
    catch_unwind(AssertUnwindSafe(|| membership::run(seed, tells, bug))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
    })
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |text: Option<&String>| text.and_then(|t| t.parse::<u64>().ok());
    let hours = args.iter().position(|a| a == "--hours").and_then(|at| number(args.get(at + 1)));
    if let (None, Some(seed)) = (hours, number(args.first())) {
        println!("{:?}", run(seed, true, None));
        return;
    }
    let (began, mut seeds, mut total) = (Instant::now(), 0, membership::Report::default());
    let until = hours.map(|hours| Duration::from_secs(hours * 3600));
    // One seed fails with its own text; the panic's own would only repeat it.
    std::panic::set_hook(Box::new(|_| {}));
    while until.map_or(seeds < SEEDS, |until| began.elapsed() < until) {
        match run(seeds, false, None) {
            Ok(report) => total.add(&report),
            Err(why) => {
                eprintln!("seed {seeds}: {why}\nits story: ./x sim {seeds}");
                std::process::exit(1);
            }
        }
        seeds += 1;
    }
    println!("{seeds} seeds in {:.1} s: {total}", began.elapsed().as_secs_f64());
    for bug in Bug::ALL {
        match (0..BUG_SEEDS).find(|seed| run(*seed, false, Some(bug)).is_err()) {
            Some(seed) => println!("{bug:?}: found in seed {seed}"),
            None => {
                eprintln!("{bug:?} was not found in {BUG_SEEDS} seeds");
                std::process::exit(1);
            }
        }
    }
}
