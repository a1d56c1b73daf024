//! `Idempotency-Key`: the same key of the same caller on the same path gives the first answer again. Kept in memory, and
//! for other nodes in Redis, for a while; what must hold for ever (messages, notes) holds by `client_id`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt as _;
use patchbay_protocol::principal::Principal;
use patchbay_protocol::{CommandError, ErrorCode, TenantId};
use patchbay_storage::redis::{Away, Kept};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use crate::Api;
use crate::problem::Failure;

/// Answers that are kept, and for how long.
const KEPT_MAX: usize = 10_000;
const KEPT_FOR: Duration = Duration::from_secs(24 * 3600);
/// The longest key.
const KEY_MAX: usize = 255;

#[derive(Clone)]
enum Known {
    /// The first is still under way.
    Running { body: [u8; 32] },
    /// It was answered so.
    Answered { body: [u8; 32], status: StatusCode, content_type: Option<header::HeaderValue>, reply: Bytes },
}

#[derive(Default)]
struct Inner {
    known: HashMap<[u8; 32], (u64, Known)>,
    order: VecDeque<([u8; 32], u64, Instant)>,
    count: u64,
}

impl Inner {
    /// Lets go of what is old, and of the oldest when there are too many; never of what is under way.
    fn forget(&mut self, now: Instant) {
        for _ in 0..self.order.len() {
            let old = self.order.front().is_some_and(|(_, _, at)| now.duration_since(*at) > KEPT_FOR);
            if !old && self.order.len() <= KEPT_MAX {
                return;
            }
            let Some((key, count, _)) = self.order.pop_front() else { return };
            match self.known.get(&key) {
                Some((c, Known::Running { .. })) if *c == count => self.order.push_back((key, count, now)),
                Some((c, Known::Answered { .. })) if *c == count => drop(self.known.remove(&key)),
                _ => {}
            }
        }
    }
}

/// Whose answers: a tenant's, or the operator's.
type Owner = Option<TenantId>;

/// Answers by caller, path and key; those of one tenant never push out another's.
#[derive(Default)]
pub(crate) struct Replies(Mutex<HashMap<Owner, Inner>>);

/// A request's place among them.
#[derive(Clone)]
struct Place {
    owner: Owner,
    key: [u8; 32],
}

impl Replies {
    /// What is known of a request; takes its place when nothing is.
    fn begin(&self, place: &Place, body: [u8; 32]) -> Option<Known> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let inner = all.entry(place.owner.clone()).or_default();
        inner.forget(now);
        if let Some((_, known)) = inner.known.get(&place.key) {
            return Some(known.clone());
        }
        inner.count += 1;
        let count = inner.count;
        inner.known.insert(place.key, (count, Known::Running { body }));
        inner.order.push_back((place.key, count, now));
        None
    }

    fn end(&self, place: &Place, answer: Option<Known>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(inner) = all.get_mut(&place.owner) else { return };
        match answer {
            Some(answer) => {
                if let Some((_, known)) = inner.known.get_mut(&place.key) {
                    *known = answer;
                }
            }
            None => {
                inner.known.remove(&place.key);
            }
        }
    }
}

fn owner(principal: &Principal) -> Owner {
    match principal {
        Principal::Operator => None,
        Principal::Tenant(tenant) | Principal::Reader(tenant) => Some(tenant.clone()),
        Principal::Agent(agent) => Some(agent.tenant.clone()),
        Principal::Contact(contact) => Some(contact.tenant.clone()),
    }
}

fn digest(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

fn key_of(headers: &HeaderMap) -> Option<Result<String, Failure>> {
    let value = headers.get("idempotency-key")?;
    let text = value.to_str().ok().filter(|k| (1..=KEY_MAX).contains(&k.len()));
    Some(text.map(str::to_owned).ok_or_else(|| {
        CommandError::invalid(format!("Idempotency-Key must have 1 to {KEY_MAX} characters")).into()
    }))
}

fn again(status: StatusCode, content_type: Option<header::HeaderValue>, reply: Bytes) -> Response {
    let mut response = (status, reply).into_response();
    if let Some(content_type) = content_type {
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    }
    response
}

/// A file is a stream: it is hashed as it passes, the first time on its way into its place.
async fn file(api: Arc<Api>, owner: Owner, key: String, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let caller = parts.headers.get(header::AUTHORIZATION).map_or(&b""[..], |v| v.as_bytes());
    let target = parts.uri.path_and_query().map_or("", |p| p.as_str());
    let place = Place { owner, key: digest(&[caller, target.as_bytes(), key.as_bytes()]) };
    let hash = Arc::new(Mutex::new(Sha256::new()));
    let seen = hash.clone();
    let body = body.into_data_stream().inspect(move |chunk| {
        if let Ok(bytes) = chunk {
            seen.lock().unwrap_or_else(PoisonError::into_inner).update(bytes);
        }
    });
    let ended = || hash.lock().unwrap_or_else(PoisonError::into_inner).clone().finalize().into();
    match api.replies.begin(&place, [0; 32]) {
        None => {}
        Some(Known::Running { .. }) => return Failure::from(CommandError::overloaded(500)).into_response(),
        Some(Known::Answered { body: first, status, content_type, reply }) => {
            let read = body.for_each(|_| std::future::ready(()));
            if tokio::time::timeout(crate::BODY_TIMEOUT, read).await.is_err() {
                return Failure::too_slow().into_response();
            }
            let same: [u8; 32] = ended();
            if same != first {
                let detail = json!({"detail": "this Idempotency-Key was used for another body"});
                return Failure::from(CommandError::with(ErrorCode::Conflict, detail)).into_response();
            }
            return again(status, content_type, reply);
        }
    }
    let running = Running { replies: &api.replies, place: place.clone() };
    let response = next.run(Request::from_parts(parts, Body::from_stream(body))).await;
    std::mem::forget(running);
    let status = response.status();
    let (parts, body) = response.into_parts();
    let reply = to_bytes(body, usize::MAX).await.unwrap_or_default();
    let content_type = parts.headers.get(header::CONTENT_TYPE).cloned();
    let kept = Known::Answered { body: ended(), status, content_type, reply: reply.clone() };
    api.replies.end(&place, status.is_success().then_some(kept));
    Response::from_parts(parts, Body::from(reply))
}

/// A file's first upload; one that is broken off leaves its key free.
struct Running<'a> {
    replies: &'a Replies,
    place: Place,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.replies.end(&self.place, None);
    }
}

/// Gives the first answer again. Answers that say "try again" are not kept.
pub(crate) async fn layer(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let key = match key_of(request.headers()) {
        None => return next.run(request).await,
        Some(Err(failure)) => return failure.into_response(),
        Some(Ok(key)) => key,
    };
    // Nobody without a key takes a place among the answers.
    let secret = crate::extract::bearer(request.headers());
    let known = match secret {
        Some(secret) => api.auth.principal(secret).await,
        None => Err(ErrorCode::Unauthorized.into()),
    };
    let owner = match known {
        Ok(principal) => {
            let owner = owner(&principal);
            request.extensions_mut().insert(principal);
            owner
        }
        Err(e) => return Failure::from(e).into_response(),
    };
    if request.uri().path().ends_with("/media") {
        return file(api, owner, key, request, next).await;
    }
    let (parts, body) = request.into_parts();
    let body = match tokio::time::timeout(crate::BODY_TIMEOUT, to_bytes(body, crate::BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => return Failure::from(ErrorCode::TooLarge).into_response(),
        Err(_) => return Failure::too_slow().into_response(),
    };
    let caller = parts.headers.get(header::AUTHORIZATION).map_or(&b""[..], |v| v.as_bytes());
    let place = Place { owner, key: digest(&[caller, parts.uri.path().as_bytes(), key.as_bytes()]) };
    let body_hash = digest(&[&body]);
    match api.replies.begin(&place, body_hash) {
        Some(Known::Running { body } | Known::Answered { body, .. }) if body != body_hash => {
            let detail = json!({"detail": "this Idempotency-Key was used for another body"});
            return Failure::from(CommandError::with(ErrorCode::Conflict, detail)).into_response();
        }
        Some(Known::Running { .. }) => return Failure::from(CommandError::overloaded(500)).into_response(),
        Some(Known::Answered { status, content_type, reply, .. }) => {
            return again(status, content_type, reply);
        }
        None => {}
    }
    if let Some(answer) = elsewhere(&api, &place, body_hash).await {
        api.replies.end(&place, None);
        return answer;
    }
    // A caller that hangs up leaves the work to its end: a repeat finds the answer.
    let work = tokio::spawn(async move {
        run(&api, &place, body_hash, next, Request::from_parts(parts, Body::from(body))).await
    });
    work.await.unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

/// What another node has answered, or is about to.
async fn elsewhere(api: &Api, place: &Place, body_hash: [u8; 32]) -> Option<Response> {
    match api.shared.as_ref()?.begin(&place.key, body_hash).await {
        // Without word of the others this node remembers by itself.
        Ok(Kept::Ours) | Err(Away) => None,
        Ok(Kept::Running { body } | Kept::Answered { body, .. }) if body != body_hash => {
            let detail = json!({"detail": "this Idempotency-Key was used for another body"});
            Some(Failure::from(CommandError::with(ErrorCode::Conflict, detail)).into_response())
        }
        Ok(Kept::Running { .. }) => Some(Failure::from(CommandError::overloaded(500)).into_response()),
        Ok(Kept::Answered { status, content_type, reply, .. }) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
            let content_type =
                header::HeaderValue::from_bytes(&content_type).ok().filter(|value| !value.is_empty());
            Some(again(status, content_type, reply))
        }
    }
}

async fn run(api: &Api, place: &Place, body_hash: [u8; 32], next: Next, request: Request) -> Response {
    let response = next.run(request).await;
    let (parts, body) = response.into_parts();
    let Ok(reply) = to_bytes(body, usize::MAX).await else {
        api.replies.end(place, None);
        if let Some(shared) = &api.shared {
            let _ = shared.end(&place.key, None, KEPT_FOR).await;
        }
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let again = parts.status.is_server_error()
        || matches!(parts.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::UNAUTHORIZED);
    let content_type = parts.headers.get(header::CONTENT_TYPE).cloned();
    if let Some(shared) = &api.shared {
        let kept = Kept::Answered {
            body: body_hash,
            status: parts.status.as_u16(),
            content_type: content_type
                .as_ref()
                .map(|c| Bytes::copy_from_slice(c.as_bytes()))
                .unwrap_or_default(),
            reply: reply.clone(),
        };
        // What they do not hear of they do themselves: what must hold for ever holds by `client_id`.
        let _ = shared.end(&place.key, (!again).then_some(&kept), KEPT_FOR).await;
    }
    api.replies.end(
        place,
        (!again).then(|| Known::Answered {
            body: body_hash,
            status: parts.status,
            content_type,
            reply: reply.clone(),
        }),
    );
    Response::from_parts(parts, Body::from(reply))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(tenant: &str, n: usize) -> Place {
        Place { owner: Some(tenant.parse().unwrap()), key: digest(&[&n.to_be_bytes()]) }
    }

    fn answered() -> Known {
        Known::Answered { body: [0; 32], status: StatusCode::OK, content_type: None, reply: Bytes::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_are_forgotten_but_nobody_elses_and_none_under_way() {
        let replies = Replies::default();
        assert!(replies.begin(&place("other", 0), [0; 32]).is_none());
        replies.end(&place("other", 0), Some(answered()));
        assert!(replies.begin(&place("acme", 0), [0; 32]).is_none(), "under way all along");
        for n in 1..=KEPT_MAX + 100 {
            assert!(replies.begin(&place("acme", n), [0; 32]).is_none());
            replies.end(&place("acme", n), Some(answered()));
        }
        assert!(matches!(replies.begin(&place("acme", 0), [0; 32]), Some(Known::Running { .. })));
        assert!(replies.begin(&place("acme", 1), [0; 32]).is_none(), "forgotten");
        assert!(replies.begin(&place("acme", KEPT_MAX), [0; 32]).is_some());
        assert!(replies.begin(&place("other", 0), [0; 32]).is_some(), "another tenant's stands");
        let held = replies.0.lock().unwrap().values().map(|i| i.order.len()).max();
        assert!(held.unwrap() <= KEPT_MAX + 2, "{held:?}");
        tokio::time::advance(KEPT_FOR + Duration::from_secs(1)).await;
        assert!(replies.begin(&place("other", 0), [0; 32]).is_none(), "a day later it is forgotten");
    }
}
