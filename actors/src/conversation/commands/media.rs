//! Customers' files: fetched at once, asked for again by a timer until they are here or cannot be had.

use patchbay_protocol::command::{Command, Reply};
use patchbay_protocol::content::Media;
use patchbay_protocol::entry::{Actor, Body};

use super::{Draft, Outcome};
use crate::conversation::entity::{Conversation, Effect};
use crate::conversation::state::State;
use crate::shard::entity::{Decision, Now};

/// A file was fetched, or cannot be. A second word about it adds nothing.
pub(super) fn fetched(
    state: &State,
    command: &Command,
    message_seq: u64,
    outcome: &Result<Media, String>,
    now: &Now,
) -> Outcome {
    let mut draft = Draft::new(command, now);
    if state.fetching.contains_key(&message_seq) {
        let body = match outcome {
            Ok(media) => Body::MediaStored { message_seq, media: media.clone() },
            Err(reason) => Body::MediaFailed { message_seq, reason: reason.clone() },
        };
        draft.add_by(Actor::system(), body);
    }
    Ok(Decision::entries(draft.entries, Reply::Taken))
}

/// A timer came due: what is not fetched yet is asked for again. Who is fetching it already ignores that.
pub(super) fn due(state: &State, mut decision: Decision<Conversation>) -> Decision<Conversation> {
    let wanted = state.fetching.iter().map(|(seq, since)| Effect::Fetch { seq: *seq, since: *since });
    decision.effects.extend(wanted);
    decision
}
