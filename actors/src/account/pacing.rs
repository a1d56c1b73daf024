//! Token buckets and the circuit breaker: pure, by timestamps that are given.

use std::time::Duration;

use patchbay_protocol::timestamp::Timestamp;
use serde::{Deserialize, Serialize};

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    tokens: f64,
    burst: f64,
    per_second: f64,
    at: Timestamp,
}

impl Bucket {
    /// A full bucket.
    pub fn new(burst: f64, per_second: f64, at: Timestamp) -> Self {
        Self { tokens: burst, burst, per_second, at }
    }

    /// Tokens at `now`.
    pub fn tokens(&self, now: Timestamp) -> f64 {
        (self.tokens + now.since(self.at).as_secs_f64() * self.per_second).min(self.burst)
    }

    /// Takes one, which may leave it in debt: what is on record was sent.
    pub fn take(&mut self, now: Timestamp) {
        self.tokens = self.tokens(now) - 1.0;
        self.at = self.at.max(now);
    }

    /// When there will be one.
    pub fn ready_at(&self, now: Timestamp) -> Timestamp {
        let lacking = 1.0 - self.tokens(now);
        if lacking <= 0.0 {
            now
        } else {
            now.plus(
                Duration::from_secs_f64((lacking / self.per_second).min(86_400.0)) + Duration::from_millis(1),
            )
        }
    }

    /// Whether it is full, so that forgetting it changes nothing.
    pub fn is_full(&self, now: Timestamp) -> bool {
        self.tokens(now) >= self.burst
    }
}

/// Calls that fail one after another stop all calls for a while; then one probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Breaker {
    failures: u32,
    open_until: Timestamp,
}

/// Failures in a row that open it.
const FAILURES_MAX: u32 = 5;
/// How long it stays open at first, and at most.
const OPEN_MIN: Duration = Duration::from_secs(1);
const OPEN_MAX: Duration = Duration::from_secs(60);

impl Breaker {
    /// A call was answered by the provider itself.
    pub fn worked(&mut self) {
        *self = Self::default();
    }

    /// A call was not answered by the provider.
    pub fn failed(&mut self, now: Timestamp) {
        if self.failures >= FAILURES_MAX && now < self.open_until {
            // One of those that were under way when it opened.
            return;
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures >= FAILURES_MAX {
            let doubled = OPEN_MIN * 2u32.pow((self.failures - FAILURES_MAX).min(6));
            self.open_until = now.plus(doubled.min(OPEN_MAX));
        }
    }

    /// When calls may be made again.
    pub fn open_until(&self) -> Timestamp {
        self.open_until
    }

    /// How many calls may be in flight: one probes after it was open.
    pub fn in_flight_max(&self, otherwise: usize) -> usize {
        if self.failures >= FAILURES_MAX { 1 } else { otherwise }
    }
}

/// How long to wait before attempt `attempts` + 1: exponential, with `jitter` (0 to 1) over the upper half.
pub fn backoff(attempts: u32, jitter: f64) -> Duration {
    let ceiling = Duration::from_secs(1) * 2u32.pow(attempts.saturating_sub(1).min(9));
    ceiling.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_sends_a_burst_and_then_one_in_six_seconds() {
        let t = Timestamp::from_seconds(1000);
        let mut bucket = Bucket::new(45.0, 1.0 / 6.0, t);
        for _ in 0..45 {
            assert_eq!(bucket.ready_at(t), t);
            bucket.take(t);
        }
        let next = bucket.ready_at(t);
        assert!(next.since(t) >= Duration::from_secs(6) && next.since(t) < Duration::from_secs(7));
        assert_eq!(bucket.ready_at(next), next);
        assert!(!bucket.is_full(next));
    }

    #[test]
    fn the_breaker_opens_doubles_and_closes() {
        let t = Timestamp::from_seconds(1000);
        let mut breaker = Breaker::default();
        (0..4).for_each(|_| breaker.failed(t));
        assert!(breaker.open_until() <= t);
        breaker.failed(t);
        assert_eq!(breaker.open_until(), t.plus(OPEN_MIN));
        assert_eq!(breaker.in_flight_max(64), 1);
        breaker.failed(t);
        assert_eq!(breaker.open_until(), t.plus(OPEN_MIN), "those under way do not count");
        for _ in 0..20 {
            let then = breaker.open_until();
            breaker.failed(then);
            assert!(breaker.open_until().since(then) <= OPEN_MAX);
        }
        breaker.worked();
        assert_eq!((breaker.open_until(), breaker.in_flight_max(64)), (Timestamp::default(), 64));
    }

    #[test]
    fn backoff_doubles_within_its_jitter() {
        assert_eq!(backoff(1, 0.0), Duration::from_millis(500));
        assert_eq!(backoff(1, 1.0), Duration::from_secs(1));
        assert_eq!(backoff(4, 1.0), Duration::from_secs(8));
        assert_eq!(backoff(100, 1.0), Duration::from_secs(512));
    }
}
