//! The public SDKs, unmodified from their registries, as agents against the real binary: connect, subscribe, receive,
//! send by rpc, history, presence, recover after a SIGKILL, refresh, unsubscribe; JSON and Protobuf, and the fall-backs of
//! the one that has them.
//!
//! `./x test` installs the SDKs and says where; `./x test --quick` goes without them.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::PathBuf;
use std::process::Stdio;

use common::{Node, conversation, text_item, webhook_body};
use patchbay_loadtest::simulator::{Faults, Simulator};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::Command;

const NUMBER: &str = "3003";

async fn agent(language: &str, encoding: &str, transport: &str) {
    let Some(sdk) = common::sdks() else { return };
    common::install_crypto();
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(dir.path()).await;
    let simulator = Simulator::start("127.0.0.1:0".parse().unwrap(), 1, Faults::default()).await.unwrap();
    let key = node.tenant("sdk", &format!("http://{}", simulator.address()), NUMBER).await;
    let public = node.public().to_owned();
    let id = conversation("sdk", "wa", "34600111222").to_string();
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/sdk");
    let mut command = match language {
        "js" => {
            let mut c = Command::new("node");
            c.arg(scripts.join("agent.mjs"));
            c
        }
        _ => {
            let mut c = Command::new(sdk.join("py/bin/python"));
            c.arg(scripts.join("agent.py"));
            c
        }
    };
    let url = format!("ws://{public}/connection/websocket");
    let api = format!("http://{public}/api/v1");
    command.args([encoding, sdk.to_str().unwrap(), &url, &api, &key, &id, transport]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut say = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut written = 0;
    while let Some(line) = lines.next_line().await.unwrap() {
        match line.as_str() {
            "WRITE" => {
                written += 1;
                let body =
                    webhook_body(NUMBER, &[text_item("34600111222", &format!("wamid.{written}"), "x")], &[]);
                assert_eq!(node.webhook("sdk", "wa", &body).await, 200);
            }
            "KILL" => {
                node.kill().await;
                node = Node::start_with(&node.dir.clone(), &[("PATCHBAY__PUBLIC__LISTEN", public.as_str())])
                    .await;
            }
            "DONE" => break,
            other => println!("{language} {encoding}: {other}"),
        }
        say.write_all(b"ok\n").await.unwrap();
    }
    assert!(child.wait().await.unwrap().success(), "the {language} agent ({encoding}) failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn javascript_json() {
    agent("js", "json", "websocket").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn javascript_protobuf() {
    agent("js", "protobuf", "websocket").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn python_json() {
    agent("py", "json", "websocket").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn python_protobuf() {
    agent("py", "protobuf", "websocket").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn javascript_over_an_http_stream() {
    agent("js", "json", "http_stream").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn javascript_protobuf_over_an_http_stream() {
    agent("js", "protobuf", "http_stream").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn javascript_over_server_sent_events() {
    agent("js", "json", "sse").await;
}
