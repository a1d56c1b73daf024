//! The fold: what a conversation is after its entries. Bounded however long the log: what a decision needs of the
//! past beyond this is looked up in the log.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use patchbay_protocol::entry::{Actor, Body, Entry};
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, InboxId, TenantId};
use patchbay_protocol::receipt::MessageStatus;
use patchbay_protocol::summary::{Contact, Status, Summary};
use patchbay_protocol::timestamp::Timestamp;
use serde::{Deserialize, Serialize};

use super::done::Done;

/// Statuses of the newest outbound messages are kept at hand; those of older ones are in the log.
const STATUSES_KEPT: usize = 64;
/// Runs of unread messages that are told apart; past it the two oldest are counted together.
const UNREAD_RUNS_MAX: usize = 1024;
/// Unread messages whose provider's id is at hand, to tell the customer that they were read.
const UNREAD_IDS_MAX: usize = 64;

/// Where the conversation belongs; set by its first entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// The tenant.
    pub tenant: TenantId,
    /// The channel account.
    pub account: AccountId,
    /// The account's inbox when it was opened; summaries show the present one.
    pub inbox: InboxId,
    /// The thread key.
    pub thread: String,
    /// The customer.
    pub contact: Contact,
}

/// The last message of somebody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct LastBy {
    actor: Actor,
    seq: u64,
}

/// A run of unread customer messages with consecutive seqs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    last: u64,
    count: u64,
}

/// What a conversation is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Its id.
    pub id: ConversationId,
    /// `None` before the first entry.
    pub home: Option<Home>,
    /// Where the work stands.
    pub status: Status,
    /// Who works on it.
    pub assignee: Option<AgentId>,
    /// Its tags.
    pub tags: BTreeSet<String>,
    /// The episode, from 1.
    pub episode: u64,
    /// The last entry.
    pub last_seq: u64,
    /// When it was made.
    pub updated_at: Timestamp,
    /// The start of the last message.
    pub preview: String,
    unread: VecDeque<Run>,
    /// The highest read mark of any agent.
    pub read_up_to: u64,
    /// The oldest customer message without a reply.
    pub waiting_since: Option<Timestamp>,
    /// The latest `sent_at` of a customer's message, by the provider's word; `None` when the provider says that the
    /// window is closed.
    pub window_opened: Option<Timestamp>,
    /// The provider's id of the customer's last message.
    pub last_inbound: Option<(u64, String)>,
    /// The newest customer messages that no agent has read, with the provider's ids.
    unread_ids: VecDeque<(u64, String)>,
    /// Until when it is snoozed.
    pub snoozed_until: Option<Timestamp>,
    last_message: Option<LastBy>,
    last_message_by_another: u64,
    statuses: BTreeMap<u64, MessageStatus>,
    /// Sends that the provider has not taken yet.
    pub pending: BTreeSet<u64>,
    linked: BTreeSet<ConversationId>,
    /// Customers' messages whose file is not fetched yet, and since when.
    pub fetching: BTreeMap<u64, Timestamp>,
    /// Commands that were done not long ago.
    #[serde(default)]
    pub done: Done,
}

impl State {
    /// A conversation without entries.
    pub fn fresh(id: ConversationId) -> Self {
        Self {
            id,
            home: None,
            status: Status::Open,
            assignee: None,
            tags: BTreeSet::new(),
            episode: 0,
            last_seq: 0,
            updated_at: Timestamp::default(),
            preview: String::new(),
            unread: VecDeque::new(),
            read_up_to: 0,
            waiting_since: None,
            window_opened: None,
            last_inbound: None,
            unread_ids: VecDeque::new(),
            snoozed_until: None,
            last_message: None,
            last_message_by_another: 0,
            statuses: BTreeMap::new(),
            pending: BTreeSet::new(),
            linked: BTreeSet::new(),
            fetching: BTreeMap::new(),
            done: Done::default(),
        }
    }

    /// The status of a message that we sent, where it is at hand.
    pub fn status_of(&self, seq: u64) -> Option<MessageStatus> {
        self.statuses.get(&seq).copied()
    }

    /// The provider's id of the last unread customer message up to `seq`, as far as they are at hand.
    pub fn last_unread(&self, seq: u64) -> Option<&str> {
        self.unread_ids.iter().rev().find(|(s, _)| *s <= seq).map(|(_, id)| id.as_str())
    }

    /// The newest of our messages up to `seq` that the customer has not read, as far as they are at hand; ascending.
    pub fn unread_by_contact(&self, seq: u64, at_most: usize) -> Vec<u64> {
        let unread =
            self.statuses.range(..=seq).rev().filter(|(_, s)| s.climb(MessageStatus::Read).is_some());
        let mut newest: Vec<u64> = unread.take(at_most).map(|(seq, _)| *seq).collect();
        newest.reverse();
        newest
    }

    /// How many customer messages no agent has read.
    pub fn unread(&self) -> u64 {
        self.unread.iter().map(|r| r.count).sum()
    }

    /// Until when free-form messages may be sent.
    pub fn window_until(&self, window: Option<Duration>) -> Option<Timestamp> {
        Some(self.window_opened?.plus(window?))
    }

    /// The last message of anybody but `actor`.
    pub fn last_message_by_another(&self, actor: &Actor) -> u64 {
        match &self.last_message {
            Some(last) if last.actor == *actor => self.last_message_by_another,
            Some(last) => last.seq,
            None => 0,
        }
    }

    /// Whether it is linked with `other`.
    pub fn is_linked(&self, other: ConversationId) -> bool {
        self.linked.contains(&other)
    }

    /// The conversation in one line, as in `inbox`; `None` before the first entry.
    pub fn summary(&self, inbox: InboxId, window: Option<Duration>, now: Timestamp) -> Option<Summary> {
        let home = self.home.as_ref()?;
        Some(Summary {
            id: self.id,
            account: home.account.clone(),
            inbox,
            contact: home.contact.clone(),
            status: self.status,
            assignee: self.assignee.clone(),
            last_seq: self.last_seq,
            preview: self.preview.clone(),
            unread: self.unread(),
            waiting_since: self.waiting_since,
            window_until: self.window_until(window).filter(|until| *until > now),
            episode: self.episode,
            updated_at: self.updated_at,
        })
    }

    /// The state after one more entry.
    pub fn apply(&mut self, entry: &Entry) {
        self.last_seq = entry.seq;
        self.updated_at = entry.at;
        match &entry.body {
            Body::Opened(o) => {
                self.home = Some(Home {
                    tenant: o.tenant.clone(),
                    account: o.account.clone(),
                    inbox: o.inbox.clone(),
                    thread: o.thread.clone(),
                    contact: o.contact.clone(),
                });
                self.set_status(Status::Open, o.episode);
            }
            Body::Resolved { episode, .. } => self.set_status(Status::Resolved, *episode),
            Body::Reopened { episode, .. } => self.set_status(Status::Open, *episode),
            Body::Pending { episode, .. } => self.set_status(Status::Pending, *episode),
            Body::Snoozed { episode, until, .. } => {
                self.set_status(Status::Snoozed, *episode);
                self.snoozed_until = Some(*until);
            }
            Body::Linked { other, .. } => {
                self.linked.insert(*other);
            }
            Body::Received(m) => {
                self.count_unread(entry.seq);
                self.waiting_since.get_or_insert(entry.at);
                self.window_opened = self.window_opened.max(Some(m.sent_at));
                self.last_inbound = Some((entry.seq, m.provider_id.clone()));
                self.unread_ids.push_back((entry.seq, m.provider_id.clone()));
                if self.unread_ids.len() > UNREAD_IDS_MAX {
                    self.unread_ids.pop_front();
                }
                self.preview = m.content.preview();
                self.message_by(&entry.actor, entry.seq);
                if m.content.media().is_some() {
                    self.fetching.insert(entry.seq, entry.at);
                }
            }
            Body::MediaStored { message_seq, .. } | Body::MediaFailed { message_seq, .. } => {
                self.fetching.remove(message_seq);
            }
            Body::Sent(m) => {
                self.waiting_since = None;
                self.preview = m.content.preview();
                self.message_by(&entry.actor, entry.seq);
                let told = if m.provider_id.is_some() { MessageStatus::Sent } else { MessageStatus::Pending };
                self.set_message_status(entry.seq, told);
            }
            Body::Status(s) => {
                let known = self.status_of(s.message_seq).unwrap_or_default();
                if let Some(status) = known.climb(s.status) {
                    self.set_message_status(s.message_seq, status);
                }
                let newer = self.last_inbound.as_ref().is_some_and(|(seq, _)| *seq > s.message_seq);
                if !newer && s.error.as_ref().is_some_and(|e| e.code == WINDOW_CLOSED_CODE) {
                    self.window_opened = None;
                }
            }
            Body::Assigned { agent } => self.assignee.clone_from(agent),
            Body::Read { up_to_seq } => self.read(*up_to_seq),
            Body::TagAdded { tag } => {
                self.tags.insert(tag.clone());
            }
            Body::TagRemoved { tag } => {
                self.tags.remove(tag);
            }
            Body::ContactUpdated { contact, .. } => {
                if let Some(home) = &mut self.home {
                    home.contact = contact.clone();
                }
            }
            // Our own reaction goes out like a message.
            Body::Reacted { provider_id: None, .. } => {
                self.set_message_status(entry.seq, MessageStatus::Pending);
            }
            Body::Edited { .. } | Body::Deleted { .. } | Body::Reacted { .. } | Body::NoteAdded { .. } => {}
        }
    }

    fn set_status(&mut self, status: Status, episode: u64) {
        self.status = status;
        self.episode = episode;
        self.snoozed_until = None;
    }

    fn count_unread(&mut self, seq: u64) {
        match self.unread.back_mut() {
            Some(run) if run.last + 1 == seq => *run = Run { last: seq, count: run.count + 1 },
            _ => self.unread.push_back(Run { last: seq, count: 1 }),
        }
        if self.unread.len() > UNREAD_RUNS_MAX
            && let Some(oldest) = self.unread.pop_front()
            && let Some(next) = self.unread.front_mut()
        {
            next.count += oldest.count;
        }
    }

    fn read(&mut self, up_to: u64) {
        self.read_up_to = self.read_up_to.max(up_to);
        self.unread_ids.retain(|(seq, _)| *seq > up_to);
        while let Some(run) = self.unread.front_mut() {
            if run.last <= up_to {
                self.unread.pop_front();
                continue;
            }
            // A run's seqs are consecutive: those above the mark stay.
            run.count = run.count.min(run.last - up_to);
            break;
        }
    }

    fn message_by(&mut self, actor: &Actor, seq: u64) {
        match &mut self.last_message {
            Some(last) if last.actor == *actor => last.seq = seq,
            last => {
                self.last_message_by_another = last.as_ref().map_or(0, |l| l.seq);
                *last = Some(LastBy { actor: actor.clone(), seq });
            }
        }
    }

    fn set_message_status(&mut self, seq: u64, status: MessageStatus) {
        self.statuses.insert(seq, status);
        if status == MessageStatus::Pending {
            self.pending.insert(seq);
        } else {
            self.pending.remove(&seq);
        }
        while self.statuses.len() > STATUSES_KEPT {
            let oldest = self.statuses.keys().next().copied();
            if let Some(oldest) = oldest {
                self.statuses.remove(&oldest);
            }
        }
    }
}

/// WhatsApp's word for a closed window; kept with the entry, so that replaying closes it again.
pub const WINDOW_CLOSED_CODE: &str = "131047";
