//! The load tool against the real binary, in both encodings; and what the node's metrics say meanwhile.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::{Node, until};
use patchbay_gateway::metrics_table::{Kind, METRICS};
use patchbay_loadtest::load::{self, Plan, Target};
use patchbay_protocol::client::Encoding;

fn plan() -> Plan {
    Plan {
        conversations: 16,
        agents: 4,
        encodings: vec![Encoding::Json, Encoding::Protobuf],
        customer_rate: 200.0,
        agent_rate: 100.0,
        in_flight: 0,
        time: Duration::from_secs(3),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_entry_is_seen_once_and_in_order_and_metrics_are_what_the_table_says() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let target = Target::of_ready_file(&dir.path().join("ready.json")).unwrap();
    let plan = plan();
    let (report, scraped) = tokio::join!(load::run(&target, &plan, |_, _| {}), async {
        let mut scraped = Vec::new();
        for _ in 0..20 {
            scraped.push(node.metrics().await);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        scraped
    });
    let report = report.unwrap();
    assert!(report.is_clean(), "{report}");
    assert!(report.sends.count > 100 && report.arrivals.count > 200, "{report}");
    assert!(report.meant <= report.acked + report.refused, "{report}");
    for text in scraped.iter().chain([&node.metrics().await]) {
        check(text);
    }
    // A closed loop as well.
    let closed =
        Plan { customer_rate: 0.0, agent_rate: 0.0, in_flight: 4, time: Duration::from_secs(1), ..plan };
    let report = load::run(&target, &closed, |_, _| {}).await.unwrap();
    assert!(report.is_clean() && report.acked > 100, "{report}");
}

/// A socket that dies has seen nothing of what came after: such a run is never called clean.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_sockets_died_is_not_clean() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let target = Target::of_ready_file(&dir.path().join("ready.json")).unwrap();
    let plan = Plan { agent_rate: 0.0, time: Duration::from_secs(2), ..plan() };
    let (report, ()) = tokio::join!(load::run(&target, &plan, |_, _| {}), async {
        until("it runs", async || {
            node.metrics().await.lines().any(|l| l == "patchbay_edge_connections 4").then_some(())
        })
        .await;
        drop(node);
    });
    assert!(report.is_err() || report.is_ok_and(|r| !r.is_clean()));
}

/// Names, help, types and label values as the table says, and nobody's id in a label.
fn check(text: &str) {
    let mut help: BTreeMap<&str, &str> = BTreeMap::new();
    let mut types: BTreeMap<&str, &str> = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, told) = rest.split_once(' ').unwrap();
            help.insert(name, told);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, told) = rest.split_once(' ').unwrap();
            types.insert(name, told);
        }
    }
    let table: BTreeMap<&str, _> =
        METRICS.iter().map(|(name, kind, labels, help)| (*name, (*kind, *labels, *help))).collect();
    for line in text.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
        let (name, labels) =
            series.split_once('{').map_or((series, ""), |(n, l)| (n, l.trim_end_matches('}')));
        let base = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|s| name.strip_suffix(s))
            .filter(|b| table.contains_key(b))
            .unwrap_or(name);
        let (kind, wanted, told) = table.get(base).unwrap_or_else(|| panic!("{base} is not in the table"));
        let expected = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        assert_eq!(
            (types.get(base).copied(), help.get(base).copied()),
            (Some(expected), Some(*told)),
            "{base}"
        );
        let suffix = match kind {
            Kind::Counter => base.ends_with("_total"),
            Kind::Histogram => base.ends_with("_seconds"),
            Kind::Gauge => !base.ends_with("_total") && !base.ends_with("_seconds"),
        };
        assert!(base.starts_with("patchbay_") && suffix, "{base}");
        let wanted: BTreeSet<&str> = wanted.split(", ").filter(|l| !l.is_empty()).collect();
        for label in labels.split("\",").filter(|l| !l.is_empty()) {
            let (label, value) = label.split_once("=\"").unwrap();
            let value = value.trim_end_matches('"');
            assert!(label == "le" || wanted.contains(label), "{base} has a label {label}");
            let plain = value.len() <= 40 && !value.contains("load-") && !value.contains("3460");
            assert!(plain, "{base}: {label}={value}");
        }
    }
}
