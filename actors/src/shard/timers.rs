//! Durable timers: what comes due wakes its entity, whoever owns it then. The rows are the truth; this is their
//! order in memory for the present hour and the next, and how far each shard's mark may move: it leaves an hour only
//! when no write into that hour is unanswered and everything that fired from it is acked by its entity.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use patchbay_protocol::Timestamp;
use patchbay_protocol::ids::EntityId;
use patchbay_storage::tables::{Timer, hour_of};
use tokio::sync::Notify;

/// What waits.
#[derive(Default)]
pub struct Timers {
    inner: Mutex<Inner>,
    changed: Notify,
    /// The last hour whose rows are read.
    read_up_to: AtomicI64,
}

#[derive(Default)]
struct Inner {
    due: BTreeSet<(Timestamp, EntityId)>,
    /// Shards that have ever armed a timer in this reign.
    shards: HashMap<u32, Shard>,
}

#[derive(Default)]
struct Shard {
    /// Every hour before this one is done with.
    mark: i64,
    /// Whether that is durable.
    marked: bool,
    /// Hours that something is under way in.
    held: BTreeMap<i64, usize>,
}

/// Keeps a shard's mark from leaving an hour.
pub struct Hold {
    timers: Arc<Timers>,
    shard: u32,
    hour: i64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut inner = self.timers.lock();
        let Some(shard) = inner.shards.get_mut(&self.shard) else { return };
        if let Some(count) = shard.held.get_mut(&self.hour) {
            *count -= 1;
            if *count == 0 {
                shard.held.remove(&self.hour);
            }
        }
    }
}

impl Timers {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a timer whose row is durable. One of an hour that is not read yet is found when it is.
    pub fn arm(&self, timer: Timer) {
        if hour_of(timer.due) > self.read_up_to.load(Ordering::Acquire) {
            return;
        }
        self.lock().due.insert((timer.due, timer.entity));
        self.changed.notify_one();
    }

    /// Rows of hours up to this one are about to be read: whatever is armed in them from here on is kept as well.
    pub fn reads_up_to(&self, hour: i64) {
        self.read_up_to.fetch_max(hour, Ordering::AcqRel);
    }

    /// Takes everything that is due at `now`.
    pub fn take_due(&self, now: Timestamp) -> Vec<Timer> {
        let mut inner = self.lock();
        let mut due = Vec::new();
        while inner.due.first().is_some_and(|(at, _)| *at <= now) {
            due.extend(inner.due.pop_first().map(|(due, entity)| Timer { entity, due }));
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

    /// The hour that a timer's row lies in, held until its write is answered or it has fired and is acked. One that
    /// is due before the mark lies in the mark's hour, also when the clock was set back.
    pub fn hold(self: &Arc<Self>, shard: u32, due: Timestamp, now: Timestamp) -> (i64, Hold) {
        let mut inner = self.lock();
        let at = inner.shards.entry(shard).or_default();
        if !at.marked {
            at.mark = at.mark.max(hour_of(now));
        }
        let hour = hour_of(due).max(at.mark);
        *at.held.entry(hour).or_default() += 1;
        drop(inner);
        (hour, Hold { timers: self.clone(), shard, hour })
    }

    /// The shard's mark when it still has to be written before its first timer.
    pub fn first_mark(&self, shard: u32) -> Option<i64> {
        self.lock().shards.get(&shard).filter(|s| !s.marked).map(|s| s.mark)
    }

    /// The shard's mark is durable.
    pub fn marked(&self, shard: u32, mark: i64) {
        let mut inner = self.lock();
        let at = inner.shards.entry(shard).or_default();
        (at.mark, at.marked) = (at.mark.max(mark), true);
    }

    /// Shards with timers.
    pub fn marked_shards(&self) -> Vec<u32> {
        self.lock().shards.iter().filter(|(_, s)| s.marked).map(|(shard, _)| *shard).collect()
    }

    /// A shard is another node's now: whatever of it waits, waits there.
    pub fn forget(&self, shard: u32, count: u32) {
        let mut inner = self.lock();
        inner.due.retain(|(_, entity)| entity.shard(count) != shard);
        inner.shards.remove(&shard);
    }

    /// The last hour whose rows are read, or are about to be.
    pub fn read_up_to(&self) -> i64 {
        self.read_up_to.load(Ordering::Acquire)
    }

    /// Shards whose mark may move, from where to where, in the hour `present`.
    pub fn movable(&self, present: i64) -> Vec<(u32, i64, i64)> {
        let inner = self.lock();
        let moves = inner.shards.iter().filter(|(_, s)| s.marked).map(|(shard, s)| {
            let held = s.held.keys().next().copied().unwrap_or(present);
            (*shard, s.mark, held.min(present))
        });
        moves.filter(|(_, from, to)| to > from).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3600;

    #[test]
    fn a_mark_leaves_an_hour_when_nothing_is_under_way_in_it() {
        let timers = Arc::new(Timers::default());
        let at = |hour: i64| Timestamp::from_seconds(hour * HOUR + 1);
        let (hour, write) = timers.hold(3, at(12), at(10));
        assert_eq!((hour, timers.first_mark(3)), (12, Some(10)));
        timers.marked(3, 10);
        assert_eq!(timers.first_mark(3), None);
        assert_eq!(timers.movable(11), [(3, 10, 11)]);
        timers.marked(3, 11);
        assert_eq!(timers.movable(15), [(3, 11, 12)], "its write is not answered yet");
        drop(write);
        let (_, fired) = timers.hold(3, at(12), at(15));
        assert_eq!(timers.movable(15), [(3, 11, 12)], "it has fired and is not acked");
        drop(fired);
        assert_eq!(timers.movable(15), [(3, 11, 15)]);
        timers.marked(3, 15);
        // The clock is set back: what is armed now is still found by whoever reads from the mark on.
        let (hour, _write) = timers.hold(3, at(9), at(8));
        assert_eq!(hour, 15);
        assert!(timers.movable(8).is_empty(), "a mark never goes back");
    }
}
