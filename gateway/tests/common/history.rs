//! Agents, customers and watching sockets, what they were told, and what must hold of it in the end: nothing acknowledged is
//! lost, nothing is doubled, order is kept, receipts are right, and the provider was never called twice for one message.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::balancer::Balancer;
use super::{APP_SECRET, Node, Ws, conversation, sign, text_item, webhook_body};
use patchbay_loadtest::simulator::{Faults, Number, Simulator};
use patchbay_protocol::ConversationId;
use serde_json::{Value, json};
use tokio::sync::watch;

pub const ACCOUNTS: usize = 4;
pub const CUSTOMERS_PER_ACCOUNT: usize = 64;
pub const AGENTS: usize = 6;

pub fn number(account: usize) -> String {
    format!("90{account}")
}

fn customer(n: usize) -> (usize, String) {
    (n % ACCOUNTS, format!("3460000{n:04}"))
}

pub fn id_of(n: usize) -> ConversationId {
    let (account, phone) = customer(n);
    conversation("crash", &format!("wa{account}"), &phone)
}

#[derive(Default)]
pub struct Ledger {
    /// Acked sends: (conversation, client id) -> seq.
    sends: HashMap<(ConversationId, String), u64>,
    /// Every send that was ever tried.
    tried: HashSet<(ConversationId, String)>,
    /// Provider ids of webhooks answered 200, in order, by customer.
    webhooks: BTreeMap<usize, Vec<String>>,
    /// What the watching sockets saw, by conversation.
    seen: HashMap<ConversationId, Vec<u64>>,
}

pub struct Load {
    public: watch::Receiver<Option<String>>,
    token: String,
    stop: AtomicBool,
    ledger: Mutex<Ledger>,
    /// Sends and webhooks in flight.
    pub sends: AtomicUsize,
    pub webhooks: AtomicUsize,
    /// Everybody sends at once: so that much is in flight when the node is killed.
    pub burst: AtomicBool,
    /// An agent's pause between sends: a recipient takes one in six seconds, once 45 have come at once.
    pace: Duration,
    http: reqwest::Client,
}

/// Who does all that.
pub type Tasks = Vec<tokio::task::JoinHandle<()>>;

/// Faults of a provider on an ordinary bad day.
pub fn faults() -> Faults {
    Faults {
        delay_ms: 250,
        receipt_delay_ms: 100,
        lost_answers: 5,
        throttled: 10,
        retryable_errors: 10,
        bad_gateways: 5,
        duplicate_receipts: 50,
        reordered_receipts: 50,
        repeated_webhooks: 20,
        hold_ms: 2_000,
        ..Faults::default()
    }
}

/// A tenant with its accounts; its key.
pub async fn prepare(node: &Node, base: &str) -> String {
    let key = node.tenant("crash", base, "900").await;
    for account in 0..ACCOUNTS {
        node.account(&key, &format!("wa{account}"), base, &number(account)).await;
    }
    key
}

/// What stands around a cluster whose histories are compared.
pub struct Around {
    pub through: Balancer,
    pub simulator: Simulator,
    pub key: String,
    pub load: Arc<Load>,
    pub tasks: Tasks,
    /// Nobody looks for another address as long as it is there.
    pub public: watch::Sender<Option<String>>,
}

/// A tenant, a provider at `host`, and everybody who writes, by way of a balancer before these nodes.
pub async fn surround(nodes: &[Node], host: &str, customers: usize) -> Around {
    let through = Balancer::start(&nodes.iter().collect::<Vec<_>>()).await;
    let simulator = Simulator::start(format!("{host}:0").parse().unwrap(), 7, faults()).await.unwrap();
    let key = prepare(&nodes[0], &format!("http://{}", simulator.address())).await;
    let token = nodes[0].token(&key, "anna", 3600).await;
    point(&simulator, &through.address());
    let (public, watching) = watch::channel(Some(through.address()));
    let (load, tasks) = Load::start(watching, token, customers);
    load.goes_on(300).await;
    Around { through, simulator, key, load, tasks, public }
}

/// Where the provider finds the node, or what stands before it.
pub fn point(simulator: &Simulator, public: &str) {
    for account in 0..ACCOUNTS {
        let webhook_url = format!("http://{public}/webhooks/crash/wa{account}");
        simulator.add_number(&number(account), Number { webhook_url, app_secret: APP_SECRET.into() });
    }
}

impl Load {
    /// So many customers write, agents answer, and the first few are watched.
    pub fn start(
        public: watch::Receiver<Option<String>>,
        token: String,
        customers: usize,
    ) -> (Arc<Self>, Tasks) {
        let load = Arc::new(Self {
            public,
            token,
            stop: AtomicBool::new(false),
            ledger: Mutex::default(),
            sends: AtomicUsize::new(0),
            webhooks: AtomicUsize::new(0),
            burst: AtomicBool::new(false),
            pace: Duration::from_secs(16) / u32::try_from(customers).unwrap(),
            http: reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(20)).build().unwrap(),
        });
        let mut tasks: Tasks = (0..customers).map(|n| tokio::spawn(write(load.clone(), n))).collect();
        for agent in 0..AGENTS {
            let of = (0..customers).filter(|n| n % AGENTS == agent).collect();
            tasks.push(tokio::spawn(answer(load.clone(), agent, of)));
        }
        for n in 0..6 {
            tasks.push(tokio::spawn(look(load.clone(), n)));
        }
        (load, tasks)
    }

    /// Acked sends and webhooks so far.
    pub fn acked(&self) -> usize {
        let ledger = self.ledger.lock().unwrap();
        ledger.sends.len() + ledger.webhooks.values().map(Vec::len).sum::<usize>()
    }

    /// Waits until so many more are acked.
    pub async fn goes_on(&self, more: usize) {
        let from = self.acked();
        super::until("sends and webhooks are acked", async || (self.acked() >= from + more).then_some(()))
            .await;
    }

    pub async fn end(&self, tasks: Tasks) {
        self.stop.store(true, Ordering::Relaxed);
        for task in tasks {
            task.await.unwrap();
        }
    }

    /// Where the node is now; waits while it is down.
    async fn node(&self) -> Option<String> {
        let mut public = self.public.clone();
        loop {
            if let Some(at) = public.borrow_and_update().clone() {
                return Some(at);
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let _ = tokio::time::timeout(Duration::from_millis(100), public.changed()).await;
        }
    }

    /// Waits a while, or until a burst.
    async fn pause(&self, at_most: Duration) {
        let end = tokio::time::Instant::now() + at_most;
        while tokio::time::Instant::now() < end && !self.burst.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// One customer: writes, waits for 200, writes again; a body that was not answered is sent again.
async fn write(load: Arc<Load>, n: usize) {
    let (account, phone) = customer(n);
    let mut count = 0;
    while !load.stopped() {
        let id = format!("wamid.in.{n}.{count}");
        count += 1;
        let body = webhook_body(&number(account), &[text_item(&phone, &id, "x")], &[]);
        loop {
            let Some(node) = load.node().await else { return };
            load.webhooks.fetch_add(1, Ordering::Relaxed);
            let request = load
                .http
                .post(format!("http://{node}/webhooks/crash/wa{account}"))
                .header("x-hub-signature-256", sign(APP_SECRET, &body))
                .body(body.clone());
            let answer = request.send().await;
            load.webhooks.fetch_sub(1, Ordering::Relaxed);
            if answer.is_ok_and(|a| a.status() == 200) {
                load.ledger.lock().unwrap().webhooks.entry(n).or_default().push(id);
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        load.pause(Duration::from_millis(900)).await;
    }
}

/// One agent on one socket: several sends in flight to its customers; what was not acked is sent again with the same id.
async fn answer(load: Arc<Load>, agent: usize, customers: Vec<usize>) {
    let mut open: Vec<(ConversationId, String)> = Vec::new();
    let mut count = 0;
    loop {
        let Some(node) = load.node().await else { break };
        let Some(mut ws) = connect(&node, &load.token).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let mut waiting: HashMap<u32, (ConversationId, String)> = HashMap::new();
        let again = std::mem::take(&mut open);
        for send in again {
            waiting.insert(submit(&load, &mut ws, &send).await, send);
        }
        loop {
            let window = if load.burst.load(Ordering::Relaxed) { 12 } else { 2 };
            while waiting.len() < window && !load.stopped() {
                let send = (id_of(customers[count % customers.len()]), format!("a{agent}.{count}"));
                count += 1;
                waiting.insert(submit(&load, &mut ws, &send).await, send);
            }
            if waiting.is_empty() {
                return;
            }
            let Some(replies) = ws.read().await else { break };
            for reply in replies {
                let Some(send) =
                    reply["id"].as_u64().and_then(|id| waiting.remove(&u32::try_from(id).unwrap()))
                else {
                    continue;
                };
                load.sends.fetch_sub(1, Ordering::Relaxed);
                match reply["rpc"]["data"]["seq"].as_u64() {
                    Some(seq) => {
                        load.ledger.lock().unwrap().sends.insert(send, seq);
                        load.pause(load.pace).await;
                    }
                    // Not there yet, or the store did not answer: again.
                    None => {
                        tokio::time::sleep(Duration::from_millis(30)).await;
                        waiting.insert(submit(&load, &mut ws, &send).await, send);
                    }
                }
            }
        }
        load.sends.fetch_sub(waiting.len(), Ordering::Relaxed);
        open.extend(waiting.into_values());
    }
}

async fn connect(node: &str, token: &str) -> Option<Ws> {
    let mut ws = Ws::try_open(node).await.ok()?;
    ws.call(json!({"connect": {"token": token}})).await.ok()?;
    Some(ws)
}

async fn submit(load: &Load, ws: &mut Ws, (conversation, client_id): &(ConversationId, String)) -> u32 {
    load.ledger.lock().unwrap().tried.insert((*conversation, client_id.clone()));
    load.sends.fetch_add(1, Ordering::Relaxed);
    let data = json!({"conversation": conversation, "client_id": client_id, "content": {"type": "text", "text": client_id}});
    ws.send(json!({"rpc": {"method": "message.send", "data": data}})).await
}

/// A socket that watches a conversation and comes back with its position.
async fn look(load: Arc<Load>, n: usize) {
    let id = id_of(n);
    let channel = format!("conversation:{id}");
    let mut position: Option<(u64, String)> = None;
    while !load.stopped() {
        let Some(node) = load.node().await else { return };
        let Some(mut ws) = connect(&node, &load.token).await else { continue };
        let request = match &position {
            Some((offset, epoch)) => {
                json!({"channel": channel, "recover": true, "offset": offset, "epoch": epoch})
            }
            None => json!({"channel": channel}),
        };
        let Ok(found) = ws.call(json!({"subscribe": request})).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let found = &found["subscribe"];
        let epoch = found["epoch"].as_str().unwrap().to_owned();
        let recovered = found["recovered"].as_bool().unwrap_or(false);
        let mut last = position
            .as_ref()
            .filter(|_| recovered)
            .map_or(found["offset"].as_u64().unwrap_or(0), |(o, _)| *o);
        if !recovered {
            load.ledger.lock().unwrap().seen.insert(id, vec![]);
        }
        let mut saw = |seq: u64| {
            load.ledger.lock().unwrap().seen.entry(id).or_default().push(seq);
            last = seq;
        };
        for p in found["publications"].as_array().into_iter().flatten() {
            saw(p["offset"].as_u64().unwrap());
        }
        while !load.stopped() {
            let Ok(push) = tokio::time::timeout(Duration::from_millis(500), ws.push()).await else {
                continue;
            };
            let Some(push) = push else { break };
            if let Some(seq) = push["pub"]["offset"].as_u64() {
                saw(seq);
            }
        }
        position = Some((last, epoch));
    }
}

/// Waits until every message has its last word: nothing pending, no call and no webhook open.
pub async fn settle(node: &Node, key: &str, simulator: &Simulator, all: usize) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(180);
    loop {
        let record = simulator.record();
        let quiet = record.calls_open == 0 && record.webhooks_open == 0;
        let mut accounts = Vec::new();
        for account in 0..ACCOUNTS {
            accounts.push(node.get(key, &format!("/accounts/wa{account}")).await);
        }
        let unsettled: u64 = accounts.iter().map(|a| a["unsettled"].as_u64().unwrap()).sum();
        let over = tokio::time::Instant::now() > deadline;
        let mut pending = Vec::new();
        if over || quiet && unsettled == 0 {
            for n in 0..all {
                let entries = node.entries(key, id_of(n)).await;
                let told: HashSet<u64> =
                    entries.iter().filter_map(|e| e["data"]["message_seq"].as_u64()).collect();
                pending.extend(
                    entries.into_iter().filter(|e| {
                        e["type"] == "message.sent" && !told.contains(&e["seq"].as_u64().unwrap())
                    }),
                );
            }
            if quiet && unsettled == 0 && pending.is_empty() {
                return;
            }
        }
        let open = (record.calls_open, record.webhooks_open);
        assert!(!over, "not settled: {open:?} calls and webhooks open, {accounts:?}, pending: {pending:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Compares everything; what there was.
pub async fn check(node: &Node, key: &str, simulator: &Simulator, load: &Load, all: usize) -> Value {
    let record = simulator.record();
    let ledger = std::mem::take(&mut *load.ledger.lock().unwrap());
    let (mut sends, mut received, mut unknown) = (0, 0, 0);
    let mut calls: HashMap<&str, Vec<(&str, bool)>> = HashMap::new();
    for call in &record.calls {
        calls.entry(&call.callback).or_default().push((&call.answer, call.taken));
    }
    for (callback, made) in &calls {
        // Only a call that was answered with "not taken" may be followed by another.
        let again = made.len() > 1
            && made[..made.len() - 1]
                .iter()
                .any(|(answer, taken)| *taken || !matches!(*answer, "429" | "131000"));
        assert!(!again, "{callback} was called again: {made:?}");
    }
    for n in 0..all {
        let id = id_of(n);
        let entries = node.entries(key, id).await;
        for (at, entry) in entries.iter().enumerate() {
            assert_eq!(entry["seq"].as_u64(), Some(at as u64 + 1), "{id} has a gap");
        }
        let of = |kind: &'static str| entries.iter().filter(move |e| e["type"] == kind);
        let inbound: Vec<&str> =
            of("message.received").map(|e| e["data"]["provider_id"].as_str().unwrap()).collect();
        let unique: HashSet<&&str> = inbound.iter().collect();
        assert_eq!(unique.len(), inbound.len(), "{id}: a customer's message twice");
        let acked = ledger.webhooks.get(&n).cloned().unwrap_or_default();
        let order: Vec<&str> = inbound.iter().filter(|i| acked.iter().any(|a| a == **i)).copied().collect();
        assert_eq!(
            order,
            acked.iter().map(String::as_str).collect::<Vec<_>>(),
            "{id}: acked webhooks, in order"
        );
        received += inbound.len();
        let mut by_client: HashMap<&str, u64> = HashMap::new();
        for entry in of("message.sent") {
            let before = by_client
                .insert(entry["data"]["client_id"].as_str().unwrap(), entry["seq"].as_u64().unwrap());
            assert_eq!(before, None, "{id}: a client id twice");
        }
        sends += by_client.len();
        for ((_, client_id), seq) in ledger.sends.iter().filter(|((c, _), _)| *c == id) {
            assert_eq!(
                by_client.get(client_id.as_str()),
                Some(seq),
                "{id}: an acked send is not where it was"
            );
        }
        unknown += check_statuses(id, &entries, &calls);
    }
    for (id, seen) in &ledger.seen {
        assert!(seen.windows(2).all(|w| w[1] == w[0] + 1), "{id}: a socket saw {seen:?}");
    }
    let watched: usize = ledger.seen.values().map(Vec::len).sum();
    let acked = ledger.webhooks.values().map(Vec::len).sum::<usize>();
    println!(
        "{} sends acked of {sends} stored, {acked} webhooks acked of {received} stored, {} provider calls, {unknown} unknown, {watched} entries watched",
        ledger.sends.len(),
        record.calls.len()
    );
    assert_eq!(ledger.tried.len(), ledger.sends.len(), "every send was acked in the end");
    json!({"sends": ledger.sends.len(), "webhooks": acked, "calls": record.calls.len(), "watched": watched})
}

/// Receipts of every message: they only climb, and end where the provider's word ends. Returns how many stay unknown.
fn check_statuses(id: ConversationId, entries: &[Value], calls: &HashMap<&str, Vec<(&str, bool)>>) -> usize {
    const ORDER: [&str; 5] = ["unknown", "sent", "failed", "delivered", "read"];
    let mut last: HashMap<u64, usize> = HashMap::new();
    for entry in entries.iter().filter(|e| e["type"] == "message.status") {
        let rank = ORDER.iter().position(|s| entry["data"]["status"] == *s).unwrap();
        let before = last.insert(entry["data"]["message_seq"].as_u64().unwrap(), rank);
        assert!(before.is_none_or(|b| b < rank), "{id}: a receipt fell: {entry}");
    }
    let mut unknown = 0;
    for (seq, rank) in last {
        let callback = format!("{id}-{seq}");
        let taken = calls.get(callback.as_str()).is_some_and(|made| made.iter().any(|(_, taken)| *taken));
        if taken {
            assert_eq!(ORDER[rank], "read", "{callback}: the provider's last word is read");
        } else {
            assert!(
                matches!(ORDER[rank], "unknown" | "failed"),
                "{callback}: {} without having been taken",
                ORDER[rank]
            );
            unknown += usize::from(ORDER[rank] == "unknown");
        }
    }
    unknown
}
