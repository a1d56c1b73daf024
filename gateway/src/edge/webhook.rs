//! Webhooks of providers: `GET|POST /webhooks/{tenant}/{account}` (contract §6).
//!
//! Verified on the raw bytes; every item durable or dead-lettered before 200; 503 with `Retry-After` otherwise. An
//! unknown tenant, account or connector answers like a bad signature, after the same work.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use patchbay_actors::directory::{Account, Directory};
use patchbay_actors::intake::Intake;
use patchbay_actors::shares::Shares;
use patchbay_connectors::{Connector, NAMES, by_name};
use patchbay_protocol::inbound::{Item, ItemKind};
use patchbay_protocol::{AccountId, TenantId};
use serde_json::Value;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use crate::limits::{Limits, Peer, too_many};

/// The largest body.
pub const BODY_BYTES_MAX: usize = 4 << 20;
/// Bodies that are read or taken at once; past it the provider is told to come back.
pub const BODIES_MAX: usize = 1024;
/// What they may hold together; past it the provider is told to come back.
pub const BODIES_BYTES_MAX: usize = 256 << 20;
/// Bodies that are parsed and taken at once; past it they wait.
pub const TAKEN_AT_ONCE: usize = 128;
/// What they may hold together: what is parsed takes many times its bytes.
pub const TAKEN_BYTES_MAX: usize = 32 << 20;
/// Of them, those of one account.
pub const ACCOUNT_TAKEN_AT_ONCE: usize = 32;
/// Of the bodies that are read, those of one address.
pub const PEER_BODIES_MAX: usize = 512;
/// How long a body waits for that.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);
/// What is over the bound is dropped up to here before the answer.
const DROPPED_BYTES_MAX: usize = 1 << 20;
/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// What the webhook door needs.
pub struct Webhooks {
    intake: Arc<Intake>,
    directory: Arc<Directory>,
    bodies: Semaphore,
    /// In KiB.
    bytes: Arc<Semaphore>,
    /// Bodies whose signature is being checked.
    checks: Semaphore,
    turns: Semaphore,
    /// In KiB.
    taken_bytes: Semaphore,
    /// Turns of each account that has any.
    accounts: Shares<(TenantId, AccountId)>,
    /// Bodies of each address that sends any.
    peers: Shares<Option<IpAddr>>,
    limits: Arc<Limits>,
}

impl Webhooks {
    /// The door of a node.
    pub fn new(intake: Arc<Intake>, directory: Arc<Directory>, limits: Arc<Limits>) -> Arc<Self> {
        Arc::new(Self {
            intake,
            directory,
            bodies: Semaphore::new(BODIES_MAX),
            bytes: Arc::new(Semaphore::new(BODIES_BYTES_MAX / 1024)),
            checks: Semaphore::new(TAKEN_AT_ONCE),
            turns: Semaphore::new(TAKEN_AT_ONCE),
            taken_bytes: Semaphore::new(TAKEN_BYTES_MAX / 1024),
            accounts: Shares::new(|| Semaphore::new(ACCOUNT_TAKEN_AT_ONCE)),
            peers: Shares::new(|| Semaphore::new(PEER_BODIES_MAX)),
            limits,
        })
    }

    async fn find(
        &self,
        tenant: &str,
        account: &str,
    ) -> Result<Option<(TenantId, AccountId, Arc<Account>)>, ()> {
        let (Ok(tenant), Ok(account)) = (tenant.parse::<TenantId>(), account.parse::<AccountId>()) else {
            return Ok(None);
        };
        let found = self.directory.account(&tenant, &account).await.map_err(|_| ())?;
        Ok(found.map(|document| (tenant, account, document)))
    }
}

fn connector_of(account: Option<&Account>) -> Option<&'static dyn Connector> {
    // Without an account, or where it has no webhooks, the same work is done by one that has; its answer does not
    // matter, since nobody's credentials are of its kind.
    let own = account.and_then(|a| by_name(&a.connector)).filter(|c| !c.channel().direct);
    own.or_else(|| by_name(NAMES[0]))
}

/// The provider's handshake.
pub async fn challenge(
    State(door): State<Arc<Webhooks>>,
    Path((tenant, account)): Path<(String, String)>,
    peer: Option<Extension<Peer>>,
    request: Request,
) -> Response {
    let from = peer.map(|Extension(Peer(ip))| ip);
    let Ok(found) = door.find(&tenant, &account).await else { return try_again() };
    let query = parse_query(request.uri().query().unwrap_or(""));
    let document = found.as_ref().map(|(_, _, d)| d.as_ref());
    let credentials = document.map_or(Value::Null, |d| d.credentials.clone());
    let answer = connector_of(document)
        .and_then(|c| c.challenge(&credentials, &query).ok())
        .filter(|_| document.is_some());
    match answer {
        Some(text) => {
            let headers = [(header::CONTENT_TYPE, "text/plain"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
            (StatusCode::OK, headers, text).into_response()
        }
        // Nobody guesses a token at full speed.
        None => match door.limits.stranger(from) {
            Ok(()) => refused(StatusCode::FORBIDDEN),
            Err(error) => too_many(&error),
        },
    }
}

/// A body of the provider.
pub async fn receive(
    State(door): State<Arc<Webhooks>>,
    Path((tenant, account)): Path<(String, String)>,
    peer: Option<Extension<Peer>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let from = peer.map(|Extension(Peer(ip))| ip);
    let (Some(_share), Ok(_place)) = (door.peers.take(from), door.bodies.try_acquire()) else {
        return try_again();
    };
    let (body, _held) = match tokio::time::timeout(BODY_TIMEOUT, read(body, &door.bytes)).await {
        Ok(Ok(read)) => read,
        Ok(Err(Unread::TooLarge)) => return StatusCode::PAYLOAD_TOO_LARGE.into_response(),
        Ok(Err(Unread::NoRoom)) => return try_again(),
        Ok(Err(Unread::Broken)) | Err(_) => return StatusCode::REQUEST_TIMEOUT.into_response(),
    };
    let started = std::time::Instant::now();
    let response = take(&door, &tenant, &account, &headers, &body).await;
    if response.status() == StatusCode::UNAUTHORIZED
        && let Err(error) = door.limits.stranger(from)
    {
        return too_many(&error);
    }
    let status = response.status().as_u16().to_string();
    metrics::histogram!("patchbay_webhook_answer_seconds", "status" => status)
        .record(started.elapsed().as_secs_f64());
    response
}

/// Why a body was not read.
enum Unread {
    /// It is over the bound.
    TooLarge,
    /// Too much is held already.
    NoRoom,
    /// Its sender broke off.
    Broken,
}

/// A whole body, with what it holds of the room for all. A little of what is over the bound is read and dropped, so
/// that whoever sends it is there to hear the answer.
async fn read(body: Body, room: &Arc<Semaphore>) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Unread> {
    let mut stream = body.into_data_stream();
    let mut kept = BytesMut::new();
    let mut held: Option<OwnedSemaphorePermit> = None;
    let mut over = 0;
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|_| Unread::Broken)?;
        if over == 0 && kept.len() + chunk.len() <= BODY_BYTES_MAX {
            let needed = (kept.len() + chunk.len()).div_ceil(1024) - kept.len().div_ceil(1024);
            if needed > 0 {
                let more = u32::try_from(needed).map_err(|_| Unread::TooLarge)?;
                let more = room.clone().try_acquire_many_owned(more).map_err(|_| Unread::NoRoom)?;
                match &mut held {
                    Some(held) => held.merge(more),
                    None => held = Some(more),
                }
            }
            kept.extend_from_slice(&chunk);
            continue;
        }
        over += chunk.len();
        if over > DROPPED_BYTES_MAX {
            break;
        }
    }
    if over == 0 { Ok((kept.freeze(), held)) } else { Err(Unread::TooLarge) }
}

async fn take(door: &Webhooks, tenant: &str, account: &str, headers: &HeaderMap, body: &Bytes) -> Response {
    let check = waited(door.checks.acquire()).await;
    let Some(check) = check else { return try_again() };
    let Ok(found) = door.find(tenant, account).await else { return try_again() };
    let document = found.as_ref().map(|(_, _, d)| d.as_ref());
    let credentials = document.map_or(Value::Null, |d| d.credentials.clone());
    let get = |name: &str| headers.get(name).map(|v| v.as_bytes().to_vec());
    let verified = connector_of(document).is_some_and(|c| c.verify(&credentials, &get, body));
    drop(check);
    let (true, Some((tenant, account, document))) = (verified, found) else {
        return refused(StatusCode::UNAUTHORIZED);
    };
    let Some(connector) = by_name(&document.connector) else { return refused(StatusCode::UNAUTHORIZED) };
    // Only what is signed counts: nobody shuts an account's door from outside.
    if let Err(error) = door.limits.webhook(&tenant, &account) {
        return too_many(&error);
    }
    // Those of one account wait for one another before they take what is there for all.
    let share = door.accounts.of((tenant.clone(), account.clone()));
    let Some(_share) = waited(share.acquire()).await else { return try_again() };
    let kib = u32::try_from(body.len().div_ceil(1024)).unwrap_or(u32::MAX);
    let turn = async { (door.turns.acquire().await, door.taken_bytes.acquire_many(kib).await) };
    let Ok((Ok(_turn), Ok(_bytes))) = tokio::time::timeout(TURN_TIMEOUT, turn).await else {
        return try_again();
    };
    let Ok(items) = connector.parse(body) else {
        return match door
            .intake
            .bury(&tenant, &account, "a signed body that is not understood", &whole(body))
            .await
        {
            Ok(()) => StatusCode::BAD_REQUEST.into_response(),
            Err(_) => try_again(),
        };
    };
    metrics::counter!("patchbay_webhook_items_total").increment(items.len() as u64);
    match door.intake.take(&tenant, &account, &document, items).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error) => {
            tracing::warn!(code = error.code.name(), "a webhook could not be taken now");
            try_again()
        }
    }
}

/// A turn, if it comes in time.
async fn waited<T>(turn: impl Future<Output = Result<T, AcquireError>>) -> Option<T> {
    tokio::time::timeout(TURN_TIMEOUT, turn).await.ok()?.ok()
}

/// A body as one item for the dead letters.
fn whole(body: &[u8]) -> Item {
    let raw = Value::String(String::from_utf8_lossy(body).into_owned());
    Item { external_id: String::new(), kind: ItemKind::Broken { reason: String::new() }, raw }
}

fn refused(status: StatusCode) -> Response {
    (status, "refused").into_response()
}

fn try_again() -> Response {
    let mut response = StatusCode::SERVICE_UNAVAILABLE.into_response();
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// The parameters of a query, decoded.
fn parse_query(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|p| !p.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        })
        .collect()
}

fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        match b {
            b'+' => out.push(b' '),
            b'%' => {
                let mut rest = bytes.clone();
                let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
                if let (Some(high), Some(low)) = (digit(rest.next()), digit(rest.next())) {
                    out.push(u8::try_from(high << 4 | low).unwrap_or(b'?'));
                    bytes = rest;
                } else {
                    out.push(b'%');
                }
            }
            b => out.push(b),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        assert_eq!(
            parse_query("a.b=1%2B2&c=x+y&d&%zz=%4"),
            [("a.b", "1+2"), ("c", "x y"), ("d", ""), ("%zz", "%4")].map(|(a, b)| (a.into(), b.into()))
        );
    }
}
