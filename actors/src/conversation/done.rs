//! Commands that were done not long ago. One that comes again, because nobody heard its answer, is answered and not
//! done: what has an id of its sender's, or of the provider's, is known by that for ever ([`super::ids`]); everything
//! else by the id that it was given at the door.

use std::collections::VecDeque;
use std::time::Duration;

use patchbay_protocol::command::StateReply;
use patchbay_protocol::entry::{Body, Entry};
use patchbay_protocol::ids::CommandId;
use patchbay_protocol::timestamp::Timestamp;
use serde::{Deserialize, Serialize};

/// Twice as long as a command may be on its way.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// The newest stay however old they look: clocks of two owners may be days apart.
const KEPT_MIN: usize = 16;
/// Commands of a minute that are kept; past it more are refused until the oldest has gone.
pub const DONE_MAX: usize = 1024;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct One {
    id: CommandId,
    /// Its last entry.
    seq: u64,
    at: Timestamp,
}

/// What was done, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Done {
    commands: VecDeque<One>,
}

impl Done {
    /// After one more entry.
    pub fn apply(&mut self, id: CommandId, entry: &Entry) {
        if !is_known_by_command(&entry.body) {
            return;
        }
        let one = One { id, seq: entry.seq, at: entry.at };
        match self.commands.back_mut() {
            Some(last) if last.id == id => *last = one,
            _ => self.commands.push_back(one),
        }
        while self.commands.len() > KEPT_MIN
            && self.commands.front().is_some_and(|one| is_over(one, entry.at))
            || self.commands.len() > DONE_MAX
        {
            self.commands.pop_front();
        }
    }

    /// The answer to a command that was done.
    pub fn answer(&self, id: CommandId) -> Option<StateReply> {
        let one = self.commands.iter().rev().find(|one| one.id == id)?;
        Some(StateReply { seq: one.seq, at: one.at })
    }

    /// Whether one more would push out one that may still come again.
    pub fn is_full(&self, now: Timestamp) -> bool {
        self.commands.len() >= DONE_MAX && self.commands.front().is_some_and(|one| !is_over(one, now))
    }
}

fn is_over(one: &One, now: Timestamp) -> bool {
    now.since(one.at) >= KEPT_FOR
}

/// Whether nothing but its command's id tells an entry's repeat from another one like it.
fn is_known_by_command(body: &Body) -> bool {
    match body {
        Body::Resolved { .. }
        | Body::Reopened { .. }
        | Body::Pending { .. }
        | Body::Snoozed { .. }
        | Body::Assigned { .. }
        | Body::Read { .. }
        | Body::TagAdded { .. }
        | Body::TagRemoved { .. } => true,
        Body::Edited { provider_id, .. }
        | Body::Deleted { provider_id, .. }
        | Body::Reacted { provider_id, .. } => provider_id.is_none(),
        Body::Opened(_)
        | Body::Linked { .. }
        | Body::Received(_)
        | Body::Sent(_)
        | Body::NoteAdded { .. }
        | Body::Status(_)
        | Body::ContactUpdated { .. }
        | Body::MediaStored { .. }
        | Body::MediaFailed { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use patchbay_protocol::entry::Actor;

    use super::*;

    fn id(n: u64) -> CommandId {
        CommandId(u128::from(n).to_be_bytes())
    }

    fn read(seq: u64, at: i64) -> Entry {
        let body = Body::Read { up_to_seq: seq };
        Entry { seq, at: Timestamp::from_seconds(at), actor: Actor::system(), caused_by: None, body }
    }

    #[test]
    fn a_repeat_is_answered_with_the_last_entry() {
        let mut done = Done::default();
        done.apply(id(1), &read(1, 0));
        done.apply(id(1), &read(2, 0));
        done.apply(id(2), &read(3, 1));
        assert_eq!(done.answer(id(1)).map(|reply| reply.seq), Some(2));
        assert_eq!(done.answer(id(2)).map(|reply| reply.seq), Some(3));
        assert_eq!(done.answer(id(3)), None);
    }

    #[test]
    fn the_old_go_but_for_the_newest() {
        let mut done = Done::default();
        (0..100).for_each(|n| done.apply(id(n), &read(n, 0)));
        done.apply(id(100), &read(100, 3600));
        assert_eq!(done.commands.len(), KEPT_MIN);
        assert!(done.answer(id(84)).is_none() && done.answer(id(85)).is_some());
    }

    #[test]
    fn it_is_full_until_the_oldest_is_over() {
        let mut done = Done::default();
        (0..DONE_MAX as u64).for_each(|n| done.apply(id(n), &read(n, 0)));
        assert!(done.is_full(Timestamp::from_seconds(59)));
        assert!(!done.is_full(Timestamp::from_seconds(60)));
        done.apply(id(5000), &read(5000, 1));
        assert_eq!(done.commands.len(), DONE_MAX);
    }
}
