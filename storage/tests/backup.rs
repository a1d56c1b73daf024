//! A backup of a store that is being written holds one moment of it, and comes back whole or not at all.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;

use bytes::Bytes;
use patchbay_storage::embedded::backup::{RestoreError, files_of, restore};
use patchbay_storage::embedded::{Embedded, OpenError};
use patchbay_storage::{Batch, CasOutcome, DocumentKey, Engine as _, Scan, Stamp, Table};

fn row(n: u32) -> Batch {
    let (partition, clustering) = (Bytes::from_static(b"p"), Bytes::copy_from_slice(&n.to_be_bytes()));
    Batch::put(0, Table::Entries, partition, clustering, Stamp::new(1, n + 1), Bytes::from(vec![7; 300]))
}

#[tokio::test(flavor = "multi_thread")]
async fn one_moment_comes_back_with_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let engine = Arc::new(Embedded::open(&data).unwrap());
    for n in 0..1000 {
        engine.write(row(n)).await.unwrap();
    }
    let key = DocumentKey { scope: "t".into(), kind: "k", id: "d".into() };
    let set = engine.compare_and_set(key.clone(), None, Some(Bytes::from_static(b"{}"))).await;
    assert_eq!(set.unwrap(), CasOutcome::Applied);
    std::fs::create_dir_all(data.join("media/t/ab")).unwrap();
    std::fs::create_dir_all(data.join("media/unfinished")).unwrap();
    std::fs::write(data.join("media/t/ab/abcd"), vec![9; 200_000]).unwrap();
    std::fs::write(data.join("media/unfinished/0"), b"x").unwrap();
    std::fs::write(data.join("operator_key"), b"secret").unwrap();
    let files = files_of(&data, &["operator_key", "absent"], "media").unwrap();
    assert_eq!(files, ["media/t/ab/abcd", "operator_key"]);
    // It is written to all the while.
    let writing = engine.clone();
    let writer = tokio::spawn(async move {
        for n in 1000..3000 {
            writing.write(row(n)).await.unwrap();
        }
    });
    let (dumped, at) = (engine.clone(), data.clone());
    let (backup, contents) = tokio::task::spawn_blocking(move || {
        let mut out = Vec::new();
        let contents = dumped.dump(&at, &["operator_key", "absent"], "media", &mut out).unwrap();
        (out, contents)
    })
    .await
    .unwrap();
    writer.await.unwrap();
    assert!((1001..=3001).contains(&contents.rows), "{contents:?}");
    assert_eq!(contents.files, 2);

    let target = dir.path().join("restored");
    let restored = restore(&target, backup.as_slice(), |_| Ok(())).unwrap();
    assert_eq!((restored.rows, restored.files), (contents.rows, contents.files));
    assert_eq!(std::fs::read(target.join("operator_key")).unwrap(), b"secret");
    assert_eq!(std::fs::read(target.join("media/t/ab/abcd")).unwrap().len(), 200_000);
    let again = Embedded::open(&target).unwrap();
    let rows = again.scan(Scan::all(Table::Entries, Bytes::from_static(b"p"), usize::MAX)).await.unwrap();
    let seen: Vec<u32> =
        rows.iter().map(|r| u32::from_be_bytes(r.clustering[..].try_into().unwrap())).collect();
    assert_eq!(seen, (0..seen.len() as u32).collect::<Vec<_>>(), "a prefix of what was written: one moment");
    assert_eq!(again.document(&key).await.unwrap().unwrap().value, "{}");

    // Where something is nothing is overwritten; what is damaged leaves nothing.
    assert!(matches!(
        restore(&target, backup.as_slice(), |_| Ok(())),
        Err(RestoreError::Open(OpenError::Foreign))
    ));
    let empty = dir.path().join("empty");
    for (what, at) in
        [("cut short", backup.len() - 40), ("cut in the middle", backup.len() / 2), ("nothing", 5)]
    {
        assert!(restore(&empty, &backup[..at], |_| Ok(())).is_err(), "{what}");
    }
    let mut changed = backup.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    assert!(restore(&empty, changed.as_slice(), |_| Ok(())).is_err());
    assert!(!empty.exists());
    assert!(matches!(
        restore(&empty, b"something else entirely".as_slice(), |_| Ok(())),
        Err(RestoreError::Foreign)
    ));
    let mut escape = b"patchbay-backup 1\n\x02\x00\x07../evil".to_vec();
    escape.extend([0; 8]);
    assert!(matches!(restore(&empty, escape.as_slice(), |_| Ok(())), Err(RestoreError::Damaged(_))));
    assert!(!dir.path().join("evil").exists());
}
