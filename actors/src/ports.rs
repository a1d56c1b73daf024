//! What actors need of the world, as traits that the composition root fills.

use async_trait::async_trait;
use bytes::Bytes;
use patchbay_protocol::content::Media;
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, InboxId, TenantId};
use patchbay_protocol::outbound::{Call, CallResult, Verdict};
use patchbay_protocol::{CommandError, ErrorCode};

use crate::agent::Presence;
use crate::directory::Account;
use crate::fanout::{Aside, Topic};

/// Where confirmed things are shown: the node's hub.
pub trait Publisher: Send + Sync + 'static {
    /// Confirmed entries of a conversation, ascending: (seq, entry as JSON).
    fn entries(&self, conversation: ConversationId, entries: &[(u64, Bytes)]);

    /// A summary changed, as JSON.
    fn inbox(&self, tenant: &TenantId, inbox: &InboxId, publication: Bytes);

    /// Something for an agent, as JSON.
    fn agent(&self, tenant: &TenantId, agent: &AgentId, publication: Bytes);

    /// How the cluster is, as JSON.
    fn cluster(&self, _: Bytes) {}

    /// Whether anybody here waits for a topic.
    fn is_watched(&self, _: &Topic) -> bool {
        false
    }

    /// Open sockets.
    fn connections(&self) -> u64 {
        0
    }

    /// An agent came, went, or says something else.
    fn presence(&self, _: &TenantId, _: &AgentId, _: Presence) {}

    /// An agent is another node's now, which says how it is.
    fn presence_elsewhere(&self, _: &TenantId, _: &AgentId) {}

    /// A conversation's log reaches at least here: whoever was shown less reads the rest.
    fn reaches(&self, _: ConversationId, _: u64) {}

    /// A topic cannot be followed from here, or publications of one without an order may have been missed: its sockets are to
    /// come back, with their position if they have one.
    fn lost(&self, _: &Topic) {}

    /// What a client without a socket of its own sends, for its session here.
    fn emulated(&self, _session: &str, _frame: Bytes) -> Result<(), CommandError> {
        Err(ErrorCode::NotFound.into())
    }

    /// Something beside the order of a topic, from another node.
    fn aside(&self, _: &Topic, _: &Aside) {}

    /// Who is here, in the publisher's own words; another node's publisher reads it.
    fn present(&self, _: &Topic) -> String {
        String::new()
    }
}

/// The guarded HTTP client.
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    /// Makes a call for an account. Never fails: what is not an answer says whether it can have been seen.
    async fn call(&self, account: &Account, call: Call) -> CallResult;

    /// The provider's id of one of our files, put there if it is not; its own is found by its account. An error is
    /// what came of the call that put it there, or that nothing was called.
    async fn file(&self, _: &TenantId, _: &AccountId, _: &Account, _: &Media) -> Result<String, FileError> {
        Err(FileError::NotOurs)
    }
}

/// Why a file has no id at the provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileError {
    /// It is none of ours: its id may be the provider's.
    NotOurs,
    /// The provider did not take it now.
    Later,
    /// The provider says that the account cannot send at all, or not so fast.
    Held(Verdict),
    /// It cannot be sent: why.
    Final(String),
}

/// Where a file comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediaSource {
    /// Whose.
    pub tenant: TenantId,
    /// By which account.
    pub account: AccountId,
    /// In which conversation.
    pub conversation: ConversationId,
}

/// Why a customer's file is not here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FetchError {
    /// It may be had later.
    Later,
    /// It cannot be had: why.
    Final(String),
}

/// Brings customers' files from their providers.
#[async_trait]
pub trait MediaFetcher: Send + Sync + 'static {
    /// The file as we keep it: found if it is here, fetched and checked if it is not.
    async fn fetch(
        &self,
        source: &MediaSource,
        account: &Account,
        wanted: &Media,
    ) -> Result<Media, FetchError>;
}

/// Brings nothing: for nodes without files.
pub struct NoMedia;

#[async_trait]
impl MediaFetcher for NoMedia {
    async fn fetch(&self, _: &MediaSource, _: &Account, _: &Media) -> Result<Media, FetchError> {
        Err(FetchError::Final("this node keeps no files".into()))
    }
}
