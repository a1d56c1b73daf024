//! By which ids an entry must be found again, for ever.

use patchbay_protocol::entry::{Actor, ActorType, Body, Entry};
use patchbay_storage::tables::IdKey;

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
pub fn wamid(provider_id: &str) -> IdKey {
    IdKey::of(["message", provider_id])
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
        Body::Status(s) => {
            let mut ids = vec![status(s.message_seq, s.participant.as_deref())];
            ids.extend(s.provider_id.as_deref().map(wamid));
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
