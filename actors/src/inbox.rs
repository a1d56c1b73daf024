//! An inbox: the live list of the conversations of its accounts, newest first. The rows are the conversations'; the
//! order is made here. Changes are shown at once, and then at most every [`SHOW_PAUSE`] for one conversation.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, EntityId, InboxId, TenantId};
use patchbay_protocol::summary::{Status, Summary};
use patchbay_protocol::{CommandError, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::directory::Directory;
use crate::ports::Publisher;
use crate::shard::soft::{SoftEntity, Turn};

/// Publications of one conversation's summary are at least this far apart.
pub const SHOW_PAUSE: Duration = Duration::from_millis(250);

/// Which conversations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// In this state.
    pub status: Option<Status>,
    /// Assigned to this agent.
    pub assignee: Option<AgentId>,
    /// With the contact of this address or channel id.
    pub contact: Option<String>,
}

/// A place in the list: after the conversation that was updated then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position(pub Reverse<Timestamp>, pub ConversationId);

/// What can be asked of an inbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum InboxCommand {
    /// A conversation's summary is new.
    Changed(Box<Summary>),
    /// A conversation's row is durable, with this in it.
    Stored(Box<Summary>),
    /// A page of the list.
    List {
        /// Which conversations.
        filter: Filter,
        /// After this place.
        after: Option<Position>,
        /// At most so many.
        limit: usize,
    },
    /// Accounts came or went: read everything again.
    Reload,
    /// A conflated summary is due to be shown.
    Show(ConversationId),
}

/// What an inbox answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum InboxReply {
    /// Done.
    Taken,
    /// To [`InboxCommand::List`].
    List(Vec<Summary>),
}

/// What all inboxes of a node share.
pub struct Inbox {
    publisher: Arc<dyn Publisher>,
    directory: Arc<Directory>,
    clock: Clock,
}

#[derive(Clone)]
struct Brief {
    account: AccountId,
    at: Timestamp,
    last_seq: u64,
    status: Status,
    assignee: Option<AgentId>,
    /// Only while its row is not durable, or it was shown not long ago.
    recent: Option<Box<Recent>>,
}

#[derive(Clone)]
struct Recent {
    summary: Summary,
    shown: Instant,
    waits: bool,
}

/// What an inbox knows.
pub struct State {
    order: BTreeMap<Position, ()>,
    briefs: HashMap<ConversationId, Brief>,
}

impl State {
    fn insert(&mut self, summary: &Summary) {
        let before = self.briefs.get(&summary.id);
        if before.is_some_and(|b| b.last_seq > summary.last_seq) {
            return;
        }
        if let Some(before) = before {
            self.order.remove(&Position(Reverse(before.at), summary.id));
        }
        self.order.insert(Position(Reverse(summary.updated_at), summary.id), ());
        let recent = self.briefs.remove(&summary.id).and_then(|b| b.recent);
        let brief = Brief {
            account: summary.account.clone(),
            at: summary.updated_at,
            last_seq: summary.last_seq,
            status: summary.status,
            assignee: summary.assignee.clone(),
            recent,
        };
        self.briefs.insert(summary.id, brief);
    }
}

impl Inbox {
    /// Inboxes shown by `publisher`.
    pub fn new(publisher: Arc<dyn Publisher>, directory: Arc<Directory>, clock: Clock) -> Self {
        Self { publisher, directory, clock }
    }

    fn show(&self, tenant: &TenantId, inbox: &InboxId, summary: &Summary) {
        let publication = json!({"type": "conversation.changed", "conversation": summary});
        self.publisher.inbox(tenant, inbox, Bytes::from(publication.to_string()));
    }

    async fn list(
        &self,
        tenant: &TenantId,
        inbox: &InboxId,
        state: &State,
        filter: &Filter,
        after: Option<Position>,
        limit: usize,
    ) -> Result<Vec<Summary>, CommandError> {
        let mut found = Vec::new();
        let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        for Position(_, id) in state.order.range((from, std::ops::Bound::Unbounded)).map(|(p, ())| p) {
            if found.len() == limit {
                break;
            }
            let Some(brief) = state.briefs.get(id) else { continue };
            let fits = filter.status.is_none_or(|s| s == brief.status)
                && filter.assignee.as_ref().is_none_or(|a| brief.assignee.as_ref() == Some(a));
            if !fits {
                continue;
            }
            let summary = match &brief.recent {
                Some(recent) => Some(recent.summary.clone()),
                None => self
                    .directory
                    .tables()
                    .summary(tenant, &brief.account, *id)
                    .await
                    .map_err(|_| CommandError::unavailable())?,
            };
            let Some(mut summary) = summary else { continue };
            let same_contact =
                |c: &String| summary.contact.address == *c || summary.contact.user_id.as_ref() == Some(c);
            if filter.contact.as_ref().is_some_and(|c| !same_contact(c)) {
                continue;
            }
            summary.inbox = inbox.clone();
            summary.window_until = summary.window_until.filter(|until| *until > self.clock.now());
            found.push(summary);
        }
        Ok(found)
    }
}

impl SoftEntity for Inbox {
    type State = State;
    type Command = InboxCommand;
    type Reply = InboxReply;

    async fn load(&self, id: &EntityId, _: &Turn<Self>) -> Result<State, CommandError> {
        let mut state = State { order: BTreeMap::new(), briefs: HashMap::new() };
        let EntityId::Inbox(tenant, inbox) = id else { return Ok(state) };
        let mut after = String::new();
        loop {
            let page = self.directory.accounts(tenant, &after, 1000).await?;
            let Some((last, _)) = page.last() else { return Ok(state) };
            after.clone_from(last);
            for (account, _) in page.iter().filter(|(_, a)| a.inbox == *inbox) {
                let Ok(account) = account.parse() else { continue };
                let rows = self
                    .directory
                    .tables()
                    .summaries(tenant, &account)
                    .await
                    .map_err(|_| CommandError::unavailable())?;
                rows.iter().for_each(|s| state.insert(s));
            }
        }
    }

    async fn handle(
        &self,
        id: &EntityId,
        state: &mut State,
        command: InboxCommand,
        turn: &Turn<Self>,
    ) -> Result<InboxReply, CommandError> {
        let EntityId::Inbox(tenant, inbox) = id else { return Ok(InboxReply::Taken) };
        match command {
            InboxCommand::Changed(summary) => {
                state.insert(&summary);
                let Some(brief) =
                    state.briefs.get_mut(&summary.id).filter(|b| b.last_seq == summary.last_seq)
                else {
                    return Ok(InboxReply::Taken);
                };
                let now = Instant::now();
                let shown = brief.recent.as_ref().map(|r| (r.shown, r.waits));
                let (shown, waits) = match shown {
                    Some((at, true)) => (at, true),
                    Some((at, false)) if now.duration_since(at) < SHOW_PAUSE => {
                        turn.after(SHOW_PAUSE - now.duration_since(at), InboxCommand::Show(summary.id));
                        (at, true)
                    }
                    Some((_, false)) | None => {
                        turn.is_held().await?;
                        self.show(tenant, inbox, &summary);
                        (now, false)
                    }
                };
                brief.recent = Some(Box::new(Recent { summary: *summary, shown, waits }));
            }
            InboxCommand::Show(conversation) => {
                turn.is_held().await?;
                if let Some(recent) = state.briefs.get_mut(&conversation).and_then(|b| b.recent.as_mut()) {
                    recent.waits = false;
                    recent.shown = Instant::now();
                    self.show(tenant, inbox, &recent.summary);
                }
            }
            InboxCommand::Stored(summary) => {
                if state.briefs.get(&summary.id).is_none_or(|b| b.last_seq < summary.last_seq) {
                    // It was loaded before this row was there.
                    state.insert(&summary);
                    turn.is_held().await?;
                    self.show(tenant, inbox, &summary);
                }
                if let Some(brief) = state.briefs.get_mut(&summary.id) {
                    let done = brief.recent.as_ref().is_some_and(|r| r.summary.last_seq <= summary.last_seq);
                    if done {
                        brief.recent = None;
                    }
                }
            }
            InboxCommand::List { filter, after, limit } => {
                return Ok(InboxReply::List(self.list(tenant, inbox, state, &filter, after, limit).await?));
            }
            InboxCommand::Reload => {
                let recent: Vec<Brief> =
                    state.briefs.drain().map(|(_, b)| b).filter(|b| b.recent.is_some()).collect();
                *state = self.load(id, turn).await?;
                for brief in recent {
                    let Some(recent) = brief.recent else { continue };
                    let home = self.directory.account(tenant, &brief.account).await?;
                    if home.is_none_or(|account| account.inbox != *inbox) {
                        continue;
                    }
                    state.insert(&recent.summary);
                    if let Some(brief) = state.briefs.get_mut(&recent.summary.id) {
                        brief.recent = Some(recent);
                    }
                }
            }
        }
        Ok(InboxReply::Taken)
    }

    fn may_passivate(state: &State) -> bool {
        state.briefs.values().all(|b| b.recent.is_none())
    }
}
