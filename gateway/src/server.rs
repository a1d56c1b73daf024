//! A node with its doors: composes everything, serves, drains.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::Router;
use axum::routing::{get, post};
use patchbay_actors::account::OutboundConfig;
use patchbay_actors::clock::Clock;
use patchbay_actors::cluster::map::Member;
use patchbay_actors::cluster::mesh::Tcp;
use patchbay_actors::cluster::runtime::ClusterConfig;
use patchbay_actors::desk::Desk;
use patchbay_actors::intake::Intake;
use patchbay_actors::node::{Node, NodeConfig, StartError};
use patchbay_storage::redis::Redis;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::auth::Auth;
use crate::auth::keys::ApiAuth;
use crate::backup::{MEDIA, NodeBackups};
use crate::config::{Config, EventsEngine};
use crate::edge::client::{self, SocketLimits, Sockets};
use crate::edge::webhook::{self, Webhooks};
use crate::edge::{emulation, quic, unread, websocket};
use crate::engines::{self, Store};
use crate::health::{Ops, Phase};
use crate::hub::Hub;
use crate::limits::{self, Limits};
use crate::listener;
use crate::media::exchange::Exchange;
use crate::media::{Media, serve};
use crate::memory;
use crate::outgoing::{Guard, Outgoing};
use crate::revocation;
use crate::tls::Identity;

/// What a running node says of itself, in its data directory.
pub const NODE_FILE: &str = "node.json";

/// Looks at the node's own event files before it says that it is ready.
const OWN_FILES_LOOKS: u32 = 1_000;
const OWN_FILES_LOOK: Duration = Duration::from_millis(2);

/// Why a node cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration.
    #[error("{0}")]
    Config(String),
    /// The data directory.
    #[error("{0}")]
    Storage(#[from] patchbay_storage::embedded::OpenError),
    /// The store.
    #[error("storage: {0}")]
    Store(patchbay_storage::scylla::ConnectError),
    /// The actors.
    #[error("{0}")]
    Start(#[from] patchbay_actors::node::StartError),
    /// Events.
    #[error("events: {0}")]
    Events(String),
    /// A listener or file.
    #[error("{what}: {error}")]
    Io {
        /// Which.
        what: String,
        /// What happened.
        error: std::io::Error,
    },
    /// The HTTP client.
    #[error("http client: {0}")]
    Client(#[from] reqwest::Error),
}

/// What is different in `dev`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Everything on loopback.
    Dev,
    /// As configured.
    Run,
}

/// A node that serves.
pub struct Server {
    /// The entities.
    pub node: Arc<Node>,
    /// What agents do.
    pub desk: Arc<Desk>,
    /// Who they are.
    pub auth: Arc<Auth>,
    /// Where sockets meet.
    pub hub: Arc<Hub>,
    /// The public door's address.
    pub public: SocketAddr,
    /// The operators' door's address.
    pub ops: SocketAddr,
    /// Where other nodes connect.
    pub mesh: Option<SocketAddr>,
    /// Where QUIC clients are served; none: nowhere.
    pub quic: Option<SocketAddr>,
    phase: watch::Sender<Phase>,
    tasks: TaskTracker,
}

/// The addresses of a node that is ready (contract §1).
#[derive(Debug, Serialize)]
pub struct Ready {
    /// Clients, webhooks, admin API.
    pub public: String,
    /// Not in this version.
    pub quic: Option<String>,
    /// Metrics and health.
    pub ops: String,
    /// Where other nodes connect.
    pub mesh: Option<String>,
    /// The provider simulator (`dev` only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub simulator: Option<String>,
    /// The node's name.
    pub node: String,
    /// This start's number.
    pub incarnation: u32,
    /// The operator's key (`dev` only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator_key: Option<String>,
}

impl Ready {
    /// Writes it, readable by its owner only, whole or not at all.
    pub fn write(&self, file: &Path) -> std::io::Result<()> {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let fresh = file.with_extension("new");
        // One that a crash left behind may have other permissions.
        let _ = std::fs::remove_file(&fresh);
        let mut f = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
        f.write_all(&serde_json::to_vec(self)?)?;
        f.sync_all()?;
        std::fs::rename(&fresh, file)
    }
}

pub(crate) fn io(what: &str) -> impl FnOnce(std::io::Error) -> RunError + '_ {
    move |error| RunError::Io { what: what.to_owned(), error }
}

fn loopback(listen: &str) -> bool {
    listen.parse::<SocketAddr>().is_ok_and(|a| a.ip().is_loopback())
}

impl Server {
    /// Starts the entities on a store and binds the public door.
    pub async fn start(config: &Config, mode: Mode, store: Store, ops: Ops) -> Result<Self, RunError> {
        if mode == Mode::Dev && !(loopback(&config.public.listen) && loopback(&config.ops.listen)) {
            return Err(RunError::Config("dev listens on loopback only".into()));
        }
        let hub = Arc::new(Hub::default());
        if let (Some(engine), Some(min_free)) = (store.embedded(), config.storage.min_free) {
            engine.set_min_free(min_free.0);
        }
        let guard = Guard {
            allowed_hosts: config.providers.allowed_hosts.clone(),
            media_hosts: config.providers.media_hosts.clone(),
            loopback: mode == Mode::Dev,
        };
        let outgoing = Arc::new(Outgoing::new(guard.clone(), config.providers.timeout)?);
        let blobs = store.blobs(&config.storage.data_dir.join(MEDIA)).map_err(io("media"))?;
        let media = Media::new(
            blobs,
            outgoing.clone(),
            config.media.clone(),
            config.public.url.clone(),
            Clock::System,
            Box::new({
                let store = store.clone();
                move || store.refuses().is_none()
            }),
        );
        let provider = Arc::new(Exchange { outgoing, media: media.clone() });
        let (mut cluster, listener) = cluster(config).await?;
        cluster.apart = store.lease_apart(config, &ops.health).await?;
        let (listener, mesh) = listener.unzip();
        let node = Node::start(NodeConfig {
            cluster,
            mesh: listener.map(Tcp::at),
            media: media.clone(),
            events: Some(engines::events(config)?),
            shards: config.cluster.shards,
            outbound: OutboundConfig {
                queue_max: config.outbound.queue_max,
                max_age: config.outbound.max_age,
            },
            idle_after: config.limits.idle_after,
            memory: memory::gauge(config.limits.memory.map(|m| m.0)),
            ..NodeConfig::new(store.engine(), Clock::System, hub.clone(), provider)
        })
        .await
        .map_err(|error| match error {
            StartError::Stranger(why) => RunError::Config(format!("mesh.cert: {why}")),
            error => error.into(),
        })?;
        let redis = engines::redis(config)?;
        let shares_store = store.embedded().is_none();
        if let Some(redis) = &redis {
            hub.presences().share(redis.clone());
        }
        revocation::start(node.directory(), redis.clone(), shares_store);
        let directory = node.directory().clone();
        media.ready(directory.clone()).await.map_err(|_| StartError::Store)?;
        hub.set_node(&node);
        hub.set_names(Box::new(move |tenant, agent| directory.agent_name(tenant, agent)));
        let public_listener = TcpListener::bind(&config.public.listen).await.map_err(io("public.listen"))?;
        let public = public_listener.local_addr().map_err(io("public.listen"))?;
        let Ops { address, health, phase, tasks } = ops;
        let watching = phase.subscribe();
        let desk = Desk::new(node.clone());
        let auth =
            Arc::new(Auth::new(config.token_keys().map_err(RunError::Config)?, node.directory().clone()));
        let operator_key = config.operator_key().map_err(RunError::Config)?;
        let doors = Doors {
            config,
            mode,
            desk: &desk,
            auth: &auth,
            hub: &hub,
            guard,
            media,
            backups: Arc::new(NodeBackups { store: store.clone(), dir: config.storage.data_dir.clone() }),
            redis: redis.clone(),
            phase: watching.clone(),
            operator_key,
            tasks: tasks.clone(),
        };
        let sockets = doors.sockets();
        let quic = quic(config, mode, public)?;
        let quic_address = quic.as_ref().and_then(|(endpoint, _)| endpoint.local_addr().ok());
        if let Some((endpoint, identity)) = quic {
            tasks.spawn(quic::serve(endpoint, identity, sockets.clone(), watching.clone()));
        }
        let router = doors.public(sockets);
        let (identity, proxies) =
            (config.public.identity(), config.public.proxies().map_err(RunError::Config)?);
        let serves = listener::serve(public_listener, identity, proxies, router, watching, tasks.clone());
        tasks.spawn(serves.map_err(RunError::Config)?);
        health.count_queued(hub.queued().clone());
        health.needs("storage", move || store.refuses().map(str::to_owned));
        if let Some(outbox) = node.outbox().cloned() {
            let noted = outbox.clone();
            health.notes(move || {
                let unreplayed = "events wait for `patchbay events replay --from start`";
                noted.waits_for_replay().then(|| unreplayed.to_owned())
            });
            if config.events.engine == EventsEngine::Embedded {
                // Its files are here: nobody is told to wait for them.
                for _ in 0..OWN_FILES_LOOKS {
                    if outbox.trouble().is_none() {
                        break;
                    }
                    tokio::time::sleep(OWN_FILES_LOOK).await;
                }
            }
            health.likes("events", move || outbox.trouble());
        }
        if let Some(redis) = redis {
            let away = "limits and replies are the node's own, and revocations come from the store";
            health.likes("redis", move || redis.is_away().then(|| away.to_owned()));
        }
        tokio::spawn(follow_drain(Arc::downgrade(&node), phase.clone()));
        health.started();
        Ok(Self { node, desk, auth, hub, public, ops: address, mesh, quic: quic_address, phase, tasks })
    }

    /// Stops admitting, lets sockets and requests end, at most for `deadline`.
    pub async fn drain(self, deadline: Duration) {
        // Whoever still listens hears it.
        self.phase.send_replace(Phase::Ending);
        self.tasks.close();
        let finished = tokio::time::timeout(deadline, async {
            // Somebody who takes long over a request costs nobody the shards.
            let connected = tokio::time::timeout(deadline.mul_f64(CONNECTED_SHARE), self.tasks.wait());
            let (connected, ()) = tokio::join!(connected, self.node.hand_over());
            if connected.is_err() {
                tracing::warn!(left = self.tasks.len(), "somebody is still connected");
            }
            // Calls under way are answered, and entities write their snapshots: the next start has less to read.
            self.node.end().await;
        });
        if finished.await.is_err() {
            tracing::warn!("the drain's deadline has passed with work left");
        }
    }
}

/// A node's place in its cluster, and where others reach it.
async fn cluster(config: &Config) -> Result<(ClusterConfig, Option<(TcpListener, SocketAddr)>), RunError> {
    let listener = match &config.mesh.listen {
        Some(listen) => {
            let listener = TcpListener::bind(listen).await.map_err(io("mesh.listen"))?;
            let bound = listener.local_addr().map_err(io("mesh.listen"))?;
            Some((listener, bound))
        }
        None => None,
    };
    let mesh = listener
        .as_ref()
        .map(|(_, bound)| config.mesh.advertise.clone().unwrap_or_else(|| bound.to_string()));
    let name = mesh.clone().unwrap_or_else(|| "node".to_owned());
    let member = Member { name, mesh, capacity: config.cluster.capacity, draining: false };
    let cluster = ClusterConfig {
        name: config.cluster.name.clone(),
        tls: config.mesh.tls(),
        member,
        ttl: config.cluster.lease_ttl,
        moves_max: config.cluster.moves as usize,
        ..ClusterConfig::default()
    };
    Ok((cluster, listener))
}

/// Where QUIC clients are served, where there is a certificate to show them.
fn quic(
    config: &Config,
    mode: Mode,
    public: SocketAddr,
) -> Result<Option<(quinn::Endpoint, Identity)>, RunError> {
    let Some(identity) = config.quic.identity() else { return Ok(None) };
    // Looked at when the configuration was read.
    let listen = config.quic.listen.as_ref().and_then(|listen| listen.parse::<SocketAddr>().ok());
    let bound = match (quic::bind(&identity, listen.unwrap_or(public)), listen) {
        // Nobody has said where.
        (Err(_), None) if mode == Mode::Dev => quic::bind(&identity, SocketAddr::new(public.ip(), 0)),
        (bound, _) => bound,
    };
    Ok(Some((bound.map_err(io("quic.listen"))?, identity)))
}

struct Doors<'a> {
    config: &'a Config,
    mode: Mode,
    desk: &'a Arc<Desk>,
    auth: &'a Arc<Auth>,
    hub: &'a Arc<Hub>,
    guard: Guard,
    media: Arc<Media>,
    backups: Arc<NodeBackups>,
    redis: Option<Arc<Redis>>,
    phase: watch::Receiver<Phase>,
    operator_key: Option<String>,
    tasks: TaskTracker,
}

impl Doors<'_> {
    /// What every client's connection shares.
    fn sockets(&self) -> Arc<Sockets> {
        let origins = match self.mode {
            // Looked at by `local_host_only`.
            Mode::Dev => None,
            Mode::Run if self.config.public.allowed_origins.is_empty() => None,
            Mode::Run => Some(self.config.public.allowed_origins.clone()),
        };
        Arc::new(Sockets {
            rates: Limits::new(&self.config.limits, self.mode == Mode::Dev, self.redis.clone()),
            desk: self.desk.clone(),
            auth: self.auth.clone(),
            hub: self.hub.clone(),
            limits: SocketLimits {
                connections_max: self.config.limits.connections,
                unconnected_max: self.config.limits.unconnected,
                ..SocketLimits::default()
            },
            node: format!("{}-{}", self.config.cluster.name, self.desk.node().incarnation()),
            phase: self.phase.clone(),
            tasks: self.tasks.clone(),
            unconnected: AtomicUsize::new(0),
            closing: AtomicUsize::new(0),
            visitors: client::visitors(),
            origins,
        })
    }

    fn public(&self, sockets: Arc<Sockets>) -> Router {
        let node = self.desk.node();
        let directory = node.directory().clone();
        let rates = sockets.rates.clone();
        let api_auth = Arc::new(ApiAuth::new(
            self.operator_key.as_deref(),
            directory.clone(),
            self.auth.clone(),
            node.shards().clock,
            rates.clone(),
        ));
        let destinations = Arc::new(self.guard.clone());
        let intake = Intake::new(node.clone());
        let api = patchbay_admin_api::Api::new(
            self.desk.clone(),
            intake.clone(),
            api_auth.clone(),
            api_auth,
            destinations,
            self.media.clone(),
            self.backups.clone(),
            self.hub.presences().clone(),
            self.redis.clone(),
        );
        let admin = patchbay_admin_api::router(api)
            .layer(axum::middleware::from_fn_with_state(rates.clone(), limits::layer));
        let webhooks = Webhooks::new(intake, directory, rates);
        let webhooks = Router::new()
            .route("/webhooks/{tenant}/{account}", get(webhook::challenge).post(webhook::receive))
            .with_state(webhooks);
        let emulated = Router::new()
            .route("/connection/http_stream", post(emulation::http_stream))
            .route("/connection/sse", get(emulation::sse))
            .route("/emulation", post(emulation::send))
            .layer(axum::middleware::from_fn_with_state(sockets.clone(), emulation::cors));
        let sockets = Router::new()
            .route("/connection/websocket", get(websocket::upgrade))
            .merge(emulated)
            .with_state(sockets);
        let files = Router::new().route("/m/{signed}", get(serve::get)).with_state(self.media.clone());
        let router = Router::new()
            .merge(webhooks)
            .merge(files)
            .merge(admin)
            .layer(axum::middleware::from_fn(unread::layer))
            .merge(sockets);
        match self.mode {
            Mode::Dev => router.layer(axum::middleware::from_fn(limits::local_host_only)),
            Mode::Run => router,
        }
    }
}

/// How much of a stop's deadline is left to whoever is connected; the rest is for what is under way without them.
const CONNECTED_SHARE: f64 = 0.8;
/// Between two looks whether a node is back in its cluster.
const REJOIN_LOOK: Duration = Duration::from_secs(1);

/// Sends sockets elsewhere while the map says that the node drains, whoever said so.
async fn follow_drain(node: Weak<Node>, phase: watch::Sender<Phase>) {
    loop {
        let Some(membership) = node.upgrade().and_then(|node| node.membership()) else { return };
        let (me, mut maps) = (membership.incarnation(), membership.maps());
        drop(membership);
        loop {
            let drains = maps.borrow_and_update().1.members.get(&me).is_some_and(|m| m.draining);
            phase.send_if_modified(|phase| {
                let next = if drains { Phase::Draining } else { Phase::Serving };
                // An end is not called off.
                *phase != Phase::Ending && std::mem::replace(phase, next) != next
            });
            if maps.changed().await.is_err() {
                break;
            }
        }
        // This incarnation has ended; another one may follow.
        tokio::time::sleep(REJOIN_LOOK).await;
    }
}
