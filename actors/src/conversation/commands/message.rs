//! `message.edit`, `message.delete`, `message.react`: where the channel can.

use patchbay_protocol::command::{Command, DeleteMessage, EditMessage, ReactMessage, Reply, StateReply};
use patchbay_protocol::entry::{Body, Target};
use patchbay_protocol::ids::EntryId;
use patchbay_protocol::outbound::Lane;
use patchbay_protocol::{CommandError, ErrorCode};

use super::{Draft, Known, Outcome};
use crate::conversation::entity::Effect;
use crate::conversation::ids;
use crate::conversation::state::State;
use crate::shard::entity::{Decision, Lookup, Now};

/// The longest emoji, in bytes (families with skin tones are long).
const EMOJI_MAX: usize = 64;

pub(super) fn lookups(message_seq: u64) -> Vec<Lookup> {
    vec![
        Lookup::Seq(message_seq),
        Lookup::Id(ids::status(message_seq, None)),
        Lookup::Seq(message_seq.saturating_add(1)),
    ]
}

/// The target of an edit or deletion: a message of the business, by its own id here.
fn own_message(state: &State, found: &Known, seq: u64) -> Result<Target, CommandError> {
    let there = seq <= state.last_seq && matches!(found.seq(seq).map(|e| &e.body), Some(Body::Sent(_)));
    let provider_id = EntryId { conversation: state.id, seq }.to_string();
    if there { Ok(Target { seq: Some(seq), provider_id }) } else { Err(ErrorCode::NotFound.into()) }
}

/// Changes what was sent, where the channel carries that by itself.
pub(super) fn edit(
    state: &State,
    found: &Known,
    command: &Command,
    request: &EditMessage,
    now: &Now,
) -> Outcome {
    if !command.scope.channel.can_edit {
        return Err(ErrorCode::NotSupported.into());
    }
    let target = own_message(state, found, request.message_seq)?;
    let mut draft = Draft::new(command, now);
    let content = request.content.clone();
    draft.add(Body::Edited { target, content, provider_id: None, participant: None });
    draft.state_reply(state)
}

/// Takes back what was sent, where the channel carries that by itself.
pub(super) fn delete(
    state: &State,
    found: &Known,
    command: &Command,
    request: &DeleteMessage,
    now: &Now,
) -> Outcome {
    if !command.scope.channel.can_delete {
        return Err(ErrorCode::NotSupported.into());
    }
    let target = own_message(state, found, request.message_seq)?;
    let mut draft = Draft::new(command, now);
    draft.add(Body::Deleted { target, provider_id: None, participant: None });
    draft.state_reply(state)
}

pub(super) fn react(
    state: &State,
    found: &Known,
    command: &Command,
    request: &ReactMessage,
    now: &Now,
) -> Outcome {
    if request.emoji.len() > EMOJI_MAX {
        return Err(CommandError::invalid(format!("emoji has more than {EMOJI_MAX} bytes")));
    }
    let target = if request.message_seq <= state.last_seq { found.seq(request.message_seq) } else { None };
    let provider_id = match target.map(|e| &e.body) {
        Some(Body::Received(m)) => Some(m.provider_id.clone()),
        Some(Body::Sent(m)) => m.provider_id.clone().or_else(|| {
            match super::receipt::last_word(found, request.message_seq).map(|(_, e)| &e.body) {
                Some(Body::Status(s)) => s.provider_id.clone(),
                _ => None,
            }
        }),
        _ => None,
    };
    let provider_id = provider_id.ok_or(ErrorCode::NotFound)?;
    if !command.scope.channel.can_react {
        return Err(ErrorCode::NotSupported.into());
    }
    super::send::check_open(state, &command.scope, now.at)?;
    let mut draft = Draft::new(command, now);
    let target = Target { seq: Some(request.message_seq), provider_id };
    let emoji = request.emoji.clone();
    let seq = draft.add(Body::Reacted { target, emoji, provider_id: None, participant: None });
    let lane = Lane::of(&command.actor);
    let reply = StateReply { seq, at: now.at };
    let direct = super::send::carried(state, command, seq, &mut draft);
    let decision = Decision::entries(draft.entries, Reply::State(reply));
    Ok(if direct { decision } else { decision.effect(Effect::HandOn { seq, lane }) })
}
