//! Who holds which shard, on the store's own consensus (design section 5).
//!
//! Everything that decides is pure and driven from outside: a node's own [`lease`], what it makes of others ([`watch`]),
//! and who should hold what ([`placement`]).

pub mod host;
pub mod lease;
pub mod map;
pub mod member;
pub mod mesh;
pub mod placement;
pub mod runtime;
pub mod store;
pub mod switch;
pub mod ticks;
pub mod watch;

/// What is stored and what travels: maps with text keys and values that can be written, so that it cannot fail.
fn json(value: &impl serde::Serialize) -> bytes::Bytes {
    serde_json::to_vec(value).map(bytes::Bytes::from).unwrap_or_default()
}
