//! Which entities wrote in which bucket of a shard, so that a successor finds what is not yet derived and handed on.
//!
//! Buckets are numbered by the owner, never by a clock; the next one begins after [`BUCKET_ROWS`] rows or
//! [`BUCKET_AGE`], and no row goes into bucket k+1 before one row of k is answered: a sweep reads each epoch up to its
//! first empty bucket. A bucket is settled when every append begun in it is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use patchbay_protocol::Timestamp;
use patchbay_protocol::ids::EntityId;
use patchbay_storage::ReadError;
use patchbay_storage::tables::{Mark, Tables};

use super::Reign;
use crate::clock::Clock;

/// Rows of one bucket.
pub const BUCKET_ROWS: usize = 1024;
/// Parts of a bucket's age over which the first buckets of shards are spread.
const SPREAD: u32 = 64;
/// Age of one bucket.
pub const BUCKET_AGE: Duration = Duration::from_secs(10);

struct Shard {
    bucket: u64,
    opened: Timestamp,
    /// Entities with an answered row in the present bucket.
    written: HashSet<[u8; 16]>,
    /// Rows begun in the present bucket.
    begun: usize,
    /// Unsettled appends by bucket.
    open: BTreeMap<u64, usize>,
    /// Buckets below are settled.
    settled: u64,
}

impl Shard {
    fn settle(&mut self, bucket: u64, n: usize) {
        if let Some(open) = self.open.get_mut(&bucket) {
            *open = open.saturating_sub(n);
            if *open == 0 {
                self.open.remove(&bucket);
            }
        }
    }
}

/// The activity of one reign of a shard.
pub struct ActivityLog {
    epoch: u32,
    clock: Clock,
    shard: Arc<Mutex<Shard>>,
}

/// An append that is begun and not yet settled.
pub struct Ticket {
    shard: Arc<Mutex<Shard>>,
    /// The bucket that it was begun in.
    pub bucket: Mark,
    /// Whether the entity's row of this bucket has to be written first.
    pub needs_row: bool,
    entity: [u8; 16],
    /// Whether its events hold the bucket beside it, until the outbox settles them.
    events: bool,
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl ActivityLog {
    /// A reign without activity.
    pub fn new(shard: u32, epoch: u32, clock: Clock) -> Self {
        let now = clock.now();
        // Buckets of different shards do not begin together: each begins with a write before an ack.
        let spread = BUCKET_AGE.as_millis() as i64;
        let fresh = Shard {
            bucket: 0,
            opened: Timestamp::from_millis(
                now.as_millis() - spread * i64::from(shard % SPREAD) / i64::from(SPREAD),
            ),
            written: HashSet::new(),
            begun: 0,
            open: BTreeMap::new(),
            settled: 0,
        };
        Self { epoch, clock, shard: Arc::new(Mutex::new(fresh)) }
    }

    /// Begins an append of `entity`.
    pub fn begin(&self, entity: [u8; 16]) -> Ticket {
        let mut s = lock(&self.shard);
        let now = self.clock.now();
        let full = s.begun >= BUCKET_ROWS || now.since(s.opened) >= BUCKET_AGE;
        if full && !s.written.is_empty() {
            s.bucket += 1;
            s.opened = now;
            s.written.clear();
            s.begun = 0;
        }
        let needs_row = !s.written.contains(&entity);
        s.begun += usize::from(needs_row);
        let bucket = s.bucket;
        *s.open.entry(bucket).or_default() += 1;
        drop(s);
        let bucket = Mark { epoch: self.epoch, bucket };
        Ticket { shard: self.shard.clone(), bucket, needs_row, entity, events: false }
    }

    /// Another reason for a bucket not to be settled, until [`Self::settle`].
    pub fn hold(&self, bucket: u64) {
        *lock(&self.shard).open.entry(bucket).or_default() += 1;
    }

    /// `n` reasons less.
    pub fn settle(&self, bucket: u64, n: u32) {
        lock(&self.shard).settle(bucket, n as usize);
    }

    /// The bucket that appends are begun in now; none: there was no append yet.
    fn present(&self) -> Option<u64> {
        let s = lock(&self.shard);
        (s.bucket > 0 || s.begun > 0).then_some(s.bucket)
    }

    /// Whether everything that was begun is settled.
    pub fn is_settled(&self) -> bool {
        lock(&self.shard).open.is_empty()
    }

    /// Ends the present bucket when everything in the shard is settled: nobody will write any more.
    pub fn close(&self) -> Option<(u64, Mark)> {
        {
            let mut s = lock(&self.shard);
            if s.begun > 0 && s.open.is_empty() {
                s.bucket += 1;
                s.written.clear();
                s.begun = 0;
            }
        }
        self.newly_settled()
    }

    /// How far the shard is settled, when that has moved since it was last asked, and from where.
    pub fn newly_settled(&self) -> Option<(u64, Mark)> {
        let mut s = lock(&self.shard);
        let lowest_open = s.open.keys().next().copied().unwrap_or(s.bucket);
        let settled = lowest_open.min(s.bucket);
        if settled <= s.settled {
            return None;
        }
        let before = std::mem::replace(&mut s.settled, settled);
        Some((before, Mark { epoch: self.epoch, bucket: settled }))
    }
}

/// Every entity with activity of a shard above `mark` in these epochs, with its lowest seq there.
///
/// An earlier epoch ends at its first empty bucket; this one's present bucket is known.
pub async fn unsettled(
    tables: &Tables,
    reign: &Reign,
    mark: Option<Mark>,
    epochs: impl IntoIterator<Item = u32>,
) -> Result<HashMap<EntityId, u64>, ReadError> {
    let mut found: HashMap<EntityId, u64> = HashMap::new();
    for epoch in epochs {
        let first = match mark {
            Some(mark) if mark.epoch > epoch => continue,
            Some(mark) if mark.epoch == epoch => mark.bucket,
            Some(_) | None => 0,
        };
        let ours = epoch == reign.epoch();
        let last = match reign.activity.present() {
            Some(present) if ours => present,
            None if ours => continue,
            Some(_) | None => u64::MAX,
        };
        for bucket in first..=last {
            let rows = tables.activity(reign.shard, Mark { epoch, bucket }).await?;
            if rows.is_empty() && !ours {
                break;
            }
            for row in rows {
                let lowest = found.entry(row.entity).or_insert(row.lowest);
                *lowest = row.lowest.min(*lowest);
            }
        }
    }
    Ok(found)
}

impl Ticket {
    /// The entity's row of this bucket is durable.
    pub fn row_written(&self) {
        let mut s = lock(&self.shard);
        if s.bucket == self.bucket.bucket {
            s.written.insert(self.entity);
        }
    }

    /// Its events are another reason for its bucket not to be settled: the outbox says when they are published.
    pub fn hold_events(&mut self) {
        self.events = true;
        *lock(&self.shard).open.entry(self.bucket.bucket).or_default() += 1;
    }

    /// The append was refused: nothing follows from it, and nothing will be published.
    pub fn withdraw(self) {
        lock(&self.shard).settle(self.bucket.bucket, 1 + usize::from(self.events));
    }

    /// Everything that follows from the append is durable and handed on. A ticket that is dropped without this (its
    /// actor died) keeps the mark where it is.
    pub fn settle(self) {
        lock(&self.shard).settle(self.bucket.bucket, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_bucket_is_settled_when_every_append_begun_in_it_is() {
        let log = ActivityLog::new(0, 1, Clock::from(Timestamp::from_seconds(0)));
        let first = log.begin([1; 16]);
        assert!(first.needs_row);
        tokio::time::advance(BUCKET_AGE).await;
        let early = log.begin([2; 16]);
        assert_eq!(early.bucket.bucket, 0, "no row of bucket 0 is answered yet");
        first.row_written();
        let next = log.begin([1; 16]);
        assert_eq!((next.bucket.bucket, next.needs_row), (1, true));
        assert_eq!(log.newly_settled(), None);
        first.settle();
        assert_eq!(log.newly_settled(), None, "one is still open");
        early.settle();
        assert_eq!(log.newly_settled(), Some((0, Mark { epoch: 1, bucket: 1 })));
        assert_eq!(log.newly_settled(), None);
    }
}
