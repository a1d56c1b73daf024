//! A process of the cluster: a node as it is, in a runtime of its own whose clock is the world's, run fast, slow, stopped for
//! a while, or dropped where it stands.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use patchbay_actors::clock::Clock;
use patchbay_actors::cluster::map::Member;
use patchbay_actors::cluster::mesh::VERSION;
use patchbay_actors::cluster::runtime::ClusterConfig;
use patchbay_actors::cluster::ticks::Ticks;
use patchbay_actors::desk::Desk;
use patchbay_actors::directory::Stale;
use patchbay_actors::fanout::Topic;
use patchbay_actors::intake::Intake;
use patchbay_actors::node::{Events as NodeEvents, Node, NodeConfig};
use patchbay_actors::ports::Publisher;
use patchbay_protocol::ids::{AgentId, InboxId, TenantId};
use patchbay_protocol::{ConversationId, Timestamp};
use tokio::runtime::Runtime;
use tokio::time::Instant;

use crate::network::Net;
use crate::outside::{Events, Judge, Phone};
use crate::replicas::{Handle, Replicas};
use crate::world::{World, lock};

pub(crate) const SHARDS: u32 = 16;
/// A process that ends in order is waited for so long.
const FINISHES_WITHIN: u64 = 10_000;
/// How often a node reads documents anew of which nobody has told it.
const LOOK_ANEW: Duration = Duration::from_secs(1);

/// What stands around every process.
#[derive(Clone)]
pub(crate) struct Around {
    pub(crate) world: World,
    pub(crate) store: Replicas,
    pub(crate) net: Net,
    pub(crate) phone: Phone,
    pub(crate) events: Events,
    pub(crate) judge: Judge,
    /// Processes that were started, of all.
    pub(crate) started: Arc<AtomicU64>,
}

/// What somebody looks at, wherever it is connected: each conversation from its beginning.
pub(crate) struct Viewer {
    pub(crate) name: String,
    judge: Judge,
    shown: Mutex<HashMap<ConversationId, Shown>>,
}

#[derive(Default)]
struct Shown {
    entries: Vec<blake3::Hash>,
    /// It was told that there is more than it was shown.
    behind: bool,
}

impl Viewer {
    pub(crate) fn new(
        name: String,
        judge: Judge,
        looks_at: impl IntoIterator<Item = ConversationId>,
    ) -> Arc<Self> {
        let shown = looks_at.into_iter().map(|id| (id, Shown::default())).collect();
        Arc::new(Self { name, judge, shown: Mutex::new(shown) })
    }

    pub(crate) fn conversations(&self) -> Vec<ConversationId> {
        let mut all: Vec<ConversationId> = lock(&self.shown).keys().copied().collect();
        all.sort();
        all
    }

    pub(crate) fn len(&self, id: ConversationId) -> u64 {
        lock(&self.shown).get(&id).map_or(0, |shown| shown.entries.len() as u64)
    }

    pub(crate) fn shows(&self, id: ConversationId) -> Vec<blake3::Hash> {
        lock(&self.shown).get(&id).map(|shown| shown.entries.clone()).unwrap_or_default()
    }

    pub(crate) fn behind(&self) -> Vec<ConversationId> {
        let mut behind: Vec<ConversationId> =
            lock(&self.shown).iter().filter(|(_, shown)| shown.behind).map(|(id, _)| *id).collect();
        behind.sort();
        behind
    }

    pub(crate) fn set_behind(&self, id: ConversationId, behind: bool) {
        if let Some(shown) = lock(&self.shown).get_mut(&id) {
            shown.behind = behind;
        }
    }

    /// An entry comes, live or read.
    pub(crate) fn take(&self, id: ConversationId, seq: u64, entry: &Bytes) {
        let hash = self.judge.saw(&self.name, id, seq, entry);
        if let Some(shown) = lock(&self.shown).get_mut(&id) {
            match seq.checked_sub(shown.entries.len() as u64 + 1) {
                Some(0) => shown.entries.push(hash),
                Some(_) => shown.behind = true,
                None => {}
            }
        }
    }

    fn reaches(&self, id: ConversationId, seq: u64) {
        if let Some(shown) = lock(&self.shown).get_mut(&id) {
            shown.behind |= seq > shown.entries.len() as u64;
        }
    }
}

/// Who is connected to a process, and by which connection.
#[derive(Default)]
pub(crate) struct Screen {
    viewers: Mutex<Vec<(Arc<Viewer>, String)>>,
    process: u64,
    connections: AtomicU64,
    has_begun: AtomicBool,
}

impl Screen {
    fn of(process: u64) -> Self {
        Self { process, ..Self::default() }
    }

    /// How its connection is called.
    pub(crate) fn add(&self, viewer: Arc<Viewer>) -> String {
        let n = self.connections.fetch_add(1, Ordering::Relaxed);
        let connection = format!("{}.{n}", self.process);
        lock(&self.viewers).push((viewer, connection.clone()));
        connection
    }

    /// Whether nothing is waited for yet.
    pub(crate) fn begins(&self) -> bool {
        !self.has_begun.swap(true, Ordering::Relaxed)
    }

    /// How its connection was called, if it was there.
    pub(crate) fn remove(&self, viewer: &Arc<Viewer>) -> Option<String> {
        let mut viewers = lock(&self.viewers);
        let at = viewers.iter().position(|(v, _)| Arc::ptr_eq(v, viewer))?;
        Some(viewers.swap_remove(at).1)
    }

    pub(crate) fn has(&self, viewer: &Arc<Viewer>) -> bool {
        lock(&self.viewers).iter().any(|(v, _)| Arc::ptr_eq(v, viewer))
    }

    fn each(&self, f: impl Fn(&Viewer)) {
        lock(&self.viewers).iter().for_each(|(viewer, _)| f(viewer));
    }
}

impl Publisher for Screen {
    fn entries(&self, id: ConversationId, entries: &[(u64, Bytes)]) {
        self.each(|viewer| entries.iter().for_each(|(seq, entry)| viewer.take(id, *seq, entry)));
    }

    fn inbox(&self, _: &TenantId, _: &InboxId, _: Bytes) {}

    fn agent(&self, _: &TenantId, _: &AgentId, _: Bytes) {}

    fn reaches(&self, id: ConversationId, seq: u64) {
        self.each(|viewer| viewer.reaches(id, seq));
    }

    fn lost(&self, topic: &Topic) {
        if let Topic::Conversation(id) = topic {
            // A socket that is closed comes back with its position.
            self.each(|viewer| viewer.set_behind(*id, true));
        }
    }
}

/// A node and its doors.
#[derive(Clone)]
pub(crate) struct Up {
    pub(crate) node: Arc<Node>,
    pub(crate) desk: Arc<Desk>,
    pub(crate) intake: Arc<Intake>,
    pub(crate) screen: Arc<Screen>,
}

struct Running {
    runtime: Runtime,
    handle: Handle,
    /// When it was started, by the world's clock, and by its own.
    since: u64,
    at: Instant,
    /// How far its own clock has come.
    ran: u64,
    up: Arc<Mutex<Option<Up>>>,
    /// It takes nothing new, and then it has ended.
    ends: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

pub(crate) struct Process {
    pub(crate) n: usize,
    around: Around,
    /// How fast its clock runs, in ten thousandths of the world's.
    rate: u64,
    wall: &'static AtomicI64,
    running: Option<Running>,
    paused_until: u64,
    /// When it is started again.
    pub(crate) back_at: Option<u64>,
}

/// Reads documents anew of which nobody has told, as a node does beside its doors.
async fn look_anew(node: Weak<Node>) {
    loop {
        tokio::time::sleep(LOOK_ANEW).await;
        let Some(node) = node.upgrade() else { return };
        node.directory().heard_of_change(Stale::Perhaps).await;
    }
}

impl Process {
    pub(crate) fn new(n: usize, around: Around) -> Self {
        let rate = 9_920 + around.world.between(0, 160);
        let wall = Box::leak(Box::new(AtomicI64::new(0)));
        Self { n, around, rate, wall, running: None, paused_until: 0, back_at: Some(0) }
    }

    pub(crate) fn up(&self) -> Option<Up> {
        lock(&self.running.as_ref()?.up).clone()
    }

    /// Whether it runs and its node serves.
    pub(crate) fn is_up(&self) -> bool {
        let ends = self.running.as_ref().is_some_and(|r| r.ends.load(Ordering::Relaxed));
        !self.is_paused() && !ends && self.up().is_some()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.around.world.now() < self.paused_until
    }

    /// Lets something happen in it, if it runs.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(running) = &self.running {
            running.runtime.spawn(task);
        }
    }

    /// Looks at its node, by its own clock.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Up) -> T) -> Option<T> {
        let up = self.up()?;
        let _in = self.running.as_ref()?.runtime.enter();
        Some(look(&up))
    }

    pub(crate) fn start(&mut self) {
        let around = self.around.clone();
        let started = around.started.fetch_add(1, Ordering::Relaxed);
        around.world.tell(|| format!("process {} starts", self.n));
        around.net.back(self.n);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let Ok(runtime) = runtime else { return };
        let handle = around.store.handle(started);
        let up: Arc<Mutex<Option<Up>>> = Arc::default();
        let (ends, ended) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let has_ended = ended.clone();
        let (address, ready, n, wall) = (format!("n{}:{started}", self.n), up.clone(), self.n, self.wall);
        let (engine, in_it) = (Arc::new(handle.clone()), runtime.enter());
        let at = Instant::now();
        let begins =
            Timestamp::from_millis(1_795_300_000_000).plus(Duration::from_millis(around.world.now()));
        runtime.spawn(async move {
            let member =
                Member { name: format!("n{n}"), mesh: Some(address.clone()), capacity: 1, draining: false };
            // The first process stays at the version before.
            let speaks = if n == 0 { VERSION - 1 } else { VERSION };
            let ticks = Ticks::Tokio(at);
            let cluster = ClusterConfig { member, ticks, moves_max: 4, speaks, ..ClusterConfig::default() };
            let (deliveries, delivered) = patchbay_storage::events::deliveries();
            let screen = Arc::new(Screen::of(started));
            let clock = Clock::settable(begins, wall);
            let config = NodeConfig {
                shards: SHARDS,
                cluster,
                mesh: Some(around.net.door(n, address)),
                events: Some(NodeEvents::new(around.events.sink(started, deliveries), delivered)),
                idle_after: Duration::from_secs(3),
                ..NodeConfig::new(engine, clock, screen.clone(), Arc::new(around.phone.clone()))
            };
            let node = match Node::start(config).await {
                Ok(node) => node,
                Err(error) => {
                    around.world.tell(|| format!("process {n} does not start: {error}"));
                    has_ended.store(true, Ordering::Relaxed);
                    return;
                }
            };
            around.world.tell(|| format!("process {n} is incarnation {}", node.incarnation()));
            tokio::spawn(look_anew(Arc::downgrade(&node)));
            let (desk, intake) = (Desk::new(node.clone()), Intake::new(node.clone()));
            *lock(&ready) = Some(Up { node, desk, intake, screen });
        });
        drop(in_it);
        let since = self.around.world.now();
        self.running = Some(Running { runtime, handle, since, at, ran: 0, up, ends, ended });
        (self.paused_until, self.back_at) = (0, None);
    }

    /// Ends it in order.
    pub(crate) fn finish(&self) {
        let (Some(running), Some(up)) = (&self.running, self.up()) else { return };
        running.ends.store(true, Ordering::Relaxed);
        let (ended, late) = (running.ended.clone(), running.ended.clone());
        running.runtime.spawn(async move {
            up.node.finish().await;
            ended.store(true, Ordering::Relaxed);
        });
        self.around.world.after(FINISHES_WITHIN, move || late.store(true, Ordering::Relaxed));
    }

    /// Whether it has come to its end by itself.
    pub(crate) fn has_ended(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.ended.load(Ordering::Relaxed))
    }

    /// Ends it where it stands.
    pub(crate) fn crash(&mut self, back_in: u64, silently: bool) {
        self.around.world.tell(|| format!("process {} is gone, for {back_in} ms", self.n));
        self.around.net.gone(self.n, silently);
        if let Some(running) = self.running.take() {
            let _in = running.runtime.enter();
            drop(lock(&running.up).take());
            drop(_in);
            drop(running.runtime);
        }
        self.back_at = Some(self.around.world.now() + back_in);
    }

    /// It stands still for so long, and knows nothing of it.
    pub(crate) fn pause(&mut self, ms: u64) {
        self.around.world.tell(|| format!("process {} stands still for {ms} ms", self.n));
        self.paused_until = self.around.world.now() + ms;
    }

    pub(crate) fn resume(&mut self) {
        self.paused_until = 0;
    }

    /// It does not reach the store for so long.
    pub(crate) fn cut(&self, ms: u64) {
        self.around.world.tell(|| format!("process {} does not reach the store for {ms} ms", self.n));
        self.running.as_ref().inspect(|running| running.handle.cut(ms));
    }

    /// Its wall clock jumps.
    pub(crate) fn jump(&self, ms: i64) {
        self.around.world.tell(|| format!("the clock of process {} jumps by {ms} ms", self.n));
        self.wall.fetch_add(ms, Ordering::Relaxed);
    }

    /// Lets it do what it has to do up to now.
    pub(crate) fn step(&mut self) {
        if self.is_paused() {
            return;
        }
        let now = self.around.world.now();
        let Some(running) = &mut self.running else { return };
        let target = (now - running.since) * self.rate / 10_000;
        let behind = target.saturating_sub(running.ran);
        running.ran = target;
        let until = running.at + Duration::from_millis(target);
        running.runtime.block_on(async move {
            if behind > 50 {
                // It was stopped: everything that came due meanwhile is due at once.
                tokio::time::advance(Duration::from_millis(behind)).await;
            }
            tokio::time::sleep_until(until).await;
        });
    }
}
