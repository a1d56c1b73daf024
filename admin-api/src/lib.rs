//! The HTTP API of tenants and operators, under `/api/v1` (contract §3).
//!
//! **Lives here:** routes, bodies and answers; the OpenAPI description, generated from them. Errors are RFC 9457
//! problems with the same codes as on a socket.
//!
//! **Does not live here:** how keys and tokens are made or checked ([`Authenticator`], [`TokenIssuer`] are given),
//! what a command does (`actors/`), limits (`gateway/`).
//!
//! Invariant: a tenant's key sees its tenant only; another tenant's id answers like an unknown one.
//! Invariant: unknown fields of a body are refused, naming the field.

mod accounts;
mod agents;
mod cluster;
mod contacts;
mod conversations;
mod dead_letters;
mod extract;
mod idempotency;
mod inboxes;
mod keys;
mod media;
pub mod openapi;
mod problem;
mod tenants;

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware;
use axum::routing::{delete, get, post, put};
use bytes::Bytes;
use futures_util::Stream;
use patchbay_actors::agent::Presence;
use patchbay_actors::desk::Desk;
use patchbay_actors::directory::{Key, KeyScope, MediaRecord};
use patchbay_actors::intake::Intake;
use patchbay_protocol::ids::{AccountId, AgentId, ConversationId, TenantId};
use patchbay_protocol::principal::{Principal, Role};
use patchbay_protocol::{CommandError, Timestamp};
use patchbay_storage::redis::Redis;

pub use conversations::{cursor, position};
pub use problem::Problem;

/// The largest body.
/// How long a body may take to arrive; a file has bounds of its own.
pub const BODY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);
const BODY_BYTES_MAX: usize = 1 << 20;

/// Finds who is behind a bearer secret.
#[async_trait]
pub trait Authenticator: Send + Sync + 'static {
    /// `unauthorized` when nobody is.
    async fn principal(&self, bearer: &str) -> Result<Principal, CommandError>;
}

/// Makes tokens and keys.
#[async_trait]
pub trait TokenIssuer: Send + Sync + 'static {
    /// A token of an agent that is not void by `not_before`, with its end.
    fn issue(
        &self,
        tenant: &TenantId,
        agent: &AgentId,
        role: Role,
        ttl_s: u64,
        not_before: Option<Timestamp>,
    ) -> Result<(String, Timestamp), CommandError>;

    /// A new key of a tenant: its id, its secret (told only here) and what is stored of it.
    async fn create_key(
        &self,
        tenant: &TenantId,
        name: &str,
        scope: KeyScope,
    ) -> Result<(String, String, Key), CommandError>;

    /// A token of a web chat's visitor, with its end.
    fn issue_contact(
        &self,
        tenant: &TenantId,
        account: &AccountId,
        visitor: &str,
        name: Option<&str>,
        ttl_s: u64,
    ) -> Result<(String, Timestamp), CommandError>;
}

/// A file's bytes as they come; an error: they broke off.
pub type FileBody = Pin<Box<dyn Stream<Item = Result<Bytes, ()>> + Send>>;

/// A file that is stored.
pub struct StoredFile {
    /// Its id.
    pub id: String,
    /// What is known of it.
    pub record: MediaRecord,
}

/// Takes backups.
pub trait Backups: Send + Sync + 'static {
    /// A backup of this moment, as it is made; none: the store has its own way.
    fn backup(&self) -> Option<FileBody>;
}

/// Keeps files.
#[async_trait]
pub trait Files: Send + Sync + 'static {
    /// Stores a file, checked by its bytes; one of a visitor's conversation is for that alone.
    async fn put(
        &self,
        tenant: &TenantId,
        conversation: Option<ConversationId>,
        claimed: Option<&str>,
        name: Option<&str>,
        body: FileBody,
    ) -> Result<StoredFile, CommandError>;

    /// The path that shows a file, and until when.
    fn link(
        &self,
        tenant: &TenantId,
        id: &str,
        record: &MediaRecord,
    ) -> Result<(String, Timestamp), CommandError>;

    /// What stands before a path for whoever asked under `host`.
    fn base(&self, host: Option<&str>) -> String;
}

/// Knows which agents are there.
#[async_trait]
pub trait Presences: Send + Sync + 'static {
    /// How each of these agents is, as far as anybody has said; none: nobody can say.
    async fn hints(&self, tenant: &TenantId, agents: &[AgentId]) -> Vec<Option<Presence>>;
}

/// Knows where calls to providers may go.
pub trait Destinations: Send + Sync + 'static {
    /// Why an account's `api_base` may not be called; `None` when it may.
    fn refused(&self, api_base: &str) -> Option<String>;
}

/// What the API stands on.
pub struct Api {
    desk: Arc<Desk>,
    intake: Arc<Intake>,
    auth: Arc<dyn Authenticator>,
    issuer: Arc<dyn TokenIssuer>,
    destinations: Arc<dyn Destinations>,
    files: Arc<dyn Files>,
    backups: Arc<dyn Backups>,
    presences: Arc<dyn Presences>,
    replies: idempotency::Replies,
    /// What nodes share for a while.
    shared: Option<Arc<Redis>>,
}

impl Api {
    /// The API of a node.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        desk: Arc<Desk>,
        intake: Arc<Intake>,
        auth: Arc<dyn Authenticator>,
        issuer: Arc<dyn TokenIssuer>,
        destinations: Arc<dyn Destinations>,
        files: Arc<dyn Files>,
        backups: Arc<dyn Backups>,
        presences: Arc<dyn Presences>,
        shared: Option<Arc<Redis>>,
    ) -> Arc<Self> {
        let replies = idempotency::Replies::default();
        Arc::new(Self {
            desk,
            intake,
            auth,
            issuer,
            destinations,
            files,
            backups,
            presences,
            replies,
            shared,
        })
    }

    fn directory(&self) -> &Arc<patchbay_actors::directory::Directory> {
        self.desk.node().directory()
    }

    fn now(&self) -> Timestamp {
        self.desk.node().shards().clock.now()
    }
}

/// The routes, to be mounted at the root.
pub fn router(api: Arc<Api>) -> Router {
    let v1 = Router::new()
        .route("/tenants", post(tenants::create))
        .route("/keys", post(keys::create).get(keys::list))
        .route("/keys/{id}", delete(keys::delete))
        .route("/inboxes", get(inboxes::list))
        .route("/inboxes/{inbox}", put(inboxes::put).get(inboxes::get).delete(inboxes::delete))
        .route("/accounts", get(accounts::list))
        .route("/accounts/{account}", put(accounts::put).get(accounts::get).delete(accounts::delete))
        .route("/accounts/{account}/messages", post(accounts::send))
        .route("/accounts/{account}/events", get(accounts::events))
        .route("/accounts/{account}/contacts/{visitor}/tokens", post(contacts::issue))
        .route("/agents", get(agents::list))
        .route("/agents/{agent}", put(agents::put).get(agents::get).delete(agents::delete))
        .route("/agents/{agent}/tokens", post(agents::issue).delete(agents::revoke))
        .route("/conversations", get(conversations::list))
        .route("/conversations/{id}", get(conversations::get))
        .route("/conversations/{id}/entries", get(conversations::entries))
        .route("/conversations/{id}/messages", post(conversations::send))
        .route("/conversations/{id}/notes", post(conversations::note))
        .route("/conversations/{id}/assign", post(conversations::assign))
        .route("/conversations/{id}/resolve", post(conversations::resolve))
        .route("/conversations/{id}/reopen", post(conversations::reopen))
        .route("/conversations/{id}/pending", post(conversations::pending))
        .route("/conversations/{id}/snooze", post(conversations::snooze))
        .route("/conversations/{id}/tags", post(conversations::tag))
        .route("/conversations/{id}/read", post(conversations::read))
        .route("/media", post(media::put))
        .route("/media/{id}", get(media::get))
        .route("/dead-letters", get(dead_letters::list))
        .route("/dead-letters/{id}", delete(dead_letters::delete))
        .route("/dead-letters/{id}/replay", post(dead_letters::replay))
        .route("/cluster/nodes", get(cluster::nodes))
        .route("/cluster/shards", get(cluster::shards))
        .route("/cluster/shards/{shard}", get(cluster::why))
        .route("/cluster/shards/{shard}/move", post(cluster::move_shard))
        .route("/cluster/plan", get(cluster::plan))
        .route("/cluster/drain", put(cluster::drain).delete(cluster::undrain))
        .route("/cluster/backup", get(cluster::backup))
        .route_layer(middleware::from_fn_with_state(api.clone(), idempotency::layer))
        .route("/openapi.json", get(openapi::serve))
        .fallback(problem::not_found)
        .method_not_allowed_fallback(problem::method_not_allowed)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(api);
    Router::new().nest("/api/v1", v1)
}
