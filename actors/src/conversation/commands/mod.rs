//! One file per command: decide and its tests together. The dispatcher is a plain match.

mod annotate;
mod assign;
mod link;
mod media;
mod message;
mod query;
mod read;
mod receipt;
mod receive;
mod send;
mod snooze;
mod status;
mod tag;

use patchbay_protocol::command::{Command, Reply, Request, Scope, StateReply};
use patchbay_protocol::entry::{Actor, ActorType, Body, Entry};
use patchbay_protocol::ids::TenantId;
use patchbay_protocol::{CommandError, ErrorCode};

use super::entity::Conversation;
use super::state::State;
use crate::shard::entity::{Decision, Found, Lookup, Now};

pub use send::window_closed;

pub(crate) type Known = Found<Entry>;
pub(crate) type Outcome = Result<Decision<Conversation>, CommandError>;

/// Makes the entries of one decision, with their seqs.
pub(crate) struct Draft<'a> {
    now: &'a Now,
    command: &'a Command,
    entries: Vec<Entry>,
}

impl<'a> Draft<'a> {
    fn new(command: &'a Command, now: &'a Now) -> Self {
        Self { now, command, entries: Vec::new() }
    }

    /// Adds an entry of the command's actor; returns its seq.
    fn add(&mut self, body: Body) -> u64 {
        self.add_by(self.command.actor.clone(), body)
    }

    fn add_by(&mut self, actor: Actor, body: Body) -> u64 {
        let seq = self.now.next_seq + self.entries.len() as u64;
        self.entries.push(Entry {
            seq,
            at: self.now.at,
            body,
            actor,
            caused_by: self.command.caused_by.clone(),
        });
        seq
    }

    /// Ends with the tip after the command.
    fn state_reply(self, state: &State) -> Outcome {
        let reply = match self.entries.last() {
            Some(last) => StateReply { seq: last.seq, at: last.at },
            None => StateReply { seq: state.last_seq, at: state.updated_at },
        };
        Ok(Decision::entries(self.entries, Reply::State(reply)))
    }
}

/// What a command needs of the past.
pub(crate) fn lookups(state: &State, found: &Known, command: &Command) -> Vec<Lookup> {
    match &command.request {
        Request::Send { message, .. } => send::lookups(command, message),
        Request::Note(note) => annotate::lookups(command, note),
        Request::Receive { event, .. } => receive::lookups(state, event),
        Request::Receipt { message_seq, update } => receipt::lookups(state, found, *message_seq, update),
        Request::Outcome { message_seq, update } => {
            receipt::lookups(state, found, Some(*message_seq), update)
        }
        Request::Edit(r) => vec![Lookup::Seq(r.message_seq)],
        Request::Delete(r) => vec![Lookup::Seq(r.message_seq)],
        Request::React(r) => message::lookups(r.message_seq),
        Request::Read(_)
        | Request::ContactRead(_)
        | Request::MediaFetched { .. }
        | Request::Assign(_)
        | Request::Resolve
        | Request::Reopen
        | Request::Pending
        | Request::Snooze(_)
        | Request::Tag(_)
        | Request::Link { .. }
        | Request::Typing
        | Request::TimerDue
        | Request::Get
        | Request::Tip
        | Request::Home => vec![],
    }
}

/// Whether nothing but its id tells a command's repeat from another one like it; of its entries see [`super::done`].
fn is_known_by_command(request: &Request) -> bool {
    matches!(
        request,
        Request::Edit(_)
            | Request::Delete(_)
            | Request::React(_)
            | Request::Read(_)
            | Request::ContactRead(_)
            | Request::Assign(_)
            | Request::Resolve
            | Request::Reopen
            | Request::Pending
            | Request::Snooze(_)
            | Request::Tag(_)
    )
}

/// What a command does.
pub(crate) fn decide(state: &State, found: &Known, command: &Command, now: &Now) -> Outcome {
    if let Some(answer) = outside(state, command) {
        return answer;
    }
    if is_known_by_command(&command.request) {
        if let Some(reply) = state.done.answer(command.id) {
            return Ok(Decision::reply(Reply::State(reply)));
        }
        if state.done.is_full(now.at) {
            return Err(CommandError::overloaded(1000));
        }
    }
    match &command.request {
        Request::Send { message, lane, opening } => {
            send::decide(state, found, command, message, *lane, opening.as_ref(), now)
        }
        Request::Edit(r) => message::edit(state, found, command, r, now),
        Request::Delete(r) => message::delete(state, found, command, r, now),
        Request::React(r) => message::react(state, found, command, r, now),
        Request::Read(r) => read::decide(state, command, r, now),
        Request::ContactRead(r) => read::by_contact(state, command, r, now),
        Request::MediaFetched { message_seq, outcome } => {
            media::fetched(state, command, *message_seq, outcome, now)
        }
        Request::Assign(r) => assign::decide(state, command, r, now),
        Request::Resolve => status::resolve(state, command, now),
        Request::Reopen => status::reopen(state, command, now),
        Request::Pending => status::pending(state, command, now),
        Request::Snooze(r) => snooze::decide(state, command, r, now),
        Request::Tag(r) => tag::decide(state, command, r, now),
        Request::Note(note) => annotate::decide(state, found, command, note, now),
        Request::Receive { opening, event } => receive::decide(state, found, command, opening, event, now),
        Request::Receipt { message_seq, update } => {
            receipt::receipt(state, found, command, *message_seq, update, now)
        }
        Request::Outcome { message_seq, update } => {
            receipt::outcome(state, found, command, *message_seq, update, now)
        }
        Request::Link { other } => link::decide(state, command, *other, now),
        Request::Typing => query::typing(state),
        Request::TimerDue => snooze::due(state, command, now).map(|d| media::due(state, d)),
        Request::Get => query::get(state, command, now),
        Request::Tip => query::tip(state, command),
        Request::Home => query::home(state),
    }
}

/// A conversation refuses a command whose tenant and account are not its own as if it did not exist. One without
/// entries exists only for commands that may open it.
fn outside(state: &State, command: &Command) -> Option<Outcome> {
    let opens = matches!(&command.request, Request::Receive { .. } | Request::Send { opening: Some(_), .. });
    let at_home = match &state.home {
        None => opens,
        Some(home) => is_home(home, command),
    };
    if at_home {
        return None;
    }
    Some(match &command.request {
        Request::Tip => Ok(query::nothing()),
        Request::TimerDue => Ok(Decision::reply(Reply::Taken)),
        Request::Home => query::home(state),
        Request::Receipt { .. } => Ok(Decision::reply(Reply::Unmatched)),
        _ => Err(ErrorCode::NotFound.into()),
    })
}

/// Questions and timers come by the id alone: the tenant decides; everything else names the account as well.
fn is_home(home: &super::state::Home, command: &Command) -> bool {
    let Scope { tenant, account, .. } = &command.scope;
    match &command.request {
        Request::TimerDue | Request::MediaFetched { .. } | Request::Home => true,
        // Patchbay itself asks on nobody's behalf.
        Request::Tip => home.tenant == *tenant || *tenant == TenantId::nobody(),
        _ => home.tenant == *tenant && home.account == *account,
    }
}

/// Refuses automation that answers itself.
pub(crate) fn check_depth(command: &Command) -> Result<(), CommandError> {
    const DEPTH_MAX: u8 = 8;
    match &command.caused_by {
        Some(cause) if cause.depth > DEPTH_MAX => {
            Err(CommandError::invalid(format!("caused_by.depth is over {DEPTH_MAX}")))
        }
        None if command.actor.kind == ActorType::Automation => {
            Err(CommandError::invalid("an automation must say caused_by"))
        }
        _ => Ok(()),
    }
}
