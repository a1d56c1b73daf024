//! Events in log files of the node's own, with the same readers as on Kafka.
//!
//! A directory of segments, each named by the offset of its first event and written by one node. An event is delivered
//! when it is synced; `synced` names the offset that readers may go up to, so that nobody has read what a power cut
//! takes back. Groups keep their places beside it. Any process may read. The oldest segments go when all together are
//! larger than the bound; a reader that was slower than that goes on at the first event that there is, and its gap
//! shows in the conversations' seqs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use patchbay_protocol::event::{Event, Origin};
use patchbay_protocol::ids::ConversationId;
use tokio::time::Instant;

use super::{Deliveries, Delivery, Fault, Lag, Received, SendError, Sink, Source, SourceError};

/// Bytes of a segment; the next event begins another.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// Bytes that wait to be written; past it nothing more is taken.
pub const WAITING_BYTES_MAX: usize = 8 << 20;
/// Syncs are this far apart at least: they share the disk with the store's.
const SYNC_EVERY: Duration = Duration::from_millis(50);
/// A reader at the end looks this often.
const READ_LOOK: Duration = Duration::from_millis(10);
/// Places of a group are written this often at most.
const COMMIT_EVERY: Duration = Duration::from_millis(200);
/// Bytes that a reader takes at once.
const READ_BYTES: usize = 256 << 10;
/// The largest event that a reader believes in.
const EVENT_BYTES_MAX: usize = 64 << 20;
const HEADER: usize = 8;

fn checksum(body: &[u8]) -> u32 {
    let hash = blake3::hash(body);
    let [a, b, c, d, ..] = *hash.as_bytes();
    u32::from_be_bytes([a, b, c, d])
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    // Names have at most 63 characters.
    out.put_u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
    out.put_slice(name.as_bytes());
}

fn encode(event: &Event, out: &mut Vec<u8>) {
    let at = out.len();
    out.put_u64(0);
    out.put_u64(event.seq);
    out.put_slice(event.origin.conversation.as_bytes());
    put_name(out, event.origin.tenant.as_str());
    put_name(out, event.origin.account.as_str());
    put_name(out, event.inbox.as_str());
    out.put_slice(&event.entry);
    let body = at + HEADER;
    let length = u32::try_from(out.len() - body).unwrap_or(u32::MAX).to_be_bytes();
    let sum = checksum(&out[body..]).to_be_bytes();
    out[at..at + 4].copy_from_slice(&length);
    out[at + 4..body].copy_from_slice(&sum);
}

fn name<T: std::str::FromStr>(body: &mut Bytes) -> Option<T> {
    let length = usize::from(body.try_get_u8().ok()?);
    if body.len() < length {
        return None;
    }
    std::str::from_utf8(&body.split_to(length)).ok()?.parse().ok()
}

fn decode(mut body: Bytes) -> Option<Event> {
    let seq = body.try_get_u64().ok()?;
    let mut conversation = [0; 16];
    body.try_copy_to_slice(&mut conversation).ok()?;
    let origin = Origin {
        tenant: name(&mut body)?,
        account: name(&mut body)?,
        conversation: ConversationId::from_bytes(conversation),
    };
    Some(Event { inbox: name(&mut body)?, origin: Arc::new(origin), seq, entry: body })
}

/// The length of the event that `bytes` begin with, header and all; none: it is not whole, or not what was written.
fn whole(bytes: &[u8]) -> Option<usize> {
    let mut head = bytes;
    let (length, sum) = (head.try_get_u32().ok()? as usize, head.try_get_u32().ok()?);
    let body = head.get(..length)?;
    (checksum(body) == sum).then_some(HEADER + length)
}

fn segment(dir: &Path, base: u64) -> PathBuf {
    dir.join(format!("{base:020}.events"))
}

/// The first offsets of the segments that there are, ascending.
fn segments(dir: &Path) -> io::Result<Vec<u64>> {
    let mut bases = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let base: Option<u64> =
            name.to_str().and_then(|n| n.strip_suffix(".events")).and_then(|n| n.parse().ok());
        bases.extend(base);
    }
    bases.sort_unstable();
    Ok(bases)
}

fn synced_file(dir: &Path) -> PathBuf {
    dir.join("synced")
}

/// The offset that readers may go up to.
fn synced(dir: &Path) -> io::Result<u64> {
    let mut bytes = [0; 8];
    match File::open(synced_file(dir)).and_then(|f| f.read_exact_at(&mut bytes, 0)) {
        Ok(()) => Ok(u64::from_be_bytes(bytes)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) => Ok(0),
        Err(e) => Err(e),
    }
}

/// Events and bytes of a segment that are whole.
fn measure(file: &mut File) -> io::Result<(u64, u64)> {
    let (mut events, mut length) = (0, 0);
    let mut bytes = BytesMut::new();
    file.seek(SeekFrom::Start(0))?;
    loop {
        while let Some(one) = whole(&bytes) {
            bytes.advance(one);
            events += 1;
            length += one as u64;
        }
        if fill(file, &mut bytes)? == 0 {
            return Ok((events, length));
        }
    }
}

fn fill(file: &mut File, bytes: &mut BytesMut) -> io::Result<usize> {
    let mut more = vec![0; READ_BYTES];
    let n = file.read(&mut more)?;
    bytes.extend_from_slice(&more[..n]);
    Ok(n)
}

/// The segment that is being written.
struct Writing {
    file: File,
    synced: File,
    /// The next event's offset.
    next: u64,
    /// Bytes of the segment.
    length: u64,
}

impl Writing {
    /// Opens the newest segment and cuts what is not whole.
    fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir.join("groups"))?;
        let base = segments(dir)?.last().copied().unwrap_or(0);
        let open =
            |path: &Path| OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path);
        let mut file = open(&segment(dir, base))?;
        let (events, length) = measure(&mut file)?;
        file.set_len(length)?;
        file.seek(SeekFrom::Start(length))?;
        file.sync_all()?;
        let synced = open(&synced_file(dir))?;
        let writing = Self { file, synced, next: base + events, length };
        writing.tell()?;
        Ok(writing)
    }

    fn tell(&self) -> io::Result<()> {
        self.synced.write_all_at(&self.next.to_be_bytes(), 0)
    }

    /// Writes and syncs `events` events.
    fn append(&mut self, dir: &Path, bytes: &[u8], events: u64, retention: u64) -> io::Result<()> {
        if self.length >= SEGMENT_BYTES {
            self.file =
                OpenOptions::new().create(true).truncate(true).write(true).open(segment(dir, self.next))?;
            self.length = 0;
            File::open(dir)?.sync_all()?;
            retain(dir, retention)?;
        }
        self.file.write_all(bytes)?;
        self.file.sync_data()?;
        self.length += bytes.len() as u64;
        self.next += events;
        self.tell()
    }
}

/// Lets go of the oldest segments beyond the bound; never of the newest.
fn retain(dir: &Path, retention: u64) -> io::Result<()> {
    let bases = segments(dir)?;
    let mut total = 0;
    for (n, base) in bases.iter().enumerate().rev() {
        total += fs::metadata(segment(dir, *base))?.len();
        if total > retention && n + 1 < bases.len() {
            fs::remove_file(segment(dir, *base))?;
        }
    }
    Ok(())
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    events: Vec<(ConversationId, u64)>,
    generation: u32,
    /// Nothing is taken before it is opened again.
    failed: Option<String>,
    ended: bool,
}

struct Shared {
    dir: PathBuf,
    retention: u64,
    waiting: Mutex<Waiting>,
    news: Condvar,
    writing: Mutex<Option<Writing>>,
    deliveries: Deliveries,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> MutexGuard<'_, Option<Writing>> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Publishes into log files.
pub struct EmbeddedSink(Arc<Shared>);

impl EmbeddedSink {
    /// Publishes into `dir`, which holds at most about `retention` bytes; [`Sink::open`] opens it.
    pub fn new(dir: &Path, retention: u64, deliveries: Deliveries) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            retention: retention.max(SEGMENT_BYTES),
            waiting: Mutex::new(Waiting { failed: Some("not open".into()), ..Waiting::default() }),
            news: Condvar::new(),
            writing: Mutex::default(),
            deliveries,
        });
        let for_writer = shared.clone();
        std::thread::Builder::new().name("events".into()).spawn(move || write(&for_writer))?;
        Ok(Self(shared))
    }
}

impl Drop for EmbeddedSink {
    fn drop(&mut self) {
        self.0.waiting().ended = true;
        self.0.news.notify_one();
    }
}

/// Writes what waits until the sink has gone.
fn write(shared: &Shared) {
    let mut batch = Waiting::default();
    loop {
        {
            let mut waiting = shared.waiting();
            while waiting.events.is_empty() && !waiting.ended {
                waiting = shared.news.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            if waiting.ended {
                return;
            }
            std::mem::swap(&mut waiting.bytes, &mut batch.bytes);
            std::mem::swap(&mut waiting.events, &mut batch.events);
            batch.generation = waiting.generation;
        }
        let outcome = match shared.writing().as_mut() {
            Some(writing) => {
                writing.append(&shared.dir, &batch.bytes, batch.events.len() as u64, shared.retention)
            }
            None => Err(io::Error::other("not open")),
        };
        let outcome = outcome.map_err(|e| {
            *shared.writing() = None;
            shared.waiting().failed = Some(e.to_string());
            Fault::Passing(e.to_string())
        });
        batch.bytes.clear();
        for (conversation, seq) in batch.events.drain(..) {
            let outcome = outcome.clone();
            let delivery = Delivery { conversation, seq, generation: batch.generation, outcome };
            let _ = shared.deliveries.blocking_send(delivery);
        }
        std::thread::sleep(SYNC_EVERY);
    }
}

#[async_trait]
impl Sink for EmbeddedSink {
    async fn open(&self, generation: u32) -> Result<(), String> {
        let shared = self.0.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let mut writing = shared.writing();
            let mut waiting = shared.waiting();
            waiting.bytes.clear();
            waiting.events.clear();
            waiting.generation = generation;
            *writing = None;
            *writing = Some(Writing::open(&shared.dir)?);
            waiting.failed = None;
            Ok::<_, io::Error>(())
        });
        opened.await.map_err(|e| e.to_string())?.map_err(|e| format!("events: {e}"))
    }

    fn send(&self, event: &Event) -> Result<(), SendError> {
        let mut waiting = self.0.waiting();
        if let Some(why) = &waiting.failed {
            return Err(SendError::Fault(Fault::Passing(why.clone())));
        }
        if waiting.bytes.len() >= WAITING_BYTES_MAX {
            return Err(SendError::Full);
        }
        encode(event, &mut waiting.bytes);
        waiting.events.push((event.origin.conversation, event.seq));
        if waiting.events.len() == 1 {
            self.0.news.notify_one();
        }
        Ok(())
    }
}

/// Removes what a group that will not come back has left.
pub fn forget_group(dir: &Path, group: &str) {
    let file = dir.join("groups").join(group);
    let _ = fs::remove_file(file.with_extension("lock"));
    let _ = fs::remove_file(file);
}

/// A member of a group of readers. There is one partition, so one member reads; the others wait to take over.
pub struct EmbeddedSource {
    dir: PathBuf,
    group: PathBuf,
    /// Held while this member is the one that reads.
    lock: Option<File>,
    /// The segment that is being read, and its first offset.
    file: Option<(u64, File)>,
    bytes: BytesMut,
    /// The offset of the event that `bytes` begin with.
    next: u64,
    /// As far as is known to be synced; it only rises.
    end: u64,
    paused: bool,
    /// The place of the group, and when it was last written.
    done: u64,
    written: (u64, Instant),
}

fn broken(error: &io::Error) -> SourceError {
    SourceError(error.to_string())
}

impl EmbeddedSource {
    /// Joins a group that reads `dir`. One that has no place yet begins at the first event.
    pub fn join(dir: &Path, group: &str) -> Result<Self, SourceError> {
        if !patchbay_protocol::ids::is_name(group) {
            return Err(SourceError(format!("`{group}` is no name of a group")));
        }
        fs::create_dir_all(dir.join("groups")).map_err(|e| broken(&e))?;
        Ok(Self {
            dir: dir.to_owned(),
            group: dir.join("groups").join(group),
            lock: None,
            file: None,
            bytes: BytesMut::new(),
            next: 0,
            end: 0,
            paused: false,
            done: 0,
            written: (0, Instant::now()),
        })
    }

    /// Becomes the one that reads, if nobody else is.
    fn take_over(&mut self) -> io::Result<bool> {
        if self.lock.is_some() {
            return Ok(true);
        }
        let path = self.group.with_extension("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(false),
            Err(fs::TryLockError::Error(e)) => return Err(e),
        }
        self.done = match fs::read_to_string(&self.group) {
            Ok(text) => text.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            Err(e) => return Err(e),
        };
        (self.next, self.written.0) = (self.done, self.done);
        self.lock = Some(lock);
        Ok(true)
    }

    /// Goes on behind the last event that there is now.
    pub fn skip_all(&mut self) -> Result<(), SourceError> {
        let end = synced(&self.dir).map_err(|e| broken(&e))?;
        if self.take_over().map_err(|e| broken(&e))? {
            self.go_to(end);
        }
        Ok(())
    }

    fn go_to(&mut self, offset: u64) {
        (self.next, self.file) = (offset, None);
        self.bytes.clear();
    }

    /// Opens the segment that the next event stands in; none: there is none yet.
    fn open(&mut self) -> io::Result<Option<()>> {
        let bases = segments(&self.dir)?;
        let Some(first) = bases.first().copied() else { return Ok(None) };
        // What is gone is gone.
        self.next = self.next.max(first);
        let base = bases.into_iter().rfind(|base| *base <= self.next).unwrap_or(first);
        let mut file = File::open(segment(&self.dir, base))?;
        let wanted = self.next;
        self.next = base;
        while self.next < wanted {
            match whole(&self.bytes) {
                Some(one) => {
                    self.bytes.advance(one);
                    self.next += 1;
                }
                None if fill(&mut file, &mut self.bytes)? == 0 => break,
                None => {}
            }
        }
        self.next = wanted;
        self.file = Some((base, file));
        Ok(Some(()))
    }

    /// The next event, if it is there.
    fn read(&mut self) -> io::Result<Option<(u64, Event)>> {
        if self.paused || !self.take_over()? {
            return Ok(None);
        }
        if self.next >= self.end {
            self.end = synced(&self.dir)?;
        }
        if self.next >= self.end {
            return Ok(None);
        }
        if self.file.is_none() && self.open()?.is_none() {
            return Ok(None);
        }
        loop {
            if let Some(one) = whole(&self.bytes) {
                let mut body = self.bytes.split_to(one).freeze();
                body.advance(HEADER);
                let offset = self.next;
                self.next += 1;
                match decode(body) {
                    Some(event) => return Ok(Some((offset, event))),
                    None => continue,
                }
            }
            if self.bytes.len() > EVENT_BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let Some((base, file)) = &mut self.file else { return Ok(None) };
            if fill(file, &mut self.bytes)? == 0 {
                // The end of this segment; the next one begins with the next event.
                let base = *base;
                self.file = None;
                self.bytes.clear();
                if self.next == base || !segment(&self.dir, self.next).exists() {
                    return Ok(None);
                }
                self.open()?;
            }
        }
    }

    fn keep_place(&mut self) -> io::Result<()> {
        if self.lock.is_none() || self.written.0 == self.done {
            return Ok(());
        }
        let fresh = self.group.with_extension("new");
        fs::write(&fresh, self.done.to_string())?;
        fs::rename(&fresh, &self.group)?;
        self.written = (self.done, Instant::now());
        Ok(())
    }
}

impl Drop for EmbeddedSource {
    fn drop(&mut self) {
        // What is not kept is read again.
        let _ = self.keep_place();
    }
}

#[async_trait]
impl Source for EmbeddedSource {
    async fn next(&mut self) -> Result<Received, SourceError> {
        loop {
            if let Some((offset, event)) = self.read().map_err(|e| broken(&e))? {
                let Some(envelope) = event.envelope() else { continue };
                return Ok(Received {
                    partition: 0,
                    offset: i64::try_from(offset).unwrap_or(i64::MAX),
                    envelope,
                });
            }
            if self.written.1.elapsed() >= COMMIT_EVERY {
                self.keep_place().map_err(|e| broken(&e))?;
            }
            tokio::time::sleep(READ_LOOK).await;
        }
    }

    async fn commit(&mut self, _: i32, offset: i64) -> Result<(), SourceError> {
        self.done = self.done.max(u64::try_from(offset).unwrap_or_default() + 1);
        if self.written.1.elapsed() >= COMMIT_EVERY {
            self.keep_place().map_err(|e| broken(&e))?;
        }
        Ok(())
    }

    fn seek(&mut self, _: i32, offset: i64) -> Result<(), SourceError> {
        self.go_to(u64::try_from(offset).unwrap_or_default());
        Ok(())
    }

    fn pause(&mut self) -> Result<(), SourceError> {
        self.paused = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), SourceError> {
        self.paused = false;
        Ok(())
    }

    async fn lag(&mut self) -> Result<Lag, SourceError> {
        let end = synced(&self.dir).map_err(|e| broken(&e))?;
        Ok(Lag { events: end.saturating_sub(self.next) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(conversation: u8, seq: u64) -> Event {
        let origin = Origin {
            tenant: "t".parse().unwrap(),
            account: "wa".parse().unwrap(),
            conversation: ConversationId::from_bytes([conversation; 16]),
        };
        let entry = format!("{{\"seq\":{seq},\"at\":\"2026-11-21T09:00:00Z\",\"type\":\"note.added\"}}");
        Event { origin: Arc::new(origin), inbox: "main".parse().unwrap(), seq, entry: entry.into() }
    }

    async fn publish(sink: &EmbeddedSink, delivered: &mut super::super::Delivered, events: &[Event]) {
        for event in events {
            sink.send(event).unwrap();
        }
        for event in events {
            let told = delivered.recv().await.unwrap();
            assert_eq!((told.seq, told.outcome), (event.seq, Ok(())));
        }
    }

    fn sequence(received: &Received) -> u64 {
        let header = received.envelope.headers.iter().find(|(n, _)| *n == "ce_sequence").unwrap();
        header.1.parse().unwrap()
    }

    #[tokio::test]
    async fn a_group_goes_on_behind_what_it_has_committed_also_when_a_tail_is_torn() {
        let dir = tempfile::tempdir().unwrap();
        let (to, mut delivered) = super::super::deliveries();
        let sink = EmbeddedSink::new(dir.path(), 1 << 30, to.clone()).unwrap();
        assert!(matches!(sink.send(&event(1, 1)), Err(SendError::Fault(_))), "not open yet");
        sink.open(0).await.unwrap();
        publish(&sink, &mut delivered, &[event(1, 1), event(2, 1), event(1, 2)]).await;
        let mut reader = EmbeddedSource::join(dir.path(), "g").unwrap();
        for expected in [1, 1] {
            let got = reader.next().await.unwrap();
            assert_eq!(sequence(&got), expected);
            reader.commit(got.partition, got.offset).await.unwrap();
        }
        assert_eq!(reader.lag().await.unwrap().events, 1);
        let mut second = EmbeddedSource::join(dir.path(), "g").unwrap();
        let waits = tokio::time::timeout(Duration::from_millis(50), second.next()).await;
        assert!(waits.is_err(), "one member reads");
        drop(reader);
        assert_eq!(sequence(&second.next().await.unwrap()), 2, "the other takes over where it was");
        drop(sink);
        // A crash in the middle of an event.
        let mut torn = OpenOptions::new().append(true).open(segment(dir.path(), 0)).unwrap();
        torn.write_all(&[0, 0, 1, 0, 9, 9]).unwrap();
        let sink = EmbeddedSink::new(dir.path(), 1 << 30, to).unwrap();
        sink.open(1).await.unwrap();
        publish(&sink, &mut delivered, &[event(1, 3)]).await;
        assert_eq!(sequence(&second.next().await.unwrap()), 3);
        second.seek(0, 0).unwrap();
        assert_eq!(sequence(&second.next().await.unwrap()), 1);
        let mut other = EmbeddedSource::join(dir.path(), "other").unwrap();
        assert_eq!(sequence(&other.next().await.unwrap()), 1, "another group has its own place");
        assert!(EmbeddedSource::join(dir.path(), "../x").is_err());
    }

    #[tokio::test]
    async fn the_oldest_segments_go() {
        let dir = tempfile::tempdir().unwrap();
        let mut writing = {
            fs::create_dir_all(dir.path()).unwrap();
            Writing::open(dir.path()).unwrap()
        };
        let mut bytes = Vec::new();
        encode(&event(1, 1), &mut bytes);
        for _ in 0..5 {
            writing.append(dir.path(), &bytes, 1, bytes.len() as u64 * 2).unwrap();
            writing.length = SEGMENT_BYTES;
        }
        assert_eq!(segments(dir.path()).unwrap(), [2, 3, 4]);
        let mut reader = EmbeddedSource::join(dir.path(), "g").unwrap();
        let first = reader.next().await.unwrap();
        assert_eq!((first.offset, reader.next().await.unwrap().offset), (2, 3), "at the first that there is");
    }
}
