//! `conversation.read`: an agent has seen up to here; the customer is told where the channel can.

use patchbay_protocol::command::{Command, ReadConversation};
use patchbay_protocol::entry::Body;

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
