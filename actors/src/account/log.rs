//! What stands in an account's log.

use patchbay_protocol::entry::ProviderError;
use patchbay_protocol::ids::{ConversationId, EntryId};
use patchbay_protocol::inbound::{AccountEvent, Address, AddressKind, StatusUpdate};
use patchbay_protocol::outbound::{Backoff, Outbound};
use patchbay_protocol::timestamp::Timestamp;
use patchbay_storage::tables::IdKey;
use serde::{Deserialize, Serialize};

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When it was decided.
    pub at: Timestamp,
    /// What.
    #[serde(flatten)]
    pub body: AccountEntry,
}

/// What happened to an account.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data")]
pub enum AccountEntry {
    /// Addresses lead to a thread, for ever.
    #[serde(rename = "alias.added")]
    AliasAdded {
        /// The addresses.
        addresses: Vec<Address>,
        /// The thread key.
        thread: String,
    },
    /// A conversation handed over a message. `attempted`: this entry is also the record of its first attempt.
    #[serde(rename = "send.queued")]
    Queued {
        /// The message.
        outbound: Box<Outbound>,
        /// Whether it is called at once.
        attempted: bool,
    },
    /// It is about to be called.
    #[serde(rename = "send.attempted")]
    Attempted {
        /// Which.
        entry: EntryId,
    },
    /// The provider did not take it; not before then.
    #[serde(rename = "send.retried")]
    Retried {
        /// Which.
        entry: EntryId,
        /// Why.
        error: ProviderError,
        /// When it may be called again.
        not_before: Timestamp,
        /// Whom that holds back.
        scope: Backoff,
    },
    /// What came of it; the conversation is told until it acks.
    #[serde(rename = "send.outcome")]
    Outcome {
        /// Which.
        entry: EntryId,
        /// What.
        update: Box<StatusUpdate>,
    },
    /// The conversation has it.
    #[serde(rename = "send.settled")]
    Settled {
        /// Which.
        entry: EntryId,
    },
    /// A receipt that matches nothing yet.
    #[serde(rename = "receipt.kept")]
    Kept {
        /// The conversation, where that is known.
        conversation: Option<ConversationId>,
        /// The message's seq, where that is known.
        message_seq: Option<u64>,
        /// The receipt.
        update: Box<StatusUpdate>,
    },
    /// A kept receipt has found its message, or its day is over.
    #[serde(rename = "receipt.released")]
    Released {
        /// The seq of the entry that kept it.
        kept: u64,
    },
    /// Something about the account as a whole.
    #[serde(rename = "account.event")]
    Event(AccountEvent),
    /// Nothing more is called until somebody acts.
    #[serde(rename = "account.paused")]
    Paused {
        /// Why.
        reason: String,
    },
    /// Calls go on.
    #[serde(rename = "account.resumed")]
    Resumed {},
}

/// What a record says of the account as a whole, if it does.
pub fn event_of(payload: &[u8]) -> Option<(Timestamp, AccountEvent)> {
    let record: Record = serde_json::from_slice(payload).ok()?;
    let own = |kind: &str, data| AccountEvent { kind: kind.into(), data, pauses: None };
    let event = match record.body {
        AccountEntry::Event(event) => event,
        AccountEntry::Paused { reason } => own("account.paused", serde_json::json!({"reason": reason})),
        AccountEntry::Resumed {} => own("account.resumed", serde_json::json!({})),
        _ => return None,
    };
    Some((record.at, event))
}

/// The id by which a send is found, also long after it was settled.
pub fn send_id(entry: EntryId) -> IdKey {
    IdKey::of(["send", &entry.to_string()])
}

/// The id by which an address is found.
pub fn address_id(address: &Address) -> IdKey {
    let kind = match address.kind {
        AddressKind::WaId => "wa_id",
        AddressKind::UserId => "user_id",
        AddressKind::ParentUserId => "parent_user_id",
        AddressKind::Group => "group",
    };
    IdKey::of(["alias", kind, &address.value])
}
