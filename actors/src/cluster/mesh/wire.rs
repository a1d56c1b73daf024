//! Commands and their answers as they travel between nodes.

use bytes::Bytes;
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, InboxId, TenantId};
use patchbay_protocol::{CommandError, ErrorCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::oneshot;

use super::proto::{Answer, Kind, Request, answer};
use crate::cluster::switch::{Parcel, ReplyTo};

/// An error as it travels. A code that a later version has is told as `internal`.
#[derive(Serialize, Deserialize)]
struct Refusal {
    code: u32,
    #[serde(default)]
    detail: Option<Value>,
}

/// Whom to answer, by what was asked.
#[derive(Debug)]
pub(super) enum Waits {
    Conversation(ReplyTo<patchbay_protocol::command::Reply>),
    Account(ReplyTo<crate::account::AccountReply>),
    Agent(ReplyTo<crate::agent::AgentReply>),
    Inbox(ReplyTo<crate::inbox::InboxReply>),
}

fn json(value: &impl Serialize) -> Bytes {
    // These are maps with text keys and values that can be written: it cannot fail.
    serde_json::to_vec(value).map(Bytes::from).unwrap_or_default()
}

/// A command as it travels, and who waits for its answer.
pub(super) fn encode(id: u64, parcel: Parcel) -> (Request, Waits) {
    let request =
        |kind: Kind, entity: Bytes, command: Bytes| Request { id, kind: kind.into(), entity, command };
    match parcel {
        Parcel::Conversation(of, command, reply) => {
            (request(Kind::Conversation, json(&of), json(&command)), Waits::Conversation(reply))
        }
        Parcel::Account(tenant, account, command, reply) => {
            (request(Kind::Account, json(&(tenant, account)), json(&command)), Waits::Account(reply))
        }
        Parcel::Agent(tenant, agent, command, reply) => {
            (request(Kind::Agent, json(&(tenant, agent)), json(&command)), Waits::Agent(reply))
        }
        Parcel::Inbox(tenant, inbox, command, reply) => {
            (request(Kind::Inbox, json(&(tenant, inbox)), json(&command)), Waits::Inbox(reply))
        }
    }
}

/// Something that cannot be read: of a later version, or broken.
pub(super) struct Unreadable;

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    serde_json::from_slice(bytes).map_err(|error| {
        tracing::warn!(%error, "what another node says cannot be read");
        Unreadable
    })
}

/// The command again, for whoever waits.
pub(super) fn decode(request: &Request, waits: Waits) -> Result<Parcel, (Unreadable, Waits)> {
    let read = || -> Result<_, Unreadable> {
        Ok(match &waits {
            Waits::Conversation(_) => {
                Read::Conversation(read::<ConversationId>(&request.entity)?, read(&request.command)?)
            }
            Waits::Account(_) => {
                let (tenant, account): (TenantId, AccountId) = read(&request.entity)?;
                Read::Account(tenant, account, read(&request.command)?)
            }
            Waits::Agent(_) => {
                let (tenant, agent): (TenantId, AgentId) = read(&request.entity)?;
                Read::Agent(tenant, agent, read(&request.command)?)
            }
            Waits::Inbox(_) => {
                let (tenant, inbox): (TenantId, InboxId) = read(&request.entity)?;
                Read::Inbox(tenant, inbox, read(&request.command)?)
            }
        })
    };
    match (read(), waits) {
        (Ok(Read::Conversation(id, command)), Waits::Conversation(reply)) => {
            Ok(Parcel::Conversation(id, command, reply))
        }
        (Ok(Read::Account(tenant, account, command)), Waits::Account(reply)) => {
            Ok(Parcel::Account(tenant, account, command, reply))
        }
        (Ok(Read::Agent(tenant, agent, command)), Waits::Agent(reply)) => {
            Ok(Parcel::Agent(tenant, agent, command, reply))
        }
        (Ok(Read::Inbox(tenant, inbox, command)), Waits::Inbox(reply)) => {
            Ok(Parcel::Inbox(tenant, inbox, command, reply))
        }
        (Ok(_), waits) | (Err(Unreadable), waits) => Err((Unreadable, waits)),
    }
}

enum Read {
    Conversation(ConversationId, Box<patchbay_protocol::command::Command>),
    Account(TenantId, AccountId, Box<crate::account::AccountCommand>),
    Agent(TenantId, AgentId, Box<crate::agent::AgentCommand>),
    Inbox(TenantId, InboxId, Box<crate::inbox::InboxCommand>),
}

/// Who waits, where a command arrives; and what is sent back when they are answered.
pub(super) fn receive(kind: Kind) -> Option<(Waits, Answering)> {
    fn pair<T>() -> (ReplyTo<T>, oneshot::Receiver<Result<T, CommandError>>) {
        oneshot::channel()
    }
    Some(match kind {
        Kind::Unspecified => return None,
        Kind::Conversation => {
            let (waits, answer) = pair();
            (Waits::Conversation(waits), Answering::Conversation(answer))
        }
        Kind::Account => {
            let (waits, answer) = pair();
            (Waits::Account(waits), Answering::Account(answer))
        }
        Kind::Agent => {
            let (waits, answer) = pair();
            (Waits::Agent(waits), Answering::Agent(answer))
        }
        Kind::Inbox => {
            let (waits, answer) = pair();
            (Waits::Inbox(waits), Answering::Inbox(answer))
        }
    })
}

/// An answer that will come.
pub(super) enum Answering {
    Conversation(oneshot::Receiver<Result<patchbay_protocol::command::Reply, CommandError>>),
    Account(oneshot::Receiver<Result<crate::account::AccountReply, CommandError>>),
    Agent(oneshot::Receiver<Result<crate::agent::AgentReply, CommandError>>),
    Inbox(oneshot::Receiver<Result<crate::inbox::InboxReply, CommandError>>),
}

async fn outcome<T: Serialize>(answer: oneshot::Receiver<Result<T, CommandError>>) -> answer::Outcome {
    match answer.await {
        Ok(Ok(reply)) => answer::Outcome::Done(json(&reply)),
        Ok(Err(error)) => answer::Outcome::Refused(refusal(&error)),
        // Its actor was lost: nobody knows.
        Err(_) => answer::Outcome::Refused(refusal(&CommandError::unavailable())),
    }
}

impl Answering {
    pub(super) async fn wait(self) -> answer::Outcome {
        match self {
            Self::Conversation(answer) => outcome(answer).await,
            Self::Account(answer) => outcome(answer).await,
            Self::Agent(answer) => outcome(answer).await,
            Self::Inbox(answer) => outcome(answer).await,
        }
    }
}

pub(super) fn refusal(error: &CommandError) -> Bytes {
    json(&Refusal { code: error.code.code(), detail: error.detail.clone() })
}

fn refused(bytes: &[u8]) -> CommandError {
    let Ok(refusal) = read::<Refusal>(bytes) else { return CommandError::unavailable() };
    let code = ErrorCode::ALL.iter().copied().find(|c| c.code() == refusal.code);
    CommandError { code: code.unwrap_or(ErrorCode::Internal), detail: refusal.detail }
}

impl Waits {
    /// Tells who waits. Whoever has stopped waiting repeats with the same ids.
    pub(super) fn answer(self, outcome: answer::Outcome) {
        fn tell<T: DeserializeOwned>(reply: ReplyTo<T>, outcome: answer::Outcome) {
            let told = match outcome {
                answer::Outcome::Done(bytes) => {
                    read(&bytes).map_err(|Unreadable| CommandError::unavailable())
                }
                answer::Outcome::Refused(bytes) => Err(refused(&bytes)),
                answer::Outcome::NotOwner(_) => Err(CommandError::unavailable()),
            };
            let _ = reply.send(told);
        }
        match self {
            Self::Conversation(reply) => tell(reply, outcome),
            Self::Account(reply) => tell(reply, outcome),
            Self::Agent(reply) => tell(reply, outcome),
            Self::Inbox(reply) => tell(reply, outcome),
        }
    }

    /// Tells who waits that nobody knows.
    pub(super) fn lose(self) {
        self.answer(answer::Outcome::Refused(refusal(&CommandError::unavailable())));
    }
}

/// An answer as it travels.
pub(super) fn answered(id: u64, outcome: answer::Outcome) -> Answer {
    Answer { id, outcome: Some(outcome) }
}
