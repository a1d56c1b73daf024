//! The engines that a configuration names, opened: what survives, and where events go. One that is not there yet is
//! waited for.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use patchbay_actors::cluster::runtime::Apart;
use patchbay_actors::node::{Events, StartError};
use patchbay_storage::Engine;
use patchbay_storage::blobs::{Blobs, DiskBlobs};
use patchbay_storage::embedded::{Embedded, lock_directory};
use patchbay_storage::events::embedded::{EmbeddedSink, EmbeddedSource};
use patchbay_storage::events::{Deliveries, Sink, Source, SourceError, Start};
use patchbay_storage::kafka::{KafkaSink, KafkaSource};
use patchbay_storage::redis::Redis;
use patchbay_storage::scylla::{Scylla, ScyllaConfig};
use patchbay_storage::shared_blobs::SharedBlobs;
use tokio::runtime::Handle;

use crate::config::{Config, EventsEngine, StorageEngine};
use crate::health::Health;
use crate::server::RunError;

/// Between two tries of a store that does not answer.
const CONNECT_PAUSE: Duration = Duration::from_millis(500);
const CONNECT_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Where events of a node's own are.
pub const EVENTS: &str = "events";

/// What survives.
#[derive(Clone)]
pub enum Store {
    /// In the data directory.
    Embedded(Arc<Embedded>),
    /// On ScyllaDB or Cassandra. The data directory holds files alone, and nobody else has it open.
    Scylla(Arc<Scylla>, Arc<patchbay_storage::embedded::Lock>),
}

impl From<Arc<Embedded>> for Store {
    fn from(engine: Arc<Embedded>) -> Self {
        Self::Embedded(engine)
    }
}

impl Store {
    /// Opens what the configuration names; waits for one that does not answer.
    pub async fn open(config: &Config, health: &Health) -> Result<Self, RunError> {
        match config.storage.engine {
            StorageEngine::Embedded => {
                Ok(Self::Embedded(Arc::new(Embedded::open(&config.storage.data_dir)?)))
            }
            StorageEngine::Scylla => {
                let lock = Arc::new(lock_directory(&config.storage.data_dir)?);
                let wanted = config.storage.scylla.connection().map_err(RunError::Config)?;
                Ok(Self::Scylla(Arc::new(connected(&wanted, health).await?), lock))
            }
        }
    }

    /// The engine.
    pub fn engine(&self) -> Arc<dyn Engine> {
        match self {
            Self::Embedded(engine) => engine.clone(),
            Self::Scylla(engine, _) => engine.clone(),
        }
    }

    /// Files: those of a node that is alone lie in `dir`, those of a cluster in its store, with copies in `dir`.
    pub fn blobs(&self, dir: &Path) -> std::io::Result<Arc<dyn Blobs>> {
        let disk = DiskBlobs::open(dir)?;
        Ok(match self {
            Self::Embedded(_) => Arc::new(disk),
            Self::Scylla(engine, _) => Arc::new(SharedBlobs::start(disk, engine.clone())?),
        })
    }

    /// Where the node's lease is kept: a thread and a way to the store of its own, so that nothing else that the node does
    /// can cost it the lease. None: nobody else can take it.
    pub async fn lease_apart(
        &self,
        config: &Config,
        health: &Arc<Health>,
    ) -> Result<Option<Apart>, RunError> {
        let Self::Scylla(..) = self else { return Ok(None) };
        let wanted = config.storage.scylla.connection().map_err(RunError::Config)?;
        let runtime =
            lease_thread().map_err(|error| RunError::Io { what: "the lease's thread".into(), error })?;
        let health = health.clone();
        let engine = runtime.spawn(async move { connected(&wanted, &health).await });
        let engine = engine.await.map_err(|_| StartError::Store)??;
        Ok(Some(Apart { engine: Arc::new(engine), runtime }))
    }

    /// Why nothing can be written, if so.
    pub fn refuses(&self) -> Option<&'static str> {
        match self {
            Self::Embedded(engine) => engine.refuses(),
            Self::Scylla(engine, _) => engine.refuses(),
        }
    }

    /// The data directory's own store, if that is where things are.
    pub fn embedded(&self) -> Option<&Arc<Embedded>> {
        match self {
            Self::Embedded(engine) => Some(engine),
            Self::Scylla(..) => None,
        }
    }
}

/// Waits for a store that does not answer.
async fn connected(wanted: &ScyllaConfig, health: &Health) -> Result<Scylla, RunError> {
    let mut pause = CONNECT_PAUSE;
    loop {
        match Scylla::connect(wanted).await {
            Ok(engine) => return Ok(engine),
            Err(e) if e.is_passing() => health.waits("storage", &e.to_string()),
            Err(e) => return Err(RunError::Store(e)),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(CONNECT_PAUSE_MAX);
    }
}

/// A thread that runs what is given to it for as long as the process lives.
fn lease_thread() -> std::io::Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    let runs = move || runtime.block_on(std::future::pending::<()>());
    std::thread::Builder::new().name("lease".into()).spawn(runs)?;
    Ok(handle)
}

/// What nodes share for a while, if the configuration names a server for it.
pub fn redis(config: &Config) -> Result<Option<Arc<Redis>>, RunError> {
    let Some(url) = config.redis.url().map_err(RunError::Config)? else { return Ok(None) };
    let redis = Redis::connect(&url, &config.cluster.name);
    redis.map(Arc::new).map(Some).map_err(|e| RunError::Config(format!("redis.url: {e}")))
}

/// Where events go; the outbox opens it.
pub fn events(config: &Config) -> Result<Events, RunError> {
    let (deliveries, delivered) = patchbay_storage::events::deliveries();
    Ok(Events::new(sink(config, deliveries)?, delivered))
}

/// A member of a group of readers of the events that the configuration names.
pub(crate) fn source(config: &Config, group: &str, start: Start) -> Result<Box<dyn Source>, RunError> {
    let broken = |e: SourceError| RunError::Events(e.to_string());
    Ok(match config.events.engine {
        EventsEngine::Embedded => {
            let mut source =
                EmbeddedSource::join(&config.storage.data_dir.join(EVENTS), group).map_err(broken)?;
            if start == Start::Latest {
                source.skip_all().map_err(broken)?;
            }
            Box::new(source)
        }
        EventsEngine::Kafka => {
            let kafka = config.events.kafka.connection().map_err(RunError::Config)?;
            Box::new(KafkaSource::join(&kafka, group, start).map_err(broken)?)
        }
    })
}

/// Lets go of what a group that will not come back has left. Brokers do so by themselves.
pub(crate) fn forget_group(config: &Config, group: &str) {
    if config.events.engine == EventsEngine::Embedded {
        patchbay_storage::events::embedded::forget_group(&config.storage.data_dir.join(EVENTS), group);
    }
}

/// The sink that the configuration names.
pub(crate) fn sink(config: &Config, deliveries: Deliveries) -> Result<Arc<dyn Sink>, RunError> {
    Ok(match config.events.engine {
        EventsEngine::Embedded => {
            let dir = config.storage.data_dir.join(EVENTS);
            let sink = EmbeddedSink::new(&dir, config.events.retention.0, deliveries);
            Arc::new(sink.map_err(|error| RunError::Io { what: EVENTS.into(), error })?)
        }
        EventsEngine::Kafka => {
            Arc::new(KafkaSink::new(config.events.kafka.connection().map_err(RunError::Config)?, deliveries))
        }
    })
}
