//! Short-lived state that nodes share: rates of callers, replies of idempotent requests, word of changed documents, and
//! who was last seen where.
//!
//! Nothing here is durable, and nothing durable is only here: whoever gets [`Away`] goes on with what the node knows by
//! itself. A server that does not answer in [`COMMAND_TIMEOUT`] is left alone for a second, so that a slow one costs a
//! request or two, not every one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fred::clients::{Client, SubscriberClient};
use fred::error::{Error, ErrorKind};
use fred::interfaces::{
    ClientLike as _, EventInterface as _, KeysInterface as _, LuaInterface as _, PubsubInterface as _,
};
use fred::types::config::{Config, ReconnectPolicy};
use fred::types::{Builder, Expiration, Key, SetOptions, Value};
use patchbay_protocol::ids::TenantId;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// A server that has not answered by then is away.
pub const COMMAND_TIMEOUT: Duration = Duration::from_millis(250);
/// A server that is away is left alone for so long.
const REST: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Reconnections: at first, and at most.
const RECONNECT_MS: u32 = 50;
const RECONNECT_MS_MAX: u32 = 1_000;
/// Commands that wait for a connection; past it they fail.
const REDIS_COMMANDS_MAX: usize = 10_000;
/// A request that is under way is forgotten after this, should its node die.
const RUNNING_FOR_S: i64 = 120;
/// The largest reply that is kept for others.
pub const REPLY_BYTES_MAX: usize = 64 << 10;
/// Changes that are told and not heard yet; past it everything is looked at again.
const CHANGES_MAX: usize = 1_024;

/// The server does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("redis does not answer")]
pub struct Away;

/// The generic cell rate algorithm, in one step: KEYS[1] the caller, ARGV the microseconds of one request and of the
/// burst. Answers the microseconds to wait, 0 when the request may go.
const RATE: &str = "local t = redis.call('TIME') local now = t[1] * 1000000 + t[2] \
local tat = tonumber(redis.call('GET', KEYS[1]) or now) if tat < now then tat = now end \
local next = tat + tonumber(ARGV[1]) local wait = next - tonumber(ARGV[2]) - now \
if wait > 0 then return wait end \
redis.call('SET', KEYS[1], string.format('%.0f', next), 'PX', math.ceil((next - now) / 1000) + 1) return 0";

/// What other nodes know of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Nothing: it is ours now.
    Ours,
    /// It is under way elsewhere.
    Running {
        /// The hash of its body.
        body: [u8; 32],
    },
    /// It was answered so.
    Answered {
        /// The hash of its body.
        body: [u8; 32],
        /// The status.
        status: u16,
        /// The content type, if it has one.
        content_type: Bytes,
        /// The reply.
        reply: Bytes,
    },
}

impl Kept {
    fn encode(&self) -> Option<Bytes> {
        let mut out = BytesMut::new();
        match self {
            Self::Ours => return None,
            Self::Running { body } => out.put_slice(body),
            Self::Answered { body, status, content_type, reply } => {
                out.put_slice(body);
                out.put_u16(*status);
                out.put_u16(u16::try_from(content_type.len()).ok()?);
                out.put_slice(content_type);
                out.put_slice(reply);
            }
        }
        Some(out.freeze())
    }

    fn decode(mut bytes: Bytes) -> Option<Self> {
        let mut body = [0; 32];
        bytes.try_copy_to_slice(&mut body).ok()?;
        if bytes.is_empty() {
            return Some(Self::Running { body });
        }
        let (status, length) = (bytes.try_get_u16().ok()?, usize::from(bytes.try_get_u16().ok()?));
        if bytes.len() < length {
            return None;
        }
        Some(Self::Answered { body, status, content_type: bytes.split_to(length), reply: bytes })
    }
}

/// Word of changes by other nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Documents of this tenant.
    Of(TenantId),
    /// Some word may have been missed: anything may have changed.
    Unknown,
}

/// A Redis server that nodes share.
pub struct Redis {
    client: Client,
    subscriber: SubscriberClient,
    prefix: String,
    script: tokio::sync::OnceCell<String>,
    started: Instant,
    /// Milliseconds after `started` until which nobody asks.
    rests_until: AtomicU64,
    away: watch::Sender<bool>,
}

impl Redis {
    /// The server behind `url`; keys begin with the cluster's name. Connects by itself, now or later.
    pub fn connect(url: &str, cluster: &str) -> Result<Self, String> {
        let config = Config::from_url(url).map_err(|e| e.to_string())?;
        let mut builder = Builder::from_config(config);
        builder
            .with_performance_config(|c| c.default_command_timeout = COMMAND_TIMEOUT)
            .with_connection_config(|c| {
                c.connection_timeout = CONNECT_TIMEOUT;
                c.internal_command_timeout = CONNECT_TIMEOUT;
                c.max_command_buffer_len = REDIS_COMMANDS_MAX;
                c.max_command_attempts = 1;
                c.tcp.nodelay = Some(true);
            })
            .set_policy(ReconnectPolicy::new_exponential(0, RECONNECT_MS, RECONNECT_MS_MAX, 2));
        let client = builder.build().map_err(|e| e.to_string())?;
        let subscriber = builder.build_subscriber_client().map_err(|e| e.to_string())?;
        client.connect();
        subscriber.connect();
        drop(subscriber.manage_subscriptions());
        Ok(Self {
            client,
            subscriber,
            prefix: format!("patchbay:{cluster}"),
            script: tokio::sync::OnceCell::new(),
            started: Instant::now(),
            rests_until: AtomicU64::new(0),
            away: watch::channel(true).0,
        })
    }

    fn key(&self, kind: &str, id: &[u8]) -> Key {
        [self.prefix.as_bytes(), b":", kind.as_bytes(), b":", id].concat().as_slice().into()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Whether it answered when it was last asked.
    pub fn is_away(&self) -> bool {
        *self.away.borrow()
    }

    /// Turns with [`Self::is_away`].
    pub fn away(&self) -> watch::Receiver<bool> {
        self.away.subscribe()
    }

    async fn ask<T>(&self, asked: impl Future<Output = Result<T, Error>>) -> Result<T, Away> {
        if self.now() < self.rests_until.load(Ordering::Relaxed) {
            return Err(Away);
        }
        let answer = asked.await;
        // A refusal is an answer.
        let away =
            matches!(&answer, Err(e) if !matches!(e.kind(), ErrorKind::InvalidArgument | ErrorKind::Parse));
        if away {
            let rest = u64::try_from(REST.as_millis()).unwrap_or(u64::MAX);
            self.rests_until.store(self.now() + rest, Ordering::Relaxed);
            metrics::counter!("patchbay_redis_away_total").increment(1);
        }
        self.away.send_if_modified(|was| std::mem::replace(was, away) != away);
        answer.map_err(|error| {
            tracing::debug!(%error, "redis");
            Away
        })
    }

    /// Whether it answers now.
    pub async fn ping(&self) -> Result<(), Away> {
        self.ask(self.client.ping::<String>(None)).await.map(drop)
    }

    /// Takes a place of a caller that may have `rate` a second, `burst` at once; else says how many milliseconds to
    /// wait. Whichever node asks, it is one bucket.
    pub async fn take(&self, caller: &[u8], rate: f64, burst: f64) -> Result<Result<(), u64>, Away> {
        let every = 1_000_000.0 / rate.max(f64::MIN_POSITIVE);
        let key = self.key("rate", caller);
        let waits = self
            .ask(async {
                let script = self.script.get_or_try_init(|| self.client.script_load(RATE)).await?;
                let args = || vec![format!("{every:.0}"), format!("{:.0}", every * burst)];
                match self.client.evalsha::<f64, _, _, _>(script.as_str(), key.clone(), args()).await {
                    // A server that was restarted has forgotten it.
                    Err(e) if e.details().starts_with("NOSCRIPT") => {
                        self.client.eval::<f64, _, _, _>(RATE, key, args()).await
                    }
                    answer => answer,
                }
            })
            .await?;
        Ok(if waits <= 0.0 { Ok(()) } else { Err((waits / 1000.0).ceil().max(1.0) as u64) })
    }

    /// What is known of a request; it is ours when nothing is.
    pub async fn begin(&self, request: &[u8; 32], body: [u8; 32]) -> Result<Kept, Away> {
        let key = self.key("reply", request);
        let running = Kept::Running { body }.encode().unwrap_or_default();
        let found = self
            .ask(async {
                let set: Value = self
                    .client
                    .set(
                        key.clone(),
                        running,
                        Some(Expiration::EX(RUNNING_FOR_S)),
                        Some(SetOptions::NX),
                        false,
                    )
                    .await?;
                if !set.is_null() {
                    return Ok(None);
                }
                self.client.get::<Option<Bytes>, _>(key.clone()).await
            })
            .await?;
        // One that ended in between is asked for again by whoever repeats it.
        Ok(found.and_then(Kept::decode).unwrap_or(Kept::Ours))
    }

    /// What a request came to; none: it may be tried again.
    pub async fn end(
        &self,
        request: &[u8; 32],
        answer: Option<&Kept>,
        kept_for: Duration,
    ) -> Result<(), Away> {
        let key = self.key("reply", request);
        let value = answer.and_then(Kept::encode).filter(|v| v.len() <= REPLY_BYTES_MAX);
        self.ask(async {
            match value {
                Some(value) => {
                    let ends = Expiration::EX(i64::try_from(kept_for.as_secs()).unwrap_or(i64::MAX));
                    self.client.set(key.clone(), value, Some(ends), None, false).await
                }
                None => self.client.del::<(), _>(key.clone()).await,
            }
        })
        .await
    }

    /// Tells every node that documents of a tenant have changed.
    pub async fn tell_change(&self, tenant: &TenantId) -> Result<(), Away> {
        let channel = format!("{}:changes", self.prefix);
        self.ask(self.client.publish::<(), _, _>(channel, tenant.as_str())).await
    }

    /// What is told. After a connection was lost the first word is [`Change::Unknown`].
    pub fn changes(&self) -> mpsc::Receiver<Change> {
        let (to, changes) = mpsc::channel(CHANGES_MAX);
        let (subscriber, channel) = (self.subscriber.clone(), format!("{}:changes", self.prefix));
        tokio::spawn(async move {
            let (mut messages, mut back) = (subscriber.message_rx(), subscriber.reconnect_rx());
            // Kept and repeated by itself with every connection.
            while subscriber.subscribe::<_>(channel.as_str()).await.is_err() {
                if to.is_closed() {
                    return;
                }
                tokio::time::sleep(REST).await;
            }
            loop {
                let change = tokio::select! {
                    message = messages.recv() => match message {
                        Ok(message) => message.value.as_str().and_then(|t| t.parse().ok()).map(Change::Of),
                        Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => Some(Change::Unknown),
                        Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
                    },
                    again = back.recv() => match again {
                        Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => Some(Change::Unknown),
                        Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
                    },
                    () = to.closed() => return,
                };
                if let Some(change) = change
                    && to.send(change).await.is_err()
                {
                    return;
                }
            }
        });
        changes
    }

    /// Notes how an agent is: a hint that ends after `lasts`.
    pub async fn hint_presence(
        &self,
        tenant: &TenantId,
        agent: &str,
        state: &str,
        lasts: Duration,
    ) -> Result<(), Away> {
        let key = self.key("presence", format!("{tenant}/{agent}").as_bytes());
        let ends = Expiration::PX(i64::try_from(lasts.as_millis()).unwrap_or(i64::MAX));
        self.ask(self.client.set::<(), _, _>(key, state, Some(ends), None, false)).await
    }

    /// How each of a tenant's agents is, as far as anybody has said.
    pub async fn presence_hints(
        &self,
        tenant: &TenantId,
        agents: &[&str],
    ) -> Result<Vec<Option<String>>, Away> {
        if agents.is_empty() {
            return Ok(Vec::new());
        }
        let key = |agent: &&str| self.key("presence", format!("{tenant}/{agent}").as_bytes());
        self.ask(self.client.mget(agents.iter().map(key).collect::<Vec<_>>())).await
    }
}
