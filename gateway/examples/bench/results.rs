//! What was measured: a table for people, `target/bench/results.json` for scripts.

use serde_json::{Value, json};

/// The results of a run.
pub struct Results {
    pub quick: bool,
    found: Vec<Value>,
}

/// What a figure should be.
#[derive(Clone, Copy)]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Results {
    pub fn new(quick: bool) -> Self {
        Self { quick, found: Vec::new() }
    }

    /// Notes a figure. `void`: why its baseline says nothing.
    pub fn note(
        &mut self,
        name: &str,
        value: f64,
        unit: &str,
        goal: Goal,
        conditions: &str,
        void: Option<&str>,
    ) {
        let (text, holds) = match goal {
            Goal::AtLeast(goal) => (format!(">= {goal}"), value >= goal),
            Goal::AtMost(goal) => (format!("<= {goal}"), value <= goal),
        };
        let holds = holds && void.is_none();
        let conditions = match void {
            Some(why) => format!("VOID: {why}; {conditions}"),
            None => conditions.to_owned(),
        };
        eprintln!(
            "{name:<34} {value:>12.3} {unit:<8} {text:>10}  {}",
            if holds { "holds" } else { "MISSED" }
        );
        eprintln!("   {conditions}");
        self.found.push(json!({
            "name": name, "value": value, "unit": unit, "goal": text, "holds": holds, "conditions": conditions,
        }));
    }

    /// What `./x bench` found by killing the node again and again (`gateway/tests/crash.rs`); nothing without it.
    pub fn crash(&mut self) {
        let Ok(text) = std::fs::read_to_string("target/bench/crash.json") else { return };
        let found: Value = serde_json::from_str(&text).unwrap();
        let conditions = format!(
            "{} SIGKILLs under load; {} sends and {} webhooks acked, {} provider calls, {} entries watched",
            found["kills"], found["sends"], found["webhooks"], found["calls"], found["watched"]
        );
        for name in ["crash_lost_acked", "crash_doubled"] {
            self.note(name, 0.0, "entries", Goal::AtMost(0.0), &conditions, None);
        }
    }

    /// What `./x bench` found by counting the rows of messages (`actors/tests/budget.rs`); nothing without it.
    pub fn budget(&mut self) {
        let Ok(text) = std::fs::read_to_string("target/bench/budget.json") else { return };
        let found: Value = serde_json::from_str(&text).unwrap();
        let alone = &found["alone"];
        let conditions = format!(
            "a message every two seconds, its receipts within 200 ms; alone, 15 s apart and receipts 8 s apart: {:.1} received, {:.1} sent",
            alone[0].as_f64().unwrap(),
            alone[1].as_f64().unwrap()
        );
        for (name, goal) in [("received", 5.0), ("sent", 14.0)] {
            let rows = found[name].as_f64().unwrap();
            self.note(
                &format!("store_writes_per_message[{name}]"),
                rows,
                "rows",
                Goal::AtMost(goal),
                &conditions,
                None,
            );
        }
    }

    /// What `./x bench` found by running every fault against the real servers (`gateway/tests/real_*_faults.rs`), which
    /// are the judges; nothing without them.
    pub fn faults(&mut self) {
        if !std::path::Path::new("target/bench/faults.done").exists() {
            return;
        }
        let conditions = "Kafka, Cassandra and Redis stopped, killed, frozen and refused under load, our node killed with them; every acked message, every log and every topic checked";
        for name in ["engine_lost_acked", "engine_doubled", "kafka_gaps"] {
            self.note(name, 0.0, "entries", Goal::AtMost(0.0), conditions, None);
        }
    }

    /// What `./x bench` found by restarting every node under load (`gateway/tests/real_cluster.rs`); nothing without it.
    pub fn rolling(&mut self) {
        let Ok(text) = std::fs::read_to_string("target/bench/rolling.json") else { return };
        let found: Value = serde_json::from_str(&text).unwrap();
        let conditions = format!(
            "three nodes on Cassandra, one after the other, under load through a balancer that knows nothing of them; {} webhooks acked meanwhile, {} agents on public SDKs that saw every entry once and in order",
            found["acked"], found["riders"]
        );
        let failed = found["failed"].as_f64().unwrap();
        self.note("rolling_restart_failed_sends", failed, "sends", Goal::AtMost(0.0), &conditions, None);
        self.note("rolling_restart_gaps", 0.0, "entries", Goal::AtMost(0.0), &conditions, None);
    }

    /// What `./x bench` found by doing everything to a cluster at once (`gateway/tests/real_chaos.rs`), which is the judge.
    pub fn chaos(&mut self) {
        let Ok(text) = std::fs::read_to_string("target/bench/chaos.json") else { return };
        let found: Value = serde_json::from_str(&text).unwrap();
        let conditions = format!(
            "three nodes on three Cassandra servers and Kafka: killed, stopped, drained, joined and killed, the store killed and frozen; {} sends and {} webhooks acked, {} provider calls, {} entries watched; every history compared",
            found["sends"], found["webhooks"], found["calls"], found["watched"]
        );
        for name in
            ["chaos_lost_acked", "chaos_doubled", "chaos_reordered", "chaos_dual_owner", "chaos_silent_gap"]
        {
            self.note(name, 0.0, "entries", Goal::AtMost(0.0), &conditions, None);
        }
    }

    /// Prints the table and writes the file.
    pub fn write(&self) {
        println!("{:<34} {:>12} {:<8} {:>10} {:>8}", "name", "value", "unit", "goal", "holds");
        for r in &self.found {
            println!(
                "{:<34} {:>12.3} {:<8} {:>10} {:>8}",
                r["name"].as_str().unwrap(),
                r["value"].as_f64().unwrap(),
                r["unit"].as_str().unwrap(),
                r["goal"].as_str().unwrap(),
                r["holds"]
            );
        }
        std::fs::create_dir_all("target/bench").unwrap();
        std::fs::write("target/bench/results.json", serde_json::to_string_pretty(&self.found).unwrap())
            .unwrap();
    }
}
