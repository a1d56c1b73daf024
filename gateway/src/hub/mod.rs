//! The node's hub: topic -> local connections. A publication is encoded once per wire format, as a finished frame,
//! and shared; per connection only a reference is queued.

pub mod emulated;
pub mod outbound;
#[cfg(test)]
mod schedules;
pub mod seam;
pub mod view;

use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use bytes::Bytes;
use patchbay_actors::agent::Presence;
use patchbay_actors::fanout::Aside;
pub use patchbay_actors::fanout::Topic;
use patchbay_actors::node::Node;
use patchbay_actors::ports::Publisher;
use patchbay_protocol::client::Reply;
use patchbay_protocol::client::reply::{ClientInfo, JoinLeave, Push};
use patchbay_protocol::ids::{AgentId, ConversationId, InboxId, TenantId};
use patchbay_protocol::{CommandError, ErrorCode};

use crate::presence::Presences;
use emulated::EmulatedSessions;
use outbound::{Frames, Outbound};

/// Connections to one topic that a node tells of.
const PRESENT_MAX: usize = 10_000;
/// What is shown beside the order of a topic.
const TYPING: &str = "typing";
const JOIN: &str = "join";
const LEAVE: &str = "leave";
/// Locks over topics, so that publications of different topics do not wait for each other.
const PARTS: usize = 32;

/// How a subscription sees a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum View {
    /// As the business does.
    Whole,
    /// As a visitor does: messages and media of its own thread, of this tenant.
    Contact(TenantId),
}

/// Tells how an agent of a tenant is called, where that is at hand.
pub type Names = Box<dyn Fn(&TenantId, &AgentId) -> Option<String> + Send + Sync>;

/// One connection's subscription.
struct Member {
    client: ClientId,
    outbound: Arc<Outbound>,
    info: Arc<ClientInfo>,
    join_leave: bool,
    view: View,
}

/// A connection's id: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientId(pub u128);

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The hub.
pub struct Hub {
    parts: Vec<Mutex<HashMap<Topic, Vec<Member>>>>,
    names: OnceLock<Names>,
    /// The way to other nodes.
    node: OnceLock<Weak<Node>>,
    /// The sockets that are open.
    open: AtomicUsize,
    /// Bytes that wait for all sockets together.
    queued: Arc<AtomicUsize>,
    presences: Arc<Presences>,
    emulated: Arc<EmulatedSessions>,
}

impl Default for Hub {
    fn default() -> Self {
        let parts = (0..PARTS).map(|_| Mutex::default()).collect();
        let (names, node) = (OnceLock::new(), OnceLock::new());
        let open = AtomicUsize::new(0);
        Self {
            parts,
            names,
            node,
            open,
            queued: Arc::default(),
            presences: Arc::default(),
            emulated: Arc::default(),
        }
    }
}

impl Hub {
    /// Says how agents are called; once.
    pub fn set_names(&self, names: Names) {
        let _ = self.names.set(names);
    }

    /// Says which node this is the hub of; once.
    pub fn set_node(&self, node: &Arc<Node>) {
        let _ = self.node.set(Arc::downgrade(node));
        self.presences.set_node(node);
    }

    fn node(&self) -> Option<Arc<Node>> {
        self.node.get()?.upgrade()
    }

    /// How an agent is called, where that is at hand.
    pub fn name(&self, tenant: &TenantId, agent: &AgentId) -> Option<String> {
        self.names.get()?(tenant, agent)
    }

    /// Which agents are there.
    pub fn presences(&self) -> &Arc<Presences> {
        &self.presences
    }

    /// Sessions of clients without a socket of their own.
    pub fn emulated(&self) -> &Arc<EmulatedSessions> {
        &self.emulated
    }

    /// The sockets that are open.
    pub fn open(&self) -> &AtomicUsize {
        &self.open
    }

    /// Bytes that wait for all sockets together.
    pub fn queued(&self) -> &Arc<AtomicUsize> {
        &self.queued
    }

    fn part(&self, topic: &Topic) -> MutexGuard<'_, HashMap<Topic, Vec<Member>>> {
        let mut hash = DefaultHasher::new();
        topic.hash(&mut hash);
        let part = &self.parts[usize::try_from(hash.finish() % PARTS as u64).unwrap_or(0)];
        part.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a connection with a topic; its seam holds what comes until its past is read.
    /// Refused when it is subscribed, or to too much.
    pub fn join(
        &self,
        topic: &Topic,
        client: ClientId,
        outbound: &Arc<Outbound>,
        info: &Arc<ClientInfo>,
        join_leave: bool,
        view: View,
    ) -> Result<(), ErrorCode> {
        outbound.subscribe(topic)?;
        let mut part = self.part(topic);
        let members = part.entry(topic.clone()).or_default();
        if members.is_empty()
            && let Some(node) = self.node()
        {
            node.watches().begin(topic);
        }
        members.retain(|m| m.client != client);
        members.push(Member { client, outbound: outbound.clone(), info: info.clone(), join_leave, view });
        Ok(())
    }

    /// Waits until everything that is published of a topic from here on comes here, wherever it is published.
    pub async fn ready(&self, topic: &Topic) -> Result<(), CommandError> {
        match self.node() {
            Some(node) => node.watches().ready(topic).await,
            None => Ok(()),
        }
    }

    /// Tells those who asked that somebody came or went, here and elsewhere.
    pub fn announce(&self, topic: &Topic, came: bool, info: &ClientInfo) {
        self.show_join_leave(topic, came, info);
        let kind = if came { JOIN } else { LEAVE };
        self.say(topic, kind, &info.client, || serde_json::to_vec(info).unwrap_or_default().into());
    }

    /// Shows other nodes something beside the order of a topic.
    fn say(&self, topic: &Topic, kind: &str, key: &str, data: impl FnOnce() -> Bytes) {
        if let Some(node) = self.node() {
            node.aside(topic, || Aside { kind: kind.to_owned(), key: key.to_owned(), data: data() });
        }
    }

    fn show_join_leave(&self, topic: &Topic, came: bool, info: &ClientInfo) {
        let event = Some(JoinLeave { info: Some(info.clone()) });
        let mut push = Push { channel: topic.channel(), ..Push::default() };
        if came {
            push.join = event;
        } else {
            push.leave = event;
        }
        let reply = Reply { push: Some(push), ..Reply::default() };
        let part = self.part(topic);
        for member in
            part.get(topic).into_iter().flatten().filter(|m| m.join_leave && m.info.client != info.client)
        {
            member.outbound.push_for(topic, &info.client, &reply);
        }
    }

    /// Takes a connection out of a topic; tells whether it was there.
    pub fn leave(&self, topic: &Topic, client: ClientId) -> bool {
        let mut part = self.part(topic);
        let Some(members) = part.get_mut(topic) else { return false };
        let Some(at) = members.iter().position(|m| m.client == client) else { return false };
        let member = members.swap_remove(at);
        if members.is_empty() {
            part.remove(topic);
            if let Some(node) = self.node() {
                node.watches().end(topic);
            }
        }
        drop(part);
        member.outbound.unsubscribe(topic);
        true
    }

    /// Who is subscribed to a topic, on every node that answers within a second.
    pub async fn presence(&self, topic: &Topic) -> Result<Vec<ClientInfo>, CommandError> {
        let Some(node) = self.node().filter(|node| !node.is_alone()) else { return Ok(self.members(topic)) };
        let said = node.present(topic).await?;
        // What a later version says is left out.
        let read = |who: String| serde_json::from_str::<Vec<ClientInfo>>(&who).unwrap_or_default();
        Ok(said.into_iter().flat_map(read).collect())
    }

    fn members(&self, topic: &Topic) -> Vec<ClientInfo> {
        let part = self.part(topic);
        part.get(topic).into_iter().flatten().take(PRESENT_MAX).map(|m| (*m.info).clone()).collect()
    }

    /// Shows that somebody is writing, here and elsewhere: without offset, only the latest matters.
    pub fn typing(&self, conversation: ConversationId, actor: &str, publication: Bytes) {
        self.show_typing(conversation, actor, &publication);
        self.say(&Topic::Conversation(conversation), TYPING, actor, || publication);
    }

    fn show_typing(&self, conversation: ConversationId, actor: &str, publication: &Bytes) {
        let topic = Topic::Conversation(conversation);
        let frames = Frames::new(topic.channel(), publication.clone(), 0);
        let part = self.part(&topic);
        for member in part.get(&topic).into_iter().flatten() {
            match &member.view {
                View::Whole => member.outbound.publish_latest(&topic, actor, &frames),
                View::Contact(tenant) => {
                    let seen = view::typing_for_contact(publication, |agent| self.name(tenant, agent));
                    let Some(seen) = seen else { continue };
                    let frames = Frames::new(topic.channel(), seen, 0);
                    member.outbound.publish_latest(&topic, actor, &frames);
                }
            }
        }
    }

    fn loose(&self, topic: &Topic, publication: Bytes) {
        let part = self.part(topic);
        let Some(members) = part.get(topic) else { return };
        let frames = Frames::new(topic.channel(), publication, 0);
        for member in members {
            member.outbound.publish_loose(topic, &frames);
        }
    }
}

impl Publisher for Hub {
    fn emulated(&self, session: &str, frame: Bytes) -> Result<(), CommandError> {
        self.emulated.hand(session, frame)
    }

    fn entries(&self, conversation: ConversationId, entries: &[(u64, Bytes)]) {
        let topic = Topic::Conversation(conversation);
        let part = self.part(&topic);
        let Some(members) = part.get(&topic) else { return };
        for (seq, data) in entries {
            let frames = Frames::new(topic.channel(), data.clone(), *seq);
            // Made when the first visitor is met, and then shared as well: all of a conversation are of one tenant.
            let mut contact: Option<Option<Frames>> = None;
            for member in members {
                let frames = match &member.view {
                    View::Whole => Some(&frames),
                    View::Contact(tenant) => contact
                        .get_or_insert_with(|| {
                            let seen = view::for_contact(data, |agent| self.name(tenant, agent))?;
                            Some(Frames::new(topic.channel(), seen, *seq))
                        })
                        .as_ref(),
                };
                member.outbound.publish(&topic, *seq, frames);
            }
            metrics::counter!("patchbay_hub_publications_total").increment(members.len() as u64);
        }
    }

    fn inbox(&self, tenant: &TenantId, inbox: &InboxId, publication: Bytes) {
        self.loose(&Topic::Inbox(tenant.clone(), inbox.clone()), publication);
    }

    fn agent(&self, tenant: &TenantId, agent: &AgentId, publication: Bytes) {
        self.loose(&Topic::Agent(tenant.clone(), agent.clone()), publication);
    }

    fn cluster(&self, publication: Bytes) {
        self.loose(&Topic::Cluster, publication);
    }

    fn is_watched(&self, topic: &Topic) -> bool {
        self.part(topic).contains_key(topic)
    }

    fn connections(&self) -> u64 {
        self.open.load(Ordering::Relaxed) as u64
    }

    fn presence(&self, tenant: &TenantId, agent: &AgentId, state: Presence) {
        self.presences.set(tenant, agent, state);
    }

    fn presence_elsewhere(&self, tenant: &TenantId, agent: &AgentId) {
        self.presences.forget(tenant, agent);
    }

    fn reaches(&self, conversation: ConversationId, seq: u64) {
        let topic = Topic::Conversation(conversation);
        let part = self.part(&topic);
        part.get(&topic).into_iter().flatten().for_each(|member| member.outbound.reaches(&topic, seq));
    }

    fn lost(&self, topic: &Topic) {
        let part = self.part(topic);
        part.get(topic).into_iter().flatten().for_each(|member| member.outbound.lose(topic));
    }

    fn aside(&self, topic: &Topic, aside: &Aside) {
        match (aside.kind.as_str(), topic) {
            (TYPING, Topic::Conversation(id)) => self.show_typing(*id, &aside.key, &aside.data),
            (JOIN | LEAVE, _) => {
                if let Ok(info) = serde_json::from_slice(&aside.data) {
                    self.show_join_leave(topic, aside.kind == JOIN, &info);
                }
            }
            // Of a later version.
            _ => {}
        }
    }

    fn present(&self, topic: &Topic) -> String {
        serde_json::to_string(&self.members(topic)).unwrap_or_default()
    }
}
