//! Signed webhook in, frame on the agent's socket out, at a steady rate, over a bare handler that checks the signature,
//! appends the body with the same group commit and writes one frame.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use patchbay_loadtest::load::report::Quantiles;
use patchbay_loadtest::load::{self, Plan, floor};
use patchbay_protocol::client::Encoding;
use patchbay_storage::embedded::Embedded;
use patchbay_storage::{Batch, Engine as _, Stamp, Table};

use crate::node::Node;
use crate::results::{Goal, Results};

const RATE: f64 = 1000.0;

pub async fn run(results: &mut Results) {
    let time = Duration::from_secs(if results.quick { 5 } else { 20 });
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Embedded::open(&dir.path().join("floor")).unwrap());
    let next = Arc::new(AtomicU64::new(0));
    let keep = move |body: Bytes| {
        let (engine, n) = (engine.clone(), next.fetch_add(1, Ordering::Relaxed));
        async move {
            let clustering = Bytes::copy_from_slice(&n.to_be_bytes());
            let row = Batch::put(
                0,
                Table::Entries,
                Bytes::from_static(b"floor"),
                clustering,
                Stamp::new(1, 1),
                body,
            );
            engine.write(row).await.unwrap();
        }
    };
    let bare = Quantiles::of(&floor::measure(RATE, time, keep).await.unwrap());
    let node = Node::start(dir.path(), &[]).await;
    let plan = Plan {
        conversations: 64,
        agents: 4,
        encodings: vec![Encoding::Protobuf],
        customer_rate: RATE,
        agent_rate: 0.0,
        in_flight: 0,
        time,
    };
    let report = load::run(&node.target, &plan, |_, _| {}).await.unwrap();
    assert!(report.is_clean(), "{report}");
    node.stop().await;
    let own = report.arrivals;
    let conditions = format!(
        "{RATE} webhooks/s to 64 conversations, 4 agents' sockets, {} s; node p50 {:.2} p99 {:.2} ms, bare handler with the same group commit p50 {:.2} p99 {:.2} ms; CPU node {:.1} s, load {:.1} s, others {:.1} s",
        time.as_secs(),
        own.p50_ms,
        own.p99_ms,
        bare.p50_ms,
        bare.p99_ms,
        report.cpu_node_s,
        report.cpu_own_s,
        report.cpu_others_s
    );
    let void =
        ((bare.count as f64) < RATE * time.as_secs_f64() / 2.0).then_some("the bare handler did not keep up");
    results.note(
        "webhook_to_socket_p50_ratio",
        own.p50_ms / bare.p50_ms,
        "ratio",
        Goal::AtMost(2.0),
        &conditions,
        void,
    );
    results.note(
        "webhook_to_socket_p99_ratio",
        own.p99_ms / bare.p99_ms,
        "ratio",
        Goal::AtMost(2.0),
        &conditions,
        void,
    );
}
