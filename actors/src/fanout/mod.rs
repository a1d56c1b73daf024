//! Fan-out across nodes: what the owner of a topic publishes reaches every node where somebody waits for it, once,
//! however many sockets wait there.
//!
//! The owner of a topic's shard knows which nodes are interested ([`Interest`]); a node knows what its own sockets wait
//! for, and sees to it that the owner knows ([`Watches`]). What is lost on the way is never silent: a node that registers
//! anew, wherever and why ever, is told how far the topic reaches, and its sockets read what they miss from the log.

mod interest;
mod watches;

use std::sync::Arc;

use bytes::Bytes;
use patchbay_protocol::ids::{AgentId, ConversationId, EntityId, InboxId, TenantId};

pub use interest::{Interest, Outlet, Watched};
pub use watches::{Far, Home, LOST_AFTER, RENEW_EVERY, Watches};

use crate::agent::Presence;
use crate::ports::Publisher;

/// What connections subscribe to. Its channel name is within the tenant.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Topic {
    /// A conversation's log.
    Conversation(ConversationId),
    /// An inbox's changes.
    Inbox(TenantId, InboxId),
    /// What is for an agent alone.
    Agent(TenantId, AgentId),
    /// The cluster itself, for operators.
    Cluster,
}

impl Topic {
    /// The channel's name, as clients write it.
    pub fn channel(&self) -> String {
        match self {
            Self::Conversation(id) => format!("conversation:{id}"),
            Self::Inbox(_, id) => format!("inbox:{id}"),
            Self::Agent(_, id) => format!("agent:{id}"),
            Self::Cluster => "cluster".to_owned(),
        }
    }

    /// The shard, out of `count`, whose owner publishes it: its entity's, and the first for the cluster.
    pub fn shard(&self, count: u32) -> u32 {
        let entity = match self {
            Self::Conversation(id) => EntityId::Conversation(*id),
            Self::Inbox(tenant, inbox) => EntityId::Inbox(tenant.clone(), inbox.clone()),
            Self::Agent(tenant, agent) => EntityId::Agent(tenant.clone(), agent.clone()),
            Self::Cluster => return 0,
        };
        entity.shard(count)
    }
}

/// Something beside the order of a topic, that does not matter for long: typing, somebody's coming or going. It is lost
/// where there is no room for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aside {
    /// What it is, to whoever shows it.
    pub kind: String,
    /// Of two with the same key the later one counts.
    pub key: String,
    /// What is shown.
    pub data: Bytes,
}

/// Shows what happens here to this node's sockets and to interested nodes.
pub(crate) struct Fanout {
    pub(crate) here: Arc<dyn Publisher>,
    pub(crate) interest: Arc<Interest>,
}

impl Publisher for Fanout {
    fn entries(&self, conversation: ConversationId, entries: &[(u64, Bytes)]) {
        self.here.entries(conversation, entries);
        self.interest.entries(&Topic::Conversation(conversation), entries);
    }

    fn inbox(&self, tenant: &TenantId, inbox: &InboxId, publication: Bytes) {
        self.here.inbox(tenant, inbox, publication.clone());
        if self.interest.is_any() {
            self.interest.loose(&Topic::Inbox(tenant.clone(), inbox.clone()), &publication);
        }
    }

    fn agent(&self, tenant: &TenantId, agent: &AgentId, publication: Bytes) {
        self.here.agent(tenant, agent, publication.clone());
        if self.interest.is_any() {
            self.interest.loose(&Topic::Agent(tenant.clone(), agent.clone()), &publication);
        }
    }

    fn cluster(&self, publication: Bytes) {
        self.here.cluster(publication.clone());
        self.interest.loose(&Topic::Cluster, &publication);
    }

    fn presence(&self, tenant: &TenantId, agent: &AgentId, state: Presence) {
        self.here.presence(tenant, agent, state);
    }
}
