//! Durable timers: what comes due wakes its entity, whoever owns it then. The rows are the truth; this is their
//! order in memory for the present hour and the next.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use patchbay_protocol::Timestamp;
use patchbay_protocol::ids::EntityId;
use patchbay_storage::tables::Timer;
use tokio::sync::Notify;

/// What waits.
#[derive(Default)]
pub struct Timers {
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Default)]
struct Inner {
    due: BTreeSet<(Timestamp, EntityId)>,
    /// Shards that have ever armed a timer in this reign: their mark is durable.
    marked: HashSet<u32>,
}

impl Timers {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a timer whose row is durable.
    pub fn arm(&self, timer: Timer) {
        self.lock().due.insert((timer.due, timer.entity));
        self.changed.notify_one();
    }

    /// Takes everything that is due at `now`.
    pub fn take_due(&self, now: Timestamp) -> Vec<EntityId> {
        let mut inner = self.lock();
        let mut due = Vec::new();
        while inner.due.first().is_some_and(|(at, _)| *at <= now) {
            due.extend(inner.due.pop_first().map(|(_, entity)| entity));
        }
        due
    }

    /// When the next one is due.
    pub fn next_due(&self) -> Option<Timestamp> {
        self.lock().due.first().map(|(at, _)| *at)
    }

    /// Returns when a timer was added.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Whether the shard's mark still has to be written before its first timer.
    pub fn needs_mark(&self, shard: u32) -> bool {
        !self.lock().marked.contains(&shard)
    }

    /// The shard's mark is durable.
    pub fn marked(&self, shard: u32) {
        self.lock().marked.insert(shard);
    }

    /// Shards with timers.
    pub fn marked_shards(&self) -> Vec<u32> {
        self.lock().marked.iter().copied().collect()
    }
}
