//! Files: put as a raw body, shown under an address that is good for minutes. For keys of the tenant, for its agents
//! and for visitors of its web chats, each within what it may see.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::StreamExt as _;
use patchbay_actors::desk::Who;
use patchbay_actors::directory::{MediaRecord, MediaState};
use patchbay_protocol::ids::TenantId;
use patchbay_protocol::principal::Principal;
use patchbay_protocol::{ErrorCode, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Api;
use crate::extract::{Query, Somebody};
use crate::problem::{Failure, Problem};

/// A file that is stored.
#[derive(Serialize, ToSchema)]
pub(crate) struct Stored {
    id: String,
    /// Its type, by its bytes.
    mime: String,
    bytes: u64,
    /// SHA-256, hexadecimal.
    sha256: String,
}

/// A file and where it is.
#[derive(Serialize, ToSchema)]
pub(crate) struct File {
    /// `pending`, `ready` or `failed`.
    #[schema(value_type = String)]
    state: MediaState,
    mime: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Good until `expires_at`.
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// How a file is called.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct PutQuery {
    /// Its name.
    name: Option<String>,
}

/// Stores a file. What it is, its bytes say; `Content-Type` only chooses among what they may be.
#[utoipa::path(post, path = "/api/v1/media", params(PutQuery), request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses((status = 201, body = Stored), (status = 413, body = Problem), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn put(
    State(api): State<Arc<Api>>,
    Somebody(who): Somebody,
    Query(q): Query<PutQuery>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<Stored>), Failure> {
    let (tenant, conversation) = match &who {
        Principal::Tenant(tenant) => (tenant.clone(), None),
        Principal::Agent(agent) => (agent.tenant.clone(), None),
        Principal::Contact(contact) => (contact.tenant.clone(), Some(contact.conversation())),
        Principal::Operator | Principal::Reader(_) => return Err(ErrorCode::PermissionDenied.into()),
    };
    let claimed = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let body = Box::pin(body.into_data_stream().map(|chunk| chunk.map_err(|_| ())));
    let stored = api.files.put(&tenant, conversation, claimed, q.name.as_deref(), body).await?;
    let record = stored.record;
    Ok((
        StatusCode::CREATED,
        Json(Stored {
            id: stored.id,
            mime: record.mime,
            bytes: record.bytes.unwrap_or(0),
            sha256: record.sha256.unwrap_or_default(),
        }),
    ))
}

/// Whose file it may be, if this one may see it.
async fn visible(api: &Api, who: &Principal, id: &str) -> Result<(TenantId, MediaRecord), Failure> {
    let tenant = match who {
        Principal::Tenant(tenant) | Principal::Reader(tenant) => tenant.clone(),
        Principal::Agent(agent) => agent.tenant.clone(),
        Principal::Contact(contact) => contact.tenant.clone(),
        Principal::Operator => return Err(ErrorCode::PermissionDenied.into()),
    };
    let record = api.directory().media(&tenant, id).await?.ok_or(ErrorCode::NotFound)?;
    let seen = match who {
        Principal::Contact(contact) => record.conversations.contains(&contact.conversation()),
        Principal::Agent(agent) if record.private => {
            let who = Who::Agent(agent.clone());
            let mut seen = false;
            for conversation in &record.conversations {
                seen = seen || api.desk.visible(&who, *conversation).await.is_ok();
            }
            seen
        }
        Principal::Agent(_) | Principal::Tenant(_) | Principal::Reader(_) | Principal::Operator => true,
    };
    if seen { Ok((tenant, record)) } else { Err(ErrorCode::NotFound.into()) }
}

/// A file, with an address when it is ready.
#[utoipa::path(get, path = "/api/v1/media/{id}", responses((status = 200, body = File), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Somebody(who): Somebody,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Json<File>, Failure> {
    let (tenant, record) = visible(&api, &who, &id).await?;
    let (url, expires_at) = match record.state {
        MediaState::Ready => {
            let (path, expires_at) = api.files.link(&tenant, &id, &record)?;
            (
                Some(api.files.base(headers.get(header::HOST).and_then(|h| h.to_str().ok())) + &path),
                Some(expires_at),
            )
        }
        MediaState::Pending | MediaState::Failed => (None, None),
    };
    Ok(Json(File {
        state: record.state,
        mime: record.mime,
        bytes: record.bytes,
        sha256: record.sha256,
        name: record.name,
        url,
        expires_at,
        reason: record.reason,
    }))
}
