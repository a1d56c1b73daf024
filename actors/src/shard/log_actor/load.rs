//! Loading an entity: its snapshot, the tail above it, and what decisions look up in its past.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Buf;
use patchbay_protocol::Timestamp;
use patchbay_protocol::ids::EntityId;
use patchbay_storage::log::{AdoptError, LogKey, Snapshot};
use patchbay_storage::tables::{Activity, IdKey, Tables};
use patchbay_storage::{ReadError, Stamp};
use ractor::ActorRef;

use super::derive::Derive;
use super::live::Live;
use super::message::{Msg, Queued};
use super::{CHILLS_MAX, LogActor, Loop};
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
        let stamps = &self.shards.stamps[at.key.shard as usize];
        let own = |stamp: Stamp| {
            if stamp.epoch() > stamps.epoch() { Err(AdoptError::Succeeded(stamp)) } else { Ok(()) }
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
        let mut tail = logs.tail(at.key, base).await?;
        // Within a reign its own answered appends need no adoption.
        tail.confirmed = tail.confirmed.max(at.confirmed.min(tail.rows.last().map_or(base, |r| r.seq)));
        tail.stamp_max.map_or(Ok(()), own)?;
        let adopted = tail.rows.last().map_or(base, |r| r.seq);
        let ticket = (adopted > base).then(|| self.shards.activity.begin(at.key.shard, at.key.entity));
        if let Some(ticket) = &ticket {
            // The successor of a crash here must find this entity again.
            let activity = Activity { entity: at.id.clone(), lowest: base + 1 };
            let stamp = stamps.next().map_err(|_| AdoptError::Unavailable)?;
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
            at.queue.push_front(Queued { command, reply: None, permit: None, failures: 0 });
        }
        if live.confirmed > live.derived {
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
    pub(super) async fn find(
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

    pub(super) async fn entry(
        &self,
        key: LogKey,
        live: &Live<E>,
        seq: u64,
    ) -> Result<Option<Arc<E::Entry>>, ReadError> {
        if seq == 0 || seq > live.last {
            return Ok(None);
        }
        if let Some(entry) = live.recent.get(&seq) {
            return Ok(Some(entry.clone()));
        }
        let row = self.shards.logs.row(key, seq).await?.ok_or(ReadError::Damaged)?;
        E::decode(&row.payload).map(|e| Some(Arc::new(e))).ok_or(ReadError::Damaged)
    }
}
