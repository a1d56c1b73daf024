//! `patchbay consume`: consumers of events, run by hand.

use std::path::PathBuf;
use std::pin::pin;

use async_trait::async_trait;
use clap::{Args, Subcommand};
use patchbay_consumers::consumer::Run;
use patchbay_consumers::{Consumer, Event, Failure as Undone, FileDeadLetters, Handler, Options};
use patchbay_storage::events::Start;
use tokio::sync::watch;

use super::run::Stop;
use super::{ConfigArgs, Failure, runtime, start_logs};
use crate::engines;

/// Consumers of events.
#[derive(Args)]
pub(crate) struct ConsumeCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Prints each event once, as a member of a group that keeps its place.
    ///
    /// Example: patchbay consume print --group audit
    Print(Print),
}

impl ConsumeCommand {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self.action {
            Action::Print(print) => print.run(),
        }
    }
}

#[derive(Args)]
struct Print {
    #[command(flatten)]
    config: ConfigArgs,
    /// The group: `[a-z0-9][a-z0-9_-]{0,62}`.
    #[arg(long)]
    group: String,
    /// Where events go that cannot be handled.
    #[arg(long, default_value = "dead-letters.ndjson")]
    dead_letters: PathBuf,
}

/// Prints the value, a line each.
struct Printer;

#[async_trait]
impl Handler for Printer {
    async fn handle(&mut self, event: &Event) -> Result<(), Undone> {
        use std::io::Write as _;
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", event.value).and_then(|()| out.flush()).map_err(|e| Undone::Again(e.to_string()))
    }

    async fn gap(&mut self, event: &Event, missing: u64) {
        eprintln!("{missing} events are missing before {}", event.id);
    }
}

impl Print {
    fn run(self) -> Result<(), Failure> {
        let config = self.config.load().map_err(Failure::Config)?;
        start_logs(&config.log);
        runtime()?.block_on(async {
            let mut stop = Stop::new()?;
            let source = engines::source(&config, &self.group, Start::Earliest).map_err(Failure::of_start)?;
            let dead = FileDeadLetters::open(&self.dead_letters)?;
            let (tell, told) = watch::channel(Run::On);
            let mut running = pin!(Consumer::new(source, Printer, dead, Options::new(&self.group)).run(told));
            tokio::select! {
                ended = running.as_mut() => return Ok(ended.map(drop)?),
                () = stop.first() => {}
            }
            tell.send_replace(Run::Stop);
            Ok(running.await.map(drop)?)
        })
    }
}
