//! A provider's day, from a file: what its numbers may send, whom they reach, when it is down, and what changes when.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;

use super::faults::Faults;
use super::{Sim, lock, webhooks};

/// What happens, and when.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scenario {
    /// What goes wrong from the start.
    pub faults: Faults,
    /// What numbers may send from the start.
    pub limits: Limits,
    /// Addresses that the provider knows under another one: what is sent to the first is answered, and its receipts
    /// come, by the second.
    pub aliases: HashMap<String, String>,
    /// What changes, by time.
    pub steps: Vec<Step>,
}

/// What a number may send. 0: as much as it likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Messages a second of a number; past it 130429.
    pub per_second: f64,
    /// Messages at once to one recipient, and a second in the long run; past it 131056.
    pub pair_burst: f64,
    /// See `pair_burst`.
    pub pair_per_second: f64,
    /// Recipients of templates of a number, its tier; past it 131048.
    pub tier: usize,
}

/// A change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Step {
    /// How long after the start, in milliseconds.
    pub after_ms: u64,
    /// From now on, what goes wrong.
    pub faults: Option<Faults>,
    /// From now on, what numbers may send.
    pub limits: Option<Limits>,
    /// Down for so long, in milliseconds: calls are answered 503 without a body, webhooks wait.
    pub outage_ms: u64,
    /// A number's quality or throughput changed: the `value` of its `phone_number_quality_update`.
    pub quality: Option<serde_json::Value>,
    /// The account was told something: the `value` of its `account_update`.
    pub account: Option<serde_json::Value>,
}

/// What numbers have sent.
#[derive(Default)]
pub(crate) struct Pace {
    pub(crate) limits: Limits,
    pub(crate) aliases: HashMap<String, String>,
    numbers: HashMap<String, (f64, Instant)>,
    pairs: HashMap<(String, String), (f64, Instant)>,
    reached: HashMap<String, HashSet<String>>,
    down_until: Option<Instant>,
}

fn take(bucket: &mut (f64, Instant), rate: f64, burst: f64) -> bool {
    let now = Instant::now();
    let filled = (bucket.0 + now.duration_since(bucket.1).as_secs_f64() * rate).min(burst);
    let taken = filled >= 1.0;
    *bucket = (if taken { filled - 1.0 } else { filled }, now);
    taken
}

impl Pace {
    pub(crate) fn is_down(&self) -> bool {
        self.down_until.is_some_and(|until| Instant::now() < until)
    }

    /// Why a message may not go: Graph's code.
    pub(crate) fn refuses(&mut self, number: &str, to: &str, kind: &str) -> Option<(i64, &'static str)> {
        let limits = self.limits;
        let fresh = |burst: f64| move || (burst, Instant::now());
        if limits.per_second > 0.0 {
            let bucket =
                self.numbers.entry(number.to_owned()).or_insert_with(fresh(limits.per_second.max(1.0)));
            if !take(bucket, limits.per_second, limits.per_second.max(1.0)) {
                return Some((130_429, "Rate limit hit"));
            }
        }
        if limits.pair_burst > 0.0 {
            let pair = (number.to_owned(), to.to_owned());
            let bucket = self.pairs.entry(pair).or_insert_with(fresh(limits.pair_burst));
            if !take(bucket, limits.pair_per_second, limits.pair_burst) {
                return Some((131_056, "(Business Account, Consumer Account) pair rate limit hit"));
            }
        }
        if limits.tier > 0 && kind == "template" {
            let reached = self.reached.entry(number.to_owned()).or_default();
            if !reached.contains(to) && reached.len() >= limits.tier {
                return Some((131_048, "Spam rate limit hit"));
            }
            reached.insert(to.to_owned());
        }
        None
    }
}

/// Plays the steps.
pub(crate) async fn play(sim: Arc<Sim>, mut steps: Vec<Step>) {
    let start = Instant::now();
    steps.sort_by_key(|s| s.after_ms);
    for step in steps {
        tokio::time::sleep_until(start + Duration::from_millis(step.after_ms)).await;
        if let Some(faults) = step.faults {
            *lock(&sim.faults) = faults;
        }
        {
            let mut pace = lock(&sim.pace);
            if let Some(limits) = step.limits {
                pace.limits = limits;
            }
            if step.outage_ms > 0 {
                pace.down_until = Some(Instant::now() + Duration::from_millis(step.outage_ms));
            }
        }
        for (field, value) in
            [("phone_number_quality_update", step.quality), ("account_update", step.account)]
        {
            let Some(value) = value else { continue };
            let numbers: Vec<String> = lock(&sim.numbers).keys().cloned().collect();
            for number in numbers {
                let mut value = value.clone();
                value["display_phone_number"] = json!("15550000000");
                webhooks::tells(&sim, &number, field, value);
            }
        }
    }
}
