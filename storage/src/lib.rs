//! What survives.
//!
//! **Lives here:** the [`Engine`] trait in its two halves, stamped rows and documents; the engines behind it
//! ([`embedded`] on fjall, [`scylla`] on ScyllaDB or Cassandra, [`model`] in memory with seeded faults); and, written once above them, the entity
//! [`log`] (append, adopt, read, snapshot) and the [`tables`] beside it (references, inbox rows, activity and marks,
//! sessions, timers, dead letters, documents). Files are [`blobs`], and [`shared_blobs`] where nodes share a store. An alias of a contact is a reference of its account's log.
//!
//! **Does not live here:** what an entry means, who may write it, when to retry. Storage moves bytes for owners.
//!
//! Invariant: no statement on an entity table without a [`Stamp`]; the highest stamp of a row wins.
//! Invariant: a write is answered `Ok` only when it is durable.
//! Invariant: `Refused` means not applied; `Unknown` is resolved only by writing the same bytes under the same stamp.
//! Invariant: reads and syncs never run on an async worker.

pub mod blobs;
pub mod embedded;
pub mod engine;
pub mod events;
pub mod kafka;
pub mod log;
pub mod model;
pub mod redis;
pub mod scylla;
pub mod shared_blobs;
pub mod stamp;
pub mod tables;
mod value;

pub use engine::{
    Batch, CLUSTER, CasOutcome, Cell, Document, DocumentKey, Engine, ReadError, Row, RowWrite, Scan, Table,
    WriteError,
};
pub use stamp::{Stamp, Stamps};
