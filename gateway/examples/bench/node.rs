//! The real binary, as a process of its own.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use patchbay_loadtest::load::Target;
use serde_json::{Value, json};
use sha2::Sha256;
use tokio::process::{Child, Command};

/// As many files as this machine lets us open; children inherit it.
pub fn raise_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

/// The example lies in `examples/` beside the binary.
fn binary() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.parent().unwrap().parent().unwrap().join("patchbay")
}

pub struct Node {
    pub child: Child,
    pub target: Target,
    /// This start's number.
    pub incarnation: u64,
    /// Where its metrics are.
    pub ops: String,
    /// From its start until it was ready.
    pub ready_after: Duration,
    /// Webhooks that were told to come again.
    pub refused: AtomicU64,
}

impl Node {
    pub async fn start(dir: &Path, env: &[(&str, &str)]) -> Self {
        let file = dir.join("ready.json");
        let _ = std::fs::remove_file(&file);
        let started = Instant::now();
        let mut command = Command::new(binary());
        command
            .args(["dev", "--quiet", "--data-dir"])
            .arg(dir.join("data"))
            .arg("--ready-file")
            .arg(&file)
            .env("PATCHBAY__PUBLIC__LISTEN", "127.0.0.1:0")
            .env("PATCHBAY__OPS__LISTEN", "127.0.0.1:0")
            .env("PATCHBAY__LOG__LEVEL", "warn")
            .stdout(Stdio::null())
            .kill_on_drop(true);
        for limit in ["CONNECTION", "AGENT", "TENANT", "WEBHOOKS", "REQUESTS"] {
            command.env(format!("PATCHBAY__LIMITS__{limit}_PER_SECOND"), "0");
        }
        let child = command.envs(env.iter().copied()).spawn().unwrap();
        while !file.exists() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let ready_after = started.elapsed();
        let mut target = Target::of_ready_file(&file).unwrap();
        target.pid = child.id();
        let ready: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let ops = ready["ops"].as_str().unwrap().to_owned();
        let incarnation = ready["incarnation"].as_u64().unwrap();
        Self { child, target, incarnation, ops, ready_after, refused: AtomicU64::new(0) }
    }

    /// SIGTERM, and the end.
    pub async fn stop(mut self) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().await.unwrap();
    }

    /// What the node measures.
    pub async fn metrics(&self) -> String {
        let url = format!("http://{}/metrics", self.ops);
        self.target.http.get(url).send().await.unwrap().text().await.unwrap()
    }

    /// Resident memory, in bytes.
    pub fn rss(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id().unwrap())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    pub async fn api(&self, key: &str, method: &str, path: &str, body: Value) -> Value {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let url = format!("http://{}/api/v1{path}", self.target.public);
        let answer = self.target.http.request(method, url).bearer_auth(key).json(&body).send().await.unwrap();
        let status = answer.status();
        let body: Value = answer.json().await.unwrap_or(Value::Null);
        assert!(status.is_success(), "{path}: {status} {body}");
        body
    }

    /// A tenant with an inbox, a WhatsApp account and an agent; its key.
    pub async fn tenant(&self, id: &str) -> String {
        let operator = self.target.operator_key.clone();
        let made = self.api(&operator, "POST", "/tenants", json!({"id": id, "name": id})).await;
        let key = made["key"].as_str().unwrap().to_owned();
        self.api(&key, "PUT", "/inboxes/main", json!({"name": "Main"})).await;
        let wa = json!({
            "connector": "whatsapp", "inbox": "main", "name": "W", "external_id": "1001",
            "credentials": {"app_secret": "s", "verify_token": "v", "access_token": "t"},
        });
        self.api(&key, "PUT", "/accounts/wa", wa).await;
        self.api(&key, "PUT", "/agents/anna", json!({"name": "Anna", "role": "admin", "inboxes": ["main"]}))
            .await;
        key
    }

    /// Customers `from..to` write a message each, a hundred a body.
    pub async fn customers_write(&self, tenant: &str, from: usize, to: usize) {
        let customers: Vec<usize> = (from..to).collect();
        self.write_again(tenant, &customers, 0).await;
    }

    /// These customers write a message each, a hundred a body, the `round`th time.
    pub async fn write_again(&self, tenant: &str, customers: &[usize], round: usize) {
        let bodies: Vec<Vec<u8>> = customers
            .chunks(100)
            .enumerate()
            .map(|(at, some)| {
                let messages: Vec<Value> = some
                    .iter()
                    .map(|n| json!({"from": format!("3460{n:07}"), "id": format!("{tenant}-{round}-{at}-{n}"), "timestamp": "1763715600", "type": "text", "text": {"body": "hola, a message of an ordinary length"}}))
                    .collect();
                let value = json!({"metadata": {"phone_number_id": "1001"}, "messages": messages});
                json!({"entry": [{"changes": [{"field": "messages", "value": value}]}]}).to_string().into_bytes()
            })
            .collect();
        let url = format!("http://{}/webhooks/{tenant}/wa", self.target.public);
        for some in bodies.chunks(16) {
            let posts = some.iter().map(|body| self.post(&url, body));
            futures_util::future::join_all(posts).await;
        }
    }

    /// As a provider does: what was not taken is sent again.
    async fn post(&self, url: &str, body: &[u8]) {
        let mut mac = Hmac::<Sha256>::new_from_slice(b"s").unwrap();
        mac.update(body);
        let hex: String = mac.finalize().into_bytes().iter().map(|b| format!("{b:02x}")).collect();
        loop {
            let request = self.target.http.post(url).header("x-hub-signature-256", format!("sha256={hex}"));
            let status = request.body(body.to_vec()).send().await.unwrap().status();
            if status.is_success() {
                return;
            }
            assert_eq!(status, 503);
            self.refused.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
