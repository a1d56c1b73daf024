//! Who burnt the processors' time meanwhile, by the kernel's word.

use std::fs;

/// Ticks of the kernel's clock a second, on every machine that this runs on.
const TICKS: f64 = 100.0;

/// A look at the processors.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    busy: f64,
    own: f64,
    node: f64,
    pid: Option<u32>,
}

/// Seconds of processor time that were burnt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Burnt {
    /// By this process.
    pub own: f64,
    /// By the node, where its process is known.
    pub node: f64,
    /// By everybody else.
    pub others: f64,
}

fn of_process(pid: &str) -> f64 {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return 0.0 };
    // Behind the name, which may hold anything.
    let Some((_, rest)) = stat.rsplit_once(')') else { return 0.0 };
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |n: usize| fields.get(n).and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / TICKS
}

fn busy() -> f64 {
    let Ok(stat) = fs::read_to_string("/proc/stat") else { return 0.0 };
    let fields: Vec<f64> =
        stat.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    let at = |n: usize| fields.get(n).copied().unwrap_or(0.0);
    (at(0) + at(1) + at(2) + at(5) + at(6) + at(7)) / TICKS
}

impl Cpu {
    /// Looks now.
    pub fn now(pid: Option<u32>) -> Self {
        let node = pid.map_or(0.0, |pid| of_process(&pid.to_string()));
        Self { busy: busy(), own: of_process("self"), node, pid }
    }

    /// What was burnt since.
    pub fn since(&self) -> Burnt {
        let now = Self::now(self.pid);
        let (own, node) = (now.own - self.own, now.node - self.node);
        Burnt { own, node, others: (now.busy - self.busy - own - node).max(0.0) }
    }
}
