//! `./x bench`: benchmarks as ratios against a baseline of the same run.
//!
//! One so far: `durable_send_throughput_ratio`, notes acked through the actors over the store's own group commit fed
//! with rows of the same size in the same closed loop.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use patchbay_actors::clock::Clock;
use patchbay_actors::desk::{Desk, Who};
use patchbay_actors::directory::{Account, Inbox, Settings};
use patchbay_actors::node::{Node, NodeConfig};
use patchbay_actors::ports::{Provider, Publisher};
use patchbay_protocol::command::{AddNote, Request, SendMessage};
use patchbay_protocol::outbound::{Call, CallResult};
use patchbay_protocol::{AgentId, Content, ConversationId, InboxId, TenantId};
use patchbay_storage::embedded::Embedded;
use patchbay_storage::{Batch, Engine, Stamp, Table};
use serde_json::json;

const CONVERSATIONS: usize = 64;
const IN_FLIGHT: usize = 16;
const ROW_BYTES: usize = 300;

struct Nobody;

impl Publisher for Nobody {
    fn entries(&self, _: ConversationId, _: &[(u64, Bytes)]) {}
    fn inbox(&self, _: &TenantId, _: &InboxId, _: Bytes) {}
    fn agent(&self, _: &TenantId, _: &AgentId, _: Bytes) {}
}

#[async_trait]
impl Provider for Nobody {
    async fn call(&self, _: &Account, _: Call) -> CallResult {
        CallResult::Answered {
            status: 200,
            retry_after: None,
            body: Bytes::from_static(br#"{"messages":[{"id":"w"}]}"#),
        }
    }
}

/// Acks a second of `CONVERSATIONS` x `IN_FLIGHT` closed loops over `run`.
async fn rate<F: Future<Output = ()> + Send>(
    run: Duration,
    one: impl Fn(usize, u64) -> F + Send + Sync + 'static,
) -> f64 {
    let (one, acks, started) = (Arc::new(one), Arc::new(AtomicU64::new(0)), Instant::now());
    let mut tasks = Vec::new();
    for slot in 0..CONVERSATIONS * IN_FLIGHT {
        let (one, acks) = (one.clone(), acks.clone());
        tasks.push(tokio::spawn(async move {
            let mut n = 0;
            while started.elapsed() < run {
                one(slot, n).await;
                n += 1;
                acks.fetch_add(1, Ordering::Relaxed);
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    acks.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64()
}

async fn baseline(run: Duration) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Embedded::open(&dir.path().join("data")).unwrap());
    rate(run, move |slot, n| {
        let engine = engine.clone();
        async move {
            let partition = Bytes::from(format!("{:016}", slot / IN_FLIGHT));
            let clustering = Bytes::from(format!("{slot}.{n}"));
            let value = Bytes::from(vec![b'x'; ROW_BYTES]);
            engine
                .write(Batch::put(0, Table::Entries, partition, clustering, Stamp::new(1, 1), value))
                .await
                .unwrap();
        }
    })
    .await
}

async fn notes(run: Duration) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Embedded::open(&dir.path().join("data")).unwrap());
    let config = NodeConfig::new(engine, Clock::System, Arc::new(Nobody), Arc::new(Nobody));
    let node = Node::start(config).await.unwrap();
    let tenant: TenantId = "t".parse().unwrap();
    let directory = node.directory();
    directory.put_inbox(&tenant, &"main".parse().unwrap(), &Inbox { name: "M".into() }).await.unwrap();
    let account = Account {
        connector: "whatsapp".into(),
        inbox: "main".parse().unwrap(),
        name: String::new(),
        external_id: "1".into(),
        credentials: json!({}),
        settings: Settings::default(),
    };
    directory.put_account(&tenant, &"wa".parse().unwrap(), &account).await.unwrap();
    let desk = Desk::new(node.clone());
    let mut ids = Vec::new();
    for n in 0..CONVERSATIONS {
        let content = Content::Template { name: "t".into(), language: "en".into(), components: json!([]) };
        let message = SendMessage { client_id: "1".into(), content, reply_to: None, if_seq: None };
        ids.push(
            desk.send_to(&tenant, &"wa".parse().unwrap(), &format!("3460000{n:04}"), message)
                .await
                .unwrap()
                .0,
        );
    }
    let text = "x".repeat(ROW_BYTES - 180);
    rate(run, move |slot, n| {
        let (desk, id, who, text) =
            (desk.clone(), ids[slot / IN_FLIGHT], Who::Api(tenant.clone()), text.clone());
        async move {
            let note = AddNote { client_id: format!("{slot}.{n}"), text };
            desk.submit(&who, id, Request::Note(note)).await.unwrap().wait().await.unwrap();
        }
    })
    .await
}

#[tokio::main]
async fn main() {
    let quick = std::env::args().any(|a| a == "--quick");
    let run = Duration::from_secs(if quick { 3 } else { 10 });
    eprintln!(
        "durable_send_throughput_ratio: {CONVERSATIONS} conversations x {IN_FLIGHT} in flight, {ROW_BYTES} B rows"
    );
    let store = baseline(run).await;
    let actors = notes(run).await;
    let ratio = actors / store;
    println!("{:<36} {:>10} {:>12} {:>8}", "name", "value", "goal", "holds");
    println!("{:<36} {ratio:>10.2} {:>12} {:>8}", "durable_send_throughput_ratio", ">= 0.5", ratio >= 0.5);
    println!("   store alone {store:.0}/s, through the actors {actors:.0}/s");
    let conditions = format!(
        "{CONVERSATIONS}x{IN_FLIGHT} closed loops, {ROW_BYTES} B, notes through the actors without sockets; store alone {store:.0}/s"
    );
    let results = json!([{"name": "durable_send_throughput_ratio", "value": ratio, "unit": "ratio", "goal": ">= 0.5", "holds": ratio >= 0.5, "conditions": conditions}]);
    std::fs::create_dir_all("target/bench").unwrap();
    std::fs::write("target/bench/results.json", results.to_string()).unwrap();
}
