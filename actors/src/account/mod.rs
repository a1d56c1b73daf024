//! A channel account: decides whose thread an address is, sends what conversations hand it, keeps receipts that
//! match nothing yet, and its own log of what concerns no thread.
//!
//! Its log is its queue: `send.queued`, `send.attempted`, `send.retried`, `send.outcome`, `send.settled`. An attempt
//! is on record before its first byte; an attempt without an outcome is `unknown` to whoever comes after (G7).

pub mod act;
pub mod commands;
pub mod entity;
pub mod log;
pub mod pacing;
pub mod state;
#[cfg(test)]
mod tests;

pub use commands::{AccountCommand, AccountReply, KeptReceipt, ThreadReply};
pub use entity::{Account, OutboundConfig};
pub use log::event_of;
