//! Redis goes away: limits and replies fall back to the node, revocation to the store, and both are said.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::faults::{ONE_AT_A_TIME, metric, readyz};
use common::servers::{self, Server};
use common::{Node, until};
use serde_json::json;

/// Two nodes over one store and one Redis server, with the keys of one another.
async fn two(dirs: [&Path; 2], redis: &str, requests: u32) -> [Node; 2] {
    std::fs::write(dirs[0].join("name"), servers::fresh("two")).unwrap();
    std::fs::copy(dirs[0].join("name"), dirs[1].join("name")).unwrap();
    let (url, requests) = (format!("redis://{redis}"), requests.to_string());
    let env = [
        ("PATCHBAY__REDIS__URL", url.as_str()),
        ("PATCHBAY__AUTH__OPERATOR_KEY", "operatoroperator"),
        ("PATCHBAY__AUTH__HMAC_SECRET_KEY", "secretsecretsecret"),
        ("PATCHBAY__EVENTS__ENGINE", "embedded"),
        ("PATCHBAY__LIMITS__REQUESTS_PER_SECOND", requests.as_str()),
    ];
    let first = Node::start_with(dirs[0], &env).await;
    let second = Node::start_with(dirs[1], &env).await;
    for node in [&first, &second] {
        until("ready", async || (readyz(node).await.1 == "ready").then_some(())).await;
    }
    [first, second]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_reaches_every_node_with_redis_and_without() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let (server, dirs) =
        (Server::start("redis", 1, &[]), [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()]);
    let [first, second] = two([dirs[0].path(), dirs[1].path()], &server.addresses, 0).await;
    let key = first.tenant("acme", "http://127.0.0.1:1", "1001").await;
    for round in ["pushed", "looked for"] {
        // `iat` has whole seconds, and what is revoked is what was issued before.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let token = first.token(&key, "anna", 600).await;
        let mut anna = second.socket(&token).await;
        if round == "looked for" {
            server.kill(1);
            until("it is said", async || readyz(&second).await.1.contains("redis is away").then_some(()))
                .await;
        }
        let began = Instant::now();
        let (status, _) = first.api(&key, "DELETE", "/agents/anna/tokens", None).await;
        assert_eq!(status, 204);
        assert_eq!(anna.close_code().await, Some(3503), "{round}");
        println!("{round}: closed after {:?}", began.elapsed());
    }
    assert_eq!(metric(&second, "patchbay_health_away{part=\"redis\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_is_given_again_by_any_node_and_limits_are_shared_while_redis_is_there() {
    if servers::quick() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().await;
    let (mut server, dirs) =
        (Server::start("redis", 1, &[]), [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()]);
    let nodes = two([dirs[0].path(), dirs[1].path()], &server.addresses, 2_000).await;
    let key = nodes[0].tenant("acme", "http://127.0.0.1:1", "1001").await;
    let make = async |node: &Node, name: &str| {
        let request =
            node.http.post(node.url("/api/v1/keys")).bearer_auth(&key).header("idempotency-key", "once");
        let answer = request.json(&json!({"name": name, "scope": "read"})).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let first = make(&nodes[0], "reader").await;
    assert!(first.0 == 200 || first.0 == 201, "{first:?}");
    assert_eq!(make(&nodes[1], "reader").await, first, "another node gives the first answer");
    assert_eq!(make(&nodes[1], "other").await.0, 409, "and refuses another body");

    // Who is there is known everywhere, and nowhere once nobody can say.
    let _anna = nodes[1].socket(&nodes[1].token(&key, "anna", 600).await).await;
    let presence =
        async || nodes[0].api(&key, "GET", "/agents", None).await.1["agents"][0]["presence"].clone();
    until("it is told", async || (presence().await == "online").then_some(())).await;

    // 2,000 at once for both nodes together; 2,000 for each when they have no word of each other.
    let hammer = async |key: &str| {
        let mut taken = 0;
        for _ in 0..40 {
            let burst = (0..100).map(|n| {
                let node = &nodes[n % 2];
                node.http.get(node.url("/api/v1/inboxes")).bearer_auth(key).send()
            });
            let answers = futures_util::future::join_all(burst).await;
            taken += answers.into_iter().filter(|a| a.as_ref().unwrap().status().is_success()).count();
        }
        taken
    };
    let began = Instant::now();
    let taken = hammer(&key).await;
    let refilled = (began.elapsed().as_secs_f64() * 2_000.0) as usize;
    assert!(taken <= 2_000 + refilled + 50, "{taken} taken, {refilled} refilled");
    server.kill(1);
    until("it is said", async || readyz(&nodes[0]).await.1.contains("redis is away").then_some(())).await;
    assert_eq!(make(&nodes[0], "reader").await, first, "a node remembers its own");
    assert_eq!(presence().await, json!(null), "she is not here");
    assert!(hammer(&key).await > 0, "nobody waits for it");
    assert!(metric(&nodes[0], "patchbay_limits_local_total").await > 0.0);
    server.restart(1);
    until("it is back", async || (readyz(&nodes[0]).await.1 == "ready").then_some(())).await;
}
