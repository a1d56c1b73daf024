//! fsync is off by default in the engine below, and a SIGKILL never loses the page cache: so the sync call itself is
//! held, and what it had not covered is thrown away.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use bytes::Bytes;
use fjall::{Database, PersistMode};
use patchbay_storage::embedded::{Embedded, OpenError, Sync};
use patchbay_storage::{Batch, Engine, Scan, Stamp, Table};

fn put(n: u32) -> Batch {
    let (partition, clustering) = (Bytes::from_static(b"p"), Bytes::copy_from_slice(&n.to_be_bytes()));
    Batch::put(0, Table::Sessions, partition, clustering, Stamp::new(1, n + 1), Bytes::from_static(b"v"))
}

/// Copies the files as they are after each sync: what a power cut a moment later would leave.
struct CopyAtSync {
    from: PathBuf,
    to: PathBuf,
}

fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

impl Sync for CopyAtSync {
    fn sync(&self, database: &Database) -> Result<(), fjall::Error> {
        database.persist(PersistMode::SyncData)?;
        copy(&self.from, &self.to);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_acked_is_in_the_copy_taken_at_the_last_sync() {
    let dir = tempfile::tempdir().unwrap();
    let (data, cut) = (dir.path().join("data"), dir.path().join("cut"));
    let engine = Embedded::open_with(&data, CopyAtSync { from: data.clone(), to: cut.clone() }).unwrap();
    let mut acked = 0;
    for _ in 0..20 {
        let writes = (0..8u32).map(|n| engine.write(put(acked + n)));
        for done in futures_util::future::join_all(writes).await {
            done.unwrap();
        }
        acked += 8;
    }
    // Everything after the last sync is dropped with the directory.
    drop(engine);
    std::fs::remove_dir_all(&data).unwrap();
    let after = Embedded::open(&cut).unwrap();
    let found = after.scan(Scan::all(Table::Sessions, Bytes::from_static(b"p"), usize::MAX)).await.unwrap();
    assert_eq!(found.len(), acked as usize);
}

struct Held(Arc<(Mutex<bool>, Condvar)>);

impl Sync for Held {
    fn sync(&self, database: &Database) -> Result<(), fjall::Error> {
        let (held, changed) = &*self.0;
        let mut guard = held.lock().unwrap();
        while *guard {
            guard = changed.wait(guard).unwrap();
        }
        database.persist(PersistMode::SyncData)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_not_answered_before_its_sync_returns() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Arc::new((Mutex::new(true), Condvar::new()));
    let engine = Arc::new(Embedded::open_with(&dir.path().join("data"), Held(gate.clone())).unwrap());
    let writer = engine.clone();
    let mut write = tokio::spawn(async move { writer.write(put(1)).await });
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut write).await;
    assert!(early.is_err(), "answered while the sync was held");
    *gate.0.lock().unwrap() = false;
    gate.1.notify_all();
    write.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_locked_versioned_and_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let open = Embedded::open(&data).unwrap();
    assert!(matches!(Embedded::open(&data).err(), Some(OpenError::InUse)));
    drop(open);
    std::fs::write(data.join("FORMAT"), "patchbay-embedded 99\n").unwrap();
    assert!(matches!(Embedded::open(&data).err(), Some(OpenError::Newer(99))));
    std::fs::write(data.join("FORMAT"), "something else\n").unwrap();
    assert!(matches!(Embedded::open(&data).err(), Some(OpenError::Foreign)));
    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("letter.txt"), "dear").unwrap();
    assert!(matches!(Embedded::open(&foreign).err(), Some(OpenError::Foreign)));
}
