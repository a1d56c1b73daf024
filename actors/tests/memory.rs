//! What an active, idle conversation holds, to the byte.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{World, body, id};
use patchbay_actors::desk::Who;
use serde_json::{Value, json};

const CONVERSATIONS: usize = 2_000;
/// What one may hold: the goal for its resident memory, less what the allocator and maps round up.
const BYTES_MAX: i64 = 9_216;

async fn active(w: &World, wanted: usize) {
    while w.node.active_count() != wanted {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn an_idle_conversation_holds_little() {
    // One thread, so that everything is allocated where it is counted.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let customers: Vec<String> = (0..CONVERSATIONS).map(|n| format!("34600{n:06}")).collect();
    let forget = async |w: &World| {
        while w.node.active_count() > 0 {
            w.node.passivate_idle(Duration::ZERO);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let ask = async |w: &World| {
        for from in &customers {
            w.desk.summary(&Who::Api(common::tenant()), id(from)).await.unwrap();
        }
        active(w, CONVERSATIONS).await;
    };
    let w = runtime.block_on(async {
        let w = World::new().await;
        for some in customers.chunks(100) {
            let items: Vec<Value> = some
                .iter()
                .map(|from| json!({"from": from, "id": format!("w.{from}"), "timestamp": "1763715600", "type": "text", "text": {"body": "hola, a message of an ordinary length"}}))
                .collect();
            w.webhook(&body(&items, &[])).await;
        }
        // Once for what all share.
        forget(&w).await;
        ask(&w).await;
        forget(&w).await;
        w
    });
    // What was forgotten may be freed a little later, within what is counted: the round that held most counts.
    let rounds = (0..3).map(|_| {
        let counted = allocation_counter::measure(|| runtime.block_on(ask(&w)));
        runtime.block_on(forget(&w));
        counted.bytes_current / CONVERSATIONS as i64
    });
    let each = rounds.max().unwrap_or_default();
    println!("{each} bytes each");
    assert!((1..=BYTES_MAX).contains(&each), "{each} bytes");
}
