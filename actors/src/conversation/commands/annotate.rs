//! `note.add`: a note that the customer never sees.

use patchbay_protocol::command::{AddNote, Command, Reply, SendReply, TEXT_MAX, check_client_id};
use patchbay_protocol::entry::Body;
use patchbay_protocol::{CommandError, ErrorCode};
use serde_json::json;

use super::{Draft, Known, Outcome};
use crate::conversation::ids;
use crate::conversation::state::State;
use crate::shard::entity::{Decision, Lookup, Now};

pub(super) fn lookups(command: &Command, note: &AddNote) -> Vec<Lookup> {
    vec![Lookup::Id(ids::client(&command.actor, &note.client_id))]
}

pub(super) fn decide(_: &State, found: &Known, command: &Command, note: &AddNote, now: &Now) -> Outcome {
    check_client_id(&note.client_id)?;
    if note.text.is_empty() || note.text.len() > TEXT_MAX {
        return Err(CommandError::invalid(format!("text must have 1 to {TEXT_MAX} bytes")));
    }
    if let Some((seq, before)) = found.id(ids::client(&command.actor, &note.client_id)) {
        let same = matches!(&before.body, Body::NoteAdded { text, .. } if *text == note.text);
        if !same {
            return Err(CommandError::with(
                ErrorCode::Conflict,
                json!({"detail": "this client_id was used for something else"}),
            ));
        }
        return Ok(Decision::reply(Reply::Sent(SendReply { seq, at: before.at, duplicate: true })));
    }
    let mut draft = Draft::new(command, now);
    let seq = draft.add(Body::NoteAdded { client_id: note.client_id.clone(), text: note.text.clone() });
    Ok(Decision::entries(draft.entries, Reply::Sent(SendReply { seq, at: now.at, duplicate: false })))
}
