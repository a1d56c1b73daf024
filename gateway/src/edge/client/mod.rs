//! Clients, whichever way they come: that is a [`wire`]. The connection's loop is in [`connection`], what it remembers in
//! [`session`], one file per command in [`commands`], the order of commands in [`lanes`].

pub mod asyncapi;
pub mod commands;
pub mod connection;
pub mod lanes;
pub mod session;
pub mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use patchbay_actors::desk::Desk;
use patchbay_actors::shares::Shares;
use patchbay_protocol::{AccountId, TenantId};
use tokio::sync::{Semaphore, watch};
use tokio_util::task::TaskTracker;

use crate::auth::Auth;
use crate::health::Phase;
use crate::hub::Hub;
use crate::limits::Limits;

/// Bounds of the socket door.
#[derive(Clone, Debug)]
pub struct SocketLimits {
    /// How often the server pings.
    pub ping: Duration,
    /// How long it waits for the answer.
    pub pong: Duration,
    /// How long a socket may be open without `connect`.
    pub connect: Duration,
    /// Sockets without `connect` at once.
    pub unconnected_max: usize,
    /// Sockets at once.
    pub connections_max: usize,
}

impl Default for SocketLimits {
    fn default() -> Self {
        Self {
            ping: Duration::from_secs(25),
            pong: Duration::from_secs(10),
            connect: Duration::from_secs(10),
            unconnected_max: 1_000,
            connections_max: 100_000,
        }
    }
}

/// What every connection shares.
pub struct Sockets {
    /// What agents do.
    pub desk: Arc<Desk>,
    /// Who they are.
    pub auth: Arc<Auth>,
    /// Where they meet.
    pub hub: Arc<Hub>,
    /// Bounds.
    pub limits: SocketLimits,
    /// How fast.
    pub rates: Arc<Limits>,
    /// The node's name, as clients see it.
    pub node: String,
    /// Whether it is to be open at all.
    pub phase: watch::Receiver<Phase>,
    /// Those that have not connected yet.
    pub unconnected: AtomicUsize,
    /// Those that are being turned away.
    pub closing: AtomicUsize,
    /// Sockets of each visitor that has any.
    pub visitors: Shares<Visitor>,
    /// Waited for when the node drains.
    pub tasks: TaskTracker,
    /// Origins that a browser may come from; `None`: every one.
    pub origins: Option<Vec<String>>,
}

impl Sockets {
    /// When a socket is told to go of a node that drains: spread evenly over [`LEAVING_PER_SECOND`], at most over
    /// [`LEAVING_MAX`].
    fn leaves_in(&self) -> Duration {
        let seconds = self.hub.open().load(Ordering::Relaxed) as f64 / LEAVING_PER_SECOND;
        Duration::from_secs_f64(seconds).min(LEAVING_MAX).mul_f64(rand::random())
    }
}

impl Sockets {
    /// Lets a client in, or says why not: before anything else is done for it.
    pub(super) async fn admit(&self, headers: &HeaderMap) -> Result<(), Response> {
        if *self.phase.borrow() != Phase::Serving {
            return Err(StatusCode::SERVICE_UNAVAILABLE.into_response());
        }
        if !self.allows(headers) {
            return Err(StatusCode::FORBIDDEN.into_response());
        }
        self.rates.admit().await
    }

    /// A browser names the page that it is on; other clients do not.
    pub(super) fn allows(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(header::ORIGIN) else { return true };
        let Some(allowed) = &self.origins else { return true };
        let Ok(origin) = origin.to_str() else { return false };
        let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("");
        let same = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")) == Some(host);
        same || allowed.iter().any(|a| a == origin)
    }
}

/// Sockets a second that are told to go; past what fits in the time for it they go faster.
const LEAVING_PER_SECOND: f64 = 200.0;
/// How long a node takes at most to tell its sockets to go.
const LEAVING_MAX: Duration = Duration::from_secs(10);
/// Sockets of one visitor at once.
const VISITOR_SOCKETS_MAX: usize = 16;

/// A visitor: tenant, account and its id there.
pub type Visitor = (TenantId, AccountId, String);

/// The sockets of each visitor that has any.
pub fn visitors() -> Shares<Visitor> {
    Shares::new(|| Semaphore::new(VISITOR_SOCKETS_MAX))
}

/// One among those that are counted.
pub(crate) struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn take(count: &'a AtomicUsize, max: usize) -> Option<Self> {
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < max).then_some(n + 1)).ok()?;
        Some(Self(count))
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
