//! The Account found that another conversation is with the same contact.

use patchbay_protocol::command::Command;
use patchbay_protocol::entry::{Actor, Body, Cause};
use patchbay_protocol::ids::ConversationId;

use super::{Draft, Outcome};
use crate::conversation::state::State;
use crate::shard::entity::Now;

pub(super) fn decide(state: &State, command: &Command, other: ConversationId, now: &Now) -> Outcome {
    let mut draft = Draft::new(command, now);
    if other != state.id && !state.is_linked(other) {
        draft.add_by(
            Actor::system(),
            Body::Linked { episode: state.episode, cause: Cause::SharedAddress, other },
        );
    }
    draft.state_reply(state)
}
