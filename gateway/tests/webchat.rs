//! Web chat: a visitor on our own socket, what it may do, and above all what it never sees.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Node, Ws, conversation, until};
use serde_json::{Value, json};

struct World {
    node: Node,
    key: String,
    _dir: tempfile::TempDir,
}

const VISITOR: &str = "v-1";

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", "1001").await;
    let chat = json!({"connector": "webchat", "inbox": "main", "name": "Chat", "external_id": "site", "credentials": {}});
    let (status, body) = node.api(&key, "PUT", "/accounts/chat", Some(chat)).await;
    assert_eq!(status, 201, "{body}");
    World { node, key, _dir: dir }
}

impl World {
    async fn token(&self, visitor: &str) -> String {
        let path = format!("/accounts/chat/contacts/{visitor}/tokens");
        let (status, body) =
            self.node.api(&self.key, "POST", &path, Some(json!({"name": "Luz", "ttl_s": 600}))).await;
        assert_eq!(status, 200, "{body}");
        assert!(body["expires_at"].is_string());
        body["token"].as_str().unwrap().to_owned()
    }

    async fn visitor(&self, visitor: &str) -> Ws {
        self.node.socket(&self.token(visitor).await).await
    }

    async fn agent(&self) -> Ws {
        self.node.socket(&self.node.token(&self.key, "anna", 600).await).await
    }
}

fn text(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

/// The next entry that is pushed, past everything that is no entry.
async fn entry(ws: &mut Ws) -> Value {
    loop {
        let push = ws.push().await.unwrap();
        if push["pub"]["data"]["seq"].is_u64() {
            assert_eq!(push["pub"]["offset"], push["pub"]["data"]["seq"]);
            return push["pub"]["data"].clone();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_writes_an_agent_answers_and_receipts_climb() {
    let w = world().await;
    let id = conversation("acme", "chat", VISITOR);
    let channel = format!("conversation:{id}");
    let mut luz = w.visitor(VISITOR).await;
    let before = luz.subscribe(&channel).await.unwrap();
    assert_eq!((before["recoverable"].as_bool(), before["offset"].as_u64().unwrap_or(0)), (Some(true), 0));
    let send = json!({"conversation": id, "client_id": "c1", "content": text("hola")});
    let sent = luz.rpc("message.send", send.clone()).await.unwrap();
    assert_eq!((sent["seq"].as_u64(), sent["duplicate"].as_bool()), (Some(2), Some(false)));
    let again = luz.rpc("message.send", send).await.unwrap();
    assert_eq!((again["seq"].as_u64(), again["duplicate"].as_bool()), (Some(2), Some(true)));
    let other = json!({"conversation": id, "client_id": "c1", "content": text("other")});
    assert_eq!(luz.rpc("message.send", other).await.unwrap_err()["code"], 409);
    let own = entry(&mut luz).await;
    assert_eq!(
        (own["type"].as_str(), own["data"]["provider_id"].as_str()),
        (Some("message.received"), Some("c1"))
    );
    assert_eq!(own["actor"], json!({"type": "contact"}));

    let mut anna = w.agent().await;
    anna.subscribe(&channel).await.unwrap();
    let summary = anna.rpc("conversation.get", json!({"conversation": id})).await.unwrap();
    assert_eq!((summary["contact"]["name"].as_str(), summary["unread"].as_u64()), (Some("Luz"), Some(1)));
    assert_eq!(summary["contact"]["address"], VISITOR);
    let reply = json!({"conversation": id, "client_id": "a1", "content": text("buenas")});
    let seq = anna.rpc("message.send", reply).await.unwrap()["seq"].as_u64().unwrap();
    let got = entry(&mut luz).await;
    assert_eq!((got["type"].as_str(), got["seq"].as_u64()), (Some("message.sent"), Some(seq)));
    assert_eq!(got["actor"], json!({"type": "agent", "name": "Anna"}), "a name, never an id");
    let status = entry(&mut luz).await;
    assert_eq!(
        (status["data"]["message_seq"].as_u64(), status["data"]["status"].as_str()),
        (Some(seq), Some("sent"))
    );
    luz.rpc("conversation.read", json!({"conversation": id, "up_to_seq": 99})).await.unwrap();
    let told = until("the agent is told", async || {
        let entries = w.node.entries(&w.key, id).await;
        entries.into_iter().find(|e| e["data"]["message_seq"] == json!(seq) && e["data"]["status"] == "read")
    })
    .await;
    assert_eq!(told["actor"], json!({"type": "contact", "id": VISITOR}));
    // Where the channel can, what was sent is changed and taken back.
    let edit = json!({"conversation": id, "message_seq": seq, "content": text("buenos días")});
    anna.rpc("message.edit", edit).await.unwrap();
    anna.rpc("message.react", json!({"conversation": id, "message_seq": 2, "emoji": "👍"})).await.unwrap();
    anna.rpc("message.delete", json!({"conversation": id, "message_seq": seq})).await.unwrap();
    let mut kinds = Vec::new();
    while kinds.last().map(String::as_str) != Some("message.deleted") {
        kinds.push(entry(&mut luz).await["type"].as_str().unwrap().to_owned());
    }
    kinds.retain(|k| k != "message.status");
    assert_eq!(kinds, ["message.edited", "message.reacted", "message.deleted"]);
    let (status, sent) = w
        .node
        .api(
            &w.key,
            "POST",
            "/accounts/chat/messages",
            Some(json!({"to": "v-2", "client_id": "1", "content": text("hello")})),
        )
        .await;
    assert_eq!(
        (status, sent["conversation"].as_str()),
        (200, Some(conversation("acme", "chat", "v-2").to_string().as_str()))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_the_businesss_own_never_reaches_a_visitor() {
    let mut w = world().await;
    let id = conversation("acme", "chat", VISITOR);
    let channel = format!("conversation:{id}");
    let (mut luz, mut anna) = (w.visitor(VISITOR).await, w.agent().await);
    luz.call(json!({"subscribe": {"channel": channel, "join_leave": true}})).await.unwrap();
    luz.rpc("message.send", json!({"conversation": id, "client_id": "c1", "content": text("hola")}))
        .await
        .unwrap();
    anna.subscribe(&channel).await.unwrap();
    let secret = "do not tell the visitor";
    for (method, data) in [
        ("note.add", json!({"conversation": id, "client_id": "n", "text": secret})),
        ("conversation.assign", json!({"conversation": id, "agent": "anna"})),
        ("conversation.tag", json!({"conversation": id, "add": [secret]})),
        ("conversation.read", json!({"conversation": id, "up_to_seq": 99})),
        ("conversation.resolve", json!({"conversation": id})),
        ("message.send", json!({"conversation": id, "client_id": "a", "content": text("adiós")})),
    ] {
        anna.rpc(method, data).await.unwrap();
    }
    anna.rpc("typing.set", json!({"conversation": id, "on": true})).await.unwrap();
    let mut seen = String::new();
    let mut offsets = Vec::new();
    loop {
        let push = luz.push().await.unwrap();
        seen += &push.to_string();
        offsets.extend(push["pub"]["offset"].as_u64());
        if push["pub"]["data"]["type"] == "typing" {
            assert_eq!(push["pub"]["data"]["actor"], json!({"type": "agent", "name": "Anna"}));
            assert!(push["pub"]["offset"].is_null());
            break;
        }
    }
    assert!(
        offsets.windows(2).all(|o| o[0] < o[1]) && offsets.last() > Some(&6),
        "offsets with gaps: {offsets:?}"
    );
    // By every other way as well, also on a node that has just started.
    for restarted in [false, true] {
        if restarted {
            w.node.kill().await;
            w.node = Node::start(&w.node.dir.clone()).await;
            luz = w.visitor(VISITOR).await;
        } else {
            luz.call(json!({"unsubscribe": {"channel": channel}})).await.unwrap();
        }
        let recovered =
            luz.call(json!({"subscribe": {"channel": channel, "recover": true, "offset": 0}})).await.unwrap();
        let found: Vec<u64> = recovered["subscribe"]["publications"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["offset"].as_u64().unwrap())
            .collect();
        assert_eq!(found, offsets, "recovery shows what was pushed");
        seen += &recovered.to_string();
        for (reverse, limit) in [(false, 1000), (true, 1000), (false, 2)] {
            let page = luz
                .call(json!({"history": {"channel": channel, "limit": limit, "reverse": reverse}}))
                .await
                .unwrap();
            let mut found: Vec<u64> = page["history"]["publications"]
                .as_array()
                .unwrap()
                .iter()
                .map(|p| p["offset"].as_u64().unwrap())
                .collect();
            if reverse {
                found.reverse();
            }
            assert_eq!(found, offsets[..found.len()]);
            assert_eq!(found.len(), offsets.len().min(limit));
            seen += &page.to_string();
        }
    }
    for hidden in
        [secret, "\"anna\"", "note", "assigned", "tag.", "conversation.", "join", "leave", "episode"]
    {
        let hidden_ok = hidden == "conversation." || hidden == "note";
        let found = seen.replace(&channel, "").contains(hidden);
        assert!(!found, "{hidden} ({hidden_ok}): {seen}");
    }
    assert!(seen.contains("\"name\":\"Anna\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_has_its_own_conversation_and_nothing_else() {
    let w = world().await;
    let (own, other) = (conversation("acme", "chat", VISITOR), conversation("acme", "chat", "v-2"));
    let mut second = w.visitor("v-2").await;
    second
        .rpc("message.send", json!({"conversation": other, "client_id": "c", "content": text("x")}))
        .await
        .unwrap();
    let mut luz = w.visitor(VISITOR).await;
    for channel in [
        format!("conversation:{other}"),
        "inbox:main".into(),
        "agent:anna".into(),
        format!("agent:{VISITOR}"),
        "cluster".into(),
    ] {
        assert_eq!(luz.subscribe(&channel).await.unwrap_err()["code"], 103, "{channel}");
    }
    assert_eq!(
        luz.call(json!({"history": {"channel": format!("conversation:{other}"), "limit": 1}}))
            .await
            .unwrap_err()["code"],
        103
    );
    let channel = format!("conversation:{own}");
    luz.subscribe(&channel).await.unwrap();
    for command in
        [json!({"presence": {"channel": channel}}), json!({"presence_stats": {"channel": channel}})]
    {
        assert_eq!(luz.call(command).await.unwrap_err()["code"], 108);
    }
    for method in [
        "conversation.get",
        "conversation.list",
        "conversation.resolve",
        "note.add",
        "presence.set",
        "message.edit",
    ] {
        assert_eq!(luz.rpc(method, json!({"conversation": own})).await.unwrap_err()["code"], 103, "{method}");
    }
    assert_eq!(luz.rpc("nothing", json!({})).await.unwrap_err()["code"], 104);
    for method in ["message.send", "typing.set", "conversation.read"] {
        let foreign = json!({"conversation": other, "client_id": "c", "content": text("x"), "on": true, "up_to_seq": 1});
        assert_eq!(luz.rpc(method, foreign).await.unwrap_err()["code"], 404, "{method}");
    }
    for content in [
        json!({"type": "template", "name": "t", "language": "en", "components": []}),
        json!({"type": "unsupported", "reason": "x"}),
    ] {
        let refused =
            luz.rpc("message.send", json!({"conversation": own, "client_id": "c", "content": content})).await;
        assert_eq!(refused.unwrap_err()["code"], 421);
    }
    let strict = luz
        .rpc(
            "message.send",
            json!({"conversation": own, "client_id": "c", "content": text("x"), "lane": "agent"}),
        )
        .await;
    assert_eq!(strict.unwrap_err()["code"], 400);
    // The agents' part: whoever is typing is shown to them by id.
    let mut anna = w.agent().await;
    luz.rpc("message.send", json!({"conversation": own, "client_id": "c", "content": text("x")}))
        .await
        .unwrap();
    anna.subscribe(&channel).await.unwrap();
    luz.rpc("typing.set", json!({"conversation": own, "on": true})).await.unwrap();
    loop {
        let push = anna.push().await.unwrap();
        if push["pub"]["data"]["type"] == "typing" {
            assert_eq!(push["pub"]["data"]["actor"], json!({"type": "contact", "id": VISITOR}));
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_takes_no_more_places_than_a_visitor_needs() {
    let w = world().await;
    let mut open = Vec::new();
    for _ in 0..16 {
        open.push(w.visitor(VISITOR).await);
    }
    let token = w.token(VISITOR).await;
    let connect =
        async |token: &str| Ws::open(w.node.public()).await.call(json!({"connect": {"token": token}})).await;
    let refused = connect(&token).await.unwrap_err();
    assert_eq!(
        (refused["code"].as_u64(), refused["temporary"].as_bool()),
        (Some(430), Some(true)),
        "{refused}"
    );
    assert!(connect(&w.token("another").await).await.is_ok(), "another visitor has its own");
    open.pop();
    until("its place is given back", async || connect(&token).await.ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_for_web_chats_and_end_with_their_account() {
    let w = world().await;
    let token = |account: &str, visitor: &str| format!("/accounts/{account}/contacts/{visitor}/tokens");
    for (path, body, status) in [
        (token("wa", VISITOR), json!({}), 422),
        (token("nowhere", VISITOR), json!({}), 404),
        (token("chat", "a%20b"), json!({}), 422),
        (token("chat", VISITOR), json!({"ttl_s": 0}), 422),
        (token("chat", VISITOR), json!({"role": "admin"}), 422),
    ] {
        let (got, body) = w.node.api(&w.key, "POST", &path, Some(body)).await;
        assert_eq!(got, status, "{path}: {body}");
    }
    let mut luz = w.visitor(VISITOR).await;
    luz.subscribe(&format!("conversation:{}", conversation("acme", "chat", VISITOR))).await.unwrap();
    assert_eq!(w.node.api(&w.key, "DELETE", "/accounts/chat", None).await.0, 204);
    assert_eq!(luz.close_code().await, Some(3503), "an account that is gone takes its visitors along");
}
