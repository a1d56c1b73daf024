//! What this node's own sockets wait for, wherever it is published.
//!
//! Each topic is registered with the owner of its shard, under that owner's epoch. Another owner, another epoch or a
//! link that broke means: register again, and be told how far the topic reaches. Registrations are renewed every
//! [`RENEW_EVERY`], so that one that was lost without anybody's notice silences a socket no longer than that. A topic
//! that no owner could be told of for [`LOST_AFTER`] is closed towards its sockets, which come back with their position.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use patchbay_protocol::CommandError;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::{Topic, Watched};
use crate::cluster::map::Incarnation;
use crate::ports::Publisher;

/// Every registration is renewed once in this time.
pub const RENEW_EVERY: Duration = Duration::from_secs(10);
/// Between two renewals, each of a part of them.
const RENEW_STEP: Duration = Duration::from_secs(1);
/// A topic without an owner that could be told is closed after this.
pub const LOST_AFTER: Duration = Duration::from_secs(5);
/// A subscription waits so long for its topic to be registered.
const READY_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two tries of what could not be registered, when nothing says that it can be now.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Where a topic is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    /// By whom.
    pub who: Incarnation,
    /// Under which epoch.
    pub epoch: u32,
}

/// What this has to know of its node.
pub trait Far: Send + Sync + 'static {
    /// This node, at present.
    fn me(&self) -> Incarnation;

    /// Where a topic is published, as far as that is known here; and its shard.
    fn home(&self, topic: &Topic) -> (u32, Option<Home>);

    /// Registers with another node, or renews that. False: it cannot be told now.
    fn register(&self, at: Home, topic: &Topic, check: bool) -> bool;

    /// Takes a registration back, if the other node can be told.
    fn withdraw(&self, at: Incarnation, topic: &Topic);

    /// A shard came here under this epoch, whose log may reach further than was shown: says it to `watches`.
    fn check_here(&self, at: Home, topic: &Topic);

    /// A newer version of the map was heard of.
    fn heard(&self, version: u64);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Its owner does not know, since then.
    Nowhere(Instant),
    /// Its owner was told, and has not answered; since when nobody knows.
    Asked(Home, Instant),
    Held(Home),
}

impl At {
    fn home(self) -> Option<Home> {
        match self {
            Self::Nowhere(_) => None,
            Self::Asked(home, _) | Self::Held(home) => Some(home),
        }
    }

    fn since(self) -> Instant {
        match self {
            Self::Nowhere(since) | Self::Asked(_, since) => since,
            Self::Held(_) => Instant::now(),
        }
    }
}

struct Watch {
    shard: u32,
    at: At,
    /// It was registered before: something may have been missed.
    check: bool,
    waits: Vec<oneshot::Sender<()>>,
}

impl Watch {
    /// Its owner has to be told, and asked whether something was missed.
    fn unsettle(&mut self) {
        self.at = At::Nowhere(self.at.since());
        self.check = true;
    }

    /// Lets go on who waits. Whoever has stopped waiting need not hear it.
    fn let_go_on(&mut self) {
        self.waits.drain(..).for_each(|says| {
            let _ = says.send(());
        });
    }
}

#[derive(Default)]
struct Inner {
    topics: HashMap<Topic, Watch>,
    /// Topics that are to be registered.
    todo: VecDeque<Topic>,
    /// Topics whose owner could not say how far they reach, or is not the owner yet, and when it is asked again.
    later: VecDeque<(Instant, Topic)>,
    /// The map has changed, or what is open here.
    moved: bool,
}

/// What this node's sockets wait for.
pub struct Watches {
    inner: Mutex<Inner>,
    wake: Notify,
    /// Nobody else can be in the cluster.
    alone: bool,
    far: Weak<dyn Far>,
    publisher: Arc<dyn Publisher>,
}

impl Watches {
    /// Of the sockets that `publisher` shows things to.
    pub fn new(publisher: Arc<dyn Publisher>, far: Weak<dyn Far>, alone: bool) -> Arc<Self> {
        let watches = Arc::new(Self { inner: Mutex::default(), wake: Notify::new(), alone, far, publisher });
        if !alone {
            tokio::spawn(run(Arc::downgrade(&watches)));
        }
        watches
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Topics that are waited for here.
    pub fn len(&self) -> usize {
        self.lock().topics.len()
    }

    /// Whether nothing is waited for here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Somebody here waits for a topic that nobody waited for.
    pub fn begin(&self, topic: &Topic) {
        let Some(far) = self.far.upgrade().filter(|_| !self.alone) else { return };
        let mut inner = self.lock();
        let (shard, _) = far.home(topic);
        let at = At::Nowhere(Instant::now());
        inner.topics.insert(topic.clone(), Watch { shard, at, check: false, waits: Vec::new() });
        if !inner.register(topic, &*far) {
            inner.todo.push_back(topic.clone());
            self.wake.notify_one();
        }
    }

    /// Nobody here waits for it any more.
    pub fn end(&self, topic: &Topic) {
        let Some(far) = self.far.upgrade().filter(|_| !self.alone) else { return };
        let mut inner = self.lock();
        let home = inner.topics.remove(topic).and_then(|watch| watch.at.home());
        if let Some(home) = home.filter(|home| home.who != far.me()) {
            far.withdraw(home.who, topic);
        }
    }

    /// Waits until everything that is published of a topic from here on is shown here.
    pub async fn ready(&self, topic: &Topic) -> Result<(), CommandError> {
        let answer = {
            let mut inner = self.lock();
            let Some(watch) = inner.topics.get_mut(topic).filter(|w| !matches!(w.at, At::Held(_))) else {
                return Ok(());
            };
            let (says, answer) = oneshot::channel();
            watch.waits.push(says);
            answer
        };
        match tokio::time::timeout(READY_TIMEOUT, answer).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => {
                // Whoever does not wait any more may have read up to somewhere meanwhile: it is asked again, how far it
                // reaches as well.
                let mut inner = self.lock();
                if let Some(watch) = inner.topics.get_mut(topic).filter(|w| !matches!(w.at, At::Held(_))) {
                    let was_asked = matches!(watch.at, At::Asked(..));
                    watch.unsettle();
                    if was_asked {
                        inner.todo.push_back(topic.clone());
                        self.wake.notify_one();
                    }
                }
                Err(CommandError::unavailable())
            }
        }
    }

    /// The map has changed, or what is open here.
    pub fn moved(&self) {
        if !self.alone {
            self.lock().moved = true;
            self.wake.notify_one();
        }
    }

    /// A node can be reached that could not be.
    pub fn reached(&self) {
        self.wake.notify_one();
    }

    /// The way to a node is gone, for some shards: what was registered there may have been lost.
    pub fn cut(&self, who: Incarnation, shards: impl Fn(u32) -> bool) {
        let gone = |watch: &Watch| watch.at.home().is_some_and(|home| home.who == who) && shards(watch.shard);
        self.lock().unsettle(|_, watch| gone(watch));
        self.wake.notify_one();
    }

    /// What came of a registration.
    pub fn watched(&self, home: Home, topic: &Topic, outcome: Watched) {
        let mut inner = self.lock();
        let Some(watch) = inner.topics.get_mut(topic).filter(|w| w.at.home() == Some(home)) else { return };
        match outcome {
            Watched::Live(tip) => {
                watch.at = At::Held(home);
                watch.check = false;
                watch.let_go_on();
                drop(inner);
                if let Topic::Conversation(id) = topic {
                    self.publisher.reaches(*id, tip);
                }
            }
            Watched::NotOwner(_) | Watched::Later => {
                watch.unsettle();
                // One that is about to go, or to come, answers at once, and would be asked as fast as it does.
                inner.later.push_back((Instant::now() + RETRY_PAUSE, topic.clone()));
                drop(inner);
                if let (Watched::NotOwner(version), Some(far)) = (outcome, self.far.upgrade()) {
                    far.heard(version);
                }
                self.wake.notify_one();
            }
        }
    }

    /// Something came that is published elsewhere. If nobody waits for it here its owner is told so again.
    pub fn check_wanted(&self, from: Incarnation, topic: &Topic) {
        let wanted = self.lock().topics.contains_key(topic);
        if !wanted && let Some(far) = self.far.upgrade() {
            far.withdraw(from, topic);
        }
    }

    /// Registers what is to be. Tells whether something is left to be tried again.
    fn step(&self, far: &dyn Far) -> bool {
        let mut inner = self.lock();
        if std::mem::take(&mut inner.moved) {
            let mut homes = HashMap::new();
            inner.unsettle(|topic, watch| {
                let home = *homes.entry(watch.shard).or_insert_with(|| far.home(topic).1);
                watch.at.home().is_some_and(|at| Some(at) != home)
            });
        }
        let now = Instant::now();
        while let Some((_, topic)) = inner.later.pop_front_if(|(at, _)| *at <= now) {
            inner.todo.push_back(topic);
        }
        for _ in 0..inner.todo.len() {
            let Some(topic) = inner.todo.pop_front() else { break };
            if !inner.register(&topic, far) {
                inner.todo.push_back(topic);
            }
        }
        !inner.todo.is_empty() || !inner.later.is_empty()
    }

    fn renew(&self, far: &dyn Far, part: u32) {
        let parts = u32::try_from(RENEW_EVERY.as_secs() / RENEW_STEP.as_secs().max(1)).unwrap_or(1);
        let (me, inner) = (far.me(), self.lock());
        for (topic, watch) in inner.topics.iter().filter(|(_, w)| w.shard % parts == part % parts) {
            if let At::Held(home) = watch.at
                && home.who != me
            {
                // One that cannot be told now is told the next time.
                let _ = far.register(home, topic, true);
            }
        }
    }

    /// Topics that no owner could be told of for too long; each again after as long.
    fn lost(&self) -> Vec<Topic> {
        let mut inner = self.lock();
        let now = Instant::now();
        let lost = inner.topics.iter_mut().filter(|(_, w)| now.duration_since(w.at.since()) >= LOST_AFTER);
        lost.map(|(topic, watch)| {
            watch.at = match watch.at {
                At::Asked(home, _) => At::Asked(home, now),
                At::Nowhere(_) | At::Held(_) => At::Nowhere(now),
            };
            topic.clone()
        })
        .collect()
    }
}

impl Inner {
    /// Registers a topic where it is. True: nothing is left to do until something happens.
    fn register(&mut self, topic: &Topic, far: &dyn Far) -> bool {
        let Some(watch) = self.topics.get_mut(topic) else { return true };
        let At::Nowhere(since) = watch.at else { return true };
        let Some(home) = far.home(topic).1 else { return false };
        if home.who != far.me() {
            let told = far.register(home, topic, watch.check);
            if told {
                watch.at = At::Asked(home, since);
            }
            return told;
        }
        if watch.check {
            watch.at = At::Asked(home, since);
            far.check_here(home, topic);
        } else {
            watch.at = At::Held(home);
            watch.let_go_on();
        }
        true
    }

    /// These were registered and are not any more.
    fn unsettle(&mut self, mut which: impl FnMut(&Topic, &Watch) -> bool) {
        for (topic, watch) in &mut self.topics {
            if which(topic, watch) {
                watch.unsettle();
                self.todo.push_back(topic.clone());
            }
        }
    }
}

async fn run(watches: Weak<Watches>) {
    let (mut part, mut renewed) = (0, Instant::now());
    let mut left = false;
    loop {
        let Some(strong) = watches.upgrade() else { return };
        {
            let woken = strong.wake.notified();
            let pause = if left { RETRY_PAUSE } else { RENEW_STEP };
            let _ = tokio::time::timeout(pause, woken).await;
        }
        let Some(far) = strong.far.upgrade() else { return };
        left = strong.step(&*far);
        if renewed.elapsed() >= RENEW_STEP {
            (part, renewed) = (part + 1, Instant::now());
            strong.renew(&*far, part);
            metrics::gauge!("patchbay_mesh_watched_topics").set(strong.len() as f64);
        }
        for topic in strong.lost() {
            strong.publisher.lost(&topic);
        }
    }
}
