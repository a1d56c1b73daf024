//! The whole loop through the real binary: webhook to socket, socket to provider, receipts home; and the contract's
//! answers to what is wrong.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::HashSet;

use common::{Node, Ws, conversation, text_item, until, webhook_body};
use patchbay_loadtest::simulator::{Customer, Faults, Number, Simulator};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

const NUMBER: &str = "1001";

struct World {
    node: Node,
    simulator: Simulator,
    key: String,
    _dir: tempfile::TempDir,
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let simulator = Simulator::start(
        "127.0.0.1:0".parse().unwrap(),
        1,
        Faults { delay_ms: 2, receipt_delay_ms: 5, ..Faults::default() },
    )
    .await
    .unwrap();
    let key = node.tenant("acme", &format!("http://{}", simulator.address()), NUMBER).await;
    let webhook_url = node.url("/webhooks/acme/wa");
    simulator.add_number(NUMBER, Number { webhook_url, app_secret: common::APP_SECRET.into() });
    World { node, simulator, key, _dir: dir }
}

fn kinds(entries: &[Value]) -> Vec<&str> {
    entries.iter().map(|e| e["type"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_customer_writes_an_agent_answers_receipts_climb() {
    let w = world().await;
    let id = conversation("acme", "wa", "34600111222");
    let token = w.node.token(&w.key, "anna", 600).await;
    let mut anna = w.node.socket(&token).await;
    anna.subscribe("inbox:main").await.unwrap();
    w.simulator.customer_writes(
        NUMBER,
        &Customer { from: "34600111222".into(), name: "Luz".into(), text: "hola".into() },
    );
    let push = anna.push().await.unwrap();
    let summary = &push["pub"]["data"]["conversation"];
    assert_eq!(
        (push["channel"].as_str(), summary["id"].as_str()),
        (Some("inbox:main"), Some(id.to_string().as_str()))
    );
    assert_eq!((summary["unread"].as_u64(), summary["contact"]["name"].as_str()), (Some(1), Some("Luz")));
    let channel = format!("conversation:{id}");
    let subscribed = anna.subscribe(&channel).await.unwrap();
    assert_eq!(
        (
            subscribed["offset"].as_u64(),
            subscribed["recoverable"].as_bool(),
            subscribed["positioned"].as_bool()
        ),
        (Some(2), Some(true), Some(true))
    );
    let message =
        json!({"conversation": id, "client_id": "c1", "content": {"type": "text", "text": "buenas"}});
    let sent = anna.rpc("message.send", message.clone()).await.unwrap();
    assert_eq!((sent["seq"].as_u64(), sent["duplicate"].as_bool()), (Some(3), Some(false)));
    let again = anna.rpc("message.send", message).await.unwrap();
    assert_eq!((again["seq"].as_u64(), again["duplicate"].as_bool()), (Some(3), Some(true)));
    let other = anna
        .rpc(
            "message.send",
            json!({"conversation": id, "client_id": "c1", "content": {"type": "text", "text": "other"}}),
        )
        .await
        .unwrap_err();
    assert_eq!((other["code"].as_u64(), other["temporary"].as_bool().unwrap_or(false)), (Some(409), false));
    let entries = until("the message is read", async || {
        let entries = w.node.entries(&w.key, id).await;
        (entries.last()?["data"]["status"] == "read").then_some(entries)
    })
    .await;
    assert_eq!(kinds(&entries[..3]), ["conversation.opened", "message.received", "message.sent"]);
    let statuses: Vec<&str> = entries[3..].iter().map(|e| e["data"]["status"].as_str().unwrap()).collect();
    let mut sorted = statuses.clone();
    sorted.sort_by_key(|s| ["sent", "delivered", "read"].iter().position(|x| x == s));
    assert_eq!(statuses, sorted, "receipts only climb");
    let record = w.simulator.record();
    assert_eq!(record.calls.len(), 1);
    assert_eq!(record.calls[0].callback, format!("{id}-3"));
    let read = anna.rpc("conversation.read", json!({"conversation": id, "up_to_seq": 99})).await.unwrap();
    assert!(read["seq"].as_u64().unwrap() >= 4);
    until("the customer sees that it was read", async || {
        (w.simulator.record().read.len() == 1).then_some(())
    })
    .await;
    let got = anna.rpc("conversation.get", json!({"conversation": id})).await.unwrap();
    assert_eq!(got["unread"].as_u64(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_covers_the_durable_log_across_a_kill() {
    let mut w = world().await;
    let id = conversation("acme", "wa", "34600111222");
    for n in 0..20 {
        let body = webhook_body(NUMBER, &[text_item("34600111222", &format!("m{n}"), "x")], &[]);
        assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    }
    let token = w.node.token(&w.key, "anna", 600).await;
    let channel = format!("conversation:{id}");
    let first = w.node.socket(&token).await.subscribe(&channel).await.unwrap();
    let epoch = first["epoch"].as_str().unwrap().to_owned();
    assert_eq!((first["offset"].as_u64(), epoch.len()), (Some(21), 8));
    w.node.kill().await;
    w.node = Node::start(&w.node.dir.clone()).await;
    let mut ws = w.node.socket(&token).await;
    let request = |offset: u64, epoch: &str, flag: u64| json!({"subscribe": {"channel": channel, "recover": true, "offset": offset, "epoch": epoch, "flag": flag}});
    let found = ws.call(request(5, &epoch, 1)).await.unwrap()["subscribe"].take();
    assert_eq!(
        (found["recovered"].as_bool(), found["was_recovering"].as_bool(), found["offset"].as_u64()),
        (Some(true), Some(true), Some(5))
    );
    let offsets: Vec<u64> =
        found["publications"].as_array().unwrap().iter().map(|p| p["offset"].as_u64().unwrap()).collect();
    assert_eq!(offsets, (6..=21).collect::<Vec<u64>>());
    for (offset, wrong) in [(5, "abcdefgh"), (22, epoch.as_str())] {
        ws.call(json!({"unsubscribe": {"channel": channel}})).await.unwrap();
        let found = ws.call(request(offset, wrong, 0)).await.unwrap()["subscribe"].take();
        assert_eq!(
            (
                found["recovered"].as_bool().unwrap_or(false),
                found["offset"].as_u64(),
                found["publications"].as_array()
            ),
            (false, Some(21), None)
        );
    }
    ws.call(json!({"unsubscribe": {"channel": channel}})).await.unwrap();
    assert_eq!(ws.call(request(99, &epoch, 3)).await.unwrap_err()["code"], 112);
    let page = |body: Value| json!({"history": body});
    let h = ws.call(page(json!({"channel": channel, "limit": 3}))).await.unwrap();
    let seqs = |h: &Value| {
        h["history"]["publications"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["offset"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!((seqs(&h), h["history"]["offset"].as_u64()), (vec![1, 2, 3], Some(21)));
    let h = ws.call(page(json!({"channel": channel, "limit": 3, "reverse": true}))).await.unwrap();
    assert_eq!(seqs(&h), [21, 20, 19]);
    let h = ws
        .call(page(json!({"channel": channel, "limit": 2, "since": {"offset": 10, "epoch": epoch}})))
        .await
        .unwrap();
    assert_eq!(seqs(&h), [11, 12]);
    let h = ws
        .call(page(
            json!({"channel": channel, "limit": 2, "reverse": true, "since": {"offset": 10, "epoch": epoch}}),
        ))
        .await
        .unwrap();
    assert_eq!(seqs(&h), [9, 8]);
    let h = ws.call(page(json!({"channel": channel}))).await.unwrap();
    assert_eq!((seqs(&h), h["history"]["offset"].as_u64()), (vec![], Some(21)));
    assert_eq!(seqs(&ws.call(page(json!({"channel": channel, "limit": -1}))).await.unwrap()).len(), 21);
    let wrong = ws
        .call(page(json!({"channel": channel, "limit": 1, "since": {"offset": 1, "epoch": "nonsense"}})))
        .await
        .unwrap_err();
    assert_eq!(wrong["code"], 112);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_body_fifty_times_in_parallel_is_one_entry() {
    let w = world().await;
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.same", "x")], &[]);
    let posts = (0..50).map(|_| w.node.webhook("acme", "wa", &body));
    let answers: HashSet<u16> = futures_util::future::join_all(posts).await.into_iter().collect();
    assert_eq!(answers, HashSet::from([200]));
    let entries = w.node.entries(&w.key, conversation("acme", "wa", "34600111222")).await;
    assert_eq!(kinds(&entries), ["conversation.opened", "message.received"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_poisoned_item_among_ninety_nine_good_ones() {
    let w = world().await;
    let mut items: Vec<Value> =
        (0..99).map(|n| text_item(&format!("3460011{n:04}"), &format!("wamid.{n}"), "x")).collect();
    items.insert(50, json!({"type": "text", "text": {"body": "no id, no sender"}}));
    assert_eq!(w.node.webhook("acme", "wa", &webhook_body(NUMBER, &items, &[])).await, 200);
    let listed = w.node.get(&w.key, "/conversations?limit=1000").await;
    assert_eq!(listed["conversations"].as_array().unwrap().len(), 99);
    let dead = w.node.get(&w.key, "/dead-letters").await;
    let letters = dead["dead_letters"].as_array().unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0]["item"]["text"]["body"], "no id, no sender");
    let path = format!("/dead-letters/{}", letters[0]["id"].as_str().unwrap());
    assert_eq!(w.node.api(&w.key, "DELETE", &path, None).await.0, 204);
    assert_eq!(w.node.api(&w.key, "DELETE", &path, None).await.0, 404);
    assert_eq!(w.node.api(&w.key, "GET", "/cluster/nodes", None).await.0, 403);
    let shards = if common::on_real_engines() { 64 } else { 1024 };
    let nodes = w.node.get(w.node.operator_key(), "/cluster/nodes").await;
    assert_eq!(
        (nodes["nodes"].as_array().unwrap().len(), nodes["nodes"][0]["shards"].as_u64()),
        (1, Some(shards))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn webhooks_get_the_contracts_answers() {
    let w = world().await;
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.1", "x")], &[]);
    let bad = w.node.signed("acme", "wa", &body, "wrong").await;
    assert_eq!(bad.0, 401);
    for (tenant, account) in [("nobody", "wa"), ("acme", "none"), ("ACME", "%20")] {
        assert_eq!(
            w.node.signed(tenant, account, &body, common::APP_SECRET).await,
            bad,
            "{tenant}/{account}"
        );
    }
    assert_eq!(w.node.webhook("acme", "wa", b"not json").await, 400);
    let large = vec![b' '; (4 << 20) + 1];
    assert_eq!(w.node.webhook("acme", "wa", &large).await, 413);
    let get = async |query: &str| {
        let answer = w.node.http.get(w.node.url(&format!("/webhooks/acme/wa?{query}"))).send().await.unwrap();
        let kind = answer.headers().get("content-type").map(|v| v.to_str().unwrap().to_owned());
        (answer.status().as_u16(), kind, answer.text().await.unwrap())
    };
    let (status, kind, text) =
        get("hub.mode=subscribe&hub.verify_token=verify&hub.challenge=1158201444").await;
    assert_eq!((status, kind.as_deref(), text.as_str()), (200, Some("text/plain"), "1158201444"));
    assert_eq!(get("hub.mode=subscribe&hub.verify_token=wrong&hub.challenge=1").await.0, 403);
    let dead = w.node.get(&w.key, "/dead-letters").await;
    assert_eq!(dead["dead_letters"].as_array().unwrap().len(), 1, "the signed body that is no JSON");
    assert!(
        w.node.get(&w.key, "/conversations").await["conversations"].as_array().unwrap().is_empty(),
        "nothing stored"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_get_the_contracts_answers() {
    let w = world().await;
    let token = w.node.token(&w.key, "anna", 600).await;
    let open = async || Ws::open(w.node.public()).await;
    let mut ws = open().await;
    ws.send(json!({"subscribe": {"channel": "inbox:main"}})).await;
    assert_eq!(ws.close_code().await, Some(3501), "a first command other than connect");
    let mut ws = w.node.socket(&token).await;
    ws.send(json!({"connect": {"token": token}})).await;
    assert_eq!(ws.close_code().await, Some(3501), "a second connect");
    for garbage in ["", "nonsense", "[1]", "{\"id\":\"x\"}"] {
        let mut ws = w.node.socket(&token).await;
        let _ = ws.send_raw(Message::text(garbage)).await;
        assert_eq!(ws.close_code().await, Some(3501), "{garbage:?}");
    }
    let mut ws = w.node.socket(&token).await;
    let _ = ws.send_raw(Message::binary(vec![0xff; 10])).await;
    assert_eq!(ws.close_code().await, Some(3501), "a binary frame to a JSON socket");
    let mut ws = w.node.socket(&token).await;
    let _ = ws
        .send_raw(Message::text(format!("{{\"id\":9,\"send\":{{\"data\":\"{}\"}}}}", "x".repeat(70_000))))
        .await;
    assert_eq!(ws.close_code().await, Some(1009), "a command over 64 KiB");
    for bad in ["", "a.b.c", &format!("{}x", token)] {
        let mut ws = open().await;
        ws.send(json!({"connect": {"token": bad}})).await;
        assert_eq!(ws.close_code().await, Some(3500), "{bad:?}");
    }
    let parts: Vec<&str> = token.split('.').collect();
    let mut ws = open().await;
    let none = format!("eyJhbGciOiJub25lIn0.{}.", parts[1]);
    ws.send(json!({"connect": {"token": none}})).await;
    assert_eq!(ws.close_code().await, Some(3500), "alg none");

    let mut ws = w.node.socket(&token).await;
    for (channel, code) in [
        ("inbox:none", 103),
        ("conversation:117hm6cewq8ptd8sg97y11y4xd", 103),
        ("conversation:x", 103),
        ("agent:bob", 103),
        ("cluster", 103),
        ("cluster:", 103),
        ("news:1", 102),
    ] {
        assert_eq!(ws.subscribe(channel).await.unwrap_err()["code"], code, "{channel}");
    }
    ws.subscribe("inbox:main").await.unwrap();
    assert_eq!(ws.subscribe("inbox:main").await.unwrap_err()["code"], 105);
    assert_eq!(ws.rpc("nothing", json!({})).await.unwrap_err()["code"], 104);
    let unknown = ws.rpc("message.send", json!({"conversation": "117hm6cewq8ptd8sg97y11y4xd", "client_id": "1", "content": {"type": "text", "text": "x"}})).await.unwrap_err();
    assert_eq!(unknown["code"], 404);
    let strict = ws
        .rpc("typing.set", json!({"conversation": "117hm6cewq8ptd8sg97y11y4xd", "on": true, "x": 1}))
        .await
        .unwrap_err();
    assert_eq!(strict["code"], 400);
    assert!(
        strict["message"].as_str().unwrap().starts_with("invalid_request {")
            && strict["message"].as_str().unwrap().contains("`x`"),
        "{strict}"
    );
    assert!(ws.call(json!({"unsubscribe": {"channel": "never"}})).await.is_ok());
    assert_eq!(
        ws.call(json!({"publish": {"channel": "inbox:main", "data": {}}})).await.unwrap_err()["code"],
        108
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_are_walls() {
    let w = world().await;
    let other = w.node.tenant("other", "http://127.0.0.1:9", "2002").await;
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.1", "x")], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let id = conversation("acme", "wa", "34600111222");
    let unknown = conversation("acme", "wa", "nobody");
    for path in ["", "/entries"] {
        let theirs = w.node.api(&other, "GET", &format!("/conversations/{id}{path}"), None).await;
        assert_eq!(theirs.0, 404);
        assert_eq!(theirs, w.node.api(&other, "GET", &format!("/conversations/{unknown}{path}"), None).await);
    }
    let note = Some(json!({"client_id": "1", "text": "x"}));
    assert_eq!(w.node.api(&other, "POST", &format!("/conversations/{id}/notes"), note).await.0, 404);
    assert!(w.node.get(&other, "/conversations").await["conversations"].as_array().unwrap().is_empty());
    let token = w.node.token(&other, "anna", 600).await;
    let mut ws = w.node.socket(&token).await;
    assert_eq!(ws.subscribe(&format!("conversation:{id}")).await.unwrap_err()["code"], 103);
    assert_eq!(w.node.api("wrong", "GET", "/conversations", None).await.0, 401);
    assert_eq!(w.node.api(&other, "POST", "/tenants", Some(json!({"id": "x", "name": "x"}))).await.0, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_who_loses_an_inbox_or_its_tokens_is_told() {
    let w = world().await;
    w.node.api(&w.key, "PUT", "/inboxes/second", Some(json!({"name": "Second"}))).await;
    let agent = |inbox: &str| Some(json!({"name": "Bob", "role": "agent", "inboxes": [inbox]}));
    assert_eq!(w.node.api(&w.key, "PUT", "/agents/bob", agent("main")).await.0, 201);
    let token = w.node.token(&w.key, "bob", 600).await;
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.1", "x")], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let id = conversation("acme", "wa", "34600111222");
    let mut bob = w.node.socket(&token).await;
    bob.subscribe(&format!("conversation:{id}")).await.unwrap();
    assert_eq!(
        bob.rpc("conversation.assign", json!({"conversation": id, "agent": "anna"})).await.unwrap_err()["code"],
        103,
        "assigns himself or nobody"
    );
    bob.rpc("conversation.assign", json!({"conversation": id, "agent": "bob"})).await.unwrap();
    assert_eq!(w.node.api(&w.key, "PUT", "/agents/bob", agent("second")).await.0, 200);
    loop {
        let push = bob.push().await.unwrap();
        if push["unsubscribe"].is_object() {
            assert!(push["unsubscribe"]["code"].as_u64().unwrap() < 2500);
            break;
        }
    }
    assert_eq!(bob.rpc("conversation.get", json!({"conversation": id})).await.unwrap_err()["code"], 404);
    assert_eq!(w.node.api(&w.key, "DELETE", "/agents/bob/tokens", None).await.0, 204);
    assert_eq!(bob.close_code().await, Some(3503));
    let mut again = Ws::open(w.node.public()).await;
    again.send(json!({"connect": {"token": token}})).await;
    assert_eq!(again.close_code().await, Some(3500));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_window_closes_and_templates_still_go() {
    let w = world().await;
    let old =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() - 25 * 3600;
    let item = json!({"from": "34600111222", "id": "wamid.old", "timestamp": old.to_string(), "type": "text", "text": {"body": "long ago"}});
    assert_eq!(w.node.webhook("acme", "wa", &webhook_body(NUMBER, &[item], &[])).await, 200);
    let id = conversation("acme", "wa", "34600111222");
    let send = async |client_id: &str, content: Value| {
        w.node
            .api(
                &w.key,
                "POST",
                &format!("/conversations/{id}/messages"),
                Some(json!({"client_id": client_id, "content": content})),
            )
            .await
    };
    let (status, problem) = send("1", json!({"type": "text", "text": "late"})).await;
    assert_eq!((status, problem["code"].as_str()), (409, Some("window_closed")));
    let (status, sent) = send("2", json!({"type": "template", "name": "hello", "language": "en_US"})).await;
    assert_eq!(status, 200, "{sent}");
    until("only the template was called", async || {
        let calls = w.simulator.record().calls;
        (calls.len() == 1 && calls[0].kind == "template").then_some(())
    })
    .await;
    let new = Some(
        json!({"to": "+34 600", "client_id": "x", "content": {"type": "template", "name": "hello", "language": "en"}}),
    );
    assert_eq!(w.node.api(&w.key, "POST", "/accounts/wa/messages", new).await.0, 422);
    let new = Some(
        json!({"to": "+34600999888", "client_id": "x", "content": {"type": "template", "name": "hello", "language": "en"}}),
    );
    let (status, sent) = w.node.api(&w.key, "POST", "/accounts/wa/messages", new.clone()).await;
    assert_eq!(
        (status, sent["conversation"].as_str()),
        (200, Some(conversation("acme", "wa", "34600999888").to_string().as_str()))
    );
    assert_eq!(w.node.api(&w.key, "POST", "/accounts/wa/messages", new).await.1["duplicate"], json!(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_drains_on_sigterm_and_its_snooze_survives() {
    let mut w = world().await;
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.1", "x")], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let id = conversation("acme", "wa", "34600111222");
    let until_at = patchbay_protocol::Timestamp::from_millis(
        patchbay_actors::clock::Clock::System.now().as_millis() + 1500,
    );
    let (status, _) = w
        .node
        .api(&w.key, "POST", &format!("/conversations/{id}/snooze"), Some(json!({"until": until_at})))
        .await;
    assert_eq!(status, 200);
    let token = w.node.token(&w.key, "anna", 600).await;
    let mut ws = w.node.socket(&token).await;
    let (code, closed) = tokio::join!(w.node.terminate(), ws.close_code());
    assert_eq!((code, closed), (Some(0), Some(3001)));
    w.node = Node::start(&w.node.dir.clone()).await;
    until("the snooze is over", async || {
        let entries = w.node.entries(&w.key, id).await;
        (entries.last()?["type"] == "conversation.reopened").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_a_thousand_is_taken_and_too_much_missed_is_paged() {
    let w = world().await;
    let mut items: Vec<Value> =
        (0..600).map(|n| text_item(&format!("3460011{n:04}"), &format!("wamid.s{n}"), "x")).collect();
    items.extend((0..400).map(|n| text_item("34600111222", &format!("wamid.{n}"), "x")));
    assert_eq!(w.node.webhook("acme", "wa", &webhook_body(NUMBER, &items, &[])).await, 200);
    assert_eq!(
        w.node.get(&w.key, "/conversations?limit=1000").await["conversations"].as_array().unwrap().len(),
        601
    );
    let id = conversation("acme", "wa", "34600111222");
    let channel = format!("conversation:{id}");
    let token = w.node.token(&w.key, "anna", 600).await;
    let mut ws = w.node.socket(&token).await;
    let request = json!({"subscribe": {"channel": channel, "recover": true, "offset": 1, "epoch": ""}});
    let found = ws.call(request).await.unwrap()["subscribe"].take();
    assert_eq!((found["recovered"].as_bool().unwrap_or(false), found["offset"].as_u64()), (false, Some(401)));
    let mut seen: Vec<u64> = vec![1];
    while *seen.last().unwrap() < 401 {
        let since = json!({"offset": seen.last(), "epoch": found["epoch"]});
        let page =
            ws.call(json!({"history": {"channel": channel, "limit": 150, "since": since}})).await.unwrap();
        seen.extend(
            page["history"]["publications"].as_array().unwrap().iter().map(|p| p["offset"].as_u64().unwrap()),
        );
    }
    assert_eq!(seen, (1..=401).collect::<Vec<u64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn colleagues_see_each_other_and_the_customer_sees_typing() {
    let w = world().await;
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.1", "x")], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let id = conversation("acme", "wa", "34600111222");
    let channel = format!("conversation:{id}");
    let bob = json!({"name": "Bob", "role": "agent", "inboxes": ["main"]});
    assert_eq!(w.node.api(&w.key, "PUT", "/agents/bob", Some(bob)).await.0, 201);
    let mut anna = w.node.socket(&w.node.token(&w.key, "anna", 600).await).await;
    anna.call(json!({"subscribe": {"channel": channel, "join_leave": true}})).await.unwrap();
    let mut bob = w.node.socket(&w.node.token(&w.key, "bob", 600).await).await;
    bob.subscribe(&channel).await.unwrap();
    let next = async |ws: &mut Ws, what: &str| loop {
        let push = ws.push().await.unwrap();
        if !push[what].is_null() && push["channel"] == json!(channel) {
            return push[what].clone();
        }
    };
    let joined = next(&mut anna, "join").await;
    assert_eq!(
        (joined["info"]["user"].as_str(), joined["info"]["conn_info"]["name"].as_str()),
        (Some("bob"), Some("Bob"))
    );
    for _ in 0..3 {
        bob.rpc("typing.set", json!({"conversation": id, "on": true})).await.unwrap();
    }
    let typing = next(&mut anna, "pub").await;
    assert_eq!((typing["data"]["type"].as_str(), typing["offset"].as_u64()), (Some("typing"), None));
    until("the customer sees it once in 20 s", async || {
        (w.simulator.record().typing.len() == 1).then_some(())
    })
    .await;
    let stats = anna.call(json!({"presence_stats": {"channel": channel}})).await.unwrap();
    assert_eq!(
        (stats["presence_stats"]["num_clients"].as_u64(), stats["presence_stats"]["num_users"].as_u64()),
        (Some(2), Some(2))
    );
    let away = bob.rpc("presence.set", json!({"state": "away"})).await.unwrap();
    assert_eq!((away["state"].as_str(), away["sessions"].as_u64()), (Some("away"), Some(1)));
    drop(bob);
    assert_eq!(next(&mut anna, "leave").await["info"]["user"], "bob");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_receipt_waits_for_its_message_and_if_seq_protects_the_customer() {
    let w = world().await;
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.1", "x")], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let id = conversation("acme", "wa", "34600111222");
    // A receipt without callback data for a message that nobody knows: kept, not refused, and no entry.
    let early = json!({"id": "wamid.unknown", "status": "read", "timestamp": "1700000000", "recipient_id": "34600111222"});
    assert_eq!(w.node.webhook("acme", "wa", &webhook_body(NUMBER, &[], &[early])).await, 200);
    // One that names an entry that is no message of ours changes nothing either.
    let wrong = json!({"id": "wamid.x", "status": "read", "timestamp": "1700000000", "recipient_id": "34600111222", "biz_opaque_callback_data": format!("{id}-2")});
    assert_eq!(w.node.webhook("acme", "wa", &webhook_body(NUMBER, &[], &[wrong])).await, 200);
    assert_eq!(w.node.entries(&w.key, id).await.len(), 2);
    let stale = json!({"client_id": "1", "content": {"type": "text", "text": "x"}, "if_seq": 1});
    let (status, problem) =
        w.node.api(&w.key, "POST", &format!("/conversations/{id}/messages"), Some(stale)).await;
    assert_eq!(
        (status, problem["code"].as_str(), problem["last_seq"].as_u64()),
        (409, Some("conflict"), Some(2))
    );
    let fresh = json!({"client_id": "1", "content": {"type": "text", "text": "x"}, "if_seq": 2});
    assert_eq!(
        w.node.api(&w.key, "POST", &format!("/conversations/{id}/messages"), Some(fresh)).await.0,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_short_of_memory_forgets_and_still_knows() {
    let dir = tempfile::tempdir().unwrap();
    // Less than the process takes by itself: whoever has nothing to do is forgotten at every look.
    let node = Node::start_with(dir.path(), &[("PATCHBAY__LIMITS__MEMORY", "1MiB")]).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", NUMBER).await;
    let id = conversation("acme", "wa", "34600111222");
    for n in 0..3 {
        let body = webhook_body(NUMBER, &[text_item("34600111222", &format!("wamid.{n}"), "x")], &[]);
        assert_eq!(node.webhook("acme", "wa", &body).await, 200);
        until("everything is forgotten", async || {
            node.metrics().await.lines().any(|l| l == "patchbay_actors_active 0").then_some(())
        })
        .await;
        assert_eq!(node.webhook("acme", "wa", &body).await, 200, "a repeat after it was forgotten");
        assert_eq!(node.entries(&key, id).await.len(), n + 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_the_calls_under_way() {
    let mut w = world().await;
    let id = conversation("acme", "wa", "34600111222");
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.in", "x")], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let faults = Faults { delay_ms: 3000, receipt_delay_ms: 1, missing_receipts: 1000, ..Faults::default() };
    w.simulator.set_faults(faults);
    let message = json!({"client_id": "c", "content": {"type": "text", "text": "x"}});
    let (status, sent) =
        w.node.api(&w.key, "POST", &format!("/conversations/{id}/messages"), Some(message)).await;
    assert_eq!(status, 200, "{sent}");
    until("the call is under way", async || (w.simulator.record_open_calls() == 1).then_some(())).await;
    assert_eq!(w.node.terminate().await, Some(0));
    w.node = Node::start(&w.node.dir.clone()).await;
    let told: Vec<String> = until("its outcome is known", async || {
        let entries = w.node.entries(&w.key, id).await;
        let told: Vec<String> = entries
            .iter()
            .filter(|e| e["data"]["message_seq"] == sent["seq"])
            .map(|e| e["data"]["status"].as_str().unwrap().to_owned())
            .collect();
        (!told.is_empty()).then_some(told)
    })
    .await;
    assert_eq!(told, ["sent"], "nobody is left in doubt by a restart that was asked for");
    assert_eq!(w.simulator.record().calls.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_for_a_conversation_is_unsupported_and_kept_as_it_came() {
    let w = world().await;
    let id = conversation("acme", "wa", "34600111222");
    let token = w.node.token(&w.key, "anna", 600).await;
    let mut ws = w.node.socket(&token).await;
    let small = webhook_body(NUMBER, &[text_item("34600111222", "wamid.1", "x")], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &small).await, 200);
    ws.subscribe(&format!("conversation:{id}")).await.unwrap();
    let large = "y".repeat(1_200_000);
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.2", &large)], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let push = ws.push().await.unwrap();
    assert_eq!(push["pub"]["data"]["data"]["content"]["type"], "unsupported");
    let dead = w.node.get(&w.key, "/dead-letters").await;
    assert_eq!(dead["dead_letters"][0]["item"]["text"]["body"].as_str().map(str::len), Some(large.len()));
    let message = json!({"client_id": "c", "content": {"type": "text", "text": "z".repeat(70_000)}});
    let (status, _) =
        w.node.api(&w.key, "POST", &format!("/conversations/{id}/messages"), Some(message)).await;
    assert_eq!(status, 413);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hundred_webhooks_at_once_are_all_taken() {
    let w = world().await;
    let bodies: Vec<Vec<u8>> = (0..300)
        .map(|n| webhook_body(NUMBER, &[text_item(&format!("3460{n:04}"), &format!("wamid.{n}"), "x")], &[]))
        .collect();
    let posts = bodies.iter().map(|body| w.node.webhook("acme", "wa", body));
    let answers: HashSet<u16> = futures_util::future::join_all(posts).await.into_iter().collect();
    assert_eq!(answers, HashSet::from([200]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_says_where_it_may_not_call_and_lists_its_status() {
    let w = world().await;
    let account = |base: &str| json!({"connector": "whatsapp", "inbox": "main", "name": "W", "external_id": "2", "credentials": {"app_secret": "s", "verify_token": "v", "access_token": "t"}, "settings": {"api_base": base}});
    let (status, problem) =
        w.node.api(&w.key, "PUT", "/accounts/other", Some(account("http://169.254.169.254"))).await;
    assert_eq!((status, problem["code"].as_str()), (422, Some("invalid_request")));
    assert!(problem["detail"].as_str().unwrap().contains("settings.api_base"), "{problem}");
    // The provider says that the account cannot send: it pauses and shows it, one by one and in the list.
    w.simulator.set_faults(Faults { final_errors: 0, ..Faults::default() });
    let event = json!({"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [{"field": "account_update", "value": {"event": "DISABLED_UPDATE", "ban_info": {"waba_ban_state": "DISABLE"}}}]}]});
    assert_eq!(w.node.webhook("acme", "wa", event.to_string().as_bytes()).await, 200);
    let listed = until("it is paused", async || {
        let listed = w.node.get(&w.key, "/accounts").await["accounts"][0].take();
        (listed["status"] == "paused").then_some(listed)
    })
    .await;
    assert!(listed["reason"].is_string() && listed["limits"].is_object(), "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reaction_goes_out_like_a_message_and_not_past_the_window() {
    let w = world().await;
    let id = conversation("acme", "wa", "34600111222");
    let token = w.node.token(&w.key, "anna", 600).await;
    let mut ws = w.node.socket(&token).await;
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.in", "x")], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let react = json!({"conversation": id, "message_seq": 2, "emoji": "👍"});
    let seq = ws.rpc("message.react", react).await.unwrap()["seq"].as_u64().unwrap();
    let call = until("it is called", async || w.simulator.record().calls.first().cloned()).await;
    assert_eq!(call.callback, format!("{id}-{seq}"));
    until("its receipts come home", async || {
        let entries = w.node.entries(&w.key, id).await;
        // A receipt that overtakes the provider's answer says more than that: `sent` adds nothing then.
        let is_word = |e: &Value| matches!(e["data"]["status"].as_str(), Some("sent" | "delivered" | "read"));
        let told = entries.iter().any(|e| e["data"]["message_seq"] == json!(seq) && is_word(e));
        told.then_some(())
    })
    .await;
    let old = json!({"from": "34600999888", "id": "wamid.old", "timestamp": "1700000000", "type": "text", "text": {"body": "x"}});
    assert_eq!(w.node.webhook("acme", "wa", &webhook_body(NUMBER, &[old], &[])).await, 200);
    let old = conversation("acme", "wa", "34600999888");
    let closed = ws.rpc("message.react", json!({"conversation": old, "message_seq": 2, "emoji": "👍"})).await;
    assert_eq!(closed.unwrap_err()["code"], 420);
    let edit = ws
        .rpc(
            "message.edit",
            json!({"conversation": id, "message_seq": 2, "content": {"type": "text", "text": "x"}}),
        )
        .await;
    assert_eq!(edit.unwrap_err()["code"], 421);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_serves_reads_and_recovers() {
    if common::on_real_engines() {
        // It is the embedded store's own disk that is meant.
        return;
    }
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let found = rustix::fs::statvfs(dir.path()).unwrap();
    let min_free = found.f_bavail * found.f_frsize - 400 * MIB;
    let min_free = format!("{min_free}B");
    // Whoever has nothing to do is forgotten soon: also what cannot write a last word is read again.
    let env = [("PATCHBAY__STORAGE__MIN_FREE", min_free.as_str()), ("PATCHBAY__LIMITS__IDLE_AFTER", "1s")];
    let mut node = Node::start_with(dir.path(), &env).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", NUMBER).await;
    let id = conversation("acme", "wa", "34600111222");
    let webhook = async |node: &Node, n: u32| {
        let body = webhook_body(NUMBER, &[text_item("34600111222", &format!("wamid.{n}"), "x")], &[]);
        node.webhook("acme", "wa", &body).await
    };
    let ready = async |node: &Node| {
        let url = format!("http://{}/readyz", node.ready["ops"].as_str().unwrap());
        node.http.get(url).send().await.unwrap().status().as_u16()
    };
    assert_eq!((webhook(&node, 1).await, ready(&node).await), (200, 200));
    // What its next reader needs is written when it is forgotten.
    let forgotten = async |node: &Node| {
        until("everybody is forgotten", async || {
            node.metrics().await.lines().any(|l| l == "patchbay_actors_active 0").then_some(())
        })
        .await;
    };
    forgotten(&node).await;
    let filler = dir.path().join("filler");
    std::fs::write(&filler, vec![1; usize::try_from(600 * MIB).unwrap()]).unwrap();
    until("it is full", async || (ready(&node).await == 503).then_some(())).await;
    assert_eq!(webhook(&node, 2).await, 503, "the provider sends it again");
    let note = json!({"client_id": "n", "text": "x"});
    let (status, problem) = node.api(&key, "POST", &format!("/conversations/{id}/notes"), Some(note)).await;
    assert_eq!((status, problem["code"].as_str()), (503, Some("overloaded")), "{problem}");
    assert!(problem["retry_after_ms"].as_u64().is_some());
    let inbox = Some(json!({"name": "Second"}));
    let (status, problem) = node.api(&key, "PUT", "/inboxes/second", inbox).await;
    assert_eq!((status, problem["code"].as_str()), (503, Some("overloaded")), "{problem}");
    let upload =
        node.http.post(node.url("/api/v1/media")).bearer_auth(&key).body("a file").send().await.unwrap();
    assert_eq!(upload.status(), 503);
    // An agent comes, reads and goes.
    let token = node.token(&key, "anna", 600).await;
    let mut ws = node.socket(&token).await;
    let subscribed = ws.subscribe(&format!("conversation:{id}")).await.unwrap();
    assert_eq!(subscribed["offset"], 2);
    drop(ws);
    forgotten(&node).await;
    assert_eq!(node.entries(&key, id).await.len(), 2, "reads go on");
    // Also over a restart.
    node.kill().await;
    drop(node);
    let node = Node::start_with(dir.path(), &env).await;
    assert_eq!(ready(&node).await, 503);
    assert_eq!(node.entries(&key, id).await.len(), 2, "reads go on after a start on a full disk");
    std::fs::remove_file(&filler).unwrap();
    until("there is room again", async || (ready(&node).await == 200).then_some(())).await;
    until("it takes again", async || (webhook(&node, 2).await == 200).then_some(())).await;
    assert_eq!(node.entries(&key, id).await.len(), 3);
    node.socket(&token).await.subscribe(&format!("conversation:{id}")).await.unwrap();
}
