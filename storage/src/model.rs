//! The engine of the tests: in memory, the highest stamp of a row wins as in Cassandra, and seeded faults.
//!
//! A write can fail before it is applied, fail after (outcome unknown), be answered as unknown and land later, be
//! delayed (which reorders writes across partitions), and the whole store can stop between any two writes.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use tokio::sync::watch;

use crate::engine::{
    Batch, CasOutcome, Cell, Document, DocumentKey, Engine, ReadError, Row, RowWrite, Scan, Table, WriteError,
};
use crate::stamp::Stamp;

/// How often what goes wrong, in parts of a thousand writes (or reads).
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Refused, not applied.
    pub refuse: u32,
    /// Answered as unknown, not applied.
    pub lose: u32,
    /// Answered as unknown, applied.
    pub fail_after: u32,
    /// Answered as unknown, applied up to a second later.
    pub late: u32,
    /// Reads that are not answered.
    pub read: u32,
    /// The longest delay of a write that works.
    pub delay: Duration,
}

impl Faults {
    /// Everything goes wrong often.
    pub fn rough() -> Self {
        Self { refuse: 30, lose: 40, fail_after: 40, late: 30, read: 20, delay: Duration::from_millis(20) }
    }
}

type Key = (Table, Bytes, Bytes);

#[derive(Default)]
struct Store {
    rows: BTreeMap<Key, (Stamp, Cell)>,
    documents: BTreeMap<DocumentKey, Document>,
    /// Versions of deleted documents go on rising.
    versions: BTreeMap<DocumentKey, u64>,
}

impl Store {
    fn apply(&mut self, batch: &Batch) {
        for RowWrite { clustering, stamp, cell } in &batch.rows {
            let key = (batch.table, batch.partition.clone(), clustering.clone());
            if self.rows.get(&key).is_none_or(|(s, c)| wins((*stamp, cell), (*s, c))) {
                self.rows.insert(key, (*stamp, cell.clone()));
            }
        }
    }
}

/// Whether a cell replaces one that is there: by its stamp; with equal stamps a deletion wins, then the larger value, as
/// Cassandra decides.
pub fn wins(new: (Stamp, &Cell), old: (Stamp, &Cell)) -> bool {
    (new.0, rank(new.1)) > (old.0, rank(old.1))
}

fn rank(cell: &Cell) -> (bool, &[u8]) {
    match cell {
        Cell::Delete => (true, &[]),
        Cell::Put(value) => (false, value),
    }
}

struct Inner {
    store: Store,
    random: SmallRng,
    faults: Faults,
    writes: u64,
    writes_by_table: BTreeMap<Table, u64>,
    rows_by_table: BTreeMap<Table, u64>,
    stop_after: Option<u64>,
}

/// The model engine. Clones share one store.
#[derive(Clone)]
pub struct Model {
    inner: Arc<Mutex<Inner>>,
    shared: bool,
    /// Whether what is asked by way of this handle does not reach the store.
    cut: watch::Sender<bool>,
}

enum Fate {
    Work(Duration),
    Refuse,
    Lose,
    FailAfter,
    Late(Duration),
}

impl Model {
    /// An empty store without faults.
    pub fn new() -> Self {
        Self::with_faults(0, Faults::default())
    }

    /// An empty store whose faults follow from `seed`.
    pub fn with_faults(seed: u64, faults: Faults) -> Self {
        let random = SmallRng::seed_from_u64(seed);
        let inner = Inner {
            store: Store::default(),
            random,
            faults,
            writes: 0,
            writes_by_table: BTreeMap::new(),
            rows_by_table: BTreeMap::new(),
            stop_after: None,
        };
        Self { inner: Arc::new(Mutex::new(inner)), shared: false, cut: watch::Sender::new(false) }
    }

    /// Another way to the same store, which can be cut by itself.
    pub fn apart(&self) -> Self {
        Self { cut: watch::Sender::new(false), ..self.clone() }
    }

    /// From now on nothing that is asked this way reaches the store; or what was asked meanwhile reaches it, late.
    pub fn cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }

    async fn reach(&self) {
        // It ends with this handle.
        let _ = self.cut.subscribe().wait_for(|cut| !cut).await;
    }

    /// The same store as one that several nodes write to at once.
    pub fn shared(self) -> Self {
        Self { shared: true, ..self }
    }

    /// From now on, what goes wrong.
    pub fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// Answers no write after the next `n`; reads go on.
    pub fn stop_after(&self, n: u64) {
        let mut inner = self.lock();
        inner.stop_after = Some(inner.writes + n);
    }

    /// Answers writes again, as after a restart.
    pub fn resume(&self) {
        self.lock().stop_after = None;
    }

    /// How many row batches were written to `table`, however they were answered.
    pub fn writes_to(&self, table: Table) -> u64 {
        self.lock().writes_by_table.get(&table).copied().unwrap_or(0)
    }

    /// How many rows were written to each table, however that was answered.
    pub fn rows_written(&self) -> BTreeMap<Table, u64> {
        self.lock().rows_by_table.clone()
    }

    /// Copies the store as it is now into another model without faults.
    pub fn fork(&self) -> Self {
        let inner = self.lock();
        let copy = Self::new();
        {
            let mut c = copy.lock();
            c.store.rows.clone_from(&inner.store.rows);
            c.store.documents.clone_from(&inner.store.documents);
            c.store.versions.clone_from(&inner.store.versions);
        }
        copy
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn fate(&self, table: Option<Table>) -> Fate {
        let mut inner = self.lock();
        inner.writes += 1;
        if let Some(table) = table {
            *inner.writes_by_table.entry(table).or_default() += 1;
        }
        if inner.stop_after.is_some_and(|n| inner.writes > n) {
            return Fate::Lose;
        }
        let f = inner.faults;
        let delay = f.delay.mul_f64(inner.random.random_range(0.0..=1.0));
        let mut roll = inner.random.random_range(0..1000u32);
        for (share, fate) in [
            (f.refuse, Fate::Refuse),
            (f.lose, Fate::Lose),
            (f.fail_after, Fate::FailAfter),
            (f.late, Fate::Late(Duration::from_millis(u64::from(roll) % 1000))),
        ] {
            if roll < share {
                return fate;
            }
            roll -= share;
        }
        Fate::Work(delay)
    }

    fn read_fails(&self) -> bool {
        let mut inner = self.lock();
        let share = inner.faults.read;
        inner.random.random_range(0..1000u32) < share
    }
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Engine for Model {
    async fn write(&self, batch: Batch) -> Result<(), WriteError> {
        self.reach().await;
        *self.lock().rows_by_table.entry(batch.table).or_default() += batch.rows.len() as u64;
        match self.fate(Some(batch.table)) {
            Fate::Work(delay) => {
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                self.lock().store.apply(&batch);
                Ok(())
            }
            Fate::Refuse => Err(WriteError::Refused),
            Fate::Lose => Err(WriteError::Unknown),
            Fate::FailAfter => {
                self.lock().store.apply(&batch);
                Err(WriteError::Unknown)
            }
            Fate::Late(delay) => {
                let this = self.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    this.lock().store.apply(&batch);
                });
                Err(WriteError::Unknown)
            }
        }
    }

    async fn get(
        &self,
        table: Table,
        partition: &Bytes,
        clustering: &Bytes,
    ) -> Result<Option<Row>, ReadError> {
        self.reach().await;
        if self.read_fails() {
            return Err(ReadError::Unavailable);
        }
        let key = (table, partition.clone(), clustering.clone());
        Ok(self.lock().store.rows.get(&key).and_then(|(stamp, cell)| row(clustering, *stamp, cell)))
    }

    async fn scan(&self, scan: Scan) -> Result<Vec<Row>, ReadError> {
        self.reach().await;
        if self.read_fails() {
            return Err(ReadError::Unavailable);
        }
        let inner = self.lock();
        let start = (scan.table, scan.partition.clone(), Bytes::new());
        let partition = inner
            .store
            .rows
            .range(start..)
            .take_while(|((t, p, _), _)| *t == scan.table && *p == scan.partition);
        let rows = partition
            .filter(|((_, _, c), _)| scan.covers(c))
            .filter_map(|((_, _, c), (stamp, cell))| row(c, *stamp, cell));
        let mut rows: Vec<Row> = rows.collect();
        if scan.reverse {
            rows.reverse();
        }
        rows.truncate(scan.limit);
        Ok(rows)
    }

    async fn drop_partition(&self, table: Table, partition: Bytes, stamp: Stamp) -> Result<(), WriteError> {
        self.reach().await;
        self.lock().store.rows.retain(|(t, p, _), (at, _)| *t != table || *p != partition || *at > stamp);
        Ok(())
    }

    async fn document(&self, key: &DocumentKey) -> Result<Option<Document>, ReadError> {
        self.reach().await;
        if self.read_fails() {
            return Err(ReadError::Unavailable);
        }
        Ok(self.lock().store.documents.get(key).cloned())
    }

    fn is_exclusive(&self) -> bool {
        !self.shared
    }

    async fn compare_and_set(
        &self,
        key: DocumentKey,
        expected: Option<u64>,
        value: Option<Bytes>,
    ) -> Result<CasOutcome, WriteError> {
        self.reach().await;
        let fate = self.fate(None);
        if matches!(fate, Fate::Refuse | Fate::Lose) {
            return Err(WriteError::Unknown);
        }
        let mut inner = self.lock();
        let found = inner.store.documents.get(&key).cloned();
        let outcome = if found.as_ref().map(|d| d.version) == expected {
            let version = inner.store.versions.get(&key).copied().unwrap_or(0) + 1;
            inner.store.versions.insert(key.clone(), version);
            match value {
                Some(value) => inner.store.documents.insert(key, Document { version, value }),
                None => inner.store.documents.remove(&key),
            };
            CasOutcome::Applied
        } else {
            CasOutcome::Refused(found)
        };
        if matches!(fate, Fate::Work(_)) { Ok(outcome) } else { Err(WriteError::Unknown) }
    }

    async fn documents(
        &self,
        scope: &str,
        kind: &'static str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<(String, Document)>, ReadError> {
        self.reach().await;
        if self.read_fails() {
            return Err(ReadError::Unavailable);
        }
        let inner = self.lock();
        let from = DocumentKey { scope: scope.to_owned(), kind, id: after.to_owned() };
        let range = inner.store.documents.range((Bound::Excluded(from), Bound::Unbounded));
        let found = range.take_while(|(k, _)| k.scope == scope && k.kind == kind).take(limit);
        Ok(found.map(|(k, d)| (k.id.clone(), d.clone())).collect())
    }
}

fn row(clustering: &Bytes, stamp: Stamp, cell: &Cell) -> Option<Row> {
    match cell {
        Cell::Put(value) => Some(Row { clustering: clustering.clone(), stamp, value: value.clone() }),
        Cell::Delete => None,
    }
}
