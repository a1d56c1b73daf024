//! Durable sends through sockets, over the store's own group commit fed with the same rows in the same closed loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use patchbay_loadtest::load::report::Quantiles;
use patchbay_loadtest::load::{self, Latencies, Plan};
use patchbay_protocol::client::Encoding;
use patchbay_storage::embedded::Embedded;
use patchbay_storage::{Batch, Cell, Engine as _, RowWrite, Stamp, Table};

use crate::node::Node;
use crate::results::{Goal, Results};

const CONVERSATIONS: usize = 64;
const IN_FLIGHT: usize = 16;
/// A send on a web chat is the message and its first status: two rows of one append, of about these sizes.
const ROWS: [usize; 2] = [330, 300];
/// Half of what the store's own group commit does on the known machine with 1,024 in flight.
const BASELINE_MIN: f64 = 20_000.0;

/// Acks a second and latencies of the store alone.
async fn store(time: Duration) -> (f64, Quantiles) {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(Embedded::open(&dir.path().join("data")).unwrap());
    let (acks, latencies, started) = (Arc::new(AtomicU64::new(0)), Latencies::default(), Instant::now());
    let mut tasks = Vec::new();
    for slot in 0..CONVERSATIONS * IN_FLIGHT {
        let (engine, acks, latencies) = (engine.clone(), acks.clone(), latencies.clone());
        tasks.push(tokio::spawn(async move {
            let partition = Bytes::from(format!("{:024}", slot / IN_FLIGHT));
            let mut n: u64 = 0;
            while started.elapsed() < time {
                let rows = ROWS.iter().enumerate().map(|(i, bytes)| RowWrite {
                    clustering: Bytes::copy_from_slice(
                        &(((slot as u64) << 40) | (n * 2 + i as u64)).to_be_bytes(),
                    ),
                    stamp: Stamp::new(1, 1),
                    cell: Cell::Put(Bytes::from(vec![b'x'; *bytes])),
                });
                let batch = Batch {
                    shard: 0,
                    table: Table::Entries,
                    partition: partition.clone(),
                    rows: rows.collect(),
                };
                let sent = Instant::now();
                engine.write(batch).await.unwrap();
                latencies.note(sent.elapsed());
                acks.fetch_add(1, Ordering::Relaxed);
                n += 1;
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    (acks.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64(), Quantiles::of(&latencies))
}

pub async fn run(results: &mut Results) {
    let time = Duration::from_secs(if results.quick { 4 } else { 15 });
    // The machine is not the same from one minute to the next: the baseline is run before and after.
    let before = store(time).await;
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &[]).await;
    let plan = Plan {
        conversations: CONVERSATIONS,
        agents: 4,
        encodings: vec![Encoding::Protobuf],
        customer_rate: 0.0,
        agent_rate: 0.0,
        in_flight: IN_FLIGHT,
        time,
    };
    let report = load::run(&node.target, &plan, |_, _| {}).await.unwrap();
    assert!(report.is_clean(), "{report}");
    node.stop().await;
    let after = store(time).await;
    let store_rate = f64::midpoint(before.0, after.0);
    let store_p99 = f64::midpoint(before.1.p99_ms, after.1.p99_ms);
    let conditions = format!(
        "{CONVERSATIONS} conversations x {IN_FLIGHT} in flight on 4 sockets (webchat, Protobuf), {} s; node {:.0}/s p99 {:.1} ms, store alone {:.0}/s before and {:.0}/s after, p99 {:.1} and {:.1} ms; every pushed entry checked; CPU node {:.1} s, load {:.1} s, others {:.1} s",
        time.as_secs(),
        report.acked_per_second,
        report.sends.p99_ms,
        before.0,
        after.0,
        before.1.p99_ms,
        after.1.p99_ms,
        report.cpu_node_s,
        report.cpu_own_s,
        report.cpu_others_s
    );
    let void = (store_rate < BASELINE_MIN).then_some("the store alone is under half of what is known");
    let ratio = report.acked_per_second / store_rate;
    results.note("durable_send_throughput_ratio", ratio, "ratio", Goal::AtLeast(0.5), &conditions, void);
    let ratio = report.sends.p99_ms / store_p99;
    results.note("durable_send_p99_ratio", ratio, "ratio", Goal::AtMost(2.5), &conditions, void);
}
