//! Limits of the API door: requests a second of one caller.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tokio::time::Instant;

/// Callers that are told apart at once; past it those that have not asked lately are forgotten.
const CALLERS_MAX: usize = 10_000;

struct Bucket {
    tokens: f64,
    at: Instant,
}

/// Token buckets by the caller's key.
pub struct RequestLimits {
    per_second: f64,
    buckets: Mutex<HashMap<[u8; 32], Bucket>>,
}

impl RequestLimits {
    /// `per_second` of one caller; in `dev` never below 1,000.
    pub fn new(per_second: u32, dev: bool) -> Arc<Self> {
        let per_second = f64::from(if dev { per_second.max(2_000) } else { per_second.max(1) });
        Arc::new(Self { per_second, buckets: Mutex::default() })
    }

    /// Takes a place; else says how many milliseconds to wait.
    fn take(&self, caller: [u8; 32]) -> Result<(), u64> {
        let now = Instant::now();
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= CALLERS_MAX {
            buckets.retain(|_, b| now.duration_since(b.at).as_secs() < 2);
        }
        let bucket = buckets.entry(caller).or_insert(Bucket { tokens: self.per_second, at: now });
        bucket.tokens = (bucket.tokens + now.duration_since(bucket.at).as_secs_f64() * self.per_second)
            .min(self.per_second);
        bucket.at = now;
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return Ok(());
        }
        Err(((1.0 - bucket.tokens) / self.per_second * 1000.0).ceil().max(1.0) as u64)
    }
}

/// Answers 429 past the limit.
pub async fn layer(State(limits): State<Arc<RequestLimits>>, request: Request, next: Next) -> Response {
    let key = request.headers().get(header::AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
    let caller = *blake3::hash(key).as_bytes();
    let Err(retry_after_ms) = limits.take(caller) else { return next.run(request).await };
    let problem = json!({
        "type": "https://patchbay.dev/errors/rate_limited",
        "title": "rate limited",
        "status": 429,
        "code": "rate_limited",
        "detail": "more requests than this key may send in a second",
        "retry_after_ms": retry_after_ms,
    });
    let headers = [(header::CONTENT_TYPE, "application/problem+json"), (header::RETRY_AFTER, "1")];
    (StatusCode::TOO_MANY_REQUESTS, headers, problem.to_string()).into_response()
}

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
