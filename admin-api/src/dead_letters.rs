//! Items that could not be taken.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use patchbay_actors::account::AccountCommand;
use patchbay_actors::router::Router as _;
use patchbay_protocol::ids::TenantId;
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use patchbay_storage::tables::DeadLetter as StoredLetter;
use serde::Serialize;
use utoipa::ToSchema;

use crate::Api;
use crate::extract::{Query, Tenant, name, page};
use crate::inboxes::Paging;
use crate::problem::{Failure, Problem};

/// The items of one page, in bytes; a single larger one is a page of its own.
const PAGE_BYTES_MAX: usize = 4 << 20;
/// Letters that are read at once.
const READ_AT_ONCE: usize = 8;

/// An item that could not be taken.
#[derive(Serialize, ToSchema)]
pub(crate) struct DeadLetter {
    id: String,
    account: String,
    /// Why.
    reason: String,
    #[schema(value_type = String, format = DateTime)]
    received_at: Timestamp,
    /// The item as it came.
    #[schema(value_type = Object)]
    item: serde_json::Value,
}

/// Dead letters, the oldest first.
#[derive(Serialize, ToSchema)]
pub(crate) struct DeadLetters {
    dead_letters: Vec<DeadLetter>,
    /// Where the next page begins; null on the last.
    next: Option<String>,
}

/// Dead letters, the oldest first.
#[utoipa::path(get, path = "/api/v1/dead-letters", params(Paging), responses((status = 200, body = DeadLetters)), security(("key" = [])))]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Query(q): Query<Paging>,
) -> Result<Json<DeadLetters>, Failure> {
    let limit = page(q.limit);
    let mut after = q.after.unwrap_or_default();
    let (mut found, mut bytes, mut whole) = (Vec::new(), 0, false);
    // A few at a time: each may be as large as a webhook's body.
    'page: while found.len() < limit && !whole {
        let asked = READ_AT_ONCE.min(limit - found.len());
        let some = api.directory().tables().dead_letters(&tenant, &after, asked).await;
        let some = some.map_err(|_| CommandError::unavailable())?;
        whole = some.len() < asked;
        for letter in some {
            bytes += letter.item.to_string().len();
            // One at least, however large.
            if bytes > PAGE_BYTES_MAX && !found.is_empty() {
                whole = false;
                break 'page;
            }
            after.clone_from(&letter.id);
            found.push(letter);
        }
    }
    let next = if whole { None } else { found.last().map(|l: &StoredLetter| l.id.clone()) };
    let shown = |l: StoredLetter| DeadLetter {
        id: l.id,
        account: l.account,
        reason: l.reason,
        received_at: l.received_at,
        item: l.item,
    };
    Ok(Json(DeadLetters { dead_letters: found.into_iter().map(shown).collect(), next }))
}

/// What came of a replay.
#[derive(Serialize, ToSchema)]
pub(crate) struct Replayed {
    id: String,
    /// `true`: it is taken now, and no dead letter any more.
    replayed: bool,
}

/// Takes an item again, as it came. What cannot be taken now either stays where it is.
#[utoipa::path(post, path = "/api/v1/dead-letters/{id}/replay", responses((status = 200, body = Replayed), (status = 404, body = Problem), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn replay(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Json<Replayed>, Failure> {
    let letter = find(&api, &tenant, &id).await?;
    api.intake.replay(&tenant, &name(&letter.account)?, &letter).await?;
    drop_letter(&api, &tenant, &letter).await?;
    Ok(Json(Replayed { id, replayed: true }))
}

async fn find(api: &Api, tenant: &TenantId, id: &str) -> Result<StoredLetter, Failure> {
    let found = api.directory().tables().dead_letter(tenant, id).await;
    Ok(found.map_err(|_| CommandError::unavailable())?.ok_or(ErrorCode::NotFound)?)
}

async fn drop_letter(api: &Api, tenant: &TenantId, letter: &StoredLetter) -> Result<(), Failure> {
    let drop = AccountCommand::DropDeadLetter { tenant: tenant.clone(), id: letter.id.clone() };
    api.desk.node().account(tenant, &name(&letter.account)?, drop)?.wait().await?;
    Ok(())
}

/// Lets go of a dead letter.
#[utoipa::path(delete, path = "/api/v1/dead-letters/{id}", responses((status = 204), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn delete(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<StatusCode, Failure> {
    let letter = find(&api, &tenant, &id).await?;
    drop_letter(&api, &tenant, &letter).await?;
    Ok(StatusCode::NO_CONTENT)
}
