//! Inboxes.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use patchbay_actors::directory;
use patchbay_protocol::ErrorCode;
use patchbay_protocol::ids::InboxId;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Api;
use crate::extract::{Body, Query, Tenant, display_name, name, new_name, page};
use crate::problem::{Failure, Problem};

/// An inbox to be written.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PutInbox {
    /// Its display name.
    name: String,
}

/// An inbox.
#[derive(Serialize, ToSchema)]
pub(crate) struct Inbox {
    /// Its id.
    id: String,
    /// Its display name.
    name: String,
}

/// Which page of a list.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Paging {
    /// 1 to 1000, larger is clamped; 100 by default.
    pub(crate) limit: Option<usize>,
    /// The `next` of the page before.
    pub(crate) after: Option<String>,
}

/// Inboxes.
#[derive(Serialize, ToSchema)]
pub(crate) struct Inboxes {
    inboxes: Vec<Inbox>,
    /// Where the next page begins; null on the last.
    next: Option<String>,
}

/// The id behind which the next page begins, when the page is full.
pub(crate) fn next<T>(found: &[(String, T)], limit: usize) -> Option<String> {
    (found.len() == limit).then(|| found.last().map(|(id, _)| id.clone())).flatten()
}

/// 201 for what is new, 200 for what was there.
pub(crate) fn created(new: bool) -> StatusCode {
    if new { StatusCode::CREATED } else { StatusCode::OK }
}

/// Creates or replaces an inbox.
#[utoipa::path(put, path = "/api/v1/inboxes/{inbox}", request_body = PutInbox, responses((status = 200, body = Inbox), (status = 201, body = Inbox), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn put(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(inbox): Path<String>,
    Body(new): Body<PutInbox>,
) -> Result<(StatusCode, Json<Inbox>), Failure> {
    let id: InboxId = new_name("inbox", &inbox)?;
    let name = display_name(new.name)?;
    let was = api.directory().put_inbox(&tenant, &id, &directory::Inbox { name: name.clone() }).await?;
    Ok((created(was), Json(Inbox { id: inbox, name })))
}

/// An inbox.
#[utoipa::path(get, path = "/api/v1/inboxes/{inbox}", responses((status = 200, body = Inbox), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(inbox): Path<String>,
) -> Result<Json<Inbox>, Failure> {
    let found = api.directory().inbox(&tenant, &name(&inbox)?).await?.ok_or(ErrorCode::NotFound)?;
    Ok(Json(Inbox { id: inbox, name: found.name }))
}

/// Inboxes, by id.
#[utoipa::path(get, path = "/api/v1/inboxes", params(Paging), responses((status = 200, body = Inboxes)), security(("key" = [])))]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Query(q): Query<Paging>,
) -> Result<Json<Inboxes>, Failure> {
    let limit = page(q.limit);
    let found = api.directory().inboxes(&tenant, q.after.as_deref().unwrap_or(""), limit).await?;
    let next = next(&found, limit);
    Ok(Json(Inboxes { inboxes: found.into_iter().map(|(id, i)| Inbox { id, name: i.name }).collect(), next }))
}

/// Removes an inbox that no account uses.
#[utoipa::path(delete, path = "/api/v1/inboxes/{inbox}", responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)), security(("key" = [])))]
pub(crate) async fn delete(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(inbox): Path<String>,
) -> Result<StatusCode, Failure> {
    let id: InboxId = name(&inbox)?;
    let mut after = String::new();
    loop {
        let accounts = api.directory().accounts(&tenant, &after, 1000).await?;
        if accounts.iter().any(|(_, a)| a.inbox == id) {
            let detail = serde_json::json!({"detail": "an account uses this inbox"});
            return Err(patchbay_protocol::CommandError::with(ErrorCode::Conflict, detail).into());
        }
        let Some((last, _)) = accounts.last().filter(|_| accounts.len() == 1000) else { break };
        after.clone_from(last);
    }
    if api.directory().delete_inbox(&tenant, &id).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(ErrorCode::NotFound.into())
    }
}
