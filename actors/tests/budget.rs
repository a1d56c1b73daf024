//! The budget of store writes (docs/src/storage.md): rows written for a received message, and for a sent one with three
//! receipts, in a conversation with a message every two seconds whose receipts come within half a second; and, printed
//! beside it, what each costs alone, so far apart that it shares nothing with a neighbour.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{World, until};
use patchbay_storage::Table;
use serde_json::json;

/// Rows of a received message.
const RECEIVED_MAX: f64 = 5.0;
/// Rows of a sent message with its three receipts.
const SENT_MAX: f64 = 14.0;
const MESSAGES: u64 = 20;

fn more(before: &BTreeMap<Table, u64>, after: &BTreeMap<Table, u64>) -> BTreeMap<&'static str, u64> {
    let rows = |of: &BTreeMap<Table, u64>, table| of.get(&table).copied().unwrap_or(0);
    Table::ALL
        .into_iter()
        .map(|t| (t.name(), rows(after, t) - rows(before, t)))
        .filter(|(_, n)| *n > 0)
        .collect()
}

fn per_message(rows: &BTreeMap<&'static str, u64>) -> f64 {
    rows.values().sum::<u64>() as f64 / MESSAGES as f64
}

/// Rows per received message and per sent one: messages so far apart, receipts so far behind.
async fn measure(apart: Duration, receipts: [u64; 3]) -> [BTreeMap<&'static str, u64>; 2] {
    let world = World::new().await;
    world.writes("34600", "first").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let before = world.model.rows_written();
    for n in 0..MESSAGES {
        world.writes("34600", &format!("in.{n}")).await;
        tokio::time::sleep(apart).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let received = more(&before, &world.model.rows_written());
    tokio::time::sleep(Duration::from_secs(60)).await;

    let before = world.model.rows_written();
    for n in 0..MESSAGES {
        let seq = world.send("34600", &format!("out.{n}")).await.unwrap();
        let has = async || (!world.statuses("34600", seq).await.is_empty()).then_some(());
        until("the provider has it", has).await;
        let id = format!("wamid.{}", n + 1);
        for (status, wait) in ["sent", "delivered", "read"].into_iter().zip(receipts) {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            let at = (world.clock.now().as_millis() / 1000).to_string();
            let receipt = json!({"id": id, "status": status, "timestamp": at, "recipient_id": "34600"});
            world.receipt(receipt).await;
        }
        let read = async || world.statuses("34600", seq).await.contains(&"read".to_owned()).then_some(());
        until("it is read", read).await;
        tokio::time::sleep(apart).await;
    }
    [received, more(&before, &world.model.rows_written())]
}

#[tokio::test(start_paused = true)]
async fn a_message_costs_no_more_rows_than_its_budget() {
    let [received, sent] = measure(Duration::from_secs(2), [20, 100, 80]).await;
    let alone = measure(Duration::from_secs(15), [0, 300, 8_000]).await;
    println!(
        "received: {:.2} rows {received:?}; sent: {:.2} rows {sent:?}",
        per_message(&received),
        per_message(&sent)
    );
    println!("alone: {:.2} and {:.2} rows: {alone:?}", per_message(&alone[0]), per_message(&alone[1]));
    if let Some(file) = std::env::var_os("PATCHBAY_BUDGET_RESULT") {
        let alone = [per_message(&alone[0]), per_message(&alone[1])];
        let result = json!({"received": per_message(&received), "sent": per_message(&sent), "rows": [received, sent], "alone": alone});
        std::fs::write(file, result.to_string()).unwrap();
    }
    assert!(per_message(&received) <= RECEIVED_MAX, "{received:?}");
    assert!(per_message(&sent) <= SENT_MAX, "{sent:?}");
}
