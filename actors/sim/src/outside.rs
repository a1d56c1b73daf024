//! What stands outside the cluster: a provider that answers late, wrongly or never and writes webhooks about it, a topic
//! that takes events, and the truth that is kept of all of it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use patchbay_actors::directory::Account;
use patchbay_actors::ports::Provider;
use patchbay_protocol::ConversationId;
use patchbay_protocol::event::Event;
use patchbay_protocol::outbound::{Call, CallResult};
use patchbay_storage::events::{Deliveries, Delivery, Fault, SendError, Sink};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::world::{World, lock};

/// A provider's client gives up after so long.
const PATIENCE_MS: u64 = 3_000;

/// What was seen of the cluster by anybody, for ever.
#[derive(Default)]
pub(crate) struct Truth {
    /// What stands where, as anybody was shown it.
    pub(crate) shown: HashMap<(ConversationId, u64), blake3::Hash>,
    /// What was acked, and where: (conversation, client id) -> seq.
    pub(crate) acked: BTreeMap<(ConversationId, String), u64>,
}

#[derive(Clone)]
pub(crate) struct Judge {
    pub(crate) world: World,
    truth: Arc<Mutex<Truth>>,
}

impl Judge {
    pub(crate) fn new(world: World) -> Self {
        Self { world, truth: Arc::default() }
    }

    pub(crate) fn truth(&self) -> std::sync::MutexGuard<'_, Truth> {
        lock(&self.truth)
    }

    /// Somebody was shown this: it stands there for ever.
    pub(crate) fn saw(&self, by: &str, id: ConversationId, seq: u64, entry: &Bytes) -> blake3::Hash {
        let hash = blake3::hash(entry);
        let was = *self.truth().shown.entry((id, seq)).or_insert(hash);
        if was != hash {
            self.world.fail(|| {
                format!("{by} is shown another entry {seq} of {id}: {}", String::from_utf8_lossy(entry))
            });
        }
        hash
    }

    /// A command was answered: it is done, once, at this place.
    pub(crate) fn acked(&self, id: ConversationId, client_id: &str, seq: u64) {
        let was = *self.truth().acked.entry((id, client_id.to_owned())).or_insert(seq);
        if was != seq {
            self.world.fail(|| format!("{client_id} of {id} was acked as {was} and as {seq}"));
        }
    }
}

#[derive(Default)]
struct Calls {
    /// How often each message was taken.
    taken: BTreeMap<String, u32>,
    /// Webhooks that are to be posted.
    webhooks: VecDeque<Value>,
}

/// The provider.
#[derive(Clone)]
pub(crate) struct Phone {
    world: World,
    calls: Arc<Mutex<Calls>>,
}

impl Phone {
    pub(crate) fn new(world: World) -> Self {
        Self { world, calls: Arc::default() }
    }

    /// A webhook that has to be posted now.
    pub(crate) fn webhook(&self) -> Option<Value> {
        lock(&self.calls).webhooks.pop_front()
    }

    pub(crate) fn will_post(&self, webhook: Value) {
        lock(&self.calls).webhooks.push_back(webhook);
    }

    pub(crate) fn taken(&self) -> BTreeMap<String, u32> {
        lock(&self.calls).taken.clone()
    }

    fn takes(&self, to: &str, callback: &str) -> String {
        let wamid = format!("wamid.{callback}");
        let times = {
            let mut calls = lock(&self.calls);
            let times = calls.taken.entry(callback.to_owned()).or_default();
            *times += 1;
            *times
        };
        if times > 1 {
            self.world.fail(|| format!("the provider was called {times} times for {callback}"));
        }
        for status in ["sent", "delivered", "read"] {
            if self.world.mishap(100) {
                continue;
            }
            let receipt = json!({"id": wamid, "status": status, "recipient_id": to, "timestamp": "1763715601",
                "biz_opaque_callback_data": callback});
            for _ in 0..=usize::from(self.world.mishap(50)) {
                let (phone, receipt) = (self.clone(), receipt.clone());
                self.world.after(self.world.between(5, 1_500), move || phone.will_post(receipt));
            }
        }
        wamid
    }
}

#[async_trait]
impl Provider for Phone {
    async fn call(&self, _: &Account, call: Call) -> CallResult {
        let body: Value = serde_json::from_slice(&call.body).unwrap_or_default();
        let (to, callback) = (body["to"].as_str().unwrap_or(""), body["biz_opaque_callback_data"].as_str());
        let Some(callback) = callback else {
            return CallResult::Answered { status: 400, retry_after: None, body: Bytes::new() };
        };
        if self.world.mishap(60) {
            return CallResult::NotSent;
        }
        let (answers, answered) = oneshot::channel();
        let (gives_up, gave_up) = oneshot::channel::<()>();
        let (phone, to, callback) = (self.clone(), to.to_owned(), callback.to_owned());
        let there = self.world.between(2, 20) + if self.world.mishap(50) { 4_000 } else { 0 };
        self.world.after(there, move || {
            let world = phone.world.clone();
            let (status, body) = if world.mishap(60) {
                (500, json!({"error": {"code": 131_000, "message": "Something went wrong"}}))
            } else if world.mishap(30) {
                (429, json!({"error": {"code": 130_429, "message": "Rate limit hit"}}))
            } else {
                let wamid = phone.takes(&to, &callback);
                (200, json!({"messages": [{"id": wamid}], "contacts": [{"input": to, "wa_id": to}]}))
            };
            if !world.mishap(60) {
                let body = body.to_string().into();
                let answer = CallResult::Answered { status, retry_after: None, body };
                world.after(world.between(1, 30), move || drop(answers.send(answer)));
            }
        });
        self.world.after(PATIENCE_MS, move || drop(gives_up));
        tokio::select! {
            biased;
            Ok(answer) = answered => answer,
            _ = gave_up => CallResult::Lost,
        }
    }
}

struct Taken {
    /// The highest of each conversation.
    highest: BTreeMap<ConversationId, u64>,
    /// Who may send, and as what.
    generations: HashMap<u64, u32>,
    broken: HashMap<u64, bool>,
}

/// Where events go.
#[derive(Clone)]
pub(crate) struct Events {
    judge: Judge,
    taken: Arc<Mutex<Taken>>,
}

impl Events {
    pub(crate) fn new(judge: Judge) -> Self {
        let taken = Taken { highest: BTreeMap::new(), generations: HashMap::new(), broken: HashMap::new() };
        Self { judge, taken: Arc::new(Mutex::new(taken)) }
    }

    pub(crate) fn sink(&self, process: u64, deliveries: Deliveries) -> Arc<dyn Sink> {
        Arc::new(Producer { events: self.clone(), process, deliveries })
    }

    /// How far each conversation is published.
    pub(crate) fn highest(&self) -> BTreeMap<ConversationId, u64> {
        lock(&self.taken).highest.clone()
    }
}

struct Producer {
    events: Events,
    process: u64,
    deliveries: Deliveries,
}

#[async_trait]
impl Sink for Producer {
    async fn open(&self, generation: u32) -> Result<(), String> {
        if self.events.judge.world.mishap(300) {
            return Err("away".into());
        }
        let mut taken = lock(&self.events.taken);
        taken.generations.insert(self.process, generation);
        taken.broken.insert(self.process, false);
        Ok(())
    }

    fn send(&self, event: &Event) -> Result<(), SendError> {
        let (id, seq, entry) = (event.origin.conversation, event.seq, event.entry.clone());
        let world = self.events.judge.world.clone();
        let generation = lock(&self.events.taken).generations.get(&self.process).copied().unwrap_or(0);
        let (events, process, deliveries) = (self.events.clone(), self.process, self.deliveries.clone());
        // Of one process in order; what was sent before it died is there all the same.
        world.clone().after(5, move || {
            let fails = world.mishap(20);
            let mut taken = lock(&events.taken);
            if taken.generations.get(&process) != Some(&generation) {
                return;
            }
            let broken = taken.broken.entry(process).or_default();
            *broken |= fails;
            let outcome = if *broken { Err(Fault::Passing("broken".into())) } else { Ok(()) };
            if outcome.is_ok() {
                let highest = taken.highest.entry(id).or_default();
                if seq > *highest + 1 {
                    let was = *highest;
                    world.fail(|| format!("event {seq} of {id} is in the topic behind {was}"));
                }
                *highest = (*highest).max(seq);
                events.judge.saw("a consumer", id, seq, &entry);
            }
            drop(taken);
            let told = deliveries.try_send(Delivery { conversation: id, seq, generation, outcome });
            drop(told);
        });
        Ok(())
    }
}
