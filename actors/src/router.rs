//! The one way to an entity. Nothing above it knows where an actor lives; a cluster implements it over its mesh.

use patchbay_protocol::CommandError;
use patchbay_protocol::command::{Channel, Command, Reply, Request, Scope};
use patchbay_protocol::entry::Actor;
use patchbay_protocol::ids::{AccountId, AgentId, CommandId, ConversationId, InboxId, TenantId};

use crate::account::{AccountCommand, AccountReply};
use crate::agent::{AgentCommand, AgentReply};
use crate::inbox::{InboxCommand, InboxReply};
pub use crate::shard::reply::Answer;

/// Hands commands to entities. Every method returns at once: commands that one caller hands to one entity take
/// effect in that order; the answer comes when everything that it speaks of is durable.
pub trait Router: Send + Sync + 'static {
    /// To a conversation.
    fn conversation(&self, id: ConversationId, command: Command) -> Result<Answer<Reply>, CommandError>;

    /// To a channel account.
    fn account(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        command: AccountCommand,
    ) -> Result<Answer<AccountReply>, CommandError>;

    /// To an agent.
    fn agent(
        &self,
        tenant: &TenantId,
        agent: &AgentId,
        command: AgentCommand,
    ) -> Result<Answer<AgentReply>, CommandError>;

    /// To an inbox.
    fn inbox(
        &self,
        tenant: &TenantId,
        inbox: &InboxId,
        command: InboxCommand,
    ) -> Result<Answer<InboxReply>, CommandError>;

    /// Whether the account has as much to send as it may hold, so that new sends are refused.
    fn is_full(&self, tenant: &TenantId, account: &AccountId) -> bool;
}

/// A fresh command id.
pub fn command_id() -> CommandId {
    CommandId(rand::random())
}

/// A command that Patchbay gives itself, to an entity that knows where it belongs.
pub fn system_command(request: Request) -> Command {
    let scope = Scope {
        tenant: TenantId::nobody(),
        account: AccountId::nobody(),
        inbox: InboxId::nobody(),
        channel: no_channel(),
    };
    Command { id: command_id(), scope, actor: Actor::system(), caused_by: None, request }
}

/// Of an account that is no more.
pub(crate) fn no_channel() -> Channel {
    Channel { window: None, can_edit: false, can_delete: false, can_react: false, direct: false }
}
