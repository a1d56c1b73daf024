//! A node of the cluster, decided purely: renews its lease, watches others, marks who is silent, keeps the map.
//!
//! Driven from outside: [`Node::poll`] says what to ask of the store now, [`Node::told`] takes what came of it and says
//! what is to be done about shards. The runtime puts real requests and a real clock around it, the simulator its own.
//!
//! Guarantee: a node that does not hold its lease at this instant asks nothing that changes others or the map.
//! Guarantee: nobody is marked dead but by a write conditional on the beat that was judged, sent by an observer that has
//! renewed its own lease since it judged.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use patchbay_protocol::ids::derived;

use super::host::{Action, Host, State};
use super::lease::{Answer, Beat, Lease, Renewal, Row, Standing, Tick};
use super::map::{Change, Incarnation, Member, ShardMap};
use super::watch::{Verdict, Watch};

/// Between two renewals of the lease, in tenths of its TTL.
const RENEW_TENTHS: u32 = 4;
/// Between two reads of a watched node's lease.
pub const WATCH_EVERY: Duration = Duration::from_millis(510);
/// Nodes that watch each node.
pub const WATCHERS: usize = 3;
/// The map is read once in so many TTLs although nobody has told of a newer one: those who know of it may know nothing
/// of us.
const READ_MAP_TTLS: u32 = 4;
/// Between two tries of a change of the map that was not applied.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Between two reads of the map while there is word of a newer one.
const HEARD_PAUSE: Duration = Duration::from_millis(10);
/// Between two changes of the map that say no more than that nothing is left to do of earlier reigns.
const SETTLE_EVERY: Duration = Duration::from_secs(1);
/// A plan that the first node does not propose is proposed by the others after this.
const PROPOSER_PATIENCE: Duration = Duration::from_secs(3);

/// What is to be asked of the store. Each is asked once at a time; whoever asks tells what came of it, also when that is
/// nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Renew our lease, and note with it which version of the map we know.
    Renew(Renewal, u64),
    /// Read our own lease, serially: an outcome is not known.
    ReadOwn,
    /// Read another's lease, at quorum.
    Watch(Incarnation),
    /// Mark another dead, if it still shows this beat.
    Mark(Incarnation, Beat),
    /// Read the map.
    ReadMap,
    /// Replace the map, if it has this version.
    PutMap {
        /// What version it must have.
        expected: u64,
        /// By what, as the next version.
        map: ShardMap,
    },
}

/// What came of it, and what else happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// To [`Ask::Renew`].
    Renewed(Renewal, Answer),
    /// To [`Ask::ReadOwn`]; none: not answered.
    Own(Option<Row>),
    /// To [`Ask::Watch`], which was sent then: what the lease shows and which version of the map its node knows; none:
    /// not answered.
    Watched(Incarnation, Tick, Option<(Row, u64)>),
    /// To [`Ask::Mark`].
    Marked(Incarnation, Answer),
    /// To [`Ask::ReadMap`], or what a conditional write met; none: not answered.
    Map(Option<(u64, ShardMap)>),
    /// To [`Ask::PutMap`]: whether it was applied; none: nobody knows.
    Put(Option<bool>),
    /// A newer version of the map was heard of.
    Heard(u64),
    /// A shard can be served.
    Opened(u32, u32),
    /// These shards have stopped and finished, each under an epoch: they are released together.
    Stopped(Vec<(u32, u32)>),
    /// Of a shard nothing is left to do of reigns up to this epoch.
    Settled(u32, u32),
    /// An operator wants a shard at a node, or wherever the plan wants it.
    Pin(u32, Option<String>),
    /// It is to give away everything, or to take again.
    Drain(bool),
}

/// How a request stands that is asked again and again.
#[derive(Clone, Copy, Debug)]
struct Pace {
    under_way: bool,
    due: Tick,
}

impl Pace {
    fn at(due: Tick) -> Self {
        Self { under_way: false, due }
    }

    /// Whether it is to be asked now; then it is.
    fn begin(&mut self, now: Tick, next: Duration) -> bool {
        let begins = !self.under_way && now >= self.due;
        if begins {
            *self = Self { under_way: true, due: now + next };
        }
        begins
    }

    fn end(&mut self) {
        self.under_way = false;
    }
}

struct Watched {
    watch: Watch,
    pace: Pace,
    silent: Option<(Beat, Tick)>,
}

/// A node of the cluster.
pub struct Node {
    me: Incarnation,
    member: Member,
    ttl: Duration,
    lease: Lease,
    renewals: Pace,
    own_unknown: bool,
    reads_own: Pace,
    watched: BTreeMap<Incarnation, Watched>,
    /// For which version of the map, and how many dead, that is.
    watches_of: (u64, usize),
    /// Marked dead, and not replaced in the map yet.
    dead: BTreeSet<Incarnation>,
    marking: bool,
    version: u64,
    map: ShardMap,
    heard: u64,
    reads_map: Pace,
    read_map_at: Tick,
    puts: Pace,
    /// What the put that is under way would make, of which version.
    putting: Option<(u64, ShardMap)>,
    /// What the plan makes of a version of the map; none: nothing.
    plan: Option<(u64, Option<ShardMap>)>,
    /// Since when a plan is wanted that somebody else is to propose.
    plan_wanted: Option<Tick>,
    moves_max: usize,
    drains: bool,
    settles_at: Tick,
    /// What an operator wants and the map does not say yet.
    pins: BTreeMap<u32, Option<String>>,
    host: Host,
}

impl Node {
    /// A node whose lease was made by a write that was sent at `sent`, and that has read the map.
    pub fn new(
        (me, member): (Incarnation, Member),
        lease: Lease,
        (version, map): (u64, ShardMap),
        ttl: Duration,
        moves_max: usize,
        now: Tick,
    ) -> Self {
        let host = Host::new(me, u32::try_from(map.shards.len()).unwrap_or(u32::MAX));
        let drains = member.draining;
        Self {
            me,
            member,
            ttl,
            lease,
            renewals: Pace::at(now + ttl * RENEW_TENTHS / 10),
            own_unknown: false,
            reads_own: Pace::at(now),
            watched: BTreeMap::new(),
            watches_of: (u64::MAX, 0),
            dead: BTreeSet::new(),
            marking: false,
            version,
            map,
            heard: version,
            reads_map: Pace::at(now + ttl * READ_MAP_TTLS),
            read_map_at: now,
            puts: Pace::at(now),
            putting: None,
            plan: None,
            plan_wanted: None,
            moves_max,
            drains,
            settles_at: now,
            pins: BTreeMap::new(),
            host,
        }
    }

    /// How the node stands at this instant.
    pub fn standing(&self, now: Tick) -> Standing {
        self.lease.standing(now)
    }

    /// Until when its lease is held, if nothing more is learnt.
    pub fn held_until(&self) -> Tick {
        self.lease.until()
    }

    /// Which incarnation it is, and what its lease is known to have shown last.
    pub fn beat(&self) -> (Incarnation, Beat) {
        (self.me, self.lease.shown())
    }

    /// Where a shard stands here.
    pub fn state(&self, shard: u32) -> State {
        self.host.state(shard)
    }

    /// The map as it is known here, with its version.
    pub fn map(&self) -> (u64, &ShardMap) {
        (self.version, &self.map)
    }

    /// What has stopped here and is to be released.
    pub fn release(&self) -> Option<Change> {
        self.host.release()
    }

    /// Whether a node that drains holds nothing any more, and everybody can see it.
    pub fn is_drained(&self) -> bool {
        self.drains && self.map.held_by(self.me).next().is_none()
    }

    /// When there is something to ask next, if nothing is told before.
    pub fn next(&self, now: Tick) -> Tick {
        let restless = self.heard > self.version
            || self.puts.under_way
            || now < self.puts.due
            || self.plan_wanted.is_some()
            || self.own_unknown
            || !self.pins.is_empty()
            || self.host.settle().is_some()
            || self.host.release().is_some();
        let paces = [self.renewals, self.reads_map].into_iter().chain(self.watched.values().map(|w| w.pace));
        let due = paces.filter(|pace| !pace.under_way).map(|pace| pace.due);
        due.chain(restless.then_some(now + RETRY_PAUSE)).min().unwrap_or(now + self.ttl)
    }

    /// What to ask now.
    pub fn poll(&mut self, now: Tick) -> Vec<Ask> {
        let mut asks = Vec::new();
        if self.lease.standing(now) == Standing::Fenced {
            return asks;
        }
        if self.renewals.begin(now, self.ttl * RENEW_TENTHS / 10) {
            asks.extend(self.lease.renew(now).map(|renewal| Ask::Renew(renewal, self.version)));
        }
        if self.own_unknown && self.reads_own.begin(now, RETRY_PAUSE) {
            asks.push(Ask::ReadOwn);
        }
        self.watch(now, &mut asks);
        if self.heard > self.version {
            self.reads_map.due = self.reads_map.due.min(self.read_map_at + HEARD_PAUSE);
        }
        if self.reads_map.begin(now, self.ttl * READ_MAP_TTLS) {
            self.read_map_at = now;
            asks.push(Ask::ReadMap);
        }
        if self.lease.standing(now) == Standing::Held {
            self.change(now, &mut asks);
        }
        asks
    }

    fn watch(&mut self, now: Tick, asks: &mut Vec<Ask>) {
        if self.watches_of != (self.version, self.dead.len()) {
            self.watches_of = (self.version, self.dead.len());
            let wanted = self.watches();
            self.watched.retain(|who, _| wanted.contains(who));
            for who in wanted {
                let fresh = || Watched { watch: Watch::new(self.ttl), pace: Pace::at(now), silent: None };
                self.watched.entry(who).or_insert_with(fresh);
            }
        }
        for (who, watched) in &mut self.watched {
            if watched.pace.begin(now, WATCH_EVERY) {
                asks.push(Ask::Watch(*who));
            }
        }
        let renewed = self.lease.from();
        let judged = |w: &Watched| w.silent.filter(|(_, at)| renewed >= *at).map(|(beat, _)| beat);
        let may_mark = !self.marking && self.lease.standing(now) == Standing::Held;
        let found = self.watched.iter().find_map(|(who, w)| judged(w).map(|beat| (*who, beat)));
        if let (true, Some((who, beat))) = (may_mark, found) {
            self.marking = true;
            asks.push(Ask::Mark(who, beat));
        }
    }

    /// Whom this node watches: everyone has [`WATCHERS`] of those that are not known to be dead.
    fn watches(&self) -> Vec<Incarnation> {
        let alive: Vec<Incarnation> =
            self.map.members.keys().copied().filter(|n| !self.dead.contains(n)).collect();
        let watched_by_us = |who: &Incarnation| {
            let mut others: Vec<Incarnation> = alive.iter().copied().filter(|n| n != who).collect();
            others.sort_unstable_by_key(|by| derived([&who.to_string(), &by.to_string()]));
            others.iter().take(WATCHERS).any(|by| *by == self.me)
        };
        alive.iter().copied().filter(|who| *who != self.me).filter(watched_by_us).collect()
    }

    /// The change of the map that is wanted most, if any.
    fn change(&mut self, now: Tick, asks: &mut Vec<Ask>) {
        if self.heard > self.version || self.puts.under_way || now < self.puts.due {
            return;
        }
        let Some(map) = self.wanted(now) else { return };
        self.puts = Pace { under_way: true, due: now + RETRY_PAUSE };
        self.putting = Some((self.version, map.clone()));
        asks.push(Ask::PutMap { expected: self.version, map });
    }

    fn wanted(&mut self, now: Tick) -> Option<ShardMap> {
        if !self.map.members.contains_key(&self.me) {
            return self.map.with(&Change::Join(self.me, self.member.clone()));
        }
        if let Some(map) = self.dead.iter().find_map(|dead| self.map.with(&Change::Replace(*dead))) {
            return Some(map);
        }
        let pin = |(shard, name): (&u32, &Option<String>)| self.map.with(&Change::Pin(*shard, name.clone()));
        if let Some(map) = self.pins.iter().find_map(pin) {
            return Some(map);
        }
        // What is settled goes with what is released: once released it is another's to say.
        let settled = self.host.settle().and_then(|change| self.map.with(&change));
        let before = settled.as_ref().unwrap_or(&self.map);
        if let Some(map) = self.host.release().and_then(|change| before.with(&change)) {
            return Some(map);
        }
        if settled.is_some() && now >= self.settles_at {
            self.settles_at = now + SETTLE_EVERY;
            return settled;
        }
        if self.map.members.get(&self.me).is_some_and(|m| m.draining != self.drains) {
            return self.map.with(&Change::Drain(self.me, self.drains));
        }
        if self.plan.as_ref().is_none_or(|(of, _)| *of != self.version) {
            let change = Change::Plan { moves_max: self.moves_max };
            self.plan = Some((self.version, self.map.with(&change)));
        }
        let Some((_, Some(plan))) = &self.plan else {
            self.plan_wanted = None;
            return None;
        };
        let since = *self.plan_wanted.get_or_insert(now);
        let first = self.map.members.keys().find(|n| !self.dead.contains(n)) == Some(&self.me);
        (first || now >= since + PROPOSER_PATIENCE).then(|| plan.clone())
    }

    /// Learns what came of a question, or what else happened; says what is to be done about shards.
    pub fn told(&mut self, now: Tick, told: Told) -> Vec<Action> {
        match told {
            Told::Renewed(renewal, answer) => {
                self.renewals.end();
                self.lease.answered(renewal, answer);
                self.own_unknown = answer == Answer::Unknown;
                if answer != Answer::Applied {
                    // The next one goes to another coordinator, at once.
                    self.renewals.due = now;
                }
            }
            Told::Own(row) => {
                self.reads_own.end();
                if let Some(row) = row {
                    self.own_unknown = false;
                    self.lease.shows(row);
                }
            }
            Told::Watched(who, asked, answer) => self.saw(now, who, asked, answer),
            Told::Marked(who, answer) => {
                self.marking = false;
                let watched = self.watched.get_mut(&who);
                match answer {
                    Answer::Applied | Answer::Refused(Row::Dead) => drop(self.dead.insert(who)),
                    // It has renewed: it lives.
                    Answer::Refused(Row::Live(_)) => watched.into_iter().for_each(|w| w.silent = None),
                    // It is tried again; a read shows it, if it was applied.
                    Answer::Unknown => {}
                }
            }
            Told::Map(read) => {
                self.reads_map.end();
                if let Some((version, map)) = read {
                    return self.takes(version, map);
                }
            }
            Told::Put(applied) => {
                self.puts.end();
                let put = self.putting.take();
                match (applied, put) {
                    (Some(true), Some((expected, map))) => {
                        self.puts.due = now;
                        return self.takes(expected + 1, map);
                    }
                    // What stands there is read; what may still come of it is met by the next change.
                    _ => self.heard = self.heard.max(self.version + 1),
                }
            }
            Told::Heard(version) => self.heard = self.heard.max(version),
            Told::Opened(shard, epoch) => self.host.opened(shard, epoch),
            Told::Stopped(all) => all.into_iter().for_each(|(shard, epoch)| self.host.stopped(shard, epoch)),
            Told::Settled(shard, epoch) => self.host.settled(shard, epoch),
            Told::Drain(drains) => self.drains = drains,
            Told::Pin(shard, name) => drop(self.pins.insert(shard, name)),
        }
        if self.lease.standing(now) == Standing::Fenced { self.host.fenced() } else { Vec::new() }
    }

    fn saw(&mut self, now: Tick, who: Incarnation, asked: Tick, answer: Option<(Row, u64)>) {
        let Some(watched) = self.watched.get_mut(&who) else { return };
        watched.pace.end();
        let Some((row, version)) = answer else { return };
        self.heard = self.heard.max(version);
        match watched.watch.read(asked, now, row) {
            Verdict::Alive => watched.silent = None,
            Verdict::Silent { beat, at } => {
                // The first judgement counts: our lease has to be renewed only once since.
                if watched.silent.is_none_or(|(was, _)| was != beat) {
                    watched.silent = Some((beat, at));
                }
            }
            Verdict::Dead => drop(self.dead.insert(who)),
        }
    }

    /// Takes a map that is not older than ours.
    fn takes(&mut self, version: u64, map: ShardMap) -> Vec<Action> {
        if version < self.version {
            return Vec::new();
        }
        if version == self.version {
            // Nothing came of what was heard.
            self.heard = self.version;
        }
        self.version = version;
        self.heard = self.heard.max(version);
        self.map = map;
        self.pins.retain(|shard, name| self.map.pins.get(shard) != name.as_ref());
        self.dead
            .retain(|dead| self.map.members.contains_key(dead) || self.map.held_by(*dead).next().is_some());
        self.host.map(&self.map)
    }
}
