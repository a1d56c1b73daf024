//! Many conversations touched at random under a bound of memory that all of them together are far past.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::Rng as _;

use crate::node::Node;
use crate::results::{Goal, Results};

/// What the node may hold; with everybody in memory it would hold several times as much.
const BOUND_MIB: u64 = 768;

pub async fn run(results: &mut Results) {
    let count = if results.quick { 50_000 } else { 200_000 };
    let time = Duration::from_secs(if results.quick { 10 } else { 60 });
    let dir = tempfile::tempdir().unwrap();
    let bound = format!("{BOUND_MIB}MiB");
    let env = [("PATCHBAY__LIMITS__MEMORY", bound.as_str()), ("PATCHBAY__LIMITS__IDLE_AFTER", "1h")];
    let node = Arc::new(Node::start(dir.path(), &env).await);
    node.tenant("soak").await;
    let (stop, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let watch = tokio::spawn({
        let (node, stop, most) = (node.clone(), stop.clone(), most.clone());
        async move {
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(node.rss(), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });
    node.customers_write("soak", 0, count).await;
    let (started, mut touched) = (Instant::now(), 0);
    let refused_before = node.refused.load(Ordering::Relaxed);
    while started.elapsed() < time {
        let some: Vec<usize> = (0..1600).map(|_| rand::rng().random_range(0..count)).collect();
        touched += some.len();
        node.write_again("soak", &some, touched).await;
    }
    let rate = touched as f64 / started.elapsed().as_secs_f64();
    let refused = node.refused.load(Ordering::Relaxed) - refused_before;
    stop.store(true, Ordering::Relaxed);
    watch.await.unwrap();
    let most = most.load(Ordering::Relaxed);
    Arc::into_inner(node).unwrap().stop().await;
    let conditions = format!(
        "{count} conversations, then {touched} messages to random ones ({rate:.0}/s) with limits.memory = {BOUND_MIB} MiB; the most that was resident: {} MiB; bodies told to come again: {refused}",
        most >> 20
    );
    let ratio = most as f64 / (BOUND_MIB << 20) as f64;
    results.note("soak_memory_ratio", ratio, "ratio", Goal::AtMost(1.1), &conditions, None);
}
