//! The store goes away in every way that it can: nothing that was acked is lost or doubled, nothing is acked that cannot
//! be kept, and the node goes on by itself.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::faults::{Load, NUMBER, ONE_AT_A_TIME, customer, logs_are_whole, readyz, topic_is_whole};
use common::servers::{self, Server};
use common::{Node, text_item, until, webhook_body};
use patchbay_storage::events::embedded::EmbeddedSource;
use patchbay_storage::{Stamp, Table};
use serde_json::Value;

fn env(nodes: &str, keyspace: &str, copies: usize) -> Vec<(&'static str, String)> {
    let nodes = format!("[\"{}\"]", nodes.replace(',', "\",\""));
    vec![
        ("PATCHBAY__STORAGE__SCYLLA__NODES", nodes),
        ("PATCHBAY__STORAGE__SCYLLA__KEYSPACE", keyspace.into()),
        ("PATCHBAY__STORAGE__SCYLLA__REPLICATION", copies.to_string()),
        // The embedded log files: what is looked at here is the store.
        ("PATCHBAY__EVENTS__ENGINE", "embedded".into()),
    ]
}

async fn start(dir: &Path, env: &[(&'static str, String)]) -> Node {
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Node::start_with(dir, &env).await
}

async fn check(node: &Node, key: &str, dir: &Path, acked: &[u64]) {
    let tips = logs_are_whole(node, key, acked).await;
    let source = EmbeddedSource::join(&dir.join("data/events"), "check").unwrap();
    topic_is_whole(source, &tips).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_node_is_stopped_killed_and_restarted_under_load() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut cassandra = Server::start("cassandra", 1, &[]);
    let dir = tempfile::tempdir().unwrap();
    let env = env(&cassandra.addresses, "single", 1);
    let mut node = start(dir.path(), &env).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let load = Load::start(&node, 16, Duration::from_millis(10));
    load.goes_on(300).await;
    let slow = cassandra.slow(1);
    load.goes_on(300).await;
    drop(slow);
    cassandra.freeze(1);
    tokio::time::sleep(Duration::from_secs(5)).await;
    cassandra.thaw(1);
    load.goes_on(300).await;
    cassandra.kill(1);
    until("it says so", async || (readyz(&node).await.0 == 503).then_some(())).await;
    cassandra.restart(1);
    load.goes_on(300).await;
    until("it goes on by itself", async || (readyz(&node).await.0 == 200).then_some(())).await;
    // Both at once: what was under way at the node is adopted by the next one.
    cassandra.kill(1);
    node.kill().await;
    cassandra.restart(1);
    node = start(dir.path(), &env).await;
    load.moves_to(&node);
    load.goes_on(300).await;
    let acked = load.end().await;
    check(&node, &key, dir.path(), &acked).await;
    println!("{} acked", acked.iter().sum::<u64>());
}

/// Moves what the processes that read this file take for the time of day.
fn set_clock(file: &Path, by: &str) {
    let fresh = file.with_extension("new");
    std::fs::write(&fresh, by).unwrap();
    std::fs::rename(fresh, file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clock_of_the_node_moves() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let dir = tempfile::tempdir().unwrap();
    let library = std::fs::read_dir("/usr/lib").unwrap().flatten();
    let library = library.map(|d| d.path().join("faketime/libfaketimeMT.so.1")).find(|lib| lib.exists());
    let library = library.expect("libfaketime, which `./x test` installs").to_str().unwrap().to_owned();
    let clock = dir.path().join("clock");
    set_clock(&clock, "+0");
    let mut env = env(&servers::cassandra().join(","), &servers::fresh("clock"), 1);
    env.extend([
        ("LD_PRELOAD", library),
        ("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap().to_owned()),
        ("FAKETIME_NO_CACHE", "1".into()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
    ]);
    let mut node = start(dir.path(), &env).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let load = Load::start(&node, 16, Duration::from_millis(10));
    load.goes_on(200).await;
    // Days ahead, and then days behind: what was written before and what is written now stand side by side.
    for by in ["+3d", "-3d"] {
        set_clock(&clock, by);
        load.goes_on(300).await;
    }
    // Whoever comes after a crash has another idea of the time.
    for by in ["+5d", "-5d", "+0"] {
        node.kill().await;
        set_clock(&clock, by);
        node = start(dir.path(), &env).await;
        load.moves_to(&node);
        load.goes_on(200).await;
    }
    let acked = load.end().await;
    check(&node, &key, dir.path(), &acked).await;
    let days = node.entries(&key, common::conversation("acme", "wa", &customer(0))).await;
    let days: std::collections::BTreeSet<&str> =
        days.iter().map(|e| &e["at"].as_str().unwrap()[..10]).collect();
    assert!(days.len() >= 2, "the clock was moved: {days:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_three_nodes_one_may_go_and_two_may_not() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut cassandra = Server::start("cassandra", 3, &["--heap", "384m"]);
    let dir = tempfile::tempdir().unwrap();
    let node = start(dir.path(), &env(&cassandra.addresses, "three", 3)).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let load = Load::start(&node, 8, Duration::from_millis(20));
    load.goes_on(100).await;
    // One that dawdles holds up nobody who can ask another.
    let slow = cassandra.slow(2);
    let began = Instant::now();
    load.goes_on(400).await;
    let mut taken: Vec<Duration> = load.latencies_since(began);
    drop(slow);
    taken.sort_unstable();
    println!("one of three is slow: {:?} at the median of {}", taken[taken.len() / 2], taken.len());
    cassandra.kill(2);
    load.goes_on(200).await;
    cassandra.freeze(3);
    // Without a quorum nothing is acked, once what was under way has ended.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let (before, refused) = (load.total(), load.refused.load(std::sync::atomic::Ordering::Relaxed));
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(load.total(), before, "acked without a quorum");
    until("senders are told", async || {
        (load.refused.load(std::sync::atomic::Ordering::Relaxed) > refused).then_some(())
    })
    .await;
    cassandra.thaw(3);
    load.goes_on(100).await;
    // Killed, it refuses at once, by name.
    cassandra.kill(3);
    let told = until("it is refused by name", async || {
        let body = Some(serde_json::json!({"name": "Other"}));
        let (status, body) = node.api(&key, "PUT", "/inboxes/other", body).await;
        (status == 503).then_some(body)
    })
    .await;
    assert_eq!(told["code"], "unavailable", "{told}");
    cassandra.restart(2);
    cassandra.restart(3);
    load.goes_on(200).await;
    let acked = load.end().await;
    check(&node, &key, dir.path(), &acked).await;
}

/// A node that is not expected to be ready: its process, and where its operators' door is.
struct Waiting {
    child: tokio::process::Child,
    ops: String,
}

async fn waiting(dir: &Path, env: &[(&'static str, String)]) -> Waiting {
    common::install_crypto();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_patchbay"));
    command
        .args(["run", "--data-dir"])
        .arg(dir.join("data"))
        .arg("--ready-file")
        .arg(dir.join("ready.json"))
        .envs(common::real_engines(dir))
        .envs(env.iter().map(|(name, value)| (*name, value.as_str())))
        .env("PATCHBAY__PUBLIC__LISTEN", "127.0.0.1:0")
        .env("PATCHBAY__OPS__LISTEN", port.to_string())
        .env("PATCHBAY__LOG__LEVEL", "error")
        .stderr(Stdio::null())
        .kill_on_drop(true);
    Waiting { child: command.spawn().unwrap(), ops: port.to_string() }
}

impl Waiting {
    async fn readyz(&self) -> Option<(u16, String)> {
        let answer = reqwest::get(format!("http://{}/readyz", self.ops)).await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    async fn says(&self, what: &str) {
        until(what, async || self.readyz().await.filter(|(_, text)| text.contains(what)).map(drop)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_missing_at_the_start_is_named_and_waited_for() {
    if servers::quick() {
        return;
    }
    // It mostly waits: others may have the machine meanwhile.
    let auth = ["--set", "authenticator: PasswordAuthenticator"];
    let mut cassandra = Server::start("cassandra", 1, &auth);
    cassandra.stop(1);
    let dir = tempfile::tempdir().unwrap();
    let mut settings = env(&cassandra.addresses, "waits", 1);
    settings.push(("PATCHBAY__STORAGE__SCYLLA__USERNAME", "cassandra".into()));
    settings.push(("PATCHBAY__STORAGE__SCYLLA__PASSWORD", "cassandra".into()));
    settings.push(("PATCHBAY__STORAGE__SCYLLA__MIGRATE", "false".into()));
    let node = waiting(dir.path(), &settings).await;
    node.says("waiting for storage").await;
    cassandra.restart(1);
    // Nobody may make the schema: it says what is missing.
    node.says("lacks version 2 of the schema").await;
    drop(node);
    let last = settings.len() - 1;
    settings[last].1 = "true".into();
    settings[last - 1].1 = "wrong".into();
    let node = waiting(dir.path(), &settings).await;
    node.says("it does not take the user and password").await;
    drop(node);
    settings[last - 1].1 = "cassandra".into();
    let node = waiting(dir.path(), &settings).await;
    until("it starts", async || node.readyz().await.filter(|(status, _)| *status == 200).map(drop)).await;
    drop(node);
    // A cluster lives in one data centre.
    settings.push(("PATCHBAY__STORAGE__SCYLLA__DATACENTER", "elsewhere".into()));
    let mut node = waiting(dir.path(), &settings).await;
    let ended = tokio::time::timeout(Duration::from_secs(30), node.child.wait()).await.unwrap().unwrap();
    assert!(!ended.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_messages_in_one_inbox_and_then_its_list() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let (messages, customers) = (100_000, 500);
    let cassandra = Server::start("cassandra", 1, &[]);
    let dir = tempfile::tempdir().unwrap();
    let env = env(&cassandra.addresses, "many", 1);
    let mut node = start(dir.path(), &env).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let deliver = async |first: usize| {
        let items: Vec<Value> = (first..first + customers)
            .map(|n| text_item(&format!("346{:08}", n % customers), &format!("m{n}"), "hola"))
            .collect();
        let body = webhook_body(NUMBER, &items, &[]);
        while node.webhook("acme", "wa", &body).await != 200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    for first in (0..messages).step_by(8 * customers) {
        // What comes for one conversation meanwhile goes out as one append.
        let several = (first..(first + 8 * customers).min(messages)).step_by(customers).map(&deliver);
        futures_util::future::join_all(several).await;
    }
    let session = servers::session(&cassandra.addresses).await;
    every_cell_is_stamped(&session, "many").await;
    // Read by a node that has nothing in memory.
    node.terminate().await;
    let node = start(dir.path(), &env).await;
    let list = until("every conversation is listed", async || {
        let list = node.get(&key, "/conversations?inbox=main&limit=1000").await;
        (list["conversations"].as_array().unwrap().len() == customers).then_some(list)
    })
    .await;
    let entries: u64 =
        list["conversations"].as_array().unwrap().iter().map(|c| c["last_seq"].as_u64().unwrap()).sum();
    assert_eq!(entries, (messages + customers) as u64);
    let open = node.get(&key, "/conversations?inbox=main&status=open&limit=1000").await;
    assert_eq!(open["conversations"].as_array().unwrap().len(), customers);
    let read = session
        .query_unpaged("SELECT keyspace_name, table_name, max FROM system_views.tombstones_per_read", &[])
        .await
        .unwrap()
        .into_rows_result()
        .unwrap();
    let mut looked = 0;
    for row in read.rows::<(String, String, Option<f64>)>().unwrap() {
        let (keyspace, table, most) = row.unwrap();
        if keyspace == "many" {
            looked += 1;
            // What is dropped as a whole partition is one; nothing is read over more.
            assert!(most.is_none_or(|n| n <= 2.0), "{table}: {most:?} tombstones in one read");
        }
    }
    assert!(looked >= 9, "{looked} tables");
}

/// No cell of any entity's table was written without its writer's stamp.
async fn every_cell_is_stamped(session: &scylla::client::session::Session, keyspace: &str) {
    use futures_util::TryStreamExt as _;
    for table in Table::ALL {
        let name = if table == Table::Entries { "log_entries" } else { table.name() };
        let question = format!("SELECT WRITETIME(value) FROM {keyspace}.{name}");
        let cells = session.query_iter(question, &[]).await.unwrap().rows_stream::<(i64,)>().unwrap();
        let (mut looked, mut cells) = (0, cells);
        while let Some((written,)) = cells.try_next().await.unwrap() {
            let stamp = Stamp::from_u64(u64::try_from(written).unwrap());
            assert!(stamp.epoch() >= 1 && stamp.as_u64() < 1 << 50, "{name}: written at {written}");
            looked += 1;
        }
        println!("{name}: {looked} cells");
        // Nobody was there to have a session, nothing was refused, nobody waits for an hour or sends a file.
        let unused = matches!(table, Table::Sessions | Table::DeadLetters | Table::Timers | Table::Files);
        assert!(looked > 0 || unused, "{name}");
    }
}
