//! The embedded engine: fjall, one writer thread, group commit with fsync.
//!
//! Writes go through a bounded queue to one thread that drains what has gathered into one batch, syncs once and
//! answers everyone: thirty times the throughput of a sync per write, and nothing is answered before its sync.
//! Reads run on blocking threads, never on an async worker, at most [`READS_MAX`] at once.
//!
//! Unlike Cassandra it keeps the last arrival, not the highest stamp. The writer therefore drops a write whose epoch
//! is below the newest that it has seen for that shard; within a reign nobody rewrites a row before the write under
//! way is answered.

pub mod backup;
mod directory;
mod journals;
mod keys;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use tokio::sync::{Semaphore, mpsc, oneshot};

pub use directory::{Lock, OpenError, is_store, lock as lock_directory};

use crate::engine::{
    Batch, CasOutcome, Document, DocumentKey, Engine, ReadError, Row, Scan, Table, WriteError,
};
use crate::stamp::Stamp;
use journals::Journals;
use writer::{Job, Writer};

/// Writes waiting for the writer thread; past it callers wait.
pub const QUEUE_MAX: usize = 4096;
/// Reads at once; past it callers wait.
pub const READS_MAX: usize = 64;

/// Makes what was committed survive a power cut. A test puts its own in to hold it or to see what it covers.
pub trait Sync: Send + std::marker::Sync + 'static {
    /// Returns when everything committed so far is on the disk.
    fn sync(&self, database: &Database) -> Result<(), fjall::Error>;
}

/// fdatasync of the journal.
#[derive(Debug, Default, Clone, Copy)]
pub struct SyncData;

impl Sync for SyncData {
    fn sync(&self, database: &Database) -> Result<(), fjall::Error> {
        database.persist(PersistMode::SyncData)
    }
}

/// Room beyond the bound that must be free again before writes are taken, at most.
const HYSTERESIS_MAX: u64 = 64 << 20;

/// Whether there is room on the disk, and whether the store still takes writes.
#[derive(Debug)]
pub(crate) struct Room {
    path: PathBuf,
    min_free: AtomicU64,
    full: AtomicBool,
    failed: AtomicBool,
}

impl Room {
    fn of(path: &Path) -> Self {
        let total = rustix::fs::statvfs(path).map_or(0, |s| s.f_blocks * s.f_frsize);
        let min_free = (total / 20).clamp(8 << 20, 256 << 20);
        Self {
            path: path.to_owned(),
            min_free: AtomicU64::new(min_free),
            full: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        }
    }

    /// Looks; tells whether there is room. Full begins at the bound and ends somewhat above it.
    pub(crate) fn look(&self) -> bool {
        let Ok(found) = rustix::fs::statvfs(&self.path) else { return true };
        let (free, min) = (found.f_bavail * found.f_frsize, self.min_free.load(Ordering::Relaxed));
        let was = self.full.load(Ordering::Relaxed);
        let full = free < if was { min.saturating_add((min / 4).min(HYSTERESIS_MAX)) } else { min };
        if full != was {
            self.full.store(full, Ordering::Relaxed);
            tracing::warn!(free_mib = free >> 20, full, "the disk");
        }
        metrics::gauge!("patchbay_storage_free_bytes").set(free as f64);
        !full
    }

    pub(crate) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    fn refuses(&self) -> Option<&'static str> {
        if self.failed.load(Ordering::Relaxed) {
            Some("the store takes no more writes: restart the node")
        } else if !self.look() {
            Some("the disk is full")
        } else {
            None
        }
    }
}

/// Journals that a start reads again; past it tables are written out.
const JOURNALS_BYTES_MAX: u64 = 128 << 20;

/// What a table holds in memory before it is written out.
const MEMTABLE_BYTES_MAX: u64 = 16 << 20;

pub(crate) fn options() -> KeyspaceCreateOptions {
    KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES_MAX)
}

/// Opens the store below a data directory. A torn tail is cut and reported; damage before it is not.
fn open_store(path: &Path) -> Result<Database, OpenError> {
    let store = path.join("store");
    let journals = Journals::look(path, &store)?;
    // What it finds in a damaged journal can make the engine panic.
    let opened = std::panic::catch_unwind(|| {
        let builder = Database::builder(&store).cache_size(64 << 20).worker_threads(2);
        builder.max_journaling_size(JOURNALS_BYTES_MAX).open()
    });
    match opened.unwrap_or(Err(fjall::Error::Unrecoverable)) {
        Ok(database) => {
            journals.check()?;
            Ok(database)
        }
        Err(error) => {
            journals.restore()?;
            Err(match error {
                fjall::Error::Io(error) => OpenError::Io(error),
                error => OpenError::Damaged(format!("{}: {error}", store.display())),
            })
        }
    }
}

/// The keyspaces of a database.
pub(crate) struct Keyspaces {
    pub(crate) database: Database,
    tables: Vec<Keyspace>,
    pub(crate) documents: Keyspace,
}

impl Keyspaces {
    pub(crate) fn table(&self, table: Table) -> &Keyspace {
        &self.tables[table as usize]
    }
}

/// A data directory, open and locked.
pub struct Embedded {
    keyspaces: Arc<Keyspaces>,
    jobs: mpsc::Sender<Job>,
    reads: Arc<Semaphore>,
    room: Arc<Room>,
    // Held for as long as the directory is open.
    _lock: directory::Lock,
}

impl Embedded {
    /// Opens `path`, or makes it. Refuses a directory in use, a foreign one and one of a newer format.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::open_with(path, SyncData)
    }

    /// As [`Self::open`], with a sync call of one's own.
    pub fn open_with(path: &Path, sync: impl Sync) -> Result<Self, OpenError> {
        let lock = directory::prepare(path)?;
        let database = open_store(path)?;
        let mut tables = Vec::with_capacity(Table::ALL.len());
        for table in Table::ALL {
            tables.push(database.keyspace(table.name(), options)?);
        }
        let documents = database.keyspace("documents", options)?;
        let keyspaces = Arc::new(Keyspaces { database, tables, documents });
        let (jobs, queue) = mpsc::channel(QUEUE_MAX);
        let room = Arc::new(Room::of(path));
        Writer::start(keyspaces.clone(), queue, Box::new(sync), room.clone())?;
        Ok(Self { keyspaces, jobs, reads: Arc::new(Semaphore::new(READS_MAX)), room, _lock: lock })
    }

    /// Refuses writes when less than this is free on the disk, instead of a twentieth of it (8 to 256 MiB).
    pub fn set_min_free(&self, bytes: u64) {
        self.room.min_free.store(bytes, Ordering::Relaxed);
    }

    /// Why nothing can be written, if so.
    pub fn refuses(&self) -> Option<&'static str> {
        self.room.refuses()
    }

    async fn ask<T>(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<T, WriteError>>) -> Job,
    ) -> Result<T, WriteError> {
        let (reply, answer) = oneshot::channel();
        // Nothing has left when the queue is closed; after that only the writer knows.
        self.jobs.send(job(reply)).await.map_err(|_| WriteError::Refused)?;
        answer.await.unwrap_or(Err(WriteError::Unknown))
    }

    async fn read<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Keyspaces) -> fjall::Result<T> + Send + 'static,
    ) -> Result<T, ReadError> {
        let permit = self.reads.clone().acquire_owned().await.map_err(|_| ReadError::Unavailable)?;
        let keyspaces = self.keyspaces.clone();
        let task = tokio::task::spawn_blocking(move || {
            let found = f(&keyspaces);
            drop(permit);
            found
        });
        match task.await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(e)) => {
                tracing::error!(error = %e, "a read failed");
                // What the engine cannot read is not what was written; what the disk did not answer may come.
                let answered =
                    !matches!(e, fjall::Error::Io(_) | fjall::Error::Storage(fjall::LsmError::Io(_)));
                Err(if answered { ReadError::Damaged } else { ReadError::Unavailable })
            }
            Err(_) => Err(ReadError::Unavailable),
        }
    }
}

#[async_trait]
impl Engine for Embedded {
    async fn write(&self, batch: Batch) -> Result<(), WriteError> {
        self.ask(|reply| Job::Write(batch, reply)).await
    }

    async fn get(
        &self,
        table: Table,
        partition: &Bytes,
        clustering: &Bytes,
    ) -> Result<Option<Row>, ReadError> {
        let key = keys::row(partition, clustering);
        let clustering = clustering.clone();
        let found = self.read(move |k| k.table(table).get(&key)).await?;
        found.map(|v| keys::decode(clustering, &v)).transpose()
    }

    async fn scan(&self, scan: Scan) -> Result<Vec<Row>, ReadError> {
        let prefix = keys::prefix(&scan.partition).len();
        let range = keys::range(&scan);
        let found = self
            .read(move |k| {
                let iter = k.table(scan.table).range(range);
                let take = |g: fjall::Guard| g.into_inner();
                let rows: fjall::Result<Vec<_>> = if scan.reverse {
                    iter.rev().take(scan.limit).map(take).collect()
                } else {
                    iter.take(scan.limit).map(take).collect()
                };
                rows
            })
            .await?;
        found.into_iter().map(|(k, v)| keys::decode(Bytes::copy_from_slice(&k[prefix..]), &v)).collect()
    }

    async fn drop_partition(&self, table: Table, partition: Bytes, _: Stamp) -> Result<(), WriteError> {
        self.ask(|reply| Job::Drop(table, partition, reply)).await
    }

    async fn document(&self, key: &DocumentKey) -> Result<Option<Document>, ReadError> {
        let key = keys::document(key);
        let found = self.read(move |k| k.documents.get(&key)).await?;
        Ok(found.and_then(|v| keys::decode_document(&v)?.1))
    }

    async fn compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
    ) -> Result<CasOutcome, WriteError> {
        self.ask(|reply| Job::CompareAndSet { key, expected, value, reply }).await
    }

    /// The directory is locked.
    fn is_exclusive(&self) -> bool {
        true
    }

    async fn documents(
        &self,
        scope: &str,
        kind: &'static str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Document)>, ReadError> {
        let prefix = keys::document_prefix(scope, kind);
        let after = keys::document(&DocumentKey { scope: scope.to_owned(), kind, id: after.to_owned() });
        let skip = prefix.len();
        self.read(move |k| {
            let mut found = Vec::new();
            let range = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
            for guard in k.documents.range(range) {
                let (key, value) = guard.into_inner()?;
                if !key.starts_with(&prefix) || found.len() == limit {
                    break;
                }
                if let Some((_, Some(document))) = keys::decode_document(&value) {
                    found.push((String::from_utf8_lossy(&key[skip..]).into_owned(), document));
                }
            }
            Ok(found)
        })
        .await
    }
}
