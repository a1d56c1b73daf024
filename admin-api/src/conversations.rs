//! Conversations: lists, entries and commands.

use std::cmp::Reverse;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, BytesMut};
use patchbay_actors::desk::{Desk, PAGE_ENTRIES_MAX, Page, Who};
use patchbay_actors::inbox::{Filter, Position};
use patchbay_protocol::command::{
    AddNote, AssignConversation, Empty, ReadConversation, Reply, Request, SendMessage, SendReply,
    SnoozeConversation, StateReply, TagConversation,
};
use patchbay_protocol::ids::{AgentId, ConversationId, InboxId, TenantId};
use patchbay_protocol::summary::{Status, Summary};
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Api;
use crate::extract::{Body, Query, Tenant, name, page};
use crate::problem::{Failure, Problem};

/// The place behind a summary, as text.
pub fn cursor(last: &Summary) -> String {
    format!("{}.{}", last.updated_at.as_millis(), last.id)
}

/// The place that a cursor names.
pub fn position(text: &str) -> Result<Position, CommandError> {
    let parsed = text.split_once('.').and_then(|(at, id)| {
        Some(Position(Reverse(Timestamp::from_millis(at.parse().ok()?)), id.parse().ok()?))
    });
    parsed.ok_or_else(|| CommandError::invalid("after is no cursor of this list"))
}

/// Which conversations.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListQuery {
    /// Of this inbox.
    inbox: Option<String>,
    /// In this state; all unless asked.
    status: Option<Status>,
    /// Assigned to this agent.
    assignee: Option<String>,
    /// With the contact of this address.
    contact: Option<String>,
    /// 1 to 1000, larger is clamped; 100 by default.
    limit: Option<usize>,
    /// The `next` of the page before.
    after: Option<String>,
}

/// Conversations, the newest `updated_at` first.
#[derive(Serialize, ToSchema)]
pub(crate) struct Conversations {
    conversations: Vec<Summary>,
    /// Where the next page begins; null on the last.
    next: Option<String>,
}

/// Conversations, newest first.
#[utoipa::path(get, path = "/api/v1/conversations", params(ListQuery), responses((status = 200, body = Conversations), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Query(q): Query<ListQuery>,
) -> Result<Json<Conversations>, Failure> {
    let limit = page(q.limit);
    let bad = |field: &str| CommandError::invalid(format!("{field} is no name"));
    let inbox = q.inbox.map(|i| i.parse::<InboxId>().map_err(|_| bad("inbox"))).transpose()?;
    let assignee = q.assignee.map(|a| a.parse::<AgentId>().map_err(|_| bad("assignee"))).transpose()?;
    let after = q.after.as_deref().map(position).transpose()?;
    let filter = Filter { status: q.status, assignee, contact: q.contact };
    let conversations = api.desk.list(&Who::Api(tenant), inbox.as_ref(), &filter, after, limit).await?;
    let next = (conversations.len() == limit).then(|| conversations.last().map(cursor)).flatten();
    Ok(Json(Conversations { conversations, next }))
}

/// A conversation in one line.
#[utoipa::path(get, path = "/api/v1/conversations/{id}", responses((status = 200, body = Summary), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Json<Summary>, Failure> {
    Ok(Json(api.desk.summary(&Who::Api(tenant), name(&id)?).await?))
}

/// Which entries.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EntriesQuery {
    /// After this seq.
    after_seq: Option<u64>,
    /// The last ones before this seq, still ascending.
    before_seq: Option<u64>,
    /// 1 to 1000, larger is clamped; 100 by default.
    limit: Option<usize>,
}

/// Entries, ascending.
#[derive(Serialize, ToSchema)]
pub(crate) struct Entries {
    /// The entries; at most 512 KiB of them.
    #[schema(value_type = Vec<Object>)]
    entries: Vec<serde_json::Value>,
    /// The tip of the log.
    last_seq: u64,
    /// The log's identity.
    epoch: String,
}

/// Entries of a conversation.
#[utoipa::path(get, path = "/api/v1/conversations/{id}/entries", params(EntriesQuery), responses((status = 200, body = Entries), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn entries(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Query(q): Query<EntriesQuery>,
) -> Result<Response, Failure> {
    let id: ConversationId = name(&id)?;
    api.desk.visible(&Who::Api(tenant.clone()), id).await?;
    let (wanted, reverse) = match (q.after_seq, q.before_seq) {
        (Some(_), Some(_)) => return Err(CommandError::invalid("either after_seq or before_seq").into()),
        (after, None) => (Page::After(after.unwrap_or(0)), false),
        (None, Some(before)) => (Page::Before(Some(before)), true),
    };
    let mut found = api.desk.entries(&tenant, id, wanted, page(q.limit).min(PAGE_ENTRIES_MAX)).await?;
    if reverse {
        found.entries.reverse();
    }
    // Entries are stored as they are shown: they are written out without being read.
    let mut body =
        BytesMut::with_capacity(found.entries.iter().map(|(_, e)| e.len() + 1).sum::<usize>() + 64);
    body.put_slice(br#"{"entries":["#);
    for (n, (_, entry)) in found.entries.iter().enumerate() {
        if n > 0 {
            body.put_u8(b',');
        }
        body.put_slice(entry);
    }
    body.put_slice(
        format!(r#"],"last_seq":{},"epoch":"{}"}}"#, found.tip, api.desk.node().epoch_of(id)).as_bytes(),
    );
    Ok(([(header::CONTENT_TYPE, "application/json")], body.freeze()).into_response())
}

async fn submit(api: &Api, tenant: TenantId, id: &str, request: Request) -> Result<Reply, Failure> {
    Ok(api.desk.submit(&Who::Api(tenant), name(id)?, request).await?.wait().await?)
}

async fn state(api: &Api, tenant: TenantId, id: &str, request: Request) -> Result<Json<StateReply>, Failure> {
    match submit(api, tenant, id, request).await? {
        Reply::State(reply) => Ok(Json(reply)),
        _ => Err(ErrorCode::Internal.into()),
    }
}

async fn sent(api: &Api, tenant: TenantId, id: &str, request: Request) -> Result<Json<SendReply>, Failure> {
    match submit(api, tenant, id, request).await? {
        Reply::Sent(reply) => Ok(Json(reply)),
        _ => Err(ErrorCode::Internal.into()),
    }
}

/// Sends a message.
#[utoipa::path(post, path = "/api/v1/conversations/{id}/messages", request_body = SendMessage, responses((status = 200, body = SendReply), (status = 404, body = Problem), (status = 409, body = Problem), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn send(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Body(message): Body<SendMessage>,
) -> Result<Json<SendReply>, Failure> {
    let request = Desk::send_request(&Who::Api(tenant.clone()), message);
    sent(&api, tenant, &id, request).await
}

/// Adds a note that the customer never sees.
#[utoipa::path(post, path = "/api/v1/conversations/{id}/notes", request_body = AddNote, responses((status = 200, body = SendReply), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn note(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Body(note): Body<AddNote>,
) -> Result<Json<SendReply>, Failure> {
    sent(&api, tenant, &id, Request::Note(note)).await
}

/// Assigns to an agent, or to nobody.
#[utoipa::path(post, path = "/api/v1/conversations/{id}/assign", request_body = AssignConversation, responses((status = 200, body = StateReply), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn assign(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Body(r): Body<AssignConversation>,
) -> Result<Json<StateReply>, Failure> {
    state(&api, tenant, &id, Request::Assign(r)).await
}

/// Ends the episode.
#[utoipa::path(post, path = "/api/v1/conversations/{id}/resolve", request_body = Empty, responses((status = 200, body = StateReply), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn resolve(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Body(Empty {}): Body<Empty>,
) -> Result<Json<StateReply>, Failure> {
    state(&api, tenant, &id, Request::Resolve).await
}

/// Opens the same episode again.
#[utoipa::path(post, path = "/api/v1/conversations/{id}/reopen", request_body = Empty, responses((status = 200, body = StateReply), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn reopen(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Body(Empty {}): Body<Empty>,
) -> Result<Json<StateReply>, Failure> {
    state(&api, tenant, &id, Request::Reopen).await
}

/// Waits for the customer.
#[utoipa::path(post, path = "/api/v1/conversations/{id}/pending", request_body = Empty, responses((status = 200, body = StateReply), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn pending(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Body(Empty {}): Body<Empty>,
) -> Result<Json<StateReply>, Failure> {
    state(&api, tenant, &id, Request::Pending).await
}

/// Comes back at an instant, or with the customer's next message.
#[utoipa::path(post, path = "/api/v1/conversations/{id}/snooze", request_body = SnoozeConversation, responses((status = 200, body = StateReply), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn snooze(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Body(r): Body<SnoozeConversation>,
) -> Result<Json<StateReply>, Failure> {
    state(&api, tenant, &id, Request::Snooze(r)).await
}

/// Adds and removes tags.
#[utoipa::path(post, path = "/api/v1/conversations/{id}/tags", request_body = TagConversation, responses((status = 200, body = StateReply), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn tag(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Body(r): Body<TagConversation>,
) -> Result<Json<StateReply>, Failure> {
    state(&api, tenant, &id, Request::Tag(r)).await
}

/// Marks as read.
#[utoipa::path(post, path = "/api/v1/conversations/{id}/read", request_body = ReadConversation, responses((status = 200, body = StateReply), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn read(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    Body(r): Body<ReadConversation>,
) -> Result<Json<StateReply>, Failure> {
    state(&api, tenant, &id, Request::Read(r)).await
}
