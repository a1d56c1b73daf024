//! A load of agents and customers against a running node, open loop or closed, that counts what was lost, doubled or
//! out of order.
//!
//! Open loop: every message has the instant that it was meant for, and its latency counts from there, so that a node
//! that stalls is not asked more kindly. What a bare server makes of the same messages is measured in the same run.

pub mod agent;
pub mod cpu;
pub mod customer;
pub mod floor;
pub mod report;
pub mod setup;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use patchbay_protocol::client::Encoding;
use std::sync::{Mutex, PoisonError};
use tokio::time::Instant;

pub use report::Report;
pub use setup::Target;

/// The longest latency that is told apart.
const LATENCY_MAX_US: u64 = 120_000_000;
/// What is under way when the time is over may still come, for so long.
const DRAIN: Duration = Duration::from_secs(10);

/// What is asked of a node.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Conversations of each kind: with customers who write, and with visitors to whom agents write.
    pub conversations: usize,
    /// Agents' sockets.
    pub agents: usize,
    /// What they speak, in turn.
    pub encodings: Vec<Encoding>,
    /// Customers' messages a second; 0: none.
    pub customer_rate: f64,
    /// Agents' messages a second; 0: none.
    pub agent_rate: f64,
    /// Instead: so many of each conversation's sends always in flight.
    pub in_flight: usize,
    /// For how long.
    pub time: Duration,
}

/// Latencies in microseconds.
#[derive(Clone)]
pub struct Latencies(Arc<Mutex<Histogram<u64>>>);

impl Default for Latencies {
    fn default() -> Self {
        // Bounds that fit: it cannot fail.
        let histogram = Histogram::new_with_bounds(1, LATENCY_MAX_US, 3);
        Self(Arc::new(Mutex::new(histogram.unwrap_or_else(|_| unreachable!("the bounds fit")))))
    }
}

impl Latencies {
    /// Notes one.
    pub fn note(&self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(LATENCY_MAX_US).clamp(1, LATENCY_MAX_US);
        let mut histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Within its bounds by the clamp.
        let _ = histogram.record(us);
    }

    /// How many, and the quantile `q` in milliseconds.
    pub fn read(&self, q: f64) -> (u64, f64) {
        let histogram = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (histogram.len(), histogram.value_at_quantile(q) as f64 / 1000.0)
    }

    /// The longest, in milliseconds.
    pub fn max(&self) -> f64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).max() as f64 / 1000.0
    }
}

/// What is counted while it runs.
#[derive(Default)]
pub struct Counts {
    /// Messages that were meant to be sent.
    pub meant: AtomicU64,
    /// Answered as taken.
    pub acked: AtomicU64,
    /// Answered as refused for now.
    pub refused: AtomicU64,
    /// Answered otherwise, or not at all.
    pub failed: AtomicU64,
    /// Entries that sockets saw.
    pub seen: AtomicU64,
    /// Gaps.
    pub lost: AtomicU64,
    /// Seen again.
    pub doubled: AtomicU64,
    /// Seen behind a later one.
    pub reordered: AtomicU64,
}

/// One more.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What a run shares.
#[derive(Clone, Default)]
pub struct Shared {
    /// Counts.
    pub counts: Arc<Counts>,
    /// From an agent's message to its reply.
    pub sends: Latencies,
    /// From a customer's message to the frame on an agent's socket.
    pub arrivals: Latencies,
}

/// Nanoseconds since the epoch: what messages carry to be measured by.
pub fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The instants of an open loop: one every `1 / rate`, whatever became of those before.
pub struct Ticks {
    start: Instant,
    start_ns: u64,
    rate: f64,
    n: u64,
}

impl Ticks {
    /// From now on.
    pub fn new(rate: f64) -> Self {
        Self { start: Instant::now(), start_ns: now_ns(), rate, n: 0 }
    }

    /// Waits for the next one; which, and when it was meant in nanoseconds since the epoch. Cancel-safe: one that was
    /// not waited for to its end is the next one again.
    pub async fn next(&mut self) -> (u64, u64) {
        let offset = Duration::from_secs_f64(self.n as f64 / self.rate);
        let n = self.n;
        tokio::time::sleep_until(self.start + offset).await;
        self.n += 1;
        (n, self.start_ns + u64::try_from(offset.as_nanos()).unwrap_or(0))
    }
}

/// Runs a plan against a node that was set up; `progress` is told twice a second how much of it is over.
pub async fn run(
    target: &Target,
    plan: &Plan,
    mut progress: impl FnMut(f64, &Counts),
) -> Result<Report, setup::Error> {
    let shared = Shared::default();
    let world = setup::prepare(target, plan).await?;
    let (over, watching) = tokio::sync::watch::channel(false);
    let mut agents = Vec::new();
    for n in 0..plan.agents {
        agents.push(agent::Agent::start(target, &world, plan, n, shared.clone(), watching.clone()).await?);
    }
    let cpu = cpu::Cpu::now(target.pid);
    let started = Instant::now();
    let customers = (plan.customer_rate > 0.0).then(|| {
        tokio::spawn(customer::write(
            target.clone(),
            world.clone(),
            plan.clone(),
            shared.clone(),
            watching.clone(),
        ))
    });
    while started.elapsed() < plan.time {
        progress(started.elapsed().as_secs_f64() / plan.time.as_secs_f64(), &shared.counts);
        tokio::time::sleep(Duration::from_millis(500).min(plan.time)).await;
    }
    let elapsed = started.elapsed();
    let burnt = cpu.since();
    let acked_in_time = shared.counts.acked.load(Ordering::Relaxed);
    over.send_replace(true);
    if let Some(customers) = customers {
        let _ = customers.await;
    }
    for agent in agents {
        agent.finish(DRAIN).await;
    }
    progress(1.0, &shared.counts);
    Ok(Report::new(plan, &shared, elapsed, acked_in_time, burnt))
}
