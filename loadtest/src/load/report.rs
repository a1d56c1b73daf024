//! What came of a run: a table for people, one line of JSON for scripts.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Serialize;

use super::cpu::Burnt;
use super::{Latencies, Plan, Shared};

/// Quantiles of a latency, in milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Quantiles {
    /// How many were measured.
    pub count: u64,
    /// Half are faster.
    pub p50_ms: f64,
    /// Nine in ten are faster.
    pub p90_ms: f64,
    /// All but one in a hundred are faster.
    pub p99_ms: f64,
    /// All but one in a thousand are faster.
    pub p999_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

impl Quantiles {
    /// Of what was measured.
    pub fn of(latencies: &Latencies) -> Self {
        let at = |q| latencies.read(q).1;
        Self {
            count: latencies.read(0.5).0,
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            max_ms: latencies.max(),
        }
    }
}

/// What came of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// For how long it ran.
    pub seconds: f64,
    /// Conversations of each kind.
    pub conversations: usize,
    /// Agents' sockets.
    pub agents: usize,
    /// Messages that were meant to be sent.
    pub meant: u64,
    /// Taken.
    pub acked: u64,
    /// Taken, a second.
    pub acked_per_second: f64,
    /// Refused for now.
    pub refused: u64,
    /// Not taken for another reason.
    pub failed: u64,
    /// Entries that sockets saw.
    pub seen: u64,
    /// Entries that a socket should have seen and did not.
    pub lost: u64,
    /// Seen again.
    pub doubled: u64,
    /// Seen behind a later one.
    pub reordered: u64,
    /// From an agent's message to its reply.
    pub sends: Quantiles,
    /// From a customer's message to the frame on an agent's socket.
    pub arrivals: Quantiles,
    /// The same over a bare server that keeps nothing, in the same run.
    pub floor: Option<Quantiles>,
    /// Processor time of this process, in seconds.
    pub cpu_own_s: f64,
    /// Of the node, where its process is known.
    pub cpu_node_s: f64,
    /// Of everybody else.
    pub cpu_others_s: f64,
}

impl Report {
    pub(super) fn new(
        plan: &Plan,
        shared: &Shared,
        elapsed: Duration,
        acked_in_time: u64,
        cpu: Burnt,
    ) -> Self {
        let counts = &shared.counts;
        let read = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
        Self {
            seconds: elapsed.as_secs_f64(),
            conversations: plan.conversations,
            agents: plan.agents,
            meant: read(&counts.meant),
            acked: read(&counts.acked),
            acked_per_second: acked_in_time as f64 / elapsed.as_secs_f64(),
            refused: read(&counts.refused),
            failed: read(&counts.failed),
            seen: read(&counts.seen),
            lost: read(&counts.lost),
            doubled: read(&counts.doubled),
            reordered: read(&counts.reordered),
            sends: Quantiles::of(&shared.sends),
            arrivals: Quantiles::of(&shared.arrivals),
            floor: None,
            cpu_own_s: cpu.own,
            cpu_node_s: cpu.node,
            cpu_others_s: cpu.others,
        }
    }

    /// Whether every entry was seen once and in order, and everything that was taken stands.
    pub fn is_clean(&self) -> bool {
        self.lost == 0 && self.doubled == 0 && self.reordered == 0 && self.failed == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:.1} s, {} agents, {} conversations of each kind",
            self.seconds, self.agents, self.conversations
        )?;
        writeln!(
            f,
            "  meant {:>10}   acked {:>10} ({:.0}/s)",
            self.meant, self.acked, self.acked_per_second
        )?;
        writeln!(f, "  refused {:>8}   failed {:>9}", self.refused, self.failed)?;
        writeln!(
            f,
            "  seen {:>11}   lost {:>11}   doubled {}   reordered {}",
            self.seen, self.lost, self.doubled, self.reordered
        )?;
        writeln!(
            f,
            "  {:<34} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "milliseconds", "p50", "p90", "p99", "p99.9", "max"
        )?;
        let rows = [
            ("agent's message to its reply", Some(self.sends)),
            ("customer's message to the socket", Some(self.arrivals)),
            ("  the same over a bare server", self.floor),
        ];
        for (name, q) in rows {
            let Some(q) = q.filter(|q| q.count > 0) else { continue };
            writeln!(
                f,
                "  {name:<34} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
                q.p50_ms, q.p90_ms, q.p99_ms, q.p999_ms, q.max_ms
            )?;
        }
        write!(
            f,
            "  processor time: node {:.1} s, this load {:.1} s, others {:.1} s",
            self.cpu_node_s, self.cpu_own_s, self.cpu_others_s
        )
    }
}
