//! A cluster whose nodes are hosts of their own: network namespaces on a bridge, which the test makes in a namespace of its
//! own, so that nothing of them is left. What one node sends to another, or to the store, is dropped without a word, one way
//! or both; in the end every history is compared.
//!
//! Every address is one of loopback's: a node of `dev` listens nowhere else.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use common::cluster::{COMMON, SHARDS, held, incarnation, shared_out};
use common::faults::metric;
use common::history::{ACCOUNTS, Around, check, settle, surround};
use common::servers::{self, Server};
use common::{Node, until};
use serde_json::Value;

const CUSTOMERS: usize = ACCOUNTS * 8;
const NODES: u8 = 3;
/// Where the store is, for nodes; and this process.
const STORE: &str = "127.77.0.253";
const HERE: &str = "127.77.0.254";
/// Nobody's.
const NOWHERE: &str = "02:00:00:00:00:99";
/// Set where the namespaces are.
const INSIDE: &str = "PATCHBAY_TEST_NAMESPACE";

fn ip(line: &str) {
    let ran = Command::new("ip").args(line.split_whitespace()).output().unwrap();
    assert!(ran.status.success(), "ip {line}: {}", String::from_utf8_lossy(&ran.stderr));
}

/// Loopback leaves most of its addresses to others, which may be reached by way of them.
fn make_room(within: &[&str]) {
    let script = "ip link set lo up && ip addr del 127.0.0.1/8 dev lo && ip addr add 127.0.0.1/24 dev lo \
        && echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet";
    let line = [within, &["sh", "-c", script]].concat();
    assert!(Command::new(line[0]).args(&line[1..]).status().unwrap().success());
}

fn host(node: u8) -> String {
    format!("127.77.0.{node}")
}

/// A bridge, and a host of each node at it.
fn make_hosts() {
    make_room(&[]);
    ip("link add cluster type bridge");
    ip(&format!("addr add {HERE}/24 dev cluster"));
    ip(&format!("addr add {STORE}/24 dev cluster"));
    ip("link set cluster up");
    for n in 1..=NODES {
        ip(&format!("netns add n{n}"));
        ip(&format!("link add v{n} type veth peer name eth0 netns n{n}"));
        ip(&format!("link set v{n} master cluster up"));
        make_room(&["ip", "netns", "exec", &format!("n{n}")]);
        ip(&format!("-n n{n} addr add {}/24 dev eth0", host(n)));
        ip(&format!("-n n{n} link set eth0 up"));
    }
}

/// What `from` sends there arrives nowhere, and nobody says so.
fn cut(from: u8, to: &str) {
    ip(&format!("-n n{from} neigh replace {to} lladdr {NOWHERE} dev eth0 nud permanent"));
}

fn heal(from: u8, to: &str) {
    ip(&format!("-n n{from} neigh del {to} dev eth0"));
}

/// Runs this test again where it may make namespaces; false: there is no such place.
fn run_inside(test: &str) -> bool {
    let mut unshare = vec!["--net", "--mount", "--kill-child"];
    if Command::new("id").arg("-u").output().unwrap().stdout != b"0\n" {
        unshare.extend(["--user", "--map-root-user"]);
    }
    // Names of namespaces go with the mount.
    let run = |script: &str, args: &[&str]| {
        let mut command = Command::new("unshare");
        let script = format!("mount -t tmpfs none /run && {script}");
        command.args(&unshare).args(["sh", "-c", &script, "sh"]).args(args);
        command
    };
    let tries =
        "ip link add x type bridge && ip netns add x && echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet";
    let tried = run(tries, &[]).output();
    if !tried.as_ref().is_ok_and(|tried| tried.status.success()) {
        let why = tried.map_or_else(|e| e.to_string(), |t| String::from_utf8_lossy(&t.stderr).into_owned());
        // Not by `println!`, which the test's harness keeps to itself.
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "{test}: skipped: no network namespaces can be made: {why}");
        return false;
    }
    servers::fetch("cassandra");
    let exe = std::env::current_exe().unwrap();
    let again = run("exec \"$@\"", &[exe.to_str().unwrap(), "--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    println!("{}", String::from_utf8_lossy(&again.stdout));
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    true
}

async fn start(n: u8, dir: &Path, store: &str) -> Node {
    std::fs::create_dir_all(dir).unwrap();
    let (any, nodes, shards) = (format!("{}:0", host(n)), format!("[\"{store}\"]"), SHARDS.to_string());
    let env = COMMON.into_iter().chain([
        ("PATCHBAY__PUBLIC__LISTEN", any.as_str()),
        ("PATCHBAY__OPS__LISTEN", &any),
        ("PATCHBAY__MESH__LISTEN", &any),
        ("PATCHBAY__CLUSTER__SHARDS", &shards),
        ("PATCHBAY__STORAGE__ENGINE", "scylla"),
        ("PATCHBAY__STORAGE__SCYLLA__NODES", &nodes),
        ("PATCHBAY__STORAGE__SCYLLA__DATACENTER", "datacenter1"),
        ("PATCHBAY__STORAGE__SCYLLA__REPLICATION", "1"),
        ("PATCHBAY__PROVIDERS__TIMEOUT", "1500ms"),
    ]);
    Node::start_under(&["ip", "netns", "exec", &format!("n{n}")], dir, &env.collect::<Vec<_>>()).await
}

/// How long ago `by` heard of another one.
async fn heard_ms_ago(by: &Node, of: &Node) -> u64 {
    let found = by.get(by.operator_key(), "/cluster/nodes").await;
    let nodes = found["nodes"].as_array().unwrap();
    let node = nodes.iter().find(|n| n["incarnation"].as_u64() == Some(incarnation(of))).unwrap();
    node["heard_ms_ago"].as_u64().unwrap_or(u64::MAX)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_cut_nothing_is_lost_doubled_or_out_of_order() {
    if servers::quick() {
        return;
    }
    if std::env::var_os(INSIDE).is_none() {
        run_inside("whatever_is_cut_nothing_is_lost_doubled_or_out_of_order");
        return;
    }
    make_hosts();
    common::install_crypto();
    // Of this namespace.
    let everywhere = [
        "--heap",
        "512m",
        "--set",
        "rpc_address: 0.0.0.0",
        "--set",
        &format!("broadcast_rpc_address: {STORE}"),
    ];
    let cassandra = Server::start("cassandra", 1, &everywhere);
    let store = cassandra.nodes()[0].replace("127.0.0.1", STORE);
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = Vec::new();
    for n in 1..=NODES {
        nodes.push(start(n, &dir.path().join(n.to_string()), &store).await);
    }
    let before = shared_out(&nodes[0], 3).await;
    let Around { through, simulator, key, load, tasks, public: _public } =
        surround(&nodes, HERE, CUSTOMERS).await;
    let began = Instant::now();
    let say = |what: &str| println!("{:>6.1} s  {what}", began.elapsed().as_secs_f64());

    say("what the first node says to the second is lost");
    cut(1, &host(2));
    until("the second hears nothing", async || {
        (heard_ms_ago(&nodes[1], &nodes[0]).await > 3_000).then_some(())
    })
    .await;
    load.goes_on(100).await;
    heal(1, &host(2));
    until("it hears again", async || (heard_ms_ago(&nodes[1], &nodes[0]).await < 3_000).then_some(())).await;
    load.goes_on(200).await;

    say("two nodes do not hear each other, for longer than any lease");
    cut(2, &host(3));
    cut(3, &host(2));
    until("neither hears", async || {
        let (two, three) =
            (heard_ms_ago(&nodes[1], &nodes[2]).await, heard_ms_ago(&nodes[2], &nodes[1]).await);
        (two.min(three) > 8_000).then_some(())
    })
    .await;
    load.goes_on(100).await;
    heal(2, &host(3));
    heal(3, &host(2));
    load.goes_on(200).await;

    say("links come and go");
    for _ in 0..10 {
        for (from, to) in [(1, 2), (2, 3), (3, 1)] {
            cut(from, &host(to));
            load.goes_on(2).await;
            heal(from, &host(to));
        }
    }
    load.goes_on(200).await;
    let now = shared_out(&nodes[0], 3).await;
    assert!(
        now.keys().eq(before.keys()),
        "a cut between nodes costs nobody its lease: {now:?} of {before:?}"
    );

    say("the third node does not reach the store");
    cut(3, STORE);
    through.leads_to(&[&nodes[0], &nodes[1]]);
    shared_out(&nodes[0], 2).await;
    load.goes_on(200).await;
    heal(3, STORE);
    let now = shared_out(&nodes[0], 3).await;
    let fresh = now.keys().filter(|n| !before.contains_key(n)).count();
    assert_eq!(fresh, 1, "it comes back as another: {now:?} of {before:?}");
    through.leads_to(&nodes.iter().collect::<Vec<_>>());
    load.goes_on(200).await;

    say("the second node is cut off from everything");
    through.leads_to(&[&nodes[0], &nodes[2]]);
    ip("link set v2 down");
    shared_out(&nodes[0], 2).await;
    load.goes_on(200).await;
    ip("link set v2 up");
    shared_out(&nodes[0], 3).await;
    through.leads_to(&nodes.iter().collect::<Vec<_>>());
    load.goes_on(300).await;

    say("everybody ends");
    load.end(tasks).await;
    settle(&nodes[0], &key, &simulator, CUSTOMERS).await;
    let found: Value = check(&nodes[1], &key, &simulator, &load, CUSTOMERS).await;
    let held: u64 = held(&nodes[2]).await.values().sum();
    assert_eq!(held, SHARDS);
    for node in &nodes {
        assert_eq!(metric(node, "patchbay_shards_waiting_commands").await, 0.0);
    }
    say(&found.to_string());
}
