//! Tenants: made by the operator, with their first key.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use patchbay_actors::directory;
use patchbay_protocol::ErrorCode;
use patchbay_protocol::ids::TenantId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Api;
use crate::extract::{Body, Operator, display_name, new_name};
use crate::problem::{Failure, Problem};

/// A tenant to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewTenant {
    /// Its id: `[a-z0-9][a-z0-9_-]{0,62}`.
    id: String,
    /// Its display name.
    name: String,
}

/// A tenant with its first key.
#[derive(Serialize, ToSchema)]
pub(crate) struct CreatedTenant {
    /// Its id.
    id: String,
    /// The key's secret, shown once.
    key: String,
}

/// Makes a tenant.
#[utoipa::path(post, path = "/api/v1/tenants", request_body = NewTenant, responses((status = 201, body = CreatedTenant), (status = 409, body = Problem)), security(("key" = [])))]
pub(crate) async fn create(
    State(api): State<Arc<Api>>,
    _: Operator,
    Body(new): Body<NewTenant>,
) -> Result<(StatusCode, Json<CreatedTenant>), Failure> {
    let id: TenantId = new_name("id", &new.id)?;
    let name = display_name(new.name)?;
    let made = api.directory().create_tenant(&id, &directory::Tenant { name, created_at: api.now() }).await;
    if let Err(error) = made {
        // One whose making broke off before its first key is finished; nobody else could.
        let begun = error.code == ErrorCode::Conflict && api.directory().keys(&id, "", 1).await?.is_empty();
        if !begun || !api.directory().is_untouched(&id).await? {
            return Err(error.into());
        }
    }
    let (_, key, _) = api.issuer.create_key(&id, "first", directory::KeyScope::Full).await?;
    Ok((StatusCode::CREATED, Json(CreatedTenant { id: id.to_string(), key })))
}
