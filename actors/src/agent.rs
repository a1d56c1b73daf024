//! An agent: present over several sockets, on several nodes. A session ends exactly once, by the word of the node that
//! holds its socket, or when that node's incarnation is no more.
//!
//! While there is a session there is a timer, by which whoever owns the agent's shard next finds it at once.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use patchbay_protocol::ids::{AgentId, EntityId, TenantId};
use patchbay_protocol::{CommandError, Timestamp};
use patchbay_storage::Batch;
use patchbay_storage::log::LogKey;
use patchbay_storage::tables::{Session, Tables, Timer};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::ports::Publisher;
use crate::shard::Shards;
use crate::shard::soft::{Again, SoftEntity};

/// Sessions of one agent; past it a connect is refused.
pub const SESSIONS_MAX: usize = 64;

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
#[derive(Debug, Serialize, Deserialize)]
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

/// Tells whether a node's incarnation is in the cluster.
pub type IsThere = Box<dyn Fn(u64) -> bool + Send + Sync>;

/// What all agents of a node share.
pub struct Agent {
    publisher: Arc<dyn Publisher>,
    shards: Arc<Shards>,
    is_there: OnceLock<IsThere>,
}

/// What an agent knows of itself.
pub struct State {
    sessions: Vec<Session>,
    said: Presence,
    last_seen: Option<Timestamp>,
    /// When it is looked at next.
    armed: Option<Timestamp>,
}

impl Agent {
    /// Agents shown by `publisher`.
    pub fn new(publisher: Arc<dyn Publisher>, shards: Arc<Shards>) -> Self {
        Self { publisher, shards, is_there: OnceLock::new() }
    }

    /// Says which nodes are in the cluster; once.
    pub fn set_is_there(&self, is_there: IsThere) {
        let _ = self.is_there.set(is_there);
    }

    fn is_there(&self, incarnation: u64) -> bool {
        self.is_there.get().is_some_and(|is_there| is_there(incarnation))
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

    /// Ends the sessions of nodes that are gone. Nobody saw when that was: they were there at least when they came.
    async fn end_lost(&self, key: LogKey, state: &mut State) -> Result<bool, CommandError> {
        let mut ended = false;
        while let Some(at) = state.sessions.iter().position(|s| !self.is_there(s.incarnation)) {
            let stamp = self.stamp(key)?;
            let session = state.sessions.swap_remove(at);
            let seen = state.last_seen.map_or(session.since, |at| at.max(session.since));
            state.last_seen = Some(seen);
            self.write(Tables::session_delete(key, stamp, &session.connection, seen)).await;
            ended = true;
        }
        Ok(ended)
    }

    /// Sees to it that whoever owns it then looks at it.
    async fn arm(&self, id: &EntityId, state: &mut State) -> Result<(), CommandError> {
        let (key, now, timers) = (self.key(id), self.shards.clock.now(), &self.shards.timers);
        if state.armed.is_some_and(|at| at > now) {
            return Ok(());
        }
        let due = now.plus(LOOK_EVERY);
        let timer = Timer { entity: id.clone(), due };
        let (hour, _hold) = timers.hold(key.shard, due, now);
        if let Some(mark) = timers.first_mark(key.shard) {
            self.write(Tables::fired_write(key.shard, self.stamp(key)?, mark)).await;
            timers.marked(key.shard, mark);
        }
        self.write(Tables::timer_write(key.shard, self.stamp(key)?, &timer, hour)).await;
        timers.arm(timer);
        state.armed = Some(due);
        Ok(())
    }

    /// A socket is open. One that is known may be of another incarnation of its node.
    async fn connected(
        &self,
        key: LogKey,
        state: &mut State,
        connection: String,
        incarnation: u64,
    ) -> Result<(), CommandError> {
        let known = state.sessions.iter().position(|s| s.connection == connection);
        if known.is_some_and(|at| state.sessions[at].incarnation == incarnation) {
            return Ok(());
        }
        if known.is_none() && state.sessions.len() >= SESSIONS_MAX {
            return Err(CommandError::overloaded(1000));
        }
        let since = known.map_or_else(|| self.shards.clock.now(), |at| state.sessions[at].since);
        let said = Some(state.said.as_str().to_owned());
        let session = Session { connection, incarnation, since, said };
        self.write(Tables::session_write(key, self.stamp(key)?, &session)).await;
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

    async fn load(&self, id: &EntityId) -> Result<State, CommandError> {
        let key = self.key(id);
        let (sessions, last_seen) =
            self.shards.tables.sessions(key).await.map_err(|_| CommandError::unavailable())?;
        let said = sessions.iter().find_map(|s| s.said.as_deref()).map_or(Presence::Online, Presence::named);
        let mut state = State { sessions, said, last_seen, armed: None };
        let ended = self.end_lost(key, &mut state).await?;
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
        _: &Again<Self>,
    ) -> Result<AgentReply, CommandError> {
        let EntityId::Agent(tenant, agent) = id else { return Ok(state.reply()) };
        let key = self.key(id);
        let before = state.reply();
        match command {
            AgentCommand::Connected { connection, incarnation } => {
                self.arm(id, state).await?;
                self.connected(key, state, connection, u64::from(incarnation)).await?;
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
            AgentCommand::Set(said) => {
                for session in &mut state.sessions {
                    session.said = Some(said.as_str().to_owned());
                    self.write(Tables::session_write(key, self.stamp(key)?, session)).await;
                }
                state.said = said;
            }
            AgentCommand::Get => {}
            AgentCommand::Look => {
                self.end_lost(key, state).await?;
                if !state.sessions.is_empty() {
                    self.arm(id, state).await?;
                }
            }
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
