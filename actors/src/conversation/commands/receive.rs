//! What the provider brings: messages, reactions, edits, deletions, echoes, changed contacts. One entry for every
//! provider id, whenever and to whichever node it is repeated (G5).

use patchbay_protocol::command::{Command, Opening, Reply, SendReply};
use patchbay_protocol::entry::{Actor, ActorType, Body, Cause, Entry, Opened, Received, Sent, Target};
use patchbay_protocol::inbound::{InboundMessage, ThreadEvent};
use patchbay_protocol::summary::{Contact, Status};
use patchbay_protocol::{CommandError, ErrorCode};
use serde_json::json;

use super::{Draft, Known, Outcome};
use crate::conversation::entity::Effect;
use crate::conversation::ids;
use crate::conversation::state::State;
use crate::shard::entity::{Decision, Lookup, Now};

pub(super) fn lookups(state: &State, event: &ThreadEvent) -> Vec<Lookup> {
    let mut wanted = vec![Lookup::Id(ids::provider(event.provider_id()))];
    if let Some(target) = target_of(event) {
        wanted.extend([Lookup::Id(ids::provider(target)), ids::message(state.id, target)]);
    }
    if let ThreadEvent::Echo { provider_id, .. } = event {
        wanted.push(ids::message(state.id, provider_id));
    }
    wanted
}

fn target_of(event: &ThreadEvent) -> Option<&str> {
    match event {
        ThreadEvent::Message(m) => m.reply_to.as_deref(),
        ThreadEvent::Echo { reply_to, .. } => reply_to.as_deref(),
        ThreadEvent::Reaction { target, .. }
        | ThreadEvent::Edit { target, .. }
        | ThreadEvent::Delete { target, .. } => Some(target),
        ThreadEvent::ContactChanged { .. } => None,
    }
}

pub(super) fn decide(
    state: &State,
    found: &Known,
    command: &Command,
    opening: &Opening,
    event: &ThreadEvent,
    now: &Now,
) -> Outcome {
    let id = event.provider_id();
    let echo_of_ours =
        matches!(event, ThreadEvent::Echo { .. }) && found.get(ids::message(state.id, id)).is_some();
    if let Some((seq, before)) = found.id(ids::provider(id)) {
        return repeated(command, event, seq, before);
    }
    if echo_of_ours {
        return Ok(Decision::reply(Reply::Taken));
    }
    let mut draft = Draft::new(command, now);
    open(state, command, opening, event, &mut draft);
    let contact = Actor::new(ActorType::Contact, sender(opening));
    match event {
        ThreadEvent::Message(m) => {
            refresh_contact(state, opening, &m.provider_id, &mut draft);
            draft.add_by(contact, received(state, m, found));
        }
        ThreadEvent::Reaction { provider_id, target: t, emoji, participant } => {
            draft.add_by(
                contact,
                Body::Reacted {
                    target: target(state, t, found),
                    emoji: emoji.clone(),
                    provider_id: Some(provider_id.clone()),
                    participant: participant.clone(),
                },
            );
        }
        ThreadEvent::Edit { provider_id, target: t, content, participant } => {
            draft.add_by(
                contact,
                Body::Edited {
                    target: target(state, t, found),
                    content: content.clone(),
                    provider_id: Some(provider_id.clone()),
                    participant: participant.clone(),
                },
            );
        }
        ThreadEvent::Delete { provider_id, target: t, participant } => {
            draft.add_by(
                contact,
                Body::Deleted {
                    target: target(state, t, found),
                    provider_id: Some(provider_id.clone()),
                    participant: participant.clone(),
                },
            );
        }
        ThreadEvent::Echo { provider_id, content, sent_at, reply_to } => {
            let sent = Sent {
                client_id: provider_id.clone(),
                content: content.clone(),
                reply_to: reply_to.as_deref().and_then(|t| target(state, t, found).seq),
                provider_id: Some(provider_id.clone()),
                sent_at: Some(*sent_at),
            };
            draft.add_by(Actor::new(ActorType::Provider, "app"), Body::Sent(sent));
        }
        ThreadEvent::ContactChanged { provider_id, .. } => {
            draft.add_by(
                Actor::new(ActorType::Provider, "system"),
                Body::ContactUpdated {
                    contact: changed_contact(state, opening),
                    provider_id: Some(provider_id.clone()),
                },
            );
        }
    }
    let seq = now.next_seq + draft.entries.len() as u64 - 1;
    let reply = Reply::Sent(SendReply { seq, at: now.at, duplicate: false });
    let fetch = match event {
        ThreadEvent::Message(m) => file_of(m, seq, command, &mut draft),
        _ => None,
    };
    let mut decision = Decision::entries(draft.entries, reply);
    decision.effects.extend(fetch);
    Ok(decision)
}

/// What to do about a message's file: it is fetched from the provider, or it is here already.
fn file_of(m: &InboundMessage, seq: u64, command: &Command, draft: &mut Draft<'_>) -> Option<Effect> {
    let media = m.content.media()?;
    if command.scope.channel.direct {
        draft.add_by(Actor::system(), Body::MediaStored { message_seq: seq, media: media.clone() });
        return None;
    }
    Some(Effect::Fetch { seq, since: draft.now.at })
}

/// The same id again adds nothing. Whoever names its own messages is told when it named two of them alike.
fn repeated(command: &Command, event: &ThreadEvent, seq: u64, before: &Entry) -> Outcome {
    let same = match (event, &before.body) {
        (ThreadEvent::Message(new), Body::Received(old)) => new.content == old.content,
        _ => true,
    };
    if command.actor.kind == ActorType::Contact && !same {
        let detail = json!({"detail": "this client_id was used for another message"});
        return Err(CommandError::with(ErrorCode::Conflict, detail));
    }
    Ok(Decision::reply(Reply::Sent(SendReply { seq, at: before.at, duplicate: true })))
}

fn sender(opening: &Opening) -> String {
    let Contact { address, user_id, .. } = &opening.contact;
    if address.is_empty() { user_id.clone().unwrap_or_default() } else { address.clone() }
}

/// The first item opens the conversation; a customer's message after resolve opens the next episode, one on a
/// snoozed or pending thread brings it back.
fn open(state: &State, command: &Command, opening: &Opening, event: &ThreadEvent, draft: &mut Draft<'_>) {
    let by_customer = matches!(event, ThreadEvent::Message(_));
    let cause = match event {
        ThreadEvent::Echo { .. } => Cause::BusinessMessage,
        _ => Cause::CustomerMessage,
    };
    let opens = state.home.is_none() || (by_customer && state.status == Status::Resolved);
    if opens {
        let (thread, contact) = match &state.home {
            Some(home) => (home.thread.clone(), home.contact.clone()),
            None => (opening.thread.clone(), opening.contact.clone()),
        };
        let scope = &command.scope;
        draft.add_by(
            Actor::system(),
            Body::Opened(Opened {
                episode: state.episode + 1,
                cause,
                tenant: scope.tenant.clone(),
                account: scope.account.clone(),
                inbox: scope.inbox.clone(),
                contact,
                thread,
            }),
        );
    } else if by_customer && matches!(state.status, Status::Snoozed | Status::Pending) {
        draft.add_by(
            Actor::system(),
            Body::Reopened { episode: state.episode, cause: Cause::CustomerMessage },
        );
    }
}

/// The contact with what the item says is new; what it does not say stays.
fn changed_contact(state: &State, opening: &Opening) -> Contact {
    let mut contact = state.home.as_ref().map_or_else(Contact::default, |h| h.contact.clone());
    let new = &opening.contact;
    for (field, value) in [(&mut contact.address, &new.address), (&mut contact.name, &new.name)] {
        if !value.is_empty() {
            field.clone_from(value);
        }
    }
    contact.user_id = new.user_id.clone().or(contact.user_id);
    contact.username = new.username.clone().or(contact.username);
    contact
}

/// The contact gave itself a name or an id that we did not know.
fn refresh_contact(state: &State, opening: &Opening, provider_id: &str, draft: &mut Draft<'_>) {
    let Some(home) = &state.home else { return };
    let mut contact = home.contact.clone();
    let new = &opening.contact;
    if !new.name.is_empty() {
        contact.name.clone_from(&new.name);
    }
    if contact.address.is_empty() {
        contact.address.clone_from(&new.address);
    }
    contact.user_id = new.user_id.clone().or(contact.user_id);
    contact.username = new.username.clone().or(contact.username);
    if contact != home.contact {
        draft.add_by(
            Actor::new(ActorType::Provider, "profile"),
            Body::ContactUpdated { contact, provider_id: Some(provider_id.to_owned()) },
        );
    }
}

fn target(state: &State, provider_id: &str, found: &Known) -> Target {
    let by_item = found.id(ids::provider(provider_id)).map(|(seq, _)| seq);
    let by_receipt = || {
        let (seq, entry) = found.get(ids::message(state.id, provider_id))?;
        Some(if let Body::Status(s) = &entry.body { s.message_seq } else { seq })
    };
    Target { seq: by_item.or_else(by_receipt), provider_id: provider_id.to_owned() }
}

fn received(state: &State, m: &InboundMessage, found: &Known) -> Body {
    Body::Received(Received {
        provider_id: m.provider_id.clone(),
        content: m.content.clone(),
        sent_at: m.sent_at,
        reply_to: m.reply_to.as_deref().map(|t| target(state, t, found)),
        referral: m.referral.clone(),
        forwarded: m.forwarded,
        participant: m.participant.clone(),
        errors: m.errors.clone(),
    })
}
