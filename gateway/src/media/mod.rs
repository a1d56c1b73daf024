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
use patchbay_actors::shares::Shares;
use patchbay_admin_api::{FileBody, Files, StoredFile};
use patchbay_protocol::ids::ConversationId;
use patchbay_protocol::{CommandError, ErrorCode, TenantId, Timestamp};
use patchbay_storage::blobs::{BlobWriter, Blobs};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use crate::config;
use crate::outgoing::Outgoing;
use link::{Disposition, Link};
use sniff::Sort;

/// Files that are taken at once; past it callers are told to come back.
pub const UPLOADS_MAX: usize = 64;
/// Of them, those of one tenant.
const TENANT_UPLOADS_MAX: usize = 16;
/// Of those, those of its visitors.
const VISITORS_UPLOADS_MAX: usize = 8;
/// Between room taken for a file and its record lie a sync and two writes: whatever takes longer was cut off.
const STORING_MAX: Duration = Duration::from_secs(600);
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
    /// How many of them are each tenant's.
    tenants: Shares<TenantId>,
    visitors: Shares<TenantId>,
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

/// One of the uploads at once: of all, of its tenant, and of the tenant's visitors when one of them sends it.
struct Place<'a> {
    _all: SemaphorePermit<'a>,
    _tenant: OwnedSemaphorePermit,
    _visitors: Option<OwnedSemaphorePermit>,
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
            tenants: Shares::new(|| Semaphore::new(TENANT_UPLOADS_MAX)),
            visitors: Shares::new(|| Semaphore::new(VISITORS_UPLOADS_MAX)),
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
        visitors: bool,
    ) -> Result<MediaRecord, CommandError> {
        let directory = &self.known()?.directory;
        self.settle_forgotten(tenant).await?;
        let (now, quota) = (self.clock.now(), self.limits.quota.0);
        if !directory.reserve_media(tenant, id, taken.bytes, now, quota, visitors).await? {
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
        if let Err(error) = taken.writer.finish(tenant, id).await {
            tracing::error!(%error, "a file could not be written");
            // It may be in its place all the same, where only the last sync has failed.
            let _ = self.blobs.delete(tenant, id).await;
            directory.settle_media(tenant, id, false).await?;
            return Err(CommandError::overloaded(1000));
        }
        // Where this fails nobody knows whether its row stands: what was reserved is settled by what is found later.
        directory.put_media(tenant, id, &record).await?;
        metrics::counter!("patchbay_media_stored_bytes_total").increment(taken.bytes);
        if let Err(error) = directory.settle_media(tenant, id, true).await {
            tracing::warn!(%error, "a file is counted later");
        }
        Ok(record)
    }

    /// What a crash or a full disk left between room taken and file stored: its row tells whether it is there.
    async fn settle_forgotten(&self, tenant: &TenantId) -> Result<(), CommandError> {
        let directory = &self.known()?.directory;
        for id in directory.forgotten_media(tenant, self.clock.now().minus(STORING_MAX)).await? {
            let record = directory.media(tenant, &id).await?;
            let stored = record.is_some_and(|r| r.state == MediaState::Ready);
            if !stored && self.blobs.delete(tenant, &id).await.is_err() {
                continue;
            }
            directory.settle_media(tenant, &id, stored).await?;
        }
        Ok(())
    }

    fn place(&self, tenant: &TenantId, visitor: bool) -> Result<Place<'_>, CommandError> {
        let full = || CommandError::overloaded(1000);
        Ok(Place {
            _all: self.uploads.try_acquire().map_err(|_| full())?,
            _tenant: self.tenants.take(tenant.clone()).ok_or_else(full)?,
            _visitors: match visitor {
                true => Some(self.visitors.take(tenant.clone()).ok_or_else(full)?),
                false => None,
            },
        })
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
        let _place = self.place(tenant, conversation.is_some())?;
        let taken = tokio::time::timeout(UPLOAD_MAX, self.take_body(body, claimed)).await;
        let taken = taken.map_err(|_| CommandError::invalid("the body took too long"))??;
        let id = format!("{:032x}", rand::random::<u128>());
        let fresh = record(self.clock.now(), name.and_then(plain_name), conversation);
        let record = self.keep(tenant, &id, taken, fresh, conversation.is_some()).await?;
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
    use std::sync::atomic::{AtomicI64, Ordering};

    use patchbay_storage::blobs::DiskBlobs;
    use patchbay_storage::embedded::Embedded;

    use super::*;
    use crate::config::Config;
    use crate::outgoing::Guard;

    /// A node ended between room taken and file stored, once before and once after the file's row.
    #[tokio::test]
    async fn what_was_cut_off_is_counted_by_what_is_found_of_it() {
        static LATER: AtomicI64 = AtomicI64::new(0);
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(Embedded::open(&dir.path().join("data")).unwrap());
        let directory = Arc::new(Directory::new(engine));
        let blobs = Arc::new(DiskBlobs::open(&dir.path().join("media")).unwrap());
        let guard = Guard { allowed_hosts: vec![], media_hosts: vec![], loopback: false };
        let outgoing = Arc::new(Outgoing::new(guard, Duration::from_secs(1)).unwrap());
        let clock = Clock::settable(Timestamp::from_seconds(1_763_715_600), &LATER);
        let mut limits = Config::default().media;
        limits.quota.0 = 3072;
        let media = Media::new(blobs.clone(), outgoing, limits, None, clock, Box::new(|| true));
        media.ready(directory.clone()).await.unwrap();
        let tenant: TenantId = "acme".parse().unwrap();
        let put = async |bytes: usize| {
            let body = futures_util::stream::iter([Ok(Bytes::from(vec![b'x'; bytes]))]);
            media.put(&tenant, None, Some("text/plain"), None, Box::pin(body)).await.map(|f| f.id)
        };
        for id in ["00000000lost", "00000000kept"] {
            assert!(directory.reserve_media(&tenant, id, 1024, clock.now(), 3072, false).await.unwrap());
            let mut writer = blobs.create().await.unwrap();
            writer.write(b"bytes").await.unwrap();
            writer.finish(&tenant, id).await.unwrap();
        }
        let stands = MediaRecord { state: MediaState::Ready, ..record(clock.now(), None, None) };
        directory.put_media(&tenant, "00000000kept", &stands).await.unwrap();
        assert_eq!(put(2000).await.unwrap_err().code, ErrorCode::TooLarge, "both may still come");
        LATER.store(700_000, Ordering::Relaxed);
        put(2000).await.unwrap();
        assert!(blobs.open(&tenant, "00000000lost").await.unwrap().is_none());
        assert!(blobs.open(&tenant, "00000000kept").await.unwrap().is_some());
        assert_eq!(put(100).await.unwrap_err().code, ErrorCode::TooLarge, "what stands is counted");
        put(48).await.unwrap();
        // Visitors leave half of what there is to everybody else.
        let tenant: TenantId = "visited".parse().unwrap();
        let reserve = async |id: &str, bytes, visitors| {
            directory.reserve_media(&tenant, id, bytes, clock.now(), 3072, visitors).await.unwrap()
        };
        assert!(reserve("0000000a", 1000, true).await);
        directory.settle_media(&tenant, "0000000a", true).await.unwrap();
        assert!(!reserve("0000000b", 600, true).await);
        assert!(reserve("0000000b", 2000, false).await);
    }

    #[test]
    fn names_are_made_plain() {
        assert_eq!(plain_name("../../etc/pass\"wd\n").as_deref(), Some("etcpasswd"));
        assert_eq!(plain_name("año nuevo.pdf").as_deref(), Some("año nuevo.pdf"));
        assert_eq!(plain_name("..."), None);
        assert!(plain_name(&"é".repeat(500)).unwrap().len() <= NAME_MAX);
    }
}
