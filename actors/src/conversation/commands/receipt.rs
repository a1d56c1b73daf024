//! Receipts only climb (G6), by the entry that they name or by the provider's id; and the Account's word on a send.

use patchbay_protocol::command::{Command, Reply};
use patchbay_protocol::entry::{Actor, ActorType, Body, Entry, StatusChanged};
use patchbay_protocol::inbound::StatusUpdate;
use patchbay_protocol::receipt::MessageStatus;

use super::{Draft, Known, Outcome};
use crate::conversation::ids;
use crate::conversation::state::State;
use crate::shard::entity::{Decision, Lookup, Now};

pub(super) fn lookups(
    state: &State,
    found: &Known,
    named: Option<u64>,
    update: &StatusUpdate,
) -> Vec<Lookup> {
    let by_id = update.provider_id.as_deref().map(|id| ids::message(state.id, id));
    let mut wanted: Vec<Lookup> = if named.is_none() { by_id.into_iter().collect() } else { Vec::new() };
    if let Some(seq) = message_seq(state, found, named, update) {
        wanted.push(Lookup::Seq(seq));
        if state.status_of(seq).is_none() {
            wanted.extend([Lookup::Id(ids::status(seq, None)), Lookup::Seq(seq.saturating_add(1))]);
        }
        if let Some(p) = &update.participant {
            wanted.push(Lookup::Id(ids::status(seq, Some(p))));
        }
    }
    wanted
}

fn message_seq(state: &State, found: &Known, named: Option<u64>, update: &StatusUpdate) -> Option<u64> {
    named.or_else(|| {
        let (seq, entry) = found.get(ids::message(state.id, update.provider_id.as_deref()?))?;
        Some(if let Body::Status(s) = &entry.body { s.message_seq } else { seq })
    })
}

/// Whether an entry is a message or reaction of the business.
fn went_out(found: &Known, seq: u64) -> bool {
    let body = found.seq(seq).map(|e| &e.body);
    matches!(body, Some(Body::Sent(_) | Body::Reacted { provider_id: None, .. }))
}

/// The last word on a message's status: by its id, or the first one, which stands right behind what we carry ourselves.
pub(super) fn last_word(found: &Known, seq: u64) -> Option<(u64, &Entry)> {
    found.id(ids::status(seq, None)).or_else(|| {
        let (at, entry) = found.get(Lookup::Seq(seq.saturating_add(1)))?;
        matches!(&entry.body, Body::Status(s) if s.message_seq == seq && s.participant.is_none())
            .then_some((at, entry))
    })
}

fn status_in(entry: Option<(u64, &Entry)>) -> Option<MessageStatus> {
    match entry.map(|(_, e)| &e.body) {
        Some(Body::Status(s)) => Some(s.status),
        _ => None,
    }
}

/// A receipt of the provider. `Unmatched` when its message is not known here (yet).
pub(super) fn receipt(
    state: &State,
    found: &Known,
    command: &Command,
    named: Option<u64>,
    update: &StatusUpdate,
    now: &Now,
) -> Outcome {
    let message = message_seq(state, found, named, update).filter(|seq| *seq <= state.last_seq);
    match message {
        Some(seq) if went_out(found, seq) => {
            climb(state, found, command, seq, update, Actor::new(ActorType::Provider, "receipt"), now)
        }
        _ => Ok(Decision::reply(Reply::Unmatched)),
    }
}

/// The Account's word. What adds nothing is answered all the same, so that the Account can settle the send.
pub(super) fn outcome(
    state: &State,
    found: &Known,
    command: &Command,
    seq: u64,
    update: &StatusUpdate,
    now: &Now,
) -> Outcome {
    if !went_out(found, seq) {
        return Ok(Decision::reply(Reply::Taken));
    }
    let actor =
        if update.provider_id.is_some() { Actor::new(ActorType::Provider, "api") } else { Actor::system() };
    climb(state, found, command, seq, update, actor, now)
}

fn climb(
    state: &State,
    found: &Known,
    command: &Command,
    seq: u64,
    update: &StatusUpdate,
    actor: Actor,
    now: &Now,
) -> Outcome {
    let message = state.status_of(seq).or_else(|| status_in(last_word(found, seq))).unwrap_or_default();
    let participant = update.participant.as_deref();
    let known = match participant {
        // In a group each participant climbs for itself; its last word is found by its own id.
        Some(p) => status_in(found.id(ids::status(seq, Some(p)))).unwrap_or_default(),
        None => message,
    };
    let Some(status) = known.climb(update.status) else { return Ok(Decision::reply(Reply::Taken)) };
    let mut draft = Draft::new(command, now);
    draft.add_by(
        actor,
        Body::Status(StatusChanged {
            message_seq: seq,
            status,
            provider_id: update.provider_id.clone(),
            provider_at: update.provider_at,
            pricing: update.pricing.clone(),
            participant: update.participant.clone(),
            error: update.error.clone(),
        }),
    );
    Ok(Decision::entries(draft.entries, Reply::Taken))
}
