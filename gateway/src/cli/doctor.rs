//! `patchbay doctor`: what stands in a node's way, one line for each thing that was looked at.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use patchbay_storage::embedded::{Embedded, OpenError, is_store};
use patchbay_storage::scylla::examine::{self, Standing};
use patchbay_storage::tables::Tables;
use serde::Serialize;
use serde_json::json;

use super::backup::running;
use super::{ConfigArgs, Failure, runtime};
use crate::config::{Config, ConfigError, StorageEngine};

/// Free space under which a disk is called short.
const FREE_SHORT: u64 = 1 << 30;
/// File descriptors that a node needs beside its sockets.
const DESCRIPTORS_BESIDE: u64 = 512;

/// Looks at the configuration, the machine, and the data directory or the store.
#[derive(Args)]
pub(crate) struct Doctor {
    #[command(flatten)]
    config: ConfigArgs,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl From<Standing> for Verdict {
    fn from(standing: Standing) -> Self {
        match standing {
            Standing::Good => Self::Ok,
            Standing::Doubtful => Self::Warn,
            Standing::Bad => Self::Fail,
        }
    }
}

/// What was looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    detail: String,
}

fn check(name: &'static str, verdict: Verdict, detail: impl Into<String>) -> Check {
    Check { name, verdict, detail: detail.into() }
}

impl Doctor {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (checks, faults) = match self.config.load() {
            Ok(config) => (examine(&config)?, Vec::new()),
            Err(e) => {
                let failed = |fault: &String| check("configuration", Verdict::Fail, fault);
                (e.0.iter().map(failed).collect(), e.0)
            }
        };
        let failed = checks.iter().any(|c| c.verdict == Verdict::Fail);
        if self.json {
            println!("{}", json!({"checks": checks, "ok": !failed}));
        } else {
            for c in &checks {
                let mark = match c.verdict {
                    Verdict::Ok => "ok  ",
                    Verdict::Warn => "warn",
                    Verdict::Fail => "FAIL",
                };
                println!("{mark}  {:<18} {}", c.name, c.detail);
            }
        }
        match (failed, faults.is_empty()) {
            (_, false) => Err(Failure::Config(ConfigError(faults))),
            (true, true) => Err(Failure::Other("something stands in the way".into())),
            (false, true) => Ok(()),
        }
    }
}

fn examine(config: &Config) -> Result<Vec<Check>, Failure> {
    let dir = &config.storage.data_dir;
    let mut checks =
        vec![check("configuration", Verdict::Ok, "every key is known and fits"), secrets(config)];
    checks.extend(disk(dir));
    checks.push(descriptors(config));
    if config.storage.engine == StorageEngine::Scylla {
        let wanted = config.storage.scylla.connection().map_err(Failure::Other)?;
        let found = runtime()?.block_on(examine::examine(&wanted));
        checks.extend(found.into_iter().map(|f| check(f.name, f.standing.into(), f.detail)));
        return Ok(checks);
    }
    if !is_store(dir) {
        // A first start makes it; looking does not.
        let foreign = std::fs::read_dir(dir).is_ok_and(|mut there| there.next().is_some());
        if foreign {
            let detail = format!("{}: not empty, and no data directory", dir.display());
            checks.push(check("data directory", Verdict::Fail, detail));
            return Ok(checks);
        }
        checks.push(check("data directory", Verdict::Ok, format!("{}: not there yet", dir.display())));
        return Ok(checks);
    }
    runtime()?.block_on(async {
        match Embedded::open(dir) {
            Ok(engine) => {
                checks.push(check(
                    "data directory",
                    Verdict::Ok,
                    format!("{}: opens, no node runs on it", dir.display()),
                ));
                checks.push(parked(&Tables::new(std::sync::Arc::new(engine)), config.cluster.shards).await);
            }
            Err(OpenError::InUse) => {
                checks.push(check(
                    "data directory",
                    Verdict::Ok,
                    format!("{}: a node runs on it", dir.display()),
                ));
                checks.push(health(dir).await);
            }
            Err(e) => checks.push(check("data directory", Verdict::Fail, format!("{}: {e}", dir.display()))),
        }
    });
    Ok(checks)
}

fn secrets(config: &Config) -> Check {
    let lacking: Vec<&str> = [
        ("auth.operator_key", config.auth.operator_key.is_none()),
        (
            "auth.hmac_secret_key or auth.keys",
            config.auth.hmac_secret_key.is_none() && config.auth.keys.is_empty(),
        ),
    ]
    .into_iter()
    .filter_map(|(name, lacks)| lacks.then_some(name))
    .collect();
    match lacking.as_slice() {
        [] => check("secrets", Verdict::Ok, "set"),
        lacking => {
            let detail = format!(
                "{} not set: `dev` makes its own, `run` refuses whoever needs one",
                lacking.join(", ")
            );
            check("secrets", Verdict::Warn, detail)
        }
    }
}

fn disk(dir: &Path) -> Option<Check> {
    let there = dir.ancestors().find(|d| d.exists()).unwrap_or(Path::new("."));
    let found =
        rustix::fs::statvfs(if there.as_os_str().is_empty() { Path::new(".") } else { there }).ok()?;
    let free = found.f_bavail * found.f_frsize;
    let verdict = if free < FREE_SHORT { Verdict::Warn } else { Verdict::Ok };
    Some(check("disk", verdict, format!("{} MiB free", free >> 20)))
}

fn descriptors(config: &Config) -> Check {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let wanted = config.limits.connections as u64 + DESCRIPTORS_BESIDE;
    if limit >= wanted {
        check("descriptors", Verdict::Ok, format!("{limit} may be open"))
    } else {
        let detail = format!(
            "{limit} may be open, limits.connections wants {wanted}: raise `ulimit -n` or lower the limit"
        );
        check("descriptors", Verdict::Warn, detail)
    }
}

async fn parked(tables: &Tables, shards: u32) -> Check {
    let mut names = Vec::new();
    for shard in 0..shards {
        match tables.marks(shard).await {
            Ok(found) => {
                names.extend(
                    found.parked.into_iter().map(|(entity, why)| format!("{}: {why}", entity.kind())),
                );
                let outbox = |(id, seq)| format!("outbox of {id}: not published from seq {seq} on");
                names.extend(found.parked_outboxes.into_iter().map(outbox));
            }
            Err(e) => return check("parked", Verdict::Fail, format!("shard {shard} cannot be read: {e}")),
        }
    }
    match names.as_slice() {
        [] => check("parked", Verdict::Ok, "nothing"),
        names => check("parked", Verdict::Fail, format!("{} parked: {}", names.len(), names.join("; "))),
    }
}

async fn health(dir: &Path) -> Check {
    let Some(node) = running(dir) else {
        return check("node", Verdict::Warn, "it does not say where it listens");
    };
    let url = format!("http://{}/readyz", node["ops"].as_str().unwrap_or(""));
    let asked = async {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
        let answer = client.get(&url).send().await?;
        let status = answer.status();
        Ok::<_, reqwest::Error>((status, answer.text().await?))
    };
    match asked.await {
        Ok((status, text)) if status.is_success() => check("node", Verdict::Ok, text),
        Ok((status, text)) => check("node", Verdict::Fail, format!("{status}: {text}")),
        Err(e) => check("node", Verdict::Fail, e.to_string()),
    }
}
