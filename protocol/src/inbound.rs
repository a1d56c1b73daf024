//! What a connector makes of a webhook body: values that say what happened, on which account, in whose thread.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::content::Content;
use crate::entry::ProviderError;
use crate::ids::EntryId;
use crate::receipt::MessageStatus;
use crate::summary::Contact;
use crate::timestamp::Timestamp;

/// One item of a webhook body. One bad item never costs its neighbours.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// The provider's id of the account that it belongs to (WhatsApp: phone number id).
    pub external_id: String,
    /// What it says.
    pub kind: ItemKind,
    /// The item as it came, for the dead letters.
    pub raw: Value,
}

/// The most that an item may bring into a log. Whatever is larger stands in the dead letters as it came.
pub const ITEM_BYTES_MAX: usize = 128 * 1024;

impl Item {
    /// The item within its bound: a message that is too large becomes `unsupported`, anything else is broken.
    #[must_use]
    pub fn bounded(self) -> Self {
        const REASON: &str = "larger than this system keeps in a conversation";
        if self.kind.bytes() <= ITEM_BYTES_MAX {
            return self;
        }
        let mut kind = self.kind;
        if let ItemKind::Thread(ThreadItem { event, .. }) = &mut kind {
            let unsupported = Content::Unsupported { reason: REASON.into() };
            match event {
                ThreadEvent::Message(m) => {
                    (m.content, m.referral, m.errors) = (unsupported, None, Vec::new());
                }
                ThreadEvent::Edit { content, .. } | ThreadEvent::Echo { content, .. } => {
                    *content = unsupported
                }
                ThreadEvent::Reaction { .. }
                | ThreadEvent::Delete { .. }
                | ThreadEvent::ContactChanged { .. } => {}
            }
        }
        if kind.bytes() > ITEM_BYTES_MAX {
            kind = ItemKind::Broken { reason: REASON.into() };
        }
        Self { kind, ..self }
    }
}

fn json_bytes(value: &impl Serialize) -> usize {
    serde_json::to_vec(value).map_or(usize::MAX, |v| v.len())
}

impl ItemKind {
    /// What it would bring into a log, about.
    fn bytes(&self) -> usize {
        match self {
            Self::Thread(t) => json_bytes(&t.addresses) + json_bytes(&t.contact) + json_bytes(&t.event),
            Self::Status(s) => json_bytes(s),
            Self::Account(e) => json_bytes(e),
            Self::Broken { .. } => 0,
        }
    }
}

/// What an item says.
#[derive(Clone, Debug, PartialEq)]
pub enum ItemKind {
    /// Something in a thread.
    Thread(ThreadItem),
    /// A receipt for something that we sent.
    Status(StatusItem),
    /// Something about the account as a whole.
    Account(AccountEvent),
    /// Not understood even as far as its thread: to the dead letters.
    Broken {
        /// What was wrong.
        reason: String,
    },
}

/// Something that happened in a thread, and the addresses that decide which thread.
#[derive(Clone, Debug, PartialEq)]
pub struct ThreadItem {
    /// Every address of the contact, the one that would become the thread key first.
    pub addresses: Vec<Address>,
    /// The contact as this item shows it.
    pub contact: Contact,
    /// What happened.
    pub event: ThreadEvent,
}

/// One of the addresses under which a channel knows a contact.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Address {
    /// What kind of address (`wa_id`, `user_id`, `parent_user_id`, `group`).
    pub kind: AddressKind,
    /// The address itself.
    pub value: String,
}

/// Kinds of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressKind {
    /// A phone number, digits only.
    WaId,
    /// A business-scoped user id.
    UserId,
    /// A business-scoped user id of the parent business.
    ParentUserId,
    /// A group.
    Group,
}

/// What happened in a thread, by the provider's word.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ThreadEvent {
    /// The customer wrote.
    Message(Box<InboundMessage>),
    /// The customer reacted; an empty emoji takes it back.
    Reaction {
        /// This item's id.
        provider_id: String,
        /// The message's id.
        target: String,
        /// The emoji.
        emoji: String,
        /// Who in a group.
        participant: Option<String>,
    },
    /// The customer changed a message.
    Edit {
        /// This item's id.
        provider_id: String,
        /// The message's id.
        target: String,
        /// The new content.
        content: Content,
        /// Who in a group.
        participant: Option<String>,
    },
    /// The customer took a message back.
    Delete {
        /// This item's id.
        provider_id: String,
        /// The message's id.
        target: String,
        /// Who in a group.
        participant: Option<String>,
    },
    /// The business wrote from the provider's own app. Kept, never sent.
    Echo {
        /// This item's id.
        provider_id: String,
        /// What it says.
        content: Content,
        /// When.
        sent_at: Timestamp,
        /// The id of the message that it answers.
        reply_to: Option<String>,
    },
    /// The contact changed its number or id; `ThreadItem::contact` has the new one.
    ContactChanged {
        /// This item's id.
        provider_id: String,
        /// The address it has now, to become an alias.
        new_addresses: Vec<Address>,
    },
}

impl ThreadEvent {
    /// The item's own id.
    pub fn provider_id(&self) -> &str {
        match self {
            Self::Message(m) => &m.provider_id,
            Self::Reaction { provider_id, .. }
            | Self::Edit { provider_id, .. }
            | Self::Delete { provider_id, .. }
            | Self::Echo { provider_id, .. }
            | Self::ContactChanged { provider_id, .. } => provider_id,
        }
    }
}

/// A message of the customer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InboundMessage {
    /// This item's id.
    pub provider_id: String,
    /// What it says.
    pub content: Content,
    /// When, by the provider's word.
    pub sent_at: Timestamp,
    /// The id of the message that it answers.
    pub reply_to: Option<String>,
    /// The advertisement or link that it came from.
    pub referral: Option<Value>,
    /// Whether it was forwarded.
    pub forwarded: bool,
    /// Who in a group wrote it.
    pub participant: Option<String>,
    /// What the provider says is wrong with it.
    pub errors: Vec<ProviderError>,
}

/// A receipt, and what there is to find its message by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusItem {
    /// Our own callback data, where the provider gave it back.
    pub callback: Option<EntryId>,
    /// Addresses of the recipient.
    pub recipient: Vec<Address>,
    /// The receipt.
    pub update: StatusUpdate,
}

/// A receipt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusUpdate {
    /// The provider's id of the message.
    pub provider_id: Option<String>,
    /// How far it has come.
    pub status: MessageStatus,
    /// When, by the provider's word.
    pub provider_at: Option<Timestamp>,
    /// What it costs.
    pub pricing: Option<Value>,
    /// Who in a group.
    pub participant: Option<String>,
    /// Why it failed.
    pub error: Option<ProviderError>,
    /// Whether the failure says that the channel's reply window is closed.
    pub closes_window: bool,
}

impl StatusUpdate {
    /// A bare update to `status`.
    pub fn bare(status: MessageStatus) -> Self {
        Self {
            provider_id: None,
            status,
            provider_at: None,
            pricing: None,
            participant: None,
            error: None,
            closes_window: false,
        }
    }
}

/// Something about the account as a whole: templates, quality, bans, preferences, errors that belong to no thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AccountEvent {
    /// The provider's field or kind.
    pub kind: String,
    /// Its value, in the provider's shape.
    pub data: Value,
    /// Set when nothing more can be sent until somebody acts: why.
    pub pauses: Option<String>,
}
