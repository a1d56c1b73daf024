//! Events as others read them: by Kafka's own client in Python against the published schema, by `events tail`, by
//! `consume print`; and `events replay`, which publishes the store again.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::faults::{metric, readyz};
use common::servers;
use common::{Node, conversation, text_item, until, webhook_body};
use serde_json::{Value, json};
use tokio::process::Command;

const NUMBER: &str = "1001";

fn schema() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src/generated/event.schema.json")
}

/// A conversation with every kind of entry that the API can make; the events that there are.
async fn traffic(node: &Node, key: &str) -> usize {
    let text = |from: &str, id: &str| webhook_body(NUMBER, &[text_item(from, id, "hola")], &[]);
    for n in 0..10 {
        assert_eq!(node.webhook("acme", "wa", &text(&format!("3461000000{n}"), &format!("a{n}"))).await, 200);
    }
    let id = conversation("acme", "wa", "34610000001");
    let image = json!({"from": "34610000001", "id": "i", "timestamp": "1", "type": "image", "image": {"id": "m", "mime_type": "image/png"}});
    let place = json!({"from": "34610000001", "id": "l", "timestamp": "1", "type": "location", "location": {"latitude": 1.5, "longitude": 2}});
    let reaction = json!({"from": "34610000001", "id": "r", "timestamp": "1", "type": "reaction", "reaction": {"message_id": "a1", "emoji": "👍"}});
    let strange = json!({"from": "34610000001", "id": "s", "timestamp": "1", "type": "hologram"});
    assert_eq!(
        node.webhook("acme", "wa", &webhook_body(NUMBER, &[image, place, reaction, strange], &[])).await,
        200
    );
    let calls = [
        ("messages", json!({"client_id": "c1", "content": {"type": "text", "text": "buenas"}})),
        ("notes", json!({"client_id": "n1", "text": "VIP"})),
        ("assign", json!({"agent": "anna"})),
        ("tags", json!({"add": ["vip"], "remove": []})),
        ("read", json!({"up_to_seq": 2})),
        ("snooze", json!({"until": "2030-01-01T00:00:00Z"})),
        ("reopen", json!({})),
        ("pending", json!({})),
        ("resolve", json!({})),
    ];
    for (call, body) in calls {
        let (status, answer) =
            node.api(key, "POST", &format!("/conversations/{id}/{call}"), Some(body)).await;
        assert_eq!(status, 200, "{call}: {answer}");
    }
    assert_eq!(node.webhook("acme", "wa", &text("34610000001", "again")).await, 200);
    // The provider is away, so the send stays as it is; the file cannot be had.
    let mut events = 0;
    for n in 0..10 {
        events += node.entries(key, conversation("acme", "wa", &format!("3461000000{n}"))).await.len();
    }
    events
}

fn patchbay(dir: &Path, env: &[(String, String)], args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patchbay"));
    command.args(args).arg("--data-dir").arg(dir.join("data")).envs(env.iter().cloned()).kill_on_drop(true);
    command
}

async fn run(mut command: Command) -> String {
    let done = tokio::time::timeout(Duration::from_secs(60), command.stderr(Stdio::piped()).output()).await;
    let done = done.expect("it did not end").unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

async fn published(node: &Node, events: usize) {
    until("published", async || {
        (metric(node, "patchbay_outbox_published_total").await >= events as f64).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_hold_what_the_contract_says_in_other_languages_too() {
    if servers::quick() {
        return;
    }
    let sdk =
        std::env::var_os("PATCHBAY_SDK").expect("PATCHBAY_SDK does not say where the SDKs are: run ./x test");
    let dir = tempfile::tempdir().unwrap();
    let mut env = common::real_engines(dir.path());
    // The store of this directory: it must be readable when the node has stopped.
    env.push(("PATCHBAY__STORAGE__ENGINE".into(), "embedded".into()));
    let borrowed: Vec<(&str, &str)> = env.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let mut node = Node::start_with(dir.path(), &borrowed).await;
    until("ready", async || (readyz(&node).await.0 == 200).then_some(())).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let events = traffic(&node, &key).await;
    published(&node, events).await;
    let topic = env.iter().find(|(n, _)| n == "PATCHBAY__EVENTS__KAFKA__TOPIC").unwrap().1.clone();
    let python = async |topic: &str| {
        let mut python = Command::new(PathBuf::from(&sdk).join("py/bin/python"));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/events.py");
        python.arg(script).args([&servers::kafka(), topic]).arg(schema()).arg(events.to_string());
        let kinds: Vec<String> = serde_json::from_str(run(python).await.trim()).unwrap();
        assert!(kinds.len() >= 10, "{kinds:?}");
    };
    python(&topic).await;

    let tail =
        run(patchbay(dir.path(), &env, &["events", "tail", "--from-start", "--json", "--count", "5"])).await;
    let lines: Vec<Value> = tail.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 5);
    assert!(lines.iter().all(|l| l["headers"]["ce_tenant"].is_string() && l["value"]["seq"].is_u64()));

    // The store, published again into a topic of another shape.
    node.terminate().await;
    let again = servers::fresh("again");
    env.push(("PATCHBAY__EVENTS__KAFKA__PARTITIONS".into(), "7".into()));
    let replay = ["events", "replay", "--from", "start", "--topic", &again, "--json"];
    let told: Value = serde_json::from_str(&run(patchbay(dir.path(), &env, &replay)).await).unwrap();
    assert!(told["events"].as_u64().unwrap() >= events as u64, "{told}");
    python(&again).await;
    let one = conversation("acme", "wa", "34610000001").to_string();
    let other = servers::fresh("one");
    let replay = [
        "events",
        "replay",
        "--from",
        "2020-01-01T00:00:00Z",
        "--conversation",
        &one,
        "--topic",
        &other,
        "--json",
    ];
    let told: Value = serde_json::from_str(&run(patchbay(dir.path(), &env, &replay)).await).unwrap();
    assert_eq!(told["conversations"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_runs_on_the_nodes_own_events_alike_and_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let env: Vec<(String, String)> = [("STORAGE__ENGINE", "embedded"), ("EVENTS__ENGINE", "embedded")]
        .map(|(n, v)| (format!("PATCHBAY__{n}"), v.to_owned()))
        .into();
    let borrowed: Vec<(&str, &str)> = env.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    if servers::quick() {
        return;
    }
    let node = Node::start_with(dir.path(), &borrowed).await;
    let key = node.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let events = traffic(&node, &key).await;
    published(&node, events).await;
    let dead = dir.path().join("dead");
    let consume = async |wanted: usize| {
        let args = ["consume", "print", "--group", "audit", "--dead-letters", dead.to_str().unwrap()];
        let mut child = patchbay(dir.path(), &env, &args).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines =
            tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().unwrap()));
        let mut read = Vec::new();
        while read.len() < wanted {
            let line =
                tokio::time::timeout(Duration::from_secs(20), lines.next_line()).await.unwrap().unwrap();
            let value: Value = serde_json::from_str(&line.unwrap()).unwrap();
            if value["account"] == "wa" && value["conversation"].is_string() {
                read.push(value);
            }
        }
        let pid = child.id().unwrap().to_string();
        std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(child.wait().await.unwrap().success());
        read
    };
    let read = consume(events).await;
    let mut last = std::collections::HashMap::new();
    for event in &read {
        let before =
            last.insert(event["conversation"].to_string(), event["seq"].as_u64().unwrap()).unwrap_or(0);
        assert_eq!(event["seq"], before + 1);
    }
    let body = webhook_body(NUMBER, &[text_item("34610000009", "later", "hola")], &[]);
    assert_eq!(node.webhook("acme", "wa", &body).await, 200);
    let later = consume(1).await;
    assert_eq!(later[0]["data"]["provider_id"], "later", "behind its place");
    assert_eq!(std::fs::read(&dead).unwrap(), b"");
}
