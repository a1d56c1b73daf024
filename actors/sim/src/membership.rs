//! Leases and the shard map under fire: stores that answer late, twice removed or never, processes that pause, crash and
//! come back, clocks that run fast and slow.
//!
//! After every step: of each shard at most one node serves it and holds its lease by its own clock, and an epoch is served
//! by one incarnation for ever. In the end, when nothing more goes wrong: every shard is served, the load is balanced, and
//! nobody is still on the move.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt;
use std::time::Duration;

use patchbay_actors::cluster::host::{Action, State};
use patchbay_actors::cluster::lease::{Answer, Beat, Lease, Row, Standing, Tick};
use patchbay_actors::cluster::map::{Change, Incarnation, Member, ShardMap, Slot};
use patchbay_actors::cluster::member::{Ask, Node, Told};

use crate::random::Random;

const SHARDS: u32 = 24;
const TTL: Duration = Duration::from_millis(2500);
/// A request that is not answered by then is told as unknown.
const DEADLINE_MS: u64 = 600;
/// Faults end here, and the world here.
const FAULTS_UNTIL_MS: u64 = 40_000;
const END_MS: u64 = 75_000;
const MOVES_MAX: usize = 8;

/// A deliberate fault of ours: the simulation has to find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A lease that counts from the answer to its renewal.
    LeaseFromTheAnswer,
    /// A lease that is a flag, set when somebody looks.
    LeaseAsAFlag,
    /// A mark that does not look which beat was judged.
    MarkWithoutTheBeat,
    /// Silence that is judged by half of the TTL.
    ImpatientObserver,
    /// A wish that replaces the holder at once.
    WishReplacesHolder,
    /// A shard that is served again by whoever has stopped it, under the same epoch, because the release was not answered.
    UnknownReleaseRefused,
    /// A change of the holder that keeps the epoch.
    EpochKept,
}

impl Bug {
    /// All of them.
    pub(crate) const ALL: [Self; 7] = [
        Self::LeaseFromTheAnswer,
        Self::LeaseAsAFlag,
        Self::MarkWithoutTheBeat,
        Self::ImpatientObserver,
        Self::WishReplacesHolder,
        Self::UnknownReleaseRefused,
        Self::EpochKept,
    ];
}

/// What happened in a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    crashes: u64,
    pauses: u64,
    cuts: u64,
    drains: u64,
    moves: u64,
    fenced: u64,
    unknown: u64,
}

impl Report {
    pub(crate) fn add(&mut self, other: &Self) {
        self.crashes += other.crashes;
        self.pauses += other.pauses;
        self.cuts += other.cuts;
        self.drains += other.drains;
        self.moves += other.moves;
        self.fenced += other.fenced;
        self.unknown += other.unknown;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} crashes, {} pauses, {} cuts, {} drains, {} changes of a holder, {} fenced, {} outcomes unknown",
            self.crashes, self.pauses, self.cuts, self.drains, self.moves, self.fenced, self.unknown
        )
    }
}

/// A process: one machine's place in the cluster, through all its incarnations.
struct Process {
    name: String,
    /// How its clock runs: parts in ten thousand of the world's.
    rate: u64,
    node: Option<Node>,
    incarnation: Incarnation,
    paused_until: u64,
    /// What was told while it was paused.
    missed: Vec<Told>,
    cut_until: u64,
    back_at: u64,
    /// What a node with a fault believes of itself: until when it holds its lease, whether it did when it last looked,
    /// and what it serves although it has stopped it.
    believes_until: Tick,
    flag: bool,
    serves_again: BTreeSet<(u32, u32)>,
}

/// A request on its way.
struct Sent {
    ask: Ask,
    /// When it was sent, by its node's clock and by the world's.
    tick: Tick,
    at: u64,
    /// How long its answer takes; none: longer than anybody waits.
    back: Option<u64>,
}

/// What the world does next.
enum Event {
    /// A node looks whether there is something to ask.
    Poll(usize, Incarnation),
    /// A request reaches the store, if it does; its answer the node, if it does by then.
    Reach(usize, Incarnation, Sent),
    Tell(usize, Incarnation, Told),
    /// Something goes wrong.
    Fault,
    Back(usize),
}

struct Entry(u64, u64, Event);

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

struct World {
    random: Random,
    now: u64,
    count: u64,
    events: BinaryHeap<Reverse<Entry>>,
    leases: BTreeMap<Incarnation, (Row, u64)>,
    map: (u64, ShardMap),
    processes: Vec<Process>,
    incarnations: Incarnation,
    /// Who served each shard under each epoch.
    served: BTreeMap<(u32, u32), Incarnation>,
    report: Report,
    tells: bool,
    bug: Option<Bug>,
}

/// Runs a world; panics with what does not hold.
pub(crate) fn run(seed: u64, tells: bool, bug: Option<Bug>) -> Report {
    let mut random = Random::new(seed);
    let nodes = random.between(1, 6) as usize;
    let processes = (0..nodes).map(|n| Process {
        name: format!("n{n}"),
        rate: random.between(9_960, 10_041),
        node: None,
        incarnation: 0,
        paused_until: 0,
        missed: Vec::new(),
        cut_until: 0,
        back_at: 0,
        believes_until: Tick::ZERO,
        flag: false,
        serves_again: BTreeSet::new(),
    });
    let processes = processes.collect();
    let mut world = World {
        random,
        now: 0,
        count: 0,
        events: BinaryHeap::new(),
        leases: BTreeMap::new(),
        map: (0, ShardMap::new(SHARDS, 0, 0)),
        processes,
        incarnations: 0,
        served: BTreeMap::new(),
        report: Report::default(),
        tells,
        bug,
    };
    for n in 0..nodes {
        let at = world.random.between(0, 3_000);
        world.at(at, Event::Back(n));
    }
    world.at(1_000, Event::Fault);
    while let Some(Reverse(Entry(at, _, event))) = world.events.pop() {
        if at > END_MS {
            break;
        }
        world.now = at;
        world.step(event);
        world.check();
    }
    world.end();
    world.report
}

impl World {
    fn at(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse(Entry(at, self.count, event)));
    }

    fn clock(&self, n: usize) -> Tick {
        Duration::from_micros(self.now * self.processes[n].rate / 10)
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.tells {
            println!("{:>6} {}", self.now, what());
        }
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Back(n) => self.back(n),
            Event::Poll(n, incarnation) => self.poll(n, incarnation),
            Event::Reach(n, incarnation, sent) => self.reach(n, incarnation, sent),
            Event::Tell(n, incarnation, told) => self.tell(n, incarnation, told),
            Event::Fault => self.fault(),
        }
    }

    /// A process starts: a new incarnation, with a lease of its own.
    fn back(&mut self, n: usize) {
        if self.processes[n].node.is_some() || self.now < self.processes[n].back_at {
            return;
        }
        self.incarnations += 1;
        let incarnation = self.incarnations;
        let beat = Beat { writer: self.random.next(), n: 1 };
        let now = self.clock(n);
        self.leases.insert(incarnation, (Row::Live(beat), self.map.0));
        let member =
            Member { name: self.processes[n].name.clone(), mesh: None, capacity: 1, draining: false };
        let lease = Lease::new(TTL, beat, now);
        let node = Node::new((incarnation, member), lease, self.map.clone(), TTL, MOVES_MAX, now);
        let process = &mut self.processes[n];
        process.node = Some(node);
        process.incarnation = incarnation;
        process.missed.clear();
        process.paused_until = 0;
        process.believes_until = now + TTL * 9 / 10;
        process.flag = true;
        process.serves_again.clear();
        self.say(|| format!("n{n} starts as {incarnation}"));
        self.at(self.now, Event::Poll(n, incarnation));
    }

    fn is(&self, n: usize, incarnation: Incarnation) -> bool {
        self.processes[n].node.is_some() && self.processes[n].incarnation == incarnation
    }

    fn poll(&mut self, n: usize, incarnation: Incarnation) {
        if !self.is(n, incarnation) {
            return;
        }
        let wait = self.random.between(5, 40);
        let next = self.now.max(self.processes[n].paused_until) + wait;
        self.at(next, Event::Poll(n, incarnation));
        if self.now < self.processes[n].paused_until {
            return;
        }
        for told in std::mem::take(&mut self.processes[n].missed) {
            self.tell(n, incarnation, told);
        }
        let now = self.clock(n);
        let Some(node) = &mut self.processes[n].node else { return };
        if node.standing(now) == Standing::Fenced {
            // It ends, and comes back as somebody else.
            self.say(|| format!("{incarnation} is fenced"));
            self.report.fenced += 1;
            self.crash(n, 500);
            return;
        }
        let asks = node.poll(now);
        let held = node.standing(now) == Standing::Held;
        self.processes[n].flag = held;
        for ask in asks {
            let (there, back) = (self.latency(), self.latency());
            let in_time = there + back < DEADLINE_MS;
            if !in_time {
                // It may reach the store all the same, however late.
                self.report.unknown += 1;
                self.at(self.now + DEADLINE_MS, Event::Tell(n, incarnation, nothing(ask.clone(), now)));
            }
            let sent = Sent { ask, tick: now, at: self.now, back: in_time.then_some(back) };
            self.at(self.now + there, Event::Reach(n, incarnation, sent));
        }
    }

    /// How long a request, or its answer, is on its way: mostly short.
    fn latency(&mut self) -> u64 {
        match self.random.between(0, 100) {
            0..90 => self.random.between(1, 15),
            90..98 => self.random.between(15, 200),
            _ => self.random.between(200, 3_000),
        }
    }

    fn reach(&mut self, n: usize, incarnation: Incarnation, sent: Sent) {
        let faulty = self.now < FAULTS_UNTIL_MS;
        let lost = self.processes[n].cut_until > self.now || (faulty && self.random.chance(10));
        // What was sent before its process died is done all the same.
        let told = (!lost).then(|| self.done(incarnation, &sent.ask, sent.tick));
        let Some(back) = sent.back else { return };
        let unheard = self.processes[n].cut_until > self.now + back || (faulty && self.random.chance(10));
        let (at, told) = match told.filter(|_| !unheard) {
            Some(told) => (self.now + back, told),
            None => {
                self.report.unknown += 1;
                (sent.at + DEADLINE_MS, nothing(sent.ask, sent.tick))
            }
        };
        self.at(at, Event::Tell(n, incarnation, told));
    }

    /// A request takes effect.
    fn done(&mut self, by: Incarnation, ask: &Ask, sent: Tick) -> Told {
        match ask {
            Ask::Renew(renewal, version) => {
                let lease = self.leases.entry(by).or_insert((Row::Dead, 0));
                let answer = if lease.0 == Row::Live(renewal.expected) {
                    *lease = (Row::Live(renewal.next), *version);
                    Answer::Applied
                } else {
                    Answer::Refused(lease.0)
                };
                Told::Renewed(*renewal, answer)
            }
            Ask::ReadOwn => Told::Own(self.leases.get(&by).map(|(row, _)| *row)),
            Ask::Watch(who) => Told::Watched(*who, sent, self.leases.get(who).copied()),
            Ask::Mark(who, beat) => {
                let Some(lease) = self.leases.get_mut(who) else {
                    return Told::Marked(*who, Answer::Unknown);
                };
                let unlooked = self.bug == Some(Bug::MarkWithoutTheBeat) && lease.0 != Row::Dead;
                let answer = if lease.0 == Row::Live(*beat) || unlooked {
                    lease.0 = Row::Dead;
                    Answer::Applied
                } else {
                    Answer::Refused(lease.0)
                };
                Told::Marked(*who, answer)
            }
            Ask::ReadMap => Told::Map(Some(self.map.clone())),
            Ask::PutMap { expected, map } => {
                let applies = self.map.0 == *expected;
                if applies {
                    let before = &self.map.1.shards;
                    let moved = before.iter().zip(&map.shards).filter(|(b, a)| b.holder != a.holder).count();
                    self.report.moves += moved as u64;
                    for (before, after) in before.iter().zip(&map.shards) {
                        assert!(
                            after.epoch > before.epoch
                                || (after.holder, after.epoch) == (before.holder, before.epoch),
                            "{before:?} became {after:?}"
                        );
                    }
                    let mut map = map.clone();
                    for (before, after) in before.iter().zip(&mut map.shards) {
                        if let (Some(Bug::WishReplacesHolder), Some(wish)) = (self.bug, after.wish) {
                            *after =
                                Slot { holder: Some(wish), epoch: after.epoch + 1, wish: None, ..*after };
                        }
                        if self.bug == Some(Bug::EpochKept) && before.holder.is_some() {
                            after.epoch = before.epoch;
                        }
                    }
                    self.map = (expected + 1, map);
                }
                Told::Put(Some(applies))
            }
        }
    }

    fn tell(&mut self, n: usize, incarnation: Incarnation, told: Told) {
        if !self.is(n, incarnation) {
            return;
        }
        if self.now < self.processes[n].paused_until {
            self.processes[n].missed.push(told);
            return;
        }
        let now = self.clock(n);
        let told = self.misheard(n, now, told);
        let Some(node) = &mut self.processes[n].node else { return };
        for action in node.told(now, told) {
            match action {
                Action::Open(shard, epoch, _) => {
                    let wait = self.random.between(1, 400);
                    self.at(self.now + wait, Event::Tell(n, incarnation, Told::Opened(shard, epoch)));
                }
                Action::Stop(shard) => {
                    let wait = self.random.between(1, 400);
                    let Some(node) = &self.processes[n].node else { return };
                    if let State::Stopping { epoch } = node.state(shard) {
                        self.at(
                            self.now + wait,
                            Event::Tell(n, incarnation, Told::Stopped(vec![(shard, epoch)])),
                        );
                    }
                }
                Action::Abandon(_) => {}
            }
        }
    }

    /// What a node with a fault makes of what it is told.
    fn misheard(&mut self, n: usize, now: Tick, told: Told) -> Told {
        let process = &mut self.processes[n];
        match told {
            Told::Renewed(_, Answer::Applied) => {
                process.believes_until = now + TTL * 9 / 10;
                told
            }
            Told::Watched(who, asked, Some(shown)) => {
                let long_ago = asked + TTL / 2;
                let early = self.bug == Some(Bug::ImpatientObserver);
                Told::Watched(who, if early { long_ago } else { asked }, Some(shown))
            }
            Told::Put(None) if self.bug == Some(Bug::UnknownReleaseRefused) => {
                if let Some(Change::Release(_, stopped)) = process.node.as_ref().and_then(Node::release) {
                    process.serves_again.extend(stopped);
                }
                told
            }
            told => told,
        }
    }

    /// Whether a process takes itself for the owner of a shard: under which epoch.
    fn owns(&self, n: usize, shard: u32) -> Option<u32> {
        let process = &self.processes[n];
        let node = process.node.as_ref()?;
        let again = process.serves_again.iter().find(|(s, _)| *s == shard).map(|(_, epoch)| *epoch);
        let epoch = match node.state(shard) {
            State::Serving { epoch } => epoch,
            State::Released { .. } => again?,
            State::Elsewhere | State::Opening { .. } | State::Stopping { .. } => return None,
        };
        let held = match self.bug {
            Some(Bug::LeaseFromTheAnswer) => self.clock(n) < process.believes_until,
            Some(Bug::LeaseAsAFlag) => process.flag,
            _ => node.standing(self.clock(n)) == Standing::Held,
        };
        held.then_some(epoch)
    }

    fn crash(&mut self, n: usize, back_in: u64) {
        self.processes[n].node = None;
        self.processes[n].back_at = self.now + back_in;
        self.at(self.now + back_in, Event::Back(n));
    }

    fn fault(&mut self) {
        if self.now >= FAULTS_UNTIL_MS {
            return;
        }
        let wait = self.random.between(200, 4_000);
        self.at(self.now + wait, Event::Fault);
        let n = self.random.between(0, self.processes.len() as u64) as usize;
        let long = self.random.between(100, 8_000);
        match self.random.between(0, 5) {
            0 if self.processes[n].node.is_some() => {
                self.say(|| format!("n{n} crashes"));
                self.report.crashes += 1;
                self.crash(n, long);
            }
            1 => {
                self.say(|| format!("n{n} is paused for {long}"));
                self.report.pauses += 1;
                self.processes[n].paused_until = self.now + long;
            }
            2 => {
                self.say(|| format!("n{n} is cut off for {long}"));
                self.report.cuts += 1;
                self.processes[n].cut_until = self.now + long;
            }
            3 => {
                // The store itself, for everybody.
                self.say(|| format!("the store is away for {long}"));
                self.report.cuts += 1;
                for process in &mut self.processes {
                    process.cut_until = self.now + long;
                }
            }
            _ => {
                let incarnation = self.processes[n].incarnation;
                self.report.drains += 1;
                self.say(|| format!("n{n} drains for {long}"));
                self.at(self.now, Event::Tell(n, incarnation, Told::Drain(true)));
                self.at(self.now + long, Event::Tell(n, incarnation, Told::Drain(false)));
            }
        }
    }

    /// What must hold after every step.
    fn check(&mut self) {
        for shard in 0..SHARDS {
            let mut owner = None;
            for n in 0..self.processes.len() {
                let Some(epoch) = self.owns(n, shard) else { continue };
                let me = self.processes[n].incarnation;
                assert!(
                    owner.is_none(),
                    "at {}: shard {shard} is owned by {} and {me}",
                    self.now,
                    owner.unwrap_or_default()
                );
                owner = Some(me);
                let first = *self.served.entry((shard, epoch)).or_insert(me);
                assert_eq!(first, me, "at {}: shard {shard}, epoch {epoch} was served by {first}", self.now);
            }
        }
    }

    /// What must have come about in the end.
    fn end(&self) {
        let (_, map) = &self.map;
        let alive: Vec<&Process> = self.processes.iter().filter(|p| p.node.is_some()).collect();
        assert_eq!(alive.len(), self.processes.len(), "everybody is back");
        assert_eq!(map.members.len(), alive.len(), "and nobody else is a member: {:?}", map.members);
        for shard in 0..SHARDS {
            let serves = |p: &&&Process| {
                matches!(p.node.as_ref().map(|n| n.state(shard)), Some(State::Serving { .. }))
            };
            assert_eq!(
                alive.iter().filter(serves).count(),
                1,
                "shard {shard} is served by one: {:?}",
                map.shards[shard as usize]
            );
        }
        assert_eq!(map.moves().count(), 0, "nothing is on the move");
        assert_eq!(map.with(&Change::Plan { moves_max: usize::MAX }), None, "the plan is fulfilled");
    }
}

/// What a node makes of a question that nobody answered.
fn nothing(ask: Ask, sent: Tick) -> Told {
    match ask {
        Ask::Renew(renewal, _) => Told::Renewed(renewal, Answer::Unknown),
        Ask::ReadOwn => Told::Own(None),
        Ask::Watch(who) => Told::Watched(who, sent, None),
        Ask::Mark(who, _) => Told::Marked(who, Answer::Unknown),
        Ask::ReadMap => Told::Map(None),
        Ask::PutMap { .. } => Told::Put(None),
    }
}
