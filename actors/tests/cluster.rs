//! Three nodes on one store, in one process: shards move, nodes are lost, and what was acked stands once and in order. Once
//! over wires of the test's own, on a clock of its own; once over the mesh.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use common::{Graph, Shown};
use patchbay_actors::clock::Clock;
use patchbay_actors::cluster::map::{Incarnation, Member};
use patchbay_actors::cluster::runtime::ClusterConfig;
use patchbay_actors::cluster::switch::{Local as _, Parcel, Transport};
use patchbay_actors::cluster::ticks::Ticks;
use patchbay_actors::desk::{Desk, Page, Who};
use patchbay_actors::directory::{Account, Inbox, Settings};
use patchbay_actors::intake::Intake;
use patchbay_actors::node::{Node, NodeConfig};
use patchbay_connectors::Connector as _;
use patchbay_protocol::Timestamp;
use patchbay_protocol::command::{AddNote, Reply, Request};
use patchbay_storage::model::Model;
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
    fn send(&self, to: Incarnation, parcel: Parcel) -> Result<(), Parcel> {
        let target = self.wires.nodes.lock().unwrap().get(&to).and_then(Weak::upgrade);
        let (Some(target), Some(from)) = (target, self.from.upgrade()) else { return Err(parcel) };
        self.wires.sent.fetch_add(1, Ordering::Relaxed);
        let shard = parcel.entity().shard(SHARDS);
        // What came back is told when nobody holds the switch.
        match target.hand(parcel) {
            Ok(()) => {
                tokio::spawn(async move { from.switch().settled(shard) });
            }
            Err(parcel) => {
                self.wires.returned.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    from.switch().returned(parcel);
                    from.switch().settled(shard);
                });
            }
        }
        Ok(())
    }
}

struct Running {
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
}

impl Cluster {
    fn wired() -> Self {
        let clock = Clock::from(Timestamp::parse("2026-11-21T09:00:00Z").unwrap());
        let (graph, wires) = (Arc::default(), Arc::default());
        let ticks = Ticks::Tokio(Instant::now());
        Self { model: Model::new().shared(), clock, ticks, graph, wires, mesh: false }
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
        let listener = if self.mesh { Some(TcpListener::bind("127.0.0.1:0").await.unwrap()) } else { None };
        let mesh = listener.as_ref().map(|l| l.local_addr().unwrap().to_string());
        let member = Member { name: name.into(), mesh, capacity: 1, draining: false };
        let cluster = ClusterConfig { member, ticks: self.ticks, ..ClusterConfig::default() };
        let shown = Arc::new(Shown::default());
        let config = NodeConfig {
            shards: SHARDS,
            cluster,
            mesh: listener,
            ..NodeConfig::new(Arc::new(model.clone()), self.clock, shown, self.graph.clone())
        };
        let node = Node::start(config).await.unwrap();
        let (wires, from) = (self.wires.clone(), Arc::downgrade(&node));
        if !self.mesh {
            node.switch().set_transport(Arc::new(Wire { wires, from }));
        }
        self.wires.nodes.lock().unwrap().insert(node.incarnation(), Arc::downgrade(&node));
        Arc::new(Running { desk: Desk::new(node.clone()), intake: Intake::new(node.clone()), node, model })
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
    b.node.undrain().await;
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
