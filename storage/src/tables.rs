//! The tables beside the log: how each row is keyed and valued, once for every engine. Writes are built here as
//! [`Batch`]es, since only their owner knows the stamp and when to send them.

use std::collections::HashMap;
use std::ops::Bound;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, EntityId, InboxId, TenantId};
use patchbay_protocol::summary::Summary;
use patchbay_protocol::timestamp::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::engine::{
    Batch, CasOutcome, Cell, Document, DocumentKey, Engine, ReadError, Row, RowWrite, Scan, Table, WriteError,
};
use crate::log::LogKey;
use crate::stamp::Stamp;
use crate::value;

/// An id that an entity has seen, hashed: a client's, a provider's, or which entry last told a message's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IdKey(pub [u8; 16]);

impl IdKey {
    /// The key of the parts.
    pub fn of<const N: usize>(parts: [&str; N]) -> Self {
        Self(patchbay_protocol::ids::derived(parts))
    }
}

fn json<T: Serialize>(record: &T) -> Bytes {
    // Our own records are maps with text keys: writing them cannot fail.
    let body = serde_json::to_vec(record).unwrap_or_default();
    value::seal(body.len(), |out| out.put_slice(&body))
}

fn parse<T: DeserializeOwned>(row: &Row) -> Result<T, ReadError> {
    serde_json::from_slice(&value::open(&row.value)?).map_err(|_| ReadError::Damaged)
}

/// How an entity is named in values that wake it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum EntityName {
    Conversation(ConversationId),
    Account(TenantId, AccountId),
    Agent(TenantId, AgentId),
    Inbox(TenantId, InboxId),
}

impl From<&EntityId> for EntityName {
    fn from(id: &EntityId) -> Self {
        match id.clone() {
            EntityId::Conversation(c) => Self::Conversation(c),
            EntityId::Account(t, a) => Self::Account(t, a),
            EntityId::Agent(t, a) => Self::Agent(t, a),
            EntityId::Inbox(t, i) => Self::Inbox(t, i),
        }
    }
}

impl From<EntityName> for EntityId {
    fn from(name: EntityName) -> Self {
        match name {
            EntityName::Conversation(c) => Self::Conversation(c),
            EntityName::Account(t, a) => Self::Account(t, a),
            EntityName::Agent(t, a) => Self::Agent(t, a),
            EntityName::Inbox(t, i) => Self::Inbox(t, i),
        }
    }
}

/// A row of the activity table: this entity wrote in this bucket of its shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    /// Which entity.
    pub entity: EntityId,
    /// The lowest seq that it wrote there.
    pub lowest: u64,
}

#[derive(Serialize, Deserialize)]
struct ActivityRecord {
    entity: EntityName,
    lowest: u64,
}

/// Everything of a shard up to here is published, derived and handed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Default)]
pub struct Mark {
    /// The epoch.
    pub epoch: u32,
    /// The bucket in it; buckets below are settled.
    pub bucket: u64,
}

/// What is noted of a shard beside the logs of its entities.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Up to where it is settled.
    pub settled: Option<Mark>,
    /// The hour from which timers have to be read; none: there never was one.
    pub fired_until: Option<i64>,
    /// What is parked, with the reason.
    pub parked: Vec<(EntityId, String)>,
    /// Conversations whose outbox is parked, and from which seq on.
    pub parked_outboxes: Vec<(ConversationId, u64)>,
    /// How far owners had confirmed logs that they were writing when they gave the shard away: true for ever.
    pub tips: Vec<([u8; 16], u64)>,
}

/// A timer: this entity wants to be woken then. What fires looks, and re-arms if it moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timer {
    /// Which entity.
    pub entity: EntityId,
    /// When.
    pub due: Timestamp,
}

/// An item that could not be taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Its id, rising with time.
    pub id: String,
    /// Whose account it came to.
    pub account: String,
    /// The provider's id of the account that it is for, where it names one.
    #[serde(default)]
    pub external_id: String,
    /// Why.
    pub reason: String,
    /// When.
    pub received_at: Timestamp,
    /// The item as it came.
    pub item: serde_json::Value,
}

/// An agent's presence on one connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The connection.
    pub connection: String,
    /// The incarnation of the node that holds it.
    pub incarnation: u64,
    /// Since when.
    pub since: Timestamp,
    /// What the agent says of itself; none: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<String>,
}

/// The tables of an engine.
#[derive(Clone)]
pub struct Tables {
    engine: Arc<dyn Engine>,
}

fn text(parts: &[&str]) -> Bytes {
    let mut out = Vec::new();
    for part in parts {
        out.put_u16(u16::try_from(part.len()).unwrap_or(u16::MAX));
        out.put_slice(part.as_bytes());
    }
    out.into()
}

fn entity_partition(entity: &[u8; 16]) -> Bytes {
    Bytes::copy_from_slice(entity)
}

fn reference_partition(entity: &[u8; 16], id: IdKey) -> Bytes {
    [&entity[..], &[id.0[0] >> 4]].concat().into()
}

fn activity_partition(shard: u32, mark: Mark) -> Bytes {
    let mut out = Vec::with_capacity(16);
    out.put_u32(shard);
    out.put_u32(mark.epoch);
    out.put_u64(mark.bucket);
    out.into()
}

fn hour_partition(shard: u32, hour: i64) -> Bytes {
    let mut out = Vec::with_capacity(12);
    out.put_u32(shard);
    out.put_i64(hour);
    out.into()
}

/// The hour of an instant, as timers are kept by it.
pub fn hour_of(at: Timestamp) -> i64 {
    at.as_millis().div_euclid(3_600_000)
}

/// The two sets that a conversation's summary may stand in; the newer one counts where it stands in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// Those that are resolved, and others as they once were.
    Past,
    /// Those that are not resolved.
    Open,
}

/// Beside an agent's sessions, whose names are hexadecimal.
const LAST_SEEN: &[u8] = b"last-seen";
/// Parts that a set is spread over.
pub const INBOX_PARTS: u8 = 16;

fn inbox_partition(tenant: &TenantId, account: &AccountId, set: Set, part: u8) -> Bytes {
    let set = match set {
        Set::Past => "all",
        Set::Open => "open",
    };
    let mut out = text(&[tenant.as_str(), account.as_str(), set]).to_vec();
    out.push(part);
    out.into()
}

impl Tables {
    /// The tables of `engine`.
    pub fn new(engine: Arc<dyn Engine>) -> Self {
        Self { engine }
    }

    /// The engine itself.
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// The writes that let `ids` be found again, one batch per partition.
    pub fn reference_writes(key: LogKey, stamp: Stamp, ids: &[(IdKey, u64)]) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        for (id, seq) in ids {
            let partition = reference_partition(&key.entity, *id);
            let value = value::seal(8, |out| out.put_u64(*seq));
            let one = Batch::put(
                key.shard,
                Table::References,
                partition,
                Bytes::copy_from_slice(&id.0),
                stamp,
                value,
            );
            match batches.iter_mut().find(|b| b.partition == one.partition) {
                Some(batch) => batch.rows.extend(one.rows),
                None => batches.push(one),
            }
        }
        batches
    }

    /// The seq that is said to carry `id`. A hint: only that row's own id makes a duplicate.
    pub async fn reference(&self, key: LogKey, id: IdKey) -> Result<Option<u64>, ReadError> {
        let found = self
            .engine
            .get(Table::References, &reference_partition(&key.entity, id), &Bytes::copy_from_slice(&id.0))
            .await?;
        let Some(row) = found else { return Ok(None) };
        let mut value = value::open(&row.value)?;
        if value.len() < 8 { Err(ReadError::Damaged) } else { Ok(Some(value.get_u64())) }
    }

    /// The write that says: this entity wrote in this bucket.
    pub fn activity_write(shard: u32, bucket: Mark, stamp: Stamp, activity: &Activity) -> Batch {
        let record = ActivityRecord { entity: (&activity.entity).into(), lowest: activity.lowest };
        let clustering = Bytes::copy_from_slice(&activity.entity.key());
        Batch::put(
            shard,
            Table::Activity,
            activity_partition(shard, bucket),
            clustering,
            stamp,
            json(&record),
        )
    }

    /// Which entities wrote in a bucket.
    pub async fn activity(&self, shard: u32, bucket: Mark) -> Result<Vec<Activity>, ReadError> {
        let rows = self
            .engine
            .scan(Scan::all(Table::Activity, activity_partition(shard, bucket), usize::MAX))
            .await?;
        let read = |row: &Row| {
            parse::<ActivityRecord>(row).map(|r| Activity { entity: r.entity.into(), lowest: r.lowest })
        };
        rows.iter().map(read).collect()
    }

    /// Drops a settled bucket.
    pub async fn drop_activity(&self, shard: u32, bucket: Mark, stamp: Stamp) -> Result<(), WriteError> {
        self.engine.drop_partition(Table::Activity, activity_partition(shard, bucket), stamp).await
    }

    /// The write that moves the shard's mark.
    pub fn mark_write(shard: u32, stamp: Stamp, mark: Mark) -> Batch {
        Batch::put(
            shard,
            Table::Marks,
            shard_partition(shard),
            Bytes::from_static(SETTLED_UNTIL),
            stamp,
            json(&mark),
        )
    }

    /// The write that moves the shard's timer mark: timers of earlier hours have fired and are acked.
    pub fn fired_write(shard: u32, stamp: Stamp, hour: i64) -> Batch {
        Batch::put(
            shard,
            Table::Marks,
            shard_partition(shard),
            Bytes::from_static(FIRED_UNTIL),
            stamp,
            json(&hour),
        )
    }

    /// The write that says how far logs of a shard were confirmed when it was given away.
    pub fn tips_write(shard: u32, stamp: Stamp, tips: &[([u8; 16], u64)]) -> Batch {
        let clustering = Bytes::from_static(TIPS);
        Batch::put(shard, Table::Marks, shard_partition(shard), clustering, stamp, json(&tips))
    }

    /// The write that parks an entity by name: nothing more is tried with it until an operator looks.
    pub fn park_write(shard: u32, stamp: Stamp, entity: &EntityId, reason: &str) -> Batch {
        let clustering = [PARKED, &entity.key()].concat().into();
        Batch::put(
            shard,
            Table::Marks,
            shard_partition(shard),
            clustering,
            stamp,
            json(&(EntityName::from(entity), reason)),
        )
    }

    /// The write that parks a conversation's outbox: its event from `seq` on is never taken.
    pub fn park_outbox_write(shard: u32, stamp: Stamp, id: ConversationId, seq: u64, why: &str) -> Batch {
        let value = json(&(id, seq, why));
        Batch::put(shard, Table::Marks, shard_partition(shard), unpublished(id), stamp, value)
    }

    /// The write that says that it goes on.
    pub fn unpark_outbox_write(shard: u32, stamp: Stamp, id: ConversationId) -> Batch {
        Batch::delete(shard, Table::Marks, shard_partition(shard), unpublished(id), stamp)
    }

    /// What is noted of a shard.
    pub async fn marks(&self, shard: u32) -> Result<Marks, ReadError> {
        let mut marks = Marks::default();
        for row in self.engine.scan(Scan::all(Table::Marks, shard_partition(shard), usize::MAX)).await? {
            match &row.clustering[..] {
                SETTLED_UNTIL => marks.settled = Some(parse(&row)?),
                FIRED_UNTIL => marks.fired_until = Some(parse(&row)?),
                TIPS => marks.tips = parse(&row)?,
                name if name.starts_with(PARKED) => {
                    let (entity, why): (EntityName, String) = parse(&row)?;
                    marks.parked.push((entity.into(), why));
                }
                name if name.starts_with(UNPUBLISHED) => {
                    let (id, seq, _): (ConversationId, u64, String) = parse(&row)?;
                    marks.parked_outboxes.push((id, seq));
                }
                // Of a later version.
                _ => {}
            }
        }
        Ok(marks)
    }

    /// The write that arms a timer. One due before `fired_hour` goes into that hour.
    pub fn timer_write(shard: u32, stamp: Stamp, timer: &Timer, fired_hour: i64) -> Batch {
        let hour = hour_of(timer.due).max(fired_hour);
        Batch::put(
            shard,
            Table::Timers,
            hour_partition(shard, hour),
            timer_clustering(timer),
            stamp,
            json(&EntityName::from(&timer.entity)),
        )
    }

    /// Timers of an hour, the earliest first.
    pub async fn timers(&self, shard: u32, hour: i64) -> Result<Vec<Timer>, ReadError> {
        let rows =
            self.engine.scan(Scan::all(Table::Timers, hour_partition(shard, hour), usize::MAX)).await?;
        let read = |row: &Row| {
            let due: [u8; 8] =
                row.clustering.get(..8).and_then(|b| b.try_into().ok()).ok_or(ReadError::Damaged)?;
            let entity = parse::<EntityName>(row)?.into();
            Ok(Timer { entity, due: Timestamp::from_millis(i64::from_be_bytes(due)) })
        };
        rows.iter().map(read).collect()
    }

    /// Drops an hour whose timers have all fired.
    pub async fn drop_timers(&self, shard: u32, hour: i64, stamp: Stamp) -> Result<(), WriteError> {
        self.engine.drop_partition(Table::Timers, hour_partition(shard, hour), stamp).await
    }

    /// The writes that show a conversation in its account's sets: one row, and once it is resolved two.
    pub fn inbox_writes(key: LogKey, stamp: Stamp, tenant: &TenantId, summary: &Summary) -> Vec<Batch> {
        let part = key.entity[0] % INBOX_PARTS;
        let clustering = entity_partition(&key.entity);
        let place = |set| inbox_partition(tenant, &summary.account, set, part);
        let put =
            |set| Batch::put(key.shard, Table::Inbox, place(set), clustering.clone(), stamp, json(summary));
        if summary.status == patchbay_protocol::summary::Status::Resolved {
            // What it was before stays behind in the open set no longer; what it is in the other may.
            let gone = Batch::delete(key.shard, Table::Inbox, place(Set::Open), clustering.clone(), stamp);
            vec![put(Set::Past), gone]
        } else {
            vec![put(Set::Open)]
        }
    }

    /// Every summary of an account, in no order.
    pub async fn summaries(&self, tenant: &TenantId, account: &AccountId) -> Result<Vec<Summary>, ReadError> {
        let mut found: HashMap<ConversationId, Summary> = HashMap::new();
        for set in [Set::Past, Set::Open] {
            for part in 0..INBOX_PARTS {
                let partition = inbox_partition(tenant, account, set, part);
                for row in self.engine.scan(Scan::all(Table::Inbox, partition, usize::MAX)).await? {
                    let summary: Summary = parse(&row)?;
                    match found.get(&summary.id) {
                        Some(newer) if newer.last_seq >= summary.last_seq => {}
                        _ => drop(found.insert(summary.id, summary)),
                    }
                }
            }
        }
        Ok(found.into_values().collect())
    }

    /// Summaries of one part of a set, by id, after `after`.
    pub async fn summaries_page(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        set: Set,
        part: u8,
        after: Option<ConversationId>,
        limit: usize,
    ) -> Result<Vec<Summary>, ReadError> {
        let partition = inbox_partition(tenant, account, set, part);
        let from = after.map_or(Bound::Unbounded, |id| Bound::Excluded(entity_partition(id.as_bytes())));
        let rows = self.engine.scan(Scan { from, ..Scan::all(Table::Inbox, partition, limit) }).await?;
        rows.iter().map(parse).collect()
    }

    /// The stored summary of one conversation.
    pub async fn summary(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        id: ConversationId,
    ) -> Result<Option<Summary>, ReadError> {
        let mut newest: Option<Summary> = None;
        for set in [Set::Past, Set::Open] {
            let partition = inbox_partition(tenant, account, set, id.as_bytes()[0] % INBOX_PARTS);
            let row = self.engine.get(Table::Inbox, &partition, &entity_partition(id.as_bytes())).await?;
            let found: Option<Summary> = row.as_ref().map(parse).transpose()?;
            if found.as_ref().map(|s| s.last_seq) > newest.as_ref().map(|s| s.last_seq) {
                newest = found;
            }
        }
        Ok(newest)
    }

    /// The write of an agent's session.
    pub fn session_write(agent: LogKey, stamp: Stamp, session: &Session) -> Batch {
        let clustering = Bytes::copy_from_slice(session.connection.as_bytes());
        Batch::put(
            agent.shard,
            Table::Sessions,
            entity_partition(&agent.entity),
            clustering,
            stamp,
            json(session),
        )
    }

    /// The write that ends it, and says when the agent was last seen.
    pub fn session_delete(agent: LogKey, stamp: Stamp, connection: &str, last_seen: Timestamp) -> Batch {
        let gone =
            RowWrite { clustering: Bytes::copy_from_slice(connection.as_bytes()), stamp, cell: Cell::Delete };
        let seen =
            RowWrite { clustering: Bytes::from_static(LAST_SEEN), stamp, cell: Cell::Put(json(&last_seen)) };
        let partition = entity_partition(&agent.entity);
        Batch { shard: agent.shard, table: Table::Sessions, partition, rows: vec![gone, seen] }
    }

    /// An agent's sessions, and when it was last seen.
    pub async fn sessions(&self, agent: LogKey) -> Result<(Vec<Session>, Option<Timestamp>), ReadError> {
        let rows =
            self.engine.scan(Scan::all(Table::Sessions, entity_partition(&agent.entity), 1000)).await?;
        let (seen, sessions): (Vec<_>, Vec<_>) = rows.iter().partition(|r| r.clustering == LAST_SEEN);
        let sessions = sessions.into_iter().map(parse).collect::<Result<_, _>>()?;
        Ok((sessions, seen.first().map(|r| parse(r)).transpose()?))
    }

    /// The write of a dead letter.
    pub fn dead_letter_write(shard: u32, stamp: Stamp, tenant: &TenantId, letter: &DeadLetter) -> Batch {
        Batch::put(
            shard,
            Table::DeadLetters,
            text(&[tenant.as_str()]),
            Bytes::copy_from_slice(letter.id.as_bytes()),
            stamp,
            json(letter),
        )
    }

    /// The write that removes one.
    pub fn dead_letter_delete(shard: u32, stamp: Stamp, tenant: &TenantId, id: &str) -> Batch {
        Batch::delete(
            shard,
            Table::DeadLetters,
            text(&[tenant.as_str()]),
            Bytes::copy_from_slice(id.as_bytes()),
            stamp,
        )
    }

    /// One dead letter.
    pub async fn dead_letter(&self, tenant: &TenantId, id: &str) -> Result<Option<DeadLetter>, ReadError> {
        let clustering = Bytes::copy_from_slice(id.as_bytes());
        let found = self.engine.get(Table::DeadLetters, &text(&[tenant.as_str()]), &clustering).await?;
        found.as_ref().map(parse).transpose()
    }

    /// A tenant's dead letters after `after`, the oldest first.
    pub async fn dead_letters(
        &self,
        tenant: &TenantId,
        after: &str,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, ReadError> {
        let from = Bound::Excluded(Bytes::copy_from_slice(after.as_bytes()));
        let rows = self
            .engine
            .scan(Scan { from, ..Scan::all(Table::DeadLetters, text(&[tenant.as_str()]), limit) })
            .await?;
        rows.iter().map(parse).collect()
    }

    /// A document read as `T`, with its version.
    pub async fn document<T: DeserializeOwned>(
        &self,
        key: &DocumentKey,
    ) -> Result<Option<(u64, T)>, ReadError> {
        let found = self.engine.document(key).await?;
        found.as_ref().map(parse_document).transpose()
    }

    /// Writes a document if its version is `expected`.
    pub async fn put_document<T: Serialize>(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        record: &T,
    ) -> Result<CasOutcome, WriteError> {
        self.engine.compare_and_set(key, expected, Some(json(record))).await
    }

    /// Documents of a scope and kind with ids after `after`.
    pub async fn documents<T: DeserializeOwned>(
        &self,
        scope: &str,
        kind: &'static str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, T)>, ReadError> {
        let found = self.engine.documents(scope, kind, after, limit).await?;
        found.iter().map(|(id, d)| Ok((id.clone(), parse_document(d)?.1))).collect()
    }
}

fn parse_document<T: DeserializeOwned>(document: &Document) -> Result<(u64, T), ReadError> {
    let value = serde_json::from_slice(&value::open(&document.value)?).map_err(|_| ReadError::Damaged)?;
    Ok((document.version, value))
}

const SETTLED_UNTIL: &[u8] = b"settled_until";
const FIRED_UNTIL: &[u8] = b"fired_until";
const TIPS: &[u8] = b"tips";
const PARKED: &[u8] = b"parked";
const UNPUBLISHED: &[u8] = b"unpublished";

fn unpublished(id: ConversationId) -> Bytes {
    [UNPUBLISHED, id.as_bytes()].concat().into()
}

fn shard_partition(shard: u32) -> Bytes {
    Bytes::copy_from_slice(&shard.to_be_bytes())
}

fn timer_clustering(timer: &Timer) -> Bytes {
    let mut out = Vec::with_capacity(24);
    out.put_i64(timer.due.as_millis().max(0));
    out.put_slice(&timer.entity.key());
    out.into()
}
