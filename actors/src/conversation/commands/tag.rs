//! `conversation.tag`: one entry for every tag that is really added or removed.

use patchbay_protocol::CommandError;
use patchbay_protocol::command::{Command, TAG_MAX, TAGS_MAX, TagConversation};
use patchbay_protocol::entry::Body;

use super::{Draft, Outcome};
use crate::conversation::state::State;
use crate::shard::entity::Now;

/// Tags of one command, so that its entries fit into one append.
const TAGS_PER_COMMAND_MAX: usize = 32;

pub(super) fn decide(state: &State, command: &Command, request: &TagConversation, now: &Now) -> Outcome {
    let TagConversation { add, remove } = request;
    if add.len() + remove.len() > TAGS_PER_COMMAND_MAX {
        return Err(CommandError::invalid(format!("at most {TAGS_PER_COMMAND_MAX} tags at once")));
    }
    if add.iter().chain(remove).any(|t| t.is_empty() || t.len() > TAG_MAX) {
        return Err(CommandError::invalid(format!("a tag must have 1 to {TAG_MAX} bytes")));
    }
    let mut tags = state.tags.clone();
    let mut draft = Draft::new(command, now);
    for tag in remove {
        if tags.remove(tag) {
            draft.add(Body::TagRemoved { tag: tag.clone() });
        }
    }
    for tag in add {
        if tags.insert(tag.clone()) {
            draft.add(Body::TagAdded { tag: tag.clone() });
        }
    }
    if tags.len() > TAGS_MAX {
        return Err(CommandError::invalid(format!("a conversation has at most {TAGS_MAX} tags")));
    }
    draft.state_reply(state)
}
