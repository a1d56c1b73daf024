//! `patchbay-load`: drives agents and customers against a node, and says what was lost, doubled, out of order or late.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use patchbay_loadtest::load::report::Quantiles;
use patchbay_loadtest::load::setup::client;
use patchbay_loadtest::load::{Plan, Target, floor, run};
use patchbay_protocol::client::Encoding;

/// Drives agents and customers against a node.
///
/// Example: patchbay-load --ready-file ready.json --customer-rate 500 --agent-rate 200 --seconds 30
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The ready file of a `patchbay dev`.
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// The node's public address, without a ready file.
    #[arg(long, default_value = "127.0.0.1:8000")]
    public: String,
    /// The operator's key, without a ready file.
    #[arg(long, env = "PATCHBAY_OPERATOR_KEY", hide_env_values = true, default_value = "")]
    operator_key: String,
    /// The node's process, so that its processor time is told apart.
    #[arg(long)]
    pid: Option<u32>,
    /// Conversations of each kind.
    #[arg(long, default_value_t = 64)]
    conversations: usize,
    /// Agents' sockets.
    #[arg(long, default_value_t = 4)]
    agents: usize,
    /// What agents speak: `json`, `protobuf`, or `mixed`.
    #[arg(long, default_value = "mixed", value_parser = ["json", "protobuf", "mixed"])]
    encoding: String,
    /// Customers' messages a second, open loop.
    #[arg(long, default_value_t = 200.0)]
    customer_rate: f64,
    /// Agents' messages a second, open loop.
    #[arg(long, default_value_t = 100.0)]
    agent_rate: f64,
    /// Closed loop instead: so many sends of each conversation always in flight.
    #[arg(long, default_value_t = 0)]
    in_flight: usize,
    /// For how long.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Without the table.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match go(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(e) => {
            eprintln!("patchbay-load: {e}");
            ExitCode::FAILURE
        }
    }
}

fn go(args: &Args) -> Result<bool, Box<dyn std::error::Error>> {
    let mut target = match &args.ready_file {
        Some(file) => Target::of_ready_file(file)?,
        None => Target {
            public: args.public.clone(),
            operator_key: args.operator_key.clone(),
            pid: None,
            http: client()?,
        },
    };
    target.pid = args.pid;
    let encodings = match args.encoding.as_str() {
        "json" => vec![Encoding::Json],
        "protobuf" => vec![Encoding::Protobuf],
        _ => vec![Encoding::Json, Encoding::Protobuf],
    };
    let plan = Plan {
        conversations: args.conversations.max(1),
        agents: args.agents.max(1),
        encodings,
        customer_rate: args.customer_rate,
        agent_rate: args.agent_rate,
        in_flight: args.in_flight,
        time: Duration::from_secs_f64(args.seconds.max(0.1)),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let bar =
            if std::io::stderr().is_terminal() { ProgressBar::new(1000) } else { ProgressBar::hidden() };
        bar.set_style(ProgressStyle::with_template("{bar:40} {percent:>3}% {msg}")?);
        let mut report = run(&target, &plan, |part, counts| {
            bar.set_position((part * 1000.0) as u64);
            bar.set_message(format!("{} acked", counts.acked.load(Ordering::Relaxed)));
        })
        .await?;
        bar.finish_and_clear();
        // The bare echo at the same rate; a closed loop has none of its own, so it is what was reached, within reason.
        let rates = [plan.customer_rate, plan.agent_rate, report.acked_per_second.clamp(1.0, 1000.0)];
        let rate = rates.into_iter().find(|rate| *rate > 0.0).unwrap_or(1.0);
        let floor = floor::measure(rate, plan.time.min(Duration::from_secs(5)), |_| async {}).await?;
        report.floor = Some(Quantiles::of(&floor));
        if !args.json {
            println!("{report}");
        }
        println!("{}", serde_json::to_string(&report)?);
        if report.is_clean() {
            Ok(true)
        } else {
            eprintln!("patchbay-load: not every entry was seen once and in order, or something failed");
            Ok(false)
        }
    })
}
