//! How much may be under way at once: as much as the store takes, found by trying.
//!
//! Each answer opens the window a little, each sign of overload halves it. Whoever finds no place waits for one, so
//! that an overloaded store is asked less, and what waits is bounded by the entities' own queues.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// However overloaded, so many are tried.
const WINDOW_MIN: usize = 8;
/// Signs that come together are one sign.
const HALVE_PAUSE: Duration = Duration::from_millis(500);

/// The window of one kind of request.
#[derive(Debug)]
pub(super) struct Pressure {
    places: Arc<Semaphore>,
    max: usize,
    /// Places that there are now, and those of them to be taken away when they are given back.
    window: AtomicUsize,
    surplus: AtomicUsize,
    answers: AtomicUsize,
    started: Instant,
    /// Milliseconds after `started` of the last halving.
    halved: AtomicUsize,
}

/// A place; given back when dropped.
pub(super) struct Place {
    pressure: Arc<Pressure>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Pressure {
    pub(super) fn new(max: usize) -> Arc<Self> {
        // As configured (`storage.scylla.writes_max`, `reads_max`).
        let places = Arc::new(Semaphore::new(0));
        places.add_permits(max);
        Arc::new(Self {
            places,
            max,
            window: AtomicUsize::new(max),
            surplus: AtomicUsize::new(0),
            answers: AtomicUsize::new(0),
            started: Instant::now(),
            halved: AtomicUsize::new(0),
        })
    }

    /// A place, as soon as there is one.
    pub(super) async fn place(self: &Arc<Self>) -> Place {
        // The semaphore is never closed.
        let permit = self.places.clone().acquire_owned().await.ok();
        Place { pressure: self.clone(), permit }
    }

    /// Places that there are now.
    pub(super) fn window(&self) -> usize {
        self.window.load(Ordering::Relaxed)
    }

    /// The store has answered.
    pub(super) fn answered(&self) {
        let window = self.window();
        if window < self.max && self.answers.fetch_add(1, Ordering::Relaxed) + 1 >= window {
            self.answers.store(0, Ordering::Relaxed);
            self.window.fetch_add(1, Ordering::Relaxed);
            self.places.add_permits(1);
        }
    }

    /// The store says that it has too much to do, or says nothing in time.
    pub(super) fn overloaded(&self) {
        metrics::counter!("patchbay_storage_overloads_total").increment(1);
        let now = usize::try_from(self.started.elapsed().as_millis()).unwrap_or(usize::MAX).max(1);
        let last = self.halved.load(Ordering::Relaxed);
        let soon = last > 0 && now - last < HALVE_PAUSE.as_millis() as usize;
        if soon || self.halved.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
        let window = self.window();
        let less = (window / 2).max(WINDOW_MIN.min(self.max));
        self.window.store(less, Ordering::Relaxed);
        let taken = self.places.forget_permits(window - less);
        self.surplus.fetch_add(window - less - taken, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let take = |n: usize| n.checked_sub(1);
        let surplus = &self.pressure.surplus;
        if surplus.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn overload_halves_the_window_and_answers_open_it_again() {
        let pressure = Pressure::new(64);
        let mut held = Vec::new();
        for _ in 0..64 {
            held.push(pressure.place().await);
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        pressure.overloaded();
        pressure.overloaded();
        assert_eq!(pressure.window(), 32, "signs that come together are one");
        held.truncate(32);
        assert_eq!(pressure.places.available_permits(), 0, "those that came back are gone");
        drop(held);
        assert_eq!(pressure.places.available_permits(), 32);
        for _ in 0..10 {
            tokio::time::advance(Duration::from_secs(1)).await;
            pressure.overloaded();
        }
        assert_eq!((pressure.window(), pressure.places.available_permits()), (WINDOW_MIN, WINDOW_MIN));
        for _ in 0..10_000 {
            pressure.answered();
        }
        assert_eq!((pressure.window(), pressure.places.available_permits()), (64, 64));
    }
}
