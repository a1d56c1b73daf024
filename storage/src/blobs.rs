//! Files: what is too large for a row. Written as a stream, whole or not at all; read as a stream.
//!
//! On disk now ([`DiskBlobs`]); the trait is small enough for an S3-compatible store later.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use patchbay_protocol::TenantId;
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;

/// Where files are.
#[async_trait]
pub trait Blobs: Send + Sync + 'static {
    /// A file to be written.
    async fn create(&self) -> io::Result<Box<dyn BlobWriter>>;

    /// A file of a tenant; `None` when it is not there.
    async fn open(&self, tenant: &TenantId, id: &str) -> io::Result<Option<Blob>>;

    /// Removes a file; one that is not there is removed already.
    async fn delete(&self, tenant: &TenantId, id: &str) -> io::Result<()>;
}

/// A file being written. One that is dropped unfinished was never there.
#[async_trait]
pub trait BlobWriter: Send {
    /// Adds bytes.
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Makes it a file of a tenant, durable; one of that id that is there is replaced.
    async fn finish(self: Box<Self>, tenant: &TenantId, id: &str) -> io::Result<()>;
}

/// A file to be read.
pub struct Blob {
    /// Its content; it can be read from any place on.
    pub file: File,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Files in a directory: `<tenant>/<first two of id>/<id>`.
pub struct DiskBlobs {
    dir: PathBuf,
    count: AtomicU64,
}

/// Where files are that are being written.
const UNFINISHED: &str = "unfinished";

fn make_dir(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

impl DiskBlobs {
    /// Opens `dir`, or makes it; what was never finished is removed.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let unfinished = dir.join(UNFINISHED);
        if unfinished.exists() {
            std::fs::remove_dir_all(&unfinished)?;
        }
        make_dir(&unfinished)?;
        Ok(Self { dir: dir.to_owned(), count: AtomicU64::new(0) })
    }

    /// Every file that is there.
    pub(crate) fn all(&self) -> io::Result<Vec<(TenantId, String)>> {
        let names = |dir: &Path| -> io::Result<Vec<String>> {
            let entries: Vec<_> = std::fs::read_dir(dir)?.collect::<Result<_, _>>()?;
            Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        };
        let mut all = Vec::new();
        for name in names(&self.dir)? {
            let Some(tenant) = name.parse::<TenantId>().ok().filter(|_| name != UNFINISHED) else { continue };
            for beginning in names(&self.dir.join(&name))? {
                let ids = names(&self.dir.join(&name).join(beginning))?;
                all.extend(ids.into_iter().map(|id| (tenant.clone(), id)));
            }
        }
        Ok(all)
    }

    fn path(&self, tenant: &TenantId, id: &str) -> io::Result<PathBuf> {
        path_of(&self.dir, tenant, id)
    }
}

/// Ids are ours and hexadecimal: nothing that comes from outside becomes a path.
fn path_of(dir: &Path, tenant: &TenantId, id: &str) -> io::Result<PathBuf> {
    if id.len() < 8 || !id.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    Ok(dir.join(tenant.as_str()).join(&id[..2]).join(id))
}

struct DiskWriter {
    dir: PathBuf,
    path: PathBuf,
    file: File,
    finished: bool,
}

#[async_trait]
impl Blobs for DiskBlobs {
    async fn create(&self) -> io::Result<Box<dyn BlobWriter>> {
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.join(UNFINISHED).join(n.to_string());
        let file = File::create_new(&path).await?;
        Ok(Box::new(DiskWriter { dir: self.dir.clone(), path, file, finished: false }))
    }

    async fn open(&self, tenant: &TenantId, id: &str) -> io::Result<Option<Blob>> {
        match File::open(self.path(tenant, id)?).await {
            Ok(file) => {
                let bytes = file.metadata().await?.len();
                Ok(Some(Blob { file, bytes }))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    async fn delete(&self, tenant: &TenantId, id: &str) -> io::Result<()> {
        match tokio::fs::remove_file(self.path(tenant, id)?).await {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl BlobWriter for DiskWriter {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes).await
    }

    async fn finish(mut self: Box<Self>, tenant: &TenantId, id: &str) -> io::Result<()> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        let to = path_of(&self.dir, tenant, id)?;
        let (from, parent) = (self.path.clone(), to.parent().map(Path::to_owned).unwrap_or_default());
        let done = tokio::task::spawn_blocking(move || {
            make_dir(&parent)?;
            std::fs::rename(&from, &to)?;
            std::fs::File::open(&parent)?.sync_all()
        });
        done.await.map_err(io::Error::other)??;
        self.finished = true;
        Ok(())
    }
}

impl Drop for DiskWriter {
    fn drop(&mut self) {
        if !self.finished {
            // What is left behind is removed by the next start.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    fn tenant() -> TenantId {
        "t".parse().unwrap()
    }

    #[tokio::test]
    async fn a_file_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = DiskBlobs::open(dir.path()).unwrap();
        let mut writer = blobs.create().await.unwrap();
        writer.write(b"ab").await.unwrap();
        writer.write(b"cd").await.unwrap();
        assert!(blobs.open(&tenant(), "0123456789").await.unwrap().is_none());
        writer.finish(&tenant(), "0123456789").await.unwrap();
        let mut blob = blobs.open(&tenant(), "0123456789").await.unwrap().unwrap();
        let mut read = String::new();
        blob.file.read_to_string(&mut read).await.unwrap();
        assert_eq!((read.as_str(), blob.bytes), ("abcd", 4));
        let mut lost = blobs.create().await.unwrap();
        lost.write(b"x").await.unwrap();
        drop(lost);
        assert_eq!(std::fs::read_dir(dir.path().join("unfinished")).unwrap().count(), 0);
        assert!(blobs.open(&"u".parse().unwrap(), "0123456789").await.unwrap().is_none(), "another tenant's");
        blobs.delete(&tenant(), "0123456789").await.unwrap();
        blobs.delete(&tenant(), "0123456789").await.unwrap();
        assert!(blobs.open(&tenant(), "0123456789").await.unwrap().is_none());
    }

    #[tokio::test]
    async fn no_id_leaves_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = DiskBlobs::open(dir.path()).unwrap();
        for id in ["", "short", "../../../etc/passwd", "0123456789/..", "01234567\0"] {
            assert!(blobs.open(&tenant(), id).await.is_err(), "{id}");
        }
    }
}
