//! What an entity with a log must say of itself. The loop around it is [`super::log_actor`].

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use patchbay_protocol::ids::{CommandId, EntityId};
use patchbay_protocol::{CommandError, Timestamp};
use patchbay_storage::log::LogKey;
use patchbay_storage::tables::{IdKey, Mark};
use patchbay_storage::{Batch, Stamp};

use super::log_actor::Handle;

/// Something that a decision needs to know of the log's past.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lookup {
    /// The entry that carries this id.
    Id(IdKey),
    /// The entry at this place.
    Seq(u64),
}

/// What was found: an entry with its place, or nothing.
#[derive(Debug)]
pub struct Found<T>(HashMap<Lookup, Option<(u64, Arc<T>)>>);

impl<T> Default for Found<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T> Found<T> {
    /// Whether this was looked up.
    pub fn knows(&self, lookup: Lookup) -> bool {
        self.0.contains_key(&lookup)
    }

    /// Notes what was found.
    pub fn note(&mut self, lookup: Lookup, entry: Option<(u64, Arc<T>)>) {
        self.0.insert(lookup, entry);
    }

    /// The entry that carries `id`.
    pub fn id(&self, id: IdKey) -> Option<(u64, &T)> {
        self.get(Lookup::Id(id))
    }

    /// The entry at `seq`.
    pub fn seq(&self, seq: u64) -> Option<&T> {
        self.get(Lookup::Seq(seq)).map(|(_, e)| e)
    }

    /// What a lookup found.
    pub fn get(&self, lookup: Lookup) -> Option<(u64, &T)> {
        self.0.get(&lookup)?.as_ref().map(|(seq, e)| (*seq, e.as_ref()))
    }
}

/// What came of a command.
pub struct Decision<E: LogEntity> {
    /// To be appended, in order.
    pub entries: Vec<E::Entry>,
    /// Rows beside the log that must be durable before the reply.
    pub writes: Vec<RowIntent>,
    /// To be done when the entries are durable.
    pub effects: Vec<E::Effect>,
    /// To be told then.
    pub reply: E::Reply,
}

impl<E: LogEntity> Decision<E> {
    /// Nothing changes.
    pub fn reply(reply: E::Reply) -> Self {
        Self { entries: Vec::new(), writes: Vec::new(), effects: Vec::new(), reply }
    }

    /// Entries and a reply.
    pub fn entries(entries: Vec<E::Entry>, reply: E::Reply) -> Self {
        Self { entries, ..Self::reply(reply) }
    }

    /// And this effect.
    #[must_use]
    pub fn effect(mut self, effect: E::Effect) -> Self {
        self.effects.push(effect);
        self
    }
}

/// A row to be written once its stamp is known.
pub type RowIntent = Box<dyn FnOnce(LogKey, Stamp) -> Batch + Send + Sync>;

/// To be done when derived rows are durable.
pub type Then = Box<dyn Fn() + Send + Sync>;

/// What follows from a confirmed state.
#[derive(Default)]
pub struct Derived {
    /// Rows to be written.
    pub rows: Vec<Batch>,
    /// To be done when they are durable.
    pub then: Option<Then>,
}

/// What decisions of an entity may draw on besides its state.
pub struct Now {
    /// The instant of this decision; never before the entity's last entry.
    pub at: Timestamp,
    /// The seq that the next entry will have.
    pub next_seq: u64,
}

/// An entity with a log: a pure core and what to do about its decisions.
pub trait LogEntity: Sized + Send + Sync + 'static {
    /// The fold.
    type State: Send + Sync + 'static;
    /// A line of the log.
    type Entry: Send + Sync + 'static;
    /// What can be asked.
    type Command: Send + Sync + 'static;
    /// What is answered.
    type Reply: Send + Sync + 'static;
    /// What is done outside once entries are durable.
    type Effect: Send + Sync + 'static;

    /// The state of an entity without entries.
    fn fresh(&self, id: &EntityId) -> Self::State;

    /// The command's name, for metrics, logs and parking.
    fn name(command: &Self::Command) -> &'static str;

    /// The id that was made at the door.
    fn command_id(command: &Self::Command) -> CommandId;

    /// What `decide` needs of the past; asked again until nothing new is wanted.
    fn lookups(state: &Self::State, found: &Found<Self::Entry>, command: &Self::Command) -> Vec<Lookup>;

    /// Pure: what the command does to this state.
    fn decide(
        state: &Self::State,
        found: &Found<Self::Entry>,
        command: &Self::Command,
        now: &Now,
    ) -> Result<Decision<Self>, CommandError>;

    /// Pure: the state after an entry at `seq`, which this command made.
    fn apply(state: &mut Self::State, seq: u64, command: CommandId, entry: &Self::Entry);

    /// When the entry was made.
    fn at(entry: &Self::Entry) -> Timestamp;

    /// Ids by which the entry must be found again, for ever.
    fn ids(entry: &Self::Entry, seq: u64) -> Vec<IdKey>;

    /// The entry as stored (and, for conversations, as published).
    fn encode(entry: &Self::Entry, seq: u64) -> Bytes;

    /// The entry as it was stored.
    fn decode(payload: &[u8]) -> Option<Self::Entry>;

    /// The state as a snapshot holds it.
    fn freeze(state: &Self::State) -> Bytes;

    /// The state of a snapshot.
    fn thaw(&self, id: &EntityId, snapshot: &[u8]) -> Option<Self::State>;

    /// Whether nothing is under way outside of which it has still to hear.
    fn may_leave(_: &Self::State) -> bool {
        true
    }

    /// Confirmed entries, to be shown.
    fn publish(&self, id: &EntityId, state: &Self::State, entries: &[(u64, Bytes)]);

    /// Whether its entries are events.
    fn publishes(&self) -> bool {
        false
    }

    /// Confirmed entries of one append in a bucket of its shard, to be published as events.
    fn events(&self, _: &Self::State, _: LogKey, _bucket: Mark, _: &[(u64, Bytes)]) {}

    /// Rows derived from the state, rewritten after entries at leisure.
    fn derived(&self, state: &Self::State, key: LogKey, stamp: Stamp) -> Derived;

    /// After a load, before anything is shown: brings to hand what showing this state looks at.
    fn prepare(&self, _: &Self::State) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// After a load: the effects of a tail entry that may not have been handed on.
    fn replay(state: &Self::State, seq: u64, entry: &Self::Entry) -> Option<Self::Effect>;

    /// After a load: a command to put the house in order.
    fn on_load(&self, state: &Self::State) -> Option<Self::Command>;

    /// When the entity must be woken by a durable timer, whoever owns it then. `armed` is the one that is durable.
    fn timer(state: &Self::State, armed: Option<Timestamp>, now: Timestamp) -> Option<Timestamp>;

    /// When the entity wants a wake-up from memory.
    fn wake_at(state: &Self::State, now: Timestamp) -> Option<Timestamp>;

    /// The command that a wake-up or timer stands for.
    fn wake() -> Self::Command;

    /// What answers a command that asks only how far the log reaches; none: it asks more than that.
    fn reaches(_command: &Self::Command, _seq: u64) -> Option<Self::Reply> {
        None
    }

    /// Whether a command is [`Self::wake`].
    fn is_wake(command: &Self::Command) -> bool;

    /// Whether the entity may be forgotten until its next command.
    fn may_passivate(state: &Self::State) -> bool;

    /// Whether the effect must be done, in order, before its entry counts as settled.
    fn is_handed_on(effect: &Self::Effect) -> bool;

    /// Does it. Must not return before it is done; retries are its own business.
    fn act(&self, id: &EntityId, effect: Self::Effect, me: Handle<Self>) -> impl Future<Output = ()> + Send;
}
