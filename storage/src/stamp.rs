//! Stamps: late writes cannot win.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// The write timestamp of a row: 18 bits of epoch above 32 bits of n, so that every write of a later reign beats
/// every write of an earlier one, and within a reign a later write beats an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(u64);

/// Epochs have 18 bits: the stamp stays under 2^50, below the wall clock in microseconds, which ScyllaDB demands.
pub const EPOCH_MAX: u32 = (1 << 18) - 1;

impl Stamp {
    /// The stamp of write `n` in the reign of `epoch`.
    pub fn new(epoch: u32, n: u32) -> Self {
        Self(u64::from(epoch.min(EPOCH_MAX)) << 32 | u64::from(n))
    }

    /// From its number.
    pub fn from_u64(n: u64) -> Self {
        Self(n)
    }

    /// As a number.
    pub fn as_u64(self) -> u64 {
        self.0
    }

    /// The reign.
    pub fn epoch(self) -> u32 {
        u32::try_from(self.0 >> 32).unwrap_or(u32::MAX)
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch(), self.0 & 0xffff_ffff)
    }
}

/// A shard has used up the numbers of its reign and must take a new epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the shard is out of stamps")]
pub struct OutOfStamps;

/// The stamps of one reign of one shard: every call gives a higher one, also across restarts of an entity's actor.
#[derive(Debug)]
pub struct Stamps {
    epoch: u32,
    next: AtomicU32,
}

impl Stamps {
    /// A reign that has written nothing yet.
    pub fn new(epoch: u32) -> Self {
        Self { epoch, next: AtomicU32::new(1) }
    }

    /// The reign.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The next stamp.
    pub fn next(&self) -> Result<Stamp, OutOfStamps> {
        let step = |n: u32| n.checked_add(1);
        let n =
            self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).map_err(|_| OutOfStamps)?;
        Ok(Stamp::new(self.epoch, n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_reign_beats_every_write_of_an_earlier_one() {
        assert!(Stamp::new(2, 0) > Stamp::new(1, u32::MAX));
        assert!(Stamp::new(EPOCH_MAX, u32::MAX).as_u64() < 1 << 50);
        assert_eq!(Stamp::new(7, 3).epoch(), 7);
    }

    #[test]
    fn stamps_rise_and_end() {
        let stamps = Stamps::new(1);
        assert!(stamps.next().unwrap() < stamps.next().unwrap());
        stamps.next.store(u32::MAX, Ordering::Relaxed);
        assert_eq!(stamps.next(), Err(OutOfStamps));
    }
}
