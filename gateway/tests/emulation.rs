//! Clients behind what blocks WebSocket: one long answer and requests beside it.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Emulated, Node, conversation, text_item, webhook_body};
use reqwest::header;
use serde_json::{Value, json};

const NUMBER: &str = "1001";
const LUZ: &str = "34600111222";

struct World {
    node: Node,
    key: String,
    token: String,
    _dir: tempfile::TempDir,
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", NUMBER).await;
    let token = node.token(&key, "anna", 600).await;
    World { node, key, token, _dir: dir }
}

impl World {
    async fn writes(&self, n: usize) {
        let body = webhook_body(NUMBER, &[text_item(LUZ, &format!("wamid.{n}"), &format!("{n}"))], &[]);
        assert_eq!(self.node.webhook("acme", "wa", &body).await, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_run_in_the_order_in_which_they_arrive_and_the_answer_goes_on() {
    let w = world().await;
    w.writes(1).await;
    let id = conversation("acme", "wa", LUZ).to_string();
    for transport in ["http_stream", "sse"] {
        let mut client = Emulated::connect(w.node.public(), transport, &w.token).await;
        assert!(client.session.len() >= 32, "{transport}: 128 bits");
        let channel = format!("conversation:{id}");
        assert_eq!(client.send(&json!({"id": 2, "subscribe": {"channel": channel}})).await, 204);
        let subscribed = client.reply(2).await;
        let tip = subscribed["subscribe"]["offset"].as_u64().unwrap();
        // Several commands in one request, and then one after the other.
        let note = |n: u64| {
            let text = format!("{transport} {n}");
            json!({"id": n, "rpc": {"method": "note.add", "data": {"conversation": id, "client_id": text, "text": text}}})
        };
        let lines = (3..20).map(|n| note(n).to_string()).collect::<Vec<_>>().join("\n");
        assert_eq!(client.send_text(&lines).await, 204);
        for n in 20..40 {
            assert_eq!(client.send(&note(n)).await, 204);
        }
        let mut seqs = Vec::new();
        while seqs.len() < 37 {
            let reply = client.next().await.expect("it goes on");
            assert!(reply["error"].is_null(), "{reply}");
            if let Some(seq) = reply["rpc"]["data"]["seq"].as_u64() {
                seqs.push((reply["id"].as_u64().unwrap(), seq));
            }
        }
        seqs.sort_unstable();
        let wanted: Vec<(u64, u64)> = (3..40).map(|n| (n, tip + n - 2)).collect();
        assert_eq!(seqs, wanted, "{transport}");
        // What is published comes as well.
        w.writes(transport.len()).await;
        while client.next().await.expect("it goes on")["push"]["pub"]["offset"] != tip + 38 {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_session_is_the_only_credential_and_ends_with_its_stream() {
    let w = world().await;
    let mut client = Emulated::connect(w.node.public(), "http_stream", &w.token).await;
    let (session, node) = (client.session.clone(), client.node.clone());
    for (node, session) in [(node.as_str(), "0".repeat(32)), ("patchbay-999", session.clone())] {
        let stranger = client.clone_as(node, &session);
        assert_eq!(stranger.send(&json!({"id": 2, "ping": {}})).await, 404, "{node}");
    }
    assert_eq!(client.post_raw("not json").await, 400);
    // A second connect is a fault of the client's: it is told, and the stream ends.
    assert_eq!(client.send(&json!({"id": 3, "connect": {}})).await, 204);
    let last = loop {
        let reply = client.next().await.expect("a word before the end");
        if reply["push"]["disconnect"].is_object() {
            break reply;
        }
    };
    assert_eq!(last["push"]["disconnect"]["code"], 3501);
    assert_eq!(client.next().await, None);
    assert_eq!(client.send(&json!({"id": 4, "ping": {}})).await, 404);
    // Whoever goes without a word is gone.
    let client = Emulated::connect(w.node.public(), "sse", &w.token).await;
    let late = client.clone_as(&client.node, &client.session);
    drop(client);
    common::until("its session has ended", async || {
        (late.send(&json!({"id": 2, "ping": {}})).await == 404).then_some(())
    })
    .await;
    let agents = w.node.get(&w.key, "/agents/anna").await;
    assert_eq!(agents["id"], "anna");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_connect_is_refused() {
    let w = world().await;
    let http = reqwest::Client::new();
    let url = |path: &str| format!("http://{}{path}", w.node.public());
    let empty = http.post(url("/connection/http_stream")).send().await.unwrap();
    assert_eq!(empty.status(), 400);
    assert_eq!(http.get(url("/connection/sse")).send().await.unwrap().status(), 400);
    let large = http.post(url("/connection/http_stream")).body("x".repeat(600 * 1024)).send().await.unwrap();
    assert_eq!(large.status(), 413);
    let wrong = http.post(url("/connection/http_stream")).body(r#"{"id":1,"ping":{}}"#).send().await.unwrap();
    let text = wrong.text().await.unwrap();
    let told: Value = serde_json::from_str(text.trim()).unwrap();
    assert_eq!(told["push"]["disconnect"]["code"], 3501);
    let wrong = http
        .post(url("/connection/http_stream"))
        .body(r#"{"id":1,"connect":{"token":"no token"}}"#)
        .send()
        .await
        .unwrap();
    let told: Value = serde_json::from_str(wrong.text().await.unwrap().trim()).unwrap();
    assert_eq!(
        (&told["push"]["disconnect"]["code"], &told["push"]["disconnect"]["reconnect"]),
        (&json!(3500), &Value::Null)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_may_ask() {
    let w = world().await;
    let http = reqwest::Client::new();
    let origin = "http://localhost:5173";
    for path in ["/emulation", "/connection/http_stream"] {
        let asked = http
            .request(reqwest::Method::OPTIONS, format!("http://{}{path}", w.node.public()))
            .header(header::ORIGIN, origin)
            .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
            .send()
            .await
            .unwrap();
        assert_eq!(asked.status(), 204);
        assert_eq!(asked.headers()[header::ACCESS_CONTROL_ALLOW_ORIGIN], origin);
        assert_eq!(asked.headers()[header::ACCESS_CONTROL_ALLOW_CREDENTIALS], "true");
    }
}
