//! A cluster of processes on Cassandra: a node that is killed, and one that drains, as whoever sends notices it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use patchbay_protocol::ids::{AccountId, ConversationId, TenantId};
use serde_json::{Value, json};

use crate::node::Node;
use crate::results::{Goal, Results};
use crate::servers::Server;

const TENANT: &str = "cluster";
/// Customers: of most shards there is one.
const CUSTOMERS: usize = 3_000;
/// Shards that are written to while they move, and how often each.
const PROBED: usize = 32;
const PROBE_PAUSE: Duration = Duration::from_millis(50);

async fn start(dir: &Path, addresses: &str) -> Node {
    std::fs::create_dir_all(dir).unwrap();
    let nodes = format!("[\"{}\"]", addresses.replace(',', "\",\""));
    let env = [
        ("PATCHBAY__STORAGE__ENGINE", "scylla"),
        ("PATCHBAY__STORAGE__SCYLLA__NODES", nodes.as_str()),
        ("PATCHBAY__STORAGE__SCYLLA__DATACENTER", "datacenter1"),
        ("PATCHBAY__STORAGE__SCYLLA__KEYSPACE", "bench_cluster"),
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
    /// A conversation of each shard.
    of: HashMap<u32, ConversationId>,
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

/// The longest that each of these conversations was waited for while `what` was going on.
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

pub async fn run(results: &mut Results) {
    let rounds = if results.quick { 1 } else { 3 };
    let server = Server::start("cassandra", 1, &["--heap", "1g"]);
    let dir = tempfile::tempdir().unwrap();
    let dirs = ["a", "b", "c"].map(|name| dir.path().join(name));
    let mut nodes = Vec::new();
    for dir in &dirs {
        nodes.push(start(dir, &server.addresses).await);
    }
    shared_out(&nodes[0], 3).await;
    let key = nodes[0].tenant(TENANT).await;
    nodes[0].customers_write(TENANT, 0, CUSTOMERS).await;
    let count = u32::try_from(held(&nodes[0]).await.values().map(Vec::len).sum::<usize>()).unwrap();
    let (tenant, account): (TenantId, AccountId) = (TENANT.parse().unwrap(), "wa".parse().unwrap());
    let of = (0..CUSTOMERS).map(|n| {
        let id = ConversationId::derive(&tenant, &account, &format!("3460{n:07}"));
        (id.shard(count), id)
    });
    let mut world = World { nodes, key, of: of.collect() };

    let (mut killed, mut detected) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (taken, after) = failover(&mut world, 1).await;
        killed.extend(taken);
        detected.extend(after);
        world.nodes[1] = start(&dirs[1], &server.addresses).await;
        shared_out(&world.nodes[0], 3).await;
    }
    let conditions = format!(
        "three nodes, {count} shards, one Cassandra node, all on two cores; {rounds} SIGKILLs, a note to each of {} shards at once, by way of another node, repeated until it is acked; lease 2.5 s",
        killed.len()
    );
    results.note("failover_p99_seconds", p99(killed), "s", Goal::AtMost(5.0), &conditions, None);
    let after = p99(detected);
    results.note("failover_after_detection_p99_seconds", after, "s", Goal::AtMost(3.0), &conditions, None);

    let (mut pauses, mut still, mut failed) = (Vec::new(), Vec::new(), 0);
    for round in 0..rounds {
        let me = world.nodes[2].incarnation;
        let shards = held(&world.nodes[0]).await.remove(&me).unwrap();
        let ids: Vec<ConversationId> =
            shards.iter().filter_map(|shard| world.of.get(shard).copied()).take(PROBED).collect();
        let wait = async || tokio::time::sleep(Duration::from_secs(5)).await;
        still.extend(longest(&world, &ids, &format!("still-{round}"), wait).await.0);
        let (drained, failures) = longest(&world, &ids, &format!("drain-{round}"), async || {
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
    let conditions = format!(
        "{rounds} drains of one of three nodes, a third of {count} shards each; the longest that a note to each of {} of its shards took, one every {} ms; {failed} failed; while nothing moves: {:.0} ms",
        pauses.len(),
        PROBE_PAUSE.as_millis(),
        p99(still) * 1000.0
    );
    results.note("handoff_pause_p99_ms", p99(pauses) * 1000.0, "ms", Goal::AtMost(250.0), &conditions, None);
    for node in world.nodes {
        node.stop().await;
    }
}
