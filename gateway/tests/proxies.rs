//! Limits by address are by the client's address, behind proxies that are named; others say what they like.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::Node;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// More than what a bucket holds at least.
const MANY: usize = 1_200;
const FEW: (&str, &str) = ("PATCHBAY__LIMITS__STRANGERS_PER_SECOND", "2");

async fn start(env: &[(&str, &str)]) -> (Node, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start_with(dir.path(), &[&[FEW], env].concat()).await;
    (node, dir)
}

/// Whether of many requests without a key of this client's some are refused as too many.
async fn is_held(node: &Node, client: &str) -> bool {
    for _ in 0..MANY {
        let asked = node.http.get(node.url("/api/v1/inboxes")).header("x-forwarded-for", client);
        match asked.send().await.unwrap().status().as_u16() {
            401 => {}
            429 => return true,
            other => panic!("{other}"),
        }
    }
    false
}

/// The status of one, by a proxy that speaks the PROXY protocol; none: the connection was closed.
async fn by_proxy(node: &Node, header: &[u8]) -> Option<u16> {
    let mut stream = TcpStream::connect(node.public()).await.unwrap();
    let request =
        format!("GET /api/v1/inboxes HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", node.public());
    stream.write_all(&[header, request.as_bytes()].concat()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    answer.split_whitespace().nth(1)?.parse().ok()
}

fn header(last: u8) -> Vec<u8> {
    let addresses = [198, 51, 100, last, 127, 0, 0, 1, 0x12, 0x34, 0, 80];
    [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[0x21, 0x11, 0, 12], &addresses].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_proxy_is_believed() {
    let (node, _dir) = start(&[("PATCHBAY__PUBLIC__PROXIES", r#"["127.0.0.0/8"]"#)]).await;
    assert!(is_held(&node, "198.51.100.1").await);
    let other = node.http.get(node.url("/api/v1/inboxes")).header("x-forwarded-for", "198.51.100.2");
    assert_eq!(other.send().await.unwrap().status(), 401, "another client is not held for it");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_is() {
    let (node, _dir) = start(&[]).await;
    let mut held = false;
    for n in 0..MANY {
        let asked = node
            .http
            .get(node.url("/api/v1/inboxes"))
            .header("x-forwarded-for", format!("198.51.{}.{}", n / 256, n % 256));
        held |= asked.send().await.unwrap().status() == 429;
    }
    assert!(held, "an address that it makes up does not help it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_may_say_it_by_the_proxy_protocol() {
    let env =
        [("PATCHBAY__PUBLIC__PROXIES", r#"["127.0.0.1"]"#), ("PATCHBAY__PUBLIC__PROXY_PROTOCOL", "true")];
    let dir = tempfile::tempdir().unwrap();
    // Its demo would ask without a proxy.
    let node = Node::start_with(dir.path(), &[&[FEW], &env[..]].concat()).await;
    let mut seen = Vec::new();
    for _ in 0..MANY {
        seen.push(by_proxy(&node, &header(1)).await);
    }
    assert_eq!(seen[0], Some(401));
    assert!(seen.contains(&Some(429)), "{seen:?}");
    assert_eq!(by_proxy(&node, &header(2)).await, Some(401), "another client is not held for it");
    for wrong in [&b""[..], b"PROXY TCP4 198.51.100.1 127.0.0.1 1 80\r\n"] {
        assert_eq!(by_proxy(&node, wrong).await, None);
    }
}
