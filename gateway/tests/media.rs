//! Files both ways: put by the API, agents and visitors, fetched from and put at the provider, shown under signed
//! addresses; and what is refused on the way.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Node, conversation, text_item, until, webhook_body};
use patchbay_loadtest::simulator::{Behaviour, Faults, Number, Simulator};
use patchbay_protocol::ConversationId;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const NUMBER: &str = "1001";
const LUZ: &str = "34600111222";

struct World {
    node: Node,
    simulator: Simulator,
    key: String,
    _dir: tempfile::TempDir,
}

async fn world(env: &[(&str, &str)]) -> World {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start_with(dir.path(), env).await;
    let faults = Faults { delay_ms: 2, receipt_delay_ms: 5, ..Faults::default() };
    let simulator = Simulator::start("127.0.0.1:0".parse().unwrap(), 1, faults).await.unwrap();
    let key = node.tenant("acme", &format!("http://{}", simulator.address()), NUMBER).await;
    let webhook_url = node.url("/webhooks/acme/wa");
    simulator.add_number(NUMBER, Number { webhook_url, app_secret: common::APP_SECRET.into() });
    World { node, simulator, key, _dir: dir }
}

fn png(bytes: usize) -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    png.resize(bytes, 7);
    png
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

impl World {
    async fn put(&self, bearer: &str, mime: &str, name: &str, bytes: &[u8]) -> (u16, Value) {
        let request =
            self.node.http.post(self.node.url(&format!("/api/v1/media?name={name}"))).bearer_auth(bearer);
        let answer = request.header("content-type", mime).body(bytes.to_vec()).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    async fn file(&self, bearer: &str, id: &str) -> (u16, Value) {
        self.node.api(bearer, "GET", &format!("/media/{id}"), None).await
    }

    async fn download(&self, url: &str) -> reqwest::Response {
        self.node.http.get(url).send().await.unwrap()
    }

    /// The entry of this type, once it is there.
    async fn entry(&self, id: ConversationId, kind: &str) -> Value {
        until(kind, async || {
            let entries =
                match self.node.api(&self.key, "GET", &format!("/conversations/{id}/entries"), None).await {
                    (200, page) => page["entries"].as_array().unwrap().clone(),
                    _ => return None,
                };
            entries.into_iter().find(|e| e["type"] == kind)
        })
        .await
    }

    async fn customer_writes(&self) {
        let body = webhook_body(NUMBER, &[text_item(LUZ, "wamid.open", "x")], &[]);
        assert_eq!(self.node.webhook("acme", "wa", &body).await, 200);
    }
}

fn header<'a>(response: &'a reqwest::Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |v| v.to_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_put_by_its_bytes_and_shown_under_an_address_that_ends() {
    let w = world(&[("PATCHBAY__MEDIA__URL_TTL", "2s")]).await;
    let bytes = png(300_000);
    let (status, put) = w.put(&w.key, "text/html", "caf%C3%A9.png", &bytes).await;
    assert_eq!(status, 201, "{put}");
    assert_eq!(
        (put["mime"].as_str(), put["bytes"].as_u64()),
        (Some("image/png"), Some(300_000)),
        "by its bytes, not by its claim"
    );
    assert_eq!(put["sha256"], hex(&bytes));
    let id = put["id"].as_str().unwrap();
    let (_, file) = w.file(&w.key, id).await;
    assert_eq!((file["state"].as_str(), file["name"].as_str()), (Some("ready"), Some("café.png")));
    let url = file["url"].as_str().unwrap().to_owned();
    assert!(file["expires_at"].is_string());
    let shown = w.download(&url).await;
    assert_eq!(shown.status(), 200);
    for (name, value) in [
        ("content-type", "image/png"),
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", "sandbox"),
        ("cache-control", "private"),
        ("content-disposition", "inline; filename*=UTF-8''caf%C3%A9.png"),
        ("content-length", "300000"),
    ] {
        assert_eq!(header(&shown, name), value, "{name}");
    }
    assert_eq!(shown.bytes().await.unwrap(), bytes);
    let part = w.node.http.get(&url).header("range", "bytes=8-11").send().await.unwrap();
    assert_eq!((part.status().as_u16(), header(&part, "content-range")), (206, "bytes 8-11/300000"));
    assert_eq!(part.bytes().await.unwrap(), bytes[8..12]);
    let mut forged = url.clone();
    let last = forged.pop().unwrap();
    forged.push(if last == 'A' { 'B' } else { 'A' });
    assert_eq!(w.download(&forged).await.status(), 404);
    until("the address ends", async || (w.download(&url).await.status() == 404).then_some(())).await;
    // What a browser could run is saved, never shown.
    for (name, bytes) in [
        ("x.html", b"<html><script>1</script></html>".as_slice()),
        ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("x.pdf", b"%PDF-1.7\n1 0 obj"),
    ] {
        let (_, put) = w.put(&w.key, "image/png", name, bytes).await;
        let (_, file) = w.file(&w.key, put["id"].as_str().unwrap()).await;
        let shown = w.download(file["url"].as_str().unwrap()).await;
        assert!(header(&shown, "content-disposition").starts_with("attachment"), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_or_runs_is_refused_and_leaves_nothing() {
    let limits = [
        ("PATCHBAY__MEDIA__SIZE_MAX", "2MiB"),
        ("PATCHBAY__MEDIA__IMAGE_MAX", "1MiB"),
        ("PATCHBAY__MEDIA__QUOTA", "3MiB"),
    ];
    let w = world(&limits).await;
    let document = |n: usize| [b"%PDF-1.7\n".as_slice(), &vec![b'x'; n]].concat();
    for (what, bytes, status) in [
        ("an image over its bound", png(1_100_000), 413),
        ("anything over the bound for all", document(2_200_000), 413),
        ("a program", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0".to_vec(), 422),
        ("a script", b"#!/bin/sh\nrm -rf /\n".to_vec(), 422),
        ("nothing", Vec::new(), 422),
    ] {
        let (got, problem) = w.put(&w.key, "application/pdf", "x", &bytes).await;
        assert_eq!(got, status, "{what}: {problem}");
    }
    assert_eq!(w.put(&w.key, "x/y", "x", &document(1_900_000)).await.0, 201);
    let (status, problem) = w.put(&w.key, "x/y", "x", &document(1_900_000)).await;
    assert_eq!(status, 413, "the quota: {problem}");
    assert_eq!(w.put(&w.key, "x/y", "x", &document(100)).await.0, 201, "what fits is taken all the same");
    let left = std::fs::read_dir(w.node.dir.join("data/media/unfinished")).unwrap().count();
    assert_eq!(left, 0);
    let unknown =
        w.node.http.post(w.node.url("/api/v1/media")).bearer_auth("nonsense").body("x").send().await.unwrap();
    assert_eq!(unknown.status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_whose_uploads_dawdle_leaves_anothers_alone() {
    let w = world(&[]).await;
    let other = w.node.tenant("other", "http://127.0.0.1:9", "2002").await;
    let dawdle = || {
        let begun = futures_util::stream::iter([Ok::<_, std::io::Error>(png(100))]);
        let body = futures_util::StreamExt::chain(begun, futures_util::stream::pending());
        let request = w.node.http.post(w.node.url("/api/v1/media")).bearer_auth(&w.key);
        tokio::spawn(request.body(reqwest::Body::wrap_stream(body)).send())
    };
    let slow = std::cell::RefCell::new((0..64).map(|_| dawdle()).collect::<Vec<_>>());
    let told = until("its places are taken", async || {
        let (status, problem) = w.put(&w.key, "image/png", "x", &png(100)).await;
        // It may have had the last place itself.
        slow.borrow_mut().push(dawdle());
        (status != 201).then_some((status, problem))
    })
    .await;
    assert_eq!((told.0, &told.1["code"]), (503, &json!("overloaded")), "{}", told.1);
    for _ in 0..8 {
        assert_eq!(w.put(&other, "image/png", "x", &png(100)).await.0, 201);
    }
    slow.borrow().iter().for_each(tokio::task::JoinHandle::abort);
    until("they are given back", async || {
        (w.put(&w.key, "image/png", "x", &png(100)).await.0 == 201).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_customers_file_is_fetched_checked_and_shown() {
    let w = world(&[]).await;
    let id = conversation("acme", "wa", LUZ);
    let bytes = png(2_000_000);
    w.simulator.customer_sends(NUMBER, LUZ, "image", ("90001", "image/png", &bytes), Behaviour::Flaky(1));
    let stored = w.entry(id, "media.stored").await;
    assert_eq!(
        (stored["data"]["message_seq"].as_u64(), stored["actor"]["type"].as_str()),
        (Some(2), Some("system"))
    );
    let media = &stored["data"]["media"];
    assert_eq!((media["mime"].as_str(), media["bytes"].as_u64()), (Some("image/png"), Some(2_000_000)));
    assert_eq!(media["sha256"], hex(&bytes));
    let file = media["id"].as_str().unwrap();
    let token = w.node.token(&w.key, "anna", 600).await;
    let (status, shown) = w.file(&token, file).await;
    assert_eq!(
        (status, shown["state"].as_str()),
        (200, Some("ready")),
        "agents come with their sockets' tokens"
    );
    assert_eq!(w.download(shown["url"].as_str().unwrap()).await.bytes().await.unwrap(), bytes);
    // An agent without the inbox does not see what is in it.
    let bob = json!({"name": "B", "role": "agent", "inboxes": []});
    assert_eq!(w.node.api(&w.key, "PUT", "/agents/bob", Some(bob)).await.0, 201);
    let bob = w.node.token(&w.key, "bob", 600).await;
    assert_eq!(w.file(&bob, file).await.0, 404);
    let other = w.node.tenant("other", "http://127.0.0.1:9", "2002").await;
    assert_eq!(
        w.file(&other, file).await,
        w.file(&other, "0000000000").await,
        "another tenant's is like an unknown one"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_had_is_failed_with_its_reason() {
    let w = world(&[("PATCHBAY__MEDIA__SIZE_MAX", "4MiB")]).await;
    for (n, (behaviour, reason)) in [
        (Behaviour::Spoilt, "not what the provider says"),
        (Behaviour::Elsewhere, "may not be fetched"),
        (Behaviour::Endless, "larger than"),
    ]
    .into_iter()
    .enumerate()
    {
        let from = format!("3460000000{n}");
        w.simulator.customer_sends(
            NUMBER,
            &from,
            "document",
            (&format!("9100{n}"), "application/pdf", b"%PDF-1.7\n"),
            behaviour,
        );
        let failed = w.entry(conversation("acme", "wa", &from), "media.failed").await;
        assert!(failed["data"]["reason"].as_str().unwrap().contains(reason), "{failed}");
        assert_eq!(failed["data"]["message_seq"], 2);
    }
    let gone = json!({"from": LUZ, "id": "wamid.gone", "timestamp": "1763715600", "type": "image", "image": {"id": "404404", "mime_type": "image/png"}});
    assert_eq!(w.node.webhook("acme", "wa", &webhook_body(NUMBER, &[gone], &[])).await, 200);
    let failed = w.entry(conversation("acme", "wa", LUZ), "media.failed").await;
    assert!(failed["data"]["reason"].as_str().unwrap().contains("404"), "{failed}");
    // One that tries to be a path is asked of nobody.
    let path = json!({"from": "34611", "id": "wamid.path", "timestamp": "1763715600", "type": "image", "image": {"id": "../me", "mime_type": "image/png"}});
    assert_eq!(w.node.webhook("acme", "wa", &webhook_body(NUMBER, &[path], &[])).await, 200);
    w.entry(conversation("acme", "wa", "34611"), "media.failed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_here_yet_is_fetched_after_a_restart() {
    let mut w = world(&[]).await;
    let id = conversation("acme", "wa", LUZ);
    let bytes = png(1000);
    w.simulator.customer_sends(NUMBER, LUZ, "image", ("90002", "image/png", &bytes), Behaviour::Flaky(2));
    w.entry(id, "message.received").await;
    w.node.kill().await;
    w.node = Node::start(&w.node.dir.clone()).await;
    // Whoever looks at the conversation wakes it; without anybody its timer does.
    let stored = w.entry(id, "media.stored").await;
    assert_eq!(stored["data"]["media"]["sha256"], hex(&bytes));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_put_at_the_provider_once_and_sent_by_its_id() {
    let w = world(&[]).await;
    let id = conversation("acme", "wa", LUZ);
    w.customer_writes().await;
    let bytes = png(500_000);
    let token = w.node.token(&w.key, "anna", 600).await;
    let (status, put) = w.put(&token, "image/png", "photo.png", &bytes).await;
    assert_eq!(status, 201, "an agent puts it with its token: {put}");
    let media = json!({"id": put["id"], "mime": "image/png", "name": "photo.png"});
    let mut anna = w.node.socket(&token).await;
    for n in 0..2 {
        let content = json!({"type": "image", "media": media, "caption": "look"});
        anna.rpc("message.send", json!({"conversation": id, "client_id": n.to_string(), "content": content}))
            .await
            .unwrap();
    }
    let calls = until("both are sent", async || {
        let calls = w.simulator.record().calls;
        (calls.len() == 2).then_some(calls)
    })
    .await;
    let uploads = w.simulator.record().uploads;
    assert_eq!(uploads.len(), 1, "once for thirty days");
    assert_eq!(
        (uploads[0].sha256.as_str(), uploads[0].mime.as_str(), uploads[0].name.as_str()),
        (hex(&bytes).as_str(), "image/png", "photo.png")
    );
    assert!(calls.iter().all(|c| c.media == uploads[0].id), "{calls:?}");
    // What it says it is must be what it is, and be there.
    let send = async |content: Value| {
        let body = json!({"client_id": rand_id(), "content": content});
        w.node.api(&w.key, "POST", &format!("/conversations/{id}/messages"), Some(body)).await
    };
    let (status, problem) = send(json!({"type": "video", "media": media})).await;
    assert_eq!(status, 422, "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("content.media.id"));
}

fn rand_id() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("id-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_sends_and_sees_files_of_its_own_conversation() {
    let w = world(&[]).await;
    let chat = json!({"connector": "webchat", "inbox": "main", "name": "Chat", "external_id": "site", "credentials": {}});
    assert_eq!(w.node.api(&w.key, "PUT", "/accounts/chat", Some(chat)).await.0, 201);
    let visitor = async |visitor: &str| {
        let path = format!("/accounts/chat/contacts/{visitor}/tokens");
        w.node.api(&w.key, "POST", &path, Some(json!({}))).await.1["token"].as_str().unwrap().to_owned()
    };
    let (luz, eve) = (visitor("luz").await, visitor("eve").await);
    let id = conversation("acme", "chat", "luz");
    let bytes = png(10_000);
    let (status, put) = w.put(&luz, "image/png", "me.png", &bytes).await;
    assert_eq!(status, 201, "{put}");
    let file = put["id"].as_str().unwrap().to_owned();
    let content = json!({"type": "image", "media": {"id": file, "mime": "image/png"}});
    let mut socket = w.node.socket(&luz).await;
    socket.rpc("message.send", json!({"client_id": "1", "content": content})).await.unwrap();
    assert_eq!(w.entry(id, "media.stored").await["data"]["media"]["id"], json!(file));
    assert_eq!(w.file(&luz, &file).await.0, 200);
    assert_eq!(w.file(&eve, &file).await.0, 404, "another visitor's");
    let mut other = w.node.socket(&eve).await;
    let stolen = other.rpc("message.send", json!({"client_id": "1", "content": content})).await;
    assert_eq!(stolen.unwrap_err()["code"], 400);
    // What an agent sends into the conversation is the visitor's to see as well.
    let token = w.node.token(&w.key, "anna", 600).await;
    let (_, sent) = w.put(&token, "image/png", "answer.png", &png(20_000)).await;
    let sent = sent["id"].as_str().unwrap();
    assert_eq!(w.file(&luz, sent).await.0, 404, "not before");
    let content = json!({"type": "image", "media": {"id": sent, "mime": "image/png"}});
    let mut anna = w.node.socket(&token).await;
    anna.rpc("message.send", json!({"conversation": id, "client_id": "a", "content": content}))
        .await
        .unwrap();
    let (_, shown) = w.file(&luz, sent).await;
    assert_eq!(w.download(shown["url"].as_str().unwrap()).await.bytes().await.unwrap().len(), 20_000);
    let unknown = json!({"type": "image", "media": {"id": "0000", "mime": "image/png"}});
    let refused =
        anna.rpc("message.send", json!({"conversation": id, "client_id": "b", "content": unknown})).await;
    assert_eq!(refused.unwrap_err()["code"], 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_address_of_a_file_is_logged() {
    let w = world(&[("PATCHBAY__LOG__LEVEL", "info")]).await;
    let (_, put) = w.put(&w.key, "image/png", "secretname.png", &png(100)).await;
    let (_, file) = w.file(&w.key, put["id"].as_str().unwrap()).await;
    let url = file["url"].as_str().unwrap();
    assert_eq!(w.download(url).await.status(), 200);
    let log = std::fs::read_to_string(w.node.dir.join("node.log")).unwrap();
    for part in ["secretname", url.rsplit('/').next().unwrap(), put["id"].as_str().unwrap()] {
        assert!(!log.contains(part), "{part}");
    }
}
