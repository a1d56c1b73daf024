//! The fold of an account's log: the unsettled sends, in lines by recipient.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use patchbay_connectors::SendLimits;
use patchbay_protocol::ids::{ConversationId, EntryId};
use patchbay_protocol::inbound::StatusUpdate;
use patchbay_protocol::outbound::{Backoff, Lane, Outbound};
use patchbay_protocol::timestamp::Timestamp;
use patchbay_storage::tables::IdKey;
use serde::{Deserialize, Serialize};

use super::commands::AccountReply;
use super::log::{AccountEntry, Record};
use super::pacing::{Breaker, Bucket};

/// Settled provider ids that are remembered for receipts that overtake the outcome.
const RECENT_IDS_MAX: usize = 4096;
/// Lines with nothing in them that are kept for their buckets.
const IDLE_LINES_MAX: usize = 10_000;

/// Where a send stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    /// Waits for its turn.
    Waiting,
    /// A call is on record and not answered.
    Attempted,
    /// The conversation is being told.
    Known(Box<StatusUpdate>),
}

/// An unsettled send.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Send {
    /// The message.
    pub outbound: Outbound,
    /// Its place in the queue.
    pub arrival: u64,
    /// Calls so far.
    pub attempts: u32,
    /// Not before.
    pub not_before: Timestamp,
    /// Where it stands.
    pub phase: Phase,
}

/// A receipt that matches nothing yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// Since when.
    pub at: Timestamp,
    /// The conversation, where that is known.
    pub conversation: Option<ConversationId>,
    /// The message's seq, where that is known.
    pub message_seq: Option<u64>,
    /// The receipt.
    pub update: StatusUpdate,
}

/// What waits for one recipient: in order, one call at a time.
#[derive(Clone, Debug, PartialEq)]
struct Line {
    queue: VecDeque<EntryId>,
    calling: bool,
    not_before: Timestamp,
    bucket: Bucket,
    /// Where it stands in `due`.
    place: Option<(Lane, Timestamp, u64)>,
}

/// What stays of the state in a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Default)]
pub struct Frozen {
    sends: Vec<Send>,
    arrivals: u64,
    paused: Option<String>,
    kept: BTreeMap<u64, Kept>,
    recent: VecDeque<(String, ConversationId)>,
    /// Until when the provider holds back the account, and recipients.
    not_before: Timestamp,
    held: Vec<(String, Timestamp)>,
    /// What was sent not long ago counts under the next owner as well.
    bucket: Option<Bucket>,
    pairs: Vec<(String, Bucket)>,
}

/// What an account is.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    limits: SendLimits,
    /// How long a message may stay pending.
    pub max_age: Duration,
    /// The unsettled sends.
    pub sends: BTreeMap<EntryId, Send>,
    arrivals: u64,
    by_arrival: BTreeMap<u64, EntryId>,
    lines: HashMap<String, Line>,
    due: BTreeMap<(Lane, Timestamp, u64), String>,
    /// Unanswered calls.
    pub calling: usize,
    bucket: Bucket,
    breaker: Breaker,
    not_before: Timestamp,
    /// Why nothing is called until somebody acts.
    pub paused: Option<String>,
    /// Receipts that match nothing yet, by the seq that kept them.
    pub kept: BTreeMap<u64, Kept>,
    /// What is kept, so that a repeat adds nothing.
    kept_receipts: HashSet<u64>,
    recent: VecDeque<(String, ConversationId)>,
    recent_by_id: HashMap<String, ConversationId>,
    /// When the last entry was made.
    at: Timestamp,
}

/// What makes two receipts the same: the message, how far it has come, and for whom in a group.
fn receipt_hash(update: &StatusUpdate) -> u64 {
    let status = format!("{:?}", update.status);
    let parts =
        [update.provider_id.as_deref().unwrap_or(""), &status, update.participant.as_deref().unwrap_or("")];
    u64::from_be_bytes(IdKey::of(parts).0[..8].try_into().unwrap_or_default())
}

impl State {
    /// An account without entries.
    pub fn fresh(limits: SendLimits, max_age: Duration) -> Self {
        Self {
            limits,
            max_age,
            sends: BTreeMap::new(),
            arrivals: 0,
            by_arrival: BTreeMap::new(),
            lines: HashMap::new(),
            due: BTreeMap::new(),
            calling: 0,
            bucket: Bucket::new(limits.account_per_second, limits.account_per_second, Timestamp::default()),
            breaker: Breaker::default(),
            not_before: Timestamp::default(),
            paused: None,
            kept: BTreeMap::new(),
            kept_receipts: HashSet::new(),
            recent: VecDeque::new(),
            recent_by_id: HashMap::new(),
            at: Timestamp::default(),
        }
    }

    /// What a snapshot holds.
    pub fn freeze(&self) -> Frozen {
        let mut sends: Vec<Send> = self.sends.values().cloned().collect();
        sends.sort_by_key(|s| s.arrival);
        let held = self
            .lines
            .iter()
            .filter(|(_, l)| l.not_before > Timestamp::default())
            .map(|(r, l)| (r.clone(), l.not_before))
            .collect();
        let used = self.lines.iter().filter(|(_, l)| !l.bucket.is_full(self.at));
        let pairs = used.map(|(r, l)| (r.clone(), l.bucket)).collect();
        Frozen {
            bucket: Some(self.bucket),
            pairs,
            sends,
            arrivals: self.arrivals,
            paused: self.paused.clone(),
            kept: self.kept.clone(),
            recent: self.recent.clone(),
            not_before: self.not_before,
            held,
        }
    }

    /// The state of a snapshot. The breaker begins closed.
    pub fn thaw(frozen: Frozen, limits: SendLimits, max_age: Duration) -> Self {
        let mut state = Self::fresh(limits, max_age);
        state.arrivals = frozen.arrivals;
        state.paused = frozen.paused;
        state.kept_receipts = frozen.kept.values().map(|k| receipt_hash(&k.update)).collect();
        state.kept = frozen.kept;
        state.not_before = frozen.not_before;
        state.bucket = frozen.bucket.unwrap_or(state.bucket);
        for (recipient, bucket) in frozen.pairs {
            state.line(&recipient, Timestamp::default()).bucket = bucket;
        }
        for (recipient, not_before) in frozen.held {
            state.line(&recipient, Timestamp::default()).not_before = not_before;
        }
        for (id, conversation) in frozen.recent {
            state.remember_id(id, conversation);
        }
        for send in frozen.sends {
            let (entry, recipient) = (send.outbound.entry, send.outbound.recipient.key().to_owned());
            let (in_line, calling) = (!matches!(send.phase, Phase::Known(_)), send.phase == Phase::Attempted);
            state.by_arrival.insert(send.arrival, entry);
            state.sends.insert(entry, send);
            if in_line {
                state.line(&recipient, Timestamp::default()).queue.push_back(entry);
                state.calling += usize::from(calling);
                state.line(&recipient, Timestamp::default()).calling |= calling;
                state.place(&recipient, Timestamp::default());
            }
        }
        state
    }

    /// Whether a message may be called at once, with nothing before it.
    pub fn may_call_at_once(&self, outbound: &Outbound, now: Timestamp, in_flight_max: usize) -> bool {
        let free = self.room(now, in_flight_max) > 0 && self.due.is_empty();
        free && self.lines.get(outbound.recipient.key()).is_none_or(|l| {
            l.queue.is_empty() && !l.calling && l.not_before <= now && l.bucket.ready_at(now) <= now
        })
    }

    /// How many calls may be begun now.
    fn room(&self, now: Timestamp, in_flight_max: usize) -> usize {
        if self.paused.is_some() || self.not_before > now || self.breaker.open_until() > now {
            return 0;
        }
        let free = self.breaker.in_flight_max(in_flight_max).saturating_sub(self.calling);
        // A bucket holds at most a second's worth of messages.
        free.min(self.bucket.tokens(now).max(0.0) as usize)
    }

    /// The sends to be called now: lanes in order, in each whoever has been ready for longest.
    pub fn choose(&self, now: Timestamp, in_flight_max: usize, at_most: usize) -> Vec<EntryId> {
        let room = self.room(now, in_flight_max).min(at_most);
        let mut chosen = Vec::new();
        for lane in Lane::ALL {
            let ready = self.due.range((lane, Timestamp::from_millis(i64::MIN), 0)..=(lane, now, u64::MAX));
            for recipient in ready.map(|(_, r)| r) {
                if chosen.len() == room {
                    return chosen;
                }
                chosen.extend(self.lines.get(recipient).and_then(|l| l.queue.front()).copied());
            }
        }
        chosen
    }

    /// Sends that have been pending for too long and are not being called, at most `at_most`.
    pub fn expired(&self, now: Timestamp, at_most: usize) -> Vec<EntryId> {
        // Whoever came first is the oldest.
        let in_order = self.by_arrival.values().filter_map(|e| self.sends.get(e));
        let old = in_order
            .filter(|s| s.phase == Phase::Waiting)
            .take_while(|s| now.since(s.outbound.at) >= self.max_age);
        old.take(at_most).map(|s| s.outbound.entry).collect()
    }

    /// When there may be something to call, or to expire.
    pub fn next_due(&self, now: Timestamp, in_flight_max: usize) -> Option<Timestamp> {
        let oldest =
            self.by_arrival.values().filter_map(|e| self.sends.get(e)).find(|s| s.phase == Phase::Waiting);
        let expiry = oldest.map(|s| s.outbound.at.plus(self.max_age));
        if self.paused.is_some() || self.calling >= self.breaker.in_flight_max(in_flight_max) {
            return expiry;
        }
        let first = Lane::ALL
            .iter()
            .filter_map(|lane| {
                self.due
                    .range(
                        (*lane, Timestamp::from_millis(i64::MIN), 0)
                            ..=(*lane, Timestamp::from_millis(i64::MAX), u64::MAX),
                    )
                    .next()
            })
            .map(|((_, at, _), _)| *at)
            .min();
        let call = first
            .map(|at| at.max(self.not_before).max(self.breaker.open_until()).max(self.bucket.ready_at(now)));
        [call, expiry].into_iter().flatten().min()
    }

    /// How the account is.
    pub fn status(&self, now: Timestamp) -> AccountReply {
        AccountReply::Status {
            paused: self.paused.clone(),
            unsettled: self.sends.len(),
            under_way: self.sends.values().filter(|s| s.phase != Phase::Waiting).count(),
            left: self.bucket.tokens(now).max(0.0) as u32,
            per_second: self.limits.account_per_second as u32,
        }
    }

    /// Whether this very receipt is kept.
    pub fn keeps(&self, update: &StatusUpdate) -> bool {
        self.kept_receipts.contains(&receipt_hash(update))
    }

    /// The conversation of a provider id that was settled not long ago.
    pub fn conversation_of(&self, provider_id: &str) -> Option<ConversationId> {
        self.recent_by_id.get(provider_id).copied()
    }

    /// The state after one more entry, which stands at `seq`.
    pub fn apply(&mut self, seq: u64, record: &Record) {
        let at = record.at;
        self.at = at;
        match &record.body {
            AccountEntry::Queued { outbound, attempted } => self.queued(outbound, *attempted, at),
            AccountEntry::Attempted { entry } => self.attempted(*entry, at),
            AccountEntry::Retried { entry, error, not_before, scope } => {
                if error.code == super::commands::NOT_SENT {
                    self.breaker.failed(at)
                } else {
                    self.breaker.worked()
                }
                self.retried(*entry, *not_before, *scope, at);
            }
            AccountEntry::Outcome { entry, update } => self.outcome(*entry, update, at),
            AccountEntry::Settled { entry } => {
                let Some(send) = self.sends.remove(entry) else { return };
                self.by_arrival.remove(&send.arrival);
                if let Phase::Known(update) = send.phase
                    && let Some(id) = update.provider_id
                {
                    self.remember_id(id, entry.conversation);
                }
            }
            AccountEntry::Kept { conversation, message_seq, update } => {
                let kept = Kept {
                    at,
                    conversation: *conversation,
                    message_seq: *message_seq,
                    update: (**update).clone(),
                };
                self.kept_receipts.insert(receipt_hash(&kept.update));
                self.kept.insert(seq, kept);
            }
            AccountEntry::Released { kept } => {
                if let Some(kept) = self.kept.remove(kept) {
                    self.kept_receipts.remove(&receipt_hash(&kept.update));
                }
            }
            AccountEntry::Event(event) => {
                if let Some(reason) = &event.pauses {
                    self.paused = Some(reason.clone());
                }
            }
            AccountEntry::Paused { reason } => self.paused = Some(reason.clone()),
            AccountEntry::Resumed {} => self.paused = None,
            AccountEntry::AliasAdded { .. } => {}
        }
    }

    fn queued(&mut self, outbound: &Outbound, attempted: bool, at: Timestamp) {
        let arrival = self.arrivals;
        self.arrivals += 1;
        let entry = outbound.entry;
        let recipient = outbound.recipient.key().to_owned();
        self.by_arrival.insert(arrival, entry);
        self.sends.insert(
            entry,
            Send { outbound: outbound.clone(), arrival, attempts: 0, not_before: at, phase: Phase::Waiting },
        );
        self.line(&recipient, at).queue.push_back(entry);
        self.place(&recipient, at);
        if attempted {
            self.attempted(entry, at);
        }
    }

    fn attempted(&mut self, entry: EntryId, at: Timestamp) {
        let Some(send) = self.sends.get_mut(&entry) else { return };
        send.phase = Phase::Attempted;
        send.attempts += 1;
        let recipient = send.outbound.recipient.key().to_owned();
        self.calling += 1;
        self.bucket.take(at);
        let line = self.line(&recipient, at);
        line.calling = true;
        line.bucket.take(at);
        self.place(&recipient, at);
    }

    fn retried(&mut self, entry: EntryId, not_before: Timestamp, scope: Backoff, at: Timestamp) {
        let Some(send) = self.sends.get_mut(&entry) else { return };
        self.calling -= usize::from(send.phase == Phase::Attempted);
        send.phase = Phase::Waiting;
        send.not_before = not_before;
        let recipient = send.outbound.recipient.key().to_owned();
        if scope == Backoff::Account {
            self.not_before = self.not_before.max(not_before);
        }
        let line = self.line(&recipient, at);
        line.calling = false;
        if scope == Backoff::Pair {
            line.not_before = line.not_before.max(not_before);
        }
        self.place(&recipient, at);
    }

    fn outcome(&mut self, entry: EntryId, update: &StatusUpdate, at: Timestamp) {
        let Some(send) = self.sends.get_mut(&entry) else { return };
        let called = send.phase == Phase::Attempted;
        if called {
            self.calling -= 1;
            if update.status == patchbay_protocol::receipt::MessageStatus::Unknown {
                self.breaker.failed(at)
            } else {
                self.breaker.worked()
            }
        }
        send.phase = Phase::Known(Box::new(update.clone()));
        let recipient = send.outbound.recipient.key().to_owned();
        let line = self.line(&recipient, at);
        line.calling &= !called;
        line.queue.retain(|e| *e != entry);
        self.place(&recipient, at);
    }

    fn line(&mut self, recipient: &str, at: Timestamp) -> &mut Line {
        let limits = self.limits;
        self.lines.entry(recipient.to_owned()).or_insert_with(|| Line {
            queue: VecDeque::new(),
            calling: false,
            not_before: Timestamp::default(),
            bucket: Bucket::new(limits.pair_burst, limits.pair_per_second, at),
            place: None,
        })
    }

    /// Puts a line where it belongs among those that are due.
    fn place(&mut self, recipient: &str, now: Timestamp) {
        let Some(line) = self.lines.get_mut(recipient) else { return };
        if let Some(place) = line.place.take() {
            self.due.remove(&place);
        }
        let head = line.queue.front().and_then(|e| self.sends.get(e));
        if let (Some(head), false) = (head, line.calling) {
            let at = head.not_before.max(line.not_before).max(line.bucket.ready_at(now));
            let place = (head.outbound.lane, at, head.arrival);
            line.place = Some(place);
            self.due.insert(place, recipient.to_owned());
        }
        if self.lines.len() > IDLE_LINES_MAX + self.sends.len() {
            self.lines.retain(|_, l| {
                !l.queue.is_empty() || l.calling || l.not_before > now || !l.bucket.is_full(now)
            });
        }
    }

    fn remember_id(&mut self, id: String, conversation: ConversationId) {
        self.recent_by_id.insert(id.clone(), conversation);
        self.recent.push_back((id, conversation));
        if self.recent.len() > RECENT_IDS_MAX
            && let Some((oldest, _)) = self.recent.pop_front()
        {
            self.recent_by_id.remove(&oldest);
        }
    }
}
