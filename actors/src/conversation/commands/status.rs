//! `conversation.resolve`, `.reopen`, `.pending`. One that changes nothing writes nothing.

use patchbay_protocol::command::Command;
use patchbay_protocol::entry::{Body, Cause};
use patchbay_protocol::summary::Status;

use super::{Draft, Outcome};
use crate::conversation::state::State;
use crate::shard::entity::Now;

pub(super) fn resolve(state: &State, command: &Command, now: &Now) -> Outcome {
    change(
        state,
        command,
        now,
        Status::Resolved,
        Body::Resolved { episode: state.episode, cause: Cause::Command },
    )
}

pub(super) fn reopen(state: &State, command: &Command, now: &Now) -> Outcome {
    change(
        state,
        command,
        now,
        Status::Open,
        Body::Reopened { episode: state.episode, cause: Cause::Command },
    )
}

pub(super) fn pending(state: &State, command: &Command, now: &Now) -> Outcome {
    change(
        state,
        command,
        now,
        Status::Pending,
        Body::Pending { episode: state.episode, cause: Cause::Command },
    )
}

fn change(state: &State, command: &Command, now: &Now, to: Status, body: Body) -> Outcome {
    let mut draft = Draft::new(command, now);
    if state.status != to {
        draft.add(body);
    }
    draft.state_reply(state)
}
