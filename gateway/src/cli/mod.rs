//! The command line. Quiet on success, honest on failure: bad configuration exits 64 with a line per fault.

mod backup;
mod chat;
mod cluster;
mod config;
mod consume;
mod demo;
mod dev;
mod dev_cert;
mod doctor;
mod events;
mod operator;
mod run;
mod simulate;
mod token;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use toml::Value;
use tracing_subscriber::EnvFilter;

use crate::config::{Config, ConfigError, load};
use crate::server::RunError;

/// Bad configuration (sysexits' EX_USAGE).
const EXIT_CONFIG: u8 = 64;

/// A real-time messaging gateway: conversations between businesses and their customers.
#[derive(Parser)]
#[command(name = "patchbay", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One node on this machine with everything in it: embedded storage, a provider simulator, a demo tenant.
    ///
    /// Example: patchbay dev --data-dir ./patchbay-data
    Dev(dev::Dev),
    /// A node as configured.
    ///
    /// Example: patchbay run --config patchbay.toml
    Run(run::Run),
    /// The provider simulator alone.
    ///
    /// Example: patchbay simulate --listen 127.0.0.1:8100 --number 100=http://127.0.0.1:8000/webhooks/demo/wa --app-secret s
    Simulate(simulate::Simulate),
    /// Issues a token of an agent, signed with the node's own secret.
    ///
    /// Example: patchbay token --data-dir ./patchbay-data --tenant demo --agent anna
    Token(token::Token),
    /// Checks, shows or documents the configuration.
    ///
    /// Example: patchbay config check --config patchbay.toml
    Config(config::ConfigCommand),
    /// What stands in a node's way: configuration, machine, data directory.
    ///
    /// Example: patchbay doctor --config patchbay.toml
    Doctor(doctor::Doctor),
    /// Everything of a node, running or stopped, in one file.
    ///
    /// Example: patchbay backup --data-dir ./patchbay-data --to patchbay.backup
    Backup(backup::Backup),
    /// A data directory of a backup. Clients that resume are told that it is another log.
    ///
    /// Example: patchbay restore --from patchbay.backup --data-dir ./restored
    Restore(backup::Restore),
    /// Shards: who holds them, why, and what is to move.
    ///
    /// Example: patchbay shards why 17 --url http://127.0.0.1:8000
    Shards(cluster::ShardsCommand),
    /// Gives the shards of one node to the others; it goes on serving its sockets.
    ///
    /// Example: patchbay drain --url http://127.0.0.1:8000
    Drain(cluster::Drain),
    /// Makes certificates for a mesh on machines of one's own.
    ///
    /// Example: patchbay dev-cert --dir certs --name 127.0.0.1
    DevCert(dev_cert::DevCert),
    /// Shows events as they come, or publishes what the store holds again.
    ///
    /// Example: patchbay events tail --from-start
    Events(events::EventsCommand),
    /// Runs a consumer of events.
    ///
    /// Example: patchbay consume print --group audit
    Consume(consume::ConsumeCommand),
    /// A terminal client for an agent.
    ///
    /// Example: patchbay chat --token "$TOKEN" --conversation 117hm6cewq8ptd8sg97y11y4xd
    Chat(chat::Chat),
}

/// Where the configuration comes from.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ConfigArgs {
    /// A TOML file.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Where the embedded engine keeps its files.
    #[arg(long)]
    data_dir: Option<PathBuf>,
}

impl ConfigArgs {
    /// File, environment, flags.
    pub(crate) fn load(&self) -> Result<Config, ConfigError> {
        let flags: Vec<(&str, Value)> = match &self.data_dir {
            Some(dir) => vec![("storage.data_dir", Value::String(dir.display().to_string()))],
            None => vec![],
        };
        // What is not text is none of ours.
        let ours =
            std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        load(self.config.as_deref(), ours, &flags)
    }
}

/// Why a command failed.
pub(crate) enum Failure {
    /// Bad configuration: a line per fault.
    Config(ConfigError),
    /// Anything else.
    Other(String),
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(e: E) -> Self {
        Self::Other(e.to_string())
    }
}

impl Failure {
    /// Why a node could not start: what the configuration says, or anything else.
    fn of_start(e: RunError) -> Self {
        match e {
            RunError::Config(fault) => Self::Config(ConfigError(vec![fault])),
            e => e.into(),
        }
    }
}

/// Runs the command line.
pub fn main() -> ExitCode {
    // Who comes first wins; a second provider would be the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let outcome = match Cli::parse().command {
        Command::Dev(c) => c.run(),
        Command::Run(c) => c.run(),
        Command::Simulate(c) => c.run(),
        Command::Token(c) => c.run(),
        Command::Config(c) => c.run(),
        Command::Chat(c) => c.run(),
        Command::Doctor(c) => c.run(),
        Command::Backup(c) => c.run(),
        Command::Restore(c) => c.run(),
        Command::Shards(c) => c.run(),
        Command::Drain(c) => c.run(),
        Command::DevCert(c) => c.run(),
        Command::Events(c) => c.run(),
        Command::Consume(c) => c.run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Config(ConfigError(faults))) => {
            for fault in faults {
                eprintln!("{fault}");
            }
            ExitCode::from(EXIT_CONFIG)
        }
        Err(Failure::Other(error)) => {
            eprintln!("patchbay: {error}");
            ExitCode::FAILURE
        }
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

/// Logs on stderr: a JSON line each, text on a terminal.
fn start_logs(log: &crate::config::Log) {
    // Drivers say more of themselves than of what is wrong.
    let quiet = format!("scylla=error,librdkafka=error,rdkafka=error,fred=error,{}", log.level);
    let filter = EnvFilter::try_new(quiet).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let text = match log.format.as_str() {
        "json" => false,
        "text" => true,
        _ => std::io::stderr().is_terminal(),
    };
    // A panic may quote what it was given: the log says where, and not what.
    std::panic::set_hook(Box::new(|panic| {
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(at, "a panic was caught");
    }));
    // A test may have started logs already.
    let _ = if text { builder.try_init() } else { builder.json().flatten_event(true).try_init() };
}
