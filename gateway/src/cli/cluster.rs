//! `patchbay shards`, `patchbay drain`: the cluster by way of one of its nodes.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::operator::OperatorArgs;
use super::{Failure, runtime};

/// Shards: who holds them, why, and what is to move.
#[derive(Args)]
pub(crate) struct ShardsCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Every shard with its holder and epoch.
    ///
    /// Example: patchbay shards list --url http://127.0.0.1:8000 --json
    List(Asks),
    /// What moves, and what is to move.
    Plan(Asks),
    /// Wants a shard at a node, or with `--to auto` wherever the plan wants it.
    ///
    /// Example: patchbay shards move 17 --to 10.0.0.2:7000
    Move {
        /// Which shard.
        shard: u32,
        /// A node's name, as `shards list` shows it; `auto`: as planned.
        #[arg(long)]
        to: String,
        #[command(flatten)]
        asks: Asks,
    },
    /// Why a shard is where it is.
    Why {
        /// Which shard.
        shard: u32,
        #[command(flatten)]
        asks: Asks,
    },
}

#[derive(Args)]
struct Asks {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Prints the answer as JSON.
    #[arg(long)]
    json: bool,
}

impl ShardsCommand {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self.action {
            Action::List(asks) => asks.show("cluster/shards", |found| {
                println!("{:>6}  {:>7}  {:>7}  node", "shard", "epoch", "holder");
                for shard in found["shards"].as_array().into_iter().flatten() {
                    let wish = shard["wish"].as_u64().map_or(String::new(), |wish| format!("  -> {wish}"));
                    let node = shard["node"].as_str().unwrap_or("gone");
                    println!(
                        "{:>6}  {:>7}  {:>7}  {node}{wish}",
                        shard["shard"].to_string(),
                        shard["epoch"].to_string(),
                        shard["holder"].to_string(),
                    );
                }
            }),
            Action::Plan(asks) => asks.show("cluster/plan", |found| {
                for (name, moves) in [("moving", &found["moving"]), ("planned", &found["planned"])] {
                    println!("{name}: {}", moves.as_array().map_or(0, Vec::len));
                    for one in moves.as_array().into_iter().flatten() {
                        println!("  shard {} from {} to {}", one["shard"], one["from"], one["to"]);
                    }
                }
            }),
            Action::Why { shard, asks } => asks.show(&format!("cluster/shards/{shard}"), |found| {
                let node = found["node"].as_str().unwrap_or("a node that is gone");
                println!(
                    "shard {shard}: held by {node} (incarnation {}) under epoch {}",
                    found["holder"], found["epoch"]
                );
                println!("{}", found["reason"].as_str().unwrap_or_default());
                println!("{} commands wait for it here", found["waiting"]);
                if let Some(serving) = found["serving"].as_object() {
                    println!(
                        "served here since {}, opened in {} ms",
                        serving["since"], serving["opened_in_ms"]
                    );
                }
            }),
            Action::Move { shard, to, asks } => {
                let to = Some(to).filter(|to| to != "auto");
                let path = format!("cluster/shards/{shard}/move");
                runtime()?.block_on(asks.operator.ask(Method::POST, &path, Some(json!({"to": to})))).map(drop)
            }
        }
    }
}

impl Asks {
    fn show(&self, path: &str, print: impl FnOnce(&Value)) -> Result<(), Failure> {
        let found = runtime()?.block_on(self.operator.ask(Method::GET, path, None))?;
        if self.json {
            println!("{found}")
        } else {
            print(&found)
        }
        Ok(())
    }
}

/// Gives the shards of one node to the others and asks its sockets to move there, in waves; whoever stays is served.
#[derive(Args)]
pub(crate) struct Drain {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Takes shards again.
    #[arg(long)]
    cancel: bool,
}

impl Drain {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let method = if self.cancel { Method::DELETE } else { Method::PUT };
        runtime()?.block_on(self.operator.ask(method, "cluster/drain", None)).map(drop)
    }
}
