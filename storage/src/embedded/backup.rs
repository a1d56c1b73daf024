//! A backup: every row of one moment and the files beside them, in one stream with a digest at its end. Taken from a
//! running node without holding it up: reads of a snapshot wait for nobody.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};

use fjall::{PersistMode, Readable as _};

use super::{Embedded, OpenError, directory};
use crate::engine::Table;

const MAGIC: &[u8] = b"patchbay-backup 1\n";
const END: u8 = 0;
const ROW: u8 = 1;
const FILE: u8 = 2;
/// The documents' place among the tables.
const DOCUMENTS: u8 = 255;
/// Rows of one commit while restoring.
const COMMIT_ROWS: usize = 4096;
/// The longest key and value that a backup may hold: far above any of ours.
const KEY_MAX: u32 = 1 << 20;
const VALUE_MAX: u32 = 256 << 20;

/// What a backup holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Rows and documents.
    pub rows: u64,
    /// Files.
    pub files: u64,
    /// Bytes of all of it.
    pub bytes: u64,
}

/// Why a backup cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It is no backup, or of a later version.
    #[error("not a backup that this version reads")]
    Foreign,
    /// It ends too early or was changed.
    #[error("the backup is damaged: {0}")]
    Damaged(&'static str),
    /// The target.
    #[error("{0}")]
    Open(#[from] OpenError),
    /// The disk said no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The engine said no.
    #[error("{0}")]
    Engine(#[from] fjall::Error),
}

struct Hashed<W> {
    inner: W,
    hash: blake3::Hasher,
    contents: Contents,
}

impl<W: Write> Hashed<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.contents.bytes += bytes.len() as u64;
        self.inner.write_all(bytes)
    }

    fn row(&mut self, table: u8, key: &[u8], value: &[u8]) -> io::Result<()> {
        let length = |n: usize| u32::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidData));
        self.put(&[ROW, table])?;
        self.put(&length(key.len())?.to_be_bytes())?;
        self.put(key)?;
        self.put(&length(value.len())?.to_be_bytes())?;
        self.put(value)?;
        self.contents.rows += 1;
        Ok(())
    }

    fn file(&mut self, name: &str, path: &Path) -> io::Result<()> {
        let mut file = fs::File::open(path)?;
        let bytes = file.metadata()?.len();
        let length = u16::try_from(name.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        self.put(&[FILE])?;
        self.put(&length.to_be_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&bytes.to_be_bytes())?;
        let mut left = bytes;
        let mut part = vec![0; 64 * 1024];
        while left > 0 {
            let n = part.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            file.read_exact(&mut part[..n])?;
            self.put(&part[..n])?;
            left -= n as u64;
        }
        self.contents.files += 1;
        Ok(())
    }
}

impl Embedded {
    /// Writes a backup of this moment: every row, and then the files of the data directory that are named in `names`
    /// or lie below `folder` ([`files_of`]), as they are by then: a file is there before the row that speaks of it.
    /// Blocks; belongs on a thread of its own.
    pub fn dump(&self, dir: &Path, names: &[&str], folder: &str, out: impl Write) -> io::Result<Contents> {
        let snapshot = self.keyspaces.database.snapshot();
        let mut out = Hashed { inner: out, hash: blake3::Hasher::new(), contents: Contents::default() };
        out.put(MAGIC)?;
        for table in Table::ALL {
            for guard in snapshot.iter(self.keyspaces.table(table)) {
                let (key, value) = guard.into_inner().map_err(io::Error::other)?;
                out.row(table as u8, &key, &value)?;
            }
        }
        for guard in snapshot.iter(&self.keyspaces.documents) {
            let (key, value) = guard.into_inner().map_err(io::Error::other)?;
            out.row(DOCUMENTS, &key, &value)?;
        }
        for name in files_of(dir, names, folder)? {
            out.file(&name, &dir.join(&name))?;
        }
        out.put(&[END])?;
        let digest = out.hash.finalize();
        out.inner.write_all(digest.as_bytes())?;
        out.inner.flush()?;
        Ok(out.contents)
    }
}

/// Files of a data directory that belong into a backup: those in `names` that are there, and everything below
/// `folder` but what is unfinished.
pub fn files_of(dir: &Path, names: &[&str], folder: &str) -> io::Result<Vec<String>> {
    let mut found: Vec<String> =
        names.iter().filter(|n| dir.join(n).is_file()).map(|n| (*n).to_owned()).collect();
    let mut open = vec![PathBuf::from(folder)];
    while let Some(at) = open.pop() {
        let entries = match fs::read_dir(dir.join(&at)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = at.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                if entry.file_name() != "unfinished" {
                    open.push(name);
                }
            } else if let Some(name) = name.to_str() {
                found.push(name.to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

struct Checked<R> {
    inner: R,
    hash: blake3::Hasher,
}

impl<R: Read> Checked<R> {
    fn take(&mut self, bytes: &mut [u8]) -> Result<(), RestoreError> {
        self.inner.read_exact(bytes).map_err(|_| RestoreError::Damaged("it ends too early"))?;
        self.hash.update(bytes);
        Ok(())
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], RestoreError> {
        let mut bytes = [0; N];
        self.take(&mut bytes)?;
        Ok(bytes)
    }

    fn sized(&mut self, max: u32) -> Result<Vec<u8>, RestoreError> {
        let length = u32::from_be_bytes(self.number()?);
        if length > max {
            return Err(RestoreError::Damaged("a row is too large"));
        }
        let mut bytes = vec![0; length as usize];
        self.take(&mut bytes)?;
        Ok(bytes)
    }
}

/// Makes a data directory of a backup. The directory must not be there, or be empty; it is there whole, with what
/// `finish` does to it, or not at all.
pub fn restore(
    dir: &Path,
    from: impl Read,
    finish: impl FnOnce(&Path) -> Result<(), RestoreError>,
) -> Result<Contents, RestoreError> {
    if dir.exists() && fs::read_dir(dir)?.next().is_some() {
        return Err(RestoreError::Open(OpenError::Foreign));
    }
    // Beside it, however it was written: `data`, `data/` and `./data` are one place.
    let plain: PathBuf = dir.components().collect();
    let mut making = plain.as_os_str().to_owned();
    making.push(".restoring");
    let making = PathBuf::from(making);
    if making.exists() {
        // What an earlier try left behind.
        fs::remove_dir_all(&making)?;
    }
    let outcome = restore_into(&making, from)
        .and_then(|contents| finish(&making).map(|()| contents))
        .and_then(|contents| put_in_place(&making, &plain).map(|()| contents).map_err(RestoreError::from));
    if outcome.is_err() {
        let _ = fs::remove_dir_all(&making);
    }
    outcome
}

fn put_in_place(making: &Path, dir: &Path) -> io::Result<()> {
    if dir.exists() {
        fs::remove_dir(dir)?;
    }
    fs::rename(making, dir)?;
    match dir.parent().filter(|p| p.is_dir()) {
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

fn restore_into(dir: &Path, from: impl Read) -> Result<Contents, RestoreError> {
    let mut from = Checked { inner: from, hash: blake3::Hasher::new() };
    let mut magic = [0; MAGIC.len()];
    from.take(&mut magic).map_err(|_| RestoreError::Foreign)?;
    if magic != MAGIC {
        return Err(RestoreError::Foreign);
    }
    let _lock = directory::prepare(dir)?;
    let database = fjall::Database::builder(dir.join("store")).open()?;
    let mut tables = Vec::with_capacity(Table::ALL.len());
    for table in Table::ALL {
        tables.push(database.keyspace(table.name(), super::options)?);
    }
    let documents = database.keyspace("documents", super::options)?;
    let mut contents = Contents { bytes: MAGIC.len() as u64, ..Contents::default() };
    let mut batch = database.batch();
    let mut waiting = 0;
    loop {
        match from.number::<1>()? {
            [ROW] => {
                let [table] = from.number::<1>()?;
                let (key, value) = (from.sized(KEY_MAX)?, from.sized(VALUE_MAX)?);
                let keyspace = match table {
                    DOCUMENTS => &documents,
                    table => {
                        tables.get(usize::from(table)).ok_or(RestoreError::Damaged("a table is unknown"))?
                    }
                };
                contents.rows += 1;
                contents.bytes += 10 + key.len() as u64 + value.len() as u64;
                batch.insert(keyspace, key, value);
                waiting += 1;
                if waiting == COMMIT_ROWS {
                    std::mem::replace(&mut batch, database.batch()).commit()?;
                    waiting = 0;
                }
            }
            [FILE] => {
                contents.bytes += restore_file(dir, &mut from)?;
                contents.files += 1;
            }
            [END] => break,
            _ => return Err(RestoreError::Damaged("a part is unknown")),
        }
    }
    let digest = from.hash.finalize();
    let mut stated = [0; 32];
    from.inner.read_exact(&mut stated).map_err(|_| RestoreError::Damaged("it ends too early"))?;
    if stated != *digest.as_bytes() {
        return Err(RestoreError::Damaged("its digest is another one"));
    }
    batch.commit()?;
    database.persist(PersistMode::SyncAll)?;
    contents.bytes += 1;
    Ok(contents)
}

fn restore_file<R: Read>(dir: &Path, from: &mut Checked<R>) -> Result<u64, RestoreError> {
    let damaged = || RestoreError::Damaged("a file's name leaves the directory");
    let length = u16::from_be_bytes(from.number()?);
    let mut name = vec![0; usize::from(length)];
    from.take(&mut name)?;
    let name = PathBuf::from(String::from_utf8(name).map_err(|_| damaged())?);
    if !name.components().all(|c| matches!(c, Component::Normal(_))) || name.as_os_str().is_empty() {
        return Err(damaged());
    }
    let bytes = u64::from_be_bytes(from.number()?);
    let path = dir.join(&name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    let mut left = bytes;
    let mut part = vec![0; 64 * 1024];
    while left > 0 {
        let n = part.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        from.take(&mut part[..n])?;
        file.write_all(&part[..n])?;
        left -= n as u64;
    }
    file.sync_all()?;
    Ok(bytes + 11 + u64::from(length))
}
