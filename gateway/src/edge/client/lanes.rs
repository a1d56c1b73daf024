//! Commands of one connection that name the same conversation take effect in the order sent, also pipelined in one
//! frame; replies may come in any order.
//!
//! A command's first half (permission, handing over) runs in its lane, one after another; what is then waited for
//! runs beside. So many sends of one conversation go out as one append, in order.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

/// Something that ends in `T`.
pub type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What the first half of a command comes to.
pub enum Half<T> {
    /// It is done.
    Done(T),
    /// It is handed over, and this is waited for.
    Handed(Later<T>),
}

enum Event<T> {
    First(Option<String>, Half<T>),
    Second(T),
}

/// The commands under way of one connection.
pub struct Lanes<T> {
    running: FuturesUnordered<Later<Event<T>>>,
    /// Commands that wait behind one in the same lane. A lane that is there is busy.
    waiting: HashMap<String, VecDeque<Later<Half<T>>>>,
    count: usize,
}

impl<T: Send + 'static> Default for Lanes<T> {
    fn default() -> Self {
        Self { running: FuturesUnordered::new(), waiting: HashMap::new(), count: 0 }
    }
}

impl<T: Send + 'static> Lanes<T> {
    /// How many are under way or wait.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Starts a command, behind those of its lane.
    pub fn start(&mut self, lane: Option<String>, first: Later<Half<T>>) {
        self.count += 1;
        match lane {
            Some(lane) => match self.waiting.get_mut(&lane) {
                Some(waiting) => waiting.push_back(first),
                None => {
                    self.waiting.insert(lane.clone(), VecDeque::new());
                    self.run(Some(lane), first);
                }
            },
            None => self.run(None, first),
        }
    }

    fn run(&mut self, lane: Option<String>, first: Later<Half<T>>) {
        self.running.push(Box::pin(async move { Event::First(lane, first.await) }));
    }

    /// The next command that is done.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<T> {
        loop {
            match self.running.poll_next_unpin(cx) {
                Poll::Ready(Some(Event::Second(done))) => {
                    self.count -= 1;
                    return Poll::Ready(done);
                }
                Poll::Ready(Some(Event::First(lane, half))) => {
                    if let Some(lane) = lane {
                        self.next_in(lane);
                    }
                    match half {
                        Half::Done(done) => {
                            self.count -= 1;
                            return Poll::Ready(done);
                        }
                        Half::Handed(later) => {
                            self.running.push(Box::pin(async move { Event::Second(later.await) }))
                        }
                    }
                }
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn next_in(&mut self, lane: String) {
        match self.waiting.get_mut(&lane).and_then(VecDeque::pop_front) {
            Some(first) => self.run(Some(lane), first),
            None => {
                self.waiting.remove(&lane);
            }
        }
        if self.waiting.is_empty() {
            // Most sockets ask nothing most of the time.
            self.waiting = HashMap::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn first_halves_of_a_lane_run_in_order_and_second_halves_side_by_side() {
        let mut lanes: Lanes<u32> = Lanes::default();
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut open = Vec::new();
        for n in 0..3u32 {
            let (tx, rx) = oneshot::channel::<()>();
            let (gate_tx, gate_rx) = oneshot::channel::<()>();
            let order = order.clone();
            lanes.start(
                Some("a".into()),
                Box::pin(async move {
                    let _ = gate_rx.await;
                    order.lock().unwrap().push(n);
                    Half::Handed(Box::pin(async move {
                        let _ = rx.await;
                        n
                    }) as Later<u32>)
                }),
            );
            open.push((gate_tx, Some(tx)));
        }
        // Gates open in the wrong order: the lane keeps its own.
        let mut senders = Vec::new();
        for (gate, tx) in open.into_iter().rev() {
            let _ = gate.send(());
            senders.push(tx);
        }
        // The last one is answered first.
        let _ = senders[0].take().unwrap().send(());
        let first = std::future::poll_fn(|cx| lanes.poll_next(cx)).await;
        assert_eq!(first, 2);
        assert_eq!(*order.lock().unwrap(), [0, 1, 2]);
        assert_eq!(lanes.len(), 2);
    }
}
