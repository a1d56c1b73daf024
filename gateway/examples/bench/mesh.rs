//! What the cluster costs beside its work: commands and publications that cross the mesh, and what membership asks of the
//! store. Nodes in this process, on the model store, over real sockets on loopback.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use patchbay_actors::clock::Clock;
use patchbay_actors::cluster::map::Member;
use patchbay_actors::cluster::mesh::Tcp;
use patchbay_actors::cluster::runtime::ClusterConfig;
use patchbay_actors::directory::Account;
use patchbay_actors::fanout::Topic;
use patchbay_actors::node::{Node, NodeConfig};
use patchbay_actors::ports::{Provider, Publisher};
use patchbay_actors::router::{Router as _, system_command};
use patchbay_protocol::command::Request;
use patchbay_protocol::ids::{AgentId, ConversationId, InboxId, TenantId};
use patchbay_protocol::outbound::{Call, CallResult};
use patchbay_storage::model::Model;
use patchbay_storage::{
    Batch, CLUSTER, CasOutcome, Document, DocumentKey, Engine, ReadError, Row, Scan, Stamp, Table, WriteError,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};

use crate::results::{Goal, Results};

const PUBLICATION_BYTES: usize = 200;
/// Topics that are published in turns.
const TOPICS: usize = 64;
/// Publications that are not there yet.
const OUTSTANDING: u64 = 8_192;
const COMMANDS_PER_SECOND: u64 = 10_000;

/// Counts what is shown.
#[derive(Default)]
struct Counts {
    seen: AtomicU64,
    more: Notify,
}

impl Publisher for Counts {
    fn entries(&self, _: ConversationId, entries: &[(u64, Bytes)]) {
        self.seen.fetch_add(entries.len() as u64, Ordering::Release);
        self.more.notify_one();
    }
    fn inbox(&self, _: &TenantId, _: &InboxId, _: Bytes) {}
    fn agent(&self, _: &TenantId, _: &AgentId, _: Bytes) {}
}

struct Nobody;

#[async_trait]
impl Provider for Nobody {
    async fn call(&self, _: &Account, _: Call) -> CallResult {
        unreachable!("nothing is sent here")
    }
}

/// A store that counts what membership asks of it.
struct Counted {
    model: Model,
    writes: Arc<AtomicU64>,
    reads: Arc<AtomicU64>,
}

#[async_trait]
impl Engine for Counted {
    async fn write(&self, batch: Batch) -> Result<(), WriteError> {
        self.model.write(batch).await
    }

    async fn get(
        &self,
        table: Table,
        partition: &Bytes,
        clustering: &Bytes,
    ) -> Result<Option<Row>, ReadError> {
        self.model.get(table, partition, clustering).await
    }

    async fn scan(&self, scan: Scan) -> Result<Vec<Row>, ReadError> {
        self.model.scan(scan).await
    }

    async fn drop_partition(&self, table: Table, partition: Bytes, stamp: Stamp) -> Result<(), WriteError> {
        self.model.drop_partition(table, partition, stamp).await
    }

    async fn document(&self, key: &DocumentKey) -> Result<Option<Document>, ReadError> {
        self.reads.fetch_add(u64::from(key.kind == CLUSTER), Ordering::Relaxed);
        self.model.document(key).await
    }

    async fn compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
    ) -> Result<CasOutcome, WriteError> {
        self.writes.fetch_add(u64::from(key.kind == CLUSTER), Ordering::Relaxed);
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

struct Cluster {
    model: Model,
    shards: u32,
    writes: Arc<AtomicU64>,
    reads: Arc<AtomicU64>,
}

impl Cluster {
    fn new(shards: u32) -> Self {
        Self { model: Model::new().shared(), shards, writes: Arc::default(), reads: Arc::default() }
    }

    async fn start(&self, name: &str, counts: Arc<Counts>) -> Arc<Node> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mesh = Some(listener.local_addr().unwrap().to_string());
        let member = Member { name: name.into(), mesh, capacity: 1, draining: false };
        let engine =
            Counted { model: self.model.apart(), writes: self.writes.clone(), reads: self.reads.clone() };
        let config = NodeConfig {
            shards: self.shards,
            cluster: ClusterConfig { member, ..ClusterConfig::default() },
            mesh: Some(Tcp::at(listener)),
            ..NodeConfig::new(Arc::new(engine), Clock::System, counts, Arc::new(Nobody))
        };
        Node::start(config).await.unwrap()
    }

    async fn start_many(&self, n: usize) -> Vec<Arc<Node>> {
        let mut nodes = Vec::new();
        for name in 0..n {
            nodes.push(self.start(&format!("n{name}"), Arc::default()).await);
        }
        let fair = self.shards as usize / n;
        while !nodes.iter().all(|node| (fair..=fair + 1).contains(&node.shards().reigns().count())) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        nodes
    }
}

/// Conversations that this node serves.
fn held_by(node: &Node) -> impl Iterator<Item = ConversationId> {
    let shards = node.shards();
    (0u64..)
        .map(|n| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
            ConversationId::from_bytes(bytes)
        })
        .filter(|id| shards.reign(id.shard(shards.count)).is_some())
}

fn cpu() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(used.tv_sec.unsigned_abs(), u32::try_from(used.tv_nsec).unwrap())
}

/// The median of a command at a steady rate, and the processor's time for each.
async fn commands(through: &Arc<Node>, id: ConversationId, time: Duration) -> (f64, f64) {
    let taken = Arc::new(Mutex::new(Vec::new()));
    let (before, started) = (cpu(), Instant::now());
    let mut tick = tokio::time::interval(Duration::from_millis(1));
    let mut sent: u64 = 0;
    while started.elapsed() < time {
        tick.tick().await;
        let due = (started.elapsed().as_secs_f64() * COMMANDS_PER_SECOND as f64) as u64;
        for _ in sent..due {
            let (node, taken) = (through.clone(), taken.clone());
            tokio::spawn(async move {
                let began = Instant::now();
                node.conversation(id, system_command(Request::Tip)).unwrap().wait().await.unwrap();
                taken.lock().unwrap().push(began.elapsed());
            });
        }
        sent = due;
    }
    while (taken.lock().unwrap().len() as u64) < sent {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let used = cpu() - before;
    let mut taken = taken.lock().unwrap().clone();
    taken.sort_unstable();
    (taken[taken.len() / 2].as_secs_f64() * 1000.0, used.as_secs_f64() * 1e6 / sent as f64)
}

/// Publications a second over the mesh, from one node to another.
async fn published(time: Duration) -> f64 {
    let cluster = Cluster::new(32);
    let seen = Arc::<Counts>::default();
    let owner = cluster.start("owner", Arc::default()).await;
    while owner.shards().reigns().count() < 32 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let watcher = cluster.start("watcher", seen.clone()).await;
    while watcher.shards().reigns().count() < 16 || owner.shards().reigns().count() > 16 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let topics: Vec<Topic> = held_by(&owner).take(TOPICS).map(Topic::Conversation).collect();
    for topic in &topics {
        watcher.watches().begin(topic);
        watcher.watches().ready(topic).await.unwrap();
    }
    let data = Bytes::from(vec![b'x'; PUBLICATION_BYTES]);
    let started = Instant::now();
    let mut sent: u64 = 0;
    while started.elapsed() < time {
        if sent - seen.seen.load(Ordering::Acquire) >= OUTSTANDING {
            // Whoever sends less than it may is told when there is room.
            let _ = tokio::time::timeout(Duration::from_millis(1), seen.more.notified()).await;
            continue;
        }
        // One after the other, each the next entry of its own log.
        for topic in &topics {
            owner.interest().entries(topic, &[(sent / TOPICS as u64 + 1, data.clone())]);
        }
        sent += TOPICS as u64;
        tokio::task::yield_now().await;
    }
    let rate = seen.seen.load(Ordering::Acquire) as f64 / started.elapsed().as_secs_f64();
    assert!(rate > 0.0);
    rate
}

/// The same over a bare link: a length and then the bytes, what is queued together written together.
async fn bare(time: Duration) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut to = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut from, _) = listener.accept().await.unwrap();
    to.set_nodelay(true).unwrap();
    let (queue, mut queued) = mpsc::channel::<Bytes>(4_096);
    tokio::spawn(async move {
        let (mut ready, mut out) = (Vec::with_capacity(256), BytesMut::new());
        while queued.recv_many(&mut ready, 256).await > 0 {
            for data in ready.drain(..) {
                out.put_u32(u32::try_from(data.len()).unwrap());
                out.put_slice(&data);
            }
            if to.write_all(&out).await.is_err() {
                return;
            }
            out.clear();
        }
    });
    let seen = Arc::<Counts>::default();
    let counts = seen.clone();
    let reads = tokio::spawn(async move {
        let mut buffer = BytesMut::with_capacity(64 * 1024);
        while from.read_buf(&mut buffer).await.unwrap_or(0) > 0 {
            while buffer.len() >= 4 {
                let length = u32::from_be_bytes(buffer[..4].try_into().unwrap()) as usize;
                if buffer.len() < 4 + length {
                    break;
                }
                buffer.advance(4);
                drop(buffer.split_to(length).freeze());
                counts.seen.fetch_add(1, Ordering::Release);
            }
        }
    });
    let data = Bytes::from(vec![b'x'; PUBLICATION_BYTES]);
    let started = Instant::now();
    while started.elapsed() < time {
        for _ in 0..64 {
            queue.send(data.clone()).await.unwrap();
        }
    }
    let rate = seen.seen.load(Ordering::Acquire) as f64 / started.elapsed().as_secs_f64();
    reads.abort();
    rate
}

/// Conditional writes and reads a second and node of a cluster in which nothing happens.
async fn membership(nodes: usize, shards: u32, time: Duration) -> (f64, f64) {
    let cluster = Cluster::new(shards);
    let _running = cluster.start_many(nodes).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let count = || (cluster.writes.load(Ordering::Relaxed), cluster.reads.load(Ordering::Relaxed));
    let (before, started) = (count(), Instant::now());
    tokio::time::sleep(time).await;
    let (after, seconds) = (count(), started.elapsed().as_secs_f64() * nodes as f64);
    ((after.0 - before.0) as f64 / seconds, (after.1 - before.1) as f64 / seconds)
}

pub async fn run(results: &mut Results) {
    let time = Duration::from_secs(if results.quick { 2 } else { 5 });
    let cluster = Cluster::new(32);
    let nodes = cluster.start_many(2).await;
    let id = held_by(&nodes[0]).next().unwrap();
    // Once for whatever is made at the first.
    commands(&nodes[1], id, Duration::from_millis(500)).await;
    let (here, remote) = (commands(&nodes[0], id, time).await, commands(&nodes[1], id, time).await);
    let conditions = format!(
        "{COMMANDS_PER_SECOND} a second to one conversation, both nodes and their callers in one process; here {:.3} ms and {:.1} us, remote {:.3} ms and {:.1} us",
        here.0, here.1, remote.0, remote.1
    );
    results.note(
        "remote_command_added_p50_ms",
        remote.0 - here.0,
        "ms",
        Goal::AtMost(1.0),
        &conditions,
        None,
    );
    results.note(
        "remote_command_added_cpu_us",
        remote.1 - here.1,
        "us",
        Goal::AtMost(20.0),
        &conditions,
        None,
    );
    drop(nodes);

    let (over_mesh, over_tcp) = (published(time).await, bare(time).await);
    let conditions = format!(
        "{PUBLICATION_BYTES}-byte publications of {TOPICS} topics in turns, one at a time: {over_mesh:.0} a second over the mesh, {over_tcp:.0} over a bare link; at most {OUTSTANDING} not there yet"
    );
    results.note("mesh_publication_ratio", over_mesh / over_tcp, "", Goal::AtLeast(0.4), &conditions, None);

    let time = Duration::from_secs(if results.quick { 5 } else { 20 });
    let mut found: HashMap<&str, (f64, f64)> = HashMap::new();
    for (name, nodes, shards) in [("3 nodes", 3, 64), ("3 nodes, 640 shards", 3, 640), ("32 nodes", 32, 640)]
    {
        found.insert(name, membership(nodes, shards, time).await);
    }
    let most = |of: fn(&(f64, f64)) -> f64| found.values().map(of).fold(0.0, f64::max);
    let conditions = format!("at rest, the most of: {found:.2?} (conditional writes, reads)");
    let (writes, reads) = (most(|f| f.0), most(|f| f.1));
    results.note("membership_writes_per_node_second", writes, "1/s", Goal::AtMost(2.0), &conditions, None);
    results.note("membership_reads_per_node_second", reads, "1/s", Goal::AtMost(6.0), &conditions, None);
}
