//! Actors without a log: what they know is derived from rows that others write, or dies with the process.
//!
//! Guarantee: an actor is of one reign. Nothing is begun, shown or answered by it but under that reign's lease: while it
//! has lapsed everything waits, and when it is over whatever was not answered is handed back, to be said to the next owner:
//! commands say how something is, so that twice is as good as once.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use patchbay_protocol::CommandError;
use patchbay_protocol::ids::EntityId;
use ractor::{Actor, ActorProcessingErr, ActorRef, ActorRuntime, ActorStatus};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::reply::{Answer, ReplyTo};
use super::{Reign, Shards};

/// Commands in flight per entity.
const IN_FLIGHT_MAX: u32 = 4096;
const RETRY_AFTER_MS: u64 = 250;

/// An entity without a log.
pub trait SoftEntity: Sized + Send + Sync + 'static {
    /// What it knows.
    type State: Send + 'static;
    /// What can be asked.
    type Command: Clone + Send + 'static;
    /// What is answered.
    type Reply: Send + 'static;

    /// Reads what it must know first.
    fn load(
        &self,
        id: &EntityId,
        turn: &Turn<Self>,
    ) -> impl Future<Output = Result<Self::State, CommandError>> + Send;

    /// Answers a command.
    fn handle(
        &self,
        id: &EntityId,
        state: &mut Self::State,
        command: Self::Command,
        turn: &Turn<Self>,
    ) -> impl Future<Output = Result<Self::Reply, CommandError>> + Send;

    /// Whether it may be forgotten.
    fn may_passivate(state: &Self::State) -> bool;
}

/// Whose turn it is: under which reign, and the way to come back to itself.
pub struct Turn<E: SoftEntity> {
    me: ActorRef<Msg<E>>,
    reign: Arc<Reign>,
}

impl<E: SoftEntity> Turn<E> {
    /// Hands the entity a command of its own making after `wait`.
    pub fn after(&self, wait: Duration, command: E::Command) {
        let actor = self.me.clone();
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            // One that is gone has nothing to do.
            let _ = actor.cast(Msg::Command(command, None, None));
        });
    }

    /// Under which reign.
    pub fn reign(&self) -> &Reign {
        &self.reign
    }

    /// Before something is shown or answered: waits while the lease has lapsed.
    ///
    /// # Errors
    /// `unavailable` when the reign is over.
    pub async fn is_held(&self) -> Result<(), CommandError> {
        if self.reign.is_held().await { Ok(()) } else { Err(CommandError::unavailable()) }
    }
}

/// Why a command was not taken.
pub enum Refused<E: SoftEntity> {
    /// Its shard is not served here: it comes back with whom to answer.
    Elsewhere(E::Command, ReplyTo<E::Reply>),
    /// For good; whom to tell.
    Error(CommandError, ReplyTo<E::Reply>),
}

/// Takes back a command that was not answered, with whom to answer.
pub type GiveBack<E> =
    Box<dyn Fn(&EntityId, <E as SoftEntity>::Command, ReplyTo<<E as SoftEntity>::Reply>) + Send + Sync>;

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
    epoch: u32,
    in_flight: Arc<AtomicU32>,
    used: Instant,
}

impl<E: SoftEntity> Slot<E> {
    /// It ends when it has seen to what it was told.
    fn end(&self) {
        // One that has ended needs no asking.
        let _ = self.actor.drain();
    }
}

/// The actors of one kind.
pub struct SoftSlots<E: SoftEntity> {
    entity: Arc<E>,
    shards: Arc<Shards>,
    map: Mutex<HashMap<EntityId, Slot<E>>>,
    give_back: OnceLock<GiveBack<E>>,
    me: Weak<Self>,
}

impl<E: SoftEntity> SoftSlots<E> {
    /// No actors yet.
    pub fn new(entity: E, shards: Arc<Shards>) -> Arc<Self> {
        let (entity, map, give_back) = (Arc::new(entity), Mutex::default(), OnceLock::new());
        Arc::new_cyclic(|me| Self { entity, shards, map, give_back, me: me.clone() })
    }

    /// Who takes commands that came for a shard that is another node's now. Until somebody does they are refused.
    pub fn set_give_back(&self, give_back: GiveBack<E>) {
        let _ = self.give_back.set(give_back);
    }

    /// The shared part.
    pub fn entity(&self) -> &Arc<E> {
        &self.entity
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<EntityId, Slot<E>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a command to an entity here.
    pub fn send(&self, id: &EntityId, command: E::Command) -> Result<Answer<E::Reply>, CommandError> {
        let (reply, answer) = oneshot::channel();
        match self.hand(id, command, reply.into()) {
            Ok(()) => Ok(Answer::from(answer)),
            Err(Refused::Elsewhere(..)) => Err(CommandError::unavailable()),
            Err(Refused::Error(error, _)) => Err(error),
        }
    }

    /// The same, answered to `reply`.
    pub fn hand(
        &self,
        id: &EntityId,
        command: E::Command,
        reply: ReplyTo<E::Reply>,
    ) -> Result<(), Refused<E>> {
        let Some(reign) = self.shards.reign(id.shard(self.shards.count)) else {
            return Err(Refused::Elsewhere(command, reply));
        };
        match self.admit(id, reign) {
            Ok((actor, permit)) => {
                // An actor that ended this instant takes what it is told with it.
                let _ = actor.cast(Msg::Command(command, Some(reply), Some(permit)));
                Ok(())
            }
            Err(error) => Err(Refused::Error(error, reply)),
        }
    }

    fn admit(&self, id: &EntityId, reign: Arc<Reign>) -> Result<(ActorRef<Msg<E>>, Permit), CommandError> {
        let mut map = self.lock();
        let ended =
            |s: &Slot<E>| matches!(s.actor.get_status(), ActorStatus::Stopping | ActorStatus::Stopped);
        if map.get(id).is_none_or(|slot| slot.epoch != reign.epoch() || ended(slot)) {
            let epoch = reign.epoch();
            let actor = SoftActor { entity: self.entity.clone(), reign, slots: self.me.clone() };
            let (actor, _) = ActorRuntime::spawn_instant(None, actor, id.clone())
                .map_err(|_| CommandError::overloaded(RETRY_AFTER_MS))?;
            let slot = Slot { actor, epoch, in_flight: Arc::default(), used: Instant::now() };
            map.insert(id.clone(), slot).inspect(Slot::end);
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

    /// Forgets everybody of a shard that is another node's now, and says who that was. They end when they have given
    /// back whatever they had not begun.
    pub fn close(&self, shard: u32) -> Vec<EntityId> {
        let count = self.shards.count;
        let closed = self.lock().extract_if(|id, _| id.shard(count) == shard).collect::<Vec<_>>();
        closed.iter().for_each(|(_, slot)| slot.end());
        closed.into_iter().map(|(id, _)| id).collect()
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
    reign: Arc<Reign>,
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
                if !self.reign.is_held().await {
                    drop(permit);
                    self.give_back(&at.id, command, reply);
                    return Ok(());
                }
                let again = command.clone();
                let outcome = if reply.as_ref().is_some_and(ReplyTo::is_late) {
                    Some(Err(CommandError::unavailable()))
                } else {
                    // What waits for the store waits no longer than its reign.
                    tokio::select! {
                        biased;
                        outcome = self.answer(&me, at, command) => outcome,
                        () = self.reign.is_over() => None,
                    }
                };
                drop(permit);
                match (outcome, reply) {
                    // Whoever has stopped waiting asks again.
                    (Some(outcome), Some(reply)) => drop(reply.send(outcome)),
                    (Some(_), None) => {}
                    (None, reply) => self.give_back(&at.id, again, reply),
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
    fn give_back(&self, id: &EntityId, command: E::Command, reply: Option<ReplyTo<E::Reply>>) {
        // What it told itself is nothing to its successor.
        let Some(reply) = reply else { return };
        let slots = self.slots.upgrade();
        match slots.as_ref().and_then(|slots| slots.give_back.get()) {
            Some(give_back) => give_back(id, command, reply),
            None => drop(reply.send(Err(CommandError::unavailable()))),
        }
    }

    /// What comes of a command; none: that is for its successor to say, who may know nothing of what was done here.
    async fn answer(
        &self,
        me: &ActorRef<Msg<E>>,
        at: &mut Holding<E>,
        command: E::Command,
    ) -> Option<Result<E::Reply, CommandError>> {
        let turn = Turn { me: me.clone(), reign: self.reign.clone() };
        let loaded = match at.state.take() {
            Some(state) => Ok(state),
            None => self.entity.load(&at.id, &turn).await,
        };
        let outcome = match loaded {
            Ok(mut state) => {
                let outcome = self.entity.handle(&at.id, &mut state, command, &turn).await;
                at.state = Some(state);
                outcome
            }
            Err(error) => Err(error),
        };
        self.reign.is_held().await.then_some(outcome)
    }
}
