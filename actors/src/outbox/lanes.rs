//! What the outbox knows, without doing anything: which conversations have entries that are not published, how far
//! each is, and what of a shard has to be looked up in its activity rows.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use patchbay_protocol::event::{Event, Origin};
use patchbay_protocol::ids::{ConversationId, InboxId};
use patchbay_storage::tables::Mark;

/// Conversations with something unpublished that are told apart; past it a shard's are looked up in the store again.
pub const LANES_MAX: usize = 100_000;
/// Bytes of entries kept at hand until they are sent; past it they are read from their logs again.
pub const RECENT_BYTES_MAX: usize = 32 << 20;
/// Entries sent and not delivered.
pub const WINDOW: usize = 8_192;
/// Conversations whose outbox is parked; past it nothing more is published before somebody has looked.
pub const PARKED_MAX: usize = 10_000;
/// Entries of one conversation that are sent before others have their turn.
const TURN: usize = 64;

/// Appends of a conversation, and the bucket that waits for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Claim {
    last: u64,
    bucket: Mark,
    appends: u32,
}

/// Settles `appends` of a bucket of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settle {
    pub(super) shard: u32,
    pub(super) bucket: Mark,
    pub(super) appends: u32,
}

/// A conversation with something unpublished.
#[derive(Debug, Default)]
struct Lane {
    home: Option<(Arc<Origin>, InboxId)>,
    shard: u32,
    /// Everything up to here is published.
    published: u64,
    /// Everything up to here is sent.
    sent: u64,
    /// The owner has confirmed everything up to here; none: it has to be asked.
    tip: Option<u64>,
    /// Some of the entries from `sent + 1` on.
    recent: VecDeque<Bytes>,
    claims: VecDeque<Claim>,
    /// It stands in the queue, or somebody reads for it.
    queued: bool,
    /// Some entry up to here was refused in company: each is tried alone.
    suspect: Option<u64>,
    /// Found by a look into the store, which ends when all that it found is published.
    looked_up: bool,
}

impl Lane {
    fn is_suspect(&self) -> bool {
        self.suspect.is_some_and(|until| self.sent < until)
    }
}

/// How a shard's unpublished entries are known.
#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// It is another node's.
    Elsewhere,
    /// By its activity rows alone.
    Behind,
    /// They are being looked up; what is new is noted and waits.
    LookingUp,
    /// By its lanes.
    Live,
}

#[derive(Debug)]
struct Shard {
    phase: Phase,
    /// Under which it is ours.
    epoch: u32,
    /// Unsettled appends of which nothing else is kept, by bucket.
    debts: BTreeMap<Mark, u32>,
    /// Lanes that the last look has found and that are not published yet.
    looked_up: usize,
    /// Whether what earlier reigns left is not published yet.
    first_look: bool,
}

impl Shard {
    /// Another node's.
    fn elsewhere() -> Self {
        Self { phase: Phase::Elsewhere, epoch: 0, debts: BTreeMap::new(), looked_up: 0, first_look: true }
    }

    fn is_quiet(&self) -> bool {
        match self.phase {
            Phase::Elsewhere => true,
            Phase::Live => self.debts.is_empty(),
            Phase::Behind | Phase::LookingUp => false,
        }
    }
}

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Next {
    /// Send these.
    Send(Vec<Event>),
    /// Ask the owner of a conversation where it is at home and how far it is.
    Ask(ConversationId),
    /// Read rows of its log after the first number, up to the second.
    Read(ConversationId, u32, u64, u64),
}

#[derive(Debug)]
pub(super) struct Lanes {
    lanes: HashMap<ConversationId, Lane>,
    shards: Vec<Shard>,
    ready: VecDeque<ConversationId>,
    suspects: VecDeque<ConversationId>,
    /// Conversations whose next entry is never taken, and which entry that is.
    parked: HashMap<ConversationId, u64>,
    in_flight: usize,
    recent_bytes: usize,
    generation: u32,
    settled: Vec<Settle>,
    lanes_max: usize,
}

impl Lanes {
    pub(super) fn new(shards: u32, lanes_max: usize) -> Self {
        Self {
            lanes: HashMap::new(),
            shards: (0..shards).map(|_| Shard::elsewhere()).collect(),
            ready: VecDeque::new(),
            suspects: VecDeque::new(),
            parked: HashMap::new(),
            in_flight: 0,
            recent_bytes: 0,
            generation: 0,
            settled: Vec::new(),
            lanes_max,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.lanes.len()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(super) fn parked(&self) -> usize {
        self.parked.len()
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    /// Whether everything of earlier reigns of a shard is published.
    pub(super) fn has_caught_up(&self, shard: u32) -> bool {
        self.shards.get(shard as usize).is_some_and(|s| s.phase != Phase::Elsewhere && !s.first_look)
    }

    /// A shard is ours.
    pub(super) fn open(&mut self, shard: u32, epoch: u32) {
        self.close(shard);
        if let Some(at) = self.shards.get_mut(shard as usize) {
            (at.phase, at.epoch) = (Phase::Behind, epoch);
        }
    }

    /// A shard is another's: everything of it is forgotten, also what is under way, which is heard as nobody's.
    pub(super) fn close(&mut self, shard: u32) {
        let ours = |id: &ConversationId| id.shard(self.shards.len() as u32) == shard;
        let gone: Vec<ConversationId> = self.lanes.keys().copied().filter(ours).collect();
        self.parked.retain(|id, _| !ours(id));
        for id in gone {
            self.forget(id);
        }
        if let Some(at) = self.shards.get_mut(shard as usize) {
            *at = Shard::elsewhere();
        }
    }

    /// Whether nothing is left to publish.
    pub(super) fn is_empty(&self) -> bool {
        self.lanes.is_empty() && self.shards.iter().all(Shard::is_quiet)
    }

    /// Entries that their owner has confirmed, ascending, of an append in a bucket. True: somebody must be woken.
    pub(super) fn offer(
        &mut self,
        origin: &Arc<Origin>,
        inbox: &InboxId,
        shard: u32,
        bucket: Mark,
        rows: &[(u64, Bytes)],
    ) -> bool {
        let (Some((first, _)), Some((last, _))) = (rows.first(), rows.last()) else { return false };
        let id = origin.conversation;
        if self.parked.contains_key(&id) {
            // Its row says from where on.
            self.settle(shard, bucket, 1);
            return true;
        }
        let live = match self.shards[shard as usize].phase {
            Phase::Elsewhere => return false,
            // Of a reign that has ended.
            _ if self.shards[shard as usize].epoch != bucket.epoch => return false,
            Phase::Behind => {
                *self.shards[shard as usize].debts.entry(bucket).or_default() += 1;
                return false;
            }
            Phase::LookingUp => false,
            Phase::Live => true,
        };
        if self.lanes.len() >= self.lanes_max && !self.lanes.contains_key(&id) {
            self.fall_behind(shard);
            *self.shards[shard as usize].debts.entry(bucket).or_default() += 1;
            return false;
        }
        let lane = self.lanes.entry(id).or_insert_with(|| Lane {
            shard,
            published: first - 1,
            sent: first - 1,
            tip: Some(first - 1),
            ..Lane::default()
        });
        lane.home.get_or_insert_with(|| (origin.clone(), inbox.clone()));
        // What does not follow upon what is at hand is read from the log.
        let follows = lane.sent + 1 + lane.recent.len() as u64 == *first;
        if follows && self.recent_bytes < RECENT_BYTES_MAX {
            self.recent_bytes += rows.iter().map(|(_, entry)| entry.len()).sum::<usize>();
            lane.recent.extend(rows.iter().map(|(_, entry)| entry.clone()));
        }
        lane.tip = Some(lane.tip.map_or(*last, |tip| tip.max(*last)));
        match lane.claims.back_mut() {
            Some(claim) if claim.bucket == bucket => {
                (claim.last, claim.appends) = (claim.last.max(*last), claim.appends + 1);
            }
            _ => lane.claims.push_back(Claim { last: *last, bucket, appends: 1 }),
        }
        live && self.queue(id)
    }

    fn queue(&mut self, id: ConversationId) -> bool {
        let Some(lane) = self.lanes.get_mut(&id) else { return false };
        // What is looked up now may stand before it.
        if lane.queued || self.shards[lane.shard as usize].phase == Phase::LookingUp {
            return false;
        }
        lane.queued = true;
        let queue = if lane.is_suspect() { &mut self.suspects } else { &mut self.ready };
        queue.push_back(id);
        true
    }

    fn settle(&mut self, shard: u32, bucket: Mark, appends: u32) {
        self.settled.push(Settle { shard, bucket, appends });
    }

    /// What has been settled since this was last asked.
    pub(super) fn take_settled(&mut self) -> Vec<Settle> {
        std::mem::take(&mut self.settled)
    }

    /// Forgets what of a shard is not under way: its activity rows have it.
    fn fall_behind(&mut self, shard: u32) {
        let at = &mut self.shards[shard as usize];
        if at.phase == Phase::Elsewhere {
            return;
        }
        at.phase = Phase::Behind;
        let forgotten: Vec<ConversationId> = self
            .lanes
            .iter()
            .filter(|(_, lane)| lane.shard == shard && lane.sent == lane.published)
            .map(|(id, _)| *id)
            .collect();
        for id in forgotten {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: ConversationId) {
        let Some(lane) = self.lanes.remove(&id) else { return };
        self.recent_bytes -= lane.recent.iter().map(Bytes::len).sum::<usize>();
        let shard = &mut self.shards[lane.shard as usize];
        for claim in lane.claims {
            *shard.debts.entry(claim.bucket).or_default() += claim.appends;
        }
        // Whether it was found by a look or not, the next look finds it.
        shard.looked_up -= usize::from(lane.looked_up);
    }

    /// A shard whose entries have to be looked up now, if there is room for them.
    pub(super) fn begin_look(&mut self) -> Option<u32> {
        let anybody = self.shards.iter().any(|s| s.phase == Phase::Behind);
        if !anybody || self.lanes.len() >= self.lanes_max / 2 {
            return None;
        }
        let busy: HashSet<u32> = self.lanes.values().map(|l| l.shard).collect();
        let behind = |(n, s): &(usize, &Shard)| {
            s.phase == Phase::Behind && s.looked_up == 0 && !busy.contains(&(*n as u32))
        };
        let shard = self.shards.iter().enumerate().find(behind).map(|(n, _)| n as u32)?;
        self.shards[shard as usize].phase = Phase::LookingUp;
        Some(shard)
    }

    /// The look was not answered: it is begun again later.
    pub(super) fn break_look(&mut self, shard: u32) {
        if self.shards[shard as usize].phase == Phase::LookingUp {
            self.fall_behind(shard);
        }
    }

    /// What a look has found: conversations with the lowest seq that may not be published, and those that are parked.
    pub(super) fn end_look(
        &mut self,
        (shard, epoch): (u32, u32),
        found: HashMap<ConversationId, u64>,
        parked: &[(ConversationId, u64)],
    ) {
        if self.shards[shard as usize].phase != Phase::LookingUp {
            // It fell behind meanwhile: another look finds everything.
            return;
        }
        if self.shards[shard as usize].epoch != epoch {
            // It was another's meanwhile.
            self.fall_behind(shard);
            return;
        }
        for (id, from) in parked {
            // Whoever parked it is gone: it is tried again.
            if !self.parked.contains_key(id) && !self.lanes.contains_key(id) {
                self.parked.insert(*id, *from);
                self.unpark(*id, shard);
            }
        }
        for (id, lowest) in found {
            if self.parked.contains_key(&id) {
                continue;
            }
            let lane = self.lanes.entry(id).or_insert_with(|| Lane { shard, ..Lane::default() });
            let before = lowest.saturating_sub(1);
            if lane.home.is_none() || before < lane.published {
                self.recent_bytes -= lane.recent.drain(..).map(|e| e.len()).sum::<usize>();
                (lane.published, lane.sent) = (before, before);
            }
            if !lane.looked_up {
                lane.looked_up = true;
                self.shards[shard as usize].looked_up += 1;
            }
        }
        self.shards[shard as usize].phase = Phase::Live;
        let ids: Vec<ConversationId> =
            self.lanes.iter().filter(|(_, l)| l.shard == shard).map(|(id, _)| *id).collect();
        for id in ids {
            self.queue(id);
        }
        self.end_of_look(shard);
    }

    /// Everything that a look has found is published: so is whatever the shard owed.
    fn end_of_look(&mut self, shard: u32) {
        let at = &mut self.shards[shard as usize];
        if at.looked_up > 0 || at.phase != Phase::Live {
            return;
        }
        for (bucket, appends) in std::mem::take(&mut at.debts) {
            self.settled.push(Settle { shard, bucket, appends });
        }
        at.first_look = false;
    }

    /// What the owner of a conversation says; none: it does not exist, and has nothing to publish.
    pub(super) fn told(&mut self, id: ConversationId, home: Option<(Arc<Origin>, InboxId, u64)>) {
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        lane.queued = false;
        match home {
            Some((origin, inbox, tip)) => {
                lane.home = Some((origin, inbox));
                lane.tip = Some(lane.tip.map_or(tip, |known| known.max(tip)));
            }
            None => lane.tip = Some(lane.published),
        }
        if !self.end_if_done(id) {
            self.queue(id);
        }
    }

    /// A question or a read was not answered: it is asked again.
    pub(super) fn unanswered(&mut self, id: ConversationId) {
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.queued = false;
            self.queue(id);
        }
    }

    /// Rows that were read, as they were asked for.
    pub(super) fn read(&mut self, id: ConversationId, generation: u32, after: u64, rows: Vec<Bytes>) {
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        lane.queued = false;
        if generation == self.generation && lane.sent == after && lane.recent.is_empty() {
            self.recent_bytes += rows.iter().map(Bytes::len).sum::<usize>();
            lane.recent = rows.into();
        }
        self.queue(id);
    }

    /// What is to be done next, if anything.
    pub(super) fn next(&mut self) -> Option<Next> {
        loop {
            // Whoever is suspected is tried when nobody else is under way, one entry at a time.
            let next = if self.suspects.is_empty() {
                let id = self.ready.pop_front()?;
                self.step(id, TURN)
            } else if self.in_flight == 0 {
                let id = self.suspects.pop_front()?;
                self.step(id, 1)
            } else {
                return None;
            };
            if next.is_some() {
                return next;
            }
        }
    }

    fn step(&mut self, id: ConversationId, most: usize) -> Option<Next> {
        let room = WINDOW.saturating_sub(self.in_flight);
        let lane = self.lanes.get_mut(&id)?;
        let (Some((origin, inbox)), Some(tip)) = (&lane.home, lane.tip) else { return Some(Next::Ask(id)) };
        if lane.sent >= tip {
            lane.queued = false;
            self.end_if_done(id);
            return None;
        }
        if lane.recent.is_empty() {
            return Some(Next::Read(id, lane.shard, lane.sent, tip));
        }
        let count = most.min(room).min(lane.recent.len());
        let mut events = Vec::with_capacity(count);
        for entry in lane.recent.drain(..count) {
            lane.sent += 1;
            self.recent_bytes -= entry.len();
            events.push(Event { origin: origin.clone(), inbox: inbox.clone(), seq: lane.sent, entry });
        }
        self.in_flight += count;
        lane.queued = false;
        if lane.sent < tip && most > 1 {
            self.queue(id);
        }
        Some(Next::Send(events))
    }

    /// Whether more may be sent.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight < WINDOW
    }

    /// What could not be handed to the sink goes back.
    pub(super) fn unsent(&mut self, events: Vec<Event>) {
        let Some(first) = events.first() else { return };
        self.in_flight -= events.len();
        let id = first.origin.conversation;
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        lane.sent = first.seq - 1;
        for event in events.into_iter().rev() {
            self.recent_bytes += event.entry.len();
            lane.recent.push_front(event.entry);
        }
        if !lane.queued {
            self.queue(id);
        }
    }

    /// An event is in the topic.
    pub(super) fn delivered(&mut self, id: ConversationId, seq: u64) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        lane.published = lane.published.max(seq);
        while let Some(claim) = lane.claims.front().filter(|c| c.last <= lane.published).copied() {
            lane.claims.pop_front();
            let shard = lane.shard;
            self.settled.push(Settle { shard, bucket: claim.bucket, appends: claim.appends });
        }
        if lane.suspect.is_some() {
            lane.suspect = lane.suspect.filter(|until| lane.published < *until);
            self.queue(id);
        }
        self.end_if_done(id);
    }

    fn end_if_done(&mut self, id: ConversationId) -> bool {
        let Some(lane) = self.lanes.get(&id) else { return true };
        if lane.queued || lane.tip.is_none_or(|tip| lane.published < tip) {
            return false;
        }
        let (shard, looked_up) = (lane.shard, lane.looked_up);
        if let Some(lane) = self.lanes.remove(&id) {
            for claim in lane.claims {
                self.settle(shard, claim.bucket, claim.appends);
            }
        }
        if looked_up {
            self.shards[shard as usize].looked_up -= 1;
            self.end_of_look(shard);
        }
        true
    }

    /// Something was not delivered: every conversation goes back to what is published, and entries up to those that
    /// were `refused` are tried alone. What is delivered of the old generation is not heard any more.
    pub(super) fn restart(&mut self, refused: &HashMap<ConversationId, u64>) -> u32 {
        self.generation += 1;
        self.in_flight = 0;
        self.ready.clear();
        self.suspects.clear();
        let mut ids = Vec::with_capacity(self.lanes.len());
        for (id, lane) in &mut self.lanes {
            if lane.sent > lane.published {
                self.recent_bytes -= lane.recent.drain(..).map(|e| e.len()).sum::<usize>();
            }
            lane.sent = lane.published;
            lane.queued = false;
            lane.suspect = lane.suspect.max(refused.get(id).copied());
            ids.push(*id);
        }
        for id in ids {
            self.queue(id);
        }
        self.generation
    }

    /// Whether an entry that was refused was alone.
    pub(super) fn was_alone(&self, id: ConversationId) -> bool {
        self.in_flight == 1 && self.lanes.get(&id).is_some_and(|lane| lane.suspect.is_some())
    }

    /// A conversation whose next entry is never taken stands aside; its row says so.
    pub(super) fn park(&mut self, id: ConversationId, seq: u64) {
        self.parked.insert(id, seq);
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.queued = false;
            lane.tip = Some(lane.published);
            self.recent_bytes -= lane.recent.drain(..).map(|e| e.len()).sum::<usize>();
        }
        self.end_if_done(id);
    }

    /// The conversations that are parked, and from where on.
    pub(super) fn all_parked(&self) -> Vec<(ConversationId, u64)> {
        self.parked.iter().map(|(id, from)| (*id, *from)).collect()
    }

    /// Tries a conversation that is parked again, alone.
    pub(super) fn unpark(&mut self, id: ConversationId, shard: u32) {
        let Some(from) = self.parked.remove(&id) else { return };
        let lane = self.lanes.entry(id).or_insert_with(|| Lane { shard, ..Lane::default() });
        (lane.published, lane.sent, lane.suspect) = (from - 1, from - 1, Some(from));
        self.queue(id);
    }

    /// Whether a conversation has nothing left to publish.
    pub(super) fn is_done(&self, id: ConversationId) -> bool {
        !self.lanes.contains_key(&id) && !self.parked.contains_key(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_was_overtaken_leaves_nothing_behind_and_another_is_begun() {
        let mut lanes = Lanes::new(1, 2);
        lanes.open(0, 1);
        let bucket = Mark { epoch: 1, bucket: 0 };
        let (inbox, entry) = ("main".parse().unwrap(), Bytes::from_static(b"{}"));
        let origin = |n: u8| {
            let conversation = ConversationId::from_bytes([n; 16]);
            Arc::new(Origin { tenant: "t".parse().unwrap(), account: "wa".parse().unwrap(), conversation })
        };
        assert_eq!(lanes.begin_look(), Some(0));
        // One more than are told apart, while the store is being read.
        for n in 1..=3 {
            lanes.offer(&origin(n), &inbox, 0, bucket, &[(1, entry.clone())]);
        }
        let found = HashMap::from([(origin(1).conversation, 1)]);
        lanes.end_look((0, 1), found, &[]);
        assert_eq!((lanes.len(), lanes.recent_bytes), (0, 0));
        assert_eq!(lanes.begin_look(), Some(0), "the next look finds everything");
    }
}
