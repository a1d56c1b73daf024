//! By which ids an entry must be found again, for ever.

use patchbay_protocol::entry::{Actor, ActorType, Body, Entry, StatusChanged};
use patchbay_protocol::ids::{ConversationId, EntryId};
use patchbay_storage::tables::IdKey;

use crate::shard::entity::Lookup;

/// A sender's own id for a message: (actor type, actor id, `client_id`), within the conversation.
pub fn client(actor: &Actor, client_id: &str) -> IdKey {
    let kind = match actor.kind {
        ActorType::Contact => "contact",
        ActorType::Agent => "agent",
        ActorType::Api => "api",
        ActorType::Automation => "automation",
        ActorType::Provider => "provider",
        ActorType::System => "system",
    };
    IdKey::of(["client", kind, &actor.id, client_id])
}

/// A provider's id of an item.
pub fn provider(provider_id: &str) -> IdKey {
    IdKey::of(["provider", provider_id])
}

/// The provider's id of a message that we sent; receipts are matched by it.
fn wamid(provider_id: &str) -> IdKey {
    IdKey::of(["message", provider_id])
}

/// How a message is found by the provider's id of it. Where we are the provider it is the entry's own id, which says
/// where the entry is.
pub fn message(conversation: ConversationId, provider_id: &str) -> Lookup {
    match provider_id.parse::<EntryId>() {
        Ok(id) if id.conversation == conversation => Lookup::Seq(id.seq),
        _ => Lookup::Id(wamid(provider_id)),
    }
}

/// Whether a message's id at its provider is its entry's own.
fn is_own(provider_id: &str, seq: u64) -> bool {
    provider_id.parse::<EntryId>().is_ok_and(|id| id.seq == seq)
}

/// Whether the entry at `seq` is the first word on a message that we carry ourselves.
fn is_carried(seq: u64, status: &StatusChanged) -> bool {
    seq.checked_sub(1) == Some(status.message_seq)
        && status.participant.is_none()
        && status.provider_id.as_deref().is_some_and(|id| is_own(id, status.message_seq))
}

/// The last word on a message's status, or on one participant's.
pub fn status(message_seq: u64, participant: Option<&str>) -> IdKey {
    let seq = message_seq.to_string();
    match participant {
        None => IdKey::of(["status", &seq]),
        Some(p) => IdKey::of(["status", &seq, p]),
    }
}

/// The ids of an entry.
pub fn of(entry: &Entry) -> Vec<IdKey> {
    match &entry.body {
        Body::Received(m) => vec![provider(&m.provider_id)],
        Body::Sent(m) => {
            let mut ids = vec![client(&entry.actor, &m.client_id)];
            if let Some(id) = &m.provider_id {
                ids.extend([provider(id), wamid(id)]);
            }
            ids
        }
        Body::NoteAdded { client_id, .. } => vec![client(&entry.actor, client_id)],
        // The first word on what we carry ourselves stands right behind it, and is found there.
        Body::Status(s) if is_carried(entry.seq, s) => vec![],
        Body::Status(s) => {
            let mut ids = vec![status(s.message_seq, s.participant.as_deref())];
            ids.extend(s.provider_id.as_deref().filter(|id| !is_own(id, s.message_seq)).map(wamid));
            ids
        }
        Body::Edited { provider_id, .. }
        | Body::Deleted { provider_id, .. }
        | Body::Reacted { provider_id, .. }
        | Body::ContactUpdated { provider_id, .. } => provider_id.iter().map(|id| provider(id)).collect(),
        Body::Opened(_)
        | Body::Resolved { .. }
        | Body::Reopened { .. }
        | Body::Pending { .. }
        | Body::Snoozed { .. }
        | Body::Linked { .. }
        | Body::MediaStored { .. }
        | Body::MediaFailed { .. }
        | Body::Assigned { .. }
        | Body::Read { .. }
        | Body::TagAdded { .. }
        | Body::TagRemoved { .. } => vec![],
    }
}
