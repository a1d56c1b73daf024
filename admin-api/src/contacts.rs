//! Visitors of a web chat: their tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use patchbay_protocol::ids::AccountId;
use patchbay_protocol::{CommandError, ErrorCode};
use serde::Deserialize;
use utoipa::ToSchema;

use crate::Api;
use crate::agents::{TTL_DEFAULT_S, TTL_MAX_S, Token};
use crate::extract::{Body, Tenant, name};
use crate::problem::{Failure, Problem};

/// The longest display name.
const NAME_MAX: usize = 200;

/// A visitor's token to be issued.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewContactToken {
    /// Its life in seconds: 1 hour by default, at most 30 days.
    ttl_s: Option<u64>,
    /// How agents see the visitor.
    name: Option<String>,
}

/// Issues a token of a visitor, for whom the tenant answers.
#[utoipa::path(post, path = "/api/v1/accounts/{account}/contacts/{visitor}/tokens", request_body = NewContactToken, responses((status = 200, body = Token), (status = 404, body = Problem), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn issue(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path((account, visitor)): Path<(String, String)>,
    Body(new): Body<NewContactToken>,
) -> Result<Json<Token>, Failure> {
    let account: AccountId = name(&account)?;
    let document = api.directory().account(&tenant, &account).await?.ok_or(ErrorCode::NotFound)?;
    let connector = patchbay_connectors::by_name(&document.connector).ok_or(ErrorCode::NotFound)?;
    if !connector.channel().direct {
        return Err(CommandError::invalid("account: its connector is no web chat").into());
    }
    let visitor = connector.recipient(&visitor)?;
    if new.name.as_ref().is_some_and(|n| n.is_empty() || n.len() > NAME_MAX) {
        return Err(CommandError::invalid(format!("name must have 1 to {NAME_MAX} bytes")).into());
    }
    let ttl = new.ttl_s.unwrap_or(TTL_DEFAULT_S);
    if !(1..=TTL_MAX_S).contains(&ttl) {
        return Err(CommandError::invalid(format!("ttl_s must be 1 to {TTL_MAX_S}")).into());
    }
    let (token, expires_at) =
        api.issuer.issue_contact(&tenant, &account, &visitor, new.name.as_deref(), ttl)?;
    Ok(Json(Token { token, expires_at }))
}
