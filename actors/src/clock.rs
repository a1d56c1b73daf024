//! What time it is: an argument, so that a test can own it.

use patchbay_protocol::Timestamp;

/// The wall clock, or one that moves with tokio's (paused) time.
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
    },
}

impl Clock {
    /// A clock that says `start` now and moves with tokio's time.
    pub fn from(start: Timestamp) -> Self {
        Self::Tokio { start, at: tokio::time::Instant::now() }
    }

    /// What time it is.
    pub fn now(&self) -> Timestamp {
        match self {
            Self::System => {
                let since =
                    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
            }
            Self::Tokio { start, at } => start.plus(at.elapsed()),
        }
    }
}
