//! A conversation in one line: what lists and inbox channels show (contract §3).

use serde::{Deserialize, Serialize};

use crate::ids::{AccountId, AgentId, ConversationId, InboxId};
use crate::timestamp::Timestamp;

/// Where the work on a conversation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema, Default)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Needs the business.
    #[default]
    Open,
    /// Waits for the customer; set by hand.
    Pending,
    /// Comes back at a chosen time or with the customer's next message.
    Snoozed,
    /// Done; the customer's next message opens another episode.
    Resolved,
}

/// The customer of a conversation.
#[derive(
    Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, schemars::JsonSchema, Default,
)]
pub struct Contact {
    /// The channel's address; on WhatsApp digits only. Empty while only a `user_id` is known.
    pub address: String,
    /// The name that the contact gave itself on the channel.
    pub name: String,
    /// The channel's own id for the contact (WhatsApp's business-scoped user id).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    /// The contact's handle on the channel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
}

/// A conversation in one line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Summary {
    /// The conversation.
    #[schema(value_type = String, example = "117hm6cewq8ptd8sg97y11y4xd")]
    pub id: ConversationId,
    /// Its channel account.
    #[schema(value_type = String)]
    pub account: AccountId,
    /// Its account's present inbox.
    #[schema(value_type = String)]
    pub inbox: InboxId,
    /// Its customer.
    pub contact: Contact,
    /// Where the work stands.
    pub status: Status,
    /// Who works on it.
    #[schema(value_type = Option<String>)]
    pub assignee: Option<AgentId>,
    /// The tip of its log. Of two summaries the one with the higher `last_seq` is newer.
    pub last_seq: u64,
    /// The start of the last message, at most 100 characters.
    pub preview: String,
    /// Customer messages after the highest `conversation.read` of any agent.
    pub unread: u64,
    /// The oldest customer message without a reply.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub waiting_since: Option<Timestamp>,
    /// Until when a free-form message may be sent; null where the channel has no window or it is closed.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub window_until: Option<Timestamp>,
    /// The episode, from 1.
    pub episode: u64,
    /// When the last entry was written.
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: Timestamp,
}
