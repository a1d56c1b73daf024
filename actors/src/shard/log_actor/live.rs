//! What a loaded entity holds: its working state, and what of its log is not derived yet.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use patchbay_protocol::Timestamp;
use patchbay_protocol::ids::CommandId;
use patchbay_storage::log::Snapshot;
use patchbay_storage::tables::IdKey;

use super::InFlight;
use crate::shard::entity::{Decision, LogEntity, Lookup, RowIntent};
use crate::shard::filter::Filter;

/// What a loaded entity holds.
pub(super) struct Live<E: LogEntity> {
    pub(super) state: E::State,
    /// The last seq of the working state.
    pub(super) last: u64,
    /// The last seq that is durable.
    pub(super) confirmed: u64,
    /// When the last entry was made.
    pub(super) at: Timestamp,
    /// Derived rows up to here are durable.
    pub(super) derived: u64,
    /// Every id ever seen.
    pub(super) filter: Filter,
    /// Entries above `derived`, and their ids.
    pub(super) recent: BTreeMap<u64, Arc<E::Entry>>,
    pub(super) recent_ids: HashMap<IdKey, u64>,
    pub(super) snapshot_seq: u64,
    /// The hash of the last entry, for the snapshot.
    pub(super) last_hash: [u8; 16],
    pub(super) armed: Option<Timestamp>,
}

impl<E: LogEntity> Live<E> {
    /// Takes a decision into the working state.
    pub(super) fn take(
        &mut self,
        decision: Decision<E>,
        command: &E::Command,
        payloads: &mut Vec<(CommandId, Bytes)>,
        intents: &mut Vec<RowIntent>,
        batch: &mut InFlight<E>,
    ) -> E::Reply {
        let id = E::command_id(command);
        for entry in decision.entries {
            let seq = self.last + 1;
            E::apply(&mut self.state, seq, id, &entry);
            let payload = E::encode(&entry, seq);
            payloads.push((id, payload.clone()));
            self.remember(seq, Arc::new(entry));
            batch.rows.push((seq, payload));
            self.last = seq;
        }
        intents.extend(decision.writes);
        batch.effects.extend(decision.effects.into_iter().map(|e| (self.last, e)));
        decision.reply
    }

    /// What a lookup finds without a read: an entry at hand, or that there is none. `None`: the store knows.
    pub(super) fn at_hand(&self, lookup: Lookup) -> Option<Option<(u64, Arc<E::Entry>)>> {
        let recent = |seq: u64| self.recent.get(&seq).map(|e| (seq, e.clone()));
        match lookup {
            Lookup::Seq(seq) if seq == 0 || seq > self.last => Some(None),
            Lookup::Seq(seq) => recent(seq).map(Some),
            Lookup::Id(id) => match self.recent_ids.get(&id) {
                Some(seq) => Some(recent(*seq)),
                None => (!self.filter.may_hold(id)).then_some(None),
            },
        }
    }

    /// The present state, which must be confirmed.
    pub(super) fn snapshot(&self) -> Snapshot {
        let mut state = BytesMut::new();
        state.put_i64(self.at.as_millis());
        self.filter.encode(&mut state);
        state.put_slice(&E::freeze(&self.state));
        Snapshot { seq: self.confirmed, entry_hash: self.last_hash, state: state.freeze() }
    }

    pub(super) fn remember(&mut self, seq: u64, entry: Arc<E::Entry>) {
        for id in E::ids(&entry, seq) {
            self.filter.insert(id);
            self.recent_ids.insert(id, seq);
        }
        self.at = self.at.max(E::at(&entry));
        self.recent.insert(seq, entry);
    }

    pub(super) fn forget_up_to(&mut self, seq: u64) {
        self.derived = self.derived.max(seq);
        self.recent = self.recent.split_off(&(seq + 1));
        self.recent_ids.retain(|_, s| *s > seq);
        if self.recent.is_empty() {
            self.recent_ids.shrink_to_fit();
        }
    }
}
