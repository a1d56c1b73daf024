//! What handlers take: who asks, and strict bodies.

use std::sync::Arc;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, header};
use bytes::Bytes;
use patchbay_protocol::ids::TenantId;
use patchbay_protocol::principal::Principal;
use patchbay_protocol::{CommandError, ErrorCode};
use serde::de::DeserializeOwned;

use crate::Api;
use crate::problem::Failure;

/// The bearer secret of a request.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, secret) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(secret.trim())
}

async fn principal(parts: &Parts, api: &Api) -> Result<Principal, Failure> {
    // Asked once already, where an answer may have been kept.
    if let Some(known) = parts.extensions.get::<Principal>() {
        return Ok(known.clone());
    }
    let secret = bearer(&parts.headers).ok_or(ErrorCode::Unauthorized)?;
    Ok(api.auth.principal(secret).await?)
}

/// The operator.
pub(crate) struct Operator;

impl FromRequestParts<Arc<Api>> for Operator {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Failure> {
        match principal(parts, api).await? {
            Principal::Operator => Ok(Self),
            Principal::Tenant(_) | Principal::Reader(_) | Principal::Agent(_) | Principal::Contact(_) => {
                Err(ErrorCode::PermissionDenied.into())
            }
        }
    }
}

/// A tenant, by its key.
pub(crate) struct Tenant(pub(crate) TenantId);

impl FromRequestParts<Arc<Api>> for Tenant {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Failure> {
        match principal(parts, api).await? {
            Principal::Tenant(tenant) => Ok(Self(tenant)),
            Principal::Reader(tenant) if parts.method == Method::GET => Ok(Self(tenant)),
            Principal::Operator | Principal::Reader(_) | Principal::Agent(_) | Principal::Contact(_) => {
                Err(ErrorCode::PermissionDenied.into())
            }
        }
    }
}

/// Whoever is known: a key, an agent or a visitor.
pub(crate) struct Somebody(pub(crate) Principal);

impl FromRequestParts<Arc<Api>> for Somebody {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Failure> {
        principal(parts, api).await.map(Self)
    }
}

/// A JSON body, strictly: what is wrong is named. An empty body is `{}`.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<Api>> for Body<T> {
    type Rejection = Failure;
    async fn from_request(request: Request, api: &Arc<Api>) -> Result<Self, Failure> {
        let body = tokio::time::timeout(crate::BODY_TIMEOUT, Bytes::from_request(request, api)).await;
        let bytes = body.map_err(|_| Failure::too_slow())?.map_err(|_| ErrorCode::TooLarge)?;
        let bytes = if bytes.is_empty() { Bytes::from_static(b"{}") } else { bytes };
        Ok(Body(patchbay_protocol::command::parse(&bytes)?))
    }
}

/// A query, strictly.
pub(crate) struct Query<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequestParts<Arc<Api>> for Query<T> {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, _: &Arc<Api>) -> Result<Self, Failure> {
        let query = axum::extract::Query::<T>::try_from_uri(&parts.uri)
            .map_err(|e| CommandError::invalid(e.body_text()))?;
        Ok(Self(query.0))
    }
}

/// A name in the path; one that cannot be a name is not found.
pub(crate) fn name<T: std::str::FromStr>(text: &str) -> Result<T, Failure> {
    text.parse().map_err(|_| ErrorCode::NotFound.into())
}

/// A name to be given; one that cannot be a name is refused.
pub(crate) fn new_name<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, Failure>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|e| CommandError::invalid(format!("{field} {e}")).into())
}

/// The longest display name, in bytes.
pub(crate) const NAME_MAX: usize = 200;

/// A display name within its bound.
pub(crate) fn display_name(name: String) -> Result<String, Failure> {
    if name.len() > NAME_MAX {
        return Err(CommandError::invalid(format!("name has at most {NAME_MAX} bytes")).into());
    }
    Ok(name)
}

/// A page's size: larger is clamped.
pub(crate) fn page(limit: Option<usize>) -> usize {
    limit.unwrap_or(100).clamp(1, 1000)
}
