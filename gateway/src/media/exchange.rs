//! Files from and to providers, by what the connector knows of them and through the guarded client.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use patchbay_actors::directory::{Account, MediaRecord, MediaState};
use patchbay_actors::ports::{FetchError, FileError, MediaFetcher, MediaSource, Provider};
use patchbay_connectors::{Connector, MediaLocation};
use patchbay_protocol::content::Media as File;
use patchbay_protocol::ids::derived;
use patchbay_protocol::outbound::{Call, CallResult, Verdict};
use patchbay_protocol::{AccountId, CommandError, TenantId};
use reqwest::multipart::{Form, Part};
use tokio_util::io::ReaderStream;

use super::{Media, Refused, Taken, hex, plain_name, record};
use crate::outgoing::{Outgoing, Unfetched};

/// How long putting a file at a provider may take, beside a second for each of its MiB.
const UPLOAD_PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that are read from disk at once.
const READ_BYTES: usize = 64 * 1024;

/// Our id of a provider's file: the same whenever it is asked for.
fn id_of(source: &MediaSource, provider_id: &str) -> String {
    hex(&derived(["media", source.tenant.as_str(), source.account.as_str(), provider_id]))
}

/// SHA-256 as providers write it: hexadecimal or base64.
fn digest_of(text: &str) -> Option<[u8; 32]> {
    if text.len() == 64 {
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        return Some(out);
    }
    let bytes = base64::prelude::BASE64_STANDARD_NO_PAD.decode(text.trim_end_matches('=')).ok()?;
    bytes.try_into().ok()
}

fn refused(refused: &Refused) -> FetchError {
    match refused {
        Refused::TooLarge(max) => FetchError::Final(format!("larger than {max} bytes")),
        Refused::Executable => FetchError::Final("programs and scripts are not taken".into()),
        Refused::Empty => FetchError::Final("the file is empty".into()),
        Refused::Disk => FetchError::Later,
    }
}

fn unfetched(why: Unfetched) -> FetchError {
    match why {
        // A key that has ended is replaced; the file is there meanwhile.
        Unfetched::Later | Unfetched::Refused(401) => FetchError::Later,
        Unfetched::Forbidden => {
            FetchError::Final("the provider named a place that may not be fetched from".into())
        }
        Unfetched::Refused(status) => FetchError::Final(format!("the provider answered {status}")),
    }
}

fn later(_: CommandError) -> FetchError {
    FetchError::Later
}

/// A file of ours as entries name it.
fn file_of(id: String, record: &MediaRecord, wanted: &File) -> File {
    File {
        id,
        mime: record.mime.clone(),
        name: record.name.clone().or_else(|| wanted.name.clone()),
        sha256: record.sha256.clone(),
        bytes: record.bytes,
    }
}

#[async_trait]
impl MediaFetcher for Media {
    async fn fetch(
        &self,
        source: &MediaSource,
        account: &Account,
        wanted: &File,
    ) -> Result<File, FetchError> {
        let directory = self.known().map_err(later)?.directory.clone();
        let id = id_of(source, &wanted.id);
        let before = directory.media(&source.tenant, &id).await.map_err(later)?;
        if let Some(record) = before.as_ref().filter(|r| r.state == MediaState::Ready) {
            // A file that was forwarded is fetched once.
            directory.share_media(&source.tenant, &id, source.conversation).await.map_err(later)?;
            return Ok(file_of(id, record, wanted));
        }
        let fresh = || {
            record(self.clock.now(), wanted.name.as_deref().and_then(plain_name), Some(source.conversation))
        };
        if before.is_none() {
            directory.put_media(&source.tenant, &id, &fresh()).await.map_err(later)?;
        }
        let outcome = match self.bring(account, wanted).await {
            Ok(taken) => match self.keep(&source.tenant, &id, taken, fresh(), false).await {
                Ok(record) => Ok(file_of(id.clone(), &record, wanted)),
                Err(e) if e.code.is_temporary() => Err(FetchError::Later),
                Err(e) => Err(FetchError::Final(e.code.meaning().to_owned())),
            },
            Err(error) => Err(error),
        };
        let name = match &outcome {
            Ok(_) => "stored",
            Err(FetchError::Later) => "later",
            Err(FetchError::Final(_)) => "failed",
        };
        metrics::counter!("patchbay_media_fetches_total", "outcome" => name).increment(1);
        if let Err(FetchError::Final(reason)) = &outcome {
            let failed = |r: &mut MediaRecord| {
                (r.state, r.reason) = (MediaState::Failed, Some(reason.clone()));
            };
            directory.update_media(&source.tenant, &id, failed).await.map_err(later)?;
        }
        outcome
    }
}

impl Media {
    async fn bring(&self, account: &Account, wanted: &File) -> Result<Taken, FetchError> {
        let _turn = self.fetches.acquire().await.map_err(|_| FetchError::Later)?;
        let none = || FetchError::Final("the channel has no files".into());
        let connector = patchbay_connectors::by_name(&account.connector).ok_or_else(none)?;
        let path = connector.media_path(&wanted.id).ok_or_else(none)?;
        let answer = self.outgoing.ask(account, &path).await.map_err(unfetched)?;
        let at = connector.media_location(&answer).ok_or(FetchError::Later)?;
        let taken = self.download(account, &at, wanted).await?;
        // Whoever states a digest is held to it; bytes that were spoilt on the way are fetched again.
        for stated in [&at.sha256, &wanted.sha256].into_iter().flatten() {
            if digest_of(stated).is_some_and(|digest| digest != taken.sha256) {
                metrics::counter!("patchbay_media_mismatches_total").increment(1);
                return Err(FetchError::Final("the bytes are not what the provider says they are".into()));
            }
        }
        Ok(taken)
    }

    async fn download(
        &self,
        account: &Account,
        at: &MediaLocation,
        wanted: &File,
    ) -> Result<Taken, FetchError> {
        if at.bytes.is_some_and(|bytes| bytes > self.limits.size_max.0) {
            return Err(refused(&Refused::TooLarge(self.limits.size_max.0)));
        }
        let mut response = self.outgoing.open(account, &at.url).await.map_err(unfetched)?;
        let claimed = at.mime.as_deref().unwrap_or(&wanted.mime);
        let mut taking = self.begin(Some(claimed)).await.map_err(|e| refused(&e))?;
        let all = async {
            while let Some(bytes) = self.outgoing.next(&mut response).await.map_err(unfetched)? {
                taking.add(&bytes, &self.limits, &self.has_room).await.map_err(|e| refused(&e))?;
            }
            Ok::<_, FetchError>(())
        };
        tokio::time::timeout(super::UPLOAD_MAX, all).await.map_err(|_| FetchError::Later)??;
        taking.finish(&self.limits).map_err(|e| refused(&e))
    }

    /// Puts a file at the provider; its id there.
    async fn put_there(
        &self,
        tenant: &TenantId,
        id: &str,
        record: &MediaRecord,
        account: &Account,
        connector: &dyn Connector,
    ) -> Result<(String, Duration), FileError> {
        let final_ = |why: &str| FileError::Final(why.to_owned());
        let form = connector
            .upload_form(&account.external_id, &record.mime)
            .ok_or_else(|| final_("the channel takes no files"))?;
        let blob = self.blobs.open(tenant, id).await.map_err(|_| FileError::Later)?;
        let blob = blob.ok_or_else(|| final_("the file is gone"))?;
        let name = record.name.clone().unwrap_or_else(|| format!("file.{}", extension(&record.mime)));
        let stream = ReaderStream::with_capacity(blob.file, READ_BYTES);
        let part = Part::stream_with_length(reqwest::Body::wrap_stream(stream), blob.bytes)
            .file_name(name)
            .mime_str(&record.mime)
            .map_err(|_| final_("its type cannot be written"))?;
        let fields = form.fields.into_iter().fold(Form::new(), |f, (name, value)| f.text(name, value));
        let patience = UPLOAD_PATIENCE + Duration::from_secs(blob.bytes >> 20);
        let sent =
            self.outgoing.upload(account, &form.path, fields.part(form.file_field, part), patience).await;
        match &sent {
            CallResult::Answered { status: 200..=299, body, .. } => {
                connector.uploaded(body).ok_or(FileError::Later)
            }
            // A key that has ended, or an account that may not send, is no fault of the file.
            CallResult::Answered { .. }
                if matches!(connector.classify(&sent), Verdict::Paused { .. } | Verdict::Retry { .. }) =>
            {
                Err(FileError::Held(connector.classify(&sent)))
            }
            // Nothing was sent to anybody: it may be tried again, unless the provider says that it is no use.
            CallResult::Answered { status, .. }
                if (400..500).contains(status) && !matches!(status, 408 | 429) =>
            {
                Err(FileError::Final(format!("the provider did not take the file ({status})")))
            }
            CallResult::Answered { .. } | CallResult::NotSent | CallResult::Lost => Err(FileError::Later),
        }
    }
}

fn extension(mime: &str) -> &str {
    match mime {
        "image/jpeg" => "jpg",
        "audio/mpeg" => "mp3",
        "text/plain" => "txt",
        _ => mime.rsplit(['/', '+', '.']).next().unwrap_or("bin"),
    }
}

/// What accounts call providers by: the guarded client, and files that are put there first.
pub struct Exchange {
    /// The client.
    pub outgoing: Arc<Outgoing>,
    /// The files.
    pub media: Arc<Media>,
}

#[async_trait]
impl Provider for Exchange {
    async fn call(&self, account: &Account, call: Call) -> CallResult {
        self.outgoing.call(account, call).await
    }

    async fn file(
        &self,
        tenant: &TenantId,
        account_id: &AccountId,
        account: &Account,
        file: &File,
    ) -> Result<String, FileError> {
        let media = &self.media;
        let directory = media.known().map_err(|_| FileError::Later)?.directory.clone();
        let found = directory.media(tenant, &file.id).await.map_err(|_| FileError::Later)?;
        let record = found.ok_or(FileError::NotOurs)?;
        if record.state != MediaState::Ready {
            return Err(FileError::Final("the file is not ready".into()));
        }
        let now = media.clock.now();
        if let Some((id, _)) = record.uploads.get(account_id).filter(|(_, until)| *until > now) {
            return Ok(id.clone());
        }
        let connector = patchbay_connectors::by_name(&account.connector).ok_or(FileError::Later)?;
        let (id, good_for) = media.put_there(tenant, &file.id, &record, account, connector).await?;
        let noted = (id.clone(), now.plus(good_for));
        let note = |r: &mut MediaRecord| {
            r.uploads.insert(account_id.clone(), noted.clone());
        };
        if directory.update_media(tenant, &file.id, note).await.is_err() {
            // It is put there again next time.
            tracing::warn!("where a file was put could not be noted");
        }
        Ok(id)
    }
}

/// A file's bytes from a place on, at most so many.
pub(super) fn bytes_of(
    file: tokio::fs::File,
    at_most: u64,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    use tokio::io::AsyncReadExt as _;
    ReaderStream::with_capacity(file.take(at_most), READ_BYTES).map(|chunk| chunk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_as_hex_and_as_base64() {
        let digest = [0xab; 32];
        assert_eq!(digest_of(&hex(&digest)), Some(digest));
        assert_eq!(digest_of(&base64::prelude::BASE64_STANDARD.encode(digest)), Some(digest));
        assert_eq!(digest_of("nonsense"), None);
    }
}
