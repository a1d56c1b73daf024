//! Agents and their tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use patchbay_actors::agent::Presence;
use patchbay_actors::directory;
use patchbay_protocol::ids::{AgentId, InboxId, TenantId};
use patchbay_protocol::principal::Role;
use patchbay_protocol::{CommandError, ErrorCode, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Api;
use crate::extract::{Body, Query, Tenant, display_name, name, new_name, page};
use crate::inboxes::{Paging, created, next};
use crate::problem::{Failure, Problem};

/// The longest life of a token, and what it is when nobody says.
pub(crate) const TTL_MAX_S: u64 = 30 * 24 * 3600;
pub(crate) const TTL_DEFAULT_S: u64 = 3600;

/// An agent to be written.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PutAgent {
    /// Its display name.
    name: String,
    /// `agent`, `supervisor` or `admin`.
    #[schema(value_type = String)]
    role: Role,
    /// Where it works.
    inboxes: Vec<String>,
}

/// An agent.
#[derive(Serialize, ToSchema)]
pub(crate) struct Agent {
    id: String,
    name: String,
    #[schema(value_type = String)]
    role: Role,
    inboxes: Vec<String>,
    /// `online`, `away` or `offline`, as last heard of; null where nobody can say.
    #[schema(value_type = Option<String>)]
    presence: Option<Presence>,
}

/// Agents.
#[derive(Serialize, ToSchema)]
pub(crate) struct Agents {
    agents: Vec<Agent>,
    /// Where the next page begins; null on the last.
    next: Option<String>,
}

fn shown(id: &AgentId, a: directory::Agent, presence: Option<Presence>) -> Agent {
    let inboxes = a.inboxes.iter().map(InboxId::to_string).collect();
    Agent { id: id.to_string(), name: a.name, role: a.role, inboxes, presence }
}

async fn one(api: &Api, tenant: &TenantId, id: AgentId, found: directory::Agent) -> Agent {
    let hint = api.presences.hints(tenant, std::slice::from_ref(&id)).await.pop();
    shown(&id, found, hint.flatten())
}

/// Creates or replaces an agent.
#[utoipa::path(put, path = "/api/v1/agents/{agent}", request_body = PutAgent, responses((status = 200, body = Agent), (status = 201, body = Agent), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn put(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(agent): Path<String>,
    Body(new): Body<PutAgent>,
) -> Result<(StatusCode, Json<Agent>), Failure> {
    let id: AgentId = new_name("agent", &agent)?;
    if !matches!(new.role, Role::Agent | Role::Supervisor | Role::Admin) {
        return Err(CommandError::invalid("role must be agent, supervisor or admin").into());
    }
    let mut inboxes = Vec::with_capacity(new.inboxes.len());
    for inbox in &new.inboxes {
        let inbox: InboxId = new_name("inboxes", inbox)?;
        if api.directory().inbox(&tenant, &inbox).await?.is_none() {
            return Err(CommandError::invalid(format!("inboxes: there is no inbox {inbox}")).into());
        }
        inboxes.push(inbox);
    }
    let document =
        directory::Agent { name: display_name(new.name)?, role: new.role, inboxes, not_before: None };
    let was = api.directory().put_agent(&tenant, &id, &document).await?;
    Ok((created(was), Json(one(&api, &tenant, id, document).await)))
}

/// An agent.
#[utoipa::path(get, path = "/api/v1/agents/{agent}", responses((status = 200, body = Agent), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(agent): Path<String>,
) -> Result<Json<Agent>, Failure> {
    let id: AgentId = name(&agent)?;
    let found = api.directory().agent(&tenant, &id).await?.ok_or(ErrorCode::NotFound)?;
    Ok(Json(one(&api, &tenant, id, found).await))
}

/// Agents, by id.
#[utoipa::path(get, path = "/api/v1/agents", params(Paging), responses((status = 200, body = Agents)), security(("key" = [])))]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Query(q): Query<Paging>,
) -> Result<Json<Agents>, Failure> {
    let limit = page(q.limit);
    let found = api.directory().agents(&tenant, q.after.as_deref().unwrap_or(""), limit).await?;
    let next = next(&found, limit);
    let (ids, found): (Vec<AgentId>, Vec<_>) =
        found.into_iter().filter_map(|(id, a)| Some((id.parse::<AgentId>().ok()?, a))).unzip();
    let hints = api.presences.hints(&tenant, &ids).await;
    let agents = ids.iter().zip(found).zip(hints).map(|((id, a), hint)| shown(id, a, hint)).collect();
    Ok(Json(Agents { agents, next }))
}

/// Removes an agent; its open sockets close.
#[utoipa::path(delete, path = "/api/v1/agents/{agent}", responses((status = 204), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn delete(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(agent): Path<String>,
) -> Result<StatusCode, Failure> {
    if api.directory().delete_agent(&tenant, &name(&agent)?, void_from(&api)).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(ErrorCode::NotFound.into())
    }
}

/// Tokens issued before this are void. They say when in whole seconds: those of this second are void as well.
fn void_from(api: &Api) -> Timestamp {
    Timestamp::from_seconds(api.now().as_millis().div_euclid(1000) + 1)
}

/// A token to be issued.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewToken {
    /// Its life in seconds: 1 hour by default, at most 30 days.
    ttl_s: Option<u64>,
}

/// A token.
#[derive(Serialize, ToSchema)]
pub(crate) struct Token {
    /// The JWT.
    pub(crate) token: String,
    /// When it ends.
    #[schema(value_type = String, format = DateTime)]
    pub(crate) expires_at: Timestamp,
}

/// Issues a token of an agent.
#[utoipa::path(post, path = "/api/v1/agents/{agent}/tokens", request_body = NewToken, responses((status = 200, body = Token), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn issue(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(agent): Path<String>,
    Body(new): Body<NewToken>,
) -> Result<Json<Token>, Failure> {
    let id: AgentId = name(&agent)?;
    let found = api.directory().agent(&tenant, &id).await?.ok_or(ErrorCode::NotFound)?;
    let ttl = new.ttl_s.unwrap_or(TTL_DEFAULT_S);
    if !(1..=TTL_MAX_S).contains(&ttl) {
        return Err(CommandError::invalid(format!("ttl_s must be 1 to {TTL_MAX_S}")).into());
    }
    let (token, expires_at) = api.issuer.issue(&tenant, &id, found.role, ttl, found.not_before)?;
    Ok(Json(Token { token, expires_at }))
}

/// Revokes every token of an agent; its open sockets close.
#[utoipa::path(delete, path = "/api/v1/agents/{agent}/tokens", responses((status = 204), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn revoke(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(agent): Path<String>,
) -> Result<StatusCode, Failure> {
    if api.directory().void_tokens(&tenant, &name(&agent)?, void_from(&api)).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(ErrorCode::NotFound.into())
    }
}
