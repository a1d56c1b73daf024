//! `message.edit`, `message.delete`, `message.react`: where the channel can.

use patchbay_protocol::command::{Command, DeleteMessage, EditMessage, ReactMessage};
use patchbay_protocol::entry::{Body, Target};
use patchbay_protocol::{CommandError, ErrorCode};

use super::{Draft, Known, Outcome};
use crate::conversation::entity::Effect;
use crate::conversation::ids;
use crate::conversation::state::State;
use crate::shard::entity::{Lookup, Now};

/// The longest emoji, in bytes (families with skin tones are long).
const EMOJI_MAX: usize = 64;

pub(super) fn lookups(message_seq: u64) -> Vec<Lookup> {
    vec![Lookup::Seq(message_seq), Lookup::Id(ids::status(message_seq, None))]
}

fn own_message(state: &State, found: &Known, seq: u64) -> Result<(), CommandError> {
    let there = seq <= state.last_seq && matches!(found.seq(seq).map(|e| &e.body), Some(Body::Sent(_)));
    if there { Ok(()) } else { Err(ErrorCode::NotFound.into()) }
}

/// No channel of this version can change what was sent.
pub(super) fn edit(state: &State, found: &Known, _: &Command, request: &EditMessage) -> Outcome {
    own_message(state, found, request.message_seq)?;
    Err(ErrorCode::NotSupported.into())
}

/// No channel of this version can take back what was sent.
pub(super) fn delete(state: &State, found: &Known, _: &Command, request: &DeleteMessage) -> Outcome {
    own_message(state, found, request.message_seq)?;
    Err(ErrorCode::NotSupported.into())
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
            match found.id(ids::status(request.message_seq, None)).map(|(_, e)| &e.body) {
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
    let mut draft = Draft::new(command, now);
    let target = Target { seq: Some(request.message_seq), provider_id: provider_id.clone() };
    draft.add(Body::Reacted { target, emoji: request.emoji.clone(), provider_id: None });
    let effect = Effect::React { provider_id, emoji: request.emoji.clone() };
    draft.state_reply(state).map(|d| d.effect(effect))
}
