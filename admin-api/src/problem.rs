//! RFC 9457 problems: the same codes as on a socket.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use patchbay_protocol::{CommandError, ErrorCode};
use serde::Serialize;
use utoipa::ToSchema;

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem {
    /// The page that explains the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code's meaning.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// The code's name.
    pub code: String,
    /// What exactly.
    pub detail: String,
    /// When to try again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The tip, in a conflict with something newer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seq: Option<u64>,
}

/// An error on its way out.
pub(crate) struct Failure {
    error: CommandError,
    /// Another status than the code's own.
    status: Option<StatusCode>,
}

impl From<CommandError> for Failure {
    fn from(e: CommandError) -> Self {
        Self { error: e, status: None }
    }
}

impl From<ErrorCode> for Failure {
    fn from(code: ErrorCode) -> Self {
        CommandError::from(code).into()
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self { error, status } = self;
        let code = error.code;
        let own = StatusCode::from_u16(code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let status = status.unwrap_or(own);
        let field = |name: &str| error.detail.as_ref().and_then(|d| d.get(name)).cloned();
        let detail = field("detail")
            .and_then(|d| d.as_str().map(str::to_owned))
            .unwrap_or_else(|| code.meaning().to_owned());
        let retry_after_ms = error.retry_after_ms();
        let problem = Problem {
            kind: format!("https://patchbay.dev/errors/{}", code.name()),
            title: code.name().replace('_', " "),
            status: status.as_u16(),
            code: code.name().to_owned(),
            detail,
            retry_after_ms,
            last_seq: field("last_seq").and_then(|v| v.as_u64()),
        };
        let mut response = (status, Json(problem)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(ms) = retry_after_ms
            && let Ok(seconds) = HeaderValue::from_str(&ms.div_ceil(1000).to_string())
        {
            headers.insert(header::RETRY_AFTER, seconds);
        }
        if code == ErrorCode::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl Failure {
    /// A body that stopped coming.
    pub(crate) fn too_slow() -> Self {
        let error = CommandError::invalid("the body did not arrive in time");
        Self { error, status: Some(StatusCode::REQUEST_TIMEOUT) }
    }
}

/// There is no such path.
pub(crate) async fn not_found() -> Failure {
    ErrorCode::NotFound.into()
}

/// The path exists, but not for this method.
pub(crate) async fn method_not_allowed() -> Failure {
    Failure { error: ErrorCode::MethodNotFound.into(), status: Some(StatusCode::METHOD_NOT_ALLOWED) }
}
