//! Files: taken as a stream and checked by their bytes ([`sniff`]), fetched from and put at providers ([`exchange`]),
//! shown under signed addresses that live for minutes ([`link`], [`serve`]). Never a whole file in memory.

pub mod exchange;
pub mod link;
pub mod serve;
pub mod sniff;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use patchbay_actors::clock::Clock;
use patchbay_actors::directory::{Directory, MediaRecord, MediaState};
use patchbay_admin_api::{FileBody, Files, StoredFile};
use patchbay_protocol::ids::ConversationId;
use patchbay_protocol::{CommandError, ErrorCode, TenantId, Timestamp};
use patchbay_storage::blobs::{BlobWriter, Blobs};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use crate::config;
use crate::outgoing::Outgoing;
use link::{Disposition, Link};
use sniff::Sort;

/// Files that are taken at once; past it callers are told to come back.
pub const UPLOADS_MAX: usize = 64;
/// Files that are fetched from providers at once; past it they wait.
pub const FETCHES_MAX: usize = 16;
/// How long the next bytes of an upload may take, and all of them.
const PAUSE_MAX: Duration = Duration::from_secs(20);
const UPLOAD_MAX: Duration = Duration::from_secs(600);
/// After so many bytes the disk is looked at again.
const ROOM_LOOK_BYTES: u64 = 4 << 20;
/// The longest name of a file.
const NAME_MAX: usize = 240;

/// The files of a node.
pub struct Media {
    blobs: Arc<dyn Blobs>,
    outgoing: Arc<Outgoing>,
    limits: config::Media,
    /// What clients are told before a path.
    url: Option<String>,
    clock: Clock,
    uploads: Semaphore,
    fetches: Semaphore,
    /// Whether the disk has room for more than the store's reserve.
    has_room: HasRoom,
    /// Known once the node has started.
    node: OnceLock<Known>,
}

/// Tells whether there is room for files.
pub type HasRoom = Box<dyn Fn() -> bool + Send + Sync>;

struct Known {
    directory: Arc<Directory>,
    key: [u8; 32],
}

/// Why bytes were not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Refused {
    TooLarge(u64),
    Executable,
    Empty,
    Disk,
}

impl From<Refused> for CommandError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::TooLarge(max) => {
                let detail = format!("a file of this type has at most {max} bytes");
                Self::with(ErrorCode::TooLarge, json!({ "detail": detail }))
            }
            Refused::Executable => Self::invalid("programs and scripts are not taken"),
            Refused::Empty => Self::invalid("the file is empty"),
            Refused::Disk => Self::overloaded(1000),
        }
    }
}

/// Bytes on their way into a file.
struct Taking {
    writer: Box<dyn BlobWriter>,
    hash: Sha256,
    bytes: u64,
    head: BytesMut,
    claimed: Option<String>,
}

/// A file that is written and not yet in its place.
struct Taken {
    writer: Box<dyn BlobWriter>,
    mime: String,
    bytes: u64,
    sha256: [u8; 32],
}

impl Taking {
    async fn add(
        &mut self,
        bytes: &Bytes,
        limits: &config::Media,
        has_room: &HasRoom,
    ) -> Result<(), Refused> {
        self.bytes += bytes.len() as u64;
        if self.head.len() < sniff::HEAD_BYTES {
            let room = sniff::HEAD_BYTES - self.head.len();
            self.head.extend_from_slice(&bytes[..bytes.len().min(room)]);
        }
        if self.bytes / ROOM_LOOK_BYTES != (self.bytes - bytes.len() as u64) / ROOM_LOOK_BYTES && !has_room()
        {
            return Err(Refused::Disk);
        }
        if self.bytes > limits.size_max.0 {
            return Err(Refused::TooLarge(limits.size_max.0));
        }
        if self.head.len() == sniff::HEAD_BYTES {
            self.check(limits)?;
        }
        self.hash.update(bytes);
        self.writer.write(bytes).await.map_err(|_| Refused::Disk)
    }

    fn check(&self, limits: &config::Media) -> Result<String, Refused> {
        let mime = sniff::mime(&self.head, self.claimed.as_deref());
        let max = match sniff::sort(&self.head, &mime) {
            Sort::Executable => return Err(Refused::Executable),
            Sort::Image => limits.image_max.0,
            Sort::AudioVideo => limits.audio_video_max.0,
            Sort::Document => limits.size_max.0,
        };
        let max = max.min(limits.size_max.0);
        if self.bytes > max { Err(Refused::TooLarge(max)) } else { Ok(mime) }
    }

    fn finish(self, limits: &config::Media) -> Result<Taken, Refused> {
        if self.bytes == 0 {
            return Err(Refused::Empty);
        }
        let mime = self.check(limits)?;
        Ok(Taken { writer: self.writer, mime, bytes: self.bytes, sha256: self.hash.finalize().into() })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A name without what a path or a header would trip over.
fn plain_name(name: &str) -> Option<String> {
    let plain: String = name.chars().filter(|c| !c.is_control() && !matches!(c, '/' | '\\' | '"')).collect();
    let mut plain = plain.trim_matches(['.', ' ']).to_owned();
    while plain.len() > NAME_MAX {
        plain.pop();
    }
    (!plain.is_empty()).then_some(plain)
}

impl Media {
    /// The files in `blobs`.
    pub fn new(
        blobs: Arc<dyn Blobs>,
        outgoing: Arc<Outgoing>,
        limits: config::Media,
        url: Option<String>,
        clock: Clock,
        has_room: HasRoom,
    ) -> Arc<Self> {
        Arc::new(Self {
            blobs,
            outgoing,
            limits,
            url,
            clock,
            has_room,
            uploads: Semaphore::new(UPLOADS_MAX),
            fetches: Semaphore::new(FETCHES_MAX),
            node: OnceLock::new(),
        })
    }

    /// The node has started; once.
    pub async fn ready(&self, directory: Arc<Directory>) -> Result<(), CommandError> {
        let key = directory.own_secret("media_links").await?;
        let _ = self.node.set(Known { directory, key });
        Ok(())
    }

    fn known(&self) -> Result<&Known, CommandError> {
        self.node.get().ok_or_else(CommandError::unavailable)
    }

    async fn begin(&self, claimed: Option<&str>) -> Result<Taking, Refused> {
        if !(self.has_room)() {
            return Err(Refused::Disk);
        }
        let writer = self.blobs.create().await.map_err(|_| Refused::Disk)?;
        let claimed = claimed.map(str::to_owned);
        Ok(Taking { writer, hash: Sha256::new(), bytes: 0, head: BytesMut::new(), claimed })
    }

    /// Puts a file in its place, counts it and says that it is there.
    async fn keep(
        &self,
        tenant: &TenantId,
        id: &str,
        taken: Taken,
        record: MediaRecord,
    ) -> Result<MediaRecord, CommandError> {
        let directory = &self.known()?.directory;
        let size = i64::try_from(taken.bytes).unwrap_or(i64::MAX);
        if !directory.use_media(tenant, size, self.limits.quota.0).await? {
            let detail = json!({"detail": "the tenant's files would be more than its quota"});
            return Err(CommandError::with(ErrorCode::TooLarge, detail));
        }
        let record = MediaRecord {
            state: MediaState::Ready,
            mime: taken.mime,
            bytes: Some(taken.bytes),
            sha256: Some(hex(&taken.sha256)),
            reason: None,
            ..record
        };
        let kept = match taken.writer.finish(tenant, id).await {
            Ok(()) => directory.put_media(tenant, id, &record).await.map(|_| ()),
            Err(error) => {
                tracing::error!(%error, "a file could not be written");
                Err(CommandError::overloaded(1000))
            }
        };
        if let Err(error) = kept {
            // Nobody can ask for it: without its row it is not there.
            let _ = self.blobs.delete(tenant, id).await;
            directory.use_media(tenant, -size, self.limits.quota.0).await?;
            return Err(error);
        }
        metrics::counter!("patchbay_media_stored_bytes_total").increment(taken.bytes);
        Ok(record)
    }

    async fn take_body(&self, mut body: FileBody, claimed: Option<&str>) -> Result<Taken, CommandError> {
        let mut taking = self.begin(claimed).await?;
        loop {
            let next = tokio::time::timeout(PAUSE_MAX, body.next()).await;
            match next.map_err(|_| CommandError::invalid("the body stopped coming"))? {
                Some(Ok(bytes)) => taking.add(&bytes, &self.limits, &self.has_room).await?,
                Some(Err(())) => return Err(CommandError::invalid("the body broke off")),
                None => return Ok(taking.finish(&self.limits)?),
            }
        }
    }
}

fn record(now: Timestamp, name: Option<String>, conversation: Option<ConversationId>) -> MediaRecord {
    MediaRecord {
        state: MediaState::Pending,
        mime: "application/octet-stream".into(),
        bytes: None,
        sha256: None,
        name,
        created_at: now,
        private: conversation.is_some(),
        conversations: conversation.into_iter().collect(),
        uploads: Default::default(),
        reason: None,
    }
}

#[async_trait::async_trait]
impl Files for Media {
    async fn put(
        &self,
        tenant: &TenantId,
        conversation: Option<ConversationId>,
        claimed: Option<&str>,
        name: Option<&str>,
        body: FileBody,
    ) -> Result<StoredFile, CommandError> {
        let Ok(_place) = self.uploads.try_acquire() else { return Err(CommandError::overloaded(1000)) };
        let taken = tokio::time::timeout(UPLOAD_MAX, self.take_body(body, claimed)).await;
        let taken = taken.map_err(|_| CommandError::invalid("the body took too long"))??;
        let id = format!("{:032x}", rand::random::<u128>());
        let fresh = record(self.clock.now(), name.and_then(plain_name), conversation);
        let record = self.keep(tenant, &id, taken, fresh).await?;
        Ok(StoredFile { id, record })
    }

    fn link(
        &self,
        tenant: &TenantId,
        id: &str,
        record: &MediaRecord,
    ) -> Result<(String, Timestamp), CommandError> {
        let ttl = i64::try_from(self.limits.url_ttl.as_secs()).unwrap_or(300).max(1);
        let expires = self.clock.now().as_millis().div_euclid(1000) + ttl;
        let shown = matches!(record.mime.split('/').next(), Some("image" | "audio" | "video"))
            && record.mime != "image/svg+xml";
        let disposition = if shown { Disposition::Inline } else { Disposition::Attachment };
        let link = Link { tenant: tenant.clone(), id: id.to_owned(), expires, disposition };
        Ok((link.sign(&self.known()?.key), Timestamp::from_seconds(expires)))
    }

    fn base(&self, host: Option<&str>) -> String {
        match (&self.url, host) {
            (Some(url), _) => url.trim_end_matches('/').to_owned(),
            (None, Some(host)) => format!("http://{host}"),
            (None, None) => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_plain() {
        assert_eq!(plain_name("../../etc/pass\"wd\n").as_deref(), Some("etcpasswd"));
        assert_eq!(plain_name("año nuevo.pdf").as_deref(), Some("año nuevo.pdf"));
        assert_eq!(plain_name("..."), None);
        assert!(plain_name(&"é".repeat(500)).unwrap().len() <= NAME_MAX);
    }
}
