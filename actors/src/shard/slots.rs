//! The actors of one kind of entity: activation, admission, supervision, passivation.
//!
//! ractor's mailboxes are unbounded, so admission is ours: at most [`ENTITY_IN_FLIGHT_MAX`] commands per entity and
//! [`SHARD_IN_FLIGHT_MAX`] per shard; past it the caller gets `overloaded` with `retry_after_ms`.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use patchbay_protocol::CommandError;
use patchbay_protocol::ids::EntityId;
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, ActorRuntime, SupervisionEvent};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::entity::LogEntity;
use super::log_actor::{LogActor, Msg, Queued};
use super::reply::{Answer, ReplyTo};
use super::{Reign, Shards};

/// Commands in flight per entity.
pub const ENTITY_IN_FLIGHT_MAX: u32 = 512;
/// Commands in flight per shard.
pub const SHARD_IN_FLIGHT_MAX: u32 = 8192;
/// Entities of one kind in memory.
pub const ACTIVE_MAX: usize = 2_000_000;
/// What a caller past a bound is told to wait.
const RETRY_AFTER_MS: u64 = 250;
/// Failures in a row after which an entity is left alone for [`LONG_PAUSE`].
pub const FAILURES_MAX: u32 = 5;
/// How long that is; also how long an activation must last for its failure to be the first again.
pub const LONG_PAUSE: Duration = Duration::from_secs(60);

/// Why a command was not taken.
pub enum Refused<E: LogEntity> {
    /// Its shard is another node's, or about to be: it comes back with whom to answer.
    Elsewhere(E::Command, ReplyTo<E::Reply>),
    /// For good; whom to tell.
    Error(CommandError, ReplyTo<E::Reply>),
}

/// A place among the commands in flight.
pub struct Permit(Arc<AtomicU32>, Arc<AtomicU32>);

impl Permit {
    fn take(entity: &Arc<AtomicU32>, shard: &Arc<AtomicU32>) -> Option<Self> {
        let below = |max: u32| move |n: u32| (n < max).then_some(n + 1);
        entity.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below(ENTITY_IN_FLIGHT_MAX)).ok()?;
        if shard.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below(SHARD_IN_FLIGHT_MAX)).is_err() {
            entity.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Self(entity.clone(), shard.clone()))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
        self.1.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Slot<E: LogEntity> {
    Active(Active<E>),
    Resting { until: Instant, failures: u32 },
}

struct Active<E: LogEntity> {
    id: EntityId,
    actor: ActorRef<Msg<E>>,
    in_flight: Arc<AtomicU32>,
    since: Instant,
    used: Instant,
    /// In a row before this activation.
    failures: u32,
}

impl<E: LogEntity> Active<E> {
    /// Asks it to make itself ready to be forgotten, unless it has something to do.
    fn rest(&self) {
        if self.in_flight.load(Ordering::Relaxed) == 0 {
            // One that has just ended needs no asking.
            let _ = self.actor.cast(Msg::Idle);
        }
    }
}

struct Map<E: LogEntity> {
    slots: HashMap<[u8; 16], Slot<E>>,
    by_actor: HashMap<ActorId, [u8; 16]>,
    /// Who is active, by shard.
    active: Vec<HashSet<[u8; 16]>>,
    /// Held by an append under way: an actor that was lost may have left one behind.
    gates: HashMap<[u8; 16], Weak<tokio::sync::Mutex<()>>>,
}

/// Takes back a command that was not decided, with whom to answer.
pub type GiveBack<E> =
    Box<dyn Fn(&EntityId, <E as LogEntity>::Command, ReplyTo<<E as LogEntity>::Reply>) + Send + Sync>;

impl<E: LogEntity> Map<E> {
    fn remove(&mut self, key: [u8; 16], count: u32) {
        if let Some(Slot::Active(active)) = self.slots.remove(&key) {
            self.active[active.id.shard(count) as usize].remove(&key);
        }
    }

    fn active_in(&self, shard: u32) -> impl Iterator<Item = &Active<E>> {
        let keys = self.active.get(shard as usize).into_iter().flatten();
        keys.filter_map(|key| match self.slots.get(key) {
            Some(Slot::Active(active)) => Some(active),
            Some(Slot::Resting { .. }) | None => None,
        })
    }

    fn active(&self) -> impl Iterator<Item = &Active<E>> {
        self.slots.values().filter_map(|slot| match slot {
            Slot::Active(active) => Some(active),
            Slot::Resting { .. } => None,
        })
    }
}

/// The actors of one kind of entity.
pub struct Slots<E: LogEntity> {
    entity: Arc<E>,
    shards: Arc<Shards>,
    map: Mutex<Map<E>>,
    shard_load: Vec<Arc<AtomicU32>>,
    /// Shards that take nothing new.
    closed: Vec<AtomicBool>,
    give_back: OnceLock<GiveBack<E>>,
    supervisor: OnceLock<ActorCell>,
    me: Weak<Self>,
}

impl<E: LogEntity> Slots<E> {
    /// No actors yet, under a supervisor of their own.
    pub async fn start(entity: E, shards: Arc<Shards>) -> Result<Arc<Self>, ractor::SpawnErr> {
        let shard_load = (0..shards.count).map(|_| Arc::default()).collect();
        let active = vec![HashSet::new(); shards.count as usize];
        let map = Map { slots: HashMap::new(), by_actor: HashMap::new(), active, gates: HashMap::new() };
        let (entity, map, supervisor) = (Arc::new(entity), Mutex::new(map), OnceLock::new());
        let closed = (0..shards.count).map(|_| AtomicBool::new(false)).collect();
        let slots = Arc::new_cyclic(|me| Self {
            entity,
            shards,
            map,
            shard_load,
            closed,
            give_back: OnceLock::new(),
            supervisor,
            me: me.clone(),
        });
        let (supervisor, _) = Actor::spawn(None, Supervisor(Arc::downgrade(&slots)), ()).await?;
        // Set once, here.
        let _ = slots.supervisor.set(supervisor.get_cell());
        Ok(slots)
    }

    /// The shared part of the entities.
    pub fn entity(&self) -> &Arc<E> {
        &self.entity
    }

    fn lock(&self) -> MutexGuard<'_, Map<E>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who takes commands that came for a shard that is another node's now. Until somebody does they are refused.
    pub fn set_give_back(&self, give_back: GiveBack<E>) {
        let _ = self.give_back.set(give_back);
    }

    pub(super) fn give_back(&self, id: &EntityId, queued: Queued<E>) {
        let Queued { command, reply, permit, .. } = queued;
        drop(permit);
        // What it told itself is told again by its log.
        let Some(reply) = reply else { return };
        match self.give_back.get() {
            Some(give_back) => give_back(id, command, reply),
            None => drop(reply.send(Err(CommandError::unavailable()))),
        }
    }

    /// Takes nothing new for a shard, and asks everybody there to end.
    pub fn close(&self, shard: u32) {
        let map = self.lock();
        if let Some(closed) = self.closed.get(shard as usize) {
            closed.store(true, Ordering::Release);
        }
        for active in map.active_in(shard) {
            let _ = active.actor.cast(Msg::Leave);
        }
    }

    /// Takes commands for a shard again.
    pub fn reopen(&self, shard: u32) {
        let mut map = self.lock();
        // Whoever rested under an earlier reign has nothing to do with this one.
        let before = map.active.get_mut(shard as usize).map(std::mem::take).unwrap_or_default();
        for key in before {
            if let Some(Slot::Active(_)) = map.slots.get(&key) {
                map.slots.remove(&key);
            }
        }
        if let Some(closed) = self.closed.get(shard as usize) {
            closed.store(false, Ordering::Release);
        }
    }

    /// How many are active in a shard.
    pub fn active_in(&self, shard: u32) -> usize {
        self.lock().active.get(shard as usize).map_or(0, HashSet::len)
    }

    /// Who is active in a shard.
    pub fn ids_in(&self, shard: u32) -> Vec<EntityId> {
        self.lock().active_in(shard).map(|active| active.id.clone()).collect()
    }

    /// Whether any of those has an append under way, or may begin one.
    pub fn acts_in(&self, reign: &Reign) -> bool {
        let map = self.lock();
        map.active.get(reign.shard as usize).is_some_and(|keys| keys.iter().any(|key| !reign.is_resting(key)))
    }

    /// An actor ends because its shard is another node's.
    pub(super) fn left(&self, key: [u8; 16], actor: ActorId) {
        let mut map = self.lock();
        if matches!(map.slots.get(&key), Some(Slot::Active(a)) if a.actor.get_id() == actor) {
            map.remove(key, self.shards.count);
            map.gates.remove(&key);
        }
    }

    /// Hands a command to an entity, in order with every other command handed to it by the same caller. Returns at
    /// once; the answer comes when everything that it speaks of is durable.
    pub fn send(&self, id: &EntityId, command: E::Command) -> Result<Answer<E::Reply>, CommandError> {
        let (reply, answer) = oneshot::channel();
        match self.hand(id, command, reply.into()) {
            Ok(()) => Ok(answer.into()),
            Err(Refused::Elsewhere(..)) => Err(CommandError::unavailable()),
            Err(Refused::Error(error, _)) => Err(error),
        }
    }

    /// The same, answered to `reply`; what is not for this node comes back.
    pub fn hand(
        &self,
        id: &EntityId,
        command: E::Command,
        reply: ReplyTo<E::Reply>,
    ) -> Result<(), Refused<E>> {
        let shard = id.shard(self.shards.count);
        let mut map = self.lock();
        if self.closed[shard as usize].load(Ordering::Acquire) {
            return Err(Refused::Elsewhere(command, reply));
        }
        let is_new = !matches!(map.slots.get(&id.key()), Some(Slot::Active(_)));
        let reign = if is_new { self.shards.reign(shard) } else { None };
        if is_new && reign.is_none() {
            return Err(Refused::Elsewhere(command, reply));
        }
        let (actor, permit) = match self.admit(&mut map, id, shard, reign) {
            Ok(admitted) => admitted,
            Err(error) => return Err(Refused::Error(error, reply)),
        };
        let queued = Box::new(Queued { command, reply: Some(reply), permit: Some(permit), failures: 0 });
        // An actor that ended this instant takes what it is told with it: its caller hears that nobody knows.
        let _ = actor.cast(Msg::Command(queued));
        Ok(())
    }

    /// A place among the commands in flight of an entity, who is activated if it is not there.
    fn admit(
        &self,
        map: &mut Map<E>,
        id: &EntityId,
        shard: u32,
        reign: Option<Arc<Reign>>,
    ) -> Result<(ActorRef<Msg<E>>, Permit), CommandError> {
        let load = &self.shard_load[shard as usize];
        let overloaded = || {
            metrics::counter!("patchbay_actors_overloaded_total", "kind" => id.kind()).increment(1);
            CommandError::overloaded(RETRY_AFTER_MS)
        };
        if reign.is_some() && (load.load(Ordering::Relaxed) >= SHARD_IN_FLIGHT_MAX || !self.may_grow(map)) {
            return Err(overloaded());
        }
        let (actor, in_flight) = self.activate(map, id, id.key(), reign)?;
        let permit = Permit::take(&in_flight, load).ok_or_else(overloaded)?;
        Ok((actor, permit))
    }

    /// Whether another entity may become active: not past [`ACTIVE_MAX`], nor while memory is short for good.
    fn may_grow(&self, map: &Map<E>) -> bool {
        map.slots.len() < ACTIVE_MAX && !self.shards.crowded.load(Ordering::Relaxed)
    }

    fn activate(
        &self,
        map: &mut Map<E>,
        id: &EntityId,
        key: [u8; 16],
        reign: Option<Arc<Reign>>,
    ) -> Result<(ActorRef<Msg<E>>, Arc<AtomicU32>), CommandError> {
        let now = Instant::now();
        let failures = match map.slots.get_mut(&key) {
            Some(Slot::Active(active)) => {
                active.used = now;
                return Ok((active.actor.clone(), active.in_flight.clone()));
            }
            Some(Slot::Resting { until, .. }) if now < *until => {
                let wait = until.duration_since(now).as_millis();
                return Err(CommandError::overloaded(u64::try_from(wait).unwrap_or(RETRY_AFTER_MS).max(1)));
            }
            Some(Slot::Resting { failures, .. }) => *failures,
            None => 0,
        };
        let reign = reign.ok_or_else(CommandError::unavailable)?;
        let gate = map.gates.get(&key).and_then(Weak::upgrade).unwrap_or_default();
        map.gates.insert(key, Arc::downgrade(&gate));
        let supervisor = self.supervisor.get().ok_or_else(|| CommandError::overloaded(RETRY_AFTER_MS))?;
        let args = (id.clone(), reign, gate);
        let actor =
            LogActor { entity: self.entity.clone(), shards: self.shards.clone(), slots: self.me.clone() };
        // Without a name nothing can be taken already.
        let (actor, _) = ActorRuntime::spawn_linked_instant(None, actor, args, supervisor.clone())
            .map_err(|_| CommandError::overloaded(RETRY_AFTER_MS))?;
        let in_flight = Arc::default();
        map.by_actor.insert(actor.get_id(), key);
        let active = Active {
            id: id.clone(),
            actor: actor.clone(),
            in_flight: Arc::clone(&in_flight),
            since: now,
            used: now,
            failures,
        };
        map.slots.insert(key, Slot::Active(active));
        map.active[id.shard(self.shards.count) as usize].insert(key);
        Ok((actor, in_flight))
    }

    /// Takes nothing new for any shard, and asks everybody to end.
    pub fn close_all(&self) {
        let map = self.lock();
        self.closed.iter().for_each(|closed| closed.store(true, Ordering::Release));
        for active in map.active() {
            let _ = active.actor.cast(Msg::Leave);
        }
    }

    /// Asks everything that was not used for `idle` to make itself ready to be forgotten.
    pub fn passivate_idle(&self, idle: Duration) {
        let now = Instant::now();
        let map = self.lock();
        map.active().filter(|active| now.duration_since(active.used) >= idle).for_each(Active::rest);
    }

    /// Asks everything of a shard that was not used for `quiet` to make itself ready to be forgotten; how many that are.
    pub fn passivate_in(&self, shard: u32, quiet: Duration) -> usize {
        let now = Instant::now();
        let map = self.lock();
        let asked = map.active_in(shard).filter(|active| now.duration_since(active.used) >= quiet);
        asked.inspect(|active| active.rest()).count()
    }

    /// Lets go of an entity that is ready, unless a command came in the meantime. What was sent before this under
    /// the same lock is in the mailbox; so with nothing in flight nothing is lost.
    pub(super) fn release(&self, key: [u8; 16], actor: ActorId) -> bool {
        let mut map = self.lock();
        match map.slots.get(&key) {
            Some(Slot::Active(a))
                if a.actor.get_id() == actor && a.in_flight.load(Ordering::Relaxed) == 0 => {}
            _ => return false,
        }
        map.remove(key, self.shards.count);
        map.gates.remove(&key);
        true
    }

    /// Who is active.
    pub fn active(&self) -> Vec<EntityId> {
        let map = self.lock();
        let ids = map.slots.values().filter_map(|s| match s {
            Slot::Active(active) => Some(active.id.clone()),
            Slot::Resting { .. } => None,
        });
        ids.collect()
    }

    /// Whether this one is.
    pub fn is_active(&self, key: &[u8; 16]) -> bool {
        matches!(self.lock().slots.get(key), Some(Slot::Active(_)))
    }

    /// How many are active.
    pub fn active_count(&self) -> usize {
        self.lock().slots.values().filter(|s| matches!(s, Slot::Active(_))).count()
    }

    fn ended(&self, actor: &ActorCell, failed: bool) {
        let mut map = self.lock();
        let Some(key) = map.by_actor.remove(&actor.get_id()) else { return };

        let Some(Slot::Active(active)) = map.slots.get(&key) else { return };
        if active.actor.get_id() != actor.get_id() {
            return;
        }
        if failed {
            // One that ran well for a while before has a clean record.
            let before = if active.since.elapsed() >= LONG_PAUSE { 0 } else { active.failures };
            let failures = before + 1;
            let id = active.id.clone();
            map.remove(key, self.shards.count);
            let pause = if failures >= FAILURES_MAX {
                LONG_PAUSE
            } else {
                Duration::from_millis(50 << failures.min(6))
            };
            map.slots.insert(key, Slot::Resting { until: Instant::now() + pause, failures });
            let slots = self.me.clone();
            tokio::spawn(async move {
                tokio::time::sleep(pause + Duration::from_millis(1)).await;
                if let Some(slots) = slots.upgrade() {
                    // What it had begun goes on; whoever asks first does as well.
                    let _ = slots.send(&id, E::wake());
                }
            });
        } else {
            map.remove(key, self.shards.count);
        }
    }
}

/// Watches the actors of one kind: an actor that failed rests, longer each time, and comes back with its next command.
struct Supervisor<E: LogEntity>(Weak<Slots<E>>);

impl<E: LogEntity> Actor for Supervisor<E> {
    type Msg = ();
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<()>,
        event: SupervisionEvent,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        let Some(slots) = self.0.upgrade() else { return Ok(()) };
        match event {
            SupervisionEvent::ActorFailed(cell, error) => {
                metrics::counter!("patchbay_actors_failures_total").increment(1);
                tracing::error!(%error, "an actor failed; it rests and comes back with its next command");
                slots.ended(&cell, true);
            }
            SupervisionEvent::ActorTerminated(cell, ..) => slots.ended(&cell, false),
            SupervisionEvent::ActorStarted(_) | SupervisionEvent::ProcessGroupChanged(_) => {}
        }
        Ok(())
    }
}
