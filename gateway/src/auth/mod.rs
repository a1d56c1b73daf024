//! Who is asking: tokens of sockets, keys of the API. Fail closed (G10).

pub mod keys;
pub mod token;

use std::sync::Arc;

use patchbay_actors::directory::Directory;
use patchbay_protocol::ids::{AccountId, AgentId, TenantId};
use patchbay_protocol::principal::{AgentPrincipal, ContactPrincipal, Role};
use patchbay_protocol::{CommandError, Timestamp};

pub use token::{Claims, TokenKeys};

/// Who is on a socket.
#[derive(Clone, Debug, PartialEq)]
pub enum Peer {
    /// An agent, supervisor or admin.
    Agent(AgentPrincipal),
    /// A visitor of a web chat.
    Contact(ContactPrincipal),
    /// Runs the cluster.
    Operator,
    /// A token without a role (Centrifugo's kind): live topics only.
    Plain(String),
}

impl Peer {
    /// Its tenant, where its permissions follow from a tenant's documents.
    pub fn tenant(&self) -> Option<&TenantId> {
        match self {
            Self::Agent(agent) => Some(&agent.tenant),
            Self::Contact(contact) => Some(&contact.tenant),
            Self::Operator | Self::Plain(_) => None,
        }
    }
}

/// Why a token does not open the door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Fetch a new one.
    Expired,
    /// Not valid here, and never will be.
    Invalid,
    /// It was revoked.
    Revoked,
    /// What it is for exists only in a later version.
    NotAvailable,
    /// The store did not answer: try again.
    Unavailable,
}

impl From<CommandError> for Refusal {
    fn from(_: CommandError) -> Self {
        Self::Unavailable
    }
}

/// The doorkeeper of sockets.
pub struct Auth {
    keys: TokenKeys,
    directory: Arc<Directory>,
}

/// The lower of two roles of an agent.
fn lower(a: Role, b: Role) -> Role {
    a.min(b)
}

impl Auth {
    /// With the keys of the configuration.
    pub fn new(keys: TokenKeys, directory: Arc<Directory>) -> Self {
        Self { keys, directory }
    }

    /// The keys.
    pub fn keys(&self) -> &TokenKeys {
        &self.keys
    }

    /// Verifies a token and finds who it stands for.
    pub async fn admit(&self, token: &str, now: Timestamp) -> Result<(Peer, Claims), Refusal> {
        let claims = self.keys.verify(token, now)?;
        let peer = self.peer(&claims).await?;
        Ok((peer, claims))
    }

    async fn contact(&self, claims: &Claims) -> Result<ContactPrincipal, Refusal> {
        let tenant: TenantId =
            claims.tenant.as_deref().unwrap_or("").parse().map_err(|_| Refusal::Invalid)?;
        let account: AccountId =
            claims.account.as_deref().unwrap_or("").parse().map_err(|_| Refusal::Invalid)?;
        let document = self.directory.account(&tenant, &account).await?.ok_or(Refusal::Invalid)?;
        let connector = patchbay_connectors::by_name(&document.connector).ok_or(Refusal::Invalid)?;
        if !connector.channel().direct {
            return Err(Refusal::Invalid);
        }
        let visitor = connector.recipient(&claims.sub).map_err(|_| Refusal::Invalid)?;
        Ok(ContactPrincipal { tenant, account, visitor, name: claims.name.clone() })
    }

    /// Who verified claims stand for, by the documents as they are now.
    pub async fn peer(&self, claims: &Claims) -> Result<Peer, Refusal> {
        match claims.role {
            None => Ok(Peer::Plain(claims.sub.clone())),
            Some(Role::Operator) => Ok(Peer::Operator),
            Some(Role::Contact) => self.contact(claims).await.map(Peer::Contact),
            Some(role @ (Role::Agent | Role::Supervisor | Role::Admin)) => {
                let tenant: TenantId =
                    claims.tenant.as_deref().unwrap_or("").parse().map_err(|_| Refusal::Invalid)?;
                let agent: AgentId = claims.sub.parse().map_err(|_| Refusal::Invalid)?;
                let document = self.directory.agent(&tenant, &agent).await?.ok_or(Refusal::Invalid)?;
                if document.not_before.is_some_and(|nb| Timestamp::from_seconds(claims.iat) < nb) {
                    return Err(Refusal::Revoked);
                }
                let role = lower(role, document.role);
                Ok(Peer::Agent(AgentPrincipal {
                    tenant,
                    agent,
                    name: document.name,
                    role,
                    inboxes: document.inboxes,
                }))
            }
        }
    }
}
