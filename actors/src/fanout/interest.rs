//! Which nodes wait for what is published here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::{Semaphore, oneshot};

use super::{Aside, Topic};

/// Topics whose tip is asked at once for nodes that come back to them.
const CHECKS_MAX: usize = 64;
/// How long other nodes are waited for that say who is there.
const GATHER_TIMEOUT: Duration = Duration::from_secs(1);
/// Questions to other nodes that are not answered yet; past it nobody else is asked.
const GATHERS_MAX: usize = 4_096;

/// What comes of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watched {
    /// Everything from here on is published; the log reaches at least here.
    Live(u64),
    /// The topic is not here, as of this version of the map or a later one.
    NotOwner(u64),
    /// How far the log reaches cannot be said now.
    Later,
}

/// The way to an interested node. What is put in comes out in order.
pub trait Outlet: Send + Sync + 'static {
    /// A number of its own.
    fn number(&self) -> u64;

    /// Entries of a log, ascending and without a gap, or one publication without an order (seq 0). What does not fit is
    /// told later as how far the topic reaches. `wire`: what [`Outlet::wire`] made of the topic.
    fn publish(&self, topic: &Topic, wire: &Bytes, entries: &[(u64, Bytes)]);

    /// A topic as it travels.
    fn wire(&self, topic: &Topic) -> Bytes;

    /// Publications of a topic without an order may have been missed.
    fn missed(&self, topic: &Topic);

    /// Answers a registration under an epoch.
    fn watched(&self, topic: &Topic, epoch: u32, outcome: Watched);

    /// Something beside the order.
    fn aside(&self, topic: &Topic, aside: &Aside);

    /// Asks who is there.
    fn who(&self, number: u64, topic: &Topic);
}

struct Interested {
    /// How far the log reaches, once that is known.
    tip: Option<u64>,
    /// The topic as it travels.
    wire: Bytes,
    outlets: Vec<Arc<dyn Outlet>>,
}

/// Which nodes wait for what is published here.
pub struct Interest {
    topics: Mutex<HashMap<Topic, Interested>>,
    any: AtomicUsize,
    checks: Semaphore,
    asked: Mutex<Asked>,
}

#[derive(Default)]
struct Asked {
    last: u64,
    waits: HashMap<u64, oneshot::Sender<String>>,
}

impl Default for Interest {
    fn default() -> Self {
        Self {
            topics: Mutex::default(),
            any: AtomicUsize::new(0),
            checks: Semaphore::new(CHECKS_MAX),
            asked: Mutex::default(),
        }
    }
}

impl Interest {
    fn lock(&self) -> MutexGuard<'_, HashMap<Topic, Interested>> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody elsewhere waits for anything.
    pub fn is_any(&self) -> bool {
        self.any.load(Ordering::Acquire) > 0
    }

    /// Whether anybody elsewhere waits for this.
    pub fn is_watched(&self, topic: &Topic) -> bool {
        self.is_any() && self.lock().contains_key(topic)
    }

    fn change<T>(&self, change: impl FnOnce(&mut HashMap<Topic, Interested>) -> T) -> T {
        let mut topics = self.lock();
        let changed = change(&mut topics);
        self.any.store(topics.len(), Ordering::Release);
        changed
    }

    /// From here on what is published goes there too. Tells whether it did not before.
    pub fn add(&self, topic: &Topic, outlet: &Arc<dyn Outlet>) -> bool {
        self.change(|topics| {
            let at = topics.entry(topic.clone()).or_insert_with(|| {
                let wire = outlet.wire(topic);
                Interested { tip: None, wire, outlets: Vec::new() }
            });
            let is_new = at.outlets.iter().all(|o| o.number() != outlet.number());
            if is_new {
                at.outlets.push(outlet.clone());
            }
            is_new
        })
    }

    /// A node waits for a topic no more.
    pub fn remove(&self, topic: &Topic, number: u64) {
        self.change(|topics| {
            let Some(at) = topics.get_mut(topic) else { return };
            at.outlets.retain(|o| o.number() != number);
            if at.outlets.is_empty() {
                topics.remove(topic);
            }
        });
    }

    /// A node is reached no more this way.
    pub fn forget(&self, number: u64) {
        self.change(|topics| {
            topics.retain(|_, at| {
                at.outlets.retain(|o| o.number() != number);
                !at.outlets.is_empty()
            });
        });
    }

    /// These shards are not here any more: whoever waits registers where they are.
    pub fn close(&self, gone: impl Fn(&Topic) -> bool) {
        if self.is_any() {
            self.change(|topics| topics.retain(|topic, _| !gone(topic)));
        }
    }

    /// A turn to ask how far a log reaches.
    pub(crate) async fn check_turn(&self) -> Option<tokio::sync::SemaphorePermit<'_>> {
        self.checks.acquire().await.ok()
    }

    /// How far a log reaches, if that is known.
    pub(crate) fn tip(&self, topic: &Topic) -> Option<u64> {
        self.lock().get(topic)?.tip
    }

    /// A log reaches at least so far; says so where it was asked, in the order of what is published.
    pub(crate) fn reaches(&self, topic: &Topic, tip: u64, epoch: u32, outlet: &Arc<dyn Outlet>) {
        let mut topics = self.lock();
        let tip = match topics.get_mut(topic) {
            Some(at) => {
                let tip = at.tip.unwrap_or(0).max(tip);
                at.tip = Some(tip);
                tip
            }
            None => tip,
        };
        outlet.watched(topic, epoch, Watched::Live(tip));
    }

    /// Confirmed entries, ascending.
    pub fn entries(&self, topic: &Topic, entries: &[(u64, Bytes)]) {
        if !self.is_any() {
            return;
        }
        let mut topics = self.lock();
        let Some(at) = topics.get_mut(topic) else { return };
        at.tip = entries.last().map(|(seq, _)| *seq).max(at.tip);
        at.outlets.iter().for_each(|outlet| outlet.publish(topic, &at.wire, entries));
    }

    /// A publication without an order.
    pub(crate) fn loose(&self, topic: &Topic, publication: &Bytes) {
        let topics = self.lock();
        let Some(at) = topics.get(topic) else { return };
        let publication = [(0, publication.clone())];
        at.outlets.iter().for_each(|outlet| outlet.publish(topic, &at.wire, &publication));
    }

    /// Something beside the order, from another node or from here.
    pub(crate) fn aside(&self, topic: &Topic, aside: &Aside, from: Option<u64>) {
        if !self.is_any() {
            return;
        }
        let topics = self.lock();
        let Some(at) = topics.get(topic) else { return };
        at.outlets.iter().filter(|o| Some(o.number()) != from).for_each(|outlet| outlet.aside(topic, aside));
    }

    /// Who is there on every interested node. One that does not answer within a second is left out.
    pub(crate) async fn gather(&self, topic: &Topic) -> Vec<String> {
        let mut numbers = Vec::new();
        let answers: Vec<oneshot::Receiver<String>> = {
            let topics = self.lock();
            let mut asked = self.asked();
            let room = GATHERS_MAX.saturating_sub(asked.waits.len());
            let outlets = topics.get(topic).into_iter().flat_map(|at| &at.outlets).take(room);
            outlets
                .map(|outlet| {
                    let (says, answer) = oneshot::channel();
                    asked.last += 1;
                    let number = asked.last;
                    asked.waits.insert(number, says);
                    numbers.push(number);
                    outlet.who(number, topic);
                    answer
                })
                .collect()
        };
        let each = answers.into_iter().map(|answer| tokio::time::timeout(GATHER_TIMEOUT, answer));
        let found = join_all(each).await.into_iter().filter_map(|answer| answer.ok()?.ok()).collect();
        let mut asked = self.asked();
        numbers.iter().for_each(|number| drop(asked.waits.remove(number)));
        found
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node's answer to who is there.
    pub(crate) fn present(&self, number: u64, who: String) {
        if let Some(says) = self.asked().waits.remove(&number) {
            // Whoever asked may have stopped waiting.
            let _ = says.send(who);
        }
    }
}
