//! `conversation.assign`

use patchbay_protocol::command::{AssignConversation, Command};
use patchbay_protocol::entry::Body;

use super::{Draft, Outcome};
use crate::conversation::entity::Effect;
use crate::conversation::state::State;
use crate::shard::entity::Now;

pub(super) fn decide(state: &State, command: &Command, request: &AssignConversation, now: &Now) -> Outcome {
    let mut draft = Draft::new(command, now);
    if state.assignee == request.agent {
        return draft.state_reply(state);
    }
    let seq = draft.add(Body::Assigned { agent: request.agent.clone() });
    draft.state_reply(state).map(|mut d| {
        d.effects.extend(request.agent.clone().map(|agent| Effect::Assigned { agent, seq }));
        d
    })
}
