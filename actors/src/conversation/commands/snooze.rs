//! `conversation.snooze`, and its end.

use patchbay_protocol::CommandError;
use patchbay_protocol::command::{Command, Reply, SnoozeConversation};
use patchbay_protocol::entry::{Actor, Body, Cause};
use patchbay_protocol::summary::Status;

use super::{Draft, Outcome};
use crate::conversation::state::State;
use crate::shard::entity::{Decision, Now};

pub(super) fn decide(state: &State, command: &Command, request: &SnoozeConversation, now: &Now) -> Outcome {
    if request.until <= now.at {
        return Err(CommandError::invalid("until is not in the future"));
    }
    let mut draft = Draft::new(command, now);
    if state.status != Status::Snoozed || state.snoozed_until != Some(request.until) {
        draft.add(Body::Snoozed { episode: state.episode, cause: Cause::Command, until: request.until });
    }
    draft.state_reply(state)
}

/// A timer came due: it fires, looks, and does nothing when the snooze has moved or ended.
pub(super) fn due(state: &State, command: &Command, now: &Now) -> Outcome {
    let mut draft = Draft::new(command, now);
    if state.status == Status::Snoozed && state.snoozed_until.is_some_and(|until| until <= now.at) {
        draft.add_by(Actor::system(), Body::Reopened { episode: state.episode, cause: Cause::SnoozeDue });
    }
    Ok(Decision::entries(draft.entries, Reply::Taken))
}
