//! The command line as a person and a script meet it: the dev transcript, chat, tokens, the simulator alone, and how
//! faults are told.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::process::{Output, Stdio};
use std::time::Duration;

use common::{Node, conversation, text_item, until, webhook_body};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdout, Command};

const NUMBER: &str = "1001";

fn patchbay(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patchbay"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn run(args: &[&str]) -> Output {
    tokio::time::timeout(Duration::from_secs(60), patchbay(args).output())
        .await
        .expect("it did not end")
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What a running command prints, line by line.
struct Printed {
    child: Child,
    lines: tokio::io::Lines<BufReader<ChildStdout>>,
    seen: Vec<String>,
}

impl Printed {
    fn of(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines, seen: Vec::new() }
    }

    /// Reads until a line has this in it.
    async fn until(&mut self, wanted: &str) -> String {
        loop {
            let next = tokio::time::timeout(Duration::from_secs(60), self.lines.next_line()).await;
            let Ok(Ok(Some(line))) = next else { panic!("`{wanted}` was not printed: {:#?}", self.seen) };
            self.seen.push(line.clone());
            if line.contains(wanted) {
                return line;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_tells_what_to_try_and_plays_the_demo_conversation_hop_by_hop() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut command = patchbay(&["dev", "--data-dir", data.to_str().unwrap()]);
    command.env("PATCHBAY__PUBLIC__LISTEN", "127.0.0.1:0").env("PATCHBAY__OPS__LISTEN", "127.0.0.1:0");
    let mut dev = Printed::of(command);
    let key = dev.until("API key").await.split_whitespace().last().unwrap().to_owned();
    let token = dev.until("agent token").await.split_whitespace().last().unwrap().to_owned();
    assert!(key.starts_with("pb_") && token.split('.').count() == 3);
    // Every hop of the loop with its latency.
    for hop in [
        "ms  customer -> webhook -> log -> inbox of the agent",
        "Hola, is my order on its way?",
        "ms  agent -> log, durable",
        "ms  log -> provider -> receipt `sent` -> socket",
        "ms  log -> provider -> receipt `delivered` -> socket",
        "ms  log -> provider -> receipt `read` -> socket",
        "The conversation is",
    ] {
        dev.until(hop).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_lists_shows_and_sends() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", NUMBER).await;
    let id = conversation("acme", "wa", "34600111222");
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.1", "hola")], &[]);
    assert_eq!(node.webhook("acme", "wa", &body).await, 200);
    let token = node.token(&key, "anna", 600).await;
    let url = format!("ws://{}/connection/websocket", node.public());
    let listed = run(&["chat", "--url", &url, "--token", &token]).await;
    assert!(listed.status.success());
    let listed = text(&listed.stdout);
    assert!(
        listed.contains(&id.to_string()) && listed.contains("open") && listed.contains("hola"),
        "{listed}"
    );

    let id_text = id.to_string();
    let mut command = patchbay(&["chat", "--url", &url, "--conversation", &id_text]);
    command.env("PATCHBAY_TOKEN", &token).stdin(Stdio::piped());
    let mut chat = Printed::of(command);
    chat.until("hola").await;
    chat.until("Ctrl-D").await;
    let mut keyboard = chat.child.stdin.take().unwrap();
    keyboard.write_all(b"buenas\n").await.unwrap();
    chat.until("agent anna").await;
    let body = webhook_body(NUMBER, &[text_item("34600111222", "wamid.2", "gracias")], &[]);
    assert_eq!(node.webhook("acme", "wa", &body).await, 200);
    chat.until("gracias").await;
    drop(keyboard);
    assert!(chat.child.wait().await.unwrap().success(), "the end of input ends it");
    let sent = node.entries(&key, id).await;
    assert!(sent.iter().any(|e| e["type"] == "message.sent" && e["data"]["content"]["text"] == "buenas"));

    let refused = run(&["chat", "--url", &url, "--token", "a.b.c"]).await;
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("3500"), "{}", text(&refused.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simulator_alone_takes_calls_and_writes_webhooks() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let ready = dir.path().join("simulator.json");
    let faults = dir.path().join("faults.json");
    std::fs::write(&faults, r#"{"receipt_delay_ms": 1, "delay_ms": 1}"#).unwrap();
    let number = format!("{NUMBER}={}", node.url("/webhooks/acme/wa"));
    let mut simulator = Printed::of(patchbay(&[
        "simulate",
        "--listen",
        "127.0.0.1:0",
        "--number",
        &number,
        "--app-secret",
        common::APP_SECRET,
        "--faults",
        faults.to_str().unwrap(),
        "--ready-file",
        ready.to_str().unwrap(),
    ]));
    simulator.until("simulating on http://").await;
    let told = until("it is ready", async || std::fs::read(&ready).ok()).await;
    let told: Value = serde_json::from_slice(&told).unwrap();
    let base = format!("http://{}", told["simulator"].as_str().unwrap());
    let key = node.tenant("acme", &base, NUMBER).await;
    let customer = json!({"from": "34600111222", "name": "Luz", "text": "hola"});
    let wrote = node.http.post(format!("{base}/sim/numbers/{NUMBER}/customers")).json(&customer).send().await;
    assert!(wrote.unwrap().status().is_success());
    let id = conversation("acme", "wa", "34600111222");
    until("the customer's message is there", async || {
        (node.api(&key, "GET", &format!("/conversations/{id}"), None).await.0 == 200).then_some(())
    })
    .await;
    let message = json!({"client_id": "c", "content": {"type": "text", "text": "buenas"}});
    assert_eq!(node.api(&key, "POST", &format!("/conversations/{id}/messages"), Some(message)).await.0, 200);
    let record = until("it was called", async || {
        let record: Value =
            node.http.get(format!("{base}/sim/record")).send().await.ok()?.json().await.ok()?;
        (record["calls"].as_array()?.len() == 1).then_some(record)
    })
    .await;
    assert_eq!(record["calls"][0]["callback"], format!("{id}-3"));
    let outside = run(&["simulate", "--listen", "0.0.0.0:0"]).await;
    assert!(!outside.status.success() && text(&outside.stderr).contains("loopback"));
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_the_configuration_are_told_one_a_line_with_exit_64() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("patchbay.toml");
    std::fs::write(
        &file,
        "[public]\nlistn = \"x\"\n[drain]\ndeadline = 5\n[limits]\nconnections = \"many\"\n",
    )
    .unwrap();
    for command in [vec!["config", "check"], vec!["run"], vec!["dev"]] {
        let args: Vec<&str> = command.iter().copied().chain(["--config", file.to_str().unwrap()]).collect();
        let output = run(&args).await;
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{command:?}: {told}");
        assert_eq!(told.lines().count(), 3, "{told}");
        for part in ["`public.listn`", "`public.listen`", "drain.deadline", "limits.connections"] {
            assert!(told.contains(part), "{part}: {told}");
        }
    }
    let data = dir.path().join("data");
    let output = patchbay(&["dev", "--data-dir", data.to_str().unwrap()])
        .env("PATCHBAY__PUBLIC__LISTEN", "0.0.0.0:0")
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(64), "{}", text(&output.stderr));
    let shown = run(&["config", "show", "--config", "/nonexistent/file"]).await;
    assert_eq!(shown.status.code(), Some(64));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configured_operator_key_is_the_one_that_works() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start_with(dir.path(), &[("PATCHBAY__AUTH__OPERATOR_KEY", "123456")]).await;
    assert_eq!(node.operator_key(), "123456");
    let tenant = json!({"id": "acme", "name": "Acme"});
    assert_eq!(node.api("123456", "POST", "/tenants", Some(tenant)).await.0, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_come_from_a_directory_that_dev_has_made() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    let refused = run(&["token", "--data-dir", empty.to_str().unwrap()]).await;
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("patchbay dev"), "{}", text(&refused.stderr));
    assert!(!empty.exists(), "asking leaves nothing behind");
    let node = Node::start(dir.path()).await;
    let data = dir.path().join("data");
    let told = run(&["token", "--json", "--data-dir", data.to_str().unwrap(), "--ttl", "60"]).await;
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    let mut ws = node.socket(told["token"].as_str().unwrap()).await;
    ws.subscribe("inbox:main").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_explains_itself_with_an_example() {
    for command in ["dev", "run", "simulate", "token", "config", "chat", "doctor", "backup", "restore"] {
        let help = run(&[command, "--help"]).await;
        assert!(help.status.success());
        assert!(text(&help.stdout).contains(&format!("Example: patchbay {command}")), "{command}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_node_is_backed_up_and_comes_back_as_another_log() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", NUMBER).await;
    let id = conversation("acme", "wa", "34600111222");
    for n in 0..50 {
        let body = webhook_body(NUMBER, &[text_item("34600111222", &format!("wamid.{n}"), "hola")], &[]);
        assert_eq!(node.webhook("acme", "wa", &body).await, 200);
    }
    let put =
        node.http.post(node.url("/api/v1/media")).bearer_auth(&key).body("just words").send().await.unwrap();
    let put: Value = put.json().await.unwrap();
    let token = node.token(&key, "anna", 600).await;
    let before = node.socket(&token).await.subscribe(&format!("conversation:{id}")).await.unwrap();
    let data = dir.path().join("data");
    let file = dir.path().join("patchbay.backup");
    let (data_text, file_text) = (data.to_str().unwrap(), file.to_str().unwrap());
    let made = run(&["backup", "--data-dir", data_text, "--to", file_text, "--json"]).await;
    assert!(made.status.success(), "{}", text(&made.stderr));
    let told: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(told["bytes"].as_u64(), Some(std::fs::metadata(&file).unwrap().len()));
    let again = run(&["backup", "--data-dir", data_text, "--to", file_text]).await;
    assert!(!again.status.success() && text(&again.stderr).contains("there already"));
    let refused = run(&["restore", "--from", file_text, "--data-dir", data_text]).await;
    assert!(!refused.status.success(), "a directory that is in use is left alone");
    // What happens after the backup is not in it.
    let late = webhook_body(NUMBER, &[text_item("34600111222", "wamid.late", "later")], &[]);
    assert_eq!(node.webhook("acme", "wa", &late).await, 200);
    drop(node);

    // A directory that no node has kept anything in is no backup, and none is made of it.
    let nowhere = dir.path().join("nowhere");
    let empty = dir.path().join("empty.backup");
    let none =
        run(&["backup", "--data-dir", nowhere.to_str().unwrap(), "--to", empty.to_str().unwrap()]).await;
    assert!(!none.status.success() && !empty.exists() && !nowhere.exists(), "{}", text(&none.stderr));

    let other = tempfile::tempdir().unwrap();
    let target = other.path().join("data");
    let written = format!("{}/", target.to_str().unwrap());
    let restored = run(&["restore", "--from", file_text, "--data-dir", &written, "--json"]).await;
    assert!(restored.status.success(), "{}", text(&restored.stderr));
    let node = Node::start(other.path()).await;
    assert_eq!(node.entries(&key, id).await.len(), 51, "the tenant's key is good here as well");
    let shown = node.get(&key, &format!("/media/{}", put["id"].as_str().unwrap())).await;
    let words = node.http.get(shown["url"].as_str().unwrap()).send().await.unwrap().text().await.unwrap();
    assert_eq!(words, "just words");
    // A client that resumes with what it has seen is told that this is another log.
    let mut ws = node.socket(&token).await;
    let request = json!({"subscribe": {"channel": format!("conversation:{id}"), "recover": true, "offset": 51, "epoch": before["epoch"]}});
    let resumed = ws.call(request).await.unwrap()["subscribe"].take();
    assert_ne!(resumed["epoch"], before["epoch"]);
    assert!(resumed["recovered"].as_bool() != Some(true) && resumed["was_recovering"] == true, "{resumed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_says_what_stands_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let doctor = async |env: &[(&str, &str)]| {
        let mut command = patchbay(&["doctor", "--json", "--data-dir", data.to_str().unwrap()]);
        let output = command.envs(env.iter().copied()).output().await.unwrap();
        (output.status.success(), serde_json::from_slice::<Value>(&output.stdout).unwrap())
    };
    let of = |told: &Value, name: &str| {
        told["checks"]
            .as_array()
            .unwrap()
            .iter()
            .find(|c| c["name"] == name)
            .map(|c| c["verdict"].as_str().unwrap().to_owned())
    };
    let node = Node::start(dir.path()).await;
    let (well, told) = doctor(&[]).await;
    assert!(well, "{told}");
    assert_eq!(
        (of(&told, "node").as_deref(), of(&told, "data directory").as_deref()),
        (Some("ok"), Some("ok"))
    );
    drop(node);
    until("the directory is free", async || {
        let (well, told) = doctor(&[]).await;
        (well && of(&told, "parked").as_deref() == Some("ok")).then_some(())
    })
    .await;
    let (well, told) = doctor(&[("PATCHBAY__LIMITS__CONNECTIONS", "many")]).await;
    assert!(!well && of(&told, "configuration").as_deref() == Some("fail"), "{told}");
    std::fs::write(data.join("FORMAT"), "patchbay-embedded 99\n").unwrap();
    let (well, told) = doctor(&[]).await;
    assert!(!well && of(&told, "data directory").as_deref() == Some("fail"), "{told}");
}
