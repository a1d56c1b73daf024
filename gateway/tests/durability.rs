//! The store's sync call is held: no reply, no 200, no publication and no provider call leaves before it returns.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::{Ws, conversation, sign, text_item, webhook_body};
use metrics_exporter_prometheus::PrometheusBuilder;
use patchbay_actors::directory::{Account, Agent, Inbox, Settings, Tenant};
use patchbay_gateway::config::{Config, Secret};
use patchbay_gateway::health::Ops;
use patchbay_gateway::server::{Mode, Server};
use patchbay_loadtest::simulator::{Faults, Simulator};
use patchbay_protocol::principal::Role;
use patchbay_storage::embedded::{Embedded, Sync};
use serde_json::json;

#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn hold(&self, held: bool) {
        *self.0.0.lock().unwrap() = held;
        self.0.1.notify_all();
    }
}

impl Sync for Gate {
    fn sync(&self, database: &fjall::Database) -> Result<(), fjall::Error> {
        let mut held = self.0.0.lock().unwrap();
        while *held {
            held = self.0.1.wait(held).unwrap();
        }
        database.persist(fjall::PersistMode::SyncData)
    }
}

/// The next entry that the socket is shown; other pushes (its own sessions) do not count.
async fn entry(ws: &mut Ws) -> u64 {
    loop {
        if let Some(seq) = ws.push().await.unwrap()["pub"]["offset"].as_u64() {
            return seq;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_leaves_before_the_sync_returns() {
    common::install_crypto();
    let dir = tempfile::tempdir().unwrap();
    let gate = Gate::default();
    let engine = Arc::new(Embedded::open_with(&dir.path().join("data"), gate.clone()).unwrap());
    let mut config = Config::default();
    config.public.listen = "127.0.0.1:0".into();
    config.ops.listen = "127.0.0.1:0".into();
    config.storage.data_dir = dir.path().join("data");
    config.auth.hmac_secret_key = Some(Secret::Text("secret".into()));
    let metrics = PrometheusBuilder::new().build_recorder().handle();
    let ops = Ops::start(&config, Mode::Dev, metrics).await.unwrap();
    let server = Server::start(&config, Mode::Dev, engine.into(), ops).await.unwrap();
    let simulator =
        Simulator::start("127.0.0.1:0".parse().unwrap(), 1, Faults { delay_ms: 0, ..Faults::default() })
            .await
            .unwrap();
    let directory = server.node.directory();
    let tenant = "acme".parse().unwrap();
    directory
        .create_tenant(&tenant, &Tenant { name: "A".into(), created_at: Default::default() })
        .await
        .unwrap();
    directory.put_inbox(&tenant, &"main".parse().unwrap(), &Inbox { name: "M".into() }).await.unwrap();
    let anna = Agent { name: "Anna".into(), role: Role::Admin, inboxes: vec![], not_before: None };
    directory.put_agent(&tenant, &"anna".parse().unwrap(), &anna).await.unwrap();
    let settings = Settings { api_base: format!("http://{}", simulator.address()), ..Settings::default() };
    let account = Account {
        connector: "whatsapp".into(),
        inbox: "main".parse().unwrap(),
        name: "WA".into(),
        external_id: "1".into(),
        credentials: json!({"app_secret": common::APP_SECRET, "verify_token": "v", "access_token": "a"}),
        settings,
    };
    directory.put_account(&tenant, &"wa".parse().unwrap(), &account).await.unwrap();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let post = |n: u32| {
        let body = webhook_body("1", &[text_item("34600111222", &format!("wamid.{n}"), "x")], &[]);
        http.post(format!("http://{}/webhooks/acme/wa", server.public))
            .header("x-hub-signature-256", sign(common::APP_SECRET, &body))
            .body(body)
            .send()
    };
    assert_eq!(post(1).await.unwrap().status(), 200);
    let id = conversation("acme", "wa", "34600111222");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let claims =
        json!({"tenant": "acme", "sub": "anna", "role": "admin", "iat": now, "exp": now + 600, "jti": "j"});
    let token = jsonwebtoken::encode(
        &jsonwebtoken::Header::default(),
        &claims,
        &jsonwebtoken::EncodingKey::from_secret(b"secret"),
    )
    .unwrap();
    let mut watcher = Ws::open(&server.public.to_string()).await;
    watcher.call(json!({"connect": {"token": token}})).await.unwrap();
    watcher.subscribe(&format!("conversation:{id}")).await.unwrap();
    let mut sender = Ws::open(&server.public.to_string()).await;
    sender.call(json!({"connect": {"token": token}})).await.unwrap();
    let calls = simulator.record().calls.len();

    gate.hold(true);
    let mut webhook = tokio::spawn(post(2));
    let send = json!({"rpc": {"method": "message.send", "data": {"conversation": id, "client_id": "1", "content": {"type": "text", "text": "x"}}}});
    let sent = sender.send(send).await;
    let quiet = Duration::from_millis(700);
    assert!(tokio::time::timeout(quiet, &mut webhook).await.is_err(), "a 200 before the sync");
    assert!(tokio::time::timeout(quiet, sender.read()).await.is_err(), "a reply before the sync");
    assert!(tokio::time::timeout(quiet, entry(&mut watcher)).await.is_err(), "a publication before the sync");
    assert_eq!(simulator.record().calls.len(), calls, "a provider call before the sync");

    gate.hold(false);
    assert_eq!(webhook.await.unwrap().unwrap().status(), 200);
    assert!(sender.reply(sent).await.unwrap()["rpc"]["data"]["seq"].is_u64());
    let mut seen = vec![];
    while seen.len() < 2 {
        seen.push(entry(&mut watcher).await);
    }
    assert_eq!(seen, [3, 4]);
    common::until("the provider is called", async || {
        (simulator.record().calls.len() == calls + 1).then_some(())
    })
    .await;
}
