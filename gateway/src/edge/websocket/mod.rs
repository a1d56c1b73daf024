//! WebSocket clients. Handshake here, the connection's loop in [`connection`], what it remembers in [`session`], one
//! file per command in [`commands`], the order of commands in [`lanes`].

pub mod asyncapi;
pub mod commands;
pub mod connection;
pub mod lanes;
pub mod session;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use patchbay_actors::desk::Desk;
use patchbay_actors::shares::Shares;
use patchbay_protocol::client::{Encoding, FRAME_BYTES_MAX};
use patchbay_protocol::{AccountId, TenantId};
use tokio::sync::{Semaphore, watch};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
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

/// `GET /connection/websocket`
pub async fn upgrade(State(sockets): State<Arc<Sockets>>, mut request: Request) -> Response {
    if *sockets.phase.borrow() != Phase::Serving {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if !origin_allowed(sockets.origins.as_deref(), &request) {
        return StatusCode::FORBIDDEN.into_response();
    }
    if let Err(later) = sockets.rates.admit().await {
        return later;
    }
    let encoding = wanted_encoding(&request);
    let Ok(mut response) = create_response_with_body(&strip_body(&request), Body::empty) else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    if encoding == Encoding::Protobuf {
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(PROTOBUF));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let tasks = sockets.tasks.clone();
    tasks.spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            connection::run(sockets, socket(upgraded).await, encoding).await;
        }
    });
    response
}

/// A socket with our bounds, on a connection that was upgraded.
pub async fn socket(upgraded: Upgraded) -> WebSocketStream<TokioIo<Upgraded>> {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(4096)
        .max_write_buffer_size(1 << 20)
        .max_message_size(Some(FRAME_BYTES_MAX))
        .max_frame_size(Some(FRAME_BYTES_MAX));
    WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await
}

/// What a socket reads into at once; held for as long as it is open.
const READ_BUFFER_BYTES: usize = 1024;
const PROTOBUF: &str = "centrifuge-protobuf";

fn strip_body(request: &Request) -> axum::http::Request<()> {
    let mut bare = axum::http::Request::new(());
    *bare.method_mut() = request.method().clone();
    *bare.uri_mut() = request.uri().clone();
    *bare.version_mut() = request.version();
    bare.headers_mut().clone_from(request.headers());
    bare
}

fn wanted_encoding(request: &Request) -> Encoding {
    let offered = request.headers().get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    let protobuf =
        offered.filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).any(|p| p.trim() == PROTOBUF);
    if protobuf { Encoding::Protobuf } else { Encoding::Json }
}

/// A browser names the page that it is on; other clients do not.
fn origin_allowed(origins: Option<&[String]>, request: &Request) -> bool {
    let Some(origin) = request.headers().get(header::ORIGIN) else { return true };
    let Some(allowed) = origins else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    let host = request.headers().get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("");
    let same = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")) == Some(host);
    same || allowed.iter().any(|a| a == origin)
}
