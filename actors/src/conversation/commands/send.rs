//! `message.send`: a message to the customer, once for every (actor, `client_id`) (G5).

use patchbay_protocol::command::{Command, Opening, Reply, Scope, SendMessage, SendReply, check_client_id};
use patchbay_protocol::entry::{Actor, ActorType, Body, Cause, Opened, Sent, StatusChanged};
use patchbay_protocol::ids::EntryId;
use patchbay_protocol::outbound::Lane;
use patchbay_protocol::receipt::MessageStatus;
use patchbay_protocol::summary::Status;
use patchbay_protocol::{CommandError, Content, ErrorCode, Timestamp};
use serde_json::json;

use super::{Draft, Known, Outcome, check_depth};
use crate::conversation::entity::Effect;
use crate::conversation::ids;
use crate::conversation::state::State;
use crate::shard::entity::{Decision, Lookup, Now};

pub(super) fn lookups(command: &Command, message: &SendMessage) -> Vec<Lookup> {
    let mut wanted = vec![Lookup::Id(ids::client(&command.actor, &message.client_id))];
    wanted.extend(message.reply_to.map(Lookup::Seq));
    wanted
}

pub(super) fn decide(
    state: &State,
    found: &Known,
    command: &Command,
    message: &SendMessage,
    lane: Lane,
    opening: Option<&Opening>,
    now: &Now,
) -> Outcome {
    check_client_id(&message.client_id)?;
    check_depth(command)?;
    if let Some((seq, before)) = found.id(ids::client(&command.actor, &message.client_id)) {
        return repeated(seq, before.at, &before.body, message);
    }
    check_reply_to(state, found, message)?;
    if let Some(seen) = message.if_seq {
        let newer = state.last_message_by_another(&command.actor);
        if newer > seen {
            return Err(CommandError::with(ErrorCode::Conflict, json!({"last_seq": state.last_seq})));
        }
    }
    check_window(state, &command.scope, &message.content, now.at)?;
    let mut draft = Draft::new(command, now);
    open_if_needed(state, command, opening, &mut draft);
    let seq = draft.add(Body::Sent(Sent {
        client_id: message.client_id.clone(),
        content: message.content.clone(),
        reply_to: message.reply_to,
        provider_id: None,
        sent_at: None,
    }));
    let reply = Reply::Sent(SendReply { seq, at: now.at, duplicate: false });
    let direct = carried(state, command, seq, &mut draft);
    let decision = Decision::entries(draft.entries, reply);
    Ok(if direct { decision } else { decision.effect(Effect::HandOn { seq, lane }) })
}

/// Where the customer is on our own socket, what is in the log is sent. Tells whether that is so.
pub(super) fn carried(state: &State, command: &Command, seq: u64, draft: &mut Draft<'_>) -> bool {
    let direct = command.scope.channel.direct;
    if direct {
        let told = StatusChanged {
            message_seq: seq,
            status: MessageStatus::Sent,
            provider_id: Some(EntryId { conversation: state.id, seq }.to_string()),
            provider_at: None,
            pricing: None,
            participant: None,
            error: None,
        };
        draft.add_by(Actor::new(ActorType::Provider, "webchat"), Body::Status(told));
    }
    direct
}

/// The same id again: the first answer for the same content, a conflict for another.
fn repeated(seq: u64, at: Timestamp, before: &Body, message: &SendMessage) -> Outcome {
    let same =
        matches!(before, Body::Sent(m) if m.content == message.content && m.reply_to == message.reply_to);
    if !same {
        return Err(CommandError::with(
            ErrorCode::Conflict,
            json!({"detail": "this client_id was used for another message"}),
        ));
    }
    Ok(Decision::reply(Reply::Sent(SendReply { seq, at, duplicate: true })))
}

fn check_reply_to(state: &State, found: &Known, message: &SendMessage) -> Result<(), CommandError> {
    let Some(seq) = message.reply_to else { return Ok(()) };
    let target = if seq <= state.last_seq { found.seq(seq) } else { None };
    match target.map(|e| &e.body) {
        Some(Body::Received(_) | Body::Sent(_)) => Ok(()),
        _ => Err(CommandError::invalid("reply_to names no message of this conversation")),
    }
}

/// Outside the channel's window only templates are sent.
fn check_window(state: &State, scope: &Scope, content: &Content, now: Timestamp) -> Result<(), CommandError> {
    if matches!(content, Content::Template { .. }) { Ok(()) } else { check_open(state, scope, now) }
}

/// Why a free-form message is refused, and what would be allowed.
pub fn window_closed(since: Option<Timestamp>) -> CommandError {
    CommandError::with(ErrorCode::WindowClosed, json!({"allowed": ["template"], "window_until": since}))
}

/// Whether the channel's window is open.
pub(super) fn check_open(state: &State, scope: &Scope, now: Timestamp) -> Result<(), CommandError> {
    let Some(window) = scope.channel.window else { return Ok(()) };
    if state.window_until(Some(window)).is_some_and(|until| until > now) {
        return Ok(());
    }
    Err(window_closed(state.window_until(Some(window))))
}

/// A business that writes first opens the conversation; one that writes after it was resolved opens the next episode.
fn open_if_needed(state: &State, command: &Command, opening: Option<&Opening>, draft: &mut Draft<'_>) {
    let opened = match (&state.home, opening) {
        (None, Some(o)) => Some((o.thread.clone(), o.contact.clone())),
        (Some(home), _) if state.status == Status::Resolved => {
            Some((home.thread.clone(), home.contact.clone()))
        }
        (None, None) | (Some(_), _) => None,
    };
    if let Some((thread, contact)) = opened {
        draft.add(Body::Opened(Opened {
            episode: state.episode + 1,
            cause: Cause::BusinessMessage,
            tenant: command.scope.tenant.clone(),
            account: command.scope.account.clone(),
            inbox: command.scope.inbox.clone(),
            contact,
            thread,
        }));
    }
}
