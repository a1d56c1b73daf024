//! What waits to be published to one interested node, over one of its lanes.
//!
//! Bound: [`OUTLET_BYTES_MAX`]; past it a topic is only marked, and the node is told how far it reaches once half of that
//! has gone out.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};

use super::RUNS_SINCE;
use super::proto::envelope::Kind as Envelopes;
use super::proto::{Missed, Published, Run, Who};
use super::wire;
use crate::fanout::{self, Aside, Topic, Watched};

/// Bytes that wait for one lane of a node past which publications are left to the log.
pub const OUTLET_BYTES_MAX: usize = 8 << 20;
/// Bytes of a run of publications past which another one is begun.
const RUN_BYTES: usize = 64 << 10;
/// Bytes after which nothing more goes out together.
const BATCH_BYTES_MAX: usize = 1 << 20;
/// What an envelope costs beside its data.
const ENVELOPE_COST: usize = 128;

enum Word {
    Said(Envelopes),
    /// Publications, packed as they came, and how many.
    Run(BytesMut, u64),
}

impl Word {
    fn publications(&self) -> u64 {
        match self {
            Self::Said(Envelopes::Published(published)) => published.data.len() as u64,
            Self::Said(_) => 0,
            Self::Run(_, publications) => *publications,
        }
    }

    fn envelope(self) -> Envelopes {
        match self {
            Self::Said(word) => word,
            Self::Run(packed, _) => Envelopes::Run(Run { packed: packed.freeze() }),
        }
    }
}

#[derive(Default)]
struct Queue {
    words: VecDeque<(usize, Word)>,
    bytes: usize,
    /// Topics of which something did not fit, and how far they reach.
    marked: BTreeMap<Topic, u64>,
    waker: Option<Waker>,
}

impl Queue {
    fn push(&mut self, bytes: usize, word: Word) {
        self.bytes += bytes + ENVELOPE_COST;
        self.words.push_back((bytes + ENVELOPE_COST, word));
        self.wake();
    }

    /// Adds to what waits last, if that is of the same log and ends where this begins.
    fn follows(&mut self, topic: &Bytes, seq: u64, entries: &[(u64, Bytes)], bytes: usize) -> bool {
        let Some((held, Word::Said(Envelopes::Published(last)))) = self.words.back_mut() else {
            return false;
        };
        let next = last.seq + last.data.len() as u64;
        let fits = seq > 1 && seq == next && last.topic == *topic && *held < BATCH_BYTES_MAX;
        if fits {
            last.data.extend(entries.iter().map(|(_, data)| data.clone()));
            *held += bytes;
            self.bytes += bytes;
        }
        fits
    }

    /// Adds to the run that waits last, or begins one.
    fn pack(&mut self, topic: &Bytes, entries: &[(u64, Bytes)]) {
        let bytes: usize = entries.iter().map(|(_, data)| wire::packed_len(topic, data)).sum();
        if !matches!(self.words.back(), Some((held, Word::Run(..))) if *held < RUN_BYTES) {
            self.push(0, Word::Run(BytesMut::with_capacity(bytes), 0));
        }
        let Some((held, Word::Run(packed, publications))) = self.words.back_mut() else { return };
        packed.reserve(bytes);
        entries.iter().for_each(|(seq, data)| wire::pack(packed, topic, *seq, data));
        *publications += entries.len() as u64;
        *held += bytes;
        self.bytes += bytes;
        self.wake();
    }

    fn mark(&mut self, topic: &Topic, seq: u64) {
        metrics::counter!("patchbay_mesh_marked_total").increment(1);
        let at = self.marked.entry(topic.clone()).or_default();
        *at = seq.max(*at);
    }

    fn has_room(&self) -> bool {
        self.bytes < OUTLET_BYTES_MAX
    }

    fn wake(&mut self) {
        self.waker.take().inspect(Waker::wake_by_ref);
    }
}

/// What waits to be published to one interested node.
pub(super) struct Outlet {
    number: u64,
    /// Which version of the protocol is spoken to it.
    version: u32,
    queue: Mutex<Queue>,
}

impl Outlet {
    pub(super) fn new(version: u32) -> Self {
        Self { number: rand::random(), version, queue: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something small, whatever waits.
    pub(super) fn say(&self, word: Envelopes) {
        self.lock().push(0, Word::Said(word));
    }

    /// Takes what is to go out now, at most `max`; nothing: it will wake.
    pub(super) fn poll_take(&self, cx: &Context<'_>, max: usize, into: &mut Vec<Envelopes>) -> Poll<()> {
        let mut queue = self.lock();
        let (before, mut taken, mut published) = (into.len(), 0, 0);
        if queue.bytes < OUTLET_BYTES_MAX / 2 {
            for (topic, seq) in std::mem::take(&mut queue.marked) {
                let missed = Missed { topic: Some(wire::write_topic(&topic)), seq };
                queue.push(0, Word::Said(Envelopes::Missed(missed)));
            }
        }
        while into.len() < max
            && taken < BATCH_BYTES_MAX
            && let Some((bytes, word)) = queue.words.pop_front()
        {
            queue.bytes -= bytes;
            taken += bytes;
            published += word.publications();
            into.push(word.envelope());
        }
        if into.len() > before {
            metrics::counter!("patchbay_mesh_publications_total").increment(published);
            return Poll::Ready(());
        }
        queue.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl fanout::Outlet for Outlet {
    fn number(&self) -> u64 {
        self.number
    }

    fn publish(&self, topic: &Topic, at: &Bytes, entries: &[(u64, Bytes)]) {
        let (Some((seq, _)), Some((last, _))) = (entries.first(), entries.last()) else { return };
        let mut queue = self.lock();
        if !queue.has_room() || !queue.marked.is_empty() && queue.marked.contains_key(topic) {
            queue.mark(topic, *last);
            return;
        }
        if self.version >= RUNS_SINCE {
            queue.pack(at, entries);
            return;
        }
        let bytes = entries.iter().map(|(_, data)| data.len()).sum();
        if !queue.follows(at, *seq, entries, bytes) {
            let data = entries.iter().map(|(_, data)| data.clone()).collect();
            let published = Published { topic: at.clone(), seq: *seq, data };
            queue.push(bytes, Word::Said(Envelopes::Published(published)));
        }
    }

    fn wire(&self, topic: &Topic) -> Bytes {
        wire::topic_bytes(topic)
    }

    fn missed(&self, topic: &Topic) {
        let mut queue = self.lock();
        queue.mark(topic, 0);
        queue.wake();
    }

    fn watched(&self, topic: &Topic, epoch: u32, outcome: Watched) {
        self.say(Envelopes::Watched(wire::write_watched(topic, epoch, outcome)));
    }

    fn aside(&self, topic: &Topic, aside: &Aside) {
        let mut queue = self.lock();
        if queue.has_room() {
            queue.push(aside.data.len(), Word::Said(Envelopes::Aside(wire::write_aside(topic, aside))));
        }
    }

    fn who(&self, number: u64, topic: &Topic) {
        self.say(Envelopes::Who(Who { number, topic: Some(wire::write_topic(topic)) }));
    }
}
