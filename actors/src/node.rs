//! A single node: every entity lives here. The composition of this crate, and its [`Router`].

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::StreamExt as _;
use patchbay_protocol::CommandError;
use patchbay_protocol::command::{Command, Reply, Request};
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, EntityId, InboxId, TenantId};
use patchbay_storage::events::{Delivered, Sink};
use patchbay_storage::tables::{Mark, Tables, Timer, hour_of};
use patchbay_storage::{CLUSTER, CasOutcome, DocumentKey, Engine, ReadError, WriteError};

use crate::account::{Account, AccountCommand, AccountReply, OutboundConfig};
use crate::agent::{Agent, AgentCommand, AgentReply};
use crate::clock::Clock;
use crate::conversation::Conversation;
use crate::directory::Directory;
use crate::inbox::{Inbox, InboxCommand, InboxReply};
use crate::memory::{self, Caches, Memory};
use crate::outbox::{LANES_MAX, Outbox};
use crate::ports::{MediaFetcher, NoMedia, Provider, Publisher};
use crate::router::{Answer, Router, system_command};
use crate::shard::Shards;
use crate::shard::activity::unsettled;
use crate::shard::slots::Slots;
use crate::shard::soft::SoftSlots;

/// Shards read at once by a start.
const SHARDS_READ_AT_ONCE: usize = 64;
/// Between two moves of the marks over what is settled: a mark that moved with every bucket would be a row for each
/// message of a quiet shard.
const SETTLE_LOOK: Duration = Duration::from_secs(20);
/// Between two looks whether what earlier incarnations left is published.
const PUBLISHED_LOOK: Duration = Duration::from_millis(250);
/// Between two looks whether publishing may begin.
const BEGIN_PAUSE: Duration = Duration::from_secs(1);
/// Entities woken at once by a sweep or by timers.
const WAKE_AT_ONCE: usize = 64;

/// Between two looks at the calls under way of a node that stops.
const FINISH_LOOK: Duration = Duration::from_millis(20);
/// Between two looks at entities that write what is derived of them, and then their snapshots.
const SNAPSHOT_LOOK: Duration = Duration::from_millis(100);
/// Looks without a change after which those that are left have something to do that does not end.
const SNAPSHOT_LOOKS: u32 = 6;
/// Between two tries of what the store or an entity did not answer.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// Memory is looked at least this often.
const MEMORY_LOOK: Duration = Duration::from_secs(1);
/// Entities that are busy beyond which nobody else is let in while memory is spent.
const CROWD_MIN: usize = 1_000;
/// Timers are looked at least this often.
const TIMER_LOOK: Duration = Duration::from_secs(60);

/// Where events go.
pub struct Events {
    /// What takes them.
    pub sink: Arc<dyn Sink>,
    /// Where that tells what was delivered.
    pub delivered: Delivered,
    /// Conversations with something unpublished that are told apart.
    pub lanes_max: usize,
}

impl Events {
    /// To `sink`, which tells `delivered`.
    pub fn new(sink: Arc<dyn Sink>, delivered: Delivered) -> Self {
        Self { sink, delivered, lanes_max: LANES_MAX }
    }
}

/// What a node is made of.
pub struct NodeConfig {
    /// The store.
    pub engine: Arc<dyn Engine>,
    /// What time it is.
    pub clock: Clock,
    /// How many shards: a power of two.
    pub shards: u32,
    /// Where confirmed things are shown.
    pub publisher: Arc<dyn Publisher>,
    /// Who calls providers.
    pub provider: Arc<dyn Provider>,
    /// Who fetches customers' files.
    pub media: Arc<dyn MediaFetcher>,
    /// Where events go; none: nowhere.
    pub events: Option<Events>,
    /// Bounds of what goes out.
    pub outbound: OutboundConfig,
    /// After how long an entity that nobody asks is forgotten.
    pub idle_after: Duration,
    /// Whether memory is short: then whoever has nothing to do is forgotten at once.
    pub memory: memory::Gauge,
}

impl NodeConfig {
    /// With the configuration's defaults: 1,024 shards, two minutes' patience with the idle, no bound on memory.
    pub fn new(
        engine: Arc<dyn Engine>,
        clock: Clock,
        publisher: Arc<dyn Publisher>,
        provider: Arc<dyn Provider>,
    ) -> Self {
        Self {
            engine,
            clock,
            shards: 1024,
            publisher,
            provider,
            media: Arc::new(NoMedia),
            events: None,
            outbound: OutboundConfig::default(),
            idle_after: Duration::from_secs(120),
            memory: Box::new(|| Memory::Enough),
        }
    }
}

/// Why a node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store did not answer.
    #[error("the store did not answer")]
    Store,
    /// The store was made with another number of shards.
    #[error("the store has {stored} shards, the configuration says {configured}")]
    Shards {
        /// In the store.
        stored: u32,
        /// Configured.
        configured: u32,
    },
    /// The actors could not be started.
    #[error("actors: {0}")]
    Actors(#[from] ractor::SpawnErr),
}

/// A node.
pub struct Node {
    shards: Arc<Shards>,
    identity: [u8; 16],
    directory: Arc<Directory>,
    conversations: Arc<Slots<Conversation>>,
    accounts: Arc<Slots<Account>>,
    agents: Arc<SoftSlots<Agent>>,
    inboxes: Arc<SoftSlots<Inbox>>,
    outbox: Option<Arc<Outbox>>,
    idle_after: Duration,
    memory: memory::Gauge,
    caches: Caches,
}

fn cluster_document(id: &str) -> DocumentKey {
    DocumentKey { scope: String::new(), kind: CLUSTER, id: id.to_owned() }
}

/// The document of that id, made with `first` when it is not there.
async fn document_or(
    tables: &Tables,
    id: &str,
    first: serde_json::Value,
) -> Result<serde_json::Value, StartError> {
    loop {
        if let Some((_, found)) =
            tables.document(&cluster_document(id)).await.map_err(|_| StartError::Store)?
        {
            return Ok(found);
        }
        // Whoever wins, the next round reads it.
        tables.put_document(cluster_document(id), None, &first).await.map_err(|_| StartError::Store)?;
    }
}

/// Gives a store another identity: every log of it has another epoch from here on.
pub async fn new_identity(engine: Arc<dyn Engine>) -> Result<(), StartError> {
    let tables = Tables::new(engine);
    loop {
        let found = tables.document::<serde_json::Value>(&cluster_document("identity")).await;
        let version = found.map_err(|_| StartError::Store)?.map(|(version, _)| version);
        let fresh: [u8; 16] = rand::random();
        let put = tables.put_document(cluster_document("identity"), version, &fresh).await;
        if put.map_err(|_| StartError::Store)? == CasOutcome::Applied {
            return Ok(());
        }
    }
}

/// Whether nobody has written anything yet.
async fn is_fresh(tables: &Tables) -> Result<bool, StartError> {
    let found = tables.document::<u32>(&cluster_document("incarnation")).await;
    Ok(found.map_err(|_| StartError::Store)?.is_none())
}

async fn next_incarnation(tables: &Tables) -> Result<u32, StartError> {
    loop {
        let found =
            tables.document::<u32>(&cluster_document("incarnation")).await.map_err(|_| StartError::Store)?;
        let (version, last) = found.map_or((None, 0), |(v, n)| (Some(v), n));
        let outcome = tables.put_document(cluster_document("incarnation"), version, &(last + 1)).await;
        match outcome {
            Ok(CasOutcome::Applied) => return Ok(last + 1),
            Ok(CasOutcome::Refused(_)) => {}
            Err(_) => return Err(StartError::Store),
        }
    }
}

impl Node {
    /// Starts a node: a new incarnation, whose epoch is above every earlier one's.
    pub async fn start(config: NodeConfig) -> Result<Arc<Self>, StartError> {
        let tables = Tables::new(config.engine.clone());
        let identity: [u8; 16] = rand::random();
        let identity = document_or(&tables, "identity", serde_json::json!(identity)).await?;
        let identity = serde_json::from_value(identity).map_err(|_| StartError::Store)?;
        let stored = document_or(&tables, "shards", serde_json::json!(config.shards)).await?;
        let stored = serde_json::from_value(stored).map_err(|_| StartError::Store)?;
        if stored != config.shards {
            return Err(StartError::Shards { stored, configured: config.shards });
        }
        if config.events.is_some() && is_fresh(&tables).await? {
            note_events_begun(&tables).await.map_err(|_| StartError::Store)?;
        }
        let epoch = next_incarnation(&tables).await?;
        let shards = Shards::new(config.shards, epoch, tables, config.clock);
        let directory = Arc::new(Directory::new(config.engine));
        let (outbox, delivered) =
            config.events.map(|e| (Outbox::new(shards.clone(), e.sink, e.lanes_max), e.delivered)).unzip();
        let (publisher, media) = (config.publisher.clone(), config.media.clone());
        let conversation = Conversation::new(publisher, directory.clone(), media, outbox.clone());
        let account = Account::new(config.outbound, directory.clone(), config.provider);
        let node = Arc::new(Self {
            conversations: Slots::start(conversation, shards.clone()).await?,
            accounts: Slots::start(account, shards.clone()).await?,
            agents: SoftSlots::new(Agent::new(config.publisher.clone(), shards.clone())),
            inboxes: SoftSlots::new(Inbox::new(config.publisher, directory.clone(), config.clock)),
            outbox,
            idle_after: config.idle_after,
            memory: config.memory,
            caches: Caches::default(),
            shards,
            identity,
            directory,
        });
        node.caches.add(&node.directory);
        let router: Weak<dyn Router> = Arc::downgrade(&(node.clone() as Arc<dyn Router>));
        node.conversations.entity().set_router(router.clone());
        node.accounts.entity().set_router(router.clone());
        let hour = load_timers(&node).await.map_err(|_| StartError::Store)?;
        tokio::spawn(sweep(Arc::downgrade(&node)));
        tokio::spawn(move_settled(Arc::downgrade(&node)));
        if let Some(delivered) = delivered {
            tokio::spawn(begin_outbox(Arc::downgrade(&node), router, delivered));
        }
        tokio::spawn(run_timers(Arc::downgrade(&node), hour));
        tokio::spawn(passivate(Arc::downgrade(&node)));
        Ok(node)
    }

    /// The documents of tenants.
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// What is not published yet; none: nothing is published.
    pub fn outbox(&self) -> Option<&Arc<Outbox>> {
        self.outbox.as_ref()
    }

    /// What is forgotten when memory is short.
    pub fn caches(&self) -> &Caches {
        &self.caches
    }

    /// What all entities share.
    pub fn shards(&self) -> &Arc<Shards> {
        &self.shards
    }

    /// This start's number.
    pub fn incarnation(&self) -> u32 {
        self.shards.epoch
    }

    /// A log's identity: 8 characters of a hash of the store's identity and the conversation.
    pub fn epoch_of(&self, id: ConversationId) -> String {
        let hash = blake3::hash(&[&self.identity[..], id.as_bytes()].concat());
        hash.to_hex().chars().take(8).collect()
    }

    /// Whether a conversation is in memory.
    pub fn is_active(&self, id: ConversationId) -> bool {
        self.conversations.is_active(id.as_bytes())
    }

    /// Entities in memory.
    pub fn active_count(&self) -> usize {
        self.conversations.active_count() + self.accounts.active_count()
    }

    /// Asks everything that was not used for `idle` to be forgotten.
    pub fn passivate_idle(&self, idle: Duration) {
        self.conversations.passivate_idle(idle);
        self.accounts.passivate_idle(idle);
        self.agents.passivate_idle(idle);
        self.inboxes.passivate_idle(idle);
    }

    /// Before the process ends: begins no call to a provider any more, waits for those under way and for their
    /// outcomes to be told, and lets every entity write its snapshot. What is left when its caller gives up is found
    /// in the logs by the next start.
    pub async fn finish(&self) {
        self.accounts.entity().stop_calling();
        for id in self.accounts.active() {
            loop {
                let status = match self.accounts.send(&id, AccountCommand::Status) {
                    Ok(answer) => answer.wait().await,
                    Err(e) => Err(e),
                };
                if matches!(status, Ok(AccountReply::Status { under_way: 0, .. })) {
                    break;
                }
                tokio::time::sleep(FINISH_LOOK).await;
            }
        }
        // Whoever has nothing under way is forgotten; the others are asked again while there is time.
        let mut still = 0;
        while self.active_count() > 0 && still < SNAPSHOT_LOOKS {
            let before = self.active_count();
            self.passivate_idle(Duration::ZERO);
            tokio::time::sleep(SNAPSHOT_LOOK).await;
            still = if self.active_count() == before { still + 1 } else { 0 };
        }
        if let Some(outbox) = &self.outbox {
            outbox.flush().await;
        }
        if self.shards.swept.load(Ordering::Relaxed) {
            // Whoever starts next has nobody to wake where nothing is left to do.
            let closed =
                (0..self.shards.count).filter_map(|shard| Some((shard, self.shards.activity.close(shard)?)));
            let marks = futures_util::stream::iter(closed.collect::<Vec<_>>());
            marks
                .for_each_concurrent(WAKE_AT_ONCE, |(shard, (from, mark))| self.settle(shard, from, mark))
                .await;
        }
    }

    /// Moves a shard's mark, and drops the buckets that it leaves.
    async fn settle(&self, shard: u32, from: u64, mark: Mark) {
        let Ok(stamp) = self.shards.stamps[shard as usize].next() else { return };
        if self.shards.logs.write_if_room(Tables::mark_write(shard, stamp, mark)).await.is_ok() {
            for bucket in from..mark.bucket {
                // What a lost drop leaves is read and found settled by the next sweep.
                let _ = self.shards.tables.drop_activity(shard, Mark { bucket, ..mark }, stamp).await;
            }
        }
    }

    /// Wakes an entity and waits for its answer.
    async fn wake(&self, id: &EntityId) -> bool {
        let mut pause = Duration::from_millis(50);
        for _ in 0..10 {
            let woken = match id {
                EntityId::Conversation(_) => {
                    match self.conversations.send(id, system_command(Request::TimerDue)) {
                        Ok(answer) => settled(answer.wait().await),
                        Err(_) => false,
                    }
                }
                EntityId::Account(..) => match self.accounts.send(id, AccountCommand::Wake) {
                    Ok(answer) => settled(answer.wait().await),
                    Err(_) => false,
                },
                EntityId::Agent(..) | EntityId::Inbox(..) => true,
            };
            if woken {
                return true;
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        tracing::warn!(kind = id.kind(), "an entity could not be woken");
        false
    }

    /// Wakes entities; returns those that did not answer.
    async fn wake_all(&self, entities: impl IntoIterator<Item = EntityId>) -> Vec<EntityId> {
        let woken = futures_util::stream::iter(entities).map(|id| async move { (self.wake(&id).await, id) });
        woken
            .buffer_unordered(WAKE_AT_ONCE)
            .filter_map(|(done, id)| async move { (!done).then_some(id) })
            .collect()
            .await
    }
}

impl Router for Node {
    fn conversation(&self, id: ConversationId, command: Command) -> Result<Answer<Reply>, CommandError> {
        self.conversations.send(&EntityId::Conversation(id), command)
    }

    fn account(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        command: AccountCommand,
    ) -> Result<Answer<AccountReply>, CommandError> {
        self.accounts.send(&EntityId::Account(tenant.clone(), account.clone()), command)
    }

    fn agent(
        &self,
        tenant: &TenantId,
        agent: &AgentId,
        command: AgentCommand,
    ) -> Result<Answer<AgentReply>, CommandError> {
        self.agents.send(&EntityId::Agent(tenant.clone(), agent.clone()), command)
    }

    fn inbox(
        &self,
        tenant: &TenantId,
        inbox: &InboxId,
        command: InboxCommand,
    ) -> Result<Answer<InboxReply>, CommandError> {
        self.inboxes.send(&EntityId::Inbox(tenant.clone(), inbox.clone()), command)
    }

    fn is_full(&self, tenant: &TenantId, account: &AccountId) -> bool {
        self.accounts.entity().is_full(EntityId::Account(tenant.clone(), account.clone()).key())
    }
}

/// Wakes every entity that an earlier incarnation may have left with something to derive or hand on, until all have
/// answered; only then may marks of this reign be written.
async fn sweep(node: Weak<Node>) {
    let mut left: Option<HashSet<EntityId>> = None;
    loop {
        let Some(strong) = node.upgrade() else { return };
        if left.is_none() {
            left = unfinished(&strong).await.ok();
        }
        if let Some(entities) = left.take() {
            let remaining: HashSet<EntityId> = strong.wake_all(entities).await.into_iter().collect();
            let published = strong.outbox.as_ref().is_none_or(|outbox| outbox.has_caught_up());
            if remaining.is_empty() && published && swept(&strong).await.is_some() {
                strong.shards.swept.store(true, Ordering::Relaxed);
                return;
            }
            let only_events = remaining.is_empty();
            left = Some(remaining);
            if only_events {
                drop(strong);
                tokio::time::sleep(PUBLISHED_LOOK).await;
                continue;
            }
        }
        drop(strong);
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// The incarnation up to which nothing is left to do.
async fn swept_up_to(tables: &Tables) -> Result<u32, ReadError> {
    Ok(tables.document::<u32>(&cluster_document("swept")).await?.map_or(0, |(_, n)| n))
}

/// Begins to publish; in a store that was written before there were events not before those are published by
/// `events replay`, which says so.
async fn begin_outbox(node: Weak<Node>, router: Weak<dyn Router>, delivered: Delivered) {
    loop {
        let Some(strong) = node.upgrade() else { return };
        let Some(outbox) = strong.outbox.clone() else { return };
        let tables = &strong.shards.tables;
        if let (Ok(true), Ok(swept)) = (events_begun(tables).await, swept_up_to(tables).await) {
            outbox.wait_for_replay(false);
            outbox.begin(router, swept, delivered);
            return;
        }
        outbox.wait_for_replay(true);
        drop((strong, outbox));
        tokio::time::sleep(BEGIN_PAUSE).await;
    }
}

/// Whether whatever the store holds is published, or was begun to be.
async fn events_begun(tables: &Tables) -> Result<bool, ReadError> {
    Ok(tables.document::<bool>(&cluster_document("events")).await?.is_some())
}

/// Notes that every entry of before is published: from here on the outbox does it.
pub async fn note_events_begun(tables: &Tables) -> Result<(), WriteError> {
    tables.put_document(cluster_document("events"), None, &true).await.map(drop)
}

/// Moves the marks of shards whose buckets are settled, once everything of earlier incarnations is in hand.
async fn move_settled(node: Weak<Node>) {
    loop {
        tokio::time::sleep(SETTLE_LOOK).await;
        let Some(strong) = node.upgrade() else { return };
        if !strong.shards.swept.load(Ordering::Relaxed) {
            continue;
        }
        let moved: Vec<_> = (0..strong.shards.count)
            .filter_map(|shard| Some((shard, strong.shards.activity.newly_settled(shard)?)))
            .collect();
        futures_util::stream::iter(moved)
            .for_each_concurrent(WAKE_AT_ONCE, |(shard, (from, mark))| strong.settle(shard, from, mark))
            .await;
    }
}

/// Every entity with activity of earlier incarnations that is not settled.
async fn unfinished(node: &Node) -> Result<HashSet<EntityId>, ReadError> {
    let (tables, epoch) = (&node.shards.tables, node.shards.epoch);
    let done = swept_up_to(tables).await?;
    let of_shard = |shard: u32| async move {
        unsettled(&node.shards, shard, tables.marks(shard).await?.settled, done + 1..=epoch - 1).await
    };
    let mut found = HashSet::new();
    if done + 1 == epoch {
        return Ok(found);
    }
    let mut shards =
        futures_util::stream::iter(0..node.shards.count).map(of_shard).buffer_unordered(SHARDS_READ_AT_ONCE);
    while let Some(of_shard) = shards.next().await {
        found.extend(of_shard?.into_keys());
    }
    if !found.is_empty() {
        tracing::info!(entities = found.len(), "waking what an earlier incarnation left");
    }
    Ok(found)
}

/// Whether an entity has answered a wake-up, or is parked, which its own row says.
fn settled<T>(outcome: Result<T, CommandError>) -> bool {
    let parked = |e: &CommandError| {
        e.detail.as_ref().and_then(|d| d["detail"].as_str()).is_some_and(|d| d.starts_with("parked"))
    };
    match outcome {
        Ok(_) => true,
        Err(e) => parked(&e),
    }
}

/// Notes that everything before this incarnation is in hand: woken entities have activity of this epoch, which covers
/// what they have still to do.
async fn swept(node: &Node) -> Option<()> {
    let (tables, epoch) = (&node.shards.tables, node.shards.epoch);
    let version = tables.document::<u32>(&cluster_document("swept")).await.ok()?.map(|(v, _)| v);
    match tables.put_document(cluster_document("swept"), version, &(epoch - 1)).await.ok()? {
        CasOutcome::Applied => Some(()),
        CasOutcome::Refused(_) => None,
    }
}

/// Fires timers. What fires looks, and does nothing when it has moved. One that is not answered fires again.
async fn run_timers(node: Weak<Node>, mut hour: i64) {
    let places = Arc::new(tokio::sync::Semaphore::new(WAKE_AT_ONCE));
    loop {
        let Some(strong) = node.upgrade() else { return };
        let (shards, timers) = (strong.shards.clone(), strong.shards.timers.clone());
        let now = shards.clock.now();
        for Timer { entity, due } in timers.take_due(now) {
            let (_, hold) = timers.hold(entity.shard(shards.count), due, now);
            let (node, places) = (Arc::downgrade(&strong), places.clone());
            tokio::spawn(async move {
                // Until it is acked its row is one that whoever comes after us reads.
                while let Some(strong) = node.upgrade() {
                    let Ok(place) = places.acquire().await else { break };
                    let woken = strong.wake(&entity).await;
                    drop((place, strong));
                    if woken {
                        break;
                    }
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
                drop(hold);
            });
        }
        if hour_of(now) > hour {
            match read_hours(&strong, hour + 2, hour_of(now) + 1).await {
                Ok(()) => hour = hour_of(now),
                Err(_) => tracing::warn!("timers of the next hour cannot be read yet"),
            }
        }
        move_marks(&strong, hour).await;
        drop(strong);
        let next = timers.next_due().map_or(TIMER_LOOK, |at| at.since(shards.clock.now())).min(TIMER_LOOK);
        tokio::select! {
            () = tokio::time::sleep(next) => {}
            () = timers.changed() => {}
        }
    }
}

/// Reads the timers of every hour that has not been left, up to the next one. Before any entity can arm another.
async fn load_timers(node: &Node) -> Result<i64, ReadError> {
    let (tables, timers) = (&node.shards.tables, &node.shards.timers);
    let present = hour_of(node.shards.clock.now());
    timers.reads_up_to(present + 1);
    let of_shard = |shard: u32| async move {
        let Some(from) = tables.marks(shard).await?.fired_until else { return Ok(()) };
        timers.marked(shard, from);
        for hour in from..=present + 1 {
            for timer in tables.timers(shard, hour).await? {
                timers.arm(timer);
            }
        }
        Ok(())
    };
    let mut shards =
        futures_util::stream::iter(0..node.shards.count).map(of_shard).buffer_unordered(SHARDS_READ_AT_ONCE);
    while let Some(read) = shards.next().await {
        read?;
    }
    drop(shards);
    Ok(present)
}

/// Reads the timers of hours that have come near.
async fn read_hours(node: &Node, from: i64, to: i64) -> Result<(), ReadError> {
    let (tables, timers) = (&node.shards.tables, &node.shards.timers);
    timers.reads_up_to(to);
    for shard in timers.marked_shards() {
        for hour in from..=to {
            for timer in tables.timers(shard, hour).await? {
                timers.arm(timer);
            }
        }
    }
    Ok(())
}

/// Leaves the hours in which nothing is under way any more.
async fn move_marks(node: &Node, present: i64) {
    let (tables, timers) = (&node.shards.tables, &node.shards.timers);
    for (shard, from, to) in timers.movable(present) {
        let Ok(stamp) = node.shards.stamps[shard as usize].next() else { continue };
        node.shards.logs.write_until_answered(Tables::fired_write(shard, stamp, to)).await;
        timers.marked(shard, to);
        for hour in from..to {
            // What a lost drop leaves is never read again.
            let _ = tables.drop_timers(shard, hour, stamp).await;
        }
    }
}

/// Lets go of whoever nobody has asked for a while; of everybody who has nothing to do when memory is short.
async fn passivate(node: Weak<Node>) {
    let mut looked = tokio::time::Instant::now();
    let mut was_short = false;
    loop {
        let Some(idle) = node.upgrade().map(|n| n.idle_after) else { return };
        let look = if was_short { MEMORY_LOOK / 4 } else { MEMORY_LOOK };
        tokio::time::sleep((idle / 4).clamp(MEMORY_LOOK / 10, look)).await;
        let Some(strong) = node.upgrade() else { return };
        let memory = (strong.memory)();
        // Whoever is left after everybody else was forgotten has something to do.
        let crowded = memory == Memory::Spent && was_short && strong.active_count() > CROWD_MIN;
        strong.shards.crowded.store(crowded, Ordering::Relaxed);
        metrics::gauge!("patchbay_actors_crowded").set(f64::from(u8::from(crowded)));
        was_short = memory >= Memory::Short;
        if was_short {
            metrics::counter!("patchbay_actors_memory_short_total").increment(1);
            strong.caches.shrink();
            strong.passivate_idle(Duration::ZERO);
        } else if looked.elapsed() >= idle / 4 {
            looked = tokio::time::Instant::now();
            strong.passivate_idle(idle);
        }
        metrics::gauge!("patchbay_actors_active").set(strong.active_count() as f64);
    }
}
