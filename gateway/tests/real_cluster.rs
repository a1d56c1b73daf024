//! Three processes on one store: shards are shared out, a node is killed, comes back, drains and ends, under load all the
//! while, and nothing that was acked is lost or doubled.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::balancer::Balancer;
use common::cluster::{COMMON, SECRET, held, incarnation, shared_out};
use common::faults::{Load, NUMBER, customer, logs_are_whole};
use common::servers;
use common::{Emulated, Node, Ws, conversation, text_item, until, webhook_body};
use serde_json::{Value, json};

fn patchbay(args: &[&str]) -> String {
    let ran = Command::new(env!("CARGO_BIN_EXE_patchbay")).args(args).output().unwrap();
    assert!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

/// What a node of a cluster is told.
struct Config([(&'static str, String); 6]);

impl Config {
    fn new(certs: &Path, keyspace: &str) -> Self {
        let file = |name: &str| certs.join(name).to_str().unwrap().to_owned();
        let nodes = format!("[\"{}\"]", servers::cassandra().join("\",\""));
        Self([
            ("PATCHBAY__STORAGE__SCYLLA__NODES", nodes),
            ("PATCHBAY__STORAGE__SCYLLA__KEYSPACE", keyspace.to_owned()),
            ("PATCHBAY__EVENTS__ENGINE", "embedded".to_owned()),
            ("PATCHBAY__MESH__CERT", file("node.pem")),
            ("PATCHBAY__MESH__KEY", file("node-key.pem")),
            ("PATCHBAY__MESH__CA", file("ca.pem")),
        ])
    }

    fn env(&self) -> Vec<(&str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str())).chain(COMMON).collect()
    }
}

async fn start(dir: &Path, certs: &Path, keyspace: &str) -> Node {
    std::fs::create_dir_all(dir).unwrap();
    Node::start_with(dir, &Config::new(certs, keyspace).env()).await
}

/// Nine nodes at once have no room on a small machine: their leases would lapse for that alone.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_killed_come_back_drain_and_end_under_load() {
    if servers::quick() {
        return;
    }
    let _alone = ALONE.lock().await;
    let (dir, keyspace) = (tempfile::tempdir().unwrap(), servers::fresh("cluster"));
    let certs = dir.path().join("certs");
    patchbay(&["dev-cert", "--dir", certs.to_str().unwrap()]);
    let a = start(&dir.path().join("a"), &certs, &keyspace).await;
    let mut b = start(&dir.path().join("b"), &certs, &keyspace).await;
    let mut c = start(&dir.path().join("c"), &certs, &keyspace).await;
    shared_out(&a, 3).await;
    let key = a.tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    // Every customer's shard is somebody's: two thirds of what one node is told crosses the mesh.
    let load = Load::start(&a, 32, Duration::from_millis(10));
    load.goes_on(500).await;

    b.kill().await;
    let killed = Instant::now();
    shared_out(&a, 2).await;
    println!("replaced in {:?}", killed.elapsed());
    load.goes_on(500).await;
    b = start(&dir.path().join("b"), &certs, &keyspace).await;
    shared_out(&a, 3).await;
    load.goes_on(500).await;

    // By way of the others it is the same.
    load.moves_to(&b);
    load.goes_on(300).await;
    let at_c = ["--url", &c.url(""), "--key", c.operator_key()];
    patchbay(&[&["drain"], &at_c[..]].concat());
    until("it holds nothing", async || (held(&a).await.get(&incarnation(&c)) == Some(&0)).then_some(()))
        .await;
    load.goes_on(300).await;
    let plan: Value =
        serde_json::from_str(&patchbay(&[&["shards", "plan", "--json"], &at_c[..]].concat())).unwrap();
    assert_eq!(plan["planned"], json!([]));
    patchbay(&[&["drain", "--cancel"], &at_c[..]].concat());
    shared_out(&a, 3).await;

    // An operator's word.
    let shards: Value =
        serde_json::from_str(&patchbay(&[&["shards", "list", "--json"], &at_c[..]].concat())).unwrap();
    let of = |n: &Node| incarnation(n);
    let one = shards["shards"].as_array().unwrap().iter().find(|s| s["holder"] == json!(of(&b))).unwrap();
    let (shard, name) = (one["shard"].to_string(), c.ready["mesh"].as_str().unwrap().to_owned());
    patchbay(&[&["shards", "move", &shard, "--to", &name], &at_c[..]].concat());
    until("it is where it is wanted", async || {
        let why = a.get(a.operator_key(), &format!("/cluster/shards/{shard}")).await;
        (why["holder"] == json!(of(&c)) && why["reason"] == "an operator wants it here").then_some(())
    })
    .await;
    let said = patchbay(&[&["shards", "why", &shard], &at_c[..]].concat());
    assert!(said.contains("an operator wants it here") && said.contains("opened in"), "{said}");
    let (status, _) =
        a.api(a.operator_key(), "POST", "/cluster/shards/64/move", Some(json!({"to": null}))).await;
    assert_eq!(status, 404);
    let (status, _) =
        a.api(a.operator_key(), "POST", "/cluster/shards/1/move", Some(json!({"to": "x"}))).await;
    assert_eq!(status, 422);
    let (status, _) = a.api(&key, "PUT", "/cluster/drain", None).await;
    assert_eq!(status, 403);

    let ended = c.terminate();
    assert_eq!(ended.await, Some(0));
    shared_out(&a, 2).await;
    load.goes_on(300).await;
    let acked = load.end().await;
    for node in [&a, &b] {
        logs_are_whole(node, &key, &acked).await;
    }
    println!("{} acked", acked.iter().sum::<u64>());
}

async fn three(dirs: &[std::path::PathBuf; 3], certs: &Path, keyspace: &str) -> [Node; 3] {
    patchbay(&["dev-cert", "--dir", certs.to_str().unwrap()]);
    let nodes = [
        start(&dirs[0], certs, keyspace).await,
        start(&dirs[1], certs, keyspace).await,
        start(&dirs[2], certs, keyspace).await,
    ];
    shared_out(&nodes[0], 3).await;
    nodes
}

/// The next push that `fits`; others are kept for whoever waits for them.
async fn push(socket: &mut Ws, fits: impl Fn(&Value) -> bool) -> Value {
    loop {
        if let Some(at) = socket.pushes.iter().position(|reply| fits(&reply["push"])) {
            return socket.pushes.remove(at).unwrap()["push"].take();
        }
        let read = socket.read().await.expect("the socket is open");
        socket.pushes.extend(read);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_anywhere_is_shown_at_every_node() {
    if servers::quick() {
        return;
    }
    let _alone = ALONE.lock().await;
    let (dir, keyspace) = (tempfile::tempdir().unwrap(), servers::fresh("anywhere"));
    let dirs = ["a", "b", "c"].map(|name| dir.path().join(name));
    let nodes = three(&dirs, &dir.path().join("certs"), &keyspace).await;
    let key = nodes[0].tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    // Three conversations, so that one node does not happen to hold all of them.
    for (n, node) in nodes.iter().enumerate() {
        let body = webhook_body(NUMBER, &[text_item(&customer(n), &format!("first-{n}"), "hola")], &[]);
        assert_eq!(node.webhook("acme", "wa", &body).await, 200);
    }
    let ids: Vec<String> = (0..3).map(|n| conversation("acme", "wa", &customer(n)).to_string()).collect();
    let mut sockets = Vec::new();
    for node in &nodes {
        let mut socket = Ws::open(node.public()).await;
        let token = node.token(&key, "anna", 600).await;
        let connected = socket.call(json!({"connect": {"token": token}})).await.unwrap();
        assert!(connected["connect"]["subs"]["agent:anna"].is_object());
        socket.subscribe("inbox:main").await.unwrap();
        sockets.push(socket);
    }
    // Her sessions are counted by one node and shown by those that she was at already.
    for socket in &mut sockets[..2] {
        push(socket, |p| p["channel"] == "agent:anna" && p["pub"]["data"]["sessions"] == 3).await;
    }
    for (id, channel) in ids.iter().map(|id| (id, format!("conversation:{id}"))) {
        for socket in &mut sockets {
            socket.call(json!({"subscribe": {"channel": channel, "join_leave": true}})).await.unwrap();
        }
        // Those who came first are told of whoever came last, wherever.
        let last = push(&mut sockets[0], |p| p["channel"] == channel && p["join"].is_object()).await;
        assert_eq!(last["join"]["info"]["user"], "anna");
        for socket in &mut sockets {
            let presence = socket.call(json!({"presence": {"channel": channel}})).await.unwrap();
            assert_eq!(presence["presence"]["presence"].as_object().unwrap().len(), 3, "{presence}");
            let stats = socket.call(json!({"presence_stats": {"channel": channel}})).await.unwrap();
            assert_eq!(stats["presence_stats"], json!({"num_clients": 3, "num_users": 1}));
        }
        for n in 0..3 {
            let message = json!({"conversation": id, "client_id": format!("{id}-{n}"), "content": {"type": "text", "text": "x"}});
            let seq = sockets[n].rpc("message.send", message).await.unwrap()["seq"].clone();
            for socket in &mut sockets {
                push(socket, |p| p["channel"] == channel && p["pub"]["offset"] == seq).await;
            }
            sockets[n].rpc("typing.set", json!({"conversation": id, "on": true})).await.unwrap();
            for socket in &mut sockets {
                push(socket, |p| p["channel"] == channel && p["pub"]["data"]["type"] == "typing").await;
            }
            for socket in &mut sockets {
                push(socket, |p| {
                    p["channel"] == "inbox:main"
                        && p["pub"]["data"]["conversation"]["id"] == json!(id)
                        && p["pub"]["data"]["conversation"]["last_seq"].as_u64() >= seq.as_u64()
                })
                .await;
            }
        }
    }
    // She is told of what she is to see to at all of her sockets, whoever owns the conversation and whoever owns her.
    for id in &ids {
        sockets[0].rpc("conversation.assign", json!({"conversation": id, "agent": "anna"})).await.unwrap();
        for socket in &mut sockets {
            push(socket, |p| {
                p["channel"] == "agent:anna"
                    && p["pub"]["data"]["type"] == "assigned"
                    && p["pub"]["data"]["conversation"] == json!(id)
            })
            .await;
        }
    }
    // Behind what blocks WebSocket, consecutive requests may go to any node: the session is at one of them.
    let token = nodes[0].token(&key, "anna", 600).await;
    let mut emulated = Emulated::connect(nodes[0].public(), "http_stream", &token).await;
    for n in 0..30u32 {
        emulated.asks(nodes[n as usize % 3].public());
        let command = json!({"id": 2 + n, "rpc": {"method": "note.add", "data":
            {"conversation": ids[0], "client_id": format!("emulated-{n}"), "text": "x"}}});
        assert_eq!(emulated.send(&command).await, 204);
    }
    let mut seqs = Vec::new();
    while seqs.len() < 30 {
        let reply = emulated.next().await.expect("it goes on");
        if let Some(seq) = reply["rpc"]["data"]["seq"].as_u64() {
            seqs.push((reply["id"].as_u64(), seq));
        }
    }
    seqs.sort_unstable();
    assert!(
        seqs.windows(2).all(|pair| pair[0].1 < pair[1].1),
        "in the order in which they were sent: {seqs:?}"
    );
    let stranger = emulated.clone_as(&emulated.node, &"0".repeat(32));
    assert_eq!(stranger.send(&json!({"id": 1, "ping": {}})).await, 404);
    // How the cluster is, to whoever runs it: every node says the same of all.
    let claims = json!({"sub": "op", "role": "operator", "iat": 1, "jti": "1", "exp": 4_000_000_000u64});
    let operator = jsonwebtoken::encode(
        &jsonwebtoken::Header::default(),
        &claims,
        &jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes()),
    )
    .unwrap();
    for node in &nodes {
        let mut socket = Ws::open(node.public()).await;
        socket.call(json!({"connect": {"token": operator}})).await.unwrap();
        socket.subscribe("cluster").await.unwrap();
        let of_all = |p: &Value| -> Option<Vec<u64>> {
            let nodes = p["pub"]["data"]["nodes"].as_array()?;
            nodes.iter().map(|n| n["connections"].as_u64()).collect()
        };
        // Each has her socket; this one has ours as well.
        push(&mut socket, |p| {
            of_all(p).is_some_and(|n| n.len() == 3 && n.iter().all(|n| *n >= 1) && n.iter().any(|n| *n >= 2))
        })
        .await;
        let found = node.get(node.operator_key(), "/cluster/nodes").await;
        assert!(
            found["nodes"].as_array().unwrap().iter().all(|n| n["connections"].as_u64() >= Some(1)),
            "{found}"
        );
    }
    // One node is told that her tokens are worth nothing any more.
    assert_eq!(nodes[1].api(&key, "DELETE", "/agents/anna/tokens", None).await.0, 204);
    for mut socket in sockets {
        assert_eq!(socket.close_code().await, Some(3503));
    }
    while emulated.next().await.is_some_and(|reply| reply["push"]["disconnect"]["code"] != 3503) {}
    until("she is gone everywhere", async || {
        let agent = nodes[2].get(&key, "/agents/anna").await;
        (agent["presence"] == "offline").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_everywhere_and_outlives_the_node_that_took_it() {
    if servers::quick() {
        return;
    }
    let _alone = ALONE.lock().await;
    let (dir, keyspace) = (tempfile::tempdir().unwrap(), servers::fresh("files"));
    let dirs = ["a", "b", "c"].map(|name| dir.path().join(name));
    let mut nodes = three(&dirs, &dir.path().join("certs"), &keyspace).await;
    let key = nodes[0].tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let mut image = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    image.extend((0..1_000_000u32).map(|n| (n % 251) as u8));
    let put = nodes[1].http.post(nodes[1].url("/api/v1/media?name=x.png")).bearer_auth(&key);
    let put = put.header("content-type", "image/png").body(image.clone()).send().await.unwrap();
    assert_eq!(put.status(), 201);
    let id = put.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned();
    for n in [1, 0, 2] {
        // The last one asks for it when the node that took it is gone.
        if n == 2 {
            nodes[1].kill().await;
        }
        let node = &nodes[n];
        let found = node.get(&key, &format!("/media/{id}")).await;
        let file = node.http.get(found["url"].as_str().unwrap()).send().await.unwrap();
        assert_eq!(file.status(), 200);
        assert!(file.bytes().await.unwrap() == image);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_others_would_not_speak_with_is_given_nothing() {
    if servers::quick() {
        return;
    }
    let _alone = ALONE.lock().await;
    let (dir, keyspace) = (tempfile::tempdir().unwrap(), servers::fresh("strangers"));
    let certs = dir.path().join("certs");
    patchbay(&["dev-cert", "--dir", certs.to_str().unwrap()]);
    let a = start(&dir.path().join("a"), &certs, &keyspace).await;
    shared_out(&a, 1).await;
    let before = held(&a).await;
    // By another authority; and by the right one for somebody else.
    let (foreign, elsewhere) = (dir.path().join("foreign"), dir.path().join("elsewhere"));
    patchbay(&["dev-cert", "--dir", foreign.to_str().unwrap()]);
    std::fs::create_dir(&elsewhere).unwrap();
    for file in ["ca.pem", "ca-key.pem"] {
        std::fs::copy(certs.join(file), elsewhere.join(file)).unwrap();
    }
    patchbay(&["dev-cert", "--dir", elsewhere.to_str().unwrap(), "--name", "10.1.2.3"]);
    for (certs, says) in [(&foreign, "does not take it"), (&elsewhere, "not for 127.0.0.1")] {
        let config = Config::new(certs, &keyspace);
        let dir = dir.path().join(certs.file_name().unwrap()).join("data");
        let ran = Command::new(env!("CARGO_BIN_EXE_patchbay"))
            .args(["dev", "--quiet", "--data-dir", dir.to_str().unwrap()])
            .envs([("PATCHBAY__PUBLIC__LISTEN", "127.0.0.1:0"), ("PATCHBAY__OPS__LISTEN", "127.0.0.1:0")])
            .envs(common::real_engines(certs))
            .envs(config.env())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(said.contains("mesh.cert") && said.contains(says), "{said}");
        assert_eq!(ran.status.code(), Some(64), "{said}");
    }
    assert_eq!(held(&a).await, before);
}

/// An agent on a public SDK that follows conversations through `url`.
struct Rider {
    name: String,
    child: tokio::process::Child,
    say: tokio::process::ChildStdin,
    lines: tokio::io::Lines<tokio::io::BufReader<tokio::process::ChildStdout>>,
}

impl Rider {
    async fn start(
        language: &str,
        encoding: &str,
        through: &str,
        key: &str,
        conversations: &str,
    ) -> Option<Self> {
        let sdk = std::path::PathBuf::from(std::env::var_os("PATCHBAY_SDK")?);
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk");
        let (program, script) = match language {
            "js" => ("node".into(), scripts.join("ride.mjs")),
            _ => (sdk.join("py/bin/python"), scripts.join("ride.py")),
        };
        let (url, api) = (format!("ws://{through}/connection/websocket"), format!("http://{through}/api/v1"));
        let mut command = tokio::process::Command::new(program);
        command.arg(script).args([encoding, sdk.to_str().unwrap(), &url, &api, key, conversations]);
        let piped = std::process::Stdio::piped;
        let mut child = command.stdin(piped()).stdout(piped()).kill_on_drop(true).spawn().unwrap();
        let say = child.stdin.take().unwrap();
        let lines =
            tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().unwrap()));
        let mut rider = Self { name: format!("{language} {encoding}"), child, say, lines };
        rider.says("READY").await;
        Some(rider)
    }

    async fn says(&mut self, wanted: &str) {
        while let Some(line) = self.lines.next_line().await.unwrap() {
            if line == wanted {
                return;
            }
            println!("{}: {line}", self.name);
        }
        panic!("{} has failed", self.name);
    }

    /// It has seen all of it, once and in order.
    async fn has_seen(mut self, tips: &str) {
        use tokio::io::AsyncWriteExt as _;
        self.say.write_all(format!("END {tips}\n").as_bytes()).await.unwrap();
        self.says("DONE").await;
        assert!(self.child.wait().await.unwrap().success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_see_everything_once_through_a_crash_a_drain_and_a_rolling_restart() {
    const CUSTOMERS: usize = 12;
    if servers::quick() {
        return;
    }
    let _alone = ALONE.lock().await;
    let (dir, keyspace) = (tempfile::tempdir().unwrap(), servers::fresh("riders"));
    let certs = dir.path().join("certs");
    let dirs = ["a", "b", "c"].map(|name| dir.path().join(name));
    let mut nodes = three(&dirs, &certs, &keyspace).await;
    let key = nodes[0].tenant("acme", "http://127.0.0.1:1", NUMBER).await;
    let ben = json!({"name": "Ben", "role": "agent", "inboxes": ["main"]});
    assert_eq!(nodes[0].api(&key, "PUT", "/agents/ben", Some(ben)).await.0, 201);
    let through = Balancer::start(&nodes.iter().collect::<Vec<_>>()).await;
    let load = Load::start(&nodes[0], CUSTOMERS, Duration::from_millis(40));
    load.goes_through(&through.address());
    load.goes_on(100).await;
    let ids: Vec<String> =
        (0..CUSTOMERS).map(|n| conversation("acme", "wa", &customer(n)).to_string()).collect();
    let mut riders = Vec::new();
    for (language, encoding) in [("js", "json"), ("js", "protobuf"), ("py", "json"), ("py", "protobuf")] {
        riders.extend(Rider::start(language, encoding, &through.address(), &key, &ids.join(",")).await);
    }
    load.goes_on(200).await;

    nodes[1].kill().await;
    through.leads_to(&[&nodes[0], &nodes[2]]);
    shared_out(&nodes[0], 2).await;
    load.goes_on(200).await;
    nodes[1] = start(&dirs[1], &certs, &keyspace).await;
    through.leads_to(&nodes.iter().collect::<Vec<_>>());
    shared_out(&nodes[0], 3).await;

    let (url, operator) = (nodes[2].url(""), nodes[2].operator_key().to_owned());
    let at_c = ["--url", &url, "--key", &operator];
    patchbay(&[&["drain"], &at_c[..]].concat());
    until("it holds nothing and has no sockets", async || {
        let nothing = held(&nodes[0]).await.get(&incarnation(&nodes[2])) == Some(&0);
        (nothing && common::faults::metric(&nodes[2], "patchbay_edge_connections").await == 0.0).then_some(())
    })
    .await;
    let (status, _) = common::faults::readyz(&nodes[2]).await;
    assert_eq!(status, 503);
    load.goes_on(200).await;
    patchbay(&[&["drain", "--cancel"], &at_c[..]].concat());
    shared_out(&nodes[0], 3).await;
    let (status, _) = common::faults::readyz(&nodes[2]).await;
    assert_eq!(status, 200);

    let (acked_before, refused_before) = (load.total(), load.refused.load(Ordering::Relaxed));
    for n in 0..3 {
        assert_eq!(nodes[n].terminate().await, Some(0));
        nodes[n] = start(&dirs[n], &certs, &keyspace).await;
        through.leads_to(&nodes.iter().collect::<Vec<_>>());
        shared_out(&nodes[n], 3).await;
        load.goes_on(100).await;
    }
    let failed = load.refused.load(Ordering::Relaxed) - refused_before;
    let acked_meanwhile = load.total() - acked_before;
    let acked = load.end().await;
    let tips = logs_are_whole(&nodes[0], &key, &acked).await;
    let tips: Vec<String> = ids.iter().map(|id| format!("{id}:{}", tips[id])).collect();
    let result = json!({"acked": acked_meanwhile, "failed": failed, "riders": riders.len()});
    for rider in riders {
        rider.has_seen(&tips.join(",")).await;
    }
    println!("{result}");
    if let Some(file) = std::env::var_os("PATCHBAY_ROLLING_RESULT") {
        std::fs::write(file, result.to_string()).unwrap();
    }
}
