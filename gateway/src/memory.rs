//! How much memory the process holds, by the kernel's word, and how much it may.

use patchbay_actors::memory::{Gauge, Memory};

const PAGE_BYTES: u64 = 4096;

/// What a process may hold when nobody says otherwise: three quarters of the machine, or of its control group.
pub fn default_bound() -> Option<u64> {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    });
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let group = group.and_then(|text| text.trim().parse::<u64>().ok());
    [machine, group].into_iter().flatten().min().map(|bytes| bytes / 4 * 3)
}

fn held() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(text.split_whitespace().nth(1)?.parse::<u64>().ok()? * PAGE_BYTES)
}

/// Looks at the process.
pub fn gauge(bound: Option<u64>) -> Gauge {
    let bound = bound.or_else(default_bound);
    Box::new(move || match (bound, held()) {
        (Some(bound), Some(held)) if held > bound => Memory::Spent,
        // What is forgotten is written first, and others come meanwhile.
        (Some(bound), Some(held)) if held > bound / 4 * 3 => Memory::Short,
        _ => Memory::Enough,
    })
}
