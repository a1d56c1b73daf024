//! The deterministic simulation: whole clusters in one thread and virtual time, over stores, networks and clocks that
//! misbehave. Every choice comes from one seed, which stands in every failure; each seed has a process of its own, so that
//! nothing of another one is left in it.
//!
//! `./x sim` runs 2,000 seeds, as every test run does, `./x sim SEED` one of them with its story, `./x sim --hours N` as
//! many as that takes, `./x sim --seeds N` so many.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod cluster;
mod entropy;
mod membership;
mod network;
mod outside;
mod process;
mod random;
mod replicas;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cluster::Report;

/// A seed that takes longer has something in it that never waits.
const PATIENCE: Duration = Duration::from_secs(300);
/// Seeds of membership alone, which is quick.
const MEMBERSHIP_SEEDS: u64 = 60;
/// Seeds in which every deliberate fault of membership has to be found.
const BUG_SEEDS: u64 = 300;

fn text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
}

/// What panicked first, in whatever task: each is a fault, also where somebody catches it.
static PANICKED: Mutex<Option<String>> = Mutex::new(None);

fn note_panics(tells: bool) {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        world::lock(&PANICKED).get_or_insert_with(|| panic.to_string());
        if tells {
            usual(panic);
        }
    }));
}

/// One seed, in this process.
fn one(seed: u64, tells: bool) -> ExitCode {
    entropy::seed(seed);
    note_panics(tells);
    if !tells {
        std::thread::spawn(|| {
            std::thread::sleep(PATIENCE);
            println!("it does not end: time stands still");
            std::process::exit(1);
        });
    }
    // Keys of hash maps are drawn once for each thread.
    let ran = std::thread::spawn(move || cluster::run(seed, tells)).join();
    let ran = ran.unwrap_or_else(|panic| Err(text(&*panic)));
    let panicked = world::lock(&PANICKED).take();
    match panicked.map_or(ran, |why| Err(format!("something panicked: {}", why.replace('\n', " ")))) {
        Ok((report, print)) => {
            println!("{} {print}", report.line());
            if tells {
                println!("{report}");
            }
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// One seed, in a process of its own: its report, or why it failed.
fn apart(seed: u64) -> Result<String, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let child = Command::new(program).args([&seed.to_string(), "--quiet"]).stderr(Stdio::null()).output();
    let output = child.map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.status.success() {
        Ok(said)
    } else {
        Err(if said.is_empty() { "it was ended".into() } else { said })
    }
}

/// Seeds from `first` on, while `goes_on`; how many, and what they came to.
fn many(first: u64, goes_on: impl Fn(u64) -> bool + Sync) -> Result<(u64, Report), (u64, String)> {
    let (next, stop) = (AtomicU64::new(first), AtomicBool::new(false));
    let total = Mutex::new(Report::default());
    let failed: Mutex<Option<(u64, String)>> = Mutex::new(None);
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if !goes_on(seed) {
                        next.fetch_sub(1, Ordering::Relaxed);
                        return;
                    }
                    match apart(seed) {
                        Ok(line) => world::lock(&total).add(&line),
                        Err(why) => {
                            stop.store(true, Ordering::Relaxed);
                            // The lowest counts: whoever has a lower one finishes it.
                            let mut failed = world::lock(&failed);
                            if failed.as_ref().is_none_or(|(first, _)| seed < *first) {
                                *failed = Some((seed, why));
                            }
                        }
                    }
                }
            });
        }
    });
    let seeds = next.into_inner() - first;
    let failed = failed.into_inner().ok().flatten();
    failed.map_or_else(|| Ok((seeds, total.into_inner().unwrap_or_default())), Err)
}

fn member(seed: u64, bug: Option<membership::Bug>) -> Result<membership::Report, String> {
    catch_unwind(AssertUnwindSafe(|| membership::run(seed, false, bug))).map_err(|panic| text(&*panic))
}

/// Membership alone, and every deliberate fault of it.
fn membership() -> Result<(), String> {
    let (began, mut total) = (Instant::now(), membership::Report::default());
    for seed in 0..MEMBERSHIP_SEEDS {
        total.add(&member(seed, None).map_err(|why| format!("seed {seed} of membership: {why}"))?);
    }
    println!("membership: {MEMBERSHIP_SEEDS} seeds in {:.1} s: {total}", began.elapsed().as_secs_f64());
    for bug in membership::Bug::ALL {
        match (0..BUG_SEEDS).find(|seed| member(*seed, Some(bug)).is_err()) {
            Some(seed) => println!("{bug:?}: found in seed {seed}"),
            None => return Err(format!("{bug:?} was not found in {BUG_SEEDS} seeds")),
        }
    }
    Ok(())
}

/// Runs what the arguments ask for, `seeds` when they name none.
pub fn run(seeds: u64) -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| args.iter().any(|a| a == name);
    let number = |text: Option<&String>| text.and_then(|t| t.parse::<u64>().ok());
    let after = |name: &str| number(args.iter().position(|a| a == name).and_then(|at| args.get(at + 1)));
    if let Some(seed) = number(args.first()) {
        return one(seed, !has("--quiet"));
    }
    let began = Instant::now();
    let first = after("--from").unwrap_or(0);
    let (seeds, hours) = (after("--seeds").unwrap_or(seeds), after("--hours"));
    let ran = match hours.map(|hours| Duration::from_secs(hours * 3600)) {
        Some(until) => many(first, |_| began.elapsed() < until),
        None => many(first, |seed| seed < first + seeds),
    };
    match ran {
        Ok((seeds, report)) => println!("{seeds} seeds in {:.1} s: {report}", began.elapsed().as_secs_f64()),
        Err((seed, why)) => {
            eprintln!("seed {seed}: {why}\nits story: ./x sim {seed}");
            return ExitCode::FAILURE;
        }
    }
    if has("--alone") {
        return ExitCode::SUCCESS;
    }
    // The same seed tells the same story.
    if apart(first) != apart(first) {
        eprintln!("seed {first} tells two stories");
        return ExitCode::FAILURE;
    }
    std::panic::set_hook(Box::new(|_| {}));
    if let Err(why) = membership() {
        eprintln!("{why}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
