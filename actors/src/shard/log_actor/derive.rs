//! What follows from the log, batched behind the ack: references, rows of other tables, snapshots.

use std::time::Duration;

use futures_util::future::join_all;
use patchbay_storage::Batch;
use patchbay_storage::log::{Logs, Snapshot};
use patchbay_storage::tables::{IdKey, Tables};
use ractor::ActorRef;

use super::live::Live;
use super::message::Msg;
use super::{LogActor, Loop, Phase};
use crate::shard::entity::{LogEntity, Then};

/// Derived rows follow an entry after this: a message and its first receipts share them.
const DERIVE_PAUSE: Duration = Duration::from_secs(2);
/// While entries keep coming they are written this often per entity: more of them share a batch.
const DERIVE_BUSY_PAUSE: Duration = Duration::from_secs(4);
/// Entries that wait to be derived are held in memory: at so many of them nobody waits any longer.
const DERIVE_ENTRIES_MAX: usize = 256;
/// A snapshot is written after so many entries, or more when the filter is large.
const SNAPSHOT_ENTRIES: u64 = 128;

/// What waits for derived rows to be durable.
pub(super) struct Frozen {
    pub(super) snapshot: Option<Snapshot>,
    pub(super) then: Option<Then>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Derive {
    /// Nothing to write.
    Clean,
    /// Waiting for the pause to pass.
    Waiting,
    /// The pause has passed; the next confirmed state is written.
    Due,
    /// Being written.
    Writing { again: bool },
    /// What a state that was thrown away had begun is being written. Nothing else is begun meanwhile, however often
    /// that happens: a store without room has these rows waiting once.
    Stale,
}

impl<E: LogEntity> LogActor<E> {
    /// Writes derived rows of the confirmed state when their pause has passed.
    pub(super) fn derive_if_due(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        if at.derive != Derive::Due || at.in_flight.is_some() {
            return;
        }
        let Phase::Live(live) = &at.phase else {
            at.derive = Derive::Clean;
            return;
        };
        if live.derived == live.confirmed {
            at.derive = Derive::Clean;
            return;
        }
        let Ok(stamp) = at.reign.stamp() else { return };
        let upto = live.confirmed;
        // Of one id the last entry wins. Nothing is in flight: all that is recent is confirmed.
        let last: Vec<(IdKey, u64)> = live.recent_ids.iter().map(|(id, seq)| (*id, *seq)).collect();
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

    /// Another entry is to be derived: with those that wait, or with the next ones.
    pub(super) fn derive_soon(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        let full = matches!(&at.phase, Phase::Live(live) if live.recent.len() >= DERIVE_ENTRIES_MAX);
        match at.derive {
            Derive::Clean => at.derive_after(me, DERIVE_PAUSE),
            Derive::Waiting if full => at.derive = Derive::Due,
            Derive::Writing { .. } => at.derive = Derive::Writing { again: true },
            Derive::Waiting | Derive::Due | Derive::Stale => {}
        }
        self.derive_if_due(me, at);
    }

    /// What an earlier state had begun is written.
    pub(super) fn derived_before(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        if at.derive == Derive::Stale {
            // A state that is not loaded yet sees to it when it is.
            at.derive = Derive::Due;
            self.derive_if_due(me, at);
        }
    }

    /// Whoever is to be forgotten waits for nobody.
    pub(super) fn derive_now(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) {
        if at.derive == Derive::Waiting {
            at.derive = Derive::Due;
            self.derive_if_due(me, at);
        }
    }

    pub(super) fn derived(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>, seq: u64) {
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
            at.derive_after(me, DERIVE_BUSY_PAUSE);
            // As many may have come meanwhile as are not waited for.
            self.derive_soon(me, at);
        }
        settle(at);
    }

    /// The snapshot of a confirmed state, when one is due.
    pub(super) fn freeze(&self, live: &Live<E>) -> Option<Snapshot> {
        let due = SNAPSHOT_ENTRIES.max(live.filter.bytes() as u64 / 64);
        (live.confirmed - live.snapshot_seq >= due).then(|| live.snapshot())
    }

    /// Writes what was frozen, now that everything derived from it is durable, if it is handed on as well.
    pub(super) fn keep_snapshot(&self, at: &mut Loop<E>, frozen: Option<Frozen>) {
        let Some(snapshot) = frozen.and_then(|f| f.snapshot) else { return };
        let open = at.acting.into_iter().chain(at.ordered.front().map(|(seq, _)| *seq)).min();
        let Phase::Live(live) = &mut at.phase else { return };
        if open.is_some_and(|seq| seq <= snapshot.seq) || snapshot.seq <= live.snapshot_seq {
            return;
        }
        let Ok(stamp) = at.reign.stamp() else { return };
        live.snapshot_seq = snapshot.seq;
        let (logs, write) = (self.shards.logs.clone(), Logs::snapshot_write(at.key, stamp, &snapshot));
        tokio::spawn(async move { logs.write_until_answered(write).await });
    }

    /// The snapshot of the present state, if everything up to it is confirmed, derived and handed on.
    pub(super) fn snapshot(&self, at: &mut Loop<E>) -> Option<Batch> {
        let quiet = at.in_flight.is_none() && at.ordered.is_empty() && at.acting.is_none();
        let Phase::Live(live) = &mut at.phase else { return None };
        if !quiet
            || live.derived < live.confirmed
            || live.last != live.confirmed
            || live.snapshot_seq == live.confirmed
        {
            return None;
        }
        let stamp = at.reign.stamp().ok()?;
        live.snapshot_seq = live.confirmed;
        Some(Logs::snapshot_write(at.key, stamp, &live.snapshot()))
    }
}

impl<E: LogEntity> Loop<E> {
    /// Writes derived rows once the pause has passed.
    pub(super) fn derive_after(&mut self, me: &ActorRef<Msg<E>>, pause: Duration) {
        self.derive = Derive::Waiting;
        // Each entity has a pace of its own, up to a quarter faster or slower: those that began together do not write
        // together.
        let pause = pause * (192 + u32::from(self.key.entity[15]) / 2) / 256;
        let me = me.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let _ = me.cast(Msg::DeriveDue);
        });
    }
}

/// Settles the appends of which everything is derived and handed on.
pub(super) fn settle<E: LogEntity>(at: &mut Loop<E>) {
    let Phase::Live(live) = &at.phase else { return };
    let open = at.acting.into_iter().chain(at.ordered.front().map(|(seq, _)| *seq)).min();
    let settled = open.map_or(live.derived, |seq| live.derived.min(seq - 1));
    while at.tickets.front().is_some_and(|(seq, _)| *seq <= settled) {
        if let Some((_, ticket)) = at.tickets.pop_front() {
            ticket.settle();
        }
    }
}
