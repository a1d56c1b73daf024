//! Kafka goes away in every way that it can, and our node with it: sends go on being acked, and after each fault every
//! entry is in the topic at least once, in order, without a gap.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::faults::{Load, NUMBER, ONE_AT_A_TIME, logs_are_whole, metric, readyz, topic_is_whole};
use common::servers::{self, Server};
use common::{Node, conversation, text_item, until, webhook_body};
use patchbay_storage::events::Start;
use patchbay_storage::kafka::{KafkaConfig, KafkaSource};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;

/// Longer than every timeout of the client that ends something.
const LONG: Duration = Duration::from_secs(12);

fn env(brokers: &str, topic: &str) -> Vec<(&'static str, String)> {
    let brokers = format!("[\"{}\"]", brokers.replace(',', "\",\""));
    vec![
        // The embedded store: what is looked at here is Kafka.
        ("PATCHBAY__STORAGE__ENGINE", "embedded".into()),
        ("PATCHBAY__EVENTS__KAFKA__BROKERS", brokers),
        ("PATCHBAY__EVENTS__KAFKA__TOPIC", topic.into()),
    ]
}

async fn start(dir: &Path, env: &[(&'static str, String)]) -> Node {
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Node::start_with(dir, &env).await
}

fn source(brokers: &str, topic: &str) -> KafkaSource {
    KafkaSource::join(&KafkaConfig::new(brokers, topic), &servers::fresh("check"), Start::Earliest).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_broker_and_every_way_that_it_goes() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut kafka = Server::start("kafka", 1, &[]);
    let (topic, dir) = (servers::fresh("faults"), tempfile::tempdir().unwrap());
    let env = env(&kafka.addresses, &topic);
    let mut node = start(dir.path(), &env).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    until("ready", async || (readyz(&node).await.0 == 200).then_some(())).await;
    let load = Load::start(&node, 20, Duration::from_millis(20));
    load.goes_on(200).await;

    // Frozen for longer than any timeout.
    kafka.freeze(1);
    load.goes_on(200).await;
    tokio::time::sleep(LONG).await;
    load.goes_on(200).await;
    kafka.thaw(1);

    // Killed, and load in the middle of it.
    load.goes_on(100).await;
    kafka.kill(1);
    load.goes_on(400).await;
    until("it says so", async || readyz(&node).await.1.contains("events is away").then_some(())).await;
    kafka.restart(1);
    until("it goes on", async || (readyz(&node).await.1 == "ready").then_some(())).await;

    // Our node killed in the middle.
    load.goes_on(200).await;
    node.kill().await;
    node = start(dir.path(), &env).await;
    load.moves_to(&node);
    load.goes_on(200).await;

    // Both at once.
    kafka.kill(1);
    load.goes_on(200).await;
    node.kill().await;
    node = start(dir.path(), &env).await;
    load.moves_to(&node);
    load.goes_on(200).await;
    let (status, why) = readyz(&node).await;
    assert!(status == 503 && why.starts_with("waiting for events"), "{status} {why}");
    kafka.restart(1);
    until("it starts when it comes", async || (readyz(&node).await.1 == "ready").then_some(())).await;

    // Its disk takes nothing more, which ends it.
    let limited = std::process::Command::new("prlimit")
        .args(["--fsize=1", "--pid", &kafka.pids[0].to_string()])
        .status()
        .unwrap();
    assert!(limited.success());
    load.goes_on(400).await;
    kafka.stop(1);
    kafka.restart(1);
    load.goes_on(200).await;

    let acked = load.end().await;
    let tips = logs_are_whole(&node, &key, &acked).await;
    let repeats = topic_is_whole(source(&kafka.addresses, &topic), &tips).await;
    println!("{} acked, {repeats} events came twice", acked.iter().sum::<u64>());
    until("nothing is left", async || {
        (metric(&node, "patchbay_outbox_lagging_conversations").await == 0.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_broker_of_three_is_killed_and_another_frozen() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut kafka = Server::start("kafka", 3, &["--heap", "192m"]);
    let (topic, dir) = (servers::fresh("three"), tempfile::tempdir().unwrap());
    let mut env = env(&kafka.addresses, &topic);
    env.push(("PATCHBAY__EVENTS__KAFKA__REPLICATION", "3".into()));
    let node = start(dir.path(), &env).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    until("ready", async || (readyz(&node).await.0 == 200).then_some(())).await;
    let load = Load::start(&node, 20, Duration::from_millis(20));
    load.goes_on(200).await;
    kafka.kill(2);
    load.goes_on(400).await;
    kafka.restart(2);
    load.goes_on(200).await;
    kafka.freeze(3);
    load.goes_on(200).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    kafka.thaw(3);
    load.goes_on(200).await;
    let acked = load.end().await;
    let tips = logs_are_whole(&node, &key, &acked).await;
    topic_is_whole(source(&kafka.addresses, &topic), &tips).await;
}

fn admin(brokers: &str) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_goes_is_made_again_and_one_of_another_shape_is_refused() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let (brokers, topic, dir) = (servers::kafka(), servers::fresh("gone"), tempfile::tempdir().unwrap());
    let node = start(dir.path(), &env(&brokers, &topic)).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let write = async |from: &str, id: &str| {
        let body = webhook_body(NUMBER, &[text_item(from, id, "hola")], &[]);
        assert_eq!(node.webhook("acme", "wa", &body).await, 200);
    };
    write("34600000001", "a").await;
    until("published", async || {
        (metric(&node, "patchbay_outbox_published_total").await >= 2.0).then_some(())
    })
    .await;
    let options = AdminOptions::new();
    admin(&brokers).delete_topics(&[&topic], &options).await.unwrap();
    // What is written from here on is in the topic that is made again.
    for n in 0..20 {
        write("34600000002", &format!("b{n}")).await;
    }
    let id = conversation("acme", "wa", "34600000002").to_string();
    let tip = node.entries(&key, id.parse().unwrap()).await.len() as u64;
    until("made again", async || (readyz(&node).await.1 == "ready").then_some(())).await;
    topic_is_whole(source(&brokers, &topic), &[(id, tip)].into()).await;

    // A topic with another number of partitions would break every conversation's order.
    let other = servers::fresh("other");
    admin(&brokers)
        .create_topics(&[NewTopic::new(&other, 3, TopicReplication::Fixed(1))], &options)
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path(), &env(&brokers, &other)).await;
    let refused =
        until("it says so", async || Some(readyz(&node).await.1).filter(|t| t.contains("partitions"))).await;
    assert!(refused.contains("replay into a new topic"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_the_broker_never_takes_parks_its_conversation_by_name() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let (brokers, topic, dir) = (servers::kafka(), servers::fresh("small"), tempfile::tempdir().unwrap());
    let small = NewTopic::new(&topic, 4, TopicReplication::Fixed(1)).set("max.message.bytes", "3000");
    admin(&brokers).create_topics(&[small], &AdminOptions::new()).await.unwrap();
    let env = env(&brokers, &topic);
    let mut node = start(dir.path(), &env).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let mut tips = std::collections::BTreeMap::new();
    for round in 0..3 {
        for n in 0..10 {
            let from = format!("3460000{n:04}");
            let text = if (round, n) == (1, 4) { "x".repeat(3500) } else { "hola".into() };
            let body = webhook_body(NUMBER, &[text_item(&from, &format!("{round}-{n}"), &text)], &[]);
            assert_eq!(node.webhook("acme", "wa", &body).await, 200);
        }
    }
    for n in (0..10).filter(|n| *n != 4) {
        let id = conversation("acme", "wa", &format!("3460000{n:04}"));
        tips.insert(id.to_string(), node.entries(&key, id).await.len() as u64);
    }
    topic_is_whole(source(&brokers, &topic), &tips).await;
    let parked = "patchbay_outbox_parked_conversations";
    until("it is parked", async || (metric(&node, parked).await == 1.0).then_some(())).await;
    let log = std::fs::read_to_string(dir.path().join("node.log")).unwrap();
    let bad = conversation("acme", "wa", "34600000004");
    assert!(log.lines().any(|l| l.contains("parked") && l.contains(&bad.to_string())), "by name");
    // It stays parked over a restart, and nothing of it is passed over.
    node.terminate().await;
    let node = start(dir.path(), &env).await;
    until("it is still parked", async || (metric(&node, parked).await == 1.0).then_some(())).await;
    topic_is_whole(source(&brokers, &topic), &[(bad.to_string(), 2)].into()).await;
}
