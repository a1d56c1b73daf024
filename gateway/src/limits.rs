//! Limits of callers: commands a second of a connection, an agent and a tenant, requests a second of an API key,
//! bodies a second of a webhook's account. Past one the caller is told when to come back; nobody else notices.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use patchbay_protocol::{AccountId, AgentId, CommandError, TenantId};
use patchbay_storage::redis::{Away, Redis};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::config;

/// Callers that are told apart at once; past it those that have not asked lately are forgotten.
pub const CALLERS_MAX: usize = 100_000;
/// A new socket waits so long for its turn.
const ADMIT_TIMEOUT: Duration = Duration::from_secs(5);
/// New sockets that wait for their turn: a quarter of what a node answers at once, so that a storm of them leaves the rest
/// to everybody else.
const ADMIT_WAITING_MAX: usize = crate::listener::REQUESTS_MAX / 4;
/// What API keys may ask in `dev` at least, from loopback.
const DEV_PER_SECOND: u32 = 2_000;

/// A token bucket that holds a second's worth, and at least so many that an SDK's reconnect fits.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    tokens: f64,
    at: Instant,
}

/// What one reconnect brings at once: a connect and its subscriptions.
const BURST_MIN: f64 = 1024.0;

/// How fast a bucket fills; 0: nothing is limited.
#[derive(Clone, Copy, Debug)]
pub struct Rate(f64);

impl Rate {
    /// So many a second.
    pub fn per_second(n: u32) -> Self {
        Self(f64::from(n))
    }

    fn burst(self) -> f64 {
        self.0.max(BURST_MIN)
    }

    /// A full bucket.
    pub fn bucket(self) -> Bucket {
        Bucket { tokens: self.burst(), at: Instant::now() }
    }

    fn fill(self, bucket: &mut Bucket) {
        let now = Instant::now();
        let filled = bucket.tokens + now.duration_since(bucket.at).as_secs_f64() * self.0;
        *bucket = Bucket { tokens: filled.min(self.burst()), at: now };
    }

    /// Takes the next place, and says in how long that is; else how long it would be, which is more than `max`.
    pub fn reserve(self, bucket: &mut Bucket, max: Duration) -> Result<Duration, Duration> {
        if self.0 <= 0.0 {
            return Ok(Duration::ZERO);
        }
        self.fill(bucket);
        let wait = Duration::from_secs_f64(((1.0 - bucket.tokens) / self.0).max(0.0));
        if wait > max {
            return Err(wait);
        }
        bucket.tokens -= 1.0;
        Ok(wait)
    }

    /// Takes a place; else says how many milliseconds to wait.
    pub fn take(self, bucket: &mut Bucket) -> Result<(), u64> {
        if self.0 <= 0.0 {
            return Ok(());
        }
        self.fill(bucket);
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return Ok(());
        }
        Err(((1.0 - bucket.tokens) / self.0 * 1000.0).ceil().max(1.0) as u64)
    }
}

/// Buckets of many callers.
pub struct Buckets<K> {
    rate: Rate,
    callers: Mutex<HashMap<K, Bucket>>,
}

impl<K: Hash + Eq> Buckets<K> {
    /// Every caller at this rate.
    pub fn new(rate: Rate) -> Self {
        Self { rate, callers: Mutex::default() }
    }

    /// Takes a place for a caller; else says how many milliseconds to wait.
    pub fn take(&self, caller: K) -> Result<(), u64> {
        if self.rate.0 <= 0.0 {
            return Ok(());
        }
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.len() >= CALLERS_MAX {
            let now = Instant::now();
            callers.retain(|_, b| now.duration_since(b.at).as_secs() < 2);
        }
        if callers.len() >= CALLERS_MAX && !callers.contains_key(&caller) {
            // More callers than can be told apart come at once.
            return Err(1000);
        }
        self.rate.take(callers.entry(caller).or_insert_with(|| self.rate.bucket()))
    }
}

/// The limits of a node.
pub struct Limits {
    /// Commands a second of one connection.
    pub connection: Rate,
    agents: Buckets<(TenantId, AgentId)>,
    tenants: Buckets<TenantId>,
    keys: Buckets<[u8; 32]>,
    /// Whoever comes without a key that is known, by address.
    strangers: Buckets<Option<IpAddr>>,
    webhooks: Buckets<(TenantId, AccountId)>,
    connects: Rate,
    turns: Mutex<Bucket>,
    waiting: Semaphore,
    /// Where nodes count the requests of a key together.
    shared: Option<Arc<Redis>>,
}

fn told(which: &'static str, taken: Result<(), u64>) -> Result<(), CommandError> {
    taken.map_err(|retry_after_ms| {
        metrics::counter!("patchbay_limits_reached_total", "which" => which).increment(1);
        CommandError::rate_limited(retry_after_ms)
    })
}

impl Limits {
    /// As configured; in `dev` API keys are never held below 2,000 requests a second.
    pub fn new(limits: &config::Limits, dev: bool, shared: Option<Arc<Redis>>) -> Arc<Self> {
        let keys = match limits.requests_per_second {
            n @ 1.. if dev => n.max(DEV_PER_SECOND),
            n => n,
        };
        Arc::new(Self {
            connection: Rate::per_second(limits.connection_per_second),
            agents: Buckets::new(Rate::per_second(limits.agent_per_second)),
            tenants: Buckets::new(Rate::per_second(limits.tenant_per_second)),
            keys: Buckets::new(Rate::per_second(keys)),
            strangers: Buckets::new(Rate::per_second(limits.strangers_per_second)),
            webhooks: Buckets::new(Rate::per_second(limits.webhooks_per_second)),
            connects: Rate::per_second(limits.connects_per_second),
            turns: Mutex::new(Rate::per_second(limits.connects_per_second).bucket()),
            waiting: Semaphore::new(ADMIT_WAITING_MAX),
            shared,
        })
    }

    /// A new socket waits its turn; one whose turn is too far off is told to come again.
    pub async fn admit(&self) -> Result<(), Response> {
        let place = self.waiting.try_acquire();
        // Without a place among those that wait only a turn that is now helps.
        let patience = if place.is_ok() { ADMIT_TIMEOUT } else { Duration::ZERO };
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            self.connects.reserve(&mut turns, patience)
        };
        match turn {
            Ok(wait) => {
                if !wait.is_zero() {
                    tokio::time::sleep(wait).await;
                }
                Ok(())
            }
            Err(wait) => {
                metrics::counter!("patchbay_limits_reached_total", "which" => "connects").increment(1);
                // Those that were turned away together do not come back together.
                let seconds = wait.as_secs_f64() * rand::random_range(0.5..1.5);
                let retry = HeaderValue::from(seconds.ceil() as u64);
                Err((StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, retry)]).into_response())
            }
        }
    }

    /// A command of a connection, by its own bucket.
    pub fn connection(&self, bucket: &mut Bucket) -> Result<(), CommandError> {
        told("connection", self.connection.take(bucket))
    }

    /// A command of an agent, on whichever socket.
    pub fn agent(&self, tenant: &TenantId, agent: &AgentId) -> Result<(), CommandError> {
        told("agent", self.agents.take((tenant.clone(), agent.clone())))?;
        self.tenant(tenant)
    }

    /// A command of anybody of a tenant.
    pub fn tenant(&self, tenant: &TenantId) -> Result<(), CommandError> {
        told("tenant", self.tenants.take(tenant.clone()))
    }

    /// A request of an API key: one bucket on all nodes, or while they have no word of each other one on each.
    async fn key(&self, key: [u8; 32]) -> Result<(), CommandError> {
        let Rate(rate) = self.keys.rate;
        if let (Some(shared), true) = (&self.shared, rate > 0.0) {
            match shared.take(&key, rate, self.keys.rate.burst()).await {
                Ok(taken) => return told("key", taken),
                Err(Away) => metrics::counter!("patchbay_limits_local_total").increment(1),
            }
        }
        told("key", self.keys.take(key))
    }

    /// A request that no key has opened a door for.
    pub fn stranger(&self, from: Option<IpAddr>) -> Result<(), CommandError> {
        told("stranger", self.strangers.take(from))
    }

    /// A signed body of a provider, by its account.
    pub fn webhook(&self, tenant: &TenantId, account: &AccountId) -> Result<(), CommandError> {
        told("webhook", self.webhooks.take((tenant.clone(), account.clone())))
    }
}

/// 429, and when to come back.
pub fn too_many(error: &CommandError) -> Response {
    let retry_after_ms = error.retry_after_ms().unwrap_or(1000);
    let problem = json!({
        "type": "https://patchbay.dev/errors/rate_limited",
        "title": "rate limited",
        "status": 429,
        "code": "rate_limited",
        "detail": "more requests than this caller may send in a second",
        "retry_after_ms": retry_after_ms,
    });
    let after = HeaderValue::from(retry_after_ms.div_ceil(1000));
    let mut response = (StatusCode::TOO_MANY_REQUESTS, problem.to_string()).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    headers.insert(header::RETRY_AFTER, after);
    response
}

/// Answers 429 past the limit of an API key. Whoever is refused for want of one is limited by address.
pub async fn layer(State(limits): State<Arc<Limits>>, request: Request, next: Next) -> Response {
    let key = request.headers().get(header::AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
    let key = *blake3::hash(key).as_bytes();
    let from = request.extensions().get::<Peer>().map(|p| p.0);
    if let Err(error) = limits.key(key).await {
        return too_many(&error);
    }
    let response = next.run(request).await;
    if response.status() == StatusCode::UNAUTHORIZED
        && let Err(error) = limits.stranger(from)
    {
        return too_many(&error);
    }
    response
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

/// Whether a `Host` (or what stands in an `Origin` behind the scheme) is one of loopback's own names.
fn is_local(host: &str) -> bool {
    let name = host
        .rsplit_once(':')
        .map_or(host, |(name, port)| if port.bytes().all(|b| b.is_ascii_digit()) { name } else { host });
    let name = name.trim_matches(['[', ']']);
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn comes_from_here(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).map(|h: &HeaderValue| h.to_str().unwrap_or("?"));
    let host = text(header::HOST).is_some_and(is_local);
    host && text(header::ORIGIN).is_none_or(|o| o.split_once("://").is_some_and(|(_, host)| is_local(host)))
}

/// `dev` answers only to loopback's own names, and to pages from there: a page elsewhere that points a name of its own
/// here is refused.
pub async fn local_host_only(request: Request, next: Next) -> Response {
    let local = comes_from_here(request.headers());
    if local {
        next.run(request).await
    } else {
        (StatusCode::FORBIDDEN, "dev answers to loopback only").into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn one_caller_past_its_limit_leaves_the_others_alone() {
        let buckets = Buckets::new(Rate::per_second(2000));
        let taken = (0..20_000).filter(|_| buckets.take("a").is_ok()).count();
        assert_eq!(taken, 2000);
        assert!(buckets.take("a").unwrap_err() >= 1);
        assert_eq!((0..2000).filter(|_| buckets.take("b").is_ok()).count(), 2000);
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!((0..2000).filter(|_| buckets.take("a").is_ok()).count(), 1000);
        let free = Buckets::new(Rate::per_second(0));
        assert!((0..10_000).all(|_| free.take("a").is_ok()), "0 limits nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_storm_of_sockets_comes_in_at_its_rate_and_leaves_places_to_others() {
        let limits = config::Limits { connects_per_second: 1_000, ..config::Limits::default() };
        let limits = Limits::new(&limits, false, None);
        let began = Instant::now();
        let storm = (0..30_000).map(|_| async { (limits.admit().await, began.elapsed()) });
        let came = futures_util::future::join_all(storm).await;
        let retries: Vec<u64> = came
            .iter()
            .filter_map(|(came, _)| came.as_ref().err())
            .map(|later| later.headers()[header::RETRY_AFTER].to_str().unwrap().parse().unwrap())
            .collect();
        // Those of the first second come at once; of those that wait none waits longer than its place is worth.
        assert_eq!(came.len() - retries.len(), BURST_MIN as usize + ADMIT_WAITING_MAX);
        let last = came.iter().filter(|(came, _)| came.is_ok()).map(|(_, at)| *at).max().unwrap();
        assert!(last > Duration::from_secs(2) && last <= ADMIT_TIMEOUT, "{last:?}");
        // The others are told to come again, and not all at the same time.
        assert!(retries.iter().all(|seconds| (1..=8).contains(seconds)));
        assert!(retries.iter().collect::<std::collections::HashSet<_>>().len() > 1, "{:?}", &retries[..9]);
    }
}
