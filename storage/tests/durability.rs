//! fsync is off by default in the engine below, and a SIGKILL never loses the page cache: so the sync call itself is
//! held, and what it had not covered is thrown away.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use bytes::Bytes;
use fjall::{Database, PersistMode};
use patchbay_storage::embedded::{Embedded, OpenError, Sync};
use patchbay_storage::{Batch, DocumentKey, Engine, Scan, Stamp, Table};

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

/// A journal's file, and behind its last byte that is not zero.
fn journal(data: &std::path::Path) -> (std::path::PathBuf, usize) {
    let mut files: Vec<_> =
        std::fs::read_dir(data.join("store")).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "jnl"));
    let file = files.pop().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    (file, bytes.iter().rposition(|b| *b != 0).unwrap() + 1)
}

async fn filled(data: &std::path::Path) {
    let engine = Embedded::open(data).unwrap();
    for n in 0..200u32 {
        let clustering = Bytes::copy_from_slice(&n.to_be_bytes());
        let row = Batch::put(
            0,
            Table::Entries,
            Bytes::from_static(b"p"),
            clustering,
            Stamp::new(1, n + 1),
            Bytes::from(vec![b'x'; 500]),
        );
        engine.write(row).await.unwrap();
    }
}

async fn rows(engine: &Embedded) -> usize {
    engine
        .scan(patchbay_storage::Scan::all(Table::Entries, Bytes::from_static(b"p"), usize::MAX))
        .await
        .unwrap()
        .len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_is_cut_and_damage_before_it_stops_the_store_with_its_place() {
    use std::os::unix::fs::FileExt as _;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    filled(&data).await;
    let (file, end) = journal(&data);
    let write = |at: usize, bytes: &[u8]| {
        let journal = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
        journal.write_all_at(bytes, at as u64).unwrap();
    };
    // The start of a batch that a power cut tore: what was acked stands.
    let start = std::fs::read(&file).unwrap()[..64].to_vec();
    write(end, &start);
    let engine = Embedded::open(&data).unwrap();
    assert_eq!(rows(&engine).await, 200);
    drop(engine);
    // A byte in the middle, wherever it falls: refused with its place and nothing changed, or nothing is missing.
    let good = std::fs::read(&file).unwrap();
    let mut refused = 0;
    for at in (0..40).map(|n| n * 17 % end + end / 3) {
        write(at, &[good[at] ^ 0xff]);
        match Embedded::open(&data) {
            Ok(engine) => assert_eq!(rows(&engine).await, 200, "byte {at}"),
            Err(error) => {
                let told = error.to_string();
                assert!(told.contains("damaged") && told.contains("store"), "{told}");
                refused += 1;
                let kept = std::fs::read(&file).unwrap();
                let same = (0..end).all(|n| kept[n] == if n == at { good[n] ^ 0xff } else { good[n] });
                assert!(same, "byte {at}: a store that is not opened is not changed");
            }
        }
        std::fs::write(&file, &good).unwrap();
    }
    assert!(refused > 20, "{refused} of 40");
    assert_eq!(rows(&Embedded::open(&data).unwrap()).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_serves_reads_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    filled(&data).await;
    let engine = Embedded::open(&data).unwrap();
    assert_eq!(engine.refuses(), None);
    let write = async |n: u32| {
        let clustering = Bytes::copy_from_slice(&n.to_be_bytes());
        engine
            .write(Batch::put(
                0,
                Table::Sessions,
                Bytes::from_static(b"q"),
                clustering,
                Stamp::new(1, n),
                Bytes::from_static(b"x"),
            ))
            .await
    };
    engine.set_min_free(u64::MAX / 4);
    while write(1).await != Err(patchbay_storage::WriteError::Full) {}
    assert_eq!(engine.refuses(), Some("the disk is full"));
    let key = DocumentKey { scope: "t".into(), kind: "k", id: "d".into() };
    let refused = engine.compare_and_set(key.clone(), None, Some(Bytes::from_static(b"{}"))).await;
    assert_eq!(refused, Err(patchbay_storage::WriteError::Full));
    assert_eq!(rows(&engine).await, 200, "reads go on");
    engine.set_min_free(1);
    assert_eq!(engine.refuses(), None);
    write(2).await.unwrap();
    assert_eq!(engine.document(&key).await.unwrap(), None, "what was refused is not there");
}
