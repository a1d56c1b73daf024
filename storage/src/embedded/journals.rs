//! What opening the store does to its journals. The engine cuts a journal at the first byte that it cannot read; that
//! is right for a tail that a power cut tore, and wrong for damage in the middle, behind which whole batches stand.
//! So what stood there is kept until it is known which of the two it was.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::OpenError;

/// Ends every whole batch of a journal.
const BATCH_END: &[u8] = b"FJL\x03";
const KEPT: &str = "journals-before-open";
const READ_BYTES: usize = 1 << 20;

/// A journal as it was.
struct Before {
    file: PathBuf,
    kept: PathBuf,
    /// Behind its last byte that is not zero.
    end: u64,
    /// Behind its last whole batch.
    last_batch: u64,
}

/// The journals of a store before it is opened.
pub(super) struct Journals {
    dir: PathBuf,
    before: Vec<Before>,
}

impl Journals {
    /// Looks at the journals of `store` and keeps what stands in them.
    pub(super) fn look(data: &Path, store: &Path) -> io::Result<Self> {
        let dir = data.join(KEPT);
        if dir.exists() {
            put_back(&dir, store)?;
        }
        let mut before = Vec::new();
        let entries = match fs::read_dir(store) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self { dir, before }),
            entries => entries?,
        };
        for entry in entries {
            let file = entry?.path();
            if file.extension().is_none_or(|e| e != "jnl") {
                continue;
            }
            let (end, last_batch) = ends(&file)?;
            fs::create_dir_all(&dir)?;
            let kept = dir.join(file.file_name().unwrap_or_default());
            let mut copy = File::create(&kept)?;
            io::copy(&mut File::open(&file)?.take(end), &mut copy)?;
            before.push(Before { file, kept, end, last_batch });
        }
        Ok(Self { dir, before })
    }

    /// After the store was opened, or was not: what was cut off and held a whole batch is damage, and is put back.
    pub(super) fn check(self) -> Result<(), OpenError> {
        for b in &self.before {
            // One that is gone was flushed: its rows are in the tables.
            let Ok(now) = ends(&b.file) else { continue };
            if now.1 < b.last_batch {
                let place = format!("{} behind byte {}", b.file.display(), now.1);
                for b in &self.before {
                    fs::copy(&b.kept, &b.file)?;
                }
                fs::remove_dir_all(&self.dir)?;
                return Err(OpenError::Damaged(place));
            }
            let torn = b.end - b.last_batch.min(b.end);
            if torn > 0 {
                tracing::warn!(journal = %b.file.display(), bytes = torn, "a torn tail was cut: none of it was acked");
            }
        }
        self.forget()
    }

    /// Nothing was opened: the journals stay as they were.
    pub(super) fn restore(self) -> Result<(), OpenError> {
        for b in &self.before {
            fs::copy(&b.kept, &b.file)?;
        }
        self.forget()
    }

    fn forget(self) -> Result<(), OpenError> {
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir)?;
        }
        Ok(())
    }
}

/// A crash while the store was being opened: the journals are as they were before.
fn put_back(kept: &Path, store: &Path) -> io::Result<()> {
    for entry in fs::read_dir(kept)? {
        let entry = entry?;
        let file = store.join(entry.file_name());
        // A copy that a crash cut short is shorter than what it is of.
        if file.exists() && ends(&file)?.0 <= ends(&entry.path())?.0 {
            fs::copy(entry.path(), file)?;
        }
    }
    fs::remove_dir_all(kept)
}

/// Behind the last byte that is not zero, and behind the last end of a batch.
fn ends(file: &Path) -> io::Result<(u64, u64)> {
    let mut file = File::open(file)?;
    let mut at = file.metadata()?.len();
    let mut end = 0;
    let mut part = vec![0; READ_BYTES];
    // From the back: a journal is given its room in advance.
    while at > 0 {
        let n = usize::try_from(at.min(READ_BYTES as u64)).unwrap_or(READ_BYTES);
        let from = at - n as u64;
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(&mut part[..n])?;
        if end == 0
            && let Some(last) = part[..n].iter().rposition(|b| *b != 0)
        {
            end = from + last as u64 + 1;
        }
        if end > 0
            && let Some(last) = part[..n].windows(BATCH_END.len()).rposition(|w| w == BATCH_END)
        {
            return Ok((end, from + (last + BATCH_END.len()) as u64));
        }
        // A mark may lie across the edge.
        at = if from == 0 { 0 } else { from + (BATCH_END.len() as u64 - 1).min(n as u64 - 1) };
        if from > 0 && at >= from + n as u64 {
            at = from;
        }
    }
    Ok((end, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_found_from_the_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("0.jnl");
        let write = |bytes: &[u8]| fs::write(&file, bytes).unwrap();
        write(&[0; 100]);
        assert_eq!(ends(&file).unwrap(), (0, 0));
        write(&[b"xxFJL\x03yy".as_slice(), &[0; 50]].concat());
        assert_eq!(ends(&file).unwrap(), (8, 6));
        // Across the edge of what is read at once.
        let mut long = vec![1; 3 * READ_BYTES];
        let at = 2 * READ_BYTES - 2;
        long[at..at + 4].copy_from_slice(BATCH_END);
        write(&long);
        assert_eq!(ends(&file).unwrap(), (3 * READ_BYTES as u64, at as u64 + 4));
    }
}
