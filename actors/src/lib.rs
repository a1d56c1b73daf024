//! Who owns what, and what happens to it.
//!
//! **Lives here:** the entities (`conversation`, `account`, `agent`, `inbox`), each a pure core (`decide`, `apply`)
//! with one actor around it; the shard host that activates, supervises, bounds and passivates them (`shard`); the
//! router interface that a cluster can later implement; and what the doors call: [`desk`] for agents and the API,
//! [`intake`] for webhooks, [`directory`] for configuration documents. ractor is used here and nowhere else.
//!
//! **Does not live here:** sockets, HTTP, tokens, provider formats, storage engines. Time, randomness, storage and
//! the network are arguments.
//!
//! Invariant: an entity's entries are replied to, published and acted on only after they are durable (G1).
//! Invariant: commands that wait while an append is under way go out as one append, in their order (G2).
//! Invariant: nothing above the [`router`] knows where an actor lives.
//! Invariant: every queue has a bound; past it the caller gets `overloaded` with `retry_after_ms`.

pub mod account;
pub mod agent;
pub mod clock;
pub mod cluster;
pub mod conversation;
pub mod desk;
pub mod directory;
pub mod fanout;
pub mod inbox;
pub mod intake;
mod keeper;
pub mod memory;
pub mod node;
pub mod outbox;
pub mod ports;
pub mod router;
mod sessions;
pub mod shard;
pub mod shares;
