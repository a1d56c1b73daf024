//! Commands: one request and one reply type each. The same types are the rpc methods' data, the admin API's bodies
//! and what travels to a conversation's owner. Unknown fields are refused by name.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::codes::CommandError;
use crate::content::{Content, Media};
use crate::entry::{Actor, CausedBy};
use crate::event::Origin;
use crate::ids::{AccountId, AgentId, CommandId, ConversationId, InboxId, TenantId};
use crate::inbound::{StatusUpdate, ThreadEvent};
use crate::outbound::Lane;
use crate::summary::{Contact, Summary};
use crate::timestamp::Timestamp;

/// The longest `client_id`, in bytes.
pub const CLIENT_ID_MAX: usize = 64;
/// The longest text of a message or note, in bytes.
pub const TEXT_MAX: usize = 32 * 1024;
/// The longest tag, in bytes, and the most tags of a conversation.
pub const TAG_MAX: usize = 64;
/// The most tags of a conversation.
pub const TAGS_MAX: usize = 64;

/// `message.send`: a message to the customer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SendMessage {
    /// The sender's own id; repeating it makes no second message (G5).
    pub client_id: String,
    /// What it says.
    #[schema(value_type = Object)]
    pub content: Content,
    /// The `seq` of the message that it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<u64>,
    /// What the sender had seen; a later message by the customer or another agent makes it a conflict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_seq: Option<u64>,
}

/// The answer to a message or note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SendReply {
    /// Its place in the log.
    pub seq: u64,
    /// When it was accepted.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// Whether it was there already.
    pub duplicate: bool,
}

/// The answer to a command that changes state: its last entry, or the present tip when nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StateReply {
    /// The tip after the command.
    pub seq: u64,
    /// When that entry was written.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
}

/// `message.edit`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EditMessage {
    /// The message.
    pub message_seq: u64,
    /// What it shall say.
    #[schema(value_type = Object)]
    pub content: Content,
}

/// `message.delete`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeleteMessage {
    /// The message.
    pub message_seq: u64,
}

/// `message.react`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReactMessage {
    /// The message.
    pub message_seq: u64,
    /// The emoji; empty takes it back.
    pub emoji: String,
}

/// `conversation.read`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReadConversation {
    /// The last entry that was seen.
    pub up_to_seq: u64,
}

/// `conversation.assign`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AssignConversation {
    /// To whom; null for nobody.
    #[schema(value_type = Option<String>)]
    #[serde(deserialize_with = "Option::deserialize")]
    pub agent: Option<AgentId>,
}

/// `conversation.snooze`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnoozeConversation {
    /// When it comes back.
    #[schema(value_type = String, format = DateTime)]
    pub until: Timestamp,
}

/// `conversation.tag`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(deny_unknown_fields)]
pub struct TagConversation {
    /// Tags to add.
    #[serde(default)]
    pub add: Vec<String>,
    /// Tags to remove.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// `note.add`: a note that the customer never sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddNote {
    /// The sender's own id, as for messages.
    pub client_id: String,
    /// The text.
    pub text: String,
}

/// `typing.set`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetTyping {
    /// Whether somebody is writing.
    pub on: bool,
}

/// `resolve`, `reopen`, `pending`: no data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, Default)]
#[serde(deny_unknown_fields)]
pub struct Empty {}

/// What a channel can do; the conversation asks this, never the connector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel {
    /// How long after the customer's last message free-form messages may be sent; `None`: always.
    pub window: Option<Duration>,
    /// Whether a sent message can be changed.
    pub can_edit: bool,
    /// Whether a sent message can be taken back.
    pub can_delete: bool,
    /// Whether reactions can be sent.
    pub can_react: bool,
    /// Whether the customer is on our own socket, with no provider between.
    pub direct: bool,
}

/// Where a command is meant to act. A conversation of another tenant or account answers as if it did not exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ScopeOnTheWire", into = "ScopeOnTheWire")]
pub struct Scope {
    /// The tenant.
    pub tenant: TenantId,
    /// The channel account.
    pub account: AccountId,
    /// The account's present inbox.
    pub inbox: InboxId,
    /// What the channel can do.
    pub channel: Channel,
}

/// The same between nodes: what Patchbay asks of itself names nobody.
#[derive(Serialize, Deserialize)]
struct ScopeOnTheWire {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tenant: Option<TenantId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    account: Option<AccountId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inbox: Option<InboxId>,
    channel: Channel,
}

impl From<Scope> for ScopeOnTheWire {
    fn from(Scope { tenant, account, inbox, channel }: Scope) -> Self {
        Self {
            tenant: Some(tenant).filter(|t| *t != TenantId::nobody()),
            account: Some(account).filter(|a| *a != AccountId::nobody()),
            inbox: Some(inbox).filter(|i| *i != InboxId::nobody()),
            channel,
        }
    }
}

impl From<ScopeOnTheWire> for Scope {
    fn from(wire: ScopeOnTheWire) -> Self {
        Self {
            tenant: wire.tenant.unwrap_or_else(TenantId::nobody),
            account: wire.account.unwrap_or_else(AccountId::nobody),
            inbox: wire.inbox.unwrap_or_else(InboxId::nobody),
            channel: wire.channel,
        }
    }
}

/// A command to a conversation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Command {
    /// Made at the door; a repeat is recognised by it.
    pub id: CommandId,
    /// Where it is meant to act.
    pub scope: Scope,
    /// Who asks.
    pub actor: Actor,
    /// What an automation does it for.
    pub caused_by: Option<CausedBy>,
    /// What is asked.
    pub request: Request,
}

/// The first message of a thread: who the customer is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opening {
    /// The thread key that the conversation's id is derived from.
    pub thread: String,
    /// The customer.
    pub contact: Contact,
}

/// What is asked of a conversation.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Request {
    /// From an agent, the API or an automation. `opening` when it may be the thread's first message.
    Send {
        message: SendMessage,
        lane: Lane,
        opening: Option<Opening>,
    },
    Edit(EditMessage),
    Delete(DeleteMessage),
    React(ReactMessage),
    Read(ReadConversation),
    /// A customer's file was fetched, or cannot be.
    MediaFetched {
        /// The message that carries it.
        message_seq: u64,
        /// The file as we keep it, or why there is none.
        outcome: Result<Media, String>,
    },
    /// The visitor of a web chat has seen what the business wrote up to here.
    ContactRead(ReadConversation),
    Assign(AssignConversation),
    Resolve,
    Reopen,
    Pending,
    Snooze(SnoozeConversation),
    Tag(TagConversation),
    Note(AddNote),
    /// From the provider.
    Receive {
        opening: Opening,
        event: ThreadEvent,
    },
    /// A receipt, by the entry that it names or by the provider's id.
    Receipt {
        message_seq: Option<u64>,
        update: StatusUpdate,
    },
    /// The Account's word on a send.
    Outcome {
        message_seq: u64,
        update: StatusUpdate,
    },
    /// The Account found that another conversation is with the same contact.
    Link {
        other: ConversationId,
    },
    /// Somebody is writing to the customer, who may be shown it. Writes nothing.
    Typing,
    /// A timer of this conversation came due.
    TimerDue,
    /// What the conversation is, in one line. Writes nothing.
    Get,
    /// The confirmed tip. Writes nothing.
    Tip,
    /// Where it is at home, for the node itself. Writes nothing.
    Home,
}

impl Request {
    /// The name, for metrics, logs and parked commands.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Send { .. } => "message.send",
            Self::Edit(_) => "message.edit",
            Self::Delete(_) => "message.delete",
            Self::React(_) => "message.react",
            Self::Read(_) => "conversation.read",
            Self::ContactRead(_) => "contact.read",
            Self::MediaFetched { .. } => "media.fetched",
            Self::Assign(_) => "conversation.assign",
            Self::Resolve => "conversation.resolve",
            Self::Reopen => "conversation.reopen",
            Self::Pending => "conversation.pending",
            Self::Snooze(_) => "conversation.snooze",
            Self::Tag(_) => "conversation.tag",
            Self::Note(_) => "note.add",
            Self::Receive { .. } => "item.receive",
            Self::Receipt { .. } => "item.receipt",
            Self::Outcome { .. } => "send.outcome",
            Self::Link { .. } => "conversation.link",
            Self::Typing => "typing.set",
            Self::TimerDue => "timer.due",
            Self::Get => "conversation.get",
            Self::Tip => "conversation.tip",
            Self::Home => "conversation.home",
        }
    }
}

/// A conversation's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::Send`] and [`Request::Note`].
    Sent(SendReply),
    /// To everything that changes state.
    State(StateReply),
    /// To [`Request::Receive`]: durable, now or before.
    Taken,
    /// To [`Request::Receipt`]: the message is not known here (yet).
    Unmatched,
    /// To [`Request::Get`].
    Summary(Box<Summary>),
    /// To [`Request::Tip`].
    Tip(Tip),
    /// To [`Request::Home`]: where it is at home, its inbox and its confirmed tip; none when it does not exist.
    Home(Option<(Origin, InboxId, u64)>),
}

/// Where a log ends, by its owner's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tip {
    /// The highest confirmed `seq`; 0 when the conversation does not exist.
    pub seq: u64,
    /// Its channel account; `None` when the conversation does not exist.
    pub account: Option<AccountId>,
}

/// What every command answers.
pub type Outcome = Result<Reply, CommandError>;

/// A request's body, strictly: what is wrong is named by its place.
pub fn parse<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, CommandError> {
    let mut from = serde_json::Deserializer::from_slice(json);
    let parsed = strictly(&mut from)?;
    from.end().map_err(CommandError::invalid)?;
    Ok(parsed)
}

/// The same of what was parsed already.
pub fn parse_value<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> Result<T, CommandError> {
    strictly(value)
}

fn strictly<'a, T, D>(from: D) -> Result<T, CommandError>
where
    T: serde::Deserialize<'a>,
    D: serde::Deserializer<'a, Error = serde_json::Error>,
{
    serde_path_to_error::deserialize(from).map_err(|e| {
        let path = e.path().to_string();
        let inner = e.into_inner();
        match path.as_str() {
            "." => CommandError::invalid(inner),
            path => CommandError::invalid(format!("{path}: {inner}")),
        }
    })
}

/// Refuses a `client_id` that is empty or too long.
pub fn check_client_id(id: &str) -> Result<(), CommandError> {
    if id.is_empty() || id.len() > CLIENT_ID_MAX {
        return Err(CommandError::invalid(format!("client_id must have 1 to {CLIENT_ID_MAX} bytes")));
    }
    Ok(())
}
