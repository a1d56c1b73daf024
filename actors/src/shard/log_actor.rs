//! The loop around every entity with a log: load, decide, append, apply, act.
//!
//! While an append is under way commands wait; when it is answered they are decided one after another on the working
//! state and go out as one append of at most 64 rows. Replies, publications and effects of an append come after its
//! answer. A refused append throws the working state away: it is loaded again from the store.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::future::join_all;
use patchbay_protocol::ids::{CommandId, EntityId};
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use patchbay_storage::log::{APPEND_ROWS_MAX, AdoptError, Append, LogKey, Snapshot, entry_hash};
use patchbay_storage::tables::{Activity, IdKey, Tables, Timer, hour_of};
use patchbay_storage::{Batch, ReadError, WriteError};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::{Mutex, oneshot};

use super::Shards;
use super::activity::Ticket;
use super::entity::{Decision, Found, LogEntity, Lookup, Now, RowIntent};
use super::filter::Filter;
use super::slots::Slots;

/// Derived rows are written at most this often per entity.
const DERIVE_PAUSE: Duration = Duration::from_millis(250);
/// A snapshot is written after so many entries, or more when the filter is large.
const SNAPSHOT_ENTRIES: u64 = 128;
/// A command that panics this often is parked.
const POISON_TRIES: u32 = 3;
/// Times in a row that an entity is loaded anew of its own accord.
const CHILLS_MAX: u32 = 8;
/// Between two tries of what the store did not answer.
const RELOAD_PAUSE: Duration = Duration::from_millis(500);
/// Times that a lookup may ask for more.
const LOOKUP_ROUNDS: usize = 4;

/// A command with whom to answer and the place that it holds.
pub struct Queued<E: LogEntity> {
    pub(super) command: E::Command,
    pub(super) reply: Option<oneshot::Sender<Result<E::Reply, CommandError>>>,
    pub(super) permit: Option<super::slots::Permit>,
    pub(super) failures: u32,
}

/// A look at a state.
pub type Look<S> = Box<dyn FnOnce(&S) + Send + Sync>;

/// What an entity's actor is told.
pub enum Msg<E: LogEntity> {
    /// A command.
    Command(Queued<E>),
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
    /// The effect of this seq is done.
    HandedOn(u64),
    /// A wake-up from memory.
    Wake,
    /// Nobody has asked for a while.
    Idle,
    /// An effect wants to see the state.
    Peek(Look<E::State>),
}

/// How an entity's effects speak to it and to the store.
pub struct Handle<E: LogEntity> {
    actor: ActorRef<Msg<E>>,
    shards: Arc<Shards>,
    key: LogKey,
}

impl<E: LogEntity> Clone for Handle<E> {
    fn clone(&self) -> Self {
        Self { actor: self.actor.clone(), shards: self.shards.clone(), key: self.key }
    }
}

impl<E: LogEntity> Handle<E> {
    /// Tells the entity something, past the bounds of admission: only as much as it has itself begun.
    pub fn tell(&self, command: E::Command) {
        // An actor that is gone finds what it needs in its log.
        let _ = self.actor.cast(Msg::Command(Queued { command, reply: None, permit: None, failures: 0 }));
    }

    /// Shows the entity's state to `look`; drops it when the entity is not there.
    pub fn peek(&self, look: impl FnOnce(&E::State) + Send + Sync + 'static) {
        let _ = self.actor.cast(Msg::Peek(Box::new(look)));
    }

    /// Whether the actor that this speaks to has ended: what it began goes on under the next one, from the log.
    pub fn has_ended(&self) -> bool {
        matches!(self.actor.get_status(), ractor::ActorStatus::Stopping | ractor::ActorStatus::Stopped)
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

/// The actor.
pub struct LogActor<E: LogEntity> {
    pub(super) entity: Arc<E>,
    pub(super) shards: Arc<Shards>,
    pub(super) slots: Weak<Slots<E>>,
}

/// What a loaded entity holds.
struct Live<E: LogEntity> {
    state: E::State,
    /// The last seq of the working state.
    last: u64,
    /// The last seq that is durable.
    confirmed: u64,
    /// When the last entry was made.
    at: Timestamp,
    /// Derived rows up to here are durable.
    derived: u64,
    /// Every id ever seen.
    filter: Filter,
    /// Entries above `derived`, and their ids.
    recent: BTreeMap<u64, Arc<E::Entry>>,
    recent_ids: HashMap<IdKey, u64>,
    snapshot_seq: u64,
    /// The hash and size of the last entry, for the snapshot.
    last_hash: [u8; 16],
    armed: Option<Timestamp>,
}

enum Phase<E: LogEntity> {
    Cold,
    Live(Box<Live<E>>),
    Parked(String),
}

type Outcome<E> = Result<<E as LogEntity>::Reply, CommandError>;

struct InFlight<E: LogEntity> {
    answers: Vec<(Queued<E>, Outcome<E>)>,
    effects: Vec<(u64, E::Effect)>,
    rows: Vec<(u64, Bytes)>,
    last: u64,
    ticket: Option<Ticket>,
    timer: Option<Timestamp>,
}

/// The actor's own state.
pub struct Loop<E: LogEntity> {
    id: EntityId,
    key: LogKey,
    gate: Arc<Mutex<()>>,
    phase: Phase<E>,
    queue: VecDeque<Queued<E>>,
    in_flight: Option<InFlight<E>>,
    derive: Derive,
    /// The snapshot of what is being derived, written when that is durable, and what is to be told then.
    frozen: Option<Frozen>,
    /// Appends that are not settled yet.
    tickets: VecDeque<(u64, Ticket)>,
    /// Effects that must be done in order, and whether one is under way.
    ordered: VecDeque<(u64, E::Effect)>,
    acting: Option<u64>,
    wake_armed: Option<Alarm>,
    /// Times in a row that the working state was thrown away.
    chills: u32,
    /// Which derivation is under way.
    derivation: u64,
}

/// A wake-up that is armed; dropping it disarms it.
struct Alarm {
    at: Timestamp,
    task: tokio::task::AbortHandle,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What waits for derived rows to be durable.
struct Frozen {
    snapshot: Option<Snapshot>,
    then: Option<super::entity::Then>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Derive {
    /// Nothing to write.
    Clean,
    /// Waiting for the pause to pass.
    Waiting,
    /// The pause has passed; the next confirmed state is written.
    Due,
    /// Being written.
    Writing { again: bool },
}

impl<E: LogEntity> Actor for LogActor<E> {
    type Msg = Msg<E>;
    type State = Loop<E>;
    type Arguments = (EntityId, Arc<Mutex<()>>);

    async fn pre_start(
        &self,
        _: ActorRef<Msg<E>>,
        (id, gate): Self::Arguments,
    ) -> Result<Loop<E>, ActorProcessingErr> {
        let key = LogKey { entity: id.key(), shard: id.shard(self.shards.count) };
        Ok(Loop {
            id,
            key,
            gate,
            phase: Phase::Cold,
            queue: VecDeque::new(),
            in_flight: None,
            derive: Derive::Clean,
            frozen: None,
            tickets: VecDeque::new(),
            ordered: VecDeque::new(),
            acting: None,
            wake_armed: None,
            chills: 0,
            derivation: 0,
        })
    }

    async fn handle(
        &self,
        me: ActorRef<Msg<E>>,
        msg: Msg<E>,
        at: &mut Loop<E>,
    ) -> Result<(), ActorProcessingErr> {
        match msg {
            Msg::Command(queued) => at.queue.push_back(queued),
            Msg::Appended(result) => self.appended(&me, at, result).await,
            Msg::Derived { derivation, seq } if derivation == at.derivation => self.derived(&me, at, seq),
            // Of a state that was thrown away since.
            Msg::Derived { .. } => {}
            Msg::DeriveDue => {
                if at.derive == Derive::Waiting {
                    at.derive = Derive::Due;
                }
                self.derive_if_due(&me, at);
            }
            Msg::HandedOn(seq) => {
                if at.acting == Some(seq) {
                    at.acting = None;
                    self.act_next(&me, at);
                    settle(at);
                }
            }
            Msg::Wake => {
                at.wake_armed = None;
                at.queue.push_back(Queued { command: E::wake(), reply: None, permit: None, failures: 0 });
            }
            Msg::Peek(look) => {
                // An entity that is not loaded has nothing to show: dropping the question says so.
                if let Phase::Live(live) = &at.phase {
                    look(&live.state);
                    return Ok(());
                }
                // Somebody waits for it to be there.
                if at.chills <= CHILLS_MAX && at.queue.is_empty() {
                    at.queue.push_back(Queued { command: E::wake(), reply: None, permit: None, failures: 0 });
                }
            }
            Msg::Idle => {
                self.idle(&me, at).await;
                return Ok(());
            }
        }
        self.pump(&me, at).await;
        self.arm_wake(&me, at);
        Ok(())
    }
}

impl<E: LogEntity> LogActor<E> {
    fn handle_of(&self, me: &ActorRef<Msg<E>>, key: LogKey) -> Handle<E> {
        Handle { actor: me.clone(), shards: self.shards.clone(), key }
    }

    /// Decides what waits, unless an append is under way.
    async fn pump(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        while at.in_flight.is_none() && !at.queue.is_empty() {
            if !self.ready(me, at).await {
                return;
            }
            self.decide_batch(me, at).await;
        }
    }

    /// Loads the entity if that is needed. False: what waited was refused.
    async fn ready(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) -> bool {
        if let Phase::Cold = at.phase {
            let loaded = self.load(me, at).await;
            match loaded {
                Ok(live) => at.phase = Phase::Live(Box::new(live)),
                Err(AdoptError::Unavailable) => {
                    refuse_all(at, &CommandError::unavailable());
                    // What it gave itself is tried again: nobody else would.
                    let me = me.clone();
                    tokio::spawn(async move {
                        tokio::time::sleep(RELOAD_PAUSE).await;
                        let _ = me.cast(Msg::Wake);
                    });
                    return false;
                }
                Err(AdoptError::Damaged(seq)) => {
                    let reason = format!("damaged at seq {seq}");
                    self.park(at, &reason).await;
                    at.phase = Phase::Parked(reason);
                }
            }
        }
        if let Phase::Parked(reason) = &at.phase {
            let e = CommandError::with(
                ErrorCode::Unavailable,
                serde_json::json!({"detail": format!("parked: {reason}")}),
            );
            refuse_all(at, &e);
            at.queue.clear();
            return false;
        }
        true
    }

    async fn park(&self, at: &Loop<E>, reason: &str) {
        metrics::counter!("patchbay_actors_parked_total", "kind" => at.id.kind()).increment(1);
        tracing::error!(kind = at.id.kind(), shard = at.key.shard, reason, "an entity is parked");
        if let Ok(stamp) = self.shards.stamps[at.key.shard as usize].next() {
            self.shards
                .logs
                .write_until_answered(Tables::park_write(at.key.shard, stamp, &at.id, reason))
                .await;
        }
    }

    /// Reads the snapshot and what stands above it; writes again what nobody had confirmed.
    async fn load(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) -> Result<Live<E>, AdoptError> {
        // An append that a lost actor left behind is answered first.
        let _gate = at.gate.clone().lock_owned().await;
        let logs = &self.shards.logs;
        let snapshot = logs.snapshot(at.key).await?;
        let base = snapshot.as_ref().map_or(0, |s| s.seq);
        let (mut state, filter, made) = match &snapshot {
            None => (self.entity.fresh(&at.id), Filter::default(), Timestamp::default()),
            Some(s) => self.thaw(&at.id, s).ok_or(AdoptError::Damaged(s.seq))?,
        };
        let tail = logs.tail(at.key, base).await?;
        let adopted = tail.rows.last().map_or(base, |r| r.seq);
        let stamps = &self.shards.stamps[at.key.shard as usize];
        let ticket = (adopted > base).then(|| self.shards.activity.begin(at.key.shard, at.key.entity));
        if let Some(ticket) = &ticket {
            // The successor of a crash here must find this entity again.
            let activity = Activity { entity: at.id.clone(), lowest: base + 1 };
            let stamp = stamps.next().map_err(|_| AdoptError::Unavailable)?;
            logs.write_until_answered(Tables::activity_write(at.key.shard, ticket.bucket, stamp, &activity))
                .await;
            ticket.row_written();
            if adopted > tail.confirmed {
                let stamp = stamps.next().map_err(|_| AdoptError::Unavailable)?;
                logs.rewrite(at.key, stamp, &tail).await?;
            }
        }
        let mut live = Live {
            last: adopted,
            confirmed: adopted,
            at: made,
            derived: base,
            filter,
            recent: BTreeMap::new(),
            recent_ids: HashMap::new(),
            snapshot_seq: base,
            last_hash: snapshot.map_or([0; 16], |s| s.entry_hash),
            armed: None,
            state: self.entity.fresh(&at.id),
        };
        for row in &tail.rows {
            let entry = E::decode(&row.payload).ok_or(AdoptError::Damaged(row.seq))?;
            E::apply(&mut state, row.seq, &entry);
            live.remember(row.seq, Arc::new(entry), &row.payload);
        }
        live.state = state;
        at.tickets.extend(ticket.map(|t| (adopted, t)));
        self.resume(me, at, &live);
        Ok(live)
    }

    fn thaw(&self, id: &EntityId, snapshot: &Snapshot) -> Option<(E::State, Filter, Timestamp)> {
        let mut from = snapshot.state.clone();
        let made = Timestamp::from_millis(from.try_get_i64().ok()?);
        let filter = Filter::decode(&mut from)?;
        Some((self.entity.thaw(id, &from)?, filter, made))
    }

    /// After a load: what an earlier owner may not have shown, derived or handed on.
    fn resume(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>, live: &Live<E>) {
        at.ordered = live
            .recent
            .iter()
            .filter_map(|(seq, e)| E::replay(&live.state, *seq, e).map(|f| (*seq, f)))
            .collect();
        at.acting = None;
        self.act_next(me, at);
        if at.chills <= CHILLS_MAX
            && let Some(command) = self.entity.on_load(&live.state)
        {
            at.queue.push_front(Queued { command, reply: None, permit: None, failures: 0 });
        }
        if live.confirmed > live.derived {
            at.derive = Derive::Waiting;
            let _ = me.cast(Msg::DeriveDue);
        }
    }

    async fn decide_batch(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        let mut batch = InFlight {
            answers: Vec::new(),
            effects: Vec::new(),
            rows: Vec::new(),
            last: 0,
            ticket: None,
            timer: None,
        };
        let mut intents: Vec<RowIntent> = Vec::new();
        let mut payloads: Vec<(CommandId, Bytes)> = Vec::new();
        while let Some(queued) = at.queue.pop_front() {
            let Phase::Live(live) = &mut at.phase else { return };
            let found = match self.look_up(at.key, live, &queued.command).await {
                Ok(found) => found,
                Err(_) => {
                    batch.answers.push((queued, Err(CommandError::unavailable())));
                    continue;
                }
            };
            let now = Now { at: self.shards.clock.now().max(live.at), next_seq: live.last + 1 };
            let room = APPEND_ROWS_MAX - payloads.len();
            let decided = catch_unwind(AssertUnwindSafe(|| {
                let decision = E::decide(&live.state, &found, &queued.command, &now);
                if decision.as_ref().is_ok_and(|d| d.entries.len() > room) {
                    return None;
                }
                Some(decision.map(|d| live.take(d, &queued.command, &mut payloads, &mut intents, &mut batch)))
            }));
            match decided {
                Ok(Some(outcome)) => batch.answers.push((queued, outcome)),
                Ok(None) => {
                    at.queue.push_front(queued);
                    break;
                }
                Err(_) => {
                    self.poisoned(at, queued, batch).await;
                    return;
                }
            }
            if payloads.len() == APPEND_ROWS_MAX {
                break;
            }
        }
        self.write(me, at, batch, payloads, intents);
    }

    /// A command made us panic. What was decided with it is decided again without it; it is tried again, and parked
    /// by name when that does not help.
    async fn poisoned(&self, at: &mut Loop<E>, mut queued: Queued<E>, batch: InFlight<E>) {
        let name = E::name(&queued.command);
        queued.failures += 1;
        metrics::counter!("patchbay_actors_panics_total", "command" => name).increment(1);
        tracing::error!(command = name, tries = queued.failures, "a command made its entity panic");
        at.chill();
        if queued.failures < POISON_TRIES {
            tokio::time::sleep(Duration::from_millis(10 << queued.failures)).await;
            at.queue.push_front(queued);
        } else {
            metrics::counter!("patchbay_actors_poison_commands_total", "command" => name).increment(1);
            let detail = serde_json::json!({"detail": format!("{name} is parked: it fails every time")});
            answer(queued, Err(CommandError::with(ErrorCode::Internal, detail)));
        }
        for (earlier, _) in batch.answers.into_iter().rev() {
            at.queue.push_front(earlier);
        }
    }

    async fn look_up(
        &self,
        key: LogKey,
        live: &Live<E>,
        command: &E::Command,
    ) -> Result<Found<E::Entry>, ReadError> {
        let mut found = Found::default();
        for _ in 0..LOOKUP_ROUNDS {
            let wanted = E::lookups(&live.state, &found, command);
            let new: Vec<Lookup> = wanted.into_iter().filter(|l| !found.knows(*l)).collect();
            if new.is_empty() {
                break;
            }
            for lookup in new {
                let entry = match lookup {
                    Lookup::Id(id) => self.find(key, live, id).await?,
                    Lookup::Seq(seq) => self.entry(key, live, seq).await?.map(|e| (seq, e)),
                };
                found.note(lookup, entry);
            }
        }
        Ok(found)
    }

    /// The entry that carries `id`. The reference is a hint; only the row's own ids count.
    async fn find(
        &self,
        key: LogKey,
        live: &Live<E>,
        id: IdKey,
    ) -> Result<Option<(u64, Arc<E::Entry>)>, ReadError> {
        if let Some(seq) = live.recent_ids.get(&id) {
            return Ok(live.recent.get(seq).map(|e| (*seq, e.clone())));
        }
        if !live.filter.may_hold(id) {
            return Ok(None);
        }
        let Some(seq) = self.shards.tables.reference(key, id).await? else { return Ok(None) };
        let entry = self.entry(key, live, seq).await?.filter(|e| E::ids(e, seq).contains(&id));
        Ok(entry.map(|e| (seq, e)))
    }

    async fn entry(&self, key: LogKey, live: &Live<E>, seq: u64) -> Result<Option<Arc<E::Entry>>, ReadError> {
        if seq == 0 || seq > live.last {
            return Ok(None);
        }
        if let Some(entry) = live.recent.get(&seq) {
            return Ok(Some(entry.clone()));
        }
        let row = self.shards.logs.row(key, seq).await?.ok_or(ReadError::Damaged)?;
        E::decode(&row.payload).map(|e| Some(Arc::new(e))).ok_or(ReadError::Damaged)
    }

    /// Sends the append and the rows that must be durable with it; or answers at once when nothing was decided.
    fn write(
        &self,
        me: &ActorRef<Msg<E>>,
        at: &mut Loop<E>,
        mut batch: InFlight<E>,
        payloads: Vec<(CommandId, Bytes)>,
        intents: Vec<RowIntent>,
    ) {
        let Phase::Live(live) = &mut at.phase else { return };
        let now = self.shards.clock.now();
        batch.timer =
            E::timer(&live.state, live.armed, now).filter(|due| live.armed.is_none_or(|armed| armed != *due));
        if payloads.is_empty() && intents.is_empty() && batch.timer.is_none() {
            self.finish(me, at, batch);
            return;
        }
        let stamps = &self.shards.stamps[at.key.shard as usize];
        let (Ok(stamp), Ok(beside)) = (stamps.next(), stamps.next()) else {
            batch.answers.drain(..).for_each(|(queued, _)| answer(queued, Err(CommandError::unavailable())));
            at.chill();
            return;
        };
        let mut rows: Vec<Batch> = intents.into_iter().map(|intent| intent(at.key, beside)).collect();
        let mut append = None;
        batch.last = live.last;
        if !payloads.is_empty() {
            let first = live.confirmed + 1;
            append = Some(Append::new(at.key, stamp, first, live.confirmed, &payloads));
            let ticket = self.shards.activity.begin(at.key.shard, at.key.entity);
            if ticket.needs_row {
                let activity = Activity { entity: at.id.clone(), lowest: first };
                rows.push(Tables::activity_write(at.key.shard, ticket.bucket, beside, &activity));
            }
            batch.ticket = Some(ticket);
        }
        if let Some(due) = batch.timer {
            let timer = Timer { entity: at.id.clone(), due };
            if self.shards.timers.needs_mark(at.key.shard) {
                rows.push(Tables::fired_write(at.key.shard, beside, hour_of(now)));
            }
            rows.push(Tables::timer_write(at.key.shard, beside, &timer, hour_of(now)));
        }
        at.in_flight = Some(batch);
        let (logs, me, gate) = (self.shards.logs.clone(), me.clone(), at.gate.clone());
        tokio::spawn(async move {
            let _gate = gate.lock_owned().await;
            let beside = join_all(rows.into_iter().map(|row| logs.write_until_answered(row)));
            let append = async {
                match append {
                    Some(append) => logs.append(append).await,
                    None => Ok(()),
                }
            };
            let (result, _) = tokio::join!(append, beside);
            let _ = me.cast(Msg::Appended(result));
        });
    }

    async fn appended(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>, result: Result<(), WriteError>) {
        let Some(mut batch) = at.in_flight.take() else { return };
        let Phase::Live(live) = &mut at.phase else { return };
        if let (Some(ticket), true) = (&batch.ticket, result.is_ok()) {
            ticket.row_written();
        }
        if result.is_err() {
            // Refused, so nothing is there: the working state is thrown away.
            batch.answers.drain(..).for_each(|(queued, _)| answer(queued, Err(CommandError::unavailable())));
            if let Some(ticket) = batch.ticket {
                ticket.settle();
            }
            at.chill();
            return;
        }
        at.chills = 0;
        live.confirmed = batch.last;
        if let Some(due) = batch.timer {
            live.armed = Some(due);
            self.shards.timers.marked(at.key.shard);
            self.shards.timers.arm(Timer { entity: at.id.clone(), due });
        }
        at.tickets.extend(batch.ticket.take().map(|t| (batch.last, t)));
        if !batch.rows.is_empty() {
            self.entity.publish(&at.id, &live.state, &batch.rows);
            if at.derive == Derive::Clean {
                at.derive_later(me);
            } else if let Derive::Writing { again } = &mut at.derive {
                *again = true;
            }
        }
        self.finish(me, at, batch);
        self.derive_if_due(me, at);
    }

    /// Answers, and does what was decided. Everything that the answers speak of is durable.
    fn finish(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>, batch: InFlight<E>) {
        for (queued, outcome) in batch.answers {
            answer(queued, outcome);
        }
        for (seq, effect) in batch.effects {
            if E::is_handed_on(&effect) {
                at.ordered.push_back((seq, effect));
            } else {
                let (entity, id, handle) = (self.entity.clone(), at.id.clone(), self.handle_of(me, at.key));
                tokio::spawn(async move { entity.act(&id, effect, handle).await });
            }
        }
        self.act_next(me, at);
    }

    /// Starts the next effect that must be done in order.
    fn act_next(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        if at.acting.is_some() {
            return;
        }
        let Some((seq, effect)) = at.ordered.pop_front() else { return };
        at.acting = Some(seq);
        let (entity, id, handle, me) =
            (self.entity.clone(), at.id.clone(), self.handle_of(me, at.key), me.clone());
        let act: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
            entity.act(&id, effect, handle).await;
            let _ = me.cast(Msg::HandedOn(seq));
        });
        tokio::spawn(act);
    }

    /// Writes derived rows of the confirmed state when their pause has passed.
    fn derive_if_due(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        if at.derive != Derive::Due || at.in_flight.is_some() {
            return;
        }
        let Phase::Live(live) = &at.phase else {
            at.derive = Derive::Clean;
            return;
        };
        let Ok(stamp) = self.shards.stamps[at.key.shard as usize].next() else { return };
        let upto = live.confirmed;
        let ids: Vec<(IdKey, u64)> = live
            .recent
            .iter()
            .flat_map(|(seq, e)| E::ids(e, *seq).into_iter().map(|id| (id, *seq)))
            .collect();
        // Of one id the last entry wins; a batch must not name a row twice.
        let last: HashMap<IdKey, u64> = ids.into_iter().collect();
        let last: Vec<(IdKey, u64)> = last.into_iter().collect();
        let mut batches = Tables::reference_writes(at.key, stamp, &last);
        let derived = self.entity.derived(&live.state, at.key, stamp);
        batches.extend(derived.rows);
        at.frozen = Some(Frozen { snapshot: self.freeze(live), then: derived.then });
        at.derivation += 1;
        let derivation = at.derivation;
        at.derive = Derive::Writing { again: false };
        let (logs, me) = (self.shards.logs.clone(), me.clone());
        tokio::spawn(async move {
            join_all(batches.into_iter().map(|b| logs.write_until_answered(b))).await;
            let _ = me.cast(Msg::Derived { derivation, seq: upto });
        });
    }

    fn derived(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>, seq: u64) {
        let again = matches!(at.derive, Derive::Writing { again: true });
        at.derive = Derive::Clean;
        if let Phase::Live(live) = &mut at.phase {
            live.forget_up_to(seq);
        }
        let frozen = at.frozen.take();
        if let Some(then) = frozen.as_ref().and_then(|f| f.then.as_ref()) {
            then();
        }
        self.keep_snapshot(at, frozen);
        if again {
            at.derive_later(me);
        }
        settle(at);
        if self.shards.swept.load(Ordering::Relaxed)
            && let Some((from, mark)) = self.shards.activity.newly_settled(at.key.shard)
            && let Ok(stamp) = self.shards.stamps[at.key.shard as usize].next()
        {
            let (shards, shard) = (self.shards.clone(), at.key.shard);
            tokio::spawn(async move {
                shards.logs.write_until_answered(Tables::mark_write(shard, stamp, mark)).await;
                for bucket in from..mark.bucket {
                    // What a lost drop leaves is read and found settled by the next sweep.
                    let _ = shards
                        .tables
                        .drop_activity(shard, patchbay_storage::tables::Mark { bucket, ..mark })
                        .await;
                }
            });
        }
    }

    /// The snapshot of a confirmed state, when one is due.
    fn freeze(&self, live: &Live<E>) -> Option<Snapshot> {
        let due = SNAPSHOT_ENTRIES.max(live.filter.bytes() as u64 / 64);
        (live.confirmed - live.snapshot_seq >= due).then(|| live.snapshot())
    }

    /// Writes what was frozen, now that everything derived from it is durable, if it is handed on as well.
    fn keep_snapshot(&self, at: &mut Loop<E>, frozen: Option<Frozen>) {
        let Some(snapshot) = frozen.and_then(|f| f.snapshot) else { return };
        let open = at.acting.into_iter().chain(at.ordered.front().map(|(seq, _)| *seq)).min();
        let Phase::Live(live) = &mut at.phase else { return };
        if open.is_some_and(|seq| seq <= snapshot.seq) || snapshot.seq <= live.snapshot_seq {
            return;
        }
        let Ok(stamp) = self.shards.stamps[at.key.shard as usize].next() else { return };
        live.snapshot_seq = snapshot.seq;
        let (logs, write) =
            (self.shards.logs.clone(), patchbay_storage::log::Logs::snapshot_write(at.key, stamp, &snapshot));
        tokio::spawn(async move { logs.write_until_answered(write).await });
    }

    /// The snapshot of the present state, if everything up to it is confirmed, derived and handed on.
    fn snapshot(&self, at: &mut Loop<E>) -> Option<Batch> {
        let quiet = at.in_flight.is_none() && at.ordered.is_empty() && at.acting.is_none();
        let Phase::Live(live) = &mut at.phase else { return None };
        if !quiet
            || live.derived < live.confirmed
            || live.last != live.confirmed
            || live.snapshot_seq == live.confirmed
        {
            return None;
        }
        let stamp = self.shards.stamps[at.key.shard as usize].next().ok()?;
        live.snapshot_seq = live.confirmed;
        Some(patchbay_storage::log::Logs::snapshot_write(at.key, stamp, &live.snapshot()))
    }

    /// Makes ready to be forgotten, and stops when nobody minds.
    async fn idle(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        let busy = at.in_flight.is_some()
            || !at.queue.is_empty()
            || !at.ordered.is_empty()
            || at.acting.is_some()
            || at.derive != Derive::Clean;
        if busy {
            return;
        }
        if let Phase::Live(live) = &at.phase {
            if !E::may_passivate(&live.state) {
                return;
            }
            if let Some(write) = self.snapshot(at) {
                self.shards.logs.write_until_answered(write).await;
            }
        }
        if self.slots.upgrade().is_none_or(|slots| slots.release(at.key.entity, me.get_id())) {
            me.stop(Some("idle".into()));
        }
    }

    fn arm_wake(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        let Phase::Live(live) = &at.phase else { return };
        if at.in_flight.is_some() {
            // It is asked again when the append is answered.
            return;
        }
        let now = self.shards.clock.now();
        let Some(wanted) = E::wake_at(&live.state, now) else { return };
        if at.wake_armed.as_ref().is_some_and(|armed| armed.at <= wanted) {
            return;
        }
        let (me, wait) = (me.clone(), wanted.since(now));
        let task = tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            // One that has ended is woken by its timer or its next command.
            let _ = me.cast(Msg::Wake);
        });
        at.wake_armed = Some(Alarm { at: wanted, task: task.abort_handle() });
    }
}

impl<E: LogEntity> Loop<E> {
    /// Writes derived rows once their pause has passed.
    fn derive_later(&mut self, me: &ActorRef<Msg<E>>) {
        self.derive = Derive::Waiting;
        let me = me.clone();
        tokio::spawn(async move {
            tokio::time::sleep(DERIVE_PAUSE).await;
            let _ = me.cast(Msg::DeriveDue);
        });
    }

    /// Throws the working state away; the next command, if only this one, loads it again.
    ///
    /// What throws it away again and again is not helped by more tries: past [`CHILLS_MAX`] the entity waits for
    /// somebody to ask.
    fn chill(&mut self) {
        self.phase = Phase::Cold;
        self.frozen = None;
        self.derivation += 1;
        self.derive = Derive::Clean;
        self.chills += 1;
        if self.chills > CHILLS_MAX {
            return;
        }
        self.queue.push_back(Queued { command: E::wake(), reply: None, permit: None, failures: 0 });
    }
}

impl<E: LogEntity> Live<E> {
    /// Takes a decision into the working state.
    fn take(
        &mut self,
        decision: Decision<E>,
        command: &E::Command,
        payloads: &mut Vec<(CommandId, Bytes)>,
        intents: &mut Vec<RowIntent>,
        batch: &mut InFlight<E>,
    ) -> E::Reply {
        for entry in decision.entries {
            let seq = self.last + 1;
            E::apply(&mut self.state, seq, &entry);
            let payload = E::encode(&entry, seq);
            payloads.push((E::command_id(command), payload.clone()));
            self.remember(seq, Arc::new(entry), &payload);
            batch.rows.push((seq, payload));
            self.last = seq;
        }
        intents.extend(decision.writes);
        batch.effects.extend(decision.effects.into_iter().map(|e| (self.last, e)));
        decision.reply
    }

    /// The present state, which must be confirmed.
    fn snapshot(&self) -> Snapshot {
        let mut state = BytesMut::new();
        state.put_i64(self.at.as_millis());
        self.filter.encode(&mut state);
        state.put_slice(&E::freeze(&self.state));
        Snapshot { seq: self.confirmed, entry_hash: self.last_hash, state: state.freeze() }
    }

    fn remember(&mut self, seq: u64, entry: Arc<E::Entry>, payload: &Bytes) {
        for id in E::ids(&entry, seq) {
            self.filter.insert(id);
            self.recent_ids.insert(id, seq);
        }
        self.at = self.at.max(E::at(&entry));
        self.last_hash = entry_hash(payload);
        self.recent.insert(seq, entry);
    }

    fn forget_up_to(&mut self, seq: u64) {
        self.derived = self.derived.max(seq);
        self.recent = self.recent.split_off(&(seq + 1));
        self.recent_ids.retain(|_, s| *s > seq);
        if self.recent.is_empty() {
            self.recent_ids.shrink_to_fit();
        }
    }
}

/// Settles the appends of which everything is derived and handed on.
fn settle<E: LogEntity>(at: &mut Loop<E>) {
    let Phase::Live(live) = &at.phase else { return };
    let open = at.acting.into_iter().chain(at.ordered.front().map(|(seq, _)| *seq)).min();
    let settled = open.map_or(live.derived, |seq| live.derived.min(seq - 1));
    while at.tickets.front().is_some_and(|(seq, _)| *seq <= settled) {
        if let Some((_, ticket)) = at.tickets.pop_front() {
            ticket.settle();
        }
    }
}

fn refuse_all<E: LogEntity>(at: &mut Loop<E>, error: &CommandError) {
    let (own, asked): (Vec<_>, Vec<_>) = at.queue.drain(..).partition(|q| q.reply.is_none());
    for queued in asked {
        answer(queued, Err(error.clone()));
    }
    // Of its own commands those that say what came of something are kept; wake-ups are made anew.
    at.queue.extend(own.into_iter().filter(|q| !E::is_wake(&q.command)));
}

fn answer<E: LogEntity>(queued: Queued<E>, outcome: Outcome<E>) {
    // The place is given back before the answer, so that whoever waits for it can use it.
    drop(queued.permit);
    if let Some(reply) = queued.reply {
        // Whoever has stopped waiting repeats with the same ids.
        let _ = reply.send(outcome);
    }
}
