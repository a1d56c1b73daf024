//! Files that every node of a cluster can read: what they are made of are rows of the store, a part each. The node that
//! took a file, and each that was asked for it, has a copy on its disk until nobody has asked for [`KEPT_FOR`].
//!
//! Guarantee: a file is there for every node once it is finished, and is never there in part: the row that says how long
//! it is comes last.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::{BufMut as _, Bytes, BytesMut};
use patchbay_protocol::TenantId;
use tokio::io::AsyncReadExt as _;
use tokio::time::Instant;

use crate::blobs::{Blob, BlobWriter, Blobs, DiskBlobs};
use crate::engine::{Batch, Engine, ReadError, Table, WriteError};
use crate::stamp::Stamp;

/// A part of a file: a row of its own, far from the largest that a store takes.
const PART_BYTES: usize = 256 << 10;
/// Parts of a partition.
const PARTITION_PARTS: u32 = 64;
/// How long a copy is kept that nobody asks for.
pub const KEPT_FOR: Duration = Duration::from_secs(600);
const KEPT_LOOK: Duration = Duration::from_secs(60);
/// How often a part is written that may not have been, and the pause between.
const TRIES_MAX: u32 = 5;
const TRY_PAUSE: Duration = Duration::from_millis(200);

/// Files that every node of a cluster can read.
pub struct SharedBlobs {
    disk: DiskBlobs,
    engine: Arc<dyn Engine>,
    /// Copies here, and when they were asked for last.
    kept: Mutex<HashMap<(TenantId, String), Instant>>,
}

fn partition(tenant: &TenantId, id: &str, group: Option<u32>) -> Bytes {
    let mut key = BytesMut::new();
    for name in [tenant.as_str(), id] {
        key.put_slice(name.as_bytes());
        key.put_u8(0);
    }
    if let Some(group) = group {
        key.put_u32(group);
    }
    key.freeze()
}

/// The one row of a file's own partition.
fn head() -> Bytes {
    Bytes::from_static(b"head")
}

fn unread(error: ReadError) -> io::Error {
    io::Error::other(error)
}

/// Of what is written later. A file is written again under its id when an earlier try was given up.
fn stamp() -> Stamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Stamp::from_u64(u64::try_from(since.as_millis()).unwrap_or_default())
}

fn parts(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(PART_BYTES as u64)).unwrap_or(u32::MAX)
}

impl SharedBlobs {
    /// Copies lie on `disk`. Those that are there already are shared when they are let go of, if they are not yet.
    pub fn start(disk: DiskBlobs, engine: Arc<dyn Engine>) -> io::Result<Arc<Self>> {
        let now = Instant::now();
        let kept = disk.all()?.into_iter().map(|of| (of, now)).collect();
        let blobs = Arc::new(Self { disk, engine, kept: Mutex::new(kept) });
        tokio::spawn(let_go(Arc::downgrade(&blobs)));
        Ok(blobs)
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<(TenantId, String), Instant>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, tenant: &TenantId, id: &str) {
        self.kept().insert((tenant.clone(), id.to_owned()), Instant::now());
    }

    /// Removes the copy that is here.
    async fn let_go(&self, tenant: &TenantId, id: &str) -> io::Result<()> {
        self.disk.delete(tenant, id).await?;
        self.kept().remove(&(tenant.clone(), id.to_owned()));
        Ok(())
    }

    /// How long a file is, if the store has it.
    async fn length(&self, tenant: &TenantId, id: &str) -> io::Result<Option<u64>> {
        let row =
            self.engine.get(Table::Files, &partition(tenant, id, None), &head()).await.map_err(unread)?;
        let length = |row: crate::engine::Row| row.value[..].try_into().map(u64::from_be_bytes);
        row.map(length).transpose().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
    }

    async fn write(&self, partition: Bytes, place: Bytes, stamp: Stamp, value: Bytes) -> io::Result<()> {
        for _ in 0..TRIES_MAX {
            let row = Batch::put(0, Table::Files, partition.clone(), place.clone(), stamp, value.clone());
            match self.engine.write(row).await {
                Ok(()) => return Ok(()),
                Err(WriteError::Full) => return Err(io::Error::from(io::ErrorKind::StorageFull)),
                Err(WriteError::Refused | WriteError::Unknown) => tokio::time::sleep(TRY_PAUSE).await,
            }
        }
        Err(io::Error::from(io::ErrorKind::TimedOut))
    }

    /// Writes what lies here into the store.
    async fn share(&self, tenant: &TenantId, id: &str) -> io::Result<()> {
        let Some(mut blob) = self.disk.open(tenant, id).await? else {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        };
        let stamp = stamp();
        for part in 0..parts(blob.bytes) {
            let left = blob.bytes - u64::from(part) * PART_BYTES as u64;
            let mut bytes = vec![0; usize::try_from(left).unwrap_or(usize::MAX).min(PART_BYTES)];
            blob.file.read_exact(&mut bytes).await?;
            let at = partition(tenant, id, Some(part / PARTITION_PARTS));
            self.write(at, Bytes::copy_from_slice(&part.to_be_bytes()), stamp, bytes.into()).await?;
        }
        let length = Bytes::copy_from_slice(&blob.bytes.to_be_bytes());
        self.write(partition(tenant, id, None), head(), stamp, length).await?;
        // One that was given up at this very moment is still gone: then it is not there, and is taken again.
        match self.length(tenant, id).await? {
            Some(_) => Ok(()),
            None => Err(io::Error::from(io::ErrorKind::TimedOut)),
        }
    }

    /// Makes a copy of what the store has; false: it has none.
    async fn fetch(&self, tenant: &TenantId, id: &str) -> io::Result<bool> {
        let Some(bytes) = self.length(tenant, id).await? else { return Ok(false) };
        let mut writer = self.disk.create().await?;
        let mut written = 0;
        for part in 0..parts(bytes) {
            let (at, place) = (partition(tenant, id, Some(part / PARTITION_PARTS)), part.to_be_bytes());
            let row =
                self.engine.get(Table::Files, &at, &Bytes::copy_from_slice(&place)).await.map_err(unread)?;
            // It was removed while it was read.
            let Some(row) = row else { return Ok(false) };
            writer.write(&row.value).await?;
            written += row.value.len() as u64;
        }
        if written != bytes {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        writer.finish(tenant, id).await?;
        Ok(true)
    }
}

/// Removes copies that nobody has asked for.
async fn let_go(blobs: Weak<SharedBlobs>) {
    loop {
        tokio::time::sleep(KEPT_LOOK).await;
        let Some(blobs) = blobs.upgrade() else { return };
        let old: Vec<(TenantId, String)> = {
            let kept = blobs.kept();
            kept.iter().filter(|(_, asked)| asked.elapsed() >= KEPT_FOR).map(|(of, _)| of.clone()).collect()
        };
        for (tenant, id) in old {
            let shared = match blobs.length(&tenant, &id).await {
                Ok(Some(_)) => true,
                // Of a version that kept files here alone.
                Ok(None) => blobs.share(&tenant, &id).await.is_ok(),
                Err(_) => false,
            };
            if shared {
                // One that stays is tried again.
                let _ = blobs.let_go(&tenant, &id).await;
            }
        }
    }
}

struct SharedWriter {
    blobs: Arc<SharedBlobs>,
    disk: Box<dyn BlobWriter>,
}

#[async_trait]
impl Blobs for Arc<SharedBlobs> {
    async fn create(&self) -> io::Result<Box<dyn BlobWriter>> {
        Ok(Box::new(SharedWriter { blobs: self.clone(), disk: self.disk.create().await? }))
    }

    async fn open(&self, tenant: &TenantId, id: &str) -> io::Result<Option<Blob>> {
        self.keep(tenant, id);
        let mut found = self.disk.open(tenant, id).await?;
        if found.is_none() && self.fetch(tenant, id).await? {
            found = self.disk.open(tenant, id).await?;
        }
        if found.is_none() {
            self.kept().remove(&(tenant.clone(), id.to_owned()));
        }
        Ok(found)
    }

    async fn delete(&self, tenant: &TenantId, id: &str) -> io::Result<()> {
        // One that was given up half-way has parts, and nothing that says how many.
        let here = self.disk.open(tenant, id).await?.map(|blob| blob.bytes);
        let there = self.length(tenant, id).await?;
        let gone = async |partition: Bytes| {
            let dropped = self.engine.drop_partition(Table::Files, partition, stamp()).await;
            dropped.map_err(io::Error::other)
        };
        if let Some(bytes) = there.max(here) {
            for group in 0..parts(bytes).div_ceil(PARTITION_PARTS) {
                gone(partition(tenant, id, Some(group))).await?;
            }
            gone(partition(tenant, id, None)).await?;
        }
        // Last: whoever did not get this far begins anew.
        self.let_go(tenant, id).await
    }
}

#[async_trait]
impl BlobWriter for SharedWriter {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.disk.write(bytes).await
    }

    async fn finish(self: Box<Self>, tenant: &TenantId, id: &str) -> io::Result<()> {
        self.disk.finish(tenant, id).await?;
        self.blobs.keep(tenant, id);
        let shared = self.blobs.share(tenant, id).await;
        if shared.is_err() {
            // A store that is not there keeps what it has of it; here it goes in any case.
            let _ = self.blobs.delete(tenant, id).await;
            let _ = self.blobs.let_go(tenant, id).await;
        }
        shared
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Faults, Model};

    fn node(dir: &tempfile::TempDir, name: &str, model: &Model) -> Arc<SharedBlobs> {
        let disk = DiskBlobs::open(&dir.path().join(name)).unwrap();
        SharedBlobs::start(disk, Arc::new(model.clone())).unwrap()
    }

    async fn read(blobs: &Arc<SharedBlobs>, id: &str) -> Option<Vec<u8>> {
        let mut blob = blobs.open(&"t".parse().unwrap(), id).await.unwrap()?;
        let mut bytes = Vec::new();
        blob.file.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes.len() as u64, blob.bytes);
        Some(bytes)
    }

    #[tokio::test(start_paused = true)]
    async fn every_node_reads_what_one_has_taken_until_one_removes_it() {
        let (dir, model, tenant) = (tempfile::tempdir().unwrap(), Model::new(), "t".parse().unwrap());
        let (a, b) = (node(&dir, "a", &model), node(&dir, "b", &model));
        // More than a partition, a part that is not full, one part, and nothing.
        for (id, length) in [
            ("0123456789", PART_BYTES * PARTITION_PARTS as usize + 7),
            ("1123456789", PART_BYTES),
            ("2123456789", 1),
        ] {
            let bytes: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
            let mut writer = a.create().await.unwrap();
            for some in bytes.chunks(100_000) {
                writer.write(some).await.unwrap();
            }
            assert!(read(&b, id).await.is_none(), "it is not finished");
            writer.finish(&tenant, id).await.unwrap();
            assert!(read(&b, id).await.unwrap() == bytes && read(&a, id).await.unwrap() == bytes);
            // Whoever comes later finds it as well, with an empty disk.
            assert!(read(&node(&dir, &format!("c{id}"), &model), id).await.unwrap() == bytes);
            tokio::time::sleep(Duration::from_millis(2)).await;
            a.delete(&tenant, id).await.unwrap();
            a.delete(&tenant, id).await.unwrap();
            assert!(read(&a, id).await.is_none());
            assert!(read(&node(&dir, &format!("d{id}"), &model), id).await.is_none());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_the_store_does_not_take_is_nowhere() {
        let (dir, model, tenant) = (tempfile::tempdir().unwrap(), Model::new(), "t".parse().unwrap());
        let a = node(&dir, "a", &model);
        let mut writer = a.create().await.unwrap();
        writer.write(&vec![1; PART_BYTES * 2]).await.unwrap();
        // What is written stands, and nobody hears of it.
        model.set_faults(Faults { fail_after: 1_000, ..Faults::default() });
        assert!(writer.finish(&tenant, "0123456789").await.is_err());
        assert!(a.disk.open(&tenant, "0123456789").await.unwrap().is_none() && a.kept().is_empty());
        model.set_faults(Faults::default());
        assert!(read(&a, "0123456789").await.is_none());
        // It is taken again under the same id.
        tokio::time::sleep(Duration::from_millis(2)).await;
        let mut writer = a.create().await.unwrap();
        writer.write(b"again").await.unwrap();
        writer.finish(&tenant, "0123456789").await.unwrap();
        assert_eq!(read(&node(&dir, "b", &model), "0123456789").await.unwrap(), b"again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_copy_goes_when_nobody_asks_for_it_and_what_was_never_shared_is_shared_first() {
        let (dir, model, tenant) = (tempfile::tempdir().unwrap(), Model::new(), "t".parse().unwrap());
        // As an earlier version left it.
        let disk = DiskBlobs::open(&dir.path().join("a")).unwrap();
        let mut writer = disk.create().await.unwrap();
        writer.write(b"old").await.unwrap();
        writer.finish(&tenant, "0123456789").await.unwrap();
        let a = SharedBlobs::start(disk, Arc::new(model.clone())).unwrap();
        assert_eq!(read(&a, "0123456789").await.unwrap(), b"old");
        while a.disk.open(&tenant, "0123456789").await.unwrap().is_some() {
            tokio::time::sleep(KEPT_LOOK).await;
        }
        assert!(a.kept().is_empty());
        assert_eq!(read(&node(&dir, "b", &model), "0123456789").await.unwrap(), b"old");
        assert_eq!(read(&a, "0123456789").await.unwrap(), b"old");
    }
}
