//! A provider on this machine. Its faults follow from a seed; its record says what it received and what it did.

mod faults;
mod graph;
mod media;
mod record;
mod scenario;
mod strict;
mod webhooks;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::routing::{get, post, put};
use axum::{Json, http::StatusCode};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;

pub use faults::Faults;
pub use media::Behaviour;
pub use record::{Inbound, Record, SendCall, Upload};
pub use scenario::{Limits, Scenario, Step};

/// A number of a business: where its webhooks go and what signs them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Number {
    /// Where webhooks are posted.
    pub webhook_url: String,
    /// What signs them.
    pub app_secret: String,
}

pub(crate) struct Sim {
    pub(crate) numbers: Mutex<HashMap<String, Number>>,
    pub(crate) faults: Mutex<Faults>,
    pub(crate) pace: Mutex<scenario::Pace>,
    pub(crate) random: Mutex<SmallRng>,
    pub(crate) record: Mutex<Record>,
    pub(crate) outbox: webhooks::Outbox,
    pub(crate) files: Mutex<media::Files>,
    pub(crate) client: reqwest::Client,
}

pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running simulator. It ends with its process or when dropped.
pub struct Simulator {
    sim: Arc<Sim>,
    address: SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Simulator {
    /// Starts on `listen` (port 0: any free one).
    pub async fn start(listen: SocketAddr, seed: u64, faults: Faults) -> std::io::Result<Self> {
        let sim = Arc::new(Sim {
            numbers: Mutex::default(),
            faults: Mutex::new(faults),
            pace: Mutex::default(),
            random: Mutex::new(SmallRng::seed_from_u64(seed)),
            record: Mutex::default(),
            outbox: webhooks::Outbox::default(),
            files: Mutex::default(),
            client: reqwest::Client::new(),
        });
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let router = router(sim.clone());
        let server = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the simulator ended");
            }
        });
        Ok(Self { sim, address, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Gives a number its webhook.
    pub fn add_number(&self, phone_number_id: &str, number: Number) {
        lock(&self.sim.numbers).insert(phone_number_id.to_owned(), number);
    }

    /// A customer writes to a number; returns the message's id. Its webhook is repeated until it is taken.
    pub fn customer_writes(&self, phone_number_id: &str, customer: &Customer) -> String {
        webhooks::customer_writes(&self.sim, phone_number_id, customer)
    }

    /// Plays a scenario from now on. Numbers that are added later hear of what comes later.
    pub fn play(&self, scenario: Scenario) {
        let Scenario { faults, limits, aliases, steps } = scenario;
        *lock(&self.sim.faults) = faults;
        {
            let mut pace = lock(&self.sim.pace);
            (pace.limits, pace.aliases) = (limits, aliases);
        }
        tokio::spawn(scenario::play(self.sim.clone(), steps));
    }

    /// From now on, what goes wrong.
    pub fn set_faults(&self, faults: Faults) {
        *lock(&self.sim.faults) = faults;
    }

    /// A customer sends a file; returns the message's id.
    pub fn customer_sends(
        &self,
        phone_number_id: &str,
        from: &str,
        kind: &str,
        file: (&str, &str, &[u8]),
        behaviour: Behaviour,
    ) -> String {
        let (id, mime, bytes) = file;
        lock(&self.sim.files).add(id, mime, bytes::Bytes::copy_from_slice(bytes), behaviour);
        webhooks::customer_sends(&self.sim, phone_number_id, from, kind, id, mime)
    }

    /// Calls under way.
    pub fn record_open_calls(&self) -> u64 {
        lock(&self.sim.record).calls_open
    }

    /// What it has received and done so far.
    pub fn record(&self) -> Record {
        lock(&self.sim.record).clone()
    }
}

/// A customer who writes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Customer {
    /// The phone number, digits only.
    pub from: String,
    /// The name of the profile.
    #[serde(default)]
    pub name: String,
    /// What the customer writes.
    pub text: String,
}

fn router(sim: Arc<Sim>) -> Router {
    Router::new()
        .route("/{version}/{phone_number_id}/messages", post(graph::messages))
        .route("/{version}/{phone_number_id}/media", post(media::take))
        .route("/{version}/{media_id}", get(media::tell))
        .route("/sim/media/{id}", get(media::give))
        .route("/sim/record", get(record))
        .route("/sim/faults", put(set_faults))
        .route("/sim/numbers/{phone_number_id}", put(set_number))
        .route("/sim/numbers/{phone_number_id}/customers", post(writes))
        .layer(DefaultBodyLimit::max(128 << 20))
        .with_state(sim)
}

async fn record(State(sim): State<Arc<Sim>>) -> Json<Record> {
    Json(lock(&sim.record).clone())
}

async fn set_faults(State(sim): State<Arc<Sim>>, Json(faults): Json<Faults>) -> StatusCode {
    *lock(&sim.faults) = faults;
    StatusCode::NO_CONTENT
}

async fn set_number(
    State(sim): State<Arc<Sim>>,
    Path(id): Path<String>,
    Json(number): Json<Number>,
) -> StatusCode {
    lock(&sim.numbers).insert(id, number);
    StatusCode::NO_CONTENT
}

async fn writes(
    State(sim): State<Arc<Sim>>,
    Path(id): Path<String>,
    Json(customer): Json<Customer>,
) -> Json<serde_json::Value> {
    Json(serde_json::json!({"id": webhooks::customer_writes(&sim, &id, &customer)}))
}
