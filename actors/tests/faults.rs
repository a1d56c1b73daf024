//! A whole node on the model engine, whose writes are refused, lost, late, unknown and out of order, and which is
//! stopped at any write and started again on what had reached the store. Whatever was acked stands, once, in order;
//! the provider is never called twice for one message; receipts climb.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use patchbay_actors::clock::Clock;
use patchbay_actors::desk::{Desk, Page, Who};
use patchbay_actors::directory::{Account, Inbox, Settings, Tenant};
use patchbay_actors::intake::Intake;
use patchbay_actors::node::{Node, NodeConfig};
use patchbay_actors::ports::{Provider, Publisher};
use patchbay_connectors::Connector as _;
use patchbay_protocol::command::SendMessage;
use patchbay_protocol::outbound::{Call, CallResult};
use patchbay_protocol::{AccountId, AgentId, Content, ConversationId, InboxId, TenantId, Timestamp};
use patchbay_storage::model::{Faults, Model};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

/// What was published, by conversation: a later owner may show again, but never something else.
#[derive(Default)]
struct Shown(Mutex<HashMap<ConversationId, BTreeMap<u64, Bytes>>>);

impl Publisher for Shown {
    fn entries(&self, id: ConversationId, entries: &[(u64, Bytes)]) {
        let mut shown = self.0.lock().unwrap();
        for (seq, entry) in entries {
            let before = shown.entry(id).or_default().insert(*seq, entry.clone());
            assert!(before.is_none_or(|b| b == *entry), "{id} #{seq} was shown as something else");
        }
    }
    fn inbox(&self, _: &TenantId, _: &InboxId, _: Bytes) {}
    fn agent(&self, _: &TenantId, _: &AgentId, _: Bytes) {}
}

/// What the provider was asked: (callback, answered as not taken).
#[derive(Default)]
struct Calls {
    made: Vec<(String, bool)>,
    count: u64,
}

/// A provider that answers, refuses for now, or is lost. After a crash of its node it hears nothing more from it.
struct Graph {
    calls: Arc<Mutex<Calls>>,
    alive: AtomicBool,
    random: Mutex<SmallRng>,
}

#[async_trait]
impl Provider for Graph {
    async fn call(&self, _: &Account, call: Call) -> CallResult {
        let (roll, delay) = {
            let mut random = self.random.lock().unwrap();
            (random.random_range(0..100u32), random.random_range(1..200u64))
        };
        if !self.alive.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let body: Value = serde_json::from_slice(&call.body).unwrap();
        let callback = body["biz_opaque_callback_data"].as_str().unwrap_or("").to_owned();
        let not_taken = roll < 15;
        let n = {
            let mut calls = self.calls.lock().unwrap();
            calls.made.push((callback, not_taken));
            calls.count += 1;
            calls.count
        };
        tokio::time::sleep(Duration::from_millis(delay)).await;
        if !self.alive.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        match roll {
            0..15 => CallResult::Answered {
                status: 400,
                retry_after: None,
                body: Bytes::from_static(br#"{"error":{"code":131000}}"#),
            },
            15..25 => CallResult::Lost,
            _ => CallResult::Answered {
                status: 200,
                retry_after: None,
                body: Bytes::from(json!({"messages": [{"id": format!("wamid.{n}")}]}).to_string()),
            },
        }
    }
}

struct Running {
    node: Arc<Node>,
    desk: Arc<Desk>,
    intake: Arc<Intake>,
    graph: Arc<Graph>,
    model: Model,
}

fn tenant() -> TenantId {
    "t".parse().unwrap()
}

fn account() -> AccountId {
    "wa".parse().unwrap()
}

async fn start(
    model: Model,
    clock: Clock,
    shown: Arc<Shown>,
    calls: Arc<Mutex<Calls>>,
    seed: u64,
    faults: Faults,
) -> Running {
    let random = Mutex::new(SmallRng::seed_from_u64(seed));
    let graph = Arc::new(Graph { calls, alive: AtomicBool::new(true), random });
    let config = || NodeConfig {
        shards: 4,
        idle_after: Duration::from_secs(3),
        ..NodeConfig::new(Arc::new(model.clone()), clock, shown.clone(), graph.clone())
    };
    model.set_faults(faults);
    let node = loop {
        // A store that does not answer is asked again, as an operator would.
        match Node::start(config()).await {
            Ok(node) => break node,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    Running { desk: Desk::new(node.clone()), intake: Intake::new(node.clone()), node, graph, model }
}

async fn seed_documents(model: &Model) {
    let directory = patchbay_actors::directory::Directory::new(Arc::new(model.clone()));
    directory
        .create_tenant(&tenant(), &Tenant { name: "T".into(), created_at: Timestamp::default() })
        .await
        .unwrap();
    directory.put_inbox(&tenant(), &"main".parse().unwrap(), &Inbox { name: "Main".into() }).await.unwrap();
    let document = Account {
        connector: "whatsapp".into(),
        inbox: "main".parse().unwrap(),
        name: "WA".into(),
        external_id: "1".into(),
        credentials: json!({"app_secret": "s", "verify_token": "v", "access_token": "a"}),
        settings: Settings::default(),
    };
    directory.put_account(&tenant(), &account(), &document).await.unwrap();
}

fn body(customer: usize, id: &str, at: i64) -> Vec<u8> {
    let message = json!({"from": format!("3460{customer}000"), "id": id, "timestamp": at.to_string(), "type": "text", "text": {"body": id}});
    let value = json!({"metadata": {"phone_number_id": "1"}, "contacts": [], "messages": [message]});
    json!({"entry": [{"changes": [{"field": "messages", "value": value}]}]}).to_string().into_bytes()
}

fn id_of(customer: usize) -> ConversationId {
    ConversationId::derive(&tenant(), &account(), &format!("3460{customer}000"))
}

impl Running {
    async fn receive(&self, customer: usize, id: &str) -> bool {
        let at = self.node.shards().clock.now().as_millis() / 1000;
        let items = patchbay_connectors::whatsapp::WhatsApp.parse(&body(customer, id, at)).unwrap();
        let Ok(Some(document)) = self.node.directory().account(&tenant(), &account()).await else {
            return false;
        };
        self.intake.take(&tenant(), &account(), &document, items).await.is_ok()
    }

    async fn send(&self, customer: usize, client_id: &str) -> Option<u64> {
        let message = SendMessage {
            client_id: client_id.into(),
            content: Content::Text { text: client_id.into() },
            reply_to: None,
            if_seq: None,
        };
        let who = Who::Api(tenant());
        let request = Desk::send_request(&who, message);
        let answer = self.desk.submit(&who, id_of(customer), request).await.ok()?;
        match answer.wait().await.ok()? {
            patchbay_protocol::command::Reply::Sent(sent) => Some(sent.seq),
            _ => None,
        }
    }

    /// Stops this node where it stands: nothing of it reaches the store or the provider any more. What had reached
    /// the store goes on in another one.
    fn crash(self) -> Model {
        let left = self.model.fork();
        self.graph.alive.store(false, Ordering::Relaxed);
        self.model.stop_after(0);
        left
    }
}

async fn entries(running: &Running, id: ConversationId) -> Vec<Value> {
    let mut all: Vec<Value> = Vec::new();
    loop {
        let after = all.len() as u64;
        match running.desk.entries(&tenant(), id, Page::After(after), 1000).await {
            Ok(page) if page.entries.is_empty() => return all,
            Ok(page) => {
                all.extend(page.entries.iter().map(|(_, e)| serde_json::from_slice::<Value>(e).unwrap()))
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn one_seed(seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let clock = Clock::from(Timestamp::parse("2026-11-21T09:00:00Z").unwrap());
    let (shown, calls) = (Arc::new(Shown::default()), Arc::new(Mutex::new(Calls::default())));
    let first = Model::with_faults(seed, Faults::default());
    seed_documents(&first).await;
    let mut running = start(first, clock, shown.clone(), calls.clone(), seed, Faults::rough()).await;
    let mut received: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    let mut sent: HashMap<(usize, String), u64> = HashMap::new();
    for n in 0..120 {
        let customer = random.random_range(0..4usize);
        let id = format!("m{n}");
        if !received.contains_key(&customer) || random.random_bool(0.5) {
            // The provider repeats a body until it is taken.
            while !running.receive(customer, &id).await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            received.entry(customer).or_default().push(id);
        } else {
            let seq = loop {
                match running.send(customer, &id).await {
                    Some(seq) => break seq,
                    None => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            };
            sent.insert((customer, id), seq);
        }
        match random.random_range(0..100u32) {
            0..6 => {
                let left = running.crash();
                running = start(left, clock, shown.clone(), calls.clone(), seed + n, Faults::rough()).await;
            }
            6..20 => tokio::time::sleep(Duration::from_secs(random.random_range(1..8))).await,
            _ => {}
        }
    }
    running.model.set_faults(Faults::default());
    tokio::time::sleep(Duration::from_secs(900)).await;
    let made = calls.lock().unwrap().made.clone();
    check(seed, &running, &received, &sent, &made).await;
}

async fn check(
    seed: u64,
    running: &Running,
    received: &BTreeMap<usize, Vec<String>>,
    sent: &HashMap<(usize, String), u64>,
    calls: &[(String, bool)],
) {
    let mut taken: BTreeSet<&str> = BTreeSet::new();
    for (callback, not_taken) in calls {
        assert!(!taken.contains(callback.as_str()), "seed {seed}: {callback} was called again");
        if !not_taken {
            taken.insert(callback);
        }
    }
    for (customer, ids) in received {
        let log = entries(running, id_of(*customer)).await;
        assert!(log.iter().enumerate().all(|(n, e)| e["seq"] == json!(n + 1)), "seed {seed}: a gap");
        let inbound: Vec<&str> = log
            .iter()
            .filter(|e| e["type"] == "message.received")
            .map(|e| e["data"]["provider_id"].as_str().unwrap())
            .collect();
        assert_eq!(&inbound, ids, "seed {seed}: what was acked, once and in order");
        for ((_, client_id), seq) in sent.iter().filter(|((c, _), _)| c == customer) {
            let found: Vec<u64> = log
                .iter()
                .filter(|e| e["data"]["client_id"] == json!(client_id))
                .map(|e| e["seq"].as_u64().unwrap())
                .collect();
            assert_eq!(found, [*seq], "seed {seed}: {client_id}");
            let statuses: Vec<&str> = log
                .iter()
                .filter(|e| e["data"]["message_seq"] == json!(seq))
                .map(|e| e["data"]["status"].as_str().unwrap())
                .collect();
            let rank = |s: &&str| ["unknown", "sent", "failed"].iter().position(|x| x == s).unwrap();
            assert!(!statuses.is_empty(), "seed {seed}: {client_id} stays pending");
            assert!(statuses.windows(2).all(|w| rank(&w[0]) < rank(&w[1])), "seed {seed}: {statuses:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_was_acked_stands_once_and_in_order() {
    for seed in 0..8 {
        one_seed(seed).await;
    }
}
