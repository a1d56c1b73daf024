//! `patchbay run`: a node as configured.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{ConfigArgs, Failure, runtime, start_logs};
use crate::config::Config;
use crate::engines::Store;
use crate::health::Ops;
use crate::server::{Mode, NODE_FILE, Ready, Server};

/// A node as configured.
#[derive(Args)]
pub(crate) struct Run {
    #[command(flatten)]
    config: ConfigArgs,
    /// Written once the node is ready: its addresses, as JSON.
    #[arg(long)]
    ready_file: Option<PathBuf>,
}

impl Run {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let config = self.config.load().map_err(Failure::Config)?;
        start_logs(&config.log);
        runtime()?.block_on(async {
            let mut stop = Stop::new()?;
            let metrics = crate::metrics_table::install()?;
            let starts = async {
                let ops = Ops::start(&config, Mode::Run, metrics).await?;
                tracing::info!(ops = %ops.address, "starting");
                let store = Store::open(&config, &ops.health).await?;
                Server::start(&config, Mode::Run, store, ops).await
            };
            let server = tokio::select! {
                started = starts => started.map_err(Failure::of_start)?,
                () = stop.first() => return Ok(()),
            };
            let ready = ready(&server, &config);
            tracing::info!(public = %server.public, ops = %server.ops, incarnation = ready.incarnation, "ready");
            announce(&ready, &config, self.ready_file.as_deref())?;
            stop.first().await;
            stop.drain(server, config.drain.deadline).await;
            withdraw(&config);
            Ok(())
        })
    }
}

/// Tells whoever waits, and whoever finds the data directory.
pub(super) fn announce(ready: &Ready, config: &Config, file: Option<&Path>) -> std::io::Result<()> {
    ready.write(&config.storage.data_dir.join(NODE_FILE))?;
    file.map_or(Ok(()), |file| ready.write(file))
}

/// The node has stopped.
pub(super) fn withdraw(config: &Config) {
    // One that a crash leaves behind is of a directory that nobody holds.
    let _ = std::fs::remove_file(config.storage.data_dir.join(NODE_FILE));
}

/// What a ready node tells.
pub(super) fn ready(server: &Server, config: &Config) -> Ready {
    Ready {
        public: server.public.to_string(),
        quic: server.quic.map(|quic| quic.to_string()),
        ops: server.ops.to_string(),
        mesh: server.mesh.map(|mesh| mesh.to_string()),
        simulator: None,
        node: format!("{}-{}", config.cluster.name, server.node.incarnation()),
        incarnation: server.node.incarnation(),
        operator_key: None,
    }
}

/// SIGTERM and SIGINT: the first drains, the second stops now.
pub(super) struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub(super) async fn first(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    pub(super) async fn drain(&mut self, server: Server, deadline: Duration) {
        tracing::info!("draining");
        tokio::select! {
            () = server.drain(deadline) => {}
            () = self.first() => {}
        }
    }
}
