//! What time it is: an argument, so that a test can own it.

use std::sync::atomic::{AtomicI64, Ordering};

use patchbay_protocol::Timestamp;

/// The wall clock, or one that moves with tokio's (paused) time and is set forward and back by a test.
#[derive(Clone, Copy, Debug)]
pub enum Clock {
    /// The machine's.
    System,
    /// `start` at the instant, and on with tokio's time.
    Tokio {
        /// The wall-clock time at `at`.
        start: Timestamp,
        /// When that was.
        at: tokio::time::Instant,
        /// Milliseconds that somebody has set it forward since.
        set: Option<&'static AtomicI64>,
    },
}

impl Clock {
    /// A clock that says `start` now and moves with tokio's time.
    pub fn from(start: Timestamp) -> Self {
        Self::Tokio { start, at: tokio::time::Instant::now(), set: None }
    }

    /// The same, set forward (or back) by as many milliseconds as `set` says at any moment.
    pub fn settable(start: Timestamp, set: &'static AtomicI64) -> Self {
        Self::Tokio { start, at: tokio::time::Instant::now(), set: Some(set) }
    }

    /// What time it is.
    pub fn now(&self) -> Timestamp {
        match self {
            Self::System => {
                let since =
                    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
            }
            Self::Tokio { start, at, set } => {
                let set = set.map_or(0, |set| set.load(Ordering::Relaxed));
                Timestamp::from_millis(start.plus(at.elapsed()).as_millis().saturating_add(set))
            }
        }
    }
}
