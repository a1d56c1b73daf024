//! The data directory: locked while open, with a format version of its own.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

const FORMAT_FILE: &str = "FORMAT";
const LOCK_FILE: &str = "LOCK";
const FORMAT_NAME: &str = "patchbay-embedded";
const FORMAT_VERSION: u32 = 1;

/// Why a data directory cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("the data directory is in use by another process")]
    InUse,
    /// Something else lies there.
    #[error("the directory is not empty and not a patchbay data directory")]
    Foreign,
    /// It was written by a newer version.
    #[error(
        "the data directory has format {0}, this version reads up to {FORMAT_VERSION}: use a newer patchbay"
    )]
    Newer(u32),
    /// What stands there is not what was written.
    #[error("the store is damaged: {0}; nothing was changed, restore a backup")]
    Damaged(String),
    /// The disk said no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The engine said no.
    #[error("the store cannot be opened: {0}")]
    Engine(#[from] fjall::Error),
}

/// Held while the directory is open; the operating system lets go of it when the process ends.
pub struct Lock(#[allow(dead_code)] File);

/// Whether a store was ever made there.
pub fn is_store(path: &Path) -> bool {
    path.join(FORMAT_FILE).exists()
}

/// Makes the directory if it is missing, locks it and checks its format.
pub(super) fn prepare(path: &Path) -> Result<Lock, OpenError> {
    let known = path.join(FORMAT_FILE).exists() || path.join(LOCK_FILE).exists();
    if !known && path.exists() && fs::read_dir(path)?.next().is_some() {
        return Err(OpenError::Foreign);
    }
    let lock = lock(path)?;
    check_format(path)?;
    Ok(lock)
}

/// Makes the directory if it is missing and locks it, whatever lies in it.
pub fn lock(path: &Path) -> Result<Lock, OpenError> {
    if !path.exists() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    }
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path.join(LOCK_FILE))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(OpenError::InUse),
        Err(TryLockError::Error(e)) => return Err(e.into()),
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    Ok(Lock(lock))
}

fn check_format(path: &Path) -> Result<(), OpenError> {
    let file = path.join(FORMAT_FILE);
    match fs::read_to_string(&file) {
        Ok(text) => {
            let version = text.trim().strip_prefix(FORMAT_NAME).and_then(|v| v.trim().parse::<u32>().ok());
            match version {
                Some(v) if v > FORMAT_VERSION => Err(OpenError::Newer(v)),
                Some(_) => Ok(()),
                None => Err(OpenError::Foreign),
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let fresh = path.join("FORMAT.new");
            let mut f = File::create(&fresh)?;
            writeln!(f, "{FORMAT_NAME} {FORMAT_VERSION}")?;
            f.sync_all()?;
            fs::rename(&fresh, &file)?;
            File::open(path)?.sync_all()?;
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}
