//! What an idle conversation and an idle socket cost the real binary, by its resident memory.

use std::time::Duration;

use patchbay_loadtest::load::agent::Client;
use patchbay_protocol::ConversationId;
use patchbay_protocol::client::Encoding;
use serde_json::json;

use crate::node::Node;
use crate::results::{Goal, Results};

/// Waits until memory stands still.
async fn settled(node: &Node) -> u64 {
    let mut last = node.rss();
    let mut still = 0;
    while still < 4 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = node.rss();
        still = if now.abs_diff(last) < 512 * 1024 { still + 1 } else { 0 };
        last = now;
    }
    last
}

pub async fn conversations(results: &mut Results) {
    let count: usize = if results.quick { 10_000 } else { 50_000 };
    let dir = tempfile::tempdir().unwrap();
    let idle_after = [("PATCHBAY__LIMITS__IDLE_AFTER", "1h")];
    let node = Node::start(dir.path(), &idle_after).await;
    let key = node.tenant("mem").await;
    node.customers_write("mem", 0, WARM).await;
    let before = settled(&node).await;
    node.customers_write("mem", WARM, WARM + count).await;
    let after = settled(&node).await;
    node.stop().await;
    let written = after.saturating_sub(before) as f64 / count as f64;

    // Each is asked for once: what is held beside the store's buffers of what was written just now.
    let node = Node::start(dir.path(), &idle_after).await;
    ask(&node, &key, 0..WARM).await;
    let before = settled(&node).await;
    ask(&node, &key, WARM..WARM + count).await;
    let after = settled(&node).await;
    node.stop().await;
    let each = after.saturating_sub(before) as f64 / count as f64;
    let conditions = format!(
        "{count} conversations of one message, active and idle, each asked for after a start; RSS {} -> {} MiB",
        before >> 20,
        after >> 20
    );
    results.note("idle_conversation_bytes", each, "bytes", Goal::AtMost(12_288.0), &conditions, None);
    let conditions = format!(
        "{count} conversations written just now: with them the store's write buffers, which are bounded"
    );
    results.note(
        "idle_conversation_bytes[written]",
        written,
        "bytes",
        Goal::AtMost(24_576.0),
        &conditions,
        None,
    );

    let node = Node::start(dir.path(), &[("PATCHBAY__LIMITS__IDLE_AFTER", "1s")]).await;
    ask(&node, &key, 0..WARM).await;
    let before = settled(&node).await;
    ask(&node, &key, WARM..WARM + count).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let after = settled(&node).await;
    node.stop().await;
    let each = after.saturating_sub(before) as f64 / count as f64;
    let conditions = format!(
        "the same, forgotten after a second: the store's cache and what the allocator keeps; RSS {} -> {} MiB",
        before >> 20,
        after >> 20
    );
    results.note(
        "idle_conversation_bytes[passivated]",
        each,
        "bytes",
        Goal::AtMost(4096.0),
        &conditions,
        None,
    );
}

/// What all share is there before anything is measured.
const WARM: usize = 2_000;

async fn ask(node: &Node, key: &str, customers: std::ops::Range<usize>) {
    let customers: Vec<usize> = customers.collect();
    for some in customers.chunks(64) {
        let asked = some.iter().map(|n| async move {
            let id = ConversationId::derive(
                &"mem".parse().unwrap(),
                &"wa".parse().unwrap(),
                &format!("3460{n:07}"),
            );
            node.api(key, "GET", &format!("/conversations/{id}"), json!({})).await
        });
        futures_util::future::join_all(asked).await;
    }
}

pub async fn sockets(results: &mut Results) {
    let count: usize = if results.quick { 1_000 } else { 5_000 };
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &[]).await;
    let key = node.tenant("mem").await;
    node.customers_write("mem", 0, 1).await;
    let id = ConversationId::derive(&"mem".parse().unwrap(), &"wa".parse().unwrap(), "34600000000");
    for agent in 0..count.div_ceil(50) {
        node.api(
            &key,
            "PUT",
            &format!("/agents/a{agent}"),
            json!({"name": "A", "role": "admin", "inboxes": []}),
        )
        .await;
    }
    let mut open = Vec::with_capacity(count + 200);
    let mut before = 0;
    for n in 0..count + 200 {
        if n == 200 {
            // The first ones bring what all share.
            before = settled(&node).await;
        }
        let token =
            node.api(&key, "POST", &format!("/agents/a{}/tokens", n % count.div_ceil(50)), json!({})).await;
        let mut client =
            Client::connect(&node.target.public, token["token"].as_str().unwrap(), Encoding::Protobuf)
                .await
                .unwrap();
        client.subscribe(id).await.unwrap();
        open.push(client);
    }
    let after = settled(&node).await;
    let each = after.saturating_sub(before) as f64 / count as f64;
    drop(open);
    node.stop().await;
    let conditions = format!(
        "{count} authenticated sockets (Protobuf), each subscribed to one conversation, idle; RSS {} -> {} MiB",
        before >> 20,
        after >> 20
    );
    results.note("idle_websocket_bytes", each, "bytes", Goal::AtMost(8192.0), &conditions, None);
}
