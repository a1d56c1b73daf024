//! API keys of a tenant: made to rotate, shown once.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use patchbay_actors::directory::{self, KeyScope};
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Api;
use crate::extract::{Body, Query, Tenant, page};
use crate::inboxes::{Paging, next};
use crate::problem::{Failure, Problem};

/// The longest name.
const NAME_MAX: usize = 200;

/// A key to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewKey {
    /// What it is called.
    name: String,
    /// `full` (everything of the tenant) or `read`; `full` by default.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    scope: KeyScope,
}

/// A key, without its secret.
#[derive(Serialize, ToSchema)]
pub(crate) struct Key {
    id: String,
    name: String,
    #[schema(value_type = String)]
    scope: KeyScope,
    /// The start of the secret.
    prefix: String,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// To within a minute; null: never.
    #[schema(value_type = Option<String>, format = DateTime)]
    last_used_at: Option<Timestamp>,
}

/// A key with its secret, shown once.
#[derive(Serialize, ToSchema)]
pub(crate) struct CreatedKey {
    #[serde(flatten)]
    shown: Key,
    /// The secret.
    key: String,
}

/// Keys.
#[derive(Serialize, ToSchema)]
pub(crate) struct Keys {
    keys: Vec<Key>,
    /// Where the next page begins; null on the last.
    next: Option<String>,
}

fn shown(id: String, k: directory::Key) -> Key {
    Key {
        id,
        name: k.name,
        scope: k.scope,
        prefix: k.prefix,
        created_at: k.created_at,
        last_used_at: k.last_used_at,
    }
}

/// Makes a key. The ones before it stay good until they are removed.
#[utoipa::path(post, path = "/api/v1/keys", request_body = NewKey, responses((status = 201, body = CreatedKey), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Body(new): Body<NewKey>,
) -> Result<(StatusCode, Json<CreatedKey>), Failure> {
    if new.name.is_empty() || new.name.len() > NAME_MAX {
        return Err(CommandError::invalid(format!("name must have 1 to {NAME_MAX} bytes")).into());
    }
    let (id, key, record) = api.issuer.create_key(&tenant, &new.name, new.scope).await?;
    Ok((StatusCode::CREATED, Json(CreatedKey { shown: shown(id, record), key })))
}

/// Keys, by id.
#[utoipa::path(get, path = "/api/v1/keys", params(Paging), responses((status = 200, body = Keys)), security(("key" = [])))]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Query(q): Query<Paging>,
) -> Result<Json<Keys>, Failure> {
    let limit = page(q.limit);
    let found = api.directory().keys(&tenant, q.after.as_deref().unwrap_or(""), limit).await?;
    let next = next(&found, limit);
    Ok(Json(Keys { keys: found.into_iter().map(|(id, k)| shown(id, k)).collect(), next }))
}

/// Removes a key: it opens no door from here on.
#[utoipa::path(delete, path = "/api/v1/keys/{id}", responses((status = 204), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn delete(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<StatusCode, Failure> {
    if api.directory().delete_key(&tenant, &id).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(ErrorCode::NotFound.into())
    }
}
