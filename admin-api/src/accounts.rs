//! Channel accounts. Secrets are written, never read back.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use patchbay_actors::account::{AccountCommand, AccountReply};
use patchbay_actors::directory::{self, Settings};
use patchbay_actors::inbox::InboxCommand;
use patchbay_actors::router::Router as _;
use patchbay_protocol::command::SendMessage;
use patchbay_protocol::ids::{AccountId, InboxId, TenantId};
use patchbay_protocol::{CommandError, Content, ErrorCode, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::Api;
use crate::extract::{Body, Query, Tenant, display_name, name, new_name, page};
use crate::inboxes::{Paging, created, next};
use crate::problem::{Failure, Problem};

/// An account to be written.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PutAccount {
    /// Which connector speaks for it: `whatsapp`.
    connector: String,
    /// Where its conversations are shown.
    inbox: String,
    /// Its display name.
    name: String,
    /// The provider's id of it (WhatsApp: phone number id).
    external_id: String,
    /// Its secrets (WhatsApp: `app_secret`, `app_secret_previous`?, `verify_token`, `access_token`).
    #[schema(value_type = Object)]
    credentials: Value,
    /// What else it does: `api_base`, `api_version`, `mark_read`, `typing`.
    #[serde(default)]
    #[schema(value_type = Object)]
    settings: Settings,
}

/// An account, without its secrets.
#[derive(Serialize, ToSchema)]
pub(crate) struct Account {
    id: String,
    connector: String,
    inbox: String,
    name: String,
    external_id: String,
    #[schema(value_type = Object)]
    settings: Settings,
    /// `ok` or `paused`.
    status: String,
    /// Why it is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Messages that are not settled yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    unsettled: Option<usize>,
    /// What is left of the provider's limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<LimitsLeft>,
}

/// What is left of the provider's limits.
#[derive(Serialize, ToSchema)]
pub(crate) struct LimitsLeft {
    /// Messages that may go at once now.
    messages_left: u32,
    /// Messages a second in the long run.
    messages_per_second: u32,
}

/// Accounts.
#[derive(Serialize, ToSchema)]
pub(crate) struct Accounts {
    accounts: Vec<Account>,
    /// Where the next page begins; null on the last.
    next: Option<String>,
}

fn shown(id: String, a: &directory::Account) -> Account {
    Account {
        id,
        connector: a.connector.clone(),
        inbox: a.inbox.to_string(),
        name: a.name.clone(),
        external_id: a.external_id.clone(),
        settings: a.settings.clone(),
        status: "ok".into(),
        reason: None,
        unsettled: None,
        limits: None,
    }
}

/// Creates or replaces an account. A paused one goes on.
#[utoipa::path(put, path = "/api/v1/accounts/{account}", request_body = PutAccount, responses((status = 200, body = Account), (status = 201, body = Account), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn put(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(account): Path<String>,
    Body(new): Body<PutAccount>,
) -> Result<(StatusCode, Json<Account>), Failure> {
    let id: AccountId = new_name("account", &account)?;
    let inbox: InboxId = new_name("inbox", &new.inbox)?;
    let connector = patchbay_connectors::by_name(&new.connector).ok_or_else(|| {
        CommandError::invalid(format!("connector must be one of {}", patchbay_connectors::NAMES.join(", ")))
    })?;
    connector.check_credentials(&new.credentials)?;
    if let Some(why) = api.destinations.refused(&new.settings.api_base) {
        return Err(CommandError::invalid(format!("settings.api_base {why}")).into());
    }
    if api.directory().inbox(&tenant, &inbox).await?.is_none() {
        return Err(CommandError::invalid("inbox: there is no such inbox").into());
    }
    if new.external_id.is_empty()
        || new.external_id.len() > 128
        || !new.external_id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || b == b'.')
    {
        return Err(CommandError::invalid("external_id must have 1 to 128 letters, digits, -, _ or .").into());
    }
    let before = api.directory().account(&tenant, &id).await?;
    let document = directory::Account {
        connector: new.connector,
        inbox: inbox.clone(),
        name: display_name(new.name)?,
        external_id: new.external_id,
        credentials: new.credentials,
        settings: new.settings,
    };
    let was = api.directory().put_account(&tenant, &id, &document).await?;
    // Whatever held it back, somebody has acted.
    api.desk.node().account(&tenant, &id, AccountCommand::Resume)?.wait().await?;
    let moved = before.map(|b| b.inbox.clone()).filter(|b| *b != inbox);
    for changed in moved.into_iter().flat_map(|from| [from, inbox.clone()]) {
        api.desk.node().inbox(&tenant, &changed, InboxCommand::Reload)?.wait().await?;
    }
    Ok((created(was), Json(shown(account, &document))))
}

async fn with_status(
    api: &Api,
    tenant: &TenantId,
    id: &AccountId,
    mut account: Account,
) -> Result<Account, Failure> {
    if let AccountReply::Status { paused, unsettled, left, per_second, .. } =
        api.desk.node().account(tenant, id, AccountCommand::Status)?.wait().await?
    {
        account.unsettled = Some(unsettled);
        account.limits = Some(LimitsLeft { messages_left: left, messages_per_second: per_second });
        if let Some(reason) = paused {
            account.status = "paused".into();
            account.reason = Some(reason);
        }
    }
    Ok(account)
}

/// An account with its status.
#[utoipa::path(get, path = "/api/v1/accounts/{account}", responses((status = 200, body = Account), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn get(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(account): Path<String>,
) -> Result<Json<Account>, Failure> {
    let id: AccountId = name(&account)?;
    let found = api.directory().account(&tenant, &id).await?.ok_or(ErrorCode::NotFound)?;
    Ok(Json(with_status(&api, &tenant, &id, shown(account, &found)).await?))
}

/// Accounts, by id.
#[utoipa::path(get, path = "/api/v1/accounts", params(Paging), responses((status = 200, body = Accounts)), security(("key" = [])))]
pub(crate) async fn list(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Query(q): Query<Paging>,
) -> Result<Json<Accounts>, Failure> {
    let limit = page(q.limit);
    let found = api.directory().accounts(&tenant, q.after.as_deref().unwrap_or(""), limit).await?;
    let next = next(&found, limit);
    let mut accounts = Vec::with_capacity(found.len());
    for (account, document) in &found {
        let id: AccountId = name(account)?;
        accounts.push(with_status(&api, &tenant, &id, shown(account.clone(), document)).await?);
    }
    Ok(Json(Accounts { accounts, next }))
}

/// Removes an account. Its conversations stay stored and are no longer shown.
#[utoipa::path(delete, path = "/api/v1/accounts/{account}", responses((status = 204), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn delete(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(account): Path<String>,
) -> Result<StatusCode, Failure> {
    let id: AccountId = name(&account)?;
    let before = api.directory().account(&tenant, &id).await?.ok_or(ErrorCode::NotFound)?;
    if !api.directory().delete_account(&tenant, &id).await? {
        return Err(ErrorCode::NotFound.into());
    }
    api.desk.node().inbox(&tenant, &before.inbox, InboxCommand::Reload)?.wait().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Something about an account as a whole.
#[derive(Serialize, ToSchema)]
pub(crate) struct Event {
    /// Its place in the account's log.
    seq: u64,
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    /// The provider's field, or `account.paused` and `account.resumed`.
    #[serde(rename = "type")]
    kind: String,
    /// In the provider's shape.
    #[schema(value_type = Object)]
    data: Value,
}

/// Events of an account, ascending.
#[derive(Serialize, ToSchema)]
pub(crate) struct Events {
    events: Vec<Event>,
    /// Where the next page begins; null at the end.
    next: Option<String>,
}

/// The account's own log: templates, quality, bans, tier, errors that belong to no thread.
#[utoipa::path(get, path = "/api/v1/accounts/{account}/events", params(Paging), responses((status = 200, body = Events), (status = 404, body = Problem)), security(("key" = [])))]
pub(crate) async fn events(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(account): Path<String>,
    Query(q): Query<Paging>,
) -> Result<Json<Events>, Failure> {
    let id: AccountId = name(&account)?;
    api.directory().account(&tenant, &id).await?.ok_or(ErrorCode::NotFound)?;
    let after = match q.after.as_deref() {
        None => 0,
        Some(text) => text.parse().map_err(|_| CommandError::invalid("after is no cursor of this list"))?,
    };
    let found = api.desk.account_events(&tenant, &id, after, page(q.limit)).await?;
    let shown = found.events.into_iter().map(|(seq, at, event)| Event {
        seq,
        at,
        kind: event.kind,
        data: event.data,
    });
    Ok(Json(Events { events: shown.collect(), next: found.next.map(|n| n.to_string()) }))
}

/// A message to an address.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SendTo {
    /// The address (WhatsApp: a phone number).
    to: String,
    /// The sender's own id.
    client_id: String,
    /// What it says.
    #[schema(value_type = Object)]
    content: Content,
}

/// Where it went.
#[derive(Serialize, ToSchema)]
pub(crate) struct SentTo {
    /// The conversation.
    conversation: String,
    /// Its place there.
    seq: u64,
    /// When it was accepted.
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    /// Whether it was there already.
    duplicate: bool,
}

/// Sends to an address; opens the conversation if there is none.
#[utoipa::path(post, path = "/api/v1/accounts/{account}/messages", request_body = SendTo, responses((status = 200, body = SentTo), (status = 409, body = Problem), (status = 422, body = Problem)), security(("key" = [])))]
pub(crate) async fn send(
    State(api): State<Arc<Api>>,
    Tenant(tenant): Tenant,
    Path(account): Path<String>,
    Body(new): Body<SendTo>,
) -> Result<Json<SentTo>, Failure> {
    let message =
        SendMessage { client_id: new.client_id, content: new.content, reply_to: None, if_seq: None };
    let (conversation, sent) = api.desk.send_to(&tenant, &name(&account)?, &new.to, message).await?;
    Ok(Json(SentTo {
        conversation: conversation.to_string(),
        seq: sent.seq,
        at: sent.at,
        duplicate: sent.duplicate,
    }))
}
