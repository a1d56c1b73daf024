//! Virtual actors on shards.
//!
//! A [`slots::Slots`] holds the actors of one kind of entity: activated by their first command, linked to one
//! supervisor, bounded in commands in flight per entity and per shard, passivated when idle. A [`log_actor`] is the
//! one loop around every entity with a log: load, decide, append, apply, act.
//!
//! Beside them, per shard: stamps, [`activity`] (which entity wrote where, so that a successor finds what is not yet
//! derived and handed on) and [`timers`].

pub mod activity;
pub mod entity;
pub mod filter;
pub mod log_actor;
pub mod slots;
pub mod soft;
pub mod timers;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use patchbay_storage::Stamps;
use patchbay_storage::log::Logs;
use patchbay_storage::tables::Tables;

use crate::clock::Clock;

/// What every entity of a node shares.
pub struct Shards {
    /// How many shards there are: a power of two.
    pub count: u32,
    /// This reign's epoch, the same for all shards of a single node.
    pub epoch: u32,
    /// The logs.
    pub logs: Logs,
    /// The tables.
    pub tables: Tables,
    /// What time it is.
    pub clock: Clock,
    /// Stamps by shard.
    pub stamps: Vec<Stamps>,
    /// Activity by shard.
    pub activity: activity::ActivityLog,
    /// Whether what earlier reigns left is in hand: before that no mark of this reign is written over theirs.
    pub swept: AtomicBool,
    /// Whether nobody else may become active: see [`crate::memory`].
    pub crowded: AtomicBool,
    /// Timers of all shards.
    pub timers: Arc<timers::Timers>,
}

impl Shards {
    /// The shards of a reign that begins now.
    pub fn new(count: u32, epoch: u32, tables: Tables, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            count,
            epoch,
            logs: Logs::new(tables.engine().clone()),
            stamps: (0..count).map(|_| Stamps::new(epoch)).collect(),
            activity: activity::ActivityLog::new(count, epoch, clock),
            swept: AtomicBool::new(false),
            crowded: AtomicBool::new(false),
            timers: Arc::new(timers::Timers::default()),
            tables,
            clock,
        })
    }
}
