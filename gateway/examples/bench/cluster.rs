//! A cluster of processes on Cassandra: a node that is killed, and one that drains, as whoever sends notices it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use patchbay_loadtest::load::cpu::Cpu;
use patchbay_loadtest::load::{self, Plan};
use patchbay_protocol::client::Encoding;
use patchbay_protocol::ids::{AccountId, ConversationId, TenantId};
use serde_json::{Value, json};

use crate::gap::Gap;
use crate::node::Node;
use crate::results::{Goal, Results};
use crate::servers::Server;

const TENANT: &str = "cluster";
const KEYSPACE: &str = "bench_cluster";
/// Customers: of most shards there is one.
const CUSTOMERS: usize = 3_000;
/// Shards that are written to while they move, and how often each.
const PROBED: usize = 32;
const PROBE_PAUSE: Duration = Duration::from_millis(50);
/// Nodes over which work may not grow.
const MANY: usize = 5;

async fn start(dir: &Path, addresses: &str, keyspace: &str) -> Node {
    std::fs::create_dir_all(dir).unwrap();
    let nodes = format!("[\"{}\"]", addresses.replace(',', "\",\""));
    let env = [
        ("PATCHBAY__STORAGE__ENGINE", "scylla"),
        ("PATCHBAY__STORAGE__SCYLLA__NODES", nodes.as_str()),
        ("PATCHBAY__STORAGE__SCYLLA__DATACENTER", "datacenter1"),
        ("PATCHBAY__STORAGE__SCYLLA__KEYSPACE", keyspace),
        ("PATCHBAY__STORAGE__SCYLLA__REPLICATION", "1"),
        ("PATCHBAY__AUTH__OPERATOR_KEY", "operatoroperator"),
        ("PATCHBAY__AUTH__HMAC_SECRET_KEY", "secretsecretsecretsecretsecretsecret"),
        ("PATCHBAY__MESH__LISTEN", "127.0.0.1:0"),
    ];
    Node::start(dir, &env).await
}

/// Shards by incarnation, as `by` knows it.
async fn held(by: &Node) -> BTreeMap<u64, Vec<u32>> {
    let found = by.api("operatoroperator", "GET", "/cluster/shards", Value::Null).await;
    let mut held: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for shard in found["shards"].as_array().unwrap() {
        let n = u32::try_from(shard["shard"].as_u64().unwrap()).unwrap();
        held.entry(shard["holder"].as_u64().unwrap()).or_default().push(n);
    }
    held
}

async fn members(by: &Node) -> Vec<u64> {
    let found = by.api("operatoroperator", "GET", "/cluster/nodes", Value::Null).await;
    found["nodes"].as_array().unwrap().iter().map(|n| n["incarnation"].as_u64().unwrap()).collect()
}

async fn shared_out(by: &Node, nodes: usize) {
    loop {
        let held = held(by).await;
        let all: usize = held.values().map(Vec::len).sum();
        if held.len() == nodes && held.values().all(|shards| shards.len().abs_diff(all / nodes) <= 1) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Writes a note; whether it was acked.
async fn note(
    http: reqwest::Client,
    public: String,
    key: String,
    id: ConversationId,
    client_id: String,
) -> bool {
    let url = format!("http://{public}/api/v1/conversations/{id}/notes");
    let note = json!({"client_id": client_id, "text": "x"});
    let answer = http.post(url).bearer_auth(key).json(&note).send().await;
    answer.is_ok_and(|answer| answer.status().is_success())
}

fn p99(mut all: Vec<Duration>) -> f64 {
    all.sort_unstable();
    all[(all.len() * 99).div_ceil(100) - 1].as_secs_f64()
}

struct World {
    nodes: Vec<Node>,
    key: String,
    /// Shards, and a conversation of each.
    count: u32,
    of: HashMap<u32, ConversationId>,
}

impl World {
    /// A node in each of these directories, and customers who have written.
    async fn start(dirs: &[PathBuf], addresses: &str, keyspace: &str) -> Self {
        let mut nodes = Vec::new();
        for dir in dirs {
            nodes.push(start(dir, addresses, keyspace).await);
        }
        shared_out(&nodes[0], dirs.len()).await;
        let key = nodes[0].tenant(TENANT).await;
        nodes[0].customers_write(TENANT, 0, CUSTOMERS).await;
        let count = u32::try_from(held(&nodes[0]).await.values().map(Vec::len).sum::<usize>()).unwrap();
        Self { nodes, key, count, of: conversations(count) }
    }
}

/// Kills a node, and writes to each of its shards by way of another: from the kill to each one's first ack, and from
/// the moment at which it was no member any more.
async fn failover(world: &mut World, victim: usize) -> (Vec<Duration>, Vec<Duration>) {
    let by = &world.nodes[0];
    let me = world.nodes[victim].incarnation;
    let shards = held(by).await.remove(&me).unwrap();
    let ids: Vec<ConversationId> = shards.iter().filter_map(|shard| world.of.get(shard).copied()).collect();
    world.nodes[victim].child.kill().await.unwrap();
    let killed = Instant::now();
    let probes: Vec<_> = ids
        .into_iter()
        .map(|id| {
            let by = &world.nodes[0];
            let (http, public, key) = (by.target.http.clone(), by.target.public.clone(), world.key.clone());
            tokio::spawn(async move {
                let client_id = format!("{me}-{id}");
                while !note(http.clone(), public.clone(), key.clone(), id, client_id.clone()).await {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                killed.elapsed()
            })
        })
        .collect();
    while members(&world.nodes[0]).await.contains(&me) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let detected = killed.elapsed();
    let mut taken = Vec::new();
    for probe in probes {
        taken.push(probe.await.unwrap());
    }
    let after = taken.iter().map(|t| t.saturating_sub(detected)).collect();
    (taken, after)
}

/// The longest that each of these conversations was waited for while `what` was going on, and how many notes failed.
async fn longest(
    world: &World,
    ids: &[ConversationId],
    round: &str,
    what: impl AsyncFnOnce(),
) -> (Vec<Duration>, usize) {
    let stop = Arc::<AtomicBool>::default();
    let probes: Vec<_> = ids
        .iter()
        .map(|id| {
            let by = &world.nodes[0];
            let (http, public, key) = (by.target.http.clone(), by.target.public.clone(), world.key.clone());
            let (id, stop, round) = (*id, stop.clone(), round.to_owned());
            tokio::spawn(async move {
                let (mut longest, mut failed, mut n) = (Duration::ZERO, 0, 0);
                while !stop.load(Ordering::Relaxed) {
                    let sent = Instant::now();
                    let client_id = format!("{round}-{n}");
                    failed +=
                        usize::from(!note(http.clone(), public.clone(), key.clone(), id, client_id).await);
                    longest = longest.max(sent.elapsed());
                    n += 1;
                    tokio::time::sleep(PROBE_PAUSE).await;
                }
                (longest, failed)
            })
        })
        .collect();
    what().await;
    stop.store(true, Ordering::Relaxed);
    let (mut all, mut failed) = (Vec::new(), 0);
    for probe in probes {
        let (longest, failures) = probe.await.unwrap();
        all.push(longest);
        failed += failures;
    }
    (all, failed)
}

fn conversations(count: u32) -> HashMap<u32, ConversationId> {
    let (tenant, account): (TenantId, AccountId) = (TENANT.parse().unwrap(), "wa".parse().unwrap());
    let of = (0..CUSTOMERS).map(|n| {
        let id = ConversationId::derive(&tenant, &account, &format!("3460{n:07}"));
        (id.shard(count), id)
    });
    of.collect()
}

type Steps = BTreeMap<String, (f64, f64)>;

/// What the steps of shards' moves took at all nodes, and how many there were.
async fn steps(nodes: &[Node]) -> Steps {
    let mut all = Steps::new();
    for node in nodes {
        let text = node.metrics().await;
        for line in text.lines().filter_map(|l| l.strip_prefix("patchbay_shard_move_seconds_")) {
            let Some((kind, rest)) = line.split_once("{step=\"") else { continue };
            let Some((step, value)) = rest.split_once("\"} ") else { continue };
            let value: f64 = value.parse().unwrap();
            match kind {
                "sum" => all.entry(step.to_owned()).or_default().0 += value,
                "count" => all.entry(step.to_owned()).or_default().1 += value,
                _ => {}
            }
        }
    }
    all
}

fn since(before: &Steps, after: &Steps) -> String {
    let each = after.iter().map(|(step, (sum, count))| {
        let (was, of) = before.get(step).copied().unwrap_or_default();
        format!("{step} {:.0} ms", (sum - was) / (count - of) * 1000.0)
    });
    each.collect::<Vec<_>>().join(", ")
}

pub async fn run(results: &mut Results) {
    let rounds = if results.quick { 1 } else { 3 };
    let server = Server::start("cassandra", 1, &["--heap", "1g"]);
    let dir = tempfile::tempdir().unwrap();
    let dirs = ["a", "b", "c"].map(|name| dir.path().join(name));
    let mut world = World::start(&dirs, &server.addresses, KEYSPACE).await;
    let count = world.count;

    let (mut killed, mut detected) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (taken, after) = failover(&mut world, 1).await;
        killed.extend(taken);
        detected.extend(after);
        world.nodes[1] = start(&dirs[1], &server.addresses, KEYSPACE).await;
        shared_out(&world.nodes[0], 3).await;
    }
    let conditions = format!(
        "three nodes, {count} shards, one Cassandra node, all on two cores; {rounds} SIGKILLs, a note to each of {} shards at once, by way of another node, repeated until it is acked; lease 2.5 s",
        killed.len()
    );
    results.note("failover_p99_seconds", p99(killed), "s", Goal::AtMost(5.0), &conditions, None);
    let after = p99(detected);
    results.note("failover_after_detection_p99_seconds", after, "s", Goal::AtMost(3.0), &conditions, None);

    let what = format!("{rounds} drains of one of three nodes, a third of {count} shards each");
    drains(&mut world, rounds).await.note(results, "handoff_pause_p99_ms", &what);
    for node in world.nodes {
        node.stop().await;
    }
    stopped(results, &server, rounds).await;
}

/// What was noticed of drains of the last node.
struct Drained {
    pauses: Vec<Duration>,
    still: Vec<Duration>,
    failed: usize,
    steps: String,
}

impl Drained {
    fn note(self, results: &mut Results, name: &str, what: &str) {
        let conditions = format!(
            "{what}; the longest that a note to each of {} of its shards took, one every {} ms; {} failed; while nothing moves: {:.0} ms; on average {}",
            self.pauses.len(),
            PROBE_PAUSE.as_millis(),
            self.failed,
            p99(self.still) * 1000.0,
            self.steps
        );
        results.note(name, p99(self.pauses) * 1000.0, "ms", Goal::AtMost(250.0), &conditions, None);
    }
}

/// Drains the last node and takes it back, so many times.
async fn drains(world: &mut World, rounds: usize) -> Drained {
    let before = steps(&world.nodes).await;
    let (mut pauses, mut still, mut failed) = (Vec::new(), Vec::new(), 0);
    for round in 0..rounds {
        let me = world.nodes[2].incarnation;
        let shards = held(&world.nodes[0]).await.remove(&me).unwrap();
        let ids: Vec<ConversationId> =
            shards.iter().filter_map(|shard| world.of.get(shard).copied()).take(PROBED).collect();
        let wait = async || tokio::time::sleep(Duration::from_secs(5)).await;
        still.extend(longest(world, &ids, &format!("still-{round}"), wait).await.0);
        let (drained, failures) = longest(world, &ids, &format!("drain-{round}"), async || {
            world.nodes[2].api("operatoroperator", "PUT", "/cluster/drain", Value::Null).await;
            while held(&world.nodes[0]).await.contains_key(&me) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        pauses.extend(drained);
        failed += failures;
        world.nodes[2].api("operatoroperator", "DELETE", "/cluster/drain", Value::Null).await;
        shared_out(&world.nodes[0], 3).await;
    }
    let steps = since(&before, &steps(&world.nodes).await);
    Drained { pauses, still, failed, steps }
}

/// The same while the replicas of one partition, the log of one conversation of the node that drains, answer nobody, and a
/// note to it is under way.
async fn stopped(results: &mut Results, server: &Server, rounds: usize) {
    let gap = Gap::before(&server.addresses).await;
    let dir = tempfile::tempdir().unwrap();
    let dirs = ["a", "b", "c"].map(|name| dir.path().join(name));
    let mut world = World::start(&dirs, &gap.address.to_string(), "bench_stopped").await;
    let all = held(&world.nodes[0]).await;
    let of_last = &all[&world.nodes[2].incarnation];
    let away = of_last.iter().filter_map(|shard| world.of.get(shard).copied()).nth(PROBED).unwrap();
    gap.lose([away.as_bytes().as_slice(), &0u64.to_be_bytes()].concat());
    let by = &world.nodes[0].target;
    let stuck = note(by.http.clone(), by.public.clone(), world.key.clone(), away, "stuck".to_owned());
    let stuck = tokio::spawn(stuck);
    gap.has_lost().await;
    let drained = drains(&mut world, rounds).await;
    gap.heal();
    // It may have been given up meanwhile, and is not told apart from one that failed.
    let _ = stuck.await;
    let what = "the same, while every request about the log of one conversation of the node that drains is lost on its way to the store, a note under way among them";
    drained.note(results, "handoff_pause_p99_ms[stopped]", what);
    for node in world.nodes {
        node.stop().await;
    }
}

/// What an entry that a socket is shown costs.
struct Cost {
    /// Processor time of all nodes, in microseconds, beside what they take at rest.
    cpu: f64,
    /// Publications that cross between nodes.
    crossed: f64,
    /// What a node takes at rest, of a core.
    rest: f64,
}

/// Of clusters beside each other, of so many nodes each, all of them under the same load.
async fn per_message(addresses: &str, clusters: usize, nodes: usize, time: Duration) -> Cost {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Vec::new();
    for cluster in 0..clusters {
        let keyspace = format!("bench_work_{clusters}_{nodes}_{cluster}");
        let first = running.len();
        for n in 0..nodes {
            running.push(start(&dir.path().join(format!("{cluster}-{n}")), addresses, &keyspace).await);
        }
        shared_out(&running[first], nodes).await;
    }
    let plan = Plan {
        conversations: 20,
        agents: 1,
        encodings: vec![Encoding::Protobuf],
        customer_rate: 40.0,
        agent_rate: 40.0,
        in_flight: 0,
        time,
    };
    let look = || running.iter().map(|node| Cpu::now(node.child.id())).collect::<Vec<_>>();
    let burnt = |since: &[Cpu]| since.iter().map(|cpu| cpu.since().node).sum::<f64>();
    let at_rest = look();
    tokio::time::sleep(time).await;
    let at_rest = burnt(&at_rest);
    let crossed_before = crossed(&running).await;
    let began = look();
    let loads = running.iter().map(|node| load::run(&node.target, &plan, |_, _| {}));
    let reports = futures_util::future::try_join_all(loads).await.unwrap();
    let used = burnt(&began);
    assert!(reports.iter().all(load::report::Report::is_clean), "{reports:?}");
    let seen = reports.iter().map(|report| report.seen as f64).sum::<f64>();
    let crossed = crossed(&running).await - crossed_before;
    let rest = at_rest / time.as_secs_f64() / running.len() as f64;
    for node in running {
        node.stop().await;
    }
    Cost { cpu: (used - at_rest) * 1e6 / seen, crossed: crossed / seen, rest }
}

/// Publications that nodes have sent to others.
async fn crossed(nodes: &[Node]) -> f64 {
    let mut all = 0.0;
    for node in nodes {
        let text = node.metrics().await;
        let lines = text.lines().filter_map(|l| l.strip_prefix("patchbay_mesh_publications_total "));
        all += lines.filter_map(|value| value.parse::<f64>().ok()).sum::<f64>();
    }
    all
}

/// A load by way of one node that is alone, and one by way of each of five, most of whose entities are elsewhere; and beside
/// it by way of five that know nothing of each other.
pub async fn work(results: &mut Results) {
    let time = Duration::from_secs(if results.quick { 8 } else { 30 });
    let server = Server::start("cassandra", 1, &["--heap", "1g"]);
    let alone = per_message(&server.addresses, 1, 1, time).await;
    let beside = per_message(&server.addresses, MANY, 1, time).await;
    let together = per_message(&server.addresses, 1, MANY, time).await;
    let conditions = format!(
        "40 customers' and 40 agents' messages a second by way of each node; {MANY} nodes of one cluster {:.0} us of all nodes for each entry shown, {MANY} that are alone {:.0} us, on the same two cores; one node with the machine to itself {:.0} us ({:.2} of those beside each other); at rest {:.1} %, {:.1} % and {:.1} % of a core each; {:.2} publications cross for each; one Cassandra node",
        together.cpu,
        beside.cpu,
        alone.cpu,
        together.cpu / beside.cpu,
        together.rest * 100.0,
        beside.rest * 100.0,
        alone.rest * 100.0,
        together.crossed
    );
    let growth = together.cpu / alone.cpu;
    results.note("work_per_message_growth", growth, "ratio", Goal::AtMost(1.2), &conditions, None);
}
