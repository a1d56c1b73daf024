//! The way to an entity wherever it lives: here, on another node, or nowhere for the moment.
//!
//! A command goes from the node at which it was asked to the node that holds its entity's shard, and never on from there:
//! a node to which it does not belong says so, and its sender sends it elsewhere. So nobody waits for what is under way at
//! others but who sent it. While a shard is on its way from one node to another its commands wait, at both ends, and go on
//! when the map says where it is or when it is opened: on that event, not on a timer. What comes back unanswered goes on
//! under its own id; its owner knows a repeat by it.
//!
//! Guarantee: commands that one caller hands to one entity reach it in that order, also across a move. What came back goes
//! in the order in which it was sent first and before what came since, when everything else that was under way is answered
//! or back too; and of a round of which something was told to go elsewhere the receiver begins nothing more ([`Rounds`]).
//! Bound: [`WAITING_MAX`] commands of a shard and [`WAITING_ALL_MAX`] in all wait, each at most as long as its caller has
//! patience ([`PATIENCE`], counted from where it was asked); past that they are refused with `overloaded` and
//! `retry_after_ms`, or `unavailable`.
//!
//! [`Rounds`]: crate::shard::reply::Rounds
//! [`PATIENCE`]: crate::shard::reply::PATIENCE

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use patchbay_protocol::CommandError;
use patchbay_protocol::command::{Command, Reply};
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, EntityId, InboxId, TenantId};
use tokio::time::Instant;

use super::map::Incarnation;
use crate::account::{AccountCommand, AccountReply};
use crate::agent::{AgentCommand, AgentReply};
use crate::fanout::Topic;
use crate::inbox::{InboxCommand, InboxReply};
use crate::shard::reply::ReplyTo;

/// Commands of one shard that wait for it to be somewhere.
pub const WAITING_MAX: usize = 1024;
/// Commands of all shards that wait.
pub const WAITING_ALL_MAX: usize = 65_536;
/// Between two looks at commands that have waited too long.
const WAITING_LOOK: Duration = Duration::from_secs(1);
/// A node that does not know yet what it holds is asked again after this.
const BEHIND_PAUSE: Duration = Duration::from_millis(20);
/// What a caller past a bound is told to wait.
const RETRY_AFTER_MS: u64 = 1000;

/// A command on its way to its entity, with whom to answer.
#[derive(Debug)]
pub enum Parcel {
    /// To a conversation.
    Conversation(ConversationId, Box<Command>, ReplyTo<Reply>),
    /// To a channel account.
    Account(TenantId, AccountId, Box<AccountCommand>, ReplyTo<AccountReply>),
    /// To an agent.
    Agent(TenantId, AgentId, Box<AgentCommand>, ReplyTo<AgentReply>),
    /// To an inbox.
    Inbox(TenantId, InboxId, Box<InboxCommand>, ReplyTo<InboxReply>),
    /// Asks the owner of a topic who looks at it, on every node; each in its publisher's words.
    Who(Topic, ReplyTo<Vec<String>>),
    /// To the session of a client without a socket of its own: on a node, whatever becomes of its shards.
    Session(String, Bytes, ReplyTo<()>),
}

impl Parcel {
    /// To which entity it is; none: to whoever publishes a topic.
    fn entity(&self) -> Option<EntityId> {
        Some(match self {
            Self::Conversation(id, ..) => EntityId::Conversation(*id),
            Self::Account(tenant, account, ..) => EntityId::Account(tenant.clone(), account.clone()),
            Self::Agent(tenant, agent, ..) => EntityId::Agent(tenant.clone(), agent.clone()),
            Self::Inbox(tenant, inbox, ..) => EntityId::Inbox(tenant.clone(), inbox.clone()),
            Self::Who(..) | Self::Session(..) => return None,
        })
    }

    /// Its shard, out of `count`.
    pub fn shard(&self, count: u32) -> u32 {
        match self {
            Self::Who(topic, _) => topic.shard(count),
            Self::Session(session, ..) => {
                let hash = blake3::hash(session.as_bytes());
                u32::from_be_bytes([0, 0, hash.as_bytes()[0], hash.as_bytes()[1]]) % count.max(1)
            }
            _ => self.entity().map_or(0, |entity| entity.shard(count)),
        }
    }

    /// Whether another node sent it.
    fn is_far(&self) -> bool {
        match self {
            Self::Conversation(.., reply) => reply.is_far(),
            Self::Account(.., reply) => reply.is_far(),
            Self::Agent(.., reply) => reply.is_far(),
            Self::Inbox(.., reply) => reply.is_far(),
            Self::Who(_, reply) => reply.is_far(),
            Self::Session(.., reply) => reply.is_far(),
        }
    }

    /// Until when somebody waits for its answer.
    pub fn until(&self) -> Instant {
        match self {
            Self::Conversation(.., reply) => reply.until(),
            Self::Account(.., reply) => reply.until(),
            Self::Agent(.., reply) => reply.until(),
            Self::Inbox(.., reply) => reply.until(),
            Self::Who(_, reply) => reply.until(),
            Self::Session(.., reply) => reply.until(),
        }
    }

    /// Tells the node that sent it that it does not belong here.
    fn elsewhere(self) {
        match self {
            Self::Conversation(.., reply) => reply.elsewhere(),
            Self::Account(.., reply) => reply.elsewhere(),
            Self::Agent(.., reply) => reply.elsewhere(),
            Self::Inbox(.., reply) => reply.elsewhere(),
            Self::Who(_, reply) => reply.elsewhere(),
            Self::Session(.., reply) => reply.elsewhere(),
        }
    }

    /// Answers that it was not done.
    pub fn refuse(self, error: CommandError) {
        // Whoever has stopped waiting repeats with the same ids.
        match self {
            Self::Conversation(.., reply) => drop(reply.send(Err(error))),
            Self::Account(.., reply) => drop(reply.send(Err(error))),
            Self::Agent(.., reply) => drop(reply.send(Err(error))),
            Self::Inbox(.., reply) => drop(reply.send(Err(error))),
            Self::Who(_, reply) => drop(reply.send(Err(error))),
            Self::Session(.., reply) => drop(reply.send(Err(error))),
        }
    }
}

/// Where a shard is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Here.
    Here,
    /// On another node.
    There(Incarnation),
    /// On its way.
    Nowhere,
}

/// This node's entities.
pub trait Local: Send + Sync + 'static {
    /// Where a shard is, as far as this node knows.
    fn place(&self, shard: u32) -> Place;

    /// Which version of the map is known here.
    fn map_version(&self) -> u64;

    /// Hands a command to an entity here. It comes back when the shard is not, or not any more.
    fn hand(&self, parcel: Parcel) -> Result<(), Parcel>;
}

/// A command's place in what its node sends to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// In the order in which commands were sent first.
    pub number: u64,
    /// Which round of its shard's it is sent in.
    pub round: u64,
}

/// The way to other nodes. What is sent is answered, or brought back by [`Switch::came_back`] or [`Switch::not_owner`];
/// either is told by [`Switch::settled`].
pub trait Transport: Send + Sync + 'static {
    /// Sends a command to another node. It comes back when there is no way to it.
    fn send(&self, to: Incarnation, parcel: Parcel, turn: Turn) -> Result<(), Parcel>;
}

struct Shard {
    /// What other nodes sent here. It waits for the shard to be here, or elsewhere, and for nothing else.
    arrived: VecDeque<Parcel>,
    /// The same, handed to an entity here and given back since: it goes before what has arrived since.
    given_back: VecDeque<Parcel>,
    /// What came back, in the order in which it was sent first.
    returned: BTreeMap<u64, Parcel>,
    /// What came since.
    waiting: VecDeque<Parcel>,
    /// Commands under way to another node, and to which.
    under_way: usize,
    to: Option<Incarnation>,
    /// Which round goes out; and whether something of it came back: then nothing goes out before all of it is answered or
    /// back.
    round: u64,
    is_recalled: bool,
    /// Nothing goes out before the map has this version.
    until: u64,
    /// Nor while whoever should have it has not heard so.
    paused: bool,
}

impl Shard {
    fn new(round: u64) -> Self {
        Self {
            arrived: VecDeque::new(),
            given_back: VecDeque::new(),
            returned: BTreeMap::new(),
            waiting: VecDeque::new(),
            under_way: 0,
            to: None,
            round,
            is_recalled: false,
            until: 0,
            paused: false,
        }
    }

    fn len(&self) -> usize {
        self.given_back.len() + self.arrived.len() + self.returned.len() + self.waiting.len()
    }

    fn is_idle(&self) -> bool {
        self.under_way == 0 && self.len() == 0
    }

    /// Takes out what nobody waits for any more.
    fn extract_late(&mut self, now: Instant) -> Vec<Parcel> {
        let mut late = Vec::new();
        for queue in [&mut self.given_back, &mut self.arrived, &mut self.waiting] {
            if queue.iter().any(|parcel| parcel.until() <= now) {
                let all = std::mem::take(queue).into_iter();
                let (old, rest): (Vec<_>, Vec<_>) = all.partition(|parcel| parcel.until() <= now);
                *queue = rest.into();
                late.extend(old);
            }
        }
        late.extend(
            self.returned.extract_if(.., |_, parcel| parcel.until() <= now).map(|(_, parcel)| parcel),
        );
        late
    }
}

struct Inner {
    shards: HashMap<u32, Shard>,
    waiting: usize,
    /// The last command that was sent, and the last round that any shard has begun.
    sent: u64,
    round: u64,
}

impl Inner {
    fn at(&mut self, shard: u32) -> &mut Shard {
        let round = self.round;
        self.shards.entry(shard).or_insert_with(|| Shard::new(round))
    }

    fn next_number(&mut self) -> u64 {
        self.sent += 1;
        self.sent
    }
}

/// What waits, and how much that is when it is let go of.
struct Locked<'a> {
    inner: MutexGuard<'a, Inner>,
    busy: &'a AtomicUsize,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.busy.store(self.inner.shards.len(), Ordering::Release);
    }
}

impl std::ops::Deref for Locked<'_> {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.inner
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        &mut self.inner
    }
}

/// Sends commands where their entities live.
pub struct Switch {
    count: u32,
    inner: Mutex<Inner>,
    /// Shards of which something waits or is under way to another node.
    busy: AtomicUsize,
    local: OnceLock<Weak<dyn Local>>,
    transport: OnceLock<Arc<dyn Transport>>,
}

impl std::fmt::Debug for Switch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Switch").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

impl Switch {
    /// Among so many shards.
    pub fn new(count: u32) -> Arc<Self> {
        let inner = Inner { shards: HashMap::new(), waiting: 0, sent: 0, round: 1 };
        let (inner, busy) = (Mutex::new(inner), AtomicUsize::new(0));
        Arc::new(Self { count, inner, busy, local: OnceLock::new(), transport: OnceLock::new() })
    }

    /// Says who lives here; once.
    pub fn set_local(self: &Arc<Self>, local: Weak<dyn Local>) {
        if self.local.set(local).is_ok() {
            tokio::spawn(refuse_the_late(Arc::downgrade(self)));
        }
    }

    /// Says how other nodes are reached; once.
    pub fn set_transport(&self, transport: Arc<dyn Transport>) {
        let _ = self.transport.set(transport);
    }

    fn lock(&self) -> Locked<'_> {
        Locked { inner: self.inner.lock().unwrap_or_else(PoisonError::into_inner), busy: &self.busy }
    }

    /// Whether nothing waits, and nothing is under way to other nodes: then whoever lives here is told at once.
    pub fn is_quiet(&self) -> bool {
        self.busy.load(Ordering::Acquire) == 0
    }

    /// Commands that wait for their shard to be somewhere.
    pub fn waiting(&self) -> usize {
        self.lock().waiting
    }

    /// Of one shard.
    pub fn waiting_for(&self, shard: u32) -> usize {
        self.lock().shards.get(&shard).map_or(0, Shard::len)
    }

    /// Sends a command on its way. Returns at once.
    pub fn send(&self, parcel: Parcel) -> Result<(), Box<(CommandError, Parcel)>> {
        let shard = parcel.shard(self.count);
        let mut inner = self.lock();
        let queues = inner.shards.get(&shard).is_some_and(|s| s.len() > 0);
        let parcel = if queues {
            parcel
        } else {
            match self.pass(&mut inner, shard, None, parcel) {
                Ok(()) => return Ok(()),
                Err(parcel) => parcel,
            }
        };
        let parcel = self.has_room(&inner, shard, parcel)?;
        inner.waiting += 1;
        inner.at(shard).waiting.push_back(parcel);
        Ok(())
    }

    /// A command came from another node for a shard that is about to be opened here, or has just gone.
    pub fn arrived(&self, parcel: Parcel) -> Result<(), Box<(CommandError, Parcel)>> {
        let shard = parcel.shard(self.count);
        let mut inner = self.lock();
        self.has_room(&inner, shard, parcel).map(|parcel| {
            inner.waiting += 1;
            inner.at(shard).arrived.push_back(parcel);
            self.flush(&mut inner, shard);
        })
    }

    fn has_room(
        &self,
        inner: &Inner,
        shard: u32,
        parcel: Parcel,
    ) -> Result<Parcel, Box<(CommandError, Parcel)>> {
        let waiting = inner.shards.get(&shard).map_or(0, Shard::len);
        if waiting >= WAITING_MAX || inner.waiting >= WAITING_ALL_MAX {
            metrics::counter!("patchbay_actors_overloaded_total", "kind" => "shard").increment(1);
            return Err(Box::new((CommandError::overloaded(RETRY_AFTER_MS), parcel)));
        }
        Ok(parcel)
    }

    /// A command came back from an entity here whose shard goes.
    pub fn returned(&self, parcel: Parcel) {
        let shard = parcel.shard(self.count);
        let mut inner = self.lock();
        // It was let in once: it is not turned away for a bound now.
        inner.waiting += 1;
        if parcel.is_far() {
            inner.at(shard).given_back.push_back(parcel);
        } else {
            let number = inner.next_number();
            inner.at(shard).returned.insert(number, parcel);
        }
        self.flush(&mut inner, shard);
    }

    /// A command came back from another node, which may have done it.
    pub fn came_back(&self, parcel: Parcel, turn: Turn) {
        let shard = parcel.shard(self.count);
        let mut inner = self.lock();
        inner.waiting += 1;
        let at = inner.at(shard);
        at.is_recalled = true;
        at.returned.insert(turn.number, parcel);
    }

    /// A command came back from a node that knows this version of the map and does not have its shard.
    pub fn not_owner(self: &Arc<Self>, parcel: Parcel, turn: Turn, from: Incarnation, version: u64) {
        let shard = parcel.shard(self.count);
        self.came_back(parcel, turn);
        let Some(local) = self.local.get().and_then(Weak::upgrade) else { return };
        let known = local.map_version();
        let mut inner = self.lock();
        let at = inner.at(shard);
        if version > known {
            at.until = at.until.max(version);
        } else if local.place(shard) == Place::There(from) && !std::mem::replace(&mut at.paused, true) {
            // It has still to read what we have read, and nobody tells us when.
            let switch = Arc::downgrade(self);
            tokio::spawn(async move {
                tokio::time::sleep(BEHIND_PAUSE).await;
                let Some(switch) = switch.upgrade() else { return };
                let mut inner = switch.lock();
                if let Some(at) = inner.shards.get_mut(&shard) {
                    at.paused = false;
                }
                switch.flush(&mut inner, shard);
            });
        }
    }

    /// A command to another node is no longer under way: it was answered, or has come back.
    pub fn settled(&self, shard: u32) {
        let mut inner = self.lock();
        let next = inner.round + 1;
        if let Some(at) = inner.shards.get_mut(&shard) {
            at.under_way = at.under_way.saturating_sub(1);
            if at.under_way == 0 {
                at.to = None;
                if std::mem::take(&mut at.is_recalled) {
                    at.round = next;
                    inner.round = next;
                }
            }
        }
        self.flush(&mut inner, shard);
    }

    /// Something has changed about these shards: what waits is sent on where that can be.
    pub fn moved(&self, shards: impl IntoIterator<Item = u32>) {
        let mut inner = self.lock();
        for shard in shards {
            self.flush(&mut inner, shard);
        }
    }

    /// Something has changed about any of them.
    pub fn all_moved(&self) {
        let mut inner = self.lock();
        let shards: Vec<u32> = inner.shards.iter().filter(|(_, s)| s.len() > 0).map(|(n, _)| *n).collect();
        for shard in shards {
            self.flush(&mut inner, shard);
        }
    }

    fn flush(&self, inner: &mut Inner, shard: u32) {
        while let Some(at) = inner.shards.get_mut(&shard) {
            let from_back = !at.given_back.is_empty();
            let queue = if from_back { &mut at.given_back } else { &mut at.arrived };
            let Some(parcel) = queue.pop_front() else { break };
            if let Err(parcel) = self.take_in(shard, parcel) {
                let at = inner.at(shard);
                let queue = if from_back { &mut at.given_back } else { &mut at.arrived };
                queue.push_front(parcel);
                break;
            }
            inner.waiting -= 1;
        }
        while let Some(at) = inner.shards.get_mut(&shard).filter(|at| !at.is_recalled) {
            let (number, parcel) = match at.returned.pop_first() {
                Some((number, parcel)) => (Some(number), parcel),
                None => match at.waiting.pop_front() {
                    Some(parcel) => (None, parcel),
                    None => break,
                },
            };
            if let Err(parcel) = self.pass(inner, shard, number, parcel) {
                let at = inner.at(shard);
                match number {
                    Some(number) => drop(at.returned.insert(number, parcel)),
                    None => at.waiting.push_front(parcel),
                }
                break;
            }
            inner.waiting -= 1;
        }
        if inner.shards.get(&shard).is_some_and(Shard::is_idle) {
            inner.shards.remove(&shard);
        }
    }

    /// Hands what arrived to its entity here, or tells whoever sent it that it is elsewhere.
    fn take_in(&self, shard: u32, parcel: Parcel) -> Result<(), Parcel> {
        let Some(local) = self.local.get().and_then(Weak::upgrade) else { return Err(parcel) };
        match local.place(shard) {
            Place::Here => local.hand(parcel),
            Place::There(_) => {
                parcel.elsewhere();
                Ok(())
            }
            Place::Nowhere => Err(parcel),
        }
    }

    /// Passes a command of this node's on to where its shard is, if it is anywhere.
    fn pass(&self, inner: &mut Inner, shard: u32, number: Option<u64>, parcel: Parcel) -> Result<(), Parcel> {
        let Some(local) = self.local.get().and_then(Weak::upgrade) else { return Err(parcel) };
        let at = inner.shards.get(&shard);
        if at.is_some_and(|at| at.is_recalled || at.paused || at.until > local.map_version()) {
            return Err(parcel);
        }
        let under_way = at.and_then(|at| at.to);
        match local.place(shard) {
            Place::Here if under_way.is_none() => local.hand(parcel),
            Place::There(to) if under_way.is_none_or(|other| other == to) => {
                let Some(transport) = self.transport.get() else { return Err(parcel) };
                let number = number.unwrap_or_else(|| inner.next_number());
                let at = inner.at(shard);
                let sent = transport.send(to, parcel, Turn { number, round: at.round });
                if sent.is_ok() {
                    (at.under_way, at.to) = (at.under_way + 1, Some(to));
                }
                sent
            }
            Place::Here | Place::There(_) | Place::Nowhere => Err(parcel),
        }
    }
}

/// Refuses what nobody waits for any more.
async fn refuse_the_late(switch: Weak<Switch>) {
    loop {
        tokio::time::sleep(WAITING_LOOK).await;
        let Some(strong) = switch.upgrade() else { return };
        let late: Vec<Parcel> = {
            let mut inner = strong.lock();
            let now = Instant::now();
            let late = inner.shards.values_mut().flat_map(|at| at.extract_late(now)).collect::<Vec<_>>();
            inner.waiting -= late.len();
            inner.shards.retain(|_, at| !at.is_idle());
            late
        };
        metrics::gauge!("patchbay_shards_waiting_commands").set(strong.waiting() as f64);
        for parcel in late {
            parcel.refuse(CommandError::unavailable());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::reply::{PATIENCE, Round, Rounds, Told};
    use std::sync::atomic::AtomicU64;
    use tokio::sync::oneshot;

    const COUNT: u32 = 8;

    struct Node {
        place: Mutex<Place>,
        version: AtomicU64,
        taken: Mutex<Vec<u64>>,
    }

    impl Local for Node {
        fn place(&self, _: u32) -> Place {
            *self.place.lock().unwrap()
        }

        fn map_version(&self) -> u64 {
            self.version.load(Ordering::Relaxed)
        }

        fn hand(&self, parcel: Parcel) -> Result<(), Parcel> {
            self.taken.lock().unwrap().push(number(&parcel));
            Ok(())
        }
    }

    #[derive(Default)]
    struct Wire(Mutex<Vec<(Incarnation, Parcel, Turn)>>);

    impl Transport for Wire {
        fn send(&self, to: Incarnation, parcel: Parcel, turn: Turn) -> Result<(), Parcel> {
            self.0.lock().unwrap().push((to, parcel, turn));
            Ok(())
        }
    }

    type Answer = oneshot::Receiver<Result<AccountReply, CommandError>>;

    fn parcel(n: u64) -> (Parcel, Answer) {
        let (reply, answer) = oneshot::channel();
        let command = Box::new(AccountCommand::Placed { kept: n });
        (Parcel::Account("t".parse().unwrap(), "a".parse().unwrap(), command, reply.into()), answer)
    }

    fn number(parcel: &Parcel) -> u64 {
        match parcel {
            Parcel::Account(.., command, _) => match **command {
                AccountCommand::Placed { kept } => kept,
                _ => 0,
            },
            _ => 0,
        }
    }

    struct World {
        switch: Arc<Switch>,
        node: Arc<Node>,
        wire: Arc<Wire>,
        shard: u32,
    }

    impl World {
        fn at(place: Place) -> Self {
            let node = Node { place: Mutex::new(place), version: AtomicU64::new(1), taken: Mutex::default() };
            let (switch, node, wire) = (Switch::new(COUNT), Arc::new(node), Arc::<Wire>::default());
            let local: Weak<dyn Local> = Arc::downgrade(&(node.clone() as Arc<dyn Local>));
            switch.set_local(local);
            switch.set_transport(wire.clone());
            let shard = parcel(0).0.shard(COUNT);
            Self { switch, node, wire, shard }
        }

        fn send(&self, n: u64) -> Answer {
            let (parcel, answer) = parcel(n);
            self.switch.send(parcel).map_err(|refused| refused.0).unwrap();
            answer
        }

        fn moves(&self, place: Place) {
            *self.node.place.lock().unwrap() = place;
            self.switch.moved([self.shard]);
        }

        fn sent(&self) -> Vec<(Incarnation, u64)> {
            self.wire.0.lock().unwrap().iter().map(|(to, parcel, _)| (*to, number(parcel))).collect()
        }

        fn rounds(&self) -> Vec<u64> {
            self.wire.0.lock().unwrap().iter().map(|(.., turn)| turn.round).collect()
        }

        fn taken(&self) -> Vec<u64> {
            self.node.taken.lock().unwrap().clone()
        }

        /// What is under way comes back, the last first.
        fn comes_back(&self) {
            let all = std::mem::take(&mut *self.wire.0.lock().unwrap());
            for (_, parcel, turn) in all.into_iter().rev() {
                self.switch.came_back(parcel, turn);
                self.switch.settled(self.shard);
            }
        }

        /// Another node sends it in that round.
        fn arrives(&self, n: u64, rounds: &Arc<Rounds>, round: u64) -> oneshot::Receiver<Told<AccountReply>> {
            let (reply, answer) = oneshot::channel();
            let round = Round { shard: self.shard, number: round, rounds: rounds.clone() };
            let reply = ReplyTo::far(reply, round, Instant::now() + PATIENCE);
            let command = Box::new(AccountCommand::Placed { kept: n });
            let parcel = Parcel::Account("t".parse().unwrap(), "a".parse().unwrap(), command, reply);
            self.switch.arrived(parcel).map_err(|refused| refused.0).unwrap();
            answer
        }
    }

    #[tokio::test]
    async fn what_came_back_goes_before_what_came_since_in_its_order_and_in_a_later_round() {
        let world = World::at(Place::There(2));
        let _answers = [world.send(1), world.send(2)];
        assert_eq!(world.sent(), [(2, 1), (2, 2)]);
        let before = world.rounds()[1];
        world.moves(Place::Nowhere);
        let _answer = world.send(3);
        world.comes_back();
        assert_eq!((world.switch.waiting(), world.taken()), (3, vec![]));
        world.moves(Place::There(3));
        assert_eq!(world.sent(), [(3, 1), (3, 2), (3, 3)]);
        assert!(world.rounds().iter().all(|round| *round > before));
        world.comes_back();
        world.wire.0.lock().unwrap().clear();
        world.moves(Place::Here);
        assert!(world.taken().is_empty(), "they are under way");
    }

    #[tokio::test]
    async fn what_came_back_waits_for_what_was_sent_beside_it() {
        let world = World::at(Place::There(2));
        let _answers = [world.send(1), world.send(2), world.send(3)];
        // The second one comes back first; the first one may still.
        let second = world.wire.0.lock().unwrap().remove(1);
        world.switch.came_back(second.1, second.2);
        world.switch.settled(world.shard);
        let _answer = world.send(4);
        assert_eq!(world.sent(), [(2, 1), (2, 3)]);
        // It does, and the third one is answered.
        let first = world.wire.0.lock().unwrap().remove(0);
        world.switch.came_back(first.1, first.2);
        world.switch.settled(world.shard);
        world.wire.0.lock().unwrap().clear();
        world.switch.settled(world.shard);
        assert_eq!(world.sent(), [(2, 1), (2, 2), (2, 4)]);
    }

    #[tokio::test]
    async fn nothing_goes_to_a_new_owner_while_something_is_under_way_to_another() {
        let world = World::at(Place::There(2));
        let _first = world.send(1);
        world.moves(Place::There(3));
        let _second = world.send(2);
        assert_eq!(world.sent(), [(2, 1)]);
        world.comes_back();
        assert_eq!(world.sent(), [(3, 1), (3, 2)]);
        world.comes_back();
        assert_eq!(world.sent(), [(3, 1), (3, 2)]);
    }

    #[tokio::test]
    async fn what_another_node_sent_waits_for_nothing_that_is_under_way_and_never_goes_on_from_here() {
        let world = World::at(Place::There(2));
        let _first = world.send(1);
        world.moves(Place::Nowhere);
        let _second = world.send(2);
        let rounds = Arc::<Rounds>::default();
        let mut far = [world.arrives(3, &rounds, 1), world.arrives(4, &rounds, 1)];
        assert!(world.taken().is_empty());
        assert!(far[0].try_recv().is_err(), "it waits for the map");
        world.moves(Place::There(3));
        for answer in &mut far {
            assert!(matches!(answer.try_recv(), Ok(Told::Elsewhere)));
        }
        assert!(rounds.is_over(world.shard, 1) && !rounds.is_over(world.shard, 2));
        // Or the shard is opened here.
        world.moves(Place::Nowhere);
        let _far = [world.arrives(5, &rounds, 2), world.arrives(6, &rounds, 2)];
        world.moves(Place::Here);
        assert_eq!(world.taken(), [5, 6], "what came since waits for the answer");
        world.wire.0.lock().unwrap().clear();
        world.switch.settled(world.shard);
        assert_eq!(world.taken(), [5, 6, 2]);
        assert!(world.switch.is_quiet());
    }

    #[tokio::test]
    async fn what_an_entity_here_gives_back_goes_before_what_has_arrived_since() {
        let world = World::at(Place::Nowhere);
        let rounds = Arc::<Rounds>::default();
        let _later = world.arrives(2, &rounds, 1);
        let (reply, _answer) = oneshot::channel();
        let round = Round { shard: world.shard, number: 1, rounds };
        let command = Box::new(AccountCommand::Placed { kept: 1 });
        let reply = ReplyTo::far(reply, round, Instant::now() + PATIENCE);
        let given_back = Parcel::Account("t".parse().unwrap(), "a".parse().unwrap(), command, reply);
        world.switch.returned(given_back);
        world.moves(Place::Here);
        assert_eq!(world.taken(), [1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_told_of_a_newer_map_waits_for_it_and_who_knows_better_asks_again() {
        let world = World::at(Place::There(2));
        let _first = world.send(1);
        let back = |world: &World, version| {
            let (from, parcel, turn) = world.wire.0.lock().unwrap().pop().unwrap();
            world.switch.not_owner(parcel, turn, from, version);
            world.switch.settled(world.shard);
        };
        back(&world, 5);
        assert_eq!(world.sent(), []);
        world.switch.all_moved();
        assert_eq!(world.sent(), [], "the map is not known yet");
        world.node.version.store(5, Ordering::Relaxed);
        world.moves(Place::There(3));
        assert_eq!(world.sent(), [(3, 1)]);
        back(&world, 4);
        world.switch.all_moved();
        assert_eq!(world.sent(), [], "it has not read yet what we have");
        tokio::time::sleep(BEHIND_PAUSE * 2).await;
        assert_eq!(world.sent(), [(3, 1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_bounded_in_number_and_in_time() {
        let world = World::at(Place::Nowhere);
        let answers: Vec<Answer> = (0..WAITING_MAX as u64).map(|n| world.send(n)).collect();
        let refused = world.switch.send(parcel(0).0).unwrap_err().0;
        assert_eq!(refused, CommandError::overloaded(RETRY_AFTER_MS));
        tokio::time::sleep(PATIENCE + 2 * WAITING_LOOK).await;
        for answer in answers {
            assert_eq!(answer.await.unwrap().unwrap_err(), CommandError::unavailable());
        }
        assert!(world.switch.is_quiet());
    }
}
