//! Whether the time of a refusal tells what another tenant has: ids that are theirs, over ids that are nobody's.

use std::time::Instant;

use patchbay_protocol::ConversationId;
use serde_json::{Value, json};

use crate::node::Node;
use crate::results::{Goal, Results};

/// The middle of the times, in microseconds.
fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

pub async fn run(results: &mut Results) {
    let rounds = if results.quick { 2000 } else { 10_000 };
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), &[]).await;
    let (ours, theirs) = (node.tenant("ours").await, node.tenant("theirs").await);
    node.customers_write("theirs", 0, 1).await;
    let id = |tenant: &str, thread: &str| {
        ConversationId::derive(&tenant.parse().unwrap(), &"wa".parse().unwrap(), thread).to_string()
    };
    let url = format!("http://{}/api/v1", node.target.public);
    let put = node.target.http.post(format!("{url}/media")).bearer_auth(&theirs);
    let put =
        put.header("content-type", "image/png").body(&b"\x89PNG\r\n\x1a\nrest"[..]).send().await.unwrap();
    let media = put.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned();
    let unknown: String =
        media.chars().map(|c| if c.is_ascii_digit() && c != '9' { '9' } else { c }).rev().collect();
    let foreign = format!("/conversations/{}", id("theirs", "34600000000"));
    let seen = node.api(&theirs, "GET", &foreign, json!({})).await;
    assert_eq!(seen["id"], id("theirs", "34600000000"), "it is there");
    let pairs = [
        (foreign.clone(), format!("/conversations/{}", id("theirs", "34699999999"))),
        (format!("{foreign}/entries"), format!("/conversations/{}/entries", id("theirs", "34699999999"))),
        (format!("/media/{media}"), format!("/media/{unknown}")),
    ];
    let (mut worst, mut told) = (1.0, Vec::new());
    for (foreign, unknown) in pairs {
        let mut times = [Vec::with_capacity(rounds), Vec::with_capacity(rounds)];
        for _ in 0..rounds {
            for (path, times) in [&foreign, &unknown].into_iter().zip(&mut times) {
                let request = node.target.http.get(format!("{url}{path}")).bearer_auth(&ours);
                let started = Instant::now();
                let answer = request.send().await.unwrap();
                times.push(started.elapsed().as_secs_f64() * 1e6);
                assert_eq!(answer.status(), 404, "{path}");
                let _ = answer.bytes().await;
            }
        }
        let [theirs, nobodys] = times.each_mut().map(|t| median(t));
        worst = f64::max(worst, (theirs / nobodys).max(nobodys / theirs));
        told.push(format!("{theirs:.0} and {nobodys:.0} µs"));
    }
    node.stop().await;
    let conditions = format!(
        "p50 of another tenant's and of nobody's: conversation {}, its entries {}, file {}; {rounds} of each, in turns",
        told[0], told[1], told[2]
    );
    results.note("foreign_id_time_ratio", worst, "ratio", Goal::AtMost(1.1), &conditions, None);
}
