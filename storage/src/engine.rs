//! What an engine must do, small enough to be implemented three times.

use std::ops::{Bound, RangeBounds};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::stamp::Stamp;

/// The entity tables. Every row has one value cell, is written whole and has one writing entity for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// Log rows: (entity, bucket of seq) / seq.
    Entries,
    /// Folds at a seq: (entity) / one row.
    Snapshots,
    /// Ids that an entity has seen: (entity, part) / id.
    References,
    /// Which entities wrote in a bucket of a shard: (shard, epoch, bucket) / entity.
    Activity,
    /// What is settled of a shard, and what is parked: (shard) / kind.
    Marks,
    /// Summaries: (tenant, account, set, part) / conversation.
    Inbox,
    /// Agents' sessions: (agent) / connection.
    Sessions,
    /// What comes due: (shard, hour) / instant, entity.
    Timers,
    /// Items that could not be taken: (tenant) / id.
    DeadLetters,
    /// Files, where nodes share them: (tenant, file), (tenant, file, group of parts) / part.
    Files,
}

impl Table {
    /// Every table.
    pub const ALL: [Self; 10] = [
        Self::Entries,
        Self::Snapshots,
        Self::References,
        Self::Activity,
        Self::Marks,
        Self::Inbox,
        Self::Sessions,
        Self::Timers,
        Self::DeadLetters,
        Self::Files,
    ];

    /// The table's name in the store.
    pub fn name(self) -> &'static str {
        match self {
            Self::Entries => "entries",
            Self::Snapshots => "snapshots",
            Self::References => "refs",
            Self::Activity => "activity",
            Self::Marks => "marks",
            Self::Inbox => "inbox",
            Self::Sessions => "sessions",
            Self::Timers => "timers",
            Self::DeadLetters => "dead_letters",
            Self::Files => "files",
        }
    }
}

/// A row as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its place in the partition.
    pub clustering: Bytes,
    /// Who wrote it last.
    pub stamp: Stamp,
    /// Its one cell.
    pub value: Bytes,
}

/// What a write does to a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    /// It has this value.
    Put(Bytes),
    /// It is gone.
    Delete,
}

/// One row of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowWrite {
    /// Its place in the partition.
    pub clustering: Bytes,
    /// The write's stamp.
    pub stamp: Stamp,
    /// What becomes of it.
    pub cell: Cell,
}

/// A write of one or more rows of one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The shard of the writing entity, whose epoch fences.
    pub shard: u32,
    /// The table.
    pub table: Table,
    /// The partition.
    pub partition: Bytes,
    /// The rows.
    pub rows: Vec<RowWrite>,
}

impl Batch {
    /// A batch of one row.
    pub fn put(
        shard: u32,
        table: Table,
        partition: Bytes,
        clustering: Bytes,
        stamp: Stamp,
        value: Bytes,
    ) -> Self {
        Self { shard, table, partition, rows: vec![RowWrite { clustering, stamp, cell: Cell::Put(value) }] }
    }

    /// A batch that removes one row.
    pub fn delete(shard: u32, table: Table, partition: Bytes, clustering: Bytes, stamp: Stamp) -> Self {
        Self { shard, table, partition, rows: vec![RowWrite { clustering, stamp, cell: Cell::Delete }] }
    }
}

/// Rows of one partition in order.
#[derive(Clone, Debug)]
pub struct Scan {
    /// The table.
    pub table: Table,
    /// The partition.
    pub partition: Bytes,
    /// Where it begins.
    pub from: Bound<Bytes>,
    /// Where it ends.
    pub to: Bound<Bytes>,
    /// Highest first.
    pub reverse: bool,
    /// At most so many rows.
    pub limit: usize,
}

impl Scan {
    /// Whether a place of its partition is between its ends.
    pub fn covers(&self, place: &Bytes) -> bool {
        RangeBounds::<Bytes>::contains(&(self.from.as_ref(), self.to.as_ref()), place)
    }

    /// The whole partition, up to `limit` rows.
    pub fn all(table: Table, partition: Bytes, limit: usize) -> Self {
        Self { table, partition, from: Bound::Unbounded, to: Bound::Unbounded, reverse: false, limit }
    }
}

/// The kind of the cluster's own documents: written also when the disk is full, since no node starts without them.
pub const CLUSTER: &str = "cluster";

/// Which document.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DocumentKey {
    /// The tenant, or empty for the cluster's own.
    pub scope: String,
    /// What kind of document.
    pub kind: &'static str,
    /// Its id.
    pub id: String,
}

/// A small piece of configuration with its version, from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Rises by one with every change, also across a deletion.
    pub version: u64,
    /// Its value.
    pub value: Bytes,
}

/// What became of a conditional write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CasOutcome {
    /// It was done.
    Applied,
    /// The document was not as expected: this is what it is.
    Refused(Option<Document>),
}

/// Why a write was not answered `Ok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// It was not applied and never will be.
    #[error("refused, not applied")]
    Refused,
    /// There is no room for it: it was not applied.
    #[error("no room, not applied")]
    Full,
    /// It may or may not have been applied, now or later.
    #[error("outcome unknown")]
    Unknown,
}

/// A read that was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The store did not answer; try again.
    #[error("the store did not answer")]
    Unavailable,
    /// What was read is not what can have been written.
    #[error("damaged")]
    Damaged,
}

/// An engine: stamped rows and documents.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Writes rows of one partition. `Ok`: durable. A row whose stamp is below what is there stays as it is, and
    /// the write is still answered `Ok`: its writer learns of its successor from the lease, not from here.
    async fn write(&self, batch: Batch) -> Result<(), WriteError>;

    /// One row.
    async fn get(
        &self,
        table: Table,
        partition: &Bytes,
        clustering: &Bytes,
    ) -> Result<Option<Row>, ReadError>;

    /// Rows of a partition in order.
    async fn scan(&self, scan: Scan) -> Result<Vec<Row>, ReadError>;

    /// Drops a partition that nobody will write again: everything in it up to `stamp`. A crash may leave some of it.
    async fn drop_partition(&self, table: Table, partition: Bytes, stamp: Stamp) -> Result<(), WriteError>;

    /// One document.
    async fn document(&self, key: &DocumentKey) -> Result<Option<Document>, ReadError>;

    /// Replaces (`value`) or deletes (`None`) a document if its version is `expected` (`None`: it is not there).
    async fn compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
    ) -> Result<CasOutcome, WriteError>;

    /// One try of the same, which is waited for no longer than `patience`: past it nobody knows.
    async fn try_compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
        patience: Duration,
    ) -> Result<CasOutcome, WriteError> {
        let change = self.compare_and_set(key, expected, value);
        tokio::time::timeout(patience, change).await.unwrap_or(Err(WriteError::Unknown))
    }

    /// Whether no other process can write to this store while it is open here.
    fn is_exclusive(&self) -> bool {
        false
    }

    /// Documents of a scope and kind with ids after `after`, ascending by id.
    async fn documents(
        &self,
        scope: &str,
        kind: &'static str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Document)>, ReadError>;
}
