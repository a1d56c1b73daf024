//! Starts with many stored conversations, and the first word to one that was forgotten.

use std::time::{Duration, Instant};

use patchbay_protocol::ConversationId;
use serde_json::json;

use crate::node::Node;
use crate::results::{Goal, Results};

const ENTRIES: usize = 10_000;

async fn active(node: &Node) -> u64 {
    let text = node.metrics().await;
    let line = text.lines().find(|l| l.starts_with("patchbay_actors_active ")).unwrap_or("x 1");
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

pub async fn run(results: &mut Results) {
    let count = if results.quick { 20_000 } else { 100_000 };
    let dir = tempfile::tempdir().unwrap();
    let env = [("PATCHBAY__LIMITS__IDLE_AFTER", "2s")];
    let node = Node::start(dir.path(), &env).await;
    node.tenant("cold").await;
    node.customers_write("cold", 0, count).await;
    node.stop().await;
    let mut starts = Vec::new();
    for _ in 0..3 {
        let node = Node::start(dir.path(), &env).await;
        starts.push(node.ready_after.as_secs_f64());
        node.stop().await;
    }
    starts.sort_by(f64::total_cmp);
    let conditions = format!("{count} stored conversations, after SIGTERM; the median of {starts:.2?}");
    results.note("cold_start_seconds", starts[1], "s", Goal::AtMost(2.0), &conditions, None);
    conversation(results).await;
}

async fn conversation(results: &mut Results) {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &[("PATCHBAY__LIMITS__IDLE_AFTER", "1s")]).await;
    let key = node.tenant("cold").await;
    node.customers_write("cold", 0, 1).await;
    let id = ConversationId::derive(&"cold".parse().unwrap(), &"wa".parse().unwrap(), "34600000000");
    for n in (0..ENTRIES).step_by(50) {
        let notes = (n..n + 50).map(|n| {
            let note = json!({"client_id": n.to_string(), "text": "a note of an ordinary length"});
            let (node, key) = (&node, &key);
            async move { node.api(key, "POST", &format!("/conversations/{id}/notes"), note).await }
        });
        futures_util::future::join_all(notes).await;
    }
    let ask = async || {
        let started = Instant::now();
        node.api(&key, "GET", &format!("/conversations/{id}"), json!({})).await;
        started.elapsed().as_secs_f64() * 1000.0
    };
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for _ in 0..if results.quick { 3 } else { 9 } {
        while active(&node).await > 0 {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        cold.push(ask().await);
        for _ in 0..9 {
            warm.push(ask().await);
        }
    }
    node.stop().await;
    cold.sort_by(f64::total_cmp);
    warm.sort_by(f64::total_cmp);
    let (cold, warm) = (cold[cold.len() / 2], warm[warm.len() / 2]);
    let conditions = format!(
        "a passivated conversation of {ENTRIES} entries, by the admin API; medians: cold {cold:.2} ms, warm {warm:.2} ms"
    );
    results.note(
        "cold_conversation_extra_ms",
        (cold - warm).max(0.0),
        "ms",
        Goal::AtMost(5.0),
        &conditions,
        None,
    );
}
