//! The admin API by the contract's section 3: who may, what a PUT, list and DELETE answer, problems, repeats.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::HashSet;

use common::{Node, conversation, text_item, webhook_body};
use serde_json::{Value, json};

const NUMBER: &str = "1001";
const LUZ: &str = "34600111222";

struct World {
    node: Node,
    key: String,
    _dir: tempfile::TempDir,
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", NUMBER).await;
    World { node, key, _dir: dir }
}

impl World {
    async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let body = if body.is_null() { None } else { Some(body) };
        self.node.api(&self.key, method, path, body).await
    }

    async fn writes(&self, from: &str, id: &str) {
        let body = webhook_body(NUMBER, &[text_item(from, id, "hola")], &[]);
        assert_eq!(self.node.webhook("acme", "wa", &body).await, 200);
    }
}

fn is_problem(problem: &Value, status: u16, code: &str) {
    assert_eq!(
        (problem["status"].as_u64(), problem["code"].as_str()),
        (Some(u64::from(status)), Some(code)),
        "{problem}"
    );
    for field in ["type", "title", "detail"] {
        assert!(problem[field].as_str().is_some_and(|t| !t.is_empty()), "{field}: {problem}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_no_key_is_unauthorized_and_a_tenant_is_no_operator() {
    let w = world().await;
    for header in [None, Some("Bearer nonsense"), Some("Basic abc"), Some("Bearer ")] {
        let mut request = w.node.http.get(w.node.url("/api/v1/inboxes"));
        if let Some(header) = header {
            request = request.header("authorization", header);
        }
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 401, "{header:?}");
        assert_eq!(answer.headers()["www-authenticate"], "Bearer");
        assert_eq!(answer.headers()["content-type"], "application/problem+json");
        is_problem(&answer.json().await.unwrap(), 401, "unauthorized");
    }
    let (status, problem) = w.call("POST", "/tenants", json!({"id": "other", "name": "O"})).await;
    assert_eq!(status, 403);
    is_problem(&problem, 403, "permission_denied");
    assert_eq!(w.call("GET", "/cluster/nodes", Value::Null).await.0, 403);
    let operator = w.node.operator_key().to_owned();
    assert_eq!(w.node.api(&operator, "GET", "/cluster/nodes", None).await.0, 200);
    let (_, shards) = w.node.api(&operator, "GET", "/cluster/shards", None).await;
    assert!(shards.to_string().len() > 2, "{shards}");
    let (status, _) =
        w.node.api(&operator, "POST", "/tenants", Some(json!({"id": "acme", "name": "A"}))).await;
    assert_eq!(status, 409, "a tenant is made once");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_put_has_its_get_list_and_delete_and_replaces_what_was_there() {
    let w = world().await;
    let account = json!({
        "connector": "whatsapp", "inbox": "main", "name": "W", "external_id": "77",
        "credentials": {"app_secret": "top-secret", "verify_token": "v", "access_token": "t"},
    });
    for (what, one, many, new, changed) in [
        ("inboxes", "/inboxes/side", "/inboxes", json!({"name": "Side"}), json!({"name": "Other"})),
        ("accounts", "/accounts/second", "/accounts", account.clone(), {
            let mut changed = account.clone();
            changed["name"] = json!("Other");
            changed
        }),
        (
            "agents",
            "/agents/bob",
            "/agents",
            json!({"name": "Bob", "role": "agent", "inboxes": ["main"]}),
            json!({"name": "Other", "role": "supervisor", "inboxes": []}),
        ),
    ] {
        assert_eq!(w.call("GET", one, Value::Null).await.0, 404, "{what}");
        assert_eq!(w.call("PUT", one, new.clone()).await.0, 201, "{what}");
        assert_eq!(w.call("PUT", one, changed).await.0, 200, "{what}");
        let (status, found) = w.call("GET", one, Value::Null).await;
        assert_eq!((status, &found["name"]), (200, &json!("Other")), "{what}");
        assert!(!found.to_string().contains("top-secret"), "secrets are never read back");
        let (_, list) = w.call("GET", many, Value::Null).await;
        assert_eq!(list[what].as_array().unwrap().len(), 2, "{what}: {list}");
        assert!(list["next"].is_null());
        let (_, page) = w.call("GET", &format!("{many}?limit=1"), Value::Null).await;
        let next = page["next"].as_str().unwrap();
        let (_, rest) = w.call("GET", &format!("{many}?limit=1&after={next}"), Value::Null).await;
        assert_ne!(rest[what][0]["id"], page[what][0]["id"], "{what}");
        assert_eq!(
            w.call("GET", &format!("{many}?limit=99999"), Value::Null).await.0,
            200,
            "larger is clamped"
        );
        assert_eq!(w.call("DELETE", one, Value::Null).await.0, 204, "{what}");
        assert_eq!(w.call("DELETE", one, Value::Null).await.0, 404, "{what}");
        assert_eq!(w.call("GET", one, Value::Null).await.0, 404, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_named() {
    let w = world().await;
    w.writes(LUZ, "wamid.1").await;
    let id = conversation("acme", "wa", LUZ);
    let messages = format!("/conversations/{id}/messages");
    let agent = |inboxes: Value| json!({"name": "B", "role": "agent", "inboxes": inboxes});
    for (method, path, body, named) in [
        ("PUT", "/inboxes/side", json!({"name": "S", "colour": "red"}), "colour"),
        ("PUT", "/inboxes/side", json!({}), "name"),
        ("PUT", "/inboxes/Side!", json!({"name": "S"}), "inbox"),
        ("PUT", "/agents/bob", agent(json!(["nowhere"])), "nowhere"),
        ("PUT", "/agents/bob", json!({"name": "B", "role": "king", "inboxes": []}), "role"),
        (
            "PUT",
            "/accounts/x",
            json!({"connector": "pigeon", "inbox": "main", "name": "", "external_id": "1", "credentials": {}}),
            "connector",
        ),
        (
            "PUT",
            "/accounts/x",
            json!({"connector": "whatsapp", "inbox": "main", "name": "", "external_id": "1", "credentials": {}}),
            "app_secret",
        ),
        (
            "POST",
            messages.as_str(),
            json!({"client_id": "1", "content": {"type": "text", "text": "x"}, "extra": 1}),
            "extra",
        ),
        ("POST", messages.as_str(), json!({"client_id": "1", "content": {"type": "smoke"}}), "smoke"),
        (
            "POST",
            messages.as_str(),
            json!({"client_id": "x".repeat(65), "content": {"type": "text", "text": "x"}}),
            "client_id",
        ),
        (
            "POST",
            messages.as_str(),
            json!({"client_id": "1", "content": {"type": "text", "text": "x"}, "reply_to": 99}),
            "reply_to",
        ),
        ("GET", "/conversations?colour=red", Value::Null, "colour"),
        ("GET", "/conversations?status=lost", Value::Null, "status"),
        ("GET", "/conversations?after=nonsense", Value::Null, "after"),
    ] {
        let (status, problem) = w.call(method, path, body).await;
        assert_eq!(status, 422, "{method} {path}: {problem}");
        is_problem(&problem, 422, "invalid_request");
        assert!(problem["detail"].as_str().unwrap().contains(named), "{named}: {problem}");
    }
    let not_json =
        w.node.http.put(w.node.url("/api/v1/inboxes/side")).bearer_auth(&w.key).body("{").send().await;
    assert_eq!(not_json.unwrap().status(), 422);
    let huge = json!({"name": "x".repeat(2 << 20)});
    let (status, problem) = w.call("PUT", "/inboxes/side", huge.clone()).await;
    assert_eq!(status, 413);
    is_problem(&problem, 413, "too_large");
    // Whoever is answered before everything was read is told that the connection ends.
    let put = w.node.http.put(w.node.url("/api/v1/inboxes/side")).bearer_auth(&w.key).json(&huge);
    assert_eq!(put.send().await.unwrap().headers()["connection"], "close");
    let put = w.node.http.put(w.node.url("/api/v1/inboxes/side")).bearer_auth(&w.key);
    let put = put.json(&json!({"name": "Side"})).send().await.unwrap();
    assert!(put.status().is_success() && !put.headers().contains_key("connection"));
    let (status, problem) = w.call("GET", "/nowhere", Value::Null).await;
    assert_eq!(status, 404);
    is_problem(&problem, 404, "not_found");
    let (status, problem) = w.call("PATCH", "/inboxes", json!({})).await;
    assert_eq!((status, problem["status"].as_u64()), (405, Some(405)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_post_is_answered_as_the_first_time() {
    let w = world().await;
    let post = async |key: &str, idempotency: &str, path: &str, body: Value| {
        let request = w.node.http.post(w.node.url(&format!("/api/v1{path}"))).bearer_auth(key);
        let answer = request.header("idempotency-key", idempotency).json(&body).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let operator = w.node.operator_key().to_owned();
    let tenant = json!({"id": "other", "name": "O"});
    let first = post(&operator, "k1", "/tenants", tenant.clone()).await;
    assert_eq!(first.0, 201);
    assert_eq!(
        post(&operator, "k1", "/tenants", tenant).await,
        first,
        "the key is shown once, also to a repeat"
    );
    let (status, problem) = post(&operator, "k1", "/tenants", json!({"id": "third", "name": "T"})).await;
    assert_eq!(status, 409, "{problem}");
    w.writes(LUZ, "wamid.1").await;
    let path = format!("/conversations/{}/messages", conversation("acme", "wa", LUZ));
    let message = json!({"client_id": "c", "content": {"type": "text", "text": "x"}});
    let posts = (0..10).map(|_| post(&w.key, "k2", &path, message.clone()));
    let answers: Vec<(u16, String)> = futures_util::future::join_all(posts).await;
    let good: HashSet<&String> = answers.iter().filter(|(s, _)| *s == 200).map(|(_, b)| b).collect();
    assert_eq!(good.len(), 1, "{answers:?}");
    assert!(answers.iter().all(|(s, _)| *s == 200 || *s == 503), "{answers:?}");
    assert_eq!(post(&w.key, &"x".repeat(300), &path, message).await.0, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_are_listed_read_and_moved() {
    let w = world().await;
    for (n, from) in ["34601", "34602", "34603"].iter().enumerate() {
        w.writes(&format!("{from}000000"), &format!("wamid.{n}")).await;
    }
    let (_, all) = w.call("GET", "/conversations", Value::Null).await;
    let addresses: Vec<&str> = all["conversations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["contact"]["address"].as_str().unwrap())
        .collect();
    assert_eq!(addresses, ["34603000000", "34602000000", "34601000000"], "newest first");
    let summary = &all["conversations"][0];
    for field in [
        "id",
        "account",
        "inbox",
        "contact",
        "status",
        "assignee",
        "last_seq",
        "preview",
        "unread",
        "waiting_since",
        "window_until",
        "episode",
        "updated_at",
    ] {
        assert!(summary.get(field).is_some(), "{field}: {summary}");
    }
    let id = conversation("acme", "wa", "34602000000");
    let at = |what: &str| format!("/conversations/{id}/{what}");
    let (status, done) = w.call("POST", &at("assign"), json!({"agent": "anna"})).await;
    assert_eq!((status, done["seq"].as_u64()), (200, Some(3)));
    let (_, same) = w.call("POST", &at("assign"), json!({"agent": "anna"})).await;
    assert_eq!(same["seq"], 3, "what changes nothing answers the tip and writes nothing");
    assert_eq!(w.call("POST", &at("assign"), json!({"agent": "nobody"})).await.0, 422);
    let (_, mine) = w.call("GET", "/conversations?assignee=anna", Value::Null).await;
    assert_eq!(mine["conversations"].as_array().unwrap().len(), 1);
    for (what, body, seq) in [
        ("pending", json!({}), 4),
        ("pending", json!({}), 4),
        ("tags", json!({"add": ["vip"], "remove": ["x"]}), 5),
        ("read", json!({"up_to_seq": 99}), 6),
        ("notes", json!({"client_id": "n", "text": "call back"}), 7),
        ("snooze", json!({"until": "2999-01-01T00:00:00Z"}), 8),
        ("reopen", json!({}), 9),
        ("resolve", json!({}), 10),
    ] {
        let (status, done) = w.call("POST", &at(what), body).await;
        assert_eq!((status, done["seq"].as_u64()), (200, Some(seq)), "{what}: {done}");
        assert!(done["at"].is_string());
    }
    assert_eq!(w.call("POST", &at("snooze"), json!({"until": "2001-01-01T00:00:00Z"})).await.0, 422);
    let seqs = async |query: &str| {
        let (_, page) = w.call("GET", &at(&format!("entries?{query}")), Value::Null).await;
        assert_eq!((page["last_seq"].as_u64(), page["epoch"].as_str().map(str::len)), (Some(10), Some(8)));
        page["entries"].as_array().unwrap().iter().map(|e| e["seq"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(seqs("limit=3").await, [1, 2, 3]);
    assert_eq!(seqs("after_seq=8").await, [9, 10]);
    assert_eq!(seqs("before_seq=5&limit=2").await, [3, 4], "the last ones before it, still ascending");
    w.writes("34602000000", "wamid.again").await;
    let (_, reopened) = w.call("GET", &format!("/conversations/{id}"), Value::Null).await;
    assert_eq!((reopened["episode"].as_u64(), reopened["status"].as_str()), (Some(2), Some("open")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_to_an_address_opens_its_conversation_and_a_refused_one_leaves_nothing() {
    let w = world().await;
    let send = async |content: Value, client_id: &str| {
        let body = json!({"to": LUZ, "client_id": client_id, "content": content});
        w.call("POST", "/accounts/wa/messages", body).await
    };
    let (status, problem) = send(json!({"type": "text", "text": "x"}), "1").await;
    assert_eq!(status, 409, "{problem}");
    assert_eq!(problem["code"], "window_closed");
    assert_eq!(
        w.call("GET", &format!("/conversations/{}", conversation("acme", "wa", LUZ)), Value::Null).await.0,
        404
    );
    let template = json!({"type": "template", "name": "hello", "language": "es", "components": []});
    let (status, sent) = send(template.clone(), "2").await;
    assert_eq!(status, 200, "{sent}");
    assert_eq!(sent["conversation"], conversation("acme", "wa", LUZ).to_string());
    assert_eq!((sent["seq"].as_u64(), sent["duplicate"].as_bool()), (Some(2), Some(false)));
    let (_, again) = send(template, "2").await;
    assert_eq!((again["seq"].as_u64(), again["duplicate"].as_bool()), (Some(2), Some(true)));
    let (status, problem) =
        send(json!({"type": "template", "name": "other", "language": "es", "components": []}), "2").await;
    assert_eq!(status, 409);
    is_problem(&problem, 409, "conflict");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_describes_itself() {
    let w = world().await;
    let described: Value =
        w.node.http.get(w.node.url("/api/v1/openapi.json")).send().await.unwrap().json().await.unwrap();
    assert!(described["openapi"].as_str().unwrap().starts_with("3.1"));
    for path in [
        "/api/v1/tenants",
        "/api/v1/accounts/{account}",
        "/api/v1/conversations/{id}/messages",
        "/api/v1/dead-letters",
    ] {
        assert!(described["paths"][path].is_object(), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_made_listed_used_and_removed() {
    let w = world().await;
    let (status, made) = w.call("POST", "/keys", json!({"name": "ci", "scope": "read"})).await;
    assert_eq!(status, 201, "{made}");
    let (id, secret) = (made["id"].as_str().unwrap().to_owned(), made["key"].as_str().unwrap().to_owned());
    assert!(secret.starts_with(made["prefix"].as_str().unwrap()) && secret.len() >= 64);
    let (_, list) = w.call("GET", "/keys", Value::Null).await;
    let listed = list["keys"].as_array().unwrap();
    assert_eq!(listed.len(), 2, "the tenant's first key and this one: {list}");
    assert!(!list.to_string().contains(&secret), "a secret is shown once");
    assert_eq!(w.node.api(&secret, "GET", "/inboxes", None).await.0, 200);
    assert_eq!(
        w.node.api(&secret, "PUT", "/inboxes/side", Some(json!({"name": "S"}))).await.0,
        403,
        "it may only read"
    );
    let (_, list) = w.call("GET", "/keys", Value::Null).await;
    let own = list["keys"].as_array().unwrap().iter().find(|k| k["id"] == json!(id)).unwrap();
    assert!(
        own["last_used_at"].is_string() && own["created_at"].is_string() && own["scope"] == "read",
        "{own}"
    );
    assert_eq!(w.call("DELETE", &format!("/keys/{id}"), Value::Null).await.0, 204);
    assert_eq!(w.node.api(&secret, "GET", "/inboxes", None).await.0, 401, "it opens no door from here on");
    assert_eq!(w.call("DELETE", &format!("/keys/{id}"), Value::Null).await.0, 404);
    let (status, problem) = w.call("POST", "/keys", json!({"name": "x", "scope": "everything"})).await;
    assert_eq!(status, 422);
    assert!(problem["detail"].as_str().unwrap().contains("scope"), "{problem}");
    // Rotation: a second full key replaces the first.
    let (_, second) = w.call("POST", "/keys", json!({"name": "second"})).await;
    let second = second["key"].as_str().unwrap().to_owned();
    let (_, list) = w.node.api(&second, "GET", "/keys", None).await;
    let first = list["keys"].as_array().unwrap().iter().find(|k| k["name"] == "first").unwrap();
    assert_eq!(
        w.node.api(&second, "DELETE", &format!("/keys/{}", first["id"].as_str().unwrap()), None).await.0,
        204
    );
    assert_eq!(w.call("GET", "/inboxes", Value::Null).await.0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_tells_what_belongs_to_no_thread() {
    let w = world().await;
    let change = |field: &str, value: Value| {
        json!({"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [{"field": field, "value": value}]}]}).to_string()
    };
    for n in 0..5 {
        let body = change(
            "message_template_status_update",
            json!({"event": "APPROVED", "message_template_id": n, "message_template_name": "t"}),
        );
        assert_eq!(w.node.webhook("acme", "wa", body.as_bytes()).await, 200);
    }
    w.writes(LUZ, "wamid.1").await;
    let body = change(
        "account_update",
        json!({"event": "DISABLED_UPDATE", "ban_info": {"waba_ban_state": "DISABLE"}}),
    );
    assert_eq!(w.node.webhook("acme", "wa", body.as_bytes()).await, 200);
    let (mut after, mut all) = (String::new(), Vec::new());
    loop {
        let (status, page) = w.call("GET", &format!("/accounts/wa/events?limit=2{after}"), Value::Null).await;
        assert_eq!(status, 200, "{page}");
        let events = page["events"].as_array().unwrap();
        assert!(events.len() <= 2);
        all.extend(events.clone());
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    let kinds: Vec<&str> = all.iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[..5], ["message_template_status_update"; 5]);
    assert!(kinds.contains(&"account_update"));
    assert!(all.windows(2).all(|e| e[0]["seq"].as_u64() < e[1]["seq"].as_u64()) && all[0]["at"].is_string());
    assert_eq!(all[3]["data"]["message_template_id"], 3);
    assert_eq!(w.call("GET", "/accounts/nowhere/events", Value::Null).await.0, 404);
    assert_eq!(w.call("GET", "/accounts/wa/events?after=x", Value::Null).await.0, 422);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_taken_again_or_says_why_not() {
    let w = world().await;
    // For a number that no account has yet.
    let body = webhook_body("2002", &[text_item(LUZ, "wamid.lost", "hola")], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let broken = webhook_body(NUMBER, &[json!({"type": "text", "text": {"body": "no id"}})], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &broken).await, 200);
    let (_, list) = w.call("GET", "/dead-letters", Value::Null).await;
    let letters = list["dead_letters"].as_array().unwrap().clone();
    assert_eq!(letters.len(), 2, "{list}");
    let path = |letter: &Value| format!("/dead-letters/{}/replay", letter["id"].as_str().unwrap());
    let (lost, broken): (Vec<&Value>, Vec<&Value>) =
        letters.iter().partition(|l| l["item"]["id"] == "wamid.lost");
    for letter in [broken[0], lost[0]] {
        let (status, problem) = w.call("POST", &path(letter), json!({})).await;
        assert_eq!(status, 422, "still no account of its own: {problem}");
    }
    let both = w.call("GET", "/dead-letters", Value::Null).await.1;
    assert_eq!(both["dead_letters"], list["dead_letters"], "what cannot be taken stays as it was");
    w.node.account(&w.key, "second", "http://127.0.0.1:9", "2002").await;
    let (status, done) = w.call("POST", &path(lost[0]), json!({})).await;
    assert_eq!((status, done["replayed"].as_bool()), (200, Some(true)), "{done}");
    let (_, found) =
        w.call("GET", &format!("/conversations/{}", conversation("acme", "second", LUZ)), Value::Null).await;
    assert_eq!(found["preview"], "hola", "in the thread of the number that it was written to");
    assert_eq!(w.call("POST", &path(lost[0]), json!({})).await.0, 404, "it is no dead letter any more");
    let (_, list) = w.call("GET", "/dead-letters", Value::Null).await;
    assert_eq!(list["dead_letters"].as_array().unwrap().len(), 1, "what cannot be taken stays");
    // What a conversation could not hold is kept whole, and a replay does not take the only copy away.
    let large = "y".repeat(200_000);
    let body = webhook_body(NUMBER, &[text_item(LUZ, "wamid.large", &large)], &[]);
    assert_eq!(w.node.webhook("acme", "wa", &body).await, 200);
    let letter = |list: &Value| {
        let letters = list["dead_letters"].as_array().unwrap().clone();
        letters.into_iter().find(|l| l["item"]["id"] == "wamid.large")
    };
    let kept = letter(&w.call("GET", "/dead-letters", Value::Null).await.1).unwrap();
    let (status, problem) = w.call("POST", &path(&kept), json!({})).await;
    assert_eq!(status, 422, "{problem}");
    assert_eq!(letter(&w.call("GET", "/dead-letters", Value::Null).await.1), Some(kept));
    // More items than any body has are one letter.
    let many = json!({"entry": vec![1; 20_000]}).to_string().into_bytes();
    assert_eq!(w.node.webhook("acme", "wa", &many).await, 200);
    let (_, list) = w.call("GET", "/dead-letters?limit=1000", Value::Null).await;
    let letters = list["dead_letters"].as_array().unwrap();
    assert_eq!(letters.len(), 3, "one for all of them");
    assert!(letters.iter().any(|l| l["item"]["entry"].as_array().map(Vec::len) == Some(20_000)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_whose_making_broke_off_is_finished() {
    let w = world().await;
    let make = async || {
        let body = Some(json!({"id": "half", "name": "Half"}));
        w.node.api(w.node.operator_key(), "POST", "/tenants", body).await
    };
    let (status, made) = make().await;
    assert_eq!(status, 201, "{made}");
    let key = made["key"].as_str().unwrap().to_owned();
    assert_eq!(make().await.0, 409, "it is there, and has its key");
    // As a node leaves it that ends between the tenant and its first key.
    let (_, keys) = w.node.api(&key, "GET", "/keys", None).await;
    let first = format!("/keys/{}", keys["keys"][0]["id"].as_str().unwrap());
    assert_eq!(w.node.api(&key, "DELETE", &first, None).await.0, 204);
    let (status, made) = make().await;
    assert_eq!(status, 201, "{made}");
    let key = made["key"].as_str().unwrap().to_owned();
    assert_eq!(w.node.api(&key, "PUT", "/inboxes/main", Some(json!({"name": "x"}))).await.0, 201);
    assert_eq!(make().await.0, 409);
}
