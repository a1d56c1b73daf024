//! Backups of a running node, as a stream for the operator.

use std::io::{self, Write};
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use patchbay_admin_api::{Backups, FileBody};
use tokio::sync::mpsc;

use crate::engines::Store;

/// Secrets that `dev` keeps beside the store.
pub const SECRETS: [&str; 4] = ["operator_key", "hmac_secret", "demo_key", "demo_app_secret"];
/// Where files are.
pub const MEDIA: &str = "media";
/// Parts of a backup that wait for a slow reader; past it the dump waits.
const PARTS_MAX: usize = 16;
const PART_BYTES: usize = 256 * 1024;

/// The backups of a node.
pub struct NodeBackups {
    /// Its store.
    pub store: Store,
    /// Its data directory.
    pub dir: PathBuf,
}

/// Hands parts to whoever reads them.
struct Parts {
    part: BytesMut,
    to: mpsc::Sender<Result<Bytes, ()>>,
}

impl Write for Parts {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.part.extend_from_slice(bytes);
        if self.part.len() >= PART_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.part.is_empty() {
            return Ok(());
        }
        // Whoever has gone away wants no more.
        self.to.blocking_send(Ok(self.part.split().freeze())).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Backups for NodeBackups {
    fn backup(&self) -> Option<FileBody> {
        let engine = self.store.embedded()?.clone();
        let (to, mut parts) = mpsc::channel(PARTS_MAX);
        let dir = self.dir.clone();
        tokio::task::spawn_blocking(move || {
            let failed = to.clone();
            let dumped = engine.dump(&dir, &SECRETS, MEDIA, Parts { part: BytesMut::new(), to });
            match dumped {
                Ok(contents) => {
                    tracing::info!(rows = contents.rows, files = contents.files, "a backup was taken")
                }
                Err(error) => {
                    tracing::error!(%error, "a backup broke off");
                    // An end that is missing tells its reader.
                    let _ = failed.blocking_send(Err(()));
                }
            }
        });
        Some(Box::pin(futures_util::stream::poll_fn(move |cx| parts.poll_recv(cx))))
    }
}
