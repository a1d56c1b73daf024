//! The entity log: the one append, adopt, read and snapshot path of every entity that keeps something durable.
//!
//! Every row lies in the bucket of its own seq, so that a seq has one place for ever. It carries the append's first
//! seq and length and the seq that its owner had confirmed when it wrote it; the stamp stands beside the value. An
//! append across a bucket's edge is two batches, confirmed when both are answered; half of one is an incomplete
//! append, which the next owner drops.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use patchbay_protocol::ids::CommandId;

use crate::engine::{Batch, Cell, Engine, ReadError, Row, RowWrite, Scan, Table, WriteError};
use crate::stamp::Stamp;
use crate::value;

/// Rows of one bucket: a partition of the store stays small however long the log grows.
pub const BUCKET_ROWS: u64 = 4096;
/// The most rows of one append.
pub const APPEND_ROWS_MAX: usize = 64;

/// Which log: the entity's key and its shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LogKey {
    /// The entity's key.
    pub entity: [u8; 16],
    /// The entity's shard.
    pub shard: u32,
}

/// A row of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRow {
    /// Its place.
    pub seq: u64,
    /// Who wrote it last.
    pub stamp: Stamp,
    /// The first seq of its append.
    pub first: u64,
    /// The length of its append.
    pub length: u8,
    /// The stamp that its append was first written under; an adoption keeps it.
    pub origin: Stamp,
    /// What its owner had confirmed when it wrote it.
    pub confirmed: u64,
    /// The command that made it.
    pub command: CommandId,
    /// The entry.
    pub payload: Bytes,
}

/// An append: its bytes are bound to its seqs for the reign once it has left the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Append {
    /// The batches that are not answered yet, in the order of their buckets.
    pub batches: Vec<Batch>,
    /// The last seq.
    pub last: u64,
}

impl Append {
    /// The rows `payloads`, from `first` on.
    pub fn new(
        key: LogKey,
        stamp: Stamp,
        first: u64,
        confirmed: u64,
        payloads: &[(CommandId, Bytes)],
    ) -> Self {
        let length = u8::try_from(payloads.len()).unwrap_or(u8::MAX);
        debug_assert!(!payloads.is_empty() && payloads.len() <= APPEND_ROWS_MAX);
        let rows = (first..).zip(payloads).map(|(seq, (command, payload))| {
            (
                seq,
                LogRow {
                    seq,
                    stamp,
                    first,
                    length,
                    origin: stamp,
                    confirmed,
                    command: *command,
                    payload: payload.clone(),
                },
            )
        });
        Self { batches: by_bucket(key, stamp, rows), last: first + u64::from(length) - 1 }
    }
}

fn by_bucket(key: LogKey, stamp: Stamp, rows: impl Iterator<Item = (u64, LogRow)>) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::with_capacity(1);
    for (seq, row) in rows {
        let partition = partition(key, seq / BUCKET_ROWS);
        let write = RowWrite { clustering: clustering(seq), stamp, cell: Cell::Put(encode(&row)) };
        match batches.last_mut() {
            Some(b) if b.partition == partition => b.rows.push(write),
            _ => {
                batches.push(Batch { shard: key.shard, table: Table::Entries, partition, rows: vec![write] })
            }
        }
    }
    batches
}

fn partition(key: LogKey, bucket: u64) -> Bytes {
    let mut out = Vec::with_capacity(24);
    out.put_slice(&key.entity);
    out.put_u64(bucket);
    out.into()
}

fn clustering(seq: u64) -> Bytes {
    Bytes::copy_from_slice(&seq.to_be_bytes())
}

const HEADER: usize = 8 + 1 + 8 + 8 + 16;

fn encode(row: &LogRow) -> Bytes {
    value::seal(HEADER + row.payload.len(), |out| {
        out.put_u64(row.first);
        out.put_u8(row.length);
        out.put_u64(row.origin.as_u64());
        out.put_u64(row.confirmed);
        out.put_slice(&row.command.0);
        out.put_slice(&row.payload);
    })
}

fn decode(row: &Row) -> Result<LogRow, ReadError> {
    let mut rest = value::open(&row.value)?;
    let seq: [u8; 8] = row.clustering.as_ref().try_into().map_err(|_| ReadError::Damaged)?;
    if rest.len() < HEADER {
        return Err(ReadError::Damaged);
    }
    let (first, length, origin, confirmed) =
        (rest.get_u64(), rest.get_u8(), Stamp::from_u64(rest.get_u64()), rest.get_u64());
    let mut command = [0; 16];
    rest.copy_to_slice(&mut command);
    Ok(LogRow {
        seq: u64::from_be_bytes(seq),
        stamp: row.stamp,
        first,
        length,
        origin,
        confirmed,
        command: CommandId(command),
        payload: rest,
    })
}

/// A fold of the log up to a seq.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Every entry up to here is in it, and everything derived from them is durable.
    pub seq: u64,
    /// A hash of row `seq`'s entry: a mismatch is damage.
    pub entry_hash: [u8; 16],
    /// The state.
    pub state: Bytes,
}

/// The hash that a snapshot names its last entry by.
pub fn entry_hash(payload: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&blake3::hash(payload).as_bytes()[..16]);
    out
}

/// What an owner finds of its log when it is activated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Rows above the snapshot that stand, ascending and without a gap.
    pub rows: Vec<LogRow>,
    /// Up to here an earlier owner had confirmed.
    pub confirmed: u64,
    /// The highest stamp seen.
    pub stamp_max: Option<Stamp>,
}

/// Why a log cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// The store did not answer.
    #[error("the store did not answer")]
    Unavailable,
    /// There is no room for what must be written first.
    #[error("no room")]
    Full,
    /// A confirmed row is missing or not what was written: the entity is parked, nothing is overwritten.
    #[error("damaged at seq {0}")]
    Damaged(u64),
    /// A later owner has written: this one stops, and overwrites nothing.
    #[error("a later owner has written under stamp {0}")]
    Succeeded(Stamp),
}

impl From<ReadError> for AdoptError {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::Unavailable => Self::Unavailable,
            ReadError::Damaged => Self::Damaged(0),
        }
    }
}

/// The logs of an engine.
#[derive(Clone)]
pub struct Logs {
    engine: Arc<dyn Engine>,
}

impl Logs {
    /// The logs of `engine`.
    pub fn new(engine: Arc<dyn Engine>) -> Self {
        Self { engine }
    }

    /// Tries once to write what is not answered yet of `append`. `Refused` only when this was the first attempt,
    /// had one batch and was refused: then nothing is bound. Otherwise whatever is left is [`WriteError::Unknown`].
    pub async fn attempt(&self, append: &mut Append, first_attempt: bool) -> Result<(), WriteError> {
        let only_batch = append.batches.len() == 1;
        let mut left = Vec::new();
        for batch in std::mem::take(&mut append.batches) {
            match self.engine.write(batch.clone()).await {
                Ok(()) => {}
                Err(refused @ (WriteError::Refused | WriteError::Full)) if first_attempt && only_batch => {
                    append.batches = vec![batch];
                    return Err(refused);
                }
                Err(WriteError::Refused | WriteError::Full | WriteError::Unknown) => left.push(batch),
            }
        }
        append.batches = left;
        if append.batches.is_empty() { Ok(()) } else { Err(WriteError::Unknown) }
    }

    /// Writes the same bytes under the same stamp until they are answered. Cancel-safe in the sense of the design:
    /// what was cancelled is of unknown outcome and left to the next adoption.
    pub async fn append(&self, mut append: Append) -> Result<(), WriteError> {
        let mut pause = Duration::from_millis(5);
        let mut first = true;
        loop {
            match self.attempt(&mut append, first).await {
                Ok(()) => return Ok(()),
                Err(refused @ (WriteError::Refused | WriteError::Full)) => return Err(refused),
                Err(WriteError::Unknown) => {}
            }
            first = false;
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Reads what stands above `base` (a snapshot's seq, or 0) without changing anything: rows up to the first gap,
    /// incomplete append or falling stamp. Below what any row says was confirmed nothing may be missing.
    pub async fn tail(&self, key: LogKey, base: u64) -> Result<Tail, AdoptError> {
        self.tail_told(key, base, 0).await
    }

    /// The same where an owner has said beside the log that it had confirmed everything up to `told`: that is true for
    /// ever, whoever has written since.
    pub async fn tail_told(&self, key: LogKey, base: u64, told: u64) -> Result<Tail, AdoptError> {
        let rows = self.all_above(key, base).await?;
        let confirmed = rows.iter().map(|r| r.confirmed).max().unwrap_or(0).max(base).max(told);
        let stamp_max = rows.iter().map(|r| r.stamp).max();
        let mut standing: Vec<LogRow> = Vec::with_capacity(rows.len());
        for row in &rows {
            let expected = base + 1 + standing.len() as u64;
            if row.seq != expected {
                break;
            }
            let falls = standing.last().is_some_and(|p: &LogRow| row.stamp < p.stamp);
            if row.seq > confirmed && (falls || !is_complete(&rows, row)) {
                break;
            }
            standing.push(row.clone());
        }
        let reached = base + standing.len() as u64;
        if reached < confirmed {
            return Err(AdoptError::Damaged(reached + 1));
        }
        Ok(Tail { rows: standing, confirmed, stamp_max })
    }

    async fn all_above(&self, key: LogKey, base: u64) -> Result<Vec<LogRow>, ReadError> {
        let mut rows = Vec::new();
        let mut bucket = (base + 1) / BUCKET_ROWS;
        loop {
            let partition = partition(key, bucket);
            let from = std::ops::Bound::Excluded(clustering(base));
            let scan = Scan { from, ..Scan::all(Table::Entries, partition, BUCKET_ROWS as usize) };
            let found = self.engine.scan(scan).await?;
            if found.is_empty() && bucket > (base + 1) / BUCKET_ROWS {
                return Ok(rows);
            }
            for row in &found {
                rows.push(decode(row)?);
            }
            bucket += 1;
        }
    }

    /// Writes the unconfirmed rows of `tail` again, all under one stamp and with their old append headers, from the
    /// newest bucket to the oldest, each answered before the next: a crash in between leaves stamps that rise.
    pub async fn rewrite(&self, key: LogKey, stamp: Stamp, tail: &Tail) -> Result<(), AdoptError> {
        let unconfirmed = tail.rows.iter().filter(|r| r.seq > tail.confirmed);
        let batches = by_bucket(key, stamp, unconfirmed.map(|r| (r.seq, r.clone())));
        for batch in batches.into_iter().rev() {
            self.write_until_answered(batch).await;
        }
        Ok(())
    }

    /// Writes one batch until it is answered. Used for derived rows and adoption, whose bytes never change.
    pub async fn write_until_answered(&self, batch: Batch) {
        let mut pause = Duration::from_millis(5);
        while self.engine.write(batch.clone()).await.is_err() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// As [`Self::write_until_answered`], but gives up while there is no room and nothing has left yet.
    pub async fn write_if_room(&self, batch: Batch) -> Result<(), WriteError> {
        match self.engine.write(batch.clone()).await {
            Ok(()) => Ok(()),
            Err(WriteError::Full) => Err(WriteError::Full),
            Err(WriteError::Refused | WriteError::Unknown) => {
                self.write_until_answered(batch).await;
                Ok(())
            }
        }
    }

    /// Rows after `after` up to and including `to`, ascending; at most `limit` rows and about `bytes_max` bytes
    /// (always at least one row where there is one).
    pub async fn forward(
        &self,
        key: LogKey,
        after: u64,
        to: u64,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Vec<LogRow>, ReadError> {
        let mut page = Page::new(limit, bytes_max);
        let mut next = after + 1;
        while next <= to && !page.is_full() {
            let bucket = next / BUCKET_ROWS;
            let end = to.min((bucket + 1) * BUCKET_ROWS - 1);
            let found = self.range(key, bucket, next, end, false, page.room()).await?;
            if found.is_empty() {
                // Below a confirmed tip there is no hole.
                return Err(ReadError::Damaged);
            }
            for row in found {
                if row.seq != next {
                    return Err(ReadError::Damaged);
                }
                next += 1;
                if !page.push(row) {
                    return Ok(page.rows);
                }
            }
        }
        Ok(page.rows)
    }

    /// Rows before `before` down to seq 1, descending; bounded as [`Self::forward`].
    pub async fn backward(
        &self,
        key: LogKey,
        before: u64,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Vec<LogRow>, ReadError> {
        let mut page = Page::new(limit, bytes_max);
        let mut next = before.saturating_sub(1);
        while next >= 1 && !page.is_full() {
            let bucket = next / BUCKET_ROWS;
            let found =
                self.range(key, bucket, (bucket * BUCKET_ROWS).max(1), next, true, page.room()).await?;
            if found.is_empty() {
                return Err(ReadError::Damaged);
            }
            for row in found {
                if row.seq != next {
                    return Err(ReadError::Damaged);
                }
                next -= 1;
                if !page.push(row) {
                    return Ok(page.rows);
                }
            }
        }
        Ok(page.rows)
    }

    async fn range(
        &self,
        key: LogKey,
        bucket: u64,
        from: u64,
        to: u64,
        reverse: bool,
        limit: usize,
    ) -> Result<Vec<LogRow>, ReadError> {
        let scan = Scan {
            table: Table::Entries,
            partition: partition(key, bucket),
            from: std::ops::Bound::Included(clustering(from)),
            to: std::ops::Bound::Included(clustering(to)),
            reverse,
            limit,
        };
        self.engine.scan(scan).await?.iter().map(decode).collect()
    }

    /// One row.
    pub async fn row(&self, key: LogKey, seq: u64) -> Result<Option<LogRow>, ReadError> {
        let found =
            self.engine.get(Table::Entries, &partition(key, seq / BUCKET_ROWS), &clustering(seq)).await?;
        found.as_ref().map(decode).transpose()
    }

    /// The entity's snapshot, checked against the entry that it names.
    /// With the stamp that it was written under.
    pub async fn snapshot(&self, key: LogKey) -> Result<Option<(Stamp, Snapshot)>, AdoptError> {
        let found = self
            .engine
            .get(Table::Snapshots, &Bytes::copy_from_slice(&key.entity), &Bytes::from_static(b"s"))
            .await?;
        let Some(found) = found else { return Ok(None) };
        let mut rest = value::open(&found.value)?;
        if rest.len() < 24 {
            return Err(AdoptError::Damaged(0));
        }
        let seq = rest.get_u64();
        let mut hash = [0; 16];
        rest.copy_to_slice(&mut hash);
        let row = self.row(key, seq).await?.ok_or(AdoptError::Damaged(seq))?;
        if entry_hash(&row.payload) != hash {
            return Err(AdoptError::Damaged(seq));
        }
        Ok(Some((found.stamp, Snapshot { seq, entry_hash: hash, state: rest })))
    }

    /// The write that stores `snapshot`.
    pub fn snapshot_write(key: LogKey, stamp: Stamp, snapshot: &Snapshot) -> Batch {
        let value = value::seal(24 + snapshot.state.len(), |out| {
            out.put_u64(snapshot.seq);
            out.put_slice(&snapshot.entry_hash);
            out.put_slice(&snapshot.state);
        });
        Batch::put(
            key.shard,
            Table::Snapshots,
            Bytes::copy_from_slice(&key.entity),
            Bytes::from_static(b"s"),
            stamp,
            value,
        )
    }
}

/// Whether every row of `row`'s append is there: the rows that were first written under one stamp. An adoption that
/// crashed between two buckets leaves them under two, which rise.
fn is_complete(rows: &[LogRow], row: &LogRow) -> bool {
    let last = row.first + u64::from(row.length) - 1;
    let mut expected = row.first;
    // Rows below the base are confirmed by the snapshot.
    if let Some(lowest) = rows.first() {
        expected = expected.max(lowest.seq);
    }
    for r in rows.iter().filter(|r| (row.first..=last).contains(&r.seq)) {
        if r.seq != expected || r.origin != row.origin || r.first != row.first || r.length != row.length {
            return false;
        }
        expected += 1;
    }
    expected == last + 1
}

struct Page {
    rows: Vec<LogRow>,
    limit: usize,
    bytes_left: usize,
}

impl Page {
    fn new(limit: usize, bytes_max: usize) -> Self {
        Self { rows: Vec::new(), limit, bytes_left: bytes_max }
    }

    fn is_full(&self) -> bool {
        self.rows.len() >= self.limit
    }

    fn room(&self) -> usize {
        // Read in steps, so that the byte bound is not overshot by a whole page of large rows.
        (self.limit - self.rows.len()).min(256)
    }

    /// False when the page is full without this row.
    fn push(&mut self, row: LogRow) -> bool {
        if !self.rows.is_empty() && row.payload.len() > self.bytes_left {
            return false;
        }
        self.bytes_left = self.bytes_left.saturating_sub(row.payload.len());
        self.rows.push(row);
        true
    }
}
