//! Three processes on one store: shards are shared out, a node is killed, comes back, drains and ends, under load all the
//! while, and nothing that was acked is lost or doubled.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::faults::{Load, NUMBER, logs_are_whole};
use common::servers;
use common::{Node, until};
use serde_json::{Value, json};

const SHARDS: u64 = 64;

fn patchbay(args: &[&str]) -> String {
    let ran = Command::new(env!("CARGO_BIN_EXE_patchbay")).args(args).output().unwrap();
    assert!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

async fn start(dir: &Path, certs: &Path, keyspace: &str) -> Node {
    let file = |name: &str| certs.join(name).to_str().unwrap().to_owned();
    let nodes = format!("[\"{}\"]", servers::cassandra().join("\",\""));
    let env = [
        ("PATCHBAY__STORAGE__SCYLLA__NODES", nodes),
        ("PATCHBAY__STORAGE__SCYLLA__KEYSPACE", keyspace.to_owned()),
        ("PATCHBAY__EVENTS__ENGINE", "embedded".to_owned()),
        ("PATCHBAY__MESH__LISTEN", "127.0.0.1:0".to_owned()),
        ("PATCHBAY__MESH__CERT", file("node.pem")),
        ("PATCHBAY__MESH__KEY", file("node-key.pem")),
        ("PATCHBAY__MESH__CA", file("ca.pem")),
    ];
    std::fs::create_dir_all(dir).unwrap();
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Node::start_with(dir, &env).await
}

/// How many shards each node holds, as `by` knows it.
async fn held(by: &Node) -> Vec<(u64, u64)> {
    let found = by.get(by.operator_key(), "/cluster/nodes").await;
    let nodes = found["nodes"].as_array().unwrap();
    nodes.iter().map(|n| (n["incarnation"].as_u64().unwrap(), n["shards"].as_u64().unwrap())).collect()
}

async fn shared_out(by: &Node, nodes: usize) {
    until(&format!("{nodes} nodes have a share each"), async || {
        let held = held(by).await;
        let fair = SHARDS / nodes as u64;
        (held.len() == nodes && held.iter().all(|(_, n)| (fair..=fair + 1).contains(n))).then_some(())
    })
    .await;
}

fn incarnation(node: &Node) -> u64 {
    node.ready["incarnation"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_killed_come_back_drain_and_end_under_load() {
    if servers::quick() {
        return;
    }
    let (dir, keyspace) = (tempfile::tempdir().unwrap(), servers::fresh("cluster"));
    let certs = dir.path().join("certs");
    patchbay(&["dev-cert", "--dir", certs.to_str().unwrap()]);
    let a = start(&dir.path().join("a"), &certs, &keyspace).await;
    let mut b = start(&dir.path().join("b"), &certs, &keyspace).await;
    let mut c = start(&dir.path().join("c"), &certs, &keyspace).await;
    shared_out(&a, 3).await;
    let key = a.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    // Every customer's shard is somebody's: two thirds of what one node is told crosses the mesh.
    let load = Load::start(&a, 32, Duration::from_millis(10));
    load.goes_on(500).await;

    b.kill().await;
    let killed = Instant::now();
    shared_out(&a, 2).await;
    println!("replaced in {:?}", killed.elapsed());
    load.goes_on(500).await;
    b = start(&dir.path().join("b"), &certs, &keyspace).await;
    shared_out(&a, 3).await;
    load.goes_on(500).await;

    // By way of the others it is the same.
    load.moves_to(&b);
    load.goes_on(300).await;
    let at_c = ["--url", &c.url(""), "--key", c.operator_key()];
    patchbay(&[&["drain"], &at_c[..]].concat());
    until("it holds nothing", async || held(&a).await.contains(&(incarnation(&c), 0)).then_some(())).await;
    load.goes_on(300).await;
    let plan: Value =
        serde_json::from_str(&patchbay(&[&["shards", "plan", "--json"], &at_c[..]].concat())).unwrap();
    assert_eq!(plan["planned"], json!([]));
    patchbay(&[&["drain", "--cancel"], &at_c[..]].concat());
    shared_out(&a, 3).await;

    // An operator's word.
    let shards: Value =
        serde_json::from_str(&patchbay(&[&["shards", "list", "--json"], &at_c[..]].concat())).unwrap();
    let of = |n: &Node| incarnation(n);
    let one = shards["shards"].as_array().unwrap().iter().find(|s| s["holder"] == json!(of(&b))).unwrap();
    let (shard, name) = (one["shard"].to_string(), c.ready["mesh"].as_str().unwrap().to_owned());
    patchbay(&[&["shards", "move", &shard, "--to", &name], &at_c[..]].concat());
    until("it is where it is wanted", async || {
        let why = a.get(a.operator_key(), &format!("/cluster/shards/{shard}")).await;
        (why["holder"] == json!(of(&c)) && why["reason"] == "an operator wants it here").then_some(())
    })
    .await;
    let said = patchbay(&[&["shards", "why", &shard], &at_c[..]].concat());
    assert!(said.contains("an operator wants it here") && said.contains("opened in"), "{said}");
    let (status, _) =
        a.api(a.operator_key(), "POST", "/cluster/shards/64/move", Some(json!({"to": null}))).await;
    assert_eq!(status, 404);
    let (status, _) =
        a.api(a.operator_key(), "POST", "/cluster/shards/1/move", Some(json!({"to": "x"}))).await;
    assert_eq!(status, 422);
    let (status, _) = a.api(&key, "PUT", "/cluster/drain", None).await;
    assert_eq!(status, 403);

    let ended = c.terminate();
    assert_eq!(ended.await, Some(0));
    shared_out(&a, 2).await;
    load.goes_on(300).await;
    let acked = load.end().await;
    for node in [&a, &b] {
        logs_are_whole(node, &key, &acked).await;
    }
    println!("{} acked", acked.iter().sum::<u64>());
}
