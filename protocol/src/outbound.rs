//! What goes to a provider: values that a connector renders into a call, and what it makes of the answer.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::content::Content;
use crate::entry::{Actor, ActorType, ProviderError};
use crate::ids::EntryId;
use crate::inbound::Address;
use crate::timestamp::Timestamp;

/// Who waits for a message; a lower lane never overtakes a higher one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// An agent's reply.
    Agent,
    /// The API and automation.
    Automation,
    /// Broadcasts.
    Bulk,
}

impl Lane {
    /// Every lane, the highest first.
    pub const ALL: [Self; 3] = [Self::Agent, Self::Automation, Self::Bulk];

    /// The lane of what somebody sends by hand or by the API.
    pub fn of(actor: &Actor) -> Self {
        if actor.kind == ActorType::Agent { Self::Agent } else { Self::Automation }
    }
}

/// How to reach the customer: a number where one is known, else the channel's own id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipient {
    /// Digits on WhatsApp; empty when unknown.
    pub address: String,
    /// The channel's own id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
}

impl Recipient {
    /// What the pair bucket and the one-call-at-a-time rule go by.
    pub fn key(&self) -> &str {
        if self.address.is_empty() { self.user_id.as_deref().unwrap_or("") } else { &self.address }
    }
}

/// What goes out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Payload {
    /// A reaction to a message; an empty emoji takes it back.
    Reaction {
        /// The provider's id of the message.
        reaction_to: String,
        /// The emoji.
        emoji: String,
    },
    /// A message.
    Message(Content),
}

/// A message on its way out: named by its entry, which is also its opaque callback data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outbound {
    /// The entry.
    pub entry: EntryId,
    /// When it was accepted.
    pub at: Timestamp,
    /// The key of the thread that it is in.
    #[serde(default)]
    pub thread: String,
    /// To whom.
    pub recipient: Recipient,
    /// What.
    pub payload: Payload,
    /// The provider's id of the message that it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<String>,
    /// How urgent.
    pub lane: Lane,
}

/// A signal to the customer that is not a message and is not retried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Signal {
    /// The business has read up to this message of the customer.
    Read {
        /// The provider's id of the last one.
        provider_id: String,
    },
    /// The business is writing; the channel shows it for a while.
    Typing {
        /// The provider's id of the customer's last message.
        provider_id: String,
    },
}

/// An HTTP call that a connector has rendered. Where it goes and its key stand in the account, not here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The path below the account's API base.
    pub path: String,
    /// The JSON body.
    pub body: Bytes,
}

/// What came of a call, as the HTTP client saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallResult {
    /// An answer came.
    Answered {
        /// Its HTTP status.
        status: u16,
        /// Its `Retry-After`.
        retry_after: Option<Duration>,
        /// Its body, cut at the client's bound.
        body: Bytes,
    },
    /// No connection was made: the provider cannot have seen it.
    NotSent,
    /// The request was written, wholly or in part, and then nothing is known.
    Lost,
}

/// What an answer means for the message (G7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The provider took it.
    Accepted {
        /// Its id there.
        provider_id: String,
        /// Other addresses of the recipient that the answer names.
        aliases: Vec<Address>,
    },
    /// The provider did not take it; the same call may succeed after a while.
    Retry {
        /// Why.
        error: ProviderError,
        /// Not before.
        after_ms: Option<u64>,
        /// Whom it holds back.
        scope: Backoff,
    },
    /// The provider refused it for good.
    Refused {
        /// Why.
        error: ProviderError,
        /// Whether it says that the reply window is closed.
        closes_window: bool,
    },
    /// The provider refused it since the account cannot send at all; the message stays queued.
    Paused {
        /// Why.
        error: ProviderError,
    },
    /// Nobody knows; it is never sent again blindly.
    Unknown,
}

/// Whom a retryable refusal holds back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backoff {
    /// This message only.
    Message,
    /// Everything to this recipient.
    Pair,
    /// The whole account.
    Account,
}
