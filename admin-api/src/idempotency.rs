//! `Idempotency-Key`: the same key of the same caller on the same path gives the first answer again. Kept in memory, and
//! for other nodes in Redis, for a while; what must hold for ever (messages, notes) holds by `client_id`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::response::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
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
/// Stands for the hash of a file while it is on its way.
const UNREAD: [u8; 32] = [0; 32];

#[derive(Default)]
struct Inner {
    known: HashMap<[u8; 32], (u64, Kept)>,
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
                Some((c, Kept::Running { .. })) if *c == count => self.order.push_back((key, count, now)),
                Some((c, Kept::Answered { .. })) if *c == count => drop(self.known.remove(&key)),
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
    fn begin(&self, place: &Place, body: [u8; 32]) -> Kept {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let inner = all.entry(place.owner.clone()).or_default();
        inner.forget(now);
        if let Some((_, known)) = inner.known.get(&place.key) {
            return known.clone();
        }
        inner.count += 1;
        let count = inner.count;
        inner.known.insert(place.key, (count, Kept::Running { body }));
        inner.order.push_back((place.key, count, now));
        Kept::Ours
    }

    fn end(&self, place: &Place, answer: Option<Kept>) {
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

/// What is said to a request of which that is known; none: it is the first.
fn repeated(kept: Kept, body_hash: [u8; 32]) -> Option<Response> {
    let response = match kept {
        Kept::Ours => return None,
        Kept::Running { body } | Kept::Answered { body, .. } if body != body_hash => {
            let detail = json!({"detail": "this Idempotency-Key was used for another body"});
            Failure::from(CommandError::with(ErrorCode::Conflict, detail)).into_response()
        }
        Kept::Running { .. } => Failure::from(CommandError::overloaded(500)).into_response(),
        Kept::Answered { status, content_type, reply, .. } => {
            let mut response =
                (StatusCode::from_u16(status).unwrap_or(StatusCode::OK), reply).into_response();
            // None at all is not what a body gets by itself.
            response.headers_mut().remove(header::CONTENT_TYPE);
            if let Some(value) = HeaderValue::from_bytes(&content_type).ok().filter(|v| !v.is_empty()) {
                response.headers_mut().insert(header::CONTENT_TYPE, value);
            }
            response
        }
    };
    Some(response)
}

fn answered(body: [u8; 32], parts: &Parts, reply: &Bytes) -> Kept {
    let content_type = parts.headers.get(header::CONTENT_TYPE);
    Kept::Answered {
        body,
        status: parts.status.as_u16(),
        content_type: content_type.map(|c| Bytes::copy_from_slice(c.as_bytes())).unwrap_or_default(),
        reply: reply.clone(),
    }
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
    let known = api.replies.begin(&place, UNREAD);
    if let Kept::Answered { .. } = known {
        let read = body.for_each(|_| std::future::ready(()));
        if tokio::time::timeout(crate::BODY_TIMEOUT, read).await.is_err() {
            return Failure::too_slow().into_response();
        }
        return repeated(known, ended()).unwrap_or_default();
    }
    if let Some(response) = repeated(known, UNREAD) {
        return response;
    }
    let running = Running { replies: &api.replies, place: place.clone() };
    let response = next.run(Request::from_parts(parts, Body::from_stream(body))).await;
    std::mem::forget(running);
    let status = response.status();
    let (parts, body) = response.into_parts();
    let reply = to_bytes(body, usize::MAX).await.unwrap_or_default();
    let kept = answered(ended(), &parts, &reply);
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
    if let Some(response) = repeated(api.replies.begin(&place, body_hash), body_hash) {
        return response;
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
        Ok(known) => repeated(known, body_hash),
        // Without word of the others this node remembers by itself.
        Err(Away) => None,
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
    let kept = (!again).then(|| answered(body_hash, &parts, &reply));
    if let Some(shared) = &api.shared {
        // What they do not hear of they do themselves: what must hold for ever holds by `client_id`.
        let _ = shared.end(&place.key, kept.as_ref(), KEPT_FOR).await;
    }
    api.replies.end(place, kept);
    Response::from_parts(parts, Body::from(reply))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(tenant: &str, n: usize) -> Place {
        Place { owner: Some(tenant.parse().unwrap()), key: digest(&[&n.to_be_bytes()]) }
    }

    fn is_first(replies: &Replies, place: &Place) -> bool {
        matches!(replies.begin(place, [0; 32]), Kept::Ours)
    }

    fn answered() -> Kept {
        Kept::Answered { body: [0; 32], status: 200, content_type: Bytes::new(), reply: Bytes::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_are_forgotten_but_nobody_elses_and_none_under_way() {
        let replies = Replies::default();
        assert!(is_first(&replies, &place("other", 0)));
        replies.end(&place("other", 0), Some(answered()));
        assert!(is_first(&replies, &place("acme", 0)), "under way all along");
        for n in 1..=KEPT_MAX + 100 {
            assert!(is_first(&replies, &place("acme", n)));
            replies.end(&place("acme", n), Some(answered()));
        }
        assert!(matches!(replies.begin(&place("acme", 0), [0; 32]), Kept::Running { .. }));
        assert!(is_first(&replies, &place("acme", 1)), "forgotten");
        assert!(!is_first(&replies, &place("acme", KEPT_MAX)));
        assert!(!is_first(&replies, &place("other", 0)), "another tenant's stands");
        let held = replies.0.lock().unwrap().values().map(|i| i.order.len()).max();
        assert!(held.unwrap() <= KEPT_MAX + 2, "{held:?}");
        tokio::time::advance(KEPT_FOR + Duration::from_secs(1)).await;
        assert!(is_first(&replies, &place("other", 0)), "a day later it is forgotten");
    }
}
