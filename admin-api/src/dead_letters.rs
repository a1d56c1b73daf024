//! Items that could not be taken.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use patchbay_actors::account::AccountCommand;
use patchbay_actors::router::Router as _;
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use serde::Serialize;
use utoipa::ToSchema;

use crate::Api;
use crate::extract::{Query, Tenant, name, page};
use crate::inboxes::Paging;
use crate::problem::{Failure, Problem};

/// The items of one page, in bytes; a single larger one is a page of its own.
const PAGE_BYTES_MAX: usize = 4 << 20;

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
    let found = api
        .directory()
        .tables()
        .dead_letters(&tenant, q.after.as_deref().unwrap_or(""), limit)
        .await
        .map_err(|_| CommandError::unavailable())?;
    let mut bytes = 0;
    let fits = found.iter().take_while(|letter| {
        bytes += letter.item.to_string().len();
        bytes <= PAGE_BYTES_MAX
    });
    // One at least, however large.
    let fits = fits.count().max(1);
    let whole = found.len() < limit && found.len() <= fits;
    let found: Vec<_> = found.into_iter().take(fits).collect();
    let next = if whole { None } else { found.last().map(|l| l.id.clone()) };
    let shown = |l: patchbay_storage::tables::DeadLetter| DeadLetter {
        id: l.id,
        account: l.account,
        reason: l.reason,
        received_at: l.received_at,
        item: l.item,
    };
    Ok(Json(DeadLetters { dead_letters: found.into_iter().map(shown).collect(), next }))
}

/// Lets go of a dead letter.
#[utoipa::path(delete, path = "/api/v1/dead-letters/{id}", responses((status = 204), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn delete(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<StatusCode, Failure> {
    let tables = api.directory().tables();
    let letter = tables
        .dead_letter(&tenant, &id)
        .await
        .map_err(|_| CommandError::unavailable())?
        .ok_or(ErrorCode::NotFound)?;
    let drop = AccountCommand::DropDeadLetter { tenant: tenant.clone(), id };
    api.desk.node().account(&tenant, &name(&letter.account)?, drop)?.wait().await?;
    Ok(StatusCode::NO_CONTENT)
}
