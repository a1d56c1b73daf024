//! TLS at the public door: HTTP/2 and HTTP/1.1, sockets, what is not spoken, and a certificate that changes.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::{Node, until};
use futures_util::{SinkExt as _, StreamExt as _};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::Message;

struct World {
    node: Node,
    certs: PathBuf,
    _dir: tempfile::TempDir,
}

fn makes(certs: &Path) {
    let made = Command::new(env!("CARGO_BIN_EXE_patchbay")).args(["dev-cert", "--dir"]).arg(certs).status();
    assert!(made.unwrap().success());
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let certs = dir.path().join("certs");
    makes(&certs);
    let file = |name: &str| certs.join(name).to_str().unwrap().to_owned();
    let env = [("PATCHBAY__PUBLIC__CERT", file("node.pem")), ("PATCHBAY__PUBLIC__KEY", file("node-key.pem"))];
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let node = Node::start_with(dir.path(), &env).await;
    World { node, certs, _dir: dir }
}

impl World {
    fn client(&self) -> reqwest::Client {
        let authority = std::fs::read(self.certs.join("ca.pem")).unwrap();
        let authority = reqwest::Certificate::from_pem(&authority).unwrap();
        reqwest::Client::builder().no_proxy().tls_certs_only([authority]).build().unwrap()
    }

    fn url(&self, path: &str) -> String {
        format!("https://localhost:{}{path}", self.node.public().rsplit_once(':').unwrap().1)
    }

    async fn stream(
        &self,
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut authorities = rustls::RootCertStore::empty();
        authorities.add(CertificateDer::from_pem_file(self.certs.join("ca.pem")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(authorities)
            .with_no_client_auth();
        let socket = TcpStream::connect(self.node.public()).await?;
        TlsConnector::from(Arc::new(tls)).connect(ServerName::try_from("localhost").unwrap(), socket).await
    }
}

fn shown(stream: &TlsStream<TcpStream>) -> Vec<u8> {
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_come_by_tls_over_either_http_and_by_nothing_else() {
    let w = world().await;
    let key = w.node.demo_key();
    let http = w.client();
    let asked = http.get(w.url("/api/v1/inboxes")).bearer_auth(&key).send().await.unwrap();
    assert_eq!((asked.status().as_u16(), asked.version()), (200, reqwest::Version::HTTP_2));
    // Many at once over one connection, with bodies.
    let tokens = (0..64).map(|_| async {
        let asked =
            http.post(w.url("/api/v1/agents/anna/tokens")).bearer_auth(&key).json(&json!({"ttl_s": 60}));
        asked.send().await.unwrap().json::<Value>().await.unwrap()["token"].as_str().unwrap().to_owned()
    });
    let tokens = futures_util::future::join_all(tokens).await;
    assert!(tokens.iter().all(|token| token.split('.').count() == 3));
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let stream = w.stream(&[version]).await.unwrap();
        let address =
            format!("wss://localhost:{}/connection/websocket", w.node.public().rsplit_once(':').unwrap().1);
        let (mut socket, _) = tokio_tungstenite::client_async(address, stream).await.unwrap();
        let connect = json!({"id": 1, "connect": {"token": tokens[0]}}).to_string();
        socket.send(Message::text(connect)).await.unwrap();
        let reply = socket.next().await.unwrap().unwrap().into_text().unwrap();
        assert!(reply.contains("\"client\""), "{reply}");
    }
    // Without TLS nothing is answered, and costs nobody else anything.
    let plain = reqwest::Client::builder().no_proxy().build().unwrap();
    assert!(plain.get(format!("http://{}/api/v1/inboxes", w.node.public())).send().await.is_err());
    // A streamed answer goes on over HTTP/2 as well, beside other requests of the connection.
    let connect = json!({"id": 1, "connect": {"token": tokens[1]}}).to_string();
    let mut stream = http.post(w.url("/connection/http_stream")).body(connect).send().await.unwrap();
    assert_eq!(stream.version(), reqwest::Version::HTTP_2);
    let first: Value = serde_json::from_slice(&stream.chunk().await.unwrap().unwrap()).unwrap();
    let (session, node) = (first["connect"]["session"].clone(), first["connect"]["node"].clone());
    let command = json!({"session": session, "node": node, "data": {"id": 2, "rpc": {"method": "presence.get", "data": {}}}});
    let taken = http.post(w.url("/emulation")).body(command.to_string()).send().await.unwrap();
    assert_eq!(taken.status(), 204);
    let reply: Value = serde_json::from_slice(&stream.chunk().await.unwrap().unwrap()).unwrap();
    assert_eq!(reply["id"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_costs_nobody_a_socket() {
    let w = world().await;
    let key = w.node.demo_key();
    let asked =
        w.client().post(w.url("/api/v1/agents/anna/tokens")).bearer_auth(&key).json(&json!({"ttl_s": 600}));
    let token = asked.send().await.unwrap().json::<Value>().await.unwrap()["token"].clone();
    let stream = w.stream(rustls::ALL_VERSIONS).await.unwrap();
    let before = shown(&stream);
    let (mut socket, _) =
        tokio_tungstenite::client_async("wss://localhost/connection/websocket", stream).await.unwrap();
    let connect = json!({"id": 1, "connect": {"token": token}}).to_string();
    socket.send(Message::text(connect)).await.unwrap();
    socket.next().await.unwrap().unwrap();
    // What is no certificate changes nothing.
    let good = std::fs::read(w.certs.join("node.pem")).unwrap();
    std::fs::write(w.certs.join("node.pem"), "no certificate").unwrap();
    until("it was looked at", async || {
        let log = std::fs::read_to_string(w.node.dir.join("node.log")).unwrap();
        log.contains("the certificate stays as it was").then_some(())
    })
    .await;
    assert_eq!(shown(&w.stream(rustls::ALL_VERSIONS).await.unwrap()), before);
    std::fs::write(w.certs.join("node.pem"), good).unwrap();
    makes(&w.certs);
    until("the new one is shown", async || {
        (shown(&w.stream(rustls::ALL_VERSIONS).await.unwrap()) != before).then_some(())
    })
    .await;
    let rpc = json!({"id": 2, "rpc": {"method": "presence.get", "data": {}}}).to_string();
    socket.send(Message::text(rpc)).await.unwrap();
    loop {
        let text = socket.next().await.expect("the socket stays").unwrap().into_text().unwrap();
        if text.contains("\"id\":2") {
            break;
        }
    }
}
