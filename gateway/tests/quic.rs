//! QUIC: the Protobuf stream, datagrams where they were asked for, a client that changes its address, a certificate that
//! changes, and what is not allowed. With this project's own stack as the client, and with a foreign one (`aioquic`).
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::collections::VecDeque;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use common::{Node, conversation, text_item, until, webhook_body};
use patchbay_protocol::client::request::{ConnectRequest, RpcRequest, SubscribeRequest};
use patchbay_protocol::client::{Command, Reply, protobuf};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, Endpoint, ReadError, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};

const NUMBER: &str = "1001";
const LUZ: &str = "34600111222";
const WAIT: Duration = Duration::from_secs(60);

struct World {
    node: Node,
    token: String,
    dir: tempfile::TempDir,
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path()).await;
    let key = node.tenant("acme", "http://127.0.0.1:9", NUMBER).await;
    let token = node.token(&key, "anna", 600).await;
    World { node, token, dir }
}

fn client(authority: &Path, alpn: &[u8]) -> Endpoint {
    let mut authorities = rustls::RootCertStore::empty();
    authorities.add(CertificateDer::from_pem_file(authority).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(authorities)
        .with_no_client_auth();
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.enable_early_data = true;
    let mut endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap())));
    endpoint
}

struct Client {
    connection: quinn::Connection,
    send: SendStream,
    receive: RecvStream,
    rest: BytesMut,
    read: VecDeque<Reply>,
    id: u32,
}

impl World {
    fn authority(&self) -> PathBuf {
        self.dir.path().join("data/certs/ca.pem")
    }

    async fn connection(&self, endpoint: &Endpoint) -> quinn::Connection {
        let address = self.node.ready["quic"].as_str().unwrap().parse().unwrap();
        endpoint.connect(address, "localhost").unwrap().await.unwrap()
    }

    async fn client(&self, endpoint: &Endpoint, data: &'static str) -> Client {
        let connection = self.connection(endpoint).await;
        let (send, receive) = connection.open_bi().await.unwrap();
        let (rest, read) = Default::default();
        let mut client = Client { connection, send, receive, rest, read, id: 0 };
        let connect = ConnectRequest {
            token: self.token.clone(),
            data: Bytes::from(data),
            ..ConnectRequest::default()
        };
        let reply = client.call(Command { connect: Some(Box::new(connect)), ..Command::default() }).await;
        assert!(reply.connect.is_some(), "{reply:?}");
        client
    }

    async fn writes(&self, n: usize) {
        let body = webhook_body(NUMBER, &[text_item(LUZ, &format!("wamid.{n}"), &format!("{n}"))], &[]);
        assert_eq!(self.node.webhook("acme", "wa", &body).await, 200);
    }
}

impl Client {
    async fn send(&mut self, command: Command) -> u32 {
        self.id += 1;
        let frame = protobuf::encode_command(&Command { id: self.id, ..command });
        self.send.write_all(&frame).await.unwrap();
        self.id
    }

    /// The next reply or push; pings are answered.
    async fn next(&mut self) -> Result<Option<Reply>, ReadError> {
        loop {
            if let Some(reply) = self.read.pop_front() {
                if reply != Reply::default() {
                    return Ok(Some(reply));
                }
                self.send.write_all(&[0]).await.unwrap();
                continue;
            }
            let chunk = tokio::time::timeout(WAIT, self.receive.read_chunk(64 * 1024, true));
            let Some(chunk) = chunk.await.expect("nothing came for a minute")? else { return Ok(None) };
            self.rest.extend_from_slice(&chunk.bytes);
            while let Some(length) = whole(&self.rest) {
                let frame = self.rest.split_to(length).freeze();
                self.read.extend(protobuf::decode_replies(&frame).unwrap());
            }
        }
    }

    async fn call(&mut self, command: Command) -> Reply {
        let id = self.send(command).await;
        let mut before = VecDeque::new();
        loop {
            let reply = self.next().await.unwrap().expect("the stream goes on");
            if reply.id == id {
                before.append(&mut self.read);
                self.read = before;
                return reply;
            }
            before.push_back(reply);
        }
    }

    async fn rpc(&mut self, method: &str, data: Value) -> Value {
        let reply = self.call(rpc(method, data)).await;
        assert!(reply.error.is_none(), "{reply:?}");
        serde_json::from_slice(&reply.rpc.unwrap().data).unwrap()
    }

    async fn subscribe(&mut self, channel: &str) -> u64 {
        let request =
            SubscribeRequest { channel: channel.into(), join_leave: true, ..SubscribeRequest::default() };
        let reply = self.call(Command { subscribe: Some(Box::new(request)), ..Command::default() }).await;
        reply.subscribe.unwrap_or_else(|| panic!("{:?}", reply.error)).offset
    }
}

fn rpc(method: &str, data: Value) -> Command {
    let request = RpcRequest { method: method.into(), data: data.to_string().into() };
    Command { rpc: Some(Box::new(request)), ..Command::default() }
}

/// How long the first whole reply is, with its length.
fn whole(bytes: &[u8]) -> Option<usize> {
    let mut rest = bytes;
    let (mut length, mut shift) = (0usize, 0);
    while rest.has_remaining() {
        let byte = rest.get_u8();
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return (rest.len() >= length).then(|| bytes.len() - rest.len() + length);
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_sees_and_does_what_it_would_over_websocket_also_from_another_address() {
    let w = world().await;
    w.writes(1).await;
    let id = conversation("acme", "wa", LUZ).to_string();
    let endpoint = client(&w.authority(), b"patchbay/1");
    let mut anna = w.client(&endpoint, "").await;
    let tip = anna.subscribe(&format!("conversation:{id}")).await;
    assert_eq!(tip, 2);
    let note = |n: u64| json!({"conversation": id, "client_id": format!("q{n}"), "text": "x".repeat(3000)});
    // Many commands at once, larger than what is read at once: each once, in order.
    for n in 0..50 {
        anna.send(rpc("note.add", note(n))).await;
    }
    let mut seqs = Vec::new();
    let mut offsets = Vec::new();
    while seqs.len() < 50 || offsets.len() < 50 {
        let reply = anna.next().await.unwrap().unwrap();
        if let Some(rpc) = reply.rpc {
            let told: Value = serde_json::from_slice(&rpc.data).unwrap();
            seqs.push((u64::from(reply.id), told["seq"].as_u64().unwrap()));
        } else if let Some(publication) = reply.push.and_then(|p| p.publication) {
            offsets.push(publication.offset);
        }
    }
    assert_eq!(offsets, (tip + 1..=tip + 50).collect::<Vec<_>>());
    seqs.sort_unstable();
    assert!(seqs.iter().map(|(_, seq)| *seq).eq(tip + 1..=tip + 50), "{seqs:?}");
    // Its address changes under it: the connection stays.
    let before = anna.connection.stable_id();
    endpoint.rebind(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
    let told = anna.rpc("note.add", note(99)).await;
    assert_eq!(told["seq"], tip + 51);
    w.writes(2).await;
    loop {
        let push = anna.next().await.unwrap().unwrap().push;
        if push.and_then(|p| p.publication).is_some_and(|p| p.offset == tip + 52) {
            break;
        }
    }
    assert_eq!(anna.connection.stable_id(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_come_only_to_who_asked_for_them() {
    let w = world().await;
    w.writes(1).await;
    let id = conversation("acme", "wa", LUZ).to_string();
    let endpoint = client(&w.authority(), b"patchbay/1");
    let mut asked = w.client(&endpoint, r#"{"datagrams":true}"#).await;
    let mut other = w.client(&endpoint, "{}").await;
    for client in [&mut asked, &mut other] {
        client.subscribe(&format!("conversation:{id}")).await;
    }
    other.rpc("typing.set", json!({"conversation": id, "on": true})).await;
    // By stream to who did not ask.
    let typing = |reply: &Reply| {
        let publication = reply.push.as_ref().and_then(|push| push.publication.as_ref())?;
        let data: Value = serde_json::from_slice(&publication.data).unwrap();
        (data["type"] == "typing" && publication.offset == 0).then_some(())
    };
    while typing(&other.next().await.unwrap().unwrap()).is_none() {}
    // By datagram to who did: one whole reply each, without its length.
    loop {
        let datagram = tokio::time::timeout(WAIT, asked.connection.read_datagram()).await.unwrap().unwrap();
        let reply: Reply = prost::Message::decode(datagram).unwrap();
        assert!(reply.push.as_ref().is_some_and(|p| p.publication.as_ref().is_none_or(|p| p.offset == 0)));
        if typing(&reply).is_some() {
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_with_a_word_and_a_code() {
    let w = world().await;
    let endpoint = client(&w.authority(), b"patchbay/1");
    let mut client_ = w.client(&endpoint, "").await;
    // A second stream is not to be had.
    let second = client_.connection.clone();
    let second = tokio::spawn(async move { second.open_bi().await.is_ok() });
    client_.send(Command { connect: Some(Box::default()), ..Command::default() }).await;
    let told = loop {
        let Some(reply) = client_.next().await.unwrap() else { panic!("it ended without a word") };
        if let Some(disconnect) = reply.push.and_then(|push| push.disconnect) {
            break disconnect;
        }
    };
    assert_eq!((told.code, told.reconnect), (3501, false));
    let closed = tokio::time::timeout(WAIT, client_.connection.closed()).await.unwrap();
    let ConnectionError::ApplicationClosed(closed) = closed else { panic!("{closed:?}") };
    assert_eq!(closed.error_code, VarInt::from_u32(3501));
    assert!(!second.await.unwrap(), "a second stream was opened");
    // A first command that is no connect, what is no command, and one that is too large.
    for (bytes, code) in [
        (vec![1, 0xff], 3501u32),
        (vec![0xff; 6], 3501),
        (vec![0xff, 0xff, 0x7f], 1009),
        (vec![2, 8, 1], 3501),
    ] {
        let connection = w.connection(&endpoint).await;
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(&bytes).await.unwrap();
        let closed = tokio::time::timeout(WAIT, connection.closed()).await.unwrap();
        let ConnectionError::ApplicationClosed(closed) = closed else { panic!("{closed:?}") };
        assert_eq!(closed.error_code, VarInt::from_u32(code), "{bytes:?}");
    }
    // Another protocol is not spoken.
    let stranger = client(&w.authority(), b"h3");
    let address = w.node.ready["quic"].as_str().unwrap().parse().unwrap();
    assert!(stranger.connect(address, "localhost").unwrap().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_no_early_data() {
    let w = world().await;
    let endpoint = client(&w.authority(), b"patchbay/1");
    let address = w.node.ready["quic"].as_str().unwrap().parse().unwrap();
    // The second time there is a ticket; still nothing is sent before the handshake has ended.
    let first = w.client(&endpoint, "").await;
    first.connection.close(VarInt::from_u32(0), b"");
    for _ in 0..2 {
        let connecting = endpoint.connect(address, "localhost").unwrap();
        match connecting.into_0rtt() {
            Ok((connection, accepted)) => {
                assert!(!accepted.await, "early data was taken");
                connection.close(VarInt::from_u32(0), b"");
            }
            Err(connecting) => connecting.await.unwrap().close(VarInt::from_u32(0), b""),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_shown_to_who_comes_and_costs_nobody_a_connection() {
    let w = world().await;
    let endpoint = client(&w.authority(), b"patchbay/1");
    let mut anna = w.client(&endpoint, "").await;
    let shown = |connection: &quinn::Connection| {
        let chain = connection.peer_identity().unwrap();
        let chain = chain.downcast::<Vec<CertificateDer<'static>>>().unwrap();
        chain[0].to_vec()
    };
    let before = shown(&anna.connection);
    let certs = w.dir.path().join("data/certs");
    let made = std::process::Command::new(env!("CARGO_BIN_EXE_patchbay"))
        .args(["dev-cert", "--dir"])
        .arg(&certs)
        .status()
        .unwrap();
    assert!(made.success());
    until("the new certificate is shown", async || {
        let connection = w.connection(&endpoint).await;
        let now = shown(&connection);
        connection.close(VarInt::from_u32(0), b"");
        (now != before).then_some(())
    })
    .await;
    assert_eq!(anna.rpc("presence.set", json!({"state": "away"})).await["state"], "away");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_stack_is_served() {
    let Some(sdk) = common::sdks() else { return };
    let w = world().await;
    w.writes(1).await;
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/quic.py");
    let ended = tokio::process::Command::new(sdk.join("py/bin/python"))
        .arg(script)
        .arg(w.node.ready["quic"].as_str().unwrap())
        .arg(w.authority())
        .arg(&w.token)
        .arg(conversation("acme", "wa", LUZ).to_string())
        .status()
        .await
        .unwrap();
    assert!(ended.success(), "the client on aioquic failed");
}
