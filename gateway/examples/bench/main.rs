//! `./x bench`: benchmarks as ratios against baselines of the same run, and sizes and times of the real binary.
//!
//! Each prints its absolute figures; a baseline that is under half of what this kind of machine is known to do makes
//! its ratio void, and says so.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod cluster;
mod cold;
mod engines;
mod gap;
mod memory;
mod mesh;
mod node;
mod results;
mod sends;
#[path = "../../../storage/tests/servers/mod.rs"]
mod servers;
mod soak;
mod walls;
mod webhooks;

use results::Results;

/// Names of what can be asked for, by the benchmark that measures it.
const BENCHMARKS: [(&str, &[&str]); 14] = [
    ("sends", &["durable_send_throughput_ratio", "durable_send_p99_ratio"]),
    ("webhooks", &["webhook_to_socket_p50_ratio", "webhook_to_socket_p99_ratio"]),
    ("conversations", &["idle_conversation_bytes"]),
    ("cold", &["cold_start_seconds", "cold_conversation_extra_ms"]),
    ("sockets", &["idle_websocket_bytes"]),
    ("walls", &["foreign_id_time_ratio"]),
    ("soak", &["soak_memory_ratio"]),
    ("cassandra", &["cassandra_send_throughput_ratio", "cassandra_send_p99_ratio", "history_page_ratio"]),
    ("kafka", &["kafka_publish_throughput_ratio", "kafka_entry_to_consumer_p50_ms"]),
    ("recovery", &["outbox_recovery_ratio"]),
    ("frozen", &["frozen_store_node_p99_ms"]),
    (
        "mesh",
        &[
            "remote_command_added_p50_ms",
            "remote_command_added_cpu_us",
            "mesh_publication_ratio",
            "membership_writes_per_node_second",
            "membership_reads_per_node_second",
        ],
    ),
    ("cluster", &["failover_p99_seconds", "failover_after_detection_p99_seconds", "handoff_pause_p99_ms"]),
    ("work", &["work_per_message_growth"]),
];

#[tokio::main]
async fn main() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    node::raise_descriptors();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let quick = args.iter().any(|a| a == "--quick");
    let wanted: Vec<&String> = args.iter().filter(|a| !a.starts_with("--")).collect();
    let asked = |name: &str, measures: &[&str]| {
        wanted.is_empty() || wanted.iter().any(|w| *w == name || measures.contains(&w.as_str()))
    };
    let mut results = Results::new(quick);
    for (name, measures) in BENCHMARKS {
        if !asked(name, measures) {
            continue;
        }
        eprintln!("== {name}");
        match name {
            "sends" => sends::run(&mut results).await,
            "webhooks" => webhooks::run(&mut results).await,
            "conversations" => memory::conversations(&mut results).await,
            "cold" => cold::run(&mut results).await,
            "sockets" => memory::sockets(&mut results).await,
            "walls" => walls::run(&mut results).await,
            "cassandra" => engines::cassandra(&mut results).await,
            "kafka" => engines::kafka(&mut results).await,
            "recovery" => engines::recovery(&mut results).await,
            "frozen" => engines::frozen(&mut results).await,
            "mesh" => mesh::run(&mut results).await,
            "cluster" => cluster::run(&mut results).await,
            "work" => cluster::work(&mut results).await,
            _ => soak::run(&mut results).await,
        }
    }
    if asked("crash", &["crash_lost_acked", "crash_doubled"]) {
        results.crash();
    }
    if asked("budget", &["store_writes_per_message"]) {
        results.budget();
    }
    if asked("faults", &["engine_lost_acked", "engine_doubled", "kafka_gaps"]) {
        results.faults();
    }
    if asked("rolling", &["rolling_restart_failed_sends", "rolling_restart_gaps"]) {
        results.rolling();
    }
    if asked("chaos", &["chaos_lost_acked", "chaos_doubled", "chaos_reordered", "chaos_silent_gap"]) {
        results.chaos();
    }
    results.write();
}
