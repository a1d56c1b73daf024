//! What several share, each no more than its part: a semaphore for every name, for as long as somebody holds it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Past so many names, and then past twice those that are held, the others are let go of.
const SHARES_LOOK: usize = 1024;

/// Semaphores by name.
pub struct Shares<K> {
    held: Mutex<Held<K>>,
    fresh: fn() -> Semaphore,
}

struct Held<K> {
    shares: HashMap<K, Weak<Semaphore>>,
    look: usize,
}

impl<K: Eq + Hash> Shares<K> {
    /// Each name's semaphore begins as `fresh` makes it.
    pub fn new(fresh: fn() -> Semaphore) -> Self {
        Self { held: Mutex::new(Held { shares: HashMap::new(), look: SHARES_LOOK }), fresh }
    }

    /// The semaphore of a name.
    pub fn of(&self, key: K) -> Arc<Semaphore> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.shares.len() >= held.look {
            held.shares.retain(|_, share| share.strong_count() > 0);
            held.look = SHARES_LOOK.max(held.shares.len() * 2);
        }
        let at = held.shares.entry(key).or_default();
        at.upgrade().unwrap_or_else(|| {
            let share = Arc::new((self.fresh)());
            *at = Arc::downgrade(&share);
            share
        })
    }

    /// A place of a name, if it has one left.
    pub fn take(&self, key: K) -> Option<OwnedSemaphorePermit> {
        self.of(key).try_acquire_owned().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_part_and_nobody_is_kept_who_holds_none() {
        let shares = Shares::new(|| Semaphore::new(2));
        let (first, second) = (shares.take(0), shares.take(0));
        assert!(first.is_some() && second.is_some() && shares.take(0).is_none());
        assert!(shares.take(1).is_some(), "another's");
        drop(first);
        assert!(shares.take(0).is_some(), "given back");
        (2..10_000).for_each(|n| drop(shares.take(n)));
        assert!(shares.held.lock().unwrap().shares.len() <= SHARES_LOOK);
    }
}
