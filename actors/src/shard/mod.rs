//! Virtual actors on shards.
//!
//! A [`slots::Slots`] holds the actors of one kind of entity: activated by their first command, linked to one
//! supervisor, bounded in commands in flight per entity and per shard, passivated when idle. A [`log_actor`] is the
//! one loop around every entity with a log: load, decide, append, apply, act.
//!
//! A node owns a shard for a [`Reign`]: its stamps, its [`activity`] (which entity wrote where, so that a successor
//! finds what is not yet derived and handed on) and its [`timers`].

pub mod activity;
pub mod entity;
pub mod filter;
pub mod log_actor;
pub mod reply;
pub mod slots;
pub mod soft;
pub mod timers;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use patchbay_protocol::Timestamp;
use patchbay_storage::log::Logs;
use patchbay_storage::stamp::OutOfStamps;
use patchbay_storage::tables::{Mark, Tables};
use patchbay_storage::{Stamp, Stamps};
use tokio::sync::Notify;

use crate::clock::Clock;
use crate::cluster::lease::Standing;
use crate::cluster::runtime::Membership;

/// Logs of a shard of which it is said how far they are confirmed when it is given away; what is past it is adopted.
pub const TIPS_MAX: usize = 256;

/// A node's ownership of a shard, from its opening to its end. Whoever acts for the shard holds this and nothing newer:
/// what outlives it goes on writing under its stamps, which lose.
pub struct Reign {
    /// Of which shard.
    pub shard: u32,
    /// Which entity wrote where.
    pub activity: activity::ActivityLog,
    stamps: Stamps,
    /// When it began.
    pub since: Timestamp,
    /// How long it took to open, from when the map named this node.
    opened_in: OnceLock<Duration>,
    /// Up to this epoch nothing is left to do.
    settled: u32,
    /// The mark that earlier reigns left.
    pub mark: Option<Mark>,
    /// How far earlier owners have said that they had confirmed logs.
    pub told: HashMap<[u8; 16], u64>,
    /// Entities that take nothing new and have no append under way, and how far their logs are confirmed.
    resting: Mutex<HashMap<[u8; 16], u64>>,
    /// Whether what earlier reigns left is in hand.
    swept: AtomicBool,
    /// Whether nothing new is begun outside any more.
    winding_up: AtomicBool,
    /// Whether it is about to end.
    leaving: AtomicBool,
    /// Whether it is over: nothing of it is shown any more, and nothing more is written.
    over: AtomicBool,
    ended: Notify,
    /// The lease that it holds by; none: nobody else can be there.
    membership: Option<Arc<Membership>>,
}

impl Reign {
    /// A reign that begins now, where nothing is left to do of reigns up to `settled`.
    pub fn new(shard: u32, epoch: u32, settled: u32, clock: Clock) -> Self {
        Self {
            shard,
            activity: activity::ActivityLog::new(shard, epoch, clock),
            stamps: Stamps::new(epoch),
            since: clock.now(),
            opened_in: OnceLock::new(),
            settled,
            mark: None,
            told: HashMap::new(),
            resting: Mutex::default(),
            swept: AtomicBool::new(false),
            winding_up: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            over: AtomicBool::new(false),
            ended: Notify::new(),
            membership: None,
        }
    }

    /// The same, for as long as this lease lasts.
    pub fn under(self, membership: Arc<Membership>) -> Self {
        Self { membership: Some(membership), ..self }
    }

    /// Whether what leaves the node now, leaves it under this reign. Waits while the lease is lapsed; false: it is over.
    pub async fn is_held(&self) -> bool {
        let held = match &self.membership {
            Some(membership) => membership.is_held().await,
            None => true,
        };
        held && !self.over.load(Ordering::Acquire)
    }

    /// The same, of this instant.
    pub fn is_held_now(&self) -> bool {
        let held = self.membership.as_ref().is_none_or(|m| m.standing() == Standing::Held);
        held && !self.over.load(Ordering::Acquire)
    }

    /// Whether its incarnation has ended, and with it every reign of its: even one that nobody has let go of yet.
    pub fn is_fenced(&self) -> bool {
        self.membership.as_ref().is_some_and(|m| m.standing() == Standing::Fenced)
    }

    /// It took this long to open.
    pub fn opened_in(&self, took: Duration) {
        // Said once.
        let _ = self.opened_in.set(took);
    }

    /// How long it took to open.
    pub fn opening(&self) -> Duration {
        self.opened_in.get().copied().unwrap_or_default()
    }

    /// Begins nothing new outside any more, and is served all the same.
    pub fn winds_up(&self) {
        self.winding_up.store(true, Ordering::Release);
    }

    /// Whether nothing new is begun outside.
    pub fn is_winding_up(&self) -> bool {
        self.winding_up.load(Ordering::Acquire)
    }

    /// Is about to end.
    pub fn leaves(&self) {
        self.winds_up();
        self.leaving.store(true, Ordering::Release);
    }

    /// Whether it is about to end.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// Ends it.
    pub fn ends(&self) {
        self.over.store(true, Ordering::Release);
        self.ended.notify_waiters();
    }

    /// Waits until it is over: nobody goes on waiting for the store then, while its successor serves.
    pub async fn is_over(&self) {
        let mut ended = std::pin::pin!(self.ended.notified());
        ended.as_mut().enable();
        if !self.over.load(Ordering::Acquire) {
            ended.await;
        }
    }

    /// An entity that takes nothing new has no append under way: its log is confirmed up to `tip`. Only under the lease.
    pub fn rests(&self, entity: [u8; 16], tip: u64) {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner).insert(entity, tip);
    }

    /// It has one again, to note what came of something.
    pub fn acts(&self, entity: [u8; 16]) {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner).remove(&entity);
    }

    /// Whether an entity rests.
    pub fn is_resting(&self, entity: &[u8; 16]) -> bool {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner).contains_key(entity)
    }

    /// How far logs are confirmed whose entities rest, of at most [`TIPS_MAX`].
    pub fn tips(&self) -> Vec<([u8; 16], u64)> {
        let resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting
            .iter()
            .filter(|(_, tip)| **tip > 0)
            .map(|(entity, tip)| (*entity, *tip))
            .take(TIPS_MAX)
            .collect()
    }

    /// Its epoch.
    pub fn epoch(&self) -> u32 {
        self.stamps.epoch()
    }

    /// The stamp of the next write.
    pub fn stamp(&self) -> Result<Stamp, OutOfStamps> {
        if self.over.load(Ordering::Acquire) { Err(OutOfStamps) } else { self.stamps.next() }
    }

    /// Earlier reigns that may have left something.
    pub fn before(&self) -> std::ops::Range<u32> {
        self.settled + 1..self.epoch()
    }

    /// Those, and this one.
    pub fn up_to_now(&self) -> std::ops::RangeInclusive<u32> {
        self.settled + 1..=self.epoch()
    }

    /// Whether what they left is in hand: before that no mark of this reign is written over theirs.
    pub fn is_swept(&self) -> bool {
        self.swept.load(Ordering::Acquire)
    }

    /// What earlier reigns left is in hand.
    pub fn has_swept(&self) {
        self.swept.store(true, Ordering::Release);
    }
}

/// What every entity of a node shares.
pub struct Shards {
    /// How many shards there are: a power of two.
    pub count: u32,
    /// This start's number; another one when the cluster had to do without this node for a while.
    pub incarnation: AtomicU32,
    /// The logs.
    pub logs: Logs,
    /// The tables.
    pub tables: Tables,
    /// What time it is.
    pub clock: Clock,
    /// Whether nobody else may become active: see [`crate::memory`].
    pub crowded: AtomicBool,
    /// Timers of all shards.
    pub timers: Arc<timers::Timers>,
    reigns: Vec<Mutex<Option<Arc<Reign>>>>,
}

impl Shards {
    /// The shards of a node that owns none yet.
    pub fn new(count: u32, incarnation: u32, tables: Tables, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            count,
            incarnation: AtomicU32::new(incarnation),
            logs: Logs::new(tables.engine().clone()),
            crowded: AtomicBool::new(false),
            timers: Arc::default(),
            reigns: (0..count).map(|_| Mutex::default()).collect(),
            tables,
            clock,
        })
    }

    /// The reign over a shard; none: it is another node's.
    pub fn reign(&self, shard: u32) -> Option<Arc<Reign>> {
        self.reigns.get(shard as usize)?.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every reign.
    pub fn reigns(&self) -> impl Iterator<Item = Arc<Reign>> {
        (0..self.count).filter_map(|shard| self.reign(shard))
    }

    /// Whether there are any, and what earlier ones left is in hand for all of them.
    pub fn are_swept(&self) -> bool {
        self.reigns().next().is_some() && self.reigns().all(|reign| reign.is_swept())
    }

    /// Begins a reign.
    pub fn begin(&self, reign: Reign) -> Arc<Reign> {
        self.end(reign.shard);
        let reign = Arc::new(reign);
        if let Some(at) = self.reigns.get(reign.shard as usize) {
            *at.lock().unwrap_or_else(PoisonError::into_inner) = Some(reign.clone());
        }
        reign
    }

    /// Ends the reign over a shard.
    pub fn end(&self, shard: u32) -> Option<Arc<Reign>> {
        let reign = self.reigns.get(shard as usize)?.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        reign.ends();
        Some(reign)
    }
}
