//! The log is the outbox (G11): entries are published after their append, outside the path to its answer.
//!
//! What is not published stands in the logs, and which logs those are in the activity rows of their shards. This keeps,
//! of a bounded number of conversations, how far each is published; entries come from memory while they lie there and
//! from the log otherwise. An append's bucket is settled here when its events are in the topic, which is what lets the
//! shard's mark move; whatever is not kept here (after a start, or when there are more conversations than are told
//! apart) is found by the rows above the mark, in the same way after a crash as after a long outage.
//!
//! Guarantee: of a conversation, no event is sent before everything under it has been delivered or sent in order.
//! Guarantee: a failed delivery takes every conversation back to what is published; what comes twice comes in order.
//! Guarantee: an entry that is never taken parks its conversation by name, durably; the others go on.

mod lanes;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use patchbay_protocol::command::{Reply, Request};
use patchbay_protocol::event::{Event, Origin};
use patchbay_protocol::ids::{ConversationId, EntityId, InboxId};
use patchbay_storage::events::{Delivered, Delivery, Fault, SendError, Sink};
use patchbay_storage::log::LogKey;
use patchbay_storage::tables::{Mark, Tables};
use patchbay_storage::{ReadError, Stamp};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::router::{Router, system_command};
use crate::shard::Shards;
use crate::shard::activity::unsettled;
pub use lanes::{LANES_MAX, PARKED_MAX, RECENT_BYTES_MAX, WINDOW};
use lanes::{Lanes, Next};

/// Questions and reads at once.
pub const WORK_MAX: usize = 64;
/// Entries that one read brings, and bytes.
const READ_ROWS: usize = 512;
const READ_BYTES: usize = 1 << 20;
/// Between two looks at what nobody tells.
const LOOK: Duration = Duration::from_millis(250);
/// Between two tries of a sink that takes nothing, at first and at most.
const REOPEN_PAUSE: Duration = Duration::from_millis(200);
const REOPEN_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Behind a failure its companions are told within this.
const COMPANY: Duration = Duration::from_millis(50);
/// A conversation that is parked is tried again after this, in case somebody has seen to it.
const PARKED_AGAIN: Duration = Duration::from_secs(300);
/// Events that nobody has taken for this long are trouble.
const STUCK: Duration = Duration::from_secs(3);
/// A node that stops waits for deliveries this long after the last one.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// What is not published of a node's conversations.
pub struct Outbox {
    lanes: Mutex<Lanes>,
    news: Arc<Notify>,
    shards: Arc<Shards>,
    sink: Arc<dyn Sink>,
    router: OnceLock<Weak<dyn Router>>,
    trouble: Mutex<Option<String>>,
    /// Entries of before there were events wait for their replay.
    unreplayed: AtomicBool,
    /// When something was last delivered, or sent while nothing was under way.
    moved: Mutex<Instant>,
    published: AtomicU64,
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox")
            .field("lanes", &*lock(&self.lanes))
            .field("trouble", &self.trouble())
            .finish()
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was asked for, answered.
enum Done {
    Told(ConversationId, Option<Option<(Origin, InboxId, u64)>>),
    Read(ConversationId, u32, u64, Result<Vec<Bytes>, ReadError>),
    Looked(u32, Result<(u32, Found), ReadError>),
}

/// Conversations with the seq from which on they may not be published; and those that are parked.
type Found = (HashMap<ConversationId, u64>, Vec<(ConversationId, u64)>);

impl Outbox {
    /// An outbox that publishes to `sink` and tells so many conversations apart. Begins with [`Self::begin`].
    pub fn new(shards: Arc<Shards>, sink: Arc<dyn Sink>, lanes_max: usize) -> Arc<Self> {
        Arc::new(Self {
            lanes: Mutex::new(Lanes::new(shards.count, lanes_max)),
            news: Arc::default(),
            shards,
            sink,
            router: OnceLock::new(),
            trouble: Mutex::new(Some("it has not answered yet".into())),
            unreplayed: AtomicBool::new(false),
            moved: Mutex::new(Instant::now()),
            published: AtomicU64::new(0),
        })
    }

    /// Begins: of each shard that is opened whatever is above its marks is looked up, and then whatever comes is
    /// published.
    pub fn begin(self: &Arc<Self>, router: Weak<dyn Router>, delivered: Delivered) {
        let _ = self.router.set(router);
        tokio::spawn(run(Arc::downgrade(self), delivered));
    }

    /// A shard is ours, under this epoch.
    pub fn open(&self, shard: u32, epoch: u32) {
        lock(&self.lanes).open(shard, epoch);
        self.news.notify_one();
    }

    /// A shard is another's: what is left of it is published there.
    pub fn close(&self, shard: u32) {
        lock(&self.lanes).close(shard);
    }

    /// Confirmed entries of one append, ascending, and the bucket of their shard that waits for them.
    pub fn offer(
        &self,
        origin: &Arc<Origin>,
        inbox: &InboxId,
        shard: u32,
        bucket: Mark,
        rows: &[(u64, Bytes)],
    ) {
        if lock(&self.lanes).offer(origin, inbox, shard, bucket, rows) {
            self.news.notify_one();
        }
    }

    /// Why nothing is published, if so.
    pub fn trouble(&self) -> Option<String> {
        if self.waits_for_replay() {
            return None;
        }
        let waits = lock(&self.trouble).clone();
        let stuck = lock(&self.lanes).in_flight() > 0 && lock(&self.moved).elapsed() > STUCK;
        waits.or_else(|| stuck.then(|| "what was sent is not taken".to_owned()))
    }

    /// Whether entries of before there were events wait for `patchbay events replay`.
    pub fn waits_for_replay(&self) -> bool {
        self.unreplayed.load(Ordering::Relaxed)
    }

    pub(crate) fn wait_for_replay(&self, waits: bool) {
        if self.unreplayed.swap(waits, Ordering::Relaxed) != waits && waits {
            tracing::warn!(
                "entries of before are not published: run `patchbay events replay --from start` once"
            );
        }
    }

    /// Events that were delivered.
    pub fn published(&self) -> u64 {
        self.published.load(Ordering::Relaxed)
    }

    /// Conversations with something unpublished that are told apart.
    pub fn lagging(&self) -> usize {
        lock(&self.lanes).len()
    }

    /// Whether everything of earlier reigns of a shard is published.
    pub fn has_caught_up(&self, shard: u32) -> bool {
        lock(&self.lanes).has_caught_up(shard)
    }

    /// Conversations whose outbox is parked.
    pub fn parked(&self) -> Vec<(ConversationId, u64)> {
        lock(&self.lanes).all_parked()
    }

    /// Waits until everything is published, as long as something is being delivered.
    pub async fn flush(&self) {
        *lock(&self.moved) = Instant::now();
        while !lock(&self.lanes).is_empty() && lock(&self.moved).elapsed() < FLUSH_PATIENCE {
            tokio::time::sleep(LOOK / 10).await;
            self.settle();
        }
        self.settle();
    }

    fn settle(&self) {
        let settled = lock(&self.lanes).take_settled();
        for s in settled {
            if let Some(reign) = self.shards.reign(s.shard).filter(|r| r.epoch() == s.bucket.epoch) {
                reign.activity.settle(s.bucket.bucket, s.appends);
            }
        }
    }

    /// Asks a conversation's owner where it is at home and how far it is.
    fn ask(&self, id: ConversationId) -> BoxFuture<'static, Done> {
        let router = self.router.get().and_then(Weak::upgrade);
        Box::pin(async move {
            let asked = async {
                let answer = router?.conversation(id, system_command(Request::Home)).ok()?;
                match answer.wait().await {
                    Ok(Reply::Home(home)) => Some(home),
                    Ok(_) | Err(_) => None,
                }
            };
            let told = asked.await;
            if told.is_none() {
                tokio::time::sleep(LOOK).await;
            }
            Done::Told(id, told)
        })
    }

    fn read(
        &self,
        id: ConversationId,
        shard: u32,
        after: u64,
        tip: u64,
        generation: u32,
    ) -> BoxFuture<'static, Done> {
        let logs = self.shards.logs.clone();
        Box::pin(async move {
            let key = LogKey { entity: *id.as_bytes(), shard };
            let rows = logs.forward(key, after, tip, READ_ROWS, READ_BYTES).await;
            if rows.is_err() {
                tokio::time::sleep(LOOK).await;
            }
            let rows = rows.map(|rows| rows.into_iter().map(|r| r.payload).collect());
            Done::Read(id, generation, after, rows)
        })
    }

    fn look(&self, shard: u32) -> BoxFuture<'static, Done> {
        let shards = self.shards.clone();
        Box::pin(async move {
            let found = look_up(&shards, shard).await;
            if found.is_err() {
                tokio::time::sleep(LOOK).await;
            }
            Done::Looked(shard, found)
        })
    }

    /// Whether events of a conversation may leave: a node whose lease has lapsed publishes nothing.
    fn may_send(&self, id: ConversationId) -> bool {
        self.shards.reign(id.shard(self.shards.count)).is_none_or(|reign| reign.is_held_now())
    }

    /// Hands events of one conversation to the sink, in order. What it does not take goes back.
    fn send(&self, events: Vec<Event>) -> Result<(), SendError> {
        if events.first().is_some_and(|event| !self.may_send(event.origin.conversation)) {
            // Looked at again with whatever nobody tells.
            lock(&self.lanes).unsent(events);
            return Err(SendError::Full);
        }
        if lock(&self.lanes).in_flight() == events.len() {
            *lock(&self.moved) = Instant::now();
        }
        let mut events = events.into_iter();
        while let Some(event) = events.next() {
            if let Err(refused) = self.sink.send(&event) {
                lock(&self.lanes).unsent(std::iter::once(event).chain(events).collect());
                return Err(refused);
            }
        }
        Ok(())
    }

    async fn park(&self, id: ConversationId, seq: u64, why: &str) {
        let shard = id.shard(self.shards.count);
        tracing::error!(conversation = %id, seq, why, "an event is never taken: its conversation's outbox is parked");
        metrics::counter!("patchbay_outbox_parked_total").increment(1);
        if let Some(stamp) = self.stamp(shard) {
            let row = Tables::park_outbox_write(shard, stamp, id, seq, why);
            self.shards.logs.write_until_answered(row).await;
        }
        lock(&self.lanes).park(id, seq);
    }

    fn stamp(&self, shard: u32) -> Option<Stamp> {
        self.shards.reign(shard)?.stamp().ok()
    }

    async fn unparked(&self, id: ConversationId) {
        let shard = id.shard(self.shards.count);
        if let Some(stamp) = self.stamp(shard) {
            let row = Tables::unpark_outbox_write(shard, stamp, id);
            self.shards.logs.write_until_answered(row).await;
        }
        tracing::info!(conversation = %id, "a conversation's outbox goes on");
    }
}

/// Every conversation with activity of a shard that is not settled, with its lowest seq there; and under which epoch
/// that is so.
async fn look_up(shards: &Shards, shard: u32) -> Result<(u32, Found), ReadError> {
    // What is found of one that was lost meanwhile is wanted by nobody.
    let Some(reign) = shards.reign(shard) else { return Ok(Default::default()) };
    let marks = shards.tables.marks(shard).await?;
    let found = unsettled(&shards.tables, &reign, marks.settled, reign.up_to_now()).await?;
    let conversations = found.into_iter().filter_map(|(entity, lowest)| match entity {
        EntityId::Conversation(id) => Some((id, lowest)),
        EntityId::Account(..) | EntityId::Agent(..) | EntityId::Inbox(..) => None,
    });
    Ok((reign.epoch(), (conversations.collect(), marks.parked_outboxes)))
}

/// The one that publishes.
struct Publisher {
    outbox: Weak<Outbox>,
    delivered: Delivered,
    work: FuturesUnordered<BoxFuture<'static, Done>>,
    looks: usize,
    /// Conversations that a row says are parked.
    rows: HashSet<ConversationId>,
    parked_tried: Instant,
}

/// Looks of shards at once.
const LOOKS_MAX: usize = 16;
/// Deliveries that are heard at once.
const HEARD_MAX: usize = 1024;

async fn run(outbox: Weak<Outbox>, delivered: Delivered) {
    let mut publisher = Publisher {
        outbox,
        delivered,
        work: FuturesUnordered::new(),
        looks: 0,
        rows: HashSet::new(),
        parked_tried: Instant::now(),
    };
    if publisher.open().await.is_none() {
        return;
    }
    while publisher.turn().await.is_some() {}
}

impl Publisher {
    /// Waits for the sink. None: the node has gone.
    async fn open(&mut self) -> Option<()> {
        let mut pause = REOPEN_PAUSE;
        loop {
            let (sink, generation) = {
                let outbox = self.outbox.upgrade()?;
                let generation = lock(&outbox.lanes).generation();
                (outbox.sink.clone(), generation)
            };
            let opened = sink.open(generation).await;
            let outbox = self.outbox.upgrade()?;
            match opened {
                Ok(()) => {
                    if lock(&outbox.trouble).take().is_some() {
                        tracing::info!("events are published again");
                    }
                    return Some(());
                }
                Err(why) => outbox.say(&why),
            }
            drop(outbox);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REOPEN_PAUSE_MAX);
        }
    }

    /// Does what there is to do, and waits for more.
    async fn turn(&mut self) -> Option<()> {
        let outbox = self.outbox.upgrade()?;
        let fault = self.feed(&outbox);
        outbox.settle();
        outbox.tell();
        if let Some((event, fault)) = fault {
            drop(outbox);
            return self
                .failed(event.map(|(id, seq)| (id, seq, fault.clone())).into_iter().collect(), &fault)
                .await;
        }
        if self.parked_tried.elapsed() >= PARKED_AGAIN {
            self.parked_tried = Instant::now();
            let mut lanes = lock(&outbox.lanes);
            for (id, _) in lanes.all_parked() {
                lanes.unpark(id, id.shard(outbox.shards.count));
            }
        }
        let news = outbox.news.clone();
        drop(outbox);
        let mut heard = Vec::new();
        tokio::select! {
            biased;
            n = self.delivered.recv_many(&mut heard, HEARD_MAX) => {
                if n == 0 {
                    return None;
                }
                self.heard(heard).await?;
            }
            Some(done) = self.work.next() => self.done(done)?,
            () = news.notified() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
        Some(())
    }

    /// Starts everything that can be started.
    #[allow(clippy::type_complexity)]
    fn feed(&mut self, outbox: &Arc<Outbox>) -> Option<(Option<(ConversationId, u64)>, Fault)> {
        while self.looks < LOOKS_MAX {
            let Some(shard) = lock(&outbox.lanes).begin_look() else { break };
            self.looks += 1;
            self.work.push(outbox.look(shard));
        }
        while self.work.len() < WORK_MAX {
            let (next, generation) = {
                let mut lanes = lock(&outbox.lanes);
                if !lanes.has_room() {
                    return None;
                }
                (lanes.next()?, lanes.generation())
            };
            match next {
                Next::Send(events) => {
                    let first = events.first().map(|e| (e.origin.conversation, e.seq));
                    match outbox.send(events) {
                        Ok(()) => {}
                        // Deliveries make room.
                        Err(SendError::Full) => return None,
                        Err(SendError::Fault(fault)) => return Some((first, fault)),
                    }
                }
                Next::Ask(id) => self.work.push(outbox.ask(id)),
                Next::Read(id, shard, after, tip) => {
                    self.work.push(outbox.read(id, shard, after, tip, generation));
                }
            }
        }
        None
    }

    fn done(&mut self, done: Done) -> Option<()> {
        let outbox = self.outbox.upgrade()?;
        let mut lanes = lock(&outbox.lanes);
        match done {
            Done::Told(id, Some(home)) => {
                lanes.told(id, home.map(|(origin, inbox, tip)| (Arc::new(origin), inbox, tip)));
            }
            Done::Told(id, None) => lanes.unanswered(id),
            Done::Read(id, generation, after, Ok(rows)) => lanes.read(id, generation, after, rows),
            Done::Read(id, _, _, Err(_)) => lanes.unanswered(id),
            Done::Looked(shard, Ok((epoch, (found, parked)))) => {
                self.looks -= 1;
                self.rows.extend(parked.iter().map(|(id, _)| *id));
                lanes.end_look((shard, epoch), found, &parked);
            }
            Done::Looked(shard, Err(_)) => {
                self.looks -= 1;
                lanes.break_look(shard);
            }
        }
        Some(())
    }

    async fn heard(&mut self, heard: Vec<Delivery>) -> Option<()> {
        let mut refused = Vec::new();
        let mut why = None;
        let mut published = 0u64;
        let mut ended = Vec::new();
        {
            let outbox = self.outbox.upgrade()?;
            let mut lanes = lock(&outbox.lanes);
            let generation = lanes.generation();
            for delivery in heard.into_iter().filter(|d| d.generation == generation) {
                let (id, seq) = (delivery.conversation, delivery.seq);
                match delivery.outcome {
                    Ok(()) => {
                        published += 1;
                        lanes.delivered(id, seq);
                        if !self.rows.is_empty() && self.rows.contains(&id) && lanes.is_done(id) {
                            ended.push(id);
                        }
                    }
                    Err(fault) => {
                        if matches!(fault, Fault::Event(_)) {
                            refused.push((id, seq, fault.clone()));
                        }
                        why.get_or_insert(fault);
                    }
                }
            }
            if published > 0 {
                *lock(&outbox.moved) = Instant::now();
                outbox.published.fetch_add(published, Ordering::Relaxed);
            }
        }
        metrics::counter!("patchbay_outbox_published_total").increment(published);
        for id in ended {
            self.rows.remove(&id);
            self.outbox.upgrade()?.unparked(id).await;
        }
        match why {
            Some(why) => self.failed(refused, &why).await,
            None => Some(()),
        }
    }

    /// Something was not delivered: everything goes back to what is published, and the sink is opened anew.
    async fn failed(&mut self, mut refused: Vec<(ConversationId, u64, Fault)>, why: &Fault) -> Option<()> {
        let text = match why {
            Fault::Event(text) | Fault::Passing(text) => text.clone(),
        };
        metrics::counter!("patchbay_outbox_failures_total").increment(1);
        tracing::warn!(why = text, "an event was not delivered");
        // Those that went with it are told now.
        while let Ok(Some(more)) = tokio::time::timeout(COMPANY, self.delivered.recv()).await {
            let outbox = self.outbox.upgrade()?;
            let mut lanes = lock(&outbox.lanes);
            if more.generation != lanes.generation() {
                continue;
            }
            match more.outcome {
                Ok(()) => lanes.delivered(more.conversation, more.seq),
                Err(fault @ Fault::Event(_)) => refused.push((more.conversation, more.seq, fault)),
                Err(Fault::Passing(_)) => {}
            }
        }
        let outbox = self.outbox.upgrade()?;
        if let [(id, seq, Fault::Event(why))] = refused.as_slice() {
            let (alone, room) = {
                let lanes = lock(&outbox.lanes);
                (lanes.was_alone(*id), lanes.parked() < PARKED_MAX)
            };
            if alone && room {
                self.rows.insert(*id);
                outbox.park(*id, *seq, why).await;
                refused.clear();
            }
        }
        let mut suspects: HashMap<ConversationId, u64> = HashMap::new();
        for (id, seq, _) in refused {
            let last = suspects.entry(id).or_insert(seq);
            *last = seq.max(*last);
        }
        if matches!(why, Fault::Passing(_)) {
            outbox.say(&text);
        }
        lock(&outbox.lanes).restart(&suspects);
        drop(outbox);
        self.open().await
    }
}

impl Outbox {
    fn say(&self, why: &str) {
        let mut trouble = lock(&self.trouble);
        if trouble.as_deref() != Some(why) {
            tracing::warn!(why, "events wait");
            *trouble = Some(why.to_owned());
        }
    }

    fn tell(&self) {
        let (lagging, in_flight, parked) = {
            let lanes = lock(&self.lanes);
            (lanes.len(), lanes.in_flight(), lanes.parked())
        };
        metrics::gauge!("patchbay_outbox_lagging_conversations").set(lagging as f64);
        metrics::gauge!("patchbay_outbox_in_flight_events").set(in_flight as f64);
        metrics::gauge!("patchbay_outbox_parked_conversations").set(parked as f64);
    }
}
