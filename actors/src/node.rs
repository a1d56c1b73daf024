//! A node: the entities of the shards that it holds, and the way to all others. The composition of this crate, and its
//! [`Router`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use patchbay_protocol::command::{Command, Reply, Request};
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, EntityId, InboxId, TenantId};
use patchbay_protocol::{CommandError, ErrorCode};
use patchbay_storage::events::{Delivered, Sink};
use patchbay_storage::tables::Tables;
use patchbay_storage::{CLUSTER, CasOutcome, DocumentKey, Engine, ReadError, WriteError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::account::{Account, AccountCommand, AccountReply, OutboundConfig};
use crate::agent::{Agent, AgentCommand, AgentReply, Edges};
use crate::clock::Clock;
use crate::cluster::host::Action;
use crate::cluster::map::{Incarnation, Member, ShardMap};
use crate::cluster::member::Told;
use crate::cluster::mesh::{Here, Identity, Mesh, Network};
use crate::cluster::runtime::{ClusterConfig, Membership};
use crate::cluster::store::Store;
use crate::cluster::switch::{Local, Parcel, Place, Switch};
use crate::conversation::Conversation;
use crate::directory::{Directory, Stale};
use crate::fanout::{Aside, Fanout, Far, Home, Interest, Outlet, Topic, Watched, Watches};
use crate::inbox::{Inbox, InboxCommand, InboxReply};
use crate::keeper;
use crate::memory::{self, Caches, Memory};
use crate::outbox::{LANES_MAX, Outbox};
use crate::ports::{MediaFetcher, NoMedia, Provider, Publisher};
use crate::router::{Answer, Router, system_command};
use crate::sessions::Sessions;
use crate::shard::Shards;
use crate::shard::slots::{Refused, Slots};
use crate::shard::soft::{self, SoftSlots};

/// Between two looks whether publishing may begin.
const BEGIN_PAUSE: Duration = Duration::from_secs(1);
/// Entities woken at once by a sweep or by timers.
pub(crate) const WAKE_AT_ONCE: usize = 64;

/// A node that ends gives its shards away for so long; what it has left then is taken over.
const DRAIN_PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at the calls under way of a node that stops.
const FINISH_LOOK: Duration = Duration::from_millis(20);
/// Between two looks at entities that write what is derived of them, and then their snapshots.
const SNAPSHOT_LOOK: Duration = Duration::from_millis(100);
/// Looks without a change after which those that are left have something to do that does not end.
const SNAPSHOT_LOOKS: u32 = 6;
/// What a node has said of itself is kept so long.
const COUNTERS_KEPT: Duration = Duration::from_secs(60);
/// Memory is looked at least this often.
const MEMORY_LOOK: Duration = Duration::from_secs(1);
/// Entities that are busy beyond which nobody else is let in while memory is spent.
const CROWD_MIN: usize = 1_000;

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
    /// Its place in the cluster.
    pub cluster: ClusterConfig,
    /// Where other nodes reach it; none: nowhere.
    pub mesh: Option<Arc<dyn Network>>,
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
            cluster: ClusterConfig::default(),
            mesh: None,
        }
    }
}

/// How busy a node is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Open sockets.
    pub connections: u64,
    /// Entities in memory.
    pub active: u64,
    /// Commands that wait for their shard to be somewhere.
    pub waiting: u64,
}

/// A node of the cluster, as another one knows it.
#[derive(Clone, Debug)]
pub struct NodeState {
    /// This start's number.
    pub incarnation: Incarnation,
    /// What it brought into the cluster.
    pub member: Member,
    /// Shards that it holds.
    pub shards: usize,
    /// How busy it is, and how long ago it said so, a second or two at most while it is heard; none: it is not.
    pub said: Option<(Counters, Duration)>,
}

impl NodeState {
    /// `serving`, or `draining` when it is to give away what it has.
    pub fn status(&self) -> &'static str {
        if self.member.draining { "draining" } else { "serving" }
    }

    /// How long ago it said how busy it is, in milliseconds.
    pub fn heard_ms_ago(&self) -> Option<u64> {
        self.said.map(|(_, ago)| u64::try_from(ago.as_millis()).unwrap_or(u64::MAX))
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
    /// Others would not speak with it.
    #[error("{0}")]
    Stranger(String),
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
    switch: Arc<Switch>,
    mesh: OnceLock<Arc<Mesh>>,
    sessions: Sessions,
    /// How busy others were when they last said so.
    counters: Mutex<HashMap<Incarnation, (Counters, Instant)>>,
    /// Shows things here and elsewhere.
    shown: Arc<dyn Publisher>,
    publisher: Arc<dyn Publisher>,
    interest: Arc<Interest>,
    watches: Arc<Watches>,
    me: Weak<Self>,
    membership: Mutex<Option<Arc<Membership>>>,
    leaving: AtomicBool,
    /// Asked to give its shards away: also as another incarnation, until that is called off.
    drains: AtomicBool,
    engine: Arc<dyn Engine>,
    cluster: ClusterConfig,
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

/// A number that rises with every start of every node of the cluster.
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
        let shards = Shards::new(config.shards, 0, tables, config.clock);
        let directory = Arc::new(Directory::new(config.engine.clone()));
        let (outbox, delivered) =
            config.events.map(|e| (Outbox::new(shards.clone(), e.sink, e.lanes_max), e.delivered)).unzip();
        let interest = Arc::<Interest>::default();
        let fanout = Fanout { here: config.publisher.clone(), interest: interest.clone() };
        let shown: Arc<dyn Publisher> = Arc::new(fanout);
        let conversation =
            Conversation::new(shown.clone(), directory.clone(), config.media.clone(), outbox.clone());
        let account = Account::new(config.outbound, directory.clone(), config.provider);
        let conversations = Slots::start(conversation, shards.clone()).await?;
        let accounts = Slots::start(account, shards.clone()).await?;
        let alone = config.engine.is_exclusive();
        let node = Arc::new_cyclic(|me: &Weak<Self>| Self {
            conversations,
            accounts,
            agents: SoftSlots::new(Agent::new(shown.clone(), shards.clone()), shards.clone()),
            inboxes: SoftSlots::new(
                Inbox::new(shown.clone(), directory.clone(), config.clock),
                shards.clone(),
            ),
            watches: Watches::new(config.publisher.clone(), me.clone() as Weak<dyn Far>, alone),
            publisher: config.publisher,
            interest,
            me: me.clone(),
            outbox,
            switch: Switch::new(config.shards),
            mesh: OnceLock::new(),
            sessions: Sessions::default(),
            counters: Mutex::default(),
            shown,
            membership: Mutex::default(),
            leaving: AtomicBool::new(false),
            drains: AtomicBool::new(false),
            engine: config.engine,
            cluster: config.cluster,
            idle_after: config.idle_after,
            memory: config.memory,
            caches: Caches::default(),
            shards,
            identity,
            directory,
        });
        node.agents.entity().set_edges(node.me.clone() as Weak<dyn Edges>);
        node.caches.add(&node.directory);
        let tells = node.me.clone();
        node.directory.add_announce(Box::new(move |tenant| {
            let node = tells.upgrade();
            node.as_ref().and_then(|node| node.mesh()).inspect(|mesh| mesh.tell_changed(tenant));
        }));
        let router: Weak<dyn Router> = Arc::downgrade(&(node.clone() as Arc<dyn Router>));
        node.conversations.entity().set_router(router.clone());
        node.accounts.entity().set_router(router.clone());
        let local: Weak<dyn Local> = Arc::downgrade(&(node.clone() as Arc<dyn Local>));
        node.switch.set_local(local);
        let switch = node.switch.clone();
        node.conversations.set_give_back(Box::new(move |id, command, reply| {
            if let EntityId::Conversation(id) = id {
                switch.returned(Parcel::Conversation(*id, Box::new(command), reply));
            }
        }));
        let switch = node.switch.clone();
        node.accounts.set_give_back(Box::new(move |id, command, reply| {
            if let EntityId::Account(tenant, account) = id {
                switch.returned(Parcel::Account(tenant.clone(), account.clone(), Box::new(command), reply));
            }
        }));
        let switch = node.switch.clone();
        node.agents.set_give_back(Box::new(move |id, command, reply| {
            if let EntityId::Agent(tenant, agent) = id {
                switch.returned(Parcel::Agent(tenant.clone(), agent.clone(), Box::new(command), reply));
            }
        }));
        let switch = node.switch.clone();
        node.inboxes.set_give_back(Box::new(move |id, command, reply| {
            if let EntityId::Inbox(tenant, inbox) = id {
                switch.returned(Parcel::Inbox(tenant.clone(), inbox.clone(), Box::new(command), reply));
            }
        }));
        if let Some(network) = config.mesh {
            let identity = Identity {
                cluster: node.cluster.name.clone(),
                shards: config.shards,
                version: node.cluster.speaks,
                tls: node.cluster.tls.clone(),
            };
            if let Some(me) = &node.cluster.member.mesh
                && let Some(why) = identity.stranger(&*network, me, &node.others(me).await).await
            {
                return Err(StartError::Stranger(why));
            }
            let here: Weak<dyn Here> = Arc::downgrade(&(node.clone() as Arc<dyn Here>));
            let mesh = node.mesh.get_or_init(|| Mesh::start(identity, network, node.switch.clone(), here));
            node.switch.set_transport(mesh.clone());
        }
        let actions = node.join().await?;
        if let Some(delivered) = delivered {
            tokio::spawn(begin_outbox(Arc::downgrade(&node), router, delivered));
        }
        keeper::start(&node, actions).await;
        tokio::spawn(passivate(Arc::downgrade(&node)));
        Ok(node)
    }

    /// Where other nodes are that are in the cluster now, as far as that can be read. Who was at this address before is
    /// nobody else.
    async fn others(&self, me: &str) -> Vec<String> {
        let store = Store::new(self.engine.clone(), self.cluster.ttl);
        let map = store.map(|| ShardMap::new(0, 0, 0)).await;
        let members = map.into_iter().flat_map(|(_, map)| map.members.into_values());
        members.filter_map(|member| member.mesh).filter(|address| address != me).collect()
    }

    /// Comes into the cluster as a new incarnation.
    pub(crate) async fn join(&self) -> Result<mpsc::Receiver<Action>, StartError> {
        let tables = &self.shards.tables;
        let incarnation = next_incarnation(tables).await?;
        // A store of before there was a map: epochs were numbers of incarnations.
        let settled =
            tables.document::<u32>(&cluster_document("swept")).await.map_err(|_| StartError::Store)?;
        let first = ShardMap::new(self.shards.count, incarnation - 1, settled.map_or(0, |(_, n)| n));
        let engine = self.cluster.apart.as_ref().map_or(&self.engine, |apart| &apart.engine);
        let store = Store::new(engine.clone(), self.cluster.ttl);
        let mut cluster = self.cluster.clone();
        cluster.member.draining = self.drains.load(Ordering::Relaxed);
        let joined = Membership::join(incarnation, &cluster, store, first).await;
        let (membership, actions) = joined.map_err(|_| StartError::Store)?;
        self.shards.incarnation.store(incarnation, Ordering::Relaxed);
        *self.membership.lock().unwrap_or_else(PoisonError::into_inner) = Some(membership.clone());
        let drains = self.drains.load(Ordering::Relaxed);
        if drains != cluster.member.draining {
            // It was said, or called off, while this was on its way.
            membership.tell(Told::Drain(drains)).await;
        }
        Ok(actions)
    }

    /// Its membership in the cluster.
    pub fn membership(&self) -> Option<Arc<Membership>> {
        self.membership.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether nobody else can be in the cluster.
    pub fn is_alone(&self) -> bool {
        self.engine.is_exclusive()
    }

    /// Whether a shard is served here and stays.
    fn is_open(&self, shard: u32) -> bool {
        self.shards.reign(shard).is_some_and(|reign| !reign.is_leaving())
    }

    /// Whether this node ends.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    pub(crate) fn conversations(&self) -> &Arc<Slots<Conversation>> {
        &self.conversations
    }

    pub(crate) fn accounts(&self) -> &Arc<Slots<Account>> {
        &self.accounts
    }

    /// Forgets everybody without a log of a shard that is another node's now.
    pub(crate) fn close_soft(&self, shard: u32) {
        for id in self.agents.close(shard) {
            if let EntityId::Agent(tenant, agent) = id {
                self.publisher.presence_elsewhere(&tenant, &agent);
            }
        }
        self.inboxes.close(shard);
    }

    /// The documents of tenants.
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// The links to other nodes; none: it has none.
    pub fn mesh(&self) -> Option<&Arc<Mesh>> {
        self.mesh.get()
    }

    /// The way to entities wherever they live.
    pub fn switch(&self) -> &Arc<Switch> {
        &self.switch
    }

    /// Which nodes wait for what is published here.
    pub fn interest(&self) -> &Arc<Interest> {
        &self.interest
    }

    /// What this node's sockets wait for.
    pub fn watches(&self) -> &Arc<Watches> {
        &self.watches
    }

    /// Shows something beside the order of a topic to every other node whose sockets wait for it. It is lost where that
    /// cannot be done at once.
    pub fn aside(&self, topic: &Topic, aside: impl FnOnce() -> Aside) {
        if self.is_alone() {
            return;
        }
        match self.home(topic) {
            (shard, Some(home)) if home.who != self.me() => {
                self.mesh().inspect(|mesh| mesh.aside(home.who, shard, topic, &aside()));
            }
            (_, Some(_)) if self.interest.is_any() => self.interest.aside(topic, &aside(), None),
            (_, _) => {}
        }
    }

    /// Who looks at a topic, on every node that answers within a second; each in its publisher's words.
    pub async fn present(&self, topic: &Topic) -> Result<Vec<String>, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.switch.send(Parcel::Who(topic.clone(), reply.into())).map_err(|refused| refused.0)?;
        Answer::from(answer).wait().await
    }

    /// What a client without a socket sends, for its session at another node.
    ///
    /// # Errors
    /// `not_found` when there is no such node or session, `unavailable` when it cannot be told now, and what the session answers.
    pub async fn emulated(&self, at: Incarnation, session: String, data: Bytes) -> Result<(), CommandError> {
        let is_there = self.membership().is_some_and(|m| m.map().1.members.contains_key(&at));
        let Some(mesh) = self.mesh().filter(|_| is_there) else { return Err(ErrorCode::NotFound.into()) };
        let (reply, answer) = oneshot::channel();
        mesh.ask(at, Parcel::Session(session, data, reply.into()))
            .map_err(|_| CommandError::unavailable())?;
        Answer::from(answer).wait().await
    }

    /// What is not published yet; none: nothing is published.
    pub fn outbox(&self) -> Option<&Arc<Outbox>> {
        self.outbox.as_ref()
    }

    /// What is forgotten when memory is short.
    pub fn caches(&self) -> &Caches {
        &self.caches
    }

    /// Gives its shards to others, at the rate at which the cluster moves any. False: it could not, since nobody takes
    /// them or `patience` is over; what it still has it goes on serving.
    pub async fn drain(&self, patience: Duration) -> bool {
        let Some(membership) = self.membership().filter(|_| !self.is_alone()) else { return false };
        self.wants_drain(true).await;
        let me = membership.incarnation();
        let mut maps = membership.maps();
        let given = maps.wait_for(|(_, map)| map.held_by(me).next().is_none() || !map.others_take(me));
        let _ = tokio::time::timeout(patience, given).await;
        membership.map().1.held_by(me).next().is_none()
    }

    /// Begins to give its shards to others, or calls that off: also as another incarnation.
    pub async fn wants_drain(&self, drains: bool) {
        self.drains.store(drains, Ordering::Relaxed);
        if let Some(membership) = self.membership() {
            membership.tell(Told::Drain(drains)).await;
        }
    }

    /// What all entities share.
    pub fn shards(&self) -> &Arc<Shards> {
        &self.shards
    }

    /// This start's number.
    pub fn incarnation(&self) -> u32 {
        self.shards.incarnation.load(Ordering::Relaxed)
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
    pub async fn finish(self: &Arc<Self>) {
        self.hand_over().await;
        self.end().await;
    }

    /// The first part of it: gives its shards to others, while whoever is connected here is served.
    pub async fn hand_over(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.drain(DRAIN_PATIENCE).await;
    }

    /// The rest of it, when nobody is connected any more.
    pub async fn end(self: &Arc<Self>) {
        self.shards.reigns().for_each(|reign| reign.leaves());
        for id in self.accounts.active() {
            self.calls_end(&id).await;
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
        keeper::finish(self).await;
    }

    /// Waits until an account that begins no call any more has heard of those that it began, and its conversations with it.
    pub(crate) async fn calls_end(&self, id: &EntityId) {
        loop {
            let status = match self.accounts.send(id, AccountCommand::Status) {
                Ok(answer) => answer.wait().await,
                Err(e) => Err(e),
            };
            if matches!(status, Ok(AccountReply::Status { under_way: 0, .. })) {
                return;
            }
            tokio::time::sleep(FINISH_LOOK).await;
        }
    }

    /// How busy this node is.
    fn counters(&self) -> Counters {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        Counters {
            connections: self.publisher.connections(),
            active: count(self.active_count()),
            waiting: count(self.switch.waiting()),
        }
    }

    /// Every node, with the version of the map that this is of.
    pub fn nodes(&self) -> Option<(u64, Vec<NodeState>)> {
        let (version, map) = self.membership()?.map();
        let heard = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        let nodes = map.members.iter().map(|(incarnation, member)| {
            let said = if *incarnation == self.incarnation() {
                Some((self.counters(), Duration::ZERO))
            } else {
                heard.get(incarnation).map(|(counters, at)| (*counters, at.elapsed()))
            };
            let shards = map.held_by(*incarnation).count();
            NodeState { incarnation: *incarnation, member: member.clone(), shards, said }
        });
        Some((version, nodes.collect()))
    }

    /// Shows operators how the cluster is, while any of them looks and this node is the one to say so.
    pub(crate) fn show_cluster(&self) {
        let topic = Topic::Cluster;
        let is_watched = || self.publisher.is_watched(&topic) || self.interest.is_watched(&topic);
        let is_said_here = self.shards.reign(topic.shard(self.shards.count)).is_some_and(|r| r.is_held_now());
        let Some(membership) = self.membership().filter(|_| is_said_here && is_watched()) else { return };
        let Some((version, nodes)) = self.nodes() else { return };
        let nodes: Vec<serde_json::Value> = nodes
            .iter()
            .map(|node| {
                let said = node.said.map(|(counters, _)| counters);
                serde_json::json!({
                    "incarnation": node.incarnation,
                    "name": node.member.name,
                    "status": node.status(),
                    "shards": node.shards,
                    "connections": said.map(|c| c.connections),
                    "active": said.map(|c| c.active),
                    "waiting": said.map(|c| c.waiting),
                    "heard_ms_ago": node.heard_ms_ago(),
                })
            })
            .collect();
        let (_, map) = membership.map();
        let moving = map.shards.iter().filter(|slot| slot.wish.is_some()).count();
        let publication = serde_json::json!({
            "type": "cluster", "map_version": version, "shards": map.shards.len(), "moving": moving, "nodes": nodes,
        });
        self.shown.cluster(publication.to_string().into());
    }

    /// An agent's socket opened here.
    pub async fn agent_connected(
        &self,
        tenant: &TenantId,
        agent: &AgentId,
        connection: String,
    ) -> Result<AgentReply, CommandError> {
        self.sessions.opened(tenant, agent, &connection);
        let incarnation = self.incarnation();
        let is_known = self.membership().is_some_and(|m| m.map().1.members.contains_key(&incarnation));
        if !is_known {
            // Nobody would take it for a node's.
            return Err(CommandError::unavailable());
        }
        self.agent(tenant, agent, AgentCommand::Connected { connection, incarnation })?.wait().await
    }

    /// It closed. If that cannot be told now it is told later.
    pub async fn agent_disconnected(&self, tenant: &TenantId, agent: &AgentId, connection: String) {
        self.sessions.closed(tenant, agent, &connection);
        self.tell_closed(tenant, agent, connection).await;
    }

    async fn tell_closed(&self, tenant: &TenantId, agent: &AgentId, connection: String) {
        let told = AgentCommand::Disconnected { connection: connection.clone() };
        let told = match self.agent(tenant, agent, told) {
            Ok(answer) => answer.wait().await,
            Err(error) => Err(error),
        };
        if told.is_ok() {
            self.sessions.told(tenant, agent, &connection);
        }
    }

    /// Tells of sockets that closed and could not be told of.
    pub(crate) async fn tell_all_closed(&self) {
        let tells = self.sessions.untold().into_iter();
        let tells = tells.map(|(tenant, agent, connection)| async move {
            self.tell_closed(&tenant, &agent, connection).await;
        });
        futures_util::stream::iter(tells).for_each_concurrent(WAKE_AT_ONCE, |tells| tells).await;
    }

    /// This node is another incarnation now: tells again of every socket here, until its agent's owner knows.
    pub(crate) async fn tell_all_open(&self) {
        let Some(membership) = self.membership() else { return };
        let incarnation = membership.incarnation();
        let mut maps = membership.maps();
        // It ends with this incarnation, and the next one tells.
        if maps.wait_for(|(_, map)| map.members.contains_key(&incarnation)).await.is_err() {
            return;
        }
        self.sessions.are_unknown();
        self.tell_unknown().await;
    }

    /// Tells of sockets that are open under another incarnation than their agents' owners know.
    pub(crate) async fn tell_unknown(&self) {
        let incarnation = self.incarnation();
        let tells = self.sessions.unknown().into_iter();
        let tells = tells.map(|(tenant, agent, connection)| async move {
            let told = AgentCommand::Connected { connection: connection.clone(), incarnation };
            let told = match self.agent(&tenant, &agent, told) {
                Ok(answer) => answer.wait().await,
                Err(error) => Err(error),
            };
            if told.is_ok() {
                self.sessions.known(&tenant, &agent, &connection);
            }
        });
        futures_util::stream::iter(tells).for_each_concurrent(WAKE_AT_ONCE, |tells| tells).await;
    }

    /// Nodes are gone: agents that are loaded here may have been on them.
    pub(crate) fn look_at_agents(&self) {
        for id in self.agents.active() {
            // One that takes nothing now is looked at by its timer.
            let _ = self.agents.send(&id, AgentCommand::Look);
        }
    }

    /// Wakes an entity and waits for its answer.
    pub(crate) async fn wake(&self, id: &EntityId) -> bool {
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
                EntityId::Agent(..) => match self.agents.send(id, AgentCommand::Look) {
                    Ok(answer) => answer.wait().await.is_ok(),
                    Err(_) => false,
                },
                EntityId::Inbox(..) => true,
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
    pub(crate) async fn wake_all(&self, entities: impl IntoIterator<Item = EntityId>) -> Vec<EntityId> {
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
        let (reply, answer) = oneshot::channel();
        let mut parcel = (command, reply.into());
        if self.switch.is_quiet() {
            match self.conversations.hand(&EntityId::Conversation(id), parcel.0, parcel.1) {
                Ok(()) => return Ok(answer.into()),
                Err(Refused::Error(error, _)) => return Err(error),
                Err(Refused::Elsewhere(command, reply)) => parcel = (command, reply),
            }
        }
        self.switch
            .send(Parcel::Conversation(id, Box::new(parcel.0), parcel.1))
            .map_err(|refused| refused.0)?;
        Ok(answer.into())
    }

    fn account(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        command: AccountCommand,
    ) -> Result<Answer<AccountReply>, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.switch
            .send(Parcel::Account(tenant.clone(), account.clone(), Box::new(command), reply.into()))
            .map_err(|refused| refused.0)?;
        Ok(answer.into())
    }

    fn agent(
        &self,
        tenant: &TenantId,
        agent: &AgentId,
        command: AgentCommand,
    ) -> Result<Answer<AgentReply>, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.switch
            .send(Parcel::Agent(tenant.clone(), agent.clone(), Box::new(command), reply.into()))
            .map_err(|refused| refused.0)?;
        Ok(answer.into())
    }

    fn inbox(
        &self,
        tenant: &TenantId,
        inbox: &InboxId,
        command: InboxCommand,
    ) -> Result<Answer<InboxReply>, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.switch
            .send(Parcel::Inbox(tenant.clone(), inbox.clone(), Box::new(command), reply.into()))
            .map_err(|refused| refused.0)?;
        Ok(answer.into())
    }

    fn is_full(&self, tenant: &TenantId, account: &AccountId) -> bool {
        self.accounts.entity().is_full(EntityId::Account(tenant.clone(), account.clone()).key())
    }
}

impl Here for Node {
    fn incarnation(&self) -> u32 {
        self.incarnation()
    }

    fn take(&self, parcel: Parcel) -> Result<(), Parcel> {
        if let Parcel::Session(..) = parcel {
            return self.hand(parcel);
        }
        if matches!(self.place(parcel.shard(self.shards.count)), Place::There(_)) {
            return Err(parcel);
        }
        // Nothing that arrived before it waits.
        let handed = if self.switch.is_quiet() { self.hand(parcel) } else { Err(parcel) };
        handed.or_else(|parcel| {
            // It may be being opened, or about to go: then it waits here until either has happened.
            self.switch.arrived(parcel).or_else(|refused| {
                let (error, parcel) = *refused;
                parcel.refuse(error);
                Ok(())
            })
        })
    }

    fn heard(&self, version: u64) {
        if version > self.map_version()
            && let Some(membership) = self.membership()
        {
            membership.hear(version);
        }
    }

    fn interest(&self) -> &Arc<Interest> {
        &self.interest
    }

    fn watches(&self) -> &Arc<Watches> {
        &self.watches
    }

    fn watch(&self, topic: Topic, epoch: u32, check: bool, outlet: Arc<dyn Outlet>) {
        let was_new = self.interest.add(&topic, &outlet);
        // Looked at after it was added: whatever ends the reign takes it out again.
        if !self.is_home(&topic, epoch) {
            self.interest.remove(&topic, outlet.number());
            outlet.watched(&topic, epoch, Watched::NotOwner(self.map_version()));
            return;
        }
        let tip = self.interest.tip(&topic);
        let (Some(node), true) = (self.me.upgrade(), check && (was_new || tip.is_none())) else {
            self.interest.reaches(&topic, tip.unwrap_or(0), epoch, &outlet);
            return;
        };
        tokio::spawn(async move {
            match topic {
                Topic::Conversation(_) | Topic::Cluster => {}
                Topic::Inbox(..) if was_new => outlet.missed(&topic),
                Topic::Agent(..) if was_new => {
                    if let Some(state) = node.state_of(&topic).await {
                        outlet.publish(&topic, &outlet.wire(&topic), &[(0, state)]);
                    }
                }
                Topic::Inbox(..) | Topic::Agent(..) => {}
            }
            match node.reach(&topic).await {
                Some(tip) => node.interest.reaches(&topic, tip, epoch, &outlet),
                None => outlet.watched(&topic, epoch, Watched::Later),
            }
        });
    }

    fn counters(&self) -> Counters {
        self.counters()
    }

    fn counted(&self, who: Incarnation, counters: Counters) {
        let mut heard = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        heard.insert(who, (counters, Instant::now()));
        // Whoever is gone says nothing any more.
        heard.retain(|_, (_, at)| at.elapsed() < COUNTERS_KEPT);
    }

    fn publisher(&self) -> &dyn Publisher {
        &*self.publisher
    }

    fn changed(&self, tenant: TenantId) {
        let directory = self.directory.clone();
        tokio::spawn(async move { directory.heard_of_change(Stale::Of(&tenant)).await });
    }
}

#[async_trait]
impl Edges for Node {
    fn names(&self, incarnation: u64) -> bool {
        let incarnation = Incarnation::try_from(incarnation);
        self.membership().zip(incarnation.ok()).is_some_and(|(m, n)| m.map().1.members.contains_key(&n))
    }

    async fn is_dead(&self, incarnation: u64) -> bool {
        match (self.membership(), Incarnation::try_from(incarnation)) {
            (Some(membership), Ok(incarnation)) => membership.is_dead(incarnation).await,
            (None, _) | (_, Err(_)) => false,
        }
    }
}

impl Far for Node {
    fn me(&self) -> Incarnation {
        self.incarnation()
    }

    fn home(&self, topic: &Topic) -> (u32, Option<Home>) {
        let shard = topic.shard(self.shards.count);
        (shard, self.holder(shard))
    }

    fn register(&self, at: Home, topic: &Topic, check: bool) -> bool {
        let shard = topic.shard(self.shards.count);
        self.mesh().is_some_and(|mesh| mesh.register(at, shard, topic, check))
    }

    fn withdraw(&self, at: Incarnation, topic: &Topic) {
        let shard = topic.shard(self.shards.count);
        self.mesh().inspect(|mesh| mesh.withdraw(at, shard, topic));
    }

    fn check_here(&self, at: Home, topic: &Topic) {
        let (Some(node), topic) = (self.me.upgrade(), topic.clone()) else { return };
        tokio::spawn(async move {
            let outcome = match node.reach(&topic).await {
                Some(tip) => Watched::Live(tip),
                None => Watched::Later,
            };
            node.show_missed(&topic).await;
            node.watches.watched(at, &topic, outcome);
        });
    }

    fn heard(&self, version: u64) {
        Here::heard(self, version);
    }
}

impl Node {
    /// Who serves a shard, as far as this node knows; none: it is on its way.
    fn holder(&self, shard: u32) -> Option<Home> {
        if let Some(reign) = self.shards.reign(shard).filter(|reign| !reign.is_fenced()) {
            return Some(Home { who: self.incarnation(), epoch: reign.epoch() });
        }
        let membership = self.membership()?;
        let (_, map) = membership.map();
        let slot = map.shards.get(shard as usize)?;
        let there = slot.holder.filter(|who| *who != membership.incarnation());
        there.map(|who| Home { who, epoch: slot.epoch })
    }

    /// How far a topic reaches that is here: 0 without an order. None: that cannot be said now.
    async fn reach(&self, topic: &Topic) -> Option<u64> {
        let Topic::Conversation(id) = topic else { return Some(0) };
        let _turn = self.interest.check_turn().await?;
        let answer =
            self.conversations.send(&EntityId::Conversation(*id), system_command(Request::Tip)).ok()?;
        match answer.wait().await {
            Ok(Reply::Tip(tip)) => Some(tip.seq),
            Ok(_) => Some(0),
            Err(error) => {
                tracing::debug!(%error, conversation = %id, "how far it reaches is not known");
                None
            }
        }
    }

    /// The state of a topic without an order, where it has one: an agent's own.
    async fn state_of(&self, topic: &Topic) -> Option<Bytes> {
        let Topic::Agent(tenant, agent) = topic else { return None };
        let id = EntityId::Agent(tenant.clone(), agent.clone());
        let answer = self.agents.send(&id, AgentCommand::Get).ok()?;
        answer.wait().await.ok().map(|reply| crate::agent::session(&reply))
    }

    /// Something of a topic without an order may not have been shown here: what it is now is.
    async fn show_missed(&self, topic: &Topic) {
        match topic {
            // The next one follows within a second.
            Topic::Conversation(_) | Topic::Cluster => {}
            Topic::Inbox(..) => self.publisher.lost(topic),
            Topic::Agent(tenant, agent) => {
                if let Some(state) = self.state_of(topic).await {
                    self.publisher.agent(tenant, agent, state);
                }
            }
        }
    }

    fn is_home(&self, topic: &Topic, epoch: u32) -> bool {
        self.home(topic).1 == Some(Home { who: self.incarnation(), epoch })
    }
}

impl Local for Node {
    fn place(&self, shard: u32) -> Place {
        match self.holder(shard) {
            Some(home) if home.who == self.incarnation() => Place::Here,
            Some(home) => Place::There(home.who),
            None => Place::Nowhere,
        }
    }

    fn map_version(&self) -> u64 {
        self.membership().map_or(0, |membership| membership.map().0)
    }

    fn hand(&self, parcel: Parcel) -> Result<(), Parcel> {
        let shard = parcel.shard(self.shards.count);
        match parcel {
            Parcel::Conversation(id, command, reply) => {
                match self.conversations.hand(&EntityId::Conversation(id), *command, reply) {
                    Ok(()) => {}
                    Err(Refused::Error(error, reply)) => drop(reply.send(Err(error))),
                    Err(Refused::Elsewhere(command, reply)) => {
                        return Err(Parcel::Conversation(id, Box::new(command), reply));
                    }
                }
            }
            Parcel::Account(tenant, account, command, reply) => {
                let id = EntityId::Account(tenant.clone(), account.clone());
                match self.accounts.hand(&id, *command, reply) {
                    Ok(()) => {}
                    Err(Refused::Error(error, reply)) => drop(reply.send(Err(error))),
                    Err(Refused::Elsewhere(command, reply)) => {
                        return Err(Parcel::Account(tenant, account, Box::new(command), reply));
                    }
                }
            }
            Parcel::Session(session, data, reply) => {
                drop(reply.send(self.publisher.emulated(&session, data)))
            }
            parcel if !self.is_open(shard) => return Err(parcel),
            Parcel::Who(topic, reply) => {
                let Some(node) = self.me.upgrade() else { return Ok(()) };
                tokio::spawn(async move {
                    let mut who = node.interest.gather(&topic).await;
                    who.push(node.publisher.present(&topic));
                    drop(reply.send(Ok(who)));
                });
            }
            Parcel::Agent(tenant, agent, command, reply) => {
                let id = EntityId::Agent(tenant.clone(), agent.clone());
                match self.agents.hand(&id, *command, reply) {
                    Ok(()) => {}
                    Err(soft::Refused::Error(error, reply)) => drop(reply.send(Err(error))),
                    Err(soft::Refused::Elsewhere(command, reply)) => {
                        return Err(Parcel::Agent(tenant, agent, Box::new(command), reply));
                    }
                }
            }
            Parcel::Inbox(tenant, inbox, command, reply) => {
                let id = EntityId::Inbox(tenant.clone(), inbox.clone());
                match self.inboxes.hand(&id, *command, reply) {
                    Ok(()) => {}
                    Err(soft::Refused::Error(error, reply)) => drop(reply.send(Err(error))),
                    Err(soft::Refused::Elsewhere(command, reply)) => {
                        return Err(Parcel::Inbox(tenant, inbox, Box::new(command), reply));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Begins to publish; in a store that was written before there were events not before those are published by
/// `events replay`, which says so.
async fn begin_outbox(node: Weak<Node>, router: Weak<dyn Router>, delivered: Delivered) {
    loop {
        let Some(strong) = node.upgrade() else { return };
        let Some(outbox) = strong.outbox.clone() else { return };
        if let Ok(true) = events_begun(&strong.shards.tables).await {
            outbox.wait_for_replay(false);
            outbox.begin(router, delivered);
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
