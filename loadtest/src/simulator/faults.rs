//! What goes wrong, and how often: in parts of a thousand.

use rand::Rng;
use rand::rngs::SmallRng;
use serde::{Deserialize, Serialize};

/// How often what goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// A call that works and is never answered.
    pub lost_answers: u32,
    /// 429 with `Retry-After`; not taken.
    pub throttled: u32,
    /// A retryable error code; not taken.
    pub retryable_errors: u32,
    /// A final error code; not taken.
    pub final_errors: u32,
    /// 502 without a body, after the call has worked.
    pub bad_gateways: u32,
    /// Receipts that are sent twice.
    pub duplicate_receipts: u32,
    /// Receipts that never come.
    pub missing_receipts: u32,
    /// Receipts that overtake those before them.
    pub reordered_receipts: u32,
    /// Webhooks that are posted again although they were taken.
    pub repeated_webhooks: u32,
    /// The longest delay of an answer, in milliseconds.
    pub delay_ms: u64,
    /// The longest delay of a receipt, in milliseconds.
    pub receipt_delay_ms: u64,
    /// How long an answer that is lost is held, in milliseconds.
    pub hold_ms: u64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            lost_answers: 0,
            throttled: 0,
            retryable_errors: 0,
            final_errors: 0,
            bad_gateways: 0,
            duplicate_receipts: 0,
            missing_receipts: 0,
            reordered_receipts: 0,
            repeated_webhooks: 0,
            delay_ms: 20,
            receipt_delay_ms: 60,
            hold_ms: 60_000,
        }
    }
}

/// What becomes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Work,
    LostAnswer,
    Throttle,
    RetryableError,
    FinalError,
    BadGateway,
}

impl Faults {
    pub(crate) fn call(&self, random: &mut SmallRng) -> Fate {
        let mut roll = random.random_range(0..1000u32);
        let shares = [
            (self.lost_answers, Fate::LostAnswer),
            (self.throttled, Fate::Throttle),
            (self.retryable_errors, Fate::RetryableError),
            (self.final_errors, Fate::FinalError),
            (self.bad_gateways, Fate::BadGateway),
        ];
        for (share, fate) in shares {
            if roll < share {
                return fate;
            }
            roll -= share;
        }
        Fate::Work
    }
}

pub(crate) fn happens(random: &mut SmallRng, share: u32) -> bool {
    random.random_range(0..1000u32) < share
}

pub(crate) fn up_to(random: &mut SmallRng, ms: u64) -> std::time::Duration {
    std::time::Duration::from_millis(random.random_range(0..=ms))
}
