//! An agent: present over several sockets, on several nodes. A session ends exactly once, by the word of the node that
//! holds its socket, or when that node's incarnation is no more.
//!
//! While there is a session there is a timer, by which whoever owns the agent's shard next finds it at once.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use patchbay_protocol::ids::{AgentId, ConversationId, EntityId, TenantId};
use patchbay_protocol::{CommandError, Timestamp};
use patchbay_storage::log::LogKey;
use patchbay_storage::tables::{Session, Tables, Timer};
use patchbay_storage::{Batch, Stamp};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::ports::Publisher;
use crate::shard::soft::{SoftEntity, Turn};
use crate::shard::{Reign, Shards};

/// Sessions of one agent; past it a connect is refused.
pub const SESSIONS_MAX: usize = 64;

/// Sockets that closed, of the last so many of which it is known that they do not come back.
const ENDED_MAX: usize = 64;

/// An agent with a session is looked at this often, whoever owns it then.
const LOOK_EVERY: Duration = Duration::from_secs(3600);

/// What an agent says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Presence {
    /// Takes work.
    Online,
    /// There, but takes no work.
    Away,
    /// Not there.
    Offline,
}

impl Presence {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Away => "away",
            Self::Offline => "offline",
        }
    }

    /// The one of that name; whoever is nothing that we know is not there.
    pub fn named(name: &str) -> Self {
        match name {
            "online" => Self::Online,
            "away" => Self::Away,
            _ => Self::Offline,
        }
    }
}

/// `presence.set`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetPresence {
    /// What it is now.
    pub state: Presence,
}

/// What can be asked of an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum AgentCommand {
    /// A socket opened, or is still open.
    Connected {
        /// Which.
        connection: String,
        /// On which node.
        incarnation: u32,
    },
    /// It closed.
    Disconnected {
        /// Which.
        connection: String,
    },
    /// What the agent says of itself.
    Set(Presence),
    /// It was assigned to a conversation, by the entry of this seq.
    Assigned {
        /// Which.
        conversation: ConversationId,
        /// The entry.
        seq: u64,
    },
    /// How it is.
    Get,
    /// Nodes may be gone, and its sessions with them.
    Look,
}

/// How an agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentReply {
    /// What it says, or `offline` without a socket.
    pub state: Presence,
    /// Open sockets.
    pub sessions: usize,
    /// When the last socket closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<Timestamp>,
}

/// Between two looks at sessions of an incarnation that this node's map does not name, and that nobody has marked dead.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// What is known of the nodes that hold sockets.
#[async_trait]
pub trait Edges: Send + Sync + 'static {
    /// Whether this node's map names an incarnation. One that it does not name may have come since.
    fn names(&self, incarnation: u64) -> bool;

    /// Whether an incarnation is marked dead, which it is for ever. False also when that cannot be said now.
    async fn is_dead(&self, incarnation: u64) -> bool;
}

/// What all agents of a node share.
pub struct Agent {
    publisher: Arc<dyn Publisher>,
    shards: Arc<Shards>,
    edges: OnceLock<Weak<dyn Edges>>,
}

/// What an agent knows of itself.
pub struct State {
    sessions: Vec<Session>,
    said: Presence,
    last_seen: Option<Timestamp>,
    /// When it is looked at next.
    armed: Option<Timestamp>,
    /// Sockets that closed last: one that is told of once more, behind a link that broke, stays closed.
    ended: VecDeque<String>,
}

fn stamp(reign: &Reign) -> Result<Stamp, CommandError> {
    reign.stamp().map_err(|_| CommandError::unavailable())
}

impl Agent {
    /// Agents shown by `publisher`.
    pub fn new(publisher: Arc<dyn Publisher>, shards: Arc<Shards>) -> Self {
        Self { publisher, shards, edges: OnceLock::new() }
    }

    /// Says who knows of the nodes that hold sockets; once.
    pub fn set_edges(&self, edges: Weak<dyn Edges>) {
        let _ = self.edges.set(edges);
    }

    fn names(&self, incarnation: u64) -> bool {
        self.edges.get().and_then(Weak::upgrade).is_some_and(|edges| edges.names(incarnation))
    }

    async fn is_dead(&self, incarnation: u64) -> bool {
        let Some(edges) = self.edges.get().and_then(Weak::upgrade) else { return false };
        !edges.names(incarnation) && edges.is_dead(incarnation).await
    }

    fn key(&self, id: &EntityId) -> LogKey {
        LogKey { entity: id.key(), shard: id.shard(self.shards.count) }
    }

    /// Writes a session's row. A disk that is full keeps nobody from coming and going: the row follows when there is
    /// room, in the order of the stamps; at most one for each of [`SESSIONS_MAX`] and each that left.
    async fn write(&self, row: Batch) {
        if self.shards.logs.write_if_room(row.clone()).await.is_err() {
            let shards = self.shards.clone();
            tokio::spawn(async move { shards.logs.write_until_answered(row).await });
        }
    }

    /// Ends the sessions of nodes that are gone: marked dead, since a map may know nothing yet of whoever has just come.
    /// Nobody saw when that was: they were there at least when they came.
    async fn end_lost(
        &self,
        key: LogKey,
        state: &mut State,
        turn: &Turn<Self>,
    ) -> Result<bool, CommandError> {
        let mut dead = HashSet::new();
        for incarnation in state.sessions.iter().map(|s| s.incarnation).collect::<HashSet<u64>>() {
            if self.is_dead(incarnation).await {
                dead.insert(incarnation);
            }
        }
        while let Some(at) = state.sessions.iter().position(|s| dead.contains(&s.incarnation)) {
            let stamp = stamp(turn.reign())?;
            let session = state.sessions.swap_remove(at);
            let seen = state.last_seen.map_or(session.since, |at| at.max(session.since));
            state.last_seen = Some(seen);
            self.write(Tables::session_delete(key, stamp, &session.connection, seen)).await;
        }
        if state.sessions.iter().any(|s| !self.names(s.incarnation)) {
            turn.after(LOOK_AGAIN, AgentCommand::Look);
        }
        Ok(!dead.is_empty())
    }

    /// Sees to it that whoever owns it then looks at it.
    async fn arm(&self, id: &EntityId, state: &mut State, reign: &Reign) -> Result<(), CommandError> {
        let (key, now, timers) = (self.key(id), self.shards.clock.now(), &self.shards.timers);
        if state.armed.is_some_and(|at| at > now) {
            return Ok(());
        }
        let due = now.plus(LOOK_EVERY);
        let timer = Timer { entity: id.clone(), due };
        let (hour, _hold) = timers.hold(key.shard, due, now);
        if let Some(mark) = timers.first_mark(key.shard) {
            self.write(Tables::fired_write(key.shard, stamp(reign)?, mark)).await;
            timers.marked(key.shard, mark);
        }
        self.write(Tables::timer_write(key.shard, stamp(reign)?, &timer, hour)).await;
        timers.arm(timer);
        state.armed = Some(due);
        Ok(())
    }

    /// A socket is open. One that is known may be of another incarnation of its node.
    async fn connected(
        &self,
        key: LogKey,
        state: &mut State,
        (connection, incarnation): (String, u64),
        reign: &Reign,
    ) -> Result<(), CommandError> {
        if state.ended.contains(&connection) {
            return Ok(());
        }
        let known = state.sessions.iter().position(|s| s.connection == connection);
        if known.is_some_and(|at| state.sessions[at].incarnation >= incarnation) {
            return Ok(());
        }
        if known.is_none() && state.sessions.len() >= SESSIONS_MAX {
            return Err(CommandError::overloaded(1000));
        }
        let since = known.map_or_else(|| self.shards.clock.now(), |at| state.sessions[at].since);
        let said = Some(state.said.as_str().to_owned());
        let session = Session { connection, incarnation, since, said };
        self.write(Tables::session_write(key, stamp(reign)?, &session)).await;
        match known {
            Some(at) => state.sessions[at] = session,
            None => state.sessions.push(session),
        }
        Ok(())
    }

    fn show(&self, tenant: &TenantId, agent: &AgentId, reply: &AgentReply) {
        self.publisher.agent(tenant, agent, session(reply));
        self.publisher.presence(tenant, agent, reply.state);
    }
}

/// How an agent is, as it is shown in its own channel.
pub(crate) fn session(reply: &AgentReply) -> Bytes {
    json!({"type": "session", "state": reply.state, "sessions": reply.sessions}).to_string().into()
}

impl State {
    fn reply(&self) -> AgentReply {
        let state = if self.sessions.is_empty() { Presence::Offline } else { self.said };
        AgentReply { state, sessions: self.sessions.len(), last_seen: self.last_seen }
    }
}

impl SoftEntity for Agent {
    type State = State;
    type Command = AgentCommand;
    type Reply = AgentReply;

    async fn load(&self, id: &EntityId, turn: &Turn<Self>) -> Result<State, CommandError> {
        let key = self.key(id);
        let (sessions, last_seen) =
            self.shards.tables.sessions(key).await.map_err(|_| CommandError::unavailable())?;
        let said = sessions.iter().find_map(|s| s.said.as_deref()).map_or(Presence::Online, Presence::named);
        let mut state = State { sessions, said, last_seen, armed: None, ended: VecDeque::new() };
        let ended = self.end_lost(key, &mut state, turn).await?;
        turn.is_held().await?;
        if let EntityId::Agent(tenant, agent) = id
            && (ended || !state.sessions.is_empty())
        {
            // Its owner before may not have said so any more.
            self.show(tenant, agent, &state.reply());
        }
        Ok(state)
    }

    async fn handle(
        &self,
        id: &EntityId,
        state: &mut State,
        command: AgentCommand,
        turn: &Turn<Self>,
    ) -> Result<AgentReply, CommandError> {
        let EntityId::Agent(tenant, agent) = id else { return Ok(state.reply()) };
        let (key, reign) = (self.key(id), turn.reign());
        let before = state.reply();
        match command {
            AgentCommand::Connected { connection, incarnation } => {
                if !self.names(u64::from(incarnation)) {
                    if self.is_dead(u64::from(incarnation)).await {
                        return Err(CommandError::unavailable());
                    }
                    turn.after(LOOK_AGAIN, AgentCommand::Look);
                }
                self.arm(id, state, reign).await?;
                self.connected(key, state, (connection, u64::from(incarnation)), reign).await?;
            }
            AgentCommand::Disconnected { connection } if state.ended.contains(&connection) => {}
            AgentCommand::Disconnected { connection } => {
                // Also of one that is not known here: what an earlier owner wrote of it may still arrive.
                let now = self.shards.clock.now();
                self.write(Tables::session_delete(key, stamp(reign)?, &connection, now)).await;
                state.sessions.retain(|session| session.connection != connection);
                state.last_seen = Some(now);
                if state.ended.len() == ENDED_MAX {
                    state.ended.pop_front();
                }
                state.ended.push_back(connection);
            }
            AgentCommand::Assigned { conversation, seq } => {
                turn.is_held().await?;
                let push = json!({"type": "assigned", "conversation": conversation, "seq": seq});
                self.publisher.agent(tenant, agent, push.to_string().into());
            }
            AgentCommand::Set(said) => {
                for session in &mut state.sessions {
                    session.said = Some(said.as_str().to_owned());
                    self.write(Tables::session_write(key, stamp(reign)?, session)).await;
                }
                state.said = said;
            }
            AgentCommand::Get => {}
            AgentCommand::Look => {
                self.end_lost(key, state, turn).await?;
                if !state.sessions.is_empty() {
                    self.arm(id, state, reign).await?;
                }
            }
        }
        let now = state.reply();
        if now != before {
            turn.is_held().await?;
            self.show(tenant, agent, &now);
        }
        Ok(now)
    }

    fn may_passivate(state: &State) -> bool {
        state.sessions.is_empty()
    }
}
