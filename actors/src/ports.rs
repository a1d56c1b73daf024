//! What actors need of the world, as traits that the composition root fills.

use async_trait::async_trait;
use bytes::Bytes;
use patchbay_protocol::ids::{AgentId, ConversationId, InboxId, TenantId};
use patchbay_protocol::outbound::{Call, CallResult};

use crate::directory::Account;

/// Where confirmed things are shown: the node's hub.
pub trait Publisher: Send + Sync + 'static {
    /// Confirmed entries of a conversation, ascending: (seq, entry as JSON).
    fn entries(&self, conversation: ConversationId, entries: &[(u64, Bytes)]);

    /// A summary changed, as JSON.
    fn inbox(&self, tenant: &TenantId, inbox: &InboxId, publication: Bytes);

    /// Something for an agent, as JSON.
    fn agent(&self, tenant: &TenantId, agent: &AgentId, publication: Bytes);
}

/// The guarded HTTP client.
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    /// Makes a call for an account. Never fails: what is not an answer says whether it can have been seen.
    async fn call(&self, account: &Account, call: Call) -> CallResult;
}
