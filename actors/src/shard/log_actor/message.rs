//! What an entity's actor is told, and how its effects speak to it.

use std::sync::Arc;

use patchbay_storage::WriteError;
use patchbay_storage::log::LogKey;
use ractor::ActorRef;

use crate::shard::entity::LogEntity;
use crate::shard::reply::ReplyTo;
use crate::shard::slots::Permit;
use crate::shard::{Reign, Shards};

/// A command with whom to answer and the place that it holds.
pub struct Queued<E: LogEntity> {
    pub(in crate::shard) command: E::Command,
    pub(in crate::shard) reply: Option<ReplyTo<E::Reply>>,
    pub(in crate::shard) permit: Option<Permit>,
    pub(in crate::shard) failures: u32,
}

impl<E: LogEntity> Queued<E> {
    /// A command of the entity's own, for which nobody waits.
    pub(super) fn own(command: E::Command) -> Box<Self> {
        Box::new(Self { command, reply: None, permit: None, failures: 0 })
    }
}

/// A look at a state.
pub type Look<S> = Box<dyn FnOnce(&S) + Send + Sync>;

/// What an entity's actor is told.
pub enum Msg<E: LogEntity> {
    /// A command.
    Command(Box<Queued<E>>),
    /// The append under way was answered.
    Appended(Result<(), WriteError>),
    /// Derived rows up to this seq are durable, by that derivation.
    Derived {
        /// Which derivation.
        derivation: u64,
        /// Up to where.
        seq: u64,
    },
    /// It is time to write derived rows again.
    DeriveDue,
    /// It is time to try again what could not be done.
    Again,
    /// What was asked before something was refused has been refused as well.
    Refused,
    /// Nobody is waited for any longer who might go out with the next append.
    Gathered,
    /// The effect of this seq is done.
    HandedOn(u64),
    /// A wake-up from memory.
    Wake,
    /// Nobody has asked for a while.
    Idle,
    /// Its shard goes to another node.
    Leave,
    /// An effect wants to see the state.
    Peek(Look<E::State>),
}

/// How an entity's effects speak to it and to the store.
pub struct Handle<E: LogEntity> {
    pub(super) actor: ActorRef<Msg<E>>,
    pub(super) shards: Arc<Shards>,
    pub(super) key: LogKey,
    pub(super) reign: Arc<Reign>,
}

impl<E: LogEntity> Clone for Handle<E> {
    fn clone(&self) -> Self {
        Self {
            actor: self.actor.clone(),
            shards: self.shards.clone(),
            key: self.key,
            reign: self.reign.clone(),
        }
    }
}

impl<E: LogEntity> Handle<E> {
    /// Tells the entity something, past the bounds of admission: only as much as it has itself begun.
    pub fn tell(&self, command: E::Command) {
        // An actor that is gone finds what it needs in its log.
        let _ = self.actor.cast(Msg::Command(Queued::own(command)));
    }

    /// Shows the entity's state to `look`; drops it when the entity is not there.
    pub fn peek(&self, look: impl FnOnce(&E::State) + Send + Sync + 'static) {
        let _ = self.actor.cast(Msg::Peek(Box::new(look)));
    }

    /// Whether the actor that this speaks to has ended: what it began goes on under the next one, from the log.
    pub fn has_ended(&self) -> bool {
        matches!(self.actor.get_status(), ractor::ActorStatus::Stopping | ractor::ActorStatus::Stopped)
    }

    /// Whether something new may be begun outside: the lease is held at this instant, and the shard stays.
    pub fn may_begin(&self) -> bool {
        self.reign.is_held_now() && !self.reign.is_winding_up()
    }

    /// What the node's entities share.
    pub fn shards(&self) -> &Arc<Shards> {
        &self.shards
    }

    /// The entity's own log.
    pub fn key(&self) -> LogKey {
        self.key
    }
}
