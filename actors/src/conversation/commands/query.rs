//! `conversation.get` and the tip: what is confirmed, nothing written.

use patchbay_protocol::ErrorCode;
use patchbay_protocol::command::{Command, Reply, Tip};
use patchbay_protocol::event::Origin;

use super::Outcome;
use crate::conversation::state::State;
use crate::conversation::{Conversation, Effect};
use crate::shard::entity::{Decision, Now};

pub(super) fn get(state: &State, command: &Command, now: &Now) -> Outcome {
    let summary = state
        .summary(command.scope.inbox.clone(), command.scope.channel.window, now.at)
        .ok_or(ErrorCode::NotFound)?;
    Ok(Decision::reply(Reply::Summary(Box::new(summary))))
}

pub(super) fn tip(state: &State, _: &Command) -> Outcome {
    let account = state.home.as_ref().map(|h| h.account.clone());
    Ok(Decision::reply(Reply::Tip(Tip { seq: state.last_seq, account })))
}

/// Where it is at home, as the node itself asks.
pub(super) fn home(state: &State) -> Outcome {
    let home = state.home.as_ref().map(|h| {
        let (tenant, account) = (h.tenant.clone(), h.account.clone());
        (Origin { tenant, account, conversation: state.id }, h.inbox.clone(), state.last_seq)
    });
    Ok(Decision::reply(Reply::Home(home)))
}

/// `typing.set`: shown to the customer, where they have written.
pub(super) fn typing(state: &State) -> Outcome {
    let mut decision = Decision::reply(Reply::Taken);
    let last = state.last_inbound.as_ref();
    decision.effects.extend(last.map(|(_, provider_id)| Effect::Typing { provider_id: provider_id.clone() }));
    Ok(decision)
}

/// The answer about a conversation that does not exist, or not for this tenant.
pub(super) fn nothing() -> Decision<Conversation> {
    Decision::reply(Reply::Tip(Tip { seq: 0, account: None }))
}
