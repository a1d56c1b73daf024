//! `conversation.read`: an agent has seen up to here; the customer is told where the channel can.

use patchbay_protocol::command::{Command, ReadConversation};
use patchbay_protocol::entry::{Body, StatusChanged};
use patchbay_protocol::ids::EntryId;
use patchbay_protocol::receipt::MessageStatus;

use super::{Draft, Outcome};
use crate::conversation::entity::Effect;
use crate::conversation::state::State;
use crate::shard::entity::Now;

pub(super) fn decide(state: &State, command: &Command, request: &ReadConversation, now: &Now) -> Outcome {
    let up_to_seq = request.up_to_seq.min(state.last_seq);
    let mut draft = Draft::new(command, now);
    if up_to_seq <= state.read_up_to {
        return draft.state_reply(state);
    }
    draft.add(Body::Read { up_to_seq });
    let effect = state
        .last_unread(up_to_seq)
        .map(|provider_id| Effect::MarkRead { provider_id: provider_id.to_owned() });
    draft.state_reply(state).map(|mut d| {
        d.effects.extend(effect);
        d
    })
}

/// Receipts of one command, so that its entries fit into one append.
const RECEIPTS_MAX: usize = 32;

/// The visitor's own receipt: a watermark, which speaks for the newest messages that it covers.
pub(super) fn by_contact(state: &State, command: &Command, request: &ReadConversation, now: &Now) -> Outcome {
    let mut draft = Draft::new(command, now);
    for seq in state.unread_by_contact(request.up_to_seq, RECEIPTS_MAX) {
        draft.add(Body::Status(StatusChanged {
            message_seq: seq,
            status: MessageStatus::Read,
            provider_id: Some(EntryId { conversation: state.id, seq }.to_string()),
            provider_at: None,
            pricing: None,
            participant: None,
            error: None,
        }));
    }
    draft.state_reply(state)
}
