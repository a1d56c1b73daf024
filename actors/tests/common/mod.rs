//! A node on the model engine with one tenant and one WhatsApp account, a publisher that remembers and a provider
//! that answers as it is told.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use patchbay_actors::agent::{AgentCommand, AgentReply};
use patchbay_actors::clock::Clock;
use patchbay_actors::desk::{Desk, Page, Who};
use patchbay_actors::directory::{Account, Inbox, Settings};
use patchbay_actors::intake::Intake;
use patchbay_actors::node::{Events, Node, NodeConfig};
use patchbay_actors::ports::{Provider, Publisher};
use patchbay_actors::router::Router as _;
use patchbay_connectors::Connector as _;
use patchbay_protocol::command::{Reply, Request, SendMessage};
use patchbay_protocol::outbound::{Call, CallResult};
use patchbay_protocol::{
    AccountId, AgentId, CommandError, Content, ConversationId, InboxId, TenantId, Timestamp,
};
use patchbay_storage::model::Model;
use serde_json::{Value, json};

/// Everything that was shown.
#[derive(Default)]
pub struct Shown {
    pub inbox: Mutex<Vec<Value>>,
    pub agent: Mutex<HashMap<AgentId, Vec<Value>>>,
}

impl Publisher for Shown {
    fn entries(&self, _: ConversationId, _: &[(u64, Bytes)]) {}
    fn inbox(&self, _: &TenantId, _: &InboxId, publication: Bytes) {
        self.inbox.lock().unwrap().push(serde_json::from_slice(&publication).unwrap());
    }
    fn agent(&self, _: &TenantId, agent: &AgentId, publication: Bytes) {
        let push = serde_json::from_slice(&publication).unwrap();
        self.agent.lock().unwrap().entry(agent.clone()).or_default().push(push);
    }
}

/// Takes every call, and answers it as it was told, else with the next id.
#[derive(Default)]
pub struct Graph {
    pub calls: Mutex<Vec<Value>>,
    pub answers: Mutex<VecDeque<CallResult>>,
    /// Held while no call shall be answered.
    pub gate: tokio::sync::Mutex<()>,
}

#[async_trait]
impl Provider for Graph {
    async fn call(&self, _: &Account, call: Call) -> CallResult {
        let n = {
            let mut calls = self.calls.lock().unwrap();
            calls.push(serde_json::from_slice(&call.body).unwrap());
            calls.len()
        };
        let _open = self.gate.lock().await;
        let told = self.answers.lock().unwrap().pop_front();
        told.unwrap_or_else(|| CallResult::Answered {
            status: 200,
            retry_after: None,
            body: json!({"messages": [{"id": format!("wamid.{n}")}]}).to_string().into(),
        })
    }
}

pub struct World {
    pub model: Model,
    pub clock: Clock,
    pub node: Arc<Node>,
    pub desk: Arc<Desk>,
    pub intake: Arc<Intake>,
    pub graph: Arc<Graph>,
    pub shown: Arc<Shown>,
}

pub fn tenant() -> TenantId {
    "t".parse().unwrap()
}

pub fn account() -> AccountId {
    "wa".parse().unwrap()
}

pub fn anna() -> AgentId {
    "anna".parse().unwrap()
}

pub fn id(thread: &str) -> ConversationId {
    ConversationId::derive(&tenant(), &account(), thread)
}

/// A webhook's body with these messages and statuses.
pub fn body(messages: &[Value], statuses: &[Value]) -> Vec<u8> {
    let value = json!({"metadata": {"phone_number_id": "1"}, "contacts": [], "messages": messages, "statuses": statuses});
    json!({"entry": [{"changes": [{"field": "messages", "value": value}]}]}).to_string().into_bytes()
}

impl World {
    /// A fresh node with an inbox, an account and an agent.
    pub async fn new() -> Self {
        Self::at(Clock::from(Timestamp::parse("2026-11-21T09:00:00Z").unwrap())).await
    }

    /// The same by this clock.
    pub async fn at(clock: Clock) -> Self {
        let world = Self::on(Model::new(), clock).await;
        let directory = world.node.directory();
        for inbox in ["main", "other"] {
            directory
                .put_inbox(&tenant(), &inbox.parse().unwrap(), &Inbox { name: inbox.into() })
                .await
                .unwrap();
        }
        world.put_account("wa", "main").await;
        world
    }

    pub async fn put_account(&self, account: &str, inbox: &str) {
        let document = Account {
            connector: "whatsapp".into(),
            inbox: inbox.parse().unwrap(),
            name: "WA".into(),
            external_id: "1".into(),
            credentials: json!({"app_secret": "s", "verify_token": "v", "access_token": "a"}),
            settings: Settings::default(),
        };
        self.node.directory().put_account(&tenant(), &account.parse().unwrap(), &document).await.unwrap();
    }

    pub async fn on(model: Model, clock: Clock) -> Self {
        Self::with_events(model, clock, None).await
    }

    /// The same on a store that is there, with events.
    pub async fn with_events(model: Model, clock: Clock, events: Option<Events>) -> Self {
        let (graph, shown) = (Arc::new(Graph::default()), Arc::new(Shown::default()));
        let config = NodeConfig {
            shards: 4,
            events,
            ..NodeConfig::new(Arc::new(model.clone()), clock, shown.clone(), graph.clone())
        };
        let node = Node::start(config).await.unwrap();
        Self {
            model,
            clock,
            desk: Desk::new(node.clone()),
            intake: Intake::new(node.clone()),
            node,
            graph,
            shown,
        }
    }

    /// Stops this node where it stands; another one starts on what had reached the store.
    pub async fn crash(self) -> Self {
        let left = self.model.fork();
        self.model.stop_after(0);
        Self::on(left, self.clock).await
    }

    /// Takes a webhook's body.
    pub async fn webhook(&self, body: &[u8]) {
        let items = patchbay_connectors::whatsapp::WhatsApp.parse(body).unwrap();
        let document = self.node.directory().account(&tenant(), &account()).await.unwrap().unwrap();
        self.intake.take(&tenant(), &account(), &document, items).await.unwrap();
    }

    /// A customer writes.
    pub async fn writes(&self, from: &str, id: &str) {
        let at = self.clock.now().as_millis() / 1000;
        let message = json!({"from": from, "id": id, "timestamp": at.to_string(), "type": "text", "text": {"body": "x"}});
        self.webhook(&body(&[message], &[])).await;
    }

    /// A receipt comes.
    pub async fn receipt(&self, status: Value) {
        self.webhook(&body(&[], &[status])).await;
    }

    /// The tenant sends; the seq.
    pub async fn send(&self, thread: &str, client_id: &str) -> Result<u64, CommandError> {
        let content = Content::Text { text: client_id.into() };
        let message = SendMessage { client_id: client_id.into(), content, reply_to: None, if_seq: None };
        let who = Who::Api(tenant());
        match self.desk.submit(&who, id(thread), Desk::send_request(&who, message)).await?.wait().await? {
            Reply::Sent(sent) => Ok(sent.seq),
            other => panic!("{other:?}"),
        }
    }

    pub async fn ask(&self, thread: &str, request: Request) -> Result<Reply, CommandError> {
        self.desk.submit(&Who::Api(tenant()), id(thread), request).await?.wait().await
    }

    pub async fn entries(&self, thread: &str) -> Vec<Value> {
        let page = self.desk.entries(&tenant(), id(thread), Page::After(0), 1000).await.unwrap();
        page.entries.iter().map(|(_, e)| serde_json::from_slice(e).unwrap()).collect()
    }

    /// The statuses of a message, in order.
    pub async fn statuses(&self, thread: &str, seq: u64) -> Vec<String> {
        let entries = self.entries(thread).await;
        let of = entries.iter().filter(|e| e["data"]["message_seq"] == json!(seq));
        of.map(|e| e["data"]["status"].as_str().unwrap().to_owned()).collect()
    }

    pub async fn agent(&self, command: AgentCommand) -> AgentReply {
        self.node.agent(&tenant(), &anna(), command).unwrap().wait().await.unwrap()
    }
}

/// Waits until `found` gives something; paused time moves on.
pub async fn until<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..10_000 {
        if let Some(found) = found().await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}")
}
