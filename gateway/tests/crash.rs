//! The real binary killed with SIGKILL under load, again and again; then the log, the simulator's record and what the
//! sockets saw are compared (`common/history.rs`).
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use common::Node;
use common::history::{ACCOUNTS, CUSTOMERS_PER_ACCOUNT, Load, check, faults, point, prepare, settle};
use patchbay_loadtest::simulator::Simulator;
use tokio::sync::watch;

/// How often, unless `PATCHBAY_CRASH_KILLS` says otherwise (`./x bench`).
const KILLS: usize = 20;

fn kills() -> usize {
    std::env::var("PATCHBAY_CRASH_KILLS").map_or(KILLS, |n| n.parse().unwrap())
}
/// What must be in flight at the moment of a kill.
const SENDS: usize = 32;
const WEBHOOKS: usize = 8;
const CALLS: u64 = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_again_and_again_under_load() {
    common::install_crypto();
    let dir = tempfile::tempdir().unwrap();
    let simulator = Simulator::start("127.0.0.1:0".parse().unwrap(), 7, faults()).await.unwrap();
    let base = format!("http://{}", simulator.address());
    let env = [("PATCHBAY__PROVIDERS__TIMEOUT", "1500ms"), ("PATCHBAY__LOG__LEVEL", "warn")];
    let mut node = Node::start_with(dir.path(), &env).await;
    let key = prepare(&node, &base).await;
    let token = node.token(&key, "anna", 3600).await;
    let (public, watching) = watch::channel(Some(node.public().to_owned()));
    point(&simulator, node.public());
    let all = ACCOUNTS * CUSTOMERS_PER_ACCOUNT;
    let (load, tasks) = Load::start(watching, token, all);
    for kill in 1..=kills() {
        // Load first, then a moment at which enough is in flight; each kill comes a little later than the last.
        tokio::time::sleep(Duration::from_millis(400 + 37 * (kill % 21) as u64)).await;
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        load.burst.store(true, Ordering::Relaxed);
        let (sends, webhooks, calls) = loop {
            let now = (
                load.sends.load(Ordering::Relaxed),
                load.webhooks.load(Ordering::Relaxed),
                simulator.record_open_calls(),
            );
            if now.0 >= SENDS && now.1 >= WEBHOOKS && now.2 >= CALLS {
                break now;
            }
            assert!(tokio::time::Instant::now() < deadline, "never enough in flight: {now:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        node.kill().await;
        load.burst.store(false, Ordering::Relaxed);
        public.send_replace(None);
        println!("kill {kill}: {sends} sends, {webhooks} webhooks, {calls} provider calls in flight");
        node = Node::start_with(dir.path(), &env).await;
        point(&simulator, node.public());
        public.send_replace(Some(node.public().to_owned()));
    }
    load.end(tasks).await;
    settle(&node, &key, &simulator, all).await;
    let mut result = check(&node, &key, &simulator, &load, all).await;
    // What gets so far has lost and doubled nothing: each of the checks above ends the test.
    if let Some(file) = std::env::var_os("PATCHBAY_CRASH_RESULT") {
        result["kills"] = kills().into();
        std::fs::write(file, result.to_string()).unwrap();
    }
}
