//! Hostile input, each with its exact answer; two tenants with the same names that never meet.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Node, Ws, conversation, sign, text_item, webhook_body};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use patchbay_protocol::client::FRAME_BYTES_MAX;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

const NUMBER: &str = "1001";
const LUZ: &str = "34600111222";
/// A key of acme's own, beside the node's.
const HMAC_KEY: &str = "the secret of the node itself, long enough to be one";
const ACME_KEY: &str = "a secret that only acme knows, long enough";

struct World {
    node: Node,
    key: String,
    _dir: tempfile::TempDir,
}

async fn world(env: &[(&str, &str)]) -> World {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start_with(dir.path(), env).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", NUMBER).await;
    World { node, key, _dir: dir }
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_secs()).unwrap()
}

fn claims() -> Value {
    json!({"tenant": "acme", "sub": "anna", "role": "agent", "iat": now() - 5, "exp": now() + 600, "jti": "1"})
}

/// Claims with some of them replaced; `null` leaves one out.
fn but(changed: Value) -> Value {
    let mut claims = claims();
    for (name, value) in changed.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims.as_object_mut().unwrap().retain(|_, v| !v.is_null());
    claims
}

fn signed(header: &Header, claims: &Value, secret: &str) -> String {
    jsonwebtoken::encode(header, claims, &EncodingKey::from_secret(secret.as_bytes())).unwrap()
}

/// What `connect` comes to: the close code, or the error's code, or nothing when it stands.
async fn connect(node: &Node, token: Option<&str>) -> Option<u64> {
    let mut ws = Ws::open(node.public()).await;
    let request = token.map_or(json!({}), |t| json!({"token": t}));
    match ws.call(json!({"connect": request})).await {
        Ok(_) => None,
        Err(error) => Some(
            error["code"].as_u64().or(error["closed"].as_u64()).expect("an error or a close, with a code"),
        ),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_taken_for_what_it_is() {
    let keys = format!("[{{id = \"acme\", secret = \"{ACME_KEY}\", tenants = [\"acme\"]}}]");
    let w = world(&[("PATCHBAY__AUTH__KEYS", &keys), ("PATCHBAY__AUTH__HMAC_SECRET_KEY", HMAC_KEY)]).await;
    w.node.tenant("other", "http://127.0.0.1:9", "2002").await;
    let ours = Header { kid: Some("acme".into()), ..Header::new(Algorithm::HS256) };
    let bare = Header::new(Algorithm::HS256);
    let own = w.node.token(&w.key, "anna", 600).await;
    let payload = own.split('.').nth(1).unwrap().to_owned();

    assert_eq!(connect(&w.node, Some(&signed(&ours, &claims(), ACME_KEY))).await, None, "a good one");
    assert_eq!(connect(&w.node, Some(&signed(&bare, &claims(), ACME_KEY))).await, None, "without a kid");
    let expired = but(json!({"exp": now() - 1}));
    assert_eq!(connect(&w.node, Some(&signed(&ours, &expired, ACME_KEY))).await, Some(109), "expired");
    let none = jsonwebtoken::encode(&bare, &claims(), &EncodingKey::from_secret(b"x")).unwrap();
    let none = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{}.", none.split('.').nth(1).unwrap());
    let other_algorithm = Header { kid: Some("acme".into()), ..Header::new(Algorithm::HS512) };
    let other_key = Header { kid: Some("patchbay".into()), ..Header::new(Algorithm::HS256) };
    let unknown_key = Header { kid: Some("nobody".into()), ..Header::new(Algorithm::HS256) };
    // An operator's token is for its socket; the API wants the key.
    let operator = signed(&bare, &but(json!({"role": "operator", "tenant": null})), HMAC_KEY);
    assert_eq!(w.node.api(&operator, "GET", "/cluster/nodes", None).await.0, 401);
    let refused: Vec<(&str, String)> = vec![
        ("another tenant's", signed(&ours, &but(json!({"tenant": "other"})), ACME_KEY)),
        ("no tenant at all", signed(&ours, &but(json!({"tenant": null})), ACME_KEY)),
        (
            "an operator by a tenant's key",
            signed(&ours, &but(json!({"role": "operator", "tenant": null})), ACME_KEY),
        ),
        ("a wrong secret", signed(&ours, &claims(), "not the secret")),
        ("another algorithm", signed(&other_algorithm, &claims(), ACME_KEY)),
        ("another key's name", signed(&other_key, &claims(), ACME_KEY)),
        ("an unknown key's name", signed(&unknown_key, &claims(), ACME_KEY)),
        ("alg none", none),
        ("another's payload", format!("{}.{payload}.{}", own.split('.').next().unwrap(), "AAAA")),
        ("no exp", signed(&ours, &but(json!({"exp": null})), ACME_KEY)),
        ("no iat", signed(&ours, &but(json!({"iat": null})), ACME_KEY)),
        ("no jti", signed(&ours, &but(json!({"jti": null})), ACME_KEY)),
        ("no sub", signed(&ours, &but(json!({"sub": null})), ACME_KEY)),
        ("a role that does not exist", signed(&ours, &but(json!({"role": "emperor"})), ACME_KEY)),
        ("an agent that does not exist", signed(&ours, &but(json!({"sub": "nobody"})), ACME_KEY)),
        ("a contact without an account", signed(&ours, &but(json!({"role": "contact"})), ACME_KEY)),
        ("issued in the future", signed(&ours, &but(json!({"iat": now() + 3600})), ACME_KEY)),
        ("numbers for names", signed(&ours, &but(json!({"tenant": 5})), ACME_KEY)),
        ("nothing", String::new()),
        ("not a token", "nonsense".into()),
        ("a very long one", "a".repeat(20_000)),
    ];
    for (what, token) in refused {
        assert_eq!(connect(&w.node, Some(&token)).await, Some(3500), "{what}");
    }
    assert_eq!(connect(&w.node, None).await, Some(3500), "no token");
    // The role of a token only lowers what the agent's document gives.
    w.node
        .api(&w.key, "PUT", "/agents/bob", Some(json!({"name": "Bob", "role": "agent", "inboxes": ["main"]})))
        .await;
    let raised = signed(&ours, &but(json!({"sub": "bob", "role": "admin"})), ACME_KEY);
    let mut ws = w.node.socket(&raised).await;
    assert_eq!(
        w.node
            .webhook("acme", "wa", &webhook_body(NUMBER, &[text_item(LUZ, "w.1", "hello there")], &[]))
            .await,
        200
    );
    let id = conversation("acme", "wa", LUZ);
    let refused =
        ws.rpc("conversation.assign", json!({"conversation": id, "agent": "anna"})).await.unwrap_err();
    assert_eq!(refused["code"], 103, "an agent assigns itself or nobody: {refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_without_a_role_opens_nothing_of_ours() {
    let keys = format!("[{{secret = \"{ACME_KEY}\", tenants = [\"acme\"]}}]");
    let w = world(&[("PATCHBAY__AUTH__KEYS", &keys)]).await;
    assert_eq!(
        w.node
            .webhook("acme", "wa", &webhook_body(NUMBER, &[text_item(LUZ, "w.1", "hello there")], &[]))
            .await,
        200
    );
    let plain = json!({"tenant": "acme", "sub": "anna", "exp": now() + 600});
    let mut ws = w.node.socket(&signed(&Header::default(), &plain, ACME_KEY)).await;
    let id = conversation("acme", "wa", LUZ);
    for channel in [
        format!("conversation:{id}"),
        "inbox:main".into(),
        "agent:anna".into(),
        "cluster".into(),
        "broadcast:1".into(),
    ] {
        assert_eq!(ws.subscribe(&channel).await.unwrap_err()["code"], 103, "{channel}");
    }
    for method in ["message.send", "conversation.list", "typing.set", "nothing.known"] {
        assert_eq!(ws.rpc(method, json!({})).await.unwrap_err()["code"], 108, "{method}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_revoked_ends_on_every_path() {
    let w = world(&[]).await;
    let put = async |agent: &str| {
        let document = json!({"name": "B", "role": "agent", "inboxes": ["main"]});
        w.node.api(&w.key, "PUT", &format!("/agents/{agent}"), Some(document)).await
    };
    for (agent, path) in [("bea", "/agents/bea/tokens"), ("bob", "/agents/bob")] {
        put(agent).await;
        let token = w.node.token(&w.key, agent, 600).await;
        let mut ws = w.node.socket(&token).await;
        let (status, _) = w.node.api(&w.key, "DELETE", path, None).await;
        assert!((200..300).contains(&status), "{path}: {status}");
        assert_eq!(ws.close_code().await, Some(3503), "{path}");
        assert_eq!(connect(&w.node, Some(&token)).await, Some(3500), "{path}");
        let mut other = w.node.socket(&w.node.token(&w.key, "anna", 600).await).await;
        let refused = other.call(json!({"refresh": {"token": token}})).await.unwrap_err();
        assert!(refused["closed"].as_u64().is_some_and(|c| (3500..4000).contains(&c)), "{path}: {refused}");
    }
    // A key that is removed ends at once.
    let (status, made) =
        w.node.api(&w.key, "POST", "/keys", Some(json!({"name": "k", "scope": "full"}))).await;
    assert_eq!(status, 201, "{made}");
    let key = made["key"].as_str().unwrap().to_owned();
    assert_eq!(w.node.api(&key, "GET", "/inboxes", None).await.0, 200);
    w.node.api(&w.key, "DELETE", &format!("/keys/{}", made["id"].as_str().unwrap()), None).await;
    assert_eq!(w.node.api(&key, "GET", "/inboxes", None).await.0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_none_ends_its_socket_and_nobody_elses() {
    let w = world(&[]).await;
    let token = w.node.token(&w.key, "anna", 600).await;
    let mut bystander = w.node.socket(&token).await;
    bystander.subscribe("inbox:main").await.unwrap();
    let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
    let ten_thousand = (1..=10_000).map(|n| format!("{{\"id\":{n},\"ping\":{{}}}}\n")).collect::<String>();
    let frames: Vec<(&str, Message, u16)> = vec![
        ("an id that is no number", Message::text(r#"{"id":"1","ping":{}}"#), 3501),
        ("a method that does not exist", Message::text(r#"{"id":1,"hologram":{}}"#), 3501),
        ("nested deeply, as a command", Message::text(nested(30_000)), 3501),
        (
            "nested deeply, in a field",
            Message::text(format!(r#"{{"id":1,"connect":{{"data":{}}}}}"#, nested(20_000))),
            3501,
        ),
        ("10,000 commands", Message::text(ten_thousand), 3501),
        (
            "a command over 64 KiB",
            Message::text(format!(r#"{{"id":1,"rpc":{{"method":"x","data":"{}"}}}}"#, "x".repeat(65_536))),
            1009,
        ),
        ("a frame over 512 KiB", Message::text(" ".repeat(FRAME_BYTES_MAX + 1)), 1009),
        ("binary to a JSON socket", Message::binary(vec![0xff; 64]), 3501),
        ("half a command", Message::text(r#"{"id":1,"rpc":{"#), 3501),
        ("a number that is too large", Message::text(r#"{"id":99999999999,"ping":{}}"#), 3501),
        ("a negative one", Message::text(r#"{"id":-1,"ping":{}}"#), 3501),
    ];
    for (what, frame, code) in frames {
        let mut ws = w.node.socket(&token).await;
        let _ = ws.send_raw(frame).await;
        assert_eq!(ws.close_code().await, Some(code), "{what}");
    }
    let mut ws = w.node.socket(&token).await;
    let invalid = Frame::message(vec![b'{', 0xc3, 0x28, b'}'], OpCode::Data(Data::Text), true);
    let _ = ws.send_raw(Message::Frame(invalid)).await;
    let code = ws.close_code().await;
    assert!(matches!(code, Some(1007 | 3501)), "text that is not UTF-8: {code:?}");
    // Data that nests deeply where nobody needs it costs its sender an error, not a stack.
    let mut ws = w.node.socket(&token).await;
    for method in ["message.send", "conversation.list"] {
        let data = format!(r#"{{"conversation":{}}}"#, nested(15_000));
        ws.send_raw(Message::text(format!(r#"{{"id":77,"rpc":{{"method":"{method}","data":{data}}}}}"#)))
            .await
            .unwrap();
        let refused = ws.reply(77).await.unwrap_err();
        assert_eq!(refused["code"], 400, "{method}: {refused}");
    }
    for (before, code) in [
        (json!({"subscribe": {"channel": "inbox:main"}}), 3501),
        (json!({"rpc": {"method": "conversation.list", "data": {}}}), 3501),
        (json!({"ping": {}}), 3501),
    ] {
        let mut ws = Ws::open(w.node.public()).await;
        ws.send(before.clone()).await;
        assert_eq!(ws.close_code().await, Some(code), "before connect: {before}");
    }
    assert!(bystander.subscribe("inbox:none").await.is_err(), "the other socket still talks");
    assert_eq!(
        w.node
            .webhook("acme", "wa", &webhook_body(NUMBER, &[text_item(LUZ, "w.1", "hello there")], &[]))
            .await,
        200
    );
    while bystander.push().await.expect("it still hears")["channel"] != "inbox:main" {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_never_ends_and_floods_of_pings_and_subscriptions() {
    let w = world(&[]).await;
    let token = w.node.token(&w.key, "anna", 600).await;
    // Fragments without an end are cut at the bound.
    let mut ws = w.node.socket(&token).await;
    let first = Frame::message(vec![b' '; 60_000], OpCode::Data(Data::Text), false);
    let _ = ws.send_raw(Message::Frame(first)).await;
    for _ in 0..16 {
        let more = Frame::message(vec![b' '; 60_000], OpCode::Data(Data::Continue), false);
        if ws.send_raw(Message::Frame(more)).await.is_err() {
            break;
        }
    }
    assert_eq!(ws.close_code().await, Some(1009));
    // Pings of the transport: answered, and nothing piles up.
    let mut ws = w.node.socket(&token).await;
    for _ in 0..20_000 {
        ws.send_raw(Message::Ping(vec![7; 100].into())).await.unwrap();
    }
    assert!(ws.rpc("conversation.list", json!({})).await.is_ok(), "after 20,000 pings");
    // Subscribing and leaving without end: the last word holds.
    let mut last = 0;
    for _ in 0..2_000 {
        ws.send(json!({"subscribe": {"channel": "inbox:main"}})).await;
        last = ws.send(json!({"unsubscribe": {"channel": "inbox:main"}})).await;
    }
    ws.reply(last).await.unwrap();
    ws.subscribe("inbox:main").await.unwrap();
    let metrics = w.node.metrics().await;
    assert!(metrics.lines().any(|l| l == "patchbay_edge_connections 1"), "no socket is left over: {metrics}");
}

/// Reads until the other side closes; what it said.
async fn to_the_end(stream: &mut TcpStream) -> String {
    let mut said = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut said)).await;
    read.expect("it was not closed in 60 s").ok();
    String::from_utf8_lossy(&said).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_dawdles_is_let_go_and_holds_nobody_up() {
    let w = world(&[]).await;
    // A head that never ends, a body that never ends, a handshake that stops half way, and silence.
    let mut dawdlers = Vec::new();
    for head in [
        "GET /api/v1/inboxes HTTP/1.1\r\nhost: localhost\r\nx-slow: ",
        "GET /connection/websocket HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\n",
        "",
    ] {
        let mut stream = TcpStream::connect(w.node.public()).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        dawdlers.push(stream);
    }
    let mut body = TcpStream::connect(w.node.public()).await.unwrap();
    let head = "POST /webhooks/acme/wa HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{";
    body.write_all(head.as_bytes()).await.unwrap();
    let mut api = TcpStream::connect(w.node.public()).await.unwrap();
    let head = format!(
        "POST /api/v1/keys HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{{",
        w.key
    );
    api.write_all(head.as_bytes()).await.unwrap();
    // Meanwhile everybody else is served.
    for n in 0..20 {
        let body = webhook_body(NUMBER, &[text_item(LUZ, &format!("w.{n}"), "hello there")], &[]);
        assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    }
    for stream in &mut dawdlers {
        to_the_end(stream).await;
    }
    let said = to_the_end(&mut body).await;
    assert!(said.starts_with("HTTP/1.1 408"), "{said:?}");
    let said = to_the_end(&mut api).await;
    assert!(said.starts_with("HTTP/1.1 408"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_that_dawdles_leaves_the_webhooks_of_others_alone() {
    let w = world(&[]).await;
    let head = "POST /webhooks/acme/wa HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{";
    let mut dawdlers = Vec::new();
    for _ in 0..700 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut stream = socket.connect(w.node.public().parse().unwrap()).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        dawdlers.push(stream);
    }
    // Those over the share of that address are told to come back; everybody else is taken.
    let mut told = [0; 12];
    let answered = tokio::time::timeout(Duration::from_secs(20), dawdlers[699].read_exact(&mut told)).await;
    answered.expect("nobody is told").unwrap();
    assert_eq!(&told, b"HTTP/1.1 503");
    for n in 0..50 {
        let body = webhook_body(NUMBER, &[text_item(LUZ, &format!("d.{n}"), "hello there")], &[]);
        assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn webhooks_that_are_wrong_are_told_and_kept_where_they_are_signed() {
    let w = world(&[]).await;
    let post = async |body: &[u8], signature: Option<String>| {
        let mut request = w.node.http.post(w.node.url("/webhooks/acme/wa")).body(body.to_vec());
        if let Some(signature) = signature {
            request = request.header("x-hub-signature-256", signature);
        }
        request.send().await.unwrap().status().as_u16()
    };
    let good = webhook_body(NUMBER, &[text_item(LUZ, "w.1", "hello there")], &[]);
    for (what, signature) in [
        ("none", None),
        ("empty", Some(String::new())),
        ("no algorithm", Some(sign(common::APP_SECRET, &good).replace("sha256=", ""))),
        ("another algorithm", Some(sign(common::APP_SECRET, &good).replace("sha256=", "sha1="))),
        ("cut short", Some(sign(common::APP_SECRET, &good)[..40].to_owned())),
        ("of another body", Some(sign(common::APP_SECRET, b"{}"))),
        ("not hexadecimal", Some(format!("sha256={}", "z".repeat(64)))),
    ] {
        assert_eq!(post(&good, signature).await, 401, "{what}");
    }
    for (what, body) in [
        ("not JSON", b"hello there, not JSON".to_vec()),
        ("cut short", good[..good.len() / 2].to_vec()),
        ("not UTF-8", vec![b'"', 0xc3, 0x28, b'"']),
        ("nested deeply", format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)).into_bytes()),
        ("empty", Vec::new()),
    ] {
        assert_eq!(post(&body, Some(sign(common::APP_SECRET, &body))).await, 400, "{what}");
    }
    for bytes in [4 << 20, (4 << 20) + 1] {
        let mut body = br#"{"entry":[]"#.to_vec();
        body.resize(bytes - 1, b' ');
        body.push(b'}');
        let expected = if bytes > 4 << 20 { 413 } else { 200 };
        assert_eq!(post(&body, Some(sign(common::APP_SECRET, &body))).await, expected, "{bytes} bytes");
    }
    let stored = w.node.get(&w.key, "/conversations").await;
    assert!(stored["conversations"].as_array().unwrap().is_empty(), "nothing of it became a conversation");
    let dead = w.node.get(&w.key, "/dead-letters").await;
    assert_eq!(dead["dead_letters"].as_array().unwrap().len(), 6, "what was signed is kept: {dead}");
    assert_eq!(post(&good, Some(sign(common::APP_SECRET, &good))).await, 200, "and the door still opens");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tenants_with_the_same_names_never_meet() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let mut keys = Vec::new();
    for tenant in ["left", "right"] {
        // The same account, the same number, the same agent, the same inbox.
        keys.push((tenant, node.tenant(tenant, "http://127.0.0.1:9", NUMBER).await));
    }
    let item = |tenant: &str| {
        let mut item = text_item(LUZ, "wamid.same", &format!("a message for {tenant} alone"));
        item["from_user_id"] = json!("ES.same");
        item
    };
    let mut sockets = Vec::new();
    for (tenant, key) in &keys {
        let mut ws = node.socket(&node.token(key, "anna", 600).await).await;
        ws.subscribe("inbox:main").await.unwrap();
        sockets.push((*tenant, ws));
    }
    for (tenant, _) in &keys {
        let body = webhook_body(NUMBER, &[item(tenant), json!({"from": "x"})], &[]);
        assert_eq!(node.webhook(tenant, "wa", &body).await, 200);
    }
    let mut seen = Vec::new();
    for (tenant, key) in &keys {
        let list = node.get(key, "/conversations").await;
        let list = list["conversations"].as_array().unwrap();
        assert_eq!(list.len(), 1, "{list:?}");
        let id = list[0]["id"].as_str().unwrap().to_owned();
        let entries = node.get(key, &format!("/conversations/{id}/entries")).await.to_string();
        assert!(entries.contains(&format!("for {tenant} alone")), "{entries}");
        // The same client_id makes a message in each.
        let note = json!({"client_id": "same", "text": format!("a note of {tenant}")});
        let (status, answer) = node.api(key, "POST", &format!("/conversations/{id}/notes"), Some(note)).await;
        assert_eq!((status, &answer["duplicate"]), (200, &json!(false)), "{answer}");
        let upload =
            node.http.post(node.url("/api/v1/media")).bearer_auth(key).body(format!("file of {tenant}"));
        let upload: Value = upload.send().await.unwrap().json().await.unwrap();
        let media = upload["id"].as_str().unwrap().to_owned();
        let dead = node.get(key, "/dead-letters").await;
        let dead = dead["dead_letters"].as_array().unwrap().clone();
        assert_eq!(dead.len(), 1, "{dead:?}");
        seen.push((id, media, dead[0]["id"].as_str().unwrap().to_owned()));
    }
    assert_ne!(seen[0].0, seen[1].0);
    assert_ne!(seen[0].2, seen[1].2);
    let unknown = conversation("left", "wa", "nobody").to_string();
    for (n, (tenant, key)) in keys.iter().enumerate() {
        let (id, media, letter) = &seen[1 - n];
        // Somebody else's is answered exactly as what never was.
        for (method, path, theirs, never) in [
            ("GET", "/conversations/{}", id.as_str(), unknown.as_str()),
            ("GET", "/conversations/{}/entries", id, &unknown),
            ("POST", "/conversations/{}/resolve", id, &unknown),
            ("POST", "/conversations/{}/reopen", id, &unknown),
            ("GET", "/media/{}", media, "nothing"),
            ("DELETE", "/dead-letters/{}", letter, "nothing"),
            ("POST", "/dead-letters/{}/replay", letter, "nothing"),
            ("DELETE", "/keys/{}", "nothing", "nothing2"),
        ] {
            let body = (method == "POST").then(|| json!({}));
            let a = node.api(key, method, &path.replace("{}", theirs), body.clone()).await;
            let b = node.api(key, method, &path.replace("{}", never), body).await;
            assert_eq!(a.0, 404, "{tenant}: {method} {path}: {}", a.1);
            let hide = |v: &Value| v.to_string().replace(theirs, "").replace(never, "");
            assert_eq!((a.0, hide(&a.1)), (b.0, hide(&b.1)), "{method} {path}");
            assert!(!a.1.to_string().contains(theirs), "an answer does not repeat the id: {}", a.1);
        }
    }
    for (tenant, ws) in &mut sockets {
        let other = if *tenant == "left" { "right" } else { "left" };
        let id = seen[usize::from(*tenant == "right")].0.clone();
        let theirs = seen[usize::from(*tenant == "left")].0.clone();
        let push = loop {
            let push = ws.push().await.unwrap();
            if push["channel"] == "inbox:main" {
                break push.to_string();
            }
        };
        assert!(
            push.contains(&id) && !push.contains(&theirs) && !push.contains(&format!("for {other}")),
            "{push}"
        );
        assert_eq!(ws.subscribe(&format!("conversation:{theirs}")).await.unwrap_err()["code"], 103);
        for method in ["message.send", "conversation.get", "conversation.read", "note.add", "typing.set"] {
            let data = match method {
                "message.send" => {
                    json!({"conversation": theirs, "client_id": "c", "content": {"type": "text", "text": "x"}})
                }
                "conversation.read" => json!({"conversation": theirs, "up_to_seq": 1}),
                "note.add" => json!({"conversation": theirs, "client_id": "c", "text": "x"}),
                "typing.set" => json!({"conversation": theirs, "on": true}),
                _ => json!({"conversation": theirs}),
            };
            assert_eq!(ws.rpc(method, data).await.unwrap_err()["code"], 404, "{method}");
        }
    }
    let metrics = node.metrics().await;
    for label in ["left", "right", LUZ, "anna", &seen[0].0] {
        assert!(!metrics.contains(&format!("\"{label}\"")), "a label names {label}");
    }
}
