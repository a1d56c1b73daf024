//! What waits for one socket: one FIFO bounded in bytes, and beside it a slot that keeps only the latest of what does
//! not matter for long (typing).
//!
//! Replies, publications and pushes stand in one line, since SDKs set their position to whatever came last. Past
//! [`PUBLICATION_BYTES_MAX`] a channel is no longer pushed and goes on from the log when the socket drains; past
//! [`TOTAL_BYTES_MAX`] (replies and pushes alone) the socket is disconnected as slow.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use bytes::Bytes;
use patchbay_protocol::client::{Encoding, Reply, json, protobuf};
use patchbay_protocol::{Disconnect, ErrorCode};

use super::Topic;
use super::seam::{Seam, Verdict};

/// Bytes of the queue past which publications wait in the log.
pub const PUBLICATION_BYTES_MAX: usize = 256 * 1024;
/// Bytes of the queue past which the socket is slow for good.
pub const TOTAL_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes that all sockets together have queued past which those with more than [`FAIR_BYTES`] get no publications: so
/// all of them hold at most this, and a fair share each.
pub const NODE_BYTES_MAX: usize = 256 * 1024 * 1024;
/// What a socket may have queued however much the others have.
pub const FAIR_BYTES: usize = 16 * 1024;
/// Latest-only slots of one socket.
const SLOTS_MAX: usize = 32;
/// How often a recovery looks for room.
const ROOM_LOOK: std::time::Duration = std::time::Duration::from_millis(10);
/// What a queued frame costs beside its bytes.
const FRAME_COST: usize = 64;

/// A publication, encoded at most once per wire format and shared by every socket.
pub struct Frames {
    channel: String,
    data: Bytes,
    seq: u64,
    json: std::sync::OnceLock<Bytes>,
    protobuf: std::sync::OnceLock<Bytes>,
}

impl Frames {
    /// A publication of `data` (one JSON value on one line) in `channel`; `seq` 0: without offset.
    pub fn new(channel: String, data: Bytes, seq: u64) -> Self {
        Self { channel, data, seq, json: Default::default(), protobuf: Default::default() }
    }

    /// The finished frame.
    pub fn encoded(&self, encoding: Encoding) -> Bytes {
        let frame = match encoding {
            Encoding::Json => {
                self.json.get_or_init(|| json::encode_publication(&self.channel, &self.data, self.seq))
            }
            Encoding::Protobuf => self
                .protobuf
                .get_or_init(|| protobuf::encode_publication(&self.channel, &self.data, self.seq)),
        };
        frame.clone()
    }
}

struct Queued {
    topic: Option<Topic>,
    frame: Bytes,
}

struct Subscribed {
    number: u64,
    /// It cannot be followed from here: its client is to come back to it.
    lost: bool,
    /// What is held is a frame, or a seq that this subscription does not see.
    seam: Seam<Option<Bytes>>,
}

/// Where a subscription that is behind goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoOn {
    /// Of what.
    pub topic: Topic,
    /// Which subscription to it: another one of the same socket may follow.
    pub number: u64,
    /// The last seq that was pushed.
    pub after: u64,
    /// It cannot be followed from here.
    pub lost: bool,
}

/// Bytes that one socket has queued, counted among those of all.
#[derive(Default)]
struct Held {
    bytes: usize,
    all: Arc<AtomicUsize>,
}

impl Held {
    fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.all.fetch_add(bytes, Ordering::Relaxed);
    }

    fn take(&mut self, bytes: usize) {
        self.bytes -= bytes;
        self.all.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.take(self.bytes);
    }
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Queued>,
    /// Something was queued since the queue was last empty.
    pushed: bool,
    held: Held,
    slots: HashMap<(Topic, String), Bytes>,
    seams: HashMap<Topic, Subscribed>,
    /// Subscriptions so far: each has a number of its own.
    subscriptions: u64,
    behind: bool,
    /// Its client takes what does not matter for long by datagram.
    datagrams: bool,
    /// The socket has ended: nothing is kept for it any more.
    ended: bool,
    closing: Option<Disconnect>,
    waker: Option<Waker>,
}

/// The outbound queue of one socket.
pub struct Outbound {
    encoding: Encoding,
    publication_bytes_max: usize,
    queue: Mutex<Queue>,
    /// Recoveries are read one at a time: what they bring is large.
    recovery: tokio::sync::Semaphore,
}

/// Room for so many frames stays with a socket that was told something since it last had nothing to be told.
const KEPT_MAX: usize = 128;

/// Subscriptions of one socket.
pub const SUBSCRIPTIONS_MAX: usize = 512;

impl Outbound {
    /// An empty queue.
    pub fn new(encoding: Encoding, all: Arc<AtomicUsize>) -> Arc<Self> {
        Self::with_bound(encoding, PUBLICATION_BYTES_MAX, all)
    }

    pub(super) fn with_bound(
        encoding: Encoding,
        publication_bytes_max: usize,
        all: Arc<AtomicUsize>,
    ) -> Arc<Self> {
        let recovery = tokio::sync::Semaphore::new(1);
        let queue = Mutex::new(Queue { held: Held { bytes: 0, all }, ..Queue::default() });
        Arc::new(Self { encoding, publication_bytes_max, queue, recovery })
    }

    /// The socket's encoding.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a reply or push. Data that does not fit the socket's encoding ends it.
    pub fn reply(&self, reply: &Reply) {
        match self.encoding.encode_reply(reply) {
            Ok(frame) => self.push(None, frame),
            Err(_) => self.close(Disconnect::InappropriateProtocol),
        }
    }

    /// Its client takes what does not matter for long by datagram.
    pub fn takes_datagrams(&self) {
        self.lock().datagrams = true;
    }

    /// Queues a push about somebody that belongs to a subscription: it goes when the subscription goes. A client that takes
    /// datagrams is told the latest of it, perhaps.
    pub fn push_for(&self, topic: &Topic, who: &str, reply: &Reply) {
        let (open, datagrams) = {
            let q = self.lock();
            (q.is_open(topic), q.datagrams && q.slots.len() < SLOTS_MAX)
        };
        let Ok(frame) = self.encoding.encode_reply(reply) else { return };
        if open && datagrams {
            let mut q = self.lock();
            q.slots.insert((topic.clone(), format!("{who} came or went")), frame);
            q.wake();
        } else if open {
            self.push(Some(topic.clone()), frame);
        }
    }

    fn push(&self, topic: Option<Topic>, frame: Bytes) {
        let mut q = self.lock();
        q.push(topic, frame);
        if q.held.bytes > TOTAL_BYTES_MAX {
            q.slow();
        }
        q.wake();
    }

    /// Ends the connection with a code, after what is queued.
    pub fn close(&self, why: Disconnect) {
        let mut q = self.lock();
        q.closing.get_or_insert(why);
        q.wake();
    }

    /// Registers a subscription whose past will be read; once.
    pub fn subscribe(&self, topic: &Topic) -> Result<(), ErrorCode> {
        let mut q = self.lock();
        if q.seams.contains_key(topic) {
            return Err(ErrorCode::AlreadySubscribed);
        }
        // The agent's own channel is the server's doing and does not count.
        if q.seams.keys().filter(|t| !matches!(t, Topic::Agent(..))).count() >= SUBSCRIPTIONS_MAX {
            return Err(ErrorCode::LimitExceeded);
        }
        q.subscriptions += 1;
        let number = q.subscriptions;
        q.seams.insert(topic.clone(), Subscribed { number, lost: false, seam: Seam::reading() });
        Ok(())
    }

    /// The socket has ended: drops everything, and says what it was subscribed to.
    pub fn end(&self) -> Vec<Topic> {
        let mut q = self.lock();
        let topics = q.seams.drain().map(|(t, _)| t).collect();
        q.clear();
        topics
    }

    /// Lets go of everything that is queued, and keeps nothing more.
    pub fn hush(&self) {
        let mut q = self.lock();
        q.clear();
    }

    /// A turn to read a past, when there is room for what it brings.
    pub async fn recovery_turn(&self) -> Option<tokio::sync::SemaphorePermit<'_>> {
        let turn = self.recovery.acquire().await.ok()?;
        while !self.lock().has_room(self.publication_bytes_max) {
            tokio::time::sleep(ROOM_LOOK).await;
        }
        Some(turn)
    }

    /// Ends a subscription: nothing queued for it is sent.
    pub fn unsubscribe(&self, topic: &Topic) {
        let mut q = self.lock();
        q.seams.remove(topic);
        q.slots.retain(|(t, _), _| t != topic);
        let mut dropped = 0;
        q.frames.retain(|queued| {
            let keep = queued.topic.as_ref() != Some(topic);
            if !keep {
                dropped += queued.frame.len() + FRAME_COST;
            }
            keep
        });
        q.held.take(dropped);
    }

    /// A confirmed entry of a topic; `frames` is `None` where this subscription does not see it.
    pub fn publish(&self, topic: &Topic, seq: u64, frames: Option<&Frames>) {
        let mut q = self.lock();
        let room = q.has_room(self.publication_bytes_max);
        if !room {
            // What does not matter for long gives way first.
            q.slots.clear();
        }
        let Some(Subscribed { seam, .. }) = q.seams.get_mut(topic) else { return };
        let encoded = || frames.map(|f| f.encoded(self.encoding));
        let verdict = seam.offer(seq, encoded, room);
        let behind = matches!(seam, Seam::Behind { .. });
        match verdict {
            Verdict::Push => {
                if let Some(frame) = encoded() {
                    q.push(Some(topic.clone()), frame);
                    q.wake();
                }
            }
            Verdict::Keep if behind && !q.behind => {
                q.behind = true;
                q.wake();
            }
            Verdict::Keep => {}
        }
    }

    /// A publication without an order: dropped when there is no room.
    ///
    /// An inbox that could not be shown something is subscribed anew (and then listed); an agent's own channel cannot
    /// be, since SDKs do not come back to it: there the socket is.
    pub fn publish_loose(&self, topic: &Topic, frames: &Frames) {
        let mut q = self.lock();
        if !q.is_open(topic) {
            return;
        }
        if q.has_room(self.publication_bytes_max) {
            q.push(Some(topic.clone()), frames.encoded(self.encoding));
        } else {
            q.lose(topic);
        }
        q.wake();
    }

    /// Publications of a topic may have been missed that has no order, or it cannot be followed from here any more:
    /// the client is to come back to it.
    pub fn lose(&self, topic: &Topic) {
        let mut q = self.lock();
        q.lose(topic);
        q.wake();
    }

    /// The log of a topic reaches `seq`: whoever was not shown it goes on from the log.
    pub fn reaches(&self, topic: &Topic, seq: u64) {
        let mut q = self.lock();
        let Some(Subscribed { seam, .. }) = q.seams.get_mut(topic) else { return };
        seam.reaches(seq);
        if matches!(seam, Seam::Behind { .. }) && !q.behind {
            q.behind = true;
            q.wake();
        }
    }

    /// A publication of which only the latest by `key` matters.
    pub fn publish_latest(&self, topic: &Topic, key: &str, frames: &Frames) {
        let mut q = self.lock();
        let at = (topic.clone(), key.to_owned());
        if q.is_open(topic) && (q.slots.len() < SLOTS_MAX || q.slots.contains_key(&at)) {
            q.slots.insert(at, frames.encoded(self.encoding));
            q.wake();
        }
    }

    /// The subscribe reply goes out, and then everything that was held and follows `read`.
    pub fn joined(&self, topic: &Topic, reply: Option<&Reply>, read: u64) {
        let frame = reply.map(|r| self.encoding.encode_reply(r));
        let mut q = self.lock();
        match frame {
            Some(Ok(frame)) => q.push(None, frame),
            Some(Err(_)) => q.closing = Some(Disconnect::InappropriateProtocol),
            None => {}
        }
        let Some(Subscribed { seam, .. }) = q.seams.get_mut(topic) else { return };
        let held = seam.joined(read);
        if matches!(seam, Seam::Behind { .. }) {
            q.behind = true;
        }
        for frame in held.into_iter().flatten() {
            q.push(Some(topic.clone()), frame);
        }
        if q.held.bytes > TOTAL_BYTES_MAX {
            q.slow();
        }
        q.wake();
    }

    /// Entries read from the log for a subscription that was behind.
    pub fn caught_up(&self, from: &GoOn, entries: Vec<Bytes>, read: u64) {
        {
            let mut q = self.lock();
            if !q.is_numbered(from) {
                // It was ended, and perhaps begun anew, meanwhile.
                return;
            }
            for frame in entries {
                q.push(Some(from.topic.clone()), frame);
            }
            if q.held.bytes > TOTAL_BYTES_MAX {
                q.slow();
            }
        }
        self.joined(&from.topic, None, read);
    }

    /// Whether it is still the subscription that was behind.
    pub fn is_still(&self, from: &GoOn) -> bool {
        self.lock().is_numbered(from)
    }

    /// Subscriptions that are behind and may go on now, with the place to read after.
    pub fn go_on(&self) -> Option<GoOn> {
        let mut q = self.lock();
        if !q.behind || !q.has_room(self.publication_bytes_max / 2) {
            return None;
        }
        // One at a time: each may bring a page.
        let next = q.seams.iter_mut().find_map(|(topic, Subscribed { number, lost, seam })| {
            seam.go_on().map(|after| GoOn { topic: topic.clone(), number: *number, after, lost: *lost })
        });
        q.behind = q.seams.values().any(|s| matches!(s.seam, Seam::Behind { .. }));
        next
    }

    /// Ready when the socket is slow for good, also while it takes nothing.
    pub fn poll_slow(&self, waker: &Waker) -> Poll<Disconnect> {
        let mut q = self.lock();
        if q.closing == Some(Disconnect::Slow) {
            return Poll::Ready(Disconnect::Slow);
        }
        q.waker = Some(waker.clone());
        Poll::Pending
    }

    /// The next frame to be written, or why to close; pending when there is neither.
    pub fn poll_next(&self, waker: &Waker) -> Poll<Next> {
        let mut q = self.lock();
        if let Some(queued) = q.frames.pop_front() {
            q.held.take(queued.frame.len() + FRAME_COST);
            return Poll::Ready(Next::Frame(queued.frame));
        }
        if let Some(why) = q.closing {
            return Poll::Ready(Next::Close(why));
        }
        let key = q.slots.keys().next().cloned();
        if let Some(frame) = key.and_then(|k| q.slots.remove(&k)) {
            return Poll::Ready(if q.datagrams { Next::Beside(frame) } else { Next::Frame(frame) });
        }
        // Most sockets have nothing to be told most of the time; one that is told much is told more soon.
        if q.frames.capacity() > 0 && (!q.pushed || q.frames.capacity() > KEPT_MAX) {
            q.frames = VecDeque::new();
        }
        q.pushed = false;
        if q.slots.capacity() > 0 && q.slots.is_empty() {
            q.slots = HashMap::new();
        }
        q.waker = Some(waker.clone());
        Poll::Pending
    }
}

/// What to do with the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Write this.
    Frame(Bytes),
    /// Write this, or lose it.
    Beside(Bytes),
    /// Close it.
    Close(Disconnect),
}

impl Queue {
    /// Whether a subscription's reply is out, so that it may be shown what has no order.
    fn is_open(&self, topic: &Topic) -> bool {
        self.seams.get(topic).is_some_and(|s| matches!(s.seam, Seam::Live { .. }))
    }

    /// A subscription goes on no more. An agent's own channel cannot be ended by itself: there the socket is.
    fn lose(&mut self, topic: &Topic) {
        let Some(subscribed) = self.seams.get_mut(topic) else { return };
        if matches!(topic, Topic::Agent(..)) {
            self.closing.get_or_insert(Disconnect::InsufficientState);
        } else if !matches!(subscribed.seam, Seam::Reading { .. }) {
            let last =
                if let Seam::Live { last } | Seam::Behind { last } = subscribed.seam { last } else { 0 };
            (subscribed.seam, subscribed.lost) = (Seam::Behind { last }, true);
            self.behind = true;
        }
    }

    fn is_numbered(&self, from: &GoOn) -> bool {
        self.seams.get(&from.topic).is_some_and(|s| s.number == from.number)
    }

    /// The socket is slow for good: what waits for it is let go of, and nothing more is kept.
    fn slow(&mut self) {
        self.closing = Some(Disconnect::Slow);
        self.frames = VecDeque::new();
        self.slots = HashMap::new();
        self.held.take(self.held.bytes);
    }

    /// Lets go of everything, and keeps nothing more; why it closes still stands.
    fn clear(&mut self) {
        let (closing, waker) = (self.closing, self.waker.take());
        let held = Held { bytes: 0, all: self.held.all.clone() };
        *self = Self { ended: true, closing, waker, held, ..Self::default() };
    }

    /// Whether publications may still be queued.
    fn has_room(&self, max: usize) -> bool {
        let fair = self.held.bytes < FAIR_BYTES.min(max);
        fair || self.held.bytes < max && self.held.all.load(Ordering::Relaxed) < NODE_BYTES_MAX
    }

    fn push(&mut self, topic: Option<Topic>, frame: Bytes) {
        if self.ended || self.closing == Some(Disconnect::Slow) {
            return;
        }
        self.held.add(frame.len() + FRAME_COST);
        self.pushed = true;
        self.frames.push_back(Queued { topic, frame });
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(topic: &Topic) -> Arc<Outbound> {
        let outbound = Outbound::with_bound(Encoding::Json, 1000, Arc::default());
        outbound.subscribe(topic).unwrap();
        outbound.joined(topic, None, 0);
        outbound
    }

    fn frames(topic: &Topic, seq: u64) -> Frames {
        Frames::new(topic.channel(), Bytes::from(format!("\"{}\"", "x".repeat(300))), seq)
    }

    fn drained(outbound: &Outbound) -> (usize, Option<Disconnect>) {
        let mut frames = 0;
        loop {
            match outbound.poll_next(Waker::noop()) {
                Poll::Ready(Next::Frame(_) | Next::Beside(_)) => frames += 1,
                Poll::Ready(Next::Close(why)) => return (frames, Some(why)),
                Poll::Pending => return (frames, None),
            }
        }
    }

    #[test]
    fn all_slow_sockets_together_hold_little_and_each_goes_on_when_it_reads() {
        const SOCKETS: usize = 4_000;
        const FRAME: usize = 40_000;
        let all = Arc::new(AtomicUsize::new(0));
        let topic = Topic::Inbox("t".parse().unwrap(), "main".parse().unwrap());
        let sockets: Vec<Arc<Outbound>> =
            (0..SOCKETS).map(|_| Outbound::new(Encoding::Json, all.clone())).collect();
        for socket in &sockets {
            socket.subscribe(&topic).unwrap();
            socket.joined(&topic, None, 0);
        }
        for seq in 1..=20 {
            let frames = Frames::new(topic.channel(), Bytes::from(vec![b'1'; FRAME]), seq);
            sockets.iter().for_each(|s| s.publish(&topic, seq, Some(&frames)));
        }
        let held = all.load(Ordering::Relaxed);
        assert!(held <= NODE_BYTES_MAX + SOCKETS * (FAIR_BYTES + 2 * FRAME), "{held} bytes wait");
        for socket in &sockets {
            let (sent, closed) = drained(socket);
            assert!(sent >= 1 && closed.is_none(), "everybody is shown something: {sent}");
            let from = socket.go_on().expect("it goes on from the log");
            assert_eq!(from.after, sent as u64, "after what it has seen");
        }
        assert_eq!(all.load(Ordering::Relaxed), 0, "nothing waits any more");
        drop(sockets);
        assert_eq!(all.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_agents_own_channel_that_does_not_fit_ends_the_socket() {
        let topic = Topic::Agent("t".parse().unwrap(), "anna".parse().unwrap());
        let outbound = live(&topic);
        (0..10).for_each(|_| outbound.publish_loose(&topic, &frames(&topic, 0)));
        let (pushed, why) = drained(&outbound);
        assert_eq!((pushed < 10, why), (true, Some(Disconnect::InsufficientState)));
    }

    #[test]
    fn an_inbox_that_does_not_fit_is_begun_anew() {
        let topic = Topic::Inbox("t".parse().unwrap(), "main".parse().unwrap());
        let outbound = live(&topic);
        (0..10).for_each(|_| outbound.publish_loose(&topic, &frames(&topic, 0)));
        assert_eq!(outbound.go_on(), None, "not before there is room");
        assert_eq!(drained(&outbound).1, None);
        assert_eq!(outbound.go_on().map(|from| from.topic), Some(topic));
    }

    #[test]
    fn typing_gives_way_before_anything_else_does() {
        let topic = Topic::Conversation(patchbay_protocol::ConversationId::from_bytes([1; 16]));
        let outbound = live(&topic);
        outbound.publish_latest(&topic, "anna", &frames(&topic, 0));
        outbound.publish_latest(&topic, "anna", &frames(&topic, 0));
        (1..=9).for_each(|seq| outbound.publish(&topic, seq, Some(&frames(&topic, seq))));
        let (pushed, _) = drained(&outbound);
        assert_eq!(
            outbound.go_on().map(|from| from.after),
            Some(pushed as u64),
            "entries only, and the rest is in the log"
        );
    }

    #[test]
    fn past_the_bound_for_all_nothing_is_kept() {
        let outbound = Outbound::new(Encoding::Json, Arc::default());
        let large = patchbay_protocol::client::reply::RpcResult {
            data: Bytes::from(format!("\"{}\"", "x".repeat(400_000))),
        };
        (0..20).for_each(|id| outbound.reply(&Reply { id, rpc: Some(large.clone()), ..Reply::default() }));
        assert_eq!(outbound.lock().held.bytes, 0);
        assert_eq!(outbound.poll_slow(Waker::noop()), Poll::Ready(Disconnect::Slow));
    }
}
