//! What gives way when memory is short: caches are emptied and whoever has nothing to do is forgotten. Only when that
//! is not enough, and many still have something to do, nobody else is let in.

use std::sync::{Arc, Mutex, PoisonError, Weak};

/// How much of its bound a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Memory {
    /// There is room.
    Enough,
    /// Near the bound: what can be forgotten is.
    Short,
    /// More than the bound.
    Spent,
}

/// Tells how much memory is held.
pub type Gauge = Box<dyn Fn() -> Memory + Send + Sync>;

/// Something that can be read again.
pub trait Cache: Send + Sync {
    /// Forgets it.
    fn shrink(&self);
}

/// The caches of a node.
#[derive(Default)]
pub struct Caches(Mutex<Vec<Weak<dyn Cache>>>);

impl Caches {
    /// One more, for as long as it lives.
    pub fn add(&self, cache: &Arc<impl Cache + 'static>) {
        let cache: Weak<dyn Cache> = Arc::downgrade(&(cache.clone() as Arc<dyn Cache>));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(cache);
    }

    /// Empties all of them.
    pub fn shrink(&self) {
        let mut caches = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        caches.retain(|c| c.strong_count() > 0);
        caches.iter().filter_map(Weak::upgrade).for_each(|c| c.shrink());
    }
}
