//! Reading events: at least once, in order by conversation, with what is missing or repeated said.
//!
//! **Lives here:** the loop around a [`Handler`] ([`consumer`]), the event as it is handed over ([`Event`]), what was
//! seen of each conversation ([`sequence`]), and where events go that cannot be handled ([`dead_letters`]).
//!
//! **Does not live here:** where events come from (a [`patchbay_storage::events::Source`]: Kafka or log files, alike),
//! what follows from them, and writing back, which goes by commands alone.
//!
//! Invariant: the group's place moves past an event only after its effect, or after it is in the dead letters.
//! Invariant: an event is handed over after everything before it in its partition, so in its conversation.

pub mod consumer;
pub mod dead_letters;
pub mod sequence;

use patchbay_protocol::Timestamp;
use patchbay_protocol::event::{Envelope, TYPE_PREFIX};
use patchbay_protocol::ids::{ConversationId, TenantId};
use serde_json::Value;

pub use consumer::{Consumer, Failure, Handler, Options};
pub use dead_letters::{DeadLetters, FileDeadLetters};

/// An event as a handler gets it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `<conversation>-<seq>`.
    pub id: String,
    /// The tenant.
    pub tenant: TenantId,
    /// The conversation.
    pub conversation: ConversationId,
    /// Its place there, from 1.
    pub seq: u64,
    /// The entry's type, such as `message.received`.
    pub kind: String,
    /// When it happened.
    pub at: Timestamp,
    /// `/tenants/<tenant>/accounts/<account>`.
    pub source: String,
    /// The entry, with `conversation`, `account` and `inbox`.
    pub value: Value,
}

/// An event that is none of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no event of ours: {0}")]
pub struct Undecodable(pub &'static str);

impl Event {
    /// Reads an envelope.
    pub fn decode(envelope: &Envelope) -> Result<Self, Undecodable> {
        let header = |name: &'static str| {
            let found = envelope.headers.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| value.as_str()).ok_or(Undecodable(name))
        };
        let kind = header("ce_type")?.strip_prefix(TYPE_PREFIX).ok_or(Undecodable("ce_type"))?;
        Ok(Self {
            id: header("ce_id")?.to_owned(),
            tenant: header("ce_tenant")?.parse().map_err(|_| Undecodable("ce_tenant"))?,
            conversation: header("ce_subject")?.parse().map_err(|_| Undecodable("ce_subject"))?,
            seq: header("ce_sequence")?.parse().map_err(|_| Undecodable("ce_sequence"))?,
            kind: kind.to_owned(),
            at: Timestamp::parse(header("ce_time")?).ok_or(Undecodable("ce_time"))?,
            source: header("ce_source")?.to_owned(),
            value: serde_json::from_slice(&envelope.value).map_err(|_| Undecodable("value"))?,
        })
    }
}
