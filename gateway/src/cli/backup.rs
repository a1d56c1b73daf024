//! `patchbay backup` and `patchbay restore`: everything of a node in one file, and a data directory of it.

use std::fs::File;
use std::io::{BufReader, IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use patchbay_storage::embedded::backup::{self as stored, RestoreError};
use patchbay_storage::embedded::{Embedded, OpenError, is_store};
use serde_json::{Value, json};

use super::{ConfigArgs, Failure, operator, runtime};
use crate::backup::{MEDIA, SECRETS};
use crate::config::Config;
use crate::server::NODE_FILE;

/// A backup of a node, running or stopped.
#[derive(Args)]
pub(crate) struct Backup {
    #[command(flatten)]
    config: ConfigArgs,
    /// The file to be written; it must not be there.
    #[arg(long)]
    to: PathBuf,
    /// The node's public address, when its data directory is not here: `http://127.0.0.1:8000`.
    #[arg(long)]
    url: Option<String>,
    /// The operator's key, when neither the configuration nor the data directory tells.
    #[arg(long)]
    key: Option<String>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// A data directory of a backup.
#[derive(Args)]
pub(crate) struct Restore {
    #[command(flatten)]
    config: ConfigArgs,
    /// The backup.
    #[arg(long)]
    from: PathBuf,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// What a running node has left in its data directory about itself.
pub(super) fn running(dir: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(dir.join(NODE_FILE)).ok()?).ok()
}

impl Backup {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let config = self.config.load().map_err(Failure::Config)?;
        let dir = &config.storage.data_dir;
        // Whole or not at all: what broke off is no backup.
        let part = self.to.with_extension("part");
        if self.to.exists() {
            return Err(Failure::Other(format!("{} is there already", self.to.display())));
        }
        if self.url.is_none() && !is_store(dir) {
            return Err(Failure::Other(format!("{}: no node has kept anything there", dir.display())));
        }
        let _ = std::fs::remove_file(&part);
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
        let made = match &self.url {
            Some(url) => self.ask_node(url, &config, file),
            None => match Embedded::open(dir) {
                Ok(engine) => {
                    engine.dump(dir, &SECRETS, MEDIA, &file).map(|c| c.bytes).map_err(Failure::from)
                }
                Err(OpenError::InUse) => {
                    let node = running(dir).ok_or_else(|| {
                        Failure::Other("the node that runs there does not say where: give --url".into())
                    })?;
                    self.ask_node(&format!("http://{}", node["public"].as_str().unwrap_or("")), &config, file)
                }
                Err(e) => Err(e.into()),
            },
        };
        match made {
            Ok(bytes) => {
                File::open(&part)?.sync_all()?;
                std::fs::rename(&part, &self.to)?;
                if self.json {
                    println!("{}", json!({"backup": self.to, "bytes": bytes}));
                }
                Ok(())
            }
            Err(e) => {
                let _ = std::fs::remove_file(&part);
                Err(e)
            }
        }
    }

    fn ask_node(&self, url: &str, config: &Config, mut file: File) -> Result<u64, Failure> {
        let key = operator::key(self.key.as_ref(), config)?;
        let progress = std::io::stderr().is_terminal();
        runtime()?.block_on(async {
            let request = reqwest::Client::builder().no_proxy().build()?;
            let url = format!("{}/api/v1/cluster/backup", url.trim_end_matches('/'));
            let mut answer = request.get(url).bearer_auth(key.trim()).send().await?;
            if !answer.status().is_success() {
                return Err(Failure::Other(format!("the node answered {}", answer.status())));
            }
            let mut bytes = 0;
            while let Some(part) = answer.chunk().await? {
                bytes += part.len() as u64;
                file.write_all(&part)?;
                if progress {
                    eprint!("\r{} MiB", bytes >> 20);
                }
            }
            if progress {
                eprintln!();
            }
            Ok(bytes)
        })
    }
}

impl Restore {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let config = self.config.load().map_err(Failure::Config)?;
        let dir = &config.storage.data_dir;
        // Whoever resumes is told that this is another log, which may lack what it has seen: before it is in its place.
        let renew = |made: &Path| {
            let engine = Arc::new(Embedded::open(made)?);
            let renewed = runtime()?.block_on(patchbay_actors::node::new_identity(engine));
            renewed.map_err(|e| RestoreError::Io(std::io::Error::other(e.to_string())))
        };
        let contents = stored::restore(dir, BufReader::new(File::open(&self.from)?), renew)?;
        if self.json {
            println!("{}", json!({"data_dir": dir, "rows": contents.rows, "files": contents.files}));
        }
        Ok(())
    }
}
