//! Actors without a log: what they know is derived from rows that others write, or dies with the process.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use patchbay_protocol::CommandError;
use patchbay_protocol::ids::EntityId;
use ractor::{Actor, ActorProcessingErr, ActorRef, ActorRuntime, ActorStatus};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::slots::{Answer, ReplyTo};

/// Commands in flight per entity.
const IN_FLIGHT_MAX: u32 = 4096;
const RETRY_AFTER_MS: u64 = 250;

/// An entity without a log.
pub trait SoftEntity: Sized + Send + Sync + 'static {
    /// What it knows.
    type State: Send + 'static;
    /// What can be asked.
    type Command: Send + 'static;
    /// What is answered.
    type Reply: Send + 'static;

    /// Reads what it must know first.
    fn load(&self, id: &EntityId) -> impl Future<Output = Result<Self::State, CommandError>> + Send;

    /// Answers a command. `again` hands it another one, now or later.
    fn handle(
        &self,
        id: &EntityId,
        state: &mut Self::State,
        command: Self::Command,
        again: &Again<Self>,
    ) -> impl Future<Output = Result<Self::Reply, CommandError>> + Send;

    /// Whether it may be forgotten.
    fn may_passivate(state: &Self::State) -> bool;
}

/// Hands an entity a command of its own making.
pub struct Again<E: SoftEntity>(ActorRef<Msg<E>>);

impl<E: SoftEntity> Again<E> {
    /// After `wait`.
    pub fn after(&self, wait: Duration, command: E::Command) {
        let actor = self.0.clone();
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            // One that is gone has nothing to do.
            let _ = actor.cast(Msg::Command(command, None, None));
        });
    }
}

struct Permit(Arc<AtomicU32>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Msg<E: SoftEntity> {
    Command(E::Command, Option<ReplyTo<E::Reply>>, Option<Permit>),
    Idle,
}

struct Slot<E: SoftEntity> {
    actor: ActorRef<Msg<E>>,
    in_flight: Arc<AtomicU32>,
    used: Instant,
}

/// The actors of one kind.
pub struct SoftSlots<E: SoftEntity> {
    entity: Arc<E>,
    map: Mutex<HashMap<EntityId, Slot<E>>>,
    me: Weak<Self>,
}

impl<E: SoftEntity> SoftSlots<E> {
    /// No actors yet.
    pub fn new(entity: E) -> Arc<Self> {
        Arc::new_cyclic(|me| Self { entity: Arc::new(entity), map: Mutex::default(), me: me.clone() })
    }

    /// The shared part.
    pub fn entity(&self) -> &Arc<E> {
        &self.entity
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<EntityId, Slot<E>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a command to an entity.
    pub fn send(&self, id: &EntityId, command: E::Command) -> Result<Answer<E::Reply>, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.hand(id, command, reply.into()).map(|()| Answer::from(answer)).map_err(|(error, _)| error)
    }

    /// The same, answered to `reply`; whom to tell when it is refused.
    pub fn hand(
        &self,
        id: &EntityId,
        command: E::Command,
        reply: ReplyTo<E::Reply>,
    ) -> Result<(), (CommandError, ReplyTo<E::Reply>)> {
        match self.admit(id) {
            Ok((actor, permit)) => {
                // An actor that ended this instant takes what it is told with it.
                let _ = actor.cast(Msg::Command(command, Some(reply), Some(permit)));
                Ok(())
            }
            Err(error) => Err((error, reply)),
        }
    }

    fn admit(&self, id: &EntityId) -> Result<(ActorRef<Msg<E>>, Permit), CommandError> {
        let mut map = self.lock();
        let ended =
            |s: &Slot<E>| matches!(s.actor.get_status(), ActorStatus::Stopping | ActorStatus::Stopped);
        if map.get(id).is_none_or(ended) {
            let actor = SoftActor { entity: self.entity.clone(), slots: self.me.clone() };
            let (actor, _) = ActorRuntime::spawn_instant(None, actor, id.clone())
                .map_err(|_| CommandError::overloaded(RETRY_AFTER_MS))?;
            map.insert(id.clone(), Slot { actor, in_flight: Arc::default(), used: Instant::now() });
        }
        let slot = map.get_mut(id).ok_or_else(|| CommandError::overloaded(RETRY_AFTER_MS))?;
        slot.used = Instant::now();
        let below = |n: u32| (n < IN_FLIGHT_MAX).then_some(n + 1);
        if slot.in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below).is_err() {
            return Err(CommandError::overloaded(RETRY_AFTER_MS));
        }
        Ok((slot.actor.clone(), Permit(slot.in_flight.clone())))
    }

    /// Asks everything that was not used for `idle` to end.
    pub fn passivate_idle(&self, idle: Duration) {
        let now = Instant::now();
        for slot in self.lock().values().filter(|s| now.duration_since(s.used) >= idle) {
            let _ = slot.actor.cast(Msg::Idle);
        }
    }

    /// Forgets everybody of a shard that is another node's now, and says who that was. What they are at ends by itself.
    pub fn close(&self, shard: u32, count: u32) -> Vec<EntityId> {
        self.lock().extract_if(|id, _| id.shard(count) == shard).map(|(id, _)| id).collect()
    }

    /// Everybody in memory.
    pub fn active(&self) -> Vec<EntityId> {
        self.lock().keys().cloned().collect()
    }

    fn release(&self, id: &EntityId) -> bool {
        let mut map = self.lock();
        let free = map.get(id).is_some_and(|s| s.in_flight.load(Ordering::Relaxed) == 0);
        if free {
            map.remove(id);
        }
        free
    }
}

struct SoftActor<E: SoftEntity> {
    entity: Arc<E>,
    slots: Weak<SoftSlots<E>>,
}

struct Holding<E: SoftEntity> {
    id: EntityId,
    state: Option<E::State>,
}

impl<E: SoftEntity> Actor for SoftActor<E> {
    type Msg = Msg<E>;
    type State = Holding<E>;
    type Arguments = EntityId;

    async fn pre_start(&self, _: ActorRef<Msg<E>>, id: EntityId) -> Result<Holding<E>, ActorProcessingErr> {
        Ok(Holding { id, state: None })
    }

    async fn handle(
        &self,
        me: ActorRef<Msg<E>>,
        msg: Msg<E>,
        at: &mut Holding<E>,
    ) -> Result<(), ActorProcessingErr> {
        match msg {
            Msg::Command(command, reply, permit) => {
                let outcome = self.answer(&me, at, command).await;
                drop(permit);
                if let Some(reply) = reply {
                    // Whoever has stopped waiting asks again.
                    let _ = reply.send(outcome);
                }
            }
            Msg::Idle => {
                let ready = at.state.as_ref().is_none_or(E::may_passivate);
                if ready && self.slots.upgrade().is_none_or(|s| s.release(&at.id)) {
                    me.stop(Some("idle".into()));
                }
            }
        }
        Ok(())
    }
}

impl<E: SoftEntity> SoftActor<E> {
    async fn answer(
        &self,
        me: &ActorRef<Msg<E>>,
        at: &mut Holding<E>,
        command: E::Command,
    ) -> Result<E::Reply, CommandError> {
        let mut state = match at.state.take() {
            Some(state) => state,
            None => self.entity.load(&at.id).await?,
        };
        let outcome = self.entity.handle(&at.id, &mut state, command, &Again(me.clone())).await;
        at.state = Some(state);
        outcome
    }
}
