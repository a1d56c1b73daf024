//! Three nodes on one store, in one process: shards move, nodes are lost, and what was acked stands once and in order. Once
//! over wires of the test's own, on a clock of its own; once over the mesh.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use common::Graph;
use patchbay_actors::clock::Clock;
use patchbay_actors::cluster::map::{Incarnation, Member};
use patchbay_actors::cluster::mesh::{Tcp, VERSION};
use patchbay_actors::cluster::runtime::ClusterConfig;
use patchbay_actors::cluster::switch::{Local as _, Parcel, Transport, Turn};
use patchbay_actors::cluster::ticks::Ticks;
use patchbay_actors::desk::{Desk, Page, Who};
use patchbay_actors::directory::{Account, Inbox, Settings};
use patchbay_actors::fanout::{Aside, Topic};
use patchbay_actors::intake::Intake;
use patchbay_actors::node::{Node, NodeConfig};
use patchbay_actors::ports::Publisher;
use patchbay_actors::router::Router as _;
use patchbay_connectors::Connector as _;
use patchbay_protocol::Timestamp;
use patchbay_protocol::command::{AddNote, Reply, Request};
use patchbay_protocol::ids::{AgentId, ConversationId, InboxId, TenantId};
use patchbay_storage::log::LogKey;
use patchbay_storage::model::Model;
use patchbay_storage::{
    Batch, CasOutcome, Document, DocumentKey, Engine, ReadError, Row, Scan, Stamp, Table, WriteError,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::Instant;

const SHARDS: u32 = 32;

/// Wires between nodes of one process: cut with the node that they lead to.
#[derive(Default)]
struct Wires {
    nodes: Mutex<HashMap<Incarnation, Weak<Node>>>,
    sent: AtomicU64,
    returned: AtomicU64,
}

/// One node's end of them.
struct Wire {
    wires: Arc<Wires>,
    from: Weak<Node>,
}

impl Transport for Wire {
    fn send(&self, to: Incarnation, parcel: Parcel, turn: Turn) -> Result<(), Parcel> {
        let target = self.wires.nodes.lock().unwrap().get(&to).and_then(Weak::upgrade);
        let (Some(target), Some(from)) = (target, self.from.upgrade()) else { return Err(parcel) };
        self.wires.sent.fetch_add(1, Ordering::Relaxed);
        let shard = parcel.shard(SHARDS);
        // What came back is told when nobody holds the switch.
        match target.hand(parcel) {
            Ok(()) => {
                tokio::spawn(async move { from.switch().settled(shard) });
            }
            Err(parcel) => {
                self.wires.returned.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    from.switch().came_back(parcel, turn);
                    from.switch().settled(shard);
                });
            }
        }
        Ok(())
    }
}

/// What a node's sockets would show: one that waits for each of some conversations from its beginning.
#[derive(Default)]
struct Screen {
    shown: Mutex<HashMap<ConversationId, Vec<Value>>>,
    /// Conversations of which it was told that there is more, or that were closed to it.
    behind: Mutex<HashSet<ConversationId>>,
    live: AtomicU64,
    read: AtomicU64,
    lost: AtomicU64,
    asides: Mutex<Vec<(Topic, Aside)>>,
    agent: Mutex<Vec<Value>>,
}

impl Screen {
    fn shows(&self, id: ConversationId) -> usize {
        self.shown.lock().unwrap().get(&id).map_or(0, Vec::len)
    }

    /// What is behind goes on from the log.
    async fn catches_up(&self, look: &Running) {
        let behind = std::mem::take(&mut *self.behind.lock().unwrap());
        for id in behind {
            let from = self.shows(id) as u64;
            let Ok(page) = look.desk.entries(&common::tenant(), id, Page::After(from), 1000).await else {
                self.behind.lock().unwrap().insert(id);
                continue;
            };
            let mut shown = self.shown.lock().unwrap();
            let shown = shown.entry(id).or_default();
            for (seq, entry) in page.entries {
                if seq == shown.len() as u64 + 1 {
                    shown.push(serde_json::from_slice(&entry).unwrap());
                    self.read.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

impl Publisher for Screen {
    fn entries(&self, id: ConversationId, entries: &[(u64, Bytes)]) {
        let mut shown = self.shown.lock().unwrap();
        let Some(shown) = shown.get_mut(&id) else { return };
        for (seq, entry) in entries {
            match *seq {
                seq if seq == shown.len() as u64 + 1 => {
                    shown.push(serde_json::from_slice(entry).unwrap());
                    self.live.fetch_add(1, Ordering::Relaxed);
                }
                seq if seq <= shown.len() as u64 => {}
                _ => drop(self.behind.lock().unwrap().insert(id)),
            }
        }
    }

    fn inbox(&self, _: &TenantId, _: &InboxId, _: Bytes) {}

    fn agent(&self, _: &TenantId, _: &AgentId, publication: Bytes) {
        self.agent.lock().unwrap().push(serde_json::from_slice(&publication).unwrap());
    }

    fn reaches(&self, id: ConversationId, seq: u64) {
        if self.shown.lock().unwrap().get(&id).is_some_and(|shown| seq > shown.len() as u64) {
            self.behind.lock().unwrap().insert(id);
        }
    }

    fn lost(&self, topic: &Topic) {
        self.lost.fetch_add(1, Ordering::Relaxed);
        if let Topic::Conversation(id) = topic {
            self.behind.lock().unwrap().insert(*id);
        }
    }

    fn aside(&self, topic: &Topic, aside: &Aside) {
        self.asides.lock().unwrap().push((topic.clone(), aside.clone()));
    }

    fn present(&self, _: &Topic) -> String {
        self.live.load(Ordering::Relaxed).to_string()
    }
}

struct Running {
    screen: Arc<Screen>,
    node: Arc<Node>,
    desk: Arc<Desk>,
    intake: Arc<Intake>,
    model: Model,
}

struct Cluster {
    model: Model,
    clock: Clock,
    ticks: Ticks,
    graph: Arc<Graph>,
    wires: Arc<Wires>,
    mesh: bool,
    reads: Option<Arc<Reads>>,
}

impl Cluster {
    fn wired() -> Self {
        let clock = Clock::from(Timestamp::parse("2026-11-21T09:00:00Z").unwrap());
        let (graph, wires) = (Arc::default(), Arc::default());
        let ticks = Ticks::Tokio(Instant::now());
        Self { model: Model::new().shared(), clock, ticks, graph, wires, mesh: false, reads: None }
    }

    fn meshed() -> Self {
        Self { ticks: Ticks::Boot, mesh: true, ..Self::wired() }
    }

    /// Shards that somebody of these serves, each once.
    fn served(nodes: &[&Arc<Running>]) -> usize {
        nodes.iter().map(|n| n.held()).sum()
    }

    async fn start(&self, name: &str) -> Arc<Running> {
        // Its own handle of the store, so that it alone can be cut off from it.
        let model = self.model.apart();
        let engine: Arc<dyn Engine> = match &self.reads {
            Some(reads) => Arc::new(Slow { model: model.clone(), reads: reads.clone() }),
            None => Arc::new(model.clone()),
        };
        let listener = if self.mesh { Some(TcpListener::bind("127.0.0.1:0").await.unwrap()) } else { None };
        let mesh = listener.as_ref().map(|l| l.local_addr().unwrap().to_string());
        let member = Member { name: name.into(), mesh, capacity: 1, draining: false };
        // One of the nodes is of the version before.
        let speaks = if name == "b" { 1 } else { VERSION };
        let cluster = ClusterConfig { member, ticks: self.ticks, speaks, ..ClusterConfig::default() };
        let screen = Arc::<Screen>::default();
        let config = NodeConfig {
            shards: SHARDS,
            cluster,
            mesh: listener.map(Tcp::at),
            ..NodeConfig::new(engine, self.clock, screen.clone(), self.graph.clone())
        };
        let node = Node::start(config).await.unwrap();
        let (wires, from) = (self.wires.clone(), Arc::downgrade(&node));
        if !self.mesh {
            node.switch().set_transport(Arc::new(Wire { wires, from }));
        }
        self.wires.nodes.lock().unwrap().insert(node.incarnation(), Arc::downgrade(&node));
        let (desk, intake) = (Desk::new(node.clone()), Intake::new(node.clone()));
        Arc::new(Running { screen, desk, intake, node, model })
    }
}

impl Running {
    fn held(&self) -> usize {
        self.node.shards().reigns().count()
    }

    async fn prepare(&self) {
        let directory = self.node.directory();
        let (tenant, inbox) = (common::tenant(), "main".parse().unwrap());
        directory.put_inbox(&tenant, &inbox, &Inbox { name: "main".into() }).await.unwrap();
        let account = Account {
            connector: "whatsapp".into(),
            inbox,
            name: "WA".into(),
            external_id: "1".into(),
            credentials: json!({"app_secret": "s", "verify_token": "v", "access_token": "a"}),
            settings: Settings::default(),
        };
        directory.put_account(&tenant, &common::account(), &account).await.unwrap();
    }

    /// Its sockets wait for a conversation from its beginning.
    async fn waits_for(&self, id: ConversationId) {
        let topic = Topic::Conversation(id);
        self.screen.shown.lock().unwrap().entry(id).or_default();
        self.node.watches().begin(&topic);
        self.node.watches().ready(&topic).await.unwrap();
        self.screen.behind.lock().unwrap().insert(id);
    }

    async fn writes(&self, from: &str, id: &str) -> bool {
        let message =
            json!({"from": from, "id": id, "timestamp": "1763715600", "type": "text", "text": {"body": "x"}});
        let body = common::body(&[message], &[]);
        let items = patchbay_connectors::whatsapp::WhatsApp.parse(&body).unwrap();
        let (tenant, account) = (common::tenant(), common::account());
        let document = self.node.directory().account(&tenant, &account).await.unwrap().unwrap();
        self.intake.take(&tenant, &account, &document, items).await.is_ok()
    }

    async fn note(&self, thread: &str, client_id: &str) -> Option<u64> {
        let request = Request::Note(AddNote { client_id: client_id.into(), text: client_id.into() });
        let who = Who::Api(common::tenant());
        let asked = async { self.desk.submit(&who, common::id(thread), request).await?.wait().await };
        let began = Instant::now();
        match asked.await {
            Ok(Reply::Sent(sent)) => Some(sent.seq),
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                println!("{thread} {client_id}: {error:?} after {:?}", began.elapsed());
                None
            }
        }
    }

    async fn entries_after(&self, thread: &str, after: u64) -> Vec<Value> {
        let page =
            self.desk.entries(&common::tenant(), common::id(thread), Page::After(after), 1000).await.unwrap();
        page.entries.iter().map(|(_, e)| serde_json::from_slice(e).unwrap()).collect()
    }
}

/// Agents who each write one note after the other to a conversation of their own, from whatever node is there; what was
/// not answered is said again.
struct Load {
    nodes: Arc<Mutex<Vec<Arc<Running>>>>,
    stop: Arc<AtomicBool>,
    failed: Arc<AtomicU64>,
    agents: Vec<tokio::task::JoinHandle<Vec<u64>>>,
}

fn thread(n: usize) -> String {
    format!("3460000{n:04}")
}

impl Load {
    fn start(nodes: &[&Arc<Running>], agents: usize) -> Self {
        let nodes = Arc::new(Mutex::new(nodes.iter().map(|n| Arc::clone(n)).collect::<Vec<_>>()));
        let (stop, failed) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let agent = |n: usize| {
            let (nodes, stop, failed) = (nodes.clone(), stop.clone(), failed.clone());
            tokio::spawn(async move {
                let mut acked = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let said = acked.len();
                    loop {
                        let from = {
                            let nodes = nodes.lock().unwrap();
                            nodes[(n + said) % nodes.len()].clone()
                        };
                        if let Some(seq) = from.note(&thread(n), &format!("{n}.{said}")).await {
                            acked.push(seq);
                            break;
                        }
                        failed.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    tokio::time::sleep(Duration::from_millis(7)).await;
                }
                acked
            })
        };
        Self { agents: (0..agents).map(agent).collect(), nodes, stop, failed }
    }

    /// Stops, and looks whether everything stands once and in order. How many were acked, and how many tries failed.
    async fn end(self, look: &Running) -> (usize, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = 0;
        for (n, agent) in self.agents.into_iter().enumerate() {
            let acked = agent.await.unwrap();
            let mut entries = Vec::new();
            loop {
                let more = look.entries_after(&thread(n), entries.len() as u64).await;
                if more.is_empty() {
                    break;
                }
                entries.extend(more);
            }
            for (at, entry) in entries.iter().enumerate() {
                assert_eq!(entry["seq"], json!(at + 1), "{n}");
            }
            let notes: Vec<(u64, &str)> = entries
                .iter()
                .filter_map(|e| Some((e["seq"].as_u64()?, e["data"]["client_id"].as_str()?)))
                .collect();
            let wanted: Vec<String> = (0..notes.len()).map(|said| format!("{n}.{said}")).collect();
            assert!(notes.iter().map(|(_, said)| *said).eq(wanted.iter().map(String::as_str)), "{notes:?}");
            assert!(notes.len() == acked.len(), "{} said, {} acked", notes.len(), acked.len());
            assert!(notes.iter().map(|(seq, _)| *seq).eq(acked.iter().copied()), "{n}");
            all += acked.len();
        }
        (all, self.failed.load(Ordering::Relaxed))
    }
}

async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    for _ in 0..4000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came: {what}");
}

#[tokio::test(start_paused = true)]
async fn every_command_finds_its_entity() {
    let cluster = Cluster::wired();
    let a = cluster.start("a").await;
    until("the first has everything", async || a.held() == SHARDS as usize).await;
    a.prepare().await;
    for n in 0..40 {
        assert!(a.writes(&format!("3460000{n:04}"), &format!("first.{n}")).await);
    }
    let b = cluster.start("b").await;
    let c = cluster.start("c").await;
    until("the shards are shared out", async || {
        let (x, y, z) = (a.held(), b.held(), c.held());
        x + y + z == SHARDS as usize && x.max(y).max(z) - x.min(y).min(z) <= 1
    })
    .await;
    // From every node to every conversation.
    for (round, from) in [&a, &b, &c].into_iter().enumerate() {
        for n in 0..40 {
            let seq = from.note(&format!("3460000{n:04}"), &format!("note.{round}")).await;
            assert_eq!(seq, Some(3 + round as u64), "{round} {n}");
        }
    }
    assert!(cluster.wires.sent.load(Ordering::Relaxed) > 50);
}

#[tokio::test(start_paused = true)]
async fn shards_move_under_load_and_nobody_notices() {
    shards_move(Cluster::wired()).await;
}

#[tokio::test]
async fn shards_move_under_load_over_the_mesh() {
    shards_move(Cluster::meshed()).await;
}

async fn shards_move(cluster: Cluster) {
    let a = cluster.start("a").await;
    until("the first has everything", async || a.held() == SHARDS as usize).await;
    a.prepare().await;
    for n in 0..24 {
        assert!(a.writes(&thread(n), &format!("first.{n}")).await);
    }
    let load = Load::start(&[&a], 24);
    let b = cluster.start("b").await;
    let c = cluster.start("c").await;
    load.nodes.lock().unwrap().extend([b.clone(), c.clone()]);
    let all = SHARDS as usize;
    until("they are shared out", async || c.held() >= all / 3 && Cluster::served(&[&a, &b, &c]) == all).await;
    // A drain, called off and carried out.
    assert!(b.node.drain(Duration::from_secs(30)).await);
    until("what it had is served elsewhere", async || a.held() + c.held() == all).await;
    b.node.wants_drain(false).await;
    until("it has its share again", async || b.held() >= all / 3 && Cluster::served(&[&a, &b, &c]) == all)
        .await;
    load.nodes.lock().unwrap().retain(|n| !Arc::ptr_eq(n, &a));
    tokio::time::sleep(Duration::from_secs(1)).await;
    a.node.finish().await;
    until("the others have everything", async || b.held() + c.held() == all).await;
    let (acked, failed) = load.end(&b).await;
    assert_eq!(failed, 0, "of {acked}");
    assert!(acked > 1000, "{acked}");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_lost_is_replaced_and_comes_back_as_another() {
    a_node_is_lost(Cluster::wired()).await;
}

#[tokio::test]
async fn a_node_that_is_lost_is_replaced_over_the_mesh() {
    a_node_is_lost(Cluster::meshed()).await;
}

async fn a_node_is_lost(cluster: Cluster) {
    let a = cluster.start("a").await;
    until("the first has everything", async || a.held() == SHARDS as usize).await;
    a.prepare().await;
    for n in 0..24 {
        assert!(a.writes(&thread(n), &format!("first.{n}")).await);
    }
    let (b, c) = (cluster.start("b").await, cluster.start("c").await);
    let all = SHARDS as usize;
    until("they are shared out", async || c.held() >= all / 3 && Cluster::served(&[&a, &b, &c]) == all).await;
    let load = Load::start(&[&a, &b, &c], 24);
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The store is out of its reach; others still reach it, and whoever asks it waits.
    let (before, lost) = (b.node.incarnation(), Instant::now());
    b.model.cut(true);
    until("the others have everything", async || a.held() + c.held() == all).await;
    let taken = lost.elapsed();
    // By the wall clock others run on this machine as well.
    assert!(cluster.mesh || taken < Duration::from_secs(5), "{taken:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    // What it had asked of the store arrives now, late.
    b.model.cut(false);
    until("it comes back", async || b.node.incarnation() != before).await;
    cluster.wires.nodes.lock().unwrap().insert(b.node.incarnation(), Arc::downgrade(&b.node));
    until("with its share", async || b.held() >= all / 3 && Cluster::served(&[&a, &b, &c]) == all).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (acked, failed) = load.end(&a).await;
    println!("{acked} acked, {failed} tries failed, replaced in {taken:?}");
    assert!(acked > 1000, "{acked}");
}

/// Reads of logs: those under way, the most at once, and all. And a log whose replicas do not answer, and how many writes
/// wait for them.
#[derive(Default)]
struct Reads {
    now: AtomicUsize,
    most: AtomicUsize,
    all: AtomicUsize,
    away: Mutex<Option<ConversationId>>,
    hang: AtomicUsize,
}

impl Reads {
    fn is_away(&self, table: Table, partition: &Bytes) -> bool {
        let away = *self.away.lock().unwrap();
        table == Table::Entries
            && away.is_some_and(|id| partition.windows(id.as_bytes().len()).any(|part| part == id.as_bytes()))
    }
}

/// A store that takes its time, and counts how many logs are read at once.
struct Slow {
    model: Model,
    reads: Arc<Reads>,
}

/// What a write takes, and a conditional one.
const WRITE: Duration = Duration::from_millis(5);
const CONDITIONAL: Duration = Duration::from_millis(25);

#[async_trait]
impl Engine for Slow {
    async fn write(&self, batch: Batch) -> Result<(), WriteError> {
        tokio::time::sleep(WRITE).await;
        if self.reads.is_away(batch.table, &batch.partition) {
            self.reads.hang.fetch_add(1, Ordering::Relaxed);
            while self.reads.is_away(batch.table, &batch.partition) {
                tokio::time::sleep(WRITE).await;
            }
        }
        self.model.write(batch).await
    }

    async fn get(&self, table: Table, partition: &Bytes, place: &Bytes) -> Result<Option<Row>, ReadError> {
        self.model.get(table, partition, place).await
    }

    async fn scan(&self, scan: Scan) -> Result<Vec<Row>, ReadError> {
        if scan.table != Table::Entries {
            return self.model.scan(scan).await;
        }
        let now = self.reads.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.reads.most.fetch_max(now, Ordering::Relaxed);
        self.reads.all.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(1)).await;
        let is_away = self.reads.is_away(scan.table, &scan.partition);
        let found = if is_away { Err(ReadError::Unavailable) } else { self.model.scan(scan).await };
        self.reads.now.fetch_sub(1, Ordering::Relaxed);
        found
    }

    async fn drop_partition(&self, table: Table, partition: Bytes, stamp: Stamp) -> Result<(), WriteError> {
        self.model.drop_partition(table, partition, stamp).await
    }

    async fn document(&self, key: &DocumentKey) -> Result<Option<Document>, ReadError> {
        self.model.document(key).await
    }

    async fn compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
    ) -> Result<CasOutcome, WriteError> {
        tokio::time::sleep(CONDITIONAL).await;
        self.model.compare_and_set(key, expected, value).await
    }

    async fn documents(
        &self,
        scope: &str,
        kind: &'static str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Document)>, ReadError> {
        self.model.documents(scope, kind, after, limit).await
    }
}

#[tokio::test]
async fn thirty_thousand_topics_of_a_lost_node_are_registered_anew_a_few_at_a_time() {
    const TOPICS: u64 = 30_000;
    /// Those of two nodes that ask how far logs reach, and of what else is loaded meanwhile.
    const AT_ONCE: usize = 2 * 64 + 64;
    let reads = Arc::<Reads>::default();
    let cluster = Cluster { reads: Some(reads.clone()), ..Cluster::meshed() };
    let [a, b, c] = three(&cluster, 24).await;
    let topics: Vec<Topic> = (0..TOPICS)
        .map(|n| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
            Topic::Conversation(ConversationId::from_bytes(bytes))
        })
        .collect();
    let watches = c.node.watches();
    topics.iter().for_each(|topic| watches.begin(topic));
    let all_held = async || {
        for topic in &topics {
            while watches.ready(topic).await.is_err() {}
        }
    };
    all_held().await;
    let of_b = topics.iter().filter(|t| b.node.shards().reign(t.shard(SHARDS)).is_some()).count();
    assert!(of_b > 8_000, "{of_b}");
    reads.most.store(0, Ordering::Relaxed);
    reads.all.store(0, Ordering::Relaxed);
    b.model.cut(true);
    until("the others have everything", async || a.held() + c.held() == SHARDS as usize).await;
    // Commands do not stand behind them.
    for n in 0..24 {
        until("it is taken", async || c.writes(&thread(n), &format!("meanwhile.{n}")).await).await;
    }
    all_held().await;
    let (most, all) = (reads.most.load(Ordering::Relaxed), reads.all.load(Ordering::Relaxed));
    println!("{of_b} topics came to other nodes: {all} reads, {most} at once");
    assert!(most <= AT_ONCE, "{most} at once");
    // Of each log what stands above its snapshot, and the bucket behind that.
    assert!((2 * of_b..2 * of_b + of_b / 4).contains(&all), "{all} reads for {of_b} topics");
    until("none of them stays", async || a.node.active_count() + c.node.active_count() < 500).await;
}

/// Tells every node of versions of the map that another one knows, as beats of the mesh do.
fn tell_each_other(nodes: &[&Arc<Running>]) {
    for node in nodes {
        let mut maps = node.node.membership().unwrap().maps();
        let all: Vec<Arc<Node>> = nodes.iter().map(|n| n.node.clone()).collect();
        tokio::spawn(async move {
            while maps.changed().await.is_ok() {
                let version = maps.borrow_and_update().0;
                all.iter().filter_map(|n| n.membership()).for_each(|membership| membership.hear(version));
            }
        });
    }
}

#[tokio::test(start_paused = true)]
async fn a_log_that_does_not_answer_holds_up_no_other_shard_that_goes() {
    let reads = Arc::<Reads>::default();
    let cluster = Cluster { reads: Some(reads.clone()), ..Cluster::wired() };
    let [a, b, c] = three(&cluster, 64).await;
    tell_each_other(&[&a, &b, &c]);
    let (away, others): (Vec<String>, Vec<String>) = {
        let of_b = |n: &usize| b.node.shards().reign(common::id(&thread(*n)).shard(SHARDS)).is_some();
        let mut all = (0..64).filter(of_b).map(thread);
        (all.by_ref().take(1).collect(), all.collect())
    };
    assert!(others.len() > 8, "{others:?}");
    assert!(a.note(&away[0], "loaded").await.is_some());
    *reads.away.lock().unwrap() = Some(common::id(&away[0]));
    let (says, at) = (a.clone(), away[0].clone());
    let stuck = tokio::spawn(async move { says.note(&at, "stuck").await });
    until("it is under way", async || reads.hang.load(Ordering::Relaxed) > 0).await;
    let (stop, mut probes) = (Arc::<AtomicBool>::default(), Vec::new());
    for thread in others.clone() {
        let (says, stop) = (a.clone(), stop.clone());
        probes.push(tokio::spawn(async move {
            let (mut longest, mut n) = (Duration::ZERO, 0);
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                assert!(says.note(&thread, &format!("probe.{n}")).await.is_some());
                longest = longest.max(began.elapsed());
                n += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            longest
        }));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(b.node.drain(Duration::from_secs(30)).await);
    until("what it had is served elsewhere", async || a.held() + c.held() == SHARDS as usize).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    let mut longest = Duration::ZERO;
    for probe in probes {
        longest = longest.max(probe.await.unwrap());
    }
    println!("the longest that a note was waited for: {longest:?}");
    assert!(longest <= Duration::from_millis(250), "{longest:?}");
    // Whoever gave them away said how far they were confirmed: nothing of them was written again.
    for thread in &others {
        let id = common::id(thread);
        let key = LogKey { entity: *id.as_bytes(), shard: id.shard(SHARDS) };
        let rows = a.node.shards().logs.tail(key, 0).await.unwrap().rows;
        assert!(rows.iter().all(|row| row.stamp == row.origin), "{rows:?}");
        let epochs: HashSet<u32> = rows.iter().map(|row| row.stamp.epoch()).collect();
        assert!(epochs.len() > 1, "it was written before and after it moved: {epochs:?}");
    }
    // Its replicas are back: whoever repeats it is answered, and it stands once, whether it was written before or is now.
    *reads.away.lock().unwrap() = None;
    let _ = stuck.await.unwrap();
    until("it is answered", async || a.note(&away[0], "stuck").await.is_some()).await;
    let found = a.entries_after(&away[0], 0).await;
    assert_eq!(found.iter().filter(|e| e["data"]["text"] == "stuck").count(), 1, "{found:?}");
}

/// Three nodes on the mesh, each with its share.
async fn three(cluster: &Cluster, threads: usize) -> [Arc<Running>; 3] {
    let a = cluster.start("a").await;
    until("the first has everything", async || a.held() == SHARDS as usize).await;
    a.prepare().await;
    for n in 0..threads {
        assert!(a.writes(&thread(n), &format!("first.{n}")).await);
    }
    let (b, c) = (cluster.start("b").await, cluster.start("c").await);
    let all = SHARDS as usize;
    until("they are shared out", async || c.held() >= all / 3 && Cluster::served(&[&a, &b, &c]) == all).await;
    [a, b, c]
}

#[tokio::test]
async fn whatever_is_written_is_shown_on_every_node_that_waits_for_it() {
    const THREADS: usize = 24;
    let cluster = Cluster::meshed();
    let [a, b, c] = three(&cluster, THREADS).await;
    let all = SHARDS as usize;
    for n in 0..THREADS {
        for node in [&a, &b, &c] {
            node.waits_for(common::id(&thread(n))).await;
        }
    }
    let screens: Vec<Arc<Running>> = vec![a.clone(), b.clone(), c.clone()];
    let (stop, readers) = (Arc::<AtomicBool>::default(), screens.clone());
    let stopped = stop.clone();
    let reads = tokio::spawn(async move {
        while !stopped.load(Ordering::Relaxed) {
            for node in &readers {
                node.screen.catches_up(node).await;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let load = Load::start(&[&a, &b, &c], THREADS);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let read_at_rest: u64 = screens.iter().map(|n| n.screen.read.load(Ordering::Relaxed)).sum();
    // Every shard of one moves away and comes back; another is lost and comes back as another incarnation.
    assert!(b.node.drain(Duration::from_secs(30)).await);
    b.node.wants_drain(false).await;
    until("it has its share again", async || b.held() >= all / 3 && Cluster::served(&[&a, &b, &c]) == all)
        .await;
    let before = c.node.incarnation();
    c.model.cut(true);
    until("the others have everything", async || a.held() + b.held() == all).await;
    c.model.cut(false);
    until("it comes back", async || c.node.incarnation() != before).await;
    until("with its share", async || c.held() >= all / 3 && Cluster::served(&[&a, &b, &c]) == all).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (acked, _) = load.end(&a).await;
    for n in 0..THREADS {
        let id = common::id(&thread(n));
        let entries = a.entries_after(&thread(n), 0).await;
        for node in &screens {
            until("everything is shown", async || node.screen.shows(id) >= entries.len()).await;
            assert_eq!(node.screen.shown.lock().unwrap()[&id], entries);
        }
    }
    stop.store(true, Ordering::Relaxed);
    reads.await.unwrap();
    let count = |of: fn(&Screen) -> &AtomicU64| -> u64 {
        screens.iter().map(|n| of(&n.screen).load(Ordering::Relaxed)).sum()
    };
    let (live, read, lost) = (count(|s| &s.live), count(|s| &s.read), count(|s| &s.lost));
    println!(
        "{acked} acked; shown {live} live, {read} read ({read_at_rest} before anything moved), {lost} closed"
    );
    assert!(live > read - read_at_rest, "most is shown as it comes: {live} live, {read} read");
    // Nobody waits any more: nobody is told any more.
    for n in 0..THREADS {
        let topic = Topic::Conversation(common::id(&thread(n)));
        screens.iter().for_each(|node| node.node.watches().end(&topic));
    }
    until("nobody is interested", async || screens.iter().all(|n| !n.node.interest().is_any())).await;
}

#[tokio::test]
async fn what_is_beside_the_order_and_who_is_there_cross_the_mesh() {
    let cluster = Cluster::meshed();
    let [a, b, c] = three(&cluster, 1).await;
    let id = common::id(&thread(0));
    let topic = Topic::Conversation(id);
    for node in [&a, &b, &c] {
        node.waits_for(id).await;
    }
    // Whoever says it, the two others hear it; whoever owns it hears it as well.
    for (n, from) in [&a, &b, &c].into_iter().enumerate() {
        let said = Aside { kind: "typing".into(), key: n.to_string(), data: Bytes::from_static(b"{}") };
        from.node.aside(&topic, || said.clone());
        let heard = |by: &Running| by.screen.asides.lock().unwrap().contains(&(topic.clone(), said.clone()));
        until("the others have heard", async || {
            [&a, &b, &c].iter().filter(|by| !Arc::ptr_eq(by, from)).all(|by| heard(by))
        })
        .await;
        assert!(!heard(from), "nobody hears itself");
        // Each says who is there in its own words.
        assert_eq!(from.node.present(&topic).await.unwrap().len(), 3);
    }
    b.node.watches().end(&topic);
    until("it waits no more", async || a.node.present(&topic).await.unwrap().len() <= 2).await;
}

#[tokio::test]
async fn an_agents_sessions_outlive_its_owner_and_end_once_with_their_node() {
    use patchbay_actors::agent::{AgentCommand, Presence};
    let cluster = Cluster::meshed();
    let [a, b, c] = three(&cluster, 0).await;
    let (tenant, agents) = (common::tenant(), (0..12).map(|n| format!("agent-{n}").parse().unwrap()));
    let agents: Vec<AgentId> = agents.collect();
    let how = async |by: &Running, agent: &AgentId| {
        let answer = by.node.agent(&tenant, agent, AgentCommand::Get).ok()?;
        answer.wait().await.ok().map(|reply| (reply.state, reply.sessions))
    };
    for agent in &agents {
        for (n, node) in [&a, &b].into_iter().enumerate() {
            node.node.agent_connected(&tenant, agent, format!("{n}")).await.unwrap();
        }
        let away = b.node.agent(&tenant, agent, AgentCommand::Set(Presence::Away)).unwrap();
        away.wait().await.unwrap();
    }
    let all = SHARDS as usize;
    // Every agent of it gets another owner: nothing is seen of that.
    assert!(c.node.drain(Duration::from_secs(30)).await);
    until("the others have everything", async || a.held() + b.held() == all).await;
    for agent in &agents {
        assert_eq!(how(&c, agent).await, Some((Presence::Away, 2)));
    }
    // A node is lost for good, and its sessions with it.
    b.model.cut(true);
    c.node.wants_drain(false).await;
    until("it has nothing", async || a.held() + c.held() == all).await;
    for agent in &agents {
        until("its session has ended", async || how(&a, agent).await == Some((Presence::Away, 1))).await;
    }
    for agent in &agents {
        a.node.agent_disconnected(&tenant, agent, "0".into()).await;
        assert_eq!(how(&c, agent).await, Some((Presence::Offline, 0)));
    }
}
