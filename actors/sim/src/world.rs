//! What everything in a world shares: its time, its chances, what is still to happen, and what went wrong first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::random::Random;

type Event = Box<dyn FnOnce() + Send>;

struct Due {
    at: u64,
    n: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.n) == (other.at, other.n)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.n).cmp(&(other.at, other.n))
    }
}

struct Inner {
    now: u64,
    n: u64,
    random: Random,
    due: BinaryHeap<Reverse<Due>>,
    failure: Option<String>,
    calm: bool,
    tells: bool,
    /// Of everything that was told: two runs of one seed are the same.
    print: blake3::Hasher,
}

/// A world. Its time is in milliseconds from its beginning.
#[derive(Clone)]
pub(crate) struct World(Arc<Mutex<Inner>>);

pub(crate) fn lock<T: ?Sized>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// Where everything follows from `seed`; `tells`: its story is printed.
    pub(crate) fn new(seed: u64, tells: bool) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            now: 0,
            n: 0,
            random: Random::new(seed),
            due: BinaryHeap::new(),
            failure: None,
            calm: false,
            tells,
            print: blake3::Hasher::new(),
        })))
    }

    pub(crate) fn now(&self) -> u64 {
        lock(&self.0).now
    }

    /// Moves time on, and lets happen what is due.
    pub(crate) fn advance(&self, to: u64) {
        loop {
            let event = {
                let mut inner = lock(&self.0);
                match inner.due.peek() {
                    Some(Reverse(due)) if due.at <= to => {
                        inner.now = due.at.max(inner.now);
                        inner.due.pop().map(|Reverse(due)| due.event)
                    }
                    _ => {
                        inner.now = to;
                        return;
                    }
                }
            };
            // It may ask the world for more.
            if let Some(event) = event {
                event();
            }
        }
    }

    /// Lets something happen so many milliseconds from now.
    pub(crate) fn after(&self, ms: u64, event: impl FnOnce() + Send + 'static) {
        let mut inner = lock(&self.0);
        let (at, n) = (inner.now + ms, inner.n);
        inner.n += 1;
        inner.due.push(Reverse(Due { at, n, event: Box::new(event) }));
    }

    pub(crate) fn between(&self, low: u64, high: u64) -> u64 {
        lock(&self.0).random.between(low, high)
    }

    pub(crate) fn chance(&self, in_a_thousand: u64) -> bool {
        lock(&self.0).random.chance(in_a_thousand)
    }

    /// The same, of something that goes wrong: nothing does any more when it is calm.
    pub(crate) fn mishap(&self, in_a_thousand: u64) -> bool {
        let mut inner = lock(&self.0);
        let happens = inner.random.chance(in_a_thousand);
        happens && !inner.calm
    }

    /// From here on nothing goes wrong by itself.
    pub(crate) fn calm(&self) {
        lock(&self.0).calm = true;
    }

    pub(crate) fn is_calm(&self) -> bool {
        lock(&self.0).calm
    }

    /// What must not be. The first counts.
    pub(crate) fn fail(&self, why: impl FnOnce() -> String) {
        let mut inner = lock(&self.0);
        if inner.failure.is_none() {
            let why = format!("{} ms: {}", inner.now, why());
            inner.failure = Some(why);
        }
    }

    pub(crate) fn failure(&self) -> Option<String> {
        lock(&self.0).failure.clone()
    }

    /// Part of the story.
    pub(crate) fn tell(&self, what: impl FnOnce() -> String) {
        let mut inner = lock(&self.0);
        let line = format!("{:>6} {}", inner.now, what());
        inner.print.update(line.as_bytes());
        if inner.tells {
            println!("{line}");
        }
    }

    /// A print of the whole story.
    pub(crate) fn print(&self) -> String {
        lock(&self.0).print.finalize().to_hex().chars().take(12).collect()
    }
}
