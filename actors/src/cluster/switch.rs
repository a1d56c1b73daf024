//! The way to an entity wherever it lives: here, on another node, or nowhere for the moment.
//!
//! A command goes to the node that holds its entity's shard. While a shard is on its way from one node to another its
//! commands wait here, and go on when the map says where it is or when it is opened here: on that event, not on a timer.
//! What comes back unanswered goes on under its own id; its owner knows a repeat by it.
//!
//! Guarantee: commands that one caller hands to one entity reach it in that order, also across a move: what came back
//! goes before what came since, and nothing goes to a new owner while something is still under way to another.
//! Bound: [`WAITING_MAX`] commands of a shard and [`WAITING_ALL_MAX`] in all wait, each at most [`WAITING_FOR`]; past that
//! they are refused with `overloaded` and `retry_after_ms`, or `unavailable`.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use patchbay_protocol::CommandError;
use patchbay_protocol::command::{Command, Reply};
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, EntityId, InboxId, TenantId};
use tokio::time::Instant;

use super::map::Incarnation;
use crate::account::{AccountCommand, AccountReply};
use crate::agent::{AgentCommand, AgentReply};
use crate::fanout::Topic;
use crate::inbox::{InboxCommand, InboxReply};
use crate::shard::slots::ReplyTo;

/// Commands of one shard that wait for it to be somewhere.
pub const WAITING_MAX: usize = 1024;
/// Commands of all shards that wait.
pub const WAITING_ALL_MAX: usize = 65_536;
/// How long a command waits before it is refused.
pub const WAITING_FOR: Duration = Duration::from_secs(30);
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
}

impl Parcel {
    /// To which entity it is; none: to whoever publishes a topic.
    fn entity(&self) -> Option<EntityId> {
        Some(match self {
            Self::Conversation(id, ..) => EntityId::Conversation(*id),
            Self::Account(tenant, account, ..) => EntityId::Account(tenant.clone(), account.clone()),
            Self::Agent(tenant, agent, ..) => EntityId::Agent(tenant.clone(), agent.clone()),
            Self::Inbox(tenant, inbox, ..) => EntityId::Inbox(tenant.clone(), inbox.clone()),
            Self::Who(..) => return None,
        })
    }

    /// Its shard, out of `count`.
    pub fn shard(&self, count: u32) -> u32 {
        match self {
            Self::Who(topic, _) => topic.shard(count),
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

/// The way to other nodes. What is sent is answered, or brought back by [`Switch::returned`]; either is told by
/// [`Switch::settled`].
pub trait Transport: Send + Sync + 'static {
    /// Sends a command to another node. It comes back when there is no way to it.
    fn send(&self, to: Incarnation, parcel: Parcel) -> Result<(), Parcel>;
}

#[derive(Default)]
struct Shard {
    /// What other nodes sent here. It waits for nothing that is under way from here: that may be itself, sent on to us.
    arrived: VecDeque<(Instant, Parcel)>,
    /// The same, handed to an entity here and given back since: it goes before what has arrived since.
    given_back: VecDeque<(Instant, Parcel)>,
    /// What came back, and what came since.
    returned: VecDeque<(Instant, Parcel)>,
    waiting: VecDeque<(Instant, Parcel)>,
    /// Commands under way to another node, and to which.
    under_way: usize,
    to: Option<Incarnation>,
    /// Nothing goes out before the map has this version.
    until: u64,
    /// Nor while whoever should have it has not heard so.
    paused: bool,
}

impl Shard {
    fn len(&self) -> usize {
        self.given_back.len() + self.arrived.len() + self.returned.len() + self.waiting.len()
    }
}

#[derive(Default)]
struct Inner {
    shards: HashMap<u32, Shard>,
    waiting: usize,
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
        let inner = Mutex::default();
        let busy = AtomicUsize::new(0);
        Arc::new(Self { count, inner, busy, local: OnceLock::new(), transport: OnceLock::new() })
    }

    /// Says who lives here; once.
    pub fn set_local(self: &Arc<Self>, local: Weak<dyn Local>) {
        if self.local.set(local).is_ok() {
            tokio::spawn(refuse_the_old(Arc::downgrade(self)));
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
            match self.pass(&mut inner, shard, parcel) {
                Ok(()) => return Ok(()),
                Err(parcel) => parcel,
            }
        };
        let parcel = self.has_room(&inner, shard, parcel)?;
        inner.waiting += 1;
        inner.shards.entry(shard).or_default().waiting.push_back((Instant::now(), parcel));
        Ok(())
    }

    /// A command came from another node for a shard that is about to be opened here, or has just gone.
    pub fn arrived(&self, parcel: Parcel) -> Result<(), Box<(CommandError, Parcel)>> {
        let shard = parcel.shard(self.count);
        let mut inner = self.lock();
        self.has_room(&inner, shard, parcel).map(|parcel| {
            inner.waiting += 1;
            inner.shards.entry(shard).or_default().arrived.push_back((Instant::now(), parcel));
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

    /// A command came back from another node, or from an entity here whose shard goes: it goes on in its own order.
    pub fn returned(&self, parcel: Parcel) {
        let shard = parcel.shard(self.count);
        let mut inner = self.lock();
        // It was let in once: it is not turned away for a bound now.
        inner.waiting += 1;
        let at = inner.shards.entry(shard).or_default();
        // What another node sent may be what is under way from here: it does not wait for that.
        let queue = if parcel.is_far() { &mut at.given_back } else { &mut at.returned };
        queue.push_back((Instant::now(), parcel));
        self.flush(&mut inner, shard);
    }

    /// A command came back from a node that knows this version of the map and does not have its shard.
    pub fn not_owner(self: &Arc<Self>, parcel: Parcel, version: u64) {
        let shard = parcel.shard(self.count);
        let known = self.local.get().and_then(Weak::upgrade).map_or(0, |local| local.map_version());
        let mut inner = self.lock();
        inner.waiting += 1;
        let at = inner.shards.entry(shard).or_default();
        at.returned.push_back((Instant::now(), parcel));
        if version > known {
            at.until = at.until.max(version);
        } else if !std::mem::replace(&mut at.paused, true) {
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

    /// A command to another node is no longer under way: it was answered, or has been returned.
    pub fn settled(&self, shard: u32) {
        let mut inner = self.lock();
        if let Some(at) = inner.shards.get_mut(&shard) {
            at.under_way = at.under_way.saturating_sub(1);
            if at.under_way == 0 {
                at.to = None;
                if at.len() == 0 {
                    inner.shards.remove(&shard);
                    return;
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
            let Some((since, parcel)) = queue.pop_front() else { break };
            if let Err(parcel) = self.take_in(inner, shard, parcel) {
                let at = inner.shards.entry(shard).or_default();
                let queue = if from_back { &mut at.given_back } else { &mut at.arrived };
                queue.push_front((since, parcel));
                break;
            }
            inner.waiting -= 1;
        }
        loop {
            let Some(at) = inner.shards.get_mut(&shard) else { return };
            let from_returned = !at.returned.is_empty();
            let queue = if from_returned { &mut at.returned } else { &mut at.waiting };
            let Some((since, parcel)) = queue.pop_front() else { break };
            if let Err(parcel) = self.pass(inner, shard, parcel) {
                let at = inner.shards.entry(shard).or_default();
                let queue = if from_returned { &mut at.returned } else { &mut at.waiting };
                queue.push_front((since, parcel));
                return;
            }
            inner.waiting -= 1;
        }
        if inner.shards.get(&shard).is_some_and(|at| at.under_way == 0 && at.len() == 0) {
            inner.shards.remove(&shard);
        }
    }

    /// Hands what arrived to its entity here, whatever is under way from here; else passes it on.
    fn take_in(&self, inner: &mut Inner, shard: u32, parcel: Parcel) -> Result<(), Parcel> {
        let Some(local) = self.local.get().and_then(Weak::upgrade) else { return Err(parcel) };
        match local.place(shard) {
            Place::Here => local.hand(parcel),
            Place::There(_) | Place::Nowhere => self.pass(inner, shard, parcel),
        }
    }

    /// Passes a command on to where its shard is, if it is anywhere.
    fn pass(&self, inner: &mut Inner, shard: u32, parcel: Parcel) -> Result<(), Parcel> {
        let Some(local) = self.local.get().and_then(Weak::upgrade) else { return Err(parcel) };
        let at = inner.shards.get(&shard);
        if at.is_some_and(|at| at.paused || at.until > local.map_version()) {
            return Err(parcel);
        }
        let under_way = at.and_then(|at| at.to);
        match local.place(shard) {
            Place::Here if under_way.is_none() => local.hand(parcel),
            Place::There(to) if under_way.is_none_or(|other| other == to) => {
                let Some(transport) = self.transport.get() else { return Err(parcel) };
                let at = inner.shards.entry(shard).or_default();
                (at.under_way, at.to) = (at.under_way + 1, Some(to));
                let sent = transport.send(to, parcel);
                if sent.is_err() {
                    let at = inner.shards.entry(shard).or_default();
                    at.under_way -= 1;
                    at.to = at.to.filter(|_| at.under_way > 0);
                }
                sent
            }
            Place::Here | Place::There(_) | Place::Nowhere => Err(parcel),
        }
    }
}

/// Refuses what has waited too long.
async fn refuse_the_old(switch: Weak<Switch>) {
    loop {
        tokio::time::sleep(WAITING_LOOK).await;
        let Some(strong) = switch.upgrade() else { return };
        let mut old = Vec::new();
        {
            let mut inner = strong.lock();
            for at in inner.shards.values_mut() {
                for queue in [&mut at.given_back, &mut at.arrived, &mut at.returned, &mut at.waiting] {
                    while queue.front().is_some_and(|(since, _)| since.elapsed() >= WAITING_FOR) {
                        old.extend(queue.pop_front());
                    }
                }
            }
            inner.waiting -= old.len();
            inner.shards.retain(|_, at| at.under_way > 0 || at.len() > 0);
        }
        metrics::gauge!("patchbay_shards_waiting_commands").set(strong.waiting() as f64);
        for (_, parcel) in old {
            parcel.refuse(CommandError::unavailable());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
    struct Wire(Mutex<Vec<(Incarnation, Parcel)>>);

    impl Transport for Wire {
        fn send(&self, to: Incarnation, parcel: Parcel) -> Result<(), Parcel> {
            self.0.lock().unwrap().push((to, parcel));
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
            self.wire.0.lock().unwrap().iter().map(|(to, parcel)| (*to, number(parcel))).collect()
        }

        fn taken(&self) -> Vec<u64> {
            self.node.taken.lock().unwrap().clone()
        }

        /// What is under way comes back.
        fn comes_back(&self) {
            let all = std::mem::take(&mut *self.wire.0.lock().unwrap());
            let n = all.len();
            all.into_iter().for_each(|(_, parcel)| self.switch.returned(parcel));
            (0..n).for_each(|_| self.switch.settled(self.shard));
        }
    }

    #[tokio::test]
    async fn what_came_back_goes_before_what_came_since() {
        let world = World::at(Place::There(2));
        let _answers = [world.send(1), world.send(2)];
        assert_eq!(world.sent(), [(2, 1), (2, 2)]);
        world.moves(Place::Nowhere);
        let _answer = world.send(3);
        world.comes_back();
        assert_eq!((world.switch.waiting(), world.taken()), (3, vec![]));
        world.moves(Place::Here);
        assert_eq!(world.taken(), [1, 2, 3]);
        assert!(world.switch.is_quiet());
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
    }

    #[tokio::test]
    async fn what_was_sent_on_to_us_and_is_given_back_does_not_wait_for_itself() {
        let world = World::at(Place::There(2));
        let _first = world.send(1);
        // The other node sends it on, and the entity here gives it back, since its shard goes and comes again.
        world.moves(Place::Nowhere);
        let _second = world.send(2);
        let (reply, _waits) = oneshot::channel();
        let command = Box::new(AccountCommand::Placed { kept: 1 });
        let reply = ReplyTo::far(reply);
        let sent_on = Parcel::Account("t".parse().unwrap(), "a".parse().unwrap(), command, reply);
        world.switch.returned(sent_on);
        // What arrives meanwhile does not overtake it.
        world.switch.arrived(parcel(3).0).map_err(|refused| refused.0).unwrap();
        world.moves(Place::Here);
        assert_eq!(world.taken(), [1, 3], "what came since waits for the answer");
        world.wire.0.lock().unwrap().clear();
        world.switch.settled(world.shard);
        assert_eq!(world.taken(), [1, 3, 2]);
        assert!(world.switch.is_quiet());
    }

    #[tokio::test]
    async fn what_was_sent_on_to_us_does_not_wait_for_itself() {
        let world = World::at(Place::There(2));
        let _first = world.send(1);
        // The other node lost the shard to us, and sends the command on before we have opened it.
        world.moves(Place::Nowhere);
        let _second = world.send(2);
        world.switch.arrived(parcel(1).0).map_err(|refused| refused.0).unwrap();
        assert!(world.taken().is_empty());
        world.moves(Place::Here);
        assert_eq!(world.taken(), [1], "what came since waits for the answer");
        world.wire.0.lock().unwrap().clear();
        world.switch.settled(world.shard);
        assert_eq!(world.taken(), [1, 2]);
        assert!(world.switch.is_quiet());
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_told_of_a_newer_map_waits_for_it_and_who_knows_better_asks_again() {
        let world = World::at(Place::There(2));
        let _first = world.send(1);
        let back = |world: &World, version| {
            let (_, parcel) = world.wire.0.lock().unwrap().pop().unwrap();
            world.switch.not_owner(parcel, version);
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
        tokio::time::sleep(WAITING_FOR + 2 * WAITING_LOOK).await;
        for answer in answers {
            assert_eq!(answer.await.unwrap().unwrap_err(), CommandError::unavailable());
        }
        assert!(world.switch.is_quiet());
    }
}
