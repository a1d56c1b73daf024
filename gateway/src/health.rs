//! The operators' door: `/metrics`, `/healthz`, `/readyz`. It opens before anything else, so that a node that waits for
//! an engine says for which.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::limits;
use crate::listener;
use crate::proxies::Proxies;
use crate::server::{Mode, RunError, io};

/// Between two looks at old histogram samples.
const UPKEEP: Duration = Duration::from_secs(5);

/// What stands in the way of something the node needs, if anything.
type Trouble = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// Something that the node needs, or would rather have.
struct Part {
    name: &'static str,
    /// Without it nothing can be taken.
    vital: bool,
    trouble: Trouble,
    /// It was there once since the start.
    seen: bool,
}

/// How the node is.
#[derive(Default)]
pub struct Health {
    /// What a node that is starting waits for.
    waiting: Mutex<Option<String>>,
    parts: Mutex<Vec<Part>>,
    notes: Mutex<Vec<Trouble>>,
    queued: OnceLock<Arc<AtomicUsize>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Health {
    /// The node waits for `part` to start.
    pub fn waits(&self, part: &str, why: &str) {
        let text = format!("waiting for {part}: {why}");
        let mut waiting = lock(&self.waiting);
        if waiting.as_deref() != Some(&text) {
            tracing::warn!(part, why, "the node waits");
            *waiting = Some(text);
        }
    }

    /// It has started.
    pub(crate) fn started(&self) {
        *lock(&self.waiting) = None;
    }

    /// Something without which nothing can be taken.
    pub(crate) fn needs(
        &self,
        name: &'static str,
        trouble: impl Fn() -> Option<String> + Send + Sync + 'static,
    ) {
        lock(&self.parts).push(Part { name, vital: true, trouble: Box::new(trouble), seen: false });
    }

    /// Something that the node waits for at its start, and later does without.
    pub(crate) fn likes(
        &self,
        name: &'static str,
        trouble: impl Fn() -> Option<String> + Send + Sync + 'static,
    ) {
        lock(&self.parts).push(Part { name, vital: false, trouble: Box::new(trouble), seen: false });
    }

    /// Something to be said of a node that is ready all the same.
    pub(crate) fn notes(&self, note: impl Fn() -> Option<String> + Send + Sync + 'static) {
        lock(&self.notes).push(Box::new(note));
    }

    /// Where the bytes that wait for sockets are counted.
    pub(crate) fn count_queued(&self, queued: Arc<AtomicUsize>) {
        let _ = self.queued.set(queued);
    }

    /// Whether the node takes what it is sent; and what is to be said of it.
    pub fn look(&self) -> (bool, String) {
        if let Some(waiting) = lock(&self.waiting).clone() {
            return (false, waiting);
        }
        let mut without = Vec::new();
        for part in lock(&self.parts).iter_mut() {
            let trouble = (part.trouble)();
            metrics::gauge!("patchbay_health_away", "part" => part.name)
                .set(f64::from(u8::from(trouble.is_some())));
            match trouble {
                None => part.seen = true,
                Some(why) if part.vital => return (false, why),
                Some(why) if !part.seen => return (false, format!("waiting for {}: {why}", part.name)),
                Some(why) => without.push(format!("{} is away: {why}", part.name)),
            }
        }
        without.extend(lock(&self.notes).iter().filter_map(|note| note()));
        let mut text = "ready".to_owned();
        for away in without {
            text += "; ";
            text += &away;
        }
        (true, text)
    }
}

/// What a node does about its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It serves them.
    Serving,
    /// It sends its sockets elsewhere and takes no new ones, until somebody says otherwise.
    Draining,
    /// The same, and then it ends.
    Ending,
}

/// The operators' door, open.
pub struct Ops {
    /// Its address.
    pub address: SocketAddr,
    /// What it tells.
    pub health: Arc<Health>,
    pub(crate) phase: watch::Sender<Phase>,
    pub(crate) tasks: TaskTracker,
}

impl Ops {
    /// Opens it.
    pub async fn start(config: &Config, mode: Mode, metrics: PrometheusHandle) -> Result<Self, RunError> {
        let listener = TcpListener::bind(&config.ops.listen).await.map_err(io("ops.listen"))?;
        let address = listener.local_addr().map_err(io("ops.listen"))?;
        if mode == Mode::Dev && !address.ip().is_loopback() {
            return Err(RunError::Config("dev listens on loopback only".into()));
        }
        let (phase, watching) = watch::channel(Phase::Serving);
        let (health, tasks) = (Arc::new(Health::default()), TaskTracker::new());
        *lock(&health.waiting) = Some("starting".into());
        let state = OpsState { health: health.clone(), metrics, phase: watching.clone() };
        let router = match mode {
            Mode::Dev => router(state).layer(axum::middleware::from_fn(limits::local_host_only)),
            Mode::Run => router(state),
        };
        let serves = listener::serve(listener, None, Proxies::default(), router, watching, tasks.clone());
        tasks.spawn(serves.map_err(RunError::Config)?);
        Ok(Self { address, health, phase, tasks })
    }
}

#[derive(Clone)]
struct OpsState {
    health: Arc<Health>,
    metrics: PrometheusHandle,
    phase: watch::Receiver<Phase>,
}

fn router(state: OpsState) -> Router {
    let upkeep = state.metrics.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            upkeep.run_upkeep();
        }
    });
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .with_state(state)
}

async fn metrics(State(state): State<OpsState>) -> String {
    if let Some(queued) = state.health.queued.get() {
        metrics::gauge!("patchbay_edge_queued_bytes").set(queued.load(Ordering::Relaxed) as f64);
    }
    // What is away is measured when somebody looks.
    let _ = state.health.look();
    state.metrics.render()
}

async fn ready(State(state): State<OpsState>) -> Response {
    if *state.phase.borrow() != Phase::Serving {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining").into_response();
    }
    match state.health.look() {
        (true, text) => text.into_response(),
        (false, why) => (StatusCode::SERVICE_UNAVAILABLE, why).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_once_may_go_and_what_is_vital_may_not() {
        let health = Health::default();
        health.waits("storage", "it does not answer");
        assert_eq!(health.look(), (false, "waiting for storage: it does not answer".into()));
        health.started();
        let (events, storage) = (Arc::new(Mutex::new(Some("no broker"))), Arc::new(Mutex::new(None)));
        let (e, s) = (events.clone(), storage.clone());
        health.needs("storage", move || lock(&s).map(str::to_owned));
        health.likes("events", move || lock(&e).map(str::to_owned));
        assert_eq!(health.look(), (false, "waiting for events: no broker".into()));
        *lock(&events) = None;
        assert_eq!(health.look(), (true, "ready".into()));
        *lock(&events) = Some("no broker");
        assert_eq!(health.look(), (true, "ready; events is away: no broker".into()));
        *lock(&storage) = Some("the disk is full");
        assert_eq!(health.look(), (false, "the disk is full".into()));
    }
}
