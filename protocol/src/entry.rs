//! Entries: what happened in a conversation, in the one JSON shape that history, publications, the admin API and
//! Kafka share (contract §4).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::content::{Content, Media};
use crate::ids::{AccountId, AgentId, ConversationId, EntryId, InboxId, TenantId};
use crate::receipt::MessageStatus;
use crate::summary::Contact;
use crate::timestamp::Timestamp;

/// What kind of actor did it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema, PartialOrd, Ord,
)]
#[serde(rename_all = "lowercase")]
pub enum ActorType {
    /// The customer.
    Contact,
    /// An agent on a socket.
    Agent,
    /// An API key.
    Api,
    /// A consumer: workflow, AI.
    Automation,
    /// The channel's provider.
    Provider,
    /// Patchbay itself.
    System,
}

/// Who did it.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema, PartialOrd, Ord,
)]
pub struct Actor {
    /// What kind of actor.
    #[serde(rename = "type")]
    pub kind: ActorType,
    /// Which one.
    pub id: String,
}

impl Actor {
    /// An actor of `kind` called `id`.
    pub fn new(kind: ActorType, id: impl Into<String>) -> Self {
        Self { kind, id: id.into() }
    }

    /// Patchbay itself.
    pub fn system() -> Self {
        Self::new(ActorType::System, "patchbay")
    }
}

/// What an automation's entry was made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CausedBy {
    /// The entry that caused it.
    pub event: EntryId,
    /// One more than the cause's depth.
    pub depth: u8,
}

/// Why a conversation changed its status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A message of the customer.
    CustomerMessage,
    /// A message of the business.
    BusinessMessage,
    /// Somebody asked for it.
    Command,
    /// The snooze is over.
    SnoozeDue,
    /// The provider named addresses of two conversations as one contact's.
    SharedAddress,
}

/// A message that an entry speaks of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Target {
    /// Its `seq`, where it is in this log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// The provider's id of it.
    pub provider_id: String,
}

/// Why a provider refused a message, or what it says is wrong with one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ProviderError {
    /// The provider's code, or one of ours (`expired`).
    pub code: String,
    /// The provider's title.
    pub title: String,
    /// Whether the same message may succeed later.
    pub retryable: bool,
}

/// `conversation.opened`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Opened {
    /// From 1.
    pub episode: u64,
    /// What opened it.
    pub cause: Cause,
    /// The tenant.
    pub tenant: TenantId,
    /// The channel account.
    pub account: AccountId,
    /// The account's inbox at that time.
    pub inbox: InboxId,
    /// The customer.
    pub contact: Contact,
    /// The thread key that the conversation's id is derived from.
    pub thread: String,
}

/// `message.received`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Received {
    /// The provider's id.
    pub provider_id: String,
    /// What it says.
    pub content: Content,
    /// When the customer sent it, by the provider's word.
    pub sent_at: Timestamp,
    /// The message that it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<Target>,
    /// The advertisement or link that it came from, in the provider's shape.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub referral: Option<Value>,
    /// Whether it was forwarded.
    #[serde(default, skip_serializing_if = "is_false")]
    pub forwarded: bool,
    /// Who in a group wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub participant: Option<String>,
    /// What the provider says is wrong with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<ProviderError>,
}

/// `message.sent`: accepted by us, status `pending`. From the phone app: already sent, with its `provider_id`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Sent {
    /// The sender's own id.
    pub client_id: String,
    /// What it says.
    pub content: Content,
    /// The message that it answers, by `seq`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<u64>,
    /// Only when it was sent from the provider's own app.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider_id: Option<String>,
    /// Only when it was sent from the provider's own app.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<Timestamp>,
}

/// `message.status`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct StatusChanged {
    /// The message.
    pub message_seq: u64,
    /// How far it has come.
    pub status: MessageStatus,
    /// The provider's id of the message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider_id: Option<String>,
    /// When, by the provider's word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider_at: Option<Timestamp>,
    /// What it costs, in the provider's shape.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pricing: Option<Value>,
    /// Who in a group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub participant: Option<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ProviderError>,
}

/// The types of entries with their data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "type", content = "data")]
#[allow(missing_docs)]
pub enum Body {
    #[serde(rename = "conversation.opened")]
    Opened(Opened),
    #[serde(rename = "conversation.resolved")]
    Resolved { episode: u64, cause: Cause },
    #[serde(rename = "conversation.reopened")]
    Reopened { episode: u64, cause: Cause },
    #[serde(rename = "conversation.pending")]
    Pending { episode: u64, cause: Cause },
    #[serde(rename = "conversation.snoozed")]
    Snoozed { episode: u64, cause: Cause, until: Timestamp },
    #[serde(rename = "conversation.linked")]
    Linked { episode: u64, cause: Cause, other: ConversationId },
    #[serde(rename = "message.received")]
    Received(Received),
    #[serde(rename = "message.sent")]
    Sent(Sent),
    #[serde(rename = "message.status")]
    Status(StatusChanged),
    #[serde(rename = "message.edited")]
    Edited {
        target: Target,
        content: Content,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        provider_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        participant: Option<String>,
    },
    #[serde(rename = "message.deleted")]
    Deleted {
        target: Target,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        provider_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        participant: Option<String>,
    },
    /// `emoji` is empty when the reaction was taken back.
    #[serde(rename = "message.reacted")]
    Reacted {
        target: Target,
        emoji: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        provider_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        participant: Option<String>,
    },
    #[serde(rename = "media.stored")]
    MediaStored { message_seq: u64, media: Media },
    #[serde(rename = "media.failed")]
    MediaFailed { message_seq: u64, reason: String },
    #[serde(rename = "note.added")]
    NoteAdded { client_id: String, text: String },
    #[serde(rename = "conversation.assigned")]
    Assigned { agent: Option<AgentId> },
    #[serde(rename = "conversation.read")]
    Read { up_to_seq: u64 },
    #[serde(rename = "tag.added")]
    TagAdded { tag: String },
    #[serde(rename = "tag.removed")]
    TagRemoved { tag: String },
    #[serde(rename = "contact.updated")]
    ContactUpdated {
        contact: Contact,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        provider_id: Option<String>,
    },
}

impl Body {
    /// The type's name.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Opened(_) => "conversation.opened",
            Self::Resolved { .. } => "conversation.resolved",
            Self::Reopened { .. } => "conversation.reopened",
            Self::Pending { .. } => "conversation.pending",
            Self::Snoozed { .. } => "conversation.snoozed",
            Self::Linked { .. } => "conversation.linked",
            Self::Received(_) => "message.received",
            Self::Sent(_) => "message.sent",
            Self::Status(_) => "message.status",
            Self::Edited { .. } => "message.edited",
            Self::Deleted { .. } => "message.deleted",
            Self::Reacted { .. } => "message.reacted",
            Self::MediaStored { .. } => "media.stored",
            Self::MediaFailed { .. } => "media.failed",
            Self::NoteAdded { .. } => "note.added",
            Self::Assigned { .. } => "conversation.assigned",
            Self::Read { .. } => "conversation.read",
            Self::TagAdded { .. } => "tag.added",
            Self::TagRemoved { .. } => "tag.removed",
            Self::ContactUpdated { .. } => "contact.updated",
        }
    }
}

/// One thing that happened, at its place in the conversation's order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Entry {
    /// From 1, without gaps (G2).
    pub seq: u64,
    /// When its owner decided it; never runs backwards within a conversation.
    pub at: Timestamp,
    /// `type` and `data`.
    #[serde(flatten)]
    pub body: Body,
    /// Who did it.
    pub actor: Actor,
    /// What an automation's entry was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caused_by: Option<CausedBy>,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(b: &bool) -> bool {
    !*b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_contract_shape() {
        let entry = Entry {
            seq: 7,
            at: Timestamp::parse("2026-11-21T09:00:00.123Z").unwrap(),
            body: Body::Received(Received {
                provider_id: "wamid.1".into(),
                content: Content::Text { text: "hola".into() },
                sent_at: Timestamp::parse("2026-11-21T09:00:00Z").unwrap(),
                reply_to: None,
                referral: None,
                forwarded: false,
                participant: None,
                errors: vec![],
            }),
            actor: Actor::new(ActorType::Contact, "34600111222"),
            caused_by: None,
        };
        let json = serde_json::to_string(&entry).unwrap();
        assert_eq!(
            json,
            r#"{"seq":7,"at":"2026-11-21T09:00:00.123Z","type":"message.received","data":{"provider_id":"wamid.1","content":{"type":"text","text":"hola"},"sent_at":"2026-11-21T09:00:00.000Z"},"actor":{"type":"contact","id":"34600111222"}}"#
        );
        assert_eq!(serde_json::from_str::<Entry>(&json).unwrap(), entry);
    }
}
