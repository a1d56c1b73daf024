//! Where events go that cannot be handled.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use async_trait::async_trait;
use patchbay_storage::events::Received;
use serde_json::json;

/// Keeps events that cannot be handled.
#[async_trait]
pub trait DeadLetters: Send + 'static {
    /// Keeps one, durably, with the reason. An event that cannot be kept is not passed over.
    async fn keep(&mut self, event: &Received, why: &str) -> io::Result<()>;
}

/// In a file, one JSON object a line: `{"reason","partition","offset","key","headers","value"}`.
pub struct FileDeadLetters(File);

impl FileDeadLetters {
    /// Adds to a file, or makes it.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(OpenOptions::new().create(true).append(true).open(path)?))
    }
}

#[async_trait]
impl DeadLetters for FileDeadLetters {
    async fn keep(&mut self, event: &Received, why: &str) -> io::Result<()> {
        let headers: serde_json::Map<_, _> =
            event.envelope.headers.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        let value = String::from_utf8_lossy(&event.envelope.value);
        let line = json!({
            "reason": why, "partition": event.partition, "offset": event.offset, "key": event.envelope.key,
            "headers": headers, "value": value,
        });
        writeln!(self.0, "{line}")?;
        self.0.sync_data()
    }
}
