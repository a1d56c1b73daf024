//! A conversation: the thread between one contact and one account, as an event-sourced log.
//!
//! `decide` (one file per command in [`commands`]) and `apply` ([`state`]) are plain functions. Receipts are a lattice
//! (G6); ids dedupe for ever (G5); `seq` has no gaps (G2).

pub mod commands;
pub mod done;
pub mod entity;
pub mod ids;
pub mod state;

pub use commands::window_closed;
pub use entity::{Conversation, Effect};
pub use state::State;
