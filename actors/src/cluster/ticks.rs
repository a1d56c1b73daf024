//! The clock that leases are counted by.

use std::time::Duration;

use super::lease::Tick;

/// A clock that only runs forward, and counts suspend; or tokio's, which a test can pause.
#[derive(Clone, Copy, Debug)]
pub enum Ticks {
    /// The machine's, since it was started.
    Boot,
    /// Tokio's, since the instant.
    Tokio(tokio::time::Instant),
}

impl Ticks {
    /// Now.
    pub fn now(self) -> Tick {
        match self {
            Self::Boot => {
                let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
                Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
            }
            Self::Tokio(since) => since.elapsed(),
        }
    }
}
