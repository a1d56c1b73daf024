//! `patchbay simulate`: the provider simulator alone.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use patchbay_loadtest::simulator::{Number, Scenario, Simulator};
use serde_json::json;

use super::run::Stop;
use super::{Failure, runtime};

/// The provider simulator alone.
#[derive(Args)]
pub(crate) struct Simulate {
    /// Where it listens.
    #[arg(long, default_value = "127.0.0.1:8100")]
    listen: SocketAddr,
    /// A number and where its webhooks go: `<phone number id>=<url>`. May be given several times.
    #[arg(long = "number", value_parser = parse_number)]
    numbers: Vec<(String, String)>,
    /// What signs the webhooks.
    #[arg(long, default_value = "")]
    app_secret: String,
    /// Seed of its faults.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A JSON file of faults, in parts of a thousand (`{"lost_answers": 10}`).
    #[arg(long, conflicts_with = "scenario")]
    faults: Option<PathBuf>,
    /// A JSON file of a provider's day: faults, limits, tiers, outages, quality, by time (docs: simulator).
    #[arg(long)]
    scenario: Option<PathBuf>,
    /// Written once it listens: its address, as JSON.
    #[arg(long)]
    ready_file: Option<PathBuf>,
}

fn parse_number(text: &str) -> Result<(String, String), String> {
    let (id, url) = text.split_once('=').ok_or("must be <phone number id>=<url>")?;
    Ok((id.to_owned(), url.to_owned()))
}

impl Simulate {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let scenario: Scenario = match (&self.scenario, &self.faults) {
            (Some(file), _) => serde_json::from_str(&std::fs::read_to_string(file)?)?,
            (None, Some(file)) => {
                let faults = serde_json::from_str(&std::fs::read_to_string(file)?)?;
                Scenario { faults, ..Scenario::default() }
            }
            (None, None) => Scenario::default(),
        };
        if !self.listen.ip().is_loopback() {
            return Err(Failure::Other("the simulator listens on loopback only".into()));
        }
        runtime()?.block_on(async {
            let mut stop = Stop::new()?;
            let simulator = Simulator::start(self.listen, self.seed, scenario.faults).await?;
            for (id, webhook_url) in self.numbers {
                simulator.add_number(&id, Number { webhook_url, app_secret: self.app_secret.clone() });
            }
            simulator.play(scenario);
            println!("simulating on http://{}; what it received: http://{0}/sim/record", simulator.address());
            if let Some(file) = self.ready_file {
                std::fs::write(file, json!({"simulator": simulator.address().to_string()}).to_string())?;
            }
            stop.first().await;
            Ok(())
        })
    }
}
