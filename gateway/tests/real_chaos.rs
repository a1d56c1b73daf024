//! A cluster of real processes on real engines, under agents, customers and receipts, and everything that can happen to it: nodes
//! are killed, stopped for longer than a lease, restarted, drained and joined; one store server dies, and then all of them
//! stand still. In the end every history is compared: the clients', the store's, the provider's and Kafka's.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use common::cluster::{COMMON, held, incarnation, shared_out};
use common::faults::{ONE_AT_A_TIME, topic_is_whole};
use common::history::{ACCOUNTS, Around, check, id_of, settle, surround};
use common::servers::{self, Server};
use common::{Node, until};
use patchbay_storage::events::Start;
use patchbay_storage::kafka::{KafkaConfig, KafkaSource};
use serde_json::Value;

const CUSTOMERS: usize = ACCOUNTS * 8;
/// Twice the time that a lease lives.
const STILL: Duration = Duration::from_secs(5);

struct World {
    cassandra: Server,
    keyspace: String,
    topic: String,
}

impl World {
    async fn start(&self, dir: &Path) -> Node {
        let nodes = format!("[\"{}\"]", self.cassandra.nodes().join("\",\""));
        let env = [
            ("PATCHBAY__STORAGE__SCYLLA__NODES", nodes.as_str()),
            ("PATCHBAY__STORAGE__SCYLLA__KEYSPACE", &self.keyspace),
            ("PATCHBAY__STORAGE__SCYLLA__REPLICATION", "3"),
            ("PATCHBAY__EVENTS__KAFKA__TOPIC", &self.topic),
            ("PATCHBAY__PROVIDERS__TIMEOUT", "1500ms"),
        ];
        std::fs::create_dir_all(dir).unwrap();
        let env: Vec<(&str, &str)> = env.into_iter().chain(COMMON).collect();
        Node::start_with(dir, &env).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_to_nodes_and_stores_nothing_is_lost_doubled_or_out_of_order() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    common::install_crypto();
    let dir = tempfile::tempdir().unwrap();
    let mut world = World {
        cassandra: Server::start("cassandra", 3, &["--heap", "384m"]),
        keyspace: "chaos".into(),
        topic: servers::fresh("chaos"),
    };
    let dirs: Vec<_> = ["a", "b", "c", "d"].iter().map(|name| dir.path().join(name)).collect();
    let mut nodes = Vec::new();
    for dir in &dirs[..3] {
        nodes.push(world.start(dir).await);
    }
    shared_out(&nodes[0], 3).await;
    let Around { through, simulator, key, load, tasks, public: _public } =
        surround(&nodes, "127.0.0.1", CUSTOMERS).await;
    let began = Instant::now();
    let say = |what: &str| println!("{:>6.1} s  {what}", began.elapsed().as_secs_f64());

    say("a node is killed");
    nodes[1].kill().await;
    through.leads_to(&[&nodes[0], &nodes[2]]);
    shared_out(&nodes[0], 2).await;
    load.goes_on(200).await;
    say("and comes back");
    nodes[1] = world.start(&dirs[1]).await;
    through.leads_to(&nodes.iter().collect::<Vec<_>>());
    let before = shared_out(&nodes[0], 3).await;
    load.goes_on(200).await;

    say("a node is stopped for twice its lease");
    nodes[2].signal("-STOP");
    through.leads_to(&[&nodes[0], &nodes[1]]);
    tokio::time::sleep(STILL).await;
    nodes[2].signal("-CONT");
    through.leads_to(&nodes.iter().collect::<Vec<_>>());
    let after = shared_out(&nodes[0], 3).await;
    assert_eq!(
        before.keys().filter(|n| !after.contains_key(n)).count(),
        1,
        "it is another incarnation: {after:?}"
    );
    load.goes_on(300).await;

    say("all of the store stands still for twice a lease");
    (1..=3).for_each(|n| world.cassandra.freeze(n));
    tokio::time::sleep(STILL).await;
    (1..=3).for_each(|n| world.cassandra.thaw(n));
    load.goes_on(200).await;
    let now: Vec<u64> = shared_out(&nodes[0], 3).await.into_keys().collect();
    assert!(now.iter().eq(after.keys()), "nobody was replaced: {now:?} of {after:?}");

    say("one server of the store is killed");
    world.cassandra.kill(2);
    load.goes_on(300).await;
    say("nobody has waited for it");
    let now: Vec<u64> = shared_out(&nodes[0], 3).await.into_keys().collect();
    assert!(now.iter().eq(after.keys()), "nobody was replaced: {now:?} of {after:?}");
    world.cassandra.restart(2);
    say("it is back");
    load.goes_on(200).await;

    say("a node joins and is killed while it is given its share");
    let mut joins = world.start(&dirs[3]).await;
    until("it is being given shards", async || (held(&nodes[0]).await.len() == 4).then_some(())).await;
    joins.kill().await;
    shared_out(&nodes[0], 3).await;
    load.goes_on(200).await;

    say("a node drains and ends, and another one ends in the middle of it");
    for n in 0..2 {
        let (status, _) = nodes[n].api(nodes[n].operator_key(), "PUT", "/cluster/drain", None).await;
        assert_eq!(status, 202);
        let left: Vec<&Node> =
            nodes.iter().enumerate().filter(|(m, _)| *m != n).map(|(_, node)| node).collect();
        through.leads_to(&left);
        if n == 1 {
            // Ended in the middle of it.
            load.goes_on(20).await;
        } else {
            let by = left[0];
            let me = incarnation(&nodes[n]);
            until("it has nothing left", async || {
                held(by).await.get(&me).is_none_or(|n| *n == 0).then_some(())
            })
            .await;
        }
        assert_eq!(nodes[n].terminate().await, Some(0));
        nodes[n] = world.start(&dirs[n]).await;
        through.leads_to(&nodes.iter().collect::<Vec<_>>());
        shared_out(&nodes[n], 3).await;
        load.goes_on(200).await;
    }

    say("everybody ends");
    load.end(tasks).await;
    settle(&nodes[0], &key, &simulator, CUSTOMERS).await;
    let found = check(&nodes[1], &key, &simulator, &load, CUSTOMERS).await;
    let mut tips = BTreeMap::new();
    for n in 0..CUSTOMERS {
        tips.insert(id_of(n).to_string(), nodes[2].entries(&key, id_of(n)).await.len() as u64);
    }
    let config = KafkaConfig::new(&servers::kafka(), &world.topic);
    let repeats = topic_is_whole(KafkaSource::join(&config, "check", Start::Earliest).unwrap(), &tips).await;
    say(&format!("the topic is whole as well, with {repeats} events twice: {found}"));
    if let Some(file) = std::env::var_os("PATCHBAY_CHAOS_RESULT") {
        std::fs::write(file, Value::to_string(&found)).unwrap();
    }
}
