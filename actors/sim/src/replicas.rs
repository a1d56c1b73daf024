//! A store of three replicas, as a Cassandra cluster is one: every row lies on all three, a write is answered when two have
//! it, a read asks two and takes the cell with the higher stamp.
//!
//! What reaches only one replica is answered as unknown; it may be seen by one read and not by the next, come back by a hint
//! seconds later, or be spread by a read that met it. A request may reach the store long after its sender has given up.
//! A conditional write is decided once, in one order, maybe late, maybe unheard.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use patchbay_storage::model::wins;
use patchbay_storage::{
    Batch, CasOutcome, Cell, Document, DocumentKey, Engine, ReadError, Row, RowWrite, Scan, Stamp, Table,
    WriteError,
};
use tokio::sync::oneshot;

use crate::world::{World, lock};

const REPLICAS: usize = 3;
/// After so long whoever asked is told that nobody knows.
const DEADLINE_MS: u64 = 400;
/// A change that is not answered is settled for so long.
const SETTLE_MS: u64 = 10_000;

type Key = (Table, Bytes, Bytes);
type Cells = BTreeMap<Key, (Stamp, Cell)>;

#[derive(Default)]
struct Replica {
    cells: Cells,
    /// Partitions that were dropped, and up to which stamp.
    dropped: BTreeMap<(Table, Bytes), Stamp>,
    /// It is away until then: what is sent to it is lost, or hinted.
    away_until: u64,
    /// It stands still until then: what is sent to it is done after.
    frozen_until: u64,
}

impl Replica {
    fn put(&mut self, key: Key, stamp: Stamp, cell: &Cell) {
        if self.cells.get(&key).is_none_or(|(s, c)| wins((stamp, cell), (*s, c))) {
            self.cells.insert(key, (stamp, cell.clone()));
        }
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Rows(batch) => {
                for RowWrite { clustering, stamp, cell } in &batch.rows {
                    self.put((batch.table, batch.partition.clone(), clustering.clone()), *stamp, cell);
                }
            }
            Change::Drop(table, partition, stamp) => {
                let at = self.dropped.entry((*table, partition.clone())).or_insert(*stamp);
                *at = (*at).max(*stamp);
            }
        }
    }

    fn read(&self, table: Table, partition: &Bytes) -> (Cells, Option<Stamp>) {
        let start = (table, partition.clone(), Bytes::new());
        let cells = self.cells.range(start..).take_while(|((t, p, _), _)| *t == table && p == partition);
        let dropped = self.dropped.get(&(table, partition.clone())).copied();
        (cells.map(|(key, cell)| (key.clone(), cell.clone())).collect(), dropped)
    }
}

enum Change {
    Rows(Batch),
    Drop(Table, Bytes, Stamp),
}

struct Stored {
    version: u64,
    value: Option<Bytes>,
    /// Which try made it.
    writer: u64,
}

impl Stored {
    fn document(&self) -> Option<Document> {
        self.value.clone().map(|value| Document { version: self.version, value })
    }
}

#[derive(Default)]
struct Inner {
    replicas: [Replica; REPLICAS],
    documents: BTreeMap<DocumentKey, Stored>,
    /// Who has written under which epoch of which shard.
    reigns: HashMap<(u32, u32), u64>,
    tries: u64,
}

/// The store.
#[derive(Clone)]
pub(crate) struct Replicas {
    world: World,
    inner: Arc<Mutex<Inner>>,
}

/// What is asked of two replicas or written to three, and has been answered by as many.
struct Answers<T> {
    replicas: Vec<usize>,
    waits: Option<oneshot::Sender<T>>,
}

impl<T> Answers<T> {
    fn new(waits: oneshot::Sender<T>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { replicas: Vec::new(), waits: Some(waits) }))
    }

    /// One more: with the second one there is an answer.
    fn add(&mut self, replica: usize) -> Option<(oneshot::Sender<T>, Vec<usize>)> {
        self.replicas.push(replica);
        if self.replicas.len() < 2 {
            return None;
        }
        Some((self.waits.take()?, self.replicas.clone()))
    }
}

impl Replicas {
    pub(crate) fn new(world: World) -> Self {
        Self { world, inner: Arc::default() }
    }

    /// A replica is away for so long.
    pub(crate) fn goes(&self, replica: usize, ms: u64) {
        lock(&self.inner).replicas[replica].away_until = self.world.now() + ms;
    }

    /// Stands still for so long.
    pub(crate) fn freezes(&self, replica: usize, ms: u64) {
        lock(&self.inner).replicas[replica].frozen_until = self.world.now() + ms;
    }

    /// Everything works from here on.
    pub(crate) fn heal(&self) {
        for replica in &mut lock(&self.inner).replicas {
            (replica.away_until, replica.frozen_until) = (0, 0);
        }
    }

    /// The way of one process to it.
    pub(crate) fn handle(&self, who: u64) -> Handle {
        Handle { store: self.clone(), who, cut_until: Arc::default() }
    }

    /// How long until a replica does what is sent to it now; none: it never does.
    fn reaches(&self, replica: usize) -> Option<u64> {
        let (now, world) = (self.world.now(), &self.world);
        let (away, frozen) = {
            let inner = lock(&self.inner);
            let replica = &inner.replicas[replica];
            (replica.away_until.saturating_sub(now), replica.frozen_until.saturating_sub(now))
        };
        if away > 0 {
            return None;
        }
        let usual = world.between(0, 4);
        let late = if world.mishap(30) { world.between(50, 3_000) } else { 0 };
        (!world.mishap(15)).then_some(frozen + usual + late)
    }

    /// Sends a change to all three. What does not reach one may come to it by a hint.
    fn change(&self, change: Change, waits: oneshot::Sender<()>) {
        let answers = Answers::new(waits);
        let change = Arc::new(change);
        for replica in 0..REPLICAS {
            let (store, change, answers) = (self.clone(), change.clone(), answers.clone());
            match self.reaches(replica) {
                Some(ms) => self.world.after(ms, move || {
                    lock(&store.inner).replicas[replica].apply(&change);
                    if let Some((waits, _)) = lock(&answers).add(replica) {
                        store.world.after(1, move || waits.send(()).unwrap_or_default());
                    }
                }),
                None if self.world.chance(700) => {
                    let away =
                        lock(&self.inner).replicas[replica].away_until.saturating_sub(self.world.now());
                    self.world.after(away + self.world.between(100, 6_000), move || {
                        lock(&store.inner).replicas[replica].apply(&change);
                    });
                }
                None => {}
            }
        }
    }

    /// Asks two replicas for a partition, and mends what one has and the other has not.
    fn read(&self, scan: Scan, waits: oneshot::Sender<Vec<Row>>) {
        let (answers, scan) = (Answers::new(waits), Arc::new(scan));
        let left_out = self.world.between(0, REPLICAS as u64) as usize;
        // One that does not answer is made up for by the third.
        let mut asked: Vec<(usize, Option<u64>)> =
            (0..REPLICAS).filter(|r| *r != left_out).map(|r| (r, self.reaches(r))).collect();
        if asked.iter().any(|(_, ms)| ms.is_none_or(|ms| ms > 50)) {
            asked.push((left_out, self.reaches(left_out).map(|ms| ms + 50)));
        }
        for (replica, ms) in asked.into_iter().filter_map(|(r, ms)| Some((r, ms?))) {
            let (store, answers, scan) = (self.clone(), answers.clone(), scan.clone());
            self.world.after(ms, move || {
                if let Some((waits, both)) = lock(&answers).add(replica) {
                    store.mend(&scan, &both);
                    drop(waits.send(store.rows(replica, &scan)));
                }
            });
        }
    }

    /// What one of both has of it, the other has as well.
    fn mend(&self, scan: &Scan, both: &[usize]) {
        let (table, partition) = (scan.table, &scan.partition);
        let mut inner = lock(&self.inner);
        let read: Vec<(Cells, Option<Stamp>)> =
            both.iter().map(|r| inner.replicas[*r].read(table, partition)).collect();
        for replica in both {
            for (cells, dropped) in &read {
                if let Some(stamp) = dropped {
                    inner.replicas[*replica].apply(&Change::Drop(table, partition.clone(), *stamp));
                }
                for (key, (stamp, cell)) in cells.iter().filter(|((_, _, place), _)| scan.covers(place)) {
                    inner.replicas[*replica].put(key.clone(), *stamp, cell);
                }
            }
        }
    }

    /// What a replica that was mended has of it.
    fn rows(&self, replica: usize, scan: &Scan) -> Vec<Row> {
        let (cells, dropped) = lock(&self.inner).replicas[replica].read(scan.table, &scan.partition);
        let mut rows: Vec<Row> = cells
            .into_iter()
            .filter(|((_, _, c), (stamp, _))| scan.covers(c) && dropped.is_none_or(|d| *stamp > d))
            .filter_map(|((_, _, clustering), (stamp, cell))| match cell {
                Cell::Put(value) => Some(Row { clustering, stamp, value }),
                Cell::Delete => None,
            })
            .collect();
        if scan.reverse {
            rows.reverse();
        }
        rows.truncate(scan.limit);
        rows
    }

    /// Whether whoever is asked knows that there is no majority.
    fn is_down(&self) -> bool {
        let now = self.world.now();
        lock(&self.inner).replicas.iter().filter(|replica| replica.away_until > now).count() >= 2
    }

    /// How long until a majority can decide anything.
    fn majority(&self) -> Option<u64> {
        let mut reached: Vec<u64> = (0..REPLICAS).filter_map(|r| self.reaches(r)).collect();
        reached.sort_unstable();
        reached.get(1).copied()
    }
}

/// What a try to change a document came to.
enum Try {
    Applied,
    Refused(Option<(Document, u64)>),
}

/// The way of one process to the store.
#[derive(Clone)]
pub(crate) struct Handle {
    store: Replicas,
    who: u64,
    cut_until: Arc<AtomicU64>,
}

impl Handle {
    /// Nothing passes either way for so long; some of it comes through after.
    pub(crate) fn cut(&self, ms: u64) {
        self.cut_until.store(self.store.world.now() + ms, Ordering::Relaxed);
    }

    /// How long what is sent now is on its way to the store; none: it is lost.
    fn way(&self) -> Option<u64> {
        let world = &self.store.world;
        let cut = self.cut_until.load(Ordering::Relaxed).saturating_sub(world.now());
        if cut > 0 && !world.is_calm() {
            return world.chance(500).then(|| cut + world.between(0, 50));
        }
        let late = if world.mishap(10) { world.between(100, 2_000) } else { 0 };
        (!world.mishap(5)).then(|| world.between(0, 3) + late)
    }

    /// Whether an answer comes back.
    fn hears(&self) -> bool {
        let world = &self.store.world;
        let cut = self.cut_until.load(Ordering::Relaxed) > world.now() && !world.is_calm();
        !cut && !world.mishap(10)
    }

    async fn ask<T: Send + 'static>(
        &self,
        ms: u64,
        asks: impl FnOnce(Replicas, oneshot::Sender<T>) + Send + 'static,
    ) -> Option<T> {
        let (answers, answered) = oneshot::channel();
        let (waits, heard) = oneshot::channel();
        let store = self.store.clone();
        if let Some(way) = self.way() {
            self.store.world.after(way, move || asks(store, answers));
        }
        self.store.world.after(ms, move || waits.send(()).unwrap_or_default());
        let world = &self.store.world;
        let answered = async move {
            let answer = answered.await.ok()?;
            if world.mishap(15) {
                // What it says was true a while ago.
                let (comes, came) = oneshot::channel();
                world.after(world.between(20, 1_000), move || drop(comes.send(answer)));
                return came.await.ok();
            }
            Some(answer)
        };
        tokio::select! {
            biased;
            Some(answer) = answered => self.hears().then_some(answer),
            _ = heard => None,
        }
    }

    /// Says who writes: an epoch of a shard has one writer for ever.
    fn note(&self, batch: &Batch) {
        let who = *lock(&self.store.inner)
            .reigns
            .entry((batch.shard, batch.rows.first().map_or(0, |row| row.stamp.epoch())))
            .or_insert(self.who);
        if who != self.who {
            self.store.world.fail(|| {
                let stamp = batch.rows[0].stamp;
                format!("shard {}: {} and {} write under stamp {stamp}", batch.shard, who, self.who)
            });
        }
    }

    async fn rows(&self, scan: Scan) -> Result<Vec<Row>, ReadError> {
        if self.store.is_down() && self.store.world.chance(500) {
            return Err(ReadError::Unavailable);
        }
        let read = self.ask(DEADLINE_MS, move |store, waits| store.read(scan, waits));
        read.await.ok_or(ReadError::Unavailable)
    }

    /// One try.
    async fn attempt(
        &self,
        key: &DocumentKey,
        expected: Option<u64>,
        value: Option<&Bytes>,
        writer: u64,
        ms: u64,
    ) -> Option<Try> {
        let (key, value) = (key.clone(), value.cloned());
        self.ask(ms, move |store, waits| {
            // What has no majority now may find one later.
            let decided =
                store.majority().or_else(|| store.world.chance(300).then(|| store.world.between(500, 6_000)));
            let Some(decided) = decided else { return };
            let world = store.world.clone();
            world.after(decided, move || {
                let mut inner = lock(&store.inner);
                let found = inner.documents.get(&key);
                let live = found.and_then(Stored::document);
                let outcome = if live.as_ref().map(|d| d.version) == expected {
                    let version = found.map_or(0, |f| f.version) + 1;
                    inner.documents.insert(key, Stored { version, value, writer });
                    Try::Applied
                } else {
                    Try::Refused(live.zip(found.map(|f| f.writer)))
                };
                drop(waits.send(outcome));
            });
        })
        .await
    }

    fn writer(&self) -> u64 {
        let mut inner = lock(&self.store.inner);
        inner.tries += 1;
        inner.tries
    }
}

#[async_trait]
impl Engine for Handle {
    async fn write(&self, batch: Batch) -> Result<(), WriteError> {
        self.note(&batch);
        if self.store.world.mishap(10) || self.store.is_down() && self.store.world.chance(500) {
            return Err(WriteError::Refused);
        }
        let done = self.ask(DEADLINE_MS, move |store, waits| store.change(Change::Rows(batch), waits)).await;
        done.ok_or(WriteError::Unknown)
    }

    async fn get(
        &self,
        table: Table,
        partition: &Bytes,
        clustering: &Bytes,
    ) -> Result<Option<Row>, ReadError> {
        let bound = Bound::Included(clustering.clone());
        let scan = Scan { from: bound.clone(), to: bound, ..Scan::all(table, partition.clone(), 1) };
        Ok(self.rows(scan).await?.pop())
    }

    async fn scan(&self, scan: Scan) -> Result<Vec<Row>, ReadError> {
        self.rows(scan).await
    }

    async fn drop_partition(&self, table: Table, partition: Bytes, stamp: Stamp) -> Result<(), WriteError> {
        let change = Change::Drop(table, partition, stamp);
        let done = self.ask(DEADLINE_MS, move |store, waits| store.change(change, waits)).await;
        done.ok_or(WriteError::Unknown)
    }

    async fn document(&self, key: &DocumentKey) -> Result<Option<Document>, ReadError> {
        let key = key.clone();
        let read = self.ask(DEADLINE_MS, move |store, waits| {
            let Some(ms) = store.majority() else { return };
            let world = store.world.clone();
            world.after(ms, move || {
                let found = lock(&store.inner).documents.get(&key).and_then(Stored::document);
                drop(waits.send(found));
            });
        });
        read.await.ok_or(ReadError::Unavailable)
    }

    async fn compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
    ) -> Result<CasOutcome, WriteError> {
        let (writer, ends) = (self.writer(), self.store.world.now() + SETTLE_MS);
        let mut open = false;
        while self.store.world.now() < ends {
            match self.attempt(&key, expected, value.as_ref(), writer, DEADLINE_MS).await {
                Some(Try::Applied) => return Ok(CasOutcome::Applied),
                Some(Try::Refused(Some((_, by)))) if open && by == writer => return Ok(CasOutcome::Applied),
                Some(Try::Refused(Some((found, _)))) if open && found.version > expected.unwrap_or(0) + 1 => {
                    return Err(WriteError::Unknown);
                }
                Some(Try::Refused(found)) => {
                    return Ok(CasOutcome::Refused(found.map(|(document, _)| document)));
                }
                None => open = true,
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(WriteError::Unknown)
    }

    async fn try_compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
        patience: Duration,
    ) -> Result<CasOutcome, WriteError> {
        let ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        match self.attempt(&key, expected, value.as_ref(), self.writer(), ms).await {
            Some(Try::Applied) => Ok(CasOutcome::Applied),
            Some(Try::Refused(found)) => Ok(CasOutcome::Refused(found.map(|(document, _)| document))),
            None => Err(WriteError::Unknown),
        }
    }

    async fn documents(
        &self,
        scope: &str,
        kind: &'static str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Document)>, ReadError> {
        let from = DocumentKey { scope: scope.to_owned(), kind, id: after.to_owned() };
        let read = self.ask(DEADLINE_MS, move |store, waits| {
            let Some(ms) = store.majority() else { return };
            let world = store.world.clone();
            world.after(ms, move || {
                let inner = lock(&store.inner);
                let range = inner.documents.range((Bound::Excluded(from.clone()), Bound::Unbounded));
                let same = range.take_while(|(key, _)| key.scope == from.scope && key.kind == from.kind);
                let live = same.filter_map(|(key, stored)| Some((key.id.clone(), stored.document()?)));
                drop(waits.send(live.take(limit).collect()));
            });
        });
        read.await.ok_or(ReadError::Unavailable)
    }
}
