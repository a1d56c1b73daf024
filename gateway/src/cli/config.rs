//! `patchbay config {check,show,doc}`

use clap::{Args, Subcommand};

use super::{ConfigArgs, Failure};
use crate::config::Config;

/// Checks, shows or documents the configuration.
#[derive(Args)]
pub(crate) struct ConfigCommand {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Says nothing when the configuration is good; exits 64 with a line per fault when it is not.
    Check(ConfigArgs),
    /// Prints what is in force, without secrets.
    Show {
        #[command(flatten)]
        config: ConfigArgs,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Prints the page of every key.
    Doc,
}

/// Without secrets: what stands in the place of one says so.
fn shown(config: &Config) -> Result<toml::Table, Failure> {
    let mut table = toml::Table::try_from(config)?;
    hide(&mut table);
    Ok(table)
}

fn hide(table: &mut toml::Table) {
    const SECRETS: [&str; 6] =
        ["operator_key", "hmac_secret_key", "secret", "password", "api_key", "public_key"];
    for (key, value) in table.iter_mut() {
        match value {
            toml::Value::String(_) if SECRETS.contains(&key.as_str()) => *value = "(secret)".into(),
            toml::Value::Table(inner) => hide(inner),
            toml::Value::Array(list) => list.iter_mut().filter_map(toml::Value::as_table_mut).for_each(hide),
            _ => {}
        }
    }
}

impl ConfigCommand {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self.what {
            What::Check(config) => config.load().map(|_| ()).map_err(Failure::Config),
            What::Show { config, json } => {
                let table = shown(&config.load().map_err(Failure::Config)?)?;
                if json {
                    println!("{}", serde_json::to_string(&table)?);
                } else {
                    print!("{}", toml::to_string(&table)?);
                }
                Ok(())
            }
            What::Doc => {
                print!("{}", Config::documentation());
                Ok(())
            }
        }
    }
}
