//! Every metric in one table, which is also the documentation page. No conversation, contact or agent id in a label.

use metrics::Unit;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

/// A metric: name, kind, labels, help.
pub type Row = (&'static str, Kind, &'static str, &'static str);

/// Every metric.
pub const METRICS: &[Row] = &[
    ("patchbay_actors_active", Kind::Gauge, "", "Entities in memory."),
    (
        "patchbay_actors_crowded",
        Kind::Gauge,
        "",
        "1 while memory is spent on entities that are busy, and nobody else is let in.",
    ),
    ("patchbay_actors_failures_total", Kind::Counter, "", "Actors that failed and rest."),
    ("patchbay_actors_memory_short_total", Kind::Counter, "", "Looks that found memory short."),
    (
        "patchbay_actors_overloaded_total",
        Kind::Counter,
        "kind",
        "Commands refused since too many were in flight.",
    ),
    ("patchbay_actors_panics_total", Kind::Counter, "command", "Commands that made their entity panic."),
    ("patchbay_actors_parked_total", Kind::Counter, "kind", "Entities parked since their log is damaged."),
    (
        "patchbay_actors_poison_commands_total",
        Kind::Counter,
        "command",
        "Commands parked since they failed every time.",
    ),
    (
        "patchbay_actors_succeeded_total",
        Kind::Counter,
        "kind",
        "Entities stopped since a later owner had written.",
    ),
    ("patchbay_consumer_dead_letters_total", Kind::Counter, "group", "Events put into the dead letters."),
    ("patchbay_consumer_events_total", Kind::Counter, "group", "Events that had their effect."),
    ("patchbay_consumer_gaps_total", Kind::Counter, "group", "Events before which others are missing."),
    ("patchbay_consumer_lag_events", Kind::Gauge, "group", "Events that the group has not read yet."),
    (
        "patchbay_consumer_repeats_total",
        Kind::Counter,
        "group",
        "Events passed over since they had been seen.",
    ),
    ("patchbay_consumer_retries_total", Kind::Counter, "group", "Tries of events that are tried again."),
    ("patchbay_consumer_source_errors_total", Kind::Counter, "group", "Reads of events that failed."),
    ("patchbay_edge_connections", Kind::Gauge, "", "Open sockets."),
    ("patchbay_edge_disconnects_total", Kind::Counter, "code", "Sockets closed by the server."),
    ("patchbay_edge_queued_bytes", Kind::Gauge, "", "Bytes that wait for sockets, of all of them."),
    ("patchbay_edge_rpc_seconds", Kind::Histogram, "method", "From an rpc's arrival to its reply."),
    ("patchbay_health_away", Kind::Gauge, "part", "1 while `storage`, `events` or `redis` does not answer."),
    ("patchbay_hub_publications_total", Kind::Counter, "", "Entries offered to subscribed sockets."),
    ("patchbay_intake_dead_letters_total", Kind::Counter, "", "Items put into the dead letters."),
    (
        "patchbay_limits_local_total",
        Kind::Counter,
        "",
        "Requests counted by this node alone since Redis was away.",
    ),
    ("patchbay_limits_reached_total", Kind::Counter, "which", "Commands and requests refused past a limit."),
    ("patchbay_media_fetches_total", Kind::Counter, "outcome", "Customers' files asked for at providers."),
    (
        "patchbay_media_mismatches_total",
        Kind::Counter,
        "",
        "Files whose bytes were not what the provider had said.",
    ),
    ("patchbay_media_stored_bytes_total", Kind::Counter, "", "Bytes of files that were stored."),
    ("patchbay_outbound_call_seconds", Kind::Histogram, "outcome", "Calls to providers."),
    (
        "patchbay_outbox_failures_total",
        Kind::Counter,
        "",
        "Times that events were sent again since one was not taken.",
    ),
    ("patchbay_outbox_in_flight_events", Kind::Gauge, "", "Events sent and not delivered."),
    (
        "patchbay_outbox_lagging_conversations",
        Kind::Gauge,
        "",
        "Conversations with entries that are not published, as far as they are told apart.",
    ),
    (
        "patchbay_mesh_watched_topics",
        Kind::Gauge,
        "",
        "Topics that sockets of this node wait for, wherever they are published.",
    ),
    (
        "patchbay_mesh_publications_total",
        Kind::Counter,
        "",
        "Publications sent to other nodes: one for each node that waits.",
    ),
    (
        "patchbay_mesh_marked_total",
        Kind::Counter,
        "",
        "Publications to other nodes that did not fit, so that their sockets read them from the log.",
    ),
    (
        "patchbay_shard_move_seconds",
        Kind::Histogram,
        "step",
        "What a move of shards took: to make one ready while it is served (prepare); to stop those that were ready together (stop); until the map showed that (release); from then on to serve one elsewhere (open).",
    ),
    (
        "patchbay_shards_waiting_commands",
        Kind::Gauge,
        "",
        "Commands that wait for a shard which is on its way from one node to another.",
    ),
    (
        "patchbay_outbox_parked_conversations",
        Kind::Gauge,
        "",
        "Conversations whose next event is never taken; the log names them.",
    ),
    ("patchbay_outbox_parked_total", Kind::Counter, "", "Times that a conversation's outbox was parked."),
    ("patchbay_outbox_published_total", Kind::Counter, "", "Events delivered."),
    ("patchbay_redis_away_total", Kind::Counter, "", "Questions that Redis did not answer."),
    ("patchbay_storage_commit_seconds", Kind::Histogram, "", "Writing and syncing one group."),
    ("patchbay_storage_errors_total", Kind::Counter, "", "Requests to ScyllaDB or Cassandra that failed."),
    ("patchbay_storage_free_bytes", Kind::Gauge, "", "Free space on the disk."),
    ("patchbay_storage_groups_total", Kind::Counter, "", "Groups written and synced."),
    ("patchbay_storage_jobs_total", Kind::Counter, "", "Writes in those groups."),
    (
        "patchbay_storage_overloads_total",
        Kind::Counter,
        "",
        "Signs that ScyllaDB or Cassandra has too much to do; each may halve what is under way.",
    ),
    (
        "patchbay_storage_speculations_total",
        Kind::Counter,
        "",
        "Requests asked of another node as well since the first did not answer in time.",
    ),
    (
        "patchbay_storage_stale_writes_total",
        Kind::Counter,
        "",
        "Writes dropped since a later epoch had written.",
    ),
    (
        "patchbay_storage_unsettled_total",
        Kind::Counter,
        "",
        "Conditional writes whose outcome had to be found out.",
    ),
    ("patchbay_webhook_items_total", Kind::Counter, "", "Items of verified webhooks."),
    ("patchbay_webhook_answer_seconds", Kind::Histogram, "status", "From a webhook's body to its answer."),
];

const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Installs the recorder of the process.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)?
        .install_recorder()?;
    for (name, kind, _, help) in METRICS {
        match kind {
            Kind::Counter => metrics::describe_counter!(*name, *help),
            Kind::Gauge => metrics::describe_gauge!(*name, *help),
            Kind::Histogram => metrics::describe_histogram!(*name, Unit::Seconds, *help),
        }
    }
    Ok(handle)
}

/// The page in docs/ that lists every metric.
pub fn documentation() -> String {
    let mut page = String::from(
        "# Metrics\n\nGenerated from `gateway/src/metrics_table.rs`; a test fails when this page is stale. Served at `/metrics` of `ops.listen`.\n\n| name | kind | labels | what |\n|---|---|---|---|\n",
    );
    for (name, kind, labels, help) in METRICS {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        page += &format!("| `{name}` | {kind} | {labels} | {help} |\n");
    }
    page
}
