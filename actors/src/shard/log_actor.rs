//! The loop around every entity with a log: load, decide, append, apply, act.
//!
//! While an append is under way commands wait; when it is answered they are decided one after another on the working
//! state and go out as one append of at most 64 rows. Replies, publications and effects of an append come after its
//! answer. A refused append throws the working state away: it is loaded again from the store.

mod derive;
mod gather;
mod live;
mod load;
mod message;

use std::collections::VecDeque;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use patchbay_protocol::ids::{CommandId, EntityId};
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use patchbay_storage::log::{APPEND_ROWS_MAX, AdoptError, Append, LogKey, Logs, entry_hash};
use patchbay_storage::tables::{Activity, Tables, Timer};
use patchbay_storage::{Batch, WriteError};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::activity::Ticket;
use super::entity::{LogEntity, Now, RowIntent};
use super::reply::ReplyTo;
use super::slots::Slots;
use super::{Reign, Shards};
use derive::{Derive, Frozen, settle};
use gather::Gather;
use live::Live;
pub use message::{Handle, Look, Msg, Queued};

/// A command that panics this often is parked.
const POISON_TRIES: u32 = 3;
/// Times in a row that an entity is loaded anew of its own accord.
const CHILLS_MAX: u32 = 8;
/// What callers are told to wait for a disk that is full.
const FULL_RETRY_MS: u64 = 1000;
/// Between two tries of what the store did not answer, at first; longer the more often it is of no use.
const RELOAD_PAUSE: Duration = Duration::from_millis(500);
const RELOAD_DOUBLINGS: u32 = 6;

/// The actor.
pub struct LogActor<E: LogEntity> {
    pub(super) entity: Arc<E>,
    pub(super) shards: Arc<Shards>,
    pub(super) slots: Weak<Slots<E>>,
}

enum Phase<E: LogEntity> {
    Cold,
    Live(Box<Live<E>>),
    Parked(String),
}

type Outcome<E> = Result<<E as LogEntity>::Reply, CommandError>;

struct InFlight<E: LogEntity> {
    answers: Vec<(Box<Queued<E>>, Outcome<E>)>,
    effects: Vec<(u64, E::Effect)>,
    rows: Vec<(u64, Bytes)>,
    last: u64,
    ticket: Option<Ticket>,
    timer: Option<Timestamp>,
    /// The shard's first mark, written with it.
    first_mark: Option<i64>,
    began: Instant,
}

/// The actor's own state.
pub struct Loop<E: LogEntity> {
    id: EntityId,
    key: LogKey,
    /// Under which it writes, as long as it lives.
    reign: Arc<Reign>,
    gate: Arc<Mutex<()>>,
    phase: Phase<E>,
    queue: VecDeque<Box<Queued<E>>>,
    /// What is answered to whatever was asked before something was refused: nobody overtakes it.
    refusing: Option<(u32, CommandError)>,
    /// What it has told itself and could not be done: tried again, all of it after one pause.
    later: VecDeque<Box<Queued<E>>>,
    is_again_armed: bool,
    in_flight: Option<InFlight<E>>,
    /// Who is waited for before the next append.
    gather: Gather,
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
    /// The last seq that this actor had answered.
    confirmed: u64,
    /// Its shard goes to another node: it takes nothing new, and ends when nothing is under way.
    leaving: bool,
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

impl<E: LogEntity> Actor for LogActor<E> {
    type Msg = Msg<E>;
    type State = Loop<E>;
    type Arguments = (EntityId, Arc<Reign>, Arc<Mutex<()>>);

    async fn pre_start(
        &self,
        _: ActorRef<Msg<E>>,
        (id, reign, gate): Self::Arguments,
    ) -> Result<Loop<E>, ActorProcessingErr> {
        let key = LogKey { entity: id.key(), shard: id.shard(self.shards.count) };
        Ok(Loop {
            id,
            key,
            reign,
            gate,
            phase: Phase::Cold,
            queue: VecDeque::new(),
            refusing: None,
            later: VecDeque::new(),
            is_again_armed: false,
            in_flight: None,
            gather: Gather::default(),
            derive: Derive::Clean,
            frozen: None,
            tickets: VecDeque::new(),
            ordered: VecDeque::new(),
            acting: None,
            wake_armed: None,
            chills: 0,
            derivation: 0,
            confirmed: 0,
            leaving: false,
        })
    }

    async fn handle(
        &self,
        me: ActorRef<Msg<E>>,
        msg: Msg<E>,
        at: &mut Loop<E>,
    ) -> Result<(), ActorProcessingErr> {
        // What a message needs while it is worked on lies in the actor's task for as long as the actor lives, unless it
        // is boxed.
        Box::pin(self.told(me, msg, at)).await;
        Ok(())
    }
}

impl<E: LogEntity> LogActor<E> {
    async fn told(&self, me: ActorRef<Msg<E>>, msg: Msg<E>, at: &mut Loop<E>) {
        match msg {
            Msg::Command(queued) => match &at.refusing {
                Some((_, error)) if queued.reply.is_some() => answer(queued, Err(error.clone())),
                Some(_) | None => at.queue.push_back(queued),
            },
            Msg::Refused => {
                at.refusing =
                    at.refusing.take().filter(|(more, _)| *more > 1).map(|(n, error)| (n - 1, error));
            }
            Msg::Appended(result) => self.appended(&me, at, result).await,
            Msg::Derived { derivation, seq } if derivation == at.derivation => self.derived(&me, at, seq),
            // Of a state that was thrown away since.
            Msg::Derived { .. } => self.derived_before(&me, at),
            Msg::DeriveDue => {
                if at.derive == Derive::Waiting {
                    at.derive = Derive::Due;
                }
                self.derive_if_due(&me, at);
            }
            Msg::Again => {
                at.is_again_armed = false;
                at.queue.extend(at.later.drain(..));
                if at.queue.is_empty() {
                    // Nobody else would see to what it has still to do.
                    at.queue.push_back(Queued::own(E::wake()));
                }
            }
            Msg::Gathered => at.gather.ends(),
            Msg::HandedOn(seq) => {
                if at.acting == Some(seq) {
                    at.acting = None;
                    self.act_next(&me, at);
                    settle(at);
                }
            }
            Msg::Wake => {
                at.wake_armed = None;
                at.queue.push_back(Queued::own(E::wake()));
            }
            Msg::Peek(look) => {
                // An entity that is not loaded has nothing to show: dropping the question says so.
                if let Phase::Live(live) = &at.phase {
                    look(&live.state);
                    return;
                }
                // Somebody waits for it to be there.
                if at.chills <= CHILLS_MAX && at.queue.is_empty() {
                    at.queue.push_back(Queued::own(E::wake()));
                }
            }
            Msg::Idle => {
                Box::pin(self.idle(&me, at)).await;
                return;
            }
            Msg::Leave => at.leaving = true,
        }
        if at.leaving {
            Box::pin(self.leave(&me, at)).await;
            return;
        }
        self.pump(&me, at).await;
        self.arm_wake(&me, at);
        if at.is_nobody() {
            // Whoever asks for what does not exist leaves nothing behind.
            Box::pin(self.idle(&me, at)).await;
        }
    }

    fn handle_of(&self, me: &ActorRef<Msg<E>>, at: &Loop<E>) -> Handle<E> {
        Handle { actor: me.clone(), shards: self.shards.clone(), key: at.key, reign: at.reign.clone() }
    }

    /// Decides what waits, unless an append is under way.
    async fn pump(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        while at.in_flight.is_none() && !at.queue.is_empty() && !at.gather.waits(at.queue.len()) {
            if !at.reign.is_held().await {
                at.leaving = true;
                Box::pin(self.leave(me, at)).await;
                return;
            }
            if matches!(at.phase, Phase::Cold) && self.answer_reach(me, at).await {
                return;
            }
            if !self.ready(me, at).await {
                return;
            }
            self.decide_batch(me, at).await;
        }
    }

    /// Hands back what is not decided, and ends when nothing is under way, or when nothing of it counts any more.
    async fn leave(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        at.queue.extend(at.later.drain(..));
        let Some(slots) = self.slots.upgrade() else { return me.stop(Some("left".into())) };
        let held = at.reign.is_held_now();
        if held && at.in_flight.is_some() {
            // What was asked since goes back behind what came of this.
            at.reign.acts(at.key.entity);
            return;
        }
        // Nothing of what is under way counts any more; whoever asked asks the successor, by the same ids.
        for (queued, _) in at.in_flight.take().into_iter().flat_map(|f| f.answers) {
            slots.give_back(&at.id, *queued);
        }
        let (own, asked): (Vec<_>, Vec<_>) = at.queue.drain(..).partition(|q| q.reply.is_none());
        asked.into_iter().for_each(|queued| slots.give_back(&at.id, *queued));
        if held {
            // What came of what it has begun is noted by it still.
            at.queue = own.into_iter().filter(|q| !E::is_wake(&q.command)).collect();
            while at.in_flight.is_none() && !at.queue.is_empty() {
                if !self.ready(me, at).await {
                    return;
                }
                self.decide_batch(me, at).await;
            }
            if at.in_flight.is_some() {
                at.reign.acts(at.key.entity);
                return;
            }
            // Nobody has taken over up to this instant, so that what was answered is confirmed for ever.
            if at.reign.is_held_now() {
                let tip = if let Phase::Live(live) = &at.phase { live.confirmed } else { at.confirmed };
                at.reign.rests(at.key.entity, tip);
            }
            self.derive_now(me, at);
            let calls = matches!(&at.phase, Phase::Live(live) if !E::may_leave(&live.state));
            let acts = at.acting.is_some() || !at.ordered.is_empty();
            if at.derive != Derive::Clean || acts || calls {
                return;
            }
            if let Some(write) = self.snapshot(at) {
                // Without room it goes without: the log has everything.
                let _ = self.shards.logs.write_if_room(write).await;
            }
        }
        slots.left(at.key.entity, me.get_id());
        me.stop(Some("left".into()));
    }

    /// Loads the entity if that is needed. False: what waited was refused.
    async fn ready(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) -> bool {
        if let Phase::Cold = at.phase {
            let loaded = loop {
                let reign = at.reign.clone();
                let loaded = tokio::select! {
                    biased;
                    loaded = Box::pin(self.load(me, at)) => loaded,
                    () = reign.is_over() => Err(AdoptError::Unavailable),
                };
                if loaded.is_ok() || at.reign.is_held_now() {
                    break loaded;
                }
                // Whatever went wrong, it may be its successor's doing. If it has one whoever asked is asked to go there;
                // an actor that leaves while its shard stays here would be asked for ever.
                if !at.reign.is_held().await {
                    let _ = me.cast(Msg::Leave);
                    return false;
                }
            };
            match loaded {
                Ok(live) => at.phase = Phase::Live(Box::new(live)),
                Err(error @ (AdoptError::Unavailable | AdoptError::Full)) => {
                    let told = match error {
                        AdoptError::Full => CommandError::overloaded(FULL_RETRY_MS),
                        _ => CommandError::unavailable(),
                    };
                    refuse_all(me, at, told);
                    at.again(me);
                    return false;
                }
                Err(e @ AdoptError::Succeeded(_)) => {
                    // Nothing of ours can win any more, not even a row that says so.
                    metrics::counter!("patchbay_actors_succeeded_total", "kind" => at.id.kind()).increment(1);
                    tracing::error!(kind = at.id.kind(), shard = at.key.shard, error = %e, "an entity stops");
                    at.phase = Phase::Parked(e.to_string());
                }
                Err(AdoptError::Damaged(seq)) => {
                    let reason = format!("damaged at seq {seq}");
                    Box::pin(self.park(at, &reason)).await;
                    at.phase = Phase::Parked(reason);
                }
            }
        }
        if let Phase::Parked(reason) = &at.phase {
            let e = CommandError::with(
                ErrorCode::Unavailable,
                serde_json::json!({"detail": format!("parked: {reason}")}),
            );
            refuse_all(me, at, e);
            at.queue.clear();
            return false;
        }
        true
    }

    async fn park(&self, at: &Loop<E>, reason: &str) {
        metrics::counter!("patchbay_actors_parked_total", "kind" => at.id.kind()).increment(1);
        tracing::error!(kind = at.id.kind(), shard = at.key.shard, reason, "an entity is parked");
        if let Ok(stamp) = at.reign.stamp() {
            self.shards
                .logs
                .write_until_answered(Tables::park_write(at.key.shard, stamp, &at.id, reason))
                .await;
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
            first_mark: None,
            began: Instant::now(),
        };
        let mut intents: Vec<RowIntent> = Vec::new();
        let mut payloads: Vec<(CommandId, Bytes)> = Vec::new();
        while let Some(queued) = at.queue.pop_front() {
            let Phase::Live(live) = &mut at.phase else { return };
            if queued.reply.as_ref().is_some_and(ReplyTo::is_late) {
                // Nor is what was asked after it done before it.
                at.queue.push_front(queued);
                refuse_all(me, at, CommandError::unavailable());
                continue;
            }
            let found = tokio::select! {
                biased;
                found = self.look_up(at.key, live, &queued.command) => found,
                () = at.reign.is_over() => {
                    at.queue.push_front(queued);
                    give_way(me, at, batch);
                    return;
                }
            };
            let found = match found {
                Ok(found) => found,
                // What it has told itself nobody else would say again.
                Err(_) if queued.reply.is_none() => {
                    at.later.push_back(queued);
                    at.again(me);
                    continue;
                }
                Err(_) => {
                    // Nor is what was asked after it done before it.
                    at.queue.push_front(queued);
                    refuse_all(me, at, CommandError::unavailable());
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
                    Box::pin(self.poisoned(at, queued, batch)).await;
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
    async fn poisoned(&self, at: &mut Loop<E>, mut queued: Box<Queued<E>>, batch: InFlight<E>) {
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
        let (Ok(stamp), Ok(beside)) = (at.reign.stamp(), at.reign.stamp()) else {
            if !at.reign.is_held_now() {
                give_way(me, at, batch);
                return;
            }
            batch.answers.drain(..).rev().for_each(|(queued, _)| at.queue.push_front(queued));
            refuse_all(me, at, CommandError::unavailable());
            at.chill();
            return;
        };
        let mut rows: Vec<Batch> = intents.into_iter().map(|intent| intent(at.key, beside)).collect();
        let (mut append, mut hold) = (None, None);
        batch.last = live.last;
        if let Some((_, payload)) = payloads.last() {
            live.last_hash = entry_hash(payload);
            let first = live.confirmed + 1;
            append = Some(Append::new(at.key, stamp, first, live.confirmed, &payloads));
            let mut ticket = at.reign.activity.begin(at.key.entity);
            if self.entity.publishes() {
                ticket.hold_events();
            }
            if ticket.needs_row {
                let activity = Activity { entity: at.id.clone(), lowest: first };
                rows.push(Tables::activity_write(at.key.shard, ticket.bucket, beside, &activity));
            }
            batch.ticket = Some(ticket);
        }
        if let Some(due) = batch.timer {
            let timer = Timer { entity: at.id.clone(), due };
            let (hour, held) = self.shards.timers.hold(at.key.shard, due, now);
            hold = Some(held);
            if let Some(mark) = self.shards.timers.first_mark(at.key.shard) {
                batch.first_mark = Some(mark);
                rows.push(Tables::fired_write(at.key.shard, beside, mark));
            }
            rows.push(Tables::timer_write(at.key.shard, beside, &timer, hour));
        }
        at.in_flight = Some(batch);
        let (logs, me, gate) = (self.shards.logs.clone(), me.clone(), at.gate.clone());
        tokio::spawn(async move {
            let _gate = gate.lock_owned().await;
            let appends = append.is_some();
            let beside = join_all(rows.into_iter().map(|row| beside_append(&logs, row)));
            let append = async {
                match append {
                    Some(append) => logs.append(append).await,
                    None => Ok(()),
                }
            };
            let (mut result, left) = tokio::join!(append, beside);
            // What had no room is written all the same when the append had some: the two belong together.
            for row in left.into_iter().flatten() {
                match (result, appends) {
                    (Ok(()), true) => logs.write_until_answered(row).await,
                    (Ok(()), false) => result = Err(WriteError::Full),
                    (Err(_), _) => {}
                }
            }
            drop(hold);
            let _ = me.cast(Msg::Appended(result));
        });
    }

    async fn appended(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>, result: Result<(), WriteError>) {
        // The clock is asked after the store has answered: what a successor may not see is shown to nobody.
        if !at.reign.is_held().await {
            at.leaving = true;
            return;
        }
        let Some(mut batch) = at.in_flight.take() else { return };
        let Phase::Live(live) = &mut at.phase else { return };
        if let (Some(ticket), true) = (&batch.ticket, result.is_ok()) {
            ticket.row_written();
        }
        if let Err(why) = result {
            // Refused, so nothing is there: the working state is thrown away.
            let error = if why == WriteError::Full {
                CommandError::overloaded(FULL_RETRY_MS)
            } else {
                CommandError::unavailable()
            };
            batch.answers.drain(..).rev().for_each(|(queued, _)| at.queue.push_front(queued));
            refuse_all(me, at, error);
            if let Some(ticket) = batch.ticket {
                ticket.withdraw();
            }
            at.chill();
            return;
        }
        at.chills = 0;
        if let Some(pause) = at.gather.begin(batch.answers.len(), at.queue.len(), batch.began.elapsed()) {
            let me = me.clone();
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                let _ = me.cast(Msg::Gathered);
            });
        }
        live.confirmed = batch.last;
        at.confirmed = batch.last;
        if let Some(due) = batch.timer {
            live.armed = Some(due);
            if let Some(mark) = batch.first_mark {
                self.shards.timers.marked(at.key.shard, mark);
            }
            self.shards.timers.arm(Timer { entity: at.id.clone(), due });
        }
        let bucket = batch.ticket.as_ref().map(|t| t.bucket);
        at.tickets.extend(batch.ticket.take().map(|t| (batch.last, t)));
        if !batch.rows.is_empty() {
            self.entity.publish(&at.id, &live.state, &batch.rows);
            if let Some(bucket) = bucket {
                self.entity.events(&live.state, at.key, bucket, &batch.rows);
            }
        }
        let appended = !batch.rows.is_empty();
        self.finish(me, at, batch);
        if appended {
            self.derive_soon(me, at);
        } else {
            self.derive_if_due(me, at);
        }
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
                let (entity, id, handle) = (self.entity.clone(), at.id.clone(), self.handle_of(me, at));
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
            (self.entity.clone(), at.id.clone(), self.handle_of(me, at), me.clone());
        let act: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
            entity.act(&id, effect, handle).await;
            let _ = me.cast(Msg::HandedOn(seq));
        });
        tokio::spawn(act);
    }

    /// Makes ready to be forgotten, and stops when nobody minds.
    async fn idle(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        self.derive_now(me, at);
        let busy = at.in_flight.is_some()
            || !at.queue.is_empty()
            || !at.later.is_empty()
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
                // Without room it goes without: the log has everything, the next load only reads more of it.
                let _ = self.shards.logs.write_if_room(write).await;
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
    /// Whether it was asked for and does not exist.
    fn is_nobody(&self) -> bool {
        let empty = matches!(&self.phase, Phase::Live(live) if live.last == 0);
        empty && self.in_flight.is_none() && self.queue.is_empty() && self.later.is_empty()
    }

    /// Sees to it that what could not be done is tried again, once for all of it.
    fn again(&mut self, me: &ActorRef<Msg<E>>) {
        if std::mem::replace(&mut self.is_again_armed, true) {
            return;
        }
        let pause = RELOAD_PAUSE * (1 << self.chills.min(RELOAD_DOUBLINGS));
        let me = me.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let _ = me.cast(Msg::Again);
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
        self.derive = match self.derive {
            Derive::Writing { .. } | Derive::Stale => Derive::Stale,
            Derive::Clean | Derive::Waiting | Derive::Due => Derive::Clean,
        };
        self.chills += 1;
        if self.chills > CHILLS_MAX {
            return;
        }
        self.queue.push_back(Queued::own(E::wake()));
    }
}

/// Writes a row that belongs to an append; gives it back when there is no room.
async fn beside_append(logs: &Logs, row: Batch) -> Option<Batch> {
    logs.write_if_room(row.clone()).await.is_err().then_some(row)
}

/// Its reign has ended: whoever asked is asked to go to its successor.
fn give_way<E: LogEntity>(me: &ActorRef<Msg<E>>, at: &mut Loop<E>, mut batch: InFlight<E>) {
    batch.answers.drain(..).rev().for_each(|(queued, _)| at.queue.push_front(queued));
    at.chill();
    let _ = me.cast(Msg::Leave);
}

/// Refuses what waits, and whatever is in the mailbox by now: of what one caller has asked nothing is done that came after
/// something that was refused, unless it was asked after hearing that.
fn refuse_all<E: LogEntity>(me: &ActorRef<Msg<E>>, at: &mut Loop<E>, error: CommandError) {
    let (own, asked): (Vec<_>, Vec<_>) = at.queue.drain(..).partition(|q| q.reply.is_none());
    for queued in asked {
        answer(queued, Err(error.clone()));
    }
    // Of its own commands those that say what came of something are tried again later; wake-ups are made anew.
    at.later.extend(own.into_iter().filter(|q| !E::is_wake(&q.command)));
    if !at.later.is_empty() {
        at.again(me);
    }
    if me.cast(Msg::Refused).is_ok() {
        let before = at.refusing.as_ref().map_or(0, |(n, _)| *n);
        at.refusing = Some((before + 1, error));
    }
}

fn answer<E: LogEntity>(mut queued: impl AsMut<Queued<E>>, outcome: Outcome<E>) {
    let queued = queued.as_mut();
    // The place is given back before the answer, so that whoever waits for it can use it.
    drop(queued.permit.take());
    if let Some(reply) = queued.reply.take() {
        // Whoever has stopped waiting repeats with the same ids.
        let _ = reply.send(outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Conversation;

    fn size<A, B, C, D, F>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn what_an_idle_actor_holds_is_small() {
        // The future of a message lies in the actor's task for as long as the actor lives.
        let handle = size(<LogActor<Conversation> as Actor>::handle);
        let state = size_of::<Loop<Conversation>>();
        let live = size_of::<Live<Conversation>>();
        let msg = size_of::<Msg<Conversation>>();
        assert!(handle <= 256 && state + live <= 2048 && msg <= 64, "{handle} {state} {live} {msg}");
    }
}
