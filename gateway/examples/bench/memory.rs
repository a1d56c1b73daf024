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
    let node = Node::start(dir.path(), &[("PATCHBAY__LIMITS__IDLE_AFTER", "1h")]).await;
    node.tenant("mem").await;
    node.customers_write("mem", 0, 2_000).await;
    let before = settled(&node).await;
    node.customers_write("mem", 2_000, 2_000 + count).await;
    let after = settled(&node).await;
    node.stop().await;
    let each = after.saturating_sub(before) as f64 / count as f64;
    let conditions = format!(
        "{count} conversations of one message, active and idle; RSS {} -> {} MiB",
        before >> 20,
        after >> 20
    );
    results.note("idle_conversation_bytes", each, "bytes", Goal::AtMost(12_288.0), &conditions, None);

    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &[("PATCHBAY__LIMITS__IDLE_AFTER", "2s")]).await;
    node.tenant("mem").await;
    node.customers_write("mem", 0, count).await;
    let one = settled(&node).await;
    node.customers_write("mem", count, 2 * count).await;
    let two = settled(&node).await;
    node.stop().await;
    let each = two.saturating_sub(one) as f64 / count as f64;
    let conditions = format!(
        "{count} more conversations that were forgotten; what is left is the inbox's list and the store's caches; RSS {} -> {} MiB",
        one >> 20,
        two >> 20
    );
    results.note(
        "idle_conversation_bytes[passivated]",
        each,
        "bytes",
        Goal::AtMost(12_288.0),
        &conditions,
        None,
    );
}

pub async fn sockets(results: &mut Results) {
    let count: usize = if results.quick { 1_000 } else { 5_000 };
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &[]).await;
    let key = node.tenant("mem").await;
    node.customers_write("mem", 0, 1).await;
    let id = ConversationId::derive(&"mem".parse().unwrap(), &"wa".parse().unwrap(), "34600000000");
    for agent in 0..count.div_ceil(100) {
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
            node.api(&key, "POST", &format!("/agents/a{}/tokens", n % count.div_ceil(100)), json!({})).await;
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
