//! Loading an entity: its snapshot, the tail above it, and what decisions look up in its past.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Buf;
use patchbay_protocol::Timestamp;
use patchbay_protocol::ids::EntityId;
use patchbay_storage::log::{AdoptError, LogKey, Snapshot, entry_hash};
use patchbay_storage::tables::{Activity, Tables};
use patchbay_storage::{ReadError, Stamp};
use ractor::ActorRef;

use super::derive::Derive;
use super::live::Live;
use super::message::{Msg, Queued};
use super::{CHILLS_MAX, LogActor, Loop, answer};
use crate::shard::entity::{Found, LogEntity, Lookup};
use crate::shard::filter::Filter;

/// Times that a lookup may ask for more.
const LOOKUP_ROUNDS: usize = 4;

impl<E: LogEntity> LogActor<E> {
    /// Reads the snapshot and what stands above it; writes again what nobody had confirmed.
    pub(super) async fn load(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) -> Result<Live<E>, AdoptError> {
        // An append that a lost actor left behind is answered first.
        let _gate = at.gate.clone().lock_owned().await;
        let logs = &self.shards.logs;
        let reign = at.reign.clone();
        let own = |stamp: Stamp| {
            if stamp.epoch() > reign.epoch() { Err(AdoptError::Succeeded(stamp)) } else { Ok(()) }
        };
        let snapshot = match logs.snapshot(at.key).await? {
            Some((stamp, snapshot)) => {
                own(stamp)?;
                Some(snapshot)
            }
            None => None,
        };
        let base = snapshot.as_ref().map_or(0, |s| s.seq);
        let (mut state, filter, made) = match &snapshot {
            None => (self.entity.fresh(&at.id), Filter::default(), Timestamp::default()),
            Some(s) => self.thaw(&at.id, s).ok_or(AdoptError::Damaged(s.seq))?,
        };
        let told = reign.told.get(&at.key.entity).copied().unwrap_or(0);
        let mut tail = logs.tail_told(at.key, base, told).await?;
        // Within a reign its own answered appends need no adoption.
        tail.confirmed = tail.confirmed.max(at.confirmed.min(tail.rows.last().map_or(base, |r| r.seq)));
        tail.stamp_max.map_or(Ok(()), own)?;
        let adopted = tail.rows.last().map_or(base, |r| r.seq);
        let mut ticket = (adopted > base).then(|| reign.activity.begin(at.key.entity));
        if let Some(ticket) = &ticket {
            // The successor of a crash here must find this entity again.
            let activity = Activity { entity: at.id.clone(), lowest: base + 1 };
            let stamp = reign.stamp().map_err(|_| AdoptError::Unavailable)?;
            let row = Tables::activity_write(at.key.shard, ticket.bucket, stamp, &activity);
            match logs.write_if_room(row.clone()).await {
                Ok(()) => ticket.row_written(),
                // What nobody has confirmed cannot be shown without a write.
                Err(_) if adopted > tail.confirmed => return Err(AdoptError::Full),
                // It can be read meanwhile. Earlier owners' rows stand until there is room for this one, since their
                // end is a write as well.
                Err(_) => {
                    let logs = logs.clone();
                    tokio::spawn(async move { logs.write_until_answered(row).await });
                }
            }
            if adopted > tail.confirmed {
                let stamp = reign.stamp().map_err(|_| AdoptError::Unavailable)?;
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
            E::apply(&mut state, row.seq, row.command, &entry);
            live.remember(row.seq, Arc::new(entry));
        }
        if let Some(row) = tail.rows.last() {
            live.last_hash = entry_hash(&row.payload);
        }
        self.entity.prepare(&state).await;
        live.state = state;
        if let (Some(ticket), true) = (&mut ticket, self.entity.publishes()) {
            // What nobody had confirmed nobody has published.
            let rows: Vec<_> = tail
                .rows
                .iter()
                .filter(|r| r.seq > tail.confirmed)
                .map(|r| (r.seq, r.payload.clone()))
                .collect();
            if !rows.is_empty() {
                ticket.hold_events();
                self.entity.events(&live.state, at.key, ticket.bucket, &rows);
            }
        }
        at.tickets.extend(ticket.map(|t| (adopted, t)));
        self.resume(me, at, &live);
        Ok(live)
    }

    /// Answers those who ask only how far the log reaches, without loading the entity. False: somebody asks more, or nobody
    /// has confirmed yet what stands there.
    pub(super) async fn answer_reach(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>) -> bool {
        let asks_only =
            |queued: &Queued<E>| queued.reply.is_some() && E::reaches(&queued.command, 0).is_some();
        if !at.queue.iter().all(|queued| asks_only(queued)) {
            return false;
        }
        let reached = tokio::select! {
            biased;
            reached = Box::pin(self.reach(at)) => reached,
            () = at.reign.is_over() => return false,
        };
        let Ok(Some(seq)) = reached else { return false };
        if !at.reign.is_held_now() {
            return false;
        }
        for queued in at.queue.drain(..) {
            if let Some(reply) = E::reaches(&queued.command, seq) {
                answer(queued, Ok(reply));
            }
        }
        // It stays no longer than whoever asks for what does not exist.
        let _ = me.cast(Msg::Idle);
        true
    }

    /// How far the log reaches, if all of it was confirmed.
    async fn reach(&self, at: &Loop<E>) -> Result<Option<u64>, AdoptError> {
        let _gate = at.gate.clone().lock_owned().await;
        let snapshot = self.shards.logs.snapshot(at.key).await?;
        let base = snapshot.map_or(0, |(_, snapshot)| snapshot.seq);
        let told = at.reign.told.get(&at.key.entity).copied().unwrap_or(0);
        let tail = self.shards.logs.tail_told(at.key, base, told).await?;
        let last = tail.rows.last().map_or(base, |row| row.seq);
        let is_ours = tail.stamp_max.is_none_or(|stamp| stamp.epoch() <= at.reign.epoch());
        Ok((is_ours && last <= base.max(tail.confirmed).max(at.confirmed)).then_some(last))
    }

    pub(super) fn thaw(&self, id: &EntityId, snapshot: &Snapshot) -> Option<(E::State, Filter, Timestamp)> {
        let mut from = snapshot.state.clone();
        let made = Timestamp::from_millis(from.try_get_i64().ok()?);
        let filter = Filter::decode(&mut from)?;
        Some((self.entity.thaw(id, &from)?, filter, made))
    }

    /// After a load: what an earlier owner may not have shown, derived or handed on.
    pub(super) fn resume(&self, me: &ActorRef<Msg<E>>, at: &mut Loop<E>, live: &Live<E>) {
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
            at.queue.push_front(Queued::own(command));
        }
        if live.confirmed > live.derived && at.derive != Derive::Stale {
            at.derive = Derive::Waiting;
            let _ = me.cast(Msg::DeriveDue);
        }
    }

    pub(super) async fn look_up(
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
                let entry = match live.at_hand(lookup) {
                    Some(entry) => entry,
                    // Reads are rare, and what they need while they wait is large: it does not lie in every actor.
                    None => Box::pin(self.read(key, live.last, lookup)).await?,
                };
                found.note(lookup, entry);
            }
        }
        Ok(found)
    }

    /// What a lookup finds in the store. A reference is a hint; only the row's own ids count.
    async fn read(
        &self,
        key: LogKey,
        last: u64,
        lookup: Lookup,
    ) -> Result<Option<(u64, Arc<E::Entry>)>, ReadError> {
        let (seq, id) = match lookup {
            Lookup::Seq(seq) => (seq, None),
            Lookup::Id(id) => match self.shards.tables.reference(key, id).await? {
                Some(seq) => (seq, Some(id)),
                None => return Ok(None),
            },
        };
        if seq == 0 || seq > last {
            return Ok(None);
        }
        let row = self.shards.logs.row(key, seq).await?.ok_or(ReadError::Damaged)?;
        let entry = E::decode(&row.payload).ok_or(ReadError::Damaged)?;
        let is_it = id.is_none_or(|id| E::ids(&entry, seq).contains(&id));
        Ok(is_it.then(|| (seq, Arc::new(entry))))
    }
}
