//! What end-to-end tests share: the real binary, HTTP, signed webhooks, a small socket client, waiting for conditions.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

pub mod balancer;
pub mod cluster;
pub mod faults;
pub mod history;
#[path = "../../../storage/tests/servers/mod.rs"]
pub mod servers;

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use hmac::{Hmac, Mac};
use patchbay_protocol::{AccountId, ConversationId, TenantId};
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

pub const APP_SECRET: &str = "app-secret";

/// What tests say to nodes that no log may repeat: texts, numbers, tokens, keys.
static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
/// As many are looked for, and so much of each: a log that breaks off says too much as well.
const SAID_MAX: usize = 2_000;
const SAID_CHARS: usize = 64;
/// What a node of a test logs: more than it does by default.
const LOG_LEVEL: &str =
    "info,patchbay_gateway=trace,patchbay_actors=trace,patchbay_storage=trace,patchbay_admin_api=trace";

/// No log may repeat it. What is too short to be told from other words is not looked for.
pub fn said(text: &str) {
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if text.len() >= 9 && said.len() < SAID_MAX {
        said.insert(text.chars().take(SAID_CHARS).collect());
    }
}

fn said_in(value: &Value) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match (name.as_str(), value) {
                    ("text" | "body" | "token" | "caption" | "to" | "key", Value::String(text)) => said(text),
                    _ => said_in(value),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(said_in),
        _ => {}
    }
}

/// Searches a node's log for what was said, and for what looks like a number, a token or a key.
fn search(log: &Path) {
    let Ok(text) = std::fs::read_to_string(log) else { return };
    let said = SAID.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let kind = Some(aho_corasick::AhoCorasickKind::ContiguousNFA);
    let words = aho_corasick::AhoCorasick::builder().kind(kind).build(&said).unwrap();
    let found = words.find(&text).map(|at| &text[at.range()]);
    assert_eq!(found, None, "a log repeats what was said: {}", log.display());
    for line in text.lines() {
        let digits = line.split(|c: char| !c.is_ascii_digit()).any(|d| d.len() >= 10 && d.starts_with("346"));
        assert!(!digits, "a log line has a customer's number: {line}");
        assert!(!line.contains("eyJ"), "a log line has a token: {line}");
        assert!(!line.contains(APP_SECRET), "a log line has a secret: {line}");
    }
}

/// Waits until `f` gives something; panics with `what` after a minute, far more than anything here needs.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut f: impl FnMut() -> F) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = f().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "gave up waiting: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Where the SDKs are. Without them only the quick run may go on.
pub fn sdks() -> Option<PathBuf> {
    match std::env::var_os("PATCHBAY_SDK") {
        Some(dir) => Some(dir.into()),
        None if std::env::var_os("PATCHBAY_TEST_QUICK").is_some() => {
            println!("skipped: a quick run has no SDKs");
            None
        }
        None => panic!("PATCHBAY_SDK does not say where the SDKs are: run ./x test"),
    }
}

/// Once for the process; who comes first wins.
pub fn install_crypto() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Whether this suite runs on the real engines: it says so by its name.
pub fn on_real_engines() -> bool {
    let exe = std::env::current_exe().unwrap();
    exe.file_stem().unwrap().to_str().unwrap().starts_with("real_")
}

/// A keyspace, a topic and keys that belong to the node of this directory, on the servers that all tests share.
pub fn real_engines(dir: &Path) -> Vec<(String, String)> {
    let file = dir.join("name");
    let name = std::fs::read_to_string(&file).unwrap_or_else(|_| {
        let name = servers::fresh("e2e");
        std::fs::write(&file, &name).unwrap();
        name
    });
    let list = |addresses: String| format!("[\"{}\"]", addresses.replace(',', "\",\""));
    let named = [
        ("STORAGE__ENGINE", "scylla".to_owned()),
        ("STORAGE__SCYLLA__NODES", list(servers::cassandra().join(","))),
        ("STORAGE__SCYLLA__DATACENTER", "datacenter1".to_owned()),
        ("STORAGE__SCYLLA__KEYSPACE", name.clone()),
        ("STORAGE__SCYLLA__REPLICATION", "1".to_owned()),
        // A start reads something of each: twenty nodes at once would read for a minute.
        ("CLUSTER__SHARDS", "64".to_owned()),
        ("EVENTS__ENGINE", "kafka".to_owned()),
        ("EVENTS__KAFKA__BROKERS", list(servers::kafka())),
        ("EVENTS__KAFKA__TOPIC", name),
        ("EVENTS__KAFKA__PARTITIONS", "4".to_owned()),
    ];
    named.into_iter().map(|(key, value)| (format!("PATCHBAY__{key}"), value)).collect()
}

/// How long a node may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(180);

/// The real binary with a data directory of its own.
pub struct Node {
    pub dir: PathBuf,
    child: Child,
    pub ready: Value,
    pub http: reqwest::Client,
}

impl Drop for Node {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            search(&self.dir.join("node.log"));
        }
    }
}

impl Node {
    pub async fn start(dir: &Path) -> Self {
        Self::start_with(dir, &[]).await
    }

    pub async fn start_with(dir: &Path, env: &[(&str, &str)]) -> Self {
        Self::start_under(&[], dir, env).await
    }

    /// By a program that runs it.
    pub async fn start_under(by: &[&str], dir: &Path, env: &[(&str, &str)]) -> Self {
        install_crypto();
        let file = dir.join("ready.json");
        let _ = std::fs::remove_file(&file);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("node.log")).unwrap();
        let whole = [by, &[env!("CARGO_BIN_EXE_patchbay")]].concat();
        let mut command = Command::new(whole[0]);
        command
            .args(&whole[1..])
            .args(["dev", "--quiet", "--data-dir"])
            .arg(dir.join("data"))
            .arg("--ready-file")
            .arg(&file)
            .env("PATCHBAY__PUBLIC__LISTEN", "127.0.0.1:0")
            .env("PATCHBAY__OPS__LISTEN", "127.0.0.1:0")
            .env("PATCHBAY__LOG__FORMAT", "json")
            .env("PATCHBAY__LOG__LEVEL", LOG_LEVEL)
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        if on_real_engines() {
            command.envs(real_engines(dir));
        }
        for (name, value) in env {
            command.env(name, value);
        }
        let mut child = command.spawn().unwrap();
        // Three servers of a store make its tables in their own time, beside everything else that a small machine does.
        let deadline = tokio::time::Instant::now() + READY_WITHIN;
        let ready = loop {
            if let Ok(text) = std::fs::read_to_string(&file) {
                break serde_json::from_str(&text).unwrap();
            }
            if let Some(status) = child.try_wait().unwrap() {
                panic!(
                    "the node ended with {status}: {}",
                    std::fs::read_to_string(dir.join("node.log")).unwrap_or_default()
                );
            }
            assert!(tokio::time::Instant::now() < deadline, "the node was not ready in {READY_WITHIN:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(64).build().unwrap();
        Self { dir: dir.to_owned(), child, ready, http }
    }

    pub fn public(&self) -> &str {
        self.ready["public"].as_str().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// SIGKILL.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// SIGSTOP, SIGCONT.
    pub fn signal(&self, signal: &str) {
        let pid = self.pid().to_string();
        assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// SIGTERM; the exit code.
    pub async fn terminate(&mut self) -> Option<i32> {
        let status =
            std::process::Command::new("kill").args(["-TERM", &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
        let ended = tokio::time::timeout(Duration::from_secs(40), self.child.wait()).await;
        ended.expect("the node did not end").unwrap().code()
    }

    /// What the node measures.
    pub async fn metrics(&self) -> String {
        let url = format!("http://{}/metrics", self.ready["ops"].as_str().unwrap());
        self.http.get(url).send().await.unwrap().text().await.unwrap()
    }

    pub fn demo_key(&self) -> String {
        std::fs::read_to_string(self.dir.join("data/demo_key")).unwrap()
    }

    pub fn operator_key(&self) -> &str {
        self.ready["operator_key"].as_str().unwrap()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.public())
    }

    pub async fn api(&self, key: &str, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let mut request = self.http.request(method, self.url(&format!("/api/v1{path}"))).bearer_auth(key);
        if let Some(body) = body {
            said_in(&body);
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        let answer = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap_or(Value::Null);
        // Problems quote what was wrong; what was issued is secret.
        if status < 300 {
            said_in(&answer);
        }
        (status, answer)
    }

    pub async fn get(&self, key: &str, path: &str) -> Value {
        let (status, body) = self.api(key, "GET", path, None).await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// Creates a tenant with an inbox `main`, an account `wa` that calls `api_base`, and an agent; returns its key.
    pub async fn tenant(&self, id: &str, api_base: &str, number: &str) -> String {
        let (status, body) =
            self.api(self.operator_key(), "POST", "/tenants", Some(json!({"id": id, "name": id}))).await;
        assert_eq!(status, 201, "{body}");
        let key = body["key"].as_str().unwrap().to_owned();
        let (status, body) = self.api(&key, "PUT", "/inboxes/main", Some(json!({"name": "Main"}))).await;
        assert_eq!(status, 201, "{body}");
        self.account(&key, "wa", api_base, number).await;
        let (status, body) = self
            .api(
                &key,
                "PUT",
                "/agents/anna",
                Some(json!({"name": "Anna", "role": "admin", "inboxes": ["main"]})),
            )
            .await;
        assert_eq!(status, 201, "{body}");
        key
    }

    pub async fn account(&self, key: &str, account: &str, api_base: &str, number: &str) {
        let body = json!({
            "connector": "whatsapp", "inbox": "main", "name": "WhatsApp", "external_id": number,
            "credentials": {"app_secret": APP_SECRET, "verify_token": "verify", "access_token": "token"},
            "settings": {"api_base": api_base, "api_version": "v23.0", "mark_read": true, "typing": true},
        });
        let (status, body) = self.api(key, "PUT", &format!("/accounts/{account}"), Some(body)).await;
        assert!(status == 201 || status == 200, "{body}");
    }

    pub async fn token(&self, key: &str, agent: &str, ttl_s: u64) -> String {
        let (status, body) =
            self.api(key, "POST", &format!("/agents/{agent}/tokens"), Some(json!({"ttl_s": ttl_s}))).await;
        assert_eq!(status, 200, "{body}");
        body["token"].as_str().unwrap().to_owned()
    }

    /// Every entry of a conversation.
    pub async fn entries(&self, key: &str, id: ConversationId) -> Vec<Value> {
        let mut all: Vec<Value> = Vec::new();
        loop {
            let after = all.last().map_or(0, |e| e["seq"].as_u64().unwrap());
            let page =
                self.get(key, &format!("/conversations/{id}/entries?limit=1000&after_seq={after}")).await;
            let entries = page["entries"].as_array().unwrap();
            if entries.is_empty() {
                return all;
            }
            all.extend(entries.iter().cloned());
        }
    }

    pub async fn webhook(&self, tenant: &str, account: &str, body: &[u8]) -> u16 {
        self.signed(tenant, account, body, APP_SECRET).await.0
    }

    pub async fn signed(&self, tenant: &str, account: &str, body: &[u8], secret: &str) -> (u16, String) {
        let request = self
            .http
            .post(self.url(&format!("/webhooks/{tenant}/{account}")))
            .header("x-hub-signature-256", sign(secret, body))
            .body(body.to_vec());
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    pub async fn socket(&self, token: &str) -> Ws {
        let mut ws = Ws::open(self.public()).await;
        ws.call(json!({"connect": {"token": token}})).await.expect("connect");
        ws
    }
}

pub fn sign(secret: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(body);
    let hex: String = mac.finalize().into_bytes().iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256={hex}")
}

pub fn conversation(tenant: &str, account: &str, thread: &str) -> ConversationId {
    let (tenant, account): (TenantId, AccountId) = (tenant.parse().unwrap(), account.parse().unwrap());
    ConversationId::derive(&tenant, &account, thread)
}

pub fn text_item(from: &str, id: &str, text: &str) -> Value {
    said(from);
    said(text);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    json!({"from": from, "id": id, "timestamp": now.to_string(), "type": "text", "text": {"body": text}})
}

pub fn webhook_body(number: &str, messages: &[Value], statuses: &[Value]) -> Vec<u8> {
    let contacts: Vec<Value> = messages
        .iter()
        .filter_map(|m| m["from"].as_str())
        .map(|f| json!({"wa_id": f, "profile": {"name": "Luz"}}))
        .collect();
    let mut value = json!({"messaging_product": "whatsapp", "metadata": {"phone_number_id": number}, "contacts": contacts});
    if !messages.is_empty() {
        value["messages"] = json!(messages);
    }
    if !statuses.is_empty() {
        value["statuses"] = json!(statuses);
    }
    json!({"object": "whatsapp_business_account", "entry": [{"id": "1", "changes": [{"field": "messages", "value": value}]}]}).to_string().into_bytes()
}

/// A small socket client, in JSON.
pub struct Ws {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    id: u32,
    pub pushes: VecDeque<Value>,
    /// The close code, once it was closed.
    pub closed: Option<u16>,
    /// Whether pings are answered.
    pub answers_pings: bool,
}

impl Ws {
    pub async fn open(public: &str) -> Self {
        Self::try_open(public).await.unwrap()
    }

    pub async fn try_open(public: &str) -> Result<Self, WsError> {
        let request = format!("ws://{public}/connection/websocket").into_client_request()?;
        let (socket, _) = connect_async(request).await?;
        Ok(Self { socket, id: 0, pushes: VecDeque::new(), closed: None, answers_pings: true })
    }

    pub async fn send_raw(&mut self, frame: Message) -> Result<(), WsError> {
        self.socket.send(frame).await
    }

    /// Sends a command; its id.
    pub async fn send(&mut self, mut command: Value) -> u32 {
        said_in(&command);
        self.id += 1;
        command["id"] = json!(self.id);
        let _ = self.socket.send(Message::text(command.to_string())).await;
        self.id
    }

    /// Sends a command and waits for its reply: the result, or the error.
    pub async fn call(&mut self, command: Value) -> Result<Value, Value> {
        let id = self.send(command).await;
        self.reply(id).await
    }

    pub async fn reply(&mut self, id: u32) -> Result<Value, Value> {
        if let Some(at) = self.pushes.iter().position(|r| r["id"] == json!(id)) {
            return outcome(self.pushes.remove(at).unwrap());
        }
        loop {
            for reply in self.read().await.ok_or_else(|| json!({"closed": self.closed}))? {
                if reply["id"] == json!(id) {
                    return outcome(reply);
                }
                self.pushes.push_back(reply);
            }
        }
    }

    /// The next replies and pushes; `None` when the socket has ended.
    pub async fn read(&mut self) -> Option<Vec<Value>> {
        loop {
            let next = tokio::time::timeout(Duration::from_secs(60), self.socket.next())
                .await
                .expect("nothing came for 60 s");
            match next {
                Some(Ok(Message::Text(text))) => {
                    let mut found = Vec::new();
                    for line in text.lines() {
                        let reply: Value = serde_json::from_str(line).unwrap();
                        if reply.as_object().unwrap().is_empty() {
                            if self.answers_pings {
                                let _ = self.socket.send(Message::text("{}")).await;
                            }
                        } else {
                            found.push(reply);
                        }
                    }
                    return Some(found);
                }
                Some(Ok(Message::Close(frame))) => self.closed = frame.map(|f| f.code.into()),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return None,
            }
        }
    }

    /// The next push.
    pub async fn push(&mut self) -> Option<Value> {
        loop {
            if let Some(push) = self.pushes.pop_front() {
                return Some(push["push"].clone());
            }
            let read = self.read().await?;
            self.pushes.extend(read);
        }
    }

    /// The close code, after everything else was read.
    pub async fn close_code(&mut self) -> Option<u16> {
        while self.read().await.is_some() {}
        self.closed
    }

    pub async fn rpc(&mut self, method: &str, data: Value) -> Result<Value, Value> {
        self.call(json!({"rpc": {"method": method, "data": data}})).await.map(|mut r| r["rpc"]["data"].take())
    }

    pub async fn subscribe(&mut self, channel: &str) -> Result<Value, Value> {
        self.call(json!({"subscribe": {"channel": channel}})).await.map(|mut r| r["subscribe"].take())
    }
}

fn outcome(reply: Value) -> Result<Value, Value> {
    if reply["error"].is_object() { Err(reply["error"].clone()) } else { Ok(reply) }
}

/// A client without a socket: one long answer, and requests beside it.
pub struct Emulated {
    http: reqwest::Client,
    public: String,
    stream: Option<reqwest::Response>,
    read: VecDeque<Value>,
    rest: String,
    pub session: String,
    pub node: String,
}

impl Emulated {
    /// Opens a stream and connects.
    pub async fn connect(public: &str, transport: &str, token: &str) -> Self {
        let http = reqwest::Client::new();
        let connect = json!({"id": 1, "connect": {"token": token}}).to_string();
        let url = format!("http://{public}/connection/{transport}");
        let request = match transport {
            "sse" => {
                let mut url = reqwest::Url::parse(&url).unwrap();
                url.query_pairs_mut().append_pair("cf_connect", &connect);
                http.get(url)
            }
            _ => http.post(url).body(connect),
        };
        let stream = request.send().await.unwrap();
        assert_eq!(stream.status(), 200);
        let (session, node) = Default::default();
        let mut client = Self {
            http,
            public: public.to_owned(),
            stream: Some(stream),
            read: VecDeque::new(),
            rest: String::new(),
            session,
            node,
        };
        let mut connected = client.next().await.unwrap();
        let connected = connected["connect"].take();
        client.session = connected["session"].as_str().unwrap_or_else(|| panic!("{connected}")).to_owned();
        client.node = connected["node"].as_str().unwrap().to_owned();
        client
    }

    /// Somebody who says that this session is theirs.
    pub fn clone_as(&self, node: &str, session: &str) -> Self {
        Self {
            http: self.http.clone(),
            public: self.public.clone(),
            stream: None,
            read: VecDeque::new(),
            rest: String::new(),
            session: session.to_owned(),
            node: node.to_owned(),
        }
    }

    /// From here on it asks another node.
    pub fn asks(&mut self, public: &str) {
        public.clone_into(&mut self.public);
    }

    /// The status of a request that brings a command.
    pub async fn send(&self, command: &Value) -> u16 {
        self.send_text(&command.to_string()).await
    }

    /// The same of several, a line each.
    pub async fn send_text(&self, lines: &str) -> u16 {
        self.post_raw(&json!({"session": self.session, "node": self.node, "data": lines}).to_string()).await
    }

    /// The same of whatever this is.
    pub async fn post_raw(&self, body: &str) -> u16 {
        let sent = self.http.post(format!("http://{}/emulation", self.public)).body(body.to_owned()).send();
        sent.await.unwrap().status().as_u16()
    }

    /// The next reply or push that is no ping; none: the stream has ended.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(value) = self.read.pop_front() {
                if value != json!({}) {
                    return Some(value);
                }
                continue;
            }
            let chunk = self.stream.as_mut()?.chunk().await.ok()??;
            self.rest.push_str(std::str::from_utf8(&chunk).unwrap());
            while let Some((line, rest)) = self.rest.split_once('\n') {
                let line = line.trim().trim_start_matches("data: ");
                if !line.is_empty() {
                    self.read.push_back(serde_json::from_str(line).unwrap());
                }
                self.rest = rest.to_owned();
            }
        }
    }

    /// The answer to a command.
    pub async fn reply(&mut self, id: u32) -> Value {
        loop {
            let reply = self.next().await.expect("the stream goes on");
            if reply["id"] == id {
                return reply;
            }
        }
    }
}
