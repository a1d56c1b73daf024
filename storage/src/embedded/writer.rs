//! The writer thread: drains what has gathered into one batch, syncs once, answers everyone.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fjall::OwnedWriteBatch;
use tokio::sync::{mpsc, oneshot};

use super::{Keyspaces, Room, Sync, keys};
use crate::engine::{Batch, CLUSTER, CasOutcome, Cell, Document, DocumentKey, Table, WriteError};

/// The most jobs of one group.
const GROUP_JOBS_MAX: usize = 1024;
/// The most bytes of one group, about.
const GROUP_BYTES_MAX: usize = 4 << 20;

/// Groups of about so many jobs are a crowd, for which the writer waits a little.
const CROWD_JOBS: usize = 4;
/// How long.
const GATHER_PAUSE: Duration = Duration::from_micros(500);

/// Between two looks at the disk.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

type Answer<T> = oneshot::Sender<Result<T, WriteError>>;

pub(super) enum Job {
    Write(Batch, Answer<()>),
    Drop(Table, Bytes, Answer<()>),
    CompareAndSet { key: DocumentKey, expected: Option<u64>, value: Option<Bytes>, reply: Answer<CasOutcome> },
}

impl Job {
    /// A node whose disk is full still starts, and serves what is there: its incarnation, its lease and the map of shards
    /// are a few bytes.
    fn is_needed_to_start(&self) -> bool {
        matches!(self, Self::CompareAndSet { key, .. } if key.kind == CLUSTER)
    }

    /// Nothing of it was staged.
    fn refuse(self) {
        // Whoever has gone away does not mind.
        match self {
            Self::Write(_, reply) | Self::Drop(.., reply) => drop(reply.send(Err(WriteError::Full))),
            Self::CompareAndSet { reply, .. } => drop(reply.send(Err(WriteError::Full))),
        }
    }
}

/// What to answer once the group is synced.
enum Pending {
    Done(Answer<()>),
    Cas(Answer<CasOutcome>, CasOutcome),
}

pub(super) struct Writer {
    keyspaces: Arc<Keyspaces>,
    sync: Box<dyn Sync>,
    room: Arc<Room>,
    looked: Instant,
    has_room: bool,
    /// Jobs of the last groups, about.
    crowd: usize,
    /// Rows of the last group.
    rows: usize,
    /// Where a row is put together.
    scratch: Vec<u8>,
    /// The newest epoch seen of each shard: what is older comes from an owner that has been succeeded.
    epochs: HashMap<u32, u32>,
}

struct Group {
    batch: OwnedWriteBatch,
    bytes: usize,
    pending: Vec<Pending>,
    /// Documents changed in this group, which the keyspace does not show yet.
    documents: HashMap<Vec<u8>, (u64, Option<Document>)>,
    /// Whether there is room for more than what a node cannot start without.
    has_room: bool,
}

impl Writer {
    pub(super) fn start(
        keyspaces: Arc<Keyspaces>,
        mut queue: mpsc::Receiver<Job>,
        sync: Box<dyn Sync>,
        room: Arc<Room>,
    ) -> io::Result<()> {
        let looked = Instant::now();
        let mut writer = Self {
            keyspaces,
            sync,
            room,
            looked,
            has_room: true,
            crowd: 0,
            rows: 0,
            scratch: Vec::new(),
            epochs: HashMap::new(),
        };
        std::thread::Builder::new().name("store-writer".into()).spawn(move || {
            while let Some(first) = queue.blocking_recv() {
                writer.group(first, &mut queue);
            }
        })?;
        Ok(())
    }

    fn group(&mut self, first: Job, queue: &mut mpsc::Receiver<Job>) {
        let has_room = self.has_room();
        let batch =
            OwnedWriteBatch::with_capacity(self.keyspaces.database.clone(), self.rows + self.rows / 4);
        let mut group = Group { batch, bytes: 0, pending: Vec::new(), documents: HashMap::new(), has_room };
        self.add(&mut group, first);
        self.drain(&mut group, queue);
        if self.crowd >= CROWD_JOBS {
            // Others are about to write as well: one sync for more of them leaves everybody more of the machine.
            std::thread::sleep(GATHER_PAUSE);
            self.drain(&mut group, queue);
        }
        self.crowd = (self.crowd + group.pending.len()).div_ceil(2);
        self.rows = group.batch.len();
        if group.pending.is_empty() {
            return;
        }
        metrics::counter!("patchbay_storage_groups_total").increment(1);
        metrics::counter!("patchbay_storage_jobs_total").increment(group.pending.len() as u64);
        let started = Instant::now();
        let done = group.batch.commit().and_then(|()| self.sync.sync(&self.keyspaces.database));
        metrics::histogram!("patchbay_storage_commit_seconds").record(started.elapsed().as_secs_f64());
        if let Err(e) = &done {
            tracing::error!(error = %e, "a group could not be written");
            if matches!(e, fjall::Error::Poisoned) {
                self.room.fail();
            }
        }
        for pending in group.pending {
            // Whoever has gone away reads it in the store.
            match (pending, done.is_ok()) {
                (Pending::Done(reply), true) => drop(reply.send(Ok(()))),
                (Pending::Done(reply), false) => drop(reply.send(Err(WriteError::Unknown))),
                (Pending::Cas(reply, outcome), true) => drop(reply.send(Ok(outcome))),
                (Pending::Cas(reply, _), false) => drop(reply.send(Err(WriteError::Unknown))),
            }
        }
    }

    fn drain(&mut self, group: &mut Group, queue: &mut mpsc::Receiver<Job>) {
        while group.pending.len() < GROUP_JOBS_MAX && group.bytes < GROUP_BYTES_MAX {
            match queue.try_recv() {
                Ok(job) => self.add(group, job),
                Err(_) => break,
            }
        }
    }

    /// Looks at the disk now and then, and at every group while it is full.
    fn has_room(&mut self) -> bool {
        if !self.has_room || self.looked.elapsed() >= LOOK_PAUSE {
            (self.looked, self.has_room) = (Instant::now(), self.room.look());
        }
        self.has_room
    }

    fn add(&mut self, group: &mut Group, job: Job) {
        if !group.has_room && !job.is_needed_to_start() {
            return job.refuse();
        }
        match job {
            Job::Write(batch, reply) => {
                self.write(group, &batch);
                group.pending.push(Pending::Done(reply));
            }
            Job::Drop(table, partition, reply) => {
                let keyspace = self.keyspaces.table(table);
                let from = keys::prefix(&partition);
                for guard in keyspace.prefix(&from) {
                    if let Ok(key) = guard.key() {
                        group.batch.remove(keyspace, key);
                    }
                }
                group.pending.push(Pending::Done(reply));
            }
            Job::CompareAndSet { key, expected, value, reply } => {
                match self.compare_and_set(group, &key, expected, value) {
                    Ok(outcome) => group.pending.push(Pending::Cas(reply, outcome)),
                    Err(()) => drop(reply.send(Err(WriteError::Refused))),
                }
            }
        }
    }

    fn write(&mut self, group: &mut Group, batch: &Batch) {
        let newest = self.epochs.entry(batch.shard).or_default();
        let keyspace = self.keyspaces.table(batch.table);
        for row in &batch.rows {
            let epoch = row.stamp.epoch();
            if epoch < *newest {
                metrics::counter!("patchbay_storage_stale_writes_total").increment(1);
                continue;
            }
            *newest = epoch;
            match &row.cell {
                Cell::Put(put) => {
                    let (key, value) =
                        keys::slices(&mut self.scratch, &batch.partition, &row.clustering, row.stamp, put);
                    group.bytes += key.len() + value.len();
                    group.batch.insert(keyspace, key, value);
                }
                Cell::Delete => {
                    group.batch.remove(keyspace, keys::row(&batch.partition, &row.clustering));
                }
            }
        }
    }

    fn compare_and_set(
        &self,
        group: &mut Group,
        key: &DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
    ) -> Result<CasOutcome, ()> {
        let key = keys::document(key);
        let (version, found) = match group.documents.get(&key) {
            Some((version, document)) => (*version, document.clone()),
            None => match self.keyspaces.documents.get(&key).map_err(|_| ())? {
                Some(stored) => keys::decode_document(&stored).ok_or(())?,
                None => (0, None),
            },
        };
        if found.as_ref().map(|d| d.version) != expected {
            return Ok(CasOutcome::Refused(found));
        }
        let version = version + 1;
        group.batch.insert(
            &self.keyspaces.documents,
            key.clone(),
            keys::encode_document(version, value.as_ref()),
        );
        group.documents.insert(key, (version, value.map(|value| Document { version, value })));
        Ok(CasOutcome::Applied)
    }
}
