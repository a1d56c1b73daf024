//! An agent: present over several sockets, on several nodes. A session ends exactly once, by the edge's word; one that
//! an earlier incarnation left behind is ended when the agent is loaded.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use patchbay_protocol::ids::{AgentId, EntityId, TenantId};
use patchbay_protocol::{CommandError, Timestamp};
use patchbay_storage::Batch;
use patchbay_storage::log::LogKey;
use patchbay_storage::tables::{Session, Tables};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::ports::Publisher;
use crate::shard::Shards;
use crate::shard::soft::{Again, SoftEntity};

/// Sessions of one agent; past it a connect is refused.
pub const SESSIONS_MAX: usize = 64;

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
#[derive(Debug, Serialize, Deserialize)]
pub enum AgentCommand {
    /// A socket opened.
    Connected {
        /// Which.
        connection: String,
    },
    /// It closed.
    Disconnected {
        /// Which.
        connection: String,
    },
    /// What the agent says of itself.
    Set(Presence),
    /// How it is.
    Get,
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

/// What all agents of a node share.
pub struct Agent {
    publisher: Arc<dyn Publisher>,
    shards: Arc<Shards>,
}

/// What an agent knows of itself.
pub struct State {
    sessions: Vec<Session>,
    said: Presence,
    last_seen: Option<Timestamp>,
}

impl Agent {
    /// Agents shown by `publisher`.
    pub fn new(publisher: Arc<dyn Publisher>, shards: Arc<Shards>) -> Self {
        Self { publisher, shards }
    }

    fn incarnation(&self) -> u64 {
        u64::from(self.shards.incarnation.load(Ordering::Relaxed))
    }

    fn key(&self, id: &EntityId) -> LogKey {
        LogKey { entity: id.key(), shard: id.shard(self.shards.count) }
    }

    fn stamp(&self, key: LogKey) -> Result<patchbay_storage::Stamp, CommandError> {
        let reign = self.shards.reign(key.shard).ok_or_else(CommandError::unavailable)?;
        reign.stamp().map_err(|_| CommandError::unavailable())
    }

    /// Writes a session's row. A disk that is full keeps nobody from coming and going: the row follows when there is
    /// room, in the order of the stamps; at most one for each of [`SESSIONS_MAX`] and each that left.
    async fn write(&self, row: Batch) {
        if self.shards.logs.write_if_room(row.clone()).await.is_err() {
            let shards = self.shards.clone();
            tokio::spawn(async move { shards.logs.write_until_answered(row).await });
        }
    }

    fn show(&self, tenant: &TenantId, agent: &AgentId, reply: &AgentReply) {
        let push = json!({"type": "session", "state": reply.state, "sessions": reply.sessions});
        self.publisher.agent(tenant, agent, Bytes::from(push.to_string()));
        self.publisher.presence(tenant, agent, reply.state);
    }
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

    async fn load(&self, id: &EntityId) -> Result<State, CommandError> {
        let key = self.key(id);
        let (left, mut last_seen) =
            self.shards.tables.sessions(key).await.map_err(|_| CommandError::unavailable())?;
        let mut sessions = Vec::new();
        for session in left {
            if session.incarnation == self.incarnation() {
                sessions.push(session);
                continue;
            }
            // Its node is gone, and nobody saw when: it was there at least when it came.
            let seen = last_seen.map_or(session.since, |at| at.max(session.since));
            last_seen = Some(seen);
            let gone = Tables::session_delete(key, self.stamp(key)?, &session.connection, seen);
            self.shards.logs.write_until_answered(gone).await;
        }
        Ok(State { sessions, said: Presence::Online, last_seen })
    }

    async fn handle(
        &self,
        id: &EntityId,
        state: &mut State,
        command: AgentCommand,
        _: &Again<Self>,
    ) -> Result<AgentReply, CommandError> {
        let EntityId::Agent(tenant, agent) = id else { return Ok(state.reply()) };
        let key = self.key(id);
        let before = state.reply();
        match command {
            AgentCommand::Connected { connection } => {
                if state.sessions.len() >= SESSIONS_MAX {
                    return Err(CommandError::overloaded(1000));
                }
                let session =
                    Session { connection, incarnation: self.incarnation(), since: self.shards.clock.now() };
                self.write(Tables::session_write(key, self.stamp(key)?, &session)).await;
                state.sessions.push(session);
            }
            AgentCommand::Disconnected { connection } => {
                let there = state.sessions.iter().position(|s| s.connection == connection);
                if let Some(at) = there {
                    let now = self.shards.clock.now();
                    let gone = Tables::session_delete(key, self.stamp(key)?, &connection, now);
                    self.write(gone).await;
                    state.sessions.swap_remove(at);
                    state.last_seen = Some(now);
                }
            }
            AgentCommand::Set(said) => state.said = said,
            AgentCommand::Get => {}
        }
        let now = state.reply();
        if now != before {
            self.show(tenant, agent, &now);
        }
        Ok(now)
    }

    fn may_passivate(state: &State) -> bool {
        state.sessions.is_empty()
    }
}
