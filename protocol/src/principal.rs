//! Who is asking: the outcome of authentication, as every door hands it on.

use crate::ids::{AccountId, AgentId, ConversationId, InboxId, TenantId};

/// What a token's `role` claim may say (contract §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sees its inboxes, assigns itself or nobody.
    Agent,
    /// Sees its inboxes, assigns anyone.
    Supervisor,
    /// Sees every inbox of the tenant.
    Admin,
    /// A customer on a web chat: sees its own conversation.
    Contact,
    /// Runs the cluster; has no tenant.
    Operator,
}

impl Role {
    /// The role's name, as in a token.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Supervisor => "supervisor",
            Self::Admin => "admin",
            Self::Contact => "contact",
            Self::Operator => "operator",
        }
    }
}

/// Who is behind an API key or a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// The operator key or an operator token.
    Operator,
    /// A tenant's API key.
    Tenant(TenantId),
    /// A tenant's API key that may only read.
    Reader(TenantId),
    /// An agent, supervisor or admin on a socket.
    Agent(AgentPrincipal),
    /// A visitor of a web chat.
    Contact(ContactPrincipal),
}

/// A visitor of a web chat: it has one conversation, its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContactPrincipal {
    /// The tenant.
    pub tenant: TenantId,
    /// The web chat's account.
    pub account: AccountId,
    /// The token's `sub`: also the thread key.
    pub visitor: String,
    /// How agents see the visitor.
    pub name: Option<String>,
}

impl ContactPrincipal {
    /// The visitor's own conversation.
    pub fn conversation(&self) -> ConversationId {
        ConversationId::derive(&self.tenant, &self.account, &self.visitor)
    }
}

/// An agent with what it may do now. The agent's document decides the inboxes; a token's role can only lower them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentPrincipal {
    /// The tenant.
    pub tenant: TenantId,
    /// The token's `sub`.
    pub agent: AgentId,
    /// The display name from the agent's document.
    pub name: String,
    /// The lower of the token's and the document's role.
    pub role: Role,
    /// The document's inboxes; not looked at for [`Role::Admin`].
    pub inboxes: Vec<InboxId>,
}

impl AgentPrincipal {
    /// Whether it may see and work on conversations of `inbox`.
    pub fn may_see(&self, inbox: &InboxId) -> bool {
        match self.role {
            Role::Admin => true,
            Role::Agent | Role::Supervisor => self.inboxes.contains(inbox),
            Role::Contact | Role::Operator => false,
        }
    }

    /// Whether it may hand a conversation to `to` (nobody when `None`).
    pub fn may_assign(&self, to: Option<&AgentId>) -> bool {
        match self.role {
            Role::Admin | Role::Supervisor => true,
            Role::Agent => to.is_none_or(|a| *a == self.agent),
            Role::Contact | Role::Operator => false,
        }
    }
}
