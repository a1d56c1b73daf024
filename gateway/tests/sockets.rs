//! What a socket may cost: deadlines, caps, pongs, slow readers, tokens that end. Each bound with its close code.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Node, Ws, conversation, text_item, until, webhook_body};
use patchbay_protocol::ConversationId;
use serde_json::{Value, json};

const NUMBER: &str = "1001";
const LUZ: &str = "34600111222";

struct World {
    node: Node,
    key: String,
    token: String,
    _dir: tempfile::TempDir,
}

async fn world(env: &[(&str, &str)]) -> World {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start_with(dir.path(), env).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", NUMBER).await;
    let token = node.token(&key, "anna", 600).await;
    World { node, key, token, _dir: dir }
}

impl World {
    /// The customer writes `n` messages of about `bytes`; the conversation and its tip.
    async fn messages(&self, from: usize, n: usize, bytes: usize) -> (ConversationId, u64) {
        let text = "x".repeat(bytes);
        let items: Vec<Value> =
            (from..from + n).map(|n| text_item(LUZ, &format!("wamid.{n}"), &format!("{n} {text}"))).collect();
        for items in items.chunks(100) {
            assert_eq!(self.node.webhook("acme", "wa", &webhook_body(NUMBER, items, &[])).await, 200);
        }
        // The first entry opens the conversation.
        (conversation("acme", "wa", LUZ), (from + n) as u64 + 1)
    }
}

/// Takes part in a subscription as an SDK does: every offset once, in order; comes back with its position when told.
struct Reader {
    ws: Ws,
    channel: String,
    epoch: String,
    position: u64,
    resubscribed: usize,
}

impl Reader {
    async fn subscribe(mut ws: Ws, id: ConversationId) -> Self {
        let channel = format!("conversation:{id}");
        let result = ws.subscribe(&channel).await.unwrap();
        let (epoch, position) =
            (result["epoch"].as_str().unwrap().to_owned(), result["offset"].as_u64().unwrap_or(0));
        Self { ws, channel, epoch, position, resubscribed: 0 }
    }

    fn next(&mut self, publication: &Value) {
        if let Some(offset) = publication["offset"].as_u64() {
            assert_eq!(offset, self.position + 1, "a gap, a double or a step back");
            self.position = offset;
        }
    }

    /// Reads until it has seen `tip`. `None`: the socket was closed.
    async fn up_to(&mut self, tip: u64) -> Option<()> {
        while self.position < tip {
            let push = self.ws.push().await?;
            if push["unsubscribe"]["code"] == 2500 {
                self.resubscribed += 1;
                self.come_back().await;
            } else {
                self.next(&push["pub"]);
            }
        }
        Some(())
    }

    /// Subscribes again with its position; what is too much for a recovery is paged by history.
    async fn come_back(&mut self) {
        let request = json!({"subscribe": {"channel": self.channel, "recover": true, "offset": self.position, "epoch": self.epoch}});
        let result = self.ws.call(request).await.unwrap()["subscribe"].take();
        let tip = result["offset"].as_u64().unwrap_or(0);
        for publication in result["publications"].as_array().into_iter().flatten() {
            self.next(publication);
        }
        while result["recovered"] != true && self.position < tip {
            let since = json!({"offset": self.position, "epoch": self.epoch});
            let page = json!({"history": {"channel": self.channel, "limit": 1000, "since": since}});
            let page = self.ws.call(page).await.unwrap();
            for publication in page["history"]["publications"].as_array().unwrap() {
                self.next(publication);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_does_not_connect_is_let_go() {
    let w = world(&[]).await;
    let mut ws = Ws::open(w.node.public()).await;
    assert_eq!(ws.close_code().await, Some(3502));
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_have_not_connected_are_capped_and_make_room_when_they_do() {
    let w = world(&[("PATCHBAY__LIMITS__UNCONNECTED", "2")]).await;
    let (mut first, _second) = (Ws::open(w.node.public()).await, Ws::open(w.node.public()).await);
    let mut third = Ws::open(w.node.public()).await;
    assert_eq!(third.close_code().await, Some(3013), "a code that an SDK comes back from");
    first.call(json!({"connect": {"token": w.token}})).await.unwrap();
    until("there is room again", async || {
        let mut ws = Ws::open(w.node.public()).await;
        ws.call(json!({"connect": {"token": w.token}})).await.is_ok().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_are_capped() {
    let w = world(&[("PATCHBAY__LIMITS__CONNECTIONS", "2")]).await;
    let (one, _two) = (w.node.socket(&w.token).await, w.node.socket(&w.token).await);
    let mut third = Ws::open(w.node.public()).await;
    assert_eq!(third.close_code().await, Some(3013));
    drop(one);
    until("there is room again", async || {
        let mut ws = Ws::open(w.node.public()).await;
        ws.call(json!({"connect": {"token": w.token}})).await.is_ok().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_of_a_socket_are_capped() {
    let w = world(&[]).await;
    let mut ws = w.node.socket(&w.token).await;
    for n in 0..16 {
        let puts = (0..32).map(|m| {
            let path = format!("/inboxes/i{}", n * 32 + m);
            let (node, key) = (&w.node, &w.key);
            async move { node.api(key, "PUT", &path, Some(json!({"name": "x"}))).await }
        });
        futures_util::future::join_all(puts).await;
    }
    for n in 0..512 {
        ws.subscribe(&format!("inbox:i{n}")).await.unwrap();
    }
    assert_eq!(ws.subscribe("inbox:main").await.unwrap_err()["code"], 106);
    ws.call(json!({"unsubscribe": {"channel": "inbox:i0"}})).await.unwrap();
    ws.subscribe("inbox:main").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_silent_for_half_a_minute_is_closed_and_resumes_where_it_was() {
    let w = world(&[]).await;
    let (id, _) = w.messages(0, 3, 10).await;
    let mut reader = Reader::subscribe(w.node.socket(&w.token).await, id).await;
    reader.ws.answers_pings = false;
    // It reads nothing and answers nothing; the world goes on.
    let (_, tip) = w.messages(3, 120, 100).await;
    let seen = reader.up_to(u64::MAX).await;
    assert_eq!((seen, reader.ws.closed), (None, Some(3012)));
    assert_eq!(reader.position, tip, "what was pushed before stands");
    let (_, tip) = w.messages(123, 250, 100).await;
    reader.ws = w.node.socket(&w.token).await;
    reader.come_back().await;
    assert_eq!(reader.position, tip);
    let (_, tip) = w.messages(373, 1, 10).await;
    reader.up_to(tip).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stops_and_returns_sees_every_entry_on_the_same_socket() {
    let w = world(&[]).await;
    let (id, _) = w.messages(0, 1, 10).await;
    let mut slow = Reader::subscribe(w.node.socket(&w.token).await, id).await;
    let mut quick = Reader::subscribe(w.node.socket(&w.token).await, id).await;
    // Far more than the socket's buffers and the queue hold, while one of them reads nothing at all.
    let (mut tip, mut n, stopped) = (0, 0, std::time::Instant::now());
    while n < 30 || stopped.elapsed() < Duration::from_secs(10) {
        (_, tip) = w.messages(1 + n * 100, 100, 4000).await;
        quick.up_to(tip).await.unwrap();
        n += 1;
    }
    assert_eq!(quick.resubscribed, 0, "a slow neighbour costs nothing");
    slow.up_to(tip).await.expect("the same socket goes on");
    let (_, tip) = w.messages(1 + n * 100, 1, 10).await;
    slow.up_to(tip).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_asks_and_does_not_read_is_slow_in_the_end() {
    let w = world(&[]).await;
    let (id, _) = w.messages(0, 600, 2000).await;
    let mut ws = w.node.socket(&w.token).await;
    // Each answer is near half a megabyte; nobody reads them.
    for _ in 0..64 {
        ws.send(json!({"history": {"channel": format!("conversation:{id}"), "limit": 1000}})).await;
    }
    let slow = async || {
        let metrics = w.node.metrics().await;
        metrics.lines().any(|l| l == "patchbay_edge_disconnects_total{code=\"3008\"} 1").then_some(())
    };
    until("it is disconnected", slow).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_renews_and_what_is_not_ours_or_too_late_ends_the_socket() {
    let w = world(&[]).await;
    let (status, _) = w
        .node
        .api(&w.key, "PUT", "/agents/bob", Some(json!({"name": "B", "role": "agent", "inboxes": ["main"]})))
        .await;
    assert_eq!(status, 201);
    let bob = w.node.token(&w.key, "bob", 600).await;
    let fresh = w.node.token(&w.key, "anna", 900).await;
    let mut ws = w.node.socket(&w.token).await;
    let renewed = ws.call(json!({"refresh": {"token": fresh}})).await.unwrap()["refresh"].take();
    assert_eq!(renewed["expires"], true);
    assert!((890..=900).contains(&renewed["ttl"].as_u64().unwrap()), "{renewed}");
    for (what, token, code) in [("another agent's", bob.as_str(), 3500), ("garbage", "a.b.c", 3500)] {
        let mut ws = w.node.socket(&w.token).await;
        ws.send(json!({"refresh": {"token": token}})).await;
        assert_eq!(ws.close_code().await, Some(code), "{what}");
    }
    // One that has expired makes an SDK fetch a new one: a disconnect, never an error.
    let short = w.node.token(&w.key, "anna", 1).await;
    until("it has expired", async || {
        let mut late = Ws::open(w.node.public()).await;
        let refused = late.call(json!({"connect": {"token": short}})).await.err()?;
        (refused["code"] == 109).then_some(())
    })
    .await;
    let mut ws = w.node.socket(&w.token).await;
    ws.send(json!({"refresh": {"token": short}})).await;
    assert_eq!(ws.close_code().await, Some(3005));
    let refused = w
        .node
        .socket(&w.token)
        .await
        .call(json!({"subscribe": {"channel": "inbox:main", "token": short}}))
        .await;
    assert_eq!(refused.unwrap_err()["code"], 109, "an SDK fetches a new subscription token");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_not_renewed_in_time_ends_its_socket() {
    let w = world(&[]).await;
    let short = w.node.token(&w.key, "anna", 2).await;
    let mut ws = w.node.socket(&short).await;
    // 25 s of grace behind its end.
    tokio::time::timeout(Duration::from_secs(60), async {
        assert_eq!(ws.close_code().await, Some(3005));
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_conversations_fits_into_one_frame() {
    let w = world(&[]).await;
    let preview = "é".repeat(100);
    for n in 0..12 {
        let items: Vec<Value> = (0..100)
            .map(|m| text_item(&format!("346{:08}", n * 100 + m), &format!("wamid.{n}.{m}"), &preview))
            .collect();
        assert_eq!(w.node.webhook("acme", "wa", &webhook_body(NUMBER, &items, &[])).await, 200);
    }
    let mut ws = w.node.socket(&w.token).await;
    let (mut seen, mut after) = (std::collections::HashSet::new(), Value::Null);
    loop {
        let mut request = json!({"limit": 1000});
        if after.is_string() {
            request["after"] = after;
        }
        let page = ws.rpc("conversation.list", request).await.unwrap();
        assert!(page.to_string().len() <= 512 * 1024);
        for conversation in page["conversations"].as_array().unwrap() {
            assert!(seen.insert(conversation["id"].as_str().unwrap().to_owned()), "twice");
        }
        after = page["next"].clone();
        if after.is_null() {
            break;
        }
    }
    assert_eq!(seen.len(), 1200);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_limit_has_its_code_and_says_when_to_come_back() {
    let limits = [
        ("PATCHBAY__LIMITS__CONNECTION_PER_SECOND", "50"),
        ("PATCHBAY__LIMITS__WEBHOOKS_PER_SECOND", "50"),
        ("PATCHBAY__LIMITS__STRANGERS_PER_SECOND", "50"),
    ];
    let w = world(&limits).await;
    let (id, _) = w.messages(0, 1, 10).await;
    let mut ws = w.node.socket(&w.token).await;
    // Its burst is what one reconnect brings; a flood is past it.
    let mut sent = Vec::new();
    for _ in 0..2000 {
        sent.push(
            ws.send(json!({"rpc": {"method": "typing.set", "data": {"conversation": id, "on": true}}})).await,
        );
    }
    let (mut good, mut limited) = (0, 0);
    for id in sent {
        match ws.reply(id).await {
            Ok(_) => good += 1,
            Err(e) => {
                assert_eq!((e["code"].as_u64(), e["temporary"].as_bool()), (Some(429), Some(true)), "{e}");
                assert!(
                    e["message"].as_str().unwrap().starts_with("rate_limited {\"retry_after_ms\":"),
                    "{e}"
                );
                limited += 1;
            }
        }
    }
    assert!(good >= 1024 && limited > 0, "{good} taken, {limited} refused");
    let body = webhook_body(NUMBER, &[text_item(LUZ, "wamid.again", "x")], &[]);
    let mut refused = 0;
    for _ in 0..1500 {
        refused += u32::from(w.node.webhook("acme", "wa", &body).await == 429);
    }
    assert!(refused > 0, "a flooded door says 429");
    let (mut last, mut answer) = (200, None);
    for _ in 0..3000 {
        let got =
            w.node.http.get(w.node.url("/api/v1/inboxes")).bearer_auth("nonsense").send().await.unwrap();
        last = got.status().as_u16();
        if last == 429 {
            answer = Some(got);
            break;
        }
    }
    assert_eq!(last, 429, "whoever guesses keys is slowed down");
    let answer = answer.unwrap();
    assert!(answer.headers().contains_key("retry-after"));
    assert!(answer.json::<Value>().await.unwrap()["retry_after_ms"].as_u64().unwrap() >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_far_past_its_limit_leaves_anothers_sends_alone() {
    let w = world(&[("PATCHBAY__LIMITS__TENANT_PER_SECOND", "100")]).await;
    let other = w.node.tenant("other", "http://127.0.0.1:9", "2002").await;
    let (id, _) = w.messages(0, 1, 10).await;
    let body = webhook_body("2002", &[text_item(LUZ, "wamid.o", "x")], &[]);
    assert_eq!(w.node.webhook("other", "wa", &body).await, 200);
    let flood = |n: usize| {
        let (node, key) = (&w.node, &w.key);
        let body = json!({"client_id": format!("f{n}"), "text": "x"});
        async move { node.api(key, "POST", &format!("/conversations/{id}/notes"), Some(body)).await.0 }
    };
    let quiet = conversation("other", "wa", LUZ);
    let calm = async {
        for n in 0..50 {
            let note = json!({"client_id": format!("c{n}"), "text": "x"});
            let (status, body) =
                w.node.api(&other, "POST", &format!("/conversations/{quiet}/notes"), Some(note)).await;
            assert_eq!(status, 200, "{body}");
        }
    };
    // A machine that is busy takes them so slowly that they are not too many: then there are more.
    let floods = async {
        for round in 0..20 {
            let flooded = futures_util::future::join_all((0..2000).map(|n| flood(round * 2000 + n))).await;
            // Some are too many for one conversation as well.
            assert!(flooded.iter().all(|s| [200, 429, 503].contains(s)));
            if flooded.contains(&429) {
                return;
            }
        }
        panic!("nothing was refused");
    };
    futures_util::future::join(floods, calm).await;
}
