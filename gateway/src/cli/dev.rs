//! `patchbay dev`: one node with everything in it, on loopback.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use patchbay_actors::directory::{Account, Agent, Directory, Inbox, Settings, Tenant};
use patchbay_loadtest::simulator::{Faults, Number, Simulator};
use patchbay_protocol::principal::Role;
use patchbay_protocol::{AccountId, AgentId, CommandError, ErrorCode, InboxId, TenantId};
use serde_json::json;

use super::run::{Stop, announce, ready, withdraw};
use super::{ConfigArgs, Failure, demo, dev_cert, runtime, start_logs};
use crate::auth::keys;
use crate::config::{Config, Secret};
use crate::engines::Store;
use crate::health::Ops;
use crate::server::{Mode, Server};

/// The demo account's phone number id at the provider.
pub(super) const PHONE_NUMBER_ID: &str = "100000000000001";

/// One node on this machine with everything in it.
#[derive(Args)]
pub(crate) struct Dev {
    #[command(flatten)]
    config: ConfigArgs,
    /// Written once the node is ready: its addresses and the operator's key, as JSON.
    #[arg(long)]
    ready_file: Option<PathBuf>,
    /// Seed of the simulator's faults.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Without the demo conversation and what to try next.
    #[arg(long)]
    quiet: bool,
}

/// The demo tenant's names.
pub(super) struct Demo {
    pub(super) tenant: TenantId,
    pub(super) inbox: InboxId,
    pub(super) account: AccountId,
    pub(super) agent: AgentId,
    pub(super) key: String,
    pub(super) token: String,
}

impl Dev {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let mut config = self.config.load().map_err(Failure::Config)?;
        start_logs(&config.log);
        runtime()?.block_on(async move {
            let mut stop = Stop::new()?;
            let ops = Ops::start(&config, Mode::Dev, crate::metrics_table::install()?)
                .await
                .map_err(Failure::of_start)?;
            let store = Store::open(&config, &ops.health).await.map_err(Failure::of_start)?;
            let secrets = Secrets::of(&config.storage.data_dir)?;
            secrets.fill(&mut config);
            dev_cert::fill(&mut config)?;
            let server = Server::start(&config, Mode::Dev, store, ops).await.map_err(Failure::of_start)?;
            let loopback = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
            let simulator = Arc::new(Simulator::start(loopback, self.seed, Faults::default()).await?);
            let demo = seed(&server, &simulator, &secrets).await.map_err(|e| Failure::Other(e.message()))?;
            let mut told = ready(&server, &config);
            told.simulator = Some(simulator.address().to_string());
            told.operator_key = config.operator_key().map_err(Failure::Other)?;
            announce(&told, &config, self.ready_file.as_deref())?;
            if !self.quiet {
                demo::introduce(&server, &simulator, &demo);
                tokio::spawn(demo::play(server.public, simulator.clone(), demo));
            }
            stop.first().await;
            stop.drain(server, config.drain.deadline).await;
            withdraw(&config);
            Ok(())
        })
    }
}

/// The keys that `dev` makes and keeps, so that tokens outlive a restart.
pub(super) struct Secrets {
    operator_key: String,
    hmac: String,
    demo_key: String,
    app_secret: String,
}

impl Secrets {
    /// Reads them from the data directory, or makes them there.
    fn of(data_dir: &Path) -> std::io::Result<Self> {
        Ok(Self {
            operator_key: kept(data_dir, "operator_key")?,
            hmac: kept(data_dir, "hmac_secret")?,
            demo_key: kept(data_dir, "demo_key")?,
            app_secret: kept(data_dir, "demo_app_secret")?,
        })
    }

    /// The secret that tokens are signed with, where a node has made one.
    pub(super) fn hmac_of(data_dir: &Path) -> std::io::Result<String> {
        fs::read_to_string(data_dir.join("hmac_secret")).map(|secret| secret.trim().to_owned())
    }

    /// What is configured stands; the rest is ours.
    fn fill(&self, config: &mut Config) {
        config.auth.operator_key.get_or_insert_with(|| Secret::Text(self.operator_key.clone()));
        config.auth.hmac_secret_key.get_or_insert_with(|| Secret::Text(self.hmac.clone()));
    }
}

fn kept(data_dir: &Path, name: &str) -> std::io::Result<String> {
    let file = data_dir.join(name);
    match fs::read_to_string(&file) {
        Ok(secret) => return Ok(secret.trim().to_owned()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let secret = keys::fresh_secret();
    let fresh = data_dir.join(format!("{name}.new"));
    let mut f = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    f.write_all(secret.as_bytes())?;
    f.sync_all()?;
    // Whole or not at all.
    fs::rename(&fresh, &file)?;
    Ok(secret)
}

fn named<T: std::str::FromStr>(name: &str) -> Result<T, CommandError> {
    name.parse().map_err(|_| ErrorCode::Internal.into())
}

/// What an earlier start made stands when the disk is full.
fn unless_full<T: Default>(put: Result<T, CommandError>) -> Result<T, CommandError> {
    match put {
        Err(e) if e.code == ErrorCode::Overloaded => Ok(T::default()),
        put => put,
    }
}

async fn seed(server: &Server, simulator: &Simulator, secrets: &Secrets) -> Result<Demo, CommandError> {
    let directory: &Directory = server.node.directory();
    let now = server.node.shards().clock.now();
    let (tenant, inbox, account, agent) = (
        named::<TenantId>("demo")?,
        named::<InboxId>("main")?,
        named::<AccountId>("wa")?,
        named::<AgentId>("anna")?,
    );
    match directory.create_tenant(&tenant, &Tenant { name: "Demo".into(), created_at: now }).await {
        Ok(()) => {}
        Err(e) if matches!(e.code, ErrorCode::Conflict | ErrorCode::Overloaded) => {}
        Err(e) => return Err(e),
    }
    unless_full(keys::put(directory, &tenant, "dev", &secrets.demo_key, now).await)?;
    if directory.inbox(&tenant, &inbox).await?.is_none() {
        unless_full(directory.put_inbox(&tenant, &inbox, &Inbox { name: "Main".into() }).await)?;
    }
    if directory.agent(&tenant, &agent).await?.is_none() {
        let anna =
            Agent { name: "Anna".into(), role: Role::Admin, inboxes: vec![inbox.clone()], not_before: None };
        unless_full(directory.put_agent(&tenant, &agent, &anna).await)?;
    }
    let document = Account {
        connector: "whatsapp".into(),
        inbox: inbox.clone(),
        name: "Demo on WhatsApp".into(),
        external_id: PHONE_NUMBER_ID.into(),
        credentials: json!({"app_secret": secrets.app_secret, "verify_token": "demo", "access_token": "demo"}),
        settings: Settings {
            api_base: format!("http://{}", simulator.address()),
            api_version: "v23.0".into(),
            mark_read: true,
            typing: true,
        },
    };
    unless_full(directory.put_account(&tenant, &account, &document).await)?;
    let webhook_url = format!("http://{}/webhooks/{tenant}/{account}", server.public);
    simulator.add_number(PHONE_NUMBER_ID, Number { webhook_url, app_secret: secrets.app_secret.clone() });
    let token = super::token::agent_claims(&tenant, &agent, Role::Admin, 24 * 3600, now);
    let token = server.auth.keys().issue(&token).unwrap_or_default();
    Ok(Demo { tenant, inbox, account, agent, key: secrets.demo_key.clone(), token })
}
